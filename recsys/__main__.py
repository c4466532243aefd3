"""The command: verbs in the order of the way of one event. Heavy imports happen inside the verbs."""

from __future__ import annotations

import json as json_module
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys import __version__
from recsys.errors import GuardError, RecipeError, RecsysError, RequestError, SetupError

if TYPE_CHECKING:
    from features.dataset import Dataset
    from recsys.config import Recipe, Settings
    from recsys.tracking import Tracking
    from serving.history import HistoryStore

app = typer.Typer(
    help="An attention recommender: from an event log to users' screens.",
    no_args_is_help=True,
    rich_markup_mode=None,  # the plain help starts in half the time
    pretty_exceptions_enable=False,
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or path of a .toml file.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory of a bundle.")]
RunOrBundle = Annotated[Path, typer.Argument(metavar="RUN_OR_BUNDLE", help="Directory of a run or of a bundle.")]
DatasetPath = Annotated[Path, typer.Option("--dataset", help="Directory that `recsys features` made.")]
History = Annotated[
    list[str],
    typer.Option(
        "--history", metavar="ID_OR_TITLE …", help="Items by id or title, oldest first: --history 1 260, after BUNDLE."
    ),
]
Times = Annotated[
    list[int] | None,
    typer.Option("--times", metavar="SECOND …", help="Seconds since 1970 of each event, where the model reads them."),
]
Now = Annotated[int | None, typer.Option("--now", help="Second since 1970 at which to recommend; later events are left out.")]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="NAME=VALUE …",
        help="What items must be: in_stock=true price=10..20; one NAME again: any of its values.",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
STORE = "sqlite:histories.sqlite"
"""Where histories are kept unless said otherwise."""
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU where there is one.")]


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Where everything goes; made anew.")] = Path("demo")) -> None:
    """Everything on the built-in world: data, training, judging, a bundle, and a top-10 you can read.

    Example: recsys demo --out demo
    """
    from recsys.demo import run

    recipe = _recipe("tiny", None)
    run(out, recipe, _resolved(recipe))


@app.command()
def features(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option(help="Directory of the data set to make.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the raw logs; without it a public set is downloaded.")] = None,
    append: Annotated[bool, typer.Option("--append", help="Join these events to the data set at --out.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="A bad row is an error, not a quarantined one.")] = False,
    ray: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Compute on the Ray cluster of this node: auto or HOST:PORT; `local` starts one."),
    ] = "",
    settings: Overrides = None,
) -> None:
    """Read raw logs, set bad rows aside, and write histories: a data set.

    Example: recsys features ml-1m --data ml-1m --out datasets/ml-1m
    """
    from features.build import build
    from features.cluster import on_cluster
    from features.parts import in_turn
    from recsys.terminal import bar

    chosen = _recipe(recipe, settings)
    with bar("events") as progress, on_cluster(ray) if ray else nullcontext(in_turn) as engine:
        manifest = build(data, chosen, out, append=append, strict=strict, progress=progress, engine=engine)
    aside = sum(manifest["rows"]["quarantined"].values())
    counted = ", ".join(f"{manifest[what]:,} {what}" for what in ("users", "items", "events"))
    typer.echo(f"{out}: {counted}, {aside:,} rows in quarantine")


@app.command()
def resplit(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Directory that `recsys features` made.")],
    out: Annotated[Path, typer.Option(help="Directory of the data set to make.")],
    settings: Overrides = None,
) -> None:
    """Split a data set's events otherwise, by its own [split] with --set, without reading the raw logs again.

    Example: recsys resplit datasets/shop --out datasets/new --set split.method=user_holdout --set split.holdout_one_in=10
    """
    from features.dataset import Dataset
    from features.resplit import resplit as split_anew
    from features.split import SplitSettings
    from recsys.config import Recipe
    from recsys.terminal import bar

    data = Dataset.open(dataset)
    sections = _merge({"split": data.manifest["settings"]["split"]}, settings, SplitSettings)
    with bar("events") as progress:
        made = split_anew(data, Recipe("", sections).read(SplitSettings), out, progress)
    parts = ", ".join(f"{count:,} {part}" for part, count in made.manifest["counts"].items())
    typer.echo(f"{out}: {made.manifest['users']:,} users, events: {parts}")


@app.command()
def leaks(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Directory that `recsys features` made.")],
    model: Annotated[
        Path | None, typer.Option(metavar="RUN_OR_BUNDLE", help="Run or bundle that is to be judged by this data set.")
    ] = None,
    split: Annotated[str, typer.Option(help="What the model is to be judged by: validation or test.")] = "test",
    settings: Overrides = None,
    json: AsJson = False,
) -> None:
    """Look for what is known too early: late training events, shared events, unstable order, items from the future, and others.

    A leak is told with its first rows and ends it with exit code 3; `recsys train` looks for the same before it begins.

    Example: recsys leaks datasets/shop --model bundles/shop --set leaks.released=launched
    """
    from features.dataset import Dataset
    from features.leaks import LeakSettings, find_leaks, refuse
    from recsys.bundle import MANIFEST, open_directory
    from recsys.config import Recipe
    from recsys.terminal import bar, records_table

    if split not in ("validation", "test"):
        raise RequestError(f"split {split!r} cannot be judged; give validation or test")
    data = Dataset.open(dataset)
    made = None if model is None else model / "model" if (model / "model" / MANIFEST).is_file() else model
    manifest = None if made is None else open_directory(made).manifest
    told = {} if manifest is None else {"leaks": manifest["recipe"].get("leaks", {})}
    chosen = Recipe("", _merge(told, settings, LeakSettings)).read(LeakSettings)
    with bar("events") as progress:
        checks = find_leaks(data, manifest, chosen, split, progress)
    if json:
        typer.echo(json_module.dumps({"dataset": str(dataset), "checks": [check.as_dict() for check in checks]}))
    else:
        records_table([{"looked for": each.name, "rows": each.rows, "leaks": each.found} for each in checks])
    refuse(checks, str(dataset))


@app.command()
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
    from recsys.terminal import records_table, training_progress
    from recsys.tracking import Tracking, TrackingSettings
    from training.loop import choose_device
    from training.run import refuse_recipe
    from training.run import train as train_run
    from training.team import launch, launched, rank

    chosen = _recipe(recipe, settings)
    data = Dataset.open(dataset, verify=not rank())
    if not rank() and not launched():
        _refuse_leaks(data, chosen)
    resolved = _resolved(chosen) | data.manifest["settings"]  # how the data was made, it says itself
    if processes > 1:
        refuse_recipe(resolved, choose_device(device), model is not None)
        words = _without(sys.argv[1:], "--processes")
        del data  # what the check has read of it
        if code := launch(processes, words):
            _complain(f"{out}: training ended; the same command goes on from its newest checkpoint")
            raise typer.Exit(code)
        return
    with training_progress(quiet=bool(rank())) as (observe, progress, tell):
        made = train_run(
            data,
            resolved,
            out,
            name=chosen.name,
            device=choose_device(device),
            tracking=Tracking(chosen.read(TrackingSettings)),
            base=model,
            start=start,
            observe=observe,
            progress=progress,
            tell=tell,
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


@app.command()
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
    from recsys.terminal import records_table, search_progress
    from recsys.tracking import Tracking, TrackingSettings
    from training.loop import choose_device
    from training.tune import tune as search

    chosen = _recipe(recipe, settings)
    data = Dataset.open(dataset)
    _refuse_leaks(data, chosen)
    tracking = Tracking(chosen.read(TrackingSettings))
    with search_progress() as observe:
        trials = search(
            data,
            chosen,
            _resolved(chosen) | data.manifest["settings"],
            out,
            device=choose_device(device),
            tracking=tracking,
            observe=observe,
        )
    records_table([trial.record() for trial in trials[:10]])
    ends = [trial.state for trial in trials]
    counted = ", ".join(f"{ends.count(state)} {state}" for state in ("complete", "pruned", "failed"))
    typer.echo(f"{out / 'best.toml'}: trial {trials[0].number}, validation NDCG@10 {trials[0].value:.4f}; {counted}")


@app.command()
def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="SUBJECT", help="Directory of a run or a bundle, or lists of any program as Parquet.")
    ],
    dataset: DatasetPath,
    out: Annotated[
        Path | None,
        typer.Option(metavar="REPORT", help="Directory of the report to write: page, figures, lists, values by user."),
    ] = None,
    protocol: Annotated[str, typer.Option(help="P1, P2, P3, P3-repeats, P4 or P5; else the recipe's [protocol].")] = "",
    despite_leaks: Annotated[
        bool, typer.Option("--despite-leaks", help="Judge although leaks are found; the report says so.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the draws that make intervals.", min=0)] = 0,
    track: Annotated[bool, typer.Option(help="Record the report in the MLflow run that trained the model.")] = True,
    settings: Overrides = None,
    json: AsJson = False,
) -> None:
    """Judge lists over the whole catalogue, beside baselines, with intervals; the first line says what to think of it.

    A run or a bundle is judged by the lists that users would see, and each stage of the served path beside it. Lists of another
    program have user_id, item_id and rank. What is known too early ends it with exit code 3: `recsys leaks` tells the rows.

    Example: recsys evaluate bundles/ml-1m --dataset datasets/ml-1m --out reports/ml-1m --set protocol.split=validation
    """
    from features.dataset import Dataset
    from features.leaks import LeakSettings, find_leaks, refuse
    from recsys.config import Recipe
    from recsys.terminal import bar, report_table
    from recsys.tracking import Tracking
    from serving.engine import Recommender
    from serving.evaluation.given import GivenLists
    from serving.evaluation.protocol import ProtocolSettings
    from serving.evaluation.report import make_report, require_place

    if out is not None:
        require_place(out)
    data = Dataset.open(dataset)
    subject = GivenLists(path, data) if path.is_file() else Recommender.load(path)
    manifest = subject.manifest if isinstance(subject, Recommender) else None
    sections = _merge({} if manifest is None else manifest["recipe"], settings, ProtocolSettings, LeakSettings)
    if protocol:
        sections[ProtocolSettings.section] = {**sections.get(ProtocolSettings.section, {}), "name": protocol}
    recipe = Recipe("", sections)
    chosen = recipe.read(ProtocolSettings)
    with bar("events") as progress:
        checks = find_leaks(data, manifest, recipe.read(LeakSettings), chosen.split, progress)
    if not despite_leaks:
        refuse(checks, str(dataset))
    with bar("users") as progress:
        report = make_report(
            subject,
            data,
            chosen,
            name=path.stem,
            command=shlex.join(["recsys", *sys.argv[1:]]),
            seed=seed,
            checks=checks,
            progress=partial(progress, "evaluate"),
        )
    if out is not None:
        report = report.write(out)
    if json:
        typer.echo(json_module.dumps(report.manifest))
    else:
        report_table(report.manifest)
    if out is not None and not json:
        typer.echo(f"{out / 'report.html'}: {report.manifest['users']:,} users judged, {len(report.lists):,} rows of lists")
    if track and manifest is not None:
        try:
            with Tracking.of(manifest).run(path.name) as tracking:
                tracking.report(report.manifest, out)
        except SetupError as error:
            _warn(f"the report is not recorded: {error}")


