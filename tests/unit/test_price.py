"""What a step costs, counted and never timed: torch's operators, and the processor's instructions.

Every figure is that of a training step with a weighter minus that of the same step with a plain weighted sum. Operators
are counted by a dispatch mode, apart for every stage of the loop. Instructions are counted by callgrind in a process of
its own, which needs valgrind with its headers and gcc; where they are missing that half is skipped.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from accel_weighting import IMTLG, CoVWeighting, GradNorm, Method, Weighter, losses, processes, transfer, window
from tests.ranks import accelerator_for
from tests.unit.test_measure import Kernels

ROWS, PLACES, WIDTH = 16, 4, 32
WARM_UP = 24  # steps until methods are past their own warm-up and Python has specialised its bytecode
STEPS = 4  # that are counted
MICRO_BATCHES = 4  # of the loop that says what a further one costs

METHODS: dict[str, tuple[Method, int]] = {
    "GradNorm of 4 tasks": (GradNorm(), 4),
    "GradNorm of 32 tasks": (GradNorm(), 32),
    "CoV of 4 tasks": (CoVWeighting(), 4),
    "IMTL-G of 4 tasks": (IMTLG(), 4),
}

# Operators that a step may add to a plain one, by stage. A negative number is a saving: one product of vectors takes
# the place of a sum over tasks. `update` is the method's own, which is also a part of `step`.
OPERATORS = {
    "GradNorm of 4 tasks": {"forward": 4, "combine": -2, "backward": 8, "step": 4, "update": 0},
    "GradNorm of 32 tasks": {"forward": 32, "combine": -58, "backward": -20, "step": 4, "update": 0},
    "CoV of 4 tasks": {"forward": 4, "combine": -2, "backward": 8, "step": 4, "update": 0},
    "IMTL-G of 4 tasks": {"forward": 4, "combine": -2, "backward": 10, "step": 4, "update": 0},
}
OPERATORS_OF_A_FURTHER_MICRO_BATCH = 10

# Thousands of instructions that a step may add to a plain one: what was counted, and 5 % for other builds of Python.
INSTRUCTIONS = {"GradNorm of 4 tasks": 1110, "GradNorm of 32 tasks": 560, "IMTL-G of 4 tasks": 1400}
INSTRUCTIONS_OF_A_FURTHER_MICRO_BATCH = 365

Stage = Callable[[str], AbstractContextManager[None]]


# ---- the loop that is counted ------------------------------------------------------------------------------------


class Net(nn.Module):
    """A trunk that does next to nothing, and one linear head per task on the mean of its features."""

    def __init__(self, tasks: list[str]) -> None:
        super().__init__()
        self.trunk = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, 1) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = torch.tanh(self.trunk(x)).mean(1)
        return {task: head(z) for task, head in self.heads.items()}


class Loop:
    """A training loop in one process; without a method its total is the plain weighted sum.

    Only the loop that was made last may take steps: Accelerate's settings are those of the process.
    """

    def __init__(self, method: Method | None, tasks: int, micro_batches: int = 1) -> None:
        torch.manual_seed(0)
        self.micro_batches = micro_batches
        self.tasks = [f"t{k}" for k in range(tasks)]
        self.x, self.y = torch.randn(ROWS, PLACES, WIDTH), torch.randn(tasks, ROWS, 1)
        net = Net(self.tasks)
        self.accelerator = accelerator_for("plain", gradient_accumulation_steps=micro_batches)
        self.model, self.optimizer = self.accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1e-3))
        self.weighter = None
        if method is not None:
            self.weighter = Weighter(method, self.tasks, accelerator=self.accelerator, heads=dict(net.heads))

    def losses(self) -> dict[str, Tensor]:
        outputs = self.model(self.x)
        return {task: nn.functional.mse_loss(outputs[task], y) for task, y in zip(self.tasks, self.y, strict=True)}

    def total(self, losses: dict[str, Tensor]) -> Any:
        if self.weighter is not None:
            return self.weighter.combine(losses)
        return sum(1.0 * loss for loss in losses.values())

    def step(self, stage: Stage = lambda _: nullcontext()) -> None:
        """One optimizer step; `stage` is entered around each of its parts."""
        for _ in range(self.micro_batches):
            with self.accelerator.accumulate(self.model):
                with stage("forward"):
                    losses = self.losses()
                with stage("combine"):
                    total = self.total(losses)
                with stage("backward"):
                    self.accelerator.backward(total)
                with stage("step"):
                    if self.weighter is not None:
                        self.weighter.step()
                self.optimizer.step()
                self.optimizer.zero_grad()

    def steps(self, number: int, stage: Stage = lambda _: nullcontext()) -> None:
        for _ in range(number):
            self.step(stage)


# ---- operators ---------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts the operators that reach a kernel while it is entered, by the stage that they are in."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._stage = "the rest"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[self._stage] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stage, before = name, self._stage
        try:
            yield
        finally:
            self._stage = before


def operators(loop: Loop) -> Counter[str]:
    """Of one step of `loop`, by stage."""
    loop.steps(WARM_UP)
    with Operators() as operators:
        loop.step(operators.stage)
    return operators.counts


def added_operators(method: Method, tasks: int, micro_batches: int = 1) -> dict[str, int]:
    """Of a step with a weighter minus those of a plain one, by stage."""
    weighted, plain = (operators(Loop(m, tasks, micro_batches)) for m in (method, None))
    return {stage: weighted[stage] - plain[stage] for stage in ("forward", "combine", "backward", "step", "the rest")}


def operators_of_update(method: Method, tasks: int) -> int:
    """Of a method's update alone, on what a real window saw."""
    loop = Loop(method, tasks)
    loop.step()
    _, state = method.init(loop.tasks)
    for _ in range(WARM_UP):
        _, state = method.update(state, loop.weighter.statistics)
    with Operators() as operators:
        method.update(state, loop.weighter.statistics)
    return operators.counts.total()


