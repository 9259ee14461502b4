"""Compares all methods on pairs of digits in their authors' protocols, with the same number of settings for each.

A small MLP learns the five tasks of `multi_digits.py` on two handwritten digits side by side. Every method is trained
with every learning rate and seed of the same grid. The learning rate is chosen on a validation set, by the geometric
mean of the tasks' errors over all seeds, and only the chosen runs are evaluated on the test set. Every method that has
a setting to choose brings two candidates, chosen in the same way: eight settings; those without have four. Static
weights, a grid over two tasks written with knowledge of the gradients, have sixteen.

    python examples/compare_methods.py

makes some 1,400 short runs, two at a time. Every finished run is a line of `runs.jsonl` in `--output_dir`; after an
interruption the same command continues. Prints a table and writes it to `table.txt`, and draws the errors of two tasks
against each other in `compare_methods.png`.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import matplotlib
import torch
from accelerate.utils import tqdm
from multi_digits import LOSSES, TASKS, DigitPairs
from scipy.stats import rankdata, t
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from accel_weighting import (
    DBMTL,
    FAMO,
    IMTLG,
    IMTLL,
    MGDA,
    SLAW,
    UWSO,
    AlignedMTL,
    CAGrad,
    CoBa,
    ConFIG,
    CoVWeighting,
    DualProj,
    DynamicWeightAverage,
    EqualWeighting,
    FairGrad,
    GeometricLoss,
    GradientBalancer,
    GradNorm,
    GradVac,
    Method,
    NashMTL,
    NTKWeighting,
    PCGrad,
    RandomLossWeighting,
    ReferenceNorm,
    ReLoBRaLo,
    RotoGrad,
    RotoGradNorm,
    ScaleInvariant,
    SmoothTchebycheff,
    SoftAdapt,
    StaticWeighting,
    UncertaintyWeighting,
    UPGrad,
    Weighter,
)


class Candidate(NamedTuple):
    """A method and its lag: 1, or 0 where the paper takes the weights from the current step."""

    method: Method
    lag: int = 1


def static(total: float, pixels: float) -> Candidate:
    """Static weights for the sum, which has by far the largest gradients, and the pixels, which have the smallest."""
    return Candidate(StaticWeighting({**dict.fromkeys(TASKS, 1.0), "sum": total, "pixels": pixels}))


EPOCH = 64  # steps


CROSS_ENTROPIES = ("left", "right", "parity")


def both(lag: int, *methods: Method) -> list[Candidate]:
    """Candidates of one method, all with its authors' lag."""
    return [Candidate(method, lag) for method in methods]


