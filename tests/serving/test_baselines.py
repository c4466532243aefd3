"""Popularity, item-kNN and mean text, by hand and by one contract."""

import math

import pytest
import torch
from sklearn.linear_model import Ridge

from features.dataset import Dataset
from recsys.batch import FIRST_ITEM, PADDING, Batch, Sequences
from recsys.content import Described
from recsys.text import TextSettings
from serving.evaluation.baselines import (
    BASELINES,
    REPEATING,
    RIDGE,
    Linear,
    MeanText,
    Popularity,
    Ranked,
    RecentPopularity,
    item_knn,
)


def sequences(histories: list[list[int]], held_out: int = 0) -> Sequences:
    batch = Batch.of([[line + FIRST_ITEM for line in history] for history in histories])
    ends = batch.lengths - held_out
    return Sequences(batch.values.int(), batch.times, batch.offsets, ends, ends)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_fills_its_lists_with_unseen_items_in_order(name: str, dataset: Dataset) -> None:
    items, s = dataset.manifest["warm_items"], dataset.sequences
    histories = [s.items[s.offsets[user] : s.offsets[user + 1]].tolist() for user in range(0, 211, 3)] + [[]]
    lister = Ranked(BASELINES[name](s, items)[-1])
    lists = lister.recommend(Batch.of(histories), 53)
    for history, rows, scores in zip(histories, lists.rows.tolist(), lists.scores.tolist(), strict=True):
        assert not set(rows) & {PADDING, *history}
        order = list(zip((-score for score in scores), rows, strict=True))
        assert order == sorted(order)
    if name != "recent popularity":
        assert lists.rows[-1].tolist() == list(range(FIRST_ITEM, FIRST_ITEM + 53))
    seen = lister.recommend(Batch.of(histories), 53, filter_seen=False)
    assert any(set(rows) & set(history) for history, rows in zip(histories, seen.rows.tolist(), strict=True))


def test_popularity_counts_training_events_alone() -> None:
    counts_V = Popularity(sequences([[0, 1, 2], [0, 3, 2], [0, 0, 1, 2]], held_out=1), 3).counts_V
    assert counts_V.tolist() == [4, 2, 0]


def test_recent_popularity_counts_an_event_half_for_each_half_span_of_time() -> None:
    s = sequences([[0, 1], [1, 0, 0]])
    s.times[:] = torch.tensor([0, 100, 50, 75, 75])
    scores = RecentPopularity(s, 2, half_span=0.25).scores(Batch.of([[]]))[0]
    assert scores.tolist() == pytest.approx([1 / 16 + 1 / 2 + 1 / 2, 1 + 1 / 4])


def test_item_knn_is_the_cosine_of_item_columns_summed_over_a_fading_history() -> None:
    near_VV = item_knn(sequences([[0, 1], [0, 1, 2], [0, 0, 2], [3]]), 4)  # columns 0: 3 users, 1: 2, 2: 2, 3: 1
    knn = Linear(near_VV, half_life=3.0)
    scores_BV = knn.scores(Batch.of([[FIRST_ITEM + 1], [FIRST_ITEM, FIRST_ITEM + 3], [FIRST_ITEM + 1, FIRST_ITEM + 2]]))
    near, far = 2 / math.sqrt(3 * 2), 1 / 2
    fade = 0.5 ** (1 / 3)
    wanted_BV = [[near, 0, far, 0], [0, near * fade, near * fade, 0], [near * (1 + fade), far, far * fade, 0]]
    torch.testing.assert_close(scores_BV, torch.tensor(wanted_BV))


def test_ease_is_the_ridge_regression_of_each_item_on_the_others() -> None:
    """Its closed form against as many regressions, each without the item itself."""
    draw = torch.Generator().manual_seed(3)
    histories = [torch.randperm(7, generator=draw)[: 2 + user % 4].tolist() for user in range(31)]
    had_UV = torch.zeros(31, 7, dtype=torch.float64)
    for user, history in enumerate(histories):
        had_UV[user, history] = 1
    scores_BV = BASELINES["EASE"](sequences(histories), 7)[-1].scores(Batch.of([[FIRST_ITEM + i] for i in range(7)]))
    for item in range(7):
        others = [other for other in range(7) if other != item]
        model = Ridge(alpha=RIDGE, fit_intercept=False).fit(had_UV[:, others].numpy(), had_UV[:, item].numpy())
        assert scores_BV[others, item].tolist() == pytest.approx(model.coef_.tolist(), rel=1e-3, abs=1e-7)
    assert scores_BV.diagonal().tolist() == [0.0] * 7


