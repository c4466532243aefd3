"""Ranking metrics from the ranks of the targets: the same arithmetic for training, evaluation and served lists.

U users · P (user, target) pairs · V catalogue items
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys.batch import Batch

MISSED = 2**31 - 1
"""Rank of a target that is in no list."""
PAIRS = 1024
"""Targets ranked at once, against the whole catalogue."""


def new_targets(history: Batch, future: Batch) -> tuple[Tensor, Tensor]:
    """The distinct items of each user's future that are not in their history: (owners, item rows), each of shape P."""
    seen = history.owners << 32 | history.values
    wanted = torch.unique(future.owners << 32 | future.values)
    wanted = wanted[~torch.isin(wanted, seen)]
    return wanted >> 32, wanted & 0xFFFFFFFF


def target_ranks(scores_UV: Tensor, owners_P: Tensor, targets_P: Tensor) -> Tensor:
    """Rank from 1 of each target among its owner's scores, int64 of shape P; equal scores rank by column, ascending.

    `owners_P` are lines of `scores_UV`, `targets_P` are its columns; an item that may not be ranked scores -inf.
    """
    columns_V = torch.arange(scores_UV.shape[1], device=scores_UV.device)
    ranks = []
    for owners, targets in zip(torch.split(owners_P, PAIRS), torch.split(targets_P, PAIRS), strict=True):
        own, rows_PV = scores_UV[owners, targets][:, None], scores_UV[owners]
        ahead_PV = (rows_PV > own) | ((rows_PV == own) & (columns_V < targets[:, None]))
        ranks.append(torch.where(own[:, 0] == -torch.inf, MISSED, ahead_PV.sum(1) + 1))
    return torch.cat(ranks)


def measure(ranks_P: Tensor, owners_P: Tensor, users: int, ks: tuple[int, ...] = (10, 50)) -> dict[str, float]:
    """Means over the users who have a target, named `recall@k` and `ndcg@k`.

    recall@k = targets found in the first k / min(k, targets); ndcg@k has gain 1 / log2(rank + 1) over the ideal of
    min(k, targets) (Järvelin & Kekäläinen 2002, binary gains).
    """
    return {name: float(values_U.mean()) for name, values_U in measure_users(ranks_P, owners_P, users, ks).items()}


def measure_users(ranks_P: Tensor, owners_P: Tensor, users: int, ks: tuple[int, ...] = (10, 50)) -> dict[str, Tensor]:
    """`measure` before the mean: float64 of the users who have a target, in the order of their numbers below `users`."""
    targets_U = torch.bincount(owners_P, minlength=users)
    judged_U = targets_U > 0
    gains_P = 1 / torch.log2(ranks_P.double() + 1)
    out = {}
    for k in ks:
        found_P = ranks_P <= k
        possible_U = targets_U[judged_U].clamp(max=k)
        ideal = pad(1 / torch.log2(torch.arange(2, k + 2).double()), (1, 0)).cumsum(0).to(ranks_P.device)
        hits_U = torch.bincount(owners_P[found_P], minlength=users)[judged_U]
        gain_U = torch.bincount(owners_P[found_P], weights=gains_P[found_P], minlength=users)[judged_U]
        out[f"recall@{k}"] = hits_U.double() / possible_U
        out[f"ndcg@{k}"] = gain_U / ideal[possible_U]
    return out
