"""What the online API does for each request, without HTTP: whose list, of which bundle, by which rung, and what is kept."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from features.dataset import ATTRIBUTE
from features.files import read_items
from features.schema import DataSettings
from recsys import __version__
from recsys.batch import FIRST_ITEM, PADDING, Batch
from recsys.bundle import open_directory
from recsys.errors import BundleError, DataError, RequestError, SetupError, StoreError
from serving import explain, fallback, messages
from serving.admission import Breaker, Clock, Cost, Desk, OnlineSettings
from serving.catalogue import Find
from serving.engine import Recommender
from serving.fallback import NightlyLists
from serving.filters import allowed_lines
from serving.history import Event, HistoryStore
from serving.live import Arm, Arms
from serving.messages import Happened, Refusal, decode
from serving.telemetry import LOG, Call, Metrics, about

T = TypeVar("T")
EXPLAINED = 20
"""Most items that are explained at once; each costs a list."""
RANKED = 500
"""Items up to which putting them in order is done between other requests."""
VALUES = 200
"""Most values that are named of one attribute."""
REST = 1.0
"""Seconds that a store is left alone after it did not answer."""
REMOTE = ("redis", "rediss", "valkey", "valkeys")
"""Kinds of stores that answer over a network, and are asked in a thread."""

Asked = messages.Recommend | messages.Rank
_DECODERS = {
    kind: msgspec.json.Decoder(kind)
    for kind in (
        messages.Recommend,
        messages.Batch,
        messages.Similar,
        messages.Rank,
        messages.Events,
        messages.NewItems,
    )
}
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Past:
    """A history as the recommender takes it."""

    words: Sequence[int | str]
    times: Sequence[int] | None
    find: Find
    kept: bool
    """Whether it is a store's, which may hold items that this bundle does not know."""


