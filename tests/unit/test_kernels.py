"""The kernel for large gradients without a GPU: by Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

TASKS = (1, 2, 3, 5, 8, 16)
SIZES = {torch.float32: (1.0, 1e-40, 1e-22, 1e18, 1e37), torch.float16: (1.0,)}
"""Without bfloat16, whose bits the interpreter multiplies as if they were integers: tests/gpu has it."""


def interpreted() -> None:
    """Products of all kinds of gradients beside those in float64; for a process of its own."""
    from accel_weighting import kernels

    torch.manual_seed(0)
    for dtype, sizes in SIZES.items():
        for K in TASKS:
            for size in sizes:
                for n, most in ((3001, 2), (4096, 64)):
                    rows: list[Tensor | None] = [(torch.randn(n) * size * 2.0**-k).to(dtype) for k in range(K)]
                    if K == 5:
                        rows[2] = None
                    exact = torch.stack([torch.zeros(n).double() if g is None else g.double() for g in rows])
                    lengths = exact.norm(dim=1)
                    some = next(g for g in rows if g is not None)
                    products, total = kernels.launch(rows, some, K != 8, most)
                    difference = (products - exact @ exact.T).abs() / torch.outer(lengths, lengths).clamp(min=1e-300)
                    assert difference.max() <= 1e-6, (dtype, K, size, n, difference.max())
                    if K == 8:
                        assert total is None
                        continue
                    assert total is not None and total.dtype == dtype
                    error = (total.double() - exact.sum(0)).abs().max() / exact.abs().max()
                    assert error <= K * torch.finfo(dtype).eps, (dtype, K, size, n, error)


def tried() -> None:
    """The trial before the first use passes what is right, and nothing else."""
    from accel_weighting import kernels

    attempt, right = kernels._try.__wrapped__, kernels.launch
    for tasks, with_sum, even in ((1, True, True), (4, True, False), (16, False, True)):
        for dtype in SIZES:
            attempt(torch.device("cpu"), dtype, tasks, with_sum, even)
    for what in ("products", "sum"):

        def wrong(rows: Any, some: Tensor, with_sum: bool, most: int, what: str = what) -> tuple[Tensor, Tensor | None]:
            products, total = right(rows, some, with_sum, most)
            assert total is not None
            products[0, -1] *= 1.01 if what == "products" else 1
            total[7] += 1.0 if what == "sum" else 0
            return products, total

        kernels.launch = wrong
        with pytest.raises(RuntimeError, match="the compiled kernel is wrong for 4 tasks"):
            attempt(torch.device("cpu"), torch.float32, 4, True, True)


def compiled() -> None:
    """For the oldest GPUs that the kernel takes, for Hopper and for Blackwell."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from accel_weighting import kernels

    for capability in (80, 90, 120):
        for dtype in ("fp32", "bf16", "fp16"):
            signature: dict[str, Any] = {"addresses": "*i64", "products": "*fp64", "total": f"*{dtype}", "n": "i32"}
            constants = {"TASKS": 4, "ROWS": kernels.ROWS, "BLOCK": kernels.BLOCK, "WITH_SUM": True}
            signature |= {"steps": "i32", **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(kernels._products_and_sum, signature, constants)
            found = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 1, "num_stages": 2})
            assert found.asm["cubin"]


@pytest.mark.parametrize(("run", "interpret"), [(interpreted, "1"), (tried, "1"), (compiled, "0")])
def test_the_kernel(run: Any, interpret: str) -> None:
    """In a process of its own: Triton is told at its import whether to interpret."""
    code = f"from tests.unit.test_kernels import {run.__name__}; {run.__name__}(); print('done')"
    if interpret == "1" and version("triton") < "3.9" and np.__version__ >= "2.4":
        pytest.skip("the interpreter of Triton before 3.9 does not run with NumPy 2.4")
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.strip().endswith("done"), done.stderr[-3000:]
