"""CoV-weighting (Groenendijk et al. 2021): weights from the coefficients of variation of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from accel_weighting.methods.algebra import Array, LossMethod, lerp, reciprocal, share
from accel_weighting.statistics import InitialWeights, State, Statistics, count, initial_vector, within


@dataclass(frozen=True)
class CoVWeighting(LossMethod):
    """A loss that varies more, relative to its mean, is further from satisfied and weighs more.

    From Groenendijk et al. 2021, *Multi-Loss Weighting with Coefficient of Variations* (arXiv 2009.01717v2), equal to
    the authors' code in its full mode. At step t, with running means μ and standard deviations σ:

    - the loss ratio ``ℓ_i(t) = L_i(t) / μ_{L_i}(t−1)``, with ``ℓ_i(0) = 1``;
    - its coefficient of variation ``c_i = σ_{ℓ_i} / μ_{ℓ_i}``, with ``σ = sqrt(population variance + 1e-8)``;
    - the weight ``α_i = c_i / Σ_j c_j``, of the next step.

    Units of the losses do not matter. Every task has its own count: one that is absent, or that was seen less than
    ``warmup`` times, keeps its weight, and the others share what is left. A task counts from its first positive loss.
    With ``decay`` a loss of exactly 0 (a margin loss that all samples satisfy) is no observation, since a mean that
    tends to 0 would make ``c`` tend to infinity: μ and σ stay as they are, and ``c`` is multiplied by the share of
    the task's windows, within the memory, in which its loss was positive. So a loss that stays at 0 takes no weight.

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
        ...     w, state = method.update(state, Statistics(losses, present=[True, True]))
        >>> w
        array([0.13636386, 0.86363614])
    """

    decay: float | None = within("(0, 1)", None)
    warmup: int = count(2)
    total: Literal["one", "tasks"] = "one"

    keeps_sum: ClassVar[bool] = True
    memory: ClassVar[tuple[str, ...]] = ("loss_mean", "ratio_mean", "ratio_variance", "count")

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Equal weights, or the initial weights, with the sum that ``total`` says."""
        _, state = super().init(tasks)
        w = initial_vector(tasks, initial_weights)
        w = w * ((1 if self.total == "one" else len(tasks)) / w.sum())
        if self.decay is not None:
            state["positive"] = np.ones(len(tasks))
        return w, state | {"weights": w}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """Takes the losses of step t into the statistics; the weights of step t + 1."""
        w, mu_L, mu, v, t = (state[key] for key in ("weights", "loss_mean", "ratio_mean", "ratio_variance", "count"))
        L, first = statistics.losses, t == 0
        seen = counted = statistics.present & ~(first & (L <= 0))
        state = dict(state)
        if self.decay is not None:
            counted = seen & (L > 0)
            state["positive"] = np.where(seen, lerp(state["positive"], counted, 1 - self.decay), state["positive"])

        p = t / (t + 1) if self.decay is None else self.decay * np.minimum(t, 1)  # 0 at t = 0
        known = ~first & (mu_L > 0)  # a mean of zeros decays until it is 0 itself
        ratio = np.where(first, 1.0, L / np.where(known, mu_L, 1.0))
        delta = ratio - mu
        new = {
            "loss_mean": p * mu_L + (1 - p) * L,
            "ratio_mean": mu + (1 - p) * delta,
            "ratio_variance": p * (v + (1 - p) * (delta * delta)),  # Welford's, for any p
            "count": t + 1,
        }
        state |= {key: np.where(counted, value, state[key]) for key, value in new.items()}

        mu = state["ratio_mean"]
        c = np.sqrt(state["ratio_variance"] + 1e-8) * reciprocal(mu)
        if self.decay is not None:
            c *= state["positive"]
        state["weights"] = w = share(w, c, seen & (state["count"] >= self.warmup))
        return w, state
