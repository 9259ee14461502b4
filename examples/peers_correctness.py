"""Compares loss weighting on two processes with one process, for other libraries and this one.

Every row trains the same small network from the same seed, once in one process on the whole batch, and once in two
processes (gloo, DDP) with half of the batch each. The results should not differ. Other libraries are used as their
documentation says.

    python examples/peers_correctness.py

It starts its processes itself, and takes a minute. gradnorm-pytorch and rotograd are in the extra `benchmark`; if one
is missing, its rows say so. CoV-weighting's authors have no package, so their formula is applied in every process to
the losses of that process, as their training script would do.
"""

import argparse
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist  # noqa: TID251  this script is its own launcher
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from accel_weighting import CoVWeighting, GradNorm, RotoGrad, Statistics, Weighter

WHAT = ("weights", "rotations", "parameters")
TASKS, BATCH, INPUTS, WIDTH = ["a", "b", "c"], 32, 16, 24


class Net(nn.Module):
    """A trunk that ends in a linear layer, and three regression heads with targets of different scales."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(INPUTS, 32), nn.Tanh(), nn.Linear(32, WIDTH))
        self.heads = nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, 4)) for _ in TASKS)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Predictions for all tasks."""
        z = self.trunk(x)
        return [head(z) for head in self.heads]


def batches(steps: int, rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """This process's part of every batch; the target of the third task is mostly noise."""
    g = torch.Generator().manual_seed(1)
    teacher = torch.randn(len(TASKS), INPUTS, 4, generator=g, dtype=torch.float64) / INPUTS**0.5
    scale = torch.tensor([1.0, 5.0, 1.0], dtype=torch.float64)[:, None, None]
    noise = torch.tensor([0.1, 0.1, 3.0], dtype=torch.float64)[:, None, None]
    found = []
    for _ in range(steps):
        x = torch.randn(BATCH, INPUTS, generator=g, dtype=torch.float64)
        eps = noise * torch.randn(len(TASKS), BATCH, 4, generator=g, dtype=torch.float64)
        y = scale * torch.tanh(x @ teacher) + eps
        part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        found.append((x[part], y[:, part]))
    return found


def losses_of(outputs: list[Tensor], y: Tensor) -> list[Tensor]:
    return [F.mse_loss(out, target) for out, target in zip(outputs, y, strict=True)]


# ---- rows: each returns a Loop --------------------------------------------------------------------------------------


class Loop(NamedTuple):
    """One way to train: forward and backward of a batch, current weights and rotations, and additional parameters."""

    backward: Callable[[Tensor, Tensor], None]
    weights: Callable[[], list[float]] = list
    rotations: Callable[[], list[Tensor]] = list
    parameters: tuple[nn.Parameter, ...] = ()


Row = Callable[[Net, bool], Loop]


def wrap(module: nn.Module, several: bool) -> nn.Module:
    return DistributedDataParallel(module) if several else module


def ours(method: Any, at_weight: bool = False, **options: Any) -> Row:
    """This library, through Accelerate."""

    def make(net: Net, several: bool) -> Loop:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare(net)
        heads = dict(zip(TASKS, net.heads, strict=True))
        layer = net.trunk[-1] if at_weight else None
        weighter = Weighter(method, TASKS, accelerator=accelerator, heads=heads, shared_layer=layer, **options)

        def backward(x: Tensor, y: Tensor) -> None:
            weighter.backward(losses_of(model(x), y))

        rotates = isinstance(method, RotoGrad)
        rotations = (lambda: list(weighter.rotations.values())) if rotates else list
        return Loop(backward, lambda: list(weighter.weights.values()), rotations)

    return make


def gradnorm_pytorch(net: Net, several: bool) -> Loop:
    """gradnorm-pytorch, used as in its README: at the weight of the last shared layer, with an Accelerator."""
    from accelerate import Accelerator
    from gradnorm_pytorch import GradNormLossWeighter

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(net)
    weighter = GradNormLossWeighter(
        num_losses=len(TASKS),
        learning_rate=0.025,
        restoring_force_alpha=0.5,
        grad_norm_parameters=net.trunk[-1].weight,
        accelerator=accelerator,
    ).double()

    def backward(x: Tensor, y: Tensor) -> None:
        weighter.backward(losses_of(model(x), y))

    return Loop(backward, weighter.loss_weights.tolist)


def rotograd_package(parts: bool) -> Row:
    """rotograd, used as in its README; DDP wraps the whole model, or the trunk and each head separately."""

    def make(net: Net, several: bool) -> Loop:
        import rotograd

        torch.manual_seed(2)  # its random rotations then start alike on both processes, which is in its favour
        trunk, heads = net.trunk, list(net.heads)
        if parts:
            trunk, heads = wrap(trunk, several), [wrap(head, several) for head in heads]
        model = rotograd.RotoGrad(trunk, heads, WIDTH).double()
        wrapped = model if parts else wrap(model, several)

        def backward(x: Tensor, y: Tensor) -> None:
            with rotograd.cached():
                model.backward(losses_of(wrapped(x), y))

        def rotations() -> list[Tensor]:
            return [R.detach().clone() for R in model.rotation]

        return Loop(backward, rotations=rotations, parameters=tuple(model.parameters()))

    return make


def cov_per_process(net: Net, several: bool) -> Loop:
    """CoV-weighting by the authors' formula, on the losses of this process."""
    model, method = wrap(net, several), CoVWeighting(total="tasks")
    w, state = method.init(TASKS)

    def backward(x: Tensor, y: Tensor) -> None:
        nonlocal w, state
        losses = torch.stack(losses_of(model(x), y))
        (losses * torch.from_numpy(w)).sum().backward()
        w, state = method.update(state, Statistics(losses.detach().numpy(), np.ones(len(TASKS), dtype=bool)))

    return Loop(backward, lambda: w.tolist())


ROWS: dict[str, Row] = {
    "gradnorm-pytorch": gradnorm_pytorch,
    "accel_weighting GradNorm": ours(GradNorm(alpha=0.5), at_weight=True),
    "CoV, authors' formula per process": cov_per_process,
    "accel_weighting CoV": ours(CoVWeighting(total="tasks")),
    "rotograd, wrapped whole": rotograd_package(parts=False),
    "rotograd, parts wrapped": rotograd_package(parts=True),
    "accel_weighting RotoGrad": ours(RotoGrad(), lag=0),
}


# ---- running ---------------------------------------------------------------------------------------------------------


def train(row: Row, steps: int, rank: int, world: int) -> dict[str, Tensor]:
    """Trains; returns the first gradient and the last weights, rotations and parameters of this process."""
    torch.manual_seed(0)
    net = Net().double()
    parameters = list(net.parameters())
    loop = row(net, world > 1)
    groups = [{"params": parameters}, *([{"params": list(loop.parameters), "lr": 0.01}] if loop.parameters else [])]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    first = None
    for x, y in batches(steps, rank, world):
        optimizer.zero_grad()
        loop.backward(x, y)
        gradient = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        )
        first = gradient.clone() if first is None else first
        optimizer.step()
    return {
        "first": first,
        "weights": torch.tensor(loop.weights(), dtype=torch.float64),
        "rotations": torch.cat([torch.zeros(0), *(R.flatten() for R in loop.rotations())]),
        "parameters": torch.cat([p.detach().flatten() for p in parameters]),
    }


