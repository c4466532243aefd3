"""The ranker against its equations, who may change whose score, companions by counting, and what a wrong bundle says."""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict

import pytest
import torch
from safetensors.torch import save_file

from recsys.attention import TIME_BUCKETS, time_bucket
from recsys.batch import FIRST_ITEM, PADDING, UNKNOWN, Batch, Sequences
from recsys.bundle import Directory
from recsys.content import Content, ContentEncoder, Described
from recsys.errors import BundleError
from recsys.fusion import ItemContent
from recsys.model import ModelSettings, SequenceModel
from recsys.ranker import COMPANIONS, RANKER, Companions, Known, Look, Ranker, RankerSettings, ranker_from
from recsys.text import TextSettings

ITEMS, LEARNT, USERS, CANDIDATES, SPAN, KEPT = 41, 37, 53, 11, 16, 5
"""Items that have a vector, of these learnt, users, candidates of a request, events looked at, and companions kept."""
WITHOUT = 13
"""An item without text."""
MODEL = ModelSettings(embedding_size=12, blocks=1, heads=3, hidden_size=17, length=23, time="gaps")
SETTINGS = RankerSettings(blocks=2, width=14, heads=2, hidden_size=19, span=SPAN, companions=KEPT, ids=True, dropout=0.25)
KINDS = {
    "all": SETTINGS,
    "look alone": dataclasses.replace(SETTINGS, companions=0, ids=False, blocks=1),
    "text": dataclasses.replace(SETTINGS, text=True),
    "among": dataclasses.replace(SETTINGS, among=True, heads=7),
}
ALONE = [name for name in KINDS if name != "among"]
LENGTHS = [7, 1, SPAN, 3, 13]
"""Events that the requests look at."""
GOODS = ("brass lamp", "green lamp of brass", "wool scarf", "woven scarf of merino wool", "iron kettle", "blue teapot", "tent")


def described() -> Content:
    """Goods of a shop, each of one to five tokens, but for one."""
    texts = ["" if item == WITHOUT else f"{GOODS[item % 7]} {item // 7}" for item in range(ITEMS)]
    goods = Described(texts, [[]] * ITEMS, [[]] * ITEMS)
    return ContentEncoder.fit(goods.take(LEARNT), TextSettings(size=11, tokens=5)).encode(goods)


def shopping(seed: int = 0) -> Sequences:
    """Users who have items again and again, and in the parts behind training others; some have no training event."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 17, (USERS,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    items = FIRST_ITEM + (LEARNT * torch.rand(int(offsets[-1]), generator=generator).square()).int()
    return Sequences(items, torch.arange(len(items)) * 60, offsets, (lengths - 3).clamp(min=0), (lengths - 1).clamp(min=0))


def build(settings: RankerSettings = SETTINGS, drawn: bool = True, **model) -> Ranker:
    """A ranker all of whose weights have something to say, or a fresh one."""
    content = ItemContent(described(), 0) if settings.text else None
    companions = Companions.of(shopping(), LEARNT, settings.companions) if settings.companions else None
    ranker = Ranker(settings, dataclasses.replace(MODEL, **model), LEARNT, content, companions)
    generator = torch.Generator().manual_seed(0)
    ranker.initialise(generator)
    if drawn:
        with torch.no_grad():
            for parameter in ranker.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return ranker


def known_of(ranker: Ranker) -> Known:
    generator = torch.Generator().manual_seed(1)
    logs_V = torch.randint(0, 97, (ITEMS,), generator=generator).float().log1p()
    content = ItemContent(described(), 0) if ranker.settings.text else None
    return Known(torch.randn(ITEMS, 12, generator=generator), logs_V, LEARNT, content)


def look_of(lengths: list[int] = LENGTHS, seed: int = 2) -> Look:
    """Events of all kinds: repeated, unknown, and of items beyond the table; behind the first event states are 0."""
    generator = torch.Generator().manual_seed(seed)
    some_BS = torch.arange(SPAN) < torch.tensor(lengths)[:, None]
    rows_BS = FIRST_ITEM + torch.randint(0, ITEMS + 3, some_BS.shape, generator=generator)
    rows_BS[:, 2] = rows_BS[:, 0]
    rows_BS[-1, 4] = UNKNOWN
    states_BSE = torch.randn(*some_BS.shape, 12, generator=generator)
    ages_BS = torch.randint(0, TIME_BUCKETS, some_BS.shape, generator=generator)
    return Look(states_BSE * some_BS[..., None], rows_BS * some_BS, ages_BS * some_BS)


def asked(count: int = CANDIDATES, lines: int = len(LENGTHS)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, scores and ranks of candidates of each request, no item twice, the best one anywhere."""
    generator = torch.Generator().manual_seed(3)
    rows_BN = FIRST_ITEM + torch.rand(lines, ITEMS, generator=generator).argsort(1)[:, :count]
    scores_BN = torch.randn(lines, count, generator=generator)
    return rows_BN, scores_BN, scores_BN.argsort(1, descending=True).argsort(1) + 1


