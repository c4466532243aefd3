"""Exact validation against a slow, plain reading of the protocol."""

import itertools
import math

import pytest
import torch

from recsys.batch import FIRST_ITEM, Batch, Sequences
from recsys.content import ContentEncoder, Described
from recsys.model import ModelSettings, SequenceModel
from recsys.text import TextSettings
from training.validate import depth_curve, validate


@pytest.mark.parametrize("text", ["none", "cross", "pooled"])
def test_validation_is_the_protocol_read_plainly(text):
    """Behind the items that were learnt stand two that are described, between them one of which nothing is known."""
    generator, items = torch.Generator().manual_seed(0), 31
    lengths = torch.randint(1, 13, (47,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = torch.randint(FIRST_ITEM, FIRST_ITEM + items + 4, (int(offsets[-1]),), generator=generator, dtype=torch.int32)
    train = (lengths.double() * 0.5).long()  # some users have no history
    sequences = Sequences(rows, torch.zeros(len(rows), dtype=torch.int64), offsets, train, (train + 3).minimum(lengths))
    described = torch.arange(items + 3) != items + 1
    texts = [f"{'abcdefg'[item % 7]} {'hijkl'[item % 5]}" if known else "" for item, known in enumerate(described.tolist())]
    items_table = Described(texts, [[]] * len(texts), [[]] * len(texts))
    content = ContentEncoder.fit(items_table, TextSettings(size=6, tokens=2)).encode(items_table)
    settings = ModelSettings(embedding_size=8, length=5, hidden_size=7, text=text)
    model = SequenceModel(settings, items, None if text == "none" else content).initialise(generator)
    with torch.no_grad():  # scores below 0, that of an item of which nothing is known
        model.norm.bias += 1
        model.table.weight[FIRST_ITEM:] -= 1
    known = [*range(items), *((items, items + 2) if text == "pooled" else ())]
    recalls, gains = [], []
    for user in range(47):
        events = rows[offsets[user] : offsets[user + 1]].tolist()
        history, future = events[: train[user]], events[train[user] : int(sequences.validation_end[user])]
        wanted = set(future) - set(history)
        if not history or not wanted:
            continue
        scores = (model.encode(Batch.of([history])) @ model.item_vectors().T)[0].tolist()
        allowed = [FIRST_ITEM + item for item in known if FIRST_ITEM + item not in history]
        top = sorted(allowed, key=lambda row, scores=scores: (-scores[row - FIRST_ITEM], row))[:10]
        possible = min(10, len(wanted))
        recalls.append(len(wanted & set(top)) / possible)
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, possible + 1))
        gains.append(sum(1 / math.log2(rank + 1) for rank, row in enumerate(top, 1) if row in wanted) / ideal)
    found = validate(model, sequences)
    assert math.isclose(found["recall@10"], sum(recalls) / len(recalls), abs_tol=1e-9)
    assert math.isclose(found["ndcg@10"], sum(gains) / len(gains), abs_tol=1e-9)


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_curve_of_depth_states_what_each_way_of_leaving_costs_and_gives(ring, objective):
    settings = ModelSettings(embedding_size=8, blocks=4, length=5, hidden_size=7, early_exit=True, objective=objective)
    model = SequenceModel(settings, 29).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(10)
    curve = depth_curve(model, ring)
    assert curve[0]["blocks"] == 4
    assert curve[-1]["blocks"] == 1
    assert all(more["blocks"] > less["blocks"] for more, less in itertools.pairwise(curve))
    for line in curve:
        done = count_blocks(model, ring, line["leave"])
        assert math.isclose(done, line["blocks"], rel_tol=0.02), "histories leave as they were counted to"
        judged = validate(model, ring, encode=lambda history, now, line=line: model.encode(history, now, leave=line["leave"]))
        assert judged == {key: value for key, value in line.items() if "@" in key}
    assert curve[0]["ndcg@10"] == validate(model, ring)["ndcg@10"]


def count_blocks(model: SequenceModel, sequences: Sequences, leave: list[float]) -> float:
    """Mean blocks that validation histories go through, counted where they do."""
    through, users = 0, 0

    def count(block, inputs, output):
        nonlocal through
        through += len(output)

    def encode(history, now):
        nonlocal users
        users += len(history)
        return model.encode(history, now, leave=leave)

    hooks = [block.register_forward_hook(count) for block in model.blocks]
    validate(model, sequences, encode=encode)
    for hook in hooks:
        hook.remove()
    return through / users
