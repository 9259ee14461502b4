"""The matrix: every engine, precision, accumulation, kind of checkpointing and compilation, in one table.

An `EngineConfig` is one configuration of an engine. Its cells train the same global batches as one process on the whole
batch does, and must see the same statistics, take the same weights and rotations and end with the same parameters, to a
tolerance that has its reason beside it. What torch or DeepSpeed cannot do without any weighter is listed in
`IMPOSSIBLE` and shown by a control.

    python -m tests.distributed.engines                              the whole matrix, as a table
    python -m tests.distributed.engines --pairwise                   what the tests run: all pairs of two choices
    python -m tests.distributed.engines --row ZeRO --precision bf16  some of it
    python -m tests.distributed.engines --results FILE               go on where an earlier call with FILE ended
    python -m tests.distributed.engines --pairwise --sabotage gram   the library broken on purpose: must end red
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from accel_weighting import CoVWeighting, GradNorm, Method, RotoGrad
from accel_weighting.methods.mgda import MGDA
from tests.ranks import RanksFailed, run_ranks
from tests.sabotage import factors_not_removed, gram_divided_by_M, no_all_reduce_and_nobody_notices
from tests.scenarios import Cell, Run, assert_ranks_agree, difference, train

# ---- rows: configurations of engines -----------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineConfig:
    """One configuration of an engine.

    Attributes:
        own_policy: FSDP2's mixed precision as our warning advises it, not as Accelerate sets it.
    """

    name: str
    engine: str
    world: int = 2
    setup: dict[str, Any] = field(default_factory=dict)
    fsdp_heads: bool = False
    own_policy: bool = False


def policy(precision: str) -> Any:
    """Half precision inside, outputs left alone and reductions in float32: the policy that our warning advises."""
    from torch.distributed.fsdp import MixedPrecisionPolicy  # noqa: TID251  the engine's own

    inside = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return MixedPrecisionPolicy(inside, reduce_dtype=inside and torch.float32)


ROWS = [
    EngineConfig("DDP", "ddp"),
    EngineConfig("DDP, find_unused_parameters", "ddp", setup={"ddp": {"find_unused_parameters": True}}),
    EngineConfig("DDP, static_graph", "ddp", setup={"ddp": {"static_graph": True}}),
    EngineConfig("FSDP1", "fsdp1"),
    EngineConfig("FSDP1, heads are units", "fsdp1", fsdp_heads=True),
    EngineConfig("FSDP2", "fsdp2"),
    EngineConfig("FSDP2, heads are units", "fsdp2", fsdp_heads=True),
    EngineConfig("FSDP2, not resharded", "fsdp2", setup={"fsdp": {"reshard_after_forward": False}}),
    EngineConfig("FSDP2, output_dtype left alone", "fsdp2", own_policy=True, fsdp_heads=True),
    EngineConfig("HSDP 2×2", "hsdp", world=4),
    EngineConfig("FSDP2, context parallel 2×2", "hsdp", world=4, setup={"mesh": {"cp_size": 2, "dp_shard_size": 2}}),
    EngineConfig("ZeRO-0", "zero0"),
    EngineConfig("ZeRO-1", "zero1"),
    EngineConfig("ZeRO-2", "zero2"),
    EngineConfig("ZeRO-3", "zero3"),
    # Small parameters are partitioned too, so that every head is a unit that gathers its own.
    EngineConfig("ZeRO-3, heads are units", "zero3", setup={"zero": {"stage3_param_persistence_threshold": 0}}),
]

# ---- cells: the choices of one run -------------------------------------------------------------------------------

METHODS: dict[str, tuple[Method, dict[str, Any]]] = {
    "GradNorm": (GradNorm(alpha=1.0, lr=0.01), {}),
    "CoV": (CoVWeighting(), {}),
    "RotoGrad": (RotoGrad(lr=0.5), {}),  # steps large enough for the rotations to matter
    "MGDA, lag 0": (MGDA(normalize="norm"), {"lag": 0}),
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float64": {"dtype": torch.float64},
    "float32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.float32, "setup": {"mixed_precision": "bf16"}},
    "fp16": {"dtype": torch.float32, "setup": {"mixed_precision": "fp16", "loss_scale": 16.0}},
}
CHOICES: dict[str, Sequence[Any]] = {
    "method": list(METHODS),
    "precision": list(PRECISIONS),
    "micro": [1, 3],
    "checkpoint": ["", "trunk", "trunk reentrant", "join", "join reentrant"],
    "compile": [False, True],
}
MEANINGS = {
    "method": "weighting method",
    "precision": "precision",
    "micro": "number of micro-batches per process and optimizer step",
    "checkpoint": "kind of activation checkpointing",
    "compile": "choice of whether the model is compiled",
}
Choice = dict[str, Any]

TOLERANCES = {
    "float64": (1e-12, "the same float64 numbers, added in another order"),
    "float32": (2e-5, "float32 sums in another order, over all steps"),
    "bf16": (3e-2, "8 bits: 0.4 % in every product, compared with float32"),
    "fp16": (4e-3, "11 bits: 0.05 % in every product, compared with float32"),
    "ZeRO float64": (2e-6, "ZeRO's own copy of the parameters is float32"),
}


def tolerance(row: EngineConfig, choice: Choice) -> float:
    """How far a cell may be from one process."""
    zero = row.engine in ("zero1", "zero2", "zero3")
    return TOLERANCES["ZeRO float64" if zero and choice["precision"] == "float64" else choice["precision"]][0]


def impossible(row: EngineConfig, choice: Choice) -> str | None:
    """Why torch or DeepSpeed cannot run this with or without a weighter; None where they can."""
    return next((why for why, applies in IMPOSSIBLE.items() if applies(row, choice)), None)


FP16_CPU = torch.ops.mkldnn._is_mkldnn_fp16_supported()  # which is what DeepSpeed asks

IMPOSSIBLE = {
    "static_graph counts the hooks of one backward, and breaks when it accumulates": lambda row, choice: (
        "static_graph" in row.name and choice["micro"] > 1
    ),
    "find_unused_parameters marks a parameter of a re-entrant checkpoint ready twice": lambda row, choice: (
        "find_unused" in row.name and choice["checkpoint"].endswith("reentrant")
    ),
    "a checkpoint around heads that are FSDP units keeps torch.compile from compiling anything": lambda row, choice: (
        row.fsdp_heads and choice["compile"] and choice["checkpoint"].startswith("join")
    ),
    "DeepSpeed reduces float64 in ZeRO's stages only": lambda row, choice: (
        row.engine == "zero0" and choice["precision"] == "float64"
    ),
    "DeepSpeed moves parameters otherwise than its optimizer does in fp16 without ZeRO": lambda row, choice: (
        FP16_CPU and row.engine == "zero0" and choice["precision"] == "fp16"
    ),
    "DeepSpeed has no fp16 on a CPU that has none": lambda row, choice: (
        not FP16_CPU and row.engine.startswith("zero") and choice["precision"] == "fp16"
    ),
    "DeepSpeed takes no float64 for ZeRO-3 on a CPU that has fp16": lambda row, choice: (
        FP16_CPU and row.engine == "zero3" and choice["precision"] == "float64"
    ),
}


def cell(row: EngineConfig, choice: Choice) -> Cell:
    """What a row trains for a choice."""
    method, options = METHODS[choice["method"]]
    precision = PRECISIONS[choice["precision"]]
    setup = {**row.setup, **precision.get("setup", {})}
    if row.own_policy:
        setup["fsdp"] = {"mixed_precision_policy": policy(choice["precision"])}
    if choice["compile"]:
        setup["dynamo_backend"] = "aot_eager"
    # A compiled checkpoint forbids side effects, which hooks on heads have: the model would run right, but uncompiled.
    route = "branch" if choice["compile"] and choice["checkpoint"].startswith("join") else "heads"
    return Cell(
        method,
        route=route,
        steps=5,
        micro=choice["micro"],
        dtype=precision["dtype"],
        checkpoint=choice["checkpoint"],
        fsdp_heads=row.fsdp_heads,
        setup=setup,
        options=options,
        interleaved=True,
        short={2: 1} if choice["micro"] > 1 else {},  # an epoch ends there, and the next one begins
    )


def reference(choice: Choice) -> Choice:
    """The choice that one process makes: the whole batch, nothing recomputed or compiled, at the model's precision."""
    full = "float64" if choice["precision"] == "float64" else "float32"
    micro = choice["micro"] if choice["method"].endswith("lag 0") else 1  # lag 0 sees micro-batches by definition
    return {**choice, "precision": full, "micro": micro, "checkpoint": "", "compile": False}


