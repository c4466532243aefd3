"""Splits: the vectorised expressions agree with the plain sentence."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.split import DAY, SplitSettings, split_ends
from recsys.config import Recipe
from recsys.errors import RecipeError

HISTORIES = st.lists(st.lists(st.integers(0, 40 * DAY), min_size=1, max_size=7).map(sorted), min_size=1, max_size=11)


def ends(histories: list[list[int]], settings: SplitSettings) -> list[tuple[int, int]]:
    events = pl.DataFrame({"user_id": range(len(histories)), "timestamp": histories}).explode("timestamp")
    return events.group_by("user_id", maintain_order=True).agg(*split_ends(settings)).drop("user_id").rows()


@given(HISTORIES)
def test_leave_one_out_tests_the_last_event_and_validates_the_one_before(histories: list[list[int]]) -> None:
    def plain(events: int) -> tuple[int, int]:
        return {1: (1, 1), 2: (1, 1)}.get(events, (events - 2, events - 1))

    assert ends(histories, SplitSettings()) == [plain(len(history)) for history in histories]


@given(HISTORIES, st.integers(1, 41 * DAY), st.integers(0, 17))
def test_global_time_cuts_all_users_at_the_same_two_times(histories: list[list[int]], start: int, days: int) -> None:
    def plain(history: list[int]) -> tuple[int, int]:
        return sum(time < start - days * DAY for time in history), sum(time < start for time in history)

    assert ends(histories, SplitSettings("global_time", start, days)) == [plain(history) for history in histories]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"method": "global_time"}, "global_time needs test_start"),
        ({"test_start": 5}, "test_start means nothing to leave_one_out"),
        ({"validation_days": -1}, "validation_days is -1"),
        ({"method": "random"}, "found 'random'"),
    ],
)
def test_a_split_that_means_nothing_is_refused(section: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe("test", {"split": section}).read(SplitSettings)
