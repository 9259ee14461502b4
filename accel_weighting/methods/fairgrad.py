"""FairGrad: the tasks' gains as α-fair shares of a resource."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from accel_weighting.methods.algebra import LIMIT, Array, GramMethod
from accel_weighting.statistics import positive


@dataclass(frozen=True)
class FairGrad(GramMethod):
    """α-fair gains: ``Mw = w^{−1/α}``, ``w > 0`` (eq. 4): the gains ``g_k·g`` are those of an α-fair allocation.

    It maximises ``Σ_k (g_k·d)^{1−α} / (1−α)`` over directions d (eq. 2). α → 0 is the sum of all gains, α = 1
    :class:`NashMTL`'s proportional fairness, α → ∞ tends to max-min fairness. The root is the minimum of the convex
    ``½wᵀMw − Σ w^{1−1/α} / (1−1/α)``, by damped Newton steps on its logarithms.

    M has mean diagonal 1, so orthonormal gradients have weight 1 each and the step follows the gradients' size; the
    authors solve for the gradients as they are. Only at α = 1 do the units of a loss play no part. Where a sum of the
    gradients with positive weights vanishes there is no root; 1e-6 of each diagonal entry is added to it where weights
    would pass 1,000 times those of orthogonal gradients.

    Args:
        alpha: α, positive; the authors' code takes 1 unless told otherwise, and their experiments 1 or 2.

    Raises:
        ValueError: ``alpha`` is not positive.

    Source: Ban and Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024, arXiv 2402.15638; the theory from
    its equations as TorchJD quotes them, the paper's text was not at hand.
    """

    alpha: float = positive(1.0)

    def solve(self, M: Array) -> Array:
        """w, ``[K]``, positive."""
        n = np.sqrt(M.diagonal())
        alone = n ** (-2 * self.alpha / (1 + self.alpha))  # the root where all gradients are orthogonal
        bound = LIMIT * float((alone * n).max())
        w = self._root(M, alone, bound / n)
        B, right = M * w * w[:, None], w ** (1 - 1 / self.alpha)
        if (w * n).max() >= bound or (np.abs(B.sum(1) - right) > 1e-9 * (np.abs(B).sum(1) + right)).any():
            w = self._root(M + np.diag(M.diagonal()) / LIMIT**2, alone, 10 * bound / n)
        return w

    def _root(self, M: Array, w: Array, bound: Array) -> Array:
        """Newton's method for the relative change of w, as far as the convex function falls; ends beyond ``bound``."""
        p = 1 / self.alpha
        for _ in range(200):
            B, right = M * w * w[:, None], w ** (1 - p)
            H, gradient = B + p * np.diag(right), B.sum(1) - right
            scale = 1 / np.sqrt(H.diagonal())  # tasks count alike in the solve, however far apart their units are
            step = -scale * np.linalg.solve(H * scale * scale[:, None], gradient * scale)
            near = float(np.abs(step).max()) < 0.1 * min(1.0, self.alpha)
            fall, t = float(gradient @ step), min(1.0, 0.9 / max(float(-step.min()), 0.9))
            for _ in range(1 if near else 40):  # along the line the slope rises from ``fall`` < 0
                new = w * (1 + t * step)
                slope = float((step * w) @ (M @ new - new**-p))
                if slope <= -fall / 2:
                    break
                t /= 2
            w = new
            if np.abs(step).max() < 1e-12 or (w >= bound).any():
                break
        return np.minimum(w, bound)
