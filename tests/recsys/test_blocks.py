"""Blocks against their published equations, and their attention weights against their outputs."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from recsys.attention import View
from recsys.blocks import BLOCKS
from recsys.model import ModelSettings

SETTINGS = ModelSettings(embedding_size=12, heads=3, hidden_size=17, length=7, dropout=0.5)
TIMES = torch.arange(14).view(2, 7)
VIEW = View(torch.tensor([7, 5]), torch.zeros(2, 7, dtype=torch.int64), torch.arange(7), TIMES, TIMES)


def block(name):
    made = BLOCKS[name](dataclasses.replace(SETTINGS, block=name)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5, generator=torch.Generator().manual_seed(1))
    return made, torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def heads(x_BTE):
    return x_BTE.unflatten(-1, (3, 4)).transpose(1, 2)


def attended(q, k, v, pointwise=False):
    logits = heads(q) @ heads(k).mT / 2
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    weights = (F.silu(logits) / 7).masked_fill(future, 0) if pointwise else logits.masked_fill(future, -torch.inf).softmax(-1)
    return (weights @ heads(v)).transpose(1, 2).flatten(2)


def test_sasrec_is_its_equations():
    made, x = block("sasrec")
    q, k, v = made.query_key_value(made.attention_norm(x)).chunk(3, -1)
    middle = x + made.attention_out(attended(q, k, v))
    wanted = middle + made.forward_out(F.gelu(made.forward_in(made.forward_norm(middle))))
    assert torch.allclose(made(x, VIEW), wanted)


def test_ligr_is_its_equations():
    made, x = block("ligr")
    q, k, v, gate = made.query_key_value_gate(made.attention_norm(x)).chunk(4, -1)
    middle = x + made.attention_out(attended(q, k, v)) * gate.sigmoid()
    gate, a, b = made.forward_in(made.forward_norm(middle)).split([12, 17, 17], -1)
    assert torch.allclose(made(x, VIEW), middle + made.forward_out(F.silu(a) * b) * gate.sigmoid())


def test_hstu_is_its_equations():
    made, x = block("hstu")
    q, k, v, gate = F.silu(made.query_key_value_gate(made.attention_norm(x))).chunk(4, -1)
    wanted = x + made.attention_out(made.mixed_norm(attended(q, k, v, pointwise=True)) * gate)
    assert torch.allclose(made(x, VIEW), wanted)


@pytest.mark.parametrize("name", BLOCKS)
def test_attention_weights_are_those_that_mix_the_values(name):
    made, x = block(name)
    caught = []
    made.attention.register_forward_hook(lambda module, inputs, output: caught.append((inputs, output)))
    made(x, VIEW)
    (inputs, mixed_BHTD), weights_BHTT = caught[0], made.attention_weights(x, VIEW)
    assert torch.equal(weights_BHTT.triu(1), torch.zeros_like(weights_BHTT))
    if name == "hstu":  # weights for reading are its positive ones, as shares
        q_BHTD, k_BHTD, *_ = inputs
        raw = F.silu(q_BHTD @ k_BHTD.mT / 2).clamp(min=0).tril()
        assert torch.allclose(weights_BHTT, raw / raw.sum(-1, keepdim=True).clamp(min=1e-12))
    else:
        assert torch.allclose(weights_BHTT @ inputs[2], mixed_BHTD)


@pytest.mark.parametrize("name", BLOCKS)
def test_dropout_acts_only_with_a_generator(name):
    made, x = block(name)
    assert torch.equal(made(x, VIEW), made(x, VIEW))
    assert not torch.allclose(made(x, VIEW), made(x, VIEW, torch.Generator().manual_seed(0)))
