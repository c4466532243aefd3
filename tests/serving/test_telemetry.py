"""What the online API tells of itself, and of whom it tells nothing."""

import io
import json
import logging
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from recsys.errors import SetupError
from serving.app import Online
from serving.history import Event
from serving.items import remove
from serving.keys import add
from serving.telemetry import LOG, Lines, Tracer, about, tracer
from tests.serving.online import client_of, made


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What is logged, as it is written."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines())
    logger = logging.getLogger("recsys")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


def figures(client: TestClient) -> dict[str, float]:
    """Every figure by its name and labels."""
    told = client.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    parts = (line.rpartition(" ") for line in told.text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in parts}


def test_every_request_is_counted_by_what_became_of_it(bundles: dict[str, Path]) -> None:
    with client_of(made(bundles["exact"])) as client:
        for question in ({"history": [5]}, {"history": [5, 7]}, {}, {"histroy": []}):
            client.post("/v1/recommend", json=question)
        client.post("/v1/recommend", json={"history": [5], "allow": [1, 2, 3]})
        events = [{"user_id": "u", "item_id": item, "time": item} for item in (5, 7, 11)]
        client.post("/v1/events", json={"events": events})
        client.get("/v1/users/u")
        client.get("/nowhere/at/all")
        client.get("/v1/recommend")
        told = figures(client)
    assert told['recsys_requests_total{arm="champion",route="/v1/recommend",status="200"}'] == 4
    assert told['recsys_requests_total{arm="",route="/v1/recommend",status="422"}'] == 1
    assert told['recsys_requests_total{arm="",route="/v1/users/{user_id}",status="200"}'] == 1
    assert told['recsys_requests_total{arm="",route="other",status="404"}'] == 1
    assert told['recsys_requests_total{arm="",route="other",status="405"}'] == 1
    assert told['recsys_request_seconds_count{route="/v1/recommend"}'] == 5
    assert told['recsys_request_seconds_bucket{le="+Inf",route="/v1/recommend"}'] == 5
    assert told['recsys_answers_total{source="retrieved"}'] == 3
    assert told['recsys_answers_total{source="popularity"}'] == 1
    assert told["recsys_underfilled_total"] == 1
    assert told["recsys_events_added_total"] == 3
    assert told["recsys_queue_length"] == 0
    seconds = [told[f'recsys_stage_seconds_count{{stage="{stage}"}}'] for stage in ("parse", "wait", "write")]
    assert seconds == [5, 4, 4]  # the events were parsed too
    assert [name for name in told if "recsys_bundle{" in name and 'arm="champion"' in name]
    assert not [name for name in told if "nowhere" in name or name.endswith("_created")]


def test_explanations_and_batches_are_counted_by_what_made_their_lists(bundles: dict[str, Path], lines: io.StringIO) -> None:
    online = made(bundles["exact"])
    with client_of(online) as client:
        client.post("/v1/events", json={"events": [{"user_id": "u", "item_id": 5, "time": 7}]})
        client.post("/v1/recommend", json={"history": [5], "explain": True, "allow": [7, 11]})
        assert figures(client)['recsys_answers_total{source="retrieved"}'] == 1
        assert figures(client)["recsys_underfilled_total"] == 1
        client.post("/v1/recommend/batch", json={"users": ["u", "nobody", "u"], "allow": [7, 11]})
        told = figures(client)
    assert told['recsys_answers_total{source="retrieved"}'] == 3
    assert told['recsys_answers_total{source="popularity"}'] == 1
    assert told["recsys_underfilled_total"] == 4
    arm = online.service.arms.champion
    for line in map(json.loads, lines.getvalue().splitlines()):
        if line.get("route", "").startswith("/v1/recommend"):
            assert (line["bundle"], line["arm"]) == (arm.recommender.id, "champion")


