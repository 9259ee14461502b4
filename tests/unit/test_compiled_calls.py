"""Compiled models, by how their heads are called: the numbers of the same model without a compiler.

Inductor runs where there is a C++ compiler, and without one the compiler's front end alone.
"""

from __future__ import annotations

import copy
import getpass
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accel_weighting import MGDA, CoVWeighting, GradNorm, RotoGrad, Weighter
from accel_weighting.join import register
from tests.small import assert_close

COMPILER = shutil.which("g++") or shutil.which("clang++")
BACKENDS = ["aot_eager", *(["inductor"] if COMPILER else [])]
WHAT = ["model", "trunk", "a head", "heads"]
pytestmark = pytest.mark.filterwarnings(  # torch's own
    "ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated", "ignore::DeprecationWarning"
)


@pytest.fixture(autouse=True)
def cache_of_this_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor compiles with headers from its cache, which it also finds if they are for other lengths of vectors."""
    if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
        folder = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_{capability}"
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))


def mean(x: Tensor) -> Tensor:
    return x.square().mean()


class Net(nn.Module):
    """A trunk and two heads that are called in one of some ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.trunk, self.how = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6)), how
        self.a = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        self.b = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.trunk(x))

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor]:
        if self.how == "once":
            return self.a(h), self.b(h)
        if self.how == "a slice":
            return self.a(h[:, 0]), self.b(h[:, 0])
        if self.how == "two slices":
            return self.a(h[:, 0]), self.b(h[:, 1])
        if self.how == "twice":
            a, b = self.a(h), self.b(h)
            return a + self.a(h), b
        a = self.a(h)  # both twice, and one of them on something else too
        return a + self.a(h) + self.a(torch.tanh(h)), self.b(h) * self.b(h)


def compiled(net: Net, what: str, backend: str) -> Any:
    if what == "model":
        return torch.compile(net, backend=backend)
    if what == "trunk":
        net.trunk.compile(backend=backend)
    if what in ("heads", "a head"):
        net.b.compile(backend=backend)
    if what == "heads":
        net.a.compile(backend=backend)
    return net


def steps(net: Net, method: Any, what: str, backend: str, met: bool = True) -> tuple[Any, ...]:
    torch.compiler.reset()
    torch.manual_seed(1)
    net = copy.deepcopy(net)
    weighter = Weighter(method, ["a", "b"], heads={"a": net.a, "b": net.b})
    model = compiled(net, what, backend)
    seen = []
    for _ in range(2):
        net.zero_grad()
        x = torch.randn(7, 3, 4, dtype=torch.float64)
        weighter.backward([mean(y) for y in model(x)])
        seen.append(weighter.statistics.norms)
        if met:
            seen.append(weighter.statistics.gram)
        seen += [p.grad.clone() for p in net.parameters()]
    return tuple(seen)


