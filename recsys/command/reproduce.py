"""The reproduce verb: what is stored of a run is held against itself, then made again from recipe, data and seed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from features.build import build
from features.dataset import MANIFEST as DATASET
from features.dataset import Dataset
from features.schema import DataSettings
from features.split import SplitSettings
from recsys.bundle import MODEL, Directory, claim, files_hash, open_directory
from recsys.command import terminal
from recsys.command.record import ABSENT, Row, Stored, against_itself, find, record
from recsys.config import Recipe, flat
from recsys.errors import DataError, RecsysError
from recsys.model import WEIGHTS, model_from
from recsys.ranker import RANKER
from recsys.tracking import OFF, Recorded, Tracking, TrackingSettings
from serving.engine import Recommender
from serving.evaluation.judge import evaluate
from serving.evaluation.protocol import ProtocolSettings
from serving.export import export
from serving.index import IndexSettings
from serving.ranking import ServingSettings
from serving.states import DepthSettings
from training.loop import choose_device
from training.run import environment
from training.run import train as train_run
from training.team import launch
from training.validate import validate

TOLERANCE = 0.0005
"""How far a figure may be off in another environment, whose sums have other last bits; with AVX2 in place of AVX-512 they were
off by 2e-5 on tiny and 3e-8 on ml-100k."""
JUDGED = 1e-4
"""How far the figures of the same weights may be off on another machine: targets may change places with equals."""
MARK = ".recsys-reproduce"
"""File that names the run or bundle which a folder's reproduction is of."""
RUN_AGAIN = "run"
"""Folder of the run that is made again, in --out."""
TAKEN = ("parameters", "best_epoch", "depth_curve", "ranker")
"""What a bundle that was changed after its export still says of its model."""
TOLD = (
    *("format", "kind", "name", "recipe", "dataset", "clock", "version", "run"),
    *("files", "hash", "id", "quality", "curve"),
)
"""What a manifest says beside figures, or is compared by itself."""


@dataclass(frozen=True)
class Reproduction:
    """What was compared, and what follows."""

    run: str
    kind: str
    """model or bundle."""
    id: str
    rows: Sequence[Row]

    def of(self, part: str, agrees: bool | None = False) -> list[Row]:
        """The rows of a part that differ, or that agree."""
        return [row for row in self.rows if row.part == part and row.agrees is agrees]

    @property
    def explained(self) -> bool:
        """Whether other last bits have a reason: another environment, an unknown one, or a GPU, which adds in any order."""
        return bool(self.of("environment") or self.of("environment", None))

    @property
    def reproduced(self) -> bool:
        """Whether all agrees, but for bytes that another environment explains."""
        return not self.of("record") and not self.of("figure") and (self.explained or not self.of("file"))

    @property
    def verdict(self) -> str:
        """One sentence."""
        if broken := self.of("record"):
            return f"not reproduced: what is stored differs from itself: {_listed(broken)}"
        around = self.of("environment") + self.of("environment", None)
        other = f" ({'; '.join(f'{row.what}: {row.stored} then, {row.now} now' for row in around)})" if around else ""
        files = ", ".join(row.what for row in self.of("file"))
        if off := self.of("figure"):
            return f"not reproduced: {_listed(off)}{other}"
        if files and not self.explained:
            return f"not reproduced: figures agree, bytes differ in {files}, in the same environment"
        if files:
            worst = max((row.off or 0.0 for row in self.of("figure", True)), default=0.0)
            return f"figures agree{f' to {worst:.1e}' if worst else ''}, bytes differ in {files}{other}"
        return "reproduced: figures and bytes agree"

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        rows = [asdict(row) for row in self.rows]
        head = {"run": self.run, "kind": self.kind, "id": self.id, "reproduced": self.reproduced, "verdict": self.verdict}
        return {**head, "rows": rows}


