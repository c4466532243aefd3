"""The blocks of a sequence model: each turns states into states of the same shape.

B histories · T positions · H heads · D width per head · E embedding size (H × D)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.attention import Attention, View
from recsys.dropout import dropout

if TYPE_CHECKING:
    from recsys.model import ModelSettings


def in_heads(x_BTE: Tensor, heads: int, size: int) -> Tensor:
    """Split the last axis into parts of a size and these into heads, shape parts × B × H × T × D."""
    return x_BTE.view(*x_BTE.shape[:2], -1, heads, size // heads).permute(2, 0, 3, 1, 4)


class Block(nn.Module):
    """States in, states out. Dropout acts where a generator is given."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.heads, self.dropout = settings.heads, settings.dropout
        self.attention = Attention(settings)
        self.attention_norm = nn.LayerNorm(settings.embedding_size)

    def forward(self, x_BTE: Tensor, view: View, generator: torch.Generator | None = None) -> Tensor:
        raise NotImplementedError

    def attention_weights(self, x_BTE: Tensor, view: View) -> Tensor:
        """How much each position draws from each other, shape B × H × T × T; for reading, not training."""
        q_BHTD, k_BHTD, *_ = self._heads(self._project(x_BTE))
        return self.attention.weights(q_BHTD, k_BHTD, view)

    def _project(self, x_BTE: Tensor) -> Tensor:
        """Queries, keys, values and what else the attention's input is made into, one behind the other in the last axis."""
        raise NotImplementedError

    def _attend(self, projected: Tensor, view: View) -> Tensor:
        """The mixed values of queries, keys and values, shape B × T × E."""
        mixed_BTE: Tensor = self.attention(*self._heads(projected), view).transpose(1, 2).flatten(2)
        return mixed_BTE

    def _heads(self, projected: Tensor) -> Tensor:
        return in_heads(projected, self.heads, self.attention_norm.normalized_shape[0])


class SASRecBlock(Block):
    """Self-attention, then a feed-forward layer, each pre-normed with a residual (SASRec, Kang & McAuley 2018)."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        size, hidden = settings.embedding_size, settings.hidden_size
        self.query_key_value = nn.Linear(size, 3 * size)
        self.attention_out = nn.Linear(size, size)
        self.forward_norm = nn.LayerNorm(size)
        self.forward_in = nn.Linear(size, hidden)
        self.forward_out = nn.Linear(hidden, size)

    def forward(self, x_BTE: Tensor, view: View, generator: torch.Generator | None = None) -> Tensor:
        mixed_BTE = self.attention_out(self._attend(self._project(x_BTE), view))
        x_BTE = x_BTE + dropout(mixed_BTE, self.dropout, generator)
        hidden = dropout(F.gelu(self.forward_in(self.forward_norm(x_BTE))), self.dropout, generator)
        return x_BTE + dropout(self.forward_out(hidden), self.dropout, generator)

    def _project(self, x_BTE: Tensor) -> Tensor:
        projected: Tensor = self.query_key_value(self.attention_norm(x_BTE))
        return projected


class LiGRBlock(Block):
    """Pre-normed attention and SwiGLU layers, each behind a learned sigmoid gate (LiGR, Borisyuk et al. 2025)."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        size, hidden = settings.embedding_size, settings.hidden_size
        self.query_key_value_gate = nn.Linear(size, 4 * size)
        self.attention_out = nn.Linear(size, size)
        self.forward_norm = nn.LayerNorm(size)
        self.forward_in = nn.Linear(size, size + 2 * hidden)
        self.forward_out = nn.Linear(hidden, size)

    def forward(self, x_BTE: Tensor, view: View, generator: torch.Generator | None = None) -> Tensor:
        size, hidden = x_BTE.shape[-1], self.forward_out.in_features
        projected, gate_BTE = torch.split(self._project(x_BTE), [3 * size, size], -1)
        mixed_BTE = self.attention_out(self._attend(projected, view))
        x_BTE = x_BTE + dropout(mixed_BTE, self.dropout, generator) * gate_BTE.sigmoid()
        gate_BTE, a, b = torch.split(self.forward_in(self.forward_norm(x_BTE)), [size, hidden, hidden], -1)
        mixed_BTE = self.forward_out(dropout(F.silu(a) * b, self.dropout, generator))
        out_BTE: Tensor = x_BTE + dropout(mixed_BTE, self.dropout, generator) * gate_BTE.sigmoid()
        return out_BTE

    def _project(self, x_BTE: Tensor) -> Tensor:
        projected: Tensor = self.query_key_value_gate(self.attention_norm(x_BTE))
        return projected


class HSTUBlock(Block):
    """Pointwise attention: SiLU in place of softmax, and an elementwise gate in place of a feed-forward layer.

    Equations 1 to 3 of HSTU (Zhai et al. 2024), with scores scaled by the root of the width as in the other blocks and
    weights divided by `model.length`. It reads no `model.hidden_size`.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        size = settings.embedding_size
        self.query_key_value_gate = nn.Linear(size, 4 * size)
        self.mixed_norm = nn.LayerNorm(size, eps=1e-12)  # fresh weights mix values of deviation 1e-5
        self.attention_out = nn.Linear(size, size)

    def forward(self, x_BTE: Tensor, view: View, generator: torch.Generator | None = None) -> Tensor:
        size = x_BTE.shape[-1]
        projected, gate_BTE = torch.split(self._project(x_BTE), [3 * size, size], -1)
        gated_BTE = dropout(self.mixed_norm(self._attend(projected, view)) * gate_BTE, self.dropout, generator)
        out_BTE: Tensor = x_BTE + self.attention_out(gated_BTE)
        return out_BTE

    def _project(self, x_BTE: Tensor) -> Tensor:
        return F.silu(self.query_key_value_gate(self.attention_norm(x_BTE)))


BLOCKS: dict[str, type[Block]] = {"sasrec": SASRecBlock, "ligr": LiGRBlock, "hstu": HSTUBlock}
