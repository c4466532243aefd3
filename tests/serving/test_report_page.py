"""The pages of reports and comparisons: of made-up figures, whole, of what cannot be judged, and in Chromium."""

from __future__ import annotations

import copy
import math
import re
import shutil
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from playwright.sync_api import sync_playwright

from serving.evaluation.numbers import decimal, percent, probability, written, written_share
from serving.evaluation.page import comparison_page, report_page

CHROMIUM = shutil.which("chromium")
KS = (1, 5, 10, 20, 50, 100)
HOSTILE = '<script>alert(1)</script> & "quoted" <b>'
BASELINES = ("EASE", "item-kNN", "recent popularity", "popularity", "repeat-last")


def around(mean: float, width: float = 0.007) -> dict[str, float]:
    return {"mean": mean, "low": mean - width, "high": mean + width}


def lister(worth: float) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for k in KS:
        share = worth * (k / 100) ** 0.3
        figures |= {f"{name}@{k}": around(share) for name in ("recall", "hit")}
        figures |= {f"{name}@{k}": around(share / 2) for name in ("ndcg", "mrr", "map")}
    whole = {"coverage@10": {"mean": 0.31}, "gini@10": {"mean": 0.81}, "popularity_lift@10": {"mean": 0.352}}
    return {**figures, **whole, "novelty@10": around(9.12, 0.03), "diversity@10": around(0.61), "serendipity@10": around(0.04)}


def made(baselines: tuple[str, ...] = BASELINES) -> dict[str, Any]:
    """A report of all that can be judged."""
    stages = {"model, exact search": 0.64, "model, as retrieved": 0.62, "model": 0.651}
    worths = {**stages, **{name: 0.6 * 0.9**place for place, name in enumerate(baselines, 1)}}
    parts = [
        ("history length", "users", "1–4 events"), ("history length", "users", "5 or more events"),
        ("item popularity", "targets", "head: the 20 % most popular items"), ("user's town", "users", "Łódź"),
    ]  # fmt: skip
    best = {"name": "EASE", "ndcg@10": around(0.11)}
    slices = [
        {
            "by": by, "of": of, "slice": name, "users": 113 * place, "share": 0.131 * place,
            "figures": {"ndcg@10": around(0.1 + 0.013 * place), "recall@10": around(0.2)}, "best_baseline": best,
        }
        for place, (by, of, name) in enumerate(parts, 1)
    ]  # fmt: skip
    places = [
        {"rank": rank, "title": f"Item {rank}", "score": 7.5 - rank, "because": "Alien (1979)", "hit": rank == 2}
        for rank in range(1, 11)
    ]
    example = {
        "events": 87, "history": ["Alien (1979)", "七人の侍"], "targets": ["Item 2"], "targets_in_all": 4, "list": places,
    }  # fmt: skip
    bins = [
        {"probability": chance, "observed": 0.9 * chance, "places": 1009, "low": 0.8 * chance, "high": chance}
        for chance in (0.0013, 0.011, 0.07, 0.31)
    ]
    groups = [("most popular 1 %", 0.11, 0.09, 0.23), ("the other half", 0.07, 0.13, 0.003)]
    return {
        "kind": "report", "bundle": "3f9a1c0d27b4", "name": "ml-1m",
        "clock": {"created": "2024-01-01T10:00:00+00:00", "machine": "2 cores"}, "underfilled": 3, "popular": 0,
        "dataset": {"recipe": "ml-1m", "hash": "9d0c3ad1", "users": 6040, "events": 1000209, "items": 3706},
        "protocol": {"name": "P1", "text": "P1: each user’s last event is the test."},
        "users": 6040, "targets": 6040, "decisive": "ndcg@10", "ks": list(KS), "seed": 0, "level": 0.95,
        "verdict": "The model beats every baseline.", "beats": True, "command": "recsys evaluate bundles/x --out report",
        "mdd": {"difference": 0.0041, "relative": 0.025, "power": 0.8, "alpha": 0.05},
        "listers": {name: "model" if name == "model" else "stage" if name in stages else "baseline" for name in worths},
        "figures": {name: lister(worth) for name, worth in worths.items()},
        "slices": slices, "columns_left_out": ["zip"],
        "cold": {"cold": {"model": {"ndcg@10": 0.0123, "recall@10": 0.02}}},
        "popularity": [
            {"items": name, "count": 37, "events": events, "targets": targets, "lists": lists}
            for name, events, targets, lists in groups
        ],
        "calibration": {"error": 0.0123, "bins": bins},
        "learning": [
            {"part": "model", "epoch": epoch, "loss": 5 - epoch / 7, "ndcg@10": 0.01 * epoch} for epoch in range(1, 6)
        ],
        "examples": [{**example, "user_id": 100 + user} for user in range(10)],
        "leaks": {"checked": ["order of events", "events of the future"], "found": []},
    }  # fmt: skip


