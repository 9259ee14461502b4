"""What gradients that arrived apart come to: their sum, their inner products, their products with features.

Few kernels where tensors are small; bounded memory where they are large, which are then read in pieces. What is summed
over a piece is in float32 or wider, and what the pieces come to is added up in float64.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .contexts import full_precision
from .layers import Layer, weight_gradient, weight_gradients_of_rows
from .pieces import BLOCK, BLOCK_OF_HALF, HALF, copied_size, in_pieces, is_dense, is_small, piece_size
from .pieces import wide as wide

logger = logging.getLogger("accel_weighting")

TINY, HUGE = 1e-30, 1e36
"""Between them sums of squares in float32 have lost nothing that matters."""

Rows = Sequence[Tensor | None]
"""One gradient per task, None where it has none."""


class Gathered(list[Tensor | None]):
    """Rows that are looked through, and whose stack is made, once for all that read it.

    Attributes:
        came: Indices of the tasks that have a gradient.
        total: Their sum without a graph, if it was made with their products.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.came = [k for k, g in enumerate(rows) if g is not None]
        self.total: Tensor | None = None
        self._stack: Tensor | None = None

    @classmethod
    def of(cls, rows: Rows) -> Gathered:
        """The rows themselves, where they are looked through already."""
        return rows if isinstance(rows, Gathered) else cls(rows)

    def some(self) -> Tensor:
        """One of the gradients that came."""
        return self[self.came[0]]  # type: ignore[return-value]

    def stack(self) -> Tensor:
        """``[K, ...]``; zeros where there is none."""
        if self._stack is None or torch.is_grad_enabled():  # in which case every reader has a graph of its own
            self._stack = torch.stack(self.with_zeros())
        return self._stack

    def with_zeros(self) -> list[Tensor]:
        """The gradients; zeros where there is none."""
        if len(self.came) == len(self):
            return self  # type: ignore[return-value]
        zeros = self.some().new_zeros(()).expand_as(self.some())
        return [zeros if g is None else g for g in self]


def weighted_sum(rows: Rows, weights: Tensor | None = None) -> Tensor | None:
    """The sum of the gradients that came, each times its weight; None if none came, itself if it is one alone.

    One kernel on a stack of small tensors; one pass over each where memory is what takes the time.

    Args:
        rows: One gradient per task.
        weights: ``[K]``; None: 1 each.
    """
    rows = Gathered.of(rows)
    if not rows.came:
        return None
    k, *others = rows.came
    total = rows.some()
    w = None if weights is None else weights.to(total.dtype)
    if w is None and not others:
        return total
    if w is None and rows.total is not None and not torch.is_grad_enabled():
        return rows.total
    if is_small(total, len(rows)):
        V = rows.stack()
        return (V if w is None else V * w.view(-1, *(1,) * total.ndim)).sum(0)
    if w is not None:
        total = total * w[k]
    for n, j in enumerate(others):
        g: Any = rows[j]
        if w is not None:
            total = total.addcmul_(g, w[j])
            continue
        total = total.add_(g) if n else total + g  # the first sum is fresh, so that nothing was copied before
    return total


# ---- inner products ----------------------------------------------------------------------------------------------


def gram(tensors: Sequence[Rows], with_sums: bool = False) -> Tensor:
    """Inner products of all gradients, ``[K, K]``, summed over the tensors; rows that are None count as zeros.

    Args:
        tensors: For every tensor one gradient per task.
        with_sums: Whether their sums follow, which cost next to nothing where one kernel reads all that is large.
    """
    total: Tensor | None = None
    for given in tensors:
        rows = Gathered.of(given)
        if rows.came:
            products = _gram(rows, with_sums and rows is given)
            total = products if total is None else total + products
    assert total is not None
    return total


def _gram(rows: Gathered, with_sum: bool) -> Tensor:
    some, came, K = rows.some(), rows.came, len(rows)
    if is_small(some, K):
        V = _real(rows.stack()).flatten(1)
        V = wide(V) if some.is_mps else V.double()
        return V @ V.T
    if some.is_cuda and (products := _in_one_pass(rows, with_sum)) is not None:
        return products
    with full_precision(some):
        products = _gram_in_pieces([_real(rows[k]) for k in came])  # type: ignore[arg-type]
    if len(came) == K:
        return products
    total = products.new_zeros(K, K)
    for row, k in zip(products, came, strict=True):
        for x, j in zip(row, came, strict=True):
            total[k, j] = x
    return total


def _in_one_pass(rows: Gathered, with_sum: bool) -> Tensor | None:
    """By the kernel for large gradients, which makes their sum on its way; None where it cannot be had."""
    kernels = _kernels()
    if kernels is None or not kernels.takes(rows):
        return None
    try:
        products, rows.total = kernels.products_and_sum(rows, with_sum)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        _without_kernels.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        logger.warning(
            "Triton is installed, and its kernel for inner products of large gradients cannot be used here (%s). Torch "
            "makes them instead, which takes about ten times as long.",
            _without_kernels[0],
        )
        return None
    return products  # type: ignore[no-any-return]