def by_hand() -> Tensor:
    """The first gradient by hand in one process: that of the plain sum, with which methods that weight losses begin."""
    torch.manual_seed(0)
    net = Net().double()
    x, y = batches(1, 0, 1)[0]
    torch.stack(losses_of(net(x), y)).sum().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def worker(rank: int, world: int, folder: str, steps: int) -> None:
    """Runs all rows, one after the other, in one of the processes."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for name, row in ROWS.items():
        try:  # a failing row is a result too
            results[name] = train(row, steps, rank, world)
        except ModuleNotFoundError as error:  # noqa: PERF203
            results[name] = f"not installed: {error.name}"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    torch.save(results, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else float("nan")


def compare(one: Any, first: Any, second: Any) -> dict[str, Any]:
    """Computes the figures of one row."""
    for found in (one, first, second):
        if isinstance(found, str):
            return {"note": found}
    scale = one["first"].norm()
    return {
        **{f"{what}, 0 ↔ 1": largest(first[what], second[what]) for what in WHAT},
        **{f"{what}, 2 ↔ 1 process": largest(first[what], one[what]) for what in WHAT},
        "first gradient, 2 ↔ 1 process": float(
            max((r["first"] - one["first"]).norm() for r in (first, second)) / scale
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: 50)")
    parser.add_argument("--json", type=Path, help="file to which the figures are also written")
    args = parser.parse_args()
    missing = [name for name in ("gradnorm_pytorch", "rotograd") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"Not installed: {', '.join(missing)} (extra `benchmark`)")
    with tempfile.TemporaryDirectory() as folder:
        for world in tqdm((1, 2), desc="launches", leave=False):
            torch.multiprocessing.spawn(worker, (world, folder, args.steps), nprocs=world)
        one, first, second = (torch.load(f"{folder}/{name}.pt") for name in ("1-0", "2-0", "2-1"))
    rows = {name: compare(one[name], first[name], second[name]) for name in ROWS}
    right = by_hand()
    if not isinstance(one["gradnorm-pytorch"], str):
        for name in ("gradnorm-pytorch", "accel_weighting GradNorm"):
            rows[name]["first gradient, 1 process ↔ by hand"] = float(
                (one[name]["first"] - right).norm() / right.norm()
            )

    columns = list(dict.fromkeys(column for row in rows.values() for column in row if column != "note"))
    cells = [["", *columns]]
    for name, row in rows.items():
        values = [row.get(column, float("nan")) for column in columns]
        cells.append([name, *("–" if v != v else f"{v:.1e}" if v else "0" for v in values)])
        if "note" in row:
            cells[-1][1] = row["note"]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    print("\n".join(lines))
    print(
        f"Largest differences after {args.steps} steps in float64: between the processes 0 and 1, and between two "
        "processes and one on the whole batch. The error of the first gradient is relative to its length."
    )
    if args.json:
        args.json.write_text(json.dumps({"steps": args.steps, "rows": rows}))


if __name__ == "__main__":
    main()
