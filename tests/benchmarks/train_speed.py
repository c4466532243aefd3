"""Seconds an epoch and peak memory of training: what `recsys train` does, without MLflow.

usage: python -m tests.benchmarks.train_speed --dataset datasets/ml-1m [--epochs 3] [--set model.length=200 …]

The default is the shape that other libraries' SASRec is timed by: width 64, 2 blocks, 1 head, length 200, a feed-forward as
wide as the model, 512 shared negatives, the newest window of each user. Prints one JSON object; the first epoch is left out
of the median.
"""

import argparse
import json
import resource
import statistics
from pathlib import Path

import torch

from features.dataset import Dataset
from recsys.config import Recipe, override
from training.loop import Observation, choose_device, fit
from training.run import DECISIVE
from training.team import Team

SHAPE = {
    "model": {"embedding_size": 64, "blocks": 2, "heads": 1, "hidden_size": 64, "length": 200},
    "train": {"batch_tokens": 6400},
    "loss": {"kind": "sampled_softmax", "negatives": 512},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    recipe = Recipe("speed", override(SHAPE, [f"train.epochs={args.epochs}", "train.patience=1000", *args.set]))
    dataset = Dataset.open(args.dataset)
    seconds: dict[int, float] = {}

    def observe(seen: Observation) -> None:
        seconds[seen.epoch] = seen.seconds

    settings = [recipe.read(owner) for owner in DECISIVE]
    device = choose_device(args.device)
    fit(dataset.sequences, dataset.manifest["warm_items"], *settings, team=Team(device=device), observe=observe)
    timed = list(seconds.values())[1:] or list(seconds.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    figures = {"epoch_seconds": round(statistics.median(timed), 2), "epochs": [round(value, 2) for value in seconds.values()]}
    print(json.dumps({**figures, "peak_mb": peak, "threads": torch.get_num_threads(), "device": str(device)}))


if __name__ == "__main__":
    main()
