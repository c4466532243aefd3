"""The command tells the user's mistakes in one line and leaves with 2; every verb has help with an example."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import psutil
import pytest
import torch

from recsys import __main__ as command
from recsys.command import terminal
from recsys.command.terminal import records_table
from recsys.tracking import Tracking, TrackingSettings
from serving.engine import Recommender
from tests.test_documents import verbs
from training.loop import Observation


def raw(world: Path, folder: Path, **columns: pl.Expr) -> Path:
    """The world's raw events with other columns, in a folder of their own."""
    folder.mkdir()
    events = pl.read_parquet(world / "raw" / "events-*.parquet").with_columns(**columns)
    events.write_parquet(folder / "events.parquet")
    return folder


def missing_file(world, tmp):
    return ["features", world / "small.toml", "--data", tmp / "nowhere", "--out", tmp / "out"]


def wrong_column(world, tmp):
    return ["features", world / "small.toml", "--data", world / "raw", "--out", tmp / "out", "--set", "data.user_id=userid"]


def empty_file(world, tmp):
    (tmp / "raw").mkdir()
    (tmp / "raw" / "events.csv").write_text("")
    return ["features", world / "small.toml", "--data", tmp / "raw", "--out", tmp / "out"]


def unknown_key(world, tmp):
    return ["features", world / "small.toml", "--data", world / "raw", "--out", tmp / "out", "--set", "train.epoch=3"]


def unknown_section(world, tmp):
    return ["features", world / "small.toml", "--data", world / "raw", "--out", tmp / "out", "--set", "trian.epochs=3"]


def wrong_type(world, tmp):
    return ["train", world / "small.toml", "--dataset", world / "dataset", "--out", tmp / "run", "--set", "train.epochs=many"]


def nan_id(world, tmp):
    bad = raw(world, tmp / "raw", item_id=pl.when(pl.int_range(pl.len()) == 7).then(float("nan")).otherwise("item_id"))
    return ["features", world / "small.toml", "--data", bad, "--out", tmp / "out", "--strict"]


