"""A run that is made again has the same figures and bytes; whatever was changed of what is stored is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from features.synthetic import SyntheticSettings, write
from recsys.bundle import MANIFEST, entry, open_directory, seal
from recsys.command.reproduce import Reproduction, Row
from recsys.model import WEIGHTS
from training.run import run_key

RANKER = ("ranker.blocks=1", "ranker.width=14", "ranker.span=16", "ranker.candidates=41", "ranking.epochs=1")


@pytest.fixture(scope="module")
def tracked(world, run, tmp_path_factory) -> Path:
    """A folder with a run, its bundle, another run that differs by the seed, and the MLflow store that holds them."""
    folder = tmp_path_factory.mktemp("tracked")
    uri = ("--set", f"tracking.uri=sqlite:///{folder}/mlflow.db")
    words = ("train", world / "small.toml", "--dataset", world / "dataset", *uri)
    assert run(*words, "--out", folder / "run") == 0
    assert run(*words, "--out", folder / "seven", "--set", "train.seed=7") == 0
    assert run("export", folder / "run", "--out", folder / "bundle", "--dataset", world / "dataset") == 0
    return folder


@pytest.fixture
def reproduce(run, capsys) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """reproduce(word, …) → exit code, what it prints as JSON, and what it says of the user's mistake or of the verdict."""

    def reproduced(*words: object) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        code = run("reproduce", *words, "--json")
        shown = capsys.readouterr()
        said = [line for line in shown.err.splitlines() if line.startswith("recsys: ")]
        return code, json.loads(shown.out or "{}") | {"trained": "epoch 1:" in shown.err}, "\n".join(said)

    return reproduced


def differing(found: dict[str, Any]) -> list[str]:
    return [row["what"] for row in found["rows"] if row["agrees"] is False]


def compared(found: dict[str, Any]) -> set[str]:
    return {row["what"] for row in found["rows"] if row["agrees"]}


def test_a_run_is_reproduced_byte_for_byte_and_leaves_no_trace_in_mlflow(tracked, run, capsys):
    client = mlflow.MlflowClient(f"sqlite:///{tracked}/mlflow.db")
    there = sorted(path for path in tracked.rglob("*") if "mlflow.db" not in path.name)
    runs = len(client.search_runs(["0", "1"]))
    capsys.readouterr()
    assert run("reproduce", tracked / "run") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "reproduced: figures and bytes agree"
    for what in ("recipe, MLflow", "recipe, run.json", "validation, the weights", "validation ndcg@10", "weights.safetensors"):
        assert what in out
    assert "│ no" not in out
    assert len(client.search_runs(["0", "1"])) == runs
    assert sorted(path for path in tracked.rglob("*") if "mlflow.db" not in path.name) == there


def test_a_registered_bundle_is_reproduced_with_its_index_and_all_that_was_measured_of_it(tracked, reproduce):
    uri = ("--set", f"tracking.uri=sqlite:///{tracked}/mlflow.db")
    for word in ("models:/recsys@champion", "models:/recsys/1"):
        code, found, _ = reproduce(word, *uri)
        assert (code, found["kind"], found["verdict"]) == (0, "bundle", "reproduced: figures and bytes agree")
    files = set(open_directory(tracked / "bundle").manifest["files"])
    assert files | {"index recall@100", "faithfulness histories", "learning curve, MLflow"} <= compared(found)
    assert {row["what"]: row["now"] for row in found["rows"]}["id"] == "the same in all it says"


