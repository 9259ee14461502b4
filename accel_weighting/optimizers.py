"""What the optimizers of this process do: whether one has stepped since, and whether one is stepping right now.

A window is what lies between two optimizer steps. Where a loop accumulates by hand, nothing but this shows it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

PATIENCE = 20
"""The number of windows without an optimizer step and without gradients left after which optimizers are no longer
watched, and the number of optimizer steps with two windows each after which a warning is given."""


class _Steps:
    """Counts the steps of all torch optimizers of the process."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def before(self, *_: Any) -> None:
        self.begun += 1

    def after(self, *_: Any) -> None:
        self.ended += 1

    @property
    def running(self) -> bool:
        """Whether this code is called by an optimizer's step, as a closure is."""
        if self.begun <= self.ended:
            return False
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "step" and isinstance(frame.f_locals.get("self"), Optimizer):
                return True
            frame = frame.f_back  # type: ignore[assignment]
        self.ended = self.begun  # a step ended in an exception
        return False


@functools.cache
def _steps() -> _Steps:
    steps = _Steps()
    register_optimizer_step_pre_hook(steps.before)
    register_optimizer_step_post_hook(steps.after)
    return steps


class OptimizerWatch:
    """Compares one weighter's passes with the steps of optimizers.

    Attributes:
        paused: Whether the user said that passes leave no trace.
        never_steps: Whether so many windows in a row had no optimizer step, though their gradients were taken away.
        doubles: Whether so many optimizer steps in a row had two windows, the first of whose gradients were taken away.
    """

    def __init__(self) -> None:
        self.paused = self.never_steps = self.doubles = False
        self._steps = _steps()
        self._built_at = self._steps.begun
        self._opened_at: int | None = None  # optimizer steps begun when the last window was opened
        self._in_step = False  # and whether that was inside one
        self._repeated = False
        self._unstepped = self._doubled = 0

    @property
    def repeats(self) -> bool:
        """Whether the pass that is going on leaves no trace."""
        return self.paused or (self._repeated and self._steps.running)

    @property
    def next_repeats(self) -> bool:
        """Whether a pass that begins now leaves no trace: it was said, or it is a further one of an optimizer step.

        That is, of a closure that runs again, or that runs though the pass of this step came before it.
        """
        return self.paused or self._is_in_the_same_step

    def begins(self) -> bool:
        """A pass begins; whether it leaves no trace."""
        self._repeated = self._is_in_the_same_step
        return self.repeats

    @property
    def _is_in_the_same_step(self) -> bool:
        last = self._steps.begun - (not self._in_step)
        return self._opened_at == last and self._steps.running

    def opens(self, prepared: bool) -> bool:
        """A window opens; whether the gradients of the last one may be waiting for an optimizer still.

        Args:
            prepared: Whether an optimizer is known to be there though none has stepped yet.
        """
        running = self._steps.running
        stepped = self._opened_at is None or self._steps.begun > self._opened_at or (self._in_step and not running)
        used = prepared or self._steps.begun > self._built_at
        self._opened_at, self._in_step = self._steps.begun, running
        if stepped:
            self._doubled = self._doubled + 1 if self._unstepped else 0
            self.doubles = self._doubled == PATIENCE
        if stepped or not used:
            self._unstepped, self.never_steps = 0, False
            return False
        self._unstepped += 1
        self.never_steps = self._unstepped == PATIENCE
        return self._unstepped < PATIENCE


def hold_gradients(graph: Iterable[Any], prepared: Iterable[Any]) -> bool:
    """Whether parameters of this graph hold gradients: finite ones (a skipped step's are not), and not only zeros.

    Args:
        graph: Nodes of autograd's graph from which on it is walked.
        prepared: Optimizers whose parameters are looked at too: those of an engine that shards are no leaves.
    """
    groups = [group for optimizer in prepared for group in optimizer.param_groups]
    sharded = [parameter for group in groups for parameter in group["params"]]
    found = False
    for parameter in [*_parameters(graph), *sharded]:
        gradient = parameter.grad
        if gradient is None:
            continue
        gradient = getattr(gradient, "_local_tensor", gradient)  # of a DTensor, without a collective
        total = float(gradient.detach().abs().sum())
        if total != total or total == float("inf"):
            return False
        found |= total > 0
    return found


def _parameters(graph: Iterable[Any]) -> Iterator[Tensor]:
    """The leaves of a graph."""
    nodes = [node for node in graph if node is not None]
    seen: set[Any] = set(nodes)
    while nodes:
        node: Any = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
