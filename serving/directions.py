"""Item vectors of length 1, made of the others when they are asked for: to hold them all would take as much memory again.

B queries · E width · V items
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from serving.index import Scan
from serving.lists import Array
from serving.vectors import BLOCK


class Directions(Scan):
    """Exact search by the cosine with states of length 1."""

    def __init__(self, vectors_VE: Tensor) -> None:
        super().__init__(vectors_VE, 1.0)

    @cached_property
    def lengths_V(self) -> Tensor:
        """Of the vectors, as they are divided by them."""
        return torch.cat([part.norm(dim=1).clamp(min=1e-12) for part in torch.split(self.vectors_VE, BLOCK)])

    def at(self, lines: Array) -> Array:
        return normalize(torch.from_numpy(super().at(lines)), dim=-1).numpy()

    def _scores(self, states_BE: Tensor, vectors_VE: Tensor, lines_V: Tensor | None) -> Tensor:
        return super()._scores(states_BE, vectors_VE, lines_V) / (
            self.lengths_V if lines_V is None else self.lengths_V[lines_V]
        )
