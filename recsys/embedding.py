"""The one door to item embeddings: a table of rows, in plain torch or by TorchRec, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recsys.errors import SetupError

DRAWN_ROWS = 2**16
"""Rows drawn at once; a multiple of 16, for whose numbers torch draws the same in parts as in one go."""


class Table(nn.Module):
    """Rows of width E; calling it with rows of any shape gives their vectors."""

    weight: Tensor
    sharded = False
    """Whether `weight` is a part of the table, the others being in other processes."""

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def whole(self) -> Tensor:
        """Vectors of all rows."""
        return self.weight

    def put(self, first: int, vectors_NE: Tensor) -> None:
        """Set rows from `first` on."""
        with torch.no_grad():
            self.weight[first : first + len(vectors_NE)] = vectors_NE

    def idle(self) -> None:
        """Take part in a look-up of other processes, with no rows of one's own."""

    @contextmanager
    def at_hand(self, rows: Tensor) -> Iterator[None]:
        """Meanwhile only these rows are looked up, so that a table in parts may fetch them once."""
        yield

    def draw(self, rows: int, size: int, empty: int, generator: torch.Generator) -> None:
        """Draw all rows anew, normal with deviation .02, but for the first `empty` ones, which become 0."""
        starts = range(0, max(1, rows - 16), DRAWN_ROWS)  # fewer than 16 numbers at the end would be drawn otherwise
        for first in starts:
            block_NE = torch.empty((rows if first == starts[-1] else first + DRAWN_ROWS) - first, size)
            block_NE.normal_(0, 0.02, generator=generator)
            block_NE[: max(0, empty - first)] = 0
            self.put(first, block_NE)


class TorchTable(Table):
    """A dense table in plain torch; the default, on every platform."""

    def __init__(self, rows: int, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, embedding_size))

    @staticmethod
    def of(weight_VE: Tensor) -> TorchTable:
        """The table of these vectors."""
        table = TorchTable(0, 0)
        table.weight = nn.Parameter(weight_VE)
        return table

    def forward(self, rows: Tensor) -> Tensor:
        vectors: Tensor = _LookUp.apply(self.weight, rows)  # type: ignore[no-untyped-call]
        return vectors


class _LookUp(torch.autograd.Function):
    """Indexing whose backward adds to the table's gradient in place: one gradient, however often rows are looked up.

    On the CPU 7 times faster than torch's, which makes a dense gradient of each look-up and adds them.
    """

    @staticmethod
    def forward(ctx: Any, weight_VE: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.weight_VE = weight_VE
        return nn.functional.embedding(rows, weight_VE)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        (rows,), weight_VE = ctx.saved_tensors, ctx.weight_VE
        if weight_VE.grad is None:
            weight_VE.grad = torch.zeros_like(weight_VE)
        rows_N, gradient_NE = rows.flatten(), gradients[0].flatten(0, -2)
        if weight_VE.is_cuda:
            weight_VE.grad.index_put_((rows_N,), gradient_NE, accumulate=True)  # index_add_ there adds in any order
        else:
            weight_VE.grad.index_add_(0, rows_N, gradient_NE)
        return None, None


class TorchrecTable(Table):
    """The same table as a TorchRec EmbeddingCollection, which DistributedModelParallel can shard."""

    def __init__(self, rows: int, embedding_size: int) -> None:
        super().__init__()
        try:
            from torchrec import EmbeddingCollection, EmbeddingConfig
        except (ImportError, OSError) as error:
            raise SetupError(
                f'torchrec does not load ({error}); run `recsys doctor`, or set model.embedding = "torch"'
            ) from None
        config = EmbeddingConfig(name="item", embedding_dim=embedding_size, num_embeddings=rows, feature_names=["item"])
        self.collection = EmbeddingCollection(tables=[config], device=torch.empty(0).device)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # TorchRec owns the parameter
        weight: Tensor = self.collection.embeddings["item"].weight
        return weight

    def forward(self, rows: Tensor) -> Tensor:
        from torchrec import KeyedJaggedTensor

        flat = rows.flatten()
        features = KeyedJaggedTensor(keys=["item"], values=flat, lengths=torch.ones_like(flat, dtype=torch.int32))
        vectors: Tensor = self.collection(features)["item"].values()
        return vectors.view(*rows.shape, -1)


TABLES: dict[str, Callable[[int, int], Table]] = {"torch": TorchTable, "torchrec": TorchrecTable}
