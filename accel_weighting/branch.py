"""The branch point: one alias of the shared representation per task, whose gradients arrive apart in the one backward.

The only place that knows autograd. In a forward the shared representation ``z`` is divided into one alias per task (a
view, no copy). In the one backward every task's gradient arrives at its own alias; where they come together, the
*join*, they are measured, and their sum goes on to the trunk. What arrives at the vector of losses in the same
backward, ``c = weight · loss scale / accumulation``, tells by how much the gradients were multiplied on the way.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from . import checks, measure
from .rotations import Rotations
from .window import MicroBatch

_BRANCHES: weakref.WeakValueDictionary[int, Branch] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


# ---- the join ----------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "accel_weighting::collect",
    mutates_args=(),
    schema="(Tensor?[] gradients, Tensor? inputs, Tensor? mask, int key) -> Tensor",
)
def _collect(gradients: list[Tensor | None], inputs: Tensor | None, mask: Tensor | None, key: int) -> Tensor:
    """``_collect_eagerly`` for the compiler: opaque, so that it sees no side effect and breaks no graph."""
    return _collect_eagerly(gradients, inputs, mask, key)


@_collect.register_fake
def _(gradients: list[Tensor | None], inputs: Tensor | None, mask: Tensor | None, key: int) -> Tensor:
    return torch.empty_like(next(g for g in gradients if g is not None))


def _collect_eagerly(
    gradients: Sequence[Tensor | None], inputs: Tensor | None, mask: Tensor | None, key: int
) -> Tensor:
    """The gradients of one join: they are measured where a micro-batch's backward runs, and summed."""
    branch = _BRANCHES.get(key)
    arrived = [g for g in gradients if g is not None]
    with _without_autocast(arrived[0].device.type):
        total = None if branch is None else branch.collect(gradients, inputs, mask)
        return measure.weighted_sum(arrived) if total is None else total


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


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


class _Join(torch.autograd.Function):
    """``z`` to one alias per task; in the backward all their gradients come together."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, inputs: Tensor | None, mask: Tensor | None, key: int, tasks: int
    ) -> tuple[Tensor, ...]:
        ctx.key = key
        ctx.set_materialize_grads(False)
        ctx.saves = inputs is not None or mask is not None
        if ctx.saves:  # saved tensors, even None, forbid a second pass that the heads alone would allow
            ctx.save_for_backward(inputs, mask)
        return tuple(z.view_as(z) for _ in range(tasks))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in gradients):
            return (None,) * 5
        inputs, mask = ctx.saved_tensors if ctx.saves else (None, None)
        if torch.compiler.is_compiling():
            total = torch.ops.accel_weighting.collect(list(gradients), inputs, mask, ctx.key)
        else:
            total = _collect_eagerly(gradients, inputs, mask, ctx.key)
        return total, None, None, None, None


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


def _same(a: Tensor, b: Tensor) -> bool:
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
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and _viewed(a) == _viewed(b)


VIEWS = re.compile(
    "(Alias|AsStrided|Permute|ReshapeAlias|Select|Slice|Squeeze|T|Transpose|UnsafeView|Unsqueeze|View)Backward[01]"
)
"""Autograd's nodes that pass a gradient on as it is."""


def _viewed(x: Tensor) -> tuple[Any, int]:
    """Which output of which node ``x`` is, or is a view of."""
    node, output = x.grad_fn, x.output_nr
    while node is not None and VIEWS.fullmatch(node.name()):
        node, output = node.next_functions[0]
    return node, output


