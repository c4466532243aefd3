"""Figures of reports as SVG within a page: text stays text, colours are the page's, the same numbers give the same bytes."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.evaluation.numbers import Estimate, decimal, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 4.4
"""Inches; at 72 px an inch the type is 10 px high on a phone 390 px wide."""
INK, QUIET, GRID, CARD = "#161b22", "#586271", "#dde1e7", "#fefefe"
MODEL, OTHERS, REST = "#0072b2", ("#d55e00", "#007f5c", "#b0568f", "#8a6d00"), "#9aa3ae"
COLOURS = {
    INK: "ink", QUIET: "quiet", GRID: "line", CARD: "card", MODEL: "model", REST: "rest",
    **{colour: f"other-{number}" for number, colour in enumerate(OTHERS, 1)},
}  # fmt: skip
"""The page's variables by what is drawn with; Okabe and Ito's colours, some darkened to be read on white."""
MARKS, DASHES = ("s", "^", "D", "v"), ((5, 1.5), (1.5, 1.5), (6, 1.5, 1.5, 1.5), (3, 3))
"""Markers and dashes of the others' lines, told apart without colour too."""
STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.labelsize": 9, "xtick.labelsize": 9,
    "ytick.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False, "legend.handlelength": 2.4, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID,
    "grid.linewidth": 0.7, "axes.axisbelow": True, "lines.linewidth": 1.5, "lines.markersize": 4, "hatch.linewidth": 0.6,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of a forest plot: a name, a note below it, an estimate, and another figure beside it."""

    name: str
    note: str
    estimate: Estimate
    other: float | None = None
    strong: bool = True
    """Filled; else hollow."""


def against_k(metric: str, model: Mapping[int, Estimate], others: Mapping[str, Mapping[int, Estimate]]) -> str:
    """A metric's course over k: the model with its interval, of the others the four first ones by name, the rest in grey."""

    def draw(figure: Figure) -> None:
        axes, look = figure.subplots(), dict[str, Any]()
        for number, (name, by_k) in enumerate(others.items()):
            at = list(by_k), [estimate.mean for estimate in by_k.values()]
            if number < len(OTHERS):
                look = {"color": OTHERS[number], "marker": MARKS[number], "dashes": DASHES[number], "zorder": 3}
                axes.plot(*at, **look, label=short(name, 20))
            else:
                label = f"{len(others) - len(OTHERS)} more" if number == len(OTHERS) else None
                axes.plot(*at, color=REST, linewidth=0.8, label=label, zorder=2)
        ends = {k: estimate.numbers[1:] for k, estimate in model.items() if estimate.numbers[1:]}
        band: dict[str, Any] = {"color": MODEL, "alpha": 0.22, "linewidth": 0, "zorder": 3}
        axes.fill_between(list(ends), [low for low, _ in ends.values()], [high for _, high in ends.values()], **band)
        look = {"color": MODEL, "marker": "o", "linewidth": 2.2, "label": "model", "zorder": 4}
        axes.plot(list(model), [estimate.mean for estimate in model.values()], **look)
        ks = sorted({k for by_k in (model, *others.values()) for k in by_k})
        axes.set_xscale("log")
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda number, _: _tick(number))
        axes.set(ylim=(0, None), xlabel="k (items in the list)", ylabel=f"{metric}@k (0 to 1)")
        lines, names = axes.get_legend_handles_labels()
        figure.legend([lines[-1], *lines[:-1]], [names[-1], *names[:-1]], loc="outside lower center", ncols=2)

    return _svg(f"{metric} against k", 3.1 + 0.1 * min(len(others) + 1, 6), draw)


def forest(by: str, axis: str, rows: Sequence[Row], names: tuple[str, str] = ("model", ""), zero: bool = False) -> str:
    """Estimates with intervals, one a line; `names` are the estimate's and the other figure's, `zero` draws a line at 0."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if zero:
            axes.axvline(0, color=QUIET, linewidth=1.2, zorder=2)
        label: str | None = names[0]
        for place, row in enumerate(rows):
            if len(row.estimate.numbers) == 3:
                axes.plot(row.estimate.numbers[1:], [place] * 2, color=MODEL, linewidth=2.2, zorder=3)
            fill = MODEL if row.strong else CARD
            look: dict[str, Any] = {"markersize": 6.5, "linestyle": "none", "markeredgecolor": MODEL, "markerfacecolor": fill}
            axes.plot(row.estimate.mean, place, marker="o", color=MODEL, label=label, zorder=4, **look)
            label = None
        at = [(row.other, place) for place, row in enumerate(rows) if row.other is not None]
        if at:
            look = {"marker": "D", "markersize": 6, "linestyle": "none", "markerfacecolor": "none"}
            axes.plot(*zip(*at, strict=True), **look, color=OTHERS[0], label=names[1], zorder=5)
        axes.set_yticks(range(len(rows)), [_lines(row.name, row.note) for row in rows])
        axes.margins(x=0.08)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda number, _: _tick(number))
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=axis, ylabel=textwrap.fill(short(by, 40), 8 + 6 * len(rows)))
        if at:
            figure.legend(loc="outside upper center", ncols=2)

    return _svg(f"{by} {axis}", 1.15 + sum(0.22 + 0.13 * _lines(row.name, row.note).count("\n") for row in rows), draw)


def shares(groups: Sequence[tuple[str, str]], bars: Mapping[str, Sequence[float]]) -> str:
    """Shares of each group (name, note) as bars side by side, each with its number."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        thick, most = 0.8 / len(bars), max(max(each) for each in bars.values())
        looks = [("", REST), ("///", OTHERS[0]), ("", MODEL)]
        for number, (name, values) in enumerate(bars.items()):
            hatch, colour = looks[number]
            places = [place + (number - (len(bars) - 1) / 2) * thick for place in range(len(groups))]
            fill: dict[str, Any] = {"facecolor": CARD if hatch else colour, "edgecolor": colour, "hatch": hatch}
            axes.barh(places, [100 * share for share in values], thick * 0.86, label=name, **fill)
            for place, share in zip(places, values, strict=True):
                axes.annotate(percent(share), (100 * share, place), (3, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(groups)), [_lines(name, note) for name, note in groups])
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.set(xlim=(0, 100 * most * 1.22), ylim=(len(groups) - 0.5, -0.5))
        axes.set(xlabel="share (%)", ylabel="items by their events in training")
        figure.legend(loc="outside upper center", ncols=len(bars))

    return _svg("popularity", 1.1 + 0.58 * len(groups), draw)


