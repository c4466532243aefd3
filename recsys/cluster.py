"""A Ray cluster: reached, or started on this machine, without a word to the terminal, and left at the end."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from recsys.errors import RecsysError, SetupError

LOCAL = "local"
"""The address of a cluster that is this machine, and is started and stopped here."""
SECONDS = 5
"""Within which a cluster lets itself be reached."""
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")
"""What libraries read as they load: each process has one thread of arithmetic, and as many processes as cores are fastest."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""What keeps Ray from the network and from the terminal, where it is not set already."""


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray with the cluster at HOST:PORT or `auto`, of which this machine is a node, or LOCAL, which is stopped afterwards.

    Raises SetupError: no Ray, or no cluster there.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError:
        raise SetupError("Ray is not installed; run: pip install 'attention-recommender[ray]'") from None
    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":  # the terminal; what goes into files, or is others', stays
            handler.setLevel(logging.CRITICAL)
    try:
        _reach(address)
        with _silent():
            ray.init(
                address,
                include_dashboard=False if address == LOCAL else None,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                runtime_env={"env_vars": dict.fromkeys(ONE_THREAD, "1")},
            )
    except Exception as error:  # Ray has no class of its own for it
        raise SetupError(
            f"{address}: no Ray cluster can be used there ({_last_line(error)}); "
            f"start one, and this on one of its nodes, or give {LOCAL!r}"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def told_of_losses(ray: Any, name: str, do: str) -> Iterator[None]:
    """Raises RecsysError: the cluster's workers are lost meanwhile; says what to do."""
    try:
        yield
    except ray.exceptions.RayTaskError:  # a mistake of ours, with where it was made
        raise
    except ray.exceptions.RayError as error:
        raise RecsysError(f"{name}: its workers are lost ({_last_line(error)}); {do}") from None


def _last_line(error: Exception) -> str:
    """The last of what an error says, where its cause stands."""
    return next(reversed(str(error).strip().splitlines()), type(error).__name__).strip().rstrip(".")


@contextmanager
def _silent() -> Iterator[None]:
    """Meanwhile nothing of this process, also not of its libraries in other languages, reaches the terminal."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _reach(address: str) -> None:
    """Raises OSError, ValueError: nobody listens there; Ray itself would try for a minute."""
    if "://" in address:
        raise ValueError("clients of Ray see no files of the cluster")
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host, int(port)), SECONDS).close()
