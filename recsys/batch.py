"""Jagged histories: the one shape contract that features, training and serving share.

N events · U users · B histories of a batch · T positions
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = 0
"""Item row that fills unused positions."""
UNKNOWN = 1
"""Item row of an item that the model has no embedding for."""
FIRST_ITEM = 2
"""Row of the first item of the catalogue; rows are ordered by training events, most first, ties by item id."""


@dataclass(frozen=True)
class Batch:
    """B jagged histories, oldest event first; `values` and `offsets` are those of a TorchRec JaggedTensor."""

    values: Tensor
    """Item rows, int64, shape N."""
    offsets: Tensor
    """Where each history starts, int64, shape B + 1."""
    times: Tensor
    """Event times in seconds since 1970, int64, shape N."""

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    @property
    def owners(self) -> Tensor:
        """Which history each event belongs to, int64, shape N."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.values.device), self.lengths)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @staticmethod
    def of(histories: Sequence[Sequence[int]], times: Sequence[Sequence[int]] | None = None) -> Batch:
        """Pack lists of item rows; missing times are 0."""
        lengths = torch.tensor([0, *(len(history) for history in histories)], dtype=torch.int64)
        values = torch.tensor([row for history in histories for row in history], dtype=torch.int64)
        flat = torch.zeros_like(values) if times is None else torch.tensor([t for ts in times for t in ts], dtype=torch.int64)
        return Batch(values, lengths.cumsum(0), flat)

    def to(self, device: torch.device) -> Batch:
        return Batch(self.values.to(device), self.offsets.to(device), self.times.to(device))

    def last(self, events: int) -> Batch:
        """Each history cut to its last `events` events."""
        starts = torch.maximum(self.offsets[:-1], self.offsets[1:] - events)
        return gather(self.values, self.times, starts, self.offsets[1:])

    def padded(self, positions: int | None = None) -> Tensor:
        """Item rows as int64 of shape B × T, right-padded with PADDING to `positions` (default: the longest history)."""
        longest = int(self.lengths.max()) if len(self) else 0
        out_BT = self.values.new_full((len(self), longest if positions is None else positions), PADDING)
        out_BT[self.mask(out_BT.shape[1])] = self.values
        return out_BT

    def places(self, positions: int) -> Tensor:
        """Where each event lies in a flat array of B × T, int64, shape N."""
        starts = torch.arange(len(self), device=self.values.device) * positions - self.offsets[:-1]
        return torch.arange(len(self.values), device=self.values.device) + torch.repeat_interleave(starts, self.lengths)

    def mask(self, positions: int) -> Tensor:
        """True where a padded position holds an event; bool, shape B × T."""
        return torch.arange(positions, device=self.values.device) < self.lengths[:, None]


def gather(values: Tensor, times: Tensor, starts: Tensor, ends: Tensor) -> Batch:
    """The batch of the windows [starts, ends) of flat events; starts and ends are int64 of shape B."""
    lengths = ends - starts
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    positions = torch.arange(int(offsets[-1]), device=values.device) + torch.repeat_interleave(starts - offsets[:-1], lengths)
    return Batch(values[positions].long(), offsets, times[positions])


def spread(count: int, most: int) -> Tensor:
    """At most so many numbers below `count`, evenly, int64."""
    chosen = min(most, count)
    return torch.arange(chosen) * count // max(chosen, 1)


def group_by_length(lengths: Tensor, tokens: int, packed: bool = False) -> list[tuple[int, int]]:
    """Cut ascending lengths into consecutive groups [a, b) whose padded size (count × longest) is at most `tokens`.

    With `packed` the size is the sum. A single history longer than that is a group of its own.
    """
    groups, start, longest, total = [], 0, 0, 0
    for position, length in enumerate(lengths.tolist()):
        longest, total = max(longest, length), total + length
        if (total if packed else (position + 1 - start) * longest) > tokens and position > start:
            groups.append((start, position))
            start, longest, total = position, length, length
    if len(lengths):
        groups.append((start, len(lengths)))
    return groups


