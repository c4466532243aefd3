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
from typing import Any, Protocol
from urllib.parse import quote

from recsys.errors import RequestError, SetupError, StoreError

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
COMMAND = r"^Command # \d+ \(.*\) of pipeline caused error: "
"""Stands before what Redis says, and names the user."""
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


def broken(url: str, found: object, remedy: str) -> StoreError:
    kind = BlobError if isinstance(found, _Foreign) else StoreError
    return kind(f"{url}: {' '.join(str(found).split()) or type(found).__name__}; {remedy}")


def digest_of(user: str) -> bytes:
    return blake2b(user.encode(), digest_size=DIGEST).digest()


def framed(user: str, digest: bytes, blob: bytes, front: int = 0) -> bytes:
    """A blob as files hold it, behind so many zeros; any number may follow."""
    name = user.encode()
    return b"".join((bytes(front), digest, len(blob).to_bytes(LENGTH), blob, len(name).to_bytes(NAME), name))


def unframed(digest: bytes, row: bytes | None, front: int = 0) -> memoryview | None:
    """The blob of a row. Raises _Foreign: it is another user's, whose digest begins alike."""
    if row is None:
        return None
    start = front + DIGEST + LENGTH
    if row[front : front + DIGEST] != digest:
        raise _Foreign("a row is not of the user whose key it has")
    return memoryview(row)[start : start + int.from_bytes(row[front + DIGEST : start])]


def named(row: bytes, front: int = 0) -> tuple[str, memoryview]:
    """The user's id that a row holds, empty where an earlier version wrote none, and the blob."""
    digest = row[front : front + DIGEST]
    blob = unframed(digest, row, front)
    assert blob is not None  # for there is a row
    start = front + DIGEST + LENGTH + len(blob) + NAME
    user = row[start : start + int.from_bytes(row[start - NAME : start])].decode(errors="replace")
    return user if digest_of(user) == digest else "", blob


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
            found = self._blobs.copy()
        yield from found.items()

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
            raise broken(self.url, error, self.REMEDY) from None

    def get(self, user: str) -> memoryview | None:
        with self._connection() as connection:
            return self._read(connection, digest_of(user))

    def change(self, users: Sequence[str], change: Change) -> None:
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            rows = []
            for user in users:
                digest = digest_of(user)
                found = self._read(connection, digest)
                blob = change(user, None if found is None else bytes(found))
                if blob is not None:
                    rows.append((_key(digest), self._filled(framed(user, digest, blob, self.FRONT))))
            put = "INSERT INTO histories VALUES (?, ?) ON CONFLICT (user) DO UPDATE SET events = excluded.events"
            connection.executemany(put, rows)
            connection.execute("COMMIT")

    def delete(self, user: str) -> bool:
        with self._connection() as connection:
            found = connection.execute("DELETE FROM histories WHERE user = ?", (_key(digest_of(user)),)).rowcount > 0
            until = time.monotonic() + BUSY_SECONDS
            while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:  # which waits for readers alone
                if time.monotonic() > until:
                    kept = "the user is deleted, but someone has been reading for long and keeps the old bytes in the -wal"
                    raise BlobError(f"{self.url}: {kept}; erase again")
                time.sleep(0.01)
            return found

    def walk(self) -> Iterator[tuple[str, memoryview]]:
        """A part at a time, between which others may write and erase."""
        part, start = f"SELECT user, events FROM histories WHERE user >= ? ORDER BY user LIMIT {WALKED}", -(2**63)
        while start < 2**63:
            with self._connection() as connection:
                rows = connection.execute(part, (start,)).fetchall()
                found = [named(row, self.FRONT) for _, row in rows]
            yield from found
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
        return unframed(digest, found[0][0] if found else None, self.FRONT)

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
                raise broken(self.url, error, self.REMEDY) from None
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


REDIS = ("redis", "rediss", "valkey", "valkeys")
"""How URLs of Redis and Valkey begin."""


