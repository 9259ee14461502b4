"""Smooth Tchebycheff scalarization: a soft maximum of the losses in place of their sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accel_weighting.methods.algebra import FLOOR, share
from accel_weighting.statistics import Method, State, Statistics, initial_vector


@dataclass(frozen=True)
class SmoothTchebycheff(Method):
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
        ...     statistics = Statistics(torch.tensor(losses).double(), torch.tensor([True, True]))
        ...     weights, state = method.update(state, statistics)
        >>> weights  # (1/2)² / 1 to (2/2)² / 2
        tensor([0.6667, 1.3333], dtype=torch.float64)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"losses"})
    positive_losses: ClassVar[bool] = True
    keeps_sum: ClassVar[bool] = True

    mu: float = 0.5
    warmup: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.mu < math.inf:
            raise ValueError(f"Parameter `mu` must be positive and finite. Found `mu = {self.mu}`.")
        if not (isinstance(self.warmup, int) and self.warmup >= 1):
            raise ValueError(f"Parameter `warmup` must be a positive integer. Found `warmup = {self.warmup!r}`.")

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Weights 1 unless ``initial_weights`` say otherwise."""
        weights = initial_vector(tasks, initial_weights).clamp(min=FLOOR)
        return weights, {
            "weights": weights,
            "nadir": torch.zeros_like(weights),
            "count": torch.zeros_like(weights),
        }

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """A warming task moves its nadir; a settled one takes its share of ``softmax(f / μ) / L``."""
        L, active = statistics.losses, statistics.present & (statistics.losses > 0)
        warming = active & (state["count"] < self.warmup)
        ready = active & ~warming
        count = state["count"] + warming
        nadir = state["nadir"] + ((L - state["nadir"]) / count).where(warming, 0.0)  # a running mean

        f = (L / nadir).log()
        weights = share(state["weights"], (f / self.mu - L.log()).where(ready, -math.inf).softmax(0), ready)
        return weights, {"weights": weights, "nadir": nadir, "count": count}
