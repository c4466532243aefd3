"""Lists for when none can be computed: those of the nightly job, kept compactly, and the most popular items."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from recsys.batch import FIRST_ITEM
from recsys.bundle import locked
from recsys.errors import DataError
from serving.tables import write_frames

if TYPE_CHECKING:
    import polars as pl

    from serving.engine import Recommender

ROWS = 2**20
"""Rows of the file that are in memory at once while a user is taken out."""
COLUMNS = ("user_id", "item_id", "rank", "score")


@dataclass(frozen=True)
class _Users:
    """Ids as text, ascending by their bytes, one behind the other."""

    letters: bytes
    ends_U: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends_U)

    def __getitem__(self, place: int) -> bytes:
        start = int(self.ends_U[place - 1]) if place else 0
        return self.letters[start : int(self.ends_U[place])]


@dataclass(frozen=True)
class _Table:
    users: _Users
    offsets_U: npt.NDArray[np.int64]
    items_N: npt.NDArray[np.int32]
    scores_N: npt.NDArray[np.float32]
    item_ids: list[int | str]
    stamp: tuple[int, int, int]


class NightlyLists:
    """The lists of a file that `recsys nightly` wrote; read again when it is replaced. Safe to share between threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._change = threading.Lock()
        self._table = _read(path)

    def __len__(self) -> int:
        """Users that have a list."""
        return len(self._table.users)

    def of(self, user_id: str) -> list[tuple[int | str, float]]:
        """Item ids and scores of a user's list, best first; empty where there is none."""
        table, wanted = self._table, user_id.encode()
        place = bisect_left(table.users, wanted)
        if place == len(table.users) or table.users[place] != wanted:
            return []
        lines = slice(int(table.offsets_U[place]), int(table.offsets_U[place + 1]))
        codes, scores = table.items_N[lines].tolist(), table.scores_N[lines].tolist()
        return [(table.item_ids[code], score) for code, score in zip(codes, scores, strict=True)]

    def refresh(self) -> bool:
        """Read the file again if it is another than before; whether it was. Raises DataError: it cannot be read."""
        with self._change:
            if _stamp(self.path) == self._table.stamp:
                return False
            self._table = _read(self.path)
            return True

    def erase(self, user_id: str) -> bool:
        """Write the file without a user's list, whole or not at all, and forget the list; whether there was one.

        Raises DataError: the file cannot be read. RecsysError: it cannot be written.
        """
        import polars as pl

        with self._change, locked(self.path):
            if _stamp(self.path) != self._table.stamp:
                self._table = _read(self.path)
            if not self.of(user_id):
                return False
            try:
                table = pl.scan_parquet(self.path)
                columns = dict(table.collect_schema())
                metadata = {key: value for key, value in pl.read_parquet_metadata(self.path).items() if key != "ARROW:schema"}
                lines = int(table.select(pl.len()).collect().item())
            except (pl.exceptions.PolarsError, OSError):
                raise _unreadable(self.path) from None

            def frames() -> Iterator[pl.DataFrame]:
                for start in range(0, max(lines, 1), ROWS):
                    part = table.slice(start, ROWS).filter(pl.col("user_id").cast(pl.String) != user_id)
                    yield part.collect()

            write_frames(frames(), columns, self.path, metadata)
            self._table = _read(self.path)
        return True


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        raise _unreadable(path) from None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def _unreadable(path: Path) -> DataError:
    return DataError(f"{path}: cannot be read as lists; give a file that `recsys nightly` wrote")


def _read(path: Path) -> _Table:
    import polars as pl

    stamp = _stamp(path)
    try:
        table = pl.read_parquet(path, columns=list(COLUMNS))
        user, item = pl.col("user_id").cast(pl.String), pl.col("item_id")
        items = table.select(item.unique(maintain_order=True)).to_series()
        codes = items.to_frame().with_row_index("item")
        table = table.join(codes, on="item_id", how="left", maintain_order="left").select("item", "score", "rank", user=user)
        table = table.sort("user", "rank")
        runs = table["user"].rle().struct.unnest()
    except (pl.exceptions.PolarsError, OSError):
        raise _unreadable(path) from None
    names = [str(name).encode() for name in runs["value"]]
    ends_U = np.cumsum([len(name) for name in names], dtype=np.int64)
    lengths = runs["len"].to_numpy().astype(np.int64)
    offsets_U = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    items_N, scores_N = table["item"].to_numpy().astype(np.int32), table["score"].to_numpy().astype(np.float32)
    return _Table(_Users(b"".join(names), ends_U), offsets_U, items_N, scores_N, items.to_list(), stamp)


def nightly(
    recommender: Recommender, listed: Sequence[tuple[int | str, float]], k: int, allowed_V: torch.Tensor | None, seen: set[int]
) -> list[tuple[int, float]]:
    """Rows and scores of a list's first k items that this bundle knows and may recommend."""
    found: list[tuple[int, float]] = []
    for item_id, score in listed:
        row = recommender.catalogue.by_id(item_id)
        if row is None or row in seen or row - FIRST_ITEM >= recommender.lines:
            continue
        if allowed_V is not None and not allowed_V[row - FIRST_ITEM]:
            continue
        found.append((row, score))
        if len(found) == k:
            break
    return found


def popular(recommender: Recommender, k: int, allowed_V: torch.Tensor | None, seen: set[int]) -> list[tuple[int, float]]:
    """Rows of the k items with the most training events that may be recommended, and how many; rows stand in that order."""
    lines = range(recommender.lines) if allowed_V is None else np.flatnonzero(allowed_V.numpy()[: recommender.lines])
    found: list[tuple[int, float]] = []
    for line in lines:
        row = int(line) + FIRST_ITEM
        if row not in seen:
            found.append((row, float(recommender.catalogue.events[int(line)])))
            if len(found) == k:
                break
    return found
