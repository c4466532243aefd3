"""Every way of drawing negatives: distinct rows, stated chances that hold, and the same draw for the same seed."""

import pytest
import torch

from recsys.batch import FIRST_ITEM
from training.negatives import SAMPLINGS

COUNTS = torch.tensor([50, 20, 20, 5, 3, 1, 1, 0])
TARGETS = FIRST_ITEM + torch.tensor([0, 2, 2, 5])


def draw(name, seed=0, count=5, targets=TARGETS):
    return SAMPLINGS[name](COUNTS, targets, count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SAMPLINGS)
def test_rows_are_distinct_ascending_items_and_repeat_by_seed(name):
    for seed in range(53):
        found = draw(name, seed)
        assert (found.rows.diff() > 0).all()
        assert ((found.rows >= FIRST_ITEM) & (found.rows < FIRST_ITEM + len(COUNTS))).all()
        assert found.log_chance.isfinite().all() and (found.log_chance <= 0).all()
        assert torch.equal(found.rows, draw(name, seed).rows)


@pytest.mark.parametrize("name", ["uniform", "popularity"])
def test_stated_chances_are_how_often_an_item_is_drawn(name):
    times, stated = torch.zeros(len(COUNTS)), torch.full((len(COUNTS),), -torch.inf)
    for seed in range(3001):
        found = draw(name, seed)
        times[found.rows - FIRST_ITEM] += 1
        stated[found.rows - FIRST_ITEM] = found.log_chance
    assert torch.allclose(times / 3001, stated.exp(), atol=0.03)
    assert (times[-1] == 0) == (name == "popularity")


def test_in_batch_negatives_are_the_targets_at_the_chance_of_their_popularity():
    found = draw("in_batch")
    assert found.rows.tolist() == [FIRST_ITEM, FIRST_ITEM + 2, FIRST_ITEM + 5]
    share = torch.tensor([0.5, 0.2, 0.01])
    assert torch.allclose(found.log_chance.exp(), 1 - (1 - share) ** 4)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_catalogue_of_millions_is_drawn_from(name):
    counts = torch.ones(20_000_003, dtype=torch.int64)
    targets = torch.tensor([FIRST_ITEM, FIRST_ITEM + 20_000_002])
    found = SAMPLINGS[name](counts, targets, 1009, torch.Generator().manual_seed(0))
    assert len(found.rows) > (1 if name == "in_batch" else 1000)
    assert found.log_chance.isfinite().all()
