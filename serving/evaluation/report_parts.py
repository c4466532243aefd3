"""The parts of a report's page: facts, figures and tables, from the report's JSON alone; what is missing is said."""

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
    finite,
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
        self.report = {key: value for key, value in report.items() if value is not None}
        self.decisive = str(self.report.get("decisive", "ndcg@10"))
        self.title, self.k = known(self.decisive)[1], self.decisive.partition("@")[2]
        self.ks = sorted(self.report.get("ks", []))
        self.figures = {name: dict(figures) for name, figures in self.report.get("figures", {}).items() if figures}
        kinds = self.report.get("listers", {})
        self.path = [name for name in STAGES if name in self.figures]
        self.path += [name for name in self.figures if kinds.get(name) == "stage" and name not in self.path]
        baselines = [name for name in self.figures if kinds.get(name) == "baseline"]
        self.baselines = sorted(baselines, key=lambda name: -self._mean(name))
        """From the best."""

    def _estimate(self, lister: str, metric: str) -> Estimate | None:
        return Estimate.of(self.figures.get(lister, {}).get(metric))

    def _mean(self, lister: str) -> float:
        found = self._estimate(lister, self.decisive)
        return 0.0 if found is None else found.mean

    def standing(self) -> tuple[str, str]:
        """Colour and word of the first line."""
        if self.report.get("leaks", {}).get("found"):
            return "red", "Leaks found"
        if not self.baselines:
            return "amber", "Beside no baseline"
        if self.report.get("beats"):
            return "green", "Beats every baseline"
        if all(self._mean("model") > self._mean(name) for name in self.baselines):
            return "amber", "Not shown to beat every baseline"
        return "red", "Does not beat every baseline"

    def facts(self) -> list[tuple[str, str]]:
        """What was judged, where and by what."""
        data, protocol, clock = (self.report.get(name) or {} for name in ("dataset", "protocol", "clock"))
        counts = ", ".join(count(data[noun], noun) for noun in ("users", "events", "items") if noun in data)
        judged = [count(self.report[noun], noun) for noun in ("users", "targets") if noun in self.report]
        odd = {"underfilled": "shorter than asked", "popular": "of popularity alone, for users without a known item"}
        lists = [f"{count(self.report[key], 'lists')} {text}" for key, text in odd.items() if self.report.get(key)]
        facts = {
            "Protocol": protocol.get("text") or protocol.get("name"),
            "Data set": ": ".join(part for part in (data.get("recipe"), counts) if part),
            "Judged": "; ".join(filter(None, [", ".join(judged), *lists])),
            "What this test can tell": detectable(self.report.get("mdd", {}), self.title),
            "Bundle": self.report.get("bundle"),
            "Hash of the data set": data.get("hash"),
            "Machine": self.report.get("machine") or clock.get("machine"),
            "Made": clock.get("created") or self.report.get("created"),
            "Seed of the intervals": self.report.get("seed"),
        }
        return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]

    def tables(self) -> Iterable[Table]:
        """All listers at the deciding k and the longest list, and the model at every k."""
        listers = [*self.path, *self.baselines]
        same = [
            word
            for word, other in SAME.items()
            if all(
                self.figures[name].get(f"{word}@{self.k}") == self.figures[name].get(f"{other}@{self.k}") for name in listers
            )
        ]
        words = [word for word in RIGHT if word not in same]
        names = [f"{word}@{self.k}" for word in words]
        names += [f"{word}@{self.ks[-1]}" for word in RIGHT[:2] if self.ks and str(self.ks[-1]) != self.k]
        note = "".join(f" {METRICS[word].title} equals {METRICS[SAME[word]].title} here." for word in same)
        title = "The model, the stages of its served path, and the baselines"
        yield self._by_lister(title, names, f"Means over users with their 95 % interval.{note}")
        rows = [
            [count(k, "items"), *(written(word, self.figures.get("model", {}).get(f"{word}@{k}")) for word in words)]
            for k in self.ks
        ]
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
        metric = METRICS[word].title
        title, found = f"{metric} against the length of the list", {}
        for name in ("model", *self.baselines):
            by_k = {k: self._estimate(name, f"{word}@{k}") for k in self.ks}
            found[name] = {k: estimate for k, estimate in by_k.items() if estimate is not None}
        model, others = found.pop("model"), {name: by_k for name, by_k in found.items() if by_k}
        if not model:
            return Drawing(title, "No figure: the report has no such figures of the model.")
        last = max(model)
        told = [f"{name} {decimal(by_k[last].mean)}" for name, by_k in {"model": model, **others}.items() if last in by_k]
        text = "The model’s band is its 95 % interval."
        if others:
            text += " Where a baseline’s line is in the band or above it, the model is hardly better at that k, or worse."
        return Drawing(title, text, against_k(metric, model, others), f"{metric}@{last}: {', '.join(told)}")

    def stages(self) -> Drawing:
        title = "What each stage of the served path gains or loses"
        path = [(name, found) for name in self.path if (found := self._estimate(name, self.decisive)) is not None]
        if len(path) < 2:
            return Drawing(title, "No figure: what was judged has one stage, so that nothing is gained or lost between two.")
        rows, before = [], 0.0
        for name, found in path:
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
        for part in self.report.get("slices", []):
            groups.setdefault(str(part.get("by")), []).append(part)
        return [self._slices(by, parts) for by, parts in groups.items()] or [
            Drawing("Slices", "No figure: the report has no slices.")
        ]

    def _slices(self, by: str, parts: list[Mapping[str, Any]]) -> Drawing:
        rows = []
        for part in parts:
            model, other = (Estimate.of((part.get(key) or {}).get(self.decisive)) for key in ("figures", "best_baseline"))
            rows.append(Row(str(part.get("slice")), count(part.get("users"), "users"), model, other.mean if other else None))
        title = f"{self.title} by {by}"
        told = [(row, row.estimate.mean) for row in rows if row.estimate is not None]
        if not told:
            return Drawing(title, "No figure: no slice has figures.")
        baselines = dict.fromkeys((part.get("best_baseline") or {}).get("name") for part in parts)
        beside = "/".join(str(name) for name in baselines if name)
        text = f"The model with its 95 % interval{f', and {beside}' if beside else ''}."
        if parts[0].get("of") == "targets":
            text += " Users count by their targets of that kind alone."
        label = "; ".join(
            f"{row.name} {decimal(mean)}" + (f", {beside} {decimal(row.other)}" if row.other is not None else "")
            for row, mean in told
        )
        svg = forest(by, f"{self.title} (0 to 1)", rows, ("model, 95 % interval", beside))
        return Drawing(title, text, svg, f"{title}: {label}")

    def slice_table(self) -> Table:
        metrics, rows = list(dict.fromkeys([self.decisive, f"recall@{self.k}"])), []
        for part in self.report.get("slices", []):
            figures, best, share = part.get("figures") or {}, part.get("best_baseline") or {}, written_share(part.get("share"))
            rows.append(
                [
                    f"{part.get('by')}: {part.get('slice')}",
                    count(part.get("users"), "users"),
                    share if share == NONE else f"{share} of {part.get('of', 'users')}",
                    *(written(metric, figures.get(metric)) for metric in metrics),
                    f"{best['name']} {written(self.decisive, best.get(self.decisive))}" if best.get("name") else NONE,
                ]
            )
        head = ["Slice", "Users", "Share", *(known(metric)[1] for metric in metrics), f"Best baseline, {self.title}"]
        text = "Means over the users of a slice with their 95 % interval."
        left = self.report.get("columns_left_out")
        return Table(
            "Every slice", head, rows, text + (f" Columns that make no slices: {', '.join(map(str, left))}." if left else "")
        )

    def cold(self) -> Table:
        metrics = [self.decisive, f"recall@{self.k}"]
        rows = [
            [f"{slice_}: {lister}", *(written(metric, (figures or {}).get(metric)) for metric in metrics)]
            for slice_, by in self.report.get("cold", {}).items()
            for lister, figures in by.items()
        ]
        text = (
            "Targets with training events (warm) and without (cold), in full lists, and cold ones in lists of cold items alone."
        )
        return Table("Cold and warm items", ["Targets: lists of", *(known(metric)[1] for metric in metrics)], rows, text)

    def popularity(self) -> tuple[Drawing, Table]:
        groups, title = self.report.get("popularity", []), "Popularity against recommendation"
        kinds = {"events": "events", "targets": "targets", "lists": f"places, k = {self.k}"}
        head = ["Items", "Count", "Of training events", "Of targets", f"Of the model’s places, k = {self.k}"]
        rows = [
            [str(each.get("items")), count(each.get("count"), "items"), *(written_share(each.get(key)) for key in kinds)]
            for each in groups
        ]
        table = Table("Shares by popularity", head, rows)
        if not groups:
            return Drawing(title, "No figure: the report has no shares by popularity."), table
        text = (
            f"The share of training events, of targets and of the model’s first {self.k} places that each group of items has. "
            "More places than targets: shown more than wanted; fewer: shown less."
        )
        bars = {name: [finite(each.get(key)) for each in groups] for key, name in kinds.items()}
        label = "; ".join(f"{row[0]}: {row[2]} of events, {row[3]} of targets, {row[4]} of places" for row in rows)
        return Drawing(title, text, shares([(row[0], row[1]) for row in rows], bars), label), table

    def calibration(self) -> Drawing:
        title, found = "Calibration of probabilities", self.report.get("calibration", {})
        bins = []
        for each in found.get("bins") or []:
            predicted, observed = finite(each.get("probability")), Estimate.of({**each, "mean": each.get("observed")})
            if predicted is not None and observed is not None:
                bins.append((predicted, observed))
        if not bins:
            return Drawing(title, "No figure: what was judged gives no probabilities, or they were not checked.")
        places = sum(int(finite(each.get("places")) or 0) for each in found["bins"])
        error = finite(found.get("error"))
        text = f"How many of the items with such a probability really came next; {count(places, 'places')} of lists in all."
        text += "" if error is None else f" Calibration error, the mean distance between the two: {percent(error)}."
        label = "; ".join(f"predicted {percent(predicted)}, observed {percent(observed.mean)}" for predicted, observed in bins)
        return Drawing(title, text, reliability(bins), label)

    def learning(self) -> list[Drawing]:
        entries, out = self.report.get("learning", []), []
        for part in dict.fromkeys(str(each.get("part")) for each in entries):
            own = [each for each in entries if str(each.get("part")) == part]
            metric = next(
                (name for name in (self.decisive, "ndcg@10") if any(finite(each.get(name)) is not None for each in own)), "loss"
            )
            worths, losses = (
                {int(each["epoch"]): number for each in own if (number := finite(each.get(name))) is not None}
                for name in (metric, "loss")
            )
            if not losses and not worths:
                continue
            worths = {} if metric == "loss" else worths
            text = "Where both fall, training events are learnt by heart, no longer what comes next. The best epoch is marked."
            told = ", ".join(f"epoch {epoch} {decimal(number)}" for epoch, number in (worths or losses).items())
            title, name = f"Learning of the {part}", known(metric)[1]
            out.append(
                Drawing(
                    title, text if worths and losses else "", epochs(part, name, worths, losses), f"{title}, {name}: {told}"
                )
            )
        return out or [Drawing("Learning", "No figure: what was judged has no record of its training.")]

    def examples(self) -> list[dict[str, Any]]:
        """Users' histories, targets and lists, as texts."""
        return [_example(example) for example in self.report.get("examples", [])]

    def leaks(self) -> dict[str, list[str]]:
        """What was looked for and what was found, as texts."""
        leaks = self.report.get("leaks", {})
        return {name: [_check(check) for check in leaks.get(name) or []] for name in ("checked", "found")}


