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
import json
import platform
import socket
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs

from . import __version__
from .engines import accelerator_on_cpu, describe_engine
from .processes import Processes, launched_processes
from .trial import METHODS, ROWS, Net, Setting, by_hand, compare, cost, under_the_engine

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
    elif "error" in report.problems:  # the main process may be stopped by the launcher before it says so
        print(report.verdict(), flush=True)
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
