"""What an explanation promises: drops are true, shares add up, and how far either may be trusted is measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from scipy.stats import spearmanr

from features.dataset import Dataset
from recsys.batch import FIRST_ITEM, UNKNOWN, Batch, gather
from recsys.content import ContentEncoder, Described
from recsys.errors import RequestError
from recsys.model import ModelSettings, SequenceModel
from recsys.text import TextSettings, without_words
from serving.engine import Recommender
from serving.explain import EVENTS, FIGURES, GROUPS, NEXT, Explanation, _groups, draw, explain, faithfulness, spearman
from serving.export import export
from serving.index import IndexSettings
from serving.items import remove, update
from tests.serving.conftest import GOODS, LENGTH, LISTED, TEXTS, goods, write_run, write_shop

HISTORY = [3, 17, 101, 17, 41, 5, 7, 211, 19]
LAMPS = [0, 7, 14, 21, 28]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def recommender(run: Path) -> Recommender:
    return Recommender.load(run)


@pytest.fixture(scope="module")
def bundle(shop_run: Path, shop: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explained") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.export.HISTORIES", 128)
        export(shop_run, path, IndexSettings(kind="exact"), shop)
    return path


KINDS = [
    {"time": "both", "request_time": True},
    {"block": "hstu", "positions": "relative"},
    {"objective": "masked", "attention": "block_sparse", "span": 8},
    {"blocks": 3, "early_exit": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_drop_is_the_difference_of_two_scores_and_shares_add_up_to_1(
    kind: dict[str, Any], dataset: Dataset, tmp_path: Path
) -> None:
    recommender = Recommender.load(write_run(tmp_path / "run", dataset, **kind))
    if kind.get("early_exit"):
        recommender.leave = [0.9, 0.9]
    times = [100 * place**2 for place in range(len(HISTORY))]
    now = 10**5 if recommender.reads_now else None
    found = explain(recommender, HISTORY, seeded(), times=times, now=now)
    rows = [recommender.catalogue.resolve(item) for item in HISTORY]
    row = recommender.catalogue.resolve(found.item["item_id"])
    assert row == recommender.recommend(Batch.of([rows], [times]), 1, now).rows[0, 0]

    def score(places: list[int]) -> float:
        batch = Batch.of([[rows[place] for place in places]], [[times[place] for place in places]])
        return float(recommender.score(batch, torch.tensor([[row]]), now))

    everything = list(range(len(HISTORY)))
    assert found.item["score"] == score(everything)
    drops = [score(everything) - score([other for other in everything if other != place]) for place in everything]
    assert [event["drop"] for event in found.events][: len(HISTORY)] == drops
    assert len({abs(drop) for drop in drops}) > 5
    assert sum(event["attention"] for event in found.events) == pytest.approx(1)
    assert all(event["attention"] >= 0 for event in found.events)


def test_the_mask_of_a_masked_model_is_the_last_event_and_cannot_be_left_out(dataset: Dataset, tmp_path: Path) -> None:
    masked = Recommender.load(write_run(tmp_path / "run", dataset, objective="masked"))
    events = explain(masked, [1, 2, 5], seeded()).events
    assert [event["item_id"] for event in events] == [1, 2, 5, None]
    assert (events[-1]["title"], events[-1]["drop"]) == (NEXT, None)
    assert events[-1]["attention"] > 0


def test_what_carries_all_has_the_largest_drop_whatever_attention_says(dataset: Dataset, tmp_path: Path) -> None:
    only_the_last_counts = Recommender.load(write_run(tmp_path / "run", dataset, scale=0))
    found = explain(only_the_last_counts, [5, 3, 41, 7, 2], seeded())
    assert [event["drop"] == 0 for event in found.events] == [True] * 4 + [False]
    assert found.events[-1]["drop"] > 0
    assert len({event["attention"] for event in found.events}) == 1
    assert [found.figures[name] for name in FIGURES[:1]] == [None]
    assert (found.figures["drops_on_groups"] or 0) > 0.9
    assert found.verdict.startswith("Nothing tells whether attention is to be trusted here")


class Linear(Recommender):
    """Scores every item by the sum of what the events weigh."""

    def score(self, histories: Batch, rows_BC: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        weights = (histories.values * 7919 % 101).float()
        return torch.zeros(len(histories)).index_add_(0, histories.owners, weights)[:, None].expand(rows_BC.shape)


def test_of_a_linear_scorer_leaving_out_one_by_one_tells_all(run: Path, dataset: Dataset) -> None:
    linear = Linear.load(run)
    found = explain(linear, HISTORY, seeded())
    assert [event["drop"] for event in found.events] == [linear.catalogue.resolve(item) * 7919 % 101 for item in HISTORY]
    assert found.figures["drops_on_groups"] == pytest.approx(1)
    assert abs(found.figures["attention_with_drops"] or 9) < 1
    s = dataset.sequences
    histories = gather(s.items, s.times, s.offsets[:31], s.offsets[1:32])
    means = faithfulness(linear, histories, None, seeded())
    assert means["drops_on_groups"] == 1
    assert -1 < (means["attention_on_groups"] or 9) < 1
    assert means["histories"] == 31


def test_rank_correlation_is_that_of_scipy() -> None:
    for size in (3, 17, 101):
        one, other = torch.randint(7, (2, size), generator=seeded(size)).double()
        one[0], one[1], other[0], other[1] = 8, 9, 9, 8
        assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic)
        assert spearman(one, one.exp()) == pytest.approx(1)
        assert spearman(one, -one) == pytest.approx(-1)
        assert spearman(one, torch.full_like(one, 5)) is None
    assert spearman(torch.arange(2), torch.arange(2)) is None
    assert spearman(torch.arange(3), torch.arange(3)) == 1
    assert spearman(torch.zeros(0), torch.zeros(0)) is None


def test_groups_are_random_and_of_a_quarter_to_a_half_of_the_events() -> None:
    for events in (4, 5, 7, 53):
        groups_GT = _groups(events, seeded())
        sizes = groups_GT.sum(1)
        assert groups_GT.shape == (GROUPS, events)
        assert int(sizes.min()) >= max(2, events / 4)
        assert int(sizes.max()) <= events / 2
        assert torch.equal(groups_GT, _groups(events, seeded()))
        assert bool(groups_GT.any(0).all())
    assert not torch.equal(groups_GT, _groups(events, seeded(1)))
    assert [len(_groups(events, seeded())) for events in (0, 1, 3)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("history", "known"), [([5], 0), ([5, 5, 5], 0), ([5, 3], 0), ([5, 3, 7], 1), ([5, 3, 7, 5], 3)], ids=str
)
def test_short_histories_have_the_figures_that_can_be_known(history: list[int], known: int, recommender: Recommender) -> None:
    found = explain(recommender, history, seeded())
    assert [event["item_id"] for event in found.events] == history
    figures = [found.figures[name] for name in FIGURES]
    assert [figure is not None for figure in figures] == [place < known for place in range(3)]
    assert all(figure is None or -1 <= figure <= 1 for figure in figures)
    assert ("unknown" in found.verdict) == (known < 3)
    assert ("unknown, since this history has fewer than 4 events" in found.verdict) == (len(history) < 4)


def test_an_event_beyond_what_the_model_reads_is_not_there_and_does_not_move_up(
    recommender: Recommender, dataset: Dataset
) -> None:
    rows = dataset.sequences.items[dataset.sequences.offsets[3] : dataset.sequences.offsets[4]].tolist()
    assert len(rows) > LENGTH + 1
    found = explain(recommender, [recommender.catalogue.item_id(row) for row in rows], seeded())
    assert [event["event"] for event in found.events] == list(range(len(rows) - LENGTH + 1, len(rows) + 1))
    item = torch.tensor([[recommender.catalogue.resolve(found.item["item_id"])]])
    whole, less = (recommender.score(Batch.of([read]), item) for read in (rows[-LENGTH:], rows[1 - LENGTH :]))
    assert found.events[0]["drop"] == float(whole) - float(less)
    last = [recommender.catalogue.item_id(row) for row in rows[-LENGTH:]]
    short = explain(recommender, last, seeded(), item=found.item["item_id"])
    assert [event["drop"] for event in short.events] == [event["drop"] for event in found.events]


def test_what_is_explained_is_what_is_recommended_at_that_time(dataset: Dataset, tmp_path: Path) -> None:
    recommender = Recommender.load(write_run(tmp_path / "run", dataset, time="both", request_time=True))
    history, times = [1, 2, 5], [10, 500, 900]
    early, late = (explain(recommender, history, seeded(), times=times, now=now) for now in (600, 10**6))
    assert [len(found.events) for found in (early, late)] == [2, 3]
    for found, now in ((early, 600), (late, 10**6)):
        first = recommender.answer(history, 1, times=times, now=now)["items"][0]
        assert found.item == {name: first[name] for name in ("item_id", "title", "score")}
    with pytest.raises(RequestError, match="give times"):
        explain(recommender, history, seeded())
    with pytest.raises(RequestError, match="knows nothing of this history"):
        explain(recommender, history, seeded(), times=times, now=5)


def test_an_item_that_is_asked_for_is_explained_by_id_or_title(recommender: Recommender) -> None:
    by_id, by_title = (explain(recommender, HISTORY, seeded(), item=item) for item in (13, "Story 13 of 997"))
    assert by_id.as_dict() == by_title.as_dict()
    assert by_id.item["item_id"] == 13
    listed = recommender.answer(HISTORY, LISTED)["items"]
    assert by_id.item["score"] == next(item["score"] for item in listed if item["item_id"] == 13)
    seen = explain(recommender, HISTORY, seeded(), item=17)
    assert sum(event["item_id"] == 17 for event in seen.events) == 2


def test_what_has_no_explanation_is_refused(bundle: Path, tmp_path: Path) -> None:
    shop = write_shop(tmp_path / "shop", cold_one_in=10)
    recommender = Recommender.load(write_run(tmp_path / "run", shop))
    learnt, cold = (recommender.catalogue.item_id(row) for row in (FIRST_ITEM, FIRST_ITEM + recommender.lines))
    for history in ([], [cold]):
        with pytest.raises(RequestError, match="popularity made the list"):
            explain(recommender, history, seeded(), item=learnt)
    assert len(explain(recommender, [cold, learnt, cold], seeded()).events) == 3
    with pytest.raises(RequestError, match=f"knows nothing of item '{cold}'"):
        explain(recommender, [learnt], seeded(), item=cold)
    for item in ("Story 13 of 99", 10**6):
        with pytest.raises(RequestError, match="no item"):
            explain(recommender, [learnt], seeded(), item=item)
    with pytest.raises(RequestError, match="no item is left"):
        explain(Recommender.load(bundle), list(range(GOODS)), seeded())


def test_layers_that_a_history_left_before_do_not_count(dataset: Dataset, tmp_path: Path) -> None:
    recommender = Recommender.load(write_run(tmp_path / "run", dataset, blocks=3, early_exit=True))
    for leave, through in (([2.0, 2.0], 3), ([2.0, -2.0], 2), ([-2.0, 2.0], 1)):
        recommender.leave = leave
        found = explain(recommender, HISTORY, seeded())
        assert found.weights_LHSS.flatten(1).any(1).tolist() == [layer < through for layer in range(3)]
        shares = found.weights_LHSS[:through, :, -1].mean((0, 1))
        assert [event["attention"] for event in found.events] == pytest.approx(shares.tolist())
        draw(found, tmp_path / "layers.png")


def test_the_words_that_states_attend_to_have_shares_and_those_of_the_item_have_drops(
    bundle: Path, recommender: Recommender
) -> None:
    found = explain(Recommender.load(bundle), LAMPS, seeded(), item=35)
    assert sum(share for event in found.events for share in event["words"].values()) == pytest.approx(1)
    assert [bool(event["words"]) for event in found.events] == [False, True, True, True, True]  # model.text_span is 4
    assert list(found.item["words"]) == sorted(found.item["words"], key=lambda word: -found.item["words"][word])
    assert set(found.item["words"]) == set(TEXTS["lamp"].split())
    plain = explain(recommender, HISTORY, seeded())
    assert "words" not in plain.item
    assert not any("words" in event for event in plain.events)


@pytest.mark.parametrize("word", ["brass", "shade"])
def test_the_drop_without_a_word_is_what_describing_the_item_anew_takes_away(word: str, bundle: Path, tmp_path: Path) -> None:
    found = explain(Recommender.load(bundle), LAMPS, seeded(), item=35)
    text = TEXTS["lamp"].replace(f"{word} ", "").removesuffix(f" {word}")
    update(bundle, goods([35], title=pl.lit(text)).lazy(), tmp_path / "bundle")
    after = explain(Recommender.load(tmp_path / "bundle"), LAMPS, seeded(), item=35)
    assert word not in after.item["words"]
    assert found.item["words"][word] == pytest.approx(found.item["score"] - after.item["score"], abs=1e-4)
    assert abs(found.item["words"][word]) > 1e-3


def test_a_text_is_left_without_a_word_wherever_it_stands() -> None:
    assert without_words("Lamp, the LAMP!") == {"lamp": ", the !", "the": "Lamp,  LAMP!"}
    assert without_words("") == {}
    assert without_words("灯 lamp") == {"灯": "lamp", "lamp": "灯"}


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("encoder", ["lsa", "tokens"])
@pytest.mark.parametrize("neighbours", [0.0, 5.0])
def test_an_item_described_as_it_is_has_its_own_vector(similarity: str, encoder: str, neighbours: float, shop: Dataset) -> None:
    told = ContentEncoder.fit(shop.described, TextSettings(encoder=encoder, size=29, vocabulary=503))
    learnt, lines = 487, range(len(shop.described))
    content = told.encode(shop.described).with_neighbours(lines, learnt, [line % 7 for line in lines], neighbours)
    settings = ModelSettings(embedding_size=10, hidden_size=11, text="both", similarity=similarity)
    model = SequenceModel(settings, learnt, content, 503).initialise(seeded()).eval().requires_grad_(False)
    model.table.weight[UNKNOWN] = 1  # no part of an item that was not learnt
    vectors_VE = model.item_vectors()
    for line in (3, learnt - 1, learnt + 1):
        about = [shop.described.categories[line]], [shop.described.numbers[line]]
        own, other = (told.encode(Described([text], *about)) for text in (shop.described.texts[line], "a violin"))
        torch.testing.assert_close(model.described_as(FIRST_ITEM + line, own)[0], vectors_VE[line])
        changed = model.described_as(FIRST_ITEM + line, other)[0]
        assert not torch.allclose(changed, vectors_VE[line], atol=1e-4)
        if neighbours and encoder == "lsa" and similarity == "dot":  # the neighbours' part is as it was
            share = model.content.nearness_RK[FIRST_ITEM + line].sum()  # type: ignore[union-attr]
            text_PE = model.fusion.text.weight.T  # type: ignore[union-attr]
            wanted = (other.pooled_VP - own.pooled_VP)[0] @ text_PE / (1 + share)
            torch.testing.assert_close(changed - vectors_VE[line], wanted)


def test_a_bundle_says_how_true_explanations_are_and_a_run_that_it_does_not_know(
    bundle: Path, shop_run: Path, shop: Dataset, tmp_path: Path
) -> None:
    measured = json.loads((bundle / "manifest.json").read_text())["faithfulness"]
    assert set(measured) == {*FIGURES, "histories"}
    assert 90 < measured["histories"] <= 101
    assert all(-1 <= measured[name] <= 1 for name in FIGURES)
    assert measured["drops_on_groups"] > 0.3
    found = explain(Recommender.load(bundle), LAMPS, seeded())
    assert found.as_dict()["faithfulness"] == {"history": dict(found.figures), "bundle": measured}
    assert f"mean over {measured['histories']} histories" in found.verdict
    of_run = explain(Recommender.load(shop_run), LAMPS, seeded())
    assert of_run.as_dict()["faithfulness"]["bundle"] is None
    assert of_run.verdict.endswith("other histories were not measured: `recsys export --dataset` does it for a bundle.")
    assert "faithfulness" not in export(shop_run, tmp_path / "bundle", IndexSettings())
    assert remove(bundle, [35], tmp_path / "less")["faithfulness"] == measured


def test_histories_without_an_explanation_do_not_count(recommender: Recommender) -> None:
    known = [FIRST_ITEM + place for place in (5, 3, 11, 7, 13, 2)]
    alone = faithfulness(recommender, Batch.of([known]), None, seeded())
    assert faithfulness(recommender, Batch.of([[], known, [10**6]]), None, seeded()) == alone
    assert alone["histories"] == 1
    figures = explain(recommender, [recommender.catalogue.item_id(row) for row in known], seeded()).figures
    assert alone == {"histories": 1, **{name: round(figures[name] or 9, 4) for name in FIGURES}}
    nothing = faithfulness(recommender, Batch.of([[]]), None, seeded())
    assert nothing == {"histories": 0, **dict.fromkeys(FIGURES)}


def test_long_histories_are_measured_by_their_last_events_at_that_time(dataset: Dataset, tmp_path: Path) -> None:
    recommender = Recommender.load(write_run(tmp_path / "run", dataset, length=67, time="both", request_time=True))
    s = dataset.sequences
    history = gather(s.items, s.times, s.offsets[3, None], s.offsets[4, None])
    now = history.times[[200]]
    cut = gather(s.items, s.times, s.offsets[3, None] + 201 - EVENTS, s.offsets[3, None] + 201)
    measured = faithfulness(recommender, history, now, seeded())
    assert measured == faithfulness(recommender, cut, now, seeded())
    assert measured != faithfulness(recommender, cut, now + 10**6, seeded())


@pytest.fixture(scope="module")
def found(recommender: Recommender) -> Explanation:
    return explain(recommender, HISTORY, seeded())


@pytest.mark.parametrize(
    ("here", "bundle", "says"),
    [
        (0.2, None, "Do not trust attention here"),
        (0.2, 0.9, "Do not trust attention here"),
        (0.9, 0.49, "Do not trust attention here"),
        (None, 0.49, "Do not trust attention here"),
        (0.9, 0.5, "Attention is a fair hint here"),
        (0.9, None, "Attention is a fair hint here"),
        (None, None, "Nothing tells"),
    ],
)
def test_attention_that_disagrees_with_the_drops_is_not_to_be_trusted(
    here: float | None, bundle: float | None, says: str, found: Explanation
) -> None:
    means = None if bundle is None else {**dict.fromkeys(FIGURES, bundle), "histories": 127}
    verdict = dataclasses.replace(found, figures=dict.fromkeys(FIGURES, here), bundle_figures=means).verdict
    assert verdict.startswith(says)
    assert verdict.count(". ") == 0
    assert ("do not add up" in verdict) == (here == 0.2)
    assert ("unknown" if here is None else f"{here:.2f}") in verdict
    assert bundle is None or f"(mean over 127 histories: {bundle:.2f})" in verdict
    assert bundle is None or verdict.count(f" ({bundle:.2f})") == 2


def test_an_explanation_is_one_json_object_and_the_same_each_time(found: Explanation, recommender: Recommender) -> None:
    told = found.as_dict()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert set(told) == {"bundle", "item", "events", "faithfulness", "verdict"}
    assert set(told["item"]) == {"item_id", "title", "score"}
    assert [set(event) for event in told["events"]] == [{"event", "item_id", "title", "attention", "drop"}] * len(HISTORY)
    assert explain(recommender, HISTORY, seeded()).as_dict() == told
    other = explain(recommender, HISTORY, seeded(1)).as_dict()
    assert [other["events"], other["faithfulness"] == told["faithfulness"]] == [told["events"], False]


@pytest.mark.parametrize("events", [1, 3, 61])
def test_a_picture_is_drawn_of_any_history_and_title(events: int, found: Explanation, tmp_path: Path) -> None:
    titles = ["for $ 5 or $_$", "a very long title " * 9, "", "<b> {x} \\alpha", NEXT]
    record = found.events[0]
    shown = [{**record, "event": 7 + place, "title": titles[place % 5]} for place in range(events)]
    shown[-1]["drop"] = None
    weights = torch.rand(2, 3, events, events, generator=seeded())
    item = {**found.item, "title": titles[0]}
    draw(dataclasses.replace(found, item=item, events=shown, weights_LHSS=weights), tmp_path / "why.png")
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")