def flipped_byte(world, tmp):
    shutil.copytree(world / "bundle", tmp / "bundle")
    content = bytearray((tmp / "bundle" / "weights.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp / "bundle" / "weights.safetensors").write_bytes(content)
    return ["recommend", tmp / "bundle", "--history", "1"]


def other_version(world, tmp):
    shutil.copytree(world / "bundle", tmp / "bundle")
    manifest = json.loads((tmp / "bundle" / "manifest.json").read_text())
    (tmp / "bundle" / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    return ["recommend", tmp / "bundle", "--history", "1"]


def unknown_item(world, tmp):
    return ["recommend", world / "bundle", "--history", "Nothing of the Kind"]


def k_of_zero(world, tmp):
    return ["recommend", world / "bundle", "--history", "1", "-k", "0"]


def no_recipe(world, tmp):
    return ["train", "tinny", "--dataset", world / "dataset", "--out", tmp / "run"]


def no_run(world, tmp):
    return ["export", world / "raw", "--out", tmp / "bundle"]


def not_a_setting(world, tmp):
    return ["train", "tiny", "--dataset", world / "dataset", "--out", tmp / "run", "--set", "epochs"]


def another_verbs_section(world, tmp):
    return ["export", world / "run", "--out", tmp / "out", "--set", "model.length=3"]


def unwritable_picture(world, tmp):
    return ["explain", world / "bundle", "--history", "1", "--picture", tmp / "no" / "such.png"]


def unknown_item_to_explain(world, tmp):
    return ["explain", world / "bundle", "--history", "1", "--item", "Nothing of the Kind"]


def two_items_to_explain(world, tmp):
    return ["explain", world / "bundle", "--history", "1", "--item", "2", "3"]


def unknown_to_the_search(world, tmp):
    search = "tune.search={model={dropot=[0.1, 0.2]}}"
    return ["tune", world / "small.toml", "--dataset", world / "dataset", "--out", tmp / "out", "--set", search]


def no_such_split(world, tmp):
    return ["evaluate", world / "bundle", "--dataset", world / "dataset", "--set", "protocol.split=future"]


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (missing_file, "nowhere"),
        (wrong_column, "did you mean 'user_id'"),
        (empty_file, "events.csv"),
        (unknown_key, "did you mean epochs"),
        (unknown_section, "did you mean train"),
        (wrong_type, "train.epochs"),
        (nan_id, "null_id"),
        (flipped_byte, "SHA-256"),
        (other_version, "format 99"),
        (unknown_item, "no item 'Nothing of the Kind'"),
        (k_of_zero, "k is 0"),
        (no_recipe, "no recipe 'tinny'"),
        (no_run, "no manifest.json"),
        (not_a_setting, "section.key=value"),
        (no_such_split, "future"),
        (another_verbs_section, "[index] and [depth] and [serving] alone"),
        (unwritable_picture, "such.png"),
        (unknown_item_to_explain, "no item 'Nothing of the Kind'"),
        (two_items_to_explain, "one at a time"),
        (unknown_to_the_search, "did you mean dropout"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(mistake, says, world, run, tmp_path, capsys):
    words = mistake(world, tmp_path)
    capsys.readouterr()
    assert run(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recsys: ") or "Traceback" in line]
    assert len(lines) == 1
    assert says in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["resplit", "--out", "out", "--set", "split.validation_days=-1"], "split: "),
        (["resplit", "--out", "out", "--set", "split.metod=global_time"], "unknown key split.metod; did you mean method?"),
        (["leaks", "--set", "leaks.released=nope"], "leaks.released: no attribute 'nope'; none is known; data."),
        (["leaks", "--set", "leaks.released=3"], "leaks.released: "),
    ],
    ids=str,
)
def test_what_a_verbs_own_setting_must_be_is_told_without_a_recipe(words, says, world, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run(words[0], world / "dataset", *words[1:]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recsys: ")]
    assert line.startswith(f"recsys: {says}")
    assert "Value error" not in line


def test_a_registry_without_bundles_is_told_and_none_is_made(run, tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/none.db"
    for where, says in ((uri, uri), ("off", "MLflow: tracking is off")):
        assert run("bundles", "list", "--set", f"tracking.uri={where}") == 0
        assert capsys.readouterr().out == f"no bundle is registered in {says}\n"
        assert run("bundles", "list", "--set", f"tracking.uri={where}", "--json") == 0
        assert json.loads(capsys.readouterr().out) == []
    assert list(tmp_path.iterdir()) == []


def test_a_rollback_to_nothing_is_told_with_one_prefix(run, tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = Tracking(TrackingSettings(uri=uri))
    (tmp_path / "bundle").mkdir()
    with tracking.run("first"):
        tracking.register(tmp_path / "bundle", "one")
    capsys.readouterr()
    assert run("bundles", "rollback", "--set", f"tracking.uri={uri}") == 2
    assert capsys.readouterr().err.startswith("recsys: nothing to roll back to, no version was champion before 1;")


def test_a_report_that_cannot_be_recorded_is_still_given(world, run, tmp_path, capsys):
    shutil.copytree(world / "run" / "model", tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    manifest["clock"]["tracking"] = {"uri": f"sqlite:///{tmp_path}/gone.db", "run_id": "0" * 32}
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert run("evaluate", tmp_path / "model", "--dataset", world / "dataset", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["users"] == 211
    assert "warning: the report is not recorded" in shown.err


def test_a_nan_id_is_quarantined_and_counted_without_strict(world, run, tmp_path, capsys):
    words = [word for word in nan_id(world, tmp_path) if word != "--strict"]
    assert run(*words) == 0
    assert "events: 1 rows in quarantine: 1 null_id\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["rows"]["quarantined"] == {"null_id": 1}


def test_events_that_no_history_holds_are_told_of_wherever_histories_are_made(world, run, tmp_path, capsys):
    times = pl.read_parquet(world / "raw" / "events-*.parquet")["timestamp"].sort()
    start = int(times[len(times) // 2])
    later = int((times >= start + 7 * 86_400).sum())
    changes = ("split.method=global_time", f"split.test_start={start}", "split.test_days=7", "split.validation_days=3")
    words = [word for change in changes for word in ("--set", change)]
    warning = f"warning: {later:,} events are after the test"
    assert run("features", world / "small.toml", "--data", world / "raw", "--out", tmp_path / "cut", *words) == 0
    assert warning in capsys.readouterr().err
    assert run("history", "import", tmp_path / "cut", "--store", f"sqlite:{tmp_path}/histories") == 0
    assert warning in capsys.readouterr().err
    nights = ("--out", tmp_path / "lists", "-k", 3, "--no-track", "--workers", 1)
    assert run("nightly", world / "bundle", "--dataset", tmp_path / "cut", *nights) == 0
    assert warning in capsys.readouterr().err
    assert run("resplit", tmp_path / "cut", "--out", tmp_path / "whole", "--set", "split.test_days=0") == 0
    assert "warning" not in capsys.readouterr().err
    assert run("resplit", tmp_path / "cut", "--out", tmp_path / "none", "--set", "split.test_start=2038-01-19") == 0
    assert "no event is in the test, so nothing can be judged" in capsys.readouterr().err


def test_an_empty_list_says_why(world, run, capsys):
    assert run("recommend", world / "bundle", "--history", 1, "--allow", 1, "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["items"] == []
    assert "warning: no item is left" in shown.err


def test_a_search_tells_its_trials_and_where_the_best_recipe_is(world, run, tmp_path, capsys):
    changes = ("--set", "tune.trials=2", "--set", "tune.search={optimizer={learning_rate=[1e-3, 1e-2]}}")
    words = ("tune", world / "small.toml", "--dataset", world / "dataset", "--out", tmp_path / "search", *changes)
    assert run(*words) == 0
    shown = capsys.readouterr()
    assert "best.toml: trial " in shown.out
    assert "2 complete, 0 pruned, 0 failed" in shown.out
    assert [line.split(":")[0] for line in shown.err.splitlines() if line.startswith("trial ")] == ["trial 0", "trial 1"]


def test_a_history_may_be_given_in_one_go_or_item_by_item(world, run, capsys):
    answers = []
    for words in (["--history", "1", "2", "3", "-k", "5"], ["--history=1", "-k", "5", "--history", "2", "--history", "3"]):
        capsys.readouterr()
        assert run("recommend", world / "bundle", "--json", *words) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert not {1, 2, 3} & {item["item_id"] for item in answers[0]["items"]}


@pytest.fixture(scope="module")
def described(world, run, tmp_path_factory):
    """A bundle of a model that reads the world's titles both ways, and tables of items."""
    folder = tmp_path_factory.mktemp("described")
    recipe = ("--set", "model.text=both", "--set", "model.heads=2", "--set", "text.size=17")
    assert run("train", world / "small.toml", "--dataset", world / "dataset", "--out", folder / "run", *recipe) == 0
    assert run("export", folder / "run", "--out", folder / "bundle") == 0
    titles = pl.read_parquet(world / "raw" / "items.parquet")["title"]
    pl.DataFrame({"item_id": [1009, 1013], "title": titles[:2]}).write_csv(folder / "new.csv")
    pl.DataFrame({"item_id": [5, 7], "title": ["renamed", "renamed too"]}).write_parquet(folder / "old.parquet")
    return folder


def manifest(bundle):
    return json.loads((bundle / "manifest.json").read_text())


def test_items_are_added_updated_and_removed_by_the_command(described, run, tmp_path, capsys):
    bundle = shutil.copytree(described / "bundle", tmp_path / "bundle")
    changes = [
        (("add", bundle, "--items", described / "new.csv"), "2 items added"),
        (("update", bundle, "--items", described / "old.parquet"), "2 items updated"),
        (("remove", bundle, "--item", "1009", "7", "11"), "3 items removed"),
    ]
    for words, says in changes:
        before = manifest(bundle)["id"]
        capsys.readouterr()
        assert run("items", *words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines == [f"{bundle}: bundle {manifest(bundle)['id']}, {says}"]
        assert manifest(bundle)["before"] == before
    for item in ("1013", "renamed", "7"):
        assert run("recommend", bundle, "--history", item, "-k", "97", "--json") == 0
        named = {found["item_id"] for found in json.loads(capsys.readouterr().out)["items"]}
        assert len(named) == 97
        assert not named & {1009, 7, 11}


def test_another_place_for_the_new_bundle_leaves_the_old_one_alone(described, run, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in (described / "bundle").iterdir()}
    words = (
        ("add", described / "bundle", "--items", described / "new.csv"),
        ("update", described / "bundle", "--items", described / "old.parquet", "--no-register"),
        ("remove", described / "bundle", "--item", "7"),
    )
    for number, (verb, *rest) in enumerate(words):
        capsys.readouterr()
        assert run("items", verb, *rest, "--out", tmp_path / str(number)) == 0
        assert capsys.readouterr().out.startswith(f"{tmp_path / str(number)}: bundle ")
        assert manifest(tmp_path / str(number))["before"] == manifest(described / "bundle")["id"]
    assert {path.name: path.read_bytes() for path in (described / "bundle").iterdir()} == before


def test_items_of_which_nothing_is_known_are_told(described, run, tmp_path, capsys):
    pl.DataFrame({"item_id": [2003, 2011], "title": ["", "qwertz"]}).write_csv(tmp_path / "new.csv")
    capsys.readouterr()
    assert run("items", "add", described / "bundle", "--items", tmp_path / "new.csv", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.strip().endswith("2 items added, 2 of them not recommended: nothing is known of them")


@pytest.fixture(scope="module")
def stocked(world, run, tmp_path_factory):
    """A bundle whose items have attributes, from a file without types: the odd ones are in stock, the price is half the id."""
    folder = tmp_path_factory.mktemp("stocked")
    raw(world, folder / "raw")
    items, number = pl.read_parquet(world / "raw" / "items.parquet"), pl.col("item_id")
    items = items.with_columns(in_stock=number % 2 == 1, price=number / 2, brand=pl.format("brand {}", number % 3))
    items.write_csv(folder / "raw" / "items.csv")
    changes = (
        'data.attribute_columns=["in_stock", "price", "brand"]',
        'data.category_columns=["categories"]',
        "train.epochs=1",
    )
    changes = [word for change in changes for word in ("--set", change)]
    assert run("features", world / "small.toml", "--data", folder / "raw", "--out", folder / "data", *changes) == 0
    assert run("train", world / "small.toml", "--dataset", folder / "data", "--out", folder / "run", *changes) == 0
    assert run("export", folder / "run", "--out", folder / "bundle") == 0
    return folder


def recommended(run, capsys, bundle, *words):
    capsys.readouterr()
    assert run("recommend", bundle, "--history", "1", "2", "-k", "101", "--json", *words) == 0
    return {item["item_id"] for item in json.loads(capsys.readouterr().out)["items"]}


def test_recommended_items_meet_what_the_command_asks_for(stocked, run, capsys):
    items = pl.read_csv(stocked / "raw" / "items.csv")
    everything = recommended(run, capsys, stocked / "bundle")
    genre = items["categories"][0]
    for words, meets in (
        (["in_stock=true"], pl.col("item_id") % 2 == 1),
        (["in_stock=false", "price=5..20.5"], (pl.col("item_id") % 2 == 0) & pl.col("item_id").is_between(10, 41)),
        (["price=..3", "brand=brand 1", "brand=brand 2"], (pl.col("item_id") <= 6) & (pl.col("item_id") % 3 != 0)),
        ([f"categories={genre}", "price=0.."], pl.col("categories") == genre),
    ):
        wanted = set(items.filter(meets)["item_id"]) & everything
        assert 0 < len(wanted) < len(everything)
        assert recommended(run, capsys, stocked / "bundle", "--where", *words) == wanted
        one_by_one = [word for condition in words for word in ("--where", condition)]
        assert recommended(run, capsys, stocked / "bundle", *one_by_one) == wanted
    some = sorted(everything)[:7]
    assert recommended(run, capsys, stocked / "bundle", "--deny", *some[:3]) == everything - set(some[:3])
    assert recommended(run, capsys, stocked / "bundle", "--allow", *some, "--deny", some[2]) == set(some) - {some[2]}
    assert recommended(run, capsys, stocked / "bundle", "--allow", *some, "--where", "in_stock=true") == {
        item for item in some if item % 2
    }


def test_what_is_in_stock_is_updated_by_the_command_alone(stocked, run, tmp_path, capsys):
    (tmp_path / "stock.csv").write_text("item_id,in_stock\n3,false\n4,true\n")
    before = recommended(run, capsys, stocked / "bundle", "--where", "in_stock=true")
    words = ("items", "update", stocked / "bundle", "--items", tmp_path / "stock.csv", "--out", tmp_path / "new")
    assert run(*words) == 0
    assert "2 items updated" in capsys.readouterr().out
    assert recommended(run, capsys, tmp_path / "new", "--where", "in_stock=true") == before - {3} | {4}
    assert run("items", "add", stocked / "bundle", "--items", tmp_path / "stock.csv", "--out", tmp_path / "new") == 2
    assert "no column 'title'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--where", "stock=true"], "items have no 'stock'; did you mean in_stock?"),
        (["--where", "in_stock=perhaps"], "'in_stock' holds true or false, found 'perhaps'"),
        (["--where", "price=cheap"], "'price' holds numbers, found 'cheap'"),
        (["--where", "price"], "write NAME=VALUE"),
        (["--where", "categories=none"], "no item has category 'none'"),
        (["--deny", "1009"], "no item '1009'"),
        (["--allow", "3", "nothing"], "no item 'nothing'"),
    ],
    ids=str,
)
def test_a_filter_that_cannot_be_is_one_clear_line_and_exit_code_2(words, says, stocked, run, capsys):
    capsys.readouterr()
    assert run("recommend", stocked / "bundle", "--history", "1", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("recsys: ")
    assert says in line


def no_items_file(world, folder, tmp):
    return ["add", folder / "bundle", "--items", tmp / "nowhere.csv"]


def no_items_format(world, folder, tmp):
    (tmp / "items.xlsx").write_bytes(b"PK")
    return ["add", folder / "bundle", "--items", tmp / "items.xlsx"]


def no_item_id(world, folder, tmp):
    pl.DataFrame({"itemid": [1009], "title": ["x"]}).write_csv(tmp / "items.csv")
    return ["add", folder / "bundle", "--items", tmp / "items.csv"]


def item_there_already(world, folder, tmp):
    return ["add", folder / "bundle", "--items", folder / "old.parquet"]


def item_not_there(world, folder, tmp):
    return ["update", folder / "bundle", "--items", folder / "new.csv"]


def item_to_remove_not_there(world, folder, tmp):
    return ["remove", folder / "bundle", "--item", "5", "1009"]


def no_text(world, folder, tmp):
    return ["add", world / "bundle", "--items", folder / "new.csv"]


def no_bundle(world, folder, tmp):
    return ["remove", tmp / "nowhere", "--item", "5"]


def a_run(world, folder, tmp):
    return ["remove", folder / "run" / "model", "--item", "5"]


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (no_items_file, "nowhere.csv: is no file of items"),
        (no_items_format, "items.xlsx: is no file of items; give one of .csv"),
        (no_item_id, "no column 'item_id'; did you mean 'itemid'"),
        (item_there_already, "5 is in the bundle already"),
        (item_not_there, "1009 is not in the bundle"),
        (item_to_remove_not_there, "no item '1009'"),
        (no_text, "reads no descriptions of items"),
        (no_bundle, "no manifest.json there"),
        (a_run, "holds a model, not a bundle"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_mistake_about_items_is_one_clear_line_and_changes_nothing(mistake, says, world, described, run, tmp_path, capsys):
    words = mistake(world, described, tmp_path)
    before = manifest(described / "bundle"), manifest(world / "bundle")
    capsys.readouterr()
    assert run("items", *words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recsys: ") or "Traceback" in line]
    assert len(lines) == 1
    assert says in lines[0]
    assert (manifest(described / "bundle"), manifest(world / "bundle")) == before


def test_the_shares_of_words_are_together_1_where_the_model_reads_words(world, described, run, capsys):
    history = ("--history", "1", "2", "3", "5", "7", "11")
    assert run("explain", described / "bundle", *history, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    events = told["events"]
    assert sum(event["attention"] for event in events) == pytest.approx(1)
    assert sum(share for event in events for share in event["words"].values()) == pytest.approx(1)
    assert [bool(event["words"]) for event in events] == [False, False, True, True, True, True]  # model.text_span is 4
    for event in events[2:]:
        assert set(event["words"]) <= {word.strip(",.:;()").casefold() for word in event["title"].split()}
        assert list(event["words"].values()) == sorted(event["words"].values(), reverse=True)
    assert set(told["item"]["words"]) <= {word.strip(",.:;()").casefold() for word in told["item"]["title"].split()}
    assert run("explain", described / "bundle", *history) == 0
    assert " · " in capsys.readouterr().out
    assert run("explain", world / "bundle", *history, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert all("words" not in record for record in (told["item"], *told["events"]))


def test_an_item_is_explained_by_its_title_on_the_terminal(world, run, capsys):
    words = ("explain", world / "bundle", "--history", "1", "2", "3")
    assert run(*words, "--item", "7", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["item"]["item_id"] == 7
    assert run(*words, "--item", told["item"]["title"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"{told['item']['title']} (id 7): score {told['item']['score']:.4f}"
    assert lines[-1] == told["verdict"]
    for event, line in zip(told["events"], lines[-6:-3], strict=True):
        figures = [f"{event[name]:.4f}" for name in ("attention", "drop")]
        assert [cell.strip() for cell in line.strip("│").split("│")] == [str(event["event"]), event["title"], *figures]


def test_a_title_with_brackets_is_shown_as_it_is(capsys):
    records_table([{"title": "[rec] (2007)", "score": 0.5}, {"title": "[/b]", "score": 0.25}])
    shown = capsys.readouterr().out
    assert "[rec] (2007)" in shown
    assert "[/b]" in shown


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_has_help_with_an_example(verb, run, capsys):
    assert run(*verb.split(), "--help") == 0
    assert f"Example: recsys {verb}" in capsys.readouterr().out


def test_the_module_runs_as_the_command_does():
    out = subprocess.run([sys.executable, "-m", "recsys", "--version"], capture_output=True, text=True, check=True).stdout
    assert out.strip() == command.__version__


def test_recommend_takes_diversity_and_popularity_and_shows_probabilities(world, run, capsys):
    recommender = Recommender.load(world / "bundle")
    history = [str(item_id) for item_id in recommender.catalogue.items["item_id"][:3].to_list()]
    options = ["--diversity", "0.5", "--popularity", "0.2", "--probabilities"]
    words = ["recommend", world / "bundle", "--history", *history]
    capsys.readouterr()
    assert run(*words, *options, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == recommender.answer(history, diversity=0.5, popularity=0.2, probabilities=True)
    assert answer["items"] != recommender.answer(history, probabilities=True)["items"]
    assert run(*words, *options) == 0
    shown = capsys.readouterr().out
    for item in answer["items"]:
        assert re.search(rf"{item['score']:.4f}\b.*\b{item['probability']:.4f}\b", shown)
    assert "probability" in shown
    assert run(*words) == 0
    assert "probability" not in capsys.readouterr().out
    for wrong in (["--diversity", "2"], ["--diversity", "nan"], ["--popularity", "nan"], ["--popularity", "inf"]):
        assert run(*words, *wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"recsys: {wrong[0].removeprefix('--')} must be")
        assert error.count("\n") == 1
    assert run("recommend", world / "run", "--history", *history, "--probabilities") == 2
    assert "not calibrated; export it with --dataset" in capsys.readouterr().err


@pytest.mark.parametrize(("others", "threads", "told"), [(1.0, 2, 1), (0.3, 2, 0), (1.0, 1, 0), (0.6, 7, 1)])
def test_threads_of_a_training_that_wait_for_other_work_are_told_of_once(others, threads, told, monkeypatch, capsys):
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(terminal, "others_cores", lambda: lambda: others)
    with terminal.training_progress() as shown:
        for epoch in (1, 2):
            shown["observe"](Observation(epoch, 7, 7, 5.0, 1e-3, 3.0))
            shown["observe"](Observation(epoch, 7, 7, 5.0, 1e-3, 3.0, {"ndcg@10": 0.25}))
    assert capsys.readouterr().err.count("OMP_NUM_THREADS=1") == told


def test_other_work_is_seen_and_our_own_is_not_counted():
    cores = psutil.cpu_count()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        others, start, used = terminal.others_cores(), time.monotonic(), time.process_time()
        while time.monotonic() < start + 2:
            pass
        found, ours = others(), (time.process_time() - used) / (time.monotonic() - start)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert 0.3 < found < cores - ours + 0.1
