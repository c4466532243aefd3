"""The best lists within a budget: what each profile of a bundle costs and is worth, measured, and the choice written into it.

A *profile* is what decides the cost of an answer: how many candidates go through how many blocks of the ranker, how many blocks
of the model a history goes through, and how far the index looks. Of the last two an entry that is no better than a cheaper one,
neither beside the cheapest of the others nor beside the fullest, is left out: it is dominated in principle. (Beside the fullest
alone an index seems better than it is: where it finds too few for 400 candidates, all items are searched.) All combinations of
the rest are judged and timed, each request by every profile in turn, so that a drift of the machine hits them alike.
"""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from features.dataset import Dataset
from recsys.batch import FIRST_ITEM, Sequences, spread
from recsys.bundle import Directory
from recsys.errors import DataError, RequestError
from recsys.metrics import measure
from recsys.progress import Progress
from serving.engine import Recommender
from serving.evaluation.judge import judge
from serving.evaluation.protocol import ProtocolSettings
from serving.explain import save
from serving.export import measure_bundle
from serving.golden import renew
from serving.index import Index, IndexSettings, lists
from serving.ranking import ServingSettings
from serving.states import DepthSettings

CANDIDATES = (50, 100, 200, 400)
"""Tried with a ranker, at most the items."""
LOOKS = {
    "ivf": ("probes", (8, 16, 32, 64, 128, 256)),
    "ivf_sq8": ("probes", (8, 16, 32, 64, 128, 256)),
    "ivf_pq": ("probes", (8, 16, 32, 64, 128, 256)),
    "hnsw": ("breadth", (50, 100, 200, 400)),
}
"""What says how far each kind of index looks, and what is tried; an exact one always looks everywhere."""
K = 10
"""Of NDCG and recall."""
DIGITS = 4
"""Of NDCG and recall; what differs less is equal: over 1,000 users the error of an NDCG@10 is about .01."""
REQUESTS = 200
"""Timed requests of a profile."""
WARM = 10
"""Requests before them, which are not timed."""

Choice = TypeVar("Choice", DepthSettings, IndexSettings)


