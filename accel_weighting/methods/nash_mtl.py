"""Nash-MTL: the tasks bargain for the direction of the update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from accel_weighting.methods.algebra import LIMIT, Array, GramMethod


@dataclass(frozen=True)
class NashMTL(GramMethod):
    """The Nash bargaining solution: ``Mα = 1/α``, ``α > 0`` (Algorithm 1): every ``α_k g_k·g`` is 1.

    It is the minimum of ``½αᵀMα − Σ log α_k``, which is self-concordant: damped Newton steps reach it from anywhere.
    The paper linearises and calls a solver 20 times; there is nothing of the last solution in this one.

    M has mean diagonal 1 (the authors' code divides by its Frobenius norm), so orthonormal gradients have weight 1
    each, and ``‖g‖² = K`` in units of the mean squared norm. The authors then clip ‖g‖ to 1: clip the optimizer's
    gradients instead. A singular M has no solution (opposite gradients: α grows without bound), so 1e-6 is added to
    its diagonal, which leaves weights of about 1,000 at most.

    The paper warns against gradients at the representation (App. C): prefer ``shared_layer``.

    Source: Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022, arXiv 2202.01017.
    """

    def solve(self, M: Array) -> Array:
        """α, ``[K]``, positive."""
        identity = np.eye(len(M))
        A = M + identity / LIMIT**2
        alpha: Array = 1 / np.sqrt(A.diagonal())
        for _ in range(200):
            B = A * alpha * alpha[:, None]  # Newton's method for log α has a Hessian ≥ 1
            gradient = B.sum(1) - 1
            step = -np.linalg.solve(B + identity, gradient)
            decrement = math.sqrt(max(-float(gradient @ step), 0.0))
            alpha = alpha * (1 + (step if decrement < 0.25 else step / (1 + decrement)))
            if decrement < 1e-13:
                break
        return alpha
