"""Arithmetic that several methods share: sums that stay, and small linear algebra on Gram matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from accel_weighting.statistics import Method, State, Statistics, initial_vector

FLOOR = 1e-6
"""Smallest weight on a loss. At 0 the gradient of that task could no longer be observed in the one backward."""


def share(old: Tensor, new: Tensor, present: Tensor) -> Tensor:
    """Absent tasks keep their ``old`` weight; present ones take ``new``, scaled so that the sum of ``old`` stays.

    Args:
        old: Weights before, ``[K]``.
        new: Proposed weights, ``[K]``; read where ``present``, positive there.
        present: bool ``[K]``.
    """
    proposed = new.clamp(min=FLOOR).where(present, 0.0)
    left = old.where(present, 0.0).sum()
    return torch.where(present, proposed * (left / proposed.sum()), old)


RANK = 1e-7
"""Relative eigenvalue of a matrix of cosines below which it counts as 0: gradients are met in float32."""

ROUNDING = 1e-12
"""Relative difference that the order of a sum can make: a sign that hangs on less would differ from cut to cut."""

LIMIT = 1e3
"""Largest weight, about, that a Gram method may answer with where its own formula has a pole."""


class GramMethod(Method):
    """Base of the methods that are a function of the Gram matrix alone: they only say how to ``solve`` it.

    The present tasks' block of the Gram matrix is divided by its mean diagonal entry, so that the root mean square of
    the gradients' norms is 1, and solved. Where there is nothing to go by (before the first window, or where all
    gradients vanish) the gradients are taken for orthonormal.

    A method that keeps its sum has a solution of sum 1; the present tasks share what the absent ones leave of the
    sum of the initial weights, or keep their weights if nothing is left. Without, they take the solution as it is.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    acts_on: ClassVar[Literal["losses", "shared"]] = "shared"

    def solve(self, M: Tensor) -> Tensor:
        """The weights ``[K]`` for a Gram matrix ``M``, float64 ``[K, K]``, of mean diagonal 1, no task absent."""
        raise NotImplementedError

    def init(
        self, tasks: Sequence[str], initial_weights: Mapping[str, float] | Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The solution for orthonormal gradients; tasks named in ``initial_weights`` have theirs."""
        weights = self.solve(torch.eye(len(tasks), dtype=torch.float64))
        if initial_weights is not None:
            weights = initial_vector(tasks, initial_weights, default=float(weights[0]))
        return weights, {"weights": weights}

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        """The solution for this window's Gram matrix; the state holds nothing but the weights."""
        weights = solve_present(self.solve, state["weights"], statistics, self.keeps_sum)
        return weights, {"weights": weights}


def solve_present(
    solve: Callable[[Tensor], Tensor], old: Tensor, statistics: Statistics, keeps_sum: bool = False
) -> Tensor:
    """Drops absent tasks, normalises the Gram matrix by its trace, solves, and puts the weights back in place.

    Args:
        solve: From a Gram matrix of mean diagonal 1 to its weights, of sum 1 if ``keeps_sum``.
        old: Weights before, ``[K]``; absent tasks keep theirs.
        statistics: The window; its ``gram`` and ``present`` are read.
        keeps_sum: Whether the weights keep the sum of ``old``, see :class:`GramMethod`.
    """
    assert statistics.gram is not None
    present = statistics.present
    weights = old.clone()
    left = float(old[present].sum()) if keeps_sum else 1.0
    if not present.any() or left <= 0:
        return weights
    M = statistics.gram[present][:, present].to(torch.float64)
    scale = M.diagonal().mean()
    M = (M + M.T) / (2 * scale) if scale > 0 else torch.eye(len(M), dtype=torch.float64)
    weights[present] = left * solve(M)
    return weights


def cosines(M: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines ``[K, K]``, 0 for a zero gradient, and norms ``[K]`` of the gradients whose Gram matrix is ``M``."""
    n = M.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(n > 0, 1 / n, 0.0)
    return M * inverse * inverse[:, None], n


def equal_projections(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of the unit gradients ``u_k`` whose sum ``Σ a_k u_k`` has equal projections on all of them.

    ``a = C⁺1`` with the cosines C; the gradients' lengths play no part. Where 1 is in the null space of C the unit
    gradients cancel each other out and ``a = 1`` is the limit of ``(C + εI)⁻¹1``, up to a factor.

    Returns:
        ``a / n``, ``[K]``, the coefficients of the gradients themselves (0 for a zero gradient); the projections on
        ``u_k``, ``[K]``, which are 1 where C is regular; and ``Σa``.
    """
    C, n = cosines(M)
    a = torch.linalg.pinv(C, rtol=RANK, hermitian=True).sum(1)
    p = C @ a
    if a.sum() <= RANK * len(M):
        a = p = (n > 0).to(M.dtype)
    return torch.where(n > 0, a / n, 0.0), p, a.sum()


def increasing_root(f: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, tolerance: Tensor) -> Tensor:
    """Where ``f``, increasing and at most 0 at ``low``, is 0 up to ``tolerance``; ``high`` where it is nowhere above 0.

    Both ends are only as exact as rounding lets them be: an end where ``f`` is 0 up to the tolerance is the answer, and
    so is the low end where ``f`` is already above 0 there. Regula falsi in the Illinois variant: a few steps where f is
    piecewise linear.
    """
    below, above, last = f(low), f(high), 0 * low
    if below >= -tolerance:
        return low
    if above <= tolerance:
        return high
    x = low
    for _ in range(60):  # above - below > 2 tolerance: no division by 0
        x = high - above * (high - low) / (above - below)
        y = f(x)
        if y.abs() <= tolerance:
            break
        again = y * last > 0  # the same side twice: halve the other end's value (the Illinois step)
        last = y
        if y > 0:
            high, above, below = x, y, below / 2 if again else below
        else:
            low, below, above = x, y, above / 2 if again else above
    return x


def mixed_seed(seed: int, counter: int) -> int:
    """A seed for draw number ``counter``: 32 bits, since torch's CPU generator reads no more of it."""
    return (seed * 0x9E3779B1 + counter) & 0xFFFFFFFF


def min_norm(M: Tensor, m: Tensor | None = None) -> Tensor:
    """``argmin αᵀMα`` over the simplex: the shortest vector in the convex hull of the gradients. Exact.

    It is ``α = u/Σu``, ``u = argmin_{u ≥ 0} ½uᵀ(M + m·11ᵀ)u − 1ᵀu`` for any ``m > 0``: the optimality conditions are
    the same. Of several minimisers it takes an even one, so that equal tasks have equal weights.

    Args:
        M: Gram matrix, ``[K, K]``.
        m: None: the smallest diagonal entry, which keeps the digits of short gradients. To be given where M is itself
            the result of a subtraction, so that its smallest entry may be noise.
    """
    if m is None:
        m = M.diagonal().min()
        if m <= 0:
            zero = (M.diagonal() <= 0).to(M.dtype)
            return zero / zero.sum()
    s = (M.diagonal() / m + 1).rsqrt()  # scales the diagonal to 1, after a division by m
    Q = (M / m + 1) * s * s[:, None]
    values, V = torch.linalg.eigh(Q)
    null = V[:, values < 1e-13 * len(M)]
    P = 1e-6 * null @ null.T
    x = nonnegative_minimum(Q + P, s)
    for _ in range(3 * bool(P.any())):  # proximal steps: what P took off the optimum is given back
        x = nonnegative_minimum(Q + P, s + P @ x)
    return s * x / (s * x).sum()


def nonnegative_minimum(Q: Tensor, b: Tensor) -> Tensor:
    """``argmin_{x ≥ 0} ½xᵀQx − bᵀx`` for a positive definite ``Q``, by the active set of Lawson and Hanson (1974)."""
    x = torch.zeros_like(b)
    free = torch.ones_like(b, dtype=torch.bool)
    for _ in range(10 * len(b)):
        while True:
            z = torch.zeros_like(x)
            z[free] = torch.linalg.solve(Q[free][:, free], b[free])
            blocking = free & (z <= 0)
            if not blocking.any():
                break
            step = (x / (x - z)).where(blocking, torch.inf)
            x = x + step.min() * (z - x)
            free = free & (step > step.min())
            x = x.where(free, 0.0)
        x = z
        descent = b - Q @ x
        noise = 8 * torch.finfo(b.dtype).eps * (Q.abs() @ x + b.abs())
        candidates = ~free & (descent > noise)
        if not candidates.any():
            break
        free[descent.where(candidates, -torch.inf).argmax()] = True
    return x
