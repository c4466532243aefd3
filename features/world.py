"""A made-up world whose best possible list is known: what no model can beat, and a good one comes near.

An event is drawn from a mixture that the history alone decides: a further part of the series of the last item, or of the
one before it; something popular of the last item's genre, or of the next genre (taste drifts around a ring); anything; or,
where a new session returns to it, something popular of the user's favourite genre, which is that of the first event. It is
drawn again until the user has not seen it. So the law of the next item is that mixture over the unseen items, renormalised,
and its likeliest items are the best list there is.

B histories · I items · K places of a list
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import polars as pl

from features.titles import NOUNS, make_title
from recsys.config import Settings

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

SHORTEST = 5
"""Events of the shortest history."""
SUCCESSOR_WEIGHTS = np.array([0.6, 0.25, 0.15])
"""How a series goes on: with the next part, the one after, the third."""


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
        for name in ("sequel", "resume", "drift", "surprise", "new_session", "loyalty"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 to 1")
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

    @cached_property
    def titles(self) -> list[str]:
        """The title of every item; no two are the same."""
        places = zip(self.genre.tolist(), *self._place.T.tolist(), strict=True)
        return [make_title(self.genre_names[genre], series, part) for genre, series, part in places]

    def pick(self, places: Floats) -> Ints:
        """Items by popularity: place g + u, with u uniform in [0, 1), is an item of genre g."""
        items: Ints = self._members[np.searchsorted(self._ladder, places, side="right")]
        return items

    def items(self) -> pl.DataFrame:
        """item_id, title and categories (the genre) of every item."""
        names = pl.Series(self.genre_names).gather(self.genre)
        return pl.DataFrame({"item_id": np.arange(1, len(self.genre) + 1), "title": self.titles, "categories": names})

    def probabilities(self, histories: Sequence[Sequence[int] | Ints], new_session: Bools | None = None) -> Floats:
        """The exact law of the next item, B × I, after histories of item ids, oldest first.

        `new_session` (B) says whether the next event starts a session, which the time of the request tells: a gap of
        features.synthetic.SESSION_GAP or more. Without that time no model can do better than the law without `new_session`.
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
        back_B1 = s.back if new_session is None else s.loyalty * np.asarray(new_session)[:, None]
        law_BI = (1 - back_B1) * law_BI + back_B1 * (self.genre == favourite_B1) * self.popularity
        law_BI[last < 0] = self.popularity / s.genres
        for row, history in zip(law_BI, histories, strict=True):
            row[np.asarray(history, np.int64) - 1] = 0.0
        law_BI /= law_BI.sum(1, keepdims=True)
        return law_BI

    def oracle(self, histories: Sequence[Sequence[int] | Ints], k: int = 10, new_session: Bools | None = None) -> Ints:
        """The best list: the ids of the k likeliest next items, likeliest first, B × k."""
        return _best(self.probabilities(histories, new_session), k)[0] + 1


def best_possible(
    world: World,
    histories: Sequence[Sequence[int] | Ints],
    targets: Sequence[int] | Ints,
    k: int = 10,
    new_session: Bools | None = None,
) -> dict[str, float]:
    """Recall and NDCG at k of the best lists, one target (item id) a history.

    `recall@k` and `ndcg@k` are expected, over all that could have come next; `realised_...` are those of the actual targets,
    which differ by the luck of the draw: about sqrt(recall (1 - recall) / histories).
    """
    gains = 1 / np.log2(np.arange(2, k + 2))
    sums = np.zeros(4)
    step = max(1, (1 << 22) // world.settings.items)  # 32 MB an array
    for start in range(0, len(histories), step):
        rows = slice(start, start + step)
        law = world.probabilities(histories[rows], None if new_session is None else new_session[rows])
        best, chances = _best(law, k)
        hits = best + 1 == np.asarray(targets[rows])[:, None]
        sums += chances.sum(), (chances @ gains[: best.shape[1]]).sum(), hits.sum(), (hits @ gains[: best.shape[1]]).sum()
    names = (f"recall@{k}", f"ndcg@{k}", f"realised_recall@{k}", f"realised_ndcg@{k}")
    return dict(zip(names, (sums / max(len(histories), 1)).tolist(), strict=True))


def _best(law_BI: Floats, k: int) -> tuple[Ints, Floats]:
    """The k likeliest columns and their probabilities, likeliest first."""
    k = min(k, law_BI.shape[1])
    top_BK = np.argpartition(-law_BI, k - 1, axis=1)[:, :k]
    chance_BK = np.take_along_axis(law_BI, top_BK, 1)
    order_BK = np.lexsort((top_BK, -chance_BK))
    return np.take_along_axis(top_BK, order_BK, 1), np.take_along_axis(chance_BK, order_BK, 1)
