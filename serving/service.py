"""What the online API does for each request, without HTTP: who answers it, when, and what is kept."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from features.dataset import ATTRIBUTE
from recsys.batch import FIRST_ITEM
from recsys.errors import BundleError, DataError, RecsysError, RequestError, SetupError, StoreError
from recsys.version import __version__
from serving import messages
from serving.admission import Clock, Desk, OnlineSettings
from serving.fallback import UserLists
from serving.history import Event, HistoryStore
from serving.ladder import EXPLAINED, Ladder, Listed, encode, late
from serving.live import Arm, Arms
from serving.messages import Asked, Happened, Refusal, decode
from serving.pasts import Past, Pasts
from serving.stores import checked
from serving.telemetry import LOG, Call, Metrics, about

T = TypeVar("T")
RANKED = 500
"""Items up to which putting them in order is done between other requests."""
LISTERS = 2
"""Threads that ask for nightly lists over a network."""
PLACES = 100_000
"""Most places of all lists of a batch: a hundred for each of the most users."""


class Service:
    """The arms, the store and the lists behind one queue; its coroutines take a message's body, or words, and give JSON."""

    def __init__(
        self,
        arms: Arms,
        store: HistoryStore,
        settings: OnlineSettings,
        *,
        lists: UserLists | None = None,
        addresses: Mapping[str, str] | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.arms, self.settings, self.lists = arms, settings, lists
        self.addresses = addresses or {}
        self.metrics, self.clock = Metrics(), clock
        self.desk = Desk(settings.queue)
        self.pasts = Pasts(store, settings, self.metrics, clock)
        self.ladder = Ladder(arms, self.pasts, settings, lists, self.metrics, clock)
        self.leaving = False
        self._busy = self._writing = 0
        self._thread: ThreadPoolExecutor | None = None
        self._listers: ThreadPoolExecutor | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.metrics.queue.set_function(lambda: len(self.desk))  # asked when the figures are read
        for arm in arms.all:
            self.metrics.loaded(arm.name, arm.recommender.id)

    @property
    def store(self) -> HistoryStore:
        """Of the users' histories."""
        return self.pasts.store

    async def start(self) -> None:
        """Take requests, and watch the lists and the store; after a stop also again."""
        self.pasts.start()
        self._thread, self._listers = ThreadPoolExecutor(1, "heavy"), ThreadPoolExecutor(LISTERS, "lists")
        self._tasks = [asyncio.create_task(self.desk.run()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Take no more."""
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        for pool in (self._thread, self._listers):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        self.pasts.stop()

    async def _watch(self) -> None:
        """From time to time read the lists anew, if they are others, and ask the store whether it is there."""
        while True:
            await asyncio.sleep(self.settings.watch_seconds)
            try:
                if self.lists is not None:
                    await asyncio.get_running_loop().run_in_executor(self._listers, self.lists.refresh)
            except RecsysError as error:
                LOG.warning("lists", extra=about(detail=str(error)))
            except Exception:  # whatever it is, the next look may be better
                LOG.exception("lists")
            try:
                await self.pasts.asked(self.store.check)
            except (Refusal, StoreError):  # the breaker knows
                continue
            except Exception:
                LOG.exception("store")

    def swapped(self, arm_name: str) -> None:
        """An arm serves another bundle."""
        arm = self.arms.named(arm_name)
        self.ladder.swapped(arm)
        self.metrics.loaded(arm_name, arm.recommender.id)

    # The routes that are computed in the loop

    async def recommend(self, body: bytes, call: Call) -> bytes:
        """A list for a user or a history."""
        question = self._parse(messages.Recommend, body, call)
        arm = self._begin(question, call)
        if question.explain and question.k > EXPLAINED:
            raise RequestError(f"k is {question.k} with explain; ask for at most {EXPLAINED} explained items")
        past = await self._past(question, call) if self.pasts.remote or question.explain else None
        if question.explain:
            return await self._heavily(partial(self.ladder.explained, question, arm, call, past), call.deadline)
        work = partial(self.ladder.recommended, question, arm, call, past)
        if self.ladder.long(question, arm):
            told = await self._heavily(partial(work, alone=True), call.deadline)
        else:
            told = await self._at_desk(work, call)
        return told if isinstance(told, bytes) else told(await self._listed(str(question.user_id), call))

    async def rank(self, body: bytes, call: Call) -> bytes:
        """Given items in order."""
        question = self._parse(messages.Rank, body, call)
        arm = self._begin(question, call)
        past = await self._past(question, call) if self.pasts.remote else None
        work = partial(self.ladder.ranked, question, arm, call, past)
        if len(question.items) > RANKED:
            return await self._heavily(partial(work, alone=True), call.deadline)
        return await self._at_desk(work, call)

    async def similar(self, body: bytes, call: Call) -> bytes:
        """Items like an item."""
        question = self._parse(messages.Similar, body, call)
        arm = self._arm(question, None, call)
        return await self._at_desk(partial(self.ladder.alike, question, arm, call), call)

    async def events(self, body: bytes, call: Call) -> bytes:
        """Keep events."""
        told = self._parse(messages.Events, body, call)
        by_id, now = self.arms.champion.recommender.catalogue.by_id, int(time.time())
        known = sum(by_id(each.item_id) is not None for each in told.events)
        by_user: dict[str, list[Happened]] = {}
        for each in told.events:
            by_user.setdefault(str(each.user_id), []).append(each)
        for user_id in by_user:  # before any is written
            checked(user_id)
        if self._writing >= self.settings.queue:
            raise Refusal(503, "too many events are waiting to be kept; send them again", retry_after=1)
        self._writing += 1
        try:
            added = await self.pasts.written(partial(self._append, by_user, now))
        finally:
            self._writing -= 1
        self.metrics.events.inc(added)
        return encode({"added": added, "known": known, "unknown": len(told.events) - known})

    # The routes that a thread of their own serves

    async def batch(self, body: bytes, call: Call) -> bytes:
        """A list for each of many users."""
        question = self._parse(messages.Batch, body, call)
        if question.arm is not None:
            self.arms.named(question.arm)
        if len(question.users) * question.k > PLACES:
            raise RequestError(
                f"{len(question.users)} users by k of {question.k} are more than {PLACES} places; ask for fewer users at once"
            )

        def batched() -> tuple[list[dict[str, Any]], bytes]:
            answers = self.ladder.batched(question)
            return answers, encode({"answers": answers})

        answers, told = await self._heavily(batched)
        for answer in answers:
            self.metrics.requests.listed(answer["source"])
            if len(answer["items"]) < question.k:
                self.metrics.underfilled.inc()
        call.bundle, call.arm = (_common(answers, what) for what in ("bundle", "arm"))
        return told

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
        """All that is kept of a user.

        What other processes of the API hold in memory names nobody: recorded requests, which are gone after live.AGE, and what
        was kept of histories that were read, found by their events alone, which goes when others need its room.
        """

        def erased() -> bytes:
            try:
                history = self.pasts.write(partial(self.store.erase, user_id))
                return encode({"user_id": user_id, "history": history, "lists": self._out_of_lists(user_id)})
            finally:
                self.arms.requests.forget()
                for arm in self.arms.all:
                    arm.recommender.forget()  # what was encoded, found by the events that were read

        return await self._heavily(erased)

    # What is only looked up

    async def user(self, user_id: str) -> bytes:
        """The events of a user."""
        arm = self.arms.of(user_id)
        catalogue = arm.recommender.catalogue
        found = await self.pasts.asked(partial(self.store.read, user_id))
        rows = [(event, catalogue.by_id(event.item_id)) for event in found]
        events = [
            {"item_id": event.item_id, "title": None if row is None else catalogue.title(row), "time": event.time}
            for event, row in rows
        ]
        return encode({"user_id": user_id, "arm": arm.name, "events": events})

    async def find_items(self, part: str, limit: int) -> bytes:
        """Items by a part of their title."""
        view = self.ladder.view(self.arms.champion)
        found = await asyncio.to_thread(view.search, part, limit)  # what no title holds is found by all titles
        return encode({"items": found})

    async def item(self, item_id: str) -> bytes:
        """One item."""
        view = self.ladder.view(self.arms.champion)
        catalogue = view.recommender.catalogue
        row = catalogue.by_id(item_id)
        if row is None:
            raise Refusal(404, "no such item; give the id of an item")
        told = catalogue.told(row)
        return encode(
            {
                "item_id": told["item_id"],
                "title": catalogue.title(row),
                "events": told["events"],
                "recommended": view.recommends(row - FIRST_ITEM),
                "text": told["text"] or "",
                "categories": told["categories"] or [],
                "attributes": {
                    name.removeprefix(ATTRIBUTE): value for name, value in told.items() if name.startswith(ATTRIBUTE)
                },
            }
        )

    async def filters(self) -> bytes:
        """What requests may filter by."""
        view = self.ladder.view(self.arms.champion)
        return encode({"filters": (view if view.whole else await asyncio.to_thread(view.complete)).filters})

    async def bundle(self) -> bytes:
        """The loaded bundles."""
        return encode({"arms": [self._served(arm) for arm in self.arms.all], "share": self.arms.share})

    def ready(self) -> tuple[int, bytes]:
        """Whether to send requests here: a status and why."""
        recommender = self.arms.champion.recommender
        told = {
            "status": "leaving" if self.leaving else "ready",
            "bundle": recommender.id,
            "items": recommender.items,
            "version": __version__,
            "store": "ok" if self.pasts.breaker.whole else "unreachable",
        }
        return 503 if self.leaving else 200, encode(told)

    def _served(self, arm: Arm) -> dict[str, Any]:
        view = self.ladder.view(arm)
        recommender = view.recommender
        return {
            "name": arm.name,
            "bundle": recommender.id,
            "since": arm.since,
            "source": self.addresses.get(arm.name, str(recommender.path)),
            "quality": recommender.manifest.get("quality", {}),
            "index": recommender.manifest.get("index", {}),
            "ranker": view.rungs[0][0] == "ranked",
            "problem": arm.problem,
            "items": recommender.items,
        }

    # Before the turn

    def _parse(self, kind: type[T], body: bytes, call: Call) -> T:
        message = decode(kind, body)
        call.stages["parse"] = self.clock() - call.read
        return message

    def _begin(self, question: Asked, call: Call) -> Arm:
        given = [name for name in ("user_id", "history", "titles") if getattr(question, name) not in (None, [])]
        if len(given) > 1:
            raise RequestError(f"both {given[0]} and {given[1]} are given; give one of them")
        if question.user_id is not None and question.times is not None:
            raise RequestError("times are given with user_id, whose events have their own; leave them out")
        return self._arm(question, None if question.user_id is None else str(question.user_id), call)

    def _arm(self, question: Asked | messages.Similar, user_id: str | None, call: Call) -> Arm:
        """Which answers, and until when: the call is told."""
        arm = self.arms.of(user_id) if question.arm is None else self.arms.named(question.arm)
        call.arm, call.deadline = arm.name, call.read + (question.deadline_ms or self.settings.deadline_ms) / 1000
        return arm

    async def _past(self, question: Asked, call: Call) -> Past | None:
        """The history; who does not answer in half of the time is not waited for."""
        return await self.pasts.of_in_thread(question, call, (call.deadline - call.read) / 2)

    async def _listed(self, user_id: str, call: Call) -> Listed:
        """Last night's list, asked for in a thread; none where it does not come in half of the time that is left."""
        assert self.lists is not None
        started = self.clock()
        asking = asyncio.get_running_loop().run_in_executor(self._listers, self.lists.of, user_id)
        try:
            return await asyncio.wait_for(asking, max(0.0, call.deadline - started) / 2)
        except TimeoutError:
            return []
        finally:
            call.stages["lists"] = self.clock() - started

    def _at_desk(self, work: Callable[[], T], call: Call) -> Awaitable[T]:
        queued = self.clock()

        def turn() -> T:
            call.stages["wait"] = self.clock() - queued
            return work()

        return self.desk.take(turn)

    async def _heavily(self, work: Callable[[], T], deadline: float | None = None) -> T:
        """What work gives, in a thread of its own. Raises Refusal: too much waits there, or the turn does not come in time."""
        if self._busy >= self.settings.heavy:
            raise Refusal(503, f"{self._busy} long requests are waiting already; ask again", retry_after=1)
        assert self._thread is not None
        self._busy += 1
        try:
            job = self._thread.submit(work)
            turn = asyncio.wrap_future(job)
            if deadline is not None:
                await asyncio.wait([turn], timeout=max(0.0, deadline - self.clock()))
                if job.cancel():
                    raise late()
            return await turn
        finally:
            self._busy -= 1

    # Changes

    def _append(self, by_user: Mapping[str, Sequence[Happened]], now: int) -> int:
        return self.store.load(
            (user_id, [Event(each.item_id, now if each.time is None else each.time, each.event_id) for each in happened])
            for user_id, happened in by_user.items()
        )

    def _out_of_lists(self, user_id: str) -> bool:
        try:
            return self.lists is not None and self.lists.erase(user_id)
        except RecsysError as error:
            LOG.warning("lists", extra=about(detail=str(error)))
            said = "the history is erased; the nightly lists cannot be read or written, and still hold the user; erase again"
            raise Refusal(503, said, retry_after=60) from None

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
                try:
                    manifest = change.from_file(path, verb, table)
                except DataError as error:
                    raise DataError(str(error).replace(str(table), "items").replace(folder, "items")) from None
        arm = self.arms.champion
        if not arm.refresh() and arm.recommender.id != manifest["id"]:
            arm.refresh(force=True)
        if arm.recommender.id != manifest["id"]:
            raise Refusal(503, f"the change is made and not live: {arm.problem}", retry_after=60)
        return encode({"bundle": manifest["id"], "changes": manifest["changes"]})


def _common(answers: Sequence[Mapping[str, Any]], what: str) -> str:
    """What all answers say; empty where they differ."""
    found = {str(answer[what]) for answer in answers}
    return found.pop() if len(found) == 1 else ""
