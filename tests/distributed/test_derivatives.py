"""Losses on derivatives on two processes: the gradients of one process by hand on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accel_weighting import CoVWeighting, EqualWeighting, ReLoBRaLo
from tests.derivatives import FAMILIES, Net, largest_error
from tests.ranks import RanksFailed, accelerator_for, run_ranks

METHODS = [EqualWeighting(), CoVWeighting(), ReLoBRaLo()]
WHOLE = {"reshard_after_forward": False}  # and not after a backward either, until the optimizer steps


def errors_of(engine: str, route: str, fsdp: Any) -> dict[str, float]:
    return {family: largest_error(family, route, METHODS, engine, fsdp) for family in FAMILIES}


@pytest.mark.parametrize("route", ["heads", "branch"])
@pytest.mark.parametrize(("engine", "fsdp"), [("ddp", None), ("fsdp2", WHOLE)], ids=["DDP", "FSDP2"])
def test_gradients_are_those_of_one_process_on_the_whole_batch(engine, fsdp, route, tmp_path: Any) -> None:
    for found in run_ranks(errors_of, 2, tmp_path, engine, route, fsdp, timeout=120):
        assert max(found.values()) < 1e-12, found


def without_a_weighter(whole: bool) -> None:
    accelerator = accelerator_for("fsdp2", fsdp=WHOLE if whole else {"reshard_after_forward": True})
    net = Net().double()
    model, _ = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    if whole:
        model.set_reshard_after_backward(False)
    x = torch.randn(5, 3, dtype=torch.float64)
    sum(FAMILIES["PDE residual"](model, x).values()).backward()  # type: ignore[union-attr]
    assert isinstance(model, nn.Module)


def test_what_fsdp2_cannot_do_by_itself(tmp_path: Any) -> None:
    """The control: with its own settings it frees parameters between the two backwards, with no weighter around."""
    run_ranks(without_a_weighter, 2, tmp_path, True)
    with pytest.raises(RanksFailed, match="storage"):
        run_ranks(without_a_weighter, 2, tmp_path, False)
