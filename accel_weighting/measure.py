"""What gradients that arrived apart come to: their sum, their inner products, their products with features.

Few kernels where tensors are small, bounded memory where they are large; float32 or wider.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

SMALL = 1 << 16
"""Elements up to which a tensor's kernel costs more to start than to run, about."""

CHUNK = 1 << 20
"""Elements per task that are gathered at once: bounds the memory of the products whatever the size of z."""

Rows = Sequence[Tensor | None]
"""One gradient per task, None where it has none."""


def wide(x: Tensor) -> Tensor:
    """float32 or wider: products of half-precision gradients overflow."""
    return x if x.dtype in (torch.float64, torch.complex128) else x.float()


def weighted_sum(rows: Rows, weights: Tensor | None = None) -> Tensor | None:
    """A fresh sum of the gradients that came, each times its weight; None if none came.

    One kernel on a stack of small tensors; one pass over each where memory is what takes the time.

    Args:
        rows: One gradient per task.
        weights: ``[K]``; None: 1 each.
    """
    gradients = [g for g in rows if g is not None]
    if not gradients:
        return None
    first = gradients[0]
    if weights is not None and len(gradients) < len(rows):
        weights = torch.stack([w for w, g in zip(weights, rows, strict=True) if g is not None])
    w = None if weights is None else weights.to(first.dtype)
    if first.numel() <= SMALL:
        V = torch.stack(gradients)
        return (V if w is None else V * w.view(-1, *(1,) * first.ndim)).sum(0)
    total = first.clone() if w is None else first * w[0]
    for k, g in enumerate(gradients[1:], 1):
        total = total.add_(g) if w is None else total.addcmul_(g, w[k])
    return total


def gram(tensors: Sequence[Rows]) -> Tensor:
    """Inner products of all gradients, ``[K, K]``, summed over the tensors; rows that are None count as zeros."""
    total: Tensor | None = None
    for rows in tensors:
        if any(g is not None for g in rows):
            products = _gram(rows)
            total = products if total is None else total + products
    assert total is not None
    return total


def _gram(rows: Rows) -> Tensor:
    some = next(g for g in rows if g is not None)
    zeros = some.new_zeros(()).expand_as(some) if any(g is None for g in rows) else some
    full = [zeros if g is None else g for g in rows]
    if some.is_complex():  # a complex number is a pair of real ones
        full = [torch.view_as_real(g.resolve_conj()) for g in full]
    if some.numel() <= CHUNK:
        V = wide(torch.stack(full).flatten(1))
        return V @ V.T
    total = torch.zeros(len(full), len(full), dtype=torch.float64, device=some.device)
    for part in zip(*(torch.split(g.reshape(-1), CHUNK) for g in full), strict=True):
        V = wide(torch.stack(part))
        total += V @ V.T
    return total


def layer_gradients(rows: Rows, inputs: Tensor) -> Tensor:
    """``g_kᵀ a`` of every task: its gradient at the weight of the Linear that gave z, ``[K, out, in]``."""
    a = wide(inputs.reshape(-1, inputs.shape[-1]))
    some = next(g for g in rows if g is not None)
    zeros = a.new_zeros(some.shape[-1], a.shape[-1])
    return torch.stack([zeros if g is None else wide(g.reshape(-1, g.shape[-1])).T @ a for g in rows])


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
    for product, (a, b, _) in zip(products, pairs, strict=True):
        if a is not None and b is not None:
            torch.mm(a.T, b, out=product)
    if pairs:
        products /= torch.stack([factor for *_, factor in pairs])[:, None, None]
    return products
