"""A made-up world whose best possible list is known: what no model can beat, and a good one comes near.

An event is drawn from a mixture that the history alone decides: a further part of the series of the last item, or of the
one before it; something popular of the last item's genre, or of the next genre (taste drifts around a ring); anything; or,
where a new session returns to it, something popular of the user's favourite genre, which is that of the first event. It is
drawn again until the user has not seen it. So the law of the next item is that mixture over the unseen items, renormalised,
and its likeliest items are the best list there is.

Every random number is a hash of the seed, the user, the position and the attempt, so that a user's events depend on nothing
else: the size of a block changes the memory needed and not one event, and more users leave the first ones as they were.

B histories · I items · K places of a list
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import polars as pl

from features.dataset import Dataset
from features.titles import NOUNS, make_title
from recsys.batch import FIRST_ITEM
from recsys.config import Settings
from recsys.errors import DataError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

SHORTEST = 5
"""Events of the shortest history."""
SUCCESSOR_WEIGHTS = np.array([0.6, 0.25, 0.15])
"""How a series goes on: with the next part, the one after, the third."""
SESSION_GAP = 4 * 3600
"""Seconds: the shortest gap before a new session; gaps within a session are below 30 minutes."""
ARRIVALS = 1_704_067_200, 365 * 86_400
"""Users arrive from 2024-01-01 (seconds since 1970) on, within a year (seconds)."""
BLOCK_BYTES = 1 << 27
"""Size of the table of seen items, which bounds the users of a block."""
BLOCK_USERS = 256, 16_384
"""Users of a block, at least and at most."""


@dataclass(frozen=True)
class SyntheticSettings(Settings):
    """Size and habits of the synthetic world. Chances are those before the items that the user has seen are ruled out."""

    section: ClassVar[str] = "synthetic"

    users: int = 3_000
    """Users."""
    items: int = 600
    """Items; ids are 1 to `items`, in no order of popularity."""
    genres: int = 10
    """Genres, on a ring, of nearly equal size."""
    events_per_user: float = 40.0
    """Mean events of a user, geometric from 5 on; at most a quarter of the items."""
    series: int = 5
    """Items of a series; each leads to the next ones, the last ones to the first."""
    popularity: float = 0.8
    """Exponent of Zipf's law of popularity within a genre."""
    sequel: float = 0.25
    """Chance that an event goes on with the last item's series (unless a new session returns to the favourite genre)."""
    resume: float = 0.25
    """Chance, likewise, that it goes on with the series of the item before the last."""
    drift: float = 0.15
    """Chance, likewise, that it is of the next genre of the ring."""
    surprise: float = 0.05
    """Chance, likewise, that it is any item; what is left is the chance that it is of the last item's genre."""
    new_session: float = 0.35
    """Chance that an event starts a new session."""
    loyalty: float = 0.85
    """Chance that a new session returns to the user's favourite genre."""
    seed: int = 0
    """Same settings and seed, same world and events."""

    def __post_init__(self) -> None:
        if self.users < 1 or self.series < 2 or self.seed < 0 or self.popularity < 0:
            raise ValueError("users must be at least 1, series 2, seed and popularity 0")
        if not 2 <= self.genres <= len(NOUNS):
            raise ValueError(f"genres is {self.genres}, must be 2 to {len(NOUNS)}")
        if not SHORTEST <= self.events_per_user <= self.items / 4:
            raise ValueError(
                f"events_per_user is {self.events_per_user}, must be {SHORTEST} to a quarter of items ({self.items})"
            )
        self._from_to(0, 1, "sequel", "resume", "drift", "surprise", "new_session", "loyalty")
        if self.sequel + self.resume + self.drift + self.surprise > 1 + 1e-9:  # rounding may pass 1
            raise ValueError("sequel + resume + drift + surprise must be at most 1")
        if self.surprise < 0.01 or self.back > 0.95:  # an unseen item must be found within a bearable number of draws
            raise ValueError("surprise must be at least 0.01, and new_session * loyalty at most 0.95")

    @property
    def back(self) -> float:
        """Chance that an event starts a session with the favourite genre."""
        return self.new_session * self.loyalty

    @property
    def stay(self) -> float:
        """Chance that any other event is of the last item's genre, by popularity."""
        return max(0.0, 1 - self.sequel - self.resume - self.drift - self.surprise)


