"""What is known of items besides their ids, as tensors: text, categories, numbers; line i belongs to row FIRST_ITEM + i.

V items · L tokens of an item · W token states · P width of a state · C categories of an item · M numbers of an item
K neighbours of an item · A items among which they are · N items of a part
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys.errors import BundleError, DataError
from recsys.progress import Count
from recsys.text import ENCODERS, Pretrained, TextEncoder, TextSettings, padded

CONTENT = "content.safetensors"
ENCODER = "encoder.safetensors"
CATEGORIES = 4096
"""Most categories that are told apart: those of the most items."""
FARTHEST = 5.0
"""Deviations from the mean beyond which numbers are cut."""
NEIGHBOURS = 32
"""Items of the nearest texts that are kept for an item."""
NEAR = 0.05
"""Difference of cosines at which a neighbour counts e times another; .03, .05 and .1 do about equally well."""
AMONG = 50_000
"""Learnt items, the most popular ones, among which neighbours are looked for."""
CHUNK = 1024
"""Items whose neighbours are looked for at once."""


@dataclass(frozen=True)
class Described:
    """V items as their table describes them."""

    texts: Sequence[str]
    categories: Sequence[Sequence[str]]
    numbers: Sequence[Sequence[Sequence[float | None]]]
    """Of each column so many numbers, None where one is missing, or none at all; no column where nothing is known."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, count: int) -> Described:
        """The first `count` items."""
        return Described(self.texts[:count], self.categories[:count], self.numbers[:count])


class Tensors:
    """Base of a dataclass whose fields are tensors, and whose file holds them by their names."""

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        from safetensors.torch import load_file

        return cls(**load_file(path))


@dataclass(frozen=True)
class Content(Tensors):
    """V items as the model reads them."""

    tokens_VL: Tensor
    """Lines of `states_WP`, int32; 0 where a text has fewer than L."""
    states_WP: Tensor
    """State of each token, float16, line 0 is none; 0 × P where the model learns them."""
    pooled_VP: Tensor
    """Pooled vector of each text, float32, 0 where there is none; V × 0 where the model learns token states."""
    categories_VC: Tensor
    """Categories from 1, int32; 0 where an item has fewer than C."""
    categories: Tensor
    """How many are told apart, int64."""
    numbers_VM: Tensor
    """In deviations from the mean, float32; 0 where one is missing."""
    neighbours_VK: Tensor
    """Lines of the learnt items whose texts are nearest, int32."""
    nearness_VK: Tensor
    """What they count as beside the item's own vector: together k / (k + its events), float32; 0 where there are none."""

    def __len__(self) -> int:
        return len(self.tokens_VL)

    @property
    def by_item(self) -> dict[str, Tensor]:
        """What has a line for each item, by its name."""
        return {name: value for name, value in vars(self).items() if "_V" in name}

    @property
    def some_V(self) -> Tensor:
        """Whether anything is known of an item; bool."""
        return (self.tokens_VL > 0).any(1) | (self.categories_VC > 0).any(1) | (self.numbers_VM != 0).any(1)

    def with_neighbours(self, lines: Sequence[int], learnt: int, events: Sequence[int], weight: float) -> Content:
        """The same with the neighbours of some lines, which have so many `events`, among the first `learnt` items.

        Nearness is a softmax of cosines / NEAR, times weight / (weight + events): the fewer events an item has, the more it
        is what its neighbours are (shrinkage, James & Stein 1961).
        """
        among_AP = self.pooled_VP[: min(learnt, AMONG)]
        count = min(NEIGHBOURS, len(among_AP) - 1)
        if not weight or not among_AP.shape[1] or count < 1:
            return self
        neighbours_VK = self.neighbours_VK.new_zeros(len(self), count)
        nearness_VK = self.nearness_VK.new_zeros(len(self), count)
        neighbours_VK[:, : self.neighbours_VK.shape[1]] = self.neighbours_VK
        nearness_VK[:, : self.nearness_VK.shape[1]] = self.nearness_VK
        share_N = weight / (weight + torch.tensor(events, dtype=torch.float32))
        for places_N, part_N in zip(torch.split(torch.tensor(lines), CHUNK), torch.split(share_N, CHUNK), strict=True):
            pooled_NP = self.pooled_VP[places_N]
            cosines_NA = pooled_NP @ among_AP.T
            own_N = (places_N < len(among_AP)).nonzero().flatten()
            cosines_NA[own_N, places_N[own_N]] = -1.0
            cosines_NK, lines_NK = cosines_NA.topk(count, dim=1)
            some_N1 = (pooled_NP != 0).any(1, keepdim=True)
            neighbours_VK[places_N] = lines_NK.int()
            nearness_VK[places_N] = (cosines_NK / NEAR).softmax(1) * part_N[:, None] * some_N1
        return replace(self, neighbours_VK=neighbours_VK, nearness_VK=nearness_VK)

    def with_lines(self, lines: Sequence[int], other: Content, fresh_states: bool) -> Content:
        """This content with that of `other` in `lines`; lines from V on, ascending, are appended.

        With `fresh_states`, the token states of `other` are its own; else both name lines of the same states.
        """
        size, places = max(len(self), max(lines, default=-1) + 1), torch.tensor(lines, dtype=torch.int64)

        def put(mine: Tensor, theirs: Tensor) -> Tensor:
            wide = max(mine.shape[1], theirs.shape[1])
            out = mine.new_zeros(size, wide)
            out[: len(mine), : mine.shape[1]] = mine
            out[places] = pad(theirs, (0, wide - theirs.shape[1])).to(mine.dtype)
            return out

        states, tokens = self.states_WP, other.tokens_VL
        if fresh_states:
            tokens = torch.where(tokens > 0, tokens + len(states) - 1, 0)
            states = torch.cat([states, other.states_WP[1:]])
        theirs = {**other.by_item, "tokens_VL": tokens}
        return replace(self, states_WP=states, **{name: put(mine, theirs[name]) for name, mine in self.by_item.items()})


