"""What training costs on this device: samples a second, share of the matrix rate, where the time goes, time to a quality.

usage: python -m tests.benchmarks.train_cost --prepare datasets/ml-1m prepared.pt
       python -m tests.benchmarks.train_cost prepared.pt [--device cuda] [--recipe ml-1m] [--until .1857]
           [--set train.packed=true …]

The second command needs torch alone (and Python 3.11): a machine that has nothing else can run it. `--until` trains the
recipe, validation included, until validation NDCG@10 reaches it. Prints one JSON object.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from recsys.batch import Sequences
from recsys.config import load_recipe
from recsys.model import ModelSettings, SequenceModel
from training.data import EpochBatches
from training.loop import Observation, TrainSettings, choose_device, fit
from training.losses import LossSettings
from training.negatives import SAMPLINGS
from training.optimizer import OptimizerSettings
from training.team import Team
from training.validate import validate

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
OWNERS = (ModelSettings, TrainSettings, LossSettings, OptimizerSettings)


class Reached(Exception):
    """The wanted quality."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--recipe", default="ml-1m")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--until", type=float)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    if args.prepare:
        prepare(*args.paths)
        return
    prepared = torch.load(args.paths[0], weights_only=True)
    items, sequences = prepared.pop("items_with_events"), Sequences(**prepared)
    sections = load_recipe(args.recipe, RECIPES, args.set).sections
    settings = [owner(**sections.get(owner.section, {})) for owner in OWNERS]  # type: ignore[operator]
    device = choose_device(args.device)
    figures: dict[str, Any] = {"device": str(device), "name": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    figures |= until(sequences, items, settings, device, args.until) if args.until else {}
    figures |= cost(sequences, items, settings, device, args.epochs)
    print(json.dumps(figures))


def prepare(dataset: Path, out: Path) -> None:
    """Write a data set's sequences as tensors."""
    from features.dataset import Dataset

    data = Dataset.open(dataset)
    torch.save({**dataclasses.asdict(data.sequences), "items_with_events": data.manifest["warm_items"]}, out)


def until(sequences: Sequences, items: int, settings: list[Any], device: torch.device, wanted: float) -> dict[str, Any]:
    """Seconds of the whole training, set-up and validations included, until validation is that good."""
    started, seconds, best = time.perf_counter(), 0.0, 0.0

    def observe(seen: Observation) -> None:
        nonlocal seconds, best
        if seen.validation is not None:
            seconds, best = time.perf_counter() - started, seen.validation["ndcg@10"]
            print(f"epoch {seen.epoch}: {seconds:.1f} s, validation NDCG@10 {best:.4f}", flush=True)
            if best >= wanted:
                raise Reached

    with contextlib.suppress(Reached):
        fit(sequences, items, *settings, team=Team(device=device), observe=observe)
    return {"seconds_to": round(seconds, 1), "validation_ndcg@10": round(best, 4), "reached": best >= wanted}


def cost(sequences: Sequences, items: int, settings: list[Any], device: torch.device, epochs: int) -> dict[str, Any]:
    """Medians over epochs after the first: the first compiles and warms up."""
    model, train, loss, _ = settings
    seconds: dict[int, float] = {}

    def observe(seen: Observation) -> None:
        seconds[seen.epoch] = seen.seconds

    short = dataclasses.replace(train, epochs=epochs + 1, patience=1000, validate_every=1000)
    settings = [model, short, *settings[2:]]
    fit(sequences, items, *settings, team=Team(device=device), observe=observe)
    epoch = statistics.median(list(seconds.values())[1:])
    batches = EpochBatches(sequences, model.length, train.batch_tokens, train.seed, 0, train.windows)
    started = time.perf_counter()
    samples = sum(len(batch.to(device).targets) for batch in batches)
    loading = time.perf_counter() - started
    counts, generator = sequences.training_counts(items).to(device), torch.Generator(device).manual_seed(0)
    one = next(iter(batches)).to(device)
    draw = SAMPLINGS[loss.sampling]
    drawing = len(batches) * clock(lambda: draw(counts, one.targets, loss.negatives, generator), device)
    fresh = SequenceModel(model, items).initialise(torch.Generator().manual_seed(0)).to(device)
    counter = FlopCounterMode(display=False)
    with counter:
        fresh(one.history, generator, asked=one.asked).sum().backward()
    flops = counter.get_total_flops() / len(one.history.values) * samples
    rate = matrix_rate(device)
    return {
        "epoch_seconds": round(epoch, 3),
        "samples_per_second": round(samples / epoch),
        "share_loading": round(loading / epoch, 4),
        "share_negatives": round(drawing / epoch, 4),
        "encoder_tflop_an_epoch": round(flops / 1e12, 3),
        "matrix_tflops_measured": round(rate / 1e12, 3),
        "share_of_matrix_rate": round(flops / epoch / rate, 4),
        "validation_seconds": round(clock(lambda: validate(fresh, sequences), device, 1), 2),
    }


def matrix_rate(device: torch.device) -> float:
    """FLOP a second of one large square product, in bfloat16 on a GPU and float32 on a CPU."""
    side, kind = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(side, side, device=device, dtype=kind)
    return 2 * side**3 / clock(lambda: a @ a, device)


def clock(work: Callable[[], Any], device: torch.device, times: int = 20) -> float:
    """Median seconds."""
    taken = []
    for _ in range(times + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


if __name__ == "__main__":
    main()
