"""Where learning begins: what was learnt of an item stays with it, whatever its row is now; new items begin by their texts."""

import dataclasses
from pathlib import Path

import polars as pl
import pytest
import torch
from torch.nn.functional import normalize

from features.build import build
from features.dataset import Dataset
from features.synthetic import SyntheticSettings, write
from recsys.batch import FIRST_ITEM
from recsys.bundle import open_directory
from recsys.config import Recipe
from recsys.content import ENCODER, NEAR, ContentEncoder, Described
from recsys.errors import RecsysError
from recsys.model import ModelSettings, SequenceModel, model_from
from recsys.text import TextSettings
from recsys.tracking import OFF, Tracking, TrackingSettings
from training.run import DECISIVE, read_content, train
from training.start import begin_with, known_rows

OLD, ITEMS = 80, 101
DATA = {"now": 1_800_000_000, "items": "items.parquet", "text_columns": ["title"]}


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> tuple[Dataset, Dataset]:
    """A data set of the first items of a world, and one of all of them; row by row they name other items."""
    folder = tmp_path_factory.mktemp("world")
    write(SyntheticSettings(users=211, items=ITEMS, events_per_user=13), folder / "raw")
    events = pl.concat([pl.read_parquet(path) for path in sorted((folder / "raw").glob("events-*.parquet"))])
    items = pl.read_parquet(folder / "raw" / "items.parquet")
    made = []
    for name, of in (("old", OLD), ("new", ITEMS)):
        raw = folder / name
        raw.mkdir()
        events.filter(pl.col("item_id") <= of).write_parquet(raw / "events.parquet")
        items.filter(pl.col("item_id") <= of).write_parquet(raw / "items.parquet")
        build(raw, Recipe("small", {"data": DATA}), folder / f"{name}-set")
        made.append(Dataset.open(folder / f"{name}-set"))
    return made[0], made[1]


def recipe(text: str = "none", **changes):
    model = {"embedding_size": 8, "blocks": 1, "hidden_size": 11, "length": 13, "text": text, **changes}
    read = {"encoder": "lsa", "size": 7, "tokens": 3}
    small = Recipe("small", {"model": model, "train": {"epochs": 2, "batch_tokens": 173}, "text": read})
    return {owner.section: small.read(owner).as_dict() for owner in DECISIVE}


def run(dataset: Dataset, out: Path, start: Path | None = None, **changes):
    tracking = Tracking(TrackingSettings(uri=OFF))
    return train(dataset, recipe(**changes), out, name="small", device=torch.device("cpu"), tracking=tracking, start=start)


@pytest.fixture(scope="module", params=["none", "pooled"])
def begun(grown, tmp_path_factory, request):
    """The model of a run, one that begins with it, and the row there of each item here."""
    old, new = grown
    folder = tmp_path_factory.mktemp("run")
    directory = run(old, folder / "run", text=request.param)
    settings = ModelSettings(**recipe(text=request.param)["model"])
    content = None
    if request.param != "none":
        fitted = ContentEncoder.load(directory.path / ENCODER)
        content = read_content(new, TextSettings(**recipe()["text"]), fitted=fitted)[1]
    model = SequenceModel(settings, new.manifest["warm_items"], content).initialise(torch.Generator().manual_seed(0))
    begin_with(model, directory, new, 0)
    return model_from(directory), model, known_rows(directory, new), new, folder / "run"


def test_an_item_keeps_its_vector_under_another_row(begun):
    before, model, rows, new, _ = begun
    known = (rows >= 0).nonzero().flatten()
    assert not torch.equal(rows[known], known + FIRST_ITEM)  # else the test shows nothing
    assert torch.equal(model.table.weight[known + FIRST_ITEM], before.table.weight[rows[known]])
    ids = new.items["item_id"].to_numpy()[known.numpy()]
    assert max(ids) <= OLD and len(set(ids)) == before.items
    for name, value in before.named_parameters():
        if not name.startswith("table."):
            assert torch.equal(value, dict(model.named_parameters())[name]), name


def test_a_new_item_begins_as_the_learnt_ones_of_the_nearest_texts(begun):
    before, model, rows, new, _ = begun
    fresh = (rows[: model.items] < 0).nonzero().flatten().tolist()
    assert fresh
    if model.settings.described:  # its text alone carries it
        assert not model.table.weight[FIRST_ITEM + torch.tensor(fresh)].any()
        return
    known = (rows >= 0).nonzero().flatten()
    texts = new.items["text"].to_list()
    encoder = ContentEncoder.fit(described(texts, known.tolist()), TextSettings())
    pooled = encoder.encode(described(texts, range(len(texts)))).pooled_VP
    for line in fresh:
        cosines = normalize(pooled[known], dim=1) @ normalize(pooled[line], dim=0)
        nearest = cosines.argsort(descending=True)[:32]
        shares = (cosines[nearest] / NEAR).softmax(0)
        wanted = sum(share * before.table.weight[rows[known[at]]] for share, at in zip(shares, nearest, strict=True))
        assert torch.allclose(model.table.weight[FIRST_ITEM + line], wanted, atol=1e-4), line


def described(texts, lines):
    chosen = [texts[line] for line in lines]
    return Described(chosen, [[]] * len(chosen), [[]] * len(chosen))


def test_a_training_that_begins_with_a_run_is_ahead_and_is_another_run(begun, grown, tmp_path):
    *_, path = begun
    text = open_directory(path / "model").manifest["recipe"]["model"]["text"]
    scratch, ahead = run(grown[1], tmp_path / "scratch", text=text), run(grown[1], tmp_path / "ahead", path, text=text)
    assert ahead.manifest["curve"][0]["loss"] < scratch.manifest["curve"][0]["loss"]
    assert ahead.manifest["clock"]["start"]["id"] == open_directory(path / "model").manifest["id"]
    with pytest.raises(RecsysError, match="holds a run of another recipe or data set"):
        run(grown[1], tmp_path / "ahead", text=text)


def test_a_run_of_other_settings_is_refused_by_their_name(begun, grown, tmp_path):
    *_, path = begun
    text = open_directory(path / "model").manifest["recipe"]["model"]["text"]
    with pytest.raises(RecsysError, match=r"model.hidden_size is 11 there and 23 here; set it alike"):
        run(grown[1], tmp_path / "run", path, text=text, hidden_size=23)
    assert not (tmp_path / "run" / "run.json").exists()
    dropout = dataclasses.replace(ModelSettings(**recipe(text=text)["model"]), dropout=0.4).dropout
    assert run(grown[1], tmp_path / "run", path, text=text, dropout=dropout)  # no weight depends on it
