"""A small world for training: item n is followed by item n + 1, from a random start, around a ring."""

import pytest
import torch

from recsys.batch import FIRST_ITEM, Sequences
from recsys.content import Content, ContentEncoder, Described
from recsys.text import TextSettings

RING = 29
COLOURS = ("red", "blue", "pink", "grey", "teal")
SHAPES = ("cube", "ball", "cone", "disc", "ring", "star", "line")


def ring_content(settings: TextSettings) -> Content:
    """No two items have the same text; that of an item tells the one of the next. The last is of a category of its own."""
    texts = [f"{COLOURS[item % 5]} {SHAPES[item % 7]}" for item in range(RING)]
    described = Described(texts, [["last"] if item == RING - 1 else ["other"] for item in range(RING)], [[]] * RING)
    return ContentEncoder.fit(described, settings).encode(described)


@pytest.fixture
def ring() -> Sequences:
    return ring_sequences()


def ring_sequences() -> Sequences:
    """Those of 211 users, of whom nothing but their first item is random."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 19, (211,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    starts = torch.randint(0, RING, (211,), generator=generator)
    place = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1], lengths)
    items = FIRST_ITEM + (torch.repeat_interleave(starts, lengths) + place) % RING
    return Sequences(items.int(), place * 60, offsets, lengths - 2, lengths - 1)
