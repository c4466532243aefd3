"""The leak detector: each kind is planted in a data set's files and found with its rows; what `features` makes has none."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import features.parts
from features.build import build, resplit
from features.dataset import MANIFEST, Dataset
from features.leaks import KINDS, SHOWN, Check, LeakSettings, find_leaks, refuse
from features.split import SplitSettings
from recsys.batch import FIRST_ITEM
from recsys.bundle import publish
from recsys.config import Recipe
from recsys.errors import DataError, LeakError
from tests.features.test_build import GOOD, LAYOUTS, ROWS, Row, events_of

Build = Callable[..., Dataset]
Change = Callable[[pl.DataFrame], pl.DataFrame]
HOUR, USERS, EVENTS = 3600, 13, 11
START = 1_000_000_000
GLOBAL = {"method": "global_time", "test_start": START + 8 * HOUR, "validation_days": 0}
HOLDOUT = {"method": "user_holdout", "holdout_one_in": 3}
SPLITS = [{}, {"cold_one_in": 3}, GLOBAL, {**GLOBAL, "test_days": 1}, HOLDOUT]


def made_up() -> pl.DataFrame:
    """Event p of user u is of item (5u + p) % 23, at hour p; 4 and 5 at the same time."""
    rows = [
        (user, (5 * user + place) % 23, START + HOUR * (4 if place == 5 else place))
        for user in range(USERS)
        for place in range(EVENTS)
    ]
    return pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")


def items_made_up() -> pl.DataFrame:
    """Item 7 is released at hour 2, all others before everything."""
    return pl.DataFrame({"item_id": range(23), "title": "one"}).with_columns(
        launched=pl.when(item_id=7).then(START + 2 * HOUR).otherwise(START)
    )


def planted(dataset: Dataset, manifest: dict[str, Any] | None = None, **tables: Change) -> Dataset:
    """The data set with tables changed, and what its manifest says."""
    place = dataset.path.with_name("planted")
    said = {key: value for key, value in dataset.manifest.items() if key not in ("format", "files", "hash", "id")}

    def write(name: str, path: Path) -> None:
        change = tables.get(name.removesuffix(".parquet"), lambda table: table)
        change(pl.read_parquet(dataset.path / name)).write_parquet(path)

    writers = {name: partial(write, name) for name in dataset.manifest["files"]}
    publish(place, writers, said | (manifest or {}), MANIFEST)
    return Dataset.open(place)


def found_in(dataset: Dataset, **more: Any) -> dict[str, Check]:
    """What was found, by kind."""
    return {check.name: check for check in find_leaks(dataset, **more) if check.found}


def of_user(user: int, **columns: pl.Expr) -> Change:
    """Other values in the sequence of a user."""
    at = pl.col("user_id") == user
    return lambda table: table.with_columns(
        pl.when(at).then(value).otherwise(name).alias(name) for name, value in columns.items()
    )


def swap(user: int, place: int, *names: str) -> Change:
    """An event of a user's sequence and the one behind it, in each other's place."""
    order = [*range(place), place + 1, place, *range(place + 2, EVENTS)]
    return of_user(user, **{name: pl.col(name).list.gather(order) for name in names})


def places(check: Check) -> list[tuple[int, int]]:
    return check.first.select("user_id", "place").rows()


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("ordered", [False, True], ids=["by time", "by order"])
def test_what_features_makes_has_no_leaks_of_any_kind(
    split: dict[str, Any], ordered: bool, folder: Path, build_in: Build
) -> None:
    events = made_up().with_columns(order=pl.int_range(pl.len()) // 2) if ordered else made_up()
    found = build_in(folder, events, split=split, **({"order": "order"} if ordered else {}))
    checks = find_leaks(found, {"dataset": found.manifest, "items": found.manifest["warm_items"], "recipe": {"split": split}})
    assert {check.name: check.found for check in checks} == dict.fromkeys([check.name for check in checks], 0)
    looked = {check.name for check in checks}
    assert looked == set(KINDS) - {"release of items"} - ({"training events"} if split == HOLDOUT else {"held-out users"}) - (
        set() if "cold_one_in" in split else {"cold items"}
    )
    refuse(checks, "here")


@given(ROWS, LAYOUTS, st.sampled_from([{}, {"method": "global_time", "test_start": 23, "validation_days": 0}, HOLDOUT]))
@settings(max_examples=15, deadline=None)
def test_no_events_make_a_false_alarm(build_in: Build, rows: list[Row], data: dict[str, Any], split: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as path:
        assert not found_in(build_in(Path(path), events_of(GOOD + rows), split=split, **data))


@pytest.mark.parametrize("name", ["ml-100k", "online-retail", "amazon-beauty", "ml-1m"])
def test_public_sets_have_no_leaks(name: str, tmp_path: Path) -> None:
    place = Path(os.environ.get("RECSYS_DATA", ""), name)
    if not place.is_dir():
        pytest.skip(f"{name}: set RECSYS_DATA to a folder that holds {name}")
    split = {"method": "global_time", "test_start": 1320796800} if name == "online-retail" else {}
    build(place, Recipe("test", {"data": {"source": name}, "split": split}), tmp_path / "out")
    assert not found_in(Dataset.open(tmp_path / "out"))


def test_a_world_has_no_leaks(world: Path) -> None:
    manifest = json.loads((world / "run" / "model" / "manifest.json").read_text())
    checks = find_leaks(Dataset.open(world / "dataset"), manifest)
    assert sum(check.found for check in checks) == 0
    assert {check.name: check.rows for check in checks}["model"] == 211


def test_a_training_event_among_a_users_last_two_is_found(folder: Path, build_in: Build) -> None:
    late = planted(build_in(folder, made_up()), sequences=of_user(3, train_end=pl.col("train_end") + 1))
    found = found_in(late)
    assert set(found) == {"training events", "counts of items"}
    assert places(found["training events"]) == [(3, EVENTS - 2)]
    assert found["training events"].first["item_id"].to_list() == [(15 + EVENTS - 2) % 23]


def test_a_training_event_after_the_cut_is_found(folder: Path, build_in: Build) -> None:
    clean = build_in(folder, made_up(), split={**GLOBAL, "test_start": START + 86_400 + 8 * HOUR, "validation_days": 1})
    assert clean.manifest["counts"] == {"train": 8 * USERS, "validation": 3 * USERS, "test": 0}
    found = found_in(planted(clean, sequences=of_user(5, train_end=pl.lit(10, pl.Int32))))
    assert set(found) == {"training events", "counts of items"}
    assert found["training events"].first["timestamp"].to_list() == [START + 8 * HOUR, START + 9 * HOUR]


@pytest.mark.parametrize("split", [{}, GLOBAL], ids=["last", "time"])
def test_a_validation_event_in_the_time_of_the_test_is_found(split: dict[str, Any], folder: Path, build_in: Build) -> None:
    found = found_in(
        planted(build_in(folder, made_up(), split=split), sequences=of_user(2, validation_end=pl.col("validation_end") + 1))
    )
    assert set(found) == {"later events"}
    assert places(found["later events"]) == [(2, 8 if split else EVENTS - 1)]


def test_an_event_after_the_window_of_the_test_is_found(folder: Path, build_in: Build) -> None:
    later = pl.DataFrame({"user_id": [3], "item_id": [1], "timestamp": [START + 40 * HOUR]})
    clean = build_in(folder, pl.concat([made_up(), later]), split=GLOBAL)
    cut = {**clean.manifest["settings"], "split": {**clean.manifest["settings"]["split"], "test_days": 1}}
    found = found_in(planted(clean, {"settings": cut}))
    assert places(found["later events"]) == [(3, EVENTS)]
    assert set(found) == {"later events", "order of events"}


def test_a_training_event_of_a_held_out_user_is_found(folder: Path, build_in: Build) -> None:
    clean = build_in(folder, made_up(), split=HOLDOUT)
    held_out = clean.user_ids.filter(pl.Series(clean.sequences.train_end.numpy()) == 0)
    found = found_in(planted(clean, sequences=of_user(held_out[0], train_end=pl.lit(2, pl.Int32))))
    assert set(found) == {"held-out users", "counts of items"}
    assert places(found["held-out users"]) == [(held_out[0], 0), (held_out[0], 1)]


def test_parts_that_overlap_are_found(folder: Path, build_in: Build) -> None:
    ends = of_user(7, train_end=pl.col("validation_end"), validation_end=pl.col("train_end"))
    found = found_in(planted(build_in(folder, made_up()), sequences=ends))
    assert found["parts"].first.row(0, named=True) == {"user_id": 7, "train_end": 10, "validation_end": 9, "events": EVENTS}
    found = found_in(planted(build_in(folder, made_up()), sequences=of_user(7, validation_end=pl.lit(99, pl.Int32))))
    assert found["parts"].found == 1


def test_an_event_in_two_parts_is_found(folder: Path, build_in: Build) -> None:
    copied = {name: pl.concat_list(pl.col(name).list.last(), name) for name in ("items", "timestamps")}
    moved = {name: pl.col(name) + 1 for name in ("train_end", "validation_end")}
    found = found_in(planted(build_in(folder, made_up()), sequences=of_user(11, **copied, **moved)))
    row = found["shared events"].first.row(0, named=True)
    assert (row["user_id"], row["item_id"], row["place"], row["part"]) == (11, (55 + 10) % 23, [0, 11], ["train", "test"])
    assert found["shared events"].found == 1
    assert "order of events" in found


def test_an_event_that_the_table_has_twice_is_one_where_repeats_were_dropped(folder: Path, build_in: Build) -> None:
    last = made_up().group_by("user_id", maintain_order=True).last()
    twice = pl.concat([made_up(), last.select("user_id", "item_id", "timestamp")])
    kept = build_in(folder, twice, repeats="keep")
    assert not found_in(kept)
    dropped = {**kept.manifest["settings"], "data": {**kept.manifest["settings"]["data"], "repeats": "drop"}}
    assert found_in(planted(kept, {"settings": dropped}))["shared events"].found == USERS


def test_an_item_again_at_another_time_or_place_is_no_shared_event(folder: Path, build_in: Build) -> None:
    item_ids = [1, 1, 2, 2, 2]
    events = pl.DataFrame({"user_id": [1] * 5, "item_id": item_ids, "timestamp": [1, 2, 3, 4, 5]})
    assert not found_in(build_in(folder, events))
    tied = events.with_columns(timestamp=pl.lit(5), order=pl.int_range(5))
    assert not found_in(build_in(folder, tied, order="order"))


@pytest.mark.parametrize("names", [("items", "timestamps"), ("items",), ("timestamps",)], ids="-".join)
def test_events_out_of_their_order_are_found(names: tuple[str, ...], folder: Path, build_in: Build) -> None:
    found = found_in(planted(build_in(folder, made_up()), sequences=swap(2, 1, *names)))
    assert set(found) == {"order of events"}
    assert places(found["order of events"]) == [(2, 1), (2, 2)]


def test_an_order_that_is_not_that_of_the_order_column_is_found(folder: Path, build_in: Build) -> None:
    events = made_up().with_columns(order=pl.int_range(pl.len()), timestamp=pl.lit(START))
    clean = build_in(folder, events, order="order")
    found = found_in(planted(clean, sequences=swap(2, 1, "items")))
    assert {name: check.found for name, check in found.items()} == {"order of events": 2}
    at = pl.when(user_id=2).then(-pl.col("order")).otherwise("order")
    found = found_in(planted(clean, events=lambda table: table.with_columns(order=at)))
    assert found["order of events"].found == EVENTS - 1


def test_a_sequence_of_nobody_or_one_that_lacks_an_event_is_found(folder: Path, build_in: Build) -> None:
    clean = build_in(folder, made_up())
    found = found_in(planted(clean, events=lambda table: table.filter(pl.col("user_id") != 5)))
    assert places(found["order of events"]) == [(5, place) for place in range(SHOWN)]
    assert found["order of events"].found == EVENTS
    found = found_in(planted(clean, sequences=lambda table: table.filter(pl.col("user_id") != 5)))
    assert found["order of events"].found == EVENTS


def test_an_unstable_sort_is_found(folder: Path, build_in: Build) -> None:
    found = found_in(planted(build_in(folder, made_up()), sequences=swap(12, 4, "items")))
    assert set(found) == {"ties"}
    assert found["ties"].rows == 2 * USERS
    assert places(found["ties"]) == [(12, 4), (12, 5)]
    assert found["ties"].first["item_id"].to_list() == [(60 + 5) % 23, (60 + 4) % 23]


@pytest.mark.parametrize("form", ["number", "text", "milliseconds"])
def test_an_event_before_its_items_release_is_found(form: str, folder: Path, build_in: Build) -> None:
    launched, unit, events = pl.col("launched"), "s", made_up()
    if form == "text":
        launched = pl.from_epoch("launched").dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    if form == "milliseconds":
        launched, unit, events = launched.cast(pl.Int64) * 1000, "ms", events.with_columns(pl.col("timestamp") * 1000)
    items = items_made_up().with_columns(launched=launched)
    found = build_in(folder, events, items=items, attribute_columns=["launched"], time_unit=unit)
    early = found_in(found, settings=LeakSettings(released="launched"))
    want = made_up().filter(pl.col("item_id") == 7, pl.col("timestamp") < START + 2 * HOUR)
    assert early["release of items"].first.select("user_id", "item_id", "timestamp").rows() == want.rows()
    assert set(early["release of items"].first["released"]) == {START + 2 * HOUR}
    assert early["release of items"].rows == USERS * EVENTS
    late = found_in(found, model={"recipe": {"leaks": {"released": "launched"}}, "dataset": found.manifest, "items": 23})
    assert late["release of items"].found == early["release of items"].found == len(want) > 0
    assert not found_in(found)


def test_times_that_were_not_stated_raise_no_alarm_of_release(folder: Path, build_in: Build) -> None:
    place = pl.int_range(pl.len())
    events = made_up().with_columns(order=place, timestamp=pl.when(place % EVENTS == 0).then("timestamp"))
    found = build_in(folder, events, items=items_made_up(), attribute_columns=["launched"], order="order")
    (check,) = (each for each in find_leaks(found, settings=LeakSettings("launched")) if each.name == "release of items")
    assert check.rows == USERS
    assert check.found == len(made_up().filter(pl.col("item_id") == 7, pl.col("timestamp") == START))


def test_an_attribute_that_says_no_time_is_refused(folder: Path, build_in: Build) -> None:
    items = items_made_up().with_columns(colour=pl.lit("red"))
    found = build_in(folder, made_up(), items=items, attribute_columns=["launched", "colour"])
    with pytest.raises(DataError, match="no attribute 'lanched'; did you mean launched"):
        find_leaks(found, settings=LeakSettings(released="lanched"))
    with pytest.raises(DataError, match="23 values of 'colour' are no times"):
        find_leaks(found, settings=LeakSettings(released="colour"))


def test_counts_of_items_from_the_future_are_found(folder: Path, build_in: Build) -> None:
    clean = build_in(folder, made_up())
    more = pl.col("events") + (pl.col("row") == FIRST_ITEM)  # that of its test event, say
    found = found_in(planted(clean, items=lambda table: table.with_columns(events=more)))
    assert set(found) == {"counts of items"}
    item_id, count = clean.items.select("item_id", "events").row(0)
    want = {"item_id": item_id, "row": FIRST_ITEM, "events": count + 1, "training": count}
    assert found["counts of items"].first.to_dicts() == [want]
    rows = planted(clean, items=lambda table: table.with_columns(row=pl.col("row").reverse()).reverse())
    assert "counts of items" in found_in(rows)


def test_a_cold_item_that_was_learnt_is_found(folder: Path, build_in: Build) -> None:
    clean = build_in(folder, made_up(), split={"cold_one_in": 3})
    warm = clean.manifest["warm_items"]
    cold = clean.items["item_id"][-1]
    counted = planted(clean, items=lambda table: table.with_columns(events=pl.when(item_id=cold).then(1).otherwise("events")))
    assert set(found_in(counted)) == {"cold items", "counts of items"}
    model = {"recipe": {}, "dataset": clean.manifest, "items": warm + 1}
    assert found_in(clean, model=model)["cold items"].first["item_id"].to_list() == [clean.items["item_id"][warm]]


def test_a_sampler_that_saw_items_of_the_test_is_found(folder: Path, build_in: Build) -> None:
    new = pl.DataFrame({"user_id": [1, 2], "item_id": [91, 97], "timestamp": [START + 20 * HOUR] * 2})
    clean = build_in(folder, pl.concat([made_up(), new]))
    assert clean.manifest["warm_items"] == 23
    more = planted(clean, {"warm_items": 25})
    assert {name: check.first["item_id"].to_list() for name, check in found_in(more).items()} == {"learnt items": [91, 97]}
    model = {"recipe": {}, "dataset": clean.manifest, "items": 24}
    found = found_in(clean, model=model)
    assert found["learnt items"].first.row(0, named=True)["row"] == FIRST_ITEM + 23
    assert not found_in(clean, model={**model, "items": 23})


@pytest.mark.parametrize(
    ("until", "count"), [(None, 3 * USERS), (START + 7 * HOUR, 0), (START + 8 * HOUR, USERS), (START + 10 * HOUR, 3 * USERS)]
)
def test_a_model_that_learnt_until_after_a_target_is_found(
    until: int | None, count: int, folder: Path, build_in: Build
) -> None:
    clean = build_in(folder, made_up(), split=GLOBAL)
    other = {"hash": "another", "events_sha256": "another"} | ({} if until is None else {"learnt_until": until})
    model = {"recipe": {"split": GLOBAL}, "dataset": other, "items": 99}
    found = found_in(clean, model=model)
    assert sum(check.found for check in found.values()) == count
    if count:
        with pytest.raises(LeakError, match=r"model, .* learnt from another data set, .* item_id"):
            refuse(list(found.values()), "here")


def test_the_same_events_split_alike_are_no_leak_whatever_is_said_of_items(folder: Path, build_in: Build) -> None:
    one, events = build_in(folder, made_up()), made_up()
    model = {"recipe": {"split": {}}, "items": 23, "dataset": {"hash": one.manifest["hash"], "learnt_until": 2 * START}}
    model["dataset"]["events_sha256"] = one.manifest["files"]["events.parquet"]["sha256"]
    described = build_in(folder, events, items=items_made_up())
    assert described.manifest["hash"] != model["dataset"]["hash"]
    assert not found_in(described, model=model)
    split = resplit(described, SplitSettings("user_holdout", holdout_one_in=3), folder / "other")
    assert found_in(split, model=model)["model"].rows == split.manifest["counts"]["test"]
    assert found_in(split, model=model, split="validation")["model"].rows == split.manifest["counts"]["validation"]


@pytest.mark.parametrize("at_once", [1, 29])
def test_how_many_events_are_looked_at_at_once_changes_nothing(
    at_once: int, folder: Path, build_in: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = swap(2, 1, "items", "timestamps"), swap(12, 4, "items"), of_user(3, train_end=pl.col("train_end") + 1)
    leaky = planted(build_in(folder, made_up()), sequences=lambda table: change[0](change[1](change[2](table))))
    want = [check.as_dict() for check in find_leaks(leaky)]
    monkeypatch.setattr(features.parts, "AT_ONCE", at_once)
    assert [check.as_dict() for check in find_leaks(leaky)] == want
    assert {check["name"] for check in want if check["found"]} == {
        "order of events",
        "ties",
        "training events",
        "counts of items",
    }


def test_the_command_tells_the_rows_and_leaves_with_3(
    world: Path, run: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run("leaks", world / "dataset", "--model", world / "bundle", "--json") == 0
    assert sum(check["found"] for check in json.loads(capsys.readouterr().out)["checks"]) == 0
    clean = Dataset.open(world / "dataset")
    copy = resplit(clean, SplitSettings(), folder / "copy")
    assert copy.manifest["hash"] == clean.manifest["hash"]
    leaky = planted(copy, sequences=of_user(3, train_end=pl.col("train_end") + 1))
    assert run("leaks", leaky.path, "--json") == 3
    shown = capsys.readouterr()
    assert {check["name"] for check in json.loads(shown.out)["checks"] if check["found"]} == {
        "training events",
        "counts of items",
    }
    assert "training events, 1 of " in shown.err
    assert "user_id 3, item_id " in shown.err
    assert run("train", world / "small.toml", "--dataset", leaky.path, "--out", folder / "run") == 3
    assert "training events, 1 of " in capsys.readouterr().err
    assert not (folder / "run").exists()
    assert run("leaks", copy.path, "--model", world / "run") == 0
    assert run("leaks", copy.path, "--split", "tomorrow") == 2