def reproduce(word: str, dataset: Path | None, data: Path | None, out: Path | None, uri: str = "") -> Reproduction:
    """Make a run or bundle again, where what is stored of it agrees with itself, and compare.

    `word` is its directory, or models:/NAME@ALIAS or models:/NAME/VERSION in the MLflow store `uri`. The data set is read at
    `dataset`, else where it lay, else built from the raw logs `data`. `out` keeps what is made, and an interrupted training
    there goes on. Raises RecsysError: no run, or none of its data.
    """
    stored = find(word, uri)
    manifest = stored.manifest
    recorded, rows = against_itself(stored)
    told = Reproduction(word, str(manifest["kind"]), str(manifest["id"]), rows)  # and what comes to the rows
    if told.of("record"):
        return told
    with _workplace(out, manifest["id"]) as work, _as_then(stored.environment) as device:
        found = _dataset(stored, recorded, dataset, data, work)
        rows += _weights(stored, found, device)
        if told.of("record"):
            return told
        again = _again(stored, found, work, device)
        rows += _environments(stored.environment, environment(device))
        tolerance = TOLERANCE if told.explained else 0.0
        rows += _figures(manifest, again.manifest, tolerance)
        rows += _bytes(manifest, again.manifest)
        rows += _reports(manifest, recorded, again, found, tolerance)
    return told


@contextmanager
def _workplace(out: Path | None, identity: str) -> Iterator[Path]:
    """A folder for what is made again. Raises RecsysError: `out` holds anything else."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="recsys-") as folder:
            yield Path(folder)
        return
    mark = out / MARK
    if mark.is_file() and mark.read_text(encoding="utf-8") != identity:
        raise RecsysError(f"{out}: is the reproduction of another run; give another folder with --out")
    claim(out, MARK, "reproduction", identity)
    yield out


@contextmanager
def _as_then(then: Mapping[str, Any]) -> Iterator[torch.device]:
    """As many threads as then, and the same kind of device where there is one."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(then.get("threads", before)))
    try:
        yield choose_device("cpu" if then.get("device") == "cpu" else "auto")
    finally:
        torch.set_num_threads(before)


def _dataset(stored: Stored, recorded: Recorded | None, given: Path | None, data: Path | None, work: Path) -> Dataset:
    """The run's data set: where it is given, where it lay, or built anew. Raises DataError: none is it."""
    manifest = stored.manifest
    if given is not None:
        return _same(Dataset.open(given), manifest, "give that one, or --data with the raw logs")
    places = [stored.clock.get("dataset", ""), *(recorded.sources if recorded else ())]
    problem = f"its data set lay in {places[0] or 'a place that is not known'}"
    for place in dict.fromkeys(place for place in places if place and (Path(place) / DATASET).is_file()):
        try:
            return _same(Dataset.open(Path(place)), manifest, "")
        except DataError as error:
            problem = str(error).rstrip("; ")
    if data is None:
        raise DataError(f"{problem}; give it with --dataset, or the raw logs with --data")
    recipe = Recipe(str(manifest["dataset"]["recipe"]), {name: manifest["recipe"][name] for name in ("data", "split")})
    with terminal.bar("events") as progress:
        build(data, recipe, work / "dataset", progress=progress)
    return _same(Dataset.open(work / "dataset"), manifest, f"built from {data}; give the same raw logs")


def _same(dataset: Dataset, manifest: Mapping[str, Any], do: str) -> Dataset:
    """The data set, which is the run's. Raises DataError: it is another one; says what differs."""
    told = dataset.manifest
    if told["hash"] == files_hash(told["files"]) == manifest["dataset"]["hash"]:
        return dataset
    then, now = _of_data(manifest["dataset"], manifest["recipe"]), _of_data(told, told["settings"])
    differing = [
        f"{name} {then.get(name, ABSENT)} then, {now.get(name, ABSENT)} here"
        for name in {**then, **now}
        if json.dumps(then.get(name, ABSENT)) != json.dumps(now.get(name, ABSENT))
    ]
    same = f"as many events by the same settings, hash {manifest['dataset']['hash'][:12]} then, {told['hash'][:12]} here"
    raise DataError(f"{dataset.path}: is not the data set of the run ({', '.join(differing) or same}); {do}")


