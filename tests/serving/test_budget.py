"""The choice within a budget: by made-up figures, by lists judged by hand, and in the bundle that serves with it."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.build import build
from features.dataset import Dataset
from recsys.__main__ import main
from recsys.batch import Batch
from recsys.bundle import open_directory, renew
from recsys.config import Recipe
from recsys.errors import BundleError, RequestError
from recsys.ranker import RankerSettings
from serving import export as export_module
from serving.engine import Recommender
from serving.evaluation import budget as module
from serving.evaluation.budget import (
    CANDIDATES,
    Budget,
    Found,
    Measured,
    Profile,
    Timed,
    choices,
    choose,
    draw,
    frontier,
    judge_profiles,
    spend,
    write,
)
from serving.export import export
from serving.index import IndexSettings
from serving.items import opened
from serving.ranking import ServingSettings
from serving.states import DepthSettings
from tests.serving.conftest import write_run

CURVE = [{"blocks": 3.0, "leave": [2.0, 2.0]}, {"blocks": 1.7, "leave": [0.5, 0.7]}, {"blocks": 1.0, "leave": [-2.0, -2.0]}]
"""Of a model of three blocks."""
RANKER = RankerSettings(blocks=2, width=24, heads=2, hidden_size=37, span=16, companions=7, candidates=48)
CHOSEN = Profile(ServingSettings(candidates=100, ranker_blocks=1), DepthSettings(1.7), IndexSettings("ivf", probes=3), "probes")
"""Nothing that a bundle has by itself."""


def made_up(ndcg: int, p99: float, mean: float = 1.0, candidates: int = 0) -> Measured:
    profile = Profile(ServingSettings(candidates=candidates), DepthSettings(), IndexSettings())
    return Measured(profile, {"recall@10": 0.0, "ndcg@10": ndcg / 10_000}, Timed(p99 / 2, p99, mean))


FIGURES = st.lists(
    st.builds(made_up, st.integers(0, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99)), min_size=1, max_size=20
)
BUDGETS = st.one_of(
    st.builds(Budget, latency_ms=st.integers(1, 9)), st.builds(Budget, price=st.integers(1, 9), core_hour=st.just(3.6))
)


def beats(one: Measured, other: Measured, budget: Budget) -> bool:
    """In neither worse, in one better."""
    a, b = ((budget.cost(found.timed), -found.ndcg) for found in (one, other))
    return a != b and a[0] <= b[0] and a[1] <= b[1]


@given(FIGURES, BUDGETS)
def test_the_frontier_is_all_that_nothing_beats(measured: list[Measured], budget: Budget) -> None:
    line = frontier(measured, budget)
    best = [one for one in measured if not any(beats(other, one, budget) for other in measured)]
    assert all(one in best for one in line)
    assert {(budget.cost(one.timed), one.ndcg) for one in line} == {(budget.cost(one.timed), one.ndcg) for one in best}
    for one, other in itertools.pairwise(line):
        assert budget.cost(one.timed) < budget.cost(other.timed)
        assert one.ndcg < other.ndcg


@given(FIGURES, BUDGETS)
def test_the_chosen_is_the_best_within_the_budget_and_of_equals_the_cheapest(measured: list[Measured], budget: Budget) -> None:
    within = [one for one in measured if budget.cost(one.timed) <= budget.limit]
    if not within:
        with pytest.raises(RequestError, match="no profile keeps to"):
            choose(measured, budget, lambda one: one.timed)
        return
    chosen, alone = choose(measured, budget, lambda one: one.timed)
    assert chosen in within
    assert alone == [chosen.timed]
    assert chosen.ndcg == max(one.ndcg for one in within)
    equals = [budget.cost(one.timed) for one in within if one.ndcg == chosen.ndcg]
    assert budget.cost(chosen.timed) == min(equals)
    assert not any(beats(other, chosen, budget) for other in measured)


def test_what_breaks_its_promise_gives_way_to_the_next_best() -> None:
    measured = [made_up(3, 2), made_up(5, 4), made_up(4, 5), made_up(9, 8), made_up(9, 11)]
    asked: list[float] = []

    def again(one: Measured, slower: float) -> Timed:
        asked.append(one.timed.p99_ms)
        return replace(one.timed, p99_ms=one.timed.p99_ms * slower)

    chosen, alone = choose(measured, Budget(latency_ms=10), lambda one: again(one, 1.5))
    assert (chosen, [timed.p99_ms for timed in alone], asked) == (measured[1], [12, 6], [8, 4])
    verdict = Found(Budget(latency_ms=10), 10, 100, measured, measured, chosen, alone).verdict
    assert (
        verdict
        == "NDCG@10 0.0005 at a p99 of 6 ms, within a p99 of 10 ms; better profiles broke their promise (a p99 of 12 ms)"
    )
    asked.clear()
    with pytest.raises(RequestError, match=r"NDCG@10 0.0003\) took a p99 of 2 ms, alone a p99 of 18 ms; allow more") as error:
        choose(measured, Budget(latency_ms=10), lambda one: again(one, 9))
    assert asked == [8, 4, 2]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({}, "the budget has no limit; give either"),
        ({"core_hour": 1.0}, "the budget has no limit; give either"),
        ({"latency_ms": 1.0, "price": 1.0, "core_hour": 1.0}, "both --latency-ms and --price"),
        ({"price": 1.0}, "without --core-hour"),
        ({"latency_ms": 0.0}, "--latency-ms is 0.0; give more than 0"),
        ({"latency_ms": math.nan}, "--latency-ms is nan"),
        ({"price": 1.0, "core_hour": -1.0}, "--core-hour is -1.0"),
    ],
    ids=str,
)
def test_a_budget_that_is_none_is_refused(given_: dict[str, float], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Budget(**given_)


def test_the_price_is_that_of_the_hours_of_a_million_answers() -> None:
    timed = Timed(1, 99, mean_ms=7.2)  # two hours
    assert Budget(price=1.0, core_hour=0.05).cost(timed) == pytest.approx(0.1)
    assert Budget(latency_ms=1.0, core_hour=0.05).priced(timed) == pytest.approx(0.1)
    assert Budget(latency_ms=1.0, core_hour=0.05).cost(timed) == 99
    assert Budget(latency_ms=1.0).priced(timed) is None


def test_99_of_100_answers_are_within_the_p99() -> None:
    times = [0.001 * (1 + number * 37 % 200) for number in range(200)]
    timed = Timed.of(times)
    assert sum(1000 * one <= timed.p99_ms + 1e-9 for one in times) == 199
    assert (timed.p50_ms, timed.mean_ms) == (101, 100.5)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory, shop: Dataset) -> dict[str, Path]:
    """Bundles of a model with early exit and a ranker, by index."""
    folder = tmp_path_factory.mktemp("ranked")
    run = write_run(folder / "run", shop, scale=1, ranker=RANKER, blocks=3, early_exit=True)
    renew(open_directory(run / "model"), run / "model", {}, {"depth_curve": CURVE})
    for kind in ("exact", "ivf", "hnsw"):
        export(run, folder / kind, IndexSettings(kind=kind))
    return {kind: folder / kind for kind in ("exact", "ivf", "hnsw")}


@pytest.fixture
def bundle(ranked: dict[str, Path], tmp_path: Path) -> Path:
    """One that may be changed."""
    return shutil.copytree(ranked["ivf"], tmp_path / "bundle")


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few requests are timed, and explanations are measured by few histories."""
    monkeypatch.setattr(module, "REQUESTS", 5)
    monkeypatch.setattr(module, "WARM", 2)
    monkeypatch.setattr(export_module, "HISTORIES", 3)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """command(word, …) → its exit code, in this process."""

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["recsys", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lists_of(recommender: Recommender) -> tuple[list[list[int]], list[list[float]]]:
    lists = recommender.recommend(Batch.of([[2, 3, 5], [7, 11, 13, 17, 19], [23], []]), 13)
    return lists.rows.tolist(), lists.scores.tolist()


@pytest.mark.parametrize(
    ("kind", "looks", "entries"),
    [("exact", "", [None]), ("ivf", "probes", [8]), ("hnsw", "breadth", [50, 100, 200, 400])],
)
def test_every_combination_is_tried_once(kind: str, looks: str, entries: list[int], ranked: dict[str, Path]) -> None:
    rankings, depths, searches, named = choices(Recommender.load(ranked[kind]))
    tried = [(settings.ranker_blocks, settings.candidates) for settings in rankings]
    assert tried == [(0, 0), *((blocks, candidates) for blocks in (1, 2) for candidates in CANDIDATES)]
    assert [depth.blocks for depth in depths] == [1.0, 1.7, 0.0]
    assert (named, [getattr(search, named, None) for search in searches]) == (looks, entries)


def test_no_more_is_tried_than_there_is(shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(write_run(tmp_path / "run", shop), tmp_path / "bundle", IndexSettings())
    recommender = Recommender.load(tmp_path / "bundle")
    rankings, depths, searches, looks = choices(recommender)
    assert ([one.ranker_blocks for one in rankings], depths, len(searches), looks) == ([0], [DepthSettings()], 1, "")
    monkeypatch.setattr(module, "CANDIDATES", (70, 10_000, 20_000))
    export(write_run(tmp_path / "ranked", shop, ranker=RANKER), tmp_path / "bundle", IndexSettings())
    recommender = Recommender.load(tmp_path / "bundle")
    assert [one.candidates for one in choices(recommender)[0]] == [0, 70, recommender.items, 70, recommender.items]


def test_what_is_no_better_than_a_cheaper_entry_beside_the_cheapest_and_the_fullest_is_left_out(
    ranked: dict[str, Path],
) -> None:
    judged: list[Profile] = []
    looks = {50: (1, 1), 100: (2, 1), 200: (2, 1), 400: (1, 2)}  # of lists as retrieved and of ranked ones

    def worth(profile: Profile, tell: Callable[[int], None]) -> dict[str, float]:
        judged.append(profile)
        blocks = profile.depth.blocks or 3
        return {
            "ndcg@10": looks[profile.index.breadth][bool(profile.serving.ranker_blocks)] / 1000
            + (0.5 if blocks == 1.7 else 0.1 * blocks)
        }

    found = judge_profiles(Recommender.load(ranked["hnsw"]), worth, 7, lambda what, done, of: None)
    assert {profile.depth.blocks for profile in found} == {1.0, 1.7}
    assert {profile.index.breadth for profile in found} == {50, 100, 400}
    assert len(found) == 9 * 2 * 3
    assert len(judged) == len(set(judged)) < 9 * 3 * 4


@pytest.mark.usefixtures("_quick")
def test_lists_are_judged_by_the_first_event_of_each_user_if_it_is_new(tmp_path: Path) -> None:
    events = [(user, user * (day + 3) % 29, 86_400 * (100 + day)) for user in range(1, 60) for day in range(3 + user % 5)]
    events += [(user, item % 29, 86_400 * 110 + item) for user in range(1, 60) for item in (user * 3 % 7, 5 * user, 7 * user)]
    frame = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row").unique(["user_id", "item_id"])
    repeated = pl.DataFrame({"user_id": [1], "item_id": [3], "timestamp": [86_400 * 109 + 1]})
    pl.concat([frame, repeated]).write_parquet(tmp_path / "events.parquet")
    split = {"method": "global_time", "test_start": 86_400 * 111, "validation_days": 3}
    build(tmp_path, Recipe("tiny", {"split": split, "data": {"repeats": "keep"}}), tmp_path / "dataset")
    data = Dataset.open(tmp_path / "dataset")
    run = write_run(tmp_path / "run", data, ranker=RANKER, time="gaps", request_time=True)
    export(run, tmp_path / "bundle", IndexSettings())
    recommender, s = Recommender.load(tmp_path / "bundle"), data.sequences
    found = spend(recommender, data, Budget(latency_ms=1e9), k=3)
    assert len({one.ndcg for one in found.measured}) == len(found.measured) == 3
    for one in found.measured:
        lister, gains = one.profile.of(recommender), []
        for begin, end, last in zip(*(part.tolist() for part in s.windows("validation")), strict=True):
            history, first = s.items[begin:end].tolist(), int(s.items[end]) if last > end else 0
            if first and history and first not in history:
                times = [s.times[begin:end].tolist()]
                rows = lister.recommend(Batch.of([history], times), 10, int(s.times[end])).rows[0].tolist()
                gains.append(1 / math.log2(rows.index(first) + 2) if first in rows else 0.0)
        assert found.users == len(gains)
        assert one.ndcg == round(sum(gains) / len(gains), 4)


def found_by(chosen: Profile, timed: Timed) -> Found:
    one = Measured(chosen, {"recall@10": 0.3, "ndcg@10": 0.2}, timed)
    return Found(Budget(latency_ms=10, core_hour=0.05), 10, 100, [one], [one], one, [timed])


@pytest.mark.usefixtures("_quick")
def test_the_written_bundle_serves_with_the_chosen_profile_and_the_old_one_serves_on(bundle: Path, shop: Dataset) -> None:
    old = Recommender.load(bundle)
    before = lists_of(old)
    with opened(bundle) as directory:
        recommender = Recommender(directory)
        wanted = lists_of(CHOSEN.of(recommender))
        manifest = write(found_by(CHOSEN, Timed(1, 2, 1.5)), recommender, shop, directory, bundle)
    assert wanted != before
    new = Recommender.load(bundle)
    assert (new.serving, new.ranker_blocks, new.leave) == (CHOSEN.serving, 1, [0.5, 0.7])
    assert new.searcher.settings == CHOSEN.index  # type: ignore[attr-defined]
    assert lists_of(new) == wanted
    assert lists_of(old) == before
    assert new.id == manifest["id"] != old.id == manifest["before"]
    judged = {"candidates": 100, "ranker_blocks": 1, "depth": 1.7, "probes": 3, "recall@10": 0.3, "ndcg@10": 0.2}
    assert manifest["budget"]["chosen"] == judged
    assert manifest["budget"]["limit"] == {"latency_ms": 10, "core_hour": 0.05}
    assert manifest["clock"]["budget"]["again"] == {"p50_ms": 1, "p99_ms": 2, "mean_ms": 1.5}
    assert manifest["clock"]["run"] == old.manifest["clock"]["run"]
    assert manifest["index"]["recall@100"] != old.manifest["index"]["recall@100"]
    assert manifest["index"]["queries"] == "histories"
    assert {"calibration", "faithfulness"} <= manifest.keys() - old.manifest.keys()


@pytest.mark.usefixtures("_quick")
def test_the_same_choice_is_the_same_bundle_however_long_it_took(bundle: Path, shop: Dataset, tmp_path: Path) -> None:
    made = []
    for milliseconds in (1.0, 2.0):
        with opened(bundle) as directory:
            found = found_by(CHOSEN, Timed(milliseconds, milliseconds, milliseconds))
            made.append(write(found, Recommender(directory), shop, directory, tmp_path / f"{milliseconds}"))
    one, other = made
    assert one["clock"]["budget"] != other["clock"]["budget"]
    assert one["id"] == other["id"]
    assert {**one, "clock": 0} == {**other, "clock": 0}


@pytest.mark.usefixtures("_quick")
def test_each_request_goes_to_every_profile_and_the_chosen_is_asked_by_others(
    ranked: dict[str, Path], shop: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    answer = Recommender.answer

    def heard(self: Recommender, history: list[int], k: int, **rest: Any) -> dict[str, Any]:
        asked.append((self.serving, tuple(history), k))
        return answer(self, history, k, **rest)

    monkeypatch.setattr(Recommender, "answer", heard)
    monkeypatch.setattr(
        module,
        "choices",
        lambda _: ([ServingSettings(ranker_blocks=b) for b in (0, 1, 2)], [DepthSettings()], [IndexSettings()], ""),
    )
    found = spend(Recommender.load(ranked["exact"]), shop, Budget(latency_ms=1e9), k=7)
    assert {k for _, _, k in asked} == {7}
    together, alone = asked[: 3 * 7], asked[3 * 7 :]  # of 2 + 5 requests
    for number in range(7):
        turn = together[3 * number : 3 * number + 3]
        assert len({history for _, history, _ in turn}) == 1
        assert {serving.ranker_blocks for serving, _, _ in turn} == {0, 1, 2}
    assert {together[3 * number][0].ranker_blocks for number in range(3)} == {0, 1, 2}
    assert {serving for serving, _, _ in alone} == {found.chosen.profile.serving}
    assert len({history for _, history, _ in alone}) == 5
    assert not {history for _, history, _ in alone} & {history for _, history, _ in together}


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--latency-ms", "1e-6"], "no profile keeps to a p99 of 1e-06 ms: the cheapest ("),
        (["--price", "1e-9", "--core-hour", "1"], "no profile keeps to 1e-09 for a million answers: the cheapest ("),
        (["--latency-ms", "9", "--price", "1", "--core-hour", "1"], "both --latency-ms and --price are given"),
        ([], "the budget has no limit"),
        (["--latency-ms", "1e9", "-k", "0"], "k is 0"),
        (["--latency-ms", "1e9", "--picture", "/no/such/folder/budget.png"], "/no/such/folder/budget.png: cannot be written"),
    ],
    ids=str,
)
def test_a_refused_budget_is_one_line_and_leaves_the_bundle_as_it_was(
    words: list[str],
    says: str,
    bundle: Path,
    shop: Dataset,
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(bundle)
    assert command("budget", bundle, "--dataset", shop.path, "--out", tmp_path / "new", "--users", 11, *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "answers" not in line or line.startswith("recsys: ")]
    assert line.startswith("recsys: ")
    assert says in line
    assert contents(bundle) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("_quick")
def test_the_command_writes_the_best_profile_within_the_budget(
    bundle: Path, shop: Dataset, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(bundle)
    words = ("budget", bundle, "--dataset", shop.path, "--price", "1e9", "--core-hour", "0.05", "--users", 11, "--no-register")
    assert command(*words, "--out", tmp_path / "new", "--picture", tmp_path / "budget.png", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert contents(bundle) == before
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")
    assert told["chosen"] == told["frontier"][-1]
    assert told["chosen"]["ndcg@10"] == max(one["ndcg@10"] for one in told["measured"])
    for one in told["measured"]:
        assert one["price"] == pytest.approx(one["mean_ms"] / 3.6 * 0.05, rel=1e-3)
    new = Recommender.load(tmp_path / "new")
    assert new.id == told["bundle"]
    assert new.ranker_blocks == told["chosen"]["ranker_blocks"]
    assert new.searcher.settings.probes == told["chosen"]["probes"]  # type: ignore[attr-defined]
    assert command(*words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.count("→") for line in shown].count(1) == 1
    assert "for a million answers, within 1e+09 for a million answers" in shown[-1]
    assert Recommender.load(bundle).manifest["before"] == json.loads(before["manifest.json"])["id"]


def test_a_run_has_no_budget(tmp_path: Path, shop: Dataset) -> None:
    run = write_run(tmp_path / "run", shop)
    with pytest.raises(BundleError, match="holds a model, not a bundle"), opened(run / "model"):
        pass


@pytest.mark.parametrize("budget", [Budget(latency_ms=5, core_hour=0.1), Budget(price=0.1, core_hour=0.05)], ids=str)
def test_one_profile_or_many_can_be_drawn(budget: Budget, tmp_path: Path) -> None:
    many = [made_up(5 * number, 0.5 * 1.3**number, 0.2 * 1.3**number, 50 * number) for number in range(1, 17)]
    for measured in (many[:1], many):
        line = frontier(measured, budget)
        draw(Found(budget, 10, 100, measured, line, line[0], [line[0].timed]), tmp_path / "budget.png")
        assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")
