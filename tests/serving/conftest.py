"""Data sets, untrained runs and bundles of every kind; the weights are drawn so large that attention matters."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from features.build import build
from features.dataset import Dataset
from recsys.bundle import Writer, publish
from recsys.config import Recipe
from recsys.content import CONTENT, ENCODER, ContentEncoder
from recsys.model import WEIGHTS, ModelSettings, SequenceModel
from recsys.ranker import COMPANIONS, RANKER, Companions, Ranker, RankerSettings
from recsys.text import TextSettings
from serving.catalogue import ITEMS
from serving.export import export
from serving.index import INDEXES, IndexSettings

USERS, LISTED, LENGTH = 211, 997, 50
GOODS = 499
KINDS = ["lamp", "scarf", "kettle", "violin", "tent", "carpet", "teapot"]
TEXTS = {
    "lamp": "brass desk lamp with a green shade",
    "scarf": "woven scarf of merino wool",
    "kettle": "cast iron stove kettle",
    "violin": "maple violin and two bows",
    "tent": "light tent for three hikers",
    "carpet": "knotted carpet from Shiraz",
    "teapot": "blue porcelain teapot",
}
"""Of the goods of a shop; no word stands in two of them."""


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


def write_shop(folder: Path, attributes: tuple[str, ...] = (), **split: object) -> Dataset:
    """Goods of seven kinds; those of a kind have one text, one category and one price, and a user has goods of one kind."""
    draw = random.Random(7)
    events = [
        (user, user % 7 + 7 * int(GOODS // 7 * draw.random()), 1_000_000 * user + 60 * place)
        for user in range(101)
        for place in range(draw.randrange(3, 23))
    ]
    folder.mkdir(exist_ok=True)
    pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(folder / "events.parquet")
    stocked(range(GOODS)).write_parquet(folder / "items.parquet")
    data = SHOP | {"attribute_columns": attributes}
    build(folder, Recipe("shop", {"data": data, "split": split}), folder / "dataset")
    return Dataset.open(folder / "dataset")


SHOP = {"category_columns": ("kind",), "number_columns": ("price",)}


def goods(item_ids: Iterable[int], **columns: object) -> pl.DataFrame:
    """Rows of the shop's items table; a good's kind is its id's remainder by 7, unless `columns` say otherwise."""
    ids = pl.Series("item_id", list(item_ids), pl.Int64)
    kinds = [KINDS[item_id % 7] for item_id in ids]
    table = pl.DataFrame({"item_id": ids, "title": [TEXTS[kind] for kind in kinds], "kind": kinds})
    return table.with_columns(price=(ids % 7).cast(pl.Float64)).with_columns(**columns)


ATTRIBUTES = ("in_stock", "brand", "price", "tags", "later")


def stocked(item_ids: Iterable[int], **columns: object) -> pl.DataFrame:
    """Goods with attributes, some of them missing; `later` is so of every good."""
    item_id = pl.col("item_id")
    return (
        goods(item_ids)
        .with_columns(
            in_stock=pl.when(item_id % 11 != 0).then(item_id % 3 == 0),
            brand=pl.when(item_id % 13 != 0).then(pl.format("brand {}", item_id % 5)),
            tags=pl.when(item_id % 2 == 0).then(pl.concat_list(pl.format("{}", item_id % 17), pl.format("{}", item_id % 19))),
            later=pl.lit(None),
        )
        .with_columns(**columns)
    )


def write_run(
    run: Path, dataset: Dataset, seed: int = 0, scale: float = 7, ranker: RankerSettings | None = None, **settings: object
) -> Path:
    chosen = ModelSettings(**{"embedding_size": 24, "hidden_size": 41, "heads": 2, "length": LENGTH, **settings})  # type: ignore[arg-type]
    warm, content, texts = dataset.manifest["warm_items"], None, {}
    if chosen.text != "none":
        encoder = ContentEncoder.fit(dataset.described.take(warm), TextSettings(size=31))
        content = encoder.encode(dataset.described)
        texts = {CONTENT: content.save, ENCODER: encoder.save}
    model = SequenceModel(chosen, warm, content).initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(1)
            elif parameter.ndim > 1 and not name.startswith("table"):
                parameter.mul_(scale)
    ranks: dict[str, Writer] = {}
    if ranker is not None:
        ranks = _ranker(ranker, model, dataset)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    about = {name: dataset.manifest["settings"][name] for name in ("data", "split")}
    manifest = {
        "kind": "model",
        "name": "made-up",
        "recipe": {
            **about,
            "model": chosen.as_dict(),
            "text": TextSettings(size=31).as_dict(),
            "ranker": (ranker or RankerSettings()).as_dict(),
        },
        "items": model.items,
        "dataset": {"hash": dataset.manifest["hash"]},
        "quality": {"validation": {"ndcg@10": 0.0}},
        "clock": {"created": "then"},
    }
    writers = {
        WEIGHTS: lambda path: save_file(weights, path),
        ITEMS: lambda path: _copy(dataset.path / ITEMS, path),
        **texts,
        **ranks,
    }
    publish(run / "model", writers, manifest)
    return run


