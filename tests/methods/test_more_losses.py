"""SLAW, UWSO, DBMTL, NTKWeighting, CoBa and ReferenceNorm: by hand in other arithmetic, and by autograd."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from accel_weighting import DBMTL, SLAW, UWSO, CoBa, NTKWeighting, ReferenceNorm, Statistics

TASKS = ["a", "b", "c"]
HERE = [True] * 3


def losses_of(steps, seed=0):
    random = np.random.default_rng(seed)
    t = np.arange(steps)[:, None]
    return np.array([0.1, 1.0, 20.0]) * np.exp(-t * np.array([0.001, 0.01, 0.03]) + random.normal(size=(steps, 3)) / 5)


def run(method, windows, initial_weights=None):
    w, state = method.init(TASKS, initial_weights)
    rows = [w]
    for statistics in windows:
        w, state = method.update(state, statistics)
        rows.append(w)
    return np.stack(rows), state


# ---- of the losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_slaw_by_its_moving_averages_in_exact_arithmetic(decay):
    losses = losses_of(40)
    weights, _ = run(SLAW(decay), [Statistics(L, HERE) for L in losses])
    beta = Fraction(decay)
    a, b = [Fraction(x) ** 2 for x in losses[0]], [Fraction(x) for x in losses[0]]
    assert np.array_equal(weights[:2], np.ones((2, 3)))
    for t in range(1, 40):
        a = [beta * x + (1 - beta) * Fraction(L) ** 2 for x, L in zip(a, losses[t], strict=True)]
        b = [beta * x + (1 - beta) * Fraction(L) for x, L in zip(b, losses[t], strict=True)]
        a, b = ([x.limit_denominator(10**60) for x in y] for y in (a, b))
        inverse = [1 / math.sqrt(x - y * y) for x, y in zip(a, b, strict=True)]
        np.testing.assert_allclose(weights[t + 1], [3 * x / sum(inverse) for x in inverse], rtol=1e-8)


def test_slaw_makes_noise_of_any_size_alike():
    random = np.random.default_rng(1)
    n = np.array([0.01, 1.0, 50.0])
    weights, _ = run(SLAW(0.999), [Statistics(100 + n * random.normal(size=3), HERE) for _ in range(4000)])
    pulls = weights[-1] * n
    assert pulls.max() < 1.2 * pulls.min()


def test_slaw_with_a_loss_that_does_not_vary():
    weights, _ = run(SLAW(), [Statistics([1.0, 1.0 + 0.1 * (t % 2), -2.0], HERE) for t in range(50)])
    assert np.isfinite(weights).all() and weights[-1].sum() == pytest.approx(3)


@pytest.mark.parametrize("T", [0.5, 1.0, 20.0])
def test_uwso_is_a_softmax_of_inverse_losses(T):
    for L in losses_of(20):
        w = run(UWSO(T), [Statistics(L, HERE)])[0][-1]
        powers = [math.exp((1 / x - max(1 / L)) / T) for x in L]
        expected = np.maximum(np.array(powers) / sum(powers), 1e-6)
        np.testing.assert_allclose(w, expected / expected.sum(), rtol=1e-9)


def reference_coba(losses, N, tau, warmup):
    """As the equations are written, with lists that only grow but are read N back, and numpy's polynomial fit."""

    def slope(y):
        y = y[-N:]
        return np.polyfit(np.arange(len(y)), y, 1)[0]

    def soft(x):
        return np.exp(x - np.max(x)) / np.exp(x - np.max(x)).sum()

    K, history, slopes, worst, weights = losses.shape[1], [], [], [], [np.full(losses.shape[1], 1 / losses.shape[1])]
    for L in losses:
        history.append(L / losses[0])
        if len(history) < warmup:
            weights.append(weights[0])
            continue
        slopes.append([slope([row[k] for row in history]) for k in range(K)])
        worst.append(slope([row.max() for row in history]))
        alpha, past = np.array(slopes[-1]), np.abs(np.array(slopes[-N:])).sum(0)
        rcs = soft(K * alpha / np.abs(alpha).sum())
        acs = soft(-len(slopes[-N:]) * alpha / past)
        recent = np.array(worst[-N:])
        df = min(1.0, len(recent) * soft(-tau * len(recent) * recent / np.abs(recent).sum())[-1])
        weights.append(df * rcs + (1 - df) * acs)
    return np.stack(weights)


@pytest.mark.parametrize(("N", "tau", "warmup"), [(5, 5.0, 3), (12, 1.0, 12), (30, 5.0, 2)])
def test_coba_by_its_equations(N, tau, warmup):
    losses = losses_of(60)
    losses[40:, 1] *= np.exp(0.1 * np.arange(20))  # one diverges
    weights, _ = run(CoBa(N, tau, warmup), [Statistics(L, HERE) for L in losses])
    np.testing.assert_allclose(weights, reference_coba(losses, N, tau, warmup), rtol=1e-7, atol=1e-9)


def test_coba_gives_weight_to_the_task_that_converges_slowly():
    t = np.arange(60)[:, None]
    weights, _ = run(CoBa(20, 5.0, 10), [Statistics(L, HERE) for L in np.exp(-t * np.array([0.001, 0.01, 0.02]))])
    assert weights[-1][0] > weights[-1][1] > weights[-1][2] and weights[-1].sum() == pytest.approx(1)


