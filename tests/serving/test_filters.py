"""Deny, allow, conditions, seen and until; and lists that are filtered by them, from every kind of index."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.dataset import ATTRIBUTE
from recsys.batch import FIRST_ITEM, PADDING, Batch
from recsys.errors import RequestError
from serving import retrieval
from serving.engine import Recommender
from serving.filters import MASKS, VALUES, Attributes, allowed_lines, until
from serving.index import INDEXES, Index, IndexSettings, Scan
from serving.lists import Lists
from serving.retrieval import find
from tests.serving.conftest import ATTRIBUTES, GOODS, KINDS

ITEMS = 19
ROWS = st.integers(0, FIRST_ITEM + ITEMS + 5)
HISTORIES = st.lists(st.lists(st.tuples(ROWS, st.integers(0, 11)), max_size=13), max_size=7)
MASKS_V = st.lists(st.none() | st.lists(st.booleans(), min_size=ITEMS, max_size=ITEMS).map(torch.tensor), max_size=3)


@given(st.lists(ROWS), st.none() | st.lists(ROWS), MASKS_V)
def test_an_item_is_allowed_if_it_is_not_denied_and_on_the_allow_list_and_every_mask_there_is(
    deny: list[int], allow: list[int] | None, masks: list[torch.Tensor | None]
) -> None:
    before = [None if mask_V is None else mask_V.clone() for mask_V in masks]
    allowed_V = allowed_lines(ITEMS, deny, allow, *masks)
    wanted = [
        row not in deny and (allow is None or row in allow) and all(mask is None or mask[line] for mask in masks)
        for line, row in enumerate(range(FIRST_ITEM, FIRST_ITEM + ITEMS))
    ]
    assert (all(wanted) and allow is None) if allowed_V is None else allowed_V.tolist() == wanted
    assert all(old is None or torch.equal(old, new) for old, new in zip(before, masks, strict=True))


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


SHELF = pl.DataFrame(
    {
        "categories": [["a", "b"], [], ["b"], ["c"], ["b", "c"]],
        ATTRIBUTE + "on": [True, None, False, True, False],
        ATTRIBUTE + "price": [1.0, 2.5, None, 4.0, 2.5],
        ATTRIBUTE + "brand": ["x", "y", None, "2..3", "X"],
        ATTRIBUTE + "tags": [["u"], None, ["u", "v"], [], ["w", "v", "w"]],
        ATTRIBUTE + "later": pl.Series([None] * 5, dtype=pl.Null),
    }
)

MEETING: list[tuple[dict[str, Any], list[int]]] = [
    ({"on": True}, [0, 3]),
    ({"on": [True, False]}, [0, 2, 3, 4]),
    ({"price": 2.5}, [1, 4]),
    ({"price": [1, 4.0]}, [0, 3]),
    ({"price": {"min": 2.5}}, [1, 3, 4]),
    ({"price": {"max": 2.5}}, [0, 1, 4]),
    ({"price": {"min": 2, "max": 3}}, [1, 4]),
    ({"price": {"min": None, "max": 1}}, [0]),
    ({"brand": "x"}, [0]),
    ({"brand": ["x", "2..3", "of no item"]}, [0, 3]),
    ({"tags": "v"}, [2, 4]),
    ({"tags": ("u", "w")}, [0, 2, 4]),
    ({"categories": "b"}, [0, 2, 4]),
    ({"categories": ["a", "c"]}, [0, 3, 4]),
    ({"categories": ["b"], "on": False}, [2, 4]),
    ({"categories": ["b"], "on": False, "price": {"min": 1}}, [4]),
    ({"price": []}, []),
    ({"later": ["x", 3, True]}, []),
    ({"later": {"min": 3}}, []),
]


@pytest.mark.parametrize(("where", "lines"), MEETING, ids=lambda value: str(value))
def test_an_item_meets_conditions_if_it_meets_each_by_any_value(where: dict[str, Any], lines: list[int]) -> None:
    meeting_V = Attributes(SHELF).meeting(where)
    assert meeting_V is not None
    assert meeting_V.nonzero().flatten().tolist() == lines


def test_no_condition_is_no_mask() -> None:
    assert Attributes(SHELF).meeting({}) is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"brnd": "x"}, "items have no 'brnd'; did you mean brand?"),
    ({"colour": "x"}, "items have no 'colour'; known are categories, on, price, brand, tags, later"),
    ({"on": 1}, "'on' holds true or false, found 1; give one or several"),
    ({"on": "true"}, "'on' holds true or false, found 'true'"),
    ({"on": {"min": 0}}, "'on' holds true or false, which have no range"),
    ({"price": True}, "'price' holds numbers, found True; give one or several, or a range"),
    ({"price": ["1"]}, "'price' holds numbers, found '1'"),
    ({"price": math.nan}, "'price' holds numbers, found nan"),
    ({"price": 10**400}, "'price' holds numbers, found 1000"),
    ({"price": None}, "'price' holds numbers, found None"),
    ({"price": {}}, "'price' is {}; give a range numbers as min and max"),
    ({"price": {"least": 1}}, "'price' is {'least': 1}; give a range numbers as min and max"),
    ({"price": {"min": "1"}}, "'price' is {'min': '1'}; give a range numbers as min and max"),
    ({"price": {"max": math.inf}}, "'price' is {'max': inf}; give a range numbers as min and max"),
    ({"price": {"min": 3, "max": 2.5}}, "'price' has min 3 above max 2.5; swap them"),
    ({"brand": 3}, "'brand' holds texts, found 3"),
    ({"brand": "\ud800"}, "'brand' holds texts, found '\\ud800'"),
    ({"tags": [["u"]]}, "'tags' holds texts, found ['u']"),
    ({"brand": ["x"] * (VALUES + 1)}, f"'brand' has {VALUES + 1} values; give at most {VALUES}"),
    ({"later": [["u"]]}, "'later' holds no values, found ['u']"),
    ({"categories": "d"}, "no item has category 'd'; give one that an item has"),
    ({"categories": ["a", "bb"]}, "no item has category 'bb'; nearest: 'b'"),
    ({"on": True, "categories": 3}, "'categories' holds texts, found 3"),
]


@pytest.mark.parametrize(("where", "says"), WRONG, ids=lambda value: str(value)[:40])
def test_a_condition_that_cannot_be_is_one_line(where: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as error:
        Attributes(SHELF).meeting(where)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["on=true"], {"on": [True]}),
        (["on=False", "on=TRUE"], {"on": [False, True]}),
        (["price=1", "price=2.50"], {"price": [1, 2.5]}),
        (["price=-1..2.5", "brand=x"], {"price": {"min": -1, "max": 2.5}, "brand": ["x"]}),
        (["price=0.."], {"price": {"min": 0}}),
        (["price=..3"], {"price": {"max": 3}}),
        (["brand=2..3", "brand=a=b"], {"brand": ["2..3", "a=b"]}),
        (["categories=a", "tags=7", "categories=b"], {"categories": ["a", "b"], "tags": ["7"]}),
        ([], {}),
    ],
    ids=str,
)
def test_words_are_read_by_the_type_of_what_they_name(words: list[str], where: dict[str, Any]) -> None:
    attributes = Attributes(SHELF)
    assert attributes.read(words) == where
    attributes.meeting(where)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["brand"], "where 'brand': write NAME=VALUE"),
        (["colour=red"], "items have no 'colour'"),
        (["on=yes"], "'on' holds true or false, found 'yes'"),
        (["price=cheap"], "'price' holds numbers, found 'cheap'"),
        (["price=cheap..dear"], "give a range numbers"),
        (["price=.."], "give a range numbers"),
        (["price=1", "price=2..3"], "a range and another value"),
        (["price=1..2", "price=3..4"], "a range and another value"),
        (["price=1..2", "price=3"], "a range and another value"),
    ],
    ids=str,
)
def test_words_that_cannot_be_read_are_one_line(words: list[str], says: str) -> None:
    attributes = Attributes(SHELF)
    with pytest.raises(RequestError) as error:
        attributes.meeting(attributes.read(words))
    assert says in str(error.value)


def test_conditions_asked_by_several_threads_are_met_as_by_one_and_few_are_kept() -> None:
    table = pl.DataFrame({"categories": [["a"]] * 1009, ATTRIBUTE + "price": [float(line % 101) for line in range(1009)]})
    attributes, wanted = Attributes(table), torch.arange(1009) % 101

    def right(price: int) -> bool:
        meeting_V = attributes.meeting({"price": price % 101, "categories": "a"})
        return meeting_V is not None and torch.equal(meeting_V, wanted == price % 101)

    with ThreadPoolExecutor(7) as pool:
        assert all(pool.map(right, range(499)))
    assert attributes._mask.cache_info().currsize == MASKS


Question = dict[str, Any]
WHERE = st.fixed_dictionaries(
    {},
    optional={
        "in_stock": st.booleans(),
        "brand": st.lists(st.sampled_from([f"brand {number}" for number in range(7)]), max_size=3),
        "price": st.builds(lambda low, more: {"min": low, "max": low + more}, st.integers(0, 6), st.integers(0, 6)),
        "tags": st.lists(st.integers(0, 19).map(str), max_size=7),
        "categories": st.lists(st.sampled_from(KINDS), max_size=7),
    },
)
GOOD_ROWS = st.integers(FIRST_ITEM, FIRST_ITEM + GOODS - 1)
FILTERS = st.fixed_dictionaries(
    {
        "k": st.integers(1, 73) | st.integers(GOODS - 7, GOODS + 7),
        "filter_seen": st.booleans(),
        "deny": st.lists(GOOD_ROWS, max_size=23),
        "allow": st.none() | st.lists(GOOD_ROWS, max_size=29) | st.just(list(range(FIRST_ITEM, FIRST_ITEM + GOODS, 2))),
        "where": WHERE,
    }
)
GOODS_HISTORY = (
    st.lists(GOOD_ROWS, max_size=61)
    | st.integers(0, 11).map(lambda spared: list(range(FIRST_ITEM + spared, FIRST_ITEM + GOODS)))
    | st.sampled_from([[FIRST_ITEM + GOODS + 7], [FIRST_ITEM + 3] * 107])
)


def met(recommender: Recommender, where: dict[str, Any]) -> set[int]:
    """The rows that meet all conditions, by a plain reading of the items' table."""

    def meets(item: dict[str, Any], name: str, condition: Any) -> bool:
        value = item[name if name == "categories" else ATTRIBUTE + name]
        if isinstance(condition, dict):
            return value is not None and condition["min"] <= value <= condition["max"]
        values = value if isinstance(value, list) else [] if value is None else [value]
        return bool(set(values) & set(condition if isinstance(condition, list) else [condition]))

    return {item["row"] for item in table(recommender) if all(meets(item, name, where[name]) for name in where)}