def _ranker(settings: RankerSettings, model: SequenceModel, dataset: Dataset) -> dict[str, Writer]:
    """Of an untrained ranker, whose weights are drawn so large that it has much to say."""
    companions = Companions.of(dataset.sequences.learnable(model.items), model.items, settings.companions)
    kept = companions if settings.companions else None
    ranker = Ranker(settings, model.settings, model.items, model.content, kept).initialise(torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in (ranker.score_weight, ranker.user_out.weight, ranker.companion_weight):
            if parameter is not None:
                parameter.normal_(0, 1, generator=torch.Generator().manual_seed(5))
    weights = {name: value.contiguous() for name, value in ranker.state_dict().items()}
    files: dict[str, Writer] = {RANKER: lambda path: save_file(weights, path)}
    return files | ({COMPANIONS: kept.save} if kept else {})


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", dataset)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, run: Path, dataset: Dataset) -> dict[str, Path]:
    return exported(tmp_path_factory.mktemp("bundles"), run, dataset, probes=5)


def exported(folder: Path, run: Path, dataset: Dataset | None, probes: int = 3) -> dict[str, Path]:
    """A bundle with each kind of index."""
    for kind in INDEXES:
        export(run, folder / kind, IndexSettings(kind=kind, probes=probes), dataset)
    return {kind: folder / kind for kind in INDEXES}


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="session")
def shop_run(tmp_path_factory: pytest.TempPathFactory, shop: Dataset) -> Path:
    """Of a model that reads descriptions both ways, so that a state stands near the goods of its history."""
    run = tmp_path_factory.mktemp("shop-run") / "run"
    return write_run(run, shop, scale=1, text="both", similarity="cosine", temperature=0.1)


@pytest.fixture(scope="session")
def stocked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the shop with attributes."""
    folder = tmp_path_factory.mktemp("stocked-run")
    dataset = write_shop(folder / "shop", ATTRIBUTES)
    return write_run(folder / "run", dataset, scale=1, text="both", similarity="cosine", temperature=0.1)


@pytest.fixture(scope="session")
def stocked_bundles(tmp_path_factory: pytest.TempPathFactory, stocked_run: Path) -> dict[str, Path]:
    return exported(tmp_path_factory.mktemp("stocked-bundles"), stocked_run, None)


@pytest.fixture(scope="session")
def shop_bundles(tmp_path_factory: pytest.TempPathFactory, shop_run: Path, shop: Dataset) -> dict[str, Path]:
    return exported(tmp_path_factory.mktemp("shop-bundles"), shop_run, shop)


RANKERS = {
    "look": RankerSettings(blocks=1, width=24, heads=2, hidden_size=37, span=16, companions=0, candidates=48),
    "companions": RankerSettings(blocks=2, width=32, heads=2, hidden_size=41, span=32, companions=13, ids=True, candidates=64),
    "among": RankerSettings(blocks=1, width=24, heads=1, hidden_size=37, span=16, companions=7, among=True, candidates=48),
}
"""Kinds of rankers; `companions` has two depths."""


@pytest.fixture(scope="session")
def ranked_bundles(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> dict[str, Path]:
    """A bundle with an exact index for each kind of ranker."""
    folder = tmp_path_factory.mktemp("ranked")
    for name, settings in RANKERS.items():
        run = write_run(folder / f"run-{name}", dataset, ranker=settings, time="gaps")
        export(run, folder / name, IndexSettings(), dataset)
    return {name: folder / name for name in RANKERS}
