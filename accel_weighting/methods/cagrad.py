"""CAGrad: the best update for the worst-off task, not far from the average gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from accel_weighting.methods.algebra import LIMIT, RANK, Array, GramMethod, even, increasing_root, min_norm
from accel_weighting.statistics import within


@dataclass(frozen=True)
class CAGrad(GramMethod):
    """Conflict-averse descent: ``max_d min_k ⟨g_k, d⟩  s.t.  ‖d − g_0‖ ≤ c‖g_0‖``, ``g_0`` the mean gradient (Alg. 1).

    Its dual is ``min_w g_w·g_0 + √φ‖g_w‖`` over the simplex, ``g_w = Σ w_k g_k``, ``√φ = c‖g_0‖``, and its solution
    ``d = g_0 + (√φ/‖g_w‖) g_w``: weights ``1/K + s w_k`` with ``s = √φ/‖g_w‖``, those of a mean, as in TorchJD (the
    authors multiply by K and divide by ``1 + c²``). For a fixed s the best w is the one with the shortest
    ``g_0 + s g_w``, MGDA's problem, and ``s‖g_w‖`` grows with s, so what is left is a root in one dimension; in
    ``S = s²`` it is piecewise linear.

    Where ``g_w`` vanishes (a Pareto-stationary point) s has a pole; it stops at 1,000, and where ``g_0`` vanishes
    too it is 0.

    Args:
        c: Radius of the ball, in [0, 1): 0 is the mean gradient; towards 1 it is MGDA's direction.

    Raises:
        ValueError: ``c`` is out of range.

    Source: Liu et al., Conflict-Averse Gradient Descent, NeurIPS 2021, arXiv 2110.14048.
    """

    c: float = within("[0, 1)", 0.5)

    def solve(self, M: Array) -> Array:
        """Weights ``1/K + s w``, ``[K]``, of sum 1 + s."""
        K = len(M)
        mean = np.full(K, 1 / K)
        b = M.mean(1)  # g_k · g_0
        square = float(b.mean())
        phi = self.c**2 * square
        if phi <= RANK**2:
            return mean

        def pull(S: float) -> Array:
            """``s w`` for ``s = √S``: of ‖g_0 + s g_w‖ the smallest."""
            s = math.sqrt(S)
            P = square + s * (b + b[:, None]) + S * M
            return s * min_norm(P, float(P.diagonal().mean()))

        def excess(S: float) -> float:
            x = pull(S)
            return float(x @ M @ x) - phi

        shortest = min_norm(M)
        low, high = phi / float(M.diagonal().max()), phi / max(float(shortest @ M @ shortest), phi / LIMIT**2)
        return mean + even(pull(increasing_root(excess, low, high, 1e-12 * phi)), M)
