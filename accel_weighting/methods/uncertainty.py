"""Loss scales learned along with the model: uncertainty weighting and IMTL-L."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from accel_weighting.methods.adam import adam_state, adam_step
from accel_weighting.methods.algebra import FLOOR
from accel_weighting.statistics import Method, State, Statistics, initial_vector

BOUND = -math.log(FLOOR)
"""Largest |s|. A loss that stays at 0 pushes its s on for ever; held here, its weight stays finite."""


@dataclass(frozen=True)
class _LearnedScale(Method):
    """One scalar ``s`` per task, descended on a closed-form gradient of the window's mean losses."""

    needs: ClassVar[frozenset[str]] = frozenset({"losses"})
    positive_losses: ClassVar[bool] = True  # a negative loss has no best s: the objective falls without end

    lr: float = 0.025
    optimizer: Literal["adam", "sgd"] = "adam"

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"Parameter `lr` must be positive and finite. Found `lr = {self.lr}`.")
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"Parameter `optimizer` must be 'adam' or 'sgd'. Found `optimizer = {self.optimizer!r}`.")

    def _begin(self, s: Tensor) -> State:
        moments = adam_state(len(s)) if self.optimizer == "adam" else {}
        return {"s": s.clamp(-BOUND, BOUND), **moments}

    def _descend(self, state: State, gradient: Tensor, present: Tensor) -> State:
        if self.optimizer == "adam":
            s, moments = adam_step(state["s"], gradient, state, present, self.lr)
        else:
            s, moments = torch.where(present, state["s"] - self.lr * gradient, state["s"]), {}
        return {**state, **moments, "s": s.clamp(-BOUND, BOUND)}


@dataclass(frozen=True)
class UncertaintyWeighting(_LearnedScale):
    """Homoscedastic uncertainty: a noisy task is one whose loss stays high, and counts for less.

    With ``s = log σ²`` learned per task, ``min Σ_k f_k e^{−s_k} L_k + s_k/2`` has ``w_k = f_k e^{−s_k}`` and the
    gradient ``1/2 − w_k L_k``: at rest every weighted loss is 1/2. The factor f is 1/2 for a Gaussian likelihood (a
    squared error, eq. 7) and 1 for a softmax (a cross entropy, eq. 10); name the latter in ``classification``. The
    two differ in where ``s`` begins, not in where the weight settles. ``s`` lives here, in the method's state:
    nothing to add to the user's optimizer. There is no fixed sum.

    The paper moves ``s`` and the model at the same time, from the same losses: that is ``lag=1``. With ``lag=0`` the
    weights are one step of ``s`` ahead of it. A task absent from a window keeps its ``s``.

    Args:
        lr: Step size of ``s``; GradNorm's experiments used 0.025 for this method.
        optimizer: ``"adam"``, or ``"sgd"`` for plain steps, whose length follows the losses' units.
        classification: Names of the tasks whose loss is a cross entropy.

    Raises:
        ValueError: ``lr`` or ``optimizer`` out of range; in ``init``, a name that is not a task.

    Source: Kendall, Gal and Cipolla, CVPR 2018, arXiv 1705.07115.

    Example:
        >>> UncertaintyWeighting(classification=("class",)).init(["depth", "class"])[0]
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    classification: Sequence[str] = ()

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Weights f_k e^{−s_k}: 1/2, or 1 for a cross entropy, unless ``initial_weights`` say otherwise."""
        if unknown := sorted(set(self.classification) - set(tasks)):
            raise ValueError(f"Parameter `classification` must name tasks out of {list(tasks)}. Found {unknown}.")
        factor = torch.tensor([1.0 if task in self.classification else 0.5 for task in tasks], dtype=torch.float64)
        weights = initial_vector(tasks, initial_weights, default=math.nan)
        weights = torch.where(weights.isnan(), factor, weights).clamp(min=FLOOR)
        state = self._begin((factor / weights).log())
        return weights, {**state, "factor": factor}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """One step of ``s``, then ``w = f e^{−s}``."""
        L, f = statistics.losses, state["factor"]
        state = self._descend(state, 0.5 - f * torch.exp(-state["s"]) * L, statistics.present)
        return (f * torch.exp(-state["s"])).clamp(min=FLOOR), state


@dataclass(frozen=True)
class IMTLL(_LearnedScale):
    """Impartial multi-task learning, loss balance: scales under which every weighted loss comes to 1.

    ``min Σ_k e^{s_k} L_k − s_k`` has ``w_k = e^{s_k}`` and the gradient ``w_k L_k − 1``. At
    rest ``w_k = 1 / L_k``, smoothed over time. There is no fixed sum.

    The paper moves ``s`` and the model at the same time, from the same losses: that is ``lag=1``. With ``lag=0`` the
    weights are one step of ``s`` ahead of it. A task absent from a window keeps its ``s``.

    Args:
        lr: Step size of ``s``.
        optimizer: ``"adam"``, or ``"sgd"`` for plain steps, whose length follows the losses' units.

    Raises:
        ValueError: ``lr`` or ``optimizer`` out of range.

    Source: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021 (OpenReview IMPnRXEWpvr; not on arXiv).
    """

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Weights e^{s_k}: 1 unless ``initial_weights`` say otherwise."""
        weights = initial_vector(tasks, initial_weights).clamp(min=FLOOR)
        return weights, self._begin(weights.log())

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """One step of ``s``, then ``w = e^s``."""
        state = self._descend(state, state["s"].exp() * statistics.losses - 1, statistics.present)
        return state["s"].exp().clamp(min=FLOOR), state
