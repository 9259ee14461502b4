"""What only a GPU shows: NCCL, a real loss scaler, inductor, and that no step of ours makes the host wait.

Each test runs in this one process, on one GPU; the last one launches a process on each of two.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  makes the group that a launcher would
from torch import Tensor

from accel_weighting import IMTLG, CoVWeighting, GradNorm, Method, RotoGrad, Weighter, measure
from accel_weighting.processes import Processes
from tests.ranks import forget_accelerators
from tests.scenarios import Cell, net
from tests.small import Block, batch, task_losses

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and here is none"),
    pytest.mark.filterwarnings("default"),  # inductor's own imports are deprecated, DDP warns of a gradient's strides
]

GRADNORM = GradNorm(alpha=1.0, lr=0.01)
METHODS = {"GradNorm": GRADNORM, "CoV": CoVWeighting(), "RotoGrad": RotoGrad(lr=0.05)}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No Accelerator, process group or compiled code is left from the test before, nor for the one after."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    forget_accelerators()
    torch._dynamo.reset()
    yield
    torch.cuda.set_sync_debug_mode("default")
    forget_accelerators()
    if dist.is_initialized():
        dist.destroy_process_group()


def nccl_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher of one process sets up."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))


def expected(method: Method, steps: int) -> list[Tensor]:
    """Weights after every step, on the CPU in float64."""
    model = net(Cell(method))
    weighter = Weighter(method, list(model.heads), heads=dict(model.heads))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    weights = []
    for step in range(steps):
        x, y = batch(step, 3, torch.float64)
        weighter.backward(task_losses(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        weights.append(torch.tensor(list(weighter.weights.values())))
    return weights


def trained(accelerator: Any, method: Method, steps: int) -> tuple[Weighter, list[Tensor]]:
    """The same in float32 on the GPU."""
    inner = net(Cell(method, dtype=torch.float32))
    prepared, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=1e-3))
    heads = dict(accelerator.unwrap_model(prepared, keep_torch_compile=False).heads)
    weighter = Weighter(method, list(heads), accelerator=accelerator, heads=heads)
    weights = []
    for step in range(steps):
        x, y = (value.to(accelerator.device) for value in batch(step, 3, torch.float32))
        weighter.backward(task_losses(prepared(x), y))
        optimizer.step()
        optimizer.zero_grad()
        weights.append(torch.tensor(list(weighter.weights.values())))
    return weighter, weights


@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_follows_the_cpu(name: str) -> None:
    from accelerate import Accelerator

    _, weights = trained(Accelerator(), METHODS[name], 5)
    torch.testing.assert_close(weights, expected(METHODS[name], 5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_real_loss_scaler_changes_nothing_but_rounding(name: str) -> None:
    from accelerate import Accelerator
    from accelerate.utils import GradScalerKwargs

    # Low enough for these losses not to overflow float16.
    accelerator = Accelerator(mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=2.0**6)])
    weighter, weights = trained(accelerator, METHODS[name], 5)
    assert accelerator.scaler.get_scale() == 2.0**6 and weighter.log_values()["weighting/skipped_steps"] == 0
    torch.testing.assert_close(weights, expected(METHODS[name], 5), rtol=5e-3, atol=5e-3)


def test_a_loss_scale_that_overflows_holds_until_the_scaler_has_lowered_it() -> None:
    from accelerate import Accelerator
    from accelerate.utils import GradScalerKwargs

    accelerator = Accelerator(mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=2.0**24)])
    weighter, weights = trained(accelerator, GRADNORM, 20)
    held = int(weighter.log_values()["weighting/skipped_steps"])
    assert 0 < held < 20
    assert all(torch.equal(w, torch.ones(3)) for w in weights[:held])
    assert not torch.equal(weights[-1], torch.ones(3))
    assert accelerator.scaler.get_scale() < 2.0**24


@pytest.mark.parametrize("name", METHODS)
def test_fsdp2_on_one_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    nccl_group_of_one(monkeypatch)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[Block.__name__],
        cpu_ram_efficient_loading=False,
    )
    _, weights = trained(Accelerator(fsdp_plugin=plugin), METHODS[name], 5)
    torch.testing.assert_close(weights, expected(METHODS[name], 5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_the_one_all_reduce_goes_through_nccl(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    nccl_group_of_one(monkeypatch)
    vectors: list[Tensor] = []

    def all_reduce(self: Processes, vector: Tensor) -> None:
        if vector.is_cuda:  # not of the reference, which runs on the CPU
            vectors.append(vector)
            dist.all_reduce(vector, group=self.group)

    monkeypatch.setattr(Processes, "_all_reduce", all_reduce)  # which leaves a group of one alone
    _, weights = trained(Accelerator(), METHODS[name], 5)
    assert len(vectors) == 5
    assert all(vector.is_cuda and vector.dtype == torch.float64 for vector in vectors)
    torch.testing.assert_close(weights, expected(METHODS[name], 5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_inductor_compiles_the_whole_model(name: str) -> None:
    from accelerate import Accelerator

    torch._dynamo.utils.counters.clear()
    _, weights = trained(Accelerator(dynamo_backend="inductor"), METHODS[name], 5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(weights, expected(METHODS[name], 5), rtol=1e-3, atol=1e-4)  # its kernels round otherwise


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("method", [*METHODS.values(), RotoGrad(lr=0.5)], ids=repr)  # a long step solves a system
def test_a_step_makes_the_host_wait_once_for_the_numbers_of_the_step_before(
    method: Method, micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's alarm sees every wait but that for an event, which is counted."""
    from accelerate import Accelerator

    waits = 0

    def synchronize(event: torch.cuda.Event, wait: Any = torch.cuda.Event.synchronize) -> None:
        nonlocal waits
        waits += 1
        wait(event)

    monkeypatch.setattr(torch.cuda.Event, "synchronize", synchronize)
    accelerator = Accelerator(gradient_accumulation_steps=micro)
    inner = net(Cell(method, dtype=torch.float32))
    model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=1e-3))
    weighter = Weighter(method, list(inner.heads), accelerator=accelerator, heads=dict(inner.heads))
    data = [tuple(v.to(accelerator.device) for v in batch(s, 3, torch.float32)) for s in range(8 * micro)]
    for i, (x, y) in enumerate(data):
        if i == 4 * micro:  # libraries have allocated what they keep
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            waits = 0
        with accelerator.accumulate(model):
            weighter.backward(task_losses(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    torch.cuda.set_sync_debug_mode("default")
    assert waits == 4
    assert weighter.statistics is not None and weighter.statistics.step == 7


# ---- large gradients -----------------------------------------------------------------------------------------------


def large(K: int, N: int, dtype: torch.dtype, size: float = 1.0, heavy: bool = False) -> list[Tensor]:
    """Gradients with much in common; or with heavy tails."""
    torch.manual_seed(0)
    common = torch.randn(N, device="cuda")
    rows = []
    for k in range(K):
        g = common + torch.randn(N, device="cuda")
        if heavy:
            g = g / torch.rand(N, device="cuda").clamp_(min=1e-3)
        rows.append((g * size * 2.0**-k).to(dtype))
    return rows


def assert_measured(rows: list[Tensor | None], tolerance: float) -> None:
    """Products, norms and the sum, each relative to what the norms allow, are those of float64."""
    some = next(g for g in rows if g is not None)
    exact = torch.stack([torch.zeros_like(some).double() if g is None else g.double() for g in rows]).flatten(1)
    products = exact @ exact.T
    lengths = products.diagonal().sqrt()
    scale = torch.outer(lengths, lengths).clamp_(min=1e-300)
    with torch.no_grad():
        gathered = measure.Gathered(rows)
        found, total = measure.gram([gathered], with_sums=True), measure.weighted_sum(gathered)
        norms = [0.0 if g is None else measure.square(g).sqrt().item() for g in rows]
    assert ((found - products).abs() / scale).max() <= tolerance
    torch.testing.assert_close(norms, lengths.tolist(), rtol=tolerance, atol=0)
    assert total is not None and total.shape == some.shape and total.dtype == some.dtype
    error = (total.double().flatten() - exact.sum(0)).abs().max() / exact.abs().sum(0).max()
    assert error <= len(rows) * torch.finfo(some.dtype).eps


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@pytest.fixture(params=["one pass", "by torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernel that Triton compiles, and as where there is no Triton."""
    if request.param == "by torch":
        monkeypatch.setattr(measure, "_kernels", lambda: None)
    else:
        assert measure._kernels() is not None, "Triton comes with torch on this platform"
    return str(request.param)


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy tails"])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_gradients_are_measured_precisely_at_any_size(
    way: str, dtype: torch.dtype, size: float, heavy: bool
) -> None:
    assert_measured(
        list(large(3, (1 << 22) + 77, dtype, size, heavy)), 10 * TOLERANCE[dtype] if heavy else TOLERANCE[dtype]
    )


@pytest.mark.parametrize("K", [1, 2, 5, 8, 16, 17])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_gradients_of_any_number_of_tasks(way: str, dtype: torch.dtype, K: int) -> None:
    rows: list[Tensor | None] = [g * 2.0 ** (k / 2) for k, g in enumerate(large(K, 1_100_001, dtype))]
    assert_measured(rows, TOLERANCE[dtype])
    if K > 2:
        rows[1] = None
        assert_measured(rows, TOLERANCE[dtype])


@pytest.mark.parametrize("layout", ["channels last", "not aligned", "strided", "of two layouts"])
def test_large_gradients_may_lie_in_memory_as_they_like(way: str, layout: str) -> None:
    rows = [g[: 1 << 20].view(4, 16, 128, 128) for g in large(4, (1 << 20) + 1, torch.float32)]
    if layout == "channels last":
        rows = [g.to(memory_format=torch.channels_last) for g in rows]
    elif layout == "not aligned":
        rows = [torch.cat([g.flatten(), g.new_zeros(1)])[1:].view_as(g) for g in rows]
    elif layout == "strided":
        rows = [torch.stack([g, g], -1)[..., 0] for g in rows]
    else:
        rows[2] = rows[2].to(memory_format=torch.channels_last)
    assert_measured(list(rows), 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_own_row_of_a_large_product(way: str, bad: float) -> None:
    rows = large(3, 1 << 21, torch.float32)
    rows[1][7] = bad
    assert torch.isfinite(measure.gram([rows]).diagonal()).tolist() == [True, False, True]


def test_a_large_join_sums_as_a_plain_loop_does() -> None:
    """With the pass that measures and sums at once, under autograd."""
    torch.manual_seed(0)
    x = torch.randn(8, 512, 256, device="cuda")
    trunk = torch.nn.Linear(256, 256, device="cuda")
    heads = torch.nn.ModuleDict({task: torch.nn.Linear(256, 3, device="cuda") for task in "abcd"})

    def losses() -> dict[str, Tensor]:
        z = trunk(x)
        return {task: (head(z) - k).square().mean() for k, (task, head) in enumerate(heads.items())}

    weighter = Weighter(IMTLG(), list("abcd"), heads=dict(heads))
    sum(weighter.weights[task] * loss for task, loss in losses().items()).backward()
    expected, trunk.weight.grad = trunk.weight.grad, None
    weighter.backward(losses())
    torch.testing.assert_close(trunk.weight.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_promise_holds_between_two_gpus() -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "accel_weighting.selfcheck"]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr
