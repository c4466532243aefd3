"""What the items are called, their events and which were removed, as a bundle holds them for requests: read where it lies.

Nothing in it is made anew when it is loaded, and processes of one machine share its memory: a Python object for each of ten
million items would take gigabytes and minutes.

V items, by line · N bytes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from serving.texts import Places, Texts, digest

NAMES = "names.safetensors"
REMOVED = "removed"
"""Column of the items' table of a bundle from which items were taken out: they are read in histories, never recommended."""
PART = 65_536
"""Items whose texts are Python's at once."""
SEARCHED = 2**24
"""Bytes of titles that are searched in one step, 2 ms."""

Array = np.ndarray[Any, Any]


class Numbers(Sequence[int]):
    """Whole numbers as Python's."""

    def __init__(self, numbers_V: Array) -> None:
        self.numbers_V = numbers_V

    def __len__(self) -> int:
        return len(self.numbers_V)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        found: int | list[int] = self.numbers_V[place].tolist()
        return found

    def __iter__(self) -> Iterator[int]:
        return map(self.__getitem__, range(len(self)))


class Names:
    """Ids, titles, events and removals of every item."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        self.events_V, self.removed_V = tensors["events"], tensors["removed"]
        self.item_ids: Sequence[int | str] = Numbers(arrays["ids"]) if "ids" in arrays else _texts(arrays, "id")
        """As in the input."""
        self.folded = _texts(arrays, "folded")
        """Of each item what it is called, without regard to case, in one line."""
        self._titles = _texts(arrays, "title")
        self._by_id, self._by_title, self._by_folded = (
            Places(arrays[f"{kind}_hashes"], arrays[f"{kind}_places"]) for kind in ("id", "title", "folded")
        )

    @classmethod
    def of(cls, table: pl.DataFrame) -> Names:
        """Of an items' table."""
        ids, titles = table["item_id"], table["title"].cast(pl.String).fill_null("")
        texts, whole = ids.cast(pl.String), ids.dtype.is_integer()
        called = [(texts[start : start + PART], titles[start : start + PART]) for start in range(0, len(ids), PART)]
        tensors = {"events": table["events"].cast(pl.Float32).to_numpy()}
        tensors["removed"] = table[REMOVED].to_numpy() if REMOVED in table.columns else np.zeros(len(table), bool)
        tensors |= {"ids": ids.cast(pl.Int64).to_numpy()} if whole else _packed("id", (part.to_list() for part, _ in called))
        tensors |= _packed("title", (part.to_list() for _, part in called))
        tensors |= _packed("folded", ([_line(title) for title in _called(*part)] for part in called))
        hashed: dict[str, list[tuple[Array, Array]]] = {"id": [], "title": [], "folded": []}
        for part, start in zip(called, range(0, len(ids), PART), strict=True):
            own, titled = part[0].to_list(), part[1].to_list()
            shown = _called(*part)
            folded = [title.casefold() for title in shown]
            places = np.arange(start, start + len(own))
            for kind, words, wanted in (
                ("id", own, np.ones(len(own), bool)),
                ("title", titled, np.array([bool(title) for title in titled])),
                ("folded", folded, np.array([one != other for one, other in zip(folded, shown, strict=True)])),
            ):
                chosen = [word for word, some in zip(words, wanted, strict=True) if some]
                hashed[kind].append((places[wanted], np.fromiter(map(digest, chosen), np.uint64, len(chosen))))
        for kind, parts in hashed.items():
            found = Places.of(*(np.concatenate([_NONE[at], *(part[at] for part in parts)]) for at in (0, 1)))
            tensors |= {f"{kind}_hashes": found.hashes_H, f"{kind}_places": found.places_H}
        return cls({name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in tensors.items()})

    @classmethod
    def load(cls, path: Path) -> Names:
        """As a file has them, of which a part is read when it is needed."""
        return cls(load_file(path))

    def save(self, path: Path) -> None:
        save_file(self._tensors, path)

    def __len__(self) -> int:
        return len(self.events_V)

    def title(self, line: int) -> str:
        """What an item is called: its id where it has no title."""
        return self._titles[line] or str(self.item_ids[line])

    def of_ids(self, words: Sequence[str]) -> list[int | None]:
        """The item of each id as text; None where it is none."""
        return self._by_id.first(words, self._ids)

    def of_title(self, word: str) -> int | None:
        """The first item that is called so, else the first without regard to case."""
        found = self._called(word)
        if found is not None:
            return found
        folded = word.casefold()
        (other,) = self._by_folded.first([folded], lambda places: [self.title(place).casefold() for place in places.tolist()])
        return min((place for place in (self._called(folded), other) if place is not None), default=None)

    def _called(self, word: str) -> int | None:
        """The first item with this title, or with this id and no title."""
        (titled,) = self._by_title.first([word], lambda places: [self._titles[place] for place in places.tolist()])
        (line,) = self.of_ids([word])
        untitled = None if line is None or self._titles[line] else line
        return min((place for place in (titled, untitled) if place is not None), default=None)

    def _ids(self, places: Array) -> list[str]:
        if isinstance(self.item_ids, Numbers):
            return [*map(str, self.item_ids.numbers_V.take(places).tolist())]
        return [str(self.item_ids[place]) for place in places.tolist()]

    def holding(self, part: str) -> Iterator[int]:
        """Items whose titles hold `part`, in any case, ascending."""
        letters_N, ends_V = self.folded.letters_N, self.folded.ends_V
        wanted, begin = _line(part).encode("utf-8", "surrogatepass"), 0
        while begin < len(letters_N):  # whole lines, so that nothing is missed between two steps
            line = int(np.searchsorted(ends_V, begin, side="right"))
            end = int(ends_V[max(line, int(np.searchsorted(ends_V, begin + SEARCHED, side="right")) - 1)])
            block, at = letters_N[begin:end].tobytes(), 0
            while at < len(block) and (at := block.find(wanted, at)) >= 0 and at < len(block):
                line = int(np.searchsorted(ends_V, begin + at, side="right"))
                yield line
                at = int(ends_V[line]) - begin
            begin = end


_NONE: tuple[Array, Array] = (np.zeros(0, np.int64), np.zeros(0, np.uint64))


def _texts(arrays: dict[str, Array], kind: str) -> Texts:
    return Texts(arrays[f"{kind}_letters"], arrays[f"{kind}_ends"])


def _packed(kind: str, parts: Iterable[list[str]]) -> dict[str, Array]:
    packed = Texts.packed(parts)
    return {f"{kind}_letters": packed.letters_N, f"{kind}_ends": packed.ends_V}


def _called(ids: pl.Series, titles: pl.Series) -> list[str]:
    return [title or text for text, title in zip(ids.to_list(), titles.to_list(), strict=True)]


def _line(title: str) -> str:
    return " ".join(title.casefold().split("\n"))
