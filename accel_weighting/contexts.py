"""What must not change what is measured: graphs, autocast, and the rounding of float32 to TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

AS_IT_IS = contextlib.nullcontext()


def without_graph() -> contextlib.AbstractContextManager[Any]:
    """What is measured is never differentiated; a backward keeps no graph anyway, unless it was asked to."""
    return torch.no_grad() if torch.is_grad_enabled() else AS_IT_IS


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """No product is rounded to half precision where ``x`` lives."""
    device_type = "cpu" if x.is_cpu else x.device.type  # a string that is made anew every time
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else AS_IT_IS


@contextlib.contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """No product of float32 numbers is rounded where ``x`` lives, to half precision or TF32, whatever is allowed."""
    with without_autocast(x):
        if not x.is_cuda:
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
