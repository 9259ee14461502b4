"""Random loss weighting: the litmus test that any other method should pass first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from accel_weighting.methods.algebra import FLOOR, mixed_seed, share
from accel_weighting.statistics import Method, State, Statistics, initial_vector


@dataclass(frozen=True)
class RandomLossWeighting(Method):
    """New random weights in every window, positive and, as in its source, with sum 1.

    ``"normal"`` is ``softmax(x), x ~ N(0, I)``, the paper's default; ``"dirichlet"`` is uniform on the simplex. The
    draw depends on ``seed`` and on a counter in the state, on nothing else: alike on all processes, and a resumed run
    goes on where it was.

    The losses are not read, so ``lag=0`` and ``lag=1`` differ only in the first window, which ``lag=1`` gives the
    initial weights. The sum stays that of the initial weights: start with 1 each for a sum of K, under which the
    learning rate keeps the meaning it has for a plain sum. An absent task keeps its weight and the others share the
    rest.

    Args:
        distribution: ``"normal"`` or ``"dirichlet"``.
        seed: Seed of the sequence, the same on every process.

    Raises:
        ValueError: ``distribution`` is unknown or ``seed`` is not an integer.

    Source: Lin et al., Reasonable Effectiveness of Random Weighting, TMLR 2022, arXiv 2111.10603.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    keeps_sum: ClassVar[bool] = True

    distribution: Literal["normal", "dirichlet"] = "normal"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.distribution not in ("normal", "dirichlet"):
            raise ValueError(
                "Parameter `distribution` must be 'normal' or 'dirichlet'. "
                f"Found `distribution = {self.distribution!r}`."
            )
        if not isinstance(self.seed, int):
            raise ValueError(f"Parameter `seed` must be an integer. Found `seed = {self.seed!r}`.")

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Weights 1/K unless ``initial_weights`` say otherwise."""
        weights = initial_vector(tasks, initial_weights, default=1 / len(tasks)).clamp(min=FLOOR)
        return weights, {"weights": weights, "counter": torch.tensor(0)}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """The next draw; all K numbers are drawn, whoever is present."""
        weights, counter, present = state["weights"], state["counter"], statistics.present
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, int(counter)))
        if self.distribution == "normal":
            x = torch.empty_like(weights).normal_(generator=generator)
        else:
            x = torch.empty_like(weights).exponential_(generator=generator).log()  # exponentials over their sum
        weights = share(weights, x.where(present, -math.inf).softmax(0), present)
        return weights, {"weights": weights, "counter": counter + 1}
