"""PCGrad: every gradient gives up what conflicts with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from accel_weighting.methods.algebra import Array, GramMethod, mixed_seed, solve_present
from accel_weighting.statistics import InitialWeights, State, Statistics, integer


@dataclass(frozen=True)
class PCGrad(GramMethod):
    """Gradient surgery: ``g_i ← g_i − (g_i·g_j / ‖g_j‖²) g_j`` wherever ``g_i·g_j < 0``, j in random order (Alg. 1).

    All projections are kept as coefficients of the original gradients, so the Gram matrix is enough. The weights are
    those of the paper's sum ``Σ_i g_i^PC``, as in TorchJD: 1 each where nothing conflicts, and never below that.

    The order depends on ``seed`` and on a counter in the state, on nothing else: alike on all processes, and a resumed
    run goes on where it was. It makes no difference for two tasks.

    Args:
        seed: Seed of the orders, the same on every process.

    Source: Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, arXiv 2001.06782.
    """

    seed: int = integer(0)

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Weights 1, as for orthonormal gradients, unless ``initial_weights`` say otherwise."""
        weights, state = super().init(tasks, initial_weights)
        return weights, {**state, "counter": np.asarray(0)}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """Projects the present tasks' gradients, in the next random order."""
        counter = int(state["counter"])
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, counter))
        weights = solve_present(lambda M: self.solve(M, generator), state["weights"], statistics)
        return weights, {"weights": weights, "counter": np.asarray(counter + 1)}

    def solve(self, M: Array, generator: torch.Generator | None = None) -> Array:
        """Sum over the rows of W, where ``g_i^PC = Σ_k W_ik g_k``."""
        generator = generator or torch.Generator()  # never the user's
        i = np.arange(len(M))
        W = np.eye(len(M))
        square = M.diagonal()
        orders = np.stack([torch.randperm(len(M), generator=generator).numpy() for _ in i])
        for j in orders.T:  # each task's next opponent
            inner = (W * M[j]).sum(1)  # g_i^PC · g_j
            conflict = (inner < 0) & (i != j) & (square[j] > 0)
            W[i, j] -= np.where(conflict, inner / np.where(conflict, square[j], 1.0), 0.0)
        weights: Array = W.sum(0)
        return weights
