"""Shapes of model in one process: exact against backwards by hand, or refused in words."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from accel_weighting import MGDA, CoVWeighting, GradNorm, RotoGrad, Weighter
from tests.shapes import SHAPES, largest_error
from tests.small import assert_close

GRADNORM = GradNorm(alpha=0.0)
CELLS = [(name, route) for name, shape in SHAPES.items() for route in shape.routes]


def mean(x: Tensor) -> Tensor:
    return x.square().mean()


def parts(tasks: str = "ab") -> tuple[nn.Module, nn.ModuleDict, Tensor]:
    torch.manual_seed(0)
    heads = {t: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)) for t in tasks}
    return nn.Linear(4, 6).double(), nn.ModuleDict(heads).double(), torch.randn(7, 4).double()


def gram_by_hand(z: Tensor, losses) -> Tensor:
    leaf = z.detach().requires_grad_()
    g = torch.stack([torch.autograd.grad(loss(leaf), leaf)[0].flatten() for loss in losses])
    return g @ g.T


# ---- several tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "lag"), [(GRADNORM, 1), (MGDA(), 1), (MGDA(), 0)], ids=["GradNorm", "MGDA", "lag 0"]
)
@pytest.mark.parametrize(("name", "route"), CELLS)
def test_several_tensors_are_measured_and_weighed_together(name, route, method, lag):
    assert largest_error(name, route, method, lag) < 1e-12


@pytest.mark.parametrize("route", ["heads", "branch"])
def test_rotations_of_several_tensors_are_refused_and_the_argument_is_named(route):
    trunk, _, x = parts()
    heads = {t: nn.Bilinear(6, 6, 2).double() for t in "ab"}
    weighter = Weighter(RotoGrad(), ["a", "b"], heads=heads if route == "heads" else None)
    z = trunk(x)
    with pytest.raises(ValueError, match=r"rotations act on one. Name the argument"):
        weighter.branch([z, torch.tanh(z)]) if route == "branch" else heads["a"](z, torch.tanh(z))


# ---- heads that move ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after", "modules_to_save"])
def test_adapters_of_peft(when):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    trunk, heads, x = parts()
    model = nn.ModuleDict({"trunk": trunk, "heads": heads})
    targets = ["heads.a.0", "heads.b.0"]
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=2)
    if when == "modules_to_save":
        config = peft.LoraConfig(target_modules=["trunk"], modules_to_save=["a", "b"], r=2)

    def wrap():
        return peft.inject_adapter_in_model(config, model)

    model = wrap() if when == "before" else model
    weighter = Weighter(GRADNORM, ["a", "b"], heads={t: f"heads.{t}" for t in "ab"}, model=model)
    if when != "before":
        wrap()
    for p in trunk.parameters():
        p.requires_grad_()
    for _ in range(2):
        weighter._branch.follow()  # as a forward of the whole model does
        z = model["trunk"](x)
        weighter.backward([mean(model["heads"][t](z)) for t in "ab"])
    weighter.detach()
    want = gram_by_hand(z, [lambda z, t=t: mean(model["heads"][t](z)) for t in "ab"])
    assert_close(weighter.statistics.gram, want, rtol=1e-12, atol=0)


def test_a_head_that_is_replaced_is_followed_with_one_warning(caplog):
    trunk, heads, x = parts()

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.heads = trunk, heads

        def forward(self, x: Tensor) -> list[Tensor]:
            z = self.trunk(x)
            return [self.heads[t](z) for t in "ab"]

    model = Whole()
    weighter = Weighter(GRADNORM, ["a", "b"], heads={t: f"heads.{t}" for t in "ab"}, model=model)
    weighter.backward([mean(y) for y in model(x)])
    for _ in range(2):
        model.heads["b"] = nn.Linear(6, 3).double()
        weighter.backward([mean(y) for y in model(x)])
    assert caplog.text.count("another module than the one that was hooked") == 1
    weighter.detach()
    want = gram_by_hand(trunk(x), [lambda z, t=t: mean(model.heads[t](z)) for t in "ab"])
    assert_close(weighter.statistics.gram, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_teacher_changes_nothing(when, gradients):
    def run(with_teacher: bool):
        trunk, heads, x = parts()
        student = nn.ModuleDict({"trunk": trunk, "heads": heads})
        weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
        teacher = copy.deepcopy(student)
        for _ in range(2):
            student.zero_grad()

            def look(here: str) -> None:
                if with_teacher and when == here:
                    with torch.set_grad_enabled(gradients):
                        [teacher["heads"][t](teacher["trunk"](x)) for t in "ab"]

            look("before")
            z = trunk(x)
            outputs = [heads[t](z) for t in "ab"]
            look("after")
            weighter.backward([mean(outputs[0]), mean(outputs[1]) * float("nan")], num_items={"b": 0})
        return [weighter.statistics.norms, *(p.grad for p in student.parameters())]

    for plain, other in zip(run(False), run(True), strict=True):
        assert_close(other, plain, rtol=0, atol=0)


def test_a_probe_of_one_head_between_two_steps_changes_nothing():
    trunk, heads, x = parts()
    weighter = Weighter(MGDA(), ["a", "b"], heads=dict(heads))
    for _ in range(2):
        mean(heads["b"](trunk(x))).backward()
        z = trunk(x)
        weighter.backward([mean(heads[t](z)) for t in "ab"])
    weighter.detach()
    want = gram_by_hand(z, [lambda z, t=t: mean(heads[t](z)) for t in "ab"])
    assert_close(weighter.statistics.gram, want, rtol=1e-12, atol=0)


# ---- transforms and settings ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # torch.func's own
@pytest.mark.parametrize("route", ["heads", "branch"])
@pytest.mark.parametrize("method", [GRADNORM, CoVWeighting(), RotoGrad()], ids=["GradNorm", "CoV", "RotoGrad"])
def test_transforms_of_torch_func_give_the_values_of_the_plain_model(method, route):
    trunk, heads, x = parts()
    weighter = Weighter(method, ["a", "b"], heads=dict(heads) if route == "heads" else None)

    def f(x: Tensor) -> Tensor:
        z = torch.tanh(trunk(x))
        return heads["a"](z if route == "heads" else weighter.branch(z)["a"])

    def plain(x: Tensor) -> Tensor:
        z = torch.tanh(trunk(x))
        return heads["a"][2](heads["a"][1](heads["a"][0](z)))  # rotations begin at the identity

    for transform in (
        lambda g: torch.func.vmap(torch.func.jacrev(g))(x),
        lambda g: torch.func.vmap(torch.func.hessian(g))(x),
        lambda g: torch.func.jvp(g, (x,), (torch.ones_like(x),))[1],
        lambda g: torch.func.grad(lambda x: g(x).sum())(x),
    ):
        torch.testing.assert_close(transform(f), transform(plain), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_no_statistic(dtype):
    def run():
        trunk, heads, x = parts()
        weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
        z = trunk(x)
        weighter.backward([mean(heads[t](z)) for t in "ab"])
        return weighter.statistics.gram, weighter.weights

    torch.manual_seed(0)
    plain = run()
    trunk, heads, x = parts()
    torch.set_default_dtype(dtype)
    try:
        weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
        z = trunk(x)
        weighter.backward([mean(heads[t](z)) for t in "ab"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert (weighter.statistics.gram == plain[0]).all() and weighter.weights == plain[1]
