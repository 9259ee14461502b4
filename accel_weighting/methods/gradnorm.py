"""GradNorm (Chen et al. 2018), in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from accel_weighting.methods.adam import adam_state, adam_step
from accel_weighting.methods.algebra import ROUNDING, SMALLEST, TINY, lerp, share
from accel_weighting.statistics import (
    InitialWeights,
    Method,
    State,
    Statistics,
    check_tasks,
    initial_vector,
    names,
    non_negative,
    positive,
    positive_by_task,
    within,
)


@dataclass(frozen=True)
class GradNorm(Method):
    r"""Balances the norms of the task gradients by how slowly each task trains.

    From Chen et al. 2018, *GradNorm* (arXiv 1711.02257). With ``n_i = ‖∇_W L_i‖``, over the K tasks:

    - ``G_i = w_i n_i`` and its mean ``Ḡ``; ``r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0))``, large for a slow task;
    - the target (eq. 1): ``G_i → Ḡ r_i^α``: a slow task is to have the larger gradient;
    - the loss of the weights (eq. 2): ``L_grad = Σ_i |G_i − Ḡ r_i^α|``, the target held constant.

    As ``G_i`` is linear in ``w_i``, no second backward is needed: ``∂L_grad/∂w_i = s_i n_i`` with
    ``s_i = sign(G_i − Ḡ r_i^α)``. Weights stay positive, and their sum stays what it was at the start (K).

    A task that is absent, or whose losses so far were all 0, keeps its weight; the means run over the others. Weights
    stand on a floor of 1e-6: norms more than some six orders of magnitude apart are not made equal.

    Args:
        alpha: Strength of the pull towards equal training rates, finite and at least 0. At 0 the norms are made
            equal and the losses are not read.
        lr: Learning rate of the weights.
        optimizer: ``"adam"``: Adam(0.9, 0.999, 1e-8) on v with ``w = K exp(v) / Σ exp(v)``; independent of the units
            of the losses as far as norms are large beside 1e-8. ``"sgd"``: ``w_i −= lr s_i n_i`` as in the paper,
            floored and rescaled.
        initial_losses: ``{task: L_i(0)}``, positive, e.g. ``log C`` for C classes; other tasks take their first
            positive loss.
        initial_loss_decay: At d < 1 the reference moves: ``L_i(0) ← d L_i(0) + (1 − d) L_i`` after every update.
        tasks: The tasks to balance, by default all; the others keep their weights, and need no branch.
        start: ``"equal"``: the paper's, one step at a time from equal weights. ``"balanced"``: a task's first update
            goes all the way, ``w_i ∝ Ḡ r_i^α / n_i`` at the kept sum, and then as in the paper. Under Adam, whose
            second moments then belong to all tasks from the first step, weights that are found late are worth little.

    Raises:
        ValueError: A hyperparameter is out of range, or (in ``init``) a name is not a task's.

    Example:
        >>> method = GradNorm(alpha=0.0, lr=0.1, optimizer="sgd")
        >>> w, state = method.init(["a", "b"])
        >>> w, state = method.update(state, Statistics(losses=[1.0, 1.0], present=[True, True], norms=[3.0, 1.0]))
        >>> w  # 0.7 and 1.1, scaled to the sum 2
        array([0.77777778, 1.22222222])
    """

    alpha: float = non_negative(1.5)
    lr: float = positive(0.025)
    optimizer: Literal["adam", "sgd"] = "adam"
    initial_losses: Mapping[str, float] | None = positive_by_task(None)
    initial_loss_decay: float = within("[0, 1]", 1.0)
    tasks: Sequence[str] | None = names(None)
    start: Literal["equal", "balanced"] = "equal"

    keeps_sum: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Norms, and losses where they matter."""
        return frozenset({"norms", "losses"} if self.alpha else {"norms"})

    @property
    def positive_losses(self) -> bool:  # type: ignore[override]
        """Whether ``L_i / L_i(0)`` is formed."""
        return self.alpha > 0

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[NDArray[np.float64], State]:
        """The initial weights, 1 each by default."""
        check_tasks(self, tasks)
        w = np.maximum(initial_vector(tasks, initial_weights), TINY)
        state: State = {
            "weights": w,
            "balanced": np.array([self.tasks is None or task in self.tasks for task in tasks]),
        }
        if self.alpha:
            state["initial_losses"] = initial_vector(tasks, self.initial_losses or {}, default=0.0)  # 0: not known yet
        if self.optimizer == "adam":
            state |= adam_state(len(tasks))
        if self.start == "balanced":
            state["started"] = np.zeros(len(tasks), np.bool_)
        return w, state

    def measures(self, tasks: Sequence[str]) -> Sequence[str]:
        """The tasks to balance."""
        return [task for task in tasks if self.tasks is None or task in self.tasks]

    def update(self, state: State, statistics: Statistics) -> tuple[NDArray[np.float64], State]:
        """One step of the weights on eq. 2."""
        w, n = state["weights"], statistics.norms
        assert n is not None
        on = state["balanced"] & statistics.present
        state, r = dict(state), None
        if self.alpha:
            L, L_0 = statistics.losses, state["initial_losses"]
            if np.count_nonzero(L_0) < len(L_0):
                L_0 = np.where(on & (L_0 == 0) & (L > 0), L, L_0)
                on = on & (L_0 > 0)
            r = np.divide(L, L_0, out=np.zeros(len(L)), where=on)
            if self.initial_loss_decay < 1:
                L_0 = np.where(on, lerp(L_0, L, 1 - self.initial_loss_decay), L_0)
            state["initial_losses"] = L_0
        if self.start == "balanced":
            new = on & ~state["started"] & (n > 0)
            if np.count_nonzero(new):
                return self._balanced(state, n, r, on, new)
            on = on & state["started"]
        size = np.count_nonzero(on)
        if not size:
            return w, state

        mean, G = on / size, w * n
        target = G.dot(mean)
        if r is not None:
            target = target * (r / max(float(r.dot(mean)), SMALLEST)) ** self.alpha  # all losses may have reached 0
        gap = G - target
        apart = np.abs(gap) > ROUNDING * G  # where not, s is 0
        if self.optimizer == "sgd":
            proposed = w - self.lr * (np.copysign(n, gap) * apart)
        else:
            pull = np.copysign(G, gap) * apart  # s G
            gradient = pull - w * (pull.dot(mean) / w.dot(mean))  # ∂L_grad/∂v
            v, moments = adam_step(np.log(w), gradient, state, on, self.lr)
            state |= moments
            proposed = np.exp(v)  # shared out below, which makes it K softmax(v)
        state["weights"] = w = share(w, proposed, on)
        return w, state

    def _balanced(
        self,
        state: State,
        n: NDArray[np.float64],
        r: NDArray[np.float64] | None,
        on: NDArray[np.bool_],
        new: NDArray[np.bool_],
    ) -> tuple[NDArray[np.float64], State]:
        """The first update of the ``new`` tasks goes all the way; the others wait for it."""
        w, old = state["weights"], on & state["started"]
        target = (w * n)[old].mean() if old.any() else 1.0
        if r is not None:
            known = on & (old | new)
            target = target * (r / max(float(r[known].mean()), SMALLEST)) ** self.alpha
        proposed = np.where(new, target / np.where(new, n, 1.0), w)
        among = old | new
        proposed *= w[among].sum() / max(proposed[among].sum(), SMALLEST)  # the floor is that of weights of this sum
        state["started"] = state["started"] | new
        state["weights"] = w = share(w, proposed, among)
        return w, state
