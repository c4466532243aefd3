"""Cells: whatever type a column was stored in, an id, a time and an order read the same."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.cells import Cell, read_id, read_order, read_time
from recsys.errors import DataError

WRONG = "wrong"
EAST = timezone(timedelta(hours=5, minutes=30))


def read(column: pl.Series, cell: Cell) -> list[Any]:
    """Values, None where missing, WRONG where they cannot be read."""
    rows = column.to_frame().select(value=cell.value, missing=cell.missing, wrong=cell.wrong).rows()
    assert not any(missing and wrong for _, missing, wrong in rows)
    return [WRONG if wrong else None if missing else value for value, missing, wrong in rows]


def times(values: list[Any], dtype: Any = None, unit: str = "s") -> list[Any]:
    column = pl.Series("t", values, dtype, strict=False)
    return read(column, read_time("t", column.dtype, unit, "here"))


@given(st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1)))
def test_a_time_is_the_same_number_date_or_text(moment: datetime) -> None:
    seconds = (moment - datetime(1970, 1, 1)) // timedelta(seconds=1)
    micros = (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1)
    zoned = moment.replace(tzinfo=UTC)
    texts = [
        moment.isoformat(),
        moment.isoformat(sep=" "),
        zoned.isoformat(),
        zoned.astimezone(EAST).isoformat(sep=" "),
        f" {moment.isoformat()}Z",
        *([] if len(str(seconds)) == 8 else [str(seconds)]),  # eight digits may be a date
    ]
    assert times(texts) == [seconds] * len(texts)
    assert times([moment]) == times([zoned]) == times([seconds]) == times([float(seconds)]) == [seconds]
    assert times([micros], unit="us") == times([micros // 1000], unit="ms") == times([str(micros)], unit="us") == [seconds]
    assert times([micros * 1000], unit="ns") == [seconds]


def test_a_day_is_its_first_second() -> None:
    assert times([date(2020, 1, 2)]) == times(["2020-01-02"]) == times(["20200102"]) == [1_577_923_200]
    assert times(["2020-01-02 00:07", "2020-01-02T01:07+01:00"]) == [1_577_923_620] * 2
    assert times(["20201302"]) == [20_201_302]  # no date, so a number


def test_a_time_is_rounded_down() -> None:
    assert times([-1, 1999], unit="ms") == [-1, 1]
    assert times([-0.5, 1.9]) == [-1, 1]
    assert times([datetime(1969, 12, 31, 23, 59, 59, 500_000)]) == [-1]


def test_what_is_no_time_is_wrong_and_what_is_empty_is_missing() -> None:
    assert times(["yesterday", "2020-13-01", "nan", "", None]) == [WRONG, WRONG, WRONG, None, None]
    assert times([float("inf"), float("nan"), None]) == [WRONG, None, None]


def test_an_id_is_a_whole_number_or_a_text() -> None:
    def ids(values: list[Any], dtype: Any = None) -> list[Any]:
        column = pl.Series("id", values, dtype)
        return read(column, read_id("id", column.dtype, "here"))

    assert ids([3, None]) == [3, None]
    assert ids([3.0, 3.5, float("nan"), float("inf"), None]) == [3, WRONG, None, WRONG, None]
    assert ids([2**63], pl.UInt64) == [WRONG]
    assert ids(["007", " ", "", None]) == ["007", None, None, None]
    assert ids(["b", None], pl.Categorical) == ["b", None]
    assert ids([None]) == [None]


def test_an_order_is_a_whole_number_or_its_text() -> None:
    def orders(values: list[Any]) -> list[Any]:
        column = pl.Series("order", values)
        return read(column, read_order("order", column.dtype, "here"))

    assert orders([5, None]) == [5, None]
    assert orders(["5", "five", "", None]) == [5, WRONG, None, None]


@pytest.mark.parametrize(
    "read_cell", [lambda *a: read_id(*a), lambda n, d, w: read_time(n, d, "s", w), lambda *a: read_order(*a)]
)
def test_a_column_of_lists_is_refused_by_name(read_cell: Any) -> None:
    with pytest.raises(DataError, match=r"events\.parquet: column x holds List"):
        read_cell("x", pl.List(pl.Int64), "events.parquet")
