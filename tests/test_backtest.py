"""The back-test: windows of time, each judged by what came before it, and taken up where it was left."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.dataset import Dataset
from features.split import DAY
from recsys.command.backtest import METRICS, windows_of
from recsys.errors import DataError, RequestError

Run = Callable[..., int]
DAYS, VALIDATION = 23, 5


def words(world: Path, out: Path, *more: object) -> list[object]:
    settings = ("--windows", 2, "--days", DAYS, "--set", f"split.validation_days={VALIDATION}", "--set", "train.epochs=1")
    return ["backtest", world / "small.toml", "--dataset", world / "dataset", "--out", out, *settings, "--json", *more]


@pytest.fixture(scope="module")
def tested(world: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backtest") / "out"
    assert run(*words(world, out)) == 0
    return out


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "backtest.json").read_text())
    return found


def test_each_window_learns_what_came_before_it_and_is_judged_by_nothing_later(world: Path, tested: Path) -> None:
    last = Dataset.open(world / "dataset").events.select(pl.max("timestamp")).collect().item()
    windows = [Dataset.open(path) for path in sorted((tested / "datasets").iterdir())]
    starts = [data.manifest["settings"]["split"]["test_start"] for data in windows]
    assert starts == [last + 1 - 2 * DAYS * DAY, last + 1 - DAYS * DAY]
    for start, data, run in zip(starts, windows, sorted((tested / "runs").iterdir()), strict=True):
        manifest = json.loads((run / "model" / "manifest.json").read_text())
        assert manifest["dataset"]["hash"] == data.manifest["hash"]
        assert manifest["dataset"]["learnt_until"] == data.sequences.learnt_until < start - VALIDATION * DAY
        assert int(data.sequences.times.max()) < start + DAYS * DAY
    assert windows[0].manifest["counts"]["after"] > windows[1].manifest["counts"]["after"] == 0


def test_means_and_deviations_are_those_of_the_windows(tested: Path) -> None:
    found = read(tested)
    lines = found["windows"]
    assert [line["users"] > 0 for line in lines] == [True, True]
    assert lines[0]["from"] < lines[0]["to"] <= lines[1]["from"] < lines[1]["to"]
    for name in METRICS:
        values = [line[name] for line in lines]
        assert found["model"][name] == {"mean": statistics.fmean(values), "deviation": statistics.stdev(values)}
    assert found["beaten"] == sum(line["ndcg@10"] > line["baseline ndcg@10"] for line in lines)


def test_what_is_finished_is_not_done_again_and_what_is_lost_is(
    world: Path, run: Run, tested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(tested, tmp_path / "out")
    (out / "backtest.json").unlink()
    capsys.readouterr()
    assert run(*words(world, out)) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == read(out) == read(tested)
    assert "epoch" not in shown.err and "users" not in shown.err
    shutil.rmtree(sorted((out / "runs").iterdir())[0])
    next(iter((out / "figures").iterdir())).unlink()
    assert run(*words(world, out)) == 0
    assert capsys.readouterr().err.count("epoch 1:") == 1
    assert read(out) == read(tested)


def test_a_folder_of_anything_else_is_refused_before_any_work(
    world: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(world / "run", tmp_path / "run")
    before = sorted(out.rglob("*"))
    capsys.readouterr()
    assert run(*words(world, out)) == 2
    assert capsys.readouterr().err == f"recsys: {out}: exists and is no earlier back-test; give another folder with --out\n"
    assert sorted(out.rglob("*")) == before


def test_one_window_has_a_mean_and_no_deviation(
    world: Path, run: Run, tested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(tested, tmp_path / "out")
    capsys.readouterr()
    assert run(*[word for word in words(world, out, "--windows", 1) if word != "--json"]) == 0
    last, found = capsys.readouterr().out.splitlines()[-1], read(out)
    sides = [
        ", ".join(f"{name} {found[lister][name]['mean']:.4f} ± –" for name in METRICS) for lister in ("model", "best baseline")
    ]
    assert last == f"{out}: {sides[0]}; the best baseline {sides[1]}, beaten in {found['beaten']} of 1 windows"
    assert [found[lister][name]["deviation"] for lister in ("model", "best baseline") for name in METRICS] == [None] * 4


def test_windows_that_reach_behind_the_data_are_refused(world: Path) -> None:
    data = Dataset.open(world / "dataset")
    with pytest.raises(DataError, match=r"100 windows of 14 days and 14 of validation take 1414 days, its events \d+"):
        windows_of(data, 100, 14, 14)
    with pytest.raises(RequestError, match="0 windows of 3 days"):
        windows_of(data, 0, 3, 14)


def test_held_out_users_are_judged_by_a_model_that_learnt_of_others(
    world: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    way = ("--set", "split.method=user_holdout", "--set", "split.holdout_one_in=5")
    assert run("resplit", world / "dataset", "--out", tmp_path / "dataset", *way) == 0
    data = Dataset.open(tmp_path / "dataset")
    counts = data.manifest["counts"]
    assert f"{counts['history']:,} history" in capsys.readouterr().out
    assert run("train", world / "small.toml", "--dataset", data.path, "--out", tmp_path / "run") == 0
    manifest = json.loads((tmp_path / "run" / "model" / "manifest.json").read_text())
    assert manifest["quality"]["validation"]["ndcg@10"] > 0
    assert manifest["recipe"]["split"]["holdout_one_in"] == 5
    capsys.readouterr()
    assert run("evaluate", tmp_path / "run", "--dataset", data.path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["users"] == counts["test"] < 100