def test_stages_have_their_own_seconds(ranked_bundles: dict[str, Path]) -> None:
    with client_of(made(ranked_bundles["look"])) as client:
        client.post("/v1/events", json={"events": [{"user_id": "u", "item_id": 5, "time": 7}]})
        client.post("/v1/recommend", json={"user_id": "u"})
        told = figures(client)
    for stage in ("store", "encode", "retrieve", "rank", "list", "write"):
        assert told[f'recsys_stage_seconds_count{{stage="{stage}"}}'] == 1


def test_swaps_and_loads_that_failed_are_counted(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundles["exact"], bundle)
    online = made(bundle)
    arm = online.service.arms.champion
    with client_of(online) as client:
        old = arm.recommender.id
        remove(bundle, [7])
        assert arm.refresh()
        told = figures(client)
        assert told['recsys_swaps_total{arm="champion"}'] == 1
        assert told[f'recsys_bundle{{arm="champion",id="{arm.recommender.id}"}}'] == 1
        assert f'recsys_bundle{{arm="champion",id="{old}"}}' not in told


def test_registries_of_two_applications_do_not_mix(bundles: dict[str, Path]) -> None:
    with client_of(made(bundles["exact"])) as one, client_of(made(bundles["exact"])) as other:
        one.post("/v1/recommend", json={})
        name = 'recsys_request_seconds_count{route="/v1/recommend"}'
        assert figures(one)[name] == 1
        assert name not in figures(other)


def test_a_request_is_one_line_of_json(bundles: dict[str, Path], lines: io.StringIO) -> None:
    with client_of(made(bundles["exact"])) as client:
        client.post("/v1/recommend", json={"history": [5]}, headers={"x-request-id": "mine-1"})
    (line,) = [json.loads(line) for line in lines.getvalue().splitlines() if "mine-1" in line]
    assert set(line) == {
        *("time", "level", "event", "request_id", "route", "method", "status", "milliseconds", "bundle", "arm", "source"),
    }
    assert (line["level"], line["event"], line["route"], line["status"]) == ("info", "request", "/v1/recommend", 200)
    assert line["milliseconds"] > 0
    assert line["time"].endswith("Z")


def test_an_exception_is_logged_without_its_words(lines: io.StringIO) -> None:
    try:
        raise ValueError("canary")
    except ValueError:
        LOG.exception("error", extra=about(request_id="r-1"))
    line = json.loads(lines.getvalue())
    assert (line["event"], line["error"], line["request_id"]) == ("error", "ValueError", "r-1")
    assert "test_telemetry.py" in line["traceback"][0]
    assert "canary" not in lines.getvalue()


