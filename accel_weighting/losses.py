"""From the losses that a user passes to one vector: their names, who is present, bounds, and zeros for who is not."""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import checks
from .join import zero_with_graph
from .statistics import Statistics
from .transfer import to_device

Losses = Mapping[str, Tensor] | Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class Shares:
    """Counts, known for the whole window, that weigh a micro-batch in training as well as in the statistics.

    The engine's mean over micro-batches of ``n · M / N`` times the mean over n items is the mean over all N items.

    Attributes:
        items: ``{task: n}``, items of the task in this micro-batch. 0: the task is not here.
        means: ``{task: N / M}``: N items in the M micro-batches of all processes, of which every one has ``N / M``.
    """

    items: Mapping[str, int]
    means: Mapping[str, float]

    def of(self, task: str) -> float:
        """``n · M / N``."""
        return self.items[task] / self.means[task] if self.items[task] else 0.0


NumItems = int | Mapping[str, int] | Shares | None

NOBODY: frozenset[int] = frozenset()


@functools.lru_cache(maxsize=64)
def _everybody(tasks: int) -> frozenset[int]:
    return frozenset(range(tasks))


class Given(NamedTuple):
    """The losses of one micro-batch, checked.

    Attributes:
        named: ``{task: loss}``, in whatever order.
        present: Indices of the tasks that have samples in it.
        empty: Indices of the tasks that were said to have none (a count of 0).
        counts: How many items each loss is the mean of, ``[K]``; None where the block was not counted.
        shares: Those that the counts are, if they are ``Shares``.
    """

    named: Mapping[str, Tensor]
    present: frozenset[int]
    empty: frozenset[int]
    counts: Sequence[float] | None
    shares: Shares | None = None

    @classmethod
    def parse(cls, losses: Any, num_items: Any, tasks: Sequence[str]) -> Given:
        """Whatever the losses came in, by name; an error names all that is wrong."""
        return cls.counted(checks.losses_by_task(losses, tasks), num_items, tasks)

    @classmethod
    def counted(cls, named: Mapping[str, Tensor], num_items: Any, tasks: Sequence[str]) -> Given:
        """The same of losses that were checked."""
        shares = num_items if isinstance(num_items, Shares) else None
        if num_items is None:
            counts, empty = None, NOBODY
        elif shares is not None:
            counts = [shares.of(task) for task in tasks]
            empty = frozenset([k for k, share in enumerate(counts) if share == 0])
        else:
            counts, empty = _item_counts(num_items, named, tasks)
        if not empty and len(named) == len(tasks):
            present = _everybody(len(tasks))
        else:
            present = frozenset([k for k, task in enumerate(tasks) if task in named and k not in empty])
        return cls(named, present, empty, counts, shares)

    def vector(
        self, tasks: Sequence[str], head_outputs: Callable[[int], list[Tensor]], whole_graph: bool = False
    ) -> Tensor:
        """The losses in task order, ``[K]``, float64 if one of them is, else float32.

        Absent ones are 0, with a path of zeros to the head if it was called (or else, where a count of 0 said that the
        task is not there, to the loss that came), so that every process finds the same parameters in its graph.

        Args:
            tasks: Task names.
            head_outputs: What a task's head gave, tensors with a graph.
            whole_graph: Whether zeros go through the loss that came with a count of 0 to the head, and not only to it.
        """
        some, rows = next(iter(self.named.values())), []
        place = some.get_device()
        for k, task in enumerate(tasks):
            if k not in self.present:
                row = self._zero(task, some, head_outputs(k), whole_graph).to(some.dtype)
            elif self.shares is not None and not some.is_mps:
                # In the backward the mean's own division by n undoes this multiplication: what arrives at an item is
                # its part of the mean over the whole window, as exactly as the loss's precision allows.
                row = (self.named[task] * self.shares.items[task]).double() / self.shares.items[task]
            else:
                row = self.named[task]
            rows.append(row if row.get_device() == place else row.to(some.device))
        v = torch.stack(rows)  # in the widest of their precisions
        return v if v.dtype in (torch.float32, torch.float64) else v.float()

    def _zero(self, task: str, some: Tensor, outputs: list[Tensor], whole_graph: bool) -> Tensor:
        if not torch.is_grad_enabled():
            return some.new_zeros(())
        loss = self.named.get(task)
        if loss is not None and loss.requires_grad and (whole_graph or not outputs):
            for output in outputs:
                output.register_hook(_without_nan)  # type: ignore[no-untyped-call]
            outputs = [*outputs, loss]
        return zero_with_graph(outputs) if outputs else some.new_zeros(())

    def scale(self, like: Tensor) -> Tensor | None:
        """What every task's gradient is divided by besides its factor, ``[K]``: the reciprocal of its count."""
        counts = self._positive_counts(like)
        return None if counts is None else 1 / counts

    def shared(self, w: Tensor | None, like: Tensor) -> Tensor | None:
        """The weights ``w`` (None: 1 each) times the shares, where there are some."""
        if self.shares is None or (counts := self._positive_counts(like)) is None:
            return w
        return counts if w is None else w * counts

    def _positive_counts(self, like: Tensor) -> Tensor | None:
        """On the device; 1 for who is not there."""
        if self.counts is None:
            return None
        counts = [count or 1.0 for count in self.counts]
        return to_device(torch.tensor(counts, dtype=like.dtype), like.device)


def _without_nan(gradient: Tensor) -> Tensor:
    """Zeros that went back through the mean over no items, which divides by 0."""
    return gradient.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)


