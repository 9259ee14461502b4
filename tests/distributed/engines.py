"""The matrix: every engine, precision, accumulation, kind of checkpointing and compilation, in one table.

A `Row` is one configuration of an engine. Its cells train the same global batches as one process on the whole batch
does, and must see the same statistics, take the same weights and rotations and end with the same parameters, to a
tolerance that has its reason beside it. What torch or DeepSpeed cannot do without any weighter is listed in
`IMPOSSIBLE` and shown by a control.

    python -m tests.distributed.engines                              the whole matrix, as a table; about an hour
    python -m tests.distributed.engines --pairwise                   what the tests run: all pairs of two choices
    python -m tests.distributed.engines --row ZeRO --precision bf16  some of it
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from accel_weighting import CoVWeighting, GradNorm, Method, RotoGrad
from accel_weighting.methods.mgda import MGDA
from tests.ranks import RanksFailed, run_ranks
from tests.scenarios import Cell, Run, assert_ranks_agree, difference, train

# ---- rows: configurations of engines -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
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
    Row("DDP", "ddp"),
    Row("DDP find_unused", "ddp", setup={"ddp": {"find_unused_parameters": True}}),
    Row("DDP static_graph", "ddp", setup={"ddp": {"static_graph": True}}),
    Row("FSDP1", "fsdp1"),
    Row("FSDP1, heads are units", "fsdp1", fsdp_heads=True),
    Row("FSDP2", "fsdp2"),
    Row("FSDP2, heads are units", "fsdp2", fsdp_heads=True),
    Row("FSDP2 no reshard", "fsdp2", setup={"fsdp": {"reshard_after_forward": False}}),
    Row("FSDP2 own policy", "fsdp2", own_policy=True, fsdp_heads=True),
    Row("HSDP 2x2", "hsdp", world=4),
    Row("FSDP2 context parallel 2x2", "hsdp", world=4, setup={"mesh": {"cp_size": 2, "dp_shard_size": 2}}),
    Row("ZeRO-0", "zero0"),
    Row("ZeRO-1", "zero1"),
    Row("ZeRO-2", "zero2"),
    Row("ZeRO-3", "zero3"),
    # Small parameters are partitioned too, so that every head is a unit that gathers its own.
    Row("ZeRO-3, heads are units", "zero3", setup={"zero": {"stage3_param_persistence_threshold": 0}}),
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
Choice = dict[str, Any]

TOLERANCES = {
    "float64": (1e-12, "the same float64 numbers, added in another order"),
    "float32": (2e-5, "float32 sums in another order, over all steps"),
    "bf16": (3e-2, "8 bits: 0.4 % in every product, compared with float32"),
    "fp16": (4e-3, "11 bits: 0.05 % in every product, compared with float32"),
    "ZeRO float64": (2e-6, "ZeRO's own copy of the parameters is float32"),
}


def tolerance(row: Row, choice: Choice) -> float:
    """How far a cell may be from one process."""
    zero = row.engine in ("zero1", "zero2", "zero3")
    return TOLERANCES["ZeRO float64" if zero and choice["precision"] == "float64" else choice["precision"]][0]


def impossible(row: Row, choice: Choice) -> str | None:
    """Why torch or DeepSpeed cannot run this with or without a weighter; None where they can."""
    return next((why for why, applies in IMPOSSIBLE.items() if applies(row, choice)), None)


IMPOSSIBLE = {
    "static_graph counts the hooks of one backward, and breaks when it accumulates": lambda row, choice: (
        "static_graph" in row.name and choice["micro"] > 1
    ),
    "find_unused marks a parameter of a re-entrant checkpoint ready twice": lambda row, choice: (
        "find_unused" in row.name and choice["checkpoint"].endswith("reentrant")
    ),
    "DeepSpeed has no fp16 on a CPU": lambda row, choice: (
        row.engine.startswith("zero") and choice["precision"] == "fp16"
    ),
    "DeepSpeed reduces float64 in ZeRO's stages only": lambda row, choice: (
        row.engine == "zero0" and choice["precision"] == "float64"
    ),
}


def cell(row: Row, choice: Choice) -> Cell:
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
    )


def reference(choice: Choice) -> Choice:
    """The choice that one process makes: the whole batch, nothing recomputed or compiled, at the model's precision."""
    full = "float64" if choice["precision"] == "float64" else "float32"
    micro = choice["micro"] if choice["method"].endswith("lag 0") else 1  # lag 0 sees micro-batches by definition
    return {**choice, "precision": full, "micro": micro, "checkpoint": "", "compile": False}


def choices(row: Row) -> list[Choice]:
    """Everything that a row can do."""
    found = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
    return [choice for choice in found if impossible(row, choice) is None]


def pairwise(rows: Sequence[Row]) -> dict[str, list[Choice]]:
    """A small part of the matrix in which every two choices (a row is one, too) meet at least once."""

    bits: dict[tuple[Any, ...], int] = {}  # of every pair

    def pairs(row: Row, choice: Choice) -> int:
        found = itertools.combinations([("row", row.name), *choice.items()], 2)
        return sum(bits.setdefault(pair, 1 << len(bits)) for pair in found)

    open_cells = [(row, choice, pairs(row, choice)) for row in rows for choice in choices(row)]
    missing = (1 << len(bits)) - 1
    taken: dict[str, list[Choice]] = {row.name: [] for row in rows}
    while missing:
        row, choice, mask = max(open_cells, key=lambda c: ((c[2] & missing).bit_count(), not c[1]["compile"]))
        missing &= ~mask
        taken[row.name].append(choice)
    return taken


