"""Intervals cover what they say, tests are those of the books, and nothing is found more often than it may be."""

import math

import numpy as np
import pytest

from serving.evaluation import statistics
from serving.evaluation.statistics import bootstrap, compare_seeds, holm, minimal_detectable, paired


def drawn(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def coverage(rounds: int, truth: float, make, users: int, **settings: object) -> float:
    """How often the interval of a mean has the truth in it."""
    held = 0
    for number in range(rounds):
        low_M, high_M = bootstrap(make(drawn(number), users), drawn(1000 + number), **settings)
        held += int(low_M[0] <= truth <= high_M[0])
    return held / rounds


def test_an_interval_covers_the_mean_as_often_as_it_says():
    def hits(draw, users):
        return (draw.random((users, 1)) < 0.3).astype(float)

    assert 0.91 <= coverage(300, 0.3, hits, 211, draws=401) <= 0.98
    assert 0.74 <= coverage(300, 0.3, hits, 211, draws=401, level=0.8) <= 0.86


def test_an_interval_covers_also_where_users_are_missing_and_where_they_are_drawn_in_groups(monkeypatch):
    def some(draw, users):
        values = draw.exponential(2.0, (users, 1))
        values[draw.random(users) < 0.6] = np.nan
        return values

    assert 0.91 <= coverage(300, 2.0, some, 503, draws=401) <= 0.98
    monkeypatch.setattr(statistics, "GROUPS", 97)
    assert 0.91 <= coverage(300, 2.0, some, 503, draws=401) <= 0.98


def test_groups_change_an_interval_little(monkeypatch):
    values = drawn(1).random((10_007, 2))
    single = np.array(bootstrap(values, drawn(2)))
    monkeypatch.setattr(statistics, "GROUPS", 1_009)
    grouped = np.array(bootstrap(values, drawn(2)))
    assert np.allclose(single[1] - single[0], grouped[1] - grouped[0], rtol=0.12)
    assert np.allclose(single, grouped, atol=1e-3)


def test_the_same_seed_is_the_same_interval_and_columns_do_not_mix():
    values = drawn(3).random((101, 3))
    values[7:, 1] = np.nan
    both = [np.array(bootstrap(values, drawn(5), 211)) for _ in range(2)]
    assert np.array_equal(*both)
    for column in range(3):
        alone = bootstrap(values[:, [column]], drawn(5), 211)
        assert np.allclose(np.array(alone)[:, 0], both[0][:, column], atol=1e-12)


def test_a_constant_has_no_width_and_one_user_no_interval():
    values = np.full((31, 3), 0.25)
    values[1:, 1] = np.nan
    values[:, 2] = np.nan
    low_M, high_M = bootstrap(values, drawn(0), 53)
    assert low_M[0] == high_M[0] == 0.25
    assert np.isnan(low_M[1:]).all() and np.isnan(high_M[1:]).all()


def test_the_paired_test_is_students():
    from scipy.stats import ttest_rel

    first, second = drawn(1).random(97), drawn(2).random(97) + 0.05
    wanted = ttest_rel(second, first)
    low, high = wanted.confidence_interval(0.9)
    found = paired(first, second, level=0.9)
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert found.relative == pytest.approx(second.mean() / first.mean() - 1)
    assert found.sd == pytest.approx((second - first).std(ddof=1))
    assert (found.users, found.wins, found.losses) == (97, int((second > first).sum()), int((second < first).sum()))


def test_who_is_missing_on_a_side_is_left_out():
    first, second = drawn(1).random(53), drawn(2).random(53)
    kept = paired(first[2:], second[2:])
    first[0], second[1] = np.nan, np.nan
    assert paired(first, second) == kept


def test_what_never_differs_differs_by_nothing():
    same = drawn(4).random(29)
    found = paired(same, same)
    assert (found.difference, found.low, found.high, found.p, found.wins, found.losses) == (0, 0, 0, 1, 0, 0)
    always = paired(np.full(5, 0.25), np.full(5, 0.75))
    assert (always.difference, always.low, always.high, always.p, always.wins) == (0.5, 0.5, 0.5, 0, 5)


@pytest.mark.parametrize("users", [0, 1])
def test_of_fewer_than_two_users_nothing_is_shown(users):
    found = paired(np.full(users, 0.25), np.full(users, 0.75))
    told = found.as_dict()
    assert (found.p, found.users, told["difference"]["low"], told["relative"]["high"]) == (1, users, None, None)


def test_the_relative_interval_is_the_shares_that_the_test_does_not_reject():
    first, second = drawn(1).random(101), drawn(1).random(101) * 0.9 + drawn(2).random(101) * 0.2
    found = paired(first, second)
    for share in (found.relative_low, found.relative_high):
        assert paired((1 + share) * first, second).p == pytest.approx(0.05, abs=1e-9)
    assert (found.relative_low > 0) == (found.low > 0)
    inside = (found.relative_low + found.relative_high) / 2
    assert paired((1 + inside) * first, second).p > 0.5


def test_a_first_side_that_may_be_zero_has_no_relative_interval():
    found = paired(np.array([0.0, 0, 0, 1]), np.array([1.0, 0, 1, 1]))
    assert math.isnan(found.relative_low) and found.as_dict()["relative"]["low"] is None
    assert paired(np.zeros(3), np.ones(3)).as_dict()["relative"]["mean"] is None


def rejections(rounds: int, seeds: tuple[int, int], noise: float, planted: float = 0.0) -> float:
    """How often p < .05 of two sides whose trainings differ by `noise`."""
    found = 0
    for number in range(rounds):
        draw = drawn(number)
        users = draw.random(101)
        sides = [users + draw.normal(0, noise, (count, 1)) + draw.normal(0, 0.2, (count, 101)) for count in seeds]
        found += compare_seeds(sides[0], sides[1] + planted).p < 0.05
    return found / rounds


def test_noise_between_seeds_is_in_the_interval_where_there_are_several():
    assert rejections(600, (3, 3), 0.05) <= 0.07
    assert rejections(600, (5, 4), 0.05) <= 0.07
    assert rejections(600, (1, 1), 0.05) > 0.2  # what one seed of each cannot know
    assert rejections(100, (3, 3), 0.01, planted=0.15) > 0.95


def test_seeds_worked_by_hand():
    first, second = np.array([[0.1, 0.3, 0.2], [0.3, 0.5, 0.4]]), np.array([[0.4, 0.4, 0.7]])
    found = compare_seeds(first, second)
    apart = [0.4 - 0.2, 0.4 - 0.4, 0.7 - 0.3]  # mean .2, variance .04
    variances = 0.04 / 3, 0.02 / 2  # the first side's seeds have the means .2 and .4
    assert found.difference == pytest.approx(np.mean(apart))
    assert found.error == pytest.approx(math.sqrt(sum(variances)))
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 1)
    from scipy.stats import t

    assert found.high - found.difference == pytest.approx(t.ppf(0.975, freedom) * found.error)


def test_holm_worked_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_false_finding():
    wrong = sum(min(holm(drawn(number).random(23).tolist())) < 0.05 for number in range(1000))
    assert wrong <= 70


def test_the_minimal_detectable_difference_is_found_as_often_as_it_says():
    least = minimal_detectable(0.3, 211)
    assert least == pytest.approx((1.959964 + 0.841621) * 0.3 / math.sqrt(211), rel=1e-6)
    found = sum(paired(np.zeros(211), drawn(number).normal(least, 0.3, 211)).p < 0.05 for number in range(500))
    assert 0.74 <= found / 500 <= 0.86
    assert math.isnan(minimal_detectable(0.3, 0))
