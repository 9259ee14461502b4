"""CAGrad: the best update for the worst-off task, not far from the average gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel_weighting.methods.algebra import LIMIT, RANK, GramMethod, increasing_root, min_norm
from accel_weighting.statistics import require


@dataclass(frozen=True)
class CAGrad(GramMethod):
    """Conflict-averse descent: ``max_d min_k ⟨g_k, d⟩  s.t.  ‖d − g_0‖ ≤ c‖g_0‖``, ``g_0`` the mean gradient (Alg. 1).

    Its dual is ``min_w g_w·g_0 + √φ‖g_w‖`` over the simplex, ``g_w = Σ w_k g_k``, ``√φ = c‖g_0‖``, and its solution
    ``d = g_0 + (√φ/‖g_w‖) g_w``: weights ``1/K + s w_k`` with ``s = √φ/‖g_w‖``, not divided by ``1 + c²`` or the
    like, as in TorchJD. For a fixed s the best w is the one with the shortest ``g_0 + s g_w``, MGDA's problem, and
    ``s‖g_w‖`` grows with s, so what is left is a root in one dimension; in ``S = s²`` it is piecewise linear.

    Where ``g_w`` vanishes (a Pareto-stationary point) s has a pole; it stops at 1,000, and where ``g_0`` vanishes
    too it is 0.

    Args:
        c: Radius of the ball, in [0, 1): 0 is the mean gradient; towards 1 it is MGDA's direction.

    Raises:
        ValueError: ``c`` is out of range.

    Source: Liu et al., Conflict-Averse Gradient Descent, NeurIPS 2021, arXiv 2110.14048.
    """

    c: float = 0.5

    def __post_init__(self) -> None:
        require(self, "c", 0 <= self.c < 1, "be in [0, 1)")

    def solve(self, M: Tensor) -> Tensor:
        """Weights ``1/K + s w``, ``[K]``, of sum 1 + s."""
        K = len(M)
        mean = torch.full((K,), 1 / K, dtype=M.dtype)
        b = M.mean(1)  # g_k · g_0
        phi = self.c**2 * b.mean()
        if phi <= RANK**2:
            return mean

        def pull(S: Tensor) -> Tensor:
            """``s w`` for ``s = √S``: of ‖g_0 + s g_w‖ the smallest."""
            s = S.sqrt()
            P = b.mean() + s * (b + b[:, None]) + S * M
            return s * min_norm(P, P.diagonal().mean())

        def excess(S: Tensor) -> Tensor:
            x = pull(S)
            return x @ M @ x - phi

        shortest = min_norm(M)
        low, high = phi / M.diagonal().max(), phi / (shortest @ M @ shortest).clamp(min=phi / LIMIT**2)
        return mean + pull(increasing_root(excess, low, high, 1e-12 * phi))
