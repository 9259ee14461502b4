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

from accel_weighting import CoVWeighting, GradNorm, Method, RotoGrad, Weighter
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
    torch.testing.assert_close(weights, expected(METHODS[name], 5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_real_loss_scaler_changes_nothing_but_rounding(name: str) -> None:
    from accelerate import Accelerator
    from accelerate.utils import GradScalerKwargs

    # Low enough for these losses not to overflow float16.
    accelerator = Accelerator(mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=2.0**6)])
    weighter, weights = trained(accelerator, METHODS[name], 5)
    assert accelerator.scaler.get_scale() == 2.0**6 and weighter.log_values()["weighting/skipped_steps"] == 0
    torch.testing.assert_close(weights, expected(METHODS[name], 5), rtol=5e-3, atol=0)


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
    torch.testing.assert_close(weights, expected(METHODS[name], 5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_the_one_all_reduce_goes_through_nccl(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    nccl_group_of_one(monkeypatch)
    vectors: list[Tensor] = []

    def all_reduce(self: Processes, vector: Tensor) -> None:
        vectors.append(vector)
        dist.all_reduce(vector, group=self.group)

    monkeypatch.setattr(Processes, "_all_reduce", all_reduce)  # which leaves a group of one alone
    _, weights = trained(Accelerator(), METHODS[name], 5)
    assert len(vectors) == 5
    assert all(vector.is_cuda and vector.dtype == torch.float64 for vector in vectors)
    torch.testing.assert_close(weights, expected(METHODS[name], 5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_inductor_compiles_the_whole_model(name: str) -> None:
    from accelerate import Accelerator

    torch._dynamo.utils.counters.clear()
    _, weights = trained(Accelerator(dynamo_backend="inductor"), METHODS[name], 5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(weights, expected(METHODS[name], 5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("method", [*METHODS.values(), RotoGrad(lr=0.5)], ids=repr)  # a long step solves a system
def test_a_step_makes_the_host_wait_for_nothing(method: Method, micro: int) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=micro)
    inner = net(Cell(method, dtype=torch.float32))
    model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=1e-3))
    weighter = Weighter(method, list(inner.heads), accelerator=accelerator, heads=dict(inner.heads))
    data = [tuple(v.to(accelerator.device) for v in batch(s, 3, torch.float32)) for s in range(8 * micro)]
    for i, (x, y) in enumerate(data):
        if i == 4 * micro:  # libraries have allocated what they keep
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        with accelerator.accumulate(model):
            weighter.backward(task_losses(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    torch.cuda.set_sync_debug_mode("default")
    assert weighter.statistics is not None and weighter.statistics.step == 7


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_promise_holds_between_two_gpus() -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "accel_weighting.selfcheck"]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr
