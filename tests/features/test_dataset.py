"""The DATASET directory: opened only if it is whole, and read as tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch

from features.dataset import Dataset, write_parquet
from recsys.errors import DataError

Build = Callable[..., Dataset]
EVENTS = pl.DataFrame({"user_id": ["b", "a", "a", "b", "b"], "item_id": [3, 3, 5, 5, 7], "timestamp": [11, 13, 17, 19, 23]})


def test_sequences_are_the_users_events_as_tensors(folder: Path, build_in: Build) -> None:
    found = build_in(folder, EVENTS)
    rows = dict(found.items.select("item_id", "row").rows())
    sequences = found.sequences
    assert found.user_ids.to_list() == ["a", "b"]
    assert sequences.items.tolist() == [rows[item] for item in (3, 5, 3, 5, 7)]
    assert sequences.times.tolist() == [13, 17, 11, 19, 23]
    assert sequences.offsets.tolist() == [0, 2, 5]
    assert sequences.train_end.tolist() == [1, 1]
    assert sequences.validation_end.tolist() == [1, 2]
    assert sequences.items.dtype == torch.int32
    assert {part.dtype for part in (sequences.times, sequences.offsets, sequences.train_end)} == {torch.int64}


def test_users_and_quarantine_are_none_where_there_are_none(folder: Path, build_in: Build) -> None:
    found = build_in(folder, EVENTS)
    assert found.users is None
    assert found.quarantine is None
    users = pl.DataFrame({"user_id": ["b", "a", None], "age": [31, 17, 5]})
    found = build_in(folder, EVENTS, users=users)
    assert found.users is not None and found.users.rows() == [("a", 17), ("b", 31)]
    assert found.quarantine is not None and found.quarantine.rows() == [("users", "null_id", "5")]
    assert found.manifest["user_rows"]["quarantined"] == {"null_id": 1}


def test_an_altered_or_missing_file_is_refused(folder: Path, build_in: Build) -> None:
    path = build_in(folder, EVENTS).path
    file = path / "sequences.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"sequences\.parquet"):
        Dataset.open(path)
    Dataset.open(path, verify=False)
    file.unlink()
    with pytest.raises(DataError, match=r"sequences\.parquet"):
        Dataset.open(path, verify=False)


def test_another_format_is_refused(folder: Path, build_in: Build) -> None:
    place = build_in(folder, EVENTS).path / "dataset.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"format": 97}))
    with pytest.raises(DataError, match="format 97"):
        Dataset.open(place.parent)
    with pytest.raises(DataError, match=r"dataset\.json"):
        Dataset.open(folder / "nowhere")


@pytest.mark.parametrize("chunk", [1, 13, 4001])
def test_the_bytes_of_a_table_depend_on_its_rows_alone(chunk: int, tmp_path: Path) -> None:
    numbers = pl.int_range(4001, eager=True)
    table = pl.DataFrame({"n": numbers, "text": numbers.cast(pl.String)})
    table = table.with_columns(numbers=pl.int_ranges(pl.col("n") % 17), texts=pl.concat_list("text", "text"))
    write_parquet([table], table.schema, tmp_path / "whole", rows=1000)
    write_parquet(
        (table[start : start + chunk] for start in range(0, 4001, chunk)), table.schema, tmp_path / "parts", rows=1000
    )
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    assert pl.read_parquet(tmp_path / "whole").equals(table)
