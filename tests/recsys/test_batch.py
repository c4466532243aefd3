"""Jagged histories keep every event in its place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.batch import FIRST_ITEM, PADDING, UNKNOWN, Batch, Sequences, gather, group_by_length

histories = st.lists(st.lists(st.integers(2, 101), max_size=11), min_size=1, max_size=7)


@given(histories, st.integers(1, 13))
def test_last_keeps_the_newest_events_of_each_history(rows, events):
    batch = Batch.of(rows, [[10 * row for row in history] for history in rows]).last(events)
    kept = [history[-events:] for history in rows]
    assert batch.values.tolist() == [row for history in kept for row in history]
    assert batch.times.tolist() == [10 * row for history in kept for row in history]
    assert batch.lengths.tolist() == [len(history) for history in kept]


@given(histories)
def test_padding_stands_on_the_right_and_the_mask_finds_the_events_again(rows):
    batch = Batch.of(rows)
    padded = batch.padded(12)
    assert padded.shape == (len(rows), 12)
    for line, history in zip(padded.tolist(), rows, strict=True):
        assert line == history + [PADDING] * (12 - len(history))
    assert padded[batch.mask(12)].tolist() == batch.values.tolist()


@given(histories)
def test_owners_say_which_history_an_event_belongs_to(rows):
    assert Batch.of(rows).owners.tolist() == [owner for owner, history in enumerate(rows) for _ in history]


@given(st.lists(st.integers(1, 50), max_size=31), st.integers(1, 97))
def test_groups_cover_every_history_once_and_keep_to_the_budget(lengths, tokens):
    lengths = sorted(lengths)
    groups = group_by_length(torch.tensor(lengths, dtype=torch.int64), tokens)
    assert [position for a, b in groups for position in range(a, b)] == list(range(len(lengths)))
    for a, b in groups:
        assert b - a == 1 or (b - a) * max(lengths[a:b]) <= tokens


def test_gather_takes_the_windows_asked_for():
    values, times = torch.arange(11, dtype=torch.int32), torch.arange(11) * 3
    batch = gather(values, times, torch.tensor([7, 0, 5]), torch.tensor([10, 2, 5]))
    assert batch.values.tolist() == [7, 8, 9, 0, 1]
    assert batch.times.tolist() == [21, 24, 27, 0, 3]
    assert batch.offsets.tolist() == [0, 3, 5, 5]


def test_a_test_history_includes_validation_and_a_validation_history_does_not():
    sequences = Sequences(
        items=torch.arange(2, 13, dtype=torch.int32),
        times=torch.arange(11),
        offsets=torch.tensor([0, 5, 11]),
        train_end=torch.tensor([3, 4]),
        validation_end=torch.tensor([4, 5]),
    )
    assert [part.tolist() for part in sequences.windows("train")] == [[0, 5], [3, 9], [3, 9]]
    assert [part.tolist() for part in sequences.windows("validation")] == [[0, 5], [3, 9], [4, 10]]
    assert [part.tolist() for part in sequences.windows("test")] == [[0, 5], [4, 10], [5, 11]]
    with pytest.raises(ValueError, match="none of train, validation, test"):
        sequences.windows("tomorrow")


def test_a_held_out_user_has_a_validation_history_of_which_nothing_is_learnt():
    offsets, zeros = torch.tensor([0, 5, 11]), torch.tensor([0, 0])
    items, times, before = torch.arange(2, 13, dtype=torch.int32), torch.arange(11), torch.tensor([3, 6])
    sequences = Sequences(items, times, offsets, torch.tensor([0, 6]), torch.tensor([4, 6]), before)
    assert [part.tolist() for part in sequences.windows("train")] == [[0, 5], [0, 11], [0, 11]]
    assert [part.tolist() for part in sequences.windows("validation")] == [[0, 5], [3, 11], [4, 11]]
    assert [part.tolist() for part in sequences.windows("test")] == [[0, 5], [4, 11], [5, 11]]
    assert sequences.training_counts(11).tolist() == [0] * 5 + [1] * 6
    assert sequences.learnt_until == 10
    assert Sequences(items, times, offsets, zeros, zeros).learnt_until == 0


@given(st.lists(st.lists(st.integers(UNKNOWN, FIRST_ITEM + 13), max_size=11), min_size=1, max_size=7), st.integers(1, 13))
def test_what_is_learnable_is_the_training_parts_without_events_of_further_items(rows, items):
    batch = Batch.of(rows, [[10 * place for place in range(len(history))] for history in rows])
    train_end, validation_end = (batch.lengths - 2).clamp(min=0), (batch.lengths - 1).clamp(min=0)
    sequences = Sequences(batch.values.int(), batch.times, batch.offsets, train_end, validation_end)
    found = sequences.learnable(items)
    kept = [[(row, 10 * place) for place, row in enumerate(history[:-2]) if row < FIRST_ITEM + items] for history in rows]
    begins, ends, _ = found.windows("train")
    learnt = gather(found.items, found.times, begins, ends)
    assert learnt.values.tolist() == [row for history in kept for row, _ in history]
    assert learnt.times.tolist() == [time for history in kept for _, time in history]
    assert learnt.lengths.tolist() == [len(history) for history in kept]
    assert found.items.dtype == torch.int32
    assert (found is sequences) == (kept == [[(row, 10 * place) for place, row in enumerate(h[:-2])] for h in rows])
    assert torch.equal(found.training_counts(items), sequences.training_counts(items))
