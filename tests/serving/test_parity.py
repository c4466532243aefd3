"""One answer: what the API says, at night and when it is judged, item for item."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.build import build
from features.dataset import Dataset
from recsys.config import Recipe
from recsys.ranker import RankerSettings
from serving.engine import Recommender
from serving.evaluation.judge import evaluate
from serving.export import export
from serving.history import KEEP, import_dataset
from serving.index import IndexSettings
from serving.intake import store_source
from serving.nightly import nightly
from serving.nights import Nights
from serving.shards import Terms
from serving.workers import Processes
from tests.serving.conftest import write_run
from tests.serving.nights import lists_of, score_all
from tests.serving.online import client_of, made

USERS, ITEMS, K = 1009, 499, 23
RANKER = RankerSettings(blocks=1, width=24, hidden_size=37, span=32, companions=7, candidates=48)
KINDS: dict[str, dict[str, Any]] = {
    "ranked": {"time": "gaps", "positions": "relative"},
    "request time": {"time": "both", "request_time": True, "block": "ligr"},
}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Histories of 3 to 89 events; a model of length 50 does not read all of the longest."""
    folder, draw = tmp_path_factory.mktemp("crowd"), random.Random(11)
    events = [
        (user, int(ITEMS * draw.random() ** 2), 1_000_000 * user + 60 * place)
        for user in range(USERS)
        for place in range(draw.choice([*range(3, 29), *range(83, 90)]))
    ]
    pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(folder / "events.parquet")
    titles = [f"Story {item} of {ITEMS}" for item in range(ITEMS)]
    pl.DataFrame({"item_id": range(ITEMS), "title": titles}).write_parquet(folder / "items.parquet")
    build(folder, Recipe("crowd", {}), folder / "dataset")
    return Dataset.open(folder / "dataset")


def of_users(lists: pl.DataFrame) -> dict[Any, list[tuple[int, float]]]:
    rows = lists.sort("user_id", "rank").group_by("user_id", maintain_order=True).agg("item_id", "score")
    return {user: list(zip(items, scores, strict=True)) for user, items, scores in rows.iter_rows()}


def answered(answer: dict[str, Any]) -> list[tuple[int, float]]:
    return [(item["item_id"], item["score"]) for item in answer["items"]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_api_the_nightly_lists_and_the_judged_lists_name_the_same_items_for_a_thousand_users(
    kind: str, crowd: Dataset, tmp_path: Path
) -> None:
    export(
        write_run(tmp_path / "run", crowd, ranker=RANKER, **KINDS[kind]), tmp_path / "bundle", IndexSettings(kind="ivf"), crowd
    )
    recommender, asks = Recommender.load(tmp_path / "bundle"), KINDS[kind].get("request_time", False)
    now = 10**10 if asks else None
    score_all(recommender, crowd, tmp_path / "lists", K, now, engine=Processes(tmp_path / "bundle", 2))
    at_night = of_users(lists_of(tmp_path / "lists"))
    judged = of_users(evaluate(recommender, crowd, ks=(K,), baselines=False).frame())
    events = crowd.events.sort("user_id", "timestamp", maintain_order=True).collect().partition_by("user_id", as_dict=True)
    assert len(at_night) == USERS and len(judged) == USERS
    with client_of(made(tmp_path / "bundle", store=f"sqlite:{tmp_path / 'histories'}")) as client:
        import_dataset(client.app.service.store, crowd, lambda done, of: None)  # type: ignore[attr-defined]
        source = store_source(f"sqlite:{tmp_path / 'histories'}", KEEP)
        nightly(recommender, source, Nights(tmp_path / "of the store"), Terms(k=K, now=now or 0))
        assert of_users(lists_of(tmp_path / "of the store")) == {str(user): found for user, found in at_night.items()}
        for (user,), own in events.items():
            asked = {"user_id": user, "k": K} | ({"now": now} if asks else {})
            assert answered(client.post("/v1/recommend", json=asked).json()) == at_night[user]
            items, times = own["item_id"].to_list(), own["timestamp"].to_list()
            before = {"history": items[:-1], "times": times[:-1], "k": K} | ({"now": times[-1]} if asks else {})
            assert answered(client.post("/v1/recommend", json=before).json()) == judged[user]
