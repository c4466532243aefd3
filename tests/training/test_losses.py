"""Every loss against its formula; no loss holds targets × items."""

import math

import pytest
import torch
import torch.nn.functional as F

from recsys.batch import FIRST_ITEM
from recsys.model import ModelSettings, SequenceModel
from training import losses, negatives

ITEMS, TARGETS = 101, 37


@pytest.fixture(params=["dot", "cosine"])
def setting(request):
    model = SequenceModel(ModelSettings(embedding_size=8, similarity=request.param), ITEMS).double()
    generator = torch.Generator().manual_seed(0)
    model.initialise(generator)
    states = torch.randn(TARGETS, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    return model, states, torch.randint(FIRST_ITEM, FIRST_ITEM + ITEMS, (TARGETS,), generator=generator)


def gradients(loss, model, states):
    return torch.autograd.grad(loss, [states, model.table.weight])


@pytest.mark.parametrize("chunk", [1, 1009, 2**21])
def test_softmax_and_its_gradient_are_those_of_cross_entropy(setting, monkeypatch, chunk):
    model, states, targets = setting
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    ours = losses.softmax(model, states, targets, 0, torch.Generator())
    wanted = F.cross_entropy(states @ model.item_vectors().T, targets - FIRST_ITEM)
    assert torch.allclose(ours, wanted)
    for found, expected in zip(gradients(ours, model, states), gradients(wanted, model, states), strict=True):
        assert torch.allclose(found, expected)


def test_sampled_softmax_is_its_formula(setting):
    model, states, targets = setting
    ours = losses.sampled_softmax(model, states, targets, 31, torch.Generator().manual_seed(5))
    rows = negatives.uniform(ITEMS, 31, torch.Generator().manual_seed(5))
    logits = states @ model.vectors(rows).T + math.log(ITEMS / len(rows))
    logits = logits.masked_fill(targets[:, None] == rows, -torch.inf)
    positive = (states * model.vectors(targets)).sum(1, keepdim=True)
    wanted = F.cross_entropy(torch.cat([positive, logits], 1), torch.zeros(TARGETS, dtype=torch.int64))
    assert torch.allclose(ours, wanted)
    for found, expected in zip(gradients(ours, model, states), gradients(wanted, model, states), strict=True):
        assert torch.allclose(found, expected)


def test_the_mean_of_sampled_softmax_nears_the_full_softmax():
    model = SequenceModel(ModelSettings(embedding_size=8), 1009).initialise(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(211, 8, generator=generator) * 20
    targets = torch.randint(FIRST_ITEM, FIRST_ITEM + 1009, (211,), generator=generator)
    full = losses.softmax(model, states, targets, 0, generator)
    sampled = torch.stack([losses.sampled_softmax(model, states, targets, 503, generator) for _ in range(31)]).mean()
    assert abs(sampled - full) < 0.01 * full


@pytest.mark.parametrize("name", list(losses.LOSSES))
def test_no_loss_holds_targets_times_items(name, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 2**12)
    items, targets = 4099, 1031
    model = SequenceModel(ModelSettings(embedding_size=4), items).initialise(torch.Generator().manual_seed(0))
    states = torch.randn(targets, 4, requires_grad=True)
    rows = torch.randint(FIRST_ITEM, FIRST_ITEM + items, (targets,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        losses.LOSSES[name](model, states, rows, 64, torch.Generator().manual_seed(0)).backward()
    assert largest <= 8 * items  # the table is 4 × items; targets × items would be 1031 × items


def test_negatives_are_distinct_catalogue_rows_and_all_occur():
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(97):
        rows = negatives.uniform(ITEMS, 53, generator).tolist()
        assert rows == sorted(set(rows))
        seen.update(rows)
    assert seen == set(range(FIRST_ITEM, FIRST_ITEM + ITEMS))
