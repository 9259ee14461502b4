"""Losses on derivatives: the families, a model for them, and the same training by hand.

A family takes a model and a batch and gives the losses of two tasks, of which one at least contains gradients of the
model's outputs. `largest_error` trains it with a weighter and compares every gradient with the plain weighted sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from accel_weighting import (
    FAMO,
    IMTLL,
    CoVWeighting,
    DynamicWeightAverage,
    EqualWeighting,
    GeometricLoss,
    Method,
    RandomLossWeighting,
    ReLoBRaLo,
    SoftAdapt,
    StaticWeighting,
    UncertaintyWeighting,
    Weighter,
)
from tests.ranks import accelerator_for

ON_LOSSES: list[Method] = [
    EqualWeighting(),
    StaticWeighting({"a": 2.0, "b": 0.3}),
    CoVWeighting(),
    UncertaintyWeighting(),
    IMTLL(),
    DynamicWeightAverage(),
    RandomLossWeighting(),
    GeometricLoss(),
    SoftAdapt(),
    ReLoBRaLo(),
    FAMO(),
]

Model = Callable[[Tensor], tuple[Tensor, Tensor]]


class Net(nn.Module):
    """A trunk and two heads that are not linear; `branch` where it divides by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))
        self.a = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        self.b = nn.Sequential(nn.Tanh(), nn.Linear(6, 1))
        self.branch: Callable[[Tensor], dict[str, Tensor]] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.trunk(x)
        zs = {"a": z, "b": z} if self.branch is None else self.branch(z)
        return self.a(zs["a"]), self.b(zs["b"])


def slope(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def wgan_gp(model: Model, x: Tensor) -> dict[str, Tensor]:
    mix = (0.3 * x + 0.1).requires_grad_()
    penalty = (slope(model(mix)[0], mix).norm(dim=1) - 1).square().mean()
    a, b = model(x)
    return {"a": 2 + a.mean() + 10 * penalty, "b": (b - 1).square().mean()}


def r1(model: Model, x: Tensor) -> dict[str, Tensor]:
    x = x.requires_grad_()
    a, b = model(x)
    return {"a": (a - 1).square().mean(), "b": (b - 1).square().mean() + slope(b, x).square().sum(1).mean()}


def forces(model: Model, x: Tensor) -> dict[str, Tensor]:
    """Both tasks read the first head: energy, and what it slopes."""
    x = x.requires_grad_()
    energy, other = model(x)
    force = (slope(energy, x) - 0.3).square().mean()
    return {"a": (energy - 1).square().mean(), "b": force + other.square().mean()}


def pde_residual(model: Model, x: Tensor) -> dict[str, Tensor]:
    x = x.requires_grad_()
    u, data = model(x)
    u_x = slope(u, x)
    laplace = sum(slope(u_x[:, i], x)[:, i] for i in range(x.shape[1]))
    return {"a": (laplace + torch.sin(u[:, 0])).square().mean(), "b": (data - 1).square().mean()}


def curvature(model: Model, x: Tensor) -> dict[str, Tensor]:
    """A Hessian-vector product."""
    x = x.requires_grad_()
    a, b = model(x)
    v = torch.ones_like(x)
    product = slope((slope(b.square(), x) * v), x)
    return {"a": (a - 1).square().mean(), "b": product.square().mean() + (b - 1).square().mean()}


FAMILIES = {"WGAN-GP": wgan_gp, "R1": r1, "forces": forces, "PDE residual": pde_residual, "Hessian": curvature}


def full(gradient: Tensor | None) -> Tensor | None:
    """A whole gradient of one that may be in pieces."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient  # type: ignore[union-attr]


def largest_error(  # noqa: C901  one loop over all methods
    family: str, route: str, methods: list[Method], engine: str | None = None, fsdp: Any = None, frozen: bool = False
) -> float:
    """The largest difference of a gradient from that of the loop by hand, by its norm, over methods and three steps."""
    losses_of, worst = FAMILIES[family], 0.0
    for method in methods:
        torch.manual_seed(0)
        net = Net().double()
        twin = copy.deepcopy(net)
        accelerator = None if engine is None else accelerator_for(engine, fsdp=fsdp or {})  # type: ignore[arg-type]
        rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        model = net if accelerator is None else accelerator.prepare(net, optimizer)[0]
        heads = {"a": "a", "b": "b"} if route == "heads" else None
        weighter = Weighter(method, ["a", "b"], accelerator=accelerator, heads=heads, model=model if heads else None)
        net.branch = weighter.branch if route == "branch" else None
        if fsdp:
            model.set_reshard_after_backward(False)
        if frozen:
            weighter.freeze()
        for step in range(3):
            torch.manual_seed(10 + step)
            xs = torch.randn(world, 5, 3, dtype=torch.float64)
            for p in [*model.parameters(), *twin.parameters()]:
                p.grad = None
            weights = weighter.weights
            weighter.backward(losses_of(model, xs[rank].clone()))
            by_hand = [losses_of(twin, x.clone()) for x in xs]
            sum(weights[t] * losses[t] / world for losses in by_hand for t in "ab").backward()  # type: ignore[union-attr]
            if fsdp:
                for module in model.modules():
                    if hasattr(module, "reshard"):
                        module.reshard()
            for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
                mine = full(p.grad)
                assert (mine is None) == (q.grad is None), (family, step, name, method)
                if mine is not None and q.grad is not None:
                    worst = max(worst, float((mine - q.grad).norm() / q.grad.norm().clamp(min=1e-12)))
    return worst
