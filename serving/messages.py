"""The messages of the online API: what a request may hold, what an answer holds, and the document that says so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from recsys.errors import RequestError
from serving.filters import VALUES

LARGEST = 2**63 - 1
USERS = 1000
"""Most users of one batch."""
EVENTS = 10_000
"""Most ids of one list, and most events of one message."""

ItemId = Annotated[int, Meta(ge=-LARGEST - 1, le=LARGEST)] | Annotated[str, Meta(max_length=500)]
UserId = Annotated[int, Meta(ge=-LARGEST - 1, le=LARGEST)] | Annotated[str, Meta(min_length=1, max_length=500)]
Name = Annotated[str, Meta(max_length=500)]
Second = Annotated[int, Meta(ge=0, lt=2**40)]
K = Annotated[int, Meta(ge=1, le=1000, description="Items to recommend.")]
History = Annotated[list[ItemId], Meta(max_length=EVENTS, description="Item ids, oldest event first.")]
Titles = Annotated[list[Name], Meta(max_length=EVENTS, description="Titles, in the place of ids.")]
Times = Annotated[list[Second], Meta(max_length=EVENTS, description="Seconds since 1970 of each event.")]
Seen = Annotated[bool, Meta(description="Leave out what stands in the history.")]
Denied = Annotated[list[ItemId], Meta(max_length=EVENTS, description="Ids of items that may not be recommended.")]
Allowed = Annotated[list[ItemId], Meta(max_length=EVENTS, description="Ids of the only items that may be recommended.")]
_VALUE = [{"type": "boolean"}, {"type": "number"}, {"type": "string"}]
_RANGE = {
    "type": "object",
    "properties": {"min": {"type": "number"}, "max": {"type": "number"}},
    "minProperties": 1,
    "additionalProperties": False,
}
Condition = Annotated[
    Any, Meta(extra_json_schema={"anyOf": [*_VALUE, {"type": "array", "items": {"anyOf": _VALUE}, "maxItems": VALUES}, _RANGE]})
]
"""Of a type that the bundle's attributes decide; the recommender checks it."""
Where = Annotated[
    dict[Name, Condition],
    Meta(
        max_length=50,
        description="What items must be, by the name of an attribute, or categories: a value, a list of values of which an "
        "item has any, or of numbers {min, max}, one of which may be missing.",
        examples=[{"in_stock": True, "brand": ["Acme", "Globex"], "price": {"min": 10, "max": 20}}],
    ),
]
Diversity = Annotated[float, Meta(ge=0, le=1, description="0: the best items; 1: each as unlike the others as can be.")]
Popularity = Annotated[
    float, Meta(ge=-100, le=100, description="What is taken from a score for each factor e of an item's training events.")
]
Probabilities = Annotated[bool, Meta(description="Say of each item how probable it is that it is the next one.")]
Ignore = Annotated[bool, Meta(description="Leave out ids and titles that are no item, and name them in the answer.")]
Side = Annotated[
    Literal["champion", "challenger"], Meta(description="Which bundle answers; without it the user's share decides.")
]
Deadline = Annotated[int, Meta(ge=1, le=60_000, description="Milliseconds within which the answer is wanted.")]


class Recommend(Struct, forbid_unknown_fields=True):
    """A user, or a history, oldest event first, by item ids or by titles; and what may be recommended."""

    user_id: UserId | None = None
    history: History = []
    titles: Titles = []
    times: Times | None = None
    now: Annotated[Second, Meta(description="Events after this second are left out; needs times.")] | None = None
    k: K = 10
    filter_seen: Seen = True
    deny: Denied = []
    allow: Allowed | None = None
    where: Where = {}
    diversity: Diversity | None = None
    popularity: Popularity | None = None
    probabilities: Probabilities = False
    ignore_unknown: Ignore = False
    explain: Annotated[bool, Meta(description="Say which events carried each item.")] = False
    arm: Side | None = None
    deadline_ms: Deadline | None = None


class Batch(Struct, forbid_unknown_fields=True):
    """Users, and what may be recommended to them."""

    users: Annotated[
        list[UserId], Meta(min_length=1, max_length=USERS, description="Ids of users; their number by k is at most 100,000.")
    ]
    k: K = 10
    filter_seen: Seen = True
    deny: Denied = []
    allow: Allowed | None = None
    where: Where = {}
    diversity: Diversity | None = None
    popularity: Popularity | None = None
    probabilities: Probabilities = False
    arm: Side | None = None


class Similar(Struct, forbid_unknown_fields=True):
    """An item, and what may be named beside it."""

    item_id: ItemId
    k: K = 10
    deny: Denied = []
    allow: Allowed | None = None
    where: Where = {}
    arm: Side | None = None
    deadline_ms: Deadline | None = None


