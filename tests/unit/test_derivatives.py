"""Losses on derivatives in one process: the gradients of the loop by hand, or a refusal in words."""

from __future__ import annotations

import pytest
import torch

from accel_weighting import IMTLG, MGDA, CoVWeighting, EqualWeighting, GradNorm, RotoGrad, Weighter, join, measure
from tests.derivatives import FAMILIES, ON_LOSSES, Net, largest_error, slope

MEASURING = [GradNorm(alpha=0.0), MGDA(), IMTLG(), RotoGrad()]


@pytest.mark.parametrize("route", ["heads", "branch", "neither"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_loop_by_hand(family, route):
    assert largest_error(family, route, ON_LOSSES) < 1e-13


@pytest.mark.parametrize("route", ["heads", "branch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_weighter_of_any_method_trains_by_them(family, route):
    assert largest_error(family, route, [GradNorm(alpha=0.0), CoVWeighting()], frozen=True) < 1e-13


@pytest.mark.parametrize("method", MEASURING, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("route", ["heads", "branch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_compare_gradients_refuse_them_by_name(family, route, method):
    torch.manual_seed(0)
    net = Net().double()
    weighter = Weighter(method, ["a", "b"], heads={"a": net.a, "b": net.b} if route == "heads" else None)
    net.branch = weighter.branch if route == "branch" else None
    with pytest.raises(RuntimeError, match=r"contains derivatives that were taken through the branch.*CoVWeighting"):
        weighter.backward(FAMILIES[family](net, torch.randn(5, 3).double()))


def test_a_penalty_beside_the_weighed_losses_is_no_case_of_it():
    """It goes back on its own, as another optimizer's does."""
    torch.manual_seed(0)
    net = Net().double()
    weighter = Weighter(GradNorm(alpha=0.0), ["a", "b"], heads={"a": net.a, "b": net.b})
    for _ in range(2):
        x = torch.randn(5, 3).double().requires_grad_()
        slope(net(x)[0], x).square().sum().backward()
        a, b = net(x)
        weighter.backward({"a": a.square().mean(), "b": b.square().mean()})
    assert (weighter.statistics.norms > 0).all()


def test_norms_of_derivative_losses_are_not_reported():
    torch.manual_seed(0)
    net = Net().double()
    weighter = Weighter(CoVWeighting(), ["a", "b"], heads={"a": net.a, "b": net.b})
    weighter.backward(FAMILIES["R1"](net, torch.randn(5, 3).double()))
    assert weighter.statistics.norms is None


@pytest.mark.parametrize("route", ["heads", "branch"])
@pytest.mark.parametrize("method", [EqualWeighting(), GradNorm(alpha=0.0)], ids=["Equal", "GradNorm"])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_backward_with_create_graph_gives_gradients_that_can_be_differentiated(method, route):
    torch.manual_seed(0)
    net = Net().double()
    weighter = Weighter(method, ["a", "b"], heads={"a": net.a, "b": net.b} if route == "heads" else None)
    net.branch = weighter.branch if route == "branch" else None
    x = torch.randn(5, 3).double()
    a, b = net(x)
    weighter.backward({"a": a.square().mean(), "b": b.square().mean()}, create_graph=True)
    parameters = list(net.parameters())
    first = [p.grad for p in parameters]
    second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
    net.branch = None
    weighter.detach()
    a, b = net(x)
    plain = torch.autograd.grad(a.square().mean() + b.square().mean(), parameters, create_graph=True)
    want = torch.autograd.grad(sum(g.square().sum() for g in plain), parameters)
    for mine, other in zip([*first, *second], [*plain, *want], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-15)
    for p in parameters:
        p.grad = None  # a cycle otherwise


def test_the_comparison_notices_a_join_that_cannot_be_differentiated(monkeypatch):
    """The control: the gradient that passes inside of a loss, half as long."""

    def halved(rows, key):
        total = measure.weighted_sum(rows)
        return None if total is None else total / 2

    monkeypatch.setattr(join, "_inner_sum", halved)
    for family in FAMILIES:
        assert largest_error(family, "heads", [EqualWeighting()]) > 1e-3
