"""What must hold of a night before it goes live, alone and against the night before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from recsys.config import Settings
from serving.nights import Night, lists_file

FIRST = 10
"""Places of a list that are compared with those of the last night."""
SAMPLE = 10_000
"""Users that are compared, about: whole shards, into which users fall by a hash."""


@dataclass(frozen=True)
class GuardSettings(Settings):
    """What a night may be, so that it goes live; else the last night's lists stay."""

    section: ClassVar[str] = "guards"

    covered: float = 0.99
    """Least share of the users that have an item in their list."""
    popular: float = 0.5
    """Largest share of the users that get the most popular items, since the model knows nothing of their history."""
    users: float = 0.8
    """Least number of users, as a share of the last night's."""
    overlap: float = 0.1
    """Least mean share of the first ten items that stood among them last night, of users of both nights."""
    drift: float = 1.0
    """Largest change of the mean score in first place, in standard deviations of last night's."""
    head: float = 0.2
    """Largest change of the share of places that the most popular 1 % of the items take."""

    def __post_init__(self) -> None:
        self._from_to(0, 1, "covered", "popular", "users", "overlap", "head")
        self._at_least(0, "drift")


@dataclass(frozen=True)
class Guard:
    """One rule, and what was found."""

    name: str
    found: float
    limit: float
    least: bool
    """Whether the limit is the least that may be found, not the most."""

    @property
    def holds(self) -> bool:
        return self.found >= self.limit if self.least else self.found <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {
            "guard": self.name,
            "found": self.found,
            "at least" if self.least else "at most": self.limit,
            "holds": self.holds,
        }

    def __str__(self) -> str:
        return f"{self.name} is {self.found:.4g}, {'at least' if self.least else 'at most'} {self.limit:.4g} may be"


def judge(
    settings: GuardSettings, night: Mapping[str, Any], work: Path, last: Night | None, compare: bool = True
) -> list[Guard]:
    """Every guard of a night's manifest and of its files in `work`; those of changes only where there is a last night.

    Lists are compared only with `compare`.
    """
    users = max(night["users"], 1)
    guards = [
        Guard("covered", night["listed"] / users, settings.covered, True),
        Guard("popular", night["popular"] / users, settings.popular, False),
    ]
    if last is None:
        return guards
    before = last.manifest
    guards += [
        Guard("users", night["users"] / max(before["users"], 1), settings.users, True),
        Guard("head", abs(night["head"] - before["head"]), settings.head, False),
    ]
    if night["best"]["lists"] and before["best"]["lists"]:
        apart = abs(night["best"]["mean"] - before["best"]["mean"])
        spread = max(before["best"]["deviation"], 1e-6 * max(1.0, abs(before["best"]["mean"])))
        guards.append(Guard("drift", apart / spread, settings.drift, False))
    if compare and night["listed"] and before["listed"]:
        guards.append(Guard("overlap", overlap(work, int(night["shards"]), last), settings.overlap, True))
    return guards


def overlap(work: Path, shards: int, last: Night) -> float:
    """The mean share of the first items of both nights' lists that they have in common; 0 where no user has lists in both."""
    import polars as pl

    def first(paths: list[Path]) -> pl.LazyFrame:
        table = pl.scan_parquet(paths).filter(pl.col("rank") <= FIRST)
        return table.select(pl.col("user_id", "item_id").cast(pl.String))

    total, users = 0.0, 0
    for shard in range(shards):
        ours = first([work / lists_file(shard)]).collect()
        same = [last.lists(shard)] if last.shards == shards else [last.lists(number) for number in range(last.shards)]
        owners = ours["user_id"].unique()
        theirs = first(same).filter(pl.col("user_id").is_in(owners.implode())).collect()
        lengths = ours.group_by("user_id").len("ours").join(theirs.group_by("user_id").len("theirs"), on="user_id")
        shared = ours.join(theirs, on=["user_id", "item_id"]).group_by("user_id").len("shared")
        both = lengths.join(shared, on="user_id", how="left").select(
            pl.col("shared").fill_null(0) / pl.max_horizontal("ours", "theirs")
        )
        total, users = total + float(both.to_series().sum()), users + len(both)
        if users >= SAMPLE:
            break
    return total / max(users, 1)
