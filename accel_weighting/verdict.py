"""The verdict on a step, from the reduced numbers alone, and so the same on every process and for both lags.

The processes agree, or all of them raise. The window is usable, or held (a loss or a gradient was not finite), or it
breaks a rule of the method, and all of them raise.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import errors
from .processes import BITS, Processes, signature_pieces
from .state import WeighterState
from .statistics import Method, Statistics
from .window import Sums, Window

logger = logging.getLogger("accel_weighting")

GRADIENTS = frozenset({"norms", "gram", "moments"})
"""Statistics that are taken at the branch point."""


HALF = {torch.bfloat16, torch.float16}

ALONE = 20
"""Windows in a row with one task each, and weights that stay, after which that is said."""
PATIENCE = 20
"""Windows in which every task should have been there once."""


@dataclass(frozen=True)
class Held:
    """A window that leaves weights and state as they are.

    Attributes:
        message: What was not finite.
        counts: Whether it counts towards ``max_skipped_steps``.
    """

    message: str
    counts: bool


class Facts(Protocol):
    """What the verdict asks the weighter."""

    def settings(self) -> Mapping[str, Any]:
        """What all processes must have alike now, besides tasks, method, step, weights and state."""

    def has_scaler(self) -> bool:
        """Whether a loss scale is in use: an overflow of gradients is then the scaler's business."""

    def why_missed(self, missed: Sequence[str], window: Window) -> Exception:
        """The error for tasks of which no gradient came to the branch point."""


