"""The verbs that make and look at data sets."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from recsys.command.arguments import AsJson, DatasetPlace, Overrides, Ray, RecipeName
from recsys.command.recipes import merge, recipe_of
from recsys.command.terminal import show, warn, warn_of_later
from recsys.errors import RequestError


def features(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option(help="Directory of the data set to make.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the raw logs; without it a public set is downloaded.")] = None,
    append: Annotated[bool, typer.Option("--append", help="Join these events to the data set at --out.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="A bad row is an error, not a quarantined one.")] = False,
    ray: Ray = "",
    settings: Overrides = None,
) -> None:
    """Read raw logs, set bad rows aside, and write histories: a data set.

    Example: recsys features ml-1m --data ml-1m --out datasets/ml-1m
    """
    from features.build import TALLIES, build
    from features.parts import in_turn, on_cluster
    from recsys.command.terminal import bar

    chosen = recipe_of(recipe, settings)
    with bar("events") as progress, on_cluster(ray) if ray else nullcontext(in_turn) as engine:
        manifest = build(data, chosen, out, append=append, strict=strict, progress=progress, engine=engine)
    typer.echo(f"{out}: " + ", ".join(f"{manifest[what]:,} {what}" for what in ("users", "items", "events")))
    for table, name in TALLIES.items():
        tally = manifest.get(name, {})
        for what, counts in (("in quarantine", tally.get("quarantined")), ("repaired", tally.get("repaired"))):
            if counts:
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
                typer.echo(f"{table}: {sum(counts.values()):,} rows {what}: {reasons}")
    _tell_split(manifest["counts"])


def resplit(
    dataset: DatasetPlace,
    out: Annotated[Path, typer.Option(help="Directory of the data set to make.")],
    settings: Overrides = None,
) -> None:
    """Split a data set's events otherwise, by its own [split] with --set, without reading the raw logs again.

    Example: recsys resplit datasets/shop --out datasets/new --set split.method=user_holdout --set split.holdout_one_in=10
    """
    from features.build import resplit as split_anew
    from features.dataset import Dataset
    from features.split import SplitSettings
    from recsys.command.terminal import bar

    data = Dataset.open(dataset)
    old = data.manifest["settings"]["split"]
    method = merge({}, settings, SplitSettings).sections.get("split", {}).get("method", old["method"])
    split = merge({"split": SplitSettings.of_method(method, old)}, settings, SplitSettings).read(SplitSettings)
    with bar("events") as progress:
        made = split_anew(data, split, out, progress)
    parts = ", ".join(f"{count:,} {part}" for part, count in made.manifest["counts"].items())
    typer.echo(f"{out}: {made.manifest['users']:,} users, events: {parts}")
    _tell_split(made.manifest["counts"])


def _tell_split(counts: Mapping[str, int]) -> None:
    warn_of_later(counts)
    if not counts["test"]:
        warn("no event is in the test, so nothing can be judged; [split] of the recipe says which are")


def leaks(
    dataset: DatasetPlace,
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
    from recsys.bundle import model_of, open_directory
    from recsys.command.terminal import bar, records_table

    if split not in ("validation", "test"):
        raise RequestError(f"split {split!r} cannot be judged; give validation or test")
    data = Dataset.open(dataset)
    manifest = None if model is None else open_directory(model_of(model)).manifest
    told = {} if manifest is None else {"leaks": manifest["recipe"].get("leaks", {})}
    chosen = merge(told, settings, LeakSettings).read(LeakSettings)
    with bar("events") as progress:
        checks = find_leaks(data, manifest, chosen, split, progress)
    lines = [{"looked for": each.name, "rows": each.rows, "leaks": each.found} for each in checks]
    found = {"dataset": str(dataset), "checks": [check.as_dict() for check in checks]}
    show(found, json, lambda _: records_table(lines))
    refuse(checks, str(dataset))
