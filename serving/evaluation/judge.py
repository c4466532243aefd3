"""Judge lists by a protocol: the served path, each of its stages, and what it must beat, by one code.

U judged users · B histories of a batch · P (user, target) pairs · K depth of the lists · V catalogue items
R item rows: the catalogue's, and behind them those of items that the data set has and the catalogue has not
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from features.dataset import Dataset
from features.split import SplitSettings, is_cold
from recsys.batch import FIRST_ITEM, Batch, Sequences, gather
from recsys.errors import DataError, RequestError
from recsys.metrics import MISSED, measure, measure_users, new_targets
from recsys.progress import Count
from serving.catalogue import Catalogue
from serving.engine import Recommender
from serving.evaluation.baselines import BASELINES, REPEATING, Baseline, MeanText, Ranked
from serving.evaluation.beyond import Beyond, Shown
from serving.evaluation.given import GivenLists
from serving.evaluation.protocol import ProtocolSettings, protocol_of
from serving.lists import Lists
from serving.tables import lists_frame

if TYPE_CHECKING:
    import polars as pl

USERS = 1024
"""Users judged at once."""
CHOOSING = 1000
"""Users of the validation split by whom the variant of a baseline is chosen, evenly chosen."""
AMONG = ", among cold items"
"""Behind the name of a lister that ranks cold items alone."""


@dataclass(frozen=True)
class Facts:
    """What a data set says of its items, by the rows of a catalogue: the same for every model that is judged by it."""

    rows_D: Tensor
    """The row of each of its items, the most popular in training first."""
    counts_R: Tensor
    """Training events; 0 for an item that is kept cold, and for one of the catalogue that the data set has not."""
    cold_R: Tensor
    """Whether an item is kept cold."""

    @staticmethod
    def of(dataset: Dataset, catalogue: Catalogue) -> Facts:
        items = dataset.items
        rows_D = catalogue.aligned(items["item_id"])[FIRST_ITEM:].long()
        rows = max(FIRST_ITEM + len(catalogue), int(rows_D.max()) + 1)
        counts_R, cold_R = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool)
        counts_R[rows_D] = torch.tensor(items["events"].to_numpy()).long()
        split = SplitSettings(**dataset.manifest["settings"][SplitSettings.section])
        cold_R[rows_D] = torch.tensor(is_cold(items["item_id"], split).to_numpy())
        return Facts(rows_D, counts_R, cold_R)


@dataclass(frozen=True)
class Judged:
    """How one lister's lists were found."""

    kind: str
    """model, stage (of the served path) or baseline."""
    ranks_P: Tensor
    """Rank from 1 of every target, MISSED where it is in no list; int64."""
    shown: Shown | None
    """Of the first places; None where only some items are ranked."""


