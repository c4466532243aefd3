"""The parts of a report's page: facts, figures and tables, from the report's JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from serving.evaluation.elements import Drawing, Table
from serving.evaluation.figures import Row, against_k, epochs, forest, reliability, shares
from serving.evaluation.numbers import (
    METRICS,
    NONE,
    SPACE,
    Estimate,
    count,
    decimal,
    known,
    percent,
    written,
    written_share,
)

STAGES = ("model, exact search", "model, as retrieved", "model", "model, ranked")
"""The served path in its order; the last is a ranker that is not served."""
RIGHT, BEYOND = (
    ("ndcg", "recall", "mrr", "map", "hit"),
    ("coverage", "gini", "novelty", "diversity", "popularity_lift", "serendipity"),
)
SAME = {"hit": "recall", "map": "mrr"}
"""Metrics that are equal where every user has one target."""


class ReportParts:
    """A report, asked for the parts of its page."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report, self.decisive, self.ks = report, str(report["decisive"]), sorted(report["ks"])
        self.title, self.k = known(self.decisive)[1], self.decisive.partition("@")[2]
        self.figures: Mapping[str, Mapping[str, Any]] = report["figures"]
        self.path = [name for name in STAGES if name in self.figures]
        baselines = [name for name, kind in report["listers"].items() if kind == "baseline"]
        self.baselines = sorted(baselines, key=lambda name: -self._mean(name))
        """From the best."""

    def _mean(self, lister: str) -> float:
        return float(self.figures[lister][self.decisive]["mean"])

    def standing(self) -> tuple[str, str]:
        """Colour and word of the first line."""
        if self.report["leaks"]["found"]:
            return "red", "Leaks found"
        if not self.baselines:
            return "amber", "Beside no baseline"
        if self.report["beats"]:
            return "green", "Beats every baseline"
        if all(self._mean("model") > self._mean(name) for name in self.baselines):
            return "amber", "Not shown to beat every baseline"
        return "red", "Does not beat every baseline"

    def facts(self) -> list[tuple[str, str]]:
        """What was judged, where and by what."""
        report = self.report
        odd = {"underfilled": "shorter than asked", "popular": "of popularity alone, for users without a known item"}
        lists = [f"{count(report[key], 'lists')} {text}" for key, text in odd.items() if report[key]]
        facts = {
            "Protocol": report["protocol"]["text"],
            "Data set": data_set(report["dataset"]),
            "Judged": "; ".join([f"{count(report['users'], 'users')}, {count(report['targets'], 'targets')}", *lists]),
            "What this test can tell": detectable(report["mdd"], self.title),
            "Bundle": report["bundle"],
            "Hash of the data set": report["dataset"]["hash"],
            "Machine": report["clock"]["machine"],
            "Made": report["clock"]["created"],
            "Seed of the intervals": str(report["seed"]),
        }
        return [(name, value) for name, value in facts.items() if value]

    def tables(self) -> Iterable[Table]:
        """All listers at the deciding k and the longest list, and the model at every k."""
        listers = [*self.path, *self.baselines]
        same = [
            word
            for word, other in SAME.items()
            if all(self.figures[name][f"{word}@{self.k}"] == self.figures[name][f"{other}@{self.k}"] for name in listers)
        ]
        words = [word for word in RIGHT if word not in same]
        names = [f"{word}@{self.k}" for word in words]
        names += [f"{word}@{self.ks[-1]}" for word in RIGHT[:2] if str(self.ks[-1]) != self.k]
        note = "".join(f" {METRICS[word].title} equals {METRICS[SAME[word]].title} here." for word in same)
        title = "The model, the stages of its served path, and the baselines"
        yield self._by_lister(title, names, f"Means over users with their 95 % interval.{note}")
        model = self.figures["model"]
        rows = [[count(k, "items"), *(written(word, model[f"{word}@{k}"]) for word in words)] for k in self.ks]
        titles = [METRICS[word].title for word in words]
        yield Table("The model by length of the list", ["k", *titles], rows, "Means over users with their 95 % interval.")

    def beyond(self) -> Table:
        names = [f"{word}@{self.k}" for word in BEYOND]
        text = "Means over users where an interval stands beside, else of all lists together."
        return self._by_lister(f"What the first {self.k} places show", names, text)

    def _by_lister(self, title: str, metrics: list[str], text: str) -> Table:
        listers = [*self.path, *self.baselines]
        rows = [[name, *(written(metric, self.figures[name].get(metric)) for metric in metrics)] for name in listers]
        strong = frozenset(place for place, name in enumerate(listers) if name == "model")
        return Table(title, ["Lists of", *(known(name)[1] for name in metrics)], rows, text, strong=strong)

    def against_k(self, word: str) -> Drawing:
        metric, last = METRICS[word].title, self.ks[-1]
        lines = {
            name: {k: Estimate(**self.figures[name][f"{word}@{k}"]) for k in self.ks} for name in ("model", *self.baselines)
        }
        told = [f"{name} {decimal(by_k[last].mean)}" for name, by_k in lines.items()]
        text = "The model’s band is its 95 % interval."
        if self.baselines:
            text += " Where a baseline’s line is in the band or above it, the model is hardly better at that k, or worse."
        svg = against_k(metric, lines.pop("model"), lines)
        return Drawing(f"{metric} against the length of the list", text, svg, f"{metric}@{last}: {', '.join(told)}")

    def stages(self) -> Drawing:
        title = "What each stage of the served path gains or loses"
        if len(self.path) < 2:
            return Drawing(title, "No figure: what was judged has one stage, so that nothing is gained or lost between two.")
        rows, before = [], 0.0
        for name in self.path:
            found = Estimate(**self.figures[name][self.decisive])
            change = f" ({percent(found.mean / before - 1, True)})" if before else ""
            shown = "model, as served" if name == "model" else name
            rows.append(Row(shown, f"{decimal(found.mean)}{change}", found, strong=name == "model"))
            before = found.mean
        text = (
            "From the top down as a list is made; in brackets the change against the line above. Filled is what users see. "
            "All are of the same users, so that a sure difference may hide behind intervals that overlap."
        )
        label = "; ".join(f"{row.name} {row.note}" for row in rows)
        return Drawing(title, text, forest("stage", f"{self.title} (0 to 1)", rows), f"{self.title} by stage: {label}")

    def slices(self) -> list[Drawing]:
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for part in self.report["slices"]:
            groups.setdefault(part["by"], []).append(part)
        return [self._slices(by, parts) for by, parts in groups.items()] or [
            Drawing("Slices", "No figure: the report has no slices.")
        ]

    def _slices(self, by: str, parts: list[Mapping[str, Any]]) -> Drawing:
        rows, label, beside = [], [], parts[0].get("best_baseline", {}).get("name", "")
        for part in parts:
            found, other = Estimate(**part["figures"][self.decisive]), None
            told = f"{part['slice']} {decimal(found.mean)}"
            if beside:
                other = part["best_baseline"][self.decisive]["mean"]
                told += f", {beside} {decimal(other)}"
            rows.append(Row(part["slice"], count(part["users"], "users"), found, other))
            label.append(told)
        title = f"{self.title} by {by}"
        text = f"The model with its 95 % interval{f', and {beside}' if beside else ''}."
        if parts[0]["of"] == "targets":
            text += " Users count by their targets of that kind alone."
        svg = forest(by, f"{self.title} (0 to 1)", rows, ("model, 95 % interval", beside))
        return Drawing(title, text, svg, f"{title}: {'; '.join(label)}")

    def slice_table(self) -> Table:
        metrics, rows = [self.decisive, f"recall@{self.k}"], []
        for part in self.report["slices"]:
            best = part.get("best_baseline")
            rows.append(
                [
                    f"{part['by']}: {part['slice']}",
                    count(part["users"], "users"),
                    f"{written_share(part['share'])} of {part['of']}",
                    *(written(metric, part["figures"][metric]) for metric in metrics),
                    f"{best['name']} {written(self.decisive, best[self.decisive])}" if best else NONE,
                ]
            )
        head = ["Slice", "Users", "Share", *(known(metric)[1] for metric in metrics), f"Best baseline, {self.title}"]
        text, left = "Means over the users of a slice with their 95 % interval.", self.report["columns_left_out"]
        text += f" Columns that make no slices: {', '.join(left)}." if left else ""
        return Table("Every slice", head, rows, text)

    def cold(self) -> Table:
        metrics = [self.decisive, f"recall@{self.k}"]
        rows = [
            [f"{slice_}: {lister}", *(written(metric, figures[metric]) for metric in metrics)]
            for slice_, by in self.report["cold"].items()
            for lister, figures in by.items()
        ]
        text = (
            "Targets with training events (warm) and without (cold), in full lists, and cold ones in lists of cold items alone."
        )
        return Table("Cold and warm items", ["Targets: lists of", *(known(metric)[1] for metric in metrics)], rows, text)

    def popularity(self) -> tuple[Drawing, Table]:
        groups, title = self.report["popularity"], "Popularity against recommendation"
        kinds = {"events": "events", "targets": "targets", "lists": f"places, k = {self.k}"}
        head = ["Items", "Count", "Of training events", "Of targets", f"Of the model’s places, k = {self.k}"]
        rows = [[each["items"], count(each["count"], "items"), *(written_share(each[key]) for key in kinds)] for each in groups]
        text = (
            f"The share of training events, of targets and of the model’s first {self.k} places that each group of items has. "
            "More places than targets: shown more than wanted; fewer: shown less."
        )
        bars = {name: [each[key] for each in groups] for key, name in kinds.items()}
        label = "; ".join(f"{row[0]}: {row[2]} of events, {row[3]} of targets, {row[4]} of places" for row in rows)
        svg = shares([(row[0], row[1]) for row in rows], bars)
        return Drawing(title, text, svg, label), Table("Shares by popularity", head, rows)

    def calibration(self) -> Drawing:
        title, found = "Calibration of probabilities", self.report["calibration"]
        if not found:
            return Drawing(title, "No figure: what was judged gives no probabilities, or they were not checked.")
        bins = [(each["probability"], Estimate(each["observed"], each["low"], each["high"])) for each in found["bins"]]
        places = count(sum(each["places"] for each in found["bins"]), "places")
        text = f"How many of the items with such a probability really came next; {places} of lists in all."
        text += f" Calibration error, the mean distance between the two: {percent(found['error'])}."
        label = "; ".join(f"predicted {percent(predicted)}, observed {percent(observed.mean)}" for predicted, observed in bins)
        return Drawing(title, text, reliability(bins), label)

    def learning(self) -> Drawing:
        curve = self.report["learning"]
        if not curve:
            return Drawing("Learning", "No figure: what was judged has no record of its training.")
        metric = next((name for name in (self.decisive, "ndcg@10") if name in curve[0]), "")
        worths = {line["epoch"]: line[metric] for line in curve if metric}
        losses = {line["epoch"]: line["loss"] for line in curve}
        text = "Where both fall, training events are learnt by heart, no longer what comes next. The best epoch is marked."
        told = ", ".join(f"epoch {epoch} {decimal(number)}" for epoch, number in (worths or losses).items())
        title, name = "Learning of the model", known(metric or "loss")[1]
        return Drawing(title, text if worths else "", epochs(name, worths, losses), f"{title}, {name}: {told}")

    def examples(self) -> list[dict[str, Any]]:
        """Users' histories, targets and lists, as texts."""
        return [
            {
                **example,
                "events": count(example["events"], "events"),
                "more": example["targets_in_all"] - len(example["targets"]),
                "hits": sum(place["hit"] for place in example["list"]),
                "list": [
                    {**place, "score": NONE if place["score"] is None else decimal(place["score"], 2)}
                    for place in example["list"]
                ],
            }
            for example in self.report["examples"]
        ]


def data_set(found: Mapping[str, Any]) -> str:
    """What a data set holds, in words."""
    return f"{found['recipe']}: {', '.join(count(found[noun], noun) for noun in ('users', 'events', 'items'))}"


def detectable(found: Mapping[str, Any] | None, title: str) -> str | None:
    """What difference a test finds, in a sentence."""
    if found is None or found["difference"] is None:
        return None
    share = "" if found["relative"] is None else f" ({percent(found['relative'])})"
    against = f" to {found['against']}" if "against" in found else ""
    sure = f" with a probability of {100 * found['power']:g}{SPACE}%"
    return (
        f"A true difference in {title}{against} of {decimal(found['difference'])}{share} is found{sure}; "
        "smaller ones may be missed."
    )
