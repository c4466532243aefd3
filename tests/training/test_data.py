"""An epoch shows every training target once and nothing of validation or test."""

import torch

from recsys.batch import Sequences
from training.data import EpochBatches


def targets_of(sequences: Sequences, length: int) -> list[tuple[int, ...]]:
    out = []
    for user in range(sequences.users):
        start = int(sequences.offsets[user])
        events = sequences.items[start : start + int(sequences.train_end[user])].tolist()
        if len(events) >= 2:
            out.append(tuple(events[-length - 1 :]))
    return sorted(out)


def test_an_epoch_is_each_users_last_training_window_once(ring):
    for length in (3, 50):
        found = []
        for batch in EpochBatches(ring, length, 97, seed=0, epoch=0):
            for begin, end in zip(batch.history.offsets[:-1].tolist(), batch.history.offsets[1:].tolist(), strict=True):
                found.append((*batch.history.values[begin:end].tolist(), int(batch.targets[end - 1])))
                assert batch.history.values[begin + 1 : end].tolist() == batch.targets[begin : end - 1].tolist()
        assert sorted(found) == targets_of(ring, length)


def test_all_windows_make_every_training_event_but_the_first_a_target_once(ring):
    found = sorted(row for batch in EpochBatches(ring, 3, 97, 0, 0, "all") for row in batch.targets.tolist())
    begins, ends, _ = ring.windows("train")
    pairs = zip((begins + 1).tolist(), ends.tolist(), strict=True)
    assert found == sorted(row for begin, end in pairs for row in ring.items[begin:end].tolist())


def test_no_batch_is_larger_than_its_budget(ring):
    for batch in EpochBatches(ring, 50, 97, seed=0, epoch=0):
        assert len(batch.history) * int(batch.history.lengths.max()) <= 97


def test_little_is_padding(ring):
    padded = sum(len(b.history) * int(b.history.lengths.max()) for b in EpochBatches(ring, 50, 97, seed=0, epoch=0))
    assert padded < 1.35 * sum(len(batch.targets) for batch in EpochBatches(ring, 50, 97, seed=0, epoch=0))


def test_epochs_differ_and_repeat_by_seed(ring):
    def values(seed: int, epoch: int) -> list[int]:
        return torch.cat([batch.targets for batch in EpochBatches(ring, 50, 97, seed, epoch)]).tolist()

    assert values(1, 2) == values(1, 2)
    assert values(1, 2) != values(1, 3)
    assert values(1, 2) != values(2, 2)


def test_the_rest_of_an_epoch_is_the_rest(ring):
    whole = [batch.targets.tolist() for batch in EpochBatches(ring, 50, 97, seed=0, epoch=0)]
    assert [batch.targets.tolist() for batch in EpochBatches(ring, 50, 97, seed=0, epoch=0).starting_at(5)] == whole[5:]
