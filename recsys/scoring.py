"""The one definition of a score: after `place_users` and `place_items`, every score is an inner product.

The loss, the metrics, the index and the ranker all read vectors placed here, so none of them can disagree.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

SIMILARITIES = ("dot", "cosine")


def place_users(states_BE: Tensor, similarity: str, temperature: float) -> Tensor:
    """User states such that score = <state, item vector> = similarity / temperature; shape kept."""
    return (F.normalize(states_BE, dim=-1) if similarity == "cosine" else states_BE) / temperature


def place_items(vectors_NE: Tensor, similarity: str) -> Tensor:
    """Item vectors such that score = <state, item vector>; shape kept."""
    return F.normalize(vectors_NE, dim=-1) if similarity == "cosine" else vectors_NE
