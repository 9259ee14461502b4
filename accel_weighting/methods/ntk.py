"""Weights from the rates at which losses would fall on their own: the neural tangent kernel's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from accel_weighting.methods.algebra import TINY, Array, LossMethod
from accel_weighting.statistics import State, Statistics


@dataclass(frozen=True)
class NTKWeighting(LossMethod):
    """Losses fall at one rate: ``λ_k = Σ_j q_j / q_k``, ``q_k = ‖∇√L_k‖ = n_k / (2√L_k)``.

    The paper takes the traces of the blocks of the neural tangent kernel, ``λ_k = Σ_j tr K_jj / tr K_kk`` (eq. 6.5),
    whose diagonal holds the squared gradients of the residuals. Here, as in NVIDIA's physicsnemo, the root of a whole
    mean squared error stands for a task's residuals, and its gradient's length for the trace: one number per task,
    without a gradient per residual. The units of a loss matter: multiplied by c it has ``λ/√c``.

    A task that is absent, or whose loss or gradient is exactly 0, keeps its weight; the sum runs over the others.
    There is no fixed sum; each weight is at least 1, and K where all fall at one rate.

    Source: Wang, Yu and Perdikaris, When and Why PINNs Fail to Train, J. Comput. Phys. 449, 2022, arXiv 2007.14527.

    Example:
        >>> method = NTKWeighting()
        >>> weights, state = method.init(["boundary", "residual"])
        >>> method.update(state, Statistics([1.0, 4.0], [True, True], norms=[1.0, 6.0]))[0]  # q is 0.5, 1.5
        array([4.        , 1.33333333])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"norms", "losses"})
    grows: ClassVar[bool] = True

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """``Σ_j q_j / q_k``."""
        L, n = statistics.losses, statistics.norms
        assert n is not None
        on = statistics.present & (L > TINY) & (n > 0)
        if not on.any():
            return state["weights"], state
        q = np.where(on, n, 0.0) / (2 * np.sqrt(np.where(on, L, 1.0)))
        weights = np.where(on, q.sum() / np.where(on, q, 1.0), state["weights"])
        return weights, {"weights": weights}
