"""What a model must beat: popularity, recent popularity, item-kNN, EASE and repeat-last, judged by the model's path.

B histories · V items with training events · k places of a list
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
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
HALF_LIVES = (8.0, 2.0, 4.0, 16.0, float("inf"))
"""Tried: events after which a past event counts half. The first is taken where there is no validation."""
HALF_SPANS = (0.1, 0.005, 0.02, 0.3)
"""Tried: the share of the time that training events span after which an event counts half; likewise."""
RIDGE = 500.0
"""What EASE adds to the diagonal of the items' Gram matrix."""
LARGEST = 15_000
"""Items of EASE at most: weights of .9 GB, solved in about a minute."""
BATCH = 256
"""Histories scored at once."""


class Baseline(Protocol):
    """Scores items for histories; ties rank by row, that is, by popularity."""

    def scores(self, histories: Batch) -> Tensor:
        """Float32, shape B × V; -inf for what may not be ranked."""
        ...


class Ranked:
    """A baseline as a lister; where `among_V` is given, bool of each item of the catalogue, of those items alone."""

    reads_now = False

    def __init__(self, baseline: Baseline, among_V: Tensor | None = None) -> None:
        self.baseline, self.among_V = baseline, among_V

    def recommend(self, histories: Batch, k: int, now: Tensor | None = None, *, filter_seen: bool = True) -> Lists:
        """The k best items for each history."""
        parts = []
        for start in range(0, len(histories), BATCH):
            stop = min(start + BATCH, len(histories))
            begins_B, ends_B = histories.offsets[start:stop], histories.offsets[start + 1 : stop + 1]
            part = gather(histories.values, histories.times, begins_B, ends_B)
            scores_BV = self.baseline.scores(part)
            if self.among_V is not None:
                scores_BV = scores_BV.masked_fill(~self.among_V[: scores_BV.shape[1]], -torch.inf)
            if filter_seen:
                known_N = part.values < FIRST_ITEM + scores_BV.shape[1]
                scores_BV[part.owners[known_N], part.values[known_N] - FIRST_ITEM] = -torch.inf
            rows_BV = torch.arange(FIRST_ITEM, FIRST_ITEM + scores_BV.shape[1]).expand(len(part), -1)
            parts.append(Lists(*best(rows_BV, scores_BV, k), popular=part.lengths == 0))
        return Lists.joined(parts, k)


class Popularity:
    """The most popular items of the training part, for everybody."""

    def __init__(self, sequences: Sequences, items: int) -> None:
        self.counts_V = sequences.training_counts(items).float()

    def scores(self, histories: Batch) -> Tensor:
        return self.counts_V.repeat(len(histories), 1)


class RecentPopularity:
    """The items most popular of late, for everybody: a training event counts half for each `half_span` of the time that
    training events span."""

    def __init__(self, sequences: Sequences, items: int, half_span: float) -> None:
        train = sequences.histories("train")
        last, first = (int(train.times.max()), int(train.times.min())) if len(train.times) else (0, 0)
        weights_N = 0.5 ** ((last - train.times).double() / max(1.0, half_span * (last - first)))
        rows = FIRST_ITEM + items
        self.scores_V = torch.bincount(train.values, weights_N, minlength=rows)[FIRST_ITEM:rows].float()

    def scores(self, histories: Batch) -> Tensor:
        return self.scores_V.repeat(len(histories), 1)


class RepeatLast:
    """The items of the history, the latest first; then the most popular ones."""

    def __init__(self, sequences: Sequences, items: int) -> None:
        self.popularity = Popularity(sequences, items)

    def scores(self, histories: Batch) -> Tensor:
        scores_BV = self.popularity.scores(histories)
        items = scores_BV.shape[1]
        known_N = (histories.values >= FIRST_ITEM) & (histories.values < FIRST_ITEM + items)
        places_N = torch.arange(1, len(histories.values) + 1) - histories.offsets[:-1][histories.owners]
        ahead_N = float(scores_BV.max()) + places_N.float() if len(scores_BV) else places_N.float()
        cells_N = histories.owners[known_N] * items + histories.values[known_N] - FIRST_ITEM
        scores_BV.view(-1).scatter_reduce_(0, cells_N, ahead_N[known_N], "amax")
        return scores_BV


