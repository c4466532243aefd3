"""Histories as requests have them: given, or read from the store, which is left alone while it does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from recsys.errors import StoreError
from serving.admission import Breaker, Clock, OnlineSettings
from serving.catalogue import Catalogue, Find
from serving.history import Event, HistoryStore
from serving.messages import Asked, Refusal
from serving.stores import REDIS, BlobError
from serving.telemetry import LOG, Call, Metrics, about

T = TypeVar("T")
REST = 1.0
"""Seconds that a store is left alone after it did not answer."""
THREADS = 2
"""That read, and as many that write."""


@dataclass(frozen=True)
class Past:
    """A history in words, which each bundle reads by its own catalogue."""

    words: Sequence[int | str]
    times: Sequence[int] | None
    titled: bool
    """Whether the words are titles, not ids."""
    kept: bool
    """Whether it is a store's, which may hold items that this bundle does not know."""

    def find(self, catalogue: Catalogue) -> Find:
        """How words become items."""
        return catalogue.by_title if self.titled else catalogue.by_id


class Pasts:
    """The store behind its breaker: reads have threads of their own, which no write keeps waiting.

    A read that fails, or takes longer than half of the default deadline, opens the breaker; a write that fails does not, and
    neither does one user's history.
    """

    def __init__(self, store: HistoryStore, settings: OnlineSettings, metrics: Metrics, clock: Clock) -> None:
        self.store, self.metrics, self.clock = store, metrics, clock
        self.remote = store.url.partition(":")[0] in REDIS  # over a network, and so asked in a thread
        self.breaker = Breaker(REST, clock)
        self._patience = settings.deadline_ms / 2000
        self._readers: ThreadPoolExecutor | None = None
        self._writers: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """Make the threads."""
        self._readers, self._writers = ThreadPoolExecutor(THREADS, "read"), ThreadPoolExecutor(THREADS, "write")

    def stop(self) -> None:
        """End them after what they are at."""
        for pool in (self._readers, self._writers):
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def of(self, question: Asked, call: Call) -> Past | None:
        """The history of a question; None: it is a user's, and the store does not tell."""
        if question.user_id is None:
            return Past(question.titles or question.history, question.times, bool(question.titles), False)
        if not self.breaker.ask():
            return None
        started = self.clock()
        try:
            return self._kept(str(question.user_id))
        finally:
            call.stages["store"] = self.clock() - started

    async def of_in_thread(self, question: Asked, call: Call, seconds: float) -> Past | None:
        """As `of`, without keeping the loop; nor does it wait longer than so many seconds."""
        if question.user_id is None:
            return self.of(question, call)
        if not self.breaker.ask():
            return None
        started = self.clock()
        reading = asyncio.get_running_loop().run_in_executor(self._readers, self._kept, str(question.user_id))
        try:
            return await asyncio.wait_for(reading, seconds)
        except TimeoutError:
            return None
        finally:
            call.stages["store"] = self.clock() - started

    def read(self, user_id: str) -> list[Event]:
        """A user's events; none where they are unreadable, which the log says. Raises StoreError: the store does not answer."""
        try:
            return self._tried(partial(self.store.read, user_id))
        except BlobError:
            LOG.warning("history", extra=about(detail="a user's history is unreadable, and read as an empty one"))
            return []

    def admit(self) -> None:
        """Raises Refusal: the store did not answer a moment ago."""
        if not self.breaker.ask():
            raise Refusal(503, "the store does not answer; ask again", retry_after=1)

    async def asked(self, ask: Callable[[], T]) -> T:
        """What the store tells, by a thread that reads. Raises Refusal: as admit. StoreError: as the store."""
        self.admit()
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._tried, ask)

    async def written(self, change: Callable[[], T]) -> T:
        """What a change of the store gives, by a thread that writes. Raises Refusal: as admit. StoreError: as the store."""
        self.admit()
        return await asyncio.get_running_loop().run_in_executor(self._writers, partial(self._tried, change, writes=True))

    def write(self, change: Callable[[], T]) -> T:
        """As `written`, in this thread."""
        self.admit()
        return self._tried(change, writes=True)

    def _kept(self, user_id: str) -> Past | None:
        try:
            found = self.read(user_id)
        except StoreError:
            return None
        return Past([event.item_id for event in found], [event.time for event in found], False, True)

    def _tried(self, ask: Callable[[], T], writes: bool = False) -> T:
        """Ask, and tell the breaker what came of it."""
        started = self.clock()
        try:
            answer = ask()
        except BlobError:
            self.metrics.store_errors.inc()
            self.breaker.mend()
            raise
        except StoreError:
            self._failed(writes)
            raise
        if self.remote and not writes and self.clock() - started > self._patience:
            self._failed(writes)
        else:
            self.breaker.mend()
        return answer

    def _failed(self, writes: bool) -> None:
        if self.breaker.whole:
            LOG.warning("store", extra=about(detail=f"the store does not {'take what is written' if writes else 'answer'}"))
        if not writes:
            self.breaker.fail()
        self.metrics.store_errors.inc()
