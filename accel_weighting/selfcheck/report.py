"""What the self-check found, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .reference import ROWS

MEANING = {
    "alone": (
        "{launched} processes were launched, and each of them believes that it is alone: {launched} separate trainings "
        "would run, each on all of the data. On a CPU, launch with ACCELERATE_USE_CPU=true or build "
        "Accelerator(cpu=True), as --cpu does here. On GPUs, see whether torch.cuda.is_available()."
    ),
    "started one": (
        "The launcher was told of several processes (it set MASTER_ADDR) and started one, as `accelerate launch --cpu "
        "--num_processes N` does. Launch with the configuration that `python -m accel_weighting.launch_configs cpu_2` "
        "writes: `accelerate launch --config_file launch_configs/cpu_2.yaml --num_processes N …`."
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
            "summed over": f"{over}: ranks {format_ranks(self.summed_over)}",
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


def format_ranks(ranks: Sequence[int]) -> str:
    """``0-15``, or all of them."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks))


def print_banner(text: str) -> None:
    """Prints what must not be overlooked among a launcher's messages."""
    print(f"\n{'!' * 100}\n{text}\n{'!' * 100}\n", flush=True)
