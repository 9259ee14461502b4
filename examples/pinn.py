r"""A physics-informed network whose losses share no tensor: gradients are compared at a parameter.

The network u(x, y) is to solve the Helmholtz equation Δu + u = q on the square [-1, 1]² with u = 0 on its boundary. The
source q is chosen such that the solution is known, u = sin(πx) sin(2πy), as in https://arxiv.org/abs/2001.04536. There
are two losses, each on points of its own:

- "residual": the square of Δu + u - q inside, which contains second derivatives of the network;
- "boundary": the square of u on the four sides.

Every loss has a forward of its own, and they share nothing but the parameters. `weighter.task(name)` around a forward
tells the weighter which loss it is for, and the gradients are measured at the weight named in `shared_parameters`, in
the one backward of the step.

    accelerate launch --config_file launch_configs/cpu_2.yaml examples/pinn.py --cpu

The points of a step are the same however many processes they are divided among. Trains once by every method with every
seed, which takes two to three minutes on one CPU core. Prints the error against the solution, and writes `pinn.json`
and `pinn.png` to `--output_dir`. `--price` measures the time of a step instead.
"""

import argparse
import itertools
import math
import time
from contextlib import nullcontext
from statistics import fmean, geometric_mean, median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from common import (
    Run,
    add_comparison_arguments,
    add_output_arguments,
    by_method,
    check_processes,
    mean_and_range,
    micro_batch_size,
    plot_range,
    table,
    thinned,
    write_comparison,
)
from torch import Tensor, nn

from accel_weighting import EqualWeighting, GradNorm, ReferenceNorm, ReLoBRaLo, StaticWeighting, Weighter
from accel_weighting.plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# To try another method, add a row. "1:100" is a fixed weight of 1 for the residual and of 100 for the boundary.
METHODS = {
    "equal": EqualWeighting(),
    **{f"1:{b:g}": StaticWeighting({"residual": 1.0, "boundary": b}) for b in (10.0, 100.0, 1000.0)},
    "gradnorm": GradNorm(alpha=0.0, start="balanced"),
    "reference": ReferenceNorm("residual", decay=0.9),
    "relobralo": ReLoBRaLo(),
}
TASKS = ["residual", "boundary"]


