"""UPGrad and DualProj: an update that conflicts with no gradient, by projection on the dual cone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from accel_weighting.methods.algebra import Array, GramMethod, cosines, nonnegative_minimum, null_space


def project(C: Array, lows: Array) -> Array:
    """``argmin vᵀCv  s.t.  v ≥ low`` for each of the rows ``lows``, for unit gradients with the cosines ``C``.

    With ``v = low + u`` that is ``argmin_{u ≥ 0} ½uᵀCu + (C low)ᵀu``. Where C is singular the vector ``Σ v_k u_k`` is
    still unique; of its weights proximal steps choose an even one.
    """
    null = null_space(C, 1e-13 * len(C))
    P = 1e-6 * null @ null.T
    projected = lows.copy()
    for k, b in enumerate(-lows @ C):
        if (b <= 0).all():
            continue  # it conflicts with none
        x = nonnegative_minimum(C + P, b)
        for _ in range(3 * bool(null.size)):
            x = nonnegative_minimum(C + P, b + P @ x)
        projected[k] += x
    return projected


@dataclass(frozen=True)
class UPGrad(GramMethod):
    """Unconflicting projection: every gradient is projected on the dual cone of all, and the mean is taken (eq. 3).

    The dual cone holds the vectors that conflict with no gradient; a sum of such vectors conflicts with none. From the
    Gram matrix (Prop. 1): ``w = Σ_i v_i``, ``v_i = argmin vᵀMv  s.t.  v ≥ e_i / K``. It is solved exactly (an active
    set), on the unit gradients, so that a gradient of any length is left without conflict: TorchJD's regularisation
    loses that for short ones.

    The weights are those of a mean, ``1/K`` each where nothing conflicts, as TorchJD's with its default preference, and
    never below that.

    Source: Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, arXiv 2406.16232.
    """

    def solve(self, M: Array) -> Array:
        """``Σ_i v_i``, ``[K]``; with ``y = n v`` the bound on y is a multiple of ``e_i``."""
        C, n = cosines(M)
        weights: Array = n @ project(C, np.eye(len(n))) / (n * len(n))
        return weights


@dataclass(frozen=True)
class DualProj(GramMethod):
    """The mean gradient, projected on the dual cone of all: ``w = argmin vᵀMv  s.t.  v ≥ 1/K``.

    The nearest vector to the mean that conflicts with no gradient; Gradient Episodic Memory does this with one
    gradient among them. Compared with :class:`UPGrad` it follows the longest gradients more. Weights are those of a
    mean, as TorchJD's with its default preference: ``1/K`` each where the mean conflicts with none.

    Source: Lopez-Paz and Ranzato, NeurIPS 2017, arXiv 1706.08840; in this form arXiv 2406.16232.
    """

    def solve(self, M: Array) -> Array:
        """The minimiser, ``[K]``."""
        C, n = cosines(M)
        mean = n / n.max()  # of unit gradients
        weights: Array = project(C, mean[None])[0] / mean / len(n)
        return weights