class View:
    """What requests need of a loaded bundle beside the recommender, made once."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommender = recommender
        ranked = recommender.ranker is not None and recommender.ranker_blocks > 0
        self.rungs: list[tuple[str, Recommender]] = [("ranked", recommender)] if ranked else []
        self.rungs.append(("retrieved", recommender.with_ranker(0) if ranked else recommender))
        self._titles: tuple[str, np.ndarray[Any, Any]] | None = None
        self._filters: dict[str, Any] | None = None

    def search(self, part: str, limit: int) -> list[dict[str, Any]]:
        """The most popular items that can be recommended and whose titles hold `part`, in any case."""
        catalogue = self.recommender.catalogue
        if self._titles is None:
            lines = [" ".join(title.casefold().split("\n")) for title in catalogue.titles]
            starts = np.cumsum([0, *(len(line) + 1 for line in lines)])
            self._titles = "\n".join([*lines, ""]), starts
        text, starts = self._titles
        wanted, at = " ".join(part.casefold().split("\n")), 0
        found: list[dict[str, Any]] = []
        while len(found) < limit and (at := text.find(wanted, at)) >= 0 and at < len(text):
            line = int(np.searchsorted(starts, at, side="right")) - 1
            if not catalogue.removed[line]:
                found.append({"item_id": catalogue.item_ids[line], "title": catalogue.titles[line]})
            at = int(starts[line + 1])
        return found

    def filters(self) -> dict[str, Any]:
        """What each attribute holds."""
        if self._filters is None:
            columns = self.recommender.catalogue.attributes.columns
            self._filters = {name: _filter(column) for name, column in columns.items()}
        return self._filters


def _filter(column: Any) -> dict[str, Any]:
    kind = str(column.dtype)
    if kind == "Boolean":
        return {"kind": "boolean"}
    if kind == "Float64":
        return {"kind": "number", "min": column.min(), "max": column.max()}
    if kind == "Null":
        return {"kind": "nothing"}
    values = (column.explode() if kind.startswith("List") else column).drop_nulls()
    counted = values.alias("value").value_counts(sort=False, name="count").sort(["count", "value"], descending=[True, False])
    return {"kind": "text", "values": counted["value"].head(VALUES).to_list()}


class Service:
    """The arms, the store and the lists behind one queue; its coroutines take a message's body, or words, and give JSON."""

    def __init__(
        self,
        arms: Arms,
        store: HistoryStore,
        settings: OnlineSettings,
        *,
        lists: NightlyLists | None = None,
        addresses: Mapping[str, str] | None = None,
        metrics: Metrics | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.arms, self.store, self.settings, self.lists = arms, store, settings, lists
        self.addresses = addresses or {}
        self.metrics, self.clock = metrics or Metrics(), clock
        self.desk = Desk(settings.queue)
        self.breaker = Breaker(REST, clock)
        self.leaving = False
        self._remote = store.url.partition(":")[0] in REMOTE
        self._views: dict[str, View] = {}
        self._costs: dict[tuple[str, str, str], Cost] = {}
        self._answered = self._busy = self._writing = 0
        self._pool: ThreadPoolExecutor | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.metrics.watch_queue(lambda: len(self.desk))
        for arm in arms.all:
            self.metrics.loaded(arm.name, arm.recommender.id)

    async def start(self) -> None:
        """Take requests, and watch the lists and the store; after a stop also again."""
        self._pool, self._thread = ThreadPoolExecutor(2, "store"), ThreadPoolExecutor(1, "heavy")
        self._tasks = [asyncio.create_task(self.desk.run()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Take no more."""
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        for pool in (self._pool, self._thread):
            if pool is not None:
                pool.shutdown()

    async def _watch(self) -> None:
        """From time to time read the lists anew, if they are others, and ask the store whether it is there."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.settings.watch_seconds)
            try:
                if self.lists is not None:
                    await loop.run_in_executor(self._pool, self.lists.refresh)
            except DataError as error:
                LOG.warning("lists", extra=about(detail=str(error)))
            with suppress(Refusal):
                await self._stored(self.store.check)

    def swapped(self, arm_name: str) -> None:
        """An arm serves another bundle: let go of what was made of the old one."""
        self._views.pop(arm_name, None)
        self.metrics.loaded(arm_name, self.arms.named(arm_name).recommender.id)

    # The routes that are computed in the loop

    async def recommend(self, body: bytes, call: Call) -> bytes:
        """A list for a user or a history."""
        question: messages.Recommend = self._parse(messages.Recommend, body, call)
        arm, deadline = self._begin(question, call)
        if question.explain:
            past = await self._past_in_thread(question, call)
            return await self._heavily(partial(self._explained, question, arm, past))
        past = await self._past_in_thread(question, call) if self._remote else None
        return await self._at_desk(partial(self._recommended, question, arm, deadline, call, past), call)

    async def rank(self, body: bytes, call: Call) -> bytes:
        """Given items in order."""
        question: messages.Rank = self._parse(messages.Rank, body, call)
        arm, deadline = self._begin(question, call)
        past = await self._past_in_thread(question, call) if self._remote else None
        work = partial(self._ranked, question, arm, deadline, call, past)
        return await (self._at_desk(work, call) if len(question.items) <= RANKED else self._heavily(work))

    async def similar(self, body: bytes, call: Call) -> bytes:
        """Items like an item."""
        question: messages.Similar = self._parse(messages.Similar, body, call)
        arm = self._arm(question.arm, None, call)
        return await self._at_desk(partial(self._alike, question, arm, self._deadline(question.deadline_ms, call), call), call)

    async def events(self, body: bytes, call: Call) -> bytes:
        """Keep events."""
        told: messages.Events = self._parse(messages.Events, body, call)
        by_id, now = self.arms.champion.recommender.catalogue.by_id, int(time.time())
        known = sum(by_id(each.item_id) is not None for each in told.events)
        by_user: dict[str, list[Happened]] = {}
        for each in told.events:
            by_user.setdefault(str(each.user_id), []).append(each)
        if self._writing >= self.settings.queue:
            raise Refusal(503, "too many events are waiting to be kept; send them again", retry_after=1)
        self._writing += 1
        try:
            added = await self._stored(partial(self._append, by_user, now))
        finally:
            self._writing -= 1
        self.metrics.events.inc(added)
        return _encode({"added": added, "known": known, "unknown": len(told.events) - known})

    # The routes that a thread of their own serves

    async def batch(self, body: bytes, call: Call) -> bytes:
        """A list for each of many users."""
        question: messages.Batch = self._parse(messages.Batch, body, call)
        if question.arm is not None:
            self.arms.named(question.arm)
        return await self._heavily(partial(self._batched, question))

    async def add_items(self, body: bytes, call: Call) -> bytes:
        """Items that were not there."""
        return await self._change("add", self._parse(messages.NewItems, body, call).items)

    async def update_items(self, body: bytes, call: Call) -> bytes:
        """Items described anew."""
        return await self._change("update", self._parse(messages.NewItems, body, call).items)

    async def remove_item(self, item_id: str) -> bytes:
        """An item out of all lists."""
        if self.arms.champion.recommender.catalogue.by_id(item_id) is None:
            raise Refusal(404, "no such item; give the id of an item")
        return await self._change("remove", [item_id])

    async def erase(self, user_id: str) -> bytes:
        """All that is kept of a user."""

        def erased() -> bytes:
            history = self._asked_of_store(partial(self.store.erase, user_id))
            listed = self.lists is not None and self.lists.erase(user_id)
            self.arms.requests.forget()
            for arm in self.arms.all:
                if arm.recommender.reader is not None:
                    arm.recommender.reader.kept.clear()  # what was encoded, found by the events that were read
            return _encode({"user_id": user_id, "history": history, "lists": listed})

        return await self._heavily(erased)

    # What is only looked up

    async def user(self, user_id: str) -> bytes:
        """The events of a user."""
        arm = self.arms.of(user_id)
        catalogue = arm.recommender.catalogue
        found = await self._stored(partial(self.store.read, user_id))
        rows = [(event, catalogue.by_id(event.item_id)) for event in found]
        events = [
            {"item_id": event.item_id, "title": None if row is None else catalogue.title(row), "time": event.time}
            for event, row in rows
        ]
        return _encode({"user_id": user_id, "arm": arm.name, "events": events})

    async def find_items(self, part: str, limit: int) -> bytes:
        """Items by a part of their title."""
        return _encode({"items": self._view(self.arms.champion).search(part, limit)})

    async def item(self, item_id: str) -> bytes:
        """One item."""
        recommender = self.arms.champion.recommender
        row = recommender.catalogue.by_id(item_id)
        if row is None:
            raise Refusal(404, "no such item; give the id of an item")
        line, catalogue, live_V = row - FIRST_ITEM, recommender.catalogue, recommender.live_V
        told = catalogue.table.row(line, named=True)
        return _encode(
            {
                "item_id": told["item_id"],
                "title": catalogue.title(row),
                "events": told["events"],
                "recommended": line < recommender.lines and (live_V is None or bool(live_V[line])),
                "text": told["text"] or "",
                "categories": told["categories"] or [],
                "attributes": {
                    name.removeprefix(ATTRIBUTE): value for name, value in told.items() if name.startswith(ATTRIBUTE)
                },
            }
        )

    async def filters(self) -> bytes:
        """What requests may filter by."""
        return _encode({"filters": self._view(self.arms.champion).filters()})

    async def bundle(self) -> bytes:
        """The loaded bundles."""
        return _encode({"arms": [self._served(arm) for arm in self.arms.all], "share": self.arms.share})

    def ready(self) -> tuple[int, bytes]:
        """Whether to send requests here: a status and why."""
        recommender = self.arms.champion.recommender
        told = {
            "status": "leaving" if self.leaving else "ready",
            "bundle": recommender.id,
            "items": recommender.items,
            "version": __version__,
            "store": "ok" if self.breaker.whole else "unreachable",
        }
        return 503 if self.leaving else 200, _encode(told)

    def _served(self, arm: Arm) -> dict[str, Any]:
        recommender = arm.recommender
        return {
            "name": arm.name,
            "bundle": recommender.id,
            "since": arm.since,
            "source": self.addresses.get(arm.name, str(recommender.path)),
            "quality": recommender.manifest.get("quality", {}),
            "index": recommender.manifest.get("index", {}),
            "ranker": self._view(arm).rungs[0][0] == "ranked",
            "problem": arm.problem,
            "items": recommender.items,
        }

    # Before the turn

    def _parse(self, kind: type[Any], body: bytes, call: Call) -> Any:
        message = decode(_DECODERS[kind], body)
        call.stages["parse"] = self.clock() - call.read
        return message

    def _begin(self, question: Asked, call: Call) -> tuple[Arm, float]:
        given = [name for name in ("user_id", "history", "titles") if getattr(question, name) not in (None, [])]
        if len(given) > 1:
            raise RequestError(f"both {given[0]} and {given[1]} are given; give one of them")
        if question.user_id is not None and question.times is not None:
            raise RequestError("times are given with user_id, whose events have their own; leave them out")
        user = None if question.user_id is None else str(question.user_id)
        return self._arm(question.arm, user, call), self._deadline(question.deadline_ms, call)

    def _arm(self, name: str | None, user_id: str | None, call: Call) -> Arm:
        arm = self.arms.of(user_id) if name is None else self.arms.named(name)
        call.arm = arm.name
        return arm

    def _deadline(self, deadline_ms: int | None, call: Call) -> float:
        return call.read + (deadline_ms or self.settings.deadline_ms) / 1000

    def _view(self, arm: Arm) -> View:
        view, recommender = self._views.get(arm.name), arm.recommender
        if view is None or view.recommender is not recommender:
            view = self._views[arm.name] = View(recommender)
        return view

    def _at_desk(self, work: Callable[[], T], call: Call) -> Awaitable[T]:
        queued = self.clock()

        def turn() -> T:
            call.stages["wait"] = self.clock() - queued
            return work()

        return self.desk.take(turn)

    async def _heavily(self, work: Callable[[], T]) -> T:
        if self._busy >= self.settings.heavy:
            raise Refusal(503, f"{self._busy} long requests are waiting already; ask again", retry_after=1)
        self._busy += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._busy -= 1

    # The store

    def _past(self, question: Asked, call: Call) -> Past | None:
        """The history of a question; None: it is a user's, and the store does not tell."""
        catalogue = self.arms.named(call.arm).recommender.catalogue
        if question.user_id is None:
            find = catalogue.by_title if question.titles else catalogue.by_id
            return Past(question.titles or question.history, question.times, find, False)
        if not self.breaker.ask():
            return None
        started = self.clock()
        try:
            found = self.store.read(str(question.user_id))
        except StoreError:
            self._failed()
            return None
        finally:
            call.stages["store"] = self.clock() - started
        self.breaker.mend()
        return Past([event.item_id for event in found], [event.time for event in found], catalogue.by_id, True)

    async def _past_in_thread(self, question: Asked, call: Call) -> Past | None:
        """As _past, without keeping the loop; who does not answer in half of the time is left alone."""
        if question.user_id is None:
            return self._past(question, call)
        asked = asyncio.get_running_loop().run_in_executor(self._pool, self._past, question, call)
        try:
            return await asyncio.wait_for(asked, (question.deadline_ms or self.settings.deadline_ms) / 2000)
        except TimeoutError:
            self._failed()
            return None

    def _failed(self) -> None:
        if self.breaker.whole:
            LOG.warning("store", extra=about(detail="the store does not answer"))
        self.breaker.fail()
        self.metrics.store_errors.inc()

    def _asked_of_store(self, ask: Callable[[], T]) -> T:
        if not self.breaker.ask():
            raise Refusal(503, "the store does not answer; ask again", retry_after=1)
        try:
            answer = ask()
        except StoreError:
            self._failed()
            raise Refusal(503, "the store does not answer; ask again", retry_after=1) from None
        self.breaker.mend()
        return answer

    async def _stored(self, ask: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._asked_of_store, ask)

    def _append(self, by_user: Mapping[str, Sequence[Happened]], now: int) -> int:
        return self.store.load(
            (user_id, [Event(each.item_id, now if each.time is None else each.time, each.event_id) for each in happened])
            for user_id, happened in by_user.items()
        )

    # The turn

    def _recommended(self, question: messages.Recommend, arm: Arm, deadline: float, call: Call, past: Past | None) -> bytes:
        self._on_time(deadline)
        view = self._view(arm)
        past = past if self._remote else self._past(question, call)

        def rung(recommender: Recommender, took: dict[str, float]) -> dict[str, Any]:
            assert past is not None
            if past.kept and not question.ignore_unknown:
                _rows(recommender, question.deny, question.allow)
            return recommender.answer(
                past.words,
                question.k,
                times=past.times,
                now=question.now,
                filter_seen=question.filter_seen,
                deny=question.deny,
                allow=question.allow,
                where=question.where,
                diversity=question.diversity,
                popularity=question.popularity,
                probabilities=question.probabilities,
                ignore_unknown=question.ignore_unknown or past.kept,
                find=past.find,
                took=took,
            )

        name, answer, why = "", None, "store"
        if past is not None:
            name, answer, why = self._climb("recommend", arm, view, deadline, call, rung)
        if answer is None:
            answer = self._lower(view, question, past)
        else:
            answer["source"] = "popularity" if answer["source"] == "popularity" else name
        if past is not None:
            self._record(past, question.k)
        if len(answer["items"]) < question.k:
            self.metrics.underfilled.inc()
        return self._told(answer, arm, call, why)

    def _on_time(self, deadline: float) -> None:
        if self.clock() >= deadline:
            raise Refusal(503, "the deadline passed before the turn came; ask again later", retry_after=1)

    def _climb(
        self,
        what: str,
        arm: Arm,
        view: View,
        deadline: float,
        call: Call,
        work: Callable[[Recommender, dict[str, float]], dict[str, Any]],
    ) -> tuple[str, dict[str, Any] | None, str]:
        """The best rung that the time is enough for: its name, its answer or None, and why it is not the first."""
        why = ""
        for name, recommender in view.rungs:
            cost = self._costs.setdefault((arm.name, what, name), Cost())
            started = self.clock()
            if deadline - started < cost.seconds:
                waited = call.stages.get("wait", 0.0)
                why = why or ("overload" if deadline - started + waited >= cost.seconds else "deadline")
                if cost.seconds > self.settings.deadline_ms / 1000:  # else who waits less will try it
                    cost.skip()
                continue
            took: dict[str, float] = {}
            try:
                answer = work(recommender, took)
            except (RequestError, Refusal):
                raise
            except Exception:
                LOG.exception("rung", extra=about(request_id=call.id, route=call.route, arm=arm.name, source=name))
                why = why or "error"
                continue
            cost.add(self.clock() - started)
            call.stages |= took
            return name, answer, why
        return "", None, why

    def _lower(self, view: View, question: messages.Recommend, past: Past | None) -> dict[str, Any]:
        """Last night's list, or the most popular items, with the same filters."""
        recommender, catalogue = view.recommender, view.recommender.catalogue
        unknown: list[int | str] = []
        ignored: list[int | str] | None = unknown if question.ignore_unknown else None
        seen: set[int] = set()
        if past is not None:
            rows = catalogue.rows(past.words, past.find, unknown if past.kept else ignored)
            recommender.request(rows, past.times, question.now)
            seen = {row for row in rows if row is not None} if question.filter_seen else seen
        deny, allow = _rows(recommender, question.deny, question.allow, ignored)
        meeting_V = catalogue.attributes.meeting(question.where) if question.where else None
        meeting_V = None if meeting_V is None else meeting_V[: recommender.lines]
        allowed_V = allowed_lines(recommender.lines, deny, allow, recommender.live_V, meeting_V)
        found: list[tuple[int, float]] = []
        source = "nightly"
        if self.lists is not None and question.user_id is not None:
            listed = self.lists.of(str(question.user_id))
            found = fallback.nightly(recommender, listed, question.k, allowed_V, seen)
        if not found:
            found, source = fallback.popular(recommender, question.k, allowed_V, seen), "popularity"
        return {"bundle": recommender.id, "source": source, "unknown": unknown, "items": _places(recommender, found)}

    def _told(self, answer: dict[str, Any], arm: Arm, call: Call, why: str) -> bytes:
        call.bundle, call.source, call.fallback = answer["bundle"], answer["source"], why
        started = self.clock()
        told = _encode({"bundle": answer["bundle"], "arm": arm.name, "fallback": why or None, **answer})
        call.stages["write"] = self.clock() - started
        return told

    def _record(self, past: Past, k: int) -> None:
        self._answered += 1
        if self.settings.record_every and self._answered % self.settings.record_every == 0:
            self.arms.requests.record(past.words, past.times, k)

    def _ranked(self, question: messages.Rank, arm: Arm, deadline: float, call: Call, past: Past | None) -> bytes:
        self._on_time(deadline)
        past = past if self._remote else self._past(question, call)
        if past is None:
            raise Refusal(503, "the store does not answer; ask again", retry_after=1)

        def rung(recommender: Recommender, took: dict[str, float]) -> dict[str, Any]:
            unknown: list[int | str] = []
            catalogue, ignored = recommender.catalogue, unknown if question.ignore_unknown else None
            words = catalogue.rows(past.words, past.find, unknown if past.kept else ignored)
            items = catalogue.rows(question.items, catalogue.by_id, ignored)
            batch, now = recommender.request(words, past.times, question.now)
            wanted = list(dict.fromkeys(row for row in items if row is not None))
            found: list[tuple[int, float]] = []
            source = "ranked"
            if wanted:
                lists = recommender.recommend(batch, len(wanted), now, False, (), wanted, diversity=0.0, popularity=0.0)
                found, source = list(zip(lists.rows[0].tolist(), lists.scores[0].tolist(), strict=True)), lists.sources[0]
            return {"bundle": recommender.id, "source": source, "unknown": unknown, "items": _places(recommender, found)}

        name, answer, why = self._climb("rank", arm, self._view(arm), deadline, call, rung)
        if answer is None:
            raise Refusal(503, "there is too little time to put the items in order; ask again", retry_after=1)
        answer["source"] = "popularity" if answer["source"] == "popularity" else name
        return self._told(answer, arm, call, why)

    def _alike(self, question: messages.Similar, arm: Arm, deadline: float, call: Call) -> bytes:
        self._on_time(deadline)
        recommender = arm.recommender
        row = _rows(recommender, [question.item_id], None)[0][0]
        deny, allow = _rows(recommender, question.deny, question.allow)
        found = recommender.similar(row, question.k, deny, allow, question.where or None)
        call.bundle = recommender.id
        item = {"item_id": recommender.catalogue.item_id(row), "title": recommender.catalogue.title(row)}
        told = {"bundle": recommender.id, "arm": arm.name, **item, "items": _places(recommender, found)}
        return _encode(told)

    # In the thread

    def _explained(self, question: messages.Recommend, arm: Arm, past: Past | None) -> bytes:
        if question.k > EXPLAINED:
            raise RequestError(f"k is {question.k} with explain; ask for at most {EXPLAINED} explained items")
        if past is None:
            raise Refusal(503, "the store does not answer; ask again", retry_after=1)
        recommender = arm.recommender
        if past.kept and not question.ignore_unknown:
            _rows(recommender, question.deny, question.allow)
        ignored = question.ignore_unknown or past.kept
        catalogue = recommender.catalogue
        unknown: list[int | str] = []
        rows = catalogue.rows(past.words, past.find, unknown if ignored else None)
        batch, now = recommender.request(rows, past.times, question.now)
        answer = recommender.answer(
            past.words,
            question.k,
            times=past.times,
            now=question.now if past.times is None or not recommender.reads_now else now,
            filter_seen=question.filter_seen,
            deny=question.deny,
            allow=question.allow,
            where=question.where,
            diversity=question.diversity,
            popularity=question.popularity,
            probabilities=question.probabilities,
            ignore_unknown=ignored,
            find=past.find,
        )
        popular = answer["source"] == "popularity"
        listed = [catalogue.by_id(item["item_id"]) for item in answer["items"]]
        chosen = [] if popular else [row for row in listed if row is not None]
        told = explain.reasons(recommender, batch, chosen, now) if chosen else [[] for _ in listed]
        for item, carried in zip(answer["items"], told, strict=True):
            item["reasons"] = carried
        answer["attention"] = [] if popular else explain.attention(recommender, batch, now)
        answer["source"] = "popularity" if popular else self._view(arm).rungs[0][0]
        return _encode({"arm": arm.name, "fallback": None, **answer})

    def _batched(self, question: messages.Batch) -> bytes:
        users = [str(user) for user in question.users]
        found = self._asked_of_store(lambda: [self.store.read(user) for user in users])
        answers: list[dict[str, Any]] = [{} for _ in users]
        for arm in self.arms.all:
            mine = [place for place, user in enumerate(users) if (question.arm or self.arms.of(user).name) == arm.name]
            if mine:
                told = self._lists(question, arm, [found[place] for place in mine])
                for place, answer in zip(mine, told, strict=True):
                    answers[place] = answer
        return _encode({"answers": answers})

    def _lists(self, question: messages.Batch, arm: Arm, found: Sequence[Sequence[Event]]) -> list[dict[str, Any]]:
        recommender, first = arm.recommender, self._view(arm).rungs[0][0]
        catalogue = recommender.catalogue
        deny, allow = _rows(recommender, question.deny, question.allow)
        unknown: list[list[int | str]] = [[] for _ in found]
        rows, times = [], []
        for events, missing in zip(found, unknown, strict=True):
            known = catalogue.rows([event.item_id for event in events], catalogue.by_id, missing)
            pairs = [(row, event.time) for row, event in zip(known, events, strict=True) if row is not None]
            rows.append([row for row, _ in pairs])
            times.append([second for _, second in pairs])
        now = int(time.time()) if recommender.reads_now else None
        lists = recommender.recommend(
            Batch.of(rows, times),
            question.k,
            now,
            question.filter_seen,
            deny,
            allow,
            question.where,
            question.diversity,
            question.popularity,
            question.probabilities,
        )
        answers = []
        for place, missing in enumerate(unknown):
            popular = bool(lists.popular[place])
            listed = zip(lists.rows[place].tolist(), lists.scores[place].tolist(), strict=True)
            items = _places(recommender, list(listed))
            if lists.probabilities is not None and not popular:
                for item, chance in zip(items, lists.probabilities[place].tolist(), strict=False):
                    item["probability"] = chance
            source = "popularity" if popular else first
            answers.append(
                {
                    "bundle": recommender.id,
                    "arm": arm.name,
                    "source": source,
                    "fallback": None,
                    "unknown": missing,
                    "items": items,
                }
            )
        return answers

    async def _change(self, verb: str, items: Sequence[Any]) -> bytes:
        address = self.addresses.get("champion", "")
        if address.startswith("models:/"):
            raise Refusal(409, "the bundle comes from a registry; change it with `recsys items` and register it")
        path = Path(address or self.arms.champion.recommender.path)
        try:
            return await self._heavily(partial(self._changed, verb, path, items))
        except BundleError as error:
            raise Refusal(409, str(error)) from None
        except SetupError as error:
            raise Refusal(503, str(error), retry_after=60) from None

    def _changed(self, verb: str, path: Path, items: Sequence[Any]) -> bytes:
        from serving import items as change

        if verb == "remove":
            manifest = change.remove(path, items)
        else:
            with tempfile.TemporaryDirectory() as folder:  # polars reads rows of unequal columns from lines of JSON alone
                table = Path(folder) / "items.jsonl"
                table.write_bytes(msgspec.json.Encoder().encode_lines(items))
                settings = DataSettings(**open_directory(path, verify=False).manifest["recipe"].get(DataSettings.section, {}))
                try:
                    rows = read_items(table, settings, attributes=verb == "update")
                    manifest = {"add": change.add, "update": change.update}[verb](path, rows)
                except DataError as error:
                    raise DataError(str(error).replace(str(table), "items").replace(folder, "items")) from None
        arm = self.arms.champion
        if not arm.refresh() and arm.recommender.id != manifest["id"]:
            arm.refresh(force=True)
        if arm.recommender.id != manifest["id"]:
            raise Refusal(503, f"the change is made and not live: {arm.problem}", retry_after=60)
        return _encode({"bundle": manifest["id"], "changes": manifest["changes"]})


def _rows(
    recommender: Recommender,
    deny: Sequence[int | str],
    allow: Sequence[int | str] | None,
    unknown: list[int | str] | None = None,
) -> tuple[list[int], list[int] | None]:
    """Item rows of both lists. Raises RequestError: an id is no item, and there is no list of the unknown to add it to."""
    catalogue = recommender.catalogue
    denied = [row for row in catalogue.rows(deny, catalogue.by_id, unknown) if row is not None]
    if allow is None:
        return denied, None
    return denied, [row for row in catalogue.rows(allow, catalogue.by_id, unknown) if row is not None]


def _places(recommender: Recommender, found: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
    """Rows and scores as places of a list."""
    catalogue = recommender.catalogue
    return [
        {"rank": rank, "item_id": catalogue.item_id(row), "title": catalogue.title(row), "score": score}
        for rank, (row, score) in enumerate(found, 1)
        if row != PADDING
    ]
