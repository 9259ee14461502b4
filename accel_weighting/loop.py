"""A training loop's calls: combine the losses, run the one backward, close the window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from . import checks, errors
from .audit import Audit
from .branch import Branch
from .losses import Bounds, Given, Losses, NumItems, Several
from .optimizers import OptimizerWatch, hold_gradients
from .processes import is_zero3, left_waiting
from .rotations import Rotations, were_folded
from .state import WeighterState
from .statistics import Method
from .steps import Steps
from .verdict import Verdict
from .window import MicroBatch, Window

if TYPE_CHECKING:
    from accelerate import Accelerator


class Loop:
    """The part of a weighter that a training loop calls. It owns the open window."""

    tasks: tuple[str, ...]
    method: Method
    lag: int
    update_every: int
    update_after: int
    _progress: WeighterState
    _verdict: Verdict
    _steps: Steps
    _branch: Branch
    _rotations: Rotations | None
    _bounds: Bounds
    _optimizers: OptimizerWatch
    _window: Window
    _several: Several | None
    _audit: Audit | None

    @property
    def accelerator(self) -> Accelerator | None:
        """The accelerator that trains the model; None for plain PyTorch."""
        raise NotImplementedError

    def backward(
        self,
        losses: Losses,
        *,
        num_items: NumItems = None,
        extra: Mapping[str, Tensor] | None = None,
        last: bool | None = None,
        freeze: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Weighs the losses, runs the one backward, and closes the window after its last micro-batch.

        Args:
            losses: The losses of this micro-batch: a dictionary (a task left out is absent), a list, tuple, namedtuple
                or 1-D tensor in task order; each a floating-point scalar with a graph.
            num_items: How many items each loss is the mean of, an integer or ``{task: integer}``: weighs this block in
                the statistics. For all blocks of a window or for none. A count of 0 alone says that the task is not
                in this block; its head then gets a gradient of zeros.
            extra: ``{name: loss}``, at most 8 names in all: added to the total as they are (an auxiliary, a commitment,
                a balance loss), logged as ``loss/name``, and watched for not being finite.
            last: Whether this is the last micro-batch before the optimizer steps. None: what
                ``accelerator.sync_gradients`` says; True without an accelerator.
            freeze: A plain weighted backward; this micro-batch is not recorded.
            **kwargs: For ``accelerator.backward``.

        Returns:
            The weighted total, detached.

        Raises:
            ValueError, TypeError: An argument breaks its rule; nothing has happened yet.
            RuntimeError: Gradients are disabled, the last window was due and was not closed, its gradients still wait
                for an optimizer, this forward's graph was used before, or what ``step`` raises.
        """
        if not torch.is_grad_enabled():
            raise errors.gradients_disabled()
        total = self.combine(losses, num_items=num_items, extra=extra, last=last, freeze=freeze)
        accelerator = self.accelerator
        try:
            if accelerator is None:
                total.backward(**kwargs)  # type: ignore[no-untyped-call]
            else:
                accelerator.backward(total, **kwargs)
        except BaseException as error:
            self.reset()
            if "second time" in str(error):
                raise errors.graph_already_freed() from error
            if left_waiting(error):
                raise errors.left_waiting(self._progress.step) from error
            raise
        self.step()
        return total.detach()

    def combine(
        self,
        losses: Losses,
        *,
        num_items: NumItems = None,
        extra: Mapping[str, Tensor] | None = None,
        last: bool | None = None,
        freeze: bool = False,
    ) -> Tensor:
        """The weighted total with its graph, for loops that call ``accelerator.backward`` and ``step`` themselves.

        With gradients disabled (evaluation) it returns the weighted total and records nothing. Arguments as in
        ``backward``. Where gradients are accumulated by hand, divide what it returns, not the losses.

        Raises:
            ValueError, TypeError: An argument breaks its rule; nothing has happened yet.
            RuntimeError: The last window was due and was not closed, or its gradients still wait for an optimizer.
        """
        given = Given.parse(losses, num_items, self.tasks)
        extra = checks.extra_losses(extra, self.tasks, self._steps.layout.extras)
        if not torch.is_grad_enabled():
            v = given.vector(self.tasks, self._branch.head_outputs)
            return self._total(v, extra, paused=self._optimizers.next_repeats)
        paused = self._optimizers.begins()
        self._check_order(paused, given)
        v = given.vector(self.tasks, self._branch.head_outputs, self._zeros_pass_losses(given))
        self._take_in_forward()
        record = self._measuring and not freeze and not paused
        micro_batch = MicroBatch(given.present, self._window, record=record)
        if self._audit is not None and record:
            self._audit.look(given.named, given.present, self._branch)
        self._branch.forget()
        total = self._total(v, extra, given, record, paused)
        seen = v.detach()
        self._say_what_its_backward_needs(micro_batch, given, seen)
        if not paused:
            self._enter(lambda: [loss.grad_fn for loss in given.named.values()], total, last, freeze)
        if record:
            self._record(given, seen, extra)
        if record or not self._on_losses:
            self._branch.watch(v, micro_batch)
        return total

    def _take_in_forward(self) -> None:
        """What the branch saw in the forwards of this micro-batch goes to the window."""
        window, branch = self._window, self._branch
        window.called |= branch.called
        window.fed |= branch.fed
        if branch.parameters is not None:
            branch.parameters.add_used(window.used)
        window.by_rows |= bool(branch.by_rows)

    def _check_order(self, paused: bool, given: Given | None = None) -> None:
        """What a micro-batch of a training must find; with losses that are ``given``."""
        if self._rotations is not None and self._rotations.folded:
            raise were_folded()
        if (accelerator := self.accelerator) is not None:
            checks.uneven_inputs(accelerator)
        if given is not None:
            checks.losses_have_graphs(given.named, self.tasks, given.present)
        if moved := self._branch.follow():
            raise errors.head_moved_in_a_forward(moved)
        if self._window.due and not paused:
            raise errors.window_not_closed()

    def _zeros_pass_losses(self, given: Given) -> bool:
        """Whether some task is absent under ZeRO-3, whose processes must all use the same outputs of the model."""
        if len(given.present) == len(self.tasks) or not is_zero3(self.accelerator):
            return False
        left_out = [k for k, task in enumerate(self.tasks) if task not in given.named]
        if named := [self.tasks[k] for k in left_out if self._branch.head_outputs(k)]:
            self._verdict.warn_once("left out", _left_out_under_zero3(named), also=True)
        return True

    def _look_for_an_optimizer(self, graph: Callable[[], Sequence[Any]], total: Tensor) -> None:
        """A window opens: an optimizer must have used the gradients of the last one before this backward begins.

        They are looked at in the backward, since ``zero_grad`` may come between ``combine`` and it.

        Args:
            graph: Gives nodes that ``total`` was computed from. A hook that kept its own would never be freed.
            total: That of the window's first micro-batch.
        """
        accelerator = self.accelerator
        kind = None if accelerator is None else accelerator.distributed_type.value
        if kind == "DEEPSPEED":  # which steps inside of its backward
            return
        prepared = list(getattr(accelerator, "_optimizers", ()))
        if prepared and accelerator is not None and accelerator.num_processes > 1 and not accelerator._models:
            self._verdict.warn_once("unprepared", _model_not_prepared())
        if self._optimizers.opens(bool(prepared)) and total.requires_grad:
            sharded = prepared if kind == "FSDP" else []

            def look(_: Tensor) -> None:
                if hold_gradients(graph(), sharded):
                    raise errors.gradients_still_wait()

            total.register_hook(look)  # type: ignore[no-untyped-call]
        if self._optimizers.never_steps and not self._overflowed:
            self._verdict.warn_once("unstepped", errors.windows_without_steps())
        if self._optimizers.doubles:
            self._verdict.warn_once("doubled", errors.two_windows_per_step())

    @property
    def _overflowed(self) -> bool:
        """Whether a loss scale explains that no optimizer stepped: there is one, or the last window was held."""
        state = self._steps.settled
        held = state.statistics is None or state.statistics.step < state.step - 1
        return held or getattr(self.accelerator, "scaler", None) is not None

    def _total(
        self,
        v: Tensor,
        extra: Mapping[str, Tensor],
        given: Given | None = None,
        record: bool = False,
        paused: bool = False,
    ) -> Tensor:
        """The weighted sum of the losses ``v``, ``[K]``; for ``lag=0`` by the weights of what is recorded."""
        state = self._steps.settled
        weights: NDArray[Any] | None
        if not self._on_losses:
            weights = state.loss_weights
        elif paused:
            weights = state.applied
        elif self.lag == 0 and record and given is not None:
            weights = self._steps.decide(v.detach(), given.present, given.counts)
        else:
            weights = self._multipliers(state)
        w = None if weights is None else self._bounds.on_device("losses", weights, v)
        w = self._bounds.capped(w, v)
        w = w if given is None else given.shared(w, v)
        if torch.is_grad_enabled() and not paused and weights is not None and self._on_losses:
            state.applied = weights
        total = v.sum() if w is None else v.dot(w)  # which autocast leaves alone
        for loss in extra.values():
            total = total + loss.to(total.device)
        return total

    def _multipliers(self, state: WeighterState) -> NDArray[Any]:
        """What multiplies the losses, where the weights act on them."""
        parameters = self._branch.parameters
        return state.weights if parameters is None else parameters.multipliers(state.weights, state.loss_weights)

    def _say_what_its_backward_needs(self, micro_batch: MicroBatch, given: Given, seen: Tensor) -> None:
        """Factors and weights of a micro-batch, where its backward passes the branch."""
        micro_batch.scale = given.scale(seen)
        if self._on_losses:
            return
        state, repeats = self._progress, not micro_batch.record and self._optimizers.repeats
        micro_batch.shared_weights = self._bounds.on_device("shared", state.applied if repeats else state.weights, seen)
        if not repeats:
            state.applied, state.applied_rotations = state.weights, state.rotations
        if self.lag == 0 and micro_batch.record:
            present, counts = given.present, given.counts  # and no loss, which would keep the step's graph

            def decide(gram: Tensor, arrived: frozenset[int]) -> Tensor:
                state.applied = self._steps.decide(seen, present, counts, gram, arrived)
                return self._bounds.on_device("decided", state.applied, seen)

            micro_batch.decide = decide

    def _enter(
        self, graph: Callable[[], Sequence[Any]], total: Tensor, last: bool | None, freeze: bool = False
    ) -> None:
        """Enters a micro-batch into the window; ``total`` was computed from the nodes that ``graph`` gives."""
        window = self._window
        if not window.opened:
            self._look_for_an_optimizer(graph, total)
        window.opened += 1
        window.due = self._several is None and (self._sync if last is None else last)
        window.moves_weights |= self._unfrozen and not freeze

    def _record(self, given: Given, seen: Tensor, extra: Mapping[str, Tensor]) -> None:
        """Its losses, ``[K]``, go to the statistics."""
        window, several = self._window, self._several
        self._verdict.warn_of_half_precision(given.named.values())
        extras = {name: loss.detach() for name, loss in extra.items()}
        if several is None:
            window.record(seen, given.present, given.counts, given.shares is not None)
            window.record_extras(extras)
        else:
            several.add(seen, given)
            several.add_extras(extras)

    def _record_carried(self) -> None:
        """So do those that came with the backwards of totals: see ``coefficients``."""
        window, several = self._window, self._several
        for carried in window.carried:
            (losses, wrong), given = carried.losses(), carried.given
            if several is None:
                window.record(losses, given.present, given.counts, wrong=wrong)
            else:
                several.add(losses, given, wrong)
        window.carried.clear()

    def step(self) -> None:
        """Closes the window: one all-reduce, the verdict, the update. A no-op while gradients accumulate.

        Raises:
            RuntimeError: The window is empty, a loss never reached the branch, the processes disagree, or too many
                steps in a row were not finite. What depends on other processes is raised on all of them. On a GPU what
                the sums say is raised at the next use of the state, mostly in the next forward or ``combine``.
        """
        if self._several is not None or self._optimizers.repeats:
            return
        if self._window.coefficients is not None:
            self.reset()
            raise _total_not_attached()
        if not self._window.opened and self._sync:
            raise errors.empty_window()
        if not self._window.due:
            return
        try:
            self._record_carried()
            self._steps.close(self._window)
        finally:
            self.reset()

    def reset(self) -> None:
        """Drops the open window, for instance after an exception that the user caught on every process."""
        self._window = Window(self._steps.layout)
        self._branch.forget()
        self._several = None

    @contextmanager
    def micro_batch(self, *, last: bool | None = None) -> Iterator[None]:
        """``with``: several ``backward`` calls, with some of the tasks each, are one micro-batch: one block, one step.

        A task's losses in several calls add up. Where every task had a forward of its own, inner products at the shared
        representation do not exist, and a method that needs them raises.

        Args:
            last: As in ``backward``, for all of it.

        Raises:
            RuntimeError: It is nested, or ``lag=0``, which decides in every backward.
        """
        if self._several is not None:
            raise _nested_micro_batch()
        if self.lag == 0:
            raise _micro_batch_at_lag_0()
        self._several = several = Several()
        try:
            yield
            self._record_carried()
        except BaseException:
            self.reset()
            raise
        self._several = None
        if several.losses is not None:
            counts = several.counts(len(self.tasks))
            self._window.record(several.losses, frozenset(several.present), counts, wrong=several.wrong)
            self._window.record_extras(several.extras)
            self._window.split |= several.apart and self._steps.layout.matrices is None
        if self._window.opened:
            self._window.due = self._sync if last is None else last
            self.step()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """``with``: weighted backwards that leave no trace, as in closures of L-BFGS, SAM's second pass, a line search.

        Nothing is recorded, no step is counted, and the open window is kept. They are weighed as the last recorded pass
        was, though its window may have closed since: so measure first, then pause.
        """
        before, self._optimizers.paused = self._optimizers.paused, True
        try:
            yield
        finally:
            self._optimizers.paused = before

    @property
    def _sync(self) -> bool:
        accelerator = self.accelerator
        return accelerator is None or bool(accelerator.sync_gradients)

    @property
    def _on_losses(self) -> bool:
        """Whether weights multiply the losses, and not the gradients on their shared path."""
        return self.method.acts_on == "losses" or self._branch.parameters is not None

    @property
    def _unfrozen(self) -> bool:
        return not self._progress.frozen and self._progress.step >= self.update_after

    @property
    def _measuring(self) -> bool:
        return self._unfrozen and (self._progress.step - self.update_after) % self.update_every == 0


