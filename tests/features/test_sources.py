"""The public sets are read from their publishers' forms, from prepared copies and over HTTP, into the same columns."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.download import Published
from features.readers import GENRES_100K
from features.schema import RawTables
from features.sources import SOURCES, read_source
from recsys.errors import DataError, SetupError
from tests.features.publisher import Publisher
from tests.features.workbook import workbook, zipped

Rows = list[tuple[Any, ...]]
EVENT = ["user_id", "item_id", "timestamp", "order"]


def rows(table: pl.LazyFrame | None) -> Rows:
    assert table is not None
    return table.collect().rows()


def rows_by_column(table: pl.LazyFrame | None, *names: str) -> list[list[Any]]:
    assert table is not None
    return [column.to_list() for column in table.select(names).collect()]


def ml_1m() -> dict[str, bytes]:
    """Item 31 has 5 ratings, item 37 has 6, item 41 has 4; users 2 and 3 rate two items in the same second."""
    ratings = [(user, 31, 1_000 - user) for user in (2, 3, 5, 7, 11)] + [(user, 41, 1_001) for user in (2, 3, 5, 7)]
    ratings += [(user, 37, 1_000 - user) for user in (2, 3, 13, 17, 19)] + [(5, 37, 900)]
    movies = '31::Misérables, Les (1995)::Drama|Musical\n37::Se7en (1995)::Crime\n41::Q: A "B" (2000)::War\n'
    return {
        "ml-1m/ratings.dat": "".join(f"{user}::{item}::4::{time}\n" for user, item, time in ratings).encode(),
        "ml-1m/movies.dat": movies.encode("latin-1"),
        "ml-1m/users.dat": b"2::F::1::10::48067\n",
    }


def ml_100k() -> dict[str, bytes]:
    def item(number: int, title: str, *genres: str) -> str:
        flags = ["1" if genre in genres else "0" for genre in ("unknown", *GENRES_100K)]
        return "|".join([str(number), title, "01-Jan-1995", "", "http://example.org/?a", *flags]) + "\n"

    items = item(3, "Été (1995)", "Children's", "Comedy") + item(5, "unknown", "unknown") + item(7, "Plain (1995)")
    return {
        "ml-100k/u.data": b"13\t5\t3\t881250949\n11\t3\t5\t881250950\n13\t3\t4\t881250949\n11\t7\t1\t881250900\n",
        "ml-100k/u.item": items.encode("latin-1"),
        "ml-100k/u.user": b"11|24|M|technician|85711\n13|53|F|other|94043\n",
    }


def amazon_beauty() -> dict[str, bytes]:
    reviews = [("A3", "B001", 86_400), ("A1", "B002", 172_800), ("A3", "B002", 0), ("A1", "B001", 172_800)]
    lines = [json.dumps({"reviewerID": u, "asin": i, "overall": 5.0, "unixReviewTime": t}) for u, i, t in reviews]
    meta = [
        "{'asin': 'B001', 'title': 'Ben\\'s Soap &amp; Oil', 'categories': [['Beauty', 'Bath'], ['Beauty', 'Oil']]}",
        "{'asin': 'B000', 'title': this line is never parsed",
        "{'asin': 'B002', 'categories': [['Beauty']], 'related': {'also_bought': ['B001']}}",
    ]
    return {
        "reviews_Beauty_5.json.gz": gzip.compress("\n".join(lines).encode()),
        "meta_Beauty.json.gz": gzip.compress("\n".join(meta).encode()),
    }


RETAIL_HEAD = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country")
RETAIL: Rows = [
    (536365, "85123A", "HEART, WHITE", 6, 40513.351388888885, 2.55, 17850, "United Kingdom"),
    (536365, 71053, "WHITE LANTERN", 6, 40513.351388888885, 3.39, 17850, "United Kingdom"),
    (536365, "M", "MANUAL", 1, 40513.351388888885, 3.39, 17850, "United Kingdom"),
    (536365, 71053, "WHITE LANTERN", 2, 40513.351388888885, 3.39, 17850, "United Kingdom"),
    ("C536379", "85123A", "HEART, WHITE", -1, 40513.4, 2.55, 17850, "United Kingdom"),
    (536380, 71053, "wet?", 5, 40513.25, 3.39, None, "France"),
    (536381, "POST", "POSTAGE", 1, 40513.3, 18, 12583, "France"),
    (536382, "85123A", None, 3, 40513.3, 2.55, 17850, "United Kingdom"),
]


def retail_csv(form: str) -> bytes:
    epoch = pl.datetime(1899, 12, 30) + pl.duration(seconds=(pl.col("day") * 86_400).round().cast(pl.Int64))
    dates = pl.DataFrame({"day": [row[4] for row in RETAIL]}).select(epoch.dt.strftime(form)).to_series()
    lines = [[str("" if cell is None else cell) for cell in row] for row in RETAIL]
    for line, date in zip(lines, dates, strict=True):
        line[2], line[4] = f'"{line[2]}"' if "," in line[2] else line[2], date
    return "\n".join([",".join(RETAIL_HEAD), *(",".join(line) for line in lines)]).encode()


def retail_workbook() -> bytes:
    return workbook([RETAIL_HEAD, *RETAIL], date_column=4)


def online_retail() -> dict[str, bytes]:
    return {"Online Retail.csv": retail_csv("%Y-%m-%d %H:%M:%S")}


def banking77() -> dict[str, bytes]:
    """Eleven messages of one intent, so that the tenth is for validation, and one of another; two of the test."""
    train = [f'"Where is card {number}?\n",card_arrival\n' for number in range(11)]
    train.append('"What, again?",Refund_not_showing_up\n')
    test = ["I forgot my code,card_arrival\n", "My money back,Refund_not_showing_up\n"]
    return {name: ("text,category\n" + "".join(rows)).encode() for name, rows in (("train.csv", train), ("test.csv", test))}


def financial_phrasebank() -> dict[str, bytes]:
    """Three headlines of steel, one of food, one of neither, one twice."""
    texts = ["Outokumpu 's profit fell@negative", "Ruukki @ work in Turku@neutral", "Componenta gains@positive"]
    texts += ["Olvi brews more@positive", "Höyry: nothing happened@neutral", "Olvi brews more@neutral"]
    return {"Sentences_50Agree.txt": "\r\n".join(texts).encode("latin-1")}


FILES: dict[str, Callable[[], dict[str, bytes]]] = {
    "ml-1m": ml_1m,
    "ml-100k": ml_100k,
    "amazon-beauty": amazon_beauty,
    "online-retail": online_retail,
    "banking77": banking77,
    "financial-phrasebank": financial_phrasebank,
}


def place(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_every_source_has_files_to_test() -> None:
    assert list(FILES) == list(SOURCES)


def test_ml_1m_orders_ties_by_file_row_and_drops_rare_items(tmp_path: Path) -> None:
    tables = read_source("ml-1m", place(tmp_path, ml_1m()))
    events = tables.events.collect()
    assert events.columns == EVENT
    assert events.filter(pl.col("user_id") <= 5).rows() == [
        (2, 31, 998, 1), (2, 37, 998, 2), (3, 31, 997, 1), (3, 37, 997, 2), (5, 37, 900, 1), (5, 31, 995, 2),
    ]  # fmt: skip
    assert events["item_id"].value_counts().sort("item_id").rows() == [(31, 5), (37, 6)]
    assert rows(tables.items) == [
        (31, "Misérables, Les (1995)", "Drama|Musical"), (37, "Se7en (1995)", "Crime"), (41, 'Q: A "B" (2000)', "War"),
    ]  # fmt: skip
    assert rows(tables.users) == [(2, "F", "1", "10", "48067")]


def test_ml_100k_reads_genres_from_flags(tmp_path: Path) -> None:
    tables = read_source("ml-100k", place(tmp_path, ml_100k()))
    assert rows(tables.events) == [
        (11, 7, 881250900, 1), (11, 3, 881250950, 2), (13, 5, 881250949, 1), (13, 3, 881250949, 2),
    ]  # fmt: skip
    assert rows(tables.items) == [(3, "Été (1995)", "Children's|Comedy"), (5, "unknown", "unknown"), (7, "Plain (1995)", "")]
    assert rows(tables.users) == [(11, "24", "M", "technician", "85711"), (13, "53", "F", "other", "94043")]


def test_amazon_beauty_reads_only_the_items_of_the_events(tmp_path: Path) -> None:
    tables = read_source("amazon-beauty", place(tmp_path, amazon_beauty()))
    assert rows(tables.events) == [
        ("A1", "B002", 172_800, 1), ("A1", "B001", 172_800, 2), ("A3", "B002", 0, 1), ("A3", "B001", 86_400, 2),
    ]  # fmt: skip
    assert rows(tables.items) == [("B001", "Ben's Soap & Oil", "Beauty|Bath|Oil"), ("B002", None, "Beauty")]
    assert tables.users is None


def check_retail(tables: RawTables) -> None:
    day = 1_291_161_600  # 2010-12-01
    assert rows(tables.events) == [
        (12583, "POST", day + 25_920, 1), (17850, "85123A", day + 25_920, 1), (17850, "85123A", day + 30_360, 2),
        (17850, "71053", day + 30_360, 3), (17850, "M", day + 30_360, 4),
    ]  # fmt: skip
    assert rows(tables.items) == [("71053", "WHITE LANTERN"), ("85123A", "HEART, WHITE"), ("M", "MANUAL"), ("POST", "POSTAGE")]
    assert rows(tables.users) == [(12583, "France"), (17850, "United Kingdom")]


@pytest.mark.parametrize("form", ["%Y-%m-%d %H:%M:%S", "%-m/%-d/%Y %-H:%M"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_online_retail_keeps_what_a_customer_bought_once_an_invoice(tmp_path: Path, form: str, encoding: str) -> None:
    content = retail_csv(form) + "\n536390,9,CAFÉ,-1,2010-12-01 09:00:00,1,,France".encode()
    tables = read_source("online-retail", place(tmp_path, {"Online Retail.csv": content.decode().encode(encoding)}))
    items = tables.items
    assert items is not None
    assert rows(items.filter(pl.col("item_id") == "9")) == [("9", "CAFÉ")]
    check_retail(dataclasses.replace(tables, items=items.filter(pl.col("item_id") != "9")))


def test_a_conversation_is_a_message_and_the_answer_of_its_intent(tmp_path: Path) -> None:
    tables = read_source("banking77", place(tmp_path, banking77()))
    events, items = tables.events.collect(), dict(zip(*rows_by_column(tables.items, "item_id", "title"), strict=True))
    assert items["card_arrival"] == "Card arrival" and items["Refund_not_showing_up"] == "Refund not showing up"
    assert items["m1"] == "Where is card 0?" and items["m12"] == "What, again?" and items["m14"] == "My money back"
    assert sorted(set(rows_by_column(tables.items, "categories")[0])) == ["answer", "message"]
    told = events.group_by("user_id", maintain_order=True).agg("item_id", (pl.col("timestamp") - 1_704_067_200) // 86_400)
    found = {user: (said, days) for user, said, days in told.rows()}
    assert found["c1"] == (["m1", "card_arrival"], [0, 0])
    assert found["c10"] == (["m10", "card_arrival"], [0, 1])
    assert found["c12"] == (["m12", "Refund_not_showing_up"], [0, 0])
    assert found["c13"] == (["m13", "card_arrival"], [1, 2])
    assert len(found) == 14 and len(items) == 16


def test_a_desk_reads_headlines_of_its_trade_within_the_hour(tmp_path: Path) -> None:
    tables = read_source("financial-phrasebank", place(tmp_path, financial_phrasebank()))
    assert tables.items is not None and tables.users is not None
    items = tables.items.collect()
    titles = dict(items.select("title", "sentiment").rows())
    assert titles["Ruukki @ work in Turku"] == "neutral" and titles["Olvi brews more"] == "positive" and len(items) == 5
    assert titles["Höyry: nothing happened"] == "neutral"
    trades = dict(items.select("title", "trade").rows())
    assert trades["Componenta gains"] == "steel" and trades["Olvi brews more"] == "food"
    assert trades["Höyry: nothing happened"] is None
    read = tables.events.join(tables.items, on="item_id").join(tables.users, on="user_id").collect()
    assert read["follows"].n_unique() > 2  # by the chance of a headline of no trade of theirs
    assert (read["timestamp"] - read["published"]).is_between(0, 3599).all()
    own = read.filter(pl.col("follows") == pl.col("trade"))
    assert 0.6 < len(own) / (20 * 3 + 20) < 0.8
    assert own.filter(pl.col("trade") == "steel")["user_id"].n_unique() > 15


def test_a_set_that_is_not_downloaded_asks_for_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"no queries\.parquet or train\.csv .* name the folder .* for it is not downloaded"):
        read_source("banking77")


def test_the_workbook_says_the_same_as_its_csv(tmp_path: Path) -> None:
    pytest.importorskip("fastexcel")
    check_retail(read_source("online-retail", place(tmp_path, {"Online Retail.xlsx": retail_workbook()})))


def test_a_workbook_without_its_reader_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastexcel", None)
    with pytest.raises(SetupError, match=r"fastexcel; pip install .* or save the workbook as Online Retail\.csv"):
        read_source("online-retail", place(tmp_path, {"Online Retail.xlsx": retail_workbook()}))


@pytest.mark.parametrize("name", FILES)
def test_a_zip_and_a_parent_folder_are_as_good_as_the_folder(tmp_path: Path, name: str) -> None:
    files = FILES[name]()
    flat = {path.rpartition("/")[2]: content for path, content in files.items()}
    place(tmp_path / "parent" / name, flat)
    place(tmp_path / "zip", {"any.zip": zipped(files)})
    tables = [read_source(name, tmp_path / folder) for folder in ("parent", f"parent/{name}", "zip")]
    for other in tables[1:]:
        assert rows(other.events) == rows(tables[0].events)
        assert rows(other.items) == rows(tables[0].items)


@pytest.mark.parametrize("name", FILES)
def test_a_source_is_downloaded_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publisher: Publisher) -> None:
    files = FILES[name]()
    if name != "amazon-beauty":
        files = {f"{name}.zip": zipped(files)}
    publisher.files = {f"/{path}": content for path, content in files.items()}
    published = [
        Published(f"{publisher.url}/{path}", len(body), hashlib.sha256(body).hexdigest()) for path, body in files.items()
    ]
    monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], files=tuple(published)))
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path))
    reports: list[str] = []
    first = read_source(name, progress=lambda file, done, total: reports.append(file))
    assert {file.name for file in published} == set(reports)
    publisher.stop()
    assert rows(read_source(name).events) == rows(first.events)
    assert len(publisher.requests) == len(published)
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(files)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_broken_file_is_named(tmp_path: Path, name: str) -> None:
    files = FILES[name]()
    for number, broken in enumerate(files):
        for content in (None, b"\x1f\x8b\x00", files[broken][:-40] + b"\n#\n"):
            folder = tmp_path / f"{number}-{content and len(content)}"
            place(folder, {**files, broken: content} if content else {path: files[path] for path in files if path != broken})
            folder.mkdir(exist_ok=True)
            with pytest.raises(DataError, match=str(folder)) as caught:
                rows(read_source(name, folder).events)
            assert "\n" not in str(caught.value)


def test_a_broken_zip_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="BadZipFile"):
        read_source("ml-1m", place(tmp_path, {"ml-1m.zip": b"PK"}))


def test_a_prepared_copy_without_its_columns_is_named(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": [1], "item_id": [2], "timestamp": [3]}).write_parquet(tmp_path / "events.parquet")
    with pytest.raises(DataError, match="seq"):
        read_source("ml-100k", tmp_path)


def test_an_unknown_source_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'ml-2m': choose one of ml-1m, ml-100k, amazon-beauty, online-retail"):
        read_source("ml-2m", tmp_path)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher()
    yield publisher
    publisher.stop()


@pytest.fixture
def real() -> Path:
    folder = os.environ.get("RECSYS_DATA")
    if not folder:
        pytest.skip(f"RECSYS_DATA names no folder with {', '.join(SOURCES)}")
    return Path(folder)


@pytest.mark.parametrize(
    ("name", "users", "items", "events", "listed"),
    [
        ("ml-1m", 6_040, 3_416, 999_611, 3_883),
        ("ml-100k", 943, 1_682, 100_000, 1_682),
        ("amazon-beauty", 22_363, 12_101, 198_502, 12_101),
        ("online-retail", 4_339, 3_665, 387_875, 4_070),
        ("banking77", 13_083, 13_160, 26_166, 13_160),
        ("financial-phrasebank", 240, 3_467, 21_548, 4_838),
    ],
)
def test_real_counts(real: Path, name: str, users: int, items: int, events: int, listed: int) -> None:
    tables = read_source(name, real)
    frame = tables.events.collect()
    assert frame.columns == EVENT
    assert (frame["user_id"].n_unique(), frame["item_id"].n_unique(), len(frame)) == (users, items, events)
    assert frame.select(pl.struct("user_id", "order").n_unique()).item() == events
    assert len(rows(tables.items)) == listed


def test_real_ml_100k_in_the_publishers_form_is_the_prepared_copy(real: Path, tmp_path: Path) -> None:
    ratings = pl.read_parquet(real / "ml-100k" / "interactions.parquet")
    content = (
        ratings.select("user_id", "item_id", "rating", "timestamp").write_csv(separator="\t", include_header=False).encode()
    )
    raw = read_source("ml-100k", place(tmp_path, {**ml_100k(), "ml-100k/u.data": content}))
    assert raw.events.collect().equals(read_source("ml-100k", real).events.sort("user_id", "order").collect())


def test_real_online_retail_in_the_publishers_form_is_the_prepared_copy(real: Path, tmp_path: Path) -> None:
    lines = pl.read_parquet(real / "online-retail" / "interactions.parquet")
    table = lines.select(
        InvoiceNo="invoice",
        StockCode="item_id",
        Description=pl.lit("A"),
        Quantity="quantity",
        InvoiceDate=pl.from_epoch("timestamp").dt.strftime("%Y-%m-%d %H:%M:%S"),
        UnitPrice="unit_price",
        CustomerID=pl.col("user_id").cast(pl.Float64),
        Country=pl.lit("B"),
    )
    raw = read_source("online-retail", place(tmp_path, {"Online Retail.csv": table.write_csv().encode()}))
    assert raw.events.collect().equals(read_source("online-retail", real).events.sort("user_id", "order").collect())
