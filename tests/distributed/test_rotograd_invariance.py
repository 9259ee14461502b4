"""The promise for RotoGrad: moments, rotations and weights depend on the global batch alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from accel_weighting import RotoGrad, RotoGradNorm, Smooth, Statistics, Weighter
from accel_weighting.rotations import Rotations
from accel_weighting.window import Sums
from tests.ranks import accelerator_for, run_ranks
from tests.scenarios import Cell, Run, assert_ranks_agree, difference, full_parameters, train
from tests.small import WIDTH, Net, batch, names, task_losses

FIELDS = ("losses", "norms", "gram", "weights", "moments", "rotations")
ROTOGRAD = RotoGrad(init="haar", burn_in=2)
F32 = {"dtype": torch.float32, "steps": 10}

EQUAL = {
    "heads": Cell(ROTOGRAD),
    "branch": Cell(ROTOGRAD, route="branch"),
    "heads as units": Cell(ROTOGRAD, fsdp_heads=True),
    "from the identity, normalised": Cell(RotoGrad(normalize_losses=True, burn_in=2)),
    "part, cooperative": Cell(RotoGrad(size=3, init="haar", cooperative_after=1)),
    "large steps": Cell(RotoGrad(lr=0.5)),
    "rotogradnorm": Cell(RotoGradNorm(1.5, weights_lr=0.1, init="haar")),
    "wrapped": Cell(Smooth(ROTOGRAD, 0.5), tasks=2),
    "float32": Cell(ROTOGRAD, **F32),
    "float32, branch": Cell(RotoGrad(lr=0.5), route="branch", **F32),
}
AT_ONCE = Cell(ROTOGRAD, options={"lag": 0})  # a micro-batch decides: by definition not invariant to their number

# Blocks that differ, on a model that is kept still: the engines apply the mean of the blocks' means to it.
SIZES = (1, 11, 5, 3, 9, 7)
UNEQUAL = {
    "counted": Cell(ROTOGRAD, micro=6, lr=0.0, sizes=SIZES, counts=True),
    "not counted": Cell(ROTOGRAD, micro=6, lr=0.0, sizes=SIZES),
    "counted, cooperative": Cell(RotoGrad(cooperative_after=1), micro=6, lr=0.0, sizes=SIZES, counts=True),
    "absent": Cell(ROTOGRAD, micro=6, lr=0.0, absent=((1, 4, "t1"), *((2, block, "t0") for block in range(6)))),
}


EVERYWHERE = pytest.mark.parametrize(("engine", "world"), [("ddp", 2), ("ddp", 3), ("fsdp2", 2), ("fsdp2", 3)])


def cells_of(world: int) -> dict[tuple[str, int], Cell]:
    """By name and number of micro-batches."""
    routes = ("heads", "branch", "heads as units")
    equal = [(name, micro) for name in EQUAL for micro in ((1, 2, 3) if name in routes else (2,))]
    return {
        **{(name, micro): replace(EQUAL[name], micro=micro) for name, micro in equal},
        **{(name, 6 // world): replace(cell, micro=6 // world) for name, cell in UNEQUAL.items()},
        ("at once", 1): AT_ONCE,
    }


def train_rotating(engine: str, cells: Sequence[Cell], sabotaged: bool = False) -> list[Run]:
    """Runs that also know the moments and rotations of every step."""
    return [_train(engine, cell, sabotaged) for cell in cells]


def _train(engine: str, cell: Cell, sabotaged: bool) -> Run:
    moments: list[Tensor] = []
    rotations: list[Tensor] = []
    step = Weighter.step

    def recorded(self: Weighter) -> None:
        before = self._progress.step
        step(self)
        if self._progress.step > before:
            moments.append(self.statistics.moments)
            rotations.append(torch.stack(list(self.rotations.values())).double())

    with patch.object(Weighter, "step", recorded), per_micro_batch() if sabotaged else nullcontext():
        run: Any = train(engine, cell)
    run.moments, run.rotations = moments, rotations
    return run


@contextmanager
def per_micro_batch() -> Iterator[None]:
    """The sabotage: every micro-batch is normalised by itself, and the steps' average is taken."""
    products, statistics = Rotations.cross_products, Sums.statistics

    def normalised(self: Rotations, rows: Any, c: Tensor, z: Tensor | None) -> Tensor:
        n = torch.stack([g.norm() for g in rows]) / c
        k, j = torch.triu_indices(len(rows), len(rows), 1)
        return products(self, rows, c, z) / (n[k] * n[j])[:, None, None]

    def averaged(self: Sums) -> Statistics:
        s = statistics(self)
        assert s.norms is not None and s.moments is not None
        k, j = np.triu_indices(len(s.norms), 1)
        return replace(s, moments=s.moments * torch.from_numpy(s.norms[k] * s.norms[j])[:, None] * s.micro_batches)

    with patch.object(Rotations, "cross_products", normalised), patch.object(Sums, "statistics", averaged):
        yield


