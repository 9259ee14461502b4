"""Adapters on two real processes, against the same life by hand in one process on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest

from accel_weighting import MGDA, GradNorm
from tests.adapters import LIVES, ROWS, assert_same, lived, lived_by_hand
from tests.ranks import accelerator_for, run_ranks

pytest.importorskip("peft", "0.21", reason="PEFT 0.21 is not installed")

METHODS = {"GradNorm": GradNorm(lr=0.1), "MGDA": MGDA()}
CELLS = [cell for life, events in LIVES.items() for cell in ((life, 0, "GradNorm"), (life, len(events), "MGDA"))]


def on_two_processes() -> dict[Any, Any]:
    """Prepared once, after the last event, as DDP demands; the weighter is built before the first or after the last."""
    import torch.distributed as dist  # noqa: TID251  which process is this?

    half = ROWS // 2
    rows = slice(dist.get_rank() * half, dist.get_rank() * half + half)
    found = {}
    for life, built_at, name in CELLS:
        accelerator = accelerator_for("ddp")
        found[life, built_at, name] = lived(life, METHODS[name], built_at, len(LIVES[life]), accelerator, rows)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(on_two_processes, 2, tmp_path_factory.mktemp("two"), timeout=600)


@pytest.mark.parametrize(("life", "built_at", "name"), CELLS)
def test_a_life_with_adapters_is_the_one_by_hand(life: str, built_at: int, name: str, two) -> None:
    hand = lived_by_hand(life, METHODS[name], len(LIVES[life]))
    for rank in two:
        assert_same(rank[life, built_at, name], hand)
