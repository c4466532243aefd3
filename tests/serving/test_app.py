"""The HTTP edge, in process."""

import copy
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import msgspec
import polars as pl
import pytest
import torch
from fastapi.testclient import TestClient

from features.dataset import Dataset
from recsys.errors import StoreError
from serving.app import Online
from serving.document import OPERATIONS
from serving.engine import Recommender
from serving.explain import explain
from serving.items import remove
from serving.nights import Night, shard_of, users_file
from serving.views import View
from tests.serving.online import asked, client_of, made
from tests.serving.writers import lists_of, write_night

BODY = 2**20
HOT = ("/v1/recommend", "/v1/similar", "/v1/rank", "/v1/events")


@pytest.fixture(scope="module")
def online(bundles: dict[str, Path]) -> Online:
    return made(bundles["exact"])


@pytest.fixture(scope="module")
def client(online: Online) -> Iterator[TestClient]:
    with client_of(online) as client:
        yield client


@pytest.fixture(scope="module")
def recommender(bundles: dict[str, Path]) -> Recommender:
    return Recommender.load(bundles["exact"], threads=1)


def ask(client: TestClient, path: str = "/v1/recommend", **question: Any) -> Any:
    response = client.post(path, json=question)
    assert response.status_code == 200, response.text
    return response.json()


def happened(client: TestClient, user_id: int | str, *items: int | str, begin: int = 1000) -> None:
    events = [{"user_id": user_id, "item_id": item, "time": begin + place} for place, item in enumerate(items)]
    ask(client, "/v1/events", events=events)


