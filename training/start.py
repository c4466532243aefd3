"""Where learning begins with the weights of a finished run: item by item, also where the catalogue has grown since.

V items · R rows · E width · N items of a part · A items among which neighbours are · P width of a text · K neighbours
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from features.dataset import Dataset, described
from recsys.batch import FIRST_ITEM, UNKNOWN
from recsys.bundle import Directory
from recsys.config import Settings
from recsys.content import AMONG, NEAR, NEIGHBOURS, ContentEncoder
from recsys.embedding import DRAWN_ROWS
from recsys.errors import RecsysError
from recsys.model import WEIGHTS, SequenceModel
from recsys.text import TextSettings

ANY = ("embedding", "dropout", "id_dropout")
"""Settings of a model that its weights do not depend on."""


def refuse_other(
    run: Directory,
    recipe: Mapping[str, Mapping[str, Any]],
    owners: Iterable[type[Settings]],
    path: Path,
    option: str,
    but: Collection[str] = (),
) -> None:
    """Raises RecsysError: settings of these sections, other than `but`, are others than the run's."""
    for owner in owners:
        for name, value in recipe[owner.section].items():
            found = run.manifest["recipe"][owner.section].get(name)
            if json.dumps(found) != json.dumps(value) and name not in but:
                here = f"{owner.section}.{name} is {found!r} there and {value!r} here"
                raise RecsysError(f"{path}: {here}; set it alike, or train without {option}")


def begin_with(model: SequenceModel, run: Directory, dataset: Dataset, seed: int) -> Tensor:
    """Give a model that was drawn anew the weights of a run; the items that it has learnt keep their vectors.

    Other items begin as the learnt ones of the nearest texts do, by the mean of their vectors; where item vectors hold texts,
    with these alone; and without a text as they were drawn. Returns which rows of the table are of other items, bool.
    """
    with safe_open(run.path / WEIGHTS, "pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("table."):
                parameter.copy_(file.get_tensor(name))
        rows_V = known_rows(run, dataset)[: model.ids]
        old_RE = file.get_tensor("table.weight")
        near = None if model.settings.described else _nearest(dataset, rows_V, old_RE)
        generator = torch.Generator().manual_seed(seed)
        model.table.put(UNKNOWN, old_RE[UNKNOWN:FIRST_ITEM])
        for lines_N in torch.split(torch.arange(model.ids), DRAWN_ROWS):
            vectors_NE = torch.empty(len(lines_N), old_RE.shape[1]).normal_(0, 0.02, generator=generator)
            new_N = rows_V[lines_N] < 0
            vectors_NE[~new_N] = old_RE[rows_V[lines_N[~new_N]]]
            if model.settings.described:
                vectors_NE[new_N] = 0
            elif near is not None and bool(new_N.any()):
                mean_NE, told_N = near(lines_N[new_N])
                vectors_NE[new_N] = torch.where(told_N[:, None], mean_NE, vectors_NE[new_N])
            model.table.put(FIRST_ITEM + int(lines_N[0]), vectors_NE)
    return torch.cat([torch.zeros(FIRST_ITEM, dtype=torch.bool), rows_V < 0])


def known_rows(run: Directory, dataset: Dataset) -> Tensor:
    """The row in the run of each item of a data set, -1 of one that it has not learnt; int64."""
    import polars as pl

    learnt = pl.read_parquet(run.path / "items.parquet", columns=["item_id", "row"]).head(run.manifest["items"])
    ids = dataset.items.select("item_id")
    if ids.schema["item_id"] != learnt.schema["item_id"]:
        ids, learnt = ids.cast({"item_id": pl.String}), learnt.cast({"item_id": pl.String})
    rows = ids.join(learnt, on="item_id", how="left", maintain_order="left")["row"].fill_null(-1)
    return torch.tensor(rows.to_numpy(), dtype=torch.int64)


def _nearest(dataset: Dataset, rows_V: Tensor, old_RE: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """What gives items the vectors of the nearest texts among the most popular items that the run has learnt; None where no
    text tells anything of these."""
    among_A = (rows_V >= 0).nonzero().flatten()[:AMONG]
    texts = described(dataset.items[among_A.numpy()])
    if not any(texts.texts):
        return None
    encoder = ContentEncoder.fit(texts, TextSettings())
    among_AP, vectors_AE = encoder.encode(texts).pooled_VP, old_RE[rows_V[among_A]]

    def mean(lines_N: Tensor) -> tuple[Tensor, Tensor]:
        """Their mean, each by its nearness, N × E; and whether an item has a text."""
        pooled_NP = encoder.encode(described(dataset.items[lines_N.numpy()])).pooled_VP
        cosines_NK, places_NK = (pooled_NP @ among_AP.T).topk(min(NEIGHBOURS, len(among_AP)), dim=1)
        mean_NE = ((cosines_NK / NEAR).softmax(1)[..., None] * vectors_AE[places_NK]).sum(1)
        return mean_NE, (pooled_NP != 0).any(1)

    return mean
