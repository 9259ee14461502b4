"""How far a weighter has come: all that it carries from one window to the next, and all that it saves."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .record import Record
from .statistics import Method, State, Statistics

KIND = "accel_weighting.Weighter"
VERSION = 1
"""Of the saved form."""


class Progress:
    """Weights, the method's state and counters; plain tensors and numbers, free of the number of processes.

    Args:
        method: The weighting method.
        tasks: Task names.
        initial_weights: ``{task: weight}``, or None.

    Attributes:
        step: Optimizer steps taken.
        weights: Those that the next backward will use, float64 ``[K]``.
        state: The method's.
        held: Steps held in a row that count towards ``max_skipped_steps``.
        skipped: Steps held in all.
        frozen: Whether the weights are held by the user.
        record: What is kept for people.
    """

    def __init__(self, method: Method, tasks: Sequence[str], initial_weights: Mapping[str, float] | None) -> None:
        self._method, self._tasks, self._initial_weights = method, tuple(tasks), initial_weights
        self.step = self.held = self.skipped = 0
        self.frozen = False
        self.weights, self.state = method.init(tasks, initial_weights)
        self._weight_sum = torch.zeros_like(self.weights)
        self._weight_steps = 0
        self.record = Record(tasks)

    def update(self, statistics: Statistics) -> None:
        """The method's update."""
        self.weights, self.state = self._method.update(self.state, statistics)

    def see(self, step: int, statistics: Statistics | None) -> None:
        """Records a step that ended; without statistics where it was held or not measured."""
        self.record.see(step, self.weights, statistics, self.skipped)

    def count_weights(self) -> None:
        """Takes the weights of an unfrozen step into their average."""
        self._weight_sum += self.weights
        self._weight_steps += 1

    @property
    def average_weights(self) -> Tensor:
        """Over the unfrozen steps."""
        return self._weight_sum / self._weight_steps if self._weight_steps else self.weights

    def named(self, name: str) -> Tensor | None:
        """An entry of the method's state, behind whatever prefix wrappers gave it."""
        return next((value for key, value in self.state.items() if _last(key) == name), None)

    def digest(self) -> bytes:
        """Of the weights and the method's state, to the last bit; rotations are on the device and left out."""
        state = [self.state[name].contiguous() for name in sorted(self.state) if _last(name) != "rotations"]
        return hashlib.blake2b(b"".join(x.numpy().tobytes() for x in (self.weights, *state))).digest()

    def replace(self, old: Tensor, new: Tensor) -> None:
        """The same entry of the method's state on another device or in another precision."""
        self.state = {name: new if value is old else value for name, value in self.state.items()}

    def forget_rotations(self) -> None:
        """They are in the heads now."""
        self.state = {name: value for name, value in self.state.items() if _last(name) != "rotations"}

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"version": VERSION, "tasks": list(self._tasks), "method": repr(self._method), **settings}

    def state_dict(self, **settings: Any) -> dict[str, Any]:
        """All that a resume needs, and the ``settings`` that it has to agree in."""
        return {
            "kind": KIND,
            **self._identity(settings),
            "step": self.step,
            "weights": self.weights.clone(),
            "state": {name: value.clone() for name, value in self.state.items()},
            "weight_sum": self._weight_sum.clone(),
            "weight_steps": self._weight_steps,
            "held": self.held,
            "skipped": self.skipped,
            "frozen": self.frozen,
            "record": self.record.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any], strict: bool, **settings: Any) -> None:
        """Takes up what ``state_dict`` gave; see ``Weighter.load_state_dict``."""
        if not isinstance(saved, Mapping) or saved.get("kind") != KIND:
            raise checks.not_our_state(saved)
        differences = {name: (saved.get(name), here) for name, here in self._identity(settings).items()}
        differences = {name: (old, here) for name, (old, here) in differences.items() if old != here}
        if differences and (strict or "version" in differences):
            raise checks.other_checkpoint(differences)
        self.step, self.held, self.skipped, self.frozen = (saved[n] for n in ("step", "held", "skipped", "frozen"))
        self.record.load_state_dict(saved["record"], saved["tasks"])
        if not differences:
            self.weights = saved["weights"].clone()
            self.state = {name: value.clone() for name, value in saved["state"].items()}
            self._weight_sum, self._weight_steps = saved["weight_sum"].clone(), saved["weight_steps"]
            return
        self._take_over(saved)

    def _take_over(self, saved: Mapping[str, Any]) -> None:
        """What fits of another weighter's state: the rows of these tasks; of a method's own state all or nothing."""
        method: Any = self._method
        rows = [saved["tasks"].index(task) if task in saved["tasks"] else None for task in self._tasks]
        weights, fresh = method.init(self._tasks, self._initial_weights)
        self.weights = _rows_of(saved["weights"], rows, weights)
        if None in rows:  # an average over other steps than the others' would be no average
            self._weight_sum, self._weight_steps = torch.zeros_like(weights), 0
        else:
            self._weight_sum, self._weight_steps = saved["weight_sum"][rows], saved["weight_steps"]

        R = next((value for name, value in saved["state"].items() if _last(name) == "rotations"), None)
        if R is not None:  # the heads were trained behind them, whatever the method
            if "moments" in method.needs and method.size in (None, R.shape[-1]):
                fresh = method.widen(fresh, R.shape[-1])
                fresh |= {name: _rows_of(R, rows, v) for name, v in fresh.items() if _last(name) == "rotations"}
            else:
                checks.warn_rotations_left_behind()

        old: State = {}
        if _classes(saved["method"]) == _classes(repr(method)):
            names = {name for name in fresh.keys() & saved["state"].keys() if _last(name) not in ("rotations", "fixed")}
            old = {name: saved["state"][name] for name in names}
        same_tasks = saved["tasks"] == list(self._tasks)
        if not all(_fits(value, fresh[name], len(saved["tasks"]), same_tasks) for name, value in old.items()):
            old = {}
        self.state = {name: _rows_of(old[name], rows, v) if name in old else v for name, v in fresh.items()}
        if "fixed" in fresh:
            self.weights = weights

        if method.keeps_sum:  # that of its own tasks, not of those that the checkpoint had
            self.weights = _of_the_sum(self.weights, weights)
            self._weight_sum = _of_the_sum(self._weight_sum, weights * self._weight_steps)
            for name in (name for name in fresh if _last(name) == "weights"):
                self.state[name] = _of_the_sum(self.state[name], fresh[name])