@cache
def table(recommender: Recommender) -> list[dict[str, Any]]:
    return recommender.catalogue.table.to_dicts()


@cache
def loaded(bundle: Path) -> Recommender:
    return Recommender.load(bundle)


def brute_force(recommender: Recommender, history: list[int], k: int, possible: set[int], popular: bool) -> list[int]:
    """The k best rows by float64 scores rounded to float32, ties by row; no code of the engine but its state."""
    state_E = recommender.encode(Batch.of([history]))[0].double().numpy()
    scores_V = (recommender.scan.vectors_VE.double().numpy() * state_E).sum(1).astype(np.float32)
    scores_V = recommender.catalogue.events.numpy() if popular else scores_V
    return sorted(possible, key=lambda row: (-scores_V[row - FIRST_ITEM], row))[:k]


@pytest.mark.parametrize("kind", INDEXES)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    histories=st.lists(GOODS_HISTORY, min_size=1, max_size=5),
    question=FILTERS,
    few=st.sampled_from([0, 31, 50_000]),
    long=st.sampled_from([0, 37, 1000]),
)
def test_no_forbidden_item_is_named_lists_are_full_and_the_same_alone_and_in_a_batch(
    kind: str, stocked_bundles: dict[str, Path], histories: list[list[int]], question: Question, few: int, long: int
) -> None:
    recommender, k = loaded(stocked_bundles[kind]), question["k"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "FEW", few)
        patch.setattr(retrieval, "LONG", long)
        lists = recommender.recommend(Batch.of(histories), **question)
        alone = Lists.joined([recommender.recommend(Batch.of([history]), **question) for history in histories], k)
    assert torch.equal(lists.rows, alone.rows)
    assert torch.equal(lists.scores, alone.scores)
    allowed = met(recommender, question["where"]) - set(question["deny"])
    allowed &= allowed if question["allow"] is None else set(question["allow"])
    short = 0
    for history, rows, scores, popular in zip(
        histories, lists.rows.tolist(), lists.scores, lists.popular.tolist(), strict=True
    ):
        possible = allowed - set(history if question["filter_seen"] else ())
        named = [row for row in rows if row != PADDING]
        assert set(named) <= possible
        assert len(set(named)) == min(k, len(possible))
        assert rows == named + [PADDING] * (k - len(named))
        order = list(zip((-scores[: len(named)]).tolist(), named, strict=True))
        assert order == sorted(order)
        if popular or recommender.searcher.exact or len(allowed) <= few:
            assert named == brute_force(recommender, history, k, possible, popular)
        short += len(named) < k
    assert lists.underfilled == short


