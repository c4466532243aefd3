"""What holds for every test: one thread, no tracking store in the working directory, and what optional parts need."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from features.synthetic import SyntheticSettings, write
from recsys import __main__ as command
from tests.forked import forking

collect_ignore = ["benchmarks"]  # measured by hand, never asserted on time

torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", hypothesis.settings(), deadline=None)  # no test asserts on time
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _tracking_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes runs where it was started; a test of tracking names its own store."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "off")


@pytest.fixture(autouse=True, scope="session")
def _explanations_are_measured_on_few_histories() -> Iterator[None]:
    """On all they take seconds a bundle; the commands of the documents measure them so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.export.HISTORIES", 13)
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip by marker; the reasons are printed at the end (-rs)."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("torchrec") and importlib.util.find_spec("torchrec") is None:
        pytest.skip("needs torchrec")


@pytest.fixture(scope="session")
def forked() -> Iterator[dict[str, str]]:
    """An environment in which `recsys` and `python` start at once: see tests/forked.py."""
    with forking() as environment:
        yield environment


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a Ray cluster of two nodes, each with one CPU."""
    pytest.importorskip("ray", reason="ray: is not installed")
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        yield nodes.address
    finally:
        nodes.shutdown()


SMALL = """
[data]
now = 1800000000
[model]
embedding_size = 8
blocks = 1
hidden_size = 11
length = 13
[train]
epochs = 2
batch_tokens = 503
[tracking]
uri = "off"
"""


def _run(*words: object) -> int:
    before, sys.argv = sys.argv, ["recsys", *map(str, words)]
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture(scope="session")
def run() -> Callable[..., int]:
    """run(verb, …) → the command's exit code, in this process."""
    return _run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw logs, a recipe, a data set, a run and a bundle, all made by the command."""
    folder = tmp_path_factory.mktemp("command")
    write(SyntheticSettings(users=211, items=101, events_per_user=13), folder / "raw")
    (folder / "small.toml").write_text(SMALL)
    recipe = folder / "small.toml"
    assert _run("features", recipe, "--data", folder / "raw", "--out", folder / "dataset") == 0
    assert _run("train", recipe, "--dataset", folder / "dataset", "--out", folder / "run") == 0
    assert _run("export", folder / "run", "--out", folder / "bundle", "--dataset", folder / "dataset") == 0
    return folder