@app.command()
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
    from recsys.backtest import backtest as judge_windows
    from recsys.terminal import records_table
    from training.loop import choose_device

    chosen, data = _recipe(recipe, settings), Dataset.open(dataset)
    found = judge_windows(data, chosen, _resolved(chosen), out, windows, days, choose_device(device))
    if json:
        typer.echo(json_module.dumps(found))
        return
    records_table(found["windows"])
    told = {}
    for lister in ("model", "best baseline"):
        spreads = [(name, one["mean"], one["deviation"]) for name, one in found[lister].items()]
        told[lister] = ", ".join(f"{name} {mean:.4f} ± {'–' if off is None else f'{off:.4f}'}" for name, mean, off in spreads)
    beaten = f"beaten in {found['beaten']} of {len(found['windows'])} windows"
    typer.echo(f"{out}: {told['model']}; the best baseline {told['best baseline']}, {beaten}")


@app.command()
def compare(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="REPORT that `recsys evaluate --out` wrote, or a folder of them, one a seed.")
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="REPORT, or folder of them, that is compared with A.")],
    out: Annotated[Path | None, typer.Option(help="Write comparison.html and comparison.json to this directory.")] = None,
    json: AsJson = False,
) -> None:
    """Say whether B is better than A: paired tests over users, by metric and by slice, and what could not have been seen.

    Example: recsys compare reports/old reports/new --out comparison
    """
    from recsys.terminal import comparison_tables
    from serving.evaluation.compare import compare as compare_reports
    from serving.evaluation.compare import reports_of, write

    names = (first.name, second.name) if first.name != second.name else (str(first), str(second))
    found = compare_reports(reports_of(first), reports_of(second), names).as_dict()
    if out is not None:
        write(found, out)
    if json:
        typer.echo(json_module.dumps(found))
    else:
        comparison_tables(found)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished run.")],
    out: Annotated[Path, typer.Option(help="Directory of the bundle to make.")],
    dataset: Annotated[
        Path | None, typer.Option(help="Data set whose histories measure the index; else item vectors do.")
    ] = None,
    register: Annotated[
        bool, typer.Option(help="Register the bundle in MLflow; it is champion where there is none yet.")
    ] = True,
    settings: Overrides = None,
) -> None:
    """Make a bundle of a run: weights, item vectors and index, with the index's measured recall.

    Example: recsys export runs/ml-1m --out bundles/ml-1m
    """
    from features.dataset import Dataset
    from recsys.bundle import open_directory
    from recsys.config import Recipe
    from recsys.tracking import Tracking
    from serving.engine import DepthSettings
    from serving.export import export as export_run
    from serving.index import IndexSettings
    from serving.ranking import ServingSettings

    model = open_directory(run / "model").manifest
    recipe = Recipe(str(model["name"]), _merge(model["recipe"], settings, IndexSettings, DepthSettings, ServingSettings))
    data = None if dataset is None else Dataset.open(dataset)
    owners = (recipe.read(IndexSettings), data, recipe.read(DepthSettings), recipe.read(ServingSettings))
    manifest = export_run(run, out, *owners)
    registered = ""
    if register:
        with Tracking.of(model).run(run.name) as tracking:
            registered = _standing(tracking, tracking.register(out, manifest["id"]))
    index = manifest["index"]
    typer.echo(f"{out}: bundle {manifest['id']}, {index['kind']} index, recall@100 {index['recall@100']:.4f}{registered}")


