"""Judge the served path: recall and NDCG of the lists that users would see, over the whole catalogue.

U judged users · B histories of a batch · P (user, target) pairs · K depth of the lists
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from features.dataset import Dataset
from features.split import SplitSettings, is_cold
from recsys.batch import FIRST_ITEM, Batch, Sequences, gather
from recsys.errors import DataError, RequestError
from recsys.metrics import MISSED, measure, new_targets
from serving.catalogue import Catalogue
from serving.engine import Recommender
from serving.evaluation.baselines import BASELINES, MeanText, Ranked
from serving.lists import Lister, Lists
from serving.tables import lists_columns, lists_frame, write_frames

if TYPE_CHECKING:
    import polars as pl

USERS = 1024
"""Users judged at once."""


@dataclass(frozen=True)
class Report:
    """What was judged, the figures of the model and of whatever stood beside it, and the model's lists."""

    bundle: str
    split: str
    repeats: bool
    request_time: bool
    """Whether the model was told when each user's first target happened."""
    users: int
    """Users with a history and a target."""
    figures: Mapping[str, Mapping[str, float]]
    """recall@k and ndcg@k by name: model first."""
    slices: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Where the split has cold items, the figures by targets: `cold` and `warm` ones in full lists, and `cold among cold`."""
    lists: Lists
    """Of all users with a history and a later event."""
    user_ids: pl.Series
    """Of the lists."""
    catalogue: Catalogue

    def rows(self) -> list[tuple[str, Mapping[str, float]]]:
        """The figures as lines of a table."""
        slices = [(f"{name}: {slice_}", figures) for slice_, by in self.slices.items() for name, figures in by.items()]
        return [*self.figures.items(), *slices]

    def as_dict(self) -> dict[str, Any]:
        """The model's figures beside what was judged, the others' under `baselines`; ready for JSON."""
        others = {name: dict(values) for name, values in self.figures.items() if name != "model"}
        about = {"bundle": self.bundle, "split": self.split, "repeats": self.repeats, "request_time": self.request_time}
        counts = {"users": self.users, "underfilled": self.lists.underfilled, "popular": int(self.lists.popular.sum())}
        more = {"baselines": others, "slices": {name: dict(by) for name, by in self.slices.items()}}
        return {**about, **counts, **self.figures["model"], **{name: value for name, value in more.items() if value}}

    def frame(self) -> pl.DataFrame:
        """The model's lists: user_id, item_id, rank from 1, score."""
        return lists_frame(self.user_ids, self.lists, self.catalogue)

    def write_lists(self, path: Path) -> None:
        """Write `frame` as Parquet, whole or not at all."""
        write_frames([self.frame()], lists_columns(self.user_ids, self.catalogue), path, {"bundle": self.bundle})


