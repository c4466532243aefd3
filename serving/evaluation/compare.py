"""Two reports side by side, or several seeds of each: what differs, how surely, for whom, and what could not have been seen.

U users · S, R reports of either side, one a seed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.bundle import publish
from recsys.errors import RequestError
from serving.evaluation import numbers
from serving.evaluation.report import MANIFEST, Report
from serving.evaluation.statistics import Floats, Paired, compare_seeds, holm, minimal_detectable, minimal_difference

if TYPE_CHECKING:
    import polars as pl

COMPARISON = "comparison.json"
MODEL = "model"
"""The lister of a report that is compared."""
TOLD = ("name", "text", "request_time")
"""What a report says of its protocol that may differ: what it is called, how it is put, and what a model was told."""


@dataclass(frozen=True)
class SlicePaired:
    """A part of the users, or of the targets, with the difference there."""

    by: str
    name: str
    of: str
    """What is sliced: users or targets."""
    found: Paired
    adjusted: float
    """p value after Holm, over all slices."""

    def as_dict(self) -> dict[str, Any]:
        return {"by": self.by, "of": self.of, "slice": self.name, **self.found.as_dict(), "p_adjusted": self.adjusted}


@dataclass(frozen=True)
class Comparison:
    """The second side against the first, by the means over each side's seeds."""

    names: tuple[str, str]
    bundles: tuple[Sequence[str], Sequence[str]]
    """Ids, one a report."""
    dataset: Mapping[str, Any]
    protocol: Mapping[str, Any]
    metric: str
    """The one that decides."""
    level: float
    metrics: Mapping[str, Paired]
    """Of each user's list; p values are not adjusted for their number."""
    lists: Mapping[str, tuple[float, float]]
    """Of all lists together."""
    slices: Sequence[SlicePaired]
    """By the deciding metric."""
    notes: Sequence[str]
    leaks: tuple[Sequence[str], Sequence[str]] = ((), ())
    """Checks of either side's reports that found leaks."""

    @property
    def found(self) -> Paired:
        """By the deciding metric."""
        return self.metrics[self.metric]

    @property
    def better(self) -> str | None:
        """`a` or `b`; None where no difference is shown at the level."""
        if not self.found.p < 1 - self.level:
            return None
        return "b" if self.found.difference > 0 else "a"

    @property
    def detectable(self) -> float:
        """The difference that a comparison such as this one finds 4 times of 5."""
        return minimal_detectable(self.found.sd, self.found.users, 1 - self.level)

    @property
    def verdict(self) -> str:
        """In one sentence; before it one of leaks, where any were found."""
        sides = [f"{name} ({', '.join(found)})" for name, found in zip(self.names, self.leaks, strict=True) if found]
        warning = f"Leaks were found in {' and '.join(sides)}: the figures decide nothing. " if sides else ""
        return warning + self._difference()

    def _difference(self) -> str:
        told, (a, b) = self.found, self.names
        if told.users < 2:
            both = f"{numbers.count(told.users, 'users')} with a figure on both sides"
            return f"{a} and {b} cannot be compared by {numbers.known(self.metric)[1]}: {both}"
        figures = f"{in_words(self.metric, told)} over {numbers.count(told.users, 'users')}"
        if self.better is not None:
            return f"{b} is {'better' if self.better == 'b' else 'worse'} than {a}: {figures}"
        if not told.error:
            return f"{a} and {b} do not differ: {figures}"
        share = f" ({numbers.percent(self.detectable / told.first)})" if told.first else ""
        seen = f"a difference of {numbers.decimal(self.detectable)}{share} would have been found 4 times of 5"
        return f"No difference between {a} and {b} could be shown: {figures}; {seen}"

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: `a` is the first side, `b` the second, differences are b less a."""
        sides = zip(("a", "b"), self.names, self.bundles, strict=True)
        return {
            "kind": "comparison",
            **{side: {"name": name, "bundles": list(ids), "seeds": len(ids)} for side, name, ids in sides},
            "dataset": dict(self.dataset),
            "protocol": dict(self.protocol),
            "users": self.found.users,
            "decisive": self.metric,
            "level": self.level,
            "verdict": self.verdict,
            "better": self.better,
            "mdd": minimal_difference(self.detectable, self.found.first, self.level),
            "won": self.found.wins,
            "lost": self.found.losses,
            "equal": self.found.users - self.found.wins - self.found.losses,
            "metrics": [{"metric": name, **found.as_dict()} for name, found in self.metrics.items()],
            "lists": [{"metric": name, "a": a, "b": b, "difference": b - a} for name, (a, b) in self.lists.items()],
            "slices": [part.as_dict() for part in self.slices],
            "notes": list(self.notes),
            "leaks": {side: list(found) for side, found in zip(("a", "b"), self.leaks, strict=True)},
        }


def compare(
    first: Sequence[Report],
    second: Sequence[Report],
    names: tuple[str, str] = ("A", "B"),
    metric: str = "",
    level: float = 0.95,
) -> Comparison:
    """The second side against the first, user by user.

    `metric` decides (default: the reports' decisive one). Slices are those of the first report.
    Raises RequestError: reports that are not of the same data set, protocol and users, that have no such metric, or one bundle
    twice on a side.
    """
    reports = [*first, *second]
    one, metric = first[0].manifest, metric or str(first[0].manifest["decisive"])
    for report, name in zip(reports, [names[0]] * len(first) + [names[1]] * len(second), strict=True):
        _check_same(one, report.manifest, name)
    bundles = tuple([str(report.manifest["bundle"]) for report in side] for side in (first, second))
    for ids, name in zip(bundles, names, strict=True):
        if len(set(ids)) < len(ids):
            raise RequestError(f"{name}: holds two reports of one bundle, which are no two seeds; leave one out")
    frames = [report.users.sort("user_id") for report in reports]
    if any(not frame["user_id"].equals(frames[0]["user_id"]) for frame in frames):
        counts = " and ".join(sorted({f"{len(frame):,}" for frame in frames}))
        raise RequestError(f"{' and '.join(names)}: the reports are of other users ({counts}); judge both on one data set")
    sides = frames[: len(first)], frames[len(first) :]
    shared = [name for name in frames[0].columns if all(name in frame.columns for frame in frames)]
    own = [name for name in shared if name.startswith(f"{MODEL}: ")]
    metrics = {name.removeprefix(f"{MODEL}: "): _paired(sides, name, level) for name in own if " | " not in name}
    if metric not in metrics:
        raise RequestError(f"the reports have no {metric!r} of each user; give one of {', '.join(metrics)}")
    slices = [(part, _sliced(part, sides, metric, level)) for part in one.get("slices", ())]
    parts = [(part, found) for part, found in slices if found is not None]
    adjusted = holm([found.p for _, found in parts])
    figures = [[report.manifest["figures"][MODEL] for report in side] for side in (first, second)]
    lists = {
        name: (_mean(figures[0], name), _mean(figures[1], name))
        for name in figures[0][0]
        if name not in metrics and all(each.get(name, {}).get("mean") is not None for side in figures for each in side)
    }
    return Comparison(
        names,
        (bundles[0], bundles[1]),
        one["dataset"],
        {key: value for key, value in one["protocol"].items() if key != "request_time"},
        metric,
        level,
        metrics,
        lists,
        [
            SlicePaired(part["by"], part["slice"], part["of"], found, p)
            for (part, found), p in zip(parts, adjusted, strict=True)
        ],
        _notes(first, second, names, metric, bool(parts)),
        (leaks_of(first), leaks_of(second)),
    )


def reports_of(path: Path) -> list[Report]:
    """What a path names: a REPORT directory, or those in a folder, one a seed. Raises RequestError: there is none."""
    folders = [path] if (path / MANIFEST).is_file() else sorted(file.parent for file in path.glob(f"*/{MANIFEST}"))
    if not folders:
        raise RequestError(
            f"{path}: no {MANIFEST} there; give what `recsys evaluate --out` wrote, or a folder of several seeds'"
        )
    return [Report.open(folder) for folder in folders]


def leaks_of(reports: Sequence[Report]) -> list[str]:
    """Checks that found leaks."""
    return sorted({name for report in reports for name in report.manifest["leaks"]["found"]})


def _check_same(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> None:
    """Raises RequestError: `other` was judged otherwise."""
    if one["dataset"]["hash"] != other["dataset"]["hash"]:
        found = " and ".join(
            f"{each['dataset'].get('recipe', '')} {each['dataset']['hash'][:8]}".strip() for each in (one, other)
        )
        raise RequestError(f"{name}: the reports are of two data sets ({found}); judge both on one")
    ours, theirs = ({key: value for key, value in each["protocol"].items() if key not in TOLD} for each in (one, other))
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            raise RequestError(
                f"{name}: the reports are of two protocols ({key}: {ours.get(key)!r}, {theirs.get(key)!r}); judge both by one"
            )


def _paired(sides: tuple[Sequence[pl.DataFrame], Sequence[pl.DataFrame]], column: str, level: float) -> Paired:
    first_SU, second_RU = (np.stack([_column(frame, column) for frame in side]) for side in sides)
    return compare_seeds(first_SU, second_RU, level)


def _sliced(
    part: Mapping[str, Any], sides: tuple[Sequence[pl.DataFrame], Sequence[pl.DataFrame]], metric: str, level: float
) -> Paired | None:
    """The difference in a slice; None where it has fewer than two users, or the metric is not known of its targets."""
    label = f"user: {part['by']}"
    if part["of"] == "users":
        inside = sides[0][0][label] == part["slice"]
        found = _paired(
            ([frame.filter(inside) for frame in sides[0]], [frame.filter(inside) for frame in sides[1]]),
            f"{MODEL}: {metric}",
            level,
        )
    else:
        column = f"{MODEL}: {metric} | {part['by']}: {part['slice']}"
        if any(column not in frame.columns for side in sides for frame in side):
            return None
        found = _paired(sides, column, level)
    return found if found.users > 1 else None


def _column(frame: pl.DataFrame, name: str) -> Floats:
    """Float64; NaN where there is none."""
    return frame[name].cast(float).to_numpy()


def _mean(figures: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([each[name]["mean"] for each in figures]))


def _notes(first: Sequence[Report], second: Sequence[Report], names: tuple[str, str], metric: str, sliced: bool) -> list[str]:
    """What a reader must know beside the figures."""
    title = numbers.known(metric)[1]
    single = [name for name, side in zip(names, (first, second), strict=True) if len(side) == 1]
    notes = [f"{title} decides; p values of the other metrics are not adjusted for their number."]
    if sliced:
        notes.append("p values of slices are adjusted for the number of slices (Holm).")
    if single:
        notes.append(
            f"Of {' and '.join(single)} there is one training: the interval is over users, without the noise between trainings."
        )
    told = {bool(report.manifest["protocol"].get("request_time")) for report in (*first, *second)}
    if len(told) > 1:
        notes.append("One side was told when each user's first target happened, the other was not.")
    return notes


def in_words(metric: str, found: Paired) -> str:
    """A difference with its interval and share of the first's mean: `NDCG@10 +.0120 [+.0080, +.0160], +6.1 %, p < .001`."""
    title, difference = numbers.known(metric)[1], numbers.decimal(found.difference, signed=True)
    if found.users < 2:
        return f"{title} {difference}"
    ends = ", ".join(numbers.decimal(end, signed=True) for end in (found.low, found.high))
    share = f", {numbers.percent(found.relative, signed=True)}" if found.first else ""
    p = numbers.probability(found.p)
    return f"{title} {difference} [{ends}]{share}, p {p if p.startswith('<') else f'= {p}'}"


def write(comparison: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Publish a comparison (`as_dict`, with or without a decision) as comparison.json and comparison.html; the manifest."""
    from serving.evaluation.page import comparison_page

    page = comparison_page(comparison)
    clock = {"created": datetime.now(UTC).isoformat(timespec="seconds")}
    writers = {"comparison.html": lambda path: path.write_text(page, encoding="utf-8")}
    return publish(out, writers, {**comparison, "clock": clock}, COMPARISON).manifest
