"""`examples/pinn.py` by GradNorm at a parameter, beside the same training by hand."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import accelerator_for, run_ranks

STEPS, POINTS = 20, 12
Run = tuple[list[Tensor], list[list[float]]]


def example() -> ModuleType:
    folder = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, folder)
    try:
        import pinn
    finally:
        sys.path.remove(folder)
    return pinn


def by_hand(start: str, lr: float) -> Run:
    """On one process and the whole batch: `torch.autograd.grad` per task, and eq. 2 of the paper for the weights."""
    pinn = example()
    torch.manual_seed(0)
    net = pinn.Net().double()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    v = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    of_weights = torch.optim.Adam([v], lr=lr)
    generator, seen = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        w = 2 * v.softmax(0)
        losses = pinn.losses_of(net, *pinn.draw_points(POINTS, generator), 2, nullcontext)
        L = torch.stack([losses[task] for task in pinn.TASKS])
        n = torch.stack([torch.autograd.grad(loss, net.shared.weight, retain_graph=True)[0].norm() for loss in L])
        optimizer.zero_grad()
        (w.detach() @ L).backward()
        optimizer.step()
        if start == "balanced" and step == 0:
            v.data = -n.log()
        else:
            G = w * n
            v.grad = torch.autograd.grad((G - G.mean().detach()).abs().sum(), v)[0]
            of_weights.step()
        seen.append((2 * v.detach().softmax(0)).tolist())
    return [p.detach() for p in net.parameters()], seen


def by_weighter(start: str, lr: float, engine: str) -> Run:
    from accel_weighting import GradNorm

    pinn = example()
    accelerator = accelerator_for(engine)  # type: ignore[arg-type]
    torch.manual_seed(0)
    net = pinn.Net().double()
    model, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters(), lr=5e-3))
    pinn.METHODS["tried"] = GradNorm(alpha=0.0, start=start, lr=lr)  # type: ignore[arg-type]
    weighter = pinn.make_weighter("tried", net, accelerator, update_every=1)
    generator, seen = torch.Generator().manual_seed(0), []
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    for _ in range(STEPS):
        inside, boundary = pinn.draw_points(POINTS, generator)
        weighter.backward(pinn.losses_of(model, inside[share], boundary[share], 2, weighter.task))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(list(weighter.weights.values()))
    return [p.detach() for p in net.parameters()], seen


def off(found: Run, right: Run) -> float:
    """Largest relative error of a parameter at the end, or of a step's weights."""
    parameters = max(float((p - q).norm() / q.norm()) for p, q in zip(found[0], right[0], strict=True))
    weights = [
        abs(a / b - 1)
        for mine, theirs in zip(found[1], right[1], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    return max(parameters, *weights)


@pytest.mark.parametrize(("engine", "world"), [("plain", 1), ("ddp", 2)], ids=["one process", "two processes"])
@pytest.mark.parametrize("start", ["equal", "balanced"])
def test_twenty_steps_are_those_by_hand(start: str, engine: str, world: int, tmp_path: Any) -> None:
    right = by_hand(start, 0.1)
    assert abs(right[1][-1][0] - 1) > 0.3  # the weights went far
    for found in run_ranks(by_weighter, world, tmp_path, start, 0.1, engine, timeout=120):
        assert off(found, right) < 1e-9


def test_the_comparison_notices_another_learning_rate_of_the_weights() -> None:
    assert off(by_hand("balanced", 0.11), by_hand("balanced", 0.1)) > 1e-4
