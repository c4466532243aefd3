"""What carried a recommendation: the attention and the drop of each event and word, and how true either is.

The *attention* of an event is its share of what the last state draws from, or where a ranker is served of what the item draws
from; its *drop* is how much the item's score falls
without it. A drop is true of its event by definition, attention need not be. Either is tested by leaving several events out
together: does the sum of their attentions, or of their drops, tell how far the score falls (the linear datamodeling score, Park
et al. 2023)?

T events · S events and the mask behind them, if the model has one · L layers · H heads · G groups of events · B histories
N lines of a description
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys.batch import FIRST_ITEM, PADDING, Batch, gather
from recsys.content import ContentEncoder, Described
from recsys.errors import RequestError
from recsys.text import without_words
from serving.engine import Recommender
from serving.filters import until
from serving.lists import Lists

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

GROUPS = 32
"""Groups of events that are left out together."""
FEWEST = 4
"""Events from which on there are groups of two or more that are not all of them."""
WORDS = 32
"""Words of an item's text that are left out, the first ones."""
EVENTS = 50
"""Last events of a history by which a bundle is measured."""
TRUSTED = 0.5
"""Correlation below which a figure is called not to be trusted: half of the order, at most, is that of the truth."""
FIGURES = ("attention_with_drops", "attention_on_groups", "drops_on_groups")
"""Rank correlations (Spearman) of the events' attention with their drops, and of the summed attention and the summed drops of
groups with what happens without them; None where there is nothing to compare."""
NEXT = "(next)"
"""Title of the mask."""
DRAWN = 100
"""Events that a picture shows, the last ones."""

Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Explanation:
    """What carried the score of one item for one history."""

    bundle: str
    item: dict[str, Any]
    """item_id, title and score; where item vectors hold text, `words`: the drop of each word of its own, largest first."""
    events: list[dict[str, Any]]
    """Those that the model reads, oldest first: event (its number in the history), item_id, title, attention (together 1) and
    drop; where states attend to words, `words`: their shares (together 1), largest first. A mask has neither id nor drop."""
    figures: Figures
    """Of this history."""
    bundle_figures: Mapping[str, Any] | None
    """Means over the histories of a data set, and how many; None for a run, or a bundle that was made without a data set."""
    weights_LHSS: Tensor
    """Attention by layer and head; each line sums to 1, or is 0 where the history left the model before."""

    def as_dict(self) -> dict[str, Any]:
        """All but the weights; ready for JSON."""
        faithfulness = {"history": dict(self.figures), "bundle": self.bundle_figures and dict(self.bundle_figures)}
        about = {"bundle": self.bundle, "item": self.item, "events": self.events}
        return {**about, "faithfulness": faithfulness, "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """Whether attention and sums of drops are to be trusted, with the figures that say so: one sentence."""
        bundle = self.bundle_figures or {}
        agreed, summed, drops = ((self.figures[name], bundle.get(name)) for name in FIGURES)
        known = [figure for figure in agreed if figure is not None]
        if not known:
            lead = "Nothing tells whether attention is to be trusted here"
        elif min(known) < TRUSTED:
            lead = "Do not trust attention here"
        else:
            lead = "Attention is a fair hint here"
        beside = f"mean over {bundle.get('histories')} histories: "
        said = f"{lead}: its rank correlation with the drops is {_both(*agreed, beside)}; where several events are left out "
        said += f"together, that of summed attention with the truth is {_both(*summed)}, of summed drops {_both(*drops)}"
        if drops[0] is not None and drops[0] < TRUSTED:
            said += ", so that drops do not add up here"
        if len(self.events) < FEWEST:
            said += f"; unknown, since this history has fewer than {FEWEST} events"
        if bundle:
            return f"{said}."
        return f"{said}; other histories were not measured: `recsys export --dataset` does it for a bundle."


def _both(here: float | None, mean: float | None, beside: str = "") -> str:
    said = "unknown" if here is None else f"{here:.2f}"
    return said if mean is None else f"{said} ({beside}{mean:.2f})"


@torch.inference_mode()
def explain(
    recommender: Recommender,
    history: Sequence[int | str],
    generator: torch.Generator,
    *,
    item: int | str | None = None,
    times: Sequence[int] | None = None,
    now: int | None = None,
) -> Explanation:
    """What carried an item (default: the first that is recommended) for a history, both by ids or titles.

    Events are left out of what the model reads of the history at `now`; no older one moves up. The generator draws the groups.
    Raises RequestError: an unknown item, one that the model knows nothing of, a history of which it knows nothing; as
    Recommender.request. SetupError: the encoder of the items' text is not there.
    """
    catalogue = recommender.catalogue
    batch, now = recommender.request([catalogue.resolve(word) for word in history], times, now)
    asked_for = None if item is None else catalogue.resolve(item)
    first = recommender.recommend(batch, 1, now)
    row = int(first.rows[0, 0]) if asked_for is None else asked_for
    if bool(first.popular[0]):
        raise RequestError("the model knows nothing of this history, so popularity made the list; give an item that was learnt")
    if row == PADDING:
        raise RequestError("no item is left to recommend; name one to explain")
    if row - FIRST_ITEM >= recommender.lines or not recommender.reads(np.array([row]))[0]:
        raise RequestError(f"the model knows nothing of item {str(item)!r}, so nothing carried it; name another")
    read, before = _as_read(recommender, batch, now)
    found = _measure(recommender, read, row, now, generator)
    rows: list[int | None] = [*read.values.tolist(), *[None] * (len(found.shares_S) - len(read.values))]
    drops: list[float | None] = [*found.drops_T.tolist(), *[None] * (len(rows) - len(found.drops_T))]
    events: list[dict[str, Any]] = [
        {"event": before + place, **_named(recommender, row), "attention": share, "drop": drop}
        for place, (row, share, drop) in enumerate(zip(rows, found.shares_S.tolist(), drops, strict=True), 1)
    ]
    for event, words in zip(events, _words(recommender, read, now, len(rows)) or [], strict=False):
        event["words"] = _ranked(words)
    told: dict[str, Any] = {**_named(recommender, row), "score": found.score}
    own = _own_words(recommender, read, row, now)
    if own is not None:
        told["words"] = _ranked(own)
    figures, measured = found.figures, recommender.manifest.get("faithfulness")
    return Explanation(recommender.id, told, events, figures, measured, found.weights_LHSS.cpu())


@torch.inference_mode()
def reasons(
    recommender: Recommender, batch: Batch, rows: Sequence[int], now: int | None, most: int = 3
) -> list[list[dict[str, Any]]]:
    """For each of several items the events of one history with the largest drops: event, item_id, title and drop.

    An event whose drop is not above 0 carried nothing and is left out.
    """
    read, before = _as_read(recommender, batch, now)
    events, device = len(read.values), read.values.device
    if not events or not rows:
        return [[] for _ in rows]
    out = torch.cat([torch.zeros(1, events, dtype=torch.bool), torch.eye(events, dtype=torch.bool)])
    scores = recommender.score(_without(read, out.to(device)), torch.tensor([list(rows)] * len(out)), now).double()
    drops_TK, places = scores[0] - scores[1:], read.values.tolist()
    largest = drops_TK.topk(min(most, events), dim=0)
    return [
        [
            {"event": before + place + 1, **_named(recommender, places[place]), "drop": drop}
            for place, drop in zip(largest.indices[:, number].tolist(), largest.values[:, number].tolist(), strict=True)
            if drop > 0
        ]
        for number in range(len(rows))
    ]


@torch.inference_mode()
def nearest_events(recommender: Recommender, histories: Batch, lists: Lists) -> pl.Series:
    """Of each place that holds an item, list by list, the item of the history whose vector is nearest by cosine: `because`.

    Null where the list is of popularity. A reason that costs next to nothing; `reasons` measures what an event carried.
    """
    import polars as pl

    ways, rows = recommender.directions, []
    for place, history in enumerate(torch.tensor_split(histories.values, histories.offsets[1:-1])):
        listed = lists.rows[place][lists.rows[place] != PADDING]
        known = history[(history >= FIRST_ITEM) & (history < FIRST_ITEM + recommender.lines)]
        if bool(lists.popular[place]) or not len(known):
            rows.append(torch.zeros_like(listed))
            continue
        listed_KE, known_TE = (ways.at((some - FIRST_ITEM).numpy()) for some in (listed, known))
        rows.append(known[torch.from_numpy((listed_KE @ known_TE.T).argmax(1))])
    rows_N = torch.cat([*rows, torch.zeros(0, dtype=torch.int64)])
    item_ids = recommender.catalogue.items["item_id"].gather((rows_N - FIRST_ITEM).clamp(min=0).numpy())
    return item_ids.alias("because").set(pl.Series((rows_N == PADDING).numpy()), None)


@torch.inference_mode()
def attention(recommender: Recommender, batch: Batch, now: int | None) -> list[dict[str, Any]]:
    """What the last state draws from each event that the model reads: event, item_id, title, share (together 1), and `layers`,
    by layer the share of each head. Where the model has a mask, it draws from that too, which is left out.
    """
    read, before = _as_read(recommender, batch, now)
    events = len(read.values)
    if not events:
        return []
    asked = None if now is None else torch.tensor([now], device=read.values.device)
    weights_LHS = torch.cat(recommender.model.attention(read, asked, recommender.leave))[:, :, -1, :events].double().cpu()
    shares_S = weights_LHS.mean((0, 1))
    shares_S = shares_S / shares_S.sum().clamp(min=1e-12)
    layers_SLH = weights_LHS.permute(2, 0, 1).tolist()
    return [
        {"event": before + place, **_named(recommender, row), "share": share, "layers": layers}
        for place, (row, share, layers) in enumerate(zip(read.values.tolist(), shares_S.tolist(), layers_SLH, strict=True), 1)
    ]


def _as_read(recommender: Recommender, batch: Batch, now: int | None) -> tuple[Batch, int]:
    """What the model reads of a history, and how many events stand before that."""
    batch = batch.to(recommender.scan.vectors_VE.device)
    whole = batch if now is None else until(batch, torch.tensor([now], device=batch.values.device))
    read = recommender.model.readable(whole)
    return read, len(whole.values) - len(read.values)


@torch.inference_mode()
def faithfulness(
    recommender: Recommender, histories: Batch, now_B: Tensor | None, generator: torch.Generator
) -> dict[str, float | int | None]:
    """The mean of each of FIGURES over histories, each for its first item and by its last EVENTS events, and how many.

    A history of which the model knows nothing, or for which no item is left, does not count.
    """
    last = recommender.model.readable(histories if now_B is None else until(histories, now_B)).last(EVENTS)
    lists = recommender.recommend(last, 1, now_B)
    found = []
    for place in ((lists.rows[:, 0] != PADDING) & ~lists.popular).nonzero().flatten().tolist():
        read = gather(last.values, last.times, *last.offsets[place : place + 2, None])
        now = None if now_B is None else int(now_B[place])
        found.append(_measure(recommender, read, int(lists.rows[place, 0]), now, generator).figures)
    means: dict[str, float | int | None] = {}
    for name in FIGURES:
        known = [figure for figure in (figures[name] for figures in found) if figure is not None]
        means[name] = round(statistics.fmean(known), 4) if known else None
    return {**means, "histories": len(found)}


@dataclass(frozen=True)
class _Measured:
    score: float
    shares_S: Tensor
    drops_T: Tensor
    weights_LHSS: Tensor

    figures: dict[str, float | None]


def _measure(recommender: Recommender, read: Batch, row: int, now: int | None, generator: torch.Generator) -> _Measured:
    """Attention and drops of the T events of one history, which the model reads all, and their figures."""
    events, asked = len(read.values), None if now is None else torch.tensor([now], device=read.values.device)
    weights_LHSS = torch.cat(recommender.model.attention(read, asked, recommender.leave))
    shares_S = weights_LHSS[:, :, -1].double().mean((0, 1))
    looked_T = recommender.looked_at(read, row, now)
    if looked_T is not None:  # the ranker decides the score, and looks anew for each item
        shares_S = pad(looked_T.double(), (0, len(shares_S) - events))
    shares_S = shares_S / shares_S.sum().clamp(min=1e-12)  # of the layers that the history went through
    groups_GT = _groups(events, generator)
    out = torch.cat([torch.zeros(1, events, dtype=torch.bool), torch.eye(events, dtype=torch.bool), groups_GT])
    scores = recommender.score(_without(read, out.to(read.values.device)), torch.full((len(out), 1), row), now)
    drops = scores[0].double() - scores[1:, 0].double()
    drops_T, together_G = drops[:events], drops[events:]
    shares_T, held_GT = shares_S[:events].cpu(), groups_GT.double()
    pairs = [(shares_T, drops_T), (held_GT @ shares_T, together_G), (held_GT @ drops_T, together_G)]
    figures = {name: spearman(*pair) for name, pair in zip(FIGURES, pairs, strict=True)}
    return _Measured(float(scores[0]), shares_S, drops_T, weights_LHSS, figures)


def _groups(events: int, generator: torch.Generator) -> Tensor:
    """Random groups of a quarter to a half of the events, at least two; bool, shape G × T, without a line below FEWEST."""
    if events < FEWEST:
        return torch.zeros(0, events, dtype=torch.bool)
    sizes_G = torch.randint(max(2, -(-events // 4)), events // 2 + 1, (GROUPS,), generator=generator)
    return torch.rand(GROUPS, events, generator=generator).argsort(1).argsort(1) < sizes_G[:, None]


def _without(read: Batch, out_GT: Tensor) -> Batch:
    """One history without each of G groups of its events, the times of the others as they are."""
    lengths_G = (~out_GT).sum(1)
    values, times = (flat.expand(out_GT.shape)[~out_GT] for flat in (read.values, read.times))
    return Batch(values, torch.cat([lengths_G.new_zeros(1), lengths_G.cumsum(0)]), times)


def spearman(one: Tensor, other: Tensor) -> float | None:
    """Rank correlation, equal values at their mean rank; None of fewer than three, or where all of either are equal."""
    if len(one) < 3:
        return None
    ranks = torch.stack([(values[:, None] > values).sum(1) - (values[:, None] < values).sum(1) for values in (one, other)])
    ranks = ranks.double()  # twice their distance from the mean rank
    size = ranks.square().sum(1).prod().sqrt()
    return max(-1.0, min(1.0, float(ranks.prod(0).sum() / size))) if size > 0 else None


def _named(recommender: Recommender, row: int | None) -> dict[str, Any]:
    if row is None:
        return {"item_id": None, "title": NEXT}
    return {"item_id": recommender.catalogue.item_id(row), "title": recommender.catalogue.title(row)}


def _ranked(words: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(words.items(), key=lambda word: -word[1]))


def _words(recommender: Recommender, read: Batch, now: int | None, places: int) -> list[dict[str, float]] | None:
    """How much the last state draws from each word of each event's item; None where the model reads no words."""
    asked = None if now is None else torch.tensor([now], device=read.values.device)
    shares_1HUL = recommender.model.attention_to_text(read, asked)
    if shares_1HUL is None:
        return None
    encoder, texts = _encoder(recommender), recommender.catalogue.described.texts
    rows = read.values.tolist()
    rows += [PADDING] * (places - len(rows))
    words: list[dict[str, float]] = [{} for _ in rows]
    shares_UL = shares_1HUL[0].mean(0)
    for place in range(max(0, len(rows) - len(shares_UL)), len(rows)):
        if rows[place] < FIRST_ITEM or rows[place] - FIRST_ITEM >= len(texts):
            continue
        for word, share in zip(
            encoder.text.words(texts[rows[place] - FIRST_ITEM]), shares_UL[place - len(rows)].tolist(), strict=False
        ):
            words[place][word] = words[place].get(word, 0.0) + share
    return words


def _own_words(recommender: Recommender, read: Batch, row: int, now: int | None) -> dict[str, float] | None:
    """How much the item's score drops without each word of its text; None where item vectors hold no text."""
    if not recommender.model.settings.described:
        return None
    encoder, line = _encoder(recommender), row - FIRST_ITEM
    described = recommender.catalogue.described
    less = dict(islice(without_words(described.texts[line]).items(), WORDS))
    texts = [described.texts[line], *less.values()]
    told = Described(texts, [described.categories[line]] * len(texts), [described.numbers[line]] * len(texts))
    vectors_NE = recommender.model.described_as(row, encoder.encode(told))
    scores_N = recommender.score(read, torch.full((1, len(texts)), row), now, vectors_NE[None])[0].double()
    return dict(zip(less, (scores_N[0] - scores_N[1:]).tolist(), strict=True))


def _encoder(recommender: Recommender) -> ContentEncoder:
    assert recommender.encoder is not None  # a model that reads text has one
    return recommender.encoder


def draw(found: Explanation, path: Path) -> None:
    """Write a PNG: an event a line, with its attention and its drop as bars, then one panel a layer, the mean over heads: what
    the event down looked at, across.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    events, many = found.events[-DRAWN:], len(found.events) > 30
    size, layers_LSS = len(events), found.weights_LHSS.mean(1)[:, -DRAWN:, -DRAWN:].numpy()
    names = [f"{_cut(event['title'], 34)}  {event['event']}" for event in events]
    line = 0.19 if many else 0.3
    wide = min(5.5, max(1.8, line * size))
    figure = Figure(figsize=(6.6 + (wide + 0.4) * len(layers_LSS), max(1.4, line * size) + 1.7), layout="constrained")
    panels = figure.subplots(
        1, 2 + len(layers_LSS), sharey=True, squeeze=False, width_ratios=[2, 2, *[wide] * len(layers_LSS)]
    )[0]
    drops = [0.0 if event["drop"] is None else event["drop"] for event in events]
    bars = {"attention": [event["attention"] for event in events], "drop of the score": drops}
    for panel, (title, widths), colour in zip(panels[:2], bars.items(), ("#4c78a8", "#e4572e"), strict=True):
        panel.barh(range(size), widths, height=0.72, color=["#9aa5b1" if width < 0 else colour for width in widths])
        panel.axvline(0, color="0.3", linewidth=0.8)
        panel.set_title(title, fontsize=10)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="both", length=0, labelsize=7)
        panel.locator_params(axis="x", nbins=4)
        panel.margins(x=0.02)
    panels[0].set_yticks(range(size), names, fontsize=6.5 if many else 8.5, parse_math=False)
    panels[0].set_ylim(size - 0.5, -0.5)
    shade = PowerNorm(0.5, 0, 1)  # else the few large weights are all that is seen
    step = max(1, size // 10)
    for number, (panel, weights_SS) in enumerate(zip(panels[2:], layers_LSS, strict=True), 1):
        image = panel.imshow(weights_SS, cmap="Blues", norm=shade, aspect="auto", interpolation="nearest")
        panel.set_title(f"layer {number}" + ("" if weights_SS.any() else ", not gone through"), fontsize=10)
        panel.set_xticks(range(0, size, step), [event["event"] for event in events[::step]], fontsize=7)
        panel.tick_params(axis="y", length=0)
    bar = figure.colorbar(image, ax=list(panels[2:]), label="attention weight", pad=0.02, aspect=5 * figure.get_figheight())
    bar.ax.tick_params(labelsize=7)
    figure.supxlabel(found.verdict.partition(";")[0], fontsize=8)
    figure.suptitle(f"{_cut(found.item['title'], 80)}: score {found.item['score']:.4g}", fontsize=11, parse_math=False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG. Raises RequestError: it cannot be."""
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror}); give another place for the picture") from None


def _cut(title: str, length: int) -> str:
    return title if len(title) <= length else f"{title[: length - 1]}…"
