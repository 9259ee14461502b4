"""GradNorm (Chen et al. 2018), in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import ClassVar, Literal

import torch
from torch import Tensor

from accel_weighting.methods.adam import adam_state, adam_step
from accel_weighting.methods.algebra import ROUNDING, share
from accel_weighting.statistics import Method, State, Statistics, initial_vector


@dataclass(frozen=True)
class GradNorm(Method):
    r"""Balances the norms of the task gradients by how slowly each task trains.

    From Chen et al. 2018, *GradNorm* (arXiv 1711.02257). With ``n_i = ‖∇_W L_i‖``, over the K tasks:

    - ``G_i = w_i n_i`` and its mean ``Ḡ``; ``r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0))``, large for a slow task;
    - the target (eq. 1): ``G_i → Ḡ r_i^α``: a slow task is to have the larger gradient;
    - the loss of the weights (eq. 2): ``L_grad = Σ_i |G_i − Ḡ r_i^α|``, the target held constant.

    As ``G_i`` is linear in ``w_i``, no second backward is needed: ``∂L_grad/∂w_i = s_i n_i`` with
    ``s_i = sign(G_i − Ḡ r_i^α)``. Weights stay positive, and their sum stays what it was at the start (K).

    A task that is absent, or whose losses so far were all 0, keeps its weight; the means run over the others.

    Args:
        alpha: Strength of the pull towards equal training rates, finite and at least 0. At 0 the norms are made
            equal and the losses are not read.
        lr: Learning rate of the weights.
        optimizer: ``"adam"``: Adam(0.9, 0.999, 1e-8) on v with ``w = K exp(v) / Σ exp(v)``; independent of the units
            of the losses. ``"sgd"``: ``w_i −= lr s_i n_i`` as in the paper, floored and rescaled.
        initial_losses: ``{task: L_i(0)}``, positive, e.g. ``log C`` for C classes; other tasks take their first
            positive loss.
        initial_loss_decay: At d < 1 the reference moves: ``L_i(0) ← d L_i(0) + (1 − d) L_i`` after every update.
        tasks: The tasks to balance, by default all; the others keep their weights.

    Raises:
        ValueError: A hyperparameter is out of range, or (in ``init``) a name is not a task's.

    Example:
        >>> method = GradNorm(alpha=0.0, lr=0.1, optimizer="sgd")
        >>> w, state = method.init(["a", "b"])
        >>> losses, norms, present = torch.ones(2).double(), torch.tensor([3.0, 1.0]).double(), torch.ones(2).bool()
        >>> w, state = method.update(state, Statistics(losses, present, norms))
        >>> w  # 0.7 and 1.1, scaled to the sum 2
        tensor([0.7778, 1.2222], dtype=torch.float64)
    """

    alpha: float = 1.5
    lr: float = 0.025
    optimizer: Literal["adam", "sgd"] = "adam"
    initial_losses: Mapping[str, float] | None = field(default=None, hash=False)
    initial_loss_decay: float = 1.0
    tasks: Sequence[str] | None = None

    keeps_sum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.initial_losses is not None:
            found = {t: float(loss) for t, loss in sorted(self.initial_losses.items())}
            object.__setattr__(self, "initial_losses", found)
        if self.tasks is not None:
            object.__setattr__(self, "tasks", tuple(self.tasks))
        for valid, name, rule in (
            (0 <= self.alpha < math.inf, "alpha", "be finite and at least 0"),
            (0 < self.lr < math.inf, "lr", "be positive and finite"),
            (self.optimizer in ("adam", "sgd"), "optimizer", "be 'adam' or 'sgd'"),
            (0 <= self.initial_loss_decay <= 1, "initial_loss_decay", "lie between 0 and 1"),
            (
                all(0 < loss < math.inf for loss in (self.initial_losses or {}).values()),
                "initial_losses",
                "hold positive finite numbers",
            ),
        ):
            if not valid:
                raise ValueError(f"Parameter `{name}` must {rule}. Found `{name} = {getattr(self, name)!r}`.")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Norms, and losses where they matter."""
        return frozenset({"norms", "losses"} if self.alpha else {"norms"})

    @property
    def positive_losses(self) -> bool:  # type: ignore[override]
        """Whether ``L_i / L_i(0)`` is formed."""
        return self.alpha > 0

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The initial weights, 1 each by default."""
        for name, named in (("tasks", self.tasks or ()), ("initial_losses", self.initial_losses or {})):
            _check_names(name, named, tasks)
        w = initial_vector(tasks, initial_weights)
        state = {"weights": w, "balanced": torch.tensor([self.tasks is None or task in self.tasks for task in tasks])}
        if self.alpha:
            state["initial_losses"] = initial_vector(tasks, self.initial_losses or {}, default=0.0)  # 0: not known yet
        if self.optimizer == "adam":
            state |= adam_state(len(tasks))
        return w, state

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """One step of the weights on eq. 2."""
        w, L, n = state["weights"], statistics.losses, statistics.norms
        assert n is not None
        state = dict(state)
        on = state["balanced"] & statistics.present

        r = torch.ones_like(w)
        if self.alpha:
            L_0 = state["initial_losses"]
            L_0 = torch.where(on & (L_0 == 0) & (L > 0), L, L_0)
            on = on & (L_0 > 0)
            r = L / L_0.where(on, 1.0)
            r = r / (r @ _share(on)).clamp(min=torch.finfo(r.dtype).tiny)  # all losses may have reached 0
            state["initial_losses"] = torch.where(on, L_0.lerp(L, 1 - self.initial_loss_decay), L_0)

        G, mean = w * n, _share(on)
        gap = G - G @ mean * r**self.alpha
        s = gap.sign() * (gap.abs() > ROUNDING * G)
        if self.optimizer == "sgd":
            proposed = w - self.lr * s * n
        else:
            gradient = s * G - w * ((s * G) @ mean / (w @ mean))  # ∂L_grad/∂v
            v, moments = adam_step(w.log(), gradient, state, on, self.lr)
            state |= moments
            proposed = v.exp()  # shared out below, which makes it K softmax(v)
        state["weights"] = share(w, proposed, on)
        return state["weights"], state


def _share(on: Tensor) -> Tensor:
    """What a vector is multiplied by for its mean over the tasks that are ``on``."""
    on = on.double()
    return on / on.sum()


def _check_names(name: str, named: Iterable[str], tasks: Sequence[str]) -> None:
    unknown = [task for task in named if task not in tasks]
    if unknown:
        close = [match for task in unknown for match in get_close_matches(task, tasks, n=1)]
        hint = f" Did you mean `{close}`?" if close else ""
        raise ValueError(
            f"Parameter `{name}` must name tasks of the weighter, `{list(tasks)}`. "
            f"Found unknown names `{unknown}`.{hint}"
        )
