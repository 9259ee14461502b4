"""A task's own aliases of shared parameters, in place while its forwards run.

In ``with weighter.task(name):`` the module that owns a shared parameter W sees that task's own alias of it, a view
without a copy, so that in the one backward every task's gradient at W arrives apart, of whatever order it is. The alias
stands in the owner's ``__dict__`` from the owner's forward pre-hooks to its forward hooks, where an engine has gathered
W. Outside of the ``with`` nothing of this is left on a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Receive = Callable[[int, int, Tensor], None]
"""What is called with the task, the parameter and the gradient that arrived there."""

KEY = "accel_weighting parameter"
"""By which, with the key of its branch, the node of an alias is known."""

_ABSENT = object()


@dataclass
class _Alias:
    """An alias that stands in its owner's ``__dict__``."""

    owner: nn.Module
    name: str
    covered: Any
    depth: int = 1


class Aliases:
    """The hooks of one ``with weighter.task(name):`` and the aliases that stand.

    Args:
        k: The task.
        labels: Names of the shared parameters.
        used: By task, the parameters that its forwards used; grows.
        receive: Is given every gradient in the backward.
        key: Under which the aliases' nodes of the graph say whose they are.
    """

    def __init__(self, k: int, labels: Sequence[str], used: dict[int, set[int]], receive: Receive, key: int) -> None:
        self._k, self._labels, self._used, self._receive, self._key = k, labels, used, receive, key
        self._ended = False
        self._handles: list[Any] = []
        self._standing: dict[tuple[int, str], _Alias] = {}

    def hook(self, owner: nn.Module, name: str, i: int) -> None:
        """Hooks the owner of parameter ``i``: behind what gathers it, before what divides it again.

        A compiler must leave the hooks alone, or its graph would hold those of this one task.
        """

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def before(module: nn.Module, *_: Any) -> None:
            if module is owner:  # and no copy of it
                self._stand(owner, name, i)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def after(module: nn.Module, *_: Any) -> None:
            if module is owner:
                self._fall(owner, name)

        self._handles += [
            owner.register_forward_pre_hook(before),
            owner.register_forward_hook(after, prepend=True, always_call=True),
        ]

    def look_for_owners(self, discover: Callable[[nn.Module], Iterator[tuple[str, int]]]) -> None:
        """Asks every module that is called whether it is an owner that is not known yet."""

        def before(module: nn.Module, _: Any) -> None:
            for name, i in list(discover(module)):
                self.hook(module, name, i)  # which comes too late for this call
                self._stand(module, name, i)

        self._handles.append(nn.modules.module.register_module_forward_pre_hook(before))

    def _stand(self, owner: nn.Module, name: str, i: int) -> None:
        """The owner is called: from here its parameter is the task's alias."""
        if self._ended:
            raise compiled(self._labels[i])
        if (standing := self._standing.get((id(owner), name))) is not None:
            standing.depth += 1
            return
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return  # a recomputed forward gives its numbers to the graph that has the aliases
        W = getattr(owner, name)
        if not W.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(W):
            return
        if hasattr(W, "full_tensor"):
            raise _divided(self._labels[i])
        with _outside_of_transforms():
            alias = W.view_as(W)
            alias.register_hook(lambda g: self._receive(self._k, i, g))
            alias.grad_fn.metadata[KEY, self._key] = self._k
        covered = owner.__dict__.get(name, _ABSENT)
        owner.__dict__[name] = alias
        self._standing[id(owner), name] = _Alias(owner, name, covered)
        self._used.setdefault(self._k, set()).add(i)

    def _fall(self, owner: nn.Module, name: str) -> None:
        """The owner's forward is over, or was left."""
        standing = self._standing.get((id(owner), name))
        if standing is None:
            return
        standing.depth -= 1
        if not standing.depth:
            self._take_away(self._standing.pop((id(owner), name)))

    @staticmethod
    def _take_away(alias: _Alias) -> None:
        if alias.covered is _ABSENT:
            alias.owner.__dict__.pop(alias.name, None)
        else:
            alias.owner.__dict__[alias.name] = alias.covered

    def end(self) -> None:
        """Removes all hooks, and what an interrupt left standing."""
        self._ended = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for alias in self._standing.values():
            self._take_away(alias)
        self._standing.clear()


def _outside_of_transforms() -> AbstractContextManager[Any]:
    """Where an alias is one of the parameter itself, though a ``torch.func`` transform (vmap, jacrev, …) is running."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    from torch._functorch import pyfunctorch

    clear: AbstractContextManager[Any] = pyfunctorch.temporarily_clear_interpreter_stack()
    return clear


def _divided(label: str) -> NotImplementedError:
    return NotImplementedError(
        f"The shared parameter `{label}` is a DTensor where its module is called: divided by tensor parallelism, or "
        "its module was called past the FSDP unit that gathers it. Call the unit (the prepared model), or name a "
        "parameter that is whole there."
    )


def compiled(label: str) -> NotImplementedError:
    """The owner of a shared parameter is a part of a compiled graph."""
    return NotImplementedError(
        f"The module that owns the shared parameter `{label}` is compiled, and its graph has kept the alias of another "
        "task. Compile parts that do not hold it, or name a parameter of a part that is not compiled."
    )
