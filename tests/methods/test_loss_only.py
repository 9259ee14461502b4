"""The loss-only family against its papers' own objectives and formulae, written out here a second time."""

import copy
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_weighting.methods.adam import adam_state, adam_step
from accel_weighting.methods.algebra import FLOOR
from accel_weighting.methods.dwa import DynamicWeightAverage
from accel_weighting.methods.famo import FAMO
from accel_weighting.methods.loss_scale import GeometricLoss, ScaleInvariant
from accel_weighting.methods.random_weights import RandomLossWeighting
from accel_weighting.methods.softadapt import ReLoBRaLo, SoftAdapt
from accel_weighting.methods.tchebycheff import SmoothTchebycheff
from accel_weighting.methods.uncertainty import IMTLL, UncertaintyWeighting
from accel_weighting.statistics import Statistics

TASKS = ["a", "b", "c"]
K = len(TASKS)
STEPS = 100

# id: (method, what the weights sum to or None)
METHODS = {
    "uw": (UncertaintyWeighting(), None),
    "uw-sgd": (UncertaintyWeighting(optimizer="sgd", lr=0.01, classification=("b",)), None),
    "imtl-l": (IMTLL(), None),
    "imtl-l-sgd": (IMTLL(optimizer="sgd", lr=0.01), None),
    "dwa": (DynamicWeightAverage(), K),
    "dwa-epochs": (DynamicWeightAverage(temperature=0.5, steps_per_epoch=3), K),
    "rlw": (RandomLossWeighting(), 1),
    "rlw-dirichlet": (RandomLossWeighting("dirichlet", seed=3), 1),
    "gls": (GeometricLoss(), None),
    "si": (ScaleInvariant(), None),
    "softadapt": (SoftAdapt(), 1),
    "softadapt-normalized": (SoftAdapt(beta=2.0, history=4, variant="normalized"), 1),
    "softadapt-loss-weighted": (SoftAdapt(history=2, variant="loss_weighted"), 1),
    "relobralo": (ReLoBRaLo(alpha=0.9, tau=1.0, rho=0.5), K),
    "stch": (SmoothTchebycheff(warmup=2), K),
    "stch-settled": (SmoothTchebycheff(mu=0.5, warmup=1, settle=2), K),
    "uw-balanced": (UncertaintyWeighting(start="balanced"), None),
    "uw-log1p": (UncertaintyWeighting(form="log1p", start="balanced", classification=("b",)), None),
    "imtl-l-balanced": (IMTLL(start="balanced"), None),
    "famo": (FAMO(), 1),
    "famo-min-losses": (FAMO(min_losses={"b": 0.01}), 1),
}
ids = pytest.mark.parametrize("name", METHODS)


def window(losses, present=None):
    losses = np.asarray(losses, np.float64)
    present = np.ones(len(losses), np.bool_) if present is None else np.asarray(present, np.bool_)
    return Statistics(np.where(present, losses, 0.0), present)


def random_losses(steps=STEPS, tasks=K, seed=0):
    """Losses of unequal size that fall at unequal speed, with the noise of batches."""
    generator = np.random.default_rng(seed)
    t = np.arange(steps)[:, None]
    return 10.0 ** np.linspace(-1, 1, tasks) * np.exp(
        -t * np.linspace(0.002, 0.02, tasks) + generator.normal(size=(steps, tasks)) / 5
    )


def trajectory(method, losses, tasks=TASKS, initial_weights=None, present=None):
    """The weights before the first window and after each, ``[steps + 1, K]``, and the last state."""
    weights, state = method.init(tasks, initial_weights)
    rows = [weights]
    for t, row in enumerate(losses):
        weights, state = method.update(state, window(row, None if present is None else present[t]))
        rows.append(weights)
    return np.stack(rows), state


def close(ours, reference):
    np.testing.assert_allclose(ours, np.asarray(reference), rtol=1e-8, atol=1e-12)


def softmax(x):
    e = np.exp(np.asarray(x) - np.max(x))
    return e / e.sum()


def gradient_at(objective, losses):
    """What the objective's gradient multiplies every task's gradient by."""
    L = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(objective(L), L)[0].numpy()


# ---- every method against its paper


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_torchs_where_all_are_active(decay):
    gradients = torch.randn(STEPS, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = torch.nn.Parameter(torch.zeros(K, dtype=torch.float64))
    optimizer = torch.optim.Adam([theirs], lr=0.03, weight_decay=decay)
    ours, state = np.zeros(K), adam_state(K)
    for g in gradients:
        ours, state = adam_step(ours, g.numpy() + decay * ours, state, np.ones(K, np.bool_), lr=0.03)
        theirs.grad = g.clone()
        optimizer.step()
    np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-12, atol=1e-14)


