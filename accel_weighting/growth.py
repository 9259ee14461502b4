"""How far a weight may rise from one window to the next, for methods whose weights have no upper bound of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, tensor

from .statistics import Method, Statistics

MEMORY = 20
"""The number of windows that the running mean remembers."""

HEAD_START = 5
"""The first window counts as this many."""

DEEPEST = math.log(16)
"""The memory takes a weight to be at most this far below the mean, in logarithms."""

Vector = NDArray[np.float64]


class Growth:
    """Bounds weights by ``factor`` times the running geometric mean of the |weights| that were applied.

    With ``lag=1`` a weight like 1/norm from a window where a task was nearly silent would multiply an ordinary gradient
    by hundreds. What is taken into the mean m is what was *applied*, at a rate r of 1/20, so s windows of silence raise
    a weight to ``factor^(1 + (s − 1) r)`` times its ordinary value at most: 2.4 times after 6 windows and 3.9 after 20.
    In the first windows, where r is 1/6, 1/7, … so that the mean soon forgets a start that was none, the same sums are
    3.2 and 5.7, whenever the silence falls; and the first update is not bounded at all, so nothing is slowed that goes
    from initial weights to the method's own. A weight of 0 is not taken in, and one far below the mean only as 1/16 of
    it, so that neither is a lasting ban: after six such windows the bound is still about the ordinary weight.

    Each weight is bounded by itself, and the others stay the method's own: they are within their bounds, and to scale
    them up instead would take all beyond. So weights that keep a sum (IMTL-G's) miss it in the windows in
    which the bound acts, by what is cut off.

    The mean goes on through absences with the weight that stands, which is why an adversary that starts late is bounded
    by its initial weight. A task that is silent or absent while its weight is at the bound keeps it.

    Args:
        rows: K; 2K where a method has weights on losses that grow too.
        factor: ``max_growth``.

    Attributes:
        factor: ``max_growth``.
        limited_steps: Updates in which the bound acted.
    """

    def __init__(self, rows: int, factor: float) -> None:
        self.factor = factor
        self._begin(rows)

    def _begin(self, rows: int) -> None:
        self._log_mean = np.zeros(rows)
        self._count = np.zeros(rows)
        self._limited = np.zeros(rows, np.bool_)
        self.limited_steps = 0

    def bound(self, weights: Vector, before: Vector, statistics: Statistics) -> Vector:
        """The weights to apply where the method answers ``weights``: the same array unless the bound acts.

        Args:
            weights: The method's answer to this window, ``[K]``; or ``[2K]``, where weights on losses come after them.
            before: What was applied until now, of the same shape.
            statistics: The window.
        """
        size, applied = np.abs(weights), weights
        present, silent = statistics.present, ~statistics.present
        if statistics.norms is not None:
            silent = silent | (statistics.norms == 0)
        if len(weights) > len(present):
            present, silent = np.tile(present, 2), np.tile(silent, 2)
        highest = np.where(self._count > 0, self.factor * np.exp(self._log_mean), np.inf)
        over = (size > highest) & present
        held = self._limited & silent & (size > np.abs(before))
        limited = over | held
        if np.count_nonzero(limited):
            applied = np.where(held, before, np.where(over, np.copysign(highest, weights), weights))
            size = np.abs(applied)
            self.limited_steps += 1
        self._limited = limited
        self._take_in(size)
        return applied

    def _take_in(self, size: Vector) -> None:
        count, known = self._count, size > 0
        log = np.log(np.where(known, size, 1.0))
        distance = np.maximum(log - self._log_mean, -DEEPEST)
        moved = np.where(count > 0, self._log_mean + distance / np.minimum(count + HEAD_START, MEMORY), log)
        self._log_mean = np.where(known, moved, self._log_mean)
        self._count = count + known

    # ---- other processes ---------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """Everything that determines the next bound."""
        return {"log_mean": self._log_mean, "count": self._count, "limited": self._limited}

    def adopt(self, snapshot: Mapping[str, NDArray[Any]]) -> None:
        """Takes over the snapshot of another process."""
        self._log_mean, self._count, self._limited = (snapshot[n].copy() for n in ("log_mean", "count", "limited"))

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def digest(self) -> bytes:
        """The bytes of everything that determines the next bound."""
        return self._log_mean.tobytes() + self._count.tobytes() + self._limited.tobytes()

    def state_dict(self) -> dict[str, Any]:
        """The state as plain tensors, for a checkpoint."""
        rows = {"log_mean": self._log_mean, "count": self._count, "limited": self._limited}
        return {**{name: tensor(value) for name, value in rows.items()}, "limited_steps": self.limited_steps}

    def load_state_dict(self, saved: Mapping[str, Any] | None, rows: Sequence[int | None]) -> None:
        """Takes up the ``rows`` of what was saved; what is not there begins with the next update."""
        self._begin(len(rows))
        if saved is None:
            return
        known = [(k, row) for k, row in enumerate(rows) if row is not None]
        for k, row in known:
            self._log_mean[k], self._count[k] = _entry(saved["log_mean"], row), _entry(saved["count"], row)
            self._limited[k] = bool(_entry(saved["limited"], row))
        self.limited_steps = int(saved["limited_steps"])


def growth_of(method: Method, tasks: Sequence[str], factor: float | None, lag: int) -> Growth | None:
    """The bound on a method's weights, where it needs one."""
    if factor is None or not method.grows or lag == 0:
        return None
    return Growth(len(tasks) * (1 + method.loss_weights_grow), factor)


def _entry(values: Tensor, row: int) -> float:
    return float(values[row])
