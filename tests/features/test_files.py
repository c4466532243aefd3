"""Files: every format gives the same data set, and what cannot be read is one clear line."""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.build import build
from features.dataset import Dataset
from features.files import FORMATS, find_files, read_items
from features.schema import DataSettings
from recsys.config import Recipe
from recsys.errors import DataError

EVENTS = pl.DataFrame({"user_id": [1, 2, 1, 2, 3], "item_id": [7, 7, 5, 3, 11], "timestamp": [10, 20, 30, 40, 50]})
ITEMS = pl.DataFrame({"item_id": [3, 5, 7, 11], "title": ["c", "e", None, "k"], "kind": ["x|y", "", None, "y"]})


def build_here(folder: Path, **data: Any) -> Dataset:
    build(folder, Recipe("test", {"data": data}), folder / "out")
    return Dataset.open(folder / "out")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_every_format_gives_the_same_data_set(folder: Path, suffix: str, build_in: Callable[..., Dataset]) -> None:
    want = build_in(folder, EVENTS, items=ITEMS, category_columns=["kind"]).manifest["hash"]
    found = build_in(folder, EVENTS[:2], EVENTS[2:], items=ITEMS, category_columns=["kind"], suffix=suffix)
    assert found.manifest["hash"] == want
    assert found.items.schema["item_id"] == pl.Int64


def test_packed_and_tab_separated_files_are_read(folder: Path) -> None:
    EVENTS[:2].write_csv(folder / "events-1.tsv", separator="\t")
    (folder / "events-2.csv.gz").write_bytes(gzip.compress(EVENTS[2:].write_csv().encode()))
    assert build_here(folder).manifest["events"] == 5


def test_events_are_one_file_a_glob_or_a_folder(folder: Path) -> None:
    (folder / "days" / "1").mkdir(parents=True)
    EVENTS[:2].write_parquet(folder / "days" / "1" / "a.parquet")
    EVENTS[2:].write_csv(folder / "days" / "b.csv")
    (folder / "days" / "README.md").write_text("no events")
    hashes = {build_here(folder, events=pattern).manifest["hash"] for pattern in ("days", "da*", "days/**/*.*")}
    assert len(hashes) == 1
    assert [path.name for path in find_files(folder, "days")] == ["a.parquet", "b.csv"]
    build(folder / "days" / "b.csv", Recipe("test", {}), folder / "one")
    assert Dataset.open(folder / "one").manifest["events"] == 3


def test_columns_go_by_their_names_in_the_recipe(folder: Path) -> None:
    renamed = EVENTS.rename({"user_id": "who", "item_id": "what", "timestamp": "when"})
    renamed.with_columns(order=pl.lit("no number"), user_id=pl.lit(None)).write_parquet(folder / "events.parquet")
    found = build_here(folder, user_id="who", item_id="what", timestamp="when")
    assert found.events.collect().equals(EVENTS.sort("user_id"))


@pytest.mark.parametrize("ids", [["1", "2", "x"], ["01", "2", "3"]])
def test_ids_of_a_csv_file_stay_texts_unless_all_are_numbers(folder: Path, ids: list[str]) -> None:
    pl.DataFrame({"user_id": ids, "item_id": [1, 2, 3], "timestamp": 5}).write_csv(folder / "events.csv")
    found = build_here(folder)
    assert found.user_ids.to_list() == sorted(ids)
    assert found.items.schema["item_id"] == pl.Int64


def test_ids_are_texts_where_any_table_has_them_so(folder: Path) -> None:
    EVENTS.write_parquet(folder / "events.parquet")
    ITEMS.cast({"item_id": pl.String}).write_parquet(folder / "items.parquet")
    found = build_here(folder)
    assert sorted(found.items["item_id"]) == ["11", "3", "5", "7"]
    assert found.manifest["rows"]["repaired"] == {}


def spoil_nothing(folder: Path) -> None:
    shutil.rmtree(folder)


