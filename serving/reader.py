"""Histories to states by ONNX Runtime, and candidates to ranks; what was read of a history before is kept and not read again.

B histories · T padded positions, P of which are known from before · Q = T - P · E width · S events that a ranker looks at
N candidates
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys.attention import TIME_BUCKETS, UNSEEN, time_bucket
from recsys.batch import FIRST_ITEM, PADDING, UNKNOWN, Batch
from recsys.bundle import Writer
from recsys.errors import BundleError, SetupError
from recsys.model import SequenceModel
from recsys.ranker import Known, Look, Ranker
from serving.graph import model_graph, ranker_graph
from serving.ranking import rank

MODEL_GRAPH = "model.onnx"
POSITIONS = 16
"""Histories are padded to a multiple of this, and known from before up to one: then kernels give a position the same bits in
any company. A product with a single line takes another kernel."""
KEPT_BYTES = 256 * 2**20
"""What is kept of histories that were read."""
EQUAL = 1e-5
"""Of the largest number: how far a graph may be from torch."""
SHAPES, SHORT = 256, 512
"""Pairs of P and T whose masks are kept, and their largest T: a mask of so many queries is 1 MB."""
ROWS = 65_536
"""Items whose part of an event is made at once."""

Array = np.ndarray[Any, Any]


def ranker_file(depth: int) -> str:
    """The graph of so many blocks of the ranker."""
    return f"ranker_{depth}.onnx"


def tail(span: int) -> int:
    """Last positions whose states are wanted for a look at `span` events behind any of the last POSITIONS."""
    return POSITIONS + -(-span // POSITIONS) * POSITIONS


def session(path: Path) -> Any:
    """A graph on one thread. Raises SetupError: ONNX Runtime does not load."""
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise SetupError(f"onnxruntime does not load ({error}); run `recsys doctor`") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Seen:
    """What one or several histories of the same padded length are to the model; oldest event first."""

    rows_BT: Array
    """Item rows, int64, PADDING behind the last."""
    times_BT: Array
    """Seconds, int64."""
    asked_BT: Array
    """When each state is asked for."""
    lengths_B: Array

    def __len__(self) -> int:
        return len(self.rows_BT)


class Kept:
    """The least recently used goes when there are more bytes than allowed; safe to share between threads."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._entries: OrderedDict[bytes, tuple[tuple[Array, ...], int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> tuple[Array, ...] | None:
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                return None
            self._entries.move_to_end(key)
            return found[0]

    def put(self, key: bytes, arrays: tuple[Array, ...]) -> None:
        size = sum(array.nbytes for array in arrays) + 200
        with self._lock:
            if key in self._entries or size > self.limit:
                return
            self._entries[key] = arrays, size
            self.bytes += size
            while self.bytes > self.limit:
                self.bytes -= self._entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.bytes = 0


