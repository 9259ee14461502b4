"""CarryForward: tasks that never share a window get the weights of the same data in one window each."""

import copy
import pickle
from dataclasses import dataclass

import numpy as np
import pytest

from accel_weighting import (
    DBMTL,
    FAMO,
    IMTLG,
    IMTLL,
    MGDA,
    SLAW,
    UWSO,
    CarryForward,
    Clamp,
    CoBa,
    ConFIG,
    CoVWeighting,
    DynamicWeightAverage,
    GeometricLoss,
    GradientBalancer,
    GradNorm,
    Method,
    NTKWeighting,
    ReferenceNorm,
    ReLoBRaLo,
    RotoGrad,
    ScaleInvariant,
    Smooth,
    SmoothTchebycheff,
    SoftAdapt,
    Statistics,
    UncertaintyWeighting,
)

METHODS = [
    GradNorm(lr=0.1),
    CoVWeighting(),
    DynamicWeightAverage(),
    SoftAdapt(),
    ReLoBRaLo(alpha=0.9),
    FAMO(),
    GradientBalancer(decay=0.9),
    UncertaintyWeighting(),
]


@dataclass(frozen=True)
class Rounds:
    """Losses and gradients of a number of global batches with all tasks, `[T, K]` and `[T, K, 4]`."""

    losses: np.ndarray
    gradients: np.ndarray

    @classmethod
    def draw(cls, tasks: int, number: int = 60) -> "Rounds":
        g = np.random.default_rng(tasks)
        losses = (1 + np.arange(tasks)) * g.uniform(0.5, 1.5, (number, tasks)) * 0.97 ** np.arange(number)[:, None]
        return cls(losses, (1 + np.arange(tasks))[:, None] * g.normal(size=(number, tasks, 4)))

    def window(self, t: int, tasks: list[int]) -> Statistics:
        here = np.isin(np.arange(self.losses.shape[1]), tasks)
        G = self.gradients[t] * here[:, None]
        return Statistics(self.losses[t] * here, here, np.linalg.norm(G, axis=1), G @ G.T)


def follow(method: Method, windows: list[Statistics], tasks: int) -> np.ndarray:
    w, state = method.init([f"t{k}" for k in range(tasks)])
    weights = [w]
    for window in windows:
        w, state = method.update(state, window)
        weights.append(w)
    return np.stack(weights)


MORE = [
    *(
        IMTLL(),
        SLAW(),
        UWSO(),
        DBMTL(),
        NTKWeighting(),
        ReferenceNorm("t0", decay=0.9),
        GeometricLoss(),
        ScaleInvariant(),
    ),
    *(
        SmoothTchebycheff(warmup=2),
        CoBa(window=4, warmup=2),
        GradNorm(start="balanced"),
        UncertaintyWeighting(form="log1p"),
    ),
]


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("method", [*METHODS, *MORE], ids=repr)
def test_round_robin_follows_the_same_data_in_one_window_each(method, tasks):
    rounds = Rounds.draw(tasks)
    order = [[(t + k) % tasks for k in range(tasks)] for t in range(60)]  # in any order within a round
    apart = follow(CarryForward(method), [rounds.window(t, [k]) for t in range(60) for k in order[t]], tasks)
    together = follow(method, [rounds.window(t, list(range(tasks))) for t in range(60)], tasks)
    np.testing.assert_allclose(apart[::tasks], together, rtol=1e-12)
    assert abs(together[-1] / together[0] - 1).max() > 5e-3
    held = apart[1:].reshape(60, tasks, tasks)[:, :-1]  # between two updates the weights stay
    assert np.array_equal(held, np.broadcast_to(apart[:-1:tasks, None], held.shape))


@pytest.mark.parametrize("method", [*METHODS, MGDA(), IMTLG(), ConFIG()], ids=lambda method: type(method).__name__)
def test_with_all_tasks_in_each_window_nothing_changes(method):
    rounds = Rounds.draw(3)
    windows = [rounds.window(t, [0, 1, 2]) for t in range(60)]
    assert np.array_equal(follow(CarryForward(method), windows, 3), follow(method, windows, 3))


def test_the_last_values_stand_for_a_task_that_came_more_than_once():
    rounds = Rounds.draw(2)
    apart = follow(CarryForward(CoVWeighting()), [rounds.window(t, [int(t % 5 == 4)]) for t in range(60)], 2)
    pairs = [Statistics([rounds.losses[t - 1, 0], rounds.losses[t, 1]], [True, True]) for t in range(4, 60, 5)]
    assert np.array_equal(apart[::5], follow(CoVWeighting(), pairs, 2))


