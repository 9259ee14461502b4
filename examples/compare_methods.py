"""Compares all methods on two problems in their authors' protocols, with the same number of settings for each.

    python examples/compare_methods.py --problem digits
    python examples/compare_methods.py --problem text

`problems.py` says what is learned. Every method has the same learning rates, seeds and steps. Those that have a setting
to choose bring two candidates. A method's learning rate and candidate are chosen on a validation set, by the geometric
mean of the tasks' errors with the first seed (or the first `--choosing` seeds). The other seeds are run with what was
chosen, and all of them are evaluated on the test set. Static weights, a grid over two tasks written with knowledge of
the gradients, have four candidates.

The digits take three quarters of an hour of processor time and the text one quarter; `--workers` runs share it. Every
finished run is a line of `runs.jsonl` in `--output_dir`; after an interruption the same command continues. Prints a
table and writes it to `table.txt`, and draws `compare_<problem>.png`. `--summary` prints what `weighter.summary()` says
after one run with equal weights, and nothing else.
"""

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import matplotlib
import torch
from accelerate.utils import tqdm
from common import listed
from problems import PROBLEMS
from scipy.stats import rankdata, t
from torch import nn

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


def both(lag: int, *methods: Method) -> list[Candidate]:
    """Candidates of one method, all with its authors' lag."""
    return [Candidate(method, lag) for method in methods]


