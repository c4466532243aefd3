"""Make a bundle of a run: its model, item vectors and index, what the index costs and finds, and how true explanations are."""

from __future__ import annotations

import shutil
import statistics
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.dataset import Dataset
from recsys.batch import FIRST_ITEM, Batch, spread
from recsys.bundle import Directory, Writer, model_of, open_directory, publish, told
from recsys.content import CONTENT, ENCODER
from recsys.errors import BundleError
from recsys.model import WEIGHTS
from recsys.ranker import COMPANIONS, RANKER
from recsys.version import __version__
from serving import golden
from serving.calibration import MOST, Calibration
from serving.catalogue import ITEMS
from serving.engine import Clock, Recommender
from serving.explain import faithfulness
from serving.index import INDEX, Index, IndexSettings, Scan
from serving.names import NAMES
from serving.pyfunc import MLMODEL, write_mlmodel
from serving.ranking import ServingSettings
from serving.reader import graphs
from serving.retrieval import QUERIES as TOGETHER
from serving.retrieval import find
from serving.states import DepthSettings
from serving.vectors import LONGEST, VECTORS, is_table, write_vectors

QUERIES = 512
"""Queries by which the index is measured."""
NOISY = "items with noise"
HISTORIES = 128
"""Histories by which explanations are measured: 5 s of one core on ml-1m."""
COPIED = (CONTENT, ENCODER, RANKER, COMPANIONS)
"""Files of a run that its bundle has too, where the run has them."""
DEPTH = 100
"""Items of a query that are compared with exact search."""


def export(
    run: Path,
    out: Path,
    settings: IndexSettings,
    dataset: Dataset | None = None,
    depth: DepthSettings | None = None,
    serving: ServingSettings | None = None,
) -> dict[str, Any]:
    """Write the bundle `out`, whole or not at all, and return its manifest.

    The index is measured by histories of the data set, or without one by item vectors with noise; how true explanations are,
    by histories alone. The same run and settings give the same bytes but for the manifest's `clock`.
    Raises BundleError: no finished run, or one that was altered.
    """
    source = model_of(run)
    model = open_directory(source).manifest
    if model["kind"] != "model":
        raise BundleError(f"{run}: holds a {model['kind']}, not a run; give the directory that `recsys train` wrote")
    recipe = {
        **model["recipe"],
        IndexSettings.section: settings.as_dict(),
        DepthSettings.section: (depth or DepthSettings()).as_dict(),
        ServingSettings.section: (serving or ServingSettings()).as_dict(),
    }
    seconds: dict[str, float] = {}
    clock = Clock(seconds)
    recommender = Recommender(Directory(source, {**model, "recipe": recipe}))
    vectors_VE = recommender.scan.vectors_VE.detach()
    clock.lap("read")
    index = recommender.searcher = Index.build(vectors_VE, settings)  # what is measured is what requests will find
    clock.lap("index")
    measured, query_ms = measure_bundle(recommender, index, dataset)
    clock.lap("measure")
    manifest = {
        **told(model),
        "kind": "bundle",
        "version": __version__,
        "run": model["id"],
        "recipe": recipe,
        **measured,
        LONGEST: recommender.scan.longest,
        "clock": {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": {stage: round(each, 2) for stage, each in seconds.items()},
            "query_ms": round(query_ms, 4),
            "run": model.get("clock", {}),
        },
    }
    writers: dict[str, Writer] = {
        WEIGHTS: partial(shutil.copyfile, source / WEIGHTS),
        ITEMS: partial(shutil.copyfile, source / ITEMS),
        NAMES: recommender.catalogue.names.save,
        INDEX: index.write,
        MLMODEL: partial(write_mlmodel, isinstance(recommender.catalogue.item_id(FIRST_ITEM), int)),
    }
    if not is_table(vectors_VE, recommender.model):
        writers[VECTORS] = partial(write_vectors, vectors_VE)
    writers |= {file: partial(shutil.copyfile, source / file) for file in COPIED if file in model["files"]}
    writers |= graphs(recommender.model, recommender.ranker, recommender.known)
    writers[golden.GOLDEN] = golden.writer(manifest)  # the last: it reads the others
    return publish(out, writers, manifest).manifest


