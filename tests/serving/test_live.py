"""A live bundle is replaced while requests go on, by a whole one that answers as it must, or not at all."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow
import pytest

from features.dataset import Dataset
from recsys.bundle import MANIFEST, open_directory, renew
from recsys.errors import BundleError, RequestError, SetupError
from recsys.tracking import Tracking, TrackingSettings
from serving.engine import Recommender
from serving.export import export
from serving.golden import GOLDEN
from serving.index import IndexSettings
from serving.items import remove
from serving.live import AGE, MARK, Arm, Arms, PathSource, RegistrySource, Requests, load, source_of
from tests.serving.conftest import ATTRIBUTES, write_run, write_shop

HISTORY = [5, 7, 11]
K = 13


@pytest.fixture(scope="module")
def shop_with_attributes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_shop(tmp_path_factory.mktemp("live-shop"), ATTRIBUTES)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, shop_with_attributes: Dataset) -> tuple[Path, Path]:
    """Two bundles of the same goods that answer otherwise."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.golden.HISTORIES", 7)  # by more, each of a hundred swaps takes longer
        for seed, name in ((3, "one"), (5, "other")):
            settings = {"text": "both", "similarity": "cosine", "temperature": 0.1, "length": 7}
            run = write_run(folder / f"run-{name}", shop_with_attributes, seed=seed, scale=1, **settings)
            export(run, folder / name, IndexSettings())
    return folder / "one", folder / "other"


class Heard:
    """What an arm told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def __call__(self, kind: str, detail: str) -> None:
        self.events.append((kind, detail))


@pytest.fixture
def live(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A link to the first bundle, as those who replace bundles lead it."""
    lead(tmp_path / "live", pair[0])
    return tmp_path / "live"


def lead(link: Path, bundle: Path) -> None:
    beside = link.with_name("beside")
    beside.symlink_to(bundle)
    os.replace(beside, link)


def identity(bundle: Path) -> str:
    return str(open_directory(bundle, verify=False).manifest["id"])


def test_an_arm_takes_the_bundle_that_its_source_names_and_tells_it(live: Path, pair: tuple[Path, Path]) -> None:
    heard = Heard()
    arm = Arm("champion", PathSource(live), on_event=heard)
    first = arm.recommender
    assert (first.id, arm.problem, arm.swaps) == (identity(pair[0]), None, 0)
    assert not arm.refresh()
    assert arm.recommender is first
    lead(live, pair[1])
    assert arm.refresh()
    assert (arm.recommender.id, arm.problem, arm.swaps) == (identity(pair[1]), None, 1)
    assert heard.events == [("swap", f"champion: bundle {identity(pair[1])} is live")]
    assert arm.recommender.answer(HISTORY, K) == Recommender.load(pair[1]).answer(HISTORY, K)
    assert arm.since <= time.time()
    assert not arm.refresh()
    assert arm.refresh(force=True)
    assert arm.swaps == 2


def test_a_bundle_that_is_replaced_in_its_place_is_seen(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "bundle")
    arm = Arm("champion", PathSource(tmp_path / "bundle"))
    gone = arm.recommender.answer(HISTORY, 1)["items"][0]["item_id"]
    remove(tmp_path / "bundle", [gone])
    assert arm.recommender.answer(HISTORY, 1)["items"][0]["item_id"] == gone
    assert arm.refresh()
    assert gone not in [item["item_id"] for item in arm.recommender.answer(HISTORY, 100)["items"]]


def test_what_mlflow_writes_beside_a_bundle_that_it_loads_is_no_new_bundle(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "bundle")
    before = PathSource(tmp_path / "bundle").current()
    (tmp_path / "bundle" / MARK).write_text("model_name: recsys\n")
    assert PathSource(tmp_path / "bundle").current() == before
    (tmp_path / "bundle" / "other").touch()
    assert PathSource(tmp_path / "bundle").current() != before


