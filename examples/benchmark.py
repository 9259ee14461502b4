"""Measures step times, memory and collectives of weighting, against a plain weighted sum in the same run.

Every method trains its own model. In each round all of them take one step, in a shuffled order, and a plain step comes
before and after each. A ratio is to the mean of these two, so that other work of the machine affects both. The table
shows the median of the rounds with the quartiles. A second plain loop, "plain again", shows how much two equal loops
differ; smaller differences mean nothing. On a CPU the table also has the ratio of processor times, which does not count
waiting for other jobs, and the processor time that was added. The group `overhead` has a model that does next to
nothing, with warm caches and with caches that other work has filled, as a trunk would. A loop that has used up its
`--seconds` takes part in no further round.

    python examples/benchmark.py --cpu --groups weights --rounds 20
    python examples/benchmark.py --cpu --groups overhead --rounds 100
    python examples/benchmark.py --cpu --groups rotations --rounds 10
    python examples/benchmark.py --cpu --groups large --rounds 10
    accelerate launch --config_file launch_configs/cpu_2.yaml examples/benchmark.py --cpu --groups weights --tasks 4
    accelerate launch --config_file launch_configs/cpu_2.yaml examples/benchmark.py --cpu --groups lag
    python examples/benchmark.py --cpu --groups peers --peers --width 512 --rounds 6

Memory is the largest total size of tensors that were alive at one moment, from the construction of the model to the end
of its third step; once as a multiple of the plain loop's, and once as what is added to it in units of |z|, the shared
representation in float32. The group `large` has heads on every token of a text and on every place of a map.
Prints a table and writes `benchmark.json` and `benchmark.png` to `--output_dir`.
"""

import argparse
import gc
import itertools
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import numpy as np
import torch
import torch.distributed as dist  # noqa: TID251  to count what others send
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertModel

import accel_weighting
from accel_weighting import IMTLG, CoVWeighting, GradNorm, RotoGrad, Weighter
from accel_weighting.selfcheck.cpu import accelerator_on_cpu, describe_engine

Step = Callable[[], list[float]]


class Shape(NamedTuple):
    """Sizes of a model and of its inputs."""

    trunk: str
    tasks: int
    width: int
    layers: int
    length: int
    batch_size: int
    head_outputs: int
    tokens: bool
    optimizer: str


OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class ConvLayer(nn.Module):
    """A residual convolution; a unit of its own under FSDP."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The features plus the output of the convolution."""
        return x + F.relu(self.conv(self.norm(x)))