# To try another method, add a row. Several candidates are chosen among on the validation set, as learning rates are.
# The lag, the starts and the lengths of averages are those of the papers or of their authors' code; where these leave a
# number open, two values of it are candidates.
METHODS = {
    "equal": both(1, EqualWeighting()),
    "static": [static(total, pixels) for total in (0.1, 0.01) for pixels in (1, 10)],
    "random": both(1, RandomLossWeighting(), RandomLossWeighting("dirichlet")),
    "uncertainty": both(1, *(UncertaintyWeighting(classification=CROSS_ENTROPIES, lr=lr) for lr in (0.025, 0.1))),
    "uncertainty balanced": both(
        1, *(UncertaintyWeighting(classification=CROSS_ENTROPIES, lr=lr, start="balanced") for lr in (0.025, 0.1))
    ),
    "uncertainty log1p": both(
        1, *(UncertaintyWeighting(classification=CROSS_ENTROPIES, lr=lr, form="log1p") for lr in (0.025, 0.1))
    ),
    "imtl-l": both(1, IMTLL(), IMTLL(lr=0.1)),
    "imtl-l balanced": both(1, IMTLL(start="balanced"), IMTLL(lr=0.1, start="balanced")),
    "dwa": both(1, *(DynamicWeightAverage(T, steps_per_epoch=EPOCH) for T in (2.0, 1.0))),
    "softadapt": both(0, SoftAdapt(), SoftAdapt(variant="loss_weighted")),
    "relobralo": both(0, *(ReLoBRaLo(alpha=alpha, tau=1.0, rho=0.99) for alpha in (0.95, 0.99))),
    "tchebycheff": both(0, *(SmoothTchebycheff(mu, EPOCH, 4 * EPOCH) for mu in (1.0, 0.5))),
    "geometric": both(0, GeometricLoss()),
    "log losses": both(0, ScaleInvariant()),
    "famo": both(0, FAMO(), FAMO(gamma=1e-3)),
    "cov": both(1, CoVWeighting(), CoVWeighting(decay=0.99, warmup=EPOCH)),
    "slaw": both(1, SLAW(), SLAW(0.9)),
    "uw-so": both(0, UWSO(1.0), UWSO(10.0)),
    "coba": both(1, CoBa(), CoBa(50, warmup=EPOCH)),
    "gradnorm": both(1, *(GradNorm(alpha=0.0, lr=lr) for lr in (0.025, 0.1))),
    "gradnorm balanced": both(1, *(GradNorm(alpha=alpha, start="balanced") for alpha in (0.0, 0.5))),
    "reference": both(1, *(ReferenceNorm("left", decay=decay) for decay in (0.0, 0.9))),
    "ntk": both(1, NTKWeighting()),
    "db-mtl": both(0, DBMTL()),
    "rotograd": both(0, RotoGrad(), RotoGrad(lr=0.01)),
    "magnitudes": both(0, RotoGrad(rotate=False)),
    "rotograd_norm": both(1, RotoGradNorm(0.0), RotoGradNorm(0.0, target="mean_norm")),
    "balancer": both(1, GradientBalancer(), GradientBalancer(decay=0.9)),
    "mgda": both(0, MGDA(), MGDA("norm")),
    "pcgrad": both(0, PCGrad()),
    "gradvac": both(0, GradVac(), GradVac(0.01)),
    "cagrad": both(0, CAGrad(), CAGrad(0.2)),
    "imtl-g": both(0, IMTLG()),
    "aligned-mtl": both(0, AlignedMTL(), AlignedMTL("rmse")),
    "nash-mtl": both(0, NashMTL()),
    "fairgrad": both(0, FairGrad(1.0), FairGrad(2.0)),
    "upgrad": both(0, UPGrad()),
    "dualproj": both(0, DualProj()),
    "config": both(0, ConFIG()),
}
LRS = (1e-3, 3e-3, 1e-2, 3e-2)  # half a decade apart: on a coarser grid the learning rate matters more than the method
Run = dict[str, Any]


class Model(nn.Module):
    """A shared trunk, and one head per task."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(128, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.heads = nn.ModuleDict()
        for name, task in TASKS.items():
            hidden = nn.Linear(width, width)
            self.heads[name] = nn.Sequential(nn.ReLU(), hidden, nn.ReLU(), nn.Linear(width, task.outputs))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Predictions for all tasks."""
        z = self.trunk(image)
        return {name: head(z).squeeze(-1) for name, head in self.heads.items()}


