"""Where learning begins: what was learnt of an item stays with it, whatever its row is now; new items begin by their texts.
And what an update learns: of the weights those that are to learn, of the events those that are new."""

import dataclasses
import subprocess
import sys
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
from recsys.errors import DataError, RecipeError, RecsysError
from recsys.model import ModelSettings, SequenceModel, model_from
from recsys.text import TextSettings
from recsys.tracking import OFF, Tracking, TrackingSettings
from tests.training import together
from tests.training.conftest import RING, ring_sequences
from training.checkpoint import Checkpoints
from training.data import EpochBatches, recent
from training.loop import TrainSettings, fit, refuse_settings
from training.losses import LOSSES, LossSettings
from training.optimizer import OptimizerSettings
from training.run import DECISIVE, read_content, train
from training.start import begin_with, known_rows
from training.team import Team, joined

ROOT = Path(__file__).parents[2]
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


def recipe(text: str = "none", train=(), optimizer=(), **changes):
    model = {"embedding_size": 8, "blocks": 1, "hidden_size": 11, "length": 13, "text": text, **changes}
    read = {"encoder": "lsa", "size": 7, "tokens": 3}
    learnt = {"train": {"epochs": 2, "batch_tokens": 173, **dict(train)}, "optimizer": dict(optimizer)}
    small = Recipe("small", {"model": model, "text": read, **learnt})
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
    fresh = begin_with(model, directory, new, 0)
    assert fresh.tolist() == [False] * FIRST_ITEM + (known_rows(directory, new)[: model.items] < 0).tolist()
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


