"""The store's blobs in LMDB, in pages that are wiped when they are freed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from recsys.errors import SetupError
from serving import stores
from serving.stores import BlobError, Change, File

if TYPE_CHECKING:
    import lmdb

T = TypeVar("T")


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
        digest = stores.digest_of(user)
        return self._read(lambda txn: stores.unframed(digest, txn.get(digest)))

    def change(self, users: Sequence[str], change: Change) -> None:
        def work(txn: lmdb.Transaction[bytes]) -> None:
            for user in users:
                digest = stores.digest_of(user)
                found = stores.unframed(digest, txn.get(digest))
                blob = change(user, None if found is None else bytes(found))
                if blob is not None:
                    txn.put(digest, stores.framed(user, digest, blob).ljust(self._page, b"\0"))

        with self._errors():
            self._write(work)

    def delete(self, user: str) -> bool:
        with self._errors():
            found = self._write(lambda txn: txn.delete(stores.digest_of(user)))
            self._wipe()
            return found

    def walk(self) -> Iterator[tuple[str, memoryview]]:
        """A part at a time, between which others may write and erase."""
        start = bytes(1)

        def part(txn: lmdb.Transaction[bytes]) -> list[tuple[bytes, bytes]]:
            with txn.cursor() as cursor:
                return list(islice(cursor, stores.WALKED)) if cursor.set_range(start) else []

        while rows := self._read(part):
            yield from (stores.named(row) for key, row in rows if len(key) == stores.DIGEST)  # the zeros have a row too
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
        until = time.monotonic() + stores.BUSY_SECONDS
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
            raise stores.broken(self.url, error, self.REMEDY) from None


def _pages(stat: Any) -> int:
    pages: int = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
    return pages
