"""How the ranker is learnt, after the sequence model: the true next item against what retrieval would have named with it.

P requests of a step · N candidates · T best of retrieval · V items · B histories
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.batch import FIRST_ITEM, Sequences, gather
from recsys.config import Settings
from recsys.errors import RecipeError, RecsysError
from recsys.metrics import MISSED, measure
from recsys.model import ModelSettings, SequenceModel
from recsys.ranker import Companions, Known, Look, Ranker, RankerSettings
from training.checkpoint import Checkpoints
from training.data import EpochBatches, TrainingBatch
from training.loop import Observation, State, run
from training.optimizer import Optimizer, OptimizerSettings
from training.validate import histories

SCORES = 2**24
"""Retrieval scores held at once: 64 MB."""
TOKENS = 4096
"""Padded events in a batch."""
REQUESTS = 256
"""Requests whose candidates are ranked at once."""
JUDGED = 4096
"""Most users by whom an epoch is judged."""


@dataclass(frozen=True)
class RankingSettings(Settings):
    """How the ranker is learnt, once the sequence model stands."""

    section: ClassVar[str] = "ranking"

    epochs: int = 4
    """Most passes over the training histories; the learning rate falls to a hundredth by the last."""
    patience: int = 2
    """Epochs without a better NDCG@10 on validation after which learning stops."""
    requests: int = 16
    """Last events of a history that are to be ranked first; drawn from all of it they are farther from what serving asks."""
    hard: int = 24
    """Candidates of a request drawn from the best that retrieval names, as many as ranker.candidates."""
    uniform: int = 16
    """Candidates of a request drawn from all other items."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW, per step."""
    weight_decay: float = 0.01
    """Decay of the blocks' matrices, per unit of rate."""

    def __post_init__(self) -> None:
        self._at_least(1, "epochs", "patience", "requests", "hard")
        if self.uniform < 0 or self.weight_decay < 0 or not self.learning_rate > 0:
            raise ValueError("uniform and weight_decay must not be negative, and learning_rate above 0")


def fit_ranker(
    model: SequenceModel,
    sequences: Sequences,
    events_V: Tensor,
    settings: RankerSettings,
    learning: RankingSettings,
    seed: int,
    *,
    checkpoints: Checkpoints | None = None,
    observe: Callable[[Observation], None] = lambda observation: None,
) -> tuple[State[Ranker], Companions | None, list[dict[str, float]]]:
    """Learn to rank what the trained model retrieves; the model itself stays as it is. With the ranker comes its curve.

    `events` are the training events of each item that the model has a vector for. Goes on from `checkpoints` as
    `training.loop.fit` does. Raises RecipeError: as refuse_ranker.
    """
    refuse_ranker(model.settings, settings)
    device = model.table.device
    learnable = sequences.learnable(model.items)
    companions = Companions.of(learnable, model.items, settings.companions) if settings.companions else None
    ranker = Ranker(settings, model.settings, model.items, model.content, companions)
    ranker = ranker.initialise(torch.Generator().manual_seed(seed + 2)).to(device)
    model = model.eval().requires_grad_(False)
    rates = OptimizerSettings(learning_rate=learning.learning_rate, weight_decay=learning.weight_decay)
    state = State(ranker, Optimizer(ranker, rates), torch.Generator(device).manual_seed(seed + 3))
    with torch.no_grad():
        known = Known(model.item_vectors(), events_V.to(device).log1p(), model.items, model.content)
    lesson = _Lesson(model, known, Owned(learnable, device), learning)

    def judge() -> dict[str, float]:
        curve = ranker_curve(model, ranker, known, sequences)
        return {**curve[-1], "retrieved_ndcg@10": curve[0]["ndcg@10"]} if curve else {}

    run(
        state,
        partial(EpochBatches, learnable, model.settings.length, TOKENS, seed + 1),
        partial(lesson.learn, state),
        judge,
        epochs=learning.epochs,
        patience=learning.patience,
        checkpoints=checkpoints,
        observe=observe,
        part="ranker",
    )
    return state, companions, ranker_curve(model, ranker, known, sequences, len(sequences.train_end))


