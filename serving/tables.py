"""Ranked lists as Parquet: user_id, item_id, rank, score; and of each user what the list was made of."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from features.dataset import write_parquet
from recsys.batch import FIRST_ITEM, PADDING
from recsys.bundle import replace_file
from recsys.errors import RecsysError
from serving.catalogue import Catalogue
from serving.lists import Lists

if TYPE_CHECKING:
    import polars as pl


SOURCES = ("ranked", "retrieved", "popularity")
"""What makes lists, as numbers in a table of users."""


def lists_columns(user_ids: pl.Series, catalogue: Catalogue, reasons: bool) -> dict[str, pl.DataType]:
    """Names and types of the columns of lists_frame; with reasons, `because` is the item of an event."""
    import polars as pl

    item = catalogue.items["item_id"].dtype
    columns = {"user_id": user_ids.dtype, "item_id": item, "rank": pl.Int32(), "score": pl.Float32()}
    return columns | {"because": item} if reasons else columns


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


def write_table(
    table: pl.DataFrame, path: Path, metadata: Mapping[str, str], allowed: Callable[[], bool] = lambda: True
) -> None:
    """Write a table as Parquet, whole or not at all; the same table gives the same bytes.

    `allowed` is asked before the file gets its name. Raises RecsysError: it cannot be written, or is no longer allowed to be.
    """
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of its own: two writers do not mix
        os.close(handle)
        temporary = Path(name)
        try:
            temporary.chmod(0o644)
            write_parquet([table], table.schema, temporary, metadata=metadata)
            if not allowed():
                raise RecsysError(f"{path}: is not written, since it is no longer wanted: another night has begun")
            replace_file(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RecsysError(f"{path}: cannot be written ({error.strerror or error}); give another place") from None
