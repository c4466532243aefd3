"""One shard of a night: the lists of its users, computed, or taken from the last night where nothing changed.

U users of a shard
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from recsys.batch import FIRST_ITEM, Batch
from recsys.bundle import entry, sha256
from recsys.errors import BundleError
from serving.catalogue import Catalogue
from serving.engine import Recommender
from serving.explain import nearest_events
from serving.intake import Dealt, read_shard
from serving.lists import Array
from serving.nights import PLAN, lists_file, users_file
from serving.retrieval import taken
from serving.tables import SOURCES, lists_columns, lists_frame, write_table

if TYPE_CHECKING:
    import polars as pl

HISTORIES = "histories"
"""Folder of dealt histories, in that of the night."""
LEFT_OUT = "left_out"
"""Key of a file of users under which it says of how many events no list was made."""
PLACES = 2**20
"""Places of lists that are made at once, at most, and that a shard of many users has."""
USERS = 2048
"""Users whose lists are made at once: so many that those of one length fill batches, and so few that their looks fit memory."""


@dataclass(frozen=True)
class Terms:
    """What every list of a night is asked for."""

    k: int = 100
    """Items for each user."""
    now: int = 0
    """Second since 1970 at which the lists are asked for."""
    until: bool = False
    """Whether events later than `now` are left out, as they are where it was given or the model reads it."""
    filter_seen: bool = True
    """Whether items of the history are left out."""
    deny: tuple[int | str, ...] = ()
    """Ids of items that nobody gets."""
    allow: tuple[int | str, ...] | None = None
    """Ids of the only items that anybody gets; None: all."""
    where: dict[str, Any] = field(default_factory=dict)
    """Conditions that items must meet."""
    reasons: bool = False
    """Whether each place names the event whose item is nearest to it."""


@dataclass(frozen=True)
class Task:
    """A shard that is to be made."""

    work: Path
    """Folder of the night in the making."""
    shard: int
    bundle: str
    """Its id."""
    terms: Terms
    plan: str
    """SHA-256 of the file of the night's plan, by which a worker that was left behind knows another night."""
    last: Path | None = None
    """Folder of the last night, of which lists are taken where a user's history is the same; None: all are made."""


@dataclass(frozen=True)
class Facts:
    """What a night's manifest needs to know of a shard."""

    shard: int
    users: int
    rows: int
    """Places of lists that hold an item."""
    listed: int
    """Users with at least one item."""
    underfilled: int
    """Users with fewer than k items."""
    popular: int
    """Users of whose history the model knows nothing, so that their list is the most popular items."""
    left_out: dict[str, int]
    """Events that no list was made of, by reason: unknown (the bundle does not know the item), later, duplicate."""
    best: tuple[int, float, float]
    """How many lists are not popular, and sums of their scores in first place and of the squares."""
    counts_V: Array
    """In how many lists each item of the catalogue stands, int64."""
    files: dict[str, dict[str, Any]]
    """Size and SHA-256 of each file."""
    made: int | None = None
    """Users whose lists were computed; None: the shard was there already."""


def pipeline(recommender: Recommender, tasks: Iterable[Task]) -> Iterator[Facts]:
    """Make shards; while one is computed, the next is read and the one before is written, each in a thread of its own.

    Raises RecsysError: a shard cannot be written, another night has begun, or the bundle is not that of the task.
    """
    reader, writer = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(1, "write")
    waiting = iter(tasks)
    reading: Future[Any] | None = reader.submit(_next, recommender, waiting)
    writing: Future[Any] | None = None
    try:
        while reading is not None or writing is not None:
            jobs = [job for job in (reading, writing) if job is not None]
            ready, _ = wait(jobs, return_when=FIRST_COMPLETED)
            if writing in ready and writing is not None:
                yield writing.result()
                writing = None
            if reading in ready and reading is not None:
                given = reading.result()
                reading = None if given is None else reader.submit(_next, recommender, waiting)
                if given is not None:
                    made = _made(recommender, *given)
                    if writing is not None:
                        yield writing.result()
                    writing = writer.submit(_write, recommender, given, made)
    finally:  # without waiting for a task that may never come
        reader.shutdown(wait=False, cancel_futures=True)
        writer.shutdown()


