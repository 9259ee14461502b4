"""What several methods share: sums that stay, small linear algebra on Gram matrices, and two bases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from accel_weighting.statistics import InitialWeights, Method, State, Statistics, check_tasks, initial_vector

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

FLOOR = 1e-6
"""Smallest weight on a loss. At 0 the gradient of that task could no longer be observed in the one backward."""

TINY = 1e-30
"""At or below it a loss, or a mean of losses, counts as 0: its inverse would leave float32."""

SMALLEST = float(np.finfo(np.float64).tiny)
"""What a sum of losses, all of which may have reached 0, is divided by at least."""

RANK = 1e-7
"""Relative eigenvalue of a matrix of cosines below which it counts as 0: gradients are met in float32."""

ROUNDING = 1e-12
"""Relative difference that the order of a sum can make.

A sign decided by a smaller difference would depend on how the batch is partitioned.
"""

LIMIT = 1e3
"""Largest weight, about, that a Gram method may answer with where its own formula has a pole."""


def share(old: Array, new: Array, present: Mask) -> Array:
    """Absent tasks keep their ``old`` weight; present ones take ``new``, scaled so that the sum of ``old`` stays.

    Args:
        old: Weights before, ``[K]``.
        new: Proposed weights, ``[K]``; read where ``present``, positive there.
        present: bool ``[K]``.
    """
    proposed, left = np.maximum(new, FLOOR), old
    if np.count_nonzero(present) < len(present):
        proposed, left = np.where(present, proposed, 0.0), np.where(present, old, 0.0)
        if not np.count_nonzero(present):
            return old
    shared: Array = proposed * (left.sum() / proposed.sum())
    return shared if left is old else np.where(present, shared, old)


def softmax(scores: Array, among: Mask) -> Array:
    """The softmax of the ``scores`` of the tasks ``among``; 0 for the others, whose scores are not read."""
    if not among.any():
        return np.zeros(len(scores))
    scores = np.where(among, scores, -np.inf)
    powers = np.exp(scores - scores.max())
    shares: Array = powers / powers.sum()
    return shares


def log(x: Array, where: Mask) -> Array:
    """The logarithm of ``x``, 0 elsewhere."""
    logarithm: Array = np.log(np.where(where, x, 1.0))
    return logarithm


def lerp(start: Array, end: Array, weight: float) -> Array:
    """From ``start``, at weight 0 to the last bit, to ``end``, at weight 1."""
    difference = end - start
    return start + weight * difference if weight < 0.5 else end - (1 - weight) * difference


def mixed_seed(seed: int, counter: int) -> int:
    """A seed for draw number ``counter``: 32 bits, since torch's CPU generator reads no more of it."""
    return (seed * 0x9E3779B1 + counter) & 0xFFFFFFFF


class LossMethod(Method):
    """Base of the methods that are a function of positive losses alone.

    Their weights begin equal, with a sum of K or of 1, unless initial weights are given; what they remember of a task
    begins at 0.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"losses"})
    positive_losses: ClassVar[bool] = True
    sum_of_one: ClassVar[bool] = False
    memory: ClassVar[tuple[str, ...]] = ()

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """Equal weights unless ``initial_weights`` say otherwise, and nothing remembered."""
        check_tasks(self, tasks)
        default = 1 / len(tasks) if self.sum_of_one else 1.0
        weights = np.maximum(initial_vector(tasks, initial_weights, default), FLOOR)
        return weights, {"weights": weights, **{name: np.zeros(len(tasks)) for name in self.memory}}


class GramMethod(Method):
    """Base of the methods that are a function of the Gram matrix alone: they only say how to ``solve`` it.

    The present tasks' block of the Gram matrix is divided by its mean diagonal entry, so that the root mean square of
    the gradients' norms is 1, and solved. Before the first window the gradients are taken for orthonormal.

    A gradient of exactly 0 says nothing: that task counts as absent and keeps its weight.

    A method that keeps its sum has a solution of sum 1; the present tasks share what the absent ones leave of the
    sum of the initial weights, or keep their weights if nothing is left. Without, they take the solution as it is.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    acts_on: ClassVar[Literal["losses", "shared"]] = "shared"
    grows: ClassVar[bool] = True

    def solve(self, M: Array) -> Array:
        """The weights ``[K]`` for a Gram matrix ``M``, float64 ``[K, K]``, of mean diagonal 1, no task absent."""
        raise NotImplementedError

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """The solution for orthonormal gradients; tasks named in ``initial_weights`` have theirs."""
        weights = self.solve(np.eye(len(tasks)))
        if initial_weights is not None:
            weights = initial_vector(tasks, initial_weights, default=float(weights[0]))
        return weights, {"weights": weights}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """The solution for this window's Gram matrix; the state holds nothing but the weights."""
        weights = solve_present(self.solve, state["weights"], statistics, self.keeps_sum)
        return weights, {"weights": weights}


