"""Gradients at shared parameters in one process: every task's forwards in a context of its own."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from accel_weighting import (
    DBMTL,
    IMTLG,
    MGDA,
    CoVWeighting,
    EqualWeighting,
    GradNorm,
    PCGrad,
    ReferenceNorm,
    RotoGrad,
    StaticWeighting,
    Weighter,
)
from tests.pinn import LOSSES, PINN, SHARED, TASKS, batch, gradients_by_hand, losses_of, part, residual
from tests.small import EXACT, assert_close, fake_accelerator


def weighter_on(net: nn.Module, method: Any = None, **options: Any) -> Weighter:
    return Weighter(method or GradNorm(), TASKS, **{"model": net, "shared_parameters": SHARED} | options)


def rows_by_hand(net: nn.Module, step: int = 0, names: Any = SHARED) -> Tensor:
    """Every task's gradient on a copy of the model, which no weighter has seen."""
    twin = copy.deepcopy(net)
    named = dict(twin.named_parameters())
    return gradients_by_hand(losses_of(twin, batch(step)), [named[name] for name in names])


def assert_exact(
    weighter: Weighter, net: nn.Module, weights: dict[str, float], step: int = 0, names: Any = SHARED
) -> None:
    """Statistics, and the model's gradients under those weights, are those by hand."""
    G = rows_by_hand(net, step, names)
    assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)
    assert_close(weighter.statistics.norms, G.norm(dim=1), rtol=1e-12, atol=1e-15)
    twin = copy.deepcopy(net)
    twin.zero_grad()
    losses = losses_of(twin, batch(step))
    sum(weights[task] * loss for task, loss in losses.items()).backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)


def nothing_is_left(net: nn.Module) -> bool:
    """Neither hooks nor aliases."""
    clean = all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
    return clean and all(not isinstance(value, Tensor) for m in net.modules() for value in vars(m).values())


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["names", "parameters", "parameters without a model", "wrapped"])
def test_statistics_and_gradients_are_those_by_hand(given: str) -> None:
    net = PINN()
    parameters: Any = [net.body.hidden.weight, net.body.hidden.bias]
    options: dict[str, Any] = {
        "names": {},
        "parameters": {"shared_parameters": parameters},
        "parameters without a model": {"shared_parameters": iter(parameters), "model": None},
        "wrapped": {"model": nn.DataParallel(net), "shared_parameters": [f"module.{name}" for name in SHARED]},
    }[given]
    weighter = weighter_on(net, **options)
    for step in range(2):
        net.zero_grad()
        weights = weighter.weights
        weighter.backward(losses_of(net, batch(step), weighter.task))
        assert_exact(weighter, net, weights, step)
        assert nothing_is_left(net)
    assert "body.hidden.weight" in weighter.summary() or given == "parameters without a model"
    assert "every loss reaches the shared part through its own alias alone" in weighter.summary()


@pytest.mark.parametrize("place", [0, 1])
def test_another_network_of_the_same_class_is_not_taken_for_it(place: int) -> None:
    """An accelerator has prepared both, and their parameters have the same names."""
    nets = [PINN(), PINN()]
    net = nets[place]
    parameters = [net.body.hidden.weight, net.body.hidden.bias]
    accelerator = fake_accelerator(_models=[nn.DataParallel(one) for one in nets])
    weighter = weighter_on(net, model=None, shared_parameters=parameters, accelerator=accelerator)
    for step in range(2):
        net.zero_grad()
        weights = weighter.weights
        with weighter.task("pde"):
            residual(nets[1 - place], batch(step)["pde"]).square().mean()  # the other one is called too
        weighter.backward(losses_of(net, batch(step), weighter.task))
        assert_exact(weighter, net, weights, step)


@pytest.mark.parametrize(
    "names", [["last.weight"], ["body.first.weight", "last.bias"], [n for n, _ in PINN().named_parameters()]]
)
def test_any_parameters(names: list[str]) -> None:
    """A task whose loss does not depend on one of them has a gradient of 0 there: slopes do not feel the last bias."""
    net = PINN()
    weighter = weighter_on(net, shared_parameters=names)
    weighter.backward(losses_of(net, batch(0), weighter.task))
    assert_exact(weighter, net, dict.fromkeys(TASKS, 1.0), names=names)


def test_several_forwards_of_one_task_add_up() -> None:
    net, points = PINN(), batch(0)
    weighter = weighter_on(net)
    losses = losses_of(net, points, weighter.task)
    with weighter.task("boundary"):
        losses["boundary"] = losses["boundary"] + LOSSES["boundary"](net, points["pde"])
    with weighter.task("boundary"):
        losses["boundary"] = losses["boundary"] + LOSSES["slopes"](net, points["slopes"])
    weighter.backward(losses)
    twin = PINN()
    expected = losses_of(twin, points)
    expected["boundary"] = expected["boundary"] + LOSSES["boundary"](twin, points["pde"])
    expected["boundary"] = expected["boundary"] + LOSSES["slopes"](twin, points["slopes"])
    G = gradients_by_hand(expected, [twin.body.hidden.weight, twin.body.hidden.bias])
    assert_close(weighter.statistics.gram, G @ G.T, **EXACT)


class Turned(nn.Module):
    """A product with complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex128))

    def double(self) -> Any:
        return self

    def forward(self, z: Tensor) -> Tensor:
        return z.to(torch.complex128) @ self.weight


class Shapes(nn.Module):
    """Two inputs to one number, with a weight held in some special way; `shared` names it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        self.first, self.second, self.last = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.shared = "second.weight"
        if kind == "tied":
            self.third = nn.Linear(4, 4)
            self.third.weight = self.second.weight
        elif kind == "root":
            self.scale = nn.Parameter(torch.rand(4))
            self.shared = "scale"
        elif kind == "parametrized":
            parametrize.register_parametrization(self.second, "weight", nn.Softplus())
            self.shared = "second.parametrizations.weight.original"
        elif kind == "attention":
            self.attention = nn.MultiheadAttention(4, 2)
            self.shared = "attention.in_proj_weight"
        elif kind == "convolution":
            self.convolution = nn.Conv1d(1, 3, 2)
            self.shared = "convolution.weight"
        elif kind == "complex":
            self.turned = Turned()
            self.shared = "turned.weight"
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x))
        z = torch.tanh(self.second(z))
        if self.kind == "tied":
            z = torch.sin(self.third(z))
        elif self.kind == "twice":
            z = torch.sin(self.second(z))
        elif self.kind == "root":
            z = z * self.scale
        elif self.kind == "attention":
            z = z + self.attention(z, z, z, need_weights=True)[0]
        elif self.kind == "convolution":
            z = z + torch.tanh(self.convolution(z.unsqueeze(1))).sum(1).mean(1, keepdim=True)
        elif self.kind == "complex":
            z = torch.view_as_real(self.turned(z)).prod(-1)
        return self.last(z)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["tied", "twice", "root", "parametrized", "attention", "convolution", "complex"])
def test_parameters_of_all_kinds(kind: str) -> None:
    net = Shapes(kind)
    weighter = weighter_on(net, shared_parameters=[net.shared])
    weighter.backward(losses_of(net, batch(0), weighter.task))
    assert nothing_is_left(net)
    twin = copy.deepcopy(net)
    losses = losses_of(twin, batch(0))
    W = dict(twin.named_parameters(remove_duplicate=False))[net.shared]
    rows = [torch.autograd.grad(loss, W, retain_graph=True)[0].flatten() for loss in losses.values()]
    G = torch.stack([torch.view_as_real(row).flatten() if row.is_complex() else row for row in rows])
    assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["second.weight", "third.weight"])
def test_a_tied_parameter_under_either_name_is_one(name: str) -> None:
    net = Shapes("tied")
    weighter = weighter_on(net, shared_parameters=[name])
    weighter.backward(losses_of(net, batch(0), weighter.task))
    twin = Shapes("tied")
    G = gradients_by_hand(losses_of(twin, batch(0)), [twin.second.weight])
    assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match=r"`third\.weight` twice"):
        weighter_on(net, shared_parameters=["second.weight", "third.weight"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_derivatives_by_torch_func() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        def u(point: Tensor) -> Tensor:
            return net(point)[0]  # type: ignore[no-any-return]

        return (vmap(hessian(u))(x).diagonal(dim1=1, dim2=2).sum(1) - 1).square().mean()

    net, points = PINN(), batch(0)
    weighter = weighter_on(net)
    losses = losses_of(net, points, weighter.task)
    with weighter.task("pde"):
        losses["pde"] = loss(net, points["pde"])
    weighter.backward(losses)
    twin = PINN()
    expected = losses_of(twin, points) | {"pde": loss(twin, points["pde"])}
    G = gradients_by_hand(expected, [twin.body.hidden.weight, twin.body.hidden.bias])
    assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)


def test_functional_call_of_the_same_parameters() -> None:
    net = PINN()
    weighter = weighter_on(net)
    weighter.backward(
        losses_of(lambda x: functional_call(net, dict(net.named_parameters()), x), batch(0), weighter.task)
    )
    assert_exact(weighter, net, dict.fromkeys(TASKS, 1.0))


# ---- recomputed and compiled -----------------------------------------------------------------------------------------


class Recomputed(PINN):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.body, x, use_reentrant=self.reentrant))  # type: ignore[no-any-return]


