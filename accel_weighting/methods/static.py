"""Weights that stay as they are: the baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from accel_weighting.statistics import Method, State, Statistics, initial_vector


@dataclass(frozen=True)
class EqualWeighting(Method):
    """The plain sum of the losses: every weight is 1, or stays at the weighter's ``initial_weights``.

    Example:
        >>> EqualWeighting().init(["a", "b"])[0].tolist()
        [1.0, 1.0]
    """

    keeps_sum: ClassVar[bool] = True

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The initial weights, 1 each by default."""
        w = initial_vector(tasks, initial_weights)
        return w, {"weights": w}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """The same weights."""
        return state["weights"], state


@dataclass(frozen=True)
class StaticWeighting(Method):
    """Fixed weights, one for each task.

    They are the initial weights as well.

    Args:
        weights: ``{task: weight}``, positive and finite; names all tasks of the weighter and no other.

    Raises:
        ValueError: A weight is not positive and finite, or (in ``init``) the names are not those of the tasks, or there
            are other initial weights.

    Example:
        >>> StaticWeighting({"b": 0.5, "a": 2}).init(["a", "b"])[0].tolist()
        [2.0, 0.5]
    """

    weights: Mapping[str, float] = field(hash=False)  # dictionaries do not hash; equality still compares them

    keeps_sum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", {task: float(weight) for task, weight in sorted(self.weights.items())})
        wrong = {task: weight for task, weight in self.weights.items() if not (0 < weight < math.inf)}
        if wrong:
            raise ValueError(f"Parameter `weights` must hold positive finite numbers. Found `{wrong}`.")

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The weights, in task order."""
        missing, unknown = [t for t in tasks if t not in self.weights], [t for t in self.weights if t not in tasks]
        if missing or unknown:
            raise ValueError(
                "Parameter `weights` must name every task and no other. "
                f"Found missing names `{missing}`, unknown names `{unknown}`; the tasks are `{list(tasks)}`."
            )
        w = initial_vector(tasks, self.weights)
        if initial_weights is not None and not torch.equal(initial_vector(tasks, initial_weights), w):
            raise ValueError("`StaticWeighting` has its own weights: give it none in `initial_weights`.")
        return w, {"fixed": w}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """The same weights."""
        return state["fixed"], state
