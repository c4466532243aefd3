"""The way from candidates to a list: the ranker, diversity, popularity, probabilities; and that no company changes a list."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from features.dataset import Dataset
from recsys.batch import FIRST_ITEM, PADDING, Batch, gather
from recsys.bundle import Directory, open_directory
from recsys.errors import RequestError
from recsys.metrics import measure, new_targets, target_ranks
from recsys.ranker import Known, RankerSettings
from serving.calibration import Calibration
from serving.engine import Recommender
from serving.evaluation.baselines import BASELINES
from serving.evaluation.judge import Evaluation, evaluate
from serving.export import calibrated, export
from serving.index import INDEXES, IndexSettings
from serving.lists import Lists
from serving.ranking import CANDIDATES, STEP, ServingSettings, chosen_blocks, listed
from serving.ranking import candidates as named
from tests.serving.conftest import LISTED, RANKERS, write_run
from tests.serving.nights import lists_of, score_all
from tests.serving.online import asked

K = 11
WIDTH = 7


def histories_of(dataset: Dataset, count: int) -> Batch:
    s = dataset.sequences
    return gather(s.items, s.times, s.offsets[:count], s.offsets[1 : count + 1])


def with_serving(bundle: Path, curve: list[dict[str, float]] | None = None, **serving: Any) -> Recommender:
    """The bundle as if it had been exported with such settings, of a run whose ranker had such a curve."""
    directory = open_directory(bundle)
    recipe = {**directory.manifest["recipe"], "serving": ServingSettings(**serving).as_dict()}
    return Recommender(Directory(bundle, {**directory.manifest, "recipe": recipe, "ranker": {"curve": curve or []}}))


def same(one: Lists, other: Lists) -> bool:
    """Bit for bit."""
    return torch.equal(one.rows, other.rows) and torch.equal(one.scores, other.scores)


@pytest.mark.parametrize("kind", RANKERS)
def test_a_ranked_list_is_the_same_alone_and_in_any_batch(kind: str, ranked_bundles: dict[str, Path], dataset: Dataset) -> None:
    recommender, sequences = Recommender.load(ranked_bundles[kind]), dataset.sequences
    assert recommender.ranker_blocks == RANKERS[kind].blocks
    batch = gather(sequences.items, sequences.times, sequences.offsets[:101], sequences.offsets[1:102])
    together = recommender.recommend(batch, 10)
    for user in range(0, 101, 3):
        one = gather(
            sequences.items, sequences.times, sequences.offsets[user : user + 1], sequences.offsets[user + 1 : user + 2]
        )
        alone = recommender.recommend(one, 10)
        assert torch.equal(alone.rows[0], together.rows[user])
        assert torch.equal(alone.scores[0], together.scores[user])


@pytest.mark.parametrize("kind", RANKERS)
def test_a_ranked_item_scores_as_in_its_list(kind: str, ranked_bundles: dict[str, Path], dataset: Dataset) -> None:
    recommender, sequences = Recommender.load(ranked_bundles[kind]), dataset.sequences
    batch = gather(sequences.items, sequences.times, sequences.offsets[:23], sequences.offsets[1:24])
    lists = recommender.recommend(batch, 7)
    known = ~lists.popular
    assert torch.allclose(recommender.score(batch, lists.rows)[known], lists.scores[known], atol=1e-5)


def test_an_item_that_retrieval_does_not_name_is_scored_in_the_place_of_the_last(
    ranked_bundles: dict[str, Path], dataset: Dataset
) -> None:
    """With the rank that its score has there; as an item of the history, which may stand before many others."""
    recommender, histories = Recommender.load(ranked_bundles["companions"]), histories_of(dataset, 53)
    rows_BN, retrieved_BN = recommender.with_ranker(0).candidates(histories)
    states_BE, look = recommender._read(histories, None)
    assert look is not None and recommender.ranker is not None
    scores_BV, first = states_BE @ recommender.known.vectors_VE.T, 0
    had_BV = torch.zeros_like(scores_BV, dtype=torch.bool)
    had_BV[histories.owners, (histories.values - FIRST_ITEM).clamp(max=recommender.lines - 1)] = True
    row_B1 = scores_BV.masked_fill(~had_BV, -torch.inf).argmax(1, keepdim=True) + FIRST_ITEM
    scores_B1 = (states_BE[:, None] * recommender.known.vectors(row_B1)).sum(2)
    rows_BN = torch.cat([rows_BN[:, :63], row_B1], 1)
    retrieved_BN = torch.cat([retrieved_BN[:, :63], scores_B1], 1)
    ranks_BN = torch.ones_like(rows_BN)
    for line, scores in enumerate(retrieved_BN.tolist()):
        ranks_BN[line] = torch.tensor([1 + sum(other > score for other in scores) for score in scores])
        first += int(ranks_BN[line, -1] < 32)
    assert first
    wanted_B = recommender.ranker(recommender.known, rows_BN, retrieved_BN, ranks_BN, look)[-1][:, -1]
    assert torch.allclose(recommender.score(histories, row_B1)[:, 0], wanted_B, atol=1e-4)


@pytest.mark.parametrize("kind", RANKERS)
def test_without_blocks_of_the_ranker_lists_are_those_of_a_bundle_without_one(
    kind: str, ranked_bundles: dict[str, Path], dataset: Dataset, tmp_path: Path
) -> None:
    export(write_run(tmp_path / "run", dataset, time="gaps"), tmp_path / "bundle", IndexSettings())
    plain, histories = Recommender.load(tmp_path / "bundle"), histories_of(dataset, 53)
    assert plain.ranker is None
    wanted = plain.recommend(histories, K)
    for recommender in (
        Recommender.load(ranked_bundles[kind]).with_ranker(0),
        with_serving(ranked_bundles[kind], ranker_blocks=0),
    ):
        assert same(recommender.recommend(histories, K), wanted)
        assert torch.equal(recommender.score(histories, wanted.rows), plain.score(histories, wanted.rows))
    assert not same(Recommender.load(ranked_bundles[kind]).recommend(histories, K), wanted)


def test_ranked_lists_hold_the_ranked_candidates_by_score(ranked_bundles: dict[str, Path], dataset: Dataset) -> None:
    recommender, histories = Recommender.load(ranked_bundles["companions"]), histories_of(dataset, 53)
    rows_BN, scores_BN = recommender.candidates(histories)
    lists = recommender.recommend(histories, K)
    for rows, scores, listed_rows in zip(rows_BN.tolist(), scores_BN.tolist(), lists.rows.tolist(), strict=True):
        order = sorted(zip(scores, rows, strict=True), key=lambda pair: (-pair[0], pair[1]))
        assert listed_rows == [row for _, row in order[:K]]


def test_a_depth_that_is_served_is_that_depth(ranked_bundles: dict[str, Path], dataset: Dataset) -> None:
    histories = histories_of(dataset, 53)
    whole = Recommender.load(ranked_bundles["companions"])
    lists = [whole.with_ranker(blocks).recommend(histories, K) for blocks in (0, 1, 2)]
    assert not same(lists[0], lists[1])
    assert not same(lists[1], lists[2])
    for blocks, wanted in enumerate(lists):
        assert same(with_serving(ranked_bundles["companions"], ranker_blocks=blocks).recommend(histories, K), wanted)
    assert same(with_serving(ranked_bundles["companions"], ranker_blocks=7).recommend(histories, K), lists[2])


@pytest.mark.parametrize(
    ("figures", "wanted"), [([0.1, 0.3, 0.2], 1), ([0.3, 0.2, 0.1], 0), ([0.1, 0.2, 0.3], 2), ([0.2, 0.2, 0.2], 0), ([], 2)]
)
def test_by_default_so_many_blocks_are_served_as_did_best_on_validation(
    figures: list[float], wanted: int, ranked_bundles: dict[str, Path]
) -> None:
    curve = [{"blocks": blocks, "ndcg@10": figure, "recall@10": 1 - figure} for blocks, figure in enumerate(figures)]
    recommender = with_serving(ranked_bundles["companions"], curve)
    assert recommender.ranker_blocks == wanted
    assert with_serving(ranked_bundles["companions"], curve, ranker_blocks=1).ranker_blocks == 1
    assert chosen_blocks(ServingSettings(), None, {"ranker": {"curve": curve}}) == 0


@pytest.mark.parametrize("most", [16, 17, 48, 64])
def test_no_item_is_listed_that_retrieval_did_not_name(most: int, ranked_bundles: dict[str, Path], dataset: Dataset) -> None:
    """How many it names is a multiple of 16."""
    recommender, histories = with_serving(ranked_bundles["look"], candidates=most), histories_of(dataset, 53)
    retrieved = recommender.with_ranker(0).recommend(histories, -(-most // STEP) * STEP)
    assert torch.equal(recommender.candidates(histories)[0].sort(1).values, retrieved.rows.sort(1).values)
    lists = recommender.recommend(histories, K)
    for rows, possible in zip(lists.rows.tolist(), retrieved.rows.tolist(), strict=True):
        assert set(rows) <= set(possible)
    outside = (lists.rows[:, :, None] != retrieved.rows[:, None, :K]).all(2)
    assert outside.any(), "some come from behind the first"
    long = recommender.recommend(histories, 83)
    assert (long.rows != PADDING).all()


@pytest.mark.parametrize(
    ("serving", "ranked", "blocks", "k", "beside", "wanted"),
    [
        ({}, False, 0, 10, False, 10),
        ({}, True, 0, 10, False, 10),
        ({}, True, 1, 10, False, 64),
        ({}, True, 1, 65, False, 80),
        ({}, False, 0, 10, True, -(-CANDIDATES // STEP) * STEP),
        ({"diversity": 0.1}, False, 0, 10, False, -(-CANDIDATES // STEP) * STEP),
        ({"popularity": -0.1}, True, 0, 10, False, 64),
        ({"candidates": 33}, True, 1, 10, False, 48),
        ({"candidates": 33}, False, 0, 10, False, 10),
        ({"candidates": 33, "diversity": 1.0}, False, 0, 100, False, 112),
    ],
    ids=str,
)
def test_retrieval_names_as_many_as_are_wanted(
    serving: dict[str, Any], ranked: bool, blocks: int, k: int, beside: bool, wanted: int, ranked_bundles: dict[str, Path]
) -> None:
    ranker = Recommender.load(ranked_bundles["companions"]).ranker if ranked else None
    assert named(ServingSettings(**serving), ranker, blocks, k, beside) == wanted


@cache
def loaded(bundle: Path) -> Recommender:
    return Recommender.load(bundle)


ROWS = st.integers(FIRST_ITEM, FIRST_ITEM + LISTED + 5)
QUESTIONS = st.fixed_dictionaries(
    {
        "k": st.sampled_from([1, 7, 53, 1009]),
        "filter_seen": st.booleans(),
        "deny": st.lists(ROWS, max_size=29),
        "allow": st.none() | st.lists(ROWS, max_size=61),
        "diversity": st.none() | st.sampled_from([0.0, 0.3, 1.0]),
        "popularity": st.none() | st.sampled_from([0.0, 0.5, -2.0]),
    }
)


@pytest.mark.parametrize("kind", RANKERS)
@settings(max_examples=17, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(histories=st.lists(st.lists(ROWS, max_size=41), min_size=1, max_size=5), question=QUESTIONS)
def test_behind_a_ranker_no_forbidden_item_is_named_and_lists_are_full_and_the_same_alone_and_in_a_batch(
    kind: str, ranked_bundles: dict[str, Path], histories: list[list[int]], question: dict[str, Any]
) -> None:
    recommender, k = loaded(ranked_bundles[kind]), question["k"]
    lists = recommender.recommend(Batch.of(histories), **question)
    alone = Lists.joined([recommender.recommend(Batch.of([history]), **question) for history in histories], k)
    assert same(lists, alone)
    every = set(range(FIRST_ITEM, FIRST_ITEM + recommender.lines))
    allowed = (every if question["allow"] is None else every & set(question["allow"])) - set(question["deny"])
    plain = not question["diversity"] and not question["popularity"]
    for history, rows, scores in zip(histories, lists.rows.tolist(), lists.scores.tolist(), strict=True):
        possible = allowed - set(history if question["filter_seen"] else ())
        found = [row for row in rows if row != PADDING]
        assert set(found) <= possible
        assert len(set(found)) == min(k, len(possible))
        assert rows == found + [PADDING] * (k - len(found))
        assert scores[len(found) :] == [-math.inf] * (k - len(found))
        if plain:
            assert scores == sorted(scores, reverse=True)


def known(items: int = 101, seed: int = 0) -> Known:
    generator = torch.Generator().manual_seed(seed)
    logs_V = torch.randint(0, 1009, (items,), generator=generator).float().log1p()
    return Known(torch.randn(items, WIDTH, generator=generator), logs_V, items)


def greedy(rows: list[int], worths: list[float], vectors_VE: np.ndarray, diversity: float, chosen: list[int]) -> list[float]:
    """The value of every candidate for the place behind those chosen, as the formula says."""
    low, high = min(worths), max(worths)
    units_VE = vectors_VE / np.linalg.norm(vectors_VE, axis=1, keepdims=True)
    values = []
    for row, worth in zip(rows, worths, strict=True):
        relevance = (worth - low) / (high - low)
        if not chosen:
            values.append(relevance)
            continue
        alike = max(float(units_VE[row - FIRST_ITEM] @ units_VE[other - FIRST_ITEM]) for other in chosen)
        values.append(-math.inf if row in chosen else (1 - diversity) * relevance - diversity * alike)
    return values


@pytest.mark.parametrize("popularity", [0.0, 0.7])
@pytest.mark.parametrize("diversity", [0.05, 0.5, 0.9, 1.0])
def test_each_place_of_a_diverse_list_goes_to_the_best_by_relevance_less_likeness(diversity: float, popularity: float) -> None:
    items, generator = known(), torch.Generator().manual_seed(1)
    rows_BN = FIRST_ITEM + torch.rand(13, 101, generator=generator).argsort(1)[:, :48]
    scores_BN = 3 * torch.randn(13, 48, generator=generator)
    rows_BN[5, 29:], scores_BN[5, 29:] = PADDING, -torch.inf
    serving = ServingSettings(diversity=diversity, popularity=popularity)
    rows_BK, scores_BK = listed(rows_BN, scores_BN, items, serving, 31)
    vectors_VE, logs_V = items.vectors_VE.double().numpy(), items.logs_V.double()
    for rows, scores, found, found_scores in zip(rows_BN, scores_BN, rows_BK.tolist(), scores_BK.tolist(), strict=True):
        some = [int(row) for row in rows if row != PADDING]
        score = dict(zip(some, scores.tolist(), strict=False))
        worths = [score[row] - popularity * float(logs_V[row - FIRST_ITEM]) for row in some]
        places = [row for row in found if row != PADDING]
        assert len(set(places)) == len(places) == min(31, len(some))
        assert found_scores == [score[row] for row in places] + [-math.inf] * (31 - len(places))
        for place, row in enumerate(places):
            values = greedy(some, worths, vectors_VE, diversity, places[:place])
            assert values[some.index(row)] >= max(values) - 1e-6


def test_without_diversity_a_list_stays_and_with_more_of_it_its_items_are_less_alike(
    ranked_bundles: dict[str, Path], dataset: Dataset
) -> None:
    recommender, histories = loaded(ranked_bundles["companions"]), histories_of(dataset, 53)
    assert same(recommender.recommend(histories, K, diversity=0.0), recommender.recommend(histories, K))
    rows_BN, scores_BN = recommender.candidates(histories)
    alike = []
    for diversity in (0.0, 0.5, 0.9, 1.0):
        lists = recommender.recommend(histories, K, diversity=diversity)
        assert (lists.rows != PADDING).all()
        assert lists.rows[:, 0].equal(rows_BN.gather(1, scores_BN.argmax(1, keepdim=True))[:, 0])
        score = [
            dict(zip(rows, scores, strict=True)) for rows, scores in zip(rows_BN.tolist(), scores_BN.tolist(), strict=True)
        ]
        for line, rows in enumerate(lists.rows.tolist()):
            assert lists.scores[line].tolist() == [score[line][row] for row in rows]
        units = torch.nn.functional.normalize(recommender.known.vectors(lists.rows), dim=-1)
        alike.append(float((units @ units.mT).mean()))
    assert all(alike[0] > less + 0.02 for less in alike[1:])
    served = with_serving(ranked_bundles["companions"], diversity=0.9)
    assert same(served.recommend(histories, K), recommender.recommend(histories, K, diversity=0.9))
    assert same(served.recommend(histories, K, diversity=0.0), recommender.recommend(histories, K))


@pytest.mark.parametrize("popularity", [-1.5, 0.2, 3.0])
@pytest.mark.parametrize("kind", ["none", *RANKERS])
def test_less_popularity_puts_candidates_in_order_of_score_less_it(
    kind: str, popularity: float, ranked_bundles: dict[str, Path], dataset: Dataset
) -> None:
    recommender = loaded(ranked_bundles["look" if kind == "none" else kind])
    recommender = recommender.with_ranker(0) if kind == "none" else recommender
    histories, events = histories_of(dataset, 53), dataset.items["events"].to_list()
    rows_BN, scores_BN = recommender.candidates(histories)
    lists = recommender.recommend(histories, K, popularity=popularity)
    for rows, scores, found, found_scores in zip(
        rows_BN.tolist(), scores_BN.tolist(), lists.rows.tolist(), lists.scores.tolist(), strict=True
    ):
        worth = {
            row: score - popularity * math.log(1 + events[row - FIRST_ITEM]) for row, score in zip(rows, scores, strict=True)
        }
        values = [worth[row] for row in found]
        assert values == pytest.approx(sorted(worth.values(), reverse=True)[:K], abs=1e-4)
        assert values == pytest.approx(sorted(values, reverse=True), abs=1e-4)
        assert found_scores == [dict(zip(rows, scores, strict=True))[row] for row in found]
    assert not torch.equal(lists.rows, recommender.recommend(histories, K).rows)
    served = with_serving(ranked_bundles["look" if kind == "none" else kind], popularity=popularity)
    served = served.with_ranker(0) if kind == "none" else served
    assert same(served.recommend(histories, K), lists)


@pytest.mark.parametrize(
    "wrong",
    [
        {"diversity": 1.01},
        {"diversity": -0.01},
        {"diversity": math.nan},
        {"popularity": math.nan},
        {"popularity": math.inf},
        {"popularity": -math.inf},
    ],
    ids=str,
)
def test_a_diversity_or_popularity_that_is_none_is_one_line(wrong: dict[str, float], ranked_bundles: dict[str, Path]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))) as error:
        loaded(ranked_bundles["look"]).recommend(Batch.of([[3]]), 3, **wrong)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServingSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"candidates": -1}, {"ranker_blocks": -2}], ids=str)
def test_settings_of_lists_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
        ServingSettings(**wrong)  # type: ignore[arg-type]


def listed_in(answer: dict[str, Any]) -> dict[str, Any]:
    """What an answer over HTTP has of the recommender's."""
    return {name: value for name, value in answer.items() if name not in ("arm", "fallback")}


