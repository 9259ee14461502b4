"""Dynamic weight average: more weight to the task whose loss falls more slowly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from accel_weighting.methods.algebra import TINY, Array, LossMethod, share, softmax
from accel_weighting.statistics import State, Statistics, count, positive


@dataclass(frozen=True)
class DynamicWeightAverage(LossMethod):
    """Dynamic weight average: ``λ_k = K softmax_k(r_k / T)``, ``r_k = L_k(e−1) / L_k(e−2)`` (eq. 7).

    The paper's L are means over whole epochs. Here ``steps_per_epoch`` windows are averaged into one "epoch"; with the
    default of 1 the ratio is that of the last two windows, which is mostly the noise of their batches: pass the number
    of optimizer steps per epoch for the paper's method. Each task counts its own windows.

    The paper's weights come from the epochs before: that is ``lag=1``. With ``lag=0`` the step that completes an epoch
    is already weighted by it.

    Until a task has two averages it keeps its weight (1), and so does a task that is absent, or whose older average is
    0; the others share the rest, and the sum stays that of the initial weights (K).

    Args:
        temperature: T; a larger one brings the weights closer together.
        steps_per_epoch: Windows per average.

    Raises:
        ValueError: An argument is out of range.

    Source: Liu, Johns and Davison, CVPR 2019, arXiv 1803.10704.

    Example:
        >>> method = DynamicWeightAverage()
        >>> weights, state = method.init(["falls", "stays"])
        >>> for losses in ([4.0, 1.0], [2.0, 1.0]):
        ...     weights, state = method.update(state, Statistics(losses, present=[True, True]))
        >>> weights  # ratios 0.5 and 1
        array([0.875647, 1.124353])
    """

    keeps_sum: ClassVar[bool] = True
    memory: ClassVar[tuple[str, ...]] = ("sum", "count", "last", "before")

    temperature: float = positive(2.0)
    steps_per_epoch: int = count(1)

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """Adds the window to the running epoch, closes the epochs that are full, and weights by the latest ratios.

        An average that is not there yet is written as 0.
        """
        present = statistics.present
        sums = state["sum"] + np.where(present, statistics.losses, 0.0)
        counts = state["count"] + present
        full = counts == self.steps_per_epoch
        before = np.where(full, state["last"], state["before"])
        last = np.where(full, sums / self.steps_per_epoch, state["last"])

        ready = present & (before > TINY)
        r = last / np.where(ready, before, 1.0)
        weights = share(state["weights"], softmax(r / self.temperature, ready), ready)
        running = {"sum": np.where(full, 0.0, sums), "count": np.where(full, 0.0, counts)}
        return weights, {"weights": weights, **running, "last": last, "before": before}
