"""The shared layer: what it is, and the gradient at its weight from its input and the gradient at its output.

``nn.Linear``, the convolutions ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, and transformers' ``Conv1D``, which is a
Linear whose weight is transposed. Of a layer nothing but numbers is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin

from . import errors
from .pieces import copied_size, in_pieces, piece_size, wide


@dataclass(frozen=True)
class Convolution:
    """The numbers of a convolution.

    Attributes:
        weight: Shape of its weight, ``(out, in / groups, *kernel)``.
        stride: One number per dimension.
        padding: With zeros, on both sides, in the convolution itself.
        dilation: One number per dimension.
        groups: Channels are divided into so many groups.
        padded: How ``torch.nn.functional.pad`` pads the input before, or nothing.
        mode: The ``mode`` of that padding.
    """

    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padded: tuple[int, ...]
    mode: str


@dataclass(frozen=True)
class Layer:
    """A shared layer, of which nothing is kept alive.

    Attributes:
        matrix: Shape ``[out, in·…]`` of its weight as a matrix.
        argument: Name of its input.
        convolution: Its numbers where it is a convolution, else None.
    """

    matrix: tuple[int, int]
    argument: str = "input"
    convolution: Convolution | None = None

    @classmethod
    def of(cls, module: Any) -> Layer:
        """What there is to know of a module.

        Raises:
            TypeError: It is none of the layers for which the gradient at the weight is known.
            ValueError: Its sizes are not known yet, or its weight is complex.
        """
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise errors.lazy_shared_layer(type(module).__name__)
        if isinstance(module, nn.Linear):
            layer = cls((module.out_features, module.in_features))
        elif isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
            layer = _convolution(module)
        elif isinstance(module, nn.Module) and _is_transformers_conv1d(module):
            layer = _transposed_linear(module)
        else:
            raise errors.no_shared_layer(module, isinstance(module, _ConvTransposeNd))
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.is_complex():
            raise errors.complex_shared_layer(type(module).__name__)
        return layer

    def input_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The layer's input in a call, by position or keyword."""
        given = args[0] if args else kwargs.get(self.argument, next(iter(kwargs.values()), None))
        return given if isinstance(given, Tensor) else None

    @property
    def features(self) -> int:
        """Which dimension of its output holds the features."""
        return -1 if self.convolution is None else -len(self.convolution.stride) - 1

    def output_shape(self, inputs: torch.Size) -> tuple[int, ...]:
        """Of what the layer makes of an input of that shape."""
        c = self.convolution
        if c is None:
            return (*inputs[:-1], self.matrix[0])
        places = inputs[-len(c.stride) :]
        before = [0] * len(places)
        if c.padded:
            before = [sum(c.padded[i : i + 2]) for i in range(0, 2 * len(places), 2)][::-1]
        out = [
            (n + b + 2 * p - d * (k - 1) - 1) // s + 1
            for n, b, p, d, k, s in zip(places, before, c.padding, c.dilation, c.weight[2:], c.stride, strict=True)
        ]
        return (*inputs[: -len(places) - 1], self.matrix[0], *out)


def _is_transformers_conv1d(module: nn.Module) -> bool:
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def _transposed_linear(module: Any) -> Layer:
    weight = module.weight
    shape = getattr(weight, "ds_shape", weight.shape)  # DeepSpeed leaves an empty tensor in place of a divided one
    return Layer((int(module.nf), int(getattr(module, "nx", shape[0]))), "x")


def _convolution(module: _ConvNd) -> Layer:
    weight = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    padding = module.padding
    outside = isinstance(padding, str) or module.padding_mode != "zeros"
    return Layer(
        (weight[0], math.prod(weight[1:])),
        convolution=Convolution(
            weight,
            module.stride,
            (0,) * len(module.kernel_size) if outside or isinstance(padding, str) else tuple(padding),
            module.dilation,
            module.groups,
            tuple(module._reversed_padding_repeated_twice) if outside else (),
            "constant" if module.padding_mode == "zeros" else module.padding_mode,
        ),
    )


# ---- the gradient at the weight ----------------------------------------------------------------------------------


