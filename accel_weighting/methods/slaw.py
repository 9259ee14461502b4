"""SLAW: the noise of a loss in place of its gradient's norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from accel_weighting.methods.algebra import Array, LossMethod, lerp, share
from accel_weighting.statistics import State, Statistics, within


@dataclass(frozen=True)
class SLAW(LossMethod):
    """Scaled loss approximate weighting: ``w_k = K (1/s_k) / Σ_j (1/s_j)``, s the standard deviation of the loss.

    A loss that varies much from step to step has a long gradient; so ``s_k = √(a_k − b_k²)`` with the moving averages
    ``a ← β a + (1 − β) L²`` and ``b ← β b + (1 − β) L`` stands for ``n_k``, and no gradient is needed.

    The averages begin with a task's first loss; with their difference taken as a moving variance no digits are lost.
    A loss that does not vary would take all the weight: ``s`` is at least 1e-4 of the mean. A task that is absent, or
    was seen once, keeps its weight; the others share the rest of the sum (K). Losses may be negative.

    Args:
        decay: β, in (0, 1).

    Raises:
        ValueError: ``decay`` is out of range.

    Source: Crawshaw and Košecká, SLAW: Scaled Loss Approximate Weighting for Efficient Multi-Task Learning, arXiv
    2109.08218. Its text was not at hand: how its averages begin is not known here.
    """

    positive_losses: ClassVar[bool] = False
    keeps_sum: ClassVar[bool] = True
    memory: ClassVar[tuple[str, ...]] = ("mean", "variance", "count")

    decay: float = within("(0, 1)", 0.99)

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """Takes the losses into the averages, and shares the sum out by ``1/s``."""
        L, present, first = statistics.losses, statistics.present, state["count"] == 0
        b = np.where(first, L, lerp(state["mean"], L, 1 - self.decay))
        variance = self.decay * (state["variance"] + (1 - self.decay) * (L - state["mean"]) ** 2)
        moments = {"mean": b, "variance": np.where(first, 0.0, variance), "count": state["count"] + 1}
        state = {**state, **{key: np.where(present, value, state[key]) for key, value in moments.items()}}

        s = np.maximum(np.sqrt(state["variance"]), 1e-4 * np.abs(state["mean"]))
        ready = present & (state["count"] > 1) & (s > 0)
        if ready.any():
            inverse = s[ready].min() / np.where(ready, s, 1.0)
            state["weights"] = share(state["weights"], inverse, ready)
        return state["weights"], state
