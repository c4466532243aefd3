"""Items added to a bundle, described anew or taken out, without training: a new version of the bundle, published at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars as pl
import torch

from features.dataset import described, write_parquet
from features.download import cache_folder
from features.files import read_items
from features.items import describe, read_attributes, read_table
from features.schema import POLICIES, DataSettings, Tally
from recsys.batch import FIRST_ITEM
from recsys.bundle import Directory, Writer, locked, open_directory
from recsys.content import CONTENT, ENCODER, Content, ContentEncoder
from recsys.errors import BundleError, DataError, RequestError
from recsys.model import ModelSettings, model_from
from recsys.progress import Count
from serving.catalogue import ITEMS, Catalogue
from serving.export import NOISY, measure_index, noisy
from serving.golden import renew
from serving.index import INDEX, Index, IndexSettings, Scan
from serving.names import NAMES, REMOVED, Names
from serving.vectors import LONGEST, VECTORS, read_vectors, write_vectors


def add(bundle: Path, items: pl.LazyFrame, out: Path | None = None, progress: Count | None = None) -> dict[str, Any]:
    """Add items, by the columns of the table that the model learnt from (`features.files.read_items` reads one from a file);
    an item that was removed comes back.

    Writes `out`, or `bundle` anew, whole or not at all; what has loaded the old one serves on. Returns the new manifest.
    Raises DataError: a bad or repeated row, a missing column, an item that is there already. BundleError: the model reads no
    descriptions.
    """
    return _change(bundle, out, items, "added", progress)


def update(bundle: Path, items: pl.LazyFrame, out: Path | None = None, progress: Count | None = None) -> dict[str, Any]:
    """Describe items anew. As `add`, but that an item which is not there is the error.

    A table that holds attributes alone gives items these, whatever the model reads, and changes nothing else.
    """
    return _change(bundle, out, items, "updated", progress)


def from_file(bundle: Path, verb: str, table: Path, out: Path | None = None, progress: Count | None = None) -> dict[str, Any]:
    """`add` or `update` the items of a file. Raises DataError: the file cannot be read as items."""
    settings = DataSettings(**open_directory(bundle, verify=False).manifest["recipe"].get(DataSettings.section, {}))
    change = {"add": add, "update": update}[verb]
    return change(bundle, read_items(table, settings, attributes=verb == "update"), out, progress)


def remove(bundle: Path, item_ids: Iterable[int | str], out: Path | None = None) -> dict[str, Any]:
    """Take items out of all lists; in histories they are still read. As `add`.

    Raises RequestError: no such item, or none would be left.
    """
    with opened(bundle) as directory:
        catalogue = Catalogue(directory.path / ITEMS)
        rows = catalogue.rows(item_ids, catalogue.by_id)
        gone = pl.int_range(pl.len()).is_in([row - FIRST_ITEM for row in rows if row is not None])
        table = catalogue.table.with_columns((pl.col(REMOVED) | gone).alias(REMOVED))
        known_V = model_from(directory).known_V
        if not bool((known_V & ~torch.tensor(table[REMOVED].to_numpy())[: len(known_V)]).any()):
            raise RequestError("no item that can be recommended would be left; leave some in")
        return _publish(directory, out or bundle, table, {}, {"removed": len(rows)})


def _change(bundle: Path, out: Path | None, raw: pl.LazyFrame, verb: str, progress: Count | None) -> dict[str, Any]:
    place = {"added": _placed_behind, "updated": _placed_among}[verb]
    with opened(bundle) as directory:
        catalogue = Catalogue(directory.path / ITEMS)
        settings = DataSettings(**directory.manifest["recipe"].get(DataSettings.section, {}))
        if verb == "updated" and settings.only_attributes(raw.collect_schema()):
            items = _read(raw, catalogue, settings, attributes=True)
            table = _joined(catalogue.table, items, place(catalogue, items), revived=False)
            return _publish(directory, out or bundle, table, {}, {verb: len(items)})
        if not ModelSettings(**directory.manifest["recipe"][ModelSettings.section]).described:
            raise BundleError(f"{bundle}: its model reads no descriptions of items; train it with model.text=pooled or both")
        items = _read(raw, catalogue, settings)
        lines = place(catalogue, items)
        encoder = ContentEncoder.load(directory.path / ENCODER)
        new = encoder.encode(described(items), cache_folder() / "text.sqlite", progress)
        content = Content.load(directory.path / CONTENT).with_lines(lines, new, encoder.text.contextual)
        events = [int(catalogue.events[line]) if line < len(catalogue) else 0 for line in lines]
        content = content.with_neighbours(lines, directory.manifest["items"], events, encoder.settings.neighbours)
        model = model_from(directory, content=content).eval()
        places = torch.tensor(lines, dtype=torch.int64)
        before_VE = read_vectors(directory.path)
        with torch.inference_mode():
            changed_NE = model.item_vectors(places)
        vectors_VE = torch.cat([before_VE, before_VE.new_zeros(len(content) - len(before_VE), before_VE.shape[1])])
        vectors_VE[places] = changed_NE
        searched = IndexSettings(**directory.manifest["recipe"][IndexSettings.section])
        shape = (len(before_VE), before_VE.shape[1])
        index = Index.load(directory.path / INDEX, directory.manifest["index"]["kind"], searched, shape)
        if bool((places < len(before_VE)).any()):
            index.refill(vectors_VE)
        else:
            index.append(vectors_VE[len(before_VE) :])
        writers: dict[str, Writer] = {
            CONTENT: content.save,
            VECTORS: partial(write_vectors, vectors_VE),
            INDEX: index.write,
        }
        known = new.some_V | (places < model.ids)
        counts = {verb: len(items), "unknown": int((~known).sum())}
        table = _joined(catalogue.table, items, lines, revived=verb == "added")
        found = {"index": _measured(index, vectors_VE, directory), LONGEST: Scan(vectors_VE).longest}
        return _publish(directory, out or bundle, table, writers, counts, found)


@contextmanager
def opened(bundle: Path) -> Iterator[Directory]:
    """The bundle, which no other change touches meanwhile."""
    open_directory(bundle, verify=False)  # before anything is written beside it
    with locked(bundle):
        directory = open_directory(bundle)
        if directory.manifest.get("kind") != "bundle":
            raise BundleError(f"{bundle}: holds a {directory.manifest.get('kind')}, not a bundle; export it first")
        yield directory


def _read(raw: pl.LazyFrame, catalogue: Catalogue, settings: DataSettings, attributes: bool = False) -> pl.DataFrame:
    """The items' ids and descriptions, or with `attributes` these alone; every bad or repeated row is an error."""
    where, known, tally = "items", catalogue.table.schema, Tally("items")
    rows, _ = read_table(raw, "item_id", known["item_id"], tally, where)
    for reason, count in tally.counts.items():
        raise DataError(f"{where}: {count} rows are bad, {reason}: {POLICIES[reason].meaning}; mend them")
    if not len(rows):
        raise DataError(f"{where}: the table has no rows; give at least one item")
    if attributes:
        names = [name for name in settings.attribute_columns if name in rows.columns]
        return rows.select("item_id", *read_attributes(rows, names, where, known))
    return describe(rows, settings, where, known)


