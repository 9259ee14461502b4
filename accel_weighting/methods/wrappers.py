"""Wrappers around any method: smoother, bounded, later or rarer weights. They nest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from accel_weighting.methods.algebra import FLOOR, Array, Mask, share
from accel_weighting.statistics import (
    InitialWeights,
    Method,
    State,
    Statistics,
    count,
    non_negative,
    positive,
    within,
)

INNER = "inner."


def _inner(state: State) -> State:
    return {key.removeprefix(INNER): value for key, value in state.items() if key.startswith(INNER)}


def _prefixed(state: State) -> State:
    return {INNER + key: value for key, value in state.items()}


@dataclass(frozen=True)
class _Wrapper(Method):
    """Presents the same interface as the wrapped method; keeps its own weights, a count, and the inner state."""

    method: Method

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.method.needs

    @property
    def positive_losses(self) -> bool:  # type: ignore[override]
        return self.method.positive_losses

    @property
    def acts_on(self) -> Any:  # type: ignore[override]
        return self.method.acts_on

    @property
    def keeps_sum(self) -> bool:  # type: ignore[override]
        return self.method.keeps_sum

    @property
    def grows(self) -> bool:  # type: ignore[override]
        return self.method.grows

    @property
    def loss_weights_grow(self) -> bool:  # type: ignore[override]
        return self.method.loss_weights_grow

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self.method.dim

    @property
    def size(self) -> int | None:  # type: ignore[override]
        return self.method.size

    @property
    def cooperative(self) -> bool:  # type: ignore[override]
        return self.method.cooperative

    def __getattr__(self, name: str) -> Any:
        """What else the inner method offers; its functions (``widen``) take the state first, and get their part."""
        if name.startswith("_") or name == "method":  # copies ask before there is a method
            raise AttributeError(name)
        value = getattr(self.method, name)
        if not callable(value):
            return value

        def forwarded(state: State, *args: Any, **kwargs: Any) -> Any:
            result = value(_inner(state), *args, **kwargs)
            return state | _prefixed(result) if isinstance(result, dict) else result

        return forwarded

    def measures(self, tasks: Sequence[str]) -> Sequence[str]:
        """Those whose gradients the method needs."""
        return self.method.measures(tasks)

    def settled(self, state: State) -> bool:
        """Whether the method's are."""
        return self.method.settled(_inner(state))

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """The method's initial weights."""
        w, inner = self.method.init(tasks, initial_weights)
        return w, {"weights": w, "updates": np.asarray(0)} | _prefixed(inner)

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """The method's update, and its weights as this wrapper changes them."""
        w, inner = self.method.update(_inner(state), statistics)
        w = self._changed(state, w, self._moving(statistics))
        return w, {"weights": w, "updates": np.asarray(state["updates"] + 1)} | _prefixed(inner)

    def weigh(self, state: State, statistics: Statistics) -> Array:
        """The method's weights for these very statistics, as this wrapper changes them."""
        return self._changed(state, self.method.weigh(_inner(state), statistics), self._moving(statistics))

    @property
    def carries(self) -> bool:
        """Whether the weights of absent tasks move too."""
        return bool(getattr(self.method, "carries", False))

    def _moving(self, statistics: Statistics) -> Mask:
        """The tasks whose weights may have moved."""
        return np.ones_like(statistics.present) if self.carries else statistics.present

    def _changed(self, state: State, w: Array, present: Mask) -> Array:
        """The method's new weights ``w`` of the ``present``, changed; ``state`` is the one before the update."""
        raise NotImplementedError

    def _keep_absent(self, old: Array, new: Array, present: Mask) -> Array:
        """Absent tasks keep the weight they had *here*, which need not be the inner method's."""
        if present.all():
            return new
        return share(old, new, present) if self.keeps_sum else np.where(present, new, old)


@dataclass(frozen=True)
class Smooth(_Wrapper):
    """Exponential moving average of the weights: ``w ← decay · w + (1 − decay) · (the method's w)``.

    Args:
        method: The method to smooth.
        decay: In [0, 1); 0 changes nothing.

    Raises:
        ValueError: ``decay`` is out of range.

    Example:
        >>> from accel_weighting.methods.gradnorm import GradNorm
        >>> Smooth(GradNorm(alpha=0.0), decay=0.9).needs
        frozenset({'norms'})
    """

    decay: float = within("[0, 1)")

    def _changed(self, state: State, w: Array, present: Mask) -> Array:
        old = state["weights"]
        return self._keep_absent(old, self.decay * old + (1 - self.decay) * w, present)