# ---- of norms --------------------------------------------------------------------------------------------------------


class Model:
    """Three mean squared errors on one representation, with torch's autograd for every gradient."""

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.z = torch.randn(6, 4, generator=g, dtype=torch.float64, requires_grad=True)
        self.heads = torch.randn(3, 4, generator=g, dtype=torch.float64) * torch.tensor([0.1, 1, 6])[:, None]
        self.y = torch.randn(3, 6, generator=g, dtype=torch.float64)

    def losses(self):
        return ((self.z @ self.heads.T).T - self.y).square().mean(1)

    def gradient(self, value):
        return torch.autograd.grad(value, self.z)[0]

    def window(self):
        L = self.losses()
        G = torch.stack([self.gradient(self.losses()[k]).flatten() for k in range(3)]).numpy()
        return Statistics(L.detach().numpy(), HERE, np.linalg.norm(G, axis=1), G @ G.T), G


@pytest.mark.parametrize("seed", range(3))
def test_dbmtl_trains_log_losses_with_gradients_of_one_length(seed):
    model = Model(seed)
    statistics, G = model.window()
    weights, state = run(DBMTL(), [statistics])
    logs = np.stack([model.gradient(model.losses()[k].log()).flatten().numpy() for k in range(3)])
    m = np.linalg.norm(logs, axis=1)
    np.testing.assert_allclose(state["loss_weights"] * statistics.losses, np.ones(3))
    trunk = (weights[-1] * state["loss_weights"]) @ G
    np.testing.assert_allclose(trunk, (m.max() / m) @ logs, rtol=1e-10)
    at_once = DBMTL().weigh(state, statistics)  # lag=0: the same, for losses that are weighted by now
    np.testing.assert_allclose(at_once, weights[-1])


@pytest.mark.parametrize("seed", range(3))
def test_ntk_weights_are_those_of_the_gradients_of_root_losses(seed):
    model = Model(seed)
    statistics, _ = model.window()
    q = np.array([float(model.gradient(model.losses()[k].sqrt()).norm()) for k in range(3)])
    weights, _ = run(NTKWeighting(), [statistics])
    np.testing.assert_allclose(weights[-1], q.sum() / q, rtol=1e-10)


def window(norms, present=HERE):
    return Statistics(np.ones(3), present, np.asarray(norms, np.float64) * np.asarray(present))


def test_reference_norm_is_vqgans_adaptive_weight():
    """``torch.norm(nll_grads) / (torch.norm(g_grads) + 1e-4)``, clamped to [0, 1e4]: by autograd."""
    model = Model()
    statistics, G = model.window()
    weights, _ = run(ReferenceNorm("b"), [statistics])
    grads = [torch.tensor(g) for g in G]
    for k in (0, 2):
        expected = (torch.norm(grads[1]) / (torch.norm(grads[k]) + 1e-4)).clamp(0.0, 1e4)
        assert weights[-1][k] == pytest.approx(float(expected), rel=1e-12)
    assert weights[-1][1] == 1


def test_reference_norm_is_the_guides_with_decay():
    """``λ ← 0.9 λ + 0.1 Σn/n_k`` has the same ratios, once what it began with has faded."""
    method = ReferenceNorm("a", decay=0.9, eps=1e-12, max_ratio=1e9)
    norms = np.array([2.0, 0.5, 40.0])
    weights, _ = run(method, [window(norms)] * 200)
    guide = np.ones(3)
    for _ in range(200):
        guide = 0.9 * guide + 0.1 * norms.sum() / norms
    np.testing.assert_allclose(weights[-1] / weights[-1][0], guide / guide[0], rtol=1e-6)


def test_reference_norm_waits_for_an_adversary_and_for_its_reference():
    method = ReferenceNorm("a", {"c": 0.5}, eps=1e-9)
    weights, _ = run(
        method,
        [
            window([1.0, 2.0, 0.0]),  # present, and its gradient exactly 0
            window([1.0, 2.0, 4.0], [True, True, False]),
            window([1.0, 2.0, 4.0]),
            window([0.0, 2.0, 1.0]),
            window([3.0, 2.0, 1.0], [False, True, True]),
            window([1.0, 1e9, 1e-9]),
        ],
    )
    np.testing.assert_allclose(weights[1:3], [[1, 0.5, 1]] * 2)
    np.testing.assert_allclose(weights[3:6], [[1, 0.5, 0.125]] * 3)
    np.testing.assert_allclose(weights[6], [1, 1e-6, 1e4])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReferenceNorm("d").init(TASKS), "`reference` must name tasks out of"),
        (lambda: ReferenceNorm("a", {"d": 1.0}).init(TASKS), "`ratios` must name tasks out of"),
        (lambda: ReferenceNorm("a", 0.0), "`ratios` must be positive and finite, or a mapping"),
        (lambda: ReferenceNorm(["a"]), "`reference` must be the name of a task"),
        (lambda: CoBa(window=1), "`window` must be an integer of at least 2"),
        (lambda: SLAW(1.0), r"`decay` must be in \(0, 1\)"),
        (lambda: UWSO(0.0), "`temperature` must be positive"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
