"""Shards on a Ray cluster: one of two nodes that is started here, and one that a night starts for itself."""

from __future__ import annotations

import os
import pickle
import platform
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from features.dataset import Dataset
from recsys.bundle import sha256
from recsys.errors import BundleError, SetupError
from serving.cluster import TRIED, Cluster, _Maker
from serving.engine import Recommender
from serving.intake import dataset_source
from serving.nights import PLAN, Night
from serving.shards import HISTORIES, Facts, Task, Terms
from serving.workers import TRIES
from tests.serving.nights import lists_of, score_all
from tests.serving.servers import free_port

ROOT = Path(__file__).parents[2]
K, NOW = 11, 10**9

pytestmark = [
    # Ray's own
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning:ray"),
]


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path]) -> Path:
    return bundles["exact"]


@pytest.fixture(scope="module")
def night(bundle: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Night:
    """As this process makes it."""
    return score_all(Recommender.load(bundle), dataset, tmp_path_factory.mktemp("here"), k=K, now=NOW)


def test_a_cluster_makes_the_night_that_one_process_makes(
    address: str, bundle: Path, dataset: Dataset, night: Night, tmp_path: Path
) -> None:
    engine = Cluster(bundle, address)
    found = score_all(Recommender.load(bundle), dataset, tmp_path, k=K, now=NOW, engine=engine)
    assert found.manifest["hash"] == night.manifest["hash"]
    assert found.manifest["clock"]["computed"] == 211
    assert found.manifest["clock"]["engine"] == f"Ray ({address})"
    assert lists_of(tmp_path)["user_id"].unique(maintain_order=True).to_list() == dataset.user_ids.to_list()


@pytest.fixture
def task(dataset: Dataset, night: Night, tmp_path: Path) -> Task:
    """The only one of a night that begins."""
    dataset_source(dataset.path).deal(tmp_path / HISTORIES, 1, None, lambda done, of: None)
    (tmp_path / PLAN).write_text("plan")
    return Task(tmp_path, 0, night.manifest["bundle"], Terms(k=K, now=NOW), sha256(tmp_path / PLAN))


def test_what_the_user_can_mend_comes_from_the_worker_as_it_is(address: str, task: Task, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"gone: node .* does not find bundle {task.bundle} there"):
        list(Cluster(tmp_path / "gone", address).run([task]))


def test_a_worker_tells_what_its_node_does_not_see(bundle: Path, task: Task, tmp_path: Path) -> None:
    def told(maker: _Maker) -> object:
        return pickle.loads(maker({"task": pickle.dumps(task)})["told"])

    (task.work / TRIED).mkdir()
    for path, bundle_id, said in [
        (tmp_path / "gone", task.bundle, f"gone: node {platform.node()} .* bundle {task.bundle} .* no manifest.json"),
        (bundle, "another", f"does not find bundle another there .it is {task.bundle}"),
    ]:
        assert re.search(said, str(told(_Maker(path, bundle_id))))
    for _ in range(TRIES - 2):
        assert isinstance(told(_Maker(bundle, task.bundle)), Facts)
    assert "shard 0: 3 workers of the Ray cluster died of it" in str(told(_Maker(bundle, task.bundle)))
    (task.work / PLAN).write_text("another night")
    assert "does not find this night there" in str(told(_Maker(bundle, task.bundle)))
    (task.work / PLAN).unlink()
    assert "does not find this night there" in str(told(_Maker(bundle, task.bundle)))


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "nowhere"])
def test_where_there_is_no_cluster_is_said(bundle: Path, task: Task, address: str) -> None:
    pytest.importorskip("ray", reason="ray: is not installed")
    with pytest.raises(SetupError, match="no Ray cluster can be used there"):
        list(Cluster(bundle, address.format(port=free_port())).run([task]))


def test_a_missing_ray_is_named_with_its_extra(bundle: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SetupError, match=r"attention-recommender\[ray\]"):
        list(Cluster(bundle, "local").run([task]))


ALONE = """
import os
import signal
import sys
from pathlib import Path
import psutil
from serving.cluster import Cluster
from serving.engine import Recommender
from serving.intake import dataset_source
from serving.nightly import nightly
from serving.nights import Nights
from serving.shards import Terms

def children():
    return psutil.Process().children(recursive=True)

class Murder(Cluster):
    def run(self, tasks):
        for number, facts in enumerate(super().run(tasks)):
            if not number:
                workers = [child.pid for child in children() if "_Maker" in " ".join(child.cmdline())]
                print(len(workers))
                os.kill(workers[0], signal.SIGKILL)
            yield facts

bundle, dataset, out = map(Path, sys.argv[1:4])
terms = Terms(k=int(sys.argv[4]), now=int(sys.argv[5]))
bundle = Path(os.path.relpath(bundle))
night = nightly(Recommender.load(bundle), dataset_source(dataset), Nights(out), terms, engine=Murder(bundle, "local"))
print(night.manifest["hash"], night.manifest["users"], *children())
"""


def test_a_cluster_that_a_night_starts_bears_a_killed_worker_and_ends_with_it_and_says_nothing(
    bundle: Path, dataset: Dataset, night: Night, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="ray: is not installed")
    words = [sys.executable, "-c", ALONE, bundle, dataset.path, tmp_path / "lists", str(K), str(NOW)]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stderr == ""
    workers, *said = done.stdout.split()
    assert int(workers) == min(psutil.cpu_count(), 8)
    assert said == [night.manifest["hash"], "211"]
