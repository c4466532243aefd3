"""The folder of nightly lists: nights that are whole, a link to the one that is live, and the one in the making.

lists/live → nights/20261122T030000.000000Z      swapped in one step; who follows it once sees one night to its end
lists/nights/NAME/manifest.json                  written last: a folder without it is no night
lists/nights/NAME/lists-00000.parquet            user_id, item_id, rank (from 1), score; sorted by user and rank
lists/nights/NAME/users-00000.parquet            user_id, history (what the list was made of, as a hash), source
lists/unfinished/                                the night in the making, or what a kill left of it
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from recsys.bundle import MANIFEST, entry, flush, locked, open_directory, replace_directory, seal, told
from recsys.errors import DataError, RecsysError
from serving.tables import SOURCES, write_table

if TYPE_CHECKING:
    import polars as pl

LIVE, NIGHTS, UNFINISHED = "live", "nights", "unfinished"
NEXT = f".{LIVE}.new"
"""The link that is to take the place of the live one; it is left where a kill came between."""
PLAN = "plan.json"
"""In the folder of a night in the making: what it is to be."""
REFUSED = "refused.json"
"""In the folder of a night that its guards kept from going live: its manifest."""
ERASING, ERASED = "erasing", "erased"
"""The folder of nights without a user that is being erased; the file of digests that a night in the making leaves out."""


def shard_of(user_id: int | str, shards: int) -> int:
    """The shard of a user, whose id counts as text: the same on every machine and in every version."""
    return xxhash.xxh3_64_intdigest(str(user_id).encode()) % shards


def lists_file(shard: int) -> str:
    return f"lists-{shard:05}.parquet"


def users_file(shard: int) -> str:
    return f"users-{shard:05}.parquet"


def erased_digest(user_id: str) -> str:
    """What stands for an erased user, whose id is noted nowhere; its first 16 digits tell the shard."""
    name = user_id.encode()
    return f"{xxhash.xxh3_64_hexdigest(name)}{blake2b(name, digest_size=16).hexdigest()}"


def without(work: Path, shards: int, digests: set[str], k: int) -> dict[int, dict[str, int]]:
    """Take the users of these digests out of the shards in a folder; returns what each shard lost that lost any: counts.

    Raises DataError: a shard cannot be read. RecsysError: it cannot be written.
    """

    def gone(user_ids: pl.Series) -> list[bool]:
        return [erased_digest(user_id) in digests for user_id in user_ids]

    theirs = {int(digest[:16], 16) % shards for digest in digests}
    lost = {shard: _taken_out(work, work, shard, gone, k) for shard in sorted(theirs)}
    return {shard: counts for shard, counts in lost.items() if counts}


@dataclass(frozen=True)
class Night:
    """A whole night; its files never change, and stay until two later ones are live.

    When a user is erased, another night without the user takes its place, under the same name and with another id.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path, verify: bool = False) -> Night:
        """A night by its folder, or the live one by the folder of all; with `verify`, every file's hash is checked.

        Raises DataError: there is none, or it is not whole.
        """
        there = path / LIVE if (path / LIVE).is_symlink() else path
        found = open_directory(there.resolve(), verify, MANIFEST, DataError)
        if found.manifest.get("kind") != "night":
            raise DataError(f"{path}: holds no nightly lists; give the folder that `recsys nightly` wrote")
        return cls(found.path, found.manifest)

    @property
    def id(self) -> str:
        return str(self.manifest["id"])

    @property
    def shards(self) -> int:
        return int(self.manifest["shards"])

    def lists(self, shard: int) -> Path:
        return self.path / lists_file(shard)


