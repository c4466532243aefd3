"""One contract for every store of histories: the law of merging, processes that race, what erasing leaves, and restarts."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.build import build
from features.dataset import Dataset
from recsys.config import Recipe
from recsys.errors import RequestError, SetupError, StoreError
from serving import lmdb_store, stores
from serving.history import STORES, Event, HistoryStore, import_dataset, merged, open_store
from serving.stores import hidden
from tests.serving.servers import RedisServer, redis_server
from tests.serving.writers import fill_the_disk, load_much, visits, work_alone

KINDS = ["sqlite", "lmdb", "redis", "memory"]
SHARED = ["sqlite", "lmdb", "redis"]
"""Those that several processes share."""
FILES = ["sqlite", "lmdb"]
KEEP = 13


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty store of the kind that the test names."""
    kind: str = request.param
    if kind == "redis":
        server: RedisServer = request.getfixturevalue("redis")
        client = pytest.importorskip("redis", reason="needs Redis's package").Redis.from_url(server.url)
        client.flushall()
        client.close()
        return server.url
    if kind == "lmdb":
        pytest.importorskip("lmdb", reason="needs the package of LMDB")
    return f"{kind}:{'' if kind == 'memory' else tmp_path / 'histories'}"


@pytest.fixture
def store(url: str) -> Iterator[HistoryStore]:
    store = open_store(url, KEEP)
    yield store
    store.close()


every_store = pytest.mark.parametrize("url", KINDS, indirect=True)
shared_stores = pytest.mark.parametrize("url", SHARED, indirect=True)
file_stores = pytest.mark.parametrize("url", FILES, indirect=True)


# the law


def event(item_id: int | str, time: int, word: str) -> Event:
    """An id names one time, as a report that is repeated does."""
    return Event(item_id, time, word and f"{word} {time}")


events = st.builds(
    event, st.integers(0, 3) | st.sampled_from(["0", "lamp"]), st.integers(0, 5), st.sampled_from(["", "a", "b"])
)
batches = st.lists(st.integers(0, 40), max_size=30).map(lambda times: visits(*times))
"""Without ties: an event's time says which it is."""
keeps = st.integers(1, 11)


@given(st.lists(events, max_size=20), st.lists(events, max_size=20), keeps)
def test_what_was_merged_once_changes_nothing_again(old: list[Event], new: list[Event], keep: int) -> None:
    once = merged(merged([], old, keep), new, keep)
    assert merged(once, new, keep) == once
    assert merged(once, list(reversed(new)), keep) == once
    assert merged(once, old, keep) == once


@given(st.lists(events, max_size=20), st.lists(events, max_size=20), keeps)
def test_a_history_is_ordered_by_time_and_holds_no_event_twice_and_no_more_than_it_keeps(
    old: list[Event], new: list[Event], keep: int
) -> None:
    kept = merged(merged([], old, keep), new, keep)
    assert [event.time for event in kept] == sorted(event.time for event in kept)
    assert len({event.key for event in kept}) == len(kept) <= keep
    assert len(kept) == keep or {event.key for event in kept} == {event.key for event in [*old, *new]}


@given(st.lists(batches, max_size=5), st.randoms(use_true_random=False), keeps)
def test_the_newest_stay_in_whatever_order_and_company_they_come(
    parts: list[list[Event]], draw: random.Random, keep: int
) -> None:
    newest = visits(*sorted({event.time for part in parts for event in part})[-keep:])
    draw.shuffle(parts)
    one_by_one: list[Event] = []
    for part in parts:
        one_by_one = merged(one_by_one, part, keep)
    assert one_by_one == newest
    assert merged([], [event for part in parts for event in part], keep) == newest


def test_events_of_one_time_stay_in_the_order_in_which_they_came() -> None:
    at_once = [Event(item, 7) for item in (5, 3, 11, 2)]
    assert merged(at_once[:2], at_once[2:], 5) == at_once
    assert merged([], at_once, 3) == at_once[1:]
    assert merged(at_once[1:], [at_once[0]], 3) == at_once[1:], "what had to go does not come back"


def test_an_id_decides_which_events_are_the_same_and_without_one_time_and_item_do() -> None:
    first = Event(1, 10, "a")
    assert merged([first], [Event(2, 20, "a")], 5) == [first]
    assert merged([Event(1, 10)], [Event(1, 10)], 5) == [Event(1, 10)]
    apart = [Event(1, 10), Event("1", 10), Event(2, 10), Event(1, 10, "a")]
    assert merged([], apart, 5) == apart


