"""The nightly file."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from features.dataset import Dataset
from recsys.batch import FIRST_ITEM
from recsys.errors import RecsysError, RequestError
from serving import nightly as job
from serving.engine import Recommender
from serving.nightly import nightly
from serving.tables import write_frames

K = 11


def test_every_user_has_a_list_of_new_items_by_all_their_events(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    out = tmp_path / "new folder" / "lists.parquet"
    summary = nightly(Recommender.load(run), dataset, out, k=K, progress=lambda done, of: heard.append((done, of)))
    lists = pl.read_parquet(out)
    assert lists.schema == {"user_id": pl.String, "item_id": pl.Int64, "rank": pl.Int32, "score": pl.Float32}
    assert lists["user_id"].unique(maintain_order=True).to_list() == dataset.user_ids.to_list()
    assert lists["rank"].to_list() == list(range(1, K + 1)) * 211
    had = dataset.events.select("user_id", "item_id").collect()
    assert lists.join(had, on=["user_id", "item_id"]).is_empty()
    assert summary["users"] == 211
    assert summary["rows"] == len(lists) == 211 * K
    assert summary["underfilled"] == summary["popular"] == 0
    assert summary["users_per_second"] > 0
    assert heard[-1] == (211, 211)
    assert pl.read_parquet_metadata(out)["bundle"] == Recommender.load(run).id
    assert [file.name for file in out.parent.iterdir()] == ["lists.parquet"]


def test_the_bytes_do_not_depend_on_how_many_users_are_in_memory(
    run: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nightly(Recommender.load(run), dataset, tmp_path / "one.parquet", k=K)
    monkeypatch.setattr(job, "USERS", 37)
    nightly(Recommender.load(run), dataset, tmp_path / "two.parquet", k=K)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_lists_end_where_the_items_do(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    recommender = Recommender.load(run)
    summary = nightly(recommender, dataset, tmp_path / "lists.parquet", k=recommender.items)
    lists = pl.read_parquet(tmp_path / "lists.parquet")
    warm = dataset.items.filter(pl.col("row") < FIRST_ITEM + recommender.items)["item_id"]
    had = dataset.events.select("user_id", "item_id").collect().unique().filter(pl.col("item_id").is_in(warm.implode()))
    assert len(lists) == 211 * recommender.items - len(had)
    assert summary["underfilled"] == 211


def test_a_job_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    def frames() -> Iterator[pl.DataFrame]:
        yield pl.DataFrame({"a": [1]})
        raise RequestError("half way")

    (tmp_path / "lists.parquet").write_text("old")
    with pytest.raises(RequestError, match="half way"):
        write_frames(frames(), {"a": pl.Int64()}, tmp_path / "lists.parquet", {})
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_a_place_that_cannot_be_written_is_named(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecsysError, match="cannot be written"):
        nightly(Recommender.load(run), dataset, tmp_path / "file" / "lists.parquet", k=K)
    with pytest.raises(RequestError, match="k is 0"):
        nightly(Recommender.load(run), dataset, tmp_path / "lists.parquet", k=0)
