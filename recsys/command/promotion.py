"""The promotion of a registered bundle: both are judged on one data set, the gate decides, and MLflow keeps the evidence."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from features.dataset import Dataset
from features.leaks import LeakSettings
from recsys.bundle import is_free, replace_directory
from recsys.command.recipes import merge
from recsys.command.terminal import bar
from recsys.config import Settings
from recsys.errors import RequestError, SetupError
from recsys.tracking import Tracking, TrackingSettings
from serving.engine import Recommender
from serving.evaluation import compare
from serving.evaluation.gate import Decision, PromotionSettings, costs_of, decide
from serving.evaluation.protocol import ProtocolSettings
from serving.evaluation.report import KS, make_report, settle
from serving.live import RegistrySource

OWNERS: tuple[type[Settings], ...] = (PromotionSettings, ProtocolSettings, LeakSettings)
"""Sections of the challenger's recipe that decide."""
DECISION = "decision.json"
"""In the folder of a promotion: what was decided, and the mark of such a folder."""


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


def promote(tracking: Tracking, version: str, data: Path, settings: list[str] | None, out: Path | None) -> Promotion:
    """Judge a version and the champion on a data set, decide by the rules of the version's recipe under the command's settings,
    record it, and promote it if they hold.

    Reports, the comparison and the decision go to the version's MLflow run and then, if given, to `out`, in the place of an
    earlier promotion's.
    Raises RequestError: the version is champion, or `out` holds something else. SetupError: no such version, or another one
    became champion meanwhile.
    """
    if out is not None and not is_free(out, DECISION):
        raise RequestError(f"{out}: is there and is no earlier promotion's folder ({DECISION}); give another --out")
    version = tracking.resolve(version)[0]
    against = tracking.champion()
    if version == against:
        raise RequestError(f"version {version} is champion already; give the version that is to replace it")
    dataset, numbers = Dataset.open(data), [version, *([against] if against else [])]
    sources = [RegistrySource(f"models:/{tracking.settings.model}/{number}", tracking.uri) for number in numbers]
    recommenders = [Recommender.load(source.current()[1]) for source in sources]
    recipe = merge(recommenders[0].manifest["recipe"], settings, *OWNERS, TrackingSettings)
    rules = recipe.read(PromotionSettings)
    beside = out.absolute().parent if out else None
    if beside:
        beside.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["recsys", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(dir=beside, prefix=".promotion.") as temporary, bar("lists") as progress:
        folder, reports, ks = Path(temporary) / "promotion", [], sorted({*KS, rules.k})
        for number, recommender in zip(numbers, recommenders, strict=True):
            what = f"version {number}"
            protocol, checks = settle(recommender, dataset, recipe, despite_leaks=True)
            tell = partial(progress, what)
            made = make_report(recommender, dataset, protocol, ks, name=what, command=command, checks=checks, progress=tell)
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
