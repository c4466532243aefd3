"""The items of a bundle: their ids and titles, and how a word of the user becomes an item row."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recsys.batch import FIRST_ITEM, Sequences
from recsys.errors import RequestError
from serving.filters import Attributes

if TYPE_CHECKING:
    import polars as pl

    from features.dataset import Dataset
    from recsys.content import Described

Find = Callable[[int | str], int | None]
"""Turns a word of the user into an item row, or None."""
ITEMS = "items.parquet"
REMOVED = "removed"
"""Column of the items' table of a bundle from which items were taken out: they are read in histories, never recommended."""
NEAREST_AMONG = 20_000
"""Most popular items among which near titles are looked for, in about .1 s."""


class Catalogue:
    """Every item by row; read when first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def items(self) -> pl.DataFrame:
        import polars as pl

        return pl.read_parquet(self.path, columns=["row", "item_id", "title", "events"])

    @cached_property
    def table(self) -> pl.DataFrame:
        """All columns of the items' table, and whether an item was removed."""
        import polars as pl

        table = pl.read_parquet(self.path)
        return table if REMOVED in table.columns else table.with_columns(pl.lit(False).alias(REMOVED))

    @property
    def described(self) -> Described:
        """What every item's text, categories and numbers are, by row."""
        from features.dataset import described

        return described(self.table)

    @cached_property
    def removed(self) -> Tensor:
        """Whether an item was taken out of what may be recommended; bool."""
        return torch.tensor(self.table[REMOVED].to_numpy())

    @cached_property
    def attributes(self) -> Attributes:
        """What requests may filter items by."""
        return Attributes(self.table)

    def __len__(self) -> int:
        return len(self.items)

    def complete(self) -> None:
        """Read now what is else read when it is first asked for."""
        for name, part in vars(type(self)).items():
            if isinstance(part, cached_property):
                getattr(self, name)

    @cached_property
    def item_ids(self) -> list[int | str]:
        """As in the input; entry i belongs to row FIRST_ITEM + i."""
        return self.items["item_id"].to_list()

    @cached_property
    def titles(self) -> list[str]:
        """As item_ids; an item without a title is called by its id."""
        return [title or str(item_id) for title, item_id in zip(self.items["title"].to_list(), self.item_ids, strict=True)]

    @cached_property
    def events(self) -> Tensor:
        """Training events of each item, float32."""
        return torch.tensor(self.items["events"].to_numpy(), dtype=torch.float32)

    def item_id(self, row: int) -> int | str:
        return self.item_ids[row - FIRST_ITEM]

    def title(self, row: int) -> str:
        return self.titles[row - FIRST_ITEM]

    def by_id(self, item_id: int | str) -> int | None:
        """The row of an item id, as in the input or as text."""
        return self._rows_by_id.get(str(item_id))

    def by_title(self, title: int | str) -> int | None:
        """The row of a title as it stands, else without regard to case; of several items, the most popular."""
        return self._rows_by_title.get(str(title), self._rows_by_folded.get(str(title).casefold()))

    def by_either(self, text: int | str) -> int | None:
        """The row of an item id, else of a title."""
        row = self.by_id(text)
        return self.by_title(text) if row is None else row

    def resolve(self, text: int | str) -> int:
        """The row of an item id, else of a title. Raises RequestError: it is neither; the nearest titles are named."""
        (row,) = self.rows([text], self.by_either)
        assert row is not None  # else an error was raised
        return row

    def rows(self, words: Iterable[int | str], find: Find, unknown: list[int | str] | None = None) -> list[int | None]:
        """The row of every word; None for a word that is no item, which is added to `unknown`.

        Raises RequestError: a word is no item, and there is no list `unknown` to add it to; the nearest titles are named.
        """
        words = list(words)
        found = [*map(self._rows_by_id.get, map(str, words))] if find == self.by_id else [*map(find, words)]
        if None in found:
            strange = [word for word, row in zip(words, found, strict=True) if row is None]
            if unknown is None:
                hint = "give the id of an item" if find == self.by_id else self._hint(str(strange[0]))
                raise RequestError(f"no item {str(strange[0])!r}; {hint}")
            unknown += strange
        return found

    def _hint(self, word: str) -> str:
        near = difflib.get_close_matches(word.casefold(), list(self._near), n=3)
        return (
            f"nearest titles: {', '.join(repr(self._near[title]) for title in near)}"
            if near
            else "give the id or title of an item"
        )

    def align(self, dataset: Dataset) -> Sequences:
        """The data set's histories in this catalogue's rows; an item that is not in it gets a row of its own behind them.

        A data set that has grown since the model was trained has other rows for the same items.
        """
        theirs, sequences = dataset.items["item_id"], dataset.sequences
        if theirs.equals(self.items["item_id"], check_dtypes=True):
            return sequences
        return replace(sequences, items=self.aligned(theirs)[sequences.items.long()])

    def aligned(self, theirs: pl.Series) -> Tensor:
        """The row here of each row of a data set with these items; int32, shape FIRST_ITEM + items."""
        own = torch.tensor(self.rows_of(theirs).fill_null(0).to_numpy())
        behind = torch.arange(len(theirs)) + FIRST_ITEM + len(self)
        return torch.cat([torch.arange(FIRST_ITEM), torch.where(own > 0, own, behind)]).int()

    def rows_of(self, item_ids: pl.Series) -> pl.Series:
        """The row of each item id, which counts as text; null where it is no item."""
        import polars as pl

        mine = self.items.select("item_id", own=pl.col("row").cast(pl.Int64))
        words = item_ids.alias("item_id").to_frame()
        if words.schema["item_id"] != mine.schema["item_id"]:
            words, mine = words.cast({"item_id": pl.String}), mine.cast({"item_id": pl.String})
        return words.join(mine, on="item_id", how="left", maintain_order="left")["own"]

    @cached_property
    def _rows_by_id(self) -> dict[str, int]:
        return {str(item_id): row for row, item_id in enumerate(self.item_ids, FIRST_ITEM)}

    @cached_property
    def _rows_by_title(self) -> dict[str, int]:
        return {title: row for row, title in reversed(list(enumerate(self.titles, FIRST_ITEM)))}  # the first one stays

    @cached_property
    def _rows_by_folded(self) -> dict[str, int]:
        return {title.casefold(): row for row, title in reversed(list(enumerate(self.titles, FIRST_ITEM)))}

    @cached_property
    def _near(self) -> dict[str, str]:
        return {title.casefold(): title for title in self.titles[:NEAREST_AMONG]}
