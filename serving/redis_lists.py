"""Nightly lists in Redis or Valkey: a night's keys, the one that says which night is live, and who was erased.

recsys:lists:live              name of the live night: its manifest's id
recsys:lists:before            that of the night that was live before it, whose keys stay for who is reading them
recsys:lists:nights            hash: night → the delivery that writes or wrote it
recsys:lists:erased            sorted set: digest of an erased user → second since 1970
recsys:lists:night:NIGHT:USER  msgpack of [item ids, best first; their scores as float32, little-endian, one behind the other]

A key is written in a transaction with a look at `nights` and `erased`, so that no delivery writes keys that another one has
swept, and none brings back a user who was erased after its histories began to be read: a night that is older than what
`erased` remembers is refused. Every key expires.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import msgspec
import numpy as np
import polars as pl

from features.split import DAY
from recsys.errors import DataError, SetupError, StoreError
from serving.admission import Breaker, Clock
from serving.nights import Night, erased_digest
from serving.stores import TRIES, RedisServer, hidden
from serving.telemetry import LOG, about

TTL = 3 * DAY
"""Seconds after which a key expires, unless the URL says otherwise: three nights without a delivery."""
OLDEST = 30 * DAY
"""Seconds since its histories began to be read after which a night is not delivered."""
MARKS = OLDEST + DAY
"""Seconds for which it is noted who was erased: until the delivery of a night that held the user must have ended."""
READ_SECONDS, WRITE_SECONDS = 0.5, 30.0
"""That the server may take to connect and to answer, unless the URL says otherwise."""
REST = 1.0
"""Seconds that a server is left alone after it did not answer."""
USERS = 500
"""Users whose lists are written at once."""
SKEW = 60.0
"""Seconds by which the clocks of two machines may differ."""
ROOT = "recsys:lists"
LIVE, BEFORE, NIGHTS, ERASED = f"{ROOT}:live", f"{ROOT}:before", f"{ROOT}:nights", f"{ROOT}:erased"
PREFIX = f"{ROOT}:night:"

Pair = tuple[int | str, float]

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[list[int | str], bytes]).decode


def packed(item_ids: Sequence[int | str], scores: bytes) -> bytes:
    """A list as a key holds it; scores are float32, little-endian."""
    return _encode((item_ids, scores))


def unpacked(blob: bytes) -> list[Pair]:
    """Item ids and scores of a key. Raises ValueError: it is no list."""
    item_ids, scores = _decode(blob)
    return list(zip(item_ids, np.frombuffer(scores, "<f4").tolist(), strict=True))


def key_of(night: str, user_id: str) -> str:
    """The key of a user's list."""
    return f"{PREFIX}{night}:{user_id}"


def parameter(url: str, name: str, default: str) -> tuple[str, str]:
    """A URL without one of its query's parameters, and the parameter."""
    parts = urlsplit(url)
    given = parse_qsl(parts.query, keep_blank_values=True)
    value = dict(given).get(name, default)
    query = urlencode([pair for pair in given if pair[0] != name])
    return urlunsplit(parts._replace(query=query)), value


class Keys(RedisServer):
    """A connection to the server, and how long its keys live."""

    def __init__(self, url: str, seconds: float) -> None:
        """Raises SetupError: no redis package, or a URL that cannot be."""
        try:
            plain, ttl = parameter(url, "ttl", str(TTL))
        except ValueError:
            raise SetupError(f"{hidden(url)}: is no URL; give redis://HOST:PORT/NUMBER") from None
        if not (ttl.isdecimal() and int(ttl)):
            raise SetupError(f"{hidden(url)}: ttl is {ttl!r}; give whole seconds, at least 1")
        super().__init__(plain, seconds)
        self.url, self.ttl = hidden(url), int(ttl)

    def change(self, watched: Sequence[str], change: Callable[[Any], None]) -> None:
        """As `changed`."""
        late = StoreError(f"{self.url}: others changed the lists first, {TRIES} times; try again")
        self.changed(watched, change, late)


def write(night: Night, url: str, frames: Iterator[pl.DataFrame], progress: Callable[[int], None]) -> dict[str, int]:
    """Write a night's lists, make it the live one, and delete the keys of those that are neither live nor were before.

    A delivery that is killed leaves the lists that were live; the next one deletes what it wrote. `progress` hears of users
    done. Returns users and rows; without lists of users who were erased since the histories began to be read.
    Raises SetupError: as Keys. StoreError: the server, or another delivery that ended first. DataError: it is too old.
    """
    keys = Keys(url, WRITE_SECONDS)
    token, ttl, moment = uuid.uuid4().hex, keys.ttl, night.manifest["clock"]["begun"]
    begun = datetime.fromisoformat(moment).timestamp() - SKEW
    if begun < time.time() - OLDEST:
        found = f"was begun at {moment}, more than {OLDEST // DAY} days ago, and who was erased since is not known"
        raise DataError(f"{night.path}: {found}; make a new night and deliver that")
    counts = {"users": 0, "rows": 0}
    try:
        with keys.errors(), keys.client.pipeline() as pipeline:
            pipeline.hset(NIGHTS, night.id, token)
            pipeline.expire(NIGHTS, ttl)
            pipeline.execute()

        def mine(pipeline: Any) -> None:
            if pipeline.hget(NIGHTS, night.id) != token.encode():
                raise StoreError(
                    f"{keys.url}: another delivery ended before this one; deliver again if these are the newer lists"
                )

        for frame in frames:
            lists = _lists(frame)
            while part := dict(islice(lists, USERS)):

                def put(pipeline: Any, part: dict[str, tuple[bytes, int]] = part) -> None:
                    mine(pipeline)
                    for user_id in _erased(pipeline, list(part), begun):
                        part.pop(user_id)
                    pipeline.multi()
                    for user_id, (blob, _) in part.items():
                        pipeline.set(key_of(night.id, user_id), blob, ex=ttl)

                keys.change((NIGHTS, ERASED), put)
                counts["users"] += len(part)
                counts["rows"] += sum(places for _, places in part.values())
                progress(counts["users"])

        def turn(pipeline: Any) -> None:
            mine(pipeline)
            live = pipeline.get(LIVE)
            pipeline.multi()
            pipeline.set(LIVE, night.id, ex=ttl)
            pipeline.expire(NIGHTS, ttl)
            if live not in (None, night.id.encode()):
                pipeline.set(BEFORE, live, ex=ttl)

        keys.change((NIGHTS, LIVE), turn)
        _sweep(keys)
    finally:
        keys.close()
    return counts