def weight_gradient(layer: Layer, inputs: Tensor, g: Tensor) -> Tensor:
    """The gradient at a layer's weight, as a matrix ``[out, in·…]``, summed over pieces of the batch in float64.

    Args:
        layer: What is known of the layer.
        inputs: Its input.
        g: The gradient at its output, or at a view of it that holds the same entries in the same order.
    """
    shape = layer.output_shape(inputs.shape)
    g = g if g.shape == shape else g.reshape(shape)
    c = layer.convolution
    if c is not None and inputs.ndim == len(c.stride) + 1:  # a sample without a batch
        inputs, g = inputs[None], g[None]
    whole = 1 if c is None else len(c.stride) + 1
    precision = torch.float32 if g.is_mps else torch.float64
    total = torch.zeros(layer.matrix, dtype=precision, device=g.device)
    for a, part in in_pieces([inputs, g], piece_size(g), whole):
        total += _of_piece(c, wide(a), wide(part))
    return total


def weight_gradients_of_rows(layer: Layer, inputs: Tensor, g: Tensor, index: Tensor, tasks: int) -> Tensor:
    """The same of every task's rows alone, ``[K, out, in·…]``; nothing is copied but pieces.

    Args:
        layer: What is known of the layer.
        inputs: Its input.
        g: The gradient at its output, or at a view of it.
        index: The task of every row, of the leading shape of ``g``: of every sample where it is a convolution.
        tasks: K.
    """
    shape, c = layer.output_shape(inputs.shape), layer.convolution
    whole = 1 if c is None else len(c.stride) + 1
    index = index.reshape(*index.shape, *[1] * (g.ndim - index.ndim))
    index = index.expand(*g.shape[:-whole], *[1] * whole).reshape(*shape[:-whole], *[1] * whole)
    precision = torch.float32 if g.is_mps else torch.float64
    total = torch.zeros(tasks, *layer.matrix, dtype=precision, device=g.device)
    for a, part, own in in_pieces([inputs, g.reshape(shape), index], copied_size(g) * 2, whole):
        for k in range(tasks):
            rows = own == k
            if not g.is_cpu or bool(rows.any()):
                total[k] += _of_piece(c, wide(a), wide(torch.where(rows, part, 0)))
    return total


def _of_piece(c: Convolution | None, a: Tensor, g: Tensor) -> Tensor:
    a, g = (x.to(torch.promote_types(a.dtype, g.dtype)) for x in (a, g))
    if c is None:
        return g.reshape(-1, g.shape[-1]).T @ a.reshape(-1, a.shape[-1])
    if c.padded:
        a = F.pad(a, c.padded, c.mode)
    dimensions = len(c.stride)
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        g,
        a,
        g.new_empty(1).expand(c.weight),
        None,
        c.stride,
        c.padding,
        c.dilation,
        False,
        (0,) * dimensions,
        c.groups,
        (False, True, False),
    )[1].flatten(1)


# ---- a layer with a forward of its own ---------------------------------------------------------------------------

_KNOWN = ("torch.nn.modules.linear", "torch.nn.modules.conv", "transformers.pytorch_utils")
"""Modules whose forwards are known."""


def computes_what_it_is(module: nn.Module, layer: Layer, inputs: Tensor, output: Tensor) -> bool:
    """Whether a layer whose class has a forward of its own gives what its kind gives, or that cannot be seen.

    Without that the gradient at the weight would be wrong, and nothing would say so.
    """
    forwards = [type(module).forward, getattr(type(module), "_conv_forward", type(module).forward)]
    if all(getattr(function, "__module__", "") in _KNOWN for function in forwards):
        return True
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    number = math.prod(layer.matrix)
    plain = isinstance(weight, Tensor) and weight.numel() == number and not hasattr(weight, "full_tensor")
    if not plain or not isinstance(weight, Tensor) or (bias is not None and hasattr(bias, "full_tensor")):
        return True  # divided between processes
    if output.shape != layer.output_shape(inputs.shape):
        return False
    with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
        expected = _forward(layer, *(None if x is None else wide(x.detach()) for x in (inputs, weight, bias)))
        difference = (expected - output).double()
        return bool(difference.norm() <= 0.03 * expected.double().norm())


def _forward(layer: Layer, a: Any, weight: Any, bias: Any) -> Tensor:
    c = layer.convolution
    a = a.to(weight.dtype)
    if c is None:
        return F.linear(a, weight if layer.argument == "input" else weight.T, bias)
    if c.padded:
        a = F.pad(a, c.padded, c.mode)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(c.stride) - 1]
    return convolve(a, weight, bias, c.stride, c.padding, c.dilation, c.groups)
