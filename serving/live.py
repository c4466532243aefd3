"""Live bundles: a champion and a challenger, each replaced while requests go on, or kept where the new one fails.

A new bundle is loaded beside the old: every file checked, its golden answers compared, warmed with requests of late. Then one
attribute is assigned, so that a request which has taken `arm.recommender` once is answered by one bundle from end to end.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from features.download import cache_folder
from recsys.errors import BundleError, RecsysError, RequestError, SetupError
from recsys.tracking import Tracking, TrackingSettings
from serving.engine import Recommender
from serving.golden import GOLDEN, compare

RECORDED = 256
"""Requests that a new bundle is warmed with: a second of one core."""
AGE = 300.0
"""Seconds after which a recorded request is dropped, so that what an erased user did leaves every process."""
GRACE = 5.0
"""Seconds that closing waits for a bundle that is being loaded; its thread ends with the process anyway."""
MARK = "registered_model_meta"
"""File that MLflow writes beside a version's own each time that it loads it as a model; no part of the bundle."""
REGISTERED = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")

Tell = Callable[[str, str], None]
"""Hears of what happens: "swap" or "problem", and a line that begins with the arm's name. It must not raise."""


class Source(Protocol):
    """Where an arm's bundle comes from."""

    def current(self) -> tuple[str, Path]:
        """What changes when the bundle does, and where it lies. Raises RecsysError: that cannot be told."""
        ...


@dataclass(frozen=True)
class PathSource:
    """A directory that is replaced, or a link that is led elsewhere."""

    path: Path

    def current(self) -> tuple[str, Path]:
        """By the name, inode, size and time of every file, so that one which arrives late or is mended is seen as well."""
        try:
            with os.scandir(self.path) as entries:
                files = sorted((entry.name, entry.inode(), entry.stat()) for entry in entries if entry.name != MARK)
        except OSError as error:
            raise BundleError(f"{self.path}: cannot be read ({error.strerror}); give the directory of a bundle") from None
        told = [(name, inode, found.st_size, found.st_mtime_ns) for name, inode, found in files]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16], self.path


class RegistrySource:
    """A version of a registered model: models:/NAME@ALIAS, which may be led to another, or models:/NAME/VERSION.

    Files on this machine are read where they lie, others are downloaded into `folder`, by default that of all downloads.
    """

    def __init__(self, uri: str, tracking: str = "", folder: Path | None = None) -> None:
        match = REGISTERED.fullmatch(uri)
        if match is None:
            raise SetupError(f"{uri!r} names no registered bundle; give models:/NAME@ALIAS or models:/NAME/VERSION")
        self._name, alias, version = match.groups()
        self._word, self._folder = alias or version, folder or cache_folder() / "bundles"
        self._tracking = Tracking(TrackingSettings(uri=tracking, model=self._name))

    def current(self) -> tuple[str, Path]:
        """By the version's number and its files, as PathSource."""
        version, source = self._tracking.resolve(self._word)
        place = hashlib.sha256(f"{self._tracking.uri} {source}".encode()).hexdigest()[:16]
        path = self._tracking.fetch(source, self._folder / f"{self._name}-{version}-{place}")
        return f"{version} {PathSource(path).current()[0]}", path


def source_of(address: str, tracking: str = "") -> Source:
    """Of a registered model where the address begins with models:/, else of a path. Raises SetupError: as RegistrySource."""
    return RegistrySource(address, tracking) if address.startswith("models:/") else PathSource(Path(address))


@dataclass(frozen=True)
class Request:
    """What was asked, of nobody."""

    items: tuple[int | str, ...]
    times: tuple[int, ...] | None
    k: int


class Requests:
    """What was recorded in the last minutes, of nobody; safe to share between threads.

    Who erases a user can empty the ring of one process alone: in others the nameless histories are gone after AGE.
    """

    def __init__(self, most: int = RECORDED, clock: Callable[[], float] = time.monotonic) -> None:
        self._kept: deque[tuple[float, Request]] = deque(maxlen=most)
        self._clock, self._turn = clock, threading.Lock()

    def record(self, items: Sequence[int | str], times: Sequence[int] | None, k: int) -> None:
        request = Request(tuple(items), None if times is None else tuple(times), k)
        with self._turn:
            self._kept.append((self._clock(), request))

    def forget(self) -> None:
        """Keep none of them."""
        with self._turn:
            self._kept.clear()

    def drop(self) -> None:
        """Keep none of them that is older than AGE."""
        with self._turn:
            while self._kept and self._clock() - self._kept[0][0] > AGE:
                self._kept.popleft()

    @property
    def kept(self) -> list[Request]:
        """Oldest first."""
        self.drop()
        return [request for _, request in self._kept.copy()]


def load(path: Path) -> Recommender:
    """A bundle or run whose files are whole and whose golden answers are its answers. Raises BundleError: else."""
    recommender = Recommender.load(path, threads=1).complete()
    if recommender.manifest["kind"] == "bundle":
        compare(recommender, recommender.path / GOLDEN)
    return recommender