def test_a_ranker_is_reproduced_also_where_its_model_was_taken_from_another_run(world, tracked, run, reproduce, tmp_path):
    words = ["train", world / "small.toml", "--dataset", world / "dataset", "--out", tmp_path / "ranked"]
    uri = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    changes = [word for change in (*RANKER, uri) for word in ("--set", change)]
    assert run(*words, "--model", tracked / "run", *changes) == 0
    code, found, _ = reproduce(tmp_path / "ranked")
    assert (code, found["verdict"]) == (0, "reproduced: figures and bytes agree")
    assert {"ranker.safetensors", WEIGHTS, "ranker best_epoch", "ranker's curve loss (1 values)"} <= compared(found)
    assert not any(row["what"].startswith("model's curve") for row in found["rows"])
    (base,) = (row for row in found["rows"] if row["what"] == "base")
    assert base["stored"] == open_directory(tracked / "run" / "model").manifest["id"]
    assert (base["agrees"], found["trained"]) == (None, True)


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def resealed(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Write a manifest anew whose hash, id and SHA-256 fit whatever was changed."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    seal(folder, {file: entry(folder / file) for file in manifest["files"]}, manifest)


def seed_of_one(content: dict[str, Any]) -> None:
    content["recipe"]["train"]["seed"] = 1


def better(manifest: dict[str, Any]) -> None:
    manifest["quality"]["validation"]["ndcg@10"] = 0.75


def seed_in_run_json(run: Path) -> None:
    edited(run / "run.json", seed_of_one)


def seed_in_the_manifest(run: Path) -> None:
    edited(run / "model" / MANIFEST, seed_of_one)


def seed_wherever_files_say_it(run: Path) -> None:
    def keyed(content: dict[str, Any]) -> None:
        seed_of_one(content)
        content["key"] = run_key(content["recipe"], open_directory(run / "model", verify=False).manifest["dataset"]["hash"])

    edited(run / "run.json", keyed)
    resealed(run / "model", seed_of_one)


def a_setting_left_out(run: Path) -> None:
    edited(run / "run.json", lambda content: content["recipe"]["train"].pop("patience"))


def key_of_another(run: Path) -> None:
    edited(run / "run.json", lambda content: content.update(key="0" * 64))


def another_data_set(run: Path) -> None:
    resealed(run / "model", lambda manifest: manifest["dataset"].update(hash="0" * 64))


def other_weights(run: Path) -> None:
    shutil.copyfile(run.parent / "seven" / "model" / WEIGHTS, run / "model" / WEIGHTS)


def other_weights_with_their_hash(run: Path) -> None:
    other_weights(run)
    resealed(run / "model")


def other_weights_in_the_list_of_files(run: Path) -> None:
    other_weights(run)
    edited(run / "model" / MANIFEST, lambda manifest: manifest["files"].update({WEIGHTS: entry(run / "model" / WEIGHTS)}))


def a_better_figure(run: Path) -> None:
    edited(run / "model" / MANIFEST, better)


def a_better_figure_with_its_id(run: Path) -> None:
    resealed(run / "model", better)


def a_better_figure_wherever_files_say_it(run: Path) -> None:
    def best(manifest: dict[str, Any]) -> None:
        better(manifest)
        manifest["curve"][manifest["best_epoch"] - 1]["ndcg@10"] = 0.75
        (run / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in manifest["curve"]))

    resealed(run / "model", best)


def another_mlflow_run(run: Path) -> None:
    edited(run / "model" / MANIFEST, lambda manifest: manifest["clock"]["tracking"].update(uri="off"))