class ConvTrunk(nn.Module):
    """Residual convolutions on images of `length` × `length` pixels, downsampled by 4."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.layers = nn.ModuleList(ConvLayer(width) for _ in range(layers))

    def forward(self, images: Tensor) -> Tensor:
        """Features of all places, `[batch, places, width]`."""
        x = self.stem(images)
        for layer in self.layers:
            x = layer(x)
        return x.flatten(2).mT


class LinearTrunk(nn.Module):
    """One linear layer, which costs next to nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Features of one place, `[batch, 1, width]`."""
        return self.layer(x)


class BertTrunk(nn.Module):
    """BERT's encoder without dropout."""

    def __init__(self, width: int, layers: int, length: int):
        super().__init__()
        config = BertConfig(
            vocab_size=1024,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            intermediate_size=4 * width,
            max_position_embeddings=length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Features of all tokens, `[batch, tokens, width]`."""
        return self.bert(ids).last_hidden_state


class Net(nn.Module):
    """A trunk and one linear head per task, on the mean of the features or on every token."""

    def __init__(self, shape: Shape):
        super().__init__()
        if shape.trunk == "bert":
            self.trunk: nn.Module = BertTrunk(shape.width, shape.layers, shape.length)
        elif shape.trunk == "conv":
            self.trunk = ConvTrunk(shape.width, shape.layers)
        else:
            self.trunk = LinearTrunk(shape.width)
        # Where FSDP finds its units.
        self._no_split_modules = [{"bert": "BertLayer", "conv": "ConvLayer", "linear": "LinearTrunk"}[shape.trunk]]
        self.tokens = shape.tokens
        self.heads = nn.ModuleList(nn.Linear(shape.width, shape.head_outputs) for _ in range(shape.tasks))

    def represent(self, inputs: Tensor) -> Tensor:
        """The shared representation."""
        z = self.trunk(inputs)
        return z if self.tokens else z.mean(1)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Predictions for all tasks."""
        z = self.represent(inputs)
        return [head(z) for head in self.heads]


class Data:
    """One batch of noise; the content does not affect the times."""

    def __init__(self, shape: Shape, device: torch.device):
        if shape.trunk == "bert":
            self.inputs = torch.randint(1024, (shape.batch_size, shape.length), device=device)
            places = shape.length
        elif shape.trunk == "linear":
            self.inputs, places = torch.randn(shape.batch_size, 1, shape.width, device=device), 1
        else:
            self.inputs = torch.randn(shape.batch_size, 3, shape.length, shape.length, device=device)
            places = (shape.length // 4) ** 2
        rows = shape.batch_size * (places if shape.tokens else 1)
        self.labels = torch.randint(shape.head_outputs, (shape.tasks, rows), device=device)

    def losses(self, outputs: list[Tensor]) -> list[Tensor]:
        """One cross entropy per task."""
        return [F.cross_entropy(out.flatten(0, -2), label) for out, label in zip(outputs, self.labels, strict=True)]


# ---- the loops that are compared: each returns a function that takes one optimizer step and returns its losses -------


def loop(
    accelerator: Accelerator,
    net: nn.Module,
    optimizer: Any,
    data: Data,
    backward: Callable[[list[Tensor]], Any],
    forward: Callable[[Tensor], list[Tensor]] | None = None,
) -> Step:
    """The training loop that all have in common."""
    forward = forward or net

    def step() -> list[float]:
        for _ in range(accelerator.gradient_accumulation_steps):
            with accelerator.accumulate(net):
                losses = data.losses(forward(data.inputs))
                backward(losses)
                optimizer.step()
                optimizer.zero_grad()
        return [loss.detach() for loss in losses]

    return step


def prepared(accelerator: Accelerator, shape: Shape, lr: float) -> tuple[nn.Module, Any, Data]:
    set_seed(0)
    with accelerator.device:  # a billion random numbers take long on a CPU
        net = Net(shape)
    net, optimizer = accelerator.prepare(net, OPTIMIZERS[shape.optimizer](net.parameters(), lr=lr))
    return net, optimizer, Data(shape, accelerator.device)


def plain(accelerator: Accelerator, shape: Shape, lr: float) -> tuple[Step, Any]:
    """The weighted sum, by hand."""
    net, optimizer, data = prepared(accelerator, shape, lr)
    weights = [1.0] * shape.tasks
    return loop(
        accelerator,
        net,
        optimizer,
        data,
        lambda losses: accelerator.backward(sum(w * loss for w, loss in zip(weights, losses, strict=True))),
    ), None


def weighted(method: Callable[[], Any], **options: Any) -> Callable[..., tuple[Step, Any]]:
    """This library."""

    def make(accelerator: Accelerator, shape: Shape, lr: float) -> tuple[Step, Any]:
        net, optimizer, data = prepared(accelerator, shape, lr)
        tasks = [f"task {k}" for k in range(shape.tasks)]
        heads = {task: f"heads.{k}" for k, task in enumerate(tasks)}
        weighter = Weighter(method(), tasks, accelerator=accelerator, heads=heads, model=net, **options)
        own = weighter.method.acts_on == "losses"  # there no weight may be negative
        return loop(accelerator, net, optimizer, data, weighter.backward), lambda: list(weighter.weights.values()) * own

    return make


def gradnorm_pytorch(at: str) -> Callable[..., tuple[Step, Any]]:
    """lucidrains/gradnorm-pytorch, at the weight of the last shared layer or at the shared representation."""

    def make(accelerator: Accelerator, shape: Shape, lr: float) -> tuple[Step, Any]:
        from gradnorm_pytorch import GradNormLossWeighter

        net, optimizer, data = prepared(accelerator, shape, lr)
        last = [p for name, p in net.trunk.named_parameters() if p.ndim > 1][-1]
        weighter = GradNormLossWeighter(
            num_losses=shape.tasks,
            learning_rate=0.025,
            restoring_force_alpha=1.5,
            grad_norm_parameters=last if at == "parameter" else None,
            accelerator=accelerator,
        )
        z: list[Tensor] = []

        def forward(inputs: Tensor) -> list[Tensor]:
            z[:] = [net.represent(inputs)]
            return [head(z[0]) for head in net.heads]

        def backward(losses: list[Tensor]) -> None:
            weighter.backward(losses, activations=None if at == "parameter" else z[0])

        return loop(accelerator, net, optimizer, data, backward, forward), lambda: weighter.loss_weights.tolist()

    return make


def rotograd_package(accelerator: Accelerator, shape: Shape, lr: float) -> tuple[Step, Any]:
    """adrianjav/rotograd, with the settings of its README."""
    import rotograd

    set_seed(0)
    with accelerator.device:
        net = Net(shape)
    data = Data(shape, accelerator.device)
    net.trunk.forward, represent = net.represent, net.trunk.forward  # the package wants one module that gives z
    net.represent = None  # type: ignore[assignment]
    trunk = _Calls(lambda inputs: represent(inputs) if shape.tokens else represent(inputs).mean(1), net.trunk)
    model = rotograd.RotoGrad(trunk, list(net.heads), shape.width).to(accelerator.device)
    groups = [{"params": list(model.model_parameters())}, {"params": list(model.parameters()), "lr": lr / 2}]
    optimizer = OPTIMIZERS[shape.optimizer](groups, lr=lr)

    def step() -> list[float]:
        for _ in range(accelerator.gradient_accumulation_steps):
            with rotograd.cached():
                losses = data.losses(model(data.inputs))
                model.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
        return [loss.detach() for loss in losses]

    return step, None


class _Calls(nn.Module):
    """A module that has the parameters of another one and calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor], module: nn.Module):
        super().__init__()
        self.function, self.module = function, module

    def forward(self, inputs: Tensor) -> Tensor:
        """The result of the function."""
        return self.function(inputs)


def upgrad() -> accel_weighting.Method:
    """TorchJD's UPGrad as a method of this library."""
    from torchjd.aggregation import UPGradWeighting

    return accel_weighting.TorchJDWeighting(UPGradWeighting())


def torchjd_backward(accelerator: Accelerator, shape: Shape, lr: float) -> tuple[Step, Any]:
    """TorchJD's mtl_backward with UPGrad: a Jacobian of all shared parameters."""
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    net, optimizer, data = prepared(accelerator, shape, lr)
    aggregator, z = UPGrad(), []
    shared = list(net.trunk.parameters())
    own = [list(head.parameters()) for head in net.heads]

    def forward(inputs: Tensor) -> list[Tensor]:
        z[:] = [net.represent(inputs)]
        return [head(z[0]) for head in net.heads]

    def backward(losses: list[Tensor]) -> None:
        mtl_backward(losses, features=z[0], tasks_params=own, shared_params=shared)
        jac_to_grad(shared, aggregator)

    return loop(accelerator, net, optimizer, data, backward, forward), None


def k_backwards(accelerator: Accelerator, shape: Shape, lr: float) -> tuple[Step, Any]:
    """As LibMTL does: one backward per task through the whole trunk, all gradients kept, then IMTL-G's weights."""
    net, optimizer, data = prepared(accelerator, shape, lr)
    shared = list(net.trunk.parameters())
    tasks = [f"task {k}" for k in range(shape.tasks)]
    method = IMTLG()
    state = method.init(tasks)[1]

    def backward(losses: list[Tensor]) -> None:
        nonlocal state
        rows = []
        for loss in losses:
            for p in shared:
                p.grad = None
            loss.backward(retain_graph=True)
            rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in shared]))
        J = torch.stack(rows)
        gram = (J @ J.T).double().cpu().numpy()
        present = np.ones(shape.tasks, dtype=bool)
        seen = torch.stack(losses).detach().double().cpu().numpy()
        w, state = method.update(state, accel_weighting.Statistics(seen, present, np.sqrt(gram.diagonal()), gram))
        total = torch.from_numpy(w).to(J) @ J
        for p, g in zip(shared, total.split([p.numel() for p in shared]), strict=True):
            p.grad = g.view_as(p)

    return loop(accelerator, net, optimizer, data, backward), None