@pytest.mark.parametrize("name", OPERATORS)
def test_no_stage_of_a_step_takes_more_operators_than_its_budget(name: str) -> None:
    added = added_operators(*METHODS[name]) | {"update": operators_of_update(*METHODS[name])}
    assert added.pop("the rest") == 0, "what a weighter does not touch costs what it costs without one"
    over = {stage: f"{added[stage]}, not {most}" for stage, most in OPERATORS[name].items() if added[stage] > most}
    assert added.keys() == OPERATORS[name].keys() and not over


def test_a_further_micro_batch_takes_no_more_operators_than_its_budget() -> None:
    method, tasks = METHODS["GradNorm of 4 tasks"]
    one, several = (sum(added_operators(method, tasks, number).values()) for number in (1, MICRO_BATCHES))
    assert several - one <= OPERATORS_OF_A_FURTHER_MICRO_BATCH * (MICRO_BATCHES - 1)


# ---- kernels and copies ------------------------------------------------------------------------------------------


def kernels(loop: Loop) -> Counter[str]:
    """Operators of one step that a GPU starts a kernel for, by name."""
    loop.steps(WARM_UP)
    with Kernels() as found:
        loop.step()
    return found.counts


@pytest.mark.parametrize("method", [GradNorm(), CoVWeighting(), IMTLG()], ids=lambda method: type(method).__name__)
def test_a_step_starts_few_kernels_and_copies_twice_to_the_device_and_once_back(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a small z and 4 tasks: at most 10 kernels more than the sum by hand, and no number is asked for one by one."""
    plain = kernels(Loop(None, 4))
    loop, copies = Loop(method, 4), Counter[str]()

    def copied(values: Tensor, device: torch.device, to: Any = transfer.to_device) -> Tensor:
        copies["up"] += 1
        return to(values, device)

    def waited(reduction: Any, wait: Any = processes.Reduction.wait) -> Any:
        copies["down"] += 1
        return wait(reduction)

    loop.steps(WARM_UP)
    for module in (losses, processes, window):
        monkeypatch.setattr(module, "to_device", copied)
    monkeypatch.setattr(processes.Reduction, "wait", waited)
    with Kernels() as found:
        loop.step()
    assert found.counts.total() - plain.total() <= 10
    assert found.counts["_local_scalar_dense"] == plain["_local_scalar_dense"]
    assert copies["up"] <= 2 and copies["down"] == 1


# ---- instructions ------------------------------------------------------------------------------------------------

SWITCH = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_ZERO_STATS; CALLGRIND_START_INSTRUMENTATION; }
void end(const char *name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""
"""Tells callgrind when to count; outside of it these are a few instructions that do nothing."""


def counted_loops() -> dict[str, tuple[Method | None, int, int]]:
    """Method, tasks and micro-batches of every loop that callgrind counts, by name."""
    loops: dict[str, tuple[Method | None, int, int]] = {}
    for name, micro_batches in [*((name, 1) for name in INSTRUCTIONS), ("GradNorm of 4 tasks", MICRO_BATCHES)]:
        method, tasks = METHODS[name]
        loops[f"plain of {tasks} tasks, {micro_batches}"] = None, tasks, micro_batches
        loops[f"{name}, {micro_batches}"] = method, tasks, micro_batches
    return loops


def run_under_callgrind(switch: str) -> None:
    """What the process under callgrind does: `STEPS` steps of every loop, each count in a file of its own."""
    torch.set_num_threads(1)
    callgrind = ctypes.CDLL(switch)
    for name, (method, tasks, micro_batches) in counted_loops().items():
        loop = Loop(method, tasks, micro_batches)
        loop.steps(WARM_UP)
        gc.collect()
        gc.disable()  # when it runs depends on what came before
        callgrind.begin()
        loop.steps(STEPS)
        callgrind.end(name.encode())
        gc.enable()


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Thousands of instructions per step of every counted loop."""
    for tool in ("valgrind", "gcc"):
        if shutil.which(tool) is None:
            pytest.skip(f"instructions are counted by callgrind, and {tool} is not installed")
    folder = tmp_path_factory.mktemp("callgrind")
    source, switch = folder / "switch.c", folder / "switch.so"
    source.write_text(SWITCH)
    compiled = subprocess.run(["gcc", "-shared", "-fPIC", "-o", switch, source], capture_output=True, text=True)
    if "valgrind/callgrind.h" in compiled.stderr:
        pytest.skip("instructions are counted by callgrind, and valgrind's headers are not installed")
    assert compiled.returncode == 0, compiled.stderr
    callgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/count"]
    done = subprocess.run(
        [*callgrind, sys.executable, "-m", "tests.unit.test_price", str(switch)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=900,  # about a minute where nothing else runs
    )
    assert done.returncode == 0, done.stderr
    files = [path.read_text() for path in folder.glob("count.*")]
    counts = {name: int(total) / STEPS / 1000 for text in files for name, total in [read_count(text)]}
    assert counts.keys() == counted_loops().keys()
    assert 1000 < counts["plain of 4 tasks, 1"] < counts["plain of 32 tasks, 1"], "callgrind counted something else"
    return counts


def read_count(text: str) -> tuple[str, str]:
    """Name and sum of one of callgrind's files."""
    name = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
    total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
    assert name is not None and total is not None, text[:1000]
    return name[1], total[1]


def added_instructions(counts: dict[str, float], name: str, micro_batches: int = 1) -> float:
    _, tasks = METHODS[name]
    return counts[f"{name}, {micro_batches}"] - counts[f"plain of {tasks} tasks, {micro_batches}"]


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_a_step_takes_no_more_instructions_than_its_budget(name: str, instructions: dict[str, float]) -> None:
    assert added_instructions(instructions, name) <= INSTRUCTIONS[name]


def test_a_further_micro_batch_takes_no_more_instructions_than_its_budget(instructions: dict[str, float]) -> None:
    one, several = (added_instructions(instructions, "GradNorm of 4 tasks", n) for n in (1, MICRO_BATCHES))
    assert (several - one) / (MICRO_BATCHES - 1) <= INSTRUCTIONS_OF_A_FURTHER_MICRO_BATCH


if __name__ == "__main__":
    run_under_callgrind(*sys.argv[1:])
