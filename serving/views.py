"""What requests need of a loaded bundle beside its recommender: rungs and their costs, items to search, values to filter by.

V items
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any

from recsys.batch import FIRST_ITEM
from serving.admission import Cost
from serving.engine import Recommender
from serving.filters import CATEGORIES

VALUES = 200
"""Most values that are named of one attribute."""


class View:
    """Of one recommender; gone when its bundle is."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommender = recommender
        ranked = recommender.ranker is not None and recommender.ranker_blocks > 0
        self.rungs: list[tuple[str, Recommender]] = [("ranked", recommender)] if ranked else []
        self.rungs.append(("retrieved", recommender.with_ranker(0) if ranked else recommender))
        self._costs: dict[tuple[str, str], Cost] = {}

    def cost(self, what: str, rung: str) -> Cost:
        """Of so much work on a rung."""
        return self._costs.setdefault((what, rung), Cost())

    @property
    def whole(self) -> bool:
        """Whether filters are made: with many items that takes longer than other requests may wait."""
        return "filters" in vars(self)

    def complete(self) -> View:
        """Itself, with filters made."""
        _ = self.filters
        return self

    @cached_property
    def filters(self) -> dict[str, Any]:
        """What each attribute holds."""
        return {name: _filter(column) for name, column in self.recommender.catalogue.attributes.columns.items()}

    def recommends(self, line: int) -> bool:
        """Whether lists may hold the item."""
        live_V = self.recommender.live_V
        return line < self.recommender.lines and (live_V is None or bool(live_V[line]))

    def search(self, part: str, limit: int) -> list[dict[str, Any]]:
        """The most popular items that can be recommended and whose titles hold `part`, in any case."""
        names = self.recommender.catalogue.names
        lines = islice(filter(self.recommends, names.holding(part)), limit)
        return [{"item_id": names.item_ids[line], "title": names.title(line)} for line in lines]


def _filter(column: Any) -> dict[str, Any]:
    kind = str(column.dtype)
    if kind == "Boolean":
        return {"kind": "boolean"}
    if kind == "Float64":
        return {"kind": "number", "min": column.min(), "max": column.max()}
    if kind == "Null":
        return {"kind": "nothing"}
    values = (column.explode() if kind.startswith("List") else column).drop_nulls()
    counted = values.alias("value").value_counts(sort=False, name="count").sort(["count", "value"], descending=[True, False])
    return {"kind": "text", "values": counted["value"].head(VALUES).to_list()}


def categories_of(recommender: Recommender, rows: Sequence[int]) -> list[list[str]]:
    """The categories of each item."""
    categories = recommender.catalogue.attributes.columns[CATEGORIES]
    told = categories.gather([row - FIRST_ITEM for row in rows]).to_list()
    return [each or [] for each in told]
