"""Recommendations from a run or a bundle: history → state → candidates → filters → exact scores → list.

Parity: a history's list is the same alone, in any batch, online and at night, bit for bit. Three things make it so.
*Encoding*: torch's CPU kernels give a history the same state in every batch if it is padded to a length that depends on it
alone and is a multiple of 16; padded to the batch's longest, two of three states change in the last bits (1e-6), and with
them the order of close items. Measured with Linear, LayerNorm, GELU and SDPA in float32, widths 37 to 128, batches of 1 to
32, 1 and 2 threads (AVX-512); it costs 2 % for histories of 200 and at most 15 positions for short ones.
*Search*: an index only names candidates, and how many are asked for depends on the history alone.
*Scores*: the candidates that rounding could have put in or out are scored again, in float64, one product at a time.

B histories · E width · V items · n, C candidates · k places of a list
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys.batch import FIRST_ITEM, PADDING, Batch, gather
from recsys.bundle import MANIFEST, Directory, open_directory
from recsys.errors import RequestError
from recsys.model import model_from
from serving import catalogue, index
from serving.catalogue import Catalogue
from serving.filters import allowed_lines, seen, until
from serving.index import Index, IndexSettings, Scan, Searcher
from serving.lists import Lists, best

VECTORS = "vectors.safetensors"
POSITIONS = 16
"""Histories are padded to a multiple of this."""
TOKENS = 1024
"""Padded events encoded at once: what stays in a core's cache; 16,384 are 20 % slower."""
QUERIES = 16
"""Histories searched at once; from 20 on FAISS takes other kernels, which round otherwise."""
MARGIN = 16
"""Candidates beyond k that are scored exactly, where an index found them by rounded vectors."""
SMALL = 20_000
"""Allowed items up to which they are searched exactly: faster than an index, and nothing is missed."""


class Recommender:
    """A loaded run or bundle; safe to share between threads."""

    def __init__(self, directory: Directory, searcher: Searcher | None, device: str = "cpu") -> None:
        self.manifest = directory.manifest
        self.model = model_from(directory, device).eval().requires_grad_(False)
        positions = self.model.positions  # rows that only padding reads, so that every padded length is a multiple of 16
        self.model.positions = torch.nn.Parameter(pad(positions, (0, 0, 0, -len(positions) % POSITIONS)), requires_grad=False)
        self.catalogue = Catalogue(directory.path / catalogue.FILE)
        self.vectors_VE = self.model.item_vectors()
        self.scan = Scan(self.vectors_VE)
        self.searcher = searcher or self.scan
        self._longest = float(self.vectors_VE.norm(dim=1).max())

    @classmethod
    def load(
        cls, path: Path, verify: bool = True, device: str = "cpu", *, exact: bool = False, threads: int | None = None
    ) -> Recommender:
        """Load a run, a model directory or a bundle; with `exact`, a bundle's index stays unused.

        `threads` is how many FAISS takes for a search (default: its own). Raises BundleError: not whole, altered, or of
        another format.
        """
        directory = open_directory(path if (path / MANIFEST).is_file() or not (path / "model").is_dir() else path / "model", verify)
        manifest, searcher = directory.manifest, None
        if manifest["kind"] == "bundle" and not exact:
            settings = IndexSettings(**manifest["recipe"][IndexSettings.section])
            shape = (manifest["items"], manifest["recipe"]["model"]["embedding_size"])
            searcher = Index.load(directory.path / index.FILE, manifest["index"]["kind"], settings, shape, threads)
        return cls(directory, searcher, device)

    @property
    def id(self) -> str:
        """Of the bundle; a run's is its content's hash."""
        return str(self.manifest.get("id") or self.manifest["hash"][:12])

    @property
    def items(self) -> int:
        """Items that can be recommended."""
        return self.model.items

    @torch.inference_mode()
    def recommend(
        self,
        histories: Batch,
        k: int,
        now: int | None = None,
        filter_seen: bool = True,
        deny: Iterable[int] = (),
        allow: Iterable[int] | None = None,
    ) -> Lists:
        """The k best items for each history of item rows; fewer only where fewer are allowed.

        Events after `now` (seconds since 1970) are not read; the model itself reads no time. `deny` and `allow` are item rows.
        Raises RequestError: k below 1.
        """
        if k < 1:
            raise RequestError(f"k is {k}; ask for at least 1 item")
        if now is not None:
            histories = until(histories, now)
        histories = histories.to(self.vectors_VE.device)
        allowed_V = allowed_lines(self.items, deny, allow)
        lists = Lists(
            torch.full((len(histories), k), PADDING, device=histories.values.device),
            torch.full((len(histories), k), -torch.inf, device=histories.values.device),
            ~self._known(histories),
        )
        states_BE = self.encode(histories)
        wanted_B = k + MARGIN + (histories.lengths if filter_seen else 0 * histories.lengths)
        wanted_B = (2 ** wanted_B.double().log2().ceil()).long().clamp(max=self.items)  # of the history alone
        few = allowed_V is not None and int(allowed_V.sum()) <= SMALL
        for popular, n, chunk in _chunks(lists.popular, wanted_B):
            searcher = _Popularity(self.catalogue.events[: self.items]) if popular else self.scan if few else self.searcher
            part = _take(histories, chunk)
            hidden = part if filter_seen else None
            lists.rows[chunk], lists.scores[chunk] = self._search(searcher, states_BE[chunk], hidden, k, n, allowed_V)
        return lists

    @torch.inference_mode()
    def encode(self, histories: Batch) -> Tensor:
        """`model.encode`, such that a state does not depend on the batch; shape B × E."""
        read = histories.last(self.model.settings.length)
        positions_B = (read.lengths + POSITIONS - 1) // POSITIONS * POSITIONS
        out_BE = self.vectors_VE.new_zeros(len(read), self.vectors_VE.shape[1])
        for positions in positions_B.unique().tolist():
            for chunk in (positions_B == positions).nonzero().flatten().split(max(1, TOKENS // max(1, positions))):
                if positions:
                    part = _take(read, chunk)
                    rows_BT = part.padded(positions)
                    times_BT = torch.zeros_like(rows_BT)
                    times_BT[part.mask(positions)] = part.times
                    offsets = torch.arange(len(chunk) + 1, device=rows_BT.device) * positions
                    states_BTE = self.model(Batch(rows_BT.flatten(), offsets, times_BT.flatten()))
                    out_BE[chunk] = states_BTE[torch.arange(len(chunk)), part.lengths - 1]
        return out_BE
