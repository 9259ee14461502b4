"""CoV-weighting (Groenendijk et al. 2021): weights from the coefficients of variation of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from accel_weighting.methods.algebra import share
from accel_weighting.statistics import Method, State, Statistics, initial_vector


@dataclass(frozen=True)
class CoVWeighting(Method):
    """A loss that varies more, relative to its mean, is further from satisfied and weighs more.

    From Groenendijk et al. 2021, *Multi-Loss Weighting with Coefficient of Variations* (arXiv 2009.01717v2), equal to
    the authors' code in its full mode. At step t, with running means μ and standard deviations σ:

    - the loss ratio ``ℓ_i(t) = L_i(t) / μ_{L_i}(t−1)``, with ``ℓ_i(0) = 1``;
    - its coefficient of variation ``c_i = σ_{ℓ_i} / μ_{ℓ_i}``, with ``σ = sqrt(population variance + 1e-8)``;
    - the weight ``α_i = c_i / Σ_j c_j``, of the next step.

    Units of the losses do not matter. Every task has its own count: one that is absent, or that was seen less than
    ``warmup`` times, keeps its weight, and the others share what is left. A task counts from its first positive loss.

    Args:
        decay: None: all steps count alike. A number p in (0, 1): exponentially weighted mean and variance,
            ``μ' = p μ + (1 − p) ℓ`` and ``v' = p (v + (1 − p) (ℓ − μ)²)``. (The authors' decay mode weighs only the
            means so, not the variance.)
        warmup: Observations of a task before its weight moves; until then weights are equal, or the initial weights.
        total: The sum of the weights: ``"one"`` as in the paper, where K losses train at 1/K of the learning rate
            that a plain sum has; ``"tasks"``: K.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> method = CoVWeighting()
        >>> w, state = method.init(["a", "b"])
        >>> for losses in ([1.0, 20.0], [0.9, 10.0]):
        ...     w, state = method.update(state, Statistics(torch.tensor(losses).double(), torch.ones(2).bool()))
        >>> w
        tensor([0.1364, 0.8636], dtype=torch.float64)
    """

    decay: float | None = None
    warmup: int = 2
    total: Literal["one", "tasks"] = "one"

    needs: ClassVar[frozenset[str]] = frozenset({"losses"})
    positive_losses: ClassVar[bool] = True
    keeps_sum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for valid, name, rule in (
            (self.decay is None or 0 < self.decay < 1, "decay", "be None or lie strictly between 0 and 1"),
            (self.warmup >= 1, "warmup", "be at least 1"),
            (self.total in ("one", "tasks"), "total", "be 'one' or 'tasks'"),
        ):
            if not valid:
                raise ValueError(f"Parameter `{name}` must {rule}. Found `{name} = {getattr(self, name)!r}`.")

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Equal weights, or the initial weights, with the sum that ``total`` says."""
        w = initial_vector(tasks, initial_weights)
        w = w * ((1 if self.total == "one" else len(tasks)) / w.sum())
        zero = torch.zeros_like(w)
        return w, {"weights": w, "loss_mean": zero, "ratio_mean": zero, "ratio_variance": zero, "count": zero}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """Takes the losses of step t into the statistics; the weights of step t + 1."""
        w, mu_L, mu, v, t = (state[key] for key in ("weights", "loss_mean", "ratio_mean", "ratio_variance", "count"))
        L, first = statistics.losses, t == 0
        seen = statistics.present & ~(first & (L <= 0))

        p = t / (t + 1) if self.decay is None else self.decay * t.clamp(max=1)  # 0 at t = 0
        ratio = torch.where(first, 1.0, L / mu_L)
        delta = ratio - mu
        new = {
            "loss_mean": p * mu_L + (1 - p) * L,
            "ratio_mean": mu + (1 - p) * delta,
            "ratio_variance": p * (v + (1 - p) * delta**2),  # Welford's, for any p
            "count": t + 1,
        }
        state = state | {key: torch.where(seen, value, state[key]) for key, value in new.items()}

        c = (state["ratio_variance"] + 1e-8).sqrt() / state["ratio_mean"]
        state["weights"] = share(w, c, seen & (state["count"] >= self.warmup))
        return state["weights"], state
