"""Losses over placed vectors: the mean over targets, exact in its gradient; targets × items never stands in memory.

N targets · E width · S candidates shared by all targets · V items of the catalogue
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.batch import FIRST_ITEM, gather
from recsys.config import Settings
from recsys.model import SequenceModel
from training.negatives import SAMPLINGS, Draw

CHUNK_ELEMENTS = 2**23
"""Logits held at once: 32 MB of float32. Of a million items that is 8 targets; with 2 the full softmax takes twice as long."""
CPU_CHUNK_ROWS = 256
"""Targets of a chunk on the CPU, so that its logits stay in the cache between passes; 64 and 2,048 were slower."""

NOTHING = -80.0
"""Logit below the highest that adds nothing to a sum, even in float64; exp of what underflows takes five times as long."""


@dataclass(frozen=True)
class LossSettings(Settings):
    """What is learnt from each target."""

    section: ClassVar[str] = "loss"

    kind: str = "sampled_softmax"
    """softmax (over the whole catalogue), sampled_softmax, gbce or bce."""
    negatives: int = 512
    """Negatives drawn a batch, shared by its targets; not read by softmax nor by in_batch sampling."""
    sampling: str = "uniform"
    """How negatives are drawn: uniform, popularity (by training events) or in_batch (the other targets)."""
    logq: bool = True
    """Correct sampled_softmax for how often each negative is drawn."""
    calibration: float = 0.75
    """gBCE's t: from 0, plain binary cross-entropy, to 1, scores calibrated as if nothing were sampled."""
    filter_seen: bool = False
    """Leave out of a target's negatives the items that its state has read, as lists leave them out."""

    def __post_init__(self) -> None:
        self._one_of(LOSSES, "kind")
        self._at_least(1, "negatives")
        self._one_of(SAMPLINGS, "sampling")
        self._from_to(0, 1, "calibration")


@dataclass(frozen=True)
class Seen:
    """The items that each target's state has read: `rows_M[begins_N[n] : ends_N[n]]`."""

    rows_M: Tensor
    """Item rows of all events, int64."""
    begins_N: Tensor
    ends_N: Tensor

    def among(self, rows_S: Tensor) -> Seen:
        """The same of the candidates alone, as columns of the ascending `rows_S` in place of rows."""
        column_M = torch.searchsorted(rows_S, self.rows_M).clamp_(max=len(rows_S) - 1)
        found_M = rows_S[column_M] == self.rows_M
        before = F.pad(found_M.cumsum(0), (1, 0))
        return Seen(column_M[found_M], before[self.begins_N], before[self.ends_N])


@dataclass(frozen=True)
class Targets:
    """What N states are to name, and what they tell it apart from."""

    rows_N: Tensor
    """Item rows, int64."""
    negatives: Draw
    """Shared by all; for softmax the whole catalogue."""
    seen: Seen | None = None
    """Items that are no negatives."""


def negatives(settings: LossSettings, counts_V: Tensor, targets_N: Tensor, generator: torch.Generator) -> Draw:
    """Those of a batch with these targets; for softmax all items. `counts_V` are training events, as for a Sampling."""
    if settings.kind == "softmax":
        rows_V = torch.arange(FIRST_ITEM, FIRST_ITEM + len(counts_V), device=counts_V.device)
        return Draw(rows_V, torch.zeros_like(rows_V, dtype=torch.float32))
    return SAMPLINGS[settings.sampling](counts_V, targets_N, settings.negatives, generator)


Loss = Callable[[SequenceModel, Tensor, Targets, LossSettings, torch.Generator], Tensor]
"""Model, placed states N × E, their targets, settings, generator → mean loss."""


def softmax(
    model: SequenceModel, states_NE: Tensor, targets: Targets, settings: LossSettings, generator: torch.Generator
) -> Tensor:
    """Cross-entropy of each target over the whole catalogue."""
    positives_NE, items_SE = model.vectors(targets.rows_N, generator), model.candidates(generator)
    return _mean(states_NE, positives_NE, items_SE, targets, states_NE.new_ones(model.items), _cross_entropy)


def sampled_softmax(
    model: SequenceModel, states_NE: Tensor, targets: Targets, settings: LossSettings, generator: torch.Generator
) -> Tensor:
    """Cross-entropy of each target against negatives shared over the batch: one matrix product.

    With `logq` a negative weighs 1 / probability of being drawn (Bengio & Senécal 2008), so that the negatives' sum is
    in expectation that of the full softmax.
    """
    log_inclusion_S = targets.negatives.log_inclusion_S.to(states_NE.dtype)
    odds_S = torch.exp(-log_inclusion_S) if settings.logq else torch.ones_like(log_inclusion_S)
    return _sampled(model, states_NE, targets, odds_S, generator, _cross_entropy)


def gbce(
    model: SequenceModel, states_NE: Tensor, targets: Targets, settings: LossSettings, generator: torch.Generator
) -> Tensor:
    """Generalised binary cross-entropy, -β log σ(positive) - Σ log(1 - σ(negative)) (gSASRec, Petrov & Macdonald 2023).

    β = α (t (1 - 1/α) + 1/α), where α is the share of the other items that was drawn and t the calibration.
    """
    share = min(1.0, len(targets.negatives.rows_S) / max(1, model.items - 1))
    beta = 1 - settings.calibration * (1 - share)
    odds_S = states_NE.new_ones(len(targets.negatives.rows_S))
    return _sampled(model, states_NE, targets, odds_S, generator, partial(_binary, beta=beta))


