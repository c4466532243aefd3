"""From raw logs to a DATASET directory, published whole or not at all; and a data set split anew, without its raw logs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from features.cells import id_type
from features.dataset import MANIFEST, Dataset, write_parquet
from features.events import arrange, count_items, fill_times, judge, set_aside, stage
from features.files import read_files
from features.items import describe, make_catalogue, read_table, renew, require_widths
from features.parts import Engine, Report, add_counts, by_users, in_turn, summed
from features.schema import DataSettings, RawTables, Tally
from features.sequences import write_sequences
from features.split import SplitSettings, is_cold
from recsys.bundle import is_free, publish, told
from recsys.config import Recipe
from recsys.errors import DataError
from recsys.progress import Progress

TALLIES = {"events": "rows", "items": "item_rows", "users": "user_rows"}
"""What the manifest calls the account of a table's rows."""
LASTING = ("text_columns", "category_columns", "category_separator", "number_columns", "attribute_columns", "repeats")
"""Settings of section [data] that an append cannot change, for what they made of earlier rows is not kept."""
KEPT = ("events.parquet", "users.parquet", "quarantine.parquet")
"""Files that no split changes."""


def build(
    data: Path | None,
    recipe: Recipe,
    out: Path,
    *,
    append: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
    engine: Engine = in_turn,
) -> dict[str, Any]:
    """Build the DATASET `out` and return its manifest; with `append`, join `data` to the DATASET that is there.

    Appending gives the same files as building from all the data at once. Raises DataError: `data` cannot be read, holds
    nothing usable or, if `strict`, a single bad row; `out` is in the way. RecipeError: a wrong setting.
    """
    settings, split = recipe.read(DataSettings), recipe.read(SplitSettings)
    before = _open_earlier(out, settings) if append else None
    _require_place(out)
    raw = _read(data, settings, progress)
    if before is not None and ("order" in before.events.collect_schema()) != ("order" in raw.events.collect_schema()):
        raise DataError(f"{out}: was built {'without' if settings.order else 'with'} an order; append with the same data.order")
    with _workshop(out) as work:
        job = _Job(settings, split, before, work, str(data or settings.source), strict, progress, engine)
        head = {"recipe": recipe.name, "settings": {"data": settings.as_dict(), "split": split.as_dict()}}
        manifest = head | job.write(raw)
        writers = {path.name: partial(os.replace, path) for path in sorted(work.glob("*.parquet"))}
        return publish(out, writers, manifest, MANIFEST).manifest


def resplit(dataset: Dataset, split: SplitSettings, out: Path, progress: Progress | None = None) -> Dataset:
    """Publish at `out` the data set of the same events, items and users, split otherwise.

    Raises DataError: no event is for training, or `out` is in the way.
    """
    _require_place(out)
    old, events = dataset.manifest, dataset.manifest["events"]
    counts = count_items(dataset.events.head(0).collect(), split)
    for part in by_users(dataset.events, summed(progress, "events", events)):
        counts = add_counts(counts, count_items(fill_times(part), split), "item_id")
    tally, report = Tally.of("events", False, old["rows"]), summed(progress, "sequences", events)
    with _workshop(out) as work:
        counted = _write_histories(
            dataset.path / "events.parquet", counts, dataset.listed, work, split, tally, str(dataset.path), report
        )
        made = {path.name: partial(os.replace, path) for path in work.glob("*.parquet")}
        kept = {name: partial(shutil.copyfile, dataset.path / name) for name in KEPT if name in old["files"]}
        settings = {**old["settings"], SplitSettings.section: split.as_dict()}
        manifest = {**told(old), "settings": settings, **counted}
        return Dataset(out, publish(out, dict(sorted({**made, **kept}.items())), manifest, MANIFEST).manifest)


def _require_place(out: Path) -> None:
    """Raises DataError: `out` is there and neither a DATASET nor empty."""
    if not is_free(out, MANIFEST):
        raise DataError(f"{out}: exists and is no data set; name another directory")


@contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """A directory beside `out` that goes at the end. Raises DataError: none can be made."""
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); name another directory") from None
    try:
        yield work
    finally:
        shutil.rmtree(work)


def _read(data: Path | None, settings: DataSettings, progress: Progress | None) -> RawTables:
    if settings.source != "files":
        from features.sources import read_source

        return read_source(settings.source, data, progress)
    if data is None:
        raise DataError("no data folder: name one, or a public data set in data.source")
    return read_files(data, settings)


def _open_earlier(out: Path, settings: DataSettings) -> Dataset:
    before = Dataset.open(out)
    then, now = before.manifest["settings"]["data"], json.loads(json.dumps(settings.as_dict()))
    for key in LASTING:
        if then[key] != now[key]:
            raise DataError(f"{out}: was built with data.{key} = {then[key]!r}, not {now[key]!r}; append with the same")
    return before


