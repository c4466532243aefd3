"""Several processes do what one does: the same steps, whatever holds the table, and whoever dies meanwhile."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from features.build import build
from features.dataset import GROUPS, LIST_ROWS, Dataset
from features.synthetic import SyntheticSettings, write
from recsys.batch import Sequences, deal
from recsys.bundle import open_directory
from recsys.command.learning import without
from recsys.command.reproduce import reproduce
from recsys.config import Recipe
from recsys.errors import RecipeError
from recsys.model import SequenceModel
from tests.training import together
from tests.training.conftest import RING
from training.checkpoint import TABLE, Checkpoints, read_table
from training.data import EpochBatches, cut_by_cost
from training.distributed import ShardedTable
from training.loop import refuse_settings
from training.team import ALONE, Team, joined
from training.validate import validate

ROOT = Path(__file__).parents[2]
ONE_STEP = [name for name in together.WAYS if name not in ("steps", "muon")]


def torchrun(processes: int, folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "tests.training.together", str(folder), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert not done.returncode, done.stdout + done.stderr


def furthest(one, other) -> float:
    """The largest difference of two trainings' weights."""
    assert one["weights"].keys() == other["weights"].keys()
    return max(float((value - other["weights"][name]).abs().max()) for name, value in one["weights"].items())


def within(name: str) -> float:
    """What rounding may do; Adam and Adagrad divide by what may be almost nothing."""
    return 2e-5 if name.endswith("adagrad") else 1e-6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every way, by one process and by two."""
    folder = tmp_path_factory.mktemp("together")
    for processes in (1, 2):
        (folder / str(processes)).mkdir()
    together.main(folder / "1", [*together.WAYS])
    torchrun(2, folder / "2", *together.WAYS)
    return {
        (name, processes): torch.load(folder / str(processes) / f"{name} {processes}.pt", weights_only=True)
        for name in together.WAYS
        for processes in (1, 2)
    }


@pytest.mark.torchrec
@pytest.mark.parametrize("name", ONE_STEP)
def test_two_processes_come_to_the_weights_of_one(trained, name):
    one, two = trained[name, 1], trained[name, 2]
    assert furthest(one, two) < within(name)
    for mine, theirs in zip(one["curve"], two["curve"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.torchrec
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", [name for name in ONE_STEP if name.startswith("torchrec")])
def test_a_table_in_parts_learns_what_one_in_plain_torch_does(trained, name, processes):
    plain = name.replace("torchrec", "plain") if name.endswith(("softmax", "adagrad")) else "plain"
    one, other = trained[name, processes], trained[plain, processes]
    assert furthest(one, other) < within(name)
    for mine, theirs in zip(one["curve"], other["curve"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.torchrec
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_targets_are_ranked_in_blocks_as_among_all_items_at_once(ring, monkeypatch, block):
    monkeypatch.setattr("training.validate.BLOCK", block)
    items = RING - 3  # the last three are unknown, and cannot be found
    with joined(torch.device("cpu"), together=True) as team:
        table = partial(ShardedTable, team=team, kind="sgd", sharding="row_wise")
        settings = [(together.MODEL, None), (together.IN_PARTS, table)]
        plain, parts = (
            SequenceModel(model, items, table=own).initialise(torch.Generator().manual_seed(0)) for model, own in settings
        )
        wanted = validate(plain, ring)
        assert 0 < wanted["ndcg@10"] < wanted["recall@50"] < 1
        assert validate(parts, ring, team=team) == pytest.approx(wanted, abs=1e-9)
        some = validate(plain, ring, users=50)
        assert validate(parts, ring, users=50, team=team) == pytest.approx(some, abs=1e-9)
        assert some != wanted


@pytest.mark.torchrec
def test_each_of_two_processes_holds_a_part(trained):
    for name, (one, two) in {
        "torchrec row_wise": ("[16, 16]", "[15, 16]"),
        "torchrec column_wise": ("[31, 8]", "[31, 8]"),
        "torchrec table_wise": ("[31, 16]", "rank:0"),
    }.items():
        plan = trained[name, 2]["told"][0]
        assert one in plan and two in plan and name.removeprefix("torchrec ") in plan
    assert "2 processes" in trained["plain", 2]["told"][-1]


@pytest.mark.torchrec
@pytest.mark.parametrize(("name", "wanted"), [("steps", 0.95), ("muon", 0.7)])
def test_many_steps_with_dropout_learn_as_well_by_two_processes(trained, name, wanted):
    one, two = trained[name, 1], trained[name, 2]
    assert min(one["best"], two["best"]) > wanted
    assert abs(one["steps"] - two["steps"]) <= len(one["curve"])  # at most one an epoch, by how windows are cut


@pytest.mark.torchrec
def test_a_table_goes_on_exactly_from_another_number_of_processes(tmp_path):
    folders = [tmp_path / name for name in ("moved", "stayed")]
    for folder in folders:
        folder.mkdir()
    torchrun(2, folders[0], "parts row_wise 3")
    before = read(folders[0])
    together.main(folders[0], ["parts auto 0"])  # read and written by one process
    assert all(torch.equal(value, before[name]) for name, value in read(folders[0]).items())
    together.main(folders[0], ["parts auto 3"])
    torchrun(2, folders[0], "parts table_wise 0", "parts row_wise 3")
    together.main(folders[1], ["parts auto 9"])
    moved, stayed = read(folders[0]), read(folders[1])
    assert moved.keys() == stayed.keys() == {"weight", "momentum1"}
    for name, value in moved.items():
        assert torch.allclose(value, stayed[name], atol=1e-6)
    assert not torch.equal(moved["weight"], before["weight"])


def read(folder: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint has of a table, without TorchRec."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    checkpoints = Checkpoints(folder / "parts", "k")
    path = checkpoints.path(checkpoints.newest)
    told = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in told.items() if name.startswith(TABLE)}
    load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    assert torch.equal(tensors[f"{TABLE}weight"], read_table(path))
    return {name.removeprefix(TABLE): value for name, value in tensors.items()}


@pytest.mark.torchrec
def test_two_processes_that_were_cut_off_end_with_the_weights_of_undisturbed_ones(trained, tmp_path):
    torchrun(2, tmp_path, "steps:9", "steps", "muon:9", "muon")
    for name in ("steps", "muon"):
        again = torch.load(tmp_path / f"{name} 2.pt", weights_only=True)
        assert furthest(again, trained[name, 2]) == 0
        assert again["curve"] == trained[name, 2]["curve"]


def test_a_checkpoint_that_is_not_whole_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path, "k")
    for number in (3, 5):
        checkpoints.save(number, {"value": torch.tensor(number)}, {})
    checkpoints.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000005"]
    (tmp_path / ".000000007.tmp").mkdir()  # of a process that was killed
    again = Checkpoints(tmp_path, "k")
    assert again.load(again.newest, {})["value"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000005"]


def test_a_checkpoint_to_keep_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path, "k")
    for number in (1, 2, 3):
        checkpoints.save(number, {}, {}, {1})
    checkpoints.finish()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [1, 3]


def skewed(count: int = 4001) -> torch.Tensor:
    """Lengths as histories have them: most short, some very long."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return (noise.exp() * 20).long().clamp(2, 200)


