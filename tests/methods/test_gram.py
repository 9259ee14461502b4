"""The Gram family against formulae written out again, optimality conditions, brute force, and TorchJD."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
import torchjd.aggregation as tj
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_weighting.methods.algebra import LIMIT, mixed_seed
from accel_weighting.methods.aligned_mtl import AlignedMTL
from accel_weighting.methods.balancer import GradientBalancer
from accel_weighting.methods.cagrad import CAGrad
from accel_weighting.methods.config import ConFIG
from accel_weighting.methods.imtl_g import IMTLG
from accel_weighting.methods.mgda import MGDA
from accel_weighting.methods.nash_mtl import NashMTL
from accel_weighting.methods.pcgrad import PCGrad
from accel_weighting.statistics import Statistics

METHODS = [
    MGDA(),
    MGDA(normalize="norm"),
    PCGrad(),
    CAGrad(),
    CAGrad(c=0.9),
    IMTLG(),
    AlignedMTL(),
    AlignedMTL(scale="median"),
    AlignedMTL(scale="rmse"),
    NashMTL(),
    ConFIG(),
    GradientBalancer(),
]
SUM_ONE = (MGDA, IMTLG)
SIGNED = (IMTLG, ConFIG, AlignedMTL)  # may answer with negative weights
ids = repr


def jacobian(K, rank, seed=0, scales=None):
    """K gradients in a space of ``rank`` dimensions, float64."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(K, rank, dtype=torch.float64, generator=generator).numpy()
    return J if scales is None else J * np.array(scales, np.float64)[:, None]


def gram(J):
    return J @ J.T


def window(M, present=None, step=0):
    K = len(M)
    present = np.ones(K, np.bool_) if present is None else np.asarray(present)
    M = M * present * present[:, None]
    return Statistics(np.ones(K), present, norms=np.sqrt(M.diagonal()), gram=M, step=step)


def names(K):
    return [f"task{k}" for k in range(K)]


def answer(method, M):
    """Weights after one window in which all tasks are present."""
    _, state = method.init(names(len(M)))
    return method.update(state, window(M))[0]


def theirs(weighting, M):
    """TorchJD's answer."""
    return weighting(torch.from_numpy(M)).numpy()


def normalised(M):
    return M / M.diagonal().mean()


REGULAR = [gram(jacobian(K, K + 3, seed)) for seed, K in enumerate([2, 3, 3, 4, 5, 6])]


def vector(*values):
    return np.array(values, np.float64)


u = jacobian(1, 5)
HARD = {
    "zero": np.zeros((3, 3)),
    "one zero row": gram(jacobian(3, 5, 1, [1, 0, 1])),
    "all but one zero": gram(jacobian(3, 5, 1, [0, 0, 1])),
    "duplicates": gram(np.concatenate([u, u, jacobian(1, 5, 3)])),
    "all equal": gram(u.repeat(4, 0)),
    "opposite": gram(np.concatenate([u, -u])),
    "opposite, unequal": gram(np.concatenate([u, -0.3 * u])),
    "opposite and a third": gram(np.concatenate([u, -u, jacobian(1, 5, 4)])),
    "opposite in pairs": gram(np.concatenate([u, -u, jacobian(1, 5, 4), -jacobian(1, 5, 4)])),
    "rank 1": gram(jacobian(4, 1, 5)),
    "rank 2": gram(jacobian(5, 2, 6)),
    "rank 3 of 6": gram(jacobian(6, 3, 7)),
    "scales 1e±10": gram(jacobian(4, 8, 8, [1e10, 1, 1e-10, 1e-5])),
    "scales 1e±10, rank 2": gram(jacobian(4, 2, 9, [1e10, 1, 1e-10, 1e-5])),
    "scales 1e±10, opposite": gram(np.concatenate([1e10 * u, -1e-10 * u, jacobian(1, 5, 3)])),
    "huge": 1e150 * gram(jacobian(3, 5, 10)),
    "tiny": 1e-150 * gram(jacobian(3, 5, 10)),
    "one task": gram(u),
    "nearly opposite": gram(np.concatenate([u, -u + 1e-9 * jacobian(1, 5, 3)])),
    "nearly equal": gram(np.concatenate([u, u + 1e-9 * jacobian(1, 5, 3)])),
}
ALL = {**{f"regular {i}": M for i, M in enumerate(REGULAR)}, **HARD}
PULLING = {case: M for case, M in ALL.items() if M.diagonal().all()}  # a zero gradient counts as absent


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_any_gram_matrix_gives_finite_weights_of_the_declared_sum_and_sign(method):
    for case, M in ALL.items():
        before = M.copy()
        weights = answer(method, M)
        assert weights.shape == (len(M),) and weights.dtype == np.float64 and np.isfinite(weights).all(), case
        assert np.array_equal(M, before), case
        if isinstance(method, SUM_ONE):
            assert weights.sum().item() == pytest.approx(1, abs=1e-9), case
        if not isinstance(method, SIGNED):
            assert (weights >= 0).all(), case
        if isinstance(method, PCGrad):
            assert (weights >= 1).all(), case
        if isinstance(method, NashMTL):
            n = np.sqrt(normalised(M).diagonal()) if M.any() else np.ones(len(M))
            assert (weights > 0).all() and (weights * n <= LIMIT * len(M) ** 0.5 * 1.5).all(), case


