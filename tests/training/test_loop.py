"""The loop learns what can be learnt, repeats itself, and survives being cut off anywhere."""

import dataclasses
import functools

import pytest
import torch

from recsys.attention import PATTERNS, POSITIONS, TIMES
from recsys.batch import FIRST_ITEM, UNKNOWN, Batch, Sequences
from recsys.blocks import BLOCKS
from recsys.content import ContentEncoder, Described
from recsys.errors import DataError, RecipeError, RecsysError
from recsys.model import ModelSettings, SequenceModel
from recsys.text import TextSettings
from tests.training.conftest import COLOURS, RING, SHAPES, ring_content, ring_sequences
from training import checkpoint
from training.checkpoint import Checkpoints
from training.data import WINDOWS
from training.loop import Observation, TrainSettings, choose_device, fit
from training.losses import LOSSES, LossSettings
from training.negatives import SAMPLINGS
from training.optimizer import KINDS, TABLE_KINDS, OptimizerSettings
from training.validate import validate

MODEL = ModelSettings(embedding_size=16, blocks=1, heads=2, hidden_size=23, length=11, dropout=0.1)
TRAIN = TrainSettings(epochs=4, batch_tokens=307)
LOSS = LossSettings(negatives=13)
OPTIMIZER = OptimizerSettings(learning_rate=1e-2, warmup_steps=5)
TEXT = TextSettings(size=19, tokens=3, vocabulary=997)


def learn(sequences, *changed, items=RING, content=None, **options):
    """`fit` on the ring with the settings above, but for those given; its items are described where the model reads it."""
    given = {type(settings): settings for settings in changed}
    model, *_, text = chosen = [given.get(type(settings), settings) for settings in (MODEL, TRAIN, LOSS, OPTIMIZER, TEXT)]
    if content is None and model.text != "none":
        content = ring_content(text)
    return fit(sequences, items, *chosen, content=content, **options)


def same(one, other) -> bool:
    first, second = one.model.state_dict(), other.model.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


RATES = {
    "sgd": {"learning_rate": 0.3, "embedding_learning_rate": 3.0},
    "adagrad": {"embedding_learning_rate": 0.1},
    "rowwise_adagrad": {"embedding_learning_rate": 0.1},
}
"""Where others than AdamW's are needed."""

LEARNERS = {
    **{f"loss {kind}": [dataclasses.replace(LOSS, kind=kind), dataclasses.replace(TRAIN, epochs=60)] for kind in LOSSES},
    **{f"sampling {kind}": [dataclasses.replace(LOSS, sampling=kind)] for kind in SAMPLINGS},
    "unseen negatives": [dataclasses.replace(LOSS, filter_seen=True)],
    **{f"optimizer {kind}": [dataclasses.replace(OPTIMIZER, kind=kind, **RATES.get(kind, {}))] for kind in KINDS},
    **{
        f"table by {kind}": [
            dataclasses.replace(OPTIMIZER, table=kind, embedding_learning_rate=RATES[kind]["embedding_learning_rate"])
        ]
        for kind in TABLE_KINDS[1:-1]
    },
    **{f"block {kind}": [dataclasses.replace(MODEL, block=kind)] for kind in BLOCKS},
    **{f"attention {kind}": [dataclasses.replace(MODEL, attention=kind, span=4)] for kind in PATTERNS},
    **{f"positions {kind}": [dataclasses.replace(MODEL, positions=kind)] for kind in POSITIONS},
    **{f"time {kind}": [dataclasses.replace(MODEL, time=kind, request_time=kind != "none")] for kind in TIMES},
    **{f"windows {kind}": [dataclasses.replace(TRAIN, windows=kind, epochs=30)] for kind in WINDOWS},
    "shared blocks": [dataclasses.replace(MODEL, blocks=3, distinct_blocks=1)],
    "early exit": [dataclasses.replace(MODEL, blocks=3, early_exit=True)],
    "average": [dataclasses.replace(OPTIMIZER, ema=0.95)],
    "masked": [dataclasses.replace(MODEL, objective="masked", dropout=0.0), dataclasses.replace(TRAIN, epochs=60)],
    **{f"text {kind}": [dataclasses.replace(MODEL, text=kind)] for kind in ("pooled", "cross", "both")},
    **{
        f"text alone, {encoder}": [
            dataclasses.replace(MODEL, text="both", ids=False),
            dataclasses.replace(TEXT, encoder=encoder),
            dataclasses.replace(TRAIN, epochs=30),
        ]
        for encoder in ("lsa", "tokens")
    },
    "dropped ids": [dataclasses.replace(MODEL, text="pooled", id_dropout=0.5)],
    "text in bfloat16": [dataclasses.replace(MODEL, text="both"), dataclasses.replace(TRAIN, precision="bfloat16")],
    "masked text": [
        dataclasses.replace(MODEL, objective="masked", dropout=0.0, text="both"),
        dataclasses.replace(TRAIN, epochs=140),
    ],
}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_way_learns_the_ring(ring, name):
    changed = LEARNERS[name]
    train = next((settings for settings in changed if isinstance(settings, TrainSettings)), TRAIN)
    state = learn(ring, *changed, dataclasses.replace(train, epochs=max(12, train.epochs), patience=100))
    wanted = 0.85 if name == "masked" else 0.95  # a random order scores about .15
    assert validate(state.model, ring, "test")["ndcg@10"] > wanted


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(ring):
    first, again = learn(ring), learn(ring)
    assert same(first, again)
    assert not same(first, learn(ring, dataclasses.replace(TRAIN, seed=1)))


