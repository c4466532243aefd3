"""Runs and bundles are recorded in a real SQLite store; with tracking off nothing is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
import pytest

from recsys.errors import SetupError
from recsys.tracking import Tracking, TrackingSettings

RECIPE = {"model": {"blocks": 3, "similarity": "dot"}, "train": {"blocks": 5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def settings(folder: Path) -> TrackingSettings:
    return TrackingSettings(uri=f"sqlite:///{folder / 'runs.db'}", experiment="films", model="films")


@pytest.fixture(scope="module")
def client(settings: TrackingSettings) -> Any:
    return mlflow.MlflowClient(settings.uri)


def artifacts(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))


def test_a_run_holds_its_settings_figures_and_files_and_ends_finished(settings, client, folder, tmp_path):
    (tmp_path / "curve.jsonl").write_text("{}")
    tracking = Tracking(settings)
    with tracking.run("first"):
        tracking.settings_of(RECIPE)
        tracking.metrics({"ndcg@10": 0.25, "loss": 7.0}, 1)
        tracking.metrics({"ndcg@10": 0.5}, 2)
        tracking.file(tmp_path / "curve.jsonl")
    run = client.get_run(tracking.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert client.get_experiment(run.info.experiment_id).name == "films"
    assert run.data.params == {"model.blocks": "3", "model.similarity": "dot", "train.blocks": "5"}
    assert {name: run.data.metrics[name] for name in ("ndcg_at_10", "loss")} == {"ndcg_at_10": 0.5, "loss": 7.0}
    history = client.get_metric_history(tracking.run_id, "ndcg_at_10")
    assert [(point.step, point.value) for point in history] == [(1, 0.25), (2, 0.5)]
    assert [found.path for found in client.list_artifacts(tracking.run_id)] == ["curve.jsonl"]
    assert artifacts(run.info.artifact_uri).is_relative_to(folder)


def test_children_say_how_they_ended_also_one_that_never_started(settings, client):
    parent = Tracking(settings)
    wanted = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
    with parent.run("search"):
        children = {state: parent.child() for state in wanted}
        for state, child in children.items():
            if state != "failed":
                with child.run(state):
                    child.metrics({"ndcg@10": 0.25})
            child.outcome(state, state, "a reason")
    for state, child in children.items():
        run = client.get_run(child.run_id)
        assert (run.info.run_name, run.info.status) == (state, wanted[state])
        assert (run.data.tags["outcome"], run.data.tags["reason"]) == (state, "a reason")
        assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert parent.at(None) is parent
    assert parent.at({"uri": "sqlite:///other.db", "run_id": "7"}).address == {"uri": "sqlite:///other.db", "run_id": "7"}


def test_a_run_names_its_data_set_with_the_whole_hash(settings, client):
    digest = "5c" * 32
    tracking = Tracking(settings)
    with tracking.run("data"):
        tracking.dataset("films", digest, "datasets/films", "{}")
    run = client.get_run(tracking.run_id)
    assert run.data.tags["dataset.sha256"] == digest
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.source) == ("films", "datasets/films")
    assert digest.startswith(used.dataset.digest)


def test_a_run_that_an_error_leaves_ends_failed(settings, client):
    tracking = Tracking(settings)
    with pytest.raises(ZeroDivisionError), tracking.run("broken"):
        tracking.metrics({"loss": 1 / 0})
    assert client.get_run(tracking.run_id).info.status == "FAILED"


def test_a_run_that_goes_on_is_the_same_run(settings, client):
    first = Tracking(settings)
    with pytest.raises(KeyboardInterrupt), first.run("long"):
        first.settings_of(RECIPE)
        raise KeyboardInterrupt
    second = Tracking(settings, first.run_id)
    with second.run("long"):
        second.settings_of(RECIPE)
        second.metrics({"loss": 3.0})
    assert second.run_id == first.run_id
    run = client.get_run(first.run_id)
    assert (run.info.status, run.data.metrics["loss"], len(run.data.params)) == ("FINISHED", 3.0, 3)


def test_the_champion_is_the_bundle_registered_last_and_the_store_holds_its_files(settings, client, tmp_path):
    numbers = []
    for identity in ("one", "two"):
        bundle = tmp_path / identity
        bundle.mkdir()
        (bundle / "weights").write_text(identity)
        tracking = Tracking(settings)
        with tracking.run(identity):
            numbers.append(tracking.register(bundle, identity))
        champion = client.get_model_version_by_alias("films", "champion")
        assert (str(champion.version), champion.run_id, champion.tags["bundle"]) == (numbers[-1], tracking.run_id, identity)
        assert (artifacts(champion.source) / "weights").read_text() == identity
    assert numbers == ["1", "2"]


def test_the_settings_come_before_the_environment_and_that_before_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///environment.db")
    assert Tracking(TrackingSettings(uri="sqlite:///settings.db")).uri == "sqlite:///settings.db"
    assert Tracking(TrackingSettings()).uri == "sqlite:///environment.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Tracking(TrackingSettings()).uri == f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_a_store_that_does_not_answer_is_one_line_that_names_it(tmp_path):
    uri = f"sqlite:///{tmp_path / 'file' / 'runs.db'}"
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError) as refused, Tracking(TrackingSettings(uri=uri)).run("never"):
        pass
    assert f"MLflow at {uri} does not answer" in str(refused.value)
    assert "\n" not in str(refused.value)


OFF = """
import os, sys
from pathlib import Path
from recsys.tracking import Tracking, TrackingSettings
sys.modules["mlflow"] = None
tracking = Tracking(TrackingSettings(uri=sys.argv[1]))
with tracking.run("nothing"):
    tracking.settings_of({"model": {"blocks": 3}})
    tracking.dataset("films", "5c", ".", "{}")
    tracking.metrics({"loss": 7.0})
    tracking.file(Path("nowhere"))
    assert tracking.register(Path("nowhere"), "one") == ""
assert tracking.run_id == "" and os.listdir() == []
"""


def run_without_mlflow(folder: Path, uri: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", OFF, uri], cwd=folder, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )


def test_tracking_that_is_off_needs_no_mlflow_and_leaves_nothing(tmp_path):
    run = run_without_mlflow(tmp_path, "off")
    assert run.returncode == 0, run.stderr


def test_tracking_without_mlflow_says_how_to_go_on(tmp_path):
    run = run_without_mlflow(tmp_path, "sqlite:///runs.db")
    assert "SetupError: mlflow does not load" in run.stderr.splitlines()[-1]
    assert run.stderr.splitlines()[-1].endswith("run `recsys doctor`, or set tracking.uri=off")


def test_a_run_whose_store_is_gone_is_an_error_and_no_new_store(tmp_path):
    tracking = Tracking(TrackingSettings(uri=f"sqlite:///{tmp_path}/gone.db"), run_id="0" * 32)
    with pytest.raises(SetupError, match="has no run"), tracking.run("again"):
        pass
    assert not (tmp_path / "gone.db").exists()
