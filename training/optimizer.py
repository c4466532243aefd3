"""The optimiser, its schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from recsys.config import Settings
from recsys.errors import DataError

if TYPE_CHECKING:
    from recsys.model import SequenceModel
    from training.distributed import ShardedTable

KINDS = ("adamw", "muon", "sgd")
TABLE_KINDS = ("same", "sgd", "adagrad", "rowwise_adagrad", "adam")
EPSILON = 1e-8
"""What Adagrad adds to the root by which it divides."""


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """How a gradient becomes a change of the weights."""

    section: ClassVar[str] = "optimizer"

    kind: str = "adamw"
    """adamw or sgd for all weights, or muon for all matrices but tables with adamw for the rest."""
    table: str = "same"
    """Of the item table alone: same (as the rest), sgd, adagrad, rowwise_adagrad (one number a row is kept), or adam. With
    model.embedding "torchrec" all but same change only the rows that a step reads, and processes hold parts of the table."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW, per step."""
    embedding_learning_rate: float = 0.0
    """Peak rate of the tables of items, categories and learnt tokens; 0: learning_rate."""
    muon_learning_rate: float = 0.02
    """Peak rate of Muon, per step; read by muon."""
    warmup_steps: int = 100
    """Steps over which rates rise from 0."""
    weight_decay: float = 0.01
    """Decay of matrices that are no tables, per unit of rate."""
    ema: float = 0.0
    """Decay per step of the moving average of the weights, which is validated and published; 0: the weights themselves."""

    def __post_init__(self) -> None:
        self._one_of(KINDS, "kind")
        self._one_of(TABLE_KINDS, "table")
        if self.table != "same" and self.ema:
            raise ValueError("ema reads the whole table in every step; set it to 0, or table to same")
        self._must("be above 0", lambda value: value > 0, ("learning_rate", "muon_learning_rate"))
        self._at_least(0, "embedding_learning_rate", "warmup_steps", "weight_decay")
        self._must("be at least 0 and below 1", lambda value: 0 <= value < 1, ("ema",))

    def in_parts(self, embedding: str) -> bool:
        """Whether processes hold parts of the table of this backend (model.embedding)."""
        return self.table != "same" and embedding == "torchrec"


LEARN = ("all", "table", "new_rows")
"""Which weights learn: all, those of the item table, or of it the rows of items that the run has not learnt."""


