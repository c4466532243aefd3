"""The most popular items that a request allows, without a look at all items.

V items, by line · k places of a list
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from torch import Tensor

from recsys.batch import FIRST_ITEM, PADDING
from serving.lists import Array

FEW = 4096
"""Items that are looked at first; then always twice as many."""


class Popularity:
    """Items by their training events, ties by row."""

    def __init__(self, events_V: Tensor) -> None:
        self.events_V: Array = events_V.numpy()
        ascends = (self.events_V[1:] > self.events_V[:-1]).any()
        self._order_V = np.argsort(-self.events_V, kind="stable") if ascends else None
        """None: the lines are in order, as `recsys features` numbers items."""

    def best(self, k: int, seen: Collection[int], allowed_V: Tensor | None) -> tuple[Array, Array]:
        """Rows and events of the first k allowed items that are not among the rows `seen`, shape k; PADDING and -inf behind."""
        wanted, parts, start, step = k + len(seen), [np.zeros(0, np.int64)], 0, FEW
        while start < len(self.events_V) and sum(map(len, parts)) < wanted:
            lines = np.arange(start, min(start + step, len(self.events_V)))
            lines = lines if self._order_V is None else self._order_V[lines]
            parts.append(lines if allowed_V is None else lines[allowed_V.numpy().take(lines)])
            start, step = start + step, 2 * step
        lines = np.concatenate(parts)
        if len(seen):
            lines = lines[~np.isin(lines, np.fromiter(seen, np.int64, len(seen)) - FIRST_ITEM)]
        lines = lines[:k]
        behind = 0, k - len(lines)
        return (
            np.pad(lines + FIRST_ITEM, behind, constant_values=PADDING),
            np.pad(self.events_V.take(lines), behind, constant_values=-np.inf),
        )
