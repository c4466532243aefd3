"""The ranker's lesson: which candidates it meets and how they count, that it learns, and survives being cut off anywhere."""

import dataclasses
import itertools
import math

import pytest
import torch

from recsys.batch import FIRST_ITEM, Batch, Sequences
from recsys.errors import RecipeError, RecsysError
from recsys.model import ModelSettings, SequenceModel
from recsys.ranker import Companions, Known, Ranker, RankerSettings
from recsys.text import TextSettings
from tests.training.conftest import RING, ring_content
from training import checkpoint, ranking
from training.checkpoint import Checkpoints
from training.data import EpochBatches, TrainingBatch
from training.loop import Observation, State
from training.optimizer import Optimizer, OptimizerSettings
from training.ranking import Owned, RankingSettings, _Lesson, fit_ranker, latest, ranker_curve
from training.validate import validate

MODEL = ModelSettings(embedding_size=12, blocks=1, heads=2, hidden_size=23, length=11, dropout=0.1)
SETTINGS = RankerSettings(
    blocks=2, width=14, heads=2, hidden_size=19, span=16, companions=7, ids=True, candidates=RING, dropout=0.125
)
LEARNING = RankingSettings(epochs=3, patience=100, requests=3, hard=11, uniform=5, learning_rate=2e-2)
ITEMS, USERS = 97, 53


@pytest.fixture(autouse=True)
def _several_steps_an_epoch(monkeypatch):
    monkeypatch.setattr(ranking, "TOKENS", 307)


def fresh(settings: ModelSettings = MODEL, items: int = RING, text: TextSettings | None = None) -> SequenceModel:
    """A model that was never trained, so that it retrieves at random."""
    content = None if settings.text == "none" else ring_content(text or TextSettings(size=19, tokens=3))
    return SequenceModel(settings, items, content, 997).initialise(torch.Generator().manual_seed(0))


def learn(sequences, ranker=SETTINGS, learning=LEARNING, seed=0, model=None, **options):
    return fit_ranker(model or fresh(), sequences, torch.ones(RING), ranker, learning, seed, **options)


def few(ring: Sequences) -> Sequences:
    """The first users of the ring."""
    end = int(ring.offsets[USERS])
    parts = (ring.items[:end], ring.times[:end], ring.offsets[: USERS + 1], ring.train_end[:USERS])
    return Sequences(*parts, ring.validation_end[:USERS])


def same(one: State[Ranker], other: State[Ranker]) -> bool:
    first, second = one.model.state_dict(), other.model.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


def shopping() -> Sequences:
    """Random events, many of them repeated; the first user has every item but three, the second no training event."""
    generator = torch.Generator().manual_seed(0)
    drawn = [(ITEMS * torch.rand(n, generator=generator).square()).int().tolist() for n in range(4, 4 + USERS - 2)]
    histories = [[*range(3, ITEMS), 0, 1, 2], [5, 7], *drawn]
    batch = Batch.of([[FIRST_ITEM + item for item in history] for history in histories])
    train = (batch.lengths - 2).clamp(min=0)
    train[0] = ITEMS - 3
    return Sequences(batch.values.int(), 60 * torch.arange(len(batch.values)), batch.offsets, train, batch.lengths - 1)


def owned_by(sequences: Sequences) -> list[set[int]]:
    starts, ends = sequences.offsets[:-1], sequences.offsets[:-1] + sequences.train_end
    return [set(sequences.items[a:b].tolist()) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]


def lesson(sequences: Sequences, learning: RankingSettings = LEARNING) -> _Lesson:
    """Of a random model whose scores differ by about 1."""
    model = SequenceModel(dataclasses.replace(MODEL, length=97), ITEMS).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.table.weight.mul_(25)
        known = Known(model.item_vectors(), torch.ones(ITEMS), ITEMS)
    return _Lesson(model.eval().requires_grad_(False), known, Owned(sequences, torch.device("cpu")), learning)


