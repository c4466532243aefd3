"""Measure how long `features.build` takes and how much memory, by the number of events.

python tests/benchmarks/features_scale.py [EVENTS …]     (default: 5, 10 and 20 million)

Users have about 50 events each. Every size is built in a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from features.build import build  # noqa: E402 - the path above comes first, so that no installation is needed
from recsys.config import Recipe  # noqa: E402

PART = 5_000_000
"""Events of a file."""
ITEMS, PER_USER = 200_000, 50


def write_events(folder: Path, events: int) -> None:
    """Unsorted events of even users, skewed items and even times; numbers come from hashes, so every run has the same."""
    for part, start in enumerate(range(0, events, PART)):
        row = pl.int_range(start, min(start + PART, events), eager=True).alias("row")
        even = [pl.col("row").hash(seed) for seed in (3, 5, 7)]
        skewed = (even[1] / 2**64).pow(3) * ITEMS
        columns = {"user_id": even[0] % (events // PER_USER), "item_id": skewed, "timestamp": 1_600_000_000 + even[2] % 10**8}
        table = row.to_frame().select(expression.cast(pl.Int64).alias(name) for name, expression in columns.items())
        table.write_parquet(folder / f"events-{part:03}.parquet")


def measure(events: int) -> None:
    """Print one line of the table."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, __file__, "--write", str(folder), str(events)], check=True)
        started = time.perf_counter()
        manifest = build(folder, Recipe("scale", {}), folder / "out")
        seconds = time.perf_counter() - started
        size = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    print(f"| {events / 1e6:.0f} | {manifest['users']:,} | {seconds:.1f} | {peak:.2f} | {size:.0f} |", flush=True)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--write"]:
        write_events(Path(arguments[1]), int(arguments[2]))
    elif arguments[:1] == ["--one"]:
        measure(int(arguments[1]))
    else:
        print("| million events | users | seconds | peak GB | MB on disk |\n|--:|--:|--:|--:|--:|", flush=True)
        for events in arguments or ["5000000", "10000000", "20000000"]:
            subprocess.run([sys.executable, __file__, "--one", events], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
