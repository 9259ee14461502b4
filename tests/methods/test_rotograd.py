"""RotoGrad as a method: magnitudes, directions, absent tasks, rotations on SO(m), on the convex toy of its paper."""

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from accel_weighting import RotoGrad, RotoGradNorm
from accel_weighting.methods.rotograd import haar, orthogonalise, retract, skew
from accel_weighting.statistics import Statistics
from tests.methods.rotograd_toy import VARIANTS, toy

TASKS = ["a", "b", "c"]
EXACT = {"rtol": 1e-12, "atol": 1e-15}


def window(norms, present=None, losses=None, moments=None, gram=None):
    norms = np.asarray(norms, np.float64)
    K = len(norms)
    present = np.ones(K, np.bool_) if present is None else np.asarray(present)
    losses = np.ones(K) if losses is None else np.asarray(losses, np.float64)
    return Statistics(losses * present, present, norms * present, gram, moments)


def test_initial_norms_are_those_of_the_first_update_and_again_of_burn_in():
    method = RotoGrad(rotate=False, burn_in=2)
    _, state = method.init(["a", "b"])
    seen = []
    for norms in ([1.0, 4.0], [2.0, 2.0], [8.0, 2.0], [8.0, 1.0]):
        w, state = method.update(state, window(norms))
        seen.append((state["initial_norms"].tolist(), w.tolist()))
    assert [n_0 for n_0, _ in seen] == [[1, 4], [1, 4], [8, 2], [8, 2]]
    # By hand: α ∝ n/n(0), C = Σ α n, ω = C/n.
    assert seen[0][1] == pytest.approx([2.5, 0.625])  # α = (½, ½), C = 2.5
    assert seen[1][1] == pytest.approx([1.0, 1.0])  # α = (0.8, 0.2), C = 2
    assert seen[2][1] == pytest.approx([0.625, 2.5])  # refreshed: α = (½, ½), C = 5
    assert seen[3][1] == pytest.approx([17 / 3 / 8, 17 / 3])  # α = (⅔, ⅓), C = 17/3


def test_burn_in_zero_takes_the_first_norms_only():
    method = RotoGrad(rotate=False, burn_in=0)
    _, state = method.init(["a"])
    for n in (3.0, 5.0, 7.0):
        state = method.update(state, window([n]))[1]
    assert state["initial_norms"].item() == 3


def test_units_of_the_gradients_do_not_matter():
    """One factor on all norms now and one on all initial norms: batch size, loss scale, number of processes."""
    method = RotoGrad(rotate=False, burn_in=0)
    for f, f_0 in ((1e-8, 1.0), (1.0, 1e6), (1e4, 1e-4)):
        _, plain = method.init(TASKS)
        _, scaled = method.init(TASKS)
        plain = method.update(plain, window([1.0, 2.0, 5.0]))[1]
        scaled = method.update(scaled, window([f_0, 2 * f_0, 5 * f_0]))[1]
        w = method.update(plain, window([3.0, 0.5, 2.0]))[0]
        np.testing.assert_allclose(method.update(scaled, window([3 * f, 0.5 * f, 2 * f]))[0], w, rtol=1e-13, atol=0)


def triangles(*G):
    """What a window makes of the tasks' gradients."""
    i, j = torch.triu_indices(G[0].shape[1], G[0].shape[1], 1)
    pairs = [(G[a], G[b]) for a in range(len(G)) for b in range(a + 1, len(G))]
    return torch.stack([(x.T @ y - y.T @ x)[i, j] for x, y in pairs])


