"""The promise for every method: two processes with two micro-batches each follow one process on the whole batch."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch
import torchjd.aggregation as tj

import accel_weighting
from accel_weighting import Method, TorchJDWeighting
from tests.methods.catalogue import CATALOGUE
from tests.ranks import run_ranks
from tests.scenarios import Cell, Run, assert_ranks_agree, difference, names, train_all


@dataclass(frozen=True)
class Case:
    """A method and how far its weights may be from those of one process, and why if that is not rounding."""

    method: Method
    tolerance: float = 1e-12
    reason: str = ""
    moves: bool = True  # whether the weights change within the run


CASES = {row.id: Case(row.build(names(3)), moves=row.moves) for row in CATALOGUE}
TORCHJD = {
    "AlignedMTLWeighting": Case(TorchJDWeighting(tj.AlignedMTLWeighting())),
    "CAGradWeighting": Case(TorchJDWeighting(tj.CAGradWeighting(c=0.4))),
    "CRMOGMWeighting": Case(TorchJDWeighting(tj.CRMOGMWeighting(tj.UPGradWeighting(), alpha=0.5))),
    "ConstantWeighting": Case(TorchJDWeighting(tj.ConstantWeighting(torch.tensor([1.0, 2.0, 3.0]))), moves=False),
    "DualProjWeighting": Case(TorchJDWeighting(tj.DualProjWeighting())),
    "FairGradWeighting": Case(
        TorchJDWeighting(tj.FairGradWeighting(alpha=1.0)), 1e-9, "SciPy's least squares, which end at its ftol of 1e-8"
    ),
    "GradVacWeighting": Case(TorchJDWeighting(tj.GradVacWeighting())),
    "IMTLGWeighting": Case(TorchJDWeighting(tj.IMTLGWeighting())),
    "KrumWeighting": Case(TorchJDWeighting(tj.KrumWeighting(n_byzantine=0)), moves=False),
    "MGDAWeighting": Case(TorchJDWeighting(tj.MGDAWeighting())),
    "MeanWeighting": Case(TorchJDWeighting(tj.MeanWeighting()), moves=False),
    "PCDWeighting": Case(TorchJDWeighting(tj.PCDWeighting())),
    "PCGradWeighting": Case(TorchJDWeighting(tj.PCGradWeighting())),
    "RandomWeighting": Case(TorchJDWeighting(tj.RandomWeighting())),
    "SumWeighting": Case(TorchJDWeighting(tj.SumWeighting()), moves=False),
    "UPGradWeighting": Case(TorchJDWeighting(tj.UPGradWeighting())),
}
ALL = CASES | TORCHJD


def test_every_exported_method_is_here() -> None:
    exported = [getattr(accel_weighting, name) for name in accel_weighting.__all__]
    methods = {x for x in exported if isinstance(x, type) and issubclass(x, Method)} - {Method}
    assert {type(case.method) for case in ALL.values()} == methods


def test_every_weighting_of_torchjd_that_takes_a_gramian_is_here() -> None:
    from accel_weighting.methods.torchjd import _NOT_GRAMIAN

    found = {
        name
        for name, x in vars(tj).items()
        if inspect.isclass(x) and issubclass(x, tj.Weighting) and not inspect.isabstract(x) and name[0] != "_"
    }
    found -= {"Weighting", "GramianWeighting", "MatrixWeighting"}  # what they are built from
    assert set(TORCHJD) == found - _NOT_GRAMIAN


def cells(micro: int) -> list[Cell]:
    return [Cell(case.method, steps=5, micro=micro) for case in ALL.values()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every method on one process and the whole batch."""
    runs = run_ranks(train_all, 1, tmp_path_factory.mktemp("one"), "plain", cells(1), timeout=300)[0]
    return dict(zip(ALL, runs, strict=True))


def test_the_methods_do_something(reference: dict[str, Run]) -> None:
    """Else their invariance would show nothing."""
    still = []
    for name, case in ALL.items():
        run = reference[name]
        moved = any((a - b).abs().max() > 1e-6 for a, b in zip(run.weights[:-1], run.weights[1:], strict=True))
        still += [name] if moved != case.moves else []
        for R in rotations(run).values():
            still += [f"{name}: rotations"] if (R - R[0]).abs().max() < 1e-3 else []
    assert not still


def rotations(run: Run) -> dict[str, torch.Tensor]:
    return {key: value for key, value in run.state.items() if key.rpartition(".")[2] == "rotations"}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_follow_one(engine: str, reference: dict[str, Run], tmp_path) -> None:
    ranks = run_ranks(train_all, 2, tmp_path, engine, cells(2), timeout=300)
    far = {}
    for i, (name, case) in enumerate(ALL.items()):
        run, one = ranks[0][i], reference[name]
        assert run.world == 2 and ("FSDP" in run.distributed_type) == (engine == "fsdp2")
        assert run.collectives == len(run.statistics_steps) == 5, f"{name}: not one collective per step"
        assert_ranks_agree([rank[i] for rank in ranks])
        distances = {
            "statistics": (difference(run, one, ["losses", "norms", "gram"]), 1e-12),
            "weights": (difference(run, one, ["weights"]), case.tolerance),
            "parameters": (distance(run.parameters, one.parameters), 1e-11),
        }
        if rotations(one):
            distances["rotations"] = distance(rotations(run), rotations(one)), 1e-12
        far |= {(name, what): found for what, (found, limit) in distances.items() if not found < limit}
    assert not far


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to each tensor's largest entry."""
    assert a.keys() == b.keys()
    return max(((a[key] - b[key]).abs().max() / b[key].abs().max()).item() for key in b)
