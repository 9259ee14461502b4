"""One thing broken on purpose: each of these replaces one function of the library in the process that enters it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from accel_weighting import Statistics, Weighter, processes
from accel_weighting.branch import Branch
from accel_weighting.optimizers import OptimizerWatch
from accel_weighting.processes import Processes
from accel_weighting.window import MicroBatch, Sums, Window


@contextmanager
def mean_of_local_norms() -> Iterator[None]:
    """Norms are averaged over blocks, instead of the norm of the global batch's gradient."""
    add, statistics = Window.add, Sums.statistics

    def add_norms(self: Window, name: str, value: Tensor) -> None:
        add(self, name, value.diagonal().sqrt().diag() if name == "gradients" else value)

    def mean_of_norms(self: Sums) -> Statistics:
        s = statistics(self)
        return replace(s, norms=s.gram.diagonal() * s.micro_batches)  # sum / M² · M

    with patch.object(Window, "add", add_norms), patch.object(Sums, "statistics", mean_of_norms):
        yield


@contextmanager
def step_per_micro_batch() -> Iterator[None]:
    """Every micro-batch closes its window, and nobody looks for an optimizer; the processes' sums stay right."""
    with patch.object(Weighter, "_sync", True), patch.object(OptimizerWatch, "opens", lambda *_: False):
        yield


@contextmanager
def gram_divided_by_M() -> Iterator[None]:
    """Instead of by M²."""
    statistics = Sums.statistics

    def divided_once(self: Sums) -> Statistics:
        s, M = statistics(self), self.blocks
        return replace(s, gram=s.gram * M, norms=s.norms * M**0.5)

    with patch.object(Sums, "statistics", divided_once):
        yield


@contextmanager
def no_all_reduce() -> Iterator[None]:
    """Every process follows its own part of the batch."""
    with patch.object(Processes, "_all_reduce", lambda self, vector: None):
        yield


@contextmanager
def no_all_reduce_and_nobody_notices() -> Iterator[None]:
    """The same, and the agreement that rides in the vector is not looked at either."""
    agreed, alike = lambda world, signature: True, lambda world, sums: True
    with no_all_reduce(), patch.object(processes, "_agreed", agreed), patch.object(processes, "_alike", alike):
        yield


@contextmanager
def factors_not_removed() -> Iterator[None]:
    """Weights and the division by the accumulation stay in the gradients that are measured."""
    measure = Branch._measure

    def with_factors(self: Branch, micro_batch: MicroBatch, *args: Any) -> None:
        micro_batch.factors = torch.ones_like(micro_batch.factors)
        measure(self, micro_batch, *args)

    with patch.object(Branch, "_measure", with_factors):
        yield
