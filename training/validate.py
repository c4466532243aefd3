"""Exact validation while training: every item of the catalogue is scored for every user."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from recsys.batch import FIRST_ITEM, Batch, Sequences, gather, group_by_length, spread
from recsys.metrics import MISSED, measure_users, new_targets, target_ranks
from recsys.model import SequenceModel
from training.team import ALONE, Team

TOKENS = 2**14
"""Padded positions encoded at once."""
SCORES = 2**25
"""Scores held at once: 128 MB."""
BLOCK = 2**16
"""Items scored at once where a process holds a part of their table."""
KS = (10, 50)
NEVER, ALWAYS = 2.0, -2.0
"""Cosines that none and every one reaches."""
LEAVING = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the histories at a block that leave after it, of which the curve of quality against cost is made."""


@torch.no_grad()  # TorchRec's look-ups refuse inference mode
def validate(
    model: SequenceModel,
    sequences: Sequences,
    split: str = "validation",
    encode: Callable[[Batch, Tensor], Tensor] | None = None,
    *,
    users: int = 0,
    team: Team = ALONE,
) -> dict[str, float]:
    """Recall and NDCG at 10 and 50, over the users who have a history and a target that is new to them.

    Items of the history are not ranked; a target that the model knows nothing of cannot be found and counts as missed.
    Empty where there is no such user. `encode` turns histories and request times into states (default: `model.encode`). The
    request of a user is made when their first target happens; only a model with `request_time` reads it. At most `users` are
    judged (0: all). Each process of a team judges users of its own; the figures are those of all.
    """
    parts = list(histories(model, sequences, split, -(-users // team.size) or 2**62))
    turns = team.most(len(parts)) if model.table.sharded else 0
    asked = [
        _Asked(history, *new_targets(history, future), (encode or model.encode)(history, future.times[future.offsets[:-1]]))
        for history, future in parts
    ]
    for _ in range(len(parts), turns):
        model.table.idle()
    values: dict[str, Tensor] = {}
    ranks = _ranks_by_parts(model, asked, team) if model.table.sharded else _ranks(model, asked)
    if asked:
        before = torch.tensor([len(part.history) for part in asked]).cumsum(0).tolist()
        owners_P = torch.cat([part.owners_P + start for part, start in zip(asked, [0, *before], strict=False)])
        values = measure_users(torch.cat(ranks), owners_P, before[-1], KS)
    judged = max(map(len, values.values()), default=0)
    names = [f"{metric}@{k}" for k in KS for metric in ("recall", "ndcg")]
    sums = [float(values[name].sum()) if judged else 0.0 for name in names]
    *totals, count = team.sum(torch.tensor([*sums, judged], dtype=torch.float64)).tolist()
    return {name: total / count for name, total in zip(names, totals, strict=True)} if count else {}


@dataclass(frozen=True)
class _Asked:
    """Histories, their new targets, and their states."""

    history: Batch
    owners_P: Tensor
    targets_P: Tensor
    states_BE: Tensor


def _ranks(model: SequenceModel, asked: Sequence[_Asked]) -> list[Tensor]:
    """Rank of each target among all items."""
    vectors_VE, known_V, ranks = model.item_vectors(), model.known_V, []
    for part in asked:
        scores_BV = pad(part.states_BE @ vectors_VE.T, (0, 1), value=-torch.inf)  # last column: what has no vector
        scores_BV[:, :-1].masked_fill_(~known_V, -torch.inf)
        history, targets_P = part.history, (part.targets_P - FIRST_ITEM).clamp(max=model.lines)
        scores_BV[history.owners, (history.values - FIRST_ITEM).clamp(max=model.lines)] = -torch.inf
        ranks.append(target_ranks(scores_BV, part.owners_P, targets_P))
    return ranks


def _ranks_by_parts(model: SequenceModel, asked: Sequence[_Asked], team: Team) -> list[Tensor]:
    """The same with so many item vectors at once as `BLOCK`, which all processes of the team look up together."""
    device = team.device
    rows_P = torch.cat([part.targets_P for part in asked] or [torch.zeros(0, dtype=torch.int64, device=device)])
    found_P = (rows_P < FIRST_ITEM + model.lines) & model.reads(rows_P)
    counts = [len(part.targets_P) for part in asked]
    own = torch.split(model.vectors(rows_P.where(found_P, FIRST_ITEM)), counts)
    scores = [(part.states_BE[part.owners_P] * own_PE).sum(1) for part, own_PE in zip(asked, own, strict=True)]
    ahead = [torch.zeros_like(part.targets_P) for part in asked]
    size = model.lines if model.reads_neighbours else BLOCK
    for first in range(0, model.lines, size):
        block = torch.arange(first, min(first + size, model.lines), device=device)
        vectors_NE, known_N = model.item_vectors(block), model.reads(block + FIRST_ITEM)
        for part, scores_P, ahead_P in zip(asked, scores, ahead, strict=True):
            scores_BN = (part.states_BE @ vectors_NE.T).masked_fill_(~known_N, -torch.inf)
            seen = part.history.values - FIRST_ITEM - first
            inside = (seen >= 0) & (seen < len(block))
            scores_BN[part.history.owners[inside], seen[inside]] = -torch.inf
            column_P = part.targets_P - FIRST_ITEM - first
            before_PN = torch.arange(len(block), device=device) < column_P[:, None]
            own_PN = torch.arange(len(block), device=device) == column_P[:, None]
            rows_PN, scores_P1 = scores_BN[part.owners_P], scores_P[:, None]
            ahead_P += (((rows_PN > scores_P1) | ((rows_PN == scores_P1) & before_PN)) & ~own_PN).sum(1)
    some = torch.split(found_P, counts)
    return [torch.where(some_P, ahead_P + 1, MISSED) for some_P, ahead_P in zip(some, ahead, strict=True)]


@torch.inference_mode()
def depth_curve(model: SequenceModel, sequences: Sequences) -> list[dict[str, Any]]:
    """Quality against cost of leaving early, on validation: `blocks` a history costs on average, `leave` for
    `model.encode`, and the figures; most blocks first. Empty where there is nobody to judge.
    """
    alike = []
    for history, future in histories(model, sequences, "validation"):
        batch, asked = model.asked(history, future.times[future.offsets[:-1]])
        last = torch.arange(len(batch), device=batch.values.device), batch.lengths - 1
        states = [states_BTE[last] for states_BTE in model(batch, asked=asked)]
        alike.append(torch.stack([cosine_similarity(a, b) for a, b in itertools.pairwise(states[:-1])], 1))
    if not alike:
        return []
    curve, alike_UL = [], torch.cat(alike)
    for share in LEAVING:
        leave: list[float] = []
        going, blocks = alike_UL, 1.0
        for depth in range(alike_UL.shape[1]):
            descending = going[:, depth].sort(descending=True).values
            leavers = round(share * len(going))
            leave.append(ALWAYS if leavers == len(going) else float(descending[leavers - 1]) if leavers else NEVER)
            going = going[going[:, depth] < leave[-1]]
            blocks += len(going) / len(alike_UL)
        figures = validate(model, sequences, encode=partial(model.encode, leave=leave))
        curve.append({"blocks": blocks, "leave": leave, **figures})
    return curve


def histories(model: SequenceModel, sequences: Sequences, split: str, most: int = 2**62) -> Iterator[tuple[Batch, Batch]]:
    """Histories of about the same length with what follows them, of users who have both, on the model's device.

    At most `most` users, evenly chosen.
    """
    begins_U, ends_U, target_ends_U = sequences.windows(split)
    users_U = sequences.judged(split)
    users_U = users_U[spread(len(users_U), most)]
    users_U = users_U[torch.argsort(ends_U[users_U] - begins_U[users_U], stable=True)]
    lengths_U = (ends_U - begins_U)[users_U].clamp(max=model.settings.length)
    items = min(model.lines, BLOCK) if model.table.sharded else model.lines
    lengths_U = lengths_U.clamp(min=TOKENS * items // SCORES)  # so that users × items stays within SCORES
    device = model.table.device
    for start, end in group_by_length(lengths_U, TOKENS):
        users_B = users_U[start:end]
        history = gather(sequences.items, sequences.times, begins_U[users_B], ends_U[users_B]).to(device)
        yield history, gather(sequences.items, sequences.times, ends_U[users_B], target_ends_U[users_B]).to(device)
