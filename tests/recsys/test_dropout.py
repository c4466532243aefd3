"""Dropout drops what it says, and its bytes are random."""

import pytest
import torch

from recsys.dropout import dropout, random_bytes


def test_every_byte_of_a_word_is_uniform():
    found = random_bytes(8 * 100_003, torch.Generator().manual_seed(0)).view(-1, 8)
    for place in range(8):
        counts = torch.bincount(found[:, place].long(), minlength=256).double()
        expected = len(found) / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert 170 < chi_square < 350, place  # 255 degrees of freedom: mean 255, deviation 22.6


def test_neighbouring_bytes_and_successive_draws_are_unrelated():
    generator = torch.Generator().manual_seed(0)
    first, second = (random_bytes(100_003, generator).double() for _ in range(2))
    for a, b in ((first[:-1], first[1:]), (first[:-8], first[8:]), (first, second)):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.015


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5])
def test_dropout_keeps_the_mean_and_drops_its_share(rate):
    out = dropout(torch.ones(701, 257), rate, torch.Generator().manual_seed(1))
    assert abs((out == 0).float().mean() - rate) < 0.005
    assert abs(out.mean() - 1) < 0.01


def test_dropout_passes_the_gradient_where_it_passed_the_value():
    x = torch.randn(37, 11, dtype=torch.float64, requires_grad=True)
    out = dropout(x, 0.3, torch.Generator().manual_seed(2))
    out.sum().backward()
    assert torch.equal(x.grad == 0, out == 0)
    assert torch.allclose(x.grad * x, out)


def test_without_a_generator_nothing_is_dropped():
    x = torch.randn(5, 7)
    assert dropout(x, 0.5, None) is x


def test_the_same_seed_drops_the_same():
    x = torch.randn(13, 17)
    first, again, other = (dropout(x, 0.4, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
