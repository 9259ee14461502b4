"""The join: one alias of the shared representation per task, whose gradients meet, apart, in the one backward.

The only place that knows autograd. In a forward the shared representation ``z`` is divided into one alias per task (a
view, no copy). In the one backward every task's gradient arrives at its own alias; they meet in one opaque operator,
which measures them and hands their sum on to the trunk. What arrives at the vector of losses in the same backward,
``c = weight · loss scale / accumulation``, tells by how much the gradients were multiplied on the way.
"""

from __future__ import annotations

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

from . import checks

SMALL = 1 << 16
"""Elements up to which a tensor's kernel costs more to start than to run, about."""

CHUNK = 1 << 20
"""Elements per task that are gathered at once: bounds the memory of the products whatever the size of z."""

_BRANCHES: weakref.WeakValueDictionary[int, Branch] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


@torch.library.custom_op(
    "accel_weighting::meet",
    mutates_args=(),
    schema="(Tensor?[] gradients, Tensor? inputs, Tensor? mask, int key) -> Tensor",
)
def _meet(gradients: list[Tensor | None], inputs: Tensor | None, mask: Tensor | None, key: int) -> Tensor:
    """The gradients of one join meet. Opaque, so that torch.compile sees no side effect and breaks no graph."""
    branch = _BRANCHES.get(key)
    arrived = [g for g in gradients if g is not None]
    with torch.autocast(arrived[0].device.type, enabled=False):
        if branch is not None:
            shared = branch.meet(gradients, inputs, mask)
            if shared is not None:
                return shared
        return _sum(arrived)


@_meet.register_fake
def _(gradients: list[Tensor | None], inputs: Tensor | None, mask: Tensor | None, key: int) -> Tensor:
    return torch.empty_like(next(g for g in gradients if g is not None))


@torch.library.custom_op("accel_weighting::rotation", mutates_args=(), schema="(Tensor z, int key, int k) -> Tensor")
def _rotation(z: Tensor, key: int, k: int) -> Tensor:
    """A copy of R_k. Opaque too, since the method moves the rotations at the first use after a step."""
    rotation = _BRANCHES[key].rotation
    assert rotation is not None
    return rotation.matrices(z)[k].clone()


@_rotation.register_fake
def _(z: Tensor, key: int, k: int) -> Tensor:
    rotation = _BRANCHES[key].rotation
    assert rotation is not None
    m = rotation.size or z.shape[rotation.dim]
    return z.new_empty(m, m, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)


