"""Weights that bring every gradient to a multiple of a reference task's: VQGAN's adaptive weight and its kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from accel_weighting.methods.algebra import FLOOR, Array, lerp
from accel_weighting.statistics import (
    InitialWeights,
    Method,
    State,
    Statistics,
    check_tasks,
    initial_vector,
    name,
    positive,
    positive_or_by_task,
    within,
)


@dataclass(frozen=True)
class ReferenceNorm(Method):
    """Every task's gradient at a multiple of the reference's: ``λ_k = ρ_k n_ref / (n_k + ε)``, ``λ_ref = 1``.

    With ``decay`` 0 it is the adaptive weight of VQGAN's discriminator (Esser et al., eq. 7: δ is ``eps``), clipped as
    in its code. With ``decay`` 0.9 it is the weighting by gradient norms of the guide to training PINNs (Wang et al.,
    Algorithm 1), ``λ_k ← d λ_k + (1 − d) λ̂_k``, where λ̂ is ``Σ_j n_j / n_k``: the same up to a factor common to all.
    Both take gradients of parameters: with ``shared_layer`` at the last layer they share, these are they.

    A task that is absent, or has a gradient of exactly 0 (an adversary that has not started), keeps its weight; where
    that is the reference, so do all. Weights lie within [1e-6, ``max_ratio``]: at 0 a task could not be observed.

    Args:
        reference: The task whose gradient is the measure; its weight is 1.
        ratios: ρ, one positive number, or ``{task: number}`` with 1 where not named.
        decay: d, in [0, 1).
        max_ratio: Largest weight.
        eps: ε, in units of the gradients.

    Raises:
        ValueError: A hyperparameter is out of range, or (in ``init``) a name is not a task's.

    Source: Esser et al., CVPR 2021, arXiv 2012.09841; Wang et al., An Expert's Guide to Training PINNs, arXiv
    2308.08468.

    Example:
        >>> method = ReferenceNorm("reconstruction", eps=0.0001)
        >>> weights, state = method.init(["reconstruction", "adversary"])
        >>> method.update(state, Statistics([1.0, 1.0], [True, True], norms=[2.0, 7.9999]))[0]
        array([1.  , 0.25])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"norms"})
    grows: ClassVar[bool] = True

    reference: str = name()
    ratios: float | Mapping[str, float] = positive_or_by_task(1.0)
    decay: float = within("[0, 1)", 0.0)
    max_ratio: float = positive(1e4)
    eps: float = positive(1e-4)

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Weights 1 unless ``initial_weights`` say otherwise; the reference's is 1."""
        check_tasks(self, tasks)
        given = self.ratios
        ratios = initial_vector(tasks, given) if isinstance(given, Mapping) else np.full(len(tasks), float(given))
        is_reference = np.array([task == self.reference for task in tasks])
        weights = np.where(is_reference, 1.0, initial_vector(tasks, initial_weights))
        return weights, {"weights": weights, "settings": np.stack([is_reference, ratios], 1)}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """``d λ_k + (1 − d) ρ_k n_ref / (n_k + ε)``, within its bounds."""
        w, n = state["weights"], statistics.norms
        is_reference, ratios = state["settings"][:, 0] > 0, state["settings"][:, 1]
        assert n is not None
        n_ref = float(n[is_reference][0])
        if n_ref > 0 and statistics.present[is_reference].all():
            new = np.minimum(np.maximum(ratios * n_ref / (n + self.eps), FLOOR), self.max_ratio)
            moving = statistics.present & (n > 0) & ~is_reference
            w = np.where(moving, lerp(w, new, 1 - self.decay), w)
        return w, {**state, "weights": w}
