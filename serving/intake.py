"""What a night reads: every user's events, from a data set, a store or a table, dealt to shards on disk, then read one by one.

histories/dealt.json         what the source is, and how its events are put in order; written last
histories/items.arrow        the item ids; events name them by their number from 0, or by their row in a data set
histories/empty.arrow        no rows, of the parts' columns
histories/part-00000.arrow   a chunk of the source: the rows of shard 0, of shard 1, …; then, as numbers, where each begins

U users of a shard · N their events
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import numpy as np
import polars as pl
import torch
from torch import Tensor

from features.cells import id_type
from features.dataset import Dataset
from features.events import fill_times, judge, part_repeats
from features.files import readable
from features.schema import ROW, DataSettings, none_usable, require
from recsys.batch import Batch
from recsys.bundle import flush, write_file
from recsys.errors import DataError, StoreError
from recsys.progress import Count
from serving.catalogue import Catalogue
from serving.history import Event, HistoryStore, open_store
from serving.nights import shard_of
from serving.stores import hidden

CHUNK = 2**22
"""Events that are dealt at once; they, and the users of a row group of a data set, bound what is in memory."""
ROWS = 2**18
"""Rows of a table of events that are judged at once."""
USERS = 2**13
"""Users of a data set that are read at once."""
KEPT = 2**10
"""Users of a store that are read at once; their events are Python's, which take ten times the memory."""
ABOUT, ITEMS, EMPTY = "dealt.json", "items.arrow", "empty.arrow"
FILE = "#file"
"""Name of the column that says which file a row is from, in no one's data."""
LAST_SECOND = 2**63 - 1
FILES = ("sqlite", "lmdb")
"""Kinds of stores that are a file."""


class Source(Protocol):
    """Where all histories are."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a manifest says of it; another where it is seen to hold something else."""

    @property
    def users(self) -> int:
        """About how many there are; the same for the same input."""

    def deal(self, folder: Path, shards: int, now: int | None, progress: Count) -> dict[str, int]:
        """Write every user's events into a new folder for `read_shard`, which leaves out those later than `now`.

        Returns how many there are, and how many rows, or users, were left out for which reason. `progress` hears how many of
        how many users or rows are done. Raises DataError, StoreError: the source cannot be read, or has changed meanwhile.
        """


@dataclass(frozen=True)
class Dealt:
    """The users of a shard."""

    user_ids: pl.Series
    """String or Int64 as in the source, ascending, each once; length U."""
    histories: Batch
    """Oldest event first, in the catalogue's rows; an item that only the data set has got one behind these."""
    unknown: int
    """Events that are left out because the catalogue does not know their item."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Events that are left out because they are `later` than now, or `duplicate`: an earlier one says the same."""


def dataset_source(path: Path) -> Source:
    """The directory that `recsys features` made. Raises DataError: it is none, or altered."""
    return _Sequences(Dataset.open(path))


def store_source(url: str, keep: int) -> Source:
    """The last `keep` events of every user of a store. Raises SetupError, StoreError: as open_store; there is no such file."""
    kind, _, place = url.partition(":") if ":" in url else ("sqlite", "", url)
    if kind in FILES and not Path(place).is_file():
        raise StoreError(f"{url}: there is no such file; give the store that `recsys serve` keeps histories in")
    return _Store(open_store(url, keep))


def events_source(place: str, settings: DataSettings) -> Source:
    """Events in Parquet: a file, a glob or a folder, here or at a URL (s3://, gs://, az://, https://, file://).

    Keys of an object store are read from the environment. Raises DataError: no such file or column, or an unreadable file.
    """
    return _Events(place, settings)


