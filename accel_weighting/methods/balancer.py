"""EnCodec's loss balancer: every task gets its share of the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from accel_weighting.statistics import Method, State, Statistics, initial_vector


@dataclass(frozen=True)
class GradientBalancer(Method):
    """A share of the gradient for every task: ``w_k = (λ_k / Σ_j λ_j) · R / ⟨n_k⟩_β`` (§3.4).

    ``⟨n⟩_β`` is the moving average ``Σ_s β^s n(t−s) / Σ_s β^s`` over the windows in which the task was present.
    EnCodec takes n at the model's output, as a mean of norms over the items of a batch and then over processes; here
    it is the norm of the gradient over the global batch, at the shared representation, which no cut of the batch
    changes. The averages are in the state, so a resumed run goes on with them.

    An absent task keeps its average and its weight, and the shares are taken among the present, as in the source. So
    does a task whose gradient has always been zero.

    Args:
        shares: λ, ``{task: positive number}``; 1 for a task that is not named. None: equal shares.
        decay: β, in [0, 1].
        total_norm: R. None: the sum of the present tasks' average norms, so that equal norms and shares mean weights
            1. EnCodec's default is 1, which makes the learning rate independent of the gradient's scale.

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
        if bad := {task: s for task, s in (self.shares or {}).items() if not 0 < s < math.inf}:
            raise ValueError(f"Parameter `shares` must be positive and finite. Found `shares = {bad}`.")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"Parameter `decay` must be in [0, 1]. Found `decay = {self.decay}`.")
        if self.total_norm is not None and not 0 < self.total_norm < math.inf:
            raise ValueError(f"Parameter `total_norm` must be positive. Found `total_norm = {self.total_norm}`.")

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The weights for norms of 1 unless ``initial_weights`` are given; no averages yet."""
        if unknown := sorted(set(self.shares or ()) - set(tasks)):
            raise ValueError(f"Parameter `shares` names unknown tasks {unknown}. Found `tasks = {list(tasks)}`.")
        shares = initial_vector(tasks, self.shares)
        weights = self._weights(shares, torch.ones_like(shares))
        if initial_weights is not None:
            weights = initial_vector(tasks, initial_weights)
        zeros = torch.zeros_like(weights)
        return weights, {"weights": weights, "shares": shares, "sum": zeros, "count": zeros}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """Adds this window's norms to the averages and weighs by them."""
        assert statistics.norms is not None
        present = statistics.present
        sums = torch.where(present, self.decay * state["sum"] + statistics.norms, state["sum"])
        count = torch.where(present, self.decay * state["count"] + 1, state["count"])
        known = present & (sums > 0)
        weights = state["weights"].clone()
        weights[known] = self._weights(state["shares"][known], (sums / count)[known])
        return weights, {"weights": weights, "shares": state["shares"], "sum": sums, "count": count}

    def _weights(self, shares: Tensor, n: Tensor) -> Tensor:
        R = n.sum() if self.total_norm is None else self.total_norm
        return shares / shares.sum() * R / n