def _left_out_under_zero3(tasks: Sequence[str]) -> str:
    """Outputs of the model that one process alone does not use."""
    names = ", ".join(f"`{task}`" for task in tasks)
    counts = ", ".join(f'"{task}": 0' for task in tasks)
    return (
        f"No loss of {names} came in this micro-batch, and the model is under DeepSpeed's ZeRO-3, where all processes "
        "must use the same outputs of the model in every backward: else they wait for each other without end, or stop "
        "with `disagreement on list length`. If another process has such a loss, give one here too, with "
        f"`num_items={{{counts}}}`. It may be NaN, as the mean over no items is."
    )


def _model_not_prepared() -> str:
    """Several processes, a prepared optimizer, and no prepared model."""
    return (
        "An optimizer went through `accelerator.prepare`, and no model did: the processes do not average gradients, so "
        "that models drift apart. Prepare both, `model, optimizer, loader = accelerator.prepare(model, optimizer, "
        "loader)`, unless you average gradients in some other way."
    )


def _nested_micro_batch() -> RuntimeError:
    """``micro_batch()`` within itself."""
    return RuntimeError("`with weighter.micro_batch():` is open already: one of them is one micro-batch.")


def _total_not_attached() -> RuntimeError:
    """Coefficients, and no total of them."""
    return RuntimeError(
        "`weighter.step()` was called, and the total that was made of `weighter.coefficients()` never came: call "
        "`total = weighter.attach(total)` before `accelerator.backward(total)`. What is only looked at is "
        "`weighter.weights`."
    )


def _micro_batch_at_lag_0() -> RuntimeError:
    """Weights of the very backward, and several backwards."""
    return RuntimeError(
        "With `lag = 0` the weights are decided in every backward, so several of them cannot be one micro-batch. Use "
        "`lag = 1`."
    )