@given(
    st.integers(1, 6),
    st.integers(0, 7),
    st.integers(0, 10_000),
    st.lists(st.sampled_from([-1e10, -1.0, 1.0, 1e-10, 1e10, 0.0]), min_size=6, max_size=6),
)
@settings(max_examples=50, derandomize=True, deadline=None)
def test_any_jacobian(K, rank, seed, scales):
    J = jacobian(K, rank, seed, scales[:K])
    if seed % 3 == 0:
        J[K // 2] = -J[0]
    for method in METHODS:
        weights = answer(method, gram(J))
        assert np.isfinite(weights).all()
        if isinstance(method, SUM_ONE):
            assert weights.sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_the_order_of_the_tasks_is_of_no_consequence(method):
    for case, M in ALL.items():
        if case.startswith("nearly"):  # which of two gradients equal to 1e-9 is shorter is a matter of rounding
            continue
        if isinstance(method, PCGrad) and len(M) > 2:  # by its definition: two tasks leave nothing to chance
            continue
        order = np.roll(np.arange(len(M)), 1)
        weights, permuted = answer(method, M), answer(method, M[order][:, order])
        # ConFIG's length mixes norms 1e±10; a capped CAGrad multiplies the rounding of w by 1,000.
        mixed = isinstance(method, ConFIG) and "scales" in case
        rtol = 1e-3 if mixed else 1e-7
        atol = 1e-6 * float(abs(weights).max()) if mixed else 1e-6 if isinstance(method, CAGrad) else 1e-8
        np.testing.assert_allclose(permuted, weights[order], rtol=rtol, atol=atol, err_msg=case)


@pytest.mark.parametrize("method", METHODS, ids=ids)
@pytest.mark.parametrize("case", ["regular 3", "duplicates", "opposite and a third", "rank 2", "one zero row"])
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_a_common_factor_of_all_gradients_is_of_no_consequence(method, case, factor):
    M = ALL[case]
    np.testing.assert_allclose(answer(method, M * factor), answer(method, M), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, GradientBalancer)], ids=ids)
def test_a_zero_gradient_counts_as_absent(method):
    J = jacobian(4, 6, 3)
    J[2] = 0
    weights = answer(method, gram(J))
    _, state = method.init(names(4))
    absent = method.update(state, window(gram(J), [True, True, False, True]))[0]
    assert np.array_equal(weights, absent) and weights[2] == method.init(names(4))[0][2]


