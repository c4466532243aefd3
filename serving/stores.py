"""Blobs under users' ids in SQLite, LMDB, Redis or Valkey, or memory: read, changed in one piece, and wiped when deleted.

Wiping: a database file goes on holding what was deleted, in free pages and in gaps of pages. SQLite with secure_delete zeroes
what it frees, but a page whose rows moved to its neighbour keeps their old bytes in its gap (seen for 5 of 760 users of made-up
traffic), LMDB zeroes nothing, and it keeps a deleted key as the border between two pages. So both files get rows of a digest
of the user's id and a blob that lies, with the id behind it, in pages of its own, which the database never copies elsewhere
and which are zeroed when freed. What may be left of a user is the digest, as a border or in a gap.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import quote

from recsys.errors import RequestError, SetupError, StoreError

if TYPE_CHECKING:
    import lmdb

T = TypeVar("T")
Change = Callable[[str, bytes | None], bytes | None]
"""What a user's blob becomes; None: it stays. May be called again for the same user, if another writer came first."""
LONGEST = 500
"""Bytes of a user's id."""
BUSY_SECONDS = 5.0
"""How long a file waits for its other users."""
TIMEOUT = 1.0
"""Seconds that Redis may take to connect and to answer, unless the URL says otherwise."""
TRIES = 100
"""How often a change in Redis begins anew because another came first; of those that compete, one succeeds each time."""
DIGEST, LENGTH, NAME = 16, 4, 2
"""Bytes around a blob in a file: of whom it is, and its length; behind it, the length of the user's id, which follows."""
WALKED = 1000
"""Users that are walked at once."""
SECRET = r"password|passwd|pwd|signature|token|credential|secret|key|(?<![a-z])sig(?![a-z])"
"""In the names of a URL's parameters that nobody is to see."""


class Blobs(Protocol):
    """A blob a user; safe to share between threads, and its place between processes.

    Every method raises StoreError, and BlobError where others are not concerned.
    """

    url: str
    """Without the password."""

    def get(self, user: str) -> bytes | memoryview | None: ...

    def change(self, users: Sequence[str], change: Change) -> None:
        """Change the blobs of different users, all or none."""

    def delete(self, user: str) -> bool:
        """Leave nothing of a user; returns whether there was a blob."""

    def walk(self) -> Iterator[tuple[str, bytes | memoryview]]:
        """Every user's id and blob, in bounded memory; whoever comes or goes meanwhile is there or not.

        An id is empty where a file holds none, because an earlier version wrote the blob. A server may name a user twice.
        """

    def count(self) -> int:
        """How many users there are."""

    def check(self) -> None: ...

    def close(self) -> None: ...


class BlobError(StoreError):
    """Of one user's blob, or one change: the store itself answers."""


class _Foreign(ValueError):
    """A row is another user's."""


def checked(user: str) -> str:
    """A user's id that every store takes. Raises RequestError."""
    try:
        size = len(user.encode())
    except UnicodeEncodeError:
        raise RequestError(f"user id {user[:20]!r} is no text that UTF-8 has; give one that is") from None
    if not 0 < size <= LONGEST:
        raise RequestError(f"a user id has {size} bytes; give one of 1 to {LONGEST}")
    return user


def hidden(url: str) -> str:
    """A URL without its password, and without parameters that let in whoever has them, as signatures and tokens do."""
    bare = re.sub(r"(://[^/@:]*:)[^/]*@", r"\1***@", url)
    return re.sub(rf"([?&][\w.%~-]*(?:{SECRET})[\w.%~-]*=)[^&]*", r"\1***", bare, flags=re.IGNORECASE)


def _broken(url: str, found: object, remedy: str) -> StoreError:
    kind = BlobError if isinstance(found, _Foreign) else StoreError
    return kind(f"{url}: {' '.join(str(found).split()) or type(found).__name__}; {remedy}")


def _digest(user: str) -> bytes:
    return blake2b(user.encode(), digest_size=DIGEST).digest()


def _framed(user: str, digest: bytes, blob: bytes, front: int = 0) -> bytes:
    """A blob as files hold it, behind so many zeros; any number may follow."""
    name = user.encode()
    return b"".join((bytes(front), digest, len(blob).to_bytes(LENGTH), blob, len(name).to_bytes(NAME), name))