def test_recomputed_forwards_are_exact_with_second_derivatives() -> None:
    net = Recomputed(reentrant=False)
    weighter = weighter_on(net)
    weighter.backward(losses_of(net, batch(0), weighter.task))
    assert_exact(weighter, net, dict.fromkeys(TASKS, 1.0))


def test_reentrant_checkpoints_are_refused() -> None:
    net, points = Recomputed(reentrant=True), batch(0)
    weighter = Weighter(GradNorm(), ["a", "b"], model=net, shared_parameters=SHARED)
    losses = {}
    for name in ("a", "b"):
        with weighter.task(name):
            losses[name] = LOSSES["boundary"](net, points["pde"].clone().requires_grad_())
    with pytest.raises(RuntimeError, match="re-entrant activation checkpointing"):
        weighter.backward(losses)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's, at any such input
@pytest.mark.parametrize(("what", "warm"), [("whole", False), ("whole", True), ("last", True)])
def test_a_compiled_owner_is_exact_or_refused(what: str, warm: bool) -> None:
    """Its graph is broken at the owner if the first forward was in a context, and else knows nothing of aliases."""
    torch._dynamo.reset()
    net, points = PINN(), batch(0)
    model: Any = net
    if what == "whole":
        model = torch.compile(net, backend="aot_eager")
    else:
        net.last.compile(backend="aot_eager")
    if warm:
        model(points["pde"])
    weighter = Weighter(GradNorm(), ["a", "b"], model=model, shared_parameters=SHARED)
    targets = {"a": "pde", "b": "boundary"}
    twin = PINN()
    G = gradients_by_hand(
        {name: LOSSES["boundary"](twin, points[target]) for name, target in targets.items()},
        [twin.body.hidden.weight, twin.body.hidden.bias],
    )
    for _ in range(2):
        net.zero_grad()
        losses = {}
        for name, target in targets.items():
            with weighter.task(name):
                losses[name] = LOSSES["boundary"](model, points[target])
        if what == "whole" and warm:
            with pytest.raises(RuntimeError, match="What was compiled as one graph"):
                weighter.backward(losses)
            return
        weighter.backward(losses)
        assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("options", [{}, {"update_every": 10}], ids=["every step", "update_every=10"])
def test_a_compiled_model_is_compiled_anew_no_more_than_its_modes_ask(options: dict[str, Any]) -> None:
    """Frozen, between updates, evaluated in between: one more graph for gradients that are disabled, and no other."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net, points = PINN(), {"a": batch(0)["pde"], "b": batch(0)["boundary"]}
    model = torch.compile(net, backend="aot_eager", dynamic=True)
    weighter = Weighter(GradNorm(), ["a", "b"], model=model, shared_parameters=SHARED, **options)
    graphs, measured = [], 0
    for step in range(24):
        if step in (8, 12):
            weighter.freeze() if step == 8 else weighter.unfreeze()
        before, weights, losses = weighter.statistics, weighter.weights, {}
        for task, x in points.items():
            with weighter.task(task):
                losses[task] = LOSSES["boundary"](model, x)
        net.zero_grad()
        weighter.backward(losses)
        twin = copy.deepcopy(net)
        twin.zero_grad()
        expected = {task: LOSSES["boundary"](twin, x) for task, x in points.items()}
        G = gradients_by_hand(expected, [twin.body.hidden.weight, twin.body.hidden.bias])
        sum(weights[task] * loss for task, loss in expected.items()).backward()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)
            p.data.sub_(p.grad, alpha=0.01)
        if weighter.statistics is not before:
            measured += 1
            assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-10, atol=1e-12)
        if step % 5 == 4:
            with torch.no_grad(), weighter.task("a"):
                model(points["a"])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert measured == (20 if not options else 2)
    assert graphs[0] == graphs[3] > 1 and graphs[4] == graphs[-1] <= graphs[0] + 1


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_pinn_trained_by_gradnorm_is_the_same_training_by_hand(optimizer: str) -> None:
    """The paper's algorithm, written with `torch.autograd.grad` and a loss of the weights that is differentiated."""
    alpha, lr, steps = 0.5, {"sgd": 1e-2, "adam": 0.02}[optimizer], 20
    net, twin = PINN(), PINN()
    method = GradNorm(alpha=alpha, lr=lr, optimizer=optimizer)  # type: ignore[arg-type]
    weighter = weighter_on(net, method, shared_parameters=["body.hidden.weight"], max_growth=None)
    ours = torch.optim.Adam(net.parameters(), lr=1e-2)
    theirs = torch.optim.Adam(twin.parameters(), lr=1e-2)
    w = torch.ones(3, dtype=torch.float64)
    v = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam, first = torch.optim.Adam([v], lr=lr), None
    for step in range(steps):
        weighter.backward(losses_of(net, batch(step), weighter.task))
        ours.step()
        ours.zero_grad()

        losses = torch.stack([*losses_of(twin, batch(step)).values()])
        first = losses.detach() if first is None else first
        leaf = v if optimizer == "adam" else w.clone().requires_grad_()
        now = 3 * torch.softmax(v, 0) if optimizer == "adam" else leaf
        norms = [torch.autograd.grad(x, twin.body.hidden.weight, retain_graph=True)[0].norm() for x in losses]
        G = now * torch.stack(norms)
        rate = losses.detach() / first
        target = (G.mean() * (rate / rate.mean()) ** alpha).detach()
        gradient = torch.autograd.grad((G - target).abs().sum(), leaf)[0]
        (now.detach() @ losses).backward()
        theirs.step()
        theirs.zero_grad()
        if optimizer == "adam":
            v.grad = gradient
            adam.step()
            w = 3 * torch.softmax(v, 0).detach()
        else:
            w = w - lr * gradient
            w = w * 3 / w.sum()
        assert_close(np.array(list(weighter.weights.values())), w, rtol=1e-9, atol=1e-9)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    assert abs(w - 1).max() > 0.05


