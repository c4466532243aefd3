"""Nights for tests that need lists, made as the command makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from features.dataset import Dataset
from serving.engine import Recommender
from serving.intake import dataset_source
from serving.nightly import nightly
from serving.nights import LIVE, Night, Nights
from serving.shards import Terms


def score_all(
    recommender: Recommender, dataset: Dataset, folder: Path, k: int = 100, now: int | None = None, **said: Any
) -> Night:
    """The night of a data set, live in a folder."""
    return nightly(recommender, dataset_source(dataset.path), Nights(folder), Terms(k=k, now=now or 0), **said)


def lists_of(folder: Path) -> pl.DataFrame:
    """All live lists, by user and rank."""
    return pl.read_parquet(folder / LIVE / "lists-*.parquet").sort("user_id", "rank")