@app.command()
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
    from recsys.config import Recipe
    from recsys.reproduce import reproduce as make_again
    from recsys.terminal import records_table
    from recsys.tracking import TrackingSettings

    uri = Recipe("", _merge({}, settings, TrackingSettings)).read(TrackingSettings).uri
    if uri and not run.startswith("models:/"):
        raise RequestError(f"{run} says itself where MLflow is; --set tracking.uri is for models:/NAME@ALIAS, leave it out")
    found = make_again(run, dataset, data, out, uri)
    if json:
        typer.echo(json_module.dumps(found.as_dict()))
    else:
        names = ("part", "what", "stored", "now")
        lines = [{**{name: getattr(row, name) for name in names}, "agrees": row.verdict} for row in found.rows]
        records_table(lines, title=f"{found.kind} {found.id}")
    if not found.reproduced:
        raise GuardError(found.verdict)
    if not json:
        typer.echo(found.verdict)


items_app = typer.Typer(
    help="Items of a bundle, without training: a new one is recommended at once, by its description.", no_args_is_help=True
)
app.add_typer(items_app, name="items")
ItemsFile = Annotated[Path, typer.Option("--items", help="Table of items with the columns that the model learnt from.")]
NewBundle = Annotated[
    Path | None, typer.Option("--out", help="Directory of the new bundle; without it the old one is replaced.")
]
Register = Annotated[
    bool, typer.Option(help="Register the new bundle in MLflow; it is champion where the old one is, or none is yet.")
]


