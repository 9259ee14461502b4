"""RotoGrad against autograd, against the authors' algorithm written out, and on the convex toy of its paper."""

import copy
import io
import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from accel_weighting import RotoGrad, RotoGradNorm, Smooth, Weighter
from accel_weighting.methods.rotograd import haar, orthogonalise, retract, skew
from accel_weighting.statistics import Statistics
from tests.small import fake_accelerator

TASKS = ["a", "b", "c"]
WIDTH = 5
EXACT = {"rtol": 1e-12, "atol": 1e-15}


class Twin:
    """A trunk, three heads, their data and losses; ``layout`` says where the features of z are."""

    def __init__(self, layout="rows", seed=0, dtype=torch.float64):
        torch.manual_seed(seed)
        self.layout = layout
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, WIDTH)).to(dtype)
        sizes = zip(TASKS, (2, 3, 1), strict=True)
        self.heads = {t: nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, o)).to(dtype) for t, o in sizes}
        self.dtype = dtype

    def batch(self, step):
        g = torch.Generator().manual_seed(step)
        shape = {"rows": (7,), "tokens": (2, 3), "channels": (2, 3, 2)}[self.layout]
        x = torch.randn(*shape, 4, generator=g, dtype=torch.float64)
        y = torch.randn(*shape, 3, generator=g, dtype=torch.float64)
        return x.to(self.dtype), y.to(self.dtype)

    @property
    def dim(self):
        return 1 if self.layout == "channels" else -1

    def z(self, x):
        return self.trunk(x).movedim(-1, self.dim)

    def loss(self, task, r, y):
        out = self.heads[task](r.movedim(self.dim, -1))
        return (1, 10, 0.1)[TASKS.index(task)] * (out - y[..., : out.shape[-1]]).square().mean()

    def parameters(self):
        return [p for module in (self.trunk, *self.heads.values()) for p in module.parameters()]

    def losses(self, aliases, y):
        return {task: self.loss(task, aliases[task], y) for task in TASKS}

    def descend(self, lr=0.05):
        with torch.no_grad():
            for p in self.parameters():
                p -= lr * p.grad
                p.grad = None


def weighter_for(method, twin=None, **options):
    return Weighter(method, TASKS, **options)


def one_step(weighter, twin, step):
    """A backward of the weighter over ``branch``; gradients stay in the parameters."""
    x, y = twin.batch(step)
    weighter.backward(twin.losses(weighter.branch(twin.z(x)), y))


def turned(z, R, dim):
    """``R z`` on the first features of ``dim``."""
    z, m = z.movedim(dim, -1), len(R)
    return torch.cat([z[..., :m] @ R.T, z[..., m:]], -1).movedim(-1, dim)


def stiefel_step(before, after):
    """The skew X of which ``after = before (I + X + X²/2 + X³/8)``."""
    P = torch.linalg.solve(before, after)
    S = X = (P - P.mT) / 2
    for _ in range(20):
        X = S - X @ X @ X / 8
    eye = torch.eye(len(X), dtype=X.dtype)
    torch.testing.assert_close(P, eye + X + X @ X / 2 + X @ X @ X / 8, rtol=0, atol=1e-14)
    return X


def polar(M):
    U, _, Vt = torch.linalg.svd(M)
    return U @ Vt


def by_autograd(twin, step, rotations, weights=None):
    """Per task: loss, gradient at z, gradient at r (flat rows), and the Euclidean gradients of both rotation losses."""
    x, y = twin.batch(step)
    z = twin.z(x).detach()
    m = len(next(iter(rotations.values())))
    found = {}
    for k, task in enumerate(TASKS):
        zk, R = z.clone().requires_grad_(), rotations[task].clone().requires_grad_()
        r = turned(zk, R, twin.dim)
        loss = twin.loss(task, r, y) * (1 if weights is None else weights[k])
        G, G_r, D_task = torch.autograd.grad(loss, (zk, r, R))
        found[task] = [loss.detach(), G, G_r, D_task]
    n = {task: found[task][1].norm() for task in TASKS}
    v = sum(found[task][1] / n[task] for task in TASKS) / len(TASKS)
    v = v.movedim(twin.dim, -1).reshape(-1, WIDTH)[:, :m]
    for task in TASKS:
        R = rotations[task].clone().requires_grad_()
        g_r = found[task][2].movedim(twin.dim, -1).reshape(-1, WIDTH)[:, :m]
        alignment = -((g_r @ R) * v).sum()  # −Σ_n ⟨R_kᵀ g̃_n, v_n⟩, rows
        (D,) = torch.autograd.grad(alignment, R)
        torch.testing.assert_close(D, -g_r.T @ v, **EXACT)  # the closed form
        found[task].append(D)
    return found, n