@dataclass(frozen=True)
class Budget:
    """What an answer may cost. Raises RequestError: no limit or two, or one of no more than 0."""

    latency_ms: float | None = None
    """Milliseconds within which 99 of 100 answers are there, asked one at a time."""
    price: float | None = None
    """Of a million answers of one core that is always busy, in the currency of `core_hour`."""
    core_hour: float | None = None
    """Price of an hour of one core."""

    def __post_init__(self) -> None:
        given = self.record()
        for name, value in given.items():
            if not 0 < value < float("inf"):
                raise RequestError(f"--{name.replace('_', '-')} is {value}; give more than 0")
        if "price" in given and "core_hour" not in given:
            raise RequestError("--price is given without --core-hour; say also what an hour of one core costs")
        if len(given.keys() & {"latency_ms", "price"}) != 1:
            found = "both --latency-ms and --price are given" if "price" in given else "the budget has no limit"
            raise RequestError(f"{found}; give either --latency-ms, or --price with --core-hour")

    @property
    def limit(self) -> float:
        """Milliseconds or money, as `cost`."""
        return self.latency_ms or self.price or 0.0

    def cost(self, timed: Timed) -> float:
        """What the limit is of: the p99 in milliseconds, or the price."""
        return timed.p99_ms if self.price is None else self.priced(timed) or 0.0

    def priced(self, timed: Timed) -> float | None:
        """Price of a million answers; None where a core-hour has none."""
        return None if self.core_hour is None else timed.mean_ms * 1e6 / 3.6e6 * self.core_hour

    def said(self, cost: float) -> str:
        """In words."""
        return f"a p99 of {cost:.4g} ms" if self.price is None else f"{cost:.4g} for a million answers"

    def record(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Profile:
    """What decides the cost of an answer."""

    serving: ServingSettings
    depth: DepthSettings
    index: IndexSettings
    looks: str = ""
    """Which setting of the index says how far it looks; empty: none."""

    def of(self, recommender: Recommender) -> Recommender:
        """The recommender at this cost."""
        return recommender.with_profile(self.serving, self.depth, self.index)

    def record(self) -> dict[str, Any]:
        """The settings by name; `depth` is "all" or blocks of the model, candidates are None where they are not ranked."""
        looks = {self.looks: getattr(self.index, self.looks)} if self.looks else {}
        candidates = self.serving.candidates if self.serving.ranker_blocks else None
        depth = round(self.depth.blocks, 2) or "all"
        return {"candidates": candidates, "ranker_blocks": self.serving.ranker_blocks, "depth": depth, **looks}

    def recipe(self) -> dict[str, dict[str, Any]]:
        """The sections of a recipe."""
        return {part.section: part.as_dict() for part in (self.serving, self.depth, self.index)}


@dataclass(frozen=True)
class Timed:
    """How long answers took, in milliseconds."""

    p50_ms: float
    p99_ms: float
    mean_ms: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Timed:
        """The p99 is a time that was measured, and at least 99 of 100 are no longer."""
        p50, p99 = np.quantile(seconds, (0.5, 0.99), method="higher")
        return Timed(*(round(1000 * float(value), 4) for value in (p50, p99, np.mean(seconds))))


@dataclass(frozen=True)
class Measured:
    """A profile with what it costs and is worth."""

    profile: Profile
    quality: Mapping[str, float]
    """recall@10 and ndcg@10."""
    timed: Timed

    @property
    def ndcg(self) -> float:
        return self.quality[f"ndcg@{K}"]

    def record(self, budget: Budget) -> dict[str, Any]:
        price = budget.priced(self.timed)
        money = {} if price is None else {"price": float(f"{price:.4g}")}
        return {**self.profile.record(), **self.quality, **vars(self.timed), **money}


@dataclass(frozen=True)
class Found:
    """What was measured, and what was chosen."""

    budget: Budget
    k: int
    users: int
    """By whom lists were judged."""
    measured: Sequence[Measured]
    frontier: Sequence[Measured]
    chosen: Measured
    again: Sequence[Timed]
    """Alone, by requests of other users: the best within the budget, then the next best, until one kept it, the chosen one."""

    @property
    def verdict(self) -> str:
        """How the chosen one kept the budget, in words."""
        *broken, kept = (self.budget.said(self.budget.cost(timed)) for timed in self.again)
        others = f"; better profiles broke their promise ({', '.join(broken)})" if broken else ""
        return f"NDCG@{K} {self.chosen.ndcg:.{DIGITS}f} at {kept}, within {self.budget.said(self.budget.limit)}{others}"

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "limit": self.budget.record(),
            "k": self.k,
            "users": self.users,
            "chosen": self.chosen.record(self.budget),
            "again": vars(self.again[-1]),
            "broken": [vars(timed) for timed in self.again[:-1]],
            "frontier": [one.record(self.budget) for one in self.frontier],
            "measured": [one.record(self.budget) for one in self.measured],
        }


def spend(
    recommender: Recommender,
    dataset: Dataset,
    budget: Budget,
    k: int = 10,
    users: int = 1000,
    progress: Progress = lambda what, done, of: None,
) -> Found:
    """The profile of the best lists within the budget, which kept it when it was measured once more.

    Lists are judged by evenly chosen users of the validation split, each by the first event of theirs, if it is new to them,
    and timed by their histories, on the threads that torch and the recommender have. `progress` hears (what, answers given, in
    all). Raises RequestError: k below 1, no user, or nothing keeps the budget. DataError: nobody can be judged.
    """
    if k < 1 or users < 1:
        raise RequestError(f"k is {k}, users are {users}; ask for at least 1 of each")
    sequences = recommender.catalogue.align(dataset)
    _, begins_U, ends_U = sequences.windows("validation")
    sequences = replace(sequences, validation_end=torch.minimum(begins_U + 1, ends_U) - sequences.offsets[:-1])
    users_U = sequences.judged("validation")
    judged_B = users_U[spread(len(users_U), users)]
    judged = 0

    def worth(profile: Profile, tell: Callable[[int], None]) -> dict[str, float]:
        nonlocal judged
        lister = profile.of(recommender)
        _, ranks_P, owners_P, _ = judge(lister, sequences, ProtocolSettings(split="validation"), judged_B, max(k, K), tell)
        if not len(owners_P):
            raise DataError(
                "the validation split has nobody with a history and a new item; give more events or another [split]"
            )
        judged = len(owners_P)
        return {name: round(value, DIGITS) for name, value in measure(ranks_P, owners_P, len(judged_B), (K,)).items()}

    quality = judge_profiles(recommender, worth, len(judged_B), progress)
    timed_B = users_U[spread(len(users_U), 2 * REQUESTS)]
    here, there = (requests(recommender, sequences, users_B, k) for users_B in (timed_B[::2], timed_B[1::2]))
    times = time_answers([profile.of(recommender) for profile in quality], here, progress)
    measured = [Measured(profile, worth, timed) for (profile, worth), timed in zip(quality.items(), times, strict=True)]

    def again(one: Measured) -> Timed:
        return time_answers([one.profile.of(recommender)], there or here, progress, "timed alone")[0]

    chosen, alone = choose(measured, budget, again)
    return Found(budget, k, judged, measured, frontier(measured, budget), chosen, alone)


