"""Lists for when none can be computed."""

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from features.dataset import Dataset
from recsys.batch import FIRST_ITEM
from recsys.errors import DataError, SetupError
from serving import fallback as module
from serving.engine import Recommender
from serving.fallback import NightlyLists, erase_from, nightly, open_lists, popular
from serving.nights import Night, Nights, erased_digest, lists_file, shard_of, users_file, without
from tests.serving.writers import erase, finish, killed_at_each_step, lists_of, write_night

K = 11
STEPS = 29
"""More than an erasure, or the last steps of a night, change names."""


@pytest.fixture(scope="module")
def recommender(bundles: dict[str, Path]) -> Recommender:
    return Recommender.load(bundles["exact"], threads=1)


@pytest.fixture
def folder(dataset: Dataset, tmp_path: Path) -> Path:
    write_night(tmp_path / "lists", all_lists(dataset))
    return tmp_path / "lists"


def all_lists(dataset: Dataset) -> dict[str, list[tuple[int, float]]]:
    return lists_of(dataset.user_ids.to_list(), dataset.items["item_id"].to_list(), K)


def told(folder: Path) -> dict[Any, list[tuple[Any, float]]]:
    """All lists of the live night, as its files have them."""
    night = Night.open(folder, verify=True)
    table = pl.concat([pl.read_parquet(night.lists(shard)) for shard in range(night.shards)])
    assert len(table) == night.manifest["rows"]
    parts = table.partition_by("user_id", as_dict=True, maintain_order=True)
    return {user: list(zip(part["item_id"], part["score"], strict=True)) for (user,), part in parts.items()}


def test_every_user_has_the_list_of_the_live_night(folder: Path, dataset: Dataset) -> None:
    lists, wanted = NightlyLists(folder), all_lists(dataset)
    assert len(lists) == 211
    assert told(folder) == wanted
    for user, listed in wanted.items():
        assert lists.of(user) == listed
    for nobody in ("", "user", "user 0070", "zz", "é"):
        assert lists.of(nobody) == []


@pytest.mark.parametrize("users", [[3, 20, 100, -7, 9], ["b", "a", "é", "aa", "", "z" * 500]])
def test_ids_are_found_as_text_whatever_their_order(users: list[int | str], tmp_path: Path) -> None:
    for shards in (1, 7):
        wanted = lists_of(users, range(2, 31), 3)
        write_night(tmp_path, wanted, shards)
        lists = NightlyLists(tmp_path)
        for user in users:
            assert lists.of(str(user)) == wanted[user]


def test_the_next_night_is_read_when_it_is_live(folder: Path, dataset: Dataset) -> None:
    lists = NightlyLists(folder)
    assert not lists.refresh()
    for wanted in (all_lists(dataset) | {"user 007": [(97, 0.5)]}, {"x": [("new", 0.25)]}, {"y": [(2, 7.0)]}):
        write_night(folder, wanted)
        assert lists.refresh()
        assert not lists.refresh()
        assert {user: lists.of(user) for user in wanted} == wanted
        assert len(lists) == len(wanted)
    (Night.open(folder).lists(0)).write_text("nothing")
    (folder / "live").unlink()
    (folder / "live").symlink_to("nowhere")
    with pytest.raises(DataError, match="cannot be read as lists"):
        lists.refresh()
    assert lists.of("y") == [(2, 7.0)]  # the old ones stay


@pytest.mark.parametrize("what", ["nothing", "folder", "file", "shard"])
def test_what_is_no_folder_of_nights_is_refused(what: str, tmp_path: Path) -> None:
    if what == "folder":
        (tmp_path / "lists").mkdir()
    elif what == "file":
        (tmp_path / "lists").write_text("lists")
    elif what == "shard":
        write_night(tmp_path / "lists", {1: [(2, 0.5)]}).lists(0).write_text("lists")
    with pytest.raises(DataError, match="cannot be read as lists"):
        NightlyLists(tmp_path / "lists")


