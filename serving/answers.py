"""What an answer of the online API holds; the service writes plain dicts of this form, and the document is made of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from serving.messages import ItemId


class Reason(Struct):
    """An event, and how far the item's score falls without it."""

    event: int
    item_id: ItemId
    title: str
    drop: float


class Near(Struct):
    """One place of a list of items like another."""

    rank: int
    item_id: ItemId
    title: str
    score: float


class Recommended(Near, omit_defaults=True):
    """One place of a list."""

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


class RankAnswer(Struct):
    """The items in order, best first; those that were removed, or of which the bundle knows nothing, are left out."""

    bundle: BundleId
    arm: str
    source: Source
    fallback: Fallback | None
    unknown: Unknown
    items: list[Near]


class Answer(RankAnswer, omit_defaults=True):
    """A list, best first."""

    items: list[Recommended]  # type: ignore[assignment]
    attention: list[Read] | UnsetType = UNSET


class BatchAnswer(Struct):
    """A list for each user, in the order asked."""

    answers: list[Answer]


class SimilarAnswer(Struct):
    """Items like another, most alike first."""

    bundle: BundleId
    arm: str
    item_id: ItemId
    title: str
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


class Hit(Struct):
    """An item that a search found."""

    item_id: ItemId
    title: str


class Item(Hit):
    """An item of the champion."""

    events: Annotated[int, Meta(description="Events of the training part.")]
    recommended: Annotated[bool, Meta(description="Whether lists may hold it.")]
    text: str = ""
    categories: list[str] = []
    attributes: dict[str, bool | float | str | list[str] | None] = {}


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
