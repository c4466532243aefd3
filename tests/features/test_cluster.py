"""Parts of the users on a Ray cluster of two nodes: the same files as in one process, whatever happens to the workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import features.events
import features.parts
from features.dataset import Dataset
from features.parts import AHEAD, TRIES, Engine, Made, Part, on_cluster
from recsys.errors import DataError, RecsysError
from tests.features.test_build import BAD, BY_TIME, BY_USERS, account
from tests.serving.servers import free_port

ROOT = Path(__file__).parents[2]
Build = Callable[..., Dataset]
pytestmark = [
    # Ray's own
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning:ray"),
]


@pytest.fixture(scope="module")
def nodes(address: str) -> Iterator[Engine]:
    with on_cluster(address) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _parts_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features.parts, "AT_ONCE", 307)
    monkeypatch.setattr(features.events, "STRETCH", 401)


def raw_events() -> list[pl.DataFrame]:
    """Two days of texts with rows that are bad in every way, some more than once."""
    row = pl.int_range(2503)
    good = pl.select(user_id=row * 37 % 211, item_id=row**2 % 101, timestamp=row * 7919 % 1013, seq=row).cast(pl.String)
    bad = [pl.DataFrame(cells, dict.fromkeys(cells, pl.String)) for cells, _ in BAD.values()]
    one, other = good[:1499], good[1499:]
    return [pl.concat([one, *bad, one[:7]], how="diagonal"), pl.concat([*bad, other, one[3:11]], how="diagonal")]


LAYOUTS: dict[str, dict[str, Any]] = {
    "leave one out": {},
    "by time": {"split": {**BY_TIME, "test_start": 700, "test_days": 1}, "repeats": "keep"},
    "by order, users held out": {"split": BY_USERS, "order": "seq"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cluster_writes_the_files_that_one_process_writes(layout: str, folder: Path, build_in: Build, nodes: Engine) -> None:
    events, items = raw_events(), pl.DataFrame({"item_id": ["3", "5", "5"], "title": ["c", "e", "g"]})
    options = {"items": items, "suffix": ".csv", **LAYOUTS[layout]}
    want = account(build_in(folder, *events, **options))
    assert account(build_in(folder, *events, engine=nodes, **options)) == want
    build_in(folder, events[0], engine=nodes, **options)
    appended = account(build_in(folder, events[1], append=True, engine=nodes, **{**options, "items": None}))
    assert (appended["hash"], appended["rows"], appended["counts"]) == (want["hash"], want["rows"], want["counts"])


def test_workers_that_die_change_nothing(folder: Path, build_in: Build, nodes: Engine, tmp_path: Path) -> None:
    def dying(work: Callable[[Part], Made], parts: Iterable[Part], folder: Path) -> Iterator[Made]:
        def die_once(part: Part) -> Made:
            mark = tmp_path / str(part.number)
            if folder.name == "staged" and part.number in (1, 3, 5, 7) and not mark.exists():
                mark.touch()
                if part.number in (1, 5):
                    work(part)  # it dies of what comes after
                else:
                    (folder / f"{part.number}.part").write_text("half of a part")
                os.kill(os.getpid(), signal.SIGKILL)
            return work(part)

        return nodes(die_once, parts, folder)

    events = pl.concat(raw_events(), how="diagonal")
    want = account(build_in(folder, events))
    assert account(build_in(folder, events, engine=dying)) == want
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "5", "7"]


PARTS = [Part(number, None, None) for number in range(11)]
ROWS = pl.DataFrame({"row": [2, 3, 5]})


def test_parts_are_worked_off_at_once_few_ahead_and_told_in_their_order(nodes: Engine, tmp_path: Path) -> None:
    def wait_for_the_next(part: Part) -> Made:
        (tmp_path / str(part.number)).touch()
        while part.number == 0 and not (tmp_path / "1").exists():
            time.sleep(0.01)
        return ROWS * part.number, part.number

    taken: list[Part] = []

    def parts() -> Iterator[Part]:
        for part in PARTS:
            taken.append(part)
            yield part

    made = nodes(wait_for_the_next, parts(), tmp_path)
    assert next(made)[1] == 0
    assert len(taken) == AHEAD * 2
    rest = list(made)
    assert [told for _, told in rest] == list(range(1, 11))
    assert all(rows.equals(ROWS * told) for rows, told in rest)
    assert not list(tmp_path.glob("*.part"))


def test_what_the_user_can_mend_comes_from_the_worker_as_it_is(nodes: Engine, tmp_path: Path) -> None:
    def refuse(part: Part) -> Made:
        raise DataError("this is why")

    with pytest.raises(DataError, match=r"^this is why$"):
        list(nodes(refuse, PARTS, tmp_path))
    with pytest.raises(DataError, match=r"gone: node .* does not find this folder; give --out a folder that all nodes see"):
        list(nodes(refuse, PARTS, tmp_path / "gone"))


def test_a_mistake_of_ours_comes_with_where_it_was_made(nodes: Engine, tmp_path: Path) -> None:
    def stumble(part: Part) -> Made:
        return ROWS, 1 / part.number

    with pytest.raises(ZeroDivisionError, match="stumble"):
        list(nodes(stumble, PARTS, tmp_path))


def test_a_part_of_which_workers_die_ends_the_build(nodes: Engine, tmp_path: Path) -> None:
    def die(part: Part) -> Made:
        with (tmp_path / str(part.number)).open("a") as file:
            file.write(".")
        os.kill(os.getpid(), signal.SIGKILL)
        return ROWS, None

    with pytest.raises(RecsysError, match="its workers are lost"):
        list(nodes(die, PARTS[:1], tmp_path))
    assert (tmp_path / "0").read_text() == "." * TRIES


def test_the_command_takes_a_cluster_and_says_no_more_than_without(address: str, tmp_path: Path) -> None:
    pl.DataFrame({"user_id": [1, 1, 2], "item_id": [3, 5, 5], "timestamp": [7, 11, 13]}).write_csv(tmp_path / "events.csv")
    (tmp_path / "shop.toml").write_text("")
    words = [sys.executable, "-m", "recsys", "features", tmp_path / "shop.toml", "--data", tmp_path, "--out"]
    said = [
        subprocess.run([*words, tmp_path / "out", *where], cwd=ROOT, capture_output=True, text=True, check=True)
        for where in ([], ["--ray", address])
    ]
    assert said[0].stdout == said[1].stdout != ""
    assert said[0].stderr == said[1].stderr


def test_the_command_says_in_a_line_why_there_is_no_cluster(
    run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="ray: is not installed")
    (tmp_path / "shop.toml").write_text("")
    words = "features", tmp_path / "shop.toml", "--data", tmp_path, "--out", tmp_path / "out"
    assert run(*words, "--ray", f"127.0.0.1:{free_port()}") == 2
    said = capfd.readouterr().err.strip()
    assert "no Ray cluster can be used there" in said
    assert "\n" not in said
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(*words, "--ray", "local") == 2
    assert "attention-recommender[ray]" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
