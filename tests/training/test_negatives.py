"""Every sampling against its law: what is drawn, how often, and with what probability it says so."""

import pytest
import torch

from recsys.batch import FIRST_ITEM
from training.negatives import SAMPLINGS, in_batch, popularity, uniform

ITEMS, COUNT = 101, 53
COUNTS = torch.arange(ITEMS, 0, -1) ** 2
TARGETS = torch.tensor([7, 3, 7, 90, 3, 41]) + FIRST_ITEM


@pytest.mark.parametrize("name", SAMPLINGS)
def test_rows_are_distinct_ascending_and_of_the_catalogue_and_one_seed_draws_them_again(name):
    first, again = (SAMPLINGS[name](COUNTS, TARGETS, COUNT, torch.Generator().manual_seed(3)) for _ in range(2))
    rows = first.rows_S.tolist()
    assert rows == sorted(set(rows)) and set(rows) <= set(range(FIRST_ITEM, FIRST_ITEM + ITEMS))
    assert first.rows_S.dtype == torch.int64 and first.log_inclusion_S.dtype == torch.float32
    assert torch.equal(first.rows_S, again.rows_S) and torch.equal(first.log_inclusion_S, again.log_inclusion_S)


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("counts", [COUNTS, COUNTS.float()])
def test_a_row_is_included_as_often_as_its_draw_says(name, counts):
    draws, shares, generator = 1009, counts.double() / counts.sum(), torch.Generator().manual_seed(5)
    seen, said = torch.zeros(ITEMS, dtype=torch.float64), torch.full((ITEMS,), torch.nan, dtype=torch.float64)
    for _ in range(draws):
        targets = torch.multinomial(shares, COUNT, replacement=True, generator=generator) + FIRST_ITEM
        draw = SAMPLINGS[name](counts, targets, COUNT, generator)
        seen[draw.rows_S - FIRST_ITEM] += 1
        said[draw.rows_S - FIRST_ITEM] = draw.log_inclusion_S.double().exp()
    drawn = ~said.isnan()
    expected, variance = draws * said[drawn], draws * said[drawn] * (1 - said[drawn])
    assert drawn.sum() > ITEMS * 0.8
    assert (seen[drawn] - expected).square().sum() / variance.sum() < 1.5
    assert ((seen[drawn] - expected).abs() < 5 * variance.sqrt() + 2).all()


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("counts", [torch.zeros(3), torch.tensor([0, 5, 0]), torch.tensor([1, 0, 0])])
def test_items_without_events_never_give_a_figure_that_is_not_finite(name, counts):
    draw = SAMPLINGS[name](counts, torch.arange(3) + FIRST_ITEM, 7, torch.Generator().manual_seed(0))
    assert draw.log_inclusion_S.isfinite().all() and (draw.log_inclusion_S <= 0).all()


def test_uniform_draws_the_whole_catalogue_and_knows_a_catalogue_of_one():
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([uniform(COUNTS, TARGETS, COUNT, generator).rows_S for _ in range(97)])
    assert set(rows.tolist()) == set(range(FIRST_ITEM, FIRST_ITEM + ITEMS))
    assert uniform(COUNTS[:1], TARGETS, COUNT, generator).log_inclusion_S.tolist() == [0]


def test_popularity_never_draws_an_item_without_events():
    counts = COUNTS * (torch.arange(ITEMS) % 2)
    rows = popularity(counts, TARGETS, 4099, torch.Generator().manual_seed(0)).rows_S
    assert ((rows - FIRST_ITEM) % 2 == 1).all()


def test_in_batch_takes_the_distinct_targets():
    assert in_batch(COUNTS, TARGETS, 1, torch.Generator()).rows_S.tolist() == sorted(set(TARGETS.tolist()))


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_catalogue_of_millions_keeps_its_small_probabilities(name):
    items = 2**22 + 1
    draw = SAMPLINGS[name](torch.ones(items), torch.tensor([5, items]), 2, torch.Generator().manual_seed(0))
    assert torch.allclose(draw.log_inclusion_S, torch.tensor(2 / items).log())
