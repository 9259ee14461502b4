"""What is read of a weighter, by the user, a tracker or a model card; no collective, and nothing changes."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from .audit import Audit
from .branch import Branch
from .rotations import Rotations, no_rotations
from .statistics import Method, Statistics
from .steps import Steps


class Readings:
    """The part of a weighter that is read."""

    tasks: tuple[str, ...]
    method: Method
    _steps: Steps
    _rotations: Rotations | None
    _branch: Branch
    _audit: Audit | None = None

    def __repr__(self) -> str:
        weights = ", ".join(f"{task}={weight:.4g}" for task, weight in self.weights.items())
        frozen = ", frozen" if self.frozen else ""
        return f"Weighter({self.method!r}, {weights}, step={self._steps.settled.step}{frozen})"

    @property
    def weights(self) -> dict[str, float]:
        """``{task: weight}``, those that the next backward will use."""
        return dict(zip(self.tasks, self._steps.settled.weights.tolist(), strict=True))

    @property
    def statistics(self) -> Statistics | None:
        """What the last window that was not held saw; None before the first."""
        return self._steps.settled.statistics

    @property
    def average_weights(self) -> dict[str, float]:
        """Weights averaged over the steps that were not wholly frozen, for a static retrain (GradNorm Static)."""
        return dict(zip(self.tasks, self._steps.settled.average_weights.tolist(), strict=True))

    @property
    def history(self) -> list[tuple[int, dict[str, float]]]:
        """Bounded record of ``(step, values)``, saved with the state; thinned past 4,096 entries."""
        return self._steps.settled.history.entries

    def log_values(self) -> dict[str, float]:
        """Floats for ``accelerator.log``: weights, and losses, norms and cosines of the last step. No collective."""
        state = self._steps.settled
        weights = {f"weight/{task}": weight for task, weight in self.weights.items()}
        return {**weights, **state.history.latest, "weighting/skipped_steps": float(state.total_skipped)}

    def describe(self) -> str:
        """One line for a model card or a tracker's configuration: the method, the tasks and their weights."""
        method: Any = self.method  # a dataclass
        chosen = [f for f in dataclasses.fields(method) if f.init and getattr(self.method, f.name) != f.default]
        settings = ", ".join(f"{f.name}={getattr(self.method, f.name)!r}" for f in chosen)
        weights = ", ".join(f"{task} {weight:.3g}" for task, weight in self.weights.items())
        when = f"after {self._steps.settled.step} optimizer steps" if self._steps.settled.step else "to begin with"
        frozen = ", frozen" if self._steps.settled.frozen else ""
        return f"losses weighted by {type(self.method).__name__}({settings}){frozen}; {when}: {weights}"

    @property
    def rotations(self) -> dict[str, Tensor]:
        """``{task: R_k}``, ``[m, m]`` each, those that the next forward will use.

        Raises:
            RuntimeError: The method does not rotate, or no forward has shown the width of z yet.
        """
        R = self._steps.settled.rotations
        if R is None:
            raise no_rotations(repr(self.method), self._rotations)
        return dict(zip(self.tasks, R.clone(), strict=True))

    @property
    def frozen(self) -> bool:
        """Whether the weights are held."""
        return self._steps.settled.frozen