class GraphReader:
    """The sequence model on one core, by its graph."""

    def __init__(self, model: SequenceModel, graph: Path, span: int) -> None:
        settings = model.settings
        self.settings, self.span = settings, span
        self.causal = settings.objective == "causal"
        self._session = session(graph)
        self._inputs = [given.name for given in self._session.get_inputs()]
        self._past = [name for name in self._inputs if name.startswith(("keys_", "values_"))]
        self._made = [f"all_{name}" for name in self._past]
        self._heads, self._width = settings.heads, settings.embedding_size // settings.heads
        self._events, self._scale = _event_parts(model), np.float32(settings.embedding_size**0.5)
        self._last_row = len(self._events) - 1
        self._unknown = model.fusion is None
        self._places, self._gaps, self._asked_gaps = (
            None if part is None else part.detach().numpy() for part in (model.positions, model.gaps, model.asked_gaps)
        )
        self._attention = next(model.in_turn()).attention
        self._text = _Text(model) if "tokens" in self._inputs else None
        self._shapes: dict[tuple[int, int], dict[str, Array]] = {}
        self.kept = Kept(KEPT_BYTES)

    def read(self, seen: Seen, span: int) -> tuple[Array, Look | None]:
        """Placed states behind the last events, shape B × E, and what a ranker looks at, where `span` is not 0."""
        states_BRE, placed_BRE = self._run(seen, 0, None, "states", "placed")
        own_B = seen.lengths_B - 1 - seen.rows_BT.shape[1] + states_BRE.shape[1]
        placed_BE = placed_BRE[np.arange(len(own_B)), own_B]
        if not span:
            return placed_BE, None
        at_BS = own_B[:, None] - np.arange(self.span)
        states_BSE = states_BRE[np.arange(len(own_B))[:, None], at_BS.clip(0)]
        states_BSE[at_BS < 0] = 0
        return placed_BE, self._look(seen, states_BSE)

    def read_one(self, seen: Seen, span: int) -> tuple[Array, Look | None]:
        """The same for one history, of which all is used that was read of it before."""
        whole = b"whole" + self._key(seen, int(seen.lengths_B[0]))
        found = self.kept.get(whole)
        if found is None:
            found = self._extended(seen)
            self.kept.put(whole, found)
        return found[0], self._look(seen, found[1]) if span else None

    def _extended(self, seen: Seen) -> tuple[Array, ...]:
        """The placed state and, for a ranker, the states of the last events, the last one first."""
        length, positions = int(seen.lengths_B[0]), seen.rows_BT.shape[1]
        whole = (length - 1) // POSITIONS * POSITIONS if self.causal else 0
        before, start = None, whole
        while start and before is None:
            before = self.kept.get(self._key(seen, start))
            start -= POSITIONS * (before is None)
        keeps = whole > start
        wanted = ["placed", *(["states"] if self.span else []), *(self._made if keeps else [])]
        placed_BRE, *made = self._run(seen, start, None if before is None else before[1:], *wanted)
        own = length - 1 - positions + placed_BRE.shape[1]
        placed_1E = placed_BRE[:, own].copy()
        states_RE = placed_BRE[0, :0]
        if self.span:
            states_RE = made.pop(0)[0] if before is None else np.concatenate([before[0], made.pop(0)[0]])
        if keeps:
            end = whole - positions + len(states_RE)
            behind = states_RE[max(0, end - self.span) : max(0, end)].copy()
            self.kept.put(self._key(seen, whole), (behind, *(part[:, :, :whole].copy() for part in made)))
        if not self.span:
            return (placed_1E,)
        return placed_1E, _back(states_RE, length - 1 - positions + len(states_RE), self.span)[None]

    def _look(self, seen: Seen, states_BSE: Array) -> Look:
        lines_B = np.arange(len(seen))
        places_BS = seen.lengths_B[:, None] - 1 - np.arange(self.span)
        where = lines_B[:, None], places_BS.clip(0)
        rows_BS = np.where(places_BS >= 0, seen.rows_BT[where], PADDING)
        asked_B = seen.asked_BT[lines_B, seen.lengths_B - 1]
        ages_BS = buckets(asked_B[:, None] - seen.times_BT[where])
        return Look(torch.from_numpy(states_BSE), torch.from_numpy(rows_BS), torch.from_numpy(ages_BS))

    def _key(self, seen: Seen, events: int) -> bytes:
        """Of the first so many events of one history: all that their keys and values, or the state, were made of."""
        key = blake2b(seen.rows_BT[0, :events].tobytes(), digest_size=16)  # nobody can make two histories share one
        key.update(seen.times_BT[0, :events].tobytes())
        key.update(seen.asked_BT[0, :events].tobytes())
        return key.digest()

    def _run(self, seen: Seen, start: int, past: tuple[Array, ...] | None, *wanted: str) -> list[Array]:
        """Outputs of the graph, which reads from `start` on; keys and values of what is before are given."""
        batch, positions = seen.rows_BT.shape
        if past is None:
            past = (np.zeros((batch, self._heads, 0, self._width), np.float32),) * len(self._past)
        feed = {"x": self._embedded(seen, start), **dict(zip(self._past, past, strict=True)), **self._shape(start, positions)}
        if not self.causal:
            hidden_BT = np.arange(positions) >= seen.lengths_B[:, None]
            feed["mask"] = feed["mask"] + np.float32(UNSEEN) * hidden_BT[:, None, None]
        if "buckets" in self._inputs:
            feed["buckets"] = buckets(seen.asked_BT[:, start:, None] - seen.times_BT[:, None])
        if self._text is not None:
            feed.update(self._text.window(seen.rows_BT, start))
        outputs: list[Array] = self._session.run(wanted, feed)
        return outputs

    def _embedded(self, seen: Seen, start: int) -> Array:
        """As SequenceModel._embed, from `start` on, shape B × Q × E."""
        rows_BQ, at_Q = seen.rows_BT[:, start:], np.arange(start, seen.rows_BT.shape[1])
        rows_BQ = np.where(rows_BQ > self._last_row, UNKNOWN, rows_BQ) if self._unknown else np.minimum(rows_BQ, self._last_row)
        x_BQE: Array = self._events.take(rows_BQ, axis=0)
        x_BQE *= self._scale
        if self._places is not None:
            x_BQE += self._places.take(np.minimum(at_Q, len(self._places) - 1), axis=0)
        if self._gaps is not None:
            gaps_BQ = buckets(np.diff(seen.times_BT, axis=1, prepend=seen.times_BT[:, :1])[:, start:])
            x_BQE += self._gaps.take(np.where(at_Q > 0, gaps_BQ, TIME_BUCKETS), axis=0)
        if self._asked_gaps is not None:
            x_BQE += self._asked_gaps.take(buckets(seen.asked_BT[:, start:] - seen.times_BT[:, start:]), axis=0)
        return x_BQE

    def _shape(self, start: int, positions: int) -> dict[str, Array]:
        """What the graph needs to know of where positions stand; of short histories it is kept."""
        found = self._shapes.get((start, positions))
        if found is None:
            found = self._shaped(start, positions)
            if positions <= SHORT:
                if len(self._shapes) >= SHAPES:
                    self._shapes.clear()
                self._shapes[start, positions] = found
        return found

    def _shaped(self, start: int, positions: int) -> dict[str, Array]:
        queries, keys = torch.arange(start, positions), torch.arange(positions)
        attention, length = self._attention, self.settings.length - 1
        seen = attention.sees(queries[:, None], keys)
        found = {"mask": torch.where(seen, 0.0, UNSEEN)[None, None]}
        if "far" in self._inputs:
            far = queries[:, None] - keys
            found["far"] = far.clamp(0, length) if self.causal else far.clamp(-length, length) + length
        if "cos" in self._inputs:
            found["cos"], found["sin"] = attention.turns(queries, self._width)
        return {name: value.contiguous().numpy() for name, value in found.items()}


