"""Exact validation while training: every item of the catalogue is scored for every user."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from recsys.batch import FIRST_ITEM, Batch, Sequences, gather, group_by_length
from recsys.metrics import measure, new_targets, target_ranks
from recsys.model import SequenceModel

TOKENS = 2**14
"""Padded positions encoded at once."""
SCORES = 2**25
"""Scores held at once: 128 MB."""
NEVER, ALWAYS = 2.0, -2.0
"""Cosines that none and every one reaches."""
LEAVING = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the histories at a block that leave after it, of which the curve of quality against cost is made."""

Encode = Callable[[Batch, Tensor], Tensor]


@torch.inference_mode()
def validate(
    model: SequenceModel, sequences: Sequences, split: str = "validation", encode: Encode | None = None
) -> dict[str, float]:
    """Recall and NDCG at 10 and 50, over the users who have a history and a target that is new to them.

    Items of the history are not ranked; a target that the model knows nothing of cannot be found and counts as missed.
    Empty where there is no such user. `encode` turns histories and request times into states (default: `model.encode`). The
    request of a user is made when their first target happens; only a model with `request_time` reads it.
    """
    vectors_VE, known_V = model.item_vectors(), model.known_V
    ranks, owners, users = [], [], 0
    for history, future in histories(model, sequences, split):
        states_BE = (encode or model.encode)(history, future.times[future.offsets[:-1]])
        scores_BV = pad(states_BE @ vectors_VE.T, (0, 1), value=-torch.inf)  # last column: what has no vector
        scores_BV[:, :-1].masked_fill_(~known_V, -torch.inf)
        owners_P, targets_P = new_targets(history, future)
        scores_BV[history.owners, (history.values - FIRST_ITEM).clamp(max=model.lines)] = -torch.inf
        ranks.append(target_ranks(scores_BV, owners_P, (targets_P - FIRST_ITEM).clamp(max=model.lines)))
        owners.append(owners_P + users)
        users += len(history)
    if not sum(map(len, owners)):
        return {}
    return measure(torch.cat(ranks), torch.cat(owners), users)


@torch.inference_mode()
def depth_curve(model: SequenceModel, sequences: Sequences) -> list[dict[str, Any]]:
    """Quality against cost of leaving early, on validation: `blocks` a history costs on average, `leave` for
    `model.encode`, and the figures; most blocks first. Empty where there is nobody to judge.
    """
    alike = []
    for history, future in histories(model, sequences, "validation"):
        batch, asked = model.asked(history, future.times[future.offsets[:-1]])
        last = torch.arange(len(batch), device=batch.values.device), batch.lengths - 1
        states = [states_BTE[last] for states_BTE in model.exits(batch, asked=asked)]
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
    users_U = torch.nonzero((ends_U > begins_U) & (target_ends_U > ends_U)).flatten()
    users_U = users_U[torch.arange(min(most, len(users_U))) * len(users_U) // max(1, min(most, len(users_U)))]
    users_U = users_U[torch.argsort(ends_U[users_U] - begins_U[users_U], stable=True)]
    lengths_U = (ends_U - begins_U)[users_U].clamp(max=model.settings.length)
    lengths_U = lengths_U.clamp(min=TOKENS * model.lines // SCORES)  # so that users × items stays within SCORES
    device = model.table.weight.device
    for start, end in group_by_length(lengths_U, TOKENS):
        users_B = users_U[start:end]
        history = gather(sequences.items, sequences.times, begins_U[users_B], ends_U[users_B]).to(device)
        yield history, gather(sequences.items, sequences.times, ends_U[users_B], target_ends_U[users_B]).to(device)