def evaluate(
    recommender: Recommender,
    dataset: Dataset,
    split: str = "test",
    ks: Sequence[int] = (10, 50),
    repeats: bool = False,
    baselines: bool = True,
    depth: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Report:
    """Judge users who have a history and, in the split, a target: an item new to them; with `repeats`, any item.

    Without `repeats` items of the history are not recommended. A target that the model has no vector for is missed. With
    `baselines` popularity and item-kNN are judged too, and each stage of the served path: as retrieved and as ranked where
    there is a ranker, exact search (as retrieved) where the bundle's is not. `depth` is how long
    lists are (default and least: the largest k). A model that reads the time of requests is asked at the time of each
    user's first target. A data set with cold items (split.cold_one_in) is judged by targets too, warm and cold ones, and the
    cold ones once more among cold items alone, beside the items nearest to the mean text of the history. `progress` hears
    (users done, users in all).
    Raises DataError: nobody can be judged. RequestError: no such split, or a k below 1.
    """
    if split not in ("validation", "test"):
        raise RequestError(f"split {split!r} cannot be judged; give validation or test")
    if not ks or min(ks) < 1:
        raise RequestError(f"ks are {list(ks)}; give at least one, each at least 1")
    sequences = recommender.catalogue.align(dataset)
    begins_U, ends_U, targets_U = sequences.windows(split)
    users_U = ((ends_U > begins_U) & (targets_U > ends_U)).nonzero().flatten()
    listers: dict[str, Lister] = {"model": recommender}
    if baselines:
        if recommender.ranker is not None:
            if recommender.ranker_blocks:
                listers["model, as retrieved"] = recommender.with_ranker(0)
            else:
                listers["model, ranked"] = recommender.with_ranker(recommender.ranker.settings.blocks)
        if not recommender.searcher.exact:
            listers["model, exact search"] = recommender.with_ranker(0).with_exact_search()
        learnt = recommender.model.items
        listers |= {name: fit(sequences.learnable(learnt), learnt) for name, fit in BASELINES.items()}
    cold = _Cold.of(recommender, dataset)
    if cold is not None:
        listers |= cold.listers(recommender, baselines)
    figures, slices, judged, own = {}, dict[str, dict[str, dict[str, float]]](), 0, None
    for number, (name, lister) in enumerate(listers.items()):

        def tell(done: int, number: int = number) -> None:
            progress(number * len(users_U) + done, len(listers) * len(users_U))

        lists, ranks_P, owners_P, targets_P = judge(lister, sequences, split, users_U, max(*ks, depth), repeats, tell)
        if not len(owners_P):
            raise DataError(f"the {split} split has no user with a history and a target; give more events or another [split]")
        if cold is not None:
            for slice_, chosen_P in cold.slices(name, targets_P).items():
                if bool(chosen_P.any()):
                    part = measure(ranks_P[chosen_P], owners_P[chosen_P], len(users_U), tuple(ks))
                    slices.setdefault(slice_, {})[name.removesuffix(AMONG)] = part
        if not name.endswith(AMONG):
            figures[name] = measure(ranks_P, owners_P, len(users_U), tuple(ks))
        own, judged = own or lists, len(torch.unique(owners_P))
    assert own is not None  # the model is always judged
    user_ids = dataset.user_ids.gather(users_U.numpy())
    return Report(
        recommender.id, split, repeats, recommender.reads_now, judged, figures, slices, own, user_ids, recommender.catalogue
    )


AMONG = ", among cold items"
"""Behind the name of a lister that ranks cold items alone."""


@dataclass(frozen=True)
class _Cold:
    """The items of a catalogue that a data set keeps cold."""

    cold_V: Tensor

    @classmethod
    def of(cls, recommender: Recommender, dataset: Dataset) -> _Cold | None:
        """None where the data set keeps none cold."""
        settings = SplitSettings(**dataset.manifest["settings"][SplitSettings.section])
        cold_V = torch.tensor(is_cold(recommender.catalogue.items["item_id"], settings).to_numpy())
        return cls(cold_V) if bool(cold_V.any()) else None

    def listers(self, recommender: Recommender, baselines: bool) -> dict[str, Lister]:
        """What ranks cold items alone and, with `baselines`, what ranks by text."""
        among: dict[str, Lister] = {"model" + AMONG: _Among(recommender, self.cold_V)}
        if not baselines:
            return among
        described, learnt = recommender.catalogue.described, recommender.model.items
        text = MeanText(described, learnt, torch.ones_like(self.cold_V))
        return {**among, "mean text": Ranked(text), "mean text" + AMONG: Ranked(text.among(self.cold_V))}

    def slices(self, lister: str, targets_P: Tensor) -> dict[str, Tensor]:
        """Which targets each slice of a lister's figures has."""
        known_P = targets_P < FIRST_ITEM + len(self.cold_V)
        cold_P = known_P & self.cold_V[(targets_P - FIRST_ITEM).clamp(max=len(self.cold_V) - 1)]
        if lister.endswith(AMONG):
            return {"cold among cold": cold_P}
        return {"warm": ~cold_P, "cold": cold_P}


@dataclass(frozen=True)
class _Among:
    """A recommender that may name some items alone."""

    recommender: Recommender
    among_V: Tensor

    @property
    def reads_now(self) -> bool:
        return self.recommender.reads_now

    def recommend(self, histories: Batch, k: int, now: Tensor | None = None, *, filter_seen: bool = True) -> Lists:
        rows = (self.among_V.nonzero().flatten() + FIRST_ITEM).tolist()
        return self.recommender.recommend(histories, k, now, filter_seen, allow=rows)


def judge(
    lister: Lister, sequences: Sequences, split: str, users_U: Tensor, depth: int, repeats: bool, tell: Callable[[int], None]
) -> tuple[Lists, Tensor, Tensor, Tensor]:
    """The lists of all users, and rank, owner (place in `users_U`) and item row of every target."""
    begins_U, ends_U, targets_U = sequences.windows(split)
    parts, ranks, owners, targets = [], [], [], []
    for start in range(0, len(users_U), USERS):
        users_B = users_U[start : start + USERS]
        history = gather(sequences.items, sequences.times, begins_U[users_B], ends_U[users_B])
        future = gather(sequences.items, sequences.times, ends_U[users_B], targets_U[users_B])
        asked_B = future.times[future.offsets[:-1]] if lister.reads_now else None
        lists = lister.recommend(history, depth, asked_B, filter_seen=not repeats)
        owners_P, targets_P = new_targets(Batch.of([[]] * len(history)) if repeats else history, future)
        hits_PK = lists.rows[owners_P] == targets_P[:, None]
        ranks.append(torch.where(hits_PK.any(1), hits_PK.byte().argmax(1) + 1, MISSED))
        owners.append(owners_P + start)
        targets.append(targets_P)
        parts.append(lists)
        tell(start + len(users_B))
    empty = torch.zeros(0, dtype=torch.int64)
    ranks_P, owners_P, targets_P = (torch.cat([empty, *found]) for found in (ranks, owners, targets))
    return Lists.joined(parts, depth), ranks_P, owners_P, targets_P