SLIM: dict[str, Any] = {"slices": [], "calibration": None, "learning": []}
"""In place of what takes the time for tests of other parts, and cannot be had of some subjects."""


def compared() -> dict[str, Any]:
    """A comparison without a decision."""
    found = {
        "a": 0.2, "b": 0.212, "difference": around(0.012), "relative": around(0.06, 0.035), "p": 0.0003, "users": 6040,
    }  # fmt: skip
    return {
        "kind": "comparison", "a": {"name": "champion", "bundles": ["3f9a"], "seeds": 1},
        "b": {"name": "candidate", "bundles": ["77aa"], "seeds": 1}, "level": 0.95, "users": 6040, "decisive": "ndcg@10",
        "dataset": made()["dataset"], "protocol": made()["protocol"], "mdd": made()["mdd"], "better": "b",
        "verdict": "candidate is better than champion: NDCG@10 +.0120", "won": 811, "lost": 701, "equal": 4528,
        "metrics": [{"metric": f"{word}@{k}", **found} for k in KS for word in ("ndcg", "recall", "mrr", "map", "hit")],
        "lists": [{"metric": "coverage@10", "a": 0.31, "b": 0.33, "difference": 0.02}],
        "slices": [
            {"by": "user's town", "of": "users", "slice": "Łódź", **found, "users": 211, "p_adjusted": 0.011},
            {"by": "user's town", "of": "users", "slice": "Gdańsk", **found, "users": 97, "p_adjusted": 0.31},
        ],
        "notes": ["p values of slices are adjusted for the number of slices (Holm)."], "leaks": {"a": [], "b": []},
    }  # fmt: skip


RULES = [
    {"name": "gain", "found": 0.04, "limit": 0.0, "holds": True, "text": "NDCG@10 +.0120; its low end must be above 0.0 %"},
    {"name": "slices", "found": -0.09, "limit": -0.03, "holds": False, "text": "slices are down: user's town Łódź -9.0 %"},
]
DECISION = {"promote": False, "reason": "slices are down: user's town Łódź -9.0 %", "rules": RULES}


@cache
def whole_page() -> str:
    return report_page(made())


@cache
def decision_page() -> str:
    return comparison_page({**compared(), "decision": DECISION})


class Reader(HTMLParser):
    """What a page holds: texts, elements, and what its elements refer to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        """tag, name, value."""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def figures(page: str) -> list[str]:
    """The drawings' SVG."""
    return re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("name", "figure", "signed", "text"),
    [
        ("ndcg@10", {"mean": 0.20311, "low": 0.1962, "high": 0.21}, False, ".2031 [.1962, .2100]"),
        ("ndcg@10", {"mean": 0.2}, False, ".2000 of 1"),
        ("ndcg@10", 1.0, False, "1.0000 of 1"),
        ("recall@10", {"mean": -0.012, "low": -0.02, "high": 0.001}, True, "-.0120 [-.0200, +.0010]"),
        ("recall@10", {"mean": -0.00001, "low": None, "high": None}, True, ".0000"),
        ("coverage@10", {"mean": 0.31}, False, "31.0 %"),
        ("coverage@10", 0.00312, False, "0.31 %"),
        ("coverage@10", 0.02, True, "+2.0 points"),
        ("popularity_lift@10", {"mean": 0.352}, False, "+35.2 %"),
        ("novelty@10", {"mean": 9.123, "low": 9.1, "high": 9.2}, False, "9.12 bits [9.10, 9.20]"),
        ("ndcg@10", {"mean": math.nan, "low": 0, "high": 1}, False, "–"),
        ("ndcg@10", None, False, "–"),
        ("ndcg@10", {"mean": 0.2, "low": math.nan, "high": 0.3}, False, ".2000 of 1"),
    ],
)
def test_a_figure_is_written_with_its_interval_or_its_unit(name, figure, signed, text):
    assert written(name, figure, signed).replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-") == text


