"""What a user state looked at: attention weights of a history, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recsys.batch import FIRST_ITEM, PADDING, Batch
from recsys.content import ENCODER, ContentEncoder
from recsys.errors import RequestError
from serving.engine import Recommender
from serving.filters import until


@dataclass(frozen=True)
class Attention:
    """How much each event attends to each other, T events long; a masked model's last is the mask."""

    titles: list[str]
    weights_LHTT: Tensor
    """By layer and head; each line sums to 1."""
    words: list[dict[str, float]] | None = None
    """Of each event, how much the last state draws from each word of its item's text; None where the model reads no words."""

    def records(self) -> list[dict[str, Any]]:
        """The share of each event in the last state, oldest first: the mean over layers and heads.

        Where the model reads words, those of each event with their shares, largest first: together they are 1.
        """
        shares = self.weights_LHTT[:, :, -1].mean((0, 1)).tolist()
        records: list[dict[str, Any]] = [
            {"event": place, "title": title, "share": share}
            for place, (title, share) in enumerate(zip(self.titles, shares, strict=True), 1)
        ]
        if self.words is not None:
            for record, words in zip(records, self.words, strict=True):
                record["words"] = dict(sorted(words.items(), key=lambda word: -word[1]))
        return records


@torch.inference_mode()
def attention(
    recommender: Recommender, history: Sequence[str], times: Sequence[int] | None = None, now: int | None = None
) -> Attention:
    """Attention over a history of item ids or titles, cut to what the model reads when it is asked at `now`.

    Raises RequestError: an unknown item, or as Recommender.request.
    """
    batch, now = recommender.request([recommender.catalogue.resolve(item) for item in history], times, now)
    asked = None if now is None else torch.tensor([now])
    batch = batch if asked is None else until(batch, asked)
    weights = recommender.model.attention(batch, asked)
    titles = [recommender.catalogue.title(row) for row in recommender.model.readable(batch).values.tolist()]
    masks = weights[0].shape[-1] - len(titles)
    titles += ["(next)"] * masks
    return Attention(titles, torch.cat(weights), _words(recommender, batch, asked, len(titles)))


def _words(recommender: Recommender, batch: Batch, asked: Tensor | None, events: int) -> list[dict[str, float]] | None:
    shares_1HUL = recommender.model.attention_to_text(batch, asked)
    if shares_1HUL is None:
        return None
    encoder, texts = ContentEncoder.load(recommender.path / ENCODER), recommender.catalogue.described.texts
    rows = recommender.model.readable(batch).values.tolist()
    rows += [PADDING] * (events - len(rows))
    words: list[dict[str, float]] = [{} for _ in rows]
    shares_UL = shares_1HUL[0].mean(0)
    for place in range(max(0, len(rows) - len(shares_UL)), len(rows)):
        if rows[place] < FIRST_ITEM or rows[place] - FIRST_ITEM >= len(texts):
            continue
        for word, share in zip(
            encoder.text.words(texts[rows[place] - FIRST_ITEM]), shares_UL[place - len(rows)].tolist(), strict=False
        ):
            words[place][word] = words[place].get(word, 0.0) + share
    return words


def draw(found: Attention, path: Path) -> None:
    """Write a PNG: one square a layer, the looking event down, the looked-at event across, mean over heads."""
    from matplotlib.figure import Figure

    layers = found.weights_LHTT.mean(1).numpy()
    names = [title if len(title) <= 28 else f"{title[:27]}…" for title in found.titles]
    side = max(3.0, 0.28 * len(names))
    figure = Figure(figsize=(side * len(layers) + 3.5, side + 2), layout="constrained")
    axes = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    for layer, (axis, weights_TT) in enumerate(zip(axes, layers, strict=True), 1):
        image = axis.imshow(weights_TT, cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"layer {layer}")
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.7)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror}); give another place for the picture") from None
