"""The audit under engines: their own nodes raise no alarm, and cross-talk is confirmed where it can be asked for."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accel_weighting import GradNorm, Weighter
from tests.ranks import accelerator_for, run_ranks

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "DDP": ("ddp", {}),
    "DDP, find_unused_parameters": ("ddp", {"ddp": {"find_unused_parameters": True}}),
    "DDP, static_graph": ("ddp", {"ddp": {"static_graph": True}}),
    "FSDP1": ("fsdp1", {}),
    "FSDP2": ("fsdp2", {}),
}
CONFIRMED = ("DDP", "DDP, find_unused_parameters")


class Net(nn.Module):
    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))
        self.a, self.b, self.crossed = nn.Linear(6, 2), nn.Linear(6, 2), crossed
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.trunk(x)
        a, b = self.a(z), self.b(z)
        return a, (b - a if self.crossed else b)


def audited(engine: str, options: dict[str, Any], crossed: bool) -> tuple[Any, list[str], str]:
    """What the audit found, the warnings and the error of three steps."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("accel_weighting").addHandler(handler)
    torch.manual_seed(0)
    accelerator = accelerator_for(engine, **options)
    net = Net(crossed).double()
    if not options.get("ddp", {}).get("find_unused_parameters"):
        del net.unused
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    weighter = Weighter(
        GradNorm(alpha=0.0), ["a", "b"], accelerator=accelerator, heads={"a": "a", "b": "b"}, model=model
    )
    error = ""
    for step in range(3):
        torch.manual_seed(step + 10 * accelerator.process_index)
        a, b = model(torch.randn(5, 4, dtype=torch.float64))
        try:
            weighter.backward({"a": a.square().mean(), "b": b.square().mean()})
        except RuntimeError as e:
            error = str(e)
            break
        optimizer.step()
        optimizer.zero_grad()
    found = weighter._audit.findings
    return (found.crossed, found.suspected, found.missed, found.passed_by, found.apart), said, error


@pytest.mark.parametrize("name", ENGINES)
def test_engines_own_nodes_raise_no_alarm(name: str, tmp_path: Any) -> None:
    for found, said, error in run_ranks(audited, 2, tmp_path, *ENGINES[name], False):
        assert found == ([], [], [], {}, []) and not said and not error


@pytest.mark.parametrize("name", ENGINES)
def test_cross_talk_is_confirmed_or_said(name: str, tmp_path: Any) -> None:
    for rank, (found, said, error) in enumerate(run_ranks(audited, 2, tmp_path, *ENGINES[name], True)):
        if name in CONFIRMED:
            assert found[0] == [("b", "a")] and "loss `b` arrives at the alias of `a`" in error
        else:
            assert found[:2] == ([], [("b", "a")]) and not error
            assert rank or ("loss `b` reaches the alias of `a`" in said[0] and name.split(",")[0] in said[0])
