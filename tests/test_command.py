"""The command tells the user's mistakes in one line and leaves with 2; every verb has help with an example."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from recsys import __main__ as command


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


def unknown_to_the_search(world, tmp):
    search = "tune.search={model={dropot=[0.1, 0.2]}}"
    return ["tune", world / "small.toml", "--dataset", world / "dataset", "--out", tmp / "out", "--set", search]


def no_such_split(world, tmp):
    return ["evaluate", world / "bundle", "--dataset", world / "dataset", "--split", "future"]


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
        (another_verbs_section, "[index] and [depth] alone"),
        (unwritable_picture, "such.png"),
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
    assert "1 rows in quarantine" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["rows"]["quarantined"] == {"null_id": 1}


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


VERBS = [name.name or name.callback.__name__ for name in command.app.registered_commands if name.callback]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, run, capsys):
    assert run(verb, "--help") == 0
    assert f"Example: recsys {verb}" in capsys.readouterr().out


def test_the_module_runs_as_the_command_does():
    out = subprocess.run([sys.executable, "-m", "recsys", "--version"], capture_output=True, text=True, check=True).stdout
    assert out.strip() == command.__version__
