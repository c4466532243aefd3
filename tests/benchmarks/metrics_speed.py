"""How long the metrics of many lists take: recall, NDCG, MRR, MAP and hit rate at six depths, and what the lists show.

    python -m tests.benchmarks.metrics_speed --users 1000000 --depth 100

Lists and targets are drawn; finding the lists is not measured. With --polars recall and NDCG at two depths are timed beside it,
by joins and groups.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from recsys.batch import FIRST_ITEM, Batch, Sequences
from recsys.metrics import METRICS, measure, measure_users
from serving.evaluation.beyond import Beyond
from serving.evaluation.judge import ranks_in

KS = (1, 5, 10, 20, 50, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--targets", type=int, default=3, help="targets of a user")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--polars", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    draw = torch.Generator().manual_seed(0)
    first = torch.randint(args.items, (args.users, 1), generator=draw)
    rows_UK = FIRST_ITEM + (first + torch.arange(args.depth) * 7919) % args.items  # distinct in a list: 7919 is prime
    owners_P = torch.arange(args.users).repeat_interleave(args.targets)
    targets_P = FIRST_ITEM + torch.randint(args.items, (args.users * args.targets,), generator=draw)
    hit_P = torch.rand(len(targets_P), generator=draw) < 0.3
    places_P = torch.randint(args.depth, (len(targets_P),), generator=draw)
    targets_P = torch.where(hit_P, rows_UK[owners_P, places_P], targets_P)
    histories = Batch.of([[FIRST_ITEM + line, FIRST_ITEM + (line * 3) % args.items] for line in range(0, args.items, 5)])
    ends = torch.full((len(histories),), 2)
    sequences = Sequences(histories.values.int(), histories.times, histories.offsets, ends, ends)
    counts_R = torch.bincount(histories.values, minlength=FIRST_ITEM + args.items)
    yardstick = Beyond(sequences, counts_R, FIRST_ITEM + torch.arange(args.items), torch.arange(7), "test")
    begun = time.perf_counter()
    ranks_P = ranks_in(rows_UK, owners_P, targets_P)
    found = time.perf_counter()
    values = measure_users(ranks_P, owners_P, args.users, KS, METRICS)
    counted = time.perf_counter()
    shown = yardstick.measure(rows_UK, 10)
    ended = time.perf_counter()
    print(f"ranks {found - begun:.2f} s, {len(values)} metrics {counted - found:.2f} s, what is shown {ended - counted:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"together {ended - begun:.2f} s; peak {peak:.2f} GB with the lists")
    print(f"ndcg@10 {float(values['ndcg@10'].mean()):.4f}, coverage@10 {shown.whole['coverage@10']:.3f}")
    if args.polars:
        print(f"the same in polars: {in_polars(rows_UK, owners_P, targets_P):.2f} s")
        print(measure(ranks_P, owners_P, args.users))


def in_polars(rows_UK: torch.Tensor, owners_P: torch.Tensor, targets_P: torch.Tensor) -> float:
    """Seconds of recall and NDCG at 10 and 50 by joins and groups."""
    import polars as pl

    users, depth = rows_UK.shape
    columns = {"user": torch.arange(users).repeat_interleave(depth), "item": rows_UK.flatten()}
    lists = pl.DataFrame({name: values.numpy() for name, values in columns.items()})
    lists = lists.with_columns(rank=pl.int_range(pl.len()) % depth + 1)
    truth = pl.DataFrame({"user": owners_P.numpy(), "item": targets_P.numpy()}).unique()
    begun = time.perf_counter()
    hits = lists.join(truth, on=["user", "item"], how="semi")
    wanted = truth.group_by("user").len("targets")
    for k in (10, 50):
        gain = (1 / (pl.col("rank") + 1).cast(pl.Float64).log(2)).sum()
        found = hits.filter(pl.col("rank") <= k).group_by("user").agg(found=pl.len(), gain=gain)
        wanted.join(found, on="user", how="left").select(pl.col("found", "gain").fill_null(0).mean())
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
