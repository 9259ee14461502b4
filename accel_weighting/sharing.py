"""Where tasks share neither heads nor a tensor of their own: parameters, or rows of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .loop import Loop
from .parameters import SharedParameters, check_goes_with, missed, no_shared_parameters
from .rows import check as check_rows
from .rows import no_rows, rows_and, rows_do_not_rotate, rows_without_products
from .verdict import GRADIENTS
from .window import Layout, Window


class Sharing(Loop):
    """The part of a weighter that is told which forwards and which rows are whose."""

    _accelerator: Callable[[], Any] | None

    def task(self, name: str) -> AbstractContextManager[None]:
        """``with``: forwards in it are those of one task, and use its own alias of the shared parameters.

        In the one backward the gradient of that task's loss at them arrives apart from the others', whatever the loss
        contains: derivatives of the model's output (``torch.autograd.grad(…, create_graph=True)``) too. Several
        forwards of one task add up. While the weighter is frozen, between updates, and with gradients disabled it does
        nothing.

        Args:
            name: The task.

        Raises:
            RuntimeError: The weighter was built without ``shared_parameters``, or the context of a task is open.
            ValueError: There is no such task.
        """
        branch = self._branch
        if branch.parameters is None:
            raise no_shared_parameters()
        checks.known([name], self.tasks)
        measured = self._measuring and torch.is_grad_enabled() and not self._optimizers.paused
        return branch.parameters.of(self.tasks.index(name), measured, branch.at_parameter, branch.key)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def rows(self, z: Tensor, owner: Tensor) -> Tensor:
        """Tasks own samples and no heads: gradients at ``z`` are measured by the owner of each row.

        For data sets, domains or languages behind one head. Each loss is computed from the rows of its own task; that
        is looked at once, by the value of its gradient at ``z``. Gives norms; with ``shared_layer`` inner products at
        its weight too.

        Args:
            z: The shared representation, ``[batch, …]``.
            owner: For every row the place of its task in ``tasks``, -1 for none (padding): an integer tensor of the
                shape of ``z`` without its features, or without its trailing dimensions. On the CPU it is looked at;
                on another device a place that is no task's holds the weights.

        Returns:
            ``z`` itself.

        Raises:
            TypeError, ValueError: ``owner`` breaks a rule, or the method needs inner products without ``shared_layer``.
            RuntimeError: The weighter was built with ``heads`` or ``shared_parameters``. A loss whose gradient comes to
                rows of another task is an error of ``backward``, where the method compares gradients.
        """
        branch = self._branch
        check_rows(z, owner)
        if branch.heads is not None or branch.parameters is not None:
            raise rows_and("heads" if branch.heads is not None else "shared_parameters")
        if self._rotations is not None:
            raise rows_do_not_rotate(str(self.method))
        if "gram" in self.method.needs and branch.shared_layer is None:
            raise rows_without_products(str(self.method))
        branch.rows(z, owner)
        return z

    def _parameters_of(
        self, given: Any, model: nn.Module | None, rotates: bool, others: Mapping[str, Any]
    ) -> SharedParameters | None:
        """The parameters at which gradients are taken."""
        if given is None:
            return None
        check_goes_with(str(self.method), rotates, self.lag, others)
        accelerator: Any = self._accelerator or (lambda: None)
        return SharedParameters(given, model, lambda: list(getattr(accelerator(), "_models", ())), self.tasks)

    def _measured(self, at_parameters: bool) -> Sequence[str]:
        """The tasks whose gradients must come."""
        if self.method.needs & GRADIENTS:
            return self.method.measures(self.tasks)
        return self.tasks if at_parameters else ()

    def _shared_settings(self, layout: Layout) -> dict[str, Any]:
        """Where gradients are taken, as far as that is at weights."""
        parameters = self._branch.parameters
        return {
            "shared_layer": None if parameters is not None else layout.matrices,
            "shared_parameters": None if parameters is None else parameters.shapes,
        }

    def _why_missed_elsewhere(self, missed_tasks: Sequence[str], window: Window) -> RuntimeError | None:
        """The error for tasks of which no gradient came to a parameter, or to their rows."""
        if (parameters := self._branch.parameters) is not None:
            unused = {task: parameters.unused(self.tasks.index(task), window.used) for task in missed_tasks}
            return missed(missed_tasks, unused, parameters.labels)
        return no_rows(missed_tasks) if window.by_rows else None
