"""The weighter's state: all that goes from one optimizer step to the next, and into a checkpoint."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checkpoint import problems
from .growth import Growth
from .history import History
from .statistics import Method, State, Statistics

KIND = "accel_weighting.Weighter"
VERSION = 1
"""The version of the saved form."""

NOT_TAKEN_OVER = ("rotations", "fixed", "settings", "pairs")
"""Entries of a method's state that are not taken from another weighter's checkpoint. Rotations are handled apart."""

Vector = NDArray[np.float64]


class WeighterState:
    """Weights, the method's state and counters; plain numbers, free of the number of processes.

    Args:
        method: The weighting method.
        tasks: Task names.
        initial_weights: ``{task: weight}``, or None.
        growth: Bounds the weights that are applied; the method's own state knows nothing of it. None: no bound.

    Attributes:
        step: Optimizer steps taken.
        weights: Those that the next backward will use, float64 ``[K]``; replaced, never changed in place.
        applied: Those that the last recorded backward used.
        applied_rotations: The rotations that it used, on the device; None before it.
        linear: Tasks in whose coefficient a total was found to be linear: see ``coefficients``.
        loss_weights: What multiplies the losses under a method that acts on the shared path and has such; or None.
        method_state: The method's.
        consecutive_skipped: Steps held in a row that count towards ``max_skipped_steps``.
        total_skipped: Steps held in all.
        frozen: Whether the weights are held by the user.
        extras: ``{loss/name: mean}`` of the losses that were added as they are, of the last window.
        healed: Steps at which the processes differed by rounding, and took over the first one's weights and state.
        statistics: What the last window that was not held saw.
        history: For logs and plots.

    Raises:
        TypeError: The method is written with tensors, as methods were before version 0.1.
    """

    def __init__(
        self,
        method: Method,
        tasks: Sequence[str],
        initial_weights: Mapping[str, float] | None,
        growth: Growth | None = None,
    ) -> None:
        self._method, self._tasks, self._initial_weights = method, tuple(tasks), initial_weights
        self.step = self.consecutive_skipped = self.total_skipped = 0
        self.frozen = False
        self.weights, self.method_state = method.init(tasks, initial_weights)
        _check_arrays(method, self.weights, self.method_state)
        self.applied = self.weights
        self.applied_rotations: Tensor | None = None
        self.linear: set[str] = set()
        self.loss_weights: Vector | None = self.get("loss_weights")
        self.statistics: Statistics | None = None
        self.healed = 0
        self.extras: dict[str, float] = {}
        self._weight_sum = np.zeros(len(self._tasks))
        self._weight_steps = 0
        self.history, self.growth = History(tasks), growth

    def update(self, statistics: Statistics, seen: Statistics | None = None) -> None:
        """The method's update.

        Args:
            statistics: What the window saw.
            seen: What the method is to see of it, where losses have lower bounds; None: all.

        Raises:
            RuntimeError: Its weights are not finite; nothing was changed.
        """
        weights, method_state = self._method.update(self.method_state, statistics if seen is None else seen)
        if np.count_nonzero(np.isfinite(weights)) < len(weights):
            raise _weights_not_finite(self._method, weights, statistics.step)
        weights, loss_weights = self._bounded(weights, _entry(method_state, "loss_weights"), statistics, method_state)
        self.weights, self.method_state, self.statistics = weights, method_state, statistics
        self.loss_weights = loss_weights
        self.consecutive_skipped = 0

    def _bounded(
        self, weights: Vector, loss_weights: Vector | None, statistics: Statistics, method_state: State
    ) -> tuple[Vector, Vector | None]:
        """The weights to apply: the method's, after the bound on their growth; and those on losses if it has any."""
        growth, K = self.growth, len(weights)
        if growth is None or not self._method.settled(method_state):
            return weights, loss_weights
        if loss_weights is None or not self._method.loss_weights_grow:
            return growth.bound(weights, self.weights, statistics), loss_weights
        assert self.loss_weights is not None
        before = np.concatenate([self.weights, self.loss_weights])
        both = growth.bound(np.concatenate([weights, loss_weights]), before, statistics)
        return both[:K], both[K:]

    def hold(self, counts: bool) -> None:
        """Weights and method state stay as they are for this step, which may count towards ``max_skipped_steps``."""
        self.total_skipped += 1
        self.consecutive_skipped += counts

    def record(self, step: int, statistics: Statistics | None) -> None:
        """A step ended; without statistics where it was held or not measured."""
        self.history.record(step, self.weights, statistics, self.total_skipped)

    def add_to_average(self) -> None:
        """Takes the weights of an unfrozen step into their average."""
        self._weight_sum = self._weight_sum + self.weights
        self._weight_steps += 1

    @property
    def average_weights(self) -> Vector:
        """The mean of the weights over the unfrozen steps."""
        return self._weight_sum / self._weight_steps if self._weight_steps else self.weights

    def get(self, name: str) -> Any:
        """An entry of the method's state, behind whatever prefix wrappers gave it; None if there is none."""
        return _entry(self.method_state, name)

    @property
    def rotations(self) -> Tensor | None:
        """The rotations ``[K, m, m]``, on the device, of a method that rotates, once z has been seen."""
        rotations: Tensor | None = self.get("rotations")
        return rotations

    def digest(self) -> bytes:
        """A digest of every bit of the weights and the method's state, without rotations, which are on the device."""
        state = self.method_state
        values = [state[name].tobytes() for name in sorted(state) if _last(name) != "rotations"]
        growth = b"" if self.growth is None else self.growth.digest()
        return hashlib.blake2b(b"".join((self.weights.tobytes(), *values, growth))).digest()

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """Weights and the method's state, rotations among it, as the other processes are to compare them."""
        state: dict[str, Any] = self.method_state
        arrays = {name: x.cpu().numpy() if isinstance(x, Tensor) else x for name, x in state.items()}
        growth = {} if self.growth is None else self.growth.snapshot()
        return {
            "weights": self.weights,
            **({} if self.loss_weights is None else {"loss_weights": self.loss_weights}),
            **{f"state {name}": value for name, value in arrays.items()},
            **{f"growth {name}": value for name, value in growth.items()},
        }

    def adopt(self, snapshot: Mapping[str, NDArray[Any]]) -> None:
        """Takes over another process's snapshot, which differs by rounding."""
        self.weights = snapshot["weights"].copy()
        state: dict[str, Any] = {}
        for name, own in self.method_state.items():
            new = snapshot[f"state {name}"].copy()
            state[name] = torch.from_numpy(new).to(own) if isinstance(own, Tensor) else new
        self.method_state = state
        if self.loss_weights is not None:
            self.loss_weights = snapshot["loss_weights"].copy()
        if self.growth is not None:
            self.growth.adopt({name: snapshot[f"growth {name}"] for name in self.growth.snapshot()})
        self.healed += 1

    def replace_rotations(self, new: Tensor) -> None:
        """The same rotations on another device or in another precision."""
        self.method_state = {k: new if _last(k) == "rotations" else v for k, v in self.method_state.items()}  # type: ignore[misc]

    def forget_rotations(self) -> None:
        """They are in the heads now."""
        self.method_state = {k: v for k, v in self.method_state.items() if _last(k) != "rotations"}
        self.applied_rotations = None

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"version": VERSION, "tasks": list(self._tasks), "method": repr(self._method), **settings}

    def state_dict(self, **settings: Any) -> dict[str, Any]:
        """All that a resume needs, as plain tensors, and the ``settings`` that it has to agree in."""
        return {
            "kind": KIND,
            **self._identity(settings),
            "step": self.step,
            "weights": torch.tensor(self.weights),
            "state": {name: _tensor(value) for name, value in self.method_state.items()},
            "weight_sum": torch.tensor(self._weight_sum),
            "weight_steps": self._weight_steps,
            "held": self.consecutive_skipped,
            "skipped": self.total_skipped,
            "frozen": self.frozen,
            **({} if self.growth is None else self._growth_state(self.growth)),
            "record": self.history.state_dict(),
        }

    def _growth_state(self, growth: Growth) -> dict[str, Any]:
        applied = {} if self.loss_weights is None else {"loss_weights": torch.tensor(self.loss_weights)}
        return {"growth": {**growth.state_dict(), **applied}}

    def _load_growth(self, saved: Mapping[str, Any] | None, rows: Sequence[int | None], tasks: int) -> None:
        """The memory of what was applied; ``saved`` is None in a checkpoint that has none."""
        self.loss_weights = self.get("loss_weights")
        if self.growth is None:
            return
        applied = None if saved is None else saved.get("loss_weights")
        if applied is not None and self.loss_weights is not None:
            self.loss_weights = _rows_of(applied.numpy(), rows, self.loss_weights)
        if self._method.loss_weights_grow:
            rows = [*rows, *(None if row is None else row + tasks for row in rows)]
        self.growth.load_state_dict(saved, rows)

    def load_state_dict(self, saved: Mapping[str, Any], strict: bool, **settings: Any) -> None:
        """Takes up what ``state_dict`` gave; see ``Weighter.load_state_dict``."""
        if not isinstance(saved, Mapping) or saved.get("kind") != KIND:
            raise _not_our_state(saved)
        differences = {name: (saved.get(name), here) for name, here in self._identity(settings).items()}
        differences = {name: (old, here) for name, (old, here) in differences.items() if _differs(old, here)}
        if differences and (strict or "version" in differences):
            raise _other_checkpoint(differences)
        fresh = None if differences else self._method.init(self._tasks, self._initial_weights)[1]
        if wrong := problems(saved, self._method, fresh):
            raise _damaged(wrong)
        self.step, self.frozen = saved["step"], saved["frozen"]
        self.consecutive_skipped, self.total_skipped = saved["held"], saved["skipped"]
        self.history.load_state_dict(saved["record"], saved["tasks"])
        self.statistics = None
        known = saved["state"] if fresh is None else {n: v for n, v in saved["state"].items() if _kept(n, fresh)}
        old_state = {name: _array(value, name) for name, value in known.items()}
        weights, weight_sum = saved["weights"].numpy().copy(), saved["weight_sum"].numpy().copy()
        if not differences:
            self.weights = self.applied = weights
            self.applied_rotations = None
            self.method_state = old_state
            self._weight_sum, self._weight_steps = weight_sum, saved["weight_steps"]
            self._load_growth(saved.get("growth"), range(len(weights)), len(weights))
            return
        rows = [saved["tasks"].index(task) if task in saved["tasks"] else None for task in self._tasks]
        self._take_over(saved, rows, weights, weight_sum, old_state)
        measure = None if "method" in differences else saved.get("growth")  # another method's weights are none
        self._load_growth(measure, rows, len(saved["tasks"]))

    def _take_over(
        self,
        saved: Mapping[str, Any],
        rows: Sequence[int | None],
        weights: Vector,
        weight_sum: Vector,
        old_state: State,
    ) -> None:
        """Loads what matches from another weighter's state.

        That is the rows of shared tasks; and the method's own state only if all of it fits.
        """
        method = self._method
        initial, fresh = method.init(self._tasks, self._initial_weights)
        self.weights = _rows_of(weights, rows, initial)
        known = [row for row in rows if row is not None]
        if len(known) < len(rows):  # an average over other steps than the others' would be no average
            self._weight_sum, self._weight_steps = np.zeros(len(rows)), 0
        else:
            self._weight_sum, self._weight_steps = weight_sum[known], saved["weight_steps"]

        fresh = self._take_over_rotations(old_state, rows, fresh)
        old: State = {}
        if _classes(saved["method"]) == _classes(repr(method)):
            names = {name for name in fresh.keys() & old_state.keys() if _last(name) not in NOT_TAKEN_OVER}
            old = {name: old_state[name] for name in names}
        same_tasks = saved["tasks"] == list(self._tasks)
        if not all(_fits(value, fresh[name], len(saved["tasks"]), same_tasks) for name, value in old.items()):
            old = {}
        self.method_state = {name: _rows_of(old[name], rows, v) if name in old else v for name, v in fresh.items()}
        if "fixed" in fresh:
            self.weights = initial
        if method.keeps_sum:
            self._restore_sum(initial, fresh)
        self.applied = self.weights
        self.applied_rotations = None

    def _take_over_rotations(self, old_state: State, rows: Sequence[int | None], fresh: State) -> State:
        """The heads were trained behind their rotations, whatever the method."""
        method: Any = self._method
        R: Any = next((value for name, value in old_state.items() if _last(name) == "rotations"), None)
        if R is None:
            return fresh
        if "moments" not in method.needs or method.size not in (None, R.shape[-1]):
            _warn_rotations_left_behind()
            return fresh
        wide: dict[str, Any] = method.widen(fresh, R.shape[-1])
        return wide | {name: _rotations_of(R, rows, v) for name, v in wide.items() if _last(name) == "rotations"}

    def _restore_sum(self, initial: Vector, fresh: State) -> None:
        """The sum of its own tasks, not of those that the checkpoint had."""
        self.weights = _of_the_sum(self.weights, initial)
        self._weight_sum = _of_the_sum(self._weight_sum, initial * self._weight_steps)
        for name in (name for name in fresh if _last(name) == "weights"):
            self.method_state[name] = _of_the_sum(self.method_state[name], fresh[name])