@pytest.mark.parametrize("text", ["pooled", "cross", "both"])
def test_token_states_that_are_learnt_change_while_training_and_given_ones_are_no_weights(ring, text):
    settings = dataclasses.replace(MODEL, text=text)
    state = learn(ring, settings, dataclasses.replace(TEXT, encoder="tokens"))
    fresh = SequenceModel(settings, RING, ring_content(dataclasses.replace(TEXT, encoder="tokens")), TEXT.vocabulary)
    before_WP = fresh.initialise(torch.Generator().manual_seed(TRAIN.seed)).content.states_WP
    moved = (state.model.content.states_WP - before_WP).abs().amax(1) > 1e-3
    read = set(state.model.content.tokens_RL.flatten().tolist()) - {0}
    assert set(moved.nonzero().flatten().tolist()) == read
    assert not {name for name in learn(ring, settings).model.state_dict() if name.startswith("content.")}


ALL, COLD = len(COLOURS) * len(SHAPES), len(COLOURS)
"""Items of the world below, and those of them that no event is learnt of: one of each colour."""


def shelves() -> tuple[Sequences, Sequences, Described]:
    """Users walk along the shapes of one colour: first those who learn, then those whose next item is cold.

    A cold item is in no history. The last rows are theirs.
    """
    cold = [(colour, 3 * colour % len(SHAPES)) for colour in range(len(COLOURS))]
    known = [(colour, shape) for colour in range(len(COLOURS)) for shape in range(len(SHAPES)) if (colour, shape) not in cold]
    rows = {pair: FIRST_ITEM + place for place, pair in enumerate(known + cold)}
    walks = [[rows[colour, (shape + step) % len(SHAPES)] for step in range(1, len(SHAPES))] for colour, shape in cold]
    learnt = [walk[start:end] for walk in walks for start in range(5) for end in range(start + 2, 7)]
    asked = [[*walk[start:], rows[pair]] for walk, pair in zip(walks, cold, strict=True) for start in range(5)]
    texts = [f"{COLOURS[colour]} {SHAPES[shape]}" for colour, shape in known + cold]

    def of(histories: list[list[int]], targets: int) -> Sequences:
        batch = Batch.of(histories)
        ends = batch.lengths - targets
        return Sequences(batch.values.int(), batch.times, batch.offsets, ends, ends)

    return of(learnt, 0), of(asked, 1), Described(texts, [[]] * ALL, [[]] * ALL)


