"""Items and users: tables with one row per id, and the catalogue that gives every item its row."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import polars as pl
import polars.selectors as cs

from features.cells import TEXTS, read_id
from features.dataset import ATTRIBUTE
from features.events import number, set_aside
from features.files import readable
from features.schema import REASON, ROW, DataSettings, Tally, require
from recsys.batch import FIRST_ITEM
from recsys.errors import DataError

NO_CATEGORIES = pl.lit([], pl.List(pl.String))
NO_NUMBERS = pl.lit([], pl.List(pl.Struct({"values": pl.List(pl.Float32)})))


def read_table(
    table: pl.LazyFrame, name: str, dtype: pl.DataType, tally: Tally, where: str
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """A table with one row per id `name`, the last that was given, and the raw rows set aside.

    Raises DataError: a bad or repeated row and the tally is strict.
    """
    cell = read_id(name, table.collect_schema()[name], where)
    with readable(where):
        rows = number(table).with_columns(cell.value.cast(dtype).alias(name)).collect(engine="streaming")
        reason = pl.when(cell.missing).then(pl.lit("null_id", REASON)).when(cell.wrong).then(pl.lit("wrong_type", REASON))
        bad = number(table).select(ROW, reason=reason).filter(pl.col("reason").is_not_null()).collect(engine="streaming")
    tally.read += len(rows)
    aside = set_aside(table, bad, tally, where)
    rows = rows.join(bad, on=ROW, how="anti", maintain_order="left")
    repeated = rows.filter(~pl.col(name).is_last_distinct())
    tally.add("repeated_row", len(repeated), repeated)
    return rows.filter(pl.col(name).is_last_distinct()).drop(ROW), aside


def renew(old: pl.DataFrame | None, new: pl.DataFrame, name: str, tally: Tally) -> pl.DataFrame:
    """Rows of an earlier build with those of this one, which replace them where the id is the same."""
    if old is None:
        return new
    rows = pl.concat([old, new], how="diagonal_relaxed")
    kept = rows.unique(name, keep="last", maintain_order=True)
    if len(kept) < len(rows):  # not a fault: a newer table states its items again
        tally.counts["repeated_row"] = tally.counts.get("repeated_row", 0) + len(rows) - len(kept)
    return kept


def describe(
    items: pl.DataFrame, settings: DataSettings, where: str, known: Mapping[str, pl.DataType] | None = None
) -> pl.DataFrame:
    """item_id, title, text, categories, numbers and attributes of an items table.

    Raises DataError: a column is missing, or one of number_columns or attribute_columns holds something else.
    """
    require((*settings.text_columns, *settings.category_columns, *settings.number_columns), items.columns, where)
    title = _text(items, "title") if settings.title and "title" in items.columns else pl.lit("")
    texts = {name: _text(items, name) for name in settings.text_columns}
    named = [pl.when(text != "").then(pl.lit(f"{name}: ") + text) for name, text in texts.items()]
    return items.select(
        "item_id",
        title=title,
        text=pl.concat_str(named, separator="; ", ignore_nulls=True) if named else title,
        categories=_categories(items, settings),
        numbers=_numbers(items, settings, where),
    ).with_columns(read_attributes(items, settings.attribute_columns, where, known))


def read_attributes(
    items: pl.DataFrame, names: Collection[str], where: str, known: Mapping[str, pl.DataType] | None = None
) -> list[pl.Series]:
    """Columns as they are kept to filter by: Boolean, Float64, String, lists of String, or Null where no item has a value.

    `known` has the types of the items before, which text is read as; without one, text that is all numbers, or all true or
    false, is read so. Raises DataError: a column is missing, or of another type.
    """
    require(names, items.columns, where)
    return [_attribute(items[name].alias(ATTRIBUTE + name), name, where, known or {}) for name in names]


def make_catalogue(listed: pl.DataFrame | None, counts: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Every item that is listed or has events, by row: training events descending, ties by item id.

    Raises DataError: an event's item is not listed, though there is a list, and the tally is strict.
    """
    nothing = {"title": pl.lit(None, pl.String), "text": pl.lit(""), "categories": NO_CATEGORIES, "numbers": NO_NUMBERS}
    unknown = counts.select("item_id", **nothing)
    unlisted = counts.head(0) if listed is None else counts.join(listed, on="item_id", how="anti").sort("item_id")
    tally.settle("unknown_item", int(unlisted["all"].sum()), unlisted.select("item_id"))
    rows = (unknown if listed is None else listed).join(counts, on="item_id", how="full", coalesce=True).sort("item_id")
    rows = rows.with_columns(pl.col("training").fill_null(0)).sort("training", descending=True, maintain_order=True)
    items = rows.select(
        pl.int_range(FIRST_ITEM, pl.len() + FIRST_ITEM, dtype=pl.Int32).alias("row"),
        "item_id",
        "title",
        pl.col("text").fill_null(""),
        pl.col("categories").fill_null(NO_CATEGORIES),
        pl.col("numbers").fill_null(NO_NUMBERS),
        pl.col("training").alias("events"),
        cs.starts_with(ATTRIBUTE),
    )
    missing = [name for name in items.columns if name.startswith(ATTRIBUTE) and items[name].null_count() == len(items)]
    return items.cast(dict.fromkeys(missing, pl.Null))  # a type that no value shows is not kept, as if it had never been one


def _text(items: pl.DataFrame, name: str) -> pl.Expr:
    """A column as stripped text, empty where it has no value; a list is joined by commas."""
    cell = pl.col(name)
    text = cell.cast(pl.List(pl.String)).list.join(", ", ignore_nulls=True) if _is_list(items, name) else cell.cast(pl.String)
    return text.str.strip_chars().fill_null("")


