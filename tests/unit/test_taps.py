"""Norms that need no waiting: where a method needs nothing else and z is large, gradients are measured one by one.

Against the join, and backwards by hand; and the memory, each case in a process of its own.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from accel_weighting import IMTLG, CoVWeighting, GradNorm, Method, Weighter
from tests.small import assert_close, most_bytes

TASKS = ["a", "b", "c"]
EXACT = {"rtol": 1e-12, "atol": 1e-16}
GRADNORM = GradNorm(alpha=1.0)


class Net(nn.Module):
    """A trunk whose output is z, and one head per task on it; `twice` calls the first head twice on it."""

    def __init__(self, twice: bool = False, recompute: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 6)
        self.heads = nn.ModuleDict({task: nn.Linear(6, 2) for task in TASKS})
        self.twice, self.recompute = twice, recompute
        self.double()

    def top(self, x: Tensor) -> tuple[Tensor, ...]:
        z = torch.tanh(self.trunk(x))
        outputs = {task: head(z) for task, head in self.heads.items()}
        if self.twice:
            outputs["a"] = outputs["a"] * self.heads["a"](z.view_as(z))
        return tuple(outputs.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.recompute == "heads":
            z = torch.tanh(self.trunk(x))
            return {t: checkpoint(head, z, use_reentrant=True) for t, head in self.heads.items()}
        if self.recompute:
            outputs = checkpoint(self.top, x, use_reentrant=self.recompute == "reentrant")
        else:
            outputs = self.top(x)
        return dict(zip(TASKS, outputs, strict=True))


def data(step: int = 0) -> Tensor:
    return torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def losses_of(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: 10**k * (output - k).square().mean() for k, (task, output) in enumerate(outputs.items())}


def by_hand(net: Net, x: Tensor) -> Tensor:
    """Norms at z."""
    z = torch.tanh(net.trunk(x)).detach().requires_grad_()
    outputs = {task: head(z) for task, head in net.heads.items()}
    if net.twice:
        outputs["a"] = outputs["a"] * net.heads["a"](z)
    return torch.stack([torch.autograd.grad(loss, z)[0].norm() for loss in losses_of(outputs).values()])


def weighter_on(net: Net, method: Method = GRADNORM, **options: Any) -> Weighter:
    return Weighter(method, TASKS, heads=dict(net.heads), **{"cosines": False, **options})


@pytest.mark.parametrize("twice", [False, True], ids=["once", "a head twice on the same z"])
@pytest.mark.parametrize("recompute", ["", "not reentrant", "reentrant", "heads"])
def test_norms_are_those_at_z(twice: bool, recompute: str) -> None:
    if twice and recompute == "heads":
        pytest.skip("there no call knows of another")
    net = Net(twice, recompute)
    weighter = weighter_on(net)
    x = data().requires_grad_()  # the older kind of checkpointing asks for it
    expected = by_hand(net, x)
    weighter.backward(losses_of(net(x)))
    assert_close(weighter.statistics.norms, expected, **EXACT)
    assert weighter.statistics.gram is None
    assert not any(name.startswith("cosine") for name in weighter.log_values())


def test_training_is_bitwise_that_of_the_join() -> None:
    runs = []
    for cosines in (False, True):
        net = Net()
        weighter, optimizer = weighter_on(net, cosines=cosines), torch.optim.SGD(net.parameters(), 0.01)
        for step in range(5):
            optimizer.zero_grad()
            weighter.backward(losses_of(net(data(step))))
            optimizer.step()
        assert (weighter.statistics.gram is not None) == cosines
        runs.append((weighter.weights, [p.detach().clone() for p in net.parameters()]))
    for task, weight in runs[0][0].items():
        assert weight == pytest.approx(runs[1][0][task], rel=1e-12)
    for p, q in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(p, q, **EXACT)


def test_several_forwards_and_micro_batches_and_counts() -> None:
    for options in ({}, {"num_items": {"a": 4, "b": 2, "c": 1}}):
        found = []
        for cosines in (False, True):
            net = Net()
            weighter = weighter_on(net, cosines=cosines)
            first, second = net(data(0)), net(data(1))
            weighter.backward(losses_of({task: torch.cat([first[task], second[task]]) for task in TASKS}), **options)
            found.append(weighter.statistics.norms)
        assert_close(found[0], torch.from_numpy(found[1]), **EXACT)


def test_an_absent_task_and_one_whose_loss_is_capped() -> None:
    found = []
    for cosines in (False, True):
        net = Net()
        weighter = weighter_on(net, cosines=cosines, max_losses={"b": 0.5})
        losses = losses_of(net(data()))
        losses.pop("c")
        weighter.backward(losses)
        assert weighter.statistics.present.tolist() == [True, True, False]
        found.append(weighter.statistics.norms)
    assert found[0][2] == 0
    assert_close(found[0], torch.from_numpy(found[1]), **EXACT)


def test_a_head_that_is_not_reached_is_an_error() -> None:
    net = Net()
    weighter = weighter_on(net)
    losses = losses_of(net(data()))
    losses["b"] = net.trunk.weight.square().sum()
    with pytest.raises(RuntimeError, match=r"`b`|'b'"):
        weighter.backward(losses)


def test_a_loss_on_derivatives_is_refused() -> None:
    net = Net()
    weighter = weighter_on(net)
    x = data().requires_grad_()
    outputs = net(x)
    losses = losses_of(outputs)
    (slope,) = torch.autograd.grad(outputs["a"].square().sum(), x, create_graph=True)
    losses["a"] = losses["a"] + slope.square().mean()
    with pytest.raises(RuntimeError, match="derivative"):
        weighter.backward(losses)


def test_other_backwards_are_not_recorded() -> None:
    net = Net()
    weighter = weighter_on(net)
    sum(losses_of(net(data(1))).values()).backward()
    x = data()
    expected = by_hand(net, x)
    weighter.backward(losses_of(net(x)))
    assert_close(weighter.statistics.norms, expected, **EXACT)
    with weighter.freeze():
        weighter.backward(losses_of(net(data(2))))
    assert_close(weighter.statistics.norms, expected, **EXACT)


@pytest.mark.parametrize(("tokens", "waits"), [(256, True), (60_000, False)])
@pytest.mark.parametrize("method", [GRADNORM, CoVWeighting()], ids=["GradNorm", "CoV"])
def test_by_default_it_depends_on_the_size_of_z(method: Method, tokens: int, waits: bool) -> None:
    net = Net()
    weighter = weighter_on(net, method, cosines=None)
    weighter.backward(losses_of(net(torch.randn(tokens, 4, dtype=torch.float64))))
    assert (weighter.statistics.gram is not None) == waits
    assert weighter.statistics.norms.min() > 0


@pytest.mark.parametrize("options", [{"method": IMTLG()}, {"cosines": True}, {"shared_layer": "trunk.0"}])
def test_inner_products_are_measured_where_they_are_asked_for(options: dict[str, Any]) -> None:
    net = nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(4, 6)), **{task: nn.Linear(6, 2) for task in TASKS}})
    arguments: dict[str, Any] = {"method": GRADNORM, "cosines": None, **options}
    weighter = Weighter(tasks=TASKS, heads={task: net[task] for task in TASKS}, model=net, **arguments)
    z = net["trunk"](torch.randn(60_000, 4))
    weighter.backward(losses_of({task: net[task](z) for task in TASKS}))
    assert weighter.statistics.gram.all()


def test_cosines_is_true_false_or_none() -> None:
    with pytest.raises(TypeError, match="`cosines` must be True, False or None"):
        weighter_on(Net(), cosines=1)


def test_a_changed_input_of_a_head_is_refused_as_at_the_join() -> None:
    net = Net()
    net.heads["a"] = nn.Sequential(nn.ReLU(inplace=True), net.heads["a"])
    for cosines in (False, True):
        weighter = weighter_on(net, cosines=cosines)
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
            net(data())
        weighter.detach()


def test_nothing_is_kept_after_a_step() -> None:
    net = Net()
    weighter = weighter_on(net)
    kept: list[Any] = []
    net.trunk.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    weighter.backward(losses_of(net(data())))
    gc.collect()
    assert kept[0]() is None


# ---- memory ------------------------------------------------------------------------------------------------------

BATCH, LENGTH, WIDTH = 8, 256, 128
Z = BATCH * LENGTH * WIDTH * 4


def peak(method: Method | None, K: int, kind: str) -> int:
    """The most bytes of tensors that were alive at one moment of three steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tasks = [f"t{k}" for k in range(K)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if kind == "tokens":
            trunk: nn.Module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            heads: Any = nn.ModuleList(nn.Linear(WIDTH, 8) for _ in tasks)
            x = torch.randn(BATCH, LENGTH, WIDTH)
        else:
            trunk = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 1))
            heads = nn.ModuleList(nn.Conv2d(WIDTH, 2, 1) for _ in tasks)
            x = torch.randn(BATCH, 3, 16, LENGTH // 16)
        weighter = Weighter(method, tasks, heads=dict(zip(tasks, heads, strict=True))) if method else None
        optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], 1e-4)
        for _ in range(3):
            z = checkpoint(trunk, x, use_reentrant=False) if kind == "recomputed" else trunk(x)
            losses = {task: (head(z) - 1).square().mean() for task, head in zip(tasks, heads, strict=True)}
            del z
            if weighter is not None:
                weighter.backward(losses)
            else:
                sum(losses.values()).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
    return most_bytes(profiler)


@pytest.mark.parametrize("kind", ["tokens", "maps"])
@pytest.mark.parametrize(("method", "allowed"), [("GradNorm()", 0.1), ("CoVWeighting()", 0.1), ("IMTLG()", 15)])
def test_memory_of_a_large_representation(method: str, allowed: float, kind: str) -> None:
    """Norms alone: that of a plain loop. Inner products: the other gradients, and a piece."""
    code = (
        "from accel_weighting import *; from tests.unit.test_taps import peak\n"
        f"plain, again, ours = peak(None, 16, {kind!r}), peak(None, 16, {kind!r}), peak({method}, 16, {kind!r})\n"
        "print(plain, again, ours)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    plain, again, ours = map(int, done.stdout.split()[-3:])
    assert abs(again - plain) < 0.01 * Z
    assert ours - plain <= allowed * Z + (2**20 if allowed > 1 else 0)
