"""UPGrad, DualProj, FairGrad, CosineGate and GradVac: against TorchJD, other solvers, and their papers' equations."""

import numpy as np
import pytest
import torch
import torchjd.aggregation as tj
from scipy.optimize import minimize
from torchjd.linalg import QuadprogProjector

from accel_weighting import CosineGate, DualProj, FairGrad, GradVac, NashMTL, PCGrad, Statistics, UPGrad
from accel_weighting.methods.algebra import mixed_seed


def jacobian(K, d, seed, scales=None):
    J = np.random.default_rng([K, d, seed]).normal(size=(K, d))
    return J if scales is None else J * np.asarray(scales)[:, None]


def names(K):
    return [f"task{k}" for k in range(K)]


def window(J, present=None):
    M = J @ J.T
    here = np.ones(len(J), np.bool_) if present is None else np.asarray(present)
    return Statistics(np.ones(len(J)), here, np.sqrt(M.diagonal()) * here, M * np.outer(here, here))


def answer(method, J):
    return method.update(method.init(names(len(J)))[1], window(J))[0]


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


CASES = {
    **{f"random, K = {K}": jacobian(K, K + 4, K) for K in (1, 2, 3, 5, 8, 16, 64)},
    **{f"conflicting, K = {K}": jacobian(K, 30, K) - 0.5 * jacobian(1, 30, 9) for K in (2, 4, 6)},
    "rank 2 of 5": jacobian(5, 2, 1),
    "rank 1 of 4": jacobian(4, 1, 5),
    "scales 1:10:100": jacobian(3, 6, 2, [1, 10, 100]),
    "scales 1e±8": jacobian(3, 6, 3, [1e8, 1, 1e-8]),
    "duplicates": jacobian(2, 5, 4)[[0, 0, 1]],
    "opposite": np.array([[1.0, 2.0], [-1.0, -2.0]]),
    "opposite and a third": np.array([[1.0, 2.0, 0.0], [-2.0, -4.0, 0.0], [1.0, 1.0, 1.0]]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", [UPGrad(), DualProj()], ids=repr)
def test_no_gradient_is_conflicted_with_whatever_the_lengths(method, case):
    J = CASES[case]
    w = answer(method, J)
    g = w @ J
    assert (w >= 1 / len(J) * (1 - 1e-12)).all()
    scale = np.abs(w[:, None] * J).max() + 1e-300
    assert (J @ g / np.linalg.norm(J, axis=1) / scale > -1e-9).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("method", "weighting"), [(UPGrad(), tj.UPGradWeighting), (DualProj(), tj.DualProjWeighting)], ids=repr
)
def test_the_projections_are_torchjds(method, weighting, case):
    J = CASES[case] / np.sqrt((CASES[case] ** 2).sum(1).mean())
    theirs = weighting(projector=QuadprogProjector(norm_eps=0.0, reg_eps=1e-12))(torch.tensor(J @ J.T)).numpy()
    ours = answer(method, J)
    if "scales 1e" in case:  # their solver holds no gradient 1e-16 times as long as another; the test above is sharper
        return
    far = "opposite" in case or "duplicates" in case  # their regularisation, and equal optima
    np.testing.assert_allclose(ours @ J, theirs @ J, rtol=0, atol=1e-5 if far else 1e-8)


def test_a_projection_is_the_nearest_vector_of_the_dual_cone():
    """Found by another way: the constraints J d ≥ 0 on the vector itself, by a general solver."""
    J = CASES["conflicting, K = 4"]

    def nearest(g):
        return minimize(
            lambda d: ((d - g) ** 2).sum(),
            g,
            jac=lambda d: 2 * (d - g),
            constraints={"type": "ineq", "fun": lambda d: J @ d, "jac": lambda d: J},
            method="SLSQP",
            options={"maxiter": 1000, "ftol": 1e-14},
        ).x

    np.testing.assert_allclose(answer(DualProj(), J) @ J, nearest(J.mean(0)), atol=1e-6)
    np.testing.assert_allclose(answer(UPGrad(), J) @ J, np.mean([nearest(g) for g in J], 0), atol=1e-6)


# ---- FairGrad --------------------------------------------------------------------------------------------------------


REGULAR = [case for case in CASES if not case.startswith(("opposite", "rank", "scales 1e"))]


@pytest.mark.parametrize("case", REGULAR)
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 5.0, 20.0])
def test_fairgrad_solves_its_equation(alpha, case):
    J = CASES[case] / np.sqrt((CASES[case] ** 2).sum(1).mean())
    w = answer(FairGrad(alpha), J)
    gains = J @ (w @ J)
    assert (w > 0).all()
    rounding = np.abs(w @ np.abs(J @ J.T)) * 1e-14  # what is left of gains that cancel out
    np.testing.assert_allclose(gains, w ** (-1 / alpha), rtol=1e-7, atol=rounding.max())


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("K", [2, 3, 5])
def test_fairgrad_is_torchjds(alpha, K):
    J = CASES[f"random, K = {K}"] / np.sqrt((CASES[f"random, K = {K}"] ** 2).sum(1).mean())
    theirs = tj.FairGradWeighting(alpha=alpha)(torch.tensor(J @ J.T)).numpy()
    np.testing.assert_allclose(answer(FairGrad(alpha), J), theirs, rtol=1e-4)


