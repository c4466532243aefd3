"""Fetch a published file once: to a temporary file, checked by size and SHA-256, then renamed into its folder."""

from __future__ import annotations

import http.client
import os
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import unquote_plus, urlsplit

from recsys.bundle import sha256
from recsys.errors import DataError, SetupError
from recsys.progress import Progress
from recsys.version import __version__

ATTEMPTS = 4
TIMEOUT = 30.0
"""Seconds without a byte after which an attempt counts as broken."""
CHUNK = 1 << 20
_CHANGED = "the publisher may have changed {}: read an earlier copy from a folder"


@dataclass(frozen=True)
class Published:
    """A file as its publisher offers it."""

    url: str
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        return unquote_plus(urlsplit(self.url).path.rsplit("/", 1)[-1])


def cache_folder() -> Path:
    """Where downloads are kept: `RECSYS_CACHE`, or ~/.cache/recsys."""
    return Path(os.environ.get("RECSYS_CACHE") or Path.home() / ".cache" / "recsys")


def fetch(file: Published, folder: Path, progress: Progress | None = None, pause: float = 1.0) -> Path:
    """The file in `folder`; downloaded if it is not there, else checked without any request.

    A broken transfer is resumed, after `pause` seconds, twice as long each time; another process may fetch the same file.
    Raises DataError: size or checksum is not the published one. SetupError: the publisher cannot be reached.
    """
    path = folder / file.name
    if path.exists():
        _check(path, file, f"delete {path} to download it again")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{file.name}.", suffix=".part")
    try:
        with open(handle, "w+b") as part:
            _transfer(file, part, progress or (lambda name, done, total: None), pause)
        _check(Path(temporary), file, _CHANGED.format(file.url))
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _check(path: Path, file: Published, remedy: str) -> None:
    if (size := path.stat().st_size) != file.bytes:
        raise DataError(f"{file.name}: {size:,} bytes found, {file.bytes:,} published; {remedy}")
    if (found := sha256(path)) != file.sha256:
        raise DataError(f"{file.name}: SHA-256 {found} found, {file.sha256} published; {remedy}")


def _transfer(file: Published, part: IO[bytes], progress: Progress, pause: float) -> None:
    """Fill `part` to the published size or beyond."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            if _receive(file, part, progress):
                return
            reason = f"the connection ended after {part.tell():,} of {file.bytes:,} bytes"
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = str(getattr(error, "reason", None) or error or type(error).__name__)
    raise SetupError(f"cannot download {file.url}: {reason}; try again, or download it by hand and name its folder as the data")


def _receive(file: Published, part: IO[bytes], progress: Progress) -> bool:
    """One request, continuing at the place that `part` stands at; False if the body ended early."""
    start = part.tell()
    request = urllib.request.Request(file.url, headers={"User-Agent": f"recsys/{__version__}"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != 206:  # the server sends the whole file
            start = part.seek(0)
        part.truncate()
        length = response.headers.get("Content-Length")
        if length and start + int(length) != file.bytes:
            raise DataError(
                f"{file.name}: {start + int(length):,} bytes offered, {file.bytes:,} published; {_CHANGED.format(file.url)}"
            )
        while part.tell() <= file.bytes and (chunk := response.read(CHUNK)):
            part.write(chunk)
            progress(file.name, part.tell(), file.bytes)
    return part.tell() >= file.bytes
