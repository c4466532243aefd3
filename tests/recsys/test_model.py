"""Laws of the sequence model: causality, padding, order in the batch, and options that all do something."""

import dataclasses

import pytest
import torch

from recsys.batch import FIRST_ITEM, UNKNOWN, Batch
from recsys.embedding import TABLES
from recsys.model import ModelSettings, SequenceModel

ITEMS = 41
SETTINGS = ModelSettings(embedding_size=12, blocks=2, heads=3, hidden_size=17, length=23, dropout=0.25)


def build(settings: ModelSettings = SETTINGS, seed: int = 0) -> SequenceModel:
    model = SequenceModel(settings, ITEMS)
    model.initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.table.weight[FIRST_ITEM:] *= 10  # as after training: items differ
    return model


def random_batch(lengths: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch.of([torch.randint(FIRST_ITEM, FIRST_ITEM + ITEMS, (n,), generator=generator).tolist() for n in lengths])


def test_a_future_event_changes_no_earlier_state():
    model, batch = build(), random_batch([19])
    changed = batch.values.clone()
    changed[13] = FIRST_ITEM + (changed[13] - FIRST_ITEM + 1) % ITEMS
    before, after = model(batch), model(Batch(changed, batch.offsets, batch.times))
    assert torch.equal(before[0, :13], after[0, :13])
    assert not torch.allclose(before[0, 13:], after[0, 13:])


def test_neighbours_and_padding_change_no_state():
    model, together = build(), random_batch([3, 19, 1, 7])
    states = model.encode(together)
    for line in range(len(together)):
        alone = Batch.of([together.values[together.offsets[line] : together.offsets[line + 1]].tolist()])
        assert torch.allclose(model.encode(alone)[0], states[line], atol=1e-5)


def test_only_the_last_length_events_are_read():
    model, long = build(), random_batch([31])
    assert torch.allclose(model.encode(long), model.encode(long.last(SETTINGS.length)))


def test_an_empty_history_has_the_zero_state():
    states = build().encode(Batch.of([[], [5, 6]]))
    assert torch.equal(states[0], torch.zeros(12))
    assert states[1].any()


def test_an_item_beyond_the_catalogue_is_the_unknown_item():
    model = build()
    beyond, unknown = (model.encode(Batch.of([[4, row, 7]])) for row in (FIRST_ITEM + ITEMS + 5, UNKNOWN))
    assert torch.equal(beyond, unknown)


def test_the_score_of_the_last_state_is_that_of_encode():
    model, batch = build(), random_batch([5, 11])
    states = model(batch)
    assert torch.allclose(model.encode(batch), torch.stack([states[0, 4], states[1, 10]]))


CHANGES = {
    "embedding_size": 6,
    "blocks": 1,
    "heads": 2,
    "hidden_size": 19,
    "length": 2,
    "dropout": 0.5,
    "similarity": "cosine",
    "temperature": 0.5,
}


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(ModelSettings) if field.name != "embedding"])
def test_every_option_changes_the_scores(option):
    batch = random_batch([5, 11])

    def scores(settings: ModelSettings) -> torch.Tensor:
        model = build(settings)
        states_BTE = model(batch.last(settings.length), torch.Generator().manual_seed(1))
        return states_BTE[:, -1] @ model.item_vectors().T

    assert not torch.allclose(scores(SETTINGS), scores(dataclasses.replace(SETTINGS, **{option: CHANGES[option]})))


def test_both_table_backends_give_the_same_numbers_and_gradients():
    pytest.importorskip("torchrec")
    assert set(TABLES) == {"torch", "torchrec"}
    batch, results = random_batch([5, 11, 2]), []
    for backend in TABLES:
        model = build(dataclasses.replace(SETTINGS, embedding=backend))
        states = model(batch, torch.Generator().manual_seed(1))
        (states.sum(1) @ model.item_vectors().T).square().sum().backward()
        results.append((states, model.table.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_cosine_scores_are_bounded_by_the_temperature():
    model, batch = build(dataclasses.replace(SETTINGS, similarity="cosine", temperature=0.1)), random_batch([5, 11])
    scores = model.encode(batch) @ model.item_vectors().T
    assert scores.abs().max() <= 10 + 1e-4


@pytest.mark.parametrize(
    ("key", "value"),
    [("heads", 5), ("blocks", 0), ("dropout", 1.0), ("temperature", 0.0), ("similarity", "l2"), ("embedding", "numpy")],
)
def test_a_setting_out_of_range_is_refused(key, value):
    with pytest.raises(ValueError, match=key):
        ModelSettings(**{key: value})
