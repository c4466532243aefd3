"""Histories → states: read by the graph of a bundle, or by torch, such that a state is the same in any company.

The kernels of torch and of ONNX Runtime give a history the same state in any company, and behind what was kept of it, if it is
padded to a length that depends on it alone and is a multiple of 16; padded to the longest of its batch, two of three states
change in the last bits (1e-6), and with them the order of close items. Measured in float32 with widths of 24 to 512, batches of
1 to 32, 1 and 2 threads, on AVX-512; a test holds it. It costs 2 % of the speed for histories of 200 events and 20 % for those
of 50.

B histories · T positions · E width
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from recsys.batch import UNKNOWN, Batch
from recsys.config import Settings
from recsys.errors import SetupError
from recsys.model import SequenceModel
from recsys.ranker import Look
from serving.lists import Array
from serving.reader import POSITIONS, GraphReader, Seen, asked_at
from serving.retrieval import taken

TOKENS = 2048
"""Padded events encoded at once: what stays in a core's cache; 16,384 are 2 to 30 % slower."""


@dataclass(frozen=True)
class DepthSettings(Settings):
    """What a state may cost."""

    section: ClassVar[str] = "depth"

    blocks: float = 0.0
    """Blocks that a history may go through on average, as measured on validation; needs model.early_exit; 0: all."""

    def __post_init__(self) -> None:
        if self.blocks and not self.blocks >= 1:
            raise ValueError(f"blocks must be at least 1, or 0 for all, found {self.blocks}")


def leave_of(manifest: Mapping[str, Any], settings: DepthSettings) -> list[float]:
    """When histories leave the model early, so that they cost at most depth.blocks on average: the best measured way.

    Raises SetupError: the model was not trained for it.
    """
    if not settings.blocks:
        return []
    curve = [line for line in manifest.get("depth_curve", ()) if line["blocks"] <= settings.blocks]
    if not curve:
        raise SetupError(
            "depth.blocks is set, and the model has no measured exits; train with model.early_exit=true and a validation split"
        )
    return list(max(curve, key=lambda line: float(line["blocks"]))["leave"])


def read_by_torch(
    model: SequenceModel, histories: Batch, now: Tensor | None, span: int, leave: Sequence[float]
) -> tuple[Tensor, Look | None]:
    """The states, which may `leave` the model early, and what a ranker of such a span looks at; None where it is 0."""
    read, device = model.readable(histories), histories.values.device
    out_BE = torch.zeros(len(read), model.settings.embedding_size, device=device)
    look = Look.empty(out_BE, span) if span else None
    for positions, places in _alike(model, histories.lengths.cpu().numpy()):
        chunk = torch.from_numpy(places).to(device)
        asked = None if now is None else now[chunk]
        x_BTE, view = model.read(taken(read, chunk), asked, positions=positions, leave=leave)
        lines_B, last_B = torch.arange(len(chunk), device=device), view.lengths_B - 1
        out_BE[chunk] = model.place(x_BTE[lines_B, last_B])
        if look is not None:
            look.put(chunk, Look.at(x_BTE, view, lines_B, last_B, span))
    return out_BE, look


def read_by_graph(
    model: SequenceModel, reader: GraphReader, histories: Batch, now: Tensor | None, span: int
) -> tuple[Tensor, Look | None]:
    """The same by the model's graph, through all blocks; of one history all is used that was read of it before."""
    values, times, offsets = histories.values.numpy(), histories.times.numpy(), histories.offsets.numpy()
    at_B = None if now is None else now.numpy()
    if len(histories) == 1 and len(values):
        placed_1E, look = reader.read_one(seen_of(model, values, times, offsets[:1], offsets[1:], at_B), span)
        return torch.from_numpy(placed_1E), look
    out_BE = torch.zeros(len(histories), model.settings.embedding_size)
    looks = Look.empty(out_BE, span) if span else None
    for _, chunk in _alike(model, np.diff(offsets)):
        asked_B = None if at_B is None else at_B[chunk]
        placed_BE, look = reader.read(seen_of(model, values, times, offsets[chunk], offsets[chunk + 1], asked_B), span)
        lines_B = torch.from_numpy(chunk)
        out_BE[lines_B] = torch.from_numpy(placed_BE)
        if looks is not None and look is not None:
            looks.put(lines_B, look)
    return out_BE, looks


def seen_of(model: SequenceModel, values: Array, times: Array, begins_B: Array, ends_B: Array, now_B: Array | None) -> Seen:
    """The last events of histories [begin, end) of one padded length; behind them the mask, if the model has one."""
    lengths_B = np.minimum(ends_B - begins_B, model.readable_events)
    at_T = np.arange(_padded(model, lengths_B[:1])[0])
    at_BT, some_BT = (ends_B - lengths_B)[:, None] + at_T, at_T < lengths_B[:, None]
    rows_BT, times_BT = (np.where(some_BT, part.take(at_BT, mode="clip"), 0) for part in (values, times))
    now_B = times[ends_B - 1] if now_B is None else now_B
    if model.settings.objective == "masked":
        lines_B = np.arange(len(ends_B))
        rows_BT[lines_B, lengths_B], times_BT[lines_B, lengths_B] = UNKNOWN, now_B
        lengths_B = lengths_B + 1
    return Seen(rows_BT, times_BT, asked_at(model, times_BT, lengths_B, now_B), lengths_B)


def _alike(model: SequenceModel, events_B: Array) -> Iterator[tuple[int, Array]]:
    """Positions and places of histories that are read at once: of one padded length, and TOKENS positions at most."""
    padded_B = _padded(model, events_B)
    for positions in np.unique(padded_B[padded_B > 0]).tolist():
        places, at_once = np.flatnonzero(padded_B == positions), max(1, TOKENS // positions)
        for start in range(0, len(places), at_once):
            yield positions, places[start : start + at_once]


def _padded(model: SequenceModel, events_B: Array) -> Array:
    """Positions of histories; 0 of an empty one."""
    places_B = np.minimum(events_B, model.readable_events) + (model.settings.objective == "masked")
    padded_B: Array = -(-places_B // POSITIONS) * POSITIONS
    return np.where(events_B > 0, padded_B, 0)
