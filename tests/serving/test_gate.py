"""The gate promotes what is shown to be better and refuses the rest; what it decided stands on the version, with evidence."""

import json
from dataclasses import fields, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
import numpy as np
import pytest

from recsys.bundle import open_directory
from recsys.config import Recipe
from recsys.errors import RecipeError, RequestError
from recsys.tracking import Tracking, TrackingSettings
from serving.engine import Recommender
from serving.evaluation.gate import Costs, PromotionSettings, costs_of, decide
from serving.evaluation.page import comparison_page
from serving.export import export
from serving.index import IndexSettings
from tests.conftest import _run as command
from tests.serving.conftest import write_run
from tests.serving.reports import METRIC, USERS, changed, draw, made

BEFORE = draw(1)
CHAMPION = made({f"model: {METRIC}": BEFORE}, "champion")
RULES = PromotionSettings()


def challenger(values, **about):
    return made({f"model: {METRIC}": values}, "challenger", **about)


def broken(decision):
    return [rule.name for rule in decision.rules if not rule.holds]


def test_better_is_promoted_worse_and_no_different_are_refused():
    better, worse, alike = (decide(RULES, challenger(changed(BEFORE, gain, 2)), CHAMPION) for gain in (0.05, -0.05, 0.0))
    assert better.promote and broken(better) == []
    assert better.reason.startswith("all 4 rules hold: NDCG@10 +.") and "5.0" in better.reason
    assert broken(worse) == broken(alike) == ["gain"]
    assert worse.reason.startswith("NDCG@10 \N{MINUS SIGN}.") and "its low end must be above" in worse.reason
    assert not worse.promote and not alike.promote
    json.dumps(worse.as_dict(), allow_nan=False)


def test_a_gain_that_chance_explains_is_refused():
    noisy = decide(RULES, challenger(changed(BEFORE, 0.05, 2, noise=0.5)), CHAMPION)
    assert noisy.comparison.found.difference > 0 and broken(noisy) == ["gain"]


def test_not_worse_by_more_may_be_enough():
    alike = challenger(changed(BEFORE, 0.0, 2))
    assert decide(replace(RULES, least_gain=-0.03), alike, CHAMPION).promote
    assert not decide(replace(RULES, least_gain=-0.001), alike, CHAMPION).promote
    assert not decide(replace(RULES, least_gain=0.05), challenger(changed(BEFORE, 0.05, 2)), CHAMPION).promote


def test_a_champion_that_finds_nothing_can_be_replaced():
    nothing = made({f"model: {METRIC}": np.zeros(USERS)}, "champion")
    assert decide(RULES, challenger(BEFORE), nothing).promote
    assert not decide(RULES, challenger(np.zeros(USERS)), nothing).promote


def sliced(inside, outside, seed=0, members=151):
    """Champion and challenger, whose gains inside and outside of a slice are these."""
    labels = np.where(np.arange(USERS) < members, "young", "old")
    after = changed(BEFORE, outside, 2)
    after[:members] = changed(BEFORE[:members], inside, 3)
    slices = [{"by": "age", "slice": name} for name in ("young", "old")]
    return [
        made({f"model: {METRIC}": values, "user: age": labels}, str(place), slices)
        for place, values in enumerate((BEFORE, after))
    ]


def test_a_slice_that_is_shown_to_be_down_by_more_is_refused_by_name():
    champion, after = sliced(-0.2, 0.3)
    decision = decide(RULES, after, champion)
    assert broken(decision) == ["slices"]
    assert decision.reason.startswith("slices are down: age young \N{MINUS SIGN}20.0")
    assert decision.rules[1].found == pytest.approx(-0.2)


@pytest.mark.parametrize(
    ("inside", "members", "rules"),
    [
        (-0.02, 151, RULES),  # by less than 3 %
        (-0.2, 97, RULES),  # of fewer users than are judged
        (-0.2, 151, replace(RULES, slice_drop=0.25)),
    ],
)
def test_a_slice_that_is_down_by_less_or_of_few_users_is_none(inside, members, rules):
    champion, after = sliced(inside, 0.3, members=members)
    assert broken(decide(rules, after, champion)) == []


