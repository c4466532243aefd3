"""Nightly lists in a real Redis and a real PostgreSQL."""

from __future__ import annotations

import multiprocessing
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from recsys.errors import DataError, SetupError, StoreError
from serving import delivery, redis_lists
from serving.delivery import deliver
from serving.nights import Night, Nights, erased_digest
from serving.redis_lists import PREFIX, RedisLists
from tests.serving.servers import RedisServer, postgres_database, redis_server
from tests.serving.writers import deliver_until_killed, lists_of, write_night

psycopg = pytest.importorskip("psycopg", reason="postgresql: psycopg is not installed")
redis = pytest.importorskip("redis", reason="redis: its package is not installed")

ITEMS = range(2, 103)
HOSTILE = [
    "",
    " ",
    "a\tb",
    "a\nb",
    "a\r\nb",
    "\\N",
    "\\.",
    "a\n\\.\nb",
    'quo"te',
    "quo'te",
    "a,b",
    "\\",
    "é\u20ac\U0001f600",
    "NULL",
    "*",
    "a:b",
]


@pytest.fixture(scope="module")
def redis_there() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(scope="module")
def postgres_there() -> Iterator[str]:
    with postgres_database() as url:
        yield url


@pytest.fixture
def keys(redis_there: RedisServer) -> Iterator[Any]:
    client = redis.Redis.from_url(redis_there.url)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def url(redis_there: RedisServer, keys: Any) -> str:
    return redis_there.url


