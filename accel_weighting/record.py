"""What is kept for people: the bounded history, and running means and coefficients of variation of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .statistics import Statistics

CAPACITY = 4096
"""Entries of the history; past it every second one goes, and from then on every second step is kept."""

GROUPS = ("weight", "loss", "loss_cov", "grad_norm")


class Record:
    """Values of every step, bounded, and the running statistics of the losses.

    Args:
        tasks: Task names.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        K = len(self.tasks)
        self.stride = 1
        self._steps: list[int] = []
        self._rows: list[Tensor] = []
        self._count = torch.zeros(K, dtype=torch.float64)
        self._mean = torch.zeros(K, dtype=torch.float64)
        self._squares = torch.zeros(K, dtype=torch.float64)  # Welford's sum of squared deviations
        self._pairs = tuple(torch.triu_indices(K, K, 1))
        self._no_cosines = torch.full((K * (K - 1) // 2,), torch.nan, dtype=torch.float64)
        self.latest: Tensor = torch.full((len(self.names),), torch.nan, dtype=torch.float64)

    @property
    def names(self) -> list[str]:
        """Names of a row's values, grouped so that a tracker draws them side by side."""
        pairs = [f"cosine/{a}·{b}" for a, b in combinations(self.tasks, 2)]
        return [f"{group}/{task}" for group in GROUPS for task in self.tasks] + pairs + ["weighting/skipped_steps"]

    def see(self, step: int, weights: Tensor, statistics: Statistics | None, skipped: int) -> None:
        """A step ended: its weights, what its window saw (None where held or not measured), steps held so far."""
        unseen = torch.full_like(weights, torch.nan)
        losses, cov, norms, cosines = unseen, unseen, unseen, self._no_cosines
        if statistics is not None:
            absent = ~statistics.present
            losses = statistics.losses.masked_fill(absent, torch.nan)
            self._count += statistics.present
            delta = (statistics.losses - self._mean).masked_fill(absent, 0.0)
            self._mean += delta / self._count.clamp(min=1)
            self._squares += delta * (statistics.losses - self._mean)
            cov = (self._squares / self._count).sqrt() / self._mean.abs()
            if statistics.norms is not None:
                norms = statistics.norms.masked_fill(absent, torch.nan)
            if statistics.gram is not None:
                cosines = (statistics.gram / torch.outer(norms, norms))[self._pairs]
        row = torch.cat([weights, losses, cov, norms, cosines, weights.new_tensor([skipped])])
        self.latest = row
        if step % self.stride == 0:
            self._steps.append(step)
            self._rows.append(row.float())
            if len(self._rows) > CAPACITY:
                self.stride *= 2
                kept = [(s, r) for s, r in zip(self._steps, self._rows, strict=True) if s % self.stride == 0]
                self._steps, self._rows = [s for s, _ in kept], [r for _, r in kept]

    def values(self, row: Tensor) -> dict[str, float]:
        """A row as ``{name: value}``; what was not seen is left out."""
        return {name: value for name, value in zip(self.names, row.tolist(), strict=True) if value == value}

    @property
    def history(self) -> list[tuple[int, dict[str, float]]]:
        """All that is kept, as ``(step, values)``."""
        return [(step, self.values(row)) for step, row in zip(self._steps, self._rows, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "stride": self.stride,
            "steps": list(self._steps),
            "rows": torch.stack(self._rows) if self._rows else torch.zeros(0, len(self.latest)),
            "latest": self.latest,
            "loss_moments": torch.stack([self._count, self._mean, self._squares]),
        }

    def load_state_dict(self, state: dict[str, Any], tasks: Sequence[str]) -> None:
        """The record of ``tasks``: what it knows of the tasks here."""
        here = [_index(column, _columns(tasks)) for column in _columns(self.tasks)]
        rows, latest = (_select(state[name], here, torch.nan) for name in ("rows", "latest"))
        moments = _select(state["loss_moments"], [_index(task, tasks) for task in self.tasks], 0.0)
        self.stride, self._steps = state["stride"], list(state["steps"])
        self._rows, self.latest = list(rows), latest
        self._count, self._mean, self._squares = moments


def _columns(tasks: Sequence[str]) -> list[tuple[str, frozenset[str]]]:
    """What a row's values are of, in whatever order two tasks are named."""
    groups = [(group, frozenset([task])) for group in GROUPS for task in tasks]
    return [*groups, *(("cosine", frozenset(pair)) for pair in combinations(tasks, 2)), ("skipped", frozenset())]


def _index(item: Any, known: Sequence[Any]) -> int:
    """Where it is; -1 where it is not."""
    return known.index(item) if item in known else -1


def _select(x: Tensor, columns: Sequence[int], missing: float) -> Tensor:
    """Columns of the last dimension, ``missing`` where there is none."""
    return torch.cat([x, x.new_full((*x.shape[:-1], 1), missing)], -1)[..., columns]
