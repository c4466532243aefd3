"""The OpenAPI document of the online API: every operation, of the very structs that decode."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

from serving.answers import (
    Answer,
    BatchAnswer,
    Bundles,
    Erased,
    EventsAnswer,
    Filters,
    Health,
    Hits,
    Item,
    ItemsAnswer,
    Problem,
    RankAnswer,
    Ready,
    SimilarAnswer,
    User,
)
from serving.messages import Batch, Events, NewItems, Rank, Recommend, Similar


@dataclass(frozen=True)
class Operation:
    """A route of the API, as its document describes it."""

    name: str
    method: str
    path: str
    does: str
    answer: type[Struct] | None = None
    asks: type[Struct] | None = None
    examples: tuple[Mapping[str, Any], ...] = ()
    query: tuple[Mapping[str, Any], ...] = ()
    """Parameters beside those in the path."""
    others: Mapping[int, str] = field(default_factory=dict)
    """Statuses of its own, beside those of all."""
    open: bool = False
    """Whether it needs no key."""
    content: str = "application/json"


_QUERY = (
    {"name": "q", "in": "query", "description": "Part of a title.", "schema": {"type": "string", "maxLength": 500}},
    {
        "name": "limit",
        "in": "query",
        "description": "Most items found.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
    },
)
_GONE = {404: "No such item."}
_LEAVING = {503: "The process is about to leave."}
_CHANGE = {409: "The bundle comes from a registry, or cannot be changed so."}
OPERATIONS = (
    Operation(
        "recommend",
        "POST",
        "/v1/recommend",
        "The k best items for a user or a history; for an empty or wholly unknown one, the most popular.",
        Answer,
        Recommend,
        ({"user_id": "u-1", "k": 10}, {"history": [1, 260, 1196], "k": 10}, {"titles": ["Toy Story (1995)"], "k": 5}),
    ),
    Operation(
        "batch",
        "POST",
        "/v1/recommend/batch",
        "The k best items for each of many users.",
        BatchAnswer,
        Batch,
        ({"users": ["u-1", "u-2"], "k": 10},),
    ),
    Operation("similar", "POST", "/v1/similar", "Items like an item.", SimilarAnswer, Similar, ({"item_id": 1, "k": 10},)),
    Operation(
        "rank",
        "POST",
        "/v1/rank",
        "Given items in order, best first.",
        RankAnswer,
        Rank,
        ({"history": [1, 260], "items": [1196, 1210, 2028]},),
    ),
    Operation(
        "events",
        "POST",
        "/v1/events",
        "Keep what happened; the next list of the user knows it.",
        EventsAnswer,
        Events,
        ({"events": [{"user_id": "u-1", "item_id": 1, "time": 1_000_000_000}]},),
    ),
    Operation(
        "add_items",
        "POST",
        "/v1/items",
        "Add items to the bundle; live when the call returns.",
        ItemsAnswer,
        NewItems,
        ({"items": [{"item_id": 4001, "title": "A new one"}]},),
        others=_CHANGE,
    ),
    Operation(
        "update_items",
        "PUT",
        "/v1/items",
        "Describe items of the bundle anew.",
        ItemsAnswer,
        NewItems,
        ({"items": [{"item_id": 1, "in_stock": False}]},),
        others=_CHANGE,
    ),
    Operation("find_items", "GET", "/v1/items", "Items by a part of their title.", Hits, query=_QUERY),
    Operation("item", "GET", "/v1/items/{item_id}", "One item.", Item, others=_GONE),
    Operation(
        "remove_item", "DELETE", "/v1/items/{item_id}", "Take an item out of all lists.", ItemsAnswer, others=_CHANGE | _GONE
    ),
    Operation("filters", "GET", "/v1/filters", "What requests may filter by.", Filters),
    Operation("user", "GET", "/v1/users/{user_id}", "What is kept of a user.", User),
    Operation("erase", "DELETE", "/v1/users/{user_id}", "Erase all that is kept of a user.", Erased),
    Operation("bundle", "GET", "/v1/bundle", "The loaded bundles.", Bundles),
    Operation("health", "GET", "/health", "The process is alive.", Health, open=True),
    Operation("ready", "GET", "/ready", "Whether the process takes requests.", Ready, others=_LEAVING, open=True),
    Operation("metrics", "GET", "/metrics", "Figures for Prometheus.", open=True, content="text/plain"),
)


def document(version: str) -> dict[str, Any]:
    """The OpenAPI document of every operation, with the schemas of the very structs that decode."""
    structs = {kind: None for each in OPERATIONS for kind in (each.asks, each.answer) if kind} | {Problem: None}
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    for operation in OPERATIONS:
        if operation.asks is not None:
            schemas[operation.asks.__name__]["examples"] = list(operation.examples)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    security = {"key": {"type": "http", "scheme": "bearer"}, "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "recsys", "version": version, "description": "Top-k recommendations for a user or a history."},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": security},
    }


_REQUEST_ID = {"x-request-id": {"description": "Of this request; the one that was sent, if any.", "schema": {"type": "string"}}}
_RETRY = {"retry-after": {"description": "Seconds after which to ask again.", "schema": {"type": "integer"}}}


def _described(operation: Operation) -> dict[str, Any]:
    schema: dict[str, Any] = _ref(operation.answer) if operation.answer is not None else {"type": "string"}
    content = {operation.content: {"schema": schema}}
    responses: dict[str, Any] = {"200": {"description": operation.does, "headers": _REQUEST_ID, "content": content}}
    others = {**operation.others, 500: "A mistake of the server's own."}
    if not operation.open:
        others |= {
            400: "The body is not what its length said.",
            401: "No key, or one that is not known.",
            408: "The body did not come in time.",
            411: "The body does not say how long it is.",
            413: "The body is too large.",
            422: "The request is not of the form that is asked for.",
            429: "Too many requests.",
            503: "Too much to do, or a store or a file that does not answer or cannot be written.",
        }
    for status, meaning in sorted(others.items()):
        headers = _REQUEST_ID | (_RETRY if status in (429, 503) else {})
        problem = {"application/json": {"schema": _ref(Ready if operation.name == "ready" and status == 503 else Problem)}}
        responses[str(status)] = {"description": meaning, "headers": headers, "content": problem}
    said: dict[str, Any] = {"operationId": operation.name, "summary": operation.does, "responses": responses}
    if operation.asks is not None:
        examples = {f"example {number}": {"value": value} for number, value in enumerate(operation.examples, 1)}
        body = {"application/json": {"schema": _ref(operation.asks), "examples": examples}}
        said["requestBody"] = {"required": True, "content": body}
    if parameters := [*map(_in_path, re.findall(r"\{(\w+)_id\}", operation.path)), *operation.query]:
        said["parameters"] = parameters
    if not operation.open:
        said["security"] = [{}, {"key": []}, {"header": []}]
    return said


def _in_path(what: str) -> Mapping[str, Any]:
    schema = {"type": "string", "minLength": 1, "maxLength": 500}
    return {"name": f"{what}_id", "in": "path", "required": True, "description": f"Id of the {what}.", "schema": schema}


def _ref(kind: Any) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