def _graph_task() -> int:
    """Which backward is running: a recomputed forward (activation checkpointing) must not meet the next real one."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


@dataclass
class _Forward:
    """The join that the heads of one forward share."""

    z: Tensor
    aliases: tuple[Tensor, ...]
    graph_task: int
    taken: set[int] = field(default_factory=set)


class _Pass:
    """One backward of a micro-batch. Autograd holds it for as long as that backward runs, and nobody else does."""

    def __init__(self, micro_batch: MicroBatch, ended: Callable[[MicroBatch], None]) -> None:
        self.micro_batch = micro_batch
        self._ended = ended

    def __call__(self) -> None:
        self._ended(self.micro_batch)


class Branch:
    """The branch point: divides z, and gives what the gradients came to to the window that they belong to.

    Args:
        tasks: Task names.
        find_heads: Gives the heads' modules in task order; None where the model calls ``branch`` itself. It is asked
            again when the hooks move, since an engine may have replaced a module.
        find_shared_layer: Likewise the ``nn.Linear`` whose output is the branch point, or None.
        rotations: The heads' rotations, or None.

    Attributes:
        frozen_trunk: Whether z came without a graph.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        find_heads: Callable[[], Sequence[nn.Module]] | None = None,
        find_shared_layer: Callable[[], nn.Linear] | None = None,
        rotations: Rotations | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        self.frozen_trunk = False
        self.find_heads = find_heads
        self._find_shared_layer = find_shared_layer
        self.rotations = rotations
        self._pass: weakref.ref[_Pass] | None = None
        self._forward: _Forward | None = None
        self._layer: tuple[Tensor, Tensor] | None = None
        self._outputs: dict[int, Any] = {}
        self._handles: list[RemovableHandle] = []
        self._key = next(_KEYS)
        _BRANCHES[self._key] = self

    def __deepcopy__(self, memo: Any) -> Branch:
        """Returns self: a copied model (an average, a teacher) keeps using this branch and its current rotations."""
        return self

    def __reduce__(self) -> Any:
        raise checks.hooks_are_not_pickled()

    @property
    def heads(self) -> Sequence[nn.Module]:
        """The heads' modules in task order; none where the model calls ``branch`` itself."""
        return () if self.find_heads is None else self.find_heads()

    # ---- hooks -------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hooks the heads, in front of whatever an engine hooked there.

        Engines hand every head an alias of z of its own (FSDP2 and ZeRO-3 in forward pre-hooks); only a hook that runs
        before theirs sees that the heads share one z.
        """
        self.detach()
        if self._find_shared_layer is not None:
            self._handles.append(self._find_shared_layer().register_forward_hook(self._after_layer))
        for k, head in enumerate(self.heads):
            self._handles += (
                head.register_forward_pre_hook(functools.partial(self._before_head, k), prepend=True, with_kwargs=True),
                head.register_forward_hook(functools.partial(self._after_head, k)),
            )

    def attach_again_at_first_forward(self) -> None:
        """For a model that is not prepared yet: the hooks move to the front once the engine's are there."""
        branch = weakref.ref(self)

        def first_forward(module: nn.Module, args: Any) -> None:
            if torch.compiler.is_compiling():
                return
            handle.remove()
            if (alive := branch()) is not None and handle in alive._handles:
                alive.attach()

        handle = nn.modules.module.register_module_forward_pre_hook(first_forward)
        self._handles.append(handle)

    def detach(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def forget(self) -> None:
        """Drops what the last forward left: the open join and the heads' outputs."""
        self._forward = self._layer = None
        self._outputs.clear()

    def _before_head(
        self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        for i, value in enumerate(args):
            if isinstance(value, Tensor) and value.is_floating_point():
                return (*args[:i], self._alias(value, k), *args[i + 1 :]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                return args, {**kwargs, name: self._alias(value, k)}
        raise checks.head_without_input(self.tasks[k])

    def _after_head(self, k: int, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._outputs[k] = output

    def _after_layer(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._layer = (args[0].detach(), output)

    # ---- forward -----------------------------------------------------------------------------------------------

    def __call__(self, z: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """One alias of ``z`` per task, rotated where the method rotates; rows outside of ``mask`` are not measured."""
        aliases = enumerate(zip(self.tasks, self._join(z, mask), strict=True))
        return {task: self._rotated(alias, k) for k, (task, alias) in aliases}

    def _rotated(self, z: Tensor, k: int) -> Tensor:
        if self.rotations is None:
            return z
        if torch.compiler.is_compiling():
            R = torch.ops.accel_weighting.rotation(z.detach(), self._key, k)
        else:
            R = self.rotations.matrices(z)[k]
        return self.rotations.rotated(z, R)

    def head_outputs(self, k: int) -> list[Tensor]:
        """What head ``k`` gave in the last forward, tensors with a graph only."""
        return [o for o in _leaves(self._outputs.get(k)) if isinstance(o, Tensor) and o.requires_grad]

    def _join(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return (z,) * len(self.tasks)
        if not z.requires_grad:
            self.frozen_trunk = True
            return (z,) * len(self.tasks)
        self.frozen_trunk = False
        inputs = None
        if self._find_shared_layer is not None:
            if self._layer is None or not _same(self._layer[1], z):
                raise checks.shared_layer_is_not_the_branch()
            inputs, self._layer = self._layer[0], None
        elif self.rotations is not None and self.rotations.cooperative:
            inputs = z.detach()
        aliases: tuple[Tensor, ...]
        aliases = _Join.apply(z, inputs, mask, self._key, len(self.tasks))  # type: ignore[no-untyped-call]
        return aliases

    def _alias(self, z: Tensor, k: int) -> Tensor:
        if not torch.is_grad_enabled():
            return self._rotated(z, k)
        graph_task = _graph_task()
        forward = self._forward
        if forward is None or forward.graph_task != graph_task or not _same(forward.z, z):
            self._forward = forward = _Forward(z, self._join(z), graph_task)
        forward.taken.add(k)
        if len(forward.taken) == len(self.tasks) and torch.compiler.is_compiling():
            self._forward = None  # what is left behind would be a second graph
        return self._rotated(forward.aliases[k], k)

    # ---- backward ----------------------------------------------------------------------------------------------

    def watch(self, losses: Tensor, micro_batch: MicroBatch) -> None:
        """From when a backward passes ``losses`` ``[K]`` to its end, gradients at the join belong to the micro-batch.

        Any other gradient through the branch (a generator's step through the discriminator, a user's own
        ``torch.autograd.grad``, a backward after one that was interrupted) passes unrecorded and unweighted.
        """

        def begins(factors: Tensor) -> None:
            micro_batch.factors = factors.detach()
            running = _Pass(micro_batch, self._end_backward)
            self._pass = weakref.ref(running)
            Variable._execution_engine.queue_callback(running)

        losses.register_hook(begins)  # type: ignore[no-untyped-call]

    def _end_backward(self, micro_batch: MicroBatch) -> None:
        self._pass = None
        self.forget()
        if self._find_shared_layer is None:  # at a layer's weight all samples meet
            micro_batch.window.split |= micro_batch.record and micro_batch.split

    @property
    def _active(self) -> MicroBatch | None:
        """The micro-batch whose backward runs."""
        running = None if self._pass is None else self._pass()
        return None if running is None else running.micro_batch

    def collect(self, gradients: Sequence[Tensor | None], inputs: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Measures the gradients of one join; their weighted sum where weights act on the shared path, else None."""
        micro_batch = self._active
        if micro_batch is None:
            return None
        some = next(g for g in gradients if g is not None)
        arrived = frozenset(k for k, g in enumerate(gradients) if g is not None) & micro_batch.present
        if micro_batch.decide is not None and micro_batch.collected:
            raise checks.second_join_of_a_step()
        if arrived or not micro_batch.present:
            micro_batch.collected.append(((some.shape,), arrived))
        if micro_batch.record:
            micro_batch.window.arrived |= arrived
        if micro_batch.decide is not None and not micro_batch.present:
            # There is nothing to add, but the other processes wait for this one.
            zeros = measure.wide(some.new_zeros(len(gradients), len(gradients)))
            micro_batch.shared_weights = micro_batch.decide(zeros, arrived)
        if arrived and (micro_batch.record or micro_batch.decide is not None):
            rows = [g if k in arrived else None for k, g in enumerate(gradients)]
            self._measure(micro_batch, arrived, rows, inputs, mask)
        if micro_batch.shared_weights is None:
            return None
        weights = [w for w, g in zip(micro_batch.shared_weights, gradients, strict=True) if g is not None]
        return measure.weighted_sum([g for g in gradients if g is not None], torch.stack(weights))

    def _measure(
        self,
        micro_batch: MicroBatch,
        arrived: frozenset[int],
        rows: Sequence[Tensor | None],
        inputs: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Adds what the gradients of one join are, free of their factors, to the window."""
        assert micro_batch.factors is not None
        c, window = micro_batch.factors, micro_batch.window
        if micro_batch.scale is not None:
            c = c * micro_batch.scale
        if mask is not None:
            dim = -1 if self.rotations is None else self.rotations.dim
            rows = [None if g is None else g * mask.unsqueeze(dim) for g in rows]
        if self._find_shared_layer is not None:
            assert inputs is not None
            window.add("gradients", measure.layer_gradients(rows, inputs) / c[:, None, None])
            return
        gram = measure.gram(rows) / torch.outer(c, c)
        if micro_batch.decide is not None:
            micro_batch.shared_weights = micro_batch.decide(gram, arrived)
        if micro_batch.record:
            window.add("gradients", gram)
            if self.rotations is not None:
                window.add("moments", self.rotations.cross_products(rows, c, inputs))


def _leaves(output: Any) -> list[Any]:
    """All that a module's output holds; tensors in plain dataclasses too."""
    leaves = pytree.tree_leaves(output)
    return [
        part
        for leaf in leaves
        for part in (_leaves(vars(leaf)) if is_dataclass(leaf) and not isinstance(leaf, type) else [leaf])
    ]
