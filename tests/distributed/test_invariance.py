"""The promise: statistics and weights depend on the global batch alone, not on how it was cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accel_weighting import CoVWeighting, EqualWeighting, GradNorm, Smooth
from tests.ranks import run_ranks
from tests.scenarios import Cell, Run, assert_ranks_agree, difference, net, train_all

GRADNORM = GradNorm(alpha=1.0, lr=0.05)
CUTS = [("plain", 1, 3), ("ddp", 2, 2), ("ddp", 3, 1), ("fsdp2", 2, 1)]  # the short run's
CUTS += [("plain", 1, 2), ("ddp", 2, 1), ("ddp", 3, 3), ("fsdp2", 2, 3), ("fsdp2", 3, 2)]

EQUAL = {
    "gradnorm heads": Cell(GRADNORM),
    "gradnorm names": Cell(GRADNORM, route="names"),
    "gradnorm branch": Cell(GRADNORM, route="branch"),
    "gradnorm shared layer": Cell(GRADNORM, route="shared_layer"),
    "gradnorm sgd": Cell(GradNorm(alpha=0.5, lr=1e-4, optimizer="sgd")),
    "gradnorm decay": Cell(GradNorm(alpha=1.0, initial_loss_decay=0.9, tasks=("t0", "t2"))),
    "gradnorm smooth": Cell(Smooth(GRADNORM, 0.5)),
    "cov": Cell(CoVWeighting()),
    "cov decay": Cell(CoVWeighting(decay=0.9, total="tasks")),
    "equal": Cell(EqualWeighting()),
    "one task": Cell(GRADNORM, tasks=1),
    "two tasks": Cell(GRADNORM, tasks=2),
    "seven tasks": Cell(GRADNORM, tasks=7),
    "built before prepare": Cell(GRADNORM, early=True),
    "built before prepare by name": Cell(GRADNORM, route="names", early=True),
    "every second step": Cell(GRADNORM, options={"update_every": 2, "update_after": 1}),
    "capped": Cell(GRADNORM, options={"max_losses": {"t2": 1e6}}),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every cell on one process and the whole batch."""
    runs = run_ranks(train_all, 1, tmp_path_factory.mktemp("one"), "plain", list(EQUAL.values()), timeout=120)[0]
    assert all(run.world == 1 for run in runs)
    return dict(zip(EQUAL, runs, strict=True))


@pytest.mark.parametrize(("engine", "world", "micro"), CUTS, ids=lambda x: str(x))
def test_any_cut_of_the_same_batch_gives_the_same_trajectory(
    engine: str, world: int, micro: int, reference: dict[str, Run], tmp_path
) -> None:
    cells = [replace(cell, micro=micro) for cell in EQUAL.values()]
    ranks = run_ranks(train_all, world, tmp_path, engine, cells, timeout=120)
    for i, name in enumerate(EQUAL):
        run, one = ranks[0][i], reference[name]
        assert run.world == world
        assert ("FSDP" in run.distributed_type) == (engine == "fsdp2")
        assert difference(run, one) < 1e-12, name
        assert run.micro_batches == [world * micro] * len(run.micro_batches)
        for key, value in one.parameters.items():
            torch.testing.assert_close(run.parameters[key], value, rtol=1e-11, atol=1e-13)
        measured = run.statistics_steps
        assert run.collectives == (len(measured) if world > 1 else 0), f"{name}: not one collective per update"
        assert_ranks_agree([rank[i] for rank in ranks])


def test_the_trajectory_is_that_of_a_loop_written_by_hand(reference: dict[str, Run]) -> None:
    """No weighter anywhere: the weights that the run reported, the losses, one backward, SGD."""
    from tests.small import batch, task_losses

    cell, run = EQUAL["gradnorm heads"], reference["gradnorm heads"]
    model = net(cell)
    weights = torch.ones(cell.tasks, dtype=cell.dtype)
    for step in range(cell.steps):
        x, y = batch(step, cell.tasks, cell.dtype)
        losses = list(task_losses(model(x), y).values())
        inner = model.shared(model.blocks[1](model.blocks[0](model.embed(x))))
        z = inner.detach().requires_grad_()
        again = task_losses({task: head(z) for task, head in model.heads.items()}, y)
        G = torch.stack([torch.autograd.grad(loss, z)[0].flatten() for loss in again.values()])
        torch.testing.assert_close(run.gram[step], G @ G.T, rtol=1e-12, atol=0)
        torch.testing.assert_close(run.norms[step], G.norm(dim=1), rtol=1e-12, atol=0)
        torch.testing.assert_close(run.losses[step], torch.stack(losses).detach(), rtol=1e-12, atol=0)
        model.zero_grad()
        (weights @ torch.stack(losses)).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= cell.lr * p.grad
        weights = run.weights[step]
    for name, p in model.named_parameters():
        torch.testing.assert_close(run.parameters[name], p.detach(), rtol=1e-11, atol=1e-13)


