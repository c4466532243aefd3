"""The promotion of a registered bundle: both are judged on one data set, the gate decides, and MLflow keeps the evidence."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from features.dataset import Dataset
from features.leaks import LeakSettings, find_leaks
from recsys.bundle import replace_directory
from recsys.config import Recipe, Settings
from recsys.errors import RequestError, SetupError
from recsys.tracking import Tracking
from serving.engine import Recommender
from serving.evaluation import compare
from serving.evaluation.gate import Decision, PromotionSettings, costs_of, decide
from serving.evaluation.protocol import ProtocolSettings
from serving.evaluation.report import KS, make_report
from serving.live import RegistrySource

OWNERS: tuple[type[Settings], ...] = (PromotionSettings, ProtocolSettings, LeakSettings)
"""Sections of the challenger's recipe that decide."""
DECISION = "decision.json"
"""In the folder of a promotion: what was decided, and the mark of such a folder."""

Merge = Callable[[dict[str, dict[str, Any]]], Recipe]
"""Merges sections with the command's settings."""


@dataclass(frozen=True)
class Promotion:
    """What was decided of a version, and against which."""

    version: str
    against: str
    """The champion's version; empty: there was none."""
    decision: Decision

    @property
    def verdict(self) -> str:
        done = "is champion" if self.decision.promote else "is refused"
        instead = f"; version {self.against} stays champion" if self.against and not self.decision.promote else ""
        return f"version {self.version} {done}: {self.decision.reason}{instead}"

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: with the comparison, where there was a champion."""
        compared = self.decision.comparison
        told = {"version": int(self.version), "against": int(self.against) if self.against else None}
        return {**(compared.as_dict() if compared else {}), **told, "decision": self.decision.as_dict()}


def promote(
    tracking: Tracking,
    version: str,
    data: Path,
    merge: Merge,
    out: Path | None = None,
    command: str = "",
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Promotion:
    """Judge a version and the champion on a data set, decide by the rules of the version's recipe, record it, and promote it if
    they hold.

    Reports, the comparison and the decision go to the version's MLflow run and then, if given, to `out`, in the place of an
    earlier promotion's.
    Raises RequestError: the version is champion, or `out` holds something else. SetupError: no such version, or another one
    became champion meanwhile.
    """
    if out is not None and out.exists() and not (out / DECISION).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out}: is there and is no earlier promotion's folder ({DECISION}); give another --out")
    version = tracking.resolve(version)[0]
    against = tracking.champion()
    if version == against:
        raise RequestError(f"version {version} is champion already; give the version that is to replace it")
    dataset, numbers = Dataset.open(data), [version, *([against] if against else [])]
    recommenders = [Recommender.load(_files(tracking, number)) for number in numbers]
    recipe = merge(recommenders[0].manifest["recipe"])
    rules, protocol = recipe.read(PromotionSettings), recipe.read(ProtocolSettings)
    with ExitStack() as stack:
        beside = out.absolute().parent if out else None
        if beside:
            beside.mkdir(parents=True, exist_ok=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=beside, prefix=".promotion."))) / "promotion"
        reports = []
        for number, recommender in zip(numbers, recommenders, strict=True):
            what = f"version {number}"
            checks = find_leaks(dataset, recommender.manifest, recipe.read(LeakSettings), protocol.split)
            ks = sorted({*KS, rules.k})
            made = make_report(
                recommender, dataset, protocol, ks, name=what, command=command, checks=checks, progress=partial(progress, what)
            )
            reports.append(made.write(folder / f"version-{number}"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as a server answers: one request, one thread
        costs = costs_of([Recommender.load(each.path, threads=1) for each in recommenders], dataset, progress)
        torch.set_num_threads(threads)
        names = (f"version {against} (champion)", f"version {version}")
        decision = decide(rules, reports[0], reports[1] if against else None, costs, names)
        promotion = Promotion(version, against, decision)
        if decision.comparison:
            compare.write(promotion.as_dict(), folder / "comparison")
        told = {**promotion.as_dict()["decision"], "version": int(version), "settings": rules.as_dict()}
        (folder / DECISION).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        _record(tracking, promotion, reports[0].manifest["figures"]["model"], rules, folder)
        if out:
            replace_directory(folder, out.absolute())
    return promotion


def _files(tracking: Tracking, version: str) -> Path:
    return RegistrySource(f"models:/{tracking.settings.model}/{version}", tracking.uri).current()[1]


def _record(
    tracking: Tracking, promotion: Promotion, figures: Mapping[str, Mapping[str, float]], rules: PromotionSettings, folder: Path
) -> None:
    """First the evidence, then the alias, then what was decided: none is told without what comes before it."""
    decision = promotion.decision
    tags = {
        "reason": decision.reason,
        "against": promotion.against,
        "rules": ", ".join(f"{rule.name} {'holds' if rule.holds else 'does not hold'}" for rule in decision.rules),
        rules.metric: f"{figures[rules.metric]['mean']:.6f}",
    }
    tracking.decided(promotion.version, tags, folder)
    if decision.promote:
        now = tracking.champion()
        if now != promotion.against:
            raise SetupError(
                f"version {now or 'none'} became champion while version {promotion.version} was judged against "
                f"{promotion.against or 'none'}; promote it again"
            )
        tracking.promote(promotion.version)
    tracking.decided(promotion.version, {"decision": "promoted" if decision.promote else "refused"}, more=True)
