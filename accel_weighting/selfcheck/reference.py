"""The training that the self-check does twice, by hand on one process and under the user's engine; and its cost."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from accel_weighting import CoVWeighting, GradNorm, Method, RotoGrad, Statistics, Weighter
from accel_weighting.processes import Processes

TASKS = ("small", "middle", "large")
SCALES = dict(zip(TASKS, (0.3, 1.0, 3.0), strict=True))
FEATURES = 6
ROWS = 8  # of a micro-batch: so few that the mean of local norms would be far from the norm of the mean gradient
LR = 0.01

METHODS: dict[str, Method] = {
    "GradNorm": GradNorm(alpha=1.0, lr=0.01),
    "CoVWeighting": CoVWeighting(total="tasks"),
    "RotoGrad": RotoGrad(burn_in=3),
}


class Layer(nn.Module):
    """A residual layer; a unit of its own under FSDP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[rows, width]``, and so is what it returns."""
        return x + torch.tanh(self.inner(x))


class Net(nn.Module):
    """A shared trunk and one head per task, the same on every process."""

    _no_split_modules = ("Layer",)  # where FSDP finds its units

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width)  # DeepSpeed makes its "auto" sizes of it
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(FEATURES, width), *(Layer(width) for _ in range(layers)))
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in TASKS})
        self.branch: Callable[[Tensor], dict[str, Tensor]] | None = None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Every task's answer, ``[rows, 1]``."""
        z = self.trunk(x)
        zs = dict.fromkeys(TASKS, z) if self.branch is None else self.branch(z)
        return {task: head(zs[task]) for task, head in self.heads.items()}


