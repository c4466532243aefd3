"""The one door to MLflow: settings, curves, the data set with its hash, system metrics, reports, and the bundle registry."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from recsys.config import Settings, flat
from recsys.errors import SetupError

OFF = "off"
CHAMPION = "champion"
"""Alias of the version that is live."""
REMEMBERED = 100
"""Champions before the present one that are remembered."""


@dataclass(frozen=True)
class TrackingSettings(Settings):
    """Where runs and bundles are recorded."""

    section: ClassVar[str] = "tracking"

    uri: str = ""
    """MLflow tracking URI; empty: MLFLOW_TRACKING_URI, else mlflow.db (SQLite) in the working directory; "off": none."""
    experiment: str = "recsys"
    """MLflow experiment of the runs."""
    model: str = "recsys"
    """Registered model whose versions are the bundles."""


@dataclass(frozen=True)
class Recorded:
    """What a store holds of a run."""

    settings: Mapping[str, str]
    """As text, by section.key."""
    tags: Mapping[str, str]
    metrics: Mapping[tuple[str, int], float]
    """By MLflow's name and the step."""
    sources: Sequence[str]
    """Where its data sets lay."""
    reports: Mapping[str, Mapping[str, Any]]
    """Of evaluations, by the name of their file."""


class Tracking:
    """One MLflow run, or nothing where tracking is off."""

    def __init__(self, settings: TrackingSettings, run_id: str = "", nested: bool = False, there: bool = False) -> None:
        self.settings, self.run_id, self.nested, self.there = settings, run_id, nested, there or bool(run_id)
        self.uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Tracking:
        """Where the run of a model or bundle is recorded; off where it was."""
        address = manifest["clock"].get("run", manifest["clock"]).get("tracking", {"uri": OFF, "run_id": ""})
        settings = TrackingSettings(**manifest["recipe"].get(TrackingSettings.section, {}))
        return cls(settings).at(address)

    @property
    def on(self) -> bool:
        return self.uri != OFF

    @property
    def address(self) -> dict[str, str]:
        """The store and the run in it, as a manifest keeps them."""
        return {"uri": self.uri, "run_id": self.run_id}

    @contextmanager
    def run(self, name: str) -> Iterator[Tracking]:
        """Start the run, or go on with it; it ends as finished, or as failed when an exception leaves the block."""
        if not self.on:
            yield self
            return
        self._require_store()
        mlflow = self._mlflow()
        try:
            active = mlflow.start_run(
                run_id=self.run_id or None, run_name=name, nested=self.nested, log_system_metrics=not self.nested
            )
        except mlflow.exceptions.MlflowException:
            raise self._gone() from None
        with active:
            self.run_id = active.info.run_id
            yield self

    def at(self, address: Mapping[str, str] | None) -> Tracking:
        """The run at an address that was kept; this one where there is none."""
        return self if address is None else Tracking(replace(self.settings, uri=address["uri"]), address["run_id"])

    def another(self, nested: bool = False) -> Tracking:
        """A run of its own in the same store, which must be there; `nested` under this one, which must be running."""
        return Tracking(replace(self.settings, uri=self.uri), nested=nested, there=True)

    def outcome(self, name: str, state: str, reason: str = "") -> None:
        """How a child ended: as complete, pruned or failed; `name` is for one that ended before its run started."""
        if not self.on:
            return
        if not self.run_id:
            with self.run(name):
                pass
        client = self._mlflow().MlflowClient()
        for tag, text in {"outcome": state, "reason": reason}.items():
            client.set_tag(self.run_id, tag, text)
        client.set_terminated(self.run_id, {"complete": "FINISHED", "pruned": "KILLED"}.get(state, "FAILED"))

    def recorded(self) -> Recorded:
        """What the store holds of this run. Raises SetupError: it has no such run, or does not answer."""
        self._require_store()
        mlflow = self._mlflow()
        client = mlflow.MlflowClient()
        try:
            run = client.get_run(self.run_id)
            names = [name for name in run.data.metrics if not name.startswith("system/")]
            histories = {name: client.get_metric_history(self.run_id, name) for name in names}
            files = [file for file in client.list_artifacts(self.run_id) if file.path.startswith("report_")]
            reports = [f"{file.path}/report.json" if file.is_dir else file.path for file in files]
            return Recorded(
                dict(run.data.params),
                dict(run.data.tags),
                {(name, point.step): point.value for name, history in histories.items() for point in history},
                [used.dataset.source for used in run.inputs.dataset_inputs],
                {name: mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/{name}") for name in reports},
            )
        except mlflow.exceptions.MlflowException:
            raise self._gone() from None

    @property
    def _database(self) -> Path | None:
        """The SQLite file that is the store, if one is; MLflow makes an empty one where there is none."""
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None

    def _require_store(self) -> None:
        """Raises SetupError: the run's SQLite file is gone."""
        if self.there and self._database and not self._database.is_file():
            raise self._gone()

    def _gone(self) -> SetupError:
        what = f"run {self.run_id}" if self.run_id else "store"
        return SetupError(f"MLflow at {self.uri} has no {what}; bring its store back, or leave MLflow out")

    def settings_of(self, recipe: Mapping[str, Mapping[str, Any]]) -> None:
        """Every setting as a parameter `section.key`; a resumed run's are already there."""
        if self.on:
            mlflow = self._mlflow()
            known = mlflow.MlflowClient().get_run(self.run_id).data.params
            mlflow.log_params({name: value for name, value in flat(recipe).items() if name not in known})

    def dataset(self, name: str, digest: str, source: str, profile: str) -> None:
        """The data set with its hash."""
        if self.on:
            mlflow = self._mlflow()
            entity = mlflow.entities.Dataset(name, digest[:36], "local", source, profile=profile)
            mlflow.MlflowClient().log_inputs(self.run_id, [mlflow.entities.DatasetInput(entity, [])])
            mlflow.set_tag("dataset.sha256", digest)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Numbers, at an epoch; MLflow's names have no @, so `ndcg@10` is recorded as `ndcg_at_10`."""
        if self.on:
            named = {name.replace("@", "_at_"): value for name, value in values.items()}
            self._mlflow().log_metrics(named, step=step, run_id=self.run_id)

    def file(self, path: Path, folder: str = "") -> None:
        """A file or folder, as an artifact of the run."""
        if self.on:
            client = self._mlflow().MlflowClient()
            log = client.log_artifacts if path.is_dir() else client.log_artifact
            log(self.run_id, str(path), folder or None)

    def report(self, report: Mapping[str, Any], folder: Path | None = None) -> None:
        """A report as report_NAME.json, or its folder as report_NAME; its figures as metrics, but for other data and leaks.

        NAME says how it differs from the next: split, targets, candidates, data set, and whether a bundle was judged.
        """
        if self.on:
            said, own = report["protocol"], self._mlflow().MlflowClient().get_run(self.run_id).data.tags.get("dataset.sha256")
            name = "_".join(
                [
                    said["split"],
                    *(["repeats"] if not said["filter_seen"] else []),
                    *(part for part in (said["targets"], said["candidates"]) if part not in ("new", "all")),
                    *(["bundle"] if report["subject"] == "bundle" else []),
                    *([f"of_{report['dataset']['hash'][:8]}"] if own not in (None, report["dataset"]["hash"]) else []),
                ]
            )
            if own in (None, report["dataset"]["hash"]) and not report["leaks"]["found"]:
                figures = report["figures"]["model"].items()
                self.metrics({f"{name}_{key}": figure["mean"] for key, figure in figures if figure["mean"] is not None})
            if folder is None:
                self._mlflow().MlflowClient().log_dict(self.run_id, dict(report), f"report_{name}.json")
            else:
                self.file(folder, f"report_{name}")

    def night(self, manifest: Mapping[str, Any]) -> None:
        """Nightly lists: what their manifest counts as metrics, with the guards and the speed, and the whole as night.json."""
        if self.on:
            clock, guards = manifest["clock"], {f"guard_{guard['guard']}": guard["found"] for guard in manifest["guards"]}
            counts = {key: value for key, value in manifest.items() if isinstance(value, int | float)}
            self.metrics(
                {**counts, **guards, **{key: clock[key] for key in ("seconds", "users_per_second", "computed", "resumed")}}
            )
            client = self._mlflow().MlflowClient()
            client.set_tag(self.run_id, "bundle", manifest["bundle"])
            client.set_tag(
                self.run_id, "live", str(all(guard["holds"] for guard in manifest["guards"]) or bool(manifest.get("id")))
            )
            client.log_dict(self.run_id, dict(manifest), "night.json")

    def register(self, bundle: Path, identity: str, before: str = "") -> str:
        """Record a bundle as the next version of the registered model, and return the version's number.

        It becomes champion where there is none yet, or where the champion is the bundle `before`, of which this one is made.
        """
        if not self.on:
            return ""
        mlflow = self._mlflow()
        client = mlflow.MlflowClient()
        name = self.settings.model
        if not client.search_registered_models(filter_string=f"name = '{name}'"):
            client.create_registered_model(name, description="bundles of the attention recommender")
        folder = f"bundles/{identity}"
        self.file(bundle, folder)
        source = f"{client.get_run(self.run_id).info.artifact_uri}/{folder}"
        version = str(client.create_model_version(name, source, run_id=self.run_id, tags={"bundle": identity}).version)
        now = self.champion()
        if not now or (before and client.get_model_version(name, now).tags.get("bundle") == before):
            self.promote(version)
        return version

    def champion(self) -> str:
        """The version that is champion; empty where there is none, or no registered model."""
        if not self.on:
            return ""
        with self._registry() as (client, name):
            there = client.search_registered_models(filter_string=f"name = '{name}'")
            return self._line(client)[0] if there else ""

    def decided(self, version: str, tags: Mapping[str, str], evidence: Path | None = None, more: bool = False) -> None:
        """Write what was decided of a version on it, as tags `promotion.…`, and the files of `evidence` to its run.

        The tags of an earlier decision go, unless this is `more` of the same. MLflow's names have no @: `ndcg@10` is
        `ndcg_at_10`. Raises SetupError: no such version.
        """
        with self._registry(f"version {version} of ") as (client, name):
            if evidence is not None:
                client.log_artifacts(client.get_model_version(name, version).run_id, str(evidence), f"promotion/{version}")
            for tag in () if more else client.get_model_version(name, version).tags:
                if tag.startswith("promotion."):
                    client.delete_model_version_tag(name, version, tag)
            for tag, text in tags.items():
                client.set_model_version_tag(name, version, f"promotion.{tag.replace('@', '_at_')}", text)

    def promote(self, version: str) -> None:
        """Make a version champion, and remember the one before it. Raises SetupError: no such version."""
        self.resolve(version)
        with self._registry() as (client, name):
            now, before = self._line(client)
            if now == version:
                return
            if now:
                self._remember([*before, now])  # first: an alias that moved without is not to be rolled back
            client.set_registered_model_alias(name, CHAMPION, version)

    def rollback(self) -> str:
        """Make the version before champion again, each time to an earlier one, and return it.

        Versions that were deleted are left out. Raises SetupError: there is none before.
        """
        with self._registry() as (client, name):
            there = {str(version["version"]) for version in self.versions()}
            now, before = self._line(client)
            while before:
                version = before.pop()
                if version != now and version in there:
                    client.set_registered_model_alias(name, CHAMPION, version)
                    self._remember(before)
                    return version
        raise SetupError(f"{name}: nothing to roll back to, no version was champion before {now or 'now'}; promote one instead")

    def resolve(self, word: str) -> tuple[str, str]:
        """The version that a number or an alias names, and where its files lie. Raises SetupError: there is none."""
        with self._registry(f"{'version' if word.isdecimal() else 'alias'} {word} of ") as (client, name):
            get = client.get_model_version if word.isdecimal() else client.get_model_version_by_alias
            found = get(name, word)
            return str(found.version), str(found.source)

    def fetch(self, source: str, folder: Path) -> Path:
        """Where the files of a version lie: its own place if that is on this machine, else `folder`, after a download.

        What is in `folder` already is taken as it is; a download arrives whole or not at all. Raises SetupError: none arrives.
        """
        address = urlsplit(source)
        if address.scheme in ("", "file"):
            return Path(unquote(address.path) if address.scheme else source)
        if not folder.exists():
            mlflow = self._mlflow()
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
                try:
                    Path(mlflow.artifacts.download_artifacts(source, dst_path=temporary)).rename(folder)
                except Exception as error:  # each store raises its own kinds
                    if not folder.exists():  # else another process was faster
                        told = _first_line(error)
                        raise SetupError(f"{source}: does not arrive in {folder} ({told}); check both places") from None
        return folder

    def versions(self) -> list[dict[str, Any]]:
        """The registered bundles, newest first: version, bundle, aliases, decision, created (UTC), run, source."""
        if not self.on or (self._database and not self._database.is_file()):
            return []
        client = self._mlflow().MlflowClient()
        found = client.search_model_versions(f"name = '{self.settings.model}'")
        aliases = client.get_registered_model(self.settings.model).aliases if found else {}
        return [
            {
                "version": int(version.version),
                "bundle": version.tags.get("bundle", ""),
                "aliases": ", ".join(sorted(alias for alias, number in aliases.items() if number == version.version)),
                "decision": version.tags.get("promotion.decision", ""),
                "created": datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
                "run": version.run_id,
                "source": version.source,
            }
            for version in sorted(found, key=lambda version: -int(version.version))
        ]

    @contextmanager
    def _registry(self, what: str = "") -> Iterator[tuple[Any, str]]:
        """The client and the name of the registered model. Raises SetupError: tracking is off, the store does not answer, or it
        has not `what` of the model.
        """
        if not self.on:
            raise SetupError("tracking is off, and so is the registry of bundles; set tracking.uri to its store")
        mlflow, name = self._mlflow(), self.settings.model
        try:
            yield mlflow.MlflowClient(), name
        except mlflow.exceptions.MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                missing = f"{what}model {name}"
                raise SetupError(f"MLflow at {self.uri} has no {missing}; `recsys bundles list` shows what there is") from None
            raise self._silent(error) from None

    def _line(self, client: Any) -> tuple[str, list[str]]:
        """The champion, empty for none, and those that were it before, oldest first."""
        model = client.get_registered_model(self.settings.model)
        return str(model.aliases.get(CHAMPION, "")), [*filter(None, model.tags.get(f"{CHAMPION}.before", "").split(","))]

    def _remember(self, before: list[str]) -> None:
        with self._registry() as (client, name):
            client.set_registered_model_tag(name, f"{CHAMPION}.before", ",".join(before[-REMEMBERED:]))

    def _silent(self, error: Exception) -> SetupError:
        told = _first_line(error)
        return SetupError(f"MLflow at {self.uri} does not answer ({told}); check tracking.uri, or set it to off")

    def _mlflow(self) -> Any:
        global _chosen
        try:
            import mlflow
        except ImportError as error:
            raise SetupError(f"mlflow does not load ({error}); run `recsys doctor`, or set tracking.uri=off") from None
        for chatty in ("alembic", "mlflow"):  # a new database reports every migration, a run its monitor's start and stop
            logging.getLogger(chatty).setLevel(logging.WARNING)
        here = (self.uri, self.settings.experiment)
        if _chosen != here:
            mlflow.set_tracking_uri(self.uri)
            try:
                self._choose_experiment(mlflow)
            except Exception as error:  # each store raises its own kinds
                raise self._silent(error) from None
            _chosen = here
        return mlflow

    def _choose_experiment(self, mlflow: Any) -> None:
        """Artifacts of a SQLite store lie beside the database, wherever the command was started."""
        client, name = mlflow.MlflowClient(), self.settings.experiment
        if client.get_experiment_by_name(name) is None:
            beside = self._database and (self._database.absolute().parent / "mlartifacts").as_uri()
            client.create_experiment(name, artifact_location=beside)
        mlflow.set_experiment(name)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


_chosen: tuple[str, str] | None = None
"""Store and experiment that MLflow's module-wide state points at."""