def choices(row: EngineConfig) -> list[Choice]:
    """Everything that a row can do."""
    found = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
    return [choice for choice in found if impossible(row, choice) is None]


def cover(cells: Sequence[tuple[EngineConfig, Choice]]) -> list[tuple[EngineConfig, Choice]]:
    """A small part of the cells in which every two choices (a row is one, too) that meet in any of them meet."""
    bits: dict[tuple[Any, ...], int] = {}  # of every pair

    def pairs(row: EngineConfig, choice: Choice) -> int:
        found = itertools.combinations([("row", row.name), *choice.items()], 2)
        return sum(bits.setdefault(pair, 1 << len(bits)) for pair in found)

    masks = [pairs(row, choice) for row, choice in cells]
    missing = (1 << len(bits)) - 1
    taken = []
    while missing:
        i = max(range(len(cells)), key=lambda i: ((masks[i] & missing).bit_count(), not cells[i][1]["compile"]))
        missing &= ~masks[i]
        taken.append(cells[i])
    return taken


def pairwise(rows: Sequence[EngineConfig]) -> dict[str, list[Choice]]:
    """What the tests run."""
    taken = cover([(row, choice) for row in rows for choice in choices(row)])
    return {row.name: [choice for where, choice in taken if where is row] for row in rows}


