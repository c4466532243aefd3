"""Events: every row is judged, bad ones are set aside, clean ones are sorted user by user, never all in memory at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from features.cells import read_id, read_order, read_time
from features.dataset import write_parquet
from features.files import readable
from features.parts import Engine, Part, Report, add_counts, divide
from features.schema import REASON, ROW, DataSettings, Tally, none_usable
from features.split import SplitSettings, split_ends

STRETCH, STRETCH_ROWS = 2**22, 2**15
"""Events that are sorted at once while they are read, and of a row group of them, the least that a part reads of a stretch."""
WHY = "#reason"
"""Name of a column of reasons, in no one's data."""
NOT_BAD = pl.lit(None, REASON)


def number(table: pl.LazyFrame) -> pl.LazyFrame:
    """With every row's number, from 1, in front."""
    return table.with_row_index(ROW, offset=1).with_columns(pl.col(ROW).cast(pl.Int64))


def judge(events: pl.LazyFrame, settings: DataSettings, ids: dict[str, pl.DataType], now: int, where: str) -> pl.LazyFrame:
    """Numbered events with their cells read, and the reason why a row is bad by itself, or null.

    Raises DataError: a column of a type that cannot be read.
    """
    raw = events.collect_schema()
    cells = {name: read_id(name, raw[name], where) for name in ids}
    cells["timestamp"] = read_time("timestamp", raw["timestamp"], settings.time_unit, where)
    if "order" in raw:
        cells["order"] = read_order("order", raw["order"], where)
    missing = {name: f"no {name}" for name in cells}
    read = number(events).select(  # a step of its own, so that a cell is read once and not in every condition
        ROW,
        *(cell.value.cast(ids.get(name, pl.Int64())).alias(name) for name, cell in cells.items()),
        *(cell.missing.alias(missing[name]) for name, cell in cells.items()),
    )
    conditions = {
        "null_id": pl.any_horizontal(missing[name] for name in ids),
        "wrong_type": pl.any_horizontal(pl.col(name).is_null() & ~pl.col(missing[name]) for name in cells),
        **({"missing_order": pl.col(missing["order"])} if "order" in cells else {"missing_time": pl.col(missing["timestamp"])}),
        "negative_time": pl.col("timestamp") < 0,
        "future_time": pl.col("timestamp") > now,
    }
    reasons = [pl.when(condition).then(pl.lit(reason, REASON)) for reason, condition in conditions.items()]
    return read.select(ROW, *cells, reason=pl.coalesce(*reasons, NOT_BAD))


def stage(judged: pl.LazyFrame, earlier: pl.LazyFrame | None, staged: Path, tally: Tally, where: str) -> pl.DataFrame:
    """Write the clean events, those of earlier builds numbered up to 0, in stretches that are each sorted by user.

    Returns number and reason of the bad ones. Raises DataError: there are no events, or none that is usable.
    """
    rows = [judged]
    if earlier is not None:
        events = earlier.select(pl.len()).collect().item()
        ids = (pl.col(name).cast(judged.collect_schema()[name]) for name in ("user_id", "item_id"))
        rows.insert(0, number(earlier).with_columns(pl.col(ROW) - events, *ids, reason=NOT_BAD))
    bad, read = [pl.DataFrame(schema={ROW: pl.Int64, "reason": REASON})], 0

    def put(batch: pl.DataFrame) -> None:
        nonlocal read
        read += len(batch.filter(pl.col(ROW) > 0))
        good = batch.filter(pl.col("reason").is_null()).drop("reason").sort("user_id")
        good.write_parquet(staged / f"{len(bad):06}.parquet", compression="lz4", row_group_size=STRETCH_ROWS)
        bad.append(batch.filter(pl.col("reason").is_not_null()).select(ROW, "reason"))

    staged.mkdir()
    with readable(where):
        pl.concat(rows).sink_batches(put, chunk_size=STRETCH)
    tally.read += read
    found = pl.concat(bad)
    if len(found) == read:
        raise none_usable(where, read, dict(found["reason"].cast(pl.String).value_counts().rows()))
    return found


def set_aside(table: pl.LazyFrame, bad: pl.DataFrame, tally: Tally, where: str) -> pl.DataFrame:
    """The raw rows that `bad` numbers, all cells as text, with their reason; counted.

    Raises DataError: there are some and the tally is strict.
    """
    if bad.is_empty():
        return pl.DataFrame()
    cells = [_text(name, dtype) for name, dtype in table.collect_schema().items()]
    chosen = number(table).join(bad.lazy().rename({"reason": WHY}), on=ROW)
    with readable(where):
        rows = chosen.select(ROW, *cells, reason=WHY).collect(engine="streaming").sort(ROW)
    for reason in rows["reason"].unique(maintain_order=True):
        found = rows.filter(pl.col("reason") == reason)
        tally.add(reason, len(found), found)
    return rows.select(pl.lit(tally.table).alias("table"), pl.col("reason").cast(pl.String), pl.exclude(ROW, "reason"))