@pytest.mark.parametrize("method", [MGDA(), PCGrad(), IMTLG(), DBMTL(), ReferenceNorm("pde"), CoVWeighting()], ids=repr)
def test_weights_of_any_method_multiply_the_losses(method: Any) -> None:
    """And what the method sees are the raw gradients, whatever the weights are."""
    net = PINN()
    weighter = weighter_on(net, method)
    for step in range(3):
        net.zero_grad()
        factors = np.array(list(weighter.weights.values()))
        if (divided := weighter.state_dict()["state"].get("loss_weights")) is not None:
            factors = factors * divided.numpy()
        total = weighter.backward(losses_of(net, batch(step), weighter.task))
        factors = np.where(abs(factors) < 1e-6, np.where(factors < 0, -1e-6, 1e-6), factors)
        assert_close(total, torch.tensor(weighter.statistics.losses @ factors), rtol=1e-12, atol=0)
        assert_exact(weighter, net, dict(zip(TASKS, factors, strict=True)), step)


def test_a_weight_of_zero_keeps_its_task_observable() -> None:
    class Zeros(StaticWeighting):
        def init(self, tasks: Any, initial_weights: Any = None) -> Any:
            _, state = super().init(tasks, initial_weights)
            return np.array([0.0, 1.0, -0.0]), state

        def update(self, state: Any, statistics: Any) -> Any:
            return np.array([0.0, 1.0, -1e-9]), state

    net = PINN()
    weighter = weighter_on(net, Zeros(dict.fromkeys(TASKS, 1.0)))
    for expected in ([1e-6, 1.0, 1e-6], [1e-6, 1.0, -1e-6]):
        net.zero_grad()
        weighter.backward(losses_of(net, batch(0), weighter.task))
        assert_exact(weighter, net, dict(zip(TASKS, expected, strict=True)))
    assert weighter.weights["pde"] == 0


# ---- scale factors, absent tasks, loops ------------------------------------------------------------------------------


def test_counts_weigh_blocks() -> None:
    """Two micro-batches of unequal sizes, with their counts: the mean over all items."""
    net, points = PINN(), batch(0)
    weighter = weighter_on(net)
    for i, last in enumerate((False, True)):
        block = {task: x[: len(x) // 3] if i == 0 else x[len(x) // 3 :] for task, x in points.items()}
        items = {task: len(x) for task, x in block.items()}
        losses = losses_of(net, block, weighter.task)
        (weighter.combine(losses, num_items=items, last=last) / 2).backward()
        weighter.step()
    G = rows_by_hand(net)
    assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("scale", [1.0, 2.0**14])
def test_caps_and_loss_scales_do_not_show_in_the_statistics(scale: float) -> None:
    net = PINN()
    weighter = weighter_on(net, max_losses={"pde": 1e-3})
    (scale * weighter.combine(losses_of(net, batch(0), weighter.task))).backward()
    weighter.step()
    G = rows_by_hand(net)
    assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)


def test_an_absent_task_has_rows_of_zeros() -> None:
    net, points = PINN(), batch(0)
    weighter = weighter_on(net)
    weighter.backward(losses_of(net, {task: points[task] for task in ("pde", "slopes")}, weighter.task))
    G = rows_by_hand(net)
    G[1] = 0
    assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)
    assert weighter.weights["boundary"] == 1
    net.zero_grad()
    weighter.backward(losses_of(net, points, weighter.task), num_items={"boundary": 0})  # said to have no samples
    assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)


def test_a_backward_for_each_task() -> None:
    net, points = PINN(), batch(0)
    weighter = weighter_on(net, MGDA())
    with weighter.micro_batch():
        for task in TASKS:
            weighter.backward(losses_of(net, {task: points[task]}, weighter.task))
    assert_exact(weighter, net, dict.fromkeys(TASKS, 1 / 3))
    net.zero_grad()  # and the backward inside of the context
    with weighter.micro_batch():
        for task in TASKS:
            with weighter.task(task):
                weighter.backward({task: LOSSES[task](net, points[task])})
    G = rows_by_hand(net)
    assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)


