"""The judge: by hand on lists that are known, and its lists as they are written."""

import math
from pathlib import Path

import polars as pl
import pytest
import torch

from features.build import build
from features.dataset import Dataset
from features.split import SplitSettings, is_cold
from recsys.batch import FIRST_ITEM, Batch, gather
from recsys.config import Recipe
from recsys.errors import DataError, RequestError
from recsys.metrics import measure, new_targets, target_ranks
from serving.engine import Recommender
from serving.evaluation.judge import Evaluation, evaluate
from serving.evaluation.protocol import ProtocolSettings
from tests.serving.conftest import write_run, write_shop

KS = (10, 50, 1009)
"""The last is more than there are items."""


@pytest.fixture(scope="module")
def report(run: Path, dataset: Dataset) -> Evaluation:
    return evaluate(Recommender.load(run), dataset, ks=KS)


def score(lists: pl.DataFrame, targets: dict[str, set[int]], k: int) -> dict[str, float]:
    """Recall and NDCG at k of written lists, in plain words."""
    recall, ndcg = [], []
    for user, wanted in targets.items():
        items = lists.filter(pl.col("user_id") == user).sort("rank")["item_id"].to_list()[:k]
        ranks = [rank for rank, item in enumerate(items, 1) if item in wanted]
        possible = min(k, len(wanted))
        recall.append(len(ranks) / possible)
        ndcg.append(
            sum(1 / math.log2(rank + 1) for rank in ranks) / sum(1 / math.log2(rank + 1) for rank in range(1, possible + 1))
        )
    return {f"recall@{k}": sum(recall) / len(recall), f"ndcg@{k}": sum(ndcg) / len(ndcg)}


@pytest.mark.parametrize("repeats", [False, True])
def test_the_figures_are_those_of_the_written_lists(repeats: bool, dataset: Dataset, run: Path, tmp_path: Path) -> None:
    events = pl.DataFrame({"user_id": ["u", "u", "v", "v", "v", "v", "v", "w", "x", "x", "y", "y"]}).with_columns(
        item_id=pl.Series([1, 2, 1, 3, 1, 4, 5, 2, 3, 10**6, 4, 4]),
        timestamp=pl.Series([1, 50, 1, 2, 50, 51, 51, 3, 4, 50, 4, 50]),
    )
    events.write_parquet(tmp_path / "events.parquet")
    split = {"split": {"method": "global_time", "test_start": 10, "validation_days": 0}}
    build(tmp_path, Recipe("tiny", split), tmp_path / "dataset")
    data = Dataset.open(tmp_path / "dataset")
    recommender = Recommender.load(write_run(tmp_path / "run", data))
    assert recommender.items == 4
    protocol = ProtocolSettings(targets="all" if repeats else "new", filter_seen=not repeats)
    report = evaluate(recommender, data, protocol, ks=(1, 2, 5), baselines=False)
    new = {"u": {2}, "v": {4, 5}, "x": {10**6}}
    targets = {"u": {2}, "v": {1, 4, 5}, "x": {10**6}, "y": {4}} if repeats else new
    assert report.users == len(targets)
    lists = report.frame()
    for k in (1, 2, 5):
        for name, value in score(lists, targets, k).items():
            assert report.figures["model"][name] == pytest.approx(value, abs=1e-9)
    had = lists.filter(user_id="v")["item_id"].is_in([1, 3]).any()
    assert had if repeats else not had


def test_the_figures_are_those_of_exact_ranks(report: Evaluation, run: Path, dataset: Dataset) -> None:
    recommender, s = Recommender.load(run), dataset.sequences
    begins, ends, targets = s.windows("test")
    users = ((ends > begins) & (targets > ends)).nonzero().flatten()
    history, future = (gather(s.items, s.times, a[users], b[users]) for a, b in ((begins, ends), (ends, targets)))
    scores = recommender.encode(history).double() @ recommender.scan.vectors_VE.double().T
    scores[history.owners, history.values - FIRST_ITEM] = -torch.inf
    owners, wanted = new_targets(history, future)
    for name, value in measure(target_ranks(scores, owners, wanted - FIRST_ITEM), owners, len(users)).items():
        assert report.figures["model"][name] == pytest.approx(value, abs=1e-9)