def test_repeat_last_names_the_history_from_its_end_and_then_the_most_popular() -> None:
    (repeat,) = REPEATING["repeat-last"](sequences([[0, 1], [0, 2], [0, 3], [3]]), 5)
    lister = Ranked(repeat)
    history = Batch.of([[FIRST_ITEM + line for line in (2, 1, 2, 4, 1)], []])
    rows = lister.recommend(history, 5, filter_seen=False).rows - FIRST_ITEM
    assert rows.tolist() == [[1, 4, 2, 0, 3], [0, 3, 1, 2, 4]]


def test_baselines_know_no_event_of_an_item_that_is_not_learnt() -> None:
    histories = [[0, 5, 1], [5, 0, 6, 1, 2, 6], [0, 5, 0, 2], [6, 3], [5]]
    without = [[line for line in history if line < 5] for history in histories]
    batch = Batch.of([[FIRST_ITEM + line for line in history] for history in histories])
    for fit in (BASELINES | REPEATING).values():
        for known, plain in zip(*(fit(sequences(part).learnable(5), 5) for part in (histories, without)), strict=True):
            assert known.scores(batch).shape == (5, 5)
            assert torch.equal(known.scores(batch), plain.scores(batch))
            assert int(Ranked(known).recommend(batch, 7).rows.max()) < FIRST_ITEM + 5


def plain_similarity(texts: list[str], histories: list[list[int]]) -> list[list[float]]:
    """Cosine of the mean of a history with each item, where each text is a direction of its own."""
    scores = []
    for history in histories:
        counts = [sum(texts[line] == text for line in history) for text in texts]
        length = math.sqrt(sum(counts[texts.index(text)] ** 2 for text in set(texts)))
        scores.append([count / length for count in counts])
    return scores


def test_mean_text_is_the_cosine_with_the_mean_of_the_history() -> None:
    """Texts without a word in common are as many directions, whatever the singular vectors."""
    texts = ["brass lamp", "scarf", "kettle", "scarf", "brass lamp", "brass lamp", "kettle", "scarf"]
    kinds = [["red"], ["blue"], ["red", "old"], [], ["blue", "old", "red"], ["blue"], [], ["unheard"]]
    described = Described(texts, kinds, [[]] * 8)
    histories = [[0, 1, 1], [3], [4, 6], [7]]
    unseen = [{5, 6, 7}, {5, 6, 7}, {5, 7}, {5, 6}]
    baseline = MeanText(described, 7)
    batch = Batch.of([[FIRST_ITEM + line for line in history] for history in histories])
    scores_BV = torch.tensor(plain_similarity(texts, histories))
    torch.testing.assert_close(baseline.scores(batch), scores_BV, rtol=1e-5, atol=1e-5)
    among_V = torch.arange(8) >= 5
    assert torch.isfinite(baseline.scores(batch)).all()
    beyond = Batch.of([[FIRST_ITEM + 3, FIRST_ITEM + 8]])
    torch.testing.assert_close(baseline.scores(beyond), baseline.scores(Batch.of([[FIRST_ITEM + 3]])))
    rows = Ranked(baseline, among_V).recommend(batch, 5).rows
    assert [set(row) - {PADDING} for row in rows.tolist()] == [{FIRST_ITEM + line for line in few} for few in unseen]


def test_a_text_that_no_component_holds_is_near_to_nothing() -> None:
    kept = TextSettings().size
    words = [f"word{place}" for place in range(kept)]
    texts = [*words, *words, "stool"]  # a direction for each word, and one more than are kept: the seldom one is cut
    baseline = MeanText(Described(texts, [[]] * len(texts), [[]] * len(texts)), len(texts))
    scores_BV = baseline.scores(Batch.of([[FIRST_ITEM], [FIRST_ITEM + 2 * kept]]))
    assert scores_BV[0, kept] > 0.999 and scores_BV[0, 2 * kept].abs() < 1e-3
    assert (scores_BV[1].abs() < 1e-3).all()
