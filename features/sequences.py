"""Every user's events as one row: item rows, times, and where training and validation end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import polars.selectors as cs

from features.dataset import LIST_ROWS, write_parquet
from features.events import Report, by_users, fill_times
from features.split import SplitSettings, in_window, split_ends


def write_sequences(
    events: pl.LazyFrame, items: pl.DataFrame, path: Path, split: SplitSettings, report: Report
) -> dict[str, int]:
    """Write the sequences of sorted events, of all users who have an event before the end of the test.

    Returns the counts of events for train, validation and test; where users are held out, `history`: of their events before
    validation; and where the test ends, `after`: of the events that are in no sequence.
    """
    rows, held_out = items.lazy().select("item_id", "row"), split.method == "user_holdout"
    counts = dict.fromkeys(("train", "validation", "test"), 0)
    counts |= ({"history": 0} if held_out else {}) | ({"after": 0} if split.test_end is not None else {})

    def parts() -> Iterator[pl.DataFrame]:
        for part in by_users(events, report):
            placed = fill_times(part).filter(in_window(split))
            found = placed.lazy().join(rows, on="item_id", maintain_order="left")
            lists = {"items": pl.col("row"), "timestamps": pl.col("timestamp")}
            users = found.group_by("user_id", maintain_order=True).agg(*split_ends(split), **lists).select(*schema).collect()
            ends = users.select(cs.matches("_(start|end)$").sum().cast(pl.Int64)).row(0, named=True)
            start = ends.get("validation_start", ends["train_end"])
            counts["train"] += ends["train_end"]
            counts["validation"] += ends["validation_end"] - start
            counts["test"] += len(placed) - ends["validation_end"]
            if held_out:
                counts["history"] += start - ends["train_end"]
            if split.test_end is not None:
                counts["after"] += len(part) - len(placed)
            yield users

    schema = {
        "user_id": events.collect_schema()["user_id"],
        "items": pl.List(pl.Int32()),
        "timestamps": pl.List(pl.Int64()),
        "train_end": pl.Int32(),
        "validation_end": pl.Int32(),
        **({"validation_start": pl.Int32()} if held_out else {}),
    }
    write_parquet(parts(), schema, path, LIST_ROWS)
    return counts
