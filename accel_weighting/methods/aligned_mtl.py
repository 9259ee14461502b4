"""Aligned-MTL: the gradients, replaced by the nearest orthogonal ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from accel_weighting.methods.algebra import RANK, GramMethod, cosines
from accel_weighting.statistics import require


@dataclass(frozen=True)
class AlignedMTL(GramMethod):
    """Independent component alignment: the mean gradient after ``M = VΛVᵀ`` is made ``σ²I`` (Alg. 1).

    ``B = σ V Λ^{-1/2} Vᵀ`` aligns the gradients, all of them to length σ, and the weights are the row means of B:
    those of a mean, as TorchJD's with its default preferences.

    Only the rank of M counts as many eigenvalues; it is read from the cosines, in which a short gradient weighs as
    much as a long one. A zero gradient has weight 0.

    Args:
        scale: σ² is the ``"min"``, as in the paper, ``"median"`` or ``"rmse"`` (mean) eigenvalue.

    Raises:
        ValueError: ``scale`` is unknown.

    Source: Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023, arXiv 2305.19000.
    """

    scale: Literal["min", "median", "rmse"] = "min"

    def __post_init__(self) -> None:
        require(self, "scale", self.scale in ("min", "median", "rmse"), "be 'min', 'median' or 'rmse'")

    def solve(self, M: Tensor) -> Tensor:
        """Row means of the balance matrix B, ``[K]``."""
        C, n = cosines(M)
        order = n.argsort(descending=True)  # rows that fall in length keep their digits in the decomposition
        C, n = C[order][:, order], n[order]
        c, E = torch.linalg.eigh(C)
        keep = c > RANK * c[-1]
        L = n[:, None] * E[:, keep] * c[keep].sqrt()  # M = LLᵀ; its singular values keep the digits that Λ would lose
        V, S, _ = torch.linalg.svd(L, full_matrices=False)
        V = V * (n > 0)[:, None]  # a zero gradient's row is rounding, which 1/S would magnify
        sigma = {"min": S[-1], "median": S.median(), "rmse": S.square().mean().sqrt()}[self.scale]
        B = sigma * (V / S) @ V.T
        return B.mean(1)[order.argsort()]