def requests(count: int = 201) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, users and targets that they have, drawn at random."""
    generator, owned = torch.Generator().manual_seed(1), [sorted(rows) for rows in owned_by(shopping())]
    users_P = torch.cat([torch.tensor([0, 0, 0]), torch.randint(2, USERS, (count - 3,), generator=generator)])
    places = torch.rand(count, generator=generator).tolist()
    targets = [owned[user][int(place * len(owned[user]))] for user, place in zip(users_P.tolist(), places, strict=True)]
    return torch.randn(count, 12, generator=generator), users_P, torch.tensor(targets)


@pytest.mark.parametrize("judged", ["every event", "some events"])
def test_the_last_judged_places_of_each_history_are_asked_for(judged):
    history = Batch.of([[2] * 7, [3], [4] * 3, [5] * 11])
    places = torch.arange(22) if judged == "every event" else torch.tensor([1, 2, 5, 6, 7, 8, 12, 13, 14, 15, 17, 19, 21])
    batch = TrainingBatch(history, None, places, history.values[places], torch.arange(4))
    owners = history.owners[places].tolist()
    wanted = [place for place, owner in enumerate(owners) if owners[place + 1 :].count(owner) < 3]
    assert latest(batch, 3).tolist() == wanted
    assert torch.equal(latest(batch, 101), torch.arange(len(places)))


def test_what_users_own_is_what_their_training_part_holds():
    sequences = shopping()
    owned, wanted = Owned(sequences, torch.device("cpu")), owned_by(sequences)
    users_P = torch.tensor([7, 0, 1, 7, USERS - 1])
    rows_PN = torch.arange(FIRST_ITEM + ITEMS + 5).expand(len(users_P), -1)
    found = owned.hit(users_P, rows_PN)
    assert [set(line.nonzero().flatten().tolist()) for line in found] == [wanted[user] for user in users_P]
    lines, rows = owned.of(users_P)
    for line, user in enumerate(users_P.tolist()):
        assert sorted(rows[lines == line].tolist()) == sorted(wanted[user])


@pytest.mark.parametrize("candidates", [31, ITEMS, 1009])
def test_candidates_are_the_target_some_of_the_best_and_some_of_the_others_that_the_user_never_had(candidates):
    sequences = shopping()
    taught, owned = lesson(sequences), owned_by(sequences)
    states_PE, users_P, targets_P = requests()
    settings = dataclasses.replace(SETTINGS, candidates=candidates)
    rows, ranks, odds, highest = taught._candidates(states_PE, users_P, targets_P, settings, torch.Generator().manual_seed(2))
    size = min(candidates, ITEMS)
    assert rows.shape == ranks.shape == odds.shape == (len(users_P), 1 + LEARNING.hard + LEARNING.uniform)
    hard, uniform = slice(1, 1 + LEARNING.hard), slice(1 + LEARNING.hard, None)
    scores_PV = states_PE @ taught.known.vectors_VE.T
    many = 0
    for line, (user, target) in enumerate(zip(users_P.tolist(), targets_P.tolist(), strict=True)):
        scores = {FIRST_ITEM + item: float(score) for item, score in enumerate(scores_PV[line])}
        free = [row for row in scores if row not in owned[user]]
        best = sorted(free, key=lambda row: -scores[row])[:size]
        own = scores[target]
        assert rows[line, 0] == target
        assert float(highest[line]) == pytest.approx(max([own, *(scores[row] for row in best)]), abs=1e-5)
        assert odds[line, 0] == 0
        assert ranks[line, 0] == 1 + sum(scores[row] > own for row in best)
        assert (
            not {row for row, odd in zip(rows[line, 1:].tolist(), odds[line, 1:].tolist(), strict=True) if odd > -math.inf}
            & owned[user]
        )
        counted = odds[line, hard] > -math.inf
        assert counted.sum() == min(LEARNING.hard, len(best)) or size > len(best)
        named = rows[line, hard][counted].tolist()
        assert len(set(rows[line, hard].tolist())) == LEARNING.hard
        assert [1 + best.index(row) + (scores[row] < own) for row in named] == ranks[line, hard][counted].tolist()
        assert odds[line, hard][counted].tolist() == pytest.approx([math.log(size / LEARNING.hard)] * len(named))
        others = odds[line, uniform] > -math.inf
        for row, other in zip(rows[line, uniform].tolist(), others.tolist(), strict=True):
            assert other == (row not in owned[user] and row not in best)
        assert odds[line, uniform][others].tolist() == pytest.approx([math.log(ITEMS / LEARNING.uniform)] * int(others.sum()))
        assert (ranks[line, uniform] == size + 1).all()
        many += int(others.sum())
    assert (many > 201) == (candidates == 31)


@pytest.mark.parametrize("at_once", [3 * ITEMS, 2**24])
def test_candidates_do_not_depend_on_how_many_are_scored_at_once(monkeypatch, at_once):
    taught, whole = lesson(shopping()), []
    for scores in (2**24, at_once):
        monkeypatch.setattr(ranking, "SCORES", scores)
        whole.append(taught._candidates(*requests(), SETTINGS, torch.Generator().manual_seed(2)))
    *found, best = zip(*whole, strict=True)
    assert all(torch.equal(*both) for both in found)
    torch.testing.assert_close(*best)


@pytest.mark.parametrize(("hard", "uniform"), [(11, 5), (31, 7), (3, 1)])
def test_on_average_the_candidates_count_as_all_that_the_user_never_had(hard, uniform):
    """The sum that the loss divides by is estimated without bias."""
    sequences = shopping()
    taught = lesson(sequences, dataclasses.replace(LEARNING, hard=hard, uniform=uniform))
    settings, generator = dataclasses.replace(SETTINGS, candidates=31), torch.Generator().manual_seed(3)
    states_PE, users_P, targets_P = (values[3:53] for values in requests())
    scores_PV = (states_PE @ taught.known.vectors_VE.T).exp()
    free_PV = ~taught.owned.hit(users_P, torch.arange(FIRST_ITEM, FIRST_ITEM + ITEMS).expand(len(users_P), -1))
    wanted = (scores_PV * free_PV).sum(1)
    found = []
    for _ in range(1009):
        rows, _, odds, _ = taught._candidates(states_PE, users_P, targets_P, settings, generator)
        found.append((scores_PV.gather(1, rows - FIRST_ITEM) * odds.exp())[:, 1:].sum(1) / wanted)
    ratios = torch.stack(found)
    assert ((ratios.mean(0) - 1).abs() < 5 * ratios.std(0) / len(ratios) ** 0.5 + 1e-4).all()


def test_with_every_item_a_candidate_the_loss_is_the_softmax_over_what_the_user_never_had_and_the_target():
    sequences = shopping()
    taught = lesson(sequences, RankingSettings(requests=ITEMS, hard=ITEMS, uniform=0))
    settings = dataclasses.replace(SETTINGS, candidates=ITEMS, companions=0, dropout=0.0)
    ranker = Ranker(settings, taught.model.settings, ITEMS).initialise(torch.Generator().manual_seed(0))
    free_UV = torch.ones(USERS, ITEMS, dtype=torch.bool)
    for user, rows in enumerate(owned_by(sequences)):
        free_UV[user, torch.tensor(sorted(rows), dtype=torch.int64) - FIRST_ITEM] = False
    for batch in EpochBatches(sequences, 97, 307, 0, 0, "all"):
        state = State(ranker, Optimizer(ranker, OptimizerSettings(learning_rate=1e-30)), torch.Generator().manual_seed(0))
        total, targets = taught.learn(state, batch)
        states_BTE, _ = taught.model.read_all(batch.history, batch.asked)
        losses = []
        for place, target in zip(batch.places.tolist(), batch.targets.tolist(), strict=True):
            owner = int(batch.history.owners[place])
            scores_V = taught.model.place(states_BTE[owner, place - batch.history.offsets[owner]]) @ taught.known.vectors_VE.T
            own, free_V = scores_V[target - FIRST_ITEM], free_UV[batch.users[owner]]
            losses.append(float(torch.cat([own[None], scores_V[free_V]]).logsumexp(0) - own))
        assert targets == len(losses)
        assert total / targets == pytest.approx(sum(losses) / len(losses), abs=1e-4)


LEARNERS = {
    "ids": {"companions": 0, "blocks": 1},
    "companions": {"ids": False},
    "among": {"among": True, "companions": 0, "blocks": 1},
    "text": {"text": True, "ids": False, "companions": 0, "blocks": 1},
}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_kind_learns_which_item_follows_where_retrieval_knows_nothing_of_it(ring, name):
    """The inner products of a model that was never trained say nothing of who follows whom around the ring."""
    settings = dataclasses.replace(SETTINGS, dropout=0.0, **LEARNERS[name])
    model = fresh(dataclasses.replace(MODEL, text="pooled" if settings.text else "none"))
    state, companions, curve = learn(ring, settings, dataclasses.replace(LEARNING, epochs=12), model=model)
    assert curve[0]["ndcg@10"] < 0.3  # a random order scores about .2
    assert curve[-1]["ndcg@10"] > 0.7
    assert curve[-1]["ndcg@10"] == max(line["ndcg@10"] for line in state.curve) == state.best
    assert all(line["retrieved_ndcg@10"] == curve[0]["ndcg@10"] for line in state.curve)
    assert state.curve[-1]["loss"] < state.curve[0]["loss"]
    assert (companions is None) == (not settings.companions)


def test_the_model_stays_as_it_is_and_the_seed_decides_the_ranker(ring):
    model = fresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (first, *_), (again, *_), (other, *_) = (learn(few(ring), seed=seed, model=model) for seed in (0, 0, 1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert same(first, again)
    assert first.curve == again.curve
    assert not same(first, other)


class Cut(Exception):
    pass


@pytest.mark.parametrize("kind", ["companions", "among"])
@pytest.mark.parametrize("after", [1, 5, 6, 14])
def test_a_ranker_cut_off_anywhere_ends_with_the_weights_of_an_undisturbed_one(ring, tmp_path, monkeypatch, after, kind):
    monkeypatch.setattr(ranking, "TOKENS", 101)
    settings, world, told = dataclasses.replace(SETTINGS, **LEARNERS[kind]), few(ring), []
    undisturbed, companions, curve = learn(world, settings, observe=told.append)
    assert {observation.part for observation in told} == {"ranker"}
    assert len(told) > 14
    seen = 0

    def cut(observation: Observation) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            raise Cut

    monkeypatch.setattr(checkpoint, "SECONDS", 0)
    with pytest.raises(Cut):
        learn(world, settings, observe=cut, checkpoints=Checkpoints(tmp_path, "k"))
    monkeypatch.setattr(checkpoint, "SECONDS", 60)
    resumed, same_companions, same_curve = learn(world, settings, checkpoints=Checkpoints(tmp_path, "k"))
    assert same(undisturbed, resumed)
    assert undisturbed.curve == resumed.curve
    assert curve == same_curve
    assert companions is same_companions is None or torch.equal(companions.rows_RK, same_companions.rows_RK)
    with pytest.raises(RecsysError, match="another recipe, data set or device"):
        learn(world, settings, checkpoints=Checkpoints(tmp_path, "other"))


def test_patience_ends_learning_and_the_best_ranker_stays(ring):
    learning = dataclasses.replace(LEARNING, epochs=40, patience=2, learning_rate=0.5)
    state, _, curve = learn(few(ring), learning=learning)
    assert len(state.curve) < 40
    assert curve[-1]["ndcg@10"] == max(line["ndcg@10"] for line in state.curve)
    assert state.curve[state.best_epoch - 1]["ndcg@10"] == state.best


def test_where_nobody_can_be_judged_every_epoch_is_done_and_there_is_no_curve(ring):
    unjudged = dataclasses.replace(ring, train_end=ring.validation_end)
    state, _, curve = learn(unjudged, learning=dataclasses.replace(LEARNING, patience=1))
    assert curve == []
    assert [set(line) for line in state.curve] == [{"epoch", "loss"}] * LEARNING.epochs
    assert state.best_epoch == LEARNING.epochs


@pytest.mark.parametrize(
    ("model", "ranker", "says"),
    [
        ({"objective": "masked"}, {}, "model.objective"),
        ({}, {"text": True}, "model.text is none"),
    ],
    ids=["masked", "text"],
)
def test_a_model_that_cannot_have_such_a_ranker_is_refused_in_one_line(ring, model, ranker, says):
    with pytest.raises(RecipeError, match=says) as error:
        learn(ring, dataclasses.replace(SETTINGS, **ranker), model=fresh(dataclasses.replace(MODEL, **model)))
    assert "\n" not in str(error.value)


LEARNING_CHANGES = {
    "epochs": 5,
    "patience": 1,
    "requests": 5,
    "hard": 7,
    "uniform": 3,
    "learning_rate": 1e-2,
    "weight_decay": 0.5,
}
RANKER_CHANGES = {
    "blocks": 1,
    "width": 22,
    "heads": 7,
    "hidden_size": 29,
    "span": 32,
    "companions": 5,
    "ids": False,
    "text": True,
    "among": True,
    "dropout": 0.5,
    "candidates": 13,
}


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(RankingSettings)])
def test_every_option_of_learning_changes_the_ranker(ring, option):
    base, model = LEARNING, fresh(dataclasses.replace(MODEL, dropout=0.5))
    if option == "patience":
        base = dataclasses.replace(LEARNING, epochs=40, patience=3, learning_rate=0.5)
    learnings = (base, dataclasses.replace(base, **{option: LEARNING_CHANGES[option]}))
    one, other = (learn(few(ring), learning=learning, model=model)[0] for learning in learnings)
    assert not same(one, other) or one.curve != other.curve


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(RankerSettings)])
def test_every_option_of_the_ranker_changes_its_scores(ring, option):
    model = fresh(dataclasses.replace(MODEL, text="cross", length=37))
    learning, curves, world = dataclasses.replace(LEARNING, epochs=2), [], few(ring)
    ends = world.offsets[2::2] - world.offsets[:-2:2]  # two users as one, so that some histories are longer than the span
    world = Sequences(world.items, world.times, world.offsets[:-1:2].contiguous(), ends - 2, ends - 1)
    for settings in (SETTINGS, dataclasses.replace(SETTINGS, **{option: RANKER_CHANGES[option]})):
        state, _, _ = learn(world, settings, learning, model=model)
        curves.append([line["loss"] for line in state.curve])
    assert curves[0] != curves[1]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"epochs": 0}, "epochs must be at least 1, found 0"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"requests": 0}, "requests must be at least 1"),
        ({"hard": 0}, "hard must be at least 1"),
        ({"uniform": -1}, "uniform"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        RankingSettings(**wrong)


def test_events_behind_the_training_part_teach_nothing(ring):
    """But for the figures by which the best epoch is chosen."""
    later = torch.arange(len(ring.items)) >= (ring.offsets[:-1] + ring.train_end).repeat_interleave(ring.offsets.diff())
    other = dataclasses.replace(ring, items=torch.where(later, ring.items.flip(0), ring.items))
    learning = dataclasses.replace(LEARNING, epochs=1)
    one, two = (learn(sequences, learning=learning)[0] for sequences in (ring, other))
    assert same(one, two)
    assert one.curve != two.curve


def drawn(settings: RankerSettings, model: SequenceModel, sequences: Sequences) -> Ranker:
    """A ranker that has much to say."""
    companions = Companions.of(sequences, model.items, settings.companions)
    ranker = Ranker(settings, model.settings, model.items, model.content, companions)
    ranker.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return ranker


@torch.no_grad()
def test_the_curve_starts_at_the_figures_of_retrieval_and_has_a_line_for_every_depth(ring):
    model = fresh()
    known = Known(model.item_vectors(), torch.ones(RING), RING)
    curve = ranker_curve(model, drawn(SETTINGS, model, ring), known, ring, len(ring.train_end))
    assert [line["blocks"] for line in curve] == [0, 1, 2]
    wanted = validate(model, ring)
    assert {name: curve[0][name] for name in ("ndcg@10", "recall@10")} == pytest.approx(
        {name: wanted[name] for name in ("ndcg@10", "recall@10")}, abs=1e-9
    )
    assert len({line["ndcg@10"] for line in curve}) == 3
    one = ranker_curve(model, drawn(dataclasses.replace(SETTINGS, blocks=1), model, ring), known, ring, len(ring.train_end))
    assert [line["blocks"] for line in one] == [0, 1]


@pytest.mark.parametrize("candidates", [5, RING])
@torch.no_grad()
def test_the_curve_is_the_mean_gain_of_first_targets_among_candidates(ring, candidates):
    """By scoring every user alone, and counting."""
    settings, model = dataclasses.replace(SETTINGS, candidates=candidates), fresh(dataclasses.replace(MODEL, time="gaps"))
    known, ranker = Known(model.item_vectors(), torch.ones(RING).log1p(), RING), drawn(settings, model, ring)
    again = dataclasses.replace(ring, items=ring.items.clone())
    for user in range(0, 211, 7):  # a target that stood in the history is missed
        again.items[ring.offsets[user] + ring.train_end[user]] = ring.items[ring.offsets[user]]
    gains = [[], [], []]
    for user in range(211):
        start = int(ring.offsets[user])
        end = start + int(ring.train_end[user])
        rows, times = again.items[start:end].long().tolist(), again.times[start:end].tolist()
        states_1TE, view = model.read(Batch.of([rows], [times]), again.times[end, None])
        last = torch.tensor([min(len(rows), MODEL.length) - 1])
        scores_V = (model.place(states_1TE[0, last]) @ known.vectors_VE.T)[0]
        free = [row for row in range(FIRST_ITEM, FIRST_ITEM + RING) if row not in rows]
        best = sorted(free, key=lambda row: -float(scores_V[row - FIRST_ITEM]))[:candidates]
        scores_1N = scores_V[torch.tensor(best) - FIRST_ITEM][None]
        look = ranking.Look.at(states_1TE, view, torch.tensor([0]), last, settings.span)
        ranked = ranker(known, torch.tensor([best]), scores_1N, torch.arange(1, len(best) + 1)[None], look)
        for depth, scores in enumerate([scores_1N, *ranked]):
            order = [best[place] for place in scores[0].argsort(descending=True).tolist()][:10]
            target = int(again.items[end])
            gains[depth].append(1 / math.log2(order.index(target) + 2) if target in order else 0.0)
    curve = ranker_curve(model, ranker, known, again, 211)
    assert [line["ndcg@10"] for line in curve] == pytest.approx([sum(part) / 211 for part in gains], abs=1e-4)
    some = ranker_curve(model, ranker, known, again, 23)
    chosen = [number * 211 // 23 for number in range(23)]
    assert [line["ndcg@10"] for line in some] == pytest.approx(
        [sum(part[user] for user in chosen) / 23 for part in gains], abs=1e-4
    )


def test_the_lesson_is_that_of_learnt_items_alone(ring):
    """Events of items beyond those that the model learnt stand in no history, no target and no candidate."""
    ends = ring.offsets.diff()
    unjudged = dataclasses.replace(ring, train_end=ends, validation_end=ends)
    warm = ring.items.clamp(max=FIRST_ITEM + RING - 3)
    at = torch.arange(len(warm)) % 5 == 2
    states = []
    for row in (FIRST_ITEM + RING - 1, FIRST_ITEM + RING - 2):
        sequences = dataclasses.replace(unjudged, items=torch.where(at, row, warm))
        states.append(learn(sequences, model=fresh(items=RING - 2))[0])
    assert same(*states)


def test_requests_are_ranked_as_well_in_parts(ring, monkeypatch):
    """How many requests stand in memory at once changes a gradient by rounding alone."""
    settings, learning = (
        dataclasses.replace(SETTINGS, dropout=0.0),
        RankingSettings(epochs=1, requests=MODEL.length, hard=RING, uniform=0),
    )
    losses = []
    for at_once in (256, 17):
        monkeypatch.setattr(ranking, "REQUESTS", at_once)
        losses.append([line["loss"] for line in learn(ring, settings, learning)[0].curve])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_every_option_has_its_change():
    named = itertools.chain(dataclasses.fields(RankingSettings), dataclasses.fields(RankerSettings))
    assert {field.name for field in named} == {*LEARNING_CHANGES, *RANKER_CHANGES}