def choices(recommender: Recommender) -> tuple[list[ServingSettings], list[DepthSettings], list[IndexSettings], str]:
    """What may be chosen of rankings, depths and searches, each from the cheapest to the fullest, and what says the last."""
    manifest, items = recommender.manifest, recommender.items
    unranked = replace(recommender.serving, ranker_blocks=0)
    ranked = [
        replace(recommender.serving, ranker_blocks=blocks, candidates=candidates)
        for blocks in range(1, 1 + (recommender.ranker.settings.blocks if recommender.ranker else 0))
        for candidates in sorted({min(candidates, items) for candidates in CANDIDATES})
    ]
    every = recommender.model.settings.blocks
    exits = sorted({line["blocks"] for line in manifest.get("depth_curve", ()) if line["blocks"] < every})
    index = IndexSettings(**manifest["recipe"][IndexSettings.section])
    looks, entries = LOOKS.get(manifest["index"]["kind"], ("", ()))
    most = lists(recommender.lines) if looks == "probes" else recommender.lines
    tried: list[dict[str, Any]] = [{looks: entry} for entry in sorted({min(entry, most) for entry in entries})]
    searches = [replace(index, **entry) for entry in tried]
    return [unranked, *ranked], [*map(DepthSettings, exits), DepthSettings()], searches or [index], looks


def judge_profiles(
    recommender: Recommender,
    worth: Callable[[Profile, Callable[[int], None]], dict[str, float]],
    users: int,
    progress: Progress,
) -> dict[Profile, dict[str, float]]:
    """Quality of all profiles that are not dominated in principle, in ascending order of their settings."""
    ranked, depths, searches, looks = choices(recommender)
    known: dict[Profile, dict[str, float]] = {}

    def judged(profile: Profile, what: str, number: int, of: int) -> dict[str, float]:
        if profile not in known:
            known[profile] = worth(profile, lambda done: progress(what, number * users + done, of * users))
        progress(what, (number + 1) * users, of * users)
        return known[profile]

    def better(entries: list[Choice], beside: Callable[[Choice, int], Profile], what: str) -> list[Choice]:
        """The entries that are better than each cheaper one beside the cheapest (0) or the fullest (-1) of the others."""
        if len(entries) == 1:
            return entries
        kept: list[Choice] = []
        best = [-1.0, -1.0]
        for number, entry in enumerate(entries):
            ends = enumerate((0, -1), 2 * number)
            found = [judged(beside(entry, end), what, place, 2 * len(entries))[f"ndcg@{K}"] for place, end in ends]
            if any(map(operator.gt, found, best)):
                kept.append(entry)
            best = list(map(max, found, best))
        return kept

    depths = better(depths, lambda depth, end: Profile(ranked[end], depth, searches[end], looks), "depths")
    searches = better(searches, lambda search, end: Profile(ranked[end], depths[end], search, looks), "searches")
    rest = [Profile(*parts, looks) for parts in itertools.product(ranked, depths, searches)]
    return {profile: judged(profile, "judged", number, len(rest)) for number, profile in enumerate(rest)}


def requests(recommender: Recommender, sequences: Sequences, users_B: torch.Tensor, k: int) -> list[dict[str, Any]]:
    """What Recommender.answer is asked for users of the validation split: their history, when their next event happened."""
    begins_U, ends_U, _ = sequences.windows("validation")
    known, asked = range(FIRST_ITEM, FIRST_ITEM + len(recommender.catalogue)), []
    for begin, end in zip(begins_U[users_B].tolist(), ends_U[users_B].tolist(), strict=True):
        rows, times = sequences.items[begin:end].tolist(), sequences.times[begin : end + 1].tolist()
        events = [(recommender.catalogue.item_id(row), when) for row, when in zip(rows, times, strict=False) if row in known]
        history, when = [item for item, _ in events], [when for _, when in events]
        asked.append({"history": history, "times": when, "now": times[-1] if recommender.reads_now else None, "k": k})
    return asked