@dataclass(frozen=True)
class Evaluation:
    """What was judged, by which protocol, and every lister's ranks; model first."""

    protocol: ProtocolSettings
    ks: tuple[int, ...]
    dataset: Dataset
    catalogue: Catalogue
    sequences: Sequences
    """The data set's, in the rows of the catalogue."""
    users_U: Tensor
    """Of `sequences`: those with a history and a target."""
    owners_P: Tensor
    """Place in `users_U` of each target."""
    targets_P: Tensor
    """Item rows."""
    judged: Mapping[str, Judged]
    facts: Facts
    """What the data set says of the items, whatever the catalogue knows."""
    lists: Lists
    """The model's."""
    asked_U: Tensor
    """Users of the lists: those with a history and a later event, of whom some have no target."""

    @property
    def users(self) -> int:
        """Users with a history and a target."""
        return len(self.users_U)

    @property
    def user_ids(self) -> pl.Series:
        """Of the lists."""
        return self.dataset.user_ids.gather(self.asked_U.numpy())

    def values(
        self, lister: str, metrics: tuple[str, ...], ks: tuple[int, ...] = (), chosen_P: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Of each judged user, float64 of shape U; with `chosen_P` of these targets alone, NaN for a user who has none."""
        ranks_P, owners_P = self.judged[lister].ranks_P, self.owners_P
        if chosen_P is not None:
            ranks_P, owners_P = ranks_P[chosen_P], owners_P[chosen_P]
        found = measure_users(ranks_P, owners_P, self.users, ks or self.ks, metrics)
        if chosen_P is None:
            return found
        has_U = torch.bincount(owners_P, minlength=self.users) > 0
        blank_U = torch.full((self.users,), torch.nan, dtype=torch.float64)
        return {name: blank_U.masked_scatter(has_U, values) for name, values in found.items()}

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """recall@k and ndcg@k by lister; those that rank cold items alone stand in `slices`."""
        return {
            name: measure(judged.ranks_P, self.owners_P, self.users, self.ks)
            for name, judged in self.judged.items()
            if not name.endswith(AMONG)
        }

    @property
    def cold_P(self) -> Tensor:
        """Which targets are of items that are kept cold."""
        return self.facts.cold_R[self.targets_P]

    @property
    def slices(self) -> dict[str, dict[str, dict[str, float]]]:
        """Where the split has cold items, the figures by targets: `warm` and `cold` in full lists, and `cold among cold`."""
        out: dict[str, dict[str, dict[str, float]]] = {}
        if not bool(self.facts.cold_R.any()):
            return out
        for name, judged in self.judged.items():
            among = name.endswith(AMONG)
            parts = {"cold among cold": self.cold_P} if among else {"warm": ~self.cold_P, "cold": self.cold_P}
            for slice_, chosen_P in parts.items():
                if bool(chosen_P.any()):
                    found = measure(judged.ranks_P[chosen_P], self.owners_P[chosen_P], self.users, self.ks)
                    out.setdefault(slice_, {})[name.removesuffix(AMONG)] = found
        return out

    def frame(self) -> pl.DataFrame:
        """The model's lists: user_id, item_id, rank from 1, score."""
        return lists_frame(self.user_ids, self.lists, self.catalogue)


def evaluate(
    subject: Recommender | GivenLists,
    dataset: Dataset,
    protocol: ProtocolSettings | None = None,
    ks: Sequence[int] = (10, 50),
    baselines: bool = True,
    progress: Count = lambda done, of: None,
) -> Evaluation:
    """Judge the lists of users who have a history and a target, as the protocol says (default: new items of the test).

    A target that the model has no vector for is missed. With `baselines` what is in serving.evaluation.baselines is judged
    too, each by the variant that is best on validation, and each stage of the served path: as retrieved and as ranked where
    there is a ranker, exact search (as retrieved) where the bundle's is not. Lists are as long as the largest k. A model that
    reads the time of requests is asked at the time of each user's first target. A data set with cold items (split.cold_one_in)
    is judged by targets too, warm and cold ones, and the cold ones once more among cold items alone, beside the items nearest
    to the mean text of the history.
    Raises DataError: nobody can be judged. RequestError: a k below 1, or a protocol that does not fit.
    """
    if not ks or min(ks) < 1:
        raise RequestError(f"ks are {list(ks)}; give at least one, each at least 1")
    made = dataset.manifest["settings"]
    chosen = protocol_of(protocol or ProtocolSettings(), made, subject.manifest.get("kind", "lists"))
    catalogue, learnt = subject.catalogue, subject.learnt
    sequences = catalogue.align(dataset)
    asked_U = sequences.judged(chosen.split)
    nobody = f"the {chosen.split} split has no user with a history and a target; give more events or another [split]"
    if not len(asked_U):
        raise DataError(nobody)
    facts = Facts.of(dataset, catalogue)
    some_cold = bool(facts.cold_R.any())
    if chosen.candidates == "cold" and not some_cold:
        raise RequestError("the data set keeps no item cold; set protocol.candidates = all, or make it with split.cold_one_in")
    among_R = {"all": None, "warm": facts.counts_R > 0, "cold": facts.cold_R}[chosen.candidates]
    listers: dict[str, tuple[str, Lister]] = {"model": ("model", subject)}
    if baselines:
        if isinstance(subject, Recommender):
            listers |= {name: ("stage", stage) for name, stage in _stages(subject).items()}
        fits = BASELINES | ({} if chosen.filter_seen else REPEATING)
        known = sequences.learnable(learnt)
        listers |= {name: ("baseline", _best(fit(known, learnt), sequences, chosen.filter_seen)) for name, fit in fits.items()}
    if some_cold and chosen.candidates == "all" and isinstance(subject, Recommender):
        listers["model" + AMONG] = ("model", _among(subject, facts.cold_R))
    if some_cold and baselines and chosen.candidates != "warm":
        text = Ranked(MeanText(catalogue.described, learnt))
        listers["mean text"] = ("baseline", text)
        if chosen.candidates == "all":
            listers["mean text" + AMONG] = ("baseline", _among(text, facts.cold_R))
    if among_R is not None:
        listers = {name: (kind, _among(lister, among_R)) for name, (kind, lister) in listers.items()}
    shown_D = facts.rows_D if among_R is None else facts.rows_D[among_R[facts.rows_D]]
    yardstick = Beyond(sequences, facts.counts_R, shown_D, asked_U, chosen.split)
    judged, own = dict[str, Judged](), None
    owners_P = targets_P = torch.zeros(0, dtype=torch.int64)
    for number, (name, (kind, lister)) in enumerate(listers.items()):

        def tell(done: int, number: int = number) -> None:
            progress(number * len(asked_U) + done, len(listers) * len(asked_U))

        lists, ranks_P, owners_P, targets_P = judge(lister, sequences, chosen, asked_U, max(ks), tell)
        counted_P = torch.ones_like(targets_P, dtype=torch.bool) if among_R is None else among_R[targets_P]
        if not bool(counted_P.any()):
            raise DataError(nobody)
        shown = None if name.endswith(AMONG) else yardstick.measure(lists.rows, min(ks, key=lambda k: abs(k - 10)))
        judged[name] = Judged(kind, ranks_P[counted_P], shown)
        owners_P, targets_P, own = owners_P[counted_P], targets_P[counted_P], own or lists
    assert own is not None  # the model is always judged
    places_U, owners_P = torch.unique(owners_P, return_inverse=True)
    return Evaluation(
        protocol=chosen,
        ks=tuple(ks),
        dataset=dataset,
        catalogue=catalogue,
        sequences=sequences,
        users_U=asked_U[places_U],
        owners_P=owners_P,
        targets_P=targets_P,
        judged=judged,
        facts=facts,
        lists=own,
        asked_U=asked_U,
    )


def judge(
    lister: Lister,
    sequences: Sequences,
    protocol: ProtocolSettings,
    users_U: Tensor,
    depth: int,
    tell: Callable[[int], None],
) -> tuple[Lists, Tensor, Tensor, Tensor]:
    """The lists of all users, and rank, owner (place in `users_U`) and item row of every target."""
    begins_U, ends_U, targets_U = sequences.windows(protocol.split)
    if protocol.targets == "next":
        targets_U = torch.minimum(targets_U, ends_U + 1)
    parts, ranks, owners, targets = [], [], [], []
    for start in range(0, len(users_U), USERS):
        users_B = users_U[start : start + USERS]
        history = gather(sequences.items, sequences.times, begins_U[users_B], ends_U[users_B])
        future = gather(sequences.items, sequences.times, ends_U[users_B], targets_U[users_B])
        if isinstance(lister, GivenLists):
            lists = lister.of(users_B, depth)
        else:
            asked_B = future.times[future.offsets[:-1]] if lister.reads_now else None
            lists = lister.recommend(history, depth, asked_B, filter_seen=protocol.filter_seen)
        new = protocol.targets == "new" or (protocol.targets == "next" and protocol.filter_seen)
        owners_P, targets_P = new_targets(history if new else Batch.of([[]] * len(history)), future)
        ranks.append(ranks_in(lists.rows, owners_P, targets_P))
        owners.append(owners_P + start)
        targets.append(targets_P)
        parts.append(lists)
        tell(start + len(users_B))
    empty = torch.zeros(0, dtype=torch.int64)
    ranks_P, owners_P, targets_P = (torch.cat([empty, *found]) for found in (ranks, owners, targets))
    return Lists.joined(parts, depth), ranks_P, owners_P, targets_P


def ranks_in(rows_UK: Tensor, owners_P: Tensor, targets_P: Tensor) -> Tensor:
    """Rank from 1 of each target in its owner's list, MISSED where it is not there; int64 of shape P."""
    ranks_P = torch.full((len(targets_P),), MISSED)
    for start in range(0, len(targets_P), PAIRS):
        stop = start + PAIRS
        hits, places = (rows_UK[owners_P[start:stop]] == targets_P[start:stop, None]).nonzero(as_tuple=True)
        ranks_P[start + hits] = places + 1
    return ranks_P


PAIRS = 2**12
"""Targets looked up at once: what stays in a core's cache; with 2**16 it takes three times as long."""


def _stages(recommender: Recommender) -> dict[str, Lister]:
    """What the served path is made of, each alone: exact search, then what the index finds, then the ranker's order.

    What diversity and popularity (serving.ServingSettings) change is in none of them but the model's own lists.
    """
    stages: dict[str, Lister] = {}
    plain, settings = recommender.with_ranker(0).in_plain_order(), recommender.serving
    if recommender.ranker_blocks or settings.diversity or settings.popularity:
        stages["model, as retrieved"] = plain
    if recommender.ranker is not None and not recommender.ranker_blocks:
        stages["model, ranked"] = recommender.with_ranker(recommender.ranker.settings.blocks).in_plain_order()
    if not recommender.searcher.exact:
        stages["model, exact search"] = plain.with_exact_search()
    return stages


def _best(variants: Sequence[Baseline], sequences: Sequences, filter_seen: bool) -> Ranked:
    """The variant of the best NDCG@10 on validation; the first where nobody can be judged there."""
    if len(variants) == 1:
        return Ranked(variants[0])
    protocol = ProtocolSettings(split="validation", targets="new" if filter_seen else "all", filter_seen=filter_seen)
    users_U = sequences.judged("validation")
    users_U = users_U[:: max(1, -(-len(users_U) // CHOOSING))]
    worth = []
    for variant in variants:
        _, ranks_P, owners_P, _ = judge(Ranked(variant), sequences, protocol, users_U, 10, lambda done: None)
        worth.append(measure(ranks_P, owners_P, len(users_U), (10,))["ndcg@10"] if len(owners_P) else 0.0)
    return Ranked(variants[worth.index(max(worth))])


def _among(lister: Lister, among_R: Tensor) -> Lister:
    """The same of some items alone."""
    if isinstance(lister, GivenLists):
        raise RequestError("lists that are given are judged as they are; set protocol.candidates = all")
    if isinstance(lister, Ranked):
        return Ranked(lister.baseline, among_R[FIRST_ITEM:])
    assert isinstance(lister, Recommender)
    return _Among(lister, among_R[: FIRST_ITEM + len(lister.catalogue)].nonzero().flatten().tolist())


@dataclass(frozen=True)
class _Among:
    """A recommender that may name some items alone."""

    recommender: Recommender
    rows: list[int]

    @property
    def reads_now(self) -> bool:
        return self.recommender.reads_now

    def recommend(self, histories: Batch, k: int, now: Tensor | None = None, *, filter_seen: bool = True) -> Lists:
        return self.recommender.recommend(histories, k, now, filter_seen, allow=self.rows)


Lister = Recommender | Ranked | GivenLists | _Among
"""Whatever names k items for each history."""