@pytest.mark.parametrize("encoder", ["lsa", "tokens"])
@pytest.mark.parametrize("text", ["pooled", "both"])
@pytest.mark.parametrize("ids", [{"ids": False}, {"id_dropout": 0.5}], ids=str)
def test_a_cold_item_is_recommended_where_its_text_says_so(encoder, text, ids):
    learnt, asked, described = shelves()
    settings = dataclasses.replace(TEXT, encoder=encoder)
    content = ContentEncoder.fit(described.take(ALL - COLD), settings).encode(described)
    model, train = dataclasses.replace(MODEL, text=text, **ids), dataclasses.replace(TRAIN, epochs=60)
    loss = dataclasses.replace(LOSS, kind="softmax")
    state = learn(learnt, model, train, loss, settings, items=ALL - COLD, content=content)
    assert state.model.lines == ALL
    wanted = {"lsa": 0.9, "tokens": 0.4}[encoder]  # a random order scores about .14
    assert validate(state.model, asked, "test")["ndcg@10"] > wanted


@pytest.mark.parametrize("text", ["none", "cross"])
def test_a_cold_item_is_never_recommended_where_vectors_hold_no_description(text):
    learnt, asked, described = shelves()
    content = ContentEncoder.fit(described.take(ALL - COLD), TEXT).encode(described)
    model = dataclasses.replace(MODEL, text=text)
    state = learn(learnt, model, items=ALL - COLD, content=None if text == "none" else content)
    assert validate(state.model, asked, "test")["ndcg@50"] == 0


def test_events_of_cold_items_teach_nothing(ring):
    """The weights are the same whichever cold items stand between, and those without them."""
    ends, settings = ring.offsets.diff(), dataclasses.replace(MODEL, text="both")
    unjudged = dataclasses.replace(ring, train_end=ends, validation_end=ends)
    warm = ring.items.clamp(max=FIRST_ITEM + RING - 3)
    at = torch.arange(len(warm)) % 5 == 2
    one, other = (
        learn(dataclasses.replace(unjudged, items=torch.where(at, row, warm)), settings, items=RING - 2)
        for row in (FIRST_ITEM + RING - 1, FIRST_ITEM + RING - 2)
    )
    assert same(one, other)
    lengths = torch.zeros_like(ends).index_add_(
        0, torch.arange(len(ends)).repeat_interleave(ends)[~at], torch.ones_like(at).long()[~at]
    )
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    without = Sequences(warm[~at], ring.times[~at], offsets, lengths, lengths)
    assert same(one, learn(without, settings, items=RING - 2))


class Cut(Exception):
    pass


RESUMED = {
    "plain": [],
    "all": [
        dataclasses.replace(MODEL, blocks=2, objective="masked", early_exit=True, positions="relative"),
        dataclasses.replace(OPTIMIZER, kind="muon", ema=0.9),
        dataclasses.replace(LOSS, sampling="popularity"),
    ],
    "text": [
        dataclasses.replace(MODEL, text="both", id_dropout=0.3, objective="masked"),
        dataclasses.replace(OPTIMIZER, kind="muon", ema=0.9),
        dataclasses.replace(TEXT, encoder="tokens"),
    ],
}


@pytest.fixture(scope="module")
def whole():
    """Of each kind the training that nothing cuts off, learnt once."""
    return functools.cache(lambda kind: learn(ring_sequences(), *RESUMED[kind]))


@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("after", [1, 7, 8, 20])
def test_a_training_cut_off_anywhere_ends_with_the_weights_of_an_undisturbed_one(
    ring, whole, tmp_path, monkeypatch, kind, after
):
    changed, seen = RESUMED[kind], 0
    undisturbed = whole(kind)

    def cut(observation: Observation) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            raise Cut

    monkeypatch.setattr(checkpoint, "SECONDS", 0)
    with pytest.raises(Cut):
        learn(ring, *changed, checkpoints=Checkpoints(tmp_path, "k"), observe=cut)
    monkeypatch.setattr(checkpoint, "SECONDS", 60)
    resumed = learn(ring, *changed, checkpoints=Checkpoints(tmp_path, "k"))
    assert same(undisturbed, resumed)
    assert undisturbed.curve == resumed.curve


