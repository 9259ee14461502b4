"""Rows that belong to tasks on real processes: any cut of the global batch, under DDP and FSDP2."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accel_weighting import IMTLG, GradNorm, Weighter
from tests.ranks import accelerator_for, run_ranks
from tests.unit.test_rows import TASKS, Net, by_hand, losses_of

STEPS = 2


class Model(Net):
    """Eight samples of three tokens at every step; the layer is a unit of its own under FSDP."""

    _no_split_modules = ("Layer",)


class Layer(nn.Linear):
    pass


def model() -> Model:
    torch.manual_seed(1)
    return Model(Layer(4, 5))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Twelve samples, whose owners are drawn: blocks hold other numbers of each."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 3, 3, dtype=torch.float64, generator=generator)
    owner = torch.randint(-1, 3, (12,), generator=generator)
    owner[:3] = torch.arange(3)
    return x, owner


def measured(engine: Any, micro: int, at_layer: bool) -> list[tuple[Tensor, Tensor | None]]:
    accelerator = accelerator_for(engine, gradient_accumulation_steps=micro)
    net = model()
    prepared, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.0))
    options: Any = {"method": IMTLG(), "shared_layer": "layer"} if at_layer else {"method": GradNorm()}
    weighter = Weighter(tasks=TASKS, accelerator=accelerator, model=prepared, **options)
    net.rows = weighter.rows
    world, rank = accelerator.num_processes, accelerator.process_index
    seen = []
    for step in range(STEPS):
        x, owner = batch(step)
        for i in range(rank * micro, (rank + 1) * micro):
            points, owners = x.chunk(world * micro)[i], owner.chunk(world * micro)[i]
            with accelerator.accumulate(prepared):
                output = prepared(points, owners)
                losses = losses_of(output, owners)
                items = {task: int((owners == k).sum()) for k, task in enumerate(TASKS)}
                absent = {task: output.sum() for task in TASKS if task not in losses}  # its count of 0 makes it zeros
                weighter.backward({**losses, **absent}, num_items=items)
                optimizer.step()
                optimizer.zero_grad()
        found = weighter.statistics
        seen.append((torch.tensor(found.norms), None if found.gram is None else torch.tensor(found.gram)))
    return seen


def at_z_and_at_a_layer(engine: Any, micro: int) -> list[list[tuple[Tensor, Tensor | None]]]:
    return [measured(engine, micro, at_layer) for at_layer in (False, True)]


CUTS = [
    ("plain", 1, 1),
    ("plain", 1, 3),
    ("ddp", 1, 3),
    ("ddp", 2, 1),
    ("ddp", 2, 3),
    ("fsdp2", 1, 1),
    ("fsdp2", 2, 1),
    ("fsdp2", 2, 3),
]


@pytest.mark.parametrize(("engine", "world", "micro"), CUTS)
def test_rows_are_those_of_the_whole_batch(engine: str, world: int, micro: int, tmp_path: Path) -> None:
    for both in run_ranks(at_z_and_at_a_layer, world, tmp_path, engine, micro, timeout=120):
        for at_layer, seen in enumerate(both):
            for step, (norms, gram) in enumerate(seen):
                x, owner = batch(step)
                G = by_hand(model(), owner, bool(at_layer), x=x)
                torch.testing.assert_close(norms, G.norm(dim=1), rtol=1e-12, atol=1e-15)
                assert (gram is not None) == at_layer
                if gram is not None:
                    torch.testing.assert_close(gram, G @ G.T, rtol=1e-12, atol=1e-15)


# ---- losses that read rows of another task ---------------------------------------------------------------------------


def audited(engine: Any, crossed: bool) -> tuple[str, list[str], Any, dict[str, str]]:
    """The error, what was said, and what the audit found in two steps of three micro-batches."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("accel_weighting").addHandler(handler)
    accelerator = accelerator_for(engine, gradient_accumulation_steps=3)
    net = model()
    prepared, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    weighter = Weighter(GradNorm(), TASKS, accelerator=accelerator, model=prepared)
    net.rows = weighter.rows
    world, rank = accelerator.num_processes, accelerator.process_index
    error = ""
    for step in range(2):
        x, owner = batch(step)
        owner = owner.clamp(0)  # some block would have no rows of any task
        for i in range(rank * 3, (rank + 1) * 3):
            points, owners = x.chunk(world * 3)[i], owner.chunk(world * 3)[i]
            owners = owners.unsqueeze(1).expand(-1, 3)  # of tokens
            with accelerator.accumulate(prepared):
                output = prepared(points, owners)
                losses = losses_of(output, owners)
                if crossed:
                    losses |= {task: output.square().mean() for task in list(losses)[-1:]}
                try:
                    weighter.backward(losses)
                except RuntimeError as e:
                    error = str(e)
                if error:
                    return error, said, weighter._audit.findings.crossed, {}  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()
    found = weighter._audit.findings
    assert found is not None
    return error, said, found.crossed, found.unasked


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_losses_of_their_own_rows_raise_no_alarm(engine: str, tmp_path: Path) -> None:
    for error, said, crossed, unasked in run_ranks(audited, 2, tmp_path, engine, False, timeout=120):
        assert not error and not said and not crossed
        assert set(unasked.values()) == ({"FSDP2"} if engine == "fsdp2" else set())


def test_a_loss_that_reads_rows_of_others_is_refused_by_names(tmp_path: Path) -> None:
    for error, _, crossed, _ in run_ranks(audited, 2, tmp_path, "ddp", True, timeout=120):
        task, other = crossed[0]
        assert f"the gradient of loss `{task}` comes to rows of `{other}`" in error