@functools.cache
def load_split(seed: int) -> tuple[DigitPairs, DigitPairs, DigitPairs]:
    """Pairs for training, validation and test, which share no image."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    rest, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    train, valid = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=seed)
    sizes = {8_192: train, 4_096: valid, 4_095: test}
    one, two, three = (DigitPairs(images[part], labels[part], size, seed) for size, part in sizes.items())
    return one, two, three


def train(job: tuple[str, int, float, int, int]) -> Run:
    """Makes one run; returns the errors of all tasks on the validation and the test set."""
    torch.set_num_threads(1)
    name, index, lr, seed, steps = job
    candidate = METHODS[name][index]
    train_set, valid_set, test_set = (part.columns for part in load_split(seed))
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weighter = Weighter(candidate.method, list(TASKS), heads=dict(model.heads), lag=candidate.lag)
    order = torch.stack([torch.randperm(len(train_set["image"])) for _ in range(math.ceil(steps / EPOCH))]).view(
        -1, 128
    )
    start = time.process_time()
    for rows in order[:steps]:
        outputs = model(train_set["image"][rows])
        losses = {task: LOSSES[TASKS[task].loss](outputs[task], train_set[task][rows]) for task in TASKS}
        weighter.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.process_time() - start
    return {
        "method": name,
        "candidate": repr(candidate),
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "valid": errors(model, valid_set),
        "test": errors(model, test_set),
        "ms_per_step": 1e3 * seconds / steps,
    }


@torch.no_grad()
def errors(model: nn.Module, data: dict[str, Tensor]) -> dict[str, float]:
    """Percentage of wrong answers, or root mean squared error; a model that diverged counts as wrong."""
    outputs, result = model(data["image"]), {}
    for name, task in TASKS.items():
        answer, truth = outputs[name], data[name]
        if task.metric == "accuracy":
            wrong = (answer.argmax(-1) if task.outputs > 1 else answer > 0) != truth
            error = 100 * max(wrong.double().mean().item(), 0.5 / len(wrong))
        else:
            error = (answer - truth).square().mean().sqrt().item()
        result[name] = error if math.isfinite(error) and outputs[name].isfinite().all() else 1e3
    return result


# ---- all runs -------------------------------------------------------------------------------------------------------


def key(run: Run) -> tuple[Any, ...]:
    return tuple(run[part] for part in ("method", "candidate", "lr", "seed", "steps"))


def finished(path: Path) -> list[Run]:
    """Reads all complete lines of the file, and removes a partial last line left by an interruption."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def results(jobs: list[tuple[str, int, float, int, int]], workers: int) -> Iterator[Run]:
    """Yields runs as they finish."""
    if workers == 1:
        yield from map(train, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        yield from pool.imap_unordered(train, jobs)


def run_all(args: argparse.Namespace) -> list[Run]:
    """Makes the runs that are not in the file yet, and writes each as soon as it is finished."""
    path = args.output_dir / "runs.jsonl"
    wanted = {
        (name, repr(candidate), lr, seed, args.steps): (name, index, lr, seed, args.steps)
        for seed in args.seeds
        for name in args.methods
        for index, candidate in enumerate(METHODS[name])
        for lr in args.lrs
    }
    there = {key(run): run for run in finished(path) if key(run) in wanted}  # a run that is there twice counts once
    runs = list(there.values())
    jobs = [job for name, job in wanted.items() if name not in there]
    if runs:
        print(f"{len(runs)} of {len(wanted)} runs are in {path}")
    if jobs:
        with path.open("a") as file, tqdm(total=len(wanted), initial=len(runs), mininterval=1) as bar:
            for run in results(jobs, args.workers):
                file.write(json.dumps(run) + "\n")
                file.flush()
                os.fsync(file.fileno())
                runs.append(run)
                bar.set_postfix_str(f"{run['method']}, lr {run['lr']:g}", refresh=False)
                bar.update()
    return sorted(runs, key=lambda run: list(wanted).index(key(run)))


# ---- the comparison -------------------------------------------------------------------------------------------------


def score(runs: list[Run]) -> float:
    """The selection criterion: the mean log error on the validation set, over tasks and seeds."""
    return fmean(math.log(error) for run in runs for error in run["valid"].values())


def settings(runs: list[Run]) -> dict[tuple[str, str, float], list[Run]]:
    """Groups the runs that differ only in their seed, by method, candidate and learning rate."""
    groups: dict[tuple[str, str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["method"], run["candidate"], run["lr"]), []).append(run)
    return groups


def chosen(runs: list[Run]) -> dict[str, list[Run]]:
    """For every method, the runs (one per seed) with its best candidate and learning rate."""
    best: dict[str, list[Run]] = {}
    for (name, _, _), group in settings(runs).items():
        if name not in best or score(group) < score(best[name]):
            best[name] = group
    return best


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval (Student's t)."""
    n = len(values)
    return fmean(values), float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n) if n > 1 else math.nan


def delta_m(run: Run, baseline: dict[str, float]) -> float:
    """Mean relative change of the errors in percent; less is better."""
    return 100 * fmean(run["test"][task] / baseline[task] - 1 for task in TASKS)


def mean_ranks(best: dict[str, list[Run]]) -> dict[str, float]:
    """Rank of every method, with 1 as the best, averaged over tasks and seeds."""
    ranks = [
        rankdata([runs[i]["test"][task] for runs in best.values()])
        for i in range(min(map(len, best.values())))
        for task in TASKS
    ]
    return {name: fmean(float(rank[k]) for rank in ranks) for k, name in enumerate(best)}


def table(runs: list[Run]) -> str:
    """The test errors of the chosen runs, as a Markdown table."""
    best = chosen(runs)
    ranks = mean_ranks(best)
    baseline = {task: fmean(run["test"][task] for run in best["equal"]) for task in TASKS} if "equal" in best else None
    units = {task: "% wrong" if TASKS[task].metric == "accuracy" else "RMSE" for task in TASKS}
    columns = [f"{task}, {unit}" for task, unit in units.items()]
    heading = ["method", *columns, "Δm, %", "mean rank", "lr", "ms per step"]
    lines = [heading, ["---"] * len(heading)]
    for name, group in sorted(best.items(), key=lambda item: ranks[item[0]]):
        cells = [name if len(METHODS[name]) == 1 else f"{name} (best of {len(METHODS[name])})"]
        for task, unit in units.items():
            mean, half = interval([run["test"][task] for run in group])
            digits = 1 if unit == "% wrong" else 3
            cells.append(f"{mean:.{digits}f} ± {half:.{digits}f}")
        if baseline is None:
            cells.append("–")
        else:
            mean, half = interval([delta_m(run, baseline) for run in group])
            cells.append(f"{round(mean, 1) + 0.0:+.1f} ± {half:.1f}")
        time_per_step = median(run["ms_per_step"] for run in runs if run["method"] == name)
        lines.append([*cells, f"{ranks[name]:.1f}", f"{group[0]['lr']:g}", f"{time_per_step:.2f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def draw(runs: list[Run], tasks: tuple[str, str], path: Path) -> None:
    """Draws the test errors of two tasks: the mean of every setting, and the chosen settings with intervals."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    best = chosen(runs)
    figure, ax = plt.subplots(figsize=(10, 6.5), layout="constrained")
    colours, markers = plt.get_cmap("turbo").resampled(len(best)), "o^Dv"
    for k, (name, group) in enumerate(best.items()):
        others = [g for (method, _, _), g in settings(runs).items() if method == name]
        means = [[fmean(run["test"][task] for run in g) for g in others] for task in tasks]
        ax.scatter(*means, s=8, color=colours(k), alpha=0.5, linewidths=0)
        (x, dx), (y, dy) = (interval([run["test"][task] for run in group]) for task in tasks)
        marker = "s" if name in ("equal", "static", "random") else markers[k % len(markers)]
        ax.errorbar(x, y, dy, dx, fmt=marker, color=colours(k), markersize=7, elinewidth=0.7, label=name)
        ax.annotate(name, (x, y), (4, 4), textcoords="offset points", fontsize=7, color=colours(k))
    xs, ys = ([fmean(run["test"][task] for run in group) for group in best.values()] for task in tasks)
    for axis, values, task in ((ax.xaxis, xs, tasks[0]), (ax.yaxis, ys, tasks[1])):
        unit = "percent wrong" if TASKS[task].metric == "accuracy" else "root mean squared error"
        axis.set_label_text(f"{task}: {unit} on the test set")
        (ax.set_xlim if axis is ax.xaxis else ax.set_ylim)(0.8 * min(values), 1.25 * max(values))
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    title = "Large: chosen on the validation set, with 95 % intervals. Small: what was not. Squares: baselines."
    ax.set_title(title, fontsize=9)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    def listed(kind: Any) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", type=listed(str), default=list(METHODS), metavar="A,B,…", help="methods to compare (default: all)"
    )
    parser.add_argument(
        "--seeds", type=listed(int), default=[0, 1, 2, 3, 4], metavar="0,1,…", help="random seeds (default: 0 to 4)"
    )
    parser.add_argument(
        "--lrs",
        type=listed(float),
        default=list(LRS),
        metavar="1e-3,…",
        help=f"learning rates to choose from (default: {LRS})",
    )
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of a run (default: 1000)")
    parser.add_argument("--workers", type=int, default=2, help="number of runs at the same time (default: 2)")
    parser.add_argument(
        "--pareto",
        type=listed(str),
        default=["left", "sum"],
        metavar="A,B",
        help="two tasks for the axes of the picture (default: left,sum)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("results/compare_methods"),
        help="folder for runs, table and picture (default: %(default)s)",
    )
    args = parser.parse_args()
    for option, names, known in (("methods", args.methods, METHODS), ("pareto", args.pareto, TASKS)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"--{option}: unknown {unknown}; there are {list(known)}")
    if len(args.pareto) != 2 or args.workers < 1 or args.steps < 1:
        parser.error("--pareto takes two tasks, --workers and --steps at least 1")
    return args


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    runs = run_all(args)
    text = table(runs)
    print(text)
    (args.output_dir / "table.txt").write_text(text + "\n")
    draw(runs, tuple(args.pareto), args.output_dir / "compare_methods.png")
    print(f"Runs, table and picture are in {args.output_dir}")


if __name__ == "__main__":
    main()
