"""How many items of each task are where: in the micro-batches of an optimizer step, and in an evaluation set.

A model's loss is the mean over the items of its batch. The mean over all items of a window, or of an evaluation set, is
the mean of those means, weighed by their counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel_weighting.losses import Shares

IGNORED = -100
"""The label of what is no item, as in ``torch.nn.functional.cross_entropy``."""

Gather = Callable[[Sequence[float]], list[float]]
"""Adds up numbers over processes."""


def count_labels(inputs: Mapping[str, Any], tasks: Sequence[str], shifted: bool) -> dict[str, int]:
    """Items by task: what the collator counted, or else labels that are neither -100 nor NaN.

    See ``WeightingMixin.count_items``.

    Args:
        inputs: A batch.
        tasks: Task names.
        shifted: Whether the model predicts a label from what is before it, so that the first of every row is no item.

    Returns:
        ``{task: count}``, without those that cannot be counted.
    """
    counted = inputs.get("num_items")
    if counted is not None:
        return dict(_by_task(counted, tasks))
    labels = {task: label for task in tasks if (label := _labels_of(task, inputs, shifted)) is not None}
    if not labels:
        return {}
    counts = torch.stack([_is_item(label).sum() for label in labels.values()]).tolist()  # waits once
    return dict(zip(labels, counts, strict=True))


def _is_item(label: Tensor) -> Tensor:
    found = label.ne(IGNORED)
    return found & ~label.isnan() if label.is_floating_point() else found


def _labels_of(task: str, inputs: Mapping[str, Any], shifted: bool) -> Tensor | None:
    shared = inputs.get("labels")
    own = [inputs.get(f"labels_{task}"), inputs.get(f"{task}_labels"), inputs.get(task)]
    if isinstance(shared, Mapping):
        own.append(shared.get(task))
    elif isinstance(shift := inputs.get("shift_labels"), Tensor):
        own.append(shift)
    elif isinstance(shared, Tensor):
        own.append(shared[..., 1:] if shifted and shared.ndim > 1 else shared)
    return next((label for label in own if isinstance(label, Tensor)), None)


def _by_task(counted: Any, tasks: Sequence[str]) -> dict[str, int]:
    """What ``count_items`` gave, by task and checked; tasks that were not counted are left out."""
    given = counted if isinstance(counted, Mapping) else dict.fromkeys(tasks, counted)
    counts, wrong = {}, {}
    for task, count in given.items():
        number = count.item() if isinstance(count, Tensor) and count.ndim == 0 else count
        if number is None and task in tasks:
            continue
        whole = isinstance(number, (int, float, np.number)) and not isinstance(number, bool) and float(number) >= 0
        if task in tasks and whole and float(number).is_integer():
            counts[task] = int(number)
        else:
            wrong[task] = count
    if wrong:
        raise _no_counts(wrong, tasks)
    return counts


class ItemsOfWindow:
    """The items of one optimizer step's micro-batches.

    Args:
        tasks: Task names.
        counted: For every micro-batch of this process, what ``count_items`` gave.
        gather: Adds up over processes; None: this process alone.
        copies: How many processes count the same items, because they divide each sequence among them.
    """

    def __init__(
        self, tasks: Sequence[str], counted: Sequence[Any], gather: Gather | None = None, copies: int = 1
    ) -> None:
        self.tasks = tuple(tasks)
        self._counts = [{} if of is None else _by_task(of, tasks) for of in counted]
        self._at = -1
        sums = [float(sum(of.get(task, 0) for of in self._counts)) for task in tasks] + [float(len(counted))]
        *totals, self.micro_batches = sums if gather is None else gather(sums)
        self._totals = {task: total / copies for task, total in zip(tasks, totals, strict=True)}

    def next(self) -> bool:
        """The next micro-batch begins; whether there is one."""
        self._at += 1
        return self._at < len(self._counts)

    @property
    def here(self) -> Mapping[str, int]:
        """Items of the micro-batch by task, without those that were not counted."""
        return self._counts[self._at]

    @property
    def uncounted(self) -> list[str]:
        """Tasks of which some micro-batch of this process was not counted, nor one of any process."""
        missing = {task for task in self.tasks for of in self._counts if task not in of}
        return [task for task in self.tasks if task in missing and not self._totals[task]]

    def recount(self, counted: Any) -> None:
        """What the micro-batch holds on this process, where its sequences are divided."""
        self._counts[self._at] = {} if counted is None else _by_task(counted, self.tasks)

    def shares(self, losses: Any, said: Any) -> Shares | dict[str, int] | None:
        """The micro-batch's shares of the window, for ``weighter.combine(num_items=...)``.

        Args:
            losses: Its losses, by task.
            said: ``num_items`` that the model gave, or None.

        Raises:
            ValueError: Losses or ``said`` do not go with the counts.
        """
        self._check(losses, said)
        total, here = self._totals, self.here
        # A task that was counted nowhere has one item in every micro-batch, but for those where it is not.
        items = {task: here.get(task, 0 if total[task] else 1) for task in self.tasks}
        means = {task: total[task] / self.micro_batches if total[task] else 1.0 for task in self.tasks}
        if all(n in (0, means[task]) for task, n in items.items()):
            return {task: 0 for task, n in items.items() if not n} or None
        return Shares(items, means)

    def _check(self, losses: Any, said: Any) -> None:
        here = self.here
        if isinstance(losses, Mapping):
            if any(task not in self.tasks for task in losses):
                return  # which `combine` says, and what the names should be
            if lost := {task: n for task, n in here.items() if n and task not in losses}:
                raise _items_without_a_loss(lost)
            if new := [task for task in losses if task not in here and self._totals.get(task)]:
                raise _loss_without_items(new)
        if said is not None:
            found = _by_task(said, self.tasks)
            # A task that was not counted may have any number of items, but for none.
            if differ := {task: n for task, n in found.items() if n != here.get(task, n or -1)}:
                raise _said_otherwise(differ, {task: here.get(task) for task in differ})


class TaskMeans:
    """Every task's mean loss over all items of an evaluation set.

    Args:
        tasks: Task names.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tuple(tasks)
        self._sums = torch.zeros(4, len(tasks), dtype=torch.float64)
        self._last: Tensor | None = None

    @property
    def has_last(self) -> bool:
        """Whether the latest batch gave losses."""
        return self._last is not None

    def settle(self) -> None:
        """The latest batch counts as it is."""
        if self._last is not None:
            self._sums += self._last
        self._last = None

    def see(self, losses: Mapping[str, Tensor], counts: Mapping[str, int], rows: int) -> None:
        """The latest batch; once more in place of what was seen of it before.

        Args:
            losses: Means over its items.
            counts: Items by task; of a task that is not counted, rows are.
            rows: Its number of rows.
        """
        self._last = torch.zeros_like(self._sums)
        for k, task in enumerate(self._tasks):
            number = counts.get(task, rows)
            if task in losses and number:
                first = 0 if task in counts else 2
                self._last[first, k], self._last[first + 1, k] = number * float(losses[task]), number

    def means(self, gather: Gather) -> dict[str, float]:
        """Over all processes; without tasks that were not there.

        Raises:
            ValueError: A task's items were counted in some batches, and not in others.
        """
        self.settle()
        loss, items, loss_by_rows, rows = np.reshape(gather(self._sums.flatten().tolist()), (4, -1)).tolist()
        if mixed := [task for task, n, m in zip(self._tasks, items, rows, strict=True) if n and m]:
            raise _loss_without_items(mixed)
        return {
            task: (loss[k] or loss_by_rows[k]) / number
            for k, task in enumerate(self._tasks)
            if (number := items[k] or rows[k])
        }


