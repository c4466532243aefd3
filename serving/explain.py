"""What a user state looked at: attention weights of a history, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recsys.errors import RequestError
from serving.engine import Recommender
from serving.filters import until


@dataclass(frozen=True)
class Attention:
    """How much each event attends to each other, T events long; a masked model's last is the mask."""

    titles: list[str]
    weights_LHTT: Tensor
    """By layer and head; each line sums to 1."""

    def records(self) -> list[dict[str, Any]]:
        """The share of each event in the last state, oldest first: the mean over layers and heads."""
        shares = self.weights_LHTT[:, :, -1].mean((0, 1)).tolist()
        return [
            {"event": place, "title": title, "share": share}
            for place, (title, share) in enumerate(zip(self.titles, shares, strict=True), 1)
        ]


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
    return Attention(titles + ["(next)"] * masks, torch.cat(weights))


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
