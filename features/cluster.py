"""Where parts of the users are worked off at once: on a Ray cluster."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from features.parts import Asked, Engine, Told
from recsys.cluster import connected, told_of_losses
from recsys.errors import DataError, RecsysError

AHEAD = 2
"""Tasks a CPU that are begun before the first of them is told: one that it does, one that waits."""
SECONDS = 10
"""Within which tasks end that are wanted no more."""
TRIES = 3
"""Workers that may die of one part before the build is given up."""


@contextmanager
def on_cluster(address: str) -> Iterator[Engine]:
    """Meanwhile tasks can be done on the CPUs of a cluster; what a dead worker was at, another begins anew.

    All nodes have this version of this package, and see the folder of the data set under the same path. Raises SetupError: no
    Ray, or no cluster there.
    """
    with connected(address) as ray:

        def engine(work: Callable[[Asked], Told], tasks: Iterable[Asked]) -> Iterator[Told]:
            """Raises RecsysError: what a task could not do, or its workers are lost."""
            return _do(ray, address, work, tasks)

        yield engine


def _do(ray: Any, address: str, work: Callable[[Asked], Told], tasks: Iterable[Asked]) -> Iterator[Told]:
    remote = ray.remote(num_cpus=1, max_retries=TRIES - 1)(_tell)
    cpus = max(1, int(ray.cluster_resources().get("CPU", 0)))
    begun: deque[Any] = deque()
    do = "see that all nodes have this package and whether memory runs out, and start again"
    try:
        with told_of_losses(ray, f"Ray ({address})", do):
            for task in tasks:
                begun.append(remote.remote(work, task))
                if len(begun) == AHEAD * cpus:
                    yield _told(ray.get(begun.popleft()))
            while begun:
                yield _told(ray.get(begun.popleft()))
    finally:
        for each in begun:  # of a build that has failed, whose folder goes
            ray.cancel(each, force=True)
        if begun:
            ray.wait(list(begun), num_returns=len(begun), timeout=SECONDS)


def _tell(work: Callable[[Asked], Told], task: Asked) -> Told | RecsysError:
    """What came of a task, or what the user can mend."""
    try:
        if not task.out.parent.is_dir():
            raise DataError(
                f"{task.out.parent}: node {platform.node()} of the Ray cluster does not find this folder; "
                "give --out a folder that all nodes see"
            )
        return work(task)
    except RecsysError as error:
        return error


def _told(told: Told | RecsysError) -> Told:
    if isinstance(told, RecsysError):
        raise told
    return told
