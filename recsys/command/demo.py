"""The demo: the whole way of one event on the built-in world, whose best possible list is known."""

from __future__ import annotations

import shutil
from pathlib import Path

from features.build import build
from features.dataset import Dataset
from features.synthetic import SyntheticSettings, best_possible_of, write
from recsys.bundle import claim, is_free
from recsys.command import terminal
from recsys.command.recipes import recipe_of, resolved
from recsys.tracking import Tracking, TrackingSettings
from serving.engine import Recommender
from serving.evaluation.judge import evaluate
from serving.export import export
from serving.index import IndexSettings
from training.loop import choose_device
from training.run import train

MARK = ".recsys-demo"
"""File by which a folder is known as an earlier demo's, which may be made anew."""


def run(out: Path) -> None:
    """Make `out` anew: raw logs, data set, run, bundle and MLflow store; then show the figures and one user's top-10.

    Raises RecsysError: `out` holds something else.
    """
    recipe = recipe_of("tiny", None)
    if is_free(out, MARK):
        shutil.rmtree(out, ignore_errors=True)
    claim(out, MARK, "demo")
    with terminal.steps("demo") as tell:
        tell("a world of made-up users and items, whose law is known")
        world = write(recipe.read(SyntheticSettings), out / "raw")
        tell("features: raw logs to histories")
        build(out / "raw", recipe, out / "dataset")
    dataset = Dataset.open(out / "dataset")
    tracking = Tracking(TrackingSettings(uri=f"sqlite:///{(out / 'mlflow.db').absolute()}"))
    with terminal.training_progress() as shown:
        train(
            dataset,
            resolved(recipe),
            out / "run",
            name=recipe.name,
            device=choose_device("auto"),
            tracking=tracking,
            **shown,
        )
    with terminal.steps("demo") as tell:
        tell("export: weights, item vectors and index to a bundle")
        manifest = export(out / "run", out / "bundle", recipe.read(IndexSettings), dataset)
        with tracking.run("demo"):
            tracking.register(out / "bundle", manifest["id"])
        tell("evaluate: the last event of every user, ranked among all items")
        recommender = Recommender.load(out / "bundle")
        report = evaluate(recommender, dataset, baselines=True)
    names = ("recall@10", "ndcg@10")
    rows = [(label, {name: figures[name] for name in names}) for label, figures in report.figures.items()]
    best = best_possible_of(world, dataset)
    rows.append(("best possible", {name: best[name] for name in names}))
    terminal.metrics_table(rows, title="Every user's last event, ranked among all items they have not seen")
    _show_one_user(recommender, dataset)
    ndcg = {label: figures["ndcg@10"] / best["ndcg@10"] for label, figures in report.figures.items()}
    against = max((name for name, one in report.judged.items() if one.kind == "baseline"), key=lambda name: ndcg[name])
    reached = f"the model reaches {ndcg['model']:.0%}, {against}, the best baseline, {ndcg[against]:.0%}"
    print(f"\nOf the best possible NDCG@10 {reached}.")
    print(f"All of it lies in {out}/. Go on: recsys serve {out}/bundle --store memory:, then open http://127.0.0.1:8000")


def _show_one_user(recommender: Recommender, dataset: Dataset) -> None:
    sequences, titles = dataset.sequences, dataset.titles
    first = dataset.items["row"][0]
    user = int((sequences.offsets.diff() - 20).abs().argmin())  # a history that fits on a screen
    start, end = int(sequences.offsets[user]), int(sequences.offsets[user + 1])
    rows = [int(row) - first for row in sequences.items[start:end]]
    ids = dataset.items["item_id"]
    print(f"\nUser {dataset.user_ids[user]} has seen, last of all: {' · '.join(titles[row] for row in rows[-8:])}")
    terminal.top_table(recommender.answer([str(ids[row]) for row in rows], k=10))
