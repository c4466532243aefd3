"""Who is served, and when; time is what a test says it is."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import RecipeError
from serving import admission
from serving.admission import Breaker, Cost, Desk, OnlineSettings, Rate
from serving.messages import Refusal
from tests.serving.online import Clock, client_of, made, post


def test_the_desk_does_one_piece_at_a_time_in_the_order_of_arrival() -> None:
    async def run() -> list[int]:
        desk, done = Desk(13), []
        task = asyncio.create_task(desk.run())
        futures = [desk.take(lambda number=number: done.append(number)) for number in range(11)]  # type: ignore[misc]
        assert len(desk) == 11
        assert done == []
        await asyncio.gather(*futures)
        task.cancel()
        return done

    assert asyncio.run(run()) == list(range(11))


def test_a_full_queue_refuses_at_once_and_takes_again_when_there_is_room() -> None:
    async def run() -> None:
        desk = Desk(3)
        futures = [desk.take(lambda: 7) for _ in range(3)]
        with pytest.raises(Refusal, match="3 requests are waiting") as refused:
            desk.take(lambda: 7)
        assert (refused.value.status, refused.value.retry_after) == (503, 1)
        task = asyncio.create_task(desk.run())
        assert await asyncio.gather(*futures) == [7, 7, 7]
        assert await desk.take(lambda: 11) == 11
        task.cancel()

    asyncio.run(run())


def test_what_a_piece_raises_is_raised_to_who_asked_and_the_next_is_done() -> None:
    async def run() -> None:
        desk = Desk(5)
        task = asyncio.create_task(desk.run())
        wrong, gone, right = desk.take(lambda: 1 // 0), desk.take(lambda: 7), desk.take(lambda: 11)
        gone.cancel()
        with pytest.raises(ZeroDivisionError):
            await wrong
        assert await right == 11
        task.cancel()

    asyncio.run(run())


def test_health_waits_for_one_piece_of_work_at_most(bundles: dict[str, Path]) -> None:
    online, done, seen = made(bundles["exact"]), [], []

    async def run() -> None:
        service = online.service
        await service.start()
        server = await asyncio.start_server(lambda *pair: answer(*pair), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        futures = [service.desk.take(lambda number=number: done.append(number)) for number in range(61)]  # type: ignore[misc]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        before = len(done)
        writer.write(b"x")
        await reader.read(1)
        seen.append(len(done) - before)
        await asyncio.gather(*futures)
        writer.close()
        server.close()
        await service.stop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        arrived = len(done)
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/health", "raw_path": b"/health", "query_string": b"", "headers": []}
        await online(scope, receive, send)
        assert sent[0]["status"] == 200
        assert len(done) - arrived <= 1
        writer.write(b"y")
        writer.close()

    asyncio.run(run())
    assert len(done) == 61
    assert seen[0] < 20  # bytes and tasks take turns of the loop too


def test_cost_follows_what_is_measured_and_falls_while_it_is_left_out() -> None:
    cost = Cost()
    assert cost.seconds == 0
    cost.add(0.1)
    assert cost.seconds == pytest.approx(0.1)
    for _ in range(100):
        cost.add(0.02)
    assert cost.seconds == pytest.approx(0.02, rel=0.01)
    cost.add(10.0)
    slow = cost.seconds
    assert slow > 1
    for _ in range(500):
        cost.skip()
    assert cost.seconds < 0.001


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=50))
def test_cost_stays_within_what_was_measured_and_its_spread(seconds: list[float]) -> None:
    cost = Cost()
    for each in seconds:
        cost.add(each)
    assert min(seconds) * 0.999 <= cost.mean <= max(seconds) * 1.001
    assert cost.mean <= cost.seconds <= cost.mean + 2.001 * (max(seconds) - min(seconds))


def test_a_rate_lets_a_burst_through_and_then_so_many_a_second() -> None:
    clock = Clock()
    rate = Rate(2.0, 3, clock)
    assert [rate.wait("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert rate.wait("b") == 0
    clock.now += 0.25
    assert rate.wait("a") == pytest.approx(0.25)
    clock.now += 0.25
    assert rate.wait("a") == 0
    assert rate.wait("a") > 0
    clock.now += 1000
    assert [rate.wait("a") > 0 for _ in range(4)] == [False, False, False, True]
    assert [Rate(0, 3, clock).wait("a") for _ in range(10)] == [0] * 10


def test_of_too_many_clients_the_one_that_was_silent_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "CLIENTS", 3)
    rate = Rate(1.0, 1, Clock())
    for client in ("a", "b", "c", "a", "d"):
        rate.wait(client)
    assert len(rate._buckets) == 3
    assert rate.wait("a") > 0
    assert rate.wait("b") == 0


def test_what_failed_is_left_alone_and_then_asked_by_one() -> None:
    clock = Clock()
    breaker = Breaker(1.0, clock)
    assert breaker.ask()
    breaker.fail()
    assert not breaker.ask()
    clock.now += 1
    assert [breaker.ask() for _ in range(3)] == [True, False, False]
    breaker.mend()
    assert breaker.whole
    assert [breaker.ask() for _ in range(3)] == [True, True, True]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("queue", 0),
        ("deadline_ms", 0),
        ("burst", 0),
        ("keep", 0),
        ("body_bytes", 0),
        ("heavy", 0),
        ("rate", -1),
        ("drain_seconds", -1),
        ("record_every", -1),
        ("watch_seconds", 0),
        ("body_seconds", 0),
        ("share", 1.01),
        ("share", -0.01),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, value: float) -> None:
    from recsys.config import Recipe

    with pytest.raises(RecipeError, match=name):
        Recipe("x", {"online": {name: value}}).read(OnlineSettings)


def test_rate_and_burst_hold_for_each_client_and_key(bundles: dict[str, Path]) -> None:
    clock = Clock()
    with client_of(made(bundles["exact"], clock=clock, rate=0.5, burst=3)) as client:
        statuses = [client.post("/v1/recommend", json={}).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        refused = client.get("/v1/bundle")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "3"
        assert [client.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200] * 3
        clock.now += 2
        assert client.post("/v1/recommend", json={}).status_code == 200


def test_a_full_queue_is_503_and_says_when_to_ask_again(bundles: dict[str, Path]) -> None:
    online = made(bundles["exact"], queue=5)

    async def run() -> list[Any]:
        await online.service.start()
        replies = await asyncio.gather(*(post(online, {"history": [5]}) for _ in range(7)))
        await online.service.stop()
        return list(replies)

    replies = asyncio.run(run())
    assert [status for status, _, _ in replies] == [200] * 5 + [503] * 2
    assert replies[-1][1][b"retry-after"] == b"1"


def test_of_so_many_requests_one_is_recorded_of_nobody(bundles: dict[str, Path]) -> None:
    for every, recorded in ((3, 4), (0, 0)):
        online = made(bundles["exact"], record_every=every)
        with client_of(online) as client:
            client.post("/v1/events", json={"events": [{"user_id": "who", "item_id": 5, "time": 7}]})
            for _ in range(13):
                client.post("/v1/recommend", json={"user_id": "who", "k": 11})
            kept = online.service.arms.requests.kept
            assert len(kept) == recorded
            assert {(each.items, each.times, each.k) for each in kept} <= {((5,), (7,), 11)}
            assert "who" not in repr(kept)
            client.delete("/v1/users/who")
            assert online.service.arms.requests.kept == []


def test_a_breaker_may_be_mended_by_another_thread_while_it_is_asked() -> None:
    breaker = Breaker(1.0, Clock())

    def mending() -> float:
        breaker.mend()
        return 1000.0

    breaker.clock = mending
    for _ in range(3):
        breaker._until = 1001.0
        assert not breaker.ask()
