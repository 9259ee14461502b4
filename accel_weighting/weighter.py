"""The weighter: wraps ``accelerator.backward``, and is the only class with state. It knows no method."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checks
from .branch import Block, Branch, Rotation, nothing
from .fold import fold
from .modules import find_layer, heads_by_task
from .processes import Processes, Reduction, left_waiting, signature_pieces
from .progress import Progress
from .statistics import Method, Statistics
from .window import Window, to_device

if TYPE_CHECKING:
    from accelerate import Accelerator


class Weighter:
    """Weighs the losses of several tasks so that the weights depend on the global batch alone.

    Replaces ``accelerator.backward(sum of losses)`` by ``weighter.backward(losses)``: one backward, and one small
    all-reduce per optimizer step.

    Args:
        method: A weighting method, such as ``GradNorm(alpha=1.5)``.
        tasks: Task names; their order is the weighter's order everywhere.
        accelerator: The accelerator that trains the model; None for plain PyTorch in one process (or, with
            ``process_group``, in several).
        heads: ``{task: module}``, or dotted names looked up in ``model``. The tensor each head is called with is the
            shared representation. None where the model's forward calls ``branch`` itself, or where the method needs
            losses only.
        model: Where dotted names are looked up, wrapped or not.
        shared_layer: An ``nn.Linear`` (or its name) whose output is the branch point. Gradients are then taken at its
            weight, as GradNorm's paper does; this adds K·|W| numbers to the all-reduce.
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
        heads: Mapping[str, nn.Module | str] | None = None,
        model: nn.Module | None = None,
        shared_layer: nn.Linear | str | None = None,
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
        self._caps = checks.positive_by_task("max_losses", max_losses, self.tasks)
        start = checks.positive_by_task("initial_weights", initial_weights, self.tasks)
        self._progress = Progress(method, self.tasks, start or None)
        if accelerator is not None:
            checks.uneven_inputs(accelerator)
        self._processes = Processes(accelerator, process_group)

        layer = None
        if shared_layer is not None:
            layer = find_layer(shared_layer, model)
        if heads is not None:
            checks.heads(heads, self.tasks, model)
            checks.heads_are_distinct(heads_by_task(self.tasks, heads, model), self.tasks)
        self._has_heads = heads is not None
        self._rotates = "moments" in method.needs
        rotating: Any = method
        if layer is not None and (self._rotates or self.lag == 0):
            raise checks.shared_layer_cannot_rotate(repr(method)) if self._rotates else checks.shared_layer_at_lag_0()
        self._window = Window(len(self.tasks), None if layer is None else (layer.out_features, layer.in_features))
        self._branch = Branch(
            self.tasks,
            self._window.add,
            None if heads is None else lambda: heads_by_task(self.tasks, heads, model),
            None if shared_layer is None else lambda: find_layer(shared_layer, model),
            Rotation(self._rotations, rotating.dim, rotating.cooperative_after is not None, rotating.size)
            if self._rotates
            else None,
        )
        self._branch.attach()
        if (
            accelerator is not None
            and self._has_heads
            and not self._is_prepared(heads_by_task(self.tasks, heads or {}, model))
        ):
            self._branch.attach_again_at_first_forward()

        self._width: int | None = None  # of z, where the method rotates
        self._shape: tuple[int, ...] | None = None  # likewise
        self._folded = False
        self._open: list[Block] = []  # micro-batches since the last step, recorded or not
        self._due = False
        self._counts = False  # whether some micro-batch of the window was not frozen
        self._expected: set[int] = set()  # tasks whose gradient must come to the branch in this window
        self._arrived: set[int] = set()
        self._reached: set[int] = set()  # tasks whose gradient has come to the branch in an earlier window
        self._pending: tuple[Reduction, int] | None = None
        self._statistics: Statistics | None = None
        self._told: set[str] = set()
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        if accelerator is not None:
            accelerator.register_for_checkpointing(self)

    def _is_prepared(self, heads: Sequence[nn.Module]) -> bool:
        assert self.accelerator is not None
        prepared = {id(module) for model in self.accelerator._models for module in model.modules()}
        return all(id(head) in prepared for head in heads)

    def __repr__(self) -> str:
        weights = ", ".join(f"{task}={weight:.4g}" for task, weight in self.weights.items())
        frozen = ", frozen" if self.frozen else ""
        return f"Weighter({self.method!r}, {weights}, step={self._progress.step}{frozen})"

    # ---- a step ------------------------------------------------------------------------------------------------

    def backward(
        self, losses: Any, *, num_items: int | Mapping[str, int] | None = None, freeze: bool = False, **kwargs: Any
    ) -> Tensor:
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
        """
        if not torch.is_grad_enabled():
            raise checks.gradients_disabled()
        total = self.combine(losses, num_items=num_items, freeze=freeze)
        try:
            if self.accelerator is None:
                total.backward(**kwargs)
            else:
                self.accelerator.backward(total, **kwargs)
        except Exception as error:
            self.reset()
            if "second time" in str(error):
                raise checks.graph_already_freed() from error
            if left_waiting(error):
                raise checks.left_waiting(self._progress.step) from error
            raise
        self.step()
        return total.detach()

    def combine(self, losses: Any, *, num_items: int | Mapping[str, int] | None = None, freeze: bool = False) -> Tensor:
        """The weighted total with its graph, for loops that call ``accelerator.backward`` and ``step`` themselves.

        With gradients disabled (evaluation) it returns the weighted total and records nothing. Arguments as in
        ``backward``. A loss of the trunk's own is added to what it returns.

        Raises:
            RuntimeError: The last window was due and was not closed.
        """
        named = checks.losses_by_task(losses, self.tasks)
        counts, empty = checks.item_counts(num_items, named, self.tasks)
        present = frozenset(k for k, task in enumerate(self.tasks) if task in named and k not in empty)
        gradients = torch.is_grad_enabled()
        if gradients:
            if self._folded:
                raise checks.rotations_were_folded()
            if self.accelerator is not None:
                checks.uneven_inputs(self.accelerator)
            checks.losses_have_graphs({self.tasks[k]: named[self.tasks[k]] for k in sorted(present)})
            if self._due:
                raise checks.window_not_closed()
        self._finish()
        v = self._stack(named, present, empty)
        seen = v.detach()
        if gradients:  # an evaluation may come between a forward and its backward
            self._branch.forget()
        on_losses = self.method.acts_on == "losses"
        record = gradients and not freeze and self._measuring
        if on_losses:
            at_once = record and self.lag == 0
            weights = self._decide(seen, present, counts, None) if at_once else self._progress.weights
            w = self._on_device(weights, v)
        else:
            loss_weights = self._progress.named("loss_weights")
            w = torch.ones_like(v) if loss_weights is None else self._on_device(loss_weights, v)
        if self._caps:
            w = w * self._scale_down(seen)
        total = (v * w).sum()  # autocast would run a product of vectors in half precision
        if not gradients:
            return total

        self._due = self._sync
        self._counts |= self._unfrozen and not freeze
        block = Block(
            present,
            scale=None if counts is None else 1 / self._on_device(torch.tensor(counts).clamp(min=1), v),
            shared_weights=None if on_losses else self._on_device(self._progress.weights, v),
            record=record,
            arrived=self._arrived,
        )
        self._open.append(block)
        if record:
            self._warn_of_half_precision(named)
            self._window.add_block(seen, present, counts)
            self._expected |= present
            if self.lag == 0 and not on_losses:
                # `seen`, not v: a hook of v that held v itself would keep every step's graph for ever.
                block.decide = lambda gram: self._on_device(self._decide(seen, present, counts, gram), seen)
        if block.record or not on_losses:
            self._branch.arm(v, block)
        return total

    def step(self) -> None:
        """Closes the window: one all-reduce, the verdict, the update. A no-op while gradients accumulate.

        Raises:
            RuntimeError: The window is empty, a loss never reached the branch, the processes disagree, or too many
                steps in a row were not finite. What depends on other processes is raised on all of them.
        """
        if not self._sync:
            return
        if not self._open:
            raise checks.empty_window()
        self._finish()
        try:
            self._check_that_losses_reached_the_branch()
            if self._counts and (self.lag or not self._window.blocks):
                self._progress.count_weights()
            if self._window.blocks:
                payload = self._window.pack(self._branch.split)
                signature, rotations = self._signature(len(payload)), self._progress.named("rotations")
                step = self._progress.step
                self._pending = self._processes.sum(payload, signature, self._window.condense, step, rotations), step
            else:
                self._progress.see(self._progress.step, None)
            self._progress.step += 1
        finally:
            self.reset()
        if self._pending is not None and self._pending[0].ready is None:
            self._finish()

    def reset(self) -> None:
        """Drops the open window, for instance after an exception that the user caught on every process."""
        self._window.clear()
        self._branch.disarm()
        self._branch.split = False
        for block in self._open:
            block.record = False  # its backward may yet come, and belongs to no later window
        self._open = []
        self._due = False
        self._counts = False
        self._expected = set()
        self._arrived = set()

    @property
    def _sync(self) -> bool:
        return self.accelerator is None or bool(self.accelerator.sync_gradients)

    @property
    def _unfrozen(self) -> bool:
        return not self._progress.frozen and self._progress.step >= self.update_after

    @property
    def _measuring(self) -> bool:
        return self._unfrozen and (self._progress.step - self.update_after) % self.update_every == 0

    def _stack(self, named: Mapping[str, Tensor], present: frozenset[int], empty: set[int]) -> Tensor:
        """The losses as one vector in task order; absent ones are 0, with a path of zeros to the head where asked."""
        some = next(iter(named.values()))
        dtype = torch.float64 if any(loss.dtype == torch.float64 for loss in named.values()) else torch.float32
        rows = []
        for k, task in enumerate(self.tasks):
            if k in present:
                row = named[task]
            else:
                sources = self._branch.head_outputs(k) if k in empty else []
                if k in empty and not sources and task in named and named[task].requires_grad:
                    sources = [named[task]]
                row = nothing(sources) if sources and torch.is_grad_enabled() else some.new_zeros(())
            rows.append(row.to(some.device, dtype))
        return torch.stack(rows)

    def _scale_down(self, v: Tensor) -> Tensor:
        """By how much a loss above its cap is multiplied; 1 below it."""
        caps = torch.tensor([self._caps.get(task, torch.inf) for task in self.tasks])
        caps = self._on_device(caps, v)
        return torch.where(v > caps, caps / v, torch.ones_like(v))

    def _on_device(self, values: Tensor, like: Tensor) -> Tensor:
        """A small CPU vector where ``like`` lives; the weights' copy is kept until they change."""
        if values is not self._progress.weights or torch.is_inference_mode_enabled():
            return to_device(values.to(like.dtype), like.device)
        key = like.device, like.dtype
        if key not in self._copies:
            self._copies[key] = to_device(values.to(like.dtype), like.device)
        return self._copies[key]

    def _check_that_losses_reached_the_branch(self) -> None:
        if not self.method.needs & {"norms", "gram", "moments"}:
            return
        missed = self._expected - self._arrived - self._reached
        if missed:
            names = [self.tasks[k] for k in sorted(missed)]
            never = not self._has_heads and not self._arrived
            raise checks.losses_that_missed_the_branch(names, self._branch.frozen_trunk, never)
        self._reached |= self._arrived

    # ---- agreement and verdict ---------------------------------------------------------------------------------

    def _signature(self, length: int) -> list[int]:
        """Settings, step, weights and state as small integers; alike on all processes or something is wrong."""
        settings = hashlib.blake2b(repr((self._settings(), length)).encode()).digest()
        return [
            *signature_pieces(settings, 2),
            self._progress.step % (1 << 20),
            *signature_pieces(self._progress.digest(), 2),
        ]

    def _settings(self) -> dict[str, Any]:
        return {
            "tasks": list(self.tasks),
            "method": repr(self.method),
            **self._resumed_settings(),
            "update_after": self.update_after,
            "max_losses": self._caps,
            "max_skipped_steps": self.max_skipped_steps,
        }

    def _resumed_settings(self) -> dict[str, Any]:
        """Those that a checkpoint has to agree in; the others are bounds."""
        return {"lag": self.lag, "update_every": self.update_every, "shared_layer": self._window.matrices}

    @torch.inference_mode(False)  # what is kept from here must be of use in training
    def _finish(self) -> None:
        """Takes in the last window: verdict from the reduced numbers, then the method's update."""
        if self._pending is None:
            return None
        (reduction, step), self._pending = self._pending, None
        header, payload, moments = reduction.wait()
        self._check_agreement(header, step)
        sums = self._window.unpack(payload, moments, step)
        if 0 < sums.counted < sums.blocks - sums.vacant:
            raise checks.mixed_counts(sums.counted, sums.blocks, step)
        bad_moments = [sums.bad_moments] * len(self.tasks)
        for what, bad in (("loss", sums.bad_losses), ("gradient", sums.bad_gradients), ("moment", bad_moments)):
            if any(bad):
                return self._hold(what, bad, step)
        self._progress.held = 0
        statistics = sums.statistics
        self._check_statistics(statistics, sums.split)
        self._statistics = statistics
        self._progress.update(statistics)
        self._copies.clear()
        checks.finite_weights(self._progress.weights, self.method)
        self._see(step, statistics)
        return None

    def _see(self, step: int, statistics: Statistics | None) -> None:
        """A measured step ended. With ``lag=0`` its own weights are those of the update that has just been."""
        if self.lag == 0:
            self._progress.count_weights()
        self._progress.see(step, statistics)

    def _check_agreement(self, header: Tensor, step: int) -> None:
        if self._processes.agreed(header):
            return
        description = {
            **self._settings(),
            "step": step,
            "weights": self._progress.weights.tolist(),
            "state": self._progress.digest().hex()[:8],
        }
        if (rotations := self._progress.named("rotations")) is not None:
            description["rotations"] = hashlib.blake2b(rotations.cpu().numpy().tobytes()).hexdigest()[:8]
        raise checks.disagreement(self._processes.gather(description), step)

    def _check_statistics(self, statistics: Statistics, split: int) -> None:
        if self.method.positive_losses:
            negative = statistics.losses < 0
            if negative.any():
                names = [task for task, is_negative in zip(self.tasks, negative.tolist(), strict=True) if is_negative]
                losses = statistics.losses[negative].tolist()
                raise checks.negative_losses(repr(self.method), names, losses, statistics.step)
        if statistics.norms is None and self.method.needs & {"norms", "gram", "moments"}:
            names = [task for task, there in zip(self.tasks, statistics.present.tolist(), strict=True) if there]
            raise checks.losses_that_missed_the_branch(names, self._branch.frozen_trunk, not self._has_heads)
        if split and self.method.needs & {"gram", "moments"}:
            raise checks.unrelated_gradients(repr(self.method), statistics.step)
        if self.method.needs & {"gram", "moments"}:
            self._warn_if_no_sample_is_shared(statistics)

    def _warn_if_no_sample_is_shared(self, statistics: Statistics) -> None:
        """At z, inner products of exactly 0 between all tasks say that no sample has two of them."""
        M = statistics.gram
        if "shared" in self._told or self._window.matrices is not None or M is None:
            return
        several = (M.diagonal() > 0).sum() > 1
        if several and not (M - M.diag().diag()).any():
            self._warn_once("shared", checks.no_sample_is_shared(repr(self.method), self._rotates))

    def _warn_of_half_precision(self, losses: Mapping[str, Tensor]) -> None:
        if "half" in self._told:
            return
        half = {str(loss.dtype) for loss in losses.values()} & {"torch.bfloat16", "torch.float16"}
        if half:
            self._warn_once("half", checks.losses_in_half_precision(half.pop()))

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._told and self._processes.rank == 0:
            checks.logger.warning(message)
        self._told.add(about)

    def _hold(self, what: str, bad: Sequence[int], step: int) -> None:
        """Weights and state stay as they are for this step, on every process."""
        self._progress.skipped += 1
        message = checks.not_finite(what, self.tasks, bad, self._processes.world, step)
        self._warn_once(what, message)
        self._see(step, None)
        if what != "loss" and self._has_scaler:
            return
        self._progress.held += 1
        if self._progress.held > self.max_skipped_steps:
            raise checks.too_many_held(message, self._progress.held, self.max_skipped_steps)

    @property
    def _has_scaler(self) -> bool:
        """Under a loss scale an overflow of gradients is the scaler's business."""
        accelerator = self.accelerator
        return accelerator is not None and (accelerator.scaler is not None or accelerator.mixed_precision == "fp16")

    # ---- weights of this very step -------------------------------------------------------------------------------

    def _decide(
        self, v: Tensor, present: frozenset[int], counts: Sequence[float] | None, gram: Tensor | None
    ) -> Tensor:
        """Weights from this one micro-batch of all processes; the state moves on when the window closes."""
        block = Window(len(self.tasks))
        block.add_block(v, present, counts)
        if gram is not None:
            block.add("gram", gram)
        payload = block.pack(self._branch.split)
        step = self._progress.step
        header, host, rest = self._processes.sum(payload, self._signature(0), block.condense, step).wait()
        self._check_agreement(header, step)
        sums = block.unpack(host, rest, step)
        if any(sums.bad_losses) or any(sums.bad_gradients):
            return self._progress.weights  # the window will be held
        self._check_statistics(sums.statistics, sums.split)
        return self.method.weigh(self._progress.state, sums.statistics)

    # ---- rotations -----------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def _rotations(self, z: Tensor) -> Tensor:
        """The rotations ``[K, m, m]`` where ``z`` is: float64 for a float64 model, else float32."""
        self._finish()
        method: Any = self.method
        R = self._progress.named("rotations")
        self._shape = tuple(z.shape)
        width = z.shape[method.dim]
        if R is None or self._width != width:
            self._progress.state = method.widen(self._progress.state, width)
            self._width = width
            R = self._progress.named("rotations")
            assert R is not None
            K = len(self.tasks)
            number = K * (K - 1) // 2 + (K if method.cooperative_after is not None else 0)
            self._window.moments = number, R.shape[-1]
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        if R.device != z.device or R.dtype != dtype:
            moved = R.to(z.device, dtype)
            self._progress.replace(R, moved)
            R = moved
        return R

    @property
    def rotations(self) -> dict[str, Tensor]:
        """``{task: R_k}``, ``[m, m]`` each, those that the next forward will use.

        Raises:
            RuntimeError: The method does not rotate, or no forward has shown the width of z yet.
        """
        self._finish()
        R = self._progress.named("rotations")
        if R is None:
            raise (
                checks.rotations_were_folded()
                if self._folded
                else checks.no_rotations(repr(self.method), self._rotates)
            )
        return dict(zip(self.tasks, R.clone(), strict=True))

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
        R = self.rotations
        method: Any = self.method
        models = [] if self.accelerator is None else list(self.accelerator._models)
        if model is not None:
            models.append(model)
        if heads is not None:
            checks.heads(heads, self.tasks, model)
            found = heads_by_task(self.tasks, heads, model)
        elif self._branch.find_heads is not None:
            found = list(self._branch.find_heads())
        else:
            raise checks.fold_needs_heads()
        self._branch.detach()
        try:
            fold(dict(zip(self.tasks, found, strict=True)), R, method.dim, self._shape, models)
        except BaseException:
            self._branch.attach()
            raise
        self._branch.rotation = None
        self._progress.forget_rotations()
        self._folded = True
        self.reset()

    # ---- the branch --------------------------------------------------------------------------------------------

    def branch(self, z: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Divides the shared representation: ``{task: alias of z}``, one for every head's input.

        Written in a model's ``forward``. Gradients of different tasks arrive apart at their aliases.

        Args:
            z: The shared representation.
            mask: Which samples count in the statistics (padding does not), of the shape of ``z`` without its
                feature dimension; None: all.
        """
        if self._has_heads:
            raise checks.heads_and_branch()
        return self._branch(z, mask)

    def detach(self) -> None:
        """Removes every hook; nothing is left on the model."""
        self._branch.detach()

    # ---- what is read ------------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, float]:
        """``{task: weight}``, those that the next backward will use."""
        self._finish()
        return dict(zip(self.tasks, self._progress.weights.tolist(), strict=True))

    @property
    def statistics(self) -> Statistics | None:
        """What the last window that was not held saw; None before the first."""
        self._finish()
        return self._statistics

    @property
    def average_weights(self) -> dict[str, float]:
        """Weights averaged over the steps that were not wholly frozen, for a static retrain (GradNorm Static)."""
        self._finish()
        return dict(zip(self.tasks, self._progress.average_weights.tolist(), strict=True))

    @property
    def history(self) -> list[tuple[int, dict[str, float]]]:
        """Bounded record of ``(step, values)``, saved with the state; thinned past 4,096 entries."""
        self._finish()
        return self._progress.record.history

    def log_values(self) -> dict[str, float]:
        """Floats for ``accelerator.log``: weights, and losses, norms and cosines of the last step. No collective."""
        weights = {f"weight/{task}": weight for task, weight in self.weights.items()}
        latest = self._progress.record.values(self._progress.record.latest)
        return {**weights, **latest, "weighting/skipped_steps": float(self._progress.skipped)}

    def describe(self) -> str:
        """One line for a model card or a tracker's configuration: the method, the tasks and their weights."""
        chosen = [f for f in dataclasses.fields(self.method) if f.init and getattr(self.method, f.name) != f.default]
        settings = ", ".join(f"{f.name}={getattr(self.method, f.name)!r}" for f in chosen)
        weights = ", ".join(f"{task} {weight:.3g}" for task, weight in self.weights.items())
        when = f"after {self._progress.step} optimizer steps" if self._progress.step else "to begin with"
        frozen = ", frozen" if self._progress.frozen else ""
        return f"losses weighted by {type(self.method).__name__}({settings}){frozen}; {when}: {weights}"

    # ---- freezing ----------------------------------------------------------------------------------------------

    def freeze(self) -> _Frozen:
        """Holds the weights: a plain weighted backward, no collective. Drops the open window.

        Usable as ``with weighter.freeze():``, which unfreezes at its end.
        """
        self._finish()
        self.reset()
        before, self._progress.frozen = self._progress.frozen, True
        return _Frozen(self, before)

    def unfreeze(self) -> None:
        """Weights move again."""
        self.reset()
        self._progress.frozen = False

    @property
    def frozen(self) -> bool:
        """Whether the weights are held."""
        return self._progress.frozen

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs, as plain tensors, numbers and strings; free of the number of processes."""
        self._finish()
        if self._window.blocks and self._processes.rank == 0:
            checks.warn_saved_inside_window(self._window.blocks)
        return self._progress.state_dict(**self._resumed_settings())

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
        self._progress.load_state_dict(state, strict, **self._resumed_settings())
        self._pending = None
        self.reset()
        self._statistics = None
        self._width = None
        self._copies.clear()


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
