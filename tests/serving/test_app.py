"""The HTTP edge, in process and as a real server."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from features.dataset import Dataset
from recsys.errors import SetupError
from serving.app import BODY, create_app, serve
from serving.engine import Recommender
from serving.export import export
from serving.index import IndexSettings
from tests.serving.conftest import write_run


@pytest.fixture(scope="module")
def recommender(bundles: dict[str, Path]) -> Recommender:
    return Recommender.load(bundles["exact"])


@pytest.fixture(scope="module")
def client(recommender: Recommender) -> Iterator[TestClient]:
    with TestClient(create_app(recommender)) as client:
        yield client


def ask(client: TestClient, **question: Any) -> Any:
    response = client.post("/v1/recommend", json=question)
    assert response.status_code == 200, response.text
    return response.json()


def test_an_answer_is_the_recommenders(client: TestClient, recommender: Recommender) -> None:
    history = [5, 7, 11]
    assert ask(client, history=history, k=13) == recommender.answer(history, 13)
    assert ask(client, titles=[f"Story {item} of 997" for item in history], k=13) == recommender.answer(history, 13)
    assert ask(client)["source"] == "popularity"
    assert len(ask(client)["items"]) == 10


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


def test_conditions_reach_the_recommender_and_are_documented(stocked_run: Path) -> None:
    recommender = Recommender.load(stocked_run)
    with TestClient(create_app(recommender)) as client:
        for where in (
            {"in_stock": True, "price": {"min": 2, "max": 4.5}},
            {"brand": ["brand 1", "brand 3"], "categories": "lamp"},
            {"price": {"max": 2}, "tags": ["3", "5"]},
            {"price": 3},
            {"later": "x"},
            {},
        ):
            assert ask(client, history=[5, 7], k=31, where=where) == recommender.answer([5, 7], 31, where=where)
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
        where = client.get("/openapi.json").json()["components"]["schemas"]["Question"]["properties"]["where"]
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


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ({"history": [10**6]}, "no item '1000000'"),
        ({"titles": ["Storie 5 of 997"]}, "'Story 5 of 997'"),
        ({"deny": ["gone"]}, "no item 'gone'"),
        ({"history": [1], "titles": ["Story 1 of 997"]}, "give one of them"),
        ({"k": 0}, "k"),
        ({"k": 1001}, "k"),
        ({"histroy": [1]}, "histroy"),
        ({"history": [1], "now": 3}, "without times"),
        ({"history": [[1]]}, "history"),
        ({"history": [1], "times": [2**63], "now": 3}, "times"),
        ({"history": [1], "times": [2, 3]}, "2 times for 1 events"),
        ({"titles": ["x" * 501]}, "titles"),
        ({"history": [1] * 10_001}, "history"),
    ],
)
def test_a_wrong_request_gets_one_line(question: dict[str, Any], named: str, client: TestClient) -> None:
    response = client.post("/v1/recommend", json=question)
    assert response.status_code == 422
    assert named in response.json()["detail"]
    assert "\n" not in response.json()["detail"]


def test_a_body_that_is_no_json_or_too_long_or_of_unknown_length_is_refused(client: TestClient) -> None:
    assert client.post("/v1/recommend", content=b"{").status_code == 422
    assert client.post("/v1/recommend", content=b" " * (BODY + 1)).status_code == 413
    assert client.post("/v1/recommend", content=iter([b"{}"])).status_code == 411


def test_health_readiness_and_documents_answer(client: TestClient, recommender: Recommender) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json()["bundle"] == recommender.id
    assert client.get("/docs").status_code == 200
    question = client.get("/openapi.json").json()["components"]["schemas"]["Question"]
    for example in question["examples"]:
        assert client.post("/v1/recommend", json={**example, "ignore_unknown": True}).status_code == 200


@pytest.mark.parametrize("timed", [False, True])
def test_a_real_server_answers_what_the_recommender_does(
    timed: bool, bundles: dict[str, Path], dataset: Dataset, tmp_path: Path
) -> None:
    bundle, question = bundles["ivf"], {"times": [10, 500, 700], "now": 900} if timed else {}
    if timed:
        bundle = tmp_path / "bundle"
        export(write_run(tmp_path / "run", dataset, time="both", request_time=True), bundle, IndexSettings(), dataset)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = f"from pathlib import Path; from serving.app import serve; serve(Path({str(bundle)!r}), port={port})"
    root = Path(__file__).parents[2]
    server = subprocess.Popen([sys.executable, "-c", start], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            for _ in range(600):
                try:
                    client.get("/ready").raise_for_status()
                    break
                except httpx2.TransportError:
                    assert server.poll() is None, server.stdout and server.stdout.read().decode()
                    time.sleep(0.1)
            answer = client.post("/v1/recommend", json={"history": [5, 7, 11], "k": 13, **question}).json()
        assert answer == Recommender.load(bundle).answer([5, 7, 11], 13, **question)
    finally:
        server.terminate()
        output = server.communicate(timeout=30)[0].decode()
    assert "Traceback" not in output


def test_a_busy_port_is_named(bundles: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy, pytest.raises(SetupError, match="cannot listen there"):
        serve(bundles["exact"], "127.0.0.1", busy.getsockname()[1])