def test_a_slice_that_is_down_by_chance_is_no_reason():
    labels = np.where(np.arange(USERS) < 151, "young", "old")
    after = changed(BEFORE, 0.3, 2)
    after[:151] = changed(BEFORE[:151], -0.04, 3, noise=0.4)
    slices = [{"by": "age", "slice": name} for name in ("young", "old")]
    reports = [made({f"model: {METRIC}": values, "user: age": labels}, str(len(values)), slices) for values in (BEFORE, after)]
    decision = decide(RULES, reports[1], reports[0])
    assert decision.rules[1].found == pytest.approx(-0.04) and decision.rules[1].holds


@pytest.mark.parametrize(
    ("name", "costs", "coverage"),
    [
        ("coverage", Costs(), 0.39),
        ("latency", Costs([100, 100], [1.6, 1.0]), 0.5),
        ("latency_ms", Costs([100, 100], [1.2, 1.0]), 0.5),
        ("size", Costs([201, 100], [1.0, 1.0]), 0.5),
    ],
)
def test_each_bound_refuses_beyond_it_alone_and_is_none_at_zero(name, costs, coverage):
    rules = replace(RULES, latency_ms=1.1 if name == "latency_ms" else 0.0)
    after = challenger(changed(BEFORE, 0.05, 2), whole={"coverage@10": coverage})
    decision = decide(rules, after, CHAMPION, costs)
    assert broken(decision) == [name]
    assert "at most" in decision.reason or "at least" in decision.reason
    assert decide(replace(rules, **{name: 0.0}), after, CHAMPION, costs).promote
    within = challenger(changed(BEFORE, 0.05, 2), whole={"coverage@10": 0.41})
    assert decide(rules, within, CHAMPION, Costs([199, 100], [1.0, 1.0])).promote


def test_a_coverage_that_was_not_measured_does_not_hold_and_says_what_to_do():
    columns = {f"model: {METRIC}": BEFORE, "model: ndcg@20": BEFORE}
    after = {name: changed(BEFORE, 0.05, 2) for name in columns}
    rules, sides = replace(RULES, metric="ndcg@20"), (made(after, "challenger"), made(columns, "champion"))
    decision = decide(rules, *sides)
    assert broken(decision) == ["coverage"]
    assert decision.reason == (
        "coverage@20 was not measured; set promotion.metric=ndcg@10, or promotion.coverage=0 for no such rule"
    )
    json.dumps(decision.as_dict(), allow_nan=False)
    assert decide(replace(rules, coverage=0.0), *sides).promote


def test_slices_of_targets_that_the_metric_does_not_judge_are_told():
    slices = [{"by": "item popularity", "slice": "tail", "of": "targets"}]
    names = (METRIC, "ndcg@20", f"{METRIC} | item popularity: tail", "recall@10 | item popularity: tail")
    gains = (0.05, 0.05, -0.2, -0.2)
    sides = [
        made(
            {f"model: {name}": changed(BEFORE, gain * side, 2) for name, gain in zip(names, gains, strict=True)},
            str(side),
            slices,
        )
        for side in (1, 0)
    ]
    assert broken(decide(RULES, *sides)) == ["slices"] and "alone" not in decide(RULES, *sides).reason
    other = decide(replace(RULES, metric="ndcg@20", coverage=0.0), *sides)
    assert other.promote
    assert other.rules[1].text.endswith("slices of targets are judged by ndcg@10 and recall@10 alone")


def test_a_decision_s_page_begins_with_a_capital():
    decision = decide(RULES, challenger(changed(BEFORE, 0.05, 2)), CHAMPION)
    page = comparison_page({**decision.comparison.as_dict(), "decision": decision.as_dict()})
    assert "<h1>All 4 rules hold: NDCG@10" in page


def test_figures_with_leaks_decide_nothing():
    after = challenger(changed(BEFORE, 0.05, 2), leaks=["order of events"])
    assert broken(decide(RULES, after, CHAMPION)) == ["leaks"]