def test_at_the_shared_layer_norms_are_those_of_the_papers_W(reference: dict[str, Run]) -> None:
    from tests.small import batch, task_losses

    cell = EQUAL["gradnorm shared layer"]
    model = net(cell)
    x, y = batch(0, cell.tasks, cell.dtype)
    losses = task_losses(model(x), y)
    W = model.shared.weight
    G = torch.stack([torch.autograd.grad(loss, W, retain_graph=True)[0].flatten() for loss in losses.values()])
    torch.testing.assert_close(reference["gradnorm shared layer"].gram[0], G @ G.T, rtol=1e-12, atol=0)


# Blocks that differ: the same blocks on one process and on several, statistics only (an engine applies the mean of
# the blocks' means to the model, so the model is kept still).

SIZES = (1, 11, 5, 3, 9, 7)
STILL = Cell(GRADNORM, micro=6, lr=0.0)
BLOCKS = {
    "unequal, counted": replace(STILL, sizes=SIZES, counts=True),
    "unequal, not counted": replace(STILL, sizes=SIZES),
    "unequal, counted, cov": replace(STILL, method=CoVWeighting(), sizes=SIZES, counts=True),
    "absent from one block": replace(STILL, absent=((None, 4, "t1"),)),
    "absent from one block, left out": replace(STILL, absent=((None, 4, "t1"),), absence="leave"),
    "absent, counted": replace(STILL, sizes=SIZES, counts=True, absent=((1, 0, "t1"), (1, 5, "t1"), (2, 3, "t0"))),
    "absent on the last rank": replace(STILL, absent=tuple((2, block, "t2") for block in (3, 4, 5))),
    "absent everywhere in a step": replace(STILL, absent=tuple((3, block, "t0") for block in range(6))),
    "two absent, shared layer": replace(STILL, route="shared_layer", absent=((None, 1, "t0"), (None, 1, "t2"))),
    "absent, branch": replace(STILL, route="branch", absent=((None, 2, "t1"),)),
}


@pytest.mark.parametrize(("engine", "world"), [("ddp", 2), ("ddp", 3), ("fsdp2", 2)])
def test_unequal_and_incomplete_blocks_count_alike_wherever_they_are(engine: str, world: int, tmp_path) -> None:
    one = run_ranks(train_all, 1, tmp_path, "plain", list(BLOCKS.values()), timeout=120)[0]
    cells = [replace(cell, micro=6 // world) for cell in BLOCKS.values()]
    leave = [name for name, cell in BLOCKS.items() if cell.absence == "leave"]
    if engine == "fsdp2":  # a head that takes no part in a rank's backward ends in torch's own error there
        cells = [cell for name, cell in zip(BLOCKS, cells, strict=True) if name not in leave]
        one = [run for name, run in zip(BLOCKS, one, strict=True) if name not in leave]
    ranks = run_ranks(train_all, world, tmp_path, engine, cells, timeout=120)
    for i, (cell, run) in enumerate(zip(cells, one, strict=True)):
        assert difference(ranks[0][i], run) < 1e-12, cell
        assert all(torch.equal(a, b) for a, b in zip(ranks[0][i].present, run.present, strict=True))
        assert_ranks_agree([rank[i] for rank in ranks])


def test_counts_make_unequal_blocks_the_whole_batch(tmp_path) -> None:
    whole, counted, plain = run_ranks(
        train_all,
        1,
        tmp_path,
        "plain",
        [replace(STILL, micro=1), BLOCKS["unequal, counted"], BLOCKS["unequal, not counted"]],
    )[0]
    assert difference(counted, whole) < 1e-12
    assert difference(plain, whole) > 1e-2  # the control: without counts these are other statistics


def test_an_absent_task_keeps_its_weight_and_the_sum_stays(tmp_path) -> None:
    run = run_ranks(train_all, 1, tmp_path, "plain", [BLOCKS["absent everywhere in a step"]])[0][0]
    assert not run.present[3][0] and run.present[3][1:].all()
    assert run.gram[3][0].eq(0).all() and run.gram[3][:, 0].eq(0).all() and run.losses[3][0] == 0
    assert run.weights[3][0] == run.weights[2][0]
    assert (run.weights[3][1:] != run.weights[2][1:]).all()
    assert all(abs(weights.sum() - 3) < 1e-12 for weights in run.weights)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_float32_weights_follow_one_process_over_twenty_steps(engine: str, tmp_path) -> None:
    # The rate is small enough for the weights not to swing about GradNorm's knife edge.
    cells = [
        Cell(GradNorm(alpha=1.0, lr=0.005), steps=20, dtype=torch.float32, lr=0.005),
        Cell(GradNorm(alpha=1.0, lr=0.005), steps=20, dtype=torch.float32, lr=0.005, route="shared_layer"),
        Cell(CoVWeighting(), steps=20, dtype=torch.float32, lr=0.005),
    ]
    one = run_ranks(train_all, 1, tmp_path, "plain", cells)[0]
    ranks = run_ranks(train_all, 2, tmp_path, engine, [replace(cell, micro=3) for cell in cells])
    for i, run in enumerate(one):
        assert difference(ranks[0][i], run, ["weights"]) < 1e-5
        assert difference(ranks[0][i], run) < 1e-4
        assert_ranks_agree([rank[i] for rank in ranks])
