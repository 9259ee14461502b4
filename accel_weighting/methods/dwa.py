"""Dynamic weight average: more weight to the task whose loss falls more slowly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accel_weighting.methods.algebra import FLOOR, share
from accel_weighting.statistics import Method, State, Statistics, initial_vector

TINY = 1e-30
"""An average at or below it counts as none: the ratio to it would not be finite."""


@dataclass(frozen=True)
class DynamicWeightAverage(Method):
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
        ...     statistics = Statistics(torch.tensor(losses).double(), torch.tensor([True, True]))
        ...     weights, state = method.update(state, statistics)
        >>> weights  # ratios 0.5 and 1
        tensor([0.8756, 1.1244], dtype=torch.float64)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"losses"})
    positive_losses: ClassVar[bool] = True
    keeps_sum: ClassVar[bool] = True

    temperature: float = 2.0
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"Parameter `temperature` must be positive and finite. Found `temperature = {self.temperature}`."
            )
        if not (isinstance(self.steps_per_epoch, int) and self.steps_per_epoch >= 1):
            raise ValueError(
                "Parameter `steps_per_epoch` must be a positive integer. "
                f"Found `steps_per_epoch = {self.steps_per_epoch!r}`."
            )

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Weights 1 unless ``initial_weights`` say otherwise; no averages yet, which is written as 0."""
        weights = initial_vector(tasks, initial_weights).clamp(min=FLOOR)
        zeros = torch.zeros_like(weights)
        return weights, {"weights": weights, "sum": zeros, "count": zeros, "last": zeros, "before": zeros}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """Adds the window to the running epoch, closes the epochs that are full, and weights by the latest ratios."""
        present = statistics.present
        sums = state["sum"] + statistics.losses.where(present, 0.0)
        count = state["count"] + present
        full = count == self.steps_per_epoch
        before = torch.where(full, state["last"], state["before"])
        last = torch.where(full, sums / self.steps_per_epoch, state["last"])

        ready = present & (before > TINY)
        r = last / before
        weights = share(state["weights"], (r / self.temperature).where(ready, -math.inf).softmax(0), ready)
        running = {"sum": sums.where(~full, 0.0), "count": count.where(~full, 0.0)}
        return weights, {"weights": weights, **running, "last": last, "before": before}