# the contract


@every_store
def test_a_user_is_unknown_then_has_what_was_appended_then_is_forgotten(store: HistoryStore) -> None:
    assert store.read("ada") == []
    assert store.append("ada", visits(5, 3, 5)) == 2
    assert store.append("grace", visits(7)) == 1
    assert store.read("ada") == visits(3, 5)
    assert store.erase("ada") is True
    assert store.read("ada") == []
    assert store.erase("ada") is False
    assert store.read("grace") == visits(7)
    store.check()


@every_store
def test_appending_is_idempotent_counts_what_is_new_and_keeps_the_newest(store: HistoryStore) -> None:
    assert store.append("ada", visits(*range(100, 111))) == 11
    assert store.append("ada", visits(*range(105, 118))) == 7
    assert store.read("ada") == visits(*range(105, 118))
    assert store.append("ada", visits(*range(100, 118))) == 0, "a retry"
    assert store.append("ada", visits(99)) == 0, "older than all of a full history"
    assert store.append("ada", []) == 0
    assert store.read("ada") == visits(*range(105, 118))


@every_store
def test_ids_are_numbers_or_text_of_any_script(store: HistoryStore) -> None:
    things = [Event(2**63, -5), Event(-7, 0), Event("лампа", 2, "événement"), Event("", 3, "\0'\"{}")]
    users = ["7", "юзер", "a b\n", "{curly}:*", "\0", "x" * 500, "0" * 16]
    for number, user in enumerate(users):
        assert store.append(user, things[: number % 3 + 2]) == number % 3 + 2
    for number, user in enumerate(users):
        assert store.read(user) == things[: number % 3 + 2]


@every_store
@pytest.mark.parametrize("user", ["", "x" * 501, "é" * 251, "\ud800"])
def test_a_user_id_that_is_none_is_refused_by_every_verb(store: HistoryStore, user: str) -> None:
    verbs: list[Callable[[], object]] = [
        lambda: store.read(user),
        lambda: store.append(user, visits(1)),
        lambda: store.erase(user),
        lambda: store.load([("ada", visits(1)), (user, visits(1))]),
    ]
    for verb in verbs:
        with pytest.raises(RequestError, match="user id"):
            verb()
    assert store.read("ada") == []


@every_store
@pytest.mark.parametrize("event", [Event(2**64, 1), Event(1, 2**64), Event("\ud800", 1)])
def test_an_event_that_cannot_be_kept_leaves_the_history_as_it_was(store: HistoryStore, event: Event) -> None:
    store.append("ada", visits(1))
    with pytest.raises(RequestError, match="cannot be kept"):
        store.load([("ada", visits(2)), ("grace", [event])])
    assert store.read("ada") == visits(1)
    assert store.append("ada", visits(2)) == 1


