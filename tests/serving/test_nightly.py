"""The nightly job: every user once, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import polars as pl
import pytest

from features.build import build
from features.dataset import Dataset
from features.schema import DataSettings
from recsys.batch import FIRST_ITEM
from recsys.bundle import sha256
from recsys.config import Recipe
from recsys.errors import BundleError, DataError, GuardError, RecsysError, RequestError
from serving import shards as making
from serving.engine import Recommender
from serving.export import export
from serving.guards import GuardSettings
from serving.history import KEEP, open_store
from serving.history import Event as Visit
from serving.index import IndexSettings
from serving.intake import dataset_source, events_source, store_source
from serving.nightly import NightlySettings, nightly
from serving.nights import LIVE, Night, Nights, lists_file, shard_of, users_file
from serving.shards import Facts, Task, Terms
from serving.tables import SOURCES, write_table
from serving.workers import Here, Processes
from tests.serving.conftest import write_run
from tests.serving.nights import lists_of, score_all

K, NOW = 11, 10**10


@pytest.fixture(scope="module")
def recommender(bundles: dict[str, Path]) -> Recommender:
    return Recommender.load(bundles["exact"], threads=1)


@pytest.fixture(scope="module")
def whole(recommender: Recommender, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Night:
    """A night that nothing disturbed."""
    return score_all(recommender, dataset, tmp_path_factory.mktemp("whole"), K, NOW)


def content(night: Night) -> dict[str, str]:
    """The hash of each file of a night, as it lies there."""
    return {name: sha256(night.path / name) for name in night.manifest["files"]}


def test_every_user_has_a_list_of_new_items_by_all_their_events(
    recommender: Recommender, dataset: Dataset, tmp_path: Path
) -> None:
    heard: list[tuple[str, int, int]] = []
    night = score_all(recommender, dataset, tmp_path / "new folder", K, progress=lambda *said: heard.append(said))
    lists = lists_of(tmp_path / "new folder")
    assert lists.schema == {"user_id": pl.String, "item_id": pl.Int64, "rank": pl.Int32, "score": pl.Float32}
    assert lists["user_id"].unique(maintain_order=True).to_list() == dataset.user_ids.to_list()
    assert lists["rank"].to_list() == list(range(1, K + 1)) * 211
    had = dataset.events.select("user_id", "item_id").collect()
    assert lists.join(had, on=["user_id", "item_id"]).is_empty()
    said = night.manifest
    assert (said["users"], said["rows"], said["listed"], said["underfilled"], said["popular"]) == (211, 211 * K, 211, 0, 0)
    assert said["events"] == len(had) and said["left_out"] == {}
    assert sum(part["rows"] for part in said["parts"]) == len(lists)
    assert said["coverage"] == lists["item_id"].n_unique() / recommender.items
    assert said["best"]["mean"] == pytest.approx(lists.filter(rank=1)["score"].mean())
    assert said["clock"]["users_per_second"] > 0
    assert heard[-1] == ("nightly", 211, 211) and heard[0][0] == "read"
    assert pl.read_parquet_metadata(night.lists(0)) | {"ARROW:schema": ""} == {
        "bundle": recommender.id,
        "now": str(said["terms"]["now"]),
        "ARROW:schema": "",
    }


def test_a_user_stands_in_the_shard_of_the_hash_of_the_id(whole: Night) -> None:
    for shard in range(whole.shards):
        for table in (pl.read_parquet(whole.lists(shard)), pl.read_parquet(whole.path / users_file(shard))):
            assert {shard_of(user, whole.shards) for user in table["user_id"]} <= {shard}
            assert table["user_id"].is_sorted()
    users = pl.read_parquet(whole.path / "users-*.parquet")
    assert users["user_id"].n_unique() == len(users) == 211
    assert shard_of(17, 1009) == shard_of("17", 1009) == 222


def test_the_bytes_do_not_depend_on_how_many_users_are_at_work_at_once(
    recommender: Recommender, dataset: Dataset, whole: Night, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "USERS", 7)
    night = score_all(recommender, dataset, tmp_path, K, NOW)
    assert content(night) == content(whole)
    assert night.manifest["hash"] == whole.manifest["hash"]


def test_lists_end_where_the_items_do(recommender: Recommender, dataset: Dataset, tmp_path: Path) -> None:
    night = score_all(recommender, dataset, tmp_path, recommender.items)
    warm = dataset.items.filter(pl.col("row") < FIRST_ITEM + recommender.items)["item_id"]
    had = dataset.events.select("user_id", "item_id").collect().unique().filter(pl.col("item_id").is_in(warm.implode()))
    assert len(lists_of(tmp_path)) == night.manifest["rows"] == 211 * recommender.items - len(had)
    assert night.manifest["underfilled"] == 211


def test_terms_are_those_of_a_request(recommender: Recommender, dataset: Dataset, tmp_path: Path) -> None:
    catalogue = recommender.catalogue
    deny, allow = catalogue.item_ids[:5], catalogue.item_ids[3:200]
    terms = Terms(k=K, filter_seen=False, deny=(str(deny[0]), *deny[1:]), allow=tuple(allow), reasons=True)
    nightly(recommender, dataset_source(dataset.path), Nights(tmp_path), terms)
    lists = lists_of(tmp_path)
    assert set(lists["item_id"]) <= set(allow) - set(deny)
    sequences = dataset.sequences
    for user in (0, 3, 101):
        history = [catalogue.item_id(row) for row in sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]]
        own = lists.filter(user_id=dataset.user_ids[user])
        answer = recommender.answer(history, K, filter_seen=False, deny=deny, allow=allow)
        assert own["item_id"].to_list() == [item["item_id"] for item in answer["items"]]
        for item, because in own.select("item_id", "because").rows():
            near = dict(recommender.similar(catalogue.resolve(item), recommender.items))
            near[catalogue.resolve(item)] = 1.0
            read = [row for row in map(catalogue.resolve, history) if row in near]
            assert near[catalogue.resolve(because)] == pytest.approx(max(near[row] for row in read), abs=1e-6)


def test_events_after_the_moment_that_is_asked_for_are_left_out_and_counted(
    recommender: Recommender, dataset: Dataset, tmp_path: Path
) -> None:
    now = 1_000_000 * 50 + 600  # amid the events of user 50; those of later users come after it
    night = score_all(recommender, dataset, tmp_path, K, now, guards=GuardSettings(popular=1))
    later = len(dataset.events.filter(pl.col("timestamp") > now).collect())
    assert night.manifest["left_out"] == {"later": later}
    users = pl.read_parquet(tmp_path / LIVE / "users-*.parquet").sort("user_id")
    assert users["source"].to_list() == [SOURCES.index("retrieved")] * 51 + [SOURCES.index("popularity")] * 160
    assert night.manifest["popular"] == 160


@pytest.fixture
def grown(dataset: Dataset, tmp_path: Path) -> Dataset:
    """The same with a new user and with events of seven users that came later; and without one of the users."""
    events = dataset.events.select("user_id", "item_id", "timestamp").collect().filter(pl.col("user_id") != "user 011")
    ids = [f"user {user:03}" for user in (3, 29, 58, 87, 131, 177, 209)] + ["user 999"]
    more = [(user, item, 10**9 + item) for user in ids for item in (13, 17, 19)]
    table = pl.concat([events, pl.DataFrame(more, schema=events.schema, orient="row")])
    folder = tmp_path / "grown"
    folder.mkdir()
    table.write_parquet(folder / "events.parquet")
    dataset.items.select("item_id", "title").write_parquet(folder / "items.parquet")
    build(folder, Recipe("made-up", {}), folder / "dataset")
    return Dataset.open(folder / "dataset")


def copied(night: Night, folder: Path) -> Path:
    """A folder of nights in which the same night is live."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", str(night.path.parents[1]), str(folder)], check=True)
    return folder


