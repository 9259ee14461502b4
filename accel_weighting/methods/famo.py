"""FAMO: fast adaptive multitask optimization, with the next step's losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accel_weighting.methods.adam import adam_state, adam_step
from accel_weighting.methods.algebra import FLOOR, share
from accel_weighting.statistics import Method, State, Statistics, initial_vector


@dataclass(frozen=True)
class FAMO(Method):
    """Fast adaptive multitask optimization: all log losses should fall at the same rate.

    With logits ξ, ``z = softmax(ξ)`` and D_k = L_k − m_k, the model descends on ``Σ_k z_k log D_k``, normalised, so
    that ``w_k = (z_k / D_k) / Σ_j (z_j / D_j)``; then ``ξ ← ξ − lr · Adam(Jᵀ δ + γ ξ)``, δ_k the fall of log D_k over
    that step and J the Jacobian of z, in closed form ``(Jᵀ δ)_k = z_k (δ_k − Σ_j z_j δ_j)`` (Algorithm 1). The sum of
    the weights is 1, as in its source; it stays that of the initial weights: start with 1 each for a sum of K.

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

    needs: ClassVar[frozenset[str]] = frozenset({"losses"})
    positive_losses: ClassVar[bool] = True
    keeps_sum: ClassVar[bool] = True

    lr: float = 0.025
    gamma: float = 0.01
    min_losses: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.min_losses is not None:
            object.__setattr__(self, "min_losses", dict(sorted(self.min_losses.items())))
        if not 0 < self.lr < math.inf:
            raise ValueError(f"Parameter `lr` must be positive and finite. Found `lr = {self.lr}`.")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"Parameter `gamma` must be finite and not negative. Found `gamma = {self.gamma}`.")
        if wrong := {task: m for task, m in (self.min_losses or {}).items() if not 0 <= m < math.inf}:
            raise ValueError(f"Parameter `min_losses` must hold finite numbers from 0 on. Found {wrong}.")

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Weights 1/K unless ``initial_weights`` say otherwise; ξ = 0; a loss not seen yet is written as D = 0."""
        if unknown := sorted(set(self.min_losses or {}) - set(tasks)):
            raise ValueError(f"Parameter `min_losses` must name tasks out of {list(tasks)}. Found {unknown}.")
        weights = initial_vector(tasks, initial_weights, default=1 / len(tasks)).clamp(min=FLOOR)
        m = initial_vector(tasks, self.min_losses or {}, default=0.0)
        zeros = torch.zeros_like(weights)
        return weights, {"weights": weights, "xi": zeros, "m": m, "D": zeros, **adam_state(len(tasks))}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """A step of ξ on what the last step achieved, then the weights of the next."""
        xi, D = state["xi"], statistics.losses - state["m"]
        active = statistics.present & (D > 0)
        compared = active & (state["D"] > 0)

        z = xi.where(compared, -math.inf).softmax(0)
        delta = (state["D"].log() - D.log()).where(compared, 0.0)
        d = z * (delta - z @ delta)
        xi, moments = adam_step(xi, d + self.gamma * xi, state, compared, self.lr)

        weights = share(state["weights"], (xi - D.log()).where(active, -math.inf).softmax(0), active)
        return weights, {**state, **moments, "weights": weights, "xi": xi, "D": torch.where(active, D, state["D"])}
