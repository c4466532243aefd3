"""Recommendations from a run or a bundle: history → state → candidates → filters → exact scores → list.

Parity: a history's list is the same alone, in any batch, online and at night, bit for bit. Three things make it so.
*Encoding*: torch's CPU kernels give a history the same state in any company if it is padded to a length that depends on it
alone and is a multiple of 16; padded to the longest of its batch, two of three states change in the last bits (1e-6), and
with them the order of close items. Measured in float32 with widths of 24 to 512, batches of 1 to 32, 1 and 2 threads, on
AVX-512; a test holds it. It costs 2 % of the speed for histories of 200 events and 20 % for those of 50.
*Search*: an index only names candidates, and how many it is asked for depends on the request and the history alone.
*Scores*: candidates that rounding could have put in or out are scored again, in float64, each product by itself.

B histories · E width · V items · n, C candidates · k places of a list
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from recsys.batch import FIRST_ITEM, PADDING, Batch, gather
from recsys.bundle import MANIFEST, Directory, open_directory
from recsys.config import Settings
from recsys.errors import BundleError, RequestError, SetupError
from recsys.model import model_from
from serving.catalogue import ITEMS, Catalogue, Find
from serving.filters import allowed_lines, seen, until
from serving.index import INDEX, Index, IndexSettings, Scan, Searcher
from serving.lists import Lists, best

VECTORS = "vectors.safetensors"
POSITIONS = 16
"""Histories are padded to a multiple of this."""
TOKENS = 2048
"""Padded events encoded at once: what stays in a core's cache; 16,384 are 2 to 30 % slower."""
QUERIES = 16
"""Histories searched at once; from 20 on FAISS takes other kernels, which round otherwise."""
MARGIN = 16
"""Candidates beyond k that are scored exactly, where an index found them by rounded vectors."""
FEW = 20_000
"""Allowed items up to which they are searched exactly: faster than an index, and nothing is missed."""


@dataclass(frozen=True)
class DepthSettings(Settings):
    """What a state may cost."""

    section: ClassVar[str] = "depth"

    blocks: float = 0.0
    """Blocks that a history may go through on average, as measured on validation; needs model.early_exit; 0: all."""

    def __post_init__(self) -> None:
        if self.blocks and not self.blocks >= 1:
            raise ValueError(f"blocks must be at least 1, or 0 for all, found {self.blocks}")


