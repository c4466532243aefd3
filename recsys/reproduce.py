"""The reproduce verb: what is stored of a run is held against itself, then made again from recipe, data and seed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from features.build import build
from features.dataset import MANIFEST as DATASET
from features.dataset import Dataset
from features.schema import DataSettings
from features.split import SplitSettings
from recsys import terminal
from recsys.bundle import MANIFEST, Directory, entry, files_hash, identity, open_directory, write_file
from recsys.config import Recipe, Settings
from recsys.errors import BundleError, DataError, RecsysError, SetupError
from recsys.model import WEIGHTS, model_from
from recsys.ranker import RANKER
from recsys.tracking import OFF, Recorded, Tracking, TrackingSettings
from serving.engine import DepthSettings, Recommender
from serving.evaluation.judge import evaluate
from serving.evaluation.protocol import ProtocolSettings
from serving.export import export
from serving.index import IndexSettings
from serving.live import REGISTERED, source_of
from serving.ranking import ServingSettings
from training.loop import choose_device
from training.run import CURVE, DECISIVE, MODEL, RANKING, RUN, environment, run_key
from training.run import train as train_run
from training.validate import validate

TOLERANCE = 0.002
"""How far a figure may be off in another environment: other last bits of a sum make another training of the same settings."""
JUDGED = 1e-4
"""How far the figures of the same weights may be off on another machine: targets may change places with equals."""
MARK = ".recsys-reproduce"
"""File that names the run or bundle which a folder's reproduction is of."""
EXPORTED: tuple[type[Settings], ...] = (IndexSettings, DepthSettings, ServingSettings)
"""What an export decides anew."""
TAKEN = ("parameters", "best_epoch", "depth_curve", "ranker")
"""What a bundle that was changed after its export still says of its model."""
TOLD = (
    *("format", "kind", "name", "recipe", "dataset", "clock", "version", "run"),
    *("files", "hash", "id", "quality", "curve"),
)
"""What a manifest says beside figures, or is compared by itself."""
ABSENT = "nothing"


@dataclass(frozen=True)
class Row:
    """One thing that was compared."""

    part: str
    """record: what is stored, against itself; environment, figure, file: what is stored, against what is found now."""
    what: str
    stored: str
    now: str
    agrees: bool | None
    """None: this was not compared, and `now` says why."""
    off: float | None = None
    """By how much a number differs."""

    @property
    def verdict(self) -> str:
        """The cell of a table."""
        if self.agrees is None:
            return "–"
        by = "" if not self.off else f", to {self.off:.1e}" if self.agrees else f", off by {self.off:.1e}"
        return ("yes" if self.agrees else "no") + by

    def __str__(self) -> str:
        return f"{self.what}: {self.stored} in the manifest, {self.now}" if self.part == "record" else self._found()

    def _found(self) -> str:
        return f"{self.what} {self.stored} stored, {self.now} found"


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
    stored, rows = _find(word, uri)
    manifest = stored.manifest
    _validate(manifest)
    recorded, said = _recorded(stored)
    rows += [*_settings(stored, recorded), *_figures_stored(stored, recorded), *said, *_files(stored)]
    told = (word, str(manifest["kind"]), str(manifest["id"]))
    if any(row.agrees is False for row in rows):
        return Reproduction(*told, rows)
    then = _clock(manifest).get("environment", {})
    with _workplace(out, manifest["id"]) as work, _as_then(then) as device:
        found = _dataset(manifest, recorded, dataset, data, work)
        rows += _weights(stored, found, device)
        if any(row.agrees is False for row in rows):
            return Reproduction(*told, rows)
        again = _again(stored, found, work, device)
        rows += _environments(then, environment(device))
        tolerance = TOLERANCE if any(not row.agrees for row in rows if row.part == "environment") else 0.0
        rows += _figures(manifest, again.manifest, tolerance)
        rows += _bytes(manifest, again.manifest)
        rows += _reports(manifest, recorded, again, found, tolerance)
    return Reproduction(*told, rows)