def tangent(R, D):
    """The skew A of which ``R A`` is the projection of the Euclidean gradient ``D``, up to a half."""
    return R.T @ D - D.T @ R


# ---- directions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "tokens", "channels"])
@pytest.mark.parametrize("size", [None, 3])
def test_a_step_of_the_rotations_follows_their_gradient(layout, size):
    """∇_{R_k} = −Σ_n g̃_n v_nᵀ, from autograd; the step is lr along its tangent part in units of ‖G_k‖."""
    twin = Twin(layout)
    method = RotoGrad(size=size, dim=twin.dim, init="haar", lr=0.05, lr_decay=0.5)
    weighter = weighter_for(method)
    weighter.branch(twin.z(twin.batch(0)[0]))  # shows the width
    for step in range(3):
        before = weighter.rotations
        found, n = by_autograd(twin, step, before)
        one_step(weighter, twin, step)
        for task in TASKS:
            X = stiefel_step(before[task], weighter.rotations[task])
            expected = -0.05 * 0.5**step * tangent(before[task], found[task][-1]) / n[task]
            assert expected.norm() > 1e-4
            torch.testing.assert_close(X, expected, rtol=1e-12, atol=1e-14)
        twin.descend()


def test_a_padding_mask_takes_rows_out_of_the_statistics():
    twin, mask = Twin("tokens"), torch.tensor([[True, True, False], [True, False, False]])
    weighter = weighter_for(RotoGrad(init="haar"))
    x, y = twin.batch(0)
    z = twin.z(x)
    weighter.branch(z)
    before = weighter.rotations
    weighter.backward(twin.losses(weighter.branch(z, mask), y))
    found, _ = by_autograd(twin, 0, before)
    U = []
    for task in TASKS:
        G = (found[task][1] * mask[..., None]).reshape(-1, WIDTH)
        assert G.norm() < 0.95 * found[task][1].norm()
        torch.testing.assert_close(weighter.statistics.norms[len(U)], G.norm(), **EXACT)
        U.append(G / G.norm())
    for k, task in enumerate(TASKS):
        M = sum(U[k].T @ u for u in U) / 3
        X = stiefel_step(before[task], weighter.rotations[task])
        torch.testing.assert_close(X, 0.05 * (M - M.T), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [None, 3])
def test_cooperative_mode_adds_the_tasks_own_gradient_at_equal_length(size):
    twin, after = Twin(), 2
    plain = weighter_for(RotoGrad(size=size, init="haar"))
    weighter = weighter_for(RotoGrad(size=size, init="haar", cooperative_after=after))
    twins = twin, copy.deepcopy(twin)
    for step in range(4):
        weighter.branch(twin.z(twin.batch(step)[0]))
        before = weighter.rotations
        found, n = by_autograd(twin, step, before)
        one_step(weighter, twin, step)
        one_step(plain, twins[1], step)
        for task in TASKS:
            if step < after:
                assert torch.equal(weighter.rotations[task], plain.rotations[task])
                continue
            A, T = (-tangent(before[task], D) for D in (found[task][-1], found[task][3]))
            expected = 0.05 * 0.9999**step * (A / n[task] + T * (A.norm() / n[task] / T.norm())) / 2
            X = stiefel_step(before[task], weighter.rotations[task])
            torch.testing.assert_close(X, expected, rtol=1e-11, atol=1e-14)
        assert step < after or not torch.equal(weighter.rotations["a"], plain.rotations["a"])
        for t in twins:
            t.descend()


