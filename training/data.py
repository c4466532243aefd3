"""Training batches: windows of histories, grouped by length under a token budget, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.batch import Batch, Sequences, gather, group_by_length

LENGTH_JITTER = 0.1
"""Relative noise on lengths before grouping, so that an epoch's batches differ; costs about as much padding."""


@dataclass(frozen=True)
class TrainingBatch:
    """Histories and, for every event in them, the event that follows; N targets."""

    history: Batch
    targets: Tensor
    """Item rows, int64, shape N, aligned with `history.values`."""

    def to(self, device: torch.device) -> TrainingBatch:
        return TrainingBatch(self.history.to(device), self.targets.to(device))


WINDOWS = ("last", "all")


class EpochBatches:
    """One epoch of next-item batches from the training part of each user, in an order drawn from (seed, epoch).

    A window has at most `length` inputs. With windows "last" a user gives the newest one; with "all", consecutive ones
    from the end backwards, so that every training event but the first is a target once.
    """

    def __init__(
        self, sequences: Sequences, length: int, batch_tokens: int, seed: int, epoch: int, windows: str = "last"
    ) -> None:
        self.sequences, generator = sequences, torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        begins, ends, _ = sequences.windows("train")
        inputs = (ends - begins - 1).clamp(min=0)
        count = (inputs + length - 1) // length if windows == "all" else inputs.clamp(max=1)
        place = torch.arange(int(count.sum())) - torch.repeat_interleave(count.cumsum(0) - count, count)
        self.ends = torch.repeat_interleave(ends, count) - place * length
        self.begins = torch.maximum(torch.repeat_interleave(begins, count), self.ends - length - 1)
        lengths = self.ends - self.begins - 1
        noise = torch.randn(len(lengths), generator=generator) * LENGTH_JITTER
        order = torch.argsort(lengths * noise.exp(), stable=True)
        groups = group_by_length(lengths[order], batch_tokens)
        self.batches = [order[a:b] for a, b in groups]
        self.order = torch.randperm(len(groups), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self.starting_at(0)

    def starting_at(self, step: int) -> Iterator[TrainingBatch]:
        """The batches from `step` on: what is left of an epoch that was interrupted."""
        items, times = self.sequences.items, self.sequences.times
        for group in self.order[step:]:
            users = self.batches[group]
            begins, ends = self.begins[users], self.ends[users]
            history = gather(items, times, begins, ends - 1)
            yield TrainingBatch(history, gather(items, times, begins + 1, ends).values)
