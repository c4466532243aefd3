"""Time and memory of training steps as the catalogue grows: beyond the item table and what its optimiser keeps, none.

usage: python -m tests.benchmarks.train_catalogue [--items 10000 100000 1000000] [--table same] [--processes 1]
                                                  [--loss sampled_softmax] [--picture FILE.svg]

Each catalogue is trained for some steps of made-up histories (64 of 50 events, width 64, 1,024 negatives) in processes of its
own. `--table same` is AdamW over a table in plain torch; any other is TorchRec's, each process holding a part. Prints one JSON
line each: median milliseconds of a step, MiB at the peak of the largest process, of which the table and what is kept of it,
and the rest. `--picture` draws them.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from recsys.batch import FIRST_ITEM, Sequences
from recsys.model import ModelSettings
from training.loop import Observation, TrainSettings, fit
from training.losses import LossSettings
from training.optimizer import OptimizerSettings
from training.team import joined

HISTORIES, EVENTS, WIDTH, STEPS, WARM = 64, 53, 64, 23, 5
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--table", default="same")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--loss", default="sampled_softmax")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        train(args.items[0], args.table, args.loss, args.one)
        return
    found = []
    for items in args.items:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m"]
            if args.processes > 1:
                command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}", "-m"]
            command += ["tests.benchmarks.train_catalogue", "--one", folder, "--items", str(items)]
            environment = {"OMP_NUM_THREADS": "1", **os.environ}
            subprocess.run([*command, "--table", args.table, "--loss", args.loss], check=True, env=environment)
            parts = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
        found.append(max(parts, key=lambda part: part["peak_mib"]) | {"processes": len(parts)})
        print(json.dumps(found[-1]), flush=True)
    if args.picture is not None:
        draw(found, args.picture)


def train(items: int, table: str, loss: str, out: Path) -> None:
    """Some steps, judged by nobody: every event is a training event."""
    in_parts = table != "same"
    with joined(torch.device("cpu"), together=in_parts) as team:
        users = HISTORIES * STEPS // team.size
        generator = torch.Generator().manual_seed(team.rank)
        rows = torch.randint(FIRST_ITEM, FIRST_ITEM + items, (users * EVENTS,), generator=generator)
        lengths = torch.full((users,), EVENTS)
        offsets = torch.arange(0, users * EVENTS + 1, EVENTS)
        sequences = Sequences(rows.int(), torch.arange(users * EVENTS), offsets, lengths, lengths)
        ends: list[float] = []

        def observe(seen: Observation) -> None:
            if seen.validation is None:
                ends.append(time.perf_counter())

        backend = "torchrec" if in_parts else "torch"
        fit(
            sequences,
            items,
            ModelSettings(
                embedding_size=WIDTH, length=EVENTS, block="ligr", similarity="cosine", temperature=0.1, embedding=backend
            ),
            TrainSettings(epochs=1, batch_tokens=HISTORIES * EVENTS, sharding="row_wise"),
            LossSettings(kind=loss, negatives=1024),
            OptimizerSettings(table=table, embedding_learning_rate=0.1 if in_parts else 0.0),
            team=team,
            observe=observe,
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        copies = 1 + 1 / WIDTH if table == "rowwise_adagrad" else 2 if in_parts else 4  # rows, and what is kept of each
        held = copies * 4 * items * WIDTH / MIB / (team.size if in_parts else 1)
        took = [1000 * (b - a) for a, b in zip(ends[WARM:], ends[WARM + 1 :], strict=False)]
        figures = {
            "items": items,
            "table": table,
            "loss": loss,
            "step_ms": round(statistics.median(took), 1),
            "peak_mib": round(peak),
            "table_mib": round(held),
            "rest_mib": round(peak - held),
        }
        (out / f"{team.rank}.json").write_text(json.dumps(figures))


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds of a step, and memory with the part that is the table, by items."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    items = [one["items"] for one in found]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(items, [one["step_ms"] for one in found], "o-")
    left.set(
        xscale="log",
        ylim=(0, 1.2 * max(one["step_ms"] for one in found)),
        xlabel="items",
        ylabel="ms a step",
        title="Time of a step",
    )
    right.plot(items, [one["peak_mib"] / 1024 for one in found], "o-", label="peak of a process")
    right.plot(items, [one["table_mib"] / 1024 for one in found], "s--", label="its part of the table")
    right.plot(items, [one["rest_mib"] / 1024 for one in found], "^:", label="the rest")
    right.set(
        xscale="log",
        ylim=(0, 1.2 * found[-1]["peak_mib"] / 1024),
        xlabel="items",
        ylabel="GiB",
        title=f"Memory, {found[0]['processes']} processes",
    )
    right.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