@items_app.command("add")
def add_items(bundle: BundlePath, items: ItemsFile, out: NewBundle = None, register: Register = True) -> None:
    """Add items: their text, categories and numbers are read, and they can be recommended.

    Example: recsys items add bundles/shop --items new_products.csv
    """
    _change_items("add", bundle, items, out, register)


@items_app.command("update")
def update_items(bundle: BundlePath, items: ItemsFile, out: NewBundle = None, register: Register = True) -> None:
    """Describe items of a bundle anew; a table of attributes alone (in_stock, say) changes nothing else.

    Example: recsys items update bundles/shop --items products.csv
    """
    _change_items("update", bundle, items, out, register)


@items_app.command("remove")
def remove_items(
    bundle: BundlePath,
    item: Annotated[list[str], typer.Option("--item", metavar="ID …", help="Ids of items: --item 1 260, after BUNDLE.")],
    out: NewBundle = None,
    register: Register = True,
) -> None:
    """Take items out of all lists; in histories they are still read.

    Example: recsys items remove bundles/shop --item 22423 85123A
    """
    from serving.items import remove

    _tell_change(remove(bundle, item, out), out or bundle, register)


def _change_items(verb: str, bundle: Path, path: Path, out: Path | None, register: bool) -> None:
    from recsys.terminal import bar
    from serving.items import from_file

    with bar("texts") as progress:
        manifest = from_file(bundle, verb, path, out, partial(progress, "text"))
    _tell_change(manifest, out or bundle, register)


def _tell_change(manifest: dict[str, Any], bundle: Path, register: bool) -> None:
    registered = _registered(manifest, bundle) if register else ""
    counts = {**manifest["changes"]}
    unknown = counts.pop("unknown", 0)
    said = ", ".join(f"{count:,} items {verb}" for verb, count in counts.items())
    said += f", {unknown:,} of them not recommended: nothing is known of them" if unknown else ""
    typer.echo(f"{bundle}: bundle {manifest['id']}, {said}{registered}")


def _registered(manifest: dict[str, Any], bundle: Path) -> str:
    """Register a bundle that was made of another one in MLflow, and say so; where that cannot be, warn."""
    from recsys.tracking import Tracking

    try:
        with Tracking.of(manifest).run(bundle.name) as tracking:
            return _standing(tracking, tracking.register(bundle, manifest["id"], str(manifest.get("before", ""))))
    except SetupError as error:
        _warn(f"the new bundle is not registered: {error}")
        return ""


def _standing(tracking: Tracking, version: str) -> str:
    """The end of a line about a bundle: whether the version that it was registered as is champion; empty for no version."""
    if not version:
        return ""
    if tracking.champion() == version:
        return f", version {version} is champion"
    return f", version {version} is registered; `recsys bundles promote {version} --dataset …` decides"


@app.command()
def budget(
    bundle: BundlePath,
    dataset: DatasetPath,
    latency_ms: Annotated[
        float | None, typer.Option("--latency-ms", help="Milliseconds within which 99 of 100 answers are there.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price of a million answers; needs --core-hour.")] = None,
    core_hour: Annotated[float | None, typer.Option("--core-hour", help="Price of an hour of one core.")] = None,
    out: NewBundle = None,
    picture: Annotated[Path | None, typer.Option(help="Write quality against cost of all profiles as a PNG.")] = None,
    k: Annotated[int, typer.Option("-k", help="Items of an answer.")] = 10,
    users: Annotated[int, typer.Option(help="Users of the validation split by whom lists are judged.")] = 1000,
    register: Register = True,
    json: AsJson = False,
) -> None:
    """Measure what a bundle's lists cost and are worth, and write the best settings within a budget into it.

    Tried are candidates and blocks of the ranker, early exit, and how far the index looks; one thread, one request at a time.

    Example: recsys budget bundles/ml-1m --dataset datasets/ml-1m --latency-ms 10 --picture budget.png
    """
    import torch

    from features.dataset import Dataset
    from recsys.terminal import bar, frontier_table
    from serving.budget import Budget, draw, spend, write
    from serving.engine import Recommender
    from serving.items import opened

    limit, data = Budget(latency_ms, price, core_hour), Dataset.open(dataset)
    torch.set_num_threads(1)
    with opened(bundle) as directory:
        recommender = Recommender(directory, threads=1)
        with bar("answers") as progress:
            found = spend(recommender, data, limit, k, users, progress)
        if picture is not None:
            draw(found, picture)
        manifest = write(found, recommender, data, directory, out or bundle)
    registered = _registered(manifest, out or bundle) if register else ""
    if json:
        typer.echo(json_module.dumps({"bundle": manifest["id"], **found.as_dict()}))
    else:
        frontier_table(found.as_dict())
        typer.echo(f"{out or bundle}: bundle {manifest['id']}, {found.verdict}{registered}")
    _compare(manifest, data.manifest)


