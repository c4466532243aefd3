"""Which events attend to which, and how strongly: patterns, positions, times; memory linear in a history's length.

B histories · T positions · Q, K positions of a chunk of queries and of its keys · H heads · D width per head · Z buckets
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from recsys.model import ModelSettings

UNSEEN = -1e4
"""Logit of a key that a query may not see: its weight is 0 under softmax and under SiLU, in float32 and bfloat16."""
QUERIES = 512
"""Queries of a history handled at once where scores stand in memory; longer histories compute them again in backward."""
SUMMARIES = 8
"""One in so many positions of a block, the last ones, is seen from all later blocks."""
TIME_BUCKETS = 64
"""Buckets of a duration: 0 for none, then two for each doubling of seconds, up to 2^31."""


@dataclass(frozen=True)
class View:
    """What attention may know of a batch besides its states: padded, events on the left, or packed in one line (B = 1)."""

    lengths_B: Tensor
    """Events of each history, int64."""
    rows_BT: Tensor
    """Item row of each event, int64."""
    at_T: Tensor
    """Position of each event in its history, int64."""
    times_BT: Tensor
    """Time of each event, seconds, int64."""
    asked_BT: Tensor
    """Time at which each state is asked for: the event's own, or that of the next event or request."""
    owners_T: Tensor | None = None
    """Which history each event belongs to, where histories are packed; -1 behind the last."""
    mask: Any = None
    """FlexAttention's mask of packed histories, one for all blocks."""

    @property
    def positions(self) -> int:
        """T: the padded length, or all events of a packed batch."""
        return len(self.at_T)

    @property
    def last(self) -> tuple[Tensor, Tensor]:
        """Where the last event of each padded history stands: its line and its position; of an empty one, position 0."""
        return torch.arange(len(self.lengths_B), device=self.at_T.device), (self.lengths_B - 1).clamp(min=0)

    @cached_property
    def buckets_BTT(self) -> Tensor:
        """Bucket of the duration from each event to each time that is asked for: once for all blocks."""
        return time_bucket(self.asked_BT[:, :, None] - self.times_BT[:, None])

    def take(self, chosen_B: Tensor) -> View:
        """The view of some of the padded histories, by a mask or by lines."""
        return View(
            self.lengths_B[chosen_B], self.rows_BT[chosen_B], self.at_T, self.times_BT[chosen_B], self.asked_BT[chosen_B]
        )


def time_bucket(seconds: Tensor) -> Tensor:
    """Bucket of each duration, int64: floor(2 log2(1 + seconds)), at most TIME_BUCKETS - 1; negative ones count as 0."""
    return (2 * (seconds.float().clamp(min=0) + 1).log2()).clamp(max=TIME_BUCKETS - 1).long()


def _full(queries: Tensor, keys: Tensor, span: int) -> Tensor:
    return (queries - keys).abs() >= 0


def _local(queries: Tensor, keys: Tensor, span: int) -> Tensor:
    return (queries - keys).abs() < span


