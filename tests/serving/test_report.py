"""Reports: their figures against the evaluation, slices by hand, what they say first, and the yardstick on real data."""

import json
import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
import torch

from features.build import build
from features.dataset import Dataset
from recsys.config import Recipe, load_recipe
from recsys.errors import DataError, RequestError
from recsys.metrics import METRICS
from serving.engine import Recommender
from serving.evaluation.given import GivenLists
from serving.evaluation.judge import evaluate
from serving.evaluation.protocol import ProtocolSettings
from serving.evaluation.report import Report, make_report
from serving.evaluation.slices import _names
from tests.serving.conftest import write_run, write_shop

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """101 users, of whom two columns are known, and a model that knows nothing yet."""
    folder = tmp_path_factory.mktemp("shop")
    draw = torch.Generator().manual_seed(11)
    events = [
        (user, int(item), 86_400 * (10 * user + day))
        for user in range(101)
        for day, item in enumerate(torch.randint(61, (3 + user % 29,), generator=draw).tolist())
    ]
    pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(folder / "events.parquet")
    users = pl.DataFrame({"user_id": list(range(101)), "age": [user % 50 / 2 for user in range(101)]})
    users.with_columns(region=pl.format("region {}", pl.col("user_id") % 3)).write_parquet(folder / "users.parquet")
    build(folder, Recipe("shop", {}), folder / "dataset")
    return Dataset.open(folder / "dataset")


