"""Ranked lists as Parquet: user_id, item_id, rank, score."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recsys.batch import FIRST_ITEM, PADDING
from recsys.errors import RecsysError
from serving.catalogue import Catalogue
from serving.lists import Lists

if TYPE_CHECKING:
    import polars as pl

ROW_GROUP = 2**18
"""Rows of a row group."""
ONE_PAGE = 2**30
"""Bytes of a data page: with one page a column and row group, the bytes do not depend on how the rows came."""


def lists_columns(user_ids: pl.Series, catalogue: Catalogue) -> dict[str, pl.DataType]:
    """Names and types of the columns of lists_frame."""
    import polars as pl

    return {"user_id": user_ids.dtype, "item_id": catalogue.items["item_id"].dtype, "rank": pl.Int32(), "score": pl.Float32()}


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


def write_frames(
    frames: Iterable[pl.DataFrame], columns: Mapping[str, pl.DataType], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write frames one below the other as Parquet, whole or not at all; the same frames give the same bytes.

    `columns` are those of lists_frame. Raises RecsysError: the file cannot be written.
    """
    import polars as pl
    from polars.io.plugins import register_io_source

    def source(chosen: list[str] | None, *_: object) -> Iterator[pl.DataFrame]:
        for frame in frames:
            yield frame if chosen is None else frame.select(chosen)

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        register_io_source(source, schema=pl.Schema(columns)).sink_parquet(
            temporary,
            compression="zstd",
            row_group_size=ROW_GROUP,
            data_page_size=ONE_PAGE,
            metadata=dict(metadata),
            sync_on_close="all",
        )
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise RecsysError(f"{path}: cannot be written ({error.strerror or error}); give another place") from None
    finally:
        if temporary.exists():
            temporary.unlink()