def test_a_night_of_what_changed_equals_a_full_one(
    recommender: Recommender, dataset: Dataset, grown: Dataset, whole: Night, tmp_path: Path
) -> None:
    full = score_all(recommender, grown, tmp_path / "full", K, NOW + 1)
    assert (full.manifest["clock"]["computed"], full.manifest["clock"]["full_because"]) == (
        211,
        "there is no whole night before",
    )
    delta = score_all(recommender, grown, copied(whole, tmp_path / "delta"), K, NOW + 1)
    assert delta.manifest["clock"]["computed"] == 8
    assert delta.manifest["clock"]["taken_from"] == whole.path.name
    assert content(delta) == content(full)
    same = score_all(recommender, grown, tmp_path / "delta", K, NOW + 1)
    assert same.manifest["clock"]["computed"] == 0
    assert content(same) == content(full)
    assert Night.open(tmp_path / "delta", verify=True).path == same.path
    again = score_all(recommender, grown, tmp_path / "delta", K, NOW + 1, full=True)
    assert (again.manifest["clock"]["computed"], again.manifest["clock"]["full_because"]) == (211, "asked for")
    assert content(again) == content(full)
    kept = sorted(path.name for path in (tmp_path / "delta" / "nights").iterdir())
    assert kept == [same.path.name, again.path.name]


