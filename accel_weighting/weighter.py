"""The shell: what a user calls. It owns an open window, a state, a branch and processes, and knows no method."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import checks, errors
from .audit import Audit, probing_is_forbidden
from .branch import Branch, tap_above
from .coefficients import Carrying
from .growth import growth_of
from .heads import Heads, HeadSpec
from .lifetime import Registration, weakly
from .losses import Bounds
from .modules import heads_by_task
from .optimizers import OptimizerWatch
from .parameters import no_branch
from .processes import Processes
from .reading import Readings
from .rotations import Rotations, fold, folded
from .shared_layer import SharedLayer
from .sharing import Sharing
from .state import WeighterState
from .statistics import Method
from .steps import Steps
from .verdict import GRADIENTS, Verdict
from .window import Layout, Window

if TYPE_CHECKING:
    from accelerate import Accelerator


class Weighter(Carrying, Sharing, Readings):
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
        shared_parameters: Parameters, or their names in ``model``, at which gradients are taken instead where no tensor
            is shared: each task's forwards run in ``with weighter.task(name):``. The weights then multiply the losses,
            whatever the method, none below 1e-6 in absolute value. This adds K·|W| numbers to the all-reduce.
        cosines: Whether inner products of gradients are measured where the method needs norms alone. They wait for
            each other then, which takes (K-1)·|z| of memory. None: where z is small, or compiled, or branched by
            ``branch``; ``statistics.gram`` is None elsewhere.
        initial_weights: ``{task: weight}``, positive; tasks that are not named start where the method starts them.
        lag: 1: the weights of a step come from the steps before it. 0: from this very step.
        update_every: Statistics are taken and weights updated at every n-th optimizer step only.
        update_after: As frozen until so many optimizer steps are over.
        max_losses: ``{task: float}``: a loss above it is scaled down to it, gradient included.
        min_losses: ``{task: float}``: lower bound of a loss that can be negative; methods see the loss minus its bound,
            gradients are untouched.
        max_growth: With ``lag=1``, for methods whose weights are ratios of norms or come from the Gram matrix: a weight
            may be at most so many times the running geometric mean of those applied before (over about 20 windows), so
            that a task that was nearly silent in one window does not dominate the next. The other weights stay as they
            are, so a sum that the method keeps (IMTL-G) is not kept in such a step. None: no bound.
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
        shared_parameters: Iterable[nn.Parameter | str] | None = None,
        cosines: bool | None = None,
        initial_weights: Mapping[str, float] | None = None,
        lag: int = 1,
        update_every: int = 1,
        update_after: int = 0,
        max_losses: Mapping[str, float] | None = None,
        min_losses: Mapping[str, float] | None = None,
        max_growth: float | None = 2.0,
        max_skipped_steps: int = 10,
        process_group: Any = None,
    ) -> None:
        self.tasks = checks.task_names(tasks)
        self.method = checks.method(method)
        self._accelerator = None if accelerator is None else weakly(accelerator)
        self.lag = checks.lag(lag, method.needs, method.acts_on, str(method))
        self.update_every = checks.at_least("update_every", update_every, 1)
        self.update_after = checks.at_least("update_after", update_after, 0)
        self.max_skipped_steps = checks.at_least("max_skipped_steps", max_skipped_steps, 0)
        self._bounds = Bounds(
            self.tasks,
            checks.positive_by_task("max_losses", max_losses, self.tasks),
            checks.finite_by_task("min_losses", min_losses, self.tasks),
        )
        start = checks.positive_by_task("initial_weights", initial_weights, self.tasks)
        growth = growth_of(method, self.tasks, checks.more_than("max_growth", max_growth, 1), self.lag)
        self._progress = WeighterState(method, self.tasks, start or None, growth)
        processes = Processes(accelerator, process_group)

        rotates = "moments" in method.needs
        others = {"heads": heads, "shared_layer": shared_layer}
        parameters = self._parameters_of(shared_parameters, model, rotates, others)
        layer = None if shared_layer is None else SharedLayer(shared_layer, model)
        if layer is not None:
            checks.shared_layer_goes_with(str(method), rotates, self.lag)
        found, predecessor = None, None
        if heads is not None:
            checks.heads(heads, self.tasks, model)
            found = Heads(self.tasks, heads, model)
            if method.needs & GRADIENTS:
                found.check_apart()
            predecessor = self._take_over_from(found, rotates)
        matrix = (1, parameters.numbers) if parameters is not None else None if layer is None else layer.layer.matrix
        layout = Layout(len(self.tasks), matrix)
        me = weakref.ref(self)  # what is built here does not keep the weighter alive
        measured = self._measured(parameters is not None)
        self._verdict = Verdict(method, self.tasks, _Facts(me, layout), processes, self._bounds.smallest, measured)
        self._steps = Steps(method, self._progress, layout, processes, self._verdict, self._bounds, self.lag)
        self._optimizers = watch = OptimizerWatch()
        self._rotations = None
        if rotates:
            self._rotations = Rotations(checks.rotating(method), self._steps, layout, lambda: watch.next_repeats)
        self._branch = Branch(
            self.tasks,
            found,
            layer,
            self._rotations,
            parameters,
            passes=lambda: (weighter := me()) is None or weighter._passes,
            tap_above=tap_above(method, self.lag, layer is not None, checks.yes_no_or_none("cosines", cosines)),
            needs_gradients=bool(method.needs & GRADIENTS),
            warn_once=self._verdict.warn_once,
            owner=me,
        )
        self._attach()
        if measured:
            forbidden, warn_once = _Facts(me, layout).why_no_probe, self._verdict.warn_once
            acts, at = not self._on_losses, parameters is not None
            self._audit = Audit(self.tasks, str(method), acts, warn_once, forbidden, measured, at)
        self._window = Window(layout)
        self._several = None
        self._registration = Registration(self, accelerator, predecessor)

    def _attach(self) -> None:
        """Hooks the heads, now and once more when an engine has added its own hooks."""
        self._branch.attach()
        heads, given, accelerator = self._branch.heads, self._accelerator, self.accelerator
        if given is None or accelerator is None or heads is None or heads.are_in(accelerator._models):
            return
        heads.attach_again_at_first_forward(self._branch, lambda: bool(getattr(given(), "_models", ())))

    def _take_over_from(self, heads: Heads, rotates: bool) -> Registration | None:
        """A weighter that is on these heads is replaced if it has the same tasks, and refused if both rotate."""
        registration = None
        for branch in heads.branches():
            older = branch.owner()
            if older is not None and older.tasks == self.tasks:
                checks.warn_replaced(self.tasks)
                registration = older._registration
                older._branch.detach()
            elif rotates and older is not None and older._rotations is not None:
                raise errors.heads_rotate_already(older.tasks)
        return registration

    @property
    def accelerator(self) -> Accelerator | None:
        """The accelerator that trains the model; None for plain PyTorch.

        Raises:
            RuntimeError: It is gone: a weighter does not keep it alive.
        """
        if self._accelerator is None:
            return None
        accelerator = self._accelerator()
        if accelerator is None:
            raise errors.accelerator_is_gone()
        return accelerator

    @property
    def _passes(self) -> bool:
        """Whether nothing is measured or weighed at the branch in this forward."""
        return self.method.acts_on == "losses" and not self._measuring

    def __deepcopy__(self, memo: Any) -> Weighter:
        """Returns self: a copied model whose forward calls ``branch`` keeps its weighter."""
        return self

    # ---- settings ------------------------------------------------------------------------------------------------

    def _settings(self, layout: Layout) -> dict[str, Any]:
        """What all processes must have alike, besides tasks, method, step, weights and state."""
        return {
            **self._resumed_settings(layout),
            "update_after": self.update_after,
            "max_losses": self._bounds.largest,
            "min_losses": self._bounds.smallest,
            "extra": list(layout.extras),
            "max_growth": None if self._progress.growth is None else self._progress.growth.factor,
            "max_skipped_steps": self.max_skipped_steps,
        }

    def _resumed_settings(self, layout: Layout) -> dict[str, Any]:
        """Those that a checkpoint has to agree in; the others are bounds."""
        return {"lag": self.lag, "update_every": self.update_every, **self._shared_settings(layout)}

    def _has_scaler(self) -> bool:
        """Under a loss scale an overflow of gradients is the scaler's business."""
        accelerator = self.accelerator
        return accelerator is not None and (accelerator.scaler is not None or accelerator.mixed_precision == "fp16")

    def _why_no_probe(self) -> str | None:
        """The engine under which a gradient cannot be asked for beside the one backward."""
        accelerator = self.accelerator
        if accelerator is None:
            return None
        return probing_is_forbidden(accelerator._models, "DEEPSPEED" in str(accelerator.distributed_type))

    def _why_missed(self, missed: Sequence[str], window: Window) -> RuntimeError:
        """The error for tasks of which no gradient came to the branch point."""
        if (elsewhere := self._why_missed_elsewhere(missed, window)) is not None:
            return elsewhere
        if self.lag == 0 and window.arrived:
            return errors.did_not_come_with_the_others(missed)
        places = {task: self.tasks.index(task) for task in missed}
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
            mask: Which samples count in the statistics (padding does not), of the shape of ``z`` without its features,
                which are last, or in maps of channels second; None: all.
        """
        if self._branch.heads is not None:
            raise errors.heads_and_branch()
        if self._branch.parameters is not None:
            raise no_branch()
        return self._branch(z, mask)

    def detach(self) -> None:
        """Removes every effect of the construction: the hooks, and the place among what the accelerator saves."""
        self._branch.detach()
        self._registration.remove()

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
        found, models = self._to_fold(heads, model)
        self._branch.detach()
        try:
            fold(found, R, rotations.dim, rotations.shape, models)
        except BaseException:
            self._attach()
            raise
        self._branch.rotations = None
        self._progress.forget_rotations()
        rotations.folded = True
        self.reset()

    @contextmanager
    def folded(self, model: nn.Module | None = None) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """``with``: the heads hold their rotations, so that what is saved of the model runs without this library.

        As ``fold_rotations`` with the heads that the weighter was built with; at the end every weight is what it was,
        to the last bit, and training goes on. Where there are no rotations nothing is changed.

        Args:
            model: What the heads are part of, where that is not prepared by the accelerator.

        Yields:
            The weights that were changed, each with what it is without its rotation.

        Raises:
            RuntimeError: As ``fold_rotations``; nothing was changed in any head.
        """
        rotations = self._rotations
        if rotations is None or rotations.folded or self._steps.settled.rotations is None:
            yield []
            return
        found, models = self._to_fold(None, model)
        self._branch.detach()
        try:
            with folded(found, self.rotations, rotations.dim, rotations.shape, models) as changed:
                rotations.folded = True
                yield changed
        finally:
            rotations.folded = False
            self._attach()

    def _to_fold(
        self, heads: Mapping[str, nn.Module | str] | None, model: nn.Module | None
    ) -> tuple[dict[str, nn.Module], list[nn.Module]]:
        """The heads by task, and the models that they are part of."""
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
        return dict(zip(self.tasks, found, strict=True)), models

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
        self._progress.frozen = False

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs, as plain tensors, numbers and strings; free of the number of processes."""
        state = self._steps.settled
        blocks = self._window.blocks + len(self._window.carried)
        if blocks and self._verdict.rank == 0:
            checks.warn_saved_inside_window(blocks)
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
        self._progress.load_state_dict(state, strict, **self._resumed_settings(self._steps.layout))
        self._steps.forget()
        self.reset()
        if self._rotations is not None:
            self._rotations.forget_width()


class _Facts:
    """What the verdict asks the weighter, without keeping it alive."""

    def __init__(self, weighter: Callable[[], Weighter | None], layout: Layout) -> None:
        self._weighter, self._layout = weighter, layout

    def _alive(self) -> Weighter:
        weighter = self._weighter()
        assert weighter is not None  # it is the one that asks
        return weighter

    def settings(self) -> dict[str, Any]:
        """What all processes must have alike now, besides tasks, method, step, weights and state."""
        return self._alive()._settings(self._layout)

    def has_scaler(self) -> bool:
        """Whether a loss scale is in use."""
        return self._alive()._has_scaler()

    def why_no_probe(self) -> str | None:
        """The engine under which a gradient cannot be asked for beside the one backward."""
        return self._alive()._why_no_probe()

    def why_missed(self, missed: Sequence[str], window: Window) -> RuntimeError:
        """The error for tasks of which no gradient came to the branch point."""
        return self._alive()._why_missed(missed, window)


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
