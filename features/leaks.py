"""The leak detector: what a data set, or a model that is judged by it, knows too early, looked for in the files themselves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar

import polars as pl
import polars.selectors as cs

from features.cells import read_time
from features.dataset import ATTRIBUTE, Dataset
from features.events import fill_times
from features.parts import add_counts, by_users, summed
from features.split import SplitSettings, in_window, is_cold, is_held_out
from recsys.batch import FIRST_ITEM
from recsys.config import Settings, nearest
from recsys.errors import DataError, LeakError
from recsys.progress import Progress

PART = pl.Enum(["train", "history", "validation", "test"])
"""Parts of a sequence; `history` is what a held-out user has before validation."""
SHOWN = 5
"""Offending rows of a kind that are told."""
KINDS = {
    "training events": "a training event is later than the split allows",
    "later events": "a validation event lies in the time of the test, or an event after its end",
    "held-out users": "an event of a held-out user is for training",
    "parts": "parts of a sequence overlap, or end outside of it",
    "shared events": "one event stands in two parts of a sequence",
    "order of events": "an event stands before an earlier one of its user, or is not what the events table has there",
    "ties": "events of one time stand in another order than in the events table",
    "release of items": "an event is earlier than its item's release",
    "counts of items": "the count or row of an item, by which negatives are drawn and lists made, is not of the training part",
    "cold items": "an item that is to be cold is among the learnt ones",
    "learnt items": "an item without a training event is among the learnt ones, of which negatives are drawn",
    "model": "a target may be among the events that the model learnt",
}
"""What is looked for, and what a found row means."""


@dataclass(frozen=True)
class LeakSettings(Settings):
    """What the leak detector is told beside the data set."""

    section: ClassVar[str] = "leaks"

    released: str = ""
    """Attribute of items (one of data.attribute_columns) that says since when an item can be known: a number of
    data.time_unit, or ISO 8601 text; empty: nothing says so."""


@dataclass
class Check:
    """What was found of one kind of leak."""

    name: str
    """One of KINDS."""
    meaning: str
    """What a found row means."""
    rows: int = 0
    """Rows that were looked at."""
    found: int = 0
    """Rows that are leaks."""
    first: pl.DataFrame = field(default_factory=pl.DataFrame)
    """The first of these, SHOWN at most."""

    def add(self, rows: int, found: pl.DataFrame) -> None:
        """Count rows that were looked at, and those of them that are leaks."""
        self.rows += rows
        self.found += len(found)
        if len(found) and len(self.first) < SHOWN:
            self.first = pl.concat([self.first, found.head(SHOWN - len(self.first))], how="diagonal_relaxed")

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**vars(self), "first": self.first.to_dicts()}


def find_leaks(
    dataset: Dataset,
    model: Mapping[str, Any] | None = None,
    settings: LeakSettings | None = None,
    split: str = "test",
    progress: Progress | None = None,
) -> list[Check]:
    """Look for every kind of leak that the data set can have; with a `model`'s manifest, also for targets of `split` that it
    may have learnt. Settings are the model's where none are given.

    Raises DataError: leaks.released names what is no attribute, or no time.
    """
    if settings is None:
        settings = LeakSettings(**(model or {}).get("recipe", {}).get(LeakSettings.section, {}))
    search = _Search(dataset, model, settings, split)
    for part in by_users(dataset.events, summed(progress, "leaks", dataset.manifest["events"])):
        search.look_at_users(part)
    search.look_at_strangers()
    search.look_at_items()
    return list(search.checks.values())


def refuse(checks: Sequence[Check], where: str) -> None:
    """Raises LeakError: something was found; a line for every kind, with its count and first rows."""
    found = [check for check in checks if check.found]
    lines = [f"{check.name}, {check.found:,} of {check.rows:,}: {check.meaning}: {_told(check.first)}" for check in found]
    if lines:
        head = f"{where}: what the split keeps for later is known too early; make anew what is named here"
        raise LeakError("\n  ".join([head, *lines]))


def _told(first: pl.DataFrame) -> str:
    rows = [", ".join(f"{name} {value}" for name, value in row.items() if value is not None) for row in first.to_dicts()]
    return " · ".join(rows)


class _Search:
    """The checks, filled with some users after others, then with the items."""

    def __init__(self, dataset: Dataset, model: Mapping[str, Any] | None, settings: LeakSettings, judged: str) -> None:
        self.dataset, self.model, self.judged = dataset, model, judged
        self.split = SplitSettings(**dataset.manifest["settings"][SplitSettings.section])
        self.sequences = pl.scan_parquet(dataset.path / "sequences.parquet")
        self.items = dataset.items.select("item_id", "row", released=_released(dataset, settings.released))
        self.users = 0
        self.counts = pl.DataFrame(schema={"row": pl.Int32, "training": pl.Int64})
        absent = {
            "training events": self.split.method == "user_holdout",
            "held-out users": self.split.method != "user_holdout",
            "release of items": not settings.released,
            "cold items": not self.split.cold_one_in,
            "model": model is None,
        }
        self.checks = {name: Check(name, text) for name, text in KINDS.items() if not absent.get(name)}
        self.learnt = pl.lit(False) if model is None else self._learnt(model)

    def look_at_users(self, part: pl.DataFrame) -> None:
        """Look at the sequences of the users whose events these are."""
        first, last = pl.lit(part["user_id"][0]), pl.lit(part["user_id"][-1])
        near = self.sequences.filter(pl.col("user_id").is_between(first, last))
        users = near.join(part.lazy().select("user_id"), on="user_id", how="semi", maintain_order="left").collect()
        self.users += len(users)
        self._look_at_parts(users)
        sequences, events = _exploded(users), self._placed(part)
        rows = _aligned(sequences, events)
        self._look_at_times(rows)
        self._look_at_order(rows)
        self._look_at_shared(sequences, events)
        if check := self.checks.get("release of items"):
            known = events.filter(pl.col("stated").is_not_null() & pl.col("released").is_not_null())
            early = known.filter(pl.col("its_time") < pl.col("released"))
            check.add(len(known), self._events(early, "its_row", "its_time", "released"))
        counts = sequences.filter(part="train").group_by("row").agg(training=pl.len().cast(pl.Int64))
        self.counts = add_counts(self.counts, counts, "row")

    def look_at_strangers(self) -> None:
        """Look for sequences of users who have no events, after all others."""
        if self.users == self.sequences.select(pl.len()).collect().item():
            return
        users = self.sequences.join(self.dataset.events, on="user_id", how="anti").collect()
        strange = _exploded(users)
        self.checks["order of events"].add(len(strange), self._events(strange))

    def look_at_items(self) -> None:
        """Look at the catalogue, after all users."""
        items = self.dataset.items.select("item_id", "row", "events").join(
            self.counts, on="row", how="left", maintain_order="left"
        )
        cold, training = is_cold(items["item_id"], self.split), pl.col("training").fill_null(0)
        items = items.with_columns(training=pl.when(cold).then(0).otherwise(training))
        ranked = items.sort("item_id").sort("events", descending=True, maintain_order=True)["row"]
        wrong = (items["events"] != items["training"]) | (items["row"] != ranked)
        self.checks["counts of items"].add(len(items), items.filter(wrong))
        told = [self.dataset.manifest["warm_items"]]
        if self.model is not None and self.model["dataset"]["hash"] == self.dataset.manifest["hash"]:
            told.append(self.model["items"])
        learnt = items["row"] < FIRST_ITEM + max(told)
        self.checks["learnt items"].add(int(learnt.sum()), items.filter(learnt & (items["training"] == 0) & ~cold))
        if check := self.checks.get("cold items"):
            check.add(int(cold.sum()), items.filter(cold & (learnt | (items["events"] > 0))))

    def _look_at_parts(self, users: pl.DataFrame) -> None:
        """That no part of a sequence ends before it begins, or behind the sequence."""
        columns = pl.lit(0), pl.col("train_end"), _validation_start(users), pl.col("validation_end"), pl.col("items").list.len()
        bounds = [column.cast(pl.Int64) for column in columns]
        wrong = users.filter(pl.any_horizontal(after < before for before, after in itertools.pairwise(bounds)))
        self.checks["parts"].add(len(users), wrong.select("user_id", cs.ends_with("_end", "_start"), events=bounds[-1]))

    def _look_at_times(self, rows: pl.DataFrame) -> None:
        """That each part holds what the split says, and no target was learnt."""
        time, place, events = pl.col("timestamp"), pl.col("place"), pl.col("events").cast(pl.Int64)
        validation, name = pl.col("part") == "validation", "training events"
        if self.split.method == "global_time":
            early, late = time >= self.split.validation_start, validation & (time >= self.split.test_start)
            if self.split.test_end is not None:
                late |= time >= self.split.test_end
        elif self.split.method == "leave_one_out":
            early, late = place >= (events - 2).clip(1), validation & (place >= (events - 1).clip(1))
        else:
            users, name = rows["user_id"].unique(), "held-out users"
            held_out = users.filter(is_held_out(users, self.split))
            early, late = pl.col("user_id").is_in(held_out.implode()), validation & (place >= events - 1)
        learnt, later = rows.filter(part="train"), rows.filter(pl.col("part") != "train")
        self.checks[name].add(len(learnt), self._events(learnt.filter(early)))
        self.checks["later events"].add(len(later), self._events(later.filter(late)))
        if check := self.checks.get("model"):
            targets = later.filter(part=self.judged)
            check.add(len(targets), self._events(targets.filter(self.learnt)))

    def _look_at_order(self, rows: pl.DataFrame) -> None:
        """That each sequence is what the events table has, in its order, which is that of time or of `order`."""
        again, other = pl.col("user_id") == pl.col("user_id").shift(), pl.col("row").ne_missing(pl.col("its_row"))
        back = again & ((pl.col("timestamp") < pl.col("timestamp").shift()) | (pl.col("key") < pl.col("key").shift()))
        tied = (again & (pl.col("key") == pl.col("key").shift())).fill_null(False)
        rows = rows.with_columns(tied=tied | tied.shift(-1, fill_value=False))
        moved = rows.filter(other & pl.col("tied"))
        theirs = rows.filter("tied").select("user_id", "key", row="its_row")
        swapped = moved.join(theirs, on=["user_id", "key", "row"], how="semi", maintain_order="left")
        wrong = rows.filter(back | other | pl.col("timestamp").ne_missing(pl.col("its_time")))
        wrong = wrong.join(swapped, on=["user_id", "place"], how="anti", maintain_order="left")
        self.checks["order of events"].add(len(rows), self._events(wrong))
        self.checks["ties"].add(int(rows["tied"].sum()), self._events(swapped))

    def _look_at_shared(self, sequences: pl.DataFrame, events: pl.DataFrame) -> None:
        """That no event stands in two parts; two events of the same user, item and time are two where the table has two."""
        each = ["user_id", "row", "timestamp"]
        later = sequences.filter(pl.col("part").is_in(["validation", "test"]))
        copies = sequences.join(later.select(each).unique(), on=each, how="semi", maintain_order="left")
        found = copies.group_by(each, maintain_order=True).agg("place", "part", copies=pl.len())
        found = found.filter(pl.col("part").list.n_unique() > 1)
        theirs = events.rename({"its_row": "row", "its_time": "timestamp"}).join(found, on=each, how="semi")
        kept = self.dataset.manifest["settings"]["data"]["repeats"] == "keep"
        counts = theirs.group_by(each).agg(stated=pl.len() if kept else pl.col("key").n_unique())
        found = found.join(counts, on=each, how="left", maintain_order="left")
        found = found.filter(pl.col("copies") > pl.col("stated").fill_null(0))
        self.checks["shared events"].add(len(later), self._events(found))

    def _placed(self, part: pl.DataFrame) -> pl.DataFrame:
        """What the events table has at each place: time as stated and as known, what it is ordered by (`key`), the count of
        the user's events."""
        known = fill_times(part.with_columns(stated="timestamp")).filter(in_window(self.split))
        return known.join(self.items, on="item_id", how="left", maintain_order="left").select(
            "user_id",
            "stated",
            "released",
            place=pl.int_range(pl.len()).over("user_id"),
            events=pl.len().over("user_id"),
            key="order" if "order" in part.columns else "timestamp",
            its_row="row",
            its_time="timestamp",
        )

    def _events(self, rows: pl.DataFrame, row: str = "row", timestamp: str = "timestamp", *more: str) -> pl.DataFrame:
        """Rows as they are told: by item id."""
        part = cs.by_name("part", require_all=False)
        named = rows.select("user_id", part, *more, place="place", row=row, timestamp=timestamp)
        named = named.join(self.items.select("row", "item_id"), on="row", how="left", maintain_order="left")
        return named.select("user_id", "item_id", "timestamp", "place", part, *more)

    def _learnt(self, model: Mapping[str, Any]) -> pl.Expr:
        """Whether the model may have learnt a target."""
        theirs, ours = model["dataset"], self.dataset.manifest
        split = SplitSettings(**model["recipe"].get(SplitSettings.section, {}))
        same_events = theirs.get("events_sha256") == ours["files"]["events.parquet"]["sha256"]
        if theirs["hash"] == ours["hash"] or (same_events and split == self.split):
            return pl.lit(False)
        until = theirs.get("learnt_until")
        told = "it does not say until when" if until is None else f"until {datetime.fromtimestamp(until, UTC):%Y-%m-%d %H:%M}"
        self.checks["model"].meaning = f"the model learnt from another data set, {told}, so that a target may be among it"
        return pl.lit(True) if until is None else pl.col("timestamp") <= until