class Verdict:
    """Judges every step of one weighter.

    Args:
        method: The weighting method.
        tasks: Task names.
        facts: What the weighter knows: settings, a loss scale (an overflow is then the scaler's business), and why a
            gradient did not come.
        processes: The processes that summed.
        smallest: ``{task: loss}``: below which a loss cannot fall.
        measured: The tasks whose gradients must come.
    """

    def __init__(
        self,
        method: Method,
        tasks: Sequence[str],
        facts: Facts,
        processes: Processes,
        smallest: Mapping[str, float],
        measured: Sequence[str],
    ) -> None:
        self._method, self._tasks, self._facts = method, tuple(tasks), facts
        self._processes, self._smallest = processes, smallest
        self._needs, self._positive = method.needs, method.positive_losses
        self._built = {"tasks": list(tasks), "method": repr(method), "weighter number": processes.number}
        self._signed: tuple[Mapping[str, Any], list[int]] = {}, []
        self._measured = np.array([task in measured for task in self._tasks])
        self._measures = bool(measured)
        self._warned: set[str] = set()
        self._alone = 0
        self._unseen, self._windows = set(self._tasks), 0

    @property
    def max_skipped_steps(self) -> int:
        """How many steps in a row may be held."""
        limit: int = self._facts.settings()["max_skipped_steps"]
        return limit

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self._processes.rank

    # ---- agreement ---------------------------------------------------------------------------------------------

    def signature(self, state: WeighterState) -> list[int]:
        """Settings, step, weights and state as small integers; alike on all processes or something is wrong."""
        if self._processes.world == 1:
            return []
        settings = self._facts.settings()
        if settings != self._signed[0]:
            digest = hashlib.blake2b(repr({**self._built, **settings}).encode()).digest()
            self._signed = settings, signature_pieces(digest, 2)
        return [*self._signed[1], state.step % (1 << BITS), *signature_pieces(state.digest(), 2)]

    def check_agreement(self, agreed: bool, state: WeighterState, step: int) -> None:
        """Unless the processes ``agreed``: they take over the first one's weights and state, or all raise.

        Machines of different kinds round the last bit differently, which is taken back here, in one more collective.

        Raises:
            RuntimeError: They differ by more, or in a setting or the step; says about what, and who.
        """
        if agreed:
            return
        description = {
            **self._built,
            **self._facts.settings(),
            "step": step,
            "weights": state.weights.tolist(),
            "state": state.digest().hex()[:8],
        }
        if (rotations := state.rotations) is not None:
            description["rotations"] = hashlib.blake2b(rotations.cpu().numpy().tobytes()).hexdigest()[:8]
        everyone = self._processes.gather((description, state.snapshot()))
        descriptions, snapshots = zip(*everyone, strict=True)
        settled = [*self._built, *self._facts.settings(), "step"]
        if all(d[name] == descriptions[0][name] for d in descriptions for name in settled) and _rounded(snapshots):
            state.adopt(snapshots[0])
            self.warn_once("healed", _healed(step))
            return
        raise _disagreement(descriptions, step)

    # ---- the window --------------------------------------------------------------------------------------------

    def judge(self, sums: Sums, window: Window) -> Statistics | Held:
        """The statistics of a window that can be used, or that it is held.

        Args:
            sums: What all processes saw.
            window: What this one saw; read for the words of a warning alone.

        Raises:
            ValueError: Counts were mixed, or a loss that must be positive is negative.
            RuntimeError: A gradient that the method needs did not arrive at the branch point, or gradients whose inner
                products it needs came there in different tensors; or a coefficient was not used.
        """
        if sums.mixed_counts:
            raise _mixed_counts(sums.counted, sums.blocks, sums.step)
        if not sums.finite and (held := self._not_finite(sums, window)):
            return held
        statistics = sums.statistics()
        if below := self._below_its_bound(statistics):
            return below
        if self._unseen:
            self._look_for_unseen(statistics)
        if self._positive:
            self._check_signs(statistics)
        if self._measures:
            self._check_gradients(sums, statistics, window)
        return statistics

    def _not_finite(self, sums: Sums, window: Window) -> Held | None:
        """What of the sums is not finite; a number of items is not where a loss is not known."""
        for what, bad in sums.not_finite().items():
            if bad.any() and what == "items":
                raise self._unknown_items(sums, window)
            if bad.any():
                return self._hold(what, bad, window, sums.step)
        return self._hold_extras(sums.bad_extras, sums.step) if sums.bad_extras else None

    def _unknown_items(self, sums: Sums, window: Window) -> RuntimeError:
        """Coefficients to which no gradient came, or one though their task was absent: see ``coefficients``."""
        unknown = np.isnan(sums.items)
        if unknown.any():
            return _unknown_losses(self._places(unknown, np.isnan(window.items)), len(unknown), sums.step)
        return _came_though_absent(self._places(np.isinf(sums.items), np.isinf(window.items)), sums.step)

    def _hold(self, what: str, bad: NDArray[np.bool_], window: Window, step: int) -> Held:
        here = window.not_finite(what)
        message = _not_finite(what, self._places(bad, here), step)
        self.warn_once(what, message, also=bool(here.any()))
        return Held(message, counts=what == "loss" or not (self._facts.has_scaler() or window.scaled))

    def _places(self, bad: NDArray[np.bool_], here: NDArray[np.bool_]) -> list[tuple[str, str]]:
        """The tasks of ``bad``, and in words where that is."""
        places = [""] * len(bad)
        if self._processes.world > 1:
            this = f" on process {self._processes.rank} of {self._processes.world}"
            places = [this if is_here else " on another process" for is_here in here]
        return [(task, place) for task, place, is_bad in zip(self._tasks, places, bad, strict=True) if is_bad]

    def _hold_extras(self, names: Sequence[str], step: int) -> Held:
        message = _not_finite("loss", [(name, "") for name in names], step)
        self.warn_once("extra", message)
        return Held(message, counts=True)

    def _below_its_bound(self, statistics: Statistics) -> Held | None:
        """A loss that fell below the bound it was given."""
        for task, bound in self._smallest.items():
            k = self._tasks.index(task)
            if statistics.present[k] and statistics.losses[k] < bound:
                message = _below_bound(task, float(statistics.losses[k]), bound, statistics.step)
                self.warn_once(f"bound {task}", message)
                return Held(message, counts=True)
        return None

    def _look_for_unseen(self, statistics: Statistics) -> None:
        """A task of which no loss ever comes is said."""
        self._unseen -= {task for task, is_here in zip(self._tasks, statistics.present, strict=True) if is_here}
        self._windows += 1
        if self._unseen and self._windows >= PATIENCE:
            self.warn_once("unseen", _never_seen([task for task in self._tasks if task in self._unseen]))
            self._unseen.clear()

    def _check_signs(self, statistics: Statistics) -> None:
        negative = statistics.losses < 0
        if self._smallest:
            negative &= [task not in self._smallest for task in self._tasks]
        if np.count_nonzero(negative):
            names = [task for task, is_negative in zip(self._tasks, negative, strict=True) if is_negative]
            raise _negative_losses(str(self._method), names, statistics.losses[negative].tolist(), statistics.step)

    def _check_gradients(self, sums: Sums, statistics: Statistics, window: Window) -> None:
        missed = statistics.present & (sums.arrived == 0) & self._measured
        if np.count_nonzero(missed):
            names = [task for task, is_missed in zip(self._tasks, missed, strict=True) if is_missed]
            raise self._facts.why_missed(names, window)
        if self._needs & {"gram", "moments"}:
            if sums.split:
                raise _unrelated_gradients(str(self._method), statistics.step)
            if "shared" not in self._warned:
                self._warn_if_no_sample_is_shared(statistics)

    def _warn_if_no_sample_is_shared(self, statistics: Statistics) -> None:
        """At z, inner products of exactly 0 between all tasks say that no sample has two of them."""
        M, settings = statistics.gram, self._facts.settings()
        if M is None or settings["shared_layer"] is not None or settings["shared_parameters"] is not None:
            return
        if np.count_nonzero(M.diagonal()) > 1 and np.count_nonzero(M) == np.count_nonzero(M.diagonal()):
            self.warn_once("shared", _no_sample_is_shared(str(self._method), "moments" in self._needs))

    def notice_update(self, statistics: Statistics, state: WeighterState, before: NDArray[np.float64]) -> None:
        """Windows that hold one task each: weights that are compared with each other cannot move.

        Args:
            statistics: Of the window.
            state: What the method answered with.
            before: The weights until then.
        """
        alone = len(self._tasks) > 1 and np.count_nonzero(statistics.present) == 1
        self._alone = self._alone + 1 if alone and np.array_equal(before, state.weights) else 0
        if self._alone == ALONE and (self._method.needs or self._would_move(statistics, state)):
            self.warn_once("alone", _one_task_per_window(self._method))

    def _would_move(self, statistics: Statistics, state: WeighterState) -> bool:
        """Whether the weights of a method that reads nothing change where all tasks are there: constants do not."""
        everyone = replace(statistics, present=np.ones_like(statistics.present))
        return not np.array_equal(self._method.update(state.method_state, everyone)[0], state.weights)

    def warn_of_half_precision(self, losses: Iterable[Tensor]) -> None:
        """Once, where a loss comes in half precision."""
        if half := {loss.dtype for loss in losses} & HALF:
            self.warn_once("half", errors.losses_in_half_precision(str(half.pop())))

    def warn_once(self, about: str, message: str, also: bool = False) -> None:
        """On the first process and, where it is ``also`` for this one, here; the first time."""
        if about not in self._warned and (also or self._processes.rank == 0):
            logger.warning(message)
        self._warned.add(about)


