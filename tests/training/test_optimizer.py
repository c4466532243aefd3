"""The optimiser: who decays, who moves how fast, what is averaged, and that its state is all of it."""

import dataclasses
import io
import itertools

import pytest
import torch

from recsys.batch import Batch
from recsys.model import ModelSettings, SequenceModel
from recsys.text import TextSettings
from tests.training.conftest import ring_content
from training.optimizer import KINDS, NEWTON_SCHULZ, Muon, Optimizer, OptimizerSettings, orthogonal, rate_at

SETTINGS = OptimizerSettings(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1)


def build(settings, **model_settings):
    shape = {"embedding_size": 8, "heads": 2, "hidden_size": 11, "length": 7, "positions": "relative", "block": "ligr"}
    model = SequenceModel(ModelSettings(**{**shape, **model_settings}), 13).initialise(torch.Generator().manual_seed(0))
    return model, Optimizer(model, settings)


def histories(step):
    rows = torch.randint(2, 15, (31, 7), generator=torch.Generator().manual_seed(step))
    return Batch.of(rows.tolist())


def learn(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        states = model(histories(step))[-1]
        (states @ model.item_vectors().T).square().mean().backward()
        optimizer.step(step, 10)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(settings, steps=1):
    model, optimizer = build(settings)
    before = weights(model)
    learn(model, optimizer, steps)
    return {name: value - before[name] for name, value in model.state_dict().items()}


def test_adamw_is_that_of_torch():
    model, optimizer = build(SETTINGS)
    other, _ = build(SETTINGS)
    decayed = [p for n, p in other.named_parameters() if n.startswith("blocks.") and n.endswith("weight") and p.ndim == 2]
    rest = [p for p in other.parameters() if all(p is not d for d in decayed)]
    plain = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    learn(model, optimizer, 3)
    for step in range(3):
        for group in plain.param_groups:
            group["lr"] = rate_at(step, 10, 0, 1e-2)
        states = other(histories(step))[-1]
        plain.zero_grad()
        (states @ other.item_vectors().T).square().mean().backward()
        plain.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-6), name


def test_muon_moves_the_matrices_of_blocks_alike_in_all_directions():
    changes = moved(dataclasses.replace(SETTINGS, kind="muon", weight_decay=0.0, muon_learning_rate=0.02))
    singular = torch.linalg.svdvals(changes["blocks.0.attention_out.weight"])
    assert singular[0] < 2 * singular[-2]  # the norm before leaves one direction without a gradient
    adamw = moved(dataclasses.replace(SETTINGS, weight_decay=0.0))
    for name, change in changes.items():
        matrix = name.startswith("blocks.") and name.endswith(".weight") and change.ndim == 2
        assert torch.equal(change, adamw[name]) != matrix, name


def test_muon_is_that_of_torch_without_its_rounding():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.ones(shape).requires_grad_() for shape in ((24, 8), (8, 8), (5, 11))] for _ in range(2))
    muon = Muon([{"params": ours, "lr": 0.1, "weight_decay": 0.3}], {"momentum": 0.95})
    plain = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="original")
    for _ in range(7):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = other.grad = torch.randn(one.shape, generator=generator)
        muon.step()
        plain.step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 0.02  # of .7 steps


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_the_orthogonal_part_has_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    singular /= singular.norm()
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        singular = a * singular + b * singular**3 + c * singular**5
    assert torch.allclose(orthogonal(matrix).double(), left * singular @ right, atol=1e-4)
    assert ((singular > 0.6) & (singular < 1.3)).all()
    assert (orthogonal(torch.zeros(shape)) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_item_table_has_a_rate_of_its_own(kind):
    base = dataclasses.replace(SETTINGS, kind=kind)
    one, two = moved(base), moved(dataclasses.replace(base, embedding_learning_rate=2e-2))
    assert torch.allclose(2 * one["table.weight"], two["table.weight"], atol=1e-7)
    assert torch.equal(one["norm.weight"], two["norm.weight"])
    assert all(torch.equal(moved(dataclasses.replace(base, embedding_learning_rate=1e-2))[name], one[name]) for name in one)


def moved_with_text(settings):
    """By one step, with an open gate, of a model that learns token states and categories."""
    content = ring_content(TextSettings(encoder="tokens", size=7, tokens=3, vocabulary=31))
    content = dataclasses.replace(content, numbers_VM=content.tokens_VL.float())
    shape = ModelSettings(embedding_size=8, heads=2, hidden_size=11, length=7, text="both")
    model = SequenceModel(shape, 13, content, 31).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.text_attention.gate.fill_(0.1)
    optimizer, before = Optimizer(model, settings), weights(model)
    learn(model, optimizer, 1)
    return {name: value - before[name] for name, value in model.state_dict().items()}


TABLES = {"table.weight", "content.states_WP", "fusion.category_table"}
TEXT_MATRICES = {
    *("fusion.text.weight", "fusion.numbers.weight", "text_attention.query.weight"),
    *("text_attention.key_value.weight", "text_attention.attention_out.weight"),
}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_token_states_and_categories_have_the_rate_of_the_item_table_and_maps_of_text_decay(kind):
    base = dataclasses.replace(SETTINGS, kind=kind)
    plain = moved_with_text(base)

    def other(**changed):
        found = moved_with_text(dataclasses.replace(base, **changed))
        return {name for name in found if not torch.equal(found[name], plain[name])}

    assert other(embedding_learning_rate=2e-2) == TABLES
    decayed = other(weight_decay=0.0)
    assert {name for name in decayed if not name.startswith("blocks.")} == TEXT_MATRICES
    assert other(kind="muon" if kind == "adamw" else "adamw") == decayed


def test_the_average_is_that_of_the_weights_after_every_step():
    model, optimizer = build(dataclasses.replace(SETTINGS, ema=0.5))
    average = weights(model)
    for step in range(5):
        learn(model, optimizer, 1, step)
        decay = min(0.5, (1 + step) / (10 + step))
        average = {name: decay * value + (1 - decay) * model.state_dict()[name] for name, value in average.items()}
    before = weights(model)
    with optimizer.averaged():
        inside = weights(model)
    assert all(torch.allclose(inside[name], average[name], atol=1e-7) for name in average)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.allclose(inside["table.weight"], before["table.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_optimizer_goes_on_as_the_saved_one(kind):
    settings = dataclasses.replace(SETTINGS, kind=kind, ema=0.9)
    model, optimizer = build(settings)
    learn(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, restored = build(settings)
    other.load_state_dict(saved["model"])
    restored.load_state_dict(saved["optimizer"])
    learn(model, optimizer, 3, 3)
    learn(other, restored, 3, 3)
    with optimizer.averaged(), restored.averaged():
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_rates_rise_and_then_fall_along_a_cosine():
    rates = [rate_at(step, 100, 10, 1.0) for step in range(101)]
    assert rates[:3] == [0.1, 0.2, 0.3]
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.01)
    assert all(after < before for before, after in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "lion"),
        ("learning_rate", 0.0),
        ("muon_learning_rate", -1.0),
        ("embedding_learning_rate", -1.0),
        ("warmup_steps", -1),
        ("weight_decay", -1.0),
        ("ema", 1.0),
    ],
)
def test_a_setting_out_of_range_is_refused(key, value):
    with pytest.raises(ValueError, match=key):
        OptimizerSettings(**{key: value})