def _validation_start(users: pl.DataFrame) -> pl.Expr:
    return pl.col("validation_start" if "validation_start" in users.columns else "train_end")


def _exploded(users: pl.DataFrame) -> pl.DataFrame:
    """Sequences event by event: user_id, row, timestamp, place, part."""
    place, part = pl.col("place"), pl.lit("test", PART)
    ends = {"train": pl.col("train_end"), "history": _validation_start(users), "validation": pl.col("validation_end")}
    for name, end in reversed(ends.items()):
        part = pl.when(place < end).then(pl.lit(name, PART)).otherwise(part)
    flat = users.with_columns(place=pl.int_ranges(pl.col("items").list.len())).explode("items", "timestamps", "place")
    return flat.select("user_id", "place", row="items", timestamp="timestamps", part=part).drop_nulls("row")


def _aligned(sequences: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Both side by side, by user and place; null where one has nothing."""
    at = ["user_id", "place"]
    if sequences.select(at).equals(events.select(at)):
        return pl.concat([sequences, events.drop(at)], how="horizontal")
    rows = sequences.join(events, on=at, how="full", coalesce=True).sort(at)
    return rows.with_columns(pl.col("events").max().over("user_id"))


def _released(dataset: Dataset, name: str) -> pl.Series:
    """Since when each item can be known, seconds since 1970, by row; null where nothing says so."""
    if not name:
        return pl.Series([None] * len(dataset.items), dtype=pl.Int64)
    known = [column.removeprefix(ATTRIBUTE) for column in dataset.items.columns if column.startswith(ATTRIBUTE)]
    if name not in known:
        raise DataError(f"leaks.released: no attribute {name!r}{nearest(name, known)}; data.attribute_columns names them")
    column, unit = dataset.items[ATTRIBUTE + name], dataset.manifest["settings"]["data"]["time_unit"]
    cell = read_time(column.name, column.dtype, unit, str(dataset.path))
    read = column.to_frame().select(value=cell.value, wrong=cell.wrong)
    if read["wrong"].any():
        raise DataError(f"leaks.released: {read['wrong'].sum()} values of {name!r} are no times; name another attribute")
    return read["value"]
