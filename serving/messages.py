"""What a request of the online API may hold; each limit stands once, here, and in the document that is made of it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from recsys.errors import RequestError
from serving.filters import VALUES

T = TypeVar("T")
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


class Asked(Struct, forbid_unknown_fields=True):
    """A user, or a history, oldest event first, by item ids or by titles."""

    user_id: UserId | None = None
    history: History = []
    titles: Titles = []
    times: Times | None = None
    now: Annotated[Second, Meta(description="Events after this second are left out; needs times.")] | None = None
    ignore_unknown: Ignore = False
    arm: Side | None = None
    deadline_ms: Deadline | None = None


class Recommend(Asked):
    """A user, or a history, oldest event first, by item ids or by titles; and what may be recommended."""

    k: K = 10
    filter_seen: Seen = True
    deny: Denied = []
    allow: Allowed | None = None
    where: Where = {}
    diversity: Diversity | None = None
    popularity: Popularity | None = None
    probabilities: Probabilities = False
    explain: Annotated[bool, Meta(description="Say which events carried each item.")] = False


class Rank(Asked, kw_only=True):
    """A user, or a history, and the items to put in order."""

    items: Annotated[list[ItemId], Meta(min_length=1, max_length=EVENTS, description="Ids of the items to put in order.")]


class Wanted(Struct, forbid_unknown_fields=True):
    """How many items, and which may be named."""

    k: K = 10
    deny: Denied = []
    allow: Allowed | None = None
    where: Where = {}
    arm: Side | None = None


class Batch(Wanted, kw_only=True):
    """Users, and what may be recommended to them."""

    users: Annotated[
        list[UserId], Meta(min_length=1, max_length=USERS, description="Ids of users; their number by k is at most 100,000.")
    ]
    filter_seen: Seen = True
    diversity: Diversity | None = None
    popularity: Popularity | None = None
    probabilities: Probabilities = False


class Similar(Wanted, kw_only=True):
    """An item, and what may be named beside it."""

    item_id: ItemId
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


class Refusal(Exception):
    """An answer that is no list: a status and one line."""

    def __init__(self, status: int, detail: str, retry_after: int = 0) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after


_PLACE = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$?\.?(?P<where>.*)`)?$", re.DOTALL)


def decode(kind: type[T], body: bytes) -> T:
    """A message of a kind. Raises RequestError: no JSON, or not of that form."""
    try:
        return msgspec.json.decode(body, type=kind)
    except RecursionError:
        raise RequestError("body: nests too deeply; send a flat message") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        found = _PLACE.match(" ".join(str(error).split()))
        what, where = (found["what"], found["where"]) if found else (str(error), None)
        raise RequestError(f"{where or 'body'}: {what[:300]}") from None