@pytest.mark.parametrize("hands", [2, 3, 7])
def test_dealing_gives_every_hand_about_the_same(hands):
    costs = skewed()
    owners = deal(costs, hands)
    held = torch.bincount(owners, costs.double(), minlength=hands)
    assert held.max() - held.min() <= costs.max()
    assert held.sum() == costs.sum()


@pytest.mark.parametrize("groups", [1, 5, 37])
def test_cuts_leave_nothing_out_and_are_of_equal_sums(groups):
    lengths = skewed().sort().values
    cuts = cut_by_cost(lengths, groups)
    assert cuts[0][0] == 0 and cuts[-1][1] == len(lengths) and len(cuts) == groups
    assert all(one[1] == other[0] for one, other in itertools.pairwise(cuts))
    sums = torch.tensor([int(lengths[begin:end].sum()) for begin, end in cuts])
    assert (sums - lengths.sum() / groups).abs().max() <= lengths.max()


class Apart(Team):
    """One of two processes, in this one; the other has as many steps."""

    def most(self, count: int) -> int:
        return count


@pytest.mark.parametrize("windows", ["last", "all", "prefixes"])
def test_the_slowest_process_of_a_step_is_within_5_percent_of_the_mean(windows):
    lengths = skewed() if windows != "prefixes" else skewed(401)
    owners = deal(lengths, 2)
    tokens = []
    for rank in (0, 1):
        own = lengths[owners == rank]
        offsets = torch.cat([own.new_zeros(1), own.cumsum(0)])
        events = torch.zeros(int(offsets[-1]))
        part = Sequences(events.int(), events.long(), offsets, own, own)
        batches = EpochBatches(part, 100, 12_800, 0, 0, windows, team=Apart(rank, 2))
        tokens.append(batches.tokens)
    assert len(tokens[0]) == len(tokens[1])
    both = torch.stack(tokens).double()
    assert float((both.amax(0) / both.mean(0)).mean()) < 1.05


def test_one_process_has_the_batches_it_always_had():
    lengths = skewed(101)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    events = torch.arange(int(offsets[-1]))
    sequences = Sequences(events.int(), events, offsets, lengths, lengths)
    batches = list(EpochBatches(sequences, 50, 500, 1, 2, team=ALONE))
    owners = torch.cat([batch.users for batch in batches])
    assert sorted(owners.tolist()) == list(range(101))
    assert all(len(batch.history) * int(batch.history.lengths.max()) <= 500 for batch in batches)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write(SyntheticSettings(users=997, items=307, events_per_user=17), folder / "raw")
    build(folder / "raw", Recipe("small", {"data": {"now": 1_800_000_000}}), folder / "dataset")
    return folder