def test_passes_that_leave_no_trace() -> None:
    net = PINN()
    weighter = weighter_on(net)
    weighter.backward(losses_of(net, batch(0), weighter.task))
    before = weighter.statistics
    with weighter.paused():
        weighter.backward(losses_of(net, batch(1), weighter.task))
    assert weighter.statistics is before
    torch.optim.SGD(net.parameters(), lr=0.01).step()
    lbfgs = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        return weighter.backward(losses_of(net, batch(2), weighter.task))

    here = copy.deepcopy(net)
    lbfgs.step(closure)
    G = rows_by_hand(here, step=2)
    assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)
    assert weighter.statistics.step == 1


def test_a_gradient_that_is_not_finite_holds_the_weights() -> None:
    net, points = PINN(), batch(0)
    weighter = weighter_on(net)
    losses = losses_of(net, points, weighter.task)
    losses["pde"].register_hook(lambda g: g * torch.inf)
    weighter.backward(losses)
    assert weighter.statistics is None
    assert weighter.log_values()["weighting/skipped_steps"] == 1


@pytest.mark.parametrize("still", ["frozen", "between updates", "before update_after", "evaluation", "paused"])
def test_where_nothing_is_measured_the_context_does_nothing(still: str) -> None:
    net = PINN()
    options: Any = {"between updates": {"update_every": 2}, "before update_after": {"update_after": 2}}.get(still, {})
    weighter = weighter_on(net, **options)
    if still == "frozen":
        weighter.freeze()
    if still == "between updates":
        weighter.backward(losses_of(net, batch(0), weighter.task))
        net.zero_grad()
    inside = []
    body, plain = net.body, net.body.forward
    body.forward = lambda x: inside.append(nothing_is_left(net)) or plain(x)  # type: ignore[method-assign, func-returns-value]
    with torch.set_grad_enabled(still != "evaluation"), weighter.task("boundary"):
        if still == "paused":
            with weighter.paused(), pytest.raises(RuntimeError, match="inside of"), weighter.task("pde"):
                pass
            with torch.no_grad():
                net(batch(0)["pde"])
        else:
            net(batch(0)["pde"])
            assert inside == [True]
    del body.forward
    if still != "paused":
        weighter.freeze()
        weighter.backward(losses_of(net, batch(0), weighter.task))
        twin = PINN()
        weights = weighter.weights
        sum(weights[task] * loss for task, loss in losses_of(twin, batch(0)).items()).backward()  # type: ignore[union-attr]
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)


def test_update_every() -> None:
    net = PINN()
    weighter = weighter_on(net, update_every=3)
    for step in range(7):
        net.zero_grad()
        weighter.backward(losses_of(net, batch(step), weighter.task))
        if step % 3 == 0:
            G = rows_by_hand(net, step)
            assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)
        assert weighter.statistics.step == step // 3 * 3


# ---- what is left behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_raises_leaves_nothing(error: type[BaseException]) -> None:
    net = PINN()
    weighter = weighter_on(net, shared_parameters=["body.hidden.weight", "last.weight"])

    def fails(*_: Any) -> None:
        raise error("here")

    with weighter.task("pde"):
        handle = net.body.hidden.register_forward_hook(fails)
        with pytest.raises(error, match="here"):
            net(batch(0)["pde"])
        assert error is KeyboardInterrupt or "weight" not in vars(net.body.hidden)
        handle.remove()
    assert nothing_is_left(net)
    with pytest.raises(error, match="here"), weighter.task("pde"):
        raise error("here")
    assert nothing_is_left(net)
    weighter.backward(losses_of(net, batch(0), weighter.task))
    assert_exact(weighter, net, dict.fromkeys(TASKS, 1.0), names=["body.hidden.weight", "last.weight"])


def test_a_copy_of_the_model_has_nothing_of_it() -> None:
    net = PINN()
    weighter = weighter_on(net)
    with weighter.task("pde"):
        teacher = copy.deepcopy(net)
        teacher(batch(0)["pde"]).mean().backward()
        assert "weight" not in vars(teacher.body.hidden)
    losses = losses_of(net, batch(0), weighter.task)
    with weighter.task("pde"):
        losses["pde"] = losses["pde"] + (net(batch(0)["pde"]) - teacher(batch(0)["pde"])).square().mean() * 0
    weighter.backward(losses)
    assert nothing_is_left(net)
    assert_exact(weighter, net, dict.fromkeys(TASKS, 1.0))