def same(answer: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(answer[name] == other[name] for name in ("bundle", "unknown", "items"))


def test_an_answer_is_the_recommenders(client: TestClient, recommender: Recommender) -> None:
    history = [5, 7, 11]
    assert same(ask(client, history=history, k=13), recommender.answer(history, 13))
    assert same(ask(client, titles=[f"Story {item} of 997" for item in history], k=13), recommender.answer(history, 13))
    assert ask(client, history=history)["source"] == "retrieved"
    assert ask(client)["source"] == "popularity"
    assert len(ask(client)["items"]) == 10


def test_a_kept_history_gives_the_list_of_that_history(client: TestClient, recommender: Recommender) -> None:
    happened(client, "u/1", 5, 7, 11)
    happened(client, 7, 13, "of another shop", 17)
    assert same(ask(client, user_id="u/1", k=13), recommender.answer([5, 7, 11], 13))
    foreign = ask(client, user_id="7", k=13)
    assert foreign["items"] == recommender.answer([13, 17], 13)["items"]
    assert foreign["unknown"] == ["of another shop"]
    assert ask(client, user_id="u/1", now=1001, k=13)["items"] == recommender.answer([5, 7], 13)["items"]
    assert ask(client, user_id="nobody")["source"] == "popularity"


def test_a_ranked_list_says_so(ranked_bundles: dict[str, Path]) -> None:
    recommender, times = Recommender.load(ranked_bundles["companions"], threads=1), [10, 500, 700]
    with asked(ranked_bundles["companions"]) as client:
        answer = ask(client, history=[5, 7, 11], times=times, k=13)
        assert answer["source"] == "ranked"
        assert same(answer, recommender.answer([5, 7, 11], 13, times=times))
        assert client.get("/v1/bundle").json()["arms"][0]["ranker"] is True


def test_every_option_reaches_the_recommender(client: TestClient, recommender: Recommender) -> None:
    first = [item["item_id"] for item in ask(client, history=[5, 7])["items"]]
    assert first[0] not in [item["item_id"] for item in ask(client, history=[5, 7], deny=first[:1])["items"]]
    assert [item["item_id"] for item in ask(client, history=[5, 7], allow=first[3:5])["items"]] == first[3:5]
    assert {5, 7} <= {item["item_id"] for item in ask(client, history=[5, 7], k=1000, filter_seen=False)["items"]}
    assert not {5, 7} & {item["item_id"] for item in ask(client, history=[5, 7], k=1000)["items"]}
    late = ask(client, history=[5, 7], times=[10, 20], now=15)
    assert late["items"] == recommender.answer([5])["items"]
    ignored = ask(client, history=[5, 10**6, "no"], ignore_unknown=True)
    assert ignored["unknown"] == [10**6, "no"]
    assert ignored["items"] == recommender.answer([5])["items"]
    for option in ({"diversity": 0.7}, {"popularity": 2.5}):
        assert ask(client, history=[5, 7], k=31, **option)["items"] == recommender.answer([5, 7], 31, **option)["items"]  # type: ignore[arg-type]
    calibrated = recommender.calibration is not None
    response = client.post("/v1/recommend", json={"history": [5], "probabilities": True})
    assert ("probability" in response.text) == calibrated == (response.status_code == 200)


def test_conditions_reach_the_recommender_and_are_documented(stocked_bundles: dict[str, Path]) -> None:
    recommender = Recommender.load(stocked_bundles["exact"], threads=1)
    with asked(stocked_bundles["exact"]) as client:
        for where in (
            {"in_stock": True, "price": {"min": 2, "max": 4.5}},
            {"brand": ["brand 1", "brand 3"], "categories": "lamp"},
            {"price": {"max": 2}, "tags": ["3", "5"]},
            {"price": 3},
            {"later": "x"},
            {},
        ):
            assert same(ask(client, history=[5, 7], k=31, where=where), recommender.answer([5, 7], 31, where=where))
        for wrong, named in (
            ({"stock": True}, "items have no 'stock'; did you mean in_stock?"),
            ({"in_stock": "yes"}, "'in_stock' holds true or false, found 'yes'"),
            ({"price": {"mn": 2}}, "'price' is {'mn': 2}"),
            ({"categories": ["lamb"]}, "nearest: 'lamp'"),
            ({"brand": ["x"] * 1001}, "at most 1000"),
            ({"brand": {"x": {"y": "z" * 1000}}}, "have no range"),
            ({f"name {number}": 1 for number in range(51)}, "where"),
            ({"x" * 501: 1}, "where"),
            (["in_stock"], "where"),
        ):
            response = client.post("/v1/recommend", json={"history": [5], "where": wrong})
            assert response.status_code == 422
            assert named in response.json()["detail"]
            assert "\n" not in response.json()["detail"]
            assert len(response.json()["detail"]) < 700
        assert client.post("/v1/recommend", content=b'{"where": {"price": {"min": NaN}}}').status_code == 422
        where = client.get("/openapi.json").json()["components"]["schemas"]["Recommend"]["properties"]["where"]
        kinds = {name: each["kind"] for name, each in client.get("/v1/filters").json()["filters"].items()}
        filters = client.get("/v1/filters").json()["filters"]
    assert where["maxProperties"] == 50
    assert [kind["type"] for kind in where["additionalProperties"]["anyOf"]] == [
        "boolean",
        "number",
        "string",
        "array",
        "object",
    ]
    recommender.catalogue.attributes.meeting(
        {"categories": "lamp", **{name: where["examples"][0][name] for name in ("in_stock", "price")}}
    )
    texts = dict.fromkeys(("categories", "brand", "tags"), "text")
    assert kinds == {**texts, "in_stock": "boolean", "price": "number", "later": "nothing"}
    assert (filters["price"]["min"], filters["price"]["max"]) == (0, 6)
    assert sorted(filters["brand"]["values"]) == [f"brand {number}" for number in range(5)]
    for value in filters["categories"]["values"]:
        assert bool(recommender.catalogue.attributes.meeting({"categories": value}).any())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ({"history": [10**6]}, "no item '1000000'"),
        ({"titles": ["Storie 5 of 997"]}, "'Story 5 of 997'"),
        ({"deny": ["gone"]}, "no item 'gone'"),
        ({"history": [1], "titles": ["Story 1 of 997"]}, "give one of them"),
        ({"history": [1], "user_id": "x"}, "give one of them"),
        ({"user_id": "x", "times": [1]}, "leave them out"),
        ({"user_id": "x", "deny": ["gone"]}, "no item 'gone'"),
        ({"user_id": "é" * 300}, "600 bytes"),
        ({"user_id": ""}, "user_id"),
        ({"arm": "challenger"}, "ask for champion"),
        ({"k": 21, "explain": True, "history": [5]}, "at most 20"),
        ({"k": 0}, "k"),
        ({"k": 1001}, "k"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"histroy": [1]}, "histroy"),
        ({"history": [1], "now": 3}, "without times"),
        ({"history": [[1]]}, "history"),
        ({"history": [1], "times": [2**63], "now": 3}, "times"),
        ({"history": [1], "times": [2, 3]}, "2 times for 1 events"),
        ({"titles": ["x" * 501]}, "titles"),
        ({"history": [1] * 10_001}, "history"),
        ({"history": [2**63]}, "history"),
    ],
)
def test_a_wrong_request_gets_one_line(question: dict[str, Any], named: str, client: TestClient) -> None:
    response = client.post("/v1/recommend", json=question)
    assert response.status_code == 422
    assert named in response.json()["detail"]
    assert "\n" not in response.json()["detail"]


