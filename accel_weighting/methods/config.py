"""ConFIG: a conflict-free direction with the same cosine to every gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from accel_weighting.methods.algebra import Array, GramMethod, equal_projections


@dataclass(frozen=True)
class ConFIG(GramMethod):
    """Conflict-free inverse gradients: ``g = (Σ_k g_k·ĝ) ĝ``, ĝ the unit vector along ``U⁺1`` (eq. 2).

    The rows of U are the unit gradients ``u_k = g_k/n_k``. From the Gram matrix: with cosines C and ``a = C⁺1``, the
    weights are ``(a_k/n_k) · Σ_j (n_j (Ca)_j) / Σ_j a_j``. The direction is IMTL-G's, the length that of the sum of
    the gradients' projections on it, as in the paper, in its code and in TorchJD: 1 each for orthonormal gradients.

    Weights may be negative. Where the unit gradients cancel out, ``w_k = (mean n)/n_k``, the limit; a zero gradient
    counts as absent.

    Source: Liu, Chu and Thuerey, ConFIG, ICLR 2025, arXiv 2408.11104.
    """

    def solve(self, M: Array) -> Array:
        """The weights, ``[K]``."""
        w, p, total = equal_projections(M)
        n = np.sqrt(np.maximum(M.diagonal(), 0))
        return w * (n @ p) / total
