"""Nash-MTL: the tasks bargain for the direction of the update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from accel_weighting.methods.algebra import LIMIT, Array, GramMethod, cosines


@dataclass(frozen=True)
class NashMTL(GramMethod):
    """The Nash bargaining solution: ``Mα = 1/α``, ``α > 0`` (Algorithm 1): every ``α_k g_k·g`` is 1.

    The units of a loss play no part: where ``g_k`` becomes ``c g_k``, ``α_k`` becomes ``α_k / c``. So it is solved on
    the cosines C, ``Cb = 1/b``, ``α_k = b_k / n_k``, the minimum of ``½bᵀCb − Σ log b_k``. That is self-concordant:
    damped Newton steps reach it from anywhere. The paper linearises and calls a solver 20 times; there is nothing of
    the last solution in this one.

    Norms are taken in units of their root mean square: orthonormal gradients have weight 1 each, and ‖g‖ is ``√K``
    of those units, so it follows the size of the gradients. In the authors' code it does not: their ``‖g‖² = K``
    whatever the gradients (their division by the Frobenius norm of M cancels), and is then clipped to 1. Their α is
    ours divided by that root mean square; for their step clip the optimizer's gradients. Where a sum of the
    gradients with positive weights vanishes there is no solution (opposite gradients: b grows without bound); where b
    passes 1,000, 1e-6 is added to the diagonal of C, which leaves about 1,000.

    The paper warns against gradients at the representation (App. C): prefer ``shared_layer``.

    Source: Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022, arXiv 2202.01017.
    """

    def solve(self, M: Array) -> Array:
        """α, ``[K]``, positive."""
        C, n = cosines(M)
        b = bargain(C)
        if b.max() > LIMIT:
            b = bargain(C + np.eye(len(M)) / LIMIT**2, math.inf)
        return b / n


def bargain(C: Array, limit: float = 1.5 * LIMIT) -> Array:
    """``b > 0`` with ``Cb = 1/b``, by damped Newton steps; any b beyond the ``limit`` where there is none."""
    identity = np.eye(len(C))
    b: Array = 1 / np.sqrt(C.diagonal())
    for _ in range(200):
        B = C * b * b[:, None]  # Newton's method for log b has a Hessian ≥ 1
        gradient = B.sum(1) - 1
        step = -np.linalg.solve(B + identity, gradient)
        decrement = math.sqrt(max(-float(gradient @ step), 0.0))
        b = b * (1 + (step if decrement < 0.25 else step / (1 + decrement)))
        if decrement < 1e-13 or b.max() > limit:
            break
    return b