def test_numbers_are_rounded_once_and_signed_truly():
    assert [decimal(number, 2) for number in (0.996, 0.994, -0.5, 12.3456)] == ["1.00", ".99", "\N{MINUS SIGN}.50", "12.35"]
    assert [percent(share).replace("\N{NO-BREAK SPACE}", " ") for share in (0, 0.0996, 1)] == ["0.0 %", "10.0 %", "100.0 %"]
    assert [probability(p).replace("\N{NO-BREAK SPACE}", " ") for p in (0.0009, 0.0312, None)] == ["< .001", ".031", "–"]
    assert written_share({"mean": 0.061, "low": 0.04, "high": 0.082}, True).endswith("% [+4.0, +8.2]")


@pytest.mark.parametrize(
    ("change", "colour", "word"),
    [
        ({}, "green", "Beats every baseline"),
        ({"beats": False}, "amber", "Not shown to beat every baseline"),
        ({"beats": False, "figures": {**made()["figures"], "model": lister(0.2)}}, "red", "Does not beat every baseline"),
        ({"beats": None, "listers": {"model": "model"}}, "amber", "Beside no baseline"),
        ({"leaks": {"checked": ["order"], "found": ["order"]}}, "red", "Leaks found"),
    ],
)
def test_the_first_line_is_the_verdict_in_words_and_colour(change, colour, word):
    page = report_page({**made(), **SLIM, **change})
    assert f'class="verdict {colour}"' in page
    text = Reader(page).text
    assert text.index(word) < text.index("The model beats every baseline.") < text.index("What was judged")


def test_every_figure_is_there_with_a_title_a_caption_and_its_numbers_in_words():
    page = whole_page()
    reader = Reader(page)
    # NDCG and recall against k, stages, three groups of slices, popularity, learning, calibration
    assert len(figures(page)) == page.count('role="img"') == page.count("<figcaption>") == 9
    labels = reader.values("aria-label")
    assert any("model .6510" in label and "EASE .5400" in label for label in labels)  # recall@100
    assert any("head: the 20 % most popular items .1390, EASE .1100" in label for label in labels)
    assert "No figure" not in reader.text


def test_every_axis_says_what_it_shows_and_in_which_unit():
    svgs = " ".join(figures(whole_page()))
    wanted = (
        "k (items in the list)", "NDCG@k (0 to 1)", "Recall@k (0 to 1)", "NDCG@10 (0 to 1)", "history length", "share (%)",
        "predicted probability (%)", "observed share (%)", "epoch (passes over the training events)", "(mean per target)",
    )  # fmt: skip
    assert [text for text in wanted if f">{text}</text>" not in svgs] == []


def test_stages_stand_in_the_path_s_order_with_their_changes():
    page = whole_page()
    (label,) = [label for label in Reader(page).values("aria-label") if "by stage" in label]
    # NDCG@10 is half of worth × .1^.3: .64 → .62 is -3.1 %, .62 → .651 is +5.0 %
    assert [part.split(" (")[0] for part in label.split(": ")[1].split("; ")] == [
        "model, exact search .1604", "model, as retrieved .1554", "model, as served .1631",
    ]  # fmt: skip
    assert "3.1\N{NO-BREAK SPACE}%" in label and "+5.0\N{NO-BREAK SPACE}%" in label


def test_metrics_that_are_equal_stand_once():
    text = Reader(whole_page()).text
    assert "Hit rate equals Recall here." in text and "Hit rate@10" not in text
    report = made() | SLIM
    report["figures"]["popularity"]["hit@10"] = around(0.5)
    assert "Hit rate@10" in Reader(report_page(report)).text


