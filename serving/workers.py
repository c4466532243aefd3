"""Where the shards of a night are computed: in this process, or in several of this machine, of which any may die."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from recsys.cluster import ONE_THREAD
from recsys.errors import RecsysError, RequestError
from serving.engine import Recommender
from serving.shards import Facts, Task, pipeline

AHEAD = 2
"""Tasks that a process has: one that it computes, one that it reads meanwhile."""
TRIES = 3
"""Processes that may die of one shard before the night is given up."""


class Engine(Protocol):
    """Computes shards, in any order; publishes nothing."""

    @property
    def name(self) -> str:
        """For the manifest."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Facts]: ...


@dataclass(frozen=True)
class Here:
    """This process."""

    recommender: Recommender
    name: str = "this process"

    def run(self, tasks: Sequence[Task]) -> Iterator[Facts]:
        yield from pipeline(self.recommender, tasks)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    tasks: deque[Task] = field(default_factory=deque)


@dataclass(frozen=True)
class Processes:
    """Several processes of this machine, each with one thread and the bundle; what a dead one was at, another begins anew."""

    bundle: Path
    workers: int

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise RequestError(f"workers are {self.workers}; take at least 1")

    @property
    def name(self) -> str:
        return f"{self.workers} processes"

    def run(self, tasks: Sequence[Task]) -> Iterator[Facts]:
        """Raises RecsysError: a shard was the end of several processes."""
        waiting, lost, workers = deque(tasks), Counter[int](), list[_Worker]()
        try:
            while waiting or any(worker.tasks for worker in workers):
                while len(workers) < min(self.workers, len(waiting) + len(workers)):
                    workers.append(self._started())
                for worker in workers:
                    self._fill(worker, waiting)
                ready = wait([worker.pipe for worker in workers])
                for worker in [worker for worker in workers if worker.pipe in ready]:
                    try:
                        told = worker.pipe.recv()
                    except (EOFError, OSError):
                        workers.remove(worker)
                        waiting.extendleft(reversed(worker.tasks))
                        if worker.tasks:
                            self._count(lost, worker)
                        continue
                    if isinstance(told, BaseException):
                        raise told
                    worker.tasks = deque(task for task in worker.tasks if task.shard != told.shard)
                    yield told
        finally:
            for worker in workers:
                worker.pipe.close()
                worker.process.terminate()
            for worker in workers:
                worker.process.join()

    def _started(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.bundle), daemon=True)
        with _one_thread():
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _fill(self, worker: _Worker, waiting: deque[Task]) -> None:
        while waiting and len(worker.tasks) < AHEAD:
            task = waiting.popleft()
            worker.tasks.append(task)
            try:
                worker.pipe.send(task)
            except OSError:  # it died; its tasks are taken back when that is heard
                return

    def _count(self, lost: Counter[int], worker: _Worker) -> None:
        worker.process.join()
        shard = worker.tasks[0].shard
        lost[shard] += 1
        if lost[shard] >= TRIES:
            code = worker.process.exitcode
            raise RecsysError(
                f"shard {shard}: {TRIES} processes died of it (the last with exit code {code}); "
                "see whether memory runs out, take fewer --workers, and start again: what is done is kept"
            )


def _work(pipe: Connection, bundle: Path) -> None:
    """Make the shards that the pipe names, until nobody holds its other end."""
    import torch

    torch.set_num_threads(1)
    try:
        recommender = Recommender.load(bundle, verify=False, threads=1)
        for facts in pipeline(recommender, _named(pipe)):
            pipe.send(facts)
    except (EOFError, BrokenPipeError):
        return
    except BaseException as error:
        pipe.send(error)
        raise


def _named(pipe: Connection) -> Iterator[Task]:
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


@contextmanager
def _one_thread() -> Iterator[None]:
    """Meanwhile processes start with libraries of one thread."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
