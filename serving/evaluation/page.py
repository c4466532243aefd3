"""Pages of reports: one HTML file each, with its figures and nothing from elsewhere, made from the report's JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from serving.evaluation.comparison_parts import ComparisonParts
from serving.evaluation.numbers import METRICS
from serving.evaluation.report_parts import ReportParts


def report_page(report: Mapping[str, Any]) -> str:
    """The page of a report, from its report.json; the same report makes the same bytes."""
    parts = ReportParts(report)
    popularity, popularity_table = parts.popularity()
    return _render(
        "report.html",
        title=f"{report['name'] or 'Model'}: report",
        standing=parts.standing(),
        verdict=report["verdict"],
        facts=parts.facts(),
        curves=[parts.against_k("ndcg"), parts.against_k("recall"), parts.stages()],
        tables=list(parts.tables()),
        slices=parts.slices(),
        slice_table=parts.slice_table(),
        cold=parts.cold(),
        popularity=popularity,
        popularity_table=popularity_table,
        beyond=parts.beyond(),
        learning=[parts.learning(), parts.calibration()],
        examples=parts.examples(),
        leaks=report["leaks"],
        command=report["command"],
        level=report["level"],
    )


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """The page of a comparison, or of a decision for promotion, from its comparison.json."""
    parts = ComparisonParts(comparison)
    said = [*([parts.decision["reason"]] if parts.decision else []), comparison["verdict"]]
    return _render(
        "comparison.html",
        title=f"{parts.names[1]} against {parts.names[0]}",
        standing=parts.standing(),
        verdict=said[0],
        found=said[1:],
        rules=parts.rules(),
        facts=parts.facts(),
        curves=[parts.against_k("ndcg"), parts.against_k("recall")],
        tables=list(parts.tables()),
        slices=parts.slices(),
        slice_table=parts.slice_table(),
        notes=comparison["notes"],
        level=parts.level,
    )


def _render(template: str, **values: Any) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    meanings = [(metric.title, metric.meaning) for metric in METRICS.values()]
    return pages.get_template(template).render(meanings=meanings, **values)
