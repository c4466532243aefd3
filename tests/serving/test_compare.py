"""Two reports side by side: the differences are those of the written values, and what may not be compared is refused."""

import json

import numpy as np
import polars as pl
import pytest

from features.dataset import Dataset
from recsys.command.terminal import comparison_tables
from recsys.errors import RequestError
from serving.engine import Recommender
from serving.evaluation.compare import compare, reports_of
from serving.evaluation.page import comparison_page
from serving.evaluation.report import make_report
from serving.evaluation.statistics import holm, paired
from tests.conftest import _run as command
from tests.serving.reports import METRIC, USERS, changed, draw, made

BEFORE = draw(1)
AFTER = changed(BEFORE, 0.05, 2)


def test_the_differences_are_those_of_the_written_values_in_whatever_order_users_stand():
    recall = draw(3)
    first = made({f"model: {METRIC}": BEFORE, "model: recall@10": recall}, "one")
    order = np.random.default_rng(5).permutation(USERS)
    columns = {"user_id": order, f"model: {METRIC}": AFTER[order], "model: recall@10": recall[order]}
    second = made(columns, "two", whole={"coverage@10": 0.75})
    found = compare([first], [second], ("old", "new"))
    wanted = paired(BEFORE, AFTER)
    assert found.found == wanted
    assert (found.better, found.found.wins) == ("b", int((AFTER > BEFORE).sum()))
    assert found.metrics["recall@10"].p == 1
    assert found.lists == {"coverage@10": (0.5, 0.75)}
    told = found.as_dict()
    assert told["won"] + told["lost"] + told["equal"] == USERS
    assert (told["a"]["bundles"], told["b"]["name"], told["decisive"]) == (["one"], "new", METRIC)
    assert told["metrics"][0] == {"metric": METRIC, **wanted.as_dict()}
    json.dumps(told, allow_nan=False)


def test_the_verdict_says_in_words_what_was_found():
    first, second = made({f"model: {METRIC}": BEFORE}, "one"), made({f"model: {METRIC}": AFTER}, "two")
    better, worse = compare([first], [second], ("old", "new")), compare([second], [first], ("new", "old"))
    difference = f"{AFTER.mean() - BEFORE.mean():+.4f}".replace("0.", ".")
    assert better.verdict.startswith(f"new is better than old: NDCG@10 {difference} [+.")
    assert "+5.0" in better.verdict and "p <" in better.verdict and "503" in better.verdict
    assert worse.verdict.startswith("old is worse than new: NDCG@10 \N{MINUS SIGN}.")
    hidden = compare([first], [made({f"model: {METRIC}": changed(BEFORE, 0.001, 7, 0.2)}, "two")])
    assert hidden.better is None
    assert hidden.verdict.startswith("No difference between A and B could be shown: NDCG@10 +.")
    assert "would have been found 4 times of 5" in hidden.verdict
    assert hidden.detectable == pytest.approx(2.8016 * hidden.found.error, rel=1e-4)
    assert compare([first], [first]).verdict.startswith("A and B do not differ: NDCG@10 .0000")


def test_leaks_of_either_side_begin_the_verdict_and_redden_the_page():
    first = made({f"model: {METRIC}": BEFORE}, "one")
    leaky = [made({f"model: {METRIC}": AFTER}, bundle, leaks=found) for bundle, found in (("2", ["model"]), ("3", ["days"]))]
    found = compare([first], leaky, ("old", "new"))
    assert found.verdict.startswith(
        "Leaks were found in new (days, model): the figures decide nothing. new is better than old: "
    )
    told = found.as_dict()
    assert told["leaks"] == {"a": [], "b": ["days", "model"]}
    page = comparison_page(told)
    assert 'class="verdict red"' in page and "Leaks found" in page
    assert compare(leaky[:1], leaky[1:]).verdict.startswith("Leaks were found in A (model) and B (days): ")
    clean = compare([first], [other()])
    assert "Leaks" not in clean.verdict and 'class="verdict green"' in comparison_page(clean.as_dict())


