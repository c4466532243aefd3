"""The one door to item embeddings: a table of rows, in plain torch or sharded by TorchRec, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from recsys.errors import SetupError


class Table(Protocol):
    """Rows of width E; calling it with rows of any shape gives their vectors."""

    @property
    def weight(self) -> Tensor: ...

    def __call__(self, rows: Tensor) -> Tensor: ...


class TorchTable(nn.Module):
    """A dense table in plain torch; the default, on every platform."""

    def __init__(self, rows: int, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, embedding_size))

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.embedding(rows, self.weight)


class TorchrecTable(nn.Module):
    """The same table as a TorchRec EmbeddingCollection, which DistributedModelParallel can shard."""

    def __init__(self, rows: int, embedding_size: int) -> None:
        super().__init__()
        try:
            from torchrec import EmbeddingCollection, EmbeddingConfig
        except (ImportError, OSError) as error:
            raise SetupError(f"torchrec does not load ({error}); run `recsys doctor`, or set model.embedding = \"torch\"") from None
        config = EmbeddingConfig(name="item", embedding_dim=embedding_size, num_embeddings=rows, feature_names=["item"])
        self.collection = EmbeddingCollection(tables=[config], device=torch.empty(0).device)

    @property
    def weight(self) -> Tensor:
        return self.collection.embeddings["item"].weight  # type: ignore[no-any-return]

    def forward(self, rows: Tensor) -> Tensor:
        from torchrec import KeyedJaggedTensor

        flat = rows.flatten()
        features = KeyedJaggedTensor(keys=["item"], values=flat, lengths=torch.ones_like(flat, dtype=torch.int32))
        return self.collection(features)["item"].values().view(*rows.shape, -1)  # type: ignore[no-any-return]


TABLES: dict[str, Callable[[int, int], nn.Module]] = {"torch": TorchTable, "torchrec": TorchrecTable}
