"""What the tests in one process share: a small model, its statistics by hand, and an accelerator that is not there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.scenarios import Net, batch, task_losses

TASKS = ["depth", "seg"]


def net(tasks: list[str] = TASKS) -> Net:
    torch.manual_seed(0)
    return Net(tasks).double()


def losses_of(model: Callable[[Tensor], dict[str, Tensor]], step: int = 0, tasks: int = 2) -> dict[str, Tensor]:
    x, y = batch(step, tasks, torch.float64)
    return task_losses(model(x), y)


def representation(model: Net, x: Tensor) -> Tensor:
    x = model.embed(x)
    for block in model.blocks:
        x = block(x)
    return model.shared(x)


def gradients_by_hand(model: Net, step: int = 0) -> Tensor:
    """Every task's gradient at the shared representation, ``[K, rows * width]``, from backwards of their own."""
    x, y = batch(step, len(model.heads), torch.float64)
    z = representation(model, x).detach().requires_grad_()
    losses = task_losses({task: head(z) for task, head in model.heads.items()}, y)
    return torch.stack([torch.autograd.grad(loss, z)[0].flatten() for loss in losses.values()])


def fake_accelerator(sync: bool = True, **changes: Any) -> Any:
    """What the weighter asks of an accelerator in one process; the test says when gradients are synchronised."""
    given = {
        "distributed_type": SimpleNamespace(value="NO"),
        "num_processes": 1,
        "even_batches": True,
        "gradient_state": SimpleNamespace(active_dataloader=None),
        "sync_gradients": sync,
        "scaler": None,
        "mixed_precision": "no",
        "_models": [],
        "register_for_checkpointing": lambda weighter: None,
        "backward": lambda total, **kwargs: total.backward(**kwargs),
    }
    return SimpleNamespace(**given | changes)
