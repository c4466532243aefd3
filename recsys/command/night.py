"""The nightly verb: where histories come from, what computes, where lists go, and the MLflow run of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from features.dataset import Dataset
from features.schema import DataSettings
from recsys.command.recipes import merge
from recsys.command.terminal import bar, warn, warn_of_later
from recsys.config import Recipe, Settings
from recsys.errors import GuardError, RecsysError
from recsys.progress import Progress
from recsys.tracking import OFF, Tracking, TrackingSettings
from serving.admission import OnlineSettings
from serving.delivery import deliver, delivery_to
from serving.engine import Recommender
from serving.guards import GuardSettings
from serving.intake import Source, dataset_source, events_source, store_source
from serving.nightly import NightlySettings, nightly
from serving.nights import Night, Nights
from serving.shards import Terms
from serving.workers import Engine, Here, Processes
from training.loop import choose_device

USERS = 8192
"""Users for which another process is worth its start of some seconds."""
OWNERS: tuple[type[Settings], ...] = (NightlySettings, GuardSettings, DataSettings, OnlineSettings)
"""Sections of the recipe that the verb reads."""

PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""How long a night waits for a server of MLflow, unless the environment says otherwise: by itself MLflow tries for minutes."""


def run(
    bundle: Path,
    out: Path,
    given: tuple[str, str],
    terms: Mapping[str, Any],
    where: Sequence[str],
    settings: list[str] | None,
    *,
    full: bool,
    force: bool,
    to: Sequence[str],
    workers: int,
    ray: str,
    device: str,
    track: bool,
) -> Night:
    """Make the night of the histories `given` as (dataset, store or events; its place), deliver it and record it."""
    for url in to:
        delivery_to(url)  # before the work, not after it
    recommender = Recommender.load(bundle, device=choose_device(device).type, threads=1)
    recipe = merge(recommender.manifest["recipe"], settings, *OWNERS)
    conditions = recommender.catalogue.attributes.read(where) if where else {}
    nights, source = Nights(out), _source(*given, recipe)
    with bar("users") as progress, _recorded(recommender, out.name, recipe, track) as record:
        try:
            night = nightly(
                recommender,
                source,
                nights,
                Terms(**terms, where=conditions),
                settings=recipe.read(NightlySettings),
                guards=recipe.read(GuardSettings),
                engine=_engine(recommender, source, workers, ray),
                full=full,
                force=force,
                progress=progress,
                tell=warn,
            )
        except GuardError:
            record(nights.refused)
            raise
        record(lambda: night.manifest)
        _deliver(night, to, progress)
    return night


def _deliver(night: Night, to: Sequence[str], progress: Progress) -> None:
    """Raises RecsysError: what failed, after all were tried."""
    failed: list[str] = []
    for url in to:
        try:
            deliver(night, url, partial(progress, "deliver"))
        except RecsysError as error:
            failed.append(str(error))
    if failed:
        raise RecsysError(f"{'; '.join(failed)}; the night is live: deliver it again with recsys deliver")


def _source(kind: str, place: str, recipe: Recipe) -> Source:
    if kind == "dataset":
        warn_of_later(Dataset.open(Path(place), verify=False).manifest["counts"])
        return dataset_source(Path(place))
    if kind == "store":
        return store_source(place, recipe.read(OnlineSettings).keep)
    return events_source(place, recipe.read(DataSettings))


def _engine(recommender: Recommender, source: Source, workers: int, ray: str) -> Engine:
    if ray:
        from serving.cluster import Cluster

        return Cluster(recommender.path, ray)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = workers or max(1, min(cores, -(-source.users // USERS)))
    on_cpu = recommender.scan.vectors_VE.device.type == "cpu"
    return Here(recommender) if not on_cpu or wanted == 1 else Processes(recommender.path, wanted)


@contextmanager
def _recorded(
    recommender: Recommender, name: str, recipe: Recipe, track: bool
) -> Iterator[Callable[[Callable[[], Mapping[str, Any]]], None]]:
    """A run of MLflow around the night, where it can be; what fails there is told, and does not stop the night."""
    for setting, value in PATIENCE.items():
        os.environ.setdefault(setting, value)
    tracking = Tracking.of(recommender.manifest).another() if track else Tracking(TrackingSettings(uri=OFF))
    with ExitStack() as stack:

        def safely(work: Callable[[], object]) -> None:
            try:
                work()
            except Exception as error:  # of whatever kind: the lists are worth more than their record
                warn(f"the night is not recorded: {' '.join(str(error).split())}")

        if tracking.on:
            run = tracking.run(f"nightly {name}")
            safely(run.__enter__)
            stack.push(lambda *raised: safely(partial(run.__exit__, *raised)) if tracking.run_id else None)

        def record(manifest: Callable[[], Mapping[str, Any]]) -> None:
            def told() -> None:
                tracking.settings_of({owner.section: vars(recipe.read(owner)) for owner in OWNERS[:2]})
                tracking.night(manifest())

            if tracking.run_id:
                safely(told)

        yield record
