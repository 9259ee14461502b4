"""MGDA: the shortest vector in the convex hull of the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from accel_weighting.methods.algebra import Array, GramMethod, cosines, even, min_norm


@dataclass(frozen=True)
class MGDA(GramMethod):
    """Multiple-gradient descent: ``min_α ‖Σ α_k g_k‖²  s.t.  Σ α_k = 1, α_k ≥ 0`` (Sener and Koltun, eq. 3).

    The minimiser is a common descent direction, or 0 at a Pareto-stationary point. It is exact here (an active set),
    not the paper's Frank–Wolfe iteration. Read at the shared representation, as the weighter does by default, this
    is the paper's MGDA-UB (its eq. 6). Of several minimisers it takes the most even one; a zero gradient counts
    as absent.

    The weights sum to 1, as TorchJD's do, or to the sum of the initial weights. Short gradients get the most of it:
    ``α_k ∝ 1/n_k²`` if all are orthogonal.

    Args:
        normalize: ``"norm"`` solves for the gradients divided by their norms and, as in the authors' code, applies the
            weights to the gradients as they are: the result is no common descent direction any more, and may point
            uphill for a task. None leaves them alone.

    Raises:
        ValueError: ``normalize`` is unknown.

    Source: Désidéri, C. R. Acad. Sci. 350, 2012; Sener and Koltun, NeurIPS 2018, arXiv 1810.04650.
    """

    keeps_sum: ClassVar[bool] = True
    grows: ClassVar[bool] = False  # none is above their sum

    normalize: Literal["norm"] | None = None

    def solve(self, M: Array) -> Array:
        """The minimiser α, ``[K]``."""
        M = cosines(M)[0] if self.normalize == "norm" else M
        return even(min_norm(M), M)