@pytest.fixture
def base(postgres_there: str) -> Iterator[Any]:
    """A connection to an empty database."""
    with psycopg.connect(postgres_there, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
        yield connection


@pytest.fixture
def there(postgres_there: str, base: Any) -> str:
    return postgres_there


def table(connection: Any, name: str = "recommendations") -> dict[Any, list[tuple[Any, float]]]:
    found: dict[Any, list[tuple[Any, float]]] = {}
    for user, item, rank, score in connection.execute(
        f"SELECT user_id, item_id, rank, score FROM {name} ORDER BY user_id, rank"
    ):
        found.setdefault(user, []).append((item, float(np.float32(score))))  # told in as few digits as tell it apart
        assert len(found[user]) == rank
    return found


def in_redis(url: str, users: Any) -> dict[Any, list[tuple[Any, float]]]:
    lists = RedisLists(url)
    found = {user: lists.of(str(user)) for user in users}
    lists.close()
    return found


@contextmanager
def meanwhile(look: Callable[[], Any]) -> Iterator[list[Any]]:
    """What a thread sees that looks again and again."""
    seen: list[Any] = []
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            seen.append(look())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def killed(folder: Path, url: str, last: int) -> None:
    child = multiprocessing.get_context("spawn").Process(target=deliver_until_killed, args=(folder, url, last))
    child.start()
    child.join()
    assert child.exitcode == -9


def scores(users: Any) -> dict[Any, list[tuple[Any, float]]]:
    """Lists with float32 scores of every kind of bits."""
    draw = random.Random(7)
    numbers = [float(np.float32(draw.uniform(-1, 1) * 10 ** draw.randrange(-30, 30))) for _ in range(31)]
    return {user: [(item, draw.choice(numbers)) for item in draw.sample(ITEMS, 11)] for user in users}


# Both


@pytest.fixture(params=["redis", "postgresql"])
def place(request: pytest.FixtureRequest) -> tuple[str, Callable[[Any], dict[Any, list[tuple[Any, float]]]]]:
    """An empty server's URL, and what reads the lists of some users there."""
    if request.param == "redis":
        url = request.getfixturevalue("url")
        return url, partial(in_redis, url)
    base = request.getfixturevalue("base")

    def read(users: Any) -> dict[Any, list[tuple[Any, float]]]:
        found = table(base)
        return {user: found.get(user, []) for user in users}

    return request.getfixturevalue("there"), read


Place = tuple[str, Callable[[Any], dict[Any, list[tuple[Any, float]]]]]


def test_every_list_arrives_bit_by_bit(place: Place, tmp_path: Path) -> None:
    url, read = place
    wanted, heard = scores(range(-3, 1009)), []
    night = write_night(tmp_path, wanted | {5: []}, 7)
    assert deliver(night, url, lambda done, of: heard.append((done, of))) == {"users": 1011, "rows": 11 * 1011}
    assert read(wanted) == wanted | {5: []}
    assert heard == sorted(heard)
    assert heard[-1] == (1011, 1012)


def test_hostile_ids_arrive_as_they_are(place: Place, tmp_path: Path) -> None:
    url, read = place
    wanted = lists_of(HOSTILE, HOSTILE, 5)
    deliver(write_night(tmp_path, wanted), url)
    assert read(wanted) == wanted


def test_the_same_night_again_changes_nothing_and_the_next_one_all(place: Place, tmp_path: Path) -> None:
    url, read = place
    first, second = lists_of(range(101), ITEMS, 7), lists_of(range(50, 151), ITEMS, 5)
    night = write_night(tmp_path, first)
    for _ in range(2):
        assert deliver(night, url) == {"users": 101, "rows": 707}
        assert read(first) == first
    deliver(write_night(tmp_path, second), url)
    assert read(range(151)) == {user: [] for user in range(50)} | second
    deliver(night, url)  # an older one: who delivers decides
    assert read(first) == first


def test_a_delivery_that_is_killed_leaves_the_old_lists_and_the_next_one_nothing_of_it(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, read = place
    first, second = lists_of(range(1009), ITEMS, 3), lists_of(range(1, 1010), ITEMS, 5)
    deliver(write_night(tmp_path, first), url)
    write_night(tmp_path, second)
    for last in (400, 1009):
        killed(tmp_path, url, last)
        assert read(first) == first
    third = write_night(tmp_path, lists_of(range(3), ITEMS, 2))
    for _ in range(20):
        try:
            deliver(third, url)
            break
        except StoreError as error:  # the server has not noticed yet that the killed one is gone
            assert "another delivery" in str(error)
            time.sleep(0.1)
    assert read(range(1010)) == lists_of(range(3), ITEMS, 2) | {user: [] for user in range(3, 1010)}


def test_who_reads_during_twenty_swaps_sees_whole_nights_alone(place: Place, tmp_path: Path) -> None:
    """Each night has one score of its own and one item more; of PostgreSQL all lists are read at once, of Redis one."""
    url, _ = place
    users = range(53)

    def night(number: int) -> Night:
        lists = {user: [(item, float(number)) for item in range(2, 9 + number)] for user in users}
        return write_night(tmp_path, lists)

    deliver(night(0), url)
    lists: Any
    if url.startswith("redis"):
        lists, draw = RedisLists(url), random.Random(7)

        def look() -> Any:
            found = lists.of(str(draw.choice(users)))
            return {score for _, score in found}, len(found)
    else:
        lists = psycopg.connect(url, autocommit=True)

        def look() -> Any:
            found = lists.execute("SELECT score, count(*) FROM recommendations GROUP BY score").fetchall()
            return {score for score, _ in found}, found[0][1] // len(users) if found else 0

    with closing(lists), meanwhile(look) as seen:
        for number in range(1, 21):
            deliver(night(number), url)
            until = len(seen) + 3
            while len(seen) < until:
                time.sleep(0.001)
    assert all(len(found) == 1 and places == 7 + found.copy().pop() for found, places in seen)
    order = [found.copy().pop() for found, _ in seen]
    assert order == sorted(order)
    assert len(set(order)) > 10


def test_a_user_who_is_erased_from_the_night_meanwhile_is_not_delivered(place: Place, tmp_path: Path) -> None:
    url, read = place
    wanted = lists_of(range(101), ITEMS, 3)
    told: list[int] = []

    def tell(done: int, of: int) -> None:
        if not told:
            assert Nights(tmp_path).erase("7")
        told.append(of)

    deliver(write_night(tmp_path, wanted, 5), url, tell)
    assert read(wanted) == wanted | {7: []}
    assert set(told) == {100, 101}


def test_a_night_that_is_gone_leaves_the_old_lists(place: Place, tmp_path: Path) -> None:
    url, read = place
    wanted = lists_of(range(31), ITEMS, 3)
    first = write_night(tmp_path, {1: [(2, 0.5)]})
    deliver(write_night(tmp_path, wanted), url)
    write_night(tmp_path, {1: [(3, 0.5)]})
    with pytest.raises(DataError, match="no longer there"):
        deliver(first, url)
    assert read(wanted) == wanted


# What goes wrong before it begins


@pytest.mark.parametrize("url", ["mysql://u:canary@h/d", "sqlite:x", "", "s3://bucket/x?password=canary"])
def test_another_kind_is_refused_with_the_kinds(url: str, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="redis, rediss, valkey, valkeys, postgresql, postgres") as refused:
        deliver(write_night(tmp_path, {1: [(2, 0.5)]}), url)
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize(("url", "package"), [("redis://h", "redis"), ("postgresql://h/d", "psycopg")])
def test_a_missing_package_is_named_with_its_extra(
    url: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    extra = "redis" if package == "redis" else "postgresql"
    with pytest.raises(SetupError, match=rf"pip install attention-recommender\[{extra}\]"):
        deliver(write_night(tmp_path, {1: [(2, 0.5)]}), url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:canary@127.0.0.1:1/0",
        "redis://127.0.0.1:1/0?password=canary",
        "redis://u:canary@127.0.0.1:x/0",
        "redis://u:canary@[127.0.0.1/0",
        "redis://127.0.0.1:1/0?ttl=0&password=canary",
        "redis://127.0.0.1:1/0?ttl=soon&password=canary",
        "postgresql://u:canary@127.0.0.1:1/d",
        "postgresql://u@127.0.0.1:1/d?password=canary",
        "postgresql://u:canary@127.0.0.1:x/d",
        "postgresql://u:can%zzary@127.0.0.1:1/d?password=canary",
        "postgresql://u:canary@127.0.0.1:1/d?nonsense=canary",
        "postgresql://u:canary@127.0.0.1:1/d?sslmode=canary",
        "postgresql://u:canary@[127.0.0.1/d",
        "postgresql://u:canary@127.0.0.1:1/d?table=a.b.c",
        "postgresql://u:canary@127.0.0.1:1/d?table=",
        f"postgresql://u:canary@127.0.0.1:1/d?table={64 * 'x'}",
    ],
)
def test_no_message_has_the_password_or_a_second_line(url: str, tmp_path: Path) -> None:
    with pytest.raises((SetupError, StoreError)) as refused:
        deliver(write_night(tmp_path, {1: [(2, 0.5)]}), url)
    told = str(refused.value).replace("nonsense=canary", "").replace("sslmode=canary", "")
    assert "canary" not in told
    assert "\n" not in told
    assert refused.value.__context__ is None or refused.value.__suppress_context__


# Redis


def test_every_key_expires_and_only_the_last_two_nights_stay(url: str, keys: Any, tmp_path: Path) -> None:
    keys.set("recsys:history:u-1", "another's")
    nights = [write_night(tmp_path, lists_of(range(number, 1500), ITEMS, 2)) for number in range(4)]
    deliver(nights[2], f"{url}?ttl=7000&socket_timeout=20")
    deliver(nights[3], f"{url}?socket_timeout=20&ttl=7000")
    found = {key: keys.ttl(key) for key in keys.scan_iter("*", count=1000)}
    assert found.pop(b"recsys:history:u-1") == -1
    assert len(found) == 1498 + 1497 + 3
    assert all(6000 < seconds <= 7000 for seconds in found.values())
    fourth = write_night(tmp_path, {1: [(2, 0.5)]})
    deliver(fourth, url)
    left = {key[len(PREFIX) :].partition(b":")[0].decode() for key in keys.scan_iter(f"{PREFIX}*")}
    assert left == {nights[3].id, fourth.id}
    assert {night.decode() for night in keys.hkeys("recsys:lists:nights")} == left
    assert keys.get("recsys:history:u-1") == b"another's"
    assert 2.9 * 24 * 3600 < keys.ttl(f"{PREFIX}{fourth.id}:1") <= 3 * 24 * 3600


def test_of_two_deliveries_at_once_the_first_that_ends_stays_whole(url: str, keys: Any, tmp_path: Path) -> None:
    wanted = lists_of(range(1009), ITEMS, 3)
    first = write_night(tmp_path, lists_of(range(1500), ITEMS, 5), 1)
    second = write_night(tmp_path, wanted, 1)
    told: list[int] = []

    def tell(done: int, of: int) -> None:
        told.append(done)
        if len(told) == 2:
            deliver(second, url)
            deliver(second, url)

    with pytest.raises(StoreError, match="another delivery ended before this one"):
        deliver(first, url, tell)
    assert in_redis(url, range(1500)) == wanted | {user: [] for user in range(1009, 1500)}
    assert {key[len(PREFIX) :].partition(b":")[0].decode() for key in keys.scan_iter(f"{PREFIX}*")} == {second.id}
    deliver(first, url)
    assert in_redis(url, [1499]) == {1499: lists_of(range(1500), ITEMS, 5)[1499]}


def test_an_erased_user_is_gone_from_all_nights_and_comes_back_with_none_that_was_begun_before(
    url: str, keys: Any, tmp_path: Path
) -> None:
    wanted = lists_of(["u-1", "u-2", "u-3"], ITEMS, 3)
    second, third = (write_night(tmp_path, wanted, number) for number in (2, 3))
    deliver(second, url)
    lists, told = RedisLists(url), []

    def tell(done: int, of: int) -> None:
        if not told:
            assert lists.erase("u-2")
            assert not lists.erase("u-2")
        told.append(done)

    write_night(tmp_path, wanted, 5)
    deliver(third, url, tell)
    assert lists.of("u-1") == wanted["u-1"]
    assert lists.of("u-2") == []
    assert not [
        key for key in keys.scan_iter("*") if b"u-2" in key or (keys.type(key) == b"string" and b"u-2" in keys.get(key))
    ]
    assert deliver(Night.open(tmp_path), url) == {"users": 2, "rows": 6}
    assert lists.of("u-2") == []
    later = write_night(tmp_path, wanted, 7, clock={"begun": "2100-01-01T00:00:00+00:00"})
    assert deliver(later, url)["users"] == 3
    assert lists.of("u-2") == wanted["u-2"]
    lists.close()


def test_a_night_that_is_older_than_the_marks_of_who_was_erased_is_refused(url: str, keys: Any, tmp_path: Path) -> None:
    wanted = lists_of(["u-1", "u-2"], ITEMS, 3)
    old, older = (
        write_night(tmp_path, wanted, clock={"begun": (datetime.now(UTC) - timedelta(days=days)).isoformat()})
        for days in (29, 31)
    )
    lists = RedisLists(f"{url}?ttl=1")  # of the keys of lists, not of the marks
    lists.erase("u-2")
    month = 30 * 24 * 3600
    assert keys.ttl("recsys:lists:erased") > month
    keys.zadd("recsys:lists:erased", {erased_digest("u-1"): time.time() - month, "forgotten": time.time() - 2 * month})
    lists.erase("u-2")
    assert keys.zcard("recsys:lists:erased") == 2
    assert deliver(old, url) == {"users": 1, "rows": 3}
    assert lists.of("u-2") == []
    with pytest.raises(DataError, match="more than 30 days ago") as refused:
        deliver(older, url)
    assert "\n" not in str(refused.value)
    assert lists.of("u-1") == wanted["u-1"]
    lists.close()


def test_who_is_erased_before_a_batch_is_written_is_not_in_it(url: str, keys: Any, tmp_path: Path) -> None:
    wanted = lists_of(range(1009), ITEMS, 3)
    night = write_night(tmp_path, wanted, 1)
    lists, told = RedisLists(url), []

    def tell(done: int, of: int) -> None:
        told.append(done)
        if len(told) == 1:
            assert not lists.erase("1008")
            assert all(keys.ttl(key) > 0 for key in keys.scan_iter())

    assert deliver(night, url, tell)["users"] == 1008
    assert lists.of("1008") == []
    assert lists.of("1007") == wanted[1007]
    lists.close()


def test_a_server_without_memory_says_so_and_names_nobody(tmp_path: Path) -> None:
    with redis_server() as server:
        client = redis.Redis.from_url(server.url)
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 300_000)
        night = write_night(tmp_path, lists_of([f"canary {user}" for user in range(5003)], ITEMS, 13))
        with pytest.raises(StoreError, match="maxmemory") as refused:
            deliver(night, server.url)
        client.close()
    assert "canary" not in str(refused.value)


def test_lists_come_again_when_the_server_does(tmp_path: Path) -> None:
    now = [0.0]
    night = write_night(tmp_path, {"u": [(2, 0.5)]})
    with redis_server() as server:
        lists = RedisLists(server.url, clock=lambda: now[0])
        assert lists.of("u") == []
        deliver(night, server.url)
        assert lists.of("u") == [(2, 0.5)]
        assert not lists.refresh()
        server.kill()
        assert lists.of("u") == []
        for work in (lists.refresh, partial(lists.erase, "u")):
            with pytest.raises(StoreError, match="see that the server runs"):
                work()
        server.start()
        assert lists.of("u") == []  # left alone for a while
        now[0] += redis_lists.REST
        assert lists.of("u") == []  # which keeps nothing on disk
        deliver(night, server.url)
        assert lists.refresh()
        assert lists.of("u") == [(2, 0.5)]
        client = redis.Redis.from_url(server.url)
        client.set(f"{PREFIX}{night.id}:u", b"no list")
        assert lists.of("u") == []
        client.set(f"{PREFIX}{night.id}:v", redis_lists.packed([7], b"\0\0\0\x3f"))
        assert lists.of("v") == [(7, 0.5)]
        client.close()
        lists.close()


# PostgreSQL


def test_the_table_says_of_which_night_it_is_and_has_types_key_and_reasons(there: str, base: Any, tmp_path: Path) -> None:
    lists = {"a": [(2, 0.5), (3, 0.25)], "b": [(5, 0.125)]}
    night = write_night(tmp_path, lists, because={"a": [7, None], "b": [11]})
    deliver(night, there)
    comment = base.execute("SELECT obj_description('recommendations'::regclass)").fetchone()[0]
    assert comment == f"recsys: night {night.id}, bundle made-up, asked for at 2023-11-14T22:13:20+00:00"
    query = "SELECT column_name, data_type, is_nullable FROM information_schema.columns WHERE table_name = 'recommendations'"
    assert base.execute(f"{query} ORDER BY ordinal_position").fetchall() == [
        ("user_id", "text", "NO"),
        ("item_id", "bigint", "NO"),
        ("rank", "integer", "NO"),
        ("score", "real", "NO"),
        ("because", "bigint", "YES"),
    ]
    assert base.execute("SELECT user_id, rank, because FROM recommendations ORDER BY 1, 2").fetchall() == [
        ("a", 1, 7),
        ("a", 2, None),
        ("b", 1, 11),
    ]
    key = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'recommendations'::regclass AND contype = 'p'"
    assert base.execute(key).fetchone() == ("PRIMARY KEY (user_id, rank)",)
    assert base.execute("SELECT reltuples FROM pg_class WHERE relname = 'recommendations'").fetchone() == (3,)


@pytest.mark.parametrize("name", ["shop.lists", 'Sho p."; DROP TABLE x; --', "é", "x" * 63])
def test_a_table_may_have_any_name(name: str, there: str, base: Any, tmp_path: Path) -> None:
    schema = name.partition(".")[0] if "." in name else "public"
    base.execute(psycopg.sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(psycopg.sql.Identifier(schema)))
    wanted = {1: [(2, 0.5)]}
    try:
        for _ in range(2):
            deliver(write_night(tmp_path, wanted), f"{there}?table={quote(name)}&connect_timeout=7")
        assert table(base, psycopg.sql.Identifier(*name.split(".")).as_string(base)) == wanted
        kept = "SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relnamespace = %s::regnamespace"
        assert base.execute(kept, [psycopg.sql.Identifier(schema).as_string(base)]).fetchone() == (1,)
    finally:
        base.execute(psycopg.sql.SQL("DROP SCHEMA {} CASCADE").format(psycopg.sql.Identifier(schema)))
        base.execute("CREATE SCHEMA IF NOT EXISTS public")


@pytest.fixture
def roles(base: Any) -> Iterator[list[str]]:
    """Names of roles, quoted, which are dropped afterwards with all that is theirs."""
    names = [f'"recsys_test_{uuid.uuid4().hex} {odd}"' for odd in ("a", '""', "é", "d", "e")]
    for name in names:
        base.execute(f"CREATE ROLE {name} LOGIN")
    yield names
    base.execute("RESET ROLE")
    for name in names:
        base.execute(f"DROP OWNED BY {name} CASCADE")
        base.execute(f"DROP ROLE {name}")


def test_who_may_read_the_old_table_may_read_the_new_one_and_nobody_else(
    there: str, base: Any, roles: list[str], tmp_path: Path
) -> None:
    reader, writer, columns, late, own = roles
    deliver(write_night(tmp_path, {1: [(2, 0.5)]}), there)
    base.execute(f"ALTER TABLE recommendations OWNER TO {own}")
    base.execute(f"GRANT SELECT ON recommendations TO {reader} WITH GRANT OPTION")
    base.execute(f"GRANT SELECT, DELETE ON recommendations TO {writer}")
    base.execute(f"GRANT SELECT (user_id, item_id) ON recommendations TO {columns}")
    base.execute("GRANT TRIGGER ON recommendations TO PUBLIC")
    base.execute(f"GRANT USAGE ON SCHEMA public TO {late}")
    base.execute(f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO {late}")
    query = """SELECT relowner::regrole::text, (SELECT array_agg(x::text ORDER BY x::text) FROM unnest(relacl) x),
        (SELECT array_agg(attname || attacl::text ORDER BY 1) FROM pg_attribute WHERE attrelid = c.oid AND attacl IS NOT NULL)
        FROM pg_class c WHERE relname = 'recommendations'"""
    before = base.execute(query).fetchone()
    for number in range(3):
        deliver(write_night(tmp_path, {1: [(number, 0.5)]}), there)
        assert base.execute(query).fetchone() == before
    base.execute(f"SET ROLE {late}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        table(base)


def test_what_is_no_table_of_lists_is_never_replaced(there: str, base: Any, tmp_path: Path) -> None:
    night = write_night(tmp_path, {1: [(2, 0.5)]})
    base.execute("CREATE TABLE users (user_id BIGINT, name TEXT)")
    base.execute("INSERT INTO users VALUES (7, 'kept')")
    base.execute("CREATE VIEW seen AS SELECT 1 AS user_id, 2 AS item_id, 3 AS rank, 4 AS score")
    for name in ("users", "seen"):
        with pytest.raises(SetupError, match="no table of lists"):
            deliver(night, f"{there}?table={name}")
    assert base.execute("SELECT * FROM users").fetchall() == [(7, "kept")]
    deliver(night, there)


def test_what_depends_on_the_table_is_named_and_a_function_may_read_it(there: str, base: Any, tmp_path: Path) -> None:
    deliver(write_night(tmp_path, {1: [(2, 0.5)]}), there)
    base.execute("CREATE VIEW on_it AS SELECT * FROM recommendations")
    second = write_night(tmp_path, {1: [(3, 0.5)]})
    with pytest.raises(StoreError, match="view on_it depends on table recommendations, so the old lists stay; drop that"):
        deliver(second, there)
    assert table(base) == {1: [(2, 0.5)]}
    base.execute("DROP VIEW on_it")
    base.execute("CREATE FUNCTION of_one() RETURNS SETOF bigint LANGUAGE sql AS 'SELECT item_id FROM recommendations'")
    deliver(second, there)
    assert base.execute("SELECT of_one()").fetchall() == [(3,)]


def test_a_table_whose_ids_are_of_another_type_is_not_replaced(there: str, base: Any, tmp_path: Path) -> None:
    deliver(write_night(tmp_path, {1: [(2, 0.5)]}, because={1: [7]}), there)
    for lists, because, said in (
        ({"a": [(2, 0.5)]}, {"a": [7]}, "user_id as BIGINT, and these lists as TEXT"),
        ({1: [("a", 0.5)]}, {1: ["b"]}, "item_id as BIGINT, and these lists as TEXT"),
    ):
        with pytest.raises(
            SetupError, match=f"recommendations has {said}, so it is not replaced; give another name"
        ) as refused:
            deliver(write_night(tmp_path, lists, because=because), there)
        assert "\n" not in str(refused.value)
        assert table(base) == {1: [(2, 0.5)]}
    deliver(write_night(tmp_path, {1: [(3, 0.5)]}), there)  # without reasons
    assert table(base) == {1: [(3, 0.5)]}


def test_a_nul_is_refused_in_one_line_that_names_nobody(there: str, base: Any, tmp_path: Path) -> None:
    deliver(write_night(tmp_path, {"u": [("i", 0.5)]}), there)
    for lists in ({"canary\0": [("i", 0.5)]}, {"u": [("canary\0", 0.5)]}):
        with pytest.raises(DataError, match="NUL") as refused:
            deliver(write_night(tmp_path, lists), there)
        assert "canary" not in str(refused.value)
    assert table(base) == {"u": [("i", 0.5)]}


def test_one_who_reads_for_long_keeps_only_the_swap_waiting(
    there: str, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "LOCK_TRIES", 3)
    monkeypatch.setattr(delivery, "LOCK_PAUSE", 0.05)
    deliver(write_night(tmp_path, {1: [(2, 0.5)]}), there)
    second, waited = write_night(tmp_path, {1: [(3, 0.5)]}), threading.Event()
    monkeypatch.setattr(delivery.time, "sleep", lambda seconds: waited.set())
    with psycopg.connect(there) as long, psycopg.connect(there, autocommit=True) as short:
        table(long)
        short.execute("SET statement_timeout = '20s'")
        said = "someone has held recommendations for 3 tries, so the old lists stay"
        with meanwhile(lambda: table(short)) as seen, pytest.raises(StoreError, match=said):
            deliver(second, there)
        assert waited.is_set()
        assert seen
        assert all(found == {1: [(2, 0.5)]} for found in seen)
        assert table(long) == {1: [(2, 0.5)]}
    deliver(second, there)
    assert table(base) == {1: [(3, 0.5)]}


def test_a_reader_whose_transaction_is_older_sees_the_new_table_whole(there: str, base: Any, tmp_path: Path) -> None:
    wanted = lists_of(range(101), ITEMS, 3)
    deliver(write_night(tmp_path, {1: [(2, 0.5)]}), there)
    with psycopg.connect(there) as older:
        older.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        older.execute("SELECT 1")
        deliver(write_night(tmp_path, wanted), there)
        assert table(older) == wanted


def test_of_two_deliveries_of_one_table_the_second_is_refused(there: str, base: Any, tmp_path: Path) -> None:
    night, refused = write_night(tmp_path, lists_of(range(101), ITEMS, 3)), []

    def tell(done: int, of: int) -> None:
        with pytest.raises(StoreError, match="another delivery writes recommendations"):
            deliver(night, there)
        refused.append(done)

    deliver(night, there, tell)
    assert refused
    assert len(table(base)) == 101


def test_what_the_server_refuses_is_told_without_names(there: str, base: Any, roles: list[str], tmp_path: Path) -> None:
    night = write_night(tmp_path, {f"canary {user}": [(2, 0.5)] for user in range(3)})
    base.execute(f"GRANT USAGE ON SCHEMA public TO {roles[0]}")
    with pytest.raises(StoreError, match="permission denied for schema public") as refused:
        deliver(night, there.replace("postgres@", f"{quote(roles[0][1:-1])}@"))
    told = [str(refused.value)]
    deliver(night, there)
    Path(night.lists(0)).write_bytes(night.lists(1).read_bytes())  # some users twice, some not at all
    Path(night.lists(2)).write_bytes(night.lists(1).read_bytes())
    with pytest.raises(StoreError, match="could not create unique index") as refused:
        deliver(night, there)
    told.append(str(refused.value))
    assert not [line for line in told if "canary" in line or "\n" in line]
    assert len(table(base)) == 3
