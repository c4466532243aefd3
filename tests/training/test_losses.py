"""Every loss against its formula, written densely; no loss holds targets × items."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from recsys.batch import FIRST_ITEM
from recsys.model import ModelSettings, SequenceModel
from training import losses
from training.losses import LOSSES, LossSettings, Seen, Targets, negatives
from training.negatives import SAMPLINGS

ITEMS, TARGETS = 101, 37
COUNTS = torch.arange(ITEMS, 0, -1)
SEEN = Seen(
    torch.randint(0, FIRST_ITEM + ITEMS, (61,), generator=torch.Generator().manual_seed(1)),
    torch.arange(TARGETS) // 2,
    torch.arange(TARGETS) // 2 + torch.arange(TARGETS) % 40,
)


@pytest.fixture(params=["dot", "cosine"])
def setting(request):
    model = SequenceModel(ModelSettings(embedding_size=8, similarity=request.param), ITEMS).double()
    generator = torch.Generator().manual_seed(0)
    model.initialise(generator)
    states = torch.randn(TARGETS, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    return model, states, torch.randint(FIRST_ITEM, FIRST_ITEM + ITEMS, (TARGETS,), generator=generator)


def loss_of(name, model, states, targets, settings, generator, seen=None, counts=COUNTS):
    """A loss as training has it: its negatives are drawn first."""
    drawn = negatives(replace(settings, kind=name), counts, targets, generator)
    return LOSSES[name](model, states, Targets(targets, drawn, seen), settings, generator)


def dense(name, model, states, targets, settings, generator, seen=None):
    """The loss as its paper writes it, with every logit at hand."""
    positive = (states * model.vectors(targets)).sum(1, keepdim=True)
    if name == "softmax":
        rows, correction = torch.arange(FIRST_ITEM, FIRST_ITEM + ITEMS), torch.zeros(ITEMS)
    else:
        draw = SAMPLINGS[settings.sampling](COUNTS, targets, settings.negatives, generator)
        rows, correction = draw.rows_S, -draw.log_inclusion_S * (settings.logq and name == "sampled_softmax")
    logits = states @ model.vectors(rows).T + correction
    logits = logits.masked_fill(targets[:, None] == rows, -torch.inf)
    for n in range(TARGETS if seen else 0):
        logits[n, torch.isin(rows, seen.rows_M[seen.begins_N[n] : seen.ends_N[n]])] = -torch.inf
    if "softmax" in name:
        return F.cross_entropy(torch.cat([positive, logits], 1), torch.zeros(len(targets), dtype=torch.int64))
    alpha, t = len(rows) / (ITEMS - 1), settings.calibration if name == "gbce" else 0
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    return (-beta * F.logsigmoid(positive[:, 0]) - F.logsigmoid(-logits).nan_to_num(posinf=0).sum(1)).mean()


def values(loss, model, states):
    states.grad = model.table.weight.grad = None
    (3 * loss).backward()
    return [loss, states.grad, model.table.weight.grad]


@pytest.mark.parametrize(("scale", "seen"), [(1, None), (1, SEEN), (300, SEEN)], ids=["all", "unseen", "large"])
@pytest.mark.parametrize("chunk", [1, 1009, 2**23])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("logq", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_its_formula(setting, monkeypatch, name, logq, sampling, chunk, scale, seen):
    model, states, targets = setting
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    settings = LossSettings(name, negatives=31, sampling=sampling, logq=logq)
    ours = loss_of(name, model, states * scale, targets, settings, torch.Generator().manual_seed(5), seen)
    wanted = dense(name, model, states * scale, targets, settings, torch.Generator().manual_seed(5), seen)
    for found, expected in zip(values(ours, model, states), values(wanted, model, states), strict=True):
        assert torch.allclose(found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_is_exact_to_its_precision(name):
    generator = torch.Generator().manual_seed(0)
    model = SequenceModel(ModelSettings(embedding_size=8, similarity="cosine"), ITEMS).initialise(generator)
    states = torch.randn(1031, 8, generator=generator).mul_(5).requires_grad_()
    targets = torch.randint(FIRST_ITEM, FIRST_ITEM + ITEMS, (1031,), generator=generator)
    arguments = targets, LossSettings(name, 31)
    found = values(loss_of(name, model, states, *arguments, torch.Generator().manual_seed(5)), model, states)
    model.double()
    exact = states.detach().double().requires_grad_()
    expected = values(loss_of(name, model, exact, *arguments, torch.Generator().manual_seed(5)), model, exact)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize("name", LOSSES)
def test_a_catalogue_whose_every_candidate_is_the_target_leaves_nothing_to_push_away(name):
    model = SequenceModel(ModelSettings(embedding_size=8), 1).initialise(torch.Generator().manual_seed(0))
    arguments = torch.ones(3, 8), torch.full((3,), FIRST_ITEM), LossSettings(name, 5)
    loss = loss_of(name, model, *arguments, torch.Generator(), counts=torch.tensor([3]))
    positive = model.vectors(torch.tensor([FIRST_ITEM])).sum()
    assert torch.allclose(loss, torch.zeros(()) if "softmax" in name else F.softplus(-positive))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@torch.no_grad()
def test_with_logq_the_mean_of_sampled_softmax_nears_the_full_softmax(sampling):
    generator = torch.Generator().manual_seed(1)
    model = SequenceModel(ModelSettings(embedding_size=8), ITEMS).initialise(generator)
    sampled, uncorrected = (LossSettings(negatives=101, sampling=sampling, logq=logq) for logq in (True, False))
    found = []
    for _ in range(199):
        states = torch.randn(101, 8, generator=generator) * 5
        targets = torch.multinomial(COUNTS.float(), 101, replacement=True, generator=generator) + FIRST_ITEM
        found.append(
            [
                loss_of("softmax", model, states, targets, sampled, generator),
                loss_of("sampled_softmax", model, states, targets, sampled, generator),
                loss_of("sampled_softmax", model, states, targets, uncorrected, generator),
            ]
        )
    full, corrected, raw = torch.tensor(found).mean(0)
    assert abs(corrected - full) < 0.01 * full
    assert abs(raw - full) > 0.05 * full


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_holds_or_saves_targets_times_items(name, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 2**15)
    items, targets, size = 4099, 1031, 4
    model = SequenceModel(ModelSettings(embedding_size=size), items).initialise(torch.Generator().manual_seed(0))
    states = torch.randn(targets, size, requires_grad=True)
    rows = torch.randint(FIRST_ITEM, FIRST_ITEM + items, (targets,))
    largest, saved = 0, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    def pack(tensor):
        nonlocal saved
        saved += tensor.numel()
        return tensor

    with Watch(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        settings = LossSettings(name, negatives=2053)
        generator = torch.Generator().manual_seed(0)
        loss_of(name, model, states, rows, settings, generator, counts=torch.ones(items)).backward()
    assert largest <= 2 * size * items  # the table is 4 × items; targets × items would be 1031 × items
    assert 0 < saved <= (size + 1) * (3 * targets + items)


@pytest.mark.parametrize("name", ["gbce", "sampled_softmax"])
def test_each_option_changes_the_loss_that_reads_it(setting, name):
    model, states, targets = setting
    base = LossSettings(name, negatives=31)

    def loss(settings):
        return loss_of(name, model, states, targets, settings, torch.Generator().manual_seed(5)).item()

    changes = {"negatives": 13, "sampling": "popularity", **({"calibration": 0.5} if name == "gbce" else {"logq": False})}
    for option, value in changes.items():
        assert loss(replace(base, **{option: value})) != loss(base), option


@pytest.mark.parametrize(
    "change",
    [{"kind": "bpr"}, {"negatives": 0}, {"sampling": "alias"}, {"calibration": 1.5}, {"calibration": -0.1}],
)
def test_a_wrong_setting_is_named_in_one_line_with_what_was_found(change):
    ((option, value),) = change.items()
    with pytest.raises(ValueError, match=rf"^{option} must be [^\n]*, found {value!r}$"):
        LossSettings(**change)
