"""What approximate retrieval loses, and where the milliseconds of one request go, by the number of items.

usage: python -m tests.benchmarks.served_path [ITEMS …] [--requests 400] [--kinds auto ivf ivf_sq8]   (default: 100,000 items)

The catalogue is made up: clustered unit vectors of width 64 (as in index_recall), and next items near the states that ask for
them, with noise by which exact search has an NDCG@10 of some tenths. Quality is that of `serving.engine.find`, by which every
job retrieves. Time is of a bundle with untrained weights (two blocks of LiGR, a ranker of one block with companions), a history
of 50, 200 candidates (padded to 208), k = 10, one thread, one request at a time: each stage, and a whole `answer` with
ids and titles. Prints two JSON objects for each number of items.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import save_file
from torch.nn.functional import pad

from recsys.batch import FIRST_ITEM, Batch
from recsys.bundle import publish
from recsys.metrics import MISSED, measure
from recsys.model import WEIGHTS, ModelSettings, SequenceModel
from recsys.ranker import COMPANIONS, RANKER, Companions, Ranker, RankerSettings
from serving.catalogue import ITEMS
from serving.engine import Recommender
from serving.export import export
from serving.index import Index, IndexSettings, Scan
from serving.ranking import listed
from serving.retrieval import find
from tests.benchmarks.index_recall import vectors

MODEL = ModelSettings(
    block="ligr", heads=2, positions="relative", time="gaps", length=200, similarity="cosine", temperature=0.07
)
RANKED = RankerSettings(blocks=1, companions=64)
HISTORY, K = 50, 10
QUERIES, NOISE = 2_000, 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", type=int, nargs="*", default=[100_000])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--kinds", nargs="*", default=["auto", "ivf", "ivf_sq8"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for items in args.items:
        vectors_VE = vectors(items, torch.Generator().manual_seed(1))
        print(json.dumps({"items": items, "ndcg@10": quality(vectors_VE, args.kinds)}), flush=True)
        if args.requests:
            with tempfile.TemporaryDirectory() as folder:
                recommender = bundle(Path(folder), vectors_VE)
                print(json.dumps({"items": items, "ms": timed(recommender, args.requests)}), flush=True)


def quality(vectors_VE: torch.Tensor, kinds: list[str]) -> dict[str, Any]:
    """NDCG@10 of exact search, and of each kind of index with its loss in percent; the first is the default."""
    draw = torch.Generator().manual_seed(2)
    targets_B = torch.randint(len(vectors_VE), (QUERIES,), generator=draw)
    states_BE = vectors_VE[targets_B] + NOISE * torch.randn(QUERIES, vectors_VE.shape[1], generator=draw)
    scan = Scan(vectors_VE)
    exact = ndcg(find(scan, scan, states_BE, K)[0], targets_B)
    figures: dict[str, Any] = {"exact": round(exact, 5)}
    for kind in kinds:
        index = Index.build(vectors_VE, IndexSettings(kind=kind))
        index.threads = 1
        found = ndcg(find(index, scan, states_BE, K)[0], targets_B)
        figures[kind if kind != "auto" else f"auto ({index.kind})"] = {
            "ndcg@10": round(found, 5),
            "loss_percent": round(100 * (1 - found / exact), 3),
        }
    return figures


def ndcg(rows_BK: torch.Tensor, targets_B: torch.Tensor) -> float:
    hit_BK = rows_BK == targets_B[:, None] + FIRST_ITEM
    ranks_B = torch.where(hit_BK.any(1), hit_BK.byte().argmax(1) + 1, MISSED)
    return measure(ranks_B, torch.arange(len(ranks_B)), len(ranks_B), (K,))[f"ndcg@{K}"]


def bundle(folder: Path, vectors_VE: torch.Tensor, *, ranker: bool = True, index: IndexSettings | None = None) -> Recommender:
    """Of untrained weights, whose item vectors are the given ones."""
    items, draw = len(vectors_VE), torch.Generator().manual_seed(3)
    model = SequenceModel(MODEL, items).initialise(draw)
    with torch.no_grad():
        model.table.weight[FIRST_ITEM:] = vectors_VE
    near = torch.randint(FIRST_ITEM, FIRST_ITEM + items, (items, RANKED.companions), generator=draw, dtype=torch.int32)
    near = pad(near.sort(dim=1).values, (0, 0, FIRST_ITEM, 0))
    companions = Companions(near, torch.rand(near.shape, generator=draw), torch.full((len(near),), 9.0))
    ranks = Ranker(RANKED, MODEL, items, companions=companions).initialise(draw)
    table = pl.DataFrame({"item_id": range(items), "title": [f"Item {item}" for item in range(items)]}).with_columns(
        row=pl.int_range(FIRST_ITEM, items + FIRST_ITEM, dtype=pl.Int32),
        text=pl.col("title"),
        categories=pl.lit([], pl.List(pl.String)),
        numbers=pl.lit([], pl.List(pl.Struct({"values": pl.List(pl.Float32)}))),
        events=(items - pl.int_range(items)).cast(pl.Int64),
    )
    writers = {
        WEIGHTS: lambda path: save_file(model.weights(), path),
        ITEMS: table.write_parquet,
    }
    if ranker:
        writers |= {RANKER: lambda path: save_file(ranks.state_dict(), path), COMPANIONS: companions.save}
    manifest = {"kind": "model", "name": "made-up", "items": items, "dataset": {"hash": ""}}
    recipe = {"model": MODEL.as_dict(), "ranker": RANKED.as_dict()}
    publish(folder / "run" / "model", writers, {**manifest, "recipe": recipe})
    export(folder / "run", folder / "bundle", index or IndexSettings())
    return Recommender.load(folder / "bundle", threads=1)


def timed(recommender: Recommender, requests: int) -> dict[str, dict[str, float]]:
    """Milliseconds by stage, p50 and p99."""
    draw, spent = torch.Generator().manual_seed(4), defaultdict[str, list[float]](list)
    for request in range(requests + 20):
        values = torch.randint(FIRST_ITEM, FIRST_ITEM + recommender.lines, (HISTORY,), generator=draw)
        times = torch.randint(10**9, (HISTORY,), generator=draw).sort().values
        history = Batch(values, torch.tensor([0, HISTORY]), times)
        took: dict[str, float] = {}

        def stage(name: str, work: Callable[[], Any], took: dict[str, float] = took) -> Any:
            started = time.perf_counter()
            out = work()
            took[name] = 1000 * (time.perf_counter() - started)
            return out

        with torch.inference_mode():
            state_1E, look = stage("encode", lambda history=history: recommender._read(history, None))
            rows_1N, scores_1N = stage(
                "retrieve and filter",
                lambda state=state_1E, history=history: find(recommender.searcher, recommender.scan, state, 208, history),
            )
            ranked_1N = stage("rank", lambda rows=rows_1N, s=scores_1N, look=look: recommender._rank(rows, s, look))
            stage("list", lambda rows=rows_1N, s=ranked_1N: listed(rows, s, recommender.known, recommender.serving, K))
        words = [recommender.catalogue.item_id(row) for row in values.tolist()]
        options = {"times": times.tolist(), "find": recommender.catalogue.by_id}
        stage("answer", lambda words=words, options=options: recommender.answer(words, K, **options))
        plain = recommender.with_ranker(0)
        stage("answer without ranker", lambda plain=plain, words=words, options=options: plain.answer(words, K, **options))
        if request >= 20:  # the first ones warm up
            for name, milliseconds in took.items():
                spent[name].append(milliseconds)
    shown = {}
    for name, values in spent.items():
        low, high = torch.tensor(values).quantile(torch.tensor([0.5, 0.99])).tolist()
        shown[name] = {"p50": round(low, 3), "p99": round(high, 3)}
    return shown


if __name__ == "__main__":
    main()