def full(row: Row) -> list[Choice]:
    """Everything but most of what is compiled, which takes seconds where the rest takes a tenth of one."""
    return [c for c in choices(row) if not c["compile"] or (c["micro"] == 1 and c["checkpoint"] in ("", "join"))]


# ---- running -----------------------------------------------------------------------------------------------------


def run_cells(cells: Sequence[tuple[str, Cell]]) -> list[Run | str]:
    """Many cells, each with its engine, in one launch; an error's text where a cell fails."""
    runs: list[Run | str] = []
    for engine, one in cells:
        compiled = "dynamo_backend" in one.setup
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        try:
            runs.append(train(engine, one))
            if compiled and not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
                runs[-1] = "nothing was compiled"
        except Exception as error:
            runs.append(f"{type(error).__name__}: {error}")
    return runs


def references(wanted: Iterable[Choice], folder: str) -> dict[str, Run]:
    """One process on the whole batch, for each of the choices; by the text of the choice."""
    unique = {str(choice): choice for choice in wanted}
    cells = [("plain", cell(Row("", "plain"), choice)) for choice in unique.values()]
    runs = run_ranks(run_cells, 1, folder, cells, timeout=600)[0]
    for name, run in zip(unique, runs, strict=True):
        assert isinstance(run, Run), f"one process: {name}: {run}"
    return dict(zip(unique, runs, strict=True))  # type: ignore[arg-type]


def verdict(row: Row, choice: Choice, ranks: Sequence[Run | str], one: Run) -> tuple[float, str | None]:
    """How far a cell is from one process, and what is wrong with it."""
    runs = [run for run in ranks if isinstance(run, Run)]
    if len(runs) < len(ranks):
        return float("inf"), next(text for text in ranks if isinstance(text, str)).strip().splitlines()[0]
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

    row: Row
    choice: Choice
    worst: float
    wrong: str | None


def run(part: Sequence[tuple[Row, Choice]], ones: dict[str, Run], folder: str) -> Iterator[Result]:
    """One launch for all cells, whose rows have the same number of processes."""
    if not part:
        return
    cells = [(row.engine, cell(row, choice)) for row, choice in part]
    try:
        ranks = run_ranks(run_cells, part[0][0].world, folder, cells, timeout=120 + 20 * len(cells))
    except RanksFailed as failure:
        ranks = [[str(failure)] * len(cells)] * part[0][0].world
    for i, (row, choice) in enumerate(part):
        yield Result(row, choice, *verdict(row, choice, [rank[i] for rank in ranks], ones[str(reference(choice))]))


def controls() -> list[tuple[str, Row, Choice]]:
    """For everything impossible, the plainest cell of the first row that shows it."""
    found = []
    for why, applies in IMPOSSIBLE.items():
        for row in ROWS:
            every = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
            if shown := next((choice for choice in every if applies(row, choice)), None):
                found.append((why, row, shown))
                break
    return found


def without_weighter(row: Row, choice: Choice) -> Cell:
    """The same training with the plain sum of the losses and nothing of ours."""
    return replace(cell(row, choice), method=None, options={})


# ---- the command -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the matrix and prints it; the exit code is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.distributed.engines",
        description="Trains every cell of the matrix and compares it with one process on the whole batch.",
    )
    parser.add_argument("--pairwise", action="store_true", help="only the part that the tests run")
    parser.add_argument("--row", action="append", default=[], metavar="TEXT", help="only rows whose name holds TEXT")
    for name in CHOICES:
        parser.add_argument(f"--{name}", action="append", default=[], metavar="TEXT", help=f"only this {name}")
    given = parser.parse_args(arguments)

    rows = [row for row in ROWS if not given.row or any(text in row.name for text in given.row)]
    part = pairwise(rows) if given.pairwise else {row.name: full(row) for row in rows}
    for name in CHOICES:
        if allowed := getattr(given, name):
            part = {row: [c for c in found if str(c[name]) in allowed] for row, found in part.items()}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ones = references((reference(choice) for found in part.values() for choice in found), folder)
        results: list[Result] = []
        width = max(map(len, (row.name for row in rows)), default=0)
        print(f"{'':{width}}  " + "".join(f"{name:>18}" for name in PRECISIONS))
        for row in rows:
            print(f"{row.name:{width}}  ", end="", flush=True)
            for precision in PRECISIONS:
                wanted = [(row, choice) for choice in part[row.name] if choice["precision"] == precision]
                here = list(run(wanted, ones, folder))
                results += here
                right = sum(result.wrong is None for result in here)
                worst = max((result.worst for result in here), default=0.0)
                print(f"{f'{right}/{len(here)}  {worst:.0e}' if here else '–':>18}", end="", flush=True)
            print()
        print("\nright cells/cells, and the largest relative difference from one process on the whole batch")
        for name, (limit, reason) in TOLERANCES.items():
            print(f"  {name:12} {limit:.0e}  {reason}")
        print("\nNot in the matrix, since they fail without a weighter too:")
        for why, row, _ in controls():
            print(f"  {row.name}: {why}")
    wrong = [result for result in results if result.wrong is not None]
    for result in wrong:
        print(f"WRONG {result.row.name}, {result.choice}: {result.wrong}")
    print(f"\n{len(results)} cells, {len(wrong)} wrong, {time.monotonic() - began:.0f} s")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