RUN_AGAIN = "run"
"""Folder of the run that is made again, in --out."""


@dataclass(frozen=True)
class _Stored(Directory):
    """A run's model or a bundle, with what a run directory has beside it."""

    run: dict[str, Any] | None = None
    """run.json; None where there is none."""
    curve: Sequence[Mapping[str, Any]] = ()


def _find(word: str, uri: str) -> tuple[_Stored, list[Row]]:
    """What a directory or a registered model holds. Raises RecsysError: nothing, or neither a run nor a bundle."""
    rows, path = list[Row](), Path(word)
    version = ""
    if word.startswith("models:/"):
        current, path = source_of(word, uri).current()
        version = current.split()[0]
    folder = path / MODEL if (path / MODEL / MANIFEST).is_file() else path
    manifest = open_directory(folder, verify=False).manifest
    needed = ("name", "recipe", "dataset", "clock", "id", "hash", "quality", "best_epoch", "curve")
    if manifest.get("kind") not in ("model", "bundle") or [key for key in needed if key not in manifest]:
        raise BundleError(f"{folder / MANIFEST}: is of no run and no bundle; give the directory that train or export wrote")
    if version:
        name = REGISTERED.fullmatch(word)[1]  # type: ignore[index]  # else it had not been found
        known = {str(one["version"]): one["bundle"] for one in Tracking(TrackingSettings(uri=uri, model=name)).versions()}
        rows.append(_record("id", manifest["id"], known.get(version, ABSENT), f"MLflow's version {version}"))
    run, curve = None, []
    if folder != path:
        try:
            run = dict(json.loads((path / RUN).read_text(encoding="utf-8")))
            curve = [json.loads(line) for line in (path / CURVE).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError, TypeError) as error:
            raise BundleError(f"{path}: {RUN} or {CURVE} cannot be read ({error}); restore them, or give {folder}") from None
    return _Stored(folder, manifest, run, curve), rows


