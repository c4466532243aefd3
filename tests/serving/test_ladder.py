"""The best list that the time left is enough for; time is what a test says it is."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from serving.engine import Recommender
from tests.serving.online import Clock, client_of, made, paced, post, rungs, slowed, told

TIMED = {"history": [5, 7, 11], "times": [10, 500, 700], "k": 7}


@pytest.fixture(scope="module")
def ranked(ranked_bundles: dict[str, Path]) -> Path:
    return ranked_bundles["look"]


def test_each_answer_is_the_best_that_the_time_left_is_enough_for(ranked: Path) -> None:
    online = paced(ranked, Clock(), {"first": 0.1, "second": 0.02}, deadline_ms=250)
    found = rungs(told(online, *[TIMED] * 7))
    assert found[:2] == [("ranked", None)] * 2
    assert found[2:4] == [("retrieved", "overload")] * 2
    assert found[4:] == [("popularity", "overload")] * 3


def test_a_passed_deadline_is_503_and_nothing_is_computed(ranked: Path) -> None:
    clock = Clock()
    online = paced(ranked, clock, {"first": 0.3, "second": 0.3}, deadline_ms=250)
    replies = told(online, *[TIMED] * 4)
    assert rungs(replies) == [("ranked", None), 503, 503, 503]
    assert replies[1][1][b"retry-after"] == b"1"
    assert clock.now == pytest.approx(1000.3)


def test_a_request_may_name_its_own_deadline(ranked: Path) -> None:
    with client_of(paced(ranked, Clock(), {"first": 0.1, "second": 0.04})) as client:

        def source(deadline_ms: int | None) -> tuple[str, str | None]:
            answer = client.post("/v1/recommend", json={**TIMED, "deadline_ms": deadline_ms}).json()
            return answer["source"], answer["fallback"]

        assert source(None) == ("ranked", None)
        assert source(50) == ("retrieved", "deadline")
        assert source(30) == ("popularity", "deadline")
        assert source(1000) == ("ranked", None)


def test_a_rung_that_was_slow_once_is_tried_again(ranked: Path) -> None:
    clock, seconds = Clock(), {"first": 5.0, "second": 0.001}
    with client_of(paced(ranked, clock, seconds)) as client:
        first = client.post("/v1/recommend", json={**TIMED, "deadline_ms": 60_000}).json()
        assert first["source"] == "ranked"
        seconds["first"] = 0.01
        sources = [client.post("/v1/recommend", json=TIMED).json()["source"] for _ in range(307)]
    assert sources[0] == "retrieved"
    assert sources[-1] == "ranked"


def test_a_rung_that_was_slow_once_is_tried_again_though_a_read_takes_of_the_time(ranked: Path) -> None:
    clock, seconds = Clock(), {"first": 5.0, "second": 0.001}
    online = paced(ranked, clock, seconds)
    read = online.service.store.read

    def slow(user_id: str) -> Any:
        clock.now += 0.005
        return read(user_id)

    online.service.store.read = slow  # type: ignore[method-assign]
    with client_of(online) as client:
        assert client.post("/v1/recommend", json={"user_id": "u", "deadline_ms": 60_000}).json()["fallback"] is None
        seconds["first"] = 0.01
        found = [client.post("/v1/recommend", json={"user_id": "u"}).json()["fallback"] for _ in range(307)]
    assert found[0] == "deadline"
    assert found[-1] is None


def test_long_lists_have_a_cost_of_their_own_and_a_new_bundle_none(ranked: Path) -> None:
    clock, seconds = Clock(), {"first": 1.0, "second": 0.001}
    online = paced(ranked, clock, seconds)
    with client_of(online) as client:

        def source(**question: Any) -> str:
            found: str = client.post("/v1/recommend", json={**TIMED, **question}).json()["source"]
            return found

        assert source(k=101) == "ranked"
        seconds["first"] = 0.01
        assert (source(k=101), source(k=100)) == ("retrieved", "ranked")
        seconds["first"] = 1.0
        assert (source(deadline_ms=60_000), source()) == ("ranked", "retrieved")
        arm = online.service.arms.champion
        arm.recommender = slowed(Recommender.load(ranked, threads=1), clock, seconds)
        online.service.swapped("champion")
        assert source() == "ranked"


def test_what_takes_long_is_done_beside_and_is_no_measure(ranked: Path) -> None:
    clock, seconds = Clock(), {"first": 7.0, "second": 0.001}
    online = paced(ranked, clock, seconds)
    threads: list[str] = []
    recommended = online.service.ladder.recommended

    def listen(*words: Any, **options: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return recommended(*words, **options)

    online.service.ladder.recommended = listen  # type: ignore[method-assign]
    with client_of(online) as client:
        for k, diversity in ((101, 0.5), (101, 0.0), (101, None), (100, 0.5)):
            seconds["first"] = 7.0 if len(threads) == 0 else 0.01
            question = {**TIMED, "k": k, "diversity": diversity}
            assert client.post("/v1/recommend", json=question).json()["source"] == "ranked"
    assert [name.startswith("heavy") for name in threads] == [True, False, False, False]


def test_a_long_request_whose_turn_does_not_come_in_time_is_refused_then(bundles: dict[str, Path]) -> None:
    online, held, begun = made(bundles["exact"]), threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        held.wait(60)

    async def run() -> list[tuple[int, dict[bytes, bytes], Any]]:
        service = online.service
        await service.start()
        before = asyncio.create_task(service._heavily(hold))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        question = {"history": [5], "k": 3, "explain": True}
        late = await post(online, {**question, "deadline_ms": 20})
        patient = asyncio.create_task(post(online, {**question, "deadline_ms": 60_000}))
        await asyncio.sleep(0)
        held.set()
        await before
        found = [late, await patient]
        await service.stop()
        return found

    late, patient = asyncio.run(run())
    assert (late[0], late[1][b"retry-after"]) == (503, b"1")
    assert "deadline passed" in late[2]["detail"]
    assert patient[0] == 200


def test_an_explanation_whose_deadline_has_passed_is_not_made(bundles: dict[str, Path]) -> None:
    clock = Clock()
    online = made(bundles["exact"], clock=clock)
    parse = online.service._parse

    def slow(*words: Any) -> Any:
        found = parse(*words)
        clock.now += 0.05
        return found

    online.service._parse = slow  # type: ignore[method-assign]
    question = {"history": [5], "k": 3, "explain": True}
    assert rungs(told(online, {**question, "deadline_ms": 40}, {**question, "deadline_ms": 60_000})) == [
        503,
        ("retrieved", None),
    ]


def test_a_mistake_in_a_rung_is_logged_and_the_next_one_answers(
    ranked: Path, bundles: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    for fail, found in (("first",), ("retrieved", "error")), (("first", "second"), ("popularity", "error")):
        caplog.clear()
        online = paced(ranked, Clock(), {"first": 0.0, "second": 0.0}, fail)
        assert rungs(told(online, TIMED)) == [found]
        assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError] * len(fail)
    with client_of(paced(bundles["exact"], Clock(), {"first": 0.0, "second": 0.0})) as client:  # without a ranker
        assert client.post("/v1/recommend", json={"history": [10**6]}).status_code == 422


def test_three_times_too_much_is_answered_in_time_or_refused(ranked: Path) -> None:
    clock, started = Clock(), 1000.0
    online = paced(ranked, clock, {"first": 0.01, "second": 0.004}, queue=64, deadline_ms=250)
    done: list[tuple[int, float]] = []

    async def one(arrival: float) -> None:
        while clock.now < arrival:
            await asyncio.sleep(0)
        status, _, _ = await post(online, TIMED)
        done.append((status, clock.now - arrival))

    async def idle() -> None:  # time passes while nobody works
        while len(done) < 600:
            if not len(online.service.desk):
                clock.now += 0.0005
            await asyncio.sleep(0)

    async def run() -> None:
        await online.service.start()
        await asyncio.gather(idle(), *(one(started + number / 300) for number in range(600)))
        await online.service.stop()

    asyncio.run(run())
    admitted = sorted(seconds for status, seconds in done if status == 200)
    assert len(admitted) > 300
    assert admitted[int(0.99 * len(admitted))] < 0.25 + 0.01  # it may come while a piece is under way
    assert {status for status, _ in done} <= {200, 503}


def test_filters_hold_on_the_lower_rungs_too(stocked_bundles: dict[str, Path]) -> None:
    online = paced(stocked_bundles["exact"], Clock(), {"first": 0.0, "second": 0.0}, ("first",))
    where, deny = {"brand": ["brand 1", "brand 3"], "in_stock": True}, [21, 33]
    question = {"history": [3, 36], "where": where, "deny": deny, "k": 1000}
    ((status, _, answer),) = told(online, question)
    recommender = Recommender.load(stocked_bundles["exact"])
    best = {item["item_id"] for item in recommender.answer([3, 36], 1000, where=where, deny=deny)["items"]}
    assert status == 200
    assert answer["fallback"] == "error"
    assert {item["item_id"] for item in answer["items"]} == best
    ((status, _, answer),) = told(
        paced(stocked_bundles["exact"], Clock(), {"first": 0.0, "second": 0.0}, ("first",)), {**question, "where": {"x": 1}}
    )
    assert status == 422


def test_so_many_long_requests_may_wait(bundles: dict[str, Path]) -> None:
    online = made(bundles["exact"], heavy=2)
    question = {"history": [5, 7], "k": 3, "explain": True, "deadline_ms": 60_000}
    found = rungs(told(online, *[question] * 5))
    assert found == [("retrieved", None)] * 2 + [503] * 3
