"""The optimiser and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused; matrices decay, while embeddings, norms and biases do not."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and name.startswith("blocks.")]
    rest = [p for name, p in model.named_parameters() if not (p.ndim > 1 and name.startswith("blocks."))]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


def rate_at(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from `peak` to a hundredth of it at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