def warm(recommender: Recommender, requests: Iterable[Request]) -> None:
    """Answer once, and each of the requests."""
    recommender.answer(["?"], 1, times=[0], ignore_unknown=True)
    for request in requests:
        try:
            recommender.answer(
                request.items, request.k, times=request.times, ignore_unknown=True, find=recommender.catalogue.by_id
            )
        except RequestError:  # the old bundle had an answer, this one may need times
            continue


class Arm:
    """A bundle that is live, and where the next one comes from.

    Raises RecsysError: the first bundle cannot be loaded.
    """

    def __init__(self, name: str, source: Source, requests: Requests | None = None, on_event: Tell | None = None) -> None:
        self.name, self._source, self._requests, self._tell = name, source, requests or Requests(), on_event
        self._turn = threading.Lock()
        self._failed = ""
        self._identity, path = source.current()
        self.recommender: Recommender = self._prepared(self._identity, path)
        self.since: int = int(time.time())
        """Second since 1970 from which on the present bundle answers."""
        self.problem: str | None = None
        """Why what the source names is not live, in one line."""
        self.swaps: int = 0

    def refresh(self, force: bool = False) -> bool:
        """Whether another bundle is live now: what the source names, if it is not the present one and nothing is wrong with it.

        What failed is tried again when it changes, or with `force`, which also loads the present one anew. Raises nothing.
        """
        with self._turn:
            identity = ""
            try:
                identity, path = self._source.current()
                if not force and identity == self._failed:
                    return False
                if not force and identity == self._identity:
                    self._failed, self.problem = "", None
                    return False
                fresh = self._prepared(identity, path)
            except Exception as error:  # whatever is wrong with the new one, the old one answers
                self._failed = identity or self._failed
                told, self.problem = self.problem, _line(error)
                if told != self.problem:
                    self._say("problem", self.problem)
                return False
            self.recommender = fresh
            self._identity, self._failed, self.problem = identity, "", None
            self.since, self.swaps = int(time.time()), self.swaps + 1
            self._say("swap", f"bundle {fresh.id} is live")
            return True

    def _prepared(self, identity: str, path: Path) -> Recommender:
        recommender = load(path)
        warm(recommender, self._requests.kept)
        if self._source.current()[0] != identity:  # its parts may be of two bundles
            raise BundleError(f"{path}: changed while it was loaded; it is loaded again")
        recommender.forget()  # what it was warmed with may be of who is erased next
        return recommender

    def _say(self, kind: str, detail: str) -> None:
        if self._tell is not None:
            self._tell(kind, f"{self.name}: {detail}")


class Arms:
    """The champion, which answers, and a challenger that answers a share of the users.

    Raises RecsysError: the first bundle of either cannot be loaded, or the share is none.
    """

    def __init__(
        self,
        champion: Source,
        challenger: Source | None = None,
        share: float = 0.0,
        salt: str = "",
        on_event: Tell | None = None,
    ) -> None:
        if not 0 <= share <= 1:
            raise SetupError(f"the challenger's share is {share}; give a number from 0 to 1")
        if share and challenger is None:
            raise SetupError(f"a share of {share} is given without a challenger; name its bundle")
        self.share, self.salt = share, salt
        self.requests = Requests()
        self.champion = Arm("champion", champion, self.requests, on_event)
        self.challenger = None if challenger is None else Arm("challenger", challenger, self.requests, on_event)
        self._stopped = threading.Event()
        self._watcher: threading.Thread | None = None

    @property
    def all(self) -> list[Arm]:
        return [self.champion] if self.challenger is None else [self.champion, self.challenger]

    def of(self, user_id: str | None) -> Arm:
        """Whose list the user gets: always the same arm's with one salt, and with a larger share the challenger's still.

        Who has no id gets the champion's.
        """
        if self.challenger is None or user_id is None:
            return self.champion
        place = xxhash.xxh64_intdigest(f"{self.salt}{user_id}".encode("utf-8", "surrogatepass"))
        return self.challenger if place < self.share * 2**64 else self.champion

    def named(self, name: str) -> Arm:
        """The arm that a request asks for. Raises RequestError: there is none of this name."""
        for arm in self.all:
            if arm.name == name:
                return arm
        raise RequestError(f"no arm {name!r}; ask for {' or '.join(arm.name for arm in self.all)}")

    def watch(self, seconds: float) -> None:
        """From now on refresh both, each time after so many seconds, in a thread of its own."""
        self._watcher = threading.Thread(target=self._refresh, args=(seconds,), name="bundles", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Watch no longer; twice does no harm."""
        self._stopped.set()
        if self._watcher is not None:
            self._watcher.join(GRACE)

    def _refresh(self, seconds: float) -> None:
        while not self._stopped.wait(seconds):
            self.requests.drop()
            for arm in self.all:
                arm.refresh()


def _line(error: Exception) -> str:
    """An error in one line."""
    first = next(iter(str(error).splitlines()), "")
    return first if isinstance(error, RecsysError) else f"it cannot be loaded ({type(error).__name__}: {first})"