def _classes(method: str) -> list[str]:
    """Of a method's text, the names of its class and of those that it wraps."""
    return re.findall(r"(\w+)\(", method)


def _last(name: str) -> str:
    """The name that a method gave an entry of its state: wrappers write a prefix and a dot before it."""
    return name.rpartition(".")[2]


def _of_the_sum(kept: Tensor, fresh: Tensor) -> Tensor:
    """``kept``, scaled to the sum of ``fresh`` if it has another; ``fresh`` where nothing is left, or signs cancel."""
    size = kept.abs().sum()
    if (kept.sum() - fresh.sum()).abs() <= 1e-12 * size:
        return kept
    return kept * (fresh.sum() / kept.sum()) if kept.sum() > size / 2 else fresh


def _fits(old: Tensor, new: Tensor, tasks: int, same_tasks: bool) -> bool:
    """Whether an entry of a method's state has a row for each of so many ``tasks``, or nothing to do with them."""
    rows = new.ndim > 0 and len(old) == tasks and old.shape[1:] == new.shape[1:]
    return rows or (old.shape == new.shape and (same_tasks or new.ndim == 0))


def _rows_of(old: Tensor, rows: Sequence[int | None], new: Tensor) -> Tensor:
    """``new`` with the ``rows`` of ``old``; without rows, ``old``."""
    if new.ndim == 0 or len(new) != len(rows):
        return old.clone()
    return torch.stack([new[k] if row is None else old[row].to(new) for k, row in enumerate(rows)])