def test_without_a_champion_every_baseline_must_be_beaten():
    listers = {"popularity": "baseline", "EASE": "baseline", "model, exact search": "stage"}
    columns = {
        f"model: {METRIC}": changed(BEFORE, 0.3, 2),
        f"popularity: {METRIC}": BEFORE / 2,
        f"EASE: {METRIC}": BEFORE,
        f"model, exact search: {METRIC}": BEFORE * 9,
    }
    first = decide(RULES, made(columns, listers=listers), None)
    assert first.promote and [rule.name for rule in first.rules] == ["beats popularity", "beats EASE", "leaks"]
    beaten = decide(RULES, made(columns | {f"EASE: {METRIC}": changed(BEFORE, 0.3, 3)}, listers=listers), None)
    assert broken(beaten) == ["beats EASE"] and beaten.reason.startswith("against EASE NDCG@10")
    worse = decide(RULES, made(columns | {f"model: {METRIC}": BEFORE / 9}, listers=listers), None)
    assert broken(worse) == ["beats popularity", "beats EASE"]
    assert worse.reason.count("every baseline must be beaten") == 1
    assert broken(decide(RULES, made(columns), None)) == ["baselines"]
    with pytest.raises(RequestError, match="no 'ndcg@50' of each user"):
        decide(replace(RULES, metric="ndcg@50"), made(columns, listers=listers), None)


def test_the_metric_and_the_level_decide():
    columns = {f"model: {METRIC}": BEFORE, "model: recall@10": draw(5)}
    after = {f"model: {METRIC}": changed(BEFORE, 0.05, 2), "model: recall@10": changed(draw(5), -0.05, 3)}
    sides = made(after, "challenger"), made(columns, "champion")
    assert decide(RULES, *sides).promote
    assert not decide(replace(RULES, metric="recall@10"), *sides).promote
    close = challenger(changed(BEFORE, 0.05, 2, noise=0.1))
    assert 0.001 < decide(RULES, close, CHAMPION).comparison.found.p < 0.2
    assert decide(replace(RULES, level=0.5), close, CHAMPION).promote
    assert not decide(replace(RULES, level=0.9999), close, CHAMPION).promote


@pytest.mark.parametrize(
    "wrong",
    [
        {"metric": "ndcg"},
        {"metric": "coverage@10"},
        {"level": 1.0},
        {"least_gain": -1.0},
        {"slice_drop": 1.5},
        {"slice_users": -1},
        {"coverage": -0.1},
        {"latency": -1.0},
        {"gain": 0.1},
    ],
)
def test_rules_that_cannot_be_are_refused(wrong):
    with pytest.raises(RecipeError, match="promotion"):
        Recipe("wrong", {"promotion": wrong}).read(PromotionSettings)


def test_every_rule_of_the_recipe_is_in_the_evidence():
    assert {field.name for field in fields(PromotionSettings)} == set(RULES.as_dict())


@pytest.fixture(scope="module")
def bundles(shop, shop_run, tmp_path_factory):
    """Of one data set: two untrained models, and one that reads descriptions, so that its lists are of the user's kind."""
    folder = tmp_path_factory.mktemp("bundles")
    runs = {"weak": write_run(folder / "0", shop, 0), "good": shop_run, "other": write_run(folder / "1", shop, 1)}
    for name, run in runs.items():
        export(run, folder / name, IndexSettings())
    return {name: folder / name for name in runs}


def test_costs_are_of_both_bundles(shop, bundles):
    paths = [bundles[name] for name in ("weak", "good")]
    costs = costs_of([Recommender.load(path, threads=1) for path in paths], shop)
    for size, path in zip(costs.bytes, paths, strict=True):
        assert size == sum(file.stat().st_size for file in path.iterdir()) - (path / "manifest.json").stat().st_size
    assert len(costs.milliseconds) == 2 and min(costs.milliseconds) > 0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'runs.db'}"


