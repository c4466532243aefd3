"""Which of a user's events are for training, for validation and for the test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import polars as pl

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

    def __post_init__(self) -> None:
        if self.method == "global_time" and self.test_start <= 0:
            raise ValueError("global_time needs test_start, in seconds since 1970")
        if self.method == "leave_one_out" and self.test_start:
            raise ValueError("test_start means nothing to leave_one_out; set method to global_time")
        if self.validation_days < 0:
            raise ValueError(f"validation_days is {self.validation_days}: give 0 or more")


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
