"""RotoGrad in a weighter against autograd, and against the authors' algorithm written out."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from accel_weighting import RotoGrad, RotoGradNorm, Smooth, Weighter
from accel_weighting.processes import Processes
from tests.methods.rotograd_toy import VARIANTS, avocado, toy
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
        assert weighter.statistics.norms[len(U)] == pytest.approx(G.norm().item(), rel=1e-12)
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
    weighter = weighter_for(method, lag=lag, max_growth=None)  # which the authors' algorithm has not
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


def error(R):
    R = R.double()
    return (R.mT @ R - torch.eye(R.shape[-1]).double()).abs().max().item()


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


@pytest.mark.parametrize("method", [RotoGrad(), RotoGrad(lr=0.5), RotoGradNorm(alpha=1.0)], ids=repr)
def test_autocast_changes_no_rotation_that_is_turned_in_it(method, monkeypatch):
    """A step may end there, and on a GPU a forward takes the last one in: rotations stay in float32 or wider."""
    found = []

    class Ready:
        def synchronize(self):
            pass

    def late(self, *args, sum=Processes.sum):
        reduction = sum(self, *args)
        reduction.ready = Ready()  # as on a GPU, where a step's sums are taken in at their next use
        return reduction

    for inside, is_late in ((False, False), (True, False), (False, True)):
        if is_late:
            monkeypatch.setattr(Processes, "sum", late)
        twin = Twin(dtype=torch.float32)
        weighter = weighter_for(method)
        for step in range(4):
            x, y = twin.batch(step)
            with torch.autocast("cpu", torch.bfloat16):
                losses = {t: loss.float() for t, loss in twin.losses(weighter.branch(twin.z(x)), y).items()}
                if inside:
                    weighter.backward(losses)
            if not inside:
                weighter.backward(losses)
            twin.descend(0.01)
        found.append((weighter.weights, torch.stack(list(weighter.rotations.values()))))
    (weights, R), *others = found
    for other in others:
        assert weights == other[0] and torch.equal(R, other[1])
    assert (R.mT.double() @ R.double() - torch.eye(WIDTH)).abs().max() < 1e-6


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