def full(rows: Sequence[EngineConfig]) -> dict[str, list[Choice]]:
    """Everything that is not compiled, and of what is, which takes ten times as long, all pairs of every row."""
    found = {row.name: [choice for choice in choices(row) if not choice["compile"]] for row in rows}
    for row in rows:
        found[row.name] += [c for _, c in cover([(row, choice) for choice in choices(row) if choice["compile"]])]
    return found


# ---- running -----------------------------------------------------------------------------------------------------

SABOTAGES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "none": nullcontext,
    "gram": gram_divided_by_M,
    "all-reduce": no_all_reduce_and_nobody_notices,
    "scale": factors_not_removed,
}


def train_cell(engine: str, one: Cell) -> Run:
    """One cell in a process that may have run others."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = train(engine, one)
    if "dynamo_backend" in one.setup:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"], "nothing was compiled"
    return run


def run_cells(cells: Sequence[tuple[str, Cell]]) -> list[Run | str]:
    """Many cells, each with its engine, in one launch; an error's text where a cell fails."""
    runs: list[Run | str] = []
    for engine, one in cells:
        try:
            runs.append(train_cell(engine, one))
        except Exception as error:  # noqa: PERF203  a cell's failure is what is asked for
            runs.append(f"{type(error).__name__}: {error}")
    return runs


def keep_cells(cells: Sequence[tuple[str, Cell]], folder: Path, sabotage: str) -> None:
    """Many cells in one launch, which ends at the first that fails; a cell's run is a file as soon as it is over."""
    with SABOTAGES[sabotage]():
        for i, (engine, one) in enumerate(cells):
            kept = _kept(folder, i, int(os.environ["RANK"]))
            part = kept.with_suffix(".part")
            part.write_bytes(pickle.dumps(train_cell(engine, one)))
            part.rename(kept)