def solve_present(
    solve: Callable[[Array], Array], old: Array, statistics: Statistics, keeps_sum: bool = False
) -> Array:
    """Drops absent tasks and zero gradients, normalises the Gram matrix, solves, and puts the weights in place.

    Args:
        solve: From a Gram matrix of mean diagonal 1 to its weights, of sum 1 if ``keeps_sum``.
        old: Weights before, ``[K]``; tasks without a gradient keep theirs.
        statistics: The window; its ``gram`` and ``present`` are read.
        keeps_sum: Whether the weights keep the sum of ``old``, see :class:`GramMethod`.
    """
    assert statistics.gram is not None
    M, pulling = statistics.gram, with_gradients(statistics)
    if np.count_nonzero(pulling) < len(old):
        M = M[pulling][:, pulling]
    left = float(old[pulling].sum()) if keeps_sum else 1.0
    if not len(M) or left <= 0:
        return old.copy()
    weights = old.copy()
    weights[pulling] = left * solve((M + M.T) / (2 * M.diagonal().mean()))
    return weights


def with_gradients(statistics: Statistics) -> Mask:
    """Which tasks have a row in the Gram matrix that says something: present, with a gradient that is not 0.

    One whose square is below 1e-300 of the largest is 0 too: quotients of the two overflow.
    """
    assert statistics.gram is not None
    squares = statistics.gram.diagonal()
    pulling: Mask = statistics.present & (squares > 1e-300 * max(squares.max(), 0.0))
    return pulling


def cosines(M: Array) -> tuple[Array, Array]:
    """Cosines ``[K, K]``, 0 for a zero gradient, and norms ``[K]`` of the gradients whose Gram matrix is ``M``."""
    n = np.sqrt(np.maximum(M.diagonal(), 0))
    inverse = reciprocal(n)
    return M * inverse * inverse[:, None], n


def reciprocal(n: Array) -> Array:
    """``1 / n`` where n is positive, 0 elsewhere."""
    positive = n > 0
    return np.where(positive, 1 / np.where(positive, n, 1.0), 0.0)


def equal_projections(M: Array) -> tuple[Array, Array, float]:
    """Coefficients of the unit gradients ``u_k`` whose sum ``Σ a_k u_k`` has equal projections on all of them.

    ``a = C⁺1`` with the cosines C; the gradients' lengths play no part. Where 1 is in the null space of C the unit
    gradients cancel each other out and ``a = 1`` is the limit of ``(C + εI)⁻¹1``, up to a factor.

    Returns:
        ``a / n``, ``[K]``, the coefficients of the gradients themselves (0 for a zero gradient); the projections on
        ``u_k``, ``[K]``, which are 1 where C is regular; and ``Σa``.
    """
    C, n = cosines(M)
    c, E = np.linalg.eigh(C)
    keep = np.abs(c) > RANK * np.abs(c).max()
    a = E @ (np.where(keep, E.sum(0), 0.0) / np.where(keep, c, 1.0))  # C⁺1
    p = C @ a
    if a.sum() <= RANK * len(M):
        a = p = (n > 0).astype(np.float64)
    return a * reciprocal(n), p, float(a.sum())