def deal(costs: Tensor, hands: int) -> Tensor:
    """Which of so many hands gets each, int64: the dearest first, each to the hand that has least (Graham 1969)."""
    held, owners = [(0, hand) for hand in range(hands)], []
    order = torch.argsort(costs, descending=True, stable=True)
    for cost in costs[order].tolist():
        least, hand = held[0]
        owners.append(hand)
        heapq.heapreplace(held, (least + cost, hand))
    return torch.empty_like(order).scatter_(0, order, torch.tensor(owners, dtype=torch.int64))


@dataclass(frozen=True)
class Sequences:
    """Every user's events, flat, oldest first, with where training and validation end: a data set in memory."""

    items: Tensor
    """Item rows, int32, shape N."""
    times: Tensor
    """Seconds since 1970, int64, shape N."""
    offsets: Tensor
    """Where each user starts, int64, shape U + 1."""
    train_end: Tensor
    """Count of each user's training events, int64, shape U."""
    validation_end: Tensor
    """Count of each user's events before the test, int64, shape U."""
    validation_start: Tensor | None = None
    """Count of each user's events before validation, int64, shape U; None: `train_end`. It is more where a user is held out:
    what comes before validation is their history, of which nothing is learnt."""

    @property
    def users(self) -> int:
        return len(self.offsets) - 1

    @property
    def learnt_until(self) -> int:
        """Time of the latest training event; of no event, 0."""
        begins, ends, _ = self.windows("train")
        return max(self.times[ends[ends > begins] - 1].tolist(), default=0)

    def training_counts(self, items: int) -> Tensor:
        """Training events of each catalogue item, int64, shape `items`; line i belongs to row FIRST_ITEM + i."""
        begins, ends, _ = self.windows("train")
        change = torch.zeros(len(self.items) + 1, dtype=torch.int64)
        change.index_add_(0, begins, torch.ones_like(begins)).index_add_(0, ends, -torch.ones_like(ends))
        rows = self.items[change.cumsum(0)[:-1] > 0].long()
        return torch.bincount(rows, minlength=FIRST_ITEM + items)[FIRST_ITEM : FIRST_ITEM + items]

    def learnable(self, items: int) -> Sequences:
        """The training parts alone, without events of other than the first `items` items, of which nothing is to be learnt;
        the sequences themselves where there is no such event.
        """
        train = self.histories("train")
        keep = train.values < FIRST_ITEM + items
        if bool(keep.all()):
            return self
        lengths = torch.bincount(train.owners[keep], minlength=self.users)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return Sequences(train.values[keep].int(), train.times[keep], offsets, lengths, lengths)

    def judged(self, split: str) -> Tensor:
        """The users who have both a history and targets, int64."""
        begins, ends, targets = self.windows(split)
        return ((ends > begins) & (targets > ends)).nonzero().flatten()

    def histories(self, split: str, users: Tensor | None = None) -> Batch:
        """What such users, or all, had before `split`."""
        begins, ends, _ = self.windows(split)
        return gather(self.items, self.times, *((begins, ends) if users is None else (begins[users], ends[users])))

    def windows(self, split: str) -> tuple[Tensor, Tensor, Tensor]:
        """Flat (start of history, end of history = start of targets, end of targets), each int64 of shape U.

        The history of `validation` is the training part (of a held-out user, what comes before validation), that of `test`
        includes the validation part; `train` has no targets.
        """
        start, end = self.offsets[:-1], self.offsets[1:]
        train, validation = start + self.train_end, start + self.validation_end
        before = train if self.validation_start is None else start + self.validation_start
        windows = {"train": (start, train, train), "validation": (start, before, validation), "test": (start, validation, end)}
        try:
            return windows[split]
        except KeyError:
            raise ValueError(f"split {split!r} is none of train, validation, test") from None
