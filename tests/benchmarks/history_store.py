"""What a store of histories costs: reading, appending one event, erasing and bulk loading, each in one thread.

usage: python -m tests.benchmarks.history_store [FOLDER] [--users 20000] [--events 200] [--redis redis://HOST:PORT/NUMBER]

Users have histories of so many events without ids; users are drawn evenly. FOLDER decides which disk is measured. Without
--redis a server is started where one is installed, and nothing of it is on disk. Prints one JSON object: microseconds at the
50th and the 99th percentile, events loaded a second, and bytes on disk a user.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from serving.history import Event, open_store
from tests.serving.servers import redis_server

STEP = 100
"""Seconds between two events."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--calls", type=int, default=5_000)
    parser.add_argument("--redis")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    with ExitStack() as stack:
        urls = {"memory": "memory:"} | {kind: f"{kind}:{folder / kind}" for kind in ("sqlite", "lmdb")}
        urls["redis"] = args.redis or stack.enter_context(redis_server()).url
        found = {kind: measure(url, args.users, args.events, args.calls) for kind, url in urls.items()}
    for kind in ("sqlite", "lmdb"):
        size = sum(path.stat().st_size for path in folder.glob(f"{kind}*"))
        found[kind]["bytes_a_user"] = round(size / args.users)
    print(json.dumps({"users": args.users, "events": args.events, "stores": found}))


def measure(url: str, users: int, events: int, calls: int) -> dict[str, float]:
    store, draw = open_store(url), random.Random(1)
    started = time.perf_counter()
    store.load((str(user), [Event(draw.randrange(10**6), STEP * place) for place in range(events)]) for user in range(users))
    load = users * events / (time.perf_counter() - started)
    read = timed(lambda number: store.read(str(draw.randrange(users))), calls)
    append = timed(lambda number: store.append(str(draw.randrange(users)), [Event(number, STEP * events + number)]), calls)
    erase = timed(lambda number: store.erase(str(number)), min(users, 100))
    store.close()
    return {"loaded_events_a_second": round(load), **named("read", read), **named("append", append), **named("erase", erase)}


def timed(work: Callable[[int], object], calls: int) -> list[float]:
    """Microseconds of each call, ascending, after a tenth to warm up."""
    took = []
    for number in range(calls + calls // 10):
        started = time.perf_counter()
        work(number)
        took.append(1e6 * (time.perf_counter() - started))
    return sorted(took[calls // 10 :])


def named(name: str, took: list[float]) -> dict[str, float]:
    return {f"{name}_p{share}_us": round(took[len(took) * share // 100], 1) for share in (50, 99)}


if __name__ == "__main__":
    main()