@pytest.mark.parametrize("path", [*HOT, "/v1/recommend/batch", "/v1/items"])
def test_a_body_that_is_no_json_or_too_long_or_of_unknown_length_is_refused(path: str, client: TestClient) -> None:
    bombs = [b"[" * 100_000, b'{"where":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}", b'{"history":["\xff"]}', b"\xff\xfe"]
    for content in [b"{", b"", b"null", b'"x"', *bombs]:
        response = client.post(path, content=content)
        assert response.status_code == 422, content[:20]
        assert "\n" not in response.json()["detail"]
    assert client.post(path, content=b" " * (BODY + 1)).status_code == 413
    assert client.post(path, content=iter([b"{}"])).status_code == 411


def test_a_body_that_does_not_come_is_not_waited_for(bundles: dict[str, Path]) -> None:
    online = made(bundles["exact"], body_seconds=0.01)
    sent: list[Any] = []

    async def never() -> Any:
        await anyio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    for path in ("/v1/recommend", "/v1/recommend/batch"):
        raw = [(b"content-length", b"7")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": raw, "query_string": b"", "client": ("here", 1)}
        anyio.run(online, scope, never, send)
        start, body = sent[-2:]
        assert start["status"] == 408
        assert (b"connection", b"close") in start["headers"]
        assert b"within 0.01 seconds" in body["body"]


def call(online: Online, path: str, headers: dict[str, str], *parts: bytes) -> tuple[int, int]:
    """Status of a request whose body comes in parts, and how many were read; behind them the client is gone."""
    sent: list[Any] = []
    left = list(parts)

    async def receive() -> Any:
        if not left:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": left.pop(0), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw, "query_string": b"", "client": ("here", 1)}
    anyio.run(online, scope, receive, send)
    return sent[0]["status"], len(parts) - len(left)


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/recommend/batch"])
def test_a_body_is_refused_before_it_is_read_or_as_soon_as_it_lied(path: str, online: Online) -> None:
    assert call(online, path, {"content-length": str(BODY + 1)}, b"x") == (413, 0)
    assert call(online, path, {"content-length": "-1"}, b"x") == (413, 0)
    assert call(online, path, {"content-length": "9" * 5000}, b"x") == (413, 0)
    assert call(online, path, {"transfer-encoding": "chunked"}, b"x") == (411, 0)
    assert call(online, path, {"content-length": "7"}, b"{}", b" ") == (400, 2)  # fewer bytes, then gone
    assert call(online, path, {"content-length": "2"}, b"{} ", *[b" " * 1000] * 1000) == (400, 1)


def test_body_bytes_is_the_most_that_is_read(bundles: dict[str, Path]) -> None:
    with asked(bundles["exact"], body_bytes=1009) as client:
        assert client.post("/v1/recommend", content=b"{}" + b" " * 1007).status_code == 200
        assert client.post("/v1/recommend", content=b"{}" + b" " * 1008).status_code == 413


def test_health_readiness_and_documents_answer(client: TestClient, recommender: Recommender) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    ready = client.get("/ready").json()
    assert (ready["status"], ready["bundle"], ready["items"], ready["store"]) == ("ready", recommender.id, 997, "ok")
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name, path in (("Recommend", "/v1/recommend"), ("Rank", "/v1/rank")):
        for example in schemas[name]["examples"]:
            assert client.post(path, json={**example, "ignore_unknown": True}).status_code == 200
    for example in schemas["Events"]["examples"]:
        assert client.post("/v1/events", json=example).status_code == 200
    assert client.get("/docs").status_code == 404  # it would read a page of another host


def test_every_answer_is_of_the_form_that_the_document_says(client: TestClient, recommender: Recommender) -> None:
    happened(client, "form", 5, 7)
    forms = {each.name: each.answer for each in OPERATIONS}
    answers = {
        "recommend": client.post("/v1/recommend", json={"user_id": "form", "explain": True}),
        "batch": client.post("/v1/recommend/batch", json={"users": ["form", "nobody"]}),
        "similar": client.post("/v1/similar", json={"item_id": 5}),
        "rank": client.post("/v1/rank", json={"user_id": "form", "items": [1, 2, 3]}),
        "events": client.post("/v1/events", json={"events": [{"user_id": "form", "item_id": 5}]}),
        "find_items": client.get("/v1/items", params={"q": "story"}),
        "item": client.get("/v1/items/5"),
        "filters": client.get("/v1/filters"),
        "user": client.get("/v1/users/form"),
        "erase": client.delete("/v1/users/form"),
        "bundle": client.get("/v1/bundle"),
        "health": client.get("/health"),
        "ready": client.get("/ready"),
    }
    for name, response in answers.items():
        assert response.status_code == 200, (name, response.text)
        form = forms[name]
        assert form is not None
        known = set(form.__struct_fields__)
        assert set(response.json()) <= known, name
        msgspec.json.decode(response.content, type=form)


def test_a_request_id_comes_back_or_is_made(client: TestClient) -> None:
    for path in ("/v1/recommend", "/health", "/nowhere"):
        made_up = [client.post(path, json={}).headers["x-request-id"] for _ in range(3)]
        assert len(set(made_up)) == 3
        given = client.post(path, json={}, headers={"x-request-id": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        for wrong in ("x" * 101, "a b", ""):
            assert client.post(path, json={}, headers={"x-request-id": wrong}).headers["x-request-id"] != wrong


def test_other_paths_and_methods_are_refused_in_json(client: TestClient) -> None:
    for path in ("/nowhere", "/v1", "/v1/", "/v1/recommend/", "/docs", "/v1/items/5/x"):
        response = client.get(path)
        assert response.status_code == 404, path
        assert response.json()["detail"]
    for each in OPERATIONS:
        path = each.path.replace("{item_id}", "5").replace("{user_id}", "5")
        allowed = {other.method for other in OPERATIONS if other.path == each.path}
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"} - allowed:
            response = client.request(method, path)
            assert response.status_code == 405, (method, path)
            assert response.headers["allow"] == ", ".join(other.method for other in OPERATIONS if other.path == each.path)
            assert response.json()["detail"]


def test_items_are_put_in_order_as_lists_have_them(client: TestClient, recommender: Recommender) -> None:
    whole = [item["item_id"] for item in recommender.answer([5, 7, 11], 997, filter_seen=False)["items"]]
    some = [13, 5, 800, 2, 401]
    ranked = ask(client, "/v1/rank", history=[5, 7, 11], items=some + some[:2])
    assert [item["item_id"] for item in ranked["items"]] == [item for item in whole if item in some]
    assert [item["rank"] for item in ranked["items"]] == [1, 2, 3, 4, 5]
    all_of_them = ask(client, "/v1/rank", history=[5, 7, 11], items=list(range(997)))
    assert [item["item_id"] for item in all_of_them["items"]] == whole  # so many that a thread of its own does it
    assert client.post("/v1/rank", json={"items": ["gone"]}).status_code == 422
    assert ask(client, "/v1/rank", items=["gone"], ignore_unknown=True)["unknown"] == ["gone"]


def test_similar_items_are_the_recommenders(client: TestClient, recommender: Recommender) -> None:
    row = recommender.catalogue.by_id(5)
    assert row is not None
    found = recommender.similar(row, 13, [3], None, None)
    told = ask(client, "/v1/similar", item_id=5, k=13, deny=[1])
    assert [(item["item_id"], item["score"]) for item in told["items"]] == [
        (recommender.catalogue.item_id(other), pytest.approx(score)) for other, score in found
    ]
    assert 5 not in [item["item_id"] for item in told["items"]]
    assert (told["item_id"], told["title"]) == (5, "Story 5 of 997")


def test_a_batch_has_each_users_own_list(client: TestClient, recommender: Recommender) -> None:
    happened(client, "b1", 5, 7, 11)
    happened(client, 2, 13, "gone")
    told = ask(client, "/v1/recommend/batch", users=["b1", 2, "nobody"], k=13, deny=[1])["answers"]
    assert [answer["source"] for answer in told] == ["retrieved", "retrieved", "popularity"]
    assert same(told[0], recommender.answer([5, 7, 11], 13, deny=[1]))
    assert told[1]["items"] == recommender.answer([13], 13, deny=[1])["items"]
    assert told[1]["unknown"] == ["gone"]


def test_a_batch_of_more_places_than_one_may_ask_for_is_refused(client: TestClient) -> None:
    response = client.post("/v1/recommend/batch", json={"users": list(range(101)), "k": 991})
    assert response.status_code == 422
    assert "101 users by k of 991 are more than 100000 places" in response.json()["detail"]


def test_a_large_batch_is_asked_for_in_parts_and_each_list_is_the_same(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    recommend = Recommender.recommend

    def listen(self: Recommender, histories: Any, *words: Any, **options: Any) -> Any:
        sizes.append(len(histories))
        return recommend(self, histories, *words, **options)

    with asked(bundles["exact"]) as client:
        users = [f"u{number}" for number in range(67)]
        for number, user in enumerate(users):
            happened(client, user, number, 5)
        monkeypatch.setattr(Recommender, "recommend", listen)
        answers = ask(client, "/v1/recommend/batch", users=users, k=3)["answers"]
        assert sizes == [32, 32, 3]
        assert answers[37]["items"] == ask(client, user_id="u37", k=3)["items"]


def test_of_events_with_a_wrong_user_among_them_none_is_kept(client: TestClient) -> None:
    events = [
        {"user_id": user, "item_id": 5, "time": 7} for user in [*(f"wrong {number}" for number in range(1009)), "é" * 300]
    ]
    response = client.post("/v1/events", json={"events": events})
    assert response.status_code == 422
    assert "600 bytes" in response.json()["detail"]
    assert client.get("/v1/users/wrong%200").json()["events"] == []


def test_events_are_kept_once_and_counted(client: TestClient) -> None:
    events = [
        {"user_id": "e", "item_id": 5, "time": 20, "event_id": "a"},
        {"user_id": "e", "item_id": "gone", "time": 10},
        {"user_id": 3, "item_id": "7"},
    ]
    assert ask(client, "/v1/events", events=events[:2]) == {"added": 2, "known": 1, "unknown": 1}
    assert ask(client, "/v1/events", events=events[:2])["added"] == 0
    assert ask(client, "/v1/events", events=events) == {"added": 1, "known": 2, "unknown": 1}
    told = client.get("/v1/users/e").json()
    assert [(event["item_id"], event["time"]) for event in told["events"]] == [("gone", 10), (5, 20)]
    assert [event["title"] for event in told["events"]] == [None, "Story 5 of 997"]


@pytest.mark.parametrize("user", ["a/b", "a\nb", "\n", "..", "a?b#c", "é %", "x" * 500, " "])
def test_any_id_can_be_asked_for_and_erased_by_its_path(user: str, client: TestClient) -> None:
    happened(client, user, 5)
    path = f"/v1/users/{quote(user, safe='').replace('.', '%2E')}"
    assert client.get(path).json()["user_id"] == user
    assert len(client.get(path).json()["events"]) == 1
    assert client.delete(path).json()["history"] is True
    assert client.get(path).json()["events"] == []


def test_keep_is_how_many_events_of_a_user_are_kept(bundles: dict[str, Path]) -> None:
    with asked(bundles["exact"], keep=3) as client:
        happened(client, "u", 5, 7, 11, 13)
        assert [event["item_id"] for event in client.get("/v1/users/u").json()["events"]] == [7, 11, 13]


def test_reasons_are_the_largest_drops_and_attention_the_models(client: TestClient, recommender: Recommender) -> None:
    history = [5, 7, 11, 13, 17, 19]
    answer = ask(client, history=history, k=5, explain=True)
    assert [item["item_id"] for item in answer["items"]] == [
        item["item_id"] for item in recommender.answer(history, 5)["items"]
    ]
    item = answer["items"][1]
    found = explain(recommender, history, torch.Generator().manual_seed(0), item=item["item_id"])
    drops = {event["event"]: event["drop"] for event in found.events}
    largest = [number for number in sorted(drops, key=lambda number: -drops[number]) if drops[number] > 0][:3]
    assert [reason["event"] for reason in item["reasons"]] == largest
    assert [reason["drop"] for reason in item["reasons"]] == pytest.approx([drops[number] for number in largest], rel=1e-4)
    assert [event["share"] for event in answer["attention"]] == pytest.approx(
        [event["attention"] for event in found.events], rel=1e-4
    )
    layers = torch.tensor([event["layers"] for event in answer["attention"]])
    assert torch.allclose(layers.permute(1, 2, 0), found.weights_LHSS[:, :, -1], atol=1e-6)


def test_explanations_work_with_a_ranker_and_count_events_of_the_whole_history(ranked_bundles: dict[str, Path]) -> None:
    with asked(ranked_bundles["look"]) as client:
        happened(client, "u", *range(2, 63))
        answer = ask(client, user_id="u", k=2, explain=True)
    assert answer["source"] == "ranked"
    assert [event["event"] for event in answer["attention"]] == list(range(12, 62))
    assert sum(event["share"] for event in answer["attention"]) == pytest.approx(1)
    for item in answer["items"]:
        drops = [reason["drop"] for reason in item["reasons"]]
        assert drops == sorted(drops, reverse=True)


def test_explained_items_have_their_categories(shop_bundles: dict[str, Path]) -> None:
    with asked(shop_bundles["exact"]) as client:
        for history in ([0, 7, 1], []):
            for item in ask(client, history=history, k=7, explain=True)["items"]:
                assert item["categories"] == client.get(f"/v1/items/{item['item_id']}").json()["categories"] != []
        assert "categories" not in ask(client, history=[0])["items"][0]
        assert ask(client, history=[0], allow=[], explain=True)["items"] == []


def test_titles_are_found_by_any_part_in_any_case_most_popular_first(client: TestClient, recommender: Recommender) -> None:
    names = recommender.catalogue.names
    titles = [names.title(line) for line in range(len(names))]
    for part in ("STORY 9", "99", "of 997", "y 5 o", ""):
        expected = [title for title in titles if part.casefold() in title.casefold()][:20]
        assert [hit["title"] for hit in client.get("/v1/items", params={"q": part}).json()["items"]] == expected
    assert client.get("/v1/items", params={"q": "nothing of the kind"}).json() == {"items": []}
    assert client.get("/v1/items", params={"q": "of 997\nStory"}).json() == {"items": []}  # not across titles
    assert len(client.get("/v1/items", params={"q": "s", "limit": 7}).json()["items"]) == 7
    for wrong in ({"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"q": "x" * 501}, {"other": "1"}):
        assert client.get("/v1/items", params=wrong).status_code == 422
    assert client.get("/v1/items/5").json()["title"] == "Story 5 of 997"
    assert client.get("/v1/items/gone").status_code == 404


def test_what_cannot_be_recommended_is_not_found(recommender: Recommender) -> None:
    view = View(copy.copy(recommender))
    gone = view.search("story", 7)[3]
    view.recommender.live_V = torch.ones(recommender.lines, dtype=torch.bool)
    view.recommender.live_V[[hit == gone for hit in view.search("story", 7)].index(True)] = False
    assert gone not in view.search("story", 100)
    assert view.recommends(recommender.lines - 1)
    assert not view.recommends(recommender.lines)


def test_titles_and_filters_of_a_new_bundle_are_made_beside_the_loop(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    complete = View.complete

    def listen(self: View) -> View:
        threads.append(threading.get_ident())
        return complete(self)

    monkeypatch.setattr(View, "complete", listen)
    online = made(bundles["exact"])

    async def run() -> None:
        await online.service.filters()
        await online.service.find_items("story", 7)
        assert len(threads) == 1
        assert threading.get_ident() not in threads

    anyio.run(run)
    arm = online.service.arms.champion
    assert arm.refresh(force=True)
    assert online.service.ladder.view(arm).whole


def test_items_change_while_it_serves(shop_bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(shop_bundles["exact"], bundle)
    lamp = {"item_id": 7001, "title": "brass desk lamp with a green shade", "kind": "lamp", "price": 0.0}
    with asked(bundle) as client:
        before = client.get("/ready").json()
        added = client.post("/v1/items", json={"items": [lamp]})
        assert added.status_code == 200, added.text
        assert added.json()["changes"] == {"added": 1, "unknown": 0}
        after = client.get("/ready").json()
        assert after["bundle"] == added.json()["bundle"] != before["bundle"]
        assert after["items"] == before["items"] + 1
        assert client.get("/v1/items", params={"q": "green shade", "limit": 100}).json()["items"][-1]["item_id"] == 7001
        assert 7001 in [item["item_id"] for item in ask(client, history=[0, 7], k=100)["items"]]
        assert client.post("/v1/items", json={"items": [lamp]}).status_code == 422
        updated = client.put("/v1/items", json={"items": [{**lamp, "title": "another lamp"}]})
        assert updated.json()["changes"]["updated"] == 1
        assert client.get("/v1/items/7001").json()["title"] == "another lamp"
        wrong = client.put("/v1/items", json={"items": [{"item_id": 7001, "nothing": "here"}]})
        assert wrong.status_code == 422
        assert str(tmp_path) not in wrong.text
        assert "/tmp" not in wrong.text
        assert client.delete("/v1/items/7001").json()["changes"] == {"removed": 1}
        assert 7001 not in [item["item_id"] for item in ask(client, history=[0, 7], k=100)["items"]]
        assert client.get("/v1/items/7001").json()["recommended"] is False
        assert client.delete("/v1/items/gone").status_code == 404


@pytest.mark.parametrize(
    ("path", "question"),
    [
        ("/v1/similar", {"item_id": 5}),
        ("/v1/recommend", {"history": [5], "k": 3, "explain": True}),
        ("/v1/recommend/batch", {"users": ["u", "v"]}),
    ],
)
def test_an_answer_is_of_the_bundle_that_was_live_when_it_was_begun(
    bundles: dict[str, Path], path: str, question: dict[str, Any]
) -> None:
    online, reads = made(bundles["exact"]), []
    arm = online.service.arms.champion
    live = arm.recommender

    class Watched(type(arm)):  # type: ignore[misc]
        @property
        def recommender(self) -> Recommender:
            reads.append(path)
            return live

    with client_of(online) as client:
        arm.__class__ = Watched
        ask(client, path, **question)
    assert reads == [path]


def test_items_of_a_registered_bundle_and_of_one_without_descriptions_do_not_change(bundles: dict[str, Path]) -> None:
    new = {"items": [{"item_id": 7001, "title": "x"}]}
    with asked(bundles["exact"], addresses={"champion": "models:/recsys@champion"}) as client:
        for response in (client.post("/v1/items", json=new), client.delete("/v1/items/5")):
            assert response.status_code == 409
            assert "registry" in response.json()["detail"]
    with asked(bundles["exact"]) as client:
        response = client.post("/v1/items", json=new)
        assert response.status_code == 409
        assert "reads no descriptions" in response.json()["detail"]


def test_the_challenger_serves_its_share_and_who_asks(bundles: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundles["exact"], other)
    remove(other, [0])
    with asked(bundles["exact"], challenger=other, share=0.37) as client:
        told = client.get("/v1/bundle").json()
        ids = {arm["name"]: arm["bundle"] for arm in told["arms"]}
        assert told["share"] == 0.37
        assert ids["champion"] != ids["challenger"]
        for name, bundle in ids.items():
            answer = ask(client, history=[5], arm=name)
            assert (answer["arm"], answer["bundle"]) == (name, bundle)
        users = [f"user {number}" for number in range(499)]
        arms = [ask(client, user_id=user, k=1)["arm"] for user in users]
        assert arms == [ask(client, user_id=user, k=1)["arm"] for user in users]
        assert 0.25 < arms.count("challenger") / len(arms) < 0.5
        batch = ask(client, "/v1/recommend/batch", users=users, k=1)["answers"]
        assert [answer["arm"] for answer in batch] == arms
        assert ask(client, "/v1/recommend/batch", users=users[:3], arm="challenger")["answers"][2]["arm"] == "challenger"
        salted = [client.get(f"/v1/users/{user}").json()["arm"] for user in users[:101]]
        assert salted == arms[:101]
    with asked(bundles["exact"], challenger=other, share=0.37, salt="other") as client:
        assert [ask(client, user_id=user, k=1)["arm"] for user in users] != arms


def test_the_page_is_served_with_a_policy_and_asked_after(bundles: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>hello")
    (tmp_path / "page.js").write_text("hello()")
    (tmp_path / "secret.txt").write_text("no")
    (tmp_path.parent / "outside.js").write_text("no")
    with asked(bundles["exact"], page=tmp_path) as client:
        page = client.get("/")
        assert page.text == "<p>hello"
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'self'" in page.headers["content-security-policy"]
        script = client.get("/page/page.js")
        assert script.headers["content-type"].startswith("text/javascript")
        again = client.get("/page/page.js", headers={"if-none-match": script.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for name in ("secret.txt", "gone.js", "../outside.js", "%2e%2e/outside.js", "..%2foutside.js", "x/page.js"):
            assert client.get(f"/page/{name}").status_code == 404, name


def test_a_mistake_of_ours_is_one_line_and_the_next_request_is_answered(bundles: dict[str, Path]) -> None:
    online = made(bundles["exact"])

    async def fail(*_: Any) -> bytes:
        raise ZeroDivisionError("canary-7")

    online._hot["POST", "/v1/similar"] = fail
    online.service.filters = fail  # type: ignore[method-assign]
    with client_of(online) as client:
        for response in (client.post("/v1/similar", json={"item_id": 5}), client.get("/v1/filters")):
            assert response.status_code == 500
            assert "canary-7" not in response.text
            assert response.headers["x-request-id"]
        assert ask(client, history=[5])["source"] == "retrieved"


def test_where_nothing_can_be_written_changes_are_503_and_the_log_says_why(
    shop_bundles: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(shop_bundles["exact"], tmp_path / "bundle")
    with asked(tmp_path / "bundle") as client:
        (tmp_path / ".bundle.lock").mkdir()
        for refused in (
            client.post("/v1/items", json={"items": [{"item_id": 7001, "title": "x", "kind": "lamp", "price": 0.0}]}),
            client.delete("/v1/items/5"),
        ):
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "60"
            assert str(tmp_path) not in refused.text
    said = [record.__dict__["about"]["detail"] for record in caplog.records if record.message == "unable"]
    assert len(said) == 2
    assert "cannot be written" in said[0]


def test_an_erasure_that_fails_on_the_lists_says_so_forgets_and_is_done_when_asked_again(
    bundles: dict[str, Path], dataset: Dataset, tmp_path: Path
) -> None:
    folder = tmp_path / "lists"
    write_night(folder, lists_of(dataset.user_ids.to_list(), dataset.items["item_id"].to_list(), 7))
    online = made(bundles["exact"], lists=folder, record_every=1)
    arm = online.service.arms.champion
    with client_of(online) as client:

        def read() -> bool:
            reader = arm.recommender.reader
            assert reader is not None
            return bool(reader.kept.bytes or online.service.arms.requests.kept)

        happened(client, "user 007", *range(2, 43))
        ask(client, user_id="user 007")
        assert read()
        (folder / ".live.lock").unlink()
        (folder / ".live.lock").mkdir()
        refused = client.delete("/v1/users/user%20007")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "60")
        assert "still hold the user; erase again" in refused.json()["detail"]
        assert str(tmp_path) not in refused.text
        assert not read()
        (folder / ".live.lock").rmdir()
        assert client.delete("/v1/users/user%20007").json() == {"user_id": "user 007", "history": False, "lists": True}
        file = Night.open(folder).path / users_file(shard_of("user 011", 3))
        whole = file.read_bytes()
        file.write_bytes(b"no lists")
        assert client.delete("/v1/users/user%20011").status_code == 503
        file.write_bytes(whole)
        assert client.delete("/v1/users/user%20011").json()["lists"] is True


def test_an_erasure_that_the_store_refuses_empties_the_memory_all_the_same(bundles: dict[str, Path]) -> None:
    online = made(bundles["exact"], record_every=1)

    def down(user_id: str) -> bool:
        raise StoreError("memory: down")

    online.service.store.erase = down  # type: ignore[method-assign]
    reader = online.service.arms.champion.recommender.reader
    assert reader is not None
    with client_of(online) as client:
        ask(client, history=list(range(2, 43)))
        assert reader.kept.bytes
        assert client.delete("/v1/users/u").status_code == 503
        assert (reader.kept.bytes, online.service.arms.requests.kept) == (0, [])


def test_an_erased_user_is_found_nowhere(
    bundles: dict[str, Path], dataset: Dataset, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    user, others = "user 007", [f"user {number:03}" for number in (3, 5, 11, 101)]
    folder = tmp_path / "work"
    folder.mkdir()
    lists = lists_of(dataset.user_ids.to_list(), dataset.items["item_id"].to_list(), 7)
    write_night(folder / "lists", lists)
    write_night(folder / "lists", lists, 5)
    store = f"{kind}:{folder / 'store'}"
    with asked(bundles["exact"], store=store, lists=folder / "lists", record_every=1) as client:
        for each in [*others, user, *others]:
            items = [{"user_id": each, "item_id": item, "time": item, "event_id": f"{each} event {item}"} for item in range(41)]
            ask(client, "/v1/events", events=items)
            ask(client, user_id=each)
        first = client.delete(f"/v1/users/{user}")
        assert first.json() == {"user_id": user, "history": True, "lists": True}
        second = client.delete(f"/v1/users/{user}")
        assert (second.status_code, second.json()) == (200, {"user_id": user, "history": False, "lists": False})
        assert client.get(f"/v1/users/{user}").json()["events"] == []
        assert ask(client, user_id=user)["source"] == "popularity"
        assert user not in json.dumps([client.get(path).text for path in ("/metrics", "/v1/bundle", "/ready")])
        found = [file.name for file in folder.rglob("*") if file.is_file() and user.encode() in file.read_bytes()]
        assert found == []
        tables = [pl.read_parquet(path)["user_id"] for path in (folder / "lists" / "nights").glob("*/*.parquet")]
        assert len(tables) == 2 * (3 + 5)
        assert not any(user in table for table in tables)  # whose bytes are packed
        assert {user} | set().union(*tables) == set(dataset.user_ids)
        for each in others:
            assert len(client.get(f"/v1/users/{each}").json()["events"]) == 41
            assert any(each.encode() in file.read_bytes() for file in folder.rglob("*") if file.is_file())
    assert user not in "".join(capfd.readouterr())


@pytest.fixture(params=["sqlite", "lmdb"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "lmdb":
        pytest.importorskip("lmdb", reason="LMDB is not installed")
    return str(request.param)
