"""The verbs of the online API: the server, its keys, its histories."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from recsys.command.arguments import STORE, AsJson, DatasetPlace, Overrides
from recsys.command.recipes import merge
from recsys.command.terminal import show, warn_of_later


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
    from recsys.tracking import TrackingSettings
    from serving.admission import OnlineSettings
    from serving.app import serve as run_server

    chosen = merge({}, settings, OnlineSettings, TrackingSettings)
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


keys_app = typer.Typer(name="keys", help="Keys of the online API.", no_args_is_help=True)
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
    show({"keys": names}, json, "\n".join(names))


@keys_app.command("remove")
def remove_key(name: KeyName, keys: KeysFile) -> None:
    """Take a key out; a server that reads the file knows it no longer.

    Example: recsys keys remove shop --keys keys.json
    """
    from serving.keys import remove

    remove(keys, name)
    typer.echo(f"{keys}: {name} is out")


history_app = typer.Typer(
    name="history", help="Histories of the online API: the last events of each user.", no_args_is_help=True
)
StoreUrl = Annotated[
    str, typer.Option("--store", metavar="URL", help="sqlite:PATH, lmdb:PATH or redis://HOST:PORT/NUMBER, as served.")
]
UserId = Annotated[str, typer.Argument(metavar="USER", help="Id of the user.")]


@history_app.command("import")
def import_histories(
    dataset: DatasetPlace,
    store: StoreUrl = STORE,
    settings: Overrides = None,
) -> None:
    """Take a data set's histories into a store; twice the same adds nothing.

    Example: recsys history import datasets/ml-1m --store sqlite:histories.sqlite
    """
    from features.dataset import Dataset
    from recsys.command.terminal import bar
    from serving.admission import OnlineSettings
    from serving.history import import_dataset, open_store

    keep = merge({}, settings, OnlineSettings).read(OnlineSettings).keep
    data = Dataset.open(dataset)
    with closing(open_store(store, keep)) as kept, bar("users") as progress:
        counts = import_dataset(kept, data, partial(progress, "import"))
    typer.echo(f"{kept.url}: {counts['users']:,} users, {counts['new']:,} new events of {counts['events']:,}")
    warn_of_later(data.manifest["counts"])


@history_app.command("show")
def show_history(user: UserId, store: StoreUrl = STORE, json: AsJson = False) -> None:
    """Show a user's events, oldest first.

    Example: recsys history show u-1 --store sqlite:histories.sqlite
    """
    from recsys.command.terminal import records_table
    from serving.history import open_store

    with closing(open_store(store)) as kept:
        events = [{"item_id": event.item_id, "time": event.time} for event in kept.read(user)]
    title = f"user {user}: {len(events):,} events"
    show({"user_id": user, "events": events}, json, lambda _: records_table(events, title=title))


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
    from serving.history import open_store

    with closing(open_store(store)) as kept:
        found = {"history": kept.erase(user)}
    if lists:
        found["lists"] = erase_from(lists, user)
    typer.echo("; ".join(f"{what}: {'erased' if there else 'nothing was there'}" for what, there in found.items()))
