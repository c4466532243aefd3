"""Laws of the sequence model: causality, padding, order in the batch, and options that all do something."""

import dataclasses
import itertools

import pytest
import torch

from recsys.attention import PATTERNS, POSITIONS, TIMES
from recsys.batch import FIRST_ITEM, UNKNOWN, Batch
from recsys.blocks import BLOCKS
from recsys.embedding import TABLES
from recsys.model import ModelSettings, SequenceModel

ITEMS = 41
SETTINGS = ModelSettings(embedding_size=12, blocks=2, heads=3, hidden_size=17, length=23, dropout=0.25)


def build(settings: ModelSettings = SETTINGS, seed: int = 0) -> SequenceModel:
    model = SequenceModel(settings, ITEMS)
    model.initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for matrix in (parameter for parameter in model.parameters() if parameter.ndim > 1):
            matrix *= 10  # as after training: items differ
    return model


def random_batch(lengths: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch = Batch.of([torch.randint(FIRST_ITEM, FIRST_ITEM + ITEMS, (n,), generator=generator).tolist() for n in lengths])
    gaps = torch.randint(0, 100_000, (len(batch.values),), generator=generator)
    return dataclasses.replace(
        batch, times=gaps.cumsum(0) - gaps.cumsum(0)[batch.offsets[:-1].clamp(max=max(0, len(gaps) - 1))][batch.owners]
    )


def asked(batch: Batch) -> torch.Tensor:
    """The next event's time, an hour after the last one's."""
    times = batch.times.roll(-1)
    times[batch.offsets[1:] - 1] = batch.times[batch.offsets[1:] - 1] + 3600
    return times


KINDS = [
    dataclasses.replace(SETTINGS, embedding_size=12, span=5, block=block, attention=kind, positions=positions, time=time)
    for block, kind, positions, time in itertools.product(BLOCKS, PATTERNS, POSITIONS, TIMES)
]
MASKED = [dataclasses.replace(kind, objective="masked", request_time=kind.time != "none") for kind in KINDS]


def name(settings: ModelSettings) -> str:
    return "-".join((settings.block, settings.attention, settings.positions, settings.time))


TOLD = [dataclasses.replace(kind, request_time=True) for kind in KINDS if kind.time != "none"]


@pytest.mark.parametrize("settings", KINDS + TOLD, ids=name)
def test_a_future_event_changes_no_earlier_state(settings):
    model, batch = build(settings), random_batch([19])
    values, times = batch.values.clone(), batch.times.clone()
    values[13] = FIRST_ITEM + (values[13] - FIRST_ITEM + 1) % ITEMS
    times[14:] += 1_000_000_007
    changed = Batch(values, batch.offsets, times)
    before, after = model(batch, asked=asked(batch))[-1], model(changed, asked=asked(changed))[-1]
    assert torch.allclose(before[0, :13], after[0, :13], atol=1e-6)
    assert not torch.allclose(before[0, 13], after[0, 13], atol=1e-3)


@pytest.mark.parametrize("settings", KINDS + MASKED, ids=name)
def test_neighbours_padding_and_order_change_no_state(settings):
    model, together = build(settings), random_batch([3, 19, 1, 7])
    states = model.encode(together)
    wide_BTE, view = model.read(together, positions=32)
    assert torch.allclose(model.place(wide_BTE[view.last]), states, atol=1e-5)
    for line in range(len(together)):
        part = slice(together.offsets[line], together.offsets[line + 1])
        alone = Batch.of([together.values[part].tolist()], [together.times[part].tolist()])
        assert torch.allclose(model.encode(alone)[0], states[line], atol=1e-5)


PACKED = [kind for kind in KINDS + MASKED if kind.block == "ligr" and kind.time in ("none", "both")]


@pytest.mark.parametrize("settings", PACKED, ids=name)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_packing_changes_no_state(settings):
    model, batch = build(settings), random_batch([3, 19, 1, 7])
    padded = model(batch, asked=asked(batch))[-1].flatten(0, 1)[batch.places(19)]
    assert torch.allclose(model(batch, asked=asked(batch), packed=True)[-1][0], padded, atol=1e-5)
    assert torch.allclose(model(batch, asked=asked(batch), packed=True, positions=128)[-1][0, :30], padded, atol=1e-5)


@pytest.mark.parametrize("settings", MASKED, ids=name)
def test_a_masked_item_is_not_seen_and_both_sides_are(settings):
    model, batch = build(dataclasses.replace(settings, attention="full", blocks=1)), random_batch([19])
    values = batch.values.clone()
    values[7] = UNKNOWN
    hidden = model(Batch(values, batch.offsets, batch.times))[-1][0, 7]
    for place in (2, 16):
        other = values.clone()
        other[place] = FIRST_ITEM + (other[place] - FIRST_ITEM + 1) % ITEMS
        assert not torch.allclose(model(Batch(other, batch.offsets, batch.times))[-1][0, 7], hidden, atol=1e-4)


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_time_of_the_request_is_read_only_where_it_is_declared(objective):
    batch, early, late = random_batch([5, 11]), torch.tensor([10**6, 2 * 10**6]), torch.tensor([10**9, 10**9])
    for time in ("gaps", "relative", "both"):
        model = build(dataclasses.replace(SETTINGS, objective=objective, time=time, request_time=True))
        assert not torch.allclose(model.encode(batch, early), model.encode(batch, late), atol=1e-4)
        if objective == "causal":
            model = build(dataclasses.replace(SETTINGS, time=time))
            assert torch.equal(model.encode(batch, early), model.encode(batch, late))
            with pytest.raises(ValueError, match="request times"):
                build(dataclasses.replace(SETTINGS, time=time, request_time=True))(batch)


def test_shared_blocks_are_used_in_turn():
    shared = build(dataclasses.replace(SETTINGS, blocks=4, distinct_blocks=2))
    assert len(shared.blocks) == 2
    deep = build(dataclasses.replace(SETTINGS, blocks=4))
    deep.load_state_dict(
        shared.state_dict()
        | {k.replace(".0.", ".2.").replace(".1.", ".3."): v for k, v in shared.state_dict().items() if k.startswith("blocks.")}
    )
    batch = random_batch([5, 11])
    assert torch.equal(shared.encode(batch), deep.encode(batch))


def test_exits_are_the_states_after_each_block():
    model, batch = build(dataclasses.replace(SETTINGS, blocks=3, early_exit=True)), random_batch([5, 11])
    exits = model(batch)
    assert len(exits) == 4
    shallow = SequenceModel(dataclasses.replace(SETTINGS, blocks=1), ITEMS)
    shallow.load_state_dict({key: model.state_dict()[key] for key in shallow.state_dict()})
    assert torch.equal(exits[1], shallow(batch)[-1])


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_history_leaves_at_the_first_block_that_changes_little(objective):
    model, batch = (
        build(dataclasses.replace(SETTINGS, blocks=4, objective=objective, early_exit=True)),
        random_batch([5, 11, 0, 3, 2, 19]),
    )
    read, _ = model.asked(batch, None)
    last = torch.arange(len(batch)), (read.lengths - 1).clamp(min=0)
    exits = [states[last] for states in model(read)]
    alike = torch.stack([torch.cosine_similarity(a, b) for a, b in itertools.pairwise(exits[:-1])])
    leave = (alike.sort(1).values[:, -2] - 1e-4).tolist()
    depths = []
    for line, state_E in enumerate(model.encode(batch, leave=leave)):
        depth = next((depth for depth in range(3) if alike[depth, line] >= leave[depth]), 3)
        depths.append(depth)
        wanted = exits[depth + 1][line] if batch.lengths[line] else torch.zeros(12)
        assert torch.allclose(state_E, wanted, atol=1e-5)
    assert len(set(depths)) > 2
    assert torch.equal(model.encode(batch, leave=[2.0] * 3), model.encode(batch))


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
    states = model(batch)[-1]
    assert torch.allclose(model.encode(batch), torch.stack([states[0, 4], states[1, 10]]))


CHANGES = {
    "objective": "masked",
    "embedding_size": 6,
    "block": "ligr",
    "blocks": 1,
    "distinct_blocks": 1,
    "heads": 2,
    "hidden_size": 19,
    "attention": "local",
    "span": 3,
    "positions": "rotary",
    "time": "gaps",
    "request_time": True,
    "length": 2,
    "dropout": 0.5,
    "similarity": "cosine",
    "temperature": 0.5,
}
NEEDS = {"attention": {"span": 3}, "span": {"attention": "block_sparse"}, "request_time": {"time": "relative"}}
ELSEWHERE = {
    "embedding": "both backends, below",
    "early_exit": "what is learnt: tests/training/test_loop.py",
    **dict.fromkeys(("text", "text_span", "ids", "id_dropout"), "tests/recsys/test_fusion.py"),
}


@pytest.mark.parametrize("option", [f.name for f in dataclasses.fields(ModelSettings) if f.name not in ELSEWHERE])
def test_every_option_changes_the_scores(option):
    batch = random_batch([5, 11])

    def scores(settings: ModelSettings) -> torch.Tensor:
        model, read = build(settings), batch.last(settings.length)
        states_BTE = model(read, torch.Generator().manual_seed(1), asked=asked(read))[-1]
        return states_BTE[:, -1] @ model.item_vectors().T

    before = dataclasses.replace(SETTINGS, **NEEDS.get(option, {}))
    assert not torch.allclose(scores(before), scores(dataclasses.replace(before, **{option: CHANGES[option]})))


def test_both_table_backends_give_the_same_numbers_and_gradients():
    pytest.importorskip("torchrec")
    assert set(TABLES) == {"torch", "torchrec"}
    batch, results = random_batch([5, 11, 2]), []
    for backend in TABLES:
        model = build(dataclasses.replace(SETTINGS, embedding=backend))
        states = model(batch, torch.Generator().manual_seed(1))[-1]
        (states.sum(1) @ model.item_vectors().T).square().sum().backward()
        results.append((states, model.table.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_look_ups_add_to_one_gradient_in_place():
    table, rows, factors = TABLES["torch"](7, 3), torch.tensor([[5, 0, 5], [2, 5, 0]]), torch.arange(18.0).view(2, 3, 3)
    with torch.no_grad():
        table.weight.normal_(generator=torch.Generator().manual_seed(0))
    wanted = table.weight.detach().clone().requires_grad_()
    ((wanted[rows] * factors).sum() + wanted[rows[0]].square().sum()).backward()
    (table(rows) * factors).sum().backward()
    before = table.weight.grad
    table(rows[0]).square().sum().backward()
    assert table.weight.grad is before
    assert torch.allclose(table.weight.grad, wanted.grad)


def test_cosine_scores_are_bounded_by_the_temperature():
    model, batch = build(dataclasses.replace(SETTINGS, similarity="cosine", temperature=0.1)), random_batch([5, 11])
    scores = model.encode(batch) @ model.item_vectors().T
    assert scores.abs().max() <= 10 + 1e-4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("heads", 5),
        ("blocks", 0),
        ("span", 0),
        ("distinct_blocks", 3),
        ("dropout", 1.0),
        ("temperature", 0.0),
        ("similarity", "l2"),
        ("embedding", "numpy"),
        ("objective", "prefix"),
        ("block", "gru"),
        ("attention", "sparse"),
        ("positions", "sine"),
        ("time", "absolute"),
        ("request_time", True),
    ],
)
def test_a_setting_out_of_range_is_refused(key, value):
    with pytest.raises(ValueError, match=key):
        ModelSettings(**{key: value})


def test_settings_that_do_not_go_together_are_refused():
    for together in (
        {"objective": "masked", "time": "gaps"},
        {"objective": "masked", "length": 1},
        {"early_exit": True, "blocks": 1},
        {"positions": "rotary", "embedding_size": 9, "heads": 3},
    ):
        with pytest.raises(ValueError, match="|".join(together)):
            ModelSettings(**together)
