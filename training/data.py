"""Training batches: windows of histories, grouped by length under a token budget, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from recsys.batch import UNKNOWN, Batch, Sequences, gather, group_by_length
from recsys.errors import DataError
from training.team import ALONE, Team

LENGTH_JITTER = 0.1
"""Relative noise on lengths before grouping, so that an epoch's batches differ; costs about as much padding."""


@dataclass(frozen=True)
class TrainingBatch:
    """Histories, and the items that states at some of their events are to name; N events, P targets."""

    history: Batch
    asked: Tensor | None
    """When each state is asked for: the time of the event that follows, int64, shape N; None where nothing follows."""
    places: Tensor
    """Events of `history` whose state is judged, int64, shape P."""
    targets: Tensor
    """Item rows, int64, shape P."""
    users: Tensor
    """Whose histories they are, int64."""
    counts: bool = True
    """Whether anything is learnt of it; else it is there for a process that has nothing left while others have."""

    def to(self, device: torch.device) -> TrainingBatch:
        asked = None if self.asked is None else self.asked.to(device)
        places, targets, users = (tensor.to(device) for tensor in (self.places, self.targets, self.users))
        return TrainingBatch(self.history.to(device), asked, places, targets, users, self.counts)


WINDOWS = ("last", "all", "prefixes")


class EpochBatches:
    """One epoch of batches from the training part of each user, in an order drawn from (seed, epoch).

    A window has at most `length` inputs. With windows "last" a user gives the newest one; with "all", consecutive ones
    from the end backwards, so that every training event but the first is a target once; with "prefixes" one for every
    target, which its last state alone is to name. Targets are the events that follow; for the `masked` objective the
    inputs themselves, all events of the window, to be hidden by `mask`.

    Each process of a team has `sequences` of its own and its share of `batch_tokens`. All do as many steps, cut where the
    tokens are halved, thirded and so on, and so of about equal length and cost in all: together they are the batches of one
    process in distribution.
    """

    def __init__(
        self,
        sequences: Sequences,
        length: int,
        batch_tokens: int,
        seed: int,
        epoch: int,
        windows: str = "last",
        masked: bool = False,
        packed: bool = False,
        team: Team = ALONE,
    ) -> None:
        self.sequences, generator = sequences, torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        self.shift, self.prefixes = int(not masked), windows == "prefixes"
        begins, ends, _ = sequences.windows("train")
        inputs = (ends - begins - self.shift).clamp(min=0)
        step = 1 if self.prefixes else length
        count = inputs.clamp(max=1) if windows == "last" else (inputs + step - 1) // step
        place = torch.arange(int(count.sum())) - torch.repeat_interleave(count.cumsum(0) - count, count)
        self.ends = torch.repeat_interleave(ends, count) - place * step
        self.begins = torch.maximum(torch.repeat_interleave(begins, count), self.ends - length - self.shift)
        lengths = self.ends - self.begins - self.shift
        own = generator if team.size == 1 else torch.Generator().manual_seed((seed * 1_000_003 + epoch) * team.size + team.rank)
        noise = torch.randn(len(lengths), generator=own) * LENGTH_JITTER
        order = torch.argsort(lengths * noise.exp(), stable=True)
        groups = group_by_length(lengths[order], max(1, batch_tokens // team.size), packed)
        steps = team.most(len(groups))
        if team.size > 1:
            if steps and team.most(-len(order)) == 0:
                raise DataError(f"fewer histories than {team.size} processes; start fewer")
            groups = cut_by_cost(lengths[order], steps)
        self.batches = [order[a:b] for a, b in groups]
        self.order = torch.randperm(steps, generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self.starting_at(0)

    def starting_at(self, step: int) -> Iterator[TrainingBatch]:
        """The batches from `step` on: what is left of an epoch that was interrupted."""
        items, times = self.sequences.items, self.sequences.times
        for group in self.order[step:]:
            users = self.batches[group]
            counts = len(users) > 0
            users = users if counts else torch.tensor([0])
            begins, ends = self.begins[users], self.ends[users]
            history = gather(items, times, begins, ends - self.shift)
            owners = torch.searchsorted(self.sequences.offsets, begins, right=True) - 1
            places = history.offsets[1:] - 1 if self.prefixes else torch.arange(len(history.values))
            future = gather(items, times, begins + self.shift, ends)
            asked = future.times if self.shift else None
            yield TrainingBatch(history, asked, places, future.values[places], owners, counts)

    @property
    def tokens(self) -> Tensor:
        """Padded events of each batch, in the order of their steps, int64."""
        lengths = [(self.ends - self.begins - self.shift)[self.batches[group]] for group in self.order]
        return torch.tensor([len(part) * int(part.max()) if len(part) else 0 for part in lengths])


def cut_by_cost(lengths: Tensor, groups: int) -> list[tuple[int, int]]:
    """Cut ascending lengths into so many consecutive groups [a, b) of about equal sums; some may be empty."""
    sums = lengths.cumsum(0, dtype=torch.float64)
    wanted = torch.arange(1, groups, dtype=torch.float64) * (float(sums[-1]) / groups if len(sums) else 0.0)
    cuts = [0, *torch.searchsorted(sums - lengths / 2, wanted).tolist(), len(lengths)]
    return list(pairwise(cuts))


def recent(sequences: Sequences, since: int, length: int) -> Sequences:
    """The training parts of users who have a target from `since` on, each cut to the windows that end with such targets.

    A target is any training event but a user's first; windows have `length` inputs and are counted from the end backwards.
    """
    begins_U, ends_U, _ = sequences.windows("train")
    passed = torch.cat([torch.zeros(1, dtype=torch.int64), (sequences.times >= since).cumsum(0)])
    targets_U = passed[ends_U] - passed[torch.minimum(begins_U + 1, ends_U)]
    inputs_U = (targets_U + length - 1) // length * length
    starts_U = torch.where(targets_U > 0, torch.maximum(begins_U, ends_U - inputs_U - 1), ends_U)
    train = gather(sequences.items, sequences.times, starts_U, ends_U)
    return Sequences(train.values.int(), train.times, train.offsets, train.lengths, train.lengths)


def mask(batch: TrainingBatch, share: float, generator: torch.Generator) -> TrainingBatch:
    """Hide each event with probability `share`, and the last of a history where none is hidden; they are the targets.

    BERT4Rec's cloze task (Sun et al. 2019), with UNKNOWN as the mask.
    """
    history = batch.history
    hidden_N = torch.rand(len(history.values), generator=generator, device=generator.device) < share
    hidden_B = torch.bincount(history.owners[hidden_N], minlength=len(history))
    hidden_N[history.offsets[1:][hidden_B == 0] - 1] = True
    values = history.values.masked_fill(hidden_N, UNKNOWN)
    places = hidden_N.nonzero().flatten()
    return TrainingBatch(replace(history, values=values), None, places, history.values[places], batch.users, batch.counts)
