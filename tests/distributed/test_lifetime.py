"""How long weighters live, on two real processes: nothing of those that are gone stays, and checkpoints load."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist  # noqa: TID251  the end of its process groups is what is tested

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


def fifty_weighters(wrap: bool) -> list[tuple[int, int, int, float]]:
    """Descriptors, threads, weighters and memory in MiB after every ten; DDP wraps the model, or does not."""
    gc.collect()
    gc.freeze()  # what is imported is not looked through again fifty times
    seen = []
    for n in range(50):
        setup = build(wrap=wrap)
        for step in range(4):
            setup.weighter.backward(setup.losses(step))
            setup.optimizer.step()
            setup.optimizer.zero_grad()
        setup.accelerator.free_memory()
        del setup
        if n % 10 == 9:
            gc.collect()
            weighters = sum(type(thing) is Weighter for thing in gc.get_objects())
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            seen.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), weighters, memory))
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


def saved(folder: Path, detached: bool) -> Any:
    """Between two other objects; the third weighter on these heads is the one that is saved.

    `detached`: the older ones were detached before; else the new one takes the place of the one that is there.
    """
    setup = build()
    first, last = Counter(), Counter()
    first.value, last.value = 3, 7
    setup.weighter.detach()
    setup.accelerator.register_for_checkpointing(first)
    older = Weighter(GRADNORM, NAMES, accelerator=setup.accelerator, heads=dict(setup.inner.heads))
    setup.accelerator.register_for_checkpointing(last)
    if detached:
        older.detach()
    setup.weighter = Weighter(GRADNORM, NAMES, accelerator=setup.accelerator, heads=dict(setup.inner.heads))
    for step in range(3):
        setup.step(step)
    setup.accelerator.save_state(str(folder))
    return setup.weighter.weights


def loaded(folder: Path, detached: bool) -> Any:
    """A process that builds one weighter, where that of the other was saved: last of all, or between the others."""
    setup = build()
    setup.weighter.detach()
    first, last = Counter(), Counter()
    setup.accelerator.register_for_checkpointing(first)
    if detached:
        setup.accelerator.register_for_checkpointing(last)
    setup.weighter = Weighter(GRADNORM, NAMES, accelerator=setup.accelerator, heads=dict(setup.inner.heads))
    if not detached:
        setup.accelerator.register_for_checkpointing(last)
    setup.accelerator.load_state(str(folder))
    return setup.weighter.weights, first.value, last.value


def gloo_threads() -> int:
    names = (Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task"))
    return sum("gloo" in name for name in names)


def ended(engine: str, wrap: bool, weighted: bool) -> tuple[int, int, str]:
    """Gloo's threads before and after the end of the training, and what a further sum says."""
    setup = build(engine, wrap=wrap)
    if weighted:
        for step in range(2):
            setup.step(step)
    else:
        setup.weighter.detach()
        del setup.weighter
    before = gloo_threads()
    dist.barrier()
    setup.accelerator.end_training()
    gc.collect()
    after, message = gloo_threads(), ""
    if weighted:
        with pytest.raises(RuntimeError) as error:
            setup.weighter._steps._processes.gather(0)
        message = str(error.value)
    return before, after, message


@pytest.mark.parametrize(("engine", "wrap"), [("ddp", False), ("ddp", True), ("fsdp2", True)])
def test_our_process_group_ends_with_the_others(engine: str, wrap: bool, tmp_path: Path) -> None:
    """Threads that outlive their group can abort the exit of the interpreter, or wait there for ever."""
    weighted = run_ranks(ended, 2, tmp_path, engine, wrap, True)
    without = run_ranks(ended, 2, tmp_path, engine, wrap, False)
    for (before, after, message), (_, alone, _) in zip(weighted, without, strict=True):
        assert before > after == alone
        assert "process groups were destroyed" in message


@pytest.mark.parametrize("wrap", [False, True], ids=["no engine", "DDP"])
def test_fifty_weighters_leave_no_descriptor_no_thread_and_no_memory(wrap: bool, tmp_path: Path) -> None:
    for seen in run_ranks(fifty_weighters, 2, tmp_path, wrap, timeout=240):
        assert len({one[:3] for one in seen[1:]}) == 1, seen
        assert seen[-1][2] == 0 and seen[-1][3] - seen[1][3] < 3, seen


def test_neither_the_model_nor_the_accelerator_is_kept_alive(tmp_path: Path) -> None:
    for alive in run_ranks(freed, 2, tmp_path):
        assert alive == [False, False]


@pytest.mark.parametrize("detached", [True, False], ids=["detached", "replaced"])
def test_a_checkpoint_between_other_objects_loads_in_fresh_processes(detached: bool, tmp_path: Path) -> None:
    weights = run_ranks(saved, 2, tmp_path, tmp_path / "checkpoint", detached)
    assert weights[0] == weights[1] and len(set(weights[0].values())) > 1
    for found, first, last in run_ranks(loaded, 2, tmp_path, tmp_path / "checkpoint", detached):
        assert (found, first, last) == (weights[0], 3, 7)
