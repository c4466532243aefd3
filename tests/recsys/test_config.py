"""Settings and recipes, on a section of their own."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.config import Recipe, Seconds, Settings, load_recipe, nearest
from recsys.errors import RecipeError


@dataclass(frozen=True)
class KitchenSettings(Settings):
    section: ClassVar[str] = "kitchen"

    cooks: int = 3
    salt: float = 0.5
    open: bool = False
    chef: str = "Ada"
    dishes: tuple[str, ...] = ("soup",)
    opens: Seconds = 0

    def __post_init__(self) -> None:
        if self.cooks < 1:
            raise ValueError(f"cooks must be at least 1, found {self.cooks}")


@dataclass(frozen=True)
class CellarSettings(Settings):
    section: ClassVar[str] = "cellar"

    bottles: int = 11


OWNERS = [KitchenSettings, CellarSettings]


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "dinner") -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def read(path: Path, *overrides: str) -> KitchenSettings:
    return load_recipe(str(path), path.parent, overrides).read(KitchenSettings)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as refused:
        load_recipe(str(path), path.parent, overrides).resolved(OWNERS)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_a_recipe_overrides_a_default_and_set_overrides_both(write):
    path = write("[kitchen]\ncooks = 5\nsalt = 0.25")
    assert read(path, "kitchen.salt=0.75") == KitchenSettings(cooks=5, salt=0.75)


def test_the_last_of_two_sets_of_one_key_counts(write):
    assert read(write(""), "kitchen.cooks=5", "kitchen.cooks=7").cooks == 7


def test_an_empty_recipe_resolves_to_every_default(write):
    path = write("")
    resolved = load_recipe(str(path), path.parent).resolved(OWNERS)
    assert resolved == {"kitchen": dataclasses.asdict(KitchenSettings()), "cellar": {"bottles": 11}}


@given(
    st.builds(
        KitchenSettings,
        cooks=st.integers(1, 2**40),
        salt=st.floats(allow_nan=False, allow_infinity=False),
        chef=st.text(),
        dishes=st.lists(st.text()).map(tuple),
    )
)
def test_settings_that_went_into_a_recipe_come_out_equal(settings):
    recipe = Recipe("again", Recipe("once", {"kitchen": settings.as_dict()}).resolved([KitchenSettings]))
    assert recipe.read(KitchenSettings) == settings


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KitchenSettings().cooks = 4


@pytest.mark.parametrize("word", ["Bo", '"Bo"', " Bo "])
def test_a_name_given_by_set_needs_no_quotes(write, word):
    assert read(write(""), f"kitchen.chef={word}").chef == "Bo"


def test_a_value_given_by_set_has_the_type_that_toml_gives_it(write):
    settings = read(write(""), "kitchen.dishes=['stew', 'pie']", "kitchen.open=true", "kitchen.cooks = 1_001")
    assert settings == KitchenSettings(dishes=("stew", "pie"), open=True, cooks=1001)


def test_a_value_given_by_set_may_hold_an_equals_sign(write):
    assert read(write(""), "kitchen.chef=a=b").chef == "a=b"


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("2026-04-10", 1_775_779_200),
        ("'2026-04-10'", 1_775_779_200),
        ("2026-04-10T02:00:07", 1_775_786_407),
        ("2026-04-10 02:00:07+02:00", 1_775_779_207),
        ("1775779200", 1_775_779_200),
    ],
)
def test_a_date_will_do_for_seconds(write, said, seconds):
    assert read(write(f"[kitchen]\nopens = {said}")).opens == read(write(""), f"kitchen.opens={said}").opens == seconds
    assert "kitchen.cooks: " in refusal(write("[kitchen]\ncooks = 2026-04-10"))
    assert read(write("[kitchen]\nchef = 2026-04-10")).chef == "2026-04-10"


def test_a_whole_number_will_do_for_a_fraction(write):
    assert read(write("[kitchen]\nsalt = 2")).salt == 2.0


def test_an_unknown_key_is_refused_with_the_nearest(write):
    assert refusal(write("[kitchen]\ncoks = 5")) == "recipe dinner: unknown key kitchen.coks; did you mean cooks?"


def test_an_unknown_key_like_none_is_refused_with_all_that_are_known(write):
    message = refusal(write(""), "kitchen.zzz=5")
    assert message.endswith("unknown key kitchen.zzz; known are cooks, salt, open, chef, dishes, opens")


def test_an_unknown_section_is_refused_with_the_nearest(write):
    assert refusal(write("[kichen]\ncooks = 5")) == "recipe dinner: unknown section [kichen]; did you mean kitchen?"


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("cooks='7'", "'7'"),
        ("cooks=7.5", "7.5"),
        ("cooks=true", "True"),
        ("salt=much", "'much'"),
        ("open=1", "1"),
        ("chef=7", "7"),
        ("dishes=soup", "'soup'"),
        ("cooks=[7]", "[7]"),
    ],
)
def test_a_value_of_another_type_is_refused_with_place_and_value(write, override, found):
    message = refusal(write(""), f"kitchen.{override}")
    assert f"kitchen.{override.partition('=')[0]}: " in message
    assert message.endswith(f"found {found}")


def test_a_wrong_entry_of_a_list_is_refused_with_its_place(write):
    assert "kitchen.dishes.1: " in refusal(write("[kitchen]\ndishes = ['stew', 7]"))


def test_a_value_out_of_range_is_refused_in_its_owners_words(write):
    assert refusal(write("[kitchen]\ncooks = 0")) == "recipe dinner: kitchen: cooks must be at least 1, found 0"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"cooks": 0}, "kitchen: cooks must be at least 1, found 0"),
        ({"coks": 5}, "unknown key kitchen.coks; did you mean cooks?"),
    ],
)
def test_settings_that_are_no_recipes_are_refused_without_one(values, says):
    with pytest.raises(RecipeError) as refused:
        Recipe("", {"kitchen": values}).read(KitchenSettings)
    assert str(refused.value) == says


def test_where_nothing_is_known_a_message_says_so():
    assert nearest("nope", []) == "; none is known"


@pytest.mark.parametrize("text", ["kitchen", "kitchen.cooks", "cooks=3", "kitchen.=3", "=3", ""])
def test_a_set_of_another_form_is_refused_with_the_form(write, text):
    assert refusal(write(""), text) == f"--set {text!r}: write section.key=value"


def test_a_recipe_is_found_by_its_name(write, tmp_path):
    write("[cellar]\nbottles = 13", "autumn")
    recipe = load_recipe("autumn", tmp_path)
    assert (recipe.name, recipe.read(CellarSettings).bottles) == ("autumn", 13)


def test_a_missing_recipe_is_refused_with_those_that_are_there(write, tmp_path):
    write("", "autumn"), write("", "summer")
    with pytest.raises(RecipeError, match=r"no recipe 'winter': .* one of autumn, summer$"):
        load_recipe("winter", tmp_path)


@pytest.mark.parametrize("text", ["kitchen", "[kitchen\n", "[kitchen]\ncooks = 1\ncooks = 2"])
def test_a_file_that_is_not_toml_is_refused(write, text):
    assert "not a TOML file" in refusal(write(text))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "dinner.toml"
    path.write_bytes(b"\xff\xfe")
    assert "not a TOML file" in refusal(path)


def test_a_key_outside_a_section_is_refused_by_name(write):
    assert "'cooks' stands outside a section" in refusal(write("cooks = 3"))


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
        st.recursive(
            st.integers(-(2**60), 2**60)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.booleans()
            | st.text(st.characters(exclude_categories=["Cs"]), max_size=11),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["low", "high", "a b"]), inner),
            max_leaves=5,
        ),
    )
)
def test_a_recipe_written_as_toml_is_read_again_as_it_was(values):
    sections = {"kitchen": values, "cellar.old": {"bottles": 3}}
    assert tomllib.loads(Recipe("dinner", sections).toml()) == sections
