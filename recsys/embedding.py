"""The one door to item embeddings: a table of rows, in plain torch or sharded by TorchRec, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from recsys.errors import SetupError


class Table(nn.Module):
    """Rows of width E; calling it with rows of any shape gives their vectors."""

    weight: Tensor


class TorchTable(Table):
    """A dense table in plain torch; the default, on every platform."""

    def __init__(self, rows: int, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, embedding_size))

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.embedding(rows, self.weight)


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