def _entry(method_state: State, name: str) -> Any:
    return next((value for key, value in method_state.items() if _last(key) == name), None)


def _differs(old: Any, here: Any) -> bool:
    """Whether a setting of a checkpoint, which may be anything, is not the one here."""
    return isinstance(old, Tensor) or bool(old != here)


def _classes(method: str) -> list[str]:
    """Of a method's text, the names of its class and of those that it wraps."""
    return re.findall(r"(\w+)\(", method)


def _last(name: str) -> str:
    """The name that a method gave an entry of its state: wrappers write a prefix and a dot before it."""
    return name.rpartition(".")[2]


def _kept(name: str, fresh: State) -> bool:
    """Whether an entry of a saved state is the method's."""
    return name in fresh or _last(name) == "rotations"


def _tensor(value: Any) -> Tensor:
    return value.clone() if isinstance(value, Tensor) else torch.tensor(value)


def _array(value: Tensor, name: str) -> Any:
    """An entry of a saved state as methods keep it: rotations as a tensor, all else as an array of its own."""
    return value.clone() if _last(name) == "rotations" else value.numpy().copy()


def _of_the_sum(kept: Vector, fresh: Vector) -> Vector:
    """``kept``, scaled to the sum of ``fresh`` if it has another; ``fresh`` where nothing is left, or signs cancel."""
    size = np.abs(kept).sum()
    if abs(kept.sum() - fresh.sum()) <= 1e-12 * size:
        return kept
    return kept * (fresh.sum() / kept.sum()) if kept.sum() > size / 2 else fresh


