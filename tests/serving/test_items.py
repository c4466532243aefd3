"""Items added, described anew and taken out: what changes at once, and what never does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from features.build import build
from features.dataset import Dataset
from recsys.batch import FIRST_ITEM, PADDING, Batch
from recsys.bundle import open_directory
from recsys.config import Recipe
from recsys.content import CONTENT, Content
from recsys.errors import BundleError, DataError, RequestError
from serving.engine import Recommender
from serving.evaluation.judge import evaluate
from serving.explain import explain
from serving.export import export
from serving.index import INDEX, INDEXES, IndexSettings
from serving.items import add, remove, update
from serving.vectors import read_vectors
from tests.serving.conftest import GOODS, KINDS, goods, stocked, write_run
from tests.serving.nights import lists_of, score_all
from tests.serving.online import asked

ROOT = Path(__file__).parents[2]
LAMPS = [item_id for item_id in range(GOODS) if item_id % 7 == 0]
NEW = 7007
"""A lamp that the shop has not."""
HISTORY = LAMPS[3:8]
K = 13


@pytest.fixture
def bundle(shop_bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A bundle that may be changed."""
    return shutil.copytree(shop_bundles["exact"], tmp_path / "bundle")


@pytest.fixture(params=INDEXES)
def any_bundle(request: pytest.FixtureRequest, shop_bundles: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(shop_bundles[request.param], tmp_path / "bundle")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def best(recommender: Recommender, history: Iterable[int], k: int, **question: Any) -> list[int]:
    return [item["item_id"] for item in recommender.answer(list(history), k, **question)["items"]]


def indexed(bundle: Path) -> int:
    import faiss

    return int(faiss.read_index(str(bundle / INDEX)).ntotal)


def test_an_added_item_is_recommended_among_its_like_to_whoever_had_such(any_bundle: Path) -> None:
    others = len(LAMPS) - len(HISTORY)
    assert set(best(Recommender.load(any_bundle), HISTORY, others)) == set(LAMPS) - set(HISTORY)
    add(any_bundle, goods([NEW]).lazy())
    recommender = Recommender.load(any_bundle)
    assert recommender.live_V is None, "the index itself is searched"
    assert set(best(recommender, HISTORY, others + 1)) == {NEW, *LAMPS} - set(HISTORY)
    assert best(recommender, [NEW], 1)[0] in LAMPS
    assert best(recommender, [NEW], GOODS).index(LAMPS[0]) < len(LAMPS)


def test_what_is_known_of_the_old_items_does_not_change_by_a_bit(any_bundle: Path, shop: Dataset) -> None:
    sequences = shop.sequences
    histories = Batch(sequences.items.long(), sequences.offsets, sequences.times)
    old = Recommender.load(any_bundle)
    states_BE, lists = old.encode(histories), old.with_exact_search().recommend(histories, GOODS, filter_seen=False)
    add(any_bundle, goods(range(7000, 7031)).lazy())
    new = Recommender.load(any_bundle)
    assert new.lines == len(new.catalogue) == indexed(any_bundle) == GOODS + 31
    assert torch.equal(read_vectors(any_bundle)[:GOODS], old.scan.vectors_VE)
    assert torch.equal(new.encode(histories), states_BE)
    added = range(FIRST_ITEM + GOODS, FIRST_ITEM + GOODS + 31)
    again = new.with_exact_search().recommend(histories, GOODS, filter_seen=False, deny=added)
    assert torch.equal(again.rows, lists.rows)
    assert torch.equal(again.scores, lists.scores)


def test_a_new_bundle_names_the_one_before_and_what_changed(bundle: Path) -> None:
    old = open_directory(bundle).manifest
    first = add(bundle, goods([NEW, NEW + 7]).lazy())
    second = update(bundle, goods([NEW, 5]).lazy())
    third = remove(bundle, [NEW, "5"])
    assert [manifest["before"] for manifest in (first, second, third)] == [old["id"], first["id"], second["id"]]
    assert len({manifest["id"] for manifest in (old, first, second, third)}) == 4
    changes = [manifest["changes"] for manifest in (first, second, third)]
    assert changes == [{"added": 2, "unknown": 0}, {"updated": 2, "unknown": 0}, {"removed": 2}]
    assert open_directory(bundle).manifest == third
    for key in ("kind", "run", "items", "recipe", "dataset"):
        assert third[key] == old[key]


def test_the_same_change_of_the_same_bundle_gives_the_same_bytes(any_bundle: Path, tmp_path: Path) -> None:
    kept = contents(any_bundle)
    manifests = [add(any_bundle, goods([NEW, 7001]).lazy(), tmp_path / name) for name in ("one", "two")]
    assert manifests[0]["id"] == manifests[1]["id"]
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert {**one, "manifest.json": b""} == {**two, "manifest.json": b""}
    assert contents(any_bundle) == kept


def test_a_removed_item_that_is_added_again_is_back_in_its_row(any_bundle: Path) -> None:
    add(any_bundle, goods([NEW]).lazy())
    place = Recommender.load(any_bundle).catalogue.by_id(NEW)
    for item_id in (NEW, LAMPS[0]):
        row = Recommender.load(any_bundle).catalogue.by_id(item_id)
        remove(any_bundle, [item_id])
        assert item_id not in best(Recommender.load(any_bundle), HISTORY, GOODS)
        add(any_bundle, goods([item_id]).lazy())
        recommender = Recommender.load(any_bundle)
        assert recommender.catalogue.by_id(item_id) == row
        assert item_id in best(recommender, HISTORY, len(LAMPS) + 1)
    assert place == FIRST_ITEM + GOODS
    assert len(recommender.catalogue) == recommender.lines == recommender.items == indexed(any_bundle) == GOODS + 1


def test_old_and_new_items_may_be_added_together(bundle: Path) -> None:
    remove(bundle, [LAMPS[0], LAMPS[2]])
    manifest = add(bundle, goods([NEW, LAMPS[2], NEW + 7, LAMPS[0]]).lazy())
    recommender = Recommender.load(bundle)
    assert manifest["changes"] == {"added": 4, "unknown": 0}
    assert recommender.catalogue.item_ids[GOODS:] == [NEW, NEW + 7]
    assert set(best(recommender, HISTORY, len(LAMPS) + 2 - len(HISTORY))) == {NEW, NEW + 7, *LAMPS} - set(HISTORY)


def test_an_item_that_is_removed_and_added_again_keeps_its_events_and_its_id_embedding(bundle: Path, shop: Dataset) -> None:
    popular = shop.items["item_id"][0]
    before = Recommender.load(bundle)
    remove(bundle, [popular])
    add(bundle, goods([popular]).lazy())
    after = Recommender.load(bundle)
    assert after.catalogue.events[0] == before.catalogue.events[0]
    torch.testing.assert_close(after.scan.vectors_VE[0], before.scan.vectors_VE[0])


def test_an_item_described_anew_is_found_by_its_new_description(any_bundle: Path) -> None:
    old = Recommender.load(any_bundle)
    changed, scarves = LAMPS[0], [item_id for item_id in range(GOODS) if item_id % 7 == 1]
    add(any_bundle, goods([NEW]).lazy())
    update(any_bundle, goods([NEW, changed], title=pl.lit("a woven scarf"), kind=pl.lit("scarf"), price=pl.lit(1.0)).lazy())
    recommender = Recommender.load(any_bundle)
    row = recommender.catalogue.resolve(str(changed))
    assert not torch.equal(recommender.scan.vectors_VE[row - FIRST_ITEM], old.scan.vectors_VE[row - FIRST_ITEM])
    rest = torch.arange(GOODS) != row - FIRST_ITEM
    assert torch.equal(recommender.scan.vectors_VE[:GOODS][rest], old.scan.vectors_VE[rest])
    assert recommender.catalogue.title(row) == "a woven scarf"
    assert recommender.live_V is None
    history = scarves[3:8]
    assert {changed, NEW} <= set(best(recommender, history, len(scarves) + 2))
    assert not {changed, NEW} & set(best(recommender, HISTORY, len(LAMPS) - 1 - len(HISTORY)))
    assert indexed(any_bundle) == GOODS + 1


def test_a_category_that_no_item_has_any_more_breaks_nothing(bundle: Path) -> None:
    kinds = [KINDS[0], KINDS[1]]
    for kind in kinds:
        update(bundle, goods(range(GOODS), kind=pl.lit(kind)).lazy())
        assert Recommender.load(bundle).items == GOODS


def test_a_removed_item_is_in_no_list(any_bundle: Path, shop: Dataset) -> None:
    popular = shop.items["item_id"].to_list()[:3]
    gone = [*popular, LAMPS[0], NEW]
    add(any_bundle, goods([NEW]).lazy())
    remove(any_bundle, gone)
    recommender = Recommender.load(any_bundle)
    assert recommender.items == GOODS + 1 - len(gone)
    for history in ([], HISTORY, [popular[0]], [NEW]):
        for named in (best(recommender, history, GOODS + 1, filter_seen=False), best(recommender, history, 5)):
            assert not set(gone) & set(named)
        allowed = best(recommender, history, K, filter_seen=False, allow=[*gone, 5, 11])
        assert set(allowed) == {5, 11}
        assert best(recommender, history, K, allow=gone) == []
    assert len(best(recommender, [], GOODS + 1)) == GOODS + 1 - len(gone)


def test_a_removed_item_is_read_in_histories_as_before(any_bundle: Path) -> None:
    before = Recommender.load(any_bundle)
    rows = [before.catalogue.resolve(str(item_id)) for item_id in HISTORY]
    remove(any_bundle, HISTORY[1:4])
    after = Recommender.load(any_bundle)
    assert torch.equal(after.encode(Batch.of([rows, rows[1:2]])), before.encode(Batch.of([rows, rows[1:2]])))
    answer = after.answer(HISTORY[1:4], K)
    assert answer["source"] == "retrieved"
    assert answer["items"] == before.answer(HISTORY[1:4], K)["items"]


def test_items_of_a_model_that_reads_no_text_can_be_removed_too(
    bundles: dict[str, Path], dataset: Dataset, tmp_path: Path
) -> None:
    shutil.copytree(bundles["ivf"], tmp_path / "bundle")
    gone = dataset.items["item_id"].to_list()[:7]
    assert remove(tmp_path / "bundle", gone)["changes"] == {"removed": 7}
    recommender = Recommender.load(tmp_path / "bundle")
    assert not set(gone) & {*best(recommender, [], 31), *best(recommender, gone[:3], 31, filter_seen=False)}
    assert recommender.answer(gone[:3])["source"] == "retrieved"


def test_an_item_of_which_nothing_is_known_is_there_and_never_recommended(any_bundle: Path) -> None:
    nothing = {"title": pl.lit(None, pl.String), "kind": pl.lit(""), "price": pl.lit(None, pl.Float64)}
    rows = pl.concat([goods([NEW]), goods([NEW + 1], **nothing)])
    assert add(any_bundle, rows.lazy())["changes"] == {"added": 2, "unknown": 1}
    recommender = Recommender.load(any_bundle)
    assert (recommender.lines, recommender.items) == (GOODS + 2, GOODS + 1)
    for history in ([], HISTORY, [NEW + 1], [NEW]):
        named = best(recommender, history, GOODS + 2, filter_seen=False)
        assert NEW + 1 not in named
        assert len(named) == GOODS + 1
    assert recommender.answer([NEW + 1])["source"] == "popularity"
    assert recommender.answer([NEW + 1, HISTORY[0]])["source"] == "retrieved"
    update(any_bundle, goods([NEW + 1]).lazy())
    assert NEW + 1 in best(Recommender.load(any_bundle), [1, 8, 15], len(LAMPS) + 1)


@pytest.mark.parametrize("dtype", [pl.List(pl.Float64), pl.Null], ids=str)
def test_items_of_which_no_list_of_numbers_is_known_are_added_by_their_text(dtype: pl.DataType, tmp_path: Path) -> None:
    items = goods(range(29)).with_columns(image=pl.concat_list("price", "item_id", "price"))
    items.write_parquet(tmp_path / "items.parquet")
    events = {"user_id": [place // 5 for place in range(55)], "item_id": [3 * place % 29 for place in range(55)]}
    pl.DataFrame({**events, "timestamp": range(55)}).write_parquet(tmp_path / "events.parquet")
    build(tmp_path, Recipe("images", {"data": {"number_columns": ("image", "price")}}), tmp_path / "dataset")
    run = write_run(tmp_path / "run", Dataset.open(tmp_path / "dataset"), text="pooled")
    export(run, tmp_path / "bundle", IndexSettings())
    add(tmp_path / "bundle", goods([NEW], image=pl.lit(None, dtype)).lazy())
    assert NEW in best(Recommender.load(tmp_path / "bundle"), [0, 7], 31)


@pytest.fixture
def stocked_bundle(stocked_run: Path, tmp_path: Path) -> Path:
    export(stocked_run, tmp_path / "bundle", IndexSettings())
    return tmp_path / "bundle"


def in_stock(bundle: Path | Recommender) -> set[int]:
    """What may be recommended where it must be in stock."""
    recommender = Recommender.load(bundle) if isinstance(bundle, Path) else bundle
    return set(best(recommender, [], 2 * GOODS, where={"in_stock": True}))


STOCK = {item_id for item_id in range(GOODS) if item_id % 3 == 0 and item_id % 11}


def test_an_update_of_attributes_alone_changes_these_alone(stocked_bundle: Path) -> None:
    old, before = Recommender.load(stocked_bundle), contents(stocked_bundle)
    changed = {0: True, 3: False, 6: None, 7: True}
    table = pl.DataFrame({"item_id": list(changed), "in_stock": list(changed.values())})
    manifest = update(stocked_bundle, table.lazy())
    assert manifest["changes"] == {"updated": 4}
    after = contents(stocked_bundle)
    assert {name for name in after if after[name] != before[name]} == {"items.parquet", "manifest.json"}
    new = Recommender.load(stocked_bundle)
    assert in_stock(new) == STOCK - {3, 6} | {0, 7}
    assert in_stock(old) == STOCK, "what was loaded before serves on"
    assert new.answer(HISTORY, K) == {**old.answer(HISTORY, K), "bundle": new.id}
    column = "attribute: in_stock"
    assert new.catalogue.table.drop(column).equals(old.catalogue.table.drop(column))


def test_attributes_that_no_item_had_and_several_at_once_are_updated_and_text_is_read_by_their_type(
    stocked_bundle: Path,
) -> None:
    update(stocked_bundle, pl.DataFrame({"item_id": [3, 5], "later": ["soon", "12"], "brand": ["7", ""]}).lazy())
    recommender = Recommender.load(stocked_bundle)
    assert best(recommender, [], GOODS, where={"later": ["soon", "12"], "brand": "7"}) == [3]
    assert set(best(recommender, [], GOODS, where={"later": ["soon", "12"]})) == {3, 5}
    update(stocked_bundle, pl.DataFrame({"item_id": [5], "later": ["7"]}).lazy())
    assert best(Recommender.load(stocked_bundle), [], GOODS, where={"later": "7"}) == [5]


def test_added_and_updated_items_bring_their_attributes_with_them(stocked_bundle: Path) -> None:
    new = stocked([NEW, NEW + 1], in_stock=pl.Series([True, None]), brand=pl.lit("new brand"))
    add(stocked_bundle, new.lazy())
    assert in_stock(stocked_bundle) == STOCK | {NEW}
    rows = stocked([NEW, 5], in_stock=pl.Series([None, True], dtype=pl.Boolean), tags=pl.lit(None))
    update(stocked_bundle, rows.lazy())
    assert in_stock(stocked_bundle) == STOCK | {5}
    recommender = Recommender.load(stocked_bundle)
    assert set(best(recommender, HISTORY, GOODS, where={"brand": "new brand"})) == {NEW + 1}
    remove(stocked_bundle, [5, NEW + 1])
    update(stocked_bundle, pl.DataFrame({"item_id": [5, NEW], "in_stock": [True, True]}).lazy())
    assert in_stock(stocked_bundle) == STOCK | {NEW}, "a removed item stays so"


def test_attributes_of_a_model_that_reads_no_text_are_updated_too(tmp_path: Path) -> None:
    events = {"user_id": [1, 1, 1, 2, 2, 2], "item_id": [3, 5, 7, 5, 3, 11], "timestamp": range(6)}
    pl.DataFrame(events).write_parquet(tmp_path / "events.parquet")
    items = {"item_id": [3, 5, 7], "name": ["a", "b", "c"], "in_stock": ["true", "false", ""]}
    pl.DataFrame(items).write_csv(tmp_path / "items.csv")
    data = {"title": "name", "attribute_columns": ("in_stock",)}
    split = {"method": "global_time", "test_start": 9, "validation_days": 0}
    build(tmp_path, Recipe("tiny", {"data": data, "split": split}), tmp_path / "dataset")
    export(write_run(tmp_path / "run", Dataset.open(tmp_path / "dataset")), tmp_path / "bundle", IndexSettings())
    assert in_stock(tmp_path / "bundle") == {3}
    update(tmp_path / "bundle", pl.DataFrame({"item_id": [5, 11], "in_stock": [True, True]}).lazy())
    assert in_stock(tmp_path / "bundle") == {3, 5, 11}


WRONG_ATTRIBUTES: dict[str, tuple[dict[str, list[Any]], str]] = {
    "not there": ({"item_id": [3, NEW], "in_stock": [True, True]}, f"{NEW} is not in the bundle"),
    "an id twice": ({"item_id": [3, 3], "in_stock": [True, False]}, "repeated_row"),
    "another type": ({"item_id": [3], "in_stock": [1]}, "'in_stock' holds numbers, for the items before true or false"),
    "what the model reads": ({"item_id": [3], "in_stock": [True], "price": [3.0]}, "no column 'kind'"),
}


@pytest.mark.parametrize("case", WRONG_ATTRIBUTES)
def test_attributes_that_cannot_be_taken_are_one_line_and_change_no_byte(case: str, stocked_bundle: Path) -> None:
    columns, says = WRONG_ATTRIBUTES[case]
    before = contents(stocked_bundle)
    with pytest.raises(DataError) as error:
        update(stocked_bundle, pl.DataFrame(columns).lazy())
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(stocked_bundle) == before


Change = Callable[[Path, pl.LazyFrame], object]
WRONG: dict[str, tuple[Change, pl.DataFrame, str]] = {
    "there already": (add, goods([NEW, 3]), "items: 3 is in the bundle already"),
    "not there": (update, goods([3, NEW]), f"items: {NEW} is not in the bundle"),
    "no id": (add, goods([NEW]).with_columns(item_id=pl.lit(None, pl.Int64)), "null_id"),
    "no id among others": (update, pl.concat([goods([3]), goods([5]).with_columns(item_id=None)]), "null_id"),
    "an id twice": (add, goods([NEW, NEW + 1, NEW]), "repeated_row"),
    "an id twice anew": (update, goods([3, 3]), "repeated_row"),
    "half an id": (add, goods([NEW]).with_columns(item_id=pl.lit(0.5)), "wrong_type"),
    "a text as id": (add, goods([NEW]).with_columns(item_id=pl.lit("lamp")), "items"),
    "no column": (add, goods([NEW]).rename({"price": "cost"}), "no column 'price'"),
    "no rows": (add, goods([]), "no rows"),
    "no number": (add, goods([NEW], price=pl.lit("dear")), "'price' holds 1 cells that are no numbers"),
    "more numbers": (update, goods([3], price=pl.lit([2.0, 3.0])), "items have [2] numbers by column, the model learnt [1]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_table_that_cannot_be_taken_is_one_line_and_changes_no_byte(case: str, bundle: Path) -> None:
    change, table, says = WRONG[case]
    before = contents(bundle)
    with pytest.raises(DataError) as error:
        change(bundle, table.lazy())
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(bundle) == before
    assert {path.name for path in bundle.parent.iterdir()} <= {"bundle", ".bundle.lock"}


def test_items_that_are_not_there_or_all_of_them_cannot_be_removed(bundle: Path) -> None:
    before = contents(bundle)
    with pytest.raises(RequestError, match=f"no item '{NEW}'"):
        remove(bundle, [3, NEW])
    with pytest.raises(RequestError, match="no item that can be recommended would be left"):
        remove(bundle, range(GOODS))
    assert contents(bundle) == before
    remove(bundle, range(1, GOODS))
    assert best(Recommender.load(bundle), [5], K) == [0]


def test_all_items_that_can_be_recommended_cannot_be_removed(tmp_path: Path) -> None:
    events = {"user_id": [1, 1, 1, 2, 2], "item_id": [3, 5, 7, 5, 3], "timestamp": range(5)}
    pl.DataFrame(events).write_parquet(tmp_path / "events.parquet")
    build(tmp_path, Recipe("tiny", {}), tmp_path / "dataset")
    dataset = Dataset.open(tmp_path / "dataset")
    export(write_run(tmp_path / "run", dataset), tmp_path / "bundle", IndexSettings())
    warm = dataset.items.filter(pl.col("events") > 0)["item_id"].to_list()
    assert len(warm) < 3
    with pytest.raises(RequestError, match="no item that can be recommended would be left"):
        remove(tmp_path / "bundle", warm)


@pytest.mark.parametrize("text", ["none", "cross"])
def test_items_of_a_model_whose_vectors_hold_no_descriptions_cannot_be_added(
    text: str, dataset: Dataset, tmp_path: Path
) -> None:
    export(write_run(tmp_path / "run", dataset, text=text), tmp_path / "bundle", IndexSettings())
    before = contents(tmp_path / "bundle")
    table = pl.DataFrame({"item_id": [3], "title": ["Story 3"]}).lazy()
    for change in (add, update):
        with pytest.raises(BundleError, match=r"reads no descriptions of items; train it with model\.text=pooled or both"):
            change(tmp_path / "bundle", table)
    assert contents(tmp_path / "bundle") == before


@pytest.mark.parametrize("place", ["nowhere", "no/where/bundle"])
def test_a_bundle_that_is_not_there_is_named(place: str, shop_run: Path, tmp_path: Path) -> None:
    changes: list[Callable[[Path], object]] = [
        lambda path: add(path, goods([NEW]).lazy()),
        lambda path: update(path, goods([3]).lazy()),
        lambda path: remove(path, [3]),
    ]
    for change in changes:
        with pytest.raises(BundleError, match=r"no manifest\.json there"):
            change(tmp_path / place)
        with pytest.raises(BundleError, match="holds a model, not a bundle"):
            change(shop_run / "model")


def test_an_altered_bundle_is_not_built_upon(bundle: Path) -> None:
    content = bytearray((bundle / CONTENT).read_bytes())
    content[-1] ^= 1
    (bundle / CONTENT).write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        add(bundle, goods([NEW]).lazy())


def test_a_recommender_that_was_loaded_before_serves_on_as_it_was(bundle: Path) -> None:
    old = Recommender.load(bundle)
    before, known = old.id, [old.answer(history, K) for history in (HISTORY, [], [5, 12])]
    add(bundle, goods([NEW]).lazy())
    update(bundle, goods(range(101), title=pl.lit("another name")).lazy())
    remove(bundle, [item["item_id"] for item in known[0]["items"]])
    assert [old.answer(history, K) for history in (HISTORY, [], [5, 12])] == known
    assert old.id == before != Recommender.load(bundle).id
    with pytest.raises(RequestError, match=f"no item '{NEW}'"):
        old.answer([NEW])


def test_a_recommender_that_was_loaded_before_knows_its_own_items_also_where_it_is_asked_afterwards(bundle: Path) -> None:
    asked, unasked = Recommender.load(bundle), Recommender.load(bundle)
    known = asked.answer(HISTORY, K)
    add(bundle, goods([NEW]).lazy())
    update(bundle, goods(range(GOODS), title=pl.lit("another name")).lazy())
    assert unasked.answer(HISTORY, K) == known
    with pytest.raises(RequestError, match=f"no item '{NEW}'"):
        unasked.answer([NEW])


def test_lists_of_histories_with_an_added_item_agree_at_night_offline_and_over_http(any_bundle: Path, tmp_path: Path) -> None:
    add(any_bundle, goods([NEW, NEW + 1]).lazy())
    remove(any_bundle, [LAMPS[0]])
    recommender = Recommender.load(any_bundle)
    histories = [[*HISTORY, NEW, 8, 15], [NEW, NEW + 1, 7, 1], [5, 12, NEW, 19], [7, 14, LAMPS[0], 3, NEW]]
    events = [(user, item_id, place) for user, history in enumerate(histories) for place, item_id in enumerate(history)]
    pl.DataFrame(events, ["user_id", "item_id", "timestamp"], orient="row").write_parquet(tmp_path / "events.parquet")
    build(tmp_path, Recipe("grown", {}), tmp_path / "grown")
    grown = Dataset.open(tmp_path / "grown")
    score_all(recommender, grown, tmp_path / "lists", k=K)
    night = lists_of(tmp_path / "lists").group_by("user_id", maintain_order=True).agg("item_id", "score")
    report = evaluate(recommender, grown, ks=(K,), baselines=False)
    assert report.user_ids.to_list() == night["user_id"].to_list() == list(range(len(histories)))
    with asked(any_bundle) as client:
        assert client.get("/ready").json()["items"] == recommender.items == GOODS + 1
        for user, history in enumerate(histories):
            online = client.post("/v1/recommend", json={"history": history, "k": K}).json()
            assert online["bundle"] == recommender.id
            assert [item["item_id"] for item in online["items"]] == night["item_id"][user].to_list()
            assert [item["score"] for item in online["items"]] == night["score"][user].to_list()
            earlier = client.post("/v1/recommend", json={"history": history[:-1], "k": K}).json()["items"]
            rows = [row for row in report.lists.rows[user].tolist() if row != PADDING]
            assert [item["item_id"] for item in earlier] == [recommender.catalogue.item_id(row) for row in rows]
    without = [item_id for item_id in histories[2] if item_id != NEW]
    assert recommender.answer(without, K)["items"] != recommender.answer(histories[2], K)["items"]


def test_the_words_of_an_added_item_are_read(bundle: Path) -> None:
    add(bundle, goods([NEW], title=pl.lit("brass kettle, brass violin")).lazy())
    events = explain(Recommender.load(bundle), [*HISTORY, NEW], torch.Generator().manual_seed(0)).events
    words = [event["words"] for event in events]
    assert set(words[-1]) == {"brass", "kettle", "violin"}
    assert [len(found) > 0 for found in words] == [False, False, True, True, True, True]  # model.text_span is 4
    assert sum(sum(found.values()) for found in words) == pytest.approx(1)


def test_what_is_added_is_written_behind_what_is_known(bundle: Path) -> None:
    old = Content.load(bundle / CONTENT)
    add(bundle, goods([NEW], price=pl.lit(None, pl.Float64)).lazy())
    new = Content.load(bundle / CONTENT)
    assert len(new) == GOODS + 1
    for name in ("tokens_VL", "pooled_VP", "categories_VC", "numbers_VM"):
        mine, theirs = getattr(old, name), getattr(new, name)
        assert torch.equal(theirs[:GOODS], mine)
    lamp = Recommender.load(bundle).catalogue.resolve(str(LAMPS[0])) - FIRST_ITEM
    assert torch.equal(new.tokens_VL[GOODS], old.tokens_VL[lamp])
    assert torch.equal(new.categories_VC[GOODS], old.categories_VC[lamp])
    assert new.numbers_VM[GOODS].tolist() == [0]


ONE_BY_ONE = """
import os, sys
from pathlib import Path
from serving.items import add
from tests.serving.conftest import goods
print(os.getpid(), flush=True)
sys.stdin.readline()
for item_id in range(int(sys.argv[2]), int(sys.argv[3])):
    add(Path(sys.argv[1]), goods([item_id]).lazy())
"""


def one_by_one(forked: dict[str, str], bundle: Path, first: int, behind: int) -> subprocess.Popen[str]:
    """A process that adds items, each by itself, as soon as it is told to."""
    program = bundle.with_name("one_by_one.py")
    program.write_text(ONE_BY_ONE)
    words = ["python", program, bundle, str(first), str(behind)]
    return subprocess.Popen(words, env=forked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start(*processes: subprocess.Popen[str]) -> list[int]:
    """Let them go on once all are there; their ids."""
    ids = [int(process.stdout.readline()) for process in processes if process.stdout is not None]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return ids


def files_written(bundle: Path) -> int:
    """Of a new version that has not taken the bundle's place."""
    return max((len(list(path.glob("*"))) for path in bundle.parent.glob(".bundle.*") if path.is_dir()), default=0)


@pytest.mark.parametrize("moment", ["the first file", "all files", "the replacement"])
def test_a_process_killed_while_it_writes_leaves_a_whole_bundle_that_can_be_changed(
    moment: str, forked: dict[str, str], bundle: Path
) -> None:
    old, files = bundle.stat().st_ino, len(contents(bundle))
    reached: dict[str, Callable[[], bool]] = {
        "the first file": lambda: files_written(bundle) > 0,
        "all files": lambda: files_written(bundle) >= files,
        "the replacement": lambda: not bundle.exists() or bundle.stat().st_ino != old,
    }
    with one_by_one(forked, bundle, 7000, 7101) as process:
        (child,) = start(process)
        while process.poll() is None:
            if reached[moment]():
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.0001)
    assert process.returncode == -signal.SIGKILL
    open_directory(bundle)
    left = Recommender.load(bundle)
    assert left.items == len(left.catalogue) == indexed(bundle)
    add(bundle, goods([NEW + 1000]).lazy())
    assert Recommender.load(bundle).items == left.items + 1


def test_items_that_two_processes_add_at_once_are_all_there(forked: dict[str, str], bundle: Path) -> None:
    with one_by_one(forked, bundle, 7000, 7005) as one, one_by_one(forked, bundle, 8000, 8005) as other:
        start(one, other)
    assert (one.returncode, other.returncode) == (0, 0)
    recommender = Recommender.load(bundle)
    assert sorted(recommender.catalogue.item_ids[GOODS:]) == [*range(7000, 7005), *range(8000, 8005)]
    assert recommender.items == indexed(bundle) == GOODS + 10
