"""How raw cells are read: ids, times and orders of whatever type they were stored in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import polars as pl

from recsys.errors import DataError

TEXTS = (pl.String, pl.Categorical, pl.Enum)
ISO_FORMS = (
    "%Y-%m-%d",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f%#z",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%dT%H:%M%#z",
)
BASIC_DATE = r"^(19|20)\d{6}$"
"""ISO 8601 without dashes, 20111109; as seconds such a text would be a day of August 1970."""


@dataclass(frozen=True)
class Cell:
    """How a raw column is read; a cell that is not missing and has no value is of the wrong type."""

    value: pl.Expr
    missing: pl.Expr

    @property
    def wrong(self) -> pl.Expr:
        return self.value.is_null() & ~self.missing


def read_id(name: str, dtype: pl.DataType, where: str) -> Cell:
    """Int64 of a number without fraction, String of a text. Raises DataError: a column of another type."""
    cell = pl.col(name)
    if dtype.is_integer() or dtype == pl.Null:
        return Cell(cell.cast(pl.Int64, strict=False), cell.is_null())
    if dtype.is_float():
        whole = pl.when(cell == cell.floor()).then(cell).cast(pl.Int64, strict=False)
        return Cell(whole, cell.is_null() | cell.is_nan())
    if dtype in TEXTS:
        text = cell.cast(pl.String)
        return Cell(text, text.is_null() | (text.str.strip_chars() == ""))
    raise DataError(f"{where}: column {name} holds {dtype}; an id is an integer or a text")


def read_time(name: str, dtype: pl.DataType, unit: str, where: str) -> Cell:
    """Int64 seconds since 1970, rounded down. Raises DataError: a column of another type."""
    cell = pl.col(name)
    if dtype.is_temporal() and dtype not in (pl.Time, pl.Duration):
        return Cell(cell.cast(pl.Datetime("us")).dt.epoch("s"), cell.is_null())
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    if dtype.is_integer() or dtype == pl.Null:
        return Cell(cell.cast(pl.Int64, strict=False) // per_second, cell.is_null())
    if dtype.is_float():
        return Cell((cell / per_second).floor().cast(pl.Int64, strict=False), cell.is_null() | cell.is_nan())
    if dtype in TEXTS:
        text = cell.cast(pl.String).str.strip_chars()
        whole = text.cast(pl.Int64, strict=False) // per_second
        number = (text.cast(pl.Float64, strict=False) / per_second).floor().cast(pl.Int64, strict=False)
        iso = text.str.replace(r"^(\d{4}-\d{2}-\d{2}) +", "${1}T")
        dates = (iso.str.to_datetime(form, strict=False, time_unit="us").dt.epoch("s") for form in ISO_FORMS)
        day = pl.when(text.str.contains(BASIC_DATE)).then(text).str.to_datetime("%Y%m%d", strict=False, time_unit="us")
        return Cell(pl.coalesce(day.dt.epoch("s"), whole, number, *dates), text.is_null() | (text == ""))
    raise DataError(f"{where}: column {name} holds {dtype}; a time is a number, a date or ISO 8601 text")


def read_order(name: str, dtype: pl.DataType, where: str) -> Cell:
    """Int64. Raises DataError: a column of another type."""
    if dtype in TEXTS:
        text = pl.col(name).cast(pl.String).str.strip_chars()
        return Cell(text.cast(pl.Int64, strict=False), text.is_null() | (text == ""))
    if dtype.is_numeric() or dtype == pl.Null:
        return read_id(name, dtype, where)
    raise DataError(f"{where}: column {name} holds {dtype}; an order is an integer")


def id_type(name: str, schemas: Iterable[Mapping[str, pl.DataType]]) -> pl.DataType:
    """The one type of an id in all tables that have it: String if it is a text in any, else Int64."""
    return pl.String() if any(schema.get(name) in TEXTS for schema in schemas) else pl.Int64()