class Rank(Struct, forbid_unknown_fields=True):
    """A user, or a history, and the items to put in order."""

    items: Annotated[list[ItemId], Meta(min_length=1, max_length=EVENTS, description="Ids of the items to put in order.")]
    user_id: UserId | None = None
    history: History = []
    titles: Titles = []
    times: Times | None = None
    now: Annotated[Second, Meta(description="Events after this second are left out; needs times.")] | None = None
    ignore_unknown: Ignore = False
    arm: Side | None = None
    deadline_ms: Deadline | None = None


class Happened(Struct, forbid_unknown_fields=True):
    """A user, an item and a time."""

    user_id: UserId
    item_id: ItemId
    time: Annotated[Second, Meta(description="Seconds since 1970; without it, now.")] | None = None
    event_id: Annotated[
        str,
        Meta(max_length=100, description="The same id again changes nothing; without one, the same item in the same second."),
    ] = ""


class Events(Struct, forbid_unknown_fields=True):
    """What happened, in any order; after a 503 a part of it may be kept, so that to send it again needs event ids or times."""

    events: Annotated[list[Happened], Meta(min_length=1, max_length=EVENTS)]


Cell = bool | int | float | str | None | list[bool | int | float | str | None]


class NewItems(Struct, forbid_unknown_fields=True):
    """Items as rows of the columns that the model learnt from."""

    items: Annotated[list[Annotated[dict[Name, Cell], Meta(min_length=1)]], Meta(min_length=1, max_length=1000)]


class Reason(Struct):
    """An event, and how far the item's score falls without it."""

    event: int
    item_id: ItemId
    title: str
    drop: float


class Recommended(Struct, omit_defaults=True):
    """One place of a list."""

    rank: int
    item_id: ItemId
    title: str
    score: Annotated[float, Meta(description="Comparable within a list alone; of a popular item, its training events.")]
    probability: Annotated[float, Meta(description="That it is the next item, as often as on validation.")] | UnsetType = UNSET
    reasons: Annotated[list[Reason], Meta(description="The events that carried it most.")] | UnsetType = UNSET
    categories: Annotated[list[str], Meta(description="With explain.")] | UnsetType = UNSET


class Read(Struct):
    """An event that the model read, and what its last state drew from it."""

    event: int
    item_id: ItemId
    title: str
    share: float
    layers: Annotated[list[list[float]], Meta(description="By layer, the share of each head.")]


Source = Annotated[
    Literal["ranked", "retrieved", "nightly", "popularity"],
    Meta(description="What made the list: the ranker, retrieval alone, last night's list, or the most popular items."),
]
Fallback = Annotated[
    Literal["deadline", "overload", "store", "error"], Meta(description="Why it is not the best that the bundle can do.")
]
Unknown = Annotated[list[ItemId], Meta(description="Ids and titles that are no item and were ignored.")]
BundleId = Annotated[str, Meta(description="Id of the bundle that answered.")]


class Answer(Struct, omit_defaults=True):
    """A list, best first."""

    bundle: BundleId
    arm: str
    source: Source
    fallback: Fallback | None
    unknown: Unknown
    items: list[Recommended]
    attention: list[Read] | UnsetType = UNSET


class BatchAnswer(Struct):
    """A list for each user, in the order asked."""

    answers: list[Answer]


class Near(Struct):
    """One place of a list of items like another."""

    rank: int
    item_id: ItemId
    title: str
    score: float


class SimilarAnswer(Struct):
    """Items like another, most alike first."""

    bundle: BundleId
    arm: str
    item_id: ItemId
    title: str
    items: list[Near]


class RankAnswer(Struct):
    """The items in order, best first; those that were removed, or of which the bundle knows nothing, are left out."""

    bundle: BundleId
    arm: str
    source: Source
    fallback: Fallback | None
    unknown: Unknown
    items: list[Near]


class EventsAnswer(Struct):
    """What became of the events."""

    added: Annotated[int, Meta(description="Events that were not there before.")]
    known: Annotated[int, Meta(description="Events of items of the champion.")]
    unknown: Annotated[int, Meta(description="Events of other items; they are kept too.")]


class ItemsAnswer(Struct):
    """The bundle with the change, which is live."""

    bundle: str
    changes: dict[str, int]


class Item(Struct):
    """An item of the champion."""

    item_id: ItemId
    title: str
    events: Annotated[int, Meta(description="Events of the training part.")]
    recommended: Annotated[bool, Meta(description="Whether lists may hold it.")]
    text: str = ""
    categories: list[str] = []
    attributes: dict[str, bool | float | str | list[str] | None] = {}


class Hit(Struct):
    """An item that a search found."""

    item_id: ItemId
    title: str


class Hits(Struct):
    """Items whose titles hold the words, most popular first."""

    items: list[Hit]


class Filter(Struct, omit_defaults=True):
    """What one attribute holds."""

    kind: Literal["boolean", "number", "text", "nothing"]
    min: float | UnsetType = UNSET
    max: float | UnsetType = UNSET
    values: Annotated[list[str], Meta(description="The most frequent ones first.")] | UnsetType = UNSET


