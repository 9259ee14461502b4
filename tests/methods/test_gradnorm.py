import numpy as np
import pytest
import torch

from accel_weighting.methods.gradnorm import GradNorm
from accel_weighting.methods.wrappers import Every, Smooth
from accel_weighting.statistics import Statistics

TASKS = ["a", "b", "c"]


def vector(*values):
    return np.array(values, dtype=np.float64)


def window(losses, norms, present=None):
    losses, norms = np.asarray(losses, np.float64), np.asarray(norms, np.float64)
    present = np.ones(len(losses), np.bool_) if present is None else np.asarray(present)
    return Statistics(losses * present, present, norms * present)


def run(method, windows, tasks=TASKS, initial_weights=None):
    """All weights of a run, the initial ones first, and the last state."""
    w, state = method.init(tasks[: len(windows[0].losses)], initial_weights)
    trajectory = [w]
    for statistics in windows:
        w, state = method.update(state, statistics)
        trajectory.append(w)
    return trajectory, state


def random_windows(steps, K, seed=0, absent=0.0):
    g = torch.Generator().manual_seed(seed)
    windows = []
    for _ in range(steps):
        present = torch.rand(K, generator=g) >= absent
        windows.append(window(torch.rand(K, generator=g) + 0.1, torch.rand(K, generator=g) * 10, present.tolist()))
    return windows


