"""An attention-based recommender: from an event log to users' screens.

`load` gives a `Recommender` with `recommend`, `explain` and `similar`; `evaluate` gives a report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recsys.version import __version__

if TYPE_CHECKING:
    from recsys.api import Recommender, evaluate, load

__all__ = ["Recommender", "__version__", "evaluate", "load"]


def __getattr__(name: str) -> Any:
    """The public names, which load torch and all that serving needs when they are first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from recsys import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__]
