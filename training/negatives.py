"""Negative items, drawn once per batch and shared by all its targets."""

from __future__ import annotations

import torch
from torch import Tensor

from recsys.batch import FIRST_ITEM


def uniform(items: int, count: int, generator: torch.Generator) -> Tensor:
    """The distinct rows, ascending, of `count` uniform draws from the catalogue; int64, at most `count`."""
    draws = torch.randint(FIRST_ITEM, FIRST_ITEM + items, (count,), generator=generator, device=generator.device)
    rows: Tensor = torch.unique(draws)
    return rows