def measure_bundle(recommender: Recommender, index: Index, dataset: Dataset | None) -> tuple[dict[str, Any], float]:
    """What a manifest says of how lists are made: `index`, `faithfulness` and `calibration`, and the milliseconds of a query.

    Without a data set the last two are missing; without a validation split the last is.
    """
    queries_BE, queries = _queries(recommender, dataset)
    found, query_ms = measure_index(index, recommender.scan.vectors_VE, queries_BE)
    said = {"index": {"kind": index.kind, **found, "queries": queries}, **calibrated(recommender, dataset)}
    if dataset is not None:
        histories, now_B = _histories(recommender, dataset, HISTORIES)
        said["faithfulness"] = faithfulness(recommender, histories, now_B, torch.Generator().manual_seed(0))
    return said, query_ms


def measure_index(index: Index, vectors_VE: Tensor, queries_BE: Tensor) -> tuple[dict[str, float], float]:
    """Recall@100 of what requests find against exact search, and the median milliseconds of one query on one thread."""
    depth, found, times = min(DEPTH, len(vectors_VE)), 0, []
    scan, before, index.threads = Scan(vectors_VE), index.threads, 1
    exact_BN = torch.cat([scan.search(some_BE, depth)[0] for some_BE in torch.split(queries_BE, TOGETHER)])
    for query_1E, exact_N in zip(torch.split(queries_BE, 1), exact_BN, strict=True):
        started = time.perf_counter()
        rows_1N, _ = find(index, scan, query_1E, depth)
        times.append(time.perf_counter() - started)
        found += int(torch.isin(exact_N, rows_1N - FIRST_ITEM).sum())
    index.threads = before
    return {f"recall@{DEPTH}": round(found / (depth * len(queries_BE)), 6)}, 1000 * statistics.median(times)


def _queries(recommender: Recommender, dataset: Dataset | None) -> tuple[Tensor, str]:
    """What measures the index, and its name: states of evenly chosen users, or item vectors with noise as long as they."""
    if dataset is not None:
        histories, now_B = _histories(recommender, dataset, QUERIES)
        if len(histories):
            return recommender.encode(histories, now_B), "histories"
    return noisy(recommender.scan.vectors_VE), NOISY


def calibrated(recommender: Recommender, dataset: Dataset | None) -> dict[str, Any]:
    """`calibration` for a manifest, fitted on the validation split; nothing without one."""
    if dataset is None:
        return {}
    sequences = recommender.catalogue.align(dataset)
    users_U, (_, ends_U, _) = sequences.judged("validation"), sequences.windows("validation")
    users_B = users_U[spread(len(users_U), MOST)]
    histories = sequences.histories("validation", users_B)
    rows_BN, scores_BN = recommender.candidates(histories, sequences.times[ends_U[users_B]] if len(users_B) else None)
    fitted = Calibration.fit(rows_BN, scores_BN, sequences.items[ends_U[users_B]].long())
    return {} if fitted is None else {"calibration": fitted.as_dict()}


def _histories(recommender: Recommender, dataset: Dataset, count: int) -> tuple[Batch, Tensor]:
    """Of at most `count` evenly chosen users before the test, and when each is asked for: at the next event, or the last."""
    sequences = recommender.catalogue.align(dataset)
    begins_U, ends_U, targets_U = sequences.windows("test")
    users_U = (ends_U > begins_U).nonzero().flatten()
    users_B = users_U[spread(len(users_U), count)]
    next_B = torch.where(targets_U > ends_U, ends_U, ends_U - 1)[users_B]
    return sequences.histories("test", users_B), sequences.times[next_B]


def noisy(vectors_VE: Tensor) -> Tensor:
    """Evenly chosen item vectors with noise as long as they."""
    chosen_BE = vectors_VE[spread(len(vectors_VE), QUERIES)]
    noise_BE = torch.randn(chosen_BE.shape, generator=torch.Generator().manual_seed(0))
    out: Tensor = chosen_BE + noise_BE * (chosen_BE.norm(dim=1, keepdim=True) / chosen_BE.shape[1] ** 0.5)
    return out
