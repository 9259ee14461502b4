"""Proves on your own machines, in your own configuration, that the weights depend on the global batch alone.

    accelerate launch <your configuration> -m accel_weighting.selfcheck

Trains a small model for a few steps with GradNorm, CoVWeighting and RotoGrad under the engine, the precision and the
processes that the launcher gave, and compares statistics, weights, rotations and the model with the same training done
by hand: one process, the whole batch, float64, no engine and no weighter. Then it times what weighting costs. Exits
with 0 if all is right and with 1 if not, on every process.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import socket
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from . import CoVWeighting, GradNorm, Method, RotoGrad, Statistics, Weighter, __version__
from .engines import accelerator_on_cpu, describe_engine
from .processes import Processes, launched_processes

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

TOLERANCES = {"no": 2e-4, "fp16": 2e-2, "bf16": 1e-1, "fp8": 2e-1}
"""By precision: the largest relative difference that rounding explains."""

MEANING = {
    "alone": (
        "{launched} processes were launched, and each of them believes that it is alone: {launched} separate trainings "
        "would run, each on all of the data. On a CPU, launch with ACCELERATE_USE_CPU=true or build "
        "Accelerator(cpu=True), as --cpu does here. On GPUs, see whether torch.cuda.is_available()."
    ),
    "started one": (
        "The launcher was told of several processes (it set MASTER_ADDR) and started one. `accelerate launch --cpu "
        "--num_processes N` does that: use `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`."
    ),
    "count": "There are {processes} processes, not the {expected} that --expect asks for.",
    "statistics": (
        "Losses or gradient norms are not those of the global batch. In training, weights would depend on the number "
        "of processes and on accumulation: what was found on one machine would not hold on sixteen."
    ),
    "weights": (
        "The statistics are right and the weights are not: in training, tasks would be weighted by something else than "
        "what the method says."
    ),
    "model": (
        "The weights are right, and the model that the engine trained is not the one that they give. Look for "
        "gradients that are not averaged over the processes (is the model prepared?), clipped, or scaled."
    ),
    "ranks": (
        "The processes do not hold the same weights, bit by bit. In training, each would follow an objective of its "
        "own, and the mean of their gradients would belong to none."
    ),
    "error": (
        "The training stopped with the error above, and any other training in this configuration can be expected to. "
        "Processes that disagree did not meet in the all-reduce: they were built differently, or it did not happen."
    ),
}
"""What a failure means for training."""

COST = (
    "a step of plain training {plain_ms:.2f} ms, weighted by GradNorm {weighted_ms:.2f} ms, ratio {ratio:.3f}; the one "
    "all-reduce {all_reduce_ms:.2f} ms"
)


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
        (losses @ (w if on_losses else torch.ones_like(w))).backward()
        G = torch.stack([alias.grad for alias in aliases])  # type: ignore[misc]
        G = G / w[:, None, None] if on_losses else G
        z.backward(torch.einsum("k,knd->nd", w, G))
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(p.grad, alpha=LR)  # type: ignore[arg-type]
                p.grad = None
        gram, S = torch.einsum("knd,jnd->kj", G, G), G[i].mT @ G[j]
        moments = (S - S.mT)[:, upper[0], upper[1]] if rotates else None
        everyone = torch.ones(K, dtype=torch.bool)
        s = Statistics(losses.detach(), everyone, gram.diagonal().sqrt(), gram, moments, step=step)
        w, state = method.update(state, s)
        seen.append((s.losses, gram, w))
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
        return self.accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=LR))

    def ask(self, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """One forward, in the precision that the engine gave the model's parameters."""
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return model(x.to(dtype).to(self.accelerator.device))

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
        seen.append((s.losses, torch.zeros(0) if s.gram is None else s.gram, weights))
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


# ---- the report --------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What the check found; ``problems`` are keys of ``MEANING``."""

    processes: int
    launched: int | None  # None: several were asked for, and one was started
    expected: int | None
    engine: str
    distributed_type: str
    mixed_precision: str
    device: str
    machines: dict[str, int] = field(default_factory=dict)
    summed_over: list[int] = field(default_factory=list)
    micro_batches: int = 0
    steps: int = 0
    tolerance: float = 0.0
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def header(self) -> str:
        """Where the check ran."""
        machines = ", ".join(f"{name} × {count}" for name, count in self.machines.items())
        over = f"{len(self.summed_over)} process{'es' if len(self.summed_over) > 1 else ''}"
        cut = f"{len(self.summed_over)} × {self.micro_batches} micro-batch{'es' if self.micro_batches > 1 else ''}"
        rows = {
            "processes": f"{self.processes} ({machines})",
            "engine": self.engine,
            "precision": self.mixed_precision if self.mixed_precision != "no" else "float32",
            "device": self.device,
            "summed over": f"{over}: ranks {brief(self.summed_over)}",
            "each step": f"{cut} of {ROWS} rows, against one process with all {ROWS * self.blocks} rows in float64",
        }
        return "\n".join(f"  {name:<12} {value}" for name, value in rows.items())

    @property
    def blocks(self) -> int:
        """Micro-batches of all processes."""
        return len(self.summed_over) * self.micro_batches

    def findings(self) -> str:
        """Largest relative differences from the training by hand, and the cost."""
        columns = ("losses", "gram", "weights", "rotations", "model")
        lines = [f"  {'method':<14}" + "".join(f"{name:>11}" for name in columns) + "   all processes alike"]
        for name, row in self.methods.items():
            cells = "".join(f"{row[c]:>11.1e}" if c in row else f"{'–':>11}" for c in columns)
            lines.append(f"  {name:<14}{cells}   {'yes, bitwise' if row['ranks_equal'] else 'NO'}")
        lines += ["", "  " + COST.format(**self.cost), ""] if self.cost else [""]
        return "\n".join(lines) if self.methods else ""

    def verdict(self) -> str:
        """The last word, and what a failure means for training."""
        if self.passed:
            return f"PASSED in {self.seconds:.0f} s: rounding explains differences below {self.tolerance:.0e}."
        return "\n".join(["FAILED", *(f"  {key}: {MEANING[key].format(**vars(self))}" for key in self.problems)])


