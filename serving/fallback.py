"""Lists for when none can be computed: those of the nightly job, kept compactly, and the most popular items."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from recsys.batch import FIRST_ITEM, PADDING
from recsys.bundle import MANIFEST
from recsys.errors import DataError, SetupError
from serving.nights import LIVE, Night, Nights, lists_file, shard_of
from serving.redis_lists import RedisLists
from serving.stores import REDIS, hidden
from serving.texts import Texts

if TYPE_CHECKING:
    from serving.engine import Recommender

TRIES = 10
"""How often the lists are read while new ones go live, before that is an error."""
COLUMNS = ("user_id", "item_id", "rank", "score")


class UserLists(Protocol):
    """Where the API finds the lists that the nightly job made; safe to share between threads."""

    remote: bool
    """Whether they are asked for over a network, which is to be done in a thread."""

    def of(self, user_id: str) -> list[tuple[int | str, float]]:
        """Item ids and scores of a user's list, best first; empty where there is none, or it cannot be had now."""
        ...

    def refresh(self) -> bool:
        """Take new lists if there are some, and say whether. Raises DataError, StoreError: they cannot be read."""
        ...

    def erase(self, user_id: str) -> bool:
        """Leave nothing of a user; returns whether there was a list. Raises RecsysError: that cannot be done now."""
        ...

    def close(self) -> None: ...


def open_lists(place: str) -> UserLists:
    """The lists in a folder of nights, or delivered to redis://HOST:PORT/NUMBER.

    Raises DataError: no lists are there. SetupError: a URL of another kind, or without its package.
    """
    return _delivered(place) or NightlyLists(Path(place))


def erase_from(place: str, user_id: str) -> bool:
    """Take a user out of the lists at a place, without reading them all; returns whether there was one.

    Raises SetupError: as open_lists. RecsysError: that cannot be done now.
    """
    delivered = _delivered(place)
    if delivered is None:
        if not (Path(place) / LIVE).is_symlink():
            raise _unreadable(Path(place))
        return Nights(Path(place)).erase(user_id)
    try:
        return delivered.erase(user_id)
    finally:
        delivered.close()


def _delivered(place: str) -> UserLists | None:
    """The lists at a URL; None: it is a folder's path."""
    kind, _, rest = place.partition("://")
    if not rest:
        return None
    if kind not in REDIS:
        raise SetupError(f"{hidden(place)}: no lists are read there; give the folder of nights, or a URL of {', '.join(REDIS)}")
    return RedisLists(place)


@dataclass(frozen=True)
class _Shard:
    users: Texts
    """Ids in order."""
    offsets_U: npt.NDArray[np.int64]
    items_N: npt.NDArray[np.int32]
    """Places in item_ids."""
    scores_N: npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Table:
    shards: list[_Shard]
    hashes: list[str]
    """Of the shards' files: a shard of the same one need not be read again."""
    item_ids: list[int | str]
    stamp: tuple[str, int, int]


class NightlyLists:
    """The lists of the live night in a folder, held in memory; read again when another one goes live."""

    remote = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._change = threading.Lock()
        self._table = _read(path)

    def __len__(self) -> int:
        """Users that have a list."""
        return sum(len(shard.users) for shard in self._table.shards)

    def of(self, user_id: str) -> list[tuple[int | str, float]]:
        """Item ids and scores of a user's list, best first; empty where there is none."""
        table = self._table
        shard = table.shards[shard_of(user_id, len(table.shards))]
        place = bisect_left(shard.users, user_id)
        if place == len(shard.users) or shard.users[place] != user_id:
            return []
        lines = slice(int(shard.offsets_U[place]), int(shard.offsets_U[place + 1]))
        codes, scores = shard.items_N[lines].tolist(), shard.scores_N[lines].tolist()
        return [(table.item_ids[code], score) for code, score in zip(codes, scores, strict=True)]

    def refresh(self) -> bool:
        """Read the live night if it is another than before; whether it was. Raises DataError: it cannot be read."""
        with self._change:
            if _stamp(self.path) == self._table.stamp:
                return False
            self._table = _read(self.path, self._table)
            return True

    def erase(self, user_id: str) -> bool:
        """Take a user out of every night, each as a whole or not at all, and forget the list; whether there was one.

        Raises DataError: a night cannot be read. RecsysError: the folder cannot be written.
        """
        with self._change:
            found = Nights(self.path).erase(user_id)
            if _stamp(self.path) != self._table.stamp:
                self._table = _read(self.path, self._table)
        return found

    def close(self) -> None:
        pass


