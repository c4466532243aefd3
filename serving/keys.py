"""Keys of the online API: each is shown once and kept as its SHA-256; a file that changes is read again."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
from pathlib import Path

from recsys.bundle import locked, replace_file
from recsys.errors import SetupError

BYTES = 32
"""Random bytes of a key."""


class Keys:
    """The keys of a file; safe to ask on every request."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._hashes: list[tuple[str, bytes]] = []
        self.refresh()

    def refresh(self) -> None:
        """Read the file again if it is another than before; one that is gone or broken lets nobody in.

        Raises SetupError: there is no such file, or it holds no keys.
        """
        try:
            stat = self.path.stat()
        except OSError:
            self._hashes, self._stamp = [], None
            raise SetupError(f"{self.path}: cannot be read as keys; make it with `recsys keys add NAME --keys FILE`") from None
        stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if stamp != self._stamp:
            self._hashes = []
            self._hashes = [(name, bytes.fromhex(digest)) for name, digest in read(self.path).items()]
            self._stamp = stamp

    def name(self, key: str) -> str | None:
        """Whose key it is; None: nobody's. All are compared, each in constant time."""
        try:
            self.refresh()
        except SetupError:
            return None
        digest, found = hashlib.sha256(key.encode(errors="replace")).digest(), None
        for name, known in self._hashes:
            if hmac.compare_digest(digest, known):
                found = name
        return found


def read(path: Path) -> dict[str, str]:
    """Names and hashes of a file. Raises SetupError: it cannot be read as keys."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        hashes = {str(name): str(digest) for name, digest in said["keys"].items()}
        if any(len(bytes.fromhex(digest)) != BYTES for digest in hashes.values()):
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise SetupError(f"{path}: cannot be read as keys; make it with `recsys keys add NAME --keys FILE`") from None
    return hashes


def add(path: Path, name: str) -> str:
    """Enter a new key under a name, and return it; it is kept nowhere.

    Raises SetupError: the name is taken or empty, the file holds something else or cannot be written.
    """
    if not name.strip():
        raise SetupError("a key's name is empty; give one that says whose it is")
    with locked(path):
        known = read(path) if path.exists() else {}
        if name in known:
            raise SetupError(f"{path}: has a key {name!r} already; remove it first, or give another name")
        key = secrets.token_urlsafe(BYTES)
        _write(path, {**known, name: hashlib.sha256(key.encode()).hexdigest()})
    return key


def remove(path: Path, name: str) -> None:
    """Take a key out. Raises SetupError: there is none of that name, or the file cannot be read or written."""
    with locked(path):
        known = read(path)
        if name not in known:
            raise SetupError(f"{path}: has no key {name!r}; it has {', '.join(map(repr, known)) or 'none'}")
        _write(path, {other: digest for other, digest in known.items() if other != name})


def _write(path: Path, hashes: dict[str, str]) -> None:
    """The file anew, in one step, readable by its owner alone."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)  # its mode is 0600
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"keys": hashes}, file, indent=1)
        replace_file(Path(name), path.absolute())
    except OSError as error:
        raise SetupError(f"{path}: cannot be written ({error.strerror}); give another place") from None
