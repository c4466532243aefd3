"""Which of a user's events are for training, for validation and for the test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import polars as pl
from xxhash import xxh64_intdigest

from recsys.config import Seconds, Settings

DAY = 86_400
MEANT = {"test_start": "global_time", "test_days": "global_time", "holdout_one_in": "user_holdout"}
"""Setting → the only method that it means something to."""


@dataclass(frozen=True)
class SplitSettings(Settings):
    """How sequences are cut."""

    section: ClassVar[str] = "split"

    method: Literal["leave_one_out", "global_time", "user_holdout"] = "leave_one_out"
    """`leave_one_out`: a user's last event is the test, the one before it validation. `global_time`: all events from
    `test_start` on are the test. `user_holdout`: of one user in `holdout_one_in` nothing is learnt; the last event is the test,
    the one before it validation; of the other users all is learnt."""
    test_start: Seconds = 0
    """When the test begins: a date, a time, or seconds since 1970; for `global_time`."""
    validation_days: int = 14
    """Days before `test_start` that are validation; for `global_time`."""
    test_days: int = 0
    """Days from `test_start` on that are the test; later events are in no sequence; 0: to the end; for `global_time`."""
    holdout_one_in: int = 0
    """One user in so many, by a hash of the id, is held out; for `user_holdout`."""
    cold_one_in: int = 0
    """One item in so many, by a hash of its id, is cold: none of its events is learnt, so that a model is judged on items
    that it knows by their text alone; 0: none."""

    @classmethod
    def of_method(cls, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that mean something to a method."""
        return {key: value for key, value in settings.items() if MEANT.get(key, name) == name}

    def __post_init__(self) -> None:
        if self.method == "global_time" and self.test_start <= 0:
            raise ValueError("global_time needs test_start, a date or seconds since 1970")
        if self.method == "user_holdout" and self.holdout_one_in < 2:
            raise ValueError(f"user_holdout needs holdout_one_in, 2 or more; it is {self.holdout_one_in}")
        for name, method in MEANT.items():
            if self.method != method and getattr(self, name):
                raise ValueError(f"{name} means nothing to {self.method}; set method to {method}, or {name} to 0")
        for name in ("test_days", "validation_days"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or more")
        if self.cold_one_in < 0 or self.cold_one_in == 1:
            raise ValueError(f"cold_one_in is {self.cold_one_in}: give 2 or more, or 0 for none")

    @property
    def validation_start(self) -> int:
        """Seconds since 1970 at which validation begins; for `global_time`."""
        return self.test_start - self.validation_days * DAY

    @property
    def test_end(self) -> int | None:
        """Seconds since 1970 from which on events are in no sequence; None: all events are in one."""
        return self.test_start + self.test_days * DAY if self.test_days else None


def split_ends(settings: SplitSettings) -> list[pl.Expr]:
    """train_end and validation_end, Int32 counts from the start of one user's sorted events, for use in an aggregation; for
    `user_holdout` also validation_start, where validation begins: a held-out user has no training events before it.

    A single event is for training; of two the second is the test. Of a held-out user a single event is the test.
    """
    events = pl.len().cast(pl.Int32)
    if settings.method == "leave_one_out":
        ends = {"train_end": (events - 2).clip(1), "validation_end": (events - 1).clip(1)}
    elif settings.method == "global_time":
        cuts = {"train_end": settings.validation_start, "validation_end": settings.test_start}
        ends = {name: (pl.col("timestamp") < cut).sum().cast(pl.Int32) for name, cut in cuts.items()}
    else:
        held = pl.first("user_id").map_batches(lambda ids: is_held_out(ids, settings), pl.Boolean, is_elementwise=True)
        left: dict[str, pl.Expr | int] = {"train_end": events, "validation_end": 1, "validation_start": 2}
        ends = {name: pl.when(held).then((events - count).clip(0)).otherwise(events) for name, count in left.items()}
    return [end.alias(name) for name, end in ends.items()]


def in_window(settings: SplitSettings) -> pl.Expr:
    """Whether an event, its time known, is in a sequence: before the end of the test."""
    return pl.lit(True) if settings.test_end is None else pl.col("timestamp") < settings.test_end


def is_held_out(user_ids: pl.Series, settings: SplitSettings) -> pl.Series:
    """Whether each user is held out: xxh64 of `user` and the id as text, seed 0, is divisible by `holdout_one_in`."""
    return _chosen(user_ids, settings.holdout_one_in, "user ")


def is_cold(item_ids: pl.Series, settings: SplitSettings) -> pl.Series:
    """Whether each item is cold: xxh64 of its id as text, seed 0, is divisible by `cold_one_in`."""
    return _chosen(item_ids, settings.cold_one_in)


def _chosen(ids: pl.Series, one_in: int, salt: str = "") -> pl.Series:
    found = [one_in > 0 and xxh64_intdigest(f"{salt}{each}".encode()) % one_in == 0 for each in ids.to_list()]
    return pl.Series(found, dtype=pl.Boolean)
