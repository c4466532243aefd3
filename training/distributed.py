"""The item table in parts, by TorchRec: each process holds some rows or columns, and a look-up asks the others for theirs.

N rows that are set · U distinct rows that are looked up · E width
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from recsys.batch import FIRST_ITEM, PADDING
from recsys.embedding import Table
from recsys.errors import RecipeError, SetupError
from training.optimizer import EPSILON
from training.team import Team

LOOKED_UP = 2**16
"""Rows looked up at once where all are."""
NARROWEST = 4
"""Columns of a part are a multiple of it."""


class ShardedTable(Table):
    """A table that TorchRec's DistributedModelParallel lays over the processes of a team.

    Its rows change in the backward pass of their look-up (a fused optimiser), and no gradient of its size exists: a step costs
    what it touches, whatever the catalogue. So all rows of a step are looked up once, in `at_hand`.
    """

    sharded = True

    def __init__(self, rows: int, embedding_size: int, team: Team, kind: str, sharding: str) -> None:
        super().__init__()
        with _quiet():
            self.collection, self.plan = _in_parts(rows, embedding_size, team, kind, sharding)
        self.rows, self._device = rows, team.device
        self._at_hand: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # there is none in one piece
        raise RuntimeError("a table in parts has no weight of its own; look rows up, or read `parts`")

    def parts(self) -> dict[str, Any]:
        """The rows and what their optimiser keeps of them, as torch's ShardedTensors, for checkpoints."""
        (weight,) = self.collection.state_dict().values()
        kept = self.collection.fused_optimizer.state_dict()["state"].values()
        return {"weight": weight, **{name.removeprefix("item."): part for state in kept for name, part in state.items()}}

    def put(self, first: int, vectors_NE: Tensor) -> None:
        for part in self.parts()["weight"].local_shards():
            (row, column), (rows, columns) = part.metadata.shard_offsets, part.metadata.shard_sizes
            begin, end = max(first, row), min(first + len(vectors_NE), row + rows)
            if begin < end:
                own = vectors_NE[begin - first : end - first, column : column + columns]
                with torch.no_grad():
                    part.tensor[begin - row : end - row] = own.to(part.tensor.device)

    def whole(self) -> Tensor:
        return torch.cat([self(rows) for rows in torch.split(torch.arange(self.rows, device=self.device), LOOKED_UP)])

    def set_rate(self, rate: float) -> None:
        """The rate of the next step; a look-up takes it along to its backward pass."""
        for group in self.collection.fused_optimizer.param_groups:
            group["lr"] = rate
        self.collection.fused_optimizer.step()

    @contextmanager
    def at_hand(self, rows: Tensor) -> Iterator[None]:
        self._at_hand = self._fetch(rows)
        try:
            yield
        finally:
            self._at_hand = None

    def forward(self, rows: Tensor) -> Tensor:
        rows_U, vectors_UE = self._at_hand or self._fetch(rows)
        return embedding(torch.searchsorted(rows_U, rows.contiguous()), vectors_UE)

    def idle(self) -> None:
        self._fetch(torch.zeros(0, dtype=torch.int64, device=self.device))

    def _fetch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct rows, ascending, with their vectors: each crosses the network once; PADDING is always among them."""
        from torchrec import KeyedJaggedTensor

        rows_U = torch.unique(torch.cat([rows.flatten(), rows.new_tensor([PADDING, FIRST_ITEM - 1])]))
        lengths_U = torch.ones_like(rows_U, dtype=torch.int32)
        found: Any = self.collection(KeyedJaggedTensor(keys=["item"], values=rows_U, lengths=lengths_U))
        return rows_U, found["item"].values()


def _in_parts(rows: int, embedding_size: int, team: Team, kind: str, sharding: str) -> tuple[Any, str]:
    """A collection of one table as the planner lays it over the team, and the plan in words.

    Raises SetupError: no TorchRec. RecipeError: it cannot be laid so.
    """
    try:
        import torchrec
    except (ImportError, OSError) as error:
        raise SetupError(f"torchrec does not load ({error}); run `recsys doctor`, or set optimizer.table to same") from None
    from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward as fuse
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
    from torchrec.distributed.planner.types import PlannerError, Topology

    config = torchrec.EmbeddingConfig(name="item", embedding_dim=embedding_size, num_embeddings=rows, feature_names=["item"])
    collection = torchrec.EmbeddingCollection(tables=[config], device=torch.device("meta"))
    optimizers: dict[str, tuple[Any, dict[str, Any]]] = {
        "sgd": (torch.optim.SGD, {}),
        "adagrad": (torch.optim.Adagrad, {"eps": EPSILON}),
        "rowwise_adagrad": (torchrec.optim.RowWiseAdagrad, {"eps": EPSILON}),
        "adam": (torch.optim.Adam, {"eps": EPSILON}),
    }
    fused, options = optimizers[kind]
    fuse(fused, collection.parameters(), {"lr": 0.0, **options})
    constraint = ParameterConstraints(
        sharding_types=["table_wise", "row_wise", "column_wise"] if sharding == "auto" else [sharding],
        compute_kernels=[EmbeddingComputeKernel.FUSED.value],
        min_partition=embedding_size // team.size if embedding_size % (NARROWEST * team.size) == 0 else None,
    )
    sharders: Any = [EmbeddingCollectionSharder()]
    topology = Topology(world_size=team.size, compute_device=team.device.type)
    planner = EmbeddingShardingPlanner(topology=topology, constraints={"item": constraint}, debug=False)
    try:
        plan = planner.collective_plan(collection, sharders, torch.distributed.group.WORLD)
    except PlannerError:
        shape = f"{rows} rows of {embedding_size} over {team.size} processes"
        raise RecipeError(f"train.sharding {sharding!r}: there is no such plan of {shape}; set it to row_wise") from None
    parts = DistributedModelParallel(collection, device=team.device, plan=plan, sharders=sharders, init_data_parallel=False)
    return parts, str(plan)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and TorchRec warn of in their own use of each other, which no option of them avoids."""
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # its warning comes with the first look-up
    remarks = logging.getLogger("torchrec")
    before = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        remarks.setLevel(before)
