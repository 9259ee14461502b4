"""FAMO: fast adaptive multitask optimization, with the next step's losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from accel_weighting.methods.adam import adam_step
from accel_weighting.methods.algebra import Array, LossMethod, log, share, softmax
from accel_weighting.statistics import (
    InitialWeights,
    State,
    Statistics,
    initial_vector,
    non_negative,
    non_negative_by_task,
    positive,
)


@dataclass(frozen=True)
class FAMO(LossMethod):
    """Fast adaptive multitask optimization: all log losses should fall at the same rate.

    With logits ξ, ``z = softmax(ξ)`` and D_k = L_k − m_k, the model descends on ``Σ_k z_k log D_k``, normalised, so
    that ``w_k = (z_k / D_k) / Σ_j (z_j / D_j)``; then ``ξ ← ξ − lr · Adam(Jᵀ δ + γ ξ)``, δ_k the fall of log D_k over
    that step and J the Jacobian of z, in closed form ``(Jᵀ δ)_k = z_k (δ_k − Σ_j z_j δ_j)`` (Algorithm 1). The sum of
    the weights is 1, as in its source; it stays that of the initial weights: start with 1 each for a sum of K. Weights
    stand on a floor of 1e-6: losses more than some five orders of magnitude apart are not balanced fully.

    There is no ``start``: with z equal the first weights are already those of ``Σ log D_k``, where every weighted loss
    is the same, and at which rates the log losses fall is not known before the second window.

    **What differs here.** The paper computes δ with a second forward on the same batch, after the optimizer's step.
    Here δ compares the losses of two windows in a row: no second forward, but the difference of their batches is in
    δ. It is the paper's algorithm where every batch is the whole data set, and otherwise a noisier estimate of the
    same quantity, the better the larger the global batch.

    The paper takes the current losses in ``w``: that is ``lag=0``. With ``lag=1`` they are those of the window before.

    A task that is absent, or at or below its m_k, keeps its weight, its ξ and its last loss; z runs over the others. A
    task's first loss only begins the comparison.

    Args:
        lr: Step size of ξ.
        gamma: γ, decay of ξ towards equal z; the stronger, the less recent history decides.
        min_losses: m, the smallest values the losses can take, by task; 0 where not named.

    Raises:
        ValueError: An argument is out of range; in ``init``, ``min_losses`` names an unknown task.

    Source: Liu, Feng, Stone and Liu, NeurIPS 2023, arXiv 2306.03792; Adam and the defaults from the authors' code.
    """

    keeps_sum: ClassVar[bool] = True
    sum_of_one: ClassVar[bool] = True
    memory: ClassVar[tuple[str, ...]] = ("xi", "D", "adam_mean", "adam_square", "adam_steps")

    lr: float = positive(0.025)
    gamma: float = non_negative(0.01)
    min_losses: Mapping[str, float] | None = non_negative_by_task(None)

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Weights 1/K unless ``initial_weights`` say otherwise; ξ = 0; a loss not seen yet is written as D = 0."""
        weights, state = super().init(tasks, initial_weights)
        return weights, state | {"m": initial_vector(tasks, self.min_losses or {}, default=0.0)}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """A step of ξ on what the last step achieved, then the weights of the next."""
        xi, D = state["xi"], statistics.losses - state["m"]
        active = statistics.present & (D > 0)
        compared = active & (state["D"] > 0)
        log_D = log(D, active)

        z = softmax(xi, compared)
        delta = np.where(compared, log(state["D"], compared) - log_D, 0.0)
        d = z * (delta - z @ delta)
        xi, moments = adam_step(xi, d + self.gamma * xi, state, compared, self.lr)

        weights = share(state["weights"], softmax(xi - log_D, active), active)
        return weights, {**state, **moments, "weights": weights, "xi": xi, "D": np.where(active, D, state["D"])}
