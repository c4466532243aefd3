"""A training from data set to run directory: settings, checkpoint, learning curve, and the model that serving reads."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from features.dataset import Dataset
from features.download import cache_folder
from recsys.bundle import MANIFEST, Directory, Writer, open_directory, publish, write_file
from recsys.config import Settings
from recsys.content import CONTENT, ENCODER, Content, ContentEncoder
from recsys.errors import RecipeError, RecsysError
from recsys.model import WEIGHTS, ModelSettings
from recsys.text import Progress, TextSettings
from recsys.tracking import Tracking
from training.loop import Observation, State, TrainSettings, fit
from training.losses import LossSettings
from training.optimizer import OptimizerSettings
from training.validate import depth_curve

MODEL = "model"
CHECKPOINT = "checkpoint.pt"
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
    observe: Callable[[Observation], None] = lambda observation: None,
    progress: Progress | None = None,
) -> Directory:
    """Train by a resolved recipe and publish RUN/model; where `out` holds an interrupted run of the same, go on with it.

    A finished run is opened, not trained again. `progress` hears of texts that are encoded. Raises RecsysError: `out` holds a
    run of another recipe or data set.
    """
    digest = dataset.manifest["hash"]
    key = run_key(recipe, digest)
    if recipe.get("depth", {}).get("blocks") and not recipe[ModelSettings.section]["early_exit"]:
        raise RecipeError("depth.blocks is set without model.early_exit; set both, or neither")
    if _begun(out, key, tracking) and (out / MODEL / MANIFEST).is_file():
        return open_directory(out / MODEL)
    with tracking.run(out.name):
        tracking.settings_of(recipe)
        tracking.dataset(str(dataset.manifest["recipe"]), digest, str(dataset.path), json.dumps(dataset.manifest["counts"]))
        write_file(out / RUN, json.dumps({"key": key, "recipe": recipe, "tracking": tracking.address}, indent=1).encode())
        started = time.monotonic()
        encoder, content = None, None
        if recipe[ModelSettings.section]["text"] != "none":
            encoder, content = read_content(dataset, TextSettings(**recipe[TextSettings.section]), progress)

        def watch(observation: Observation) -> None:
            if observation.validation is not None:
                figures = {f"validation_{name}": value for name, value in observation.validation.items()}
                curve = {
                    "loss": observation.loss,
                    "learning_rate": observation.learning_rate,
                    "epoch_seconds": observation.seconds,
                }
                tracking.metrics({**curve, **figures}, observation.epoch)
            observe(observation)

        state = fit(
            dataset.sequences,
            dataset.manifest["warm_items"],
            ModelSettings(**recipe[ModelSettings.section]),
            TrainSettings(**recipe[TrainSettings.section]),
            LossSettings(**recipe[LossSettings.section]),
            OptimizerSettings(**recipe[OptimizerSettings.section]),
            TextSettings(**recipe[TextSettings.section]),
            content=content,
            device=device,
            checkpoint=out / CHECKPOINT,
            key=f"{key} on {device.type}",
            observe=watch,
        )
        write_file(out / CURVE, "".join(json.dumps(line) + "\n" for line in state.curve).encode())
        model = _publish(out, state, dataset, recipe, name, tracking, time.monotonic() - started, encoder, content)
        for file in (out / CURVE, out / MODEL / MANIFEST):
            tracking.file(file)
    (out / CHECKPOINT).unlink()
    return model


def read_content(dataset: Dataset, settings: TextSettings, progress: Progress | None = None) -> tuple[ContentEncoder, Content]:
    """The encoder, fitted on the items with training events, and what it makes of all items."""
    described, cache, learnt = dataset.described, cache_folder() / "text.sqlite", dataset.manifest["warm_items"]
    encoder = ContentEncoder.fit(described.take(learnt), settings, cache, progress)
    content, events = encoder.encode(described, cache, progress), dataset.items["events"].to_list()
    return encoder, content.with_neighbours(range(len(content)), learnt, events, settings.neighbours)


def run_key(recipe: Recipe, digest: str) -> str:
    """What decides a run's weights: the sections that `fit` takes and the data set's hash."""
    decisive = {owner.section: recipe[owner.section] for owner in DECISIVE}
    return hashlib.sha256(json.dumps([decisive, digest], sort_keys=True).encode()).hexdigest()


DECISIVE: tuple[type[Settings], ...] = (
    ModelSettings,
    TrainSettings,
    LossSettings,
    OptimizerSettings,
    TextSettings,
)
"""What `fit` takes, in its order."""


def _begun(out: Path, key: str, tracking: Tracking) -> bool:
    """Whether `out` holds this very run; takes up its MLflow run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecsysError(f"{out}: cannot be made ({error.strerror}); give another place for the run") from None
    if not (out / RUN).is_file():
        if any(out.iterdir()):
            raise RecsysError(f"{out}: holds other files and no run; give another place for the run")
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


def _publish(
    out: Path,
    state: State,
    dataset: Dataset,
    recipe: Recipe,
    name: str,
    tracking: Tracking,
    seconds: float,
    encoder: ContentEncoder | None,
    content: Content | None,
) -> Directory:
    best = next(line for line in state.curve if line["epoch"] == state.best_epoch)
    manifest = {
        "kind": "model",
        "name": name,
        "recipe": recipe,
        "items": state.model.items,
        "dataset": {key: dataset.manifest[key] for key in ("recipe", "hash", "users", "events", "items", "counts")},
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "best_epoch": state.best_epoch,
        "quality": {"validation": {key: best[key] for key in best if "@" in key}},
        **({"depth_curve": depth_curve(state.model, dataset.sequences)} if state.model.settings.early_exit else {}),
        "clock": {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "tracking": tracking.address,
        },
    }
    writers: dict[str, Writer] = {
        WEIGHTS: lambda path: save_file(state.model.weights(), path),
        ITEMS: partial(shutil.copyfile, dataset.path / ITEMS),
    }
    if encoder is not None and content is not None:
        manifest["items_without_text"] = int((content.tokens_VL == 0).all(1).sum())
        writers |= {CONTENT: content.save, ENCODER: encoder.save}
    return publish(out / MODEL, writers, manifest)
