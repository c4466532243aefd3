"""The most popular items, against a look at all of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.batch import FIRST_ITEM, PADDING
from serving import popularity
from serving.popularity import Popularity


@given(
    events=st.lists(st.integers(0, 5), min_size=1, max_size=23),
    allowed=st.none() | st.lists(st.booleans(), min_size=23, max_size=23),
    seen=st.sets(st.integers(0, 30)),
    k=st.integers(1, 29),
    descending=st.booleans(),
)
def test_the_best_are_the_first_by_events_then_row_of_what_is_allowed_and_unseen(
    events: list[int], allowed: list[bool] | None, seen: set[int], k: int, descending: bool
) -> None:
    events = sorted(events, reverse=True) if descending else events
    allowed_V = None if allowed is None else torch.tensor(allowed[: len(events)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(popularity, "FEW", 2)
        rows_K, events_K = Popularity(torch.tensor(events, dtype=torch.float32)).best(k, seen, allowed_V)
    left = [
        (-count, line + FIRST_ITEM)
        for line, count in enumerate(events)
        if (allowed is None or allowed[line]) and line + FIRST_ITEM not in seen
    ]
    wanted = [(row, float(-count)) for count, row in sorted(left)][:k]
    wanted += [(PADDING, -math.inf)] * (k - len(wanted))
    assert [*zip(rows_K.tolist(), events_K.tolist(), strict=True)] == wanted
