"""One accelerator and several models after each other: folds, a batch size that is found, checkpoints of who came last.

The loops are those of Accelerate's examples on cross-validation and on memory.
"""

from __future__ import annotations

import gc
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor

from accel_weighting import Weighter
from tests.distributed.setups import F64, GRADNORM, NAMES
from tests.ranks import accelerator_for, run_ranks
from tests.small import batch, net, task_losses

FOLDS, STEPS = 4, 5
HEADS = {name: f"heads.{name}" for name in NAMES}


def losses_of(
    accelerator: Any, model: Any, step: int, rows: int = 36, part: int = 0, parts: int = 1
) -> dict[str, Tensor]:
    """Of this process's part of the first `rows` of a step's batch."""
    size = rows // (accelerator.num_processes * parts)
    start = (accelerator.process_index * parts + part) * size
    x, y = batch(step, len(NAMES), F64)
    return task_losses(model(x[start : start + size]), y[start : start + size])


def resources() -> tuple[int, int]:
    """Descriptors and threads."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


# ---- cross-validation ------------------------------------------------------------------------------------------------


def fold(accelerator: Any, number: int, parts: int) -> tuple[dict[str, Any], Any]:
    """Trains a model of its own, accumulating by hand, and evaluates it; what came out, and the model."""
    model = net(NAMES, seed=number)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    weighter = Weighter(GRADNORM, NAMES, accelerator=accelerator, heads=HEADS, model=model)
    for step in range(STEPS):
        model.train()
        for part in range(parts):
            losses = losses_of(accelerator, model, 10 * number + step, part=part, parts=parts)
            accelerator.backward(weighter.combine(losses, last=part == parts - 1) / parts)
            weighter.step()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            total = weighter.combine(losses_of(accelerator, model, 10 * number + step))
    inner = accelerator.unwrap_model(model)
    found = {
        "weights": list(weighter.weights.values()),
        "total": accelerator.reduce(total, "mean").item(),
        "step": weighter._progress.step,
        "registered": len(accelerator._custom_objects),
        "parameters": [p.detach().clone() for p in inner.parameters()],
    }
    return found, weakref.ref(inner)


def folds(parts: int) -> dict[str, Any]:
    """On one accelerator, freed between them as the example does it."""
    accelerator, found, models, used = accelerator_for("ddp"), [], [], []
    for number in range(FOLDS):
        results, model = fold(accelerator, number, parts)
        found.append(results)
        models.append(model)
        accelerator.free_memory()
        gc.collect()
        used.append(resources())
    alive = sum(model() is not None for model in models)
    return {"folds": found, "alive": alive, "registered": len(accelerator._custom_objects), "used": used}


def single_folds() -> list[dict[str, Any]]:
    """Every fold on an accelerator of its own, in one process, on whole batches."""
    return [fold(accelerator_for("plain"), number, 1)[0] for number in range(FOLDS)]


def test_folds_on_one_accelerator_are_trainings_of_their_own(tmp_path: Path) -> None:
    alone = run_ranks(single_folds, 1, tmp_path, timeout=120)[0]
    for ranks in run_ranks(folds, 2, tmp_path, 2, timeout=120):
        assert ranks["alive"] == 0 and ranks["registered"] == 0
        assert len(set(ranks["used"][1:])) == 1, ranks["used"]
        for mine, expected in zip(ranks["folds"], alone, strict=True):
            assert mine["registered"] == 1 and mine["step"] == expected["step"] == STEPS
            assert mine["weights"] == pytest.approx(expected["weights"], rel=1e-12)
            assert mine["total"] == pytest.approx(expected["total"], rel=1e-12)
            for p, q in zip(mine["parameters"], expected["parameters"], strict=True):
                torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
    assert len({tuple(one["weights"]) for one in alone}) == FOLDS


# ---- a batch size that is found --------------------------------------------------------------------------------------


def train(accelerator: Any, model: Any, optimizer: Any, weighter: Weighter, size: int, steps: range) -> list[float]:
    for step in steps:
        weighter.backward(losses_of(accelerator, model, step, size))
        optimizer.step()
        optimizer.zero_grad()
    return list(weighter.weights.values())


def found_size(folder: Path, keeps: bool) -> dict[str, Any]:
    """Sizes that are too large run out of memory after a backward; the model is prepared again for each.

    `keeps`: the user still has the weighters of earlier tries.
    """
    accelerator, tried, kept = accelerator_for("ddp"), [], []
    model: Any = net(NAMES)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0)  # so that tries that failed leave no trace in it

    @find_executable_batch_size(starting_batch_size=36)
    def inner_training_loop(batch_size: int) -> tuple[Weighter, int]:
        nonlocal model, optimizer
        model, optimizer = accelerator.prepare(model, optimizer)
        optimizer.zero_grad()
        weighter = Weighter(GRADNORM, NAMES, accelerator=accelerator, heads=HEADS, model=model)
        tried.append(batch_size)
        if keeps:
            kept.append(weighter)
        if batch_size > 30:
            weighter.backward(losses_of(accelerator, model, 7, batch_size))
            raise RuntimeError("CUDA out of memory.")
        train(accelerator, model, optimizer, weighter, batch_size, range(3))
        return weighter, batch_size

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        weighter, size = inner_training_loop()
    registered = len(accelerator._custom_objects)
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    weights = train(accelerator, model, optimizer, weighter, size, range(3, 6))
    replaced = sum("the new one replaces it" in str(one.message) for one in said)
    return {"tried": tried, "registered": registered, "weights": weights, "replaced": replaced}


def fresh(folder: Path | None, size: int) -> list[float]:
    """A run that starts at that size: whole, or from the checkpoint."""
    accelerator, model = accelerator_for("ddp"), net(NAMES)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    weighter = Weighter(GRADNORM, NAMES, accelerator=accelerator, heads=HEADS, model=model)
    if folder is not None:
        accelerator.load_state(str(folder))
    return train(accelerator, model, optimizer, weighter, size, range(0 if folder is None else 3, 6))


@pytest.mark.parametrize("keeps", [False, True], ids=["weighters that are gone", "weighters that are kept"])
def test_a_run_whose_batch_size_was_found_is_the_run_at_that_size(keeps: bool, tmp_path: Path) -> None:
    """And its checkpoint loads in fresh processes, which build one weighter."""
    folder = tmp_path / "checkpoint"
    ranks = run_ranks(found_size, 2, tmp_path, folder, keeps, timeout=120)
    size = ranks[0]["tried"][-1]
    for found in ranks:
        assert len(found["tried"]) > 1 and found["registered"] == 1
        assert found["replaced"] == len(found["tried"]) - 1  # the model is the same one, and its hooks hold a weighter
    whole, resumed = (run_ranks(fresh, 2, tmp_path, start, size, timeout=120) for start in (None, folder))
    assert ranks[0]["weights"] == ranks[1]["weights"] == whole[0] == resumed[0] == resumed[1]
    assert len(set(whole[0])) == len(NAMES)
