"""One Adam step per task, for methods whose weights are learned."""

from __future__ import annotations

import torch
from torch import Tensor

from accel_weighting.statistics import State


def adam_state(tasks: int) -> State:
    """Moments and step counts of ``tasks`` parameters before their first step, each ``[K]``."""
    return {key: torch.zeros(tasks, dtype=torch.float64) for key in ("adam_mean", "adam_square", "adam_steps")}


def adam_step(
    parameters: Tensor,
    gradient: Tensor,
    state: State,
    active: Tensor,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensor, State]:
    """One bias-corrected step of Adam on the ``active`` parameters; the others keep value, moments and step count.

    Every task counts its own steps, so that one which was absent for a while is corrected for what it has seen.
    Source: Kingma and Ba, arXiv 1412.6980, Algorithm 1; equal to ``torch.optim.Adam`` where all are active.

    Args:
        parameters: One parameter per task, ``[K]``.
        gradient: Their gradient, ``[K]``; read where ``active``.
        state: Any state that holds the keys of :func:`adam_state`.
        active: bool ``[K]``.
        lr: Step size.
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment.

    Returns:
        The next parameters, and the three keys of :func:`adam_state` to merge into the next state.

    Example:
        >>> theta, seen = torch.zeros(2, dtype=torch.float64), torch.tensor([True, False])
        >>> adam_step(theta, torch.ones(2, dtype=torch.float64), adam_state(2), seen, lr=0.1)[0]
        tensor([-0.1000,  0.0000], dtype=torch.float64)
    """
    steps = state["adam_steps"] + active
    mean = torch.where(active, state["adam_mean"].lerp(gradient, 1 - betas[0]), state["adam_mean"])
    square = torch.where(active, state["adam_square"].lerp(gradient**2, 1 - betas[1]), state["adam_square"])
    corrected = mean / (1 - betas[0] ** steps), square / (1 - betas[1] ** steps)  # 0 / 0 before a task's first step
    stepped = parameters - lr * corrected[0] / (corrected[1].sqrt() + eps)
    moments = {"adam_mean": mean, "adam_square": square, "adam_steps": steps}
    return torch.where(active, stepped, parameters), moments
