"""What raw tables must hold, and the one policy for rows that are bad."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import polars as pl

from recsys.config import Seconds, Settings
from recsys.errors import DataError


@dataclass(frozen=True)
class RawTables:
    """A data source as it was read: canonical column names, nothing checked or cast yet."""

    events: pl.LazyFrame
    """user_id, item_id, timestamp (null where unknown), optionally order (place within the user); other columns are kept
    for the quarantine alone."""
    items: pl.LazyFrame | None = None
    """item_id, optionally title, and the columns that DataSettings.text_columns, category_columns,
    number_columns and attribute_columns name."""
    users: pl.LazyFrame | None = None
    """user_id and whatever else is known of a user."""


@dataclass(frozen=True)
class DataSettings(Settings):
    """Where events, items and users come from and what their columns are called."""

    section: ClassVar[str] = "data"

    source: str = "files"
    """`files`, or the name of a public data set in features.sources.SOURCES (then the paths and column names below,
    from `events` to `order`, are the source's own)."""
    events: str = "events*"
    """Path, glob or folder of the events, relative to the data folder: .csv, .tsv, .parquet, .jsonl, .ndjson."""
    items: str = ""
    """As `events`, of the items; empty: `items.*` if there is one."""
    users: str = ""
    """As `events`, of the users; empty: `users.*` if there is one."""
    user_id: str = "user_id"
    """Column of the user."""
    item_id: str = "item_id"
    """Column of the item."""
    timestamp: str = "timestamp"
    """Column of the event's time: a number of `time_unit`, a date, or ISO 8601 text (UTC where it names no zone); empty:
    the events have none (then `order` is needed)."""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of times that are numbers."""
    order: str = ""
    """Column of an event's place within its user; if given, it alone orders events and a missing time is filled."""
    title: str = "title"
    """Column of an item's title."""
    text_columns: tuple[str, ...] = ()
    """Columns that describe an item, joined as `name: value; name: value`; none: the title alone."""
    category_columns: tuple[str, ...] = ()
    """Columns whose values are an item's categories."""
    category_separator: str = "|"
    """What separates several categories in one cell; empty: a cell is one category."""
    number_columns: tuple[str, ...] = ()
    """Columns of numbers that describe an item: one a cell (a price), or a list of always so many (a vector of its image)."""
    attribute_columns: tuple[str, ...] = ()
    """Columns that the model does not read and by which requests may filter items (`where`): numbers, true or false, a text or
    a list of texts; text is read as numbers, or as true or false, where all of it is. `categories` is always there."""
    repeats: Literal["drop", "keep"] = "drop"
    """What becomes of an event that agrees with an earlier one in user, item, time and order."""
    now: Seconds = 0
    """A date, a time, or seconds since 1970, after which a time lies in the future; 0: when the build runs."""

    def __post_init__(self) -> None:
        if not (self.user_id and self.item_id and self.events):
            raise ValueError("user_id, item_id and events may not be empty")
        if not (self.timestamp or self.order):
            raise ValueError("timestamp and order are both empty: name the column that orders the events")
        if len(set(self.attribute_columns)) < len(self.attribute_columns) or "categories" in self.attribute_columns:
            found = list(self.attribute_columns)
            raise ValueError(f"attribute_columns are {found}: name each once, and not categories, which are always there")
        if self.now < 0:
            raise ValueError(f"now is {self.now}: give seconds since 1970, or 0 for the clock")

    def only_attributes(self, columns: Iterable[str]) -> bool:
        """Whether an items table of these columns says nothing of an item but attributes."""
        title = {"title", self.title} if self.title else set()
        read = {*title, *self.text_columns, *self.category_columns, *self.number_columns}
        return bool(set(self.attribute_columns) & set(columns)) and not read & set(columns)


@dataclass(frozen=True)
class Policy:
    """What becomes of a bad row, and what is bad about it."""

    action: Literal["repaired", "quarantined"]
    meaning: str


POLICIES: dict[str, Policy] = {
    "null_id": Policy("quarantined", "a user_id or item_id is empty, null or NaN"),
    "wrong_type": Policy("quarantined", "a cell cannot be read as its column's type; a time is a number, a date or ISO 8601"),
    "missing_time": Policy("quarantined", "the time is missing and there is no order to fill it by"),
    "missing_order": Policy("quarantined", "the order is missing"),
    "negative_time": Policy("quarantined", "the time lies before 1970"),
    "future_time": Policy("quarantined", "the time lies after now"),
    "duplicate": Policy("quarantined", "an earlier event has the same user, item, time and order"),
    "unsorted": Policy("repaired", "the event stood after a later one of its user; sorted"),
    "filled_time": Policy("repaired", "the time is missing; filled from the user's neighbouring events"),
    "raised_time": Policy("repaired", "the time lies before that of an event earlier in order; raised to it"),
    "unknown_item": Policy("repaired", "the item is not in the items table; added without text"),
    "repeated_row": Policy("repaired", "the table lists this id more than once; the last row counts"),
}
"""Every reason a row can be bad for. A row has one reason to be quarantined: the first that holds."""
REASON = pl.Enum(list(POLICIES))
ROW = "#row"
"""Name of the column that numbers raw rows, in no one's data."""


def none_usable(where: str, read: int, counts: Mapping[str, int]) -> DataError:
    """That of so many events none is left, for which reasons, and where to look."""
    if not counts:
        return DataError(f"{where}: there are no events; name a file that holds some")
    found = "; ".join(f"{count:,} {reason}: {POLICIES[reason].meaning}" for reason, count in sorted(counts.items()))
    check = 'time_unit, which may be "ms",' if "future_time" in counts else "what stands"
    return DataError(f"{where}: none of {read:,} events is usable ({found}); check {check} in the recipe's section [data]")


@dataclass
class Tally:
    """The rows read of one table, and how many were bad for which reason; a strict one refuses the first bad row."""

    table: str
    strict: bool = False
    read: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, table: str, strict: bool, earlier: Mapping[str, Any] | None) -> Tally:
        """A tally that goes on from what an earlier build reported."""
        rows = earlier or {"read": 0, "repaired": {}, "quarantined": {}}
        return cls(table, strict, rows["read"], {**rows["repaired"], **rows["quarantined"]})

    def add(self, reason: str, rows: int, first: pl.DataFrame) -> None:
        """Count bad rows; `first` holds at least the first of them.

        Raises DataError: there is one and the tally is strict.
        """
        if rows > 0 and self.strict:
            cells = ", ".join(f"{name} {value!r}" for name, value in first.row(0, named=True).items() if name != "reason")
            policy = POLICIES[reason]
            raise DataError(
                f"{self.table}: {rows} rows are bad, {reason}: {policy.meaning}; the first is {cells}; "
                f"mend them, or build without strict to have them {policy.action}"
            )
        if total := self.counts.get(reason, 0) + rows:
            self.counts[reason] = total
        else:
            self.counts.pop(reason, None)

    def settle(self, reason: str, total: int, first: pl.DataFrame) -> None:
        """Set the count of a reason that is judged anew over all rows, earlier builds' included. Raises as `add`."""
        self.add(reason, total - self.counts.get(reason, 0), first)

    def as_dict(self) -> dict[str, Any]:
        counted: dict[str, dict[str, int]] = {"repaired": {}, "quarantined": {}}
        for reason, policy in POLICIES.items():
            if reason in self.counts:
                counted[policy.action][reason] = self.counts[reason]
        return {"read": self.read, **counted}


def require(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises DataError: a column is missing; the nearest is named."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)};"
            if len(known) == 1 and ";" in known[0]:
                hint = "its columns are separated by ';': write it with commas, else"
            raise DataError(f"{where}: no column {name!r}; {hint} name the right one in the recipe's section [data]")
