"""Closing a window: the one all-reduce, the verdict, the method's update; and the weights of this very step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .contexts import AS_IT_IS, full_precision
from .losses import Bounds
from .processes import Processes, Reduction
from .state import WeighterState
from .statistics import Method
from .verdict import Held, Verdict, too_many_held
from .window import Layout, Window


class Steps:
    """Takes a weighter's state from one optimizer step to the next.

    On a GPU the sums of a step come down while the next one runs; they are taken in at the state's next use.

    Args:
        method: The weighting method.
        state: What it carries from step to step.
        layout: The wire format of a window.
        processes: Over which a window is summed.
        verdict: Judges the sums.
        bounds: Of the losses.
        lag: 0 where the weights of a step come from that very step.
    """

    def __init__(
        self,
        method: Method,
        state: WeighterState,
        layout: Layout,
        processes: Processes,
        verdict: Verdict,
        bounds: Bounds,
        lag: int,
    ) -> None:
        self.layout = layout
        self._method, self._state, self._processes, self._verdict = method, state, processes, verdict
        self._bounds, self._lag = bounds, lag
        self._pending: tuple[Reduction, Window] | None = None

    @property
    def settled(self) -> WeighterState:
        """The state, with the last window taken in: the one door through which everything is read."""
        if self._pending is not None:
            self._settle()
        return self._state

    def forget(self) -> None:
        """Drops a window that was closed and not taken in yet."""
        self._pending = None

    def close(self, window: Window) -> None:
        """The end of an optimizer step.

        Raises:
            RuntimeError: The processes disagree, a gradient never came to the branch point, or too many steps in a row
                were held; on all processes.
            ValueError: Counts were mixed, or a loss is negative under a method that divides by it; likewise.
        """
        state = self.settled
        if window.moves_weights and (self._lag or not window.blocks):
            state.add_to_average()
        if window.blocks:
            self._pending = self._sum(window, self.layout, state.rotations), window
        else:
            state.record(state.step, None)
        state.step += 1
        if self._pending is not None and self._pending[0].ready is None:
            self._settle()

    def decide(
        self,
        losses: Tensor,
        present: frozenset[int],
        counts: Sequence[float] | None,
        gram: Tensor | None = None,
        arrived: frozenset[int] = frozenset(),
    ) -> NDArray[np.float64]:
        """Weights from this one micro-batch of all processes; the state moves on when the window closes."""
        layout = Layout(self.layout.tasks)
        window = Window(layout)
        window.record(losses, present, counts)
        if gram is not None:
            window.add("gradients", gram)
            window.arrived, window.split = set(arrived), bool(arrived) and arrived < present
        agreed, host, rest = self._sum(window, layout).wait()
        state = self._state
        self._verdict.check_agreement(agreed, state, state.step)
        found = self._verdict.judge(layout.unpack(host, rest, state.step), window)
        if isinstance(found, Held):  # and so will be the window
            return state.weights
        return self._method.weigh(state.method_state, self._bounds.above(found))

    def _sum(self, window: Window, layout: Layout, rotations: Tensor | None = None) -> Reduction:
        """Starts the all-reduce of what a window saw."""
        numbers, parts = window.pack()
        signature = self._verdict.signature(self._state)
        return self._processes.sum(numbers, parts, signature, layout.condense, self._state.step, rotations)

    def _settle(self) -> None:
        """Takes in the last window: the verdict, then the method's update."""
        assert self._pending is not None
        (reduction, window), self._pending = self._pending, None
        state, step = self._state, self._state.step - 1
        agreed, host, rest = reduction.wait()
        self._verdict.check_agreement(agreed, state, step)
        sums = self.layout.unpack(host, rest, step)
        found = self._verdict.judge(sums, window)
        state.extras = {f"loss/{name}": mean for name, mean in sums.extras.items() if math.isfinite(mean)}
        before = state.weights
        if isinstance(found, Held):
            state.hold(found.counts)
        else:
            # A state is asked for anywhere, in the autocast of a forward too, and what is kept must serve in training.
            training = torch.inference_mode(False) if torch.is_inference_mode_enabled() else AS_IT_IS
            with training, AS_IT_IS if state.rotations is None else full_precision(state.rotations):
                state.update(found, self._bounds.above(found))
        if not isinstance(found, Held):
            self._verdict.notice_update(found, state, before)
        if self._lag == 0:  # its own weights are those of the update that has just been
            state.add_to_average()
        state.record(step, None if isinstance(found, Held) else found)
        if isinstance(found, Held) and found.counts:
            held, limit = state.consecutive_skipped, self._verdict.max_skipped_steps
            if held > limit:
                raise too_many_held(found.message, held, limit)
