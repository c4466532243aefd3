"""What is answered while the store of histories, or the server of last night's lists, is down, slow or swapped."""

import asyncio
import itertools
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from recsys.errors import StoreError
from serving.app import Online
from serving.delivery import deliver
from serving.engine import Recommender
from serving.history import Event, HistoryStore
from tests.serving.online import Clock, asked, client_of, made, post, told
from tests.serving.servers import redis_server
from tests.serving.writers import lists_of, write_night


def all_lists(dataset: Any, k: int) -> dict[str, list[tuple[int, float]]]:
    return lists_of(dataset.user_ids.to_list(), dataset.items["item_id"].to_list(), k)


class Broken:
    """A store that does not answer while it is told not to."""

    def __init__(self, store: HistoryStore) -> None:
        self.store, self.down, self.asked = store, False, 0
        self.url = store.url

    def __getattr__(self, name: str) -> Any:
        work = getattr(self.store, name)

        def ask(*words: Any) -> Any:
            self.asked += 1
            if self.down:
                raise StoreError("memory: down")
            return work(*words)

        return ask


@pytest.fixture(params=["folder", "redis"])
def last_night(request: pytest.FixtureRequest, dataset: Any, tmp_path: Path) -> Iterator[str]:
    """Where the API finds a list of 7 items of every user."""
    night = write_night(tmp_path / "lists", all_lists(dataset, 7))
    if request.param == "folder":
        yield str(tmp_path / "lists")
        return
    pytest.importorskip("redis", reason="redis: its package is not installed")
    with redis_server() as server:
        deliver(night, server.url)
        yield server.url


def test_without_the_store_lists_come_from_last_night(bundles: dict[str, Path], last_night: str) -> None:
    clock = Clock()
    online = made(bundles["exact"], clock=clock, lists=last_night, watch_seconds=1000)
    store = online.service.pasts.store = Broken(online.service.store)  # type: ignore[assignment]
    event = {"events": [{"user_id": "user 007", "item_id": 5, "time": 7}]}
    assert isinstance(store, Broken)
    with client_of(online) as client:
        store.down = True
        listed = client.post("/v1/recommend", json={"user_id": "user 007", "k": 3, "deny": [0]}).json()
        assert (listed["source"], listed["fallback"]) == ("nightly", "store")
        wanted = [item for item, _ in online.service.lists.of("user 007") if item != 0]  # type: ignore[union-attr]
        assert [item["item_id"] for item in listed["items"]] == wanted[:3]
        filled = client.post("/v1/recommend", json={"user_id": "user 007", "k": 13, "deny": [0, wanted[1]]}).json()
        kept = [item for item in wanted if item != wanted[1]]
        popular = [item["item_id"] for item in Recommender.load(bundles["exact"]).answer([], 31, deny=[0, wanted[1]])["items"]]
        rest = [item for item in popular if item not in kept]
        assert [item["item_id"] for item in filled["items"]] == (kept + rest)[:13]
        assert (filled["source"], [item["rank"] for item in filled["items"]]) == ("nightly", list(range(1, 14)))
        nobody = client.post("/v1/recommend", json={"user_id": "nobody", "k": 3}).json()
        assert (nobody["source"], nobody["fallback"]) == ("popularity", "store")
        assert client.post("/v1/recommend", json={"history": [5]}).json()["fallback"] is None
        before = store.asked
        for _ in range(13):
            assert client.post("/v1/recommend", json={"user_id": "user 007"}).json()["fallback"] == "store"
        assert store.asked == before  # nobody waits for it
        for response in (
            client.post("/v1/events", json=event),
            client.get("/v1/users/x"),
            client.delete("/v1/users/x"),
            client.post("/v1/rank", json={"user_id": "x", "items": [1]}),
            client.post("/v1/recommend", json={"user_id": "x", "explain": True}),
            client.post("/v1/recommend/batch", json={"users": ["x"]}),
        ):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()["store"]) == (200, "unreachable")
        store.down = False
        clock.now += 1
        assert client.post("/v1/events", json=event).json()["added"] == 1
        assert client.get("/ready").json()["store"] == "ok"
        assert client.post("/v1/recommend", json={"user_id": "user 007"}).json()["fallback"] is None


def unreadable(online: Online, user_id: str) -> None:
    """Keep of a user what is no history."""
    online.service.store._blobs.change([user_id], lambda *_: b"\xc1 no list of events")


