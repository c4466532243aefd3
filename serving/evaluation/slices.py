"""Parts of the users and of the targets that are judged alone: where a model is weak, the mean hides it.

U judged users · P (user, target) pairs · V catalogue items
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from features.split import DAY
from recsys.batch import gather
from serving.evaluation.judge import Evaluation

if TYPE_CHECKING:
    import polars as pl

LENGTHS = (5, 10, 20, 50, 100, 200)
"""Events of a history at which a slice begins."""
RECENT_DAYS = 28
ACTIVITIES = (1, 5, 20)
"""Events of those days at which a slice begins."""
AGES = (30, 180)
"""Days at which a slice of item ages begins."""
HEAD = 0.2
"""Share of the items with training events that are the head, most popular first; the others are the tail."""
FEWEST = 20
"""Users of a value of a column; those of rarer values are a slice together."""
VALUES = 24
"""Values of a user column, at most, of which each is a slice; of a column of more numbers the quarters are."""


@dataclass(frozen=True)
class Slice:
    """Some users, or some targets."""

    by: str
    name: str
    of: Literal["users", "targets"]
    chosen: Tensor
    """bool, of shape U or P."""


def slices(found: Evaluation) -> tuple[list[Slice], list[str]]:
    """All slices that anybody is in, and the user columns that make none."""
    sequences, users_U = found.sequences, found.users_U
    begins_U, ends_U, _ = (ends[users_U] for ends in sequences.windows(found.protocol.split))
    asked_U = sequences.times[ends_U]
    history = gather(sequences.items, sequences.times, begins_U, ends_U)
    recent_N = history.times >= asked_U[history.owners] - RECENT_DAYS * DAY
    recent_U = torch.bincount(history.owners[recent_N], minlength=len(users_U))
    out = [Slice("history length", name, "users", chosen_U) for name, chosen_U in _bins(ends_U - begins_U, LENGTHS, " events")]
    activity = f"events in the {RECENT_DAYS} days before"
    out += [Slice(activity, name, "users", chosen_U) for name, chosen_U in _bins(recent_U, ACTIVITIES, " events", least=0)]
    columns, left_out = _columns(found)
    out += [Slice(f"user's {by}", name, "users", chosen_U) for by, name, chosen_U in columns]
    out += [Slice("item popularity", name, "targets", chosen_P) for name, chosen_P in _popularity(found)]
    out += [Slice("item age", name, "targets", chosen_P) for name, chosen_P in _ages(found, asked_U)]
    return [part for part in out if bool(part.chosen.any())], left_out


def _bins(values: Tensor, starts: Sequence[int], unit: str, least: int = 1) -> list[tuple[str, Tensor]]:
    """Names and members of the parts of whole numbers that begin at `least` and at each start."""
    edges = [least, *starts]
    out = []
    for low, after in zip(edges, [*starts, None], strict=True):
        name = f"{low:,}" if after == low + 1 else f"{low:,} or more" if after is None else f"{low:,}–{after - 1:,}"
        out.append((name + unit, (values >= low) & (True if after is None else values < after)))
    return out


def _popularity(found: Evaluation) -> list[tuple[str, Tensor]]:
    counts_R = found.facts.counts_R
    head_R = torch.zeros_like(counts_R, dtype=torch.bool)
    head_R[found.facts.rows_D[: max(1, round(HEAD * int((counts_R > 0).sum())))]] = True
    warm_P, head_P = counts_R[found.targets_P] > 0, head_R[found.targets_P]
    return [
        (f"head: the most popular {100 * HEAD:.0f} % of items", head_P),
        ("tail: the other items with training events", warm_P & ~head_P),
        ("cold: items without training events", ~warm_P),
    ]


def _ages(found: Evaluation, asked_U: Tensor) -> list[tuple[str, Tensor]]:
    """By the days from an item's first event of all to the request."""
    sequences, rows = found.sequences, int(found.sequences.items.max()) + 1
    first_R = torch.full((rows,), torch.iinfo(torch.int64).max).scatter_reduce(
        0, sequences.items.long(), sequences.times, "amin"
    )
    seconds_P = asked_U[found.owners_P] - first_R[found.targets_P]
    ages = _bins(seconds_P.div(DAY, rounding_mode="floor"), AGES, " days", least=0)
    return [("no event before the request", seconds_P <= 0), *((name, part_P & (seconds_P > 0)) for name, part_P in ages)]


def _columns(found: Evaluation) -> tuple[list[tuple[str, str, Tensor]], list[str]]:
    """Slices by the columns of the users' table, and the columns that make none."""
    table = found.dataset.users
    if table is None:
        return [], []
    ids = found.dataset.user_ids.gather(found.users_U.numpy()).alias("user_id").to_frame()
    joined = ids.join(table, on="user_id", how="left", maintain_order="left").drop("user_id")
    out, left_out = [], []
    for column in joined.get_columns():
        names = _names(column)
        if names is None:
            left_out.append(column.name)
            continue
        names = names.fill_null("not known")
        for name in sorted(names.unique(), key=_natural):
            out.append((column.name, name, torch.tensor((names == name).to_numpy())))
    return out, left_out


def _names(column: pl.Series) -> pl.Series | None:
    """The slice of each user by a column, null where it holds nothing; None where it has too many values, or nothing at all."""
    import polars as pl

    number = column.dtype.is_numeric()
    words = column.dtype in (pl.String, pl.Boolean, pl.Date) or isinstance(column.dtype, pl.Categorical | pl.Enum)
    if not (number or words) or column.null_count() == len(column):
        return None
    if column.dtype.is_float():
        column = column.fill_nan(None)
    if column.n_unique() <= VALUES + 1:
        names = column.cast(pl.String)
        few = [name for name, count in names.drop_nulls().value_counts().rows() if count < FEWEST]
        return names.set(names.is_in(few).fill_null(False), "other values") if len(few) > 1 else names
    edges = [float(edge) for part in (0.25, 0.5, 0.75) if number and (edge := column.quantile(part)) is not None]
    if len({*edges}) < 3:
        return None
    low, middle, high = (f"{int(edge):,}" if edge.is_integer() else repr(edge) for edge in edges)
    labels = [f"up to {low}", f"{low} to {middle}", f"{middle} to {high}", f"over {high}"]
    parts = pl.Series(edges).search_sorted(column.cast(pl.Float64).fill_null(0))
    return pl.Series(labels).gather(parts).set(column.is_null(), None)


def _natural(name: str) -> tuple[float, str]:
    """Numbers in their order, also behind words."""
    sides = {"up to ": -0.5, "over ": 0.5, "": 0.0}
    start = next(start for start in sides if name.startswith(start))
    first = name.removeprefix(start).split(" ")[0].replace(",", "")
    return (float(first) + sides[start] if first.replace(".", "", 1).isdecimal() else math.inf), name