def test_what_cannot_be_compared_is_null_and_a_dash(capsys):
    half = np.where(np.arange(USERS) < 211, BEFORE, np.nan)
    rest = np.where(np.arange(USERS) < 211, np.nan, AFTER)
    columns = [{f"model: {METRIC}": values, "model: recall@10": some} for values, some in ((BEFORE, half), (AFTER, rest))]
    sides = [made(each, str(number)) for number, each in enumerate(columns)]
    found = compare([sides[0]], [sides[1]], ("old", "new"), level=0.98)
    told = found.as_dict()
    (recall,) = [part for part in told["metrics"] if part["metric"] == "recall@10"]
    assert (recall["p"], recall["a"], recall["difference"]["mean"], recall["users"]) == (None, None, None, 0)
    comparison_tables(told)
    shown = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ")
    (line,) = [line for line in shown.splitlines() if "Recall@10" in line]
    assert line.count("–") == 5
    assert "98 % interval" in shown and "< .001" in shown and "0." not in shown.split("Metric")[1].split("NDCG@10 decides")[0]
    nothing = compare([sides[0]], [sides[1]], metric="recall@10")
    assert nothing.verdict == "A and B cannot be compared by Recall@10: 0\N{NO-BREAK SPACE}users with a figure on both sides"
    assert nothing.better is None
    json.dumps(nothing.as_dict(), allow_nan=False)


def test_slices_are_compared_alone_and_their_p_values_adjusted():
    labels = np.array(["short", "long"])[(np.arange(USERS) % 3 == 0).astype(int)]
    tail = np.where(np.arange(USERS) < 211, BEFORE, np.nan)
    slices = [
        {"by": "history length", "slice": "short"},
        {"by": "history length", "slice": "long"},
        {"by": "item popularity", "slice": "tail", "of": "targets"},
        {"by": "item popularity", "slice": "nobody's", "of": "targets"},
        {"by": "history length", "slice": "none"},
    ]

    def report(bundle, values, in_tail):
        columns = {f"model: {METRIC}": values, "user: history length": labels}
        return made({**columns, f"model: {METRIC} | item popularity: tail": in_tail}, bundle, slices)

    second = np.where(labels == "long", AFTER, BEFORE)
    found = compare([report("one", BEFORE, tail)], [report("two", second, 1.1 * tail)])
    assert [(part.by, part.name, part.of) for part in found.slices] == [
        ("history length", "short", "users"),
        ("history length", "long", "users"),
        ("item popularity", "tail", "targets"),
    ]
    wanted = [
        paired(BEFORE[labels == "short"], second[labels == "short"]),
        paired(BEFORE[labels == "long"], second[labels == "long"]),
        paired(BEFORE[:211], 1.1 * BEFORE[:211]),
    ]
    assert [part.found for part in found.slices] == wanted
    assert [part.adjusted for part in found.slices] == holm([one.p for one in wanted])
    assert found.slices[0].found.p == 1 and found.slices[1].adjusted < 0.05
    assert [part["users"] for part in found.as_dict()["slices"]] == [335, 168, 211]


def test_several_seeds_are_compared_by_their_means_and_single_ones_are_told():
    sides = [
        [made({f"model: {METRIC}": changed(BEFORE, gain, seed)}, f"{gain} {seed}") for seed in (1, 2, 3)] for gain in (0, 0.2)
    ]
    found = compare(*sides)
    assert found.better == "b"
    assert found.found.first == pytest.approx(BEFORE.mean())
    assert not any("one training" in note for note in found.notes)
    single = compare(sides[0], sides[1][:1], ("old", "new"))
    assert any(note.startswith("Of new there is one training") for note in single.notes)


def other(**changes):
    return made({f"model: {METRIC}": AFTER}, "two", **changes)


