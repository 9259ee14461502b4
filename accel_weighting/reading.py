"""What is read of a weighter, by the user, a tracker or a model card; no collective, and nothing changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from .audit import Audit
from .branch import Branch
from .history import tracker_names
from .optimizers import OptimizerWatch
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
    _optimizers: OptimizerWatch
    _audit: Audit | None = None

    def __repr__(self) -> str:
        weights = ", ".join(f"{task}={weight:.4g}" for task, weight in self.weights.items())
        frozen = ", frozen" if self.frozen else ""
        return f"Weighter({self.method}, {weights}, step={self._steps.settled.step}{frozen})"

    @property
    def weights(self) -> dict[str, float]:
        """``{task: weight}``, those that the next backward will use; in a closure that runs again, this step's."""
        state = self._steps.settled
        weights = state.applied if self._optimizers.next_repeats else state.weights
        return dict(zip(self.tasks, weights.tolist(), strict=True))

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
        """Floats for ``accelerator.log``: weights, and losses, norms and cosines of the last step. No collective.

        Names are those of the tasks, in ASCII and without what some tracker refuses: ``loss/naïve`` is ``loss/naive``.
        ``weighting/skipped_steps`` counts the steps whose weights were held, ``weighting/limited_steps`` those in which
        ``max_growth`` acted.
        """
        state = self._steps.settled
        weights = {f"weight/{task}": weight for task, weight in self.weights.items()}
        counts = {"weighting/skipped_steps": float(state.total_skipped)}
        if state.growth is not None:
            counts["weighting/limited_steps"] = float(state.growth.limited_steps)
        if state.healed:
            counts["weighting/healed_steps"] = float(state.healed)
        values = {**weights, **state.history.latest, **state.extras, **counts}
        names = tracker_names((*state.history.names, *(f"loss/{name}" for name in self._steps.layout.extras)))
        return {names.get(name, name): value for name, value in values.items()}

    def describe(self) -> str:
        """One line for a model card or a tracker's configuration: the method, the tasks and their weights."""
        weights = ", ".join(f"{task} {weight:.3g}" for task, weight in self.weights.items())
        when = f"after {self._steps.settled.step} optimizer steps" if self._steps.settled.step else "to begin with"
        frozen = ", frozen" if self._steps.settled.frozen else ""
        return f"losses weighted by {self.method}{frozen}; {when}: {weights}"

    def summary(self) -> str:
        """A printable table: every task in the first window and in the last, and what the audit found.

        What a task's head reads, its loss, the norm of its gradient at the branch point, the cosine of that with the
        sum of the others, its weight, and the weights at which all gradients would be of one length. No collective.
        """
        state = self._steps.settled
        rows = [values for _, values in state.history.entries] + [state.history.latest]
        rows = [row for row in rows if any(name.startswith("loss/") for name in row)]
        heads, reads = self._branch.heads, self._branch.reads
        parameters = self._branch.parameters
        where = "branch" if parameters is None else ", ".join(parameters.labels)
        labels = [where if reads or parameters else "-"] * len(self.tasks) if heads is None else heads.labels
        table = [["task", "head", "reads", "loss", "gradient norm", "cosine to the rest", "weight"]]
        for k, task in enumerate(self.tasks):
            read = reads.get(k, ()) if parameters is None else parameters.shapes
            shapes = " ".join(str(list(shape)) for shape in read)
            table.append([task, labels[k], shapes or "-"])
            values = [_of_task(row, task, self.tasks) for row in (rows[:1] + rows[-1:])]
            table[-1] += [" → ".join(dict.fromkeys(map(_short, pair))) for pair in zip(*values, strict=True)]
            if not values:
                table[-1] += ["-", "-", "-", _short(self.weights[task])]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([self.describe(), *lines, *self._equal(rows), *self._audited()])

    def _equal(self, rows: Sequence[Mapping[str, float]]) -> list[str]:
        norms = [rows[-1].get(f"grad_norm/{task}", 0.0) for task in self.tasks] if rows else [0.0]
        if not all(norm > 0 for norm in norms):
            return []
        scale = len(norms) / sum(1 / norm for norm in norms)
        weights = ", ".join(f"{task} {scale / norm:.3g}" for task, norm in zip(self.tasks, norms, strict=True))
        return [f"weights at which all gradients would have the same length: {weights}"]

    def _audited(self) -> list[str]:
        if self._audit is None:
            return ["audit: none, since the method reads losses only"]
        if self._audit.findings is None:
            return ["audit: follows with the first losses"]
        well = ["every loss reaches the shared part through its own alias alone"]
        return [f"audit: {line}" for line in self._audit.findings.lines() or well]

    @property
    def rotations(self) -> dict[str, Tensor]:
        """``{task: R_k}``, ``[m, m]`` each, those that the next forward will use; see ``weights`` for closures.

        Raises:
            RuntimeError: The method does not rotate, or no forward has shown the width of z yet.
        """
        state = self._steps.settled
        R = state.applied_rotations if self._optimizers.next_repeats else None
        if R is None:
            R = state.rotations
        if R is None:
            raise no_rotations(str(self.method), self._rotations)
        return dict(zip(self.tasks, R.clone(), strict=True))

    @property
    def frozen(self) -> bool:
        """Whether the weights are held."""
        return self._steps.settled.frozen


def _of_task(row: Mapping[str, float], task: str, tasks: Sequence[str]) -> list[float]:
    """Its loss, gradient norm, cosine to the sum of the others, and weight in one row of the history; NaN: not seen."""
    norm = row.get(f"grad_norm/{task}", math.nan)
    return [row.get(f"loss/{task}", math.nan), norm, _cosine(row, task, tasks), row.get(f"weight/{task}", math.nan)]


def _cosine(row: Mapping[str, float], task: str, tasks: Sequence[str]) -> float:
    """Of a task's gradient with the sum of the others, from norms and cosines of pairs."""
    others = [other for other in tasks if row.get(f"grad_norm/{other}", 0.0) > 0 and other != task]

    def pair(a: str, b: str) -> float:
        return 1.0 if a == b else row.get(f"cosine/{a}/{b}", row.get(f"cosine/{b}/{a}", math.nan))

    norms = [row[f"grad_norm/{other}"] for other in others]
    along = sum(n * pair(task, other) for n, other in zip(norms, others, strict=True))
    square = sum(
        n * m * pair(a, b) for n, a in zip(norms, others, strict=True) for m, b in zip(norms, others, strict=True)
    )
    return along / math.sqrt(square) if square > 0 else math.nan


def _short(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.3g}"
