"""RotoGrad (Javaloy and Valera, ICLR 2022): gradients made alike in magnitude by weights, in direction by rotations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accel_weighting.methods.adam import adam_state, adam_step
from accel_weighting.methods.algebra import ROUNDING, SMALLEST, TINY, Array, reciprocal, share
from accel_weighting.statistics import (
    InitialWeights,
    Method,
    State,
    Statistics,
    count,
    initial_vector,
    integer,
    non_negative,
    positive,
    within,
)

REFRESH = 16
"""Updates from one re-orthogonalisation to the next. In float32 max|RᵀR − I| grows to 5e-7 between them (m = 256)."""


@dataclass(frozen=True, kw_only=True)
class _Settings(Method):
    """The hyperparameters of the rotations, in a class of their own: ``init`` is a function of methods too."""

    size: int | None = count(None)
    dim: int = integer(-1)
    lr: float = positive(0.05)
    lr_decay: float = within("(0, 1]", 0.9999)
    burn_in: int = count(20, least=0)
    init: InitVar[Literal["identity", "haar"]] = "identity"
    seed: int = integer(0)
    normalize_losses: bool = False
    cooperative_after: int | None = count(None, least=0)
    initial_rotations: Literal["identity", "haar"] = field(init=False, default="identity", metadata={"called": "init"})

    def __post_init__(self, init: Any) -> None:
        if isinstance(owner := getattr(init, "__self__", None), _Settings):
            init = owner.initial_rotations  # dataclasses.replace reads the attribute of that name: the function
        object.__setattr__(self, "initial_rotations", init)
        super().__post_init__()

    def __repr__(self) -> str:
        """Short, as it stands in every message: what differs from the defaults."""
        values = ((f, getattr(self, f.name)) for f in fields(self))
        changed = [f"{f.metadata.get('called', f.name)}={value!r}" for f, value in values if value != f.default]
        return f"{type(self).__name__}({', '.join(changed)})"

    __str__ = __repr__


class _Rotating(_Settings):
    """What RotoGrad and RotoGradNorm have in common: the rotations.

    ``R_k`` descends ``−Σ_n ⟨R_kᵀ g̃_{n,k}, v_n⟩``, ``v_n = (1/K) Σ_j u_{n,j}`` held constant, where ``g̃ = R_k g`` is the
    gradient at the rotated features. With ``U_k = G_k / ‖G_k‖``, whose rows are all samples of the global batch, that
    is ``∇_{R_k} = −Σ_n g̃_{n,k} v_nᵀ = −‖G_k‖ R_k M_k``, ``M_k = (1/K) Σ_j U_kᵀ U_j``. A step on SO(m) follows its
    tangent part, ``R_k B_k`` with the skew ``B_k = M_k − M_kᵀ``: the symmetric ``U_kᵀ U_k`` drops out, and skew moments
    of all pairs of tasks are all that is needed.
    """

    acts_on: ClassVar[Literal["losses", "shared"]] = "shared"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Norms; moments where it rotates; losses where it divides by their initial values."""
        return frozenset(
            {"norms"} | ({"moments"} if self._rotates else set()) | ({"losses"} if self._ratios else set())
        )

    @property
    def positive_losses(self) -> bool:  # type: ignore[override]
        """Whether it divides by initial losses."""
        return self._ratios

    @property
    def _rotates(self) -> bool:
        return True

    @property
    def _ratios(self) -> bool:
        return self.normalize_losses

    @property
    def cooperative(self) -> bool:  # type: ignore[override]
        """Whether the tasks' own gradients are measured too."""
        return self.cooperative_after is not None

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Weights of 1, or the initial weights, until the first update."""
        w = initial_vector(tasks, initial_weights)
        unknown = np.zeros(len(w))
        state: State = {"weights": w, "updates": np.asarray(0), "initial_norms": unknown}
        if self._ratios:
            state["initial_losses"] = unknown
        if self.normalize_losses:
            state["loss_weights"] = np.ones(len(w))
        return w, state | self._state_of_weights(len(w))

    def _state_of_weights(self, tasks: int) -> State:
        return {}

    def widen(self, state: State, width: int) -> State:
        """Rotations ``[K, m, m]`` for a shared representation of ``width`` features, once that is known.

        Raises:
            ValueError: ``size`` is larger than the width, or the rotations that there are have another one.
        """
        m = width if self.size is None else self.size
        if m > width:
            raise ValueError(
                f"Parameter `size` must not be larger than the shared representation, which has {width} features along "
                f"`dim = {self.dim}`. Found `size = {m}`."
            )
        if "rotations" in state:
            if state["rotations"].shape[-1] != m:
                raise ValueError(
                    f"The rotations are for {state['rotations'].shape[-1]} features, and the shared representation now "
                    f"has {width} along `dim = {self.dim}`. Its width must not change."
                )
            return state
        K = len(state["weights"])
        haar_ = self.initial_rotations == "haar"
        rotations: Any = haar(K, m, self.seed) if haar_ else torch.eye(m, dtype=torch.float64).repeat(K, 1, 1)
        return state | {"rotations": rotations}

    def _remember(self, state: State, statistics: Statistics) -> State:
        """Initial norms and losses: of a task's first update, and again of update number ``burn_in``."""
        again = int(state["updates"]) == self.burn_in
        state = state | {"updates": np.asarray(state["updates"] + 1)}
        observed = {"initial_norms": statistics.norms, "initial_losses": statistics.losses}
        for name in observed.keys() & state.keys():
            x = observed[name]
            assert x is not None
            take = statistics.present & (x > 0) & ((state[name] == 0) | again)
            state[name] = np.where(take, x, state[name])
        if self.normalize_losses:
            known = state["initial_losses"] > 0
            state["loss_weights"] = np.where(known, 1 / np.where(known, state["initial_losses"], 1.0), 1.0)
        return state

    def _turn(self, state: State, statistics: Statistics, updates: int) -> State:
        """One step of the rotations along their gradients in units of ``‖G_k‖``."""
        if not self._rotates or "rotations" not in state or statistics.moments is None:
            return state
        assert statistics.norms is not None
        rotations: Any = state["rotations"]  # the one entry on the device
        R: Tensor = rotations
        moments = statistics.moments
        on = statistics.present & (statistics.norms > 0)
        if not on.any():
            return state
        lr = self.lr * self.lr_decay**updates
        k, j = np.triu_indices(len(on), 1)
        pairs, tasks = moments[: len(k)], moments[len(k) :]
        u = np.where(on, reciprocal(statistics.norms), 0.0)
        pair = np.arange(len(k))
        C = np.zeros((len(on), len(k)))  # B_k = Σ_j D_kj / (K n_k n_j), D_jk = −D_kj
        C[k, pair], C[j, pair] = u[k] * u[j], -(u[k] * u[j])
        x = _beside(lr / np.count_nonzero(on) * C, moments) @ pairs
        if self.cooperative_after is not None and updates >= self.cooperative_after:
            length, own = (y.norm(dim=1, keepdim=True) for y in (x, tasks))
            x = (x - tasks * torch.where(own > 0, length / own, 0.0)) / 2  # −: each task descends its own loss
        turned = retract(R, skew(x.to(R.dtype), R.shape[-1]), cayley=lr > 0.1)
        if lr > 0.1 or (updates + 1) % REFRESH == 0:
            turned = orthogonalise(turned)
        rotations = turned if on.all() else torch.where(_beside(on, R)[:, None, None], turned, R)
        return state | {"rotations": rotations}