class _Text:
    """What states attend to: tokens of the last items."""

    def __init__(self, model: SequenceModel) -> None:
        assert model.text_attention is not None and model.content is not None
        self.span, self.tokens_RL = model.settings.text_span, model.content.tokens_RL.numpy()
        projected = model.text_attention.project(model.content.states_WP).transpose(1, 2).flatten(2)
        self.tables = dict(zip(("text_keys", "text_values"), (part.contiguous().numpy() for part in projected), strict=True))

    def window(self, rows_BT: Array, start: int) -> dict[str, Array]:
        """The tokens that positions from `start` on may see, the earliest item first."""
        rows_BT = np.where(rows_BT < len(self.tokens_RL), rows_BT, UNKNOWN)
        padded = np.pad(rows_BT, ((0, 0), (self.span - 1, 0)))
        windows_BQU = np.lib.stride_tricks.sliding_window_view(padded, self.span, 1)[:, start:]
        tokens_BQM = self.tokens_RL.take(windows_BQU, axis=0).reshape(*windows_BQU.shape[:2], -1).astype(np.int64)
        some = tokens_BQM > 0
        return {
            "tokens": tokens_BQM,
            "dark": np.where(some, np.float32(0), np.float32(UNSEEN)),
            "lit": some.any(2, keepdims=True).astype(np.float32),
            **self.tables,
        }