def test_nothing_names_a_user_an_item_a_key_or_an_address(
    bundles: dict[str, Path], tmp_path: Path, lines: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    keys, exporter = tmp_path / "keys.json", InMemorySpanExporter()
    key = add(keys, "shop")
    online = made(bundles["exact"], keys=keys, tracer=Tracer(SimpleSpanProcessor(exporter)))
    canary, event = "canary-4711", "canary-event-4711"
    user, item = f"{canary}-user", f"{canary}-item"

    async def fail(*words: Any) -> bytes:
        raise ZeroDivisionError(f"{words} {canary}")

    def broken(user_id: str) -> list[Event]:
        raise ZeroDivisionError(f"{user_id} {canary}")

    with TestClient(online, client=("203.0.113.77", 4711), headers={"x-api-key": key}) as client:
        asked = [
            ("POST", "/v1/events", {"events": [{"user_id": user, "item_id": item, "time": 7, "event_id": event}]}),
            ("POST", "/v1/recommend", {"user_id": user}),
            ("POST", "/v1/recommend", {"user_id": user, "explain": True}),
            ("POST", "/v1/recommend", {"history": [item]}),
            ("POST", "/v1/recommend", {"titles": [item]}),
            ("POST", "/v1/recommend", {"user_id": user * 40}),
            ("POST", "/v1/recommend", {"deny": [item]}),
            ("POST", "/v1/recommend", {canary: 1}),
            ("POST", "/v1/recommend", {"where": {canary: item}}),
            ("POST", "/v1/recommend/batch", {"users": [user]}),
            ("POST", "/v1/rank", {"user_id": user, "items": [item]}),
            ("POST", "/v1/similar", {"item_id": item}),
            ("POST", "/v1/items", {"items": [{"item_id": item, canary: 1}]}),
            ("GET", f"/v1/items?q={canary}", None),
            ("GET", f"/v1/items?{canary}=1", None),
            ("GET", f"/v1/items/{item}", None),
            ("DELETE", f"/v1/items/{item}", None),
            ("GET", f"/v1/users/{user}", None),
            ("DELETE", f"/v1/users/{user}", None),
            ("GET", f"/{canary}?{canary}={canary}", None),
            ("PATCH", f"/v1/users/{user}", None),
        ]
        statuses = {client.request(method, path, json=body).status_code for method, path, body in asked}
        assert client.get(f"/v1/users/{user}", headers={"x-api-key": canary}).status_code == 401
        online._hot["POST", "/v1/similar"] = fail
        online.service.store.read = broken  # type: ignore[method-assign]
        for path, body in (("/v1/similar", {"item_id": item}), ("/v1/recommend", {"user_id": user})):
            assert client.post(path, json=body).status_code == 500
        assert client.get(f"/v1/users/{user}").status_code == 500
        told = client.get("/metrics").text
    assert {200, 404, 405, 422} <= statuses
    online.service.store.close()
    spans = json.dumps([[span.name, dict(span.attributes or {})] for span in exporter.get_finished_spans()])
    spoken = "".join(capfd.readouterr())
    for where in (lines.getvalue(), told, spans, spoken):
        for secret in (canary, key, "203.0.113.77"):
            assert secret not in where
    assert lines.getvalue().count('"error":"ZeroDivisionError"') == 3
    assert lines.getvalue().count("\n") == lines.getvalue().count('{"time"')


def test_a_request_is_a_span_with_its_stages_below(bundles: dict[str, Path]) -> None:
    exporter = InMemorySpanExporter()
    online = made(bundles["exact"], tracer=Tracer(SimpleSpanProcessor(exporter)))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with client_of(online) as client:
        client.post("/v1/recommend", json={"history": [5]}, headers={"traceparent": parent})
    spans = {span.name: span for span in exporter.get_finished_spans()}
    whole = spans.pop("POST /v1/recommend")
    assert whole.context is not None
    assert whole.parent is not None
    assert f"{whole.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"
    assert whole.attributes is not None
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.attributes["recsys.source"] == "retrieved"
    assert set(spans) >= {"parse", "wait", "write"}
    for span in spans.values():
        assert span.parent is not None
        assert span.parent.span_id == whole.context.span_id
        assert span.start_time is not None
        assert whole.start_time is not None
        assert whole.end_time is not None
        assert whole.start_time <= span.start_time <= whole.end_time


def test_spans_reach_a_collector_over_http(bundles: dict[str, Path]) -> None:
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        spans = tracer("", {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}"})
        assert spans is not None
        with client_of(made(bundles["exact"], tracer=spans)) as client:
            client.post("/v1/recommend", json={"history": [5]})
        spans.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert {path for path, _ in got} == {"/v1/traces"}
    assert b"POST /v1/recommend" in b"".join(body for _, body in got)


def test_without_an_address_nothing_is_traced_and_without_the_packages_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tracer("", {}) is None
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(SetupError, match=r"attention-recommender\[tracing\]"):
        tracer("http://127.0.0.1:4318", {})


def test_an_application_without_a_tracer_says_the_same(bundles: dict[str, Path]) -> None:
    online: Online = made(bundles["exact"])
    assert online.tracer is None
    with client_of(online) as client:
        assert client.post("/v1/recommend", json={}).status_code == 200