def read_shard(folder: Path, shard: int, catalogue: Catalogue) -> Dealt:
    """The users of a shard of a folder that `Source.deal` made."""
    about = json.loads((folder / ABOUT).read_text())
    rows = _rows(folder, shard, about)
    if about["kind"] == "store":
        rows = rows.unique("user_id", keep="last", maintain_order=True)  # whom a server moved meanwhile it may name twice
    users, lengths, events = _events(rows)
    left_out = {}
    if about["kind"] == "events":
        found = len(events)
        lengths, events = _in_order(lengths, events, about["repeats"])
        left_out["duplicate"] = found - len(events)
    own = _own_rows(folder / ITEMS, (folder / ITEMS).stat().st_mtime_ns, catalogue, about["kind"] == "dataset")
    rows_N, times_N = own[_tensor(events["item_id"])], _tensor(events["timestamp"])
    in_time_N = torch.ones_like(times_N, dtype=torch.bool) if about["now"] is None else times_N <= about["now"]
    keep_N = in_time_N & (rows_N > 0)
    offsets = _behind_0(keep_N.cumsum(0))[_behind_0(lengths.cumsum(0))]
    left_out["later"] = len(times_N) - int(in_time_N.sum())
    return Dealt(users, Batch(rows_N[keep_N], offsets, times_N[keep_N]), int((in_time_N & ~keep_N).sum()), left_out)


def _events(rows: pl.DataFrame) -> tuple[pl.Series, Tensor, pl.DataFrame]:
    """The users of sorted rows, each once, how many events each has, and these."""
    runs = rows["user_id"].rle().struct.unnest()
    ends = torch.cumsum(_tensor(runs["len"]), 0)
    events = _behind_0(_tensor(rows["item_id"].list.len()).cumsum(0))[_behind_0(ends)].diff()
    return runs["value"].alias("user_id"), events, rows.select(pl.exclude("user_id").explode(empty_as_null=False))


def _in_order(lengths: Tensor, events: pl.DataFrame, repeats: str) -> tuple[Tensor, pl.DataFrame]:
    """Events sorted, and without repeats, as `recsys features` does it."""
    key = "order" if "order" in events.columns else "timestamp"
    users = torch.repeat_interleave(lengths)
    events = events.with_columns(user_id=pl.Series(users.numpy())).with_row_index(ROW)
    events = events.sort("user_id", key, maintain_order=True)
    if repeats == "drop":
        events, _ = part_repeats(events, key)
    return torch.bincount(_tensor(events["user_id"]), minlength=len(lengths)), fill_times(events)


def _rows(folder: Path, shard: int, about: Mapping[str, Any]) -> pl.DataFrame:
    """The rows of a shard sorted by user, those of one in the order of the source."""
    frames = [pl.read_ipc_stream(folder / EMPTY)]
    for number in range(about["parts"]):
        with _part(folder, number).open("rb") as file:
            file.seek(8 * (shard - about["shards"] - 1), os.SEEK_END)
            begin, end = np.frombuffer(file.read(16), "<i8").tolist()
            if end > begin:
                file.seek(begin)
                frames.append(pl.read_ipc_stream(file.read(end - begin)))
    return pl.concat(frames).sort("user_id", maintain_order=True)


@lru_cache(maxsize=2)
def _own_rows(path: Path, written: int, catalogue: Catalogue, aligned: bool) -> Tensor:
    """What the numbers of a dealt folder's items are in the catalogue, int64; 0: unknown, if not aligned as a data set."""
    items = pl.read_ipc_stream(path)["item_id"]
    return catalogue.aligned(items).long() if aligned else _tensor(catalogue.rows_of(items).fill_null(0))


def _tensor(numbers: pl.Series) -> Tensor:
    """Int64."""
    return torch.from_numpy(numbers.to_numpy().astype(np.int64))


def _behind_0(numbers: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), numbers])


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.arrow"