OPTIMIZERS = [
    {},
    {"kind": "muon", "ema": 0.9, "warmup_steps": 3},
    {"kind": "sgd", "learning_rate": 0.3},
    *({"table": kind, "embedding_learning_rate": 0.1} for kind in ("sgd", "adagrad", "rowwise_adagrad")),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("learn", ["table", "new_rows"])
def test_what_is_not_to_learn_stays_bit_for_bit(begun, grown, tmp_path, learn, optimizer):
    before, model, rows, new, path = begun
    text = before.settings.text
    made = model_from(run(new, tmp_path / "run", path, text=text, train={"learn": learn}, optimizer=optimizer))
    for name, value in before.named_parameters():
        if not name.startswith("table."):
            assert torch.equal(value, dict(made.named_parameters())[name]), name
    moved = (made.table.weight != model.table.weight).any(1)
    fresh = torch.cat([torch.zeros(FIRST_ITEM, dtype=torch.bool), rows[: model.items] < 0])
    assert moved[fresh].all()
    assert moved[FIRST_ITEM:][~fresh[FIRST_ITEM:]].all() if learn == "table" else torch.equal(moved, fresh)


def test_what_cannot_learn_is_refused_in_one_line(begun, grown, tmp_path):
    before, *_, path = begun
    text = before.settings.text
    with pytest.raises(RecipeError, match=r'train.learn is "table", which needs learnt weights; begin with a run \(--start\)'):
        run(grown[1], tmp_path / "none", text=text, train={"learn": "table"})
    with pytest.raises(DataError, match='"new_rows" and the run has learnt every item; set it to'):
        run(grown[0], tmp_path / "same", path, text=text, train={"learn": "new_rows"})
    with pytest.raises(DataError, match="no training event from then on follows another; set it earlier"):
        run(grown[1], tmp_path / "late", path, text=text, train={"since": 2**40})
    plain, torchrec = ModelSettings(), ModelSettings(embedding="torchrec")
    for model, settings, kind, says in (
        (ModelSettings(ids=False, text="pooled"), {"learn": "table"}, "same", "without model.ids there is no item table"),
        (torchrec, {"learn": "new_rows"}, "sgd", "needs a table in one piece"),
        (plain, {"since": 1, "windows": "prefixes"}, "same", "train.since needs causal windows"),
        (ModelSettings(objective="masked"), {"since": 1}, "same", "train.since needs causal windows"),
    ):
        with pytest.raises(RecipeError, match=says):
            refuse_settings(model, TrainSettings(**settings), OptimizerSettings(table=kind), torch.device("cpu"))


def windows(sequences, length: int, chosen: str) -> list[tuple]:
    return sorted(
        (*batch.history.values[begin:end].tolist(), *batch.asked[begin:end].tolist(), int(batch.targets[end - 1]))
        for batch in EpochBatches(sequences, length, 97, 0, 0, chosen)
        for begin, end in zip(batch.history.offsets[:-1].tolist(), batch.history.offsets[1:].tolist(), strict=True)
    )


@pytest.mark.parametrize("chosen", ["last", "all"])
@pytest.mark.parametrize("length", [3, 5, 50])
def test_an_update_reads_the_windows_that_hold_new_targets_as_they_are(ring, length, chosen):
    """Of the ring the time of a user's event n is 60 n."""
    plain = windows(ring, length, chosen)
    for since in (1, 300, 301, 720, 10**6):
        wanted = [one for one in plain if max(one[len(one) // 2 : -1]) >= since]
        assert windows(recent(ring, since, length), length, chosen) == wanted
        assert bool(wanted) == (since < 10**6)


@pytest.mark.parametrize("length", [3, 50])
def test_an_update_learns_each_new_event_once(ring, length, monkeypatch):
    told: list[int] = []

    def listen(model, states, targets, settings, generator):
        told.extend(targets.rows_N.tolist())
        return states.sum()

    monkeypatch.setitem(LOSSES, "listening", listen)
    model = ModelSettings(embedding_size=8, blocks=1, hidden_size=11, length=length)
    settings = TrainSettings(epochs=1, batch_tokens=97, windows="all", since=300)
    fit(ring, RING, model, settings, LossSettings("listening"), OptimizerSettings())
    begins, ends, _ = ring.windows("train")
    pairs = zip(begins.tolist(), ends.tolist(), strict=True)
    assert told and sorted(told) == sorted(row for begin, end in pairs for row in ring.items[begin + 5 : end].tolist())


UPDATES = [("new_rows", False), ("table", False), ("table", True)]
"""What learns, and whether TorchRec holds the table in parts."""
FRESH = 23
"""The first row of the ring that is new."""


def drawn() -> SequenceModel:
    return SequenceModel(together.MODEL, RING).initialise(torch.Generator().manual_seed(5))


def update(team: Team, folder: Path, learn: str, parts: bool) -> None:
    """Learn on from weights that were drawn, as one of a team; the first process saves what they became."""
    model, optimizer = together.MODEL, together.SGD
    if parts:
        model, optimizer = together.IN_PARTS, dataclasses.replace(optimizer, table="sgd")

    def start(model: SequenceModel) -> torch.Tensor:
        for name, value in drawn().named_parameters():
            if not name.startswith("table."):
                dict(model.named_parameters())[name].data.copy_(value.data)
        model.table.put(0, drawn().table.weight.data)
        return torch.arange(FIRST_ITEM + RING) >= FRESH

    name = f"{learn} {parts} {team.size}"
    sequences = together.share(ring_sequences(), team)
    settings = dataclasses.replace(together.TRAIN, learn=learn, since=300)
    options = {"start": start, "team": team, "checkpoints": Checkpoints(folder / name, "k", team)}
    state = fit(sequences, RING, model, settings, together.LOSS, optimizer, **options)
    if not team.rank:
        torch.save(state.model.weights(), folder / f"{name}.pt")


def updates(folder: Path) -> None:
    with joined(torch.device("cpu"), together=True) as team:
        for learn, parts in UPDATES:
            update(team, folder, learn, parts)


@pytest.mark.torchrec
def test_two_processes_update_as_one_does_and_leave_the_same_as_it_is(tmp_path):
    updates(tmp_path)
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.training.test_start", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert not done.returncode, done.stdout + done.stderr
    before = drawn().weights()
    for learn, parts in UPDATES:
        one, two = (torch.load(tmp_path / f"{learn} {parts} {size}.pt", weights_only=True) for size in (1, 2))
        assert max(float((value - two[name]).abs().max()) for name, value in one.items()) < 1e-6
        for made in (one, two):
            assert all(torch.equal(value, before[name]) for name, value in made.items() if not name.startswith("table."))
            moved = (made["table.weight"] != before["table.weight"]).any(1)
            assert moved[FRESH:].all() and bool(moved[FIRST_ITEM:FRESH].any()) == (learn == "table")


if __name__ == "__main__":  # as one of the processes of the test above
    updates(Path(sys.argv[1]))
