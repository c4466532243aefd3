"""One way, from raw events to three jobs that say the same."""

import json
import shutil

import polars as pl
import pytest

from features.dataset import Dataset
from recsys.batch import FIRST_ITEM
from recsys.tracking import Tracking, TrackingSettings
from serving.engine import Recommender
from tests.serving.online import asked

K = 17


@pytest.fixture(scope="module")
def lists(world):
    """Of each job, user → item ids in order; all by the histories that end before the test event."""
    dataset = Dataset.open(world / "dataset")
    recommender = Recommender.load(world / "bundle")
    ids = dataset.items["item_id"].to_list()
    sequences = dataset.sequences
    begins, ends, _ = (part.tolist() for part in sequences.windows("test"))
    histories = {
        user: [ids[row - FIRST_ITEM] for row in sequences.items[begin:end].tolist()]
        for user, begin, end in zip(dataset.user_ids.to_list(), begins, ends, strict=True)
    }
    return dataset, recommender, histories


def read(path):
    frame = pl.read_parquet(path).sort("user_id", "rank")
    assert frame.columns == ["user_id", "item_id", "rank", "score"]
    assert frame["rank"].min() == 1
    return {user: part["item_id"].to_list() for (user,), part in frame.group_by("user_id", maintain_order=True)}


def test_offline_and_online_name_the_same_items_in_the_same_order(world, run, lists, tmp_path, capsys):
    _, recommender, histories = lists
    words = ("evaluate", world / "bundle", "--dataset", world / "dataset", "--json", "--out", tmp_path / "report")
    assert run(*words) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"recall@10", "ndcg@10", "recall@50", "ndcg@50"} <= set(figures["figures"]["model"])
    offline = read(tmp_path / "report" / "lists.parquet")
    with asked(world / "bundle") as client:
        for user, history in list(histories.items())[:97]:
            answer = client.post("/v1/recommend", json={"history": history, "k": K}).json()
            assert [item["item_id"] for item in answer["items"]] == offline[user][:K]
            assert answer["bundle"] == recommender.id


def test_nightly_and_the_command_name_the_same_items_in_the_same_order(world, run, lists, tmp_path, capsys):
    dataset, _, histories = lists
    assert run("nightly", world / "bundle", "--dataset", world / "dataset", "--out", tmp_path / "lists", "-k", K) == 0
    night = read(tmp_path / "lists" / "live" / "lists-*.parquet")
    assert set(night) == set(histories)
    ids = dataset.items["item_id"].to_list()
    offsets, items = dataset.sequences.offsets.tolist(), dataset.sequences.items.tolist()
    for place, user in list(enumerate(dataset.user_ids.to_list()))[:7]:
        whole = [str(ids[row - FIRST_ITEM]) for row in items[offsets[place] : offsets[place + 1]]]
        capsys.readouterr()
        assert run("recommend", world / "bundle", "--json", "-k", K, *(f"--history={item}" for item in whole)) == 0
        answer = json.loads(capsys.readouterr().out)
        assert [item["item_id"] for item in answer["items"]] == night[user]
        assert not set(night[user]) & {int(item) for item in whole}


@pytest.fixture
def tracked(world, tmp_path):
    """The bundle as if it had been trained with a store of MLflow, and the store."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with Tracking(TrackingSettings(uri=uri)).run("training") as training:
        address = training.address
    shutil.copytree(world / "bundle", tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    manifest["clock"]["run"]["tracking"] = address
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "bundle", uri


def test_a_night_is_a_run_of_mlflow_whether_it_goes_live_or_not(world, tracked, run, tmp_path, capsys):
    import mlflow

    bundle, uri = tracked
    words = ("nightly", bundle, "--dataset", world / "dataset", "--out", tmp_path / "lists", "-k", K)
    assert run(*words, "--set", "guards.overlap=0.2") == 0
    assert run(*words, "--now", "1000") == 3
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("recsys").experiment_id
    refused, live, _ = client.search_runs([experiment], order_by=["attributes.start_time DESC"])
    assert (live.info.run_name, live.info.status, refused.info.status) == ("nightly lists", "FINISHED", "FAILED")
    assert (live.data.tags["live"], refused.data.tags["live"]) == ("True", "False")
    assert live.data.params["guards.overlap"] == "0.2"
    assert [file.path for file in client.list_artifacts(live.info.run_id)] == ["night.json"]
    assert live.data.metrics["users"] == 211 and live.data.metrics["guard_covered"] == 1
    assert live.data.metrics["users_per_second"] > 0
    assert refused.data.metrics["guard_popular"] == 1


def test_mlflow_that_fails_does_not_stop_a_night(world, tracked, run, tmp_path, capsys, monkeypatch):
    bundle, uri = tracked
    words = ("nightly", bundle, "--dataset", world / "dataset", "--out", tmp_path / "lists", "-k", K)

    def fails(*_, **__):
        raise OSError("the server is\ngone")

    monkeypatch.setattr(Tracking, "night", fails)
    assert run(*words) == 0
    assert "warning: the night is not recorded: the server is gone" in capsys.readouterr().err
    assert run(*words, "--now", "1000") == 3
    monkeypatch.undo()
    (tmp_path / "mlflow.db").unlink()
    assert run(*words) == 0
    assert f"the night is not recorded: MLflow at {uri} has no store" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()


def test_explain_tells_what_carried_the_first_item_that_is_recommended(world, run, tmp_path, capsys):
    words = ("explain", world / "bundle", "--history", "1", "2", "3", "5", "--picture", tmp_path / "a.png", "--json")
    assert run(*words) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(event["attention"] for event in told["events"]) == pytest.approx(1)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert run("recommend", world / "bundle", "--history", "1", "2", "3", "5", "-k", "1", "--json") == 0
    first = json.loads(capsys.readouterr().out)["items"][0]
    assert told["item"] == {name: first[name] for name in ("item_id", "title", "score")}
    assert told["faithfulness"]["bundle"] == json.loads((world / "bundle" / "manifest.json").read_text())["faithfulness"]