def bce(
    model: SequenceModel, states_NE: Tensor, targets: Targets, settings: LossSettings, generator: torch.Generator
) -> Tensor:
    """Binary cross-entropy of the positive and of every negative: gBCE without calibration."""
    return gbce(model, states_NE, targets, replace(settings, calibration=0.0), generator)


LOSSES: dict[str, Loss] = {"softmax": softmax, "sampled_softmax": sampled_softmax, "gbce": gbce, "bce": bce}

Judge = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Logits N × S, which become weights in place, positive logits N × 1, odds S → summed loss, share N × 1, pull N × 1.

The gradient by logit (n, s) is weight × odds × share, and by the positive logit the pull.
"""


def _cross_entropy(logits_NS: Tensor, positive_N1: Tensor, odds_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    highest_N1 = torch.maximum(logits_NS.amax(1, keepdim=True), positive_N1)
    weights_NS = logits_NS.sub_(highest_N1).clamp_(min=NOTHING).exp_()
    own_N1 = (positive_N1 - highest_N1).exp_()
    normaliser_N1 = torch.mv(weights_NS, odds_S)[:, None] + own_N1
    loss = (normaliser_N1.log() + highest_N1 - positive_N1).sum()
    return loss, 1 / normaliser_N1, own_N1 / normaliser_N1 - 1


def _binary(logits_NS: Tensor, positive_N1: Tensor, odds_S: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    loss = F.softplus(logits_NS).sum() + beta * F.softplus(-positive_N1).sum()
    logits_NS.sigmoid_()
    return loss, torch.ones_like(positive_N1), -beta * torch.sigmoid(-positive_N1)


def _sampled(
    model: SequenceModel, states_NE: Tensor, targets: Targets, odds_S: Tensor, generator: torch.Generator, judge: Judge
) -> Tensor:
    """One look-up of positives and negatives: its gradient is as large as the table, and two would be twice."""
    vectors_ME = model.vectors(torch.cat([targets.rows_N, targets.negatives.rows_S]), generator)
    positives_NE, candidates_SE = vectors_ME.tensor_split([len(targets.rows_N)])
    return _mean(states_NE, positives_NE, candidates_SE, targets, odds_S, judge)


def _mean(
    states_NE: Tensor, positives_NE: Tensor, candidates_SE: Tensor, targets: Targets, odds_S: Tensor, judge: Judge
) -> Tensor:
    """Mean loss of the positive against the candidates, whose rows ascend; the target and what was seen are left out."""
    rows_S, seen = targets.negatives.rows_S, targets.seen
    column_N = torch.searchsorted(rows_S, targets.rows_N).clamp_(max=len(rows_S) - 1)
    hit_N = rows_S[column_N] == targets.rows_N
    loss: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        states_NE, positives_NE, candidates_SE, odds_S, column_N[:, None], hit_N[:, None], seen and seen.among(rows_S), judge
    )
    return loss


class _Chunked(torch.autograd.Function):
    """Makes the gradients while a chunk's logits are at hand, so that nothing of size N × S is kept or computed twice.

    Odds and shares multiply vectors, not logits: fewer passes over the one large tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states_NE: Tensor,
        positives_NE: Tensor,
        candidates_SE: Tensor,
        odds_S: Tensor,
        column_N1: Tensor,
        hit_N1: Tensor,
        seen: Seen | None,
        judge: Judge,
    ) -> Tensor:
        count = len(states_NE)
        rows = min(count, max(1, CHUNK_ELEMENTS // len(candidates_SE)))
        if states_NE.device.type == "cpu":
            rows = min(rows, CPU_CHUNK_ROWS)
        buffer = states_NE.new_empty(rows, len(candidates_SE))
        weighted_SE = candidates_SE * odds_S[:, None]
        states_gradient, positives_gradient = torch.empty_like(states_NE), torch.empty_like(positives_NE)
        candidates_gradient_ES = candidates_SE.new_zeros(candidates_SE.shape[::-1])
        total: Tensor = states_NE.new_zeros(())
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            states, positives, column, hit = states_NE[part], positives_NE[part], column_N1[part], hit_N1[part]
            logits = torch.mm(states, candidates_SE.T, out=buffer[: len(states)])
            logits.scatter_(1, column, logits.gather(1, column).masked_fill_(hit, -torch.inf))
            if seen is not None:
                columns = gather(seen.rows_M, seen.rows_M, seen.begins_N[part], seen.ends_N[part])
                logits.view(-1).index_fill_(0, columns.owners * logits.shape[1] + columns.values, -torch.inf)
            positive = (states * positives).sum(1, keepdim=True)
            loss, share, pull = judge(logits, positive, odds_S)
            total += loss
            states_gradient[part] = torch.addcmul(pull * positives, share, logits @ weighted_SE)
            positives_gradient[part] = pull * states
            candidates_gradient_ES.addmm_((share * states).T, logits)
        candidates_gradient_SE = (candidates_gradient_ES * odds_S).T
        ctx.save_for_backward(states_gradient, positives_gradient, candidates_gradient_SE)
        ctx.count = count
        mean: Tensor = total / count
        return mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradients[0] / ctx.count
        states, positives, candidates = ctx.saved_tensors
        return states * scale, positives * scale, candidates * scale, None, None, None, None, None
