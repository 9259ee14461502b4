"""The toy of the GradNorm paper (§4): two tasks ``f_i(x) = σ_i tanh((B + ε_i) x)`` that differ in scale, σ = (1, 100).

Data in the paper's proportions, scaled so that it can be learned; a plain loop, no weighter.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from accel_weighting.methods.gradnorm import GradNorm
from accel_weighting.methods.static import EqualWeighting
from accel_weighting.statistics import Statistics

SIGMA = torch.tensor([1.0, 100.0])
ALPHA, STEPS = 0.12, 2000


def sample(g, tasks, size):
    u = torch.rand(size, 250, generator=g) * 2 - 1
    x = 250**0.5 * u / u.norm(dim=1, keepdim=True)
    return x, SIGMA[:, None, None] * torch.tanh(x @ tasks.mT)


@dataclass
class Result:
    weights: np.ndarray
    equilibrium: float  # mean |G_i / (Ḡ r_i^α) − 1| over the last 300 steps
    score: float  # Σ_i test loss / variance


def train(method, at):
    g = torch.Generator().manual_seed(0)
    tasks = 0.1 * torch.randn(100, 250, generator=g) + 0.035 * torch.randn(2, 100, 250, generator=g)
    test_x, test_y = sample(g, tasks, 2000)
    torch.manual_seed(0)
    trunk = nn.Sequential(*(m for i in range(3) for m in (nn.Linear(250 if i == 0 else 100, 100), nn.ReLU())))
    last, heads = nn.Linear(100, 100), nn.ModuleList(nn.Linear(100, 100) for _ in SIGMA)
    adam = torch.optim.Adam([p for module in (trunk, last, heads) for p in module.parameters()], lr=3e-4, fused=True)

    def losses(z, y):
        features = torch.relu(z)
        return [(head(features) - y_i).square().mean() for head, y_i in zip(heads, y, strict=True)]

    w, state = method.init(["0", "1"])
    first, errors = None, []
    for step in range(STEPS):
        x, y = sample(g, tasks, 100)
        a = trunk(x)
        z = last(a)  # the paper's W is last.weight, so that ∇_W L_i = (∂L_i/∂z)ᵀ a
        L = losses(z, y)
        seen, n = torch.stack(L).detach().double().numpy(), None
        first = seen if first is None else first
        if method.needs:
            deltas = [torch.autograd.grad(L_i, z, retain_graph=True)[0] for L_i in L]
            n = torch.stack([(d.T @ a.detach() if at == "W" else d).norm() for d in deltas]).double().numpy()
            r = seen / first
            errors.append(abs(w * n / ((w * n).mean() * (r / r.mean()) ** ALPHA) - 1).mean())
        adam.zero_grad()
        (torch.from_numpy(w).float() @ torch.stack(L)).backward()  # with the old weights, as in Algorithm 1
        adam.step()
        w, state = method.update(state, Statistics(seen, np.ones(2, np.bool_), n, step=step))
        assert (w > 0).all() and abs(w.sum() - 2) < 1e-12
    with torch.no_grad():
        test = torch.stack(losses(last(trunk(test_x)), test_y))
    return Result(w, float(sum(errors[-300:]) / 300), float((test / test_y.var(dim=(1, 2))).sum()))


@pytest.fixture(scope="module")
def equal():
    return train(EqualWeighting(), "W")


@pytest.mark.parametrize(("at", "error", "low", "high"), [("W", 0.12, 25, 80), ("z", 0.03, 80, 160)])
def test_equilibrium_of_the_toy(equal, at, error, low, high):
    result = train(GradNorm(alpha=ALPHA), at)
    assert result.equilibrium < error
    assert low < result.weights[0] / result.weights[1] < high
    assert result.score < 0.95 * equal.score
