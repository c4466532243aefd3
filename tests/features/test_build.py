"""Building: the laws that hold for any events, and a small data set whose files are known."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import features.events
import features.parts
from features.build import build
from features.dataset import Dataset
from features.schema import POLICIES
from recsys.batch import FIRST_ITEM
from recsys.config import Recipe
from recsys.errors import DataError, RecsysError

Build = Callable[..., Dataset]
NOW = 2_000_000_000

Row = tuple[str | None, ...]
USERS = st.sampled_from(["1", "2", "3", "5", "", None, "-7", "9223372036854775807"])
ITEMS = st.sampled_from(["2", "3", "5", "7", "11", "13", "", None])
TIMES = st.sampled_from(["17", "19", "23", "23", "29", "", "-1", "tomorrow", "1970-01-01T00:00:31Z", str(NOW + 1), None])
ORDERS = st.sampled_from(["1", "2", "3", "4", "5", "", "first"])
ROWS = st.lists(st.tuples(USERS, ITEMS, TIMES, ORDERS), max_size=23)
GOOD: list[Row] = [("1", "2", "17", "1"), ("1", "3", "19", "2"), ("8", "2", "17", "1")]
ITEM_ROWS = st.lists(st.tuples(st.sampled_from(["2", "3", "5", "17", "", "x"]), st.sampled_from(["a", "b", None])), max_size=7)
LAYOUTS = st.sampled_from([{}, {"order": "order"}, {"repeats": "keep"}, {"timestamp": "", "order": "order"}])
BY_TIME = {"method": "global_time", "test_start": 23, "validation_days": 0}
BY_USERS = {"method": "user_holdout", "holdout_one_in": 3}
SPLITS = st.sampled_from([{}, BY_TIME, {**BY_TIME, "test_days": 1}, BY_USERS, {"cold_one_in": 5}])


def events_of(rows: Sequence[Row]) -> pl.DataFrame:
    return pl.DataFrame(rows, {name: pl.String for name in ("user_id", "item_id", "timestamp", "order")}, orient="row")


def items_of(rows: Sequence[Row]) -> pl.DataFrame | None:
    return pl.DataFrame(rows, {"item_id": pl.String, "title": pl.String}, orient="row") if rows else None


def account(found: Dataset) -> dict[str, Any]:
    return {key: value for key, value in found.manifest.items() if key != "recipe"}


@given(ROWS, LAYOUTS)
@settings(max_examples=20, deadline=None)
def test_every_row_read_is_kept_or_quarantined(build_in: Build, rows: list[Row], data: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = build_in(Path(folder), events_of(GOOD + rows), **data)
        counts = found.manifest["rows"]
        kept = found.events.collect()
        aside = 0 if found.quarantine is None else len(found.quarantine)
    assert counts["read"] == len(GOOD) + len(rows) == len(kept) + aside
    assert sum(counts["quarantined"].values()) == aside
    assert len(kept) == found.manifest["events"] == sum(found.manifest["counts"].values())


@given(ROWS, ROWS, ITEM_ROWS, ITEM_ROWS, LAYOUTS, SPLITS, st.sampled_from([".csv", ".parquet"]))
@settings(max_examples=25, deadline=None)
def test_appending_gives_the_files_of_building_at_once(
    build_in: Build,
    first: list[Row],
    second: list[Row],
    listed: list[Row],
    listed_later: list[Row],
    data: dict[str, Any],
    split: dict[str, Any],
    suffix: str,
) -> None:
    parts = events_of(GOOD + first), events_of(second + GOOD[:1])
    items = items_of([("2", "c"), *listed]) if listed else None
    later = items_of(listed_later)
    every = pl.concat([table for table in (items, later) if table is not None]) if listed or listed_later else None
    users = pl.DataFrame({"user_id": ["1", "1"], "age": ["3", "5"]})
    with tempfile.TemporaryDirectory() as folder:
        once = build_in(Path(folder), *parts, items=every, users=users, suffix=suffix, split=split, **data)
        once_counts = account(once)
        build_in(Path(folder), parts[0], items=items, users=users[:1], suffix=suffix, split=split, **data)
        appended = build_in(
            Path(folder), parts[1], items=later, users=users[1:], append=True, suffix=suffix, split=split, **data
        )
    assert account(appended) == once_counts


@given(ROWS, st.randoms(use_true_random=False))
@settings(max_examples=10, deadline=None)
def test_the_order_of_rows_matters_for_ties_alone(build_in: Build, rows: list[Row], random: Any) -> None:
    rows = [*GOOD, *(row for place, row in enumerate(rows) if row[:3] not in [other[:3] for other in rows[:place]])]
    untied = [(user, item, str(place), order) for place, (user, item, _, order) in enumerate(rows)]
    shuffled = random.sample(untied, len(untied))
    with tempfile.TemporaryDirectory() as folder:
        want = build_in(Path(folder), events_of(untied)).manifest["hash"]
        assert build_in(Path(folder), events_of(shuffled[:2]), events_of(shuffled[2:])).manifest["hash"] == want


@pytest.mark.parametrize(
    ("at_once", "sampled", "stretch", "stretch_rows"),
    [(1, 10**6, 10**6, 10**6), (7, 61, 1009, 11), (1009, 211, 97, 13), (10**6, 1, 5, 2)],
)
def test_how_many_events_are_in_memory_at_once_changes_nothing(
    at_once: int, sampled: int, stretch: int, stretch_rows: int, folder: Path, build_in: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pl.select(row=pl.int_range(4099)).select(
        user_id=pl.col("row") * 37 % 211, item_id=pl.col("row") ** 2 % 101, timestamp=pl.col("row") * 7919 % 1013
    )
    want = account(build_in(folder, events))
    monkeypatch.setattr(features.parts, "AT_ONCE", at_once)
    monkeypatch.setattr(features.parts, "SAMPLED", sampled)
    monkeypatch.setattr(features.events, "STRETCH", stretch)
    monkeypatch.setattr(features.events, "STRETCH_ROWS", stretch_rows)
    assert account(build_in(folder, events)) == want


@pytest.mark.parametrize("sampled", [10**6, 173])
def test_a_part_has_about_as_many_events_as_are_at_once_in_memory(sampled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features.parts, "AT_ONCE", 307)
    monkeypatch.setattr(features.parts, "SAMPLED", sampled)
    events = pl.select(row=pl.int_range(4099)).select(user_id=(pl.col("row") * 37 % 211).cast(pl.String)).lazy()
    parts = [part.of(events).collect()["user_id"].to_list() for part in features.parts.divide(events)]
    assert sorted(user for part in parts for user in part) == sorted(events.collect()["user_id"].to_list())
    assert all(max(part) < min(later) for part, later in itertools.pairwise(parts))
    assert max(map(len, parts)) < 2 * 307
    assert len(parts) < 2 * 4099 / 307


def test_a_small_data_set_is_as_known(folder: Path, build_in: Build) -> None:
    events = pl.DataFrame(
        {"user_id": [5, 3, 5, 3, 5, 2, 3, 7, 7], "item_id": [20, 10, 10, 20, 30, 30, 10, 10, 40],
         "timestamp": [4, 9, 5, 1, 6, 8, 9, 2, 3]}
    )  # fmt: skip
    items = pl.DataFrame({"item_id": [10, 20, 50], "title": ["Ten", None, "Fifty"], "kinds": ["a| b|a", None, ""]})
    found = build_in(folder, events, items=items, text_columns=["title", "kinds"], category_columns=["kinds"])
    assert found.items.rows() == [
        (FIRST_ITEM, 20, "", "", [], [], 2),
        (FIRST_ITEM + 1, 10, "Ten", "title: Ten; kinds: a| b|a", ["a", "b"], [], 1),
        (FIRST_ITEM + 2, 30, None, "", [], [], 1),
        (FIRST_ITEM + 3, 40, None, "", [], [], 0),
        (FIRST_ITEM + 4, 50, "Fifty", "title: Fifty", [], [], 0),
    ]
    assert found.titles == ["20", "Ten", "30", "40", "Fifty"]
    assert pl.read_parquet(found.path / "sequences.parquet").rows() == [
        (2, [4], [8], 1, 1),
        (3, [2, 3], [1, 9], 1, 1),
        (5, [2, 3, 4], [4, 5, 6], 1, 2),
        (7, [3, 5], [2, 3], 1, 1),
    ]
    assert found.manifest["counts"] == {"train": 4, "validation": 1, "test": 3}
    assert found.manifest["warm_items"] == 3
    assert found.manifest["rows"] == {
        "read": 9,
        "repaired": {"unsorted": 1, "unknown_item": 3},
        "quarantined": {"duplicate": 1},
    }
    assert found.quarantine is not None
    assert found.quarantine.rows() == [("events", "duplicate", "10", "9", "3")]


def test_a_user_without_a_training_event_keeps_a_sequence(folder: Path, build_in: Build) -> None:
    events = pl.DataFrame({"user_id": [1, 2], "item_id": [3, 5], "timestamp": [7, 1_000_000_000]})
    found = build_in(folder, events, split={"method": "global_time", "test_start": 500_000_000})
    assert found.user_ids.to_list() == [1, 2]
    assert found.sequences.train_end.tolist() == [1, 0]
    assert found.items["events"].to_list() == [1, 0]


def test_order_decides_and_fills_what_the_time_leaves_open(folder: Path, build_in: Build) -> None:
    events = pl.DataFrame(
        {"user_id": [1] * 5 + [2], "item_id": [2, 3, 5, 7, 11, 2], "timestamp": [None, 50, 40, None, 60, None],
         "order": [1, 2, 3, 4, 5, 1]}
    )  # fmt: skip
    found = build_in(folder, events, order="order")
    assert pl.read_parquet(found.path / "sequences.parquet")["timestamps"].to_list() == [[50, 50, 50, 50, 60], [0]]
    assert found.manifest["rows"]["repaired"] == {"filled_time": 3, "raised_time": 1}


ONE = {"user_id": ["1", "2"], "item_id": ["3", "5"], "timestamp": ["7", "11"]}
BAD: dict[str, tuple[dict[str, list[str | None]], dict[str, Any]]] = {
    "null_id": ({"user_id": ["1"], "item_id": [None], "timestamp": ["13"]}, {}),
    "wrong_type": ({"user_id": ["1"], "item_id": ["3"], "timestamp": ["soon"]}, {}),
    "missing_time": ({"user_id": ["1"], "item_id": ["3"], "timestamp": [None]}, {}),
    "missing_order": ({"user_id": ["1"], "item_id": ["3"], "timestamp": [None], "seq": [None]}, {"order": "seq"}),
    "negative_time": ({"user_id": ["1"], "item_id": ["3"], "timestamp": ["-5"]}, {}),
    "future_time": ({"user_id": ["1"], "item_id": ["3"], "timestamp": [str(NOW + 1)]}, {}),
    "duplicate": ({"user_id": ["1"], "item_id": ["3"], "timestamp": ["7"]}, {}),
    "unsorted": ({"user_id": ["1"], "item_id": ["3"], "timestamp": ["5"]}, {}),
    "filled_time": ({"user_id": ["1"], "item_id": ["3"], "timestamp": [None], "seq": ["3"]}, {"order": "seq"}),
    "raised_time": ({"user_id": ["1"], "item_id": ["3"], "timestamp": ["5"], "seq": ["3"]}, {"order": "seq"}),
    "unknown_item": ({"user_id": ["1"], "item_id": ["13"], "timestamp": ["13"]}, {}),
    "repeated_row": ({"user_id": ["1"], "item_id": ["3"], "timestamp": ["13"]}, {}),
}


@pytest.mark.parametrize("reason", POLICIES)
def test_every_reason_is_counted_once_and_strict_refuses_it(reason: str, folder: Path, build_in: Build) -> None:
    row, data = BAD[reason]
    good = ONE | ({"seq": ["1", "2"]} if "seq" in row else {})
    events = pl.concat([pl.DataFrame(good), pl.DataFrame(row, dict.fromkeys(row, pl.String))])
    items = pl.DataFrame({"item_id": ["3", "5", "5" if reason == "repeated_row" else "7"], "title": ["c", "e", "g"]})
    found = build_in(folder, events, items=items, **data)
    table = "item_rows" if reason == "repeated_row" else "rows"
    assert found.manifest[table][POLICIES[reason].action] == {reason: 1}
    assert (found.quarantine is not None) == (POLICIES[reason].action == "quarantined")
    with pytest.raises(DataError) as error:
        build_in(folder, events, items=items, strict=True, **data)
    assert f"1 rows are bad, {reason}: {POLICIES[reason].meaning}; the first is " in str(error.value)
    assert Dataset.open(found.path).manifest == found.manifest
    build_in(folder, events[:2], items=items[:2], strict=True, **data)


def test_strict_judges_an_append_by_its_own_rows(folder: Path, build_in: Build) -> None:
    events = pl.DataFrame({"user_id": [1, 1, 2], "item_id": [3, 5, 3], "timestamp": [9, 7, None]})
    items = pl.DataFrame({"item_id": [3], "title": ["c"]})
    build_in(folder, events, items=items)
    later = build_in(folder, events[:1].with_columns(timestamp=11), items=items, append=True, strict=True)
    assert later.manifest["rows"]["read"] == 4
    assert later.manifest["rows"]["repaired"] == {"unsorted": 1, "unknown_item": 1}
    with pytest.raises(DataError, match="1 rows are bad, unsorted"):
        build_in(folder, events[:1].with_columns(timestamp=10), append=True, strict=True)


def test_an_appended_item_renews_its_title(folder: Path, build_in: Build) -> None:
    events = pl.DataFrame(ONE)
    build_in(folder, events, items=pl.DataFrame({"item_id": ["3", "5"], "title": ["old", "e"]}))
    items = pl.DataFrame({"item_id": ["3", "7"], "title": ["new", "g"]})
    found = build_in(folder, events.with_columns(timestamp=pl.lit("13")), items=items, append=True)
    assert found.titles == ["new", "e", "g"]


@pytest.mark.parametrize(
    ("data", "says"),
    [({"repeats": "keep"}, "data.repeats = 'drop', not 'keep'"), ({"order": "item_id"}, "was built without an order")],
)
def test_an_append_that_does_not_fit_is_refused(data: dict[str, Any], says: str, folder: Path, build_in: Build) -> None:
    events = pl.DataFrame(ONE)
    build_in(folder, events)
    with pytest.raises(DataError, match=says):
        build_in(folder, events, append=True, **data)
    with pytest.raises(DataError, match=r"no dataset\.json there"):
        build(folder, Recipe("test", {}), folder / "nowhere", append=True)


@pytest.mark.parametrize(
    "change",
    [
        {"repeats": "keep"},
        {"time_unit": "ms"},
        {"order": "place"},
        {"user_id": "place"},
        {"item_id": "place"},
        {"timestamp": "place"},
        {"timestamp": "", "order": "place"},
        {"title": "kind"},
        {"title": ""},
        {"text_columns": ["kind"]},
        {"category_columns": ["kind"]},
        {"category_columns": ["kind"], "category_separator": ""},
        {"number_columns": ["place"]},
        {"events": "events-0*"},
        {"items": "more*"},
        {"users": "items*"},
        {"now": 20},
    ],
)
def test_every_setting_changes_the_data_set(change: dict[str, Any], folder: Path) -> None:
    events = pl.DataFrame(
        {"user_id": [1, 1, 1, 2], "item_id": [3, 3, 5, 5], "timestamp": [7, 7, 23, 13], "place": [3, 3, 1, 2]}
    )
    items = pl.DataFrame({"item_id": [3, 5, 2], "place": [3, 3, 3], "title": ["c", "e", "g"], "kind": ["x|y", None, "y"]})
    items = items.with_columns(user_id=pl.col("item_id"))
    users = pl.DataFrame({"user_id": [1, 2], "item_id": [3, 7], "place": [1, 1], "title": ["one", "two"]})
    tables = {"events-0": events[:2], "events-1": events[2:], "items": items, "users": users, "more": users}
    for name, table in tables.items():
        table.write_parquet(folder / f"{name}.parquet")
    plain = {"category_columns": ["kind"]} if "category_separator" in change else {}
    hashes = [build(folder, Recipe("test", {"data": data}), folder / "out")["hash"] for data in (plain, plain | change)]
    assert hashes[0] != hashes[1]


def test_only_a_data_set_or_nothing_is_overwritten(folder: Path, build_in: Build) -> None:
    (folder / "out").mkdir()
    build_in(folder, pl.DataFrame(ONE))
    build_in(folder, pl.DataFrame(ONE))
    (folder / "out" / "dataset.json").unlink()
    with pytest.raises(RecsysError, match="exists and is no data set"):
        build_in(folder, pl.DataFrame(ONE))
    assert (folder / "out" / "events.parquet").is_file()
    assert not list(folder.glob(".*"))


def test_no_training_event_at_all_is_refused(folder: Path, build_in: Build) -> None:
    with pytest.raises(DataError, match=r"no event is for training; set split\.test_start"):
        build_in(folder, pl.DataFrame(ONE), split={"method": "global_time", "test_start": 3})


def test_progress_ends_at_the_number_of_events(folder: Path) -> None:
    pl.DataFrame(ONE).write_csv(folder / "events.csv")
    calls: list[tuple[str, int, int]] = []
    build(folder, Recipe("test", {}), folder / "out", progress=lambda *call: calls.append(call))
    assert calls == [("events", 2, 2), ("sequences", 2, 2)]


def test_the_manifest_is_what_was_returned(folder: Path) -> None:
    pl.DataFrame(ONE).write_csv(folder / "events.csv")
    manifest = build(folder, Recipe("test", {}), folder / "out")
    assert json.loads((folder / "out" / "dataset.json").read_text()) == json.loads(json.dumps(manifest))
    assert set(manifest["files"]) == {"events.parquet", "items.parquet", "sequences.parquet"}
