"""Settings and recipes: one TOML file, one section per owner; default < recipe < `--set section.key=value`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from recsys.errors import RecipeError

S = TypeVar("S", bound="Settings")
Seconds = int
"""Of a setting: a moment in seconds since 1970; a recipe may say it as a date or a time."""


class Settings:
    """Base of every section: a frozen dataclass that names its section and refuses unknown keys.

    Checked by pydantic where a recipe enters; the classes themselves need the standard library alone, so that the model
    can be rebuilt where only torch is installed.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
    section: ClassVar[str]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]  # every subclass is a dataclass

    def _at_least(self, least: int, *names: str) -> None:
        """Raises ValueError: one of the settings is less."""
        self._must(f"be at least {least}" if least else "not be negative", lambda value: value >= least, names)

    def _from_to(self, low: int, high: int, *names: str) -> None:
        """Raises ValueError: one of the settings is less or more."""
        self._must(f"be from {low} to {high}", lambda value: low <= value <= high, names)

    def _one_of(self, known: Collection[str], *names: str) -> None:
        """Raises ValueError: one of the settings is another word."""
        self._must(f"be one of {', '.join(known)}", known.__contains__, names)

    def _must(self, be: str, is_so: Callable[[Any], bool], names: Iterable[str]) -> None:
        for name in names:
            if not is_so(value := getattr(self, name)):
                raise ValueError(f"{name} must {be}, found {value!r}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named set of sections, not yet given to their owners."""

    name: str
    """As messages tell it; empty where the sections are a verb's settings and no recipe."""
    sections: Mapping[str, Mapping[str, Any]]

    def read(self, owner: type[S]) -> S:
        """The owner's settings, checked.

        Raises RecipeError: an unknown key (the nearest is named) or a value of the wrong type or range.
        """
        values = self.sections.get(owner.section, {})
        kinds = {field.name: field.type for field in dataclasses.fields(owner)}  # type: ignore[arg-type]
        for key in values:
            if key not in kinds:
                raise self._refusal(f"unknown key {owner.section}.{key}{nearest(key, [*kinds])}")
        import pydantic

        values = {key: _seconds(value) if kinds[key] == "Seconds" else value for key, value in values.items()}
        try:
            settings: S = pydantic.TypeAdapter(owner).validate_json(
                json.dumps(values, default=str)
            )  # JSON: strict, yet lists may be tuples
            return settings
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in (owner.section, *first["loc"]))
            found = "" if first["type"] == "value_error" else f"; found {first['input']!r}"
            raise self._refusal(f"{where}: {first['msg'].removeprefix('Value error, ')}{found}") from None

    def but(self, owner: type[Settings], values: Mapping[str, Any]) -> Recipe:
        """The same with some of an owner's values."""
        return Recipe(self.name, {**self.sections, owner.section: {**self.sections.get(owner.section, {}), **values}})

    def resolved(self, owners: Iterable[type[Settings]]) -> dict[str, dict[str, Any]]:
        """Every section with every value filled in, as it goes into runs and bundles.

        Raises RecipeError: as `read`, and for a section that no owner has.
        """
        owners = list(owners)
        known = [owner.section for owner in owners]
        for section in self.sections:
            if section not in known:
                raise self._refusal(f"unknown section [{section}]{nearest(section, known)}")
        return {owner.section: self.read(owner).as_dict() for owner in owners}

    def toml(self) -> str:
        """The sections as a TOML file; dates become text, as `read` takes them."""
        return "\n".join(
            f"[{_key(section)}]\n" + "".join(f"{_key(key)} = {_toml(value)}\n" for key, value in values.items())
            for section, values in self.sections.items()
        )

    def _refusal(self, what: str) -> RecipeError:
        return RecipeError(f"recipe {self.name}: {what}" if self.name else what)


def load_recipe(name_or_path: str, folder: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe by path, or by name from `folder`, and apply `section.key=value` overrides.

    Raises RecipeError: no such recipe, not TOML, or an override that is not `section.key=value`.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = folder / f"{name_or_path}.toml"
    if not path.is_file():
        names = sorted(found.stem for found in folder.glob("*.toml"))
        raise RecipeError(f"no recipe {name_or_path!r}: give a .toml file or one of {', '.join(names)}")
    try:
        sections: dict[str, dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a TOML file: {error}") from None
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise RecipeError(f"{path}: {section!r} stands outside a section; put it under [section]")
    return Recipe(path.stem, override(sections, overrides))


def override(sections: Mapping[str, Mapping[str, Any]], overrides: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The sections with every `section.key=value` applied. Raises RecipeError: one is not of that form."""
    changed = {section: dict(values) for section, values in sections.items()}
    for text in overrides:
        place, equals, value = text.partition("=")
        section, dot, key = place.strip().partition(".")
        if not (equals and dot and key):
            raise RecipeError(f"--set {text!r}: write section.key=value")
        changed.setdefault(section, {})[key] = _value(value.strip())
    return changed


def _seconds(value: Any) -> Any:
    """A date or a time, of TOML or as text, in seconds since 1970; of UTC where it names no zone. All else as it is."""
    try:
        time = datetime.fromisoformat(str(value)) if isinstance(value, date | str) else None
    except ValueError:
        return value
    return value if time is None else int(time.replace(tzinfo=time.tzinfo or UTC).timestamp())


def flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Values by section.key."""
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def _value(text: str) -> Any:
    """A TOML value, or the text itself where it is none (so that names need no quotes)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, default=str, ensure_ascii=False).replace("\x7f", "\\u007f")  # else TOML's strings are JSON's


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def nearest(word: str, known: list[str]) -> str:
    """The end of a message about an unknown word: the known one that it may mean, else all."""
    if not known:
        return "; none is known"
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
