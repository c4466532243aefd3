"""What lists show, beside how right they are: coverage, Gini, novelty, diversity, popularity lift.

U users · K places of a list · V catalogue items · D directions
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize, pad

from recsys.batch import FIRST_ITEM, PADDING, Sequences, gather

DIRECTIONS = 32
"""Of an item, by which two items are alike or not."""
LEARNT_FROM = 100_000
"""Users from whom directions are learnt, at most; evenly chosen."""
USERS = 2**16
"""Lists measured at once."""


@dataclass(frozen=True)
class Shown:
    """What the first k places of lists show."""

    users: dict[str, Tensor]
    """novelty@k and diversity@k of each list, float64, shape U; NaN for a list too short to have one."""
    whole: dict[str, float]
    """coverage@k, gini@k and popularity_lift@k of all lists together."""
    times_V: Tensor
    """How often each item stands in the first k places; int64."""


class Beyond:
    """Measures lists by what the training part says of the items: one yardstick for all listers."""

    def __init__(self, sequences: Sequences, items: int, allowed_V: Tensor, users_U: Tensor, split: str) -> None:
        """`allowed_V` are the items that may be recommended, `users_U` the users whose lists are measured."""
        train = gather(sequences.items, sequences.times, *sequences.windows("train")[:2])
        self.counts_V = torch.bincount(train.values, minlength=FIRST_ITEM + items)[FIRST_ITEM : FIRST_ITEM + items].double()
        self.allowed_V, self.ways_VD = allowed_V, directions(sequences, items)
        begins_U, ends_U, _ = sequences.windows(split)
        histories = gather(sequences.items, sequences.times, begins_U[users_U], ends_U[users_U])
        popular_N = self._of_rows(self.counts_V, histories.values)
        self.had = float((_sums(popular_N, histories.offsets) / histories.lengths.clamp(min=1)).mean())
        chances_V = (self.counts_V + 1) / (self.counts_V.sum() + items)
        self.bits_V = -torch.log2(chances_V)

    def measure(self, rows_UK: Tensor, k: int) -> Shown:
        """Of the first k places.

        coverage = items in any list / items that may be recommended. gini = inequality of how often items are shown, 0: all
        alike, 1: one alone. novelty = mean bits -log2 of the item's share of training events, one event added to each item
        (Zhou et al. 2010). diversity = 1 - mean cosine of two items of the list, by their DIRECTIONS of a singular value
        decomposition of the training part's users × items (Smyth & McClave 2001). popularity_lift = mean training events of
        shown items over those of the items in the users' histories, - 1 (Abdollahpouri et al. 2019).
        """
        items = len(self.counts_V)
        times_R = torch.zeros(FIRST_ITEM + items, dtype=torch.int64)
        novelty, diversity, popular = [], [], []
        facts_VF = torch.stack([self.bits_V.float(), self.counts_V.float(), self.ways_VD.square().sum(1)], 1)
        table_RF = pad(torch.cat([facts_VF, self.ways_VD], 1), (0, 0, FIRST_ITEM, 0))
        for rows_BK in torch.split(rows_UK[:, :k], USERS):
            rows_BK = rows_BK.contiguous()
            lengths_B = (rows_BK != PADDING).sum(1).double()
            times_R += torch.bincount(rows_BK.flatten(), minlength=len(times_R))
            sums_BF = embedding_bag(rows_BK, table_RF, mode="sum").double()
            bits_B, popular_B, known_B, ways_BD = sums_BF[:, 0], sums_BF[:, 1], sums_BF[:, 2], sums_BF[:, 3:]
            novelty.append(bits_B / lengths_B)
            popular.append(popular_B / lengths_B)
            pairs_B = lengths_B * (lengths_B - 1)
            cosines_B = (ways_BD.square().sum(1) - known_B) / pairs_B.clamp(min=1)
            diversity.append(torch.where(pairs_B > 0, 1 - cosines_B, torch.nan))
        users = {f"novelty@{k}": torch.cat(novelty), f"diversity@{k}": torch.cat(diversity)}
        times_V = times_R[FIRST_ITEM:]
        allowed = times_V[self.allowed_V]
        whole = {
            f"coverage@{k}": float((allowed > 0).double().mean()),
            f"gini@{k}": gini(allowed),
            f"popularity_lift@{k}": float(torch.cat(popular).nanmean()) / self.had - 1 if self.had else float("nan"),
        }
        return Shown(users, whole, times_V)

    @staticmethod
    def _of_rows(values_V: Tensor, rows_N: Tensor) -> Tensor:
        """Of item rows; 0 for a row behind the catalogue."""
        known_N = (rows_N >= FIRST_ITEM) & (rows_N < FIRST_ITEM + len(values_V))
        return values_V[(rows_N - FIRST_ITEM).clamp(0, len(values_V) - 1)] * known_N


def gini(times_V: Tensor) -> float:
    """Gini's coefficient of counts: sum of (2 i - V - 1) x_i over V times the sum of x, x ascending, i from 1."""
    ordered_V = times_V.double().sort().values
    items, total = len(ordered_V), float(ordered_V.sum())
    if not total:
        return float("nan")
    weights_V = 2 * torch.arange(1, items + 1, dtype=torch.float64) - items - 1
    return float((weights_V * ordered_V).sum()) / (items * total)


def directions(sequences: Sequences, items: int) -> Tensor:
    """Unit vectors of items, V × D float32, of the singular vectors of the training part's users × items; 0 without events."""
    from scipy.sparse import coo_matrix
    from sklearn.utils.extmath import randomized_svd

    begins_U, ends_U, _ = sequences.windows("train")
    some_U = torch.arange(0, len(begins_U), max(1, -(-len(begins_U) // LEARNT_FROM)))
    train = gather(sequences.items, sequences.times, begins_U[some_U], ends_U[some_U])
    known_N = (train.values >= FIRST_ITEM) & (train.values < FIRST_ITEM + items)
    places = (train.owners[known_N].numpy(), (train.values[known_N] - FIRST_ITEM).numpy())
    had_UV = coo_matrix((torch.ones(int(known_N.sum())).numpy(), places), shape=(len(train), items)).tocsr()
    had_UV.data[:] = 1
    size = min(DIRECTIONS, min(had_UV.shape) - 1)
    if size < 1:
        return torch.zeros(items, 1)
    _, singular_D, right_DV = randomized_svd(had_UV, size, random_state=0)
    return normalize(torch.from_numpy((right_DV * singular_D[:, None]).T.copy()).float(), dim=1)


def _sums(values_N: Tensor, offsets: Tensor) -> Tensor:
    total = torch.cat([values_N.new_zeros(1), values_N.cumsum(0)])
    return total[offsets[1:]] - total[offsets[:-1]]