def test_one_users_unreadable_history_is_an_empty_one_and_nobody_else_s_trouble(
    bundles: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    online, recommender = made(bundles["exact"]), Recommender.load(bundles["exact"], threads=1)
    with client_of(online) as client:
        client.post("/v1/events", json={"events": [{"user_id": "grace", "item_id": 5, "time": 7}]})
        unreadable(online, "canary-ada")
        ada = client.post("/v1/recommend", json={"user_id": "canary-ada"})
        assert (ada.status_code, ada.json()["source"], ada.json()["fallback"]) == (200, "popularity", None)
        grace = client.post("/v1/recommend", json={"user_id": "grace"}).json()
        assert grace["items"] == recommender.answer([5])["items"]
        both = client.post("/v1/recommend/batch", json={"users": ["canary-ada", "grace"]}).json()["answers"]
        assert [answer["source"] for answer in both] == ["popularity", "retrieved"]
        assert both[1]["items"] == grace["items"]
        for refused in (
            client.get("/v1/users/canary-ada"),
            client.post("/v1/events", json={"events": [{"user_id": "canary-ada", "item_id": 5, "time": 7}]}),
        ):
            assert (refused.status_code, "users cannot be read" in refused.json()["detail"]) == (503, True)
        assert client.get("/ready").json()["store"] == "ok"
        assert client.delete("/v1/users/canary-ada").json()["history"] is True
        assert client.get("/v1/users/canary-ada").json()["events"] == []
    said = [record.__dict__["about"] for record in caplog.records if record.message == "history"]
    assert any("unreadable" in each["detail"] for each in said)
    assert "canary-ada" not in str(said)


def test_a_write_that_fails_keeps_nobody_from_reading(bundles: dict[str, Path]) -> None:
    online = made(bundles["exact"], watch_seconds=1000)
    event = {"events": [{"user_id": "u", "item_id": 5, "time": 7}]}

    def full(*_: Any) -> int:
        raise StoreError("memory: full")

    with client_of(online) as client:
        client.post("/v1/events", json=event)
        online.service.store.load = full  # type: ignore[method-assign]
        for _ in range(3):
            assert client.post("/v1/events", json=event).status_code == 503
            assert client.post("/v1/recommend", json={"user_id": "u"}).json()["source"] == "retrieved"
        assert client.get("/ready").json()["store"] == "ok"


def test_large_writes_keep_no_read_of_a_remote_store_waiting(bundles: dict[str, Path]) -> None:
    online, held, writing = made(bundles["exact"]), threading.Event(), threading.Semaphore(0)
    pasts = online.service.pasts
    pasts.remote = True

    def slow(*_: Any) -> int:
        writing.release()
        held.wait(60)
        return 0

    async def run() -> tuple[int, dict[bytes, bytes], Any]:
        service = online.service
        await service.start()
        service.store.append("u", [Event(5, 7)])
        service.store.load = slow  # type: ignore[method-assign]
        event = {"events": [{"user_id": "u", "item_id": 5, "time": 7}]}
        writes = [asyncio.create_task(post(online, event, "/v1/events")) for _ in range(3)]
        for _ in range(2):
            while not writing.acquire(blocking=False):
                await asyncio.sleep(0.001)
        found = await post(online, {"user_id": "u", "deadline_ms": 5000})
        held.set()
        await asyncio.gather(*writes)
        await service.stop()
        return found

    status, _, answer = asyncio.run(run())
    assert (status, answer["source"], answer["fallback"]) == (200, "retrieved", None)
    assert pasts.breaker.whole


def test_a_remote_store_that_is_slow_is_left_alone_by_who_measured_it(bundles: dict[str, Path]) -> None:
    clock = Clock()
    online = made(bundles["exact"], clock=clock, deadline_ms=200)
    pasts, read = online.service.pasts, online.service.store.read
    pasts.remote = True
    for took, whole in ((0.09, True), (0.11, False)):

        def slow(user_id: str, took: float = took) -> Any:
            clock.now += took
            return read(user_id)

        online.service.store.read = slow  # type: ignore[method-assign]
        told(online, {"user_id": "u", "deadline_ms": 60_000})
        assert pasts.breaker.whole == whole


def test_a_swap_between_reading_a_history_and_its_turn_mixes_no_bundles(
    bundles: dict[str, Path], shop_bundles: dict[str, Path]
) -> None:
    wholes = [Recommender.load(path, threads=1) for path in (bundles["exact"], shop_bundles["exact"])]
    history = [Event(item, 10 * place) for place, item in enumerate((5, 7, 11))]
    assert wholes[0].catalogue.by_id(5) != wholes[1].catalogue.by_id(5), "else nothing is mixed"
    for remote in (False, True):
        online = made(bundles["exact"])
        online.service.pasts.remote = remote
        arm, turn = online.service.arms.champion, itertools.count(1)

        def swapping(user_id: str, arm: Any = arm, turn: Any = turn) -> list[Event]:
            arm.recommender = wholes[next(turn) % 2]
            return history

        online.service.store.read = swapping  # type: ignore[method-assign]
        with client_of(online) as client:
            for _ in range(2):
                answer = client.post("/v1/recommend", json={"user_id": "u", "k": 13}).json()
                (whole,) = [each for each in wholes if each.id == answer["bundle"]]
                assert answer["items"] == whole.answer([5, 7, 11], 13)["items"]
                answer = client.post("/v1/recommend", json={"user_id": "u", "k": 3, "explain": True}).json()
                (whole,) = [each for each in wholes if each.id == answer["bundle"]]
                assert [item["item_id"] for item in answer["items"]] == [
                    item["item_id"] for item in whole.answer([5, 7, 11], 3)["items"]
                ]
                assert {event["item_id"] for event in answer["attention"]} == {5, 7, 11}
                answer = client.post("/v1/rank", json={"user_id": "u", "items": list(range(31))}).json()
                (whole,) = [each for each in wholes if each.id == answer["bundle"]]
                wanted = whole.answer([5, 7, 11], 31, allow=list(range(31)), filter_seen=False)["items"]
                assert [item["item_id"] for item in answer["items"]] == [item["item_id"] for item in wanted]


def test_the_store_is_looked_after_without_requests(bundles: dict[str, Path]) -> None:
    online = made(bundles["exact"], watch_seconds=0.01)
    store = online.service.pasts.store = Broken(online.service.store)  # type: ignore[assignment]
    assert isinstance(store, Broken)
    store.down = True
    with client_of(online) as client:
        while client.get("/ready").json()["store"] == "ok":
            pass
        store.down = False
        while client.get("/ready").json()["store"] != "ok":
            pass
    assert store.asked >= 1


def test_looking_after_goes_on_after_a_mistake_of_ours(
    bundles: dict[str, Path], dataset: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_night(tmp_path, all_lists(dataset, 3))
    online = made(bundles["exact"], watch_seconds=0.001, lists=tmp_path)
    looks: list[str] = []

    def fail(name: str) -> bool:
        looks.append(name)
        raise ZeroDivisionError

    online.service.store.check = partial(fail, "store")  # type: ignore[assignment]
    online.service.lists.refresh = partial(fail, "lists")  # type: ignore[method-assign, union-attr]
    with client_of(online) as client:
        while len(looks) < 13:
            client.get("/health")
    assert looks[:4] == ["lists", "store"] * 2
    assert {record.message for record in caplog.records if record.exc_info} == {"lists", "store"}


def test_the_next_night_is_taken_while_it_serves(bundles: dict[str, Path], dataset: Any, tmp_path: Path) -> None:
    write_night(tmp_path, all_lists(dataset, 3))
    with asked(bundles["exact"], lists=tmp_path, watch_seconds=0.01) as client:
        write_night(tmp_path, all_lists(dataset, 7))
        while len(client.app.service.lists.of("user 007")) == 3:  # type: ignore[attr-defined]
            client.get("/health")


@pytest.mark.parametrize("k", [7, 131])
def test_who_has_too_little_time_gets_last_nights_list(bundles: dict[str, Path], last_night: str, k: int, dataset: Any) -> None:
    """Also a diverse one, which is made beside the others."""
    online = made(bundles["exact"], lists=last_night)
    arm = online.service.arms.champion
    view = online.service.ladder.view(arm)
    for name, _ in view.rungs:
        view.cost("recommend" if k <= 100 else "recommend many", name).add(1e6)
    with client_of(online) as client:
        told = client.post("/v1/recommend", json={"user_id": "user 011", "k": k, "diversity": 0.5, "filter_seen": False}).json()
    assert (told["source"], told["fallback"]) == ("nightly", "deadline")
    wanted = [item for item, _ in all_lists(dataset, 7)["user 011"]]
    assert [item["item_id"] for item in told["items"][:7]] == wanted
    assert len(told["items"]) == min(k, arm.recommender.lines)


def test_where_the_lists_server_hangs_or_is_gone_the_most_popular_items_come_in_time(
    bundles: dict[str, Path], dataset: Any, tmp_path: Path
) -> None:
    pytest.importorskip("redis", reason="redis: its package is not installed")
    question = {"user_id": "user 007", "k": 3, "deadline_ms": 1000}
    with redis_server() as server:
        deliver(write_night(tmp_path, all_lists(dataset, 7)), server.url)
        online = made(bundles["exact"], lists=f"{server.url}?socket_timeout=100000", watch_seconds=1000)
        online.service.pasts.store = broken = Broken(online.service.store)  # type: ignore[assignment]
        with client_of(online) as client:
            broken.down = True
            assert client.post("/v1/recommend", json=question).json()["source"] == "nightly"
            server.stop()
            hanging = [client.post("/v1/recommend", json=question) for _ in range(5)]
            assert client.get("/health").status_code == 200
            server.kill()
            gone = [client.post("/v1/recommend", json=question) for _ in range(5)]
            for response in (*hanging, *gone):
                assert (response.status_code, response.json()["source"], response.json()["fallback"]) == (
                    200,
                    "popularity",
                    "store",
                )
            assert client.delete("/v1/users/user%20007").status_code == 503
            server.start()
            deliver(write_night(tmp_path, all_lists(dataset, 5)), server.url)
            while client.post("/v1/recommend", json=question).json()["source"] != "nightly":
                pass
            broken.down = False
            while (erased := client.delete("/v1/users/user%20007")).status_code == 503:
                pass
            assert erased.json()["lists"] is True
            assert client.delete("/v1/users/user%20007").json()["lists"] is False
            broken.down = True
            assert client.post("/v1/recommend", json=question).json()["source"] == "popularity"
            broken.down = False
