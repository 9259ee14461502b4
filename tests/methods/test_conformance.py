"""TorchJD's aggregators and these methods on the same losses ``g_k · θ``, whose gradients are known: one update each.

Neither side sees the other's Gram matrix, state or normalisation: TorchJD's `Aggregator` gets the Jacobian, a
`Weighter` the losses. Then what must hold of the updates whoever computes them: the definitions are TorchJD's.
"""

import numpy as np
import pytest
import torch
import torchjd.aggregation as tj
from torchjd.linalg import QuadprogProjector

from accel_weighting import (
    FAMO,
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    CosineGate,
    DualProj,
    FairGrad,
    GeometricLoss,
    GradientBalancer,
    GradVac,
    Method,
    NashMTL,
    PCGrad,
    RotoGrad,
    ScaleInvariant,
    UPGrad,
    Weighter,
)
from accel_weighting.methods.algebra import mixed_seed


def gradients(K, d, seed, scales=1.0, shift=0.0):
    J = np.random.default_rng([K, d, seed]).normal(size=(K, d)) + shift
    return J * np.broadcast_to(np.asarray(scales, float), (K,))[:, None]


SETS = {
    "K = 2": gradients(2, 5, 0),
    "K = 3": gradients(3, 7, 1),
    "K = 5": gradients(5, 9, 2),
    "K = 16": gradients(16, 40, 3),
    "agreeing": gradients(4, 8, 4, shift=1.0),
    "conflicting": gradients(4, 30, 5) - 0.5 * gradients(1, 30, 9),
    "1:10:100": gradients(3, 6, 6, [1, 10, 100]),
}


def update(method: Method, J: np.ndarray) -> np.ndarray:
    """The trunk's gradient in one backward: ``lag=0``, from nothing but the losses."""
    theta = torch.zeros(1, J.shape[1], dtype=torch.float64, requires_grad=True)
    tasks = [f"task{k}" for k in range(len(J))]
    weighter = Weighter(method, tasks, lag=0)
    aliases = weighter.branch(theta * 1)
    weighter.backward({task: (aliases[task] * torch.tensor(g)).sum() for task, g in zip(tasks, J, strict=True)})
    return theta.grad.numpy()[0]


def seeded(aggregator):
    """With the random orders that the method draws."""

    def call(J):
        if hasattr(aggregator, "reset"):
            aggregator.reset()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(0, 0))
            return aggregator(J)

    return call


def exact(kind):
    return kind(projector=QuadprogProjector(norm_eps=0.0, reg_eps=1e-12))


PAIRS = {
    "UPGrad": (UPGrad(), exact(tj.UPGrad), 1e-7),
    "DualProj": (DualProj(), exact(tj.DualProj), 1e-7),
    "PCGrad": (PCGrad(), tj.PCGrad(), 1e-12),
    "GradVac": (GradVac(), tj.GradVac(eps=0.0), 1e-9),
    "IMTL-G": (IMTLG(), tj.IMTLG(), 1e-8),
    "Aligned-MTL": (AlignedMTL(), tj.AlignedMTL(), 1e-9),
    "Aligned-MTL median": (AlignedMTL("median"), tj.AlignedMTL(scale_mode="median"), 1e-9),
    "Aligned-MTL rmse": (AlignedMTL("rmse"), tj.AlignedMTL(scale_mode="rmse"), 1e-9),
    "ConFIG": (ConFIG(), tj.ConFIG(), 1e-8),
    "CAGrad": (CAGrad(0.5), tj.CAGrad(c=0.5, norm_eps=0.0), 3e-3),
    "MGDA": (MGDA(), tj.MGDA(epsilon=1e-8, max_iters=20_000), 5e-2),
}


@pytest.mark.parametrize("case", SETS)
@pytest.mark.parametrize("pair", PAIRS)
def test_one_update_is_torchjds(pair, case):
    method, aggregator, tolerance = PAIRS[pair]
    J = SETS[case]
    ours, theirs = update(method, J), seeded(aggregator)(torch.tensor(J)).numpy()
    scale = max(np.linalg.norm(theirs), 1e-2 * np.sqrt((J**2).sum(1).mean()))
    np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", ["K = 2", "K = 3", "K = 5", "agreeing"])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_the_direction_is_torchjds_fairgrads(case, alpha):
    """Theirs is solved for the gradients as they are; ours for those of root mean square norm 1."""
    J = SETS[case] / np.sqrt((SETS[case] ** 2).sum(1).mean())
    ours, theirs = update(FairGrad(alpha), J), tj.FairGrad(alpha=alpha)(torch.tensor(J)).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    if alpha == 1:
        np.testing.assert_allclose(ours, update(NashMTL(), J), rtol=1e-9, atol=1e-12)