@app.command()
def recommend(
    bundle: RunOrBundle,
    history: History,
    k: Annotated[int, typer.Option("-k", help="Items to recommend.")] = 10,
    times: Times = None,
    now: Now = None,
    where: Where = None,
    deny: Annotated[list[str] | None, typer.Option("--deny", metavar="ID …", help="Items that may not be recommended.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", metavar="ID …", help="The only items that may be recommended.")
    ] = None,
    diversity: Annotated[float | None, typer.Option(help="From 0, the best items, to 1, each unlike the others.")] = None,
    popularity: Annotated[
        float | None, typer.Option(help="What is taken from a score for each factor e of an item's training events.")
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Say how probable each item is the next one.")] = False,
    json: AsJson = False,
) -> None:
    """Recommend for one history.

    Example: recsys recommend bundles/ml-1m --history "Toy Story (1995)" 2 -k 10 --where categories=Comedy
    """
    from recsys.terminal import top_table
    from serving.engine import Recommender

    recommender = Recommender.load(bundle)
    conditions = recommender.catalogue.attributes.read(where) if where else None
    answer = recommender.answer(
        history,
        k,
        times=times or None,
        now=now,
        deny=deny or (),
        allow=allow or None,
        where=conditions,
        diversity=diversity,
        popularity=popularity,
        probabilities=probabilities,
    )
    if json:
        typer.echo(json_module.dumps(answer))
    else:
        top_table(answer)


@app.command()
def explain(
    bundle: RunOrBundle,
    history: History,
    item: Annotated[
        list[str] | None,
        typer.Option("--item", metavar="ID_OR_TITLE", help="The item to explain; without it the first that is recommended."),
    ] = None,
    times: Times = None,
    now: Now = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write attention, drops and the attention of every layer as a PNG.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Show what carried an item: of each event the attention, and how far the score drops without it.

    How true either is has been measured, and is said.

    Example: recsys explain bundles/ml-1m --history 1 2 --item "Toy Story 2 (1999)" --picture why.png
    """
    import torch

    from recsys.terminal import explanation_table
    from serving.engine import Recommender
    from serving.explain import draw
    from serving.explain import explain as explain_one

    if item and len(item) > 1:
        raise RequestError(f"--item names {len(item)} items; explain one at a time, with quotes round its title")
    generator = torch.Generator().manual_seed(0)  # the same explanation each time
    chosen = item[0] if item else None
    found = explain_one(Recommender.load(bundle), history, generator, item=chosen, times=times or None, now=now)
    if picture is not None:
        draw(found, picture)
    if json:
        typer.echo(json_module.dumps(found.as_dict()))
    else:
        explanation_table(found.as_dict())


@app.command()
def nightly(
    bundle: RunOrBundle,
    out: Annotated[Path, typer.Option(help="Folder of the nights; the lists that are live are out/live/lists-*.parquet.")],
    dataset: Annotated[Path | None, typer.Option(help="Histories: a directory that `recsys features` made.")] = None,
    store: Annotated[str, typer.Option(metavar="URL", help="Histories: the store of `recsys serve`.")] = "",
    events: Annotated[
        str,
        typer.Option(
            metavar="PLACE", help="Histories: Parquet of events, a file, glob, folder or URL (s3://, gs://, https://)."
        ),
    ] = "",
    k: Annotated[int, typer.Option("-k", help="Items for each user.")] = 100,
    now: Now = None,
    repeats: Annotated[bool, typer.Option("--repeats", help="Items of the history may be recommended too.")] = False,
    where: Where = None,
    deny: Annotated[list[str] | None, typer.Option("--deny", metavar="ID …", help="Items that nobody gets.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", metavar="ID …", help="The only items that anybody gets.")
    ] = None,
    reasons: Annotated[bool, typer.Option("--reasons", help="Add `because`: the item of the history nearest to each.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Make every list anew, also of users of whom nothing changed.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Go live although a guard does not hold.")] = False,
    to: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Deliver the lists to redis://HOST:PORT or postgresql://…/DB?table=NAME; repeatable."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes; 0: as many as cores, or fewer for few users.", min=0)] = 0,
    ray: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Compute on the Ray cluster of this node: auto or HOST:PORT; `local` starts one."),
    ] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda (one process), or auto: the GPU where there is one.")] = "cpu",
    track: Annotated[bool, typer.Option(help="Record the night as an MLflow run.")] = True,
    json: AsJson = False,
    settings: Overrides = None,
) -> None:
    """Make a list for every user, exactly once, and make all of them live in one step, if the guards hold.

    A night that was interrupted goes on; lists of users of whom nothing changed are taken from the last night. A guard that
    does not hold ends it with exit code 3, and the last night's lists stay live. Guards and settings: --set guards.overlap=0.2.

    Example: recsys nightly bundles/ml-1m --dataset datasets/ml-1m --out lists -k 100
    """
    from recsys.config import Recipe
    from recsys.night import run
    from recsys.terminal import bar

    given = {kind: place for kind, place in {"dataset": str(dataset or ""), "store": store, "events": events}.items() if place}
    if len(given) != 1:
        raise RequestError(f"{len(given)} places of histories are given; give one of --dataset, --store and --events")
    if ray and (workers or device != "cpu"):
        raise RequestError("--ray decides where lists are computed; leave out --workers and --device")
    if workers > 1 and device != "cpu":
        raise RequestError("a GPU is one process's; leave out --workers, or --device")
    terms = {"k": k, "now": now or 0, "filter_seen": not repeats, "reasons": reasons}
    lists = {"deny": tuple(deny or ()), "allow": tuple(allow) if allow else None}
    with bar("users") as progress:
        night = run(
            bundle,
            out,
            next(iter(given.items())),
            {**terms, **lists},
            where or [],
            lambda sections, *owners: Recipe("", _merge(sections, settings, *owners)),
            full=full,
            force=force,
            to=to or [],
            workers=workers,
            ray=ray,
            device=device,
            track=track,
            progress=progress,
            warn=_warn,
        )
    told = night.manifest
    if json:
        typer.echo(json_module.dumps({key: value for key, value in told.items() if key not in ("files", "parts")}))
        return
    clock = told["clock"]
    taken = told["users"] - clock["computed"] - clock["found"]
    kept = f", {taken:,} of them as they were" if taken else ""
    typer.echo(
        f"{night.path}: {told['users']:,} users{kept}, {told['rows']:,} rows, {told['underfilled']:,} lists not full, "
        f"{clock['users_per_second']:,.0f} users a second"
    )


@app.command()
def deliver(
    lists: Annotated[Path, typer.Argument(metavar="LISTS", help="Folder of nights; its live one is delivered.")],
    to: Annotated[
        list[str],
        typer.Option(metavar="URL", help="redis://HOST:PORT?ttl=SECONDS or postgresql://HOST/DB?table=NAME; repeatable."),
    ],
    json: AsJson = False,
) -> None:
    """Load the live night's lists into Redis or PostgreSQL, where readers see the old ones or the new ones, never both.

    Example: recsys deliver lists --to redis://localhost:6379
    """
    from recsys.terminal import bar
    from serving.delivery import deliver as load
    from serving.nights import Night

    night = Night.open(lists, verify=True)
    for url in to:
        with bar("users") as progress:
            counts = load(night, url, partial(progress, "deliver"))
        if json:
            typer.echo(json_module.dumps({"night": night.id, **counts}))
        else:
            typer.echo(f"night {night.id}: {', '.join(f'{count:,} {what}' for what, count in counts.items())}")


@app.command()
def serve(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Directory of a bundle, or models:/NAME@ALIAS of MLflow.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    store: Annotated[
        str, typer.Option(metavar="URL", help="Where histories are kept: sqlite:PATH, lmdb:PATH, redis://HOST:PORT, memory:.")
    ] = STORE,
    lists: Annotated[
        str,
        typer.Option(
            metavar="PLACE",
            help="Lists for when none can be computed in time: folder of `recsys nightly`, or redis://HOST:PORT.",
        ),
    ] = "",
    challenger: Annotated[
        str, typer.Option(metavar="BUNDLE", help="Another bundle, which answers the part online.share of the users.")
    ] = "",
    keys: Annotated[Path | None, typer.Option(help="File of `recsys keys`; requests then need one of its keys.")] = None,
    trace: Annotated[
        str, typer.Option(metavar="URL", help="OpenTelemetry collector that gets spans; else OTEL_EXPORTER_OTLP_ENDPOINT.")
    ] = "",
    settings: Overrides = None,
) -> None:
    """Answer over HTTP: lists, events, items and users under /v1, a page at /, and /openapi.json for all of it.

    The bundle, its challenger, the lists and the keys are read anew when they change. The first SIGTERM ends it in peace.

    Example: recsys serve bundles/ml-1m --port 8000 --store sqlite:histories.sqlite --set online.deadline_ms=100
    """
    from recsys.config import Recipe
    from recsys.tracking import TrackingSettings
    from serving.admission import OnlineSettings
    from serving.app import serve as run_server

    chosen = Recipe("", _merge({}, settings, OnlineSettings, TrackingSettings))
    run_server(
        bundle,
        host,
        port,
        store=store,
        lists=lists,
        challenger=challenger,
        keys=keys,
        trace=trace,
        tracking=chosen.read(TrackingSettings).uri,
        settings=chosen.read(OnlineSettings),
    )


keys_app = typer.Typer(help="Keys of the online API.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
KeysFile = Annotated[Path, typer.Option("--keys", help="File of keys; only their SHA-256 stand in it.")]
KeyName = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")]


@keys_app.command("add")
def add_key(name: KeyName, keys: KeysFile) -> None:
    """Make a key and print it, once: it is kept nowhere.

    Example: recsys keys add shop --keys keys.json
    """
    from serving.keys import add

    typer.echo(add(keys, name))


@keys_app.command("list")
def list_keys(keys: KeysFile, json: AsJson = False) -> None:
    """Name the keys of a file.

    Example: recsys keys list --keys keys.json
    """
    from serving.keys import read

    names = list(read(keys))
    typer.echo(json_module.dumps({"keys": names}) if json else "\n".join(names))


@keys_app.command("remove")
def remove_key(name: KeyName, keys: KeysFile) -> None:
    """Take a key out; a server that reads the file knows it no longer.

    Example: recsys keys remove shop --keys keys.json
    """
    from serving.keys import remove

    remove(keys, name)
    typer.echo(f"{keys}: {name} is out")


history_app = typer.Typer(help="Histories of the online API: the last events of each user.", no_args_is_help=True)
app.add_typer(history_app, name="history")
StoreUrl = Annotated[
    str, typer.Option("--store", metavar="URL", help="sqlite:PATH, lmdb:PATH or redis://HOST:PORT/NUMBER, as served.")
]
UserId = Annotated[str, typer.Argument(metavar="USER", help="Id of the user.")]


@history_app.command("import")
def import_histories(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Directory that `recsys features` made.")],
    store: StoreUrl = STORE,
    settings: Overrides = None,
) -> None:
    """Take a data set's histories into a store; twice the same adds nothing.

    Example: recsys history import datasets/ml-1m --store sqlite:histories.sqlite
    """
    from features.dataset import Dataset
    from recsys.config import Recipe
    from recsys.terminal import bar
    from serving.admission import OnlineSettings
    from serving.history import import_dataset

    keep = Recipe("", _merge({}, settings, OnlineSettings)).read(OnlineSettings).keep
    data = Dataset.open(dataset)
    with _store(store, keep) as kept, bar("users") as progress:
        counts = import_dataset(kept, data, partial(progress, "import"))
    typer.echo(f"{kept.url}: {counts['users']:,} users, {counts['new']:,} new events of {counts['events']:,}")


@history_app.command("show")
def show_history(user: UserId, store: StoreUrl = STORE, json: AsJson = False) -> None:
    """Show a user's events, oldest first.

    Example: recsys history show u-1 --store sqlite:histories.sqlite
    """
    from recsys.terminal import records_table

    with _store(store) as kept:
        events = [{"item_id": event.item_id, "time": event.time} for event in kept.read(user)]
    if json:
        typer.echo(json_module.dumps({"user_id": user, "events": events}))
    else:
        records_table(events, title=f"user {user}: {len(events):,} events")


@history_app.command("erase")
def erase_history(
    user: UserId,
    store: StoreUrl = STORE,
    lists: Annotated[
        str,
        typer.Option(metavar="PLACE", help="Lists out of which the user is taken too: folder of nights, or redis://HOST:PORT."),
    ] = "",
) -> None:
    """Erase a user's events, and with --lists the user's nightly list.

    Example: recsys history erase u-1 --store sqlite:histories.sqlite --lists lists
    """
    from serving.fallback import erase_from

    with _store(store) as kept:
        found = {"history": kept.erase(user)}
    if lists:
        found["lists"] = erase_from(lists, user)
    typer.echo("; ".join(f"{what}: {'erased' if there else 'nothing was there'}" for what, there in found.items()))


@contextmanager
def _store(url: str, keep: int = 500) -> Iterator[HistoryStore]:
    from serving.history import open_store

    store = open_store(url, keep)
    try:
        yield store
    finally:
        store.close()


bundles_app = typer.Typer(help="Registered bundles, and which of them is champion: the live one.", no_args_is_help=True)
app.add_typer(bundles_app, name="bundles")


@bundles_app.command("list")
def list_bundles(settings: Overrides = None, json: AsJson = False) -> None:
    """List the registered bundles, newest first.

    Example: recsys bundles list --set tracking.uri=sqlite:///mlflow.db
    """
    from recsys.terminal import records_table

    tracking = _tracking(settings)
    versions = tracking.versions()
    if json:
        typer.echo(json_module.dumps(versions))
    elif versions:
        records_table(versions)
    else:
        typer.echo(f"no bundle is registered in {tracking.uri if tracking.on else 'MLflow: tracking is off'}")


@bundles_app.command("promote")
def promote_bundle(
    version: Annotated[int, typer.Argument(metavar="VERSION", help="Its number, as `recsys bundles list` shows it.")],
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="Data set on which the gate judges it; without it you decide.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the reports, the comparison and the decision too.")] = None,
    settings: Overrides = None,
    json: AsJson = False,
) -> None:
    """Make a registered bundle the champion, if the rules hold; a server that follows the registry takes it without a restart.

    With --dataset both are judged, and the rules of the bundle's recipe ([promotion]) decide; a refusal ends with exit code 3.
    Rules: --set promotion.least_gain=-0.01. The decision and its evidence are kept on the version in MLflow.

    Example: recsys bundles promote 7 --dataset datasets/ml-1m
    """
    if dataset is None:
        if out is not None:
            raise RequestError("--out is for what is judged on a --dataset; give both or neither")
        tracking = _tracking(settings)
        before = tracking.champion()
        if before == str(version):
            raise RequestError(f"version {version} is champion already; give the version that is to replace it")
        tracking.promote(str(version))
        tracking.decided(str(version), {"decision": "by hand", "reason": "", "against": before})
        _tell_champion(version, json)
        return
    from recsys.config import Recipe
    from recsys.promotion import OWNERS, promote
    from recsys.terminal import bar, records_table
    from recsys.tracking import TrackingSettings

    tracking = _tracking(settings, *OWNERS)
    with bar("lists") as progress:
        promotion = promote(
            tracking,
            str(version),
            dataset,
            lambda recipe: Recipe("", _merge(recipe, settings, *OWNERS, TrackingSettings)),
            out,
            shlex.join(["recsys", *sys.argv[1:]]),
            progress,
        )
    if json:
        typer.echo(json_module.dumps(promotion.as_dict()))
    else:
        rules = promotion.decision.rules
        records_table([{"rule": rule.name, "holds": "yes" if rule.holds else "NO", "what": rule.text} for rule in rules])
    if not promotion.decision.promote:
        raise GuardError(promotion.verdict)
    if not json:
        typer.echo(promotion.verdict)


@bundles_app.command("rollback")
def rollback_bundle(settings: Overrides = None, json: AsJson = False) -> None:
    """Make the champion before the present one champion again; once more, the one before that.

    Example: recsys bundles rollback
    """
    try:
        version = int(_tracking(settings).rollback())
    except SetupError as error:  # it may begin with the registered model's name, which is the command's too
        raise SetupError(str(error).removeprefix("recsys: ")) from None
    _tell_champion(version, json)


def _tracking(settings: list[str] | None, *others: type[Settings]) -> Tracking:
    """The registry; the settings may be of others too, who read them themselves."""
    from recsys.config import Recipe
    from recsys.tracking import Tracking, TrackingSettings

    return Tracking(Recipe("", _merge({}, settings, TrackingSettings, *others)).read(TrackingSettings))


def _tell_champion(version: int, json: bool) -> None:
    typer.echo(json_module.dumps({"version": version}) if json else f"version {version} is champion")


@app.command()
def doctor() -> None:
    """Show versions and devices, and whether torch, fbgemm, torchrec and faiss fit together, with the fix if not.

    Example: recsys doctor
    """
    from recsys.doctor import diagnose, exit_code, render

    findings = diagnose()
    typer.echo(render(findings))
    raise typer.Exit(exit_code(findings))


@app.callback(invoke_without_command=True)
def _start(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _recipe(name: str, overrides: list[str] | None) -> Recipe:
    from recsys.config import load_recipe

    recipe = load_recipe(name, Path(__file__).parents[1] / "training" / "recipes", overrides or ())
    recipe.resolved(_owners())
    return recipe


def _resolved(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """All that a run is made by: every section but [tune], which says what to try beside it."""
    return {section: values for section, values in recipe.resolved(_owners()).items() if section != "tune"}


def _owners() -> list[type[Settings]]:
    from features.leaks import LeakSettings
    from features.schema import DataSettings
    from features.split import SplitSettings
    from features.synthetic import SyntheticSettings
    from recsys.tracking import TrackingSettings
    from serving.engine import DepthSettings
    from serving.evaluation.gate import PromotionSettings
    from serving.guards import GuardSettings
    from serving.index import IndexSettings
    from serving.nightly import NightlySettings
    from serving.ranking import ServingSettings
    from training.run import DECISIVE, RANKING
    from training.space import TuneSettings

    sections = [DataSettings, SyntheticSettings, SplitSettings, LeakSettings, *DECISIVE, *RANKING, TuneSettings]
    served = [IndexSettings, DepthSettings, ServingSettings, NightlySettings, GuardSettings, PromotionSettings]
    return [*sections, *served, TrackingSettings]


def _merge(
    sections: dict[str, dict[str, Any]], overrides: list[str] | None, *owners: type[Settings]
) -> dict[str, dict[str, Any]]:
    """The sections with the overrides, which may be of the owners' sections alone."""
    from recsys.config import override

    known = [owner.section for owner in owners]
    for section in override({}, overrides or ()):
        if section not in known:
            raise RecipeError(f"--set {section}.…: this verb reads [{'] and ['.join(known)}] alone; leave it out")
    return override(sections, overrides or ())


def _compare(manifest: dict[str, Any], dataset: dict[str, Any]) -> None:
    """Warn where a model is judged by another data set than its own."""
    if manifest["dataset"]["hash"] != dataset["hash"]:
        _warn("this is not the data set that the model learnt from; its training events may be among the targets here")


def _refuse_leaks(dataset: Dataset, recipe: Recipe) -> None:
    """Raises LeakError: the data set is not to be learnt from."""
    from features.leaks import LeakSettings, find_leaks, refuse

    refuse(find_leaks(dataset, settings=recipe.read(LeakSettings)), str(dataset.path))


def _warn(message: str) -> None:
    print(f"recsys: warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the command: the user's mistakes leave one line and exit code 2, a guard 3, our own a traceback and 1."""
    try:
        app(_one_by_one(sys.argv[1:]))
    except GuardError as error:
        _complain(str(error))
        sys.exit(3)
    except RecsysError as error:
        sys.exit(_complain(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _without(words: list[str], option: str) -> list[str]:
    """The words of a command without an option and its value."""
    left: list[str] = []
    for place, word in enumerate(words):
        if word != option and not word.startswith(f"{option}=") and (not place or words[place - 1] != option):
            left.append(word)
    return left


def _one_by_one(words: list[str]) -> list[str]:
    """`--history A B` as `--history A --history B`, and other lists likewise: options of several values are none of typer's."""
    spread: list[str] = []
    option = ""
    for word in words:
        if word in ("--history", "--times", "--item", "--where", "--deny", "--allow"):
            option = word
            continue
        option = "" if word.startswith("-") else option
        spread += [option, word] if option else [word]
    return spread


def _complain(message: str) -> int:
    print(f"recsys: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
