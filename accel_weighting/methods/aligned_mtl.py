"""Aligned-MTL: the gradients, replaced by the nearest orthogonal ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from accel_weighting.methods.algebra import RANK, Array, GramMethod, cosines, reciprocal


@dataclass(frozen=True)
class AlignedMTL(GramMethod):
    """Independent component alignment: the mean gradient after ``M = VΛVᵀ`` is made ``σ²I`` (Alg. 1).

    ``B = σ V Λ^{-1/2} Vᵀ`` aligns the gradients, all of them to length σ, and the weights are the row means of B:
    those of a mean, as TorchJD's with its default preferences.

    Only the rank of M counts as many eigenvalues; it is read from the cosines, in which a short gradient weighs as
    much as a long one. A zero gradient counts as absent. LibMTL's and the authors' weights are K times these, those of
    a sum.

    Args:
        scale: σ² is the ``"min"``, as in the paper, ``"median"`` or ``"rmse"`` (mean) eigenvalue.

    Raises:
        ValueError: ``scale`` is unknown.

    Source: Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023, arXiv 2305.19000.
    """

    scale: Literal["min", "median", "rmse"] = "min"

    def solve(self, M: Array) -> Array:
        """Row means of the balance matrix B, ``[K]``."""
        C, n = cosines(M)
        order = np.argsort(-n, kind="stable")  # rows that fall in length keep their digits in the decomposition
        C, n = C[order][:, order], n[order]
        c, E = np.linalg.eigh(C)
        keep = c > RANK * c[-1]
        L = n[:, None] * E[:, keep] * np.sqrt(c[keep])  # M = LLᵀ; its singular values keep the digits that Λ would lose
        V, S, _ = np.linalg.svd(L, full_matrices=False)
        V = V * (n > 0)[:, None]  # a zero gradient's row is rounding, which 1/S would magnify
        sigma = {"min": S[-1], "median": S[len(S) // 2], "rmse": np.sqrt((S * S).mean())}[self.scale]
        B = sigma * (V * reciprocal(S)) @ V.T
        weights: Array = B.mean(1)[np.argsort(order)]
        return weights