class World:
    """The items and the law of the next one. Arrays are indexed by item id minus 1."""

    def __init__(self, settings: SyntheticSettings) -> None:
        self.settings = settings
        rng = np.random.default_rng(settings.seed)
        members = np.array_split(rng.permutation(settings.items), settings.genres)  # of each genre, most popular first
        self.genre: Ints = np.empty(settings.items, np.int64)
        self.popularity: Floats = np.empty(settings.items)
        """Share of the item in the events that its genre gets by popularity."""
        self.successors: Ints = np.empty((settings.items, len(SUCCESSOR_WEIGHTS)), np.int64)
        """The next parts of the item's series, and the item itself where a series is too short to have more."""
        self._place: Ints = np.empty((settings.items, 2), np.int64)
        """The item's series within its genre, from 0, and its part of the series, from 1."""
        self.genre_names = list(NOUNS)[: settings.genres]
        for genre, items in enumerate(members):
            weights = np.arange(1, len(items) + 1) ** -settings.popularity
            self.genre[items], self.popularity[items] = genre, weights / weights.sum()
            self._tell_series(items, rng.permutation(len(items)))
        self._members = np.concatenate(members)
        self._ladder = np.concatenate([genre + self.popularity[items].cumsum() for genre, items in enumerate(members)])
        self._ladder[np.cumsum([len(items) for items in members]) - 1] = np.arange(1, settings.genres + 1)

    def _tell_series(self, items: Ints, order: Ints) -> None:
        """Split a genre's items, most popular first, into series by a random order; the most popular part comes first."""
        length = self.settings.series
        whole = len(items) // length * length
        for first, places in ((0, order[:whole].reshape(-1, length)), (whole // length, order[None, whole:])):
            parts = items[np.sort(places, axis=1)]
            part = np.arange(parts.shape[1])
            self.successors[parts] = parts[:, (part[:, None] + 1 + np.arange(self.successors.shape[1])) % max(len(part), 1)]
            self._place[parts, 0], self._place[parts, 1] = first + np.arange(len(parts))[:, None], part + 1

    def pick(self, places: Floats) -> Ints:
        """Items by popularity: place g + u, with u uniform in [0, 1), is an item of genre g."""
        items: Ints = self._members[np.searchsorted(self._ladder, places, side="right")]
        return items

    def items(self) -> pl.DataFrame:
        """item_id, title (no two are the same) and categories (the genre) of every item."""
        genres = [self.genre_names[genre] for genre in self.genre.tolist()]
        titles = [make_title(genre, *place) for genre, place in zip(genres, self._place.tolist(), strict=True)]
        return pl.DataFrame({"item_id": np.arange(1, len(genres) + 1), "title": titles, "categories": genres})

    def probabilities(self, histories: Sequence[Sequence[int] | Ints]) -> Floats:
        """The exact law of the next item, B × I, after histories of item ids, oldest first.

        Where the time of the request tells whether the next event starts a session, the law is that of such a world in which
        every event does, or none.
        """
        s = self.settings
        ends = np.array([(h[0], h[-2:][0], h[-1]) if len(h) else (0, 0, 0) for h in histories], np.int64).reshape(-1, 3) - 1
        first, before, last = ends.T
        genre_B1, favourite_B1 = self.genre[last][:, None], self.genre[first][:, None]
        law_BI: Floats = s.stay * (self.genre == genre_B1) * self.popularity
        law_BI += s.drift * (self.genre == (genre_B1 + 1) % s.genres) * self.popularity
        law_BI += s.surprise / s.items
        for chance, items in ((s.sequel, last), (s.resume, before)):
            for successor, weight in zip(self.successors[items].T, SUCCESSOR_WEIGHTS, strict=True):
                law_BI[np.arange(len(law_BI)), successor] += chance * weight
        law_BI = (1 - s.back) * law_BI + s.back * (self.genre == favourite_B1) * self.popularity
        law_BI[last < 0] = self.popularity / s.genres
        for row, history in zip(law_BI, histories, strict=True):
            row[np.asarray(history, np.int64) - 1] = 0.0
        law_BI /= law_BI.sum(1, keepdims=True)
        return law_BI

    def best(self, histories: Sequence[Sequence[int] | Ints], k: int) -> tuple[Ints, Floats]:
        """The best lists: the ids of the k likeliest next items, likeliest first, and their probabilities, B × k."""
        law_BI = self.probabilities(histories)
        k = min(k, law_BI.shape[1])
        top_BK = np.argpartition(-law_BI, k - 1, axis=1)[:, :k]
        chance_BK = np.take_along_axis(law_BI, top_BK, 1)
        order_BK = np.lexsort((top_BK, -chance_BK))
        return np.take_along_axis(top_BK, order_BK, 1) + 1, np.take_along_axis(chance_BK, order_BK, 1)


def best_possible(world: World, histories: Sequence[Sequence[int] | Ints], k: int = 10) -> dict[str, float]:
    """Recall and NDCG at k of the best lists with one target a history, expected over all that could come next.

    Those of actual targets differ by the luck of the draw: about sqrt(recall (1 - recall) / histories).
    """
    gains, sums = 1 / np.log2(np.arange(2, k + 2)), np.zeros(2)
    step = max(1, (1 << 22) // world.settings.items)  # 32 MB an array
    for start in range(0, len(histories), step):
        _, chances = world.best(histories[start : start + step], k)
        sums += chances.sum(), (chances @ gains[: chances.shape[1]]).sum()
    return dict(zip((f"recall@{k}", f"ndcg@{k}"), (sums / max(len(histories), 1)).tolist(), strict=True))


def best_possible_of(world: World, dataset: Dataset, k: int = 10) -> dict[str, float]:
    """`best_possible` of the users of a data set built from this world, before the first target of each in the test."""
    sequences, item_ids = dataset.sequences, dataset.items["item_id"].to_list()
    events = [item_ids[row - FIRST_ITEM] for row in sequences.items.tolist()]
    windows = zip(*(part.tolist() for part in sequences.windows("test")), strict=True)
    return best_possible(world, [events[start:end] for start, end, last in windows if start < end < last], k)


def write(settings: SyntheticSettings, folder: Path) -> World:
    """Write events-*.parquet and items.parquet, one block of users at a time.

    Raises DataError: the folder holds events already.
    """
    if any(folder.glob("events*")):
        raise DataError(f"{folder}: holds events already; name an empty folder")
    world = World(settings)
    folder.mkdir(parents=True, exist_ok=True)
    for part, events in enumerate(simulate(world)):
        events.write_parquet(folder / f"events-{part:05}.parquet")
    world.items().write_parquet(folder / "items.parquet")
    return world


def simulate(world: World) -> Iterator[pl.DataFrame]:
    """Events in blocks of whole users, sorted by user and time."""
    users = np.arange(1, world.settings.users + 1)
    block = int(np.clip(BLOCK_BYTES / (10 * 4 * world.settings.events_per_user), *BLOCK_USERS))  # longest: 10 means
    for start in range(0, len(users), block):
        yield _simulate_block(world, users[start : start + block])


def _simulate_block(world: World, users: Ints) -> pl.DataFrame:
    """All positions in turn, each for all users that are long enough: sorted by length, these are the first ones."""
    keys = _keys(world.settings.seed, users)
    lengths = _lengths(world.settings, _uniform(keys, 0, _LENGTH))
    starts = lengths.cumsum() - lengths
    order = np.argsort(-lengths, kind="stable")
    keys, starts = keys[order], starts[order]
    items, times = np.empty(lengths.sum(), np.int64), np.empty(lengths.sum(), np.int64)
    seen = np.empty((lengths.max(), len(users)), np.int32)
    clock = ARRIVALS[0] + (_uniform(keys, 0, _GAP) * ARRIVALS[1]).astype(np.int64)
    last = before = world.pick(_uniform(keys, 0, 0) * world.settings.genres)
    favourite = world.genre[last]
    for position, active in enumerate(np.searchsorted(-lengths[order], -np.arange(lengths.max()))):
        if position:
            context = last[:active], before[:active], favourite[:active]
            before, (last, back) = context[0], _draw_unseen(world, seen[:position], keys[:active], context)
            clock = clock[:active] + _gaps(world.settings, back, _uniform(keys[:active], position, _GAP))
        seen[position, : len(last)] = last
        items[starts[:active] + position], times[starts[:active] + position] = last + 1, clock
    return pl.DataFrame({"user_id": users.repeat(lengths), "item_id": items, "timestamp": times})


Context = tuple[Ints, Ints, Ints]
"""The last item, the one before it (itself, if there is none) and the favourite genre of each user."""


def _draw_unseen(world: World, seen: npt.NDArray[np.int32], keys: Words, context: Context) -> tuple[Ints, Bools]:
    """Each user's next item, drawn until it is new, and whether it returns to the favourite genre; `seen` holds the items at
    each position before.
    """
    items, back = np.empty(len(keys), np.int64), np.empty(len(keys), np.bool_)
    todo, attempt = np.arange(len(keys)), 0
    while len(todo):
        last, before, favourite = context
        drawn, returns = _draw(world, _uniform(keys[todo], len(seen), attempt), (last[todo], before[todo], favourite[todo]))
        new = (seen[:, todo] != drawn).all(0)
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