def _item_counts(
    num_items: Any, losses: Mapping[str, Any], tasks: Sequence[str]
) -> tuple[list[float] | None, frozenset[int]]:
    """Counts per task (None where the block was not counted) and the tasks said to have no items in it."""
    given = num_items if isinstance(num_items, Mapping) else dict.fromkeys(losses, num_items)
    checks.known(given, tasks)
    counts: dict[str, float] = {}
    wrong = {}
    for task, count in given.items():
        if isinstance(count, Tensor) and count.ndim == 0 and count.is_cpu:
            count = count.item()
        number = float(count) if isinstance(count, numbers.Real) and not isinstance(count, bool) else -1.0
        if number >= 0 and number.is_integer():
            counts[task] = number
        else:
            wrong[task] = count
    checks.counts_are_integers(wrong)
    empty = frozenset(tasks.index(task) for task, count in counts.items() if count == 0)
    positive = {task: count for task, count in counts.items() if count > 0}
    if not positive:
        return None, empty
    checks.every_loss_is_counted(losses, counts)
    return [positive.get(task, 0.0) for task in tasks], empty


class Several:
    """The calls of ``backward`` that are one micro-batch."""

    def __init__(self) -> None:
        self.losses: Tensor | None = None
        self.present: set[int] = set()
        self.wrong: dict[int, float] = {}
        self.extras: dict[str, Tensor] = {}
        self._counts: dict[int, float] = {}
        self._calls: list[frozenset[int]] = []

    @property
    def apart(self) -> bool:
        """Whether two of the tasks never came in one call, so that their inner product is not known."""
        return any(
            not any({a, b} <= call for call in self._calls) for a, b in itertools.combinations(sorted(self.present), 2)
        )

    def add(self, losses: Tensor, given: Given, wrong: Mapping[int, float] | None = None) -> None:
        """One call: its detached losses ``[K]``, zeros where absent, and what is wrong with tasks: see ``Window``.

        Raises:
            ValueError: A task came with counts in two calls: the mean of all of its items is not known then.
        """
        if given.counts is not None:
            if twice := self.present & given.present:
                raise _counted_twice([task for k, task in enumerate(given.named) if k in twice])
            self._counts |= {k: given.counts[k] for k in given.present}
        self.losses = losses if self.losses is None else self.losses + losses.to(self.losses)
        self.present |= given.present
        self.wrong |= wrong or {}
        self._calls.append(given.present)

    def add_extras(self, losses: Mapping[str, Tensor]) -> None:
        """Detached losses of one call that were added as they are."""
        for name, loss in losses.items():
            self.extras[name] = self.extras[name] + loss if name in self.extras else loss

    def counts(self, tasks: int) -> list[float] | None:
        """Items per task, or None if nothing was counted."""
        return [self._counts.get(k, 0.0) for k in range(tasks)] if self._counts else None


class Bounds:
    """The bounds of losses: above the upper one a loss is scaled down, and below the lower one it cannot fall.

    Args:
        tasks: Task names.
        largest: ``{task: loss}``.
        smallest: ``{task: loss}``.

    Attributes:
        on_device: Copies of weights and bounds where the losses are.
    """

    def __init__(self, tasks: Sequence[str], largest: Mapping[str, float], smallest: Mapping[str, float]) -> None:
        self.largest, self.smallest = dict(largest), dict(smallest)
        self.on_device = OnDevice()
        self._caps = np.array([largest.get(task, np.inf) for task in tasks]) if largest else None
        self._floors = np.array([smallest.get(task, 0.0) for task in tasks]) if smallest else None

    def capped(self, w: Tensor | None, losses: Tensor) -> Tensor | None:
        """The weights ``w`` (None: 1 each), smaller where a loss is above its bound."""
        if self._caps is None:
            return w
        caps = self.on_device("caps", self._caps, losses)
        losses = losses.detach()
        scale = torch.where(losses > caps, caps / losses, 1.0)
        return scale if w is None else w * scale

    def above(self, statistics: Statistics) -> Statistics:
        """What methods see: losses minus their lower bounds."""
        if self._floors is None:
            return statistics
        return replace(statistics, losses=np.where(statistics.present, statistics.losses - self._floors, 0.0))


class OnDevice:
    """Copies of small host vectors where the losses are; a vector that is handed in again is not copied again."""

    def __init__(self) -> None:
        self._copies: dict[str, tuple[NDArray[Any], Tensor]] = {}

    def __call__(self, name: str, values: NDArray[Any], like: Tensor) -> Tensor:
        """``values`` on the device and in the precision of ``like``.

        Args:
            name: What they are.
            values: An array that is replaced, never changed in place.
            like: Where they are wanted.
        """
        kept = self._copies.get(name)
        if kept is not None and kept[0] is values and kept[1].dtype == like.dtype and kept[1].device == like.device:
            return kept[1]
        with torch.inference_mode(False):  # what is kept must be of use in training
            copy = to_device(torch.tensor(values, dtype=like.dtype), like.device)
        self._copies[name] = values, copy
        return copy


def _counted_twice(tasks: Sequence[str]) -> ValueError:
    """Counts of a task in two calls of one micro-batch."""
    names = ", ".join(f"`{task}`" for task in tasks)
    return ValueError(
        f"Task {names} came with `num_items` in two calls of one micro-batch: the mean over all of its items is not "
        "known then. Give its loss in one call."
    )