_without_kernels: list[str] = []
"""Why the kernel is not used, once that is known."""


def _kernels() -> Any:
    """The module with the kernel; None where there is none."""
    if torch.version.cuda is None or _without_kernels:
        return None
    try:
        from . import kernels
    except ImportError:
        return None
    return kernels


def _real(x: Tensor) -> Tensor:
    """A complex number is a pair of real ones."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _gram_in_pieces(rows: Sequence[Tensor]) -> Tensor:
    """``[n, n]`` in float64 of rows that all came."""
    K, on_cpu = len(rows), rows[0].is_cpu
    size = max(BLOCK, piece_size(rows[0]) // K // BLOCK * BLOCK)
    scales = None if on_cpu else _scales(rows)
    sums: list[Tensor] = []
    total: Tensor | None = None
    factors = None if scales is None else scales.to(rows[0].dtype).unsqueeze(1)
    for part in in_pieces(rows, size):
        V = torch.stack(list(part)).flatten(1)
        if on_cpu:
            products = _checked(V)
            total = products if total is None else total.add_(products)
        else:
            parts = _products(V if factors is None else V.mul_(factors))
            sums += [_added_up(parts).unsqueeze(0)] if V.dtype in HALF else parts  # of which there are many
        del V  # before the next is made
    if total is not None:
        return total
    total = _added_up(sums)
    if scales is None:
        return total
    scales = scales.double()  # products of two leave the range of float32
    return total / torch.outer(scales, scales)


def _checked(V: Tensor) -> Tensor:
    """Products on a CPU, which can be looked at: done again in float64 where squares left the range of float32."""
    products = _added_up(_products(wide(V)))
    if V.dtype == torch.float64:
        return products
    squares = products.diagonal()
    doubtful = ~((squares > TINY) & (squares < HUGE))
    if bool(doubtful.any()) and bool(V[doubtful].any()):
        V = V.double()
        products = V @ V.T
    return products


def _added_up(parts: Sequence[Tensor]) -> Tensor:
    every = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return every.sum(0, dtype=torch.float32 if every.is_mps else torch.float64)


def _products(V: Tensor) -> list[Tensor]:
    """``V Vᵀ`` in parts ``[·, K, K]`` that are still to be added up: one long float32 sum would be off by 1e-5."""
    n = V.shape[1]
    block = BLOCK_OF_HALF if V.dtype in HALF else BLOCK
    whole = n // block * block
    parts = []
    if whole:
        W = V.narrow(1, 0, whole).view(len(V), -1, block)
        parts.append(_bmm(W.transpose(0, 1)))
    if whole < n:
        parts.append(_bmm(V.narrow(1, whole, n - whole).unsqueeze(0)))
    return parts


def _bmm(W: Tensor) -> Tensor:
    """``W Wᵀ`` of a batch; of half precision with sums in float32."""
    if W.dtype in HALF:
        if _WIDE_SUMS and W.is_cuda:
            return torch.bmm(W, W.mT, out_dtype=torch.float32)
        W = W.float()
    return torch.bmm(W, W.mT)


_WIDE_SUMS = hasattr(torch.ops.aten.bmm, "dtype")
"""Whether this torch multiplies half-precision matrices into float32 ones, which it does on a GPU alone."""


def _scales(rows: Sequence[Tensor]) -> Tensor | None:
    """Powers of two, float32 ``[n]``, that bring every row's largest entry near 1; None where no square can leave."""
    if rows[0].dtype not in (torch.float32, torch.bfloat16):
        return None
    largest = torch.stack(torch._foreach_norm(list(rows), float("inf"))).float()
    exponents = largest.view(torch.int32) & 0x7F800000
    return (0x7F000000 - exponents).clamp_(min=1 << 23).view(torch.float32)


def square(g: Tensor) -> Tensor:
    """The squared norm of one gradient, a float64 number on its device, with next to no memory besides."""
    x = _real(g)
    if x.is_cpu and x.dtype == torch.float32 and x.is_contiguous():
        whole = x.numel() // BLOCK * BLOCK
        x = x.view(-1)
        W = x[:whole].view(-1, 1, BLOCK)
        total = torch.bmm(W, W.mT).sum(dtype=torch.float64) + x[whole:].double().square().sum()
        if float(total) > TINY * max(1, len(W)) and float(total) < HUGE:
            return total
    return _square_in_pieces(x)