class RedisServer:
    """A connection to Redis or Valkey; safe to share between threads."""

    def __init__(self, url: str, seconds: float, instead: str = "") -> None:
        """The server may take so long to connect and to answer, unless the URL says otherwise.

        Raises SetupError: no redis package (`instead`: what else can be done), or a URL that cannot be.
        """
        self.url = hidden(url)
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            remedy = f"pip install attention-recommender[redis]{instead}"
            raise SetupError(f"{self.url}: redis does not load ({error}); {remedy}") from None
        self._redis: Any = redis
        again = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))  # a pooled one may be of before a restart
        waits = {"socket_timeout": seconds, "socket_connect_timeout": seconds, "retry": again}
        try:
            self.client: Any = redis.Redis.from_url(re.sub("^valkey", "redis", url), **waits)
        except ValueError as error:
            raise SetupError(f"{self.url}: {error}; give redis://HOST:PORT/NUMBER") from None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What the server says against it, as StoreError."""
        try:
            yield
        except self._redis.RedisError as error:
            said = re.sub(COMMAND, "", str(error), flags=re.DOTALL) or type(error).__name__
            raise broken(self.url, said, "see that the server runs, has memory and lets this user in") from None

    def changed(self, watched: Sequence[str], change: Callable[[Any], None], late: StoreError) -> None:
        """Do what `change` queues behind its looks, unless a watched key changes in between: then all of it anew.

        Raises `late`: that happened too often.
        """
        with self.errors(), self.client.pipeline() as pipeline:
            for _ in range(TRIES):
                try:
                    pipeline.watch(*watched)
                    change(pipeline)
                    pipeline.execute()
                    return
                except self._redis.WatchError:
                    pipeline.reset()
        raise late

    def parts(self, prefix: str) -> Iterator[list[bytes]]:
        """All keys that begin so, some at a time; one may come twice."""
        found = self.client.scan_iter(f"{prefix}*", WALKED)
        with self.errors():
            while keys := list(islice(found, WALKED)):
                yield keys

    def close(self) -> None:
        self.client.close()


class RedisBlobs(RedisServer):
    """In Redis or Valkey, a key a user: recsys:history: and the user's id.

    The server's own files (RDB, AOF) hold what was deleted until they are written anew, which is the operator's to do:
    BGSAVE, BGREWRITEAOF.
    """

    PREFIX = "recsys:history:"

    def __init__(self, url: str) -> None:
        super().__init__(url, TIMEOUT, ", or keep histories in sqlite:PATH")

    def get(self, user: str) -> bytes | None:
        with self.errors():
            found: bytes | None = self.client.get(self.PREFIX + user)
        return found

    def change(self, users: Sequence[str], change: Change) -> None:
        names = [self.PREFIX + user for user in users]

        def put(pipeline: Any) -> None:
            found = zip(names, users, pipeline.mget(names), strict=True)
            changed = {name: change(user, blob) for name, user, blob in found}
            puts = {name: blob for name, blob in changed.items() if blob is not None}
            pipeline.multi()
            if puts:
                pipeline.mset(puts)

        self.changed(names, put, BlobError(f"{self.url}: other writers came first {TRIES} times; try again"))

    def delete(self, user: str) -> bool:
        with self.errors():
            return bool(self.client.delete(self.PREFIX + user))

    def walk(self) -> Iterator[tuple[str, bytes]]:
        """A part at a time; an id that is no text that UTF-8 has is empty."""
        for keys in self.parts(self.PREFIX):
            with self.errors():
                blobs = self.client.mget(keys)
            for key, blob in zip(keys, blobs, strict=True):
                if blob is not None:
                    try:
                        yield key[len(self.PREFIX) :].decode(), blob
                    except UnicodeDecodeError:
                        yield "", blob

    def count(self) -> int:
        return sum(map(len, self.parts(self.PREFIX)))

    def check(self) -> None:
        with self.errors():
            self.client.ping()
