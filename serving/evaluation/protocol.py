"""Protocols: who is judged, by which targets, among which items; P1 to P5 by name, others by a recipe's [protocol]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from recsys.config import Settings
from recsys.errors import RequestError


@dataclass(frozen=True)
class ProtocolSettings(Settings):
    """How lists are judged. Which events are the test, the data set's [split] says."""

    section: ClassVar[str] = "protocol"

    name: str = ""
    """One of P1, P2, P3, P3-repeats, P4 and P5, which the data set must fit; empty: none, or the one that fits."""
    split: Literal["test", "validation"] = "test"
    """Whose targets count. The history is all that came before."""
    targets: Literal["new", "all", "next"] = "new"
    """`new`: the split's distinct items that are not in the user's history; `all`: those too; `next`: the first event's."""
    filter_seen: bool = True
    """Whether items of the history are left out of lists."""
    candidates: Literal["all", "warm", "cold"] = "all"
    """Items of lists and targets: the full catalogue, those with training events, or those that the split keeps cold."""

    def __post_init__(self) -> None:
        if self.name and self.name not in PROTOCOLS:
            raise ValueError(f"name {self.name!r} is no protocol; give one of {', '.join(PROTOCOLS)}, or leave it out")
        if self.targets == "all" and self.filter_seen:
            raise ValueError("targets = all counts items of the history, which filter_seen leaves out; set filter_seen = false")


@dataclass(frozen=True)
class Named:
    """A protocol with a name: what is judged, and which data set it is for."""

    targets: Literal["new", "all", "next"]
    filter_seen: bool
    data: Mapping[str, Mapping[str, Any]]
    """Settings that the data set must have been made with, by section."""
    bundle: bool = False
    """Whether it judges the served path, for which a run is not enough."""


LEAVE_ONE_OUT: dict[str, Any] = {"method": "leave_one_out", "cold_one_in": 0}
RETAIL: dict[str, dict[str, Any]] = {
    "data": {"source": "online-retail"},
    "split": {"method": "global_time", "test_start": 1_320_796_800, "validation_days": 14, "test_days": 0, "cold_one_in": 0},
}
PROTOCOLS: dict[str, Named] = {
    "P1": Named("new", True, {"data": {"source": "ml-1m"}, "split": LEAVE_ONE_OUT}),
    "P2": Named("new", True, {"data": {"source": "amazon-beauty"}, "split": LEAVE_ONE_OUT}),
    "P3": Named("new", True, RETAIL),
    "P3-repeats": Named("all", False, RETAIL),
    "P4": Named("new", True, {"split": {"cold_one_in": 10}}),
    "P5": Named("new", True, {}, bundle=True),
}


def protocol_of(settings: ProtocolSettings, made: Mapping[str, Mapping[str, Any]], kind: str) -> ProtocolSettings:
    """The settings with their name: the one that was asked for, or the one that fits a data set made with settings `made`.

    `kind` is what is judged: model, bundle or lists. A named protocol decides the targets and the filter.
    Raises RequestError: the data set, or what is judged, is not what the named one is for.
    """
    if settings.name:
        named = PROTOCOLS[settings.name]
        wrong = _differences(named, made)
        if wrong:
            raise RequestError(f"{settings.name} is for data sets with {'; '.join(wrong)}; judge by another protocol")
        if named.bundle and kind != "bundle":
            raise RequestError(f"{settings.name} judges the served path: give a bundle of `recsys export`, not a {kind}")
        if (settings.split, settings.candidates) != ("test", "all"):
            raise RequestError(f"{settings.name} judges the test among all items; leave out protocol.split and .candidates")
        if (settings.targets, settings.filter_seen) not in ((named.targets, named.filter_seen), ("new", True)):
            decided = f"targets = {named.targets} and filter_seen = {str(named.filter_seen).lower()}"
            raise RequestError(f"{settings.name} has {decided}; leave out protocol.targets and .filter_seen")
        return replace(settings, targets=named.targets, filter_seen=named.filter_seen)
    for name, named in PROTOCOLS.items():
        wanted = (named.targets, named.filter_seen, "all", "test")
        fits = (settings.targets, settings.filter_seen, settings.candidates, settings.split) == wanted
        if fits and named.data and not _differences(named, made):
            return replace(settings, name=name)
    return settings


def _differences(named: Named, made: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"{section}.{key} = {value!r} (this has {made[section].get(key)!r})"
        for section, values in named.data.items()
        for key, value in values.items()
        if made[section].get(key, 0 if isinstance(value, int) else None) != value
    ]


def in_words(settings: ProtocolSettings, made: Mapping[str, Mapping[str, Any]], request_time: bool) -> str:
    """What a protocol judges, in sentences for a report."""
    split = made["split"]
    cut = {
        "leave_one_out": "each user's last event is the test, the one before it validation",
        "global_time": f"the test begins at {_when(split.get('test_start', 0))}"
        + (f" and lasts {split['test_days']} days" if split.get("test_days") else "")
        + f", validation {split.get('validation_days')} days before",
        "user_holdout": f"of one user in {split.get('holdout_one_in')} nothing is learnt, and their last event is the test",
    }[split["method"]]
    targets = {
        "new": "the distinct items of the {} that are new to the user",
        "all": "the distinct items of the {}, also those that the user had before",
        "next": "the first item of the {}" + (", where it is new to the user" if settings.filter_seen else ""),
    }[settings.targets].format(settings.split)
    among = {
        "all": "the full catalogue",
        "warm": "the items with training events",
        "cold": "the items of which no event was learnt, by description alone",
    }[settings.candidates]
    cold = f" One item in {split['cold_one_in']} is kept cold." if split.get("cold_one_in") else ""
    seen = "items of the history are left out of lists" if settings.filter_seen else "lists may name items of the history"
    told = " The model is told when each user's first target happened." if request_time else ""
    name = f"{settings.name}: " if settings.name else ""
    said = f"{name}{cut}; targets are {targets}, ranked among {among}; {seen}.{cold}{told}"
    return said[0].upper() + said[1:]


def _when(second: int) -> str:
    return f"{datetime.fromtimestamp(second, UTC):%Y-%m-%d %H:%M} UTC"
