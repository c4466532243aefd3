"""Ranked lists: what every recommender answers, and the one order in which items stand.

B histories · C candidates · k places of a list
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys.batch import PADDING, Batch


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

    @property
    def sources(self) -> list[str]:
        """What made each list: model or popularity."""
        return ["popularity" if popular else "model" for popular in self.popular.tolist()]

    @property
    def underfilled(self) -> int:
        """Lists with fewer than k items."""
        return int((self.rows == PADDING).any(1).sum())

    @staticmethod
    def joined(parts: Sequence[Lists], k: int) -> Lists:
        """The lists of consecutive batches as one; none: no lists of k places."""
        none = Lists(torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k), torch.zeros(0, dtype=torch.bool))
        columns = zip(*((part.rows, part.scores, part.popular) for part in (none, *parts)), strict=True)
        return Lists(*(torch.cat([tensor.cpu() for tensor in column]) for column in columns))


class Lister(Protocol):
    """Whatever names k items for each history: the served model, or a baseline."""

    @property
    def reads_now(self) -> bool:
        """Whether it reads when it is asked."""
        ...

    def recommend(self, histories: Batch, k: int, now: Tensor | None = None, *, filter_seen: bool = True) -> Lists: ...


def best(rows_BC: Tensor, scores_BC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best candidates by score, ties by row ascending: rows and float32 scores, shape B × k, padded on the right.

    Candidates that score -inf are left out. Score and row make one integer, so that no sort can break a tie otherwise.
    """
    bits_BC = (scores_BC.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 has other bits than 0.0
    bits_BC = torch.where(bits_BC < 0, bits_BC ^ 0x7FFFFFFF, bits_BC)  # now ordered as the floats are
    keys_BC = (bits_BC.long() << 32) - rows_BC
    order_BK = keys_BC.topk(min(k, keys_BC.shape[1]), dim=1).indices
    scores_BK, rows_BK = scores_BC.float().gather(1, order_BK), rows_BC.gather(1, order_BK)
    short = k - order_BK.shape[1]
    rows_BK = rows_BK.masked_fill(scores_BK == -torch.inf, PADDING)
    return pad(rows_BK, (0, short), value=PADDING), pad(scores_BK, (0, short), value=-torch.inf)
