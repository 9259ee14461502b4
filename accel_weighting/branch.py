"""The branch point: one alias of the shared representation per task, whose gradients arrive apart in the one backward.

In a forward the shared representation ``z`` (one tensor, or several) is divided into one alias per task, a view without
a copy. In the one backward every task's gradient arrives at its own alias; where they come together, at the join, they
are measured, and their sum goes on to the trunk. What arrives at the vector of losses in the same backward,
``c = weight · loss scale / accumulation``, tells by how much the gradients were multiplied on the way.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from . import errors, measure
from .heads import Call, Heads
from .join import Gradients, Join, Taps, has_history, register, same
from .rotations import Rotations
from .shared_layer import SharedLayer
from .structures import argument, can_be_shared, mapped, tensors_in
from .window import MicroBatch


def _graph_task() -> int:
    """Which backward is running: a recomputed forward (activation checkpointing) must not meet the next real one."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _in_transform() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad, jacrev, jvp, …) is running."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


@dataclass
class _Forward:
    """The tensors that the heads of one forward share, each with its aliases."""

    graph_task: int
    joined: list[tuple[Tensor, Sequence[Tensor] | Taps]] = field(default_factory=list)
    taken: set[int] = field(default_factory=set)

    def aliases(self, z: Tensor) -> Sequence[Tensor] | Taps | None:
        """Those of ``z``, or of the tensor that it is a view of; None if it is not known yet."""
        for known, aliases in self.joined:
            if same(known, z):
                return aliases
        return None


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
        heads: The heads; None where the model calls ``branch`` itself.
        shared_layer: The layer whose output is the branch point, or None.
        rotations: The heads' rotations, or None.
        passes: Whether z passes as it is, undivided, since nothing is measured or weighed there.
        tap_above: Elements over all tasks from which on every gradient is measured alone, as it passes: none waits for
            the others then, and inner products are not known.
        needs_gradients: Whether the method needs what is measured here.
        warn_once: Says something the first time.
        owner: Gives the weighter, as long as it lives.

    Attributes:
        called: Tasks whose head was called in this forward.
        fed: Tasks whose head, or alias, had a history to send gradients back to.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        heads: Heads | None = None,
        shared_layer: SharedLayer | None = None,
        rotations: Rotations | None = None,
        passes: Callable[[], bool] = lambda: False,
        tap_above: float = math.inf,
        needs_gradients: bool = True,
        warn_once: Callable[[str, str], None] = lambda about, message: None,
        owner: Callable[[], Any] = lambda: None,
    ) -> None:
        self.tasks = tuple(tasks)
        self.heads = heads
        self.rotations = rotations
        self.owner = owner
        self.called: set[int] = set()
        self.fed: set[int] = set()
        self.shared_layer = shared_layer
        self._tap_above = tap_above
        self._passes, self._needs_gradients, self._warn_once = passes, needs_gradients, warn_once
        self._pass: weakref.ref[_Pass] | None = None
        self._forward: _Forward | None = None
        self._outputs: dict[int, Any] = {}
        self._handles: list[RemovableHandle] = []
        self._key = register(self)

    def __deepcopy__(self, memo: Any) -> Branch:
        """Returns self: a copied model (an average, a teacher) keeps using this branch and its current rotations."""
        return self

    # ---- hooks -------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hooks the heads and the shared layer."""
        self.detach()
        if self.shared_layer is not None:
            self._handles.append(self.shared_layer.attach())
        if self.heads is not None:
            self.heads.attach(self)
            self.heads.before_every_forward(self.follow)

    def follow(self) -> list[str]:
        """Hooks the heads anew where one is no longer the module that was hooked; the tasks of which that is true."""
        moved = [] if self.heads is None else self.heads.moved()
        if moved and self.heads is not None:
            self.attach()
            self._warn_once("moved", errors.heads_moved(moved))
        return moved

    def detach(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.heads is not None:
            self.heads.detach()
        self.forget()

    def forget(self) -> None:
        """Drops what the last forward left: the open join and the heads' outputs."""
        self._forward = None
        if self.shared_layer is not None:
            self.shared_layer.forget()
        self._outputs.clear()
        self.called, self.fed = set(), set()

    def before_head(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Head ``k`` is called: with its own aliases in place of what it shares with the others."""
        if not torch.compiler.is_compiling():
            self.called.add(k)
        assert self.heads is not None
        if (alias := self._known_alias(k, args, kwargs)) is not None:
            return (alias,), kwargs
        if len(args) == 1 and not kwargs and self.heads.arguments[k] is None and isinstance(args[0], Tensor):
            if not can_be_shared(args[0]):
                raise errors.head_without_input(self.tasks[k])
            return (self._alias([args[0]], k)[0],), kwargs
        shared = self._shared(k, module, args, kwargs)
        if not shared:
            if not any(can_be_shared(x) for x in tensors_in((args, kwargs))):
                raise errors.head_without_input(self.tasks[k])
            return args, kwargs
        aliases = dict(zip(map(id, shared), self._alias(shared, k), strict=True))
        call: Call = mapped((args, kwargs), lambda x: aliases.get(id(x), x))
        return call

    def _known_alias(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Head ``k``'s alias of the one tensor that it is called with, if a head of this forward had it before."""
        forward = self._forward
        if forward is None or len(args) != 1 or kwargs or torch.compiler.is_compiling():
            return None
        known, aliases = forward.joined[0]
        if args[0] is not known or not known.requires_grad or forward.graph_task != torch._C._current_graph_task_id():
            return None
        if not torch.is_grad_enabled():
            return None
        forward.taken.add(k)
        self.fed.add(k)
        return self._rotated(aliases[k], k)

    def copied_head(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The head of a copied model: rotated as the original, and no more."""
        if self.rotations is None:
            return args, kwargs
        shared = self._shared(k, module, args, kwargs)
        return mapped((args, kwargs), lambda x: self._rotated(x, k) if any(x is z for z in shared) else x)  # type: ignore[no-any-return]

    def after_head(self, k: int, output: Any) -> None:
        """What head ``k`` gave, for the path of zeros of a task without samples."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._outputs[k] = output

    def _shared(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors that head ``k`` shares with others: those with a history that it is called with, each once.

        Where its argument was named, those in it. Without gradients, where no history tells, the first that is
        floating-point.
        """
        assert self.heads is not None
        name = self.heads.arguments[k]
        given = (args, kwargs) if name is None else argument(name, self.tasks[k], module, args, kwargs)
        found = [x for x in tensors_in(given) if can_be_shared(x)]
        if self.rotations is not None and name is None and not torch.is_grad_enabled():
            return found[:1]
        if torch.is_grad_enabled():
            found = [x for x in found if has_history(x)] or [x for x in found if x.requires_grad][:1]
        return list({id(x): x for x in found}.values())

    # ---- forward -----------------------------------------------------------------------------------------------

    def __call__(self, z: Any, mask: Tensor | None = None) -> dict[str, Any]:
        """One alias of ``z`` per task, rotated where the method rotates; rows outside of ``mask`` are not measured.

        ``z`` is a tensor, or a list, tuple, dictionary or dataclass of tensors; so is what every task gets.
        """
        if isinstance(z, Tensor):
            aliases = enumerate(zip(self.tasks, self._join([z], mask)[0], strict=True))
            return {task: self._rotated(alias, k) for k, (task, alias) in aliases}
        zs = [x for x in tensors_in(z) if can_be_shared(x)]
        if not zs:
            raise errors.branch_without_tensor(z)
        if self.rotations is not None and len(zs) > 1:
            raise errors.several_tensors_rotated("branch")
        joined = dict(zip(map(id, zs), self._join(zs, mask), strict=True))

        def of_task(k: int) -> Callable[[Tensor], Tensor]:
            return lambda x: self._rotated(joined[id(x)][k], k) if id(x) in joined else x

        return {task: mapped(z, of_task(k)) for k, task in enumerate(self.tasks)}

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
        return [o for o in tensors_in(self._outputs.get(k)) if o.requires_grad]

    def _join(self, zs: Sequence[Tensor], mask: Tensor | None = None) -> list[Sequence[Tensor]]:
        """For every tensor one alias per task."""
        K = len(self.tasks)
        undivided: list[Sequence[Tensor]] = [(z,) * K for z in zs]
        if not torch.is_grad_enabled() or _in_transform() or not (torch.compiler.is_compiling() or not self._passes()):
            return undivided
        with_graph = [z for z in zs if z.requires_grad]
        if not with_graph:
            return undivided
        self.fed.update(range(K)) if self.heads is None and not torch.compiler.is_compiling() else None
        inputs = None
        if self.shared_layer is not None:
            if len(zs) > 1:  # each with an input of its own
                return [self._join([z], mask)[0] for z in zs]
            inputs = self.shared_layer.input_for(zs[0])
        elif self.rotations is not None and self.rotations.cooperative:
            inputs = zs[0].detach()
        flat: tuple[Tensor, ...]
        flat = Join.apply(inputs, mask, self._key, K, *with_graph)  # type: ignore[no-untyped-call]
        aliases = {id(z): flat[t * K : (t + 1) * K] for t, z in enumerate(with_graph)}
        return [aliases.get(id(z), whole) for z, whole in zip(zs, undivided, strict=True)]

    def _alias(self, zs: Sequence[Tensor], k: int) -> list[Tensor]:
        """Head ``k``'s own alias of each tensor, from one join for all that are not divided yet."""
        if self.rotations is not None and len(zs) > 1:
            raise errors.several_tensors_rotated(self.tasks[k])
        if not torch.is_grad_enabled() or _in_transform():
            return [self._rotated(z, k) for z in zs]
        if not torch.compiler.is_compiling() and any(z.requires_grad for z in zs):
            self.fed.add(k)
        graph_task, forward = _graph_task(), self._forward
        if forward is None or forward.graph_task != graph_task:
            forward = _Forward(graph_task)
        missing = [z for z in zs if forward.aliases(z) is None]
        if missing and k in forward.taken:  # its head again, on something new: the next forward
            forward, missing = _Forward(graph_task), list(zs)
        missing = [z for i, z in enumerate(missing) if not any(same(z, other) for other in missing[:i])]
        if missing:
            forward.joined += zip(missing, self._tapped(missing) or self._join(missing), strict=True)
        forward.taken.add(k)
        self._forward = forward
        if len(forward.taken) == len(self.tasks) and torch.compiler.is_compiling():
            self._forward = None  # what is left behind would be a second graph
        divided = [forward.aliases(z) for z in zs]
        return [self._rotated(aliases[k], k) for aliases in divided if aliases is not None]

    def _tapped(self, zs: Sequence[Tensor]) -> Sequence[Taps]:
        """For every tensor the aliases that are made and measured one by one; nothing where they are to be joined."""
        if torch.compiler.is_compiling() or len(self.tasks) * sum(z.numel() for z in zs) < self._tap_above:
            return ()
        if self._passes() or not all(z.requires_grad for z in zs):
            return ()
        return [Taps(z, self._key) for z in zs]

    # ---- backward ----------------------------------------------------------------------------------------------

    def watch(self, losses: Tensor, micro_batch: MicroBatch) -> None:
        """From when a backward passes ``losses`` ``[K]`` to its end, gradients at the join belong to the micro-batch.

        Any other gradient through the branch (a generator's step through the discriminator, a user's own
        ``torch.autograd.grad``, a backward after one that was interrupted) passes unrecorded and unweighted.
        """

        def begins(factors: Tensor) -> None:
            micro_batch.factors = micro_batch.window.factors = factors.detach()
            running = _Pass(micro_batch, self._end_backward)
            self._pass = weakref.ref(running)
            Variable._execution_engine.queue_callback(running)

        losses.register_hook(begins)  # type: ignore[no-untyped-call]

    def _end_backward(self, micro_batch: MicroBatch) -> None:
        self._pass = None
        self.forget()
        micro_batch.add_squares()
        if self.shared_layer is None:  # at a layer's weight all samples meet
            micro_batch.window.split |= micro_batch.record and micro_batch.split

    @property
    def _active(self) -> MicroBatch | None:
        """The micro-batch whose backward runs."""
        running = None if self._pass is None else self._pass()
        return None if running is None else running.micro_batch

    @property
    def is_active(self) -> bool:
        """Whether a micro-batch's backward runs."""
        return self._active is not None

    def notice_derivative(self) -> None:
        """The running backward is that of a gradient which passed the join: a part of it reaches the trunk elsewhere.

        Raises:
            RuntimeError: The method needs the gradients at the join.
        """
        micro_batch = self._active
        if micro_batch is None:
            return
        if self._needs_gradients:
            raise errors.loss_on_derivatives()
        micro_batch.window.derivatives = True

    def collect(self, rows: Sequence[Gradients], inputs: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Measures the gradients of one join.

        Args:
            rows: For every tensor one gradient per task, None where none came.
            inputs: Of the shared layer, or z, where the measurement needs it.
            mask: Which samples count.

        Returns:
            The weights of the sum that goes on to the trunk, ``[K]``; None: 1 each.
        """
        micro_batch = self._active
        if micro_batch is None:
            return None
        some = next(g for tensor in rows for g in tensor if g is not None)
        came = frozenset(k for tensor in rows for k, g in enumerate(tensor) if g is not None)
        arrived = came & micro_batch.present
        if micro_batch.decide is not None and micro_batch.collected:
            raise errors.second_join_of_a_step()
        if arrived or not micro_batch.present:
            firsts = (next((g for g in tensor if g is not None), None) for tensor in rows)
            micro_batch.collected.append((tuple(first.shape for first in firsts if first is not None), arrived))
        if micro_batch.record:
            micro_batch.window.arrived |= arrived
        if micro_batch.decide is not None and not micro_batch.present:
            # There is nothing to add, but the other processes wait for this one.
            zeros = measure.wide(some.new_zeros(len(self.tasks), len(self.tasks)))
            micro_batch.shared_weights = micro_batch.decide(zeros, arrived)
        if arrived and (micro_batch.record or micro_batch.decide is not None):
            with torch.no_grad():
                here: Sequence[measure.Rows] = rows  # of which a stack may be there already
                if arrived != came:
                    here = [[g if k in arrived else None for k, g in enumerate(tensor)] for tensor in rows]
                self._measure(micro_batch, arrived, here, inputs, mask)
        return micro_batch.shared_weights

    def _measure(
        self,
        micro_batch: MicroBatch,
        arrived: frozenset[int],
        rows: Sequence[measure.Rows],
        inputs: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Adds what the gradients of one join are, free of their factors, to the window."""
        c, window = micro_batch.divisors, micro_batch.window
        if mask is not None:
            dim = self._features(mask, inputs)
            rows = [[None if g is None else g * mask.unsqueeze(dim) for g in tensor] for tensor in rows]
        if self.shared_layer is not None:
            assert inputs is not None
            matrices = measure.layer_gradients(rows[0], self.shared_layer.layer, inputs)
            window.add("gradients", matrices / c[:, None, None])
            return
        gram = measure.gram(rows) / torch.outer(c, c)
        if micro_batch.decide is not None:
            micro_batch.shared_weights = micro_batch.decide(gram, arrived)
        if micro_batch.record:
            window.add("gradients", gram)
            if self.rotations is not None:
                window.add("moments", self.rotations.cross_products(rows[0], c, inputs))

    def _features(self, mask: Tensor, inputs: Tensor | None) -> int:
        """Which dimension of z a mask lacks."""
        if self.rotations is not None:
            return self.rotations.dim
        if self.shared_layer is not None and inputs is not None and mask.ndim + 1 == inputs.ndim:
            return self.shared_layer.layer.features
        return -1

    def tap(self, k: int, g: Tensor) -> None:
        """Measures the gradient of task ``k`` alone, as it passes."""
        micro_batch = self._active
        if micro_batch is None:
            return
        arrived = frozenset([k]) & micro_batch.present
        if arrived or not micro_batch.present:
            micro_batch.collected.append(((g.shape,), arrived))
        if micro_batch.record and arrived:
            micro_batch.window.arrived |= arrived
            with torch.no_grad():
                micro_batch.squares[k] = micro_batch.squares.get(k, 0.0) + measure.square(g)