def test_users_lists_show_reasons_and_hits():
    text = re.sub(r"\s+", " ", Reader(whole_page()).text)
    assert text.count("✓ hit score 5.50; because of Alien (1979)") == 10
    assert "User 100" in text and "七人の侍" in text and "(1 in the list)" in text


def test_found_leaks_are_named():
    report = made() | SLIM | {"leaks": {"checked": ["order", "future"], "found": ["future"]}}
    assert Reader(report_page(report)).text.count("future") == 2


def test_a_page_says_what_could_not_be_judged():
    one = {"listers": {"model": "model"}, "figures": {"model": made()["figures"]["model"]}, "beats": None, "mdd": None}
    none = {"examples": [], "columns_left_out": [], "cold": {}, "name": "", "command": ""}
    text = Reader(report_page(made() | SLIM | one | none)).text
    assert text.count("No figure") == 4  # stages, slices, learning, calibration
    assert "The report has no users’ lists." in text and "None" not in text


def test_what_is_no_number_is_a_dash_that_is_explained():
    report = made()
    report["figures"]["EASE"]["novelty@10"] = {"mean": None, "low": None, "high": None}
    report["figures"]["item-kNN"]["gini@10"] = {"mean": None}
    del report["figures"]["popularity"]["serendipity@10"]
    report["slices"][0]["figures"] |= {"ndcg@10": {"mean": 0.2, "low": None, "high": None}}
    report["mdd"] |= {"difference": None, "relative": None}
    report["examples"][0]["list"][0]["score"] = None
    text = Reader(report_page(report)).text
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert "A dash, –, stands where nothing was measured." in text


@pytest.mark.parametrize("slices", [[], made()["slices"][:1]])
def test_a_single_slice_or_none_has_a_page(slices):
    page = report_page({**made(), **SLIM, "slices": slices})
    assert len(figures(page)) == 4 + len(slices)


def test_many_baselines_are_told_apart_or_counted():
    page = report_page(made(tuple(f"baseline {number}" for number in range(12))) | SLIM)
    first = figures(page)[0]
    assert [name for name in ("model", "baseline 0", "baseline 3", "8 more") if f">{name}</text>" not in first] == []
    assert ">baseline 4</text>" not in first
    assert "baseline 11" in Reader(page).text  # the table has all


def test_texts_from_elsewhere_stay_texts():
    report = made((HOSTILE, "EASE"))
    report |= {key: HOSTILE for key in ("verdict", "name", "command", "bundle")}
    report["clock"]["machine"] = HOSTILE
    report["slices"][0] |= {"by": HOSTILE, "slice": HOSTILE}
    report["examples"][0] |= {"history": [HOSTILE], "targets": [HOSTILE], "user_id": HOSTILE}
    report["examples"][0]["list"][0] |= {"title": HOSTILE, "because": HOSTILE}
    report["leaks"]["checked"] = [HOSTILE]
    for page in (report_page(report), comparison_page({**compared(), "verdict": HOSTILE, "notes": [HOSTILE]})):
        reader = Reader(page)
        assert {"script", "b"}.isdisjoint(reader.tags)
        assert not [name for _, name, _ in reader.attributes if name.startswith("on") or name == "quoted"]
        assert HOSTILE in reader.text


def test_odd_names_are_drawn_as_they_are():
    odd = ["$5–$10", "0.12345 to #0072b2", "مرحبا 七人", "a\nb\tc", "\N{PILE OF POO}", 'id="m_1" x']
    report = made() | SLIM
    report["slices"] = [{**made()["slices"][0], "slice": name} for name in odd]
    svg = figures(report_page(report))[3]
    texts = [node.text for node in ElementTree.fromstring(svg).iter("text")]
    assert [name for name in odd if " ".join(name.split()) not in texts] == []


def test_long_titles_are_cut_in_figures_and_whole_in_tables():
    report, long = made() | SLIM | {"slices": made()["slices"]}, "a very long name " * 40
    report["slices"][0]["slice"] = report["slices"][0]["by"] = long.strip()
    page = report_page(report)
    assert max(len(node.text or "") for svg in figures(page) for node in ElementTree.fromstring(svg).iter("text")) < 60
    assert long.strip() in Reader(page).text


