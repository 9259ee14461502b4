"""One Adam step per task, for methods whose weights are learned."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel_weighting.statistics import State


def adam_state(tasks: int) -> State:
    """Moments and step counts of ``tasks`` parameters before their first step, each ``[K]``."""
    return {key: np.zeros(tasks) for key in ("adam_mean", "adam_square", "adam_steps")}


def adam_step(
    parameters: NDArray[np.float64],
    gradient: NDArray[np.float64],
    state: State,
    active: NDArray[np.bool_],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[NDArray[np.float64], State]:
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
        >>> adam_step(np.zeros(2), np.ones(2), adam_state(2), np.array([True, False]), lr=0.1)[0]
        array([-0.1,  0. ])
    """
    m, v = state["adam_mean"], state["adam_square"]
    steps = state["adam_steps"] + active
    mean = m + (1 - betas[0]) * (gradient - m)
    square = v + (1 - betas[1]) * (gradient * gradient - v)
    everyone = np.count_nonzero(active) == len(active)
    taken = steps if everyone else np.maximum(steps, 1)  # before a task's first step there is nothing to correct
    corrected = mean / (1 - betas[0] ** taken), square / (1 - betas[1] ** taken)
    stepped = parameters - lr * corrected[0] / (np.sqrt(corrected[1]) + eps)
    if not everyone:
        pairs = (stepped, parameters), (mean, m), (square, v)
        stepped, mean, square = (np.where(active, new, old) for new, old in pairs)
    return stepped, {"adam_mean": mean, "adam_square": square, "adam_steps": steps}