@functools.cache
def methods(of: str) -> dict[str, list[Candidate]]:
    """All methods on a problem. To try another one, add a row.

    Several candidates are chosen among on the validation set, as learning rates are. The lag, the starts and the
    lengths of averages are those of the papers or of their authors' code; where these leave a number open, two values
    of it are candidates.
    """
    problem = PROBLEMS[of]
    epoch, entropies = problem.epoch, problem.cross_entropies
    return {
        "equal": both(1, EqualWeighting()),
        "static": both(1, *map(StaticWeighting, problem.statics)),
        "random": both(1, RandomLossWeighting(), RandomLossWeighting("dirichlet")),
        "uncertainty": both(1, *(UncertaintyWeighting(classification=entropies, lr=lr) for lr in (0.025, 0.1))),
        "uncertainty balanced": both(
            1, *(UncertaintyWeighting(classification=entropies, lr=lr, start="balanced") for lr in (0.025, 0.1))
        ),
        "uncertainty log1p": both(
            1, *(UncertaintyWeighting(classification=entropies, lr=lr, form="log1p") for lr in (0.025, 0.1))
        ),
        "imtl-l": both(1, IMTLL(), IMTLL(lr=0.1)),
        "imtl-l balanced": both(1, IMTLL(start="balanced"), IMTLL(lr=0.1, start="balanced")),
        "dwa": both(1, *(DynamicWeightAverage(T, steps_per_epoch=epoch) for T in (2.0, 1.0))),
        "softadapt": both(0, SoftAdapt(), SoftAdapt(variant="loss_weighted")),
        "relobralo": both(0, *(ReLoBRaLo(alpha=alpha, tau=1.0, rho=0.99) for alpha in (0.95, 0.99))),
        "tchebycheff": both(0, *(SmoothTchebycheff(mu, epoch, 4 * epoch) for mu in (1.0, 0.5))),
        "geometric": both(0, GeometricLoss()),
        "log losses": both(0, ScaleInvariant()),
        "famo": both(0, FAMO(), FAMO(gamma=1e-3)),
        "cov": both(1, CoVWeighting(), CoVWeighting(decay=0.99, warmup=epoch)),
        "slaw": both(1, SLAW(), SLAW(0.9)),
        "uw-so": both(0, UWSO(1.0), UWSO(10.0)),
        "coba": both(1, CoBa(), CoBa(50, warmup=epoch)),
        "gradnorm": both(1, *(GradNorm(alpha=0.0, lr=lr) for lr in (0.025, 0.1))),
        "gradnorm balanced": both(1, *(GradNorm(alpha=alpha, start="balanced") for alpha in (0.0, 0.5))),
        "reference": both(1, *(ReferenceNorm(problem.reference, decay=decay) for decay in (0.0, 0.9))),
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


Run = dict[str, Any]
Job = tuple[str, str, int, float, int, int]


def start(job: Job) -> tuple[nn.Module, Weighter, Iterator[float]]:
    """A model, its weighter, and the training: seconds of processor time, step by step."""
    of, name, index, lr, seed, steps = job
    problem, candidate = PROBLEMS[of], methods(of)[name][index]
    data = problem.load(seed)[0]
    torch.manual_seed(seed)
    model = problem.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weighter = Weighter(candidate.method, list(problem.tasks), heads=dict(model.heads), lag=candidate.lag)
    samples = problem.epoch * problem.batch
    order = torch.stack([torch.randperm(samples) for _ in range(math.ceil(steps / problem.epoch))])

    def training() -> Iterator[float]:
        for rows in order.view(-1, problem.batch)[:steps]:
            begin = time.process_time()
            weighter.backward(problem.losses(model, {name: column[rows] for name, column in data.items()}))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            yield time.process_time() - begin

    return model, weighter, training()


def train(job: Job) -> Run:
    """Makes one run; returns the errors of all tasks on the validation and the test set."""
    torch.set_num_threads(1)
    of, name, index, lr, seed, steps = job
    model, _, training = start(job)
    for _ in training:
        pass
    _, valid, test = PROBLEMS[of].load(seed)
    return {
        "problem": of,
        "method": name,
        "candidate": repr(methods(of)[name][index]),
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "valid": PROBLEMS[of].errors(model, valid),
        "test": PROBLEMS[of].errors(model, test),
    }


def costs(best: dict[str, list[Run]], rounds: int = 7, steps: int = 10) -> dict[str, float]:
    """Processor time of a step with every method, × that of equal weights; medians of rounds in random order."""
    torch.set_num_threads(1)
    runs = {}
    for name, (run, *_) in best.items():
        index = list(map(repr, methods(run["problem"])[name])).index(run["candidate"])
        runs[name] = start((run["problem"], name, index, 1e-3, 0, (rounds + 1) * steps))[2]
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name in random.Random(0).sample(list(runs), len(runs)):
            found[name].append(fmean(next(runs[name]) for _ in range(steps)))
    one = "equal" if "equal" in found else next(iter(found))
    return {
        name: median(a / b for a, b in zip(times[1:], found[one][1:], strict=True)) for name, times in found.items()
    }


# ---- all runs -------------------------------------------------------------------------------------------------------


def key(run: Run) -> tuple[Any, ...]:
    return tuple(run[part] for part in ("problem", "method", "candidate", "lr", "seed", "steps"))


def finished(path: Path) -> list[Run]:
    """Reads all complete lines of the file, and removes a partial last line left by an interruption."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def results(jobs: list[Job], workers: int) -> Iterator[Run]:
    """Yields runs as they finish."""
    if workers == 1:
        yield from map(train, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        yield from pool.imap_unordered(train, jobs)


def run_all(args: argparse.Namespace) -> list[Run]:
    """Makes the runs of the first seeds, chooses the settings by them, and makes those of the other seeds."""
    there = methods(args.problem)
    all_settings = [(name, i, lr) for name in args.methods for i in range(len(there[name])) for lr in args.lrs]
    runs = make(args, [(*setting, seed) for seed in args.seeds[: args.choosing] for setting in all_settings])
    best = [group[0] for group in chosen(runs).values()]
    taken = [(r["method"], list(map(repr, there[r["method"]])).index(r["candidate"]), r["lr"]) for r in best]
    return runs + make(args, [(*setting, seed) for seed in args.seeds[args.choosing :] for setting in taken])


def make(args: argparse.Namespace, settings: list[tuple[str, int, float, int]]) -> list[Run]:
    """Makes the runs that are not in the file yet, and writes each as soon as it is finished."""
    path = args.output_dir / "runs.jsonl"
    wanted: dict[tuple[Any, ...], Job] = {}
    for name, index, lr, seed in settings:
        candidate = repr(methods(args.problem)[name][index])
        wanted[args.problem, name, candidate, lr, seed, args.steps] = (args.problem, name, index, lr, seed, args.steps)
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
    """For every method, the runs (one per seed) with the candidate and the learning rate that are best on validation.

    Settings are compared on the seeds that all of them have.
    """
    groups = settings(runs)
    seeds = set.intersection(*({run["seed"] for run in group} for group in groups.values()))
    best: dict[str, tuple[float, list[Run]]] = {}
    for (name, _, _), group in groups.items():
        found = score([run for run in group if run["seed"] in seeds])
        if name not in best or found < best[name][0]:
            best[name] = found, group
    return {name: group for name, (_, group) in best.items()}


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval (Student's t)."""
    n = len(values)
    return fmean(values), float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n) if n > 1 else math.nan


