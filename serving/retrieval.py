"""What is near a state: candidates of the search without seen items, scored exactly, in one order.

Parity: an index only names candidates, and how many it is asked for depends on the request and the history alone; so does
whether the events of a long history are left out by the search or afterwards. What rounding could have put in or out is scored
again, in float64, each product by itself.

B histories · E width · V items · n, C candidates · k places of a list
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys.batch import FIRST_ITEM, Batch, gather
from serving.filters import allowed_lines
from serving.index import Scan, Searcher
from serving.lists import ordered

QUERIES = 16
"""Histories searched at once; from 20 on FAISS takes other kernels, which round otherwise."""
MARGIN = 16
"""Candidates beyond k that are scored exactly, where an index found them by rounded vectors."""
FEW = 50_000
"""Allowed items up to which they are searched exactly, in at most 3 ms of width 64, and nothing is missed: of so many among
1,000,000, ivf finds 95 % of the best 100."""
LONG = 1000
"""Events beyond which a history has a search of its own that leaves them out; to ask for so many more takes longer."""

Array = np.ndarray[Any, Any]


def find(
    searcher: Searcher, scan: Scan, states_BE: Tensor, k: int, hidden: Batch | None = None, allowed_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows and scores of the k best allowed items for each state, without those of its history in `hidden`; shape B × k."""
    if allowed_V is not None and np.count_nonzero(allowed_V.numpy()) <= FEW:
        searcher = scan
    items, count = len(scan.vectors), len(states_BE)
    seen = [_NONE] * count if hidden is None else _lines(hidden)
    rows_BK, scores_BK = np.empty((count, k), np.int64), np.empty((count, k), np.float32)
    alike: dict[int, list[int]] = {}
    for place, lines in enumerate(seen):
        if len(lines) <= LONG:
            alike.setdefault(_depth(k + MARGIN + len(lines), items), []).append(place)
            continue
        unseen_V = allowed_lines(items, torch.from_numpy(lines + FIRST_ITEM), None, allowed_V)
        found = find(searcher, scan, states_BE[place : place + 1], k, None, unseen_V)
        rows_BK[place], scores_BK[place] = (part[0].numpy() for part in found)
    for n, places in alike.items():
        for start in range(0, len(places), QUERIES):
            chunk = places[start : start + QUERIES]
            own_BE = states_BE if len(chunk) == count else states_BE[chunk]
            for place, rows_K, scores_K in zip(
                chunk, *_search(searcher, scan, own_BE, chunk, seen, k, n, allowed_V), strict=True
            ):
                rows_BK[place], scores_BK[place] = rows_K, scores_K
    return torch.from_numpy(rows_BK), torch.from_numpy(scores_BK)


def find_one(
    searcher: Searcher, scan: Scan, state_1E: Array, k: int, seen: Array, allowed_V: Tensor | None
) -> tuple[Array, Array]:
    """`find` for one state, without the items of the lines `seen`; rows and scores of length k."""
    if len(seen) > LONG or allowed_V is not None:
        hidden = torch.from_numpy(seen + FIRST_ITEM)
        batch = Batch(hidden, torch.tensor([0, len(hidden)]), hidden)
        rows_1K, scores_1K = find(searcher, scan, torch.from_numpy(state_1E), k, batch, allowed_V)
        return rows_1K[0].numpy(), scores_1K[0].numpy()
    n = _depth(k + MARGIN + len(seen), len(scan.vectors))
    (lines_N,), (rough_N,) = searcher.near(state_1E, n)
    settled, rows_K, scores_K = _settle(searcher.exact, scan, state_1E[0], lines_N, rough_N, seen, scan.marks, k)
    if settled:
        return rows_K, scores_K
    (rows_K,), (scores_K,) = _search(searcher, scan, torch.from_numpy(state_1E), [0], [seen], k, n, None)
    return rows_K, scores_K


_NONE: Array = np.zeros(0, np.int64)


def _lines(hidden: Batch) -> list[Array]:
    """What each history holds."""
    lines, offsets = hidden.values.cpu().numpy() - FIRST_ITEM, hidden.offsets.tolist()
    return [lines[begin:end] for begin, end in pairwise(offsets)]


def _depth(wanted: int, items: int) -> int:
    """Candidates to ask for: a power of two, or all."""
    return min(1 << (wanted - 1).bit_length(), items)


def _search(
    searcher: Searcher,
    scan: Scan,
    states_BE: Tensor,
    chunk: list[int],
    seen: list[Array],
    k: int,
    n: int,
    allowed_V: Tensor | None,
) -> tuple[list[Array], list[Array]]:
    """Rows and scores of the k best items outside each `seen`, from n candidates, or more where n do not settle it."""
    lines_BN, rough_BN = (part.cpu().numpy() for part in searcher.search(states_BE, n, allowed_V))
    rows, scores = [], []
    marked_V = scan.marks
    for line, state_E in enumerate(states_BE.cpu().numpy()):
        settled, *found = _settle(searcher.exact, scan, state_E, lines_BN[line], rough_BN[line], seen[chunk[line]], marked_V, k)
        if not settled:
            again, more = (searcher, min(2 * n, len(scan.vectors))) if searcher.exact else (scan, n)
            own = _search(again, scan, states_BE[line : line + 1], [chunk[line]], seen, k, more, allowed_V)
            found = [part[0] for part in own]
        rows.append(found[0])
        scores.append(found[1])
    return rows, scores


def _settle(
    exact: bool, scan: Scan, state_E: Array, lines_N: Array, rough_N: Array, seen: Array, marked_V: Array, k: int
) -> tuple[bool, Array, Array]:
    """Whether these candidates, best first, settle the k best outside `seen`; their rows and their exact scores."""
    keep_N, items = lines_N >= 0, len(marked_V) - 1
    full = bool(keep_N[-1])
    if len(seen):
        own = np.where((seen >= 0) & (seen < items), seen, items)
        marked_V[own] = True
        marked_V[items] = False
        keep_N &= ~marked_V.take(lines_N)
        marked_V[own] = False
    kept = np.flatnonzero(keep_N)
    if exact:  # every candidate that rounding could lift above the k-th is scored again
        kth = rough_N[kept[k - 1]] if len(kept) >= k else -np.inf
        least = kth - 2**-22 * len(state_E) * np.sqrt(np.dot(state_E, state_E)) * scan.longest
        kept = kept[rough_N[kept] >= least]
        settled = not full or bool(rough_N[-1] < least) or len(lines_N) == items
    else:
        kept = kept[: k + MARGIN]
        settled = full  # else few are allowed where the index looked, and better ones may be elsewhere
    lines_C = lines_N[kept]
    rows_K, scores_K = ordered(lines_C + FIRST_ITEM, products(state_E, scan.vectors.take(lines_C, axis=0)), k)
    return settled, rows_K, scores_K


def products(state_E: Array, vectors_CE: Array) -> Array:
    """Inner products in float64, rounded to float32: the same for a pair in any company."""
    exact_CE = vectors_CE.astype(np.float64)
    exact_CE *= state_E
    found: Array = exact_CE.sum(1).astype(np.float32)
    return found


def taken(histories: Batch, chosen: Tensor) -> Batch:
    """Some of the histories."""
    return gather(histories.values, histories.times, histories.offsets[chosen], histories.offsets[chosen + 1])
