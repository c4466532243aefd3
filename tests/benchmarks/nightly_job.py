"""What the nightly job costs: users a second beside the bare arithmetic, memory by the number of users, a night of changes.

usage: python -m tests.benchmarks.nightly_job speed BUNDLE --dataset DATASET [--times 10] [--workers 2] [--rounds 3]
       python -m tests.benchmarks.nightly_job speed --items 100000 --users 100000 [--no-ranker] …
       python -m tests.benchmarks.nightly_job memory --items 100000 --users 100000 1000000 [--no-ranker] …
       python -m tests.benchmarks.nightly_job delta --items 100000 --users 200000 [--changed .03] [--no-ranker] …

With --items a bundle of untrained weights over made-up items and a data set of users with 50 events each are made, as the other
benchmarks have them; else a data set is taken as often as `--times` says, each time under other user ids. *speed* runs, in
turn and as many times as there are rounds, a full night (from the start of its processes to the live lists of 100) and the
bare rate (*steady*: from the first finished shard to the last): in as many processes the model's, the ranker's and the index's
calls of 2,048 users, recorded while their lists were made, are repeated in a tight loop and nothing else. Prints a JSON line
each, and medians. *memory* prints seconds and the peak of what the job's processes own together (PSS). *delta* runs a full
night, changes a share of the users, and runs a night of what changed and a full one: seconds of each, and whether they are
equal.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil

from features.dataset import LIST_ROWS, Dataset, write_parquet
from recsys.batch import FIRST_ITEM
from recsys.bundle import publish
from serving.engine import Recommender
from serving.intake import dataset_source, read_shard
from serving.nightly import nightly
from serving.nights import Nights
from serving.retrieval import taken
from serving.shards import Terms
from serving.workers import Processes, _one_thread
from tests.benchmarks.load import made_bundle

HISTORY, K, NOW, USERS = 50, 100, 2 * 10**9, 2048
CHUNK = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "delta", "one"])
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--users", type=int, nargs="*", default=[100_000])
    parser.add_argument("--no-ranker", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--changed", type=float, default=0.03)
    parser.add_argument("--out", type=Path, help="folder of nights, for `one`")
    args = parser.parse_args()
    if args.what == "one":
        print(json.dumps(one(args.bundle, args.dataset, args.out, args.workers, args.no_ranker)))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        bundle = args.bundle or made_bundle(place / "made", args.items, not args.no_ranker)
        {"speed": speed, "memory": memory, "delta": delta}[args.what](args, bundle, place)


def speed(args: argparse.Namespace, bundle: Path, place: Path) -> None:
    dataset = histories(args, bundle, place, args.users[0])
    found: dict[str, list[float]] = {"night": [], "steady": [], "bare": []}
    for number in range(args.rounds):
        told = run(bundle, dataset, place / f"lists {number}", args)
        rate = bare(bundle, dataset, args.workers, args.no_ranker)
        found["night"].append(told["users"] / told["seconds"])
        found["steady"].append(told["steady"])
        found["bare"].append(rate)
        print(
            json.dumps({"users": told["users"], "seconds": told["seconds"], **{n: round(r[-1]) for n, r in found.items()}}),
            flush=True,
        )
        shutil.rmtree(place / f"lists {number}")
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    shares = {name: round(medians[name] / medians["bare"], 3) for name in ("night", "steady")}
    print(json.dumps({"medians": {name: round(rate) for name, rate in medians.items()}, "share of bare": shares}))


def memory(args: argparse.Namespace, bundle: Path, place: Path) -> None:
    for users in args.users:
        dataset = histories(args, bundle, place, users)
        peak, over = [0], threading.Event()
        words = [sys.executable, "-m", "tests.benchmarks.nightly_job", "one", str(bundle), "--dataset", str(dataset)]
        words += ["--out", str(place / "lists"), "--workers", str(args.workers), *(["--no-ranker"] if args.no_ranker else [])]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            watch = threading.Thread(target=owned, args=(process.pid, peak, over))
            watch.start()
            told = json.loads(process.communicate()[0])
            over.set()
            watch.join()
        print(json.dumps({**told, "peak_mb": round(peak[0] / 2**20)}), flush=True)
        shutil.rmtree(place / "lists")
        shutil.rmtree(dataset)


def delta(args: argparse.Namespace, bundle: Path, place: Path) -> None:
    dataset = histories(args, bundle, place, args.users[0])
    before = run(bundle, dataset, place / "lists", args)
    changed = change(dataset, place / "changed", args.changed)
    some = run(bundle, changed, place / "lists", args)
    full = run(bundle, changed, place / "full", args)
    print(json.dumps({"full": [before["seconds"], full["seconds"]], "changes": some["seconds"], "computed": some["computed"]}))
    print(json.dumps({"share": round(some["seconds"] / full["seconds"], 3), "equal": some["hash"] == full["hash"]}))


def run(bundle: Path, dataset: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A night in a process of its own."""
    words = [sys.executable, "-m", "tests.benchmarks.nightly_job", "one", str(bundle), "--dataset", str(dataset)]
    words += ["--out", str(out), "--workers", str(args.workers), *(["--no-ranker"] if args.no_ranker else [])]
    found: dict[str, Any] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def one(bundle: Path, dataset: Path, out: Path, workers: int, no_ranker: bool) -> dict[str, Any]:
    recommender = Recommender.load(bundle, verify=False, threads=1)
    assert not (no_ranker and recommender.ranker_blocks), "export the bundle with --set serving.ranker_blocks=0"
    heard: list[tuple[float, int]] = []

    def listen(what: str, done: int, of: int) -> None:
        if what == "nightly":
            heard.append((time.perf_counter(), done))

    night = nightly(
        recommender,
        dataset_source(dataset),
        Nights(out),
        Terms(k=K, now=NOW),
        engine=Processes(bundle, workers),
        progress=listen,
    ).manifest
    (begin, before), (end, after) = heard[workers - 1], heard[-1]  # each process has made a shard, and each the last one
    return {
        "users": night["users"],
        "seconds": night["clock"]["seconds"],
        "steady": round((after - before) / max(end - begin, 1e-9)),
        "hash": night["hash"],
        "computed": night["clock"]["computed"],
    }


