"""A registered bundle as MLflow's pyfunc model: MLflow itself loads it, and its scoring server and command ask it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fastapi.testclient import TestClient

from features.build import build
from features.dataset import Dataset
from recsys.bundle import open_directory
from recsys.config import Recipe
from recsys.errors import BundleError, RequestError
from recsys.tracking import Tracking, TrackingSettings
from serving.engine import Recommender
from serving.export import export
from serving.golden import renew
from serving.index import IndexSettings
from serving.items import remove
from serving.pyfunc import MLMODEL, PARAMS, Predictor, _load_pyfunc
from tests.serving.conftest import ATTRIBUTES, write_run, write_shop

pd = pytest.importorskip("pandas", reason="pandas: is not installed, and MLflow's pyfunc needs it")

HISTORIES = [[7, 14, 21], [1, 8, 15, 22, 29], []]


@pytest.fixture(scope="module")
def mlflow() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own type hints
        import mlflow.models.cli
        import mlflow.pyfunc.scoring_server
    return mlflow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def registered(folder: Path, mlflow: Any) -> str:
    """Goods with numbers as ids, registered as champion; the present store of MLflow holds it."""
    dataset = write_shop(folder / "shop", ATTRIBUTES)
    made = export(write_run(folder / "run", dataset, scale=1, text="both"), folder / "bundle", IndexSettings())
    tracking = Tracking(TrackingSettings(uri=f"sqlite:///{folder / 'mlflow.db'}"))
    with tracking.run("shop"):
        tracking.register(folder / "bundle", made["id"])
    mlflow.set_tracking_uri(tracking.uri)
    return "models:/recsys@champion"


@pytest.fixture(scope="module")
def model(registered: str, mlflow: Any) -> Any:
    return mlflow.pyfunc.load_model(registered)


@pytest.fixture(scope="module")
def recommender(registered: str, folder: Path) -> Recommender:
    return Recommender.load(folder / "bundle")


@pytest.fixture(scope="module")
def named(folder: Path) -> Path:
    """A bundle whose items have texts as ids, of a model that reads the times of events and of requests."""
    place = folder / "named"
    place.mkdir()
    events = [(user, f"item {(3 * user + n * n) % 53}", 1000 * user + 60 * n) for user in range(31) for n in range(11)]
    pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(place / "events.parquet")
    build(place, Recipe("named", {}), place / "dataset")
    run = write_run(place / "run", Dataset.open(place / "dataset"), time="gaps", request_time=True)
    export(run, place / "bundle", IndexSettings())
    return place / "bundle"


def frame(histories: list[Any] = HISTORIES, **columns: list[Any]) -> Any:
    return pd.DataFrame({"history": histories, **columns})


def said(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {"item_ids": [item["item_id"] for item in answer["items"]], "scores": [item["score"] for item in answer["items"]]}


GIVEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "k": (23, {"k": 23}),
    "filter_seen": (False, {"filter_seen": False}),
    "where": ('{"price": {"max": 2}, "in_stock": true}', {"where": {"price": {"max": 2}, "in_stock": True}}),
    "deny": ([*range(0, 499, 2)], {"deny": range(0, 499, 2)}),
    "allow": ([28, 35, 1], {"allow": [28, 35, 1]}),
    "diversity": (0.7, {"diversity": 0.7}),
    "popularity": (5.0, {"popularity": 5.0}),
    "ignore_unknown": (True, {"ignore_unknown": True}),
}
"""Of each parameter a value, and the term that it is of an answer."""


@pytest.mark.parametrize("name", PARAMS)
def test_a_registered_bundle_gives_mlflow_the_recommenders_lists(name: str, model: Any, recommender: Recommender) -> None:
    value, terms = GIVEN[name]
    histories = [[*history, 9999] for history in HISTORIES] if name == "ignore_unknown" else HISTORIES
    if name != "ignore_unknown":
        assert model.predict(frame()).to_dict("records") != model.predict(frame(), params={name: value}).to_dict("records")
    told = model.predict(frame(histories), params={name: value})
    assert told.to_dict("records") == [said(recommender.answer(history, **terms)) for history in histories]


def test_rows_keep_their_index_and_arrays_of_arrow_are_lists(model: Any, recommender: Recommender) -> None:
    table = frame(index=[5, 7, 11]).set_index("index")
    table["history"] = [pd.Series(history, dtype="int32").to_numpy() for history in table["history"]]
    told = model.predict(table)
    assert list(told.index) == [5, 7, 11]
    assert told.to_dict("records") == [said(recommender.answer(history)) for history in HISTORIES]
    assert model.predict(table[:0]).columns.to_list() == ["item_ids", "scores"]


def test_texts_as_ids_and_the_time_of_the_request_arrive(named: Path, mlflow: Any) -> None:
    recommender, model = Recommender.load(named), mlflow.pyfunc.load_model(str(named))
    histories, times, now = [["item 3", "item 5"], ["item 7"]], [[100, 5000], [300]], [4000, 9000]
    told = model.predict(frame(histories, times=times, now=now), params={"k": 7, "deny": ["item 11"]})
    rows = zip(histories, times, now, strict=True)
    assert told.to_dict("records") == [
        said(recommender.answer(items, 7, times=at, now=when, deny=["item 11"])) for items, at, when in rows
    ]
    assert told["item_ids"][0] != model.predict(frame(histories, times=times, now=[9000, 9000]), {"k": 7})["item_ids"][0]
    with pytest.raises(RequestError, match="row 0: the model reads when events happened"):
        model.predict(frame(histories))


@pytest.mark.parametrize("ids", ["long", "string"])
def test_the_signature_has_the_type_of_the_items_ids(ids: str, named: Path, folder: Path, registered: str, mlflow: Any) -> None:
    signature = mlflow.models.Model.load(str(folder / "bundle" if ids == "long" else named)).signature
    lists = {"type": "array", "items": {"type": ids}, "required": True}
    assert signature.inputs.to_dict()[0] == {**lists, "name": "history"}
    assert [(column["name"], column["required"]) for column in signature.inputs.to_dict()[1:]] == [
        ("times", False),
        ("now", False),
    ]
    assert signature.outputs.to_dict() == [
        {**lists, "name": "item_ids"},
        {**lists, "name": "scores", "items": {"type": "float"}},
    ]
    assert {param.name: param.default for param in signature.params} == {name: default for name, (_, default) in PARAMS.items()}


BODIES: dict[str, Any] = {
    "dataframe_records": [{"history": history} for history in HISTORIES],
    "dataframe_split": {"columns": ["history"], "data": [[history] for history in HISTORIES]},
    "inputs": [{"history": history} for history in HISTORIES],
}


@pytest.mark.parametrize("form", BODIES)
def test_the_scoring_server_answers_json(form: str, model: Any, recommender: Recommender, mlflow: Any) -> None:
    with TestClient(mlflow.pyfunc.scoring_server.init(model)) as client:
        response = client.post("/invocations", json={form: BODIES[form], "params": {"k": 3}})
    assert response.status_code == 200, response.text
    assert response.json()["predictions"] == [said(recommender.answer(history, 3)) for history in HISTORIES]


def test_the_command_mlflow_models_predict_answers(
    registered: str, recommender: Recommender, mlflow: Any, tmp_path: Path
) -> None:
    (tmp_path / "in.json").write_text(json.dumps({"dataframe_records": BODIES["dataframe_records"], "params": {"k": 3}}))
    words = ["predict", "-m", registered, "--env-manager", "local", "-i", str(tmp_path / "in.json"), "-t", "json"]
    mlflow.models.cli.commands([*words, "-o", str(tmp_path / "out.json")], standalone_mode=False)
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["predictions"] == [said(recommender.answer(history, 3)) for history in HISTORIES]


def test_mlmodel_is_the_same_each_time_and_stays_in_bundles_that_are_made_of_one(
    registered: str, folder: Path, tmp_path: Path
) -> None:
    wanted = open_directory(folder / "bundle").manifest["files"][MLMODEL]
    export(folder / "run", tmp_path / "again", IndexSettings())
    assert open_directory(tmp_path / "again").manifest["files"][MLMODEL] == wanted
    remove(folder / "bundle", [7], tmp_path / "fewer")
    assert open_directory(tmp_path / "fewer").manifest["files"][MLMODEL] == wanted
    renewed = renew(open_directory(folder / "bundle"), tmp_path / "renewed", {}, {"recipe": recipe(folder / "bundle")})
    assert renewed.manifest["files"][MLMODEL] == wanted
    (tmp_path / "again" / MLMODEL).write_text("{}")
    with pytest.raises(BundleError, match=MLMODEL):
        _load_pyfunc(str(tmp_path / "again"))


def recipe(bundle: Path) -> Any:
    """As `recsys budget` changes it: another profile."""
    said = open_directory(bundle).manifest["recipe"]
    return {**said, "serving": {**said["serving"], "diversity": 0.1}}


@pytest.mark.parametrize(
    ("table", "params", "told"),
    [
        ({"items": [[7]]}, {}, "no column history, found items; give"),
        ({}, {}, "no column history, found no columns"),
        ({"history": [[7], "7"]}, {}, "row 1: history is '7'; give a list"),
        ({"history": [[7], None]}, {}, "row 1: history is None"),
        ({"history": [[7.5]]}, {}, "row 0: history holds 7.5; give item ids"),
        ({"history": [[True]]}, {}, "row 0: history holds True"),
        ({"history": [[7], [7, 9999]]}, {}, "row 1: no item '9999'"),
        ({"history": [[7]], "times": ["now"]}, {}, "row 0: times is 'now'"),
        ({"history": [[7]], "times": [["now"]]}, {}, "row 0: times holds 'now'"),
        ({"history": [[7]], "now": [5]}, {}, "row 0: now is given without times"),
        ({"history": [[7]]}, {"k": 0}, "k is 0"),
        ({"history": [[7]]}, {"where": "price=1"}, "where is 'price=1'; give conditions as a JSON object"),
        ({"history": [[7]]}, {"where": "[1]"}, "where is '\\[1\\]'"),
        ({"history": [[7]]}, {"most": 5}, "'most' is none; give k, "),
    ],
)
def test_a_bad_request_is_one_line(table: dict[str, Any], params: dict[str, Any], told: str, recommender: Recommender) -> None:
    with pytest.raises(RequestError, match=told) as found:
        Predictor(recommender).predict(pd.DataFrame(table), params)
    assert "\n" not in str(found.value)
    with pytest.raises(RequestError, match="found no columns"):
        Predictor(recommender).predict([[7]])


def test_cells_without_a_value_are_as_no_column(recommender: Recommender) -> None:
    predictor = Predictor(recommender)
    told = predictor.predict(frame([[7], [8]], times=[[1], None], now=[5, None]))
    assert told.to_dict("records") == predictor.predict(frame([[7], [8]])).to_dict("records")
