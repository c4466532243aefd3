"""Splits: the vectorised expressions agree with the plain sentence, and a data set may be split anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from features.build import resplit
from features.dataset import Dataset
from features.split import DAY, SplitSettings, is_cold, is_held_out, split_ends
from recsys.batch import FIRST_ITEM
from recsys.config import Recipe
from recsys.errors import DataError, RecipeError

HISTORIES = st.lists(st.lists(st.integers(0, 40 * DAY), min_size=1, max_size=7).map(sorted), min_size=1, max_size=11)


def ends(histories: list[list[int]], settings: SplitSettings) -> list[tuple[int, ...]]:
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


@given(HISTORIES, st.integers(2, 5))
def test_of_a_held_out_user_nothing_is_learnt_and_of_the_others_all(histories: list[list[int]], one_in: int) -> None:
    def plain(user: int, events: int) -> tuple[int, int, int]:
        held_out = xxhash.xxh64(f"user {user}".encode(), seed=0).intdigest() % one_in == 0
        return (0, max(events - 1, 0), max(events - 2, 0)) if held_out else (events, events, events)

    settings = SplitSettings("user_holdout", holdout_one_in=one_in)
    assert ends(histories, settings) == [plain(user, len(history)) for user, history in enumerate(histories)]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"method": "global_time"}, "global_time needs test_start"),
        ({"test_start": 5}, "test_start means nothing to leave_one_out"),
        ({"test_days": 5}, "test_days means nothing to leave_one_out; set method to global_time, or test_days to 0"),
        ({"method": "global_time", "test_start": 5, "test_days": -2}, "test_days is -2"),
        ({"method": "user_holdout"}, "user_holdout needs holdout_one_in, 2 or more; it is 0"),
        ({"method": "global_time", "test_start": 5, "holdout_one_in": 3}, "holdout_one_in means nothing to global_time"),
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


def test_held_out_users_have_a_history_that_is_not_learnt(folder: Path, build_in: Callable[..., Dataset]) -> None:
    events = made_up(5)
    found = build_in(folder, events, split={"method": "user_holdout", "holdout_one_in": 4})
    held_out = is_held_out(found.user_ids, SplitSettings("user_holdout", holdout_one_in=4)).to_list()
    users = sum(held_out)
    assert 0 < users < 31
    others = events.filter(pl.col("user_id").is_in([user for user, held in enumerate(held_out) if not held]))
    learnt = dict(others["item_id"].value_counts().rows())
    assert dict(found.items.select("item_id", "events").rows()) == {item: learnt.get(item, 0) for item in events["item_id"]}
    assert found.manifest["counts"] == {"train": 11 * (31 - users), "validation": users, "test": users, "history": 9 * users}
    for split, (history, targets) in {"train": (0, 0), "validation": (9, 1), "test": (10, 1)}.items():
        begins, middles, ends = (part.tolist() for part in found.sequences.windows(split))
        starts = [11 * user for user in range(31)]
        assert begins == starts
        want = [(history, history + targets) if held else (11, 11) for held in held_out]
        assert [(middle - start, end - start) for start, middle, end in zip(starts, middles, ends, strict=True)] == want


def test_cold_items_and_held_out_users_are_chosen_apart() -> None:
    ids = pl.Series(range(3000))
    settings = SplitSettings("user_holdout", holdout_one_in=10, cold_one_in=10)
    both = (is_held_out(ids, settings) & is_cold(ids, settings)).sum()
    assert is_held_out(ids, settings).sum() == pytest.approx(300, abs=60)
    assert both == pytest.approx(30, abs=20)


def test_events_after_the_window_of_the_test_are_in_no_sequence_and_counted(
    folder: Path, build_in: Callable[..., Dataset]
) -> None:
    events = pl.DataFrame({"user_id": [1, 1, 1, 1, 2, 2, 3], "item_id": [3, 5, 7, 11, 3, 13, 17]}).with_columns(
        timestamp=pl.Series([1, 9, 10, 12, 11, 12, 40]) * DAY
    )
    split = {"method": "global_time", "test_start": 10 * DAY, "test_days": 2, "validation_days": 1}
    found = build_in(folder, events, split=split)
    assert found.manifest["counts"] == {"train": 1, "validation": 1, "test": 2, "after": 3}
    assert found.manifest["events"] == len(found.events.collect()) == 7
    assert found.user_ids.to_list() == [1, 2]
    assert found.sequences.times.tolist() == [DAY, 9 * DAY, 10 * DAY, 11 * DAY]
    assert found.manifest["items"] == 6
    assert dict(found.items.filter(pl.col("events") > 0).select("item_id", "events").rows()) == {3: 1}
    open_ended = build_in(folder, events, split={**split, "test_days": 0})
    assert open_ended.manifest["counts"] == {"train": 1, "validation": 1, "test": 5}


WAYS = [
    {},
    {"cold_one_in": 5},
    {"method": "global_time", "test_start": 200, "validation_days": 0},
    {"method": "global_time", "test_start": 20, "validation_days": 0, "test_days": 1},
    {"method": "user_holdout", "holdout_one_in": 3, "cold_one_in": 5},
]


@pytest.mark.parametrize("layout", [{}, {"order": "order", "attribute_columns": ["price", "none"]}], ids=["plain", "more"])
@pytest.mark.parametrize("before", WAYS[:3], ids=str)
def test_a_data_set_split_anew_is_the_one_built_with_that_split(
    before: dict[str, Any], layout: dict[str, Any], folder: Path, build_in: Callable[..., Dataset]
) -> None:
    events = pl.concat([made_up(5), made_up(5)[7:11]]).with_columns(order=pl.int_range(pl.len()) // 3)
    if layout:
        events = events.with_columns(timestamp=pl.when(pl.col("timestamp") % 7 > 0).then("timestamp"))
    items = pl.DataFrame({"item_id": [53, 1, 2, 8], "title": ["x", None, "y", "z"], "price": ["1", "", "2", "7"]})
    items = items.with_columns(none=pl.lit(""))
    tables = {"items": items, "users": pl.DataFrame({"user_id": [5, 5], "age": [1, 2]})}
    one = build_in(folder, events, split=before, **tables, **layout)
    one.path.rename(folder / "one")
    one = Dataset.open(folder / "one")
    for way in WAYS:
        want = build_in(folder, events, split=way, **tables, **layout)
        found = resplit(one, Recipe("test", {"split": way}).read(SplitSettings), folder / "anew")
        assert found.manifest == want.manifest
        assert (folder / "anew" / "dataset.json").read_bytes() == (want.path / "dataset.json").read_bytes()
        assert Dataset.open(folder / "anew").manifest == want.manifest


def test_a_split_without_training_events_leaves_nothing_behind(folder: Path, build_in: Callable[..., Dataset]) -> None:
    found = build_in(folder, made_up(5))
    with pytest.raises(DataError, match="no event is for training"):
        resplit(found, SplitSettings("global_time", 1), folder / "anew")
    assert [path.name for path in folder.iterdir() if "anew" in path.name] == []
    (folder / "notes").write_text("mine")
    with pytest.raises(DataError, match="exists and is no data set"):
        resplit(found, SplitSettings(), folder / "notes")