WIDTH, LINES = 23, 1999


def points(items: int = LINES, seed: int = 3) -> torch.Tensor:
    """Around 29 centres, which an index can learn."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(29, WIDTH, generator=generator)
    return centres[torch.arange(items) % 29] + 0.5 * torch.randn(items, WIDTH, generator=generator)


QUERIES_BE = points(17, seed=4)


@cache
def scanned() -> Scan:
    return Scan(points())


@cache
def indexed(kind: str, **options: int) -> Index:
    return Index.build(points(), IndexSettings(kind=kind, **options))


@pytest.mark.parametrize("kind", ["ivf", "ivf_sq8"])
def test_where_few_items_near_a_state_are_allowed_all_are_searched(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "FEW", 0)
    index, k = indexed(kind, probes=1), 3
    allowed_V = torch.rand(LINES, generator=torch.Generator().manual_seed(5)) < 0.1
    lines_BN, _ = index.search(QUERIES_BE, 32, allowed_V)
    counts_B = (lines_BN >= 0).sum(1)
    assert ((counts_B >= k) & (counts_B < 32)).any(), "the index finds enough, but not the best"
    rows_BK, scores_BK = find(index, scanned(), QUERIES_BE, k, allowed_V=allowed_V)
    exact_BK, exact_scores_BK = find(scanned(), scanned(), QUERIES_BE, k, allowed_V=allowed_V)
    assert torch.equal(rows_BK, exact_BK)
    assert torch.equal(scores_BK, exact_scores_BK)


@pytest.mark.parametrize("share", [0.5, 0.1])
@pytest.mark.parametrize("kind", INDEXES)
def test_a_filter_costs_little_recall(kind: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "FEW", 0)
    index = indexed(kind, **({"breadth": 61} if kind == "hnsw" else {"probes": 8}))
    allowed_V = torch.rand(LINES, generator=torch.Generator().manual_seed(7)) < share
    rows_BK, _ = find(index, scanned(), QUERIES_BE, 31, allowed_V=allowed_V)
    exact_BK, _ = find(scanned(), scanned(), QUERIES_BE, 31, allowed_V=allowed_V)
    found = sum(int(torch.isin(exact, rows).sum()) for exact, rows in zip(exact_BK, rows_BK, strict=True))
    assert found > 0.95 * exact_BK.numel()


@pytest.mark.parametrize("make", [Scan, lambda vectors_VE: Index.build(vectors_VE, IndexSettings(kind="exact"))])
def test_a_seen_item_at_the_border_does_not_hide_equal_ones_beyond(make: Callable[[torch.Tensor], Scan | Index]) -> None:
    vectors_VE, k = torch.ones(LINES, WIDTH), 5
    searcher, states_1E, n = make(vectors_VE), torch.ones(1, WIDTH), 32
    assert n / 2 < k + searcher.margin + 1 <= n
    lines_1N, _ = searcher.search(states_1E, n)
    history = Batch.of([[int(lines_1N[0, -1]) + FIRST_ITEM]])
    rows_1K, _ = find(searcher, Scan(vectors_VE), states_1E, k, history)
    seen_row = int(history.values)
    assert rows_1K[0].tolist() == [row for row in range(FIRST_ITEM, FIRST_ITEM + k + 1) if row != seen_row][:k]


@pytest.mark.parametrize("kind", INDEXES)
def test_a_history_of_ten_thousand_events_asks_for_no_more_candidates(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, asked = indexed(kind), []
    search = Index.search
    monkeypatch.setattr(Index, "search", lambda self, states_BE, n, *rest: asked.append(n) or search(self, states_BE, n, *rest))
    monkeypatch.setattr(retrieval, "FEW", 0)
    draw = torch.Generator().manual_seed(11)
    histories = [(torch.randint(LINES, (length,), generator=draw) + FIRST_ITEM).tolist() for length in (10_007, 3, 1009)]
    rows_BK, _ = find(index, scanned(), QUERIES_BE[:3], 13, Batch.of(histories))
    assert max(asked) == (32 if index.margin == 16 else 512)
    for history, rows in zip(histories, rows_BK.tolist(), strict=True):
        left = set(range(FIRST_ITEM, FIRST_ITEM + LINES)) - set(history)
        assert len(set(rows) & left) == min(13, len(left))


def test_a_question_is_answered_by_its_conditions_and_a_wrong_one_is_one_line(stocked_bundles: dict[str, Path]) -> None:
    recommender = loaded(stocked_bundles["exact"])
    where = {"in_stock": True, "categories": ["lamp", "tent"], "price": {"max": 3}}
    rows = met(recommender, {**where, "price": {"min": 0, "max": 3}})
    answer = recommender.answer([7, 14], GOODS, where=where)
    assert {recommender.catalogue.by_id(item["item_id"]) for item in answer["items"]} == rows - {
        recommender.catalogue.by_id(item_id) for item_id in (7, 14)
    }
    assert recommender.answer([7], 5, where={}) == recommender.answer([7], 5)
    assert recommender.answer([], GOODS, where={"later": "x"})["items"] == []
    assert set(recommender.catalogue.attributes.columns) == {"categories", *ATTRIBUTES}
    with pytest.raises(RequestError, match="no item has category 'lamps'; nearest: 'lamp'"):
        recommender.answer([7], where={"categories": "lamps"})


def test_a_data_set_without_attributes_is_filtered_by_categories_alone(shop_run: Path) -> None:
    recommender = Recommender.load(shop_run)
    found = recommender.answer([7], GOODS, where={"categories": "scarf"})["items"]
    assert {item["item_id"] for item in found} == set(range(1, GOODS, 7))
    with pytest.raises(RequestError, match="items have no 'price'; known are categories"):
        recommender.answer([7], where={"price": 3})