@pytest.fixture(scope="module")
def subject(shop: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    return Recommender.load(write_run(tmp_path_factory.mktemp("run") / "run", shop))


@pytest.fixture(scope="module")
def report(subject: Recommender, shop: Dataset) -> Report:
    return make_report(subject, shop, ks=(3, 10), checks=[])


def test_figures_are_means_over_users_inside_their_intervals(report: Report, subject: Recommender, shop: Dataset) -> None:
    found = evaluate(subject, shop, ks=(3, 10))
    for lister, figures in report.manifest["figures"].items():
        for name, values_U in found.values(lister, METRICS).items():
            assert figures[name]["mean"] == pytest.approx(float(values_U.mean()))
            assert figures[name]["low"] <= figures[name]["mean"] <= figures[name]["high"]
            assert report.values(lister, name) == pytest.approx(values_U.numpy())
    assert report.manifest["users"] == len(report.users) == found.users


def test_slices_of_users_part_them_and_their_figures_are_those_of_their_users(report: Report) -> None:
    by = {part["by"] for part in report.manifest["slices"] if part["of"] == "users"}
    assert by == {"history length", "events in the 28 days before", "user's age", "user's region"}
    for kind in by:
        parts = [part for part in report.manifest["slices"] if part["by"] == kind]
        assert sum(part["users"] for part in parts) == len(report.users)
        for part in parts:
            own = report.users.filter(pl.col(f"user: {kind}") == part["slice"])["model: ndcg@10"]
            assert (len(own), own.mean()) == (part["users"], pytest.approx(part["figures"]["ndcg@10"]["mean"]))
    ages = [part["slice"] for part in report.manifest["slices"] if part["by"] == "user's age"]
    assert len(ages) == 4
    assert [ages[0][:6], ages[3][:5]] == ["up to ", "over "]


def test_slices_of_targets_part_them(report: Report, subject: Recommender, shop: Dataset) -> None:
    found = evaluate(subject, shop, ks=(10,), baselines=False)
    for kind in ("item popularity", "item age"):
        parts = [part for part in report.manifest["slices"] if part["by"] == kind]
        assert sum(part["share"] for part in parts) == pytest.approx(1)
        sums = sum(float(report.users[f"model: ndcg@10 | {kind}: {part['slice']}"].fill_nan(0).sum()) for part in parts)
        assert sums == pytest.approx(float(found.values("model", ("ndcg",), (10,))["ndcg@10"].sum()))


def test_history_length_slices_are_counted_by_hand(report: Report, shop: Dataset) -> None:
    counts = shop.events.group_by("user_id").len().collect().select("user_id", length=pl.col("len") - 1)
    joined = report.users.join(counts, on="user_id")
    for name, low, high in (("1–4 events", 1, 4), ("5–9 events", 5, 9), ("10–19 events", 10, 19), ("20–49 events", 20, 49)):
        assert (joined["user: history length"] == name).to_list() == joined["length"].is_between(low, high).to_list()


def test_serendipity_counts_what_is_found_and_popularity_does_not_name(
    report: Report, subject: Recommender, shop: Dataset
) -> None:
    found = evaluate(subject, shop, ks=(10,))
    lucky = (found.judged["model"].ranks_P <= 10) & (found.judged["popularity"].ranks_P > 10)
    assert 0 < int(lucky.sum()) < int((found.judged["model"].ranks_P <= 10).sum())
    assert report.manifest["figures"]["model"]["serendipity@10"]["mean"] == pytest.approx(int(lucky.sum()) / found.users)
    assert report.manifest["figures"]["popularity"]["serendipity@10"]["mean"] == 0


def test_a_model_that_knows_nothing_is_called_so_first(report: Report, shop: Dataset) -> None:
    assert report.manifest["beats"] is False
    verdict = report.manifest["verdict"]
    assert verdict.startswith(("The model does NOT beat ", "The model is NOT shown to beat "))
    assert " in a paired test over " in verdict


def test_lists_that_name_the_targets_beat_every_baseline(shop: Dataset, tmp_path: Path) -> None:
    last = shop.events.collect().group_by("user_id", maintain_order=True).agg(pl.col("item_id").last())
    last.with_columns(rank=pl.lit(1)).write_parquet(tmp_path / "perfect.parquet")
    report = make_report(GivenLists(tmp_path / "perfect.parquet", shop), shop, ks=(10,), checks=[], name="perfect")
    assert report.manifest["figures"]["model"]["ndcg@10"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert report.manifest["verdict"].startswith("These lists beat every baseline: NDCG@10 1.0000 [1.0000, 1.0000] against ")


def test_the_same_seed_gives_the_same_report_and_it_is_read_as_written(
    report: Report, subject: Recommender, shop: Dataset, tmp_path: Path
) -> None:
    again = make_report(subject, shop, ks=(3, 10), checks=[])
    one, other = report.write(tmp_path / "one"), again.write(tmp_path / "other")
    for file in ("users.parquet", "lists.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    strip = ("clock", "files", "hash", "id")
    assert {k: v for k, v in one.manifest.items() if k not in strip} == {
        k: v for k, v in other.manifest.items() if k not in strip
    }
    opened = Report.open(tmp_path / "one")
    assert json.loads(json.dumps(opened.manifest)) == opened.manifest
    assert opened.users.equals(report.users)
    (tmp_path / "one" / "users.parquet").write_bytes(b"other")
    with pytest.raises(DataError):
        Report.open(tmp_path / "one")


def test_shares_of_popularity_groups_add_up(report: Report) -> None:
    groups = report.manifest["popularity"]
    for what in ("events", "targets", "lists"):
        assert sum(group[what] for group in groups) == pytest.approx(1)
    assert [group["events"] / group["count"] for group in groups] == sorted(
        (group["events"] / group["count"] for group in groups), reverse=True
    )


def test_an_older_model_and_a_newer_one_are_judged_by_the_same_targets_in_every_slice(tmp_path: Path) -> None:
    """The older one does not know the items that came since; cold ones are the data set's, and so are head and tail."""
    draw = torch.Generator().manual_seed(5)
    events = [
        (user, int(item), 86_400 * day + user)
        for user in range(97)
        for day, item in enumerate(torch.randint(31 if user < 50 else 67, (11,), generator=draw).tolist())
    ]
    table = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row")
    (tmp_path / "old").mkdir()
    table.filter(pl.col("user_id") < 50).write_parquet(tmp_path / "old" / "events.parquet")
    table.write_parquet(tmp_path / "events.parquet")
    for place in ("old", "."):
        build(tmp_path / place, Recipe("shop", {"split": {"cold_one_in": 3}}), tmp_path / place / "dataset")
    new, old = (Dataset.open(tmp_path / place / "dataset") for place in (".", "old"))
    reports = []
    for name, made in (("new", new), ("old", old)):
        subject = Recommender.load(write_run(tmp_path / f"run {name}", made))
        reports.append(make_report(subject, new, ks=(10,), checks=[]))
    told = [[(part["slice"], part["users"]) for part in report.manifest["slices"]] for report in reports]
    assert told[0] == told[1]
    cold = [part for part in reports[0].manifest["slices"] if part["slice"].startswith("cold: ")]
    last = new.events.collect().group_by("user_id", maintain_order=True).agg("item_id")
    targets = [items[-1] for items in last["item_id"].to_list() if items[-1] not in items[:-1]]
    unlearnt = new.items.filter(pl.col("events") == 0)["item_id"].to_list()
    assert cold[0]["users"] == sum(item in unlearnt for item in targets) > 10
    without = [group for group in reports[0].manifest["popularity"] if group["items"] == "without training events"]
    assert [group["count"] for group in without] == [len(unlearnt)]
    assert reports[0].manifest["popularity"][-1]["events"] == 0
    shown = [round(report.manifest["figures"]["model"]["coverage@10"]["mean"] * len(new.items), 6) for report in reports]
    assert [count.is_integer() for count in shown] == [True, True]


def test_cold_items_alone_are_judged_beside_the_nearest_texts(tmp_path: Path) -> None:
    data = write_shop(tmp_path / "shop", cold_one_in=3)
    subject = Recommender.load(write_run(tmp_path / "run", data, scale=1, text="both", similarity="cosine"))
    found = evaluate(subject, data, ProtocolSettings(candidates="cold"), ks=(10,))
    assert "mean text" in found.figures
    assert found.figures["mean text"]["recall@10"] > 0
    assert found.figures["popularity"]["recall@10"] == 0
    assert bool(found.cold_P.all())


def test_cold_items_alone_where_none_is_cold_is_refused(subject: Recommender, shop: Dataset) -> None:
    with pytest.raises(RequestError, match="keeps no item cold"):
        evaluate(subject, shop, ProtocolSettings(candidates="cold"))


def test_columns_of_users_that_hold_nothing_or_too_much_make_no_slice() -> None:
    assert _names(pl.Series([None, None], dtype=pl.String)) is None
    assert _names(pl.Series([f"zip {place}" for place in range(40)])) is None
    assert _names(pl.Series([[1], [2]])) is None
    assert _names(pl.Series([timedelta(days=1)] * 3)) is None
    seconds = _names(pl.Series([1_700_000_000 + place for place in range(40)]))
    assert seconds is not None
    assert seconds.n_unique() == 4
    ages = _names(pl.Series([float(place) if place % 2 else math.nan for place in range(80)]))
    assert ages is not None
    assert (ages.null_count(), ages.n_unique()) == (40, 5)


def test_rare_values_of_a_column_are_one_slice(tmp_path: Path) -> None:
    events = [(user, item, 86_400 * item) for user in range(90) for item in (user % 7, 7 + user % 5, 12 + user % 3)]
    table = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row")
    table.write_parquet(tmp_path / "events.parquet")
    towns = ["Bonn"] * 40 + ["Köln"] * 30 + ["Unna"] * 11 + ["Werl"] * 9
    pl.DataFrame({"user_id": list(range(90)), "town": towns}).write_parquet(tmp_path / "users.parquet")
    build(tmp_path, Recipe("shop", {}), tmp_path / "dataset")
    data = Dataset.open(tmp_path / "dataset")
    found = make_report(Recommender.load(write_run(tmp_path / "run", data)), data, ks=(10,), checks=[], baselines=False)
    told = {part["slice"]: part["users"] for part in found.manifest["slices"] if part["by"] == "user's town"}
    assert told == {"Bonn": 40, "Köln": 30, "other values": 20}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"user_id": [1], "item_id": [2]}, "no column rank"),
        ({"user_id": [1, 1], "item_id": [2, 3], "rank": [1, 1]}, "two items at one rank"),
        ({"user_id": [1, 1], "item_id": [2, 2], "rank": [1, 2]}, "an item twice"),
        ({"user_id": [1], "item_id": [2], "rank": [0]}, "whole numbers from 1"),
        ({"user_id": [1], "item_id": [2], "rank": [1], "score": ["high"]}, "score is String"),
        ({"user_id": [9999], "item_id": [2], "rank": [1]}, "1 users are not in the data set, 9999"),
        ({"user_id": [1], "item_id": ["lamp"], "rank": [1]}, "1 items are not in the data set, 'lamp'"),
    ],
)
def test_wrong_lists_are_refused_in_one_line(table: dict[str, list[object]], says: str, shop: Dataset, tmp_path: Path) -> None:
    pl.DataFrame(table).write_parquet(tmp_path / "lists.parquet")
    with pytest.raises(DataError, match=says) as error:
        GivenLists(tmp_path / "lists.parquet", shop)
    assert "\n" not in str(error.value)