METHODS = {
    "GradNorm": weighted(GradNorm),
    "CoV": weighted(lambda: CoVWeighting(total="tasks")),
    "IMTL-G": weighted(IMTLG),
}
ROTATIONS = {
    "RotoGrad": weighted(RotoGrad),
    "RotoGrad, every 2nd step": weighted(RotoGrad, update_every=2),
    "RotoGrad, rotate=False": weighted(lambda: RotoGrad(rotate=False)),
}
LARGE = {
    "GradNorm": METHODS["GradNorm"],
    "GradNorm, cosines=True": weighted(GradNorm, cosines=True),
    "CoV": METHODS["CoV"],
    "IMTL-G": METHODS["IMTL-G"],
}
LAGS = {
    "IMTL-G": METHODS["IMTL-G"],
    "IMTL-G, lag=0": weighted(IMTLG, lag=0),
    "UPGrad": weighted(upgrad),
    "UPGrad, lag=0": weighted(upgrad, lag=0),
}
GROUPS = ("weights", "overhead", "large", "rotations", "lag", "peers")
PEERS = {
    "gradnorm-pytorch, parameter": gradnorm_pytorch("parameter"),
    "gradnorm-pytorch, activations": gradnorm_pytorch("activations"),
    "K backwards (LibMTL's way)": k_backwards,
    "TorchJD mtl_backward": torchjd_backward,
    "rotograd": rotograd_package,
}