@pytest.mark.parametrize(
    ("terms", "why"),
    [
        ({"k": K + 2}, "terms"),
        ({"filter_seen": False}, "terms"),
        ({"deny": ("1",)}, "terms"),
        ({"reasons": True}, "terms"),
    ],
    ids=str,
)
def test_where_anything_but_histories_changed_every_list_is_made(
    recommender: Recommender, dataset: Dataset, whole: Night, tmp_path: Path, terms: dict[str, Any], why: str
) -> None:
    folder = copied(whole, tmp_path / "lists")
    night = nightly(
        recommender, dataset_source(dataset.path), Nights(folder), replace(Terms(k=K, now=NOW), **terms),
        guards=GuardSettings(overlap=0),
    )  # fmt: skip
    assert night.manifest["clock"]["computed"] == 211
    assert why in night.manifest["clock"]["full_because"]


def test_another_bundle_or_a_damaged_night_makes_every_list(
    recommender: Recommender, bundles: dict[str, Path], dataset: Dataset, whole: Night, tmp_path: Path
) -> None:
    folder = copied(whole, tmp_path / "lists")
    night = score_all(Recommender.load(bundles["ivf"]), dataset, folder, K, NOW)
    assert night.manifest["clock"]["full_because"] == "the bundle is another"
    folder = copied(whole, tmp_path / "damaged")
    with Night.open(folder).lists(0).open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    told: list[str] = []
    night = score_all(recommender, dataset, folder, K, NOW, tell=told.append)
    assert (night.manifest["clock"]["computed"], night.manifest["hash"]) == (211, whole.manifest["hash"])
    assert "SHA-256" in told[0]


