"""The join in autograd's graph: where one tensor becomes one alias per task, and their gradients come together.

Its backward is differentiable, to any order: a loss may contain gradients that passed the join themselves.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from . import measure
from .contexts import without_autocast
from .rotations import Rotations
from .tracing import exporting

Gradients = Sequence[Tensor | None]
"""One gradient per alias, those of the first tensor in task order, then those of the second; None where none came."""


class Aliases(Protocol):
    """One alias of a tensor per task."""

    def __getitem__(self, k: int, /) -> Tensor: ...


class Collector(Protocol):
    """Whose join it is: the branch."""

    rotations: Rotations | None

    @property
    def is_active(self) -> bool:
        """Whether a micro-batch's backward runs."""

    def collect(self, rows: Sequence[measure.Gathered], inputs: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Measures the gradients; the weights of their sum, ``[K]``, or None."""

    def tap(self, k: int, g: Tensor) -> None:
        """Measures the gradient of task ``k`` alone, as it passes."""

    def notice_derivative(self) -> None:
        """The running backward is that of a gradient which passed the join."""


_BRANCHES: weakref.WeakValueDictionary[int, Collector] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


def register(branch: Collector) -> int:
    """A key by which the graph, and the compiler's operators, find a branch that is still alive."""
    key = next(_KEYS)
    _BRANCHES[key] = branch
    return key


# ---- operators for the compiler ----------------------------------------------------------------------------------


@torch.library.custom_op(
    "accel_weighting::collect",
    mutates_args=(),
    schema="(Tensor?[] gradients, int tensors, Tensor? inputs, Tensor? mask, int key) -> Tensor[]",
)
def _collect(
    gradients: list[Tensor | None], tensors: int, inputs: Tensor | None, mask: Tensor | None, key: int
) -> list[Tensor]:
    """``collect`` for the compiler: opaque, so that it sees no side effect and breaks no graph."""
    totals = collect(gradients, tensors, inputs, mask, key)
    return [_laid_out(total, rows) for total, rows in zip(totals, _by_tensor(gradients, tensors), strict=True)]


def _laid_out(total: Tensor | None, rows: Gradients) -> Tensor:
    """The sum in the memory layout that the compiler was promised: that of the first gradient; empty without any."""
    first = next((g for g in rows if g is not None), None)
    if total is None or first is None:
        return torch.empty(0)
    promised = torch.empty_like(first)
    fresh = total.data_ptr() != first.data_ptr()  # one gradient alone is its own sum; an operator returns no argument
    return total if fresh and total.stride() == promised.stride() else promised.copy_(total)


@_collect.register_fake
def _(
    gradients: list[Tensor | None], tensors: int, inputs: Tensor | None, mask: Tensor | None, key: int
) -> list[Tensor]:
    firsts = [next((g for g in rows if g is not None), None) for rows in _by_tensor(gradients, tensors)]
    return [torch.empty(0) if first is None else torch.empty_like(first) for first in firsts]


@torch.library.custom_op("accel_weighting::ones", mutates_args=(), schema="(Tensor z, int number) -> Tensor")
def _ones(z: Tensor, number: int) -> Tensor:
    """Ones of which no compiler knows that they are: what is multiplied by them stays as many tensors."""
    return z.new_ones(number)


@_ones.register_fake
def _(z: Tensor, number: int) -> Tensor:
    return z.new_empty(number)


@torch.library.custom_op("accel_weighting::rotation", mutates_args=(), schema="(Tensor z, int key, int k) -> Tensor")
def _rotation(z: Tensor, key: int, k: int) -> Tensor:
    """A copy of R_k. Opaque too, since the method moves the rotations at the first use after a step."""
    rotations = _BRANCHES[key].rotations
    assert rotations is not None
    return rotations.matrices(z)[k].clone()


@_rotation.register_fake
def _(z: Tensor, key: int, k: int) -> Tensor:
    rotations = _BRANCHES[key].rotations
    assert rotations is not None
    m = rotations.size or z.shape[rotations.dim]
    return z.new_empty(m, m, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)


# ---- autograd ----------------------------------------------------------------------------------------------------


def collect(
    gradients: Gradients, tensors: int, inputs: Tensor | None, mask: Tensor | None, key: int
) -> list[Tensor | None]:
    """The gradients of one join, measured where a micro-batch's backward runs, and summed for each tensor.

    Args:
        gradients: As they came.
        tensors: How many tensors the join divides.
        inputs: What the measurement needs of the forward besides, or None.
        mask: Which samples are measured; None: all.
        key: Of the branch.
    """
    branch = _BRANCHES.get(key)
    rows = [measure.Gathered(r) for r in _by_tensor(gradients, tensors)]
    with without_autocast(rows[0].some() if rows[0].came else next(r.some() for r in rows if r.came)):
        weights = None if branch is None else branch.collect(rows, inputs, mask)
        if torch.is_grad_enabled() and branch is not None and not branch.is_active:
            return [_inner_sum(r, key) for r in rows]
        return [measure.weighted_sum(r, weights) for r in rows]


def _by_tensor(gradients: Gradients, tensors: int) -> list[Gradients]:
    if tensors == 1:
        return [gradients]
    tasks = len(gradients) // tensors
    return [gradients[t * tasks : (t + 1) * tasks] for t in range(tensors)]


def join_of(tasks: tuple[str, ...], key: int) -> type[torch.autograd.Function]:
    """Every tensor to one alias per task (a view); in the backward all their gradients come together.

    In compiled code an alias is no view. The name says what to do: torch names it where a head begins with an in-place
    module. That is raised inside of the head's forward, where nothing of ours runs, and for aliases of ``branch`` the
    heads are not known.

    Args:
        tasks: Task names.
        key: Of the branch.
    """
    K = len(tasks)  # with the key no argument of `apply`, which has a price for each

    class Join(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: Tensor | None, mask: Tensor | None, *zs: Tensor) -> tuple[Tensor, ...]:
            """The aliases of the first tensor in task order, then those of the second."""
            ctx.key, ctx.tensors = key, len(zs)
            ctx.set_materialize_grads(False)
            ctx.saves = inputs is not None or mask is not None
            if ctx.saves:  # saved tensors, even None, forbid a second pass that the heads alone would allow
                ctx.save_for_backward(inputs, mask)
            if torch.compiler.is_compiling() and not exporting():  # an exported program has no operator of ours
                # Views that leave a compiled graph, as at a break between two heads, are made anew from z itself, and
                # copies that leave it are merged: gradients would pass by this backward, or come to one alias.
                ones = [torch.ops.accel_weighting.ones(z, K) for z in zs]
                return tuple([z * ones[t][k] for t, z in enumerate(zs) for k in range(K)])
            return tuple([z.view_as(z) for z in zs for _ in range(K)])

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            """For every tensor the sum of its aliases' gradients, each times its weight."""
            tensors: int = ctx.tensors
            if gradients[0] is None and all(g is None for g in gradients):
                return tuple([None] * (2 + tensors))
            inputs, mask = ctx.saved_tensors if ctx.saves else (None, None)
            sums: list[Tensor | None]
            if not torch.compiler.is_compiling():
                sums = collect(gradients, ctx.tensors, inputs, mask, ctx.key)
                return None, None, *sums
            totals: list[Tensor]
            totals = torch.ops.accel_weighting.collect(list(gradients), ctx.tensors, inputs, mask, ctx.key)
            came = [any(g is not None for g in rows) for rows in _by_tensor(gradients, ctx.tensors)]
            sums = [total if there else None for total, there in zip(totals, came, strict=True)]
            return None, None, *sums

    shared = ", ".join(f"`{task}`" for task in tasks)
    name = f"(the head of a task, one of {shared}, begins with an in-place module: give it `inplace=False`) Join"
    return type(name, (Join,), {})


class _InnerSum(torch.autograd.Function):
    """The sum of gradients that passed the join inside of a loss (``create_graph=True``).

    When the backward of that loss comes here, a part of its gradient goes to the trunk without passing the join.
    """

    @staticmethod
    def forward(ctx: Any, key: int, *gradients: Tensor) -> Tensor:
        ctx.key, ctx.number = key, len(gradients)
        total = measure.weighted_sum(gradients)
        assert total is not None
        return total.view_as(total) if len(gradients) == 1 else total  # one alone is its own sum

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if (branch := _BRANCHES.get(ctx.key)) is not None:
            branch.notice_derivative()
        return None, *[g] * ctx.number


def _inner_sum(rows: Gradients, key: int) -> Tensor | None:
    arrived = [g for g in rows if g is not None]
    if not arrived:
        return None
    total: Tensor = _InnerSum.apply(key, *arrived)  # type: ignore[no-untyped-call]
    return total


def passed_inside(g: Tensor, key: int) -> Tensor:
    """A gradient that passes where tasks are measured, inside of a loss: the backward of that loss is noticed."""
    total = _inner_sum([g], key)
    assert total is not None
    return total


class _Tap(torch.autograd.Function):
    """One alias (a view) of a tensor for task k, whose gradient is measured as it passes."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, key: int, k: int) -> Tensor:
        ctx.key, ctx.k = key, k
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:
        branch = _BRANCHES.get(ctx.key)
        if branch is None:
            return g, None, None
        with without_autocast(g):
            branch.tap(ctx.k, g)
        if torch.is_grad_enabled() and not branch.is_active:
            return _inner_sum([g], ctx.key), None, None
        return g, None, None


class Taps(dict[int, Tensor]):
    """The aliases of one tensor by task, made when they are asked for: one each, however often its head is called.

    Their gradients are added up by autograd, as those of z itself would be, and none waits for the others. An alias
    that was made before its head is called would have to wait until all heads are through.
    """

    def __init__(self, z: Tensor, key: int) -> None:
        super().__init__()
        self._z, self._key = z, key

    def __missing__(self, k: int) -> Tensor:
        alias: Tensor = _Tap.apply(self._z, self._key, k)  # type: ignore[no-untyped-call]
        self[k] = alias
        return alias


class _ZeroWithGraph(torch.autograd.Function):
    """A zero that sends zeros back, whatever the values: keeps a head in the graph when its task has no samples."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.save_for_backward(*outputs)
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(output) for output in ctx.saved_tensors)