def _of_data(counts: Mapping[str, Any], recipe: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What tells one data set from another, by name: its counts and the settings that it was made by."""
    made = {name: recipe[name] for name in (DataSettings.section, SplitSettings.section) if name in recipe}
    return {name: counts.get(name) for name in ("users", "events", "items")} | flat(made)


def _weights(stored: Stored, dataset: Dataset, device: torch.device) -> list[Row]:
    """The validation figures of the weights that are stored; other weights in their place have others."""
    wanted = stored.manifest["quality"].get("validation", {})
    users = stored.manifest["recipe"]["train"].get("validate_users", 0)
    if "before" in stored.manifest or not wanted or (users and stored.processes > 1):  # several processes chose other users
        return []
    found = validate(model_from(stored, device.type), dataset.sequences, users=users)
    rows = [_figure(name, value, found.get(name, ABSENT), JUDGED) for name, value in wanted.items()]
    told = [record(f"validation {row.what}", row.stored, row.now, "the weights") for row in rows if not row.agrees]
    return told or [Row("record", "validation, the weights", f"{len(rows)} figures", "the same", True)]


def _again(stored: Stored, dataset: Dataset, work: Path, device: torch.device) -> Directory:
    """Train, and for a bundle that was not changed since also export; all by what is stored."""
    manifest, start = stored.manifest, _start(stored)
    if stored.processes > 1:
        made = _by_processes(stored, dataset, work, device, start)
    else:
        name, off = str(manifest["name"]), Tracking(TrackingSettings(uri=OFF))
        with terminal.training_progress() as shown:
            made = train_run(
                dataset, manifest["recipe"], work / RUN_AGAIN, name=name, device=device, tracking=off, start=start, **shown
            )
    if manifest["kind"] == "model" or "before" in manifest:
        return made
    recipe = Recipe(str(manifest["name"]), manifest["recipe"])
    owners = recipe.read(IndexSettings), recipe.read(DepthSettings), recipe.read(ServingSettings)
    measured = dataset if "faithfulness" in manifest else None  # as it was measured then
    with terminal.steps("reproduce") as tell:
        tell("export: weights, item vectors and index to a bundle")
        export(work / RUN_AGAIN, work / "bundle", owners[0], measured, *owners[1:])
    return open_directory(work / "bundle")


def _by_processes(stored: Stored, dataset: Dataset, work: Path, device: torch.device, start: Path | None) -> Directory:
    """Train by as many processes of this machine as then. Raises RecsysError: one of them failed."""
    recipe = work / f"{stored.manifest['name']}.toml"
    recipe.write_text(Recipe("", stored.manifest["recipe"]).toml(), encoding="utf-8")
    words = ["train", str(recipe), "--dataset", str(dataset.path), "--out", str(work / RUN_AGAIN), "--device", device.type]
    words += ["--set", f"tracking.uri={OFF}", *(["--start", str(start)] if start else [])]
    if launch(stored.processes, words):
        raise RecsysError(f"{work / RUN_AGAIN}: was not trained by {stored.processes} processes; look above for why")
    return open_directory(work / RUN_AGAIN / MODEL)


def _start(stored: Stored) -> Path | None:
    """The run that learning began with. Raises RecsysError: it is not where it lay."""
    begun = stored.clock.get("start")
    if not begun:
        return None
    start = Path(begun["run"])
    found = open_directory(start / MODEL).manifest["id"]
    if found != begun["id"]:
        raise RecsysError(f"{start}: holds the run {found}, learning began with {begun['id']}; put that one there again")
    return start


def _environments(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Row]:
    """What was different around the training; one row where nothing was."""
    if not then:
        return [Row("environment", "environment", "not recorded", ", ".join(f"{k} {v}" for k, v in now.items()), None)]
    rows = [
        Row("environment", name, str(then.get(name, ABSENT)), str(value), False)
        for name, value in now.items()
        if then.get(name) != value
    ]
    if now["device"] != "cpu":
        rows.append(Row("environment", "device", str(then.get("device")), f"{now['device']}, which adds in any order", None))
    told = f"torch {now['torch']}, threads {now['threads']}, {now['processor']}"
    return rows or [Row("environment", "environment", told, "the same", True)]


def _figures(then: Mapping[str, Any], now: Mapping[str, Any], tolerance: float) -> list[Row]:
    """All that the manifests say of the model and of the bundle, and of the parts that were learnt then."""
    changed, rows, leaves = "before" in then, list[Row](), []
    if changed:
        rows.append(Row("figure", "index and lists", "changed after the export", "the model alone is compared", None))
    parts = sorted({line.get("part", MODEL) for line in then["curve"]})
    for said in (then, now):
        told = {name: value for name, value in said.items() if (name in TAKEN if changed else name not in TOLD)}
        lines = {part: [line for line in said["curve"] if line.get("part", MODEL) == part] for part in parts}
        curves = {
            f"{part}'s curve": [{key: value for key, value in line.items() if key != "part"} for line in lines[part]]
            for part in parts
        }
        leaves.append(_leaves({**said["quality"], **told, **curves}))
    here, there = leaves
    names = {**here, **there}
    return rows + [_figure(name, here.get(name, ABSENT), there.get(name, ABSENT), tolerance) for name in names]


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Values by dotted names; those of a list of mappings as lists."""
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        value = {key: [each.get(key) for each in value] for key in dict.fromkeys(key for each in value for key in each)}
    if not isinstance(value, Mapping):
        return {name: value}
    return {leaf: it for key, part in value.items() for leaf, it in _leaves(part, f"{name} {key}".strip()).items()}


def _figure(name: str, then: Any, now: Any, tolerance: float) -> Row:
    """Numbers, or lists of them, which are shown where they are farthest apart; anything else by being equal."""
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now) > 0:
        rows = [_figure(f"{name} ({len(then)} values)", one, two, tolerance) for one, two in zip(then, now, strict=True)]
        return max(reversed(rows), key=lambda row: (not row.agrees, row.off or 0.0))
    numbers = all(isinstance(value, int | float) for value in (then, now))
    off = abs(then - now) / max(1.0, abs(then)) if numbers else None
    whole = isinstance(then, int) and isinstance(now, int)
    agrees = off <= (0.0 if whole else tolerance) if off is not None else bool(then == now)
    return Row("figure", name, _said(then), _said(now), agrees, off)


