"""Recommendations from a run or a bundle: history → state → candidates → filters → exact scores → ranker → list.

Parity: a history's list is the same alone, in any batch, online and at night, bit for bit. Four things make it so.
*Encoding*: serving/states.py says how; *search* and *scores*: serving/retrieval.py.
*Ranking*: candidates and looked-at events are padded to multiples of 16 as well, whatever the history, and sums over a width
that end in one number are no matrix products.
A bundle is read by its graphs on the CPU, and by torch on a GPU or where a history may leave the model early.

B histories · E width · V items · N candidates · C given items · k places of a list
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys.batch import FIRST_ITEM, PADDING, UNKNOWN, Batch
from recsys.bundle import MANIFEST, Directory, model_of, open_directory
from recsys.content import ENCODER, ContentEncoder
from recsys.errors import BundleError, RequestError, SetupError
from recsys.model import model_from
from recsys.ranker import Known, Look, ranker_from
from serving.calibration import Calibration
from serving.catalogue import ITEMS, Catalogue, Find
from serving.directions import Directions
from serving.filters import allowed_lines, until
from serving.index import INDEX, Index, IndexSettings, Scan, Searcher
from serving.lists import Array, Lists, ordered
from serving.popularity import Popularity
from serving.ranking import ServingSettings, candidates, chosen_blocks, listed, of_rows, rank
from serving.reader import MODEL_GRAPH, GraphRanker, GraphReader, ranker_file
from serving.retrieval import QUERIES, find, find_one, products, taken
from serving.states import DepthSettings, leave_of, read_by_graph, read_by_torch, seen_of
from serving.vectors import LONGEST, VECTORS, item_vectors, read_vectors


class Recommender:
    """A loaded run or bundle; safe to share between threads."""

    def __init__(self, directory: Directory, device: str = "cpu", *, threads: int | None = None) -> None:
        self.manifest, self.path = directory.manifest, directory.path
        self.catalogue = Catalogue(directory.path / ITEMS)
        self.model = model_from(directory, device).eval().requires_grad_(False)
        self.leave = leave_of(self.manifest, DepthSettings(**self.manifest["recipe"].get(DepthSettings.section, {})))
        bundle = self.manifest["kind"] == "bundle"
        vectors_VE = read_vectors(directory.path).to(device) if VECTORS in self.manifest["files"] else item_vectors(self.model)
        if len(vectors_VE) != self.model.lines:
            raise BundleError(
                f"{directory.path}: {len(vectors_VE)} item vectors, the model knows {self.model.lines} items; export it again"
            )
        self.scan = Scan(vectors_VE, self.manifest.get(LONGEST))
        self.popularity = Popularity(self.catalogue.events[: self.lines])
        self.ranker = ranker_from(directory, self.model, device)
        if self.ranker is not None:
            self.ranker.eval().requires_grad_(False)
        self.known = Known(
            vectors_VE, self.catalogue.events[: self.lines].log1p().to(device), self.model.items, self.model.content
        )
        self._listed_by = Known(vectors_VE.cpu(), self.known.logs_V.cpu(), self.model.items)  # what is found is on the CPU
        self.serving = ServingSettings(**self.manifest["recipe"].get(ServingSettings.section, {}))
        self.ranker_blocks = chosen_blocks(self.serving, self.ranker, self.manifest)
        self.calibration = Calibration.read(self.manifest.get("calibration"))
        self.reader: GraphReader | None = None
        self._graph_rankers: dict[int, GraphRanker] = {}
        if bundle and device == "cpu":
            self.reader = GraphReader(self.model, directory.path / MODEL_GRAPH, self.ranker.settings.span if self.ranker else 0)
            if self.ranker is not None:
                for depth in range(1, 1 + self.ranker.settings.blocks):
                    self._graph_rankers[depth] = GraphRanker(self.ranker, self.known, directory.path / ranker_file(depth))
        content = self.model.content
        self._some_R = None if content is None else content.some_R.cpu().numpy()
        live_V = ~self.catalogue.removed[: self.lines]
        if content is not None:
            live_V &= self.model.known_V.cpu()
        self.live_V = None if bool(live_V.all()) else live_V
        self.searcher: Searcher = self.scan
        if bundle:
            settings = IndexSettings(**self.manifest["recipe"][IndexSettings.section])
            kind, (items, width) = self.manifest["index"]["kind"], vectors_VE.shape
            self.searcher = Index.load(directory.path / INDEX, kind, settings, (items, width), threads, mapped=True)

    @classmethod
    def load(cls, path: Path, verify: bool = True, device: str = "cpu", *, threads: int | None = None) -> Recommender:
        """Load a run, a model directory or a bundle.

        `threads` is how many FAISS takes for a search (default: its own). Raises BundleError: not whole, altered, or of
        another format.
        """
        directory = open_directory(model_of(path), verify)
        kind = directory.manifest.get("kind")
        if kind not in ("model", "bundle"):
            raise BundleError(
                f"{directory.path / MANIFEST}: holds neither a model nor a bundle but {kind!r}; give a run or a bundle"
            )
        return cls(directory, device, threads=threads)

    def complete(self) -> Recommender:
        """Itself, with all read from its files that is else read when it is first asked for: they may be replaced now."""
        with suppress(SetupError):  # without its encoder a bundle recommends, and does not explain words
            _ = self.encoder
        return self

    @cached_property
    def encoder(self) -> ContentEncoder | None:
        """Of the items' texts; None where the model reads none."""
        return ContentEncoder.load(self.path / ENCODER) if ENCODER in self.manifest["files"] else None

    def forget(self) -> None:
        """Keep nothing of the histories that were read."""
        if self.reader is not None:
            self.reader.kept.clear()

    def with_exact_search(self) -> Recommender:
        """The same without its index."""
        return self._altered(searcher=self.scan)

    def with_ranker(self, blocks: int) -> Recommender:
        """The same with so many blocks of its ranker; with 0, lists are in the order of retrieval."""
        return self._altered(ranker_blocks=blocks)

    def in_plain_order(self) -> Recommender:
        """The same without diversity and without less popularity."""
        return self._altered(serving=replace(self.serving, diversity=0.0, popularity=0.0))

    def with_profile(self, serving: ServingSettings, depth: DepthSettings, index: IndexSettings) -> Recommender:
        """The same at another cost; of the index, only how much it searches. Raises SetupError: as depth.blocks."""
        blocks = chosen_blocks(serving, self.ranker, self.manifest)
        searcher = self.searcher.searching(index) if isinstance(self.searcher, Index) else self.searcher
        return self._altered(serving=serving, leave=leave_of(self.manifest, depth), ranker_blocks=blocks, searcher=searcher)

    def _altered(self, **attributes: Any) -> Recommender:
        other = copy.copy(self)
        vars(other).update(attributes)
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
    def learnt(self) -> int:
        """Items with training events: the first lines."""
        return self.model.items

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
        deny: Collection[int] = (),
        allow: Iterable[int] | None = None,
        where: Mapping[str, Any] | None = None,
        diversity: float | None = None,
        popularity: float | None = None,
        probabilities: bool = False,
        took: dict[str, float] | None = None,
    ) -> Lists:
        """The k best items for each history of item rows; fewer only where fewer are allowed.

        `now` is when they are asked for, in seconds since 1970, for all or for each: later events are left out, and a model
        that reads the time of requests needs it. `deny` and `allow` are item rows, `where` conditions that items must meet, as
        serving.filters.Attributes has them, `diversity` and `popularity` those of ServingSettings (default: the bundle's).
        With `probabilities` the lists hold them: how probable an item is the next one of all, where no filter is given.
        To `took` the seconds of each stage are added: encode, retrieve, rank, list.
        Raises RequestError: k below 1, a diversity or popularity that is none, probabilities of a bundle without a calibration,
        no `now` where the model reads it, or a condition that cannot be.
        """
        if k < 1:
            raise RequestError(f"k is {k}; ask for at least 1 item")
        serving = self.serving.asked(diversity, popularity)
        if probabilities and self.calibration is None:
            raise RequestError("scores of this bundle are not calibrated; export it with --dataset, or ask for scores alone")
        clock = Clock(took)
        histories, now = self._as_of(histories, now)
        allowed_V = self.allowed(deny, allow, where)
        popular_B = ~self._known(histories)
        named = candidates(serving, self.ranker, self.ranker_blocks, k, beside=probabilities)
        states_BE, look = self._read(histories, now)
        clock.lap("encode")
        rows_BK, scores_BK = torch.zeros(len(histories), k, dtype=torch.int64), torch.zeros(len(histories), k)
        chances_BK = torch.zeros_like(scores_BK) if probabilities else None
        for popular in {*popular_B.tolist()}:
            chosen = torch.from_numpy(np.flatnonzero(popular_B == popular))
            every = len(chosen) == len(histories)
            hidden = (histories if every else taken(histories, chosen)) if filter_seen else None
            if popular:
                for place in chosen.tolist():
                    seen = {*taken(histories, torch.tensor([place])).values.tolist()} if filter_seen else set()
                    best = self.popularity.best(k, seen, allowed_V)
                    rows_BK[place], scores_BK[place] = (torch.from_numpy(part) for part in best)
                continue
            own_BE, own = (states_BE, look) if every else (states_BE[chosen], look and look.take(chosen))
            rows_BN, scores_BN = find(self.searcher, self.scan, own_BE, named, hidden, allowed_V)
            clock.lap("retrieve")
            scores_BN = self._rank(rows_BN, scores_BN, own)
            clock.lap("rank")
            in_order = own is None and named == k  # retrieval's own order is the list's
            list_BK = (rows_BN, scores_BN) if in_order else listed(rows_BN, scores_BN, self._listed_by, serving, k)
            if probabilities and self.calibration is not None and chances_BK is not None:
                chances_BK[chosen] = of_rows(list_BK[0], rows_BN, self.calibration.probabilities(scores_BN), 0.0)
            if every:
                rows_BK, scores_BK = list_BK
            else:
                rows_BK[chosen], scores_BK[chosen] = list_BK
            clock.lap("list")
        return Lists(rows_BK, scores_BK, torch.from_numpy(popular_B), chances_BK, look is not None)

    def _one(
        self, history: Batch, now: int | None, k: int, filter_seen: bool, allowed_V: Tensor | None, clock: Clock
    ) -> tuple[Array, Array] | None:
        """Rows and scores that `recommend` has for one history in the order of scores, with less ado.

        None where it is for `recommend` to say: nothing is known of the history, or lists are not made by the graph alone.
        """
        serving, reader = self.serving, self.reader
        if reader is None or self.leave or serving.diversity or serving.popularity or (now is None and self.reads_now):
            return None
        values, times = history.values.numpy(), history.times.numpy()
        if now is not None and len(times) and times[-1] > now:
            there = times <= now
            values, times = values[there], times[there]
        last = values[-self.model.readable_events :]
        if not self.reads(last).any():
            return None
        at_1 = None if now is None else np.array([now])
        seen = seen_of(self.model, values, times, np.array([0]), np.array([len(values)]), at_1)
        placed_1E, look = reader.read_one(seen, self._span)
        clock.lap("encode")
        hidden = values - FIRST_ITEM if filter_seen else values[:0]
        named = candidates(serving, self.ranker, self.ranker_blocks, k)
        rows_N, scores_N = find_one(self.searcher, self.scan, placed_1E, named, hidden, allowed_V)
        clock.lap("retrieve")
        if look is not None:
            scores_N = self._graph_rankers[self.ranker_blocks].rank(rows_N[None], scores_N[None], look)[0]
            clock.lap("rank")
        if look is not None or named != k:
            (rows_N,), (scores_N,) = ordered(rows_N[None], scores_N[None], k)
        clock.lap("list")
        return rows_N, scores_N

    @property
    def _span(self) -> int:
        """Events that a ranker looks at; 0 where none is served."""
        return self.ranker.settings.span if self.ranker is not None and self.ranker_blocks else 0

    @torch.inference_mode()
    def similar(
        self,
        row: int,
        k: int,
        deny: Collection[int] = (),
        allow: Iterable[int] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> list[tuple[int, float]]:
        """The k items nearest to one by the cosine of their vectors, without itself: rows and cosines, nearest first.

        Raises RequestError: k below 1, an item without a vector, or a condition that cannot be.
        """
        line = row - FIRST_ITEM
        if k < 1:
            raise RequestError(f"k is {k}; ask for at least 1 item")
        if not 0 <= line < self.lines or not self.reads(np.array([row]))[0]:
            raise RequestError(f"the model knows nothing of item {self.catalogue.item_id(row)!r}, so nothing is like it")
        allowed_V = self.allowed([*deny, row], allow, where)
        ways = self.directions
        own_1E = torch.from_numpy(ways.at(np.array([line]))).to(ways.vectors_VE.device)
        rows_1K, cosines_1K = find(ways, ways, own_1E, k, None, allowed_V)
        found = zip(rows_1K[0].tolist(), cosines_1K[0].tolist(), strict=True)
        return [(near, cosine) for near, cosine in found if near != PADDING]

    @cached_property
    def directions(self) -> Scan:
        """Item vectors of length 1."""
        if self.model.settings.similarity == "cosine":
            return self.scan
        return Directions(self.scan.vectors_VE)

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
        rows_BC = rows_BC.cpu()
        lines_BC = rows_BC - FIRST_ITEM
        some_BC = (lines_BC >= 0) & (lines_BC < self.lines)
        vectors = self.scan.vectors[lines_BC.where(some_BC, 0).numpy()] if vectors_BCE is None else vectors_BCE.cpu().numpy()
        states_BE, look = self._read(histories, now)
        pairs = zip(states_BE.cpu().numpy(), np.broadcast_to(vectors, (len(states_BE), *vectors.shape[1:])), strict=True)
        scores_BC = torch.zeros(len(states_BE), rows_BC.shape[1])
        for line, (state_E, vectors_CE) in enumerate(pairs):
            scores_BC[line] = torch.from_numpy(products(state_E, vectors_CE))
        if look is not None:
            columns = zip(torch.split(rows_BC, 1, 1), torch.split(scores_BC, 1, 1), strict=True)
            beside = self._named(states_BE, histories)
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
        row_11 = torch.tensor([[row]])
        score_11 = torch.from_numpy(products(states_1E[0].cpu().numpy(), self.scan.vectors[row - FIRST_ITEM][None]))[None]
        rows_1N, scores_1N, place_11 = _placed(*self._named(states_1E, history), row_11, score_11)
        kept: list[Tensor] = []
        device = states_1E.device
        look = look.to(device)
        rank(self.ranker, self.ranker_blocks, self.known, rows_1N.to(device), scores_1N.to(device), look, kept)
        shares_S = torch.cat(kept)[:, :, place_11[0, 0]].mean((0, 1))
        events = len(self.model.readable(history).values)
        return pad(shares_S[:events].flip(0), (max(0, events - len(shares_S)), 0))

    def _named(self, states_BE: Tensor, histories: Batch) -> tuple[Tensor, Tensor]:
        """Rows and scores of the candidates of a request whose list is short."""
        named = candidates(self.serving, self.ranker, self.ranker_blocks, 1, beside=True)
        return find(self.searcher, self.scan, states_BE, named, histories, self.live_V)

    @torch.inference_mode()
    def candidates(self, histories: Batch, now: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows and scores of all that is ranked for each history, unseen and live; in the order of retrieval, shape B × N.

        `now` as in recommend.
        """
        histories, now = self._as_of(histories, now)
        states_BE, look = self._read(histories, now)
        rows_BN, scores_BN = self._named(states_BE, histories)
        return rows_BN, self._rank(rows_BN, scores_BN, look)

    def _rank(self, rows_BN: Tensor, scores_BN: Tensor, look: Look | None) -> Tensor:
        """The ranker's scores of candidates, or without a look those of retrieval; shape B × N, on the CPU."""
        if look is None or self.ranker is None or not len(rows_BN):
            return scores_BN
        graph, device = self._graph_rankers.get(self.ranker_blocks), self.scan.vectors_VE.device
        out = []
        for start in range(0, len(rows_BN), QUERIES):
            stop = min(start + QUERIES, len(rows_BN))
            part = rows_BN[start:stop], scores_BN[start:stop]
            own = look.take(slice(start, stop))
            if graph is None:
                rows, scores = (tensor.to(device) for tensor in part)
                out.append(rank(self.ranker, self.ranker_blocks, self.known, rows, scores, own.to(device)).cpu())
            else:
                out.append(torch.from_numpy(graph.rank(part[0].numpy(), part[1].numpy(), own)))
        return torch.cat(out) if len(out) != 1 else out[0]

    @torch.inference_mode()
    def encode(self, histories: Batch, now: Tensor | None = None) -> Tensor:
        """`model.encode`, such that a history's state does not depend on its batch; shape B × E."""
        return self._read(histories, now)[0]

    def _read(self, histories: Batch, now: Tensor | None) -> tuple[Tensor, Look | None]:
        """The states, and what a ranker looks at; None where none is served."""
        if self.reader is None or self.leave:
            return read_by_torch(self.model, histories, now, self._span, self.leave)
        return read_by_graph(self.model, self.reader, histories, now, self._span)

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
        took: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        """One list with ids and titles, ready for JSON: bundle, source, unknown (words that are no item), items.

        `history` holds ids or titles (`find`: one of them alone), `times` the second of each; `deny` and `allow` hold ids,
        `where`, `diversity`, `popularity`, `probabilities` and `took` are those of recommend. `now` is the clock's, where the
        model reads it and none is given.
        Raises RequestError: an unknown item, unless `ignore_unknown`; `now` without `times`; no times where the model reads
        them; as recommend.
        """
        if k < 1:
            raise RequestError(f"k is {k}; ask for at least 1 item")
        unknown: list[int | str] = []
        catalogue, ignored = self.catalogue, unknown if ignore_unknown else None
        batch, now = self.request(catalogue.rows(history, find or catalogue.by_either, ignored), times, now)
        denied, allowed = catalogue.denied_and_allowed(deny, allow, ignored)
        made = None
        if not (probabilities or diversity or popularity):
            made = self._one(batch, now, k, filter_seen, self.allowed(denied, allowed, where), Clock(took))
        source, chances = "ranked" if self._span else "retrieved", None
        if made is None:
            lists = self.recommend(
                batch, k, now, filter_seen, denied, allowed, where, diversity, popularity, probabilities, took
            )
            if lists.probabilities is not None and not bool(lists.popular[0]):
                chances = lists.probabilities[0].tolist()
            source, made = lists.sources[0], (lists.rows[0].numpy(), lists.scores[0].numpy())
        items = catalogue.places(zip(made[0].tolist(), made[1].tolist(), strict=True), chances)
        return {"bundle": self.id, "source": source, "unknown": unknown, "items": items}

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
        if times is not None and sorted(times) != list(times):
            raise RequestError("times descend; give events oldest first")
        if None in rows:
            kept = [place for place, row in enumerate(rows) if row is not None]
            rows, times = [rows[place] for place in kept], None if times is None else [times[place] for place in kept]
        values = np.array(rows, np.int64)
        at = np.zeros_like(values) if times is None else np.array(times, np.int64)
        batch = Batch(torch.from_numpy(values), torch.tensor([0, len(values)]), torch.from_numpy(at))
        return batch, int(time.time()) if now is None and self.reads_now else now

    def _as_of(self, histories: Batch, now: int | Tensor | None) -> tuple[Batch, Tensor | None]:
        """The histories without events later than `now`, and `now` of each."""
        if self.scan.vectors_VE.is_cuda:
            histories = histories.to(self.scan.vectors_VE.device)
        if now is not None:
            now = torch.as_tensor(now, device=histories.times.device).expand(len(histories))
            return until(histories, now), now
        if self.reads_now:
            raise RequestError("the model reads when it is asked; give now, in seconds since 1970")
        return histories, None

    def allowed(self, deny: Collection[int], allow: Iterable[int] | None, where: Mapping[str, Any] | None) -> Tensor | None:
        """Which items a request may have, shape V; None: all."""
        if not deny and allow is None and not where:
            return self.live_V
        meeting_V = self.catalogue.attributes.meeting(where) if where else None
        return allowed_lines(self.lines, deny, allow, self.live_V, None if meeting_V is None else meeting_V[: self.lines])

    def reads(self, rows: Array) -> Array:
        """Whether the model knows anything of item rows, as SequenceModel.reads; bool, same shape."""
        known: Array = (rows >= FIRST_ITEM) & (rows < FIRST_ITEM + self.model.ids)
        if self._some_R is not None:
            known |= self._some_R.take(np.where(rows < len(self._some_R), rows, UNKNOWN))
        return known

    def _known(self, histories: Batch) -> Array:
        """True where the events that the model reads hold an item that it knows; bool, shape B."""
        if len(histories) == 1:
            last = histories.values[-self.model.readable_events :].cpu().numpy()
            return np.array([self.reads(last).any()])
        read = self.model.readable(histories)
        known_N = self.reads(read.values.cpu().numpy())
        return np.bincount(read.owners.cpu().numpy()[known_N], minlength=len(read)) > 0


class Clock:
    """Adds the seconds since the last lap to a stage."""

    def __init__(self, took: dict[str, float] | None) -> None:
        self.took, self.at = took, time.perf_counter()

    def lap(self, stage: str) -> None:
        if self.took is not None:
            at = time.perf_counter()
            self.took[stage] = self.took.get(stage, 0.0) + at - self.at
            self.at = at


def _placed(rows_BN: Tensor, scores_BN: Tensor, row_B1: Tensor, score_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates with an item among them, in the place of the last where it was not: rows, scores, and its place B × 1."""
    hit_BN = rows_BN == row_B1
    place_B1 = torch.where(hit_BN.any(1), hit_BN.byte().argmax(1), hit_BN.shape[1] - 1)[:, None]
    return rows_BN.scatter(1, place_B1, row_B1), scores_BN.scatter(1, place_B1, score_B1), place_B1