def _categories(items: pl.DataFrame, settings: DataSettings) -> pl.Expr:
    columns = []
    for name in settings.category_columns:
        if _is_list(items, name):
            column = pl.col(name).cast(pl.List(pl.String))
        elif settings.category_separator:
            column = pl.col(name).cast(pl.String).str.split(settings.category_separator)
        else:
            column = pl.concat_list(pl.col(name).cast(pl.String))
        columns.append(column.fill_null(NO_CATEGORIES))
    if not columns:
        return NO_CATEGORIES
    value = pl.element().str.strip_chars()
    return pl.concat_list(columns).list.eval(value.filter(value != "").unique(maintain_order=True))


def _numbers(items: pl.DataFrame, settings: DataSettings, where: str) -> pl.Expr | pl.Series:
    """The values of each number column, Float32: none where a cell is missing, null where a number is missing or not finite."""
    parts = []
    for name in settings.number_columns:
        column = items[name].arr.to_list() if isinstance(items[name].dtype, pl.Array) else items[name]
        inner = column.dtype.inner if isinstance(column.dtype, pl.List) else column.dtype
        if not (inner.is_numeric() or inner in (*TEXTS, pl.Null, pl.Boolean)):
            raise DataError(f"{where}: column {name!r} holds {column.dtype}; a cell of it is a number or a list of numbers")
        if column.dtype in TEXTS:  # of a file without types
            column = column.cast(pl.String).str.strip_chars().replace("", None)
        cells = column if isinstance(column.dtype, pl.List) else column.to_frame().select(pl.concat_list(name)).to_series()
        cells = cells.cast(pl.List(inner))
        numbers = cells.cast(pl.List(pl.Float32), strict=False)
        wrong = cells.explode().filter(numbers.explode().is_null() & cells.explode().is_not_null())
        if len(wrong):
            what = f"{len(wrong)} cells that are no numbers, such as {wrong[0]!r}"
            raise DataError(f"{where}: column {name!r} holds {what}; mend them, or leave it out")
        numbers = numbers.list.eval(pl.when(pl.element().is_finite()).then(pl.element()))
        missing = numbers.list.drop_nulls().list.len().fill_null(0) == 0
        some = pl.select(pl.when(missing).then(pl.lit([], numbers.dtype)).otherwise(numbers).alias("values")).to_series()
        parts.append(some)
    require_widths(parts, settings, where)
    if not parts:
        return NO_NUMBERS
    return pl.select(pl.concat_list([pl.struct(part) for part in parts])).to_series()


KINDS: dict[pl.DataType, str] = {
    pl.Boolean(): "true or false",
    pl.Float64(): "numbers",
    pl.String(): "texts",
    pl.List(pl.String): "lists of texts",
}
"""What an attribute may be, and how it is called."""


def _attribute(cells: pl.Series, name: str, where: str, known: Mapping[str, pl.DataType]) -> pl.Series:
    dtype, wanted = cells.dtype, known.get(cells.name, pl.Null())
    if dtype in TEXTS:
        text = cells.cast(pl.String).str.strip_chars().replace("", None)
        kinds = (pl.Boolean(), pl.Float64(), pl.String()) if wanted == pl.Null else (wanted,)
        readings = {kind: _read_text(text, kind) for kind in kinds if kind != pl.List(pl.String)}
        whole = [kind for kind, cells in readings.items() if cells.null_count() == text.null_count()]
        cells = readings[whole[0]] if whole else text
    elif isinstance(dtype, pl.List) and dtype.inner in (*TEXTS, pl.Null):
        value = pl.element().str.strip_chars()
        lists = cells.cast(pl.List(pl.String))
        cells = lists.list.eval(value.filter(value != "").unique(maintain_order=True))
    elif dtype.is_numeric():
        cells = cells.cast(pl.Float64)
    elif dtype not in (pl.Boolean, pl.Null):
        raise DataError(f"{where}: column {name!r} holds {dtype}; an attribute holds {', '.join(KINDS.values())}")
    if cells.dtype == pl.Float64:
        cells = pl.select(pl.when(cells.is_finite()).then(cells).alias(cells.name)).to_series()
    if cells.null_count() == len(cells):
        return cells.cast(pl.Null)
    if wanted not in (pl.Null, cells.dtype):
        found = f"{KINDS[cells.dtype]}, for the items before {KINDS[wanted]}"
        raise DataError(f"{where}: column {name!r} holds {found}; mend it")
    return cells


def _read_text(text: pl.Series, kind: pl.DataType) -> pl.Series:
    """Stripped text as an attribute of this kind; null where it is none."""
    if kind == pl.Boolean:
        return text.str.to_lowercase().replace_strict({"true": True, "false": False}, default=None, return_dtype=pl.Boolean)
    return text.cast(kind, strict=False)


def require_widths(parts: list[pl.Series], settings: DataSettings, where: str) -> None:
    """Raises DataError: the cells of a number column hold different counts of numbers."""
    for name, part in zip(settings.number_columns, parts, strict=True):
        widths = sorted(set(part.list.len().unique().to_list()) - {0, None})
        if len(widths) > 1:
            raise DataError(f"{where}: cells of column {name!r} hold {widths[0]} to {widths[-1]} numbers; give always as many")


def _is_list(items: pl.DataFrame, name: str) -> bool:
    return isinstance(items.schema[name], pl.List)