class Paper:
    """Algorithm 1 with autograd: a shared W, three task losses, L_grad differentiated with respect to w."""

    def __init__(self, alpha, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.alpha = alpha
        self.W = torch.randn(4, 5, generator=g, dtype=torch.float64, requires_grad=True)
        self.x = torch.randn(7, 5, generator=g, dtype=torch.float64)
        self.heads = torch.randn(3, 4, generator=g, dtype=torch.float64) * torch.tensor([0.3, 1, 5])[:, None]
        self.y = torch.randn(3, 7, generator=g, dtype=torch.float64)
        self.initial = None

    def losses(self):
        z = torch.tanh(self.x @ self.W.T)
        return ((z @ self.heads.T).T - self.y).square().mean(1)

    def L_grad(self, w):
        L = self.losses()
        self.initial = L.detach() if self.initial is None else self.initial
        G = torch.stack([torch.autograd.grad(w[i] * L[i], self.W, create_graph=True)[0].norm() for i in range(3)])
        ratio = L.detach() / self.initial
        target = (G.mean() * (ratio / ratio.mean()) ** self.alpha).detach()
        return (G - target).abs().sum()

    def seen(self):
        L = self.losses()
        n = torch.stack([torch.autograd.grad(L[i], self.W, retain_graph=True)[0].norm() for i in range(3)])
        return window(L.detach(), n)

    def train(self, w):
        """A step of the shared weights, under w."""
        gradient = torch.autograd.grad(torch.tensor(w) @ self.losses(), self.W)[0]
        with torch.no_grad():
            self.W -= 0.02 * gradient


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_sgd_is_autograd_on_the_weights(alpha):
    paper, lr = Paper(alpha), 1e-3
    method = GradNorm(alpha=alpha, lr=lr, optimizer="sgd")
    w, state = method.init(TASKS)
    expected = torch.ones(3, dtype=torch.float64)
    for _ in range(20):
        leaf = expected.clone().requires_grad_()
        expected = expected - lr * torch.autograd.grad(paper.L_grad(leaf), leaf)[0]
        expected = expected * 3 / expected.sum()
        w, state = method.update(state, paper.seen())
        np.testing.assert_allclose(w, expected, rtol=1e-12, atol=1e-12)
        paper.train(w)
    assert abs(w - 1).max() > 0.01


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_adam_is_torch_adam_on_the_logits(alpha):
    paper = Paper(alpha)
    method = GradNorm(alpha=alpha)
    w, state = method.init(TASKS)
    v = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([v], lr=0.025)
    for _ in range(40):
        v.grad = torch.autograd.grad(paper.L_grad(3 * torch.softmax(v, 0)), v)[0]
        adam.step()
        w, state = method.update(state, paper.seen())
        np.testing.assert_allclose(w, 3 * torch.softmax(v, 0).detach(), rtol=1e-10, atol=1e-10)
        paper.train(w)
    assert abs(w - 1).max() > 0.1


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_slower_task_gets_the_larger_gradient(optimizer):
    """Eq. 1 has exponent +α. Equal norms throughout, so that only the training rates tell the tasks apart."""
    windows = [window([1.0, 1.0], [1.0, 1.0])] + [window([0.9, 0.1], [1.0, 1.0])] * 10
    trajectory, _ = run(GradNorm(alpha=1.0, lr=0.01, optimizer=optimizer), windows)
    assert np.array_equal(trajectory[1], vector(1, 1))
    assert trajectory[-1][0] > 1.05 > 0.95 > trajectory[-1][1]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_alpha_zero_equalises_norms(optimizer):
    n = vector(4.0, 1.0, 0.5)
    windows = [window([1.0, 2.0, 3.0], n)] * 3000
    trajectory, _ = run(GradNorm(alpha=0, lr=1e-3, optimizer=optimizer), windows)
    G = trajectory[-1] * n
    np.testing.assert_allclose(G, np.full(3, G.mean()), rtol=0.02, atol=0)


def test_alpha_one_has_its_fixed_point_at_the_training_rates():
    """With fixed norms and rates, mean r = 1 makes G_i = Ḡ r_i solvable exactly."""
    n, L = vector(4.0, 1.0, 0.5), vector(0.9, 0.3, 0.6)
    windows = [window(L, n)] * 3000
    method = GradNorm(alpha=1.0, lr=2e-3, initial_losses={"a": 1, "b": 1, "c": 1})
    G = run(method, windows)[0][-1] * n
    np.testing.assert_allclose(G / G.mean(), L / L.mean(), rtol=0.03, atol=0)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("alpha", [0.0, 1.5, 4.0])
@pytest.mark.parametrize("absent", [0.0, 0.4])
def test_weights_stay_positive_and_keep_their_sum(optimizer, alpha, absent):
    initial = {"b": 0.2, "c": 4.0}
    windows = random_windows(300, 5, absent=absent)
    trajectory, _ = run(GradNorm(alpha, 0.2, optimizer), windows, ["a", "b", "c", "d", "e"], initial)
    for w in trajectory:
        assert w.min() > 0
        assert abs(w.sum() - 7.2) < 1e-12


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_an_absent_task_keeps_its_weight_and_its_state(optimizer):
    method = GradNorm(alpha=0.5, optimizer=optimizer, initial_loss_decay=0.9)
    windows = random_windows(5, 3)
    trajectory, before = run(method, windows)
    w, after = method.update(before, window([0.3, 9.9, 0.7], [1.0, 9.9, 5.0], [True, False, True]))
    assert w[1] == trajectory[-1][1]
    assert w[0] != trajectory[-1][0] and abs(w.sum() - 3) < 1e-12
    for key, value in before.items():
        assert value[1] == after[key][1], key


def test_the_present_tasks_are_balanced_as_if_alone():
    """Means run over the present: with c absent, a and b move as a run of a and b does."""
    windows = random_windows(30, 2)
    padded = [window([*s.losses, 0.0], [*s.norms, 0.0], [True, True, False]) for s in windows]
    alone, with_absent = run(GradNorm(), windows)[0], run(GradNorm(), padded)[0]
    np.testing.assert_allclose(with_absent[-1], [*alone[-1], 1], rtol=1e-12, atol=0)


def test_a_window_without_any_task_changes_nothing():
    before, state = run(GradNorm(), random_windows(3, 3))
    w, after = GradNorm().update(state, window([0.0] * 3, [0.0] * 3, [False] * 3))
    assert np.array_equal(w, before[-1]) and all(np.array_equal(state[key], after[key]) for key in state)


def test_initial_losses_are_those_of_the_first_window_with_the_task():
    windows = [window([2.0, 0.0], [1, 1], [True, False]), window([1.0, 8.0], [1, 1]), window([0.5, 4.0], [1, 1])]
    _, state = run(GradNorm(), windows)
    assert state["initial_losses"].tolist() == [2.0, 8.0]


def test_a_zero_first_loss_waits_for_the_first_positive_one():
    """Until then the task counts as absent: its weight stays, and the others are balanced without it."""
    first = [window([2.0, 1.0, 0.0], [1.0, 3.0, 5.0])] * 4
    waiting, state = run(GradNorm(), first)
    assert waiting[-1][2] == 1 and state["initial_losses"].tolist() == [2.0, 1.0, 0.0]
    pair = run(GradNorm(), [window([2.0, 1.0], [1.0, 3.0])] * 4)[0]
    np.testing.assert_allclose(waiting[-1][:2], pair[-1], rtol=1e-12, atol=0)
    w, state = GradNorm().update(state, window([2.0, 1.0, 7.0], [1.0, 3.0, 5.0]))
    assert w[2] != 1 and state["initial_losses"].tolist() == [2.0, 1.0, 7.0]


def test_given_initial_losses_are_used_and_the_others_are_found():
    method = GradNorm(alpha=1.0, initial_losses={"b": 4.0})
    (_, w), state = run(method, [window([3.0, 1.0], [1.0, 1.0])])
    assert state["initial_losses"].tolist() == [3.0, 4.0]
    assert w[0] > w[1]  # b is down to a quarter already, a has just begun


def test_initial_losses_decay_after_they_were_used():
    windows = [window([4.0, 1.0], [1, 1]), window([2.0, 1.0], [1, 1]), window([1.0, 1.0], [1, 1])]
    _, state = run(GradNorm(initial_loss_decay=0.75), windows)
    np.testing.assert_allclose(state["initial_losses"], vector(0.75 * 3.5 + 0.25 * 1, 1))
    # L(0) as it was before this window's loss decides: at d = 0 the rate is L(t) / L(t−1).
    (*_, before, after), _ = run(GradNorm(alpha=1.0, initial_loss_decay=0.0), [*windows[:1], windows[1]])
    assert after[1] > before[1]


def test_losses_that_reach_zero_leave_finite_weights():
    windows = [window([1.0, 1.0], [1, 2])] + [window([0.0, 0.0], [0, 0]), window([0.0, 0.0], [1, 2])] * 3
    assert all(np.isfinite(w).all() and abs(w.sum() - 2) < 1e-12 for w in run(GradNorm(), windows)[0])


def test_only_the_named_tasks_are_balanced():
    method = GradNorm(alpha=0.5, tasks=["c", "a"])
    windows = random_windows(50, 3)
    trajectory, _ = run(method, windows, initial_weights={"b": 0.3})
    assert all(w[1] == 0.3 for w in trajectory)
    pair = [Statistics(s.losses[[0, 2]], s.present[[0, 2]], s.norms[[0, 2]]) for s in windows]
    alone = run(GradNorm(alpha=0.5), pair)[0]
    np.testing.assert_allclose(trajectory[-1][[0, 2]], alone[-1], rtol=1e-12, atol=0)


def test_adam_does_not_see_the_units_of_the_losses():
    windows = random_windows(50, 3)
    scaled = [window(s.losses * 1e4, s.norms * 1e4) for s in windows]
    np.testing.assert_allclose(run(GradNorm(), windows)[0], run(GradNorm(), scaled)[0], rtol=1e-5, atol=0)


def test_alpha_zero_does_not_read_the_losses():
    method = GradNorm(alpha=0.0)
    assert method.needs == {"norms"} and not method.positive_losses
    assert GradNorm().needs == {"norms", "losses"} and GradNorm().positive_losses and GradNorm().acts_on == "losses"
    norms = [s.norms for s in random_windows(10, 3)]
    sound = run(method, [window([1.0, 2.0, 3.0], n) for n in norms])[0]
    unsound = run(method, [window([0.0, -2.0, float("nan")], n) for n in norms])[0]
    np.testing.assert_allclose(sound, unsound, rtol=0, atol=0)


def test_one_task_keeps_its_weight():
    for method in (GradNorm(), GradNorm(optimizer="sgd")):
        assert all(w.item() == 1 for w in run(method, random_windows(20, 1))[0])


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"alpha": -0.5}, r"`alpha` must be finite and at least 0. Found `alpha = -0.5`"),
        ({"alpha": float("nan")}, "`alpha`"),
        ({"alpha": float("inf")}, "`alpha`"),
        ({"lr": 0.0}, "`lr` must be positive"),
        ({"optimizer": "rmsprop"}, "`optimizer` must be 'adam' or 'sgd'. Found `optimizer = 'rmsprop'`"),
        ({"initial_loss_decay": 1.5}, r"`initial_loss_decay` must be in \[0, 1\]. Found `initial_loss_decay = 1.5`"),
        (
            {"initial_losses": {"a": 0.0}},
            "`initial_losses` must be .* positive and finite. Found `initial_losses = {'a': 0.0}`",
        ),
    ],
)
def test_hyperparameters_are_checked(arguments, found):
    with pytest.raises(ValueError, match=found):
        GradNorm(**arguments)