@pytest.fixture
def registry(store, bundles, request):
    """Registered: version 1, weak and champion; version 2, good; version 3, as weak as the first."""
    settings = TrackingSettings(uri=store, experiment="goods", model=request.node.name[-40:])
    for bundle in bundles.values():
        tracking = Tracking(settings)
        with tracking.run(bundle.name):
            tracking.register(bundle, open_directory(bundle).manifest["id"])
    assert Tracking(settings).champion() == "1"
    return settings


def where(registry):
    return ("--set", f"tracking.uri={registry.uri}", "--set", f"tracking.model={registry.model}")


def kept(registry, version):
    """The tags of a version, and the folder of its evidence."""
    client = mlflow.MlflowClient(registry.uri)
    found = client.get_model_version(registry.model, version)
    root = Path(unquote(urlsplit(client.get_run(found.run_id).info.artifact_uri).path))
    return {name: text for name, text in found.tags.items() if name.startswith("promotion.")}, root / "promotion" / version


def test_the_command_promotes_a_better_bundle_and_keeps_the_evidence(registry, shop, tmp_path, capsys):
    (tmp_path / "out" / "version-7").mkdir(parents=True)
    (tmp_path / "out" / "decision.json").write_text("{}")
    Tracking(registry).decided("2", {"decision": "by hand", "recall@7": "0.5"})
    capsys.readouterr()
    words = ("bundles", "promote", 2, "--dataset", shop.path, *where(registry), "--out", tmp_path / "out")
    assert command(*words, "--set", "promotion.slice_users=1000", "--set", "promotion.latency=100", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["version"], told["against"], told["decision"]["promote"], told["better"]) == (2, 1, True, "b")
    assert Tracking(registry).champion() == "2"
    tags, evidence = kept(registry, "2")
    assert (tags["promotion.decision"], tags["promotion.against"]) == ("promoted", "1")
    assert "promotion.recall_at_7" not in tags
    assert not (evidence / "version-7").exists() and not (tmp_path / "out" / "version-7").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tags["promotion.reason"].startswith("all 6 rules hold: NDCG@10 +.")
    figures = json.loads((evidence / "version-2" / "report.json").read_text())["figures"]["model"]
    assert float(tags["promotion.ndcg_at_10"]) == pytest.approx(figures[METRIC]["mean"], abs=1e-6)
    for folder in (evidence, tmp_path / "out"):
        assert json.loads((folder / "decision.json").read_text())["settings"]["slice_users"] == 1000
        assert json.loads((folder / "comparison" / "comparison.json").read_text())["decision"] == told["decision"]
        for page in ("comparison/comparison.html", "version-1/report.html", "version-2/report.html"):
            assert (folder / page).stat().st_size > 1000
    assert Tracking(registry).rollback() == "1"


def test_the_command_refuses_with_exit_code_3_and_the_champion_stays(registry, shop, capsys):
    capsys.readouterr()
    words = ("bundles", "promote", 3, "--dataset", shop.path, *where(registry))
    assert command(*words, "--set", "promotion.latency=100", "--set", "promotion.metric=recall@7") == 3
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith("recsys: version 3 is refused: Recall@7 ") and line.endswith("; version 1 stays champion")
    assert "gain" in captured.out and "NO" in captured.out
    assert Tracking(registry).champion() == "1"
    tags, evidence = kept(registry, "3")
    assert (tags["promotion.decision"], tags["promotion.against"]) == ("refused", "1")
    assert tags["promotion.rules"].startswith("gain does not hold, slices ")
    assert json.loads((evidence / "decision.json").read_text())["promote"] is False
    assert [entry["decision"] for entry in Tracking(registry).versions()] == ["refused", "", ""]
    assert command("bundles", "promote", 3, *where(registry)) == 0
    assert Tracking(registry).champion() == "3"
    tags, _ = kept(registry, "3")
    assert tags.pop("promotion.reason", "") == "" and tags == {"promotion.decision": "by hand", "promotion.against": "1"}
    assert command("bundles", "promote", 3, *where(registry)) == 2
    assert "version 3 is champion already" in capsys.readouterr().err
    assert kept(registry, "3")[0]["promotion.against"] == "1"