class Net(nn.Module):
    """Three hidden layers with tanh. The last of them is where gradients are compared."""

    def __init__(self, width: int = 32):
        super().__init__()
        sizes = [2, width, width]
        self.first = nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())))
        self.shared = nn.Linear(width, width)
        self.last = nn.Sequential(nn.Tanh(), nn.Linear(width, 1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, points: Tensor) -> Tensor:
        """shape: [batch, 2] → [batch]."""
        return self.last(self.shared(self.first(points))).squeeze(-1)


def solution(points: Tensor, waves: int) -> Tensor:
    """shape: [batch, 2] → [batch]."""
    return torch.sin(math.pi * points[:, 0]) * torch.sin(waves * math.pi * points[:, 1])


def residual(model: nn.Module, points: Tensor, waves: int) -> Tensor:
    """Δu + u - q at every point, `[batch]`."""
    points.requires_grad_()
    u = model(points)
    slopes = torch.autograd.grad(u.sum(), points, create_graph=True)[0].unbind(1)
    curvatures = [torch.autograd.grad(s.sum(), points, create_graph=True)[0][:, i] for i, s in enumerate(slopes)]
    source = (1 - math.pi**2 * (1 + waves**2)) * solution(points.detach(), waves)
    return sum(curvatures) + u - source


def draw_points(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A number of points inside, and as many on the four sides in turn; in float64, each of shape [number, 2]."""
    inside, boundary = 2 * torch.rand(2, number, 2, generator=generator, dtype=torch.float64) - 1
    index = torch.arange(number)
    boundary[index, index % 2] = (1 - 2 * (index // 2 % 2)).to(boundary)
    return inside, boundary


def losses_of(model: nn.Module, inside: Tensor, boundary: Tensor, waves: int, task: Any) -> dict[str, Tensor]:
    """Both losses; `task(name)` is entered around the forward of each."""
    with task("residual"):
        equation = residual(model, inside, waves)
    with task("boundary"):
        edge = model(boundary)
    return {"residual": equation.square().mean(), "boundary": edge.square().mean()}


@torch.no_grad()
def error_of(model: nn.Module, waves: int) -> float:
    """Relative error of the solution on a grid of 64 × 64 points, in the Euclidean norm."""
    parameter = next(model.parameters())
    axis = torch.linspace(-1, 1, 64, dtype=parameter.dtype, device=parameter.device)
    points = torch.cartesian_prod(axis, axis)
    exact = solution(points, waves)
    return ((model(points) - exact).norm() / exact.norm()).item()


def make_weighter(name: str, net: Net, accelerator: Accelerator, update_every: int) -> Weighter:
    """A weighter that measures gradients at the last hidden layer's weight, where its method compares them."""
    method = METHODS[name]
    shared = [net.shared.weight] if "norms" in method.needs else None
    return Weighter(
        method,
        TASKS,
        accelerator=accelerator,
        model=net,
        shared_parameters=shared,
        update_every=update_every if shared else 1,
    )


class Training:
    """A network that learns by one method, or by the plain sum of its losses where that is None."""

    def __init__(self, name: str | None, seed: int, accelerator: Accelerator, args: argparse.Namespace, every: int):
        set_seed(seed)
        self.net = Net().to(torch.float64 if args.float64 else torch.float32)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=args.lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
        self.model, self.optimizer = accelerator.prepare(self.net, optimizer)
        self.weighter = None if name is None else make_weighter(name, self.net, accelerator, every)
        apart = self.weighter is not None and "norms" in self.weighter.method.needs
        self.task = self.weighter.task if apart else nullcontext
        self.accelerator, self.args = accelerator, args
        self.generator = torch.Generator().manual_seed(seed)

    def step(self) -> None:
        """One step of the optimizer, on this process's share of new points."""
        accelerator, dtype = self.accelerator, self.net.shared.weight.dtype
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        points = [part[share].to(accelerator.device, dtype) for part in draw_points(self.args.points, self.generator)]
        losses = losses_of(self.model, *points, self.args.waves, self.task)
        if self.weighter is None:
            accelerator.backward(sum(losses.values()))
        else:
            self.weighter.backward(losses)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def train(name: str, seed: int, accelerator: Accelerator, args: argparse.Namespace) -> Run:
    """Makes one run; returns its errors over the steps, final weights, history and processor time."""
    training = Training(name, seed, accelerator, args, args.update_every)
    weighter, every, seconds = training.weighter, max(1, args.steps // 50), 0.0
    errors = [(0, error_of(training.net, args.waves))]
    bar = tqdm(total=args.steps, desc=f"{name}, seed {seed}", mininterval=1)
    for step in range(1, args.steps + 1):
        start = time.process_time()
        training.step()
        seconds += time.process_time() - start
        if step % every == 0 or step == args.steps:
            errors.append((step, error_of(training.net, args.waves)))
            bar.set_postfix_str(f"error {errors[-1][1]:.3f}", refresh=False)
        bar.update()
    bar.close()
    limited = weighter.log_values().get("weighting/limited_steps", 0.0)  # updates in which `max_growth` acted
    weighter.detach()
    accelerator.free_memory()
    return {
        "method": name,
        "seed": seed,
        "processes": accelerator.num_processes,
        "errors": errors,
        "weights": weighter.weights,
        "limited_steps": limited,
        "ms_per_step": 1e3 * seconds / args.steps,
        "history": thinned(weighter.history),
    }


def price(accelerator: Accelerator, args: argparse.Namespace) -> str:
    """Processor time of a step, as text: medians over rounds, and for the ratio also its quartiles.

    A round has a block of `--update_every` steps of every variant, so that other work on the machine slows all of them
    alike. Each block is compared with that of the plain loop in the same round.
    """
    variants = {
        "no weighter": (None, 1),
        "equal": ("equal", 1),
        f"gradnorm, every {args.update_every} steps": ("gradnorm", args.update_every),
        "gradnorm, every step": ("gradnorm", 1),
    }
    trainings = {label: Training(name, 0, accelerator, args, every) for label, (name, every) in variants.items()}
    times: dict[str, list[float]] = {label: [] for label in trainings}
    for _ in tqdm(range(args.price + 1), desc="rounds", mininterval=1):
        for label, training in trainings.items():
            start = time.process_time()
            for _ in range(args.update_every):
                training.step()
            times[label].append(1e3 * (time.process_time() - start) / args.update_every)
    lines = [["", "ms of a processor per step", "× no weighter"]]
    for label, measured in times.items():
        del measured[0]  # the first round warms up
        ratios = [a / b for a, b in zip(measured, times["no weighter"], strict=True)]
        low, mid, high = quantiles(ratios, n=4)
        lines.append([label, f"{median(measured):.2f}", f"{mid:.3f} [{low:.3f}, {high:.3f}]"])
    return table(lines)


def compare(runs: list[Run]) -> str:
    """The errors of all methods at the end, as text."""
    lines = [["method", "relative error", "boundary : residual", "ms of a processor per step"]]
    for name, group in by_method(runs).items():
        ratio = geometric_mean([run["weights"]["boundary"] / run["weights"]["residual"] for run in group])
        cost = fmean(run["ms_per_step"] for run in group)
        lines.append([name, mean_and_range([run["errors"][-1][1] for run in group]), f"{ratio:.3g}", f"{cost:.2f}"])
    return table(lines)


def draw(runs: list[Run]) -> "Figure":
    """Draws errors (the mean over seeds, and their range) and the ratio of the two weights over the steps."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for (name, group), colour in zip(by_method(runs).items(), itertools.cycle(COLOURS)):
        fixed = isinstance(METHODS[name], EqualWeighting | StaticWeighting)
        look = {"color": colour, "linestyle": "--" if fixed else "-", "zorder": 3 if fixed else 2}
        plot_range(left, [run["errors"] for run in group], label=name, **look)
        for run in group:
            at, seen = zip(*run["history"], strict=True)
            right.plot(at, [v["weight/boundary"] / v["weight/residual"] for v in seen], linewidth=0.9, **look)
    left.set_title("mean and range over the seeds; dashed: fixed weights", fontsize="medium")
    left.set_ylabel("relative error against the solution")
    right.set_title("one line for each seed", fontsize="medium")
    right.set_ylabel("weight of the boundary / weight of the residual")
    for ax in (left, right):
        ax.set_yscale("log")
        ax.set_xlabel("optimizer step")
        ax.grid(alpha=0.3)
    left.legend(fontsize="small", loc="upper right", ncols=2)
    return figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_comparison_arguments(parser, METHODS, seeded="the network and the points")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of a run (default: 1000)")
    parser.add_argument(
        "--points",
        type=int,
        default=128,
        help="points inside, and points on the boundary, per optimizer step of all processes together (default: 128)",
    )
    parser.add_argument("--waves", type=int, default=2, help="the solution is sin(πx) sin(waves πy) (default: 2)")
    parser.add_argument(
        "--lr", type=float, default=5e-3, help="learning rate of Adam, which falls to 0 (default: 0.005)"
    )
    parser.add_argument(
        "--update_every",
        type=int,
        default=10,
        help="optimizer steps between two updates of the weights by methods that measure gradients (default: 10)",
    )
    parser.add_argument(
        "--price", type=int, metavar="ROUNDS", help="measure the time of a step in this many rounds, and train nothing"
    )
    parser.add_argument("--float64", action="store_true", help="compute in double precision")
    add_output_arguments(parser, "pinn")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(cpu=args.cpu)
    check_processes(accelerator)
    micro_batch_size(args.points, accelerator, option="--points")  # ends the script if they cannot be divided
    if args.price:
        accelerator.print(price(accelerator, args))
    else:
        runs = [train(name, seed, accelerator, args) for seed in args.seeds for name in args.methods]
        if accelerator.is_main_process:
            write_comparison(args.output_dir, "pinn", args, runs, compare(runs), lambda: draw(runs))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