def gradients(K, seed=0, m=4, rows=6):
    g = torch.Generator().manual_seed(seed)
    return list(torch.randn(K, rows, m, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("method", [RotoGrad(init="haar"), RotoGradNorm(1.5, init="haar")], ids=repr)
@pytest.mark.parametrize("gone", ["absent", "zero gradient"])
def test_a_task_that_is_not_there_keeps_its_rotation_and_the_others_turn_as_if_alone(method, gone, monkeypatch):
    monkeypatch.setattr("accel_weighting.methods.rotograd.REFRESH", 1)
    state = method.widen(method.init(TASKS)[1], 4)
    alone = method.widen(method.init(["a", "c"])[1], 4)
    alone["rotations"] = state["rotations"][[0, 2]]
    for step in range(3):
        a, _, c = gradients(3, step)
        G = a, torch.zeros_like(a), c
        V = torch.stack([g.flatten() for g in G])
        present = [True, gone != "absent", True]
        before = state
        w, state = method.update(before, window(V.norm(dim=1), present, [1.0, 2.0, 3.0], triangles(*G), V @ V.T))
        V = V[[0, 2]]
        w_alone, alone = method.update(alone, window(V.norm(dim=1), None, [1.0, 3.0], triangles(a, c), V @ V.T))
        assert torch.equal(state["rotations"][1], before["rotations"][1])
        assert not torch.equal(state["rotations"][0], before["rotations"][0])
        torch.testing.assert_close(state["rotations"][[0, 2]], alone["rotations"], **EXACT)
        if gone == "absent":
            assert w[1] == before["weights"][1] and state["initial_norms"][1] == 0
        if gone == "absent" or isinstance(method, RotoGrad):
            np.testing.assert_allclose(w[[0, 2]], w_alone, **EXACT)


def test_a_late_task_remembers_the_norm_of_its_own_first_update():
    method = RotoGrad(rotate=False)
    _, state = method.init(["a", "b"])
    _, state = method.update(state, window([2.0, 9.0], [True, False]))
    w, state = method.update(state, window([1.0, 4.0]))
    assert state["initial_norms"].tolist() == [2, 4]
    assert w.tolist() == pytest.approx([3.0, 0.75])  # α = (⅓, ⅔), C = 3
    w, state = method.update(state, window([5.0, 9.0], [True, False]))
    assert w.tolist() == pytest.approx([1.0, 0.75]) and state["initial_norms"].tolist() == [2, 4]


@pytest.mark.parametrize("method", [RotoGrad(), RotoGradNorm(1.0)], ids=repr)
def test_a_window_of_zero_gradients_changes_nothing(method):
    state = method.widen(method.init(TASKS)[1], 4)
    G = gradients(3)
    V = torch.stack([g.flatten() for g in G])
    w, state = method.update(state, window(V.norm(dim=1), None, None, triangles(*G), V @ V.T))
    zero = torch.zeros(3, 6, 4).double()
    after_w, after = method.update(state, window([0.0] * 3, None, None, triangles(*zero), torch.zeros(3, 3).double()))
    assert torch.equal(after["rotations"], state["rotations"]) and np.isfinite(after_w).all()
    assert np.array_equal(after_w, w) or isinstance(method, RotoGradNorm)  # Adam coasts
    gone = window([0.0] * 3, [False] * 3, None, triangles(*zero), torch.zeros(3, 3).double())
    gone_w, after = method.update(state, gone)
    assert torch.equal(after["rotations"], state["rotations"]) and np.array_equal(gone_w, w)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_rotogradnorm_is_autograd_on_the_weights_of_its_formula(alpha, normalize):
    """Σ_k |w_k n_k − ‖(1/K) Σ_j w_j G_j‖ r_k^α|, the target held constant, by torch's Adam on v, w = K softmax(v)."""
    method = RotoGradNorm(alpha, normalize_losses=normalize, burn_in=5)
    rotograd = RotoGrad(normalize_losses=normalize, burn_in=5)
    state, plain = (method_.widen(method_.init(TASKS)[1], 4) for method_ in (method, rotograd))
    v = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([v], lr=0.025)
    g = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 0.2, 3.0]).double()[:, None]
    for step in range(30):
        G = gradients(3, step)
        V = torch.stack([x.flatten() for x in G]) * scales
        L = torch.rand(3, generator=g).double() + 0.1
        if step in (0, 5):
            initial = L
        scaled = V / initial[:, None] if normalize else V
        w = 3 * torch.softmax(v, 0)
        target = (w.detach() @ scaled / 3).norm() * (L / initial / (L / initial).mean()) ** alpha
        adam.zero_grad()
        (w * scaled.norm(dim=1) - target).abs().sum().backward()
        adam.step()
        seen = window(V.norm(dim=1), None, L, triangles(*(x * s for x, s in zip(G, scales, strict=True))), V @ V.T)
        obtained, state = method.update(state, seen)
        _, plain = rotograd.update(plain, seen)
        np.testing.assert_allclose(obtained, 3 * torch.softmax(v.detach(), 0), rtol=1e-9, atol=1e-10)
        assert torch.equal(state["rotations"], plain["rotations"])
    assert abs(obtained - 1).max() > 0.1
    assert method.acts_on == "shared" and method.needs == {"norms", "gram", "moments", "losses"}


