"""Every loss against its formula; no loss holds targets × items."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from recsys.batch import FIRST_ITEM
from recsys.model import ModelSettings, SequenceModel
from training import losses
from training.losses import LOSSES, LossSettings
from training.negatives import SAMPLINGS

ITEMS, TARGETS = 101, 37
COUNTS = torch.arange(ITEMS, 0, -1) ** 2
SETTINGS = LossSettings(negatives=31)


@pytest.fixture(params=[("dot", 1.0), ("cosine", 0.1), ("cosine", 0.01)], ids=str)
def setting(request):
    similarity, temperature = request.param
    model = SequenceModel(ModelSettings(embedding_size=8, similarity=similarity, temperature=temperature), ITEMS).double()
    generator = torch.Generator().manual_seed(0)
    model.initialise(generator)
    states = torch.randn(TARGETS, 8, dtype=torch.float64, generator=generator)
    states = (F.normalize(states, dim=1) / temperature if similarity == "cosine" else states).requires_grad_()
    return model, states, torch.randint(FIRST_ITEM, FIRST_ITEM + ITEMS, (TARGETS,), generator=generator)


def drawn(settings, targets, seed=5):
    found = SAMPLINGS[settings.sampling](COUNTS, targets, settings.negatives, torch.Generator().manual_seed(seed))
    return found.rows, found.log_chance.double()


def naive(name, model, states, targets, settings):
    """The loss by plain autograd over a dense matrix."""
    positive = (states * model.vectors(targets)).sum(1, keepdim=True)
    if name == "softmax":
        return F.cross_entropy(states @ model.item_vectors().T, targets - FIRST_ITEM)
    rows, log_chance = drawn(settings, targets)
    scores = states @ model.vectors(rows).T
    collided = targets[:, None] == rows
    if name == "sampled_softmax":
        scores = (scores - log_chance if settings.logq else scores).masked_fill(collided, -torch.inf)
        return F.cross_entropy(torch.cat([positive, scores], 1), torch.zeros(TARGETS, dtype=torch.int64))
    alpha = len(rows) / (ITEMS - 1)
    beta = 1 if name == "bce" else alpha * (settings.calibration * (1 - 1 / alpha) + 1 / alpha)
    negative = F.logsigmoid(-scores).masked_fill(collided, 0.0).sum(1)
    return -(beta * F.logsigmoid(positive[:, 0]) + negative).mean()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("logq", [True, False])
@pytest.mark.parametrize("chunk", [1, 499, 2**21])
def test_a_loss_and_its_gradient_are_those_of_its_formula(setting, name, sampling, logq, chunk, monkeypatch):
    model, states, targets = setting
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    settings = dataclasses.replace(SETTINGS, sampling=sampling, logq=logq)
    ours = LOSSES[name](model, states, targets, settings, COUNTS, torch.Generator().manual_seed(5))
    wanted = naive(name, model, states, targets, settings)
    assert torch.allclose(ours, wanted, rtol=1e-6)
    found, expected = (torch.autograd.grad(loss, [states, model.table.weight]) for loss in (ours, wanted))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_with_its_correction_sampled_softmax_nears_the_full_one_and_without_it_does_not(sampling):
    items = 1009
    model = SequenceModel(ModelSettings(embedding_size=8), items).initialise(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(211, 8, generator=generator) * 20
    targets = torch.randint(FIRST_ITEM, FIRST_ITEM + items, (211,), generator=generator)
    counts = torch.arange(items, 0, -1)

    def mean(**changes):
        settings = LossSettings(negatives=503, sampling=sampling, **changes)
        drawn = [losses.sampled_softmax(model, states, targets, settings, counts, generator) for _ in range(31)]
        return float(torch.stack(drawn).detach().mean())

    full = float(losses.softmax(model, states, targets, SETTINGS, counts, generator).detach())
    assert abs(mean() - full) < 0.01 * full
    assert abs(mean(logq=False) - full) > 0.05 * full


def test_full_calibration_undoes_what_few_negatives_do_to_the_odds():
    """The minimum of gBCE over one score s: σ(s) = β p / (β p + α q), so t = 1 gives the odds of all negatives."""
    negatives, items = 20, 101
    for calibration, wanted in ((0.0, 1.0), (1.0, negatives / (items - 1))):
        share = negatives / (items - 1)
        assert math.isclose(calibration * (share - 1) + 1, wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_holds_targets_times_items(name, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 2**12)
    items, targets = 4099, 1031
    model = SequenceModel(ModelSettings(embedding_size=4), items).initialise(torch.Generator().manual_seed(0))
    states = torch.randn(targets, 4, requires_grad=True)
    rows = torch.randint(FIRST_ITEM, FIRST_ITEM + items, (targets,))
    counts, largest = torch.ones(items, dtype=torch.int64), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    settings = LossSettings(negatives=4096, sampling="popularity")
    with Watch():
        LOSSES[name](model, states, rows, settings, counts, torch.Generator().manual_seed(0)).backward()
    assert largest <= 8 * items  # the table is 4 × items; targets × items would be 1031 × items


@pytest.mark.parametrize(("key", "value"), [("kind", "bpr"), ("sampling", "hard"), ("negatives", 0), ("calibration", 1.5)])
def test_a_setting_out_of_range_is_refused(key, value):
    with pytest.raises(ValueError, match=key):
        LossSettings(**{key: value})
