"""Splits: the vectorised expressions agree with the plain sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from features.dataset import Dataset
from features.split import DAY, SplitSettings, is_cold, split_ends
from recsys.batch import FIRST_ITEM
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
        ({"cold_one_in": 1}, "cold_one_in is 1: give 2 or more, or 0"),
        ({"cold_one_in": -3}, "cold_one_in is -3"),
    ],
)
def test_a_split_that_means_nothing_is_refused(section: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe("test", {"split": section}).read(SplitSettings)


def divisible(item_id: int | str, one_in: int) -> bool:
    return int(xxhash.xxh64(str(item_id).encode(), seed=0).hexdigest(), 16) % one_in == 0


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=31) | st.lists(st.text(max_size=7), max_size=31), st.integers(2, 7))
def test_an_item_is_cold_where_the_hash_of_its_id_is_divisible(item_ids: list[int | str], one_in: int) -> None:
    series = pl.Series(item_ids, dtype=pl.String if any(isinstance(item_id, str) for item_id in item_ids) else pl.Int64)
    assert is_cold(series, SplitSettings(cold_one_in=one_in)).to_list() == [divisible(item_id, one_in) for item_id in item_ids]
    assert not is_cold(series, SplitSettings()).any()


def made_up(one_in: int) -> pl.DataFrame:
    """Events of 31 users among 53 items, the cold ones the most popular."""
    cold = [item for item in range(53) if divisible(item, one_in)]
    rows = [
        (user, cold[place % len(cold)] if place % 2 else (7 * user + place) % 53) for user in range(31) for place in range(11)
    ]
    return pl.DataFrame(rows, ["user_id", "item_id"], orient="row").with_columns(timestamp=pl.int_range(pl.len()))


@pytest.mark.parametrize("ids", ["numbers", "texts"])
def test_cold_items_have_no_training_events_stand_behind_and_keep_their_events_in_the_sequences(
    ids: str, folder: Path, build_in: Callable[..., Dataset]
) -> None:
    events = made_up(5)
    events = events if ids == "numbers" else events.with_columns(pl.col("item_id").cast(pl.String))
    plain, split = build_in(folder, events), {"cold_one_in": 5}
    counts = dict(plain.items.select("item_id", "events").iter_rows())
    histories = [plain.items["item_id"][row - FIRST_ITEM] for row in plain.sequences.items.tolist()]
    found = build_in(folder, events, split=split)
    cold = {item_id for item_id in counts if divisible(item_id, 5)}
    assert max(counts, key=lambda item_id: counts[item_id]) in cold
    for item_id, training in found.items.select("item_id", "events").iter_rows():
        assert training == (0 if item_id in cold else counts[item_id])
    warm = found.manifest["warm_items"]
    assert not set(found.items["item_id"][:warm]) & cold
    assert cold <= set(found.items["item_id"][warm:])
    assert [found.items["item_id"][row - FIRST_ITEM] for row in found.sequences.items.tolist()] == histories
    assert found.manifest["counts"] == plain.manifest["counts"]
    assert found.sequences.train_end.tolist() == plain.sequences.train_end.tolist()


def test_no_cold_items_is_the_data_set_without_the_setting(folder: Path, build_in: Callable[..., Dataset]) -> None:
    hashes = [
        build_in(folder, made_up(5), split=split).manifest["hash"] for split in ({}, {"cold_one_in": 0}, {"cold_one_in": 5})
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_cold_items_are_the_same_ones_in_a_data_set_that_grows(folder: Path, build_in: Callable[..., Dataset]) -> None:
    events, split = made_up(5), {"cold_one_in": 5}
    tables: list[dict[Any, int]] = []
    for part in (events[:97], events):
        found = build_in(folder, part, split=split)
        tables.append(dict(found.items.select("item_id", "events").iter_rows()))
    grown = [item_id for item_id, training in tables[1].items() if item_id in tables[0] and not training]
    assert grown == [item_id for item_id in grown if not tables[0][item_id]] != []