def _unframed(digest: bytes, row: bytes | None, front: int = 0) -> memoryview | None:
    """The blob of a row. Raises _Foreign: it is another user's, whose digest begins alike."""
    if row is None:
        return None
    start = front + DIGEST + LENGTH
    if row[front : front + DIGEST] != digest:
        raise _Foreign("a row is not of the user whose key it has")
    return memoryview(row)[start : start + int.from_bytes(row[front + DIGEST : start])]


def _named(row: bytes, front: int = 0) -> tuple[str, memoryview]:
    """The user's id that a row holds, empty where an earlier version wrote none, and the blob."""
    digest = row[front : front + DIGEST]
    blob = _unframed(digest, row, front)
    assert blob is not None  # for there is a row
    start = front + DIGEST + LENGTH + len(blob) + NAME
    user = row[start : start + int.from_bytes(row[start - NAME : start])].decode(errors="replace")
    return user if _digest(user) == digest else "", blob


class MemoryBlobs:
    """In this process, and gone with it: for tests and demonstrations."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._blobs: dict[str, bytes] = {}
        self._lock = Lock()

    def get(self, user: str) -> bytes | None:
        return self._blobs.get(user)

    def change(self, users: Sequence[str], change: Change) -> None:
        with self._lock:
            changed = {user: change(user, self._blobs.get(user)) for user in users}
            self._blobs |= {user: blob for user, blob in changed.items() if blob is not None}

    def delete(self, user: str) -> bool:
        with self._lock:
            return self._blobs.pop(user, None) is not None

    def walk(self) -> Iterator[tuple[str, bytes]]:
        with self._lock:
            users = list(self._blobs)
        for user in users:
            blob = self._blobs.get(user)
            if blob is not None:
                yield user, blob

    def count(self) -> int:
        return len(self._blobs)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


class File:
    """Where a file lies, and whether it is still the one that was opened."""

    def __init__(self, url: str) -> None:
        self.path = Path(url.partition(":")[2])
        self._name = str(self.path)  # of which a look takes half as long
        if not self.path.name:
            raise SetupError(f"{url}: names no file; give one, as in {url.partition(':')[0]}:histories.db")

    def identity(self) -> tuple[int, int]:
        """Raises OSError: it is gone. While one is held open, no other has its number."""
        found = os.stat(self._name)
        return found.st_dev, found.st_ino


class SqliteBlobs:
    """In an SQLite file and its -wal and -shm; what was written outlives the process, the last of it maybe not the power.

    A row begins with zeros, as many as of its bytes lie among other rows, and ends with zeros, so that it fills the pages that
    it has alone. Pages are small, so that this costs a user 0.6 kB. Source: sqlite.org/fileformat2.html, B-tree cell format.
    """

    ERRORS = (sqlite3.Error, OSError, ValueError)
    PAGE = 1024
    OWN = PAGE - 4
    """Bytes of a row in a page that it has alone."""
    FRONT = (PAGE - 12) * 32 // 255 - 23
    """Bytes of a row among others, if the rest fills pages."""
    REMEDY = "see that its folder is there, has room and may be written, and that no other program holds it"

    def __init__(self, url: str) -> None:
        self.url, self._file = url, File(url)
        self._idle: deque[tuple[sqlite3.Connection, tuple[int, int]]] = deque()
        try:
            self._connect("rwc").close()
        except self.ERRORS as error:
            raise _broken(self.url, error, self.REMEDY) from None

    def get(self, user: str) -> memoryview | None:
        with self._connection() as connection:
            return self._read(connection, _digest(user))

    def change(self, users: Sequence[str], change: Change) -> None:
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            rows = []
            for user in users:
                digest = _digest(user)
                found = self._read(connection, digest)
                blob = change(user, None if found is None else bytes(found))
                if blob is not None:
                    rows.append((_key(digest), self._filled(_framed(user, digest, blob, self.FRONT))))
            put = "INSERT INTO histories VALUES (?, ?) ON CONFLICT (user) DO UPDATE SET events = excluded.events"
            connection.executemany(put, rows)
            connection.execute("COMMIT")

    def delete(self, user: str) -> bool:
        with self._connection() as connection:
            found = connection.execute("DELETE FROM histories WHERE user = ?", (_key(_digest(user)),)).rowcount > 0
            if connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                kept = "the user is deleted, but someone has been reading for long and keeps the old bytes in the -wal"
                raise BlobError(f"{self.url}: {kept}; erase again")
            return found

    def walk(self) -> Iterator[tuple[str, memoryview]]:
        """A part at a time, between which others may write and erase."""
        part, start = f"SELECT user, events FROM histories WHERE user >= ? ORDER BY user LIMIT {WALKED}", -(2**63)
        while start < 2**63:
            with self._connection() as connection:
                rows = connection.execute(part, (start,)).fetchall()
                named = [_named(row, self.FRONT) for _, row in rows]
            yield from named
            start = rows[-1][0] + 1 if rows else 2**63

    def count(self) -> int:
        with self._connection() as connection:
            return int(connection.execute("SELECT count(*) FROM histories").fetchone()[0])

    def check(self) -> None:
        with self._connection() as connection:
            connection.execute("SELECT user FROM histories LIMIT 1").fetchall()

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[0].close()

    def _read(self, connection: sqlite3.Connection, digest: bytes) -> memoryview | None:
        found = connection.execute("SELECT events FROM histories WHERE user = ?", (_key(digest),)).fetchall()
        return _unframed(digest, found[0][0] if found else None, self.FRONT)

    def _filled(self, row: bytes) -> bytes:
        """Lengthened so that all but its zeros in front lies in pages of its own, which it fills."""
        record = self.FRONT + -(-(len(row) + 6 - self.FRONT) // self.OWN) * self.OWN
        head = next(size for size in (4, 5, 6) if 2 * (record - size) + 12 < 128 ** (size - 2))  # the row's type, by its length
        return row.ljust(record - head, b"\0")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """One that no other thread uses meanwhile, to the file that is there now."""
        connection = None
        try:
            while connection is None:
                there = self._file.identity()
                try:
                    connection, opened = self._idle.pop()
                except IndexError:
                    connection, opened = self._connect("rw"), there
                if opened != there:
                    connection.close()
                    connection = None
            yield connection
        except BaseException as error:
            if connection is not None:
                connection.close()  # which takes back what was not committed
            if isinstance(error, self.ERRORS):
                raise _broken(self.url, error, self.REMEDY) from None
            raise
        self._idle.append((connection, opened))

    def _connect(self, mode: str) -> sqlite3.Connection:
        """Tried anew while others are at the same: of the change to WAL, SQLite does not wait for its turn."""
        until = time.monotonic() + BUSY_SECONDS
        while True:
            address = f"file:{quote(str(self._file.path))}?mode={mode}"
            connection = sqlite3.connect(address, BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True)
            try:
                connection.execute(f"PRAGMA page_size = {self.PAGE}")  # of a new file
                connection.execute("PRAGMA journal_mode = WAL").fetchall()
                for setting in ("synchronous = NORMAL", "secure_delete = ON", "temp_store = MEMORY"):
                    connection.execute(f"PRAGMA {setting}").fetchall()
                connection.execute("CREATE TABLE IF NOT EXISTS histories (user INTEGER PRIMARY KEY, events BLOB NOT NULL)")
                if connection.execute("PRAGMA page_size").fetchone() != (self.PAGE,):
                    raise ValueError("a database that something else made")
                return connection
            except BaseException as error:
                connection.close()
                if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
                time.sleep(0.01)


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], signed=True)


class LmdbBlobs:
    """In an LMDB file and its -lock; what was written outlives the power, at the cost of waiting for the disk.

    The map grows as the file does. A row takes two pages of its own or more, for LMDB keeps a written page in memory and lets
    its bytes show through the gap of the next one, but only if it stood alone. To delete takes as long as zeros take to be
    written over all free pages of the file.
    """

    MAP = 2**26
    """Bytes of a new file's map; it doubles when full."""
    AT_ONCE = 2**13
    """Pages that are wiped at once: 32 MiB."""
    SETTLING = 5
    """Transactions between a deletion and its wiping."""
    REMEDY = "see that its folder is there, has room and may be written"

    def __init__(self, url: str) -> None:
        try:
            import lmdb
        except ImportError as error:
            remedy = "pip install attention-recommender[lmdb], or keep histories in sqlite:PATH"
            raise SetupError(f"{url}: lmdb does not load ({error}); {remedy}") from None
        self._lmdb, self.url, self._file = lmdb, url, File(url)
        self._writing = Lock()
        """Held by who writes; taken before the gate."""
        self._gate = Lock()
        """Held by who reads, and by who changes the map, which nobody may read meanwhile."""
        with self._errors():
            self._open()

    def get(self, user: str) -> memoryview | None:
        digest = _digest(user)
        return self._read(lambda txn: _unframed(digest, txn.get(digest)))

    def change(self, users: Sequence[str], change: Change) -> None:
        def work(txn: lmdb.Transaction[bytes]) -> None:
            for user in users:
                digest = _digest(user)
                found = _unframed(digest, txn.get(digest))
                blob = change(user, None if found is None else bytes(found))
                if blob is not None:
                    txn.put(digest, _framed(user, digest, blob).ljust(self._page, b"\0"))

        with self._errors():
            self._write(work)

    def delete(self, user: str) -> bool:
        with self._errors():
            found = self._write(lambda txn: txn.delete(_digest(user)))
            self._wipe()
            return found

    def walk(self) -> Iterator[tuple[str, memoryview]]:
        """A part at a time, between which others may write and erase."""
        start = bytes(1)

        def part(txn: lmdb.Transaction[bytes]) -> list[tuple[bytes, bytes]]:
            with txn.cursor() as cursor:
                return list(islice(cursor, WALKED)) if cursor.set_range(start) else []

        while rows := self._read(part):
            yield from (_named(row) for key, row in rows if len(key) == DIGEST)  # the zeros have a row too
            start = rows[-1][0] + bytes(1)

    def count(self) -> int:
        return int(self._read(lambda _: self._env.stat()["entries"])) - 1  # of the zeros

    def check(self) -> None:
        self.get("")

    def close(self) -> None:
        with self._writing, self._gate:
            self._env.close()

    def _open(self) -> None:
        self._env = self._lmdb.open(str(self._file.path), subdir=False, map_size=self.MAP, max_dbs=1)
        self._env.reader_check()
        self._zeros = self._env.open_db(b"zeros")
        self._page = self._env.stat()["psize"]
        self._identity = self._file.identity()

    def _follow(self) -> None:
        """To the file that is there now."""
        if self._identity != self._file.identity():
            with self._writing, self._gate:
                self._env.close()
                self._open()

    def _read(self, look: Callable[[lmdb.Transaction[bytes]], T]) -> T:
        with self._errors():
            self._follow()
            try:
                return self._look(look)
            except self._lmdb.MapResizedError:
                with self._writing:
                    self._resize(0)
                return self._look(look)

    def _look(self, look: Callable[[lmdb.Transaction[bytes]], T]) -> T:
        with self._gate, self._env.begin() as txn:
            return look(txn)

    def _write(self, work: Callable[[lmdb.Transaction[bytes]], T]) -> T:
        self._follow()
        with self._writing:
            while True:
                try:
                    with self._env.begin(write=True) as txn:
                        return work(txn)
                except self._lmdb.MapFullError:
                    self._resize(2 * self._env.info()["map_size"])
                except self._lmdb.MapResizedError:  # another process did
                    self._resize(0)

    def _resize(self, size: int) -> None:
        with self._gate:
            self._env.set_mapsize(size)

    def _wipe(self) -> None:
        """Write zeros over all pages that are free when this begins.

        LMDB takes free pages in the order of the transactions that freed them, and those of one only after the next, if nobody
        reads the file as it was before. A few small transactions free pages that come after those to be wiped, so that to take
        a few too many does not make the file longer.
        """
        before, free, zeros = self._write(self._found)
        for _ in range(self.SETTLING):
            self._write(lambda txn: txn.put(bytes(8), b"", db=self._zeros))
        self._await_readers(before)
        end = zeros + free - 2 * self.SETTLING - free * 8 // self._page  # each took two or more; LMDB lists the free in pages
        while self._write(lambda txn: self._fill(txn, end)):
            pass
        self._write(lambda txn: txn.drop(self._zeros, delete=False))

    def _found(self, txn: lmdb.Transaction[bytes]) -> tuple[int, int, int]:
        """The last transaction, how many pages neither rows nor zeros have, and how many zeros have, as after a crash."""
        info, zeros = self._env.info(), _pages(txn.stat(self._zeros))
        return info["last_txnid"], info["last_pgno"] - 1 - _pages(self._env.stat()) - zeros, zeros

    def _fill(self, txn: lmdb.Transaction[bytes], end: int) -> bool:
        """Put zeros into the next pages, up to so many in all; returns whether some are left."""
        zeros = bytes(self._page - 16)  # as many as fit one page beside its header
        for _ in range(self.AT_ONCE):
            stat = txn.stat(self._zeros)
            if _pages(stat) >= end:
                return False
            txn.put(stat["entries"].to_bytes(8), zeros, db=self._zeros, append=True)
        return True

    def _await_readers(self, before: int) -> None:
        """Wait until nobody reads the file as it was at a transaction or before."""
        until = time.monotonic() + BUSY_SECONDS
        self._env.reader_check()  # those that were killed
        while any(int(txn) <= before for txn in re.findall(r"^ *\d+ +\w+ +(\d+)$", self._env.readers(), re.MULTILINE)):
            if time.monotonic() > until:
                found = "the user is deleted, but someone has been reading for long and keeps the old pages"
                raise BlobError(f"{self.url}: {found}; erase again")
            time.sleep(0.001)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (self._lmdb.Error, OSError, ValueError) as error:
            raise _broken(self.url, error, self.REMEDY) from None