# ---- properties of the update ----------------------------------------------------------------------------------------

MORE = {f"random {seed}": gradients(2 + seed % 5, 12, 100 + seed, shift=0.3 * (seed % 3 - 1)) for seed in range(20)}
ALL = SETS | MORE
DOCUMENTED = [
    MGDA(),
    CAGrad(),
    IMTLG(),
    AlignedMTL(),
    NashMTL(),
    FairGrad(2.0),
    ConFIG(),
    UPGrad(),
    DualProj(),
    GradientBalancer(),
]


def size(J):
    return np.linalg.norm(J, axis=1).max()


def projections(method, J):
    g = update(method, J)
    return J @ g / np.linalg.norm(J, axis=1) / max(np.linalg.norm(g), 1e-9 * size(J))


@pytest.mark.parametrize("method", [MGDA(), UPGrad(), DualProj(), NashMTL(), FairGrad(2.0), ConFIG()], ids=repr)
def test_it_conflicts_with_no_gradient(method):
    """To first order no loss rises; of full rank here, which ConFIG and NashMTL need."""
    worst = {case: projections(method, J).min() for case, J in ALL.items()}
    assert min(worst.values()) > -1e-6, worst


def test_normalised_mgda_does_conflict():
    """As its docstring says, and as the authors' code does."""
    J = gradients(2, 5, 1, [1.0, 30.0])
    assert any(projections(MGDA("norm"), J * [[1], [s]]).min() < -0.1 for s in (1, 10, 100, -1, -10, -100))


@pytest.mark.parametrize("method", DOCUMENTED, ids=repr)
def test_the_order_of_the_losses_is_nothing(method):
    for J in ALL.values():
        order = np.random.default_rng(0).permutation(len(J))
        np.testing.assert_allclose(update(method, J[order]) / size(J), update(method, J) / size(J), atol=1e-6)


@pytest.mark.parametrize("method", [IMTLG(), NashMTL(), ConFIG(), MGDA("norm")], ids=repr)
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_units_of_a_loss_do_not_turn_it(method, factor):
    """MGDA("norm") they do: it solves for unit gradients, and weighs those that it was given. IMTL-G has an answer of
    its own where its formula points uphill, which it does not where gradients agree.
    """
    cosines = []
    for J in [SETS["agreeing"]] if method == IMTLG() else ALL.values():
        g, other = update(method, J), update(method, J * np.where(np.arange(len(J)) == 0, factor, 1.0)[:, None])
        cosines.append(g @ other / np.linalg.norm(g) / np.linalg.norm(other))
    if method == MGDA("norm"):
        assert min(cosines) < 0.9
    else:
        assert min(cosines) > 1 - 1e-9


@pytest.mark.parametrize("method", [PCGrad(), ConFIG(), UPGrad(), MGDA("norm")], ids=repr)
def test_it_is_linear_under_scaling(method):
    """``A(diag(c) J)`` is linear in c > 0; not so for UPGrad's weights alone, whose update is a sum of projections."""
    for J in list(ALL.values())[:12]:
        random = np.random.default_rng(1)
        a, b = (random.uniform(0.1, 10, size=(len(J), 1)) for _ in range(2))
        both = update(method, (2 * a + 3 * b) * J)
        np.testing.assert_allclose(
            both / size(J), (2 * update(method, a * J) + 3 * update(method, b * J)) / size(J), atol=1e-6
        )


@pytest.mark.parametrize("method", [MGDA(), CAGrad(), AlignedMTL(), UPGrad(), DualProj(), ConFIG()], ids=repr)
def test_it_vanishes_where_a_sum_of_the_gradients_with_positive_weights_does(method):
    """A Pareto-stationary point with nothing else: the gradients add up to 0."""
    for seed in range(10):
        J = gradients(3, 6, seed)
        J = np.concatenate([J, -J.sum(0, keepdims=True)])
        assert np.linalg.norm(update(method, J)) < 1e-4 * size(J)


# ---- what the docstrings say of weights and lengths ------------------------------------------------------------------


def weights_of(method: Method, J: np.ndarray) -> np.ndarray:
    """With which a sum of the gradients is the update: unique where they are independent."""
    return np.linalg.lstsq(J.T, update(method, J), rcond=None)[0]


INDEPENDENT = {case: J for case, J in ALL.items() if J.shape[1] >= len(J)}
ORTHOGONAL = np.linalg.qr(gradients(6, 6, 7))[0][:4]


