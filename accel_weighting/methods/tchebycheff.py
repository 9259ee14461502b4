"""Smooth Tchebycheff scalarization: a soft maximum of the losses in place of their sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from accel_weighting.methods.algebra import Array, LossMethod, log, share, softmax
from accel_weighting.statistics import State, Statistics, count, positive


@dataclass(frozen=True)
class SmoothTchebycheff(LossMethod):
    """Smooth Tchebycheff scalarization: the worst tasks, relative to where they were, get the weight.

    The paper minimises ``g_μ = μ log Σ_k exp(f_k / μ)``, which tends to ``max_k f_k`` as μ → 0, and whose gradient is
    ``Σ_k softmax_k(f / μ) ∇f_k``. For multi-task learning its authors take ``f_k = log(L_k / n_k)`` with a nadir n_k,
    the task's mean loss when training has settled, so that neither units nor unequal starts decide who is worst.
    Hence ``w_k ∝ softmax_k(f / μ) / L_k``, held constant. The direction is theirs; the length is set by a sum of K
    instead of their factor K, so that the learning rate keeps its meaning. Note that ``μ = 1``, their code's default,
    gives constant weights ∝ 1 / n_k; smaller is more Tchebycheff.

    The nadir is the mean of a task's first ``warmup`` positive losses, during which it keeps its weight (1). The
    authors minimise ``Σ log L_k`` for four epochs, and average the next.

    The paper takes the current losses: that is ``lag=0``. With ``lag=1`` they are those of the window before.

    A task that is absent, or whose loss is 0, keeps its weight; the others share the rest, and the sum stays that of
    the initial weights (K).

    Args:
        mu: μ, the smoothing.
        warmup: Windows that make up the nadir.

    Raises:
        ValueError: An argument is out of range.

    Source: Lin et al., ICML 2024, arXiv 2402.19078.

    Example:
        >>> method = SmoothTchebycheff(mu=0.5, warmup=1)
        >>> weights, state = method.init(["improved", "did not"])
        >>> for losses in ([2.0, 2.0], [1.0, 2.0]):
        ...     weights, state = method.update(state, Statistics(losses, present=[True, True]))
        >>> weights  # (1/2)² / 1 to (2/2)² / 2
        array([0.66666667, 1.33333333])
    """

    keeps_sum: ClassVar[bool] = True
    memory: ClassVar[tuple[str, ...]] = ("nadir", "count")

    mu: float = positive(0.5)
    warmup: int = count(100)

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """A warming task moves its nadir; a settled one takes its share of ``softmax(f / μ) / L``."""
        L, active = statistics.losses, statistics.present & (statistics.losses > 0)
        warming = active & (state["count"] < self.warmup)
        ready = active & ~warming
        counts = state["count"] + warming
        nadir = state["nadir"] + np.where(warming, (L - state["nadir"]) / np.maximum(counts, 1), 0.0)  # running mean

        f = log(L / np.where(ready, nadir, 1.0), ready)
        weights = share(state["weights"], softmax(f / self.mu - log(L, ready), ready), ready)
        return weights, {"weights": weights, "nadir": nadir, "count": counts}
