"""Histories that outlive a request: the last events of every user, in SQLite, LMDB, Redis or memory, under one law."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import msgspec

from recsys.errors import RequestError, SetupError
from recsys.progress import Count
from serving.lmdb_store import LmdbBlobs
from serving.stores import REDIS, BlobError, Blobs, MemoryBlobs, RedisBlobs, SqliteBlobs, checked, hidden

if TYPE_CHECKING:
    from features.dataset import Dataset

KEEP = 500
"""Events of a user that are kept unless said otherwise."""
USERS = 1000
"""Users of a bulk import that are written at once."""
STORES: dict[str, Callable[[str], Blobs]] = {
    "sqlite": SqliteBlobs,
    "lmdb": LmdbBlobs,
    **dict.fromkeys(REDIS, RedisBlobs),
    "memory": MemoryBlobs,
}
"""By how their URL begins."""


class Event(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a user did."""

    item_id: int | str
    time: int
    """In seconds since 1970."""
    event_id: str = ""
    """Given by who reports it, so that a report may be repeated; without one, an item is there once a second."""

    @property
    def key(self) -> str | tuple[int, int | str]:
        """What no two events of a history share."""
        return self.event_id or (self.time, self.item_id)


def merged(old: Sequence[Event], new: Iterable[Event], keep: int) -> list[Event]:
    """A history with new events: by time, then as they came, the last `keep`; one whose key is there changes nothing.

    Into a full history comes only what is later than its oldest event, so that one which had to go does not come back.
    """
    kept = list(old[-keep:])
    known = {event.event_id or (event.time, event.item_id) for event in kept}  # key, written out: ten times as fast
    full = len(kept) >= keep
    for event in new:
        if event.key not in known and not (full and event.time <= old[-keep].time):
            known.add(event.key)
            kept.append(event)
    kept.sort(key=attrgetter("time"))
    return kept[-keep:]


class HistoryStore:
    """The last events of every user; safe to share between threads, and its place between processes.

    Every method raises StoreError: the store does not answer; when it answers again, so does this. BlobError, which is one: a
    user's history is unreadable, or cannot be changed now. Those that name users raise RequestError: an id that is empty or
    longer than stores.LONGEST.
    """

    def __init__(self, blobs: Blobs, keep: int = KEEP) -> None:
        if keep < 1:
            raise SetupError(f"{blobs.url}: keeps {keep} events a user; keep at least 1")
        self.keep = keep
        self._blobs = blobs
        self._decode = msgspec.msgpack.Decoder(list[Event]).decode
        self._encode = msgspec.msgpack.Encoder().encode

    @property
    def url(self) -> str:
        """Without the password."""
        return self._blobs.url

    def read(self, user_id: str) -> list[Event]:
        """A user's events, oldest first; none of an unknown user."""
        return self._events(self._blobs.get(checked(user_id)))[-self.keep :]

    def append(self, user_id: str, events: Sequence[Event]) -> int:
        """Merge events into a user's history, all or none; returns how many were new."""
        return self._merge({checked(user_id): events})

    def load(self, histories: Iterable[tuple[str, Sequence[Event]]]) -> int:
        """The same for many users, so many at once as make it fast; returns how many events were new."""
        return sum(map(self._merge, _batches(histories)))

    def erase(self, user_id: str) -> bool:
        """Forget a user, so that the store's files hold neither the id nor an event; returns whether there were any."""
        return self._blobs.delete(checked(user_id))

    def users(self) -> Iterator[tuple[str, list[Event] | None]]:
        """Every user's id and events as `read` gives them, in bounded memory; None if they are unreadable.

        Whoever comes or goes meanwhile is there or not. An id is empty where an earlier version wrote the history and nothing
        was appended since: users of a file are found by their id then, and cannot be named. Redis may name a user twice.
        """
        for user_id, blob in self._blobs.walk():
            try:
                events = self._events(blob)[-self.keep :]
            except BlobError:
                yield user_id, None
            else:
                yield user_id, events

    def count(self) -> int:
        """How many users there are."""
        return self._blobs.count()

    def check(self) -> None:
        """Do nothing if the store answers."""
        self._blobs.check()

    def close(self) -> None:
        self._blobs.close()

    def _merge(self, histories: dict[str, Sequence[Event]]) -> int:
        added: dict[str, int] = {}

        def change(user_id: str, blob: bytes | None) -> bytes | None:
            old = self._events(blob)
            kept = merged(old, histories[user_id], self.keep)
            added[user_id] = len({*map(id, kept)} - {*map(id, old)})  # the very objects: a third of the time of their keys
            return self._blob(kept) if added[user_id] else None

        self._blobs.change(list(histories), change)
        return sum(added.values())

    def _events(self, blob: bytes | memoryview | None) -> list[Event]:
        try:
            return [] if blob is None else self._decode(blob)
        except msgspec.DecodeError as error:
            raise BlobError(f"{self.url}: a user's history is unreadable ({error}); erase it, or restore a copy") from None

    def _blob(self, events: list[Event]) -> bytes:
        try:
            return self._encode(events)
        except (OverflowError, UnicodeEncodeError) as error:
            raise RequestError(f"an event cannot be kept ({error}); give numbers of 64 bits and text that UTF-8 has") from None


