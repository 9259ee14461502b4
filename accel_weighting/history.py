"""History for logs and plots: bounded, with running means and coefficients of variation of the losses."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .statistics import Statistics

CAPACITY = 4096
"""The most entries that are kept. When they are reached, every second one is dropped, and from then on every second
step is recorded."""

PENDING = 64
"""The most steps that wait to become rows. Most rows are never read, so they are made many at a time."""

GROUPS = ("weight", "loss", "loss_cov", "grad_norm")

Vector = NDArray[np.float64]


class History:
    """Values of every step, bounded, and the running statistics of the losses.

    Args:
        tasks: Task names.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        K = len(self.tasks)
        self._stride = 1
        self._steps: list[int] = []
        self._rows: list[NDArray[np.float32]] = []
        self._moments = np.zeros((3, K))  # of the losses: count, mean, Welford's sum of squared deviations
        self._latest: Vector = np.full(len(self.names), np.nan)
        self._pending: list[tuple[int, Vector, Statistics | None, int]] = []

    @property
    def names(self) -> list[str]:
        """Names of a row's values, grouped so that a tracker draws them side by side."""
        pairs = [f"cosine/{a}/{b}" for a, b in combinations(self.tasks, 2)]
        return [f"{group}/{task}" for group in GROUPS for task in self.tasks] + pairs + ["weighting/skipped_steps"]

    def record(self, step: int, weights: Vector, statistics: Statistics | None, skipped: int) -> None:
        """Records the end of a step: weights, statistics (None where held or not measured), and steps held so far."""
        if statistics is not None and statistics.moments is not None:  # large, and on the device
            statistics = replace(statistics, moments=None)
        self._pending.append((step, weights, statistics, skipped))
        if len(self._pending) >= PENDING:
            self._settle()

    def _settle(self) -> None:
        """Turns the waiting steps into rows."""
        for step, weights, statistics, skipped in self._pending:
            self._latest = row = np.concatenate([weights, self._seen(statistics), [skipped]])
            if step % self._stride == 0:
                self._steps.append(step)
                self._rows.append(row.astype(np.float32))
        self._pending.clear()
        while len(self._rows) > CAPACITY:
            self._stride *= 2
            kept = [(s, r) for s, r in zip(self._steps, self._rows, strict=True) if s % self._stride == 0]
            self._steps, self._rows = [s for s, _ in kept], [r for _, r in kept]

    def _seen(self, statistics: Statistics | None) -> Vector:
        """Losses, their coefficients of variation, norms and cosines of one window; NaN where not seen."""
        K = len(self.tasks)
        seen = np.full(3 * K + K * (K - 1) // 2, np.nan)
        if statistics is None:
            return seen
        here = statistics.present
        losses, cov, norms = seen[: 3 * K].reshape(3, K)  # views
        count, mean, squares = self._moments
        losses[here] = L = statistics.losses[here]
        count += here
        delta = L - mean[here]
        mean[here] += delta / count[here]
        squares[here] += delta * (L - mean[here])
        known = mean != 0
        cov[known] = np.sqrt(squares[known] / count[known]) / np.abs(mean[known])
        if statistics.norms is not None:
            norms[here] = statistics.norms[here]
        if statistics.gram is not None:
            lengths = norms[:, None] * norms
            cosines = np.full((K, K), np.nan)
            np.divide(statistics.gram, lengths, out=cosines, where=lengths > 0)
            seen[3 * K :] = cosines[np.triu_indices(K, 1)]
        return seen

    def _values(self, row: NDArray[Any]) -> dict[str, float]:
        """A row as ``{name: value}``; what was not seen is left out."""
        return {name: value for name, value in zip(self.names, row.tolist(), strict=True) if value == value}

    @property
    def latest(self) -> dict[str, float]:
        """Values of the last step."""
        self._settle()
        return self._values(self._latest)

    @property
    def entries(self) -> list[tuple[int, dict[str, float]]]:
        """All that is kept, as ``(step, values)``."""
        self._settle()
        return [(step, self._values(row)) for step, row in zip(self._steps, self._rows, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        self._settle()
        rows = np.stack(self._rows) if self._rows else np.zeros((0, len(self._latest)), np.float32)
        return {
            "stride": self._stride,
            "steps": list(self._steps),
            "rows": torch.from_numpy(rows),
            "latest": torch.tensor(self._latest),
            "loss_moments": torch.tensor(self._moments),
        }

    def load_state_dict(self, state: Mapping[str, Any], tasks: Sequence[str]) -> None:
        """Takes over the saved history of ``tasks`` for those tasks that are also here."""
        here = [_index(column, _columns(tasks)) for column in _columns(self.tasks)]
        rows, latest = (_select(state[name], here, np.nan) for name in ("rows", "latest"))
        moments = _select(state["loss_moments"], [_index(task, tasks) for task in self.tasks], 0.0)
        self._stride, self._steps = state["stride"], list(state["steps"])
        self._rows, self._latest, self._moments = list(rows), latest, moments
        self._pending = []


def _columns(tasks: Sequence[str]) -> list[tuple[str, frozenset[str]]]:
    """What each value of a row describes; the order in which a pair of tasks is named does not matter."""
    groups = [(group, frozenset([task])) for group in GROUPS for task in tasks]
    return [*groups, *(("cosine", frozenset(pair)) for pair in combinations(tasks, 2)), ("skipped", frozenset())]


def _index(item: Any, known: Sequence[Any]) -> int:
    """The index of an entry, or -1 where it is missing."""
    return known.index(item) if item in known else -1


def _select(x: Tensor, columns: Sequence[int], missing: float) -> NDArray[Any]:
    """Columns of the last dimension, ``missing`` where there is none."""
    return torch.cat([x, x.new_full((*x.shape[:-1], 1), missing)], -1)[..., columns].numpy().copy()


# ---- names for trackers ------------------------------------------------------------------------------------------

PLAIN = re.compile(r"[\w\-.: ]+(/[\w\-.: ]+)*", re.ASCII)
"""What every tracker takes, but for parts that are ``.`` or ``..``."""


@functools.lru_cache(maxsize=16)
def tracker_names(names: tuple[str, ...]) -> dict[str, str]:
    """``{name: name that every tracker takes}``, different for different names.

    Accents are dropped, and other characters become ``_``; where names are alike then, also after TensorBoard, which
    takes neither spaces nor colons, a number is appended.

    Example:
        >>> tracker_names(("loss/naïve", "loss/日", "loss/月", "loss/a b"))
        {'loss/naïve': 'loss/naive', 'loss/日': 'loss/_', 'loss/月': 'loss/_2', 'loss/a b': 'loss/a b'}
    """
    found: dict[str, str] = {}
    taken = set[str]()
    for name in sorted(names, key=lambda name: _plain(name) != name):  # those that stay as they are come first
        plain, number = _plain(name), 1
        while (seen := re.sub("[ :]", "_", plain)) in taken:
            number += 1
            plain = f"{_plain(name)}{number}"
        taken.add(seen)
        found[name] = plain
    return {name: found[name] for name in names}


def _plain(name: str) -> str:
    """The name in characters that every tracker takes."""
    parts = name.split("/")
    if PLAIN.fullmatch(name) and not {".", ".."} & set(parts):
        return name
    letters = (unicodedata.normalize("NFKD", part) for part in parts)
    bare = ("".join(c for c in part if not unicodedata.combining(c)) for part in letters)
    plain = (re.sub(r"[^\w\-.: ]", "_", part, flags=re.ASCII) for part in bare)
    return "/".join("_" if part in ("", ".", "..") else part for part in plain)
