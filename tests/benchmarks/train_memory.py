"""Peak memory of training steps as the catalogue grows: beyond the item table, its gradient and AdamW's two moments, none.

usage: python -m tests.benchmarks.train_memory [--items 10000 100000 1000000] [--loss sampled_softmax]

Each catalogue is trained for three steps of made-up histories (64 of 50 events, width 64) in a process of its own. Prints
one JSON line each: MiB at the peak, of which 4 × the table, and the rest.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch

from recsys.batch import FIRST_ITEM, Sequences
from recsys.model import ModelSettings
from training.loop import TrainSettings, fit
from training.losses import LossSettings
from training.optimizer import OptimizerSettings

USERS, EVENTS, WIDTH = 192, 53, 64
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--loss", default="sampled_softmax")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        train(args.items[0], args.loss)
        return
    for items in args.items:
        command = [sys.executable, "-m", "tests.benchmarks.train_memory", "--one", "--items", str(items), "--loss", args.loss]
        subprocess.run(command, check=True)


def train(items: int, loss: str) -> None:
    """Three steps, judged by nobody: every event is a training event."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(FIRST_ITEM, FIRST_ITEM + items, (USERS * EVENTS,), generator=generator)
    lengths = torch.full((USERS,), EVENTS)
    sequences = Sequences(
        rows.int(), torch.arange(USERS * EVENTS), torch.arange(0, USERS * EVENTS + 1, EVENTS), lengths, lengths
    )
    fit(
        sequences,
        items,
        ModelSettings(embedding_size=WIDTH, length=EVENTS, block="ligr", similarity="cosine", temperature=0.1),
        TrainSettings(epochs=1, batch_tokens=64 * EVENTS),
        LossSettings(kind=loss, negatives=1024),
        OptimizerSettings(),
    )
    peak, table = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 4 * 4 * items * WIDTH / MIB
    figures = {
        "items": items,
        "loss": loss,
        "peak_mib": round(peak),
        "table_mib": round(table),
        "rest_mib": round(peak - table),
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
