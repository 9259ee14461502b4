"""Shapes of model on two processes: exact against backwards by hand on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accel_weighting import MGDA, GradNorm, Weighter
from tests.ranks import accelerator_for, run_ranks, warnings_said
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
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
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
        there = [p.grad is not None for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return list(weighter.weights.values()), there


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2"])
def test_a_task_left_out_on_one_process_leaves_no_parameter_unused(engine, tmp_path: Any) -> None:
    first, second = run_ranks(left_out, 2, tmp_path, engine)
    assert first[0] == second[0]
    assert engine == "fsdp1" or all(first[1])  # which keeps None where a process has no piece of a parameter


class Outputs(nn.Module):
    """Gives its heads' outputs as they are: losses are made of them outside."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(4, 8), nn.ModuleDict({task: nn.Linear(8, 1) for task in "ab"})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        z = self.trunk(x).tanh()
        return {task: head(z) for task, head in self.heads.items()}


def mean_over(how: str, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Not a number where there is nothing to take the mean over."""
    if how == "a mask":
        return (b.square() * mask).sum() / mask.sum()
    if how == "a slice":
        return b[mask.bool()].square().mean()
    return nn.functional.cross_entropy(torch.cat([b, -b], 1), torch.where(mask[:, 0].bool(), 1, -100))


def without_items(engine: str, how: str) -> dict[str, list[Any]]:
    """Task b has no items in the first of two blocks in every other step; one process takes both, as micro-batches."""
    blocks = 2 if engine == "plain" else 1
    accelerator = accelerator_for(
        engine, zero={"stage3_param_persistence_threshold": 0}, gradient_accumulation_steps=blocks
    )
    torch.manual_seed(0)
    net = Outputs()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    heads = {task: f"heads.{task}" for task in "ab"}
    weighter = Weighter(GradNorm(alpha=0.0), ["a", "b"], heads=heads, model=model, accelerator=accelerator)
    seen: dict[str, list[Any]] = {"weights": [], "losses": [], "norms": []}
    for step in range(5):
        torch.manual_seed(step)
        rows, has_b = torch.randn(2, 4, 4), torch.ones(2, 4, 1)
        has_b[0] = float(step % 2 == 0)
        for block in range(accelerator.process_index, accelerator.process_index + blocks):
            with accelerator.accumulate(model):
                out = model(rows[block])
                items = {"a": 4, "b": int(has_b[block].sum())}
                losses = {"a": out["a"].square().mean(), "b": mean_over(how, out["b"], has_b[block])}
                weighter.backward(losses, num_items=items)
                optimizer.step()
                optimizer.zero_grad()
        statistics = weighter.statistics
        assert statistics is not None and statistics.norms is not None
        seen["weights"].append(list(weighter.weights.values()))
        seen["losses"].append(statistics.losses.tolist())
        seen["norms"].append(statistics.norms.tolist())
    return seen


MEANS = ("a mask", "a slice", "labels to ignore")


def all_without_items(engine: str) -> list[dict[str, list[Any]]]:
    return [without_items(engine, how) for how in MEANS]


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_a_task_without_items_on_one_process_is_weighed_as_on_the_whole_batch(engine, tmp_path: Any) -> None:
    """DeepSpeed's ZeRO-3 waits without end where a process does not use an output of the model that another uses."""
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    first, second = run_ranks(all_without_items, 2, tmp_path, engine, timeout=120)
    assert first == second
    for how, found in zip(MEANS, first, strict=True):
        whole = without_items("plain", how)
        for name in found:
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(whole[name]), rtol=1e-5, atol=1e-6)


def left_out_everywhere(engine: str) -> list[str]:
    """What is logged where no process has a loss of task b, though its head was called."""
    accelerator = accelerator_for(engine)
    model, optimizer = accelerator.prepare(net := Outputs(), torch.optim.SGD(net.parameters(), 0.1))
    heads = {task: f"heads.{task}" for task in "ab"}
    weighter = Weighter(GradNorm(), ["a", "b"], heads=heads, model=model, accelerator=accelerator)
    with warnings_said() as messages:
        for step in range(4):
            out = model(torch.ones(2, 4))
            weighter.backward({task: out[task].square().mean() for task in ("ab" if step % 2 == 0 else "a")})
            optimizer.step()
            optimizer.zero_grad()
    return messages


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_a_loss_that_may_be_missing_on_one_process_alone_is_said_under_zero3(engine, tmp_path: Any) -> None:
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    for messages in run_ranks(left_out_everywhere, 2, tmp_path, engine, timeout=120):
        assert len(messages) == (engine == "zero3")
        assert all('`num_items={"b": 0}`' in message for message in messages)


def forgotten_model(prepared: bool) -> list[str]:
    """What is logged of a training whose model was prepared, or was not."""
    accelerator, net = accelerator_for("ddp"), Outputs()
    model = accelerator.prepare(net) if prepared else net
    optimizer = accelerator.prepare(torch.optim.SGD(net.parameters(), 0.1))
    heads = {task: f"heads.{task}" for task in "ab"}
    weighter = Weighter(GradNorm(), ["a", "b"], heads=heads, model=model, accelerator=accelerator)
    with warnings_said() as messages:
        for _ in range(2):
            out = model(torch.ones(2, 4) + accelerator.process_index)
            weighter.backward({task: out[task].square().mean() for task in "ab"})
            optimizer.step()
            optimizer.zero_grad()
    return messages


@pytest.mark.parametrize("prepared", [True, False])
def test_a_model_that_was_not_prepared_is_said_once(prepared: bool, tmp_path: Any) -> None:
    first, second = run_ranks(forgotten_model, 2, tmp_path, prepared)
    assert second == [] and len(first) == (not prepared)
    assert all("no model did" in message and "accelerator.prepare(model, optimizer" in message for message in first)
