"""What is stored of a run or a bundle, held against itself: recipe, key, learning curve, files, and what MLflow has of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.schema import DataSettings
from features.split import SplitSettings
from recsys.bundle import MANIFEST, MODEL, Directory, entry, files_hash, identity, model_of, open_directory
from recsys.config import Recipe, Settings, flat
from recsys.errors import BundleError, SetupError
from recsys.tracking import Recorded, Tracking, TrackingSettings
from serving.index import IndexSettings
from serving.live import REGISTERED, source_of
from serving.ranking import ServingSettings
from serving.states import DepthSettings
from training.run import CURVE, DECISIVE, RANKING, RUN, run_key

EXPORTED: tuple[type[Settings], ...] = (IndexSettings, DepthSettings, ServingSettings)
"""What an export decides anew."""
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
        if self.part == "record":
            return f"{self.what}: {self.stored} in the manifest, {self.now}"
        return f"{self.what} {self.stored} stored, {self.now} found"


@dataclass(frozen=True)
class Stored(Directory):
    """A run's model or a bundle, with what a run directory has beside it."""

    run: dict[str, Any] | None = None
    """run.json; None where there is none."""
    curve: Sequence[Mapping[str, Any]] = ()
    """curve.jsonl."""
    rows: Sequence[Row] = ()
    """What the registry says of it."""

    @property
    def clock(self) -> dict[str, Any]:
        """What was noted when the run was made, whose bundle this may be."""
        return dict(self.manifest["clock"].get("run", self.manifest["clock"]))

    @property
    def environment(self) -> dict[str, Any]:
        """What was around the training; empty where that is not known."""
        return dict(self.clock.get("environment", {}))

    @property
    def processes(self) -> int:
        """How many trained it together."""
        return int(self.environment.get("processes", 1))


def find(word: str, uri: str) -> Stored:
    """What a directory or a registered model holds. Raises RecsysError: nothing, or neither a run nor a bundle."""
    rows, path = list[Row](), Path(word)
    version = ""
    if word.startswith("models:/"):
        current, path = source_of(word, uri).current()
        version = current.split()[0]
    folder = model_of(path)
    manifest = open_directory(folder, verify=False).manifest
    needed = ("name", "recipe", "dataset", "clock", "id", "hash", "quality", "best_epoch", "curve")
    if manifest.get("kind") not in ("model", "bundle") or [key for key in needed if key not in manifest]:
        raise BundleError(f"{folder / MANIFEST}: is of no run and no bundle; give the directory that train or export wrote")
    if version and (named := REGISTERED.fullmatch(word)):
        known = {str(one["version"]): one["bundle"] for one in Tracking(TrackingSettings(uri=uri, model=named[1])).versions()}
        rows.append(record("id", manifest["id"], known.get(version, ABSENT), f"MLflow's version {version}"))
    run, curve = None, []
    if folder != path:
        try:
            run = dict(json.loads((path / RUN).read_text(encoding="utf-8")))
            curve = [json.loads(line) for line in (path / CURVE).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError, TypeError) as error:
            raise BundleError(f"{path}: {RUN} or {CURVE} cannot be read ({error}); restore them, or give {folder}") from None
    recipe = Recipe(str(manifest["name"]), manifest["recipe"])
    for owner in (DataSettings, SplitSettings, *DECISIVE, *RANKING, *EXPORTED, TrackingSettings):
        recipe.read(owner)  # raises RecipeError where the stored recipe holds what no owner knows
    return Stored(folder, manifest, run, curve, rows)


def against_itself(stored: Stored) -> tuple[Recorded | None, list[Row]]:
    """What MLflow has of it, if that is to be reached, and all that was held against each other."""
    recorded, said = _recorded(stored)
    rows = [*stored.rows, *_settings(stored, recorded), *_curves(stored, recorded), *said, *_files(stored)]
    return recorded, rows


def record(what: str, stored: object, found: object, where: str) -> Row:
    same = str(stored) == str(found)
    return Row("record", what, str(stored), f"{'the same' if same else found} in {where}", same)


