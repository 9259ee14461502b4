"""The shell: what a user calls. It owns an open window, a state, a branch and processes, and knows no method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checks, errors
from .branch import Branch, tap_above
from .heads import Heads, HeadSpec
from .losses import Given, Losses, NumItems, OnDevice
from .modules import heads_by_task
from .processes import Processes, left_waiting
from .reading import Readings
from .rotations import Rotations, fold, were_folded
from .shared_layer import SharedLayer
from .state import WeighterState
from .statistics import Method
from .steps import Steps
from .verdict import GRADIENTS, Verdict
from .window import Layout, MicroBatch, Window

if TYPE_CHECKING:
    from accelerate import Accelerator


class Weighter(Readings):
    """Weighs the losses of several tasks so that the weights depend on the global batch alone.

    Replaces ``accelerator.backward(sum of losses)`` by ``weighter.backward(losses)``: one backward, and one small
    all-reduce per optimizer step.

    Args:
        method: A weighting method, such as ``GradNorm(alpha=1.5)``.
        tasks: Task names; their order is the weighter's order everywhere.
        accelerator: The accelerator that trains the model; None for plain PyTorch in one process (or, with
            ``process_group``, in several).
        heads: ``{task: module}``, or dotted names looked up in ``model``. The tensors that each head is called with and
            that were computed are the shared representation; where it is called with others too, its argument is
            named: ``{task: ("decoder", "memory")}``. None where the model's forward calls ``branch`` itself, or where
            the method needs losses only.
        model: Where dotted names are looked up, wrapped or not.
        shared_layer: A Linear, a convolution or transformers' ``Conv1D`` (or its name) whose output is the branch
            point. Gradients are then taken at its weight, as GradNorm's paper does; this adds K·|W| numbers to the
            all-reduce.
        cosines: Whether inner products of gradients are measured where the method needs norms alone. They wait for
            each other then, which takes (K-1)·|z| of memory. None: where z is small, or compiled, or branched by
            ``branch``; ``statistics.gram`` is None elsewhere.
        initial_weights: ``{task: weight}``, positive; tasks that are not named start where the method starts them.
        lag: 1: the weights of a step come from the steps before it. 0: from this very step.
        update_every: Statistics are taken and weights updated at every n-th optimizer step only.
        update_after: As frozen until so many optimizer steps are over.
        max_losses: ``{task: float}``: a loss above it is scaled down to it, gradient included.
        max_skipped_steps: How many steps in a row may be held for losses or gradients that are not finite.
        process_group: Over which statistics are summed. None: data-parallel × context-parallel.

    Raises:
        ValueError, TypeError: An argument breaks its rule; the message names it, the rule and what was found.
        NotImplementedError: The engine does not run one plain backward.

    Example:
        >>> import torch
        >>> from accel_weighting import CoVWeighting, Weighter
        >>> weighter = Weighter(CoVWeighting(), ["a", "b"])
        >>> x = torch.ones(2, requires_grad=True)
        >>> weighter.backward({"a": x.sum(), "b": (x**2).sum()})
        tensor(2.)
        >>> weighter.weights
        {'a': 0.5, 'b': 0.5}
    """

    def __init__(
        self,
        method: Method,
        tasks: Sequence[str],
        *,
        accelerator: Accelerator | None = None,
        heads: Mapping[str, HeadSpec] | None = None,
        model: nn.Module | None = None,
        shared_layer: nn.Module | str | None = None,
        cosines: bool | None = None,
        initial_weights: Mapping[str, float] | None = None,
        lag: int = 1,
        update_every: int = 1,
        update_after: int = 0,
        max_losses: Mapping[str, float] | None = None,
        max_skipped_steps: int = 10,
        process_group: Any = None,
    ) -> None:
        self.tasks = checks.task_names(tasks)
        self.method = checks.method(method)
        self.accelerator = accelerator
        self.lag = checks.lag(lag, method.needs, method.acts_on, repr(method))
        self.update_every = checks.at_least("update_every", update_every, 1)
        self.update_after = checks.at_least("update_after", update_after, 0)
        self.max_skipped_steps = checks.at_least("max_skipped_steps", max_skipped_steps, 0)
        caps = checks.positive_by_task("max_losses", max_losses, self.tasks)
        start = checks.positive_by_task("initial_weights", initial_weights, self.tasks)
        self._caps = np.array([caps.get(task, np.inf) for task in self.tasks]) if caps else None
        self._state = WeighterState(method, self.tasks, start or None)
        if accelerator is not None:
            checks.uneven_inputs(accelerator)
        processes = Processes(accelerator, process_group)

        rotates = "moments" in method.needs
        layer = None if shared_layer is None else SharedLayer(shared_layer, model)
        if layer is not None:
            checks.shared_layer_goes_with(repr(method), rotates, self.lag)
        found = None
        if heads is not None:
            checks.heads(heads, self.tasks, model)
            found = Heads(self.tasks, heads, model)
        layout = Layout(len(self.tasks), None if layer is None else layer.layer.matrix)
        self._verdict = Verdict(
            method, self.tasks, self._settings(caps, layout), processes, self._has_scaler, self._why_missed
        )
        self._steps = Steps(method, self._state, layout, processes, self._verdict, self.lag, self.max_skipped_steps)
        self._rotations = Rotations(checks.rotating(method), self._steps, layout) if rotates else None
        self._branch = Branch(
            self.tasks,
            found,
            layer,
            self._rotations,
            passes=lambda: method.acts_on == "losses" and not self._measuring,
            tap_above=tap_above(method, self.lag, layer is not None, checks.yes_no_or_none("cosines", cosines)),
            needs_gradients=bool(method.needs & GRADIENTS),
            warn_once=self._verdict.warn_once,
        )
        self._branch.attach()
        if found is not None and accelerator is not None and not found.are_in(accelerator._models):
            found.attach_again_at_first_forward(self._branch, lambda: bool(accelerator._models))
        self._window = Window(layout)
        self._on_device = OnDevice()
        if accelerator is not None:
            accelerator.register_for_checkpointing(self)

    # ---- a step ------------------------------------------------------------------------------------------------

    def backward(self, losses: Losses, *, num_items: NumItems = None, freeze: bool = False, **kwargs: Any) -> Tensor:
        """Weighs the losses, runs the one backward, and closes the window when gradients are synchronised.

        Args:
            losses: The losses of this micro-batch: a dictionary (a task left out is absent), a list, tuple, namedtuple
                or 1-D tensor in task order; each a floating-point scalar with a graph.
            num_items: How many items each loss is the mean of, an integer or ``{task: integer}``: weighs this block in
                the statistics. For all blocks of a window or for none. A count of 0 alone says that the task is not
                in this block; its head then gets a gradient of zeros.
            freeze: A plain weighted backward; this micro-batch is not recorded.
            **kwargs: For ``accelerator.backward``.

        Returns:
            The weighted total, detached.

        Raises:
            ValueError, TypeError: ``losses`` or ``num_items`` break their rule; nothing has happened yet.
            RuntimeError: Gradients are disabled, the last window was due and was not closed, this forward's graph was
                used before, or what ``step`` raises.
        """
        if not torch.is_grad_enabled():
            raise errors.gradients_disabled()
        total = self.combine(losses, num_items=num_items, freeze=freeze)
        try:
            if self.accelerator is None:
                total.backward(**kwargs)  # type: ignore[no-untyped-call]
            else:
                self.accelerator.backward(total, **kwargs)
        except BaseException as error:
            self.reset()
            if "second time" in str(error):
                raise errors.graph_already_freed() from error
            if left_waiting(error):
                raise errors.left_waiting(self._state.step) from error
            raise
        self.step()
        return total.detach()

    def combine(self, losses: Losses, *, num_items: NumItems = None, freeze: bool = False) -> Tensor:
        """The weighted total with its graph, for loops that call ``accelerator.backward`` and ``step`` themselves.

        With gradients disabled (evaluation) it returns the weighted total and records nothing. Arguments as in
        ``backward``. A loss of the trunk's own is added to what it returns.

        Raises:
            ValueError, TypeError: ``losses`` or ``num_items`` break their rule; nothing has happened yet.
            RuntimeError: The last window was due and was not closed.
        """
        given = Given.parse(losses, num_items, self.tasks)
        if not torch.is_grad_enabled():
            return self._total(given.vector(self.tasks, self._branch.head_outputs))
        self._check_order(given)
        if moved := self._branch.follow():
            raise errors.head_moved_in_a_forward(moved)
        v = given.vector(self.tasks, self._branch.head_outputs)
        self._window.called |= self._branch.called
        self._window.fed |= self._branch.fed
        self._branch.forget()
        micro_batch = MicroBatch(given.present, self._window, record=self._measuring and not freeze)
        total = self._total(v, given if micro_batch.record else None)
        self._enter(micro_batch, given, v.detach(), freeze)
        if micro_batch.record or self.method.acts_on == "shared":
            self._branch.watch(v, micro_batch)
        return total

    def _check_order(self, given: Given) -> None:
        """What a micro-batch of a training must find."""
        if self._rotations is not None and self._rotations.folded:
            raise were_folded()
        if self.accelerator is not None:
            checks.uneven_inputs(self.accelerator)
        checks.losses_have_graphs(given.named, [self.tasks[k] for k in sorted(given.present)])
        if self._window.due:
            raise errors.window_not_closed()

    def _total(self, v: Tensor, recorded: Given | None = None) -> Tensor:
        """The weighted sum of the losses ``v``, ``[K]``; for ``lag=0`` by the weights of what is ``recorded``."""
        state = self._steps.settled
        if self.method.acts_on == "shared":
            name, weights = "loss_weights", state.get("loss_weights")
        elif self.lag == 0 and recorded is not None:
            name, weights = "decided", self._steps.decide(v.detach(), recorded.present, recorded.counts)
        else:
            name, weights = "weights", state.weights
        w = None if weights is None else self._on_device(name, weights, v)
        if self._caps is not None:
            caps, seen = self._on_device("caps", self._caps, v), v.detach()
            scale = torch.where(seen > caps, caps / seen, 1.0)
            w = scale if w is None else w * scale
        return v.sum() if w is None else v.dot(w)  # which autocast leaves alone

    def _enter(self, micro_batch: MicroBatch, given: Given, seen: Tensor, freeze: bool) -> None:
        """Enters a micro-batch into the window, and says what its backward needs to know."""
        window, on_shared = self._window, self.method.acts_on == "shared"
        window.opened += 1
        window.due = self._sync
        window.moves_weights |= self._unfrozen and not freeze
        micro_batch.scale = given.scale(seen)
        if on_shared:
            micro_batch.shared_weights = self._on_device("weights", self._state.weights, seen)
        if not micro_batch.record:
            return
        self._verdict.warn_of_half_precision(given.named)
        window.record(seen, given.present, given.counts)
        if self.lag == 0 and on_shared:
            present, counts = given.present, given.counts  # and no loss, which would keep the step's graph

            def decide(gram: Tensor, arrived: frozenset[int]) -> Tensor:
                return self._on_device("decided", self._steps.decide(seen, present, counts, gram, arrived), seen)

            micro_batch.decide = decide

    def step(self) -> None:
        """Closes the window: one all-reduce, the verdict, the update. A no-op while gradients accumulate.

        Raises:
            RuntimeError: The window is empty, a loss never reached the branch, the processes disagree, or too many
                steps in a row were not finite. What depends on other processes is raised on all of them.
        """
        if not self._sync:
            return
        if not self._window.opened:
            raise errors.empty_window()
        try:
            self._steps.close(self._window)
        finally:
            self.reset()

    def reset(self) -> None:
        """Drops the open window, for instance after an exception that the user caught on every process."""
        self._window = Window(self._steps.layout)
        self._branch.forget()

    @property
    def _sync(self) -> bool:
        return self.accelerator is None or bool(self.accelerator.sync_gradients)

    @property
    def _unfrozen(self) -> bool:
        return not self._state.frozen and self._state.step >= self.update_after

    @property
    def _measuring(self) -> bool:
        return self._unfrozen and (self._state.step - self.update_after) % self.update_every == 0

    # ---- settings ------------------------------------------------------------------------------------------------

    def _settings(self, caps: Mapping[str, float], layout: Layout) -> dict[str, Any]:
        """What all processes must have alike, besides step, weights and state."""
        return {
            "tasks": list(self.tasks),
            "method": repr(self.method),
            **self._resumed_settings(layout),
            "update_after": self.update_after,
            "max_losses": caps,
            "max_skipped_steps": self.max_skipped_steps,
        }

    def _resumed_settings(self, layout: Layout) -> dict[str, Any]:
        """Those that a checkpoint has to agree in; the others are bounds."""
        return {"lag": self.lag, "update_every": self.update_every, "shared_layer": layout.matrices}

    def _has_scaler(self) -> bool:
        """Under a loss scale an overflow of gradients is the scaler's business."""
        accelerator = self.accelerator
        return accelerator is not None and (accelerator.scaler is not None or accelerator.mixed_precision == "fp16")

    def _why_missed(self, missed: Sequence[str], window: Window) -> RuntimeError:
        """The error for tasks of which no gradient came to the branch point."""
        places = {task: self.tasks.index(task) for task in missed}
        if not window.fed and not (window.called or self._branch.heads is None):
            window.called.clear()
        uncalled = [task for task, k in places.items() if self._branch.heads is not None and k not in window.called]
        unfed = [task for task, k in places.items() if k not in window.fed and task not in uncalled]
        return errors.losses_that_missed_the_branch(
            missed, uncalled, unfed, bool(window.fed), self._branch.heads is not None
        )

    # ---- the branch and its rotations ----------------------------------------------------------------------------

    def branch(self, z: Any, mask: Tensor | None = None) -> dict[str, Any]:
        """Divides the shared representation: ``{task: alias of z}``, one for every head's input.

        Written in a model's ``forward``. Gradients of different tasks arrive apart at their aliases.

        Args:
            z: The shared representation: a tensor, or a list, tuple, dictionary or dataclass of tensors, of which every
                task gets its own.
            mask: Which samples count in the statistics (padding does not), of the shape of ``z`` without its
                feature dimension; None: all.
        """
        if self._branch.heads is not None:
            raise errors.heads_and_branch()
        return self._branch(z, mask)

    def detach(self) -> None:
        """Removes every hook; nothing is left on the model."""
        self._branch.detach()

    def fold_rotations(
        self, heads: Mapping[str, nn.Module | str] | None = None, model: nn.Module | None = None
    ) -> None:
        """Multiplies every rotation into its head: the trained model then runs, saves and ships without this library.

        ``W[:, :m] ← W[:, :m] R_k`` in the nn.Linear that reads the head's input; outputs stay the same. The weighter is
        done with that: hooks are removed, there are no rotations any more, ``branch`` passes z on as it is, and a
        further backward is an error. To train on, build a new weighter. Called on every process.

        Args:
            heads: ``{task: module or dotted name}``: what reads the rotated representation, or its first Linear. None:
                the heads that the weighter was built with.
            model: Where dotted names are looked up.

        Raises:
            RuntimeError: A head does not begin with an nn.Linear that alone reads its input, or its weight is held in
                pieces that cannot be multiplied; nothing was changed in any head. Or there are no rotations.
        """
        R, rotations = self.rotations, self._rotations
        assert rotations is not None
        models = [] if self.accelerator is None else list(self.accelerator._models)
        if model is not None:
            models.append(model)
        if heads is not None:
            checks.heads(heads, self.tasks, model)
            found = heads_by_task(self.tasks, heads, model)
        elif self._branch.heads is not None:
            found = self._branch.heads.find()
        else:
            raise errors.fold_needs_heads()
        self._branch.detach()
        try:
            fold(dict(zip(self.tasks, found, strict=True)), R, rotations.dim, rotations.shape, models)
        except BaseException:
            self._branch.attach()
            raise
        self._branch.rotations = None
        self._state.forget_rotations()
        rotations.folded = True
        self.reset()

    # ---- freezing ----------------------------------------------------------------------------------------------

    def freeze(self) -> _Frozen:
        """Holds the weights: a plain weighted backward, no collective. Drops the open window.

        Usable as ``with weighter.freeze():``, which unfreezes at its end.
        """
        state = self._steps.settled
        self.reset()
        before, state.frozen = state.frozen, True
        return _Frozen(self, before)

    def unfreeze(self) -> None:
        """Weights move again."""
        self.reset()
        self._state.frozen = False

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs, as plain tensors, numbers and strings; free of the number of processes."""
        state = self._steps.settled
        if self._window.blocks and self._verdict.rank == 0:
            checks.warn_saved_inside_window(self._window.blocks)
        return state.state_dict(**self._resumed_settings(self._steps.layout))

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Takes up a saved state.

        Args:
            state: What ``state_dict`` gave.
            strict: False keeps what fits of a checkpoint with other tasks or another method (a task added, say): the
                weights of the common tasks, their history, the rotations of their heads, and the method's state if all
                of it fits. Where the method keeps a sum, weights are scaled to that of its own tasks.

        Raises:
            ValueError: The state is not a weighter's, or (``strict``) another weighter's: all differences in the tasks,
                the method, ``lag``, ``update_every`` and ``shared_layer`` are listed.
        """
        self._state.load_state_dict(state, strict, **self._resumed_settings(self._steps.layout))
        self._steps.forget()
        self.reset()
        if self._rotations is not None:
            self._rotations.forget_width()


class _Frozen:
    """``with weighter.freeze():``."""

    def __init__(self, weighter: Weighter, before: bool) -> None:
        self._weighter = weighter
        self._before = before

    def __enter__(self) -> Weighter:
        return self._weighter

    def __exit__(self, *_: object) -> None:
        if not self._before:
            self._weighter.unfreeze()
