"""The users in parts that fit in memory, worked off one after the other here, or elsewhere many at once, to the same rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from uuid import uuid4

import polars as pl

AT_ONCE = 2**23
"""Events of a part, besides those of one user; tests/benchmarks/features_scale.py measures what memory that takes."""
SAMPLED = 2**20
"""Events, evenly spread, by which users are divided into parts; of fewer, all."""
PLACE = "#place"
"""Name of the column that numbers the events, in no one's data."""
Report = Callable[[int], None]
"""Called with the events done since it was last called."""


@dataclass(frozen=True)
class Part:
    """The users whose ids lie in a range: above `after`, up to `upto`; None: no end."""

    number: int
    after: int | str | None
    upto: int | str | None

    def of(self, events: pl.LazyFrame) -> pl.LazyFrame:
        """Its events. Of tables sorted by user, or of some below each other, little else is read."""
        if self.after is not None:
            events = events.filter(pl.col("user_id") > pl.lit(self.after))
        return events if self.upto is None else events.filter(pl.col("user_id") <= pl.lit(self.upto))


def divide(events: pl.LazyFrame) -> list[Part]:
    """All users in the order of their ids, so many a part as have about AT_ONCE events.

    Which part a user is in changes no result, so that a sample tells enough.
    """
    rows = events.select(pl.len()).collect().item()
    step = max(1, rows // SAMPLED)
    drawn = events.select("user_id").with_row_index(PLACE).filter(pl.col(PLACE) % step == 0)
    users = drawn.select("user_id").collect(engine="streaming").group_by("user_id").len().sort("user_id")
    part = (pl.col("len").cast(pl.Int64).cum_sum() * step - 1) // AT_ONCE
    lasts = users.group_by(part.alias("part"), maintain_order=True).agg(pl.last("user_id"))["user_id"].to_list()
    return [
        Part(number, lasts[number - 1] if number else None, last if number < len(lasts) - 1 else None)
        for number, last in enumerate(lasts)
    ]


def by_users(events: pl.LazyFrame, report: Report) -> Iterator[pl.DataFrame]:
    """The events of all users, part by part."""
    for part in divide(events):
        found = part.of(events).collect(engine="streaming")
        yield found
        report(len(found))


class Task(Protocol):
    """What is to be done for one part."""

    @property
    def out(self) -> Path:
        """The file to write."""


Asked = TypeVar("Asked", bound=Task)
Told = TypeVar("Told")


class Engine(Protocol):
    """Does tasks, and tells in their order what came of each."""

    def __call__(self, work: Callable[[Asked], Told], tasks: Iterable[Asked]) -> Iterator[Told]: ...


def in_turn(work: Callable[[Asked], Told], tasks: Iterable[Asked]) -> Iterator[Told]:
    """One task after the other in this process, each when it is asked for."""
    return map(work, tasks)


def put_part(rows: pl.DataFrame, path: Path) -> None:
    """Write the rows of a part; the file is there when it is whole."""
    beginning = path.with_name(f"{path.name}.{uuid4().hex}")  # two may write it: a node that was thought lost, and another
    rows.write_ipc(beginning, compression="lz4")
    beginning.replace(path)


def take_part(path: Path) -> pl.DataFrame:
    """The rows of a part, whose file goes."""
    rows = pl.read_ipc(path)
    path.unlink()
    return rows


def add_counts(counts: pl.DataFrame, more: pl.DataFrame, key: str) -> pl.DataFrame:
    """The sums of both, by `key`: as large as what is counted, however many parts there are."""
    return pl.concat([counts, more]).group_by(key).sum()
