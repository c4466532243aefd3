"""Losses over placed vectors: the mean over targets, exact in its gradient; tokens × items never stands in memory.

N targets · E width · S candidates shared by all targets
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recsys.batch import FIRST_ITEM
from recsys.model import SequenceModel
from training import negatives

CHUNK_ELEMENTS = 2**21
"""Logits held at once: 8 MB of float32, which stays near the cache; larger chunks were no faster."""

Loss = Callable[[SequenceModel, Tensor, Tensor, int, torch.Generator], Tensor]


def softmax(model: SequenceModel, states_NE: Tensor, targets_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Cross-entropy of each target over the whole catalogue."""
    everything_S = torch.arange(FIRST_ITEM, FIRST_ITEM + model.items, device=targets_N.device)
    return _cross_entropy(states_NE, model.vectors(targets_N), model.item_vectors(), targets_N, everything_S, 0.0)


def sampled_softmax(
    model: SequenceModel, states_NE: Tensor, targets_N: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Cross-entropy of each target against at most `count` uniform negatives shared over the batch: one matrix product.

    Negative logits carry + log(items / negatives), the logQ correction of uniform draws (Bengio & Senécal 2008), so that
    their sum estimates that of the full softmax.
    """
    negatives_S = negatives.uniform(model.items, count, generator)
    correction = math.log(model.items / len(negatives_S))
    return _cross_entropy(states_NE, model.vectors(targets_N), model.vectors(negatives_S), targets_N, negatives_S, correction)


LOSSES: dict[str, Loss] = {"softmax": softmax, "sampled_softmax": sampled_softmax}


def _cross_entropy(
    states_NE: Tensor, positives_NE: Tensor, candidates_SE: Tensor, targets_N: Tensor, rows_S: Tensor, correction: float
) -> Tensor:
    """Mean of -log softmax of the positive among itself and the candidates; a candidate that is the target is left out.

    `rows_S` are the candidates' item rows, ascending and distinct; `correction` is added to their logits.
    """
    column_N = torch.searchsorted(rows_S, targets_N).clamp(max=len(rows_S) - 1)
    column_N = torch.where(rows_S[column_N] == targets_N, column_N, -1)
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        states_NE, positives_NE, candidates_SE, column_N, correction
    )
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Makes the gradients while a chunk's logits are at hand, so that nothing of size N × S is kept or computed twice."""

    @staticmethod
    def forward(
        ctx: Any, states_NE: Tensor, positives_NE: Tensor, candidates_SE: Tensor, column_N: Tensor, correction: float
    ) -> Tensor:
        chunk = max(1, CHUNK_ELEMENTS // len(candidates_SE))
        states_gradient, positives_gradient = torch.empty_like(states_NE), torch.empty_like(positives_NE)
        candidates_gradient = torch.zeros_like(candidates_SE)
        total: Tensor = states_NE.new_zeros(())
        for start in range(0, len(states_NE), chunk):
            part = slice(start, start + chunk)
            states, positives, columns = states_NE[part], positives_NE[part], column_N[part]
            logits = torch.addmm(states.new_full((1,), correction), states, candidates_SE.T)
            left_out = torch.nonzero(columns >= 0).flatten()
            logits[left_out, columns[left_out]] = -torch.inf
            positive = (states * positives).sum(1, keepdim=True)
            highest = torch.maximum(logits.amax(1, keepdim=True), positive)
            weights = logits.sub_(highest).exp_()
            positive_weight = (positive - highest).exp()
            normaliser = weights.sum(1, keepdim=True) + positive_weight
            total += (normaliser.log() + highest - positive).sum()
            weights.div_(normaliser)
            pull = positive_weight / normaliser - 1
            states_gradient[part] = torch.addmm(pull * positives, weights, candidates_SE)
            positives_gradient[part] = pull * states
            candidates_gradient.addmm_(weights.T, states)
        ctx.save_for_backward(states_gradient, positives_gradient, candidates_gradient)
        ctx.count = len(states_NE)
        mean: Tensor = total / ctx.count
        return mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        scale = gradients[0] / ctx.count
        states, positives, candidates = ctx.saved_tensors
        return states * scale, positives * scale, candidates * scale, None, None
