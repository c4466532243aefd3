"""What is near a state: candidates of the search without seen items, scored exactly, in one order.

Parity: an index only names candidates, and how many it is asked for depends on the request and the history alone; so does
whether the events of a long history are left out by the search or afterwards. What rounding could have put in or out is scored
again, in float64, each product by itself.

B histories · E width · V items · n, C candidates · k places of a list
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recsys.batch import FIRST_ITEM, Batch, gather
from serving.filters import allowed_lines
from serving.index import Scan, Searcher
from serving.lists import Array, ordered

QUERIES = 16
"""Histories searched at once; from 20 on FAISS takes other kernels, which round otherwise."""
FEW = 50_000
"""Allowed items up to which they are searched exactly, in at most 3 ms of width 64, and nothing is missed: of so many among
1,000,000, ivf finds 95 % of the best 100."""
LONG = 1000
"""Events beyond which a history has a search of its own that leaves them out; to ask for so many more takes longer."""


def find(
    searcher: Searcher, scan: Scan, states_BE: Tensor, k: int, hidden: Batch | None = None, allowed_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows and scores of the k best allowed items for each state, without those of its history in `hidden`; shape B × k."""
    if allowed_V is not None and np.count_nonzero(allowed_V.numpy()) <= FEW:
        searcher = scan
    items, count = len(scan.vectors), len(states_BE)
    seen = [np.zeros(0, np.int64)] * count if hidden is None else _lines(hidden, items)
    rows_BK, scores_BK = np.empty((count, k), np.int64), np.empty((count, k), np.float32)
    alike: dict[int, list[int]] = {}
    for place, lines in enumerate(seen):
        if len(lines) <= LONG:
            alike.setdefault(_depth(k + searcher.margin + len(lines), items), []).append(place)
            continue
        unseen_V = allowed_lines(items, torch.from_numpy(lines + FIRST_ITEM), None, allowed_V)
        found = find(searcher, scan, states_BE[place : place + 1], k, None, unseen_V)
        rows_BK[place], scores_BK[place] = (part[0].numpy() for part in found)
    for n, places in alike.items():
        for start in range(0, len(places), QUERIES):
            chunk = places[start : start + QUERIES]
            own_BE = states_BE if len(chunk) == count else states_BE[torch.tensor(chunk)]
            own = [seen[place] for place in chunk]
            rows_BK[chunk], scores_BK[chunk] = _search(searcher, scan, own_BE, own, k, n, allowed_V)
    return torch.from_numpy(rows_BK), torch.from_numpy(scores_BK)


def find_one(
    searcher: Searcher, scan: Scan, state_1E: Array, k: int, seen: Array, allowed_V: Tensor | None
) -> tuple[Array, Array]:
    """`find` for one state, without the items of the lines `seen`; rows and scores of length k."""
    if len(seen) > LONG or allowed_V is not None:
        hidden = torch.from_numpy(seen + FIRST_ITEM)
        batch = Batch(hidden, torch.tensor([0, len(hidden)]), hidden)
        found = find(searcher, scan, torch.from_numpy(state_1E), k, batch, allowed_V)
        return found[0][0].numpy(), found[1][0].numpy()
    n = _depth(k + searcher.margin + len(seen), len(scan.vectors))
    own = [_inside(seen, len(scan.vectors))]
    settled_1, rows_1K, scores_1K = _settle(searcher, scan, state_1E, *searcher.near(state_1E, n), own, k)
    if not settled_1[0]:
        rows_1K, scores_1K = _search(searcher, scan, torch.from_numpy(state_1E), own, k, n, None)
    return rows_1K[0], scores_1K[0]


def _lines(hidden: Batch, items: int) -> list[Array]:
    """What each history holds."""
    lines = _inside(hidden.values.cpu().numpy() - FIRST_ITEM, items)
    return [lines[begin:end] for begin, end in pairwise(hidden.offsets.tolist())]


def _inside(lines: Array, items: int) -> Array:
    """The lines, with the one behind the last in the place of what is no item."""
    return np.where((lines >= 0) & (lines < items), lines, items)


