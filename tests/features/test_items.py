"""Number columns and attributes: what their cells become, and which of them are refused in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.build import build
from features.dataset import ATTRIBUTE, LISTED, Dataset
from features.items import describe
from features.schema import DataSettings
from recsys.config import Recipe
from recsys.errors import DataError, RecipeError

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
    "texts": (pl.Series("price", ["2", "cheap", "dear"]), "'price' holds 2 cells that are no numbers, such as 'cheap'"),
    "texts in lists": (
        pl.Series("image", [["2", "x"], ["3", "5"], None]),
        "holds 1 cells that are no numbers, such as 'x'",
    ),
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


def attributes(*columns: pl.Series, known: dict[str, pl.DataType] | None = None) -> dict[str, pl.Series]:
    """These columns of three items as attributes, by name."""
    names = tuple(column.name for column in columns)
    before = {ATTRIBUTE + name: dtype for name, dtype in (known or {}).items()}
    settings = DataSettings(attribute_columns=names)
    table = describe(pl.DataFrame([pl.Series("item_id", IDS), *columns]), settings, "items", before)
    assert table.columns == [*LISTED, *(ATTRIBUTE + name for name in names)]
    return {name: table[ATTRIBUTE + name] for name in names}


TEXTS = pl.List(pl.String)
KEPT: dict[str, tuple[pl.Series, pl.DataType, list[Any]]] = {
    "true or false": (pl.Series("on", [True, None, False]), pl.Boolean(), [True, None, False]),
    "text of true or false": (pl.Series("on", [" True ", "", "false"]), pl.Boolean(), [True, None, False]),
    "whole numbers": (pl.Series("year", [1999, None, 2003]), pl.Float64(), [1999, None, 2003]),
    "numbers that are not finite": (pl.Series("price", [math.nan, math.inf, -2.5]), pl.Float64(), [None, None, -2.5]),
    "text of numbers": (pl.Series("price", [" 2.50", "-3e2", None]), pl.Float64(), [2.5, -300, None]),
    "text": (pl.Series("brand", [" Acme", "", "7"]), pl.String(), ["Acme", None, "7"]),
    "text of true and numbers": (pl.Series("brand", ["true", "7", "false"]), pl.String(), ["true", "7", "false"]),
    "categories of polars": (pl.Series("brand", ["Acme", None, "7"], pl.Categorical), pl.String(), ["Acme", None, "7"]),
    "lists of texts": (pl.Series("tags", [["a ", "", "b", "a"], None, []], TEXTS), TEXTS, [["a", "b"], None, []]),
    "missing": (pl.Series("later", [None, None, None]), pl.Null(), [None] * 3),
    "empty texts": (pl.Series("later", ["", " ", None]), pl.Null(), [None] * 3),
}


@pytest.mark.parametrize("case", KEPT)
def test_an_attribute_keeps_its_type_and_is_null_where_it_is_missing(case: str) -> None:
    column, dtype, wanted = KEPT[case]
    found = attributes(column)[column.name]
    assert found.dtype == dtype
    assert found.to_list() == wanted


@pytest.mark.parametrize(
    "column",
    [
        pl.Series("x", [date(2011, 3, 7), None, None]),
        pl.Series("x", [b"2", None, b"5"]),
        pl.Series("x", [{"cents": 2}, {"cents": 3}, None]),
        pl.Series("x", [[2], [3], None]),
        pl.Series("x", [["a", "b"], ["c", "d"], None], pl.Array(pl.String, 2)),
        pl.Series("x", [[["a"]], [[]], None]),
    ],
    ids=lambda column: str(column.dtype),
)
def test_an_attribute_of_another_type_is_refused_in_one_line(column: pl.Series) -> None:
    with pytest.raises(
        DataError, match=r"^items: column 'x' holds .*; an attribute holds true or false, numbers, texts"
    ) as error:
        attributes(column)
    assert "\n" not in str(error.value)


def test_text_is_read_as_the_items_before_and_what_is_of_another_type_is_refused() -> None:
    numerals = pl.Series("size", ["38", None, "40"])
    assert attributes(numerals)["size"].dtype == pl.Float64
    assert attributes(numerals, known={"size": pl.String()})["size"].to_list() == ["38", None, "40"]
    assert attributes(numerals, known={"size": pl.Null()})["size"].dtype == pl.Float64
    assert attributes(pl.Series("size", [None] * 3), known={"size": pl.String()})["size"].dtype == pl.Null
    for column, known, says in (
        (pl.Series("size", ["38", "XL", None]), pl.Float64(), "holds texts, for the items before numbers"),
        (pl.Series("size", ["true", "maybe", None]), pl.Boolean(), "holds texts, for the items before true or false"),
        (pl.Series("size", [0, 1, 1]), pl.Boolean(), "holds numbers, for the items before true or false"),
        (pl.Series("size", ["38", None, None]), TEXTS, "holds texts, for the items before lists of texts"),
    ):
        with pytest.raises(DataError, match=f"column 'size' {says}"):
            attributes(column, known={"size": known})


def test_an_attribute_that_is_not_there_or_has_no_table_is_named(folder: Path, build_in: Build) -> None:
    items = pl.DataFrame({"item_id": IDS, "in_stock": [True, False, None]})
    with pytest.raises(DataError, match="no column 'instock'; did you mean 'in_stock'"):
        build_in(folder, EVENTS, items=items, title="", attribute_columns=["instock"])
    with pytest.raises(DataError, match=r"there is none to hold data\.attribute_columns"):
        build_in(folder, EVENTS, attribute_columns=["in_stock"])


@pytest.mark.parametrize("names", [["price", "price"], ["price", "categories"]])
def test_an_attribute_has_one_name_and_not_that_of_the_categories(names: list[str]) -> None:
    with pytest.raises(RecipeError, match="attribute_columns are"):
        Recipe("test", {"data": {"attribute_columns": names}}).read(DataSettings)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_attributes_are_the_same_from_every_format_and_null_of_unlisted_items(
    suffix: str, folder: Path, build_in: Build
) -> None:
    items = pl.DataFrame({"item_id": IDS, "on": [True, None, False], "price": [2.5, 3, None], "brand": ["x", "y", None]})
    names = ["price", "on", "brand"]
    found = build_in(folder, EVENTS, items=items, suffix=suffix, title="", attribute_columns=names).items
    by_id = {row["item_id"]: [row[ATTRIBUTE + name] for name in names] for row in found.iter_rows(named=True)}
    assert by_id == {3: [2.5, True, "x"], 5: [3, None, "y"], 7: [None, False, None], 11: [None] * 3}
    plain = build_in(folder, EVENTS, items=items, suffix=suffix, title="").items
    assert plain.equals(found.select(plain.columns)), "nothing else changes, and without attributes there are no columns"


LATER_ON: dict[str, list[Any]] = {"known": [True, False], "partly missing": [None, True], "wholly missing": [None, None]}


@pytest.mark.parametrize("first", LATER_ON)
@pytest.mark.parametrize("later", LATER_ON)
def test_appending_items_with_attributes_gives_the_files_of_building_at_once(
    first: str, later: str, folder: Path, build_in: Build
) -> None:
    tables = [
        pl.DataFrame({"item_id": ids, "on": on, "tags": tags}, schema_overrides={"on": pl.Boolean, "tags": TEXTS})
        for ids, on, tags in (([3, 5], LATER_ON[first], [["a"], None]), ([7, 5], LATER_ON[later], [[], ["b", "a"]]))
    ]
    sections: dict[str, Any] = {"title": "", "attribute_columns": ["on", "tags"]}
    once = build_in(folder, EVENTS, items=pl.concat(tables), **sections).manifest
    build_in(folder, EVENTS[:3], items=tables[0], **sections)
    assert build_in(folder, EVENTS[3:], items=tables[1], append=True, **sections).manifest["hash"] == once["hash"]
    assert (
        build_in(folder, EVENTS[:1].with_columns(timestamp=31), append=True, **sections).items[ATTRIBUTE + "tags"].dtype
        == TEXTS
    )


def test_an_append_with_other_attributes_or_another_type_is_refused(folder: Path, build_in: Build) -> None:
    items = pl.DataFrame({"item_id": IDS, "price": [2, 3, 5], "brand": ["x", "y", "z"]})
    build_in(folder, EVENTS, items=items, title="", attribute_columns=["price"])
    with pytest.raises(DataError, match=r"data\.attribute_columns = \['price'\], not \['brand'\]"):
        build_in(folder, EVENTS, items=items, title="", attribute_columns=["brand"], append=True)
    with pytest.raises(DataError, match="column 'price' holds texts, for the items before numbers"):
        build_in(folder, EVENTS, items=items.with_columns(price="brand"), title="", attribute_columns=["price"], append=True)
