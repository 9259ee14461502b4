"""Gradient vaccine: cosines are raised to what they have been, not only to 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from accel_weighting.methods.algebra import Array, GramMethod, cosines, mixed_seed, solve_present, with_gradients
from accel_weighting.statistics import InitialWeights, State, Statistics, integer, within


@dataclass(frozen=True)
class GradVac(GramMethod):
    """Gradient vaccine: where ``φ_ij = cos(g'_i, g_j)`` is below its target ``φ̂_ij``, g_j is added to reach it.

    ``g'_i ← g'_i + ‖g'_i‖ (φ̂ √(1−φ²) − φ √(1−φ̂²)) / (‖g_j‖ √(1−φ̂²)) g_j`` (eq. 3), j in random order, then
    ``φ̂ ← (1 − β) φ̂ + β φ`` (eq. 4). A target of 0 is :class:`PCGrad`. All is kept as coefficients of the gradients, so
    the Gram matrix is enough, taken as one for all parameters (the paper's whole-model variant). Weights are those of
    the sum ``Σ_i g'_i``, as in TorchJD and LibMTL: 1 each where all cosines are at their targets.

    The order depends on ``seed`` and a counter in the state alone, as PCGrad's does. A pair with an absent task, or
    with a zero gradient, keeps its target. Targets are kept within ±0.999, so that weights stay finite.

    Args:
        beta: β, in [0, 1]; 0.5 in LibMTL and TorchJD, 0.01 in the paper.
        ema: Which cosines enter the moving average: ``"changed"``, those of the g'_i as they are met, as in the
            paper's algorithm and both libraries; ``"raw"``, those of the gradients, free of the order.
        seed: Seed of the orders, the same on every process.

    Raises:
        ValueError: An argument is out of range.

    Source: Wang et al., Gradient Vaccine, ICLR 2021, arXiv 2010.05874.
    """

    beta: float = within("[0, 1]", 0.5)
    ema: Literal["changed", "raw"] = "changed"
    seed: int = integer(0)

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Weights 1 unless ``initial_weights`` say otherwise; targets 0."""
        weights, state = super().init(tasks, initial_weights)
        K = len(tasks)
        return weights, {**state, "counter": np.asarray(0), "targets": np.zeros((1, K, K))}  # of pairs

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """Vaccinates the present tasks' gradients, in the next random order."""
        counter, targets = int(state["counter"]), state["targets"].copy()
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, counter))
        rows = with_gradients(statistics).nonzero()[0]

        def solve(M: Array) -> Array:
            pairs = 0, rows[:, None], rows
            weights, targets[pairs] = self._vaccinate(M, targets[pairs], generator)
            return weights

        weights = solve_present(solve, state["weights"], statistics)
        return weights, {"weights": weights, "counter": np.asarray(counter + 1), "targets": targets}

    def solve(self, M: Array) -> Array:
        """With targets of 0 and orthonormal gradients: where training begins."""
        return np.ones(len(M))

    def _vaccinate(self, M: Array, targets: Array, generator: torch.Generator) -> tuple[Array, Array]:
        """Weights and next targets, on the unit gradients: ``g'_i = n_i Σ_k W_ik u_k``."""
        C, n = cosines(M)
        W, targets = np.eye(len(M)), targets.copy()
        for i in range(len(M)):
            others = np.delete(np.arange(len(M)), i)
            for j in others[torch.randperm(len(others), generator=generator).numpy()].tolist():
                inner, length = float(W[i] @ C[j]), math.sqrt(max(float(W[i] @ C @ W[i]), 0.0))
                cos = min(max(inner / length, -1.0), 1.0) if length > 1e-6 else 0.0  # else what is left is rounding
                goal = float(targets[i, j])
                if cos < goal:
                    sine = math.sqrt(1 - goal * goal)
                    W[i, j] += length * (goal * math.sqrt(1 - cos * cos) - cos * sine) / sine
                seen = cos if self.ema == "changed" else float(C[i, j])
                targets[i, j] = min(max(goal + self.beta * (seen - goal), -0.999), 0.999)
        weights: Array = n @ W / n
        return weights, targets
