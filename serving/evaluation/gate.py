"""The promotion gate: rules of a recipe that decide, from two reports, whether a challenger becomes champion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from features.dataset import Dataset
from recsys.batch import spread
from recsys.config import Settings
from recsys.errors import RequestError
from recsys.metrics import METRICS
from recsys.progress import Progress
from serving.engine import Recommender
from serving.evaluation import numbers
from serving.evaluation.budget import REQUESTS, requests, time_answers
from serving.evaluation.compare import MODEL, Comparison, compare, in_words, leaks_of
from serving.evaluation.report import Report
from serving.evaluation.statistics import holm, paired

BEATS = "beats "
"""Before a baseline: the name of the rule that it is beaten."""


@dataclass(frozen=True)
class PromotionSettings(Settings):
    """What a challenger must show to become champion; a rule of 0 is none, unless it says otherwise."""

    section: ClassVar[str] = "promotion"

    metric: str = "ndcg@10"
    """What decides: recall, ndcg, mrr, map or hit, at a k."""
    level: float = 0.98
    """Of intervals and tests, two-sided: a challenger that is no better passes in one of a hundred cases."""
    least_gain: float = 0.0
    """What the low end of the gain's interval must pass, as a share of the champion's metric. 0: it must be better; -0.01: it
    must not be worse by 1 %."""
    slice_drop: float = 0.03
    """Share of the champion's metric by which no slice may be down, where its being down is shown; 1: no rule."""
    slice_users: int = 100
    """Users below which a slice is not judged."""
    coverage: float = 0.8
    """Least share of the champion's coverage at the metric's k."""
    latency: float = 1.5
    """Most times the champion's median answer time, one request at a time."""
    latency_ms: float = 0.0
    """Most milliseconds of the median answer."""
    size: float = 2.0
    """Most times the bytes of the champion's bundle."""

    def __post_init__(self) -> None:
        word, _, k = self.metric.partition("@")
        if word not in METRICS or not k.isdecimal() or not int(k):
            raise ValueError(f"metric is {self.metric!r}, must be one of {', '.join(METRICS)} at a k, such as ndcg@10")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"level must be at least 0.5 and below 1, found {self.level}")
        if not (-1 < self.least_gain < 1 and 0 <= self.slice_drop <= 1):
            raise ValueError("least_gain must be above -1 and below 1, slice_drop from 0 to 1")
        self._at_least(0, "slice_users", "coverage", "latency", "latency_ms", "size")

    @property
    def k(self) -> int:
        """Of the metric."""
        return int(self.metric.partition("@")[2])


@dataclass(frozen=True)
class Rule:
    """One rule, and what was found."""

    name: str
    found: float
    limit: float
    holds: bool
    text: str
    """What was found and what is wanted, in words."""

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "found": numbers.finite(self.found)}


@dataclass(frozen=True)
class Costs:
    """What the challenger's answers cost, and the champion's, where there is one."""

    bytes: Sequence[int] = ()
    """Of the bundles."""
    milliseconds: Sequence[float] = ()
    """Of the median answer; empty where it was not measured."""


@dataclass(frozen=True)
class Decision:
    """Whether the challenger becomes champion, and why."""

    rules: Sequence[Rule]
    comparison: Comparison | None
    """With the champion; None where there is none."""

    @property
    def promote(self) -> bool:
        return all(rule.holds for rule in self.rules)

    @property
    def reason(self) -> str:
        """The rules that do not hold, or the first one that does."""
        broken = [rule for rule in self.rules if not rule.holds]
        told = broken or self.rules[:1]
        start = "" if broken else f"all {len(self.rules)} rules hold: "
        first = any(rule.name.startswith(BEATS) for rule in told)
        end = "; without a champion every baseline must be beaten" if first else ""
        return start + "; ".join(rule.text for rule in told) + end

    def as_dict(self) -> dict[str, Any]:
        return {"promote": self.promote, "reason": self.reason, "rules": [rule.as_dict() for rule in self.rules]}


def decide(
    settings: PromotionSettings,
    challenger: Report,
    champion: Report | None,
    costs: Costs | None = None,
    names: tuple[str, str] = ("champion", "challenger"),
) -> Decision:
    """Judge a challenger against the champion by every rule, or, where there is none, against every baseline of its report.

    A rule of costs that are not known is left out; another one that cannot be judged does not hold. `names` are the
    champion's and the challenger's.
    Raises RequestError: as `compare`, or the report has no such metric.
    """
    costs = costs or Costs()
    if champion is None:
        return Decision([*_baselines(settings, challenger), _leaks([challenger]), *_costs(settings, costs)], None)
    comparison = compare([champion], [challenger], names, settings.metric, settings.level)
    rules = [_gain(settings, comparison), _slices(settings, comparison, _left_out(settings, [champion, challenger]))]
    if settings.coverage:
        rules.append(_coverage(settings, comparison))
    return Decision([*rules, _leaks([champion, challenger]), *_costs(settings, costs)], comparison)


def _gain(settings: PromotionSettings, comparison: Comparison) -> Rule:
    """The low end of the relative gain is above the least; where the champion's mean may be 0, that of the gain is above 0."""
    found, limit = comparison.found, settings.least_gain
    sure = math.isfinite(found.relative_low)
    holds = found.relative_low > limit if sure else found.low > 0
    wanted = f"its low end must be above {numbers.percent(limit)} of the champion's"
    return Rule("gain", found.relative_low, limit, holds, f"{in_words(comparison.metric, found)}; {wanted}")