def zero_with_graph(outputs: Sequence[Tensor]) -> Tensor:
    """A scalar 0 that depends on ``outputs``, each of which gets a gradient of zeros."""
    zero: Tensor = _ZeroWithGraph.apply(*outputs)  # type: ignore[no-untyped-call]
    return zero


# ---- which tensors are one ---------------------------------------------------------------------------------------


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one: the same object, or views that name the same entries of it.

    Equal memory is not enough: a gradient reversal, or a tensor hook, changes nothing forward and all backward.
    """
    if a is b:
        return True
    if torch.compiler.is_compiling() or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.grad_fn is None or b.grad_fn is None:
        return False  # detached from each other: heads that are recomputed one by one in the backward
    if a._backward_hooks or b._backward_hooks:
        return False
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and viewed(a) == viewed(b)


VIEWS = re.compile(
    "(Alias|AsStrided|Permute|ReshapeAlias|Select|Slice|Squeeze|T|Transpose|UnsafeView|Unsqueeze|View)Backward[01]"
)
"""Autograd's nodes that pass a gradient on as it is."""


def viewed(x: Tensor) -> tuple[Any, int]:
    """Which output of which node ``x`` is, or is a view of."""
    node, output = x.grad_fn, x.output_nr
    while node is not None and VIEWS.fullmatch(node.name()):
        node, output = node.next_functions[0]
    return node, output


