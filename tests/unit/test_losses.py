"""What happens to losses on their way to a method: caps, precision, tasks that are not there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from accel_weighting import CoVWeighting, EqualWeighting, Statistics, Weighter
from accel_weighting.methods.mgda import MGDA
from tests.small import EXACT, GRADNORM, assert_close, gradients_by_hand, losses_of, net, weighter_and_model


def test_statistics_are_the_contract():
    weighter, model = weighter_and_model()
    weighter.backward(losses_of(model))
    s = weighter.statistics
    assert isinstance(s, Statistics) and s.micro_batches == 1 and s.step == 0 and s.present.dtype == np.bool_
    assert all(type(x) is np.ndarray and x.dtype == np.float64 for x in (s.losses, s.norms, s.gram))
    assert s.gram.shape == (2, 2) and np.array_equal(s.gram, s.gram.T)


# ---- caps and precision --------------------------------------------------------------------------------------------


def test_a_loss_above_its_cap_is_scaled_down_and_measured_as_it_was():
    w = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    weighter = Weighter(EqualWeighting(), ["a", "b"], max_losses={"a": 1.0})
    z = weighter.branch(w * 1)
    total = weighter.backward({"a": z["a"].square().sum(), "b": z["b"].sum()})  # 25, and 7
    torch.testing.assert_close(w.grad, torch.tensor([6.0, 8.0]).double() / 25 + 1, **EXACT)
    assert total.item() == pytest.approx(1 + 7)
    assert weighter.statistics.losses.tolist() == [25, 7]
    assert_close(weighter.statistics.norms, torch.tensor([100.0, 2.0]).double().sqrt(), **EXACT)
    with torch.no_grad():
        assert weighter.combine({"a": w.square().sum(), "b": w.sum()}).item() == pytest.approx(8)


def test_a_loss_below_its_cap_is_left_alone():
    w = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)
    weighter = Weighter(EqualWeighting(), ["a"], max_losses={"a": 1.0})
    weighter.backward([w.square().sum()])
    torch.testing.assert_close(w.grad, 2 * w.detach(), **EXACT)


def test_the_total_keeps_its_precision_under_autocast():
    weighter = Weighter(EqualWeighting(), ["a", "b"], initial_weights={"a": 1.001, "b": 1.003})
    w = torch.tensor(1.2345, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        total = weighter.backward([w * 1, w * 2])
    assert total.dtype == torch.float32
    torch.testing.assert_close(w.grad, torch.tensor(1.001 + 2 * 1.003), rtol=1e-6, atol=0)


# ---- tasks that are not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [GRADNORM, MGDA(), CoVWeighting()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_count_of_zero_makes_a_loss_that_is_not_finite_harmless(method, bad):
    weighter, model = weighter_and_model(method)
    losses = losses_of(model)
    weighter.backward({**losses, "seg": losses["seg"] * bad}, num_items={"seg": 0})
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert bool(p.grad.eq(0).all()) == name.startswith("heads.seg"), name
    assert weighter.statistics.present.tolist() == [True, False]
    assert np.isfinite(weighter.statistics.losses).all() and np.isfinite(weighter.statistics.norms).all()
    assert all(math.isfinite(value) for value in weighter.log_values().values())
    G = gradients_by_hand(net())
    assert_close(weighter.statistics.norms, torch.stack([G[0].norm(), torch.tensor(0.0)]).double())


@pytest.mark.parametrize("method", [GRADNORM, MGDA(), CoVWeighting()], ids=lambda method: type(method).__name__)
def test_a_task_left_out_whose_head_was_called_gets_zeros(method):
    weighter, model = weighter_and_model(method)
    weighter.backward({"depth": losses_of(model)["depth"]})
    for name, p in model.named_parameters():
        assert p.grad is not None and bool(p.grad.eq(0).all()) == name.startswith("heads.seg"), name
    assert weighter.statistics.present.tolist() == [True, False]


def test_a_task_left_out_whose_head_was_not_called_gets_nothing():
    weighter, model = weighter_and_model()
    z = model.shared(torch.randn(4, 8).double())
    weighter.backward({"depth": model.heads["depth"](z).square().mean()})
    assert all(p.grad is None for p in model.heads["seg"].parameters())


def test_a_probe_of_a_head_before_the_step_leaves_it_nothing():
    """The graph of its output is gone by then."""
    weighter, model = weighter_and_model()
    model.heads["seg"](model.shared(torch.randn(4, 8).double())).mean().backward()
    model.zero_grad()
    z = model.shared(torch.randn(4, 8).double())
    weighter.backward({"depth": model.heads["depth"](z).square().mean()})
    assert all(p.grad is None for p in model.heads["seg"].parameters())


def test_a_task_that_never_comes_is_said_after_twenty_windows(caplog):
    weighter, model = weighter_and_model(CoVWeighting())
    for step in range(40):
        assert ("No loss of `seg` came" in caplog.text) == (step >= 20)
        weighter.backward({"depth": losses_of(model)["depth"]})
    assert caplog.text.count("No loss of `seg` came") == 1
