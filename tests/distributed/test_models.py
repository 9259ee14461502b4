"""Shapes of model on two processes: exact against backwards by hand on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accel_weighting import MGDA, GradNorm, Weighter
from tests.ranks import accelerator_for, run_ranks
from tests.shapes import SHAPES, Model, largest_error, losses_of


def errors_of(engine: str) -> dict[str, float]:
    cells = [(name, route) for name, shape in SHAPES.items() for route in shape.routes if name != "complex"]
    return {
        f"{name}, {route}, {type(method).__name__}": largest_error(name, route, method, lag, engine)
        for name, route in cells
        for method, lag in ((GradNorm(alpha=0.0), 1), (MGDA(), 0))
    }


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_several_tensors_on_two_processes(engine, tmp_path: Any) -> None:
    for found in run_ranks(errors_of, 2, tmp_path, engine, timeout=150):
        assert max(found.values()) < 1e-12, found


def left_out(engine: str) -> tuple[list[float], list[bool]]:
    """On every process another task is left out of the losses, and its head was called."""
    accelerator = accelerator_for(engine)
    torch.manual_seed(0)
    net = Model(SHAPES["a skip connection"])
    model, _ = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    weighter = Weighter(
        GradNorm(alpha=0.0),
        ["a", "b"],
        heads={t: f"heads.{t}" for t in "ab"},
        model=model,
        accelerator=accelerator,
    )
    for step in range(3):
        torch.manual_seed(step)
        losses = losses_of(model(torch.randn(2, 5, 4).double()))
        weighter.backward({"ab"[accelerator.process_index]: losses["ab"[accelerator.process_index]]})
    return list(weighter.weights.values()), [p.grad is not None for p in model.parameters()]


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2"])
def test_a_task_left_out_on_one_process_leaves_no_parameter_unused(engine, tmp_path: Any) -> None:
    first, second = run_ranks(left_out, 2, tmp_path, engine)
    assert first[0] == second[0]
    assert engine == "fsdp1" or all(first[1])  # which keeps None where a process has no piece of a parameter