def _fits(old: NDArray[Any], new: NDArray[Any], tasks: int, same_tasks: bool) -> bool:
    """Whether an entry of a method's state has a row for each of so many ``tasks``, or nothing to do with them."""
    rows = new.ndim > 0 and old.ndim > 0 and len(old) == tasks and old.shape[1:] == new.shape[1:]
    return rows or (old.shape == new.shape and (same_tasks or new.ndim == 0))


def _rows_of(old: NDArray[Any], rows: Sequence[int | None], new: NDArray[Any]) -> NDArray[Any]:
    """``new`` with the ``rows`` of ``old``; without rows, ``old``."""
    if new.ndim == 0 or len(new) != len(rows):
        return old.copy()
    return np.stack([new[k] if row is None else old[row].astype(new.dtype) for k, row in enumerate(rows)])


def _rotations_of(old: Tensor, rows: Sequence[int | None], new: Tensor) -> Tensor:
    return torch.stack([new[k] if row is None else old[row].to(new) for k, row in enumerate(rows)])


# ---- messages ----------------------------------------------------------------------------------------------------


def _check_arrays(method: Method, weights: Any, state: Mapping[str, Any]) -> None:
    """Methods keep NumPy arrays."""
    wrong = [name for name, value in state.items() if _last(name) != "rotations" and not isinstance(value, np.ndarray)]
    if isinstance(weights, np.ndarray) and not wrong:
        return
    found = f"{type(weights).__name__} for the weights" if not isinstance(weights, np.ndarray) else f"state {wrong}"
    raise TypeError(
        f"`{type(method).__name__}.init` must give NumPy arrays: weights [K] in float64 and a dictionary of arrays. "
        f"Found {found}. A method that was written with tensors is converted in three lines:\n"
        "    in `init`: `np.ones(len(tasks))` for `torch.ones(len(tasks), dtype=torch.float64)`, and so on;\n"
        "    in `update`: `statistics.losses`, `.present`, `.norms`, `.gram` are arrays: `np.where(present, a, b)`;\n"
        "    counters: `np.asarray(state['count'] + 1)`."
    )