@pytest.fixture
def copied(tracked, tmp_path) -> Path:
    """A copy of the run, with the other one beside it."""
    for name in ("run", "seven"):
        shutil.copytree(tracked / name, tmp_path / name)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (seed_in_run_json, ["train.seed: 0 in the manifest, 1 in run.json", "key: "]),
        (seed_in_the_manifest, ["train.seed: 1 in the manifest, 0 in run.json", "1 in the manifest, 0 in MLflow", "id: "]),
        (seed_wherever_files_say_it, ["itself: train.seed: 1 in the manifest, 0 in MLflow"]),
        (a_setting_left_out, ["train.patience: 5 in the manifest, nothing in run.json"]),
        (key_of_another, ["key: ", "000000000000 in run.json"]),
        (another_data_set, ["data set: 000000000000 in the manifest", "in MLflow"]),
        (other_weights, ["weights.safetensors: ", "in the file"]),
        (other_weights_in_the_list_of_files, ["hash: ", "in the list of files", "id: "]),
        (a_better_figure, ["validation ndcg@10: 0.75 in the manifest", "in the learning curve", "id: "]),
        (a_better_figure_with_its_id, ["validation ndcg@10: 0.75 in the manifest", "in the learning curve"]),
        (a_better_figure_wherever_files_say_it, ["validation_ndcg_at_10 of epoch ", ": 0.75 in the manifest", "in MLflow"]),
        (another_mlflow_run, ["MLflow's run: ", "at off in the manifest"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_was_changed_is_named_and_nothing_is_trained(tamper, says, copied, reproduce):
    tamper(copied)
    code, found, said = reproduce(copied)
    assert (code, found["reproduced"], found["trained"]) == (3, False, False)
    assert said == f"recsys: {found['verdict']}"
    assert said.startswith("recsys: not reproduced: what is stored differs from itself: ")
    for words in says:
        assert words in said


def test_other_weights_are_known_by_their_figures_whatever_the_manifest_says_of_their_bytes(copied, reproduce):
    other_weights_with_their_hash(copied)
    code, found, said = reproduce(copied)
    assert (code, found["trained"]) == (3, False)
    assert "validation ndcg@10: " in said and " in the weights" in said


@pytest.fixture
def alone(world, tmp_path) -> Path:
    """A copy of a run that MLflow knows nothing of."""
    shutil.copytree(world / "run", tmp_path / "run")
    return tmp_path / "run"


def test_a_lie_that_is_consistent_is_found_by_training_again(alone, reproduce):
    quality = open_directory(alone / "model").manifest["quality"]["validation"]["ndcg@10"]
    seed_wherever_files_say_it(alone)
    code, found, said = reproduce(alone)
    assert (code, found["trained"]) == (3, True)
    assert "not reproduced: validation recall@10 " in said
    assert f"validation ndcg@10 {quality:.6g} stored, " in said
    assert WEIGHTS in differing(found)


def test_an_unknown_setting_is_the_users_mistake(alone, reproduce):
    resealed(alone / "model", lambda manifest: manifest["recipe"]["train"].update(sed=1))
    code, _, said = reproduce(alone)
    assert (code, said) == (2, "recsys: recipe small: unknown key train.sed; did you mean seed?")


def test_what_is_no_run_is_refused(world, alone, reproduce):
    for place in (world / "raw", world / "dataset"):
        code, _, said = reproduce(place)
        assert code == 2 and "no manifest.json" in said
    (alone / "run.json").write_text("[1]")
    code, _, said = reproduce(alone)
    assert code == 2 and "run.json" in said and said.count("\n") == 0


def test_a_store_that_is_gone_is_told_and_the_run_reproduced_without_it(copied, tracked, reproduce):
    gone = {"uri": f"sqlite:///{copied}/gone.db", "run_id": "0" * 32}
    edited(copied / "run.json", lambda content: content.update(tracking=gone))
    edited(copied / "model" / MANIFEST, lambda manifest: manifest["clock"].update(tracking=gone))
    code, found, _ = reproduce(copied)
    (row,) = (row for row in found["rows"] if row["what"] == "MLflow")
    assert (code, row["agrees"]) == (0, None)
    assert "has no run" in row["now"]
    assert not (copied / "gone.db").exists()


def test_a_version_whose_files_are_of_another_bundle_is_named(tracked, reproduce, tmp_path):
    shutil.copytree(tracked, tmp_path / "store")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/store/mlflow.db")
    client.set_model_version_tag("recsys", "1", "bundle", "another")
    code, _, said = reproduce("models:/recsys/1", "--set", f"tracking.uri=sqlite:///{tmp_path}/store/mlflow.db")
    assert code == 3
    assert "another in MLflow's version 1" in said


@pytest.fixture(scope="module")
def fewer(world, run, tmp_path_factory) -> Path:
    """A data set of fewer users, made by other settings."""
    folder = tmp_path_factory.mktemp("fewer")
    write(SyntheticSettings(users=199, items=101, events_per_user=13), folder / "raw")
    words = ("features", world / "small.toml", "--data", folder / "raw", "--out", folder / "dataset")
    assert run(*words, "--set", "split.cold_one_in=7") == 0
    return folder


def test_another_data_set_is_refused_in_one_line_that_says_what_differs(world, fewer, reproduce):
    code, _, said = reproduce(world / "run", "--dataset", fewer / "dataset")
    assert code == 2
    assert "is not the data set of the run (users 211 then, 199 here, " in said
    assert "split.cold_one_in 0 then, 7 here" in said
    assert said.count("\n") == 0


def test_a_data_set_that_is_gone_is_asked_for_and_built_of_the_raw_logs(world, fewer, run, reproduce, tmp_path):
    shutil.copytree(world / "dataset", tmp_path / "dataset")
    words = ("train", world / "small.toml", "--dataset", tmp_path / "dataset", "--out", tmp_path / "run")
    assert run(*words) == 0
    (tmp_path / "dataset").rename(tmp_path / "moved")
    code, _, said = reproduce(tmp_path / "run")
    place = tmp_path / "dataset"
    wanted = f"recsys: its data set lay in {place}; give it with --dataset, or the raw logs with --data"
    assert (code, said) == (2, wanted)
    for words in (("--dataset", tmp_path / "moved"), ("--data", world / "raw")):
        code, found, _ = reproduce(tmp_path / "run", *words)
        assert (code, found["verdict"]) == (0, "reproduced: figures and bytes agree")
    code, _, said = reproduce(tmp_path / "run", "--data", fewer / "raw")
    assert code == 2 and "users 211 then, 199 here" in said


def test_what_is_made_again_is_kept_where_it_is_asked_for_and_nowhere_else(world, alone, reproduce, tmp_path):
    code, found, _ = reproduce(world / "bundle", "--out", tmp_path / "again")
    assert (code, found["trained"]) == (0, True)
    first = open_directory(tmp_path / "again" / "bundle").manifest
    assert first["id"] == found["id"]
    code, found, _ = reproduce(world / "bundle", "--out", tmp_path / "again")
    assert (code, found["trained"]) == (0, False)
    code, _, said = reproduce(alone, "--out", alone.parent)
    assert (code, "is no earlier reproduction" in said) == (2, True)
    code, _, said = reproduce(alone, "--out", tmp_path / "again")
    assert (code, "of another run" in said) == (2, True)


def test_it_takes_as_many_threads_as_then_and_gives_them_back(alone, reproduce):
    edited(alone / "model" / MANIFEST, lambda manifest: manifest["clock"]["environment"].update(threads=2, torch="1.0"))
    code, found, _ = reproduce(alone)
    differing_around = [row for row in found["rows"] if row["part"] == "environment"]
    assert [(row["what"], row["stored"]) for row in differing_around] == [("torch", "1.0")]
    assert code == 0
    assert torch.get_num_threads() == 1


def test_of_a_bundle_that_was_changed_since_its_export_the_model_is_reproduced(world, run, reproduce, tmp_path):
    assert run("items", "remove", world / "bundle", "--item", "3", "--out", tmp_path / "fewer") == 0
    code, found, _ = reproduce(tmp_path / "fewer")
    assert (code, found["verdict"]) == (0, "reproduced: figures and bytes agree")
    assert [row["what"] for row in found["rows"] if row["part"] == "file"] == [WEIGHTS]
    assert any(row["now"] == "the model alone is compared" for row in found["rows"])


def test_a_report_that_mlflow_has_is_made_again(world, run, reproduce, tmp_path):
    uri = ("--set", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    assert run("train", world / "small.toml", "--dataset", world / "dataset", "--out", tmp_path / "run", *uri) == 0
    assert run("evaluate", tmp_path / "run", "--dataset", world / "dataset") == 0
    code, found, _ = reproduce(tmp_path / "run")
    assert (code, found["verdict"]) == (0, "reproduced: figures and bytes agree")
    assert {"test ndcg@10", "test recall@10"} <= compared(found)
    (report,) = (tmp_path / "mlartifacts").rglob("report_test.json")
    edited(report, lambda content: content["figures"]["model"]["ndcg@10"].update(mean=0.75))
    code, _, said = reproduce(tmp_path / "run")
    assert code == 3
    assert said.startswith("recsys: not reproduced: test ndcg@10 0.75 stored, ")


SAME = Row("environment", "environment", "torch 2", "the same", True)
OTHER = Row("environment", "torch", "1", "2", False)
UNKNOWN = Row("environment", "environment", "not recorded", "torch 2", None)
FIGURE, NEAR = (Row("figure", "validation ndcg@10", "0.1834", "0.1834", True, off) for off in (0.0, 1e-4))
OFF = Row("figure", "validation ndcg@10", "0.1834", "0.179", False, 0.0044)
FILE, CHANGED = (Row("file", WEIGHTS, "aa", now, now == "aa") for now in ("aa", "bb"))


@pytest.mark.parametrize(
    ("rows", "reproduced", "verdict"),
    [
        ([SAME, FIGURE, FILE], True, "reproduced: figures and bytes agree"),
        ([OTHER, FIGURE, FILE], True, "reproduced: figures and bytes agree"),
        ([SAME, FIGURE, CHANGED], False, f"not reproduced: figures agree, bytes differ in {WEIGHTS}, in the same environment"),
        ([OTHER, NEAR, CHANGED], True, f"figures agree to 1.0e-04, bytes differ in {WEIGHTS} (torch: 1 then, 2 now)"),
        ([OTHER, OFF, CHANGED], False, "not reproduced: validation ndcg@10 0.1834 stored, 0.179 found (torch: 1 then, 2 now)"),
        ([SAME, OFF, CHANGED], False, "not reproduced: validation ndcg@10 0.1834 stored, 0.179 found"),
        (
            [UNKNOWN, FIGURE, CHANGED],
            True,
            f"figures agree, bytes differ in {WEIGHTS} (environment: not recorded then, torch 2 now)",
        ),
    ],
)
def test_bytes_may_differ_in_another_environment_and_figures_nowhere(rows, reproduced, verdict):
    found = Reproduction("run", "model", "id", rows)
    assert (found.reproduced, found.verdict) == (reproduced, verdict)


def test_another_store_is_for_registered_bundles_alone(world, run, capsys):
    capsys.readouterr()
    assert run("reproduce", world / "run", "--set", "tracking.uri=off") == 2
    assert "--set tracking.uri is for models:/" in capsys.readouterr().err.splitlines()[-1]
