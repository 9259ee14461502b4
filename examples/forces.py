r"""Energies and forces of a cluster of atoms: one of the two losses is on derivatives of the network.

Thirteen copper atoms move at 800 K in the many-body potential of Gupta (parameters of Cleri and Rosato,
https://doi.org/10.1103/PhysRevB.48.22), which the script samples by Monte Carlo. A network E(x) learns their energies,
and their forces as F = -∂E/∂x. How well it learns each depends on the weights of the two losses:

- "energy": the squared error of the energy per atom, in eV²;
- "forces": the squared error of a component of a force, in (eV/Å)²; it contains first derivatives of the network.

Methods that compare gradients do so at the weight named in `shared_parameters`; each loss then has a forward of its
own, in `weighter.task(name)`. For fixed weights and for methods that read losses, one forward gives both losses.

    accelerate launch --config_file launch_configs/cpu_2.yaml examples/forces.py --cpu

The batch of a step is the same however many processes it is divided among. Trains once by every method with every
seed, which takes three minutes on one CPU core. Prints the errors on test configurations, and writes `forces.json` and
`forces.png` to `--output_dir`.
"""

import argparse
import itertools
import time
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

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
    table,
    thinned,
    write_comparison,
)
from torch import Tensor, nn
from torch.nn import functional as F

from accel_weighting import GradNorm, ReferenceNorm, ReLoBRaLo, StaticWeighting, UncertaintyWeighting, Weighter
from accel_weighting.plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# To try another method, add a row. "1:100" is a fixed weight of 1 for the energy and of 100 for the forces.
FIXED = {f"{e:g}:{f:g}": StaticWeighting({"energy": e, "forces": f}) for e, f in [(1, 100), (1, 1), (10, 1), (100, 1)]}
METHODS = {
    **FIXED,
    "gradnorm": GradNorm(alpha=0.0, start="balanced"),
    "reference": ReferenceNorm("energy", decay=0.9),
    "uncertainty": UncertaintyWeighting(start="balanced"),
    "relobralo": ReLoBRaLo(),
}
TASKS = ["energy", "forces"]

ATOMS = 13
BOLTZMANN = 8.617333e-5  # eV/K
# Gupta's potential for copper: eV, eV, no unit, no unit, Å.
A, XI, P, Q, R0 = 0.0855, 1.224, 10.960, 2.278, 2.556


class Clusters(NamedTuple):
    """Configurations of the atoms in Å, their energies in eV, and the forces in eV/Å."""

    positions: Tensor
    energies: Tensor
    forces: Tensor


def distances(positions: Tensor) -> Tensor:
    """From every atom to every other, in Å; shape: [batch, ATOMS, 3] → [batch, ATOMS, ATOMS - 1]."""
    others = ~torch.eye(ATOMS, dtype=torch.bool, device=positions.device)
    return (positions.unsqueeze(2) - positions.unsqueeze(1))[:, others].view(-1, ATOMS, ATOMS - 1, 3).norm(dim=-1)


# ---- the data -------------------------------------------------------------------------------------------------------


def gupta(positions: Tensor) -> Tensor:
    """The energy of each configuration in eV: pairs repel, and neighbours bind by the square root of their number."""
    stretch = distances(positions) / R0 - 1
    return (A * torch.exp(-P * stretch).sum(-1) - XI * torch.exp(-2 * Q * stretch).sum(-1).sqrt()).sum(-1)


def label(positions: Tensor) -> Clusters:
    """Configurations with their energies and forces in Gupta's potential."""
    positions = positions.detach().requires_grad_()
    energies = gupta(positions)
    forces = -torch.autograd.grad(energies.sum(), positions)[0]
    return Clusters(positions.detach(), energies.detach(), forces)


