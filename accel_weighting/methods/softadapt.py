"""Weights from how the losses move: SoftAdapt by their slopes, ReLoBRaLo by their ratios to earlier values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from accel_weighting.methods.algebra import TINY, Array, LossMethod, mixed_seed, share, softmax
from accel_weighting.statistics import InitialWeights, State, Statistics, count, finite, integer, positive, within


@dataclass(frozen=True)
class SoftAdapt(LossMethod):
    """SoftAdapt: ``α_k = softmax_k(β s_k)``, s_k the slope of the loss (§3.1.1), with sum 1 as in its source.

    The slope is ``s_k = (L_k(t) − L_k(t−n)) / n`` over n = ``history`` steps; n = 1 is the paper's basic form. It is
    the mean of n first differences on purpose: the stencils of higher order in the authors' code amplify the noise of
    the batches. Variants:

    - ``"original"``: as above. Slopes carry the units of their losses.
    - ``"normalized"``: ``s_k / Σ_j |s_j|`` in place of s_k (§3.1.3), so that β is free of units.
    - ``"loss_weighted"``: ``α_k ∝ f_k exp(β s_k)``, f_k the mean loss over the same steps; a mean at or below 0
      leaves the task the smallest weight.

    The paper weights the current step by slopes up to it: that is ``lag=0``. With ``lag=1`` they end one window
    before.

    Until a task has ``history + 1`` losses it keeps its weight (1/K), as an absent one does; the others share the
    rest, and the sum stays that of the initial weights: start with 1 each for a sum of K. Weights stand on a floor of
    1e-6 before they are shared out.

    Args:
        beta: β; positive: more weight to the losses that fall least; negative: to those that fall most.
        history: n, steps (of the task's own) between the two ends of the slope.
        variant: ``"original"``, ``"normalized"`` or ``"loss_weighted"``.

    Raises:
        ValueError: An argument is out of range.

    Source: Heydari, Thompson and Mehmood, 2019, arXiv 1912.12355.
    """

    positive_losses: ClassVar[bool] = False
    keeps_sum: ClassVar[bool] = True
    sum_of_one: ClassVar[bool] = True
    memory: ClassVar[tuple[str, ...]] = ("count",)

    beta: float = finite(0.1)
    history: int = count(1)
    variant: Literal["original", "normalized", "loss_weighted"] = "original"

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Weights 1/K unless ``initial_weights`` say otherwise; an empty window of losses, ``[K, history + 1]``."""
        weights, state = super().init(tasks, initial_weights)
        return weights, state | {"window": np.zeros((len(tasks), self.history + 1))}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """Moves the window of every present task on by one loss, and weights by the slopes of the full ones."""
        L, present = statistics.losses, statistics.present
        moved = np.concatenate([state["window"][:, 1:], L[:, None]], axis=1)
        window = np.where(present[:, None], moved, state["window"])
        counts = state["count"] + present
        ready = present & (counts > self.history)

        s = (window[:, -1] - window[:, 0]) / self.history
        if self.variant == "normalized":
            s = s / max(np.abs(np.where(ready, s, 0.0)).sum(), TINY)
        scores = self.beta * s
        if self.variant == "loss_weighted":
            scores = scores + np.log(np.maximum(window.mean(1), TINY))
        weights = share(state["weights"], softmax(scores, ready), ready)
        return weights, {"weights": weights, "window": window, "count": counts}


@dataclass(frozen=True)
class ReLoBRaLo(LossMethod):
    """Relative loss balancing with random lookback: progress since the step before, and now and then since the start.

    With ``λ̂(t; t') = K softmax_k(L_k(t) / (τ L_k(t')))`` and ρ ~ Bernoulli(``rho``), one draw for all tasks,
    ``λ(t) = α (ρ λ(t−1) + (1 − ρ) λ̂(t; 0)) + (1 − α) λ̂(t; t−1)``. It begins with λ(0) = 1.

    The paper weights the current step by its own losses: that is ``lag=0``. With ``lag=1`` they are those of the
    window before. The draw depends on ``seed`` and on a counter in the state: alike on all processes, and a resumed
    run goes on where it was.

    A task's first positive loss is its L(0); until then, and when absent, it keeps its weight, and t−1 is the last
    window in which it had a positive loss. The others share the rest: the sum stays that of the initial weights (K).

    Args:
        alpha: α, how much of the past is kept.
        tau: τ, the temperature; a smaller one prefers the slowest task more.
        rho: Expectation of ρ; ``1 − rho`` is how often the past is replaced by a look back to the start.
        seed: Seed of the draws, the same on every process.

    Raises:
        ValueError: An argument is out of range.

    Source: Bischof and Kraus, 2021, arXiv 2110.09813.
    """

    keeps_sum: ClassVar[bool] = True
    memory: ClassVar[tuple[str, ...]] = ("first", "last")

    alpha: float = within("[0, 1]", 0.999)
    tau: float = positive(0.1)
    rho: float = within("[0, 1]", 0.999)
    seed: int = integer(0)

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """λ(0), 1 unless ``initial_weights`` say otherwise; losses not seen yet are written as 0."""
        weights, state = super().init(tasks, initial_weights)
        return weights, state | {"counter": np.asarray(0)}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """λ(t) from λ(t−1), L(t), L(t−1) and L(0)."""
        L, active = statistics.losses, statistics.present & (statistics.losses > TINY)
        weights, first, last, counter = state["weights"], state["first"], state["last"], int(state["counter"])
        ready = active & (first > 0)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, counter))
        rho = float(torch.rand((), generator=generator, dtype=torch.float64)) < self.rho

        def balance(reference: Array) -> Array:  # λ̂(t; t')
            relative = L / (self.tau * np.where(ready, reference, 1.0))
            return share(weights, softmax(relative, ready), ready)

        history = weights if rho else balance(first)
        mixed = self.alpha * history + (1 - self.alpha) * balance(last)
        weights = np.where(ready, mixed, weights)
        return weights, {
            "weights": weights,
            "first": np.where(active & (first == 0), L, first),
            "last": np.where(active, L, last),
            "counter": np.asarray(counter + 1),
        }
