"""One pass over large gradients on a GPU: all inner products, and the sum, by a kernel that Triton compiles.

Torch's own operators take 9 to 16 times what it takes to read the gradients once: they stack them first, and multiply
matrices of a few rows in tiles that are made for many. This takes 1.2 to 2.7 times (``examples/gpu_report.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pieces import is_dense
from .transfer import to_device

ROWS = 16
"""Rows of a product of matrices on a GPU, and the most tasks that one pass can take."""

BLOCK = 1 << 7
"""Entries of a row that are multiplied at once. Their sum is in float32, which tensor cores cut instead of rounding it:
2e-7 of the result. What the blocks come to is added up in float64."""

PROGRAMS = 16
"""Parallel parts of the pass for each multiprocessor of the GPU."""


@triton.jit(do_not_specialize=["steps"])  # type: ignore[untyped-decorator]
def _products_and_sum(  # type: ignore[no-untyped-def]
    addresses, products, total, n, steps,
    TASKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WITH_SUM: tl.constexpr,
):  # fmt: skip
    """Of rows of ``n`` entries at ``addresses`` (0: none came), of the type of ``total``.

    With few tasks every row of the matrices that are multiplied is a task's next block: row ``q TASKS + k`` is block
    ``q`` of task ``k``, and the products of different blocks are not used.
    """
    row = tl.arange(0, ROWS)
    k, q = row % TASKS, row // TASKS
    column = tl.arange(0, BLOCK)
    dtype: tl.constexpr = total.dtype.element_ty
    address = tl.load(addresses + k)
    start_of_row = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
    sums = tl.zeros((ROWS, ROWS), tl.float64)
    for step in range(steps):
        place = (tl.program_id(0) + step * tl.num_programs(0)).to(tl.int64) * (ROWS // TASKS * BLOCK)
        i = place + q[:, None] * BLOCK + column[None, :]
        x = tl.load(start_of_row[:, None] + i, mask=(address != 0)[:, None] & (i < n), other=0.0).to(tl.float32)
        if WITH_SUM:
            j = place + tl.arange(0, ROWS // TASKS)[:, None] * BLOCK + column[None, :]
            tl.store(total + j, tl.sum(tl.reshape(x, (ROWS // TASKS, TASKS, BLOCK)), 1).to(dtype), mask=j < n)
        # A power of two brings the largest entry of every row near 1, so that no square leaves the range.
        exponent = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000
        exponent = tl.minimum(tl.maximum(exponent, 0x00800000), 0x7E000000)
        x *= (0x7F000000 - exponent).to(tl.float32, bitcast=True)[:, None]
        if dtype == tl.float32:  # x = a + b / 2048, each of 11 bits; b's own products are below 1e-7 of the result
            a = x.to(tl.float16)
            b = ((x - a.to(tl.float32)) * 2048).to(tl.float16)
            found = tl.dot(a, tl.trans(a)) + tl.dot(a, tl.trans(b)) * (1 / 1024)
        else:
            a = x.to(dtype)
            found = tl.dot(a, tl.trans(a))
        size = exponent.to(tl.float32, bitcast=True).to(tl.float64)
        sums += found.to(tl.float64) * size[:, None] * size[None, :]
    own = products + tl.program_id(0).to(tl.int64) * ROWS * ROWS
    tl.store(own + row[:, None] * ROWS + row[None, :], sums)


def takes(rows: Sequence[Tensor | None]) -> bool:
    """Whether the kernel can read these gradients, of which at least one came: alike, dense, aligned, real numbers."""
    came = [g for g in rows if g is not None]
    some = came[0]
    return (
        len(rows) <= ROWS
        and all(type(g) is Tensor for g in came)  # others may have no address
        and some.is_cuda
        and some.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and some.numel() < 1 << 31
        and torch.cuda.get_device_capability(some.device) >= (8, 0)
        and is_dense(some)
        and all(g.shape == some.shape and g.stride() == some.stride() and g.dtype == some.dtype for g in came)
        and all(g.data_ptr() % 16 == 0 for g in came)
    )


def products_and_sum(rows: Sequence[Tensor | None], with_sum: bool) -> tuple[Tensor, Tensor | None]:
    """Inner products of all gradients, float64 ``[K, K]``, and their sum if it is wanted.

    The sum is taken in float32 and rounded once. What is not finite makes products of its own row NaN.

    Args:
        rows: One gradient per task, None where it has none; ``takes`` must be true of them.
        with_sum: Whether to make the sum as well.

    Raises:
        RuntimeError: The compiled kernel is wrong; found before it is used for the first time.
        Exception: What Triton says, such as that it finds no C compiler.
    """
    some = next(g for g in rows if g is not None)
    with torch.cuda.device(some.device):
        processors = torch.cuda.get_device_properties(some.device).multi_processor_count
        tasks, n = triton.next_power_of_2(len(rows)), some.numel()
        _try(some.device, some.dtype, tasks, with_sum, n % 16 == 0)
        return launch(rows, some, with_sum, processors * PROGRAMS)


def launch(rows: Sequence[Tensor | None], some: Tensor, with_sum: bool, most: int) -> tuple[Tensor, Tensor | None]:
    """The same, untried, in at most ``most`` parallel parts; ``some`` is one of the gradients that came."""
    K, n = len(rows), some.numel()
    tasks = triton.next_power_of_2(K)
    block = BLOCK // 2 if some.dtype == torch.float32 else BLOCK  # makes room for the other 11 bits
    blocks = triton.cdiv(n, ROWS // tasks * block)
    steps = triton.cdiv(blocks, most)
    programs = triton.cdiv(blocks, steps)
    addresses = [0 if g is None else g.data_ptr() for g in rows] + [0] * (tasks - K)
    total = torch.empty_like(some) if with_sum else some
    found = torch.empty(programs, ROWS, ROWS, dtype=torch.float64, device=some.device)
    _products_and_sum[(programs,)](
        to_device(torch.tensor(addresses), some.device), found, total, n, steps, tasks, ROWS, block, with_sum,
        num_warps=1, num_stages=2,
    )  # fmt: skip
    blockwise = found.sum(0).view(ROWS // tasks, tasks, ROWS // tasks, tasks)
    products = blockwise.diagonal(dim1=0, dim2=2).sum(-1)[:K, :K]
    return (products + products.T) / 2, total if with_sum else None


@functools.cache
def _try(device: torch.device, dtype: torch.dtype, tasks: int, with_sum: bool, even: bool) -> None:
    """Whether what Triton compiles for these arguments is right here: Triton 3.6 got one such kernel wrong.

    It compiles anew for each of them, and for lengths that are multiples of 16.

    Raises:
        RuntimeError: It is not.
    """
    n = (1 << 12) + (0 if even else 5)
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(tasks, n, generator=generator).to(dtype).double()
    exact[-1] *= 2.0**-8
    rows = [g.to(device, dtype) for g in exact]
    products, total = launch(rows, rows[0], with_sum, 2)
    difference = (products.cpu() - exact @ exact.T).abs() / torch.outer(*2 * [exact.norm(dim=1)])
    wrong = not bool(difference.max() <= 1e-5)
    if total is not None:
        error = (total.cpu().double() - exact.sum(0)).abs().max()
        wrong |= not bool(error <= tasks * torch.finfo(dtype).eps * exact.abs().max())
    if wrong:
        raise RuntimeError(f"the compiled kernel is wrong for {tasks} tasks in {dtype}")
