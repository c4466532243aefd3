"""Retrieval of the items with the largest inner product; the one door to FAISS.

B queries · E width · n candidates · V items, whose lines count from 0
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys.config import Settings
from recsys.errors import BundleError, SetupError
from serving.lists import Array
from serving.vectors import BLOCK

INDEX = "index.faiss"
POINTS = 39
"""Items that FAISS wants to see for each IVF list while it learns the lists."""
CODES = 256
"""Codes of a byte."""
LISTS = 8192
"""Most IVF lists: to learn them and to find the list of each of 10M items takes time that grows with items × lists."""
SAMPLED = 64
"""Items for each IVF list by which the lists are learnt, where there are more."""
GPU_CANDIDATES = 2048
"""Most candidates that a FAISS GPU index returns."""

INDEXES: dict[str, Callable[[int, int], str]] = {
    "exact": lambda items, width: "Flat",
    "ivf": lambda items, width: f"IVF{lists(items)},SQfp16",
    "ivf_sq8": lambda items, width: f"IVF{lists(items)},SQ8",
    "ivf_pq": lambda items, width: f"IVF{lists(items)},{codes(items, width)}",
    "hnsw": lambda items, width: "HNSW32,Flat",
}
"""FAISS factory strings by kind, items and width. 1M items of width 64 with default settings, k = 100: ivf recall .998, .5 ms,
137 MB; ivf_sq8 .986, .4 ms, 73 MB; hnsw .989, .9 ms, 528 MB; exact 1, 12 ms, 256 MB (one thread, Zen 4)."""
MARGINS = {"ivf_pq": 384}
"""Candidates beyond k that are scored exactly, by kind of index. They make up for the codes: of 1M clustered items ivf, ivf_sq8
and ivf_pq then find the same .9724 of the best 100, and with 128 ivf_pq finds .9711."""
MARGIN = 16
"""Of the other kinds, which round less."""


@dataclass(frozen=True)
class IndexSettings(Settings):
    """How the items of a bundle are searched."""

    section: ClassVar[str] = "index"

    kind: str = "auto"
    """exact, ivf, ivf_sq8, ivf_pq, hnsw, or auto: exact up to `exact_items`, ivf up to `ivf_items`, then ivf_pq."""
    exact_items: int = 200_000
    """Most items that auto searches exactly; an exact search takes about 1 ms for every 100,000 items of width 64."""
    ivf_items: int = 2_000_000
    """Most items for which auto takes ivf, at 138 bytes an item of width 64; ivf_pq takes 41."""
    probes: int = 128
    """Lists that ivf, ivf_sq8 and ivf_pq search for a query, of about 4 √items."""
    breadth: int = 400
    """Candidates that hnsw keeps while it walks its graph."""

    def __post_init__(self) -> None:
        self._one_of(("auto", *INDEXES), "kind")
        self._at_least(1, "probes", "breadth")
        self._at_least(0, "exact_items", "ivf_items")

    def chosen(self, items: int) -> str:
        """The kind for so many items."""
        if self.kind != "auto":
            return self.kind
        return "exact" if items <= self.exact_items else "ivf" if items <= self.ivf_items else "ivf_pq"


class Scan:
    """Exact search by one matrix product: for runs, for few allowed items, and where an index finds too few."""

    exact = True
    """Whether what is found is all there is, up to float32 rounding."""
    margin = MARGIN
    """Candidates beyond those that are wanted which are scored exactly, where it is not exact."""

    def __init__(self, vectors_VE: Tensor, longest: float | None = None) -> None:
        """`longest` is the length of the longest vector, where it is known."""
        self.vectors_VE = vectors_VE
        self.vectors: Array = vectors_VE.cpu().numpy()
        self._longest = longest
        self._own = threading.local()

    @cached_property
    def longest(self) -> float:
        """Length of the longest vector."""
        if self._longest is not None:
            return self._longest
        return max(float(part.norm(dim=1).max()) for part in torch.split(self.vectors_VE, BLOCK))

    def at(self, lines: Array) -> Array:
        """The vectors of lines, a further axis E."""
        return self.vectors.take(lines, axis=0)

    @property
    def marks(self) -> Array:
        """False for every item and behind the last, for whoever marks some and unmarks them again; each thread has its own."""
        found = getattr(self._own, "marks", None)
        if found is None:
            found = self._own.marks = np.zeros(len(self.vectors) + 1, bool)
        return found

    def search(self, states_BE: Tensor, n: int, allowed_V: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Lines (int64) and scores of the n best allowed items, best first, shape B × n; -1 and -inf where none is left."""
        vectors_VE, lines_V = self.vectors_VE, None
        if allowed_V is not None and 8 * np.count_nonzero(allowed_V.numpy()) < len(allowed_V):  # else reading all beats copying
            lines_V = torch.from_numpy(np.flatnonzero(allowed_V.numpy())).to(vectors_VE.device)
            vectors_VE, allowed_V = vectors_VE.index_select(0, lines_V), None
        scores_BV = self._scores(states_BE, vectors_VE, lines_V)
        if allowed_V is not None:  # added, which is 20 times faster than filling every line of scores
            scores_BV += torch.zeros(len(allowed_V)).masked_fill_(~allowed_V, -torch.inf).to(scores_BV.device)
        scores_BN, lines_BN = scores_BV.topk(min(n, len(vectors_VE)), dim=1)
        lines_BN = (lines_BN if lines_V is None else lines_V[lines_BN]).masked_fill(scores_BN == -torch.inf, -1)
        short = n - lines_BN.shape[1]
        return pad(lines_BN, (0, short), value=-1), pad(scores_BN, (0, short), value=-torch.inf)

    def _scores(self, states_BE: Tensor, vectors_VE: Tensor, lines_V: Tensor | None) -> Tensor:
        """Of vectors, which are those of `lines_V`, or all; shape B × V."""
        return states_BE @ vectors_VE.T

    def near(self, states_BE: Array, n: int) -> tuple[Array, Array]:
        """`search` of all items, of arrays."""
        lines_BN, scores_BN = self.search(torch.from_numpy(states_BE).to(self.vectors_VE.device), n)
        return lines_BN.cpu().numpy(), scores_BN.cpu().numpy()


