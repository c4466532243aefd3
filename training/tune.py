"""The search for settings: trials judged by validation alone and remembered on disk; the one door to optuna."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from features.dataset import Dataset
from recsys.bundle import write_file
from recsys.config import Recipe, Settings, nearest
from recsys.errors import DataError, RecsysError, SetupError
from recsys.ranker import RankerSettings
from recsys.tracking import Tracking
from training.loop import Observation, TrainSettings
from training.run import DECISIVE, is_begun, run_key, train

if TYPE_CHECKING:
    import optuna

STUDY, BEST, PICTURE, TRIALS = "study.db", "best.toml", "search.png", "trials"
METRIC = "ndcg@10"
STATES = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
"""How a trial ends, best first, and optuna's name of it."""
SHIELDED = 0.2
"""Share of the epochs within which no trial is pruned: the first figures favour high rates."""
DEFAULT_SEARCH: dict[str, dict[str, Any]] = {
    "model": {"dropout": {"low": 0.0, "high": 0.8}, "temperature": {"low": 0.03, "high": 1.0, "log": True}},
    "train": {"batch_tokens": [1_600, 3_200, 6_400, 12_800]},
    "optimizer": {
        "kind": ["adamw", "muon"],
        "muon_learning_rate": {"low": 2e-3, "high": 1e-1, "log": True},
        "learning_rate": {"low": 3e-4, "high": 1e-2, "log": True},
        "weight_decay": {"low": 1e-3, "high": 0.3, "log": True},
    },
}
"""What is searched where the recipe does not say."""


@dataclass(frozen=True)
class TuneSettings(Settings):
    """What is searched, and how long."""

    section: ClassVar[str] = "tune"

    trials: int = 20
    """Trials in all, also pruned and failed ones; the first is the recipe itself where the search holds its values."""
    minutes: float = 0.0
    """No new trial starts after so long in one command; 0: no limit."""
    search: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: DEFAULT_SEARCH)
    """By section and key, a list of choices or {low = …, high = …}, with log = true where ratios matter."""

    def __post_init__(self) -> None:
        if self.trials < 1 or self.minutes < 0:
            raise ValueError(f"trials must be at least 1 and minutes not negative, found {self.trials} and {self.minutes}")
        known = {owner.section: [field.name for field in fields(owner)] for owner in DECISIVE}  # type: ignore[arg-type]
        for section, domains in self.search.items():
            if section not in known:
                raise ValueError(f"search.{section} is no section that decides training{nearest(section, list(known))}")
            for key, domain in domains.items():
                if key not in known[section]:
                    raise ValueError(f"unknown key search.{section}.{key}{nearest(key, known[section])}")
                _check(f"search.{section}.{key}", _kind(section, key), domain)
        if not self.domains:
            raise ValueError("search is empty; name a setting to search, or leave it out")

    @property
    def domains(self) -> dict[str, Any]:
        """The search by `section.key`, every number of the setting's type."""
        return {
            f"{section}.{key}": _typed(_kind(section, key), domain)
            for section, domains in self.search.items()
            for key, domain in domains.items()
        }


@dataclass(frozen=True)
class Trial:
    """One set of values and what came of it."""

    number: int
    state: str
    """running, complete, pruned or failed."""
    value: float | None
    """Validation NDCG@10: the best of a complete trial, the last of another; None before any."""
    values: dict[str, Any]
    """What was tried, by `section.key`."""
    epoch: int = 0
    reason: str = ""
    """Why it failed, or was not trained."""

    def texts(self) -> dict[str, str]:
        """The values to be read, numbers to four digits."""
        return {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in self.values.items()}

    def record(self) -> dict[str, Any]:
        """A line of a table."""
        figure = "–" if self.value is None else f"{self.value:.4f}"
        return {"trial": self.number, "ndcg@10": figure, "state": self.state, "epoch": self.epoch, **self.texts()}


@dataclass(frozen=True)
class _Job:
    """All that the trials of a search share."""

    study: optuna.Study
    settings: TuneSettings
    recipe: Recipe
    resolved: Mapping[str, Mapping[str, Any]]
    dataset: Dataset
    runs: Path
    device: torch.device
    tracking: Tracking
    observe: Callable[[Trial, int], None]


