"""Ranking metrics from the ranks of the targets: the same arithmetic for training, evaluation and served lists.

U users · J users who have a target · P (user, target) pairs · V catalogue items
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
    """Means over the users who have a target, named `recall@k` and so on."""
    return {name: float(values_U.mean()) for name, values_U in measure_users(ranks_P, owners_P, users, ks).items()}


def measure_users(
    ranks_P: Tensor, owners_P: Tensor, users: int, ks: tuple[int, ...] = (10, 50), metrics: tuple[str, ...] = ("recall", "ndcg")
) -> dict[str, Tensor]:
    """`measure` before the mean: float64 of the users who have a target, in the order of their numbers below `users`.

    Of a user, within the first k places:
    recall = targets found / min(k, targets);
    ndcg = sum of 1 / log2(rank + 1) over found targets / the same sum of an ideal list with min(k, targets) targets
    (Järvelin & Kekäläinen 2002, binary gains);
    mrr = 1 / rank of the first found target (Voorhees 1999);
    map = mean over min(k, targets) of the precision at each found target (average precision, cut at k);
    hit = 1 where a target is found.
    """
    targets_U = torch.bincount(owners_P, minlength=users)
    judged_J = targets_U.nonzero().flatten()
    listed_P = ranks_P <= max(ks, default=0)  # the others count in `targets_U` alone
    ranks_P, owners_P = ranks_P[listed_P], owners_P[listed_P]
    best_J = torch.full((users,), MISSED, device=ranks_P.device).scatter_reduce(0, owners_P, ranks_P.long(), "amin")[judged_J]
    gains_P = 1 / torch.log2(ranks_P.double() + 1)
    precisions_P = _order(ranks_P, owners_P, users).double() / ranks_P if "map" in metrics else gains_P
    out = {}
    for k in ks:
        found_P, possible_J = ranks_P <= k, targets_U[judged_J].clamp(max=k).double()
        own_P, ideals = owners_P[found_P], pad(1 / torch.log2(torch.arange(2, k + 2).double()), (1, 0)).cumsum(0)
        for metric in metrics:
            if metric == "recall":
                values_J = torch.bincount(own_P, minlength=users)[judged_J] / possible_J
            elif metric == "ndcg":
                ideal_J = ideals.to(ranks_P.device)[possible_J.long()]
                values_J = torch.bincount(own_P, gains_P[found_P], minlength=users)[judged_J] / ideal_J
            elif metric == "mrr":
                values_J = (1 / best_J.double()).masked_fill(best_J > k, 0)
            elif metric == "map":
                values_J = torch.bincount(own_P, precisions_P[found_P], minlength=users)[judged_J] / possible_J
            else:
                values_J = (best_J <= k).double()
            out[f"{metric}@{k}"] = values_J
    return out


METRICS = ("recall", "ndcg", "mrr", "map", "hit")
"""All that `measure_users` knows."""


def _order(ranks_P: Tensor, owners_P: Tensor, users: int) -> Tensor:
    """The place, from 1, of each target among its owner's targets by rank."""
    order_P = (owners_P << 32 | ranks_P).argsort()
    counts_U = torch.bincount(owners_P, minlength=users)
    first_P = (counts_U.cumsum(0) - counts_U)[owners_P[order_P]]
    places_P = torch.arange(1, len(owners_P) + 1, device=owners_P.device) - first_P
    return torch.empty_like(places_P).scatter(0, order_P, places_P)
