"""The branch point: one alias of the shared representation per task, whose gradients arrive apart in the one backward.

In a forward the shared representation ``z`` (one tensor, or several) is divided into one alias per task, a view without
a copy. In the one backward every task's gradient arrives at its own alias; where they come together, at the join, they
are measured, and their sum goes on to the trunk. What arrives at the vector of losses in the same backward,
``c = weight · loss scale / accumulation``, tells by how much the gradients were multiplied on the way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from . import errors, measure
from .heads import Call, Heads
from .join import Forward, Gradients, has_history, join_of, register, same
from .rotations import Rotations
from .structures import argument, can_be_shared, mapped, tensors
from .tracing import graph_of, place
from .window import MicroBatch


def _graph_task() -> int:
    """Which backward is running: a recomputed forward (activation checkpointing) must not meet the next real one."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


MANY = 200
"""Joins without any `combine` after which something is said: the losses go another way."""


def _exporting() -> bool:
    """Whether ``torch.export`` is running; torch before 2.7 does not tell."""
    return torch.compiler.is_compiling() and getattr(torch.compiler, "is_exporting", lambda: False)()


def _in_transform() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad, jacrev, jvp, …) is running."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


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
        find_shared_layer: Gives the layer whose output is the branch point, or None.
        rotations: The heads' rotations, or None.
        passes: Whether z passes as it is, undivided, since nothing is measured or weighed there.
        needs_gradients: Whether the method needs what is measured here.
        warn_once: Says something the first time.

    Attributes:
        called: Tasks whose head was called in this forward.
        fed: Tasks whose head, or alias, had a history to send gradients back to.
        reads: The shapes of what each task shares, as its gradients came first.
        key: By which its joins are known in autograd's graph.
        attached: How often heads were hooked.
        parametrized: Nodes of parameters that were computed once in this forward, for several uses.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        heads: Heads | None = None,
        find_shared_layer: Callable[[], nn.Linear] | None = None,
        rotations: Rotations | None = None,
        passes: Callable[[], bool] = lambda: False,
        needs_gradients: bool = True,
        warn_once: Callable[[str, str], None] = lambda about, message: None,
    ) -> None:
        self.tasks = tuple(tasks)
        self.heads = heads
        self.rotations = rotations
        self.called: set[int] = set()
        self.fed: set[int] = set()
        self._find_shared_layer = find_shared_layer
        self._passes, self._needs_gradients, self._warn_once = passes, needs_gradients, warn_once
        self._pass: weakref.ref[_Pass] | None = None
        self._forward: Forward | None = None
        self._layer: tuple[Tensor, Tensor] | None = None
        self._outputs: dict[int, Any] = {}
        self._handles: list[RemovableHandle] = []
        self.reads: dict[int, tuple[torch.Size, ...]] = {}
        self.parametrized: set[Any] = set()
        self.attached = self._joins = 0
        self._join_of_tasks = join_of(self.tasks)
        self.key = register(self)

    def __deepcopy__(self, memo: Any) -> Branch:
        """Returns self: a copied model (an average, a teacher) keeps using this branch and its current rotations."""
        return self

    # ---- hooks -------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hooks the heads and the shared layer."""
        self.detach()
        self.attached += 1
        if self._find_shared_layer is not None:
            self._handles.append(self._find_shared_layer().register_forward_hook(self._after_layer))
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
        self._forward = self._layer = None
        self._outputs.clear()
        self.parametrized = set()
        self._joins = 0
        self.called, self.fed = set(), set()

    def before_head(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Head ``k`` is called: with its own aliases in place of what it shares with the others."""
        if not torch.compiler.is_compiling():
            self.called.add(k)
        assert self.heads is not None
        if len(args) == 1 and not kwargs and self.heads.arguments[k] is None and isinstance(args[0], Tensor):
            if not can_be_shared(args[0]):
                raise errors.head_without_input(self.tasks[k])
            return (self._alias([args[0]], k)[0],), kwargs
        shared = self._shared(k, module, args, kwargs)
        if not shared:
            if not any(can_be_shared(x) for x in tensors((args, kwargs))):
                raise errors.head_without_input(self.tasks[k])
            return args, kwargs
        aliases = dict(zip(map(id, shared), self._alias(shared, k), strict=True))
        call: Call = mapped((args, kwargs), lambda x: aliases.get(id(x), x))
        return call

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
        found = [x for x in tensors(given) if can_be_shared(x)]
        if self.rotations is not None and name is None and not torch.is_grad_enabled():
            return found[:1]
        if torch.is_grad_enabled():
            found = [x for x in found if has_history(x)] or [x for x in found if x.requires_grad][:1]
        return list({id(x): x for x in found}.values())

    def _after_layer(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._layer = (args[0].detach(), output)

    # ---- forward -----------------------------------------------------------------------------------------------

    def __call__(self, z: Any, mask: Tensor | None = None) -> dict[str, Any]:
        """One alias of ``z`` per task, rotated where the method rotates; rows outside of ``mask`` are not measured.

        ``z`` is a tensor, or a list, tuple, dictionary or dataclass of tensors; so is what every task gets.
        """
        if isinstance(z, Tensor):
            aliases = enumerate(zip(self.tasks, self._join([z], mask)[0], strict=True))
            return {task: self._rotated(alias, k) for k, (task, alias) in aliases}
        zs = [x for x in tensors(z) if can_be_shared(x)]
        if not zs:
            raise errors.branch_without_tensor(z)
        if self.rotations is not None and len(zs) > 1:
            raise errors.several_tensors_rotated("branch")
        joined = dict(zip(map(id, zs), self._join(zs, mask), strict=True))

        def own(k: int) -> Any:
            return mapped(z, lambda x: self._rotated(joined[id(x)][k], k) if id(x) in joined else x)

        return {task: own(k) for k, task in enumerate(self.tasks)}

    def _rotated(self, z: Tensor, k: int) -> Tensor:
        if self.rotations is None:
            return z
        if _exporting() or torch._C._get_tracing_state() is not None:
            raise errors.exported_rotations()
        if torch.compiler.is_compiling():
            R = torch.ops.accel_weighting.rotation(z.detach(), self.key, k)
        else:
            R = self.rotations.matrices(z)[k]
        return self.rotations.rotated(z, R)

    def head_outputs(self, k: int) -> list[Tensor]:
        """What head ``k`` gave in the last forward, tensors with a graph only."""
        return [o for o in tensors(self._outputs.get(k)) if o.requires_grad]

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
        if self._find_shared_layer is not None:
            if self._layer is None or len(zs) > 1 or not same(self._layer[1], zs[0]):
                raise errors.shared_layer_is_not_the_branch()
            inputs, self._layer = self._layer[0], None
        elif self.rotations is not None and self.rotations.cooperative:
            inputs = zs[0].detach()
        if not torch.compiler.is_compiling():
            self._before_join()
        flat: tuple[Tensor, ...]
        flat = self._join_of_tasks.apply(inputs, mask, self.key, K, *with_graph)  # type: ignore[no-untyped-call]
        aliases = {id(z): flat[t * K : (t + 1) * K] for t, z in enumerate(with_graph)}
        return [aliases.get(id(z), whole) for z, whole in zip(zs, undivided, strict=True)]

    def _before_join(self) -> None:
        """What is to be known, or said, of a join that is not compiled."""
        if torch._C._get_tracing_state() is not None:
            raise errors.traced()
        if parametrize._cache_enabled:
            self.parametrized.update(w.grad_fn for w in parametrize._cache.values() if isinstance(w, Tensor))
        self._joins += 1
        if self._joins == MANY:
            self._warn_once("never combined", errors.never_combined(MANY))

    def _alias(self, zs: Sequence[Tensor], k: int) -> list[Tensor]:
        """Head ``k``'s own alias of each tensor, from one join for all that are not divided yet."""
        if self.rotations is not None and len(zs) > 1:
            raise errors.several_tensors_rotated(self.tasks[k])
        if not torch.is_grad_enabled() or _in_transform():
            return [self._rotated(z, k) for z in zs]
        if torch.compiler.is_compiling():
            return self._alias_compiled(zs, k)
        if any(z.requires_grad for z in zs):
            self.fed.add(k)
        graph_task, forward = _graph_task(), self._forward
        if forward is None or forward.graph_task != graph_task:
            forward = Forward(graph_task)
        missing = [z for z in zs if forward.aliases(z) is None]
        if missing and k in forward.taken:  # its head again, on something new: the next forward
            forward, missing = Forward(graph_task), list(zs)
        if missing:
            missing = _distinct(missing)
            joined = zip(missing, self._join(missing), strict=True)
            forward.joined += [(z, 0, aliases) for z, aliases in joined]
        forward.taken.add(k)
        self._forward = forward
        return [self._rotated(forward.alias(z, k), k) for z in zs]

    def _alias_compiled(self, zs: Sequence[Tensor], k: int) -> list[Tensor]:
        """The same in code that is compiled, where a tensor is known by its place in the trace.

        What is left here at the end of a trace is an output of the graph, so the record is dropped when every head was
        called in the graph where it began. For a head that is called again the aliases stay with the tensors that the
        trace computed, which end with it.
        """
        kept, forward = f"_aliases_{self.key}", self._forward
        places = [place(z) for z in zs]
        graph = graph_of(places)
        if forward is None or forward.graph_task != -1:
            forward = Forward(-1, graph)
        found: list[Sequence[Tensor] | None] = []
        for z, at in zip(zs, places, strict=True):
            aliases = forward.aliases(z, at)
            found.append(getattr(z, kept, None) if aliases is None else aliases)
        missing = [i for i, aliases in enumerate(found) if aliases is None]
        if missing and k in forward.taken:
            forward, missing = Forward(-1, graph), list(range(len(zs)))
        if missing:
            for i, aliases in zip(missing, self._join([zs[i] for i in missing]), strict=True):
                found[i] = aliases
                forward.joined.append((zs[i], places[i], aliases))
                if places[i] > 0:
                    setattr(zs[i], kept, aliases)
        forward.taken.add(k)
        dropped = forward.graph == graph and (len(forward.taken) == len(self.tasks) or not forward.joined)
        self._forward = None if dropped else forward
        return [self._rotated(aliases[k], k) for aliases in found if aliases is not None]

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
        came = frozenset(k for tensor in rows for k, g in enumerate(tensor) if g is not None)
        if micro_batch is None:
            if not torch.is_grad_enabled():  # somebody else's backward, which frees the graph of the heads' outputs
                for k in came:
                    self._outputs.pop(k, None)
            return None
        some = next(g for tensor in rows for g in tensor if g is not None)
        arrived = came & micro_batch.present
        if micro_batch.decide is not None and micro_batch.collected:
            raise errors.second_join_of_a_step()
        if arrived or not micro_batch.present:
            firsts = (next((g for g in tensor if g is not None), None) for tensor in rows)
            shapes = tuple([first.shape for first in firsts if first is not None])
            micro_batch.collected.append((shapes, arrived))
            if len(self.reads) < len(self.tasks):
                self.reads.update((k, shapes) for k in arrived if k not in self.reads)
        if micro_batch.record:
            micro_batch.window.arrived |= arrived
        if micro_batch.decide is not None and not micro_batch.present:
            # There is nothing to add, but the other processes wait for this one.
            zeros = measure.wide(some.new_zeros(len(self.tasks), len(self.tasks)))
            micro_batch.shared_weights = micro_batch.decide(zeros, arrived)
        if arrived and (micro_batch.record or micro_batch.decide is not None):
            with torch.no_grad():
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
        assert micro_batch.factors is not None
        c, window = micro_batch.factors, micro_batch.window
        if micro_batch.scale is not None:
            c = c * micro_batch.scale
        if mask is not None:
            dim = -1 if self.rotations is None else self.rotations.dim
            rows = [[None if g is None else g * mask.unsqueeze(dim) for g in tensor] for tensor in rows]
        if self._find_shared_layer is not None:
            assert inputs is not None
            window.add("gradients", measure.layer_gradients(rows[0], inputs) / c[:, None, None])
            return
        gram = measure.gram(rows) / torch.outer(c, c)
        if micro_batch.decide is not None:
            micro_batch.shared_weights = micro_batch.decide(gram, arrived)
        if micro_batch.record:
            window.add("gradients", gram)
            if self.rotations is not None:
                window.add("moments", self.rotations.cross_products(rows[0], c, inputs))


def _distinct(zs: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor once."""
    found: list[Tensor] = []
    for z in zs:
        if not any(same(z, other) for other in found):
            found.append(z)
    return found
