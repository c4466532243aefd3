"""The verbs that measure: reports, comparisons, and what a list costs."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from recsys.command.arguments import AsJson, DatasetPath, Overrides
from recsys.command.recipes import merge
from recsys.command.terminal import show, warn
from recsys.errors import SetupError


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
    from features.leaks import LeakSettings
    from recsys.command.terminal import bar, report_table
    from recsys.tracking import Tracking
    from serving.engine import Recommender
    from serving.evaluation.given import GivenLists
    from serving.evaluation.protocol import ProtocolSettings
    from serving.evaluation.report import make_report, require_place, settle

    if out is not None:
        require_place(out)
    data = Dataset.open(dataset)
    subject = GivenLists(path, data) if path.is_file() else Recommender.load(path)
    recipe = merge(subject.manifest.get("recipe", {}), settings, ProtocolSettings, LeakSettings)
    recipe = recipe.but(ProtocolSettings, {"name": protocol}) if protocol else recipe
    with bar("events") as progress:
        chosen, checks = settle(subject, data, recipe, despite_leaks, progress)
    with bar("lists") as progress:
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
    show(report.manifest, json, report_table)
    if out is not None and not json:
        typer.echo(f"{out / 'report.html'}: {report.manifest['users']:,} users judged, {len(report.lists):,} rows of lists")
    if track and subject.manifest:
        try:
            with Tracking.of(subject.manifest).run(path.name) as tracking:
                tracking.report(report.manifest, out)
        except SetupError as error:
            warn(f"the report is not recorded: {error}")


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
    from recsys.command.terminal import comparison_tables
    from serving.evaluation.compare import compare as compare_reports
    from serving.evaluation.compare import reports_of, write

    names = (first.name, second.name) if first.name != second.name else (str(first), str(second))
    found = compare_reports(reports_of(first), reports_of(second), names).as_dict()
    if out is not None:
        write(found, out)
    show(found, json, comparison_tables)
