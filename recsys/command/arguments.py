"""What several verbs are given: each argument and option once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recsys.command.recipes import RECIPES


def _complete(incomplete: str) -> list[str]:
    """The shipped recipes that begin so; the shell looks for files where there is none."""
    return sorted(path.stem for path in RECIPES.glob("*.toml") if path.stem.startswith(incomplete))


RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or path of a .toml file.", autocompletion=_complete),
]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory of a bundle.")]
RunOrBundle = Annotated[Path, typer.Argument(metavar="RUN_OR_BUNDLE", help="Directory of a run or of a bundle.")]
DatasetPath = Annotated[Path, typer.Option("--dataset", help="Directory that `recsys features` made.")]
DatasetPlace = Annotated[Path, typer.Argument(metavar="DATASET", help="Directory that `recsys features` made.")]
NewBundle = Annotated[
    Path | None, typer.Option("--out", help="Directory of the new bundle; without it the old one is replaced.")
]
Register = Annotated[
    bool, typer.Option(help="Register the new bundle in MLflow; it is champion where the old one is, or none is yet.")
]
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
Ray = Annotated[
    str,
    typer.Option(
        "--ray", metavar="ADDRESS", help="Compute on the Ray cluster of this node: auto or HOST:PORT; `local` starts one."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
STORE = "sqlite:histories.sqlite"
"""Where histories are kept unless said otherwise."""
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU where there is one.")]