def icosahedron() -> Tensor:
    """Nearly the positions of lowest energy, in Å; shape: [ATOMS, 3]."""
    golden = (1 + 5**0.5) / 2
    corners = [(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    points = torch.tensor([corner[i:] + corner[:i] for corner in corners for i in range(3)], dtype=torch.float64)
    return torch.cat([torch.zeros(1, 3, dtype=torch.float64), 2.4 * points / points[0].norm()])


def sample(chains: int, per_chain: int, temperature: float, seed: int) -> Clusters:
    """Draws from exp(-E/kT) by Langevin steps that are accepted or refused as in Metropolis' algorithm.

    Every chain keeps its configuration after each 50 steps, from the 500th on; they stand together in the result.
    """
    generator, width, kT = torch.Generator().manual_seed(seed), 0.05, BOLTZMANN * temperature
    now = label(icosahedron().repeat(chains, 1, 1))
    kept = []
    for step in tqdm(range(450 + 50 * per_chain), desc="sampling", mininterval=1, leave=False):
        noise = torch.randn(now.positions.shape, generator=generator, dtype=torch.float64)
        new = label(now.positions + width**2 / (2 * kT) * now.forces + width * noise)
        back = now.positions - new.positions - width**2 / (2 * kT) * new.forces
        balance = noise.square().sum((1, 2)) / 2 - back.square().sum((1, 2)) / (2 * width**2)
        chance = torch.exp((now.energies - new.energies) / kT + balance)
        accepted = torch.rand(chains, generator=generator, dtype=torch.float64) < chance
        now = Clusters(
            *(torch.where(accepted.view(-1, *[1] * (a.dim() - 1)), b, a) for a, b in zip(now, new, strict=True))
        )
        if step >= 499 and step % 50 == 49:
            kept.append(now)
    return Clusters(*(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*kept, strict=True)))


# ---- the network ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A sum over atoms of functions of their neighbours' distances and, in one round of messages, of theirs."""

    def __init__(self, mean: float, width: int = 32, basis: int = 16):
        super().__init__()
        self.mean = mean  # of the energies for training
        self.register_buffer("centres", torch.linspace(1.8, 6.5, basis))
        self.embed = nn.Sequential(nn.Linear(basis, width), nn.SiLU(), nn.Linear(width, width))
        self.filter = nn.Linear(basis, width, bias=False)
        self.shared = nn.Linear(width, width)
        self.last = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        others = torch.arange(ATOMS).expand(ATOMS, ATOMS)[~torch.eye(ATOMS, dtype=torch.bool)].view(ATOMS, ATOMS - 1)
        self.register_buffer("others", others)

    def forward(self, positions: Tensor) -> Tensor:
        """The energy of each configuration in eV; shape: [batch, ATOMS, 3] → [batch]."""
        bumps = torch.exp(-((distances(positions).unsqueeze(-1) - self.centres) / 0.4).square() / 2)
        atoms = self.embed(bumps.sum(2) / 4)
        atoms = atoms + (self.filter(bumps) * atoms[:, self.others]).sum(2) / 4
        return self.mean + self.last(self.shared(atoms)).squeeze(-1).sum(-1)


def energy_and_forces(model: nn.Module, positions: Tensor, train: bool = True) -> tuple[Tensor, Tensor]:
    """The network's energies in eV and forces in eV/Å; with `train`, the losses of both can be differentiated."""
    positions = positions.detach().requires_grad_()
    energies = model(positions)
    return energies, -torch.autograd.grad(energies.sum(), positions, create_graph=train)[0]


def losses_of(model: nn.Module, batch: Clusters, weighter: Weighter, apart: bool) -> dict[str, Tensor]:
    """Both losses: from one forward, or `apart` from one each, for a method that compares gradients."""
    if apart:
        with weighter.task("forces"):
            _, forces = energy_and_forces(model, batch.positions)
        with weighter.task("energy"):
            energies = model(batch.positions)
    else:
        energies, forces = energy_and_forces(model, batch.positions)
    return {
        "energy": F.mse_loss(energies / ATOMS, batch.energies / ATOMS),
        "forces": F.mse_loss(forces, batch.forces),
    }


def errors_of(model: nn.Module, test: Clusters) -> dict[str, float]:
    """Root mean squared errors: of the energy in meV per atom, and of a force's component in meV/Å."""
    energies, forces = energy_and_forces(model, test.positions, train=False)
    return {
        "energy": 1e3 * ((energies - test.energies) / ATOMS).square().mean().sqrt().item(),
        "forces": 1e3 * (forces - test.forces).square().mean().sqrt().item(),
    }


# ---- the comparison -------------------------------------------------------------------------------------------------


def train(
    name: str, seed: int, data: Clusters, test: Clusters, accelerator: Accelerator, args: argparse.Namespace
) -> Run:
    """Makes one run; returns its errors on the test configurations, final weights, history and processor time."""
    set_seed(seed)
    net = Net(data.energies.mean().item()).to(data.positions.dtype)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    model, optimizer = accelerator.prepare(net, optimizer)
    method = METHODS[name]
    apart = "norms" in method.needs
    weighter = Weighter(
        method,
        TASKS,
        accelerator=accelerator,
        shared_parameters=[net.shared.weight] if apart else None,
        update_every=args.update_every if apart else 1,
    )
    generator, seconds = torch.Generator().manual_seed(seed), 0.0
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    for _ in (bar := tqdm(range(args.steps), desc=f"{name}, seed {seed}", mininterval=1)):
        start = time.process_time()
        rows = torch.randint(len(data.energies), (args.batch_size,), generator=generator)[share]
        batch = Clusters(*(column[rows].to(accelerator.device) for column in data))
        total = weighter.backward(losses_of(model, batch, weighter, apart))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.process_time() - start
        bar.set_postfix_str(f"loss {total:.2g}", refresh=False)
    weighter.detach()
    errors = errors_of(net, Clusters(*(column.to(accelerator.device) for column in test)))
    accelerator.free_memory()
    return {
        "method": name,
        "seed": seed,
        "processes": accelerator.num_processes,
        "errors": errors,
        "weights": weighter.weights,
        "ms_per_step": 1e3 * seconds / args.steps,
        "history": thinned(weighter.history),
    }


def compare(runs: list[Run]) -> str:
    """The test errors of all methods, as text."""
    lines = [["energy : forces", "energy, meV/atom", "forces, meV/Å", "final ratio", "ms of a processor per step"]]
    for name, group in by_method(runs).items():
        cells = [mean_and_range([run["errors"][task] for run in group]) for task in TASKS]
        ratio = fmean(run["weights"]["energy"] / run["weights"]["forces"] for run in group)
        lines.append([name, *cells, f"{ratio:.3g}", f"{fmean(run['ms_per_step'] for run in group):.2f}"])
    return table(lines)


def draw(runs: list[Run]) -> "Figure":
    """Draws the error of the forces against that of the energy; fixed weights are joined by a line."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    means, looks = {}, zip(COLOURS, itertools.cycle("o^Dv"))
    for name, group in by_method(runs).items():
        points = [tuple(run["errors"].values()) for run in group]
        means[name] = tuple(map(fmean, zip(*points, strict=True)))
        colour, marker = ("black", "s") if name in FIXED else next(looks)
        ax.scatter(*zip(*points, strict=True), s=10, color=colour, alpha=0.5, linewidths=0)
        if name in FIXED:
            ax.plot(*means[name], marker, color=colour, markersize=4)
            ax.annotate(name, means[name], (7, -13), textcoords="offset points", fontsize=8)
        else:
            ax.plot(*means[name], marker, color=colour, fillstyle="none", markersize=8, label=name)
    if fixed := [means[name] for name in FIXED if name in means]:
        ax.plot(*zip(*fixed, strict=True), color="black", linewidth=0.8, label="fixed, energy : forces")
    ax.set(xscale="log", yscale="log", xlabel="error of the energy, meV per atom", ylabel="error of the forces, meV/Å")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.set_title("root mean squared errors on test configurations; small dots: single seeds", fontsize="medium")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", loc="center right")
    return figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_comparison_arguments(parser, METHODS, seeded="the network and the batches")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of a run (default: 600)")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=16,
        help="configurations per optimizer step of all processes together (default: 16)",
    )
    parser.add_argument(
        "--train_size",
        type=int,
        default=512,
        help="configurations for training, and as many for the test; rounded up to a multiple of 64 (default: 512)",
    )
    parser.add_argument("--temperature", type=float, default=800.0, help="temperature in kelvin (default: 800)")
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="learning rate of Adam, which falls to 0 (default: 0.003)"
    )
    parser.add_argument(
        "--update_every",
        type=int,
        default=10,
        help="optimizer steps between two updates of the weights by methods that measure gradients (default: 10)",
    )
    parser.add_argument("--float64", action="store_true", help="compute in double precision")
    add_output_arguments(parser, "forces")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(cpu=args.cpu)
    check_processes(accelerator)
    micro_batch_size(args.batch_size, accelerator)  # ends the script if it cannot be divided
    chains, per_chain = 64, -(-args.train_size // 64)
    parts = [sample(chains, per_chain, args.temperature, seed) for seed in (0, 1)]  # for training, and for the test
    dtype = torch.float64 if args.float64 else torch.float32
    data, test = (Clusters(*(column.to(dtype) for column in part)) for part in parts)
    accelerator.print(
        f"{len(data.energies)} configurations for training, and as many for the test; standard deviations: "
        f"{1e3 * test.energies.std() / ATOMS:.1f} meV per atom, {1e3 * test.forces.std():.0f} meV/Å"
    )
    runs = [train(name, seed, data, test, accelerator, args) for seed in args.seeds for name in args.methods]
    if accelerator.is_main_process:
        write_comparison(args.output_dir, "forces", args, runs, compare(runs), lambda: draw(runs))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
