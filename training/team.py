"""The processes that train one model together, started by torchrun; one process is a team of one. Needs torch alone."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from recsys.errors import RecsysError, SetupError

SILENCE = timedelta(hours=6)
"""After which a process that hears nothing of the others gives up: the longest that the first may rank and publish alone."""
LAUNCHED = "RECSYS_LAUNCHED"
"""Set for processes that `launch` starts."""
RESTARTS = 3
"""Deaths of processes that a training survives, each time from its newest checkpoint."""


@dataclass(frozen=True)
class Team:
    """So many processes, of which this is the one with number `rank`; all call the same methods in the same order."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default=torch.device("cpu"))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes; in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def most(self, count: int) -> int:
        """The largest of all processes' counts."""
        if self.size == 1:
            return count
        value = torch.tensor(count, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def first(self, flag: bool) -> bool:
        """What the first process says."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.broadcast(value, 0)
        return bool(value)

    def every(self, rows_N: Tensor) -> Tensor:
        """The rows of all processes, one behind the other."""
        if self.size == 1:
            return rows_N
        longest = self.most(len(rows_N))
        padded = rows_N.new_full((1 + longest,), 0)
        padded[0], padded[1 : 1 + len(rows_N)] = len(rows_N), rows_N
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[1 : 1 + int(part[0])] for part in parts])

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def generators(self, generator: torch.Generator, seed: int, step: int) -> tuple[torch.Generator, torch.Generator]:
        """What is random in a step: in each process for itself, and alike in all.

        One process goes on with the generator that it has; the others' numbers depend on seed, step and process alone, so that
        any number of them goes on from any other.
        """
        numbers = torch.Generator().manual_seed(seed * 1_000_003 + step)
        seeds = torch.randint(2**62, (1 + self.size,), generator=numbers).tolist()
        alike = torch.Generator(generator.device).manual_seed(seeds[0])
        return generator if self.size == 1 else generator.manual_seed(seeds[1 + self.rank]), alike


ALONE = Team()


def rank() -> int:
    """The number of this process in its team; 0 alone."""
    return int(os.environ.get("RANK", 0)) if _by_torchrun() else 0


def launched() -> bool:
    """Whether `launch` started this process, so that its command was checked before."""
    return LAUNCHED in os.environ


def _by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def joined(device: torch.device, together: bool = False) -> Iterator[Team]:
    """The team that torchrun started this process for; `together` also makes a process group for a team of one.

    Each process of a machine takes a GPU of its own. Raises SetupError: there are fewer. RecsysError: another process is gone.
    """
    told = _by_torchrun()
    if not told and not together:
        yield Team(device=device)
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= (found := torch.cuda.device_count()):
            raise SetupError(f"process {local} of this machine finds {found} GPUs; start at most as many processes as GPUs")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    options: dict[str, Any] = {} if told else {"store": HashStore(), "rank": 0, "world_size": 1}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # checkpoints are agreed upon by gloo
    dist.init_process_group(backend, timeout=SILENCE, **options)
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), device)
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        raise RecsysError(f"process {rank()} has lost another one; all begin again from the newest checkpoint") from None
    finally:
        dist.destroy_process_group()


def launch(processes: int, words: Sequence[str]) -> int:
    """Run `recsys` with these words as so many processes of this machine, by torchrun; returns the exit code.

    Where one dies, all begin again, at most RESTARTS times, and go on from what they saved.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    before = os.environ.copy()
    os.environ[LAUNCHED] = "1"
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else processes that begin again find the dead ones' addresses
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its report names no cause that ours do not
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=RESTARTS,
        monitor_interval=0.5,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "recsys", *words)
    except ChildFailedError as error:
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    finally:
        os.environ.clear()
        os.environ.update(before)
    return 0
