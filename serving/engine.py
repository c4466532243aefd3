"""Recommendations from a run or a bundle: history → state → candidates → filters → exact scores → ranker → list.

Parity: a history's list is the same alone, in any batch, online and at night, bit for bit. Four things make it so.
*Encoding*: torch's CPU kernels give a history the same state in any company if it is padded to a length that depends on it
alone and is a multiple of 16; padded to the longest of its batch, two of three states change in the last bits (1e-6), and
with them the order of close items. Measured in float32 with widths of 24 to 512, batches of 1 to 32, 1 and 2 threads, on
AVX-512; a test holds it. It costs 2 % of the speed for histories of 200 events and 20 % for those of 50.
*Search*: an index only names candidates, and how many it is asked for depends on the request and the history alone; so does
whether the events of a long history are left out by the search or afterwards.
*Scores*: candidates that rounding could have put in or out are scored again, in float64, each product by itself.
*Ranking*: candidates and looked-at events are padded to multiples of 16 as well, whatever the history, and sums over a width
that end in one number are no matrix products.

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

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys.batch import FIRST_ITEM, PADDING, Batch, gather
from recsys.bundle import MANIFEST, Directory, open_directory
from recsys.config import Settings
from recsys.errors import BundleError, RequestError, SetupError
from recsys.model import model_from
from recsys.ranker import Known, Look, ranker_from
from serving.calibration import Calibration
from serving.catalogue import ITEMS, Catalogue, Find
from serving.filters import allowed_lines, seen, until
from serving.index import INDEX, Index, IndexSettings, Scan, Searcher
from serving.lists import Lists, best
from serving.ranking import ServingSettings, candidates, chosen_blocks, listed, of_rows, rank

VECTORS = "vectors.safetensors"
POSITIONS = 16
"""Histories are padded to a multiple of this."""
TOKENS = 2048
"""Padded events encoded at once: what stays in a core's cache; 16,384 are 2 to 30 % slower."""
QUERIES = 16
"""Histories searched at once; from 20 on FAISS takes other kernels, which round otherwise."""
MARGIN = 16
"""Candidates beyond k that are scored exactly, where an index found them by rounded vectors."""
FEW = 50_000
"""Allowed items up to which they are searched exactly, in at most 3 ms of width 64, and nothing is missed: of so many among
1,000,000, ivf finds 95 % of the best 100."""
LONG = 1000
"""Events beyond which a history has a search of its own that leaves them out; to ask for so many more takes longer."""


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
        self.leave = _leave(self.manifest, DepthSettings(**self.manifest["recipe"].get(DepthSettings.section, {})))
        bundle = self.manifest["kind"] == "bundle"
        vectors_VE = read_vectors(directory.path).to(device) if bundle else self.model.item_vectors()
        if len(vectors_VE) != self.model.lines:
            raise BundleError(
                f"{directory.path}: {len(vectors_VE)} item vectors, the model knows {self.model.lines} items; export it again"
            )
        self.scan = Scan(vectors_VE)
        self.popularity = Scan(self.catalogue.events[: self.lines, None].to(device))  # for a state of 1, the score is the count
        self.ranker = ranker_from(directory, self.model, device)
        if self.ranker is not None:
            self.ranker.eval().requires_grad_(False)
        self.known = Known(
            vectors_VE, self.catalogue.events[: self.lines].log1p().to(device), self.model.items, self.model.content
        )
        self.serving = ServingSettings(**self.manifest["recipe"].get(ServingSettings.section, {}))
        self.ranker_blocks = chosen_blocks(self.serving, self.ranker, self.manifest.get("ranker", {}).get("curve", []))
        self.calibration = Calibration.read(self.manifest.get("calibration"))
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

    def with_ranker(self, blocks: int) -> Recommender:
        """The same with so many blocks of its ranker; with 0, lists are in the order of retrieval."""
        other = copy.copy(self)
        other.ranker_blocks = blocks
        return other

    def with_profile(self, serving: ServingSettings, depth: DepthSettings, index: IndexSettings) -> Recommender:
        """The same at another cost; of the index, only how much it searches. Raises SetupError: as depth.blocks."""
        other = copy.copy(self)
        other.serving, other.leave = serving, _leave(self.manifest, depth)
        other.ranker_blocks = chosen_blocks(serving, self.ranker, self.manifest.get("ranker", {}).get("curve", []))
        if isinstance(self.searcher, Index):
            other.searcher = self.searcher.searching(index)
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
        where: Mapping[str, Any] | None = None,
        diversity: float | None = None,
        popularity: float | None = None,
        probabilities: bool = False,
    ) -> Lists:
        """The k best items for each history of item rows; fewer only where fewer are allowed.

        `now` is when they are asked for, in seconds since 1970, for all or for each: later events are left out, and a model
        that reads the time of requests needs it. `deny` and `allow` are item rows, `where` conditions that items must meet, as
        serving.filters.Attributes has them, `diversity` and `popularity` those of ServingSettings (default: the bundle's).
        With `probabilities` the lists hold them: how probable an item is the next one of all, where no filter is given.
        Raises RequestError: k below 1, a diversity or popularity that is none, probabilities of a bundle without a calibration,
        no `now` where the model reads it, or a condition that cannot be.
        """
        if k < 1:
            raise RequestError(f"k is {k}; ask for at least 1 item")
        serving = self.serving.asked(diversity, popularity)
        if probabilities and self.calibration is None:
            raise RequestError(f"{self.path}: its scores are not calibrated; export it with --dataset, or ask for scores alone")
        histories, now = self._as_of(histories, now)
        meeting_V = self.catalogue.attributes.meeting(where) if where else None
        meeting_V = None if meeting_V is None else meeting_V[: self.lines]
        allowed_V = allowed_lines(self.lines, deny, allow, self.live_V, meeting_V)
        popular_B = ~self._known(histories)
        named = candidates(serving, self.ranker, self.ranker_blocks, k, beside=probabilities)
        states_BE, look = self._read(histories, now)
        rows_BK, scores_BK = histories.values.new_zeros(len(histories), k), states_BE.new_zeros(len(histories), k)
        chances_BK = torch.zeros_like(scores_BK)
        for popular in sorted(set(popular_B.tolist())):
            chosen = (popular_B == popular).nonzero().flatten()
            hidden = _take(histories, chosen) if filter_seen else None
            if popular:
                ones = states_BE.new_ones(len(chosen), 1)
                rows_BK[chosen], scores_BK[chosen] = find(self.popularity, self.popularity, ones, k, hidden, allowed_V)
                continue
            rows_BN, scores_BN = find(self.searcher, self.scan, states_BE[chosen], named, hidden, allowed_V)
            scores_BN = self._rank(rows_BN, scores_BN, look and look.take(chosen))
            rows_BK[chosen], scores_BK[chosen] = listed(rows_BN, scores_BN, self.known, serving, k)
            if probabilities and self.calibration is not None:
                chances_BN = self.calibration.probabilities(scores_BN.cpu()).to(scores_BN.device)
                chances_BK[chosen] = of_rows(rows_BK[chosen], rows_BN, chances_BN, 0.0)
        return Lists(rows_BK.cpu(), scores_BK.cpu(), popular_B.cpu(), chances_BK.cpu() if probabilities else None)

    @torch.inference_mode()
    def score(
        self, histories: Batch, rows_BC: Tensor, now: int | Tensor | None = None, vectors_BCE: Tensor | None = None
    ) -> Tensor:
        """Scores of given item rows for each history, as lists have them; float32 of shape B × C, -inf without a vector.

        `now` as in recommend; without a ranker an empty history scores 0. `vectors_BCE` stand in the place of the items' own,
        before retrieval's eyes alone. A ranker scores each item beside what retrieval names for the history.
        Raises RequestError: no `now` where the model reads it.
        """
        histories, now = self._as_of(histories, now)
        rows_BC = rows_BC.to(self.scan.vectors_VE.device)
        lines_BC = rows_BC - FIRST_ITEM
        some_BC = (lines_BC >= 0) & (lines_BC < self.lines)
        if vectors_BCE is None:
            vectors_BCE = self.scan.vectors_VE[lines_BC.where(some_BC, 0)]
        states_BE, look = self._read(histories, now)
        scores_BC = _score(states_BE, vectors_BCE)
        if look is not None:
            columns = zip(torch.split(rows_BC, 1, 1), torch.split(scores_BC, 1, 1), strict=True)
            beside = find(self.searcher, self.scan, states_BE, self._named, histories, self.live_V)
            placed = [_placed(*beside, *column) for column in columns]
            scores_BC = torch.cat([self._rank(rows, scores, look).gather(1, place) for rows, scores, place in placed], 1)
        return scores_BC.masked_fill(~some_BC, -torch.inf).cpu()

    @torch.inference_mode()
    def looked_at(self, history: Batch, row: int, now: int | Tensor | None = None) -> Tensor | None:
        """How the ranker draws from the events of one history for an item, the mean over blocks and heads, oldest first.

        None where no ranker is served.
        """
        history, now = self._as_of(history, now)
        states_1E, look = self._read(history, now)
        if look is None or self.ranker is None:
            return None
        row_11 = torch.tensor([[row]], device=states_1E.device)
        beside = find(self.searcher, self.scan, states_1E, self._named, history, self.live_V)
        score_11 = _score(states_1E, self.scan.vectors_VE[row_11 - FIRST_ITEM])
        rows_1N, scores_1N, place_11 = _placed(*beside, row_11, score_11)
        kept: list[Tensor] = []
        rank(self.ranker, self.ranker_blocks, self.known, rows_1N, scores_1N, look, kept)
        shares_S = torch.cat(kept)[:, :, place_11[0, 0]].mean((0, 1))
        events = len(self.model.readable(history).values)
        return pad(shares_S[:events].flip(0), (max(0, events - len(shares_S)), 0))

    @property
    def _named(self) -> int:
        """Candidates of a request whose list is short."""
        return candidates(self.serving, self.ranker, self.ranker_blocks, 1, beside=True)

    @torch.inference_mode()
    def candidates(self, histories: Batch, now: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows and scores of all that is ranked for each history, unseen and live; in the order of retrieval, shape B × N.

        `now` as in recommend.
        """
        histories, now = self._as_of(histories, now)
        states_BE, look = self._read(histories, now)
        rows_BN, scores_BN = find(self.searcher, self.scan, states_BE, self._named, histories, self.live_V)
        return rows_BN, self._rank(rows_BN, scores_BN, look)

    def _rank(self, rows_BN: Tensor, scores_BN: Tensor, look: Look | None) -> Tensor:
        """The ranker's scores of candidates, or without a look those of retrieval; shape B × N."""
        if look is None or self.ranker is None:
            return scores_BN
        out_BN = torch.empty_like(scores_BN)
        for part in torch.split(torch.arange(len(rows_BN), device=rows_BN.device), QUERIES):
            out_BN[part] = rank(self.ranker, self.ranker_blocks, self.known, rows_BN[part], scores_BN[part], look.take(part))
        return out_BN

    @torch.inference_mode()
    def encode(self, histories: Batch, now: Tensor | None = None) -> Tensor:
        """`model.encode`, such that a history's state does not depend on its batch; shape B × E."""
        return self._read(histories, now)[0]

    def _read(self, histories: Batch, now: Tensor | None) -> tuple[Tensor, Look | None]:
        """The states, and what a ranker looks at; None where none is served."""
        span = self.ranker.settings.span if self.ranker is not None and self.ranker_blocks else 0
        read = self.model.readable(histories)
        places_B = read.lengths + (self.model.settings.objective == "masked")
        padded_B = (places_B + POSITIONS - 1) // POSITIONS * POSITIONS * (read.lengths > 0)
        out_BE = self.scan.vectors_VE.new_zeros(len(read), self.scan.vectors_VE.shape[1])
        look = Look.empty(out_BE, span) if span else None
        for positions in sorted(set(padded_B.tolist()) - {0}):
            for chunk in torch.split((padded_B == positions).nonzero().flatten(), max(1, TOKENS // positions)):
                asked = None if now is None else now[chunk]
                x_BTE, view = self.model.read(_take(read, chunk), asked, positions=positions, leave=self.leave)
                lines_B, last_B = torch.arange(len(chunk), device=chunk.device), view.lengths_B - 1
                out_BE[chunk] = self.model.place(x_BTE[lines_B, last_B])
                if look is not None:
                    look.put(chunk, Look.at(x_BTE, view, lines_B, last_B, span))
        return out_BE, look

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
        where: Mapping[str, Any] | None = None,
        diversity: float | None = None,
        popularity: float | None = None,
        probabilities: bool = False,
        ignore_unknown: bool = False,
        find: Find | None = None,
    ) -> dict[str, Any]:
        """One list with ids and titles, ready for JSON: bundle, source, unknown (words that are no item), items.

        `history` holds ids or titles (`find`: one of them alone), `times` the second of each; `deny` and `allow` hold ids,
        `where`, `diversity`, `popularity` and `probabilities` are those of recommend. `now` is the clock's, where the model
        reads it and none is given.
        Raises RequestError: an unknown item, unless `ignore_unknown`; `now` without `times`; no times where the model reads
        them; as recommend.
        """
        unknown: list[int | str] = []
        rows = partial(self.catalogue.rows, unknown=unknown if ignore_unknown else None)
        batch, now = self.request(rows(history, find or self.catalogue.by_either), times, now)
        denied = [row for row in rows(deny, self.catalogue.by_id) if row is not None]
        allowed = None if allow is None else [row for row in rows(allow, self.catalogue.by_id) if row is not None]
        lists = self.recommend(batch, k, now, filter_seen, denied, allowed, where, diversity, popularity, probabilities)
        items = [
            {"rank": rank, "item_id": self.catalogue.item_id(row), "title": self.catalogue.title(row), "score": score}
            for rank, (row, score) in enumerate(zip(lists.rows[0].tolist(), lists.scores[0].tolist(), strict=True), 1)
            if row != PADDING
        ]
        if lists.probabilities is not None and not bool(lists.popular[0]):
            for item, chance in zip(items, lists.probabilities[0].tolist(), strict=False):
                item["probability"] = chance
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

    def _as_of(self, histories: Batch, now: int | Tensor | None) -> tuple[Batch, Tensor | None]:
        """The histories without events later than `now`, and `now` of each."""
        histories = histories.to(self.scan.vectors_VE.device)
        if now is not None:
            now = torch.as_tensor(now, device=histories.times.device).expand(len(histories))
            return until(histories, now), now
        if self.reads_now:
            raise RequestError("the model reads when it is asked; give now, in seconds since 1970")
        return histories, None

    def _known(self, histories: Batch) -> Tensor:
        """True where the events that the model reads hold an item that it knows; bool, shape B."""
        read = self.model.readable(histories)
        return torch.bincount(read.owners[self.model.reads(read.values)], minlength=len(read)) > 0


def find(
    searcher: Searcher, scan: Scan, states_BE: Tensor, k: int, hidden: Batch | None = None, allowed_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows and scores of the k best allowed items for each state, without those of its history in `hidden`; shape B × k."""
    if allowed_V is not None and np.count_nonzero(allowed_V.numpy()) <= FEW:
        searcher = scan
    items, lengths_B = len(scan.vectors_VE), torch.zeros(len(states_BE), dtype=torch.int64, device=states_BE.device)
    lengths_B = lengths_B if hidden is None else hidden.lengths
    rows_BK, scores_BK = lengths_B.new_zeros(len(states_BE), k), states_BE.new_zeros(len(states_BE), k)
    n_B = (2 ** (k + MARGIN + lengths_B).double().log2().ceil()).long().clamp(max=items).masked_fill(lengths_B > LONG, 0)
    for n in sorted(set(n_B.tolist()) - {0}):
        for chunk in torch.split((n_B == n).nonzero().flatten(), QUERIES):
            part = None if hidden is None else _take(hidden, chunk)
            rows_BK[chunk], scores_BK[chunk] = _search(searcher, scan, states_BE[chunk], part, k, n, allowed_V)
    for one in (n_B == 0).nonzero():
        assert hidden is not None  # else no history is long
        unseen_V = allowed_lines(items, _take(hidden, one).values, None, allowed_V)
        rows_BK[one], scores_BK[one] = find(searcher, scan, states_BE[one], k, None, unseen_V)
    return rows_BK, scores_BK


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
        settled_B = ~found_BN[:, -1] | (rough_BN[:, -1] < kth_B - rounding_B) | (n == len(scan.vectors_VE))
    else:
        wanted_BN = keep_BN & (places_BN <= k + MARGIN)
        settled_B = found_BN[:, -1]  # else few are allowed where the index looked, and better ones may be elsewhere
    most = int(wanted_BN.sum(1).max())
    first_BC = wanted_BN.byte().sort(dim=1, descending=True, stable=True).indices[:, :most]
    lines_BC, wanted_BC = lines_BN.gather(1, first_BC), wanted_BN.gather(1, first_BC)
    scores_BC = _score(states_BE, scan.vectors_VE[lines_BC.clamp(min=0)]).masked_fill(~wanted_BC, -torch.inf)
    rows_BK, scores_BK = best(lines_BC + FIRST_ITEM, scores_BC, k)
    rest = (~settled_B).nonzero().flatten()
    if len(rest):
        again, more = (searcher, min(2 * n, len(scan.vectors_VE))) if searcher.exact else (scan, n)
        part = None if hidden is None else _take(hidden, rest)
        rows_BK[rest], scores_BK[rest] = _search(again, scan, states_BE[rest], part, k, more, allowed_V)
    return rows_BK, scores_BK


def _placed(rows_BN: Tensor, scores_BN: Tensor, row_B1: Tensor, score_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates with an item among them, in the place of the last where it was not: rows, scores, and its place B × 1."""
    hit_BN = rows_BN == row_B1
    place_B1 = torch.where(hit_BN.any(1), hit_BN.byte().argmax(1), hit_BN.shape[1] - 1)[:, None]
    return rows_BN.scatter(1, place_B1, row_B1), scores_BN.scatter(1, place_B1, score_B1), place_B1


def _score(states_BE: Tensor, vectors_BCE: Tensor) -> Tensor:
    """Inner products in float64, rounded to float32: the same for a pair in any company."""
    return (states_BE.double()[:, None] * vectors_BCE.double()).sum(2).float()


def _take(histories: Batch, chosen: Tensor) -> Batch:
    return gather(histories.values, histories.times, histories.offsets[chosen], histories.offsets[chosen + 1])


def _leave(manifest: Mapping[str, Any], settings: DepthSettings) -> list[float]:
    """When histories leave the model early, so that they cost at most depth.blocks on average: the best measured way.

    Raises SetupError: the model was not trained for it.
    """
    if not settings.blocks:
        return []
    curve = [line for line in manifest.get("depth_curve", ()) if line["blocks"] <= settings.blocks]
    if not curve:
        raise SetupError(
            "depth.blocks is set, and the model has no measured exits; train with model.early_exit=true and a validation split"
        )
    return list(max(curve, key=lambda line: float(line["blocks"]))["leave"])


def read_vectors(path: Path) -> Tensor:
    """Placed item vectors of a bundle, shape items × E."""
    from safetensors.torch import load_file

    return load_file(path / VECTORS)["vectors"]
