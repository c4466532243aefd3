"""Self-attention blocks over histories, and the dropout that does not slow them.

B histories · T positions · H heads · D width per head · E embedding size (H × D)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SASRecBlock(nn.Module):
    """Causal self-attention, then a feed-forward layer, each pre-normed with a residual (SASRec, Kang & McAuley 2018)."""

    def __init__(self, embedding_size: int, heads: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(embedding_size)
        self.query_key_value = nn.Linear(embedding_size, 3 * embedding_size)
        self.attention_out = nn.Linear(embedding_size, embedding_size)
        self.forward_norm = nn.LayerNorm(embedding_size)
        self.forward_in = nn.Linear(embedding_size, hidden_size)
        self.forward_out = nn.Linear(hidden_size, embedding_size)

    def forward(self, x_BTE: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """States of the same shape; padding must stand on the right. Dropout acts where a generator is given."""
        x_BTE = x_BTE + dropout(self._attend(self.attention_norm(x_BTE)), self.dropout, generator)
        hidden = dropout(F.gelu(self.forward_in(self.forward_norm(x_BTE))), self.dropout, generator)
        return x_BTE + dropout(self.forward_out(hidden), self.dropout, generator)

    def _attend(self, x_BTE: Tensor) -> Tensor:
        q_BHTD, k_BHTD, v_BHTD = self._heads(x_BTE)
        out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        mixed_BTE: Tensor = self.attention_out(out_BHTD.transpose(1, 2).flatten(2))
        return mixed_BTE

    def _heads(self, x_BTE: Tensor) -> Tensor:
        parts: Tensor = self.query_key_value(x_BTE).unflatten(-1, (3, self.heads, -1))
        return parts.permute(2, 0, 3, 1, 4)

    def attention_weights(self, x_BTE: Tensor) -> Tensor:
        """How much each position looks at each earlier one, shape B × H × T × T, rows sum to 1; for reading, not training."""
        q_BHTD, k_BHTD, _ = self._heads(self.attention_norm(x_BTE))
        logits_BHTT = q_BHTD @ k_BHTD.mT / q_BHTD.shape[-1] ** 0.5
        future_TT = torch.ones(logits_BHTT.shape[-2:], dtype=torch.bool, device=x_BTE.device).triu(1)
        weights_BHTT: Tensor = logits_BHTT.masked_fill(future_TT, -torch.inf).softmax(-1)
        return weights_BHTT


def dropout(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Drop each element with probability `rate` (rounded to 1/256) and scale the rest; without a generator, `x` itself.

    One byte of a counter-based hash per element in place of one float of the sequential generator: on CPU, F.dropout
    of 12,800 × 512 takes 40–80 ms, this 5 (2 threads).
    """
    threshold = round(rate * 256)
    if generator is None or threshold == 0:
        return x
    dropped: Tensor = _Dropout.apply(x, threshold, generator)  # type: ignore[no-untyped-call]
    return dropped


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: int, generator: torch.Generator) -> Tensor:
        keep = random_bytes(x.numel(), generator).view(x.shape) >= threshold
        ctx.save_for_backward(keep)
        ctx.scale = 256 / (256 - threshold)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (gradients[0] * keep).mul_(ctx.scale), None, None


def random_bytes(count: int, generator: torch.Generator) -> Tensor:
    """`count` uniform bytes on the generator's device: SplitMix64 (Steele et al. 2014) of a counter from a drawn seed."""
    device = generator.device
    seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator, device=device)
    x = torch.arange(-(-count // 8), device=device).mul_(_GOLDEN).add_(seed)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1))  # >> keeps the sign: mask it off
        if factor != 1:
            x.mul_(factor)
    return x.view(torch.uint8)[:count]


_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit number
