"""Measure how long `features.build` takes and how much memory, by the number of events.

python -m tests.benchmarks.features_scale [--ray ADDRESS] [EVENTS …]     from the project's folder (default: 5, 10, 20 million)

The synthetic world's events are written first as one log in the order of time, in a file for each ten million or so. Every size
is built in a process of its own, so that its peak is its own; beside it stands that of all its processes together.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import polars as pl
import psutil

from features.build import build
from features.parts import in_turn, on_cluster
from features.synthetic import SyntheticSettings, write
from recsys.config import Recipe

ITEMS = 20_000
SORTED_AT_ONCE = 10**7
"""Events of a file of the log."""


def write_log(folder: Path, events: int) -> None:
    settings = SyntheticSettings(users=round(events / SyntheticSettings.events_per_user), items=ITEMS)
    write(settings, folder / "world")
    drawn, time = pl.scan_parquet(folder / "world" / "events-*.parquet"), pl.col("timestamp")
    first, last = drawn.select(time.min(), time.max().alias("last")).collect(engine="streaming").row(0)
    files = -(-events // SORTED_AT_ONCE)
    for file in range(files):
        begin, end = (first + (last + 1 - first) * edge // files for edge in (file, file + 1))
        chosen = drawn.filter(time.is_between(begin, end, closed="left"))
        chosen.sort("timestamp").sink_parquet(folder / f"events-{file:03}.parquet")


class Peak(threading.Thread):
    """Looks ten times a second at the memory of this process and all that it began."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self._over = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self._over.wait(0.1):
            found = 0
            for process in [me, *me.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    found += process.memory_info().rss
            self.bytes = max(self.bytes, found)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.bytes


def measure(folder: Path, ray: str) -> None:
    """Print one line of the table."""
    peak = Peak()
    peak.start()
    with on_cluster(ray) if ray else nullcontext(in_turn) as engine:
        started = time.perf_counter()
        manifest = build(folder, Recipe("scale", {}), folder / "out", engine=engine)
        seconds = time.perf_counter() - started
        together = peak.stop() / 1e9
    size = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    figures = f"{seconds:.1f} | {own:.2f} | {together:.2f} | {size:.0f} | {manifest['hash'][:8]}"
    print(f"| {manifest['events']:,} | {manifest['users']:,} | {figures} |", flush=True)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["write"]:
        return write_log(Path(arguments[1]), int(arguments[2]))
    if arguments[:1] == ["measure"]:
        return measure(Path(arguments[1]), arguments[2])
    ray, sizes = (arguments[1], arguments[2:]) if arguments[:1] == ["--ray"] else ("", arguments)
    print(
        "| events | users | seconds | peak GB | of all processes | MB on disk | hash |\n|--:|--:|--:|--:|--:|--:|--|",
        flush=True,
    )
    for events in sizes or ["5000000", "10000000", "20000000"]:
        with tempfile.TemporaryDirectory() as folder:
            for step in (["write", folder, events], ["measure", folder, ray]):
                subprocess.run([sys.executable, "-m", "tests.benchmarks.features_scale", *step], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
