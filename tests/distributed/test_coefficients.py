"""Coefficients that carry, on real processes: code that sums inside, against one process on the whole batch.

Functions without `test` in their names run inside the processes, many in one launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  what the processes saw together
from torch import Tensor, nn

from accel_weighting import CoVWeighting, Weighter
from tests.distributed.setups import F64, NAMES, error_of, rank
from tests.ranks import accelerator_for, run_ranks
from tests.small import Net, batch, net, task_losses

STEPS = 5
COV = CoVWeighting(decay=0.8)


class Summing(nn.Module):
    """Sums its losses by the coefficients that it is given; without them it gives the losses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Net = net(NAMES)

    def forward(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor] | None = None) -> Any:
        losses = task_losses(self.inner(x), y)
        return losses if weights is None else summed(losses, weights)


def summed(losses: Mapping[str, Tensor], weights: Mapping[str, Any]) -> Tensor:
    return sum((loss * weights[task] for task, loss in losses.items()), torch.zeros((), dtype=F64))


class Run:
    """A model, an optimizer and a weighter; `cut` blocks of every process make a step."""

    def __init__(self, engine: Any, cut: int = 1, dtype: torch.dtype = F64, wrap: bool = True, **kwargs: Any) -> None:
        fsdp = {"transformer_cls_names_to_wrap": ["Block"]} if engine.startswith("fsdp") else None
        self.accelerator = accelerator_for(engine, fsdp=fsdp, gradient_accumulation_steps=cut, **kwargs)
        self.cut, self.dtype, self.plain = cut, dtype, Summing().to(dtype)
        self.model: Any = self.plain
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), 1e-3)
        if wrap:
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.plain = self.accelerator.unwrap_model(self.model)
        self.weighter = Weighter(COV, NAMES, accelerator=self.accelerator, heads=dict(self.plain.inner.heads))
        self.weights: list[list[float]] = []
        self.losses: list[Any] = []

    def block(self, step: int, part: int) -> tuple[Tensor, Tensor]:
        blocks = self.accelerator.num_processes * self.cut
        size = 36 // blocks
        first = (self.accelerator.process_index * self.cut + part) * size
        x, y = batch(step, len(NAMES), self.dtype)
        return x[first : first + size], y[first : first + size]

    def total(self, step: int, part: int, how: str) -> Tensor:
        x, y = self.block(step, part)
        weights = self.weighter.coefficients()
        if how == "inside":
            return self.weighter.attach(self.model(x, y, weights))
        return self.weighter.attach(summed(self.model(x, y), weights))

    def steps(self, how: str, start: int = 0, stop: int = STEPS) -> None:
        for step in range(start, stop):
            for part in range(self.cut):
                with self.accelerator.accumulate(self.model):
                    if how == "losses":
                        self.weighter.backward(self.model(*self.block(step, part)))
                    else:
                        self.accelerator.backward(self.total(step, part, how))
                        self.weighter.step()
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            self.weights.append(list(self.weighter.weights.values()))
            self.losses.append(self.weighter.statistics.losses)

    def seen(self) -> dict[str, Any]:
        full = [getattr(p, "full_tensor", lambda p=p: p)() for p in self.plain.parameters()]
        return {
            "weights": torch.tensor(self.weights, dtype=F64),
            "losses": torch.tensor(self.losses, dtype=F64),
            "norms": torch.as_tensor(self.weighter.statistics.norms),
            "parameters": [p.detach().clone() for p in full],
            "digest": self.weighter._progress.digest(),
        }


# ---- the whole batch -------------------------------------------------------------------------------------------------

CELLS = list(itertools.product(["ddp", "fsdp2"], ["inside", "outside"], [1, 3]))


def whole() -> dict[str, Any]:
    run = Run("plain")
    run.steps("losses")
    return run.seen()