def _depth(wanted: int, items: int) -> int:
    """Candidates to ask for: a power of two, or all."""
    return min(1 << (wanted - 1).bit_length(), items)


def _search(
    searcher: Searcher, scan: Scan, states_BE: Tensor, seen: list[Array], k: int, n: int, allowed_V: Tensor | None
) -> tuple[Array, Array]:
    """Rows and scores of the k best items outside each `seen`, from n candidates, or more where n do not settle it."""
    lines_BN, rough_BN = (part.cpu().numpy() for part in searcher.search(states_BE, n, allowed_V))
    settled_B, rows_BK, scores_BK = _settle(searcher, scan, states_BE.cpu().numpy(), lines_BN, rough_BN, seen, k)
    again, more = (searcher, min(2 * n, len(scan.vectors))) if searcher.exact else (scan, n)
    for line in np.flatnonzero(~settled_B):
        own = _search(again, scan, states_BE[line : line + 1], [seen[line]], k, more, allowed_V)
        rows_BK[line], scores_BK[line] = own[0][0], own[1][0]
    return rows_BK, scores_BK


def _settle(
    searcher: Searcher, scan: Scan, states_BE: Array, lines_BN: Array, rough_BN: Array, seen: list[Array], k: int
) -> tuple[Array, Array, Array]:
    """Whether these candidates, best first, settle the k best outside each `seen`; their rows and their exact scores."""
    items, keep_BN = len(scan.vectors), _unseen(scan, lines_BN, seen)
    full_B = lines_BN[:, -1] >= 0
    places_BN = keep_BN.cumsum(1, dtype=np.int32)
    if searcher.exact:  # every candidate that rounding could lift above the k-th is scored again
        lines_B = np.arange(len(lines_BN))
        kth_B = np.where(places_BN[:, -1] >= k, rough_BN[lines_B, (places_BN >= k).argmax(1)], np.float32(-np.inf))
        lengths_B = np.sqrt(np.einsum("be,be->b", states_BE, states_BE))
        least_B = kth_B - np.float32(2**-22 * states_BE.shape[1] * scan.longest) * lengths_B
        keep_BN &= rough_BN >= least_B[:, None]
        settled_B = ~full_B | (rough_BN[:, -1] < least_B) | (lines_BN.shape[1] == items)
    else:
        keep_BN &= places_BN <= k + searcher.margin
        settled_B = full_B  # else few are allowed where the index looked, and better ones may be elsewhere
    kept_B, chosen = keep_BN.sum(1), np.flatnonzero(keep_BN)
    most = int(kept_B.max(initial=0))
    if len(chosen) == len(kept_B) * most:
        lines_BC = lines_BN.take(chosen).reshape(len(kept_B), most)
        scores_BC = products(states_BE[:, None], scan.at(lines_BC))
    else:
        some_BC = np.arange(most) < kept_B[:, None]
        lines_BC = np.zeros(some_BC.shape, lines_BN.dtype)
        lines_BC[some_BC] = lines_BN.take(chosen)
        scores_BC = products(states_BE[:, None], scan.at(lines_BC))
        scores_BC[~some_BC] = -np.inf
    return settled_B, *ordered(lines_BC + FIRST_ITEM, scores_BC, k)


def _unseen(scan: Scan, lines_BN: Array, seen: list[Array]) -> Array:
    """True for candidates that are there and outside `seen`."""
    keep_BN, marked_V = lines_BN >= 0, scan.marks
    for line, own in enumerate(seen):
        if len(own):
            marked_V[own] = True
            hidden_N = marked_V.take(lines_BN[line])
            marked_V[own] = False
            keep_BN[line] &= ~hidden_N
    return keep_BN


def products(state_E: Array, vectors_CE: Array) -> Array:
    """Inner products in float64, rounded to float32: the same for a pair in any company. Shapes may have more dimensions."""
    found: Array = np.vecdot(vectors_CE.astype(np.float64), state_E.astype(np.float64)).astype(np.float32)
    return found


def taken(histories: Batch, chosen: Tensor) -> Batch:
    """Some of the histories."""
    return gather(histories.values, histories.times, histories.offsets[chosen], histories.offsets[chosen + 1])
