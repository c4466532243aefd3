"""Checkpoints of a training: written beside it, whole or not at all, by any number of processes and read by any other."""

from __future__ import annotations

import io
import shutil
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # which is none of Python's Exceptions
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from recsys.bundle import replace_directory
from recsys.errors import RecsysError
from training.team import ALONE, Team

PLAIN = "plain"
"""Name of the tensor that holds all that is no tensor."""
SECONDS = 60.0
"""After which a new one is written within an epoch."""
TABLE = "table."
"""Stands before the names of what processes hold parts of."""


class Checkpoints:
    """A folder of checkpoints, by torch.distributed.checkpoint: each a directory named by its number, the newest one counts.

    A new one is written by threads while training goes on, from a copy of the state. It gets its name when every process has
    written its part; only then the one before goes.
    """

    def __init__(self, folder: Path, key: str, team: Team = ALONE) -> None:
        self.folder, self.key, self.team = folder, key, team
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # no context manager reaches a thread
        self._writing: tuple[int, Any, Collection[int]] | None = None
        self._saved_at = time.monotonic()
        self._own = team.most(time.monotonic_ns() % 2**31)  # a thread of one that was cut off may still write beside
        self._group = torch.distributed.new_group(backend="gloo") if team.size > 1 else None  # threads talk beside training
        if team.rank == 0:
            for left in folder.glob(".*.tmp"):
                shutil.rmtree(left, ignore_errors=True)  # a thread of a training that was cut off may still write there
        team.wait()

    @property
    def newest(self) -> int:
        """The number of the newest one; -1 where there is none."""
        numbers = [int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdigit()] if not self.team.rank else []
        return self.team.most(max(numbers, default=-1))

    def path(self, number: int) -> Path:
        return self.folder / f"{number:09d}"

    def _temporary(self, number: int) -> Path:
        return self.folder / f".{number:09d}.{self._own}.tmp"

    def save(self, number: int, tree: Mapping[str, Any], parts: Mapping[str, Any], keep: Collection[int] = ()) -> None:
        """Begin to write nested dicts and lists of tensors and plain values, and the `parts` of a table.

        When it is done, all others but those to `keep` go.
        """
        self.finish()
        tensors: dict[str, Tensor] = {}
        plain = io.BytesIO()
        torch.save({"key": self.key, "tree": _without_tensors(tree, "tree", tensors)}, plain)
        tensors[PLAIN] = torch.frombuffer(bytearray(plain.getvalue()), dtype=torch.uint8)
        temporary = self._temporary(number)
        if self.team.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True, exist_ok=True)
        self.team.wait()
        with _quiet():
            future = async_save(
                {**tensors, **{TABLE + name: part for name, part in parts.items()}},
                storage_writer=FileSystemWriter(temporary),
                process_group=self._group,
                no_dist=self.team.size == 1,
            )
        self._writing, self._saved_at = (number, future, {number, *keep}), time.monotonic()

    def are_due(self) -> bool:
        """Whether it is time for a new one; the one that is written gets its name where it is done."""
        if self._writing is not None and self._writing[1].done():
            self.finish()
        return self.team.first(time.monotonic() - self._saved_at >= SECONDS)

    def finish(self) -> None:
        """Wait until the one that is written is there. Raises RecsysError: it could not be written."""
        if self._writing is None:
            return
        (number, future, keep), self._writing = self._writing, None
        try:
            with _quiet():
                future.result()
        except (Exception, CheckpointException) as error:  # of any thread of any process
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise RecsysError(f"{self.folder}: a checkpoint cannot be written ({reason}); free the disk") from None
        if self.team.rank == 0:
            replace_directory(self._temporary(number), self.path(number))
            for path in self.folder.glob("[0-9]*"):
                if int(path.name) not in keep:
                    shutil.rmtree(path)

    def load(self, number: int, parts: Mapping[str, Any]) -> Any:
        """The tree of a checkpoint; what it has of `parts` is put into them.

        Raises RecsysError: it belongs to another recipe or data set, or is broken.
        """
        path = self.path(number)
        try:
            names = _metadata(path)
            whole = {name: told for name, told in names.items() if not name.startswith(TABLE)}
            tensors = {name: torch.empty(told.size, dtype=told.properties.dtype) for name, told in whole.items()}
            wanted = {**tensors, **{TABLE + name: part for name, part in parts.items() if TABLE + name in names}}
            with _quiet():
                load(wanted, storage_reader=FileSystemReader(path), process_group=self._group, no_dist=self.team.size == 1)
            saved = torch.load(io.BytesIO(tensors[PLAIN].numpy().tobytes()), weights_only=True)
        except (Exception, CheckpointException) as error:  # torch raises many kinds; all mean the same to the user
            raise RecsysError(f"{path}: cannot be read ({type(error).__name__}); delete it to train from the start") from None
        if saved["key"] != self.key:
            raise RecsysError(
                f"{path}: belongs to another recipe, data set or device; give another run directory or delete this one"
            )
        return _with_tensors(saved["tree"], tensors)


def read_table(path: Path) -> Tensor:
    """The whole item table of a checkpoint, whose processes held parts of it. Needs neither them nor TorchRec."""
    told = _metadata(path)[f"{TABLE}weight"]
    table = torch.empty(told.size, dtype=told.properties.dtype)
    with _quiet():
        load({f"{TABLE}weight": table}, storage_reader=FileSystemReader(path), no_dist=True)
    return table


def _metadata(path: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    return found


def _without_tensors(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The same with the names of tensors in their places, which are put into `tensors`."""
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {key: _without_tensors(value, f"{name}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_tensors(value, f"{name}/{place}", tensors) for place, value in enumerate(tree)]
    return tree


def _with_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {"tensor"}:
            return tensors[tree["tensor"]]
        return {key: _with_tensors(value, tensors) for key, value in tree.items()}
    return [_with_tensors(value, tensors) for value in tree] if isinstance(tree, list) else tree


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of torch.distributed.checkpoint, as on there being one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
