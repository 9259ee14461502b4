"""Weights under which no unit of a loss matters: geometric loss and scale-invariant loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from accel_weighting.methods.algebra import FLOOR, TINY, Array, LossMethod, log
from accel_weighting.statistics import State, Statistics


@dataclass(frozen=True)
class GeometricLoss(LossMethod):
    """Geometric loss strategy: the geometric mean ``(Π_k L_k)^{1/K}`` in place of the sum.

    Its gradient is that of ``Σ w_k L_k`` with ``w_k = (Π_j L_j)^{1/K} / (K L_k)``, held constant; every weighted loss
    is the same. There is no fixed sum. Weights are kept above a floor, so losses more than six orders of magnitude
    above their geometric mean are not balanced fully.

    The paper takes the current losses: that is ``lag=0``. With ``lag=1`` they are those of the window before.

    A task that is absent, or whose loss is 0, keeps its weight; the mean runs over the others, K being their number.

    Source: Chennupati et al., MultiNet++, CVPR Workshops 2019, arXiv 1904.08492.

    Example:
        >>> method = GeometricLoss()
        >>> weights, state = method.init(["metres", "millimetres"])
        >>> method.update(state, Statistics(losses=[0.5, 50.0], present=[True, True]))[0]  # the geometric mean is 5
        array([5.  , 0.05])
    """

    sum_of_one: ClassVar[bool] = True

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """``(Π_j L_j)^{1/K} / (K L_k)``, in logarithms."""
        L, active = statistics.losses, statistics.present & (statistics.losses > TINY)
        if not active.any():
            return state["weights"], state
        log_L = log(L, active)
        w = np.exp(log_L[active].mean() - log_L) / np.count_nonzero(active)
        weights = np.where(active, np.maximum(w, FLOOR), state["weights"])
        return weights, {"weights": weights}


@dataclass(frozen=True)
class ScaleInvariant(LossMethod):
    """Scale-invariant loss: ``Σ_k log L_k`` in place of the sum.

    Its gradient is that of ``Σ w_k L_k`` with ``w_k = 1 / L_k``, held constant: every weighted loss is 1. There is no
    fixed sum. Weights are kept above a floor, so losses beyond a million are not balanced fully.

    The usual form takes the current losses: that is ``lag=0``. With ``lag=1`` they are those of the window before.

    A task that is absent, or whose loss is 0, keeps its weight.

    Source: a baseline of Navon et al., Nash-MTL, ICML 2022, arXiv 2202.01017.
    """

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """``1 / L_k``."""
        active = statistics.present & (statistics.losses > TINY)
        inverse = 1 / np.where(active, statistics.losses, 1.0)
        weights = np.where(active, np.maximum(inverse, FLOOR), state["weights"])
        return weights, {"weights": weights}
