"""How sure a figure is: bootstrap intervals over users, paired tests, several seeds, many slices, what could be detected.

U users · M columns of values · S, R seeds of either side · G groups of users · D draws
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.evaluation.numbers import around, finite

Floats = npt.NDArray[np.float64]

GROUPS = 20_000
"""Users, or groups of users where there are more, that are drawn again: beyond, an interval changes in its third digit."""
BLOCK = 32
"""Draws at once: 5 MB of weights."""
POWER = 0.8
"""Chance with which the minimal detectable difference is found."""


def bootstrap(
    values_UM: Floats, generator: np.random.Generator, draws: int = 2000, level: float = 0.95
) -> tuple[Floats, Floats]:
    """Percentile bootstrap of the columns' means over users: lower and upper ends, each of shape M (Efron 1979).

    NaN: the user is not of this column, whose mean is a ratio of sums. More than GROUPS users are dealt into so many groups
    at random, and groups are drawn. A column of fewer than two users has NaN for its ends.
    """
    there_UM = ~np.isnan(values_UM)
    users, columns = values_UM.shape
    sums_GM, counts_GM = np.where(there_UM, values_UM, 0.0), there_UM.astype(np.float64)
    if users > GROUPS:
        owners_U = generator.permutation(users) % GROUPS
        sums_GM, counts_GM = _summed(sums_GM, owners_U), _summed(counts_GM, owners_U)
    means_DM, groups = np.empty((draws, columns)), len(sums_GM)
    for start in range(0, draws, BLOCK):
        size = min(BLOCK, draws - start)
        picks_DG = generator.integers(groups, size=(size, groups)) + groups * np.arange(size)[:, None]
        times_DG = np.bincount(picks_DG.ravel(), minlength=size * groups).reshape(size, groups).astype(np.float64)
        with np.errstate(invalid="ignore"):  # a draw without any user of a small column is left out
            means_DM[start : start + size] = (times_DG @ sums_GM) / (times_DG @ counts_GM)
    few_M = there_UM.sum(0) < 2
    means_DM[:, few_M] = 0.0
    low_M, high_M = np.nanquantile(means_DM, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.where(few_M, np.nan, low_M), np.where(few_M, np.nan, high_M)


def _summed(values_UM: Floats, owners_U: npt.NDArray[np.int64]) -> Floats:
    """Sums over the users of each group, shape G × M."""
    return np.stack([np.bincount(owners_U, column_U, GROUPS) for column_U in values_UM.T], axis=1)


@dataclass(frozen=True)
class Paired:
    """Two sides over the same users, and how sure their difference is: the second's mean less the first's."""

    first: float
    second: float
    low: float
    """Of the difference; NaN where it is not known: fewer than two users."""
    high: float
    relative_low: float
    """Of the difference as a share of the first's mean; NaN where that mean may be 0."""
    relative_high: float
    p: float
    """Two-sided; 1 where nothing differs or fewer than two users are there."""
    error: float
    """Standard error of the difference."""
    users: int
    wins: int
    """Users for whom the second is better; `losses` those for whom the first is."""
    losses: int

    @property
    def difference(self) -> float:
        return self.second - self.first

    @property
    def sd(self) -> float:
        """Standard deviation over users that the error stands for."""
        return self.error * math.sqrt(self.users)

    @property
    def relative(self) -> float:
        """The difference as a share of the first's mean; NaN where that is 0."""
        return self.difference / self.first if self.first else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: what is not known is None."""
        return {
            "a": finite(self.first),
            "b": finite(self.second),
            "difference": around(self.difference, self.low, self.high),
            "relative": around(self.relative, self.relative_low, self.relative_high),
            "p": finite(self.p) if self.users > 1 else None,
            "users": self.users,
        }


def paired(first_U: Floats, second_U: Floats, level: float = 0.95) -> Paired:
    """Student's paired t test over users, and its interval; users with a NaN on either side are left out.

    Of the tests in use it is the one that keeps its level and finds most (Smucker et al. 2007; Urbano et al. 2019).
    """
    return compare_seeds(first_U[None], second_U[None], level)


def compare_seeds(first_SU: Floats, second_RU: Floats, level: float = 0.95) -> Paired:
    """The same of the means over several trainings of either side.

    The variance of the difference is that over users of the users' mean differences, and of each side with at least two seeds
    that of the seeds' means; what seeds do to single users is in both, so that it is a little too large. Degrees of freedom are
    those of Welch and Satterthwaite. The interval of the relative difference is the set of shares that the test does not
    reject (Fieller 1954), so that it has 0 in it exactly where that of the difference has.
    """
    from scipy.special import stdtr, stdtrit

    there_U = ~(np.isnan(first_SU).any(0) | np.isnan(second_RU).any(0))
    first_SU, second_RU = first_SU[:, there_U], second_RU[:, there_U]
    users, seeds = int(there_U.sum()), (len(first_SU), len(second_RU))
    first_U, second_U = first_SU.mean(0), second_RU.mean(0)
    apart_U = second_U - first_U
    wins, losses = int((apart_U > 0).sum()), int((apart_U < 0).sum())
    if users < 2:
        first, second = (float(side_U[0]) if users else math.nan for side_U in (first_U, second_U))
        nothing = (math.nan,) * 4
        return Paired(first, second, *nothing, 1.0, math.nan, users, wins, losses)
    first, second = float(first_U.mean()), float(second_U.mean())
    (ours, both), (_, theirs) = (np.cov(first_U, second_U) / users).tolist()
    parts = [(float(apart_U.var(ddof=1)) / users, users - 1)]
    between = [float(np.var(side.mean(1), ddof=1)) / len(side) if len(side) > 1 else 0.0 for side in (first_SU, second_RU)]
    parts += [(variance, count - 1) for variance, count in zip(between, seeds, strict=True)]
    variance = sum(part for part, _ in parts)
    difference, error = second - first, math.sqrt(variance)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts if part) if variance else users - 1.0
    t = float(stdtrit(freedom, (1 + level) / 2))
    p = 2 * float(stdtr(freedom, -abs(difference) / error)) if error else float(difference == 0)
    shares = _fieller(first, second, ours + between[0], theirs + between[1], both, t)
    return Paired(first, second, difference - t * error, difference + t * error, *shares, p, error, users, wins, losses)


def _fieller(first: float, second: float, ours: float, theirs: float, both: float, t: float) -> tuple[float, float]:
    """Ends of second / first - 1, by the means, their variances and covariance; NaN where the first mean may be 0."""
    square, half, rest = first**2 - t**2 * ours, first * second - t**2 * both, second**2 - t**2 * theirs
    if square <= 0:
        return math.nan, math.nan
    root = math.sqrt(max(half**2 - square * rest, 0.0))
    ends = sorted(((half - root) / square - 1, (half + root) / square - 1))
    return ends[0], ends[1]


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number: the chance of any false one stays that of one test (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def minimal_detectable(sd: float, users: int, alpha: float = 0.05) -> float:
    """The true mean difference that a two-sided test at `alpha` finds with chance POWER, from users' standard deviation."""
    from scipy.special import ndtri

    return float((ndtri(1 - alpha / 2) + ndtri(POWER)) * sd / math.sqrt(users)) if users else math.nan


def minimal_difference(least: float, mean: float, level: float) -> dict[str, float | None]:
    """The minimal detectable difference for JSON, also as a share of a mean."""
    share = least / mean if mean else math.nan
    return {"difference": finite(least), "relative": finite(share), "power": POWER, "alpha": round(1 - level, 6)}
