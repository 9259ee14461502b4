"""Large tensors in pieces: bounded memory, and sums that are short enough for the precision that they are taken in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SMALL_ON_CPU, SMALL = 1 << 16, 1 << 20
"""Elements over all tasks up to which kernels cost more to start than to run, about, and copies take no memory that
can be noticed."""

PIECE_ON_CPU = 1 << 18
"""Elements, over all tasks together, that are read at once: 1 MB of float32, which stays in a core's cache."""

PIECE_BYTES = 1 << 25
"""Bytes that are gathered at once on a GPU: 32 MB, which take far longer than their kernels take to start."""

BLOCK = 1 << 12
"""Products of a float32 row that are summed in float32; what blocks come to is added up in float64."""

HALF = (torch.float16, torch.bfloat16)

BLOCK_OF_HALF = 1 << 10
"""The same of a half-precision row, whose products a GPU sums in float32 by cutting instead of rounding: 4e-6 of the
result at this length, 2e-5 at the other, on an H200."""


def wide(x: Tensor) -> Tensor:
    """float32 or wider: products of half-precision gradients overflow."""
    return x if x.dtype in (torch.float64, torch.complex128) else x.float()


def piece_size(x: Tensor) -> int:
    """How many elements of tensors like this one are read at once."""
    return PIECE_ON_CPU if x.is_cpu else PIECE_BYTES // x.element_size()


def copied_size(x: Tensor) -> int:
    """How many elements of it are copied at once where each copy is wider: on a CPU next to nothing of the whole."""
    size = piece_size(x) // 2
    return min(size, max(1 << 13, x.numel() // 64)) if x.device.type == "cpu" else size


def is_small(x: Tensor, tasks: int) -> bool:
    """Whether so many tensors like this one are small."""
    return tasks * x.numel() <= (SMALL_ON_CPU if x.is_cpu else SMALL)


def is_dense(x: Tensor) -> bool:
    """Whether it fills its part of memory, in some order of its dimensions."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous() or (x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim]))


def in_pieces(tensors: Sequence[Tensor], size: int, whole: int = 0) -> Iterator[Sequence[Tensor]]:
    """Tensors that are alike in their leading dimensions, in corresponding pieces; nothing is copied.

    Args:
        tensors: What is read together.
        size: Elements that a piece of the largest of them may have.
        whole: How many of the last dimensions are not cut.
    """
    if not whole and all(x.is_contiguous() and x.shape == tensors[0].shape for x in tensors):
        tensors = [x.view(-1) for x in tensors]
    largest = max(tensors, key=Tensor.numel)
    if largest.numel() <= size or largest.ndim <= whole:
        yield tensors
        return
    row = largest.numel() // largest.shape[0]
    if row > size and largest.ndim > whole + 1:
        for rows in zip(*(x.unbind(0) for x in tensors), strict=True):
            yield from in_pieces(rows, size, whole)
    else:
        yield from zip(*(torch.split(x, max(1, size // row)) for x in tensors), strict=True)