# ---- measuring -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """The measurements of one loop."""

    group: str
    name: str
    tasks: int
    milliseconds: float
    ratio: list[float]  # lower quartile, median, upper quartile
    cpu_ratio: list[float] | None
    cpu_added: list[float] | None  # milliseconds of processor time
    rounds: int
    memory: float | None
    memory_z: float | None  # added, in units of |z|
    collectives: float
    kilobytes: float
    note: str


class Sent:
    """Counts all-reduces through torch.distributed's Python interface, which an engine's own do not use."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts inside the `with` block."""
        original = dist.all_reduce

        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.bytes += tensor.numel() * tensor.element_size()
            return original(tensor, *args, **kwargs)

        dist.all_reduce = all_reduce
        try:
            yield
        finally:
            dist.all_reduce = original


def peak_memory(make: Callable[[], tuple[Step, Any]], device: torch.device) -> float:
    """The largest number of bytes of tensors alive at one moment, over construction and three steps."""
    gc.collect()  # else garbage of the previous loop would be freed, and subtracted, during this one
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step, _ = make()
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step, _ = make()
        for _ in range(3):
            step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values


def measure(
    accelerator: Accelerator, group: str, shape: Shape, loops: dict[str, Any], args: argparse.Namespace
) -> list[Row]:
    """All loops of one group, interleaved step by step."""
    device, on_cpu = accelerator.device, accelerator.device.type == "cpu"
    loops = {"plain": plain, "plain again": plain, **loops}
    steps: dict[str, Step] = {}
    weights: dict[str, Any] = {}
    memory: dict[str, float] = {}
    notes = dict.fromkeys(loops, "")
    sent = {name: Sent() for name in loops}
    scratch = torch.zeros(1 << 24) if "cold" in group else None  # 64 MB: replaces all contents of the caches
    spent = dict.fromkeys(loops, 0.0)
    neighbours: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in loops}
    wall: dict[str, list[float]] = {name: [] for name in loops}
    cpu: dict[str, list[float]] = {name: [] for name in loops}

    def timed(name: str) -> tuple[float, float]:
        if scratch is not None:
            scratch.add_(1)
        accelerator.wait_for_everyone()
        synchronize(device)
        start, cpu_start = time.perf_counter(), time.process_time()
        last = steps[name]()
        synchronize(device)
        taken = time.perf_counter() - start, time.process_time() - cpu_start
        spent[name] += taken[0]
        if not all(torch.isfinite(loss) for loss in last):
            notes[name] = "diverged: a loss is not finite"
        return taken

    def has_time(name: str, share: float = 1.0) -> bool:
        """Whether a loop has used less than a share of its time; the same answer on all processes."""
        longest = accelerator.reduce(torch.tensor(spent[name], device=device), "mean")
        return float(longest) < share * args.seconds

    bar = tqdm(total=len(loops) + args.rounds, desc=f"{group} K={shape.tasks}", mininterval=1, leave=False)
    for name, make in loops.items():
        try:
            steps[name], weights[name] = make(accelerator, shape, args.lr)
            timed(name)
            quick = has_time(name, 0.1)
            for _ in range(
                2 if quick else 0
            ):  # two steps are counted, because some methods act at every second step only
                sent[name] = Sent()
                with sent[name].counting():
                    timed(name)
                    timed(name)
            if args.memory and quick and shape.trunk != "linear":
                memory[name] = peak_memory(lambda make=make: make(accelerator, shape, args.lr), device)
        except Exception as error:
            steps.pop(name, None)
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:70]}"
            if name.startswith("plain"):
                raise
        bar.update()

    shuffle = random.Random(0)  # the same on all processes
    for _ in range(args.rounds):
        order = [name for name in steps if name != "plain" and (not wall[name] or has_time(name))]
        if not order:
            break
        shuffle.shuffle(order)
        before = timed("plain")
        for name in order:
            own, after = timed(name), timed("plain")
            for times, i in ((wall, 0), (cpu, 1)):
                times[name].append(own[i])
                times["plain"].append(after[i])
                neighbours[name][i].append((before[i] + after[i]) / 2)
            before = after
        bar.update()
    bar.close()

    rows = []
    for name in loops:
        taken, own = neighbours[name], (wall[name], cpu[name])
        if name == "plain":
            taken = own
        if name not in steps or not wall[name]:
            nothing = Row(group, name, shape.tasks, float("nan"), [], None, None, 0, None, None, 0, 0, notes[name])
            rows.append(nothing._replace(memory=memory_ratio(memory, name), memory_z=memory_in_z(memory, name, shape)))
            continue
        ended = weights[name]() if weights.get(name) else []
        if any(not w > 0 for w in ended):
            notes[name] = "; ".join(filter(None, [notes[name], f"a weight is {min(ended):.2f}"]))
        if len(wall[name]) < args.rounds:
            notes[name] = "; ".join(filter(None, [notes[name], f"{len(wall[name])} step(s) in {args.seconds:g} s"]))
        ratios = [quartiles([a / b for a, b in zip(x, y, strict=True)]) for x, y in zip(own, taken, strict=True)]
        added = quartiles([1e3 * (a - b) for a, b in zip(own[1], taken[1], strict=True)])
        rows.append(
            Row(
                group,
                name,
                shape.tasks,
                1e3 * statistics.median(wall[name]),
                ratios[0],
                ratios[1] if on_cpu else None,
                added if on_cpu else None,
                len(wall[name]),
                memory_ratio(memory, name),
                memory_in_z(memory, name, shape),
                sent[name].calls / 2,
                sent[name].bytes / 2 / 1e3,
                notes[name],
            )
        )
    accelerator.free_memory()
    return rows


