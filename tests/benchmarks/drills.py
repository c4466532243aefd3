"""Bad days of one worker of the online API, and what its users see of them.

usage: python -m tests.benchmarks.drills [swaps] [overload] [events] [--bundle DIRECTORY] [--items 100000]

swaps     two bundles in turn, 100 times, in one place while answers are asked for: errors, answers whose items are not those of
          the bundle that they name, and the memory of the process, which must stay flat
overload  three times the requests that the worker can answer: how late the admitted answers are, what the others are told, and
          how late /health is meanwhile
events    an event is posted and the next list asked for: how long both take, and whether the list knows the event

The worker is a process of `recsys serve`, the load comes from this one. Prints one JSON object a drill. The bundle is that of
tests/benchmarks/load.py, or --bundle.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psutil
import torch
from safetensors.torch import load_file, save_file

from recsys.bundle import open_directory
from recsys.model import WEIGHTS
from serving import golden
from serving.engine import Recommender
from serving.index import INDEX, Index, IndexSettings
from serving.vectors import VECTORS, write_vectors
from tests.benchmarks.load import K, Load, free_port, made_bundle, posted, questions, wait_for

SWAPS, RATE = 100, 60
OVERLOAD_SECONDS = 20


@dataclass
class Worker:
    """A running `recsys serve`."""

    url: str
    port: int
    process: psutil.Process


@contextmanager
def worker(bundle: Path, folder: Path, *settings: str) -> Iterator[Worker]:
    port = free_port()
    words = [sys.executable, "-m", "recsys", "serve", str(bundle), "--port", str(port)]
    words += ["--store", f"sqlite:{folder / 'histories.sqlite'}"]
    for setting in settings:
        words += ["--set", setting]
    with (folder / "log").open("w") as log, subprocess.Popen(words, stderr=log) as process:
        try:
            wait_for(port)
            yield Worker(f"http://127.0.0.1:{port}", port, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(60)
            assert process.returncode == 0, (folder / "log").read_text()[-2000:]


def other_bundle(bundle: Path, out: Path) -> None:
    """The same with item vectors and weights turned about, so that its lists are others."""
    directory = open_directory(bundle)
    weights = load_file(bundle / WEIGHTS)
    weights["table.weight"] = torch.cat([weights["table.weight"][:2], weights["table.weight"][2:].flip(0)])
    vectors_VE = Recommender.load(bundle).scan.vectors_VE.flip(0)
    index = Index.build(vectors_VE, IndexSettings(**directory.manifest["recipe"]["index"]))
    writers: dict[str, Any] = {
        WEIGHTS: lambda path: save_file(weights, path),
        VECTORS: partial(write_vectors, vectors_VE),
        INDEX: index.write,
    }
    golden.renew(directory, out, writers, {})


def swaps(bundle: Path, folder: Path) -> dict[str, Any]:
    places = [folder / "one", folder / "two"]
    shutil.copytree(bundle, places[0])
    other_bundle(bundle, places[1])
    asked = questions(len(Recommender.load(bundle).catalogue), 50, False, folder / "none")
    wanted: dict[str, list[list[Any]]] = {}
    for place in places:
        recommender = Recommender.load(place, threads=1)
        lists = [recommender.answer(each["history"], K, find=recommender.catalogue.by_id) for each in asked]
        wanted[recommender.id] = [[item["item_id"] for item in each["items"]] for each in lists]
    live = folder / "live"
    shutil.copytree(places[0], live)
    seen: dict[str, int] = {}
    mixed, memory = 0, []
    with worker(live, folder, "online.watch_seconds=0.2", "online.deadline_ms=60000") as served:
        stop, errors = threading.Event(), list[str]()

        def ask() -> None:
            nonlocal mixed
            with httpx2.Client(base_url=served.url, timeout=60) as client:
                place = 0
                while not stop.is_set():
                    place = (place + 1) % len(asked)
                    response = client.post("/v1/recommend", json=asked[place])
                    if response.status_code != 200:
                        errors.append(response.text)
                        continue
                    answer = response.json()
                    seen[answer["bundle"]] = seen.get(answer["bundle"], 0) + 1
                    mixed += [item["item_id"] for item in answer["items"]] != wanted[answer["bundle"]][place]

        asking = threading.Thread(target=ask)
        asking.start()
        with httpx2.Client(base_url=served.url, timeout=60) as client:
            for swap in range(1, SWAPS + 1):
                golden_of = open_directory(places[swap % 2], verify=False)
                fresh = folder / f"fresh-{swap}"
                shutil.copytree(golden_of.path, fresh)
                replaced = folder / f"replaced-{swap}"
                live.rename(replaced)
                fresh.rename(live)
                shutil.rmtree(replaced)
                for _ in range(1200):
                    if client.get("/v1/bundle").json()["arms"][0]["bundle"] == golden_of.manifest["id"]:
                        break
                    time.sleep(0.05)
                else:
                    raise SystemExit(f"swap {swap} did not happen: {client.get('/v1/bundle').text}")
                if swap % 10 == 0:
                    memory.append(round(served.process.memory_info().rss / 2**20))
        stop.set()
        asking.join()
    return {
        "swaps": SWAPS,
        "answers": seen,
        "errors": len(errors),
        "of another bundle than they name": mixed,
        "MiB after every ten": memory,
    }


def overload(bundle: Path, folder: Path) -> dict[str, Any]:
    items = len(Recommender.load(bundle).catalogue)
    with worker(bundle, folder, "online.deadline_ms=250") as served:
        probe = Load([posted(each) for each in questions(items, 3000, False, folder / "none")], 10**6)
        asyncio.run(probe.run("127.0.0.1", served.port))  # as many as it can answer
        capacity = probe.statuses[200] / max(1e-9, sum(probe.latencies) and max(probe.latencies))
        rate = 3 * capacity
        asked = [posted(each) for each in questions(items, int(rate * OVERLOAD_SECONDS), False, folder / "none")]
        load = Load(asked, rate, connections=1000)
        late: list[float] = []
        stop = threading.Event()

        def check() -> None:
            with httpx2.Client(base_url=served.url, timeout=60) as client:
                while not stop.is_set():
                    started = time.perf_counter()
                    assert client.get("/health").status_code == 200
                    late.append(time.perf_counter() - started)
                    time.sleep(0.02)

        checking = threading.Thread(target=check)
        checking.start()
        asyncio.run(load.run("127.0.0.1", served.port))
        stop.set()
        checking.join()
    return {
        "capacity": round(capacity),
        **load.figures(),
        "health p99": percentile(late, 99),
        "health largest": percentile(late, 100),
    }


def events(bundle: Path, folder: Path) -> dict[str, Any]:
    catalogue = Recommender.load(bundle).catalogue
    draw = torch.Generator().manual_seed(6)
    took, unknown = list[float](), 0
    with worker(bundle, folder) as served, httpx2.Client(base_url=served.url, timeout=60) as client:
        for turn in range(1000):
            user = {"user_id": f"user {turn % 50}"}
            before = client.post("/v1/recommend", json={**user, "k": K}).json()["items"]
            item = before[int(torch.randint(len(before), (1,), generator=draw))]["item_id"]  # what was on the screen is taken
            started = time.perf_counter()
            client.post(
                "/v1/events", json={"events": [{**user, "item_id": item, "event_id": f"event {turn}"}]}
            ).raise_for_status()
            after = client.post("/v1/recommend", json={**user, "k": K}).json()["items"]
            took.append(time.perf_counter() - started)
            unknown += item in [each["item_id"] for each in after]
    about = {"events": len(took), "lists that did not know it": unknown, "items": len(catalogue)}
    return {**about, "p50 ms": percentile(took, 50), "p99 ms": percentile(took, 99)}


def percentile(seconds: list[float], share: int) -> float:
    """In milliseconds."""
    return round(1000 * (max(seconds) if share == 100 else statistics.quantiles(seconds, n=100)[share - 1]), 2)


DRILLS = {"swaps": swaps, "overload": overload, "events": events}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drills", nargs="*", choices=[[], *DRILLS], default=[*DRILLS])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--items", type=int, default=100_000)
    args = parser.parse_args()
    for name in args.drills:
        with tempfile.TemporaryDirectory() as folder:
            bundle = args.bundle or made_bundle(Path(folder) / "made", args.items)
            (Path(folder) / "work").mkdir()
            print(json.dumps({"drill": name, **DRILLS[name](bundle, Path(folder) / "work")}), flush=True)


if __name__ == "__main__":
    main()
