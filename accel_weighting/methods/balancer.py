"""EnCodec's loss balancer: every task gets its share of the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from accel_weighting.statistics import Method, State, Statistics, initial_vector, require


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

    shares: Mapping[str, float] | None = field(default=None, hash=False)
    decay: float = 0.999
    total_norm: float | None = None

    def __post_init__(self) -> None:
        if self.shares is not None:
            object.__setattr__(self, "shares", dict(sorted(self.shares.items())))
        require(self, "shares", all(0 < s < math.inf for s in (self.shares or {}).values()), "be positive and finite")
        require(self, "decay", 0 <= self.decay <= 1, "be in [0, 1]")
        require(self, "total_norm", self.total_norm is None or 0 < self.total_norm < math.inf, "be positive")

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The weights for norms of 1 unless ``initial_weights`` are given; no averages yet."""
        require(self, "shares", set(self.shares or ()) <= set(tasks), f"name tasks out of {list(tasks)}")
        shares = initial_vector(tasks, self.shares)
        zeros = torch.zeros_like(shares)
        given = initial_weights is not None
        weights = initial_vector(tasks, initial_weights) if given else self._weights(shares, zeros + 1)
        return weights, {"weights": weights, "shares": shares, "sum": zeros, "count": zeros}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """Adds this window's norms to the averages and weighs by them."""
        n, present = statistics.norms, statistics.present
        assert n is not None
        sums = torch.where(present, self.decay * state["sum"] + n, state["sum"])
        count = torch.where(present, self.decay * state["count"] + 1, state["count"])
        known = present & (sums > 0)
        weights = state["weights"].clone()
        weights[known] = self._weights(state["shares"][known], (sums / count)[known])
        return weights, state | {"weights": weights, "sum": sums, "count": count}

    def _weights(self, shares: Tensor, n: Tensor) -> Tensor:
        return shares / shares.sum() * (self.total_norm or n.sum()) / n
