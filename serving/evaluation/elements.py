"""What a page is made of: figures with their captions, and tables of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.evaluation.numbers import NONE


@dataclass(frozen=True)
class Drawing:
    """A figure of the page, or a sentence why there is none."""

    title: str
    text: str
    """What to see in it; where there is no figure, why."""
    svg: str = ""
    label: str = ""
    """The figure in words, for those who do not see it."""


@dataclass(frozen=True)
class Table:
    """Lines of texts: the first of each is its name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""
    words: frozenset[int] = frozenset()
    """Columns that hold sentences."""
    strong: frozenset[int] = frozenset()
    """Lines that are set bold."""

    @property
    def dashes(self) -> bool:
        """Whether a figure is missing, which a note explains."""
        return any(NONE in row[1:] for row in self.rows)
