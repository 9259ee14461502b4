"""Weights under which no unit of a loss matters: geometric loss and scale-invariant loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accel_weighting.methods.algebra import FLOOR
from accel_weighting.statistics import Method, State, Statistics, initial_vector

TINY = 1e-30
"""At or below it a loss counts as 0, and its task as absent: the weight, its inverse, would leave float32."""


@dataclass(frozen=True)
class GeometricLoss(Method):
    """Geometric loss strategy: the geometric mean ``(Π_k L_k)^{1/K}`` in place of the sum.

    Its gradient is that of ``Σ w_k L_k`` with ``w_k = (Π_j L_j)^{1/K} / (K L_k)``, held constant; every weighted loss
    is the same. There is no fixed sum. Weights are kept above a floor, so losses more than six orders of magnitude
    above their geometric mean are not balanced fully.

    The paper takes the current losses: that is ``lag=0``. With ``lag=1`` they are those of the window before.

    A task that is absent, or whose loss is 0, keeps its weight; the mean runs over the others, K being their number.

    Source: Chennupati et al., MultiNet++, CVPR Workshops 2019, arXiv 1904.08492.

    Example:
        >>> method = GeometricLoss()
        >>> weights, state = method.init(["metres", "millimetres"])
        >>> statistics = Statistics(torch.tensor([0.5, 50.0]).double(), torch.tensor([True, True]))
        >>> method.update(state, statistics)[0]  # the geometric mean is 5
        tensor([5.0000, 0.0500], dtype=torch.float64)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"losses"})
    positive_losses: ClassVar[bool] = True

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Weights 1/K, those of equal losses, unless ``initial_weights`` say otherwise."""
        weights = initial_vector(tasks, initial_weights, default=1 / len(tasks)).clamp(min=FLOOR)
        return weights, {"weights": weights}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """``(Π_j L_j)^{1/K} / (K L_k)``, in logarithms."""
        L, active = statistics.losses, statistics.present & (statistics.losses > TINY)
        w = (L[active].log().mean() - L.log()).exp() / active.sum()
        weights = torch.where(active, w.clamp(min=FLOOR), state["weights"])
        return weights, {"weights": weights}


@dataclass(frozen=True)
class ScaleInvariant(Method):
    """Scale-invariant loss: ``Σ_k log L_k`` in place of the sum.

    Its gradient is that of ``Σ w_k L_k`` with ``w_k = 1 / L_k``, held constant: every weighted loss is 1. There is no
    fixed sum. Weights are kept above a floor, so losses beyond a million are not balanced fully.

    The usual form takes the current losses: that is ``lag=0``. With ``lag=1`` they are those of the window before.

    A task that is absent, or whose loss is 0, keeps its weight.

    Source: a baseline of Navon et al., Nash-MTL, ICML 2022, arXiv 2202.01017.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"losses"})
    positive_losses: ClassVar[bool] = True

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Weights 1 unless ``initial_weights`` say otherwise."""
        weights = initial_vector(tasks, initial_weights).clamp(min=FLOOR)
        return weights, {"weights": weights}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """``1 / L_k``."""
        active = statistics.present & (statistics.losses > TINY)
        weights = torch.where(active, (1 / statistics.losses).clamp(min=FLOOR), state["weights"])
        return weights, {"weights": weights}
