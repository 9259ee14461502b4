"""Loss scales learned along with the model: uncertainty weighting and IMTL-L."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from accel_weighting.methods.adam import adam_state, adam_step
from accel_weighting.methods.algebra import FLOOR, Array, LossMethod, Mask
from accel_weighting.statistics import InitialWeights, State, Statistics, check_tasks, initial_vector, names, positive

BOUND = -math.log(FLOOR)
"""Largest |s|. A loss that stays at 0 pushes its s on for ever; held here, its weight stays finite."""


@dataclass(frozen=True)
class _LearnedScale(LossMethod):
    """One scalar ``s`` per task, descended on a closed-form gradient of the window's mean losses.

    The losses must be positive: for a negative one there is no best s, the objective falls without end.
    """

    lr: float = positive(0.025)
    optimizer: Literal["adam", "sgd"] = "adam"
    start: Literal["equal", "balanced"] = field(default="equal", kw_only=True)

    def _begin(self, s: Array) -> State:
        moments = adam_state(len(s)) if self.optimizer == "adam" else {}
        started = {"started": np.zeros(len(s), np.bool_)} if self.start == "balanced" else {}
        return {"s": np.clip(s, -BOUND, BOUND), **moments, **started}

    def _settle(self, state: State, rest: Array, known: Mask) -> tuple[State, Mask]:
        """A task's first positive loss takes its ``s`` to ``rest``. Also says whose ``s`` had been there before."""
        started = state["started"]
        new = known & ~started
        s = np.where(new, np.minimum(np.maximum(rest, -BOUND), BOUND), state["s"])
        return {**state, "s": s, "started": started | new}, started

    def _descend(self, state: State, gradient: Array, present: Mask) -> State:
        if self.optimizer == "adam":
            s, moments = adam_step(state["s"], gradient, state, present, self.lr)
        else:
            s, moments = np.where(present, state["s"] - self.lr * gradient, state["s"]), {}
        return {**state, **moments, "s": np.minimum(np.maximum(s, -BOUND), BOUND)}


@dataclass(frozen=True)
class UncertaintyWeighting(_LearnedScale):
    """Homoscedastic uncertainty: a noisy task is one whose loss stays high, and counts for less.

    With ``s = log σ²`` learned per task, ``min Σ_k f_k e^{−s_k} L_k + s_k/2`` has ``w_k = f_k e^{−s_k}`` and the
    gradient ``1/2 − w_k L_k``: at rest every weighted loss is 1/2. The factor f is 1/2 for a Gaussian likelihood (a
    squared error, eq. 7) and 1 for a softmax (a cross entropy, eq. 10); name the latter in ``classification``. The
    two differ in where ``s`` begins, not in where the weight settles. ``s`` lives here, in the method's state:
    nothing to add to the user's optimizer. There is no fixed sum.

    With ``form="log1p"`` the regulariser is ``log(1 + σ²)`` in place of ``log σ`` (Liebel and Körner, eq. 2), which is
    never negative, and neither is the objective. Its gradient is ``σ²/(1 + σ²) − w_k L_k``.

    The paper moves ``s`` and the model at the same time, from the same losses: that is ``lag=1``. With ``lag=0`` the
    weights are one step of ``s`` ahead of it. A task absent from a window keeps its ``s``. Weights are at least 1e-6,
    and at most a million times f: losses beyond a million, or below a millionth, are not balanced fully.

    Args:
        lr: Step size of ``s``; GradNorm's experiments used 0.025 for this method.
        optimizer: ``"adam"``, or ``"sgd"`` for plain steps, whose length follows the losses' units.
        classification: Names of the tasks whose loss is a cross entropy.
        form: ``"log"``, the paper's regulariser, or ``"log1p"``.
        start: ``"equal"``: the factors f. ``"balanced"``: at rest from a task's first positive loss, ``s = log 2fL``
            (for ``"log1p"`` the root of ``σ⁴ = fL (1 + σ²)``).

    Raises:
        ValueError: An argument is out of range; in ``init``, a name that is not a task.

    Source: Kendall, Gal and Cipolla, CVPR 2018, arXiv 1705.07115; Liebel and Körner, arXiv 1805.06334.

    Example:
        >>> UncertaintyWeighting(classification=("class",)).init(["depth", "class"])[0]
        array([0.5, 1. ])
    """

    classification: Sequence[str] = names(())
    form: Literal["log", "log1p"] = field(default="log", kw_only=True)

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Weights f_k e^{−s_k}: 1/2, or 1 for a cross entropy, unless ``initial_weights`` say otherwise."""
        check_tasks(self, tasks)
        factor = np.array([1.0 if task in self.classification else 0.5 for task in tasks])
        weights = initial_vector(tasks, initial_weights, default=math.nan)
        weights = np.maximum(np.where(np.isnan(weights), factor, weights), FLOOR)
        state = self._begin(np.log(factor / weights))
        return weights, {**state, "factor": factor}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """One step of ``s``, then ``w = f e^{−s}``."""
        L, f, s = statistics.losses, state["factor"], state["s"]
        fL, stepping = f * L, statistics.present
        if self.start == "balanced":
            known = stepping & (L > 0)
            x = np.where(known, fL, 1.0)
            rest = np.log(2 * x) if self.form == "log" else np.log((x + np.sqrt(x * x + 4 * x)) / 2)
            state, started = self._settle(state, rest, known)
            stepping = stepping & started
        pull = 0.5 if self.form == "log" else 1 / (1 + np.exp(-s))
        state = self._descend(state, pull - fL * np.exp(-s), stepping)
        return np.maximum(f * np.exp(-state["s"]), FLOOR), state


@dataclass(frozen=True)
class IMTLL(_LearnedScale):
    """Impartial multi-task learning, loss balance: scales under which every weighted loss comes to 1.

    ``min Σ_k e^{s_k} L_k − s_k`` has ``w_k = e^{s_k}`` and the gradient ``w_k L_k − 1``. At
    rest ``w_k = 1 / L_k``, smoothed over time. There is no fixed sum.

    The paper moves ``s`` and the model at the same time, from the same losses: that is ``lag=1``. With ``lag=0`` the
    weights are one step of ``s`` ahead of it. A task absent from a window keeps its ``s``. Weights lie within
    [1e-6, 1e6]: losses beyond a million, or below a millionth, are not balanced fully.

    Args:
        lr: Step size of ``s``.
        optimizer: ``"adam"``, or ``"sgd"`` for plain steps, whose length follows the losses' units.
        start: ``"equal"``: weights of 1. ``"balanced"``: at rest from a task's first positive loss, ``s = −log L``.

    Raises:
        ValueError: An argument is out of range.

    Source: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021 (OpenReview IMPnRXEWpvr; not on arXiv).
    """

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Weights e^{s_k}: 1 unless ``initial_weights`` say otherwise."""
        weights, _ = super().init(tasks, initial_weights)
        return weights, self._begin(np.log(weights))

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """One step of ``s``, then ``w = e^s``."""
        L, stepping, s = statistics.losses, statistics.present, state["s"]
        if self.start == "balanced":
            known = stepping & (L > 0)
            state, started = self._settle(state, -np.log(np.where(known, L, 1.0)), known)
            stepping = stepping & started
        state = self._descend(state, np.exp(s) * L - 1, stepping)
        return np.maximum(np.exp(state["s"]), FLOOR), state
