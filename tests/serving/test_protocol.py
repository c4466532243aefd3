"""Protocols by name: what data they are for, what they decide, and how a report says so."""

import pytest

from recsys.config import Recipe
from recsys.errors import RecipeError, RequestError
from serving.evaluation.protocol import PROTOCOLS, ProtocolSettings, in_words, protocol_of

LEAVE_ONE_OUT = {"method": "leave_one_out", "test_start": 0, "validation_days": 14, "cold_one_in": 0}
RETAIL = {"method": "global_time", "test_start": 1_320_796_800, "validation_days": 14, "test_days": 0, "cold_one_in": 0}
MADE = {
    "P1": {"data": {"source": "ml-1m"}, "split": LEAVE_ONE_OUT},
    "P2": {"data": {"source": "amazon-beauty"}, "split": LEAVE_ONE_OUT},
    "P3": {"data": {"source": "online-retail"}, "split": RETAIL},
    "P3-repeats": {"data": {"source": "online-retail"}, "split": RETAIL},
    "P4": {"data": {"source": "files"}, "split": LEAVE_ONE_OUT | {"cold_one_in": 10}},
    "P5": {"data": {"source": "files"}, "split": LEAVE_ONE_OUT},
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_named_protocol_decides_targets_and_filter_and_is_told_from_the_data_set(name: str) -> None:
    chosen = protocol_of(ProtocolSettings(name=name), MADE[name], "bundle")
    repeats = name == "P3-repeats"
    assert (chosen.targets, chosen.filter_seen) == (("all", False) if repeats else ("new", True))
    unnamed = protocol_of(ProtocolSettings(targets=chosen.targets, filter_seen=chosen.filter_seen), MADE[name], "bundle")
    assert unnamed.name == ("" if name == "P5" else name)
    assert in_words(chosen, MADE[name], False).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["P1", "P2", "P3", "P4"])
def test_a_named_protocol_refuses_other_data_and_says_what_differs(name: str) -> None:
    made = {"data": {"source": "ml-100k"}, "split": LEAVE_ONE_OUT | {"cold_one_in": 7}}
    with pytest.raises(RequestError, match=r"(source|cold_one_in) = .*\(this has "):
        protocol_of(ProtocolSettings(name=name), made, "bundle")


def test_a_named_protocol_is_of_the_test_and_of_all_items() -> None:
    for wrong in ({"split": "validation"}, {"candidates": "warm"}):
        with pytest.raises(RequestError, match="judges the test among all items"):
            protocol_of(ProtocolSettings(name="P1", **wrong), MADE["P1"], "model")
    assert protocol_of(ProtocolSettings(split="validation"), MADE["P1"], "model").name == ""


def test_a_named_protocol_is_not_bent_by_other_targets() -> None:
    for wrong in (ProtocolSettings(name="P1", targets="next"), ProtocolSettings(name="P1", filter_seen=False)):
        with pytest.raises(RequestError, match=r"P1 has targets = new and filter_seen = true; leave out"):
            protocol_of(wrong, MADE["P1"], "model")


def test_the_served_path_needs_a_bundle() -> None:
    with pytest.raises(RequestError, match="not a model"):
        protocol_of(ProtocolSettings(name="P5"), MADE["P5"], "model")


def test_a_protocol_of_another_split_or_of_fewer_items_has_no_name() -> None:
    warm = protocol_of(ProtocolSettings(candidates="warm"), MADE["P1"], "model")
    assert (warm.name, warm.candidates) == ("", "warm")
    assert protocol_of(ProtocolSettings(targets="next"), MADE["P1"], "model").name == ""


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"name": "P9"}, "P1, P2"), ({"targets": "all"}, "filter_seen = false"), ({"split": "future"}, "split")],
)
def test_what_cannot_be_a_protocol_is_one_line(settings: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as error:
        Recipe("x", {"protocol": settings}).read(ProtocolSettings)
    assert "\n" not in str(error.value)


def test_words_say_the_day_of_the_cut_the_targets_and_what_the_model_is_told() -> None:
    said = in_words(ProtocolSettings(name="P3-repeats", targets="all", filter_seen=False), MADE["P3"], True)
    assert "2011-11-09 00:00 UTC" in said
    assert "also those that the user had before" in said
    assert "lists may name items of the history" in said
    assert "told when each user's first target happened" in said