def _coverage(settings: PromotionSettings, comparison: Comparison) -> Rule:
    """The lists' coverage at the metric's k is at least a share of the champion's."""
    name, limit = f"coverage@{settings.k}", settings.coverage
    if name not in comparison.lists:
        word, ks = settings.metric.partition("@")[0], [key.partition("@")[2] for key in comparison.lists if "coverage@" in key]
        other = f"set promotion.metric={word}@{ks[0]}, or " if ks else "set "
        text = f"{name} was not measured; {other}promotion.coverage=0 for no such rule"
        return Rule("coverage", math.nan, limit, False, text)
    before, now = comparison.lists[name]
    share = now / before if before else math.inf
    text = f"{name} {numbers.percent(now)} against {numbers.percent(before)}, × {share:.2f}, at least × {limit:g} is wanted"
    return Rule("coverage", share, limit, share >= limit, text)


def _left_out(settings: PromotionSettings, reports: Sequence[Report]) -> str:
    """What the rule of slices does not judge, in words: those of targets, where the reports have them by other metrics."""
    ends = tuple(f" | {part['by']}: {part['slice']}" for part in reports[0].manifest["slices"] if part["of"] == "targets")
    start = f"{MODEL}: "
    columns = [name for name in reports[0].users.columns if name.startswith(start) and name.endswith(ends)]
    judged = {name.removeprefix(start).partition(" | ")[0] for name in columns if name in reports[1].users.columns}
    if not ends or settings.metric in judged:
        return ""
    return f"; slices of targets are judged by {' and '.join(sorted(judged)) or 'no metric'} alone"


def _slices(settings: PromotionSettings, comparison: Comparison, left_out: str) -> Rule:
    """No slice is down by more than the drop where its being down is shown; p values are adjusted for the judged slices."""
    judged = [part for part in comparison.slices if part.found.users >= settings.slice_users]
    adjusted = holm([part.found.p for part in judged])
    down = [
        (part, p)
        for part, p in zip(judged, adjusted, strict=True)
        if part.found.relative < -settings.slice_drop and p < 1 - settings.level
    ]
    limit = f"{numbers.percent(settings.slice_drop)} is allowed{left_out}"
    changes = [part.found.relative for part, _ in down] or [
        part.found.relative for part in judged if math.isfinite(part.found.relative)
    ]
    worst = min(changes, default=0.0)
    if down:
        told = ", ".join(
            f"{part.by} {part.name} {numbers.percent(part.found.relative, signed=True)} (p {numbers.probability(p)})"
            for part, p in down
        )
        return Rule("slices", worst, -settings.slice_drop, False, f"slices are down: {told}; {limit}")
    text = f"no slice of {len(judged)} is shown to be down by more; {limit}"
    return Rule("slices", worst, -settings.slice_drop, True, text)


def _baselines(settings: PromotionSettings, report: Report) -> list[Rule]:
    """The model beats each baseline, by the same paired test."""
    names = [name for name, kind in report.manifest["listers"].items() if kind == "baseline"]
    rules = []
    for name in names:
        if f"{name}: {settings.metric}" not in report.users.columns:
            raise RequestError(f"the report has no {settings.metric!r} of each user; choose another promotion.metric")
        found = paired(report.values(name, settings.metric), report.values(MODEL, settings.metric), settings.level)
        text = f"against {name} {in_words(settings.metric, found)}"
        rules.append(Rule(f"{BEATS}{name}", found.low, 0.0, found.low > 0, text))
    return rules or [Rule("baselines", 0, 1, False, "there is no champion, and the report has no baseline to beat")]


def _leaks(reports: Sequence[Report]) -> Rule:
    """No figure is of what was learnt already."""
    found = leaks_of(reports)
    text = f"leaks: {', '.join(found)}; figures with leaks decide nothing" if found else "no leaks"
    return Rule("leaks", len(found), 0, not found, text)


def _costs(settings: PromotionSettings, costs: Costs) -> list[Rule]:
    """Latency and size, where they are known."""
    rules = []
    if settings.latency_ms and costs.milliseconds:
        found, limit = costs.milliseconds[0], settings.latency_ms
        text = f"the median answer takes {found:.2f} ms, at most {limit:g} ms are allowed"
        rules.append(Rule("latency_ms", found, limit, found <= limit, text))
    for name, unit, scale, pair in (("latency", "ms", 1.0, costs.milliseconds), ("size", "MB", 1e6, costs.bytes)):
        limit = getattr(settings, name)
        if limit and len(pair) == 2:
            share = pair[0] / pair[1] if pair[1] else math.inf
            what = "the median answer takes" if name == "latency" else "the bundle has"
            text = f"{what} {pair[0] / scale:.2f} {unit} against {pair[1] / scale:.2f} {unit}, × {share:.2f}"
            rules.append(Rule(name, share, limit, share <= limit, f"{text}, at most × {limit:g} is allowed"))
    return rules


def costs_of(recommenders: Sequence[Recommender], dataset: Dataset, progress: Progress = lambda what, done, of: None) -> Costs:
    """Bytes of the bundles, and how long the median answer takes, asked of all in turn with histories of the validation split.

    Without such a split time is not measured.
    """
    sizes = [sum(int(entry["bytes"]) for entry in each.manifest["files"].values()) for each in recommenders]
    first = recommenders[0]
    sequences = first.catalogue.align(dataset)
    users_U = sequences.judged("validation")
    asked = requests(first, sequences, users_U[spread(len(users_U), REQUESTS)], 10)
    if not asked:
        return Costs(sizes)
    timed = time_answers(recommenders, [{**request, "ignore_unknown": True} for request in asked], progress, "answers timed")
    return Costs(sizes, [each.p50_ms for each in timed])