def changes(best: dict[str, list[Run]]) -> dict[str, list[float]]:
    """Mean relative change of the errors, in percent of those of equal weights with the same seed; less is better."""
    equal = {run["seed"]: run["test"] for run in best["equal"]}
    return {
        name: [100 * fmean(e / equal[run["seed"]][task] - 1 for task, e in run["test"].items()) for run in group]
        for name, group in best.items()
    }


def mean_ranks(best: dict[str, list[Run]]) -> dict[str, float]:
    """Rank of every method, with 1 as the best, averaged over tasks and seeds."""
    groups = list(best.values())
    ranks = [
        rankdata([group[i]["test"][task] for group in groups])
        for i in range(min(map(len, groups)))
        for task in groups[0][0]["test"]
    ]
    return {name: fmean(float(rank[k]) for rank in ranks) for k, name in enumerate(best)}


def setting(run: Run) -> str:
    """What was chosen among the candidates of a method, and the number of these."""
    candidates = {repr(candidate): candidate.method for candidate in methods(run["problem"])[run["method"]]}
    if len(candidates) == 1:
        return ""
    method: Any = candidates[run["candidate"]]
    names = [field.name for field in dataclasses.fields(method)]
    values = {name: getattr(method, name) for name in names}
    differ = [name for name in names if any(getattr(other, name) != values[name] for other in candidates.values())]
    shown = {name: values[name] for name in differ}
    if isinstance(weights := shown.get("weights"), dict):
        shown = {task: weight for task, weight in weights.items() if weight != 1}
    return ", ".join(f"{name} {value}" for name, value in shown.items()) + f" (of {len(candidates)})"


