"""The nightly job: a list for every user, exactly once; computed in shards, guarded, and live in one step."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, ClassVar

import msgspec
import numpy as np

from recsys.bundle import sha256, write_file
from recsys.config import Settings
from recsys.errors import DataError, GuardError, RecsysError, RequestError
from recsys.progress import Progress
from recsys.version import __version__
from serving.engine import Recommender
from serving.guards import GuardSettings, judge
from serving.intake import Source
from serving.nights import PLAN, REFUSED, Night, Nights
from serving.shards import HISTORIES, PLACES, Facts, Task, Terms, found
from serving.workers import Engine, Here

HEAD = 100
"""One in so many items, the most popular ones, are the head."""
LEAST = 8
"""Shards of the smallest night, so that several processes have work."""

UNHEARD = {
    "unnamed": "have no list: the store was written by an earlier version, which kept no ids; import their histories again",
    "unreadable": "have the most popular items, since their history is unreadable; erase it, or restore a copy",
}
"""What becomes of users of whom a store does not tell all, and what to do."""


@dataclass(frozen=True)
class NightlySettings(Settings):
    """How a night is made and kept."""

    section: ClassVar[str] = "nightly"

    users_per_shard: int = 4096
    """Users of a shard, at most about; fewer where lists are long. Another number makes a full night of the next one."""
    keep: int = 2
    """Nights that stay, the live one among them and the one before it, which readers may still be at."""
    resume_hours: float = 12.0
    """Age of an unfinished night from which on it is not finished but begun anew."""

    def __post_init__(self) -> None:
        self._at_least(1, "users_per_shard")
        self._at_least(2, "keep")
        self._at_least(0, "resume_hours")

    def shards(self, users: int, k: int) -> int:
        """A power of two."""
        size = min(self.users_per_shard, max(256, PLACES // k))
        return max(LEAST, 1 << math.ceil(math.log2(max(1.0, users / size))))


@dataclass(frozen=True)
class Plan:
    """What a night is to be; a killed one goes on by the plan that it left."""

    bundle: str
    source: dict[str, Any]
    shards: int
    terms: Terms
    events: dict[str, int]
    """Counts of what was read."""
    last: str | None
    """Name of the night of which unchanged lists are taken; None: all are made."""
    why: str
    """Why none are taken; empty where some are."""
    created: str
    by: str
    """What computes: the version, and the kind of device, of which another makes lists that are equal up to rounding."""

    def wants(self) -> dict[str, Any]:
        """All by which two plans are for the same night."""
        said = {name: getattr(self, name) for name in ("bundle", "source", "shards", "terms", "by")}
        return msgspec.json.decode(msgspec.json.encode(said), type=dict[str, Any])  # as it was read


def nightly(
    recommender: Recommender,
    source: Source,
    nights: Nights,
    terms: Terms,
    *,
    settings: NightlySettings | None = None,
    guards: GuardSettings | None = None,
    engine: Engine | None = None,
    full: bool = False,
    force: bool = False,
    progress: Progress = lambda what, done, of: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Night:
    """Make a list for every user of a source, and the night of them live.

    A night that was killed goes on where it was; lists of users of whom nothing changed since the last night are taken from
    it, unless `full`. `terms.now` of 0 is the clock's; a later event is left out where it was given, or where the model reads
    it. `engine` computes (default: this process). `progress` hears of users, `tell` a line for what one should know.
    Raises RequestError: k below 1, an unknown item or condition. DataError: the source has no user, or cannot be read.
    GuardError: a guard does not hold; the last night stays live, and what was made waits: with `force` it goes live.
    RecsysError: nothing can be written, or another process makes a night here.
    """
    settings, guards = settings or NightlySettings(), guards or GuardSettings()
    _check(recommender, terms)
    with nights.making(), _writing(nights):
        finished = nights.finish(settings.keep)
        if finished is not None:
            tell(f"the night of {finished.manifest['clock']['created']} was whole and is live now")
        started = time.perf_counter()
        live = nights.live()
        last = live and _whole(live, tell)
        plan = _plan(recommender, source, nights, last, terms, settings, full, force, progress, tell)
        night = _Making(recommender, nights, plan, engine or Here(recommender), progress)
        facts = night.computed()
        manifest = night.manifest(facts, time.perf_counter() - started)
        judged = judge(guards, manifest, nights.work, live, compare=last is not None)
        manifest["guards"] = [guard.as_dict() for guard in judged]
        broken = [guard for guard in judged if not guard.holds]
        if broken and not force:
            said = "; ".join(map(str, broken))
            write_file(nights.work / REFUSED, (json.dumps(manifest, indent=1) + "\n").encode())
            stays = "the last night's lists stay live" if live else "nothing is live"
            raise GuardError(
                f"{nights.path}: {said}: {stays}; find out why, or run it again with --force, which computes nothing anew"
            )
        files = {name: entry for fact in facts for name, entry in fact.files.items()}
        return nights.publish(files, manifest, settings.keep)


@contextmanager
def _writing(nights: Nights) -> Iterator[None]:
    """Raises RecsysError: what the system says of files."""
    try:
        yield
    except OSError as error:
        where = error.filename or nights.path
        raise RecsysError(
            f"{where}: {error.strerror or error}; see that the folder may be written and has room, and start again"
        ) from None


def _check(recommender: Recommender, terms: Terms) -> None:
    """Raises RequestError: terms that cannot be."""
    if terms.k < 1:
        raise RequestError(f"k is {terms.k}; ask for at least 1 item")
    catalogue = recommender.catalogue
    for listed in (terms.deny, terms.allow or ()):
        catalogue.rows(listed, catalogue.by_id)
    if terms.where:
        catalogue.attributes.meeting(terms.where)


def _plan(
    recommender: Recommender,
    source: Source,
    nights: Nights,
    last: Night | None,
    terms: Terms,
    settings: NightlySettings,
    full: bool,
    force: bool,
    progress: Progress,
    tell: Callable[[str], None],
) -> Plan:
    """The plan of an unfinished night that is this one, or a new one, with all histories dealt."""
    now = terms.now or int(time.time())
    asked = replace(terms, now=now, until=bool(terms.now) or recommender.reads_now)
    shards = settings.shards(source.users, terms.k)
    by = f"{__version__} on {recommender.scan.vectors_VE.device.type}"
    plan = Plan(recommender.id, source.identity, shards, asked, {}, None, "", datetime.now(UTC).isoformat(), by)
    left = _left(nights)
    if left is not None:
        refused = (nights.work / REFUSED).exists() and not force
        same = left.wants() == replace(plan, terms=replace(asked, now=terms.now or left.terms.now)).wants()
        hours = (datetime.now(UTC) - datetime.fromisoformat(left.created)).total_seconds() / 3600
        usable = [None] if full or last is None else [None, last.path.name]
        reasons = {
            "was refused by its guards": refused,
            "is another": not same,
            f"is {hours:.1f} hours old": hours >= settings.resume_hours,
            "took other lists": left.last not in usable,
        }
        why = next((reason for reason, is_so in reasons.items() if is_so), "")
        if not why:
            tell(f"goes on with the night of {left.created}")
            return left
        tell(f"the unfinished night of {left.created} {why}; begun anew")
    if nights.work.exists():
        shutil.rmtree(nights.work)
    nights.work.mkdir()
    taken, why = _taken(recommender, last, plan, full)
    events = source.deal(
        nights.work / HISTORIES, shards, now if asked.until else None, lambda done, of: progress("read", done, of)
    )
    for reason, remedy in UNHEARD.items():
        if events.get(reason):
            tell(f"{events[reason]:,} users {remedy}")
    plan = replace(plan, events=events, last=taken, why=why)
    write_file(nights.work / PLAN, (json.dumps(asdict(plan), indent=1) + "\n").encode())
    return plan


def _left(nights: Nights) -> Plan | None:
    try:
        return msgspec.json.decode((nights.work / PLAN).read_bytes(), type=Plan)
    except (OSError, msgspec.MsgspecError):
        return None


def _taken(recommender: Recommender, last: Night | None, plan: Plan, full: bool) -> tuple[str | None, str]:
    """The name of the last night, if lists may be taken from it, or why they may not."""
    if full:
        return None, "asked for"
    if last is None:
        return None, "there is no whole night before"
    said, wanted, had = last.manifest, plan.wants()["terms"], dict(last.manifest["terms"])
    then, now = (terms.pop("now") for terms in (had, wanted))
    changed = {
        "the bundle is another": said["bundle"] != plan.bundle,
        "the terms are others": wanted != had,
        "the model reads when it is asked": recommender.reads_now and then != now,
        "the number of shards is another": said["shards"] != plan.shards,
        "the version or the device is another": said["by"] != plan.by,
    }
    why = next((reason for reason, is_so in changed.items() if is_so), "")
    return (None, why) if why else (last.path.name, "")


def _whole(night: Night, tell: Callable[[str], None]) -> Night | None:
    """A night, if its files are as they were written; else a line is told."""
    try:
        return Night.open(night.path, verify=True)
    except DataError as error:
        try:
            now = Night.open(night.path)
        except DataError:
            now = night
        if now.id != night.id:  # somebody was erased meanwhile
            return _whole(now, tell)
        tell(f"the last night's lists are not compared with, and none is taken: {error}")
        return None


class _Making:
    """A planned night on its way."""

    def __init__(self, recommender: Recommender, nights: Nights, plan: Plan, engine: Engine, progress: Progress) -> None:
        self.recommender, self.nights, self.plan, self.engine, self.progress = recommender, nights, plan, engine, progress
        self.lists_V = np.zeros(len(recommender.catalogue), np.int64)

    def computed(self) -> list[Facts]:
        """The facts of every shard; those that are not there yet are computed."""
        last = None if self.plan.last is None else self.nights.night(self.plan.last)
        digest = sha256(self.nights.work / PLAN)
        tasks = [
            Task(self.nights.work, shard, self.plan.bundle, self.plan.terms, digest, last) for shard in range(self.plan.shards)
        ]
        facts: dict[int, Facts] = {}
        for task in tasks:
            if (fact := found(self.recommender.catalogue, task)) is not None:
                facts[task.shard] = self._counted(fact)
        done, waiting = sum(fact.users for fact in facts.values()), [task for task in tasks if task.shard not in facts]
        for fact in self.engine.run(waiting):
            facts[fact.shard] = self._counted(fact)
            done += fact.users
            about = done * len(tasks) // len(facts)
            self.progress("nightly", done, about)
        return [facts[shard] for shard in range(self.plan.shards)]

    def _counted(self, fact: Facts) -> Facts:
        """Add to the items' counts those of a shard, which need not be kept for each."""
        self.lists_V += fact.counts_V
        return replace(fact, counts_V=fact.counts_V[:0])

    def manifest(self, facts: list[Facts], seconds: float) -> dict[str, Any]:
        """What there is to say of the night."""
        plan, made = self.plan, [fact.made for fact in facts if fact.made is not None]
        total = {
            name: sum(getattr(fact, name) for fact in facts) for name in ("users", "rows", "listed", "underfilled", "popular")
        }
        if not total["users"]:
            shutil.rmtree(self.nights.work)  # so that histories are read anew when there are some
            raise DataError(f"{plan.source.get('path') or plan.source.get('url')}: has no user; give histories")
        return {
            "by": plan.by,
            "bundle": plan.bundle,
            "terms": plan.wants()["terms"],
            "source": plan.source,
            "events": plan.events.get("events", 0),
            "left_out": _left_out(plan.events, facts),
            "shards": plan.shards,
            **total,
            **_shares(self.recommender, self.lists_V),
            "best": _best([fact.best for fact in facts]),
            "parts": [
                {"users": fact.users, "rows": fact.rows, "underfilled": fact.underfilled, "popular": fact.popular}
                for fact in facts
            ],
            "clock": {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "begun": plan.created,
                "seconds": round(seconds, 3),
                "users_per_second": round(total["users"] / seconds, 1),
                "engine": self.engine.name,
                "resumed": len(facts) - len(made),
                "computed": sum(made),
                "found": sum(fact.users for fact in facts if fact.made is None),
                "taken_from": plan.last,
                "full_because": plan.why,
            },
        }


def _left_out(dealt: dict[str, int], facts: list[Facts]) -> dict[str, int]:
    """Events that no list was made of, by reason."""
    counts = Counter({reason: count for reason, count in dealt.items() if reason != "events"})
    for fact in facts:
        counts.update(fact.left_out)
    return dict(sorted(counts.items()))


def _shares(recommender: Recommender, lists_V: np.ndarray[Any, Any]) -> dict[str, float]:
    """Of the items, those that stand in a list; of the places, those that the head takes."""
    head = int(lists_V[: math.ceil(recommender.lines / HEAD)].sum())  # items stand in the order of their events
    return {"coverage": int((lists_V > 0).sum()) / max(recommender.items, 1), "head": head / max(int(lists_V.sum()), 1)}


def _best(sums: list[tuple[int, float, float]]) -> dict[str, float]:
    """Mean and deviation of the scores in first place."""
    lists, total, squares = (sum(column) for column in zip(*sums, strict=True))
    mean = total / max(lists, 1)
    return {"lists": lists, "mean": mean, "deviation": max(0.0, squares / max(lists, 1) - mean**2) ** 0.5}