def everything(engine: str, cells: Sequence[Cell], folder: str) -> dict[str, Any]:
    """All that one launch is asked for."""
    found: dict[str, Any] = {"runs": train_rotating(engine, cells), "folds": fold_all(engine)}
    if engine == "ddp":
        found["sabotaged"] = train_rotating(engine, [Cell(ROTOGRAD)], sabotaged=True)[0]
        saves = accelerator_for("ddp").num_processes == 2
        found["through"] = resume(folder, range(STEPS), save=True) if saves else None
        found["resumed"] = resume(folder, range(SAVE, STEPS))
    else:
        found["flattened"] = fold_flattened()
    return found


def alone(cells: Sequence[Cell], sabotaged: Sequence[Cell]) -> list[Run]:
    return train_rotating("plain", cells) + train_rotating("plain", sabotaged, sabotaged=True)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[dict[str, Any]]]:
    """What every process of an engine and a number of processes found; each launched once."""
    path = tmp_path_factory.mktemp("several")

    @functools.cache
    def launch(engine: str, world: int) -> list[dict[str, Any]]:
        if (engine, world) == ("ddp", 3):
            launch("ddp", 2)  # saves what this one resumes
        return run_ranks(everything, world, path, engine, list(cells_of(world).values()), f"{path}/saved", timeout=300)

    return launch


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every cell on one process: equal blocks as the whole batch, unequal ones as they are."""
    cells = {**EQUAL, **UNEQUAL, "at once": AT_ONCE, "whole": replace(UNEQUAL["counted"], micro=1, sizes=None)}
    sabotaged = {"sabotaged": Cell(ROTOGRAD), "sabotaged, cut": Cell(ROTOGRAD, micro=3)}
    path = tmp_path_factory.mktemp("one")
    runs = run_ranks(alone, 1, path, list(cells.values()), list(sabotaged.values()), timeout=120)[0]
    return dict(zip([*cells, *sabotaged], runs, strict=True))


def test_in_one_process_there_is_something_to_compare(whole: dict[str, Run]) -> None:
    for name, run in whole.items():
        assert (run.rotations[-1] - run.rotations[0]).abs().max() > 1e-3, name
        assert run.moments[0].abs().max() > 1e-4, name
        if "rotogradnorm" not in name:
            assert run.weights[-1].max() / run.weights[-1].min() > 2, name


@EVERYWHERE
def test_any_cut_gives_the_same_moments_rotations_and_weights(engine: str, world: int, whole, launched) -> None:
    cells = cells_of(world)
    ranks = [found["runs"] for found in launched(engine, world)]
    for i, ((name, micro), cell) in enumerate(cells.items()):
        run, one = ranks[0][i], whole[name]
        single = cell.dtype == torch.float32
        assert run.world == world and ("FSDP" in run.distributed_type) == (engine == "fsdp2")
        assert run.micro_batches == [world * micro] * cell.steps
        assert difference(run, one, ["weights", "rotations"]) < (1e-5 if single else 1e-12), (name, micro)
        assert difference(run, one, FIELDS) < (1e-4 if single else 1e-12), (name, micro)
        for key, value in one.parameters.items():
            rtol, atol = (1e-4, 1e-6) if single else (1e-11, 1e-13)
            torch.testing.assert_close(run.parameters[key], value, rtol=rtol, atol=atol)
        assert run.collectives == cell.steps * (2 if name == "at once" else 1)
        assert_ranks_agree([rank[i] for rank in ranks])
        for rank in ranks[1:]:
            for field in ("moments", "rotations"):
                assert all(torch.equal(a, b) for a, b in zip(getattr(run, field), getattr(rank[i], field), strict=True))


def test_counts_make_unequal_blocks_the_whole_batch(whole: dict[str, Run]) -> None:
    assert difference(whole["counted"], whole["whole"], FIELDS) < 1e-12
    assert difference(whole["not counted"], whole["whole"], ["moments"]) > 1e-2
    assert difference(whole["not counted"], whole["whole"], ["rotations"]) > 1e-4


def test_an_absent_task_keeps_its_rotation(whole: dict[str, Run]) -> None:
    R = whole["absent"].rotations
    assert torch.equal(R[2][0], R[1][0]) and not torch.equal(R[2][1], R[1][1])
    assert not torch.equal(R[3][0], R[2][0])


def test_normalising_every_micro_batch_by_itself_is_seen(whole: dict[str, Run], launched) -> None:
    assert difference(whole["sabotaged"], whole["heads"], FIELDS) < 1e-12  # right for a single block
    assert difference(whole["sabotaged, cut"], whole["heads"], ["rotations"]) > 1e-4
    assert difference(launched("ddp", 2)[0]["sabotaged"], whole["heads"], ["rotations"]) > 1e-4


def overflowing() -> list[Any]:
    """Four steps on leaves; in step 1, on the last process alone, a product of gradient and feature leaves float32.

    Losses are 0 and gradients all 1e10, so that nothing but the cooperative moment is out of range.
    """
    accelerator = accelerator_for("ddp")
    last = accelerator.process_index == accelerator.num_processes - 1
    weighter = Weighter(RotoGrad(cooperative_after=0), names(2), accelerator=accelerator)
    found: list[Any] = []
    for step in range(4):
        z = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        z[0, 0] = 1e30 if last and step == 1 else 1.0
        aliases = weighter.branch(z.requires_grad_()).values()
        directions = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(step + 9)) + 2
        losses = [1e10 * ((r - r.detach()) @ u).sum() for r, u in zip(aliases, directions, strict=True)]
        weighter.backward(dict(zip(names(2), losses, strict=True)))
        weights = torch.tensor(list(weighter.weights.values()))
        found.append((weights, torch.stack(list(weighter.rotations.values())), weighter.log_values()))
    weighter.detach()
    return found


def test_a_moment_that_is_not_finite_on_one_process_holds_the_rotations_on_all(tmp_path) -> None:
    ranks = run_ranks(overflowing, 2, tmp_path)
    for steps in zip(*ranks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(steps[0][:2], steps[1][:2], strict=True))
    R, skipped = [step[1] for step in ranks[0]], [step[2]["weighting/skipped_steps"] for step in ranks[0]]
    assert torch.equal(R[1], R[0]) and skipped == [0, 1, 1, 1]
    assert all((a - b).abs().max() > 1e-4 for a, b in ((R[2], R[1]), (R[3], R[2])))


# ---- saved and taken up ----------------------------------------------------------------------------------------------

SAVED = RotoGrad(init="haar", burn_in=5, cooperative_after=4)  # both after the save
SAVE, STEPS = 3, 7


def resume(folder: str, steps: range, save: bool = False) -> dict[str, Tensor]:
    """Trains over ``steps`` on the processes that are there, from what ``folder`` holds unless it begins at 0."""
    accelerator = accelerator_for("ddp")
    world, rank = accelerator.num_processes, accelerator.process_index
    torch.manual_seed(steps.start)  # other parameters, so that only the checkpoint can make the runs alike
    inner = Net(names(3)).double()
    model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=1e-3))
    weighter = Weighter(SAVED, names(3), accelerator=accelerator, heads=dict(inner.heads))
    if steps.start:
        accelerator.load_state(folder)
    for step in steps:
        x, y = batch(step, 3, torch.float64)
        rows = slice(rank * 36 // world, (rank + 1) * 36 // world)
        weighter.backward(task_losses(model(x[rows]), y[rows]))
        optimizer.step()
        optimizer.zero_grad()
        if save and step + 1 == SAVE:
            accelerator.save_state(folder)
    state = weighter.state_dict()
    weighter.detach()
    kept = {f"state.{key}": value for key, value in state["state"].items()}
    kept |= {key: p.detach().clone() for key, p in inner.named_parameters()}
    return kept | {"weights": state["weights"], "step": torch.tensor(state["step"])}


def test_checkpoint_of_rotations_resumes_bitwise_and_on_another_number_of_processes(launched) -> None:
    ranks = launched("ddp", 2)
    through = ranks[0]["through"]
    assert through["step"] == STEPS and through["state.updates"] == STEPS
    for run in (ranks[0]["resumed"], ranks[1]["through"], ranks[1]["resumed"]):
        assert run.keys() == through.keys()
        assert all(torch.equal(run[key], through[key]) for key in through)
    for rank in launched("ddp", 3):
        for key, value in through.items():
            torch.testing.assert_close(rank["resumed"][key].double(), value.double(), rtol=1e-12, atol=1e-13)


# ---- folded ----------------------------------------------------------------------------------------------------------


def fold_on(engine: str, size: int | None, units: list[str], whole: bool) -> dict[str, Any]:
    """Trains two steps, evaluates, tries a fold that fails, trains a step, folds, evaluates, and gathers the model.

    With ``whole``, FSDP2's root is as an evaluation leaves it, its parameters whole; they are a copy, and what is done
    to them is lost.
    """
    accelerator = accelerator_for(engine, fsdp={"transformer_cls_names_to_wrap": units})
    world, rank = accelerator.num_processes, accelerator.process_index
    torch.manual_seed(0)
    inner = Net(names(2)).double()
    model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=1e-3))
    inner = accelerator.unwrap_model(model)
    method = RotoGrad(init="haar", size=size)
    weighter = Weighter(method, names(2), accelerator=accelerator, heads=dict(inner.heads))

    def train_step(step: int) -> None:
        x, y = batch(step, 2, torch.float64)
        rows = slice(rank * 36 // world, (rank + 1) * 36 // world)
        weighter.backward(task_losses(model(x[rows]), y[rows]))
        optimizer.step()
        optimizer.zero_grad()

    def evaluate() -> Tensor:
        model.eval()
        with torch.no_grad():
            outputs = torch.stack(list(model(batch(9, 2, torch.float64)[0]).values()))
        model.train()
        return outputs

    def in_pieces() -> None:
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()

    train_step(0)
    train_step(1)
    evaluate()
    old = full_parameters(inner, model)
    refused = ""
    try:
        weighter.fold_rotations(heads={"t0": inner.heads["t0"], "t1": inner.blocks[0]})
    except RuntimeError as error:
        refused = str(error)
    untouched = all(torch.equal(old[key], value) for key, value in full_parameters(inner, model).items())
    train_step(2)
    before, unfolded, rotations = evaluate(), full_parameters(inner, model), weighter.rotations
    if not whole:
        in_pieces()
    weighter.fold_rotations()
    in_pieces()
    folded = full_parameters(inner, model)
    after = evaluate()
    plain = Net(names(2)).double()
    plain.load_state_dict(folded)
    with torch.no_grad():
        shipped = torch.stack(list(plain(batch(9, 2, torch.float64)[0]).values()))
    found = {"before": before, "after": after, "shipped": shipped, "refused": refused, "untouched": untouched}
    return found | {"unfolded": unfolded, "folded": folded, "rotations": rotations}


def fold_all(engine: str) -> list[dict[str, Any]]:
    own = ["Block", "Head"]
    ways = ((None, ["Block"], True), (3, ["Block"], False), (3, own, True), (None, own, False))
    return [fold_on(engine, *way) for way in (ways if engine == "fsdp2" else ways[:1])]


@EVERYWHERE
def test_rotations_are_folded_into_sharded_heads(engine: str, world: int, launched) -> None:
    """A head has 4 rows over 2 or 3 processes, its last Linear 1: some processes hold none."""
    for rank in launched(engine, world):
        for run in rank["folds"]:
            assert "task `t1` cannot be folded" in run["refused"] and run["untouched"]
            torch.testing.assert_close(run["after"], run["before"], rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(run["shipped"], run["before"], rtol=1e-12, atol=1e-13)
            for key, value in run["unfolded"].items():
                if not key.endswith("inner.weight") or not key.startswith("heads"):
                    assert torch.equal(run["folded"][key], value), key
                    continue
                R = run["rotations"][key.split(".")[1]]
                expected = torch.cat([value[:, : len(R)] @ R, value[:, len(R) :]], 1)
                torch.testing.assert_close(run["folded"][key], expected, rtol=1e-13, atol=1e-15)
                assert (expected - value).abs().max() > 0.05


def fold_flattened() -> str:
    accelerator = accelerator_for("fsdp1", fsdp={"transformer_cls_names_to_wrap": ["Block"]})
    torch.manual_seed(0)
    inner = Net(names(2)).double()
    model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=1e-3))
    inner = accelerator.unwrap_model(model)
    weighter = Weighter(RotoGrad(init="haar"), names(2), accelerator=accelerator, heads=dict(inner.heads))
    x, y = batch(0, 2, torch.float64)
    weighter.backward(task_losses(model(x), y))
    optimizer.step()
    try:
        weighter.fold_rotations(heads={task: head.inner for task, head in inner.heads.items()})
    except RuntimeError as error:
        return str(error)
    return ""


def test_weights_that_fsdp1_has_flattened_are_not_folded(launched) -> None:
    for rank in launched("fsdp2", 2):
        message = rank["flattened"]
        assert "(FSDP1 and ZeRO-3 cut weights anywhere). Load the saved full weights" in message