class Recommender:
    """A loaded run or bundle; safe to share between threads."""

    def __init__(self, directory: Directory, device: str = "cpu", *, exact: bool = False, threads: int | None = None) -> None:
        self.manifest, self.path = directory.manifest, directory.path
        self.catalogue = Catalogue(directory.path / ITEMS)
        self.model = model_from(directory, device).eval().requires_grad_(False)
        self.leave = _leave(self.manifest)
        bundle = self.manifest["kind"] == "bundle"
        vectors_VE = read_vectors(directory.path).to(device) if bundle else self.model.item_vectors()
        if len(vectors_VE) != self.model.lines:
            raise BundleError(
                f"{directory.path}: {len(vectors_VE)} item vectors, the model knows {self.model.lines} items; export it again"
            )
        self.scan = Scan(vectors_VE)
        self.popularity = Scan(self.catalogue.events[: self.lines, None].to(device))  # for a state of 1, the score is the count
        live_V = self.model.known_V.cpu() & ~self.catalogue.removed[: self.lines]
        self.live_V = None if bool(live_V.all()) else live_V
        self.searcher: Searcher = self.scan
        if bundle and not exact:
            settings = IndexSettings(**self.manifest["recipe"][IndexSettings.section])
            kind, (items, width) = self.manifest["index"]["kind"], vectors_VE.shape
            self.searcher = Index.load(directory.path / INDEX, kind, settings, (items, width), threads)

    @classmethod
    def load(
        cls, path: Path, verify: bool = True, device: str = "cpu", *, exact: bool = False, threads: int | None = None
    ) -> Recommender:
        """Load a run, a model directory or a bundle; with `exact`, a bundle's index stays unused.

        `threads` is how many FAISS takes for a search (default: its own). Raises BundleError: not whole, altered, or of
        another format.
        """
        path = path / "model" if (path / "model" / MANIFEST).is_file() else path
        directory = open_directory(path, verify)
        kind = directory.manifest.get("kind")
        if kind not in ("model", "bundle"):
            raise BundleError(f"{path / MANIFEST}: holds neither a model nor a bundle but {kind!r}; give a run or a bundle")
        return cls(directory, device, exact=exact, threads=threads)

    def with_exact_search(self) -> Recommender:
        """The same without its index."""
        other = copy.copy(self)
        other.searcher = self.scan
        return other

    @property
    def id(self) -> str:
        """Of the run or bundle."""
        return str(self.manifest["id"])

    @property
    def reads_times(self) -> bool:
        """Whether the model reads when events happened."""
        return self.model.settings.time != "none"

    @property
    def reads_now(self) -> bool:
        """Whether the model reads when it is asked."""
        return self.model.settings.request_time

    @property
    def lines(self) -> int:
        """Items that have a vector."""
        return self.model.lines

    @property
    def items(self) -> int:
        """Items that can be recommended: something is known of them, and they were not removed."""
        return self.lines if self.live_V is None else int(self.live_V.sum())

    @torch.inference_mode()
    def recommend(
        self,
        histories: Batch,
        k: int,
        now: int | Tensor | None = None,
        filter_seen: bool = True,
        deny: Iterable[int] = (),
        allow: Iterable[int] | None = None,
    ) -> Lists:
        """The k best items for each history of item rows; fewer only where fewer are allowed.

        `now` is when they are asked for, in seconds since 1970, for all or for each: later events are left out, and a model
        that reads the time of requests needs it. `deny` and `allow` are item rows.
        Raises RequestError: k below 1, or no `now` where the model reads it.
        """
        if k < 1:
            raise RequestError(f"k is {k}; ask for at least 1 item")
        histories = histories.to(self.scan.vectors_VE.device)
        if now is not None:
            now = torch.as_tensor(now, device=histories.times.device).expand(len(histories))
            histories = until(histories, now)
        elif self.reads_now:
            raise RequestError("the model reads when it is asked; give now, in seconds since 1970")
        allowed_V = allowed_lines(self.lines, deny, allow, self.live_V)
        few = allowed_V is not None and int(allowed_V.sum()) <= FEW
        states_BE, popular_B = self.encode(histories, now), ~self._known(histories)
        n_B = k + MARGIN + (histories.lengths if filter_seen else 0 * histories.lengths)
        n_B = (2 ** n_B.double().log2().ceil()).long().clamp(max=self.lines)
        rows_BK, scores_BK = n_B.new_zeros(len(histories), k), states_BE.new_zeros(len(histories), k)
        for popular, n in sorted(set(zip(popular_B.tolist(), n_B.tolist(), strict=True))):
            scan = self.popularity if popular else self.scan
            searcher = scan if popular or few else self.searcher
            for chunk in torch.split(((popular_B == popular) & (n_B == n)).nonzero().flatten(), QUERIES):
                states = states_BE.new_ones(len(chunk), 1) if popular else states_BE[chunk]
                hidden = _take(histories, chunk) if filter_seen else None
                rows_BK[chunk], scores_BK[chunk] = _search(searcher, scan, states, hidden, k, n, allowed_V)
        return Lists(rows_BK.cpu(), scores_BK.cpu(), popular_B.cpu())

    @torch.inference_mode()
    def encode(self, histories: Batch, now: Tensor | None = None) -> Tensor:
        """`model.encode`, such that a history's state does not depend on its batch; shape B × E."""
        read = self.model.readable(histories)
        places_B = read.lengths + (self.model.settings.objective == "masked")
        padded_B = (places_B + POSITIONS - 1) // POSITIONS * POSITIONS * (read.lengths > 0)
        out_BE = self.scan.vectors_VE.new_zeros(len(read), self.scan.vectors_VE.shape[1])
        for positions in sorted(set(padded_B.tolist()) - {0}):
            for chunk in torch.split((padded_B == positions).nonzero().flatten(), max(1, TOKENS // positions)):
                asked = None if now is None else now[chunk]
                out_BE[chunk] = self.model.encode(_take(read, chunk), asked, positions=positions, leave=self.leave)
        return out_BE

    def answer(
        self,
        history: Sequence[int | str],
        k: int = 10,
        *,
        times: Sequence[int] | None = None,
        now: int | None = None,
        filter_seen: bool = True,
        deny: Sequence[int | str] = (),
        allow: Sequence[int | str] | None = None,
        ignore_unknown: bool = False,
        find: Find | None = None,
    ) -> dict[str, Any]:
        """One list with ids and titles, ready for JSON: bundle, source, unknown (words that are no item), items.

        `history` holds ids or titles (`find`: one of them alone), `times` the second of each; `deny` and `allow` hold ids.
        `now` is the clock's, where the model reads it and none is given.
        Raises RequestError: an unknown item, unless `ignore_unknown`; `now` without `times`; no times where the model reads
        them; as recommend.
        """
        unknown: list[int | str] = []
        rows = partial(self.catalogue.rows, unknown=unknown if ignore_unknown else None)
        batch, now = self.request(rows(history, find or self.catalogue.by_either), times, now)
        denied = [row for row in rows(deny, self.catalogue.by_id) if row is not None]
        allowed = None if allow is None else [row for row in rows(allow, self.catalogue.by_id) if row is not None]
        lists = self.recommend(batch, k, now, filter_seen, denied, allowed)
        items = [
            {"rank": rank, "item_id": self.catalogue.item_id(row), "title": self.catalogue.title(row), "score": score}
            for rank, (row, score) in enumerate(zip(lists.rows[0].tolist(), lists.scores[0].tolist(), strict=True), 1)
            if row != PADDING
        ]
        return {"bundle": self.id, "source": lists.sources[0], "unknown": unknown, "items": items}

    def request(
        self, rows: Sequence[int | None], times: Sequence[int] | None = None, now: int | None = None
    ) -> tuple[Batch, int | None]:
        """One history of item rows, without those that are None, and when it is asked for: the clock, where that is read.

        Raises RequestError: not one time an event, times that descend, none where the model reads them, or `now` without.
        """
        if times is not None and len(times) != len(rows):
            raise RequestError(f"{len(times)} times for {len(rows)} events; give one for each, or none")
        if now is not None and times is None:
            raise RequestError("now is given without times; give the time of each event")
        if times is None and rows and self.reads_times:
            raise RequestError("the model reads when events happened; give times, in seconds since 1970")
        if times is not None and any(later < earlier for earlier, later in pairwise(times)):
            raise RequestError("times descend; give events oldest first")
        events = [(row, second) for row, second in zip(rows, times or [0] * len(rows), strict=True) if row is not None]
        batch = Batch.of([[row for row, _ in events]], [[second for _, second in events]])
        return batch, int(time.time()) if now is None and self.reads_now else now

    def _known(self, histories: Batch) -> Tensor:
        """True where the events that the model reads hold an item that it knows; bool, shape B."""
        read = self.model.readable(histories)
        return torch.bincount(read.owners[self.model.reads(read.values)], minlength=len(read)) > 0


def _search(
    searcher: Searcher, scan: Scan, states_BE: Tensor, hidden: Batch | None, k: int, n: int, allowed_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows and scores of the k best items outside `hidden`, from n candidates, or more where n do not settle it."""
    lines_BN, rough_BN = searcher.search(states_BE, n, allowed_V)
    found_BN = lines_BN >= 0
    keep_BN = found_BN if hidden is None else found_BN & ~seen(hidden, lines_BN + FIRST_ITEM)
    places_BN = keep_BN.cumsum(1)
    if searcher.exact:  # every candidate that rounding could lift above the k-th is scored again
        kth_B = rough_BN.masked_fill(places_BN < k, -torch.inf).amax(1)
        rounding_B = 2**-22 * states_BE.shape[1] * states_BE.norm(dim=1) * scan.longest
        wanted_BN = keep_BN & (rough_BN >= (kth_B - rounding_B)[:, None])
        settled_B = ~wanted_BN[:, -1] if n < len(scan.vectors_VE) else torch.ones_like(found_BN[:, 0])
    else:
        wanted_BN = keep_BN & (places_BN <= k + MARGIN)
        settled_B = places_BN[:, -1] >= k
    most = int(wanted_BN.sum(1).max())
    first_BC = wanted_BN.byte().sort(dim=1, descending=True, stable=True).indices[:, :most]
    lines_BC, wanted_BC = lines_BN.gather(1, first_BC), wanted_BN.gather(1, first_BC)
    scores_BC = _score(states_BE, scan.vectors_VE, lines_BC.clamp(min=0)).masked_fill(~wanted_BC, -torch.inf)
    rows_BK, scores_BK = best(lines_BC + FIRST_ITEM, scores_BC, k)
    rest = (~settled_B).nonzero().flatten()
    if len(rest):
        again, more = (searcher, min(2 * n, len(scan.vectors_VE))) if searcher.exact else (scan, n)
        part = None if hidden is None else _take(hidden, rest)
        rows_BK[rest], scores_BK[rest] = _search(again, scan, states_BE[rest], part, k, more, allowed_V)
    return rows_BK, scores_BK


def _score(states_BE: Tensor, vectors_VE: Tensor, lines_BC: Tensor) -> Tensor:
    """Inner products in float64, rounded to float32: the same for a pair in any company."""
    return (states_BE.double()[:, None] * vectors_VE[lines_BC].double()).sum(2).float()


def _take(histories: Batch, chosen: Tensor) -> Batch:
    return gather(histories.values, histories.times, histories.offsets[chosen], histories.offsets[chosen + 1])


def _leave(manifest: Mapping[str, Any]) -> list[float]:
    """When histories leave the model early, so that they cost at most depth.blocks on average: the best measured way.

    Raises SetupError: the model was not trained for it.
    """
    blocks = DepthSettings(**manifest["recipe"].get(DepthSettings.section, {})).blocks
    if not blocks:
        return []
    curve = [line for line in manifest.get("depth_curve", ()) if line["blocks"] <= blocks]
    if not curve:
        raise SetupError(
            "depth.blocks is set, and the model has no measured exits; train with model.early_exit=true and a validation split"
        )
    return list(max(curve, key=lambda line: float(line["blocks"]))["leave"])


def read_vectors(path: Path) -> Tensor:
    """Placed item vectors of a bundle, shape items × E."""
    from safetensors.torch import load_file

    return load_file(path / VECTORS)["vectors"]
