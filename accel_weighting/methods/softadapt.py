"""Weights from how the losses move: SoftAdapt by their slopes, ReLoBRaLo by their ratios to earlier values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from accel_weighting.methods.algebra import FLOOR, mixed_seed, share
from accel_weighting.statistics import Method, State, Statistics, initial_vector

TINY = 1e-30
"""At or below it a loss counts as 0: its logarithm, or a ratio to it, would not be finite."""


@dataclass(frozen=True)
class SoftAdapt(Method):
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
    rest, and the sum stays that of the initial weights: start with 1 each for a sum of K.

    Args:
        beta: β; positive: more weight to the losses that fall least; negative: to those that fall most.
        history: n, steps (of the task's own) between the two ends of the slope.
        variant: ``"original"``, ``"normalized"`` or ``"loss_weighted"``.

    Raises:
        ValueError: An argument is out of range.

    Source: Heydari, Thompson and Mehmood, 2019, arXiv 1912.12355.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"losses"})
    keeps_sum: ClassVar[bool] = True

    beta: float = 0.1
    history: int = 1
    variant: Literal["original", "normalized", "loss_weighted"] = "original"

    def __post_init__(self) -> None:
        if not math.isfinite(self.beta):
            raise ValueError(f"Parameter `beta` must be finite. Found `beta = {self.beta}`.")
        if not (isinstance(self.history, int) and self.history >= 1):
            raise ValueError(f"Parameter `history` must be a positive integer. Found `history = {self.history!r}`.")
        if self.variant not in ("original", "normalized", "loss_weighted"):
            raise ValueError(
                "Parameter `variant` must be 'original', 'normalized' or 'loss_weighted'. "
                f"Found `variant = {self.variant!r}`."
            )

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Weights 1/K unless ``initial_weights`` say otherwise; an empty window of losses, ``[K, history + 1]``."""
        weights = initial_vector(tasks, initial_weights, default=1 / len(tasks)).clamp(min=FLOOR)
        window = torch.zeros(len(tasks), self.history + 1, dtype=torch.float64)
        return weights, {"weights": weights, "window": window, "count": torch.zeros_like(weights)}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """Moves the window of every present task on by one loss, and weights by the slopes of the full ones."""
        L, present = statistics.losses, statistics.present
        window = torch.where(present[:, None], torch.cat([state["window"][:, 1:], L[:, None]], 1), state["window"])
        count = state["count"] + present
        ready = present & (count > self.history)

        s = (window[:, -1] - window[:, 0]) / self.history
        if self.variant == "normalized":
            s = s / s.where(ready, 0.0).abs().sum().clamp(min=TINY)
        scores = self.beta * s
        if self.variant == "loss_weighted":
            scores = scores + window.mean(1).clamp(min=TINY).log()
        weights = share(state["weights"], scores.where(ready, -math.inf).softmax(0), ready)
        return weights, {"weights": weights, "window": window, "count": count}


@dataclass(frozen=True)
class ReLoBRaLo(Method):
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

    needs: ClassVar[frozenset[str]] = frozenset({"losses"})
    positive_losses: ClassVar[bool] = True
    keeps_sum: ClassVar[bool] = True

    alpha: float = 0.999
    tau: float = 0.1
    rho: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "rho"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Parameter `{name}` must lie in [0, 1]. Found `{name} = {getattr(self, name)}`.")
        if not 0 < self.tau < math.inf:
            raise ValueError(f"Parameter `tau` must be positive and finite. Found `tau = {self.tau}`.")
        if not isinstance(self.seed, int):
            raise ValueError(f"Parameter `seed` must be an integer. Found `seed = {self.seed!r}`.")

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """λ(0), 1 unless ``initial_weights`` say otherwise; losses not seen yet are written as 0."""
        weights = initial_vector(tasks, initial_weights).clamp(min=FLOOR)
        zeros = torch.zeros_like(weights)
        return weights, {"weights": weights, "first": zeros, "last": zeros, "counter": torch.tensor(0)}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """λ(t) from λ(t−1), L(t), L(t−1) and L(0)."""
        L, active = statistics.losses, statistics.present & (statistics.losses > TINY)
        weights, first, last = state["weights"], state["first"], state["last"]
        ready = active & (first > 0)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, int(state["counter"])))
        rho = torch.rand((), generator=generator, dtype=torch.float64) < self.rho

        def balance(reference: Tensor) -> Tensor:  # λ̂(t; t')
            relative = L / (self.tau * reference)
            return share(weights, relative.where(ready, -math.inf).softmax(0), ready)

        history = weights if rho else balance(first)
        mixed = self.alpha * history + (1 - self.alpha) * balance(last)
        weights = torch.where(ready, mixed, weights)
        return weights, {
            "weights": weights,
            "first": torch.where(active & (first == 0), L, first),
            "last": torch.where(active, L, last),
            "counter": state["counter"] + 1,
        }