def reliability(bins: Sequence[tuple[float, Estimate]]) -> str:
    """Observed shares against predicted probabilities, with the line where both are equal."""

    from matplotlib.ticker import LogLocator, NullLocator

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        seen = [100 * number for predicted, observed in bins for number in (predicted, observed.mean) if number > 0]
        floor, top = min(seen, default=0.1) / 2, min(100.0, max(seen, default=100.0) * 1.6)
        wide = top > 30 * floor  # the probabilities of next items are mostly small
        floor = floor if wide else 0.0
        axes.plot([floor, top], [floor, top], color=QUIET, dashes=(4, 2), linewidth=1, label="as predicted", zorder=2)
        for predicted, observed in bins:
            ends = [max(100 * number, floor) for number in observed.numbers[1:]]
            axes.plot([100 * predicted] * len(ends), ends, color=MODEL, linewidth=2.2, zorder=3)
        at = [100 * predicted for predicted, _ in bins], [max(100 * observed.mean, floor) for _, observed in bins]
        axes.plot(*at, color=MODEL, marker="o", markersize=5.5, linestyle="none", label="model, with 95 % interval", zorder=4)
        scale = "log" if wide else "linear"
        axes.set(xscale=scale, yscale=scale, xlim=(floor, top), ylim=(floor, top))
        for side in (axes.xaxis, axes.yaxis):
            if wide:
                subs = (1, 2, 5) if top < 1000 * floor else (1,)
                side.set_major_locator(LogLocator(subs=subs))
                side.set_minor_locator(NullLocator())
            side.set_major_formatter(lambda number, _: f"{number:g}")
        axes.set(xlabel="predicted probability (%)", ylabel="observed share (%)")
        figure.legend(loc="outside upper center", ncols=2)

    return _svg("calibration", 3.5, draw)


def epochs(metric: str, worths: Mapping[int, float], losses: Mapping[int, float]) -> str:
    """A metric on validation, where it was measured, over the loss of training, by epoch."""

    def draw(figure: Figure) -> None:
        curves = [(f"{metric} on\nvalidation (0 to 1)", worths, MODEL), ("training loss\n(mean per target)", losses, OTHERS[0])]
        curves = curves if worths else curves[1:]
        panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, by_epoch, colour) in zip(panels, curves, strict=True):
            axes.plot(list(by_epoch), list(by_epoch.values()), color=colour, marker="o" if len(by_epoch) < 25 else None)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.locator_params(axis="y", nbins=5)
            axes.set_ylabel(name)
        if worths:
            best = max(worths, key=lambda epoch: worths[epoch])
            mark: dict[str, Any] = {"markersize": 9, "markerfacecolor": "none", "markeredgecolor": INK}
            panels[0].plot(best, worths[best], "o", **mark, label=f"best: {decimal(worths[best])}, epoch {best}")
            figure.legend(loc="outside upper center")
        panels[-1].set_xlabel("epoch (passes over the training events)")
        figure.align_ylabels()

    return _svg("learning model", 3.4, draw)


def short(text: str, length: int) -> str:
    """In one line, and cut with an ellipsis where it is longer."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _lines(name: str, note: str) -> str:
    """A name in at most two lines, its note in one more."""
    lines = textwrap.wrap(short(name, 42), 22)[:2]
    return "\n".join([*lines, note] if note else lines)


def _tick(number: float) -> str:
    """A number of an axis, as short as it can be."""
    text = f"{abs(number):.4f}".rstrip("0").rstrip(".") or "0"
    return ("\N{MINUS SIGN}" if number < 0 and text != "0" else "") + (text[1:] if text.startswith("0.") else text)


def _svg(name: str, height: float, draw: Callable[[Figure], None]) -> str:
    """What `draw` puts into a figure, without what a file of its own would need; `name` keeps its ids apart from others'."""
    import matplotlib
    from matplotlib.figure import Figure

    out, nothing = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # signs that the font by which widths are guessed does not have
        matplotlib.rcdefaults()  # nothing of a user's own style
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _inline(out.getvalue())


def _inline(svg: str) -> str:
    """The figure's element alone, in the page's font and colours; what stands between tags is left as it is."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    return "".join(_tag(part) if part.startswith("<") else part.strip("\n ") for part in re.split(r"(<[^>]*>)", svg))


def _tag(tag: str) -> str:
    tag = re.sub(r' id="[\w.]+_\d+"| font-family: [^;"]*;| transform="rotate\(-0 [^"]*"', "", tag)
    tag = re.sub(r"#[0-9a-f]{6}\b", lambda found: f"var(--{COLOURS[found[0]]})" if found[0] in COLOURS else found[0], tag)
    return re.sub(r"(\d\.\d\d)\d+|\s*\n", r"\1 ", tag).replace("xlink:href", "href")