@pytest.mark.parametrize("arguments", [{"tasks": ["topik", "zz"]}, {"initial_losses": {"topik": 1.0, "zz": 2.0}}])
def test_unknown_names_are_listed_with_a_guess(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"`{name}` must .*\['topik', 'zz'\]`. Did you mean `\['topic'\]`"):
        GradNorm(**arguments).init(["topic", "sentiment"])


def test_it_is_a_value():
    method = GradNorm(initial_losses={"a": 1}, tasks=["a", "b"])
    assert method == GradNorm(initial_losses={"a": 1.0}, tasks=("a", "b")) and isinstance(hash(method), int)
    assert "initial_losses={'a': 1.0}" in repr(method)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_balanced_start_is_at_rest_after_one_update(alpha, optimizer):
    """``w n ∝ r^α`` at the sum that was there; the updates after it are those of the plain method from there."""
    norms, losses, initial = vector(1.0, 30.0, 0.02), vector(0.5, 2.0, 1.0), {"a": 1.0, "b": 3.0, "c": 1.5}
    method = GradNorm(alpha, 1e-3, optimizer, initial_losses=initial, start="balanced")
    (_, w, after), state = run(method, [window(losses, norms), window(losses * 0.9, norms * 1.1)])
    r = losses / np.array([*initial.values()])
    expected = (r / r.mean()) ** alpha / norms
    np.testing.assert_allclose(w, 3 * expected / expected.sum())
    plain = GradNorm(alpha, 1e-3, optimizer, initial_losses=initial)
    again = run(plain, [window(losses * 0.9, norms * 1.1)], initial_weights=dict(zip(TASKS, w, strict=True)))[0][-1]
    np.testing.assert_allclose(after, again, rtol=1e-12)
    assert state["started"].all()


def test_a_task_that_comes_late_joins_the_others_at_their_norm():
    method = GradNorm(alpha=0.0, start="balanced")
    (_, first, second), _ = run(method, [window([1, 1, 1], [1, 4, 9], [1, 1, 0]), window([1, 1, 1], [1, 4, 9])])
    np.testing.assert_allclose(first[0] * 1, first[1] * 4)
    assert first[2] == 1
    np.testing.assert_allclose(second * vector(1, 4, 9), np.full(3, second[0]))
    assert second.sum() == pytest.approx(3)


def test_it_measures_the_tasks_that_it_balances():
    assert list(GradNorm().measures(TASKS)) == TASKS
    assert list(GradNorm(tasks=("c", "a")).measures(TASKS)) == ["a", "c"]
    assert list(Smooth(Every(GradNorm(tasks=("c",)), 2), 0.5).measures(TASKS)) == ["c"]
