"""An epoch shows every training target once and nothing of validation or test."""

import torch

from recsys.batch import UNKNOWN, Sequences
from training.data import EpochBatches, mask


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


def test_prefixes_are_one_window_for_each_target_of_the_epoch(ring):
    length, found = 5, []
    for batch in EpochBatches(ring, length, 97, 0, 0, "prefixes"):
        assert torch.equal(batch.places, batch.history.offsets[1:] - 1)
        found += [
            (*batch.history.values[begin:end].tolist(), target)
            for begin, end, target in zip(
                batch.history.offsets[:-1].tolist(), batch.history.offsets[1:].tolist(), batch.targets.tolist(), strict=True
            )
        ]
    begins, ends, _ = ring.windows("train")
    wanted = [
        tuple(ring.items[max(begin, place - length) : place + 1].tolist())
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        for place in range(begin + 1, end)
    ]
    assert sorted(found) == sorted(wanted)


def test_masked_windows_hold_every_training_event_and_hide_what_is_to_be_named(ring):
    seen, hidden = [], 0
    for batch in EpochBatches(ring, 5, 97, 0, 0, "all", masked=True):
        seen += batch.history.values.tolist()
        masked = mask(batch, 0.2, torch.Generator().manual_seed(0))
        assert torch.equal(masked.targets, batch.history.values[masked.places])
        assert (masked.history.values[masked.places] == UNKNOWN).all()
        others = torch.ones(len(batch.history.values), dtype=torch.bool).index_fill(0, masked.places, False)
        assert torch.equal(masked.history.values[others], batch.history.values[others])
        assert len(torch.unique(batch.history.owners[masked.places])) == len(batch.history), "each history has a target"
        hidden += len(masked.places)
    begins, ends, _ = ring.windows("train")
    assert sorted(seen) == sorted(
        row for begin, end in zip(begins.tolist(), ends.tolist(), strict=True) for row in ring.items[begin:end].tolist()
    )
    assert 0.2 < hidden / len(seen) < 0.45, "a fifth, and one where none was drawn"


def test_packed_batches_are_full_of_events(ring):
    sizes = [len(batch.targets) for batch in EpochBatches(ring, 50, 97, 0, 0, packed=True)]
    assert max(sizes) <= 97
    assert sum(sizes) > 0.85 * 97 * len(sizes)
