"""What processes compare with each other."""

from __future__ import annotations

import pytest
import torch

from accel_weighting.processes import fingerprint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_fingerprint_changes_with_any_bit(dtype):
    x = torch.randn(3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for bit in range(8 * x.element_size()):
        y = x.clone()
        y.view(-1).view(torch.uint8).view(-1, x.element_size())[17, bit // 8] ^= 1 << bit % 8
        assert not torch.equal(fingerprint(x), fingerprint(y)), bit
    assert torch.equal(fingerprint(x), fingerprint(x.transpose(1, 2).contiguous().transpose(1, 2)))
