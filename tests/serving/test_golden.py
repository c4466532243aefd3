"""Golden answers: every bundle has its own, they are its answers, and what answers otherwise is told from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from features.dataset import Dataset
from recsys.bundle import open_directory
from recsys.errors import BundleError
from serving.engine import Recommender
from serving.evaluation.budget import Budget, spend
from serving.evaluation.budget import write as write_budget
from serving.export import export
from serving.golden import GOLDEN, HISTORIES, TOLERANCE, Golden, K, _difference, compare, renew, write
from serving.index import INDEXES, IndexSettings
from serving.items import add, opened, remove
from tests.serving.conftest import LENGTH, LISTED, goods, write_run

KINDS = [
    {"time": "both", "request_time": True},
    {"objective": "masked", "length": 7},
    {"text": "both", "similarity": "cosine", "length": 11},
]


def golden(bundle: Path) -> list[dict[str, Any]]:
    found = json.loads((bundle / GOLDEN).read_text())
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("kind", INDEXES)
def test_a_bundles_golden_answers_are_its_answers(bundles: dict[str, Path], kind: str) -> None:
    recommender = Recommender.load(bundles[kind])
    compare(recommender, bundles[kind] / GOLDEN)
    told = golden(bundles[kind])
    assert len(told) == HISTORIES
    for one in told:
        listed = recommender.answer(one["history"], K, times=one["times"])["items"]
        assert [(item["item_id"], item["score"]) for item in listed] == list(zip(one["items"], one["scores"], strict=True))


def test_histories_are_of_one_event_to_more_than_the_model_reads_and_of_popular_items_first(bundles: dict[str, Path]) -> None:
    told = golden(bundles["exact"])
    lengths = [len(one["history"]) for one in told]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1] > LENGTH, len(set(lengths)) > HISTORIES // 2) == (1, True, True)
    events = Recommender.load(bundles["exact"]).catalogue.events
    drawn = [item for one in told for item in one["history"]]
    assert sum(float(events[item]) for item in drawn) / len(drawn) > 1.2 * float(events.mean())
    assert all(one["times"] == sorted(one["times"]) and len(one["times"]) == len(one["history"]) for one in told)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_model_has_golden_answers(kind: dict[str, Any], dataset: Dataset, tmp_path: Path) -> None:
    export(write_run(tmp_path / "run", dataset, **kind), tmp_path / "bundle", IndexSettings())
    compare(Recommender.load(tmp_path / "bundle"), tmp_path / "bundle" / GOLDEN)
    assert {one["now"] is None for one in golden(tmp_path / "bundle")} == {"request_time" not in kind}


@pytest.mark.parametrize("name", ["look", "companions", "among"])
def test_golden_answers_are_those_of_the_ranker(ranked_bundles: dict[str, Path], name: str) -> None:
    recommender = Recommender.load(ranked_bundles[name])
    compare(recommender, ranked_bundles[name] / GOLDEN)
    with pytest.raises(BundleError, match="not the golden one"):
        compare(recommender.with_ranker(0), ranked_bundles[name] / GOLDEN)


def test_the_same_run_makes_the_same_golden_answers(
    run: Path, dataset: Dataset, bundles: dict[str, Path], tmp_path: Path
) -> None:
    export(run, tmp_path / "again", IndexSettings(), dataset)
    assert (tmp_path / "again" / GOLDEN).read_bytes() == (bundles["exact"] / GOLDEN).read_bytes()


def test_a_changed_bundle_has_golden_answers_of_its_own(shop_bundles: dict[str, Path], tmp_path: Path) -> None:
    first = golden(shop_bundles["exact"])[0]["items"][0]
    remove(shop_bundles["exact"], [first], tmp_path / "fewer")
    add(tmp_path / "fewer", goods(range(1001, 1012)).lazy(), tmp_path / "more")
    for bundle in (tmp_path / "fewer", tmp_path / "more"):
        compare(Recommender.load(bundle), bundle / GOLDEN)
        assert all(first not in one["items"] for one in golden(bundle))
        assert list(open_directory(bundle).manifest["files"])[-1] == GOLDEN
    with pytest.raises(BundleError, match="not the golden one"):
        compare(Recommender.load(tmp_path / "fewer"), shop_bundles["exact"] / GOLDEN)


def test_a_bundle_with_another_recipe_has_the_golden_answers_of_that(ranked_bundles: dict[str, Path], tmp_path: Path) -> None:
    directory = open_directory(ranked_bundles["look"])
    recipe = directory.manifest["recipe"]
    unranked = {**recipe, "serving": {**recipe["serving"], "ranker_blocks": 0}}
    renew(directory, tmp_path / "unranked", {}, {"recipe": unranked})
    compare(Recommender.load(tmp_path / "unranked"), tmp_path / "unranked" / GOLDEN)
    with pytest.raises(BundleError, match="not the golden one"):
        compare(Recommender.load(tmp_path / "unranked"), ranked_bundles["look"] / GOLDEN)


def test_a_bundle_within_a_budget_has_the_golden_answers_of_its_profile(dataset: Dataset, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", dataset)
    export(run, tmp_path / "bundle", IndexSettings(kind="hnsw"), dataset)
    (tmp_path / "bundle" / GOLDEN).write_text("what was written before is not copied")
    directory = open_directory(tmp_path / "bundle", verify=False)
    recommender = Recommender(directory, threads=1)
    found = spend(recommender, dataset, Budget(latency_ms=10_000), 7, 13)
    write_budget(found, recommender, dataset, directory, tmp_path / "within")
    with opened(tmp_path / "within") as within:
        compare(Recommender(within), within.path / GOLDEN)


def change(one: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**one, **values}


def swapped(values: list[Any], left: int, right: int) -> list[Any]:
    out = list(values)
    out[left], out[right] = out[right], out[left]
    return out


OTHERS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "an item": (lambda one: change(one, items=[LISTED - 1, *one["items"][1:]]), "place 1: "),
    "a score": (
        lambda one: change(one, scores=[*one["scores"][:6], one["scores"][6] - 0.01, *one["scores"][7:]]),
        "place 7: its item",
    ),
    "an order": (lambda one: change(one, items=swapped(one["items"], 2, 12)), "place 3: another item"),
    "fewer": (lambda one: change(one, items=one["items"][:-1], scores=one["scores"][:-1]), "20 items, written were 19"),
    "a history": (lambda one: change(one, history=one["history"][:-1], times=one["times"][:-1]), "place"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_list_that_differs_is_an_error_that_names_the_place(what: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    other, said = OTHERS[what]
    told = golden(bundles["exact"])
    told[17] = other(told[17])
    (tmp_path / GOLDEN).write_text(json.dumps(told))
    with pytest.raises(BundleError) as refused:
        compare(Recommender.load(bundles["exact"]), tmp_path / GOLDEN)
    assert "the answer to history 17 is not the golden one" in str(refused.value)
    assert said in str(refused.value)
    assert str(tmp_path / GOLDEN) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_item_that_is_lost_is_seen_also_where_those_behind_it_are_as_good_as_the_last() -> None:
    written = Golden([5], [7], None, [2, 3, 5], [9.0, 7.0, 1.0])
    assert _difference(written, [2, 3, 7], [9.0, 7.0, 1.0]) == ""
    assert _difference(written, [2, 5, 7], [9.0, 1.0, 1.0]) == "place 2: another item with score 1, written was 7"
    assert _difference(written, [2, 3, 5], [9.0, 7.0, float("nan")]) == "place 3: its item with score nan, written was 1"


def test_items_of_nearly_one_score_may_swap_places_and_no_others(bundles: dict[str, Path], tmp_path: Path) -> None:
    recommender, told = Recommender.load(bundles["exact"]), golden(bundles["exact"])
    gaps = sorted(
        ((one["scores"][place] - one["scores"][place + 1]) / max(map(abs, one["scores"])), number, place)
        for number, one in enumerate(told)
        for place in range(K - 1)
    )
    assert gaps[0][0] < TOLERANCE, "else nothing is tried here"
    for gap, number, place in (gaps[0], next(each for each in gaps if each[0] > 2 * TOLERANCE)):
        one = told[number]
        changed = [*told[:number], change(one, items=swapped(one["items"], place, place + 1)), *told[number + 1 :]]
        (tmp_path / GOLDEN).write_text(json.dumps(changed))
        refused = pytest.raises(BundleError, match=f"history {number} is not the golden one")
        with nullcontext() if gap < TOLERANCE else refused:
            compare(recommender, tmp_path / GOLDEN)


def test_an_item_as_good_as_the_last_may_stand_in_its_place_and_rounding_moves_scores(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    told = golden(bundles["exact"])
    for one in told:
        unlisted = next(item for item in range(LISTED) if item not in one["items"])
        one["items"][-1] = unlisted
        one["scores"] = [score * (1 + 3e-5) for score in one["scores"]]
    (tmp_path / GOLDEN).write_text(json.dumps(told))
    compare(Recommender.load(bundles["exact"]), tmp_path / GOLDEN)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds no golden answers"),
        ("{", "cannot be read as golden answers"),
        ('[{"history": [5]}]', "cannot be read as golden answers"),
        ('[{"history": [5], "times": [7], "now": null, "items": [5], "scores": []}]', "not a score for each item"),
        ('[{"history": [1009], "times": [7], "now": null, "items": [], "scores": []}]', "history 0 has no answer"),
        ('[{"history": [5], "times": [], "now": null, "items": [], "scores": []}]', "history 0 has no answer"),
        (None, "cannot be read as golden answers"),
    ],
)
def test_what_holds_no_golden_answers_is_an_error(
    content: str | None, said: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / GOLDEN).write_text(content)
    with pytest.raises(BundleError, match=said) as refused:
        compare(Recommender.load(bundles["exact"]), tmp_path / GOLDEN)
    assert str(tmp_path / GOLDEN) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_written_is_asked_again_bit_for_bit(bundles: dict[str, Path], tmp_path: Path) -> None:
    write(Recommender.load(bundles["hnsw"]), tmp_path / GOLDEN)
    assert (tmp_path / GOLDEN).read_bytes() == (bundles["hnsw"] / GOLDEN).read_bytes()
