"""Ranked lists: what every recommender answers, and the one order in which items stand.

B histories · C candidates · k places of a list
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from recsys.batch import PADDING, Batch

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


class Lister(Protocol):
    """Whatever names k items for each history: the served model, or a baseline."""

    @property
    def reads_now(self) -> bool:
        """Whether it reads when it is asked."""
        ...

    def recommend(self, histories: Batch, k: int, now: Tensor | None = None, *, filter_seen: bool = True) -> Lists: ...


def best(rows_BC: Tensor, scores_BC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`ordered`, of each history."""
    lines = zip(rows_BC.cpu().numpy(), scores_BC.cpu().numpy(), strict=True)
    found = [ordered(rows_C, scores_C, k) for rows_C, scores_C in lines]
    rows_BK, scores_BK = np.empty((len(found), k), np.int64), np.empty((len(found), k), np.float32)
    for place, (rows_K, scores_K) in enumerate(found):
        rows_BK[place], scores_BK[place] = rows_K, scores_K
    return torch.from_numpy(rows_BK), torch.from_numpy(scores_BK)


def ordered(rows_C: Array, scores_C: Array, k: int) -> tuple[Array, Array]:
    """The k best candidates by score, ties by row ascending: rows and float32 scores, of length k, padded on the right.

    Candidates that score -inf are left out. Score and row make one integer, so that no sort can break a tie otherwise.
    """
    scores_C = np.add(scores_C, np.float32(0.0), dtype=np.float32)  # -0.0 has other bits than 0.0
    bits_C = scores_C.view(np.int32).astype(np.int64)
    bits_C ^= (bits_C >> 63) & 0x7FFFFFFF  # now ordered as the floats are
    keys_C = rows_C - (bits_C << 32)
    if NARROW < len(keys_C) > 4 * k:
        chosen_C = keys_C.argpartition(k)[:k]
        order_K = chosen_C[keys_C[chosen_C].argsort()]
    else:
        order_K = keys_C.argsort()[:k]
    scores_K, rows_K = scores_C[order_K], rows_C[order_K]
    if not len(scores_K) or scores_K[-1] == -np.inf:
        rows_K = np.where(scores_K == -np.inf, PADDING, rows_K)
    short = k - len(order_K)
    if short > 0:
        rows_K = np.concatenate([rows_K, np.full(short, PADDING, rows_K.dtype)])
        scores_K = np.concatenate([scores_K, np.full(short, -np.inf, np.float32)])
    return rows_K, scores_K
