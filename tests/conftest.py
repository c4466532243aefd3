"""What holds for every test: one thread, no tracking store in the working directory, and what optional parts need."""

from __future__ import annotations

import importlib.util

import pytest
import torch

collect_ignore = ["benchmarks"]  # measured by hand, never asserted on time

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _tracking_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes runs where it was started; a test of tracking names its own store."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "off")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip by marker; the reasons are printed at the end (-rs)."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("torchrec") and importlib.util.find_spec("torchrec") is None:
        pytest.skip("needs torchrec")