def test_full_lists_hold_every_new_item_once(report: Evaluation, dataset: Dataset) -> None:
    frame = report.frame()
    assert frame.columns == ["user_id", "item_id", "rank", "score"]
    assert (
        frame.group_by("user_id")
        .agg((pl.col("rank").max() == pl.len()) & (pl.col("item_id").n_unique() == pl.len()))["rank"]
        .all()
    )
    assert report.lists.underfilled == len(report.user_ids)


def test_every_baseline_stands_beside_the_model(report: Evaluation) -> None:
    assert list(report.figures) == ["model", "popularity", "recent popularity", "item-kNN", "EASE"]
    wanted = {f"{metric}@{k}" for metric in ("recall", "ndcg") for k in KS}
    assert all(set(figures) == wanted for figures in report.figures.values())


def test_a_bundle_that_approximates_stands_beside_its_exact_search(
    bundles: dict[str, Path], report: Evaluation, dataset: Dataset
) -> None:
    heard: list[tuple[int, int]] = []
    both = evaluate(Recommender.load(bundles["ivf"]), dataset, ks=KS, progress=lambda done, of: heard.append((done, of)))
    assert both.figures["model, exact search"] == report.figures["model"]
    assert heard[-1][0] == heard[-1][1]
    assert heard == sorted(heard)