def test_every_option_of_a_list_comes_through_http(ranked_bundles: dict[str, Path]) -> None:
    recommender, history = loaded(ranked_bundles["companions"]), [5, 7, 11, 13]
    seen: list[list[int]] = []
    with asked(ranked_bundles["companions"]) as client:

        def ask(**options: Any) -> Any:
            response = client.post("/v1/recommend", json={"history": history, "times": [1, 2, 3, 4], "k": K, **options})
            assert response.status_code == 200, response.text
            return response.json()

        for options in ({}, {"diversity": 0.9}, {"popularity": 50.0}, {"diversity": 0.9, "popularity": -50}):
            answer = ask(**options)
            assert listed_in(answer) == recommender.answer(history, K, times=[1, 2, 3, 4], **options)
            assert not any("probability" in item for item in answer["items"])
            seen.append([item["item_id"] for item in answer["items"]])
        assert len({tuple(items) for items in seen}) == 4
        answer = ask(probabilities=True)
        assert listed_in(answer) == recommender.answer(history, K, times=[1, 2, 3, 4], probabilities=True)
        assert [item["item_id"] for item in answer["items"]] == seen[0]
        assert all(0 <= item["probability"] <= 1 for item in answer["items"])
        assert not any("probability" in item for item in ask(history=[], times=[], probabilities=True)["items"])
        for wrong, says in (
            ({"diversity": 1.5}, "diversity"),
            ({"diversity": -0.5}, "diversity"),
            ({"diversity": "much"}, "diversity"),
            ({"popularity": 101}, "popularity"),
            ({"popularity": [1]}, "popularity"),
            ({"probabilities": "perhaps"}, "probabilities"),
        ):
            response = client.post("/v1/recommend", json={"history": [5], "times": [1], **wrong})
            assert response.status_code == 422
            assert says in response.json()["detail"]
            assert "\n" not in response.json()["detail"]
        for number in ("NaN", "Infinity", "-Infinity"):
            for name in ("diversity", "popularity"):
                content = f'{{"history": [5], "times": [1], "{name}": {number}}}'.encode()
                assert client.post("/v1/recommend", content=content).status_code == 422


