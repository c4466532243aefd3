"""Who is served, when and how well: a bounded queue, the ladder of cheaper answers, and each client's rate."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from recsys.config import Settings
from serving.history import KEEP
from serving.messages import Refusal

T = TypeVar("T")
Clock = Callable[[], float]
CLIENTS = 10_000
"""Clients whose rate is remembered; of more, the one that was silent longest is forgotten."""
WEIGHT = 0.1
"""Share of the newest measurement in a rung's cost."""
FORGET = 0.98
"""What a rung's cost is multiplied by each time the rung is left out, so that it is tried again."""


@dataclass(frozen=True)
class OnlineSettings(Settings):
    """What the online API promises, and how much it takes on."""

    section: ClassVar[str] = "online"

    queue: int = 64
    """Requests that may wait for their turn; one more is refused at once."""
    deadline_ms: int = 250
    """Milliseconds after which an answer is no longer wanted, where the request names no other."""
    rate: float = 0.0
    """Requests a second that each client may send; 0: as many as it likes."""
    burst: int = 20
    """Requests that a client may send at once after it was silent; needs online.rate."""
    keep: int = KEEP
    """Last events of a user that are kept."""
    watch_seconds: float = 5.0
    """Seconds between two looks at the bundle, the lists and the registry."""
    share: float = 0.0
    """Part of the users that the challenger serves, from 0 to 1."""
    salt: str = "recsys"
    """What is mixed with a user's id before the share decides; another salt chooses other users."""
    drain_seconds: float = 5.0
    """Seconds between the signal to leave and the last connection that is taken."""
    body_bytes: int = 2**20
    """Most bytes of a request's body."""
    body_seconds: float = 30.0
    """Seconds within which a request's body must be there."""
    record_every: int = 100
    """Of so many answered requests one is recorded, without its user, to warm the next bundle; 0: none."""
    heavy: int = 8
    """Explanations, batches and changes that may wait for the one thread that does them."""

    def __post_init__(self) -> None:
        self._at_least(1, "queue", "deadline_ms", "burst", "keep", "body_bytes", "heavy")
        self._must("not be negative", lambda value: 0 <= value < math.inf, ("rate", "drain_seconds", "record_every"))
        self._must("be above 0", lambda value: value > 0, ("watch_seconds", "body_seconds"))
        self._from_to(0, 1, "share")


class Desk:
    """A bounded queue before the one who computes: one piece of work at a time, in the order of arrival.

    Between two pieces the loop turns twice, so that what arrived during the first is read and answered before the second.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._waiting: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._idle: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """What the work returns or raises, once its turn has come. Raises Refusal: the queue is full."""
        if len(self._waiting) >= self.places:
            raise Refusal(503, f"{self.places} requests are waiting already; ask again", retry_after=1)
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, future))
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        return future

    async def run(self) -> None:
        """Work until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._idle = loop.create_future()
                await self._idle
            work, future = self._waiting.popleft()
            if future.cancelled():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            await asyncio.sleep(0)
            await asyncio.sleep(0)


class Cost:
    """What a rung is expected to take: the moving average of its measured seconds, and twice their mean deviation above it."""

    def __init__(self) -> None:
        self.mean = self.deviation = 0.0
        self._measured = False

    @property
    def seconds(self) -> float:
        return self.mean + 2 * self.deviation

    def add(self, seconds: float) -> None:
        """One more measurement."""
        if not self._measured:
            self.mean, self._measured = seconds, True
            return
        self.deviation += WEIGHT * (abs(seconds - self.mean) - self.deviation)
        self.mean += WEIGHT * (seconds - self.mean)

    def skip(self) -> None:
        """The rung was left out: it is believed to be a little cheaper, else one slow moment would shut it for good."""
        self.mean *= FORGET
        self.deviation *= FORGET


class Rate:
    """A bucket of tokens for each client, which fills by `rate` a second up to `burst`."""

    def __init__(self, rate: float, burst: int, clock: Clock) -> None:
        self.rate, self.burst, self.clock = rate, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> float:
        """Take a token: 0, or the seconds until there is one."""
        if not self.rate:
            return 0.0
        now = self.clock()
        tokens, then = self._buckets.pop(client, (float(self.burst), now))
        tokens = min(float(self.burst), tokens + (now - then) * self.rate)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - allowed, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - tokens) / self.rate


class Breaker:
    """Leaves what has failed alone for some seconds, so that nobody waits for it; then one asks, and the others see.

    Safe to share between threads.
    """

    def __init__(self, seconds: float, clock: Clock) -> None:
        self.seconds, self.clock = seconds, clock
        self._until: float | None = None

    @property
    def whole(self) -> bool:
        """Whether the last that was asked of it was answered."""
        return self._until is None

    def ask(self) -> bool:
        """Whether to ask it now."""
        until = self._until  # once: another thread may mend it meanwhile
        if until is None:
            return True
        if self.clock() < until:
            return False
        self.fail()  # until the one that asks now knows better
        return True

    def fail(self) -> None:
        self._until = self.clock() + self.seconds

    def mend(self) -> None:
        self._until = None
