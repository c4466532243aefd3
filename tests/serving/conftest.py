"""A data set, an untrained run and a bundle of every kind; the weights are drawn so large that attention matters."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from features.build import build
from features.dataset import Dataset
from recsys.bundle import publish
from recsys.config import Recipe
from recsys.model import WEIGHTS, ModelSettings, SequenceModel
from serving.catalogue import ITEMS
from serving.export import export
from serving.index import INDEXES, IndexSettings

USERS, LISTED, LENGTH = 211, 997, 50


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Histories of 1 to 300 events; the longest goes far beyond what the model reads."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(5)
    lengths = [1, 2, 3, 300, *(draw.randrange(4, 300) for _ in range(USERS - 4))]
    events = [
        (f"user {user:03}", int(LISTED * draw.random() ** 2), 1_000_000 * user + 60 * place)
        for user, length in enumerate(lengths)
        for place in range(length)
    ]
    pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(folder / "events.parquet")
    items = {"item_id": list(range(LISTED)), "title": [f"Story {item} of {LISTED}" for item in range(LISTED)]}
    pl.DataFrame(items).write_parquet(folder / "items.parquet")
    build(folder, Recipe("made-up", {}), folder / "dataset")
    return Dataset.open(folder / "dataset")


def write_run(run: Path, dataset: Dataset, seed: int = 0, **settings: object) -> Path:
    chosen = ModelSettings(**{"embedding_size": 24, "hidden_size": 41, "heads": 2, "length": LENGTH, **settings})  # type: ignore[arg-type]
    model = SequenceModel(chosen, dataset.manifest["warm_items"]).initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("table"):
                parameter.mul_(7)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    manifest = {
        "kind": "model",
        "name": "made-up",
        "recipe": {"model": chosen.as_dict()},
        "items": model.items,
        "dataset": {"hash": dataset.manifest["hash"]},
        "quality": {"validation": {"ndcg@10": 0.0}},
        "clock": {"created": "then"},
    }
    writers = {
        WEIGHTS: lambda path: save_file(weights, path),
        ITEMS: lambda path: _copy(dataset.path / ITEMS, path),
    }
    publish(run / "model", writers, manifest)
    return run


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", dataset)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, run: Path, dataset: Dataset) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for kind in INDEXES:
        export(run, folder / kind, IndexSettings(kind=kind, probes=5), dataset)
    return {kind: folder / kind for kind in INDEXES}
