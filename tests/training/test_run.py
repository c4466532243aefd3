"""A run directory: what is in it, whose it is, and that kill -9 changes nothing of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from features.build import build
from features.dataset import Dataset
from features.synthetic import SyntheticSettings, write
from recsys.bundle import open_directory
from recsys.config import Recipe
from recsys.errors import RecsysError
from recsys.model import model_from
from recsys.tracking import OFF, Tracking, TrackingSettings
from training.run import DECISIVE, train
from training.validate import validate

SETTINGS = [
    "model.embedding_size=8",
    "model.blocks=1",
    "model.hidden_size=11",
    "model.length=13",
    "train.epochs=6",
    "train.batch_tokens=173",
    "train.patience=6",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("world")
    write(SyntheticSettings(users=211, items=101, events_per_user=13), folder / "raw")
    build(folder / "raw", Recipe("small", {"data": {"now": 1_800_000_000}}), folder / "dataset")
    return Dataset.open(folder / "dataset")


def recipe(embedding="torch", **train_settings):
    model = {"embedding_size": 8, "blocks": 1, "hidden_size": 11, "length": 13, "embedding": embedding}
    chosen = {"epochs": 2, "batch_tokens": 173, **train_settings}
    small = Recipe("small", {"model": model, "train": chosen})
    return {owner.section: small.read(owner).as_dict() for owner in DECISIVE}


def run(dataset, out, tracking=None, **train_settings):
    tracking = tracking or Tracking(TrackingSettings(uri=OFF))
    return train(dataset, recipe(**train_settings), out, name="small", device=torch.device("cpu"), tracking=tracking)


def test_the_published_model_is_the_one_that_was_judged_best(dataset, tmp_path):
    model = run(dataset, tmp_path / "run")
    found = validate(model_from(open_directory(model.path)), dataset.sequences)
    assert found == model.manifest["quality"]["validation"]
    curve = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert max(line["ndcg@10"] for line in curve) == found["ndcg@10"]


@pytest.mark.torchrec
def test_a_model_trained_with_torchrec_is_the_one_trained_without_and_serves_without(dataset, tmp_path):
    plain = run(dataset, tmp_path / "plain")
    sharded = run(dataset, tmp_path / "torchrec", embedding="torchrec")
    first, second = (load_file(model.path / "weights.safetensors") for model in (plain, sharded))
    assert first.keys() == second.keys()
    for name, weights in first.items():  # equal but for the order in which a row's gradients are added
        torch.testing.assert_close(second[name], weights, rtol=0, atol=1e-7)
    assert type(model_from(open_directory(sharded.path)).table).__name__ == "TorchTable"


def test_same_data_recipe_and_seed_give_the_same_bytes(dataset, tmp_path):
    first, again, other = run(dataset, tmp_path / "a"), run(dataset, tmp_path / "b"), run(dataset, tmp_path / "c", seed=1)
    assert first.manifest["hash"] == again.manifest["hash"] != other.manifest["hash"]
    differing = {key for key in first.manifest if first.manifest[key] != again.manifest[key]}
    assert differing <= {"clock"}


def test_a_finished_run_is_opened_and_not_trained_again(dataset, tmp_path):
    first = run(dataset, tmp_path / "run")
    assert run(dataset, tmp_path / "run").manifest == first.manifest


def test_another_recipe_does_not_overwrite_a_run(dataset, tmp_path):
    run(dataset, tmp_path / "run")
    with pytest.raises(RecsysError, match="another recipe or data set"):
        run(dataset, tmp_path / "run", seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(RecsysError, match="holds other files"):
        run(dataset, tmp_path / "mine")


def test_mlflow_has_the_settings_the_curve_the_data_and_the_model(dataset, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    tracking = Tracking(TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    model = run(dataset, tmp_path / "run", tracking)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.get_run(tracking.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.epochs"] == "2"
    assert found.data.tags["dataset.sha256"] == dataset.manifest["hash"]
    assert found.inputs.dataset_inputs[0].dataset.digest == dataset.manifest["hash"][:36]
    curve = client.get_metric_history(tracking.run_id, "validation_ndcg_at_10")
    assert [point.step for point in curve] == [1, 2]
    assert max(point.value for point in curve) == model.manifest["quality"]["validation"]["ndcg@10"]
    assert {file.path for file in client.list_artifacts(tracking.run_id)} == {"curve.jsonl", "manifest.json"}


def test_a_run_goes_on_in_its_own_store_with_other_settings_that_do_not_decide(dataset, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    first = Tracking(TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    settings = recipe() | {"index": {"kind": "exact"}}
    arguments = {"name": "small", "device": torch.device("cpu")}

    def cut(seen):
        if seen.validation is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(dataset, settings, tmp_path / "run", tracking=first, observe=cut, **arguments)
    elsewhere = Tracking(TrackingSettings(uri=f"sqlite:///{tmp_path}/other.db"))
    train(dataset, settings | {"index": {"kind": "hnsw"}}, tmp_path / "run", tracking=elsewhere, **arguments)
    assert elsewhere.address == first.address
    assert mlflow.MlflowClient(first.uri).get_run(first.run_id).info.status == "FINISHED"
    assert not (tmp_path / "other.db").exists()


def command(dataset: Dataset, out: Path) -> list[str]:
    changes = [part for setting in (*SETTINGS, "tracking.uri=off") for part in ("--set", setting)]
    return [sys.executable, "-m", "recsys", "train", "tiny", "--dataset", str(dataset.path), "--out", str(out), *changes]


def test_kill_9_and_the_same_command_again_end_with_the_weights_of_an_undisturbed_run(dataset, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command(dataset, tmp_path / "calm"), check=True, env=environment)
    killed = 0
    for _ in range(3):
        process = subprocess.Popen(command(dataset, tmp_path / "killed"), env=environment)
        checkpoint, before = tmp_path / "killed" / "checkpoint.pt", None
        if checkpoint.exists():
            before = checkpoint.stat().st_mtime_ns
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns != before):
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed
    subprocess.run(command(dataset, tmp_path / "killed"), check=True, env=environment)
    calm, resumed = (load_file(tmp_path / name / "model" / "weights.safetensors") for name in ("calm", "killed"))
    assert all(torch.equal(calm[name], resumed[name]) for name in calm)
    assert (tmp_path / "calm" / "curve.jsonl").read_bytes() == (tmp_path / "killed" / "curve.jsonl").read_bytes()