class Nights:
    """The folder of all nights; one process at a time makes one."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.work = self.path / UNFINISHED

    def live(self) -> Night | None:
        """The night that readers see; None before the first. Raises DataError: it is not whole, or no longer there."""
        link = self.path / LIVE
        if link.is_symlink() and not link.exists():
            found = f"names {os.readlink(link)}, which is not there"
            raise DataError(f"{link}: {found}; let it name a folder of {self.path / NIGHTS}, or delete the link")
        return Night.open(self.path) if link.is_symlink() else None

    def refused(self) -> dict[str, Any]:
        """What there is to say of the night that its guards kept from going live."""
        found: dict[str, Any] = json.loads((self.work / REFUSED).read_text())
        return found

    def night(self, name: str) -> Path:
        """Folder of a night."""
        return self.path / NIGHTS / name

    @contextmanager
    def making(self) -> Iterator[None]:
        """Meanwhile no other process makes a night here. Raises RecsysError: one does, or nothing can be written."""
        try:
            (self.path / NIGHTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecsysError(f"{self.path}: cannot be written ({error.strerror}); give another place") from None
        with locked(self.path / UNFINISHED, wait=False):
            yield

    def publish(self, files: Mapping[str, dict[str, Any]], manifest: Mapping[str, Any], keep: int) -> Night:
        """Make a night of these files in the work folder, make it live, and delete all but the last `keep`.

        Users that were erased meanwhile are left out, and what the manifest counts of them.
        """
        with locked(self.path / LIVE):
            entries, said = dict(files), {"kind": "night", **manifest}
            for shard, lost in without(self.work, said["shards"], self.unwanted(), said["terms"]["k"]).items():
                entries |= {name: entry(self.work / name) for name in (lists_file(shard), users_file(shard))}
                said = _less(said, shard, lost)
            seal(self.work, entries, said)
            return self._settled(keep)

    def finish(self, keep: int) -> Night | None:
        """Make live what was sealed, or was to be live, when a kill came between; None where nothing was.

        A night that was live does not come back: which one is seen since then stays.
        """
        with locked(self.path / LIVE):
            there = (self.work / MANIFEST).is_file() or self._named(NEXT) in self._names()
            return self._settled(keep) if there else None

    def _settled(self, keep: int) -> Night:
        """Go on from the sealed work folder, or from the night that is to be live."""
        self._mend()
        before = self._named(LIVE)
        if (self.work / MANIFEST).is_file():
            self._tidy()
            name = self._name()
            self._announce(name)
            os.rename(self.work, self.path / NIGHTS / name)
            flush(self.path / NIGHTS)
        os.replace(self.path / NEXT, self.path / LIVE)  # readers see now what was announced
        flush(self.path)
        self._sweep(keep, before)
        return Night.open(self.path)

    def erase(self, user_id: str) -> bool:
        """Take a user out of every night, each as a whole or not at all; returns whether one held the user.

        Out of a night in the making, whose folder holds histories until it is published, the user is left then; one that
        nobody is making is deleted. Where lists were delivered to, they stay.
        Raises DataError: a night is not whole. RecsysError: nothing can be written.
        """
        with locked(self.path / LIVE):
            try:
                self._mend()
                self._forbid(user_id)
                found = [self._rewrite(folder.name, user_id) for folder in self._folders()]
                self._mend()
                return any(found)
            except OSError as error:
                raise RecsysError(f"{self.path}: cannot be written ({error.strerror}); erase again") from None

    def unwanted(self) -> set[str]:
        """Digests of the users that were erased since the night in the making was begun."""
        try:
            return set((self.work / ERASED).read_text().split())
        except FileNotFoundError:
            return set()

    def _forbid(self, user_id: str) -> None:
        """Let the night in the making not hold a user."""
        try:
            with self.making():
                if self.work.exists():
                    _delete(self.work)
        except RecsysError:  # one is being made
            with suppress(FileNotFoundError):  # it has read nobody yet
                with (self.work / ERASED).open("a") as file:
                    file.write(f"{erased_digest(user_id)}\n")
                flush(self.work / ERASED)
                (self.work / MANIFEST).unlink(missing_ok=True)  # sealed, with the user, before a kill: it is sealed anew
                flush(self.work)

    def _rewrite(self, name: str, user_id: str) -> bool:
        """Put a night without the user in the place of one; returns whether the user was there."""
        night, fresh = Night.open(self.path / NIGHTS / name), self.path / ERASING / name
        shard, said = shard_of(user_id, night.shards), night.manifest
        lost = _taken_out(night.path, fresh, shard, lambda user_ids: user_ids == user_id, said["terms"]["k"])
        if not lost:
            return False
        changed = (lists_file(shard), users_file(shard))
        for file in said["files"].keys() - set(changed):
            try:
                os.link(night.path / file, fresh / file)
            except OSError:  # a file system without links
                shutil.copyfile(night.path / file, fresh / file)
                flush(fresh / file)
        seal(fresh, said["files"] | {file: entry(fresh / file) for file in changed}, _less(told(said), shard, lost))
        replace_directory(fresh, night.path)
        return True

    def _mend(self) -> None:
        """End what an erasure or a deletion that was killed began; the night that readers see is never deleted."""
        for fresh in (self.path / ERASING).glob("*"):
            place = self.path / NIGHTS / fresh.name
            if (fresh / MANIFEST).is_file() and not place.exists():  # killed where two names cannot be exchanged in one step
                os.rename(fresh, place)
        torn = [folder for folder in self._folders() if folder.name != self._named(LIVE) and _torn(folder)]
        for left in (self.path / ERASING, *torn):
            if left.exists():
                shutil.rmtree(left)

    def _tidy(self) -> None:
        """Leave only what the manifest names in the sealed work folder."""
        kept = {MANIFEST, *open_directory(self.work, verify=False).manifest["files"]}
        for found in self.work.iterdir():
            if found.is_dir():
                shutil.rmtree(found)
            elif found.name not in kept:
                found.unlink()

    def _announce(self, name: str) -> None:
        """Note which night is to be live; it need not be there yet."""
        link = self.path / NEXT
        link.unlink(missing_ok=True)
        link.symlink_to(Path(NIGHTS) / name)
        flush(self.path)

    def _name(self) -> str:
        """Of a new night, behind that of every other."""
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        latest = max(self._names(), default="")
        return moment if moment > latest else f"{latest}+"  # the clock went back

    def _names(self) -> list[str]:
        """The whole nights, the earliest first."""
        return sorted(found.parent.name for found in (self.path / NIGHTS).glob(f"*/{MANIFEST}"))

    def _folders(self) -> list[Path]:
        """Of nights, whole or not, the earliest first."""
        return sorted(found for found in (self.path / NIGHTS).glob("*") if found.is_dir() and not found.is_symlink())

    def _named(self, link: str) -> str:
        """The night that a link names; empty where there is no such link."""
        path = self.path / link
        return Path(os.readlink(path)).name if path.is_symlink() else ""

    def _sweep(self, keep: int, before: str) -> None:
        """Delete all nights but so many: the live one, the one `before` it, which readers may still be at, and the latest."""
        live = self._named(LIVE)
        for name in sorted(self._names(), key=lambda name: (name == live, name == before, name))[:-keep]:
            _delete(self.path / NIGHTS / name)


def _delete(folder: Path) -> None:
    """Delete a night, or one in the making; what a kill leaves of it is none, for its manifest goes first."""
    (folder / MANIFEST).unlink(missing_ok=True)
    flush(folder)
    shutil.rmtree(folder)


def _torn(folder: Path) -> bool:
    """Whether a folder has no manifest, or lacks a file that this one names."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return True
    except (ValueError, KeyError, TypeError):  # which whoever opens it is told
        return False
    return not all((folder / file).is_file() for file in files)


