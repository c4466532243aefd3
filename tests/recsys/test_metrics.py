"""Metrics against hand-worked cases and scikit-learn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from recsys.batch import Batch
from recsys.metrics import METRICS, MISSED, measure, measure_users, new_targets, target_ranks


def drawn(seed):
    """Scores of 3 users and 17 items, and which of them are targets: at least one of each user."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 17, generator=generator, dtype=torch.float64)
    relevant = torch.rand(3, 17, generator=generator) < 0.3
    relevant[:, 0] |= ~relevant.any(1)
    return scores, relevant


def test_a_hand_worked_case():
    ranks, owners = torch.tensor([1, 4, 11, 3]), torch.tensor([0, 0, 1, 3])
    found = measure(ranks, owners, users=5, ks=(3, 10))
    ideal_two = 1 + 1 / math.log2(3)
    assert found["recall@3"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert found["recall@10"] == pytest.approx((2 / 2 + 0 + 1) / 3)
    assert found["ndcg@3"] == pytest.approx((1 / ideal_two + 0 + 1 / 2) / 3)
    assert found["ndcg@10"] == pytest.approx(((1 + 1 / math.log2(5)) / ideal_two + 0 + 1 / 2) / 3)


def test_equal_scores_rank_by_column():
    scores = torch.tensor([[0.5, 0.7, 0.5, 0.5, -torch.inf]])
    owners, targets = torch.zeros(5, dtype=torch.int64), torch.arange(5)
    assert target_ranks(scores, owners, targets).tolist() == [2, 1, 3, 4, MISSED]


@given(st.integers(0, 10**6))
def test_ndcg_is_that_of_scikit_learn(seed):
    scores, relevant = drawn(seed)
    owners, targets = torch.nonzero(relevant, as_tuple=True)
    ours = measure(target_ranks(scores, owners, targets), owners, 3, ks=(5,))["ndcg@5"]
    assert ours == pytest.approx(ndcg_score(relevant.numpy().astype(float), scores.numpy(), k=5), abs=1e-9)


def test_targets_are_distinct_and_new():
    history, future = Batch.of([[5, 6], [], [7]]), Batch.of([[6, 9, 9, 4], [5], [7, 7]])
    owners, targets = new_targets(history, future)
    assert list(zip(owners.tolist(), targets.tolist(), strict=True)) == [(0, 4), (0, 9), (1, 5)]


def test_users_without_a_target_do_not_count():
    per_user = measure_users(torch.tensor([1]), torch.tensor([2]), users=7, ks=(10,))
    assert per_user["ndcg@10"].tolist() == [1.0]


def test_all_metrics_of_a_hand_worked_case():
    """A user with targets at 2, 5 and 11, one with a target at 1, one whose only target is missed."""
    ranks, owners = torch.tensor([5, 11, 2, 1, MISSED]), torch.tensor([0, 0, 0, 2, 3])
    found = measure_users(ranks, owners, users=5, ks=(1, 5, 10), metrics=METRICS)
    wanted = {
        "recall": ([0, 1, 0], [2 / 3, 1, 0], [2 / 3, 1, 0]),
        "mrr": ([0, 1, 0], [1 / 2, 1, 0], [1 / 2, 1, 0]),
        "map": ([0, 1, 0], [(1 / 2 + 2 / 5) / 3, 1, 0], [(1 / 2 + 2 / 5) / 3, 1, 0]),
        "hit": ([0, 1, 0], [1, 1, 0], [1, 1, 0]),
    }
    for metric, by_k in wanted.items():
        for k, values in zip((1, 5, 10), by_k, strict=True):
            assert found[f"{metric}@{k}"].tolist() == pytest.approx(values), (metric, k)


@given(st.integers(0, 10**6))
def test_average_precision_over_the_whole_catalogue_is_that_of_scikit_learn(seed):
    scores, relevant = drawn(seed)
    owners, targets = torch.nonzero(relevant, as_tuple=True)
    ours = measure_users(target_ranks(scores, owners, targets), owners, 3, ks=(17,), metrics=("map",))["map@17"]
    theirs = [average_precision_score(*pair) for pair in zip(relevant.numpy(), scores.numpy(), strict=True)]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-9)