def test_a_task_that_stays_away_is_not_waited_for_longer_than_steps_and_keeps_its_weight():
    rounds = Rounds.draw(3, 40)
    windows = [rounds.window(t, [0, 1] if t > 3 else [0, 1, 2]) for t in range(40)]
    w = follow(CarryForward(GradNorm(lr=0.1), steps=5), windows, 3)
    moved = (np.diff(w, axis=0) != 0).any(1)
    assert moved[:4].all() and not moved[4:9].any() and moved[9:].all()
    assert np.array_equal(w[5:, 2], np.full(36, w[4, 2])) and np.allclose(w.sum(1), 3)


def test_a_method_on_the_gram_matrix_reads_the_last_inner_product_of_every_pair():
    """Windows of two tasks out of three; the data are the same in each, so that the pairs fit together."""
    rounds = Rounds.draw(3, 1)
    pairs = [[0, 1], [1, 2], [2, 0]]
    for method in (MGDA(), IMTLG(), ConFIG()):
        w = follow(CarryForward(method), [rounds.window(0, pairs[t % 3]) for t in range(12)], 3)
        expected = follow(method, [rounds.window(0, [0, 1, 2])], 3)[-1]
        np.testing.assert_allclose(w[-1], expected, rtol=1e-9)
        assert np.array_equal(w[1], w[0]) and np.array_equal(w[2], w[0]) and not np.array_equal(w[3], w[0])


def test_pairs_of_other_data_give_a_gram_matrix_that_can_be():
    rounds = Rounds.draw(3, 40)
    pairs = [[0, 1], [1, 2], [2, 0]]
    seen: list[np.ndarray] = []

    @dataclass(frozen=True)
    class Looks(MGDA):
        def update(self, state, statistics):
            seen.append(statistics.gram)
            return super().update(state, statistics)

    w = follow(CarryForward(Looks()), [rounds.window(t, pairs[t % 3]) for t in range(40)], 3)
    assert np.isfinite(w).all() and len(seen) > 10
    assert all(np.linalg.eigvalsh(gram)[0] > -1e-12 * np.trace(gram) for gram in seen)


@pytest.mark.parametrize(("order", "after"), [([[0], [1]], 2), ([[0], [1], [2]], 3), ([[0, 1], [2]], 7)])
def test_a_method_on_the_gram_matrix_is_refused_where_pairs_do_not_meet(order, after):
    """At once where no pair met in a round, and after `steps` windows where some did."""
    tasks = max(map(max, order)) + 1
    rounds, method = Rounds.draw(tasks), CarryForward(MGDA(), steps=6)
    windows = [rounds.window(t, order[t % len(order)]) for t in range(20)]
    follow(method, windows[: after - 1], tasks)
    with pytest.raises(RuntimeError, match=r"MGDA.* needs the inner products .* pairs of tasks were in none of the la"):
        follow(method, windows[:after], tasks)


def test_it_is_never_put_around_itself_nor_around_a_rotating_method():
    for make in (
        lambda: CarryForward(CarryForward(GradNorm())),
        lambda: CarryForward(Smooth(CarryForward(MGDA()), 0.5)),
    ):
        with pytest.raises(
            ValueError, match=r"`method` must not be in a `CarryForward` already. Found CarryForward|Smoo"
        ):
            make()
    with pytest.raises(ValueError, match=r"`method` must not rotate: .* Found `method = RotoGrad"):
        CarryForward(RotoGrad())
    with pytest.raises(ValueError, match=r"`steps` must be an integer of at least 1. Found `steps = 0`"):
        CarryForward(GradNorm(), 0)


def test_it_is_a_value_and_other_wrappers_go_around_it():
    method = Smooth(CarryForward(GradNorm(), steps=7), 0.5)
    assert method == copy.deepcopy(method) == pickle.loads(pickle.dumps(method))
    rounds = Rounds.draw(2)
    windows = [rounds.window(t // 2, [t % 2]) for t in range(120)]
    w = follow(method, windows, 2)
    assert (w[-1] != w[0]).all() and np.allclose(w.sum(1), 2)
    inner = follow(CarryForward(GradNorm(), steps=7), windows, 2)
    expected = inner[0]
    for mine, smoothed in zip(inner[1:], w[1:], strict=True):
        expected = 0.5 * expected + 0.5 * mine
        np.testing.assert_allclose(smoothed, expected, rtol=1e-12)
    bounded = follow(Clamp(CarryForward(GradNorm(lr=0.5)), 0.9, 1.1), windows, 2)
    assert bounded.min() >= 0.9 and bounded.max() <= 1.1 and (bounded[-1] != 1).all()


@pytest.mark.parametrize("method", [*METHODS, MGDA()], ids=lambda method: type(method).__name__)
def test_weigh_is_the_update_without_its_state(method):
    rounds, carry = Rounds.draw(2), CarryForward(method)
    _, state = carry.init(["a", "b"])
    for t in range(20):
        window = rounds.window(t, [0, 1] if method.needs == MGDA().needs else [t % 2])
        now = carry.weigh(state, window)
        w, state = carry.update(state, window)
        assert np.array_equal(now, w)
