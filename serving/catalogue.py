"""The items of a bundle: their ids and titles, and how a word of the user becomes an item row."""

from __future__ import annotations

import difflib
import os
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from features.dataset import ATTRIBUTE, Dataset, described
from recsys.batch import FIRST_ITEM, PADDING, Sequences
from recsys.content import Described
from recsys.errors import RequestError
from serving.filters import CATEGORIES, Attributes
from serving.names import NAMES, REMOVED, Names

Find = Callable[[int | str], int | None]
"""Turns a word of the user into an item row, or None."""
ITEMS = "items.parquet"
NEAREST_AMONG = 20_000
"""Most popular items among which near titles are looked for, in about .1 s."""


class Catalogue:
    """Every item by row. Of a bundle, what requests need lies beside the items' table, and is read where it lies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)  # so that what is read later is of this file, whatever stands in its place then
        weakref.finalize(self, os.close, self._file)

    @cached_property
    def names(self) -> Names:
        """Ids, titles, events and removals."""
        stored = self.path.with_name(NAMES)
        return Names.load(stored) if stored.is_file() else Names.of(self._read(("item_id", "title", "events", REMOVED)))

    @cached_property
    def items(self) -> pl.DataFrame:
        """The ids, as tables are joined by."""
        return self._read(("row", "item_id"))

    @cached_property
    def table(self) -> pl.DataFrame:
        """All columns of the items' table, and whether an item was removed."""
        table = self._read()
        return table if REMOVED in table.columns else table.with_columns(pl.lit(False).alias(REMOVED))

    @property
    def described(self) -> Described:
        """What every item's text, categories and numbers are, by row."""
        return described(self.table)

    @property
    def removed(self) -> Tensor:
        """Whether an item was taken out of what may be recommended; bool."""
        return self.names.removed_V

    @cached_property
    def attributes(self) -> Attributes:
        """What requests may filter items by."""
        return Attributes(self._read(lambda name: name == CATEGORIES or name.startswith(ATTRIBUTE)))

    def __len__(self) -> int:
        return len(self.names)

    def _read(self, wanted: Collection[str] | Callable[[str], bool] = lambda name: True) -> pl.DataFrame:
        """The columns of these names that the items' table has."""
        chosen = wanted if callable(wanted) else wanted.__contains__
        with os.fdopen(os.dup(self._file), "rb") as file:
            return pl.read_parquet(file, columns=[*filter(chosen, pl.read_parquet_schema(file))])

    def told(self, row: int) -> dict[str, Any]:
        """All that the items' table says of one item."""
        with os.fdopen(os.dup(self._file), "rb") as file:
            return pl.scan_parquet(file).slice(row - FIRST_ITEM, 1).collect().row(0, named=True)

    @property
    def item_ids(self) -> Sequence[int | str]:
        """As in the input; entry i belongs to row FIRST_ITEM + i."""
        return self.names.item_ids

    @property
    def events(self) -> Tensor:
        """Training events of each item, float32."""
        return self.names.events_V

    def item_id(self, row: int) -> int | str:
        return self.item_ids[row - FIRST_ITEM]

    def title(self, row: int) -> str:
        """What an item is called: its id where it has no title."""
        return self.names.title(row - FIRST_ITEM)

    def by_id(self, item_id: int | str) -> int | None:
        """The row of an item id, as in the input or as text."""
        return self._rows_of_ids([item_id])[0]

    def by_title(self, title: int | str) -> int | None:
        """The row of a title as it stands, else without regard to case; of several items, the most popular."""
        line = self.names.of_title(str(title))
        return None if line is None else line + FIRST_ITEM

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
        found = self._rows_of_ids(words) if find == self.by_id else [*map(find, words)]
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
        mine = self.items.select("item_id", own=pl.col("row").cast(pl.Int64))
        if item_ids.equals(mine["item_id"], check_dtypes=True):
            return mine["own"]
        words = item_ids.alias("item_id").to_frame()
        if words.schema["item_id"] != mine.schema["item_id"]:
            words, mine = words.cast({"item_id": pl.String}), mine.cast({"item_id": pl.String})
        return words.join(mine, on="item_id", how="left", maintain_order="left")["own"]

    def denied_and_allowed(
        self, deny: Collection[int | str], allow: Collection[int | str] | None, unknown: list[int | str] | None = None
    ) -> tuple[list[int], list[int] | None]:
        """Item rows of both lists; an id that is no item is as in `rows`."""
        denied = self.rows(deny, self.by_id, unknown) if deny else []
        allowed = None if allow is None else [row for row in self.rows(allow, self.by_id, unknown) if row is not None]
        return [row for row in denied if row is not None], allowed

    def places(self, found: Iterable[tuple[int, float]], chances: Iterable[float] | None = None) -> list[dict[str, Any]]:
        """Item rows with their scores, and how probable each is, as the places of a list, ready for JSON."""
        told: list[dict[str, Any]] = [
            {"rank": rank, "item_id": self.item_id(row), "title": self.title(row), "score": score}
            for rank, (row, score) in enumerate(found, 1)
            if row != PADDING
        ]
        for item, chance in zip(told, chances or (), strict=False):
            item["probability"] = chance
        return told

    def _rows_of_ids(self, words: Sequence[int | str]) -> list[int | None]:
        return [None if line is None else line + FIRST_ITEM for line in self.names.of_ids([*map(str, words)])]

    @cached_property
    def _near(self) -> dict[str, str]:
        titles = map(self.names.title, range(min(len(self), NEAREST_AMONG)))
        return {title.casefold(): title for title in titles}