def plainly(ranker: Ranker, known: Known, row: int, score: float, rank: int, best: float, look: Look, line: int) -> list:
    """Scores of one candidate after each block, by loops, without those beside it."""
    settings, line_of = ranker.settings, lambda row: int(row) - FIRST_ITEM

    def vector(row):
        return known.vectors_VE[line_of(row)] if 0 <= line_of(row) < ITEMS else torch.zeros(12).double()

    def own(row):
        return ranker.table.weight[int(row)] if ranker.table is not None and 0 <= line_of(row) < LEARNT else 0.0

    learnt = known.logs_V[:LEARNT]
    popularity = (known.logs_V[line_of(row)] - learnt.mean()) / learnt.std(correction=0)
    evidence = torch.stack([torch.tensor(score - best), torch.tensor(float(rank)).double().log(), popularity])
    states_SE, rows, ages = look.states_BSE[line], look.rows_BS[line].tolist(), look.ages_BS[line].tolist()
    user = ranker.user_in(states_SE[0])
    x = ranker.vector_in(vector(row)) + ranker.evidence_in(evidence) + own(row)
    if settings.text:
        tokens = [token for token in known.content.tokens_RL[row].tolist() if token]
        keys = [ranker.token_in(known.content.states_WP[token]).chunk(2) for token in tokens]
        shares = torch.tensor([float(key @ user) / settings.width**0.5 for key, _ in keys]).double().softmax(0)
        x = x + sum((share * value for share, (_, value) in zip(shares, keys, strict=True)), torch.zeros(settings.width))
    size, out = settings.width // settings.heads, []
    places = [place for place in range(SPAN) if rows[place] != PADDING]
    near = dict.fromkeys(places, torch.zeros(()).double())
    for place in places if settings.companions else ():
        if rows[place] < FIRST_ITEM + LEARNT and row in (found := ranker.rows_RK[rows[place]].tolist()):
            near[place] = ranker.cosines_RK[rows[place], found.index(row)].sqrt()
    events = {
        place: ranker.event_norm(ranker.state_in(states_SE[place]) + ranker.vector_in(vector(rows[place])) + own(rows[place]))
        for place in places
    }
    for depth, block in enumerate(ranker.blocks):
        query, mixed, evident = block.query(block.query_norm(x)), [], []
        for head in range(settings.heads):
            part = slice(head * size, (head + 1) * size)
            logits, values = [], []
            for place in places:
                key, value = block.key_value(events[place]).chunk(2)
                logit = query[part] @ key[part] / size**0.5 + block.position_bias[head, place]
                logit = logit + block.time_bias[head, ages[place]] if block.time_bias is not None else logit
                logits.append(logit + block.companion_bias[head] * near[place] if settings.companions else logit)
                values.append(value[part])
            shares = torch.stack(logits).softmax(0)
            mixed.append(sum(share * value for share, value in zip(shares, values, strict=True)))
            evident.append(sum(share * near[place] for share, place in zip(shares, places, strict=True)))
        x = x + block.attention_out(torch.cat(mixed))
        x = x + (block.companion_value(torch.stack(evident)) if settings.companions else 0.0)
        a, b = block.forward_in(block.forward_norm(x)).chunk(2)
        x = x + block.forward_out(torch.nn.functional.silu(a) * b)
        y = ranker.norm(x)
        score_after = ranker.retrieval_weight[depth] * score + y @ ranker.score_weight + ranker.user_out(y) @ user
        if settings.companions:
            score_after = score_after + sum(near[place] * ranker.companion_weight[place] for place in places)
        out.append(float(score_after))
    return out


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("time", ["gaps", "none"])
@torch.no_grad()
def test_scores_are_their_equations(kind, time):
    ranker = build(KINDS[kind], time=time).double()
    known, look = known_of(ranker), look_of()
    known = dataclasses.replace(known, vectors_VE=known.vectors_VE.double(), logs_V=known.logs_V.double())
    look = dataclasses.replace(look, states_BSE=look.states_BSE.double())
    if known.content is not None:
        known.content.states_WP = known.content.states_WP.double()
    rows_BN, scores_BN, ranks_BN = asked()
    found = ranker(known, rows_BN, scores_BN.double(), ranks_BN, look)
    assert len(found) == KINDS[kind].blocks
    for line, place in itertools.product(range(len(LENGTHS)), range(CANDIDATES)):
        score, best = float(scores_BN[line, place]), float(scores_BN[line].max())
        wanted = plainly(ranker, known, int(rows_BN[line, place]), score, int(ranks_BN[line, place]), best, look, line)
        assert [float(scores[line, place]) for scores in found] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_untrained_ranker_scores_as_retrieval_does(kind):
    ranker = build(KINDS[kind], drawn=False)
    rows_BN, scores_BN, ranks_BN = asked()
    for scores in ranker(known_of(ranker), rows_BN, scores_BN, ranks_BN, look_of()):
        assert torch.equal(scores, scores_BN)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_candidate_changes_the_scores_of_others_only_where_candidates_attend_to_each_other(kind):
    ranker, look = build(KINDS[kind]), look_of()
    known, (rows_BN, scores_BN, ranks_BN) = known_of(ranker), asked()
    before = ranker(known, rows_BN, scores_BN, ranks_BN, look)
    places_B = scores_BN.argmin(1)  # the score of the best is what others are compared with
    others_BN = torch.arange(CANDIDATES) != places_B[:, None]
    missing = [next(row for row in range(FIRST_ITEM, FIRST_ITEM + ITEMS) if row not in line) for line in rows_BN.tolist()]
    after = ranker(
        known,
        rows_BN.where(others_BN, torch.tensor(missing)[:, None]),
        scores_BN.where(others_BN, scores_BN - 1),
        ranks_BN.where(others_BN, ranks_BN + 29),
        look,
    )
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[others_BN], other[others_BN]) == (kind != "among")
        assert (one[~others_BN] != other[~others_BN]).all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_among_the_candidates_changes_no_score(kind):
    ranker, look = build(KINDS[kind]), look_of()
    known, (rows_BN, scores_BN, ranks_BN) = known_of(ranker), asked()
    alone = ranker(known, rows_BN[:, :7], scores_BN[:, :7], ranks_BN[:, :7], look)
    rows_BN[:, 7:] = PADDING
    scores_BN[:, 7:] = scores_BN[:, :7].amin(1, keepdim=True)
    padded = ranker(known, rows_BN, scores_BN, ranks_BN, look)
    other = ranker(known, rows_BN, scores_BN - 3 * (rows_BN == PADDING), ranks_BN + 29 * (rows_BN == PADDING), look)
    for one, two, three in zip(alone, padded, other, strict=True):
        assert torch.equal(two[:, :7], three[:, :7])
        torch.testing.assert_close(one, two[:, :7], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_places_behind_the_first_event_change_nothing_and_every_event_something(kind):
    ranker, look = build(KINDS[kind]), look_of()
    known, candidates = known_of(ranker), asked()
    before, none_BS = ranker(known, *candidates, look)[-1], look.rows_BS == PADDING
    noise_BSE = torch.randn(look.states_BSE.shape, generator=torch.Generator().manual_seed(7))
    after = ranker(
        known,
        *candidates,
        Look(look.states_BSE + noise_BSE * none_BS[..., None], look.rows_BS, look.ages_BS.where(~none_BS, 7)),
    )[-1]
    assert torch.equal(before, after)
    for place in range(SPAN):
        rows_BS, ages_BS = look.rows_BS.clone(), look.ages_BS.clone()
        rows_BS[:, place] = rows_BS[:, place].where(none_BS[:, place], FIRST_ITEM + (rows_BS[:, place] + 5) % ITEMS)
        ages_BS[:, place] = (ages_BS[:, place] + 31) % TIME_BUCKETS
        others_B = torch.tensor(LENGTHS) > 1  # one event alone is drawn from whole, whenever it was
        for changed, matters_B in (
            (dataclasses.replace(look, rows_BS=rows_BS), ~none_BS[:, place]),
            (dataclasses.replace(look, ages_BS=ages_BS), ~none_BS[:, place] & others_B),
        ):
            differs_B = (ranker(known, *candidates, changed)[-1] != before).any(1)
            assert differs_B.tolist() == matters_B.tolist()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attention_sums_to_1_over_the_events_and_to_0_where_there_is_none(kind):
    ranker = build(KINDS[kind])
    look, kept = look_of([*LENGTHS[:-1], 0]), []
    scores = ranker(known_of(ranker), *asked(), look, kept=kept)
    assert all(torch.isfinite(found).all() for found in scores)
    for weights_BHNS in kept:
        assert weights_BHNS.shape == (len(LENGTHS), ranker.settings.heads, CANDIDATES, SPAN)
        assert not weights_BHNS.masked_select(look.rows_BS[:, None, None] == PADDING).any()
        torch.testing.assert_close(weights_BHNS.sum(-1)[:-1], torch.ones(4, ranker.settings.heads, CANDIDATES))
    assert len(kept) == ranker.settings.blocks


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_empty_history_gives_finite_scores_that_are_those_of_no_event(kind):
    ranker, states_BE = build(KINDS[kind]), torch.zeros(len(LENGTHS), 12)
    known, candidates, empty = known_of(ranker), asked(), Look.empty(states_BE, SPAN)
    assert empty.rows_BS.shape == (len(LENGTHS), SPAN)
    assert empty.states_BSE.shape == (len(LENGTHS), SPAN, 12)
    scores = ranker(known, *candidates, empty)[-1]
    assert torch.isfinite(scores).all()
    assert torch.equal(scores, ranker(known, *candidates, look_of([0] * len(LENGTHS)))[-1])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_candidates_in_another_order_have_the_same_scores_in_that_order(kind):
    ranker, look = build(KINDS[kind]), look_of()
    known, candidates = known_of(ranker), asked()
    order_BN = torch.rand(len(LENGTHS), CANDIDATES, generator=torch.Generator().manual_seed(5)).argsort(1)
    before = ranker(known, *candidates, look)
    after = ranker(known, *(values.gather(1, order_BN) for values in candidates), look)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one.gather(1, order_BN), other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_request_has_the_same_scores_beside_any_others():
    ranker, look = build(), look_of()
    known, candidates = known_of(ranker), asked()
    whole = ranker(known, *candidates, look)[-1]
    chosen = torch.tensor([3, 0])
    part = ranker(known, *(values[chosen] for values in candidates), look.take(chosen))[-1]
    torch.testing.assert_close(part, whole[chosen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_so_many_blocks_are_gone_through_as_are_asked_for(depth):
    ranker = build()
    known, candidates, kept = known_of(ranker), asked(), []
    whole = ranker(known, *candidates, look_of())
    some = ranker(known, *candidates, look_of(), depth=depth, kept=kept)
    assert len(some) == len(kept) == depth
    assert all(torch.equal(one, other) for one, other in zip(some, whole[:depth], strict=True))


@torch.no_grad()
def test_dropout_acts_where_a_generator_is_given_and_repeats_with_it():
    ranker, look = build(), look_of()
    known, candidates = known_of(ranker), asked()

    def scores(seed: int | None) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return ranker(known, *candidates, look, generator=generator)[-1]

    assert torch.equal(scores(0), scores(0))
    assert not torch.equal(scores(0), scores(1))
    assert not torch.equal(scores(0), scores(None))
    assert torch.equal(scores(None), scores(None))


@pytest.mark.parametrize("kind", KINDS)
def test_after_one_step_from_a_fresh_ranker_every_weight_is_learnt(kind):
    ranker, look = build(KINDS[kind], drawn=False), look_of()
    known, candidates = known_of(ranker), asked(31)
    optimizer = torch.optim.SGD(ranker.parameters(), 0.01)
    for fresh in (True, False):
        optimizer.zero_grad()
        sum(scores.square().mean() for scores in ranker(known, *candidates, look)).backward()
        learnt = {name for name, weight in ranker.named_parameters() if weight.grad is not None and weight.grad.any()}
        first = {"score_weight", "user_out.weight", "retrieval_weight", "companion_weight"}
        every = {name for name, _ in ranker.named_parameters()}
        assert learnt == (every & first if fresh else every)
        optimizer.step()


def near_plainly(companions: Companions, rows_BN, events_BS, own: list[int] | None) -> torch.Tensor:
    """Root of the cosine of each candidate and event; of the user's own item, less what that user alone gives it."""
    out = torch.zeros(*rows_BN.shape, events_BS.shape[1])
    size = len(companions.users_R)
    for line, place, back in itertools.product(*map(range, out.shape)):
        row, event, cosine = int(rows_BN[line, place]), int(events_BS[line, back]), 0.0
        if FIRST_ITEM <= event < size and row in (found := companions.rows_RK[event].tolist()) and row != PADDING:
            cosine = float(companions.cosines_RK[event, found.index(row)])
        if own is not None and place == own[line] and cosine:
            cosine -= 1 / math.sqrt(float(companions.users_R[row] * companions.users_R[event]))
        out[line, place, back] = math.sqrt(max(0.0, cosine))
    return out


@pytest.mark.parametrize("own", [None, [4, 0, 10, 7, 2]], ids=["serving", "training"])
def test_nearness_is_the_root_of_the_cosine_less_what_the_user_alone_gives(own):
    ranker, look = build(), look_of()
    companions = Companions(ranker.rows_RK, ranker.cosines_RK, ranker.users_R)
    rows_BN, _, _ = asked(31)
    rows_BN[1, 5], rows_BN[3, 9] = PADDING, FIRST_ITEM + ITEMS + 100
    for line, place in enumerate(own or ()):  # a companion of the last event, as a target often is
        rows_BN[line, place] = next(row for row in companions.rows_RK[look.rows_BS[line, 0] % 30].tolist() if row)
    found_BNS = ranker.near(rows_BN, look.rows_BS, None if own is None else torch.tensor(own))
    wanted_BNS = near_plainly(companions, rows_BN, look.rows_BS, own)
    torch.testing.assert_close(found_BNS, wanted_BNS, rtol=1e-4, atol=1e-4)
    assert (wanted_BNS > 0).float().mean() > 0.02
    if own is not None:
        assert not torch.allclose(found_BNS, ranker.near(rows_BN, look.rows_BS), atol=1e-3)


def test_what_a_user_alone_gives_two_items_is_nothing():
    """Two users have one item each with a third; in the lesson of either of them, it is not their companion."""
    batch = Batch.of([[2, 3], [2, 4]])
    sequences = Sequences(batch.values.int(), batch.times, batch.offsets, batch.lengths, batch.lengths)
    ranker = Ranker(SETTINGS, MODEL, 3, None, Companions.of(sequences, 3, KEPT))
    rows_1N, events_1S = torch.tensor([[3, 4]]), torch.tensor([[2]])
    root = 0.5**0.25
    assert ranker.near(rows_1N, events_1S).flatten().tolist() == pytest.approx([root, root])
    assert ranker.near(rows_1N, events_1S, torch.tensor([0])).flatten().tolist() == pytest.approx([0.0, root], abs=1e-3)


def test_a_candidate_named_twice_is_as_near_both_times():
    """As where one was drawn twice at random in training."""
    ranker, look = build(), look_of()
    rows_BN, _, _ = asked(31)
    twice_BN = torch.cat([rows_BN, rows_BN.flip(1)], 1)
    near_BNS = ranker.near(twice_BN, look.rows_BS)
    assert torch.equal(near_BNS[:, :31], ranker.near(rows_BN, look.rows_BS))
    assert torch.equal(near_BNS[:, :31], near_BNS[:, 31:].flip(1))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("count", [1, KEPT, 101])
@pytest.mark.parametrize("at_once", [3, 1024])
def test_companions_are_the_items_of_the_largest_cosines_of_the_training_part(seed, count, at_once, monkeypatch):
    monkeypatch.setattr("recsys.ranker.CHUNK", at_once)
    sequences, users = shopping(seed), defaultdict(set)
    for user, (start, count_) in enumerate(zip(sequences.offsets.tolist(), sequences.train_end.tolist(), strict=False)):
        for row in sequences.items[start : start + count_].tolist():
            users[row].add(user)
    companions = Companions.of(sequences, LEARNT, count)
    assert companions.rows_RK.shape == companions.cosines_RK.shape == (FIRST_ITEM + LEARNT, min(count, LEARNT))
    assert companions.rows_RK.dtype == torch.int32
    assert companions.users_R.tolist() == [len(users[row]) for row in range(FIRST_ITEM + LEARNT)]
    assert max(Counter(sequences.items.tolist()).values()) > companions.users_R.max()
    short = 0
    for row in range(FIRST_ITEM + LEARNT):
        cosines = {
            other: len(users[row] & users[other]) / math.sqrt(len(users[row]) * len(users[other]))
            for other in range(FIRST_ITEM, FIRST_ITEM + LEARNT)
            if other != row and users[row] & users[other]
        }
        rows, found = companions.rows_RK[row].tolist(), companions.cosines_RK[row].tolist()
        assert rows == sorted(rows)
        named = [other for other in rows if other != PADDING]
        assert len(set(named)) == len(named) == min(len(cosines), count)
        for other, cosine in zip(rows, found, strict=True):
            assert cosine == pytest.approx(cosines.get(other, 0.0), abs=1e-6)
        assert sorted((cosines[other] for other in named), reverse=True) == pytest.approx(
            sorted(cosines.values(), reverse=True)[:count]
        )
        short += len(named) < count
    assert short or count < LEARNT


def test_companions_come_back_from_their_file(tmp_path):
    companions = Companions.of(shopping(), LEARNT, KEPT)
    companions.save(tmp_path / COMPANIONS)
    again = Companions.load(tmp_path / COMPANIONS)
    for field in dataclasses.fields(Companions):
        assert torch.equal(getattr(companions, field.name), getattr(again, field.name))


@torch.no_grad()
def test_the_tokens_of_an_item_change_its_score_alone_and_one_without_draws_nothing():
    ranker, look = build(KINDS["text"]), look_of()
    known, (rows_BN, scores_BN, ranks_BN) = known_of(ranker), asked(ITEMS)
    known.content.states_WP[0] = 3  # as where token states are learnt
    before = ranker(known, rows_BN, scores_BN, ranks_BN, look)[-1]
    assert torch.isfinite(before).all()
    other = FIRST_ITEM + 17
    known.content.tokens_RL[other, 0] = known.content.tokens_RL[FIRST_ITEM + 18, 0]
    changed = ranker(known, rows_BN, scores_BN, ranks_BN, look)[-1] != before
    assert torch.equal(changed, rows_BN == other)
    user_BW = ranker.user_in(look.states_BSE)[:, 0]
    without = torch.tensor([[FIRST_ITEM + WITHOUT, FIRST_ITEM + ITEMS + 3, UNKNOWN, PADDING]]).expand(len(LENGTHS), 4)
    assert not known.content.tokens_RL[FIRST_ITEM + WITHOUT].any()
    assert not ranker._text(user_BW, without, known.content).any()
    assert ranker._text(user_BW, rows_BN, known.content)[rows_BN != FIRST_ITEM + WITHOUT].any(-1).all()


def test_a_look_holds_the_last_events_up_to_each_request_and_how_long_ago_they_were():
    model = SequenceModel(dataclasses.replace(MODEL, request_time=True), LEARNT).initialise(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    lengths = [19, 3, 23]
    histories = [torch.randint(FIRST_ITEM, FIRST_ITEM + LEARNT, (n,), generator=generator).tolist() for n in lengths]
    times = [torch.randint(0, 10**6, (n,), generator=generator).sort().values.tolist() for n in lengths]
    batch = Batch.of(histories, times)
    asked = batch.times + torch.randint(0, 10**4, batch.times.shape, generator=generator)
    states_BTE, view = model.read_all(batch, asked)
    requests = [(0, 18), (0, 4), (1, 0), (1, 2), (2, 22), (2, 15)]
    look = Look.at(states_BTE, view, *(torch.tensor(part) for part in zip(*requests, strict=True)), SPAN)
    for line, (owner, end) in enumerate(requests):
        now = int(asked[batch.offsets[owner] + end])
        for back in range(SPAN):
            if back > end:
                assert look.rows_BS[line, back] == PADDING
                continue
            assert look.rows_BS[line, back] == histories[owner][end - back]
            assert torch.equal(look.states_BSE[line, back], states_BTE[owner, end - back])
            assert look.ages_BS[line, back] == time_bucket(torch.tensor(now - times[owner][end - back]))
    assert look.ages_BS.unique().numel() > 7


def test_looks_are_taken_and_put_by_line():
    look = look_of()
    taken = look.take(torch.tensor([4, 1]))
    other = Look.empty(torch.zeros(len(LENGTHS), 12), SPAN)
    other.put(torch.tensor([4, 1]), taken)
    for field in dataclasses.fields(Look):
        mine, theirs = getattr(look, field.name), getattr(other, field.name)
        assert torch.equal(mine[[1, 4]], theirs[[1, 4]])
        assert not theirs[[0, 2, 3]].any()


def test_what_is_known_of_items_is_known_by_row():
    ranker = build()
    known = known_of(ranker)
    rows = torch.tensor([[FIRST_ITEM, FIRST_ITEM + ITEMS - 1], [PADDING, FIRST_ITEM + ITEMS]])
    assert torch.equal(known.vectors(rows)[0], known.vectors_VE[[0, -1]])
    assert not known.vectors(rows)[1].any()
    assert torch.equal(known.logs(rows)[0], known.logs_V[[0, -1]])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"blocks": -1}, "blocks must not be negative, found -1"),
        ({"companions": -1}, "companions must not be negative"),
        ({"width": 0}, "width must be at least 1"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"span": 0}, "span must be at least 1"),
        ({"span": 17}, "span must be a multiple of 16, found 17"),
        ({"width": 64, "heads": 3}, "heads must divide width, found 3 and 64"),
        ({"dropout": 1.0}, "dropout must be from 0 to .99, found 1.0"),
        ({"dropout": math.nan}, "dropout must be from 0 to .99, found nan"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_with_what_was_found(wrong, says):
    with pytest.raises(ValueError) as error:
        RankerSettings(**wrong)
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def write(folder, ranker: Ranker, settings: RankerSettings) -> Directory:
    save_file({name: weight.contiguous() for name, weight in ranker.state_dict().items()}, folder / RANKER)
    Companions(ranker.rows_RK, ranker.cosines_RK, ranker.users_R).save(folder / COMPANIONS)
    files = dict.fromkeys((RANKER, COMPANIONS))
    return Directory(folder, {"recipe": {"ranker": settings.as_dict()}, "items": LEARNT, "files": files})


@torch.no_grad()
def test_a_ranker_comes_back_from_its_files(tmp_path):
    model, ranker, look = SequenceModel(MODEL, LEARNT), build(), look_of()
    directory = write(tmp_path, ranker, SETTINGS)
    again = ranker_from(directory, model)
    known, candidates = known_of(ranker), asked()
    assert torch.equal(again(known, *candidates, look)[-1], ranker(known, *candidates, look)[-1])
    assert {name for name, _ in ranker.named_buffers()} == {field.name for field in dataclasses.fields(Companions)}
    assert not set(ranker.state_dict()) & {name for name, _ in ranker.named_buffers()}
    directory.manifest["files"].pop(RANKER)
    assert ranker_from(directory, model) is None


@pytest.mark.parametrize(
    "other",
    [{"width": 16}, {"blocks": 1}, {"blocks": 3}, {"companions": 0}, {"ids": False}, {"among": True}, {"span": 32}],
    ids=str,
)
def test_weights_of_other_settings_are_one_line(tmp_path, other):
    directory = write(tmp_path, build(), dataclasses.replace(SETTINGS, **other))
    with pytest.raises(BundleError, match="not the weights of its settings") as error:
        ranker_from(directory, SequenceModel(MODEL, LEARNT))
    assert "\n" not in str(error.value)
    assert RANKER in str(error.value)


def test_text_is_refused_where_the_model_has_none():
    with pytest.raises(ValueError, match=r"ranker\.text is set, and model\.text is none"):
        Ranker(KINDS["text"], MODEL, LEARNT)
