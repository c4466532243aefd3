"""Which items may be recommended: deny and allow lists and conditions for the whole request, seen items for each history.

B histories · C candidates · V items of the index, whose lines count from 0 (line = row - FIRST_ITEM)
"""

from __future__ import annotations

import difflib
import math
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache, reduce
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from features.dataset import ATTRIBUTE
from recsys.batch import FIRST_ITEM, Batch
from recsys.config import nearest
from recsys.errors import RequestError

CATEGORIES = "categories"
MASKS = 32
"""Conditions of which it is kept which items meet them, a byte an item."""
VALUES = 1000
"""Most values of one condition."""
NEAREST_AMONG = 20_000
"""Categories of the most popular items among which near ones are looked for, in about .1 s."""


def allowed_lines(
    items: int, deny: Iterable[int] | Tensor = (), allow: Iterable[int] | None = None, *masks_V: Tensor | None
) -> Tensor | None:
    """Bool of shape V, True where an item may be recommended; None where nothing is restricted.

    Both lists name item rows; a row on both is denied; an empty allow list allows nothing. An item is allowed if every mask
    allows it (None: allows all).
    """
    masks = [mask_V for mask_V in masks_V if mask_V is not None]
    denied = _lines(items, deny)
    if allow is not None or len(denied):
        allowed_V = torch.full((items,), allow is None)
        if allow is not None:
            allowed_V[_lines(items, allow)] = True
        allowed_V[denied] = False
        masks.append(allowed_V)
    return reduce(torch.logical_and, masks) if masks else None


def _lines(items: int, rows: Iterable[int] | Tensor) -> Tensor:
    rows = rows.cpu() if isinstance(rows, Tensor) else torch.tensor([int(row) for row in rows], dtype=torch.int64)
    lines = rows - FIRST_ITEM
    return lines[(lines >= 0) & (lines < items)]


def until(histories: Batch, now_B: Tensor) -> Batch:
    """The histories as they stood at `now_B`, in seconds since 1970: later events are left out."""
    keep = histories.times <= (now_B if len(now_B) == 1 else now_B[histories.owners])
    if bool(keep.all()):
        return histories
    counts_B = torch.bincount(histories.owners[keep], minlength=len(histories))
    return Batch(histories.values[keep], torch.cat([counts_B.new_zeros(1), counts_B.cumsum(0)]), histories.times[keep])


class Range(NamedTuple):
    """Numbers from min to max, both among them."""

    min: float
    max: float


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value  # half a pair of UTF-16 is no text


HELD: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "Boolean": ("true or false", lambda value: isinstance(value, bool)),
    "Float64": ("numbers", _is_number),
    "String": ("texts", _is_text),
    "List(String)": ("texts", _is_text),
    "Null": ("no values", lambda value: isinstance(value, bool) or _is_number(value) or _is_text(value)),
}
"""What a column holds, by its type, and which values are of that type."""