def test_fairgrad_between_the_sum_and_the_worst_off():
    J = CASES["conflicting, K = 4"]
    np.testing.assert_allclose(answer(FairGrad(1.0), J), answer(NashMTL(), J), rtol=1e-9)
    assert cosine(answer(FairGrad(0.01), J) @ J, J.sum(0)) > 0.999
    gains = J @ (answer(FairGrad(200.0), J) @ J)
    assert gains.max() < 1.2 * gains.min()  # equal gains are the fairest of all


def test_fairgrad_without_a_root_stays_finite():
    for J in (CASES["opposite"], CASES["opposite and a third"], np.array([[1.0, 0], [-1.0, 1e-9]])):
        for alpha in (0.5, 1.0, 2.0, 10.0):
            w = answer(FairGrad(alpha), J)
            assert np.isfinite(w).all() and (w > 0).all()


# ---- CosineGate ------------------------------------------------------------------------------------------------------


def test_the_gate_lets_in_what_agrees_with_the_primary_task():
    x = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64, requires_grad=True)
    losses = [((x - 1) ** 2).sum(), (x[0] - x[1]) ** 2, -(x * x).sum() - x.sum(), x[2] * 5]
    J = np.stack([torch.autograd.grad(L, x)[0].numpy() for L in losses])
    cosines = np.array([cosine(J[1], g) for g in J])
    for mode, expected in (("hard", (cosines >= 0) * 1.0), ("soft", np.maximum(cosines, 0))):
        w = answer(CosineGate("task1", mode), J)
        np.testing.assert_allclose(w, expected, atol=1e-12)
        assert w[1] == 1 and (w @ J) @ J[1] >= 0
    assert {0.0, 1.0} <= set(answer(CosineGate("task1"), J).tolist())


def test_the_gate_waits_for_the_primary_task():
    J = jacobian(3, 4, 1)
    J[2] = -J[0]
    method = CosineGate("task0")
    w, state = method.init(names(3))
    w, state = method.update(state, window(J))
    assert w[2] == 0
    for present in ([False, True, True], [True, True, False]):
        again, _ = method.update(state, window(J, present))
        assert again[2] == 0 and again[0] == 1
    zero = J.copy()
    zero[0] = 0
    assert np.array_equal(method.update(state, window(zero))[0], w)
    with pytest.raises(ValueError, match="`primary` must name tasks out of"):
        CosineGate("task9").init(names(3))


# ---- GradVac ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_gradvac_is_torchjds_with_its_memory(beta, K):
    theirs, method = tj.GradVacWeighting(beta=beta, eps=0.0), GradVac(beta=beta)
    _, state = method.init(names(K))
    for t in range(8):
        J = jacobian(K, K + 3, t)
        J /= np.sqrt((J**2).sum(1).mean())
        w, state = method.update(state, window(J))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(0, t))
            expected = theirs(torch.tensor(J @ J.T)).numpy()
        np.testing.assert_allclose(w, expected, rtol=1e-9, atol=1e-9)


def test_gradvac_by_the_papers_equation_on_vectors():
    """Two tasks: eq. 3 on the gradients themselves, and the cosine afterwards is the target."""
    method, phi = GradVac(beta=0.3, ema="raw"), 0.0
    _, state = method.init(names(2))
    seen = []
    for t in range(6):
        g = jacobian(2, 5, 20 + t)
        w, state = method.update(state, window(g))
        cos, total = cosine(*g), np.zeros(5)
        for i, j in ((0, 1), (1, 0)):
            changed = g[i].copy()
            if cos < phi:
                scale = np.linalg.norm(g[i]) * (phi * np.sqrt(1 - cos**2) - cos * np.sqrt(1 - phi**2))
                changed = changed + scale / (np.linalg.norm(g[j]) * np.sqrt(1 - phi**2)) * g[j]
                assert cosine(changed, g[j]) == pytest.approx(phi)
                seen.append(t)
            total += changed
        np.testing.assert_allclose(w @ g, total, rtol=1e-9)
        phi = 0.7 * phi + 0.3 * cos
        np.testing.assert_allclose(state["targets"][0, 0, 1], phi)
    assert seen


def test_targets_of_zero_are_pcgrad_for_two_tasks():
    for seed in range(5):
        J = jacobian(2, 4, seed)
        np.testing.assert_allclose(answer(GradVac(beta=0.0), J), answer(PCGrad(), J), rtol=1e-9)


def test_a_pair_with_an_absent_task_keeps_its_target():
    method = GradVac()
    _, state = method.init(names(3))
    _, state = method.update(state, window(jacobian(3, 4, 1)))
    _, after = method.update(state, window(jacobian(3, 4, 2), [True, False, True]))
    changed = state["targets"][0] != after["targets"][0]
    assert changed[0, 2] and changed[2, 0] and not changed[1].any() and not changed[:, 1].any()