class _Parts:
    """Rows on their way into shards: user_id, and lists of item_id (as numbers) and timestamp, maybe order.

    `listed` makes such of a chunk of rows of another kind.
    """

    def __init__(self, folder: Path, shards: int, listed: Callable[[pl.DataFrame], pl.DataFrame] = lambda rows: rows) -> None:
        folder.mkdir(parents=True)
        self._folder, self._shards, self._listed = folder, shards, listed
        self._held: list[pl.DataFrame] = []
        self._events = self._files = 0

    def add(self, rows: pl.DataFrame, events: int) -> None:
        """More rows, which hold so many events in all."""
        self._held.append(rows)
        self._events += events
        if self._events >= CHUNK:
            self._write()

    def close(self, items: Callable[[], pl.Series], about: Mapping[str, Any]) -> None:
        """After this the folder is whole; `items` gives the ids by their numbers."""
        if self._held or not self._files:
            self._write()
        items().alias("item_id").to_frame().write_ipc_stream(self._folder / ITEMS)
        flush(self._folder / ITEMS)
        write_file(self._folder / ABOUT, json.dumps({**about, "shards": self._shards, "parts": self._files}).encode())

    def _write(self) -> None:
        none = pl.DataFrame(schema={"user_id": pl.String, "item_id": pl.List(pl.Int32), "timestamp": pl.List(pl.Int64)})
        rows = self._listed(pl.concat(self._held)) if self._held else none
        self._held, self._events = [], 0
        shards = np.array([shard_of(user_id, self._shards) for user_id in rows["user_id"].to_list()], np.int64)
        rows = rows[np.argsort(shards, kind="stable")]
        path, bounds, end = _part(self._folder, self._files), [0], 0
        with path.open("wb") as file:
            for count in np.bincount(shards, minlength=self._shards).tolist():
                if count:
                    rows[end : end + count].write_ipc_stream(file)
                end += count
                bounds.append(file.tell())
            file.write(np.array(bounds, "<i8").tobytes())
        flush(path)
        if not self._files:
            rows.clear().write_ipc_stream(self._folder / EMPTY)
            flush(self._folder / EMPTY)
        self._files += 1