def test_orthonormal_gradients_have_the_weights_of_a_sum_or_of_a_mean():
    for methods, weight in (
        ((PCGrad(), GradVac(), ConFIG(), NashMTL(), FairGrad(2.0), RotoGrad(rotate=False), GradientBalancer()), 1.0),
        ((UPGrad(), DualProj(), AlignedMTL(), MGDA(), IMTLG()), 0.25),
    ):
        for method in methods:
            np.testing.assert_allclose(weights_of(method, ORTHOGONAL), weight, rtol=1e-9, err_msg=repr(method))


def test_where_nothing_conflicts_nothing_changes_and_no_weight_is_ever_below_that():
    J = SETS["agreeing"]
    assert (J @ J.T > 0).all()
    for method in (PCGrad(), UPGrad(), DualProj()):
        for G in (J, *INDEPENDENT.values()):
            plain, weights = 1.0 if method == PCGrad() else 1 / len(G), weights_of(method, G)
            assert weights.min() > plain * (1 - 1e-9)
            if G is J:
                np.testing.assert_allclose(weights, plain, rtol=1e-9)


def test_dualproj_is_the_mean_wherever_that_conflicts_with_none():
    J = gradients(3, 6, 11) + [[3], [3], [3]] * gradients(1, 6, 12)
    J[0] -= 1.2 * (J[0] @ J[1]) / (J[1] @ J[1]) * J[1]  # conflicts with its neighbour, but not with the mean
    assert J[0] @ J[1] < 0 and (J @ J.mean(0) > 0).all()
    np.testing.assert_allclose(update(DualProj(), J), J.mean(0), rtol=1e-9)
    assert not np.allclose(update(UPGrad(), J), J.mean(0), rtol=1e-3)


def test_mgdas_weights_of_orthogonal_gradients_go_with_the_inverse_square_of_their_lengths():
    n = np.array([1.0, 2.0, 5.0, 0.5])
    np.testing.assert_allclose(weights_of(MGDA(), n[:, None] * ORTHOGONAL), n**-2 / (n**-2).sum(), rtol=1e-9)


def test_config_goes_where_imtlg_goes_as_far_as_all_project():
    for J in INDEPENDENT.values():
        g = update(ConFIG(), J)
        unit = g / np.linalg.norm(g)
        assert np.linalg.norm(g) == pytest.approx((J @ unit).sum(), rel=1e-6)
        cosines = J @ unit / np.linalg.norm(J, axis=1)
        np.testing.assert_allclose(cosines, cosines.mean(), rtol=1e-6)
    g, other = (update(method, SETS["agreeing"]) for method in (ConFIG(), IMTLG()))
    np.testing.assert_allclose(g / np.linalg.norm(g), other / np.linalg.norm(other), atol=1e-9)


def test_nash_goes_root_k_root_mean_square_norms_far():
    for J in INDEPENDENT.values():
        rms = np.sqrt((J**2).sum(1).mean())
        assert np.linalg.norm(update(NashMTL(), J)) == pytest.approx(np.sqrt(len(J)) * rms, rel=1e-6)


def test_cagrad_stays_in_its_ball():
    for c in (0.0, 0.2, 0.9):
        for J in ALL.values():
            mean = J.mean(0)
            assert np.linalg.norm(update(CAGrad(c), J) - mean) <= c * np.linalg.norm(mean) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_a_gate_lets_no_task_in_that_conflicts_with_the_primary_one(mode):
    for J in ALL.values():
        g = update(CosineGate("task0", mode), J)
        assert J[0] @ g >= J[0] @ J[0] * (1 - 1e-9)


def with_losses(method: Method, J: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The update of one backward where the losses have these values."""
    theta = torch.zeros(J.shape[1], dtype=torch.float64, requires_grad=True)
    rows = zip(map(str, range(len(J))), torch.tensor(J), values, strict=True)
    losses = {task: g @ theta + value for task, g, value in rows}
    Weighter(method, list(losses), lag=0).backward(losses)
    return theta.grad.numpy()


def test_log_losses_their_mean_and_famo_begin_alike():
    """FAMO needs no other start: with equal z it descends the log losses, of which every weighted loss is the same."""
    J, values = SETS["K = 3"], np.array([0.01, 1.0, 50.0])
    expected = J.T @ (1 / values)
    np.testing.assert_allclose(with_losses(ScaleInvariant(), J, values), expected, rtol=1e-12)
    mean = values.prod() ** (1 / 3)
    np.testing.assert_allclose(with_losses(GeometricLoss(), J, values), expected * mean / 3, rtol=1e-12)
    np.testing.assert_allclose(with_losses(FAMO(), J, values), expected / (1 / values).sum(), rtol=1e-5)