def test_a_checkpoint_of_another_run_or_a_broken_one_is_refused(ring, tmp_path):
    learn(ring, checkpoints=Checkpoints(tmp_path, "one"))
    with pytest.raises(RecsysError, match="another recipe, data set or device"):
        learn(ring, checkpoints=Checkpoints(tmp_path, "two"))
    (written,) = tmp_path.glob("*/*.distcp")
    written.write_bytes(written.read_bytes()[:1000])
    with pytest.raises(RecsysError, match="cannot be read"):
        learn(ring, checkpoints=Checkpoints(tmp_path, "one"))


def test_patience_ends_training_and_the_best_weights_stay(ring):
    told: list[Observation] = []
    settings = dataclasses.replace(TRAIN, epochs=60, patience=3)
    state = learn(ring, settings, observe=told.append)
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
    state = learn(unjudged, dataclasses.replace(TRAIN, patience=1), observe=told.append)
    assert [seen.validation for seen in told if seen.validation is not None] == [{}] * 4
    assert state.best_epoch == 4
    assert all(torch.equal(value, state.best_weights[name]) for name, value in state.model.state_dict().items())


CHANGES = {
    "epochs": 2,
    "patience": 1,
    "validate_every": 2,
    "windows": "prefixes",
    "since": 300,
    "batch_tokens": 101,
    "precision": "bfloat16",
    "seed": 1,
}


ELSEWHERE = {
    "learn": "needs a run to begin with: tests/training/test_start.py",
    "mask_share": "OTHERS, below",
    "packed": "refused on a CPU; its states: tests/recsys/test_model.py",
    "validate_users": "changes what is judged: tests/training/test_distributed.py",
    "sharding": "changes who holds what: tests/training/test_distributed.py",
}


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(TrainSettings) if field.name not in ELSEWHERE])
def test_every_option_changes_the_training(ring, option):
    base = dataclasses.replace(TRAIN, epochs=40, patience=3) if option == "patience" else TRAIN
    first, second = learn(ring, base), learn(ring, dataclasses.replace(base, **{option: CHANGES[option]}))
    assert first.curve != second.curve or not same(first, second)


MASKED = dataclasses.replace(MODEL, objective="masked")
OTHERS = {
    "table": ([OPTIMIZER], [dataclasses.replace(OPTIMIZER, table="rowwise_adagrad")]),
    "mask_share": ([MASKED], [MASKED, dataclasses.replace(TRAIN, mask_share=0.5)]),
    "early_exit": ([dataclasses.replace(MODEL, blocks=2)], [dataclasses.replace(MODEL, blocks=2, early_exit=True)]),
    "kind of loss": ([], [dataclasses.replace(LOSS, kind="softmax")]),
    "negatives": ([], [dataclasses.replace(LOSS, negatives=5)]),
    "sampling": ([], [dataclasses.replace(LOSS, sampling="popularity")]),
    "logq": (
        [dataclasses.replace(LOSS, sampling="popularity")],
        [dataclasses.replace(LOSS, sampling="popularity", logq=False)],
    ),
    "calibration": ([dataclasses.replace(LOSS, kind="gbce")], [dataclasses.replace(LOSS, kind="gbce", calibration=0.1)]),
    "filter_seen": ([], [dataclasses.replace(LOSS, filter_seen=True)]),
    "kind of optimizer": ([], [dataclasses.replace(OPTIMIZER, kind="muon")]),
    "learning_rate": ([], [dataclasses.replace(OPTIMIZER, learning_rate=1e-3)]),
    "embedding_learning_rate": ([], [dataclasses.replace(OPTIMIZER, embedding_learning_rate=1e-3)]),
    "muon_learning_rate": (
        [dataclasses.replace(OPTIMIZER, kind="muon")],
        [dataclasses.replace(OPTIMIZER, kind="muon", muon_learning_rate=1e-3)],
    ),
    "warmup_steps": ([], [dataclasses.replace(OPTIMIZER, warmup_steps=0)]),
    "weight_decay": ([], [dataclasses.replace(OPTIMIZER, weight_decay=0.5)]),
    "ema": ([], [dataclasses.replace(OPTIMIZER, ema=0.9)]),
}