def _said(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _bytes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Row]:
    """The SHA-256 of every file, or of a changed bundle of the model alone."""
    names = [file for file in then["files"] if "before" not in then or file in (WEIGHTS, RANKER)]
    pairs = {file: (then["files"][file]["sha256"], now["files"].get(file, {"sha256": ABSENT})["sha256"]) for file in names}
    return [Row("file", file, one[:12], two[:12], one == two) for file, (one, two) in pairs.items()]


def _reports(
    then: Mapping[str, Any], recorded: Recorded | None, again: Directory, found: Dataset, tolerance: float
) -> list[Row]:
    """The reports of this very run or bundle that MLflow has, judged again."""
    rows = list[Row]()
    for name, report in ({} if recorded is None else recorded.reports).items():
        if report.get("bundle") != then["id"] or again.manifest["kind"] != then["kind"] or "protocol" not in report:
            rows.append(Row("figure", name, f"of {report.get('bundle')}", "not of what is reproduced", None))
            continue
        if report["dataset"]["hash"] != found.manifest["hash"]:
            rows.append(Row("figure", name, f"of data set {report['dataset']['hash'][:12]}", "not of this data set", None))
            continue
        said = report["protocol"]
        figures = {name: figure["mean"] for name, figure in report["figures"]["model"].items() if figure["mean"] is not None}
        protocol = ProtocolSettings("", *(said[key] for key in ("split", "targets", "filter_seen", "candidates")))
        with terminal.bar("lists") as progress:
            tell = partial(progress, "evaluate")
            judged = evaluate(Recommender.load(again.path), found, protocol, report["ks"], baselines=False, progress=tell)
        now = {key: value for key, value in judged.figures["model"].items() if key in figures}
        near = max(tolerance, 1e-9)  # a mean over users is taken in another order
        rows += [_figure(f"{said['split']} {key}", figures[key], value, near) for key, value in now.items()]
    return rows


def _listed(rows: Sequence[Row]) -> str:
    """The first rows as words, and how many more there are."""
    more = f"; and {len(rows) - 5} more" if len(rows) > 5 else ""
    return "; ".join(map(str, rows[:5])) + more