def test_adam_of_a_task_that_comes_and_goes_is_that_of_its_own_steps():
    gradients = torch.randn(STEPS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    both, state = np.zeros(2), adam_state(2)
    alone, alone_state = np.zeros(1), adam_state(1)
    for t, g in enumerate(gradients):
        active = np.array([True, t % 3 == 1])
        g = np.where(active, g, math.nan)  # what an absent task brings is not read
        both, state = adam_step(both, g, state, active, lr=0.1)
        if active[1]:
            alone, alone_state = adam_step(alone, g[1:], alone_state, active[1:], lr=0.1)
    assert np.array_equal(both[1:], alone)
    assert all(np.array_equal(state[key][1:], alone_state[key]) for key in state)
    assert np.isfinite(both).all()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(
    ("method", "begin", "objective", "weight"),
    [
        (  # regression for a and c, classification for b
            UncertaintyWeighting(classification=("b",)),
            0.0,
            lambda s, L: (torch.tensor([0.5, 1, 0.5]) * L * torch.exp(-s) + s / 2).sum(),
            lambda s: torch.tensor([0.5, 1, 0.5]) * torch.exp(-s),
        ),
        (IMTLL(), 0.0, lambda s, L: (torch.exp(s) * L - s).sum(), torch.exp),
    ],
    ids=["uw", "imtl-l"],
)
def test_learned_scales_descend_on_the_papers_objective(method, begin, objective, weight, optimizer):
    losses = random_losses()
    s = torch.full((K,), begin, dtype=torch.float64, requires_grad=True)
    step = (torch.optim.Adam if optimizer == "adam" else torch.optim.SGD)([s], lr=0.03)
    reference = [weight(s.detach())]
    for L in losses:
        step.zero_grad()
        objective(s, torch.tensor(L)).backward()
        step.step()
        reference.append(weight(s.detach()))
    close(trajectory(replace(method, optimizer=optimizer, lr=0.03), losses)[0], torch.stack(reference))


def test_learned_scales_rest_where_the_objective_is_least():
    losses = np.tile([0.2, 3.0, 0.05], (2000, 1))
    np.testing.assert_allclose(trajectory(UncertaintyWeighting(), losses)[0][-1] * losses[-1], 0.5, rtol=1e-3)
    np.testing.assert_allclose(trajectory(IMTLL(), losses)[0][-1] * losses[-1], 1.0, rtol=1e-3)


def test_learned_scales_begin_at_the_given_weights():
    for method, default in (
        (UncertaintyWeighting(classification=("c",)), [0.5, 2.0, 1.0]),
        (IMTLL(), [1.0, 2.0, 1.0]),
    ):
        weights, state = method.init(TASKS, {"b": 2.0})
        assert weights.tolist() == default
        close(method.update(state, window([1.0, 1.0, 1.0], [1, 0, 1]))[0][1], 2.0)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_loss_that_stays_at_zero_leaves_a_weight_that_comes_down(optimizer):
    method = UncertaintyWeighting(optimizer=optimizer)
    weights, state = trajectory(method, np.tile([0.0, 1.0, 1.0], (3000, 1)))
    np.testing.assert_allclose(weights[-1, 0], 0.5 / FLOOR, rtol=1e-9)
    for _ in range(100):
        after, state = method.update(state, window([1.0, 1.0, 1.0]))
    assert after[0] < weights[-1, 0] / 40


@pytest.mark.parametrize("epoch", [1, 7])
def test_dwa(epoch):
    losses, T = random_losses(), 1.5
    reference = [np.ones(K)]
    for t in range(1, STEPS + 1):
        means = losses[: t // epoch * epoch].reshape(-1, epoch, K).mean(1)
        reference.append(K * softmax(means[-1] / means[-2] / T) if len(means) >= 2 else np.ones(K))
    close(trajectory(DynamicWeightAverage(temperature=T, steps_per_epoch=epoch), losses)[0], reference)


def test_dwa_waits_for_the_first_positive_average():
    weights, _ = trajectory(
        DynamicWeightAverage(), [[0.0, 1.0, 2.0], [0.0, 0.5, 2.0], [3.0, 0.5, 1.0], [3.0, 0.5, 1.0]]
    )
    assert weights[2, 0] == weights[3, 0] == 1
    close(weights[2, 1:], 2 * softmax([0.25, 0.5]))
    close(weights[4], 3 * softmax([0.5, 0.5, 0.5]))


@pytest.mark.parametrize("distribution", ["normal", "dirichlet"])
def test_rlw_draws_from_its_distribution(distribution):
    w = trajectory(RandomLossWeighting(distribution), np.ones((4000, K)))[0][1:]
    np.testing.assert_allclose(w.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(w.mean(0), 1 / K, atol=0.02)
    if distribution == "normal":  # differences of logits are N(0, 2)
        differences = np.log(w[:, 1:] / w[:, :1])
        np.testing.assert_allclose(differences.mean(0), 0, atol=0.08)
        np.testing.assert_allclose(differences.var(0), 2, rtol=0.08)
    else:  # Dirichlet(1, 1, 1): variance (1/3)(2/3)/4
        np.testing.assert_allclose(w.var(0), 1 / 18, rtol=0.08)
    neighbours = np.corrcoef(w[:-1, 0], w[1:, 0])[0, 1]
    assert abs(neighbours) < 0.06


def test_gls_is_the_gradient_of_the_geometric_mean():
    losses = random_losses()
    reference = [np.full(K, 1 / K), *(gradient_at(lambda L: L.prod() ** (1 / K), L) for L in losses)]
    close(trajectory(GeometricLoss(), losses)[0], reference)


def test_scale_invariant_is_the_gradient_of_the_sum_of_logarithms():
    losses = random_losses()
    close(
        trajectory(ScaleInvariant(), losses)[0],
        [np.ones(K), *(gradient_at(lambda L: L.log().sum(), L) for L in losses)],
    )


@pytest.mark.parametrize("method", [GeometricLoss(), ScaleInvariant()], ids=["gls", "si"])
def test_a_zero_loss_counts_as_absent(method):
    weights, state = trajectory(method, random_losses(3))
    after, _ = method.update(state, window([2.0, 0.0, 0.5]))
    assert after[1] == weights[-1, 1]
    expected = [0.25, weights[-1, 1], 1.0] if isinstance(method, GeometricLoss) else [0.5, weights[-1, 1], 2.0]
    close(after, expected)


@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
@pytest.mark.parametrize("n", [1, 4])
def test_softadapt(variant, n):
    losses, beta = random_losses(), 0.7
    reference = [np.full(K, 1 / K)] * (n + 1)
    for t in range(n, STEPS):
        s = np.mean([losses[i] - losses[i - 1] for i in range(t - n + 1, t + 1)], axis=0)
        if variant == "normalized":
            s = s / np.abs(s).sum()
        alpha = np.exp(beta * s)
        if variant == "loss_weighted":
            alpha = alpha * losses[t - n : t + 1].mean(0)
        reference.append(alpha / alpha.sum())
    close(trajectory(SoftAdapt(beta, n, variant), losses)[0], reference)


def test_softadapt_reads_slopes_of_negative_losses():
    losses = random_losses()
    close(trajectory(SoftAdapt(), losses - 100)[0], trajectory(SoftAdapt(), losses)[0])


def test_softadapt_normalizes_by_the_slopes_of_those_present():
    method = SoftAdapt(beta=2.0, variant="normalized")
    _, state = trajectory(method, [[1.0, 2.0, 3.0], [1.0, 2.0, 9.0]])
    weights, _ = method.update(state, window([1.5, 1.0, 0.0], [1, 1, 0]))
    close(weights[0] / weights[1], math.exp(2.0 * (0.5 + 1.0) / (0.5 + 1.0)))


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_relobralo(rho):
    losses, alpha, tau = random_losses(), 0.8, 0.6
    weights = trajectory(ReLoBRaLo(alpha, tau, rho), losses)[0]
    close(weights[:2], np.ones((2, K)))  # the first losses have nothing to be compared with
    lookbacks = 0
    for t in range(1, STEPS):

        def balance(earlier, t=t):
            return K * softmax(losses[t] / (tau * losses[earlier]))

        looks_back = alpha * balance(0) + (1 - alpha) * balance(t - 1)
        goes_on = alpha * weights[t] + (1 - alpha) * balance(t - 1)
        looked = np.allclose(weights[t + 1], looks_back, rtol=1e-8, atol=0)
        close(weights[t + 1], looks_back if looked else goes_on)
        lookbacks += looked
    assert {0.0: lookbacks == STEPS - 1, 0.5: 30 < lookbacks < 70, 1.0: lookbacks == 0}[rho]


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        (UncertaintyWeighting(start="balanced", classification=("b",)), "log"),
        (UncertaintyWeighting(start="balanced", form="log1p", classification=("b",)), "log1p"),
        (UncertaintyWeighting(form="log1p", optimizer="sgd", lr=0.1), "log1p"),
        (IMTLL(start="balanced"), "imtl"),
    ],
    ids=repr,
)
def test_learned_scales_are_those_of_autograd_and_at_rest_from_the_start(method, objective):
    """Descends the objective as it is written, with torch's optimizers; ``balanced`` begins at its minimum."""
    losses = torch.tensor(random_losses(20))
    f = torch.tensor([1.0 if t in getattr(method, "classification", ()) else 0.5 for t in TASKS])

    def value(s, L):
        sigma2 = s.exp()
        if objective == "imtl":
            return (sigma2 * L - s).sum()
        return (f * L / sigma2 + (sigma2.log() / 2 if objective == "log" else torch.log(1 + sigma2))).sum()

    s = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    balanced = method.start == "balanced"
    if balanced:
        search = torch.optim.LBFGS([s], lr=1, max_iter=500, tolerance_grad=1e-14, tolerance_change=0)

        def closure():
            search.zero_grad()
            out = value(s, losses[0])
            out.backward()
            return out

        search.step(closure)
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[method.optimizer]([s], lr=method.lr)
    weights = trajectory(method, losses.numpy())[0]
    for t, L in enumerate(losses):
        if t or not balanced:
            optimizer.zero_grad()
            value(s, L).backward()
            optimizer.step()
        w = s.exp() if objective == "imtl" else f * (-s).exp()
        np.testing.assert_allclose(weights[t + 1], w.detach().numpy(), rtol=1e-6)


def test_stch_is_the_gradient_of_the_soft_maximum():
    """The authors' recipe: the sum of log losses first, and the nadir from the last windows of that."""
    losses, mu, warmup, settle = random_losses(), 0.3, 10, 35
    nadir = torch.tensor(losses[settle - warmup : settle].mean(0))
    reference = [np.ones(K)]
    for t, L in enumerate(losses):
        if t < settle:
            w = gradient_at(lambda L: L.log().sum(), L)
        else:
            w = gradient_at(lambda L: mu * torch.logsumexp((L / nadir).log() / mu, 0) * K, L)
        reference.append(K * w / w.sum())
    close(trajectory(SmoothTchebycheff(mu, warmup, settle), losses)[0], reference)
    by_default = trajectory(SmoothTchebycheff(warmup=10), losses)[0]
    close(by_default, trajectory(SmoothTchebycheff(1.0, 10, 40), losses)[0])
    nadir = losses[30:40].mean(0)
    close(by_default[41:], np.tile(K / nadir / (1 / nadir).sum(), (STEPS - 40, 1)))  # at μ = 1 the losses cancel


def test_stch_settles_a_task_by_its_own_windows():
    """One has settled, another has not: both have an unweighted sum of log losses as their measure."""
    method = SmoothTchebycheff(mu=0.5, warmup=1, settle=2)
    losses = [[1.0, 4.0, 2.0], [0.5, 3.0, 2.0], [0.4, 3.0, 1.0]]
    weights = trajectory(method, losses, present=[[1, 1, 1], [1, 1, 0], [1, 1, 1]])[0][-1]
    f = np.log(np.array([0.4 / 0.5, 3.0 / 3.0]))
    raw = [*(2 * softmax(f / 0.5) / [0.4, 3.0]), 1 / 1.0]
    close(weights, K * np.array(raw) / sum(raw))


def test_stch_tends_to_the_maximum():
    weights = trajectory(SmoothTchebycheff(mu=0.001, warmup=1, settle=1), [[1.0, 10.0, 0.1], [0.5, 9.0, 0.05]])[0]
    np.testing.assert_allclose(weights[-1], [0, K, 0], atol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_famo_is_the_papers_algorithm_with_the_next_losses(gamma):
    losses, m = random_losses(), np.array([0.0, 0.01, 0.0])
    xi = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([xi], lr=0.025, weight_decay=gamma)
    reference, previous = [np.full(K, 1 / K)], None
    for L in losses:
        D = torch.tensor(L - m)
        if previous is not None:
            fall = previous.log() - D.log()
            xi.grad = torch.autograd.grad(torch.softmax(xi, -1), xi, grad_outputs=fall)[0]
            adam.step()
        z = torch.softmax(xi.detach(), -1).numpy()
        c = (z / D.numpy()).sum()
        reference.append(gradient_at(lambda L, z=z, c=c: ((L - torch.tensor(m)).log() * torch.tensor(z) / c).sum(), L))
        previous = D
    close(trajectory(FAMO(gamma=gamma, min_losses={"b": 0.01}), losses)[0], reference)


@pytest.mark.parametrize(
    ("method", "within"),
    [
        (UncertaintyWeighting(start="balanced"), 1e5),
        (IMTLL(start="balanced"), 1e5),
        (GeometricLoss(), 1e5),
        (ScaleInvariant(), 1e5),
        (SmoothTchebycheff(), 1e5),
        (FAMO(), 1e4),
    ],
    ids=repr,
)
def test_losses_are_balanced_until_the_floor_of_the_weights_binds(method, within):
    """Every weighted loss is the same; with losses a billion apart the larger one's weight stands on the floor."""
    for large, balanced in ((within, True), (1e9, False)):
        losses = [1.0, 1.0, large]
        weighted = trajectory(method, [losses])[0][-1] * losses
        assert (abs(weighted[2] / weighted[0] - 1) < 1e-3) == balanced
        assert weighted[0] == pytest.approx(weighted[1])


# ---- rules that hold for all


@ids
def test_absent_tasks_keep_weight_and_state_and_the_others_share(name):
    method, total = METHODS[name]
    generator = np.random.default_rng(1)
    weights, state = method.init(TASKS)
    for L in random_losses():
        present = generator.random(K) < 0.7
        before, before_state = weights, state
        weights, state = method.update(state, window(L, present))
        assert np.array_equal(weights[~present], before[~present])
        for key, value in state.items():
            assert value.shape == before_state[key].shape
            assert value.dtype == before_state[key].dtype
            if value.ndim:
                assert np.array_equal(value[~present], before_state[key][~present]), key
        assert (weights > 0).all()
        if total is not None:
            assert math.isclose(weights.sum(), total, rel_tol=1e-12)


@ids
def test_a_task_that_never_comes_leaves_the_others_as_if_it_were_not_there(name):
    method, _ = METHODS[name]
    losses = random_losses()
    weights, _ = method.init(TASKS)
    present = [[1, 1, 0]] * STEPS
    without, _ = trajectory(method, losses[:, :2], tasks=TASKS[:2], initial_weights=weights[:2])
    close(trajectory(method, losses, present=present)[0][:, :2], without)


@ids
def test_the_sum_is_that_of_the_initial_weights(name):
    method, total = METHODS[name]
    assert method.keeps_sum == (total is not None)
    if method.keeps_sum:
        weights, _ = trajectory(method, random_losses(), initial_weights={"a": 0.5, "b": 1.0, "c": 2.5})
        np.testing.assert_allclose(weights.sum(1), 4, rtol=1e-12)


@ids
def test_one_task_keeps_its_sum(name):
    method, total = METHODS[name]
    if "b" in getattr(method, "classification", ()):
        method = replace(method, classification=())
    if getattr(method, "min_losses", None):
        method = replace(method, min_losses=None)
    weights, _ = trajectory(method, random_losses(20, 1), tasks=["a"])
    assert np.isfinite(weights).all()
    if total is not None:
        np.testing.assert_allclose(weights, 1, rtol=1e-12)


@ids
def test_update_is_pure(name):
    method, _ = METHODS[name]
    _, state = trajectory(method, random_losses(10))
    statistics = window([0.3, 2.0, 5.0], [1, 0, 1])
    kept_state, kept = copy.deepcopy(state), copy.deepcopy(statistics)
    first, second = method.update(state, statistics), method.update(state, statistics)
    assert all(np.array_equal(state[key], kept_state[key]) for key in kept_state)
    assert np.array_equal(statistics.losses, kept.losses)
    assert np.array_equal(statistics.present, kept.present)
    assert np.array_equal(first[0], second[0])  # so lag=0 may ask as often as there are micro-batches


@ids
def test_a_saved_state_goes_on_where_it_was(name):
    method, _ = METHODS[name]
    losses = random_losses()
    weights, _ = trajectory(method, losses)
    _, state = trajectory(method, losses[:40])
    file = io.BytesIO()
    torch.save({key: torch.from_numpy(value) for key, value in state.items()}, file)
    file.seek(0)
    state = {key: value.numpy() for key, value in torch.load(file, weights_only=True).items()}
    for t, L in enumerate(losses[40:], start=41):
        resumed, state = method.update(state, window(L))
        assert np.array_equal(resumed, weights[t])


@pytest.mark.parametrize(
    "method", [RandomLossWeighting(), RandomLossWeighting("dirichlet"), ReLoBRaLo(0.9, 1.0, 0.5)], ids=str
)
def test_the_seed_decides_the_draws_and_the_global_generator_does_not(method):
    losses = random_losses(30)
    weights = trajectory(method, losses)[0]
    untouched = torch.get_rng_state()
    torch.manual_seed(123)
    np.testing.assert_array_equal(weights, trajectory(method, losses)[0])
    torch.set_rng_state(untouched)
    for seed in (1, 2, -1):
        assert not np.array_equal(weights, trajectory(replace(method, seed=seed), losses)[0])


@ids
@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.one_of(st.floats(-8, 8), st.none()), st.booleans()), min_size=K, max_size=K),
        min_size=1,
        max_size=6,
    )
)
def test_extremes_stay_finite(name, rows):
    method, total = METHODS[name]
    weights, state = method.init(TASKS)
    for row in rows:
        losses = [0.0 if exponent is None else 10.0**exponent for exponent, _ in row]
        weights, state = method.update(state, window(losses, [here for _, here in row]))
        assert np.isfinite(weights).all()
        assert (weights > 0).all()
        assert all(np.isfinite(value).all() for value in state.values())
        if total is None:
            assert (weights >= FLOOR).all()
        else:
            assert math.isclose(weights.sum(), total, rel_tol=1e-9)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0, 0.0])
