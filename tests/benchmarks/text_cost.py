"""What text costs a training step and a request: the same recipe without text, pooled, cross and both, in turn.

usage: python -m tests.benchmarks.text_cost --dataset datasets/amazon-beauty --recipe amazon-beauty-text [--steps 21]
           [--set SECTION.KEY=VALUE …]

One thread; weights are fresh. A request is one history, encoded alone and searched exactly for 100 items. Prints a line for
each, medians in milliseconds and their ratio to the model without text.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from features.dataset import Dataset
from recsys.batch import gather
from recsys.config import load_recipe
from recsys.model import ModelSettings, SequenceModel
from recsys.text import TextSettings
from training.data import EpochBatches
from training.loop import Lesson, State, TrainSettings, keep_memory
from training.losses import LossSettings
from training.optimizer import Optimizer, OptimizerSettings
from training.run import read_content

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
KINDS = ("none", "pooled", "cross", "both")
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--recipe", default="amazon-beauty-text")
    parser.add_argument("--steps", type=int, default=21)
    parser.add_argument("--requests", type=int, default=501)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    dataset, recipe = Dataset.open(args.dataset), load_recipe(args.recipe, RECIPES, args.set)
    sequences, items = dataset.sequences, dataset.manifest["warm_items"]
    _, content = read_content(dataset, recipe.read(TextSettings))
    train, loss = recipe.read(TrainSettings), recipe.read(LossSettings)
    counts_V = sequences.training_counts(items)
    states, lessons = {}, {}
    for kind in KINDS:
        settings = {**recipe.read(ModelSettings).as_dict(), "text": kind}
        settings |= {} if kind in ("pooled", "both") else {"ids": True, "id_dropout": 0.0}
        model = SequenceModel(ModelSettings(**settings), items, content, recipe.read(TextSettings).vocabulary)
        model.initialise(torch.Generator().manual_seed(0))
        states[kind] = State(model, Optimizer(model, recipe.read(OptimizerSettings)), torch.Generator().manual_seed(1))
        lessons[kind] = Lesson(model, train, loss, counts_V)
    length = recipe.read(ModelSettings).length
    batches = EpochBatches(sequences, length, train.batch_tokens, train.seed, 0, train.windows)
    steps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for step, batch in zip(range(args.steps + WARM_UP), batches, strict=False):
        for kind, state in states.items():
            started = time.perf_counter()
            lessons[kind].learn(state, batch)
            state.optimizer.step(step, 10_000)
            steps[kind].append(time.perf_counter() - started)
    begins_U, ends_U, _ = sequences.windows("test")
    requests: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with torch.inference_mode():
        vectors = {kind: state.model.item_vectors() for kind, state in states.items()}
        for user in torch.arange(args.requests + WARM_UP) % len(begins_U):
            history = gather(sequences.items, sequences.times, begins_U[user : user + 1], ends_U[user : user + 1])
            for kind, state in states.items():
                started = time.perf_counter()
                (state.model.encode(history) @ vectors[kind].T).topk(100)
                requests[kind].append(time.perf_counter() - started)
    for kind in KINDS:
        step, request = (1000 * statistics.median(times[kind][WARM_UP:]) for times in (steps, requests))
        step_0, request_0 = (1000 * statistics.median(times["none"][WARM_UP:]) for times in (steps, requests))
        print(
            f"{kind:7} step {step:8.1f} ms ({step / step_0:.2f})   request {request:7.3f} ms ({request / request_0:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
