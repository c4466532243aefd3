"""What is known of items: categories by frequency, numbers by scale, files that come back, lines put in the place of others."""

import dataclasses

import pytest
import torch
from torch.nn.functional import normalize

from recsys import content as module
from recsys.content import FARTHEST, NEAR, NEIGHBOURS, Content, ContentEncoder, Described
from recsys.errors import BundleError, DataError
from recsys.text import TextSettings

SETTINGS = TextSettings(size=7, tokens=3, vocabulary=997)
ITEMS = Described(
    ["the red ship", "", "the blue ship", "a red moon", "the red ship"],
    [["sea"], [], ["sea", "blue"], ["sky", "blue", "night"], ["blue", "sea", "sea"]],
    [[[1.0], []], [[2.0], [10.0]], [], [[6.0], [30.0]], [[], [20.0]]],
)
NEW = Described(["a moon unheard of", "…"], [["unknown", "night"], ["unknown"]], [[[3.0], [1e9]], [[], [None]]])


def fitted(encoder: str = "lsa", items: Described = ITEMS) -> ContentEncoder:
    return ContentEncoder.fit(items, dataclasses.replace(SETTINGS, encoder=encoder))


def content(items: int, seed: int = 0, tokens: int = 3, categories: int = 2, states: int = 11) -> Content:
    """Random content of `items` items; no item is without any."""
    generator = torch.Generator().manual_seed(seed)
    nothing = Described([""] * items, [[]] * items, [[]] * items)
    return dataclasses.replace(
        fitted("tokens", nothing).encode(nothing),
        tokens_VL=torch.randint(1, states, (items, tokens), dtype=torch.int32, generator=generator),
        states_WP=torch.randn(states, 7, generator=generator).half().index_fill_(0, torch.tensor([0]), 0),
        pooled_VP=normalize(torch.randn(items, 7, generator=generator), dim=1),
        categories_VC=torch.randint(0, 5, (items, categories), dtype=torch.int32, generator=generator),
        numbers_VM=torch.randn(items, 2, generator=generator),
        categories=torch.tensor(4),
    )


def equal(one: Content, other: Content) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Content)]
    return all(first.dtype == second.dtype and torch.equal(first, second) for first, second in pairs)


def test_categories_are_counted_by_items_most_frequent_first_ties_by_name():
    assert fitted().categories == ["blue", "sea", "night", "sky"]


def test_only_the_most_frequent_categories_are_told_apart(monkeypatch):
    monkeypatch.setattr(module, "CATEGORIES", 2)
    encoder = fitted()
    assert encoder.categories == ["blue", "sea"]
    assert encoder.encode(ITEMS).categories_VC.tolist()[3] == [1, 0, 0]


def test_a_category_is_its_place_and_unknown_ones_are_left_out():
    encoder = fitted()
    assert encoder.encode(ITEMS).categories_VC.tolist() == [[2, 0, 0], [0, 0, 0], [2, 1, 0], [4, 1, 3], [1, 2, 2]]
    assert encoder.encode(NEW).categories_VC.tolist() == [[3], [0]]
    assert encoder.encode(NEW).categories_VC.dtype == torch.int32


def test_numbers_are_deviations_from_the_mean_of_the_fitted_items_cut_at_the_farthest_and_0_where_missing():
    encoder = fitted()
    ones, tens = torch.tensor([1.0, 2, 6]), torch.tensor([10.0, 30, 20])
    deviations = ones.std(correction=0), tens.std(correction=0)
    found = encoder.encode(ITEMS).numbers_VM
    wanted_ones = [(value - 3) / deviations[0] for value in (1, 2, 3, 6, 3)]
    wanted_tens = [(value - 20) / deviations[1] for value in (20, 10, 20, 30, 20)]
    assert torch.allclose(found, torch.tensor([wanted_ones, wanted_tens]).T, atol=1e-6)
    assert encoder.encode(NEW).numbers_VM.tolist() == [[0, FARTHEST], [0, 0]]
    assert encoder.encode(dataclasses.replace(NEW, numbers=[[[-1e9], [20.0]], []])).numbers_VM.tolist() == [
        [-FARTHEST, 0],
        [0, 0],
    ]