def detectable(found: Mapping[str, Any], title: str) -> str | None:
    """What difference a test finds, in a sentence."""
    difference, relative, power = (finite(found.get(name)) for name in ("difference", "relative", "power"))
    if difference is None:
        return None
    share = "" if relative is None else f" ({percent(relative)})"
    against = f" to {found['against']}" if found.get("against") else ""
    sure = "" if power is None else f" with a probability of {100 * power:g}{SPACE}%"
    return f"A true difference in {title}{against} of {decimal(difference)}{share} is found{sure}; smaller ones may be missed."


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    places, targets = example.get("list") or [], [str(title) for title in example.get("targets") or []]
    return {
        "user": str(example.get("user_id")),
        "events": count(example.get("events"), "events"),
        "history": [str(title) for title in example.get("history") or []],
        "targets": targets,
        "more": max(0, int(finite(example.get("targets_in_all")) or 0) - len(targets)),
        "hits": sum(bool(place.get("hit")) for place in places),
        "list": [
            {
                "title": str(place.get("title")),
                "score": NONE if (score := finite(place.get("score"))) is None else decimal(score, 2),
                "because": place.get("because"),
                "hit": bool(place.get("hit")),
            }
            for place in places
        ],
    }


def _check(check: Any) -> str:
    """A check for leaks, given as its name or with what it means and how many rows it found."""
    if not isinstance(check, Mapping):
        return str(check)
    told = ": ".join(str(check[key]) for key in ("name", "text", "meaning") if check.get(key))
    return told + (f" ({count(check['found'], 'rows')})" if finite(check.get("found")) else "")