def _erased(pipeline: Any, user_ids: Sequence[str], begun: float) -> list[str]:
    """Those who were erased since then."""
    if not pipeline.zcount(ERASED, begun, "+inf"):
        return []
    moments = pipeline.zmscore(ERASED, [erased_digest(user_id) for user_id in user_ids])
    return [user_id for user_id, moment in zip(user_ids, moments, strict=True) if moment is not None and moment >= begun]


def _lists(frame: pl.DataFrame) -> Iterator[tuple[str, tuple[bytes, int]]]:
    """Each user of a frame of whole lists, with the list as a key holds it and its places."""
    runs = frame["user_id"].cast(pl.String).rle().struct.unnest()
    items, scores = frame["item_id"].to_list(), frame["score"].to_numpy().astype("<f4").tobytes()
    start = 0
    for user_id, places in zip(runs["value"].to_list(), runs["len"].to_list(), strict=True):
        end = start + places
        yield user_id, (packed(items[start:end], scores[4 * start : 4 * end]), places)
        start = end


def _sweep(keys: Keys) -> None:
    """Forget all nights but the live one and the one before, and delete the keys of those that are forgotten."""

    def forget(pipeline: Any) -> None:
        kept = pipeline.mget(LIVE, BEFORE)
        old = [night for night in pipeline.hkeys(NIGHTS) if night not in kept]
        pipeline.multi()
        if old:
            pipeline.hdel(NIGHTS, *old)

    keys.change((LIVE, NIGHTS), forget)
    for found in keys.parts(PREFIX):

        def unlink(pipeline: Any, found: list[bytes] = found) -> None:
            known = set(pipeline.hkeys(NIGHTS))
            gone = [key for key in found if key[len(PREFIX) :].partition(b":")[0] not in known]
            pipeline.multi()
            if gone:
                pipeline.unlink(*gone)

        keys.change((NIGHTS,), unlink)


class RedisLists:
    """The lists of the night that was delivered last; safe to share between threads.

    While the server does not answer there are none, and only now and then somebody asks.
    """

    remote = True

    def __init__(self, url: str, clock: Clock = time.monotonic) -> None:
        """Raises SetupError: no redis package, or a URL that cannot be."""
        self._keys = Keys(url, READ_SECONDS)
        self.url = self._keys.url
        self._breaker = Breaker(REST, clock)
        self._night = ""

    def of(self, user_id: str) -> list[Pair]:
        """Item ids and scores of a user's list, best first; empty where there is none, or the server does not answer."""
        if not self._breaker.ask():
            return []
        try:
            blob = self._read(user_id)
            self._breaker.mend()
            return [] if blob is None else unpacked(blob)
        except (StoreError, ValueError, msgspec.DecodeError) as error:
            if self._breaker.whole:
                detail = str(error) if isinstance(error, StoreError) else f"{self.url}: a user's list is unreadable"
                LOG.warning("lists", extra=about(detail=detail))
            if isinstance(error, StoreError):
                self._breaker.fail()
            return []

    def refresh(self) -> bool:
        """Look which night is live; whether it is another than before. Raises StoreError: the server does not answer."""
        before = self._night
        with self._keys.errors():
            self._follow(self._keys.client.get(LIVE))
        self._breaker.mend()
        return self._night != before

    def erase(self, user_id: str) -> bool:
        """Delete a user's lists of all nights, and let no delivery that is under way write one; whether there was one.

        Raises StoreError: the server does not answer.
        """
        now, client = time.time(), self._keys.client
        with self._keys.errors():
            with client.pipeline() as pipeline:
                pipeline.zadd(ERASED, {erased_digest(user_id): now})
                pipeline.zremrangebyscore(ERASED, "-inf", f"({now - MARKS}")
                pipeline.expire(ERASED, MARKS)
                pipeline.hkeys(NIGHTS)
                nights = pipeline.execute()[-1]
            return bool(nights) and bool(client.delete(*(key_of(night.decode(), user_id) for night in nights)))

    def close(self) -> None:
        self._keys.close()

    def _read(self, user_id: str) -> bytes | None:
        """The blob of the live night: it is read with the name of the night, which may be another than it was."""
        with self._keys.errors():
            for _ in range(TRIES):
                night = self._night
                live, blob = self._keys.client.mget(LIVE, key_of(night, user_id))
                self._follow(live)
                if self._night == night:
                    found: bytes | None = blob if night else None
                    return found
        raise StoreError(f"{self.url}: another night went live {TRIES} times; ask again")

    def _follow(self, live: bytes | None) -> None:
        self._night = "" if live is None else live.decode()