def test_on_the_convex_toy_only_rotations_reach_both_optima():
    gaps, R, _ = toy(100, 1500)
    solved = dict(zip(VARIANTS, (gaps < 0.05).all(-1).sum(1).tolist(), strict=True))
    assert solved["RotoGrad"] == solved["rotations only"] == 100, solved
    assert solved["vanilla"] == solved["magnitude only"] == 0, solved
    assert solved["flipped sign"] <= 1 and solved["R for Rᵀ"] <= 5 and solved["g̃ for g"] <= 5, solved
    assert (gaps[0].mean(-1) - 2.759).abs().max() < 0.05  # vanilla stays near z = 0, whose value is analytic
    relative = R[VARIANTS.index("RotoGrad"), :, 0].mT @ R[VARIANTS.index("RotoGrad"), :, 1]
    angles = torch.atan2(relative[:, 1, 0], relative[:, 0, 0]).abs()
    assert (angles - math.pi).abs().max() < 0.01


def error(R):
    R = R.double()
    return (R.mT @ R - torch.eye(R.shape[-1]).double()).abs().max().item()


@pytest.mark.parametrize("lr_decay", [0.9999, 1.0])
def test_float32_rotations_stay_orthogonal_over_ten_thousand_steps(lr_decay):
    """Tasks 0 and 1 turn at random, 2 and 3 always the same way in one plane, all as fast as gradients ever can."""
    m, K = 64, 4
    method = RotoGrad(lr_decay=lr_decay)
    state = method.widen(method.init([*TASKS, "d"])[1], m)
    state["rotations"] = state["rotations"].float()
    g = torch.Generator().manual_seed(0)
    moments = torch.zeros(6, m * (m - 1) // 2).double()
    moments[5, 0] = 3.0  # of the plane of the first two features; a quarter of it goes to each task
    worst, start = 0.0, state["rotations"]
    for step in range(10_000):
        random = torch.randn(m * (m - 1) // 2, generator=g, dtype=torch.float64)
        moments[0] = random * (3 / (2 * m**0.5))  # spectral norm about 3, too
        _, state = method.update(state, window([1.0] * K, moments=moments))
        if step % 97 == 0 or step > 9_980:
            worst = max(worst, error(state["rotations"]))
    assert state["rotations"].dtype == torch.float32
    assert ((state["rotations"] - start).abs().amax((1, 2)) > 0.1).all()
    assert worst < 1e-6


def test_without_the_newton_schulz_step_float32_would_drift(monkeypatch):
    monkeypatch.setattr("accel_weighting.methods.rotograd.REFRESH", 10**9)
    method = RotoGrad(lr_decay=1.0)
    state = method.widen(method.init(["a", "b"])[1], 16)
    state["rotations"] = state["rotations"].float()
    g = torch.Generator().manual_seed(0)
    for _ in range(2_000):
        moments = torch.randn(1, 120, generator=g, dtype=torch.float64) / 8
        _, state = method.update(state, window([1.0, 1.0], moments=moments))
    assert error(state["rotations"]) > 1e-6


@pytest.mark.parametrize("lr", [0.1, 0.5, 10.0])
def test_large_steps_stay_on_the_group(lr):
    method = RotoGrad(lr=lr, lr_decay=1.0)
    state = method.widen(method.init(TASKS)[1], 12)
    state["rotations"] = state["rotations"].float()
    for step in range(200):
        G = gradients(3, step % 7, m=12, rows=1)
        V = torch.stack([x.flatten() for x in G])
        _, state = method.update(state, window(V.norm(dim=1), moments=triangles(*G)))
        assert error(state["rotations"]) < 1e-6
    assert torch.linalg.det(state["rotations"].double()).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("cayley", [False, True])
def test_the_retraction_is_the_exponential_to_second_order(cayley):
    R = haar(3, 8, 1)
    A = skew(torch.randn(3, 28, generator=torch.Generator().manual_seed(0)).double(), 8)
    A /= torch.linalg.matrix_norm(A, 2)[:, None, None]
    off = [(retract(R, h * A, cayley) - R @ torch.matrix_exp(h * A)).abs().max().item() for h in (0.02, 0.01)]
    assert 7 < off[0] / off[1] < 9 and off[0] < 1e-6  # third order remains
    before, after = (error(f(retract(R, 0.1 * A, cayley))) for f in (lambda x: x, orthogonalise))
    assert before < (1e-14 if cayley else 0.1**6 / 60) and after < 3e-15


def test_a_skew_matrix_is_that_of_its_triangle():
    b = torch.arange(1.0, 7).double()[None]
    expected = torch.tensor([[0.0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]]).double()
    assert torch.equal(skew(b, 4)[0], expected)
    assert torch.equal(skew(torch.zeros(2, 0), 1), torch.zeros(2, 1, 1))


def test_haar_rotations_are_uniform_on_so():
    R = haar(4000, 3, 0)
    assert error(R) < 1e-14
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(4000).double(), rtol=0, atol=1e-13)
    assert R.mean(0).abs().max() < 0.05
    trace = R.diagonal(dim1=1, dim2=2).sum(1)
    angle = torch.arccos(((trace - 1) / 2).clamp(-1, 1))  # has the density (1 − cos θ)/π
    for quantile in (0.5, 1.5, 2.5):
        expected = (quantile - math.sin(quantile)) / math.pi
        assert abs((angle < quantile).double().mean() - expected) < 0.03


def test_haar_rotations_depend_on_the_seed_alone():
    methods = [RotoGrad(init="haar"), RotoGrad(init="haar"), RotoGrad(init="haar", seed=1)]
    torch.manual_seed(3)
    a, b, c = (method.widen(method.init(TASKS)[1], 6)["rotations"] for method in methods)
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a[0], a[1])
    state = torch.get_rng_state()
    methods[0].widen(methods[0].init(TASKS)[1], 6)
    assert torch.equal(torch.get_rng_state(), state)  # the user's random numbers stay theirs


