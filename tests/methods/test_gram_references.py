"""Every native Gram method against the paper's formula in 150 digits, and against TorchJD.

The references here start from the gradients, not from their Gram matrix, share no line with the library, and solve what
the library iterates by enumeration: the optimum of a problem on the simplex is the best of the stationary points of its
faces, of which K tasks have 2^K − 1.
"""

import itertools

import mpmath as mp
import numpy as np
import pytest
import torch
import torchjd.aggregation as tj

from accel_weighting import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    GradientBalancer,
    NashMTL,
    PCGrad,
    Statistics,
)
from accel_weighting.methods.algebra import LIMIT, RANK, mixed_seed

DIGITS = 150
NOISE = mp.mpf(10) ** -100
"""What counts as 0 in 150 digits: rank deficiency is exact in the references."""


def jacobian(K, rank, seed, scales=None):
    J = torch.randn(K, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return J if scales is None else J * torch.tensor(scales, dtype=torch.float64)[:, None]


def low_rank(K, rank, seed):
    """Exactly so, in binary fractions."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randint(-8, 9, shape, generator=generator).double() / 8 for shape in ((K, rank), (rank, K + 2)))
    return A @ B


u, v, w = jacobian(3, 5, 1)[:, None]
GRADIENTS = {
    **{f"random, K = {K}": jacobian(K, K + 3, seed) for seed, K in enumerate([1, 2, 3, 3, 4, 5, 6])},
    **{f"conflicting, K = {K}": jacobian(K, 40, K) - 0.4 * jacobian(K, 40, K)[:1] for K in (2, 3, 5)},
    "agreeing": jacobian(4, 9, 14) + 1,
    **{
        f"rank {rank} of {K}": low_rank(K, rank, seed)
        for seed, (K, rank) in enumerate([(4, 1), (5, 2), (6, 3), (5, 4)])
    },
    "zero": torch.zeros(3, 4, dtype=torch.float64),
    "a zero row": torch.cat([u, 0 * u, v]),
    "all but one zero": torch.cat([0 * u, u, 0 * u]),
    "duplicates": torch.cat([u, u, v]),
    "all equal": u.repeat(4, 1),
    "opposite": torch.cat([u, -u]),
    "opposite, unequal": torch.cat([u, -0.25 * u]),
    "opposite and a third": torch.cat([u, -u, v]),
    "opposite in pairs": torch.cat([u, -u, v, -v]),
    "scales 1e±3": jacobian(4, 8, 8, [1e3, 1, 1e-3, 1e-1]),
    "scales 1e±6": jacobian(4, 8, 8, [1e6, 1, 1e-6, 1e-2]),
    "scales 1e±10": jacobian(4, 8, 8, [1e10, 1, 1e-10, 1e-5]),
    "scales 1e±10, opposite": torch.cat([2.0**33 * u, -(2.0**-33) * u, v]),
    "huge": 1e75 * jacobian(3, 5, 10),
    "tiny": 1e-75 * jacobian(3, 5, 10),
}


@pytest.fixture(autouse=True)
def digits():
    with mp.workdps(DIGITS):
        yield


def exact(J):
    """The gradients as they are, divided by the root mean square of their norms."""
    A = mp.matrix([[mp.mpf(x) for x in row] for row in J.tolist()])
    square = sum(x * x for x in A) / A.rows
    return A / mp.sqrt(square) if square else A


def gram(A):
    return A * A.T


def vector(values):
    return mp.matrix(list(values))


def dot(a, b):
    return mp.fsum(x * y for x, y in zip(a, b, strict=True))


def rows(A):
    return [A[k, :] for k in range(A.rows)]


def length(a):
    return mp.sqrt(dot(a, a))


def unit(A):
    return mp.matrix([list(g / length(g)) if length(g) else list(g) for g in rows(A)])


def independent(M):
    """Whether the gradients of this Gram matrix are linearly independent: no eigenvalue of their cosines is 0."""
    n = [mp.sqrt(M[k, k]) for k in range(M.rows)]
    if not all(n):
        return False
    C = mp.matrix(M.rows, M.rows)
    for i, j in itertools.product(range(M.rows), repeat=2):
        C[i, j] = M[i, j] / n[i] / n[j]
    return min(mp.eigsy(C, eigvals_only=True)) > NOISE


def pseudo_inverse(C, tolerance):
    values, V = mp.eigsy(C)
    D = mp.diag([1 / x if x > tolerance else mp.mpf(0) for x in values])
    return V * D * V.T


# ---- the references: from gradients of root mean square norm 1 to the weights ----------------------------------------


def faces(K):
    return itertools.chain.from_iterable(itertools.combinations(range(K), size) for size in range(1, K + 1))


def block(M, face):
    return mp.matrix([[M[i, j] for j in face] for i in face])


def shortest(A):
    """MGDA: on each face of affinely independent gradients the shortest vector of their affine hull, by Lagrange."""
    M, K = gram(A), A.rows
    best, weights = mp.inf, None
    for face in faces(K):
        m = len(face)
        system = mp.ones(m + 1)
        system[:m, :m], system[m, m] = block(M, face), 0
        spread = mp.matrix(m - 1, m - 1)
        for i, j in itertools.product(range(m - 1), repeat=2):
            a, b, c = face[i + 1], face[j + 1], face[0]
            spread[i, j] = M[a, b] - M[a, c] - M[c, b] + M[c, c]
        if m > 1 and not independent(spread):
            continue
        alpha = mp.lu_solve(system, vector([0] * m + [1]))[:m]
        found = (vector(alpha).T * block(M, face) * vector(alpha))[0]
        if min(alpha) >= 0 and found < best - NOISE:
            best, weights = found, [mp.mpf(0)] * K
            for k, a in zip(face, alpha, strict=True):
                weights[k] = a
    return weights


def mgda(A, method):
    return shortest(unit(A) if method.normalize == "norm" else A)


def pcgrad(A, method):
    """Algorithm 1, on the vectors themselves; the orders are the method's."""
    K, original = A.rows, rows(A)
    generator = torch.Generator().manual_seed(mixed_seed(method.seed, 0))
    weights = [mp.mpf(0)] * K
    for i in range(K):
        g, own = original[i], [mp.mpf(k == i) for k in range(K)]
        for j in torch.randperm(K, generator=generator).tolist():
            inner = dot(g, original[j])
            if j != i and inner < -NOISE:
                factor = inner / dot(original[j], original[j])
                g, own[j] = g - factor * original[j], own[j] - factor
        weights = [a + b for a, b in zip(weights, own, strict=True)]
    return weights


def cagrad(A, method):
    """max_d min_k g_k·d over the ball, by its optimality conditions.

    With the multipliers x ≥ 0 of the tasks, d = g_0 + Σ x_k g_k, all on the face of x > 0 have the same g_k·d = ν,
    those off it no less, and xᵀMx = φ. On a face that is a linear system and one quadratic equation for ν.
    """
    M, K = gram(A), A.rows
    b = [mp.fsum(M[i, j] for j in range(K)) / K for i in range(K)]
    phi = mp.mpf(method.c) ** 2 * mp.fsum(b) / K
    even = [mp.mpf(1) / K] * K
    if phi <= RANK**2:
        return even
    for face in faces(K):
        B = block(M, face)
        if not independent(B):
            continue
        one, part = mp.ones(len(face), 1), vector(b[k] for k in face)
        P, Q = mp.lu_solve(B, one), mp.lu_solve(B, part)  # x = ν P − Q
        p, q, r = dot(P, one), dot(P, part), dot(Q, part)
        root = q * q - p * (r - phi)
        if root < 0:
            continue
        nu = (q + mp.sqrt(root)) / p
        x = [mp.mpf(0)] * K
        for k, value in zip(face, nu * P - Q, strict=True):
            x[k] = value
        d = [b[k] + mp.fsum(M[k, j] * x[j] for j in range(K)) for k in range(K)]
        if min(x) >= 0 and min(d) >= nu - NOISE and mp.fsum(x) <= LIMIT:
            return [e + y for e, y in zip(even, x, strict=True)]
    mean = [mp.fsum(A[k, i] for k in range(K)) / K for i in range(A.cols)]  # Pareto-stationary: s stops at its limit
    s = mp.mpf(LIMIT)
    x = shortest(mp.matrix([[m + s * a for m, a in zip(mean, g, strict=True)] for g in rows(A)]))
    return [e + s * y for e, y in zip(even, x, strict=True)]


def equal_projections(A):
    """C⁺1 on the gradients that are not 0, C their cosines; None where the unit gradients cancel each other out."""
    n = [length(g) for g in rows(A)]
    C = mp.matrix(A.rows, A.rows)
    for i, j in itertools.product(range(A.rows), repeat=2):
        C[i, j] = dot(A[i, :], A[j, :]) / n[i] / n[j] if n[i] and n[j] else mp.mpf(0)
    a = pseudo_inverse(C, NOISE) * mp.ones(A.rows, 1)
    return n, C, (list(a) if mp.fsum(a) > NOISE else None)


def imtlg(A, _):
    """α_{2:} = g_1 Uᵀ (D Uᵀ)⁻¹ with D = g_1 − g_t and U = u_1 − u_t where that inverse exists, else α n ∝ C⁺1."""
    n, _, a = equal_projections(A)
    inverse = [1 / x if x else mp.mpf(0) for x in n]
    M, K = gram(A), A.rows
    if independent(M) and K > 1:
        u = [g / x for g, x in zip(rows(A), n, strict=True)]
        D = [A[0, :] - A[t, :] for t in range(1, K)]
        U = [u[0] - u[t] for t in range(1, K)]
        DU = mp.matrix([[dot(d, e) for e in U] for d in D])
        alpha = list(mp.lu_solve(DU.T, vector(dot(A[0, :], e) for e in U)))
        alpha = [1 - mp.fsum(alpha), *alpha]
        raw = mp.fsum(x * y for x, y in zip(a, inverse, strict=True))
        if raw >= max(abs(x * y) for x, y in zip(a, inverse, strict=True)) / LIMIT:
            return alpha
    elif a is not None:
        alpha = [x * y for x, y in zip(a, inverse, strict=True)]
        if mp.fsum(alpha) >= max(map(abs, alpha)) / LIMIT:
            return [x / mp.fsum(alpha) for x in alpha]
    return [x / mp.fsum(inverse) for x in inverse]


def aligned_mtl(A, method):
    """Algorithm 1: B = σ V Λ^{-1/2} Vᵀ over the eigenvalues that are not 0; the mean of B's rows."""
    values, V = mp.eigsy(gram(A))
    kept = [k for k in range(A.rows) if values[k] > NOISE]
    found = sorted(values[k] for k in kept)
    sigma2 = {
        "min": found[0],
        "median": found[(len(found) - 1) // 2],
        "rmse": mp.fsum(found) / len(found),
    }[method.scale]
    D = mp.diag([mp.sqrt(sigma2 / values[k]) if k in kept else mp.mpf(0) for k in range(A.rows)])
    B = V * D * V.T
    return [mp.fsum(B[i, j] for j in range(A.rows)) / A.rows for i in range(A.rows)]


def nash_mtl(A, _):
    """The root of Mα = 1/α: coordinate by coordinate to its neighbourhood, then Newton's method on it.

    None where there is no root: the gradients have a sum with positive weights that vanishes, so that the shortest
    vector in their convex hull is 0.
    """
    M, K = gram(A), A.rows
    x = vector(shortest(unit(A)))
    if (x.T * gram(unit(A)) * x)[0] < NOISE:
        return None
    alpha = [1 / mp.sqrt(M[k, k]) for k in range(K)]
    for _ in range(30):
        for k in range(K):
            rest = mp.fsum(M[k, j] * alpha[j] for j in range(K) if j != k)
            alpha[k] = (mp.sqrt(rest**2 + 4 * M[k, k]) - rest) / (2 * M[k, k])

    def value(a):
        return (vector(a).T * M * vector(a))[0] / 2 - mp.fsum(mp.log(x) for x in a)

    for _ in range(200):
        gradient = M * vector(alpha) - vector(1 / a for a in alpha)
        step = mp.lu_solve(M + mp.diag([1 / a**2 for a in alpha]), -gradient)
        t = mp.mpf(1)
        while min(a + t * s for a, s in zip(alpha, step, strict=True)) <= 0 or (
            value([a + t * s for a, s in zip(alpha, step, strict=True)]) > value(alpha) + NOISE
        ):
            t /= 2
        alpha = [a + t * s for a, s in zip(alpha, step, strict=True)]
    residual = M * vector(alpha) - vector(1 / a for a in alpha)
    assert max(abs(x * a) for x, a in zip(residual, alpha, strict=True)) < NOISE
    return alpha


def config(A, _):
    """ĝ along U⁺1, of length Σ g_k·ĝ; where the unit gradients cancel each other out, the mean norm over each norm."""
    n, _, a = equal_projections(A)
    present = [x for x in n if x]
    if a is None:
        return [mp.fsum(n) / len(present) / x if x else mp.mpf(0) for x in n]
    g = vector(mp.fsum(a[k] / n[k] * A[k, i] for k in range(A.rows) if n[k]) for i in range(A.cols))
    ahead = mp.fsum(dot(row, g) for row in rows(A)) / dot(g, g)
    return [x / y * ahead if y else mp.mpf(0) for x, y in zip(a, n, strict=True)]


def balancer(A, method):
    """The first window's averages are its norms."""
    n = [length(g) for g in rows(A)]
    known = [k for k, x in enumerate(n) if x]
    shares = [mp.mpf((method.shares or {}).get(f"task{k}", 1)) for k in range(A.rows)]
    total = mp.fsum(n) if method.total_norm is None else mp.mpf(method.total_norm)
    part = mp.fsum(shares[k] for k in known)
    return [shares[k] / part * total / n[k] if k in known else None for k in range(A.rows)]


def without_zeros(reference, A, method):
    """A zero gradient counts as absent: its weight stays, and the others share what it leaves of a sum."""
    pulling = [k for k in range(A.rows) if length(A[k, :])]
    initial = [mp.mpf(float(x)) for x in method.init([f"task{k}" for k in range(A.rows)])[0]]
    if not pulling or isinstance(method, GradientBalancer):
        return initial if not pulling else reference(A, method)
    rest = mp.matrix([list(A[k, :]) for k in pulling])
    size = mp.sqrt(mp.fsum(length(g) ** 2 for g in rows(rest)) / len(pulling))
    found = reference(rest / size, method)
    left = mp.fsum(initial[k] for k in pulling) if method.keeps_sum else 1
    for k, x in zip(pulling, found or [], strict=found is not None):
        initial[k] = left * x
    return None if found is None else initial


REFERENCES = {
    MGDA(): mgda,
    MGDA(normalize="norm"): mgda,
    PCGrad(): pcgrad,
    PCGrad(seed=3): pcgrad,
    CAGrad(0.1): cagrad,
    CAGrad(): cagrad,
    CAGrad(0.9): cagrad,
    IMTLG(): imtlg,
    AlignedMTL(): aligned_mtl,
    AlignedMTL("median"): aligned_mtl,
    AlignedMTL("rmse"): aligned_mtl,
    NashMTL(): nash_mtl,
    ConFIG(): config,
    GradientBalancer({"task0": 3.0}): balancer,
}


def answer(method, J):
    K = len(J)
    M = J @ J.T
    _, state = method.init([f"task{k}" for k in range(K)])
    weights, _ = method.update(state, Statistics(np.ones(K), np.ones(K, np.bool_), M.diagonal().sqrt(), M))
    return torch.from_numpy(weights)  # the references are in torch


def apart(weights, expected, A):
    """How far two weightings are apart in the gradient they give and in the weights, relative to the largest."""
    pulls = [x * length(g) for x, g in zip(expected, rows(A), strict=True)]
    difference = [mp.mpf(float(x)) - y for x, y in zip(weights, expected, strict=True)]
    joint = vector(mp.fsum(d * A[k, i] for k, d in enumerate(difference)) for i in range(A.cols))
    return (
        float(length(joint) / max(1, *map(abs, pulls))),
        float(max(map(abs, difference)) / max(1, *map(abs, expected))),
    )


BEYOND_FLOAT64 = {
    # Where s stops at its limit the library looks for the shortest g_0 + s g_k by their Gram matrix, which holds no
    # gradient 10⁻⁸ times as long as g_0. What the choice among these is worth is in test_gram.py.
    CAGrad: ("scales 1e±6", "scales 1e±10", "scales 1e±10, opposite"),
}


@pytest.mark.parametrize("method", REFERENCES, ids=repr)
def test_the_weights_are_those_of_the_papers_formula(method):
    far = {}
    for case, J in GRADIENTS.items():
        if case in BEYOND_FLOAT64.get(type(method), ()):
            continue
        weights = answer(method, J)
        A = exact(J)
        expected = without_zeros(REFERENCES[method], A, method)
        if expected is None:
            assert weights.isfinite().all() and (weights > 0).all()
            continue
        expected = [mp.mpf(float(w)) if e is None else e for w, e in zip(weights, expected, strict=True)]
        gradient, weight = apart(weights, expected, unit(A) if method == MGDA(normalize="norm") else A)
        several = isinstance(method, (MGDA, CAGrad)) and not independent(gram(A))  # optima with the same gradient
        if gradient > 1e-8 or (weight > 1e-8 and not several and "1e±10" not in case):
            far[case] = gradient, weight
    assert not far


def test_the_references_need_what_is_exact():
    """Else they would be as good as what they check: a change in the eighth digit is seen."""
    J = GRADIENTS["random, K = 5"]
    A = exact(J)
    for method, reference in REFERENCES.items():
        expected = reference(A, method)
        weights = answer(method, J)
        assert apart(weights, expected, A)[1] < 1e-9
        assert apart(weights * (1 + 1e-7), expected, A)[1] > 1e-8, method


# ---- TorchJD ---------------------------------------------------------------------------------------------------------

CASES = [case for case in GRADIENTS if "zero" not in case and "1e±" not in case]  # a zero gradient counts as absent
SINGULAR = [case for case in CASES if case.startswith(("rank", "opposite"))]


def theirs(weighting, J):
    """On the normalised Gram matrix, their random orders drawn as PCGrad draws its own."""
    J = J / J.square().sum(1).mean().sqrt()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(0, 0))
        return weighting(J @ J.T)


@pytest.mark.parametrize(
    ("method", "weighting"),
    [
        (PCGrad(), tj.PCGradWeighting()),
        (IMTLG(), tj.IMTLGWeighting()),
        (AlignedMTL(), tj.AlignedMTLWeighting()),
        (AlignedMTL("median"), tj.AlignedMTLWeighting(scale_mode="median")),
        (AlignedMTL("rmse"), tj.AlignedMTLWeighting(scale_mode="rmse")),
    ],
    ids=repr,
)
def test_torchjd_has_the_same_weights(method, weighting):
    # Where M is singular their IMTL-G is M⁺n, which depends on the scale of a loss; see test_gram.py.
    cases = [case for case in CASES if case not in SINGULAR or method != IMTLG()]
    for case in cases:
        ours = answer(method, GRADIENTS[case])
        np.testing.assert_allclose(ours, theirs(weighting, GRADIENTS[case]), rtol=1e-8, atol=1e-8, err_msg=case)


def test_torchjds_config_has_the_same_gradient():
    """It wants the gradients themselves. Its Nash-MTL does, too; it needs ECOS, and stops after 20 linear problems."""
    for case in CASES:
        J = GRADIENTS[case] / GRADIENTS[case].square().sum(1).mean().sqrt()
        np.testing.assert_allclose(answer(ConFIG(), J) @ J, tj.ConFIG()(J), rtol=1e-8, atol=1e-8, err_msg=case)


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_torchjds_cagrad_is_near_and_farther_from_the_optimum(c):
    """Its solver ends when the objective is known to 1e-8. The objective is flat: the gradient is then known to 1e-4,
    and no tighter comparison with it means anything. The one to 1e-8 is with the closed form above. At a
    Pareto-stationary point it answers with zeros.
    """
    for case in CASES:
        J = GRADIENTS[case] / GRADIENTS[case].square().sum(1).mean().sqrt()
        ours, other = answer(CAGrad(c), J) @ J, theirs(tj.CAGradWeighting(c=c), J) @ J
        if other.any():
            np.testing.assert_allclose(ours, other, rtol=0, atol=1e-4, err_msg=case)
            allowed = c * J.mean(0).norm()
            assert (ours - J.mean(0)).norm() <= allowed * (1 + 1e-9)
            inside = J.mean(0) + (other - J.mean(0)) * min(1, float(allowed / (other - J.mean(0)).norm()))
            assert (J @ ours).min() >= (J @ inside).min() - 1e-10, case


def test_torchjds_mgda_is_never_shorter():
    """Frank and Wolfe's iteration converges slowly: the length, not the weights."""
    for case in CASES:
        J = GRADIENTS[case] / GRADIENTS[case].square().sum(1).mean().sqrt()
        ours, other = answer(MGDA(), J) @ J, theirs(tj.MGDAWeighting(epsilon=1e-6, max_iters=2000), J) @ J
        assert ours.norm() <= other.norm() + 1e-10 and other.norm() - ours.norm() < 2e-2, case
