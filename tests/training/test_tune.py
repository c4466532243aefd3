"""A search finds the better settings, remembers every trial, and never looks at the test."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from features.build import build
from features.dataset import Dataset
from features.synthetic import SyntheticSettings, write
from recsys.command import recipes as command
from recsys.config import Recipe, load_recipe
from recsys.errors import DataError, RecipeError, RecsysError
from recsys.tracking import OFF, Tracking, TrackingSettings
from training import tune as module
from training.tune import DEFAULT_SEARCH, Trial, TuneSettings, own_values, tune

RATES = {"optimizer": {"learning_rate": [1e-7, 1e-2]}}
MIXED = {
    "model": {"dropout": {"low": 0, "high": 0.7}, "length": {"low": 5, "high": 13}},
    "optimizer": {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("world")
    write(SyntheticSettings(users=211, items=101, events_per_user=13), folder / "raw")
    build(folder / "raw", Recipe("small", {"data": {"now": 1_800_000_000}}), folder / "dataset")
    return Dataset.open(folder / "dataset")


def small(search: Any, model: Any = None, **tuning: Any) -> Recipe:
    sections = {
        "data": {"now": 1_800_000_000},
        "model": {"embedding_size": 8, "blocks": 1, "hidden_size": 11, "length": 13, **(model or {})},
        "train": {"epochs": 2, "batch_tokens": 173},
        "optimizer": {"warmup_steps": 0, "learning_rate": 1e-7},
        "tune": {"trials": 3, "search": search, **tuning},
    }
    return Recipe("small", sections)


def search(dataset: Dataset, recipe: Recipe, out: Path, tracking: Tracking | None = None, **others: Any) -> list[Trial]:
    tracking = tracking or Tracking(TrackingSettings(uri=OFF))
    resolved = command.resolved(recipe)
    return tune(dataset, recipe, resolved, out, device=torch.device("cpu"), tracking=tracking, **others)


def by_number(trials: list[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: trial.number)


def stop_in_trial(number: int):
    """An observer that is interrupted at the first validation of a trial."""

    def observe(trial: Trial, of: int) -> None:
        if (trial.number, trial.state) == (number, "running"):
            raise KeyboardInterrupt

    return observe


def test_the_better_of_two_rates_is_found_and_the_recipe_of_it_trains(dataset, tmp_path, run, capsys):
    trials = search(dataset, small(RATES), tmp_path / "search")
    assert [trial.state for trial in trials] == ["complete"] * 3
    assert trials[0].values == {"optimizer.learning_rate": 1e-2}
    assert by_number(trials)[0].values == {"optimizer.learning_rate": 1e-7}, "the first trial is the recipe's own"
    assert trials[0].value > by_number(trials)[0].value
    best = tmp_path / "search" / "best.toml"
    assert tomllib.loads(best.read_text())["optimizer"] == {**small(RATES).sections["optimizer"], "learning_rate": 1e-2}
    assert (tmp_path / "search" / "search.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "search" / "trials").iterdir()] == [str(trials[0].number)]
    assert run("train", best, "--dataset", dataset.path, "--out", tmp_path / "run", "--set", "tracking.uri=off") == 0
    assert f"validation NDCG@10 {trials[0].value:.4f}" in capsys.readouterr().out


def test_an_interrupted_search_goes_on_within_its_trial_and_ends_as_an_undisturbed_one(dataset, tmp_path, monkeypatch):
    calm = search(dataset, small(MIXED, trials=4), tmp_path / "calm")
    for number in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            search(dataset, small(MIXED, trials=4), tmp_path / "cut", observe=stop_in_trial(number))
    told: list[Trial] = []
    cut = search(dataset, small(MIXED, trials=4), tmp_path / "cut", observe=lambda trial, of: told.append(trial))
    assert cut == calm
    assert {trial.number for trial in told} == {2, 3}
    monkeypatch.setattr(module, "train", None)
    assert search(dataset, small(MIXED, trials=4), tmp_path / "cut") == calm, "a finished search trains nothing"


def test_a_finished_search_goes_on_when_more_trials_are_asked_for(dataset, tmp_path):
    first = search(dataset, small(RATES, trials=1), tmp_path / "search")
    more = search(dataset, small(RATES, trials=2), tmp_path / "search")
    assert by_number(more)[:1] == first
    assert len(more) == 2


def test_values_that_were_tried_are_not_trained_again(dataset, tmp_path):
    running: list[int] = []
    observed = lambda trial, of: running.append(trial.number) if trial.state == "running" else None  # noqa: E731
    trials = by_number(search(dataset, small(RATES, trials=5), tmp_path / "search", observe=observed))
    assert len(trials) == 5
    assert len(set(running)) == 2
    for trial in trials:
        first = next(other for other in trials if other.values == trial.values)
        assert (trial.value, trial.state) == (first.value, first.state)
        assert trial.reason == ("" if trial is first else f"has the values of trial {first.number}")


def test_the_seed_decides_the_trials(dataset, tmp_path):
    def tried(out: str, seed: int) -> list[dict[str, Any]]:
        recipe = small(MIXED, trials=3, minutes=0)
        recipe = Recipe("small", {**recipe.sections, "train": {**recipe.sections["train"], "epochs": 1, "seed": seed}})
        return [trial.values for trial in by_number(search(dataset, recipe, tmp_path / out))]

    first = tried("a", 5)
    assert first == tried("b", 5) != tried("c", 7)
    assert len({str(values) for values in first}) == 3


def test_the_test_split_is_never_read(dataset, tmp_path):
    altered = Dataset(dataset.path, dataset.manifest)
    sequences = dataset.sequences
    begins, ends = sequences.windows("test")[1:]
    items = sequences.items.clone()
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        items[begin:end] = 10**6  # a row that no table has
    altered.__dict__["sequences"] = replace(sequences, items=items)
    assert search(altered, small(RATES), tmp_path / "altered") == search(dataset, small(RATES), tmp_path / "true")


def test_a_poor_trial_is_pruned_and_counted(dataset, tmp_path, monkeypatch):
    import optuna

    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda n_warmup_steps: optuna.pruners.ThresholdPruner(lower=0.1))
    trials = search(dataset, small(RATES), tmp_path / "search")
    assert {(trial.state, trial.values["optimizer.learning_rate"]) for trial in trials} == {
        ("complete", 1e-2),
        ("pruned", 1e-7),
    }
    first = by_number(trials)[0]
    assert (first.state, first.epoch, first.reason) == ("pruned", 1, "")
    assert len(trials) == 3


def test_a_combination_that_cannot_be_fails_with_its_reason_and_the_search_goes_on(dataset, tmp_path):
    trials = search(dataset, small({"model": {"heads": [1, 3]}}, trials=4), tmp_path / "search")
    failed = [trial for trial in trials if trial.state == "failed"]
    assert {trial.values["model.heads"] for trial in failed} == {3}
    assert "heads must divide embedding_size" in by_number(failed)[0].reason
    assert trials[0].state == "complete"
    with pytest.raises(RecsysError, match=r"no trial was completed; trial 0: .*heads must divide"):
        search(dataset, small({"model": {"heads": [3]}}, trials=1), tmp_path / "none")


def test_a_loss_that_is_no_number_fails_the_trial(dataset, tmp_path):
    trials = search(dataset, small({"optimizer": {"learning_rate": [1e-2, 1e38]}}), tmp_path / "search")
    assert {(trial.state, trial.values["optimizer.learning_rate"]) for trial in trials} == {
        ("complete", 1e-2),
        ("failed", 1e38),
    }
    assert "the loss became nan" in next(trial.reason for trial in by_number(trials) if trial.state == "failed")


def test_no_trial_starts_after_the_time_is_over_but_the_first(dataset, tmp_path):
    assert len(search(dataset, small(RATES, minutes=1e-9), tmp_path / "search")) == 1


def test_a_search_without_validation_ends_at_once(dataset, tmp_path):
    blind = Dataset(dataset.path, dataset.manifest)
    blind.__dict__["sequences"] = replace(dataset.sequences, validation_end=dataset.sequences.train_end)
    with pytest.raises(DataError, match="nobody can be judged"):
        search(blind, small(RATES), tmp_path / "search")


def test_a_directory_of_another_search_or_of_other_files_is_refused(dataset, tmp_path):
    search(dataset, small(RATES, trials=1), tmp_path / "search")
    with pytest.raises(RecsysError, match="another recipe, data set or device"):
        search(dataset, small(RATES, model={"blocks": 2}, trials=1), tmp_path / "search")
    with pytest.raises(RecsysError, match="another recipe, data set or device"):
        search(dataset, small({"optimizer": {"learning_rate": [1e-7]}}, trials=1), tmp_path / "search")
    other = Dataset(dataset.path, {**dataset.manifest, "hash": "0" * 64})
    with pytest.raises(RecsysError, match="another recipe, data set or device"):
        search(other, small(RATES, trials=1), tmp_path / "search")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(RecsysError, match="holds other files and no search"):
        search(dataset, small(RATES), tmp_path / "mine")
    (tmp_path / "search" / "study.db").write_text("no database")
    with pytest.raises(RecsysError, match=r"study\.db: cannot be read"):
        search(dataset, small(RATES, trials=1), tmp_path / "search")


def test_mlflow_has_the_trials_under_one_run(dataset, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    heads = {"model": {"heads": [1, 3]}}
    with pytest.raises(KeyboardInterrupt):
        search(dataset, small(heads), tmp_path / "s", Tracking(TrackingSettings(uri=store)), observe=stop_in_trial(0))
    trials = by_number(search(dataset, small(heads), tmp_path / "s", Tracking(TrackingSettings(uri=store))))
    assert {trial.state for trial in trials} == {"complete", "failed"}
    client = mlflow.MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("recsys").experiment_id])
    (parent,) = [found for found in runs if "mlflow.parentRunId" not in found.data.tags]
    children = sorted((found for found in runs if found is not parent), key=lambda found: found.info.run_name)
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert [child.info.run_name for child in children] == ["0", "1", "2"]
    assert [child.data.tags["outcome"] for child in children] == [trial.state for trial in trials]
    assert parent.info.status == "FINISHED"
    statuses = {"complete": "FINISHED", "failed": "FAILED"}
    assert [child.info.status for child in children] == [statuses[trial.state] for trial in trials]
    assert children[0].data.params["model.heads"] == "1"
    assert parent.data.params["tune.search.model.heads"] == "[1, 3]"
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"best.toml", "search.png"}


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({}, "search is empty"),
        ({"train": {}}, "search is empty"),
        ({"index": {"kind": ["exact", "hnsw"]}}, "search.index is no section that decides training"),
        ({"modle": {"heads": [1]}}, "did you mean model?"),
        ({"model": {"dropot": [0.1]}}, "unknown key search.model.dropot; did you mean dropout?"),
        ({"model": {"dropout": []}}, "search.model.dropout must be choices"),
        ({"model": {"dropout": 0.5}}, "search.model.dropout must be choices"),
        ({"model": {"dropout": {"low": 0.1}}}, "found {'low': 0.1}"),
        ({"model": {"dropout": {"low": 0.1, "high": 0.5, "step": 0.1}}}, "search.model.dropout must be choices"),
        ({"model": {"dropout": {"low": 0.5, "high": 0.1}}}, "low must be below high"),
        ({"model": {"dropout": {"low": 0.0, "high": 0.1, "log": True}}}, "below high and above 0"),
        ({"model": {"dropout": {"low": 0.1, "high": 0.2, "log": 1}}}, "log must be true or false"),
        ({"model": {"dropout": [0.1, "much"]}}, "must be of type float, found 'much'"),
        ({"model": {"heads": {"low": 1, "high": 2.5}}}, "must be of type int, found 2.5"),
        ({"model": {"heads": [1, True]}}, "must be of type int, found True"),
        ({"model": {"similarity": {"low": 1, "high": 2}}}, "search.model.similarity must be choices, [a, b]; found"),
        ({"model": 3}, "tune.search.model: Input should be"),
    ],
)
def test_a_search_that_cannot_be_is_one_clear_line(space, says):
    with pytest.raises(RecipeError) as refused:
        small(space).read(TuneSettings)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("counts", [{"trials": 0}, {"minutes": -1.0}])
def test_no_trials_and_negative_minutes_are_refused(counts):
    with pytest.raises(RecipeError, match="trials must be at least 1"):
        small(RATES, **counts).read(TuneSettings)


def test_the_search_without_a_section_holds_the_values_of_every_shipped_recipe():
    folder = Path(command.__file__).parents[2] / "training" / "recipes"
    settings = Recipe("none", {}).read(TuneSettings)
    assert settings.search == DEFAULT_SEARCH
    for path in folder.glob("*.toml"):
        resolved = command.resolved(load_recipe(str(path), folder))
        assert own_values(resolved, settings.domains) is not None, path.name


def test_integers_stay_integers_and_the_ends_of_a_float_range_may_be_written_as_integers():
    settings = small({"model": {"dropout": {"low": 0, "high": 0.5}, "length": {"low": 5, "high": 13}}}).read(TuneSettings)
    assert {type(settings.domains["model.dropout"][end]) for end in ("low", "high")} == {float}
    assert {type(settings.domains["model.length"][end]) for end in ("low", "high")} == {int}
