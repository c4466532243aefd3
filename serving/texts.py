"""Many texts in one block of bytes, read where it lies, and the places of a text among them, found by its hash.

V texts, of which H are hashed · N bytes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import numpy as np
import xxhash

Array = np.ndarray[Any, Any]


def digest(text: str) -> int:
    """A hash that is the same everywhere and in every version, below 2⁶⁴."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


class Texts(Sequence[str]):
    """Texts as UTF-8, one behind the other, each with a byte behind it that is none of it."""

    def __init__(self, letters_N: Array, ends_V: Array) -> None:
        self.letters_N, self.ends_V = letters_N, ends_V

    @classmethod
    def packed(cls, parts: Iterable[Sequence[str]], between: bytes = b"\n") -> Texts:
        """Of texts that come in parts."""
        letters, lengths = [b""], [np.zeros(0, np.int64)]
        for part in parts:
            coded = [text.encode() for text in part]
            letters.append(between.join([*coded, b""]))
            lengths.append(np.fromiter(map(len, coded), np.int64, len(coded)) + len(between))
        joined = b"".join(letters)
        return cls(np.frombuffer(joined, np.uint8), np.concatenate(lengths).cumsum())

    def __len__(self) -> int:
        return len(self.ends_V)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"text {place} of {len(self)}")
        place %= len(self)
        return self.letters_N[self.begin(place) : int(self.ends_V[place]) - 1].tobytes().decode()

    def begin(self, place: int) -> int:
        """Where a text begins."""
        return int(self.ends_V[place - 1]) if place else 0


class Places:
    """Which places hold a text; a hash names some, and what stands there decides."""

    def __init__(self, hashes_H: Array, places_H: Array) -> None:
        self.hashes_H, self.places_H = hashes_H, places_H

    @classmethod
    def of(cls, places: Array, hashes: Array) -> Places:
        """Of places that ascend, each with the hash of its text."""
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], places[order].astype(np.int32))

    def first(self, words: Sequence[str], texts: Callable[[Array], Sequence[str]]) -> list[int | None]:
        """The first place whose text each word is; `texts` says what stands at given places."""
        wanted = np.fromiter(map(digest, words), np.uint64, len(words))
        starts = np.searchsorted(self.hashes_H, wanted)
        inside = np.flatnonzero(starts < len(self.hashes_H))
        hit = inside[self.hashes_H.take(starts[inside]) == wanted[inside]]
        found: list[int | None] = [None] * len(words)
        places = self.places_H.take(starts[hit])
        for number, place, text in zip(hit.tolist(), places.tolist(), texts(places), strict=True):
            found[number] = place if text == words[number] else self._behind(words[number], int(starts[number]) + 1, texts)
        return found

    def _behind(self, word: str, at: int, texts: Callable[[Array], Sequence[str]]) -> int | None:
        """The first place from `at` on whose text is the word, among those of the same hash."""
        end = int(np.searchsorted(self.hashes_H, np.uint64(digest(word)), side="right"))
        rest = self.places_H[at:end]
        return next((place for place, text in zip(rest.tolist(), texts(rest), strict=True) if text == word), None)
