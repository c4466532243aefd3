"""The attention ranker: each candidate takes its own look at the history, where retrieval has one state for all of them.

B requests · N candidates · S looked-at events, the last of a history · E embedding size · W width · H heads · D width per head
V items · K companions of an item · L tokens of an item · U users
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.attention import TIME_BUCKETS, UNSEEN, View, biases, time_bucket
from recsys.batch import FIRST_ITEM, PADDING, Sequences
from recsys.blocks import in_heads
from recsys.bundle import Directory
from recsys.config import Settings
from recsys.content import Tensors
from recsys.dropout import dropout
from recsys.fusion import ItemContent
from recsys.model import ModelSettings, SequenceModel, put_weights

RANKER = "ranker.safetensors"
COMPANIONS = "companions.safetensors"


@dataclass(frozen=True)
class RankerSettings(Settings):
    """How candidates are ranked; serving reads it from the bundle only."""

    section: ClassVar[str] = "ranker"

    blocks: int = 0
    """Blocks of cross-attention that a candidate goes through; 0: no ranker, lists are as retrieval scores them."""
    width: int = 64
    """Width of a candidate in the ranker."""
    heads: int = 2
    """Attention heads; must divide the width."""
    hidden_size: int = 128
    """Width inside a block's feed-forward layer."""
    span: int = 48
    """Events of a history that a candidate looks at, counted from the last; a multiple of 16."""
    companions: int = 0
    """Items that the same users had, kept for each item: evidence between a candidate and each event; 0: none."""
    ids: bool = False
    """Whether the ranker has item embeddings of its own beside the model's vectors."""
    text: bool = False
    """Whether a candidate is also the tokens of its text, drawn together by the user's state; needs model.text."""
    among: bool = False
    """Whether candidates attend to each other, so that an item's score depends on what else was found."""
    dropout: float = 0.2
    """Share of elements dropped while training; a multiple of 1/256 is used."""
    candidates: int = 200
    """Items that retrieval names for each request."""

    def __post_init__(self) -> None:
        self._at_least(0, "blocks", "companions")
        self._at_least(1, "width", "heads", "hidden_size", "span", "candidates")
        if self.span % 16:  # then torch's kernels give a candidate the same bits in any company
            raise ValueError(f"span must be a multiple of 16, found {self.span}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, found {self.heads} and {self.width}")
        if not 0 <= self.dropout <= 0.99:
            raise ValueError(f"dropout must be from 0 to .99, found {self.dropout}")


