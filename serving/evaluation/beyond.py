"""What lists show, beside how right they are: coverage, Gini, novelty, diversity, popularity lift.

U users · K places of a list · R item rows · D items of the data set, and directions of an item
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from recsys.batch import PADDING, Sequences

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
    times_R: Tensor
    """How often each item row stands in the first k places; int64."""


class Beyond:
    """Measures lists by what the training part says of the items: one yardstick for all listers."""

    def __init__(self, sequences: Sequences, counts_R: Tensor, rows_D: Tensor, users_U: Tensor, split: str) -> None:
        """`counts_R` are training events of item rows, `rows_D` the items that may be shown, `users_U` who gets the lists."""
        self.counts_R, self.rows_D = counts_R.double(), rows_D
        self.ways_RD = directions(sequences, counts_R)
        histories = sequences.histories(split, users_U)
        popular_U = torch.bincount(histories.owners, self.counts_R[histories.values], len(histories))
        popular_U /= histories.lengths.clamp(min=1)
        self.had = float(popular_U.mean())
        chances_R = (self.counts_R + 1) / (self.counts_R.sum() + len(rows_D))
        self.bits_R = -torch.log2(chances_R)

    def measure(self, rows_UK: Tensor, k: int) -> Shown:
        """Of the first k places.

        coverage = items in any list / items of the data set. gini = inequality of how often items are shown, 0: all
        alike, 1: one alone. novelty = mean bits -log2 of the item's share of training events, one event added to each item
        (Zhou et al. 2010). diversity = 1 - mean cosine of two items of the list, by their DIRECTIONS of a singular value
        decomposition of the training part's users × items (Smyth & McClave 2001). popularity_lift = mean training events of
        shown items over those of the items in the users' histories, - 1 (Abdollahpouri et al. 2019).
        """
        times_R = torch.zeros(len(self.counts_R), dtype=torch.int64)
        novelty, diversity, popular = [], [], []
        facts_RF = torch.stack([self.bits_R.float(), self.counts_R.float(), self.ways_RD.square().sum(1)], 1)
        table_RF = torch.cat([facts_RF, self.ways_RD], 1)
        table_RF[PADDING] = 0
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
        times_D = times_R[self.rows_D]
        whole = {
            f"coverage@{k}": float((times_D > 0).double().mean()),
            f"gini@{k}": gini(times_D),
            f"popularity_lift@{k}": float(torch.cat(popular).nanmean()) / self.had - 1 if self.had else float("nan"),
        }
        return Shown(users, whole, times_R)


def gini(times_D: Tensor) -> float:
    """Gini's coefficient of counts: sum of (2 i - V - 1) x_i over V times the sum of x, x ascending, i from 1."""
    ordered_D = times_D.double().sort().values
    items, total = len(ordered_D), float(ordered_D.sum())
    if not total:
        return float("nan")
    weights_D = 2 * torch.arange(1, items + 1, dtype=torch.float64) - items - 1
    return float((weights_D * ordered_D).sum()) / (items * total)


def directions(sequences: Sequences, counts_R: Tensor) -> Tensor:
    """Unit vectors of item rows, R × DIRECTIONS float32, of the singular vectors of the training part's users × items.

    0 for a row without training events.
    """
    from scipy.sparse import coo_matrix
    from sklearn.utils.extmath import randomized_svd

    train = sequences.histories("train", torch.arange(0, sequences.users, max(1, -(-sequences.users // LEARNT_FROM))))
    learnt_N = counts_R[train.values] > 0
    places = (train.owners[learnt_N].numpy(), train.values[learnt_N].numpy())
    had_UR = coo_matrix((torch.ones(int(learnt_N.sum())).numpy(), places), shape=(len(train), len(counts_R))).tocsr()
    had_UR.data[:] = 1
    size = min(DIRECTIONS, min(had_UR.shape) - 1)
    if size < 1:
        return torch.zeros(len(counts_R), 1)
    _, singular_D, right_DR = randomized_svd(had_UR, size, random_state=0)
    ways_RD = normalize(torch.from_numpy((right_DR * singular_D[:, None]).T.copy()).float(), dim=1)
    return ways_RD.masked_fill((counts_R == 0)[:, None], 0)