@pytest.mark.parametrize(
    ("method", "name"),
    [
        (UncertaintyWeighting, "lr"),
        (IMTLL, "lr"),
        (FAMO, "lr"),
        (DynamicWeightAverage, "temperature"),
        (ReLoBRaLo, "tau"),
        (SmoothTchebycheff, "mu"),
    ],
)
def test_positive_parameters(method, name, wrong):
    with pytest.raises(ValueError, match=rf"`{name}` must be positive and finite\. Found `{name} = "):
        method(**{name: wrong})


@pytest.mark.parametrize("wrong", [0, -1, 2.5])
@pytest.mark.parametrize(
    ("method", "name"),
    [(DynamicWeightAverage, "steps_per_epoch"), (SoftAdapt, "history"), (SmoothTchebycheff, "warmup")],
)
def test_counts(method, name, wrong):
    with pytest.raises(ValueError, match=rf"`{name}` must be an integer of at least 1\. Found `{name} = {wrong}`"):
        method(**{name: wrong})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UncertaintyWeighting(optimizer="lbfgs"), "`optimizer` must be 'adam' or 'sgd'. Found"),
        (lambda: UncertaintyWeighting(classification=("d",)).init(TASKS), "`classification` must name tasks out of"),
        (lambda: SmoothTchebycheff(warmup=9, settle=8), "`settle` must not be less than `warmup`"),
        (lambda: UncertaintyWeighting(form="log2"), "`form` must be 'log' or 'log1p'. Found"),
        (lambda: IMTLL(start="rest"), "`start` must be 'equal' or 'balanced'. Found"),
        (lambda: RandomLossWeighting("uniform"), "`distribution` must be 'normal' or 'dirichlet'. Found"),
        (lambda: RandomLossWeighting(seed="0"), "`seed` must be an integer. Found"),
        (lambda: ReLoBRaLo(seed=0.5), "`seed` must be an integer. Found"),
        (lambda: ReLoBRaLo(alpha=1.1), r"`alpha` must be in \[0, 1\]. Found"),
        (lambda: ReLoBRaLo(rho=-0.1), r"`rho` must be in \[0, 1\]. Found"),
        (lambda: SoftAdapt(beta=math.nan), "`beta` must be finite. Found"),
        (
            lambda: SoftAdapt(variant="weighted"),
            "`variant` must be 'original', 'normalized' or 'loss_weighted'. Found",
        ),
        (lambda: FAMO(gamma=-1), "`gamma` must be finite and at least 0. Found"),
        (
            lambda: FAMO(min_losses={"a": -1.0}),
            "`min_losses` must be None or a mapping of .* finite and at least 0. Found `min_losses = {'a': -1.0}`",
        ),
        (
            lambda: FAMO(min_losses={"d": 1.0}).init(TASKS),
            "`min_losses` must name tasks out of .* names `..d",
        ),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