def test_a_task_alone_is_not_turned():
    twin = Twin()
    weighter = Weighter(RotoGrad(init="haar"), ["a"])
    x, y = twin.batch(0)
    z = twin.z(x)
    weighter.branch(z)
    before = weighter.rotations["a"]
    weighter.backward({"a": twin.loss("a", weighter.branch(z)["a"], y)})
    assert torch.equal(weighter.rotations["a"], before) and weighter.weights == {"a": 1}


# ---- magnitudes ----------------------------------------------------------------------------------------------------


class Authors:
    """Algorithm 1 with the authors' burn-in, step by step, as plain arithmetic on one process's gradients."""

    def __init__(self, burn_in):
        self.burn_in, self.counter, self.initial = burn_in, 0, None

    def weights(self, n):
        if self.initial is None or self.counter == self.burn_in:
            self.initial = n
        self.counter += 1
        ratios = [x / y for x, y in zip(n, self.initial, strict=True)]
        alphas = [ratio / sum(ratios) for ratio in ratios]
        C = sum(alpha * x for alpha, x in zip(alphas, n, strict=True))
        return [C / x for x in n]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    "method",
    [
        RotoGrad(burn_in=4, init="haar"),
        RotoGrad(burn_in=4, rotate=False),
        RotoGrad(burn_in=4, normalize_losses=True),
        RotoGrad(scale=False, lr=0.3),
    ],
    ids=repr,
)
def test_the_training_is_that_of_the_authors_algorithm(method, lag):
    """Trunk: C ΣU_k. Heads: their raw gradient. Rotations: a retraction along ∇R. No weighter in the twin."""
    twin, authors = Twin(), Authors(method.burn_in)
    reference = copy.deepcopy(twin)
    weighter = weighter_for(method, lag=lag)
    weighter.branch(twin.z(twin.batch(0)[0]))
    eye = torch.eye(WIDTH, dtype=torch.float64)
    rotations = weighter.rotations if method.rotate else dict.fromkeys(TASKS, eye)
    weights, loss_weights = [1.0] * 3, [1.0] * 3
    moved = 0.0
    for step in range(8):
        x, y = reference.batch(step)
        found, n = by_autograd(reference, step, rotations, loss_weights)
        new = authors.weights([n[task].item() for task in TASKS]) if method.scale else [1.0] * 3
        now = weights if lag else new
        z = reference.z(x)
        z.backward(sum(w * found[task][1] for w, task in zip(now, TASKS, strict=True)))
        for k, task in enumerate(TASKS):
            r = turned(z.detach(), rotations[task], -1)
            (reference.loss(task, r, y) * loss_weights[k]).backward()

        one_step(weighter, twin, step)
        for p, q in zip(twin.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
        twin.descend()
        reference.descend()

        if method.normalize_losses:
            raw = [found[task][0].item() / w for task, w in zip(TASKS, loss_weights, strict=True)]
            if step in (0, method.burn_in):
                old, loss_weights = loss_weights, [1 / loss for loss in raw]
                # Norms are remembered of the losses as they are: the new factors apply to them at once.
                factors = [a / b for a, b in zip(loss_weights, old, strict=True)]
                authors.initial = [x * f for x, f in zip(authors.initial, factors, strict=True)]
                new = Authors.weights(
                    copy.copy(authors), [n[t].item() * f for t, f in zip(TASKS, factors, strict=True)]
                )
        weights = new
        if method.rotate:
            moved = 0.0
            for task in TASKS:
                X = -method.lr * method.lr_decay**step * tangent(rotations[task], found[task][-1]) / n[task]
                cayley = torch.linalg.solve(eye - X / 2, eye + X / 2)
                P = cayley if method.lr > 0.1 else eye + X + X @ X / 2 + X @ X @ X / 8
                rotations = rotations | {task: polar(rotations[task] @ P)}
                moved = max(moved, X.norm().item())
                torch.testing.assert_close(weighter.rotations[task], rotations[task], rtol=0, atol=1e-9)
            assert moved > 1e-3
        if method.scale:
            assert max(weights) / min(weights) > 1.5


def window(norms, present=None, losses=None, moments=None, gram=None):
    norms = torch.as_tensor(norms, dtype=torch.float64)
    K = len(norms)
    present = torch.ones(K, dtype=torch.bool) if present is None else torch.tensor(present)
    losses = torch.ones(K).double() if losses is None else torch.as_tensor(losses, dtype=torch.float64)
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
        torch.testing.assert_close(method.update(scaled, window([3 * f, 0.5 * f, 2 * f]))[0], w, rtol=1e-13, atol=0)


# ---- absent tasks, zero gradients, what is not finite ----------------------------------------------------------------


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
            torch.testing.assert_close(w[[0, 2]], w_alone, **EXACT)


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
    assert torch.equal(after["rotations"], state["rotations"]) and after_w.isfinite().all()
    assert torch.equal(after_w, w) or isinstance(method, RotoGradNorm)  # Adam coasts
    gone = window([0.0] * 3, [False] * 3, None, triangles(*zero), torch.zeros(3, 3).double())
    gone_w, after = method.update(state, gone)
    assert torch.equal(after["rotations"], state["rotations"]) and torch.equal(gone_w, w)


class Spoil(torch.autograd.Function):
    """Identity whose gradient is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g * math.inf


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_rows_1_and_2_what_is_not_finite_holds_weights_and_rotations(what, caplog):
    twin = Twin()
    weighter = weighter_for(RotoGrad())
    one_step(weighter, twin, 0)
    weights, rotations, state = weighter.weights, weighter.rotations, weighter.state_dict()["state"]
    x, y = twin.batch(1)
    aliases = weighter.branch(twin.z(x))
    losses = twin.losses(aliases | {"b": Spoil.apply(aliases["b"])} if what == "gradient" else aliases, y)
    if what == "loss":
        losses["b"] = losses["b"] * math.nan
    weighter.backward(losses)
    assert weighter.weights == weights
    assert all(torch.equal(rotations[task], R) for task, R in weighter.rotations.items())
    assert all(torch.equal(state[key], value) for key, value in weighter.state_dict()["state"].items())
    assert "weights are held" in caplog.text and weighter.log_values()["weighting/skipped_steps"] == 1
    one_step(weighter, twin, 2)
    assert weighter.weights != weights and not torch.equal(weighter.rotations["a"], rotations["a"])


# ---- RotoGradNorm ----------------------------------------------------------------------------------------------------


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
        torch.testing.assert_close(obtained, 3 * torch.softmax(v.detach(), 0), rtol=1e-9, atol=1e-10)
        assert torch.equal(state["rotations"], plain["rotations"])
    assert (obtained - 1).abs().max() > 0.1
    assert method.acts_on == "shared" and method.needs == {"norms", "gram", "moments", "losses"}


def test_rotogradnorm_weighs_the_trunk_and_leaves_the_heads_raw():
    twin = Twin()
    weighter = weighter_for(RotoGradNorm(1.5, weights_lr=0.5))
    one_step(weighter, twin, 0)
    twin.descend(0.0)
    weights, rotations = weighter.weights, weighter.rotations
    assert min(weights.values()) < 0.8
    found, _ = by_autograd(twin, 1, rotations)
    reference = copy.deepcopy(twin)
    x, y = twin.batch(1)
    reference.z(x).backward(sum(weights[task] * found[task][1] for task in TASKS))
    for task in TASKS:
        reference.loss(task, turned(reference.z(x).detach(), rotations[task], -1), y).backward()
    one_step(weighter, twin, 1)
    for p, q in zip(twin.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-14)


# ---- the convex toy of the paper -------------------------------------------------------------------------------------

VARIANTS = ["vanilla", "magnitude only", "rotations only", "RotoGrad", "flipped sign", "R for Rᵀ", "g̃ for g"]


def avocado(u):
    a, b = u.sum(-1), u[..., 0] - u[..., 1]
    return torch.log(torch.cosh(a)) + torch.log(torch.cosh(b)) / 2 + 0.05 * (a**2 + b**2)


def toy(seeds, steps, lr=0.05):
    """All variants × seeds at once: the optima's gaps ``[variants, seeds, 2]`` and the rotations.

    ``L_k = φ(R_k z − c_k)``, one input, z a two-layer net of it, SGD at 1e-3. Moments as a window makes them, steps by
    the library's retraction.
    """
    V = len(VARIANTS)
    g = torch.Generator().manual_seed(0)

    def uniform(*shape, fan_in):
        return ((2 * torch.rand(seeds, *shape, generator=g).double() - 1) / fan_in**0.5).repeat(V, 1, *[1] * len(shape))

    net = [uniform(10, 2, fan_in=2), uniform(10, fan_in=2), uniform(2, 10, fan_in=10), uniform(2, fan_in=10)]
    net = [p.flatten(0, 1).requires_grad_() for p in net]
    B = V * seeds
    x = torch.tensor([1.0, -1.0]).double()
    c = torch.tensor([[1.5, 1.5], [-1.5, -1.5]]).double()
    R = torch.eye(2).double().repeat(B, 2, 1, 1)
    which = torch.arange(V).repeat_interleave(seeds)
    rotate = (which >= 2).double()
    scale = (which == 1) | (which >= 3)
    sign = torch.where(which == VARIANTS.index("flipped sign"), -1.0, 1.0).double()
    initial = None

    def representation():
        W1, b1, W2, b2 = net
        return (W2 @ torch.relu((W1 @ x) + b1)[..., None])[..., 0] + b2

    for step in range(steps):
        z = representation()
        leaf = z.detach()[:, None].expand(B, 2, 2).clone().requires_grad_()
        r = (R @ leaf[..., None])[..., 0]
        G, G_r = torch.autograd.grad(avocado(r - c).sum(), (leaf, r))
        n = G.norm(dim=-1).clamp(min=1e-300)
        initial = n if initial is None or step == 20 else initial
        alpha = n / initial / (n / initial).sum(1, keepdim=True)
        w = torch.where(scale[:, None], (alpha * n).sum(1, keepdim=True) / n, 1.0)
        gradients = torch.autograd.grad(z, net, (w[..., None] * G).sum(1))
        with torch.no_grad():
            for p, q in zip(net, gradients, strict=True):
                p -= 1e-3 * q
        wrong = (R @ G_r[..., None])[..., 0]
        G = torch.where((which == VARIANTS.index("R for Rᵀ"))[:, None, None], wrong, G)
        G = torch.where((which == VARIANTS.index("g̃ for g"))[:, None, None], G_r, G)
        D = G[:, 0, 0] * G[:, 1, 1] - G[:, 0, 1] * G[:, 1, 0]
        b = sign * rotate * lr * D / (2 * n.prod(1))
        X = skew(torch.stack([b, -b], 1).view(-1, 1), 2)
        R = orthogonalise(retract(R.flatten(0, 1), X)).view(B, 2, 2, 2)
    gaps = avocado((R @ representation().detach()[:, None, :, None])[..., 0] - c).view(V, seeds, 2)
    return gaps, R.view(V, seeds, 2, 2, 2), [p.detach().view(V, seeds, *p.shape[1:]) for p in net]


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


def test_the_toy_is_what_the_weighter_does():
    """The vectorised toy above and a plain loop with a weighter take the same way."""
    steps = 40
    _, R, net = toy(1, steps)
    *_, start = toy(1, 0)
    index = VARIANTS.index("RotoGrad")
    W1, b1, W2, b2 = parameters = [p[index, 0].clone().requires_grad_() for p in start]
    x, c = torch.tensor([1.0, -1.0]).double(), torch.tensor([[1.5, 1.5], [-1.5, -1.5]]).double()
    weighter = Weighter(RotoGrad(lr_decay=1.0), ["0", "1"], lag=0)
    for _ in range(steps):
        z = (W2 @ torch.relu(W1 @ x + b1) + b2)[None]
        aliases = weighter.branch(z)
        weighter.backward([avocado(aliases["0"] - c[0]).sum(), avocado(aliases["1"] - c[1]).sum()])
        with torch.no_grad():
            for p in parameters:
                p -= 1e-3 * p.grad
                p.grad = None
    assert (weighter.rotations["0"] - torch.eye(2)).abs().max() > 0.01
    torch.testing.assert_close(torch.stack(list(weighter.rotations.values())), R[index, 0], rtol=0, atol=1e-10)
    for p, q in zip(parameters, net, strict=True):
        torch.testing.assert_close(p.detach(), q[index, 0], rtol=0, atol=1e-10)


# ---- on SO(m) --------------------------------------------------------------------------------------------------------


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


def test_one_feature_cannot_turn():
    twin = Twin()
    weighter = weighter_for(RotoGrad(size=1))
    one_step(weighter, twin, 0)
    assert weighter.rotations["a"].tolist() == [[1.0]] and min(weighter.weights.values()) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_in_half_precision_keeps_the_rotations_orthogonal(dtype):
    """Autocast, and a bf16 model: the rotations are float32 all the same."""
    twin = Twin(dtype=torch.float32 if dtype == torch.float32 else dtype)
    weighter = weighter_for(RotoGrad(lr=0.09, lr_decay=1.0))
    for step in range(120):
        x, y = twin.batch(step % 10)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            aliases = weighter.branch(twin.z(x))
            assert aliases["a"].dtype == torch.bfloat16
            losses = twin.losses(aliases, y)
        weighter.backward({task: loss.float() for task, loss in losses.items()})
        twin.descend(0.01)
        assert all(R.dtype == torch.float32 and error(R) < 1e-6 for R in weighter.rotations.values())
    assert (weighter.rotations["a"] - torch.eye(WIDTH)).abs().max() > 0.05


def test_ten_thousand_steps_in_bf16_keep_the_rotations_orthogonal():
    """Features, heads, losses and their gradients in bf16, the largest steps that the series takes, no decay."""
    torch.manual_seed(0)
    m, tasks = 16, ["a", "b"]
    z = torch.randn(64, 8, m, dtype=torch.bfloat16, requires_grad=True)
    heads = [nn.Linear(m, 1, dtype=torch.bfloat16) for _ in tasks]
    weighter = Weighter(RotoGrad(lr=0.1, lr_decay=1.0), tasks)
    worst = 0.0
    for step in range(10_000):
        aliases = weighter.branch(z[step % 64]).values()
        weighter.backward(
            [(head(r) - k).square().mean() for k, (head, r) in enumerate(zip(heads, aliases, strict=True))]
        )
        if step % 97 == 0 or step > 9_980:
            worst = max(worst, *(error(R) for R in weighter.rotations.values()))
    assert (weighter.rotations["a"] - torch.eye(m)).abs().max() > 0.05
    assert 0 < worst < 1e-6


# ---- the beginning ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("layout", ["rows", "tokens", "channels"])
def test_the_identity_leaves_the_model_as_it_is_at_step_0(layout):
    twin = Twin(layout)
    x, y = twin.batch(0)
    plain = twin.losses(dict.fromkeys(TASKS, twin.z(x)), y)
    for size in (None, 2):
        weighter = weighter_for(RotoGrad(size=size, dim=twin.dim))
        with_rotations = twin.losses(weighter.branch(twin.z(x)), y)
        assert all(torch.equal(plain[task], with_rotations[task]) for task in TASKS)
    haar_losses = twin.losses(weighter_for(RotoGrad(dim=twin.dim, init="haar")).branch(twin.z(x)), y)
    assert all(not torch.equal(plain[task], haar_losses[task]) for task in TASKS)


# ---- in a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 3])
def test_heads_by_hooks_are_heads_by_branch(size):
    twin = Twin()
    other = copy.deepcopy(twin)
    by_branch = weighter_for(RotoGrad(size=size, init="haar"))
    by_hooks = weighter_for(RotoGrad(size=size, init="haar"), heads=twin.heads)
    for step in range(4):
        x, y = twin.batch(step)
        by_hooks.backward(twin.losses(dict.fromkeys(TASKS, twin.z(x)), y))
        one_step(by_branch, other, step)
        twin.descend()
        other.descend()
    assert by_hooks.weights == by_branch.weights
    assert all(torch.equal(by_hooks.rotations[task], by_branch.rotations[task]) for task in TASKS)
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("route", ["heads", "branch"])
def test_evaluation_uses_the_rotations_and_records_nothing(route):
    twin = Twin()
    weighter = weighter_for(RotoGrad(size=3, init="haar"), **({"heads": twin.heads} if route == "heads" else {}))
    x, y = twin.batch(0)

    def losses():
        z = twin.z(x)
        return twin.losses(dict.fromkeys(TASKS, z) if route == "heads" else weighter.branch(z), y)

    weighter.backward(losses())
    rotations, weights, seen = weighter.rotations, weighter.weights, weighter.statistics
    with torch.no_grad():
        found = losses()
        total = weighter.combine(found)
        z = twin.z(x).movedim(-1, -1)
    if route == "heads":
        weighter.detach()  # else the next line would rotate twice
    with torch.no_grad():
        expected = {task: twin.loss(task, turned(z, rotations[task], -1), y) for task in TASKS}
    for task in TASKS:
        torch.testing.assert_close(found[task], expected[task], **EXACT)
    torch.testing.assert_close(total, sum(expected.values()), **EXACT)  # heads are not weighted, nor is the report
    assert weighter.weights == weights and weighter.statistics is seen


def test_a_loss_of_the_trunks_own_is_added_to_what_combine_gives():
    twin = Twin()
    weighter = weighter_for(RotoGrad(init="haar"), lag=0)
    x, y = twin.batch(0)
    weighter.branch(twin.z(x))
    rotations = weighter.rotations
    found, n = by_autograd(twin, 0, rotations)
    z = twin.z(x)
    penalty = 0.3 * z.square().sum()
    (weighter.combine(twin.losses(weighter.branch(z), y)) + penalty).backward()
    weighter.step()
    got = [p.grad for p in twin.trunk.parameters()]
    w = Authors(20).weights([n[task].item() for task in TASKS])
    z = twin.z(x)
    gradient = sum(w[k] * found[task][1] for k, task in enumerate(TASKS)) + 0.6 * z.detach()
    for g, expected in zip(got, torch.autograd.grad(z, list(twin.trunk.parameters()), gradient), strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-11, atol=1e-14)
    assert list(weighter.weights.values()) == pytest.approx(w, rel=1e-12)


def test_micro_batches_in_one_process_are_the_whole_batch():
    """And normalising every micro-batch by itself is something else."""
    twin = Twin()
    x, y = (t[:6] for t in twin.batch(0))

    def rotations(blocks, per_block=False):
        accelerator = fake_accelerator(sync=False)
        weighter = weighter_for(RotoGrad(init="haar"), accelerator=accelerator)
        for b in range(blocks):
            accelerator.sync_gradients = per_block or b == blocks - 1
            rows = slice(b * 6 // blocks, (b + 1) * 6 // blocks)
            weighter.backward(twin.losses(weighter.branch(twin.z(x[rows])), y[rows]))
        return torch.stack(list(weighter.rotations.values())), weighter.statistics

    (whole, seen), (cut, seen_cut), (wrong, _) = rotations(1), rotations(3), rotations(3, per_block=True)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-15)
    torch.testing.assert_close(seen_cut.moments, seen.moments, rtol=1e-12, atol=1e-15)
    assert seen_cut.moments.abs().max() > 1e-3
    assert (wrong - whole).abs().max() > 1e-3


def test_wrapped_methods_rotate_too():
    twin = Twin()
    other = copy.deepcopy(twin)
    plain, smooth = weighter_for(RotoGrad(init="haar")), weighter_for(Smooth(RotoGrad(init="haar"), 0.5))
    for step in range(3):
        one_step(plain, twin, step)
        one_step(smooth, other, step)
        twin.descend(0.0)
        other.descend(0.0)
    assert all(torch.equal(plain.rotations[task], smooth.rotations[task]) for task in TASKS)
    assert plain.weights != smooth.weights


# ---- as a value, saved, wrongly used ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        RotoGrad(cooperative_after=1, normalize_losses=True, burn_in=3, init="haar"),
        RotoGradNorm(1.5, size=3),
        Smooth(RotoGrad(), 0.5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_resumed_run_is_the_same_bit_by_bit(method, dtype):
    def run(steps, twin, weighter):
        for step in steps:
            one_step(weighter, twin, step)
            twin.descend(0.01)

    twin = Twin(dtype=dtype)
    weighter = weighter_for(method)
    run(range(18), twin, weighter)
    file = io.BytesIO()
    torch.save(weighter.state_dict(), file)
    file.seek(0)
    other, resumed = copy.deepcopy(twin), weighter_for(method)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(weighter.rotations[task], R) for task, R in resumed.rotations.items())
    run(range(18, 36), twin, weighter)
    run(range(18, 36), other, resumed)
    assert resumed.weights == weighter.weights
    a, b = weighter.state_dict()["state"], resumed.state_dict()["state"]
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), other.parameters(), strict=True))


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
        ({"size": 0}, r"`size` must be None or at least 1. Found `size = 0`"),
        ({"lr": 0.0}, "`lr` must be positive and finite"),
        ({"lr": math.nan}, "`lr` must be positive and finite"),
        ({"lr_decay": 1.1}, r"`lr_decay` must lie in \(0, 1\]"),
        ({"burn_in": -1}, "`burn_in` must be at least 0"),
        ({"init": "random"}, "`init` must be 'identity' or 'haar'. Found `init = 'random'`"),
        ({"init": len}, "`init` must be"),
        ({"cooperative_after": -1}, "`cooperative_after` must be None or at least 0"),
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


def test_more_features_than_there_are_cannot_be_rotated():
    weighter = weighter_for(RotoGrad(size=6))
    with pytest.raises(ValueError, match=r"which has 5 features along `dim = -1`. Found `size = 6`"):
        weighter.branch(torch.randn(2, 5, requires_grad=True))


def test_the_width_must_not_change():
    weighter = weighter_for(RotoGrad())
    weighter.branch(torch.randn(2, 5, requires_grad=True))
    with pytest.raises(ValueError, match="are for 5 features, and the shared representation now has 6"):
        weighter.branch(torch.randn(2, 6, requires_grad=True))


def test_rotations_are_known_after_the_first_forward():
    weighter = weighter_for(RotoGrad())
    with pytest.raises(RuntimeError, match="known after the first forward"):
        _ = weighter.rotations
    with pytest.raises(RuntimeError, match=r"RotoGrad\(rotate=False\) has no rotations"):
        _ = weighter_for(RotoGrad(rotate=False)).rotations
    weighter.branch(torch.randn(2, 5, requires_grad=True))
    rotations = weighter.rotations
    rotations["a"].zero_()  # a copy
    assert torch.equal(weighter.rotations["a"], torch.eye(5))


def test_a_head_that_was_not_given_its_alias_is_an_error():
    twin = Twin()
    weighter = weighter_for(RotoGrad())
    x, y = twin.batch(0)
    z = twin.z(x)
    aliases = weighter.branch(z)
    with pytest.raises(RuntimeError, match="Loss `b` does not depend on the branch"):
        weighter.backward(twin.losses(aliases | {"b": z}, y))


def test_heads_of_different_tensors_are_an_error():
    twin = Twin()
    weighter = weighter_for(RotoGrad(), heads=twin.heads)
    x, y = twin.batch(0)
    z = twin.z(x)
    with pytest.raises(RuntimeError, match="the heads were fed different tensors"):
        weighter.backward(twin.losses({"a": z, "b": z, "c": z * 2}, y))


def test_at_a_shared_layer_nothing_can_be_rotated():
    layer = nn.Linear(4, 5)
    with pytest.raises(ValueError, match="acts on the shared representation itself"):
        weighter_for(RotoGrad(), shared_layer=layer)
