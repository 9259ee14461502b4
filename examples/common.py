"""Shared by the examples: their options, the progress of a run and its checkpoints, tables, pictures and results."""

import argparse
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import accelerate
import matplotlib
import torch
from accelerate import Accelerator

import accel_weighting
from accel_weighting.plot import plot_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


History = list[tuple[int, dict[str, float]]]
Run = dict[str, Any]

# ---- options --------------------------------------------------------------------------------------------------------


def listed(kind: Callable[[str], Any], known: Any = None) -> Callable[[str], list[Any]]:
    """The type of an option that takes a list `A,B,…`; all of it must be among the known, if these are given."""

    def read(text: str) -> list[Any]:
        found = [kind(part) for part in text.split(",")]
        if known is not None and (unknown := [part for part in found if part not in known]):
            raise argparse.ArgumentTypeError(f"unknown {unknown}; there are {list(known)}")
        return found

    return read


def add_training_arguments(
    parser: argparse.ArgumentParser, *, samples: str, steps: int, batch_size: int, lr: float
) -> None:
    """Adds the options of a training that divides an optimizer step into micro-batches; `samples` is what it counts."""
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=batch_size,
        help=f"{samples} per micro-batch and process (default: %(default)s)",
    )
    parser.add_argument(
        "--accumulation",
        type=int,
        default=1,
        help="micro-batches per optimizer step and process (default: %(default)s)",
    )
    parser.add_argument("--lr", type=float, default=lr, help="learning rate of AdamW (default: %(default)s)")


def add_comparison_arguments(parser: argparse.ArgumentParser, methods: Iterable[str], *, seeded: str) -> None:
    """Adds the options of a script that trains by every method with every seed; `seeded` is what a seed decides."""
    names = list(methods)
    parser.add_argument(
        "--methods",
        type=listed(str, names),
        default=names,
        metavar="A,B,…",
        help=f"weighting methods to compare (default: {','.join(names)})",
    )
    parser.add_argument(
        "--seeds",
        type=listed(int),
        default=[0, 1, 2],
        metavar="0,1,…",
        help=f"random seeds of {seeded}, one run each for every method (default: 0,1,2)",
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `save_checkpoint` and `resume`."""
    parser.add_argument(
        "--checkpoint_dir", type=Path, help="folder in which the latest checkpoint is kept (default: none is saved)"
    )
    parser.add_argument(
        "--save_every", type=int, default=200, help="optimizer steps between two checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --checkpoint_dir, if there is one"
    )


def add_output_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds where results go, and the device."""
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs") / name, help="folder for results (default: %(default)s)"
    )
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even if the machine has accelerators")


# ---- processes and checkpoints --------------------------------------------------------------------------------------


class Progress:
    """How far a run has come. Saved and loaded with the accelerator's state."""

    def __init__(self):
        self.epoch = self.batches = self.step = 0

    def state_dict(self) -> dict[str, int]:
        """The values that `accelerator.save_state` saves."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes the values that `accelerator.load_state` has loaded."""
        vars(self).update(state)


def check_processes(accelerator: Accelerator) -> None:
    """Ends the script if the launcher started several processes that do not see each other."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise SystemExit(
            f"{launched} processes were started, and each sees {accelerator.num_processes}: they would train apart.\n"
            "On a machine without accelerators, write --cpu after the name of the script."
        )
    accelerator.print(f"Processes: {accelerator.num_processes} ({accelerator.distributed_type.value})")


def micro_batch_size(
    batch_size: int, accelerator: Accelerator, accumulation: int = 1, option: str = "--batch_size"
) -> int:
    """Samples of one micro-batch of one process: all of the same size, so that any division trains alike."""
    size, rest = divmod(batch_size, accelerator.num_processes * accumulation)
    if rest:
        raise SystemExit(
            f"{option} {batch_size} cannot be cut into {accelerator.num_processes} processes × {accumulation} "
            "micro-batches of one size."
        )
    return size


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Saves atomically: every `step_*` folder is complete, even if saving is interrupted.

    A checkpoint is written under another name and renamed when it is complete. An old checkpoint is renamed before it
    is deleted.
    """
    whole, partial = folder / f"step_{step:06d}", folder / "partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()  # until every process has written its random state
    if accelerator.is_main_process:
        if whole.exists():  # from an earlier run: kept under a name that sorts first, until the new one is there
            if (first := folder / "step_-").exists():
                discard(first)
            whole.rename(first)
        partial.rename(whole)
        for checkpoint in folder.glob("step_*"):
            if checkpoint != whole:
                discard(checkpoint)
    accelerator.wait_for_everyone()


