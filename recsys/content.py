"""What is known of items besides their ids, as tensors: text, categories, numbers; line i belongs to row FIRST_ITEM + i.

V items · L tokens of an item · W token states · P width of a state · C categories of an item · M numbers of an item
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys.errors import BundleError, DataError
from recsys.text import ENCODERS, Encoded, Pretrained, Progress, TextEncoder, TextSettings

CONTENT = "content.safetensors"
ENCODER = "encoder.safetensors"
CATEGORIES = 4096
"""Most categories that are told apart: those of the most items."""
FARTHEST = 5.0
"""Deviations from the mean beyond which numbers are cut."""


@dataclass(frozen=True)
class Described:
    """V items as their table describes them."""

    texts: Sequence[str]
    categories: Sequence[Sequence[str]]
    numbers: Sequence[Sequence[float | None]]
    """Always so many, None where one is missing; none at all where nothing is known."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, count: int) -> Described:
        """The first `count` items."""
        return Described(self.texts[:count], self.categories[:count], self.numbers[:count])


@dataclass(frozen=True)
class Content:
    """V items as the model reads them."""

    tokens_VL: Tensor
    """Lines of `states_WP`, int32; 0 where a text has fewer than L."""
    states_WP: Tensor
    """State of each token, float16, line 0 is none; 0 × P where the model learns them."""
    pooled_VP: Tensor
    """Pooled vector of each text, float32, 0 where there is none; V × 0 where the model learns token states."""
    categories_VC: Tensor
    """Categories from 1, int32; 0 where an item has fewer than C."""
    numbers_VM: Tensor
    """In deviations from the mean, float32; 0 where one is missing."""

    def __len__(self) -> int:
        return len(self.tokens_VL)

    @property
    def some_V(self) -> Tensor:
        """Whether anything is known of an item; bool."""
        return (self.tokens_VL > 0).any(1) | (self.categories_VC > 0).any(1) | (self.numbers_VM != 0).any(1)

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file({field.name: getattr(self, field.name).contiguous() for field in fields(self)}, path)

    @staticmethod
    def load(path: Path) -> Content:
        from safetensors.torch import load_file

        return Content(**load_file(path))

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
        return Content(
            put(self.tokens_VL, tokens),
            states,
            put(self.pooled_VP, other.pooled_VP),
            put(self.categories_VC, other.categories_VC),
            put(self.numbers_VM, other.numbers_VM),
        )


class ContentEncoder:
    """Turns items as tables describe them into what the model reads; fitted once, on the items that were learnt."""

    def __init__(
        self, settings: TextSettings, text: TextEncoder, categories: Sequence[str], mean_M: Tensor, deviation_M: Tensor
    ) -> None:
        self.settings, self.text = settings, text
        self.categories, self.mean_M, self.deviation_M = list(categories), mean_M, deviation_M
        self._places = {name: place for place, name in enumerate(self.categories, 1)}

    @classmethod
    def fit(
        cls, described: Described, settings: TextSettings, cache: Path | None = None, progress: Progress | None = None
    ) -> ContentEncoder:
        """Terms, categories and scales of items with training events."""
        kind = ENCODERS.get(settings.encoder, Pretrained)
        text = kind.fit(described.texts, settings, cache, progress)
        counts = Counter(name for names in described.categories for name in set(names))
        categories = sorted(sorted(counts), key=lambda name: -counts[name])[:CATEGORIES]
        numbers_VM = _numbers(described.numbers).double()
        mean_M = numbers_VM.nanmean(0).nan_to_num()
        deviation_M = (numbers_VM - mean_M).square().nanmean(0).sqrt().nan_to_num()
        return cls(settings, text, categories, mean_M.float(), torch.where(deviation_M > 0, deviation_M, 1.0).float())

    def encode(self, described: Described, cache: Path | None = None, progress: Progress | None = None) -> Content:
        """The items' content; the same item gives the same lines in any company.

        Raises DataError: an item has another count of numbers than those that were learnt.
        """
        for numbers in described.numbers:
            if len(numbers) not in (0, len(self.mean_M)):
                raise DataError(
                    f"items have {len(numbers)} numbers, the model learnt {len(self.mean_M)}; give the same columns"
                )
        distinct = list(dict.fromkeys(described.texts))
        encoded: Encoded = self.text.encode(distinct, cache, progress)
        places = {text: place for place, text in enumerate(distinct)}
        lines_V = torch.tensor([places[text] for text in described.texts], dtype=torch.int64)
        known = [[self._places[name] for name in names if name in self._places] for names in described.categories]
        categories_VC = torch.zeros(len(described), max(map(len, known), default=0), dtype=torch.int32)
        for line, numbers in enumerate(known):
            categories_VC[line, : len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
        numbers_VM = (_numbers(described.numbers, len(self.mean_M)) - self.mean_M) / self.deviation_M
        return Content(
            encoded.tokens_NL[lines_V],
            encoded.states_WP.half(),
            encoded.pooled_NP[lines_V],
            categories_VC,
            numbers_VM.nan_to_num(0.0).clamp(-FARTHEST, FARTHEST),
        )

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        tensors, plain = self.text.state()
        about = {"settings": self.settings.as_dict(), "categories": self.categories, "text": plain}
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

        if not path.is_file():
            raise BundleError(f"{path}: not there, so the model reads no text; train it with model.text and export it again")
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        settings = TextSettings(**about["settings"])
        own = {name.removeprefix("text."): value for name, value in tensors.items() if name.startswith("text.")}
        text = ENCODERS.get(settings.encoder, Pretrained).restore(settings, own, about["text"])
        return ContentEncoder(settings, text, about["categories"], tensors["mean"], tensors["deviation"])


def _numbers(rows: Sequence[Sequence[float | None]], width: int | None = None) -> Tensor:
    """V × M, NaN where one is missing."""
    width = max(map(len, rows), default=0) if width is None else width
    if any(len(row) not in (0, width) for row in rows):
        raise DataError(f"items have different counts of numbers, {width} at most; give the same number_columns in all tables")
    filled = [[torch.nan if value is None else value for value in row] or [torch.nan] * width for row in rows]
    return torch.tensor(filled, dtype=torch.float32).reshape(len(rows), width)
