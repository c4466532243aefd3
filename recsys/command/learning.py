"""The verbs that train: a run, a search, windows of time, the same run again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys.command.arguments import AsJson, DatasetPath, Device, Overrides, RecipeName
from recsys.command.recipes import recipe_of, resolved, tracking_of
from recsys.command.terminal import complain, show
from recsys.errors import GuardError, RequestError

if TYPE_CHECKING:
    from features.dataset import Dataset
    from recsys.config import Recipe


def train(
    recipe: RecipeName,
    dataset: DatasetPath,
    out: Annotated[Path, typer.Option(help="Directory of the run; an interrupted run there goes on.")],
    model: Annotated[
        Path | None, typer.Option(help="Finished run of which the sequence model is taken; its ranker alone is learnt.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Finished run with whose weights learning begins; items are matched by their ids.")
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Processes of this machine that learn together; on several machines use torchrun.", min=1)
    ] = 1,
    device: Device = "auto",
    settings: Overrides = None,
) -> None:
    """Train the sequence model and, where the recipe has one, its ranker; the same command again resumes an interrupted run.

    Several processes do the steps of one, each with a part of the histories; with model.embedding "torchrec" and an
    optimizer.table of its own each holds a part of the item table. One that dies is started again and goes on.

    Example: recsys train ml-1m --dataset datasets/ml-1m --out runs/ml-1m --set train.seed=1
    """
    from features.dataset import Dataset
    from recsys.command.terminal import records_table, training_progress
    from recsys.tracking import Tracking, TrackingSettings
    from training.loop import choose_device
    from training.run import refuse_recipe
    from training.run import train as train_run
    from training.team import launch, launched, rank

    chosen = recipe_of(recipe, settings)
    data = Dataset.open(dataset, verify=not rank())
    if not rank() and not launched():
        _refuse_leaks(data, chosen)
    settled = resolved(chosen) | data.manifest["settings"]  # how the data was made, it says itself
    if processes > 1:
        refuse_recipe(settled, choose_device(device), model is not None, start is not None)
        words = without(sys.argv[1:], "--processes")
        del data  # what the check has read of it
        if code := launch(processes, words):
            complain(f"{out}: training ended; the same command goes on from its newest checkpoint")
            raise typer.Exit(code)
        return
    with training_progress(quiet=bool(rank())) as shown:
        made = train_run(
            data,
            settled,
            out,
            name=chosen.name,
            device=choose_device(device),
            tracking=Tracking(chosen.read(TrackingSettings)),
            base=model,
            start=start,
            **shown,
        )
    if rank():
        return
    best = made.manifest["quality"]["validation"]
    judged = f", validation NDCG@10 {best['ndcg@10']:.4f}" if best else ", without validation"
    figures = ("blocks", "recall@10", "ndcg@10")
    for curve in (made.manifest.get("depth_curve"), made.manifest.get("ranker", {}).get("curve")):
        if curve:
            records_table([{name: line[name] for name in figures} for line in curve])
    if ranked := made.manifest.get("ranker", {}).get("curve"):
        judged += f", with the ranker {ranked[-1]['ndcg@10']:.4f}"
    typer.echo(f"{out}: epoch {made.manifest['best_epoch']}{judged}")


def tune(
    recipe: RecipeName,
    dataset: DatasetPath,
    out: Annotated[Path, typer.Option(help="Directory of the search; an interrupted search there goes on.")],
    device: Device = "auto",
    settings: Overrides = None,
) -> None:
    """Search for settings by validation NDCG@10, never by the test; the same command again goes on.

    The recipe's [tune.search] names what is searched: `model.heads = [1, 2]`, `model.dropout = {low = 0.0, high = 0.5}`.
    Without it: dropout, temperature, learning rate, weight decay and batch_tokens. tune.trials and tune.minutes end it.

    Example: recsys tune ml-1m --dataset datasets/ml-1m --out searches/ml-1m --set tune.trials=40
    """
    from features.dataset import Dataset
    from recsys.command.terminal import records_table, search_progress
    from recsys.tracking import Tracking, TrackingSettings
    from training.loop import choose_device
    from training.tune import tune as search

    chosen = recipe_of(recipe, settings)
    data = Dataset.open(dataset)
    _refuse_leaks(data, chosen)
    tracking = Tracking(chosen.read(TrackingSettings))
    with search_progress() as observe:
        trials = search(
            data,
            chosen,
            resolved(chosen) | data.manifest["settings"],
            out,
            device=choose_device(device),
            tracking=tracking,
            observe=observe,
        )
    records_table([trial.record() for trial in trials[:10]])
    ends = [trial.state for trial in trials]
    counted = ", ".join(f"{ends.count(state)} {state}" for state in ("complete", "pruned", "failed"))
    typer.echo(f"{out / 'best.toml'}: trial {trials[0].number}, validation NDCG@10 {trials[0].value:.4f}; {counted}")


def backtest(
    recipe: RecipeName,
    dataset: DatasetPath,
    out: Annotated[Path, typer.Option(help="Directory of the back-test; an interrupted one there goes on.")],
    windows: Annotated[int, typer.Option(help="How many windows of time are judged, the last one to the end of the data.")] = 4,
    days: Annotated[int, typer.Option(help="Days of a window.")] = 14,
    device: Device = "auto",
    settings: Overrides = None,
    json: AsJson = False,
) -> None:
    """Train and judge as if it were earlier: for each of some windows of time, by the events before it alone.

    The split.validation_days before a window are its validation. The same command again goes on where it was killed.

    Example: recsys backtest shop.toml --dataset datasets/shop --out backtests/shop --windows 4 --days 14
    """
    from features.dataset import Dataset
    from recsys.command.backtest import backtest as judge_windows
    from recsys.command.terminal import records_table
    from training.loop import choose_device

    chosen, data = recipe_of(recipe, settings), Dataset.open(dataset)
    found = judge_windows(data, chosen, out, windows, days, choose_device(device))
    show(found, json, lambda _: records_table(found["windows"]))
    if json:
        return
    told = {}
    for lister in ("model", "best baseline"):
        spreads = [(name, one["mean"], one["deviation"]) for name, one in found[lister].items()]
        told[lister] = ", ".join(f"{name} {mean:.4f} ± {'–' if off is None else f'{off:.4f}'}" for name, mean, off in spreads)
    beaten = f"beaten in {found['beaten']} of {len(found['windows'])} windows"
    typer.echo(f"{out}: {told['model']}; the best baseline {told['best baseline']}, {beaten}")


def reproduce(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Directory of a run or of a bundle, or models:/NAME@ALIAS, models:/NAME/VERSION."),
    ],
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="The run's data set; without it, where it lay when the run was made.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the raw logs; a data set that is not there is built of it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder that keeps what is made again; an interrupted training there goes on.")
    ] = None,
    settings: Overrides = None,
    json: AsJson = False,
) -> None:
    """Make a run again from its stored recipe, data and seed, and say whether figures and bytes agree.

    First all that is stored is held against itself and against MLflow: a setting, file or figure that was changed is named.
    What differs ends it with exit code 3, but for bytes which another machine or version explains while the figures agree.

    Example: recsys reproduce runs/ml-1m --dataset datasets/ml-1m
    """
    from recsys.command.reproduce import reproduce as make_again
    from recsys.command.terminal import records_table

    uri = tracking_of(settings).settings.uri
    if uri and not run.startswith("models:/"):
        raise RequestError(f"{run} says itself where MLflow is; --set tracking.uri is for models:/NAME@ALIAS, leave it out")
    found = make_again(run, dataset, data, out, uri)
    names = ("part", "what", "stored", "now")
    lines = [{**{name: getattr(row, name) for name in names}, "agrees": row.verdict} for row in found.rows]
    show(found.as_dict(), json, lambda _: records_table(lines, title=f"{found.kind} {found.id}"))
    if not found.reproduced:
        raise GuardError(found.verdict)
    if not json:
        typer.echo(found.verdict)


def without(words: list[str], option: str) -> list[str]:
    """The words of a command without an option and its value."""
    behind = zip(["", *words], words, strict=False)
    return [word for before, word in behind if option not in (before, word) and not word.startswith(f"{option}=")]


def _refuse_leaks(dataset: Dataset, recipe: Recipe) -> None:
    """Raises LeakError: the data set is not to be learnt from."""
    from features.leaks import LeakSettings, find_leaks, refuse

    refuse(find_leaks(dataset, settings=recipe.read(LeakSettings)), str(dataset.path))
