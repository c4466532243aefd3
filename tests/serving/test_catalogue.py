"""Ids, titles, and data sets that have grown since the model was trained."""

from pathlib import Path

import polars as pl
import pytest
import torch

from features.build import build
from features.dataset import Dataset
from recsys.batch import FIRST_ITEM
from recsys.config import Recipe
from recsys.errors import RequestError
from serving.catalogue import Catalogue


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    titles = ["Heat", "heat", "Up", "1984", None, "Heat"]
    ids = [70, 50, 30, 20, 10, 5]
    table = {"row": range(2, 8), "item_id": ids, "title": titles, "events": [9, 7, 5, 3, 1, 0]}
    pl.DataFrame(table).write_parquet(tmp_path / "items.parquet")
    return Catalogue(tmp_path / "items.parquet")


def test_an_id_comes_before_a_title_and_case_counts_before_it_does_not(catalogue: Catalogue) -> None:
    assert [catalogue.resolve(word) for word in ("70", 70, "heat", "Heat", "HEAT", "up", "1984", "10")] == [
        2,
        2,
        3,
        2,
        2,
        4,
        5,
        6,
    ]
    assert catalogue.by_title("1984") == 5
    assert (catalogue.item_id(6), catalogue.title(6), catalogue.title(3)) == (10, "10", "heat")
    assert len(catalogue) == 6


def test_a_word_that_is_no_item_is_named_with_what_is_near(catalogue: Catalogue) -> None:
    with pytest.raises(RequestError, match="no item 'Heatt'; nearest titles: "):
        catalogue.resolve("Heatt")
    with pytest.raises(RequestError, match="no item '1984'"):
        catalogue.rows(["70", 1984], catalogue.by_id)
    unknown: list[int | str] = []
    assert catalogue.rows(["Up", "Down", 3], catalogue.by_either, unknown) == [4, None, None]
    assert unknown == ["Down", 3]


def test_a_grown_data_set_is_read_in_the_rows_of_the_model(dataset: Dataset, tmp_path: Path) -> None:
    catalogue = Catalogue(dataset.path / "items.parquet")
    assert catalogue.align(dataset) is dataset.sequences
    users = ["a"] * 3 + ["b"] * 2
    events = {"user_id": users, "item_id": [10**6, 31, 10**6 + 1, 17, 10**6], "timestamp": range(5)}
    pl.DataFrame(events).write_parquet(tmp_path / "events.parquet")
    build(tmp_path, Recipe("grown", {}), tmp_path / "grown")
    grown = Dataset.open(tmp_path / "grown")
    aligned = catalogue.align(grown)
    rows = aligned.items.tolist()
    assert [rows[1], rows[3]] == [catalogue.by_id(31), catalogue.by_id(17)]
    new = rows[0], rows[2], rows[4]
    assert new[0] == new[2] != new[1]
    assert min(new) >= FIRST_ITEM + len(catalogue)
    assert torch.equal(aligned.offsets, grown.sequences.offsets)


def test_what_was_removed_and_how_items_are_described_is_known_by_row(tmp_path: Path) -> None:
    table = {"row": [2, 3], "item_id": [7, 5], "title": ["q", None], "text": ["kind: x", ""], "events": [3, 0]}
    whole = pl.DataFrame(table).with_columns(
        categories=pl.Series([["x", "y"], []], dtype=pl.List(pl.String)),
        numbers=pl.Series([[{"values": [2.5, None]}, {"values": [3.5]}], []]),
    )
    whole.write_parquet(tmp_path / "items.parquet")
    plain = Catalogue(tmp_path / "items.parquet")
    assert plain.table.equals(whole.with_columns(removed=pl.lit(False)))
    assert plain.removed.tolist() == [False, False]
    assert list(plain.described.texts) == ["kind: x", ""]
    assert list(plain.described.categories) == [["x", "y"], []]
    assert list(plain.described.numbers) == [[[2.5, None], [3.5]], []]
    whole.with_columns(removed=pl.Series([False, True])).write_parquet(tmp_path / "items.parquet")
    assert Catalogue(tmp_path / "items.parquet").removed.tolist() == [False, True]
