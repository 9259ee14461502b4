import copy
import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from accel_weighting.methods.cov import CoVWeighting
from accel_weighting.methods.gradnorm import GradNorm
from accel_weighting.methods.static import EqualWeighting, StaticWeighting
from accel_weighting.methods.wrappers import Clamp, Every, Smooth, Warmup
from accel_weighting.statistics import Method, Statistics

TASKS = ["a", "b", "c", "d"]


def windows(steps, absent=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        losses, norms = torch.rand(2, 4, generator=g, dtype=torch.float64).numpy() * 5 + 0.1
        present = torch.rand(4, generator=g).numpy() >= absent
        present[0] = True
        yield Statistics(losses * present, present, norms * present)


def run(method, seen):
    """The initial weights, then those after every window."""
    w, state = method.init(TASKS)
    weights = [w]
    for statistics in seen:
        w, state = method.update(state, statistics)
        weights.append(w)
    return np.stack(weights)


@dataclass(frozen=True)
class Scripted(Method):
    """Gives the weights of a script, one row after the other; keeps no sum."""

    script: tuple

    def init(self, tasks, initial_weights=None):
        return np.array(self.script[0], np.float64), {"row": np.asarray(0)}

    def update(self, state, statistics):
        row = np.asarray(state["row"] + 1)
        return np.array(self.script[int(row)], np.float64), {"row": row}


THREE = Statistics(np.zeros(3), np.ones(3, np.bool_))


def test_smooth_is_a_moving_average():
    inner, smooth = run(GradNorm(), windows(20)), run(Smooth(GradNorm(), 0.8), windows(20))
    expected = inner[0]
    for w, smoothed in zip(inner[1:], smooth[1:], strict=True):
        expected = 0.8 * expected + 0.2 * w
        np.testing.assert_allclose(smoothed, expected, rtol=1e-12, atol=0)


def test_warmup_keeps_the_initial_weights_while_the_method_learns():
    inner, warm = run(CoVWeighting(), windows(20)), run(Warmup(CoVWeighting(), 5), windows(20))
    assert (warm[:6] == warm[0]).all() and (inner[5] != inner[0]).all()
    assert np.array_equal(warm[6:], inner[6:])


def test_every_updates_at_the_first_window_and_then_rarely():
    seen = list(windows(10))
    every, rare = run(Every(GradNorm(), 3), seen), run(GradNorm(), seen[::3])
    assert np.array_equal(every[1:], rare[1:].repeat(3, 0)[:10])


@pytest.mark.parametrize("method", [Smooth(GradNorm(), 0.0), Warmup(GradNorm(), 0), Every(GradNorm(), 1)])
def test_settings_that_change_nothing(method):
    seen = list(windows(20, absent=0.3))
    np.testing.assert_allclose(run(method, seen), run(GradNorm(), seen), rtol=1e-14, atol=0)


def clamped(weights, low, high):
    _, state = Clamp(Scripted(((1.0, 1.0, 1.0), weights)), low, high).init(TASKS[:3])
    return Clamp(Scripted(((1.0, 1.0, 1.0), weights)), low, high).update(state, THREE)[0]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((0.9, 1.0, 1.1), (0.9, 1.0, 1.1)),  # nothing to clip
        ((0.1, 0.9, 2.0), (0.5, 1.0, 1.5)),
        ((0.0, 0.0, 3.0), (0.75, 0.75, 1.5)),  # those without weight share alike
        ((0.2, 0.2, 2.6), (0.75, 0.75, 1.5)),
        ((0.4, 1.2, 1.4), (0.5, 1.2 * 2.5 / 2.6, 1.4 * 2.5 / 2.6)),  # ratios of the unclipped stay
    ],
)
def test_clamp_by_hand(weights, expected):
    assert clamped(weights, 0.5, 1.5).tolist() == pytest.approx(expected, abs=1e-12)


def test_clamp_is_the_exact_scaled_clip():
    """Against bisection on λ in clip(λ w, low, high)."""
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        w = torch.rand(3, generator=g, dtype=torch.float64).numpy() ** 6 + 1e-3
        w = 3 * w / w.sum()
        down, up = 1e-6, 1e6
        for _ in range(200):
            middle = math.sqrt(down * up)
            down, up = (middle, up) if (middle * w).clip(0.6, 1.7).sum() < 3 else (down, middle)
        np.testing.assert_allclose(clamped(w.tolist(), 0.6, 1.7), (up * w).clip(0.6, 1.7), rtol=1e-12, atol=1e-12)


def test_clamp_of_a_method_without_a_sum_stops_at_its_bounds():
    assert clamped((9.0, 5.0, 7.0), 0.5, 1.5).tolist() == [1.5] * 3
    assert clamped((0.1, 0.2, 0.1), 0.5, 1.5).tolist() == [0.5] * 3


def test_clamp_keeps_bounds_and_sum_over_a_run():
    free = run(GradNorm(lr=0.2), windows(100, absent=0.3))
    w = run(Clamp(GradNorm(lr=0.2), 0.7, 1.6), windows(100, absent=0.3))
    assert free.min() < 0.3 and free.max() > 1.8
    assert w.min() >= 0.7 and w.max() <= 1.6 and abs(w.sum(1) - 4).max() < 1e-12