def test_neither_model_nor_accelerator_are_kept_alive() -> None:
    from accelerate import Accelerator

    from tests.ranks import forget_accelerators

    forget_accelerators()
    accelerator = Accelerator(cpu=True)
    net = PINN()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    weighter = weighter_on(model, accelerator=accelerator)
    weighter.backward(losses_of(model, batch(0), weighter.task))
    optimizer.zero_grad()
    alive = weakref.ref(net)
    accelerator.free_memory()
    del net, model, optimizer
    gc.collect()
    assert alive() is None
    assert weighter.weights
    with pytest.raises(RuntimeError, match="the model is gone"), weighter.task("pde"):
        pass
    weighter.detach()
    assert not accelerator._custom_objects
    forget_accelerators()


def test_a_state_goes_on_where_it_was() -> None:
    runs = []
    for resumed in (False, True):
        net = PINN()
        weighter = weighter_on(net)
        for step in range(4):
            if resumed and step == 2:
                state = weighter.state_dict()
                weighter = weighter_on(net)
                weighter.load_state_dict(state)
            net.zero_grad()
            weighter.backward(losses_of(net, batch(step), weighter.task))
        runs.append(weighter.weights)
    assert runs[0] == runs[1]
    with pytest.raises(
        ValueError, match=r"shared_parameters: \[\[6, 7\], \[6\]\] in the checkpoint, \[\[6, 7\]\] here"
    ):
        weighter_on(net, shared_parameters=SHARED[:1]).load_state_dict(weighter.state_dict())


def test_two_weighters_on_one_parameter() -> None:
    net = PINN()
    weighters = [weighter_on(net), weighter_on(net)]
    losses: dict[str, Tensor] = {}
    for task, x in batch(0).items():
        with weighters[0].task(task), weighters[1].task(task):
            losses[task] = LOSSES[task](net, x)
    assert nothing_is_left(net)
    totals = [weighter.combine(losses) for weighter in weighters]
    totals[0].backward(retain_graph=True)
    weighters[0].step()
    net.zero_grad()
    totals[1].backward()
    weighters[1].step()
    for weighter in weighters:
        G = rows_by_hand(net)
        assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)


# ---- in words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("body.hidden.weight", TypeError, "must be a list of parameters or of their names .* Found str"),
        ([], TypeError, "Found an empty list"),
        (3, TypeError, "Found int"),
        (PINN().last.weight, TypeError, "Found Parameter"),
        ([PINN().last], TypeError, "Found Linear: name its weight"),
        ([torch.ones(3)], TypeError, "Found Tensor"),
        (
            ["body.hiden.weight"],
            ValueError,
            "no parameter called 'body.hiden.weight'. Did you mean 'body.hidden.weight'?",
        ),
        (["body.hidden"], ValueError, "no parameter called 'body.hidden'"),
        (["last.bias", "last.bias"], ValueError, "`last.bias` twice"),
    ],
)
def test_what_is_no_list_of_parameters(given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        weighter_on(PINN(), shared_parameters=given)


def test_parameters_that_cannot_be_measured() -> None:
    net = PINN()
    with pytest.raises(ValueError, match="is looked up in `model`, which was not given"):
        weighter_on(net, model=None)
    net.last.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"`last\.weight` does not require grad"):
        weighter_on(net, shared_parameters=["last.weight"])
    with pytest.raises(ValueError, match="size of the shared parameter `weight` is not known yet"):
        weighter_on(nn.LazyLinear(3), shared_parameters=["weight"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heads": {"pde": "last"}}, "`shared_parameters` and `heads` are two places"),
        ({"shared_layer": "last"}, "`shared_parameters` and `shared_layer` are two places"),
        ({"lag": 0, "method": MGDA()}, "`lag = 0` is not possible"),
        ({"lag": 0, "method": CoVWeighting()}, "`lag = 0` is not possible"),
        ({"method": RotoGrad()}, "RotoGrad.* rotates a shared representation"),
    ],
)
def test_what_does_not_go_together(options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        weighter_on(PINN(), **options)


def test_contexts_that_are_wrong() -> None:
    net = PINN()
    with pytest.raises(RuntimeError, match=r"built with `shared_parameters=\[…\]`"):
        Weighter(GradNorm(), TASKS).task("pde")
    weighter = weighter_on(net)
    with pytest.raises(ValueError, match=r"Unknown task 'slope'.*Did you mean 'slopes'?"):
        weighter.task("slope")
    for inner in ("boundary", "pde"):
        with (
            weighter.task("pde"),
            pytest.raises(RuntimeError, match="a forward belongs to one task"),
            weighter.task(inner),
        ):
            pass
    with pytest.raises(RuntimeError, match=r"do not call `weighter.branch\(z\)` too"):
        weighter.branch(torch.ones(2, requires_grad=True))
    weighter.backward(losses_of(net, batch(0), weighter.task))
    assert_exact(weighter, net, dict.fromkeys(TASKS, 1.0))


def losses_with(net: Any, weighter: Weighter, wrong: Any) -> dict[str, Tensor]:
    points = batch(0)
    losses = losses_of(net, {task: points[task] for task in ("pde", "slopes")}, weighter.task)
    return {**losses, "boundary": wrong(net, points["boundary"], weighter)}


def outside(net: Any, x: Tensor, weighter: Weighter) -> Tensor:
    return LOSSES["boundary"](net, x)


def without_gradients(net: Any, x: Tensor, weighter: Weighter) -> Tensor:
    with weighter.task("boundary"), torch.no_grad():
        z = net.body(x)
    return net.last(z).square().mean()  # type: ignore[no-any-return]


def past_its_module(net: Any, x: Tensor, weighter: Weighter) -> Tensor:
    with weighter.task("boundary"):
        z = torch.tanh(F.linear(net.body.first(x), net.body.hidden.weight, net.body.hidden.bias))
        return net.last(z).square().mean()  # type: ignore[no-any-return]


def one_of_two(net: Any, x: Tensor, weighter: Weighter) -> Tensor:
    with weighter.task("boundary"):
        return torch.tanh(net.body.hidden(net.body.first(x))).square().mean()


def from_another_forward(net: Any, x: Tensor, weighter: Weighter) -> Tensor:
    with weighter.task("boundary"):
        net(x)
    return LOSSES["boundary"](net, x)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (outside, r"No forward used .* for loss `boundary`: run it in `with weighter.task\('boundary'\):`"),
        (without_gradients, "No forward used .* for loss `boundary`"),
        (past_its_module, "Parameter `body.hidden.weight` was not used .*read past its module"),
        (one_of_two, "Parameter `last.weight` was not used in the forwards of task `boundary`"),
        (from_another_forward, "No gradient of loss `boundary` came to .*computed from another forward"),
    ],
)
@pytest.mark.parametrize("method", [GradNorm(), CoVWeighting()], ids=["GradNorm", "CoV"])
def test_a_task_whose_gradient_does_not_come_is_named(method: Any, wrong: Any, text: str) -> None:
    net = PINN()
    weighter = weighter_on(net, method, shared_parameters=["body.hidden.weight", "last.weight"])
    with pytest.raises(RuntimeError, match=text):
        weighter.backward(losses_with(net, weighter, wrong))