def _next(recommender: Recommender, waiting: Iterator[Task]) -> tuple[Task, Dealt] | None:
    """The next task, which may be long in coming, and its histories."""
    task = next(waiting, None)
    if task is None:
        return None
    if task.bundle != recommender.id:  # its directory was renewed since the night began
        raise BundleError(f"{recommender.path}: holds bundle {recommender.id}, the night is of {task.bundle}; start it again")
    return task, read_shard(task.work / HISTORIES, task.shard, recommender.catalogue)


Made = tuple["pl.DataFrame", "pl.DataFrame", Array, int]
"""Lists and users of a shard, in how many lists each item stands, and for how many users they were computed."""


def _made(recommender: Recommender, task: Task, dealt: Dealt) -> Made:
    import polars as pl

    users = pl.DataFrame({"user_id": dealt.user_ids, "history": _hashes(dealt.histories)})
    before = None if task.last is None else _last(task.last, task.shard, users)
    same_U = (
        np.zeros(len(users), bool) if before is None else (before["history"] == users["history"]).fill_null(False).to_numpy()
    )
    chosen = np.flatnonzero(~same_U)
    lists, sources, counts_V = _computed(recommender, task.terms, dealt, chosen)
    if before is not None and task.last is not None:
        lists = _merged(users, same_U, lists, pl.read_parquet(task.last / lists_file(task.shard)))
        every = before["source"].fill_null(0).to_numpy().copy()
        every[chosen] = sources
        sources = every
    if len(chosen) < len(users):
        counts_V = _counts(recommender.catalogue, lists)
    return lists, users.with_columns(source=pl.Series(sources, dtype=pl.UInt8)), counts_V, len(chosen)


def _last(night: Path, shard: int, users: pl.DataFrame) -> pl.DataFrame | None:
    """What the last night says of these users, null of a new one; None: its ids are of another type, and not to be compared."""
    import polars as pl

    last = pl.read_parquet(night / users_file(shard))
    if last["user_id"].dtype != users["user_id"].dtype:
        return None
    return users.select("user_id").join(last, on="user_id", how="left", maintain_order="left")


def _merged(users: pl.DataFrame, old_U: Array, new: pl.DataFrame, old: pl.DataFrame) -> pl.DataFrame:
    """The lists of all users in their order: of some from the old table, of the others from the new one; both are in order."""
    import polars as pl

    begins_U, lengths_U = np.zeros(len(users), np.int64), np.zeros(len(users), np.int64)
    for table, mine_U, offset in ((new, ~old_U, 0), (old, old_U, len(new))):
        runs = table["user_id"].rle().struct.unnest().rename({"value": "user_id"})
        runs = runs.with_columns(begin=pl.col("len").cum_sum() - pl.col("len") + offset)
        found = users.select("user_id").join(runs, on="user_id", how="left", maintain_order="left").fill_null(0)
        begins_U[mine_U], lengths_U[mine_U] = found["begin"].to_numpy()[mine_U], found["len"].to_numpy()[mine_U]
    places_N = np.arange(int(lengths_U.sum())) + np.repeat(begins_U - lengths_U.cumsum() + lengths_U, lengths_U)
    return pl.concat([new, old]).select(pl.all().gather(places_N))