REAL = [("ml-1m", "P1", []), ("amazon-beauty", "P2", []), ("online-retail", "P3", ["--cutoff", "1320796800"])]
REAL.append(("online-retail", "P3-repeats", ["--cutoff", "1320796800", "--repeats"]))


@pytest.mark.parametrize(("name", "protocol", "words"), REAL, ids=[protocol for _, protocol, _ in REAL])
def test_figures_of_real_data_are_those_of_the_yardstick(name: str, protocol: str, words: list[str], tmp_path: Path) -> None:
    """An independent program scores the lists: those of a model without training, with targets among them."""
    place = os.environ.get("RECSYS_DATA", "")
    yardstick = Path(place or "nowhere").parent / "score_lists.py"
    if not yardstick.is_file():
        pytest.skip("needs RECSYS_DATA, and score_lists.py beside it")
    recipe = load_recipe(name, ROOT / "training" / "recipes", ())
    build(Path(place) / name, recipe, tmp_path / "dataset")
    data = Dataset.open(tmp_path / "dataset")
    chosen = ProtocolSettings(name=protocol)
    own = evaluate(Recommender.load(write_run(tmp_path / "run", data)), data, chosen, baselines=False)
    mixed = own.frame().with_columns(pl.col("user_id", "item_id").cast(pl.String))
    last = data.events.group_by("user_id").agg(pl.col("item_id").last()).collect().cast(pl.String)
    targets = last.with_columns(rank=pl.lit(7, pl.Int32), score=pl.lit(0.0, pl.Float32)).gather_every(3)
    mixed = mixed.join(targets, on=["user_id", "item_id"], how="anti").join(targets, on=["user_id", "rank"], how="anti")
    known = mixed["user_id"].unique().implode()
    pl.concat([mixed, targets.filter(pl.col("user_id").is_in(known)).select(mixed.columns)]).write_parquet(
        tmp_path / "lists.parquet"
    )
    found = evaluate(GivenLists(tmp_path / "lists.parquet", data), data, chosen, baselines=False)
    command = [
        sys.executable,
        yardstick,
        "--lists",
        tmp_path / "lists.parquet",
        "--events",
        Path(place) / name / "events.parquet",
    ]
    told = json.loads(subprocess.run([*command, *words], check=True, capture_output=True, text=True).stdout)
    assert found.users == told["users"]
    for metric, value in found.figures["model"].items():
        assert value == pytest.approx(told[metric], abs=1e-6), metric
        assert value > 0.01
        assert math.isfinite(value)