class _Sequences:
    """A data set as a source."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.identity = {"kind": "dataset", "path": _absolute(str(dataset.path)), "hash": dataset.manifest["hash"]}
        self.users = int(dataset.manifest["users"])

    def deal(self, folder: Path, shards: int, now: int | None, progress: Count) -> dict[str, int]:
        parts, users, events = _Parts(folder, shards), 0, 0
        table = pl.scan_parquet(self._dataset.path / "sequences.parquet")
        table = table.select("user_id", pl.col("items").alias("item_id"), pl.col("timestamps").alias("timestamp"))
        for rows in _batches(table, str(self._dataset.path), USERS):
            length = int(rows["item_id"].list.len().sum())
            parts.add(rows, length)
            users, events = users + len(rows), events + length
            progress(users, self.users)
        parts.close(lambda: self._dataset.items["item_id"], {"kind": "dataset", "now": now})
        if Dataset.open(self._dataset.path, verify=False).manifest["hash"] != self.identity["hash"]:
            raise _changed(str(self._dataset.path))
        return {"events": events}


class _Store:
    """A store of histories as a source."""

    def __init__(self, store: HistoryStore) -> None:
        kind, _, place = store.url.partition(":")
        self._store = store
        self.identity = {
            "kind": "store",
            "url": f"{kind}:{_absolute(place)}" if kind in FILES else store.url,
            "keep": store.keep,
        }

    @cached_property
    def users(self) -> int:
        return self._store.count()

    def deal(self, folder: Path, shards: int, now: int | None, progress: Count) -> dict[str, int]:
        numbers = _Numbers(pl.String())
        parts, counts, done = _Parts(folder, shards, numbers.told), Counter({"events": 0}), 0
        found = self._store.users()
        while part := list(islice(found, KEPT)):
            named = [(user_id, events) for user_id, events in part if user_id]
            rows = _kept(named)
            length = int(rows["item_id"].list.len().sum())
            parts.add(rows, length)
            counts += Counter(events=length, unnamed=len(part) - len(named), unreadable=sum(kept is None for _, kept in named))
            done += len(part)
            progress(done, max(done, self.users))
        parts.close(numbers.items, {"kind": "store", "now": now})
        return {"events": 0, **counts}


def _kept(histories: Sequence[tuple[str, Sequence[Event] | None]]) -> pl.DataFrame:
    """A row a user, items as text."""
    flat = [event for _, events in histories for event in events or ()]
    items = [event.item_id for event in flat]
    try:
        texts = pl.Series(items, dtype=pl.Int64).cast(pl.String)  # ten times as fast where it can be done
    except (TypeError, OverflowError):
        texts = pl.Series([*map(str, items)], dtype=pl.String)
    times = pl.Series([event.time for event in flat], dtype=pl.Int64)
    lengths = pl.Series([len(events or ()) for _, events in histories], dtype=pl.Int64)
    users = pl.Series([user_id for user_id, _ in histories], dtype=pl.String)
    return _listed(users, lengths, pl.DataFrame({"item_id": texts, "timestamp": times}))


def _listed(users: pl.Series, lengths: pl.Series, events: pl.DataFrame) -> pl.DataFrame:
    """A row a user, with lists of so many of the events."""
    number = np.arange(len(users))
    owner = pl.Series("owner", number.repeat(lengths.to_numpy())).set_sorted()
    lists = events.with_columns(owner).group_by("owner", maintain_order=True).agg(pl.all())
    rows = pl.DataFrame({"user_id": users, "owner": number}).join(lists, on="owner", how="left", maintain_order="left")
    return rows.drop("owner").with_columns(pl.exclude("user_id").fill_null([]))


class _Events:
    """Events in Parquet as a source."""

    def __init__(self, place: str, settings: DataSettings) -> None:
        self._settings, self._place, self._where = settings, place, _shown(place)
        if re.search(r"\.(csv|tsv|json|jsonl|ndjson)(\.\w+)?$", self._where):
            raise DataError(
                f"{self._where}: is no Parquet; give Parquet, or make a data set of it with `recsys features` and give that"
            )
        paths = _local(place)
        with _readable(place):
            table = pl.scan_parquet(place if paths is None else paths, extra_columns="ignore", include_file_paths=FILE)
            schema = table.collect_schema()
        names = {name: getattr(settings, name) for name in ("user_id", "item_id", "timestamp", "order")}
        names = {name: column for name, column in names.items() if column}
        require(names.values(), schema, self._where)
        self._table = table.select(*(pl.col(column).alias(name) for name, column in names.items()))
        if "timestamp" not in names:
            self._table = self._table.with_columns(timestamp=pl.lit(None, pl.Int64))
        with _readable(place):
            files = _remote(table) if paths is None else _stamps(paths)
        self._paths = paths or []
        read = {**names, "time_unit": settings.time_unit, "repeats": settings.repeats}
        self.identity = {"kind": "events", "path": _absolute(self._where), "files": files, "read": read}

    @cached_property
    def users(self) -> int:
        with _readable(self._place):
            return int(self._table.select(pl.col("user_id").approx_n_unique()).collect(engine="streaming").item())

    def deal(self, folder: Path, shards: int, now: int | None, progress: Count) -> dict[str, int]:
        with _readable(self._place):
            total = self._table.select(pl.len()).collect(engine="streaming").item()
        ids = {name: id_type(name, [self._table.collect_schema()]) for name in ("user_id", "item_id")}
        judged = judge(self._table, self._settings, ids, LAST_SECOND, self._where).drop(ROW)
        numbers = _Numbers(ids["item_id"])
        parts, done = _Parts(folder, shards, numbers.listed), 0
        counts: Counter[str] = Counter(events=0)
        for rows in _batches(judged, self._place, ROWS):
            good = rows.filter(pl.col("reason").is_null()).drop("reason")
            parts.add(good, len(good))
            counts.update({"events": len(good)})
            counts.update(dict(rows["reason"].drop_nulls().cast(pl.String).value_counts().rows()))
            done += len(rows)
            progress(done, total)
        if not counts["events"]:
            raise none_usable(self._where, total, {reason: count for reason, count in counts.items() if count})
        parts.close(numbers.items, {"kind": "events", "now": now, "repeats": self._settings.repeats})
        with _readable(self._place):
            if self._paths and _stamps(self._paths) != self.identity["files"]:
                raise _changed(self._where)
        return dict(counts)


class _Numbers:
    """The items of a source that does not number them, in the order in which they first came."""

    def __init__(self, dtype: pl.DataType) -> None:
        self._known = pl.DataFrame(schema={"item_id": dtype, "number": pl.Int32})

    def items(self) -> pl.Series:
        return self._known["item_id"]

    def of(self, item_ids: pl.Series) -> pl.Series:
        """Int32."""
        ids = item_ids.alias("item_id").to_frame()
        new = ids.unique(maintain_order=True).join(self._known, on="item_id", how="anti", maintain_order="left")
        number = pl.int_range(len(self._known), len(self._known) + len(new), dtype=pl.Int32)
        self._known = pl.concat([self._known, new.with_columns(number=number)])
        return ids.join(self._known, on="item_id", how="left", maintain_order="left")["number"]

    def listed(self, events: pl.DataFrame) -> pl.DataFrame:
        """A row a user, with lists of the rest, of a row an event."""
        return events.with_columns(item_id=self.of(events["item_id"])).group_by("user_id", maintain_order=True).agg(pl.all())

    def told(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The same, of a row a user."""
        lengths, events = rows["item_id"].list.len(), rows.select(pl.exclude("user_id").explode(empty_as_null=False))
        return _listed(rows["user_id"], lengths, events.with_columns(item_id=self.of(events["item_id"])))