def test_tasks_that_a_method_does_not_measure_need_no_context() -> None:
    net, points = PINN(), batch(0)
    weighter = weighter_on(net, GradNorm(tasks=["pde", "slopes"]))
    weighter.backward(losses_with(net, weighter, outside))
    G = rows_by_hand(net)
    assert_close(weighter.statistics.norms[[0, 2]], G.norm(dim=1)[[0, 2]], rtol=1e-12, atol=0)
    assert points


def test_a_loss_that_reads_another_tasks_forward_is_refused() -> None:
    net, points = PINN(), batch(0)
    weighter = weighter_on(net)
    losses = losses_of(net, points, weighter.task)
    with weighter.task("pde"):
        u = net(points["pde"])
    losses["boundary"] = losses["boundary"] + u.square().mean()
    with pytest.raises(
        RuntimeError, match=r"loss `boundary` reads a forward that ran in `with weighter.task\('pde'\):`"
    ):
        weighter.backward(losses)
    weighter.reset()
    net.zero_grad()
    stacked = torch.stack([*losses_of(net, points, weighter.task).values()])
    weighter.backward(stacked)  # which reach each other in the graph with a gradient of 0
    assert_exact(weighter, net, dict.fromkeys(TASKS, 1.0))


@pytest.mark.parametrize("what", ["penalty", "forward"])
def test_what_passes_the_aliases_by_is_said_once(what: str, caplog: pytest.LogCaptureFixture) -> None:
    net, points = PINN(), batch(0)
    weighter = weighter_on(net)
    for _ in range(2):
        net.zero_grad()
        losses = losses_of(net, points, weighter.task)
        more = net.body.hidden.weight.square().sum() if what == "penalty" else net(points["pde"]).square().mean()
        losses["boundary"] = losses["boundary"] + more
        weighter.backward(losses)
        G = rows_by_hand(net)
        assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)
    said = [record.message for record in caplog.records if "outside of `with weighter.task" in record.message]
    assert len(said) == 1 and "Loss `boundary`" in said[0]
    caplog.clear()
    fresh = weighter_on(net)
    net.zero_grad()
    fresh.backward(losses_of(net, points, fresh.task), extra={"decay": net.body.hidden.weight.square().sum()})
    assert not caplog.records
    G = rows_by_hand(net)
    assert_close(fresh.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)