@pytest.mark.parametrize(
    ("what", "backend"), [(what, "aot_eager") for what in WHAT] + [("model", b) for b in BACKENDS[1:]]
)
@pytest.mark.parametrize("how", ["once", "a slice", "two slices", "twice", "twice, and more"])
def test_compiled_statistics_and_gradients_are_those_of_the_plain_model(how, what, backend):
    torch.manual_seed(0)
    net = Net(how).double()
    met = how in ("once", "twice") or (how == "a slice" and what in ("model", "trunk"))
    for plain, other in zip(
        steps(net, GradNorm(), "", "", met), steps(net, GradNorm(), what, backend, met), strict=True
    ):
        assert_close(other, plain, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("method", [MGDA(), RotoGrad()], ids=["MGDA", "RotoGrad"])
@pytest.mark.parametrize("how", ["a slice", "twice"])
def test_methods_on_inner_products_see_one_join(how, method):
    torch.manual_seed(0)
    net = Net(how).double()
    for plain, other in zip(steps(net, method, "", ""), steps(net, method, "model", "aot_eager"), strict=True):
        assert_close(other, plain, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("route", ["heads", "branch"])
def test_memory_formats(route, layout, backend):
    def run(compile_it: bool) -> list[Any]:
        torch.compiler.reset()
        torch.manual_seed(0)
        trunk = nn.Conv2d(3, 4, 3, padding=1).double().to(memory_format=layout)
        heads = nn.ModuleDict({t: nn.Conv2d(4, 2, 1) for t in "ab"}).double().to(memory_format=layout)
        weighter = Weighter(GradNorm(), ["a", "b"], heads=dict(heads) if route == "heads" else None)

        def forward(x: Tensor) -> list[Tensor]:
            z = torch.tanh(trunk(x))
            zs = weighter.branch(z) if route == "branch" else dict.fromkeys("ab", z)
            return [heads[t](zs[t]) for t in "ab"]

        model = torch.compile(forward, backend=backend) if compile_it else forward
        weighter.backward([mean(y) for y in model(torch.randn(2, 3, 8, 8).double().to(memory_format=layout))])
        return [weighter.statistics.gram, trunk.weight.grad]

    for plain, other in zip(run(False), run(True), strict=True):
        assert_close(other, plain, rtol=1e-10, atol=1e-14)


def test_several_tensors_compiled():
    """An attention head is called with three: followed without a break of the graph, or where it breaks."""
    torch.manual_seed(0)

    def run(compile_it: bool) -> list[Any]:
        torch.compiler.reset()
        torch.manual_seed(0)
        trunk, b = nn.Linear(4, 8).double(), nn.Linear(8, 2).double()
        mha = nn.MultiheadAttention(8, 2, batch_first=True).double()
        weighter = Weighter(GradNorm(), ["a", "b"], heads={"a": mha, "b": b})

        def forward(x: Tensor) -> list[Tensor]:
            z = torch.tanh(trunk(x))
            return [mha(z, z, z)[0], b(z)]

        model = torch.compile(forward, backend="aot_eager") if compile_it else forward
        weighter.backward([mean(y) for y in model(torch.randn(2, 3, 4).double())])
        return [weighter.statistics.norms, trunk.weight.grad]

    for plain, other in zip(run(False), run(True), strict=True):
        assert_close(other, plain, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("what", ["plain", "weighted"])
def test_a_second_derivative_through_a_compiled_graph_is_refused_by_torch_itself(what):
    torch.compiler.reset()
    torch.manual_seed(0)
    net = Net("once")
    weighter = Weighter(CoVWeighting(), ["a", "b"], heads={"a": net.a, "b": net.b}) if what == "weighted" else None
    model, x = torch.compile(net, backend="aot_eager"), torch.randn(7, 4, requires_grad=True)
    a, b = model(x)
    force = torch.autograd.grad(a.sum(), x, create_graph=True)[0]
    losses = {"a": mean(a) + mean(force), "b": mean(b)}
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        weighter.backward(losses) if weighter else sum(losses.values()).backward()


# ---- the operators --------------------------------------------------------------------------------------------------


class Sink:
    """In place of a branch, where no backward runs."""

    is_active = False
    rotations = None

    def collect(self, rows: Any, inputs: Any, mask: Any) -> None:
        return None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("there", [(1, 1, 1, 1), (1, 0, 1, 0), (0, 1, 0, 0)])
def test_the_operator_keeps_the_compilers_rules(layout, dtype, there):
    sink = Sink()
    key = register(sink)  # type: ignore[arg-type]
    some = [torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=layout) for _ in there]
    gradients = [g if is_there else None for g, is_there in zip(some, there, strict=True)]
    torch.library.opcheck(
        torch.ops.accel_weighting.collect.default,
        (gradients, 2, None, None, key),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", [GradNorm(), MGDA(), RotoGrad(), CoVWeighting()], ids=lambda m: type(m).__name__)
def test_a_break_of_the_graph_between_two_heads_changes_nothing(method: Any, backend: str) -> None:
    """The alias of the second head leaves the first graph."""

    class Broken(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.trunk(x)
            a = self.a(h)
            torch._dynamo.graph_break()
            return a, self.b(h)

    torch.manual_seed(0)
    net = Broken("once").double()
    for plain, other in zip(steps(net, method, "", ""), steps(net, method, "model", backend), strict=True):
        assert_close(other, plain, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", [GradNorm(), MGDA(), RotoGrad(), CoVWeighting()], ids=lambda m: type(m).__name__)
def test_aliases_may_leave_a_compiled_trunk(method: Any, backend: str) -> None:
    """`branch` in the trunk, which is compiled, and heads that are not."""

    def run(backend: str | None) -> list[Any]:
        torch.compiler.reset()
        torch.manual_seed(0)
        net = Net("once").double()
        weighter = Weighter(method, ["a", "b"])

        def represent(x: Tensor) -> dict[str, Tensor]:
            return weighter.branch(net.trunk(x))

        trunk = represent if backend is None else torch.compile(represent, backend=backend)
        for _ in range(3):
            net.zero_grad()
            z = trunk(torch.randn(7, 4, dtype=torch.float64))
            weighter.backward([mean(net.a(z["a"])), mean(net.b(z["b"]))])
        return [weighter.statistics.norms, weighter.statistics.gram, *(p.grad.clone() for p in net.parameters())]

    for plain, other in zip(run(None), run(backend), strict=True):
        assert_close(other, plain, rtol=1e-10, atol=1e-14)
