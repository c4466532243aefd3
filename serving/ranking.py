"""What happens to candidates between retrieval and the list: the ranker, diversity, and less popularity.

B histories · N candidates · E width · V items · k places of a list
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from recsys.batch import PADDING
from recsys.config import Settings
from recsys.errors import RequestError
from recsys.ranker import Known, Look, Ranker
from serving.lists import best

CANDIDATES = 200
"""What retrieval names where neither the request nor a ranker says how many."""
STEP = 16
"""Candidates are padded to a multiple of this: then kernels of torch give each the same bits in any company."""


@dataclass(frozen=True)
class ServingSettings(Settings):
    """How candidates become a list."""

    section: ClassVar[str] = "serving"

    candidates: int = 0
    """Items that retrieval names where they are ranked, made diverse or corrected; 0: ranker.candidates, or 200 without one."""
    ranker_blocks: int = -1
    """Blocks of the ranker that a candidate goes through; 0: lists are as retrieval scores them; -1: as many as did best on
    validation, which may be none."""
    diversity: float = 0.0
    """From 0, the best items whatever they are, to 1, each as unlike those before it as can be (maximal marginal relevance)."""
    popularity: float = 0.0
    """What is taken from an item's score for each factor e of its training events, before items are put in order."""

    def __post_init__(self) -> None:
        self._at_least(0, "candidates")
        if self.ranker_blocks < -1:
            raise ValueError(f"ranker_blocks must be at least 0, or -1 for the best, found {self.ranker_blocks}")
        self._from_to(0, 1, "diversity")
        if not math.isfinite(self.popularity):
            raise ValueError(f"popularity must be a number, found {self.popularity}")

    def asked(self, diversity: float | None, popularity: float | None) -> ServingSettings:
        """With what a request says. Raises RequestError: a diversity or popularity that is none."""
        try:
            return replace(
                self,
                diversity=self.diversity if diversity is None else float(diversity),
                popularity=self.popularity if popularity is None else float(popularity),
            )
        except ValueError as error:
            raise RequestError(str(error)) from None


def candidates(settings: ServingSettings, ranker: Ranker | None, blocks: int, k: int, beside: bool = False) -> int:
    """How many items retrieval must name for a list of k: k where they stay in its order and none is wanted `beside` them."""
    if not blocks and not beside and not settings.diversity and not settings.popularity:
        return k
    wanted = settings.candidates or (CANDIDATES if ranker is None else ranker.settings.candidates)
    return -(-max(k, wanted) // STEP) * STEP


def rank(
    ranker: Ranker,
    blocks: int,
    known: Known,
    rows_BN: Tensor,
    scores_BN: Tensor,
    look: Look,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """The ranker's scores of candidates from those of retrieval, shape B × N; -inf where there is none.

    Attention weights of each block are added to `kept`, as Ranker.forward has them.
    """
    none_BN = rows_BN == PADDING
    ranks_BN = (scores_BN[:, None] > scores_BN[:, :, None]).sum(2) + 1
    lowest_B1 = scores_BN.masked_fill(none_BN, torch.inf).amin(1, keepdim=True)
    out_BN = ranker(known, rows_BN, scores_BN.where(~none_BN, lowest_B1), ranks_BN, look, depth=blocks, kept=kept)[-1]
    ranked_BN: Tensor = out_BN.masked_fill(none_BN, -torch.inf)
    return ranked_BN


def listed(rows_BN: Tensor, scores_BN: Tensor, known: Known, settings: ServingSettings, k: int) -> tuple[Tensor, Tensor]:
    """The lists of k: rows and scores, in an order that diversity and less popularity may change; scores stay as they are.

    Maximal marginal relevance (Carbonell & Goldstein 1998): each place goes to the largest
    (1 - diversity) × relevance - diversity × similarity, relevance being the score's place between the lowest and the highest
    candidate, similarity the largest cosine with an item already listed; the first place goes to the largest relevance.
    """
    if not settings.popularity and not settings.diversity:
        return best(rows_BN, scores_BN, k)
    worth_BN = scores_BN - settings.popularity * known.logs(rows_BN)
    if not settings.diversity:
        order_BK, _ = best(rows_BN, worth_BN, k)
        return order_BK, of_rows(order_BK, rows_BN, scores_BN, -torch.inf)
    none_BN = worth_BN == -torch.inf
    low_B1 = worth_BN.masked_fill(none_BN, torch.inf).amin(1, keepdim=True)
    spread_B1 = (worth_BN.amax(1, keepdim=True) - low_B1).clamp(min=1e-12)
    relevance_BN = ((worth_BN - low_B1) / spread_B1).double().masked_fill(none_BN, -torch.inf)
    units_BNE = normalize(known.vectors(rows_BN).double(), dim=-1)
    lines_B = torch.arange(len(rows_BN), device=rows_BN.device)
    alike_BN = torch.full_like(relevance_BN, -1.0)
    out: list[Tensor] = []
    for _ in range(min(k, rows_BN.shape[1])):
        value_BN = (1 - settings.diversity) * relevance_BN - settings.diversity * alike_BN if out else relevance_BN
        value_BN = value_BN.masked_fill(relevance_BN == -torch.inf, -torch.inf)
        row_B1, _ = best(rows_BN, value_BN.float(), 1)
        place_B = (rows_BN == row_B1).byte().argmax(1)
        out.append(row_B1)
        alike_BN = torch.maximum(alike_BN, (units_BNE * units_BNE[lines_B, place_B][:, None]).sum(2))
        relevance_BN = relevance_BN.scatter(1, place_B[:, None], -torch.inf)
    order_BK = pad(torch.cat(out, 1), (0, k - len(out)), value=PADDING)
    return order_BK, of_rows(order_BK, rows_BN, scores_BN, -torch.inf)


def of_rows(order_BK: Tensor, rows_BN: Tensor, values_BN: Tensor, none: float) -> Tensor:
    """The candidates' values in the order of listed rows, shape B × k; `none` for PADDING."""
    ascending = rows_BN.sort(dim=1)
    place_BK = torch.searchsorted(ascending.values, order_BK).clamp_(max=rows_BN.shape[1] - 1)
    return values_BN.gather(1, ascending.indices.gather(1, place_BK)).masked_fill(order_BK == PADDING, none)


def chosen_blocks(settings: ServingSettings, ranker: Ranker | None, manifest: Mapping[str, Any]) -> int:
    """How many blocks of the ranker are served, by the curve of its validation in the manifest, where it has one."""
    if ranker is None:
        return 0
    if settings.ranker_blocks >= 0:
        return min(settings.ranker_blocks, ranker.settings.blocks)
    curve = manifest.get("ranker", {}).get("curve")
    return int(max(curve, key=lambda line: line["ndcg@10"])["blocks"]) if curve else ranker.settings.blocks
