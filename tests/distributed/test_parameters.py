"""Gradients at shared parameters on real processes: any cut of the global batch, under DDP and FSDP2.

Every statistic, every weight and every gradient of the model is held against one process on the whole batch, by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from accel_weighting import CoVWeighting, GradNorm, Statistics, Weighter
from accel_weighting.processes import Processes
from tests.derivatives import full
from tests.pinn import PINN, SHARED, TASKS, batch, gradients_by_hand, losses_of, part
from tests.ranks import accelerator_for, run_ranks

STEPS = 2
Seen = tuple[Tensor, Tensor, dict[str, float], dict[str, Tensor]]


def whole(model: nn.Module) -> None:
    """FSDP2 keeps parameters whole between the backwards of derivatives, until the optimizer steps."""
    if hasattr(model, "set_reshard_after_backward"):
        model.set_reshard_after_backward(False)


def divide(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def measured(engine: Any, micro: int, early: bool = False, carried: bool = False, **options: Any) -> list[Seen]:
    """At every step: losses, Gram matrix, weights, gradients of the model."""
    fsdp = {"fsdp": {"reshard_after_forward": False}} if engine in ("fsdp2", "hsdp") else {}
    accelerator = accelerator_for(engine, gradient_accumulation_steps=micro, **fsdp)
    net = PINN()
    arguments: Any = {"tasks": TASKS, "accelerator": accelerator, "shared_parameters": SHARED, **options}
    method = CoVWeighting() if carried else GradNorm(lr=0.1)
    weighter = Weighter(method, model=net, **arguments) if early else None
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.05))
    weighter = weighter or Weighter(method, model=model, **arguments)
    whole(model)
    world, rank = accelerator.num_processes, accelerator.process_index
    seen = []
    for step in range(STEPS):
        for i in range(rank * micro, (rank + 1) * micro):
            with accelerator.accumulate(model):
                losses = losses_of(model, part(batch(step), i, world * micro), weighter.task)
                if carried:
                    total = sum(weight * losses[task] for task, weight in weighter.coefficients().items())
                    accelerator.backward(weighter.attach(total))
                    weighter.step()
                else:
                    weighter.backward(losses)
        divide(model)
        gradients = {name.removeprefix("module."): full(p.grad) for name, p in model.named_parameters()}
        gradients = {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
        optimizer.step()
        optimizer.zero_grad()
        found = weighter.statistics
        seen.append((torch.tensor(found.losses), torch.tensor(found.gram), weighter.weights, gradients))
        torch.testing.assert_close(torch.tensor(found.norms), torch.tensor(found.gram).diagonal().sqrt())
    return seen


CUTS = [
    ("plain", 1, 1),
    ("plain", 1, 3),
    ("ddp", 1, 1),
    ("ddp", 1, 3),
    ("ddp", 2, 1),
    ("ddp", 2, 3),
    ("fsdp2", 1, 1),
    ("fsdp2", 1, 3),
    ("fsdp2", 2, 1),
    ("fsdp2", 2, 3),
    pytest.param("hsdp", 4, 1, marks=pytest.mark.full),
    pytest.param("hsdp", 4, 3, marks=pytest.mark.full),
]


def check(seen: list[Seen], start: float = 1.0) -> None:
    """Against one process on the whole batch, no library: the weights that the weighter had multiply the losses."""
    net = PINN()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    weights = dict.fromkeys(TASKS, start)
    for step, (losses, gram, after, gradients) in enumerate(seen):
        named = dict(net.named_parameters())
        expected = losses_of(net, batch(step))
        G = gradients_by_hand(expected, [named[name] for name in SHARED])
        sum(weights[task] * loss for task, loss in expected.items()).backward()  # type: ignore[union-attr]
        torch.testing.assert_close(losses, torch.stack([*expected.values()]).detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gram, G @ G.T, rtol=1e-12, atol=1e-14)
        for name, p in named.items():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-12, atol=1e-14)
        optimizer.step()
        optimizer.zero_grad()
        weights = after


@pytest.mark.parametrize(("engine", "world", "micro"), CUTS)
def test_statistics_and_gradients_are_those_of_the_whole_batch_by_hand(
    engine: str, world: int, micro: int, tmp_path: Path
) -> None:
    for seen in run_ranks(measured, world, tmp_path, engine, micro, timeout=120):
        check(seen)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_so_they_are_of_losses_that_other_code_sums(engine: str, tmp_path: Path) -> None:
    for seen in run_ranks(measured, 2, tmp_path, engine, 3, False, True, timeout=120):
        check(seen, start=1 / 3)


# ---- other engines, and precisions -----------------------------------------------------------------------------------

FIRST_ORDER = ["boundary", "again"]
"""Tasks without derivatives, on samples of their own: what every engine can do by itself."""


def loss_of(u: Any, x: Tensor) -> Tensor:
    return (u(x)[:, 0].float() - x.sum(1)).square().mean()


def points_of(step: int) -> dict[str, Tensor]:
    points = batch(step)
    return {"boundary": points["boundary"].float(), "again": points["pde"].float()}


def trained(engine: Any, early: bool, options: dict[str, Any], steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Losses and Gram matrix at every step, in float32 and with three micro-batches."""
    accelerator = accelerator_for(engine, gradient_accumulation_steps=3, **options)
    net = PINN().float()
    arguments: Any = {"accelerator": accelerator, "shared_parameters": SHARED}
    weighter = Weighter(GradNorm(), FIRST_ORDER, model=net, **arguments) if early else None
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.05))
    weighter = weighter or Weighter(GradNorm(), FIRST_ORDER, model=model, **arguments)
    world, rank = accelerator.num_processes, accelerator.process_index
    seen = []
    for step in range(steps):
        for i in range(3 * rank, 3 * rank + 3):
            with accelerator.accumulate(model):
                losses = {}
                for task, x in part(points_of(step), i, 3 * world).items():
                    with weighter.task(task):
                        losses[task] = loss_of(model, x)
                weighter.backward(losses)
                optimizer.step()
                optimizer.zero_grad()
        found = weighter.statistics
        seen.append((torch.tensor(found.losses), torch.tensor(found.gram)))
    return seen