def _batches(table: pl.LazyFrame, place: str, rows: int) -> Iterator[pl.DataFrame]:
    """The rows of a table, so many at once. Raises DataError: it cannot be read."""
    with _readable(place):
        yield from table.collect_batches(chunk_size=rows, engine="streaming")


def _local(place: str) -> list[Path] | None:
    """The files of a place on this machine, by name; None: it is elsewhere. Raises DataError: there is none."""
    url = urlsplit(place)
    if "://" in place and url.scheme != "file":
        return None
    path = Path(unquote(url.path)) if "://" in place else Path(place)
    if path.is_dir():
        found = list(path.rglob("*.parquet"))
    else:
        found = [path] if path.is_file() else [*map(Path, glob.glob(str(path), recursive=True))]
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise DataError(f"{place}: there is no Parquet file; give a file, a glob, a folder or a URL of events")
    return files


def _stamps(paths: Sequence[Path]) -> list[list[Any]]:
    """Of each file its name, its size, and when it was written."""
    return [[str(path.absolute()), found.st_size, found.st_mtime_ns] for path in paths for found in [path.stat()]]


def _absolute(place: str) -> str:
    """A place that is the same from every directory."""
    return place if "://" in place else str(Path(place).absolute())


def _changed(place: str) -> DataError:
    return DataError(f"{place}: was written anew while it was read, so that two would mix; start again")


def _remote(table: pl.LazyFrame) -> list[list[Any]]:
    """Name of each file elsewhere, and its rows; when it was written is not known of all kinds of places."""
    files = table.group_by(FILE).agg(pl.len()).collect(engine="streaming").sort(FILE)
    return [[_shown(name), None, None, rows] for name, rows in files.rows()]


@contextmanager
def _readable(place: str) -> Iterator[None]:
    """Turn what cannot be read into one line without secrets. Raises DataError."""
    try:
        with readable(_shown(place)):
            yield
    except DataError as error:
        raise DataError(hidden(str(error).replace(place.removeprefix(_open(place)), ""))) from None


def _shown(place: str) -> str:
    """A place without passwords and what signs requests."""
    return hidden(_open(place))


def _open(place: str) -> str:
    """A place up to what signs requests."""
    return re.sub(r"^(https?://[^?]*)\?.*", r"\1", place)