def _clock(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was noted when the run was made, whose bundle this may be."""
    clock: Mapping[str, Any] = manifest["clock"]
    return clock.get("run", clock)  # type: ignore[no-any-return]


def _record(what: str, stored: object, found: object, where: str) -> Row:
    same = str(stored) == str(found)
    return Row("record", what, str(stored), f"{'the same' if same else found} in {where}", same)


def _recorded(stored: _Stored) -> tuple[Recorded | None, list[Row]]:
    """What MLflow holds of the run; None where it was left out or is not to be reached."""
    address = _clock(stored.manifest).get("tracking", {"uri": OFF, "run_id": ""})
    rows = []
    if stored.run is not None:
        rows.append(_record("MLflow's run", _address(address), _address(stored.run.get("tracking", {})), RUN))
    settings = Recipe("", stored.manifest["recipe"]).read(TrackingSettings)
    tracking = Tracking(replace(settings, uri=address["uri"]), address["run_id"])
    if not tracking.on:
        return None, [*rows, Row("record", "MLflow", "left out", "", None)]
    try:
        return tracking.recorded(), rows
    except SetupError as error:
        return None, [*rows, Row("record", "MLflow", address["run_id"], str(error), None)]


def _address(address: Mapping[str, str]) -> str:
    return f"{address.get('run_id')} at {address.get('uri')}"


def _files(stored: _Stored) -> list[Row]:
    """The files, their hash, and the id, against the manifest."""
    manifest = stored.manifest
    pairs = {file: (wanted["sha256"], entry(stored.path / file)["sha256"]) for file, wanted in manifest["files"].items()}
    differing = [_record(file, one[:12], two[:12], "the file") for file, (one, two) in pairs.items() if one != two]
    rows = differing or [Row("record", "SHA-256 of files", str(len(pairs)), "as the manifest says", True)]
    rows.append(_record("hash", manifest["hash"][:12], files_hash(manifest["files"])[:12], "the list of files"))
    return [*rows, _record("id", manifest["id"], identity(manifest), "all it says")]


def _settings(stored: _Stored, recorded: Recorded | None) -> list[Row]:
    """The manifest's recipe against run.json and MLflow, and the key and data set's hash with them."""
    manifest, rows, digest = stored.manifest, list[Row](), stored.manifest["dataset"]["hash"]
    recipe = _flat(manifest["recipe"])
    if stored.run is not None:
        theirs, base = stored.run.get("recipe", {}), stored.run.get("base", "")
        found = {name: json.dumps(value) for name, value in _flat(theirs).items()}
        rows += _differing({name: {json.dumps(value)} for name, value in recipe.items()}, found, RUN)
        try:
            key = run_key(theirs, digest, base)
        except (KeyError, TypeError):
            key = "none"
        rows.append(_record("key", key[:12], str(stored.run.get("key"))[:12], RUN))
    if base := _clock(manifest).get("base"):
        rows.append(Row("record", "base", base, "not needed: its part is learnt again from the recipe as well", None))
    if recorded is not None:
        decided = [owner.section for owner in EXPORTED if manifest["kind"] == "bundle"]
        kept = [name for name in {**recipe, **recorded.settings} if name.partition(".")[0] not in decided]
        as_text = {name: {str(recipe[name]), str(_tuples(recipe[name]))} for name in kept if name in recipe}
        rows += _differing(as_text, {name: text for name, text in recorded.settings.items() if name in kept}, "MLflow")
        rows.append(_record("data set", digest[:12], recorded.tags.get("dataset.sha256", ABSENT)[:12], "MLflow"))
    return rows


def _flat(recipe: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in recipe.items() for key, value in values.items()}


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were when they were recorded."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _differing(stored: Mapping[str, set[str]], found: Mapping[str, str], where: str) -> list[Row]:
    """A row for each setting that is another, or one for all; `stored` holds the ways in which each may be written."""
    rows = [
        Row("record", name, min(stored.get(name, {ABSENT})), f"{found.get(name, ABSENT)} in {where}", False)
        for name in sorted({*stored, *found})
        if found.get(name) not in stored.get(name, ())
    ]
    return rows or [Row("record", f"recipe, {where}", f"{len(stored)} settings", "the same", True)]


def _figures_stored(stored: _Stored, recorded: Recorded | None) -> list[Row]:
    """The manifest's validation figures and learning curve against each other, curve.jsonl and MLflow."""
    manifest, curve, rows = stored.manifest, stored.manifest["curve"], list[Row]()
    best = {"epoch": manifest["best_epoch"], **manifest["quality"].get("validation", {})}
    learnt = [line for line in curve if line.get("part", MODEL) == MODEL]  # nothing, of a model that was taken
    chosen = next((line for line in learnt if line["epoch"] == best["epoch"]), {}) if learnt else best
    for name, value in best.items():
        if chosen.get(name) != value:
            rows.append(_record(f"validation {name}", value, chosen.get(name, ABSENT), "the learning curve"))
    wanted = dict(_points(curve))
    if stored.run is not None:
        rows += _differing_points(wanted, dict(_points(stored.curve)), CURVE)
    if recorded is not None:
        rows += _differing_points(wanted, recorded.metrics, "MLflow")
    return rows


def _points(curve: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, int], float]]:
    """The figures of a learning curve as MLflow has them: by name and epoch."""
    for line in curve:
        part = "" if line.get("part", MODEL) == MODEL else f"{line['part']}_"
        for name, value in line.items():
            if name == "loss" or "@" in name:
                validation = "validation_" if "@" in name else ""
                yield (f"{part}{validation}{name.replace('@', '_at_')}", int(line["epoch"])), value


def _differing_points(wanted: Mapping[tuple[str, int], float], found: Mapping[tuple[str, int], float], where: str) -> list[Row]:
    """A row for each figure that is another, or one for all."""
    rows = [
        _record(f"{name} of epoch {epoch}", value, found.get((name, epoch), ABSENT), where)
        for (name, epoch), value in wanted.items()
        if found.get((name, epoch)) != value
    ]
    return rows or [Row("record", f"learning curve, {where}", f"{len(wanted)} figures", "the same", True)]


