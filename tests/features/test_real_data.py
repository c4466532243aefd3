"""Real data: histories and targets are those of the files' own order, for whoever has the files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from features.build import build
from features.dataset import Dataset
from recsys.config import Recipe

Build = Callable[..., Dataset]


@pytest.mark.parametrize("name", ["ml-100k", "ml-1m"])
def test_histories_and_targets_are_those_of_the_published_order(name: str, tmp_path: Path) -> None:
    place = Path(os.environ.get("RECSYS_DATA", ""), name, "events.parquet")
    if not place.is_file():
        pytest.skip(f"{name}: set RECSYS_DATA to a folder that holds {name}/events.parquet (user_id, item_id, timestamp, seq)")
    build(place.parent, Recipe("test", {"data": {"order": "seq"}}), tmp_path / "out", strict=True)
    found = Dataset.open(tmp_path / "out")
    raw = pl.read_parquet(place, columns=["user_id", "item_id", "timestamp", "seq"]).sort("user_id", "seq")
    want = raw.group_by("user_id", maintain_order=True).agg("item_id", "timestamp")
    items = dict(found.items.select("row", "item_id").rows())
    sequences = found.sequences
    assert found.user_ids.to_list() == want["user_id"].to_list()
    assert [items[row] for row in sequences.items.tolist()] == want["item_id"].explode().to_list()
    assert sequences.times.tolist() == want["timestamp"].explode().to_list()
    start, target, end = sequences.windows("test")
    assert bool((end - target == 1).all())
    assert (target - start).tolist() == (want["item_id"].list.len().cast(pl.Int64) - 1).to_list()
    targets = [items[row] for row in sequences.items[target.long()].tolist()]
    assert targets == want["item_id"].list.last().to_list()
    warm = raw.filter(pl.int_range(pl.len()).reverse().over("user_id") > 1).group_by("item_id").len()
    assert dict(found.items.filter(pl.col("events") > 0).select("item_id", "events").rows()) == dict(warm.rows())
