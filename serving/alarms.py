"""An alarm where the share of marked items that a user is shown rises, such as headlines that a classifier calls negative.

S users, or streams · D days
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.errors import RequestError

Counts = npt.NDArray[np.int64]
DAYS = 5
"""Days that are held against all days before them."""
CHANCE = 1e-3
"""Chance of an alarm on a day when nothing rose, at most."""


def alarms(marked_SD: Counts, shown_SD: Counts, days: int = DAYS, chance: float = CHANCE) -> npt.NDArray[np.bool_]:
    """Whether the marked items of the last `days` days are too many for the user's days before them, day by day, S × D.

    Fisher's exact test, one-sided: were the days alike, the marked items would lie among the shown ones by chance, and so many
    of them in the last days with a probability below `chance`. Nothing is assumed of how large the share is, and a short past
    rings no alarm. Raises RequestError: counts that cannot be, or days or a chance that are none.
    """
    if marked_SD.shape != shown_SD.shape or bool(((marked_SD < 0) | (marked_SD > shown_SD)).any()):
        raise RequestError("of each day give how many items were shown and how many of them are marked, at most as many")
    if days < 1 or not 0 < chance < 1:
        raise RequestError(f"days is {days} and chance {chance}: give 1 day or more, and a chance between 0 and 1")
    from scipy.stats import hypergeom

    marked_SD, shown_SD = marked_SD.cumsum(1), shown_SD.cumsum(1)
    recent: list[Any] = [
        whole_SD - np.pad(whole_SD, ((0, 0), (days, 0)))[:, : whole_SD.shape[1]] for whole_SD in (marked_SD, shown_SD)
    ]
    rung_SD: npt.NDArray[np.bool_] = hypergeom.sf(recent[0] - 1, shown_SD, marked_SD, recent[1]) < chance
    return rung_SD
