"""The online API over a bundle, in this process: what its tests share."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from serving.admission import OnlineSettings
from serving.app import Online
from serving.engine import Recommender
from serving.fallback import open_lists
from serving.history import open_store
from serving.keys import Keys
from serving.live import Arms, PathSource
from serving.service import Service
from serving.telemetry import Tracer


def made(
    bundle: Path,
    *,
    challenger: Path | None = None,
    store: str = "memory:",
    lists: Path | str | None = None,
    keys: Path | None = None,
    tracer: Tracer | None = None,
    addresses: dict[str, str] | None = None,
    clock: Any = None,
    page: Path | None = None,
    **settings: Any,
) -> Online:
    """The application; settings are those of OnlineSettings, but that on a real clock it has a minute for an answer."""
    chosen = OnlineSettings(**({"deadline_ms": 60_000} if clock is None else {}) | settings)
    other = None if challenger is None else PathSource(challenger)
    services: list[Service] = []

    def tell(kind: str, detail: str) -> None:
        for service in services if kind == "swap" else ():
            service.swapped(detail.partition(":")[0])

    arms = Arms(PathSource(bundle), other, chosen.share, chosen.salt, tell)
    clocked = {} if clock is None else {"clock": clock}
    listed = None if lists is None else open_lists(str(lists))
    service = Service(arms, open_store(store, chosen.keep), chosen, lists=listed, addresses=addresses, **clocked)
    services.append(service)
    paged = {} if page is None else {"page": page}
    return Online(service, None if keys is None else Keys(keys), tracer, **paged)


@contextmanager
def client_of(online: Online) -> Iterator[TestClient]:
    """A client of the application while it runs; its store is closed afterwards."""
    with TestClient(online) as client:
        yield client
    online.service.store.close()


@contextmanager
def asked(bundle: Path, **options: Any) -> Iterator[TestClient]:
    """A client of `made`."""
    with client_of(made(bundle, **options)) as client:
        yield client


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def slowed(recommender: Recommender, clock: Clock, seconds: dict[str, float], fail: tuple[str, ...] = ()) -> Recommender:
    """The same with lists that take so many seconds: of `first`, and of `second`, without its ranker."""
    first, second = copy.copy(recommender), recommender.with_ranker(0)

    def slow(name: str, whole: Recommender) -> Callable[..., Any]:
        def answer(*words: Any, **options: Any) -> Any:
            if name in fail:
                raise ZeroDivisionError(name)
            clock.now += seconds[name]
            return type(whole).answer(whole, *words, **options)

        return answer

    first.answer = slow("first", recommender)  # type: ignore[method-assign]
    second.answer = slow("second", copy.copy(second))  # type: ignore[method-assign]
    first.with_ranker = lambda blocks: second  # type: ignore[method-assign]
    return first


def paced(bundle: Path, clock: Clock, seconds: dict[str, float], fail: tuple[str, ...] = (), **settings: Any) -> Online:
    online = made(bundle, clock=clock, **settings)
    arm = online.service.arms.champion
    arm.recommender = slowed(arm.recommender, clock, seconds, fail)
    return online


async def post(online: Online, question: dict[str, Any], path: str = "/v1/recommend") -> tuple[int, dict[bytes, bytes], Any]:
    """Status, headers and body of an answer."""
    body, sent = json.dumps(question).encode(), []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "client": ("here", 1)}
    await online(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"])


def told(online: Online, *questions: dict[str, Any]) -> list[tuple[int, dict[bytes, bytes], Any]]:
    """Answers to questions that arrive together."""

    async def run() -> list[Any]:
        await online.service.start()
        replies = await asyncio.gather(*(post(online, question) for question in questions))
        await online.service.stop()
        return list(replies)

    return asyncio.run(run())


def rungs(replies: list[tuple[int, dict[bytes, bytes], Any]]) -> list[tuple[str, str | None] | int]:
    return [(answer["source"], answer["fallback"]) if status == 200 else status for status, _, answer in replies]
