"""The command: verbs in the order of the way of one event. Heavy imports happen inside the verbs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from recsys.command import bundles, data, judging, learning, lists, online
from recsys.command.terminal import complain
from recsys.errors import GuardError, RecsysError
from recsys.version import __version__

app = typer.Typer(
    help="An attention recommender: from an event log to users' screens.\n\n"
    "After `recsys --install-completion`, Tab completes verbs, options and recipes in a new shell.",
    no_args_is_help=True,
    rich_markup_mode=None,  # the plain help starts in half the time
    pretty_exceptions_enable=False,
)


def demo(out: Annotated[Path, typer.Option(help="Where everything goes; made anew.")] = Path("demo")) -> None:
    """Everything on the built-in world: data, training, judging, a bundle, and a top-10 you can read.

    Example: recsys demo --out demo
    """
    from recsys.command.demo import run

    run(out)


def doctor() -> None:
    """Show versions and devices, and whether torch, fbgemm, torchrec and faiss fit together, with the fix if not.

    Example: recsys doctor
    """
    from recsys.doctor import diagnose, exit_code, render

    findings = diagnose()
    typer.echo(render(findings))
    raise typer.Exit(exit_code(findings))


VERBS: list[Callable[..., None]] = [
    *(demo, data.features, data.resplit, data.leaks, learning.train, learning.tune, judging.evaluate, learning.backtest),
    *(judging.compare, bundles.export, learning.reproduce, bundles.budget, lists.recommend, lists.explain, lists.nightly),
    *(lists.deliver, online.serve, doctor),
]
for verb in VERBS:
    app.command()(verb)
for group in (bundles.items_app, online.keys_app, online.history_app, bundles.bundles_app):
    app.add_typer(group)


@app.callback(invoke_without_command=True)
def _start(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command: the user's mistakes leave one line and exit code 2, a guard 3, our own a traceback and 1."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that spin for longer keep those they wait for from a core
    try:
        app(_one_by_one(sys.argv[1:]))
    except GuardError as error:
        complain(str(error))
        sys.exit(3)
    except RecsysError as error:
        sys.exit(complain(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


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


if __name__ == "__main__":
    main()
