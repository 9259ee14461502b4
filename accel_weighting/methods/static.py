"""Weights that stay as they are: the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from accel_weighting.methods.algebra import Array
from accel_weighting.statistics import (
    InitialWeights,
    Method,
    State,
    Statistics,
    check_tasks,
    initial_vector,
    positive_by_task,
)


@dataclass(frozen=True)
class EqualWeighting(Method):
    """The plain sum of the losses: every weight is 1, or stays at the weighter's ``initial_weights``.

    Example:
        >>> EqualWeighting().init(["a", "b"])[0].tolist()
        [1.0, 1.0]
    """

    keeps_sum: ClassVar[bool] = True

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """The initial weights, 1 each by default."""
        w = initial_vector(tasks, initial_weights)
        return w, {"weights": w}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
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

    weights: Mapping[str, float] = positive_by_task(every=True)

    keeps_sum: ClassVar[bool] = True

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """The weights, in task order."""
        check_tasks(self, tasks)
        w = initial_vector(tasks, self.weights)
        if initial_weights is not None and not np.array_equal(initial_vector(tasks, initial_weights), w):
            raise ValueError("`StaticWeighting` has its own weights: give it none in `initial_weights`.")
        return w, {"fixed": w}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """The same weights."""
        return state["fixed"], state
