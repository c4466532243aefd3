"""Measure what every kind of index finds and costs, by the number of items.

python -m tests.benchmarks.index_recall [ITEMS …]     from the project's folder (default: 10,000 and 100,000 items)

Clustered random unit vectors of width 64, k = 100, one thread; the figures beside serving.index.INDEXES are of this kind.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize

from serving.export import QUERIES, measure_index
from serving.index import INDEXES, Index, IndexSettings

WIDTH, CENTRES = 64, 1000


def vectors(count: int, generator: torch.Generator) -> torch.Tensor:
    centres = torch.randn(CENTRES, WIDTH, generator=torch.Generator().manual_seed(0))
    chosen = torch.randint(CENTRES, (count,), generator=generator)
    return normalize(centres[chosen] + 0.7 * torch.randn(count, WIDTH, generator=generator), dim=1)


def main(sizes: list[int]) -> None:
    torch.set_num_threads(1)
    print(f"{'items':>9}  {'kind':8} {'recall@100':>10} {'ms p50':>8} {'build s':>8} {'MB':>7}")
    for items in sizes:
        generator = torch.Generator().manual_seed(1)
        vectors_VE, queries_BE = vectors(items, generator), vectors(QUERIES, generator)
        for kind in INDEXES:
            started = time.perf_counter()
            index = Index.build(vectors_VE, IndexSettings(kind=kind))
            seconds = time.perf_counter() - started
            measured, query_ms = measure_index(index, vectors_VE, queries_BE)
            with tempfile.TemporaryDirectory() as folder:
                index.write(Path(folder) / "index")
                megabytes = (Path(folder) / "index").stat().st_size / 2**20
            print(
                f"{items:9,}  {kind:8} {measured['recall@100']:10.4f} {query_ms:8.3f} {seconds:8.1f} {megabytes:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [10_000, 100_000])
