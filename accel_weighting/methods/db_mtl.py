"""DB-MTL: log losses for the heads, gradients of one length for the trunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from accel_weighting.methods.algebra import TINY, Array, LossMethod
from accel_weighting.statistics import InitialWeights, State, Statistics


@dataclass(frozen=True)
class DBMTL(LossMethod):
    """Dual balancing: ``log L_k`` in place of ``L_k``, and all gradients of them as long as the longest (eq. 3).

    Heads descend ``Σ log L_k``: their gradients are multiplied by ``1/L_k``. The trunk receives
    ``Σ_k (max_j m_j / m_k) ∇log L_k`` with ``m_k = ‖∇log L_k‖ = n_k / L_k``. The paper takes these gradients as moving
    averages over time; those would be K vectors of the length of all parameters, and are left out (its β = 0).

    A task that is absent, or whose loss or gradient is exactly 0, keeps its weight; the maximum runs over the others.

    Source: Lin et al., Dual-Balancing for Multi-Task Learning, arXiv 2308.12029; from LibMTL's code, which is its
    authors'.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"norms", "losses"})
    acts_on: ClassVar[Literal["losses", "shared"]] = "shared"
    grows: ClassVar[bool] = True
    loss_weights_grow: ClassVar[bool] = True

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Weights 1 unless ``initial_weights`` say otherwise, on losses as they are until the first are known."""
        weights, state = super().init(tasks, initial_weights)
        return weights, {**state, "loss_weights": np.ones(len(tasks))}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """``1/L`` for the losses, and ``max_j m_j / m_k`` for their gradients at the shared path."""
        known = statistics.present & (statistics.losses > TINY)
        inverse = 1 / np.where(known, statistics.losses, 1.0)
        state = {**state, "loss_weights": np.where(known, inverse, state["loss_weights"])}
        state["weights"] = self.weigh(state, statistics)
        return state["weights"], state

    def weigh(self, state: State, statistics: Statistics) -> Array:
        """``max_j m_j / m_k`` for gradients of the losses as they are weighted by now."""
        n = statistics.norms
        assert n is not None
        m = n * state["loss_weights"]
        on = statistics.present & (statistics.losses > TINY) & (m > 0)
        longest = m[on].max() if on.any() else 0.0
        return np.where(on, longest / np.where(on, m, 1.0), state["weights"])