@dataclass(frozen=True)
class Sorted:
    """What is told of a part that was sorted."""

    events: int
    """Those that were read."""
    counts: pl.DataFrame
    """item_id, and the counts of all its events and of those for training."""
    repeated: pl.DataFrame
    """Numbers of the events that are repeats."""
    repaired: dict[str, tuple[int, pl.DataFrame]]
    """By reason the count of repaired events, and the first of them."""


def arrange_part(part: Part, staged: Path, repeats: str, split: SplitSettings) -> tuple[pl.DataFrame, Sorted]:
    """The staged events of some users, sorted by user, then order or time, then as they came."""
    rows = part.of(pl.scan_parquet(staged / "*.parquet")).collect(engine="streaming")
    key = "order" if "order" in rows.columns else "timestamp"
    rows = rows.sort("user_id", key, ROW)
    later = rows.head(0)
    if repeats == "drop":
        rows, later = part_repeats(rows, key)
    times = fill_times(rows)
    repaired = {
        "unsorted": rows.filter(moved()),
        "filled_time": rows.filter(pl.col("timestamp").is_null()),
        "raised_time": rows.filter(times["timestamp"] > rows["timestamp"]),
    }
    firsts = {reason: (len(found), found.head(1)) for reason, found in repaired.items()}
    return rows.drop(ROW), Sorted(len(rows) + len(later), count_items(times, split), later.select(ROW), firsts)


def arrange(
    staged: Path, path: Path, repeats: str, split: SplitSettings, tally: Tally, report: Report, engine: Engine
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Write the staged events as one table, sorted by user, then order or time, then as they came.

    Returns for every item the count of all its events and of those for training, and number and reason of repeated events.
    """
    events = pl.scan_parquet(staged / "*.parquet")
    schema = {name: dtype for name, dtype in events.collect_schema().items() if name != ROW}
    work = partial(arrange_part, staged=staged, repeats=repeats, split=split)
    counts = count_items(pl.DataFrame(schema=schema), split)
    repeated: list[pl.DataFrame] = []
    repaired: list[dict[str, tuple[int, pl.DataFrame]]] = []

    def parts() -> Iterator[pl.DataFrame]:
        nonlocal counts
        for rows, told in engine(work, divide(events), staged):
            counts = add_counts(counts, told.counts, "item_id")
            repeated.append(told.repeated)
            repaired.append(told.repaired)
            yield rows
            report(told.events)

    write_parquet(parts(), schema, path)
    for reason, count in {"unsorted": tally.add, "filled_time": tally.settle, "raised_time": tally.settle}.items():
        count(reason, sum(part[reason][0] for part in repaired), pl.concat([part[reason][1] for part in repaired]))
    return counts, pl.concat(repeated).with_columns(reason=pl.lit("duplicate", REASON))


def part_repeats(events: pl.DataFrame, key: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Sorted events without those that agree with an earlier one in all columns but the number, and these."""
    same = pl.all_horizontal(pl.col(name).eq_missing(pl.col(name).shift()) for name in ("user_id", key)).fill_null(False)
    tied = events.filter(same | same.shift(-1, fill_value=False))  # few, so that few rows are hashed
    later = tied.filter(~pl.struct(pl.exclude(ROW)).is_first_distinct())
    return (events.join(later, on=ROW, how="anti", maintain_order="left") if len(later) else events), later


def moved() -> pl.Expr:
    """True for a sorted event that came after a later one of its user."""
    place = pl.col("user_id").rle_id().cast(pl.Int64) * 2**33 + pl.col(ROW)
    return place.cum_min(reverse=True) < place


def fill_times(events: pl.DataFrame) -> pl.DataFrame:
    """Sorted events with every time known and none before that of an earlier event of the user; 0 if the user has none."""
    if "order" not in events.columns:
        return events
    time = pl.col("timestamp").cum_max().forward_fill().backward_fill().over("user_id")
    return events.with_columns(time.fill_null(0))


def count_items(events: pl.DataFrame, split: SplitSettings) -> pl.DataFrame:
    """item_id, all (its events) and training (those in the training part), of events whose times are known."""
    train_end, *_ = split_ends(split)
    trained = events.group_by("user_id", maintain_order=True).agg(pl.col("item_id").head(train_end)).explode("item_id")
    training = trained.group_by("item_id").len("training")
    counts = events.group_by("item_id").len("all").join(training, on="item_id", how="left")
    return counts.with_columns(pl.col("all", "training").fill_null(0).cast(pl.Int64))


def _text(name: str, dtype: pl.DataType) -> pl.Expr:
    """A raw column as text, by a name that the quarantine's own columns leave free."""
    cell = pl.col(name)
    text = pl.struct(cell).struct.json_encode() if dtype.is_nested() else cell.cast(pl.String, strict=False)
    return text.alias(f"{name}_raw" if name in ("table", "reason") else name)
