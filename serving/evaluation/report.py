"""A REPORT directory: what was judged and how well, each figure with its interval; for people, programs and paired tests.

REPORT/report.json     all that the page shows, and the SHA-256 of the other files
REPORT/users.parquet   a row for each judged user: each metric of each lister, and the slices that the user is in
REPORT/lists.parquet   the model's lists: user_id, item_id, rank (from 1), score
REPORT/report.html     the page

U judged users · P (user, target) pairs · V catalogue items
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from features.dataset import Dataset, write_parquet
from features.leaks import Check, LeakSettings, find_leaks, refuse
from recsys.batch import FIRST_ITEM, PADDING, spread
from recsys.bundle import Writer, is_free, open_directory, publish
from recsys.config import Recipe
from recsys.errors import DataError, RequestError
from recsys.metrics import METRICS
from recsys.progress import Count, Progress
from recsys.version import __version__
from serving.engine import Recommender
from serving.evaluation.given import GivenLists
from serving.evaluation.judge import AMONG, Evaluation, evaluate
from serving.evaluation.numbers import NONE, around, finite, percent, written
from serving.evaluation.protocol import ProtocolSettings, in_words
from serving.evaluation.slices import Slice, slices
from serving.evaluation.statistics import bootstrap, holm, minimal_detectable, minimal_difference, paired
from serving.explain import nearest_events
from serving.lists import Lists

if TYPE_CHECKING:
    import polars as pl

MANIFEST, USERS, LISTS, PAGE = "report.json", "users.parquet", "lists.parquet", "report.html"
KS = (1, 5, 10, 20, 50, 100)
"""Depths at which lists are judged, unless said otherwise."""
DECISIVE = "ndcg"
"""The metric by which listers are told apart, at the k nearest to 10."""
LEVEL = 0.95
CALIBRATED = 5000
"""Users by whom probabilities are checked, at most; evenly chosen."""
PLACES = 50
"""Places of their lists."""
BINS = 10
SHOWN = 10
"""Users whose lists are shown, places of each, and events of a history."""
GROUPS = (("most popular 1 %", 0.01), ("next 4 %", 0.05), ("next 15 %", 0.2), ("next 30 %", 0.5), ("the other half", 1.0))
"""Items with training events, most popular first, up to a share of them."""


@dataclass(frozen=True)
class Report:
    """A report in memory, or one that was written before."""

    manifest: dict[str, Any]
    users: pl.DataFrame
    lists: pl.DataFrame

    @staticmethod
    def open(path: Path) -> Report:
        """Raises DataError: there is none, or it was altered."""
        import polars as pl

        directory = open_directory(path, name=MANIFEST, error=DataError)
        return Report(directory.manifest, pl.read_parquet(path / USERS), pl.read_parquet(path / LISTS))

    def write(self, path: Path) -> Report:
        """Publish it, whole or not at all."""
        from serving.evaluation.page import report_page

        page = report_page(self.manifest).encode()
        writers: dict[str, Writer] = {
            name: partial(write_parquet, [table], table.schema) for name, table in ((USERS, self.users), (LISTS, self.lists))
        }
        writers[PAGE] = lambda file: file.write_bytes(page) and None
        made = publish(path, writers, self.manifest, MANIFEST)
        return Report(made.manifest, self.users, self.lists)

    @cached_property
    def decisive(self) -> str:
        return str(self.manifest["decisive"])

    def values(self, lister: str = "model", metric: str = "") -> np.ndarray[Any, np.dtype[np.float64]]:
        """Of each judged user."""
        return self.users[f"{lister}: {metric or self.decisive}"].cast(float).fill_null(math.nan).to_numpy()


def settle(
    subject: Recommender | GivenLists,
    dataset: Dataset,
    recipe: Recipe,
    despite_leaks: bool = False,
    progress: Progress | None = None,
) -> tuple[ProtocolSettings, list[Check]]:
    """By which protocol of a recipe a subject is to be judged, and what was found by its [leaks].

    Raises LeakError: something is known too early, unless `despite_leaks`.
    """
    protocol = recipe.read(ProtocolSettings)
    checks = find_leaks(dataset, subject.manifest or None, recipe.read(LeakSettings), protocol.split, progress)
    if not despite_leaks:
        refuse(checks, str(dataset.path))
    return protocol, checks


def make_report(
    subject: Recommender | GivenLists,
    dataset: Dataset,
    protocol: ProtocolSettings | None = None,
    ks: Sequence[int] = KS,
    *,
    name: str = "",
    command: str = "",
    seed: int = 0,
    checks: Sequence[Check] = (),
    baselines: bool = True,
    progress: Count = lambda done, of: None,
) -> Report:
    """Judge, and say how sure every figure is. `checks` are those for leaks.

    Same bundle, data set, protocol and seed: the same report but for its `clock`. Raises as `evaluate`.
    """
    started = datetime.now(UTC)
    found = evaluate(subject, dataset, protocol, ks, baselines, progress=progress)
    manifest = subject.manifest
    return _Making(found, subject, seed).report(
        {
            "kind": "report",
            "subject": manifest.get("kind", "lists"),
            "bundle": subject.id,
            "version": __version__,
            "name": name or str(manifest.get("name", "")),
            "dataset": {key: dataset.manifest[key] for key in ("recipe", "hash", "users", "events", "items")},
            "learning": [{"part": "model", **line} for line in manifest.get("curve", [])],
            "leaks": {"checked": [check.name for check in checks], "found": [check.name for check in checks if check.found]},
            "command": command,
            "seed": seed,
            "clock": {
                "created": started.isoformat(timespec="seconds"),
                "machine": machine(),
            },
        }
    )


def require_place(out: Path) -> None:
    """Raises RequestError: `out` is there and neither a REPORT nor empty."""
    if not is_free(out, MANIFEST):
        raise RequestError(f"{out}: exists and is no report; name another directory")


def machine() -> str:
    """What it was computed on."""
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"


class _Making:
    """The parts of a report, of one evaluation."""

    def __init__(self, found: Evaluation, subject: Recommender | GivenLists, seed: int) -> None:
        self.found, self.subject, self.seed = found, subject, seed
        self.k = min(found.ks, key=lambda k: abs(k - 10))
        self.decisive = f"{DECISIVE}@{self.k}"
        self.columns: dict[str, Tensor] = {}
        """Values of judged users, by the name of their column in users.parquet."""
        judged_A = torch.isin(found.asked_U, found.users_U)
        for lister, judged in found.judged.items():
            if lister.endswith(AMONG):
                continue
            self._add(lister, found.values(lister, METRICS))
            if judged.shown is not None:
                self._add(lister, {name: values_A[judged_A] for name, values_A in judged.shown.users.items()})
            if "popularity" in found.judged:
                self._add(lister, {f"serendipity@{self.k}": self._serendipity(lister)})
        self.listers = {name: judged.kind for name, judged in found.judged.items() if not name.endswith(AMONG)}
        baselines = [name for name, kind in self.listers.items() if kind == "baseline"]
        self.best = max(baselines, key=lambda name: float(self.columns[f"{name}: {self.decisive}"].mean()), default="")
        self.slices, self.left_out = slices(found)
        for part in self.slices:
            self._add_slice(part)
        values_UM = torch.stack(list(self.columns.values()), 1).numpy()
        low_M, high_M = bootstrap(values_UM, np.random.default_rng(seed), level=LEVEL)
        self.ends = dict(zip(self.columns, zip(low_M.tolist(), high_M.tolist(), strict=True), strict=True))

    def report(self, head: Mapping[str, Any]) -> Report:
        import polars as pl

        found, decisive = self.found, self.decisive
        protocol, made = found.protocol, found.dataset.manifest["settings"]
        manifest = {
            **head,
            "protocol": {
                **protocol.as_dict(),
                "name": protocol.name or "own",
                "method": made["split"]["method"],
                "request_time": self.subject.reads_now,
                "text": in_words(protocol, made, self.subject.reads_now),
            },
            "users": found.users,
            "targets": len(found.targets_P),
            "decisive": decisive,
            "ks": list(found.ks),
            "level": LEVEL,
            **self._verdict(),
            "listers": self.listers,
            "figures": {lister: self._figures(lister) for lister in self.listers},
            "slices": [self._slice(part) for part in self.slices],
            "columns_left_out": self.left_out,
            "cold": {name: dict(by) for name, by in found.slices.items()},
            "popularity": self._popularity(),
            "calibration": self._calibration(),
            "examples": self._examples(),
            "underfilled": found.lists.underfilled,
            "popular": int(found.lists.popular.sum()),
        }
        ids = found.dataset.user_ids.gather(found.users_U.numpy())
        values = pl.DataFrame({name: values_U.numpy() for name, values_U in self.columns.items()}).fill_nan(None)
        return Report(manifest, pl.DataFrame({"user_id": ids, **self._memberships()}).hstack(values), found.frame())

    def _add(self, lister: str, values: Mapping[str, Tensor]) -> None:
        self.columns |= {f"{lister}: {name}": values_U.double() for name, values_U in values.items()}

    def _add_slice(self, part: Slice) -> None:
        """The columns of a slice of targets, or of one of users, of which the value outside is NaN."""
        for lister in filter(None, ("model", self.best)):
            for metric in (DECISIVE, "recall"):
                name = f"{lister}: {metric}@{self.k}"
                if part.of == "targets":
                    values_U = self.found.values(lister, (metric,), (self.k,), part.chosen)[f"{metric}@{self.k}"]
                else:
                    values_U = self.columns[name].masked_fill(~part.chosen, torch.nan)
                self.columns[f"{name} | {part.by}: {part.name}"] = values_U

    def _memberships(self) -> dict[str, Any]:
        """Slices of users as columns of their names; null for a user in none."""
        import polars as pl

        out: dict[str, Any] = {}
        for part in self.slices:
            if part.of == "users":
                before = out.get(f"user: {part.by}", pl.Series([None] * self.found.users, dtype=pl.String))
                out[f"user: {part.by}"] = before.set(pl.Series(part.chosen.numpy()), part.name)
        return out

    def _estimate(self, column: str) -> dict[str, float | None]:
        low, high = self.ends[column]
        return around(float(self.columns[column].nanmean()), low, high)

    def _figures(self, lister: str) -> dict[str, Any]:
        start = f"{lister}: "
        names = [name.removeprefix(start) for name in self.columns if name.startswith(start) and " | " not in name]
        out: dict[str, Any] = {name: self._estimate(start + name) for name in names}
        shown = self.found.judged[lister].shown
        return out | {name: {"mean": finite(value)} for name, value in (shown.whole if shown else {}).items()}

    def _slice(self, part: Slice) -> dict[str, Any]:
        end = f" | {part.by}: {part.name}"
        name = f"model: {self.decisive}{end}"
        told = {
            "by": part.by,
            "of": part.of,
            "slice": part.name,
            "users": int((~self.columns[name].isnan()).sum()),
            "share": float(part.chosen.double().mean()),
            "figures": {metric: self._estimate(f"model: {metric}{end}") for metric in (self.decisive, f"recall@{self.k}")},
        }
        if self.best:
            told["best_baseline"] = {"name": self.best, self.decisive: self._estimate(f"{self.best}: {self.decisive}{end}")}
        return told

    def _verdict(self) -> dict[str, Any]:
        """The first line: whether the model beats every baseline, by paired tests adjusted for their number."""
        own_U, own = self.columns[f"model: {self.decisive}"].numpy(), self._estimate(f"model: {self.decisive}")
        said = f"{self.decisive.upper()} {written(self.decisive, own)}"
        subject, beats, fails, open_ = (
            ("The model", "beats every baseline", "does NOT beat", "is NOT shown to beat")
            if isinstance(self.subject, Recommender)
            else ("These lists", "beat every baseline", "do NOT beat", "are NOT shown to beat")
        )
        if not self.best:
            return {"verdict": f"No baseline was judged beside the model: {said}.", "beats": None, "mdd": None}
        against = {
            name: paired(self.columns[f"{name}: {self.decisive}"].numpy(), own_U, LEVEL)
            for name, kind in self.listers.items()
            if kind == "baseline"
        }
        adjusted = holm([test.p for test in against.values()])
        beaten = {
            name for (name, test), p in zip(against.items(), adjusted, strict=True) if p < 1 - LEVEL and test.difference > 0
        }
        unbeaten = sorted(against.keys() - beaten, key=lambda name: (-against[name].first, name))
        rival = unbeaten[0] if unbeaten else self.best
        test, theirs = against[rival], written(self.decisive, self._estimate(f"{rival}: {self.decisive}"))
        mean, low, high = (
            percent(share, True) if math.isfinite(share) else NONE
            for share in (test.relative, test.relative_low, test.relative_high)
        )
        apart = f"{mean} [{low}, {high}]"
        beside = f"{said} against {theirs} of {rival}, {apart} in a paired test over {self.found.users:,} users"
        behind = [name for name in unbeaten if against[name].difference <= 0]
        unsure = [name for name in unbeaten if name not in behind]
        words = [f"{verb} {_and(names)}" for verb, names in ((fails, behind), (open_, unsure)) if names]
        verdict = f"{subject} {_and(words) or beats}: {beside}."
        best = against[self.best]
        mdd = minimal_difference(minimal_detectable(best.sd, best.users, 1 - LEVEL), best.second, LEVEL)
        return {"verdict": verdict, "beats": not unbeaten, "mdd": {**mdd, "against": self.best}}

    def _serendipity(self, lister: str) -> Tensor:
        """Targets found in the first k that popularity does not name there / min(k, targets) (after Ge et al. 2010)."""
        found, k = self.found, self.k
        lucky_P = (found.judged[lister].ranks_P <= k) & (found.judged["popularity"].ranks_P > k)
        possible_U = torch.bincount(found.owners_P, minlength=found.users).clamp(max=k)
        return torch.bincount(found.owners_P[lucky_P], minlength=found.users) / possible_U.double()

    def _popularity(self) -> list[dict[str, Any]]:
        """Shares of training events, targets and places of lists that go to items of like popularity."""
        facts = self.found.facts
        warm, wanted_R = int((facts.counts_R > 0).sum()), torch.bincount(self.found.targets_P, minlength=len(facts.counts_R))
        shown = self.found.judged["model"].shown
        assert shown is not None
        totals = {"events": facts.counts_R, "targets": wanted_R, "lists": shown.times_R}
        sums = {what: max(int(values[facts.rows_D].sum()), 1) for what, values in totals.items()}
        out, start = [], 0
        for name, share in (*GROUPS, ("without training events", None)):
            end = len(facts.rows_D) if share is None else max(start, math.ceil(share * warm))
            rows = facts.rows_D[start:end]
            if len(rows):
                shares = {what: float(values[rows].sum()) / sums[what] for what, values in totals.items()}
                out.append({"items": name, "count": len(rows), **shares})
            start = end
        return out

    def _calibration(self) -> dict[str, Any] | None:
        """How often items of such a probability were the next one; the expected calibration error (Naeini et al. 2015)."""
        from scipy.stats import binomtest

        found, subject = self.found, self.subject
        if not isinstance(subject, Recommender) or subject.calibration is None:
            return None
        _, ends_U, _ = found.sequences.windows(found.protocol.split)
        users_B = found.asked_U[:: max(1, -(-len(found.asked_U) // CALIBRATED))]  # whether or not their next item is a target
        histories = found.sequences.histories(found.protocol.split, users_B)
        now_B = found.sequences.times[ends_U[users_B]] if subject.reads_now else None
        places, seen = min(PLACES, subject.items), found.protocol.filter_seen
        lists = subject.recommend(histories, places, now_B, filter_seen=seen, probabilities=True)
        assert lists.probabilities is not None
        there_BK = (lists.rows != PADDING) & ~lists.popular[:, None]
        chances = lists.probabilities[there_BK].double().numpy()
        came = (lists.rows == found.sequences.items[ends_U[users_B]].long()[:, None])[there_BK].double().numpy()
        if not len(chances):
            return None
        edges = np.unique(np.quantile(chances, np.linspace(0, 1, BINS + 1)))
        bins = np.clip(np.searchsorted(edges, chances, side="right") - 1, 0, max(len(edges) - 2, 0))
        out, error = [], 0.0
        for place in np.unique(bins):
            inside = bins == place
            count, chance, share = int(inside.sum()), float(chances[inside].mean()), float(came[inside].mean())
            ends = binomtest(int(came[inside].sum()), count).proportion_ci(LEVEL, "wilson")
            out.append({"probability": chance, "observed": share, "places": count, "low": ends.low, "high": ends.high})
            error += count / len(chances) * abs(chance - share)
        return {"error": error, "users": len(users_B), "bins": out}

    def _examples(self) -> list[dict[str, Any]]:
        """The lists of a few users, evenly chosen, with what they had and what they did next."""
        found, catalogue = self.found, self.found.catalogue
        places = spread(found.users, SHOWN)
        users_B = found.users_U[places]
        histories = found.sequences.histories(found.protocol.split, users_B)
        lines = torch.searchsorted(found.asked_U, users_B)
        rows_BK, scores_BK = found.lists.rows[lines, :SHOWN], found.lists.scores[lines, :SHOWN]
        lists = Lists(rows_BK, scores_BK, found.lists.popular[lines])
        because: list[Any] = [None] * int((lists.rows != PADDING).sum())
        if isinstance(self.subject, Recommender):
            because = nearest_events(self.subject, histories, lists).to_list()

        def title(row: int) -> str:
            return catalogue.title(row) if row < FIRST_ITEM + len(catalogue) else "an item that the catalogue does not know"

        whys = (None if item_id is None else catalogue.by_id(item_id) for item_id in because)
        reasons, out = (None if row is None else title(row) for row in whys), []
        ids = found.dataset.user_ids.gather(users_B.numpy()).to_list()
        events_BT = [each.tolist() for each in torch.split(histories.values, histories.lengths.tolist())]
        for place, user_id, events, rows, scores in zip(
            places.tolist(), ids, events_BT, rows_BK.tolist(), scores_BK.tolist(), strict=True
        ):
            targets = found.targets_P[found.owners_P == place].tolist()
            shown = [
                {"rank": rank, "title": title(row), "score": finite(score), "because": next(reasons), "hit": row in targets}
                for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1)
                if row != PADDING
            ]
            out.append(
                {
                    "user_id": user_id,
                    "events": len(events),
                    "history": [title(row) for row in events[-SHOWN:]],
                    "targets": [title(row) for row in targets[:SHOWN]],
                    "targets_in_all": len(targets),
                    "list": shown,
                }
            )
        return out


def _and(words: Sequence[str]) -> str:
    *others, last = words or [""]
    return f"{', '.join(others)} and {last}" if others else last