def _batches(histories: Iterable[tuple[str, Sequence[Event]]]) -> Iterator[dict[str, Sequence[Event]]]:
    """So many users at a time, each once."""
    rest = iter(histories)
    while part := list(islice(rest, USERS)):
        batch: dict[str, list[Event]] = defaultdict(list)
        for user_id, events in part:
            batch[checked(user_id)].extend(events)
        yield dict(batch)


def open_store(url: str, keep: int = KEEP) -> HistoryStore:
    """Open sqlite:PATH (or a path alone), lmdb:PATH, redis://HOST:PORT/NUMBER, rediss://, valkey://, valkeys:// or memory:.

    Raises SetupError: no such kind, or its package is missing. StoreError: a file that cannot be opened; a server is first
    asked when it is needed.
    """
    url = url if ":" in url else f"sqlite:{url}"
    kind = url.partition(":")[0]
    if kind not in STORES:
        raise SetupError(f"store {hidden(url)!r} is of no known kind; begin it with one of {', '.join(STORES)}")
    return HistoryStore(STORES[kind](url), keep)


def import_dataset(store: HistoryStore, dataset: Dataset, progress: Count) -> dict[str, Any]:
    """Load a DATASET's sequences; returns the counts of users, of their events and of those that were new.

    `progress` is told how many users of how many are done. Twice the same adds nothing. Where an item stands several times in
    a second, as it does without times, each but the first gets an id of its place among these.
    """
    import polars as pl

    from recsys.batch import FIRST_ITEM

    table = pl.scan_parquet(dataset.path / "sequences.parquet").select("user_id", "items", "timestamps")
    total = table.select(pl.len()).collect().item()
    items = dataset.items.select((pl.col("row") - FIRST_ITEM).alias("line"), "item_id").sort("line")["item_id"].to_list()
    counts = {"users": total, "events": 0, "new": 0}
    progress(0, total)
    for start in range(0, total, USERS):
        part = table.slice(start, USERS).collect()
        histories = []
        for user_id, rows, times in part.rows():
            events = _derived([items[row - FIRST_ITEM] for row in rows], times)[-store.keep :]
            histories.append((str(user_id), events))
            counts["events"] += len(events)
        counts["new"] += store.load(histories)
        progress(start + len(part), total)
    return counts


def _derived(item_ids: Iterable[int | str], times: Iterable[int]) -> list[Event]:
    """Events of which no two share a key."""
    before: dict[tuple[int, int | str], int] = defaultdict(int)
    events = []
    for item_id, time in zip(item_ids, times, strict=True):
        place = before[time, item_id]
        before[time, item_id] += 1
        events.append(Event(item_id, time, f"{time}:{item_id}:{place}" if place else ""))
    return events