def _stamp(path: Path) -> tuple[str, int, int]:
    """Which night is live; another one also after a user was erased."""
    try:
        live = (path / LIVE).resolve(strict=True)
        stat = (live / MANIFEST).stat()
    except OSError:
        raise _unreadable(path) from None
    return str(live), stat.st_ino, stat.st_mtime_ns


def _unreadable(path: Path) -> DataError:
    return DataError(f"{path}: cannot be read as lists; give a folder that `recsys nightly` wrote")


def _read(path: Path, before: _Table | None = None) -> _Table:
    """All shards of one night, even if another goes live meanwhile; those that `before` has are taken from it."""
    for _ in range(TRIES):
        stamp = _stamp(path)
        try:
            return _shards(Night.open(Path(stamp[0])), stamp, before)
        except DataError:
            if _stamp(path) == stamp:
                raise
    raise DataError(f"{path}: other lists went live {TRIES} times while they were read; try again")


def _shards(night: Night, stamp: tuple[str, int, int], before: _Table | None) -> _Table:
    hashes = [night.manifest["files"][lists_file(shard)]["sha256"] for shard in range(night.shards)]
    known = dict(zip(before.hashes, before.shards, strict=True)) if before is not None else {}
    item_ids = [] if before is None or known.keys().isdisjoint(hashes) else before.item_ids
    shards, items = [], None
    try:
        for shard, digest in enumerate(hashes):
            if digest in known:
                shards.append(known[digest])
                continue
            table = pl.read_parquet(night.lists(shard), columns=list(COLUMNS))
            if items is None:
                items = pl.DataFrame({"item_id": pl.Series(item_ids, dtype=table.schema["item_id"])})
            found = table.select(pl.col("item_id").unique(maintain_order=True))
            items = pl.concat([items, found.join(items, on="item_id", how="anti", maintain_order="left")])
            table = table.join(items.with_row_index("item"), on="item_id", how="left", maintain_order="left")
            table = table.select("item", "score", "rank", user=pl.col("user_id").cast(pl.String)).sort("user", "rank")
            shards.append(_packed(table))
    except (pl.exceptions.PolarsError, OSError):
        raise _unreadable(night.path) from None
    return _Table(shards, hashes, item_ids if items is None else items.to_series().to_list(), stamp)


def _packed(table: pl.DataFrame) -> _Shard:
    """A shard of codes of items, sorted by users, whose ids are text, and ranks."""
    runs = table["user"].rle().struct.unnest()
    offsets_U = np.concatenate([np.zeros(1, np.int64), np.cumsum(runs["len"].to_numpy(), dtype=np.int64)])
    users = Texts.packed([runs["value"].to_list()])
    return _Shard(users, offsets_U, table["item"].to_numpy().astype(np.int32), table["score"].to_numpy().astype(np.float32))


def nightly(
    recommender: Recommender, listed: Sequence[tuple[int | str, float]], k: int, allowed_V: torch.Tensor | None, seen: set[int]
) -> list[tuple[int, float]]:
    """Rows and scores of a list's first k items that this bundle knows and may recommend."""
    rows = recommender.catalogue.rows([item_id for item_id, _ in listed], recommender.catalogue.by_id, [])
    found = (
        (row, score)
        for row, (_, score) in zip(rows, listed, strict=True)
        if row is not None and row not in seen and row - FIRST_ITEM < recommender.lines
        if allowed_V is None or allowed_V[row - FIRST_ITEM]
    )
    return list(islice(found, k))


def popular(recommender: Recommender, k: int, allowed_V: torch.Tensor | None, seen: set[int]) -> list[tuple[int, float]]:
    """Rows of the k items with the most training events that may be recommended, and how many."""
    rows, counts = recommender.popularity.best(k, seen, allowed_V)
    return [(row, count) for row, count in zip(rows.tolist(), counts.tolist(), strict=True) if row != PADDING]