def test_a_number_that_never_varies_says_nothing_of_the_fitted_items():
    alike = dataclasses.replace(ITEMS, numbers=[[[7.0], []]] * 5)
    assert not fitted(items=alike).encode(alike).numbers_VM.any()


def test_items_without_numbers_have_none_of_them():
    encoder = fitted(items=dataclasses.replace(ITEMS, numbers=[[]] * 5))
    assert encoder.encode(dataclasses.replace(ITEMS, numbers=[[]] * 5)).numbers_VM.shape == (5, 0)


@pytest.mark.parametrize("numbers", [[[[1.0]], []], [[[1.0], [2.0], [3.0]], []], [[], [[1.0, 2.0], [3.0]]]])
def test_another_count_of_numbers_is_refused(numbers):
    with pytest.raises(DataError, match="numbers"):
        fitted().encode(dataclasses.replace(NEW, numbers=numbers))


def test_counts_of_numbers_that_differ_are_refused_when_fitting():
    with pytest.raises(DataError, match="numbers by column"):
        fitted(items=dataclasses.replace(ITEMS, numbers=[[[1.0]], [[1.0, 2.0]], [], [], []]))


@pytest.mark.parametrize("encoder", ["lsa", "tokens"])
def test_an_item_has_the_same_lines_in_any_company(encoder):
    made = fitted(encoder)
    together = made.encode(ITEMS)
    for line in range(5):
        part = slice(line, line + 1)
        alone = made.encode(Described(ITEMS.texts[part], ITEMS.categories[part], ITEMS.numbers[part]))
        for name in ("tokens_VL", "pooled_VP", "numbers_VM"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[line])
        width = alone.categories_VC.shape[1]
        assert torch.equal(alone.categories_VC[0], together.categories_VC[line, :width])
        assert not together.categories_VC[line, width:].any()
    assert torch.equal(together.tokens_VL[0], together.tokens_VL[4])


def test_some_is_known_of_an_item_with_a_token_a_category_or_a_number():
    nothing = Described(
        ["", "ship", "", "", "unheard"], [[], [], ["sea"], [], ["unknown"]], [[], [], [], [[1.0], []], [[], []]]
    )
    assert fitted().encode(nothing).some_V.tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("encoder", ["lsa", "tokens"])
@pytest.mark.parametrize("items", [ITEMS, Described([""] * 3, [["sea"], [], []], [[]] * 3)], ids=["all", "no text"])
def test_saved_content_and_encoder_come_back(tmp_path, encoder, items):
    made = fitted(encoder, items)
    known = made.encode(items)
    known.save(tmp_path / "content.safetensors")
    assert equal(Content.load(tmp_path / "content.safetensors"), known)
    made.save(tmp_path / "encoder.safetensors")
    again = ContentEncoder.load(tmp_path / "encoder.safetensors")
    assert again.settings == made.settings
    assert equal(again.encode(items), known)
    new = dataclasses.replace(NEW, numbers=[[]] * 2) if items is not ITEMS else NEW
    assert equal(again.encode(new), made.encode(new))


def test_an_encoder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BundleError, match=r"encoder\.safetensors: not there"):
        ContentEncoder.load(tmp_path / "encoder.safetensors")


def test_lines_are_replaced_and_appended_and_no_other_changes():
    old, new = content(5), content(4, seed=1)
    both = old.with_lines([3, 1, 5, 6], new, fresh_states=False)
    assert len(both) == 7
    assert torch.equal(both.states_WP, old.states_WP)
    for name in ("tokens_VL", "pooled_VP", "categories_VC", "numbers_VM"):
        kept, put, found = getattr(old, name), getattr(new, name), getattr(both, name)
        assert torch.equal(found, torch.stack([kept[0], put[1], kept[2], put[0], kept[4], put[2], put[3]]))


