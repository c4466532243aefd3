"""Ranked lists: what every recommender answers, and the one order in which items stand.

B histories · C candidates · k places of a list
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys.batch import PADDING

NARROW = 1024
"""Candidates up to which all are sorted."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Lists:
    """B ranked lists, best item first."""

    rows: Tensor
    """Item rows, int64, shape B × k; PADDING where fewer than k items could be named."""
    scores: Tensor
    """Float32, shape B × k; -inf where there is no item."""
    popular: Tensor
    """True where the history held nothing that the model knows, so that the list is the most popular items; bool, shape B."""
    probabilities: Tensor | None = None
    """That an item is the user's next one, where they were asked for: float32, shape B × k; 0 for popular lists."""
    ranked: bool = False
    """Whether a ranker put the others in order."""

    @property
    def sources(self) -> list[str]:
        """What made each list: ranked, retrieved or popularity."""
        return ["popularity" if popular else "ranked" if self.ranked else "retrieved" for popular in self.popular.tolist()]

    @property
    def underfilled(self) -> int:
        """Lists with fewer than k items."""
        return int((self.rows == PADDING).any(1).sum())

    @staticmethod
    def joined(parts: Sequence[Lists], k: int) -> Lists:
        """The lists of consecutive batches as one; none: no lists of k places."""
        none = Lists(torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k), torch.zeros(0, dtype=torch.bool))
        columns = zip(*((part.rows, part.scores, part.popular) for part in (none, *parts)), strict=True)
        rows, scores, popular = (torch.cat([tensor.cpu() for tensor in column]) for column in columns)
        return Lists(rows, scores, popular, ranked=any(part.ranked for part in parts))


def best(rows_BC: Tensor, scores_BC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best candidates of each history by score, ties by row ascending: rows and float32 scores, shape B × k, padded.

    Candidates that score -inf are left out.
    """
    rows_BK, scores_BK = ordered(rows_BC.cpu().numpy(), scores_BC.cpu().numpy(), k)
    return torch.from_numpy(rows_BK), torch.from_numpy(scores_BK)


def ordered(rows_BC: Array, scores_BC: Array, k: int) -> tuple[Array, Array]:
    """`best`, of arrays. Score and row make one integer, so that no sort can break a tie otherwise."""
    scores_BC = np.add(scores_BC, np.float32(0.0), dtype=np.float32)  # -0.0 has other bits than 0.0
    bits_BC = scores_BC.view(np.int32).astype(np.int64)
    bits_BC ^= (bits_BC >> 63) & 0x7FFFFFFF  # now ordered as the floats are
    keys_BC = rows_BC - (bits_BC << 32)
    lines_B1 = np.arange(len(keys_BC))[:, None]
    if NARROW < keys_BC.shape[1] > 4 * k:
        chosen_BK = keys_BC.argpartition(k)[:, :k]
        order_BK = chosen_BK[lines_B1, keys_BC[lines_B1, chosen_BK].argsort()]
    else:
        order_BK = keys_BC.argsort()[:, :k]
    scores_BK, rows_BK = scores_BC[lines_B1, order_BK], rows_BC[lines_B1, order_BK]
    rows_BK[scores_BK == -np.inf] = PADDING
    short = k - order_BK.shape[1]
    if short > 0:
        rows_BK = np.pad(rows_BK, ((0, 0), (0, short)), constant_values=PADDING)
        scores_BK = np.pad(scores_BK, ((0, 0), (0, short)), constant_values=-np.inf)
    return rows_BK, scores_BK