def memory_ratio(memory: dict[str, float], name: str) -> float | None:
    return memory[name] / memory["plain"] if name in memory else None


def memory_in_z(memory: dict[str, float], name: str, shape: Shape) -> float | None:
    """What is alive beyond the plain loop, in units of the shared representation in float32."""
    places = shape.length if shape.trunk == "bert" else (shape.length // 4) ** 2
    z = 4 * shape.batch_size * shape.width * (places if shape.tokens else 1)
    return (memory[name] - memory["plain"]) / z if name in memory else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- output ----------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """All rows as a Markdown table."""
    head = ["", "K", "step, ms", "clock, × plain", "processor, × plain", "processor, + ms"]
    lines = [[*head, "memory, × plain", r"memory, + \|z\|", "all-reduces", "kB", ""], ["---"] * 11]
    for group, members in itertools.groupby(rows, lambda row: (row.group, row.tasks)):
        lines.append([f"**{group[0]}**", str(group[1]), *[""] * 9])
        for row in members:
            spread = [
                "–" if not q else f"{q[1]:.{digits}f} [{q[0]:.{digits}f}, {q[2]:.{digits}f}]"
                for q, digits in ((row.ratio, 3), (row.cpu_ratio, 3), (row.cpu_added, 2))
            ]
            memory = "–" if row.memory is None else f"{row.memory:.3f}"
            in_z = "–" if row.memory_z is None else f"{row.memory_z:.2f}"
            sent = [f"{row.collectives:g}", f"{row.kilobytes:.1f}"]
            time_ = f"{row.milliseconds:.1f}" if row.ratio else "–"
            lines.append([row.name, str(row.tasks), time_, *spread, memory, in_z, *sent, row.note])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width, "-" if cell == "---" else " ") for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def draw(rows: list[Row], path: Path) -> None:
    """Ratios with their quartiles: over the number of tasks for the weights, one bar each for the others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    over_tasks = [row for row in rows if row.group == "weights" and row.ratio and row.name != "plain"]
    overhead = [row for row in rows if "overhead" in row.group and row.cpu_added and row.name != "plain"]
    single = [row for row in rows if row not in [*over_tasks, *overhead] and row.ratio and row.name != "plain"]
    curves = [
        (over_tasks, lambda row: row.ratio, 1, "step time / plain weighted sum"),
        *(
            ([row for row in overhead if row.group == group], lambda row: row.cpu_added, 0, f"{group}: processor, + ms")
            for group in dict.fromkeys(row.group for row in overhead)
        ),
    ]
    curves = [curve for curve in curves if curve[0]]
    panels = len(curves) + bool(single)
    size = 6 * panels, 0.5 + max(4, 0.32 * len(single))
    figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    for ax, (members, value, base, label) in zip(axes[0], curves, strict=False):
        for i, name in enumerate(dict.fromkeys(row.name for row in members)):
            own = [row for row in members if row.name == name]
            low, middle, high = zip(*map(value, own), strict=True)
            reach = [
                [m - x for m, x in zip(middle, low, strict=True)],
                [x - m for m, x in zip(middle, high, strict=True)],
            ]
            style = {"color": "0.6", "linestyle": "--"} if name == "plain again" else {}
            ax.errorbar([row.tasks * 1.03**i for row in own], middle, reach, label=name, marker="o", capsize=2, **style)
        counts = sorted({row.tasks for row in members})
        ax.set(xscale="log", xlabel="tasks", ylabel=label)
        ax.set_xticks(counts, counts)
        ax.minorticks_off()
        ax.axhline(base, color="0.8", zorder=0)
        ax.legend(frameon=False)
    if single:
        ax, labels = axes[0][-1], [f"{row.group}: {row.name}" for row in single]
        ax.barh(labels, [row.ratio[1] for row in single], color=["0.7" if "plain" in n else "C0" for n in labels])
        ax.axvline(1, color="0.3", linewidth=0.8)
        ax.invert_yaxis()
        ax.set(xlabel="step time / plain weighted sum")
        if any(row.ratio[1] > 4 for row in single):
            ax.set_xscale("log")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that the benchmark ran with."""
    modules = (torch, accelerate, transformers, accel_weighting)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}},
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trunk", choices=["bert", "conv"], default="bert", help="kind of trunk (default: bert)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the trunk (default: 4)")
    parser.add_argument("--width", type=int, default=256, help="width of the trunk in the group weights (default: 256)")
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="apply heads to every token instead of their mean, in all groups",
    )
    parser.add_argument(
        "--length",
        type=int,
        default=64,
        help="number of tokens, or width of an image in pixels (default: 64)",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="samples per micro-batch and process (default: 8)")
    parser.add_argument(
        "--head_outputs",
        type=int,
        default=8,
        help="outputs of every head; 8,192 are large heads (default: 8)",
    )
    parser.add_argument(
        "--tasks",
        default="2,4,8,16,32",
        help="numbers of tasks in the groups weights and overhead (default: 2,4,8,16,32)",
    )
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per optimizer step (default: 1)")
    parser.add_argument(
        "--groups",
        default="weights,rotations",
        help="any of weights (GradNorm, CoV, IMTL-G), overhead (the same on a model that does next to nothing), "
        "large (heads on every token and on every place of a map, 8 and 16 tasks), "
        "rotations (RotoGrad at 3 tasks, pooled and tokens), lag (Gram methods with lag=1 and lag=0; in one process "
        "also TorchJD's backward) and peers (default: weights,rotations)",
    )
    parser.add_argument(
        "--rotation_width",
        type=int,
        default=512,
        help="width of the trunk and of the rotations (default: 512)",
    )
    parser.add_argument(
        "--rotation_length",
        type=int,
        default=128,
        help="tokens of a row in the group with tokens (default: 128)",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="include other libraries in the group peers (extra `benchmark`)",
    )
    parser.add_argument("--rounds", type=int, default=40, help="measured steps of every method (default: 40)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="time of a loop, after which it takes part in no further round (default: 60)",
    )
    parser.add_argument(
        "--optimizer",
        choices=list(OPTIMIZERS),
        default="adamw",
        help="sgd keeps no state: ten loops of a billion parameters fit on one GPU with it (default: adamw)",
    )
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate (default: 0.0001)")
    parser.add_argument(
        "--mixed_precision",
        choices=["no", "bf16", "fp16"],
        default="no",
        help="precision (default: no)",
    )
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory (default: yes)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures (default: benchmark.json in --output_dir)")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/benchmark"),
        help="folder for results (default: %(default)s)",
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU even if the machine has accelerators")
    args = parser.parse_args()
    args.groups = args.groups.split(",")
    if unknown := sorted(set(args.groups) - set(GROUPS)):
        parser.error(f"--groups: {', '.join(unknown)} not among {', '.join(GROUPS)}")
    args.tasks = [int(k) for k in args.tasks.split(",")]
    if args.peers and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--peers runs in one process; examples/peers_correctness.py shows what they do in two")
    return args


