"""Where the shards of a night are computed: on a Ray cluster, by Ray Data."""

from __future__ import annotations

import pickle
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from recsys.cluster import connected, told_of_losses
from recsys.errors import BundleError, RecsysError
from serving.engine import Recommender
from serving.shards import Facts, Task, pipeline, planned
from serving.workers import TRIES

TRIED = "tried"
"""Folder, in that of the night, of a file a shard, with a byte for each worker that began it."""


@dataclass(frozen=True)
class Cluster:
    """The CPUs of a Ray cluster, each with one thread and the bundle; what a dead worker was at, another begins anew.

    All nodes have this version of this package, and see the folder of nights and the bundle under the same path.
    """

    bundle: Path
    address: str
    """HOST:PORT, or `auto`, of the cluster that this machine is a node of; or `local`."""

    @property
    def name(self) -> str:
        return f"Ray ({self.address})"

    def run(self, tasks: Sequence[Task]) -> Iterator[Facts]:
        """Raises SetupError: no Ray, or no cluster there. RecsysError: a node sees other files, or workers die of a shard."""
        if not tasks:
            return
        with connected(self.address) as ray:
            shutil.rmtree(tasks[0].work / TRIED, ignore_errors=True)
            (tasks[0].work / TRIED).mkdir()
            about = (self.bundle.absolute(), tasks[0].bundle)
            cpus = int(ray.cluster_resources().get("CPU", 0))
            pool = ray.data.ActorPoolStrategy(size=max(1, min(cpus, len(tasks))), max_tasks_in_flight_per_actor=1)
            given = ray.data.from_items([{"task": pickle.dumps(task)} for task in tasks], override_num_blocks=len(tasks))
            made = given.map(_Maker, fn_constructor_args=about, compute=pool, num_cpus=1)
            do = "see that all nodes have this package, and start again: what is done is kept"
            with told_of_losses(ray, self.name, do), closing(iter(made.iter_rows())) as rows:
                for row in rows:
                    told = pickle.loads(row["told"])
                    if isinstance(told, RecsysError):
                        raise told
                    yield told


class _Maker:
    """A worker of the cluster: makes one shard after the other."""

    def __init__(self, bundle: Path, bundle_id: str) -> None:
        self._bundle, self._bundle_id = bundle, bundle_id

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        """The facts of a task, or what the user can mend."""
        told: Facts | RecsysError
        try:
            task: Task = pickle.loads(row["task"])
            _check(task)
            _count(task)
            (told,) = pipeline(self._recommender, [task])
        except RecsysError as error:
            told = error
        return {"told": pickle.dumps(told)}

    @cached_property
    def _recommender(self) -> Recommender:
        try:
            recommender = Recommender.load(self._bundle, verify=False, threads=1)
            if recommender.id == self._bundle_id:
                return recommender
            found = f"it is {recommender.id}"
        except BundleError as error:
            found = str(error).partition(";")[0]
        raise BundleError(
            f"{self._bundle}: node {platform.node()} of the Ray cluster does not find bundle {self._bundle_id} there "
            f"({found}); put it where all nodes see it"
        )


def _check(task: Task) -> None:
    """Raises RecsysError: the folder is not the one of this night, since it lies elsewhere, or another night has begun."""
    if not planned(task):
        raise RecsysError(
            f"{task.work}: node {platform.node()} of the Ray cluster does not find this night there; "
            "give --out a folder that all nodes see"
        )


def _count(task: Task) -> None:
    """Raises RecsysError: workers died of this shard; Ray Data would begin it without end."""
    with (task.work / TRIED / str(task.shard)).open("ab") as file:
        file.write(b".")
        if file.tell() > TRIES:
            raise RecsysError(
                f"shard {task.shard}: {TRIES} workers of the Ray cluster died of it; "
                "see whether memory runs out, and start again: what is done is kept"
            )
