"""Runs and bundles are recorded in a real SQLite store; with tracking off nothing is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

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
        children = {state: parent.another(nested=True) for state in wanted}
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


def test_the_champion_is_the_first_bundle_and_what_is_made_of_it_and_the_store_holds_all_files(settings, client, tmp_path):
    numbers, champions = [], []
    for identity, before in (("one", ""), ("two", ""), ("three", "two"), ("four", "one"), ("five", "four")):
        bundle = tmp_path / identity
        bundle.mkdir()
        (bundle / "weights").write_text(identity)
        tracking = Tracking(settings)
        with tracking.run(identity):
            numbers.append(tracking.register(bundle, identity, before))
        found = client.get_model_version("films", numbers[-1])
        assert (found.run_id, found.tags["bundle"]) == (tracking.run_id, identity)
        assert (artifacts(found.source) / "weights").read_text() == identity
        champions.append(tracking.champion())
        assert champions[-1] == str(client.get_model_version_by_alias("films", "champion").version)
    assert numbers == ["1", "2", "3", "4", "5"]
    assert champions == ["1", "1", "1", "4", "5"]


@pytest.fixture
def registered(settings: TrackingSettings, request: pytest.FixtureRequest, tmp_path: Path) -> TrackingSettings:
    """Settings of a registered model of the test's own, of which versions 1 to 3 became champion one after the other."""
    own = replace(settings, model=request.node.name[-40:].replace("[", "-").replace("]", ""))
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "weights").write_text("seven")
    tracking = Tracking(own)
    with tracking.run("three"):
        assert [tracking.register(tmp_path / "bundle", name) for name in ("one", "two", "three")] == ["1", "2", "3"]
    for version in ("2", "3"):
        tracking.promote(version)
    return own


def champion(settings: TrackingSettings) -> str:
    (found,) = [str(entry["version"]) for entry in Tracking(settings).versions() if "champion" in entry["aliases"]]
    return found


def nothing_left(settings: TrackingSettings) -> None:
    before = champion(settings)
    with pytest.raises(SetupError, match=f"nothing to roll back to, no version was champion before {before}") as refused:
        Tracking(settings).rollback()
    assert "\n" not in str(refused.value)
    assert champion(settings) == before


def test_rollbacks_in_a_row_step_back_through_all_that_was_champion(registered):
    tracking = Tracking(registered)
    tracking.promote("1")
    tracking.promote("2")
    found = []
    for _ in range(4):
        found.append(tracking.rollback())
        assert champion(registered) == found[-1]
    assert found == ["1", "3", "2", "1"]
    nothing_left(registered)


def test_what_was_rolled_back_is_no_past_and_what_is_promoted_after_it_has_one(registered):
    tracking = Tracking(registered)
    assert tracking.rollback() == "2"
    tracking.promote("3")
    tracking.promote("3")
    assert [tracking.rollback(), tracking.rollback()] == ["2", "1"]
    nothing_left(registered)


def test_a_version_that_was_deleted_is_stepped_over(registered, client):
    client.delete_model_version(registered.model, "2")
    assert Tracking(registered).rollback() == "1"
    nothing_left(registered)


def test_a_promotion_that_broke_off_between_its_two_steps_is_not_rolled_back_to(registered):
    tracking = Tracking(registered)
    tracking._remember(["1", "2", "3"])  # and the alias did not move
    assert tracking.rollback() == "2"
    tracking._remember(["1", "2"])
    tracking.promote("3")
    assert [tracking.rollback(), tracking.rollback()] == ["2", "1"]
    nothing_left(registered)


def test_an_alias_remembers_its_latest_versions(registered, client, monkeypatch):
    monkeypatch.setattr("recsys.tracking.REMEMBERED", 5)
    tracking = Tracking(registered)
    for version in ("1", "2", "1", "2", "1"):
        tracking.promote(version)
    told = client.get_registered_model(registered.model).tags["champion.before"].split(",")
    assert told == ["3", "1", "2", "1", "2"]


