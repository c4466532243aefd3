"""What the model makes of an item's description: a part of its vector, and tokens that states attend to.

R item rows · K neighbours of an item · L tokens of an item · W token states · P width of a state · M numbers · B histories
T positions · E embedding size · G groups of S positions, which may see U items · H heads · D width per head
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.attention import UNSEEN, View
from recsys.batch import FIRST_ITEM, UNKNOWN
from recsys.content import Content
from recsys.dropout import dropout

if TYPE_CHECKING:
    from recsys.model import ModelSettings


KEPT = 2**26
"""Most elements of keys and values that are kept between requests: 256 MB."""


class ItemContent(nn.Module):
    """Each item's content by row; the rows before FIRST_ITEM, and those behind the last, have none."""

    tokens_RL: Tensor
    pooled_RP: Tensor
    categories_RC: Tensor
    numbers_RM: Tensor
    some_R: Tensor
    neighbours_RK: Tensor
    nearness_RK: Tensor

    def __init__(self, content: Content, vocabulary: int) -> None:
        super().__init__()
        by_row = {name.replace("_V", "_R"): value for name, value in content.by_item.items()}
        for name, value in {**by_row, "some_R": content.some_V[:, None]}.items():
            self.register_buffer(name, F.pad(value, (0, 0, FIRST_ITEM, 0)), persistent=False)
        self.some_R, self.categories = self.some_R[:, 0], int(content.categories)
        self.states_WP: Tensor
        if len(content.states_WP):
            self.register_buffer("states_WP", content.states_WP, persistent=False)
        else:
            self.states_WP = nn.Parameter(torch.empty(1 + vocabulary, content.states_WP.shape[1]))

    @property
    def items(self) -> int:
        return len(self.tokens_RL) - FIRST_ITEM

    def known(self, rows: Tensor) -> Tensor:
        """The rows, UNKNOWN in the place of those behind the last."""
        return torch.where(rows < len(self.tokens_RL), rows, UNKNOWN)

    def pooled(self, rows: Tensor) -> Tensor:
        """The text of each row at length 1: pooled, or its tokens added up where their states are learnt; a further axis P."""
        if self.pooled_RP.shape[1]:
            return F.embedding(rows, self.pooled_RP)
        tokens = F.embedding(rows, self.tokens_RL)
        some = (tokens > 0)[..., None]
        return F.normalize((F.embedding(tokens, self.states_WP) * some).sum(-2), dim=-1)


class Fusion(nn.Module):
    """The part of an item's vector that is not its id: its text, categories and numbers, each by a linear map, added up.

    Each comes at about length 1, so that it is learnt no faster than ids are; elements of size 1 drown them.
    """

    def __init__(self, settings: ModelSettings, content: ItemContent) -> None:
        super().__init__()
        size = settings.embedding_size
        categories = content.categories
        self.text = nn.Linear(content.states_WP.shape[1], size, bias=False)
        self.category_table = nn.Parameter(torch.empty(1 + categories, size)) if categories else None
        self.numbers = nn.Linear(content.numbers_RM.shape[1], size, bias=False) if content.numbers_RM.shape[1] else None

    def forward(self, rows: Tensor, content: ItemContent) -> Tensor:
        """Of item rows of any shape; a further axis E."""
        vectors: Tensor = self.text(content.pooled(rows))
        if self.category_table is not None:
            own = F.embedding(rows, content.categories_RC)
            some = (own > 0)[..., None]
            vectors = vectors + (F.embedding(own, self.category_table) * some).sum(-2) / some.sum(-2).clamp(min=1).sqrt()
        if self.numbers is not None:
            vectors = vectors + self.numbers(F.embedding(rows, content.numbers_RM) / self.numbers.in_features**0.5)
        return vectors


