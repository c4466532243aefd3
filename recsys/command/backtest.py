"""The back-test: the recipe trained and judged as if it were earlier, once for each of some windows of time."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from features.build import resplit
from features.dataset import MANIFEST, Dataset
from features.leaks import find_leaks, refuse
from features.split import DAY, SplitSettings
from recsys.bundle import claim, write_file
from recsys.command import terminal
from recsys.command.recipes import resolved
from recsys.config import Recipe
from recsys.errors import DataError, RequestError
from recsys.tracking import Tracking, TrackingSettings
from serving.engine import Recommender
from serving.evaluation.judge import evaluate
from serving.evaluation.protocol import PROTOCOLS, ProtocolSettings
from training.run import train

BACKTEST = "backtest.json"
MARK = ".recsys-backtest"
"""File by which a folder is known as a back-test's, also before it is finished."""
METRICS = ("ndcg@10", "recall@10")
"""By the first of them the best baseline is the best."""


@dataclass(frozen=True)
class Window:
    """A stretch of time that is the test."""

    start: int
    """Seconds since 1970."""
    days: int

    @property
    def name(self) -> str:
        return f"{datetime.fromtimestamp(self.start, UTC):%Y-%m-%d-%H%M%S}"

    @property
    def dates(self) -> dict[str, str]:
        """Its first and last minute, UTC."""
        ends = {"from": self.start, "to": self.start + self.days * DAY - 1}
        return {name: f"{datetime.fromtimestamp(end, UTC):%Y-%m-%d %H:%M}" for name, end in ends.items()}


def windows_of(dataset: Dataset, windows: int, days: int, validation_days: int) -> list[Window]:
    """Windows one behind the other, oldest first; the last one ends with the last event.

    Raises RequestError: no window, or no day of it. DataError: the first one has no event before its validation.
    """
    if windows < 1 or days < 1:
        raise RequestError(f"{windows} windows of {days} days are asked for; give at least 1 of each")
    times = dataset.events.select("timestamp").collect()["timestamp"].drop_nulls().to_numpy()
    begin, end = (int(times.min()), int(times.max()) + 1) if len(times) else (0, 0)
    reach = windows * days + validation_days
    if end - reach * DAY <= begin:
        raise DataError(
            f"{dataset.path}: {windows} windows of {days} days and {validation_days} of validation take {reach} days, its "
            f"events {(end - begin) / DAY:.0f}; give fewer windows, fewer days, or a smaller split.validation_days"
        )
    return [Window(end - (windows - number) * days * DAY, days) for number in range(windows)]


def backtest(dataset: Dataset, recipe: Recipe, out: Path, windows: int, days: int, device: torch.device) -> dict[str, Any]:
    """Split at each window, train by what came before, judge; what is finished is not done again. Returns what
    `out`/backtest.json holds: the windows' figures, and mean and standard deviation over them.

    Raises RecsysError: `out` holds anything else; as `windows_of`, `train` and `evaluate`. LeakError: a window's model has
    learnt of its targets.
    """
    split = recipe.read(SplitSettings)
    lines: list[dict[str, Any]] = []
    chosen = windows_of(dataset, windows, days, split.validation_days)
    claim(out, MARK, "back-test")
    for number, window in enumerate(chosen, 1):
        print(f"window {number} of {windows}: {window.dates['from']} to {window.dates['to']}", file=sys.stderr)
        cut = replace(split, method="global_time", test_start=window.start, test_days=days, holdout_one_in=0)
        data = _split(dataset, cut, out / "datasets" / window.name)
        lines.append(window.dates | _judged(data, recipe, out, window.name, device))
    found = {
        "kind": "backtest",
        "recipe": recipe.name,
        "dataset": {name: dataset.manifest[name] for name in ("recipe", "hash")},
        "days": days,
        "windows": lines,
        "model": {name: _spread([line[name] for line in lines]) for name in METRICS},
        "best baseline": {name: _spread([line[f"baseline {name}"] for line in lines]) for name in METRICS},
        "beaten": sum(line[METRICS[0]] > line[f"baseline {METRICS[0]}"] for line in lines),
    }
    write_file(out / BACKTEST, json.dumps(found, indent=1).encode())
    return found


def _split(dataset: Dataset, split: SplitSettings, place: Path) -> Dataset:
    """The data set of a window, made where it is not there."""
    if (place / MANIFEST).is_file():
        found = Dataset.open(place)
        events = [each.manifest["files"]["events.parquet"]["sha256"] for each in (found, dataset)]
        if found.manifest["settings"][SplitSettings.section] == split.as_dict() and events[0] == events[1]:
            return found
    with terminal.bar("events") as progress:
        return resplit(dataset, split, place, progress)


def _judged(data: Dataset, recipe: Recipe, out: Path, name: str, device: torch.device) -> dict[str, Any]:
    """Users and figures of a window, from its file where that is of the same model, data and protocol."""
    protocol, place = _protocol(recipe), out / "figures" / f"{name}.json"
    settings = resolved(recipe) | data.manifest["settings"]
    with terminal.training_progress() as shown:
        made = train(
            data,
            settings,
            out / "runs" / name,
            name=recipe.name,
            device=device,
            tracking=Tracking(recipe.read(TrackingSettings)),
            **shown,
        )
    key = [made.manifest["id"], data.manifest["hash"], protocol.as_dict()]
    if place.is_file() and (found := json.loads(place.read_text(encoding="utf-8")))["key"] == key:
        return dict(found["figures"])
    refuse(find_leaks(data, made.manifest), str(data.path))
    with terminal.bar("lists") as tell:
        judged = evaluate(Recommender.load(out / "runs" / name), data, protocol, progress=partial(tell, "evaluate"))
    of = judged.figures
    baselines = [name for name, one in judged.judged.items() if one.kind == "baseline" and name in of]
    best = max(baselines, key=lambda name: of[name][METRICS[0]])
    figures = {"users": judged.users, **{metric: of["model"][metric] for metric in METRICS}, "best baseline": best}
    figures |= {f"baseline {metric}": of[best][metric] for metric in METRICS}
    place.parent.mkdir(exist_ok=True)
    write_file(place, json.dumps({"key": key, "figures": figures}).encode())
    return figures


def _protocol(recipe: Recipe) -> ProtocolSettings:
    """The recipe's, for data of other dates than those a name stands for."""
    settings = replace(recipe.read(ProtocolSettings), split="test")
    named = PROTOCOLS.get(settings.name)
    return settings if named is None else replace(settings, name="", targets=named.targets, filter_seen=named.filter_seen)


def _spread(values: list[float]) -> dict[str, float | None]:
    """Mean and standard deviation, which one value has not."""
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}
