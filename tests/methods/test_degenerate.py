"""Gradients that coincide, oppose each other, vanish or depend on each other, exactly and up to rounding.

A precondition that holds in exact arithmetic only is met here: every solver answers with finite weights, without an
exception and without a warning, keeps its sum, and treats equal tasks alike where it promises to.
"""

import numpy as np
import pytest
import torchjd.aggregation as tj

from accel_weighting import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradientBalancer,
    GradNorm,
    GradVac,
    NashMTL,
    PCGrad,
    RotoGrad,
    RotoGradNorm,
    Statistics,
    TorchJDWeighting,
    UPGrad,
)

SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 64]
NUDGES = [0.0, 1e-16, 2e-16, 1e-15, 1e-14, 1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8]
METHODS = [
    *(CAGrad(c=c) for c in (0.0, 1e-16, 1e-8, 1e-3, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1 - 1e-8, 1 - 1e-16)),
    MGDA(),
    MGDA(normalize="norm"),
    PCGrad(),
    IMTLG(),
    AlignedMTL(),
    AlignedMTL(scale="median"),
    AlignedMTL(scale="rmse"),
    NashMTL(),
    ConFIG(),
    GradientBalancer(),
    GradientBalancer(decay=0.0, total_norm=1e-3),
    GradNorm(),
    GradNorm(alpha=0.0, optimizer="sgd"),
    RotoGrad(rotate=False),
    RotoGrad(rotate=False, normalize_losses=True),
    RotoGradNorm(alpha=0.0),
    RotoGradNorm(alpha=1.5),
]
POSITIVE = (MGDA, CAGrad, PCGrad, NashMTL, GradientBalancer, GradNorm, RotoGrad, RotoGradNorm)


def nudged(row: np.ndarray, K: int, factors: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Families of K gradients around one row, nearer to each other than any of them to 0."""
    J = row * factors
    other = random.normal(size=row.shape)
    signs = (-1.0) ** np.arange(K)[:, None]
    zero = np.where(np.arange(K)[:, None] % 3 == 1, 0.0, J)
    return {
        "coinciding": J,
        "opposite": signs * J,
        "opposite and another": np.where(np.arange(K)[:, None] == K - 1, other, signs * J),
        "one against the others": np.where(np.arange(K)[:, None] == 0, -J, J),
        "parallel": J * 10.0 ** random.integers(-6, 7, size=(K, 1)),
        "some zero": zero,
        "opposite, some zero": signs * zero,
        "rank 2": J + np.outer(random.normal(size=K), other),
        "in pairs": np.where(np.arange(K)[:, None] % 4 < 2, J, other * factors) * signs,
    }


def cases(K: int):
    for seed, nudge in enumerate(NUDGES):
        random = np.random.default_rng([K, seed])
        row = random.normal(size=(1, 16))
        for one_factor in (True, False):  # for a whole gradient, and for each of its entries
            signs = random.choice([-1.0, 0.0, 1.0], size=(K, 1 if one_factor else 16))
            for family, J in nudged(row, K, 1 + nudge * signs, random).items():
                for scale in (1.0, 1e-60, 1e60) if seed % 4 == 0 else (1.0,):
                    yield f"K = {K}, {family}, 1 ± {nudge}, one factor: {one_factor}, scale {scale}", scale * J
    yield f"K = {K}, zero", np.zeros((K, 4))
    random = np.random.default_rng(K)
    for rank in range(1, min(K, 4)):  # exactly so, in binary fractions
        A, B = random.integers(-8, 9, size=(K, rank)) / 8, random.integers(-8, 9, size=(rank, K + 2)) / 8
        yield f"K = {K}, rank {rank}", A @ B


def window(J: np.ndarray) -> Statistics:
    M = J @ J.T
    return Statistics(np.ones(len(J)), np.ones(len(J), np.bool_), np.sqrt(M.diagonal()), M)


CASES = {K: [(name, window(J)) for name, J in cases(K)] for K in SIZES}


def wrong(method, w: np.ndarray, K: int, total: float) -> str:
    if w.shape != (K,) or not np.isfinite(w).all():
        return "not finite"
    if isinstance(method, POSITIVE) and (w < 0).any():
        return "negative"
    if method.keeps_sum and abs(w.sum() - total) > 1e-9 * max(1.0, np.abs(w).max()):
        return "another sum"
    return ""


@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_weights_are_finite_and_keep_their_sum(method, K):
    tasks = [f"task {k}" for k in range(K)]
    w, state = method.init(tasks)
    total, bad = w.sum(), {}
    stride = (1 if K <= 4 else 3 if K <= 8 else 16) * (4 if isinstance(method, CAGrad) else 1)
    for name, statistics in CASES[K][METHODS.index(method) % stride :: stride]:  # solvers iterate: each c has its cases
        try:
            w, _ = method.update(state, statistics)
        except Exception as error:
            bad[name] = repr(error)
            continue
        if found := wrong(method, w, K, total):
            bad[name] = f"{found}: {w}"
    assert not bad


@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_equal_tasks_get_equal_weights(method, K):
    """Bit for bit equal gradients, whose Gram matrix may yet have entries that differ in the last bit."""
    random, tasks = np.random.default_rng(K), [f"task {k}" for k in range(K)]
    for _ in range(5):
        _, state = method.init(tasks)
        w, _ = method.update(state, window(np.repeat(random.normal(size=(1, 16)), K, 0)))
        np.testing.assert_allclose(w, np.full(K, w.mean()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", [MGDA(), CAGrad(), CAGrad(c=0.9)], ids=repr)
def test_zero_gradients_beside_others_of_any_length_get_equal_weights(method):
    for seed in range(100):
        random = np.random.default_rng(seed)
        J = np.concatenate([np.zeros((3, 3)), random.normal(size=(2, 3)) * 10.0 ** random.integers(-10, 11, (2, 1))])
        _, state = method.init(list("abcde"))
        w, _ = method.update(state, window(J))
        np.testing.assert_allclose(w[:3], np.full(3, w[:3].mean()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("K", [2, 3, 8])
@pytest.mark.parametrize(
    "weighting", [tj.UPGradWeighting, tj.PCGradWeighting, tj.MGDAWeighting, tj.AlignedMTLWeighting]
)
def test_torchjds_answers_pass_through(weighting, K):
    method = TorchJDWeighting(weighting())
    _, state = method.init([f"task {k}" for k in range(K)])
    for case, statistics in CASES[K][::7]:
        w, _ = method.update(state, statistics)
        assert np.isfinite(w).all(), case


BESIDE = [method for method in METHODS if "moments" not in method.needs]


@pytest.mark.parametrize("method", [*BESIDE, UPGrad(), DualProj(), FairGrad(), GradVac()], ids=repr)
def test_a_gradient_whose_square_vanishes_beside_the_others(method) -> None:
    """Quotients of squared norms overflow there."""
    random = np.random.default_rng(0)
    for exponent in range(-200, -100, 3):
        J = random.normal(size=(3, 5)) * np.array([[1.0], [10.0**exponent], [1e3]])
        _, state = method.init(["a", "b", "c"])
        M = J @ J.T
        seen = Statistics(np.ones(3), np.ones(3, bool), np.sqrt(M.diagonal()), M)
        assert np.isfinite(method.update(state, seen)[0]).all(), exponent
