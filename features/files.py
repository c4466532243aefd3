"""Raw tables from files: CSV, Parquet or JSON lines; one file, many by a glob, or a folder."""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import polars as pl

from features.schema import DataSettings, RawTables, require
from recsys.errors import DataError

FORMATS: dict[str, Callable[[Path], pl.LazyFrame]] = {
    ".csv": partial(pl.scan_csv, infer_schema=False),
    ".tsv": partial(pl.scan_csv, infer_schema=False, separator="\t"),
    ".parquet": pl.scan_parquet,
    ".jsonl": partial(pl.scan_ndjson, infer_schema_length=None),
    ".ndjson": partial(pl.scan_ndjson, infer_schema_length=None),
}
"""How a file is scanned, by its suffix; the text formats may also be packed (.csv.gz)."""
EVENT_COLUMNS = ("user_id", "item_id", "timestamp", "order")


def read_files(data: Path, settings: DataSettings) -> RawTables:
    """The tables that the settings name, columns renamed to the canonical ones.

    Raises DataError: no such file, an unreadable or empty one, or a missing column (the nearest is named).
    """
    folder, events = (data.parent, data.name) if data.is_file() else (data, settings.events)
    names = {name: column for name in EVENT_COLUMNS if (column := getattr(settings, name))}
    paths = find_files(folder, events)
    if not paths:
        raise DataError(f"{folder}: no file matches {events!r} ({_seen(folder)}); set data.events to the events' path or glob")
    table = _read(paths, names, EVENT_COLUMNS)
    if not settings.timestamp:
        table = table.with_columns(timestamp=pl.lit(None, pl.Int64))
    items = _read_side(folder, settings.items, "items", {"item_id": settings.item_id})
    users = _read_side(folder, settings.users, "users", {"user_id": settings.user_id})
    return RawTables(table, None if items is None else _titled(items, settings, f"{folder}, items"), users)


def read_items(path: Path, settings: DataSettings, *, attributes: bool = False) -> pl.LazyFrame:
    """An items table by itself, with the columns that the settings name; those of a public set have the canonical names.

    With `attributes` it may hold these alone. Raises DataError: no such file, of no known format, or a missing column.
    """
    if not path.is_file() or file_format(path) not in FORMATS:
        raise DataError(f"{path}: is no file of items; give one of {', '.join(FORMATS)}")
    item_id = settings.item_id if settings.source == "files" else "item_id"
    items = _read([path], {"item_id": item_id})
    untitled = settings.source != "files" or (attributes and settings.only_attributes(items.collect_schema()))
    return items if untitled else _titled(items, settings, str(path))


def _titled(items: pl.LazyFrame, settings: DataSettings, where: str) -> pl.LazyFrame:
    """The items with the column that is their title under that name. Raises DataError: it is not there."""
    if not settings.title:
        return items
    require([settings.title], items.collect_schema(), where)
    return items.with_columns(title=pl.col(settings.title))


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Files of a known format that match a path, glob or folder below `folder`, in the order of their names."""
    found: list[Path] = []
    for match in sorted(Path(match) for match in glob.glob(pattern, root_dir=folder, recursive=True)):
        place = folder / match
        found += sorted(place.rglob("*")) if place.is_dir() else [place]
    return [path for path in found if path.is_file() and file_format(path) in FORMATS]


def file_format(path: Path) -> str:
    """The suffix that says how to read a file; that of a packed one is what stands before `.gz` or `.zst`."""
    packed = path.suffix in (".gz", ".zst")
    return (path.with_suffix("") if packed else path).suffix.lower()


@contextmanager
def readable(where: object) -> Iterator[None]:
    """Turn what polars cannot read into one line. Raises DataError."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise DataError(f"{where}: cannot be read: {reason}; mend or remove the file") from None


def _read_side(folder: Path, pattern: str, name: str, names: dict[str, str]) -> pl.LazyFrame | None:
    paths = find_files(folder, pattern or f"{name}.*")
    if pattern and not paths:
        raise DataError(f"{folder}: no file matches {pattern!r} ({_seen(folder)}); set data.{name} to its path or leave it out")
    return _read(paths, names) if paths else None


def _read(paths: list[Path], names: dict[str, str], canonical: Collection[str] = ()) -> pl.LazyFrame:
    """One table of all files, `names` first; another column that bears one of them, or of `canonical`, gets `_raw` behind it.

    Raises DataError: they differ in the type of a column of `names`.
    """
    tables = [_scan(path, names) for path in paths]
    schemas = [table.collect_schema() for table in tables]
    for column in names.values():
        kinds = [_kind(schema[column]) for schema in schemas]
        for path, schema, kind in zip(paths, schemas, kinds, strict=True):
            if kind != kinds[0] and None not in (kind, kinds[0]):
                raise DataError(
                    f"{path}: column {column!r} holds {schema[column]}, but {schemas[0][column]} in {paths[0].name}; "
                    "store one type in all files"
                )
    with readable(paths[0].parent):
        table = pl.concat(tables, how="diagonal_relaxed")
        known = table.collect_schema()  # columns that cannot be one are an error here
    others = [name for name in known if name not in names.values()]
    spare = [pl.col(name).alias(f"{name}_raw" if name in {*names, *canonical} else name) for name in others]
    return table.select(*(pl.col(column).alias(name) for name, column in names.items()), *spare)


def _scan(path: Path, names: dict[str, str]) -> pl.LazyFrame:
    with readable(path):
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty; remove it or write it again")
        table = FORMATS[file_format(path)](path)
        known = table.collect_schema().names()
    require(names.values(), known, str(path))
    if file_format(path) in (".csv", ".tsv"):  # without types
        table = _typed(table, [column for name, column in names.items() if name.endswith("_id")], path)
    return table


def _typed(table: pl.LazyFrame, ids: list[str], path: Path) -> pl.LazyFrame:
    """Ids of a file without types become integers where every one of them reads as it would be written; none is empty."""
    cell = pl.col(ids)
    table = table.with_columns(pl.when(cell != "").then(cell).name.keep())
    same = cell.cast(pl.Int64, strict=False).cast(pl.String).eq_missing(cell)
    with readable(path):
        numbers = table.select(same.all()).collect(engine="streaming").row(0)
    return table.cast({column: pl.Int64 for column, whole in zip(ids, numbers, strict=True) if whole})


def _kind(dtype: pl.DataType) -> str | None:
    """What may be mixed in one column; integers and texts may: together they are texts, which read the same."""
    if dtype == pl.Null:
        return None
    return "integer" if dtype.is_integer() or dtype == pl.String else str(dtype)


def _seen(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    names = sorted(path.name for path in folder.iterdir())
    return f"it holds {', '.join(names[:8])}{' …' if len(names) > 8 else ''}" if names else "it is empty"