def _weights_not_finite(method: Method, weights: Vector, step: int) -> RuntimeError:
    return RuntimeError(
        f"{method} answered with weights that are not finite at optimizer step {step}: {weights.tolist()}. Weights "
        "and state stay as they were. Losses and gradients of that step were finite, so this is a fault of the method: "
        "please report it with the statistics, `weighter.statistics`, and the state, `weighter.state_dict()`."
    )


def _not_our_state(state: Any) -> ValueError:
    keys = sorted(map(str, state))[:8] if isinstance(state, Mapping) else type(state).__name__
    return ValueError(
        f"This does not hold a weighter's state (keys: {keys}). Objects must be registered for checkpointing in the "
        "same order as when it was saved."
    )


def _damaged(wrong: Sequence[str]) -> ValueError:
    """A state that no weighter has written."""
    rows = "\n".join(f"  {problem}" for problem in wrong)
    return ValueError(f"This weighter's state is damaged, and nothing of it was loaded:\n{rows}")


def _other_checkpoint(differences: Mapping[str, tuple[Any, Any]]) -> ValueError:
    """Another weighter's checkpoint; all differences at once."""
    rows = "\n".join(f"  {name}: {old} in the checkpoint, {new} here" for name, (old, new) in differences.items())
    return ValueError(
        f"The checkpoint was written by another weighter. Differences: {', '.join(differences)}.\n{rows}\n"
        "Load with `strict=False` to keep what fits."
    )


def _warn_rotations_left_behind() -> None:
    warnings.warn(
        "The checkpoint holds rotations that this weighter's method does not take up, and the heads were trained "
        "behind them. To go on from the model as it was, load the checkpoint with its own method first and call "
        "`fold_rotations()`.",
        stacklevel=6,
    )