def _block_sparse(queries: Tensor, keys: Tensor, span: int) -> Tensor:
    same: Tensor = queries // span == keys // span
    return same | (keys % span >= span - max(1, span // SUMMARIES))


def _all_keys(start: int, end: int, positions: int, span: int) -> Tensor:
    return torch.arange(positions)


def _near_keys(start: int, end: int, positions: int, span: int) -> Tensor:
    return torch.arange(max(0, start - span + 1), min(positions, end + span - 1))


def _block_keys(start: int, end: int, positions: int, span: int) -> Tensor:
    keys = torch.arange(positions)
    own = (keys >= start // span * span) & (keys < -(-end // span) * span)
    return keys[own | (keys % span >= span - max(1, span // SUMMARIES))]


@dataclass(frozen=True)
class Pattern:
    """A kind of attention, before causality: the rule, and the keys that any query of [start, end) can see."""

    sees: Callable[[Tensor, Tensor, int], Tensor]
    keys: Callable[[int, int, int, int], Tensor]


PATTERNS: dict[str, Pattern] = {
    "full": Pattern(_full, _all_keys),
    "local": Pattern(_local, _near_keys),
    "block_sparse": Pattern(_block_sparse, _block_keys),
}
"""full: all events; local: the last `span`; block_sparse: the own block of `span` events and each block's last ones
("fixed" attention, Child et al. 2019)."""

POSITIONS = ("learned", "rotary", "relative", "none")
TIMES = ("none", "gaps", "relative", "both")


class Attention(nn.Module):
    """Scores of queries and keys under a pattern, rotary or relative positions and relative time, and the mix of values.

    Rotary positions: Su et al. 2021. Relative positions and log-bucketed relative time are learned biases of each head,
    as in HSTU (Zhai et al. 2024).
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings, self.pattern = settings, PATTERNS[settings.attention]
        self.causal = settings.objective == "causal"
        self.pointwise = settings.block == "hstu"
        buckets = settings.length if self.causal else 2 * settings.length - 1
        relative = settings.positions == "relative"
        self.position_bias = nn.Parameter(torch.empty(settings.heads, buckets)) if relative else None
        timed = settings.time in ("relative", "both")
        self.time_bias = nn.Parameter(torch.empty(settings.heads, TIME_BUCKETS)) if timed else None

    def forward(self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, view: View) -> Tensor:
        """Mixed values, shape B × H × T × D; weights are a softmax, or those of hstu SiLU(score) / model.length."""
        q_BHTD, k_BHTD = self._rotate(q_BHTD, view), self._rotate(k_BHTD, view)
        if view.owners_T is not None:
            return self._packed(q_BHTD, k_BHTD, v_BHTD, view)
        if self._plain and self.causal and self.settings.attention == "full":
            return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        starts = range(0, view.positions, QUERIES)
        again = len(starts) > 1 and torch.is_grad_enabled()
        mix = partial(checkpoint, self._mix, use_reentrant=False) if again else self._mix
        out = [mix(q_BHTD, k_BHTD, v_BHTD, start, view) for start in starts]
        return out[0] if len(out) == 1 else torch.cat(out, 2)

    def weights(self, q_BHTD: Tensor, k_BHTD: Tensor, view: View) -> Tensor:
        """How a state is mixed, shape B × H × T × T; for reading: negative weights count as 0, and rows sum to 1."""
        everything = torch.arange(view.positions, device=q_BHTD.device)
        logits = self._logits(self._rotate(q_BHTD, view), self._rotate(k_BHTD, view), everything, everything, view)
        weights = self._weigh(logits).clamp(min=0)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)

    @property
    def _plain(self) -> bool:
        """Whether a kernel of torch can do it all."""
        return self.position_bias is None and self.time_bias is None and not self.pointwise

    def _seen(self, queries: Tensor, keys: Tensor, view: View) -> Tensor:
        """Whether a query sees a key: bool of shape Q × K where causality hides padding, else B × 1 × Q × K."""
        seen = self.sees(queries[:, None], keys)
        return seen if self.causal else seen & (keys < view.lengths_B[:, None])[:, None, None]

    def _mix(self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, start: int, view: View) -> Tensor:
        """The mixed values of the queries from `start` on, shape B × H × Q × D."""
        end = min(start + QUERIES, view.positions)
        queries = torch.arange(start, end, device=q_BHTD.device)
        keys = self.pattern.keys(start, end, view.positions, self.settings.span).to(q_BHTD.device)
        keys = keys[keys < end] if self.causal else keys
        q = q_BHTD[:, :, start:end]
        k, v = (k_BHTD, v_BHTD) if len(keys) == view.positions else (k_BHTD[:, :, keys], v_BHTD[:, :, keys])
        if self._plain:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self._seen(queries, keys, view))
        return self._weigh(self._logits(q, k, queries, keys, view)) @ v

    def _weigh(self, logits: Tensor) -> Tensor:
        return F.silu(logits) / self.settings.length if self.pointwise else logits.softmax(-1)

    def _logits(self, q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, view: View) -> Tensor:
        """Scores of keys with all biases, UNSEEN where a key is not seen; added in place, for it is memory that they cost."""
        logits: Tensor = (q * q.shape[-1] ** -0.5) @ k.mT
        hidden: Tensor = ~self._seen(queries, keys, view) * UNSEEN
        if self.position_bias is not None:
            far = queries[:, None] - keys
            farthest = self.settings.length - 1  # padding alone is farther
            far = far.clamp(0, farthest) if self.causal else far.clamp(-farthest, farthest) + farthest
            hidden = hidden + biases(self.position_bias, far)
        logits += hidden
        if self.time_bias is not None:
            if len(queries) == len(keys) == view.positions:
                buckets = view.buckets_BTT
            else:
                buckets = time_bucket(view.asked_BT[:, queries, None] - view.times_BT[:, None, keys])
            logits += biases(self.time_bias, buckets)
        return logits

    def _rotate(self, x_BHTD: Tensor, view: View) -> Tensor:
        if self.settings.positions != "rotary":
            return x_BHTD
        half = x_BHTD.shape[-1] // 2
        cos, sin = (part.to(x_BHTD.dtype) for part in self.turns(view.at_T, x_BHTD.shape[-1]))
        left, right = x_BHTD[..., :half], x_BHTD[..., half:]
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    @staticmethod
    def turns(at_T: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of rotary positions, shape T × D / 2."""
        half = width // 2
        angles = at_T[:, None] * 10_000 ** (-torch.arange(half, device=at_T.device) / half)
        return angles.cos(), angles.sin()

    def block_mask(self, owners_T: Tensor, at_T: Tensor) -> Any:
        """FlexAttention's mask of packed histories: an event sees those of its own history that the pattern allows."""
        from torch.nn.attention.flex_attention import create_block_mask

        def seen(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (owners_T[query] == owners_T[key]) & self.sees(at_T[query], at_T[key])

        make: Any = _compiled(create_block_mask) if at_T.is_cuda else create_block_mask
        return make(seen, None, None, len(at_T), len(at_T), device=str(at_T.device))

    def _packed(self, q_1HTD: Tensor, k_1HTD: Tensor, v_1HTD: Tensor, view: View) -> Tensor:
        """The same for packed histories, by FlexAttention: neither scores nor padding stand in memory."""
        from torch.nn.attention.flex_attention import flex_attention

        far, near = self.settings.length - 1, 0 if self.causal else 1 - self.settings.length
        position_bias, time_bias, at_T = self.position_bias, self.time_bias, view.at_T
        times_T, asked_T = view.times_BT[0], view.asked_BT[0]

        def score(logit: Tensor, _b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            if position_bias is not None:
                logit = logit + position_bias[head, (at_T[query] - at_T[key]).clamp(near, far) - near]
            if time_bias is not None:
                logit = logit + time_bias[head, time_bucket(asked_T[query] - times_T[key])]
            return logit

        attend: Any = _compiled(flex_attention) if q_1HTD.is_cuda else flex_attention
        mixed: Tensor = attend(q_1HTD, k_1HTD, v_1HTD, score_mod=score, block_mask=view.mask)
        return mixed

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether a query's position may see a key's, in a history without padding."""
        seen = self.pattern.sees(queries, keys, self.settings.span)
        return seen & (keys <= queries) if self.causal else seen


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function)


def biases(table_HZ: Tensor, buckets: Tensor) -> Tensor:
    """Entries of each head's table: shape H × Q × K for buckets of Q × K, B × H × Q × K for buckets of B × Q × K."""
    found: Tensor = _Biases.apply(table_HZ, buckets)  # type: ignore[no-untyped-call]
    return found


class _Biases(torch.autograd.Function):
    """Indexing whose backward counts into buckets: 20 times faster on the CPU than the one of torch."""

    @staticmethod
    def forward(ctx: Any, table_HZ: Tensor, buckets: Tensor) -> Tensor:
        ctx.save_for_backward(buckets)
        ctx.size = table_HZ.shape[1]
        flat = buckets.flatten()
        return torch.stack([row.index_select(0, flat).view(buckets.shape) for row in table_HZ], -3)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (buckets,) = ctx.saved_tensors
        flat = buckets.flatten()
        heads, exact = gradients[0].unbind(-3), torch.promote_types(gradients[0].dtype, torch.float32)
        return torch.stack([torch.bincount(flat, g.flatten().to(exact), ctx.size) for g in heads]).to(gradients[0].dtype), None
