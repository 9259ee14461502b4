"""The layer whose output is the branch point, and with which input each of its outputs was made."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import errors
from .join import same, viewed
from .layers import Layer, computes_what_it_is
from .modules import find_layer

_KEYS = itertools.count()


@dataclass(eq=False)
class _Call:
    """A call of the layer. The node of the graph that its output came from holds it, and nobody else does."""

    inputs: Tensor | None
    output: weakref.ref[Tensor]
    place: tuple[int, torch.Size, tuple[int, ...], bool]

    @classmethod
    def of(cls, inputs: Tensor, output: Tensor) -> _Call:
        return cls(inputs, weakref.ref(output), _place(output))

    def gave(self, z: Tensor) -> bool:
        """Whether ``z`` is the output, or a view of it with the same entries in the same order."""
        output = self.output()
        if output is z:
            return True
        if (output is not None and output._backward_hooks) or z._backward_hooks:
            return False  # which may change the gradient on its way from one to the other
        (here, shape, stride, dense), (there, *rest, also_dense) = self.place, _place(z)
        return here == there and ([shape, stride] == rest or (dense and also_dense and shape.numel() == z.numel()))


def _place(x: Tensor) -> tuple[int, torch.Size, tuple[int, ...], bool]:
    return x.data_ptr(), x.shape, x.stride(), x.is_contiguous()


class SharedLayer:
    """The shared layer of one weighter. Neither layer nor model are kept alive.

    Args:
        given: The layer, or its dotted name.
        model: Where a name is looked up.

    Attributes:
        layer: What is known of it.

    Raises:
        ValueError: A name leads nowhere, or the layer's sizes are not known yet.
        TypeError: It is no layer for which the gradient at the weight is known.
    """

    def __init__(self, given: nn.Module | str, model: nn.Module | None) -> None:
        module = find_layer(given, model)
        self.layer = Layer.of(module)
        self._name = given if isinstance(given, str) else None
        self._module = weakref.ref(module)
        self._model = None if model is None else weakref.ref(model)
        self._key = f"accel_weighting shared layer {next(_KEYS)}"
        self._calls: weakref.WeakSet[_Call] = weakref.WeakSet()
        self._traced: tuple[Tensor, Tensor] | None = None
        self._looked_at = False

    def __deepcopy__(self, memo: Any) -> SharedLayer:
        """Returns self: what a copied model's layer gives is told apart by the graph."""
        return self

    def __reduce__(self) -> Any:
        raise errors.hooks_are_not_pickled()

    def attach(self) -> RemovableHandle:
        """Hooks the layer."""
        model, module = None if self._model is None else self._model(), self._module()
        given = self._name if self._name is not None and model is not None else module
        if given is None:
            raise errors.model_is_gone()
        found = find_layer(given, model)
        self.layer, self._module = Layer.of(found), weakref.ref(found)
        return found.register_forward_hook(self._after, with_kwargs=True)

    def forget(self) -> None:
        """Drops the inputs of calls whose outputs are still there; a join that was made has its own."""
        self._traced = None
        for call in list(self._calls):
            call.inputs = None
        self._calls.clear()

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        inputs = self.layer.input_of(args, kwargs)
        if inputs is None or not isinstance(output, Tensor):
            return
        if torch.compiler.is_compiling():
            self._traced = inputs.detach(), output
        elif output.grad_fn is not None:
            if not self._looked_at and not computes_what_it_is(module, self.layer, inputs, output):
                raise errors.shared_layer_computes_otherwise(type(module).__name__)
            self._looked_at = True
            node, number = viewed(output)
            call = _Call.of(inputs.detach(), output)
            node.metadata[self._key, number] = call
            self._calls.add(call)

    def input_for(self, z: Tensor) -> Tensor:
        """The input from which the layer made ``z``.

        Raises:
            ValueError: It did not.
        """
        if torch.compiler.is_compiling():
            traced, self._traced = self._traced, None
            if traced is None or not same(traced[1], z):
                raise errors.shared_layer_is_not_the_branch()
            return traced[0]
        node, number = viewed(z)
        call: _Call | None = None if node is None else node.metadata.get((self._key, number))
        if call is None or call.inputs is None or not call.gave(z):
            raise errors.shared_layer_is_not_the_branch()
        return call.inputs
