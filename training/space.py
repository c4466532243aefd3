"""What may be searched: settings of training by section and key, each with its choices or its range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from recsys.config import Recipe, Settings, nearest
from training.run import DECISIVE

DEFAULT_SEARCH: dict[str, dict[str, Any]] = {
    "model": {"dropout": {"low": 0.0, "high": 0.8}, "temperature": {"low": 0.03, "high": 1.0, "log": True}},
    "train": {"batch_tokens": [1_600, 3_200, 6_400, 12_800]},
    "optimizer": {
        "kind": ["adamw", "muon"],
        "muon_learning_rate": {"low": 2e-3, "high": 1e-1, "log": True},
        "learning_rate": {"low": 3e-4, "high": 1e-2, "log": True},
        "weight_decay": {"low": 1e-3, "high": 0.3, "log": True},
    },
}
"""What is searched where the recipe does not say."""


@dataclass(frozen=True)
class TuneSettings(Settings):
    """What is searched, and how long."""

    section: ClassVar[str] = "tune"

    trials: int = 20
    """Trials in all, also pruned and failed ones; the first is the recipe itself where the search holds its values."""
    minutes: float = 0.0
    """No new trial starts after so long in one command; 0: no limit."""
    search: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: DEFAULT_SEARCH)
    """By section and key, a list of choices or {low = …, high = …}, with log = true where ratios matter."""

    def __post_init__(self) -> None:
        if self.trials < 1 or self.minutes < 0:
            raise ValueError(f"trials must be at least 1 and minutes not negative, found {self.trials} and {self.minutes}")
        known = {owner.section: [field.name for field in fields(owner)] for owner in DECISIVE}  # type: ignore[arg-type]
        for section, domains in self.search.items():
            if section not in known:
                raise ValueError(f"search.{section} is no section that decides training{nearest(section, list(known))}")
            for key, domain in domains.items():
                if key not in known[section]:
                    raise ValueError(f"unknown key search.{section}.{key}{nearest(key, known[section])}")
                _check(f"search.{section}.{key}", _kind(section, key), domain)
        if not self.domains:
            raise ValueError("search is empty; name a setting to search, or leave it out")

    @property
    def domains(self) -> dict[str, Any]:
        """The search by `section.key`, every number of the setting's type."""
        return {
            f"{section}.{key}": _typed(_kind(section, key), domain)
            for section, domains in self.search.items()
            for key, domain in domains.items()
        }


def own_values(resolved: Mapping[str, Mapping[str, Any]], domains: Mapping[str, Any]) -> dict[str, Any] | None:
    """The recipe's own values of what is searched, by `section.key`; None where one lies outside the search."""
    own = {name: resolved[name.partition(".")[0]][name.partition(".")[2]] for name in domains}
    return own if all(_holds(domain, own[name]) for name, domain in domains.items()) else None


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with values by `section.key` in the place of its own."""
    sections = {section: dict(given) for section, given in recipe.sections.items()}
    for name, value in values.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return Recipe(recipe.name, sections)


def _holds(domain: Any, value: Any) -> bool:
    return domain["low"] <= value <= domain["high"] if isinstance(domain, Mapping) else value in domain


def _kind(section: str, key: str) -> type:
    owner = next(owner for owner in DECISIVE if owner.section == section)
    return type(getattr(owner, key))  # a field's default stands on its class


def _typed(kind: type, domain: Any) -> Any:
    if isinstance(domain, Mapping):
        return {**domain, "low": kind(domain["low"]), "high": kind(domain["high"])}
    return [kind(choice) for choice in domain]


def _check(name: str, kind: type, domain: Any) -> None:
    """Raises ValueError: neither choices nor a range, or not of the setting's type."""
    is_range = isinstance(domain, Mapping) and {"low", "high"} <= set(domain) <= {"low", "high", "log"}
    if not (is_range and kind in (int, float)) and not (isinstance(domain, list | tuple) and domain):
        forms = "choices, [a, b]" + (", or a range, {low = a, high = b, log = true}" if kind in (int, float) else "")
        raise ValueError(f"{name} must be {forms}; found {domain!r}")
    values = [domain["low"], domain["high"]] if is_range else domain
    for value in values:
        if type(value) not in ((int, float) if kind is float else (kind,)):
            raise ValueError(f"{name} must be of type {kind.__name__}, found {value!r}")
    if is_range:
        log = domain.get("log", False)
        if type(log) is not bool:
            raise ValueError(f"{name}: log must be true or false, found {log!r}")
        if not values[0] < values[1] or (log and values[0] <= 0):
            raise ValueError(f"{name}: low must be below high{' and above 0' if log else ''}, found {domain!r}")