def _validate(manifest: Mapping[str, Any]) -> None:
    """Raises RecipeError: the stored recipe holds what no owner knows."""
    recipe = Recipe(str(manifest["name"]), manifest["recipe"])
    for owner in (DataSettings, SplitSettings, *DECISIVE, *RANKING, *EXPORTED, TrackingSettings):
        recipe.read(owner)


@contextmanager
def _workplace(out: Path | None, identity: str) -> Iterator[Path]:
    """A folder for what is made again. Raises RecsysError: `out` holds anything else."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="recsys-") as folder:
            yield Path(folder)
        return
    mark = out / MARK
    if (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir()) and not mark.is_file()):
        raise RecsysError(f"{out}: exists and is no earlier reproduction; give another folder with --out")
    if mark.is_file() and mark.read_text(encoding="utf-8") != identity:
        raise RecsysError(f"{out}: is the reproduction of another run; give another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_file(mark, identity.encode())
    except OSError as error:
        raise RecsysError(f"{out}: cannot be written ({error.strerror}); give another folder with --out") from None
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


def _dataset(
    manifest: Mapping[str, Any], recorded: Recorded | None, given: Path | None, data: Path | None, work: Path
) -> Dataset:
    """The run's data set: where it is given, where it lay, or built anew. Raises DataError: none is it."""
    if given is not None:
        return _same(Dataset.open(given), manifest, "give that one, or --data with the raw logs")
    places = [_clock(manifest).get("dataset", ""), *(recorded.sources if recorded else ())]
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
    then = {
        **{name: manifest["dataset"].get(name) for name in ("users", "events", "items")},
        **_flat(_of_data(manifest["recipe"])),
    }
    now = {**{name: told.get(name) for name in ("users", "events", "items")}, **_flat(_of_data(told["settings"]))}
    differing = [
        f"{name} {then.get(name, ABSENT)} then, {now.get(name, ABSENT)} here"
        for name in {**then, **now}
        if json.dumps(then.get(name, ABSENT)) != json.dumps(now.get(name, ABSENT))
    ]
    what = (
        ", ".join(differing)
        or f"as many events by the same settings, hash {manifest['dataset']['hash'][:12]} then, {told['hash'][:12]} here"
    )
    raise DataError(f"{dataset.path}: is not the data set of the run ({what}); {do}")


def _of_data(recipe: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {name: recipe[name] for name in (DataSettings.section, SplitSettings.section) if name in recipe}


def _weights(stored: _Stored, dataset: Dataset, device: torch.device) -> list[Row]:
    """The validation figures of the weights that are stored; other weights in their place have others."""
    wanted = stored.manifest["quality"].get("validation", {})
    if "before" in stored.manifest or not wanted:
        return []
    found = validate(model_from(stored, device.type), dataset.sequences)
    rows = [_figure(name, value, found.get(name, ABSENT), JUDGED) for name, value in wanted.items()]
    told = [_record(f"validation {row.what}", row.stored, row.now, "the weights") for row in rows if not row.agrees]
    return told or [Row("record", "validation, the weights", f"{len(rows)} figures", "the same", True)]


def _again(stored: _Stored, dataset: Dataset, work: Path, device: torch.device) -> Directory:
    """Train, and for a bundle that was not changed since also export; all by what is stored."""
    manifest = stored.manifest
    with terminal.training_progress() as (observe, progress):
        made = train_run(
            dataset,
            manifest["recipe"],
            work / RUN_AGAIN,
            name=manifest["name"],
            device=device,
            tracking=Tracking(TrackingSettings(uri=OFF)),
            observe=observe,
            progress=progress,
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
        said = report["protocol"]
        figures = {name: figure["mean"] for name, figure in report["figures"]["model"].items() if figure["mean"] is not None}
        protocol = ProtocolSettings("", *(said[key] for key in ("split", "targets", "filter_seen", "candidates")))
        with terminal.bar("users") as progress:
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
