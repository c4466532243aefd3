"""Draw the events of the made-up world, with a clock, as many as asked for, user by user.

Every random number is a hash of the seed, the user, the position and the attempt, so that a user's events depend on nothing
else: the size of a block changes the memory needed and not one event, and more users leave the first ones as they were.

B users of a block · N events
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from features.dataset import Dataset
from features.schema import RawTables
from features.world import SHORTEST, SUCCESSOR_WEIGHTS, Bools, Floats, Ints, SyntheticSettings, World, best_possible
from recsys.batch import FIRST_ITEM
from recsys.errors import DataError

__all__ = [
    "SESSION_GAP",
    "SyntheticSettings",
    "World",
    "best_possible",
    "best_possible_of",
    "generate",
    "read_world",
    "simulate",
    "write",
]

SESSION_GAP = 4 * 3600
"""Seconds: the shortest gap before a new session; gaps within a session are below 30 minutes."""
ARRIVALS = 1_704_067_200, 365 * 86_400
"""Users arrive from 2024-01-01 (seconds since 1970) on, within a year (seconds)."""
BLOCK_BYTES = 1 << 27
"""Size of the table of seen items, which bounds the users of a block."""

Progress = Callable[[int, int], None]
"""Called with (users so far, users in all)."""


def generate(settings: SyntheticSettings) -> tuple[RawTables, World]:
    """The world and all its events (user_id, item_id, timestamp), in memory."""
    world = World(settings)
    return RawTables(pl.concat(simulate(world)).lazy(), world.items().lazy()), world


def write(settings: SyntheticSettings, folder: Path, progress: Progress | None = None) -> World:
    """Write events-*.parquet, items.parquet and world.json, one block of users at a time.

    Raises DataError: the folder holds events already.
    """
    if any(folder.glob("events*")):
        raise DataError(f"{folder}: holds events already; name an empty folder")
    world = World(settings)
    folder.mkdir(parents=True, exist_ok=True)
    for part, events in enumerate(simulate(world, progress)):
        events.write_parquet(folder / f"events-{part:05}.parquet")
    world.items().write_parquet(folder / "items.parquet")
    (folder / "world.json").write_text(json.dumps(settings.as_dict(), indent=1) + "\n", encoding="utf-8")
    return world


def read_world(folder: Path) -> World:
    """The world of a folder that `write` wrote.

    Raises DataError: there is none.
    """
    try:
        return World(SyntheticSettings(**json.loads((folder / "world.json").read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder / 'world.json'}: no synthetic world there: {error}; write one") from None


def best_possible_of(world: World, dataset: Dataset, split: str = "test", k: int = 10) -> dict[str, float]:
    """`best_possible` of the users of a data set built from this world, for the first target of each in the split."""
    sequences, item_ids = dataset.sequences, dataset.items["item_id"].to_list()
    events = [item_ids[row - FIRST_ITEM] for row in sequences.items.tolist()]
    windows = zip(*(part.tolist() for part in sequences.windows(split)), strict=True)
    judged = [(start, end) for start, end, last in windows if start < end < last]
    return best_possible(world, [events[start:end] for start, end in judged], [events[end] for _, end in judged], k)


def simulate(world: World, progress: Progress | None = None, block: int | None = None) -> Iterator[pl.DataFrame]:
    """Events in blocks of `block` whole users, sorted by user and time."""
    users = world.settings.users
    block = block or int(np.clip(BLOCK_BYTES / (10 * 4 * world.settings.events_per_user), 256, 16_384))  # longest: 10 means
    for start in range(0, users, block):
        stop = min(start + block, users)
        yield _simulate_block(world, np.arange(start + 1, stop + 1))
        if progress:
            progress(stop, users)


def _simulate_block(world: World, users: Ints) -> pl.DataFrame:
    """All positions in turn, each for all users that are long enough: sorted by length, these are the first ones."""
    keys = _keys(world.settings.seed, users)
    lengths = _lengths(world.settings, _uniform(keys, 0, _LENGTH))
    starts = lengths.cumsum() - lengths
    order = np.argsort(-lengths, kind="stable")
    keys, starts = keys[order], starts[order]
    items, times = np.empty(lengths.sum(), np.int64), np.empty(lengths.sum(), np.int64)
    seen = _Seen(len(users), lengths.max())
    clock = ARRIVALS[0] + (_uniform(keys, 0, _GAP) * ARRIVALS[1]).astype(np.int64)
    last = before = world.pick(_uniform(keys, 0, 0) * world.settings.genres)
    favourite = world.genre[last]
    for position, active in enumerate(np.searchsorted(-lengths[order], -np.arange(lengths.max()))):
        if position:
            context = last[:active], before[:active], favourite[:active]
            before, (last, back) = context[0], _draw_unseen(world, seen, keys[:active], position, context)
            clock = clock[:active] + _gaps(world.settings, back, _uniform(keys[:active], position, _GAP))
        seen.add(last)
        items[starts[:active] + position], times[starts[:active] + position] = last + 1, clock
    return pl.DataFrame({"user_id": users.repeat(lengths), "item_id": items, "timestamp": times})


class _Seen:
    """Which items the users of a block have: position by position, for users with the longest histories first."""

    def __init__(self, users: int, longest: int) -> None:
        self._items = np.empty((longest, users), np.int32)
        self._positions = 0

    def has(self, users: Ints, items: Ints) -> Bools:
        """Whether each of some users, all of them being active, has this item."""
        has: Bools = (self._items[: self._positions, users] == items).any(0)
        return has

    def add(self, items: Ints) -> None:
        """The next item of each of the first users, which are active from now on."""
        self._items[self._positions, : len(items)] = items
        self._positions += 1


Context = tuple[Ints, Ints, Ints]
"""The last item, the one before it (itself, if there is none) and the favourite genre of each user."""


def _draw_unseen(world: World, seen: _Seen, keys: Words, position: int, context: Context) -> tuple[Ints, Bools]:
    """Each user's next item, drawn until it is new, and whether it returns to the favourite genre."""
    items, back = np.empty(len(keys), np.int64), np.empty(len(keys), np.bool_)
    todo, attempt = np.arange(len(keys)), 0
    while len(todo):
        last, before, favourite = context
        drawn, returns = _draw(world, _uniform(keys[todo], position, attempt), (last[todo], before[todo], favourite[todo]))
        new = ~seen.has(todo, drawn)
        items[todo[new]], back[todo[new]] = drawn[new], returns[new]
        todo, attempt = todo[~new], attempt + 1
    return items, back