def owned(pid: int, peak: list[int], over: threading.Event) -> None:
    """The largest sum of what a process and its children own."""
    while not over.wait(0.5):
        total = 0
        try:
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
        peak[0] = max(peak[0], total)


class Recorder:
    """Remembers the calls of one method of another object."""

    def __init__(self, other: Any, name: str) -> None:
        self.other, self.calls = other, []
        setattr(self, name, self.call)
        self.method = getattr(other, name)

    def call(self, *arguments: Any, **options: Any) -> Any:
        kept = tuple(one.copy() if isinstance(one, np.ndarray) else one for one in arguments)
        self.calls.append((self.method, kept, options))
        return self.method(*arguments, **options)


def bare(bundle: Path, dataset: Path, workers: int, no_ranker: bool) -> float:
    """Users a second of all processes together."""
    context = multiprocessing.get_context("spawn")
    start, rates = context.Barrier(workers), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        dataset_source(dataset).deal(Path(folder) / "histories", 8, None, lambda done, of: None)
        with _one_thread():
            processes = [
                context.Process(target=repeat, args=(bundle, Path(folder) / "histories", number, no_ranker, start, rates))
                for number in range(workers)
            ]
            for process in processes:
                process.start()
        total = sum(rates.get() for _ in processes)
        for process in processes:
            process.join()
    return float(total)


def repeat(bundle: Path, dealt: Path, number: int, no_ranker: bool, start: Any, rates: Any) -> None:
    import torch

    torch.set_num_threads(1)
    recommender = Recommender.load(bundle, verify=False, threads=1)
    found = read_shard(dealt, number, recommender.catalogue)
    histories = taken(found.histories, torch.arange(min(USERS, len(found.histories))))
    recorders = [Recorder(recommender.reader._session, "run"), Recorder(recommender.searcher._index, "search")]
    recommender.reader._session, recommender.searcher._index = recorders
    for ranker in recommender._graph_rankers.values():
        recorders.append(Recorder(ranker._session, "run"))
        ranker._session = recorders[-1]
    recommender.recommend(histories, K, NOW if recommender.reads_now else None)
    calls = [call for recorder in recorders for call in recorder.calls]
    start.wait()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < 20:
        for method, arguments, options in calls:
            method(*arguments, **options)
        done += len(histories)
    rates.put(done / (time.perf_counter() - began))


def histories(args: argparse.Namespace, bundle: Path, place: Path, users: int) -> Path:
    """A data set: a given one so many times, or made-up users."""
    if args.dataset:
        table = pl.read_parquet(args.dataset / "sequences.parquet")
        ids = pl.col("user_id").cast(pl.String)
        frames: Iterator[pl.DataFrame] = (
            table.with_columns(user_id=pl.format("{}-{}", ids, pl.lit(number))) for number in range(args.times)
        )
        return written(place / "dataset", frames, args.dataset / "items.parquet", args.times * len(table))
    return written(place / f"{users} users", made(users, args.items), bundle / "items.parquet", users)


def made(users: int, items: int) -> Iterator[pl.DataFrame]:
    for start in range(0, users, CHUNK):
        count, draw = min(CHUNK, users - start), np.random.default_rng(start)
        rows = draw.integers(FIRST_ITEM, FIRST_ITEM + items, (count, HISTORY), dtype=np.int32)
        times = 10**9 + draw.integers(10**8, size=(count, HISTORY)).cumsum(1) // HISTORY
        yield pl.DataFrame({"user_id": np.arange(start, start + count), "items": rows, "timestamps": times})


def written(path: Path, frames: Iterator[pl.DataFrame], items: Path, users: int) -> Path:
    def lists() -> Iterator[pl.DataFrame]:
        for frame in frames:
            ends = pl.col("items").list.len().cast(pl.Int32)
            yield frame.with_columns(
                pl.col("items").cast(pl.List(pl.Int32)), pl.col("timestamps").cast(pl.List(pl.Int64))
            ).select("user_id", "items", "timestamps", train_end=ends, validation_end=ends)

    given = lists()
    first = next(given)

    def every() -> Iterator[pl.DataFrame]:
        yield first
        yield from given

    publish(
        path,
        {
            "sequences.parquet": lambda file: write_parquet(every(), first.schema, file, LIST_ROWS),
            "items.parquet": lambda file: shutil.copyfile(items, file),
        },
        {"kind": "dataset", "users": users},
        "dataset.json",
    )
    return path


def change(dataset: Path, path: Path, share: float) -> Path:
    """The data set with another event of some users."""
    table = pl.read_parquet(Dataset.open(dataset).path / "sequences.parquet")
    chosen = np.random.default_rng(7).random(len(table)) < share
    more = table.with_columns(
        items=pl.when(pl.Series(chosen)).then(pl.concat_list("items", pl.lit(FIRST_ITEM, pl.Int32))).otherwise("items"),
        timestamps=pl.when(pl.Series(chosen))
        .then(pl.concat_list("timestamps", pl.col("timestamps").list.last() + 60))
        .otherwise("timestamps"),
    ).drop("train_end", "validation_end")
    return written(path, iter([more]), dataset / "items.parquet", len(table))


if __name__ == "__main__":
    main()
