"""What a catalogue of up to ten million items costs: to export, to load, in memory, and by the request.

usage: python -m tests.benchmarks.catalogue_size [--items 10000 100000 …] [--folder FOLDER] [--set index.kind=ivf_pq …]

An untrained model of width 64, whose items are unit vectors around a centre for every 1,000 of them, and these around one for
every 100,000, so that what is near an item is of many families; ids and titles are texts. Requests and the index's recall are
of histories of 50 events from two families, k = 20, on one thread, without a ranker. A process of its own loads the bundle:
`loaded` is of its memory then, `served` after the requests, in MB: `own` is anonymous, `files` is mapped and shared with other
processes, `pss` counts what is shared by its share. Of a request, `ms of its core` leaves out what other processes took. Prints
a JSON line for each size; ten million items need about 10 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from features.dataset import write_parquet
from recsys.batch import FIRST_ITEM, Batch
from recsys.bundle import publish
from recsys.model import WEIGHTS, ModelSettings, SequenceModel
from serving import live
from serving.catalogue import ITEMS
from serving.engine import Recommender
from serving.export import QUERIES, export, measure_index
from serving.index import Index, IndexSettings

WIDTH, CLUSTER, EVENTS, K, REQUESTS, PART = 64, 1000, 50, 20, 2000, 2**18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--set", nargs="+", default=[], help="of the index: kind=ivf_pq probes=64")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure)))
        return
    chosen = {name: int(value) if value.isdigit() else value for name, value in (word.split("=") for word in args.set)}
    for items in args.items:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            write_run(folder / "run", items)
            started = time.perf_counter()
            manifest = export(folder / "run", folder / "bundle", IndexSettings(**chosen))
            seconds = {**manifest["clock"]["seconds"], "all": time.perf_counter() - started}
            bytes_ = {file: round(entry["bytes"] / 1e6) for file, entry in manifest["files"].items()}
            words = [sys.executable, "-m", "tests.benchmarks.catalogue_size", "--measure", str(folder / "bundle")]
            told = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            line = {
                "items": items,
                "kind": manifest["index"]["kind"],
                "export seconds": {stage: round(each, 1) for stage, each in seconds.items()},
                "MB": {"all": sum(bytes_.values()), **{file: size for file, size in bytes_.items() if size}},
                **told,
            }
            print(json.dumps(line), flush=True)


def write_run(run: Path, items: int) -> None:
    """A run as training writes it, of a model that learnt nothing."""
    draw = torch.Generator().manual_seed(1)
    model = SequenceModel(ModelSettings(length=EVENTS, dropout=0.0), items).initialise(draw)
    centres = torch.randn(-(-items // CLUSTER), WIDTH, generator=draw) * 0.5
    above = torch.randn(-(-len(centres) // 100), WIDTH, generator=draw)
    centres += above[torch.arange(len(centres)) % len(above)]
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)  # so that what was read before the last event counts
        for lines in torch.split(torch.arange(items), PART):
            noise = torch.randn(len(lines), WIDTH, generator=draw)
            model.table.weight[lines + FIRST_ITEM] = normalize(centres[lines % len(centres)] + 0.7 * noise, dim=1)
    numbers = pl.int_range(items, eager=True)
    table = pl.DataFrame(
        {
            "row": (numbers + FIRST_ITEM).cast(pl.Int32),
            "item_id": pl.select(pl.format("sku-{}", numbers * 7919 % 10**9)).to_series(),
            "title": pl.select(pl.format("Thing {} of family {}", numbers, numbers % len(centres))).to_series(),
            "text": pl.repeat("", items, eager=True),
            "categories": pl.repeat([], items, dtype=pl.List(pl.String), eager=True),
            "numbers": pl.repeat([], items, dtype=pl.List(pl.Struct({"values": pl.List(pl.Float64)})), eager=True),
            "events": (10 * items // (numbers + 1)).cast(pl.Int64),
        }
    )
    manifest = {
        "kind": "model",
        "name": "made-up",
        "recipe": {ModelSettings.section: model.settings.as_dict()},
        "items": items,
        "dataset": {"hash": ""},
        "quality": {"validation": {"ndcg@10": 0.0}},
        "clock": {},
    }
    writers = {
        WEIGHTS: lambda path: save_file(model.weights(), path),
        ITEMS: lambda path: write_parquet([table], table.schema, path),
    }
    publish(run / "model", writers, manifest)


def measured(bundle: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    before = memory()
    started = time.perf_counter()
    Recommender.load(bundle, verify=False, threads=1)
    mapped = time.perf_counter() - started
    started = time.perf_counter()
    recommender = live.load(bundle)
    live.warm(recommender, ())
    seconds, loaded = time.perf_counter() - started, memory()
    histories = histories_of(len(recommender.catalogue), REQUESTS)
    asked = [[recommender.catalogue.item_id(row) for row in rows] for rows in histories]
    took, worked = [], []
    for history in asked:
        began, busy = time.perf_counter(), time.thread_time()
        recommender.answer(history, K, find=recommender.catalogue.by_id)
        took.append(1000 * (time.perf_counter() - began))
        worked.append(1000 * (time.thread_time() - busy))
    served = memory()
    told = {}
    if isinstance(recommender.searcher, Index):
        states = recommender.encode(Batch.of(histories[:QUERIES]))
        found, query_ms = measure_index(recommender.searcher, recommender.scan.vectors_VE, states)
        told = {**found, "query ms": round(query_ms, 3)}
    return {
        **told,
        "load seconds": {"unverified": round(mapped, 2), "live": round(seconds, 2)},
        "MB before": before,
        "loaded": loaded,
        "served": served,
        "ms": {name: round(float(np.quantile(took, part)), 2) for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1))},
        "ms of its core": {name: round(float(np.quantile(worked, part)), 2) for name, part in (("p50", 0.5), ("p99", 0.99))},
    }


def histories_of(items: int, count: int) -> list[list[int]]:
    """Rows of items from two clusters, popular ones more often."""
    draw, clusters = np.random.default_rng(2), -(-items // CLUSTER)
    own = draw.integers(clusters, size=(count, 2))[np.arange(count)[:, None], draw.integers(2, size=(count, EVENTS))]
    members = (CLUSTER * draw.random((count, EVENTS)) ** 2).astype(np.int64)
    rows: list[list[int]] = (np.minimum(own + clusters * members, items - 1) + FIRST_ITEM).tolist()
    return rows


def memory() -> dict[str, int]:
    told = Path("/proc/self/status").read_text() + Path("/proc/self/smaps_rollup").read_text()
    names = {"own": "RssAnon", "files": "RssFile", "pss": "Pss"}
    return {name: round(int(re.search(rf"^{kind}:\s+(\d+)", told, re.M)[1]) / 1024) for name, kind in names.items()}  # type: ignore[index]


if __name__ == "__main__":
    main()