def test_a_model_that_reads_when_it_is_asked_takes_lists_of_the_same_moment_alone(dataset: Dataset, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", dataset, time="both", request_time=True)
    export(run, tmp_path / "bundle", IndexSettings(), dataset)
    recommender = Recommender.load(tmp_path / "bundle")
    score_all(recommender, dataset, tmp_path / "lists", K, NOW)
    assert score_all(recommender, dataset, tmp_path / "lists", K, NOW).manifest["clock"]["computed"] == 0
    later = score_all(recommender, dataset, tmp_path / "lists", K, NOW + 10**6)
    assert later.manifest["clock"]["computed"] == 211
    assert later.manifest["hash"] == score_all(recommender, dataset, tmp_path / "other", K, NOW + 10**6).manifest["hash"]
    before = time.time()
    asked = score_all(recommender, dataset, tmp_path / "lists", K).manifest["terms"]
    assert before - 1 <= asked["now"] <= time.time() and asked["until"]


# What a kill may leave


class Killed(BaseException):
    """Ends a night as a kill would: nothing tidies up after it."""


class Fails(Here):
    """Gives up after so many shards."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Facts]:
        for place, facts in enumerate(super().run(tasks)):
            if place == 3:
                raise Killed
            yield facts


def test_an_interrupted_night_goes_on_by_the_histories_that_it_read(
    recommender: Recommender, dataset: Dataset, whole: Night, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        score_all(recommender, dataset, tmp_path, K, NOW, engine=Fails(recommender))
    assert Nights(tmp_path).live() is None
    told: list[str] = []
    night = score_all(recommender, dataset, tmp_path, K, NOW, tell=told.append)
    assert night.manifest["clock"]["resumed"] in (4, 5)
    assert "goes on with the night of" in told[0]
    assert content(night) == content(whole)
    assert not Nights(tmp_path).work.exists()


def test_a_night_that_goes_on_is_of_the_moment_at_which_it_was_begun(
    recommender: Recommender, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.nightly.time.time", lambda: 1.5 * 10**9)
    with pytest.raises(Killed):
        score_all(recommender, dataset, tmp_path, K, engine=Fails(recommender))
    monkeypatch.setattr("serving.nightly.time.time", lambda: 2.5 * 10**9)
    assert score_all(recommender, dataset, tmp_path, K).manifest["terms"]["now"] == 1.5 * 10**9


@pytest.mark.parametrize("other", ["k", "now", "bundle", "age", "full"])
def test_what_is_left_of_another_night_is_not_gone_on_with(
    other: str, recommender: Recommender, bundles: dict[str, Path], dataset: Dataset, tmp_path: Path
) -> None:
    first = score_all(recommender, dataset, tmp_path, K, NOW) if other == "full" else None
    with pytest.raises(Killed):
        score_all(recommender, dataset, tmp_path, K, NOW, engine=Fails(recommender))
    told: list[str] = []
    chosen = Recommender.load(bundles["ivf"]) if other == "bundle" else recommender
    k, now = K + 2 * (other == "k"), NOW + (other == "now")
    settings = NightlySettings(resume_hours=0 if other == "age" else 12)
    night = score_all(chosen, dataset, tmp_path, k, now, tell=told.append, settings=settings, full=other == "full")
    assert night.manifest["clock"]["resumed"] == 0
    assert "begun anew" in told[0]
    assert night.manifest["terms"]["k"] == k and night.manifest["bundle"] == chosen.id
    assert first is None or night.manifest["hash"] == first.manifest["hash"]


JOB = """
import os, signal, sys
from pathlib import Path
kill_at, after = int(sys.argv[1]), sys.argv[2] == "after"
count, real = 0, {name: getattr(os, name) for name in ("replace", "rename", "symlink")}

def counted(name):
    def call(*arguments, **options):
        global count
        count += 1
        if count == kill_at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        done = real[name](*arguments, **options)
        if count == kill_at and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return call

for name in real:
    setattr(os, name, counted(name))
from serving.engine import Recommender
from serving.history import KEEP, open_store
from serving.history import Event as Visit
from serving.intake import dataset_source, events_source, store_source
from serving.nightly import nightly
from serving.nights import Nights
from serving.shards import Terms
recommender = Recommender.load(Path(sys.argv[3]), verify=False, threads=1)
nightly(recommender, dataset_source(Path(sys.argv[4])), Nights(Path(sys.argv[5])), Terms(k=11, now=10**10))
print(count)
"""
"""A night that kills its process before or after so many files got their names; says how many there were."""


def job(
    forked: dict[str, str], program: Path, kill_at: int, when: str, bundle: Path, dataset: Path, folder: Path
) -> subprocess.CompletedProcess[str]:
    program.write_text(JOB)
    words = ["python", program, str(kill_at), when, bundle, dataset, folder]
    return subprocess.run(words, capture_output=True, text=True, env=forked)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_night_killed_where_a_file_gets_its_name_ends_with_the_bytes_of_an_undisturbed_one(
    when: str,
    bundles: dict[str, Path],
    recommender: Recommender,
    dataset: Dataset,
    grown: Dataset,
    forked: dict[str, str],
    tmp_path: Path,
) -> None:
    score_all(recommender, grown, tmp_path / "lists", K, NOW)
    copies, counted = tmp_path / "copies", 0
    undisturbed = score_all(recommender, dataset, copied(Night.open(tmp_path / "lists"), copies / "0"), K, NOW)
    while True:
        counted += 3 if when == "after" else 2  # some of the places, so that the test is done in a minute
        folder = copied(Night.open(tmp_path / "lists"), copies / str(counted))
        before = Night.open(folder).id
        done = job(forked, tmp_path / "job.py", counted, when, bundles["exact"], dataset.path, folder)
        if done.returncode == 0:
            assert int(done.stdout) < counted
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        seen = Night.open(folder, verify=True)  # whatever happened, readers see one whole night
        assert seen.id == before or seen.manifest["hash"] == undisturbed.manifest["hash"]
        night = score_all(recommender, dataset, folder, K, NOW)
        assert content(Night.open(folder, verify=True)) == content(undisturbed)
        assert not Nights(folder).work.exists()
        assert night.manifest["users"] == 211
    assert counted > 18  # users and lists of eight shards, the plan, the night, the link


def test_a_night_whose_whole_job_is_killed_at_any_moment_goes_on(
    bundles: dict[str, Path], dataset: Dataset, whole: Night, forked: dict[str, str], tmp_path: Path
) -> None:
    words = ["recsys", "nightly", str(bundles["exact"]), "--dataset", str(dataset.path)]
    words += ["--out", str(tmp_path / "lists"), "-k", str(K), "--now", str(NOW), "--workers", "2", "--no-track"]
    draw = random.Random(3)
    for _ in range(2):
        with subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=forked) as process:
            work, since = Nights(tmp_path / "lists").work, time.monotonic()
            wanted = draw.randrange(0, 5)
            while process.poll() is None and len(list(work.glob("lists-*.parquet"))) < wanted and time.monotonic() < since + 60:
                time.sleep(0.002)
            process.kill()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=forked)
    assert content(Night.open(tmp_path / "lists", verify=True)) == content(whole)


def test_a_process_that_dies_is_replaced_and_its_shards_are_made(
    bundles: dict[str, Path], recommender: Recommender, dataset: Dataset, whole: Night, tmp_path: Path
) -> None:
    class Kills(Processes):
        def run(self, tasks: Sequence[Task]) -> Iterator[Facts]:
            for place, facts in enumerate(super().run(tasks)):
                if place == 1:
                    for child in children():
                        os.kill(child, signal.SIGKILL)
                yield facts

    night = score_all(recommender, dataset, tmp_path, K, NOW, engine=Kills(bundles["exact"], 2))
    assert content(night) == content(whole)
    assert night.manifest["clock"]["computed"] == 211


def children() -> list[int]:
    """Processes that compute for this one."""
    import psutil

    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


def test_a_shard_that_kills_every_process_ends_the_night_and_keeps_the_others(
    bundles: dict[str, Path], recommender: Recommender, dataset: Dataset, whole: Night, tmp_path: Path
) -> None:
    over = Event()

    def kill() -> None:
        while not over.wait(0.01):
            for child in children():
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)

    killer = Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(RecsysError, match=r"3 processes died of it .* start again"):
            score_all(recommender, dataset, tmp_path, K, NOW, engine=Processes(bundles["exact"], 1))
    finally:
        over.set()
        killer.join()
    assert content(score_all(recommender, dataset, tmp_path, K, NOW)) == content(whole)


def test_two_jobs_do_not_make_a_night_in_one_folder(recommender: Recommender, dataset: Dataset, tmp_path: Path) -> None:
    with Nights(tmp_path).making(), pytest.raises(RecsysError, match="another process is at it"):
        score_all(recommender, dataset, tmp_path, K)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_store_that_is_empty_is_said_and_read_again(
    workers: int, bundles: dict[str, Path], recommender: Recommender, tmp_path: Path
) -> None:
    url = f"sqlite:{tmp_path / 'histories'}"
    store = open_store(url)
    nights, engine = Nights(tmp_path / "lists"), Processes(bundles["exact"], workers)
    with pytest.raises(DataError, match=f"{url}: has no user; give histories"):
        nightly(recommender, store_source(url, KEEP), nights, Terms(k=K), engine=engine)
    store.append("grace", [Visit(1, 10**9), Visit(5, 10**9 + 1)])
    night = nightly(recommender, store_source(url, KEEP), nights, Terms(k=K))
    assert (night.manifest["users"], night.manifest["events"]) == (1, 2)
    answer = recommender.answer([1, 5], K)
    assert lists_of(tmp_path / "lists")["item_id"].to_list() == [item["item_id"] for item in answer["items"]]
    with pytest.raises(RequestError, match="workers are 0"):
        Processes(bundles["exact"], 0)


def test_a_process_that_finds_another_bundle_ends_the_night(
    bundles: dict[str, Path], recommender: Recommender, dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=f"holds bundle .*, the night is of {recommender.id}; start it again"):
        score_all(recommender, dataset, tmp_path, K, engine=Processes(bundles["ivf"], 1))
    assert Nights(tmp_path).live() is None


# Guards


def refused(recommender: Recommender, dataset: Dataset, folder: Path, **guards: float) -> str:
    """What is said where a guard does not hold; the last night stays live, and `force` computes nothing."""
    nights = Nights(folder)
    before = nights.live()
    with pytest.raises(GuardError):
        score_all(recommender, dataset, folder, K, guards=GuardSettings(**guards))
    live = nights.live()
    assert (live and live.id) == (before and before.id)
    broken = [guard for guard in nights.refused()["guards"] if not guard["holds"]]
    assert len(broken) == 1
    again = score_all(recommender, dataset, folder, K, guards=GuardSettings(**guards), force=True)
    assert again.manifest["clock"]["computed"] == 0
    assert [guard for guard in again.manifest["guards"] if not guard["holds"]] == broken
    return str(broken[0]["guard"])


def test_guard_covered(recommender: Recommender, dataset: Dataset, tmp_path: Path) -> None:
    ids = tuple(recommender.catalogue.item_ids[:1])  # which some users had
    with pytest.raises(GuardError, match=r"covered is 0.*nothing is live"):
        nightly(recommender, dataset_source(dataset.path), Nights(tmp_path), Terms(k=K, allow=ids))


def test_guard_popular(recommender: Recommender, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"popular is 0\.7583, at most 0\.5 may be"):
        score_all(recommender, dataset, tmp_path, K, 1_000_000 * 50 + 600)


@pytest.fixture
def few(dataset: Dataset, tmp_path: Path) -> Dataset:
    """Every second user alone."""
    folder = tmp_path / "few"
    folder.mkdir()
    events = dataset.events.select("user_id", "item_id", "timestamp").collect()
    events.filter(pl.col("user_id").str.tail(1).cast(pl.Int64) % 2 == 0).write_parquet(folder / "events.parquet")
    dataset.items.select("item_id", "title").write_parquet(folder / "items.parquet")
    build(folder, Recipe("made-up", {}), folder / "dataset")
    return Dataset.open(folder / "dataset")


def test_guard_users(recommender: Recommender, few: Dataset, whole: Night, tmp_path: Path) -> None:
    assert refused(recommender, few, copied(whole, tmp_path / "lists")) == "users"


def test_guard_overlap(recommender: Recommender, dataset: Dataset, whole: Night, tmp_path: Path) -> None:
    """Of a bundle whose weights were drawn otherwise."""
    other = write_run(tmp_path / "run", dataset, seed=1)
    export(other, tmp_path / "bundle", IndexSettings(), dataset)
    chosen = Recommender.load(tmp_path / "bundle")
    folder = copied(whole, tmp_path / "lists")
    assert refused(chosen, dataset, folder, overlap=0.5, drift=10**6, head=1) == "overlap"


def test_guard_drift(dataset: Dataset, whole: Night, tmp_path: Path) -> None:
    """Of a bundle that likes everything more."""
    other = write_run(tmp_path / "run", dataset, scale=70)
    export(other, tmp_path / "bundle", IndexSettings(), dataset)
    folder = copied(whole, tmp_path / "lists")
    assert refused(Recommender.load(tmp_path / "bundle"), dataset, folder, drift=0.01, overlap=0, head=1) == "drift"


def test_guard_head(recommender: Recommender, bundles: dict[str, Path], dataset: Dataset, whole: Night, tmp_path: Path) -> None:
    """Of lists in which the most popular items are worth less than they were."""
    chosen = recommender.with_profile(
        replace(recommender.serving, popularity=-50.0), *(settings(recommender) for settings in (depth, index))
    )
    chosen.manifest = recommender.manifest | {"id": "another"}
    folder = copied(whole, tmp_path / "lists")
    assert refused(chosen, dataset, folder, head=0.01, overlap=0, drift=10**6) == "head"


def depth(recommender: Recommender) -> Any:
    from serving.states import DepthSettings

    return DepthSettings()


def index(recommender: Recommender) -> Any:
    return IndexSettings()


def test_a_night_that_was_refused_is_begun_anew_unless_it_is_forced(
    recommender: Recommender, dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(GuardError, match="nothing is live"):
        nightly(recommender, dataset_source(dataset.path), Nights(tmp_path), Terms(k=K, now=1000))
    told: list[str] = []
    with pytest.raises(GuardError):
        nightly(recommender, dataset_source(dataset.path), Nights(tmp_path), Terms(k=K, now=1000), tell=told.append)
    assert "was refused by its guards; begun anew" in told[0]
    night = nightly(recommender, dataset_source(dataset.path), Nights(tmp_path), Terms(k=K, now=1000), force=True)
    assert (night.manifest["clock"]["computed"], night.manifest["clock"]["found"]) == (0, 211)


def test_users_that_are_all_called_otherwise_trip_the_overlap(
    recommender: Recommender, dataset: Dataset, tmp_path: Path
) -> None:
    score_all(recommender, dataset, tmp_path / "lists", K, NOW)
    events = dataset.events.select(pl.format("U-{}", "user_id").alias("user_id"), "item_id", "timestamp").collect()
    events.write_parquet(tmp_path / "events.parquet")
    source = events_source(str(tmp_path / "events.parquet"), DataSettings())
    with pytest.raises(GuardError, match=r"overlap is 0, at least 0\.1"):
        nightly(recommender, source, Nights(tmp_path / "lists"), Terms(k=K, now=NOW))


def test_a_first_night_is_compared_with_nothing(whole: Night) -> None:
    assert [guard["guard"] for guard in whole.manifest["guards"]] == ["covered", "popular"]


def test_the_overlap_is_that_of_the_first_ten_items(
    recommender: Recommender, grown: Dataset, whole: Night, tmp_path: Path
) -> None:
    before = lists_of(whole.path.parents[1]).filter(pl.col("rank") <= 10)
    for settings in (NightlySettings(), NightlySettings(users_per_shard=3)):  # of as many shards, and of more
        folder = copied(whole, tmp_path / f"lists {settings.users_per_shard}")
        night = score_all(recommender, grown, folder, K, NOW, settings=settings)
        after = lists_of(folder).filter(pl.col("rank") <= 10)
        both = set(before["user_id"]) & set(after["user_id"])
        shared = len(before.join(after, on=["user_id", "item_id"])) / (10 * len(both))
        found = {guard["guard"]: guard["found"] for guard in night.manifest["guards"]}
        assert found["overlap"] == pytest.approx(shared) and shared < 1


# What goes wrong


def test_a_job_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(frames: list[pl.DataFrame], schema: pl.Schema, path: Path, **said: object) -> None:
        path.write_text("half a")
        raise RequestError("half way")

    monkeypatch.setattr("serving.tables.write_parquet", fail)
    (tmp_path / "lists.parquet").write_text("old")
    with pytest.raises(RequestError, match="half way"):
        write_table(pl.DataFrame({"a": [1]}), tmp_path / "lists.parquet", {})
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_nothing_is_written_for_a_job_that_has_ended(tmp_path: Path) -> None:
    with pytest.raises(RecsysError, match="no longer wanted"):
        write_table(pl.DataFrame({"a": [1]}), tmp_path / "lists.parquet", {}, lambda: False)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_is_named(recommender: Recommender, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecsysError, match="cannot be written"):
        score_all(recommender, dataset, tmp_path / "file" / "lists", K)
    for terms, said in (
        (Terms(k=0), "k is 0"),
        (Terms(deny=("nobody's",)), 'no item "nobody\'s"'),
        (Terms(where={"colour": "red"}), "items have no 'colour'"),
    ):
        with pytest.raises(RequestError, match=said):
            nightly(recommender, dataset_source(dataset.path), Nights(tmp_path / "lists"), terms)
    assert not (tmp_path / "lists").exists()
    for settings in ({"keep": 1}, {"users_per_shard": 0}, {"resume_hours": -1}):
        with pytest.raises(ValueError, match="must"):
            NightlySettings(**settings)  # type: ignore[arg-type]
    for guards in ({"covered": 1.1}, {"drift": -1}):
        with pytest.raises(ValueError, match="must"):
            GuardSettings(**guards)
    with pytest.raises(DataError):
        Night.open(tmp_path)


def test_shards_grow_with_the_users_and_with_the_length_of_lists() -> None:
    settings = NightlySettings()
    assert [settings.shards(users, 100) for users in (0, 1, 32_768, 32_769, 10**6, 10**7)] == [8, 8, 8, 16, 256, 4096]
    assert settings.shards(10**6, 1000) == 1024


def test_the_command_says_what_it_made_and_exits_with_3_where_a_guard_does_not_hold(
    bundles: dict[str, Path], dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from recsys.__main__ import main

    def command(*words: Any) -> int:
        sys.argv = ["recsys", "nightly", str(bundles["exact"]), *map(str, words)]
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    arguments = ("--dataset", dataset.path, "--out", tmp_path / "lists", "-k", K, "--workers", 1, "--no-track")
    assert command(*arguments, "--to", "ftp://lists") == 2
    assert "cannot be delivered there" in capsys.readouterr().err and not (tmp_path / "lists").exists()
    assert command(*arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["users"], told["terms"]["k"], told["clock"]["engine"]) == (211, K, "this process")
    assert command(*arguments, "--set", "guards.users=1", "--set", "guards.popular=0") == 0
    assert "211 users, 211 of them as they were, 2,321 rows" in capsys.readouterr().out
    assert command(*arguments, "--full", "--now", 1000) == 3
    said = capsys.readouterr().err
    assert ", at most 0.5 may be" in said and "the last night's lists stay live" in said
    assert command(*arguments, "--store", "sqlite:x") == 2
    assert "give one of --dataset, --store and --events" in capsys.readouterr().err


def test_files_of_a_shard_are_named_by_its_number() -> None:
    assert (lists_file(7), users_file(113)) == ("lists-00007.parquet", "users-00113.parquet")
