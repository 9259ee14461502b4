"""One thing broken on purpose: each of these replaces one function of the library in the process that enters it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from accel_weighting import Weighter
from accel_weighting.branch import Block, Branch
from accel_weighting.processes import Processes
from accel_weighting.window import Sums, Window


@contextmanager
def mean_of_local_norms() -> Iterator[None]:
    """Norms are averaged over blocks, instead of the norm of the global batch's gradient."""
    add, unpack = Window.add, Window.unpack

    def add_norms(self: Window, name: str, value: Tensor) -> None:
        add(self, name, value.diagonal().sqrt().diag() if name == "gram" else value)

    def mean_of_norms(self: Window, *args: Any) -> Sums:
        sums = unpack(self, *args)
        s = sums.statistics
        return replace(sums, statistics=replace(s, norms=s.gram.diagonal() * s.micro_batches))  # sum / M² · M

    with patch.object(Window, "add", add_norms), patch.object(Window, "unpack", mean_of_norms):
        yield


@contextmanager
def step_per_micro_batch() -> Iterator[None]:
    """Every micro-batch closes its window; the processes' sums stay right."""
    with patch.object(Weighter, "_sync", True):
        yield


@contextmanager
def gram_divided_by_M() -> Iterator[None]:
    """Instead of by M²."""
    unpack = Window.unpack

    def divided_once(self: Window, *args: Any) -> Sums:
        sums = unpack(self, *args)
        s, M = sums.statistics, sums.blocks
        return replace(sums, statistics=replace(s, gram=s.gram * M, norms=s.norms * M**0.5))

    with patch.object(Window, "unpack", divided_once):
        yield


@contextmanager
def no_all_reduce() -> Iterator[None]:
    """Every process follows its own part of the batch."""
    with patch.object(Processes, "_all_reduce", lambda self, vector: None):
        yield


@contextmanager
def no_all_reduce_and_nobody_notices() -> Iterator[None]:
    """The same, and the agreement that rides in the vector is not looked at either."""
    with no_all_reduce(), patch.object(Processes, "agreed", lambda self, header: True):
        yield


@contextmanager
def factors_not_removed() -> Iterator[None]:
    """Weights and the division by the accumulation stay in the gradients that are measured."""
    measure = Branch._measure

    def with_factors(self: Branch, block: Block, *args: Any) -> None:
        block.factors = torch.ones_like(block.factors)
        measure(self, block, *args)

    with patch.object(Branch, "_measure", with_factors):
        yield
