"""Reports whose values of each user are made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from serving.evaluation.report import Report

USERS = 503
METRIC = "ndcg@10"


def draw(seed: int, users: int = USERS) -> np.ndarray[Any, Any]:
    """Values such as NDCG has: many zeros, the others up to 1."""
    generator = np.random.default_rng(seed)
    return np.where(generator.random(users) < 0.4, generator.random(users), 0.0)


def changed(values: np.ndarray[Any, Any], gain: float, seed: int, noise: float = 0.02) -> np.ndarray[Any, Any]:
    """The values with their mean moved by a share `gain`, users apart by noise."""
    apart = np.random.default_rng(seed).normal(0, noise, len(values))
    return values + apart - apart.mean() + gain * values.mean()


def made(
    columns: Mapping[str, Any],
    bundle: str = "b",
    slices: Sequence[Mapping[str, str]] = (),
    whole: Mapping[str, float] | None = None,
    listers: Mapping[str, str] | None = None,
    leaks: Sequence[str] = (),
    **changes: Any,
) -> Report:
    """A report with these columns of users; `model: ndcg@10` must be among them."""
    users = len(columns[f"model: {METRIC}"])
    ids = {} if "user_id" in columns else {"user_id": np.arange(users)}
    own = [name.removeprefix("model: ") for name in columns if name.startswith("model: ") and "|" not in name]
    figures = {name: {"mean": float(np.nanmean(columns[f"model: {name}"]))} for name in own}
    figures |= {name: {"mean": value} for name, value in (whole or {"coverage@10": 0.5}).items()}
    manifest = {
        "kind": "report",
        "bundle": bundle,
        "dataset": {"recipe": "made-up", "hash": "5c" * 32, "users": users, "events": 1009, "items": 37},
        "protocol": {"name": "own", "split": "test", "targets": "new", "request_time": False, "text": "In words."},
        "users": users,
        "decisive": METRIC,
        "ks": [10],
        "listers": {"model": "model", **(listers or {})},
        "figures": {"model": figures},
        "slices": [{"of": "users", **part} for part in slices],
        "leaks": {"checked": [], "found": list(leaks)},
    }
    table = pl.DataFrame({**ids, **columns}).with_columns(pl.selectors.float().fill_nan(None))
    return Report({**manifest, **changes}, table, pl.DataFrame())
