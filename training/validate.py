"""Exact validation while training: every item of the catalogue is scored for every user."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from recsys.batch import FIRST_ITEM, Sequences, gather, group_by_length
from recsys.metrics import measure, new_targets, target_ranks
from recsys.model import SequenceModel

TOKENS = 2**14
"""Padded positions encoded at once."""


@torch.inference_mode()
def validate(model: SequenceModel, sequences: Sequences, split: str = "validation") -> dict[str, float]:
    """Recall and NDCG at 10 and 50, over the users who have a history and a target that is new to them.

    Items of the history are not ranked; a target without training events cannot be found and counts as missed. Empty where
    there is no such user.
    """
    begins_U, ends_U, target_ends_U = sequences.windows(split)
    users_U = torch.nonzero((ends_U > begins_U) & (target_ends_U > ends_U)).flatten()
    users_U = users_U[torch.argsort(ends_U[users_U] - begins_U[users_U], stable=True)]
    vectors_VE = model.item_vectors()
    ranks, owners = [], []
    lengths_U = (ends_U - begins_U)[users_U].clamp(max=model.settings.length)
    for start, end in group_by_length(lengths_U, TOKENS):
        users_B = users_U[start:end]
        history = gather(sequences.items, sequences.times, begins_U[users_B], ends_U[users_B]).to(vectors_VE.device)
        future = gather(sequences.items, sequences.times, ends_U[users_B], target_ends_U[users_B]).to(vectors_VE.device)
        scores_BV = pad(model.encode(history) @ vectors_VE.T, (0, 1), value=-torch.inf)  # last column: without training events
        owners_P, targets_P = new_targets(history, future)
        scores_BV[history.owners, (history.values - FIRST_ITEM).clamp(max=model.items)] = -torch.inf
        ranks.append(target_ranks(scores_BV, owners_P, (targets_P - FIRST_ITEM).clamp(max=model.items)))
        owners.append(owners_P + start)
    if not sum(map(len, owners)):
        return {}
    return measure(torch.cat(ranks), torch.cat(owners), len(users_U))
