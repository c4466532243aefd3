"""A DATASET directory: how its tables are written, with the same bytes for the same rows, and how it is opened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import polars.selectors as cs
from polars.io.plugins import register_io_source

from recsys.bundle import open_directory
from recsys.errors import DataError

if TYPE_CHECKING:
    from recsys.batch import Sequences
    from recsys.content import Described

MANIFEST = "dataset.json"
FLAT_ROWS, LIST_ROWS = 2**18, 2**13
"""Rows of a row group; a row of a list column holds a whole user."""
LISTED = ("item_id", "title", "text", "categories", "numbers")
"""What an items table says of an item, beside its attributes."""
ATTRIBUTE = "attribute: "
"""Stands before the name of a column by which requests may filter items."""
GROUPS = 16
"""Row groups a process from which on these are dealt whole: then the fullest is within a few percent of the mean."""
ONE_PAGE = 2**30
"""Bytes of a data page. Polars sizes the pages of list columns by the chunks in memory, so only one page a column and
row group has the same bytes however the rows came."""


def write_parquet(
    frames: Iterable[pl.DataFrame],
    schema: Mapping[str, pl.DataType],
    path: Path,
    rows: int = FLAT_ROWS,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write frames one below the other; the bytes depend on the rows alone. An error raised by `frames` passes through."""

    def source(columns: list[str] | None, *_: object) -> Iterator[pl.DataFrame]:
        for frame in frames:
            yield frame if columns is None else frame.select(columns)

    table = register_io_source(source, schema=pl.Schema(schema))
    table.sink_parquet(
        path,
        compression="zstd",
        compression_level=1,
        row_group_size=rows,
        data_page_size=ONE_PAGE,
        metadata=None if metadata is None else dict(metadata),
    )


def described(items: pl.DataFrame) -> Described:
    """Items as an items table describes them, in its order."""
    from recsys.content import Described

    numbers = [[cell["values"] for cell in cells] for cells in items["numbers"].to_list()]
    return Described(items["text"].to_list(), items["categories"].to_list(), numbers)


class Dataset:
    """A DATASET that was built before; what it holds is read when first asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> Dataset:
        """Check the manifest and that every file is there and, with `verify`, unaltered.

        Raises DataError: no DATASET, one of another format, or a file that is missing or altered.
        """
        return cls(path, open_directory(path, verify, MANIFEST, DataError).manifest)

    @property
    def events(self) -> pl.LazyFrame:
        """The clean events, sorted by user and time (or order), times as they were stated (null where they were not)."""
        return pl.scan_parquet(self.path / "events.parquet")

    @cached_property
    def items(self) -> pl.DataFrame:
        """row, item_id, title (null: in no items table), text, categories, numbers, events of the training part, attributes
        (null where missing); by row."""
        return pl.read_parquet(self.path / "items.parquet")

    @property
    def listed(self) -> pl.DataFrame | None:
        """item_id, title, text, categories, numbers and attributes of the items that a table listed; None: there was none."""
        items = self.items.filter(pl.col("title").is_not_null()).select(*LISTED, cs.starts_with(ATTRIBUTE))
        return items if len(items) else None

    @cached_property
    def users(self) -> pl.DataFrame | None:
        """The users table, by user_id; None where there is none."""
        path = self.path / "users.parquet"
        return pl.read_parquet(path) if path.is_file() else None

    @cached_property
    def quarantine(self) -> pl.DataFrame | None:
        """The rows set aside: table, reason, and the original cells as text; None where there are none."""
        path = self.path / "quarantine.parquet"
        return pl.read_parquet(path) if path.is_file() else None

    @property
    def titles(self) -> list[str]:
        """A name for every item, by row: its title, or its id where it has none."""
        title, item_id = pl.col("title"), pl.col("item_id").cast(pl.String)
        return self.items.select(pl.when(title != "").then(title).otherwise(item_id)).to_series().to_list()

    @property
    def described(self) -> Described:
        """What every item's text, categories and numbers are, by row."""
        return described(self.items)

    @cached_property
    def user_ids(self) -> pl.Series:
        """In the order of `sequences`: ascending."""
        return pl.read_parquet(self.path / "sequences.parquet", columns=["user_id"]).to_series()

    @cached_property
    def sequences(self) -> Sequences:
        """Every user's events as tensors."""
        return self.share(0, 1)

    def share(self, rank: int, ranks: int) -> Sequences:
        """The sequences of one of so many processes, whose users are dealt by their training events.

        Dealt are row groups of the file, so that each process reads its own alone; users, where there are few of these.
        """
        import torch

        from recsys.batch import Sequences

        rows = pl.scan_parquet(self.path / "sequences.parquet")
        table = rows.collect() if ranks == 1 else pl.concat(self._dealt(rows, rank, ranks))
        table = table.drop("user_id")
        lengths = torch.tensor(table["items"].list.len().to_numpy(), dtype=torch.int64)
        return Sequences(
            items=torch.tensor(table["items"].explode().to_numpy()),
            times=torch.tensor(table["timestamps"].explode().to_numpy()),
            offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            **{name: torch.tensor(table[name].to_numpy(), dtype=torch.int64) for name in table.columns[2:]},
        )

    @staticmethod
    def _dealt(rows: pl.LazyFrame, rank: int, ranks: int) -> Iterator[pl.DataFrame]:
        """The rows of one process, a row group at a time."""
        from torch import from_numpy

        from recsys.batch import deal

        costs = pl.col("train_end").cast(pl.Int64)
        group = (pl.int_range(pl.len()) // LIST_ROWS).alias("group")
        groups = rows.group_by(group).agg(costs.sum()).sort("group").collect(engine="streaming")["train_end"]
        if len(groups) >= GROUPS * ranks:
            for own in (deal(from_numpy(groups.to_numpy().copy()), ranks) == rank).nonzero().flatten().tolist():
                yield rows.slice(own * LIST_ROWS, LIST_ROWS).collect()
            return
        owners = deal(from_numpy(rows.select(costs).collect().to_series().to_numpy().copy()), ranks)
        for start in range(0, len(owners), LIST_ROWS):
            mine = pl.Series((owners[start : start + LIST_ROWS] == rank).numpy())
            yield rows.slice(start, LIST_ROWS).collect().filter(mine)