ROUNDING = 1e-6
"""Difference, relative to the largest entry of a vector, that the rounding of different machines explains."""


def _rounded(snapshots: Sequence[Mapping[str, NDArray[Any]]]) -> bool:
    """Whether weights and states differ, and by rounding alone. Where they do not differ, the sum was wrong."""
    first, *others = snapshots
    if any(other.keys() != first.keys() for other in others):
        return False
    pairs = [(other[name], value) for other in others for name, value in first.items()]
    return any(a.tobytes() != b.tobytes() for a, b in pairs) and all(_close(a, b) for a, b in pairs)


def _close(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not np.issubdtype(a.dtype, np.floating) or not a.size:
        return bool(np.array_equal(a, b))
    return bool(np.abs(a - b).max() <= ROUNDING * np.abs(b).max())


# ---- messages ----------------------------------------------------------------------------------------------------


def _disagreement(descriptions: Sequence[Mapping[str, Any]], step: int) -> RuntimeError:
    """The processes do not agree; says about what, and who differs from most."""
    first = descriptions[0]
    differing = [key for key in first if any(other[key] != first[key] for other in descriptions)]
    tables = []
    for key in differing or ["state"]:
        owners: dict[str, list[int]] = {}
        for rank, description in enumerate(descriptions):
            owners.setdefault(str(description[key]), []).append(rank)
        by_number = sorted(owners.items(), key=lambda item: -len(item[1]))
        rows = [f"  process{'es' * (len(r) > 1)} {', '.join(map(str, r))}: {value}" for value, r in by_number]
        tables.append("\n".join([f"{key}:", *rows]))
    if "tasks" in differing:
        what = "The processes were built with different tasks"
    elif differing and "state" not in differing:
        what = f"The processes no longer agree at step {step}: different {', '.join(differing)}"
    else:
        what = f"The processes no longer agree at step {step}: weights, method state or settings differ"
    return RuntimeError(
        f"{what}.\n" + "\n".join(tables) + "\nWeights must only change through the weighter, and every process must "
        "build it alike and take the same steps."
    )


def _healed(step: int) -> str:
    """The processes differed by rounding."""
    return (
        f"At optimizer step {step} weights or method state differed between processes by rounding alone, as on "
        "machines of different kinds: all processes go on with those of the first. `weighting/healed_steps` counts "
        "such steps."
    )


def _never_seen(tasks: Sequence[str]) -> str:
    """Tasks that were in no window."""
    names = ", ".join(f"`{task}`" for task in tasks)
    return (
        f"No loss of {names} came in the first {PATIENCE} windows, so its weight stays as it is. Is its "
        "key missing in `losses`, or its data?"
    )


def _mixed_counts(counted: int, blocks: int, step: int) -> ValueError:
    """Some blocks counted, some not."""
    return ValueError(
        f"Counts must come for all blocks of a window or for none. At optimizer step {step}, {counted} of {blocks} "
        "micro-batches over all processes came with positive `num_items`."
    )


def _negative_losses(method: str, tasks: Sequence[str], losses: Sequence[float], step: int) -> ValueError:
    """A method that divides by losses met a negative one."""
    found = ", ".join(f"Task `{t}` averaged {x:.4g}" for t, x in zip(tasks, losses, strict=True))
    return ValueError(
        f"{method} divides by losses and needs them positive. {found} over optimizer step {step}. Give its "
        "lower bound, `min_losses={task: bound}`, or use a method without loss ratios (GradNorm with alpha=0)."
    )


def _unrelated_gradients(method: str, step: int) -> RuntimeError:
    """The Gram matrix is needed and only norms are known."""
    return RuntimeError(
        f"{method} needs the inner products of the tasks' gradients, but at optimizer step {step} the heads were fed "
        "different tensors, so that only norms are known. Call `weighter.branch(z)` once in the model's forward and "
        "derive every head's input from its own alias."
    )


def _no_sample_is_shared(method: str, rotates: bool) -> str:
    """Gradients of different tasks sit in different rows of z."""
    cure = (
        "The rotations stay where they are."
        if rotates
        else "Give `shared_layer`, an nn.Linear whose output is the branch point: gradients of different samples meet "
        "at its weight."
    )
    return (
        f"{method} compares the gradients of different tasks, but no sample of this window had two of them, so that at "
        f"the shared representation their inner products are exactly 0 and no conflict can be seen. {cure}"
    )


def _not_finite(what: str, found: Sequence[tuple[str, str]], step: int) -> str:
    """Which losses or gradients were not finite, and where; weights are held."""
    subject = "Loss `{}`" if what == "loss" else "Gradient of loss `{}` at the shared representation"
    parts = [f"{subject.format(task)} was not finite{place}" for task, place in found]
    return f"{'; '.join(parts)} at optimizer step {step}; weights are held."


def _unknown_losses(found: Sequence[tuple[str, str]], tasks: int, step: int) -> RuntimeError:
    """Coefficients to which no gradient came."""
    names = ", ".join(f"`{task}`{place}" for task, place in found)
    what = "no coefficient at all" if len(found) == tasks else "not all coefficients"
    absent = ", ".join(f"{task!r}: 0" for task, _ in found)
    return RuntimeError(
        f"The total that was attached at optimizer step {step} holds {what}: no gradient came to that of task {names}, "
        "so that its loss is not known. Either the code did not multiply the loss by the tensor that "
        "`weighter.coefficients()` gave, but by a number made of it (`float(w)`, `w.item()`, `torch.tensor(w)`, a "
        "configuration) or by coefficients of an earlier call: hand in the tensors, anew for every total. Or the task "
        f"was absent: say so, `weighter.attach(total, num_items={{{absent}}})`."
    )


def _came_though_absent(found: Sequence[tuple[str, str]], step: int) -> RuntimeError:
    """Coefficients to which a gradient came, of tasks that were said to be absent."""
    names = ", ".join(f"`{task}`{place}" for task, place in found)
    return RuntimeError(
        f"The total that was attached at optimizer step {step} holds the loss of task {names}, which "
        "`weighter.attach(total, num_items={task: 0})` said to be absent: it was trained on, and is not in the "
        "statistics. Leave the task out of `num_items`, or leave its loss out of the total."
    )


def _one_task_per_window(method: Method) -> str:
    """Nothing can be compared."""
    carries = "CarryForward(" in repr(method)
    carry = "more `steps` of `CarryForward`" if carries else "compare each task's last values, `CarryForward(method)`"
    return (
        f"The last {ALONE} windows held one task each, and the weights of {method} did not move: it compares tasks "
        "that are in one window. Let a window hold several tasks (accumulate over the data sets, "
        f"`with weighter.micro_batch():`), or {carry}."
    )


def _below_bound(task: str, loss: float, bound: float, step: int) -> str:
    """A loss below what was said to be its smallest value; weights are held."""
    return (
        f"Loss `{task}` averaged {loss:.4g} at optimizer step {step}, below `min_losses[{task!r}] = {bound:.4g}`; "
        "weights are held. Give a bound that it cannot pass."
    )


def too_many_held(message: str, held: int, limit: int) -> RuntimeError:
    """Held steps in a row beyond the limit."""
    return RuntimeError(
        f"{message} {held} steps in a row exceed `max_skipped_steps = {limit}`: look for the cause in the data or the "
        "learning rate."
    )
