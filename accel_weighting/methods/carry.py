"""Tasks that never share a window, compared all the same: a wrapper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from accel_weighting.methods.algebra import Array, Mask
from accel_weighting.methods.wrappers import _inner, _prefixed, _Wrapper
from accel_weighting.statistics import InitialWeights, Method, State, Statistics, count


@dataclass(frozen=True)
class CarryForward(_Wrapper):
    """A task's last loss and norm stand for it until the others have come: round robin over data sets works.

    Where a window holds one task, or some of them, a method has nothing to compare. Here it waits until every task
    was seen since its last update, and is then given the last loss and norm of each of them as if they were of one
    window: each value once, so that methods that follow how losses fall see them fall. A task that did not come for
    more than ``steps`` windows is neither waited for nor carried, and keeps its weight. Where all tasks are in each
    window, nothing changes.

    Inner products are known of tasks that were in one window. A method on the Gram matrix gets the last ones of every
    pair, and is refused where the pairs do not meet within ``steps`` windows. Cross products of features cannot be
    carried, so methods that rotate are refused. Other wrappers go around it or into it; ``Every``, which leaves
    windows out, only into it.

    Args:
        method: The method that is to compare the tasks.
        steps: For how many windows a task's last values stand for it.

    Raises:
        ValueError: ``steps`` is less than 1, or the method rotates, or is in a ``CarryForward`` already.
        RuntimeError: In ``update``: pairs of tasks of a method on the Gram matrix did not meet.

    Example:
        >>> from accel_weighting.methods.balancer import GradientBalancer
        >>> method = CarryForward(GradientBalancer())
        >>> w, state = method.init(["a", "b"])
        >>> w, state = method.update(state, Statistics([1.0, 0.0], [True, False], norms=[3.0, 0.0]))
        >>> w, state = method.update(state, Statistics([0.0, 1.0], [False, True], norms=[0.0, 1.0]))
        >>> w  # 2 / 3 and 2 / 1
        array([0.66666667, 2.        ])
    """

    steps: int = count(50)

    carries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        inside: Method = self.method
        while isinstance(inside, _Wrapper):
            if isinstance(inside, CarryForward):
                raise ValueError(f"Parameter `method` must not be in a `CarryForward` already. Found {self.method}.")
            inside = inside.method
        if "moments" in self.needs:
            raise ValueError(
                "Parameter `method` must not rotate: what it reads of two tasks is not there where they are not in "
                f"one window. Found `method = {self.method}`."
            )

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """The method's initial weights; every task is waited for."""
        w, state = super().init(tasks, initial_weights)
        K = len(tasks)
        state |= {"seen": np.zeros(K, np.bool_), "age": np.zeros(K, np.int64), "windows": np.asarray(0)}
        state |= {"losses": np.zeros(K), "norms": np.zeros(K)}
        if "gram" in self.needs:
            state |= {"gram.pairs": np.zeros((K, K)), "age.pairs": np.full((K, K), self.steps + 1)}
        return w, state

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """The method's update, once every task that is waited for has come."""
        state = self._noted(state, statistics)
        together = self._together(state, statistics)
        if together is None:
            return state["weights"], state
        w, inner = self.method.update(_inner(state), together)
        begun = {"seen": np.zeros_like(state["seen"]), "windows": np.asarray(0)}
        return w, state | begun | {"weights": w, "updates": np.asarray(state["updates"] + 1)} | _prefixed(inner)

    def weigh(self, state: State, statistics: Statistics) -> Array:
        """The method's weights for these statistics and what is carried, or those of its last update."""
        state = self._noted(state, statistics)
        together = self._together(state, statistics)
        return state["weights"] if together is None else self.method.weigh(_inner(state), together)

    def _noted(self, state: State, statistics: Statistics) -> State:
        """The state with the last values of the tasks that are present."""
        present = statistics.present
        new: State = {
            "seen": state["seen"] | present,
            "age": np.where(present, 0, state["age"] + 1),
            "windows": np.asarray(state["windows"] + 1),
            "losses": np.where(present, statistics.losses, state["losses"]),
        }
        if statistics.norms is not None:
            new["norms"] = np.where(present, statistics.norms, state["norms"])
        if "gram" in self.needs and statistics.gram is not None:
            met = present[:, None] & present
            new["gram.pairs"] = np.where(met, statistics.gram, state["gram.pairs"])
            new["age.pairs"] = np.where(met, 0, np.minimum(state["age.pairs"] + 1, self.steps + 1))
        return state | new

    def _together(self, state: State, statistics: Statistics) -> Statistics | None:
        """What stands for a window with all tasks, or None where one of them is still waited for."""
        seen: Mask = state["seen"]
        if not (seen | (state["age"] > self.steps)).all():
            return None
        gram = None
        if "gram" in self.needs:
            pairs = seen[:, None] & seen
            if self._waits_for_pairs(state, pairs):
                return None
            gram = statistics.gram if statistics.present[seen].all() else _possible(state["gram.pairs"] * pairs)
        norms = None if statistics.norms is None else np.where(seen, state["norms"], 0.0)
        losses = np.where(seen, state["losses"], 0.0)
        return replace(statistics, losses=losses, present=seen, norms=norms, gram=gram)

    def _waits_for_pairs(self, state: State, pairs: Mask) -> bool:
        """Whether pairs of tasks have not met yet, though some did.

        Raises:
            RuntimeError: None of them did, or some have had the time.
        """
        apart = pairs & (state["age.pairs"] > self.steps)
        if not apart.any():
            return False
        between = pairs & ~np.eye(len(pairs), dtype=np.bool_)
        if state["windows"] > self.steps or np.array_equal(apart, between):
            raise RuntimeError(
                f"{self.method} needs the inner products of the tasks' gradients, which are known of tasks that are "
                f"in one window, and {np.count_nonzero(apart) // 2} pairs of tasks were in none of the last "
                f"{self.steps}. Let a window hold several tasks (accumulate over the data sets, `with "
                "weighter.micro_batch():`), or use a method that compares losses or norms, such as GradNorm."
            )
        return True


def _possible(gram: Array) -> Array:
    """The nearest matrix that inner products can have: those of several windows need not fit together."""
    values, vectors = np.linalg.eigh(gram)
    if values[0] >= 0:
        return gram
    nearest: Array = (vectors * np.maximum(values, 0.0)) @ vectors.T
    return nearest