def brief(ranks: Sequence[int]) -> str:
    """``0-15``, or all of them."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks))


def shout(text: str) -> None:
    """What must not be overlooked among a launcher's messages."""
    print(f"\n{'!' * 100}\n{text}\n{'!' * 100}\n", flush=True)


def check_methods(setting: Setting, report: Report, names: Sequence[str], steps: int) -> None:
    """Trains with every method twice, and writes down where the two differ, the same on all processes."""
    causes = {"statistics": ("losses", "gram"), "weights": ("weights", "rotations"), "model": ("model",)}
    for name in names:
        net = Net(width=16, layers=2)
        copied = copy.deepcopy(net).double()
        found = under_the_engine(setting, METHODS[name], net, steps)
        errors = compare(found, by_hand(METHODS[name], copied, steps, ROWS * setting.blocks))
        everyone = setting.processes.gather((errors, found.digest))
        worst = {key: max(own[key] for own, _ in everyone) for key in errors}
        alike = len({digest for _, digest in everyone}) == 1
        report.methods[name] = worst | {"ranks_equal": alike, "final_weights": found.weights[-1].tolist()}
        wrong = [c for c, keys in causes.items() if any(not worst.get(key, 0.0) <= report.tolerance for key in keys)]
        report.problems += [c for c in (*wrong[:1], *(() if alike else ("ranks",))) if c not in report.problems]


def check(args: argparse.Namespace) -> Report:
    """The whole check; prints as it goes."""
    start = time.perf_counter()
    options = {"gradient_accumulation_steps": args.micro_batches}
    timeout = timedelta(seconds=args.timeout)
    if args.cpu:
        accelerator = accelerator_on_cpu(timeout, **options)
    else:
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)], **options)
    report = Report(
        accelerator.num_processes,
        launched_processes(),
        args.expect,
        describe_engine(accelerator),
        accelerator.distributed_type.value,
        accelerator.mixed_precision,
        str(accelerator.device),
        steps=args.steps,
        tolerance=TOLERANCES[accelerator.mixed_precision],
        versions={
            "accel_weighting": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        },
    )
    if report.processes == 1 and report.launched is None:
        report.problems.append("started one")
    elif report.processes == 1 and report.launched != 1:
        report.problems.append("alone")
    elif args.expect not in (None, report.processes):
        report.problems.append("count")
    if report.problems:
        return report

    setting = Setting(accelerator, Processes(accelerator, None), args.micro_batches)
    everyone = setting.processes.gather((accelerator.process_index, socket.gethostname()))
    report.summed_over = [rank for rank, _ in everyone]
    report.machines = dict(Counter(host for _, host in everyone))
    report.micro_batches = args.micro_batches
    accelerator.print(f"\naccel_weighting {__version__}\n\n{report.header()}\n", flush=True)
    try:
        check_methods(setting, report, args.methods, args.steps)
        if args.timings:
            report.cost = cost(setting, args.timings)
    except Exception:  # whatever it is: the others may wait in a collective that this process will not come to
        traceback.print_exc()
        report.problems.append("error")
    report.seconds = time.perf_counter() - start
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    args = parser().parse_args(argv)
    warnings.simplefilter("ignore", FutureWarning)  # the engines' own, at every step
    report = check(args)
    state = PartialState()
    if state.is_main_process:
        if report.machines:
            print(report.findings(), report.verdict(), sep="\n", flush=True)
        else:  # it never began
            shout(report.verdict())
        if args.json:
            args.json.write_text(json.dumps(vars(report) | {"passed": report.passed}, indent=2) + "\n")
    if "error" not in report.problems:
        state.wait_for_everyone()
        state.destroy_process_group()
    return 0 if report.passed else 1


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        "python -m accel_weighting.selfcheck", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps per method (default: 12)")
    parser.add_argument(
        "--micro_batches", type=int, default=2, help="micro-batches per step and process, accumulated (default: 2)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which methods to check (default: all)"
    )
    parser.add_argument("--timings", type=int, default=20, help="pairs of steps to time; 0: none (default: 20)")
    parser.add_argument("--expect", type=int, metavar="N", help="fail unless there are N processes")
    parser.add_argument(
        "--timeout", type=int, default=60, help="seconds that processes wait for one that does not come (default: 60)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found there")
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="on the CPU over gloo, FSDP and DeepSpeed too: to try a configuration on a machine without accelerators",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