def _sum(gradients: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """A fresh sum: one kernel on a stack of small tensors, one pass over each where memory is what takes the time."""
    first = gradients[0]
    w = None if weights is None else weights.to(first.dtype)
    if first.numel() <= SMALL:
        V = torch.stack(tuple(gradients))
        return (V if w is None else V * w.view(-1, *(1,) * first.ndim)).sum(0)
    total = first.clone() if w is None else first * w[0]
    for k, g in enumerate(gradients[1:], 1):
        total = total.add_(g) if w is None else total.addcmul_(g, w[k])
    return total


class _Join(torch.autograd.Function):
    """``z`` to one alias per task; backward is the one operator above."""

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
        saved = ctx.saved_tensors if ctx.saves else (None, None)
        return torch.ops.accel_weighting.meet(list(gradients), *saved, ctx.key), None, None, None, None


class _Nothing(torch.autograd.Function):
    """A zero that sends zeros back, whatever the values: keeps a head in the graph when its task has no samples."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.save_for_backward(*outputs)
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(output) for output in ctx.saved_tensors)


def nothing(outputs: Sequence[Tensor]) -> Tensor:
    """A scalar 0 that depends on ``outputs``, each of which gets a gradient of zeros."""
    return _Nothing.apply(*outputs)


@dataclass
class Block:
    """One micro-batch, from ``combine`` to the end of its backward.

    Attributes:
        present: Indices of the tasks that are in it.
        scale: What every task's gradient is divided by besides its factor, ``[K]`` (the reciprocal of its number of
            items), or None.
        shared_weights: Weights on the shared path, ``[K]`` on the device, or None where weights act on the losses.
        decide: Gives ``shared_weights`` from the Gram matrix of this very backward (``lag=0``), or None.
        record: Whether the statistics take it in.
        factors: ``c``, ``[K]``, once the backward has begun.
        arrived: Tasks whose gradient came to a join, in this micro-batch or an earlier one of the window.
        met: Whether gradients have met in this very backward.
    """

    present: frozenset[int]
    scale: Tensor | None = None
    shared_weights: Tensor | None = None
    decide: Callable[[Tensor], Tensor] | None = None
    record: bool = True
    factors: Tensor | None = None
    arrived: set[int] = field(default_factory=set)
    met: bool = False


@dataclass(frozen=True)
class Rotation:
    """Every head's own rotation of the shared representation.

    Attributes:
        matrices: ``[K, m, m]`` on the device of the z it is given.
        dim: The dimension of z that holds the features; the first m of them are rotated.
        cooperative: Whether the moments of gradients and features are wanted too.
        size: m, where it is not all of them.
    """

    matrices: Callable[[Tensor], Tensor]
    dim: int = -1
    cooperative: bool = False
    size: int | None = None


def rotated(z: Tensor, R: Tensor, dim: int = -1) -> Tensor:
    """``R z``: the first m features, along ``dim``, turned by ``R``, ``[m, m]``."""
    m, x = len(R), z.movedim(dim, -1)
    turned = x[..., :m] @ R.to(z.dtype).T
    if m < x.shape[-1]:
        turned = torch.cat([turned, x[..., m:]], -1)
    return turned.movedim(-1, dim)


@dataclass
class _Forward:
    """The join that the heads of one forward share."""

    z: Tensor
    aliases: tuple[Tensor, ...]
    graph_task: int
    taken: set[int] = field(default_factory=set)


def _graph_task() -> int:
    """Which backward is running: a recomputed forward (activation checkpointing) must not meet the next real one."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


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


