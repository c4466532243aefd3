"""What a night reads is what requests and evaluation read: every user once, event for event, whatever the shards and chunks."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import polars as pl
import pytest

from features.build import build
from features.dataset import Dataset
from features.schema import DataSettings
from recsys.batch import FIRST_ITEM
from recsys.config import Recipe
from recsys.errors import DataError, StoreError
from serving import intake, stores
from serving.catalogue import Catalogue
from serving.history import Event, HistoryStore, open_store
from serving.intake import Dealt, Source, dataset_source, events_source, read_shard, store_source
from serving.nights import shard_of
from tests.serving.servers import RedisServer, redis_server

SHARDS = 7
History = list[tuple[int, int]]
"""Rows and times."""


def histories(dealt: Dealt) -> dict[int | str, History]:
    offsets = dealt.histories.offsets.tolist()
    pairs = list(zip(dealt.histories.values.tolist(), dealt.histories.times.tolist(), strict=True))
    assert len(offsets) == len(dealt.user_ids) + 1
    assert offsets[-1] == len(pairs)
    return {user: pairs[offsets[place] : offsets[place + 1]] for place, user in enumerate(dealt.user_ids.to_list())}


def all_of(
    source: Source, folder: Path, catalogue: Catalogue, now: int | None = None, shards: int = SHARDS
) -> tuple[dict[int | str, History], dict[str, int]]:
    """Every user's history, each seen in the one shard that is theirs; and all counts."""
    said: list[tuple[int, int]] = []
    counts = {**source.deal(folder, shards, now, lambda done, of: said.append((done, of))), "unknown": 0}
    found: dict[int | str, History] = {}
    for shard in range(shards):
        dealt = read_shard(folder, shard, catalogue)
        ids = dealt.user_ids.to_list()
        assert ids == sorted(set(ids), key=lambda user: user if isinstance(user, int) else user.encode())
        assert {shard_of(user, shards) for user in ids} <= {shard}
        found |= histories(dealt)
        for name, count in {**dealt.left_out, "unknown": dealt.unknown}.items():
            counts[name] = counts.get(name, 0) + count
    assert said == sorted(said)
    assert said[-1][0] == said[-1][1]
    return found, {name: count for name, count in counts.items() if count}


def expected(dataset: Dataset, catalogue: Catalogue, now: int | None = None) -> dict[int | str, History]:
    sequences = catalogue.align(dataset)
    offsets = sequences.offsets.tolist()
    pairs = list(zip(sequences.items.tolist(), sequences.times.tolist(), strict=True))
    return {
        user: [pair for pair in pairs[offsets[place] : offsets[place + 1]] if now is None or pair[1] <= now]
        for place, user in enumerate(dataset.user_ids.to_list())
    }


def own(dataset: Dataset) -> Catalogue:
    return Catalogue(dataset.path / "items.parquet")


# a data set


@pytest.mark.parametrize(("shards", "users", "chunk"), [(1, 8192, 2**22), (7, 8192, 2**22), (13, 11, 97), (499, 3, 1)])
def test_all_of_a_data_set_is_there_once_whatever_the_shards_and_chunks(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, users: int, chunk: int
) -> None:
    monkeypatch.setattr(intake, "USERS", users)
    monkeypatch.setattr(intake, "CHUNK", chunk)
    found, counts = all_of(dataset_source(dataset.path), tmp_path / "dealt", own(dataset), None, shards)
    assert found == expected(dataset, own(dataset))
    assert counts == {"events": len(dataset.sequences.items)}


def test_events_later_than_now_are_left_out_and_counted_and_their_users_stay(dataset: Dataset, tmp_path: Path) -> None:
    now = 100_000_060
    found, counts = all_of(dataset_source(dataset.path), tmp_path / "dealt", own(dataset), now)
    assert found == expected(dataset, own(dataset), now)
    assert found["user 101"] == []
    assert len(found["user 100"]) == 2
    assert counts["later"] == int((dataset.sequences.times > now).sum())


