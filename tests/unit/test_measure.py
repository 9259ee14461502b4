"""Sums, inner products and norms of gradients: precise at any size and magnitude, in bounded memory, in few kernels.

Kernels of a GPU are counted without one: fake tensors on a device called cuda, seen by a dispatch mode.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import accel_weighting
from accel_weighting import measure, pieces
from accel_weighting.measure import Gathered

MILLION = 1 << 20

# Operators that start no kernel: views, and the making of a tensor that nothing is written to.
NO_KERNEL = {"view", "transpose", "permute", "t", "split", "unbind", "slice", "select", "expand", "detach", "alias"}
NO_KERNEL |= {"device", "unsqueeze", "_unsafe_view", "view_as_real", "empty", "diagonal"}


def gradients(K: int, N: int, heavy: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows with much in common, so that no inner product is next to 0; or with heavy tails."""
    torch.manual_seed(0)
    common = torch.randn(N)
    rows = []
    for k in range(K):
        g = common + torch.randn(N)
        if heavy:
            g = g / torch.rand(N).clamp_(min=1e-6)
        rows.append((g * 10.0**-k).to(dtype))
    return rows


def exact_gram(rows: list[Tensor]) -> Tensor:
    products = [[float(a.double().flatten().dot(b.double().flatten())) for b in rows] for a in rows]
    return torch.tensor(products, dtype=torch.float64)


def assert_gram(rows: list[Tensor], tolerance: float) -> None:
    found, expected = measure.gram([Gathered(rows)]), exact_gram(rows)
    lengths = expected.diagonal().sqrt()
    difference = ((found - expected).abs() / torch.outer(lengths, lengths)).max()
    assert difference <= tolerance


# ---- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heavy", "tolerance"), [(False, 1e-6), (True, 1e-5)], ids=["normal", "heavy tails"])
@pytest.mark.parametrize(("K", "N"), [(2, 4 * MILLION), (4, MILLION + 12_345), (3, 40_000)])
def test_float32_inner_products_are_precise_at_any_size(K: int, N: int, heavy: bool, tolerance: float) -> None:
    assert_gram(gradients(K, N, heavy), tolerance)