def _placed_behind(catalogue: Catalogue, items: pl.DataFrame) -> list[int]:
    """A line for each new item: its own if it was removed, else behind the last."""
    lines, end = [], len(catalogue)
    for item_id in items["item_id"].to_list():
        row = catalogue.by_id(item_id)
        if row is not None and not catalogue.removed[row - FIRST_ITEM]:
            raise DataError(f"items: {item_id!r} is in the bundle already; leave it out, or update it")
        lines.append(end if row is None else row - FIRST_ITEM)
        end += row is None
    return lines


def _placed_among(catalogue: Catalogue, items: pl.DataFrame) -> list[int]:
    rows = [(item_id, catalogue.by_id(item_id)) for item_id in items["item_id"].to_list()]
    for item_id, row in rows:
        if row is None:
            raise DataError(f"items: {item_id!r} is not in the bundle; leave it out, or add it")
    return [row - FIRST_ITEM for _, row in rows if row is not None]


def _joined(table: pl.DataFrame, items: pl.DataFrame, lines: list[int], revived: bool) -> pl.DataFrame:
    """The items' table with new lines, which are live, and lines described anew."""
    rows = items.with_columns(
        pl.Series("row", lines, pl.Int32) + FIRST_ITEM, pl.lit(0, pl.Int64).alias("events"), pl.lit(False).alias(REMOVED)
    )
    table = table.cast({name: rows.schema[name] for name in items.columns if table.schema[name] == pl.Null})  # none had a value
    new, again = (
        rows.filter(part) for part in (pl.col("row") >= len(table) + FIRST_ITEM, pl.col("row") < len(table) + FIRST_ITEM)
    )
    if len(again):
        told = again.select("row", *items.columns[1:], *([REMOVED] if revived else []))
        table = table.update(told, on="row", how="left", include_nulls=True)
    if len(new):
        table = pl.concat([table, new.select(table.columns).cast(table.schema)])
    return table.sort("row")


def _measured(index: Index, vectors_VE: torch.Tensor, directory: Directory) -> dict[str, Any]:
    """What the index is said to find, measured again where it is not exact."""
    said: dict[str, Any] = directory.manifest["index"]
    if index.exact:
        return said
    recall, _ = measure_index(index, vectors_VE, noisy(vectors_VE))
    return {**said, **recall, "queries": NOISY}


def _publish(
    directory: Directory,
    out: Path,
    table: pl.DataFrame,
    writers: dict[str, Writer],
    counts: dict[str, int],
    found: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    items: dict[str, Writer] = {ITEMS: lambda path: write_parquet([table], table.schema, path), NAMES: Names.of(table).save}
    return renew(directory, out, {**items, **writers}, {**found, "changes": counts}).manifest
