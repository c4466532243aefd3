"""Ranked lists as Parquet: user_id, item_id, rank, score."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recsys.batch import FIRST_ITEM, PADDING
from recsys.errors import RecsysError
from serving.catalogue import Catalogue
from serving.lists import Lists

if TYPE_CHECKING:
    import polars as pl


def lists_frame(user_ids: pl.Series, lists: Lists, catalogue: Catalogue) -> pl.DataFrame:
    """One row for each place of each list, rank from 1; ids as in the input."""
    import polars as pl

    owners_N, places_N = (lists.rows != PADDING).nonzero(as_tuple=True)
    lines_N = lists.rows[owners_N, places_N] - FIRST_ITEM
    return pl.DataFrame(
        {
            "user_id": user_ids.gather(owners_N.numpy()),
            "item_id": catalogue.items["item_id"].gather(lines_N.numpy()),
            "rank": (places_N + 1).to(torch.int32).numpy(),
            "score": lists.scores[owners_N, places_N].numpy(),
        }
    )


def write_frames(frames: Iterable[pl.DataFrame], path: Path, metadata: Mapping[str, str]) -> int:
    """Write frames as the row groups of one Parquet file, whole or not at all; how many rows there are.

    The same frames give the same bytes. Raises RecsysError: the file cannot be written.
    """
    import pyarrow.parquet as parquet

    temporary, writer, rows = path.with_name(f".{path.name}.tmp"), None, 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for frame in frames:
            table = frame.to_arrow()
            if writer is None:
                writer = parquet.ParquetWriter(temporary, table.schema.with_metadata(dict(metadata)), compression="zstd")
            writer.write_table(table, row_group_size=max(1, len(table)))
            rows += len(table)
        if writer is not None:
            writer.close()
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    except OSError as error:
        raise RecsysError(f"{path}: cannot be written ({error.strerror}); give another place") from None
    finally:
        temporary.unlink(missing_ok=True)
    return rows


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