def check_trained(seen: list[tuple[Tensor, Tensor]], tolerance: float) -> None:
    """The first losses that depend on a step of the optimizer are the second: they show the gradients of the model."""
    net = PINN().float()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    method = GradNorm()
    weights, state = method.init(FIRST_ORDER)
    for step, (losses, gram) in enumerate(seen):
        expected = {task: loss_of(net, x) for task, x in points_of(step).items()}
        G = gradients_by_hand(expected, [net.body.hidden.weight, net.body.hidden.bias]).double()
        exact = torch.stack([*expected.values()]).detach().double()
        torch.testing.assert_close(losses, exact, rtol=tolerance, atol=0)
        size = float((G @ G.T).max())
        torch.testing.assert_close(gram, G @ G.T, rtol=tolerance, atol=tolerance * size)
        sum(w * loss for w, loss in zip(weights, expected.values(), strict=True)).backward()  # type: ignore[union-attr]
        weights, state = method.update(state, Statistics(exact.numpy(), [True, True], G.norm(dim=1).numpy()))
        optimizer.step()
        optimizer.zero_grad()


ENGINES: dict[str, list[tuple[str, bool, dict[str, Any], float]]] = {
    "DDP": [
        ("ddp", False, {}, 1e-6),
        ("ddp", True, {"mixed_precision": "bf16"}, 2e-2),
        ("ddp", False, {"mixed_precision": "fp16", "loss_scale": 1024.0}, 3e-3),
    ],
    "FSDP2": [
        ("fsdp2", False, {}, 1e-6),
        ("fsdp2", True, {"fsdp": {"reshard_after_forward": True}}, 1e-6),
        ("fsdp2", True, {"mixed_precision": "bf16"}, 3e-2),
    ],
    "ZeRO": [
        ("zero1", False, {}, 2e-6),
        ("zero2", True, {}, 2e-6),
        ("zero3", False, {}, 2e-6),
        ("zero3", True, {}, 2e-6),
    ],
}
"""Engine, whether the weighter is built before `prepare`, options, relative difference."""


