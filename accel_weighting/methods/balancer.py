"""EnCodec's loss balancer: every task gets its share of the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from accel_weighting.methods.algebra import Array
from accel_weighting.statistics import (
    InitialWeights,
    Method,
    State,
    Statistics,
    check_tasks,
    initial_vector,
    positive,
    positive_by_task,
    within,
)


@dataclass(frozen=True)
class GradientBalancer(Method):
    """A share of the gradient for every task: ``w_k = (λ_k / Σ_j λ_j) · R / ⟨n_k⟩_β`` (§3, Balancer).

    ``⟨n⟩_β`` is the moving average ``Σ_s β^s n(t−s) / Σ_s β^s`` over the windows in which the task was present; n is
    the norm over the global batch at the shared representation (EnCodec: the mean norm of a batch's items at the
    model's output). Shares are taken among the present; a task absent, or without a gradient yet, keeps its weight.

    Args:
        shares: λ, ``{task: positive number}``; 1 for a task that is not named. None: equal shares.
        decay: β, in [0, 1].
        total_norm: R; EnCodec's default is 1. None: the sum of the present tasks' averages; equal ones mean weights 1.

    Raises:
        ValueError: A share, ``decay`` or ``total_norm`` is out of range, or a share is for an unknown task.

    Source: Défossez et al., High Fidelity Neural Audio Compression, TMLR 2023, arXiv 2210.13438.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"norms"})
    acts_on: ClassVar[Literal["losses", "shared"]] = "shared"
    grows: ClassVar[bool] = True

    shares: Mapping[str, float] | None = positive_by_task(None)
    decay: float = within("[0, 1]", 0.999)
    total_norm: float | None = positive(None)

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """The weights for norms of 1 unless ``initial_weights`` are given; no averages yet."""
        check_tasks(self, tasks)
        shares = initial_vector(tasks, self.shares)
        zeros = np.zeros(len(tasks))
        given = initial_weights is not None
        weights = initial_vector(tasks, initial_weights) if given else self._weights(shares, zeros + 1)
        return weights, {"weights": weights, "shares": shares, "sum": zeros, "count": zeros}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """Adds this window's norms to the averages and weighs by them."""
        n, present = statistics.norms, statistics.present
        assert n is not None
        sums = np.where(present, self.decay * state["sum"] + n, state["sum"])
        count = np.where(present, self.decay * state["count"] + 1, state["count"])
        known = present & (sums > 0)
        weights = state["weights"].copy()
        if known.any():
            weights[known] = self._weights(state["shares"][known], sums[known] / count[known])
        return weights, state | {"weights": weights, "sum": sums, "count": count}

    def _weights(self, shares: Array, n: Array) -> Array:
        weights: Array = shares / shares.sum() * (self.total_norm or n.sum()) / n
        return weights
