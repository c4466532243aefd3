"""What the tests of data sets share: writing raw tables and building from them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.build import build
from features.dataset import Dataset
from features.parts import Engine, in_turn
from recsys.config import Recipe

NOW = 2_000_000_000
"""Seconds; the tests' clock."""

Build = Callable[..., Dataset]
WRITERS: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    ".parquet": lambda table, path: table.write_parquet(path),
    ".csv": lambda table, path: table.write_csv(path),
    ".jsonl": lambda table, path: table.write_ndjson(path),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder that goes with the test."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.fixture(scope="session")
def build_in() -> Build:
    """build_in(folder, events, items=…, users=…, append=…, strict=…, engine=…, **sections) → Dataset, in folder/"out"."""

    def build_from(
        folder: Path,
        *events: pl.DataFrame,
        items: pl.DataFrame | None = None,
        users: pl.DataFrame | None = None,
        append: bool = False,
        strict: bool = False,
        engine: Engine = in_turn,
        suffix: str = ".parquet",
        split: dict[str, Any] | None = None,
        **data: Any,
    ) -> Dataset:
        raw = Path(tempfile.mkdtemp(dir=folder))
        tables = {f"events-{part}": table for part, table in enumerate(events)} | {"items": items, "users": users}
        for name, table in tables.items():
            if table is not None:
                WRITERS[suffix](table, raw / f"{name}{suffix}")
        recipe = Recipe("test", {"data": {"now": NOW, **data}, "split": split or {}})
        build(raw, recipe, folder / "out", append=append, strict=strict, engine=engine)
        return Dataset.open(folder / "out")

    return build_from
