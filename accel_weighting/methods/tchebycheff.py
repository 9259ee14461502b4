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
    Hence ``w_k ∝ softmax_k(f / μ) / L_k``, held constant. Note that ``μ = 1``, their code's default, gives constant
    weights ∝ 1 / n_k; smaller is more Tchebycheff.

    The authors' recipe has two parts, and both matter: for a task's first ``settle`` positive losses ``Σ log L_k`` is
    descended (weights ∝ 1 / L_k), and the nadir is the mean of the last ``warmup`` of these. The authors settle for
    four epochs, and take the last of them for the nadir.

    The direction is theirs, the length is not: their weights are ``K softmax_k(f / μ) / L_k``, these have a sum of K,
    so that the learning rate keeps its meaning. Weights stand on a floor of 1e-6 of their sum before they are shared
    out: losses more than six orders of magnitude apart are not balanced fully.

    The paper takes the current losses: that is ``lag=0``. With ``lag=1`` they are those of the window before.

    A task that is absent, or whose loss is 0, keeps its weight; the others share the rest, and the sum stays that of
    the initial weights (K).

    Args:
        mu: μ, the smoothing.
        warmup: Windows that make up the nadir; one epoch in the authors' code.
        settle: Windows that descend ``Σ log L_k``, at least ``warmup``. None: four times ``warmup``.

    Raises:
        ValueError: An argument is out of range.

    Source: Lin et al., ICML 2024, arXiv 2402.19078.

    Example:
        >>> method = SmoothTchebycheff(mu=0.5, warmup=1, settle=1)
        >>> weights, state = method.init(["improved", "did not"])
        >>> for losses in ([2.0, 2.0], [1.0, 2.0]):
        ...     weights, state = method.update(state, Statistics(losses, present=[True, True]))
        >>> weights  # (1/2)² / 1 to (2/2)² / 2
        array([0.66666667, 1.33333333])
    """

    keeps_sum: ClassVar[bool] = True
    memory: ClassVar[tuple[str, ...]] = ("nadir", "count")

    mu: float = positive(1.0)
    warmup: int = count(100)
    settle: int | None = count(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.settle is not None and self.settle < self.warmup:
            raise ValueError(
                "Parameter `settle` must not be less than `warmup`: the nadir is the mean of its last windows. "
                f"Found `settle = {self.settle!r}`, `warmup = {self.warmup!r}`."
            )

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """A settling task has ``1 / L``, and moves its nadir at last; a settled one ``softmax(f / μ) / L``."""
        L, active = statistics.losses, statistics.present & (statistics.losses > 0)
        settle = self.settle or 4 * self.warmup
        settling = active & (state["count"] < settle)
        ready = active & ~settling
        counts = state["count"] + settling
        seen = counts - (settle - self.warmup)  # windows of the nadir
        nadir = state["nadir"] + np.where(settling & (seen > 0), (L - state["nadir"]) / np.maximum(seen, 1), 0.0)

        f = log(L / np.where(ready, nadir, 1.0), ready)
        among = np.count_nonzero(ready) * softmax(f / self.mu, ready)  # of mean 1, as Σ log L has 1 for every task
        weight = np.where(ready, log(among, among > 0) - 800.0 * (among == 0), 0.0) - log(L, active)
        weights = share(state["weights"], softmax(weight, active), active)
        return weights, {"weights": weights, "nadir": nadir, "count": counts}