def time_answers(
    recommenders: Sequence[Recommender], asked: Sequence[Mapping[str, Any]], progress: Progress, what: str = "timed"
) -> list[Timed]:
    """How long each takes for an answer, of REQUESTS; each request goes to all of them in turn, each time to another first."""
    seconds: list[list[float]] = [[] for _ in recommenders]
    for number in range(-WARM, REQUESTS):
        request = asked[number % len(asked)]
        for place in range(len(recommenders)):
            chosen = (number + place) % len(recommenders)
            answer, find = recommenders[chosen].answer, recommenders[chosen].catalogue.by_id
            started = time.perf_counter()
            answer(**request, find=find)
            if number >= 0:
                seconds[chosen].append(time.perf_counter() - started)
        if number >= 0:
            progress(what, (number + 1) * len(recommenders), REQUESTS * len(recommenders))
    return [Timed.of(part) for part in seconds]


def frontier(measured: Sequence[Measured], budget: Budget) -> list[Measured]:
    """Those that no other beats in both NDCG and cost: each costs more and is better than the one before."""
    kept: list[Measured] = []
    for one in sorted(measured, key=lambda one: (budget.cost(one.timed), -one.ndcg)):
        if not kept or one.ndcg > kept[-1].ndcg:
            kept.append(one)
    return kept


def choose(measured: Sequence[Measured], budget: Budget, again: Callable[[Measured], Timed]) -> tuple[Measured, list[Timed]]:
    """The best within the budget that keeps it when it is measured again, of equals the cheapest; and all times of `again`.

    Raises RequestError: there is none.
    """
    line = frontier(measured, budget)
    alone: list[Timed] = []
    for one in reversed([one for one in line if budget.cost(one.timed) <= budget.limit]):
        alone.append(again(one))
        if budget.cost(alone[-1]) <= budget.limit:
            return one, alone
    found = budget.said(budget.cost(line[0].timed)) + (f", alone {budget.said(budget.cost(alone[-1]))}" if alone else "")
    settings = ", ".join(f"{name} {value}" for name, value in line[0].profile.record().items() if value is not None)
    raise RequestError(
        f"no profile keeps to {budget.said(budget.limit)}: the cheapest ({settings}; NDCG@{K} {line[0].ndcg}) took {found}; "
        "allow more"
    )


def write(found: Found, recommender: Recommender, dataset: Dataset, directory: Directory, out: Path) -> dict[str, Any]:
    """Publish the recommender's bundle with the chosen profile, whole or not at all, and return its manifest.

    What the manifest says of its lists is measured again. Milliseconds stand under `clock`, so that the same choice is the same
    bundle.
    """
    profile, old = found.chosen.profile, directory.manifest
    chosen = profile.of(recommender)
    assert isinstance(chosen.searcher, Index)  # a bundle's
    said, query_ms = measure_bundle(chosen, chosen.searcher, dataset)
    record = found.as_dict()
    settled = {name: record[name] for name in ("limit", "k", "users")}
    judged = {name: record["chosen"][name] for name in (*profile.record(), *found.chosen.quality)}
    milliseconds = {name: record[name] for name in ("chosen", "again", "broken", "frontier")}
    changes = {
        **dict.fromkeys(("faithfulness", "calibration", "changes")),
        **said,
        "recipe": {**old["recipe"], **profile.recipe()},
        "budget": {**settled, "split": "validation", "dataset": dataset.manifest["hash"], "chosen": judged},
        "clock": {"query_ms": round(query_ms, 4), "budget": milliseconds},
    }
    return renew(directory, out, {}, changes).manifest