class Linear:
    """Weights between items, applied to a fading history: an event counts half for each `half_life` events after it."""

    def __init__(self, weights_VV: Any, half_life: float) -> None:
        self.weights_VV, self.half_life = weights_VV, half_life

    def scores(self, histories: Batch) -> Tensor:
        ages_N = (torch.repeat_interleave(histories.offsets[1:], histories.lengths) - 1) - torch.arange(len(histories.values))
        recent_BV = _sparse(histories, 0.5 ** (ages_N / self.half_life), self.weights_VV.shape[0])
        scores_BV = recent_BV @ self.weights_VV
        return torch.from_numpy(scores_BV if isinstance(scores_BV, np.ndarray) else scores_BV.toarray())


def item_knn(sequences: Sequences, items: int) -> Any:
    """Cosine of item columns in the training part, of the NEIGHBOURS nearest (Sarwar et al. 2001); sparse, V × V."""
    from scipy.sparse import coo_matrix

    near = Companions.of(sequences, items, NEIGHBOURS)
    lines_P, places_P = (near.rows_RK[FIRST_ITEM:] != PADDING).nonzero(as_tuple=True)
    columns_P = near.rows_RK[lines_P + FIRST_ITEM, places_P] - FIRST_ITEM
    cells = (near.cosines_RK[lines_P + FIRST_ITEM, places_P].numpy(), (lines_P.numpy(), columns_P.numpy()))
    return coo_matrix(cells, shape=(items, items)).tocsr()


def ease(sequences: Sequences, items: int) -> Any:
    """I - P diag(P)^-1 with P = (X'X + RIDGE I)^-1, of users × items X of the training part (EASE: Steck 2019); V × V.

    Of the LARGEST most popular items alone: the others score nothing.
    """
    items = min(items, LARGEST)
    train = sequences.histories("train")
    had_UV = _sparse(train, torch.ones(len(train.values)), items)
    had_UV.data[:] = 1
    gram_VV = torch.from_numpy((had_UV.T @ had_UV).toarray())
    gram_VV.diagonal().add_(RIDGE)
    inverse_VV = torch.cholesky_inverse(torch.linalg.cholesky(gram_VV))
    weights_VV = inverse_VV.div_(-inverse_VV.diagonal().clone())
    weights_VV.diagonal().zero_()
    return weights_VV.numpy()


def _fading(weights_VV: Any) -> list[Baseline]:
    return [Linear(weights_VV, half_life) for half_life in HALF_LIVES]


BASELINES: dict[str, Callable[[Sequences, int], Sequence[Baseline]]] = {
    "popularity": lambda sequences, items: [Popularity(sequences, items)],
    "recent popularity": lambda sequences, items: [RecentPopularity(sequences, items, span) for span in HALF_SPANS],
    "item-kNN": lambda sequences, items: _fading(item_knn(sequences, items)),
    "EASE": lambda sequences, items: _fading(ease(sequences, items)),
}
"""Name → what it learns of the training part: variants, of which validation chooses."""
REPEATING: dict[str, Callable[[Sequences, int], Sequence[Baseline]]] = {
    "repeat-last": lambda sequences, items: [RepeatLast(sequences, items)]
}
"""Of those that name items of the history, and hardly others."""


class MeanText:
    """The items whose text is nearest to the mean text vector of the history, by cosine; no event is learnt."""

    def __init__(self, described: Described, learnt: int) -> None:
        self.vectors_VP = ContentEncoder.fit(described.take(learnt), TextSettings()).encode(described).pooled_VP

    def scores(self, histories: Batch) -> Tensor:
        known_N = histories.values < FIRST_ITEM + len(self.vectors_VP)
        sums_BP = torch.zeros(len(histories), self.vectors_VP.shape[1])
        sums_BP.index_add_(0, histories.owners[known_N], self.vectors_VP[histories.values[known_N] - FIRST_ITEM])
        return normalize(sums_BP) @ self.vectors_VP.T


def _sparse(histories: Batch, weights_N: Tensor, items: int) -> Any:
    """Histories as a CSR matrix of B lines and one column for each item that has training events; equal items add up."""
    from scipy.sparse import coo_matrix

    known_N = (histories.values >= FIRST_ITEM) & (histories.values < FIRST_ITEM + items)
    places = (histories.owners[known_N].numpy(), (histories.values[known_N] - FIRST_ITEM).numpy())
    return coo_matrix((weights_N[known_N].float().numpy(), places), shape=(len(histories), items)).tocsr()