def test_a_grown_data_set_has_the_rows_that_evaluation_gives_it(dataset: Dataset, tmp_path: Path) -> None:
    draw = random.Random(3)
    events = [(user, draw.randrange(900, 1100), draw.randrange(50)) for user in range(17) for _ in range(19)]
    pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(tmp_path / "events.parquet")
    build(tmp_path, Recipe("grown", {}), tmp_path / "grown")
    grown = Dataset.open(tmp_path / "grown")
    found, counts = all_of(dataset_source(grown.path), tmp_path / "dealt", own(dataset))
    assert found == expected(grown, own(dataset))
    rows = {row for history in found.values() for row, _ in history}
    assert min(rows) < FIRST_ITEM + len(own(dataset)) <= max(rows)
    assert set(counts) == {"events"}
    assert read_shard(tmp_path / "dealt", 0, own(grown)).user_ids.dtype == pl.Int64


def test_a_folder_that_is_dealt_anew_is_read_anew(dataset: Dataset, shop: Dataset, tmp_path: Path) -> None:
    catalogue = own(dataset)
    for each in (dataset, shop):
        found, _ = all_of(dataset_source(each.path), tmp_path / "dealt", catalogue)
        assert found == expected(each, catalogue)
        shutil.rmtree(tmp_path / "dealt")


# events

TABLE = 499


def drawn(seed: int, named: bool) -> pl.DataFrame:
    """Events in any order with ties, repeats, and cells that are missing or no time."""
    draw = random.Random(seed)
    rows = [
        (
            draw.choice([None, *([f"user {draw.randrange(37)}"] * 23)]) if named else draw.randrange(37),
            draw.choice([None, *([f"{draw.randrange(53)}"] * 29)]),
            draw.choice([None, "soon", "-3", *([str(draw.randrange(13))] * 31)]),
            draw.randrange(11),
        )
        for _ in range(TABLE)
    ]
    schema = {"user_id": pl.String if named else pl.Int32, "item_id": pl.String, "timestamp": pl.String, "order": pl.Int16}
    return pl.DataFrame(rows, schema=schema, orient="row")


@pytest.fixture(params=[{}, {"repeats": "keep"}, {"order": "order"}, {"order": "order", "timestamp": ""}], ids=str)
def settings(request: pytest.FixtureRequest) -> DataSettings:
    return DataSettings(**request.param)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("rows", "chunk"), [(2**18, 2**22), (13, 29)])
