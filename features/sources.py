"""Known public interaction sets: read a local copy, or download from the publisher with a checksum.

None of them is part of this project. MovieLens: research use, no redistribution, acknowledge GroupLens. Amazon reviews:
research use, no licence stated. Online Retail and BANKING77: CC BY 4.0. Financial PhraseBank: CC BY-NC-SA 3.0, for no
commercial use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import polars.selectors as cs

from features import readers
from features.download import Published, cache_folder, fetch
from features.schema import RawTables
from recsys.errors import DataError
from recsys.progress import Progress


@dataclasses.dataclass(frozen=True)
class Source:
    """A public interaction set: its files, and how they are read."""

    files: tuple[Published, ...]
    """What is downloaded; none: a folder must be named. Each SHA-256 was found on record in at least two independent public
    projects; for MovieLens they name it beside the MD5 that GroupLens publishes."""
    events: tuple[str, ...]
    """Names of the publisher's file of events, any of which, in a folder or in a zip there, can be read."""
    read: Callable[[Path], RawTables]
    """Reads the publisher's files in a folder."""
    columns: tuple[pl.Expr, ...]
    """The items' columns beside item_id, from those of a prepared copy."""


def read_source(name: str, data: Path | None = None, progress: Progress | None = None) -> RawTables:
    """Events (user_id, item_id, timestamp in seconds, order from 1 within the user), items (item_id, title, categories
    separated by |) and users of a public set; integers are Int64.

    `data` is a folder, or its parent, with either the publisher's files, zipped or not, or a prepared copy: events.parquet
    (user_id, item_id, timestamp, seq), items.parquet, users.parquet. None downloads, once, into the cache folder.
    Raises DataError: unknown name, nothing there to read, a wrong checksum, a broken file. SetupError: the publisher or an
    optional dependency is out of reach.
    """
    if name not in SOURCES:
        raise DataError(f"no public data set {name!r}: choose one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    folders = [cache_folder() / name] if data is None else [data, data / name]
    for file in source.files if data is None else ():
        fetch(file, folders[0], progress)
    for folder in folders:
        with _naming_broken_files(folder):
            if (folder / "events.parquet").is_file():
                return _read_prepared(folder, source)
            if any(readers.find(folder, file) for file in source.events):
                return source.read(folder)
    wanted = " or ".join((*source.events, "events.parquet"))
    remedy = "name the folder that holds one" + (", or no folder to download" if source.files else ", for it is not downloaded")
    raise DataError(f"{folders[0]}: no {wanted} there for {name}; {remedy}")


def _read_prepared(folder: Path, source: Source) -> RawTables:
    def scan(table: str) -> pl.LazyFrame:
        return pl.scan_parquet(folder / f"{table}.parquet").with_columns(cs.integer().cast(pl.Int64))

    events = scan("events").select("user_id", "item_id", "timestamp", order="seq")
    items = scan("items").select("item_id", *source.columns)
    users = scan("users") if (folder / "users.parquet").is_file() else None
    for table in (events, items):
        table.collect_schema()  # a missing column is an error here
    return RawTables(events, items, users)


BROKEN = (pl.exceptions.PolarsError, zipfile.BadZipFile, zlib.error, OSError, EOFError, LookupError, ValueError, SyntaxError)


@contextlib.contextmanager
def _naming_broken_files(folder: Path) -> Iterator[None]:
    """Turns the many errors of a broken or missing file into one DataError."""
    try:
        yield
    except BROKEN as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{folder}: a file is missing or broken: {type(error).__name__}: {reason}; get it again") from None


_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
SOURCES: dict[str, Source] = {
    "ml-1m": Source(
        (Published(f"{_GROUPLENS}/ml-1m.zip", 5_917_549, "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),),
        ("ratings.dat",),
        readers.read_ml_1m,
        (pl.col("title"), pl.col("genres").alias("categories")),
    ),
    "ml-100k": Source(
        (
            Published(
                f"{_GROUPLENS}/ml-100k.zip", 4_924_029, "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"
            ),
        ),
        ("u.data",),
        readers.read_ml_100k,
        (
            pl.format("{} ({})", "title", "release_year").fill_null(pl.col("title")).alias("title"),
            pl.col("genres").str.replace_all(" ", "|").alias("categories"),
        ),
    ),
    "amazon-beauty": Source(
        (
            Published(
                f"{_SNAP}/reviews_Beauty_5.json.gz",
                44_819_276,
                "e5925ec99023f1dc9c7d3dff7ef34cfeacd40d1b981b5525e1e4ba9c8abc18fe",
            ),
            Published(
                f"{_SNAP}/meta_Beauty.json.gz", 99_156_148, "c7977dc0e0ead14ac7df8c1c6de74da00e4bebfad87a0f0c5763d4c5bc9b53a0"
            ),
        ),
        ("reviews_Beauty_5.json.gz",),
        readers.read_amazon_beauty,
        (pl.col("title"), pl.col("category_id").cast(pl.String).alias("categories")),
    ),
    "online-retail": Source(
        (
            Published(
                "https://archive.ics.uci.edu/static/public/352/online+retail.zip",
                23_715_478,
                "f5385cbb54bbebf7196389109c6b0621faab0c304e3702548165e71c84aede8b",
            ),
        ),
        ("Online Retail.xlsx", "Online Retail.csv"),
        readers.read_online_retail,
        (pl.col("title"),),
    ),
    "banking77": Source((), ("queries.parquet", "train.csv"), readers.read_banking77, (pl.col("title"), pl.col("categories"))),
    "financial-phrasebank": Source(
        (),
        ("sentences.parquet", "Sentences_50Agree.txt"),
        readers.read_financial_phrasebank,
        (pl.col("title"), pl.col("sentiment"), pl.col("published"), pl.col("trade")),
    ),
}
"""Every public set by name."""