@pytest.mark.parametrize("ranks", [1, 3])
def test_shares_of_a_data_set_are_all_of_it_and_about_equal(world, ranks):
    dataset = Dataset.open(world / "dataset")
    assert len(dataset.user_ids) < GROUPS * ranks * LIST_ROWS
    shares = [dataset.share(rank, ranks) for rank in range(ranks)]
    assert sum(share.users for share in shares) == dataset.sequences.users
    trained = [int(share.train_end.sum()) for share in shares]
    assert sum(trained) == int(dataset.sequences.train_end.sum())
    assert max(trained) - min(trained) <= int(dataset.sequences.train_end.max())
    mine = sorted(tuple(part.tolist()) for share in shares for part in torch.split(share.items, share.offsets.diff().tolist()))
    whole = dataset.sequences
    assert mine == sorted(tuple(part.tolist()) for part in torch.split(whole.items, whole.offsets.diff().tolist()))


def test_many_row_groups_are_dealt_whole(world, monkeypatch):
    monkeypatch.setattr("features.dataset.LIST_ROWS", 13)
    dataset = Dataset.open(world / "dataset")
    shares = [dataset.share(rank, 2) for rank in range(2)]
    whole = dataset.sequences
    groups = [tuple(part.tolist()) for part in torch.split(whole.train_end, 13)]
    for share in shares:
        assert all(
            tuple(part.tolist()) in groups for part in torch.split(share.train_end[: len(share.train_end) // 13 * 13], 13)
        )
    assert sum(share.users for share in shares) == whole.users


SMALL = [
    *("model.embedding_size=8", "model.blocks=1", "model.hidden_size=11", "model.length=13", "model.embedding=torchrec"),
    *("optimizer.table=rowwise_adagrad", "optimizer.embedding_learning_rate=0.1", "train.sharding=row_wise"),
    *("train.epochs=8", "train.patience=8", "train.batch_tokens=173", "tracking.uri=off"),
]


@pytest.mark.torchrec
@pytest.mark.timeout(600)  # three starts of torchrun
def test_a_training_of_which_a_process_is_killed_ends_by_itself_with_the_same_bytes(world, tmp_path):
    out, written = tmp_path / "killed", tmp_path / "killed.log"
    command = [sys.executable, "-m", "recsys", "train", "tiny", "--dataset", str(world / "dataset"), "--out", str(out)]
    command += [*(word for each in SMALL for word in ("--set", each)), "--device", "cpu", "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    checkpoint, deadline, killed = out / "checkpoint", time.monotonic() + 120, None
    with written.open("w") as log, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) as process:
        while process.poll() is None and killed is None and time.monotonic() < deadline:
            time.sleep(0.01)
            if any(path.name.isdigit() and int(path.name) for path in checkpoint.glob("0*")):
                workers = psutil.Process(process.pid).children(recursive=True)
                killed = next(worker for worker in workers if worker.environ().get("RANK") == "1")
                killed.kill()
        ended = process.wait(timeout=250)
    assert ended == 0, written.read_text()
    assert killed is not None
    found = reproduce(str(out), None, None, tmp_path / "undisturbed")  # by two processes as well
    assert found.reproduced, [row for row in found.rows if row.agrees is False]
    (again,) = (path.parent for path in (tmp_path / "undisturbed").rglob("manifest.json") if path.parent.name == "model")
    first, second = (open_directory(path).manifest for path in (again, out / "model"))
    assert first["files"] == second["files"] and first["curve"] == second["curve"]
    assert second["clock"]["environment"]["processes"] == 2
    assert json.loads((out / "run.json").read_text())["key"]


@pytest.mark.parametrize(
    ("model", "table", "says"),
    [
        ({"embedding": "torch"}, "adam", 'optimizer.table "adam" is TorchRec'),
        ({}, "adam", 'optimizer.table "adam" is TorchRec'),
        ({"ids": False, "text": "pooled"}, "sgd", "a table in parts needs ids"),
        ({"embedding_size": 18}, "sgd", "needs model.embedding_size in fours, found 18"),
    ],
)
def test_a_table_that_cannot_be_in_parts_is_refused_in_one_line(model, table, says):
    settings = dataclasses.replace(together.IN_PARTS, **model)
    with pytest.raises(RecipeError, match=says):
        refuse_settings(settings, together.TRAIN, dataclasses.replace(together.SGD, table=table), torch.device("cpu"))


def test_an_average_of_a_table_that_is_not_read_whole_is_refused():
    with pytest.raises(ValueError, match="ema reads the whole table"):
        dataclasses.replace(together.ADAGRAD, ema=0.9)


def test_an_option_is_taken_out_of_a_command_with_its_value():
    words = ["train", "x", "--processes", "4", "--set", "a.b=1", "--processes=4", "--out", "y"]
    assert without(words, "--processes") == ["train", "x", "--set", "a.b=1", "--out", "y"]