def table(runs: list[Run], cost: dict[str, float]) -> str:
    """The test errors of the chosen runs, as a Markdown table, sorted by Δm."""
    best = chosen(runs)
    ranks, change = mean_ranks(best), changes(best)
    units = PROBLEMS[runs[0]["problem"]].tasks
    columns = [f"{task}, {unit}" for task, unit in units.items()]
    heading = ["method", "setting chosen", "lr", *columns, "Δm, %", "Δm − static's", "mean rank", "step, × equal"]
    lines = [heading, ["---"] * len(heading)]
    for name in sorted(best, key=lambda name: fmean(change[name])):
        group = best[name]
        cells = [name, setting(group[0]), f"{group[0]['lr']:g}"]
        for task, unit in units.items():
            mean = fmean(run["test"][task] for run in group)
            cells.append(f"{mean:.{1 if '%' in unit else 3}f}")
        cells.append("0" if name == "equal" else "{:+.1f} ± {:.1f}".format(*interval(change[name])))
        apart = [a - b for a, b in zip(change[name], change.get("static", []), strict=False)]
        cells.append("{:+.1f} ± {:.1f}".format(*interval(apart)) if apart and name != "static" else "")
        lines.append([*cells, f"{ranks[name]:.1f}", f"{cost[name]:.2f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


FAMILIES = {
    "reads nothing": "#4d4d4d",
    "reads losses": "#d95f02",
    "reads norms of gradients": "#1b6ca8",
    "reads inner products of gradients": "#1b8a5a",
    "turns features": "#8e44ad",
}


def family(method: Method) -> str:
    """What a method reads, or that it rotates."""
    needs = method.needs
    names = list(FAMILIES)
    if "moments" in needs:
        return names[4]
    return names[3 if "gram" in needs else 2 if "norms" in needs else 1 if needs else 0]


def draw(runs: list[Run], path: Path) -> None:
    """Draws Δm of every method with its interval, sorted, and every seed's as a small dot."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    best = chosen(runs)
    change, of = changes(best), runs[0]["problem"]
    order = sorted(best, key=lambda name: -fmean(change[name]))
    colours = [FAMILIES[family(methods(of)[name][0].method)] for name in order]
    figure, ax = plt.subplots(figsize=(9, 1.2 + 0.2 * len(order)), layout="constrained")
    low = min(min(values) for values in change.values())
    limit = max(60.0, -2 * low)  # what is farther to the right is cut off, and its mean written there
    for y, (name, colour) in enumerate(zip(order, colours, strict=True)):
        mean, half = interval(change[name])
        ax.plot(change[name], [y] * len(change[name]), "o", markersize=2.5, color=colour, alpha=0.45)
        ax.errorbar(mean, y, None, half, fmt="D", color=colour, markersize=4.5, elinewidth=1.6)
        if max(mean, mean + half) > limit:
            ax.text(limit * 0.99, y, f"{mean:+.0f} ± {half:.0f}", ha="right", va="center", fontsize=7, color=colour,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85})  # fmt: skip
    ax.axvline(0, color="#4d4d4d", linewidth=0.8)
    if "static" in change:
        ax.axvline(fmean(change["static"]), color="#4d4d4d", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(order)), order, fontsize=8)
    for label, colour in zip(ax.get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    ax.set_xlim(min(1.35 * low, -10), limit)
    ax.set_ylim(-0.8, len(order) - 0.2)
    ax.grid(axis="x", color="#e0e0e0", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel("Δm: mean change of the errors against equal weights with the same seed, in percent; less is better")
    seeds = max(map(len, best.values()))
    ax.set_title(f"{of}: {len(order)} methods, seeds: {seeds}, 95 % intervals; dotted: static weights", fontsize=9)
    for name in FAMILIES:
        if FAMILIES[name] in colours:
            ax.plot([], [], "D", markersize=4.5, color=FAMILIES[name], label=name)
    ax.legend(loc="upper right", fontsize=8, frameon=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=list(PROBLEMS), default="digits", help="what is learned (default: digits)")
    parser.add_argument("--summary", action="store_true", help="print what one run with equal weights shows, and end")
    parser.add_argument("--methods", type=listed(str), metavar="A,B,…", help="methods to compare (default: all)")
    parser.add_argument(
        "--seeds", type=listed(int), default=[0, 1, 2, 3, 4], metavar="0,1,…", help="random seeds (default: 0 to 4)"
    )
    parser.add_argument("--choosing", type=int, default=1, help="on how many seeds settings are chosen (default: 1)")
    parser.add_argument(
        "--lrs",
        type=listed(float),
        metavar="1e-3,…",
        help="learning rates to choose from (default: the problem's)",
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of a run (default: the problem's)")
    parser.add_argument("--workers", type=int, default=2, help="number of runs at the same time (default: 2)")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="folder for runs, table and picture (default: runs/compare_methods/<problem>)",
    )
    args = parser.parse_args()
    known = methods(args.problem)
    args.methods = args.methods or list(known)
    args.lrs = args.lrs or list(PROBLEMS[args.problem].lrs)
    args.steps = PROBLEMS[args.problem].steps if args.steps is None else args.steps
    args.output_dir = args.output_dir or Path("runs/compare_methods") / args.problem
    if unknown := [name for name in args.methods if name not in known]:
        parser.error(f"--methods: unknown {unknown}; there are {list(known)}")
    if "equal" not in args.methods or min(args.workers, args.steps, args.choosing) < 1:
        parser.error("--methods must have `equal` among them; --workers, --steps and --choosing are at least 1")
    return args


def main() -> None:
    args = parse_args()
    if args.summary:
        run = start((args.problem, "equal", 0, args.lrs[-1], args.seeds[0], args.steps))
        for _ in run[2]:
            pass
        print(run[1].summary())
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    runs = run_all(args)
    text = table(runs, costs(chosen(runs)))
    print(text)
    (args.output_dir / "table.txt").write_text(text + "\n")
    draw(runs, args.output_dir / f"compare_{args.problem}.png")
    print(f"Runs, table and picture are in {args.output_dir}")


if __name__ == "__main__":
    main()
