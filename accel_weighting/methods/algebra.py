"""Arithmetic that several methods share: sums that stay, and small linear algebra on Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-6
"""Smallest weight on a loss. At 0 the gradient of that task could no longer be observed in the one backward."""


def share(old: Tensor, new: Tensor, present: Tensor) -> Tensor:
    """Absent tasks keep their ``old`` weight; present ones take ``new``, scaled so that the sum of ``old`` stays.

    Args:
        old: Weights before, ``[K]``.
        new: Proposed weights, ``[K]``; read where ``present``, positive there.
        present: bool ``[K]``.
    """
    if not present.any():
        return old.clone()
    left = old[present].sum()
    weights = old.clone()
    proposed = new[present].clamp(min=FLOOR)
    weights[present] = proposed * (left / proposed.sum())
    return weights
