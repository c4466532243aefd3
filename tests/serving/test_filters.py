"""Deny, allow, seen and until."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.batch import FIRST_ITEM, Batch
from serving.filters import allowed_lines, seen, until

ITEMS = 19
ROWS = st.integers(0, FIRST_ITEM + ITEMS + 5)
HISTORIES = st.lists(st.lists(st.tuples(ROWS, st.integers(0, 11)), max_size=13), max_size=7)


@given(st.lists(ROWS), st.none() | st.lists(ROWS))
def test_an_item_is_allowed_if_it_is_not_denied_and_on_the_allow_list_if_there_is_one(
    deny: list[int], allow: list[int] | None
) -> None:
    allowed_V = allowed_lines(ITEMS, deny, allow)
    rows = range(FIRST_ITEM, FIRST_ITEM + ITEMS)
    wanted = [row not in deny and (allow is None or row in allow) for row in rows]
    assert (all(wanted) and allow is None) if allowed_V is None else allowed_V.tolist() == wanted


@given(st.lists(st.lists(ROWS, max_size=13), min_size=1, max_size=7), st.lists(ROWS, min_size=3, max_size=3))
def test_seen_is_true_where_a_candidate_stands_in_its_own_history(histories: list[list[int]], candidates: list[int]) -> None:
    rows_BC = torch.tensor([candidates] * len(histories))
    assert seen(Batch.of(histories), rows_BC).tolist() == [[row in history for row in candidates] for history in histories]


@given(HISTORIES, st.integers(-1, 12))
def test_until_keeps_the_events_up_to_now_and_every_history(histories: list[list[tuple[int, int]]], now: int) -> None:
    batch = Batch.of(
        [[row for row, _ in history] for history in histories], [[time for _, time in history] for history in histories]
    )
    kept = until(batch, torch.full((len(batch),), now))
    wanted = Batch.of([[row for row, time in history if time <= now] for history in histories])
    assert kept.values.tolist() == wanted.values.tolist()
    assert kept.offsets.tolist() == wanted.offsets.tolist()
    assert (kept.times <= now).all()