def test_nobody_to_judge_is_an_error(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    pl.DataFrame({"user_id": ["a", "b"], "item_id": [1, 1], "timestamp": [1, 2]}).write_parquet(tmp_path / "events.parquet")
    build(tmp_path, Recipe("tiny", {}), tmp_path / "dataset")
    with pytest.raises(DataError, match="no user with a history and a target"):
        evaluate(Recommender.load(run), Dataset.open(tmp_path / "dataset"))


@pytest.mark.parametrize(("wrong", "named"), [({"ks": (0,)}, "ks"), ({"ks": ()}, "ks")])
def test_what_cannot_be_judged_is_refused(wrong: dict[str, str], named: str, run: Path, dataset: Dataset) -> None:
    with pytest.raises(RequestError, match=named):
        evaluate(Recommender.load(run), dataset, **wrong)  # type: ignore[arg-type]


def test_an_empty_batch_has_no_targets() -> None:
    assert len(new_targets(Batch.of([[]]), Batch.of([[]]))[0]) == 0


@pytest.fixture(scope="module")
def partly_cold(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_shop(tmp_path_factory.mktemp("cold"), cold_one_in=3)


@pytest.fixture(scope="module")
def by_text(tmp_path_factory: pytest.TempPathFactory, partly_cold: Dataset) -> Recommender:
    run = write_run(tmp_path_factory.mktemp("by-text") / "run", partly_cold, scale=1, text="both", similarity="cosine")
    return Recommender.load(run)


@pytest.fixture(scope="module")
def sliced(by_text: Recommender, partly_cold: Dataset) -> Evaluation:
    return evaluate(by_text, partly_cold, ks=(3, 11, 499))


def last_items(dataset: Dataset, cold: bool | None = None) -> dict[int, set[int]]:
    """The target of every user who had it not before; of those alone that are cold, or are not."""
    events = dataset.events.collect().group_by("user_id", maintain_order=True).agg("item_id")
    targets = {user: (items[:-1], items[-1]) for user, items in events.iter_rows() if items[-1] not in items[:-1]}
    frozen = is_cold(pl.Series([item for _, item in targets.values()]), SplitSettings(cold_one_in=3))
    named = zip(targets.items(), frozen, strict=True)
    return {user: {item} for (user, (_, item)), is_ in named if cold is None or is_ == cold}


def test_the_figures_of_warm_and_cold_targets_are_those_of_the_lists_and_together_those_of_all(
    sliced: Evaluation, partly_cold: Dataset
) -> None:
    targets = {name: last_items(partly_cold, cold) for name, cold in (("all", None), ("warm", False), ("cold", True))}
    assert len(targets["all"]) == len(targets["warm"]) + len(targets["cold"]) == sliced.users
    assert min(map(len, targets.values())) > 20
    for k in (3, 11):
        for slice_ in ("warm", "cold"):
            for name, value in score(sliced.frame(), targets[slice_], k).items():
                assert sliced.slices[slice_]["model"][name] == pytest.approx(value, abs=1e-9)
        for lister, whole in sliced.figures.items():
            parts = [sliced.slices[slice_][lister][f"ndcg@{k}"] * len(targets[slice_]) for slice_ in ("warm", "cold")]
            assert sum(parts) == pytest.approx(whole[f"ndcg@{k}"] * sliced.users)
    assert 0 < sliced.slices["cold"]["model"]["recall@11"] < 1


def test_cold_among_cold_ranks_the_cold_items_alone(sliced: Evaluation, by_text: Recommender, partly_cold: Dataset) -> None:
    s, ids = partly_cold.sequences, partly_cold.items["item_id"]
    begins, ends, targets = s.windows("test")
    history, future = gather(s.items, s.times, begins, ends), gather(s.items, s.times, ends, targets)
    scores = (by_text.encode(history).double() @ by_text.scan.vectors_VE.double().T).float()
    scores[history.owners, history.values - FIRST_ITEM] = -torch.inf
    cold = torch.tensor(is_cold(ids, SplitSettings(cold_one_in=3)).to_numpy())
    scores[:, ~cold] = -torch.inf
    owners, wanted = new_targets(history, future)
    chosen = cold[wanted - FIRST_ITEM]
    ranks = target_ranks(scores, owners[chosen], wanted[chosen] - FIRST_ITEM)
    for name, value in measure(ranks, owners[chosen], len(begins), (3, 11)).items():
        assert sliced.slices["cold among cold"]["model"][name] == pytest.approx(value, abs=1e-9)
        assert sliced.slices["cold among cold"]["model"][name] > sliced.slices["cold"]["model"][name]


def test_baselines_find_no_cold_target_and_mean_text_does(sliced: Evaluation) -> None:
    assert set(sliced.slices) == {"warm", "cold", "cold among cold"}
    assert set(sliced.slices["cold"]) == set(sliced.slices["warm"]) == set(sliced.figures)
    assert set(sliced.slices["cold among cold"]) == {"model", "mean text"}
    for name in ("popularity", "recent popularity", "item-kNN", "EASE"):
        assert set(sliced.slices["cold"][name].values()) == {0.0}
        assert sliced.slices["warm"][name]["recall@11"] > 0 or name == "recent popularity"
    assert sliced.slices["cold among cold"]["mean text"]["recall@11"] > 0
    assert sliced.slices["cold among cold"]["mean text"]["ndcg@3"] >= sliced.slices["cold"]["mean text"]["ndcg@3"]


def test_there_are_no_slices_where_no_item_is_cold(report: Evaluation) -> None:
    assert report.slices == {}


def test_without_baselines_the_model_alone_is_sliced(by_text: Recommender, partly_cold: Dataset, sliced: Evaluation) -> None:
    alone = evaluate(by_text, partly_cold, ks=(3, 11, 499), baselines=False)
    assert set(alone.figures) == {"model"}
    assert alone.slices == {slice_: {"model": by["model"]} for slice_, by in sliced.slices.items()}


def test_a_model_without_text_misses_every_cold_target(partly_cold: Dataset, tmp_path: Path) -> None:
    report = evaluate(Recommender.load(write_run(tmp_path / "run", partly_cold)), partly_cold, baselines=False)
    for slice_ in ("cold", "cold among cold"):
        assert set(report.slices[slice_]["model"].values()) == {0.0}
    assert report.slices["warm"]["model"]["recall@50"] > 0