def draw(found: Found, path: Path) -> None:
    """Write a PNG: NDCG@10 against the p99, or for a price against the mean, of all profiles; the frontier has numbers, which
    stand beside it with what they mean.
    """
    from matplotlib.figure import Figure

    budget, line = found.budget, found.frontier
    name, hour = ("p99_ms" if budget.price is None else "mean_ms"), budget.core_hour or 0.0
    limit = budget.limit if budget.price is None else budget.limit * 3.6 / hour
    figure = Figure(figsize=(12, max(5.2, 1.2 + 0.4 * len(line))), layout="constrained")
    panel, key = figure.subplots(1, 2, width_ratios=[1.7, 1])
    costs, worths = [getattr(one.timed, name) for one in found.measured], [one.ndcg for one in found.measured]
    panel.set_xscale("log")
    panel.scatter(costs, worths, s=30, color="#b9c4cf", label="profiles", zorder=2)
    at = [getattr(one.timed, name) for one in line], [one.ndcg for one in line]
    panel.plot(*at, color="#4c78a8", marker="o", markersize=6, label="frontier", zorder=3)
    ends = [min(costs), max(costs)]
    if ends[0] / 5 <= limit <= ends[1] * 5:  # else the profiles would be pressed together
        ends = [min(ends[0], limit), max(ends[1], limit)]
        panel.axvline(limit, color="#e4572e", linestyle="--", linewidth=1.2, label="budget", zorder=1)
    mark = {"facecolors": "none", "edgecolors": "#e4572e", "linewidths": 1.8}
    panel.scatter(getattr(found.chosen.timed, name), found.chosen.ndcg, s=150, label="chosen", zorder=4, **mark)
    left, before, spread_out = 0, -1.0, max(worths) - min(worths)
    for number, (cost, worth) in enumerate(zip(*at, strict=True), 1):
        left = left + 1 if worth - before < 0.02 * spread_out else 0  # else its number would stand on that of the one before
        panel.annotate(
            str(number), (cost, worth), (-6 - 15 * left, 5), textcoords="offset points", ha="right", fontsize=8, weight="bold"
        )
        before = worth
    panel.set_xlabel(f"milliseconds of an answer, {'99 of 100 within' if budget.price is None else 'mean'} (one thread)")
    panel.set_ylabel(f"NDCG@{K}, {found.users:,} users of the validation split")
    low, high = ends[0] / 1.12, ends[1] * 1.12
    ticks = _ticks(low, high)
    panel.set_xlim(low, high)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.margins(y=0.12)
    panel.grid(color="0.92")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="lower right", fontsize=8, frameon=True, framealpha=0.9, edgecolor="0.9")
    if budget.price is not None:
        above = panel.secondary_xaxis("top", functions=(lambda ms: ms / 3.6 * hour, lambda price: price * 3.6 / hour))
        prices = _ticks(low / 3.6 * hour, high / 3.6 * hour)
        above.set_xticks(prices, [f"{tick:g}" for tick in prices])
        above.minorticks_off()
        above.set_xlabel(f"price of a million answers, at {hour:g} a core-hour")
    key.set_axis_off()
    alone = dict(enumerate(reversed(found.again), 1 + line.index(found.chosen)))  # those that were tried stand in a row
    step = 1 / max(len(line), 10)
    for number, one in enumerate(line, 1):
        chosen, top = one is found.chosen, 1 - (number - 1) * step
        told = f"NDCG@{K} {one.ndcg:.{DIGITS}f} · {getattr(one.timed, name):.2f} ms"
        told += f", alone {getattr(alone[number], name):.2f} ms" if number in alone else ""
        price = budget.priced(one.timed)
        told += "" if price is None else f" · {price:.3g} a million"
        style = {"transform": key.transAxes, "va": "top", "color": "#c23c17" if chosen else "0.15"}
        key.text(0, top, str(number), fontsize=8.5, weight="bold", **style)
        key.text(0.06, top, _words(one.profile, found.measured), fontsize=8.5, weight="bold" if chosen else None, **style)
        key.text(0.06, top - 0.45 * step, told, fontsize=7.5, **style)
    save(figure, path)


def _words(profile: Profile, among: Sequence[Measured]) -> str:
    """A profile by the settings in which those `among` which it stands differ."""
    records = [one.profile.record() for one in among]
    told = {name: value for name, value in profile.record().items() if len({record[name] for record in records}) > 1}
    words = []
    if "ranker_blocks" in told:
        blocks = told.pop("ranker_blocks")
        candidates = told.pop("candidates", profile.serving.candidates)
        ranked = f"{candidates} candidates × {blocks} ranker block{'s' * (blocks > 1)}"
        words.append(ranked if blocks else "as retrieved")
    words += [f"{name} {value}" for name, value in told.items()]
    return " · ".join(words) or "as it is"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, about evenly on a log scale."""
    coarse, fine = (1, 2, 5), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
    steps = coarse if high / low > 20 else (1, 1.5, 2, 3, 4, 5, 6, 8) if high / low > 3 else fine
    tens = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [float(f"{step * 10.0**ten:g}") for ten in tens for step in steps if low <= step * 10.0**ten <= high]