def test_no_lines_change_nothing():
    old = content(5)
    tables = {name: value[:0] for name, value in vars(old).items() if value.ndim and name != "states_WP"}
    none = dataclasses.replace(old, **tables)
    assert equal(old.with_lines([], none, fresh_states=False), old)


@pytest.mark.parametrize(("wide", "narrow"), [(5, 2), (2, 5)])
def test_tables_grow_to_the_wider_ones(wide, narrow):
    old, new = content(3, tokens=wide, categories=wide), content(2, seed=1, tokens=narrow, categories=narrow)
    both = old.with_lines([1, 3], new, fresh_states=False)
    for name in ("tokens_VL", "categories_VC"):
        found, kept, put = getattr(both, name), getattr(old, name), getattr(new, name)
        assert found.shape == (4, 5)
        for line, values in ((0, kept[0]), (1, put[0]), (2, kept[2]), (3, put[1])):
            assert torch.equal(found[line, : len(values)], values)
            assert not found[line, len(values) :].any()


def test_fresh_states_stand_behind_the_old_ones_and_every_line_keeps_its_own():
    old, new = content(5), content(3, seed=1, states=13)
    new.tokens_VL[0, 2] = 0
    both = old.with_lines([2, 5, 6], new, fresh_states=True)
    assert both.states_WP.shape == (11 + 12, 7)
    for line, (source, own) in enumerate([(old, 0), (old, 1), (new, 0), (old, 3), (old, 4), (new, 1), (new, 2)]):
        assert torch.equal(both.states_WP[both.tokens_VL[line]], source.states_WP[source.tokens_VL[own]])
    assert both.tokens_VL[2, 2] == 0


@pytest.mark.parametrize(("learnt", "count"), [(5, 4), (37, NEIGHBOURS)])
def test_neighbours_are_the_learnt_items_of_the_nearest_texts_by_a_softmax_of_cosines(learnt, count, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3)
    known, events = content(41), [item % 7 for item in range(41)]
    known.pooled_VP[3] = 0
    found = known.with_neighbours(range(41), learnt, events, 2.0)
    assert found.neighbours_VK.shape == found.nearness_VK.shape == (41, count)
    for item in range(41):
        cosines = {other: float(known.pooled_VP[item] @ known.pooled_VP[other]) for other in range(learnt) if other != item}
        nearest = sorted(cosines, key=lambda other: -cosines[other])[:count]
        shares = torch.tensor([cosines[other] / NEAR for other in nearest]).softmax(0) * 2 / (2 + events[item])
        wanted = torch.zeros(41).index_put_((torch.tensor(nearest),), shares) * (item != 3)
        assert torch.allclose(
            torch.zeros(41).index_add_(0, found.neighbours_VK[item], found.nearness_VK[item]), wanted, atol=1e-5
        )


def test_neighbours_of_some_lines_leave_those_of_others():
    known = content(11)
    before = known.with_neighbours(range(11), 11, [0] * 11, 2.0)
    after = before.with_neighbours([7, 2], 11, [3, 5], 2.0)
    others = [line for line in range(11) if line not in (7, 2)]
    assert torch.equal(after.nearness_VK[others], before.nearness_VK[others])
    assert torch.allclose(after.nearness_VK[[7, 2]].sum(1), torch.tensor([2 / 5, 2 / 7]))


def test_without_weight_or_pooled_vectors_or_others_there_are_no_neighbours():
    known = content(5)
    assert known.with_neighbours(range(5), 5, [0] * 5, 0.0) is known
    assert known.with_neighbours(range(5), 1, [0] * 5, 2.0) is known
    learnt = dataclasses.replace(known, pooled_VP=known.pooled_VP[:, :0])
    assert learnt.with_neighbours(range(5), 5, [0] * 5, 2.0) is learnt


def test_the_first_items_are_taken():
    assert ITEMS.take(2) == Described(ITEMS.texts[:2], ITEMS.categories[:2], ITEMS.numbers[:2])
    assert len(ITEMS.take(3)) == 3