def _pages(stat: Any) -> int:
    pages: int = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
    return pages


REDIS = ("redis", "rediss", "valkey", "valkeys")
"""How URLs of Redis and Valkey begin."""


def redis_client(url: str, seconds: float, instead: str = "") -> tuple[Any, Any]:
    """The redis package, and a client; the server may take so long to connect and to answer, unless the URL says otherwise.

    Raises SetupError: no such package (`instead`: what else can be done), or a URL that cannot be.
    """
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        remedy = f"pip install attention-recommender[redis]{instead}"
        raise SetupError(f"{hidden(url)}: redis does not load ({error}); {remedy}") from None
    again = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))  # a pooled one may be of before a restart
    try:
        plain = re.sub("^valkey", "redis", url)
        return redis, redis.Redis.from_url(plain, socket_timeout=seconds, socket_connect_timeout=seconds, retry=again)
    except ValueError as error:
        raise SetupError(f"{hidden(url)}: {error}; give redis://HOST:PORT/NUMBER") from None


class RedisBlobs:
    """In Redis or Valkey, a key a user: recsys:history: and the user's id.

    The server's own files (RDB, AOF) hold what was deleted until they are written anew, which is the operator's to do:
    BGSAVE, BGREWRITEAOF.
    """

    PREFIX = "recsys:history:"
    REMEDY = "see that the server runs, has memory and lets this user in"

    def __init__(self, url: str) -> None:
        self.url = hidden(url)
        self._redis, self._client = redis_client(url, TIMEOUT, ", or keep histories in sqlite:PATH")

    def get(self, user: str) -> bytes | None:
        with self._errors():
            found: bytes | None = self._client.get(self.PREFIX + user)
        return found

    def change(self, users: Sequence[str], change: Change) -> None:
        names = [self.PREFIX + user for user in users]
        with self._errors(), self._client.pipeline() as pipeline:
            for _ in range(TRIES):
                try:
                    pipeline.watch(*names)
                    found = zip(names, users, pipeline.mget(names), strict=True)
                    changed = {name: change(user, blob) for name, user, blob in found}
                    puts = {name: blob for name, blob in changed.items() if blob is not None}
                    if puts:
                        pipeline.multi()
                        pipeline.mset(puts)
                        pipeline.execute()
                    return
                except self._redis.WatchError:
                    pipeline.reset()
        raise BlobError(f"{self.url}: other writers came first {TRIES} times; try again")

    def delete(self, user: str) -> bool:
        with self._errors():
            return bool(self._client.delete(self.PREFIX + user))

    def walk(self) -> Iterator[tuple[str, bytes]]:
        """A part at a time; an id that is no text that UTF-8 has is empty."""
        for keys in self._keys():
            with self._errors():
                blobs = self._client.mget(keys) if keys else []
            for key, blob in zip(keys, blobs, strict=True):
                if blob is not None:
                    try:
                        yield key[len(self.PREFIX) :].decode(), blob
                    except UnicodeDecodeError:
                        yield "", blob

    def count(self) -> int:
        return sum(map(len, self._keys()))

    def _keys(self) -> Iterator[list[bytes]]:
        cursor = 0
        while True:
            with self._errors():
                cursor, keys = self._client.scan(cursor, f"{self.PREFIX}*", WALKED)
            yield keys
            if not cursor:
                return

    def check(self) -> None:
        with self._errors():
            self._client.ping()

    def close(self) -> None:
        self._client.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._redis.RedisError as error:
            raise _broken(self.url, error, self.REMEDY) from None


STORES: dict[str, Callable[[str], Blobs]] = {
    "sqlite": SqliteBlobs,
    "lmdb": LmdbBlobs,
    **dict.fromkeys(REDIS, RedisBlobs),
    "memory": MemoryBlobs,
}
"""By how their URL begins."""