def test_probabilities_of_a_bundle_without_a_calibration_are_refused_in_one_line(run: Path, dataset: Dataset) -> None:
    recommender = Recommender.load(run)
    with pytest.raises(RequestError, match="not calibrated; export it with --dataset") as error:
        recommender.recommend(histories_of(dataset, 3), K, probabilities=True)
    assert "\n" not in str(error.value)
    assert recommender.recommend(histories_of(dataset, 3), K).probabilities is None


def drawn(lines: int, seed: int, count: int = 29) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Candidates, their scores, and the next item: by a softmax of 1.7 × score where it is one of them, as in 6 of 10."""
    generator = torch.Generator().manual_seed(seed)
    rows_BN = FIRST_ITEM + torch.rand(lines, 101, generator=generator).argsort(1)[:, :count]
    scores_BN = 2 * torch.randn(lines, count, generator=generator)
    none_BN = torch.rand(lines, count, generator=generator) < 0.1
    none_BN[:, 0] = False
    rows_BN[none_BN], scores_BN[none_BN] = PADDING, -torch.inf
    next_B1 = rows_BN.gather(1, (1.7 * scores_BN).softmax(1).multinomial(1, generator=generator))
    outside_B = torch.rand(lines, generator=generator) < 0.4
    return rows_BN, scores_BN, next_B1[:, 0].where(~outside_B, FIRST_ITEM + 1009)


def fitted(lines: int = 1009, seed: int = 0) -> Calibration:
    found = Calibration.fit(*drawn(lines, seed))
    assert found is not None
    return found


def test_a_calibration_is_the_isotonic_regression_of_hits_on_log_shares() -> None:
    rows_BN, scores_BN, next_B = drawn(1009, 0)
    some_BN = rows_BN != PADDING
    shares = (scores_BN.double() - scores_BN.double().logsumexp(1, keepdim=True))[some_BN].numpy()
    hits = (rows_BN == next_B[:, None])[some_BN].double().numpy()
    wanted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(shares, hits)
    scores_BN = drawn(211, 1)[1] * 1.5  # some beyond the ends
    found_BN = fitted().probabilities(scores_BN)
    assert found_BN.dtype == torch.float32
    there_BN = scores_BN > -torch.inf
    shares_BN = scores_BN.double().log_softmax(1)
    assert found_BN[there_BN].numpy() == pytest.approx(wanted.predict(shares_BN[there_BN].numpy()), abs=1e-6)
    assert not found_BN[~there_BN].any()
    beyond = torch.tensor([[50.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
    assert fitted().probabilities(beyond)[0].tolist() == pytest.approx([*wanted.predict([0.0, -50.0]), 0.0])


def test_a_calibration_is_straight_between_its_points_and_level_beyond_them() -> None:
    line = Calibration(torch.tensor([0.1, 0.2, 0.6]).double().log(), torch.tensor([0.25, 0.5, 0.75]).double())
    shares = torch.tensor([[0.05, 0.15, 0.8], [0.1, 0.2, 0.7], [0.4, 0.6, 0.0]]).double()
    half, third = math.log(1.5) / math.log(2), math.log(2) / math.log(3)
    wanted = [0.25, 0.25 + 0.25 * half, 0.75, 0.25, 0.5, 0.75, 0.5 + 0.25 * third, 0.75, 0.0]
    assert line.probabilities(shares.log()).flatten().tolist() == pytest.approx(wanted, abs=1e-6)


@given(st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=13))
def test_probabilities_lie_between_0_and_1_and_rise_with_the_score(scores: list[float]) -> None:
    found = FITTED.probabilities(torch.tensor([scores]))[0].tolist()
    assert all(0 <= chance <= 1 for chance in found)
    for one, first in zip(scores, found, strict=True):
        for other, second in zip(scores, found, strict=True):
            assert first <= second or one > other or first == pytest.approx(second, abs=1e-7)


FITTED = fitted()


def test_probabilities_are_those_of_held_out_draws() -> None:
    found, (rows_BN, scores_BN, next_B) = fitted(4001), drawn(4001, 1)
    chances, hits = found.probabilities(scores_BN).flatten().double(), (rows_BN == next_B[:, None]).flatten().double()
    assert float(chances.sum()) == pytest.approx(float(hits.sum()), rel=0.05)
    edges = torch.tensor([0.0, 0.002, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0]).double()
    judged = 0
    for low, high in pairwise(edges):
        chosen = (chances > low) & (chances <= high)
        deviation = 2**0.5 * (chances[chosen] * (1 - chances[chosen])).sum().sqrt()  # of the draws judged and the draws learnt
        assert abs(float(chances[chosen].sum() - hits[chosen].sum())) < 4 * float(deviation) + 1
        judged += int(chosen.sum() > 100)
    assert judged > 6
    shares = scores_BN.double().softmax(1).flatten()
    assert float((chances - hits).square().mean()) < float((shares - hits).square().mean())


def test_a_calibration_comes_back_from_a_manifest() -> None:
    again = Calibration.read(json.loads(json.dumps(fitted().as_dict())))
    assert again is not None
    scores_BN = drawn(53, 2)[1]
    assert torch.equal(again.probabilities(scores_BN), fitted().probabilities(scores_BN))
    assert Calibration.read(None) is None
    assert Calibration.read({}) is None


def test_where_no_candidate_ever_came_next_there_is_no_calibration_and_where_all_were_alike_it_is_level() -> None:
    rows_BN, scores_BN, next_B = drawn(53, 0)
    assert Calibration.fit(rows_BN, scores_BN, next_B.new_full((53,), 10**6)) is None
    level = Calibration.fit(rows_BN[:, :1], scores_BN[:, :1], next_B.where(torch.arange(53) % 2 == 0, rows_BN[:, 0]))
    assert level is not None
    chance = level.probabilities(scores_BN[:, :1])
    assert (chance == chance[0]).all()
    assert level.probabilities(torch.tensor([[3.0, -torch.inf]])).tolist() == [[float(chance[0]), 0.0]]
    assert 0.4 < float(chance[0]) < 0.7


def test_listed_probabilities_are_those_of_their_candidates(ranked_bundles: dict[str, Path], dataset: Dataset) -> None:
    recommender, s = loaded(ranked_bundles["companions"]), dataset.sequences
    histories = gather(
        s.items, s.times, torch.cat([s.offsets[:53], s.offsets[:1]]), torch.cat([s.offsets[1:54], s.offsets[:1]])
    )
    assert recommender.calibration is not None
    anew = calibrated(recommender, dataset)["calibration"]  # by the graph, where export had the run's torch
    assert recommender.manifest["calibration"] == {name: pytest.approx(anew[name], rel=1e-4, abs=1e-6) for name in anew}
    rows_BN, scores_BN = recommender.candidates(histories)
    chances_BN = recommender.calibration.probabilities(scores_BN)
    plain = recommender.recommend(histories, K)
    for options in ({}, {"diversity": 0.7}, {"popularity": 1.5}):
        lists = recommender.recommend(histories, K, probabilities=True, **options)
        assert lists.probabilities is not None
        assert same(lists, recommender.recommend(histories, K, **options))
        for line in range(53):
            chance = dict(zip(rows_BN[line].tolist(), chances_BN[line].tolist(), strict=True))
            assert lists.probabilities[line].tolist() == [chance[row] for row in lists.rows[line].tolist()]
        assert lists.popular.tolist() == [False] * 53 + [True]
        assert not lists.probabilities[53].any()
    assert plain.probabilities is None


def test_served_probabilities_are_those_of_draws_by_users_that_it_was_not_calibrated_by(
    ranked_bundles: dict[str, Path], dataset: Dataset
) -> None:
    """Each user draws the next item by a softmax of half the ranked scores, or in 3 of 10 cases one that is no candidate."""
    recommender = Recommender.load(ranked_bundles["companions"])
    generator = torch.Generator().manual_seed(0)
    histories = Batch.of(
        [
            torch.randint(FIRST_ITEM, FIRST_ITEM + 499, (length,), generator=generator).tolist()
            for length in torch.randint(1, 17, (2003,), generator=generator).tolist()
        ]
    )
    rows_BN, scores_BN = recommender.candidates(histories)
    next_B = rows_BN.gather(1, (0.5 * scores_BN).softmax(1).multinomial(1, generator=generator))[:, 0]
    next_B = next_B.where(torch.rand(2003, generator=generator) < 0.7, FIRST_ITEM + LISTED)
    learnt = 1009
    recommender.calibration = Calibration.fit(rows_BN[:learnt], scores_BN[:learnt], next_B[:learnt])
    held_out = gather(histories.values, histories.times, histories.offsets[learnt:-1], histories.offsets[learnt + 1 :])
    lists = recommender.recommend(held_out, rows_BN.shape[1], probabilities=True)
    assert lists.probabilities is not None
    assert (lists.probabilities.diff(dim=1) <= 1e-6).all()
    hits = (lists.rows == next_B[learnt:, None]).double().flatten()
    chances = lists.probabilities.double().flatten()
    edges = [0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0]
    for low, high in pairwise(edges):
        chosen = (chances > low) & (chances <= high)
        deviation = 2**0.5 * (chances[chosen] * (1 - chances[chosen])).sum().sqrt()
        assert abs(float(chances[chosen].sum() - hits[chosen].sum())) < 4 * float(deviation) + 1
    assert float(chances.sum()) == pytest.approx(0.7 * (2003 - learnt), rel=0.1)


@pytest.mark.parametrize("kind", INDEXES)
def test_a_calibration_is_of_what_requests_find(kind: str, bundles: dict[str, Path], dataset: Dataset) -> None:
    recommender = Recommender.load(bundles[kind])
    stored, anew = recommender.manifest["calibration"], calibrated(recommender, dataset)["calibration"]
    assert stored == {name: pytest.approx(anew[name], rel=1e-4, abs=1e-6) for name in anew}


def test_without_a_validation_split_there_is_no_calibration(run: Path, dataset: Dataset) -> None:
    recommender = Recommender.load(run)
    assert calibrated(recommender, None) == {}
    assert set(calibrated(recommender, dataset)) == {"calibration"}


@pytest.fixture(scope="module")
def approximate(tmp_path_factory: pytest.TempPathFactory, ranked_bundles: dict[str, Path]) -> Path:
    """The bundle `look` with an index that misses some."""
    out = tmp_path_factory.mktemp("approximate") / "bundle"
    export(ranked_bundles["look"].parent / "run-look", out, IndexSettings(kind="ivf", probes=1))
    return out


def by_hand(recommender: Recommender, dataset: Dataset, ks: tuple[int, ...]) -> dict[str, float]:
    """Figures of the test split by the scores of retrieval, in no list."""
    s = dataset.sequences
    begins, ends, targets = s.windows("test")
    users = ((ends > begins) & (targets > ends)).nonzero().flatten()
    history, future = (gather(s.items, s.times, a[users], b[users]) for a, b in ((begins, ends), (ends, targets)))
    scores = (recommender.encode(history).double() @ recommender.scan.vectors_VE.double().T).float()
    scores[history.owners, history.values - FIRST_ITEM] = -torch.inf
    owners, wanted = new_targets(history, future)
    return measure(target_ranks(scores, owners, wanted - FIRST_ITEM), owners, len(users), ks)


def lists_by_hand(recommender: Recommender, dataset: Dataset, ks: tuple[int, ...]) -> dict[str, float]:
    """Figures of the test split by the lists that are answered."""
    s = dataset.sequences
    begins, ends, targets = s.windows("test")
    users = ((ends > begins) & (targets > ends)).nonzero().flatten()
    history, future = (gather(s.items, s.times, a[users], b[users]) for a, b in ((begins, ends), (ends, targets)))
    ranks, owners = [], []
    for place, rows in enumerate(recommender.recommend(history, max(ks)).rows.tolist()):
        before, after = (set(part.values[part.offsets[place] : part.offsets[place + 1]].tolist()) for part in (history, future))
        ranks += [rows.index(row) + 1 if row in rows else 2**31 - 1 for row in after - before]
        owners += [place] * len(after - before)
    return measure(torch.tensor(ranks), torch.tensor(owners), len(users), ks)


@pytest.mark.parametrize("kind", ["exact", "approximate"])
@pytest.mark.parametrize("blocks", [0, 1])
def test_a_report_names_each_stage_of_the_served_path(
    kind: str, blocks: int, ranked_bundles: dict[str, Path], approximate: Path, dataset: Dataset
) -> None:
    recommender = loaded(ranked_bundles["look"] if kind == "exact" else approximate).with_ranker(blocks)
    report: Evaluation = evaluate(recommender, dataset, ks=(10, 37))
    stage = "model, as retrieved" if blocks else "model, ranked"
    search = [] if kind == "exact" else ["model, exact search"]
    assert list(report.figures) == ["model", stage, *search, *BASELINES]
    wanted = {"model": recommender, stage: recommender.with_ranker(1 - blocks)}
    if search:
        wanted["model, exact search"] = recommender.with_ranker(0).with_exact_search()
    for name, lister in wanted.items():
        assert report.figures[name] == pytest.approx(lists_by_hand(lister, dataset, (10, 37)), abs=1e-9)
    exact = {"exact": "model" if blocks == 0 else stage, "approximate": "model, exact search"}[kind]
    assert report.figures[exact] == pytest.approx(by_hand(recommender, dataset, (10, 37)), abs=1e-9)
    alone = evaluate(recommender, dataset, ks=(10, 37), baselines=False)
    assert alone.figures == {"model": report.figures["model"]}


@pytest.mark.parametrize("serving", [{}, {"diversity": 0.6, "popularity": 0.3}], ids=str)
def test_the_nightly_lists_and_the_report_hold_the_lists_that_are_answered(
    serving: dict[str, float], ranked_bundles: dict[str, Path], dataset: Dataset, tmp_path: Path
) -> None:
    recommender, s = with_serving(ranked_bundles["companions"], **serving), dataset.sequences
    night = score_all(recommender, dataset, tmp_path, k=K)
    file = lists_of(tmp_path)
    assert file.columns == ["user_id", "item_id", "rank", "score"]
    assert night.manifest["underfilled"] == 0
    report = evaluate(recommender, dataset, ks=(K,), baselines=False)
    _, ends, _ = s.windows("test")
    judged = {user: place for place, user in enumerate(report.user_ids.to_list())}
    for user in range(0, 211, 17):
        own = file.filter(user_id=dataset.user_ids[user]).sort("rank")
        whole = gather(s.items, s.times, s.offsets[user, None], s.offsets[user + 1, None])
        lists = recommender.recommend(whole, K)
        assert own["item_id"].to_list() == [recommender.catalogue.item_id(row) for row in lists.rows[0].tolist()]
        assert own["score"].to_list() == lists.scores[0].tolist()
        place = judged.get(dataset.user_ids[user])
        if place is not None:
            before = gather(s.items, s.times, s.offsets[user, None], ends[user, None])
            assert torch.equal(report.lists.rows[place], recommender.recommend(before, K).rows[0])
    assert judged


def test_a_ranker_is_exported_and_loaded_byte_for_byte(ranked_bundles: dict[str, Path]) -> None:
    for kind, wanted in RANKERS.items():
        bundle, run = (
            open_directory(path).manifest
            for path in (ranked_bundles[kind], ranked_bundles[kind].parent / f"run-{kind}" / "model")
        )
        files = {"ranker.safetensors", *(["companions.safetensors"] if wanted.companions else [])}
        assert files <= set(bundle["files"])
        assert all(bundle["files"][file] == run["files"][file] for file in files)
        ranker = loaded(ranked_bundles[kind]).ranker
        assert ranker is not None
        assert ranker.settings == wanted == RankerSettings(**bundle["recipe"]["ranker"])


def test_no_histories_have_no_candidates_scores_or_lists(ranked_bundles: dict[str, Path]) -> None:
    recommender, none = loaded(ranked_bundles["look"]), Batch.of([], [])
    assert recommender.candidates(none)[1].shape[0] == 0
    assert recommender.score(none, torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)
    assert recommender.recommend(none, K).rows.shape == (0, K)