def first_rows(inputs: Any, number: int, rows: int) -> Any:
    """The first rows of a batch of ``rows``."""
    if isinstance(inputs, Tensor):
        return inputs[:number] if inputs.ndim and len(inputs) == rows else inputs
    if isinstance(inputs, Mapping):
        return {name: first_rows(value, number, rows) for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return [first_rows(value, number, rows) for value in inputs]
    return inputs


# ---- messages ----------------------------------------------------------------------------------------------------


def _no_counts(wrong: Mapping[str, Any], tasks: Sequence[str]) -> ValueError:
    """Counts that are none, or of no task."""
    return ValueError(
        f"Counts of items must be whole numbers of at least 0 by task, of the tasks {list(tasks)}. Found {dict(wrong)}."
    )


def _items_without_a_loss(lost: Mapping[str, int]) -> ValueError:
    """A task that was counted, and gave no loss."""
    return ValueError(
        f"Items were counted in this micro-batch of tasks that gave no loss: {dict(lost)}. The losses of the other "
        "micro-batches would be weighed as if these items were there: let `count_items(inputs)` return 0 for a task "
        "that is not in a micro-batch."
    )


def _loss_without_items(tasks: Sequence[str]) -> ValueError:
    """A task that gave a loss and was not counted, though it was elsewhere."""
    return ValueError(
        f"The items of {list(tasks)} were counted in some batches and not in others, which gave losses too: the mean "
        "over all items is not known. Override `count_items(inputs)`, so that it counts them in every batch."
    )


def _said_otherwise(said: Mapping[str, int], counted: Mapping[str, int | None]) -> ValueError:
    """The model counts other items than we do."""
    return ValueError(
        f"The model says in `num_items` that its losses are over {dict(said)} items, and {dict(counted)} were counted "
        "before its forward (None: not counted). A window's items must be known before its first forward: let the "
        "collator put `num_items` into the batch, or override `count_items(inputs)`."
    )