def batch(step: int, rows: int) -> Tensor:
    """The global batch of a step, the same on every process, float64."""
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def losses_of(outputs: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Every task is to give back one of the features; their scales differ tenfold."""
    return {
        task: SCALES[task] * (output[:, 0].to(x.dtype) - x[:, k]).square().mean()
        for k, (task, output) in enumerate(outputs.items())
    }


@dataclass
class Trajectory:
    """What a training saw: one row per step, float64 on the CPU.

    Attributes:
        losses: ``[steps, K]``.
        gram: ``[steps, K, K]``, or nothing where the method needs none.
        weights: ``[steps, K]``.
        rotations: ``[K, m, m]`` at the end, or nothing.
        learned: By how much the model's answers to fixed questions changed, ``[rows, K]``.
    """

    losses: Tensor
    gram: Tensor
    weights: Tensor
    rotations: Tensor
    learned: Tensor

    @classmethod
    def of(cls, seen: Sequence[Sequence[Tensor]], rotations: Tensor | None, learned: Tensor) -> Trajectory:
        """From the losses, Gram matrix and weights of every step."""
        losses, gram, weights = (torch.stack(column) for column in zip(*seen, strict=True))
        return cls(losses, gram, weights, torch.zeros(0) if rotations is None else rotations.cpu().double(), learned)

    @property
    def digest(self) -> str:
        """Of everything that must be alike on all processes to the last bit."""
        parts = (self.losses, self.gram, self.weights, self.rotations)
        return hashlib.blake2b(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()


# ---- the training by hand ----------------------------------------------------------------------------------------


def by_hand(method: Any, net: Net, steps: int, rows: int) -> Trajectory:
    """The method on one process and the whole batch: plain PyTorch, and the method's own pure functions.

    Args:
        method: The weighting method.
        net: The model in float64 on the CPU.
        steps: Optimizer steps.
        rows: Of the global batch.
    """
    K, width, rotates = len(TASKS), net.config.hidden_size, "moments" in method.needs
    w, state = method.init(TASKS)
    if rotates:
        state = method.widen(state, width)
    eye = torch.eye(width, dtype=torch.float64).repeat(K, 1, 1)
    i, j = torch.triu_indices(K, K, 1)
    upper = torch.triu_indices(width, width, 1)

    def forward(x: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        z = net.trunk(x)
        aliases = [z.detach().requires_grad_() for _ in TASKS]
        R = state.get("rotations", eye)
        outputs = {t: net.heads[t](aliases[k] @ R[k].T) for k, t in enumerate(TASKS)}
        return z, aliases, outputs

    before, seen = answers(lambda x: forward(x)[2], rows), []
    for step in range(steps):
        x = batch(step, rows)
        z, aliases, outputs = forward(x)
        losses = torch.stack(list(losses_of(outputs, x).values()))
        on_losses = method.acts_on == "losses"
        weights = torch.tensor(w)
        (losses @ (weights if on_losses else torch.ones_like(weights))).backward()  # type: ignore[no-untyped-call]
        G = torch.stack([alias.grad for alias in aliases])  # type: ignore[misc]
        G = G / weights[:, None, None] if on_losses else G
        z.backward(torch.einsum("k,knd->nd", weights, G))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(p.grad, alpha=LR)  # type: ignore[arg-type]
                p.grad = None
        gram, S = torch.einsum("knd,jnd->kj", G, G), G[i].mT @ G[j]
        moments = (S - S.mT)[:, upper[0], upper[1]] if rotates else None
        L, M = losses.detach().numpy(), gram.numpy()
        s = Statistics(L, np.ones(K, dtype=bool), np.sqrt(M.diagonal()), M, moments, step=step)
        w, state = method.update(state, s)
        seen.append((losses.detach(), gram, torch.tensor(w)))
    after = answers(lambda x: forward(x)[2], rows)
    return Trajectory.of(seen, state.get("rotations"), after - before)


@torch.no_grad()
def answers(model: Callable[[Tensor], dict[str, Tensor]], rows: int) -> Tensor:
    """A model's answers to questions that it was not trained on."""
    outputs = model(batch(1_000_000, rows))
    return torch.cat([outputs[task].cpu().double() for task in TASKS], dim=1)


# ---- the training under the engine -------------------------------------------------------------------------------


@dataclass
class Setting:
    """Where the checked training runs: the user's engine, and this process's place in it."""

    accelerator: Accelerator
    processes: Processes
    micro_batches: int

    def __post_init__(self) -> None:
        """Fits the user's configuration to a small model and to what the training by hand does; the rest stays."""
        self.accelerator.gradient_accumulation_steps = self.micro_batches
        state = self.accelerator.state
        if self.accelerator.distributed_type == DistributedType.FSDP:
            state.fsdp_plugin.transformer_cls_names_to_wrap = list(Net._no_split_modules)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            config = state.deepspeed_plugin.deepspeed_config
            config.update(train_micro_batch_size_per_gpu=ROWS, train_batch_size="auto")
            config.update(gradient_accumulation_steps=self.micro_batches, gradient_clipping=0.0)
            config["zero_force_ds_cpu_optimizer"] = False  # SGD is not among them
            for name in ("optimizer", "scheduler"):
                config.pop(name, None)

    @property
    def blocks(self) -> int:
        """Micro-batches of all processes in an optimizer step."""
        return self.processes.world * self.micro_batches

    def prepare(self, net: Net) -> tuple[Any, Any]:
        """The model under the engine, and its optimizer."""
        model, optimizer = self.accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=LR))
        return model, optimizer

    def ask(self, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """One forward, in the precision that the engine gave the model's parameters."""
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        outputs: dict[str, Tensor] = model(x.to(dtype).to(self.accelerator.device))
        return outputs

    def window(self, model: nn.Module, optimizer: Any, x: Tensor, backward: Callable[[dict[str, Tensor]], Any]) -> None:
        """One optimizer step on this process's share of the global batch."""
        blocks = x.chunk(self.blocks)
        first = self.processes.rank * self.micro_batches
        for block in blocks[first : first + self.micro_batches]:
            with self.accelerator.accumulate(model):
                backward(losses_of(self.ask(model, block), block.float().to(self.accelerator.device)))
                optimizer.step()
                optimizer.zero_grad()

    def plain_backward(self, losses: dict[str, Tensor]) -> None:
        """Without weights."""
        self.accelerator.backward(torch.stack(list(losses.values())).sum())

    def settle_loss_scale(self, model: nn.Module, optimizer: Any) -> None:
        """Steps of length zero, in which an fp16 loss scale finds its size: a step that it skips is no error."""
        if self.accelerator.mixed_precision != "fp16":
            return
        set_lr(optimizer, 0.0)
        for step in range(20):
            self.window(model, optimizer, batch(step, ROWS * self.blocks), self.plain_backward)
        set_lr(optimizer, LR)


def set_lr(optimizer: Any, lr: float) -> None:
    """For all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def under_the_engine(setting: Setting, method: Method, net: Net, steps: int) -> Trajectory:
    """The same training as ``by_hand``, as a user writes it."""
    model, optimizer = setting.prepare(net)
    rows = ROWS * setting.blocks
    setting.settle_loss_scale(model, optimizer)
    weighter = Weighter(
        method,
        TASKS,
        accelerator=setting.accelerator,
        heads={task: f"heads.{task}" for task in TASKS},
        model=model,
        process_group=setting.processes.group,
    )
    before = answers(lambda x: setting.ask(model, x), rows)
    seen = []
    for step in range(steps):
        setting.window(model, optimizer, batch(step, rows), weighter.backward)
        s = weighter.statistics
        if s is None:
            raise RuntimeError("A loss or a gradient was not finite, so that the weights were held.")
        weights = torch.tensor(list(weighter.weights.values()), dtype=torch.float64)
        seen.append((torch.tensor(s.losses), torch.zeros(0) if s.gram is None else torch.tensor(s.gram), weights))
    rotations = torch.stack(list(weighter.rotations.values())) if "moments" in method.needs else None
    after = answers(lambda x: setting.ask(model, x), rows)
    weighter.detach()
    setting.accelerator.free_memory(model, optimizer)
    return Trajectory.of(seen, rotations, after - before)


def compare(found: Trajectory, true: Trajectory) -> dict[str, float]:
    """Largest relative differences."""
    norms = true.gram.diagonal(dim1=1, dim2=2).sqrt()
    errors = {"losses": (found.losses / true.losses - 1).abs().max()}
    if found.gram.numel():
        errors["gram"] = ((found.gram - true.gram).abs() / norms[:, :, None] / norms[:, None, :]).max()
    errors["weights"] = (found.weights / true.weights - 1).abs().max()
    if found.rotations.numel():
        errors["rotations"] = (found.rotations - true.rotations).abs().max()
    errors["model"] = (found.learned - true.learned).abs().max() / true.learned.abs().max()
    return {name: error.item() for name, error in errors.items()}


# ---- the cost ----------------------------------------------------------------------------------------------------


def cost(setting: Setting, pairs: int) -> dict[str, float]:
    """Milliseconds of a plain step and of one weighted by GradNorm, taken in turn, and of an all-reduce alone.

    The model is a plain chain of Linears: a small one on a CPU, one of 34 million parameters elsewhere.
    """
    accelerator, small = setting.accelerator, setting.accelerator.device.type == "cpu"
    width, rows = (512, 128) if small else (2048, 2048)
    net = Net(width, layers=4 if small else 8)
    model, optimizer = setting.prepare(net)
    set_lr(optimizer, 0.0)  # the same work at every step
    weighter = Weighter(METHODS["GradNorm"], TASKS, accelerator=accelerator, process_group=setting.processes.group)
    x = batch(0, rows * setting.blocks)
    times: dict[str, list[float]] = {"plain": [], "weighted": []}
    for pair in range(pairs + 3):  # the first three warm up
        for name in times:
            net.branch = weighter.branch if name == "weighted" else None
            backward = weighter.backward if name == "weighted" else setting.plain_backward
            seconds = timed(accelerator, lambda b=backward: setting.window(model, optimizer, x, b))  # type: ignore[misc]
            times[name] += [seconds] if pair >= 3 else []
    weighter.detach()
    accelerator.free_memory(model, optimizer)
    vector = torch.zeros(128, device=accelerator.device)
    times["all_reduce"] = [timed(accelerator, lambda: setting.processes._all_reduce(vector)) for _ in range(pairs)]
    fastest = {f"{name}_ms": min(seconds) * 1e3 for name, seconds in times.items()}  # the least disturbed by others
    everyone = setting.processes.gather(fastest)
    slowest = {name: max(own[name] for own in everyone) for name in fastest}
    return slowest | {"ratio": slowest["weighted_ms"] / slowest["plain_ms"]}


def timed(accelerator: Accelerator, work: Callable[[], Any]) -> float:
    """Seconds until the device is done with it."""
    synchronize(accelerator.device)
    start = time.perf_counter()
    work()
    synchronize(accelerator.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
