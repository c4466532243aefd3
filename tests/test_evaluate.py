"""The verb `evaluate`: a report that MLflow keeps, lists of other programs, refusals."""

import json
import shutil

import pytest

from features.synthetic import SyntheticSettings, write
from recsys.tracking import Tracking, TrackingSettings


@pytest.fixture(scope="module")
def report(world, run, tmp_path_factory):
    """Of the bundle; its MLflow store is off, as the world's runs are."""
    out = tmp_path_factory.mktemp("report") / "bundle"
    assert run("evaluate", world / "bundle", "--dataset", world / "dataset", "--out", out) == 0
    return out


def test_lists_of_another_program_have_the_figures_of_the_bundle_that_made_them(world, run, report, capsys):
    capsys.readouterr()
    assert run("evaluate", report / "lists.parquet", "--dataset", world / "dataset", "--json") == 0
    given = json.loads(capsys.readouterr().out)
    own = json.loads((report / "report.json").read_text())
    assert given["bundle"] != own["bundle"]
    assert given["listers"] == {name: kind for name, kind in own["listers"].items() if kind != "stage"}
    for name, figure in given["figures"]["model"].items():
        assert figure == pytest.approx(own["figures"]["model"][name]), name
    assert own["protocol"]["name"] == "own"
    assert own["leaks"]["found"] == []


def test_the_report_is_told_verdict_first_with_intervals(world, run, capsys):
    capsys.readouterr()
    assert run("evaluate", world / "run", "--dataset", world / "dataset", "--set", "protocol.split=validation") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("The model ")
    assert "targets are the distinct items of the validation" in lines[1]
    assert any("item-kNN" in line and "[" in line for line in lines)


def test_mlflow_keeps_figures_and_the_report_of_a_registered_run(world, run, tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    words = ("--dataset", world / "dataset", "--set", f"tracking.uri={store}", "--set", "train.epochs=1")
    assert run("train", world / "small.toml", *words, "--out", tmp_path / "run") == 0
    for out in ((), ("--out", tmp_path / "report")):
        assert run("evaluate", tmp_path / "run", "--dataset", world / "dataset", *out) == 0
    client = Tracking(TrackingSettings(uri=store))._mlflow().MlflowClient()
    run_id = json.loads((tmp_path / "run" / "run.json").read_text())["tracking"]["run_id"]
    told = json.loads((tmp_path / "report" / "report.json").read_text())
    metrics = client.get_run(run_id).data.metrics
    assert metrics["test_ndcg_at_10"] == told["figures"]["model"]["ndcg@10"]["mean"]
    assert metrics["test_coverage_at_10"] == told["figures"]["model"]["coverage@10"]["mean"]
    assert {file.path for file in client.list_artifacts(run_id)} >= {"report_test.json", "report_test"}
    assert "report_test/report.html" in {file.path for file in client.list_artifacts(run_id, "report_test")}


def test_a_model_of_other_data_is_refused_unless_told_to_judge_despite_it(world, run, tmp_path, capsys):
    write(SyntheticSettings(users=97, items=101, events_per_user=13, seed=1), tmp_path / "raw")
    assert run("features", world / "small.toml", "--data", tmp_path / "raw", "--out", tmp_path / "other") == 0
    capsys.readouterr()
    assert run("evaluate", world / "bundle", "--dataset", tmp_path / "other", "--out", tmp_path / "report") == 3
    shown = capsys.readouterr()
    assert "the model learnt from another data set" in shown.err
    assert "Traceback" not in shown.err
    assert not (tmp_path / "report").exists()
    words = ("--dataset", tmp_path / "other", "--out", tmp_path / "report", "--despite-leaks")
    assert run("evaluate", world / "bundle", *words) == 0
    assert "LEAKS were found (model)" in capsys.readouterr().out
    assert json.loads((tmp_path / "report" / "report.json").read_text())["leaks"]["found"] == ["model"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--protocol", "P1"), "P1 is for data sets with data.source = 'ml-1m' (this has 'files')"),
        (("--protocol", "P9"), "P9"),
        (("--set", "protocol.targets=all"), "filter_seen = false"),
        (("--set", "protocol.candidates=cold"), "keeps no item cold"),
        (("--set", "train.epochs=3"), "this verb reads"),
    ],
)
def test_what_cannot_be_judged_is_one_line(words, says, world, run, capsys):
    capsys.readouterr()
    assert run("evaluate", world / "run", "--dataset", world / "dataset", *words) == 2
    told = capsys.readouterr().err.splitlines()
    assert says in told[-1]
    assert told[-1].startswith("recsys: ")


def test_a_report_takes_no_place_of_anything_else(world, run, capsys):
    before = {path: path.read_bytes() for path in (world / "run").rglob("*") if path.is_file()}
    assert run("evaluate", world / "run", "--dataset", world / "dataset", "--out", world / "run") == 2
    assert "is no report; name another directory" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (world / "run").rglob("*") if path.is_file()} == before


def test_a_file_that_is_no_table_of_lists_is_one_line(world, run, tmp_path, capsys):
    shutil.copy(world / "small.toml", tmp_path / "lists.parquet")
    assert run("evaluate", tmp_path / "lists.parquet", "--dataset", world / "dataset") == 2
    assert "cannot be read as Parquet" in capsys.readouterr().err.splitlines()[-1]