def _taken_out(
    source: Path, target: Path, shard: int, gone: Callable[[pl.Series], pl.Series | list[bool]], k: int
) -> dict[str, int]:
    """Write a shard into another folder, or anew, without the users whose ids, as text, are gone; returns what it lost.

    Nothing is written where nobody goes.
    """
    import polars as pl

    names = (users_file(shard), lists_file(shard))
    try:
        users = pl.read_parquet(source / names[0])
        leaving = users.filter(gone(users["user_id"].cast(pl.String)))
        if leaving.is_empty():
            return {}
        lists = pl.read_parquet(source / names[1])
        said = [pl.read_parquet_metadata(source / name) for name in names]
    except (pl.exceptions.PolarsError, OSError):
        raise DataError(f"{source}: shard {shard} cannot be read as lists; make the night again") from None
    for name, table, metadata in zip(names, (users, lists), said, strict=True):
        left = table.join(leaving, on="user_id", how="anti", maintain_order="left")
        own = {key: value for key, value in metadata.items() if key != "ARROW:schema"}
        write_table(left, target / name, own)
    lengths = lists.join(leaving, on="user_id", how="semi").group_by("user_id").len()["len"]
    return {
        "users": len(leaving),
        "rows": int(lengths.sum()),
        "listed": len(lengths),
        "underfilled": len(leaving) - int((lengths >= k).sum()),
        "popular": int((leaving["source"] == SOURCES.index("popularity")).sum()),
    }


def _less(manifest: dict[str, Any], shard: int, lost: Mapping[str, int]) -> dict[str, Any]:
    """The manifest of a night whose shard has lost users."""

    def counted(counts: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value - lost.get(name, 0) if name in lost else value for name, value in counts.items()}

    parts = [counted(part) if place == shard else part for place, part in enumerate(manifest["parts"])]
    return {**counted(manifest), "parts": parts}