class GraphRanker:
    """The ranker on one core, by the graph of so many blocks."""

    def __init__(self, ranker: Ranker, known: Known, graph: Path) -> None:
        self.settings = ranker.settings
        self._session = session(graph)
        self._inputs = {given.name for given in self._session.get_inputs()}
        self._vectors = known.vectors_VE.numpy()
        self._logs = known.logs_V.numpy()
        self._spread = [float(figure) for figure in known.spread]
        self._ids = None if ranker.table is None else ranker.table.weight.detach().numpy()
        self._companions = [getattr(ranker, name).numpy() for name in ("rows_RK", "cosines_RK")]
        self._tokens: Array | None = None
        self._tables: dict[str, Array] = {}
        if ranker.token_in is not None and known.content is not None:
            self._tokens = known.content.tokens_RL.numpy()
            projected = ranker.token_in(known.content.states_WP.to(ranker.token_in.weight.dtype)).detach().chunk(2, -1)
            names = ("text_keys", "text_values")
            self._tables = dict(zip(names, (part.contiguous().numpy() for part in projected), strict=True))
        self._local = threading.local()

    def rank(self, rows_BN: Array, scores_BN: Array, look: Look) -> Array:
        """As serving.ranking.rank, shape B × N."""
        none_BN = rows_BN == PADDING
        ranks_BN = _ranks(scores_BN)
        if none_BN.any():
            lowest_B1 = np.where(none_BN, np.inf, scores_BN).min(1, keepdims=True)
            scores_BN = np.where(none_BN, np.where(lowest_B1 < np.inf, lowest_B1, 0), scores_BN).astype(np.float32)
        states_BSE, events_BS = look.states_BSE.numpy(), look.rows_BS.numpy()
        popularity_BN = (self._logs.take((rows_BN - FIRST_ITEM).clip(0, len(self._logs) - 1)) - self._spread[0]) / self._spread[
            1
        ]
        below_BN = scores_BN - scores_BN.max(1, keepdims=True)
        feed: dict[str, Array] = {
            "vectors": self._vectors_of(rows_BN),
            "evidence": np.stack([below_BN, np.log(ranks_BN.astype(np.float32)), popularity_BN], 2, dtype=np.float32),
            "scores": scores_BN,
            "states": states_BSE,
            "event_vectors": self._vectors_of(events_BS),
            "some": (events_BS != PADDING).astype(np.float32),
        }
        if "ages" in self._inputs:
            feed["ages"] = look.ages_BS.numpy()
        if "hidden" in self._inputs:
            feed["hidden"] = np.where(rows_BN == PADDING, np.float32(UNSEEN), np.float32(0))
        if self._ids is not None:
            feed["ids"], feed["event_ids"] = self._ids_of(rows_BN), self._ids_of(events_BS)
        if "near" in self._inputs:
            feed["near"] = self._near(rows_BN, events_BS)
        if self._tokens is not None:
            known_BN = np.where(rows_BN < len(self._tokens), rows_BN, UNKNOWN)
            feed["tokens"] = self._tokens.take(known_BN, axis=0).astype(np.int64)
            feed.update(self._tables)
        out_BN: Array = self._session.run(["ranked"], feed)[0]
        out_BN[none_BN] = -np.inf
        return out_BN

    def _vectors_of(self, rows: Array) -> Array:
        lines = rows - FIRST_ITEM
        none = (lines < 0) | (lines >= len(self._vectors))
        found: Array = self._vectors.take(lines, axis=0, mode="clip")
        if none.any():
            found[none] = 0
        return found

    def _ids_of(self, rows: Array) -> Array:
        assert self._ids is not None
        learnt = (rows >= FIRST_ITEM) & (rows < len(self._ids))
        found: Array = self._ids.take(np.where(learnt, rows, PADDING), axis=0)
        found[~learnt] = 0
        return found

    def _near(self, rows_BN: Array, events_BS: Array) -> Array:
        """As Ranker.near, shape B × N × S."""
        companions, cosines = self._companions
        known_BS = np.where(events_BS < len(companions), events_BS, PADDING)
        near_BSK = companions.take(known_BS, axis=0)
        slots = getattr(self._local, "slots", None)
        if slots is None:  # one for each thread: which place a row has among the candidates
            slots = self._local.slots = np.full(FIRST_ITEM + max(len(self._vectors), len(companions)), -1, np.int32)
        places_BSK, places_N = np.empty(near_BSK.shape, np.int32), np.arange(rows_BN.shape[1], dtype=np.int32)
        for line, rows_N in enumerate(rows_BN):
            slots[rows_N] = places_N
            slots[PADDING] = -1
            slots.take(near_BSK[line], out=places_BSK[line])
            slots[rows_N] = -1
        owners, events, columns = np.nonzero(places_BSK >= 0)
        near_BNS = np.zeros((*rows_BN.shape, events_BS.shape[1]), np.float32)
        found = np.sqrt(cosines[known_BS[owners, events], columns].clip(0))
        near_BNS[owners, places_BSK[owners, events, columns], events] = found
        return near_BNS


