"""The loop learns what can be learnt, repeats itself, and survives being cut off anywhere."""

import dataclasses

import pytest
import torch

from recsys.errors import DataError, RecsysError
from recsys.model import ModelSettings
from tests.training.conftest import RING
from training.loop import Observation, TrainSettings, choose_device, fit
from training.losses import LOSSES
from training.validate import validate

MODEL = ModelSettings(embedding_size=16, blocks=1, heads=2, hidden_size=23, length=11, dropout=0.1)
TRAIN = TrainSettings(epochs=4, batch_tokens=307, negatives=13, learning_rate=1e-2, warmup_steps=5)


def same(one, other) -> bool:
    first, second = one.model.state_dict(), other.model.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_learns_the_ring(ring, loss):
    state = fit(ring, RING, MODEL, dataclasses.replace(TRAIN, epochs=12, patience=12, loss=loss))
    assert validate(state.model, ring, "test")["ndcg@10"] > 0.95  # a random order scores about .15


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(ring):
    first, again = fit(ring, RING, MODEL, TRAIN), fit(ring, RING, MODEL, TRAIN)
    assert same(first, again)
    assert not same(first, fit(ring, RING, MODEL, dataclasses.replace(TRAIN, seed=1)))


class Cut(Exception):
    pass


@pytest.mark.parametrize("after", [1, 7, 8, 20])
def test_a_training_cut_off_anywhere_ends_with_the_weights_of_an_undisturbed_one(ring, tmp_path, after):
    undisturbed, seen = fit(ring, RING, MODEL, TRAIN), 0

    def cut(observation: Observation) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            raise Cut

    with pytest.raises(Cut):
        fit(ring, RING, MODEL, TRAIN, checkpoint=tmp_path / "c.pt", key="k", checkpoint_seconds=0, observe=cut)
    resumed = fit(ring, RING, MODEL, TRAIN, checkpoint=tmp_path / "c.pt", key="k", checkpoint_seconds=0)
    assert same(undisturbed, resumed)
    assert undisturbed.curve == resumed.curve


def test_a_checkpoint_of_another_run_or_a_broken_one_is_refused(ring, tmp_path):
    path = tmp_path / "c.pt"
    fit(ring, RING, MODEL, TRAIN, checkpoint=path, key="one")
    with pytest.raises(RecsysError, match="another recipe, data set or device"):
        fit(ring, RING, MODEL, TRAIN, checkpoint=path, key="two")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RecsysError, match="cannot be read"):
        fit(ring, RING, MODEL, TRAIN, checkpoint=path, key="one")


def test_patience_ends_training_and_the_best_weights_stay(ring):
    told: list[Observation] = []
    settings = dataclasses.replace(TRAIN, epochs=60, patience=3)
    state = fit(ring, RING, MODEL, settings, observe=told.append)
    validations = [seen for seen in told if seen.validation]
    assert len(validations) < 60
    assert state.best == max(seen.validation["ndcg@10"] for seen in validations)
    assert validate(state.model, ring)["ndcg@10"] == state.best


@pytest.mark.parametrize("new", [True, False])
def test_where_nobody_can_be_judged_every_epoch_is_done_and_the_last_weights_stay(ring, new):
    if new:
        unjudged = dataclasses.replace(ring, train_end=ring.validation_end)
    else:  # what follows the training part stood in it before
        items = ring.items.clone()
        items[ring.offsets[:-1] + ring.train_end] = items[ring.offsets[:-1]]
        unjudged = dataclasses.replace(ring, items=items)
    told: list[Observation] = []
    state = fit(unjudged, RING, MODEL, dataclasses.replace(TRAIN, patience=1), observe=told.append)
    assert [seen.validation for seen in told if seen.validation is not None] == [{}] * 4
    assert state.best_epoch == 4
    assert all(torch.equal(value, state.best_weights[name]) for name, value in state.model.state_dict().items())


CHANGES = {
    "epochs": 2,
    "patience": 1,
    "validate_every": 2,
    "windows": "all",
    "batch_tokens": 101,
    "loss": "softmax",
    "negatives": 5,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "weight_decay": 0.5,
    "precision": "bfloat16",
    "seed": 1,
}


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(TrainSettings)])
def test_every_option_changes_the_training(ring, option):
    base = dataclasses.replace(TRAIN, epochs=40, patience=3) if option == "patience" else TRAIN
    first = fit(ring, RING, MODEL, base)
    second = fit(ring, RING, MODEL, dataclasses.replace(base, **{option: CHANGES[option]}))
    assert first.curve != second.curve or not same(first, second)


def test_a_set_with_nothing_to_learn_is_refused(ring):
    empty = dataclasses.replace(ring, train_end=torch.ones_like(ring.train_end))
    with pytest.raises(DataError, match="nothing to learn"):
        fit(empty, RING, MODEL, TRAIN)


def test_a_diverging_loss_is_named(ring):
    with pytest.raises(RecsysError, match=r"lower train\.learning_rate"):
        fit(ring, RING, MODEL, dataclasses.replace(TRAIN, learning_rate=1e30, warmup_steps=0))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(RecsysError, match="not there"):
        choose_device("cuda:97")
