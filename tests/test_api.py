"""The public names: they say what the command and the online API say, and their examples run."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import recsys
from recsys import api
from recsys.errors import BundleError, DataError, LeakError, RecipeError, RequestError, SetupError
from recsys.tracking import Tracking, TrackingSettings
from serving.engine import Recommender
from serving.export import export
from serving.index import IndexSettings
from tests.serving.conftest import ATTRIBUTES, write_run, write_shop
from tests.serving.online import asked

Run = Callable[..., int]
HISTORY = [7, 14, 21, 42]
EVEN = [*range(0, 499, 2)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the examples have it: datasets/shop, runs/shop and bundles/shop, registered as champion in mlflow.db."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "datasets").mkdir()
    dataset = write_shop(folder / "raw", ATTRIBUTES)
    (folder / "datasets" / "shop").symlink_to(dataset.path)
    run = write_run(folder / "runs" / "shop", dataset, scale=1, text="both", similarity="cosine", temperature=0.1)
    made = export(run, folder / "bundles" / "shop", IndexSettings())
    tracking = Tracking(TrackingSettings(uri=f"sqlite:///{folder / 'mlflow.db'}"))
    with tracking.run("shop"):
        assert tracking.register(folder / "bundles" / "shop", made["id"]) == "1"
    return folder


@pytest.fixture(scope="module")
def recommender(shop: Path) -> recsys.Recommender:
    return recsys.load(shop / "bundles" / "shop")


@pytest.fixture(autouse=True)
def _in_the_shop(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop)


def test_there_are_five_public_names() -> None:
    assert sorted(recsys.__all__) == ["Recommender", "__version__", "evaluate", "load"] == sorted(dir(recsys))
    assert [name for name in dir(recsys.Recommender) if name[0] != "_"] == ["explain", "recommend", "similar"]
    with pytest.raises(AttributeError, match="no attribute 'recommend'"):
        recsys.recommend  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, recsys; print({'torch', 'numpy', 'polars', 'mlflow', 'faiss', 'serving'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(recsys.__file__).parents[1], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_every_public_name_has_an_example_that_runs() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for test in finder.find(api, extraglobs={"recsys": recsys}) if test.examples]
    public = {"load", "Recommender.recommend", "Recommender.explain", "Recommender.similar", "evaluate"}
    assert {test.name.removeprefix("recsys.api.") for test in tests} == public
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in tests:
        runner.run(test, out=told.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(told)


def printed(run: Run, capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


TERMS: list[tuple[dict[str, Any], list[object]]] = [
    ({}, []),
    ({"k": 23}, ["-k", 23]),
    ({"times": [1, 2, 3, 4], "now": 3}, ["--times", 1, 2, 3, 4, "--now", 3]),
    ({"where": {"price": {"min": 1, "max": 2}, "in_stock": True}}, ["--where", "price=1..2", "in_stock=true"]),
    ({"deny": EVEN}, ["--deny", *EVEN]),
    ({"allow": [28, 35, 1]}, ["--allow", 28, 35, 1]),
    ({"diversity": 0.5, "popularity": 0.2}, ["--diversity", 0.5, "--popularity", 0.2]),
]


@pytest.mark.parametrize(("terms", "words"), TERMS)
def test_a_list_is_the_commands_and_the_recommenders(
    terms: dict[str, Any], words: list[object], recommender: recsys.Recommender, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = recommender.recommend(HISTORY, **terms)
    assert answer["items"] and (answer == recommender.recommend(HISTORY)) == (not terms)
    assert answer == printed(run, capsys, "recommend", "bundles/shop", "--history", *HISTORY, *words)
    assert answer == Recommender.load(Path("bundles/shop")).answer(HISTORY, **terms)


def test_lists_and_likes_are_those_of_the_online_api(recommender: recsys.Recommender) -> None:
    terms: dict[str, Any] = {"k": 13, "where": {"brand": ["brand 1", "brand 2"]}, "deny": [28], "ignore_unknown": True}
    with asked(Path("bundles/shop")) as client:
        online = client.post("/v1/recommend", json={"history": [*HISTORY, 9999], **terms}).json()
        near = client.post("/v1/similar", json={"item_id": 7, "k": 13, "deny": [28], "where": terms["where"]}).json()
    answer = recommender.recommend([*HISTORY, 9999], **terms)
    assert answer == {name: online[name] for name in answer}
    assert answer["unknown"] == [9999]
    like = recommender.similar(7, 13, deny=[28], where=terms["where"])
    assert like == {name: near[name] for name in like} and len(like["items"]) == 13


def test_seen_items_and_probabilities_are_as_asked_for(recommender: recsys.Recommender) -> None:
    every = recommender.recommend(HISTORY, 499, filter_seen=False)["items"]
    unseen = recommender.recommend(HISTORY, 499)["items"]
    assert {item["item_id"] for item in every} - {item["item_id"] for item in unseen} == set(HISTORY)
    with pytest.raises(RequestError, match="not calibrated"):
        recommender.recommend(HISTORY, probabilities=True)


def test_an_explanation_is_the_commands(recommender: recsys.Recommender, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert recommender.explain(HISTORY) == printed(run, capsys, "explain", "bundles/shop", "--history", *HISTORY)
    wanted = printed(run, capsys, "explain", "bundles/shop", "--history", *HISTORY, "--item", 28)
    assert recommender.explain(HISTORY, 28) == wanted
    assert recommender.explain(HISTORY, 28, seed=1)["faithfulness"] != wanted["faithfulness"]


def test_a_report_is_the_commands(run: Run, capsys: pytest.CaptureFixture[str], recommender: recsys.Recommender) -> None:
    words = ["--dataset", "datasets/shop", "--no-track", "--seed", 3, "--set", "protocol.split=validation"]
    told = printed(run, capsys, "evaluate", "bundles/shop", *words)
    own = recsys.evaluate("bundles/shop", "datasets/shop", protocol={"split": "validation"}, seed=3)
    assert essence(own.manifest) == essence(told)
    same = recsys.evaluate(recommender, "datasets/shop", protocol={"split": "validation"}, seed=3)
    assert essence(same.manifest) | {"name": ""} == essence(told) | {"name": ""}
    own.lists.write_parquet("lists.parquet")
    given = recsys.evaluate("lists.parquet", "datasets/shop", protocol={"split": "validation"})
    assert (given.manifest["subject"], given.manifest["name"]) == ("lists", "lists")
    assert given.manifest["figures"]["model"]["recall@10"]["mean"] == told["figures"]["model"]["recall@10"]["mean"]


def essence(report: Mapping[str, Any]) -> dict[str, Any]:
    """All but what differs from one making to the next."""
    return json.loads(json.dumps({name: value for name, value in report.items() if name not in ("clock", "command")}))  # type: ignore[no-any-return]


def test_a_run_and_a_registered_bundle_are_loaded_alike(
    shop: Path, recommender: recsys.Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recommender.recommend(HISTORY)
    assert recsys.load("models:/recsys@champion", tracking=f"sqlite:///{shop / 'mlflow.db'}").recommend(HISTORY) == wanted
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shop / 'mlflow.db'}")
    assert recsys.load("models:/recsys/1").recommend(HISTORY) == wanted
    of_run = recsys.load(shop / "runs" / "shop")
    items = of_run.recommend(HISTORY)["items"]  # exact search by torch; a bundle asks FAISS
    assert [item["item_id"] for item in items] == [item["item_id"] for item in wanted["items"]]
    assert [item["score"] for item in items] == pytest.approx([item["score"] for item in wanted["items"]], rel=1e-6)
    assert repr(of_run).startswith("<Recommender of run ") and repr(recommender).startswith("<Recommender of bundle ")


def test_titles_count_as_ids(recommender: recsys.Recommender) -> None:
    title = "brass desk lamp with a green shade"
    like = recommender.similar(title)
    assert like["item_id"] % 7 == 0 and like["title"] == title  # of several items with a title the most popular
    assert recommender.recommend([title]) == recommender.recommend([like["item_id"]])


@pytest.mark.parametrize(
    ("ask", "error", "told"),
    [
        (lambda r: recsys.load("bundles/none"), BundleError, "bundles/none"),
        (lambda r: recsys.load("models:/recsys@champion"), SetupError, "tracking is off"),
        (lambda r: recsys.load("models:/recsys"), SetupError, "names no registered bundle"),
        (lambda r: r.recommend("7"), RequestError, "give a list"),
        (lambda r: r.explain("7"), RequestError, "give a list"),
        (lambda r: r.recommend([9999]), RequestError, "no item '9999'"),
        (lambda r: r.recommend([7], k=0), RequestError, "k is 0"),
        (lambda r: r.recommend([7], where={"colour": "red"}), RequestError, "no 'colour'"),
        (lambda r: r.similar(9999), RequestError, "no item '9999'"),
        (lambda r: r.explain([7], item=9999), RequestError, "no item '9999'"),
        (lambda r: recsys.evaluate(r, "datasets/none"), DataError, "datasets/none"),
        (lambda r: recsys.evaluate(r, "datasets/shop", protocol="P9"), RecipeError, "P9"),
        (lambda r: recsys.evaluate(r, "datasets/shop", protocol="P1"), RequestError, "P1 is for"),
        (lambda r: recsys.evaluate(r, "datasets/shop", protocol={"spilt": "test"}), RecipeError, "spilt"),
    ],
)
def test_a_mistake_is_one_line(
    ask: Callable[[recsys.Recommender], object], error: type[Exception], told: str, recommender: recsys.Recommender
) -> None:
    with pytest.raises(error, match=told) as found:
        ask(recommender)
    assert "\n" not in str(found.value)


def test_a_leak_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    later = write_shop(tmp_path / "later", ATTRIBUTES, method="user_holdout", holdout_one_in=3)
    with pytest.raises(LeakError):
        recsys.evaluate("runs/shop", later.path)
    report = recsys.evaluate("runs/shop", later.path, despite_leaks=True)
    assert report.manifest["leaks"]["found"]
