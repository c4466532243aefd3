"""From scores to probabilities: how often an item of such a share of the candidates was the user's next one.

B histories · N candidates · Z steps
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys.batch import PADDING

MOST = 5000
"""Users by whom scores are calibrated, evenly chosen."""


@dataclass(frozen=True)
class Calibration:
    """A rising line of Z points, level beyond its ends (isotonic regression, Zadrozny & Elkan 2002)."""

    shares_Z: Tensor
    """Log of the softmax of scores over a request's candidates, float64, ascending."""
    probabilities_Z: Tensor
    """Share of such candidates that were the next item, float64."""

    @staticmethod
    def fit(rows_BN: Tensor, scores_BN: Tensor, next_B: Tensor) -> Calibration | None:
        """Of candidates and the item that came next; None where it never was among them."""
        from sklearn.isotonic import IsotonicRegression

        some_BN, hit_BN = rows_BN != PADDING, rows_BN == next_B[:, None]
        if not bool(hit_BN.any()):
            return None
        shares = scores_BN.double().log_softmax(1)[some_BN].numpy()
        fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(shares, hit_BN[some_BN].double().numpy())
        return Calibration(torch.from_numpy(fitted.X_thresholds_), torch.from_numpy(fitted.y_thresholds_))

    def probabilities(self, scores_BN: Tensor) -> Tensor:
        """Of all candidates of each request, float32, shape kept; 0 where there is none."""
        shares_BN = scores_BN.double().log_softmax(1).numpy()
        found_BN = torch.from_numpy(np.interp(shares_BN, self.shares_Z.numpy(), self.probabilities_Z.numpy()))
        return found_BN.masked_fill(scores_BN == -torch.inf, 0).float()

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return {"log_shares": self.shares_Z.tolist(), "probabilities": self.probabilities_Z.tolist()}

    @staticmethod
    def read(found: Mapping[str, Any] | None) -> Calibration | None:
        """Of a manifest; None where it has none."""
        if not found:
            return None
        names = ("log_shares", "probabilities")
        return Calibration(*(torch.tensor(found[name], dtype=torch.float64) for name in names))
