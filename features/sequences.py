"""Every user's events as one row: item rows, times, and where training and validation end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from features.dataset import LIST_ROWS, write_parquet
from features.events import Report, by_users, fill_times
from features.split import SplitSettings, split_ends


def write_sequences(
    events: pl.LazyFrame, items: pl.DataFrame, path: Path, split: SplitSettings, report: Report
) -> dict[str, int]:
    """Write the sequences of sorted events; returns the counts of events for train, validation and test."""
    rows = items.lazy().select("item_id", "row")
    counts = {"train": 0, "validation": 0, "test": 0}

    def parts() -> Iterator[pl.DataFrame]:
        for part in by_users(events, report):
            placed = fill_times(part).lazy().join(rows, on="item_id", maintain_order="left")
            lists = {"items": pl.col("row"), "timestamps": pl.col("timestamp")}
            users = placed.group_by("user_id", maintain_order=True).agg(*split_ends(split), **lists).select(*schema).collect()
            ends = users.select(pl.col("train_end", "validation_end").sum().cast(pl.Int64)).row(0)
            counts["train"] += ends[0]
            counts["validation"] += ends[1] - ends[0]
            counts["test"] += len(part) - ends[1]
            yield users

    schema = {
        "user_id": events.collect_schema()["user_id"],
        "items": pl.List(pl.Int32()),
        "timestamps": pl.List(pl.Int64()),
        "train_end": pl.Int32(),
        "validation_end": pl.Int32(),
    }
    write_parquet(parts(), schema, path, LIST_ROWS)
    return counts