class ContentEncoder:
    """Turns items as tables describe them into what the model reads; fitted once, on the items that were learnt."""

    def __init__(
        self,
        settings: TextSettings,
        text: TextEncoder,
        categories: Sequence[str],
        widths: Sequence[int],
        mean_M: Tensor,
        deviation_M: Tensor,
    ) -> None:
        self.settings, self.text, self.widths = settings, text, list(widths)
        self.categories, self.mean_M, self.deviation_M = list(categories), mean_M, deviation_M
        self._places = {name: place for place, name in enumerate(self.categories, 1)}

    @classmethod
    def fit(
        cls, described: Described, settings: TextSettings, cache: Path | None = None, progress: Count | None = None
    ) -> ContentEncoder:
        """Terms, categories and scales of items with training events."""
        kind = ENCODERS.get(settings.encoder, Pretrained)
        text = kind.fit(described.texts, settings, cache, progress)
        counts = Counter(name for names in described.categories for name in set(names))
        categories = sorted(sorted(counts), key=lambda name: -counts[name])[:CATEGORIES]
        columns = max(map(len, described.numbers), default=0)
        widths = [max(len(row[place]) for row in described.numbers if row) for place in range(columns)]
        numbers_VM = _numbers(described.numbers, widths).double()
        mean_M = numbers_VM.nanmean(0).nan_to_num()
        deviation_M = (numbers_VM - mean_M).square().nanmean(0).sqrt().nan_to_num()
        return cls(settings, text, categories, widths, mean_M.float(), torch.where(deviation_M > 0, deviation_M, 1.0).float())

    def encode(self, described: Described, cache: Path | None = None, progress: Count | None = None) -> Content:
        """The items' content; the same item gives the same lines in any company.

        Raises DataError: an item has another count of numbers than those that were learnt.
        """
        distinct = list(dict.fromkeys(described.texts))
        encoded = self.text.encode(distinct, cache, progress)
        places = {text: place for place, text in enumerate(distinct)}
        lines_V = torch.tensor([places[text] for text in described.texts], dtype=torch.int64)
        known = [[self._places[name] for name in names if name in self._places] for names in described.categories]
        numbers_VM = (_numbers(described.numbers, self.widths) - self.mean_M) / self.deviation_M
        return Content(
            encoded.tokens_NL[lines_V],
            encoded.states_WP.half(),
            encoded.pooled_NP[lines_V],
            padded(known, max(map(len, known), default=0)),
            torch.tensor(len(self.categories)),
            numbers_VM.nan_to_num(0.0).clamp(-FARTHEST, FARTHEST),
            torch.zeros(len(described), 0, dtype=torch.int32),
            torch.zeros(len(described), 0),
        )

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        tensors, plain = self.text.state()
        about = {"settings": self.settings.as_dict(), "categories": self.categories, "widths": self.widths, "text": plain}
        named = {f"text.{name}": value.contiguous() for name, value in tensors.items()}
        save_file(
            {**named, "mean": self.mean_M, "deviation": self.deviation_M},
            path,
            {"about": json.dumps(about, ensure_ascii=False)},
        )

    @staticmethod
    def load(path: Path) -> ContentEncoder:
        """Raises BundleError: no encoder there."""
        from safetensors import safe_open
        from safetensors.torch import load_file

        if not path.is_file():
            raise BundleError(f"{path}: not there, so the model reads no text; train it with model.text and export it again")
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["about"])
        tensors = load_file(path)
        settings = TextSettings(**about["settings"])
        own = {name.removeprefix("text."): value for name, value in tensors.items() if name.startswith("text.")}
        text = ENCODERS.get(settings.encoder, Pretrained).restore(settings, own, about["text"])
        return ContentEncoder(settings, text, about["categories"], about["widths"], tensors["mean"], tensors["deviation"])


def _numbers(rows: Sequence[Sequence[Sequence[float | None]]], widths: Sequence[int]) -> Tensor:
    """V × M, NaN where one is missing. Raises DataError: other counts of numbers than `widths`."""
    nothing = [[math.nan] * width for width in widths]
    filled = []
    for row in rows:
        columns = [column or gap for column, gap in zip(row or nothing, nothing, strict=False)]
        if len(row or nothing) != len(widths) or [*map(len, columns)] != [*widths]:
            found = [*map(len, row)]
            raise DataError(f"items have {found} numbers by column, the model learnt {list(widths)}; give the same columns")
        filled.append([math.nan if value is None else value for column in columns for value in column])
    return torch.tensor(filled, dtype=torch.float32).reshape(len(rows), sum(widths))