def _ranks(scores_BN: Array) -> Array:
    """Ranks from 1: how many score more, and one."""
    if (scores_BN[:, 1:] > scores_BN[:, :-1]).any():
        return np.stack([1 + np.sort(line).searchsorted(line) for line in -scores_BN])
    ranks_BN = np.broadcast_to(np.arange(1, 1 + scores_BN.shape[1]), scores_BN.shape).copy()
    ranks_BN[:, 1:][scores_BN[:, 1:] == scores_BN[:, :-1]] = 1  # in order: what scores as the one before has its rank
    return np.maximum.accumulate(ranks_BN, 1)


def _event_parts(model: SequenceModel) -> Array:
    """What an event's item is to the model, by row; the last row stands for those behind it."""
    if model.fusion is None or model.content is None:
        return model.table.weight.detach().numpy()
    rows = torch.arange(1 + FIRST_ITEM + max(model.items, model.content.items))
    return torch.cat([model.fused(part, None) for part in torch.split(rows, ROWS)]).numpy()


def _back(states_RE: Array, own: int, span: int) -> Array:
    """The last `span` states up to one, the last first; 0 where there are fewer."""
    found: Array = states_RE[max(0, own + 1 - span) : own + 1][::-1]
    if len(found) == span:
        return found.copy()
    return np.concatenate([found, np.zeros((span - len(found), states_RE.shape[1]), np.float32)])


def buckets(seconds: Array) -> Array:
    """As recsys.attention.time_bucket, of integers."""
    return np.searchsorted(_thresholds(), seconds, side="right")


@lru_cache(1)
def _thresholds() -> Array:
    """The least number of seconds of each bucket but the first."""
    wanted = torch.arange(1, TIME_BUCKETS)
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 2**33)
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        there = time_bucket(middle) >= wanted
        low, high = torch.where(there, low, middle), torch.where(there, middle, high)
    return high.numpy()


def asked_at(model: SequenceModel, times_BT: Array, lengths_B: Array, now_B: Array | None) -> Array:
    """When each state is asked for: at its own event, or where the model reads requests at the next one or at `now`."""
    if not model.settings.request_time or model.settings.objective == "masked" or now_B is None:
        return times_BT
    asked_BT = np.roll(times_BT, -1, 1)
    asked_BT[np.arange(len(times_BT)), lengths_B - 1] = now_B
    return asked_BT