@dataclass(frozen=True, repr=False)
class RotoGrad(_Rotating):
    r"""Makes the task gradients at the shared representation alike: in magnitude by weights, in direction by rotations.

    From Javaloy and Valera, *RotoGrad: Gradient Homogenization in Multitask Learning* (ICLR 2022, arXiv 2103.02631).
    Head k sees ``r_k = R_k z``, ``R_k ∈ SO(d)``. With the gradients ``G_k = ∇_z L_k`` over the global batch and their
    norms ``n_k``:

    - magnitudes: the trunk receives ``C Σ_k G_k / n_k`` with ``C = Σ_k α_k n_k``, ``α_k ∝ n_k / n_k(0)``, ``Σα = 1``:
      weights ``ω_k = C / n_k`` on the shared path; heads keep their raw gradients (Algorithm 1);
    - directions: ``R_k`` descends along ``∇_{R_k} = −Σ_n g̃_{n,k} v_nᵀ``, where ``g̃`` is the gradient at ``r_k`` and
      ``v_n`` the mean over tasks of the rows of ``G_j / n_j``, held constant.

    With ``lag=0`` the magnitudes are the paper's, decided in the very backward they act on; rotations always move after
    the step. Only the skew moments ``G_kᵀ G_j − G_jᵀ G_k``, k < j, are needed: K(K−1)/2 · m(m−1)/2 numbers in the
    all-reduce for rotations of m features. The rotations themselves are K·m² numbers, the same on every process.

    A task that is absent, or whose gradient vanishes, keeps its weight and its rotation; the means run over the others.

    Args:
        rotate: False: magnitudes only.
        scale: False: directions only; the trunk receives the plain sum.
        size: Rotates the first ``size`` features only; None: all.
        dim: The dimension of z that holds the features: −1, or 1 for feature maps ``[batch, channels, …]``. All other
            positions are samples.
        lr: Step of the rotations. In one update a rotation turns by at most ``lr (K − 1) / K`` radians in any plane,
            reached by a single sample whose tasks pull at right angles.
        lr_decay: Factor on ``lr`` after every update; the rotations must come to rest before the network. The
            default halves it in 6,931 updates; the authors' example takes 0.99999.
        burn_in: Initial norms (and losses) are taken at a task's first update and again at this one.
        init: ``"identity"``: the model's function is unchanged at the start. ``"haar"``: uniform on SO(d).
        seed: Of ``"haar"``; the same on all processes.
        normalize_losses: Divides every loss by its initial value, for the heads too, as the authors' option does; from
            the second step on, when that value is known.
        cooperative_after: After so many updates the rotations descend the tasks' own losses too, half and half, both
            steps at the length of the first (the first version's cooperative mode). None: never.

    Raises:
        ValueError: A hyperparameter is out of range, or, at the first forward, ``size`` is larger than the features.

    Example:
        >>> method = RotoGrad(rotate=False)
        >>> w, state = method.init(["a", "b"])
        >>> method.update(state, Statistics(losses=[1.0, 1.0], present=[True, True], norms=[1.0, 3.0]))[0]
        array([2.        , 0.66666667])
    """

    grows: ClassVar[bool] = True

    rotate: bool = True
    scale: bool = True

    @property
    def _rotates(self) -> bool:
        return self.rotate

    def weigh(self, state: State, statistics: Statistics) -> Array:
        """ω of Algorithm 1 for these norms, acting on gradients of the losses as they were weighted until now."""
        remembered = self._remember(state, statistics)
        if self.normalize_losses:
            remembered["loss_weights"] = state["loss_weights"]
        return self._magnitudes(remembered, statistics)

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """New weights from this window's norms, and one step of the rotations."""
        updates = int(state["updates"])
        state = self._turn(self._remember(state, statistics), statistics, updates)
        state["weights"] = self._magnitudes(state, statistics)
        return state["weights"], state

    def _magnitudes(self, state: State, statistics: Statistics) -> Array:
        w, n, n_0 = state["weights"], statistics.norms, state["initial_norms"]
        assert n is not None
        on = statistics.present & (n > 0)
        if not self.scale or not on.any():
            return w
        alpha = np.where(on, n / np.where(on, np.where(n_0 > 0, n_0, n), 1.0), 0.0)
        n = n * state.get("loss_weights", 1.0)
        C = (alpha / alpha.sum() * n).sum()
        return np.where(on, C / np.where(on, n, 1.0), w)


