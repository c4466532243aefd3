"""The users in parts that fit in memory, worked off one after the other here or many at once on a cluster, to the same rows."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import polars as pl

from recsys.cluster import connected, told_of_losses
from recsys.errors import DataError, RecsysError
from recsys.progress import Progress

AT_ONCE = 2**23
"""Events of a part, besides those of one user; tests/benchmarks/features_scale.py measures what memory that takes."""
SAMPLED = 2**20
"""Events, evenly spread, by which users are divided into parts; of fewer, all."""
AHEAD = 2
"""Parts a CPU that are begun before the first of them is taken: one that is worked off, one that waits."""
SECONDS = 10
"""Within which parts end that are wanted no more."""
TRIES = 3
"""Workers that may die of one part before the build is given up."""
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


def summed(progress: Progress | None, what: str, total: int) -> Report:
    """Tells `progress` the sum of what it hears."""
    done = 0

    def report(events: int) -> None:
        nonlocal done
        done += events
        if progress is not None:
            progress(what, done, total)

    return report


def by_users(events: pl.LazyFrame, report: Report) -> Iterator[pl.DataFrame]:
    """The events of all users, part by part."""
    for part in divide(events):
        found = part.of(events).collect(engine="streaming")
        yield found
        report(len(found))


Made = tuple[pl.DataFrame, Any]
"""The rows that became of a part, and what is told of them."""
Engine = Callable[[Callable[[Part], Made], Iterable[Part], Path], Iterator[Made]]
"""Works off parts, and gives in their order what became of each; rows from elsewhere come by way of the folder."""


def in_turn(work: Callable[[Part], Made], parts: Iterable[Part], folder: Path) -> Iterator[Made]:
    """One part after the other in this process, each when it is asked for."""
    return map(work, parts)


@contextmanager
def on_cluster(address: str) -> Iterator[Engine]:
    """Meanwhile parts can be worked off on the CPUs of a cluster; what a dead worker was at, another begins anew.

    All nodes have this version of this package, and see the folder of the data set under the same path. Raises SetupError: no
    Ray, or no cluster there.
    """
    do = "see that all nodes have this package and whether memory runs out, and start again"
    with connected(address) as ray:
        remote = ray.remote(num_cpus=1, max_retries=TRIES - 1)(_put)
        most = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 0)))

        def engine(work: Callable[[Part], Made], parts: Iterable[Part], folder: Path) -> Iterator[Made]:
            """Raises RecsysError: why a part could not be worked off, or its workers are lost."""
            begun: deque[Any] = deque()
            try:
                with told_of_losses(ray, f"Ray ({address})", do):
                    for part in parts:
                        begun.append(remote.remote(work, part, folder))
                        if len(begun) == most:
                            yield _taken(ray.get(begun.popleft()))
                    while begun:
                        yield _taken(ray.get(begun.popleft()))
            finally:
                for each in begun:  # of a build that has failed, whose folder goes
                    ray.cancel(each, force=True)
                if begun:
                    ray.wait(list(begun), num_returns=len(begun), timeout=SECONDS)

        yield engine


def _put(work: Callable[[Part], Made], part: Part, folder: Path) -> tuple[Path, Any] | RecsysError:
    """The file with the rows of a part, which is there when it is whole, and what is told; or what the user can mend."""
    try:
        if not folder.is_dir():
            raise DataError(
                f"{folder}: node {platform.node()} of the Ray cluster does not find this folder; "
                "give --out a folder that all nodes see"
            )
        rows, told = work(part)
    except RecsysError as error:
        return error
    path = folder / f"{part.number}.part"
    beginning = path.with_name(f"{path.name}.{uuid4().hex}")  # two may write it: a node that was thought lost, and another
    rows.write_ipc(beginning, compression="lz4")
    beginning.replace(path)
    return path, told


def _taken(made: tuple[Path, Any] | RecsysError) -> Made:
    """The same with the rows, whose file goes. Raises RecsysError: what the user can mend."""
    if isinstance(made, RecsysError):
        raise made
    path, told = made
    rows = pl.read_ipc(path)
    path.unlink()
    return rows, told


def add_counts(counts: pl.DataFrame, more: pl.DataFrame, key: str) -> pl.DataFrame:
    """The sums of both, by `key`: as large as what is counted, however many parts there are."""
    return pl.concat([counts, more]).group_by(key).sum()
