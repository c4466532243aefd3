"""The settings that a verb reads: a recipe with what was said beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys.errors import RecipeError

if TYPE_CHECKING:
    from recsys.config import Recipe, Settings
    from recsys.tracking import Tracking

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
"""Those that are shipped; beside the command, in a checkout and in a wheel."""


def recipe_of(name: str, overrides: list[str] | None) -> Recipe:
    from recsys.config import load_recipe

    recipe = load_recipe(name, RECIPES, overrides or ())
    recipe.resolved(owners())
    return recipe


def resolved(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """All that a run is made by: every section but [tune], which says what to try beside it."""
    return {section: values for section, values in recipe.resolved(owners()).items() if section != "tune"}


def owners() -> list[type[Settings]]:
    from features.leaks import LeakSettings
    from features.schema import DataSettings
    from features.split import SplitSettings
    from features.synthetic import SyntheticSettings
    from recsys.tracking import TrackingSettings
    from serving.evaluation.gate import PromotionSettings
    from serving.evaluation.protocol import ProtocolSettings
    from serving.guards import GuardSettings
    from serving.index import IndexSettings
    from serving.nightly import NightlySettings
    from serving.ranking import ServingSettings
    from serving.states import DepthSettings
    from training.run import DECISIVE, RANKING
    from training.tune import TuneSettings

    learnt = [DataSettings, SyntheticSettings, SplitSettings, LeakSettings, *DECISIVE, *RANKING, TuneSettings]
    served = [IndexSettings, DepthSettings, ServingSettings, NightlySettings, GuardSettings]
    return [*learnt, *served, ProtocolSettings, PromotionSettings, TrackingSettings]


def merge(
    sections: Mapping[str, Mapping[str, Any]], overrides: list[str] | None, *owners: type[Settings], name: str = ""
) -> Recipe:
    """A recipe of the sections with the overrides, which may be of the owners' sections alone."""
    from recsys.config import Recipe, override

    known = [owner.section for owner in owners]
    for section in override({}, overrides or ()):
        if section not in known:
            raise RecipeError(f"--set {section}.…: this verb reads [{'] and ['.join(known)}] alone; leave it out")
    return Recipe(name, override(sections, overrides or ()))


def tracking_of(settings: list[str] | None, *others: type[Settings]) -> Tracking:
    """The registry; the settings may be of others too, who read them themselves."""
    from recsys.tracking import Tracking, TrackingSettings

    return Tracking(merge({}, settings, TrackingSettings, *others).read(TrackingSettings))
