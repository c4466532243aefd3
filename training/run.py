"""A training from data set to run directory: settings, checkpoint, learning curve, and the model that serving reads."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from features.dataset import Dataset
from features.download import cache_folder
from recsys.bundle import MANIFEST, MODEL, Directory, Writer, open_directory, publish, write_file
from recsys.config import Settings
from recsys.content import CONTENT, ENCODER, Content, ContentEncoder
from recsys.errors import RecipeError, RecsysError
from recsys.model import WEIGHTS, ModelSettings, SequenceModel, model_from
from recsys.progress import Count
from recsys.ranker import COMPANIONS, RANKER, RankerSettings
from recsys.text import TextSettings
from recsys.tracking import Tracking
from recsys.version import __version__
from training.checkpoint import Checkpoints
from training.loop import Observation, TrainSettings, fit, refuse_settings
from training.losses import LossSettings
from training.optimizer import OptimizerSettings
from training.ranking import RankingSettings, fit_ranker, refuse_ranker
from training.start import ANY, begin_with, refuse_other
from training.team import joined
from training.validate import depth_curve

CHECKPOINT = "checkpoint"
RANKER_CHECKPOINT = "checkpoint-ranker"
CURVE = "curve.jsonl"
RUN = "run.json"
ITEMS = "items.parquet"

Recipe = Mapping[str, Mapping[str, Any]]


def train(
    dataset: Dataset,
    recipe: Recipe,
    out: Path,
    *,
    name: str,
    device: torch.device,
    tracking: Tracking,
    base: Path | None = None,
    start: Path | None = None,
    observe: Callable[[Observation], None] = lambda observation: None,
    progress: Count | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Directory:
    """Train by a resolved recipe and publish RUN/model; where `out` holds an interrupted run of the same, go on with it.

    A finished run is opened, not trained again. With `base`, a finished run, its sequence model is taken and the ranker alone
    is learnt; with `start` learning begins with the weights of one, item by item. `progress` hears of texts that are encoded,
    `tell` of how the work is dealt. Where torchrun started several processes, all of them call this, and the first one writes.
    Raises RecsysError: `out` holds a run of another recipe or data set, `base` is of another one, or `start` of other settings.
    """
    digest = dataset.manifest["hash"]
    if base is not None and start is not None:
        raise RecipeError("with --model nothing of the sequence model is learnt; leave out --start")
    begun = None if start is None else open_directory(start / MODEL)
    base_id = "" if base is None else str(open_directory(base / MODEL, verify=False).manifest["id"])
    start_id = "" if begun is None else str(begun.manifest["id"])
    key = run_key(recipe, digest, base_id, start_id)
    if begun is not None and start is not None:
        refuse_other(begun, recipe, (ModelSettings, TextSettings), start, "--start", ANY)
    refuse_recipe(recipe, device, base is not None, start is not None)
    parts = OptimizerSettings(**recipe[OptimizerSettings.section]).in_parts(recipe[ModelSettings.section]["embedding"])
    with joined(device, parts) as team:
        if base is not None and team.size > 1:
            raise RecipeError("with --model a ranker alone is learnt, by one process; start no more")
        if team.first(not team.rank and _begun(out, key, tracking) and (out / MODEL / MANIFEST).is_file()):
            return open_directory(out / MODEL)
        on = f"{key} on {device.type}"
        if team.rank:
            _learn(dataset, recipe, begun, Checkpoints(out / CHECKPOINT, on, team), observe, progress, tell)
            team.wait()
            return open_directory(out / MODEL, verify=False)
        taken = None if base is None else _taken(base, dataset, recipe, device)  # refused before anything is written
        with tracking.run(out.name):
            tracking.settings_of(recipe)
            counts = json.dumps(dataset.manifest["counts"])
            tracking.dataset(str(dataset.manifest["recipe"]), digest, str(dataset.path), counts)
            said = {"key": key, "base": base_id, "start": start_id, "recipe": recipe, "tracking": tracking.address}
            write_file(out / RUN, json.dumps(said, indent=1).encode())
            started, around = time.monotonic(), environment(device, team.size)

            def watch(observation: Observation) -> None:
                if observation.validation is not None:
                    figures = {f"validation_{name}": value for name, value in observation.validation.items()}
                    curve = {
                        "loss": observation.loss,
                        "learning_rate": observation.learning_rate,
                        "epoch_seconds": observation.seconds,
                    }
                    prefix = "" if observation.part == "model" else f"{observation.part}_"
                    tracking.metrics({prefix + name: value for name, value in {**curve, **figures}.items()}, observation.epoch)
                observe(observation)

            learnt = taken or _learn(dataset, recipe, begun, Checkpoints(out / CHECKPOINT, on, team), watch, progress, tell)
            if recipe.get(RankerSettings.section, {}).get("blocks"):
                _rank(learnt, dataset, recipe, Checkpoints(out / RANKER_CHECKPOINT, on), watch)
            write_file(out / CURVE, "".join(json.dumps(line) + "\n" for line in learnt.curve).encode())
            clock = {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - started, 1),
                "tracking": tracking.address,
                "dataset": str(dataset.path.absolute()),
                "base": base_id,
                "start": {} if start is None else {"id": start_id, "run": str(start.absolute())},
                "environment": around,
            }
            told = {key: dataset.manifest[key] for key in ("recipe", "hash", "users", "events", "items", "counts")}
            told |= {"events_sha256": dataset.manifest["files"]["events.parquet"]["sha256"]}  # by these a leak is found
            told |= {"learnt_until": learnt.until}
            manifest = {
                "kind": "model",
                "name": name,
                "recipe": recipe,
                "dataset": told,
                **learnt.about,
                "curve": learnt.curve,
                "clock": clock,
            }
            writers: dict[str, Writer] = {ITEMS: partial(shutil.copyfile, dataset.path / ITEMS), **learnt.writers}
            model = publish(out / MODEL, writers, manifest)
            for path in (out / CURVE, out / MODEL / MANIFEST):
                tracking.file(path)
        for folder in (CHECKPOINT, RANKER_CHECKPOINT):
            shutil.rmtree(out / folder, ignore_errors=True)
        team.wait()
        return model


def refuse_recipe(recipe: Recipe, device: torch.device, ranker_alone: bool = False, begins: bool = True) -> None:
    """Raises RecipeError, or SetupError: settings that do not go together, or not here."""
    if recipe.get("depth", {}).get("blocks") and not recipe[ModelSettings.section]["early_exit"]:
        raise RecipeError("depth.blocks is set without model.early_exit; set both, or neither")
    if recipe.get(RankerSettings.section, {}).get("blocks"):
        refuse_ranker(*_settings(recipe, ModelSettings, RankerSettings))
    elif ranker_alone:
        raise RecipeError(
            "a model is taken and ranker.blocks is 0, so nothing is left to learn; set ranker.blocks to 1 or more"
        )
    model, schedule, optimizer = _settings(recipe, ModelSettings, TrainSettings, OptimizerSettings)
    refuse_settings(model, schedule, optimizer, device, begins)


def _settings(recipe: Recipe, *owners: type[Settings]) -> list[Any]:
    """What a resolved recipe says to each of the owners."""
    return [owner(**recipe[owner.section]) for owner in owners]


@dataclass
class _Learnt:
    """What training has made so far."""

    model: SequenceModel
    about: dict[str, Any]
    """For the manifest."""
    writers: dict[str, Writer]
    curve: list[dict[str, Any]]
    """One entry a validation."""
    until: int
    """Time of the latest event that was learnt."""


def _learn(
    dataset: Dataset,
    recipe: Recipe,
    start: Directory | None,
    checkpoints: Checkpoints,
    observe: Callable[[Observation], None],
    progress: Count | None,
    tell: Callable[[str], None],
) -> _Learnt:
    """Train the sequence model, as one process of the checkpoints' team."""
    team, encoder, content = checkpoints.team, None, None
    sequences = dataset.sequences if team.size == 1 else dataset.share(team.rank, team.size)
    if recipe[ModelSettings.section]["text"] != "none":
        fitted = None if start is None else ContentEncoder.load(start.path / ENCODER)
        encoder, content = read_content(dataset, TextSettings(**recipe[TextSettings.section]), progress, fitted)
    seed = recipe[TrainSettings.section]["seed"]
    state = fit(
        sequences,
        dataset.manifest["warm_items"],
        *_settings(recipe, *DECISIVE),
        content=content,
        start=None if start is None else partial(begin_with, run=start, dataset=dataset, seed=seed),
        team=team,
        checkpoints=checkpoints,
        observe=observe,
        tell=tell,
    )
    best = next(line for line in state.curve if line["epoch"] == state.best_epoch)
    about = {
        "items": state.model.items,
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "best_epoch": state.best_epoch,
        "quality": {"validation": {key: best[key] for key in best if "@" in key}},
    }
    if state.model.settings.early_exit and not team.rank:
        about["depth_curve"] = depth_curve(state.model, dataset.sequences)
    writers: dict[str, Writer] = {WEIGHTS: lambda path: save_file(state.model.weights(), path)}
    if encoder is not None and content is not None:
        about["items_without_text"] = int((content.tokens_VL == 0).all(1).sum())
        writers |= {CONTENT: content.save, ENCODER: encoder.save}
    return _Learnt(state.model, about, writers, list(state.curve), team.most(sequences.learnt_until))