def refuse_ranker(model: ModelSettings, ranker: RankerSettings) -> None:
    """Raises RecipeError: a ranker that such a model cannot have."""
    if model.objective != "causal":
        raise RecipeError('the ranker reads the states of every event: set model.objective to "causal", or ranker.blocks to 0')
    if ranker.text and model.text == "none":
        raise RecipeError("ranker.text is set and model.text is none; set both, or neither")


@dataclass(frozen=True)
class _Lesson:
    """What a step needs besides its batch."""

    model: SequenceModel
    known: Known
    owned: Owned
    settings: RankingSettings

    def learn(self, state: State[Ranker], batch: TrainingBatch) -> tuple[float, int]:
        """Make a step's gradients: cross-entropy of the next item, estimated from a few candidates of two strata.

        Some are drawn of the best of retrieval, some of all other items, and each counts as often as its stratum is larger than
        what was drawn of it. (With the best alone the ranker learns that what stands below them all must be the target: it
        halves NDCG.) No candidate is an item that the user has anywhere in the training part, so none is a future target.
        """
        model, settings, ranker, generator = self.model, self.settings, state.model.settings, state.generator
        with torch.no_grad():
            states_BTE, view = model.read_all(batch.history, batch.asked)
        chosen = latest(batch, settings.requests)
        places = batch.places[chosen]
        owners_P = batch.history.owners[places]
        ends_P = places - batch.history.offsets[owners_P]
        total = 0.0
        for part in torch.split(torch.arange(len(chosen), device=places.device), REQUESTS):
            states_PE = model.place(states_BTE[owners_P[part], ends_P[part]])
            users_P, targets_P = batch.users[owners_P[part]], batch.targets[chosen[part]]
            rows_PN, ranks_PN, odds_PN, best_P1 = self._candidates(states_PE, users_P, targets_P, ranker, generator)
            scores_PN = (self.known.vectors(rows_PN) * states_PE[:, None]).sum(-1)
            look = Look.at(states_BTE, view, owners_P[part], ends_P[part], ranker.span)
            own_P = torch.zeros_like(targets_P)
            logits = state.model(self.known, rows_PN, scores_PN, ranks_PN, look, own_P, generator, best_B1=best_P1)
            losses = [F.cross_entropy(logits_PN + odds_PN, own_P) for logits_PN in logits]
            loss = torch.stack(losses).mean() * (len(part) / len(chosen))
            if not torch.isfinite(loss):
                raise RecsysError(f"the ranker's loss became {loss.item()} in step {state.steps}; lower ranking.learning_rate")
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item() * len(chosen)
        return total, len(chosen)

    @torch.no_grad()
    def _candidates(
        self, states_PE: Tensor, users_P: Tensor, targets_P: Tensor, settings: RankerSettings, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, retrieval ranks and log odds of each request's candidates, shape P × N, of which the target is the first; and
        the best score of all that could be drawn, P × 1.
        """
        learnt, hard, uniform = self.model.items, self.settings.hard, self.settings.uniform
        most, best_PT, scores_PT = SCORES // learnt + 1, [], []
        for states, users in zip(torch.split(states_PE, most), torch.split(users_P, most), strict=True):
            scores_PV = states @ self.known.vectors_VE[:learnt].T
            lines, rows = self.owned.of(users)
            scores_PV[lines, rows - FIRST_ITEM] = -torch.inf
            found = scores_PV.topk(min(settings.candidates, learnt), dim=1)
            best_PT.append(found.indices + FIRST_ITEM)
            scores_PT.append(found.values)
        best, scores = torch.cat(best_PT), torch.cat(scores_PT)
        own = (self.known.vectors(targets_P) * states_PE).sum(1, keepdim=True)
        target_rank = (scores > own).sum(1, keepdim=True) + 1
        device, size = best.device, best.shape[1]
        drawn = torch.rand(best.shape, generator=generator, device=device).argsort(1)[:, :hard]
        others = torch.randint(learnt, (len(best), uniform), generator=generator, device=device) + FIRST_ITEM
        wrong = self.owned.hit(users_P, others) | (others[:, :, None] == best[:, None]).any(2)
        infinite = torch.isinf(scores.gather(1, drawn))  # fewer than so many are left that the user never had
        odds = [  # the others are drawn of all items, and those among the best count as none
            torch.zeros_like(own),
            torch.full(drawn.shape, math.log(size / drawn.shape[1]), device=device).masked_fill(infinite, -torch.inf),
            torch.full(others.shape, math.log(learnt / max(1, uniform)), device=device).masked_fill(wrong, -torch.inf),
        ]
        drawn_ranks = drawn + 1 + (scores.gather(1, drawn) < own)  # the target is a candidate too
        ranks = torch.cat([target_rank, drawn_ranks, torch.full_like(others, size + 1)], 1)
        rows = torch.cat([targets_P[:, None], best.gather(1, drawn), others], 1)
        return rows, ranks, torch.cat(odds, 1), torch.maximum(scores[:, :1], own)


def latest(batch: TrainingBatch, count: int) -> Tensor:
    """The last `count` judged places of each history, all where there are fewer: indices, ascending."""
    owners_P = batch.history.owners[batch.places]
    behind_P = torch.searchsorted(owners_P, owners_P, right=True) - torch.arange(len(owners_P), device=owners_P.device)
    chosen: Tensor = (behind_P <= count).nonzero().flatten()
    return chosen


class Owned:
    """The distinct items that each user has in the training part."""

    def __init__(self, learnable: Sequences, device: torch.device) -> None:
        train = learnable.histories("train")
        self.keys = torch.unique(train.owners << 32 | train.values).to(device)

    def hit(self, users_P: Tensor, rows_PN: Tensor) -> Tensor:
        """Whether a user has an item; bool, shape P × N."""
        wanted = users_P[:, None] << 32 | rows_PN
        place = torch.searchsorted(self.keys, wanted).clamp_(max=len(self.keys) - 1)
        found: Tensor = self.keys[place] == wanted
        return found

    def of(self, users_P: Tensor) -> tuple[Tensor, Tensor]:
        """All that the users have: (line of `users`, item row)."""
        begins, ends = (torch.searchsorted(self.keys, users << 32) for users in (users_P, users_P + 1))
        found = gather(self.keys, self.keys, begins, ends)
        return found.owners, found.values & 0xFFFFFFFF


@torch.inference_mode()
def ranker_curve(
    model: SequenceModel, ranker: Ranker, known: Known, sequences: Sequences, most: int = JUDGED
) -> list[dict[str, float]]:
    """Recall and NDCG at 10 on validation by `blocks` of the ranker: none, that is as retrieved, and each depth.

    Of at most `most` evenly chosen users, each with their first event alone. Empty where there is nobody.
    """
    settings, live_V = ranker.settings, model.known_V
    ranks: list[list[Tensor]] = [[] for _ in range(settings.blocks + 1)]
    for history, future in histories(model, sequences, "validation", most):
        firsts, now = future.values[future.offsets[:-1]], future.times[future.offsets[:-1]]
        states_BTE, view = model.read(history, now)
        lines_B, last_B = torch.arange(len(history), device=now.device), view.lengths_B - 1
        scores_BV = (model.place(states_BTE[lines_B, last_B]) @ known.vectors_VE.T).masked_fill_(~live_V, -torch.inf)
        seen = history.values < FIRST_ITEM + len(known.vectors_VE)
        scores_BV[history.owners[seen], history.values[seen] - FIRST_ITEM] = -torch.inf
        scores_BN, rows_BN = scores_BV.topk(min(settings.candidates, scores_BV.shape[1]), dim=1)
        rows_BN += FIRST_ITEM
        ranks_BN = torch.arange(1, rows_BN.shape[1] + 1, device=now.device).expand_as(rows_BN)
        look = Look.at(states_BTE, view, lines_B, last_B, settings.span)
        hit_BN = (rows_BN == firsts[:, None]) & (scores_BN > -torch.inf)
        place_B1 = hit_BN.byte().argmax(1, keepdim=True)
        for part, ranked_BN in zip(ranks, [scores_BN, *ranker(known, rows_BN, scores_BN, ranks_BN, look)], strict=True):
            ranked_BN = ranked_BN.masked_fill(scores_BN == -torch.inf, -torch.inf)
            ahead_B = (ranked_BN > ranked_BN.gather(1, place_B1)).sum(1)
            part.append(torch.where(hit_BN.any(1), ahead_B + 1, MISSED).cpu())
    if not ranks[0]:
        return []
    users = sum(map(len, ranks[0]))
    return [
        {"blocks": depth, **measure(torch.cat(part), torch.arange(users), users, (10,))} for depth, part in enumerate(ranks)
    ]
