"""Attention: every pattern against its rule written out, chunks against the whole, and memory linear in length."""

import dataclasses

import pytest
import torch

from recsys import attention
from recsys.attention import PATTERNS, TIME_BUCKETS, Attention, View, biases, time_bucket
from recsys.model import ModelSettings

SETTINGS = ModelSettings(embedding_size=12, heads=3, length=61, span=7)
RULES = {
    "full": lambda q, k: True,
    "local": lambda q, k: abs(q - k) < 7,
    "block_sparse": lambda q, k: q // 7 == k // 7 or k % 7 == 6,
}


def view(lengths: list[int]) -> View:
    times = torch.arange(len(lengths) * max(lengths)).view(len(lengths), -1) ** 2
    return View(torch.tensor(lengths), torch.zeros_like(times), torch.arange(max(lengths)), times, times)


def module(settings: ModelSettings) -> Attention:
    out = Attention(settings).double()
    for parameter in out.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return out


def random_qkv(seen: View, heads: int = 3) -> torch.Tensor:
    shape = (3, len(seen.lengths_B), heads, seen.positions, 4)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_there_is_a_rule_for_every_pattern():
    assert set(RULES) == set(PATTERNS)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_pattern_is_its_rule(pattern, objective):
    layer, seen = module(dataclasses.replace(SETTINGS, attention=pattern, objective=objective)), view([31, 23])
    q, k, v = random_qkv(seen)
    weights = layer.weights(q, k, seen)
    for history, length in enumerate([31, 23]):
        for query in range(length):
            for key in range(31):
                wanted = RULES[pattern](query, key) and (key <= query if objective == "causal" else key < length)
                assert bool((weights[history, :, query, key] > 0).all()) == wanted, (query, key)
    assert torch.allclose(weights.sum(-1), torch.ones(()).double())
    mixed = layer(q, k, v, seen)
    for history, length in enumerate([31, 23]):
        assert torch.allclose(mixed[history, :, :length], (weights @ v)[history, :, :length])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_chunks_change_neither_values_nor_gradients(pattern, objective, pointwise, biased, monkeypatch):
    extra = {"positions": "relative", "time": "relative", "request_time": True} if biased else {}
    block = "hstu" if pointwise else "sasrec"
    layer = module(dataclasses.replace(SETTINGS, block=block, attention=pattern, objective=objective, **extra))
    seen = view([53, 29])
    qkv = random_qkv(seen)
    inside = torch.arange(53) < seen.lengths_B[:, None]
    results = []
    for chunk in (512, 11):
        monkeypatch.setattr(attention, "QUERIES", chunk)
        mixed = layer(*qkv, seen).transpose(1, 2)[inside]
        results.append([mixed, *torch.autograd.grad(mixed.square().sum(), [qkv, *layer.parameters()])])
    for whole, parts in zip(*results, strict=True):
        assert torch.allclose(whole, parts)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["plain", "biased", "pointwise"])
def test_memory_grows_with_the_length_and_not_with_its_square(pattern, kind):
    """Bytes kept for the backward pass, at 2,048 and 8,192 events."""
    extra = {"positions": "relative", "time": "relative"} if kind == "biased" else {}
    block = "hstu" if kind == "pointwise" else "sasrec"
    settings = dataclasses.replace(SETTINGS, block=block, heads=1, length=8192, attention=pattern, span=64, **extra)

    def kept(length: int) -> int:
        seen, storages = view([length]), {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out = module(settings)(*random_qkv(seen, heads=1), seen)
        assert out.shape == (1, 1, length, 4)
        return sum(storages.values())

    assert kept(8192) < 5 * kept(2048)


def test_biases_and_their_gradient_are_those_of_indexing():
    table = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    buckets = torch.randint(11, (2, 5, 7), generator=torch.Generator().manual_seed(0))
    found, wanted = biases(table, buckets), table[:, buckets].transpose(0, 1)
    assert torch.equal(found, wanted)
    weights = torch.randn(found.shape, dtype=torch.float64)
    grads = [torch.autograd.grad((out * weights).sum(), table)[0] for out in (found, wanted)]
    assert torch.allclose(*grads, atol=1e-6)


def test_time_buckets_are_two_a_doubling():
    seconds = torch.tensor([-5, 0, 1, 3, 7, 2**20 - 1, 2**31, 2**40])
    assert time_bucket(seconds).tolist() == [0, 0, 2, 4, 6, 40, 62, TIME_BUCKETS - 1]
    assert (time_bucket(torch.arange(100_000)).diff() >= 0).all()


def test_rotary_scores_depend_on_the_distance_alone():
    layer, seen = module(dataclasses.replace(SETTINGS, positions="rotary")), view([31])
    q, k, _ = random_qkv(seen)
    q, k = q[:, :, :1].expand(-1, -1, 31, -1), k[:, :, :1].expand(-1, -1, 31, -1)
    scores = layer._rotate(q, seen) @ layer._rotate(k, seen).mT
    for distance in (0, 1, 13):
        along = scores.diagonal(-distance, 2, 3)
        assert torch.allclose(along, along[..., :1].expand_as(along))
    assert not torch.allclose(scores.diagonal(0, 2, 3)[..., 0], scores.diagonal(-13, 2, 3)[..., 0])