def _draw(world: World, u: Floats, context: Context) -> tuple[Ints, Bools]:
    """An item from the mixture, seen or not, and whether it returns to the favourite genre; one number u decides it all."""
    s = world.settings
    last, before, favourite = context
    widths = np.array([s.back, *(1 - s.back) * np.array([s.stay, s.drift, s.sequel, s.resume, s.surprise])])
    ends = widths.cumsum()
    part = np.minimum(np.searchsorted(ends, u, side="right"), len(widths) - 1)
    v = ((u - (ends - widths)[part]) / widths[part]).clip(0, _BELOW_ONE)  # what is left of u is uniform again
    items = np.empty_like(last)
    shelf, series, surprise = part < 3, (part == 3) | (part == 4), part == 5
    genre = np.where(part == 0, favourite, (world.genre[last] + (part == 2)) % s.genres)
    items[shelf] = world.pick(genre[shelf] + v[shelf])
    slots = np.searchsorted(SUCCESSOR_WEIGHTS.cumsum()[:-1], v[series], side="right")
    items[series] = world.successors[np.where(part == 3, last, before)[series], slots]
    items[surprise] = (v[surprise] * s.items).astype(np.int64)
    return items, part == 0


def _gaps(s: SyntheticSettings, back: Bools, u: Floats) -> Ints:
    """Seconds since the event before: minutes within a session, hours or days before a new one.

    An event that returns to the favourite genre starts a session; any other does so often enough for `new_session` in all.
    """
    share = (s.new_session - s.back) / max(1 - s.back, 1e-9)
    new = back | (u < share)
    v = np.where(back, u, np.where(new, u / max(share, 1e-9), (u - share) / max(1 - share, 1e-9))).clip(0, _BELOW_ONE)
    waits = -np.log1p(-v)  # exponential, mean 1
    gaps: Floats = np.where(new, SESSION_GAP + waits * 2.5 * 86_400, 20 + np.minimum(waits * 300, 1_700))
    return gaps.astype(np.int64)


def _lengths(s: SyntheticSettings, u: Floats) -> Ints:
    """Events of each user: geometric from SHORTEST on, cut at half of the items."""
    mean = s.events_per_user - SHORTEST
    extra: Floats = np.log1p(-u) / np.log(max(mean / (mean + 1), 1e-300))
    lengths: Ints = np.minimum(SHORTEST + extra.astype(np.int64), s.items // 2)
    return lengths


Words = npt.NDArray[np.uint64]
_GOLDEN, _WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1
_GAP, _LENGTH = (1 << 20) - 1, (1 << 20) - 2
"""Attempts that no item is drawn by."""
_BELOW_ONE = 1 - 1e-9


def _keys(seed: int, users: Ints) -> Words:
    """Where each user's random numbers start."""
    start = _mix(np.array([(seed * _GOLDEN + 1) & _WORD], np.uint64))
    return _mix(start + users.astype(np.uint64) * np.uint64(_GOLDEN))


def _uniform(keys: Words, position: int, attempt: int) -> Floats:
    """One number in [0, 1) a key, the same for the same arguments."""
    counter = ((position << 20 | attempt) * _GOLDEN) & _WORD
    return (_mix(keys + np.uint64(counter)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: Words) -> Words:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): every bit of x moves every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
