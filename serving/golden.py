"""Golden answers: what a bundle said to made-up histories when it was made, and whether it still says so.

They are written by the recommender that the finished files make, and compared wherever a bundle goes live: what has whole files
and answers otherwise (another processor, another version of a library, a mistake in ours) is found before a user finds it.

V items
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from recsys import bundle
from recsys.batch import FIRST_ITEM
from recsys.bundle import Directory, Writer
from recsys.errors import BundleError, RequestError
from serving.engine import Recommender

GOLDEN = "golden.json"
HISTORIES = 32
K = 20
TOLERANCE = 1e-4
"""Of a list's largest score: how far a score may be from the one that was written; other kernels move it by about 1e-6."""
BEYOND = 13
"""Events of the longest history that the model no longer reads."""
BEGIN = 1_700_000_000
"""Second of the first event of every history."""
GAPS = (60, 30 * 24 * 3600)
"""Seconds between two events, from and to; evenly on a log scale."""


class Golden(msgspec.Struct, frozen=True):
    """A history by item ids, when it is asked for where the model reads that, and its list."""

    history: list[int | str]
    times: list[int]
    now: int | None
    items: list[int | str]
    scores: list[float]


def write(recommender: Recommender, path: Path) -> None:
    """Ask for the list of every made-up history, and write them."""
    told = []
    for history, times in _histories(recommender):
        now = times[-1] + GAPS[0] if recommender.reads_now else None
        told.append(Golden(history, times, now, *_list(recommender, history, times, now)))
    path.write_bytes(msgspec.json.encode(told) + b"\n")


def compare(recommender: Recommender, path: Path) -> None:
    """Ask again; items of nearly one score may swap places. Raises BundleError: the file cannot be read, or a list differs."""
    try:
        told = msgspec.json.decode(path.read_bytes(), type=list[Golden])
    except (OSError, msgspec.MsgspecError):
        raise BundleError(f"{path}: cannot be read as golden answers; export the bundle again") from None
    if not told or any(len(golden.items) != len(golden.scores) for golden in told):
        raise BundleError(f"{path}: holds no golden answers, or not a score for each item; export the bundle again")
    for number, golden in enumerate(told):
        try:
            items, scores = _list(recommender, golden.history, golden.times, golden.now)
        except RequestError:
            raise BundleError(f"{path}: history {number} has no answer any more; export the bundle again") from None
        if difference := _difference(golden, items, scores):
            raise BundleError(
                f"{path}: the answer to history {number} is not the golden one ({difference}); export the bundle again, "
                "with what serves it"
            )


def writer(manifest: Mapping[str, Any]) -> Writer:
    """What writes golden answers as the last file of a bundle with such a manifest, from the files that lie beside it."""

    def write_last(path: Path) -> None:
        files = dict.fromkeys(file.name for file in path.parent.iterdir())
        write(Recommender(Directory(path.parent, {**manifest, "files": files})), path)

    return write_last


def renew(old: Directory, path: Path, writers: Mapping[str, Writer], changes: Mapping[str, Any]) -> Directory:
    """Publish a bundle anew, as recsys.bundle.renew, with golden answers of its own."""
    files = {file: entry for file, entry in old.manifest["files"].items() if file != GOLDEN}  # it would not stand last
    stripped = Directory(old.path, {**old.manifest, "files": files})
    return bundle.renew(stripped, path, {**writers, GOLDEN: writer({**old.manifest, **changes})}, changes)


def _histories(recommender: Recommender) -> list[tuple[list[int | str], list[int]]]:
    """Item ids and times, of one event to more than the model reads; items are drawn by their training events and one more."""
    generator = torch.Generator().manual_seed(0)
    longest = recommender.model.settings.length + BEYOND
    lengths = torch.logspace(0, 1, HISTORIES, base=longest, dtype=torch.float64).round().long()
    edges_V = (recommender.catalogue.events[: recommender.lines].double() + 1).cumsum(0)
    drawn = torch.rand(2, int(lengths.sum()), dtype=torch.float64, generator=generator)
    lines = torch.searchsorted(edges_V, drawn[0] * edges_V[-1], right=True).clamp(max=len(edges_V) - 1)
    gaps = (GAPS[0] * (GAPS[1] / GAPS[0]) ** drawn[1]).long()
    histories = []
    for part, between in zip(torch.split(lines, lengths.tolist()), torch.split(gaps, lengths.tolist()), strict=True):
        items = [recommender.catalogue.item_id(line + FIRST_ITEM) for line in part.tolist()]
        histories.append((items, (BEGIN + between.cumsum(0) - between[0]).tolist()))
    return histories


def _list(
    recommender: Recommender, history: list[int | str], times: list[int], now: int | None
) -> tuple[list[int | str], list[float]]:
    """The K best items for one history and their scores. Raises RequestError: as Recommender.answer."""
    catalogue = recommender.catalogue
    batch, _ = recommender.request(catalogue.rows(history, catalogue.by_id), times)
    lists = recommender.recommend(batch, K, now)
    found = catalogue.places(zip(lists.rows[0].tolist(), lists.scores[0].tolist(), strict=True))
    return [place["item_id"] for place in found], [place["score"] for place in found]


def _difference(golden: Golden, items: list[int | str], scores: list[float]) -> str:
    """In words that name no item, for they are logged; empty where items whose scores differ by less than the tolerance differ
    alone."""
    if len(items) != len(golden.items):
        return f"{len(items)} items, written were {len(golden.items)}"
    within = TOLERANCE * max(map(abs, golden.scores), default=0.0)
    written = dict(zip(golden.items, golden.scores, strict=True))
    for place, (item, score) in enumerate(zip(items, scores, strict=True)):
        wanted = written.get(item, golden.scores[-1])  # an item that was not listed may be as good as the last that was
        if not (abs(score - golden.scores[place]) <= within and abs(score - wanted) <= within):
            other = "another item" if item != golden.items[place] else "its item"
            return f"place {place + 1}: {other} with score {score:.6g}, written was {golden.scores[place]:.6g}"
    return ""
