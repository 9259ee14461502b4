import math

import numpy as np
import pytest
import torch

from accel_weighting.methods.cov import CoVWeighting
from accel_weighting.statistics import Statistics

TASKS = ["a", "b", "c", "d", "e"]

# Recorded from the authors' code (github.com/rickgroen/cov-weighting), full mode.
GOLDEN_LOSSES = [(1, 10, 100), (0.9, 11, 50), (1.1, 9, 40), (0.8, 10.5, 20), (0.7, 9.5, 10), (0.75, 10, 9)]
GOLDEN_WEIGHTS = {
    2: (0.121387, 0.109827, 0.768786),
    3: (0.192161, 0.186530, 0.621309),
    4: (0.208549, 0.137755, 0.653696),
    5: (0.205167, 0.108578, 0.686255),
}


def run(method, losses, present=None, initial_weights=None):
    """Weights used at step 0, 1, 2 …, and the last state."""
    losses = np.asarray(losses, np.float64)
    present = np.ones(losses.shape, np.bool_) if present is None else present
    w, state = method.init(TASKS[: losses.shape[1]], initial_weights)
    weights = [w]
    for L, here in zip(losses, present, strict=True):
        w, state = method.update(state, Statistics(L * here, here))
        weights.append(w)
    return np.stack(weights), state


def random_losses(steps=200, K=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(steps, K, generator=g, dtype=torch.float64).numpy() * np.logspace(-3, 3, K) + 1e-4


def reference(losses, decay=None):
    """The weights used at every step, from the whole past with plain sums: no running statistics."""

    def shares(count):  # of the observations so far in mean and variance
        if decay is None:
            return [1 / count] * count
        return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - k) for k in range(1, count)]

    def mean(values):
        return sum(share * value for share, value in zip(shares(len(values)), values, strict=True))

    def variation(ratios):
        mu = mean(ratios)
        return math.sqrt(mean([(ratio - mu) ** 2 for ratio in ratios]) + 1e-8) / mu

    K, weights = len(losses[0]), []
    past, ratios = [[] for _ in range(K)], [[] for _ in range(K)]
    for t, L in enumerate(losses):
        c = [1.0 if t < 2 else variation(ratios[i]) for i in range(K)]
        weights.append([c_i / sum(c) for c_i in c])
        for i in range(K):
            ratios[i].append(L[i] / mean(past[i]) if t else 1.0)
            past[i].append(L[i])
    return np.array(weights)


def test_golden_sequence_of_the_authors_code():
    weights, state = run(CoVWeighting(), GOLDEN_LOSSES)
    assert weights[0].tolist() == weights[1].tolist() == pytest.approx([1 / 3] * 3, abs=1e-15)
    for t, expected in GOLDEN_WEIGHTS.items():
        assert weights[t].tolist() == pytest.approx(expected, abs=1e-6)
    assert state["loss_mean"].tolist() == pytest.approx([0.875, 10, 38.1667], abs=1e-4)
    assert state["ratio_mean"].tolist() == pytest.approx([0.904678, 0.990902, 0.457357], abs=1e-6)
    assert (state["ratio_variance"] * 6).tolist() == pytest.approx([0.117443, 0.036222, 0.457233], abs=1e-6)


@pytest.mark.parametrize("decay", [None, 0.5, 0.95])
def test_equal_to_the_reference_over_200_steps(decay):
    losses = random_losses()
    weights, _ = run(CoVWeighting(decay=decay), losses)
    np.testing.assert_allclose(weights[:-1], reference(losses.tolist(), decay), rtol=1e-12, atol=1e-12)


def test_a_constant_loss_is_satisfied():
    weights, _ = run(CoVWeighting(), [(1.0, math.exp(-0.01 * t)) for t in range(500)])
    assert weights[0].tolist() == weights[1].tolist() == [0.5, 0.5]
    c = [1e-4, math.sqrt(((1 - math.exp(-0.01)) / 2) ** 2 + 1e-8) / ((1 + math.exp(-0.01)) / 2)]
    assert weights[2].tolist() == pytest.approx([c_i / sum(c) for c_i in c], abs=1e-12)
    assert weights[2].tolist() == pytest.approx([0.0196, 0.9804], abs=1e-4)
    assert weights[-1, 0] < 1e-3


@pytest.mark.parametrize("decay", [None, 0.9])
def test_units_of_the_losses_do_not_matter(decay):
    losses = random_losses()
    scaled = losses * np.array([1e-6, 3.0, 7e5])
    method = CoVWeighting(decay=decay)
    np.testing.assert_allclose(run(method, losses)[0], run(method, scaled)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [None, 0.999])
def test_independent_noise_is_shared_by_its_coefficient_of_variation(decay):
    g = torch.Generator().manual_seed(0)
    losses = torch.tensor([5.0, 0.2]) * (1 + torch.tensor([0.1, 0.3]) * torch.randn(4000, 2, generator=g).clamp(-3, 3))
    assert run(CoVWeighting(decay=decay), losses)[0][-1].tolist() == pytest.approx([0.25, 0.75], abs=0.02)


