"""Negative items, drawn once per batch and shared by all its targets.

V items of the catalogue · N targets · S rows drawn
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.batch import FIRST_ITEM


@dataclass(frozen=True)
class Draw:
    """The negatives of one batch."""

    rows_S: Tensor
    """Item rows, int64, distinct, ascending."""
    log_inclusion_S: Tensor
    """Log probability that such a draw contains the row, float32; subtracted from a logit it is the logQ correction."""


Sampling = Callable[[Tensor, Tensor, int, torch.Generator], Draw]
"""Training events of each item (line i is row FIRST_ITEM + i), the batch's targets, draws → negatives; all on one device."""


def uniform(counts_V: Tensor, targets_N: Tensor, count: int, generator: torch.Generator) -> Draw:
    """The distinct rows of `count` draws from the catalogue, each item as likely as any other."""
    drawn_S = torch.unique(torch.randint(len(counts_V), (count,), generator=generator, device=generator.device))
    return _draw(drawn_S, torch.full_like(drawn_S, 1 / len(counts_V), dtype=torch.float64), count)


def popularity(counts_V: Tensor, targets_N: Tensor, count: int, generator: torch.Generator) -> Draw:
    """The distinct rows of `count` draws in proportion to training events."""
    edges_V = counts_V.cumsum(0, dtype=torch.float64)  # torch.multinomial ends at 2^24 items
    places = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64) * edges_V[-1]
    drawn_S = torch.unique(torch.searchsorted(edges_V, places, right=True).clamp_(max=len(counts_V) - 1))
    return _draw(drawn_S, _shares(counts_V, drawn_S, edges_V[-1]), count)


def in_batch(counts_V: Tensor, targets_N: Tensor, count: int, generator: torch.Generator) -> Draw:
    """The distinct targets of the batch, whatever `count`; they occur in proportion to training events."""
    drawn_S = torch.unique(targets_N) - FIRST_ITEM
    return _draw(drawn_S, _shares(counts_V, drawn_S, counts_V.sum()), len(targets_N))


SAMPLINGS: dict[str, Sampling] = {"uniform": uniform, "popularity": popularity, "in_batch": in_batch}


def _shares(counts_V: Tensor, drawn_S: Tensor, total: Tensor) -> Tensor:
    """Probability of each item in one draw, float64; what was drawn is counted at least once."""
    return counts_V[drawn_S].double().clamp_(min=1) / total.clamp(min=1)


def _draw(drawn_S: Tensor, shares_S: Tensor, count: int) -> Draw:
    """1 - (1 - share)^count, in logs: in float32 the share of one item in millions would vanish beside 1."""
    included_S = -torch.expm1(count * torch.log1p(-shares_S))
    return Draw(drawn_S + FIRST_ITEM, included_S.log().float())
