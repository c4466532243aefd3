"""How many answers a second one worker of the online API gives, and how late: an open-loop load.

usage: python -m tests.benchmarks.load [--items 100000] [--seconds 20] [--rates 300 600 …] [--no-ranker] [--by-user] …

A bundle is made up as in served_path (default settings of the model: two SASRec blocks of width 64; a ranker of one block with
companions), and `recsys serve` answers over it in a process of its own; the generator is this one, on the same machine.
Requests are sent at a fixed rate whatever the answers do, and their latency counts from the moment at which each was to be
sent: who waits for a connection waits. Each asks for 20 items for a history of 50 events that was not asked for before (with
--by-user: for a user whose 50 events are in a SQLite store; each user comes again about twice). 200 candidates are retrieved
and, with the ranker, ranked. Prints one JSON object a rate: p50, p99 and the largest latency in milliseconds, statuses,
sources, and the mean milliseconds of each stage as /metrics has them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, deque
from pathlib import Path
from typing import Any

import torch

from recsys.model import ModelSettings
from serving.history import Event, open_store
from serving.index import IndexSettings
from tests.benchmarks import served_path
from tests.benchmarks.index_recall import vectors

CONNECTIONS = 64
HISTORY, K = 50, 20


class Connection(asyncio.Protocol):
    """One request at a time over a connection that stays."""

    def __init__(self, load: Load) -> None:
        self.load, self.transport = load, None
        self.parts = b""
        self.meant = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.load.idle.append(self)

    def send(self, meant: float, request: bytes) -> None:
        self.meant = meant
        self.transport.write(request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.parts += data
        head, found, body = self.parts.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(re.search(rb"content-length: (\d+)", head, re.I)[1])  # type: ignore[index]
        if len(body) < length:
            return
        self.load.done(self.meant, int(head[9:12]), body)
        self.parts = b""
        self.load.free(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.load.lost += 1


class Load:
    """Sends requests when they are due, over whichever connection is free."""

    def __init__(self, requests: list[bytes], rate: float, connections: int = CONNECTIONS) -> None:
        self.requests, self.rate, self.connections = requests, rate, connections
        self.idle: deque[Connection] = deque()
        self.waiting: deque[tuple[float, bytes]] = deque()
        self.latencies: list[float] = []
        self.refusals: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.sources: Counter[str] = Counter()
        self.lost = 0

    def done(self, meant: float, status: int, body: bytes) -> None:
        self.statuses[status] += 1
        (self.latencies if status == 200 else self.refusals).append(time.perf_counter() - meant)
        if status == 200:
            start = body.index(b'"source":"') + 10
            self.sources[body[start : body.index(b'"', start)].decode()] += 1

    def free(self, connection: Connection) -> None:
        if self.waiting:
            connection.send(*self.waiting.popleft())
        else:
            self.idle.append(connection)

    async def run(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(self.connections):
            await loop.create_connection(lambda: Connection(self), host, port)
        self.lost, started = 0, time.perf_counter() + 0.1
        for place, request in enumerate(self.requests):
            meant = started + place / self.rate
            late = meant - time.perf_counter()
            if late > 0:
                await asyncio.sleep(late)
            if self.idle:
                self.idle.popleft().send(meant, request)
            else:
                self.waiting.append((meant, request))
        end = time.perf_counter() + 30
        while self.statuses.total() < len(self.requests) and time.perf_counter() < end:
            await asyncio.sleep(0.05)

    def figures(self) -> dict[str, Any]:
        cuts = statistics.quantiles(self.latencies, n=1000)
        return {
            "rate": self.rate,
            "answered": len(self.latencies),
            "p50": round(1000 * cuts[499], 2),
            "p99": round(1000 * cuts[989], 2),
            "largest": round(1000 * max(self.latencies), 1),
            "statuses": dict(self.statuses),
            "sources": dict(self.sources),
            "lost connections": self.lost,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rates", type=float, nargs="*", default=[300, 600])
    parser.add_argument("--no-ranker", action="store_true")
    parser.add_argument("--by-user", action="store_true")
    parser.add_argument("--block", default="sasrec")
    parser.add_argument("--index", default="ivf", help="kind of index")
    parser.add_argument("--probes", type=int, default=64)
    parser.add_argument("--bundle", type=Path, help="where the bundle is kept between runs")
    parser.add_argument("--log", action="store_true", help="show the end of the server's log")
    parser.add_argument("--set", nargs="*", default=[], help="further settings of `recsys serve`")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = args.bundle or Path(folder) / "made"
        if not (place / "bundle").exists():
            made_bundle(place, args.items, not args.no_ranker, args.block, IndexSettings(kind=args.index, probes=args.probes))
        store = Path(folder) / "histories.sqlite"
        port = free_port()
        count = int(sum(args.rates) * args.seconds)
        asked = questions(args.items, count, args.by_user, store)
        words = [
            sys.executable,
            "-m",
            "recsys",
            "serve",
            str(place / "bundle"),
            "--port",
            str(port),
            "--store",
            f"sqlite:{store}",
        ]
        for setting in ["online.deadline_ms=60000", "online.queue=4096", *args.set]:
            words += ["--set", setting]
        with (Path(folder) / "log").open("w") as log, subprocess.Popen(words, stderr=log) as server:
            try:
                wait_for(port)
                asyncio.run(warm(asked[:200], port))
                before, start = stages(port), 0
                for rate in args.rates:
                    part = asked[start : start + int(rate * args.seconds)]
                    start += len(part)
                    load = Load([posted(question) for question in part], rate)
                    asyncio.run(load.run("127.0.0.1", port))
                    after = stages(port)
                    shown = {stage: spent(before.get(stage, (0.0, 0.0)), after[stage]) for stage in after}
                    before = after
                    print(json.dumps({**load.figures(), "mean ms by stage": shown}), flush=True)
            finally:
                server.terminate()
                if args.log:
                    print((Path(folder) / "log").read_text()[-5000:], file=sys.stderr)


def made_bundle(
    place: Path, items: int, ranker: bool = True, block: str = "sasrec", index: IndexSettings | None = None
) -> Path:
    """Of untrained weights over made-up items."""
    place.mkdir(parents=True, exist_ok=True)
    served_path.MODEL = ModelSettings(block=block, similarity="cosine", temperature=0.07)
    chosen = index or IndexSettings(kind="ivf", probes=64)
    served_path.bundle(place, vectors(items, torch.Generator().manual_seed(1)), ranker=ranker, index=chosen)
    return place / "bundle"


async def warm(asked: list[dict[str, Any]], port: int) -> None:
    await Load([posted(question) for question in asked], 100).run("127.0.0.1", port)


def questions(items: int, count: int, by_user: bool, store: Path) -> list[dict[str, Any]]:
    """Histories that differ, or users of a store, of whom each comes about twice."""
    draw = torch.Generator().manual_seed(4)
    rows = torch.randint(items, (count, HISTORY), generator=draw).tolist()
    if not by_user:
        return [{"history": line, "k": K} for line in rows]
    users = max(1, count // 2)
    kept = open_store(f"sqlite:{store}")
    kept.load((f"user {user}", [Event(item, 10**9 + at) for at, item in enumerate(rows[user])]) for user in range(users))
    kept.close()
    return [{"user_id": f"user {user}", "k": K} for user in torch.randint(users, (count,), generator=draw).tolist()]


def posted(question: dict[str, Any]) -> bytes:
    body = json.dumps(question).encode()
    head = f"POST /v1/recommend HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def stages(port: int) -> dict[str, tuple[float, float]]:
    """Seconds and times of each stage so far, by /metrics."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    found: dict[str, dict[str, float]] = {}
    for kind, stage, value in re.findall(r'^recsys_stage_seconds_(sum|count)\{[^}]*stage="(\w+)"[^}]*\} (\S+)', text, re.M):
        found.setdefault(stage, {})[kind] = float(value) + found.get(stage, {}).get(kind, 0.0)
    return {stage: (values.get("sum", 0.0), values.get("count", 0.0)) for stage, values in found.items()}


def spent(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Mean milliseconds between two readings."""
    return round(1000 * (after[0] - before[0]) / max(1.0, after[1] - before[1]), 3)


def wait_for(port: int) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").read()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not come up")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
