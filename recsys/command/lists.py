"""The verbs that make lists: for one history, and for every user."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from recsys.command.arguments import AsJson, History, Now, Overrides, Ray, RunOrBundle, Times, Where
from recsys.command.terminal import show, warn
from recsys.errors import RequestError


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
    from recsys.command.terminal import top_table
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
    show(answer, json, top_table)
    if not answer["items"]:
        warn("no item is left: none meets the conditions, is allowed, or is not in the history already")


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

    from recsys.command.terminal import explanation_table
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
    show(found.as_dict(), json, explanation_table)


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
    ray: Ray = "",
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
    from recsys.command.night import run

    given = {kind: place for kind, place in {"dataset": str(dataset or ""), "store": store, "events": events}.items() if place}
    if len(given) != 1:
        raise RequestError(f"{len(given)} places of histories are given; give one of --dataset, --store and --events")
    if ray and (workers or device != "cpu"):
        raise RequestError("--ray decides where lists are computed; leave out --workers and --device")
    if workers > 1 and device != "cpu":
        raise RequestError("a GPU is one process's; leave out --workers, or --device")
    terms = {
        **{"k": k, "now": now or 0, "filter_seen": not repeats, "reasons": reasons},
        **{"deny": tuple(deny or ()), "allow": tuple(allow) if allow else None},
    }
    night = run(
        bundle,
        out,
        next(iter(given.items())),
        terms,
        where or [],
        settings,
        full=full,
        force=force,
        to=to or [],
        workers=workers,
        ray=ray,
        device=device,
        track=track,
    )
    told = night.manifest
    clock = told["clock"]
    taken = told["users"] - clock["computed"] - clock["found"]
    kept = f", {taken:,} of them as they were" if taken else ""
    show(
        {key: value for key, value in told.items() if key not in ("files", "parts")},
        json,
        f"{night.path}: {told['users']:,} users{kept}, {told['rows']:,} rows, {told['underfilled']:,} lists not full, "
        f"{clock['users_per_second']:,.0f} users a second",
    )


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
    from recsys.command.terminal import bar
    from serving.delivery import deliver as load
    from serving.nights import Night

    night = Night.open(lists, verify=True)
    for url in to:
        with bar("users") as progress:
            counts = load(night, url, partial(progress, "deliver"))
        said = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        show({"night": night.id, **counts}, json, f"night {night.id}: {said}")