@pytest.mark.parametrize(("heavy", "tolerance"), [(False, 1e-6), (True, 1e-5)], ids=["normal", "heavy tails"])
def test_float32_norms_are_precise_at_any_size(heavy: bool, tolerance: float) -> None:
    g = gradients(1, 4 * MILLION + 7, heavy)[0]
    torch.testing.assert_close(measure.square(g), g.double().square().sum(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [1_000, 300_001])
def test_other_precisions(dtype: torch.dtype, N: int) -> None:
    rows = gradients(3, N, dtype=dtype)
    assert_gram(rows, 1e-13 if dtype == torch.float64 else 1e-6)
    expected = rows[0].double().square().sum()
    torch.testing.assert_close(measure.square(rows[0]), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("size", [1e-37, 1e-22, 1e18, 1e37])
def test_the_range_is_kept_where_nothing_may_be_looked_at(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host cannot see whether a square left the range, and do it again."""
    rows = [g * size for g in gradients(3, MILLION)]
    expected = exact_gram(rows)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    torch.testing.assert_close(measure.gram([Gathered(rows)]), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("N", [100, 70_000, MILLION])
@pytest.mark.parametrize("size", [1e-22, 1e-38, 1e18, 1e30])
def test_neither_small_nor_large_gradients_leave_the_range(size: float, N: int) -> None:
    if torch.tensor(1e-40) * 1 == 0:
        pytest.skip("this process takes the smallest numbers for 0: old compiled code, loaded by another test, says so")
    rows = [g * size for g in gradients(2, N)]
    assert_gram(rows, 1e-6)
    assert_gram([rows[0], gradients(2, N)[1]], 1e-6)
    torch.testing.assert_close(measure.square(rows[0]), rows[0].double().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("N", [100, MILLION])
def test_what_is_not_finite_stays_so_in_its_own_row(N: int) -> None:
    rows = gradients(3, N)
    rows[1][N // 2] = torch.inf
    finite = torch.isfinite(measure.gram([rows]).diagonal())
    assert finite.tolist() == [True, False, True]
    assert not torch.isfinite(measure.square(rows[1]))


@pytest.mark.parametrize("N", [50, 120_000])
def test_absent_rows_are_rows_of_zeros(N: int) -> None:
    a, b = gradients(2, N)
    found = measure.gram([Gathered([None, a, None, b])])
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[1::2, 1::2] = exact_gram([a, b])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def laid_out(kind: str) -> Tensor:
    g = torch.randn(4, 32, 40, 41)
    return {
        "channels last": lambda: g.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: g.transpose(1, 3),
        "expanded": lambda: g[:, :1].expand(4, 32, 40, 41),
        "one long row": lambda: g.reshape(1, 1, -1)[..., ::2],
        "complex": lambda: torch.complex(g, -2 * g),
    }[kind]()


@pytest.mark.parametrize("kind", ["channels last", "transposed", "expanded", "one long row", "complex"])
def test_gradients_may_lie_in_memory_as_they_like(kind: str) -> None:
    a, b = laid_out(kind), laid_out(kind)
    real = [torch.view_as_real(x) if x.is_complex() else x for x in (a, b)]
    torch.testing.assert_close(measure.gram([[a, b]]), exact_gram(real), rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(measure.square(a), real[0].double().square().sum(), rtol=1e-6, atol=0)


# ---- sums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [10, 100_000])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("absent", [(), (0,), (0, 2)])
def test_sums_are_fresh_and_leave_the_gradients(N: int, weighted: bool, absent: tuple[int, ...]) -> None:
    rows: list[Any] = [None if k in absent else g for k, g in enumerate(gradients(3, N, dtype=torch.float64))]
    before = [None if g is None else g.clone() for g in rows]
    weights = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64) if weighted else None
    w = torch.ones(3, dtype=torch.float64) if weights is None else weights
    expected = sum(w[k] * g for k, g in enumerate(rows) if g is not None)
    for given in (rows, Gathered(rows)):
        torch.testing.assert_close(measure.weighted_sum(given, weights), expected)
    for g, b in zip(rows, before, strict=True):
        assert g is b is None or torch.equal(g, b)


def test_no_gradients_have_no_sum() -> None:
    assert measure.weighted_sum([None, None]) is None


def test_one_gradient_alone_is_not_copied() -> None:
    g = torch.randn(3)
    assert measure.weighted_sum([None, g]) is g


# ---- memory and time ---------------------------------------------------------------------------------------------


def extra_bytes(run: Callable[[], Any]) -> int:
    """The most that was alive at one moment beyond what was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events), default=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_of_large_gradients_take_bounded_memory(dtype: torch.dtype) -> None:
    rows = [torch.randn(8, 256, 512).to(dtype) for _ in range(8)]
    bound = (2 if dtype == torch.bfloat16 else 1.1) * pieces.PIECE_ON_CPU * max(4, dtype.itemsize)
    assert extra_bytes(lambda: measure.gram([rows])) <= bound


@pytest.mark.parametrize("kind", ["contiguous", "expanded"])
def test_a_norm_takes_next_to_no_memory(kind: str) -> None:
    g = torch.randn(8, 256, 512) if kind == "contiguous" else torch.randn(8, 1, 512).expand(8, 256, 512)
    assert extra_bytes(lambda: measure.square(g)) <= 0.07 * g.numel() * 4


def test_a_sum_of_large_gradients_takes_one_tensor() -> None:
    rows = [torch.randn(MILLION) for _ in range(4)]
    assert extra_bytes(lambda: measure.weighted_sum(rows)) == 4 * MILLION


# ---- kernels -----------------------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Names of operators that start a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in NO_KERNEL and not (name == "_to_copy" and (kwargs or {}).get("dtype") is None):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def kernels_on_a_gpu(run: Callable[[list[Tensor]], Any], K: int, N: int, dtype: torch.dtype) -> Counter[str]:
    with FakeTensorMode():
        rows = [torch.empty(N, device="cuda", dtype=dtype) for _ in range(K)]
        with Kernels() as kernels:
            run(rows)
    return kernels.counts


def test_without_a_kernel_that_can_be_used_torch_makes_the_products(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and not tried again."""

    class Kernels:
        @staticmethod
        def takes(rows: Gathered) -> bool:
            return True

        @staticmethod
        def products_and_sum(rows: Gathered, with_sum: bool) -> tuple[Tensor, Tensor]:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(measure, "_without_kernels", [])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "accel_weighting.kernels", Kernels)
    monkeypatch.setattr(accel_weighting, "kernels", Kernels, raising=False)
    rows = Gathered(gradients(3, MILLION))
    for _ in range(2):
        assert measure._in_one_pass(rows, with_sum=True) is None and rows.total is None
    assert caplog.text.count("Failed to find C compiler") == 1


def test_a_small_product_and_its_sum_take_four_kernels() -> None:
    def both(rows: list[Tensor]) -> None:
        gathered = Gathered(rows)
        measure.gram([gathered])
        measure.weighted_sum(gathered)

    with torch.no_grad():
        found = kernels_on_a_gpu(both, 4, 12_288, torch.float32)
    assert found == {"stack": 1, "_to_copy": 1, "mm": 1, "sum": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_large_product_takes_three_or_four_kernels_a_piece(dtype: torch.dtype) -> None:
    """Without the one of Triton, which reads all at once (tests/gpu)."""
    K, N = 4, 64 * MILLION
    per_piece = pieces.PIECE_BYTES // dtype.itemsize
    found = kernels_on_a_gpu(lambda rows: measure.gram([rows]), K, N, dtype)
    number = K * N // per_piece
    assert found["bmm"] == number and found["stack"] <= number + 1 and found["mul_"] <= number
    copied = dtype != torch.float32 and not measure._WIDE_SUMS  # to float32, by an older torch
    assert found.total() <= (3 + (dtype == torch.bfloat16) + copied) * number + 12
    assert "_local_scalar_dense" not in found, "nothing waits for the device"