@dataclass(frozen=True)
class Companions(Tensors):
    """Which items the same users had, in the training part: for each item those of the largest cosine."""

    rows_RK: Tensor
    """Item rows of companions, int32, ascending in each line; line r belongs to row r; PADDING where there are fewer than K."""
    cosines_RK: Tensor
    """Users of both / root of the product of users of each, float32."""
    users_R: Tensor
    """Users of each item, float32."""

    @staticmethod
    def of(sequences: Sequences, items: int, count: int) -> Companions:
        """Count them; for each item at most `count`."""
        from scipy.sparse import coo_matrix

        train = sequences.histories("train")
        pairs = torch.unique(train.owners << 32 | train.values)
        users_P, rows_P = pairs >> 32, pairs & 0xFFFFFFFF
        rows = FIRST_ITEM + items
        users_R = torch.bincount(rows_P, minlength=rows)[:rows].float()
        matrix = coo_matrix(
            (torch.ones(len(pairs)).numpy(), (rows_P.numpy(), users_P.numpy())), shape=(rows, sequences.users)
        ).tocsr()
        count = min(count, items)
        rows_RK, cosines_RK = torch.zeros(rows, count, dtype=torch.int32), torch.zeros(rows, count)
        block = max(1, min(CHUNK, CELLS // rows))
        for start in range(FIRST_ITEM, rows, block):
            both = torch.from_numpy((matrix[start : start + block] @ matrix.T).toarray())
            own = torch.arange(start, start + len(both))
            both[torch.arange(len(both)), own] = 0
            cosines = both * (users_R[own, None] * users_R).clamp(min=1).rsqrt()
            best, found = cosines.topk(count, dim=1)
            found = found.masked_fill(best <= 0, PADDING)
            order = found.argsort(dim=1)
            rows_RK[own], cosines_RK[own] = found.gather(1, order).int(), best.gather(1, order)
        return Companions(rows_RK, cosines_RK, users_R)


CHUNK = 1024
"""Items whose companions are counted at once, at most."""
CELLS = 2**25
"""Cells of the table of pairs that stand in memory at once: 128 MB."""


@dataclass(frozen=True)
class Known:
    """What is known of items besides their ids in the ranker: line i belongs to row FIRST_ITEM + i."""

    vectors_VE: Tensor
    """Placed vectors, as retrieval scores them."""
    logs_V: Tensor
    """Log of 1 + training events."""
    learnt: int
    """How many items, the first ones, have training events."""
    content: ItemContent | None = None

    @cached_property
    def spread(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the logs of learnt items."""
        learnt = self.logs_V[: self.learnt]
        return learnt.mean(), learnt.std(correction=0).clamp(min=1e-6)

    def logs(self, rows: Tensor) -> Tensor:
        """Of item rows; shape kept."""
        return self.logs_V[(rows - FIRST_ITEM).clamp(0, len(self.logs_V) - 1)]

    def vectors(self, rows: Tensor) -> Tensor:
        """Of item rows of any shape, a further axis E; 0 for rows without a vector."""
        lines = rows - FIRST_ITEM
        some = (lines >= 0) & (lines < len(self.vectors_VE))
        return F.embedding(lines.where(some, 0), self.vectors_VE) * some[..., None]

    def evidence(self, rows_BN: Tensor, scores_BN: Tensor, ranks_BN: Tensor, best_B1: Tensor | None = None) -> Tensor:
        """What retrieval and popularity say of candidates, shape B × N × 3: score below the best, log of the rank, and log
        popularity in deviations from the mean of learnt items. `best` is the best score, if not of these candidates.
        """
        mean, deviation = self.spread
        popularity_BN = (self.logs(rows_BN) - mean) / deviation
        best_B1 = scores_BN.amax(1, keepdim=True) if best_B1 is None else best_B1
        return torch.stack([scores_BN - best_B1, ranks_BN.float().log(), popularity_BN], -1)


@dataclass(frozen=True)
class Look:
    """What the candidates of B requests look at: the last S events of each history, the last one first."""

    states_BSE: Tensor
    """Of the sequence model, after its norm."""
    rows_BS: Tensor
    """Item rows, int64; PADDING behind the first event."""
    ages_BS: Tensor
    """Bucket of the duration from each event to the request, int64."""

    @staticmethod
    def at(states_BTE: Tensor, view: View, owners_P: Tensor, ends_P: Tensor, span: int) -> Look:
        """Of P requests, each made behind position `ends_P` of history `owners_P`."""
        places_PS = ends_P[:, None] - torch.arange(span, device=ends_P.device)
        some_PS, where = places_PS >= 0, (owners_P[:, None], places_PS.clamp(min=0))
        ages_PS = time_bucket(view.asked_BT[owners_P, ends_P][:, None] - view.times_BT[where])
        return Look(states_BTE[where], view.rows_BT[where].masked_fill(~some_PS, PADDING), ages_PS)

    @staticmethod
    def empty(states_BE: Tensor, span: int) -> Look:
        """Of empty histories, as many as there are states."""
        rows_BS = torch.zeros(len(states_BE), span, dtype=torch.int64, device=states_BE.device)
        return Look(states_BE.new_zeros(len(states_BE), span, states_BE.shape[1]), rows_BS, torch.zeros_like(rows_BS))

    def take(self, chosen_B: Tensor | slice) -> Look:
        """Of some of the histories; of a slice of them, without a copy."""
        return Look(self.states_BSE[chosen_B], self.rows_BS[chosen_B], self.ages_BS[chosen_B])

    def to(self, device: torch.device) -> Look:
        return Look(self.states_BSE.to(device), self.rows_BS.to(device), self.ages_BS.to(device))

    def put(self, chosen_B: Tensor, other: Look) -> None:
        """Place another's histories into lines of this."""
        for field in fields(Look):
            getattr(self, field.name)[chosen_B] = getattr(other, field.name)


class CrossBlock(nn.Module):
    """Candidates attend to events, then a feed-forward layer, each pre-normed with a residual."""

    def __init__(self, settings: RankerSettings, timed: bool) -> None:
        super().__init__()
        width = settings.width
        self.heads, self.dropout = settings.heads, settings.dropout
        self.query_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.position_bias = nn.Parameter(torch.empty(settings.heads, settings.span))
        self.time_bias = nn.Parameter(torch.empty(settings.heads, TIME_BUCKETS)) if timed else None
        self.companion_bias = nn.Parameter(torch.empty(settings.heads)) if settings.companions else None
        self.companion_value = nn.Linear(settings.heads, width, bias=False) if settings.companions else None
        self.attention_out = nn.Linear(width, width)
        self.among = nn.Linear(width, 3 * width) if settings.among else None
        self.among_norm = nn.LayerNorm(width) if settings.among else None
        self.forward_norm = nn.LayerNorm(width)
        self.forward_in = nn.Linear(width, 2 * settings.hidden_size)
        self.forward_out = nn.Linear(settings.hidden_size, width)

    def forward(
        self,
        x_BNW: Tensor,
        events_BSW: Tensor,
        look: Look,
        near_BNS: Tensor | None,
        hidden_BN: Tensor,
        generator: torch.Generator | None = None,
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """The candidates with what they drew, shape B × N × W; attention weights are added to `kept`."""
        k, v = self._heads(self.key_value(events_BSW)).unbind()
        weights_BHNS = self._weights(x_BNW, k, look, near_BNS)
        if kept is not None:
            kept.append(weights_BHNS)
        mixed_BHND = weights_BHNS @ v
        drawn_BNW = self.attention_out(mixed_BHND.transpose(1, 2).flatten(2))
        if near_BNS is not None and self.companion_value is not None:
            drawn_BNW = drawn_BNW + self.companion_value((weights_BHNS * near_BNS[:, None]).sum(-1).transpose(1, 2))
        x_BNW = x_BNW + dropout(drawn_BNW, self.dropout, generator)
        if self.among is not None and self.among_norm is not None:
            q, k, v = self._heads(self.among(self.among_norm(x_BNW))).unbind()
            mask = (hidden_BN * UNSEEN)[:, None, None]
            x_BNW = x_BNW + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        a, b = self.forward_in(self.forward_norm(x_BNW)).chunk(2, -1)
        out_BNW: Tensor = x_BNW + dropout(self.forward_out(F.silu(a) * b), self.dropout, generator)
        return out_BNW

    def _weights(self, x_BNW: Tensor, k_BHSD: Tensor, look: Look, near_BNS: Tensor | None) -> Tensor:
        """How much each candidate draws from each event, shape B × H × N × S; 0 for all where there is no event."""
        q_BHND = self._heads(self.query(self.query_norm(x_BNW)))[0]
        logits = (q_BHND * q_BHND.shape[-1] ** -0.5) @ k_BHSD.mT
        some_BS = look.rows_BS != PADDING
        bias_BH1S = (self.position_bias + torch.where(some_BS, 0.0, UNSEEN)[:, None])[:, :, None]
        if self.time_bias is not None:
            bias_BH1S = bias_BH1S + biases(self.time_bias, look.ages_BS[:, None])
        logits = logits + bias_BH1S
        if near_BNS is not None and self.companion_bias is not None:
            logits = logits + self.companion_bias[:, None, None] * near_BNS[:, None]
        weights_BHNS: Tensor = logits.softmax(-1) * some_BS[:, None, None]
        return weights_BHNS

    def _heads(self, x_BMW: Tensor) -> Tensor:
        return in_heads(x_BMW, self.heads, self.query.out_features)


class Ranker(nn.Module):
    """Scores of candidates: that of retrieval, and what each candidate's own look at the history adds to it.

    At first it adds nothing. Attention of candidates to events is that of DIN and its heirs (Zhou et al. 2018), with a softmax
    and biases for how far back and how long ago an event is.
    """

    rows_RK: Tensor
    cosines_RK: Tensor
    users_R: Tensor

    def __init__(
        self,
        settings: RankerSettings,
        model: ModelSettings,
        items: int,
        content: ItemContent | None = None,
        companions: Companions | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.ids = settings, items if settings.ids else 0
        width, size = settings.width, model.embedding_size
        self.table = nn.Embedding(FIRST_ITEM + self.ids, width) if self.ids else None
        self.vector_in = nn.Linear(size, width)
        self.evidence_in = nn.Linear(3, width, bias=False)
        self.state_in = nn.Linear(size, width)
        self.user_in = nn.Linear(size, width)
        if settings.text and content is None:
            raise ValueError("ranker.text is set, and model.text is none")
        reads = content if settings.text else None
        self.token_in = nn.Linear(reads.states_WP.shape[1], 2 * width, bias=False) if reads else None
        self.blocks = nn.ModuleList(CrossBlock(settings, model.time != "none") for _ in range(settings.blocks))
        self.event_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.score_weight = nn.Parameter(torch.empty(width))
        self.user_out = nn.Linear(width, width, bias=False)
        self.retrieval_weight = nn.Parameter(torch.empty(settings.blocks))
        self.companion_weight = nn.Parameter(torch.empty(settings.span)) if settings.companions else None
        some = companions or Companions(torch.zeros(0, 0, dtype=torch.int32), torch.zeros(0, 0), torch.zeros(0))
        for field in fields(Companions):
            self.register_buffer(field.name, getattr(some, field.name), persistent=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> Ranker:
        """Draw all weights anew: maps normal with the deviation of an inverse root of their inputs, the table .02, norms 1;
        biases and all that scores 0, but for the weight of retrieval's score, 1.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight") or name == "retrieval_weight":
                parameter.fill_(1.0)
            elif parameter.ndim < 2 or name.endswith("_bias") or name.startswith("user_out"):
                parameter.zero_()
            else:
                deviation = 0.02 if name.startswith("table") else parameter.shape[1] ** -0.5
                parameter.normal_(0, deviation, generator=generator)
        return self

    def forward(
        self,
        known: Known,
        rows_BN: Tensor,
        scores_BN: Tensor,
        ranks_BN: Tensor,
        look: Look,
        own_B: Tensor | None = None,
        generator: torch.Generator | None = None,
        depth: int | None = None,
        kept: list[Tensor] | None = None,
        best_B1: Tensor | None = None,
    ) -> list[Tensor]:
        """Scores after each block, at most `depth`, shape B × N; what PADDING scores is the caller's to leave out.

        `scores` and `ranks` (from 1) are retrieval's, and so is `best`, its best score, if not of these candidates. In column
        `own_B` stands an item that the user of the history had, as in training: what that user alone tells of companions is not
        counted. Dropout acts where a generator is given. Attention weights are added to `kept`.
        """
        evidence_BN3, user_BW = known.evidence(rows_BN, scores_BN, ranks_BN, best_B1), self.user_in(look.states_BSE)[:, 0]
        x_BNW = self.vector_in(known.vectors(rows_BN)) + self.evidence_in(evidence_BN3) + self._ids(rows_BN)
        if self.token_in is not None and known.content is not None:
            x_BNW = x_BNW + self._text(user_BW, rows_BN, known.content)
        x_BNW = dropout(x_BNW, self.settings.dropout, generator)
        events_BSW = self._events(known, look)
        near_BNS = None if self.companion_weight is None else self.near(rows_BN, look.rows_BS, own_B)
        scores: list[Tensor] = []
        for weight, block in zip(self.retrieval_weight[:depth], self.blocks, strict=False):
            x_BNW = block(x_BNW, events_BSW, look, near_BNS, rows_BN == PADDING, generator, kept)
            y_BNW = self.norm(x_BNW)
            added_BNW = y_BNW * self.score_weight + self.user_out(y_BNW) * user_BW[:, None]
            score_BN = weight * scores_BN + added_BNW.sum(-1)
            if near_BNS is not None and self.companion_weight is not None:
                score_BN = score_BN + (near_BNS * self.companion_weight).sum(-1)
            scores.append(score_BN)
        return scores

    def near(self, rows_BN: Tensor, events_BS: Tensor, own_B: Tensor | None = None) -> Tensor:
        """Root of the cosine of each candidate and event as companions, shape B × N × S; 0 where they are none."""
        count, events = rows_BN.shape[1], events_BS.shape[1]
        known_BS = events_BS.where(events_BS < len(self.rows_RK), PADDING)
        wanted_BM, cosine_BM = self.rows_RK[known_BS].flatten(1), self.cosines_RK[known_BS].flatten(1)
        ordered_BN = rows_BN.int().sort(dim=1).values
        place_BM = torch.searchsorted(ordered_BN, wanted_BM).clamp_(max=count - 1)
        hit_BM = (ordered_BN.gather(1, place_BM) == wanted_BM) & (wanted_BM != PADDING)
        at_M = torch.arange(events, device=rows_BN.device).repeat_interleave(self.rows_RK.shape[1])
        flat = cosine_BM.new_zeros(len(rows_BN), count * events)
        flat.scatter_add_(1, place_BM * events + at_M, cosine_BM * hit_BM)
        first_BN = torch.searchsorted(ordered_BN, rows_BN.int())  # of a candidate that is named twice, one place for both
        near_BNS = flat.view(-1, count, events).gather(1, first_BN[..., None].expand(-1, -1, events))
        if own_B is not None:
            line_B = torch.arange(len(rows_BN), device=rows_BN.device)
            both_BS = self._users(rows_BN[line_B, own_B])[:, None] * self._users(events_BS)
            near_BNS[line_B, own_B] -= both_BS.clamp(min=1).rsqrt()
        return near_BNS.clamp(min=0).sqrt()

    def _events(self, known: Known, look: Look) -> Tensor:
        """What candidates attend to: states and vectors of the events, shape B × S × W."""
        events_BSW: Tensor = self.state_in(look.states_BSE) + self.vector_in(known.vectors(look.rows_BS))
        normed_BSW: Tensor = self.event_norm(events_BSW + self._ids(look.rows_BS))
        return normed_BSW

    def _users(self, rows: Tensor) -> Tensor:
        return self.users_R[rows.where(rows < len(self.users_R), PADDING)]

    def _ids(self, rows: Tensor) -> Tensor | float:
        if self.table is None:
            return 0.0
        learnt = (rows >= FIRST_ITEM) & (rows < FIRST_ITEM + self.ids)
        out: Tensor = self.table(rows.where(learnt, PADDING)) * learnt[..., None]
        return out

    def _text(self, user_BW: Tensor, rows_BN: Tensor, content: ItemContent) -> Tensor:
        """What the user's state draws from the tokens of each candidate, shape B × N × W."""
        assert self.token_in is not None
        tokens_BNL = F.embedding(content.known(rows_BN), content.tokens_RL)
        projected_W2 = self.token_in(content.states_WP.to(self.token_in.weight.dtype))
        k_BNLW, v_BNLW = F.embedding(tokens_BNL, projected_W2).chunk(2, -1)
        logits_BNL = (k_BNLW * user_BW[:, None, None]).sum(-1) * user_BW.shape[-1] ** -0.5
        weights_BNL = logits_BNL.masked_fill(tokens_BNL == 0, UNSEEN).softmax(-1) * (tokens_BNL > 0)
        out: Tensor = (weights_BNL[..., None] * v_BNLW).sum(-2)
        return out


def ranker_from(directory: Directory, model: SequenceModel, device: str = "cpu") -> Ranker | None:
    """The ranker of a run's model directory or of a bundle; None where it has none.

    Raises BundleError: the weights are not those of the settings in the manifest.
    """
    if RANKER not in directory.manifest["files"]:
        return None
    settings = RankerSettings(**directory.manifest["recipe"][RankerSettings.section])
    companions = Companions.load(directory.path / COMPANIONS) if settings.companions else None
    ranker = Ranker(settings, model.settings, directory.manifest["items"], model.content, companions)
    put_weights(ranker, directory.path / RANKER, device)
    return ranker.to(device)
