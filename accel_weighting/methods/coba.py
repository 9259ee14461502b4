"""CoBa: weight for the tasks that converge slowly, until one of them diverges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from accel_weighting.methods.algebra import TINY, Array, LossMethod, Mask, share, softmax
from accel_weighting.statistics import InitialWeights, State, Statistics, count, positive


@dataclass(frozen=True)
class CoBa(LossMethod):
    """Convergence balancer: relative and absolute convergence scores, mixed by how far all still converge.

    With the slope ``α_i`` of a least squares line through the last N ratios ``L_i / L_i(0)``, K tasks:

    - ``RCS_i = softmax_i(K α_i / Σ_j |α_j|)``: more for the tasks that converge slowly (eq. 3);
    - ``ACS_i = softmax_i(−N α_i / Σ_s |α_i(s)|)``: less for a task that diverges, compared with its own past (eq. 4);
    - ``DF = min(1, N softmax_s(−τ N α_max(s) / Σ_s |α_max(s)|)[now])``, ``α_max`` the slope of the largest ratio
      (eq. 5): 1 while all converge, towards 0 where that slope turns up;
    - ``ω = DF · RCS + (1 − DF) · ACS`` (eq. 6), of sum 1.

    The paper takes losses on validation data; these are those of the windows. Its DF looks back on all slopes since
    the warm-up, this one on the last N, so that the state does not grow. Each task counts its own windows: one that is
    absent, or whose loss is 0, keeps its weight, and the others share the rest.

    Args:
        window: N, windows of a slope.
        tau: τ.
        warmup: Windows of a task before its first slope; until then weights are equal.

    Raises:
        ValueError: An argument is out of range.

    Source: Gong et al., CoBa: Convergence Balancer for Multitask Finetuning of Large Language Models, EMNLP 2024,
    arXiv 2410.06741. Its text was not at hand: the equations are those of code that follows it, and so are the numbers.
    """

    keeps_sum: ClassVar[bool] = True
    sum_of_one: ClassVar[bool] = True
    memory: ClassVar[tuple[str, ...]] = ("count", "initial")

    window: int = count(200, least=2)
    tau: float = positive(5.0)
    warmup: int = count(100, least=2)

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Equal weights; ratios and slopes in rows of N, the latest last; of the largest ratio alike for all."""
        weights, state = super().init(tasks, initial_weights)
        history = dict.fromkeys(("ratios", "slopes", "worst_slopes"), np.zeros((len(tasks), self.window)))
        return weights, {**state, **history}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """Takes the losses in, fits the lines, and mixes the scores."""
        L, on = statistics.losses, statistics.present & (statistics.losses > TINY)
        seen = state["count"] + on
        initial = np.where(on & (state["count"] == 0), L, state["initial"])
        ratios = _append(state["ratios"], L / np.where(on, initial, 1.0), on)
        state = {**state, "count": seen, "initial": initial, "ratios": ratios}
        ready = on & (seen >= self.warmup)
        if not ready.any():
            return state["weights"], state

        N, longest = self.window, int(seen.argmax())
        slopes = _append(state["slopes"], _slopes(ratios, seen), ready)
        worst_slope = _slopes(ratios.max(0, keepdims=True), seen[longest : longest + 1])
        worst = _append(np.tile(state["worst_slopes"][longest], (len(on), 1)), worst_slope, on | ~on)
        state |= {"slopes": slopes, "worst_slopes": worst}

        slope = np.where(ready, slopes[:, -1], 0.0)
        length = np.minimum(seen - self.warmup + 1, N)  # slopes that there are
        rcs = softmax(np.count_nonzero(ready) * _part(slope, np.abs(slope).sum()), ready)
        acs = softmax(-length * _part(slope, np.abs(slopes).sum(1)), ready)
        steps = int(length[longest])
        recent = _part(worst[0], np.abs(worst[0]).sum())
        df = min(1.0, steps * float(softmax(-self.tau * steps * recent, np.arange(N) >= N - steps)[-1]))
        state["weights"] = share(state["weights"], df * rcs + (1 - df) * acs, ready)
        return state["weights"], state


def _append(rows: Array, values: Array, where: Mask) -> Array:
    """``values`` at the end of their rows, the first entry of which goes."""
    moved = np.concatenate([rows[:, 1:], np.broadcast_to(values, len(rows))[:, None]], 1)
    return np.where(where[:, None], moved, rows)


def _slopes(rows: Array, counts: Array) -> Array:
    """Slopes of the least squares lines through the last ``counts`` entries of the rows."""
    t = np.arange(rows.shape[1], dtype=np.float64)
    among = t >= rows.shape[1] - np.minimum(counts, rows.shape[1])[:, None]
    size = np.maximum(among.sum(1, keepdims=True), 1)
    x = np.where(among, t - (among * t).sum(1, keepdims=True) / size, 0.0)
    slopes: Array = (x * rows).sum(1) / np.maximum((x * x).sum(1), 1e-300)
    return slopes


def _part(x: Array, total: Array | float) -> Array:
    """``x / total``, 0 where the total is."""
    total = np.asarray(total, np.float64)
    return x / np.where(total > 0, total, 1.0)