def freeze(model: SequenceModel, learn: str, new_R: Tensor) -> Tensor | None:
    """Let nothing but `learn` be changed; returns the rows of the table whose gradient is to be dropped, None: of no row.

    Raises DataError: no item is new.
    """
    if learn == "all":
        return None
    for name, parameter in model.named_parameters():
        if not name.startswith("table."):
            parameter.requires_grad_(False)
    if learn == "table":
        return None
    if not bool(new_R.any()):
        raise DataError('train.learn is "new_rows" and the run has learnt every item; set it to "table" or "all"')
    return (~new_R).nonzero().flatten().to(model.table.device)


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused, and where asked Muon (Jordan et al. 2024) and an average of the weights.

    Matrices decay; tables, biases of attention, positions, norms and biases do not. The rows of a table in parts, `sharded`,
    change while its gradient is made; they only hear of the rate.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings, sharded: ShardedTable | None = None) -> None:
        self.settings, self.model, self.sharded = settings, model, sharded
        items, table, matrices, rest = [], [], [], []
        for name, parameter in model.named_parameters():
            if name.startswith("table.") and settings.table != "same":
                items.append(parameter)
            elif name.startswith(("table.", "content.", "fusion.category_table")):
                table.append(parameter)
            elif (
                name.startswith(("blocks.", "fusion.", "text_attention.")) and name.endswith(".weight") and parameter.ndim == 2
            ):
                matrices.append(parameter)
            else:
                rest.append(parameter)
        rate, muon = settings.learning_rate, settings.kind == "muon"
        peak = settings.muon_learning_rate if muon else rate
        decaying = {"params": matrices, "peak": peak, "weight_decay": settings.weight_decay}
        groups: list[dict[str, Any]] = [
            {"params": rest, "peak": rate, "weight_decay": 0.0},
            {"params": table, "peak": self.table_peak, "weight_decay": 0.0},
            *([] if muon else [decaying]),
        ]
        adamw = partial(torch.optim.AdamW, betas=(0.9, 0.98), fused=True)
        self.parts: list[torch.optim.Optimizer] = [torch.optim.SGD(groups) if settings.kind == "sgd" else adamw(groups)]
        if muon:
            self.parts.append(Muon([decaying], {"momentum": 0.95}))
        if items and sharded is None:
            self.parts.append(_of_table(settings.table, [{"params": items, "peak": self.table_peak}]))
        self.average = [p.detach().clone() for p in model.parameters()] if settings.ema else []

    @property
    def table_peak(self) -> float:
        """Peak rate of tables."""
        return self.settings.embedding_learning_rate or self.settings.learning_rate

    @property
    def rate(self) -> float:
        """Rate of AdamW, or SGD, in the last step."""
        return float(self.parts[0].param_groups[0]["lr"])

    def begin(self, step: int, steps: int) -> None:
        """Before the gradients of a step are made, whose numbers are those of `step`."""
        if self.sharded is not None:
            self.sharded.set_rate(rate_at(step, steps, self.settings.warmup_steps, self.table_peak))

    @torch.no_grad()
    def step(self, step: int, steps: int) -> None:
        """Apply the gradients and drop them; `step` counts from 0 of `steps` in all."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate_at(step, steps, self.settings.warmup_steps, group["peak"])
            part.step()
            part.zero_grad()
        if self.average:  # young averages follow faster, so that the initial weights are soon forgotten
            decay = min(self.settings.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model holds the average of its weights meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self.average, self.model.parameters() if self.average else (), strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on besides the weights."""
        return {"parts": [part.state_dict() for part in self.parts], "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the optimiser whose state this is."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)


def _of_table(kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser of a table in one piece."""
    if kind == "rowwise_adagrad":
        return RowwiseAdagrad(groups, {})
    return torch.optim.SGD(groups) if kind == "sgd" else torch.optim.Adagrad(groups, eps=EPSILON)


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad (Duchi et al. 2011) with one number a row, the sum of its gradients' mean squares; as in fbgemm."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody gives one
        for group in self.param_groups:
            for table in (table for table in group["params"] if table.grad is not None):
                if not self.state[table]:
                    self.state[table]["squares"] = table.new_zeros(len(table), 1)
                squares_V1 = self.state[table]["squares"].add_(table.grad.square().mean(1, keepdim=True))
                table.addcdiv_(table.grad, squares_V1.sqrt() + EPSILON, value=-group["lr"])


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): steps along the orthogonal part of the momentum, Nesterov's, of each matrix.

    torch's own multiplies bfloat16, a quarter of a training step where the CPU does not.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody gives one
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                if not self.state[matrix]:
                    self.state[matrix]["momentum"] = torch.zeros_like(matrix)
                kept = self.state[matrix]["momentum"]
                kept.lerp_(matrix.grad, 1 - group["momentum"])
                change = orthogonal(matrix.grad.lerp(kept, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(change, alpha=group["lr"] * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5)


NEWTON_SCHULZ, STEPS = (3.4445, -4.7750, 2.0315), 5
"""Coefficients a, b, c of X ← (a + b XXᵀ + c (XXᵀ)²) X: after STEPS times singular values lie around 1 (Jordan et al. 2024)."""


def orthogonal(matrix: Tensor) -> Tensor:
    """U Vᵀ of the matrix U S Vᵀ, nearly, of the same shape.

    The steps multiply Gram matrices of the smaller side, for XXᵀ commutes with what multiplies X: half the work.
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    gram = wide @ wide.T
    product = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    for _ in range(STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product, gram = factor @ product, factor @ gram @ factor
    near: Tensor = product @ wide
    return near if len(matrix) <= matrix.shape[1] else near.T


def rate_at(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from `peak` to a hundredth of it at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