def test_all_shards_are_of_one_night_whatever_goes_live_and_is_deleted_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each night has one item of its own; a reader finds one item, for all users."""
    users, nights, ended, seen = list(range(101)), 38, threading.Event(), set()
    monkeypatch.setattr(module, "TRIES", nights)  # however slow the machine, more nights than these never come

    def publish() -> None:
        for night in range(1, nights):
            write_night(tmp_path, {user: [(night, 0.5)] for user in users}, 13, keep=1)
        ended.set()

    write_night(tmp_path, {user: [(0, 0.5)] for user in users}, 13, keep=1)
    thread = threading.Thread(target=publish)
    thread.start()
    while not ended.is_set():
        lists = NightlyLists(tmp_path)
        found = {item for user in users for item, _ in lists.of(str(user))}
        assert len(found) == 1
        seen |= found
    thread.join()
    assert seen


def test_shards_that_are_the_same_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = lists_of(range(101), range(2, 43), 5)
    write_night(tmp_path, wanted, 7)
    lists, read = NightlyLists(tmp_path), []
    monkeypatch.setattr(module, "_packed", lambda table, packed=module._packed: read.append(1) or packed(table))
    assert lists.erase("5")
    assert len(read) == 1
    write_night(tmp_path, wanted | {5: [], 100: [(4711, 0.5)]}, 7)
    assert lists.refresh()
    assert len(read) == 2
    assert {user: lists.of(str(user)) for user in wanted} == wanted | {5: [], 100: [(4711, 0.5)]}


def test_an_erased_user_leaves_every_night_and_the_others_stay(folder: Path, dataset: Dataset) -> None:
    wanted = all_lists(dataset)
    second = write_night(folder, wanted | {"user 011": []})
    lists, files = NightlyLists(folder), [second.lists(shard).stat().st_ino for shard in range(3)]
    assert lists.erase("user 007")
    assert not lists.erase("user 007")
    assert lists.of("user 007") == []
    del wanted["user 007"]
    nights = sorted((folder / "nights").iterdir())
    assert told(nights[0]) == wanted
    assert told(nights[1]) == told(folder) == {user: listed for user, listed in wanted.items() if user != "user 011"}
    assert (folder / "live").resolve() == second.path == nights[1]
    live = Night.open(folder, verify=True)
    assert live.id != second.id
    shard = shard_of("user 007", 3)
    for counts, before in ((live.manifest, second.manifest), (live.manifest["parts"][shard], second.manifest["parts"][shard])):
        assert (counts["users"], counts["rows"]) == (before["users"] - 1, before["rows"] - K)
        assert (counts["underfilled"], counts["popular"]) == (before["underfilled"], before["popular"])
    assert live.manifest["listed"] == second.manifest["listed"] - 1
    for place in set(range(3)) - {shard}:
        assert live.manifest["parts"][place] == second.manifest["parts"][place]
        assert live.lists(place).stat().st_ino == files[place]
    assert pl.read_parquet_metadata(live.lists(shard))["bundle"] == "made-up"
    assert len(NightlyLists(folder)) == 209
    assert lists.erase("user 011")  # who has no list, but a line
    assert Night.open(folder).manifest["underfilled"] == second.manifest["underfilled"] - 1
    assert not lists.refresh()
    assert sorted(found.name for found in folder.iterdir()) == [".live.lock", ".unfinished.lock", "live", "nights"]


def test_the_last_user_may_be_erased(tmp_path: Path) -> None:
    write_night(tmp_path, {5: [(2, 0.5)]})
    lists = NightlyLists(tmp_path)
    assert lists.erase("5")
    assert len(lists) == len(NightlyLists(tmp_path)) == 0


def killed(whole: Path, copies: Path, work: Callable[[Path], None]) -> tuple[list[Path], int]:
    """Copies of a folder in each of which a child did the same and was killed one step later; and the place of the first in
    which it got through."""
    folders = [shutil.copytree(whole, copies / str(last), symlinks=True) for last in range(STEPS)]
    spawned = multiprocessing.get_context("spawn")
    ends = spawned.Queue()
    child = spawned.Process(target=killed_at_each_step, args=(folders, work, ends))
    child.start()
    codes = [ends.get(timeout=60) for _ in folders]
    child.join()
    assert codes == sorted(codes)
    assert {codes[0], codes[-1]} == {-signal.SIGKILL, 0}
    return folders, codes.index(0)


def test_an_erasure_that_is_killed_leaves_the_old_night_or_the_new_and_the_next_call_cleans_up(tmp_path: Path) -> None:
    wanted = lists_of(range(23), range(2, 43), 5)
    less = {user: listed for user, listed in wanted.items() if user != 7}
    name = write_night(tmp_path / "lists", wanted).path.name
    folders, through = killed(tmp_path / "lists", tmp_path, partial(erase, user_id="7"))
    kept = []
    for folder in folders:
        left = told(folder)
        kept.append(7 in left)
        assert left in (wanted, less)
        assert Nights(folder).erase("7") == (7 in left)
        assert told(folder) == less
        assert sorted(found.name for found in folder.iterdir()) == [".live.lock", ".unfinished.lock", "live", "nights"]
        assert [found.name for found in (folder / "nights").iterdir()] == [name]
    assert (kept[0], kept[through - 1]) == (True, False)


def sealed(folder: Path) -> tuple[Night, dict[Any, list[tuple[Any, float]]]]:
    """Two nights in a folder, and a third one in the making, which is sealed; the last of the two, and the lists of all."""
    wanted = lists_of(range(23), range(2, 43), 5)
    write_night(folder, wanted)
    second = write_night(folder, wanted)
    shutil.copytree(second.path, Nights(folder).work)
    return second, wanted


def test_a_night_that_is_killed_while_it_goes_live_goes_live_and_what_is_half_deleted_is_deleted(tmp_path: Path) -> None:
    second, wanted = sealed(tmp_path / "lists")
    less = {user: listed for user, listed in wanted.items() if user != 7}
    folders, through = killed(tmp_path / "lists", tmp_path, finish)
    assert through > 7  # the link, the night, the link again, and the files of the first night
    half = 0
    for folder in folders:
        assert told(folder) == wanted
        other = shutil.copytree(folder, folder.with_name(f"erased {folder.name}"), symlinks=True)
        finish(folder)
        assert Night.open(folder, verify=True).path.name > second.path.name
        assert told(folder) == wanted
        half += any(not (found / "manifest.json").exists() for found in (other / "nights").iterdir())
        assert Nights(other).erase("7")
        assert told(other) == less
        nights = sorted((other / "nights").iterdir())
        assert len(nights) in (2, 3)
        for night in nights:
            assert Night.open(night, verify=True).manifest["users"] == 22
        assert not Nights(other).work.exists()
    assert half > 3


@pytest.mark.parametrize("gone", ["manifest.json", "lists-00001.parquet"])
def test_what_is_left_of_a_night_keeps_nobody_and_stops_no_erasure(gone: str, tmp_path: Path) -> None:
    wanted = lists_of(range(23), range(2, 43), 5)
    first, second = (write_night(tmp_path, wanted) for _ in range(2))
    (first.path / gone).unlink()
    assert Nights(tmp_path).erase("7")
    assert [found.name for found in (tmp_path / "nights").iterdir()] == [second.path.name]
    assert 7 not in told(tmp_path)
    (second.path / gone).unlink()
    with pytest.raises(DataError, match=gone):  # readers are at it: it is not deleted
        Nights(tmp_path).erase("11")
    assert second.lists(0).exists()


def test_a_night_to_which_readers_were_led_back_stays_live_until_the_next_one_is_made(tmp_path: Path) -> None:
    nights = Nights(tmp_path)
    first, _ = (write_night(tmp_path, {user: [(2, 0.5)]}) for user in "ab")
    (tmp_path / "live").unlink()
    (tmp_path / "live").symlink_to(first.path)
    with nights.making():
        assert nights.finish(2) is None
    assert told(tmp_path).keys() == {"a"}
    third = write_night(tmp_path, {"c": [(2, 0.5)]})
    assert told(tmp_path).keys() == {"c"}
    assert sorted((tmp_path / "nights").iterdir()) == [first.path, third.path]  # readers may still be at the first


def test_a_link_to_no_night_is_left_alone_and_said(tmp_path: Path) -> None:
    nights = Nights(tmp_path)
    night = write_night(tmp_path, {"a": [(2, 0.5)]})
    shutil.rmtree(night.path)
    with nights.making():
        assert nights.finish(2) is None
    assert Path(os.readlink(tmp_path / "live")).name == night.path.name
    with pytest.raises(DataError, match="is not there; let it name a folder of"):
        nights.live()


def test_a_user_who_is_erased_while_a_night_is_made_is_not_in_it(tmp_path: Path) -> None:
    wanted = lists_of(range(101), range(2, 43), 5)
    nights = Nights(tmp_path)
    first = write_night(tmp_path, wanted, 7)
    with nights.making():
        shutil.copytree(first.path, nights.work)
        (nights.work / "manifest.json").unlink()
        for user in ("7", "11", "nobody"):
            assert nights.erase(user) == (user != "nobody")
        assert nights.unwanted() == {erased_digest(user) for user in ("7", "11", "nobody")}
        said = {key: value for key, value in first.manifest.items() if key not in ("files", "hash", "id", "format")}
        second = nights.publish(first.manifest["files"], said, 2)
    left = {user: listed for user, listed in wanted.items() if user not in (7, 11)}
    assert told(tmp_path) == left
    assert (second.manifest["users"], sum(part["users"] for part in second.manifest["parts"])) == (99, 99)
    assert (second.manifest["rows"], second.manifest["listed"]) == (5 * 99, 99)
    assert nights.unwanted() == set()
    assert {found.name for found in second.path.iterdir()} == {*first.manifest["files"], "manifest.json"}


def test_a_user_who_is_erased_before_a_sealed_night_is_finished_is_not_in_it(tmp_path: Path) -> None:
    second, wanted = sealed(tmp_path)
    nights = Nights(tmp_path)
    with nights.making():
        assert nights.erase("7")
        assert nights.finish(2) is None
        said = {key: value for key, value in second.manifest.items() if key not in ("files", "hash", "id", "format")}
        third = nights.publish(second.manifest["files"], said, 2)
    assert third.path.name > second.path.name
    assert told(tmp_path) == {user: listed for user, listed in wanted.items() if user != 7}


def test_only_the_shards_of_erased_users_are_read_and_lists_only_where_somebody_leaves(tmp_path: Path) -> None:
    work, shards = write_night(tmp_path, lists_of(range(101), range(2, 43), 5), 7).path, 7
    here, nowhere = shard_of("7", shards), next(user for user in "abcdefgh" if shard_of(user, shards) != shard_of("7", shards))
    for shard in set(range(shards)) - {here}:
        (work / lists_file(shard)).write_text("nothing")
        if shard != shard_of(nowhere, shards):
            (work / users_file(shard)).write_text("nothing")
    lost = without(work, shards, {erased_digest("7"), erased_digest(nowhere)}, 5)
    assert lost == {here: {"users": 1, "rows": 5, "listed": 1, "underfilled": 0, "popular": 0}}


def test_a_night_that_nobody_is_making_is_deleted_when_somebody_is_erased(tmp_path: Path) -> None:
    write_night(tmp_path, {5: [(2, 0.5)]})
    (Nights(tmp_path).work / "histories").mkdir(parents=True)
    (Nights(tmp_path).work / "histories" / "part").write_text("user 007")
    assert not Nights(tmp_path).erase("user 007")
    assert not Nights(tmp_path).work.exists()


def test_one_is_erased_from_a_folder_without_reading_all_lists(tmp_path: Path) -> None:
    write_night(tmp_path / "lists", {5: [(2, 0.5)], 7: [(3, 0.5)]})
    assert erase_from(str(tmp_path / "lists"), "5")
    assert not erase_from(str(tmp_path / "lists"), "5")
    assert told(tmp_path / "lists") == {7: [(3, 0.5)]}
    with pytest.raises(DataError, match="cannot be read as lists"):
        erase_from(str(tmp_path / "none"), "5")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("place", ["postgresql://a:canary@localhost/b", "http://a:canary@localhost"])
def test_a_place_of_another_kind_is_refused_without_its_password(place: str) -> None:
    for act in (open_lists, partial(erase_from, user_id="u")):
        with pytest.raises(SetupError, match="redis, rediss, valkey, valkeys") as refused:
            act(place)
        assert "canary" not in str(refused.value)


def test_a_list_holds_what_may_be_recommended_and_is_known(recommender: Recommender) -> None:
    listed: list[tuple[int | str, float]] = [(item, 0.5) for item in (5, 7, "of another shop", 11, 13, 17)]
    rows = {item: recommender.catalogue.by_id(item) for item in (5, 7, 11, 13, 17)}
    allowed_V = torch.ones(recommender.lines, dtype=torch.bool)
    allowed_V[rows[11] - FIRST_ITEM] = False  # type: ignore[operator]
    assert [row for row, _ in nightly(recommender, listed, 3, None, set())] == [rows[5], rows[7], rows[11]]
    assert [row for row, _ in nightly(recommender, listed, 3, allowed_V, {rows[5]})] == [  # type: ignore[arg-type]
        rows[7],
        rows[13],
        rows[17],
    ]
    assert nightly(recommender, listed, 3, torch.zeros(recommender.lines, dtype=torch.bool), set()) == []


def test_the_most_popular_are_those_of_an_empty_history(recommender: Recommender) -> None:
    told = recommender.answer([], 31)["items"]
    found = popular(recommender, 31, None, set())
    assert [recommender.catalogue.item_id(row) for row, _ in found] == [item["item_id"] for item in told]
    assert [score for _, score in found] == [item["score"] for item in told]
    seen = {found[0][0], found[7][0]}
    allowed_V = torch.ones(recommender.lines, dtype=torch.bool)
    allowed_V[found[3][0] - FIRST_ITEM] = False
    rest = [pair for place, pair in enumerate(found) if place not in (0, 3, 7)]
    assert popular(recommender, len(rest), allowed_V, seen) == rest