@dataclass(frozen=True, repr=False)
class RotoGradNorm(_Rotating):
    """RotoGrad's rotations with GradNorm's weights, both at the shared representation; heads keep their raw gradients.

    From the authors' package (``RotoGradNorm``). The weights ``w = K softmax(v)`` descend
    ``Σ_k | w_k n_k − ‖(1/K) Σ_j w_j G_j‖ r_k^α |`` with the target held constant, ``r_k`` the relative inverse training
    rate of GradNorm (Chen et al. 2018, arXiv 1711.02257). It uses the norm of the mean gradient where GradNorm uses the
    mean of the norms, and that lies below all weighted norms unless the gradients are parallel: weighted norms do
    **not** become equal, and the weight runs to the task with the smallest gradient (2.6, 1, 1 for orthogonal gradients
    of norms 1, 3, 10 at α = 0). ``target="mean_norm"`` makes them equal.

    Args:
        alpha: Strength of the pull towards equal training rates, finite and at least 0.
        weights_lr: Adam's learning rate for v.
        target: ``"mean_gradient"``, as in the authors' code, or ``"mean_norm"``, GradNorm's.
        size: As in :class:`RotoGrad`, and so are all further arguments.
        dim: See :class:`RotoGrad`.
        lr: See :class:`RotoGrad`.
        lr_decay: See :class:`RotoGrad`.
        burn_in: See :class:`RotoGrad`.
        init: See :class:`RotoGrad`.
        seed: See :class:`RotoGrad`.
        normalize_losses: See :class:`RotoGrad`.
        cooperative_after: See :class:`RotoGrad`.
    """

    alpha: float = non_negative()
    weights_lr: float = positive(0.025)
    target: Literal["mean_gradient", "mean_norm"] = "mean_gradient"

    keeps_sum: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Also the Gram matrix, for the length of the mean gradient."""
        return super().needs | {"gram"}

    @property
    def _ratios(self) -> bool:
        return True

    def _state_of_weights(self, tasks: int) -> State:
        return adam_state(tasks)

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """One step of the weights, one of the rotations."""
        updates = int(state["updates"])
        state = self._turn(self._remember(state, statistics), statistics, updates)
        w, L, M = state["weights"], statistics.losses, statistics.gram
        assert M is not None
        on = statistics.present & (state["initial_losses"] > 0)
        if on.any():
            K = np.count_nonzero(on)
            scale = state.get("loss_weights", np.ones(len(w)))
            M = M * np.outer(scale, scale)
            n = np.sqrt(np.maximum(M.diagonal(), 0))
            r = np.where(on, L / np.where(on, state["initial_losses"], 1.0), 0.0)
            r = r * (K / max(r.sum(), SMALLEST))
            w_on = np.where(on, w, 0.0)
            target = np.sqrt(max(w_on @ M @ w_on, 0.0)) if self.target == "mean_gradient" else w_on @ n
            gap = w * n - target / K * r**self.alpha
            s = np.sign(gap) * (np.abs(gap) > ROUNDING * w * n)
            gradient = s * w * n - w / w_on.sum() * (w_on * s * n).sum()
            v, moments = adam_step(np.log(np.maximum(w, TINY)), gradient, state, on, self.weights_lr)
            state |= moments | {"weights": share(w, np.exp(v), on)}
        return state["weights"], state


def _beside(values: NDArray[Any], like: Tensor) -> Tensor:
    """A small array where ``like`` lives, in one copy and without the host waiting for it."""
    tensor = torch.from_numpy(values)
    if like.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(like.device, non_blocking=True)


@functools.lru_cache(maxsize=8)
def _places(m: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every entry of a skew matrix, in rows: which entry of its strict upper triangle it is, and its sign."""
    i, j = torch.triu_indices(m, m, 1, device=device)
    place = torch.zeros(m, m, dtype=torch.int64, device=device)
    place[i, j] = place[j, i] = torch.arange(len(i), device=device)
    sign = torch.ones(m, m, dtype=dtype, device=device)
    return place.flatten(), (sign.triu(1) - sign.tril(-1)).flatten()


