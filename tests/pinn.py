"""A model whose tasks share parameters and no tensor, and the statistics at them by hand.

Three tasks, each on samples of its own: a residual with second derivatives, values on a boundary, and slopes that are
known. Nothing of the library is used here: gradients of every task come from `torch.autograd.grad` on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

TASKS = ["pde", "boundary", "slopes"]
SHARED = ["body.hidden.weight", "body.hidden.bias"]
ROWS = {"pde": 12, "boundary": 12, "slopes": 12}
"""Samples of the whole batch."""


class Body(nn.Module):
    """In a unit of its own under FSDP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden = nn.Linear(2, 7), nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.hidden(torch.tanh(self.first(x))))


class PINN(nn.Module):
    """u(x, y)."""

    _no_split_modules = ("Body",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.last = Body(), nn.Linear(6, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        u: Tensor = self.last(self.body(x))
        return u


def batch(step: int) -> dict[str, Tensor]:
    """The points of the whole batch, by task."""
    generator = torch.Generator().manual_seed(step)
    return {task: torch.rand(rows, 2, generator=generator, dtype=torch.float64) for task, rows in ROWS.items()}


def part(points: Mapping[str, Tensor], i: int, of: int) -> dict[str, Tensor]:
    """Block i of so many equal ones."""
    return {task: x.chunk(of)[i] for task, x in points.items()}


def slope(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def residual(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of Δu + u² = sin(3x)."""
    x = x.clone().requires_grad_()
    y = u(x)
    y_x = slope(y, x)
    laplace = sum(slope(y_x[:, i], x)[:, i] for i in range(2))
    loss: Tensor = (laplace + y[:, 0].square() - torch.sin(3 * x[:, 0])).square().mean()
    return loss


def boundary(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (u(x)[:, 0] - x.sum(1)).square().mean()


def slopes(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return (slope(u(x), x) - 0.5).square().mean()


LOSSES = {"pde": residual, "boundary": boundary, "slopes": slopes}

Context = Callable[[str], AbstractContextManager[Any]]


def losses_of(
    u: Callable[[Tensor], Tensor], points: Mapping[str, Tensor], task: Context = lambda name: nullcontext()
) -> dict[str, Tensor]:
    """The three losses, each from a forward of its own, in its task's context."""
    losses = {}
    for name, x in points.items():
        with task(name):
            losses[name] = LOSSES[name](u, x)
    return losses


def gradients_by_hand(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """``[K, |W|]``: every task's gradient at the parameters, by `torch.autograd.grad`; zeros where it needs none."""
    rows = []
    for loss in losses.values():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)
