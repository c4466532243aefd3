"""An alarm rings where the share of marked items rises, and seldom where it does not."""

from __future__ import annotations

import numpy as np
import pytest

from recsys.errors import RequestError
from serving.alarms import alarms


def test_an_alarm_is_fishers_exact_test_of_the_last_days_against_all_before() -> None:
    from scipy.stats import fisher_exact

    rng = np.random.default_rng(0)
    shown = rng.integers(3, 13, (7, 23))
    marked = rng.binomial(shown, np.where(np.arange(23) < 11, 0.1, 0.5))
    rung = alarms(marked, shown, days=3, chance=0.01)
    for stream, day in np.ndindex(rung.shape):
        recent, past = slice(max(0, day - 2), day + 1), slice(0, max(0, day - 2))
        table = [[part.sum() for part in (counts[stream, recent], counts[stream, past])] for counts in (marked, shown - marked)]
        assert rung[stream, day] == (fisher_exact(table, "greater").pvalue < 0.01), (stream, day)
    assert rung.any() and not rung.all()


def test_false_alarms_are_not_more_than_the_chance() -> None:
    marked = np.random.default_rng(1).binomial(11, 0.13, (2003, 31))
    assert 0 < alarms(marked, np.full_like(marked, 11), chance=0.01).mean() <= 0.01


def test_a_rise_rings_and_a_fall_does_not() -> None:
    shown = np.full((2, 41), 10)
    marked = np.where(np.arange(41) < 20, [[1], [5]], [[5], [1]])
    rung = alarms(marked, shown)
    assert rung[0, 20:25].any() and not rung[0, :20].any() and not rung[1].any()


def test_a_day_on_which_nothing_was_shown_changes_no_sum() -> None:
    rng = np.random.default_rng(2)
    marked = rng.binomial(10, 0.3, (3, 17))
    assert not alarms(np.zeros_like(marked), np.zeros_like(marked)).any()
    gap = np.insert(np.stack([marked, np.full_like(marked, 10)]), 0, 0, axis=2)
    assert (alarms(gap[0], gap[1])[:, 1:] == alarms(marked, np.full_like(marked, 10))).all()


@pytest.mark.parametrize(
    ("marked", "shown", "options"),
    [
        ([[2]], [[1]], {}),
        ([[1]], [[1, 2]], {}),
        ([[-1]], [[1]], {}),
        ([[1]], [[1]], {"days": 0}),
        ([[1]], [[1]], {"chance": 1.0}),
    ],
)
def test_counts_that_cannot_be_are_refused(marked: list[list[int]], shown: list[list[int]], options: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="give"):
        alarms(np.array(marked), np.array(shown), **options)