@pytest.mark.parametrize("method", METHODS, ids=ids)
@pytest.mark.parametrize("K", [1, 2, 5])
def test_initial_weights_are_those_of_orthonormal_gradients_and_of_no_gradient_at_all(method, K):
    initial, _ = method.init(names(K))
    np.testing.assert_allclose(answer(method, np.eye(K) * 7), initial, rtol=1e-12, atol=0)
    np.testing.assert_allclose(answer(method, np.zeros((K, K))), initial, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", [MGDA(), IMTLG()], ids=ids)
def test_the_sum_is_that_of_the_initial_weights(method):
    _, state = method.init(names(4), np.ones(4))
    weights, state = method.update(state, window(REGULAR[3]))
    np.testing.assert_allclose(weights, 4 * answer(method, REGULAR[3]), rtol=1e-12, atol=0)
    weights, _ = method.update(state, window(REGULAR[3], [True, True, False, True]))
    assert weights.sum().item() == pytest.approx(4, abs=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_given_initial_weights_are_kept_until_the_first_update(method):
    weights, state = method.init(["a", "b"], {"a": 0.25, "b": 0.75})
    assert weights.tolist() == [0.25, 0.75]
    weights, _ = method.update(state, window(np.zeros((2, 2)), [False, False]))
    assert weights.tolist() == [0.25, 0.75]


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_absent_tasks_keep_their_weight_and_the_present_ones_solve_their_own_problem(method):
    present = [True, False, True, False, True]
    rows = np.array(present)
    _, state = method.init(names(5))
    first, state = method.update(state, window(REGULAR[4]))
    second, _ = method.update(state, window(gram(jacobian(5, 8, 11)), present))
    assert np.array_equal(second[~rows], first[~rows])
    if isinstance(method, GradientBalancer):
        return  # its averages run on: see below
    alone = method.init(names(3))[1]
    if isinstance(method, PCGrad):
        alone["counter"] = state["counter"]
    expected, _ = method.update(alone, window(gram(jacobian(5, 8, 11))[rows][:, rows]))
    if isinstance(method, SUM_ONE):
        expected = expected * first[rows].sum()
        assert second.sum().item() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(second[rows], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [MGDA(), IMTLG()], ids=ids)
@pytest.mark.parametrize("taken", [1.0, 1.5])
def test_where_the_absent_leave_nothing_the_present_keep_their_weights(method, taken):
    _, state = method.init(["a", "b", "c"], {"a": taken, "b": 1 - taken, "c": 0.0})
    weights, _ = method.update(state, window(REGULAR[1], [False, True, True]))
    assert weights.tolist() == [taken, 1 - taken, 0.0]


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_update_is_pure_and_its_state_survives_a_checkpoint(method):
    _, state = method.init(names(4))
    for step, seed in enumerate([1, 2, 3]):
        copy = {key: value.copy() for key, value in state.items()}
        statistics = window(gram(jacobian(4, 6, seed)), step=step)
        weights, new = method.update(state, statistics)
        assert all(np.array_equal(state[key], copy[key]) for key in copy)
        assert {key: (v.shape, v.dtype) for key, v in new.items()} == {k: (v.shape, v.dtype) for k, v in copy.items()}
        file = io.BytesIO()
        torch.save({key: torch.from_numpy(value) for key, value in state.items()}, file)
        file.seek(0)
        loaded = {key: value.numpy() for key, value in torch.load(file, weights_only=True).items()}
        again, _ = method.update(loaded, statistics)
        assert np.array_equal(again, weights)
        state = new


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_the_users_random_numbers_stay_theirs(method):
    before = torch.get_rng_state()
    answer(method, REGULAR[3])
    assert np.array_equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_methods_compare_by_value_and_act_on_the_shared_path(method):
    assert method == eval(repr(method)) and hash(method) == hash(eval(repr(method)))
    assert method.acts_on == "shared" and method.needs == ({"norms"} if method == GradientBalancer() else {"gram"})


# MGDA


def least_norm_by_enumeration(M):
    """The smallest ``αᵀMα`` on the simplex, over all supports: Lagrange's equations on each."""
    best = math.inf
    for size in range(1, len(M) + 1):
        for support in itertools.combinations(range(len(M)), size):
            S = M[list(support)][:, list(support)]
            system = np.ones((size + 1, size + 1))
            system[:size, :size], system[size, size] = S, 0
            right = np.zeros(size + 1)
            right[size] = 1
            alpha = np.linalg.pinv(system, rcond=1e-13)[:size] @ right
            if (alpha >= -1e-12).all() and abs(alpha.sum() - 1) < 1e-9:
                best = min(best, float(alpha @ S @ alpha))
    return best


@pytest.mark.parametrize("case", [case for case in PULLING if "scales" not in case])
def test_mgda_is_the_shortest_vector_of_the_hull(case):
    M = normalised(ALL[case]) if ALL[case].any() else ALL[case]
    alpha = answer(MGDA(), M)
    # Gradients equal to 1e-9 count as equal: the shorter one is not preferred.
    tolerance = 1e-9 if case == "nearly equal" else 1e-10
    assert float(alpha @ M @ alpha) <= least_norm_by_enumeration(M) + tolerance
    # TorchJD's Frank-Wolfe stops early: it is never better.
    other = theirs(tj.MGDAWeighting(epsilon=1e-6, max_iters=500), M)
    assert float(alpha @ M @ alpha) <= float(other @ M @ other) + tolerance


@pytest.mark.parametrize("case", PULLING)
def test_mgda_meets_the_optimality_condition(case):
    M = ALL[case]
    M = normalised(M) if M.any() else M
    alpha = answer(MGDA(), M)
    assert float(alpha @ M @ alpha - (M @ alpha).min()) <= 1e-10  # the duality gap


def test_mgda_by_hand():
    # Two gradients: (g2 - g1)·g2 / |g1 - g2|², clipped; orthogonal ones: 1/n².
    a, b, c = 1.0, 0.3, 2.0
    M = np.array([[a, b], [b, c]])
    expected = (c - b) / (a + c - 2 * b)
    np.testing.assert_allclose(answer(MGDA(), M), vector(expected, 1 - expected))
    weights = answer(MGDA(), np.diag(vector(1.0, 1e-10, 2e-10)))
    np.testing.assert_allclose(weights, vector(2e-10 / 3, 2 / 3, 1 / 3), rtol=1e-9, atol=0)
    assert answer(MGDA(), gram(np.array([[1.0, 0.0], [2.0, 0.0]]))).tolist() == [1, 0]
    weights = answer(MGDA(normalize="norm"), np.diag(vector(1e-8, 1.0, 1e8)))
    np.testing.assert_allclose(weights, vector(1 / 3, 1 / 3, 1 / 3))


@pytest.mark.parametrize("c", [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("K", [2, 3, 4, 8])
def test_cagrad_takes_coinciding_gradients(K: int, c: float) -> None:
    """Both ends of the interval of its root then coincide up to rounding, on some processors exactly."""
    for seed in range(20):
        row = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        weights = answer(CAGrad(c=c), gram(row.numpy()[None].repeat(K, 0)))
        np.testing.assert_allclose(weights, np.full(K, (1 + c) / K), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", [MGDA(), CAGrad()], ids=ids)
@pytest.mark.parametrize("case", ["duplicates", "all equal", "opposite in pairs"])
def test_equal_tasks_get_equal_weights(method, case):
    weights = answer(method, ALL[case])
    assert abs(weights[0] - weights[1]) < 1e-6


def test_mgda_on_the_golden_case_of_many_tasks():
    M = gram(jacobian(30, 100, 12) + 0.2)
    alpha = answer(MGDA(), M)
    assert float(alpha @ M @ alpha - (M @ alpha).min()) <= 1e-10


# PCGrad


@pytest.mark.parametrize("case", [case for case in ALL if case not in ("zero", "one task")])
@pytest.mark.parametrize("seed", [0, 5])
def test_pcgrad_is_torchjds_under_the_same_orders(case, seed):
    method, M = PCGrad(seed), ALL[case]
    _, state = method.init(names(len(M)))
    for counter in range(3):
        weights, state = method.update(state, window(M))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(seed, counter))
            expected = theirs(tj.PCGradWeighting(), normalised(M))
        np.testing.assert_allclose(weights, expected, rtol=1e-9, atol=1e-9)


def test_pcgrad_of_two_tasks_by_hand():
    J = np.array([[1.0, 0.0], [-1.0, 0.5]])
    cut = [g - min(g @ h / (h @ h), 0) * h for g, h in [(J[0], J[1]), (J[1], J[0])]]
    np.testing.assert_allclose(answer(PCGrad(), gram(J)) @ J, cut[0] + cut[1])


def test_pcgrads_orders_depend_on_the_seed_and_the_counter_alone():
    M = gram(jacobian(6, 3, 13))

    def run(method, steps, state=None, noise=0):
        state = state or method.init(names(6))[1]
        out = []
        for _ in range(steps):
            torch.rand(noise)  # the global generator is of no consequence
            weights, state = method.update(state, window(M))
            out.append(weights)
        return np.stack(out), state

    whole, _ = run(PCGrad(3), 6)
    first, state = run(PCGrad(3), 3, noise=7)
    rest, _ = run(PCGrad(3), 3, state, noise=2)
    assert np.array_equal(whole, np.concatenate([first, rest]))
    assert not np.array_equal(whole[0], whole[1]) and not np.array_equal(whole, run(PCGrad(4), 6)[0])


# CAGrad


NO_MEAN = ("zero", "opposite", "opposite in pairs", "nearly opposite")  # the mean gradient is 0, up to float32 rounding


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("case", [case for case in PULLING if case not in NO_MEAN])
def test_cagrad_closes_the_duality_gap(case, c):
    M = normalised(ALL[case])
    K = len(M)
    w = answer(CAGrad(c), M) - 1 / K
    s = w.sum()
    b, root_phi = M.mean(1), c * max(M.mean(), 0) ** 0.5
    primal = float((b + M @ w).min())
    radius = float(max(w @ M @ w, 0) ** 0.5)
    assert (w >= -1e-12).all() and radius <= root_phi + 1e-10
    if s < LIMIT * (1 - 1e-9):
        w = w / s
        dual = float(b @ w + root_phi * max(w @ M @ w, 0) ** 0.5)
        assert 0 <= dual - primal + 1e-10 <= 2e-10
    else:
        assert primal >= -2 / LIMIT  # Pareto-stationary: the optimum is 0


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("i", range(len(REGULAR)))
def test_cagrad_is_torchjds_and_better(i, c):
    M = normalised(REGULAR[i])
    ours, other = answer(CAGrad(c), M), theirs(tj.CAGradWeighting(c=c), M)
    np.testing.assert_allclose(
        ours, other, rtol=0, atol=5e-4
    )  # the solver stops at about 1e-8 of the objective, which is flat
    assert (M @ ours).min() >= (M @ other).min() - 1e-4


def test_cagrad_by_hand():
    np.testing.assert_allclose(answer(CAGrad(0), REGULAR[3]), vector(0.25, 0.25, 0.25, 0.25))
    assert np.array_equal(answer(CAGrad(), HARD["opposite"]), vector(0.5, 0.5))
    # One gradient much longer than the other, no conflict: all of w on the short one, s = c‖g_0‖/n.
    M = np.array([[1.0, 0.0], [0.0, 100.0]])
    c, g0 = 0.1, 101**0.5 / 2
    np.testing.assert_allclose(answer(CAGrad(c), M), vector(0.5 + c * g0, 0.5))


# IMTL-G


@pytest.mark.parametrize("M", REGULAR)
def test_imtlg_projects_equally_and_is_torchjds(M):
    alpha = answer(IMTLG(), M)
    projections = M @ alpha / np.sqrt(M.diagonal())
    np.testing.assert_allclose(projections, np.full(len(M), projections.mean()), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(alpha, theirs(tj.IMTLGWeighting(), M), rtol=1e-8, atol=1e-8)


def test_imtlg_does_not_see_the_scale_of_a_loss():
    M = gram(jacobian(4, 9, 14) + 1)
    factors = vector(1e5, 1.0, 1e-5, 3.0)
    pull = answer(IMTLG(), M) * np.sqrt(M.diagonal())
    scaled = M * factors * factors[:, None]
    scaled_pull = answer(IMTLG(), scaled) * np.sqrt(scaled.diagonal())
    np.testing.assert_allclose(scaled_pull / scaled_pull.sum(), pull / pull.sum(), rtol=1e-9, atol=0)


def test_imtlg_where_the_paper_has_no_answer():
    half = vector(0.5, 0.5)
    assert np.array_equal(answer(IMTLG(), HARD["opposite"]), half)
    np.testing.assert_allclose(answer(IMTLG(), HARD["opposite, unequal"]), vector(0.3, 1.0) / 1.3)
    np.testing.assert_allclose(answer(IMTLG(), HARD["all equal"]), vector(0.25, 0.25, 0.25, 0.25))
    # Here the paper's closed form has a negative sum before it is normalised: its update is uphill for every task.
    C = np.array([[1.0, 0.9, 0.8], [0.9, 1.0, 0.5], [0.8, 0.5, 1.0]])
    n = vector(0.05, 1.0, 1.0)
    M = C * n * n[:, None]
    assert (M @ theirs(tj.IMTLGWeighting(), M) < 0).all()
    np.testing.assert_allclose(answer(IMTLG(), M), 1 / n / (1 / n).sum())


# Aligned-MTL


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@pytest.mark.parametrize("case", [c for c in PULLING if "scales" not in c and not c.startswith("nearly")])
def test_aligned_mtl_is_torchjds(case, scale):
    M = ALL[case]
    expected = theirs(tj.AlignedMTLWeighting(scale_mode=scale), normalised(M) if M.any() else M)
    np.testing.assert_allclose(answer(AlignedMTL(scale), M), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("M", REGULAR)
def test_aligned_mtl_is_the_mean_of_orthogonal_gradients_of_length_sigma(M):
    weights = answer(AlignedMTL(), M)
    # ‖(1/K) Σ ĝ_k‖² = σ²/K if the ĝ_k are orthogonal, of length σ; and ĝ_k·(their mean) = σ²/K for each.
    sigma2 = np.linalg.eigvalsh(M)[0]
    np.testing.assert_allclose(weights @ M @ weights, sigma2 / len(M), rtol=1e-9, atol=0)


def test_aligned_mtl_takes_the_rank_from_the_cosines():
    np.testing.assert_allclose(answer(AlignedMTL(), np.diag(vector(1.0, 1e-10))), vector(0.5e-5, 0.5))
    # Equal gradients that differ by float32 rounding count as equal: their difference does not set σ.
    J = jacobian(3, 40, 15)
    J[1] = J[0] * (1 + 1e-7 * jacobian(1, 40, 16))[0]
    weights = answer(AlignedMTL(), gram(J))
    J[1] = J[0]
    np.testing.assert_allclose(weights, answer(AlignedMTL(), gram(J)), rtol=1e-5, atol=0)


# Nash-MTL


@pytest.mark.parametrize("case", [case for case in PULLING if "opposite" not in case])
def test_nash_solves_its_equation(case):
    """``α_k g_k·g = 1`` for every task; for gradients of which no sum with positive weights vanishes."""
    M = normalised(ALL[case])
    alpha = answer(NashMTL(), M)
    if case == "rank 1" or alpha.max() * M.diagonal().min() ** 0.5 > 100:
        return
    np.testing.assert_allclose(alpha * (M @ alpha), np.ones(len(M)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("factor", [1e-6, 1e-4, 30.0, 1e4, 1e6])
def test_the_units_of_a_loss_are_nothing_to_nash(seed, factor):
    J = jacobian(4, 12, seed)
    scaled = J * np.array([[factor], [1], [1], [1]])
    for weights, other in ((answer(NashMTL(), gram(J)), answer(NashMTL(), gram(scaled))),):
        pulls, pulls_of_other = weights * np.linalg.norm(J, axis=1), other * np.linalg.norm(scaled, axis=1)
        np.testing.assert_allclose(pulls_of_other / pulls_of_other[0], pulls / pulls[0], rtol=1e-9, atol=0)


def test_nash_by_hand():
    # Two tasks: α_k ∝ 1/n_k (the paper's case), here α_k n_k = 1/√(1 + cos).
    n, cos = vector(1.0, 3.0), -0.4
    M = np.array([[1.0, cos], [cos, 1.0]]) * n * n[:, None]
    scale = M.diagonal().mean() ** 0.5
    expected = scale / n / (1 + cos) ** 0.5
    np.testing.assert_allclose(answer(NashMTL(), M), expected, rtol=1e-5, atol=0)


# ConFIG


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rank", [2, 4, 9])
def test_config_is_torchjds_which_sees_the_whole_matrix(seed, rank):
    J = jacobian(4, rank, seed)
    weights = answer(ConFIG(), gram(J))
    np.testing.assert_allclose(weights @ J, theirs(tj.ConFIG(), J), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("M", REGULAR)
def test_config_has_the_same_cosine_to_every_gradient(M):
    w = answer(ConFIG(), M)
    projections = M @ w / np.sqrt(M.diagonal())
    np.testing.assert_allclose(projections, np.full(len(M), projections.mean()), rtol=1e-9, atol=1e-12)
    assert (projections > 0).all()
    length = (w @ M @ w) ** 0.5
    np.testing.assert_allclose(length, (M @ w).sum() / length, rtol=1e-9, atol=0)


def test_config_where_the_directions_cancel_out():
    weights = answer(ConFIG(), HARD["opposite, unequal"])
    np.testing.assert_allclose(weights, 0.65 / vector(1.0, 0.3))
    nearly = np.array([[1.0, -0.3 * (1 - 1e-5)], [-0.3 * (1 - 1e-5), 0.09]])
    np.testing.assert_allclose(answer(ConFIG(), nearly), weights)


# EnCodec's balancer


def norms_window(norms, present):
    return Statistics(np.ones(len(norms)), present, norms=norms)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_balancer_is_encodecs_on_global_norms(decay):
    method = GradientBalancer({"a": 1.0, "b": 4.0, "c": 2.0}, decay=decay, total_norm=1.5)
    weights, state = method.init(["a", "b", "c"])
    np.testing.assert_allclose(weights, 1.5 * vector(1.0, 4.0, 2.0) / 7)
    history = {"a": [], "b": [], "c": []}
    for norms, present in [
        ([1.0, 10.0, 3.0], [True, True, True]),
        ([2.0, 0.0, 5.0], [True, False, True]),
        ([4.0, 30.0, 1e-9], [True, True, True]),
    ]:
        old = weights
        weights, state = method.update(state, norms_window(norms, present))
        mean = {}
        for i, task in enumerate("abc"):
            if present[i]:
                history[task].insert(0, norms[i])
                powers = [decay**s for s in range(len(history[task]))]
                mean[task] = sum(p * n for p, n in zip(powers, history[task], strict=True)) / sum(powers)
        shares = {"a": 1.0, "b": 4.0, "c": 2.0}
        total = sum(shares[task] for task in mean)
        for i, task in enumerate("abc"):
            expected = shares[task] / total * 1.5 / mean[task] if task in mean else float(old[i])
            assert float(weights[i]) == pytest.approx(expected, rel=1e-12)


def test_balancer_keeps_the_total_norm_by_default():
    norms = vector(1.0, 10.0, 3.0)
    method = GradientBalancer({"b": 2.0})
    _, state = method.init(["a", "b", "c"])
    weights, state = method.update(state, norms_window(norms.tolist(), [True] * 3))
    np.testing.assert_allclose(weights * norms, 14 * vector(0.25, 0.5, 0.25))
    # A gradient that has always been zero says nothing yet.
    weights, _ = method.update(method.init(["a", "b", "c"])[1], norms_window([1.0, 0.0, 3.0], [True] * 3))
    np.testing.assert_allclose(weights, vector(2.0, 1.5, 2 / 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MGDA(normalize="loss"), "`normalize`"),
        (lambda: CAGrad(c=1.0), "`c` must be in"),
        (lambda: CAGrad(c=-0.1), "`c` must be in"),
        (lambda: AlignedMTL(scale="max"), "`scale`"),
        (lambda: GradientBalancer({"a": 0.0}), "`shares` must be None or a mapping of .* positive and finite"),
        (lambda: GradientBalancer(decay=1.1), "`decay`"),
        (lambda: GradientBalancer(total_norm=-1.0), "`total_norm`"),
        (lambda: GradientBalancer({"x": 1.0}).init(["a", "b"]), r"name tasks out of \['a', 'b'\]"),
    ],
)
def test_wrong_arguments_say_what_is_right(make, message):
    with pytest.raises(ValueError, match=message):
        make()