BROKEN: dict[str, tuple[Callable[[Path], object], dict[str, str], str]] = {
    "no folder": (spoil_nothing, {}, "no file matches 'events*' (there is no such folder)"),
    "no events": (lambda f: (f / "clicks.csv").write_text("a"), {}, "no file matches 'events*' (it holds clicks.csv)"),
    "no items": (lambda f: EVENTS.write_csv(f / "events.csv"), {"items": "films.csv"}, "no file matches 'films.csv'"),
    "empty": (lambda f: (f / "events.csv").write_text(""), {}, "events.csv: the file is empty"),
    "header alone": (lambda f: (f / "events.csv").write_text("user_id,item_id,timestamp\n"), {}, "there are no events"),
    "column": (lambda f: (f / "events.csv").write_text("user,item_id,timestamp\n1,2,3\n"), {}, "did you mean 'user'?"),
    "semicolons": (lambda f: (f / "events.csv").write_text("user;item;day\n1;2;3\n"), {}, "write it with commas"),
    "not Parquet": (lambda f: (f / "events.parquet").write_text("nonsense"), {}, "cannot be read"),
    "not JSON": (lambda f: (f / "events.jsonl").write_text('{"user_id": 1}\nnonsense\n'), {}, "cannot be read"),
    "ragged": (lambda f: (f / "events.csv").write_text("user_id,item_id,timestamp\n1,2,3,4\n"), {}, "cannot be read"),
    "not UTF-8": (lambda f: (f / "events.csv").write_bytes(b"user_id,item_id,timestamp\n1,\xe4,3\n"), {}, "cannot be read"),
    "all bad": (
        lambda f: (f / "events.csv").write_text("user_id,item_id,timestamp\n1,2,x\n"),
        {},
        "none of 1 events is usable (1 wrong_type",
    ),
    "milliseconds": (
        lambda f: (f / "events.csv").write_text("user_id,item_id,timestamp\n1,2,1767225600000\n"),
        {},
        'check time_unit, which may be "ms", in the recipe',
    ),
    "list": (
        lambda f: EVENTS.with_columns(item_id=pl.concat_list("item_id")).write_parquet(f / "events.parquet"),
        {},
        "column item_id holds List",
    ),
    "two types": (
        lambda f: (
            EVENTS.write_parquet(f / "events-1.parquet"),
            EVENTS.cast({"timestamp": pl.Datetime}).write_parquet(f / "events-2.parquet"),
        ),
        {},
        "store one type in all files",
    ),
    "title": (
        lambda f: (EVENTS.write_parquet(f / "events.parquet"), ITEMS.write_parquet(f / "items.parquet")),
        {"title": "titel"},
        "did you mean 'title'?",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_one_line(case: str, tmp_path: Path) -> None:
    spoil, data, says = BROKEN[case]
    (tmp_path / "raw").mkdir()
    spoil(tmp_path / "raw")
    with pytest.raises(DataError) as error:
        build(tmp_path / "raw", Recipe("test", {"data": data}), tmp_path / "out")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != "raw"] == []


@pytest.mark.parametrize("name", ["items.csv", "items.tsv", "items.parquet", "items.jsonl", "items.csv.gz"])
def test_an_items_table_is_read_by_itself_with_the_columns_that_the_settings_name(folder: Path, name: str) -> None:
    table = pl.DataFrame({"sku": [17, 3], "item_id": ["x", "y"], "title": ["q", "c"]})
    writers: dict[str, Callable[[Path], object]] = {
        "items.tsv": lambda path: table.write_csv(path, separator="\t"),
        "items.parquet": table.write_parquet,
        "items.jsonl": table.write_ndjson,
        "items.csv.gz": lambda path: path.write_bytes(gzip.compress(table.write_csv().encode())),
    }
    writers.get(name, table.write_csv)(folder / name)
    found = read_items(folder / name, DataSettings(item_id="sku")).collect()
    assert found.equals(pl.DataFrame({"item_id": [17, 3], "item_id_raw": ["x", "y"], "title": ["q", "c"]}))
    assert read_items(folder / name, DataSettings(source="ml-1m", item_id="sku")).collect()["item_id"].to_list() == ["x", "y"]


def test_an_items_table_of_no_known_format_or_without_its_id_is_one_line(folder: Path) -> None:
    ITEMS.write_csv(folder / "items.csv")
    (folder / "items.xlsx").write_bytes(b"PK")
    (folder / "empty.csv").touch()
    wrong = {"items.xlsx": "is no file of items; give one of .csv", "gone.csv": "is no file of items", "empty.csv": "is empty"}
    for name, says in wrong.items():
        with pytest.raises(DataError, match=f"{name}: .*{says}"):
            read_items(folder / name, DataSettings())
    with pytest.raises(DataError, match="is no file of items"):
        read_items(folder, DataSettings())
    with pytest.raises(DataError, match=r"items\.csv: no column 'itemid'; did you mean 'item_id'") as error:
        read_items(folder / "items.csv", DataSettings(item_id="itemid"))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=re.escape(", ".join(FORMATS))):
        read_items(folder / "items.xlsx", DataSettings())


def test_an_items_table_without_its_title_is_refused_and_the_title_is_read_by_its_name(folder: Path) -> None:
    pl.DataFrame({"item_id": [3, 7], "name": ["a lamp", "a kettle"]}).write_csv(folder / "new.csv")
    with pytest.raises(DataError, match=r"new\.csv: no column 'title'"):
        read_items(folder / "new.csv", DataSettings())
    found = read_items(folder / "new.csv", DataSettings(title="name")).collect()
    assert found["title"].to_list() == ["a lamp", "a kettle"]
    assert "title" not in read_items(folder / "new.csv", DataSettings(title="")).collect_schema()