def all_cells() -> dict[Any, Any]:
    found = {}
    for engine, how, cut in CELLS:
        run = Run(engine, cut)
        run.steps(how)
        found[engine, how, cut] = run.seen()
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, Any]:
    return run_ranks(whole, 1, tmp_path_factory.mktemp("one"), timeout=240)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[Any, Any]]:
    return run_ranks(all_cells, 2, tmp_path_factory.mktemp("two"), timeout=240)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_statistics_weights_and_parameters_are_those_of_one_process(cell: Any, one: Any, two: Any) -> None:
    first, second = (ranks[cell] for ranks in two)
    assert first["digest"] == second["digest"] and first["weights"].equal(second["weights"])
    for name in ("weights", "losses", "norms"):
        torch.testing.assert_close(first[name], one[name], rtol=1e-12, atol=0)
    for mine, expected in zip(first["parameters"], one["parameters"], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-15)


def test_the_cells_did_train(one: Any) -> None:
    assert (one["weights"][0] - one["weights"][-1]).abs().min() > 1e-3


# ---- precision, faults, resuming -------------------------------------------------------------------------------------


def mean_of(losses: Mapping[str, Tensor]) -> Tensor:
    found = torch.stack([losses[task].detach() for task in NAMES]).double()
    dist.all_reduce(found)
    return found / dist.get_world_size()


def precise(precision: str) -> list[tuple[Tensor, Tensor]]:
    scale = {"loss_scale": 2.0**10} if precision == "fp16" else {}
    run = Run("ddp", dtype=torch.float32, mixed_precision=precision, **scale)
    found = []
    for step in range(STEPS):
        weights, losses = run.weighter.coefficients(), run.model(*run.block(step, 0))
        expected = mean_of(losses)
        run.accelerator.backward(run.weighter.attach(summed(losses, weights)))
        run.weighter.step()
        run.optimizer.step()
        run.optimizer.zero_grad()
        found.append((torch.as_tensor(run.weighter.statistics.losses), expected))
    assert run.weighter.log_values()["weighting/skipped_steps"] == 0
    return found


def cut_off(everywhere: bool) -> str:
    """The second process turns a coefficient into a number."""
    run = Run("ddp", wrap=False)
    weights: dict[str, Any] = run.weighter.coefficients()
    if everywhere or rank() == 1:
        weights["t1"] = float(weights["t1"].detach())
    total = run.weighter.attach(summed(run.model(*run.block(0, 0)), weights))
    run.accelerator.backward(total)
    message = error_of(run.weighter.step)
    run.optimizer.zero_grad()
    run.steps("outside", 1, 2)  # all go on
    return message


def absent(how: str) -> list[Any]:
    """A task is not in the data of the second process."""
    run = Run("ddp", wrap=False)
    gone = ["t2"] if rank() == 1 else []
    losses = {task: loss for task, loss in run.model(*run.block(0, 0)).items() if task not in gone}
    if how == "losses":
        run.weighter.backward(losses)
    else:
        total = summed(losses, run.weighter.coefficients())
        run.accelerator.backward(run.weighter.attach(total, num_items=dict.fromkeys(gone, 0)))
        run.weighter.step()
    statistics = run.weighter.statistics
    return [statistics.losses.tolist(), statistics.norms.tolist(), run.weighter.weights]


def came_though_absent() -> str:
    """The second process says that a task is absent, and its loss is there."""
    run = Run("ddp", wrap=False)
    total = summed(run.model(*run.block(0, 0)), run.weighter.coefficients())
    run.accelerator.backward(run.weighter.attach(total, num_items={"t1": 0} if rank() == 1 else None))
    message = error_of(run.weighter.step)
    run.optimizer.zero_grad()
    run.steps("outside", 1, 2)  # all go on
    return message


CURVED = list(itertools.product(["ddp", "fsdp2"], ["inside", "outside"]))


