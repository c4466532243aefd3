"""Readers of the publishers' own files of the public sets; they may raise anything that a broken file raises."""

from __future__ import annotations

import ast
import contextlib
import gzip
import html
import io
import json
import re
import zipfile
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path

import polars as pl
import polars.selectors as cs
from xxhash import xxh64_intdigest

from features.schema import RawTables
from features.split import DAY
from recsys.errors import SetupError

GENRES_100K = (
    *("Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir"),
    *("Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
"""The columns of u.item after `unknown`."""
DATE_FORMS = ("%Y-%m-%d %H:%M:%S", "%m/%d/%Y %H:%M")
"""Of dates in the retail table: the workbook's and most copies', and the other common copy's."""
MADE_UP_START = 1_704_067_200
"""2024-01-01: where the clock of sets without times begins."""
TRADES = {
    "forest": ("Ahlstrom", "Botnia", "Enso", "M-real", "Ponsse", "UPM"),
    "steel": ("Componenta", "Outokumpu", "Rautaruukki", "Ruukki"),
    "machines": ("Cargotec", "Glaston", "Konecranes", "Metso", "Vaahto", "Wartsila"),
    "telephones": ("Elisa", "Nokia", "Teleste", "TeliaSonera"),
    "electronics": ("Aspocomp", "Elcoteq", "Okmetic", "Scanfil"),
    "software": ("Basware", "Comptel", "Digia", "F-Secure", "Tecnotree"),
    "finance": ("Aktia", "CapMan", "Nordea", "Pohjola", "Sampo"),
    "building": ("Cramo", "Lemminkainen", "Tikkurila", "Uponor", "YIT"),
    "goods": ("Amer", "Fiskars", "Kesko", "Marimekko", "Rapala", "Stockmann"),
    "food": ("Atria", "HKScan", "Olvi", "Raisio"),
    "media": ("Alma", "Sanoma", "Talentum"),
    "energy and transport": ("Finnair", "Finnlines", "Fortum", "Kemira", "Neste"),
}
"""Companies that headlines name, by trade; what a desk follows is made up of them."""
DESKS = 20
"""Desks of each trade."""
HEADLINES_A_DAY = 48
FOLLOWED, STRAY = 0.7, 0.004
"""Chance that a desk reads a headline that names a company of its trade, and any other."""


def read_ml_1m(folder: Path) -> RawTables:
    """MovieLens 1M without the events of items that have fewer than 5 ratings, as in SASRec's copy of it.

    Ordered by time, ties by file row, which is the order of SASRec's copy too (compared at 330,926 ties of stated times).
    """
    events = _table(folder, "ratings.dat", "::", ["user_id", "item_id", "rating", "timestamp"])
    items = _table(folder, "movies.dat", "::", ["item_id", "title", "categories"])
    users = _table(folder, "users.dat", "::", ["user_id", "gender", "age", "occupation", "zip"])
    return RawTables(_ordered(events.filter(pl.len().over("item_id") >= 5)), items.lazy(), users.lazy())


def read_ml_100k(folder: Path) -> RawTables:
    """MovieLens 100K, ordered by time, ties by file row."""
    events = _table(folder, "u.data", "\t", ["user_id", "item_id", "rating", "timestamp"])
    items = _table(folder, "u.item", "|", ["item_id", "title", "date", "video_date", "url", "unknown", *GENRES_100K])
    genres = [pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in ("unknown", *GENRES_100K)]
    items = items.select("item_id", "title", categories=pl.concat_str(genres, separator="|", ignore_nulls=True))
    users = _table(folder, "u.user", "|", ["user_id", "age", "gender", "occupation", "zip_code"])
    return RawTables(_ordered(events), items.lazy(), users.lazy())


def read_amazon_beauty(folder: Path) -> RawTables:
    """Amazon Beauty 2014, 5-core, ordered by day, ties by file row; of the items, those that have events."""
    with _gunzip(folder, "reviews_Beauty_5.json.gz") as lines:
        reviews = [json.loads(line) for line in lines]
    keys = {"user_id": "reviewerID", "item_id": "asin", "timestamp": "unixReviewTime"}
    events = pl.DataFrame({column: [review[key] for review in reviews] for column, key in keys.items()})
    wanted = set(events["item_id"])
    items = []
    with _gunzip(folder, "meta_Beauty.json.gz") as lines:
        for line in lines:  # Python literals, one a line; only 1 in 20 is wanted, and parsing is slow
            if (found := re.search(r"'asin': '(\w+)'", line)) and found[1] in wanted:
                item = ast.literal_eval(line)
                names = dict.fromkeys(name for path in item.get("categories", []) for name in path)
                items.append((found[1], html.unescape(item["title"]) if "title" in item else None, "|".join(names)))
    table = pl.DataFrame(items, {"item_id": pl.String, "title": pl.String, "categories": pl.String}, orient="row")
    return RawTables(_ordered(events), table.lazy())


def read_online_retail(folder: Path) -> RawTables:
    """UCI Online Retail: lines with a customer and a positive quantity, an item once an invoice (the first line), ordered
    by time, ties by file row; an item's title is its commonest description. Times are the shop's clock read as UTC.

    The workbook needs the package fastexcel; "Online Retail.csv", the same table as UTF-8 or Latin-1, does not.
    """
    lines = _retail_lines(folder).select(
        user_id=pl.col("CustomerID").cast(pl.Float64).cast(pl.Int64),
        item_id="StockCode",
        timestamp=pl.coalesce(pl.col("InvoiceDate").str.to_datetime(form, strict=False) for form in DATE_FORMS).dt.epoch("s"),
        invoice="InvoiceNo",
        quantity=pl.col("Quantity").cast(pl.Float64),
        title=pl.col("Description").str.strip_chars(),
        country="Country",
    )
    if lines["timestamp"].has_nulls():
        raise ValueError(f"an InvoiceDate is in none of the forms {', '.join(DATE_FORMS)}")
    sold = lines.filter(pl.col("user_id").is_not_null(), pl.col("quantity") > 0)
    events = sold.unique(["invoice", "item_id"], keep="first", maintain_order=True)
    titles = lines.drop_nulls("title").group_by("item_id", "title").len().sort("len", "title", descending=[True, False])
    items = lines.select("item_id").unique().join(titles.group_by("item_id").agg(pl.first("title")), on="item_id", how="left")
    users = lines.drop_nulls("user_id").group_by("user_id").agg(pl.first("country"))
    return RawTables(_ordered(events), items.sort("item_id").lazy(), users.sort("user_id").lazy())


def _retail_lines(folder: Path) -> pl.DataFrame:
    """The table with every column as text, whichever file holds it."""
    if file := find(folder, "Online Retail.csv"):
        return pl.read_csv(_text(file.read_bytes()).encode(), infer_schema=False)
    file = _need(folder, "Online Retail.xlsx")
    codes = dict.fromkeys(("InvoiceNo", "StockCode", "Description", "Country"), pl.String)  # their cells mix numbers and text
    try:
        table = pl.read_excel(io.BytesIO(file.read_bytes()), schema_overrides=codes)
    except ImportError:
        remedy = "pip install fastexcel, or save the workbook as Online Retail.csv"
        raise SetupError(f"{file}: reading a workbook needs the package fastexcel; {remedy}") from None
    return table.with_columns(cs.temporal().dt.strftime(DATE_FORMS[0])).with_columns(pl.all().cast(pl.String))


def read_banking77(folder: Path) -> RawTables:
    """BANKING77 as conversations: a customer's message, then the answer that is right, which is its intent by name.

    Messages and answers are items, told apart by their category. The times are made up: what is learnt was said on one day;
    every tenth message of an intent is answered on the next one, for validation, and the published test, said on that day, on
    the day after it. So a split at the third day with a day of validation learns no message of the test.
    """
    if file := find(folder, "queries.parquet"):
        messages = pl.read_parquet(file.read_bytes())
    else:
        parts = (("train", _need(folder, "train.csv")), ("test", _need(folder, "test.csv")))
        messages = pl.concat(pl.read_csv(file.read_bytes()).with_columns(split=pl.lit(name)) for name, file in parts)
    if wrong := messages.filter(pl.any_horizontal(pl.col("text", "category").is_null())).height:
        raise ValueError(f"{wrong} messages have no text or no category")
    tenth = pl.int_range(pl.len()).over("split", "category") % 10 == 9
    said_on = (pl.col("split") == "test").cast(pl.Int64)
    row, start = pl.int_range(pl.len(), dtype=pl.Int64), pl.lit(MADE_UP_START, pl.Int64)
    messages = messages.select(
        pl.format("m{}", row + 1).alias("item_id"),
        pl.format("c{}", row + 1).alias("user_id"),
        pl.col("text").str.strip_chars().alias("title"),
        "category",
        said=start + said_on * DAY + row,
        answered=start + (said_on + ((said_on == 1) | tenth).cast(pl.Int64)) * DAY + row + 60,
    )
    answers = messages.select(item_id="category").unique().sort("item_id")
    words = pl.col("item_id").str.replace_all("_", " ").str.strip_suffix("?")
    items = pl.concat(
        [
            answers.with_columns(
                title=words.str.slice(0, 1).str.to_uppercase() + words.str.slice(1), categories=pl.lit("answer")
            ),
            messages.select("item_id", "title", categories=pl.lit("message")),
        ]
    )
    said = messages.select("user_id", "item_id", timestamp="said")
    return RawTables(
        _ordered(pl.concat([said, messages.select("user_id", item_id="category", timestamp="answered")])), items.lazy()
    )


def read_financial_phrasebank(folder: Path) -> RawTables:
    """Financial PhraseBank (50 % agreement) as headlines with their sentiment, and made-up desks that read them.

    The set has neither dates nor readers. Headlines come out in an order by hash, so many a day; each of the desks follows one
    trade of TRADES and reads a headline within the hour after it came out, by a chance that the hash of both decides.
    """
    if file := find(folder, "sentences.parquet"):
        table = pl.read_parquet(file.read_bytes())
    else:
        lines = _text(_need(folder, "Sentences_50Agree.txt").read_bytes()).splitlines()
        parts = [line.rpartition("@") for line in lines if line.strip()]
        table = pl.DataFrame({"sentence": [part[0] for part in parts], "label": [part[2].strip() for part in parts]})
    if wrong := table.filter(pl.col("label").is_in(["negative", "neutral", "positive"]).not_().fill_null(True)).height:
        raise ValueError(f"{wrong} sentences are neither negative, neutral nor positive")
    table = table.with_columns(pl.col("sentence").str.strip_chars()).unique("sentence", keep="first", maintain_order=True)
    texts = table["sentence"].to_list()
    order = sorted(range(len(texts)), key=lambda place: xxh64_intdigest(texts[place].encode()))
    items = table[order].select(
        pl.format("h{}", pl.int_range(pl.len()) + 1).alias("item_id"),
        pl.col("sentence").alias("title"),
        pl.col("label").alias("sentiment"),
        published=MADE_UP_START + pl.int_range(pl.len(), dtype=pl.Int64) * (DAY // HEADLINES_A_DAY),
        trade=pl.coalesce(
            pl.when(pl.col("sentence").str.contains(rf"\b(?:{'|'.join(names)})\b")).then(pl.lit(trade))
            for trade, names in TRADES.items()
        ),
    )
    desks = pl.DataFrame({"user_id": [f"{trade} {desk + 1}" for trade in TRADES for desk in range(DESKS)]})
    desks = desks.with_columns(follows=pl.col("user_id").str.replace(r" \d+$", ""))
    return RawTables(_ordered(_read_by(desks, items)), items.lazy(), desks.lazy())


def _read_by(desks: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """Which desk reads which headline, and when; by hash, so that more headlines leave what was read before as it was."""
    events = []
    headlines = items.select("item_id", "published", "trade").rows()
    for desk, follows in desks.select("user_id", "follows").rows():
        for item_id, published, trade in headlines:
            drawn = xxh64_intdigest(f"{desk} {item_id}".encode())
            if drawn / 2**64 < (FOLLOWED if trade == follows else STRAY):
                events.append((desk, item_id, published + drawn % 3600))
    return pl.DataFrame(events, {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}, orient="row")


def find(folder: Path, name: str) -> Traversable | None:
    """The file that lies in the folder or, under any path, in a zip there."""
    if (folder / name).is_file():
        return folder / name
    for path in sorted(folder.glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if member.rpartition("/")[2] == name:
                    return zipfile.Path(path, member)
    return None


def _need(folder: Path, name: str) -> Traversable:
    file = find(folder, name)
    if file is None:
        raise FileNotFoundError(f"{name} is missing")
    return file


@contextlib.contextmanager
def _gunzip(folder: Path, name: str) -> Iterator[Iterator[str]]:
    """The lines of a compressed file."""
    with _need(folder, name).open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        yield lines


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _table(folder: Path, name: str, separator: str, columns: list[str]) -> pl.DataFrame:
    """A Latin-1 table without header or quotes; ids and times as Int64, the rest as text."""
    text = _need(folder, name).read_bytes().decode("latin-1").replace(separator, "\x1f")  # polars takes separators of one byte
    schema = dict.fromkeys(columns, pl.String)
    table = pl.read_csv(text.encode(), has_header=False, separator="\x1f", quote_char=None, schema=schema)
    return table.with_columns(pl.col("^(user_id|item_id|timestamp)$").cast(pl.Int64))


def _ordered(events: pl.DataFrame) -> pl.LazyFrame:
    """Events by user and time, ties as they stood."""
    events = events.sort("user_id", "timestamp", maintain_order=True).select(
        "user_id", "item_id", pl.col("timestamp").cast(pl.Int64)
    )
    return events.with_columns(order=pl.int_range(1, pl.len() + 1).over("user_id")).lazy()