def test_what_cannot_be_decided_is_one_line(registry, shop, tmp_path, capsys):
    dataset = ("--dataset", shop.path)
    (tmp_path / "mine.txt").write_text("kept")
    for words, says in (
        ((1, *dataset), "version 1 is champion already"),
        ((7, *dataset), "has no version 7 of model"),
        ((2, "--dataset", shop.path.parent), "no dataset.json there"),
        ((2, *dataset, "--set", "promotion.metric=ndgc@10"), "must be one of recall, ndcg, "),
        ((2, *dataset, "--set", "promotion.lattency=2"), "did you mean latency?"),
        ((2, *dataset, "--out", tmp_path), "is no earlier promotion's folder (decision.json)"),
        ((2, *dataset, "--out", tmp_path / "mine.txt"), "is no earlier promotion's folder (decision.json)"),
        ((2, "--out", tmp_path / "new"), "--out is for what is judged on a --dataset"),
        ((2, "--set", "promotion.latency=2"), "this verb reads [tracking] alone"),
    ):
        capsys.readouterr()
        assert command("bundles", "promote", *words, *where(registry)) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("recsys: ") and says in last
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert Tracking(registry).champion() == "1"


def test_a_champion_that_changes_meanwhile_is_not_overrun(registry, shop, monkeypatch, capsys):
    from recsys.command import promotion

    def slow(*arguments, **settings):
        Tracking(registry).promote("3")
        return costs_of(*arguments, **settings)

    monkeypatch.setattr(promotion, "costs_of", slow)
    words = ("bundles", "promote", 2, "--dataset", shop.path, *where(registry))
    assert command(*words, "--set", "promotion.slice_users=1000", "--set", "promotion.latency=100") == 2
    assert "version 3 became champion while version 2 was judged against 1" in capsys.readouterr().err
    assert Tracking(registry).champion() == "3"
    assert "promotion.decision" not in kept(registry, "2")[0]


def test_the_first_champion_must_beat_the_baselines(registry, shop, capsys):
    mlflow.MlflowClient(registry.uri).delete_registered_model_alias(registry.model, "champion")
    assert command("bundles", "promote", 1, "--dataset", shop.path, *where(registry)) == 3
    assert "recsys: version 1 is refused: against popularity NDCG@10" in capsys.readouterr().err
    assert Tracking(registry).champion() == ""
    assert not (kept(registry, "1")[1] / "comparison").exists()


def test_a_bundle_made_of_the_champion_takes_its_place_and_another_does_not(registry, bundles):
    tracking = Tracking(registry)
    with tracking.run("changed"):
        assert tracking.register(bundles["weak"], "changed", open_directory(bundles["weak"]).manifest["id"]) == "4"
        assert tracking.champion() == "4"
        assert tracking.register(bundles["weak"], "again", open_directory(bundles["weak"]).manifest["id"]) == "5"
        assert tracking.champion() == "4"
        assert tracking.register(bundles["weak"], "new") == "6"
        assert tracking.champion() == "4"


def test_export_registers_the_first_is_champion_and_what_is_made_of_it_takes_its_place(world, tmp_path, capsys):
    store = f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"
    words = ("--dataset", world / "dataset", "--out", tmp_path / "run", "--set", store, "--set", "train.epochs=1")
    assert command("train", world / "small.toml", *words, "--set", "promotion.least_gain=-0.02") == 0

    def told(*words):
        capsys.readouterr()
        assert command(*words) == 0
        return capsys.readouterr().out.strip().rpartition(", ")[2]

    assert told("export", tmp_path / "run", "--out", tmp_path / "one") == "version 1 is champion"
    decides = "is registered; `recsys bundles promote {} --dataset …` decides"
    words = ("export", tmp_path / "run", "--out", tmp_path / "two", "--set", "serving.candidates=50")
    assert told(*words) == "version 2 " + decides.format(2)
    assert told("items", "remove", tmp_path / "one", "--item", "1") == "version 3 is champion"
    assert told("items", "remove", tmp_path / "two", "--item", "1") == "version 4 " + decides.format(4)
    assert open_directory(tmp_path / "two").manifest["recipe"]["promotion"]["least_gain"] == -0.02