def _taken(base: Path, dataset: Dataset, recipe: Recipe, device: torch.device) -> _Learnt:
    """The sequence model of a finished run. Raises RecsysError: it is of another data set, or other settings decide it."""
    directory = open_directory(base / MODEL)
    if directory.manifest["dataset"]["hash"] != dataset.manifest["hash"]:
        raise RecsysError(f"{base}: learnt from another data set; give that one, or train without --model")
    refuse_other(directory, recipe, DECISIVE, base, "--model")
    about = {name: directory.manifest[name] for name in ABOUT if name in directory.manifest}
    writers: dict[str, Writer] = {
        file: partial(shutil.copyfile, directory.path / file)
        for file in (WEIGHTS, CONTENT, ENCODER)
        if file in directory.manifest["files"]
    }
    return _Learnt(model_from(directory, device.type), about, writers, [], dataset.sequences.learnt_until)


ABOUT = ("items", "parameters", "best_epoch", "quality", "depth_curve", "items_without_text")
"""What a manifest says of a sequence model."""


def _rank(
    learnt: _Learnt, dataset: Dataset, recipe: Recipe, checkpoints: Checkpoints, observe: Callable[[Observation], None]
) -> None:
    """Learn the ranker of the sequence model, and add it to what has been learnt."""
    events_V = torch.tensor(dataset.items["events"].to_numpy(), dtype=torch.float32)
    ranker, learning = _settings(recipe, *RANKING)
    state, companions, curve = fit_ranker(
        learnt.model,
        dataset.sequences,
        events_V,
        ranker,
        learning,
        recipe[TrainSettings.section]["seed"],
        checkpoints=checkpoints,
        observe=observe,
    )
    weights = {name: value.detach().cpu().contiguous() for name, value in state.model.state_dict().items()}
    learnt.writers[RANKER] = lambda path: save_file(weights, path)
    if companions is not None:
        learnt.writers[COMPANIONS] = companions.save
    learnt.about["ranker"] = {
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "best_epoch": state.best_epoch,
        "curve": curve,
    }
    learnt.curve += [{"part": "ranker", **line} for line in state.curve]