def test_an_arm_without_a_first_bundle_is_an_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere: cannot be read \(No such file"):
        Arm("champion", PathSource(tmp_path / "nowhere"))
    shutil.copytree(pair[0], tmp_path / "bundle")
    (tmp_path / "bundle" / GOLDEN).unlink()
    with pytest.raises(BundleError, match=r"golden\.json: named in manifest\.json and missing"):
        Arm("champion", PathSource(tmp_path / "bundle"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"no manifest\.json there"):
        Arms(PathSource(pair[0]), PathSource(tmp_path / "empty"))


def test_one_flipped_bit_in_any_file_keeps_the_old_bundle_and_names_the_file_until_it_is_mended(
    live: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    heard = Heard()
    arm = Arm("champion", PathSource(live), on_event=heard)
    kept, told = arm.recommender, arm.recommender.answer(HISTORY, K)
    new = tmp_path / "new"
    shutil.copytree(pair[1], new)
    lead(live, new)
    names = [*open_directory(new).manifest["files"], MANIFEST]
    assert {path.name for path in new.iterdir()} == set(names)
    for name in names:
        content = (new / name).read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            flipped = bytearray(content)
            flipped[place] ^= 1
            (new / name).write_bytes(flipped)
            for force in (False, False, True):
                assert not arm.refresh(force)
                assert arm.problem is not None, name
                assert name in arm.problem
                assert "\n" not in arm.problem
                assert arm.recommender is kept
        (new / name).write_bytes(content)
    assert {kind for kind, _ in heard.events} == {"problem"}
    assert all(left != right for left, right in pairwise(heard.events)), "the same problem is told once"
    assert arm.recommender.answer(HISTORY, K) == told
    assert arm.refresh(), "all are mended"
    assert (arm.problem, arm.recommender.id) == (None, identity(pair[1]))


def test_a_whole_bundle_that_answers_otherwise_than_it_did_keeps_the_old(
    live: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    arm = Arm("champion", PathSource(live))
    kept, told = arm.recommender, json.loads((pair[1] / GOLDEN).read_text())
    told[5]["items"].reverse()
    renew(open_directory(pair[1]), tmp_path / "new", {GOLDEN: lambda path: path.write_text(json.dumps(told))}, {})
    open_directory(tmp_path / "new")
    lead(live, tmp_path / "new")
    assert not arm.refresh()
    assert arm.problem is not None
    assert f"{GOLDEN}: the answer to history 5 is not the golden one" in arm.problem
    assert (arm.recommender, arm.swaps) == (kept, 0)


def test_what_failed_is_loaded_again_when_it_changes_or_is_asked_for_and_not_before(
    live: Path, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = Arm("champion", PathSource(live))
    shutil.copytree(pair[1], tmp_path / "new")
    vectors = tmp_path / "new" / "vectors.safetensors"
    whole = vectors.read_bytes()
    vectors.write_bytes(b"")
    lead(live, tmp_path / "new")
    loaded: list[Path] = []

    def counting(path: Path) -> Recommender:
        loaded.append(path)
        return load(path)

    monkeypatch.setattr("serving.live.load", counting)
    assert [arm.refresh() for _ in range(3)] == [False] * 3
    assert len(loaded) == 1
    assert not arm.refresh(force=True)
    assert len(loaded) == 2
    vectors.write_bytes(whole)
    assert arm.refresh()
    assert [arm.refresh() for _ in range(3)] == [False] * 3
    assert len(loaded) == 3


def test_a_source_that_is_gone_is_a_problem_until_it_is_back(live: Path, pair: tuple[Path, Path]) -> None:
    heard = Heard()
    arm = Arm("challenger", PathSource(live), on_event=heard)
    kept = arm.recommender
    live.unlink()
    for _ in range(3):
        assert not arm.refresh()
    assert arm.problem == f"{live}: cannot be read (No such file or directory); give the directory of a bundle"
    assert heard.events == [("problem", f"challenger: {arm.problem}")]
    assert arm.recommender is kept
    lead(live, pair[0])
    assert not arm.refresh()
    assert arm.problem is None


def test_a_bundle_that_changes_while_it_is_loaded_is_not_taken(live: Path, pair: tuple[Path, Path]) -> None:
    class Changing(PathSource):
        def current(self) -> tuple[str, Path]:
            found = super().current()
            lead(live, pair[1] if live.resolve() == pair[0].resolve() else pair[0])
            return found

    with pytest.raises(BundleError, match="changed while it was loaded"):
        Arm("champion", Changing(live))


def test_a_mistake_of_ours_keeps_the_old_bundle_too(
    live: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = Arm("champion", PathSource(live))
    kept = arm.recommender
    lead(live, pair[1])
    with monkeypatch.context() as patch:
        patch.setattr("serving.live.compare", lambda *_: [][0])
        assert not arm.refresh()
    assert arm.problem == "it cannot be loaded (IndexError: list index out of range)"
    assert arm.recommender is kept
    assert arm.refresh(force=True)


def test_a_bundle_that_is_live_needs_its_directory_no_more(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "bundle")
    arm = Arm("champion", PathSource(tmp_path / "bundle"))
    shutil.rmtree(tmp_path / "bundle")
    mine, whole = arm.recommender, Recommender.load(pair[0])
    question: dict[str, Any] = {"where": {"in_stock": True, "categories": ["lamp", "tent"]}, "probabilities": False}
    assert mine.answer(HISTORY, K, **question) == whole.answer(HISTORY, K, **question)
    titles = ["Woven scarf of merino WOOL"]
    assert mine.answer(titles, K, find=mine.catalogue.by_title) == whole.answer(titles, K, find=whole.catalogue.by_title)


def test_a_hundred_swaps_under_load_lose_no_answer_mix_no_bundles_and_leave_nothing_behind(
    live: Path, pair: tuple[Path, Path]
) -> None:
    histories = [[5], [7, 11], [13, 17, 19, 23], list(range(2, 43))]
    wholes = [Recommender.load(bundle, threads=1) for bundle in pair]
    wanted = {whole.id: [whole.answer(history, K) for history in histories] for whole in wholes}
    one, other = wanted.values()
    assert all(left["items"] != right["items"] for left, right in zip(one, other, strict=True)), "else nothing is told apart"
    arms = Arms(PathSource(live))
    arms.requests.record(HISTORY, None, K)
    arm, stop = arms.champion, threading.Event()
    answered: list[Counter[str]] = []
    wrong: list[object] = []

    def read() -> None:
        counts: Counter[str] = Counter()
        answered.append(counts)
        while not stop.is_set():
            for number, history in enumerate(histories):
                try:
                    answer = arm.recommender.answer(history, K)
                    if answer != wanted[answer["bundle"]][number]:
                        wrong.append(answer)
                    counts[answer["bundle"]] += 1
                except Exception as error:
                    wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    olds = []
    try:
        for swap in range(100):
            olds.append(weakref.ref(arm.recommender))
            lead(live, pair[1 - swap % 2])
            assert arm.refresh(), arm.problem
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert wrong == []
    assert arm.swaps == 100
    assert all(set(counts) == set(wanted) for counts in answered), "both readers have met both bundles"
    gc.collect()
    assert [old for old in olds if old() is not None] == []


def test_an_old_bundle_is_freed_at_once_when_its_last_answer_is_out(live: Path, pair: tuple[Path, Path]) -> None:
    arm = Arm("champion", PathSource(live))
    lead(live, pair[1])
    gc.collect()
    gc.disable()
    try:
        old = weakref.ref(arm.recommender)
        weights = weakref.ref(arm.recommender.scan.vectors_VE)
        assert arm.refresh()
        assert (old(), weights()) == (None, None), "a cycle keeps it until the collector comes by"
    finally:
        gc.enable()


def test_a_new_bundle_is_warmed_with_the_latest_requests_of_which_it_knows_enough(
    live: Path, pair: tuple[Path, Path], dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = Requests(most=3)
    asked: list[tuple[Any, ...]] = []
    answer = Recommender.answer

    def listen(self: Recommender, history: Any, k: int = 10, **more: Any) -> Any:
        asked.append((self.id, tuple(history), k, more["times"]))
        return answer(self, history, k, **more)

    arm = Arm("champion", PathSource(live), requests)
    monkeypatch.setattr(Recommender, "answer", listen)
    for number in range(7):
        requests.record([number, "no item"], [17, 19] if number == 5 else None, K)
    lead(live, pair[1])
    assert arm.refresh()
    there = identity(pair[1])
    assert asked[1:] == [(there, (number, "no item"), K, (17, 19) if number == 5 else None) for number in (4, 5, 6)]
    export(write_run(tmp_path / "run", dataset, time="gaps"), tmp_path / "timed", IndexSettings())
    lead(live, tmp_path / "timed")
    assert arm.refresh(), arm.problem
    requests.forget()
    assert requests.kept == []


def test_a_new_bundle_keeps_nothing_of_what_it_was_warmed_with(live: Path, pair: tuple[Path, Path]) -> None:
    requests = Requests()
    requests.record(list(range(2, 43)), None, K)
    arm = Arm("champion", PathSource(live), requests)
    for bundle in pair:
        lead(live, bundle)
        assert arm.refresh(force=True)
        assert arm.recommender.reader is not None
        assert arm.recommender.reader.kept.bytes == 0
    arm.recommender.answer(list(range(2, 43)), K)
    assert arm.recommender.reader.kept.bytes > 0, "else nothing is tried here"


def test_what_was_recorded_is_dropped_after_some_minutes_also_where_nobody_asks(
    pair: tuple[Path, Path],
) -> None:
    now = [1000.0]
    requests = Requests(clock=lambda: now[0])
    for second in (0, 7, AGE + 3):
        now[0] = 1000.0 + second
        requests.record([int(second)], None, K)
    assert [each.items for each in requests.kept] == [(7,), (303,)]
    arms = Arms(PathSource(pair[0]))
    arms.requests = requests
    now[0] += AGE + 1
    arms.watch(0.001)
    while requests._kept:
        time.sleep(0.001)
    arms.close()


def test_what_is_recorded_is_no_one_s(pair: tuple[Path, Path]) -> None:
    arms = Arms(PathSource(pair[0]))
    arms.requests.record([5, "7"], [11, 13], 17)
    (kept,) = arms.requests.kept
    assert vars(kept) == {"items": (5, "7"), "times": (11, 13), "k": 17}


def test_a_share_of_the_users_gets_the_challenger_and_each_keeps_their_arm(pair: tuple[Path, Path]) -> None:
    users = [f"user {number}" for number in range(10_007)]
    arms = Arms(PathSource(pair[0]), PathSource(pair[1]), share=0.3, salt="spring")
    assert (arms.champion.recommender.id, arms.named("challenger").recommender.id) == tuple(map(identity, pair))
    chosen = {user for user in users if arms.of(user) is arms.challenger}
    assert abs(len(chosen) / len(users) - 0.3) < 4 * (0.3 * 0.7 / len(users)) ** 0.5
    assert [user for user in users[:13] if user in chosen] == KNOWN
    arms.share = 0.5
    assert chosen < {user for user in users if arms.of(user) is arms.challenger}, "who had it keeps it"
    arms.salt, arms.share = "autumn", 0.3
    again = {user for user in users if arms.of(user) is arms.challenger}
    assert abs(len(chosen & again) / len(users) - 0.09) < 0.02, "another salt draws anew"
    for share, name in ((0.0, "champion"), (1.0, "challenger")):
        arms.share = share
        assert {arms.of(user).name for user in [*users[:101], "", "\ud800"]} == {name}
    assert arms.of(None) is arms.champion


KNOWN = ["user 0", "user 5", "user 9", "user 10"]
"""Of the first 13, who has the challenger: the same on every machine and in every process."""


def test_without_a_challenger_everyone_gets_the_champion(pair: tuple[Path, Path]) -> None:
    arms = Arms(PathSource(pair[0]))
    assert arms.all == [arms.champion]
    assert {arms.of(user) for user in (None, "", "user 7")} == {arms.champion}
    assert arms.named("champion") is arms.champion
    with pytest.raises(RequestError, match="no arm 'challenger'; ask for champion"):
        arms.named("challenger")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), 0.5])
def test_a_share_that_cannot_be_is_refused(share: float, pair: tuple[Path, Path]) -> None:
    with pytest.raises(SetupError, match="share"):
        Arms(PathSource(pair[0]), PathSource(pair[1]) if share != 0.5 else None, share)


def test_watched_arms_follow_their_sources_until_they_are_closed(live: Path, pair: tuple[Path, Path]) -> None:
    swapped = threading.Event()
    arms = Arms(PathSource(pair[0]), PathSource(live), share=0.5, on_event=lambda *_: swapped.set())
    arms.watch(0.01)
    lead(live, pair[1])
    assert swapped.wait(60)
    arms.close()
    arms.close()
    assert arms.challenger is not None
    assert (arms.champion.swaps, arms.challenger.recommender.id) == (0, identity(pair[1]))
    lead(live, pair[0])
    assert "bundles" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
def registry(tmp_path: Path, pair: tuple[Path, Path]) -> TrackingSettings:
    """The first bundle is version 1, the second version 2 and champion."""
    settings = TrackingSettings(uri=f"sqlite:///{tmp_path / 'runs.db'}", experiment="goods", model="goods")
    for bundle in pair:
        tracking = Tracking(settings)
        with tracking.run(bundle.name):
            version = tracking.register(bundle, identity(bundle))
        tracking.promote(version)
    return settings


def test_a_promoted_version_goes_live_and_a_rollback_brings_the_one_before(
    registry: TrackingSettings, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    arm = Arm("champion", RegistrySource("models:/goods@champion", registry.uri, tmp_path / "cache"))
    fixed = Arm("challenger", RegistrySource("models:/goods/1", registry.uri, tmp_path / "cache"))
    assert (arm.recommender.id, fixed.recommender.id) == (identity(pair[1]), identity(pair[0]))
    change: list[tuple[Callable[[], object], Path]] = [
        (lambda: Tracking(registry).promote("1"), pair[0]),
        (lambda: Tracking(registry).rollback(), pair[1]),
        (lambda: Tracking(registry).rollback(), pair[0]),
    ]
    for act, bundle in change:
        act()
        assert arm.refresh()
        assert not fixed.refresh()
        assert arm.recommender.id == identity(bundle)
    assert arm.recommender.path.is_relative_to(tmp_path / "mlartifacts"), "files of this machine are read where they lie"
    assert not (tmp_path / "cache").exists()


def test_a_registered_bundle_that_is_altered_where_it_lies_does_not_go_live(
    registry: TrackingSettings, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    arm = Arm("champion", RegistrySource("models:/goods/1", registry.uri))
    source = RegistrySource("models:/goods@champion", registry.uri)
    (source.current()[1] / "vectors.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match="vectors"):
        Arm("challenger", source)
    mlflow.MlflowClient(registry.uri).delete_registered_model_alias("goods", "champion")
    with pytest.raises(SetupError, match="has no alias champion of model goods"):
        source.current()
    assert arm.recommender.id == identity(pair[0])


@pytest.mark.parametrize(
    "uri", ["models:/goods", "models:/goods/latest", "models:/@champion", "models:/a/1/2", "models:/a@b@c"]
)
def test_an_address_that_names_no_registered_bundle_is_refused(uri: str) -> None:
    with pytest.raises(SetupError, match="names no registered bundle; give models:/NAME@ALIAS or models:/NAME/VERSION"):
        source_of(uri)


def test_an_address_is_of_the_registry_or_a_path(tmp_path: Path) -> None:
    assert isinstance(source_of("models:/goods@champion", "off"), RegistrySource)
    assert source_of(str(tmp_path)) == PathSource(tmp_path)