def tune(
    dataset: Dataset,
    recipe: Recipe,
    resolved: Mapping[str, Mapping[str, Any]],
    out: Path,
    *,
    device: torch.device,
    tracking: Tracking,
    observe: Callable[[Trial, int], None] = lambda trial, of: None,
) -> list[Trial]:
    """Search, write OUT/best.toml and OUT/search.png, and return the trials, the best first.

    Where `out` holds an interrupted search of the same, it goes on within its trial; a finished one has only what
    `tune.trials` asks for beyond it. Of the trials' runs the best stays in OUT/trials. `observe` is told each trial and
    their planned count at its validations and its end. Raises RecsysError: `out` holds something else, or no trial was
    completed.
    """
    settings, started = recipe.read(TuneSettings), time.monotonic()
    schedule = TrainSettings(**resolved[TrainSettings.section])
    deciding = [run_key(resolved, dataset.manifest["hash"]), settings.search, device.type]
    key = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    with _open(out, key, int(SHIELDED * schedule.epochs)) as study:
        own = own_values(resolved, settings.domains)
        if own and not study.trials:
            study.enqueue_trial(own)
        tracking = tracking.at(study.user_attrs.get("tracking"))
        with tracking.run(out.name):
            study.set_user_attr("tracking", tracking.address)
            tracking.settings_of({**resolved, "tune": {"trials": settings.trials}, "tune.search": settings.domains})
            job = _Job(study, settings, recipe, resolved, dataset, out / TRIALS, device, tracking, observe)
            late = started + 60 * (settings.minutes or float("inf"))
            while trial := _next(study, settings.trials, schedule.seed, late):
                observe(_try(job, trial), settings.trials)
                _tidy(out / TRIALS, _ranked(study))
            trials = _ranked(study)
            _tidy(out / TRIALS, trials)
            if trials[0].state != "complete":
                raise RecsysError(f"{out}: no trial was completed; trial {trials[0].number}: {trials[0].reason}")
            write_file(out / BEST, with_values(recipe, trials[0].values).toml().encode())
            _draw(trials, settings.domains, out / PICTURE)
            tracking.metrics({f"validation_{METRIC}": trials[0].value or 0.0})
            for file in (out / BEST, out / PICTURE):
                tracking.file(file)
    return trials


@contextmanager
def _open(out: Path, key: str, shielded: int) -> Iterator[optuna.Study]:
    """The study in `out`, made or taken up. Raises RecsysError: `out` holds something else."""
    import optuna

    is_begun(out, STUDY, "search")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{(out / STUDY).absolute()}")
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=shielded + 1)  # the first epoch is step 1
        study = optuna.create_study(
            storage=storage, study_name="search", direction="maximize", load_if_exists=True, pruner=pruner
        )
    except Exception as error:  # SQLAlchemy and optuna raise many kinds; all mean the same to the user
        raise RecsysError(f"{out / STUDY}: cannot be read ({type(error).__name__}); delete {out} and search again") from None
    try:
        if study.user_attrs.get("key", key) != key:
            raise RecsysError(f"{out}: holds a search of another recipe, data set or device; give another place, or delete it")
        study.set_user_attr("key", key)
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _next(study: optuna.Study, trials: int, seed: int, late: float) -> optuna.Trial | None:
    """The trial that was interrupted, else a new one; None when all are done or it is late.

    Each trial draws from a seed of its own, so that an interrupted search tries what an undisturbed one does.
    """
    import optuna

    done = len(_ranked(study))
    study.sampler = optuna.samplers.TPESampler(seed=random.Random(f"{seed} {done}").getrandbits(32))
    for running in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        return optuna.Trial(study, running._trial_id)
    return study.ask() if done < trials and (not done or time.monotonic() < late) else None


def _try(job: _Job, trial: optuna.Trial) -> Trial:
    """Train by the trial's values and tell the study; SetupError and DataError concern every trial and pass through."""
    import optuna

    values = {name: _suggest(trial, name, domain) for name, domain in job.settings.domains.items()}
    reported = job.study.trials[trial.number].intermediate_values
    child = job.tracking.another(nested=True)

    def watch(seen: Observation) -> None:
        if seen.validation is None:
            return
        if not seen.validation:
            raise DataError("nobody can be judged by validation, so nothing can be searched; give another [split]")
        if seen.epoch not in reported:
            trial.report(seen.validation[METRIC], seen.epoch)
        job.observe(Trial(trial.number, "running", seen.validation[METRIC], values, seen.epoch), job.settings.trials)
        if trial.should_prune():
            raise optuna.TrialPruned

    value, state, reason = None, "complete", ""
    try:
        if same := next((ended for ended in _ranked(job.study) if ended.values == values), None):
            value, state, reason = same.value, same.state, f"has the values of trial {same.number}"
        else:
            chosen = with_values(job.recipe, values)
            decided = {owner.section: chosen.read(owner).as_dict() for owner in DECISIVE}
            unranked = {RankerSettings.section: RankerSettings().as_dict()}  # trials are of the sequence model alone
            recipe, run = {**job.resolved, **decided, **unranked}, job.runs / str(trial.number)
            model = train(job.dataset, recipe, run, name=chosen.name, device=job.device, tracking=child, observe=watch)
            value = model.manifest["quality"]["validation"][METRIC]
    except optuna.TrialPruned:
        state = "pruned"
    except (SetupError, DataError):
        raise
    except (RecsysError, torch.OutOfMemoryError) as error:
        state, reason = "failed", str(error).partition("\n")[0]
    trial.set_user_attr("reason", reason)
    child.outcome(str(trial.number), state, reason)
    told = value if state == "complete" else None
    return _ended(job.study.tell(trial, told, optuna.trial.TrialState[STATES[state]]))