def read_content(
    dataset: Dataset, settings: TextSettings, progress: Count | None = None, fitted: ContentEncoder | None = None
) -> tuple[ContentEncoder, Content]:
    """The encoder, fitted on the items with training events where none is given, and what it makes of all items."""
    described, cache, learnt = dataset.described, cache_folder() / "text.sqlite", dataset.manifest["warm_items"]
    encoder = fitted or ContentEncoder.fit(described.take(learnt), settings, cache, progress)
    content, events = encoder.encode(described, cache, progress), dataset.items["events"].to_list()
    return encoder, content.with_neighbours(range(len(content)), learnt, events, settings.neighbours)


def run_key(recipe: Recipe, digest: str, base: str = "", start: str = "") -> str:
    """What decides a run's weights: the sections that `fit` takes, the data set's hash, and the id of the taken model, or of
    the one that learning began with."""
    decisive = {owner.section: recipe[owner.section] for owner in DECISIVE}
    if recipe.get(RankerSettings.section, {}).get("blocks"):
        decisive |= {owner.section: recipe[owner.section] for owner in RANKING}
    taken = [base] if base else [f"from {start}"] if start else []
    return hashlib.sha256(json.dumps([decisive, digest, *taken], sort_keys=True).encode()).hexdigest()


def environment(device: torch.device, processes: int = 1) -> dict[str, str | int]:
    """What may change a run beside its recipe, data and seed: versions, the code, processes, threads, device, processor."""
    folders = (Path(__file__).parents[1] / name for name in ("recsys", "features", "training"))
    sources = sorted(path for folder in folders for path in folder.glob("*.py"))
    processors = Path("/proc/cpuinfo")
    lines = processors.read_text(encoding="utf-8").splitlines() if processors.is_file() else []
    named = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "recsys": __version__,
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12],
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy")},
        "processes": processes,
        "threads": torch.get_num_threads(),
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "processor": named[0] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


DECISIVE: tuple[type[Settings], ...] = (
    ModelSettings,
    TrainSettings,
    LossSettings,
    OptimizerSettings,
    TextSettings,
)
"""What `fit` takes, in its order."""
RANKING: tuple[type[Settings], ...] = (RankerSettings, RankingSettings)
"""What `fit_ranker` takes; they decide a run that has a ranker."""


def is_begun(out: Path, mark: str, what: str) -> bool:
    """Whether `out`, which is made where it is not there, has the file `mark` of a run or search. Raises RecsysError: it holds
    anything else."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecsysError(f"{out}: cannot be made ({error.strerror}); give another place for the {what}") from None
    there = (out / mark).is_file()
    if not there and any(out.iterdir()):
        raise RecsysError(f"{out}: holds other files and no {what}; give another place for the {what}")
    return there


def _begun(out: Path, key: str, tracking: Tracking) -> bool:
    """Whether `out` holds this very run; takes up its MLflow run."""
    if not is_begun(out, RUN, "run"):
        return False
    try:
        found = json.loads((out / RUN).read_text(encoding="utf-8"))
        found_key, address = found["key"], found["tracking"]
    except (ValueError, KeyError, TypeError):
        raise RecsysError(f"{out / RUN}: cannot be read; delete {out} and train again") from None
    if found_key != key:
        raise RecsysError(f"{out}: holds a run of another recipe or data set; give another place, or delete it")
    tracking.uri, tracking.run_id = address["uri"], address["run_id"]
    return True
