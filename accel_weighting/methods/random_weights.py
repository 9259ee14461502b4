"""Random loss weighting: the litmus test that any other method should pass first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from accel_weighting.methods.algebra import Array, LossMethod, mixed_seed, share, softmax
from accel_weighting.statistics import InitialWeights, State, Statistics, integer


@dataclass(frozen=True)
class RandomLossWeighting(LossMethod):
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
    positive_losses: ClassVar[bool] = False
    keeps_sum: ClassVar[bool] = True
    sum_of_one: ClassVar[bool] = True

    distribution: Literal["normal", "dirichlet"] = "normal"
    seed: int = integer(0)

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Weights 1/K unless ``initial_weights`` say otherwise."""
        weights, state = super().init(tasks, initial_weights)
        return weights, state | {"counter": np.asarray(0)}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """The next draw; all K numbers are drawn, whoever is present."""
        counter, present = int(state["counter"]), statistics.present
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, counter))
        x = torch.empty(len(present), dtype=torch.float64)  # torch's generator, so that resumed runs draw as before
        if self.distribution == "normal":
            scores = x.normal_(generator=generator).numpy()
        else:
            scores = np.log(x.exponential_(generator=generator).numpy())  # exponentials over their sum
        weights = share(state["weights"], softmax(scores, present), present)
        return weights, {"weights": weights, "counter": np.asarray(counter + 1)}