class Index:
    """A FAISS index of one kind, asked as a Scan is; on the GPU where FAISS has one."""

    def __init__(self, index: Any, kind: str, settings: IndexSettings, threads: int | None = None) -> None:
        self.kind, self.settings, self.threads = kind, settings, threads
        self.exact, self.margin = kind == "exact", MARGINS.get(kind, MARGIN)
        self._mapped = False
        self._index, self._gpu = index, None if kind == "hnsw" else _on_gpu(index)

    @classmethod
    def build(cls, vectors_VE: Tensor, settings: IndexSettings, threads: int | None = None) -> Index:
        """Index placed item vectors; the same vectors give the same bytes."""
        faiss = _faiss()
        items, width = vectors_VE.shape
        kind = settings.chosen(items)
        index = faiss.index_factory(width, INDEXES[kind](items, width), faiss.METRIC_INNER_PRODUCT)
        built = cls(index, kind, settings, threads)
        if hasattr(index, "pq"):
            index.pq.cp.min_points_per_centroid = 1  # codes that few have taught are scored again anyway
        wanted = min(items, max(SAMPLED * lists(items), SAMPLED * CODES))
        sample_NE = vectors_VE if wanted == items else vectors_VE[torch.arange(wanted) * items // wanted]
        with built._many_threads():
            index.train(sample_NE.float().contiguous().numpy())
        built.append(vectors_VE)
        return built

    @classmethod
    def load(
        cls,
        path: Path,
        kind: str,
        settings: IndexSettings,
        shape: tuple[int, int],
        threads: int | None = None,
        *,
        mapped: bool = False,
    ) -> Index:
        """Read an index whose hash was checked before; with `mapped` where it lies, so that it cannot change.

        Raises BundleError: no index, or one of other items than `shape` (items, width).
        """
        faiss = _faiss()
        bytes_ = path.stat().st_size
        limits = [name for name in ("vector_byte_limit", "loop_limit") if hasattr(faiss, f"set_deserialization_{name}")]
        before = {name: getattr(faiss, f"get_deserialization_{name}")() for name in limits}
        try:
            for name in limits:  # no array and no list in a file is longer than the file
                getattr(faiss, f"set_deserialization_{name}")(bytes_)
            flags = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE | (faiss.IO_FLAG_MMAP_IFC if mapped else 0)  # the table is of L2 alone
            index = faiss.read_index(str(path), flags)
        except RuntimeError:
            raise BundleError(f"{path}: FAISS cannot read it; export the bundle again") from None
        finally:
            for name, value in before.items():
                getattr(faiss, f"set_deserialization_{name}")(value)
        if (index.ntotal, index.d) != shape:
            found = (index.ntotal, index.d)
            raise BundleError(f"{path}: items and width are {found}, the model's {shape}; export the bundle again")
        loaded = cls(index, kind, settings, threads)
        loaded._mapped = mapped
        return loaded

    def searching(self, settings: IndexSettings) -> Index:
        """The same index, searched by other `probes` and `breadth`."""
        other = copy.copy(self)
        other.settings = settings
        vars(other).pop("_free", None)
        return other

    def append(self, vectors_VE: Tensor) -> None:
        """Add items behind the last; nothing is trained again."""
        self._require_own()
        whole = self.kind == "hnsw"  # whose graph would be another
        with self._many_threads():
            for part_NE in [vectors_VE] if whole else torch.split(vectors_VE, BLOCK):
                self._index.add(part_NE.float().contiguous().numpy())
        self._gpu = None if self.kind == "hnsw" else _on_gpu(self._index)

    def refill(self, vectors_VE: Tensor) -> None:
        """Hold these items in the place of all others; nothing is trained again."""
        self._require_own()
        self._index.reset()
        self.append(vectors_VE)

    def _require_own(self) -> None:
        if self._mapped:  # FAISS would end the process
            raise RuntimeError("an index that is read where it lies cannot change; load it without `mapped`")

    @contextmanager
    def _many_threads(self) -> Iterator[None]:
        """Work on all threads meanwhile; on one for hnsw, of which several make another graph each time."""
        faiss = _faiss()
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1 if self.kind == "hnsw" else self.threads or before)
        try:
            yield
        finally:
            faiss.omp_set_num_threads(before)

    def write(self, path: Path) -> None:
        _faiss().write_index(self._index, str(path))

    def search(self, states_BE: Tensor, n: int, allowed_V: Tensor | None = None) -> tuple[Tensor, Tensor]:
        states = states_BE.float().cpu().contiguous().numpy()
        lines_BN, scores_BN = (
            self.near(states, n) if allowed_V is None else self._found(states, n, self._parameters(n, allowed_V))
        )
        return torch.from_numpy(lines_BN).to(states_BE.device), torch.from_numpy(scores_BN).to(states_BE.device)

    def near(self, states_BE: Array, n: int) -> tuple[Array, Array]:
        parameters = self._free if n <= self.settings.breadth else self._parameters(n, None)
        return self._found(states_BE, n, parameters, self._index if self._gpu is None or n > GPU_CANDIDATES else self._gpu)

    def _found(self, states_BE: Array, n: int, parameters: Any, index: Any = None) -> tuple[Array, Array]:
        faiss = _faiss()
        if self.threads is not None and faiss.omp_get_max_threads() != self.threads:  # OpenMP keeps it for each calling thread
            faiss.omp_set_num_threads(self.threads)
        scores_BN, lines_BN = (self._index if index is None else index).search(states_BE, n, params=parameters)
        if lines_BN[:, -1].min() < 0:
            scores_BN[lines_BN < 0] = -np.inf
        return lines_BN, scores_BN

    @cached_property
    def _free(self) -> Any:
        """How it is searched without a filter."""
        return self._parameters(1, None)

    def _parameters(self, n: int, allowed_V: Tensor | None) -> Any:
        faiss, chosen = _faiss(), dict[str, Any]()
        if allowed_V is not None:
            chosen["sel"] = faiss.IDSelectorBitmap(np.packbits(allowed_V.cpu().numpy(), bitorder="little"))
        if self.kind.startswith("ivf"):
            return faiss.SearchParametersIVF(nprobe=self.settings.probes, **chosen)
        if self.kind != "hnsw":
            return faiss.SearchParameters(**chosen)
        breadth = max(self.settings.breadth, n)
        if allowed_V is not None:  # so that it keeps as many allowed candidates as without a filter
            allowed = int(np.count_nonzero(allowed_V.numpy()))
            breadth = min(breadth * len(allowed_V) // max(allowed, 1), len(allowed_V))
        return faiss.SearchParametersHNSW(efSearch=breadth, **chosen)


Searcher = Scan | Index


def lists(items: int) -> int:
    """IVF lists for so many items: the power of two nearest to 4 √items, at most LISTS, and no more than items can teach."""
    learnable = int(math.log2(max(1.0, items / POINTS)))
    return min(LISTS, 1 << min(round(math.log2(4 * math.sqrt(items))), learnable))


def codes(items: int, width: int) -> str:
    """A byte for every two numbers, or for each of an odd width, learnt without an order that no search uses (np).

    Of scalars where there are fewer items than codes.
    """
    return f"PQ{width // 2 if width % 2 == 0 else width}x8np" if items >= CODES else "SQ8"


def _faiss() -> Any:
    try:
        import faiss
    except (ImportError, OSError) as error:
        raise SetupError(f"faiss does not load ({error}); run `recsys doctor`") from None
    return faiss


def _on_gpu(index: Any) -> Any:
    faiss = _faiss()
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    return None
