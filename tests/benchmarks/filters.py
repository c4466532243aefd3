"""Measure what filters cost one request, by how many items they allow.

python -m tests.benchmarks.filters [ITEMS]     from the project's folder (default: 1,000,000 items)

Clustered random unit vectors of width 64 in the index that auto takes, k = 100, histories of 50 and of 10,000 events, one
thread; from the masks to the list, the state given. Then a condition that is asked for the first time; later ones are kept.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import polars as pl
import torch

from features.dataset import ATTRIBUTE
from recsys.batch import FIRST_ITEM, Batch
from serving.filters import Attributes, allowed_lines
from serving.index import Index, IndexSettings, Scan
from serving.retrieval import find
from tests.benchmarks.index_recall import vectors

REQUESTS, K = 512, 100


def milliseconds(request: Callable[[int], object]) -> tuple[float, float, float]:
    """Median and 99th percentile of REQUESTS requests, and that of the processor's time, without the wait for a busy one."""
    times, worked = [], []
    for number in range(REQUESTS):
        started, began = time.perf_counter(), time.process_time()
        request(number)
        times.append(1000 * (time.perf_counter() - started))
        worked.append(1000 * (time.process_time() - began))
    return statistics.median(times), *(sorted(each)[int(0.99 * REQUESTS)] for each in (times, worked))


def main(items: int) -> None:
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(1)
    vectors_VE, states_BE = vectors(items, draw), vectors(REQUESTS, draw)
    scan, index = Scan(vectors_VE), Index.build(vectors_VE, IndexSettings())
    index.threads = 1
    print(f"{items:,} items, {index.kind}")
    print(f"{'allowed':>9}  {'events':>6} {'ms p50':>8} {'ms p99':>8} {'CPU p99':>8} {'recall@100':>10}", flush=True)
    for events in (50, 10_000):
        histories = torch.randint(items, (REQUESTS, events), generator=draw) + FIRST_ITEM
        batches = [Batch.of([history.tolist()]) for history in histories]
        for allowed in (*(few for few in (10, 1_000, 100_000, 500_000) if few < items), items):
            chosen_V = torch.zeros(items, dtype=torch.bool)
            chosen_V[torch.randperm(items, generator=draw)[:allowed]] = True
            mask_V = None if allowed == items else chosen_V

            def request(
                number: int,
                searcher: Index | Scan = index,
                mask_V: torch.Tensor | None = mask_V,
                batches: list[Batch] = batches,
            ) -> torch.Tensor:
                allowed_V = allowed_lines(items, (), None, None, mask_V)
                return find(searcher, scan, states_BE[number, None], K, batches[number], allowed_V)[0]

            p50, p99, worked = milliseconds(request)
            pairs = [(request(number, scan), request(number)) for number in range(0, REQUESTS, 17)]
            found = sum(int((torch.isin(exact, rows) & (exact > 0)).sum()) for exact, rows in pairs)
            recall = found / sum(int((exact > 0).sum()) for exact, _ in pairs)
            print(f"{allowed:9,}  {events:6,} {p50:8.2f} {p99:8.2f} {worked:8.2f} {recall:10.4f}", flush=True)
    attributes = Attributes(
        pl.DataFrame({"line": range(items)}).select(
            pl.concat_list(pl.format("category {}", pl.col("line") * 7 % 997)).alias("categories"),
            (pl.col("line") % 2 == 0).alias(f"{ATTRIBUTE}in_stock"),
            (pl.col("line") * 31 % 1009).cast(pl.Float64).alias(f"{ATTRIBUTE}price"),
            pl.format("brand {}", pl.col("line") * 13 % 9973).alias(f"{ATTRIBUTE}brand"),
        )
    )
    attributes.meeting({"categories": "category 0"})  # reads the categories
    for name, condition in (("categories", "category 3"), ("in_stock", True), ("price", {"min": 7}), ("brand", "brand 3")):
        for when in ("first", "later"):
            started = time.perf_counter()
            attributes.meeting({name: condition})
            print(f"{name}, {when}: {1000 * (time.perf_counter() - started):.2f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 1_000_000)
