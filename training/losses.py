"""Losses over placed vectors: the mean over targets, exact in its gradient; targets × items never stands in memory.

N targets · E width · S candidates shared by all targets · V items of the catalogue
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.batch import FIRST_ITEM
from recsys.config import Settings
from recsys.model import SequenceModel
from training.negatives import SAMPLINGS

CHUNK_ELEMENTS = 2**21
"""Logits held at once: 8 MB of float32, which stays near the cache; larger chunks were no faster."""
BOUNDED = 40.0
"""Scores within ± this need no maximum taken out before exp: sums and quotients stay normal numbers of float32."""


@dataclass(frozen=True)
class LossSettings(Settings):
    """What a state is learnt against."""

    section: ClassVar[str] = "loss"

    kind: str = "sampled_softmax"
    """softmax, sampled_softmax, gbce or bce."""
    negatives: int = 512
    """Negatives drawn a batch, shared by its targets; read by all but softmax, for uniform and popularity sampling."""
    sampling: str = "uniform"
    """How negatives are drawn: uniform, popularity (in proportion to events) or in_batch (the targets of the batch)."""
    logq: bool = True
    """Whether sampled_softmax raises each negative's score by -log of its chance to be drawn."""
    calibration: float = 0.75
    """Read by gbce, its t: 0 is plain BCE, 1 undoes the overconfidence that comes of drawing few negatives."""

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise ValueError(f"kind must be one of {', '.join(LOSSES)}, found {self.kind!r}")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, found {self.sampling!r}")
        if self.negatives < 1:
            raise ValueError(f"negatives must be at least 1, found {self.negatives}")
        if not 0 <= self.calibration <= 1:
            raise ValueError(f"calibration must be from 0 to 1, found {self.calibration}")


Loss = Callable[[SequenceModel, Tensor, Tensor, LossSettings, Tensor, torch.Generator], Tensor]
"""Model, states (N × E), targets (item rows, N), settings, training events of each item (V), generator."""