@dataclass(frozen=True)
class Clamp(_Wrapper):
    """Weights between two bounds, with the sum the method gave them: ``clip(λ w, low, high)``, λ solved exactly.

    The unclipped tasks share what clipping takes or adds, and keep their ratios. Where no λ gives the sum (a method
    that keeps none), all weights stand at one bound.

    Args:
        method: The method to bound.
        low: Smallest weight, at least 0.
        high: Largest weight, more than ``low``.

    Raises:
        ValueError: The bounds are out of order, or (in ``init``) cannot hold for the sum of the initial weights.

    Example:
        >>> from accel_weighting.methods.static import StaticWeighting
        >>> Clamp(StaticWeighting({"a": 0.1, "b": 0.9, "c": 2.0}), 0.5, 1.5).init(["a", "b", "c"])[0].tolist()
        [0.5, 1.0, 1.5]
    """

    low: float = non_negative()
    high: float = positive()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise ValueError(
                f"Parameter `low` must be less than `high`. Found `low = {self.low!r}`, `high = {self.high!r}`."
            )

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """The method's initial weights, clipped."""
        w, state = super().init(tasks, initial_weights)
        mean = float(w.mean())
        if not self.low * (1 - 1e-9) <= mean <= self.high * (1 + 1e-9):
            raise ValueError(
                "Parameters `low` and `high` must enclose the mean of the initial weights, or their sum "
                f"cannot be kept. Found `low = {self.low!r}`, `high = {self.high!r}`, a mean of `{mean:.6g}`."
            )
        state["weights"] = self._clip(w)
        return state["weights"], state

    def _changed(self, state: State, w: Array, present: Mask) -> Array:
        w = self._keep_absent(state["weights"], w, present).copy()
        w[present] = self._clip(w[present])
        return w

    def _clip(self, w: Array) -> Array:
        x, total, free = np.maximum(w, FLOOR), w.sum(), np.ones(len(w), np.bool_)
        while free.any():  # every round but the last clips a task for good
            x[free] *= (total - x[~free].sum()) / x[free].sum()
            over, under = np.maximum(x - self.high, 0), np.maximum(self.low - x, 0)
            if not (over + under).any():
                break
            # The larger excess says which way λ has to move, and so which tasks are clipped for good.
            clipped, bound = (over > 0, self.high) if over.sum() >= under.sum() else (under > 0, self.low)
            x[clipped] = bound
            free &= ~clipped
        return x


@dataclass(frozen=True)
class Warmup(_Wrapper):
    """The initial weights for the first updates, while the method already sees the statistics.

    Args:
        method: The method to delay.
        steps: Updates that return the initial weights; 0 changes nothing.

    Raises:
        ValueError: ``steps`` is negative.

    Example:
        >>> from accel_weighting.methods.gradnorm import GradNorm
        >>> Warmup(GradNorm(), steps=500).init(["a", "b"])[0].tolist()
        [1.0, 1.0]
    """

    steps: int = count(least=0)

    def settled(self, state: State) -> bool:
        """Not while the initial weights are held."""
        return int(state["updates"]) > self.steps and super().settled(state)

    def _changed(self, state: State, w: Array, present: Mask) -> Array:
        old = state["weights"]
        return old if state["updates"] < self.steps else self._keep_absent(old, w, present)


@dataclass(frozen=True)
class Every(_Wrapper):
    """Updates the method at every ``steps``-th window only, the first one included; between, its weights stay.

    The weighter's ``update_every`` does the same and spares the statistics too; this one nests in other wrappers.

    Args:
        method: The method to slow down.
        steps: Windows from one update of the method to the next; 1 changes nothing.

    Raises:
        ValueError: ``steps`` is less than 1.

    Example:
        >>> from accel_weighting.methods.cov import CoVWeighting
        >>> Every(CoVWeighting(), steps=10).needs
        frozenset({'losses'})
    """

    steps: int = count()

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """The method's update, or none."""
        if state["updates"] % self.steps:
            return state["weights"], state | {"updates": np.asarray(state["updates"] + 1)}
        return super().update(state, statistics)

    def weigh(self, state: State, statistics: Statistics) -> Array:
        """The method's weights for these very statistics, or those of its last update."""
        return state["weights"] if state["updates"] % self.steps else super().weigh(state, statistics)

    def _changed(self, state: State, w: Array, present: Mask) -> Array:
        return w
