"""What lists show, by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.batch import FIRST_ITEM, PADDING, Batch, Sequences
from serving.evaluation.beyond import Beyond, directions, gini


def sequences(histories: list[list[int]]) -> Sequences:
    batch = Batch.of([[line + FIRST_ITEM for line in history] for history in histories])
    return Sequences(batch.values.int(), batch.times, batch.offsets, batch.lengths, batch.lengths)


HISTORIES = [[0, 1], [0, 1], [2, 3], [2, 3, 0], [4]]  # counts 3 2 2 2 1, and an item 5 without events


def counts(items: int, histories: list[list[int]]) -> torch.Tensor:
    return torch.bincount(
        torch.tensor([line for history in histories for line in history]) + FIRST_ITEM, minlength=FIRST_ITEM + items
    )


@pytest.fixture
def beyond() -> Beyond:
    return Beyond(sequences(HISTORIES), counts(6, HISTORIES), FIRST_ITEM + torch.arange(5), torch.tensor([0, 4]), "test")


def rows(*lists: list[int]) -> torch.Tensor:
    return torch.tensor([[line + FIRST_ITEM if line >= 0 else PADDING for line in one] for one in lists])


def test_coverage_novelty_and_popularity_lift_by_hand(beyond: Beyond) -> None:
    shown = beyond.measure(rows([0, 1, 4], [0, 2, 5]), 2)
    assert shown.times_R[FIRST_ITEM:].tolist() == [2, 1, 1, 0, 0, 0]
    assert shown.whole["coverage@2"] == pytest.approx(3 / 5)
    bits = [-math.log2((count + 1) / (10 + 5)) for count in (3, 2, 2)]
    assert shown.users["novelty@2"].tolist() == pytest.approx([(bits[0] + bits[1]) / 2, (bits[0] + bits[2]) / 2])
    had = ((3 + 2) / 2 + 1) / 2
    assert shown.whole["popularity_lift@2"] == pytest.approx(((3 + 2) / 2 + (3 + 2) / 2) / 2 / had - 1)


def test_diversity_is_one_less_the_mean_cosine_of_pairs(beyond: Beyond) -> None:
    ways = directions(sequences(HISTORIES), counts(6, HISTORIES))[FIRST_ITEM:]
    shown = beyond.measure(rows([0, 1, 2], [3, -1, -1], [-1, -1, -1]), 3)
    pairs = [float(ways[a] @ ways[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    found = shown.users["diversity@3"].tolist()
    assert found[0] == pytest.approx(1 - sum(pairs) / 3, abs=1e-6)
    assert math.isnan(found[1])
    assert math.isnan(found[2])
    assert math.isnan(shown.users["novelty@3"][2])


def test_items_that_the_same_users_had_are_alike_and_others_are_not() -> None:
    histories = [[0, 1]] * 7 + [[2, 3]] * 5
    ways = directions(sequences(histories), counts(5, histories))[FIRST_ITEM:]
    cosines = ways @ ways.T
    assert cosines[0, 1] == pytest.approx(1, abs=1e-4)
    assert cosines[2, 3] == pytest.approx(1, abs=1e-4)
    assert abs(float(cosines[0, 2])) < 1e-4
    assert ways[4].tolist() == [0] * ways.shape[1]


def test_events_of_an_item_that_is_kept_cold_count_for_nothing() -> None:
    counts_R = torch.tensor([0, 0, 2, 1, 0])
    beyond = Beyond(sequences([[0, 2], [0, 1, 2]]), counts_R, FIRST_ITEM + torch.arange(3), torch.tensor([0, 1]), "test")
    assert beyond.had == pytest.approx(((2 + 0) / 2 + (2 + 1 + 0) / 3) / 2)
    assert beyond.ways_RD[FIRST_ITEM + 2].tolist() == [0] * beyond.ways_RD.shape[1]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any))
def test_gini_is_half_the_mean_difference_over_the_mean(counts: list[int]) -> None:
    values = np.array(counts, float)
    wanted = np.abs(values[:, None] - values).mean() / (2 * values.mean())
    assert gini(torch.tensor(counts)) == pytest.approx(wanted, abs=1e-9)


def test_gini_of_nothing_is_not_a_number() -> None:
    assert math.isnan(gini(torch.zeros(7)))
