"""Auxiliary tasks that are let in only where their gradient agrees with a primary one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from accel_weighting.methods.algebra import Array, with_gradients
from accel_weighting.statistics import InitialWeights, Method, State, Statistics, check_tasks, initial_vector, name


@dataclass(frozen=True)
class CosineGate(Method):
    """An auxiliary task counts where its gradient does not oppose the primary one.

    With ``c_k = cos(g_0, g_k)`` and the primary gradient ``g_0``: ``"hard"``, ``w_k = 1[c_k ≥ 0]``; ``"soft"``,
    ``w_k = max(0, c_k)``; ``w_0 = 1``. Hard gating never makes the primary loss rise to first order. Heads keep their
    own gradients: a task that is shut out at the shared path still trains its head.

    A task that is absent, or has a gradient of 0, keeps its weight; where that is the primary one, so do all.

    Args:
        primary: The task that matters.
        mode: ``"hard"`` (the paper's unweighted variant) or ``"soft"`` (its weighted one).

    Raises:
        ValueError: ``mode`` is unknown, or (in ``init``) ``primary`` is not a task.

    Source: Du et al., Adapting Auxiliary Losses Using Gradient Similarity, arXiv 1812.02224. Its text was not at
    hand: this is what is quoted of it, and nothing beyond.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    acts_on: ClassVar[Literal["losses", "shared"]] = "shared"

    primary: str = name()
    mode: Literal["hard", "soft"] = "hard"

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Weights 1 unless ``initial_weights`` say otherwise; the primary task's is 1."""
        check_tasks(self, tasks)
        is_primary = np.array([task == self.primary for task in tasks])
        weights = np.where(is_primary, 1.0, initial_vector(tasks, initial_weights))
        return weights, {"weights": weights, "settings": is_primary}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """The gate for this window's cosines."""
        w, M, is_primary = state["weights"], statistics.gram, state["settings"]
        assert M is not None
        on, inner = with_gradients(statistics), M[is_primary][0]
        if not on[is_primary].all():
            return w, state
        if self.mode == "hard":
            gate = (inner >= 0).astype(np.float64)
        else:
            n = np.sqrt(np.where(on, M.diagonal(), 1.0))
            gate = np.minimum(np.maximum(inner / n / n[is_primary], 0.0), 1.0)
        w = np.where(on & ~is_primary, gate, w)
        return w, {**state, "weights": w}
