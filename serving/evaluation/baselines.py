"""What a model must beat: popularity and item-kNN, behind one protocol and judged by the model's path.

B histories · V items with training events · k places of a list
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from recsys.batch import FIRST_ITEM, PADDING, Batch, Sequences, gather
from recsys.content import ContentEncoder, Described
from recsys.ranker import Companions
from recsys.text import TextSettings
from serving.lists import Lists, best

NEIGHBOURS = 100
"""Most similar items kept for an item."""
HALF_LIFE = 2
"""Events after which a past event counts half; the best of 2, 4, 8, 16 on validation of ml-1m and amazon-beauty."""
BATCH = 256
"""Histories scored at once."""


class Baseline(Protocol):
    """Scores items for histories; ties rank by row, that is, by popularity."""

    def scores(self, histories: Batch) -> Tensor:
        """Float32, shape B × V; -inf for what may not be ranked."""
        ...


class Ranked:
    """A baseline as a lister."""

    reads_now = False

    def __init__(self, baseline: Baseline) -> None:
        self.baseline = baseline

    def recommend(self, histories: Batch, k: int, now: Tensor | None = None, *, filter_seen: bool = True) -> Lists:
        """The k best items for each history."""
        parts = []
        for start in range(0, len(histories), BATCH):
            stop = min(start + BATCH, len(histories))
            begins_B, ends_B = histories.offsets[start:stop], histories.offsets[start + 1 : stop + 1]
            part = gather(histories.values, histories.times, begins_B, ends_B)
            scores_BV = self.baseline.scores(part)
            if filter_seen:
                known_N = part.values < FIRST_ITEM + scores_BV.shape[1]
                scores_BV[part.owners[known_N], part.values[known_N] - FIRST_ITEM] = -torch.inf
            rows_BV = torch.arange(FIRST_ITEM, FIRST_ITEM + scores_BV.shape[1]).expand(len(part), -1)
            parts.append(Lists(*best(rows_BV, scores_BV, k), popular=part.lengths == 0))
        return Lists.joined(parts, k)


class Popularity:
    """The most popular items of the training part, for everybody."""

    def __init__(self, sequences: Sequences, items: int) -> None:
        train = gather(sequences.items, sequences.times, *sequences.windows("train")[:2])
        self.counts_V = torch.bincount(train.values, minlength=FIRST_ITEM + items)[FIRST_ITEM : FIRST_ITEM + items].float()

    def scores(self, histories: Batch) -> Tensor:
        return self.counts_V.repeat(len(histories), 1)


class ItemKNN:
    """Items that the same users had in the training part: cosine of item columns, summed over a fading history.

    (Sarwar et al. 2001; fading as in Ludewig & Jannach 2018.)
    """

    def __init__(self, sequences: Sequences, items: int) -> None:
        from scipy.sparse import coo_matrix

        near = Companions.of(sequences, items, NEIGHBOURS)
        lines_P, places_P = (near.rows_RK[FIRST_ITEM:] != PADDING).nonzero(as_tuple=True)
        columns_P = near.rows_RK[lines_P + FIRST_ITEM, places_P] - FIRST_ITEM
        cells = (near.cosines_RK[lines_P + FIRST_ITEM, places_P].numpy(), (lines_P.numpy(), columns_P.numpy()))
        self.similar_VV = coo_matrix(cells, shape=(items, items)).tocsr()

    def scores(self, histories: Batch) -> Tensor:
        ages_N = (torch.repeat_interleave(histories.offsets[1:], histories.lengths) - 1) - torch.arange(len(histories.values))
        recent_BV = _sparse(histories, 0.5 ** (ages_N / HALF_LIFE), self.similar_VV.shape[0])
        return torch.from_numpy((recent_BV @ self.similar_VV).toarray())


BASELINES: dict[str, Callable[[Sequences, int], Ranked]] = {
    "popularity": lambda sequences, items: Ranked(Popularity(sequences, items)),
    "item-kNN": lambda sequences, items: Ranked(ItemKNN(sequences, items)),
}


class MeanText:
    """The items whose text is nearest to the mean text vector of the history, by cosine; no event is learnt.

    `among_V` are the only items that are ranked.
    """

    def __init__(self, described: Described, learnt: int, among_V: Tensor) -> None:
        self.vectors_VP = ContentEncoder.fit(described.take(learnt), TextSettings()).encode(described).pooled_VP
        self.among_V = among_V

    def among(self, among_V: Tensor) -> MeanText:
        """The same over other items."""
        other = copy.copy(self)
        other.among_V = among_V
        return other

    def scores(self, histories: Batch) -> Tensor:
        known_N = histories.values < FIRST_ITEM + len(self.vectors_VP)
        sums_BP = torch.zeros(len(histories), self.vectors_VP.shape[1])
        sums_BP.index_add_(0, histories.owners[known_N], self.vectors_VP[histories.values[known_N] - FIRST_ITEM])
        return (normalize(sums_BP) @ self.vectors_VP.T).masked_fill(~self.among_V, -torch.inf)


def _sparse(histories: Batch, weights_N: Tensor, items: int) -> Any:
    """Histories as a CSR matrix of B lines and one column for each item that has training events; equal items add up."""
    from scipy.sparse import coo_matrix

    known_N = (histories.values >= FIRST_ITEM) & (histories.values < FIRST_ITEM + items)
    places = (histories.owners[known_N].numpy(), (histories.values[known_N] - FIRST_ITEM).numpy())
    return coo_matrix((weights_N[known_N].float().numpy(), places), shape=(len(histories), items)).tocsr()