def test_clamp_refuses_bounds_that_cannot_hold():
    with pytest.raises(ValueError, match=r"must enclose the mean .* Found `low = 0.1`, `high = 0.9`, a mean of `1`"):
        Clamp(GradNorm(), 0.1, 0.9).init(TASKS)
    with pytest.raises(ValueError, match="must enclose the mean"):
        Clamp(CoVWeighting(), 0.5, 2.0).init(TASKS)
    Clamp(StaticWeighting(dict.fromkeys(TASKS, 0.1)), 0.0, 0.1).init(TASKS)  # rounding is no offence


WRAPPED = [
    Smooth(GradNorm(lr=0.2), 0.7),
    Clamp(GradNorm(lr=0.2), 0.8, 1.5),
    Warmup(GradNorm(lr=0.2), 5),
    Every(GradNorm(lr=0.2), 3),
    Smooth(Clamp(Warmup(Every(CoVWeighting(total="tasks"), 2), 4), 0.3, 3.0), 0.9),
    Clamp(Smooth(Every(GradNorm(lr=0.2), 2), 0.5), 0.8, 1.5),
    Warmup(Smooth(CoVWeighting(total="tasks"), 0.5), 7),
]


@pytest.mark.parametrize("method", WRAPPED, ids=repr)
def test_absent_tasks_keep_their_weights_and_the_sum_stays(method):
    seen = list(windows(80, absent=0.4))
    w = run(method, seen)
    assert (w[-1] != w[0]).any() and w.min() > 0
    assert abs(w.sum(1) - 4).max() < 1e-12
    for before, after, statistics in zip(w[:-1], w[1:], seen, strict=True):
        assert np.array_equal(before[~statistics.present], after[~statistics.present])


def test_without_a_sum_the_present_do_not_pay_for_the_absent():
    method = Smooth(Scripted(((1.0, 1.0, 1.0), (5.0, 7.0, 9.0))), 0.5)
    w, state = method.init(TASKS[:3])
    w, _ = method.update(state, Statistics(np.zeros(3), [True, False, True]))
    assert w.tolist() == [3.0, 1.0, 5.0]


@pytest.mark.parametrize("wrap", [lambda m: Smooth(m, 0.5), lambda m: Clamp(m, 0.1, 9), lambda m: Warmup(m, 2)])
def test_they_are_to_the_weighter_what_the_method_is(wrap):
    @dataclass(frozen=True)
    class Shared(Scripted):
        acts_on = "shared"
        needs = frozenset({"gram"})
        positive_losses = True
        rotates = True

    for method in (GradNorm(alpha=0), CoVWeighting(), EqualWeighting(), Shared(())):
        wrapped = Every(wrap(method), 2)
        for constant in ("needs", "positive_losses", "acts_on"):
            assert getattr(wrapped, constant) == getattr(method, constant)
    assert wrap(Shared(())).rotates
    with pytest.raises(AttributeError, match="no_such"):
        _ = wrap(GradNorm()).no_such
    assert not hasattr(wrap(GradNorm()), "widen")


def test_widen_reaches_the_inner_state():
    class Rotating(Scripted):
        def widen(self, state, width):
            return state | {"rotation": torch.eye(width)}

        def rotations(self, state):
            return state["rotation"]

    method = Smooth(Clamp(Rotating(((1.0, 1.0, 1.0), (1.0, 1.2, 0.8))), 0.1, 2.0), 0.5)
    _, before = method.init(TASKS[:3])
    state = method.widen(before, 4)
    assert set(state) == {*before, "inner.inner.rotation"}
    assert np.array_equal(method.rotations(state), torch.eye(4))


@pytest.mark.parametrize("method", WRAPPED, ids=repr)
def test_weigh_is_the_update_without_its_state(method):
    _, state = method.init(TASKS)
    for statistics in windows(10, absent=0.3):
        now = method.weigh(state, statistics)
        w, state = method.update(state, statistics)
        assert np.array_equal(now, w)


def test_weigh_asks_no_more_of_the_method_than_weigh():
    """At lag=0 it is called before the statistics that ``update`` reads are there."""

    class Now(Scripted):
        def weigh(self, state, statistics):
            return np.array([2.0, 2.0, 2.0])

        def update(self, state, statistics):
            raise AssertionError

    method = Every(Warmup(Clamp(Smooth(Now(((1.0, 1.0, 1.0),)), 0.5), 0.1, 9.0), 0), 2)
    assert method.weigh(method.init(TASKS[:3])[1], THREE).tolist() == [1.5, 1.5, 1.5]


@pytest.mark.parametrize("method", WRAPPED, ids=repr)
def test_they_are_values(method):
    assert method == copy.deepcopy(method) == pickle.loads(pickle.dumps(method))
    assert hash(method) == hash(copy.copy(method))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Smooth(GradNorm(), 1.0), r"`decay` must be in \[0, 1\). Found `decay = 1.0`"),
        (lambda: Smooth(GradNorm(), -0.1), "`decay`"),
        (lambda: Clamp(GradNorm(), 2.0, 1.0), "`low` must be less than `high`. Found `low = 2.0`, `high = 1.0`"),
        (lambda: Clamp(GradNorm(), -1.0, 1.0), "`low` must be finite and at least 0. Found `low = -1.0`"),
        (lambda: Clamp(GradNorm(), 0.0, float("inf")), "`high` must be positive and finite. Found `high = inf`"),
        (lambda: Warmup(GradNorm(), -1), "`steps` must be an integer of at least 0. Found `steps = -1`"),
        (lambda: Every(GradNorm(), 0), "`steps` must be an integer of at least 1. Found `steps = 0`"),
    ],
)
def test_hyperparameters_are_checked(make, found):
    with pytest.raises(ValueError, match=found):
        make()