def _suggest(trial: optuna.Trial, name: str, domain: Any) -> Any:
    if not isinstance(domain, Mapping):
        return trial.suggest_categorical(name, domain)
    suggest = trial.suggest_int if isinstance(domain["low"], int) else trial.suggest_float
    return suggest(name, domain["low"], domain["high"], log=domain.get("log", False))


def _ranked(study: optuna.Study) -> list[Trial]:
    """The trials that ended: complete ones by value, then pruned ones, then failed ones."""
    trials = [_ended(trial) for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    return sorted(trials, key=lambda trial: (list(STATES).index(trial.state), -(trial.value or 0.0), trial.number))


def _ended(trial: optuna.trial.FrozenTrial) -> Trial:
    state = next(ours for ours, name in STATES.items() if name == trial.state.name)
    return Trial(trial.number, state, trial.value, trial.params, trial.last_step or 0, trial.user_attrs.get("reason", ""))


def _tidy(runs: Path, ranked: Sequence[Trial]) -> None:
    """Delete every run but the best trial's: all their weights would fill the disk."""
    for run in runs.iterdir() if runs.is_dir() else ():
        if ranked[0].state != "complete" or run.name != str(ranked[0].number):
            shutil.rmtree(run)


def _draw(trials: Sequence[Trial], domains: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: the value by trial with the best so far, and the value over each setting that was searched."""
    from matplotlib.figure import Figure

    done = sorted((trial for trial in trials if trial.state == "complete"), key=lambda trial: trial.number)
    figure = Figure(figsize=(3.2 * (len(domains) + 1), 3.4), layout="constrained")
    axes = figure.subplots(1, len(domains) + 1, sharey=True)
    numbers, values = [trial.number for trial in done], [trial.value or 0.0 for trial in done]
    best = [max(values[: place + 1]) for place in range(len(values))]
    axes[0].step(numbers, best, where="post", color="tab:orange", label="best so far")
    axes[0].legend()
    axes[0].set_ylabel("validation NDCG@10")
    for axis, name in zip(axes, ("trial", *domains), strict=True):
        across = numbers if name == "trial" else [trial.values[name] for trial in done]
        axis.scatter([str(value) if isinstance(value, str | bool) else value for value in across], values, c=numbers)
        axis.set_xlabel(name)
        if isinstance(domain := domains.get(name), Mapping) and domain.get("log"):
            axis.set_xscale("log")
    figure.savefig(path, dpi=110, format="png")


def own_values(resolved: Mapping[str, Mapping[str, Any]], domains: Mapping[str, Any]) -> dict[str, Any] | None:
    """The recipe's own values of what is searched, by `section.key`; None where one lies outside the search."""
    own = {name: resolved[name.partition(".")[0]][name.partition(".")[2]] for name in domains}
    return own if all(_holds(domain, own[name]) for name, domain in domains.items()) else None


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with values by `section.key` in the place of its own."""
    sections = {section: dict(given) for section, given in recipe.sections.items()}
    for name, value in values.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return Recipe(recipe.name, sections)


def _holds(domain: Any, value: Any) -> bool:
    return domain["low"] <= value <= domain["high"] if isinstance(domain, Mapping) else value in domain


def _kind(section: str, key: str) -> type:
    owner = next(owner for owner in DECISIVE if owner.section == section)
    return type(getattr(owner, key))  # a field's default stands on its class


def _typed(kind: type, domain: Any) -> Any:
    if isinstance(domain, Mapping):
        return {**domain, "low": kind(domain["low"]), "high": kind(domain["high"])}
    return [kind(choice) for choice in domain]


def _check(name: str, kind: type, domain: Any) -> None:
    """Raises ValueError: neither choices nor a range, or not of the setting's type."""
    is_range = isinstance(domain, Mapping) and {"low", "high"} <= set(domain) <= {"low", "high", "log"}
    if not (is_range and kind in (int, float)) and not (isinstance(domain, list | tuple) and domain):
        forms = "choices, [a, b]" + (", or a range, {low = a, high = b, log = true}" if kind in (int, float) else "")
        raise ValueError(f"{name} must be {forms}; found {domain!r}")
    values = [domain["low"], domain["high"]] if is_range else domain
    for value in values:
        if type(value) not in ((int, float) if kind is float else (kind,)):
            raise ValueError(f"{name} must be of type {kind.__name__}, found {value!r}")
    if is_range:
        log = domain.get("log", False)
        if type(log) is not bool:
            raise ValueError(f"{name}: log must be true or false, found {log!r}")
        if not values[0] < values[1] or (log and values[0] <= 0):
            raise ValueError(f"{name}: low must be below high{' and above 0' if log else ''}, found {domain!r}")
