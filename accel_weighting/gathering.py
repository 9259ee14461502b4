"""The backward at the branch point: to which micro-batch gradients belong, and what they come to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from . import errors, measure
from .contexts import without_graph
from .join import passed_inside
from .parameters import SharedParameters
from .rotations import Rotations
from .rows import Rows
from .shared_layer import SharedLayer
from .window import MicroBatch


class _Pass:
    """One backward of a micro-batch. Autograd holds it for as long as that backward runs, and nobody else does."""

    def __init__(self, micro_batch: MicroBatch, ended: Callable[[MicroBatch], None]) -> None:
        self.micro_batch = micro_batch
        self._ended = ended

    def __call__(self) -> None:
        self._ended(self.micro_batch)


class Gathering:
    """The part of a branch that autograd calls."""

    tasks: tuple[str, ...]
    rotations: Rotations | None
    shared_layer: SharedLayer | None
    parameters: SharedParameters | None
    reads: dict[int, tuple[torch.Size, ...]]
    key: int
    _needs_gradients: bool
    _outputs: dict[int, Any]
    _pass: weakref.ref[_Pass] | None = None

    def forget(self) -> None:
        """Drops what the last forward left."""
        raise NotImplementedError

    def watch(self, losses: Tensor, micro_batch: MicroBatch) -> None:
        """From when a backward passes ``losses`` ``[K]`` to its end, gradients at the join belong to the micro-batch.

        Any other gradient through the branch (a generator's step through the discriminator, a user's own
        ``torch.autograd.grad``, a backward after one that was interrupted) passes unrecorded and unweighted.

        Args:
            losses: All of them, stacked: the one output of a node, whose hooks cost less than a tensor's.
            micro_batch: The micro-batch.
        """
        node = losses.grad_fn
        assert node is not None
        node.register_prehook(lambda gradients: self._begins(gradients[0].detach(), micro_batch))

    def watch_total(self, total: Tensor, micro_batch: MicroBatch, weights: Tensor) -> None:
        """The same of a ``total``, ``[]``, which is the sum of the losses by ``weights``, ``[K]``."""
        total.register_hook(lambda factor: self._begins(factor.detach() * weights, micro_batch))  # type: ignore[no-untyped-call]

    def _begins(self, factors: Tensor, micro_batch: MicroBatch) -> None:
        """The backward of a micro-batch begins."""
        micro_batch.factors = micro_batch.window.factors = factors
        running = _Pass(micro_batch, self._end_backward)
        self._pass = weakref.ref(running)
        Variable._execution_engine.queue_callback(running)

    def _end_backward(self, micro_batch: MicroBatch) -> None:
        self._pass = None
        self.forget()
        micro_batch.add_squares()
        if self.parameters is not None:
            micro_batch.window.arrived |= self.parameters.complete(micro_batch.came, micro_batch.window.used)
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

    def runs(self, micro_batch: MicroBatch) -> bool:
        """Whether it is that of this one."""
        return self._active is micro_batch

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

    def collect(self, rows: Sequence[measure.Gathered], inputs: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Measures the gradients of one join.

        Args:
            rows: For every tensor one gradient per task, None where none came.
            inputs: Of the shared layer, or z, where the measurement needs it.
            mask: Which samples count, with a dimension of 1 in place of the features.

        Returns:
            The weights of the sum that goes on to the trunk, ``[K]``; None: 1 each.
        """
        micro_batch = self._active
        came: frozenset[int] = frozenset().union(*[tensor.came for tensor in rows])
        if micro_batch is None:
            self._belongs_to_another(came)
            return None
        arrived = came & micro_batch.present
        if micro_batch.decide is not None and micro_batch.collected:
            raise errors.second_join_of_a_step()
        self._note(micro_batch, rows, arrived)
        if micro_batch.decide is not None and not micro_batch.present:
            # There is nothing to add, but the other processes wait for this one.
            some = next(tensor.some() for tensor in rows if tensor.came)
            zeros = measure.wide(some.new_zeros(len(self.tasks), len(self.tasks)))
            micro_batch.shared_weights = micro_batch.decide(zeros, arrived)
        if arrived and (micro_batch.record or micro_batch.decide is not None):
            with without_graph():
                here: Sequence[measure.Rows] = rows  # of which a stack may be there already
                if arrived != came:
                    here = [[g if k in arrived else None for k, g in enumerate(tensor)] for tensor in rows]
                self._measure(micro_batch, arrived, here, inputs, mask)
        return micro_batch.shared_weights

    def _belongs_to_another(self, came: frozenset[int]) -> None:
        """Somebody else's backward, which frees the graph of the heads' outputs."""
        if not torch.is_grad_enabled():
            for k in came:
                self._outputs.pop(k, None)

    def _note(self, micro_batch: MicroBatch, rows: Sequence[measure.Gathered], arrived: frozenset[int]) -> None:
        """Whose gradients came to one join, and of which shapes."""
        if arrived or not micro_batch.present:
            shapes = tuple([tensor.some().shape for tensor in rows if tensor.came])
            micro_batch.collected.append((shapes, arrived))
            if len(self.reads) < len(self.tasks):
                self.reads.update((k, shapes) for k in arrived if k not in self.reads)
        if micro_batch.record:
            micro_batch.window.arrived |= arrived

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
            rows = [[None if g is None else g * mask for g in tensor] for tensor in rows]
        if self.shared_layer is not None:
            assert inputs is not None
            matrices = measure.layer_gradients(rows[0], self.shared_layer.layer, inputs)
            window.add("gradients", matrices / c[:, None, None])
            return
        gram = measure.gram(rows, with_sums=micro_batch.decide is None) / torch.outer(c, c)
        if micro_batch.decide is not None:
            micro_batch.shared_weights = micro_batch.decide(gram, arrived)
        if micro_batch.record:
            window.add("gradients", gram)
            if self.rotations is not None:
                window.add("moments", self.rotations.cross_products(rows[0], c, inputs))

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
            with without_graph():
                micro_batch.squares[k] = micro_batch.squares.get(k, 0.0) + measure.square(g)

    def at_parameter(self, k: int, i: int, g: Tensor) -> None:
        """A gradient of task ``k`` came to its alias of shared parameter ``i``."""
        micro_batch = self._active
        if micro_batch is None or not micro_batch.record or k not in micro_batch.present:
            return
        assert self.parameters is not None
        micro_batch.came.add(k)
        with without_graph():
            micro_batch.window.add_at(k, self.parameters.place(i), g, micro_batch.divisors[k])

    def at_rows(self, g: Tensor, rows: Rows, inputs: Tensor | None) -> Tensor | None:
        """A gradient came to a tensor whose rows belong to tasks.

        Args:
            g: The gradient.
            rows: Whose they are.
            inputs: Of the shared layer, or None.

        Returns:
            What goes on in its place, where the weights act on the shared path, or it is taken inside of a loss.
        """
        micro_batch = self._active
        if micro_batch is None:
            return passed_inside(g, self.key) if torch.is_grad_enabled() else None
        if micro_batch.record:
            owned = micro_batch.present if rows.owned is None else rows.owned & micro_batch.present
            micro_batch.window.arrived |= owned
            self.reads.update((k, (g.shape,)) for k in owned if k not in self.reads)
            with without_graph():
                self._measure_rows(micro_batch, g.detach(), rows, inputs)
        w = micro_batch.shared_weights
        return None if w is None else g * rows.weights(w, g)

    def _measure_rows(self, micro_batch: MicroBatch, g: Tensor, rows: Rows, inputs: Tensor | None) -> None:
        c, window, K = micro_batch.divisors, micro_batch.window, len(self.tasks)
        if self.shared_layer is not None:
            assert inputs is not None
            matrices = measure.layer_gradients_of_rows(g, rows.index, K, self.shared_layer.layer, inputs)
            window.add("gradients", matrices / c.to(matrices)[:, None, None])
            return
        squares = measure.squares_of_rows(g, rows.index, K)
        window.add("gradients", torch.diag(squares / c.to(squares).square()))
        window.split = True  # at z, gradients of different rows have no inner products
