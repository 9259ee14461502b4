"""What the optimizers of this process do: whether one has stepped since, and whether one is stepping right now.

A window is what lies between two optimizer steps. Where a loop accumulates by hand, nothing but this shows it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

PATIENCE = 20
"""Windows without an optimizer step and without left gradients after which it is not looked for any more."""


class _Steps:
    """Counts the steps of all torch optimizers of the process."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def before(self, *_: Any) -> None:
        self.begun += 1

    def after(self, *_: Any) -> None:
        self.ended += 1


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
    """

    def __init__(self) -> None:
        self.paused = False
        self._steps = _steps()
        self._built_at = self._steps.begun
        self._opened_at: int | None = None  # optimizer steps begun when the last window was opened
        self._unstepped = 0

    @property
    def repeats(self) -> bool:
        """Whether this pass leaves no trace: it was said, or an optimizer runs its closure again in the same step."""
        running = self._steps.begun > self._steps.ended
        return self.paused or (running and self._opened_at == self._steps.begun)

    def opens(self, losses: Iterable[Tensor], prepared: bool) -> bool:
        """A window opens; whether the gradients of the last one are still waiting for an optimizer.

        Args:
            losses: Those of its first micro-batch.
            prepared: Whether an optimizer is known to be there though none has stepped yet.
        """
        stepped = self._opened_at is None or self._steps.begun > self._opened_at
        used = prepared or self._steps.begun > self._built_at
        self._opened_at = self._steps.begun
        if stepped or not used:
            self._unstepped = 0
            return False
        if self._unstepped >= PATIENCE:
            return False
        self._unstepped += 1
        return _hold_gradients(losses)

    @property
    def never_steps(self) -> bool:
        """Whether so many windows in a row had no optimizer step, though their gradients were taken away."""
        return self._unstepped == PATIENCE


def _hold_gradients(losses: Iterable[Tensor]) -> bool:
    """Whether parameters of these losses hold gradients: finite ones (a skipped step's are not), and not only zeros."""
    found = False
    for parameter in _parameters(losses):
        gradient = parameter.grad
        if gradient is None:
            continue
        total = float(gradient.detach().abs().sum())
        if total != total or total == float("inf"):
            return False
        found |= total > 0
    return found


def _parameters(losses: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves of the losses' graph."""
    nodes = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen: set[Any] = set(nodes)
    while nodes:
        node: Any = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
