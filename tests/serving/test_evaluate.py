"""The judge: by hand on lists that are known, and its lists as they are written."""

import json
import math
from pathlib import Path

import polars as pl
import pytest
import torch

from features.build import build
from features.dataset import Dataset
from recsys.batch import FIRST_ITEM, Batch, gather
from recsys.config import Recipe
from recsys.errors import DataError, RequestError
from recsys.metrics import measure, new_targets, target_ranks
from serving.engine import Recommender
from serving.evaluate import Report, evaluate
from tests.serving.conftest import write_run


@pytest.fixture(scope="module")
def report(run: Path, dataset: Dataset) -> Report:
    return evaluate(Recommender.load(run), dataset, depth=1009)


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
    report = evaluate(recommender, data, ks=(1, 2, 5), repeats=repeats, baselines=False)
    new = {"u": {2}, "v": {4, 5}, "x": {10**6}}
    targets = {"u": {2}, "v": {1, 4, 5}, "x": {10**6}, "y": {4}} if repeats else new
    assert report.users == len(targets)
    report.write_lists(tmp_path / "lists.parquet")
    lists = pl.read_parquet(tmp_path / "lists.parquet")
    for k in (1, 2, 5):
        for name, value in score(lists, targets, k).items():
            assert report.figures["model"][name] == pytest.approx(value, abs=1e-9)
    had = lists.filter(user_id="v")["item_id"].is_in([1, 3]).any()
    assert had if repeats else not had


def test_the_figures_are_those_of_exact_ranks(report: Report, run: Path, dataset: Dataset) -> None:
    recommender, s = Recommender.load(run), dataset.sequences
    begins, ends, targets = s.windows("test")
    users = ((ends > begins) & (targets > ends)).nonzero().flatten()
    history, future = (gather(s.items, s.times, a[users], b[users]) for a, b in ((begins, ends), (ends, targets)))
    scores = recommender.encode(history).double() @ recommender.scan.vectors_VE.double().T
    scores[history.owners, history.values - FIRST_ITEM] = -torch.inf
    owners, wanted = new_targets(history, future)
    for name, value in measure(target_ranks(scores, owners, wanted - FIRST_ITEM), owners, len(users)).items():
        assert report.figures["model"][name] == pytest.approx(value, abs=1e-9)


def test_full_lists_hold_every_new_item_once(report: Report, dataset: Dataset) -> None:
    frame = report.frame()
    assert frame.columns == ["user_id", "item_id", "rank", "score"]
    assert (
        frame.group_by("user_id")
        .agg((pl.col("rank").max() == pl.len()) & (pl.col("item_id").n_unique() == pl.len()))["rank"]
        .all()
    )
    assert report.lists.underfilled == len(report.user_ids)
    assert report.as_dict()["underfilled"] == report.lists.underfilled


def test_a_report_is_ready_for_json_and_tables(report: Report) -> None:
    shown = json.loads(json.dumps(report.as_dict()))
    assert set(shown["baselines"]) == {"popularity", "item-kNN"}
    assert shown["ndcg@10"] == report.figures["model"]["ndcg@10"]
    assert [name for name, _ in report.rows()] == ["model", "popularity", "item-kNN"]
    assert all(set(figures) == {"recall@10", "ndcg@10", "recall@50", "ndcg@50"} for _, figures in report.rows())


def test_a_bundle_that_approximates_stands_beside_its_exact_search(
    bundles: dict[str, Path], report: Report, dataset: Dataset
) -> None:
    heard: list[tuple[int, int]] = []
    both = evaluate(Recommender.load(bundles["ivf"]), dataset, progress=lambda done, of: heard.append((done, of)))
    assert both.figures["model, exact search"] == report.figures["model"]
    assert heard[-1][0] == heard[-1][1]
    assert heard == sorted(heard)


def test_nobody_to_judge_is_an_error(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    pl.DataFrame({"user_id": ["a", "b"], "item_id": [1, 1], "timestamp": [1, 2]}).write_parquet(tmp_path / "events.parquet")
    build(tmp_path, Recipe("tiny", {}), tmp_path / "dataset")
    with pytest.raises(DataError, match="no user with a history and a target"):
        evaluate(Recommender.load(run), Dataset.open(tmp_path / "dataset"))


@pytest.mark.parametrize(("wrong", "named"), [({"split": "train"}, "train"), ({"ks": (0,)}, "ks"), ({"ks": ()}, "ks")])
def test_what_cannot_be_judged_is_refused(wrong: dict[str, str], named: str, run: Path, dataset: Dataset) -> None:
    with pytest.raises(RequestError, match=named):
        evaluate(Recommender.load(run), dataset, **wrong)  # type: ignore[arg-type]


def test_an_empty_batch_has_no_targets() -> None:
    assert len(new_targets(Batch.of([[]]), Batch.of([[]]))[0]) == 0
