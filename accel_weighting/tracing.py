"""Which tensors are one while ``torch.compile`` traces a forward.

Compiled code has no memory addresses. There are the nodes of the graph that is being traced: the same node, or the same
view of the same node, is the same tensor. They are read from Dynamo's own objects; where those have changed, nothing is
known, and tensors are told apart as objects alone.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_NUMBERS: weakref.WeakKeyDictionary[Any, dict[Any, int]] = weakref.WeakKeyDictionary()
"""For every graph that is traced, its own number (under None) and those of its tensors."""

_GRAPHS = itertools.count(1)

IS_FOLLOWED = [int(x) for x in torch.__version__.split(".")[:2]] >= [2, 8]
"""Whether this torch's compiler can follow what happens at a head. An older one breaks the graph in the middle of it,
and statistics were wrong where a head was called twice (2.4)."""

F = TypeVar("F", bound=Callable[..., Any])


def followed(function: F) -> F:
    """What a compiler follows if it can, and else runs as it is, between two graphs."""
    return function if IS_FOLLOWED else torch.compiler.disable(function)  # type: ignore[no-untyped-call]


def exporting() -> bool:
    """Whether ``torch.export`` is running; torch before 2.7 does not tell."""
    return torch.compiler.is_compiling() and _export_runs()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _export_runs() -> bool:
    """Asked while a trace is made, as plain Python: a trace of torch 2.11 would answer yes, whatever it is made for."""
    runs: bool = getattr(torch.compiler, "is_exporting", lambda: False)()
    return runs


TENSORS = 1 << 20
"""More than the shared tensors of one graph: a place tells its graph."""

_VIEWS = {"select", "narrow", "view", "reshape", "transpose", "permute", "squeeze", "unsqueeze", "flatten", "view_as"}


def place(z: Tensor) -> int:
    """A number for a tensor of the running trace: positive for what was computed in it, negative for what came in.

    The same for the same tensor, or the same view of the same tensor. 0 where nothing is known.
    """
    number: int = _of_the_caller() if isinstance(z, Tensor) else 0
    return number


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _of_the_caller() -> int:
    """Runs while the trace is made, as plain Python, and is a constant of it; ``z`` is the caller's."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
        node = output.current_tx.symbolic_locals["z"].realize().as_proxy().node
        if (numbers := _NUMBERS.get(node.graph)) is None:
            numbers = _NUMBERS[node.graph] = {None: next(_GRAPHS)}
        number = numbers[None] * TENSORS + numbers.setdefault(_key(node), len(numbers))
    except Exception:  # another version of Dynamo
        return 0
    return -number if node.op == "placeholder" else number


def graph_of(places: Sequence[int]) -> int:
    """The number of the graph that places are in; 0 where nothing is known."""
    return abs(places[0]) // TENSORS


def _key(node: Any) -> Any:
    """What makes the tensor of a node what it is."""
    is_view = node.target is operator.getitem or (node.op == "call_method" and node.target in _VIEWS)
    if not is_view or any(_changes(user) for user in node.args[0].users):
        return node.name
    args = torch.fx.node.map_arg(node.args[1:], _key)
    return node.target, _key(node.args[0]), repr(args), repr(node.kwargs)


def _changes(node: Any) -> bool:
    """Whether a node changes its argument in place."""
    name = getattr(node.target, "__name__", str(node.target))
    return name == "setitem" or (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ipow", "iand", "ior", "ixor", "ifloordiv", "imod", "imatmul"}
