"""Which items may be recommended: deny and allow lists for the whole request, seen items for each history.

B histories · C candidates · V items of the index, whose lines count from 0 (line = row - FIRST_ITEM)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from recsys.batch import FIRST_ITEM, Batch


def allowed_lines(
    items: int, deny: Iterable[int] = (), allow: Iterable[int] | None = None, live_V: Tensor | None = None
) -> Tensor | None:
    """Bool of shape V, True where an item may be recommended; None where nothing is restricted.

    Both lists name item rows; a row on both is denied; an empty allow list allows nothing. `live_V` are the items that any
    request may have (None: all).
    """
    denied = _lines(items, deny)
    if allow is None and not len(denied):
        return live_V
    allowed_V = torch.full((items,), allow is None)
    if allow is not None:
        allowed_V[_lines(items, allow)] = True
    allowed_V[denied] = False
    return allowed_V if live_V is None else allowed_V & live_V


def _lines(items: int, rows: Iterable[int]) -> Tensor:
    lines = torch.tensor([int(row) for row in rows], dtype=torch.int64) - FIRST_ITEM
    return lines[(lines >= 0) & (lines < items)]


def seen(histories: Batch, rows_BC: Tensor) -> Tensor:
    """True where a candidate stands in its own history; bool, shape B × C."""
    owners_B = torch.arange(len(histories), device=rows_BC.device)
    return torch.isin(owners_B[:, None] << 32 | rows_BC, histories.owners << 32 | histories.values)


def until(histories: Batch, now_B: Tensor) -> Batch:
    """The histories as they stood at `now_B`, in seconds since 1970: later events are left out."""
    keep = histories.times <= now_B[histories.owners]
    counts_B = torch.bincount(histories.owners[keep], minlength=len(histories))
    return Batch(histories.values[keep], torch.cat([counts_B.new_zeros(1), counts_B.cumsum(0)]), histories.times[keep])