@every_store
@pytest.mark.parametrize("at_once", [3, 1000])
def test_loading_many_is_appending_each(store: HistoryStore, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("serving.history.USERS", at_once)
    store.append("user 1", visits(5, 1_000_000))
    draw = random.Random(3)
    histories = [(f"user {draw.randrange(31)}", visits(*(draw.randrange(97) for _ in range(7)))) for _ in range(211)]
    alone = open_store("memory:", KEEP)
    alone.append("user 1", visits(5, 1_000_000))
    for user, new in histories:
        alone.append(user, new)
    store.load(iter(histories))
    for user in {user for user, _ in histories}:
        assert store.read(user) == alone.read(user)
    assert store.load(histories) == 0


@every_store
def test_a_history_of_every_length_comes_back_whole(store: HistoryStore) -> None:
    whole = HistoryStore(store._blobs, keep=100_000)
    for length in [*range(0, 700, 7), 8191, 70_001]:
        assert whole.append("ada", visits(*range(length))) == min(7 if length else 0, length) or length > 700
        assert whole.read("ada") == visits(*range(length))


@every_store
def test_who_keeps_fewer_sees_the_newest(store: HistoryStore) -> None:
    store.append("ada", visits(*range(11)))
    fewer = HistoryStore(store._blobs, keep=3)
    assert fewer.read("ada") == visits(8, 9, 10)
    assert fewer.append("ada", visits(12)) == 1
    assert store.read("ada") == visits(9, 10, 12)


@every_store
def test_threads_lose_nothing_of_each_other(url: str) -> None:
    store, errors = open_store(url, 1000), []

    def work(part: int) -> None:
        try:
            for time in range(part, 300, 5):
                assert store.append("ada", visits(time)) == 1
                assert visits(time)[0] in store.read("ada")
                store.append(f"user {part}", visits(time))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert store.read("ada") == visits(*range(300))
    assert all(len(store.read(f"user {part}")) == 60 for part in range(5))
    store.close()


@shared_stores
def test_processes_that_open_a_new_store_at_once_lose_nothing_of_each_other(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Barrier(2)
    processes = [context.Process(target=work_alone, args=(url, part, started)) for part in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    store = open_store(url, 1000)
    assert store.read("ada") == visits(*range(400))
    store.close()


@shared_stores
def test_what_was_written_is_there_when_opened_again(url: str) -> None:
    store = open_store(url)
    store.append("ada", visits(3))
    store.close()
    again = open_store(url)
    assert again.read("ada") == visits(3)
    again.close()


# all users


@every_store
@pytest.mark.parametrize("at_once", [3, 1000])
def test_all_users_are_named_with_what_is_read_of_them(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(stores, "WALKED", at_once)
    assert (list(store.users()), store.count()) == ([], 0)
    users = [*(f"user {number}" for number in range(97)), "юзер", "a b\n", "{curly}:*", "\0", "x" * 500, "é" * 250]
    store.load((user, visits(*range(len(user) % 19 + 1))) for user in users)
    store.erase("user 31")
    users.remove("user 31")
    assert (dict(store.users()), store.count()) == ({user: store.read(user) for user in users}, len(users))
    fewer = HistoryStore(store._blobs, keep=2)
    assert {user: events for user, events in fewer.users()} == {user: fewer.read(user) for user in users}
    store._blobs.change(["ada"], lambda *_: b"\xc1 no list of events")
    assert dict(store.users())["ada"] is None


@every_store
def test_who_stays_is_named_while_others_come_grow_and_go(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "WALKED", 5)
    store, ended, errors = open_store(url), threading.Event(), []
    stay = {f"stays {number}" for number in range(97)}
    store.load((user, visits(1)) for user in stay)

    def work() -> None:
        try:
            for step in range(10**6):
                if ended.is_set():
                    return
                store.append(f"new {step}", visits(*range(17)))
                store.append(f"stays {step % 97}", visits(step))
                store.erase(f"new {step - 3}")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(7):
        found = dict(store.users())
        assert stay <= found.keys()
        assert all(user[:4] in ("stay", "new ") and events for user, events in found.items())
    ended.set()
    thread.join()
    assert errors == []
    store.close()


@file_stores
def test_histories_of_an_earlier_version_are_read_and_named_when_they_are_written_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(url)
    with monkeypatch.context() as earlier:
        earlier.setattr(stores, "framed", lambda _, digest, blob, front=0: bytes(front) + digest + len(blob).to_bytes(4) + blob)
        for length in range(1, 97):
            store.append(f"user {length}", visits(*range(length), user="x"))
    store.append("user 7", visits(1000))
    for length in range(1, 97):
        assert store.read(f"user {length}")[:length] == visits(*range(length), user="x")
    assert sorted(user for user, _ in store.users()) == [""] * 95 + ["user 7"]
    assert sorted(len(events or []) for _, events in store.users()) == sorted([8, *range(1, 7), *range(8, 97)])
    assert store.count() == 96
    assert store.erase("user 9")
    store.close()


# erasing


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


@file_stores
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("most", [2, 37])
def test_no_file_holds_an_erased_users_id_or_events(url: str, tmp_path: Path, seed: int, most: int) -> None:
    """Users come, grow, are erased and come back among others, so that pages are split, freed and taken again."""
    store, draw = open_store(url, 211), random.Random(seed)
    live: set[int] = set()
    erased: set[int] = set()
    for step in range(1500):
        user = draw.randrange(401)
        store.append(
            name(user),
            [
                Event(f"item of {name(user)}", 100 * step + n, f"event {n} of {name(user)}")
                for n in range(draw.randint(1, most))
            ],
        )
        live.add(user)
        erased.discard(user)
        if step % 41 == 0:
            gone = draw.choice(sorted(live))
            assert store.erase(name(gone))
            live.discard(gone)
            erased.add(gone)
    for gone in draw.sample(sorted(live), 29):
        assert store.erase(name(gone))
        live.discard(gone)
        erased.add(gone)
    held = all_bytes(tmp_path)
    assert [user for user in erased if name(user).encode() in held] == []
    assert all(name(user).encode() in held for user in live), "the others are found so"
    assert all(store.read(name(user)) for user in live)
    store.close()


def name(user: int) -> str:
    return f"<user {user:03}>"


@file_stores
def test_erasing_reaches_what_another_process_wrote_and_a_second_time_what_the_first_left(url: str, tmp_path: Path) -> None:
    other, store = open_store(url), None
    other.append("ada", visits(1, 2, 3, user="ada's"))
    other.append("grace", visits(4))
    other.close()
    store = open_store(url)
    store._blobs.delete("nobody")
    assert b"ada's 2" in all_bytes(tmp_path)
    assert store.erase("ada")
    assert b"ada's" not in all_bytes(tmp_path)
    assert store.read("grace") == visits(4)
    store.close()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_erasing_while_someone_reads_for_long_says_that_bytes_are_left(
    store: HistoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "BUSY_SECONDS", 0.01)
    store = open_store(store.url)
    store.append("ada", visits(1, user="ada's"))
    reader = sqlite3.connect(tmp_path / "histories", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM histories").fetchall()
    with pytest.raises(StoreError, match="reading for long"):
        store.erase("ada")
    assert store.read("ada") == []
    reader.close()
    assert store.erase("ada") is False
    assert b"ada's" not in all_bytes(tmp_path)
    store.close()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_erasing_waits_while_another_process_tidies_the_file(url: str, tmp_path: Path) -> None:
    store = open_store(url)
    store.append("ada", visits(1, user="ada's"))
    script = "import fcntl, sys, time; file = open(sys.argv[1], 'r+b'); fcntl.lockf(file, fcntl.LOCK_EX, 1, 121)"
    words = [sys.executable, "-c", f"{script}; print(flush=True); time.sleep(0.5)", tmp_path / "histories-shm"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as tidying:  # 121: SQLite's lock of checkpoints
        assert tidying.stdout is not None
        tidying.stdout.readline()
        assert store.erase("ada")
    assert b"ada's" not in all_bytes(tmp_path)
    store.close()


@pytest.mark.parametrize("url", ["lmdb"], indirect=True)
def test_erasing_does_the_same_in_lmdb(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "BUSY_SECONDS", 0.01)
    store = open_store(url)
    store.append("ada", visits(1, user="ada's"))
    reader = store._blobs._env.begin()  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="reading for long"):
        store.erase("ada")
    assert store.read("ada") == []
    reader.abort()
    assert store.erase("ada") is False
    assert b"ada's" not in all_bytes(tmp_path)
    store.close()


@pytest.mark.parametrize("url", ["lmdb"], indirect=True)
def test_erasing_again_and_again_does_not_make_the_file_longer(url: str, tmp_path: Path) -> None:
    store = open_store(url)
    store.load((f"user {user}", visits(*range(97))) for user in range(997))
    sizes = []
    for user in range(211):
        store.append(f"user {user}", visits(1000))
        store.erase(f"user {user}")
        sizes.append((tmp_path / "histories").stat().st_size)
    assert sizes[-1] < 1.1 * sizes[10]
    store.close()


# outages


def test_redis_killed_and_started_again_is_answered_by_the_same_store() -> None:
    pytest.importorskip("redis", reason="needs Redis's package")
    with redis_server() as server:
        store = open_store(server.url)
        for _ in range(2):
            assert store.append("ada", visits(1)) == 1
            store.check()
            server.kill()
            for verb in verbs(store):
                with pytest.raises(StoreError, match=f"^redis://127.0.0.1:{server.port}/0: .*see that the server runs"):
                    verb()
            server.start()
            store.check()
            assert store.read("ada") == []
        store.close()


def test_a_redis_without_memory_says_so_and_names_nobody() -> None:
    package = pytest.importorskip("redis", reason="needs Redis's package")
    with redis_server() as server:
        store, client = open_store(server.url), package.Redis.from_url(server.url)
        client.config_set("maxmemory", 1)
        with pytest.raises(StoreError, match="maxmemory") as refused:
            store.append("canary", visits(1))
        store.close()
        client.close()
    assert "canary" not in str(refused.value)


def test_redis_may_be_down_when_the_store_is_opened() -> None:
    pytest.importorskip("redis", reason="needs Redis's package")
    with redis_server() as server:
        server.kill()
        store = open_store(server.url.replace("redis:", "valkey:"))
        with pytest.raises(StoreError):
            store.check()
        server.start()
        store.check()
        store.close()


@pytest.mark.parametrize(
    "name",
    [
        *("password", "sslpassword", "PASSWORD", "signature", "X-Goog-Signature", "x-amz-signature", "sig", "Sig"),
        *("X-Amz-Credential", "X-Amz-Security-Token", "token", "AWSAccessKeyId", "api_key", "client-secret"),
    ],
)
def test_what_lets_in_whoever_has_it_is_not_shown(name: str) -> None:
    assert hidden(f"https://shop/x?{name}=canary%2F7&rows=7") == f"https://shop/x?{name}=***&rows=7"
    assert hidden(f"redis://u:canary@h/0?db=7&{name}=canary") == f"redis://u:***@h/0?db=7&{name}=***"


def test_what_everybody_may_see_is_shown() -> None:
    for url in ("redis://h:6379/0?ttl=7&design=signal", "postgresql://u@h/d?table=lists&connect_timeout=7", "sqlite:a?b=c"):
        assert hidden(url) == url


def test_a_password_is_used_and_never_told() -> None:
    pytest.importorskip("redis", reason="needs Redis's package")
    with redis_server() as server:
        server.kill()
        server.start("--requirepass", "sesame")
        for secret in (server.url.replace("//", "//:sesame@"), f"{server.url}?password=sesame"):
            store = open_store(secret)
            store.append("ada", visits(1))
            server.kill()
            with pytest.raises(StoreError) as caught:
                store.check()
            assert "sesame" not in str(caught.value) + store.url
            assert "***" in store.url
            store.close()
            server.start("--requirepass", "sesame")
        wrong = open_store(server.url.replace("//", "//ada:opensaysme@"))
        with pytest.raises(StoreError) as caught:
            wrong.check()
        assert "opensaysme" not in str(caught.value)
        wrong.close()


def verbs(store: HistoryStore) -> list[Callable[[], object]]:
    return [
        store.check,
        lambda: store.read("ada"),
        lambda: store.append("ada", visits(2)),
        lambda: store.load([("ada", visits(2))]),
        lambda: store.erase("ada"),
    ]


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("histories*"))


@file_stores
def test_a_file_that_goes_is_missed_and_the_one_that_comes_is_read_by_the_same_store(url: str, tmp_path: Path) -> None:
    store = open_store(url)
    store.append("ada", visits(1))
    (tmp_path / "away").mkdir()
    for path in files_of(tmp_path):
        shutil.move(path, tmp_path / "away")
    for verb in verbs(store):
        with pytest.raises(StoreError, match=r"No such file.*see that its folder"):
            verb()
    assert files_of(tmp_path) == [], "none is made in its place"
    other = open_store(url)
    other.append("grace", visits(3))
    other.close()
    assert (store.read("ada"), store.read("grace")) == ([], visits(3))
    assert store.append("ada", visits(2)) == 1
    store.close()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_locked_file_is_read_and_written_to_when_it_is_free(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "BUSY_SECONDS", 0.01)
    store = open_store(url)
    store.append("ada", visits(1))
    other = sqlite3.connect(tmp_path / "histories", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert store.read("ada") == visits(1)
    for verb in verbs(store)[2:]:
        with pytest.raises(StoreError, match="locked"):
            verb()
    other.close()
    assert store.append("ada", visits(2)) == 1
    store.close()


@pytest.mark.parametrize("url", ["lmdb"], indirect=True)
@pytest.mark.parametrize("verb", ["read", "append"])
def test_the_map_of_lmdb_grows_here_and_where_another_process_wrote(
    url: str, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_store.LmdbBlobs, "MAP", 2**17)
    store = open_store(url)
    store.load((f"mine {user}", visits(*range(97))) for user in range(97))
    process = multiprocessing.get_context("spawn").Process(target=load_much, args=(url,))
    process.start()
    process.join()
    assert process.exitcode == 0
    if verb == "append":
        assert store.append("user 996", visits(97)) == 1
    assert store.read("user 996") == visits(*range(98 if verb == "append" else 97))
    assert store.read("mine 96") == visits(*range(97))
    store.close()


@file_stores
def test_what_is_no_store_is_said(url: str, tmp_path: Path) -> None:
    path = tmp_path / "histories"
    path.write_bytes(b"something else " * 1000)
    with pytest.raises(StoreError, match=f"^{url}: "):
        open_store(url)
    path.unlink()
    with pytest.raises(StoreError, match="see that its folder"):
        open_store(f"{url}/in/no/folder")


@every_store
def test_an_unreadable_history_is_said_and_can_be_erased(store: HistoryStore) -> None:
    store._blobs.change(["ada"], lambda *_: b"\xc1 no list of events")
    store.append("grace", visits(1))
    for verb in (lambda: store.read("ada"), lambda: store.append("ada", visits(1))):
        with pytest.raises(StoreError, match="unreadable"):
            verb()
    assert store.read("grace") == visits(1)
    assert store.erase("ada")
    assert store.append("ada", visits(1)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@file_stores
def test_a_full_disk_is_said_and_what_was_there_stays(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=fill_the_disk, args=(url,))
    process.start()
    process.join()
    assert process.exitcode == 0
    store = open_store(url)
    assert store.read("ada") == visits(1)
    store.close()


# choosing


def test_every_kind_is_open_to_choose_and_others_are_refused(tmp_path: Path) -> None:
    assert {"sqlite", "lmdb", "redis", "rediss", "valkey", "memory"} <= STORES.keys()
    open_store(str(tmp_path / "a file.db")).close()
    assert (tmp_path / "a file.db").is_file(), "a path alone is SQLite's"
    with pytest.raises(SetupError, match="'mongo://:\\*\\*\\*@there' is of no known kind"):
        open_store("mongo://:secret@there")
    with pytest.raises(SetupError, match="names no file"):
        open_store("sqlite:")
    with pytest.raises(SetupError, match="keep at least 1"):
        open_store("memory:", 0)
    with pytest.raises(SetupError, match="redis://HOST:PORT"):
        open_store("redis://host/0?socket_timeout=soon")


@pytest.mark.parametrize("package", ["lmdb", "redis"])
def test_a_missing_package_is_named_with_its_remedy(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SetupError, match=rf"pip install attention-recommender\[{package}\]"):
        open_store(f"{package}:{tmp_path / 'histories'}")


# a data set


@every_store
@pytest.mark.parametrize("at_once", [17, 1000])
def test_a_data_sets_histories_are_imported_once_in_parts(
    store: HistoryStore, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("serving.history.USERS", at_once)
    said: list[tuple[int, int]] = []
    counts = import_dataset(store, dataset, lambda done, total: said.append((done, total)))
    table = dataset.events.collect()
    users = table["user_id"].unique().to_list()
    assert said == [(min(done, len(users)), len(users)) for done in range(0, len(users) + at_once, at_once)]
    kept = 0
    for (user,), theirs in table.partition_by("user_id", as_dict=True).items():
        last = theirs.tail(KEEP)
        assert [(event.item_id, event.time) for event in store.read(str(user))] == last.select("item_id", "timestamp").rows()
        kept += len(last)
    assert counts == {"users": len(users), "events": kept, "new": kept}
    assert import_dataset(store, dataset, lambda *_: None) == counts | {"new": 0}


def test_events_without_times_are_imported_in_their_order_with_their_repeats(tmp_path: Path) -> None:
    draw = random.Random(2)
    rows = [(user, place, f"thing {draw.randrange(3)}") for user in (7, 11, 13) for place in range(17)]
    table = pl.DataFrame(rows, schema=["user_id", "order", "item_id"], orient="row")
    table.write_csv(tmp_path / "events.csv")
    build(tmp_path, Recipe("made-up", {"data": {"timestamp": "", "order": "order", "repeats": "keep"}}), tmp_path / "dataset")
    dataset = Dataset.open(tmp_path / "dataset")
    store = open_store("memory:", KEEP)
    for new in (3 * KEEP, 0):
        assert import_dataset(store, dataset, lambda *_: None)["new"] == new
        for user in (7, 11, 13):
            items = [item for who, _, item in rows if who == user]
            assert [event.item_id for event in store.read(str(user))] == items[-KEEP:]
