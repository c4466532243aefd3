"""Which of a user's events are for training, for validation and for the test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import polars as pl
from xxhash import xxh64_intdigest

from recsys.config import Settings

DAY = 86_400


@dataclass(frozen=True)
class SplitSettings(Settings):
    """How sequences are cut."""

    section: ClassVar[str] = "split"

    method: Literal["leave_one_out", "global_time"] = "leave_one_out"
    """`leave_one_out`: a user's last event is the test, the one before it validation. `global_time`: all events from
    `test_start` on are the test."""
    test_start: int = 0
    """Seconds since 1970 at which the test begins; for `global_time`."""
    validation_days: int = 14
    """Days before `test_start` that are validation; for `global_time`."""
    cold_one_in: int = 0
    """One item in so many, by a hash of its id, is cold: none of its events is learnt, so that a model is judged on items
    that it knows by their text alone; 0: none."""

    def __post_init__(self) -> None:
        if self.method == "global_time" and self.test_start <= 0:
            raise ValueError("global_time needs test_start, in seconds since 1970")
        if self.method == "leave_one_out" and self.test_start:
            raise ValueError("test_start means nothing to leave_one_out; set method to global_time")
        if self.validation_days < 0:
            raise ValueError(f"validation_days is {self.validation_days}: give 0 or more")
        if self.cold_one_in < 0 or self.cold_one_in == 1:
            raise ValueError(f"cold_one_in is {self.cold_one_in}: give 2 or more, or 0 for none")


def split_ends(settings: SplitSettings) -> tuple[pl.Expr, pl.Expr]:
    """(train_end, validation_end), Int32 counts from the start of one user's sorted events, for use in an aggregation.

    A single event is for training; of two the second is the test.
    """
    if settings.method == "leave_one_out":
        events = pl.len().cast(pl.Int32)
        ends = (events - 2).clip(1), (events - 1).clip(1)
    else:
        cuts = settings.test_start - settings.validation_days * DAY, settings.test_start
        ends = (pl.col("timestamp") < cuts[0]).sum().cast(pl.Int32), (pl.col("timestamp") < cuts[1]).sum().cast(pl.Int32)
    return ends[0].alias("train_end"), ends[1].alias("validation_end")


def is_cold(item_ids: pl.Series, settings: SplitSettings) -> pl.Series:
    """Whether each item is cold: xxh64 of its id as text, seed 0, is divisible by `cold_one_in`."""
    one_in = settings.cold_one_in
    cold = [one_in > 0 and xxh64_intdigest(str(item_id).encode()) % one_in == 0 for item_id in item_ids.to_list()]
    return pl.Series(cold, dtype=pl.Boolean)


def without_cold(counts: pl.DataFrame, settings: SplitSettings) -> pl.DataFrame:
    """The items' counts with no training events for the cold ones."""
    return counts.with_columns(training=pl.when(is_cold(counts["item_id"], settings)).then(0).otherwise("training"))