class TextAttention(nn.Module):
    """States attend to the tokens of the last `text_span` items up to their own, behind a gate that starts at 0.

    Cross-attention with a zero gate as in Flamingo (Alayrac et al. 2022), and a learned bias for how far back an item is.
    """

    def __init__(self, settings: ModelSettings, content: ItemContent) -> None:
        super().__init__()
        size, width = settings.embedding_size, content.states_WP.shape[1]
        self.heads, self.span, self.dropout = settings.heads, settings.text_span, settings.dropout
        self.query_norm = nn.LayerNorm(size)
        self.query = nn.Linear(size, size)
        self.key_value = nn.Linear(width, 2 * size, bias=False)
        self.distance_bias = nn.Parameter(torch.empty(self.heads, self.span))
        self.attention_out = nn.Linear(size, size)
        self.gate = nn.Parameter(torch.empty(size))
        self._last: tuple[object, Tensor] = (None, torch.empty(0))

    def forward(self, x_BTE: Tensor, view: View, content: ItemContent, generator: torch.Generator | None = None) -> Tensor:
        """The states with what they drew from the tokens, shape B × T × E."""
        batch, positions, size = x_BTE.shape
        span, groups = min(self.span, positions), -(-positions // min(self.span, positions))
        behind, device = groups * span - positions, x_BTE.device
        at_GU = torch.arange(groups, device=device)[:, None] * span + torch.arange(2 * span - 1, device=device)
        rows_BGU = F.pad(content.known(view.rows_BT), (span - 1, behind))[:, at_GU]
        tokens, k, v = self._keys(rows_BGU.flatten(0, 1), content)
        q = F.pad(self.query(self.query_norm(x_BTE)), (0, 0, 0, behind)).view(batch * groups, span, self.heads, -1)
        back_SU = torch.arange(span, device=device)[:, None] + span - 1 - torch.arange(2 * span - 1, device=device)
        own_G1S1 = F.pad(view.at_T, (0, behind)).view(groups, 1, span, 1)  # an event's place in its own history
        seen_G1SU = (back_SU >= 0) & (back_SU < span) & (back_SU <= own_G1S1)
        bias_HSU = self.distance_bias[:, back_SU.clamp(0, span - 1)]
        seen = seen_G1SU[..., None] & (tokens > 0).view(batch, groups, 1, 1, 2 * span - 1, -1)
        mask = torch.where(seen, bias_HSU[..., None], UNSEEN).flatten(-2).flatten(0, 1)
        some = seen.flatten(-2).any(-1, keepdim=True).flatten(0, 1)
        logits = (q.transpose(1, 2) * q.shape[-1] ** -0.5) @ k.mT
        logits += mask
        mixed = logits.softmax(-1) @ v * some
        mixed_BTE = mixed.transpose(1, 2).reshape(batch, groups * span, size)[:, :positions]
        out_BTE: Tensor = x_BTE + dropout(self.attention_out(mixed_BTE), self.dropout, generator) * self.gate
        return out_BTE

    def weights(self, x_BE: Tensor, rows_BU: Tensor, content: ItemContent) -> Tensor:
        """How the states of last events are mixed, shape B × H × U × L, of their last U items (at most `text_span`).

        Sums to 1 over items and tokens, or to 0 where there are none.
        """
        items = rows_BU.shape[1]
        tokens, k, _ = self._keys(content.known(rows_BU), content)
        q = self.query(self.query_norm(x_BE)).view(len(x_BE), self.heads, 1, -1)
        logits = (q @ k.mT)[:, :, 0] * q.shape[-1] ** -0.5
        logits = logits.view(len(x_BE), self.heads, items, -1) + self.distance_bias[:, :items].flip(1)[..., None]
        logits = torch.where(tokens[:, None] > 0, logits, -torch.inf)
        return logits.flatten(2).softmax(-1).nan_to_num(0.0).view(logits.shape)

    def _keys(self, rows_NU: Tensor, content: ItemContent) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens N × U × L of items, and their keys and values N × H × (U L) × D; each state is projected once."""
        tokens = places = F.embedding(rows_NU, content.tokens_RL)
        count, size = len(content.states_WP), self.query.out_features // self.heads
        if torch.is_grad_enabled() or self.training or count * 2 * self.query.out_features > KEPT:
            states_WP = content.states_WP
            if count > tokens.numel():
                distinct, places = torch.unique(tokens, return_inverse=True)
                states_WP, count = states_WP[distinct], len(distinct)
            projected = self.project(states_WP)
        else:
            projected = self._kept(content.states_WP)
        lines = places.flatten(1)[:, None] + count * torch.arange(self.heads, device=places.device)[:, None]
        k, v = (F.embedding(lines, part.view(-1, size)) for part in projected.unbind())
        return tokens, k, v

    def project(self, states_WP: Tensor) -> Tensor:
        """Keys and values of token states, shape 2 × H × W × D."""
        projected = self.key_value(states_WP.to(self.key_value.weight.dtype))
        parts: Tensor = projected.view(len(states_WP), 2, self.heads, -1).permute(1, 2, 0, 3).contiguous()
        return parts

    def _kept(self, states_WP: Tensor) -> Tensor:
        """`_project` of all states, made once for the weights as they are: most of a request's cost otherwise.

        For a model that is not trained: a fused optimiser changes weights without counting a version.
        """
        now = (self.key_value.weight._version, self.key_value.weight.data_ptr(), states_WP.data_ptr())
        made_of, projected = self._last  # together, since threads share the model
        if made_of != now:
            projected = self.project(states_WP)
            self._last = (now, projected)
        return projected
