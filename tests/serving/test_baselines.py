"""Popularity and item-kNN, by hand and by one contract."""

import math

import pytest
import torch

from features.dataset import Dataset
from recsys.batch import FIRST_ITEM, PADDING, Batch, Sequences
from serving.baselines import BASELINES, HALF_LIFE, ItemKNN, Popularity


def sequences(histories: list[list[int]], held_out: int = 0) -> Sequences:
    batch = Batch.of([[line + FIRST_ITEM for line in history] for history in histories])
    ends = batch.lengths - held_out
    return Sequences(batch.values.int(), batch.times, batch.offsets, ends, ends)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_fills_its_lists_with_unseen_items_in_order(name: str, dataset: Dataset) -> None:
    items, s = dataset.manifest["warm_items"], dataset.sequences
    histories = [s.items[s.offsets[user] : s.offsets[user + 1]].tolist() for user in range(0, 211, 3)] + [[]]
    lister = BASELINES[name](s, items)
    lists = lister.recommend(Batch.of(histories), 53)
    for history, rows, scores in zip(histories, lists.rows.tolist(), lists.scores.tolist(), strict=True):
        assert not set(rows) & {PADDING, *history}
        order = list(zip((-score for score in scores), rows, strict=True))
        assert order == sorted(order)
    assert lists.rows[-1].tolist() == list(range(FIRST_ITEM, FIRST_ITEM + 53))
    seen = lister.recommend(Batch.of(histories), 53, filter_seen=False)
    assert any(set(rows) & set(history) for history, rows in zip(histories, seen.rows.tolist(), strict=True))


def test_popularity_counts_training_events_alone() -> None:
    counts_V = Popularity(sequences([[0, 1, 2], [0, 3, 2], [0, 0, 1, 2]], held_out=1), 3).counts_V
    assert counts_V.tolist() == [4, 2, 0]


def test_item_knn_is_the_cosine_of_item_columns_summed_over_a_fading_history() -> None:
    knn = ItemKNN(sequences([[0, 1], [0, 1, 2], [0, 0, 2], [3]]), 4)  # columns 0: 3 users, 1: 2, 2: 2, 3: 1
    scores_BV = knn.scores(Batch.of([[FIRST_ITEM + 1], [FIRST_ITEM, FIRST_ITEM + 3], [FIRST_ITEM + 1, FIRST_ITEM + 2]]))
    near, far = 2 / math.sqrt(3 * 2), 1 / 2
    fade = 0.5 ** (1 / HALF_LIFE)
    wanted_BV = [[near, 0, far, 0], [0, near * fade, near * fade, 0], [near * (1 + fade), far, far * fade, 0]]
    torch.testing.assert_close(scores_BV, torch.tensor(wanted_BV))
