"""Large tensors in pieces: bounded memory, and sums that are short enough for the precision that they are taken in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No product of float32 numbers is rounded to TF32, whatever the process allows; on a GPU alone is it possible."""
    if device.type != "cuda":
        yield
        return
    before = [(place, name, getattr(place, name)) for place, name in _SWITCHES]
    try:
        for place, name, _ in before:
            setattr(place, name, False if name == "allow_tf32" else "ieee")
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _switches() -> list[tuple[Any, str]]:
    """Where torch is told whether to round to TF32."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        cudnn: Any = torch.backends.cudnn
        return [(torch.backends.cuda.matmul, "fp32_precision"), (cudnn.conv, "fp32_precision")]
    return [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]


_SWITCHES = _switches()
