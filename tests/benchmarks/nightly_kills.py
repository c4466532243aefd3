"""Kills the nightly job at every file boundary and at random moments, and looks whether the night that goes on is the same.

usage: python -m tests.benchmarks.nightly_kills [--only random] [--random 20] [--users 20000] [--workers 2] [--seed 0]

*Boundaries*: a night of one process whose process is killed (SIGKILL) before, and after, every renaming of a file or link,
beside a live night of which unchanged lists are taken; then it is started again. *Random*: `recsys nightly` with several
processes is killed with all of them left behind, at a moment drawn evenly from an undisturbed night's, then started again.
Each time readers must see one whole night before, and after it the bytes of the undisturbed night: no user twice, none missing.
Prints one JSON object for each kind.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

from serving.nights import LIVE, Night, Nights
from tests.benchmarks.load import made_bundle
from tests.benchmarks.nightly_job import change, made, written
from tests.serving.test_nightly import NOW, K, content, job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["boundaries", "random"])
    parser.add_argument("--random", type=int, default=20, help="kills of a job that runs")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=2_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        bundle = made_bundle(place / "made", args.items, False)
        if args.only != "random":
            few = written(place / "few", made(499, args.items), bundle / "items.parquet", 499)
            print(json.dumps(boundaries(bundle, few, change(few, place / "changed", 0.5), place)), flush=True)
        if args.only != "boundaries":
            many = written(place / "many", made(args.users, args.items), bundle / "items.parquet", args.users)
            print(json.dumps(moments(bundle, many, args.users, place, args)), flush=True)


def boundaries(bundle: Path, before: Path, after: Path, place: Path) -> dict[str, object]:
    assert job(0, "before", bundle, before, place / "live").returncode == 0
    shutil.copytree(place / "live", place / "undisturbed", symlinks=True)
    steps = int(job(0, "before", bundle, after, place / "undisturbed").stdout)
    wanted, first = content(Night.open(place / "undisturbed")), Night.open(place / "live").id
    equal = 0
    for step in range(1, steps + 1):
        for when in ("before", "after"):
            lists = place / "lists"
            shutil.copytree(place / "live", lists, symlinks=True)
            assert job(step, when, bundle, after, lists).returncode == -signal.SIGKILL
            seen = Night.open(lists, verify=True)
            assert seen.id == first or content(seen) == wanted, (step, when)
            assert job(0, "before", bundle, after, lists).returncode == 0
            assert content(Night.open(lists, verify=True)) == wanted, (step, when)
            equal += 1
            shutil.rmtree(lists)
    return {"boundaries": steps, "kills": 2 * steps, "equal": equal}


def moments(bundle: Path, dataset: Path, users: int, place: Path, args: argparse.Namespace) -> dict[str, object]:
    def command(lists: Path) -> list[str]:
        words = [sys.executable, "-m", "recsys", "nightly", str(bundle), "--dataset", str(dataset), "--out", str(lists)]
        return [*words, "-k", str(K), "--now", str(NOW), "--workers", str(args.workers), "--no-track"]

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = time.monotonic()
    subprocess.run(command(place / "whole"), check=True, **quiet)
    seconds, wanted = time.monotonic() - started, content(Night.open(place / "whole"))
    draw, killed, resumed, nights = random.Random(args.seed), 0, [], 0
    while killed < args.random:
        lists, nights = place / f"lists {nights}", nights + 1
        with subprocess.Popen(command(lists), **quiet) as process:
            time.sleep(draw.uniform(0, seconds))
            killed += process.poll() is None
            process.kill()
        assert not (lists / LIVE).exists() or content(Night.open(lists, verify=True)) == wanted
        subprocess.run(command(lists), check=True, **quiet)
        night = Night.open(lists, verify=True)
        assert content(night) == wanted, nights
        found = pl.scan_parquet(night.path / "users-*.parquet").select(pl.col("user_id").n_unique(), n=pl.len()).collect()
        assert found.row(0) == (users, users) and not Nights(lists).work.exists()
        resumed.append(night.manifest["clock"]["resumed"])
        shutil.rmtree(lists)
    return {"nights, all equal": nights, "kills while they ran": killed, "shards that were there": resumed}


if __name__ == "__main__":
    main()