def _recorded(stored: Stored) -> tuple[Recorded | None, list[Row]]:
    """What MLflow holds of the run; None where it was left out or is not to be reached."""
    tracking, rows = Tracking.of(stored.manifest), list[Row]()
    if stored.run is not None:
        rows.append(record("MLflow's run", _address(tracking.address), _address(stored.run.get("tracking", {})), RUN))
    if not tracking.on:
        return None, [*rows, Row("record", "MLflow", "left out", "", None)]
    try:
        return tracking.recorded(), rows
    except SetupError as error:
        return None, [*rows, Row("record", "MLflow", tracking.run_id, str(error), None)]


def _address(address: Mapping[str, str]) -> str:
    return f"{address.get('run_id')} at {address.get('uri')}"


def _files(stored: Stored) -> list[Row]:
    """The files, their hash, and the id, against the manifest."""
    manifest = stored.manifest
    pairs = {file: (wanted["sha256"], entry(stored.path / file)["sha256"]) for file, wanted in manifest["files"].items()}
    differing = [record(file, one[:12], two[:12], "the file") for file, (one, two) in pairs.items() if one != two]
    rows = differing or [Row("record", "SHA-256 of files", str(len(pairs)), "as the manifest says", True)]
    rows.append(record("hash", manifest["hash"][:12], files_hash(manifest["files"])[:12], "the list of files"))
    return [*rows, record("id", manifest["id"], identity(manifest), "all it says")]


def _settings(stored: Stored, recorded: Recorded | None) -> list[Row]:
    """The manifest's recipe against run.json and MLflow, and the key and data set's hash with them."""
    manifest, rows, digest = stored.manifest, list[Row](), stored.manifest["dataset"]["hash"]
    recipe = flat(manifest["recipe"])
    if stored.run is not None:
        theirs, base, start = stored.run.get("recipe", {}), stored.run.get("base", ""), stored.run.get("start", "")
        found = {name: json.dumps(value) for name, value in flat(theirs).items()}
        rows += _differing({name: {json.dumps(value)} for name, value in recipe.items()}, found, RUN)
        try:
            key = run_key(theirs, digest, base, start)
        except (KeyError, TypeError):
            key = "none"
        rows.append(record("key", key[:12], str(stored.run.get("key"))[:12], RUN))
    if base := stored.clock.get("base"):
        rows.append(Row("record", "base", base, "not needed: its part is learnt again from the recipe as well", None))
    if recorded is not None:
        decided = [owner.section for owner in EXPORTED if manifest["kind"] == "bundle"]
        kept = [name for name in {**recipe, **recorded.settings} if name.partition(".")[0] not in decided]
        as_text = {name: {str(recipe[name]), str(_tuples(recipe[name]))} for name in kept if name in recipe}
        rows += _differing(as_text, {name: text for name, text in recorded.settings.items() if name in kept}, "MLflow")
        rows.append(record("data set", digest[:12], recorded.tags.get("dataset.sha256", ABSENT)[:12], "MLflow"))
    return rows


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


def _curves(stored: Stored, recorded: Recorded | None) -> list[Row]:
    """The manifest's validation figures and learning curve against each other, curve.jsonl and MLflow."""
    manifest, curve, rows = stored.manifest, stored.manifest["curve"], list[Row]()
    best = {"epoch": manifest["best_epoch"], **manifest["quality"].get("validation", {})}
    learnt = [line for line in curve if line.get("part", MODEL) == MODEL]  # nothing, of a model that was taken
    chosen = next((line for line in learnt if line["epoch"] == best["epoch"]), {}) if learnt else best
    for name, value in best.items():
        if chosen.get(name) != value:
            rows.append(record(f"validation {name}", value, chosen.get(name, ABSENT), "the learning curve"))
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
        record(f"{name} of epoch {epoch}", value, found.get((name, epoch), ABSENT), where)
        for (name, epoch), value in wanted.items()
        if found.get((name, epoch)) != value
    ]
    return rows or [Row("record", f"learning curve, {where}", f"{len(wanted)} figures", "the same", True)]