PROTOCOL = made({f"model: {METRIC}": BEFORE}).manifest["protocol"]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (other(dataset={"recipe": "another", "hash": "77" * 32}), "of two data sets .made-up 5c5c5c5c and another 77777777."),
        (other(protocol={**PROTOCOL, "targets": "all"}), "of two protocols .targets: 'new', 'all'."),
        (made({f"model: {METRIC}": AFTER[:-1]}, "two"), "of other users .502 and 503."),
        (made({"user_id": np.arange(1, USERS + 1), f"model: {METRIC}": AFTER}, "two"), "of other users .503."),
    ],
)
def test_what_was_judged_otherwise_is_refused(second, says):
    with pytest.raises(RequestError, match=says) as refused:
        compare([made({f"model: {METRIC}": BEFORE}, "one")], [second])
    assert "\n" not in str(refused.value)


def test_a_bundle_is_no_seed_of_itself_and_an_unknown_metric_is_refused():
    first, second = made({f"model: {METRIC}": BEFORE}, "one"), other()
    with pytest.raises(RequestError, match="B: holds two reports of one bundle"):
        compare([first], [second, second])
    with pytest.raises(RequestError, match="no 'ndcg@50' of each user; give one of ndcg@10"):
        compare([first], [second], metric="ndcg@50")


def test_a_protocol_s_name_does_not_matter_where_its_settings_are_the_same():
    named = other(protocol={**PROTOCOL, "name": "P5"})
    assert compare([made({f"model: {METRIC}": BEFORE}, "one")], [named]).better == "b"


def test_the_page_says_the_level_of_its_intervals():
    said = {
        level: comparison_page(compare([made({f"model: {METRIC}": BEFORE}, "one")], [other()], level=level).as_dict())
        for level in (0.95, 0.98)
    }
    assert all(f"{100 * level:g} times of 100" in page for level, page in said.items())


def test_what_a_model_was_told_may_differ_and_is_noted():
    told = other(protocol={**PROTOCOL, "request_time": True, "text": "Other words."})
    found = compare([made({f"model: {METRIC}": BEFORE}, "one")], [told])
    assert any("first target happened" in note for note in found.notes)


@pytest.fixture(scope="module")
def reports(world, tmp_path_factory):
    """A folder with the reports of a run and of its bundle."""
    folder = tmp_path_factory.mktemp("reports")
    for name in ("run", "bundle"):
        made_ = make_report(Recommender.load(world / name), Dataset.open(world / "dataset"), ks=(5, 10))
        made_.write(folder / "seeds" / name)
    return folder


def test_a_folder_is_several_seeds_and_a_place_without_reports_is_refused(reports, tmp_path):
    assert [report.manifest["subject"] for report in reports_of(reports / "seeds")] == ["bundle", "model"]
    assert len(reports_of(reports / "seeds" / "run")) == 1
    with pytest.raises(RequestError, match=r"no report.json there; give what `recsys evaluate --out` wrote"):
        reports_of(tmp_path)


def test_the_command_compares_and_writes_the_page(reports, tmp_path, capsys):
    first, second = reports / "seeds" / "run", reports / "seeds" / "bundle"
    capsys.readouterr()
    assert command("compare", first, second, "--json", "--out", tmp_path / "out") == 0
    told = json.loads(capsys.readouterr().out)
    values = [pl.read_parquet(folder / "users.parquet")[f"model: {METRIC}"].to_numpy() for folder in (first, second)]
    assert told["metrics"][[part["metric"] for part in told["metrics"]].index(METRIC)]["difference"]["mean"] == pytest.approx(
        values[1].mean() - values[0].mean()
    )
    assert (told["a"]["name"], told["b"]["name"], told["slices"] != []) == ("run", "bundle", True)
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {key: written[key] for key in told} == told
    assert (tmp_path / "out" / "comparison.html").read_text().startswith("<!")
    assert command("compare", first, second) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(told["verdict"]) and "history length" in shown
    assert command("compare", first, tmp_path / "nowhere") == 2
    assert capsys.readouterr().err.startswith(f"recsys: {tmp_path / 'nowhere'}: no report.json there")
