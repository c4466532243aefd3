"""Measure how long `features.build` takes and how much memory, by the number of events.

python -m tests.benchmarks.features_scale [EVENTS …]     from the project's folder (default: 5, 10 and 20 million)

The synthetic world's events are written first as one log in the order of time. Every size is built in a process of its own,
so that its peak is its own.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

from features.build import build
from features.synthetic import SyntheticSettings, write
from recsys.config import Recipe

ITEMS = 20_000


def write_log(folder: Path, events: int) -> None:
    settings = SyntheticSettings(users=round(events / SyntheticSettings.events_per_user), items=ITEMS)
    write(settings, folder / "world")
    pl.scan_parquet(folder / "world" / "events-*.parquet").sort("timestamp").sink_parquet(folder / "events.parquet")


def measure(folder: Path) -> None:
    """Print one line of the table."""
    started = time.perf_counter()
    manifest = build(folder, Recipe("scale", {}), folder / "out")
    seconds = time.perf_counter() - started
    size = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    print(f"| {manifest['events']:,} | {manifest['users']:,} | {seconds:.1f} | {peak:.2f} | {size:.0f} |", flush=True)


def main(arguments: list[str]) -> None:
    if arguments[:1] in (["write"], ["measure"]):
        return write_log(Path(arguments[1]), int(arguments[2])) if arguments[0] == "write" else measure(Path(arguments[1]))
    print("| events | users | seconds | peak GB | MB on disk |\n|--:|--:|--:|--:|--:|", flush=True)
    for events in arguments or ["5000000", "10000000", "20000000"]:
        with tempfile.TemporaryDirectory() as folder:
            for step in (["write", folder, events], ["measure", folder]):
                subprocess.run([sys.executable, "-m", "tests.benchmarks.features_scale", *step], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
