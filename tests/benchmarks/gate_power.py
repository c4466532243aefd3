"""How often the promotion gate is right: planted differences on the built-in world, whose law of the next item is known.

A repetition has users of its own. Champion and challengers list the likeliest items by the law with noise on its logarithm: one
part that all share, as models of one data set share their mistakes, and one of their own, whose size alone says how good a
lister is. So the true difference of two listers is known: by expectation over the law, and none where both have as much noise.
Lists are judged as any program's are (`recsys evaluate LISTS`), with every slice of a report, and the gate decides by default
rules but for the champion's answer time and bundle, which lists have not.

    python -m tests.benchmarks.gate_power [REPETITIONS [USERS [FIRST_SEED]]]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from features.build import build
from features.dataset import Dataset
from features.synthetic import SyntheticSettings, World, write
from recsys.batch import FIRST_ITEM
from recsys.config import Recipe
from serving.evaluation.gate import PromotionSettings, decide
from serving.evaluation.given import GivenLists
from serving.evaluation.report import Report, make_report

Floats = npt.NDArray[np.float64]

K = 10
SHARED = 1.0
"""Standard deviation of the noise that all listers share, on the logarithm of the law."""
OWN = {"champion": 0.55, "better": 0.2, "worse": 0.8, "equal": 0.55}
"""Of each lister's own noise."""
WANTED = {"better": "promoted", "worse": "refused", "equal": "refused"}


def report(dataset: Dataset, top_UK: npt.NDArray[np.int64], path: Path) -> Report:
    """Of lists of item ids, as `recsys evaluate` makes it of a table, but without baselines, which the gate does not read."""
    users, places = top_UK.shape
    columns = {
        "user_id": dataset.user_ids.gather(np.repeat(np.arange(users), places)),
        "item_id": top_UK.ravel(),
        "rank": np.tile(np.arange(1, places + 1), users),
        "score": np.tile(-np.arange(places, dtype=float), users),
    }
    pl.DataFrame(columns).write_parquet(path)
    subject = GivenLists(path, dataset)
    return make_report(subject, dataset, ks=(K,), checks=(), baselines=False)


def repetition(seed: int, users: int, folder: Path) -> dict[str, tuple[bool, list[str], float, float]]:
    """Of each challenger: whether it is promoted, the rules that refuse it, the true relative gain, and the detectable one."""
    world = write(SyntheticSettings(users=users, events_per_user=20, seed=seed), folder / "raw")
    build(folder / "raw", Recipe("world", {}), folder / "dataset")
    dataset = Dataset.open(folder / "dataset")
    law_UI = law(world, dataset)
    generator = np.random.default_rng(seed)
    logs_UI = np.log(np.maximum(law_UI, 1e-300)) + SHARED * generator.standard_normal(law_UI.shape)
    gains_K = 1 / np.log2(np.arange(2, K + 2))
    reports, worth = {}, {}
    for name, noise in OWN.items():
        top_UK = best(logs_UI + noise * generator.standard_normal(law_UI.shape))
        worth[name] = float((np.take_along_axis(law_UI, top_UK, 1) @ gains_K).mean())
        reports[name] = report(dataset, top_UK + 1, folder / f"{name}.parquet")
    out = {}
    for name in WANTED:
        decision = decide(PromotionSettings(), reports[name], reports["champion"])
        assert decision.comparison is not None
        least = decision.comparison.detectable / decision.comparison.found.first
        broken = [rule.name for rule in decision.rules if not rule.holds]
        out[name] = decision.promote, broken, worth[name] / worth["champion"] - 1, least
    return out


def law(world: World, dataset: Dataset) -> Floats:
    """Of each user's last event, in the data set's order of users; columns are item ids less 1."""
    sequences, ids = dataset.sequences, dataset.items["item_id"].to_numpy()
    begins, ends, _ = (part.tolist() for part in sequences.windows("test"))
    return world.probabilities(
        [ids[sequences.items[begin:end].numpy() - FIRST_ITEM] for begin, end in zip(begins, ends, strict=True)]
    )


def best(scores_UI: Floats) -> npt.NDArray[np.int64]:
    top_UK = np.argpartition(-scores_UI, K, axis=1)[:, :K]
    order_UK = np.take_along_axis(-scores_UI, top_UK, 1).argsort(1)
    return np.take_along_axis(top_UK, order_UK, 1)


def main(repetitions: int = 100, users: int = 2000, first: int = 1) -> None:
    torch.set_num_threads(1)
    started, found = time.perf_counter(), []
    for seed in range(first, first + repetitions):
        with tempfile.TemporaryDirectory() as folder:
            found.append(repetition(seed, users, Path(folder)))
        if len(found) % 10 == 0:
            print(f"{len(found)} of {repetitions}, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    for name, wanted in WANTED.items():
        promoted = sum(one[name][0] for one in found)
        refused = Counter(rule for one in found for rule in one[name][1])
        gain, least = (float(np.mean([one[name][place] for one in found])) for place in (2, 3))
        right = promoted if wanted == "promoted" else repetitions - promoted
        print(
            f"truly {name}: {promoted} promoted, the others refused by {dict(refused)}, right {right} of {repetitions}; "
            f"true NDCG@{K} {gain:+.1%}, detectable {least:.1%} with {users:,} users"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
