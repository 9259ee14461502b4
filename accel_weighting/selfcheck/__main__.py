"""The command line of the self-check: ``accelerate launch <your configuration> -m accel_weighting.selfcheck``."""

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
from datetime import timedelta
from pathlib import Path

import accelerate
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs

from accel_weighting import __version__
from accel_weighting.processes import Processes, launched_processes

from . import __doc__ as description
from .cpu import accelerator_on_cpu, describe_engine
from .reference import METHODS, ROWS, Net, Setting, by_hand, compare, cost, under_the_engine
from .report import Report, print_banner

TOLERANCES = {"no": 2e-4, "fp16": 2e-2, "bf16": 1e-1, "fp8": 2e-1}
"""By precision: the largest relative difference that rounding explains."""


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
            print_banner(report.verdict())
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
        "python -m accel_weighting.selfcheck",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps per method (default: 12)")
    parser.add_argument(
        "--micro_batches", type=int, default=2, help="micro-batches per step and process, accumulated (default: 2)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which methods to check (default: all)"
    )
    parser.add_argument(
        "--timings", type=int, default=20, help="pairs of steps, plain and weighted, to time; 0: none (default: 20)"
    )
    parser.add_argument(
        "--expect", type=int, metavar="N", help="fail unless there are N processes (default: any number)"
    )
    parser.add_argument(
        "--timeout", type=int, default=60, help="seconds that processes wait for one that does not come (default: 60)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found to this file, as JSON")
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="on the CPU over gloo, FSDP and DeepSpeed too: to try a configuration on a machine without accelerators",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
