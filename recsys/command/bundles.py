"""The verbs that make bundles, change their items, and say which of them is live."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.command.arguments import AsJson, BundlePath, DatasetPath, NewBundle, Overrides, Register
from recsys.command.recipes import merge, tracking_of
from recsys.command.terminal import show, warn
from recsys.errors import GuardError, RequestError, SetupError

if TYPE_CHECKING:
    from recsys.tracking import Tracking


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
    from recsys.bundle import MODEL, open_directory
    from recsys.tracking import Tracking
    from serving.export import export as export_run
    from serving.index import IndexSettings
    from serving.ranking import ServingSettings
    from serving.states import DepthSettings

    model = open_directory(run / MODEL).manifest
    recipe = merge(model["recipe"], settings, IndexSettings, DepthSettings, ServingSettings, name=str(model["name"]))
    data = None if dataset is None else Dataset.open(dataset)
    depth, ranking = recipe.read(DepthSettings), recipe.read(ServingSettings)
    manifest = export_run(run, out, recipe.read(IndexSettings), data, depth, ranking)
    registered = ""
    if register:
        with Tracking.of(model).run(run.name) as tracking:
            registered = _standing(tracking, tracking.register(out, manifest["id"]))
    index = manifest["index"]
    typer.echo(f"{out}: bundle {manifest['id']}, {index['kind']} index, recall@100 {index['recall@100']:.4f}{registered}")


items_app = typer.Typer(
    name="items",
    help="Items of a bundle, without training: a new one is recommended at once, by its description.",
    no_args_is_help=True,
)
ItemsFile = Annotated[Path, typer.Option("--items", help="Table of items with the columns that the model learnt from.")]


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
    from recsys.command.terminal import bar
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
        warn(f"the new bundle is not registered: {error}")
        return ""


def _standing(tracking: Tracking, version: str) -> str:
    """The end of a line about a bundle: whether the version that it was registered as is champion; empty for no version."""
    if not version:
        return ""
    if tracking.champion() == version:
        return f", version {version} is champion"
    return f", version {version} is registered; `recsys bundles promote {version} --dataset …` decides"


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
    from recsys.command.terminal import bar, frontier_table
    from serving.engine import Recommender
    from serving.evaluation.budget import Budget, draw, spend, write
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
    show({"bundle": manifest["id"], **found.as_dict()}, json, frontier_table)
    if not json:
        typer.echo(f"{out or bundle}: bundle {manifest['id']}, {found.verdict}{registered}")
    if manifest["dataset"]["hash"] != data.manifest["hash"]:
        warn("this is not the data set that the model learnt from; its training events may be among the targets here")


bundles_app = typer.Typer(
    name="bundles", help="Registered bundles, and which of them is champion: the live one.", no_args_is_help=True
)


@bundles_app.command("list")
def list_bundles(settings: Overrides = None, json: AsJson = False) -> None:
    """List the registered bundles, newest first.

    Example: recsys bundles list --set tracking.uri=sqlite:///mlflow.db
    """
    from recsys.command.terminal import records_table

    tracking = tracking_of(settings)
    versions = tracking.versions()
    none = f"no bundle is registered in {tracking.uri if tracking.on else 'MLflow: tracking is off'}"
    show(versions, json, records_table if versions else none)


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
        tracking = tracking_of(settings)
        before = tracking.champion()
        if before == str(version):
            raise RequestError(f"version {version} is champion already; give the version that is to replace it")
        tracking.promote(str(version))
        tracking.decided(str(version), {"decision": "by hand", "reason": "", "against": before})
        _tell_champion(version, json)
        return
    from recsys.command.promotion import OWNERS, promote
    from recsys.command.terminal import records_table

    promotion = promote(tracking_of(settings, *OWNERS), str(version), dataset, settings, out)
    rules = promotion.decision.rules
    lines = [{"rule": rule.name, "holds": "yes" if rule.holds else "NO", "what": rule.text} for rule in rules]
    show(promotion.as_dict(), json, lambda _: records_table(lines))
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
        version = int(tracking_of(settings).rollback())
    except SetupError as error:  # it may begin with the registered model's name, which is the command's too
        raise SetupError(str(error).removeprefix("recsys: ")) from None
    _tell_champion(version, json)


def _tell_champion(version: int, json: bool) -> None:
    show({"version": version}, json, f"version {version} is champion")