def has_history(x: Tensor) -> bool:
    """Whether ``x`` was computed: it is neither a leaf (a parameter, a learned query) nor a view of one."""
    if x.grad_fn is None:
        return False
    node, _ = viewed(x)
    return node is not None and not node.name().endswith("AccumulateGrad")


@dataclass
class Forward:
    """The tensors that the heads of one forward share, each with its aliases.

    Attributes:
        graph_task: The backward in which this forward is recomputed; -1: none.
        graph: The number of the compiler's graph in which it began; 0: not known; None: in none.
        joined: Tensor, place in the trace (0 in plain Python), aliases.
        taken: Heads that were called.
    """

    graph_task: int
    graph: int | None = None
    joined: list[tuple[Tensor, int, Aliases]] = field(default_factory=list)
    taken: set[int] = field(default_factory=set)

    def aliases(self, z: Tensor, at: int = 0) -> Aliases | None:
        """Those of ``z``, or of the tensor that it is a view of; None if it is not known yet."""
        for known, its, aliases in self.joined:
            if same(known, z) or (at != 0 and its == at):
                return aliases
        return None

    def alias(self, z: Tensor, k: int) -> Tensor:
        """Task ``k``'s own of a tensor that is known."""
        aliases = self.aliases(z)
        assert aliases is not None
        return aliases[k]
