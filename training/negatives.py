"""Negative items, drawn once per batch and shared by all its targets.

V items of the catalogue · N targets · S distinct negatives
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.batch import FIRST_ITEM


@dataclass(frozen=True)
class Draw:
    """Distinct items, and how likely each was to be among them."""

    rows: Tensor
    """Item rows, ascending, int64, shape S."""
    log_chance: Tensor
    """Log of the probability that such a draw holds the item, float32, shape S."""


Sampling = Callable[[Tensor, Tensor, int, torch.Generator], Draw]
"""Training events of each item (int64, shape V), targets (int64, shape N), how many to draw, generator."""


def uniform(counts_V: Tensor, targets_N: Tensor, count: int, generator: torch.Generator) -> Draw:
    """The distinct ones of `count` draws in which all items are equally likely."""
    items = len(counts_V)
    draws = torch.randint(items, (count,), generator=generator, device=counts_V.device)
    lines_S = torch.unique(draws)
    return _drawn(lines_S, torch.full_like(lines_S, 1 / items, dtype=torch.float64), count)


def popularity(counts_V: Tensor, targets_N: Tensor, count: int, generator: torch.Generator) -> Draw:
    """The distinct ones of `count` draws in proportion to training events."""
    ends_V = counts_V.cumsum(0)
    draws = torch.rand(count, generator=generator, device=counts_V.device, dtype=torch.float64) * ends_V[-1]
    lines_S = torch.unique(torch.searchsorted(ends_V, draws, right=True).clamp(max=len(counts_V) - 1))
    return _drawn(lines_S, counts_V[lines_S] / ends_V[-1], count)


def in_batch(counts_V: Tensor, targets_N: Tensor, count: int, generator: torch.Generator) -> Draw:
    """The targets of the batch, which occur in proportion to training events; `count` is not read."""
    lines_S = torch.unique(targets_N) - FIRST_ITEM
    return _drawn(lines_S, counts_V[lines_S].clamp(min=1) / counts_V.sum().clamp(min=1), len(targets_N))


SAMPLINGS: dict[str, Sampling] = {"uniform": uniform, "popularity": popularity, "in_batch": in_batch}


def _drawn(lines_S: Tensor, chance_S: Tensor, count: int) -> Draw:
    """`chance_S` is that of one draw of `count`: 1 - (1 - chance)^count is that of all."""
    missed_S = count * torch.log1p(-chance_S.clamp(max=1 - 1e-9))
    return Draw(lines_S + FIRST_ITEM, (-torch.expm1(missed_S)).log().float())