def _kept(folder: Path, cell: int, rank: int) -> Path:
    return folder / f"cell{cell}-process{rank}.pickle"


def launches(cells: Sequence[tuple[str, Cell]], world: int, folder: str, sabotage: str) -> Iterator[list[Run] | str]:
    """What every process saw of every cell, or how it ended.

    A cell that fails, dies or hangs takes its launch with it, since nobody knows what it left behind; the next launch
    begins with the cell after it.
    """
    while cells:
        kept = Path(tempfile.mkdtemp(dir=folder))
        end = None
        try:
            run_ranks(keep_cells, world, folder, cells, kept, sabotage, timeout=120 + 20 * len(cells))
        except RanksFailed as failure:
            end = str(failure).splitlines()[0]
        whole = [all(_kept(kept, i, rank).exists() for rank in range(world)) for i in range(len(cells))]
        done = len(cells) if end is None else min(whole.index(False) if False in whole else len(cells), len(cells) - 1)
        for i in range(done):
            yield [pickle.loads(_kept(kept, i, rank).read_bytes()) for rank in range(world)]
        if end is not None:
            yield end
            done += 1
        cells = cells[done:]


def references(wanted: Iterable[Choice], folder: str) -> dict[str, Run]:
    """One process on the whole batch, for each of the choices; by the text of the choice."""
    unique = {str(choice): choice for choice in wanted}
    cells = [("plain", cell(EngineConfig("", "plain"), choice)) for choice in unique.values()]
    runs = run_ranks(run_cells, 1, folder, cells, timeout=600)[0]
    for name, run in zip(unique, runs, strict=True):
        assert isinstance(run, Run), f"one process: {name}: {run}"
    return dict(zip(unique, runs, strict=True))  # type: ignore[arg-type]


def verdict(row: EngineConfig, choice: Choice, runs: Sequence[Run] | str, one: Run) -> tuple[float, str | None]:
    """How far a cell is from one process, and what is wrong with it."""
    if isinstance(runs, str):
        return float("inf"), runs
    try:
        assert_ranks_agree(runs)
        worst = difference(runs[0], one)
        worst = max(worst, distance(runs[0].parameters, one.parameters))
        if "rotations" in one.state:
            worst = max(worst, distance(runs[0].state, one.state, ["rotations"]))
    except (AssertionError, ValueError) as error:
        return float("inf"), f"{type(error).__name__}: {error}"
    limit = tolerance(row, choice)
    return worst, None if worst < limit else f"{worst:.1e} from one process, more than {limit:.0e}"


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], names: Iterable[str] | None = None) -> float:
    """Largest relative difference of tensors by name, relative to each one's largest entry."""
    assert a.keys() == b.keys(), f"{sorted(a)} are not {sorted(b)}"
    return max(
        ((a[name].double() - b[name].double()).abs().max() / b[name].double().abs().max()).item() for name in names or b
    )


@dataclass
class Result:
    """A cell, how far it was from one process, what is wrong with it (None: nothing)."""

    row: str
    choice: Choice
    worst: float
    wrong: str | None


def run(
    part: Sequence[tuple[EngineConfig, Choice]], ones: dict[str, Run], folder: str, sabotage: str = "none"
) -> Iterator[Result]:
    """As few launches as there can be for cells whose rows have the same number of processes."""
    cells = [(row.engine, cell(row, choice)) for row, choice in part]
    world = part[0][0].world if part else 0
    for (row, choice), runs in zip(part, launches(cells, world, folder, sabotage), strict=True):
        yield Result(row.name, choice, *verdict(row, choice, runs, ones[str(reference(choice))]))


def controls() -> list[tuple[str, EngineConfig, Choice]]:
    """For everything impossible on this machine, the plainest cell of every row that shows it."""
    every = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
    return [
        (why, row, shown)
        for why, applies in IMPOSSIBLE.items()
        for row in ROWS
        if (shown := next((choice for choice in every if applies(row, choice)), None))
    ]


