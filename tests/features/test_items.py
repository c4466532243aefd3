"""Number columns: what their cells become, and which of them are refused in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.build import build
from features.dataset import Dataset
from features.items import describe
from features.schema import DataSettings
from recsys.config import Recipe
from recsys.errors import DataError

Build = Callable[..., Dataset]
EVENTS = pl.DataFrame({"user_id": [1, 2, 1, 2, 3], "item_id": [7, 7, 5, 3, 11], "timestamp": [13, 17, 19, 23, 29]})
IDS = [3, 5, 7]


def numbers(*columns: pl.Series) -> list[list[list[float | None]]]:
    """The numbers of three items with these columns, by column."""
    names = tuple(column.name for column in columns)
    table = describe(pl.DataFrame([pl.Series("item_id", IDS), *columns]), DataSettings(number_columns=names), "items")
    assert table.schema["numbers"] == pl.List(pl.Struct({"values": pl.List(pl.Float32)}))
    return [[cell["values"] for cell in cells] for cells in table["numbers"].to_list()]


CELLS: dict[str, tuple[pl.Series, list[list[float | None]]]] = {
    "whole": (pl.Series("price", [2, None, -5]), [[2], [], [-5]]),
    "not finite": (pl.Series("price", [2.5, math.nan, -math.inf]), [[2.5], [], []]),
    "text": (pl.Series("price", [" 2.5 ", "", None]), [[2.5], [], []]),
    "text of no number": (pl.Series("price", ["-3e2", "NaN", " "]), [[-300], [], []]),
    "yes or no": (pl.Series("new", [True, False, None]), [[1], [0], []]),
    "always missing": (pl.Series("price", [None, None, None]), [[]] * 3),
    "lists": (pl.Series("image", [[2, 3], None, [5, None]]), [[2, 3], [], [5, None]]),
    "lists with NaN": (pl.Series("image", [[2.5, math.nan], [math.inf, 3.5], None]), [[2.5, None], [None, 3.5], []]),
    "array": (pl.Series("image", [[2.5, 3.5], None, [5, None]], pl.Array(pl.Float64, 2)), [[2.5, 3.5], [], [5, None]]),
}


@pytest.mark.parametrize("case", CELLS)
def test_a_cell_is_its_numbers_and_nothing_where_one_is_missing_or_not_finite(case: str) -> None:
    column, wanted = CELLS[case]
    assert numbers(column) == [[cell] for cell in wanted]


def test_columns_stand_end_to_end_in_the_order_of_the_recipe() -> None:
    price, image = pl.Series("price", [2, None, 5]), pl.Series("image", [[7, 11, 13], None, [17, None, 19]])
    assert numbers(price, image) == [[[2], [7, 11, 13]], [[], []], [[5], [17, None, 19]]]
    assert numbers(image, price) == [[[7, 11, 13], [2]], [[], []], [[17, None, 19], [5]]]
    assert numbers() == [[]] * 3


WRONG: dict[str, tuple[pl.Series, str]] = {
    "lists of unequal length": (pl.Series("image", [[2], [3, 5], None]), "'image' hold 1 to 2 numbers"),
    "texts": (pl.Series("price", ["2", "cheap", "dear"]), "'price' holds 2 cells that are no numbers"),
    "texts in lists": (pl.Series("image", [["2", "x"], ["3", "5"], None]), "'image' holds 1 cells that are no numbers"),
    "bytes": (pl.Series("price", [b"2", None, b"5"]), "'price'"),
    "lists of lists": (pl.Series("image", [[[2]], [[3]], None]), "'image'"),
    "structs": (pl.Series("price", [{"cents": 2}, {"cents": 3}, None]), "'price'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_number_and_lists_of_unequal_length_are_refused_in_one_line(case: str) -> None:
    column, says = WRONG[case]
    with pytest.raises(DataError) as error:
        numbers(column)
    assert says in str(error.value)
    assert str(error.value).startswith("items: ")
    assert "\n" not in str(error.value)


def test_a_number_column_that_is_not_there_is_named(folder: Path, build_in: Build) -> None:
    with pytest.raises(DataError, match="no column 'prise'; did you mean 'price'"):
        build_in(folder, EVENTS, items=pl.DataFrame({"item_id": IDS, "price": [2, 3, 5]}), title="", number_columns=["prise"])


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_numbers_are_the_same_from_every_format(suffix: str, folder: Path, build_in: Build) -> None:
    items = pl.DataFrame({"item_id": IDS, "price": [2.5, None, -3.0], "year": [1999, 2003, None]})
    found = build_in(folder, EVENTS, items=items, suffix=suffix, title="", number_columns=["year", "price"])
    by_id = dict(zip(found.items["item_id"].to_list(), found.described.numbers, strict=True))
    assert by_id == {3: [[1999], [2.5]], 5: [[2003], []], 7: [[], [-3]], 11: []}


LATER: dict[str, Any] = {
    "known": [[5, 7, 11], [13, 17, 19]],
    "partly missing": [None, [13, None, 19]],
    "wholly missing": [None, None],
}


@pytest.mark.parametrize("case", LATER)
def test_appending_items_with_numbers_and_cold_ones_gives_the_files_of_building_at_once(
    case: str, folder: Path, build_in: Build
) -> None:
    image = pl.List(pl.Int64)
    first = pl.DataFrame({"item_id": [3, 5], "price": [2, None], "image": pl.Series([[2, 3, 5], None], dtype=image)})
    later = pl.DataFrame({"item_id": [7, 5], "price": [None, 3], "image": pl.Series(LATER[case], dtype=image)})
    sections: dict[str, Any] = {"title": "", "number_columns": ["price", "image"], "split": {"cold_one_in": 2}}
    once = build_in(folder, EVENTS, items=pl.concat([first, later]), **sections).manifest
    build_in(folder, EVENTS[:3], items=first, **sections)
    appended = build_in(folder, EVENTS[3:], items=later, append=True, **sections).manifest
    assert appended["hash"] == once["hash"]
    assert appended["warm_items"] == once["warm_items"]


def test_an_append_of_lists_of_another_length_is_refused(folder: Path, build_in: Build) -> None:
    tables = [pl.DataFrame({"item_id": [item], "image": [vector]}) for item, vector in ((3, [2, 3, 5]), (7, [7, 11]))]
    build_in(folder, EVENTS, items=tables[0], title="", number_columns=["image"])
    with pytest.raises(DataError, match="numbers"):
        build_in(
            folder, EVENTS[:1].with_columns(timestamp=31), items=tables[1], title="", number_columns=["image"], append=True
        )


def test_an_append_with_other_number_columns_is_refused(folder: Path, build_in: Build) -> None:
    items = pl.DataFrame({"item_id": IDS, "price": [2, 3, 5], "year": [1999, 2003, 2011]})
    build_in(folder, EVENTS, items=items, title="", number_columns=["price"])
    with pytest.raises(DataError, match=r"data\.number_columns = \['price'\], not \['price', 'year'\]"):
        build_in(folder, EVENTS, items=items, title="", number_columns=["price", "year"], append=True)


def test_the_manifest_counts_the_items_without_text(folder: Path) -> None:
    EVENTS.write_parquet(folder / "events.parquet")
    pl.DataFrame({"item_id": IDS, "title": ["c", " ", None], "kind": [None, "x", None]}).write_parquet(folder / "items.parquet")
    counts = [
        build(folder, Recipe("test", {"data": data}), folder / "out")["items_without_text"]
        for data in ({}, {"text_columns": ["kind", "title"]})
    ]
    assert counts == [3, 2]