def test_it_is_a_value():
    method = RotoGrad(size=64, init="haar")
    assert repr(RotoGrad()) == "RotoGrad()" and repr(method) == "RotoGrad(size=64, init='haar')"
    assert repr(RotoGradNorm(alpha=1.5, lr=0.1)) == "RotoGradNorm(lr=0.1, alpha=1.5)"
    changes = [{"init": "identity"}, {"size": 3}, {"lr": 0.1}, {"rotate": False}, {"seed": 2}, {"cooperative_after": 0}]
    others = [replace(method, **change) for change in changes]
    assert len({repr(m) for m in [method, *others]}) == len({*others, method}) == 7
    for m in [method, *others, RotoGradNorm(1.0, init="haar")]:
        for same in (pickle.loads(pickle.dumps(m)), copy.deepcopy(m), replace(m)):
            assert same == m and hash(same) == hash(m) and repr(same) == repr(m)
    assert replace(method, lr=0.1).initial_rotations == "haar" and others[0].initial_rotations == "identity"
    with pytest.raises(AttributeError):
        method.lr = 1.0
    assert RotoGrad(rotate=False).needs == {"norms"} and RotoGrad().needs == {"norms", "moments"}
    assert RotoGrad(normalize_losses=True).needs == {"norms", "moments", "losses"}
    assert RotoGrad(normalize_losses=True).positive_losses and not RotoGrad().positive_losses


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"size": 0}, "`size` must be None or an integer of at least 1. Found `size = 0`"),
        ({"lr": 0.0}, "`lr` must be positive and finite"),
        ({"lr": math.nan}, "`lr` must be positive and finite"),
        ({"lr_decay": 1.1}, r"`lr_decay` must be in \(0, 1\]"),
        ({"burn_in": -1}, "`burn_in` must be an integer of at least 0"),
        ({"init": "random"}, "`init` must be 'identity' or 'haar'. Found `init = 'random'`"),
        ({"init": len}, "`init` must be"),
        ({"cooperative_after": -1}, "`cooperative_after` must be None or an integer of at least 0"),
    ],
)
def test_hyperparameters_are_checked(arguments, found):
    with pytest.raises(ValueError, match=found):
        RotoGrad(**arguments)
    with pytest.raises(ValueError, match=found):
        RotoGradNorm(1.0, **arguments)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [({"alpha": -1.0}, "`alpha`"), ({"alpha": 1.0, "weights_lr": 0.0}, "`weights_lr`")],
)
def test_hyperparameters_of_the_weights_are_checked(arguments, found):
    with pytest.raises(ValueError, match=found):
        RotoGradNorm(**arguments)


@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.9])
def test_rotogradnorm_makes_norms_equal_under_the_mean_norm_alone(cosine):
    n = np.array([1.0, 3.0, 10.0])
    G = np.where(np.eye(3, dtype=bool), 1.0, cosine) * n * n[:, None]
    spread = {}
    for target in ("mean_gradient", "mean_norm"):
        method = RotoGradNorm(0.0, target=target)
        w, state = method.init(["a", "b", "c"])
        for _ in range(2000):
            w, state = method.update(state, window(n, losses=np.ones(3), gram=G))
        spread[target] = max(w * n) / min(w * n)
    assert spread["mean_norm"] < 1.1
    assert cosine == 0.9 or spread["mean_gradient"] > 1.5