class Attributes:
    """What items can be filtered by, from a table of one line an item; safe to share between threads.

    A condition is a value, a list of values of which an item has any, or of numbers `{"min": x, "max": y}`, one of which may
    be missing. An item without a value meets none.
    """

    def __init__(self, table: pl.DataFrame) -> None:
        attributes = {name.removeprefix(ATTRIBUTE): table[name] for name in table.columns if name.startswith(ATTRIBUTE)}
        self.columns = {CATEGORIES: table[CATEGORIES], **attributes}
        self._mask = lru_cache(MASKS)(self._compute)

    def meeting(self, where: Mapping[str, Any]) -> Tensor | None:
        """Whether each item meets all conditions, by name; bool. None: there is no condition.

        Raises RequestError: an unknown name or category, a value of another type, or a range that is none.
        """
        masks = [self._mask(name, self._condition(name, condition)) for name, condition in where.items()]
        return reduce(torch.logical_and, masks) if masks else None

    def read(self, words: Iterable[str]) -> dict[str, Any]:
        """Conditions written as NAME=VALUE, of numbers also NAME=MIN..MAX; of a name that comes again, any value will do.

        Raises RequestError: a word of another form, an unknown name, or a range beside other values.
        """
        where: dict[str, Any] = {}
        for word in words:
            name, equals, text = word.partition("=")
            if not equals:
                raise RequestError(f"where {word!r}: write NAME=VALUE")
            value = _read(text, str(self._column(name).dtype))
            if name in where and (isinstance(value, dict) or isinstance(where[name], dict)):
                raise RequestError(f"where {word!r}: {name!r} has a range and another value; give one range, or values alone")
            where[name] = value if isinstance(value, dict) else [*where.get(name, ()), value]
        return where

    def _column(self, name: str) -> pl.Series:
        if name not in self.columns:
            raise RequestError(f"where: items have no {reprlib.repr(name)}{nearest(name, list(self.columns))}")
        return self.columns[name]

    def _condition(self, name: str, condition: Any) -> Range | frozenset[Any]:
        """A condition in the form in which it is remembered, checked."""
        held, fits = HELD[str(self._column(name).dtype)]
        if isinstance(condition, Mapping):
            ends = {end: condition[end] for end in condition if condition[end] is not None}
            if held not in ("numbers", "no values"):
                raise RequestError(f"where: {name!r} holds {held}, which have no range; give one or a list of them")
            if not ends or not set(ends) <= set(Range._fields) or not all(_is_number(value) for value in ends.values()):
                raise RequestError(f"where: {name!r} is {reprlib.repr(dict(condition))}; give a range numbers as min and max")
            found = Range(float(ends.get("min", -math.inf)), float(ends.get("max", math.inf)))
            if found.min > found.max:
                raise RequestError(f"where: {name!r} has min {found.min:g} above max {found.max:g}; swap them")
            return found
        values = condition if isinstance(condition, list | tuple | set | frozenset) else [condition]
        if len(values) > VALUES:
            raise RequestError(f"where: {name!r} has {len(values)} values; give at most {VALUES}")
        for value in values:
            if not fits(value):
                hint = ", or a range" if held == "numbers" else ""
                raise RequestError(f"where: {name!r} holds {held}, found {reprlib.repr(value)}; give one or several{hint}")
            if name == CATEGORIES and value not in self._categories:
                near = difflib.get_close_matches(value, list(self._categories)[:NEAREST_AMONG], n=3)
                hint = f"nearest: {', '.join(map(repr, near))}" if near else "give one that an item has"
                raise RequestError(f"where: no item has category {reprlib.repr(value)}; {hint}")
        return frozenset(map(float, values) if held == "numbers" else values)

    def _compute(self, name: str, condition: Range | frozenset[Any]) -> Tensor:
        column = self.columns[name]
        if column.dtype == pl.Null:
            return torch.zeros(len(column), dtype=torch.bool)
        if isinstance(condition, Range):
            return torch.tensor(column.is_between(*condition).fill_null(False).to_numpy())
        flat = self._flat.get(name)
        if flat is None:
            any_of = pl.Series(list(condition), dtype=column.dtype)
            return torch.tensor(column.is_in(any_of.implode()).fill_null(False).to_numpy())
        met_V = torch.zeros(len(column), dtype=torch.bool)
        met_V[torch.tensor(flat.filter(pl.col("value").is_in(list(condition)))["line"].to_numpy())] = True
        return met_V

    @cached_property
    def _flat(self) -> dict[str, pl.DataFrame]:
        """Of columns of lists: every value and the line of its item."""
        lists = {name: column for name, column in self.columns.items() if isinstance(column.dtype, pl.List)}
        return {
            name: pl.DataFrame({"line": pl.arange(len(column), dtype=pl.Int64, eager=True), "value": column})
            .explode("value")
            .drop_nulls()
            for name, column in lists.items()
        }

    @cached_property
    def _categories(self) -> dict[str, None]:
        """Those that an item has, in the order of the items."""
        return dict.fromkeys(self._flat[CATEGORIES]["value"].unique(maintain_order=True))


def _read(text: str, dtype: str) -> Any:
    """A word of the command as a value of such a column; what is none stays text."""
    if dtype == "Boolean":
        return {"true": True, "false": False}.get(text.lower(), text)
    if dtype != "Float64":
        return text
    low, dots, high = text.partition("..")
    if dots:
        return {name: _read(end, dtype) for name, end in (("min", low), ("max", high)) if end}
    try:
        return float(text)
    except ValueError:
        return text
