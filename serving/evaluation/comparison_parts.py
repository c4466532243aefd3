"""The parts of a comparison's page: differences with intervals, in all and by slice, and the rules of a decision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from serving.evaluation.elements import Drawing, Table
from serving.evaluation.figures import Row, forest
from serving.evaluation.numbers import (
    METRICS,
    Estimate,
    count,
    decimal,
    known,
    probability,
    written,
    written_share,
)
from serving.evaluation.report_parts import data_set, detectable


class ComparisonParts:
    """A comparison, asked for the parts of its page."""

    def __init__(self, comparison: Mapping[str, Any]) -> None:
        self.comparison, self.decisive, self.level = comparison, str(comparison["decisive"]), float(comparison["level"])
        self.decision: Mapping[str, Any] = comparison.get("decision", {})
        self.title, self.k = known(self.decisive)[1], self.decisive.partition("@")[2]
        self.names = tuple(comparison[side]["name"] or side.upper() for side in ("a", "b"))
        self.interval = f"{100 * self.level:g} % interval"

    def standing(self) -> tuple[str, str]:
        """Colour and word of the first line: the decision's, else the comparison's."""
        if self.decision:
            return ("green", "Promoted") if self.decision["promote"] else ("red", "Refused")
        if any(self.comparison["leaks"].values()):
            return "red", "Leaks found"
        shown = {"a": ("red", "Worse"), "b": ("green", "Better"), None: ("amber", "No difference shown")}
        return shown[self.comparison["better"]]

    def facts(self) -> list[tuple[str, str]]:
        """What was compared, and on what."""
        found = self.comparison
        keys = {"won": "for whom B is better", "lost": "for whom A is better", "equal": "for whom they are equal"}
        facts = {
            **{side.upper(): _side(name, found[side]["bundles"]) for side, name in zip("ab", self.names, strict=True)},
            "Users": ", ".join(f"{count(found[key], 'users')} {text}" for key, text in keys.items()) + f" in {self.title}",
            "Protocol": found["protocol"]["text"],
            "Data set": data_set(found["dataset"]),
            "What this test can tell": detectable(found["mdd"], self.title),
            "Hash of the data set": found["dataset"]["hash"],
        }
        return [(name, value) for name, value in facts.items() if value]

    def tables(self) -> Iterable[Table]:
        """Metrics of each user's list at the deciding k and at others, and those of all lists together."""
        near, far = [], []
        for each in self.comparison["metrics"]:
            word, _, k = each["metric"].partition("@")
            if k == self.k:
                near.append(each)
            elif word in ("ndcg", "recall"):
                far.append(each)
        near.sort(key=lambda each: each["metric"] != self.decisive)
        head = ["A", "B", f"Difference, B less A, {self.interval}", "Relative to A", "p"]
        for title, chosen in ((f"The first {self.k} places", near), ("Other lengths of the list", far)):
            rows = [[known(each["metric"])[1], *self._cells(each["metric"], each, each["p"])] for each in chosen]
            strong = frozenset(place for place, each in enumerate(chosen) if each["metric"] == self.decisive)
            yield Table(title, ["Metric", *head], rows, "Means over users; paired tests over the same users.", strong=strong)
        rows = [
            [known(name)[1], *(written(name, each[key], key == "difference") for key in ("a", "b", "difference"))]
            for each in self.comparison["lists"]
            for name in [each["metric"]]
        ]
        yield Table(
            "All lists together",
            ["Metric", "A", "B", "Difference, B less A"],
            rows,
            "One number for all lists, without an interval.",
        )

    def _cells(self, metric: str, each: Mapping[str, Any], p: float | None) -> list[str]:
        sides = [written(metric, each[side]) for side in ("a", "b")]
        return [*sides, written(metric, each["difference"], True), written_share(each["relative"], True), probability(p)]

    def against_k(self, word: str) -> Drawing:
        metric, rows = METRICS[word].title, []
        for each in self.comparison["metrics"]:
            name, _, k = each["metric"].partition("@")
            if name == word and each["difference"]["mean"] is not None:
                rows.append(self._row(f"k = {k}", "", each, each["p"]))
        title = f"Difference in {metric} by length of the list"
        return self._forest(title, "k (items in the list)", f"difference in {metric}, B less A (of 1)", rows, "p below")

    def slices(self) -> list[Drawing]:
        groups: dict[str, list[Row]] = {}
        for each in self.comparison["slices"]:
            row = self._row(each["slice"], count(each["users"], "users"), each, each["p_adjusted"])
            groups.setdefault(each["by"], []).append(row)
        axis = f"difference in {self.title}, B less A (of 1)"
        drawings = [self._forest(f"Difference by {by}", by, axis, rows, "adjusted p below") for by, rows in groups.items()]
        return drawings or [Drawing("Slices", "No figure: the comparison has no slices.")]

    def _row(self, name: str, note: str, each: Mapping[str, Any], p: float | None) -> Row:
        return Row(name, note, Estimate(**each["difference"]), strong=p is not None and p < 1 - self.level)

    def _forest(self, title: str, by: str, axis: str, rows: list[Row], what: str) -> Drawing:
        if not rows:
            return Drawing(title, "No figure: there are no such differences.")
        shown = f"Filled: {what} {decimal(1 - self.level, 2)}; hollow: no difference shown."
        text = f"Right of 0 B is better. Lines are the {self.interval}. {shown}"
        told = [f"{row.name} {decimal(row.estimate.mean, signed=True)}{'' if row.strong else ', not shown'}" for row in rows]
        return Drawing(title, text, forest(by, axis, rows, zero=True), f"{title}: {'; '.join(told)}")

    def slice_table(self) -> Table:
        rows = []
        for each in self.comparison["slices"]:
            cells = self._cells(self.decisive, each, each["p_adjusted"])
            rows.append([f"{each['by']}: {each['slice']}", count(each["users"], "users"), *cells])
        head = ["Slice", "Users", "A", "B", f"Difference, B less A, {self.interval}", "Relative to A", "p, adjusted"]
        return Table(f"{self.title} by slice", head, rows, "p values are adjusted for the number of slices (Holm).")

    def rules(self) -> Table:
        """Of the decision, those that do not hold marked."""
        rules = self.decision.get("rules", [])
        rows = [[rule["name"], "✓ holds" if rule["holds"] else "✗ does not hold", rule["text"]] for rule in rules]
        strong = frozenset(place for place, rule in enumerate(rules) if not rule["holds"])
        return Table("Its rules", ["Rule", "Holds", "In words"], rows, words=frozenset({2}), strong=strong)


def _side(name: str, bundles: Sequence[str]) -> str:
    seeds = f"{count(len(bundles), 'seeds')}, " if len(bundles) > 1 else ""
    return f"{name}: {seeds}{', '.join(bundles)}"
