"""The nightly job: a list for every user of a data set, in one Parquet file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.dataset import Dataset
from recsys.batch import gather
from recsys.errors import DataError, RequestError
from serving.engine import Recommender
from serving.tables import lists_columns, lists_frame, write_frames

if TYPE_CHECKING:
    import polars as pl

USERS = 4096
"""Users whose lists are in memory at once."""


def nightly(
    recommender: Recommender,
    dataset: Dataset,
    out: Path,
    k: int = 100,
    now: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Write user_id, item_id, rank (from 1) and score of k items for every user, by all their events.

    Items that a user had are left out of their list. `now`, in seconds since 1970, leaves later events out and is when the
    lists are asked for (default: all events; the clock, where the model reads it). The file appears whole or not at all, names
    the bundle in its metadata, and has the same bytes whenever it is made for the same `now`. `progress` hears (users done,
    users in all). Returns bundle, users, rows, underfilled, popular, seconds, users_per_second.
    Raises RequestError: k below 1. DataError: the data set has no user.
    """
    if k < 1:
        raise RequestError(f"k is {k}; ask for at least 1 item")
    sequences, user_ids = recommender.catalogue.align(dataset), dataset.user_ids
    if not sequences.users:
        raise DataError(f"{dataset.path}: has no user; give a data set with events")
    if now is None and recommender.reads_now:
        now = int(time.time())
    counts = {"rows": 0, "underfilled": 0, "popular": 0}

    def frames() -> Iterator[pl.DataFrame]:
        for start in range(0, sequences.users, USERS):
            offsets = sequences.offsets[start : start + USERS + 1]
            histories = gather(sequences.items, sequences.times, offsets[:-1], offsets[1:])
            lists = recommender.recommend(histories, k, now)
            counts["underfilled"] += lists.underfilled
            counts["popular"] += int(lists.popular.sum())
            frame = lists_frame(user_ids[start : start + USERS], lists, recommender.catalogue)
            counts["rows"] += len(frame)
            yield frame
            progress(min(start + USERS, sequences.users), sequences.users)

    started = time.perf_counter()
    write_frames(frames(), lists_columns(user_ids, recommender.catalogue), out, {"bundle": recommender.id})
    seconds = time.perf_counter() - started
    speed = {"seconds": round(seconds, 3), "users_per_second": sequences.users / seconds}
    return {"bundle": recommender.id, "users": sequences.users, **counts, **speed}
