"""CAGrad: the best update for the worst-off task, not far from the average gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel_weighting.methods.algebra import LIMIT, RANK, GramMethod, min_norm


@dataclass(frozen=True)
class CAGrad(GramMethod):
    """Conflict-averse descent: ``max_d min_k ⟨g_k, d⟩  s.t.  ‖d − g_0‖ ≤ c‖g_0‖``, ``g_0`` the mean gradient (Alg. 1).

    Its dual is ``min_w g_w·g_0 + √φ‖g_w‖`` over the simplex, ``g_w = Σ w_k g_k``, ``√φ = c‖g_0‖``, and its solution
    ``d = g_0 + (√φ/‖g_w‖) g_w``: weights ``1/K + s w_k`` with ``s = √φ/‖g_w‖``, not divided by ``1 + c²`` or the
    like, as in TorchJD. For a fixed s the best w is the one with the shortest ``g_0 + s g_w``, MGDA's problem, and
    ``s‖g_w‖`` grows with s, so what is left is a root in one dimension.

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
        if not 0 <= self.c < 1:
            raise ValueError(f"Parameter `c` must be in [0, 1). Found `c = {self.c}`.")

    def solve(self, M: Tensor) -> Tensor:
        """Weights ``1/K + s w``, ``[K]``, of sum 1 + s."""
        K = len(M)
        mean = torch.full((K,), 1 / K, dtype=M.dtype)
        b = M.mean(1)  # g_k · g_0
        phi = self.c**2 * b.mean()
        if phi <= RANK**2:
            return mean

        def excess(S: Tensor) -> tuple[Tensor, Tensor]:
            s = S.sqrt()
            P = b.mean() + s * (b + b[:, None]) + S * M
            w = min_norm(P, P.diagonal().mean())
            return S * (w @ M @ w) - phi, mean + s * w

        shortest = min_norm(M)
        low = phi / M.diagonal().max()
        high = phi / (shortest @ M @ shortest).clamp(min=phi / LIMIT**2)
        (below, weights), (above, at_high) = excess(low), excess(high)
        if above <= 0:
            return at_high
        # Regula falsi in S = s² (the Illinois variant): S‖g_w‖² is piecewise linear in S, so it ends in a few steps.
        last = phi * 0
        for _ in range(60):
            S = high - above * (high - low) / (above - below)
            f, weights = excess(S)
            if f.abs() <= 1e-12 * phi:
                break
            again = f * last > 0  # twice on the same side: give the other end less to say
            last = f
            if f > 0:
                high, above, below = S, f, below / 2 if again else below
            else:
                low, below, above = S, f, above / 2 if again else above
        return weights