def _square_in_pieces(x: Tensor) -> Tensor:
    if x.is_cuda and _FOREACH_NORM and is_dense(x):
        return torch._foreach_norm([x], 2, dtype=torch.float64)[0].square()  # at the speed of memory, as no other is
    dtype = torch.float32 if x.is_mps else torch.float64
    size = min(piece_size(x) // 2, max(1 << 13, x.numel() // 32))
    total = torch.zeros((), dtype=dtype, device=x.device)
    for (part,) in in_pieces([x], size):
        wider = part.to(dtype).flatten()
        total += wider.dot(wider)
        del wider  # before the next is made
    return total


_FOREACH_NORM = "dtype" in str(torch.ops.aten._foreach_norm.Scalar._schema)
"""Whether this torch takes norms of float32 in float64 without a copy."""


# ---- of rows -------------------------------------------------------------------------------------------------------


def squares_of_rows(g: Tensor, index: Tensor, tasks: int) -> Tensor:
    """The squared norms of every task's rows of one gradient, float64 ``[K]``, with next to no memory besides.

    An index beyond K, which is no task and not none, makes all of them NaN.

    Args:
        g: The gradient.
        index: The task of every row, of the leading shape of ``g``; K for none.
        tasks: K.
    """
    x = _real(g)
    dtype = torch.float32 if x.is_mps else torch.float64
    flat = index.flatten()
    total = torch.zeros(tasks + 1, dtype=dtype, device=x.device)
    for part, own in in_pieces([x.reshape(len(flat), -1), flat.unsqueeze(1)], copied_size(x), 1):
        squares = part.to(dtype).square().sum(-1).flatten()
        total.index_add_(0, own.flatten().clamp(0, tasks), squares)
    known = ((index >= 0) & (index <= tasks)).all()
    return torch.where(known, total[:tasks], torch.nan)


def rows_touched(g: Tensor, index: Tensor, tasks: int) -> Tensor:
    """Whose rows of a gradient are not 0, bool ``[K + 1]``, the last for rows of none. NaN and infinity are no sign.

    Args:
        g: The gradient.
        index: As in ``squares_of_rows``.
        tasks: K.
    """
    x, flat = _real(g), index.flatten()
    counts = torch.zeros(tasks + 1, dtype=torch.int64, device=x.device)
    for part, own in in_pieces([x.reshape(len(flat), -1), flat.unsqueeze(1)], copied_size(x), 1):
        there = ((part != 0) & part.isfinite()).any(-1).flatten()
        counts.index_add_(0, own.flatten().clamp(0, tasks), there.long())
    return counts > 0


def layer_gradients_of_rows(g: Tensor, index: Tensor, tasks: int, layer: Layer, inputs: Tensor) -> Tensor:
    """The gradient of every task's rows at the weight of the layer that gave z, ``[K, out, in·…]``."""
    with full_precision(g):
        matrices = weight_gradients_of_rows(layer, inputs, g, index, tasks)
    known = ((index >= 0) & (index <= tasks)).all()
    return torch.where(known, matrices, torch.nan)


# ---- at a layer's weight, and rotated ----------------------------------------------------------------------------


def layer_gradients(rows: Rows, layer: Layer, inputs: Tensor) -> Tensor:
    """Every task's gradient at the weight of the layer that gave z, ``[K, out, in·…]``."""
    some = next(g for g in rows if g is not None)
    with full_precision(some):
        matrices = [None if g is None else weight_gradient(layer, inputs, g) for g in rows]
    zeros = next(m for m in matrices if m is not None).new_zeros(layer.matrix)
    return torch.stack([zeros if m is None else m for m in matrices])


def cross_products(rows: Rows, c: Tensor, m: int, dim: int, z: Tensor | None) -> Tensor:
    """``G_kᵀ G_j`` of all pairs k < j on the first m features, and ``G_kᵀ Z`` of all tasks where z is given.

    Args:
        rows: Gradients at the rotated features.
        c: By how much each was multiplied, ``[K]``; divided out.
        m: How many features are rotated.
        dim: The dimension that holds the features.
        z: The shared representation, or None.
    """
    some = next(g for g in rows if g is not None)

    def features(x: Tensor) -> Tensor:
        return wide(x.movedim(dim, -1)[..., :m].reshape(-1, m))

    G = [None if g is None else features(g) for g in rows]
    pairs = [(G[k], G[j], c[k] * c[j]) for k, j in itertools.combinations(range(len(G)), 2)]
    if z is not None:
        Z = features(z)
        pairs += [(g, Z, c[k]) for k, g in enumerate(G)]
    products = torch.zeros(len(pairs), m, m, dtype=wide(some[:0]).dtype, device=some.device)
    with full_precision(some):
        for product, (a, b, _) in zip(products, pairs, strict=True):
            if a is not None and b is not None:
                torch.mm(a.T, b, out=product)
    if pairs:
        products /= torch.stack([factor for *_, factor in pairs])[:, None, None]
    return products