@dataclass
class _Job:
    """One build: raw tables in, the DATASET's files into a work directory."""

    settings: DataSettings
    split: SplitSettings
    before: Dataset | None
    work: Path
    where: str
    strict: bool
    progress: Progress | None
    engine: Engine

    def __post_init__(self) -> None:
        reported = self.before.manifest if self.before else {}
        self.tallies = {table: Tally.of(table, self.strict, reported.get(key)) for table, key in TALLIES.items()}
        self.aside = [] if self.before is None or self.before.quarantine is None else [self.before.quarantine]

    def write(self, raw: RawTables) -> dict[str, Any]:
        """Write every table; returns what the manifest says of them."""
        earlier = self.before.events if self.before else None
        schemas = [table.collect_schema() for table in (raw.events, raw.items, raw.users, earlier) if table is not None]
        ids = {name: id_type(name, schemas) for name in ("user_id", "item_id")}
        listed = self._renew("items", raw.items, "item_id", ids)
        users = self._renew("users", raw.users, "user_id", ids)
        counts = self._write_events(raw.events, earlier, ids)
        if users is not None:
            put(users.sort("user_id"), self.work / "users.parquet")
        if any(len(rows) for rows in self.aside):
            put(_in_normal_form(self.aside), self.work / "quarantine.parquet")
        events = self.work / "events.parquet"
        report = summed(self.progress, "sequences", int(counts["all"].sum()))
        tally = self.tallies["events"]
        counted = _write_histories(events, counts, listed, self.work, self.split, tally, self.where, report, self.engine)
        return counted | {key: self.tallies[table].as_dict() for table, key in TALLIES.items()}

    def _renew(self, table: str, raw: pl.LazyFrame | None, name: str, ids: dict[str, pl.DataType]) -> pl.DataFrame | None:
        """The items or users of earlier builds with those of this one."""
        where, tally = f"{self.where}, {table}", self.tallies[table]
        old: pl.DataFrame | None = getattr(self.before, "listed" if table == "items" else "users", None)
        old = None if old is None else old.with_columns(pl.col(name).cast(ids[name]))
        if raw is None:
            if table == "items" and old is None and self.settings.attribute_columns:
                raise DataError(f"{where}: there is none to hold data.attribute_columns; set data.items, or leave them out")
            return old
        new, bad = read_table(raw, name, ids[name], tally, where)
        self.aside.append(bad)
        if table == "users":
            return renew(old, new, name, tally)
        items = renew(old, describe(new, self.settings, where, None if old is None else old.schema), name, tally)
        if self.settings.number_columns:
            cells = [items["numbers"].list.get(place, null_on_oob=True) for place in range(len(self.settings.number_columns))]
            require_widths([cell.struct.field("values") for cell in cells], self.settings, where)
        return items

    def _write_events(self, raw: pl.LazyFrame, earlier: pl.LazyFrame | None, ids: dict[str, pl.DataType]) -> pl.DataFrame:
        """Write the sorted events; returns the items' counts."""
        tally, staged = self.tallies["events"], self.work / "staged"
        judged = judge(raw, self.settings, ids, self.settings.now or int(time.time()), self.where)
        bad = stage(judged, earlier, staged, tally, self.where)
        self.aside.append(set_aside(raw, bad, tally, self.where))
        report = summed(self.progress, "events", pl.scan_parquet(staged / "*.parquet").select(pl.len()).collect().item())
        out, repeats = self.work / "events.parquet", self.settings.repeats
        counts, repeated = arrange(staged, out, repeats, self.split, tally, report, self.engine)
        shutil.rmtree(staged)
        self.aside.append(set_aside(raw, repeated, tally, self.where))
        return counts


def _write_histories(
    events: Path,
    counts: pl.DataFrame,
    listed: pl.DataFrame | None,
    work: Path,
    split: SplitSettings,
    tally: Tally,
    where: str,
    report: Report,
    engine: Engine = in_turn,
) -> dict[str, Any]:
    """Write the catalogue and the sequences of sorted events with these counts of items; returns what the manifest says.

    Raises DataError: no event is for training.
    """
    counts = counts.with_columns(training=pl.when(is_cold(counts["item_id"], split)).then(0).otherwise("training"))
    items = make_catalogue(listed, counts, tally)
    warm = (items["events"] > 0).sum()
    if not warm:
        raise DataError(
            f"{where}: no event is for training; set split.test_start to a time after the first events, "
            "or split.cold_one_in to 0"
        )
    put(items, work / "items.parquet")
    parts = write_sequences(events, work / "items.parquet", work / "sequences.parquet", split, report, engine)
    return {
        "users": pl.scan_parquet(work / "sequences.parquet").select(pl.len()).collect().item(),
        "events": sum(parts.values()),
        "items": len(items),
        "warm_items": warm,
        "items_without_text": (items["text"] == "").sum(),
        "counts": parts,
    }


def put(table: pl.DataFrame, path: Path) -> None:
    """Write one table."""
    write_parquet([table], table.schema, path)


def _in_normal_form(aside: list[pl.DataFrame]) -> pl.DataFrame:
    """The rows set aside, in an order that depends on what they hold alone, without columns that hold nothing."""
    rows = pl.concat([part for part in aside if len(part)], how="diagonal")
    filled = sorted(name for name in rows.columns[2:] if rows[name].null_count() < len(rows))
    return rows.select("table", "reason", *filled).sort(pl.all())