class Filters(Struct):
    """What requests may filter by, by name."""

    filters: dict[str, Filter]


class Known(Struct):
    """An event of a user."""

    item_id: ItemId
    title: str | None
    time: int


class User(Struct):
    """What is kept of a user."""

    user_id: str
    arm: str
    events: list[Known]


class Erased(Struct):
    """What was found of a user, and is no more."""

    user_id: str
    history: bool
    lists: bool


class Served(Struct):
    """A loaded bundle."""

    name: str
    bundle: str
    since: int
    source: str
    quality: dict[str, Any]
    index: dict[str, Any]
    ranker: bool
    problem: str | None
    items: int


class Bundles(Struct):
    """The loaded bundles, and the challenger's share of the users."""

    arms: list[Served]
    share: float


class Health(Struct):
    """The process is alive."""

    status: str


class Ready(Struct):
    """Whether the process takes requests."""

    status: str
    bundle: str
    items: int
    version: str
    store: Annotated[str, Meta(description="ok, or unreachable: lists are then made without histories.")]


class Problem(Struct):
    """What was wrong with a request, in one line."""

    detail: str


class Refusal(Exception):
    """An answer that is no list: a status and one line."""

    def __init__(self, status: int, detail: str, retry_after: int = 0) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after


_PLACE = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$?\.?(?P<where>.*)`)?$", re.DOTALL)


def decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """A message of its kind. Raises RequestError: no JSON, or not of that form."""
    try:
        return decoder.decode(body)
    except RecursionError:
        raise RequestError("body: nests too deeply; send a flat message") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        found = _PLACE.match(" ".join(str(error).split()))
        what, where = (found["what"], found["where"]) if found else (str(error), None)
        raise RequestError(f"{where or 'body'}: {what[:300]}") from None


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
    parameters: tuple[Mapping[str, Any], ...] = ()
    others: Mapping[int, str] = field(default_factory=dict)
    """Statuses of its own, beside those of all."""
    open: bool = False
    """Whether it needs no key."""
    content: str = "application/json"


def _in_path(name: str, what: str) -> Mapping[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": what,
        "schema": {"type": "string", "minLength": 1, "maxLength": 500},
    }


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
    Operation("find_items", "GET", "/v1/items", "Items by a part of their title.", Hits, parameters=_QUERY),
    Operation(
        "item",
        "GET",
        "/v1/items/{item_id}",
        "One item.",
        Item,
        parameters=(_in_path("item_id", "Id of the item."),),
        others=_GONE,
    ),
    Operation(
        "remove_item",
        "DELETE",
        "/v1/items/{item_id}",
        "Take an item out of all lists.",
        ItemsAnswer,
        parameters=(_in_path("item_id", "Id of the item."),),
        others=_CHANGE | _GONE,
    ),
    Operation("filters", "GET", "/v1/filters", "What requests may filter by.", Filters),
    Operation(
        "user",
        "GET",
        "/v1/users/{user_id}",
        "What is kept of a user.",
        User,
        parameters=(_in_path("user_id", "Id of the user."),),
    ),
    Operation(
        "erase",
        "DELETE",
        "/v1/users/{user_id}",
        "Erase all that is kept of a user.",
        Erased,
        parameters=(_in_path("user_id", "Id of the user."),),
    ),
    Operation("bundle", "GET", "/v1/bundle", "The loaded bundles.", Bundles),
    Operation("health", "GET", "/health", "The process is alive.", Health, open=True),
    Operation("ready", "GET", "/ready", "Whether the process takes requests.", Ready, open=True),
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
    kept = operation.answer is not None
    schema: dict[str, Any] = _ref(operation.answer) if operation.answer is not None else {"type": "string"}
    content = {operation.content: {"schema": schema}}
    responses: dict[str, Any] = {"200": {"description": operation.does, "headers": _REQUEST_ID, "content": content}}
    others = {**operation.others}
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
    if operation.name == "ready":
        others[503] = "The process is about to leave."
    others[500] = "A mistake of the server's own."
    for status, meaning in sorted(others.items()):
        headers = _REQUEST_ID | (_RETRY if status in (429, 503) else {})
        problem = _ref(operation.answer if operation.name == "ready" and status == 503 and kept else Problem)
        responses[str(status)] = {
            "description": meaning,
            "headers": headers,
            "content": {"application/json": {"schema": problem}},
        }
    said: dict[str, Any] = {"operationId": operation.name, "summary": operation.does, "responses": responses}
    if operation.asks is not None:
        examples = {f"example {number}": {"value": value} for number, value in enumerate(operation.examples, 1)}
        body = {"application/json": {"schema": _ref(operation.asks), "examples": examples}}
        said["requestBody"] = {"required": True, "content": body}
    if operation.parameters:
        said["parameters"] = list(operation.parameters)
    if not operation.open:
        said["security"] = [{}, {"key": []}, {"header": []}]
    return said


def _ref(kind: Any) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