def increasing_root(f: Callable[[float], float], low: float, high: float, tolerance: float) -> float:
    """Where ``f``, increasing and at most 0 at ``low``, is 0 up to ``tolerance``; ``high`` where it is nowhere above 0.

    Both ends are only as exact as rounding lets them be: an end where ``f`` is 0 up to the tolerance is the answer, and
    so is the low end where ``f`` is already above 0 there. Regula falsi in the Illinois variant: a few steps where f is
    piecewise linear.
    """
    below, above, last = f(low), f(high), 0.0
    if below >= -tolerance:
        return low
    if above <= tolerance:
        return high
    x = low
    for _ in range(60):  # above - below > 2 tolerance: no division by 0
        x = high - above * (high - low) / (above - below)
        y = f(x)
        if abs(y) <= tolerance:
            break
        again = y * last > 0  # the same side twice: halve the other end's value (the Illinois step)
        last = y
        if y > 0:
            high, above, below = x, y, below / 2 if again else below
        else:
            low, below, above = x, y, above / 2 if again else above
    return x


def min_norm(M: Array, m: float | None = None) -> Array:
    """``argmin αᵀMα`` over the simplex: the shortest vector in the convex hull of the gradients. Exact.

    It is ``α = u/Σu``, ``u = argmin_{u ≥ 0} ½uᵀ(M + m·11ᵀ)u − 1ᵀu`` for any ``m > 0``: the optimality conditions are
    the same. Of several minimisers it takes an even one, so that equal tasks have equal weights.

    Args:
        M: Gram matrix, ``[K, K]``.
        m: None: the smallest diagonal entry, which keeps the digits of short gradients. To be given where M is itself
            the result of a subtraction, so that its smallest entry may be noise.
    """
    if m is None:
        m = float(M.diagonal().min())
        if m <= 0:
            zero: Array = (M.diagonal() <= 0).astype(np.float64)
            return zero / np.count_nonzero(zero)
    s = 1 / np.sqrt(M.diagonal() / m + 1)  # scales the diagonal to 1, after a division by m
    Q = (M / m + 1) * s * s[:, None]
    null = null_space(Q, 1e-13 * len(M))
    P = 1e-6 * null @ null.T
    x = nonnegative_minimum(Q + P, s)
    for _ in range(3 * bool(null.size)):  # proximal steps: what P took off the optimum is given back
        x = nonnegative_minimum(Q + P, s + P @ x)
    alpha: Array = s * x / (s * x).sum()
    return alpha


def even(x: Array, M: Array) -> Array:
    """``x`` with its mean over tasks whose rows of the Gram matrix are the same, which leaves ``Σ x_k g_k`` as it is.

    Where a second eigenvalue is near 0, the eigenvectors of 0 are not exact enough for that to hold by itself.
    """
    if len(set(M.diagonal().tolist())) == len(M):
        return x
    same = (M[:, None] == M).all(-1)
    shared: Array = np.where(same.sum(1) > 1, same @ x / same.sum(1), x)
    return shared


def null_space(Q: Array, least: float) -> Array:
    """Eigenvectors of ``Q``, in columns, of eigenvalues below ``least``."""
    try:
        np.linalg.cholesky(Q - least * np.eye(len(Q)))  # exists where there are none, at a fraction of the price
        return np.zeros((len(Q), 0))
    except np.linalg.LinAlgError:
        values, V = np.linalg.eigh(Q)
        null: Array = V[:, values < least]
        return null


def nonnegative_minimum(Q: Array, b: Array) -> Array:
    """``argmin_{x ≥ 0} ½xᵀQx − bᵀx`` for a positive definite ``Q``, by the active set of Lawson and Hanson (1974)."""
    x = np.zeros_like(b)
    free = np.ones(len(b), np.bool_)
    for _ in range(10 * len(b)):
        while True:
            z = np.zeros_like(x)
            z[free] = np.linalg.solve(Q[free][:, free], b[free])
            blocking = free & (z <= 0)
            if not blocking.any():
                break
            step = np.where(blocking, 0.0, np.inf)  # 0 where x is 0 already, be it that z is 0 as well
            np.divide(x, x - z, out=step, where=blocking & (x > 0))
            x = x + step.min() * (z - x)
            free = free & (step > step.min())
            x = np.where(free, x, 0.0)
        x = z
        descent = b - Q @ x
        noise = 8 * np.finfo(np.float64).eps * (np.abs(Q) @ x + np.abs(b))
        candidates = ~free & (descent > noise)
        if not candidates.any():
            break
        free[np.where(candidates, descent, -np.inf).argmax()] = True
    return x