def _computed(recommender: Recommender, terms: Terms, dealt: Dealt, chosen: Array) -> tuple[pl.DataFrame, Array, Array]:
    """The lists of some users, what made each, and in how many of them each item stands."""
    import polars as pl

    catalogue, parts, sources = recommender.catalogue, [], [np.zeros(0, np.uint8)]
    counts_R = np.zeros(FIRST_ITEM + len(catalogue), np.int64)
    deny, allow = catalogue.denied_and_allowed(terms.deny, terms.allow)
    at_once = max(1, min(USERS, PLACES // terms.k))
    for start in range(0, len(chosen), at_once):
        part = torch.from_numpy(chosen[start : start + at_once])
        histories = taken(dealt.histories, part)
        now = terms.now if recommender.reads_now else None
        lists = recommender.recommend(histories, terms.k, now, terms.filter_seen, deny, allow, terms.where or None)
        frame = lists_frame(dealt.user_ids.gather(part.numpy()), lists, catalogue)
        if terms.reasons:
            frame = frame.with_columns(nearest_events(recommender, histories, lists))
        parts.append(frame)
        np.add.at(counts_R, lists.rows.numpy().ravel(), 1)
        sources.append(np.array([*map(SOURCES.index, lists.sources)], np.uint8))
    none = pl.DataFrame(schema=lists_columns(dealt.user_ids, catalogue, terms.reasons))
    return pl.concat([none, *parts]), np.concatenate(sources), counts_R[FIRST_ITEM:]


def _hashes(histories: Batch) -> Array:
    """Of each history, uint64: equal where items, times and their order are."""
    values, times = histories.values.numpy(), histories.times.numpy()
    both_N2 = np.ascontiguousarray(np.stack([values, times], 1))
    digest, hashes_U = xxhash.xxh3_64_intdigest, np.empty(len(histories), np.uint64)
    for user, (begin, end) in enumerate(pairwise(histories.offsets.tolist())):
        hashes_U[user] = digest(both_N2[begin:end].data)
    return hashes_U


def _counts(catalogue: Catalogue, lists: pl.DataFrame) -> Array:
    """In how many lists each item of the catalogue stands, int64."""
    found = catalogue.items.select("item_id").join(
        lists.group_by("item_id").len(), on="item_id", how="left", maintain_order="left"
    )
    counts_V: Array = found["len"].fill_null(0).to_numpy().astype(np.int64)
    return counts_V


def _write(recommender: Recommender, given: tuple[Task, Dealt], done: Made) -> Facts:
    """The users first: a shard is done when its lists are there."""
    (task, dealt), (lists, users, counts_V, made) = given, done
    metadata = {"bundle": task.bundle, "now": str(task.terms.now)}
    left_out = {name: count for name, count in {"unknown": dealt.unknown, **dealt.left_out}.items() if count}
    told = metadata | {LEFT_OUT: json.dumps(left_out)}
    allowed = partial(planned, task)
    write_table(users, task.work / users_file(task.shard), told, allowed)
    write_table(lists, task.work / lists_file(task.shard), metadata, allowed)
    return _facts(task, lists, users, counts_V, left_out, made)


def planned(task: Task) -> bool:
    """Whether the folder is still that of the task's night."""
    try:
        return sha256(task.work / PLAN) == task.plan
    except OSError:
        return False


def found(catalogue: Catalogue, task: Task) -> Facts | None:
    """The facts of a shard that is there already; None where it is not."""
    import polars as pl

    if not (task.work / lists_file(task.shard)).is_file():
        return None
    users = task.work / users_file(task.shard)
    left_out = json.loads(pl.read_parquet_metadata(users)[LEFT_OUT])
    lists = pl.read_parquet(task.work / lists_file(task.shard))
    return _facts(task, lists, pl.read_parquet(users), _counts(catalogue, lists), left_out, None)


def _facts(
    task: Task, lists: pl.DataFrame, users: pl.DataFrame, counts_V: Array, left_out: dict[str, int], made: int | None
) -> Facts:
    import polars as pl

    lengths = lists["user_id"].rle().struct.field("len")
    popular = users.filter(pl.col("source") == SOURCES.index("popularity"))
    best = lists.filter(pl.col("rank") == 1).join(popular, on="user_id", how="anti", maintain_order="left")["score"]
    best_U = best.cast(pl.Float64).to_numpy()
    return Facts(
        shard=task.shard,
        users=len(users),
        rows=len(lists),
        listed=len(lengths),
        underfilled=len(users) - int((lengths >= task.terms.k).sum()),
        popular=len(popular),
        left_out=left_out,
        best=(len(best_U), float(best_U.sum()), float((best_U**2).sum())),
        counts_V=counts_V,
        files={name: entry(task.work / name) for name in (lists_file(task.shard), users_file(task.shard))},
        made=made,
    )