def softmax(
    model: SequenceModel,
    states_NE: Tensor,
    targets_N: Tensor,
    settings: LossSettings,
    counts_V: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Cross-entropy of each target over the whole catalogue."""
    rows_V = torch.arange(FIRST_ITEM, FIRST_ITEM + model.items, device=targets_N.device)
    correction_V = states_NE.new_zeros(model.items)
    return _loss(model, states_NE, targets_N, model.item_vectors(), rows_V, correction_V, None)


def sampled_softmax(
    model: SequenceModel,
    states_NE: Tensor,
    targets_N: Tensor,
    settings: LossSettings,
    counts_V: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Cross-entropy of each target against negatives shared over the batch: one matrix product.

    With logQ correction (Bengio & Senécal 2008) the negatives' sum estimates that of the full softmax.
    """
    drawn = SAMPLINGS[settings.sampling](counts_V, targets_N, settings.negatives, generator)
    correction_S = (-drawn.log_chance if settings.logq else torch.zeros_like(drawn.log_chance)).to(states_NE.dtype)
    return _loss(model, states_NE, targets_N, model.vectors(drawn.rows), drawn.rows, correction_S, None)


def gbce(
    model: SequenceModel,
    states_NE: Tensor,
    targets_N: Tensor,
    settings: LossSettings,
    counts_V: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """-β log σ(target) - Σ log(1 - σ(negative)), the binary cross-entropy of gSASRec (Petrov & Macdonald 2023).

    β = α (t (1 - 1/α) + 1/α) with t the calibration and α the share of the other items that are drawn.
    """
    return _binary(model, states_NE, targets_N, settings, settings.calibration, counts_V, generator)


def bce(
    model: SequenceModel,
    states_NE: Tensor,
    targets_N: Tensor,
    settings: LossSettings,
    counts_V: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """-log σ(target) - Σ log(1 - σ(negative)), the loss of SASRec (Kang & McAuley 2018), with shared negatives."""
    return _binary(model, states_NE, targets_N, settings, 0.0, counts_V, generator)


LOSSES: dict[str, Loss] = {"softmax": softmax, "sampled_softmax": sampled_softmax, "gbce": gbce, "bce": bce}


def _binary(
    model: SequenceModel,
    states_NE: Tensor,
    targets_N: Tensor,
    settings: LossSettings,
    calibration: float,
    counts_V: Tensor,
    generator: torch.Generator,
) -> Tensor:
    drawn = SAMPLINGS[settings.sampling](counts_V, targets_N, settings.negatives, generator)
    share = min(1.0, len(drawn.rows) / max(1, model.items - 1))
    beta = calibration * (share - 1) + 1
    correction_S = states_NE.new_zeros(len(drawn.rows))
    return _loss(model, states_NE, targets_N, model.vectors(drawn.rows), drawn.rows, correction_S, beta)


def _loss(
    model: SequenceModel,
    states_NE: Tensor,
    targets_N: Tensor,
    candidates_SE: Tensor,
    rows_S: Tensor,
    correction_S: Tensor,
    beta: float | None,
) -> Tensor:
    """Mean cross-entropy of the target among itself and the candidates, or with `beta` the binary one of each.

    `rows_S` are the candidates' item rows, ascending and distinct; a candidate that is the target is left out.
    `correction_S` is added to the candidates' scores.
    """
    column_N = torch.searchsorted(rows_S, targets_N).clamp(max=len(rows_S) - 1)
    column_N = torch.where(rows_S[column_N] == targets_N, column_N, -1)
    settings = model.settings
    bounded = settings.similarity == "cosine" and 1 / settings.temperature <= BOUNDED
    loss: Tensor = _Contrast.apply(  # type: ignore[no-untyped-call]
        states_NE, model.vectors(targets_N), candidates_SE, column_N, correction_S, beta, bounded
    )
    return loss


class _Contrast(torch.autograd.Function):
    """Makes the gradients while a chunk's scores are at hand, so that nothing of size N × S is kept or computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        states_NE: Tensor,
        positives_NE: Tensor,
        candidates_SE: Tensor,
        column_N: Tensor,
        correction_S: Tensor,
        beta: float | None,
        bounded: bool,
    ) -> Tensor:
        chunk = max(1, CHUNK_ELEMENTS // len(candidates_SE))
        states_gradient, positives_gradient = torch.empty_like(states_NE), torch.empty_like(positives_NE)
        candidates_gradient = torch.zeros_like(candidates_SE)
        total: Tensor = states_NE.new_zeros(())
        for start in range(0, len(states_NE), chunk):
            part = slice(start, start + chunk)
            states, positives, columns = states_NE[part], positives_NE[part], column_N[part]
            scores = torch.addmm(correction_S, states, candidates_SE.T)
            left_out = torch.nonzero(columns >= 0).flatten()
            scores[left_out, columns[left_out]] = -torch.inf
            positive = (states * positives).sum(1, keepdim=True)
            if beta is None:
                losses, weights, share, pull = _cross_entropy(scores, positive, bounded)
            else:
                losses, weights, share, pull = _binary_cross_entropy(scores, positive, beta)
            states_gradient[part] = (weights @ candidates_SE).mul_(share).addcmul_(pull, positives)
            candidates_gradient.addmm_(weights.T, states * share)
            total += losses
            positives_gradient[part] = pull * states
        ctx.save_for_backward(states_gradient, positives_gradient, candidates_gradient)
        ctx.count = len(states_NE)
        mean: Tensor = total / ctx.count
        return mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradients[0] / ctx.count
        states, positives, candidates = ctx.saved_tensors
        return states * scale, positives * scale, candidates * scale, None, None, None, None


def _cross_entropy(scores_NS: Tensor, positive_N1: Tensor, bounded: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the losses; their derivatives by the scores (made in place) as weights × a share a line; by the positives."""
    if bounded:
        highest = positive_N1.new_zeros(())
        weights = scores_NS.exp_()
    else:
        highest = torch.maximum(scores_NS.amax(1, keepdim=True), positive_N1)
        weights = scores_NS.sub_(highest).exp_()
    positive_weight = (positive_N1 - highest).exp()
    share = 1 / (weights.sum(1, keepdim=True) + positive_weight)
    return (highest - share.log() - positive_N1).sum(), weights, share, positive_weight * share - 1


def _binary_cross_entropy(scores_NS: Tensor, positive_N1: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As _cross_entropy, for -β log σ(positive) - Σ log(1 - σ(score))."""
    losses = F.softplus(scores_NS).sum() + beta * F.softplus(-positive_N1).sum()
    return losses, scores_NS.sigmoid_(), torch.ones_like(positive_N1), beta * (positive_N1.sigmoid() - 1)