def test_every_option_of_the_loss_and_the_optimizer_has_its_change():
    assert {field.name for owner in (LossSettings, OptimizerSettings) for field in dataclasses.fields(owner)} - {"kind"} <= set(
        OTHERS
    )


@pytest.mark.parametrize("option", OTHERS)
def test_every_other_option_changes_the_training(ring, option):
    one, other = OTHERS[option]
    assert not same(learn(ring, *one), learn(ring, *other))


@pytest.mark.parametrize(
    ("block", "attention"), [("ligr", "full"), *((block, "local") for block in BLOCKS), ("sasrec", "block_sparse")]
)
def test_a_user_of_ten_thousand_events_is_learnt(block, attention):
    """Every event is followed by the next of the ring; the 10,000 inputs lie in one window."""
    events, items = 10_003, FIRST_ITEM + torch.arange(10_003) % RING
    ends = torch.tensor([events])
    sequences = Sequences(items.int(), torch.arange(events), torch.tensor([0, events]), ends - 2, ends - 1)
    model = dataclasses.replace(MODEL, embedding_size=8, length=10_000, attention=attention, span=32, block=block)
    timed = dataclasses.replace(model, positions="relative", time="relative")
    for settings in (model, timed) if block == "ligr" else (model,):
        eager = dataclasses.replace(OPTIMIZER, warmup_steps=0)
        state = learn(
            sequences, settings, dataclasses.replace(TRAIN, epochs=2), dataclasses.replace(LOSS, kind="softmax"), eager
        )
        assert state.curve[-1]["loss"] < state.curve[0]["loss"]


@pytest.mark.parametrize(("objective", "windows"), [("causal", "all"), ("causal", "prefixes"), ("masked", "all")])
def test_what_a_state_has_read_is_told_to_the_loss(ring, monkeypatch, objective, windows):
    """Items ascend around the ring: a causal state has read all before its target, a masked one all that is not hidden."""
    told = []

    def watch(model, states, targets, settings, generator):
        told.append((targets.rows_N, targets.seen))
        return LOSSES["sampled_softmax"](model, states, targets, settings, generator)

    monkeypatch.setitem(LOSSES, "watched", watch)
    learn(
        ring,
        dataclasses.replace(MODEL, objective=objective),
        dataclasses.replace(TRAIN, epochs=1, windows=windows),
        LossSettings("watched", filter_seen=True),
    )
    longest = 0
    for targets, seen in told:
        for target, begin, end in zip(targets.tolist(), seen.begins_N.tolist(), seen.ends_N.tolist(), strict=True):
            read = seen.rows_M[begin:end].tolist()
            longest = max(longest, len(read))
            if objective == "causal":
                assert read == [(target - FIRST_ITEM - back) % RING + FIRST_ITEM for back in range(len(read), 0, -1)]
            else:
                assert target not in read and UNKNOWN in read
    assert longest == MODEL.length


def test_settings_that_do_not_go_together_are_refused(ring):
    with pytest.raises(RecipeError, match="packed"):
        learn(ring, dataclasses.replace(TRAIN, packed=True))
    with pytest.raises(RecipeError, match="prefixes"):
        learn(ring, dataclasses.replace(TRAIN, windows="prefixes"), MASKED)


def test_a_set_with_nothing_to_learn_is_refused(ring):
    empty = dataclasses.replace(ring, train_end=torch.ones_like(ring.train_end))
    with pytest.raises(DataError, match="nothing to learn"):
        learn(empty)


def test_a_diverging_loss_is_named(ring):
    with pytest.raises(RecsysError, match=r"lower optimizer\.learning_rate"):
        learn(ring, dataclasses.replace(OPTIMIZER, learning_rate=1e30, warmup_steps=0))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(RecsysError, match="not there"):
        choose_device("cuda:97")
