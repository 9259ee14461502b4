"""UW-SO: uncertainty weighting at its analytical optimum, softened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from accel_weighting.methods.algebra import TINY, Array, LossMethod, share, softmax
from accel_weighting.statistics import State, Statistics, positive


@dataclass(frozen=True)
class UWSO(LossMethod):
    """Softly optimal uncertainty weighting: ``w_k = softmax_k((1 / L_k) / T)``, held constant.

    At the optimum of its σ uncertainty weighting is ``1 / L_k``; the softmax with a temperature takes the place of its
    slow descent. Units of the losses matter: at T far below the differences of the 1 / L one task has all the weight.

    The sum of the weights is 1, as in the paper; it stays that of the initial weights: start with 1 each for a sum of
    K. Weights stand on a floor of 1e-6. The paper takes the current losses: that is ``lag=0``. With ``lag=1`` they are
    those of the window before. A task that is absent, or whose loss is 0, keeps its weight.

    Args:
        temperature: T; a larger one brings the weights closer together. The paper tunes it.

    Raises:
        ValueError: ``temperature`` is not positive.

    Source: Kirchdorfer et al., Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning, GCPR 2024, arXiv
    2408.07985; the formula from code that follows it, the paper's text was not at hand.
    """

    keeps_sum: ClassVar[bool] = True
    sum_of_one: ClassVar[bool] = True

    temperature: float = positive(1.0)

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """``softmax((1 / L) / T)``."""
        active = statistics.present & (statistics.losses > TINY)
        inverse = 1 / np.where(active, statistics.losses, 1.0) / self.temperature
        weights = share(state["weights"], softmax(inverse, active), active)
        return weights, {"weights": weights}