def curved(engine: str, how: str) -> str:
    """A coefficient is squared, inside of the model or outside; what was said of it."""
    run = Run(engine)
    weights = run.weighter.coefficients()
    squared = weights | {"t1": weights["t1"] ** 2}
    block = run.block(0, 0)
    total = run.model(*block, squared) if how == "inside" else summed(run.model(*block), squared)
    try:
        run.weighter.attach(total)
    except RuntimeError as error:
        return str(error)
    run.accelerator.backward(total)  # not seen
    run.weighter.step()
    return ""


def not_finite() -> tuple[list[float], dict[str, float]]:
    run = Run("ddp", wrap=False)
    run.steps("outside", 0, 2)
    before = list(run.weighter.weights.values())
    losses = run.model(*run.block(2, 0))
    if rank() == 1:
        losses["t1"] = losses["t1"] * torch.inf
    run.accelerator.backward(run.weighter.attach(summed(losses, run.weighter.coefficients())))
    run.weighter.step()
    run.optimizer.zero_grad()
    assert list(run.weighter.weights.values()) == before
    run.steps("outside", 3, 4)
    return before, run.weighter.log_values()


def resumed(folder: str) -> tuple[Any, Any]:
    run = Run("ddp", cut=2)
    run.steps("outside", 0, 3)
    run.accelerator.save_state(folder)
    run.accelerator.wait_for_everyone()
    run.steps("outside", 3, STEPS)
    again = Run("ddp", cut=2)
    again.accelerator.load_state(folder)
    again.steps("outside", 3, STEPS)
    return run.weights[3:], again.weights


def all_others(folder: str) -> dict[str, Any]:
    return {
        "fp16": precise("fp16"),
        "bf16": precise("bf16"),
        "cut": cut_off(False),
        "cut everywhere": cut_off(True),
        "absent": absent("coefficients"),
        "absent losses": absent("losses"),
        "came": came_though_absent(),
        "curved": [curved(engine, how) for engine, how in CURVED],
        "not finite": not_finite(),
        "resumed": resumed(folder),
    }


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("saved"))
    return run_ranks(all_others, 2, tmp_path_factory.mktemp("others"), folder, timeout=240)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_losses_are_exact_in_half_precision_and_under_a_loss_scale(precision: str, others: Any) -> None:
    for ranks in others:
        for found, expected in ranks[precision]:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_coefficient_that_one_process_did_not_use_is_an_error_on_all(others: Any) -> None:
    here = "no gradient came to that of task `t1` on process 1 of 2, so that its loss is not known."
    assert here in others[1]["cut"] and "`t1` on another process, so that" in others[0]["cut"]
    for ranks in others:
        assert (
            "num_items={'t1': 0}" in ranks["cut"]
            and "no gradient came to that of task `t1` on process" in (ranks["cut everywhere"])
        )


def test_a_loss_of_a_task_that_one_process_said_to_be_absent_is_an_error_on_all(others: Any) -> None:
    assert "holds the loss of task `t1` on process 1 of 2, which" in others[1]["came"]
    assert "holds the loss of task `t1` on another process, which" in others[0]["came"]


def test_a_total_that_is_not_linear_is_an_error_where_it_can_be_asked(others: Any) -> None:
    for ranks in others:
        for (engine, _), said in zip(CURVED, ranks["curved"], strict=True):
            assert ("is not linear in the coefficients of `t1`" in said) == (engine == "ddp")


def test_a_task_that_is_absent_on_one_process_is_as_where_losses_are_passed(others: Any) -> None:
    for ranks in others:
        for mine, theirs in zip(ranks["absent"], ranks["absent losses"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-12)


def test_a_loss_that_is_not_finite_on_one_process_is_held_on_all(others: Any) -> None:
    first, second = (ranks["not finite"] for ranks in others)
    assert first == second and first[1]["weighting/skipped_steps"] == 1
    assert list(first[0]) != [value for name, value in first[1].items() if name.startswith("weight/")]


def test_a_resumed_run_is_the_uninterrupted_one(others: Any) -> None:
    for ranks in others:
        assert ranks["resumed"][0] == ranks["resumed"][1]
