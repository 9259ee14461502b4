"""Structures of tensors that heads are called with, or that are branched: lists, tuples, dictionaries, dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import errors


def can_be_shared(x: Any) -> bool:
    """Whether it is a tensor that can have a gradient."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def tensors_in(structure: Any) -> list[Tensor]:
    """All tensors in lists, tuples, dictionaries, dataclasses and what else torch knows to hold tensors."""
    found = []
    for leaf in pytree.tree_leaves(structure):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in(vars(leaf))
    return found


def mapped(structure: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure with every tensor changed."""

    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor):
            return change(x)
        if is_dataclass(x) and not isinstance(x, type) and tensors_in(x):
            return replace(x, **mapped(dict(vars(x)), change))
        return x

    return pytree.tree_map(leaf, structure)


def argument(name: str, task: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument called ``name`` of a call of a head."""
    if name in kwargs:
        return kwargs[name]
    parameters = list(inspect.signature(module.forward).parameters)
    if name not in parameters:
        raise errors.no_such_argument(task, name, parameters)
    place = parameters.index(name)
    return args[place] if place < len(args) else None
