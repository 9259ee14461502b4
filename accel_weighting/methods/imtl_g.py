"""IMTL-G: an update with the same projection on every task's gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from accel_weighting.methods.algebra import LIMIT, Array, GramMethod, equal_projections, reciprocal


@dataclass(frozen=True)
class IMTLG(GramMethod):
    """Impartial multi-task learning at the gradients: ``g = Σ α_k g_k`` with the same ``g·u_k`` for all k, ``Σα = 1``.

    With the unit gradients ``u_k = g_k/n_k`` and their cosines C that is ``α_k n_k ∝ (C⁺1)_k`` (the paper's closed
    form, for any rank): multiplying one task's loss by a constant changes nothing but the length of g. The weights
    sum to 1 and may be negative, as in the paper and in TorchJD, whose ``M⁺n`` is the same wherever C is regular.

    Where the gradients cancel out, or where the sum before normalising is not positive or so small that a weight
    would pass 1,000 (the paper's g then points uphill for every task, or is without bound), ``α_k ∝ 1/n_k``. A zero
    gradient counts as absent. In a step in which the weighter's ``max_growth`` cuts one of the weights off the sum is
    not 1.

    Source: Liu et al., Towards Impartial Multi-Task Learning, ICLR 2021; in terms of the Gram matrix, arXiv
    2406.16232.
    """

    keeps_sum: ClassVar[bool] = True

    def solve(self, M: Array) -> Array:
        """α, ``[K]``, of sum 1."""
        alpha, _, _ = equal_projections(M)
        if alpha.sum() < np.abs(alpha).max() / LIMIT:
            alpha = reciprocal(np.sqrt(np.maximum(M.diagonal(), 0)))
        weights: Array = alpha / alpha.sum()
        return weights
