"""Tasks that own rows of one tensor, and no heads: which row is whose, and what is wrong with a list of owners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KEY = "accel_weighting rows"
"""By which, with the key of its branch, the node of a tensor whose rows belong to tasks is known."""


@dataclass(frozen=True)
class Rows:
    """The owners of the rows of one tensor.

    Attributes:
        index: The task of every row, on the tensor's device, of the owners' shape; K for none.
        owned: The tasks that own rows; None where that is not known without waiting for a device.
    """

    index: Tensor
    owned: frozenset[int] | None

    @classmethod
    def of(cls, z: Tensor, owner: Tensor, tasks: int) -> Rows:
        """Those that were given, checked as far as they can be looked at without waiting.

        Raises:
            ValueError: An owner is no task.
        """
        owned = None
        if owner.is_cpu:
            found = set(owner.flatten().tolist())
            if wrong := sorted(found - set(range(-1, tasks))):
                raise _out_of_range(wrong, tasks)
            owned = frozenset(found - {-1})
        index = owner.to(z.device, torch.int64, non_blocking=True)
        return cls(torch.where(index == -1, tasks, index), owned)

    def mark(self, z: Tensor, key: int) -> None:
        """Says to who walks the graph that the rows of ``z`` belong to tasks; it is kept as long as the graph is."""
        edge = torch.autograd.graph.get_gradient_edge(z)
        known: Any = edge.node.metadata
        known.setdefault((KEY, key), {})[edge.output_nr] = self

    def weights(self, w: Tensor, z: Tensor) -> Tensor:
        """The weight of every row's task, 1 for rows of none, of the shape that multiplies ``z``."""
        by_task = torch.cat([w, w.new_ones(1)]).to(z.dtype)
        return by_task[self.index.clamp(0, len(w))].reshape(*self.index.shape, *[1] * (z.ndim - self.index.ndim))


def check(z: Any, owner: Any) -> None:
    """What ``rows`` was given, without a look at the owners themselves.

    Raises:
        TypeError: It is no tensor of the right kind.
        ValueError: The shapes do not go together.
    """
    if not isinstance(z, Tensor) or not (z.is_floating_point() or z.is_complex()):
        found = str(z.dtype) if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(f"`weighter.rows(z, owner)` measures one floating-point tensor `z`. Found {found}.")
    integer = isinstance(owner, Tensor) and owner.dtype in (
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
    if not integer:
        found = f"a tensor of {owner.dtype}" if isinstance(owner, Tensor) else type(owner).__name__
        raise TypeError(
            "`owner` in `weighter.rows(z, owner)` must be an integer tensor: for every row the place of its task in "
            f"`tasks`, -1 for none. Found {found}."
        )
    if not 0 < owner.ndim < z.ndim or z.shape[: owner.ndim] != owner.shape:
        raise ValueError(
            "`owner` in `weighter.rows(z, owner)` must have the shape of `z` without its features, or without its "
            f"trailing dimensions: `z` has the shape {list(z.shape)}. Found {list(owner.shape)}."
        )


# ---- messages ----------------------------------------------------------------------------------------------------


def _out_of_range(wrong: Sequence[int], tasks: int) -> ValueError:
    return ValueError(
        f"`owner` in `weighter.rows(z, owner)` must be -1 (no task) or the place of a task, 0 to {tasks - 1}. Found "
        f"{', '.join(map(str, wrong[:5]))}."
    )


def rows_and(other: str) -> RuntimeError:
    """Rows beside another place at which gradients are taken."""
    return RuntimeError(
        f"This weighter was built with `{other}`, where gradients are compared: do not call `weighter.rows(z, owner)` "
        "too."
    )


def rows_without_products(method: str) -> ValueError:
    """A method that needs what is 0 by construction."""
    return ValueError(
        f"{method} needs the inner products of the tasks' gradients, and tasks that own different rows of one tensor "
        "have none there: they are exactly 0. Give `shared_layer`, the layer whose output `z` is, at whose weight all "
        "rows meet, or use a method that needs norms (GradNorm) or losses only."
    )


def rows_do_not_rotate(method: str) -> ValueError:
    """A rotation for each task, and one tensor for all."""
    return ValueError(f"{method} rotates what each task's head reads, and `weighter.rows` passes one tensor to all.")


def rows_twice() -> RuntimeError:
    """One tensor was given twice."""
    return RuntimeError(
        "`weighter.rows(z, owner)` was called twice with one `z` in a forward, which would be measured twice. Call it "
        "once, with the owners of all of its rows."
    )


def rows_of_features(owner: Sequence[int]) -> ValueError:
    """A convolution's samples are its rows."""
    return ValueError(
        "Where `shared_layer` is a convolution, `owner` in `weighter.rows(z, owner)` names the task of every sample: "
        f"shape [batch]. Found {list(owner)}."
    )


def no_rows(tasks: Sequence[str]) -> RuntimeError:
    """Losses none of whose rows came."""
    names = ", ".join(f"`{task}`" for task in tasks)
    return RuntimeError(
        f"Loss {names} was given, and no row of the tensor in `weighter.rows(z, owner)` belongs to it, or no gradient "
        "came there. `owner` holds the places of tasks in `tasks`. A task without rows in a batch is left out of "
        "`losses`."
    )