def test_a_large_parameter_is_said_in_bytes() -> None:
    net = nn.Sequential(nn.Linear(2000, 2000, bias=False), nn.Linear(2000, 1))
    with pytest.warns(UserWarning, match=r"puts 12,000,000 numbers \(3 tasks × 4,000,000\), 96 MB, into"):
        weighter_on(net, shared_parameters=["0.weight"])


def test_only_a_matrix_of_the_tasks_comes_down() -> None:
    """What the host reads does not grow with the parameters."""
    net, seen = PINN(), []
    weighter = weighter_on(net)
    layout = weighter._steps.layout
    plain = layout.condense
    layout.condense = lambda *vector: seen.append(plain(*vector)) or seen[-1]  # type: ignore[method-assign, func-returns-value, assignment]
    weighter.backward(losses_of(net, batch(0), weighter.task))
    ((host, rest),) = seen
    assert rest is None and len(host) == 1 + layout._head + 9 < layout._head + 3 * 48  # after the number of processes


def test_under_an_accelerator_with_accumulation() -> None:
    """The factor of accumulation is Accelerate's; a short last window too."""
    net, points = PINN(), batch(0)
    weighter = weighter_on(net, EqualWeighting(), accelerator=fake_accelerator(sync=False))
    for i in range(3):
        weighter.accelerator.sync_gradients = i == 2
        total = weighter.combine(losses_of(net, part(points, i, 3), weighter.task))
        (total / 4).backward()
        weighter.step()
    G = rows_by_hand(net)
    assert_close(weighter.statistics.gram, G @ G.T, rtol=1e-12, atol=1e-15)
    assert residual


# ---- losses that other code sums inside ------------------------------------------------------------------------------

COV = CoVWeighting()


def summed(net: nn.Module, step: int, weights: Any, task: Any, names: Any = TASKS) -> Tensor:
    """Such code: it runs the forwards, each in its context, and gives the total."""
    losses = losses_of(net, batch(step), task)
    return sum((weights[name] * losses[name] for name in names), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize(
    "method", [COV, EqualWeighting(), StaticWeighting({"pde": 1e-9, "boundary": 1.0, "slopes": 2.0})]
)
def test_coefficients_are_the_loop_that_passes_the_losses(method: Any) -> None:
    nets = PINN(), PINN()
    weighters = [weighter_on(net, method) for net in nets]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in nets]
    for step in range(4):
        weights = weighters[0].coefficients()
        with torch.no_grad():
            plain = weighters[0].coefficients()
        assert all(float(plain[task]) == float(weight.detach()) for task, weight in weights.items())
        weighters[0].attach(summed(nets[0], step, weights, weighters[0].task)).backward()
        weighters[0].step()
        weighters[1].backward(losses_of(nets[1], batch(step), weighters[1].task))
        if step == 0:  # by hand, and so exact where weights are next to nothing too
            assert_exact(weighters[0], nets[0], {name: max(w, 1e-6) for name, w in weights.items()})
        mine, theirs = (weighter.statistics for weighter in weighters)
        assert_close(mine.gram, theirs.gram, rtol=1e-11, atol=1e-15)
        assert_close(mine.losses, theirs.losses, rtol=1e-12, atol=1e-15)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)
    assert weighters[0].weights == pytest.approx(weighters[1].weights, rel=1e-11)
    assert nothing_is_left(nets[0])


def test_coefficients_with_an_absent_task_and_accumulation() -> None:
    net = PINN()
    weighter = weighter_on(net, COV)
    for i in range(3):
        names = TASKS[:2] if i == 1 else TASKS
        losses = losses_of(net, part(batch(0), i, 3), weighter.task)
        total = sum(weight * losses[name] for name, weight in weighter.coefficients().items() if name in names)
        absent = {name: 0 for name in TASKS if name not in names}
        (weighter.attach(total, num_items=absent or None, last=i == 2) / 3).backward()
        weighter.step()
    other = PINN()
    twin = weighter_on(other, COV)
    for i in range(3):
        names = TASKS[:2] if i == 1 else TASKS
        losses = losses_of(other, part(batch(0), i, 3), twin.task)
        (twin.combine({name: losses[name] for name in names}, last=i == 2) / 3).backward()
        twin.step()
    assert_close(weighter.statistics.gram, twin.statistics.gram, **EXACT)
    assert_close(weighter.statistics.losses, twin.statistics.losses, **EXACT)


def test_a_forward_outside_of_its_context_is_named_with_coefficients_too() -> None:
    net = PINN()
    weighter = weighter_on(net, COV)
    weights = weighter.coefficients()
    outside = weights["slopes"] * losses_of(net, batch(0))["slopes"]
    weighter.attach(summed(net, 0, weights, weighter.task, TASKS[:2]) + outside).backward()
    with pytest.raises(RuntimeError, match="loss `slopes`"):
        weighter.step()