def skew(b: Tensor, m: int) -> Tensor:
    """Skew matrices ``[K, m, m]`` from their strict upper triangles ``[K, m(m−1)/2]``."""
    if m == 1:
        return b.new_zeros(len(b), 1, 1)
    place, sign = _places(m, b.dtype, b.device)
    return b.index_select(1, place).mul_(sign).view(len(b), m, m)


def retract(R: Tensor, X: Tensor, cayley: bool = False) -> Tensor:
    """``R exp(X)`` to second order for skew ``X``, on SO(m) up to rounding and, for the series, ``|X|⁶/64``.

    The series ``I + X + X²/2 + X³/8`` begins that of the rotation ``I + X²/2 + X √(I + X²/4)``. What it adds to R is
    summed up first, so that float32 rounds R once.

    Args:
        R: Rotations, ``[K, m, m]``.
        X: Skew, ``[K, m, m]``; of spectral norm at most 0.1 unless ``cayley``.
        cayley: Uses ``R (I − X/2)⁻¹ (I + X/2)``, orthogonal for steps of any length, at the price of a solve.
    """
    if cayley:
        I = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)  # noqa: E741  the identity
        solution, _ = torch.linalg.solve_ex(I - X / 2, X)  # never singular, so that a GPU need not be waited for
        return torch.baddbmm(R, R, solution)
    Y = torch.bmm(R, X)
    Z = torch.bmm(Y, X)
    return Y.add_(Z, alpha=0.5).baddbmm_(Z, X, alpha=0.125).add_(R)


def orthogonalise(R: Tensor) -> Tensor:
    """One Newton–Schulz step ``R − R (RᵀR − I) / 2``, which squares the error of ``RᵀR``; that is found in float64."""
    W = R if R.is_mps else R.double()
    error = torch.bmm(W.mT, W)
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.baddbmm(R, R, error.to(R.dtype), alpha=-0.5)


def haar(K: int, m: int, seed: int) -> Tensor:
    """K rotations, uniform on SO(m) (Mezzadri, math-ph/0609050), float64 ``[K, m, m]``."""
    generator = torch.Generator().manual_seed(seed)
    Q_, T = torch.linalg.qr(torch.randn(K, m, m, dtype=torch.float64, generator=generator))
    Q: Tensor = Q_ * T.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    Q[:, :, 0] *= torch.linalg.det(Q).sign()[:, None]
    return Q