def without_weighter(row: EngineConfig, choice: Choice) -> tuple[str, Cell]:
    """The same training with the plain sum of the losses and nothing of ours."""
    return row.engine, replace(cell(row, choice), method=None, options={})


# ---- the command -------------------------------------------------------------------------------------------------


def known(file: Path | None) -> list[Result]:
    """The results of earlier calls."""
    if file is None or not file.exists():
        return []
    return [Result(**json.loads(line)) for line in file.read_text().splitlines()]


def line(cells: Iterable[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def summary(results: Sequence[Result]) -> str:
    """Right cells of all, and the largest difference."""
    right = sum(result.wrong is None for result in results)
    return f"{right}/{len(results)} {max(result.worst for result in results):.0e}" if results else "–"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the matrix and prints it; the exit code is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.distributed.engines",
        description="Trains every cell of the matrix and compares it with one process on the whole batch. Prints a "
        "table as it goes on, and exits with 1 if a cell is wrong.",
        epilog="Options that choose cells can be given several times; without them all cells run.",
    )
    parser.add_argument(
        "--pairwise", action="store_true", help="only the part that the tests run: all pairs of choices"
    )
    parser.add_argument("--row", action="append", default=[], metavar="TEXT", help="only rows whose name holds TEXT")
    for name, what in MEANINGS.items():
        found = ", ".join(repr(choice) if choice == "" else str(choice) for choice in CHOICES[name])
        parser.add_argument(f"--{name}", action="append", default=[], metavar="X", help=f"only this {what}: {found}")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="keep results in FILE; those in it are not run again"
    )
    parser.add_argument(
        "--sabotage",
        choices=list(SABOTAGES),
        default="none",
        help="break the library on purpose, so that cells must be wrong (default: %(default)s)",
    )
    given = parser.parse_args(arguments)
    if given.results and given.sabotage != "none":
        parser.error("results of a broken library are not kept")

    rows = [row for row in ROWS if not given.row or any(text in row.name for text in given.row)]
    part = pairwise(rows) if given.pairwise else full(rows)
    for name in CHOICES:
        if allowed := getattr(given, name):
            part = {row: [c for c in found if str(c[name]) in allowed] for row, found in part.items()}
    began = time.monotonic()
    earlier = {(result.row, str(result.choice)): result for result in known(given.results)}
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        left = [choice for row, found in part.items() for choice in found if (row, str(choice)) not in earlier]
        ones = references(map(reference, left), folder) if left else {}
        print(line(["", *PRECISIONS]))
        print(line(["---"] * (1 + len(PRECISIONS))))
        for row in rows:
            shown = [row.name]
            for precision in PRECISIONS:
                wanted = [choice for choice in part[row.name] if choice["precision"] == precision]
                here = [earlier[row.name, str(c)] for c in wanted if (row.name, str(c)) in earlier]
                fresh = [(row, c) for c in wanted if (row.name, str(c)) not in earlier]
                for result in run(fresh, ones, folder, given.sabotage):
                    here.append(result)
                    if given.results:
                        with given.results.open("a") as file:
                            file.write(json.dumps(asdict(result)) + "\n")
                shown.append(summary(here))
                results += here
            print(line(shown), flush=True)
    print("\nRight cells of all, and the largest relative difference from one process on the whole batch.")
    for name, (limit, reason) in TOLERANCES.items():
        print(f"- {name}: right below {limit:.0e}: {reason}")
    print("\nNot in the matrix, since it fails without a weighter too:")
    for why, shown in itertools.groupby(controls(), key=lambda control: control[0]):
        print(f"- {why} ({'; '.join(row.name for _, row, _ in shown)})")
    wrong = [result for result in results if result.wrong is not None]
    for result in wrong:
        print(f"WRONG {result.row}, {result.choice}: {result.wrong}")
    print(f"\n{len(results)} cells, {len(wrong)} wrong, {time.monotonic() - began:.0f} s")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