def graphs(model: SequenceModel, ranker: Ranker | None, known: Known) -> dict[str, Writer]:
    """What writes the graphs of a bundle, by file; each is compared with torch before it counts as written.

    Raises BundleError: they differ.
    """
    span = 0 if ranker is None else ranker.settings.span

    def write_model(path: Path) -> None:
        path.write_bytes(model_graph(model, tail(span)).SerializeToString())
        _compare(path, *_both_states(model, path, span))

    def write_ranker(depth: int, path: Path) -> None:
        assert ranker is not None
        path.write_bytes(ranker_graph(ranker, depth).SerializeToString())
        _compare(path, *_both_scores(ranker, depth, known, path))

    depths = range(1, 1 + (0 if ranker is None else ranker.settings.blocks))
    return {MODEL_GRAPH: write_model, **{ranker_file(depth): partial(write_ranker, depth) for depth in depths}}


def _compare(path: Path, ours: Array, wanted: Array) -> None:
    apart = float(np.abs(ours - wanted).max() / max(1.0, np.abs(wanted).max()))
    if not apart <= EQUAL:
        raise BundleError(
            f"{path.name}: the graph differs from torch by {apart:.1e}, more than {EQUAL:.0e}; report it with the recipe"
        )


@torch.inference_mode()
def _both_states(model: SequenceModel, path: Path, span: int) -> tuple[Array, Array]:
    """Of made-up histories of several lengths, by the graph and by torch."""
    draw, reader = torch.Generator().manual_seed(0), GraphReader(model, path, span)
    ours, wanted = [], []
    for length in sorted({min(length, model.readable_events) for length in (1, 2, 15, 31, model.readable_events)}):
        rows = torch.randint(UNKNOWN, FIRST_ITEM + model.items, (2, length), generator=draw)
        times = torch.randint(0, 10**9, (2, length), generator=draw).sort(1).values
        now_B = times[:, -1] + torch.tensor([0, 86_400])
        batch = Batch.of(rows.tolist(), times.tolist())
        x_BTE, view = model.read(batch, now_B, positions=-(-(length + 1) // POSITIONS) * POSITIONS)
        last = torch.arange(2), view.lengths_B - 1
        wanted.append(model.place(x_BTE[last]))
        seen = Seen(*(part.numpy() for part in (view.rows_BT, view.times_BT, view.asked_BT, view.lengths_B)))
        ours.append(reader.read(seen, 0)[0])
    return np.concatenate(ours), torch.cat(wanted).numpy()


@torch.inference_mode()
def _both_scores(ranker: Ranker, depth: int, known: Known, path: Path) -> tuple[Array, Array]:
    """Of made-up candidates and looks, one of them without events."""
    draw, span = torch.Generator().manual_seed(0), ranker.settings.span
    items, size = len(known.vectors_VE), known.vectors_VE.shape[1]
    count = min(2 * POSITIONS, items)
    rows_BN = torch.stack([torch.randperm(items, generator=draw)[:count] for _ in range(3)]) + FIRST_ITEM
    scores_BN = torch.randn(3, count, generator=draw).sort(1, descending=True).values
    events_BS = torch.randint(FIRST_ITEM, FIRST_ITEM + items, (3, span), generator=draw)
    events_BS[1, 3:], events_BS[2] = PADDING, PADDING
    ages_BS = torch.randint(0, TIME_BUCKETS, (3, span), generator=draw)
    look = Look(torch.randn(3, span, size, generator=draw), events_BS, ages_BS)
    wanted_BN = rank(ranker, depth, known, rows_BN, scores_BN, look)
    return GraphRanker(ranker, known, path).rank(rows_BN.numpy(), scores_BN.numpy(), look), wanted_BN.numpy()
