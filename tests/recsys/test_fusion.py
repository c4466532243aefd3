"""Fused item vectors and attention to text, each against its equations, and what a model with text keeps of one without."""

import dataclasses
import itertools

import pytest
import torch
from torch.nn.functional import normalize

from recsys.attention import View
from recsys.batch import FIRST_ITEM, UNKNOWN, Batch
from recsys.content import Content, ContentEncoder, Described
from recsys.fusion import ItemContent, TextAttention
from recsys.model import ModelSettings, SequenceModel
from recsys.text import TextSettings

ITEMS, LEARNT, TOKENS, STATES, VOCABULARY = 41, 37, 5, 53, 19
"""Items that are described, of these learnt, tokens of an item, token states, and such that are learnt where none are given."""
WITHOUT = 11
"""An item of which nothing is known."""
SETTINGS = ModelSettings(embedding_size=12, blocks=2, heads=3, hidden_size=17, length=23, dropout=0.25, text="both")
TEXTS = ("pooled", "cross", "both")
SPANS = (1, 2, 3, 29)


def content(learnt_states: bool = False, states: int = STATES) -> Content:
    """Each item has 1 to TOKENS tokens, up to 2 categories and 3 numbers, but for WITHOUT."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY + 1 if learnt_states else states, (ITEMS, TOKENS), generator=generator)
    tokens *= torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (ITEMS, 1), generator=generator)
    given = torch.randn(states, 7, generator=generator).half()
    given[0] = 0
    tables = {
        "tokens_VL": tokens.int(),
        "pooled_VP": normalize(torch.randn(ITEMS, 7, generator=generator), dim=1),
        "categories_VC": torch.randint(0, 7, (ITEMS, 2), generator=generator).int(),
        "numbers_VM": torch.randn(ITEMS, 3, generator=generator),
    }
    for table in tables.values():
        table[WITHOUT] = 0
    if learnt_states:
        given, tables["pooled_VP"] = given[:0], tables["pooled_VP"][:, :0]
    nothing = Described([""] * ITEMS, [[]] * ITEMS, [[]] * ITEMS)
    blank = ContentEncoder.fit(nothing, TextSettings(encoder="tokens")).encode(nothing)
    return dataclasses.replace(blank, states_WP=given, categories=torch.tensor(7), **tables)


def build(settings: ModelSettings = SETTINGS, known: Content | None = None, seed: int = 0) -> SequenceModel:
    """A model with matrices as after training, so that items differ, and open gates."""
    model = SequenceModel(settings, LEARNT, content() if known is None else known, VOCABULARY)
    model.initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name != "content.states_WP":
                parameter *= 10
        if model.text_attention is not None:
            model.text_attention.gate.fill_(1)
    return model


def random_batch(lengths: list[int], items: int = ITEMS, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch.of([torch.randint(FIRST_ITEM, FIRST_ITEM + items, (n,), generator=generator).tolist() for n in lengths])


def other_text(known: Content, item: int, seed: int = 1) -> Content:
    """The same content with other tokens and another pooled vector of one item."""
    generator = torch.Generator().manual_seed(seed)
    tokens, pooled = known.tokens_VL.clone(), known.pooled_VP.clone()
    tokens[item] = torch.randint(1, VOCABULARY, (TOKENS,), generator=generator)
    pooled[item] = normalize(torch.randn(pooled.shape[1:], generator=generator), dim=0)
    return dataclasses.replace(known, tokens_VL=tokens, pooled_VP=pooled)


def attention(span: int, known: Content) -> tuple[TextAttention, ItemContent]:
    settings = dataclasses.replace(SETTINGS, text_span=span, dropout=0.0)
    held = ItemContent(known, VOCABULARY).double()
    made = TextAttention(settings, held).double()
    for place, parameter in enumerate((*made.parameters(), *held.parameters())):
        torch.nn.init.normal_(parameter, 0, 0.5, generator=torch.Generator().manual_seed(place))
    return made, held


def view_of(batch: Batch, positions: int) -> View:
    rows_BT = batch.padded(positions)
    return View(batch.lengths, rows_BT, torch.arange(positions), torch.zeros_like(rows_BT), torch.zeros_like(rows_BT))


def plainly(made: TextAttention, held: ItemContent, x_E: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, dict]:
    """The state of the last of the rows with what it draws from their tokens, by loops; and the weights of each head."""
    query_E = made.query(made.query_norm(x_E))
    weights, drawn = {}, []
    for head in range(3):
        own = slice(4 * head, 4 * head + 4)
        logits, values = {}, {}
        for back, row in enumerate(reversed(rows[-made.span :])):
            if row >= FIRST_ITEM + ITEMS:
                continue
            for place, token in enumerate(held.tokens_RL[row].tolist()):
                if token:
                    key_E, value_E = made.key_value(held.states_WP[token]).chunk(2)
                    logits[back, place] = query_E[own] @ key_E[own] / 2 + made.distance_bias[head, back]
                    values[back, place] = value_E[own]
        share = torch.stack(list(logits.values())).softmax(0) if logits else []
        weights[head] = dict(zip(logits, share, strict=True))
        drawn.append(sum((weights[head][at] * values[at] for at in values), torch.zeros(4).double()))
    return x_E + made.attention_out(torch.cat(drawn)) * made.gate, weights


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("learnt_states", "states"), [(False, STATES), (False, 4001), (True, STATES)])
def test_attention_to_text_is_its_equations(span, learnt_states, states):
    made, held = attention(span, content(learnt_states, states))
    batch = random_batch([3, 17, 1, 7], ITEMS + 3)
    batch.values[[1, 8]] = torch.tensor([UNKNOWN, FIRST_ITEM + WITHOUT])
    x_BTE = torch.randn(4, 19, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = made(x_BTE, view_of(batch, 19), held)
    assert found.shape == x_BTE.shape
    for line, (start, end) in enumerate(itertools.pairwise(batch.offsets.tolist())):
        rows = batch.values[start:end].tolist()
        for place in range(len(rows)):
            wanted, _ = plainly(made, held, x_BTE[line, place], rows[: place + 1])
            assert torch.allclose(found[line, place], wanted, atol=1e-6), (line, place)


@pytest.mark.parametrize("span", SPANS)
def test_packed_histories_attend_to_their_own_text(span):
    made, held = attention(span, content())
    batch = random_batch([3, 17, 1, 7])
    rows_1T, at_T = Batch.of([batch.values.tolist()]).padded(31), torch.zeros(31, dtype=torch.int64)
    at_T[:28] = torch.arange(28) - batch.offsets[:-1][batch.owners]
    packed = View(torch.tensor([28]), rows_1T, at_T, rows_1T, rows_1T)
    x_BTE = torch.randn(4, 17, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_1TE = torch.zeros(1, 31, 12).double()
    x_1TE[0, :28] = x_BTE[batch.mask(17)]
    padded = made(x_BTE, view_of(batch, 17), held)
    assert torch.allclose(made(x_1TE, packed, held)[0, :28], padded[batch.mask(17)], atol=1e-9)


@pytest.mark.parametrize("span", SPANS)
def test_gradients_of_attention_to_text_are_those_of_its_equations(span):
    made, held = attention(span, content(learnt_states=True))
    rows, weights = [*range(5, 9), FIRST_ITEM + WITHOUT, 3], [*made.parameters(), held.states_WP]
    x_TE = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = made(x_TE[None], view_of(Batch.of([rows]), 6), held).square().sum()
    parts = torch.stack([plainly(made, held, x_TE[place], rows[: place + 1])[0] for place in range(6)]).square().sum()
    for name, ours, theirs in zip(
        dict(made.named_parameters()) | {"states": None},
        torch.autograd.grad(whole, weights),
        torch.autograd.grad(parts, weights),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-6), name
        assert theirs.any(), name


@pytest.mark.parametrize("span", (1, 2, 3))
def test_text_within_the_span_changes_a_state_and_text_beyond_does_not(span):
    known, rows = content(), list(range(5, 12))
    x_1TE = torch.randn(1, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def states(known: Content) -> torch.Tensor:
        made, held = attention(span, known)
        return made(x_1TE, view_of(Batch.of([rows]), 7), held)[0]

    before = states(known)
    for place, row in enumerate(rows):
        changed = (states(other_text(known, row - FIRST_ITEM)) - before).abs().amax(1) > 1e-3
        assert changed.tolist() == [place <= state < place + span for state in range(7)]


@pytest.mark.parametrize("span", SPANS)
def test_items_without_tokens_change_no_state(span):
    made, held = attention(span, content())
    x_1TE = torch.randn(1, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = [
        made(x_1TE, view_of(Batch.of([[4, nothing, 9, nothing, nothing]]), 5), held)
        for nothing in (UNKNOWN, FIRST_ITEM + WITHOUT, FIRST_ITEM + ITEMS, FIRST_ITEM + ITEMS + 100)
    ]
    assert all(torch.equal(states[0], other) for other in states[1:])
    with torch.no_grad():
        made.attention_out.bias.zero_()
    alone = made(x_1TE, view_of(Batch.of([[UNKNOWN] * 5]), 5), held)
    assert torch.equal(alone, x_1TE)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("learnt_states", [False, True])
def test_neither_a_later_event_nor_the_text_of_a_later_item_changes_an_earlier_state(text, span, learnt_states):
    settings = dataclasses.replace(SETTINGS, text=text, text_span=span)
    known = content(learnt_states)
    model, batch = build(settings, known), Batch.of([list(range(5, 24))])
    before = model(batch)[-1][0]
    values = batch.values.clone()
    values[13] = FIRST_ITEM + 30
    after = model(dataclasses.replace(batch, values=values))[-1][0]
    assert torch.allclose(before[:13], after[:13], atol=1e-6)
    assert not torch.allclose(before[13], after[13], atol=1e-3)
    item = int(batch.values[13]) - FIRST_ITEM
    again = build(settings, other_text(known, item))(batch)[-1][0]
    assert torch.allclose(before[:13], again[:13], atol=1e-6)
    assert not torch.allclose(before[13], again[13], atol=1e-3)


@pytest.mark.parametrize("block", ["sasrec", "ligr", "hstu"])
def test_a_fresh_model_with_attention_to_text_has_the_states_of_the_one_without(block):
    plain = SequenceModel(dataclasses.replace(SETTINGS, text="none", block=block), LEARNT)
    plain.initialise(torch.Generator().manual_seed(0))
    model = SequenceModel(dataclasses.replace(SETTINGS, text="cross", block=block), LEARNT, content())
    model.initialise(torch.Generator().manual_seed(1))
    assert set(model.load_state_dict(plain.state_dict(), strict=False).missing_keys) == {
        f"text_attention.{name}" for name in model.text_attention.state_dict()
    }
    batch = random_batch([3, 19, 1, 7], LEARNT)
    assert torch.equal(model(batch)[-1], plain(batch)[-1])
    assert torch.equal(model.item_vectors(), plain.item_vectors())
    with torch.no_grad():
        model.text_attention.gate.fill_(1)
        model.text_attention.attention_out.weight *= 50
    assert not torch.allclose(model(batch)[-1], plain(batch)[-1], atol=1e-3)


def test_the_gate_and_through_it_all_weights_are_learnt():
    model, batch = build(), random_batch([3, 19])
    with torch.no_grad():
        model.text_attention.gate.zero_()
    for opened in (False, True):
        model.zero_grad()
        (model(batch)[-1] @ model.item_vectors().T).square().mean().backward()
        learnt = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
        named = dict(model.named_parameters())
        assert learnt == set(named) - (set() if opened else {name for name in named if name.startswith("text_")}) | {
            "text_attention.gate"
        }
        with torch.no_grad():
            model.text_attention.gate.fill_(0.1)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("span", SPANS)
def test_neighbours_padding_and_order_change_no_state(text, objective, span):
    model = build(dataclasses.replace(SETTINGS, text=text, objective=objective, text_span=span))
    together = random_batch([3, 19, 1, 0, 7])
    states = model.encode(together)
    wide_BTE, view = model.read(together, positions=32)
    assert torch.allclose(model.place(wide_BTE[view.last]), states, atol=1e-5)
    assert torch.equal(states[3], torch.zeros(12))
    for line, (start, end) in enumerate(itertools.pairwise(together.offsets.tolist())):
        alone = Batch.of([together.values[start:end].tolist()])
        assert torch.allclose(model.encode(alone)[0], states[line], atol=1e-5)
        wide_1TE, view = model.read(alone, positions=32)
        assert torch.allclose(model.place(wide_1TE[view.last])[0], states[line], atol=1e-5)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_history_leaves_at_the_first_block_that_changes_little(text, objective):
    model = build(dataclasses.replace(SETTINGS, blocks=4, objective=objective, early_exit=True, text=text))
    batch = random_batch([5, 11, 0, 3, 2, 19])
    read, _ = model.asked(batch, None)
    last = torch.arange(len(batch)), (read.lengths - 1).clamp(min=0)
    exits = [states[last] for states in model(read)]
    alike = torch.stack([torch.cosine_similarity(a, b) for a, b in itertools.pairwise(exits[:-1])])
    leave = (alike.sort(1).values[:, -2] - 1e-4).tolist()
    depths = set()
    for line, state_E in enumerate(model.encode(batch, leave=leave)):
        depth = next((depth for depth in range(3) if alike[depth, line] >= leave[depth]), 3)
        depths.add(depth)
        wanted = exits[depth + 1][line] if batch.lengths[line] else torch.zeros(12)
        assert torch.allclose(state_E, wanted, atol=1e-5)
    assert len(depths) > 1
    assert torch.allclose(model.encode(batch, leave=[2.0] * 3), model.encode(batch), atol=1e-5)


@pytest.mark.parametrize("text", TEXTS)
def test_a_masked_state_reads_the_text_of_both_sides_or_of_those_before(text):
    settings = dataclasses.replace(SETTINGS, text=text, objective="masked", blocks=1, text_span=4)
    known, rows = content(), list(range(5, 24))
    rows[7] = UNKNOWN

    def state(known: Content) -> torch.Tensor:
        return build(settings, known)(Batch.of([rows]))[-1][0, 7]

    before = state(known)
    for place, read in {2: text != "cross", 5: True, 9: text != "cross"}.items():
        after = state(other_text(known, rows[place] - FIRST_ITEM))
        assert torch.allclose(before, after, atol=1e-6) != read


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_weights_of_text_sum_to_1_and_are_the_equations(span, objective):
    model = build(dataclasses.replace(SETTINGS, text_span=span, objective=objective)).double()
    nothing = [FIRST_ITEM + WITHOUT, UNKNOWN, FIRST_ITEM + ITEMS]
    batch = Batch.of([[5, 9, 14], random_batch([19]).values.tolist(), [], [30], nothing])
    found = model.attention_to_text(batch)
    assert found.shape == (5, 3, span, TOKENS)
    read, _ = model.asked(batch, None)
    x_BTE, view = model._embed(read, None, None, None)
    x_BTE = model.blocks[0](x_BTE, view, None)
    with_text = model.text_attention(x_BTE, view, model.content)
    for line, (start, end) in enumerate(itertools.pairwise(read.offsets.tolist())):
        rows = read.values[start:end].tolist()
        if not rows:
            assert not found[line].any()
            continue
        state_E, weights = plainly(model.text_attention, model.content, x_BTE[line, len(rows) - 1], rows)
        assert torch.allclose(with_text[line, len(rows) - 1], state_E, atol=1e-6)
        wanted = torch.zeros(3, span, TOKENS).double()
        for head, shares in weights.items():
            for (back, token), share in shares.items():
                wanted[head, span - 1 - back, token] = share
        assert torch.allclose(found[line], wanted, atol=1e-6)
        described = any(model.content.tokens_RL[row].any() for row in rows[-span:] if row < FIRST_ITEM + ITEMS)
        assert torch.allclose(found[line].sum((1, 2)), torch.full((3,), float(described)).double(), atol=1e-6)


@pytest.mark.parametrize("text", ["none", "pooled"])
def test_a_model_that_attends_to_no_text_has_no_weights_of_it(text):
    assert build(dataclasses.replace(SETTINGS, text=text)).attention_to_text(random_batch([3])) is None


@pytest.mark.parametrize("learnt_states", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_an_item_vector_is_its_id_text_categories_and_numbers_added_up(learnt_states, ids):
    known = content(learnt_states)
    model = build(dataclasses.replace(SETTINGS, ids=ids), known)
    found = model.item_vectors()
    assert len(found) == model.lines == ITEMS
    for item in range(ITEMS):
        pooled_P = known.pooled_VP[item]
        if learnt_states:
            tokens = [token for token in known.tokens_VL[item].tolist() if token]
            pooled_P = normalize(sum((model.content.states_WP[token] for token in tokens), torch.zeros(7)), dim=0)
        wanted = model.fusion.text.weight @ pooled_P + model.fusion.numbers.weight @ known.numbers_VM[item] / 3**0.5
        categories = [place for place in known.categories_VC[item].tolist() if place]
        if categories:
            wanted = wanted + sum(model.fusion.category_table[place] for place in categories) / len(categories) ** 0.5
        if ids and item < LEARNT:
            wanted = wanted + model.table.weight[FIRST_ITEM + item]
        assert torch.allclose(found[item], wanted, atol=1e-5), item
    assert torch.equal(model.item_vectors(torch.tensor([13, 40])), found[[13, 40]])
    assert torch.equal(model.vectors(torch.tensor([[7, 3], [40, 9]])), found[torch.tensor([[5, 1], [38, 7]])])


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_an_item_vector_with_neighbours_is_the_mean_of_its_own_and_theirs_by_nearness(similarity):
    events = [item % 5 for item in range(ITEMS)]
    settings, plain = dataclasses.replace(SETTINGS, similarity=similarity), content()
    own = build(settings, plain).item_vectors()
    known = plain.with_neighbours(range(ITEMS), LEARNT, events, 3.0)
    found = build(settings, known).item_vectors()
    for item in range(ITEMS):
        near = sum(n * own[line] for n, line in zip(known.nearness_VK[item], known.neighbours_VK[item].tolist(), strict=True))
        share = 0 if item == WITHOUT else 3 / (3 + events[item])
        if similarity == "cosine":
            near = normalize(near, dim=0) * share
        wanted = (own[item] + near) / (1 + share)
        assert torch.allclose(found[item], normalize(wanted, dim=0) if similarity == "cosine" else wanted, atol=1e-5), item
    assert torch.equal(build(settings, known).item_vectors(torch.tensor([40, 13])), found[[40, 13]])
    drawn = [build(settings, each).candidates(torch.Generator().manual_seed(0)) for each in (plain, known)]
    assert torch.equal(*drawn)


def test_attention_to_text_alone_changes_no_item_vector():
    model = build(dataclasses.replace(SETTINGS, text="cross"))
    assert model.lines == LEARNT
    assert torch.equal(model.item_vectors(), model.table.weight[FIRST_ITEM:])


@pytest.mark.parametrize(("text", "ids"), [("none", True), ("cross", True), ("both", True), ("pooled", False)])
def test_what_is_read_of_an_item_is_its_id_or_its_description(text, ids):
    model = build(dataclasses.replace(SETTINGS, text=text, ids=ids))
    rows = torch.tensor([[0, UNKNOWN, FIRST_ITEM, FIRST_ITEM + WITHOUT], [38, 39, FIRST_ITEM + ITEMS - 1, FIRST_ITEM + ITEMS]])
    described = text != "none"
    assert model.reads(rows).tolist() == [[False, False, True, ids], [True, described, described, False]]
    if text in ("both", "pooled"):
        assert model.known_V.tolist() == [ids or item != WITHOUT for item in range(ITEMS)]
    else:
        assert model.known_V.tolist() == [True] * LEARNT


def test_an_item_beyond_the_content_is_the_unknown_item():
    for text in TEXTS:
        model = build(dataclasses.replace(SETTINGS, text=text))
        with torch.no_grad():
            model.table.weight[UNKNOWN] = 1
        beyond, far = (model.encode(Batch.of([[4, FIRST_ITEM + ITEMS + more, 7]])) for more in (0, 1000))
        assert torch.equal(beyond, far)


def test_dropped_ids_leave_the_description_and_items_without_one_keep_their_id():
    settings = dataclasses.replace(SETTINGS, id_dropout=0.99)
    model, bare = build(settings), build(dataclasses.replace(SETTINGS, ids=False))
    bare.load_state_dict({name: value for name, value in model.state_dict().items() if name != "table.weight"}, strict=False)
    described, calm = bare.item_vectors(), model.item_vectors()
    dropped = model.candidates(torch.Generator().manual_seed(0))
    others = torch.arange(LEARNT) != WITHOUT
    assert torch.equal(calm, build().item_vectors())
    assert (dropped[others] == described[:LEARNT][others]).all(1).sum() >= LEARNT - 4
    assert not torch.isclose(calm[:LEARNT][others], described[:LEARNT][others]).all(1).any()
    assert torch.equal(dropped[WITHOUT], model.table.weight[FIRST_ITEM + WITHOUT])
    rows = torch.full((997,), FIRST_ITEM)
    half = build(dataclasses.replace(SETTINGS, id_dropout=0.5)).vectors(rows, torch.Generator().manual_seed(0))
    kept = (half == calm[0]).all(1)
    assert (half[~kept] == described[0]).all()
    assert 0.4 < kept.float().mean() < 0.6


def test_dropping_ids_changes_states_while_training_alone():
    settings = dataclasses.replace(SETTINGS, text="pooled", dropout=0.0)
    batch, model = random_batch([7, 11]), build(dataclasses.replace(settings, id_dropout=0.5))
    assert torch.equal(model(batch)[-1], build(settings)(batch)[-1])
    assert not torch.allclose(model(batch, torch.Generator().manual_seed(0))[-1], model(batch)[-1], atol=1e-3)
    plain = build(settings)
    assert torch.equal(plain(batch, torch.Generator().manual_seed(0))[-1], plain(batch)[-1])


@pytest.mark.parametrize("text", ["pooled", "both"])
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_model_without_ids_has_no_rows_of_them_and_tells_items_apart(text, objective):
    model = build(dataclasses.replace(SETTINGS, text=text, ids=False, objective=objective))
    assert model.table.weight.shape == (FIRST_ITEM, 12)
    one, other = model.encode(Batch.of([[4, 9, 7], [4, 8, 7]]))
    assert not torch.allclose(one, other, atol=1e-3)
    assert not model.item_vectors()[WITHOUT].any()


def test_every_option_of_text_changes_the_scores():
    batch = random_batch([5, 11])

    def scores(settings: ModelSettings) -> torch.Tensor:
        model = build(settings)
        return model(batch, torch.Generator().manual_seed(1))[-1][:, -1] @ model.item_vectors()[:LEARNT].T

    before = scores(SETTINGS)
    for option, value in {"text": "cross", "text_span": 3, "ids": False, "id_dropout": 0.5}.items():
        assert not torch.allclose(before, scores(dataclasses.replace(SETTINGS, **{option: value}))), option


@pytest.mark.parametrize("text", ["none", "cross"])
@pytest.mark.parametrize("more", [{"ids": False}, {"id_dropout": 0.1}])
def test_ids_are_not_dropped_where_vectors_hold_no_description(text, more):
    with pytest.raises(ValueError, match="without ids, text must be pooled or both"):
        ModelSettings(text=text, **more)


@pytest.mark.parametrize(("key", "value"), [("text", "title"), ("text_span", 0), ("id_dropout", 1.0), ("id_dropout", -0.1)])
def test_a_setting_out_of_range_is_refused(key, value):
    with pytest.raises(ValueError, match=key):
        ModelSettings(**{"text": "both", key: value})


def test_a_model_of_text_without_content_is_refused():
    with pytest.raises(ValueError, match=r"model.text is 'both', and no content"):
        SequenceModel(SETTINGS, LEARNT)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_packing_changes_no_state(text):
    model, batch = build(dataclasses.replace(SETTINGS, text=text)), random_batch([3, 19, 1, 7])
    padded = model(batch)[-1].flatten(0, 1)[batch.places(19)]
    assert torch.allclose(model(batch, packed=True)[-1][0], padded, atol=1e-5)
    assert torch.allclose(model(batch, packed=True, positions=128)[-1][0, :30], padded, atol=1e-5)


def test_what_is_kept_between_requests_is_that_of_the_weights_as_they_are():
    model, other = build(seed=0).eval(), build(seed=1).eval()
    batch = random_batch([7, 3])
    with torch.inference_mode():
        before, wanted = model.encode(batch), other.encode(batch)
    assert torch.allclose(model.encode(batch).detach(), before, atol=1e-6)
    model.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert torch.equal(model.encode(batch), wanted)