def discard(checkpoint: Path) -> None:
    """Deletes a checkpoint; it is renamed first, so that a half-deleted one is never taken for a checkpoint."""
    old = checkpoint.with_name("old")
    shutil.rmtree(old, ignore_errors=True)
    checkpoint.rename(old)
    shutil.rmtree(old)


def resume(accelerator: Accelerator, folder: Path, progress: Progress) -> None:
    """Continues from the latest checkpoint in `folder`, if there is one."""
    if checkpoints := sorted(folder.glob("step_*")):
        accelerator.load_state(str(checkpoints[-1]))
        accelerator.print(f"resumed after {progress.step} steps")


# ---- results --------------------------------------------------------------------------------------------------------


def table(lines: list[list[str]]) -> str:
    """Formats rows of cells as text; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def mean_and_range(values: list[float], digits: int = 3) -> str:
    """`mean (lowest to highest)`, with so many significant digits."""
    low, mean, high = (f"{x:#.{digits}g}".rstrip(".") for x in (min(values), fmean(values), max(values)))
    return f"{mean} ({low} to {high})"


def thinned(history: History, points: int = 200) -> History:
    """A weighter's history in so many parts, each with the latest of its values: files of many runs stay small."""
    width = max(1, len(history) // points)
    parts = [history[start : start + width] for start in range(0, len(history), width)]
    return [(part[-1][0], {name: x for _, values in part for name, x in values.items()}) for part in parts]


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of every method, one for each seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["method"], []).append(run)
    return groups


def plot_range(ax: "Axes", curves: Sequence[Sequence[tuple[int, float]]], **look: Any) -> None:
    """Draws the mean of several runs' `(step, value)` pairs as a line, and their range as an area."""
    steps = [step for step, _ in curves[0]]
    values = list(zip(*([value for _, value in curve] for curve in curves), strict=True))
    ax.plot(steps, list(map(fmean, values)), **look)
    ax.fill_between(steps, list(map(min, values)), list(map(max, values)), color=look["color"], alpha=0.15, linewidth=0)


def write_results(
    folder: Path, name: str, args: Any, runs: dict[str, Run], picture: "Callable[[], Figure] | None" = None
) -> None:
    """Writes `name.json` (settings, versions, results and history of every run) and `name.png`.

    The picture is that which `picture` draws, by default weights, losses, norms and cosines of every run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: module.__version__ for module in (torch, accelerate, accel_weighting)}
    results = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "versions": {"python": platform.python_version(), **versions},
        "runs": runs,
    }
    (folder / f"{name}.json").write_text(json.dumps(results))
    matplotlib.use("Agg")
    figure = picture() if picture else plot_runs({run: result["history"] for run, result in runs.items()})
    figure.savefig(folder / f"{name}.png", dpi=120)
    print(f"Results are in {folder}")


def write_comparison(
    folder: Path, name: str, args: Any, runs: list[Run], text: str, picture: "Callable[[], Figure]"
) -> None:
    """Prints the table of all runs, and writes it with what they recorded, as `write_results` does."""
    print(f"After {args.steps} steps, mean over the seeds {args.seeds} (lowest to highest):\n{text}")
    write_results(folder, name, args, {f"{run['method']}, seed {run['seed']}": run for run in runs}, picture)
