"""Directories that are published whole or not at all: data sets, runs and bundles, each file with its SHA-256."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from recsys.errors import BundleError, RecsysError
from recsys.version import __version__

FORMAT = 5
"""Version of the layout; a reader refuses any other."""
MANIFEST = "manifest.json"
MODEL = "model"
"""In a run, the directory of what serving reads."""

Writer = Callable[[Path], object]


@dataclass(frozen=True)
class Directory:
    """A published directory whose files are as its manifest says."""

    path: Path
    manifest: dict[str, Any]


def publish(path: Path, writers: Mapping[str, Writer], manifest: Mapping[str, Any], name: str = MANIFEST) -> Directory:
    """Write every file and the manifest `name` beside `path`, flush them to disk, then rename; an older `path` is replaced.

    A reader sees the old directory or the new one, never a part. Raises RecsysError: `path` exists and is no published
    directory, or cannot be written.
    """
    path = path.absolute()
    if not is_free(path, name):
        raise RecsysError(f"{path}: exists and holds no {name}, so it is not replaced; give another place")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise RecsysError(f"{path}: cannot be written ({error.strerror}); give another place") from None
    try:
        temporary.chmod(0o755)
        for file, write in writers.items():
            write(temporary / file)
            (temporary / file).chmod(0o644)  # some writers make files for their owner alone; another account may serve
        for file in writers:
            flush(temporary / file)
        content = seal(temporary, {file: entry(temporary / file) for file in writers}, manifest, name)
        replace_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Directory(path, content)


def is_free(path: Path, mark: str) -> bool:
    """Whether a place may be written: nothing is there, nothing in it, or what the file `mark` makes known."""
    return not path.exists() or (path / mark).is_file() or (path.is_dir() and not any(path.iterdir()))


def claim(out: Path, mark: str, what: str, content: str = "") -> None:
    """Make `out` the folder of a job, known by the file `mark`; raises RecsysError where it holds anything else."""
    if not is_free(out, mark):
        raise RecsysError(f"{out}: exists and is no earlier {what}; give another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / mark, content.encode())
    except OSError as error:
        raise RecsysError(f"{out}: cannot be made ({error.strerror}); give another folder with --out") from None


def model_of(path: Path) -> Path:
    """The directory of the model in a run; a bundle's, or a model's, is the path itself."""
    return path / MODEL if (path / MODEL / MANIFEST).is_file() else path


def told(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says, without what publishing adds to it."""
    return {key: value for key, value in manifest.items() if key not in ("format", "files", "hash", "id")}


def entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def seal(
    folder: Path, files: Mapping[str, dict[str, Any]], manifest: Mapping[str, Any], name: str = MANIFEST
) -> dict[str, Any]:
    """Write the manifest of a folder whose files are on disk, each with its `entry`; returns it with hash and id."""
    content = {"format": FORMAT, **manifest, "files": dict(files), "hash": files_hash(files)}
    content["id"] = identity(content)
    write_file(folder / name, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return content


def renew(old: Directory, path: Path, writers: Mapping[str, Writer], changes: Mapping[str, Any]) -> Directory:
    """Publish a directory anew with other files or another manifest; `before` names the old one.

    What `writers` do not make is copied, what `changes` do not name stays as it is, and what they say is None goes; of `clock`
    likewise.
    """
    said = told(old.manifest)
    clock = {**said["clock"], **changes.get("clock", {}), "created": datetime.now(UTC).isoformat(timespec="seconds")}
    said = {**said, **changes, "version": __version__, "before": old.manifest["id"], "clock": clock}
    kept = {file: partial(shutil.copyfile, old.path / file) for file in old.manifest["files"]}
    return publish(path, {**kept, **writers}, {key: value for key, value in said.items() if value is not None})


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Meanwhile no other process on this machine is in here for the same `path`; it waits for its turn, or does not.

    Raises RecsysError: nothing can be written beside `path`; or, where it is not to wait, another one is in here.
    """
    import fcntl

    path = path.absolute()
    try:
        file = path.with_name(f".{path.name}.lock").open("w")
    except OSError as error:
        raise RecsysError(f"{path.parent}: cannot be written ({error.strerror}); give another place") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))  # ends with the process, however that ends
        except BlockingIOError:
            raise RecsysError(f"{path}: another process is at it; wait for its end, or stop it") from None
        yield


def open_directory(path: Path, verify: bool = True, name: str = MANIFEST, error: type[RecsysError] = BundleError) -> Directory:
    """Read the manifest and, with `verify`, check the size and SHA-256 of every file.

    Raises `error`: no manifest, another format, or a file that is missing or altered.
    """
    if not (path / name).is_file():
        there = "give a directory that `recsys` wrote" if path.is_dir() else "there is no such directory"
        raise error(f"{path}: no {name} there; {there}")
    try:
        manifest = json.loads((path / name).read_text(encoding="utf-8"))
        found = manifest["format"]
        files = {file: (entry["sha256"], entry["bytes"]) for file, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise error(f"{path / name}: cannot be read as a manifest; write the directory again") from None
    if found != FORMAT:
        raise error(f"{path}: format {found!r}, this version reads {FORMAT}; write it again with this version")
    if verify and manifest.get("id") != identity(manifest):
        raise error(
            f"{path / name}: is not the manifest that was written (its id differs); restore it or write the directory again"
        )
    for file, wanted in files.items():
        part = path / file
        if not part.is_file():
            raise error(f"{part}: named in {name} and missing; restore the file or write the directory again")
        if verify and wanted != (sha256(part), part.stat().st_size):
            raise error(f"{part}: is not the file that was written (SHA-256 differs); restore it or write the directory again")
    return Directory(path, manifest)


def write_file(path: Path, content: bytes) -> None:
    """Replace one file atomically, flushed to disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    replace_file(temporary, path)


def replace_file(temporary: Path, path: Path) -> None:
    """Flush a finished file to disk and give it its name, in one step."""
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(manifest: Mapping[str, Any]) -> str:
    """The id of a directory: a hash of all that its manifest says but when, and so of every file and setting."""
    said = {key: value for key, value in manifest.items() if key not in ("clock", "id")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def files_hash(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The hash of a directory: of the names and the SHA-256 of its files."""
    lines = "".join(f"{file} {files[file]['sha256']}\n" for file in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def replace_directory(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`, in one step where the system can exchange two names; then delete the old."""
    if not path.exists():
        os.rename(new, path)
    elif _exchange(new, path):
        shutil.rmtree(new)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        os.rename(path, aside / path.name)
        os.rename(new, path)
        shutil.rmtree(aside)
    flush(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux renameat2); False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(-100, bytes(one), -100, bytes(other), 2) == 0  # AT_FDCWD twice, RENAME_EXCHANGE


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
