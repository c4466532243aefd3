"""The parts of a comparison's page: differences with intervals, in all and by slice, and the rules of a decision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from serving.evaluation.elements import Drawing, Table
from serving.evaluation.figures import Row, forest
from serving.evaluation.numbers import (
    METRICS,
    NONE,
    Estimate,
    count,
    decimal,
    finite,
    known,
    probability,
    written,
    written_share,
)
from serving.evaluation.report_parts import detectable

SHOWN = 0.05
"""p below which a difference is shown."""


class ComparisonParts:
    """A comparison, asked for the parts of its page."""

    def __init__(self, comparison: Mapping[str, Any]) -> None:
        self.comparison = {key: value for key, value in comparison.items() if value is not None}
        self.decision: Mapping[str, Any] = self.comparison.get("decision", {})
        self.decisive = str(self.comparison.get("decisive", "ndcg@10"))
        self.title, self.k = known(self.decisive)[1], self.decisive.partition("@")[2]
        self.names = tuple(str((self.comparison.get(side) or {}).get("name") or side.upper()) for side in ("a", "b"))
        self.level = finite(self.comparison.get("level")) or 1 - SHOWN
        self.interval = f"{100 * self.level:g} % interval"

    def standing(self) -> tuple[str, str]:
        """Colour and word of the first line: the decision's, else the comparison's."""
        if self.decision:
            return ("green", "Promoted") if self.decision.get("promote") else ("red", "Refused")
        if any(self.comparison.get("leaks", {}).values()):
            return "red", "Leaks found"
        return {"a": ("red", "Worse"), "b": ("green", "Better")}.get(
            str(self.comparison.get("better")), ("amber", "No difference shown")
        )

    def facts(self) -> list[tuple[str, str]]:
        """What was compared, and on what."""
        data, protocol, clock = (self.comparison.get(name) or {} for name in ("dataset", "protocol", "clock"))
        counts = ", ".join(count(data[noun], noun) for noun in ("users", "events", "items") if noun in data)
        sides = [self._side(side, name) for side, name in zip(("a", "b"), self.names, strict=True)]
        facts = {
            "A": sides[0],
            "B": sides[1],
            "Users": self._users(),
            "Protocol": protocol.get("text") or protocol.get("name"),
            "Data set": ": ".join(part for part in (data.get("recipe"), counts) if part),
            "What this test can tell": detectable(self.comparison.get("mdd", {}), self.title),
            "Hash of the data set": data.get("hash"),
            "Made": clock.get("created"),
        }
        return [(name, str(value)) for name, value in facts.items() if value]

    def _side(self, side: str, name: str) -> str | None:
        told = self.comparison.get(side)
        if not told:
            return None
        ids = [str(each) for each in told.get("bundles") or []]
        seeds = f"{count(len(ids), 'seeds')}, " if len(ids) > 1 else ""
        return f"{name}: {seeds}{', '.join(ids)}" if ids else name

    def _users(self) -> str:
        keys = {"won": "for whom B is better", "lost": "for whom A is better", "equal": "for whom they are equal"}
        parts = [f"{count(self.comparison[key], 'users')} {text}" for key, text in keys.items() if key in self.comparison]
        return ", ".join(parts) + (f" in {self.title}" if parts else "")

    def tables(self) -> Iterable[Table]:
        """Metrics of each user's list at the deciding k and at others, and those of all lists together."""
        metrics = self.comparison.get("metrics", [])
        near = [each for each in metrics if str(each.get("metric")).partition("@")[2] == self.k]
        near.sort(key=lambda each: each.get("metric") != self.decisive)
        far = [each for each in metrics if each not in near and str(each.get("metric")).partition("@")[0] in ("ndcg", "recall")]
        head = ["A", "B", f"Difference, B less A, {self.interval}", "Relative to A", "p"]
        for title, chosen in ((f"The first {self.k} places", near), ("Other lengths of the list", far)):
            rows = [[known(str(each["metric"]))[1], *self._cells(str(each["metric"]), each)] for each in chosen]
            strong = frozenset(place for place, each in enumerate(chosen) if each["metric"] == self.decisive)
            yield Table(title, ["Metric", *head], rows, "Means over users; paired tests over the same users.", strong=strong)
        rows = [
            [known(name)[1], *(written(name, each.get(key), key == "difference") for key in ("a", "b", "difference"))]
            for each in self.comparison.get("lists", [])
            for name in [str(each["metric"])]
        ]
        yield Table(
            "All lists together",
            ["Metric", "A", "B", "Difference, B less A"],
            rows,
            "One number for all lists, without an interval.",
        )

    def _cells(self, metric: str, each: Mapping[str, Any]) -> list[str]:
        sides = [written(metric, each.get(side)) for side in ("a", "b")]
        return [
            *sides,
            written(metric, each.get("difference"), True),
            written_share(each.get("relative"), True),
            probability(each.get("p")),
        ]

    def against_k(self, word: str) -> Drawing:
        metric, rows = METRICS[word].title, []
        for each in self.comparison.get("metrics", []):
            name, _, k = str(each.get("metric")).partition("@")
            if name == word and Estimate.of(each.get("difference")) is not None:
                rows.append(self._row(f"k = {k}", "", each, each.get("p")))
        title = f"Difference in {metric} by length of the list"
        return self._forest(title, "k (items in the list)", f"difference in {metric}, B less A (of 1)", rows, "p below")

    def slices(self) -> list[Drawing]:
        groups: dict[str, list[Row]] = {}
        for each in self.comparison.get("slices", []):
            row = self._row(str(each.get("slice")), count(each.get("users"), "users"), each, each.get("p_adjusted"))
            groups.setdefault(str(each.get("by")), []).append(row)
        axis = f"difference in {self.title}, B less A (of 1)"
        drawings = [self._forest(f"Difference by {by}", by, axis, rows, "adjusted p below") for by, rows in groups.items()]
        return drawings or [Drawing("Slices", "No figure: the comparison has no slices.")]

    def _row(self, name: str, note: str, each: Mapping[str, Any], p: Any) -> Row:
        found = finite(p)
        return Row(name, note, Estimate.of(each.get("difference")), strong=found is not None and found < 1 - self.level)

    def _forest(self, title: str, by: str, axis: str, rows: list[Row], what: str) -> Drawing:
        told = [(row, row.estimate.mean) for row in rows if row.estimate is not None]
        if not told:
            return Drawing(title, "No figure: there are no such differences.")
        shown = f"Filled: {what} {decimal(1 - self.level, 2)}; hollow: no difference shown."
        text = f"Right of 0 B is better. Lines are the {self.interval}. {shown}"
        label = "; ".join(f"{row.name} {decimal(mean, signed=True)}{'' if row.strong else ', not shown'}" for row, mean in told)
        return Drawing(title, text, forest(by, axis, rows, zero=True), f"{title}: {label}")

    def slice_table(self) -> Table:
        rows = []
        for each in self.comparison.get("slices", []):
            cells = self._cells(self.decisive, {**each, "p": each.get("p_adjusted")})
            rows.append([f"{each.get('by')}: {each.get('slice')}", count(each.get("users"), "users"), *cells])
        head = ["Slice", "Users", "A", "B", f"Difference, B less A, {self.interval}", "Relative to A", "p, adjusted"]
        return Table(f"{self.title} by slice", head, rows, "p values are adjusted for the number of slices (Holm).")

    def rules(self) -> Table:
        """Of the decision, those that do not hold marked."""
        rules = self.decision.get("rules") or []
        rows = [
            [str(rule.get("name")), "✓ holds" if rule.get("holds") else "✗ does not hold", str(rule.get("text") or NONE)]
            for rule in rules
        ]
        strong = frozenset(place for place, rule in enumerate(rules) if not rule.get("holds"))
        return Table("Its rules", ["Rule", "Holds", "In words"], rows, words=frozenset({2}), strong=strong)
