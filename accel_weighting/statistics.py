"""The contract between the weighter and the methods: what a window saw, what a method keeps, what a method is.

Everything here is pure data. A method never meets a process, a device, a loss scale or a micro-batch: it is
given the :class:`Statistics` of a whole window over the whole global batch, and answers with weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

State = dict[str, Tensor]
"""What a method keeps between two updates: a flat dictionary of tensors, float64 on the CPU unless said otherwise.

Task k's share of an entry is its row k; what has nothing to do with single tasks is a scalar, or ``[1, ...]``.
``"fixed"`` is what follows from the hyperparameters alone: no checkpoint of others changes it.
"""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What one window saw: all micro-batches of all processes between two optimizer steps.

    Tensors are float64 on the CPU and identical on every process. K is the number of tasks; rows follow the
    weighter's task order.

    Attributes:
        losses: Mean loss of every task over the blocks where it was present, shape ``[K]``; 0 where it was absent.
        present: Whether the task was in the window at all, bool, shape ``[K]``.
        norms: Norm of every task's unweighted gradient over the global batch at the shared representation (or at
            the weight of ``shared_layer``), shape ``[K]``; None where there is no branch.
        gram: Inner products of those gradients, shape ``[K, K]``; rows of absent tasks are zero. None where there is
            no branch, or where the heads were fed different tensors, so that only norms are known.
        moments: For a rotating method, ``[K(K−1)/2, m(m−1)/2]`` on the device: the strict upper triangles of
            ``G_kᵀ G_j − G_jᵀ G_k`` for all k < j, with the tasks' gradients ``G`` (rows are samples, columns the m
            rotated features); where it is cooperative, K more rows with those of ``G_kᵀ Z − Zᵀ G_k``. Else None.
        micro_batches: Number of micro-batches in the window, over all processes.
        step: Optimizer steps that came before this window.
    """

    losses: Tensor
    present: Tensor
    norms: Tensor | None = None
    gram: Tensor | None = None
    moments: Tensor | None = None
    micro_batches: int = 1
    step: int = 0


class Method:
    """Base of every weighting method: a frozen dataclass of hyperparameters with two pure functions.

    Processes and checkpoints compare methods by their ``repr``: a dictionary among the hyperparameters is sorted.

    Class constants say what a method needs and where its weights act.

    A method that rotates the shared representation also has ``widen(state, width) -> State``, called when the width
    of z is known, and keeps the rotations ``[K, m, m]`` in its state as ``"rotations"``, on the device. One that acts
    on the shared path and divides the losses by something keeps those factors, ``[K]``, as ``"loss_weights"``.

    Attributes:
        needs: Which statistics ``update`` reads, out of ``"losses"``, ``"norms"``, ``"gram"``, ``"moments"``.
        positive_losses: Whether the method divides by losses and needs them positive.
        acts_on: ``"losses"``: weights multiply the losses, heads feel them. ``"shared"``: weights act on the gradient
            that reaches the shared representation; heads keep their raw gradients.
        keeps_sum: Whether the weights always have the sum that they began with.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    positive_losses: ClassVar[bool] = False
    acts_on: ClassVar[Literal["losses", "shared"]] = "losses"
    keeps_sum: ClassVar[bool] = False

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Weights before the first update, float64 ``[K]``, and the state to begin with."""
        raise NotImplementedError

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """Weights after a window, float64 ``[K]``, and the next state. Neither argument is modified.

        A task absent from the window keeps its weight and its state; where the method keeps a sum, the present
        tasks share what the absent ones leave of it.
        """
        raise NotImplementedError

    def weigh(self, state: State, statistics: Statistics) -> Tensor:
        """Weights for these very statistics, with the state left as it is: what ``lag=0`` applies."""
        return self.update(state, statistics)[0]


def initial_vector(tasks: Sequence[str], values: Mapping[str, float] | Tensor | None, default: float = 1.0) -> Tensor:
    """``values`` as a float64 vector in task order; tasks that are not named get ``default``."""
    if values is None:
        return torch.full((len(tasks),), default, dtype=torch.float64)
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.float64, copy=True)
    return torch.tensor([float(values.get(task, default)) for task in tasks], dtype=torch.float64)


def require(method: Method, name: str, valid: bool, rule: str) -> None:
    """A ``ValueError`` that names the hyperparameter, its rule and what was found, unless it is ``valid``."""
    if not valid:
        raise ValueError(f"Parameter `{name}` must {rule}. Found `{name} = {getattr(method, name)!r}`.")