class Branch:
    """The branch point: divides z, meets the gradients, and gives what it measured to ``sink``.

    Args:
        tasks: Task names.
        sink: Called as ``sink(name, tensor)`` with every sum over rows that a backward measured: ``"gram"`` ``[K, K]``,
            or, with a shared layer, ``"matrices"`` ``[K, out, in]``; with rotations, also ``"moments"``
            ``[K(K−1)/2, m, m]``: ``G_kᵀ G_j``, k < j, and after them, where cooperative, ``G_kᵀ Z`` of every task. All
            are free of the factors.
        find_heads: Gives the heads' modules in task order; None where the model calls ``branch`` itself. It is asked
            again when the hooks move, since an engine may have replaced a module.
        find_shared_layer: Likewise the ``nn.Linear`` whose output is the branch point, or None.
        rotation: The heads' rotations, or None.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        sink: Callable[[str, Tensor], None],
        find_heads: Callable[[], Sequence[nn.Module]] | None = None,
        find_shared_layer: Callable[[], nn.Linear] | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        self.split = False  # heads of one forward were fed different tensors: only norms are known
        self.frozen_trunk = False  # z came without a graph
        self.armed: Block | None = None
        self._sink = sink
        self.find_heads = find_heads
        self._find_shared_layer = find_shared_layer
        self.rotation = rotation
        self._forward: _Forward | None = None
        self._layer: tuple[Tensor, Tensor] | None = None
        self._outputs: dict[int, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._key = next(_KEYS)
        _BRANCHES[self._key] = self

    def __deepcopy__(self, memo: Any) -> Branch:
        """The same: a copy of a model (an average, a teacher) sees the rotations of now, and no second weighter."""
        return self

    def __reduce__(self) -> Any:
        raise checks.hooks_are_not_pickled()

    # ---- hooks -------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hooks the heads, in front of whatever an engine hooked there.

        Engines hand every head an alias of z of its own (FSDP2 and ZeRO-3 in forward pre-hooks); only a hook that runs
        before theirs sees that the heads share one z.
        """
        self.detach()
        if self._find_shared_layer is not None:
            self._handles.append(self._find_shared_layer().register_forward_hook(self._after_layer))
        for k, head in enumerate(self.find_heads() if self.find_heads is not None else ()):
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
            self._outputs[k] = [o for o in _leaves(output) if isinstance(o, Tensor) and o.requires_grad]

    def _after_layer(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._layer = (args[0].detach(), output)

    # ---- forward -----------------------------------------------------------------------------------------------

    def __call__(self, z: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """One alias of ``z`` per task, rotated where the method rotates; rows outside of ``mask`` are not measured."""
        aliases = enumerate(zip(self.tasks, self._join(z, mask), strict=True))
        return {task: self._rotated(alias, k) for k, (task, alias) in aliases}

    def _rotated(self, z: Tensor, k: int) -> Tensor:
        if self.rotation is None:
            return z
        if torch.compiler.is_compiling():
            R = torch.ops.accel_weighting.rotation(z.detach(), self._key, k)
        else:
            R = self.rotation.matrices(z)[k]
        return rotated(z, R, self.rotation.dim)

    def head_outputs(self, k: int) -> list[Tensor]:
        """What head ``k`` gave in the last forward, tensors with a graph only."""
        return self._outputs.get(k, [])

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
        elif self.rotation is not None and self.rotation.cooperative:
            inputs = z.detach()
        return _Join.apply(z, inputs, mask, self._key, len(self.tasks))

    def _alias(self, z: Tensor, k: int) -> Tensor:
        if not torch.is_grad_enabled():
            return self._rotated(z, k)
        graph_task = _graph_task()
        forward = self._forward
        if forward is not None and forward.graph_task != graph_task:
            forward = None
        if forward is not None and not _same(forward.z, z):
            if k not in forward.taken and len(forward.taken) < len(self.tasks):
                self.split = self._find_shared_layer is None  # at a layer's weight all samples meet
            forward = None
        if forward is None:
            self._forward = forward = _Forward(z, self._join(z), graph_task)
        forward.taken.add(k)
        if len(forward.taken) == len(self.tasks) and torch.compiler.is_compiling():
            self._forward = None  # what is left behind would be a second graph
        return self._rotated(forward.aliases[k], k)

    # ---- backward ----------------------------------------------------------------------------------------------

    def arm(self, losses: Tensor, block: Block) -> None:
        """From the moment the backward passes ``losses`` ``[K]`` to its end, gradients that meet belong to ``block``.

        Any other gradient through the branch (a generator's step through the discriminator, a user's own
        ``torch.autograd.grad``) passes unrecorded and unweighted.
        """

        def begins(factors: Tensor) -> None:
            block.factors = factors.detach()
            self.armed = block
            Variable._execution_engine.queue_callback(self.disarm)

        losses.register_hook(begins)

    def disarm(self) -> None:
        """The backward is over."""
        self.armed = None
        self.forget()

    def meet(
        self, gradients: Sequence[Tensor | None], inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | None:
        """Measures the gradients of one join; their weighted sum where weights act on the shared path, else None."""
        block = self.armed
        if block is None:
            return None
        arrived = {k for k, g in enumerate(gradients) if g is not None} & block.present
        if block.decide is not None and block.met:
            raise checks.second_join_of_a_step()
        block.arrived |= arrived
        block.met |= bool(arrived) or not block.present
        if block.decide is not None and not block.present:  # there is nothing to add, but others wait for this process
            some = next(g for g in gradients if g is not None)
            block.shared_weights = block.decide(_wide(some.new_zeros(len(gradients), len(gradients))))
        if arrived and (block.record or block.decide is not None):
            self._measure(block, [g if k in arrived else None for k, g in enumerate(gradients)], inputs, mask)
        if block.shared_weights is None:
            return None
        weights = [w for w, g in zip(block.shared_weights, gradients, strict=True) if g is not None]
        return _sum([g for g in gradients if g is not None], torch.stack(weights))

    def _measure(self, block: Block, rows: Sequence[Tensor | None], inputs: Tensor | None, mask: Tensor | None) -> None:
        """Gives the sink what the gradients of one join are, free of their factors."""
        assert block.factors is not None
        c = block.factors if block.scale is None else block.factors * block.scale
        if mask is not None:
            dim = -1 if self.rotation is None else self.rotation.dim
            rows = [None if g is None else g * mask.unsqueeze(dim) for g in rows]
        if self._find_shared_layer is not None:
            assert inputs is not None
            self._sink("matrices", _matrices(rows, inputs) / c[:, None, None])
            return
        gram = _gram(rows) / torch.outer(c, c)
        if block.decide is not None:
            block.shared_weights = block.decide(gram)
        if block.record:
            self._sink("gram", gram)
            if self.rotation is not None:
                self._sink("moments", self._moments(rows, c, inputs))

    def _moments(self, rows: Sequence[Tensor | None], c: Tensor, z: Tensor | None) -> Tensor:
        """``G_kᵀ G_j`` of all pairs k < j on the rotated features, and ``G_kᵀ Z`` of all tasks where z is given."""
        assert self.rotation is not None
        some = next(g for g in rows if g is not None)
        m = self.rotation.matrices(some).shape[-1]

        def features(x: Tensor) -> Tensor:
            return _wide(x.movedim(self.rotation.dim, -1)[..., :m].reshape(-1, m))  # type: ignore[union-attr]

        G = [None if g is None else features(g) for g in rows]
        pairs = [(G[k], G[j], c[k] * c[j]) for k, j in itertools.combinations(range(len(G)), 2)]
        if z is not None:
            Z = features(z)
            pairs += [(g, Z, c[k]) for k, g in enumerate(G)]
        products = torch.zeros(len(pairs), m, m, dtype=_wide(some[:0]).dtype, device=some.device)
        for product, (a, b, _) in zip(products, pairs, strict=True):
            if a is not None and b is not None:
                torch.mm(a.T, b, out=product)
        if pairs:
            products /= torch.stack([factor for *_, factor in pairs])[:, None, None]
        return products


def _leaves(output: Any) -> list[Any]:
    """All that a module's output holds; tensors in plain dataclasses too."""
    leaves = pytree.tree_leaves(output)
    return [
        part
        for leaf in leaves
        for part in (_leaves(vars(leaf)) if is_dataclass(leaf) and not isinstance(leaf, type) else [leaf])
    ]


def _wide(x: Tensor) -> Tensor:
    """float32 or wider: products of half-precision gradients overflow."""
    return x if x.dtype == torch.float64 else x.float()


def _gram(rows: Sequence[Tensor | None]) -> Tensor:
    """Inner products of all gradients of a join, ``[K, K]``; rows that are None count as zeros."""
    some = next(g for g in rows if g is not None)
    zeros = some.new_zeros(()).expand_as(some)
    full = [zeros if g is None else g for g in rows]
    parts = [full] if some.numel() <= CHUNK else zip(*(g.reshape(-1).split(CHUNK) for g in full), strict=True)
    stacked = (_wide(torch.stack(tuple(part)).flatten(1)) for part in parts)
    return functools.reduce(torch.add, (V @ V.T for V in stacked))


def _matrices(rows: Sequence[Tensor | None], inputs: Tensor) -> Tensor:
    """``g_kᵀ a`` of every task: its gradient at the weight of the Linear that gave z, ``[K, out, in]``."""
    a = _wide(inputs.reshape(-1, inputs.shape[-1]))
    some = next(g for g in rows if g is not None)
    zeros = a.new_zeros(some.shape[-1], a.shape[-1])
    return torch.stack([zeros if g is None else _wide(g.reshape(-1, g.shape[-1])).T @ a for g in rows])