@pytest.mark.parametrize("warmup", [1, 2, 10])
def test_weights_are_equal_for_the_first_steps(warmup):
    weights, _ = run(CoVWeighting(warmup=warmup), random_losses(20))
    still = (weights == weights[0]).all(1)
    assert still[:warmup].all()
    if warmup > 1:
        assert not still[warmup:].any()
        np.testing.assert_allclose(weights[warmup:], run(CoVWeighting(), random_losses(20))[0][warmup:])


@pytest.mark.parametrize(("total", "expected"), [("one", 1), ("tasks", 3)])
def test_total(total, expected):
    weights, _ = run(CoVWeighting(total=total), random_losses())
    assert abs(weights.sum(1) - expected).max() < 1e-12
    np.testing.assert_allclose(weights, run(CoVWeighting(), random_losses())[0] * expected, rtol=1e-12, atol=0)


def test_initial_weights_are_scaled_to_the_total():
    weights, _ = run(CoVWeighting(total="tasks"), random_losses(5), initial_weights={"a": 2.0, "b": 3.0})
    np.testing.assert_allclose(weights[1], np.array([2.0, 3.0, 1.0]) / 2)
    np.testing.assert_allclose(weights[2:], run(CoVWeighting(total="tasks"), random_losses(5))[0][2:])


def test_an_absent_task_keeps_its_weight_and_its_statistics():
    losses = random_losses(30)
    present = np.ones(losses.shape, np.bool_)
    present[10:15, 1] = False
    weights, _ = run(CoVWeighting(), losses, present)
    assert (weights[10:16, 1] == weights[10, 1]).all() and (weights[10:15, 0] != weights[11:16, 0]).all()
    assert abs(weights.sum(1) - 1).max() < 1e-12
    # Once it is back, all is as if its windows had followed each other.
    _, state = run(CoVWeighting(), losses, present)
    _, joined = run(CoVWeighting(), losses[present[:, 1]][:, 1:2])
    for key in ("loss_mean", "ratio_mean", "ratio_variance", "count"):
        assert state[key][1] == joined[key][0]


def test_a_task_that_comes_late_warms_up_first():
    losses = random_losses(12)
    present = np.ones(losses.shape, np.bool_)
    present[:5, 2] = False
    weights, _ = run(CoVWeighting(), losses, present)
    assert (weights[:7, 2] == weights[0, 2]).all() and weights[7, 2] != weights[0, 2]
    pair, _ = run(CoVWeighting(), losses[:, :2])
    np.testing.assert_allclose(weights[:7, :2], pair[:7] * 2 / 3, rtol=1e-12, atol=0)
    assert abs(weights.sum(1) - 1).max() < 1e-12


def test_a_zero_first_loss_is_no_observation():
    losses = random_losses(12)
    late = np.ones(losses.shape, np.bool_)
    late[:5, 2] = False
    zero_first = np.where(late, losses, 0.0)
    np.testing.assert_allclose(run(CoVWeighting(), zero_first)[0], run(CoVWeighting(), losses, late)[0], rtol=0, atol=0)


def test_later_zeros_are_observations():
    weights, state = run(CoVWeighting(), [(1.0, 1.0), (0.0, 0.9), (0.0, 1.1), (0.5, 1.0)])
    assert np.isfinite(weights).all() and state["count"].tolist() == [4, 4]


def test_needs_losses_alone():
    method = CoVWeighting()
    assert method.needs == {"losses"} and method.positive_losses and method.acts_on == "losses"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"decay": 1.0}, r"`decay` must be None or in \(0, 1\). Found `decay = 1.0`"),
        ({"decay": 0.0}, "`decay`"),
        ({"decay": float("nan")}, "`decay`"),
        ({"warmup": 0}, "`warmup` must be an integer of at least 1. Found `warmup = 0`"),
        ({"total": "two"}, "`total` must be 'one' or 'tasks'. Found `total = 'two'`"),
    ],
)
def test_hyperparameters_are_checked(arguments, found):
    with pytest.raises(ValueError, match=found):
        CoVWeighting(**arguments)


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9, 0.999])
def test_a_loss_that_stays_at_zero_takes_no_weight(decay):
    """A margin loss that all samples satisfy; when it is back, so is its weight."""
    method = CoVWeighting(decay=decay)
    w, state = method.init(["a", "b"])
    for t in range(3000):
        w, state = method.update(
            state, Statistics([1.0 + 0.1 * (t % 3), 1.0 + 0.1 * (t % 2) if t < 40 else 0.0], [True, True])
        )
        assert np.isfinite(w).all() and w.sum() == pytest.approx(1)
        if t == 39:
            share = w[1]
    assert w[1] < 0.1 * share and (decay > 0.99 or w[1] < 1e-4)
    for t in range(40):
        w, state = method.update(state, Statistics([1.0 + 0.1 * (t % 3), 1.0 + 0.1 * (t % 2)], [True, True]))
    assert w[1] > 0.02 * share


def test_an_ordinary_loss_is_weighed_as_before():
    """Where no loss is 0 the share of positive windows is exactly 1."""
    for decay in (0.1, 0.3, 0.9, 1 / 3):
        method = CoVWeighting(decay=decay)
        _, state = method.init(["a", "b"])
        for t in range(50):
            _, state = method.update(state, Statistics([1.0 + t % 3, 2.0 + t % 5], [True, True]))
            assert (state["positive"] == 1).all()
