"""One thing broken on purpose must turn the comparison of `test_invariance` red, by far."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest

from accel_weighting import CoVWeighting, GradNorm, RotoGrad
from tests.ranks import RanksFailed, run_ranks
from tests.sabotage import (
    factors_not_removed,
    gram_divided_by_M,
    mean_of_local_norms,
    no_all_reduce,
    no_all_reduce_and_nobody_notices,
    step_per_micro_batch,
)
from tests.scenarios import Cell, Run, difference, train, train_all

TOLERANCE = 1e-12  # of test_invariance
FAR = 1e-3


@dataclass(frozen=True)
class Control:
    """A sabotage, the run in which it shows, and where."""

    sabotage: Callable[[], Any]
    cell: Cell
    shows: tuple[str, ...]
    blind: tuple[str, ...] = ()  # where it does not show, so that comparing only that would prove nothing


GRADNORM = Cell(GradNorm(alpha=1.0, lr=0.05), micro=2)
COV = Cell(CoVWeighting(), micro=2)
ROTOGRAD = Cell(RotoGrad(lr=0.3, burn_in=2), micro=2)
CONTROLS = {
    "mean of local norms": Control(mean_of_local_norms, GRADNORM, ("norms",), ("losses",)),
    "GradNorm per micro-batch": Control(step_per_micro_batch, GRADNORM, ("weights",)),
    "CoV per micro-batch": Control(step_per_micro_batch, COV, ("weights",)),
    "RotoGrad per micro-batch": Control(step_per_micro_batch, ROTOGRAD, ("weights",)),
    "Gram divided by M": Control(gram_divided_by_M, GRADNORM, ("norms", "gram")),
    "no all-reduce": Control(no_all_reduce_and_nobody_notices, COV, ("losses", "weights")),
    "no all-reduce, GradNorm": Control(no_all_reduce_and_nobody_notices, GRADNORM, ("norms", "gram")),
    "factors not removed": Control(factors_not_removed, GRADNORM, ("norms", "gram"), ("losses",)),
}
HONEST = [GRADNORM, COV, ROTOGRAD]


def train_broken(engine: str, controls: list[Control | Cell]) -> list[Run]:
    runs = []
    for control in controls:
        sabotage, cell = (nullcontext, control) if isinstance(control, Cell) else (control.sabotage, control.cell)
        with sabotage():
            runs.append(train(engine, cell))
    return runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    cells = [replace(cell, micro=1) for cell in HONEST]
    runs = run_ranks(train_all, 1, tmp_path_factory.mktemp("one"), "plain", cells)[0]
    return dict(zip((repr(cell) for cell in HONEST), runs, strict=True))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Run]]:
    """What each process saw, by control; the honest runs last, by their cell."""
    what: list[Any] = [*CONTROLS.values(), *HONEST]
    names = [*CONTROLS, *map(repr, HONEST)]
    ranks = run_ranks(train_broken, 2, tmp_path_factory.mktemp("two"), "ddp", what, timeout=120)
    return [dict(zip(names, runs, strict=True)) for runs in ranks]


@pytest.mark.parametrize("cell", HONEST, ids=lambda cell: type(cell.method).__name__)
def test_without_sabotage_the_same_comparison_is_green(cell: Cell, whole, broken) -> None:
    assert difference(broken[0][repr(cell)], whole[repr(cell)]) < TOLERANCE


@pytest.mark.parametrize("name", CONTROLS)
def test_the_comparison_sees(name: str, whole, broken) -> None:
    control = CONTROLS[name]
    run, one = broken[0][name], whole[repr(control.cell)]
    for field in control.shows:
        assert difference(run, one, [field]) > FAR, field
    for field in control.blind:
        assert difference(run, one, [field]) < FAR, field


def test_a_gram_matrix_scaled_by_the_number_of_blocks_moves_no_weight(whole, broken) -> None:
    """Why the statistics themselves are compared: GradNorm on Adam does not feel a common factor."""
    assert difference(broken[0]["Gram divided by M"], whole[repr(GRADNORM)], ["weights"]) < 1e-6


def test_without_the_all_reduce_the_processes_drift_apart(broken) -> None:
    for name in ("no all-reduce", "no all-reduce, GradNorm"):
        assert difference(broken[0][name], broken[1][name], ["losses"]) > FAR
    assert difference(broken[0]["no all-reduce"], broken[1]["no all-reduce"], ["weights"]) > FAR


def test_the_processes_notice_themselves_that_nothing_was_summed(tmp_path) -> None:
    with pytest.raises(
        RanksFailed, match="process 0 of 2 failed: RuntimeError: The processes no longer agree"
    ) as caught:
        run_ranks(train_broken, 2, tmp_path, "ddp", [Control(no_all_reduce, COV, ())], timeout=20)
    assert "process 1 of 2 failed: RuntimeError: The processes no longer agree at step 0" in str(caught.value)