@pytest.mark.parametrize("page_of", [whole_page, decision_page])
def test_a_page_needs_nothing_from_elsewhere_and_its_parts_find_one_another(page_of):
    page = page_of()
    reader = Reader(page)
    assert not re.search(r"https?:|//|@import|javascript:", page)
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(reader.tags)
    assert reader.values("src") == []
    ids = reader.values("id")
    assert len(ids) == len(set(ids))
    wanted = [value.removeprefix("#") for value in reader.values("href")] + re.findall(r"url\(#(\w+)\)", page)
    assert set(wanted) <= set(ids) and all(value.startswith("#") for value in reader.values("href"))
    assert ("html", "lang", "en") in reader.attributes and "width=device-width, initial-scale=1" in reader.values("content")
    assert reader.tags.count("h1") == 1 and reader.tags.index("h1") < reader.tags.index("h2") < reader.tags.index("h3")


def test_the_same_report_makes_the_same_bytes_whatever_the_user_s_style():
    report = made()
    before, first = copy.deepcopy(report), whole_page()
    with matplotlib.rc_context({"font.size": 17, "axes.linewidth": 3, "xtick.direction": "in", "svg.fonttype": "path"}):
        style = dict(matplotlib.rcParams)
        assert report_page(report) == first
        assert dict(matplotlib.rcParams) == style
    assert report == before


def test_figures_take_the_page_s_colours():
    for svg in figures(whole_page()):
        assert "var(--model)" in svg or "var(--other-1)" in svg
        assert not re.search(r"(fill|stroke): #", svg)


@pytest.mark.parametrize(
    ("change", "colour", "word"),
    [
        ({}, "green", "Better"),
        ({"better": "a"}, "red", "Worse"),
        ({"better": None}, "amber", "No difference shown"),
        ({"decision": DECISION}, "red", "Refused"),
        ({"decision": {**DECISION, "promote": True}, "better": None}, "green", "Promoted"),
    ],
)
def test_a_comparison_s_first_line_is_the_decision_else_the_verdict(change, colour, word):
    page = comparison_page({**compared(), **change})
    text = Reader(page).text
    assert f'class="verdict {colour}"' in page
    said = DECISION["reason"] if "decision" in change else "candidate is better than champion"
    assert text.index(word) < text.index(str(said)) < text.index("What was compared")


def test_a_comparison_shows_metrics_slices_and_rules():
    page = decision_page()
    text = Reader(page).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "+.0120 [+.0050, +.0190]" in text and "+6.0 % [+2.5, +9.5]" in text and "< .001" in text
    assert "811 users for whom B is better, 701 users for whom A is better, 4,528 users for whom they are equal" in text
    assert text.count("✓ holds") == text.count("✗ does not hold") == 1
    labels = Reader(page).values("aria-label")
    assert any(label.endswith("Łódź +.0120; Gdańsk +.0120, not shown") for label in labels)
    assert len(figures(page)) == 3


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_on_a_phone_nothing_is_cut_off_or_too_small(tmp_path: Path):
    report, long = made(), "an endless name of a thing " * 9
    report["slices"][0] |= {"slice": long, "by": long}
    report["examples"][0]["history"] = [long, "x" * 300]
    pages = {"report": report_page(report), "comparison": decision_page()}
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, text in pages.items():
            (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
            page = browser.new_page(viewport={"width": 390, "height": 844})
            page.goto((tmp_path / f"{name}.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            assert page.evaluate(SMALLEST) >= 9
            assert page.evaluate(CUT_OFF) == []
        browser.close()


SMALLEST = """Math.min(...[...document.querySelectorAll('svg text')].map(text => {
  const svg = text.ownerSVGElement
  return parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width
}))"""
"""Height of the smallest type of the figures, in CSS pixels."""
CUT_OFF = """[...document.querySelectorAll('svg text')].filter(text => {
  const [inner, outer] = [text, text.ownerSVGElement].map(each => each.getBoundingClientRect())
  return inner.left < outer.left - 1 || inner.right > outer.right + 1
    || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1
}).map(text => text.textContent)"""
"""Texts of figures that reach over their figure's edge."""
