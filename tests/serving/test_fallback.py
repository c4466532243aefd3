"""Lists for when none can be computed."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import torch

from features.dataset import Dataset
from recsys.batch import FIRST_ITEM
from recsys.errors import DataError
from serving import fallback as module
from serving.engine import Recommender
from serving.fallback import NightlyLists, nightly, popular
from serving.nightly import nightly as score_all

K = 11


@pytest.fixture(scope="module")
def recommender(bundles: dict[str, Path]) -> Recommender:
    return Recommender.load(bundles["exact"], threads=1)


@pytest.fixture(scope="module")
def written(recommender: Recommender, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lists") / "lists.parquet"
    score_all(recommender, dataset, path, k=K)
    return path


@pytest.fixture
def file(written: Path, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "lists.parquet"
    path.write_bytes(written.read_bytes())
    yield path


def made(path: Path, users: list[int | str]) -> NightlyLists:
    """Lists of the items 10 × place of user + rank, with the users as they come."""
    lines = [(user, 10 * place + rank, rank, -float(rank)) for place, user in enumerate(users) for rank in (1, 2, 3)]
    pl.DataFrame(lines, schema=["user_id", "item_id", "rank", "score"], orient="row").write_parquet(path)
    return NightlyLists(path)


def test_every_user_has_the_list_of_the_file(file: Path) -> None:
    lists, table = NightlyLists(file), pl.read_parquet(file)
    assert len(lists) == 211
    for user in table["user_id"].unique():
        mine = table.filter(pl.col("user_id") == user).sort("rank")
        assert lists.of(user) == list(zip(mine["item_id"], mine["score"], strict=True))
    for nobody in ("", "user", "user 0070", "zz", "é"):
        assert lists.of(nobody) == []


@pytest.mark.parametrize("users", [[3, 20, 100, -7, 9], ["b", "a", "é", "aa", "", "z" * 500]])
def test_ids_are_found_as_text_whatever_their_order(users: list[int | str], tmp_path: Path) -> None:
    lists = made(tmp_path / "lists.parquet", users)
    for place, user in enumerate(users):
        assert lists.of(str(user)) == [(10 * place + rank, -float(rank)) for rank in (1, 2, 3)]


def test_a_replaced_file_is_read_again(file: Path, tmp_path: Path) -> None:
    lists = NightlyLists(file)
    assert not lists.refresh()
    made(tmp_path / "new.parquet", ["x"])
    (tmp_path / "new.parquet").replace(file)
    assert lists.refresh()
    assert len(lists.of("x")) == 3
    assert not lists.refresh()
    file.write_text("nothing")
    with pytest.raises(DataError, match="cannot be read as lists"):
        lists.refresh()
    assert len(lists.of("x")) == 3  # the old ones stay
    with pytest.raises(DataError, match="cannot be read as lists"):
        NightlyLists(tmp_path / "none.parquet")


@pytest.mark.parametrize("rows", [2**20, 37])
def test_an_erased_user_leaves_the_file_and_the_others_stay(rows: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    lists, before = NightlyLists(file), pl.read_parquet(file)
    assert lists.erase("user 007")
    assert not lists.erase("user 007")
    assert lists.of("user 007") == []
    assert pl.read_parquet(file).equals(before.filter(pl.col("user_id") != "user 007"))
    assert len(NightlyLists(file)) == 210
    assert pl.read_parquet_metadata(file)["bundle"]
    assert not lists.refresh()


def test_the_last_user_may_be_erased(tmp_path: Path) -> None:
    lists = made(tmp_path / "lists.parquet", [5])
    assert lists.erase("5")
    assert len(lists) == len(NightlyLists(tmp_path / "lists.parquet")) == 0


def test_a_list_holds_what_may_be_recommended_and_is_known(recommender: Recommender) -> None:
    listed: list[tuple[int | str, float]] = [(item, 0.5) for item in (5, 7, "of another shop", 11, 13, 17)]
    rows = {item: recommender.catalogue.by_id(item) for item in (5, 7, 11, 13, 17)}
    allowed_V = torch.ones(recommender.lines, dtype=torch.bool)
    allowed_V[rows[11] - FIRST_ITEM] = False  # type: ignore[operator]
    assert [row for row, _ in nightly(recommender, listed, 3, None, set())] == [rows[5], rows[7], rows[11]]
    assert [row for row, _ in nightly(recommender, listed, 3, allowed_V, {rows[5]})] == [  # type: ignore[arg-type]
        rows[7],
        rows[13],
        rows[17],
    ]
    assert nightly(recommender, listed, 3, torch.zeros(recommender.lines, dtype=torch.bool), set()) == []


def test_the_most_popular_are_those_of_an_empty_history(recommender: Recommender) -> None:
    told = recommender.answer([], 31)["items"]
    found = popular(recommender, 31, None, set())
    assert [recommender.catalogue.item_id(row) for row, _ in found] == [item["item_id"] for item in told]
    assert [score for _, score in found] == [item["score"] for item in told]
    seen = {found[0][0], found[7][0]}
    allowed_V = torch.ones(recommender.lines, dtype=torch.bool)
    allowed_V[found[3][0] - FIRST_ITEM] = False
    rest = [pair for place, pair in enumerate(found) if place not in (0, 3, 7)]
    assert popular(recommender, len(rest), allowed_V, seen) == rest