def test_a_table_gives_the_histories_of_the_data_set_that_is_built_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: DataSettings, named: bool, rows: int, chunk: int
) -> None:
    monkeypatch.setattr(intake, "ROWS", rows)
    monkeypatch.setattr(intake, "CHUNK", chunk)
    table = drawn(5, named)
    for part in range(3):  # some files
        table.filter(pl.int_range(pl.len()) // 167 == part).write_parquet(tmp_path / f"events-{part}.parquet")
    given = {name: getattr(settings, name) for name in ("timestamp", "order", "repeats")}
    build(tmp_path, Recipe("made-up", {"data": given}), tmp_path / "dataset")
    dataset = Dataset.open(tmp_path / "dataset")
    source = events_source(str(tmp_path / "events-*.parquet"), settings)
    assert abs(source.users - 37) < 7
    found, counts = all_of(source, tmp_path / "dealt", own(dataset))
    assert found == expected(dataset, own(dataset))
    bad = dataset.manifest["rows"]["quarantined"]
    assert {name: counts.get(name, 0) for name in bad} == bad
    assert bad
    assert counts["events"] + sum(bad.values()) - bad.get("duplicate", 0) == TABLE
    again, _ = all_of(source, tmp_path / "later", own(dataset), 5)
    assert again == expected(dataset, own(dataset), 5)
    assert (again == found) == (not settings.timestamp), "without times there is no later"


def test_items_are_matched_as_text_and_unknown_ones_are_left_out_and_counted(dataset: Dataset, tmp_path: Path) -> None:
    events = {"user_id": [3, 3, 5, 3], "item_id": ["31", "lamp", "none", "17"], "timestamp": [1, 2, 3, 4]}
    pl.DataFrame(events).write_parquet(tmp_path / "events.parquet")
    catalogue = own(dataset)
    found, counts = all_of(events_source(str(tmp_path / "events.parquet"), DataSettings()), tmp_path / "dealt", catalogue)
    assert found == {3: [(catalogue.by_id(31), 1), (catalogue.by_id(17), 4)], 5: []}
    assert counts == {"events": 4, "unknown": 2}


@pytest.mark.parametrize("kind", ["seconds", "ms", "date", "text"])
def test_times_of_every_kind_are_seconds(dataset: Dataset, tmp_path: Path, kind: str) -> None:
    moments = [1_600_000_007, 1_600_000_019]
    times = {
        "seconds": pl.Series(moments),
        "ms": pl.Series(moments) * 1000 + 500,
        "date": pl.Series([datetime.fromtimestamp(moment, UTC) for moment in moments]),
        "text": pl.Series([datetime.fromtimestamp(moment, UTC).isoformat() for moment in moments]),
    }
    pl.DataFrame({"who": ["a", "a"], "what": [31, 17], "when": times[kind]}).write_parquet(tmp_path / "log.parquet")
    named = DataSettings(user_id="who", item_id="what", timestamp="when", time_unit="ms" if kind == "ms" else "s")
    found, _ = all_of(events_source(str(tmp_path), named), tmp_path / "dealt", own(dataset))
    assert [time for _, time in found["a"]] == moments


def test_what_is_no_table_of_events_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no Parquet file"):
        events_source(str(tmp_path), DataSettings())
    for name in ("log.csv", "log-*.jsonl.gz"):
        with pytest.raises(DataError, match="is no Parquet; give Parquet, or make a data set of it"):
            events_source(str(tmp_path / name), DataSettings())
    pl.DataFrame({"user": [1], "item_id": [1], "timestamp": [1]}).write_parquet(tmp_path / "events.parquet")
    with pytest.raises(DataError, match="no column 'user_id'; did you mean 'user'"):
        events_source(str(tmp_path), DataSettings())
    (tmp_path / "events.parquet").write_bytes(b"no Parquet")
    with pytest.raises(DataError, match="cannot be read") as caught:
        events_source(str(tmp_path), DataSettings())
    assert "\n" not in str(caught.value)
    pl.DataFrame({"user_id": ["", None], "item_id": [1, 2], "timestamp": [1, 2]}).write_parquet(tmp_path / "events.parquet")
    with pytest.raises(DataError, match=r"none of 2 events is usable \(2 null_id: "):
        events_source(str(tmp_path), DataSettings()).deal(tmp_path / "dealt", SHARDS, None, lambda *_: None)


def test_a_source_says_that_it_holds_something_else(dataset: Dataset, tmp_path: Path) -> None:
    drawn(1, True).write_parquet(tmp_path / "events.parquet")
    first = events_source(str(tmp_path), DataSettings())
    assert events_source(str(tmp_path), DataSettings()).identity == first.identity
    assert events_source(str(tmp_path), DataSettings(time_unit="ms")).identity != first.identity
    drawn(2, True).write_parquet(tmp_path / "events.parquet")
    assert events_source(str(tmp_path), DataSettings()).identity != first.identity
    assert dataset_source(dataset.path).identity["hash"] == dataset.manifest["hash"]


@pytest.mark.parametrize("kind", ["dataset", "events"])
def test_what_is_written_anew_while_it_is_dealt_is_refused(
    kind: str, dataset: Dataset, shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "USERS", 11)
    place = tmp_path / "source"
    if kind == "dataset":
        shutil.copytree(dataset.path, place)
        source = dataset_source(place)
    else:
        drawn(1, True).write_parquet(place)
        source = events_source(str(place), DataSettings())

    def renew(done: int, of: int) -> None:
        if kind == "dataset" and place.exists():
            shutil.rmtree(place)
            shutil.copytree(shop.path, place)
        elif kind == "events":
            drawn(2, True).write_parquet(place)

    source.deal(tmp_path / "dealt", SHARDS, None, lambda done, of: None)
    with pytest.raises(DataError, match=f"{place}: was written anew while it was read"):
        source.deal(tmp_path / "again", SHARDS, None, renew)


def test_the_same_words_in_another_directory_are_another_source(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        shutil.copytree(dataset.path, "dataset")
        table = Path("events.parquet")
        drawn(1, True).write_parquet(table)
        os.utime(table, ns=(7, 7))
        open_store("sqlite:store").close()
        sources = [dataset_source(Path("dataset")), store_source("sqlite:store", 7), store_source("store", 7)]
        sources += [
            events_source(place, DataSettings()) for place in ("events.parquet", "*.parquet", f"file://{table.absolute()}")
        ]
        told.append([source.identity for source in sources])
    assert all(one != two for one, two in zip(*told, strict=True))
    assert told[0][1] == told[0][2] == {"kind": "store", "url": f"sqlite:{tmp_path / 'one' / 'store'}", "keep": 7}
    assert {said["path"] for said in told[1] if "path" in said} == {
        *(str(tmp_path / "two" / name) for name in ("dataset", "events.parquet", "*.parquet")),
        f"file://{tmp_path / 'two' / 'events.parquet'}",
    }


# elsewhere


class Files(BaseHTTPRequestHandler):
    """A folder by HTTP, with ranges; and, as of S3, lists of what is in it. S3 asks for /bucket/name."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        url = urlsplit(self.path)
        asked = parse_qs(url.query)
        if "list-type" in asked:
            prefix = asked.get("prefix", [""])[0]
            names = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())
            self._send(200, _listing([(name, self.folder / name) for name in names if name.startswith(prefix)]), body)
            return
        path = self.folder / unquote(url.path).removeprefix("/bucket/").removeprefix("/")
        if not path.is_file():
            self._send(404, b"", body)
            return
        content = path.read_bytes()
        if (wanted := self.headers.get("Range")) is None:
            self._send(200, content, body)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        self._send(206, content[start:end], body, {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})

    def _send(self, status: int, content: bytes, body: bool, further: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), "ETag": '"same"', "Accept-Ranges": "bytes", **(further or {})}
        headers["Last-Modified"] = "Sun, 22 Nov 2026 00:00:00 GMT"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _listing(files: list[tuple[str, Path]]) -> bytes:
    rows = "".join(
        f"<Contents><Key>{name}</Key><LastModified>2026-11-22T00:00:00.000Z</LastModified><ETag>&quot;same&quot;</ETag>"
        f"<Size>{path.stat().st_size}</Size></Contents>"
        for name, path in files
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated>'
        f"<KeyCount>{len(files)}</KeyCount>{rows}</ListBucketResult>"
    ).encode()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a folder is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Files,), {"folder": folder}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    "place", ["{http}/log/a.parquet?signed=sesame", "s3://bucket/log/*.parquet", "s3://bucket/log/", "file://"]
)
def test_a_table_elsewhere_is_read_as_one_here(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "log").mkdir()
    drawn(7, True).write_parquet(tmp_path / "log" / "a.parquet")
    with served(tmp_path) as http:
        keys = {"AWS_ACCESS_KEY_ID": "open", "AWS_SECRET_ACCESS_KEY": "sesame", "AWS_REGION": "here", "AWS_ALLOW_HTTP": "true"}
        for name, value in {**keys, "AWS_ENDPOINT_URL": http}.items():
            monkeypatch.setenv(name, value)
        url = f"file://{tmp_path}/log/a.parquet" if place == "file://" else place.format(http=http)
        source = events_source(url, DataSettings())
        found = all_of(source, tmp_path / "dealt", own(dataset))
        assert "sesame" not in str(source.identity)
        assert len(source.identity["files"]) == 1
        with pytest.raises(DataError) as caught:
            events_source(url.replace("log/", "none/"), DataSettings())
        assert "sesame" not in str(caught.value)
    assert found == all_of(events_source(str(tmp_path / "log"), DataSettings()), tmp_path / "here", own(dataset))


# stores


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "lmdb", "redis", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kind: str = request.param
    if kind in ("redis", "lmdb"):
        package = pytest.importorskip(kind, reason=f"needs the package of {kind}")
    if kind == "redis":
        server: RedisServer = request.getfixturevalue("redis")
        client = package.Redis.from_url(server.url)
        client.flushall()
        client.close()
        return server.url
    return f"{kind}:{'' if kind == 'memory' else tmp_path / 'histories'}"


def source_of(store: HistoryStore) -> Source:
    """By its URL where that tells others of it."""
    alone = store.url.startswith(("memory:", "lmdb:"))  # a process opens a file of LMDB once
    return intake._Store(store) if alone else store_source(store.url, store.keep)


def filled(url: str, keep: int) -> tuple[HistoryStore, list[str]]:
    """Users of 0 to 40 items that the data set has, or that nobody has."""
    store, draw = open_store(url, keep), random.Random(11)
    users = [*(f"user {number}" for number in range(59)), "юзер", "a b\n", "7", "\0"]
    for user in users:
        ids = [
            draw.choice([item := draw.randrange(997), str(item), item + 10_000, "lamp"]) for _ in range(draw.randrange(1, 41))
        ]
        store.append(user, [Event(item, draw.randrange(31), str(place)) for place, item in enumerate(ids)])
    store.append("strange", [Event("scarf", 3)])
    return store, [*users, "strange"]


@pytest.mark.parametrize(("part", "chunk"), [(2**10, 2**22), (5, 17)])
@pytest.mark.parametrize("now", [None, 17])
def test_all_of_a_store_is_there_once_as_the_api_reads_it(
    url: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int, chunk: int, now: int | None
) -> None:
    for owner, name, value in ((intake, "KEPT", part), (intake, "CHUNK", chunk), (stores, "WALKED", part)):
        monkeypatch.setattr(owner, name, value)
    store, users = filled(url, 23)
    catalogue, kept = own(dataset), {user: store.read(user) for user in users}
    found, counts = all_of(source_of(store), tmp_path / "dealt", catalogue, now)
    in_time = {user: [event for event in events if now is None or event.time <= now] for user, events in kept.items()}
    known = {
        user: [(row, event.time) for event in events if (row := catalogue.by_id(event.item_id)) is not None]
        for user, events in in_time.items()
    }
    assert found == known
    assert found["strange"] == []
    told = {"events": kept, "later": {user: events[len(in_time[user]) :] for user, events in kept.items()}}
    unknown = sum(len(in_time[user]) - len(known[user]) for user in users)
    wanted = {name: sum(map(len, each.values())) for name, each in told.items()} | {"unknown": unknown}
    assert counts == {name: count for name, count in wanted.items() if count}
    store.close()


def test_a_user_whose_history_is_unreadable_is_counted_and_has_none(url: str, dataset: Dataset, tmp_path: Path) -> None:
    store = open_store(url)
    store.append("ada", [Event(31, 1)])
    store._blobs.change(["grace"], lambda *_: b"\xc1 no list of events")
    found, counts = all_of(source_of(store), tmp_path / "dealt", own(dataset))
    assert found == {"ada": [(own(dataset).by_id(31), 1)], "grace": []}
    assert counts == {"events": 1, "unreadable": 1}
    store.close()


def test_whom_a_server_names_twice_is_there_once_as_named_last(dataset: Dataset, tmp_path: Path) -> None:
    store = open_store("memory:")
    twice = [("ada", [Event(31, 1)]), ("grace", [Event(17, 2)]), ("ada", [Event(31, 1), Event(17, 5)])]
    source = intake._Store(store)
    source.__dict__["_store"] = type("Twice", (), {"users": lambda _: iter(twice), "count": lambda _: 2})()
    found, _ = all_of(source, tmp_path / "dealt", own(dataset))
    rows = [own(dataset).by_id(31), own(dataset).by_id(17)]
    assert found == {"ada": [(rows[0], 1), (rows[1], 5)], "grace": [(rows[1], 2)]}


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    for url in (f"sqlite:{tmp_path / 'histories'}", f"lmdb:{tmp_path / 'histories'}", str(tmp_path / "histories")):
        with pytest.raises(StoreError, match="there is no such file"):
            store_source(url, 7)
    assert not any(tmp_path.iterdir())


def test_an_empty_store_has_no_users(url: str, dataset: Dataset, tmp_path: Path) -> None:
    store = open_store(url)
    source = source_of(store)
    assert (source.users, source.deal(tmp_path / "dealt", 3, None, lambda *_: None)) == (0, {"events": 0})
    dealt = read_shard(tmp_path / "dealt", 2, own(dataset))
    assert (len(dealt.user_ids), len(dealt.histories), dealt.unknown) == (0, 0, 0)
    store.close()


# what is held


def test_no_more_is_held_than_a_chunk_and_what_was_read_at_once(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "CHUNK", 1009)
    monkeypatch.setattr(intake, "USERS", 2)
    seen: list[int] = []
    write = intake._Parts._write

    def spy(parts: intake._Parts) -> None:
        seen.append(sum(rows["item_id"].list.len().sum() for rows in parts._held))
        write(parts)

    monkeypatch.setattr(intake._Parts, "_write", spy)
    dataset_source(dataset.path).deal(tmp_path / "dealt", SHARDS, None, lambda *_: None)
    assert sum(seen) == len(dataset.sequences.items)
    assert len(seen) > 11
    assert max(seen) < 1009 + 2 * 300
