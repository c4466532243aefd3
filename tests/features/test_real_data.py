"""Real data: histories and targets are those of the files' own order, for whoever has the files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from features.build import build
from features.dataset import ATTRIBUTE, Dataset
from recsys.batch import FIRST_ITEM
from recsys.config import Recipe, load_recipe

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


def built(name: str, file: str, recipe: str, out: Path) -> Dataset:
    """The data set that a shipped recipe makes of a public set, if that is there."""
    place = Path(os.environ.get("RECSYS_DATA", ""), name, file)
    if not place.is_file():
        pytest.skip(f"{name}: set RECSYS_DATA to a folder that holds {name}/{file}")
    build(place.parent, load_recipe(recipe, Path(__file__).parents[2] / "training" / "recipes"), out, strict=True)
    return Dataset.open(out)


def test_a_test_message_is_known_by_its_text_alone_and_its_target_is_its_intents_answer(tmp_path: Path) -> None:
    found = built("banking77", "queries.parquet", "customer-service", tmp_path / "out")
    raw = pl.read_parquet(Path(os.environ["RECSYS_DATA"], "banking77", "queries.parquet"))
    assert found.manifest["counts"]["test"] == (raw["split"] == "test").sum() == 3080
    intents = dict(raw.select(pl.col("text").str.strip_chars(), "category").rows())
    split = dict(raw.select(pl.col("text").str.strip_chars(), "split").rows())
    item_ids, titles, events = (found.items[name].to_list() for name in ("item_id", "title", "events"))
    sequences = found.sequences
    for part in ("validation", "test"):
        start, target, end = sequences.windows(part)
        judged = (target > start) & (end > target)
        said = [row - FIRST_ITEM for row in sequences.items[start[judged]].tolist()]
        answered = [item_ids[row - FIRST_ITEM] for row in sequences.items[target[judged]].tolist()]
        assert [intents[titles[line]] for line in said] == answered and len(said) > 900
        assert {split[titles[line]] for line in said} == {"test" if part == "test" else "train"}
        assert all((events[line] == 0) == (part == "test") for line in said)
        assert len(set(answered)) == 77


def test_a_headline_of_the_test_days_was_never_learnt_and_no_desk_read_one_before_it_came_out(tmp_path: Path) -> None:
    found = built("financial-phrasebank", "sentences.parquet", "financial-news", tmp_path / "out")
    items = found.items.rename({f"{ATTRIBUTE}published": "published", f"{ATTRIBUTE}sentiment": "sentiment"})
    fresh = items.filter(pl.col("published") >= found.manifest["settings"]["split"]["test_start"])
    assert len(fresh) > 800 and fresh["events"].sum() == 0
    assert dict(items["sentiment"].value_counts().rows()) == {"neutral": 2872, "positive": 1362, "negative": 604}
    read = found.events.collect().join(items, on="item_id")
    assert (read["timestamp"] - read["published"]).is_between(0, 3599).all()
