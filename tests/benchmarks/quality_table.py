"""Validation quality of blocks × attention kinds, and of losses, each with the same budget of epochs.

usage: python -m tests.benchmarks.quality_table --dataset datasets/ml-1m --recipe ml-1m --epochs 8 --out table.jsonl [--set …]

The recipe decides all that a line does not name. A line is one training, appended to OUT when it is done; lines that are
there are not trained again, so that an interrupted table goes on. Ends with the table in Markdown.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

from features.dataset import Dataset
from recsys.attention import PATTERNS
from recsys.blocks import BLOCKS
from recsys.config import Recipe, load_recipe, override
from training.loop import choose_device, fit
from training.losses import LOSSES
from training.negatives import SAMPLINGS
from training.run import DECISIVE
from training.team import Team

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
KEYS = ("model.block", "model.attention", "loss.kind", "loss.sampling", "loss.logq")


def lines() -> list[dict[str, str]]:
    """What each line sets, by `section.key`."""
    blocks = [{"model.block": block, "model.attention": kind} for block, kind in itertools.product(BLOCKS, PATTERNS)]
    losses = [{"loss.kind": loss} for loss in LOSSES]
    samplings = [{"loss.kind": "sampled_softmax", "loss.sampling": sampling} for sampling in SAMPLINGS]
    return [*blocks, *losses, *samplings, {"loss.sampling": "in_batch", "loss.logq": "false"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    dataset, base = Dataset.open(args.dataset), load_recipe(args.recipe, RECIPES, args.set)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    for line in lines():
        schedule = [f"train.epochs={args.epochs}", f"train.validate_every={args.epochs}"]
        chosen = override(base.sections, [*(f"{key}={value}" for key, value in line.items()), *schedule])
        recipe = Recipe(base.name, chosen)
        settings = [recipe.read(owner) for owner in DECISIVE]
        values = {read.section: read.as_dict() for read in settings}
        names = {key: str(values[section][name]) for key in KEYS for section, name in [key.split(".")]}
        if any(names.items() <= row.items() for row in done):
            continue
        started = time.perf_counter()
        state = fit(dataset.sequences, dataset.manifest["warm_items"], *settings, team=Team(device=choose_device(args.device)))
        figures = {name: round(state.curve[-1][name], 4) for name in ("recall@10", "ndcg@10")}
        row = {**names, **figures, "minutes": round((time.perf_counter() - started) / 60, 1)}
        done.append(row)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    print("| " + " | ".join(done[0]) + " |\n|" + "---|" * len(done[0]))
    for row in done:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
