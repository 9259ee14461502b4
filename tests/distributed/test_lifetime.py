"""How long weighters live, on two real processes: nothing of those that are gone stays, and checkpoints load."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import Any

from accel_weighting import Weighter
from tests.distributed.setups import GRADNORM, NAMES, build
from tests.ranks import run_ranks


class Counter:
    """Something else that the user registers."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def fifty_weighters() -> list[tuple[int, int]]:
    """Descriptors and threads after every ten."""
    seen = []
    for n in range(50):
        setup = build(wrap=False)
        setup.weighter.backward(setup.losses(n % 4))
        del setup
        gc.collect()
        if n % 10 == 9:
            seen.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    return seen


def freed() -> list[bool]:
    setup = build()
    setup.step(0)
    model, accelerator = weakref.ref(setup.inner), weakref.ref(setup.accelerator)
    weighter = setup.weighter
    setup.accelerator.free_memory()
    del setup
    gc.collect()
    alive = [model() is not None, accelerator() is not None]
    del weighter
    return alive


def saved(folder: Path) -> Any:
    """Between two other objects; the third weighter on these heads is the one that is saved."""
    setup = build()
    first, last = Counter(), Counter()
    first.value, last.value = 3, 7
    setup.weighter.detach()
    setup.accelerator.register_for_checkpointing(first)
    older = Weighter(GRADNORM, NAMES, accelerator=setup.accelerator, heads=dict(setup.inner.heads))
    setup.accelerator.register_for_checkpointing(last)
    older.detach()
    setup.weighter = Weighter(GRADNORM, NAMES, accelerator=setup.accelerator, heads=dict(setup.inner.heads))
    for step in range(3):
        setup.step(step)
    setup.accelerator.save_state(str(folder))
    return setup.weighter.weights


def loaded(folder: Path) -> Any:
    setup = build()
    setup.weighter.detach()
    first, last = Counter(), Counter()
    setup.accelerator.register_for_checkpointing(first, last)
    setup.weighter = Weighter(GRADNORM, NAMES, accelerator=setup.accelerator, heads=dict(setup.inner.heads))
    setup.accelerator.load_state(str(folder))
    return setup.weighter.weights, first.value, last.value


def test_fifty_weighters_leave_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    for seen in run_ranks(fifty_weighters, 2, tmp_path, timeout=120):
        assert len(set(seen[1:])) == 1, seen


def test_neither_the_model_nor_the_accelerator_is_kept_alive(tmp_path: Path) -> None:
    for alive in run_ranks(freed, 2, tmp_path):
        assert alive == [False, False]


def test_a_checkpoint_between_other_objects_loads_in_fresh_processes(tmp_path: Path) -> None:
    weights = run_ranks(saved, 2, tmp_path, tmp_path / "checkpoint")
    assert weights[0] == weights[1] and len(set(weights[0].values())) > 1
    for found, first, last in run_ranks(loaded, 2, tmp_path, tmp_path / "checkpoint"):
        assert (found, first, last) == (weights[0], 3, 7)
