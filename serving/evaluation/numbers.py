"""Figures as people read them: every one with its interval or its unit, a dash where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NONE = "–"
"""Stands for a figure that there is none of."""
MINUS, SPACE = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Metric:
    """What a metric is called, the unit it is written in, and what it says in one sentence."""

    title: str
    unit: str
    """`score` from 0 to 1, `share` as %, `lift` as % more or less, or `bits`."""
    meaning: str


METRICS = {
    "ndcg": Metric("NDCG", "score", "Targets found, those at the top of the list counting most; 1 is the best possible order."),
    "recall": Metric("Recall", "score", "Targets among the first k items, of those that could be there; mean over users."),
    "mrr": Metric("MRR", "score", "1 / rank of the first target found, 0 where none is; mean over users."),
    "map": Metric("MAP", "score", "Share of targets among the items down to each target found; mean over targets and users."),
    "hit": Metric("Hit rate", "score", "Share of users with at least one target among the first k items."),
    "coverage": Metric("Coverage", "share", "Items that are in at least one list, of all that may be recommended."),
    "gini": Metric("Gini", "score", "How unevenly the places of lists go to items: 0 all alike, 1 all to one item."),
    "novelty": Metric("Novelty", "bits", "How rare the items of a list are in training: one bit more is half as frequent."),
    "diversity": Metric("Diversity", "score", "How unlike two items of a list are by who had them: 1 less their mean cosine."),
    "popularity_lift": Metric(
        "Popularity lift", "lift", "How much more popular the items of lists are than those of the same users' histories."
    ),
    "serendipity": Metric("Serendipity", "score", "Targets found that popularity would not have listed; mean over users."),
}


@dataclass(frozen=True)
class Estimate:
    """A figure, and the 95 % interval around it where there is one."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def numbers(self) -> tuple[float, ...]:
        """The mean, then the interval's ends where there is one."""
        return (self.mean,) if self.low is None or self.high is None else (self.mean, self.low, self.high)

    @classmethod
    def of(cls, figure: Any) -> Estimate | None:
        """From a report's `{"mean", "low", "high"}`, or a bare number; None where there is no finite number."""
        given = figure if isinstance(figure, Mapping) else {"mean": figure}
        mean, low, high = (finite(given.get(name)) for name in ("mean", "low", "high"))
        if mean is None:
            return None
        return cls(mean) if low is None or high is None else cls(mean, low, high)


def finite(number: Any) -> float | None:
    """The number, or None where it is none: missing, NaN or infinite."""
    return float(number) if isinstance(number, int | float) and math.isfinite(number) else None


def around(mean: float, low: float, high: float) -> dict[str, float | None]:
    """A figure of a report: a mean between the ends of its interval."""
    return {"mean": finite(mean), "low": finite(low), "high": finite(high)}


def decimal(number: float, digits: int = 4, signed: bool = False) -> str:
    """`.2031`, `1.2031`, and with `signed` `+.0120`."""
    text = _signed(number, digits, signed)
    return text.replace("0.", ".", 1) if abs(float(f"{number:.{digits}f}")) < 1 else text


def percent(share: float, signed: bool = False) -> str:
    """A share as `31.0 %`; with two places below 1 %."""
    return _signed(100 * share, 1 if abs(share) >= 0.01 or share == 0 else 2, signed) + SPACE + "%"


def count(number: Any, nouns: str = "") -> str:
    """`6,040 users`; a dash for what is no number."""
    found = finite(number)
    if found is None:
        return NONE
    return f"{found:,.0f}" + (SPACE + (nouns.removesuffix("s") if found == 1 else nouns) if nouns else "")


def probability(p: Any) -> str:
    """A p value: `.012`, or `< .001`."""
    found = finite(p)
    return NONE if found is None else "<" + SPACE + ".001" if found < 0.001 else decimal(found, 3)


def known(name: str) -> tuple[Metric, str]:
    """The metric of a name such as `ndcg@10`, and its title: `NDCG@10`. One that is not known is a score."""
    word, at, k = name.partition("@")
    metric = METRICS.get(word, Metric(word.replace("_", " "), "score", ""))
    return metric, metric.title + at + k


def written(name: str, figure: Any, signed: bool = False) -> str:
    """The figure of a metric, with its interval or else its unit: `.2031 [.1962, .2101]`, `31.0 %`, `7.12 bits`.

    `signed` is for differences; those of shares are in points.
    """
    unit = known(name)[0].unit
    if unit == "score":
        return _written(
            figure, lambda number: decimal(number, signed=signed), "" if signed else f"{SPACE}of{SPACE}1", always=False
        )
    if unit == "bits":
        return _written(figure, lambda number: _signed(number, 2, signed), f"{SPACE}bits")
    if signed:
        return _written(figure, lambda number: _signed(100 * number, 1, True), f"{SPACE}points")
    return written_share(figure, unit == "lift")


def written_share(figure: Any, signed: bool = False) -> str:
    """`31.0 %`, or with an interval `+6.1 % [+4.0, +8.2]`."""
    return _written(figure, lambda number: percent(number, signed).removesuffix(f"{SPACE}%"), f"{SPACE}%")


def _written(figure: Any, put: Callable[[float], str], unit: str, always: bool = True) -> str:
    """Mean, unit and interval; the unit of a figure with an interval only if it is `always` there."""
    estimate = Estimate.of(figure)
    if estimate is None:
        return NONE
    mean, *ends = (put(number) for number in estimate.numbers)
    return f"{mean}{unit if always else ''} [{', '.join(ends)}]" if ends else mean + unit


def _signed(number: float, digits: int, signed: bool) -> str:
    """Rounded, with a true minus, thousands apart, and no sign at zero."""
    rounded = round(number, digits) + 0.0
    return (MINUS if rounded < 0 else "+" if signed and rounded > 0 else "") + f"{abs(rounded):,.{digits}f}"
