"""A small world for training: item n is followed by item n + 1, from a random start, around a ring."""

import pytest
import torch

from recsys.batch import FIRST_ITEM, Sequences

RING = 29


@pytest.fixture
def ring() -> Sequences:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 19, (211,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    starts = torch.randint(0, RING, (211,), generator=generator)
    place = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1], lengths)
    items = FIRST_ITEM + (torch.repeat_interleave(starts, lengths) + place) % RING
    return Sequences(items.int(), place * 60, offsets, lengths - 2, lengths - 1)
