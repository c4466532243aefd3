"""Every user's events as one row: item rows, times, and where training and validation end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import polars as pl
import polars.selectors as cs

from features.dataset import LIST_ROWS, write_parquet
from features.events import fill_times
from features.parts import Engine, Part, Report, divide
from features.split import SplitSettings, in_window, split_ends


def place_part(part: Part, events: Path, items: Path, split: SplitSettings) -> tuple[pl.DataFrame, dict[str, int]]:
    """The sequences of some users, and the counts of events as `write_sequences` returns them."""
    own = part.of(pl.scan_parquet(events)).collect(engine="streaming")
    placed, read = fill_times(own).filter(in_window(split)), len(own)
    del own
    rows = pl.scan_parquet(items).select("item_id", "row")
    found = placed.lazy().join(rows, on="item_id", maintain_order="left")
    lists = {"items": pl.col("row"), "timestamps": pl.col("timestamp")}
    users = found.group_by("user_id", maintain_order=True).agg(*split_ends(split), **lists)
    sequences = users.select(*_schema(split, pl.Null())).collect()
    ends = sequences.select(cs.matches("_(start|end)$").sum().cast(pl.Int64)).row(0, named=True)
    start = ends.get("validation_start", ends["train_end"])
    return sequences, {
        "train": ends["train_end"],
        "validation": ends["validation_end"] - start,
        "test": len(placed) - ends["validation_end"],
        "history": start - ends["train_end"],
        "after": read - len(placed),
    }


def write_sequences(
    events: Path, items: Path, path: Path, split: SplitSettings, report: Report, engine: Engine
) -> dict[str, int]:
    """Write the sequences of sorted events, of all users who have an event before the end of the test.

    Returns the counts of events for train, validation and test; where users are held out, `history`: of their events before
    validation; and where the test ends, `after`: of the events that are in no sequence.
    """
    table = pl.scan_parquet(events)
    work = partial(place_part, events=events, items=items, split=split)
    counts = dict.fromkeys(("train", "validation", "test"), 0)
    counts |= ({"history": 0} if split.method == "user_holdout" else {}) | ({"after": 0} if split.test_end is not None else {})

    def parts() -> Iterator[pl.DataFrame]:
        for rows, more in engine(work, divide(table), path.parent):
            for name in counts:
                counts[name] += more[name]
            yield rows
            report(sum(more.values()))

    write_parquet(parts(), _schema(split, table.collect_schema()["user_id"]), path, LIST_ROWS)
    return counts


def _schema(split: SplitSettings, user_id: pl.DataType) -> Mapping[str, pl.DataType]:
    """The columns of the sequences, users' ids being of the type `user_id`."""
    return {
        "user_id": user_id,
        "items": pl.List(pl.Int32()),
        "timestamps": pl.List(pl.Int64()),
        "train_end": pl.Int32(),
        "validation_end": pl.Int32(),
        **({"validation_start": pl.Int32()} if split.method == "user_holdout" else {}),
    }