def test_a_name_is_resolved_to_a_version_and_the_place_of_its_files(registered, folder):
    tracking = Tracking(registered)
    assert tracking.resolve("champion") == tracking.resolve("3")
    version, source = tracking.resolve("2")
    assert version == "2"
    place = tracking.fetch(source, folder / "never")
    assert (place / "weights").read_text() == "seven"
    assert place.is_relative_to(folder / "mlartifacts")
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda tracking: tracking.promote("7"), "has no version 7 of model"),
        (lambda tracking: tracking.resolve("7"), "has no version 7 of model"),
        (lambda tracking: tracking.resolve("challenger"), "has no alias challenger of model"),
        (lambda tracking: Tracking(replace(tracking.settings, model="none")).rollback(), "has no model none"),
        (lambda tracking: Tracking(replace(tracking.settings, model="none")).resolve("1"), "has no version 1 of model none"),
        (lambda tracking: Tracking(TrackingSettings(uri="off")).promote("1"), "tracking is off, and so is the registry"),
        (lambda tracking: tracking.decided("7", {"decision": "promoted"}), "has no version 7 of model"),
    ],
    ids=range(7),
)
def test_what_the_registry_does_not_have_is_one_line(registered, act, said):
    with pytest.raises(SetupError, match=said) as refused:
        act(Tracking(registered))
    assert "\n" not in str(refused.value)
    assert champion(registered) == "3"


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The URL of an artifact store that serves tmp_path/store as MLflow's server does, and the paths that were asked for."""
    store, asked = tmp_path / "store", []
    root = "/api/2.0/mlflow-artifacts/artifacts"

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(store))

        def do_GET(self) -> None:
            path = urlsplit(self.path)
            asked.append(path.path.removeprefix(root))
            if path.path != root:
                self.path = asked[-1]
                return super().do_GET()
            folder = store / parse_qs(path.query)["path"][0]
            if not folder.exists():
                return self.send_error(404)
            found = sorted(folder.iterdir()) if folder.is_dir() else []
            files = [{"path": each.name, "is_dir": each.is_dir(), "file_size": each.stat().st_size} for each in found]
            body = json.dumps({"files": files}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}{root}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_files_of_another_machine_are_downloaded_once_and_whole(settings, remote, tmp_path):
    url, asked = remote
    (tmp_path / "store" / "bundles" / "one").mkdir(parents=True)
    for name in ("weights", "items"):
        (tmp_path / "store" / "bundles" / "one" / name).write_text(name * 5)
    place = Tracking(settings).fetch(f"{url}/bundles/one", tmp_path / "cache" / "one")
    assert place == tmp_path / "cache" / "one"
    assert {path.name: path.read_text() for path in place.iterdir()} == {"weights": "weights" * 5, "items": "items" * 5}
    assert list((tmp_path / "cache").iterdir()) == [place]
    asked.clear()
    assert Tracking(settings).fetch(f"{url}/bundles/one", place) == place
    assert asked == []


def test_files_that_do_not_arrive_are_one_line_and_leave_nothing(settings, remote, tmp_path):
    url, _ = remote
    with pytest.raises(SetupError, match="does not arrive in") as refused:
        Tracking(settings).fetch(f"{url}/bundles/none", tmp_path / "cache" / "none")
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_command_lists_promotes_and_rolls_back(registered, run, capsys):
    where = ("--set", f"tracking.uri={registered.uri}", "--set", f"tracking.model={registered.model}")
    assert run("bundles", "list", *where, "--json") == 0
    assert [(entry["version"], entry["bundle"]) for entry in json.loads(capsys.readouterr().out)] == [
        *((3, "three"), (2, "two"), (1, "one")),
    ]
    assert run("bundles", "promote", 1, *where) == 0
    assert capsys.readouterr().out == "version 1 is champion\n"
    assert champion(registered) == "1"
    assert [entry["decision"] for entry in Tracking(registered).versions()] == ["", "", "by hand"]
    assert run("bundles", "rollback", *where, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"version": 3}
    assert run("bundles", "promote", 7, *where) == 2
    assert f"recsys: MLflow at {registered.uri} has no version 7 of model {registered.model}" in capsys.readouterr().err
    assert run("bundles", "rollback", "--set", "model.blocks=3") == 2
    assert "this verb reads [tracking] alone" in capsys.readouterr().err
    assert run("bundles", "list", *where) == 0
    assert "champion" in capsys.readouterr().out


def test_what_was_decided_stands_on_the_version_and_its_evidence_with_its_run(registered, client, tmp_path):
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "decision.json").write_text("{}")
    tracking = Tracking(registered)
    tracking.decided("2", {"decision": "refused", "ndcg@10": "0.25"}, tmp_path / "evidence")
    found = client.get_model_version(registered.model, "2")
    assert {name: text for name, text in found.tags.items() if name != "bundle"} == {
        "promotion.decision": "refused",
        "promotion.ndcg_at_10": "0.25",
    }
    root = artifacts(client.get_run(found.run_id).info.artifact_uri)
    assert [file.name for file in (root / "promotion" / "2").iterdir()] == ["decision.json"]
    assert [entry["decision"] for entry in tracking.versions()] == ["", "refused", ""]


def test_there_is_no_champion_where_nothing_is_registered_or_tracking_is_off(registered):
    assert Tracking(registered).champion() == "3"
    assert Tracking(replace(registered, model="none")).champion() == ""
    assert Tracking(TrackingSettings(uri="off")).champion() == ""


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
