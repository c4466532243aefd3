"""The sequence model: a user is their history, and the state after the last event meets the items by inner product.

B histories · N events · T positions · E embedding size
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from recsys.attention import SASRecBlock, dropout
from recsys.batch import FIRST_ITEM, UNKNOWN, Batch
from recsys.bundle import Directory
from recsys.config import Settings
from recsys.embedding import TABLES
from recsys.errors import BundleError
from recsys.scoring import SIMILARITIES, place_items, place_users

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class ModelSettings(Settings):
    """What the weights mean; serving reads it from the bundle only."""

    section: ClassVar[str] = "model"

    embedding_size: int = 64
    """Width of item vectors and states."""
    blocks: int = 2
    """Self-attention blocks."""
    heads: int = 1
    """Attention heads; must divide the embedding size."""
    hidden_size: int = 256
    """Width inside a block's feed-forward layer."""
    length: int = 200
    """Events of a history that the model reads, counted from the last."""
    dropout: float = 0.2
    """Share of elements dropped while training; a multiple of 1/256 is used."""
    similarity: str = "dot"
    """How a state meets an item: dot or cosine."""
    temperature: float = 1.0
    """Scores are divided by it."""
    embedding: str = "torch"
    """Backend of the item table: torch or torchrec."""

    def __post_init__(self) -> None:
        for name in ("embedding_size", "blocks", "heads", "hidden_size", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.embedding_size % self.heads:
            raise ValueError(f"heads must divide embedding_size, found {self.heads} and {self.embedding_size}")
        if not 0 <= self.dropout <= 0.99:
            raise ValueError(f"dropout must be from 0 to .99, found {self.dropout}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, found {self.temperature}")
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, found {self.similarity!r}")
        if self.embedding not in TABLES:
            raise ValueError(f"embedding must be one of {', '.join(TABLES)}, found {self.embedding!r}")


class SequenceModel(nn.Module):
    """SASRec (Kang & McAuley 2018) over `items` items, whose rows start at FIRST_ITEM.

    Without a generator nothing is random: dropout acts only where one is given.
    """

    def __init__(self, settings: ModelSettings, items: int) -> None:
        super().__init__()
        self.settings, self.items = settings, items
        size = settings.embedding_size
        self.table = TABLES[settings.embedding](FIRST_ITEM + items, size)
        self.positions = nn.Parameter(torch.empty(settings.length, size))
        self.blocks = nn.ModuleList(
            SASRecBlock(size, settings.heads, settings.hidden_size, settings.dropout) for _ in range(settings.blocks)
        )
        self.norm = nn.LayerNorm(size)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> SequenceModel:
        """Draw all weights anew: matrices normal with deviation .02, norms 1, biases and the rows below FIRST_ITEM 0."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        self.table.weight[:FIRST_ITEM] = 0
        return self

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """Placed states after every event of each history of at most `length` events, padded on the right, shape B × T × E."""
        x_BTE = self._embed(batch, generator)
        for block in self.blocks:
            x_BTE = block(x_BTE, generator)
        return place_users(self.norm(x_BTE), self.settings.similarity, self.settings.temperature)

    def encode(self, batch: Batch) -> Tensor:
        """Placed state after the last event of each history, shape B × E; an empty history's state is 0."""
        batch = batch.last(self.settings.length)
        states_BTE: Tensor = self(batch)
        last_B = batch.lengths - 1
        states_BE = states_BTE[torch.arange(len(batch), device=last_B.device), last_B.clamp(min=0)]
        return states_BE * (last_B >= 0)[:, None]

    def vectors(self, rows: Tensor) -> Tensor:
        """Placed vectors of item rows; a further axis of width E."""
        vectors: Tensor = self.table(rows)
        return place_items(vectors, self.settings.similarity)

    def item_vectors(self) -> Tensor:
        """Placed vectors of the catalogue, shape items × E; line i belongs to row FIRST_ITEM + i."""
        return place_items(self.table.weight[FIRST_ITEM:], self.settings.similarity)

    def weights(self) -> dict[str, Tensor]:
        """All weights on the CPU, named as with the plain torch table, so that serving needs no other."""
        named = {name: value for name, value in self.state_dict().items() if not name.startswith("table.")}
        return {name: value.detach().cpu().contiguous() for name, value in {**named, "table.weight": self.table.weight}.items()}

    def attention(self, batch: Batch) -> list[Tensor]:
        """Attention weights of each block, shape B × heads × T × T."""
        x_BTE = self._embed(batch, None)
        out: list[Tensor] = []
        for block in self.blocks:
            assert isinstance(block, SASRecBlock)
            out.append(block.attention_weights(x_BTE))
            x_BTE = block(x_BTE)
        return out

    def _embed(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        rows_BT = batch.padded(max(1, int(batch.lengths.max())))
        rows_BT = torch.where(rows_BT < FIRST_ITEM + self.items, rows_BT, UNKNOWN)
        x_BTE = self.table(rows_BT) * self.settings.embedding_size**0.5 + self.positions[: rows_BT.shape[1]]
        return dropout(x_BTE, self.settings.dropout, generator)


def model_from(directory: Directory, device: str = "cpu") -> SequenceModel:
    """The trained model of a run's model directory or of a bundle.

    Raises BundleError: the weights are not those of the settings in the manifest.
    """
    from safetensors.torch import load_file

    settings = replace(ModelSettings(**directory.manifest["recipe"][ModelSettings.section]), embedding="torch")
    model = SequenceModel(settings, directory.manifest["items"])
    try:
        model.load_state_dict(load_file(directory.path / WEIGHTS, device=device))
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise BundleError(f"{directory.path / WEIGHTS}: not the weights of its settings ({line}); export it again") from None
    return model.to(device)