def trained_under_each(family: str) -> list[list[tuple[Tensor, Tensor]]]:
    return [trained(engine, early, options) for engine, early, options, _ in ENGINES[family]]


@pytest.mark.parametrize("family", ENGINES)
def test_first_order_losses_under_any_engine(family: str, tmp_path: Path) -> None:
    """Tasks on different samples, a weighter that was built before or after `prepare`, two processes."""
    for runs in run_ranks(trained_under_each, 2, tmp_path, family, timeout=240):
        for seen, (*_, tolerance) in zip(runs, ENGINES[family], strict=True):
            check_trained(seen, tolerance)


def refused(early: bool) -> str:
    with pytest.raises(NotImplementedError) as caught:
        trained("fsdp1", early, {}, 1)
    return str(caught.value)


def refused_early_and_late() -> list[str]:
    return [refused(early) for early in (False, True)]


def test_fsdp1_is_refused(tmp_path: Path) -> None:
    for messages in run_ranks(refused_early_and_late, 2, tmp_path, timeout=120):
        assert all(message.startswith("`shared_parameters` cannot be used with FSDP1") for message in messages)


def derivatives_without_a_weighter(engine: Any) -> str:
    accelerator = accelerator_for(engine)
    net = PINN().float()
    model, _ = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.05))
    try:
        x = batch(0)["slopes"].float().requires_grad_()
        accelerator.backward(torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].square().mean())
    except (RuntimeError, IndexError) as error:
        return type(error).__name__
    return "trained"


def without_a_weighter() -> list[str]:
    return [derivatives_without_a_weighter(engine) for engine in ("fsdp1", "zero1", "zero2", "zero3")]


def test_what_engines_cannot_do_by_themselves(tmp_path: Path) -> None:
    """The control: a loss on derivatives fails there with no weighter around."""
    for found in run_ranks(without_a_weighter, 2, tmp_path, timeout=240):
        assert "trained" not in found


def collectives() -> list[int]:
    """How many all-reduces every step took on the weighter's group."""
    accelerator = accelerator_for("ddp")
    net = PINN()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.05))
    weighter = Weighter(GradNorm(), TASKS, accelerator=accelerator, model=model, shared_parameters=SHARED)
    counted, plain = [], Processes._all_reduce
    with patch.object(
        Processes, "_all_reduce", lambda self, vector: counted.append(len(vector)) or plain(self, vector)
    ):
        numbers = []
        for step in range(4):
            counted.clear()
            if step == 2:
                weighter.freeze()
            weighter.backward(losses_of(model, batch(step), weighter.task))
            optimizer.step()
            optimizer.zero_grad()
            numbers.append(len(counted))
    return numbers


def test_one_all_reduce_in_a_step_and_none_while_frozen(tmp_path: Path) -> None:
    assert run_ranks(collectives, 2, tmp_path) == [[1, 1, 0, 0]] * 2


def forgotten(rank_without: int) -> str:
    """One process's forward of a task runs outside of its context, on one of them or on all."""
    accelerator = accelerator_for("ddp")
    net = PINN()
    model, _ = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.05))
    weighter = Weighter(GradNorm(), TASKS, accelerator=accelerator, model=model, shared_parameters=SHARED)
    points = batch(0)
    losses = losses_of(model, points, weighter.task)
    if rank_without in (-1, accelerator.process_index):
        losses["boundary"] = losses_of(model, points)["boundary"]
    try:
        weighter.backward(losses)
    except RuntimeError as error:
        return str(error)
    return "fine"


def test_a_task_without_its_context_is_an_error_on_all_processes(tmp_path: Path) -> None:
    for message in run_ranks(forgotten, 2, tmp_path, -1):
        assert "loss `boundary`" in message