def main() -> None:
    args = parse_args()
    options = {"gradient_accumulation_steps": args.accumulation, "mixed_precision": args.mixed_precision}
    accelerator = accelerator_on_cpu(**options) if args.cpu else Accelerator(**options)
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise SystemExit("The launched processes do not see each other. Without accelerators, add --cpu.")
    shape = Shape(
        args.trunk,
        0,
        args.width,
        args.layers,
        args.length,
        args.batch_size,
        args.head_outputs,
        args.tokens,
        args.optimizer,
    )
    wide = shape._replace(tasks=3, width=args.rotation_width)
    groups = []
    if "weights" in args.groups:
        groups += [("weights", shape._replace(tasks=K), METHODS) for K in args.tasks]
    if "overhead" in args.groups:
        small = shape._replace(trunk="linear", width=16)
        groups += [
            (name, small._replace(tasks=K), METHODS)
            for name in ("overhead", "overhead, cold caches")
            for K in args.tasks
        ]
    if "large" in args.groups:
        tokens = shape._replace(trunk="bert", tokens=True)
        dense = shape._replace(trunk="conv", tokens=True)
        for K in (8, 16):
            groups += [(name, s._replace(tasks=K), LARGE) for name, s in (("tokens", tokens), ("maps", dense))]
    if "rotations" in args.groups:
        long = wide._replace(tokens=True, length=args.rotation_length if args.trunk == "bert" else args.length)
        groups += [("rotations, pooled", wide, ROTATIONS), ("rotations, tokens", long, ROTATIONS)]
    if "lag" in args.groups:
        peer = {"TorchJD mtl_backward": torchjd_backward} if accelerator.num_processes == 1 else {}
        groups.append(("lag", shape._replace(tasks=3), {**LAGS, **peer}))
    if "peers" in args.groups:
        loops = {"GradNorm": METHODS["GradNorm"], "IMTL-G": METHODS["IMTL-G"], "RotoGrad": ROTATIONS["RotoGrad"]}
        groups.append(("peers", shape._replace(tasks=3), {**loops, **(PEERS if args.peers else {})}))

    rows: list[Row] = []
    for name, group_shape, loops in groups:
        rows += measure(accelerator, name, group_shape, loops, args)
    where = machine(accelerator.device) | {
        "processes": accelerator.num_processes,
        "engine": describe_engine(accelerator),
    }
    accelerator.print(table(rows))
    accelerator.print(
        f"{where['engine']}, {where['processes']} process(es), {where['threads']} thread(s) each, "
        f"device {where['device']}; {args.rounds} rounds"
    )
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        path = args.json or args.output_dir / "benchmark.json"
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        path.write_text(json.dumps({"settings": settings, "machine": where, "rows": [row._asdict() for row in rows]}))
        draw(rows, args.output_dir / "benchmark.png")
        print(f"Results are in {args.output_dir}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
