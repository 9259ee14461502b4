"""Loss weighting in ``transformers.Trainer``: a mixin for any Trainer, and the plain Trainer with it.

The Trainer accumulates, synchronises, logs, evaluates and saves as ever. What is new: a model gives one loss per task,
``compute_loss`` combines them, and the window closes after the backward of an optimizer step's last micro-batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from accel_weighting.statistics import Method

from .base import WeighterMixin
from .items import ItemsOfWindow, TaskMeans, count_labels, first_rows

try:
    from transformers import Trainer
    from transformers.trainer_pt_utils import find_batch_size
except ImportError as error:
    raise ImportError("WeightedTrainer needs transformers: pip install 'accel-weighting[trainer]'.") from error

OURS = ("losses", "num_items")
"""Outputs of a model that are for training, and no predictions."""


class WeightingMixin(WeighterMixin):
    """Weighs the losses of several tasks in any Trainer: ``class MyTrainer(WeightingMixin, SomeTrainer)``.

    The model returns a dictionary ``losses`` among its outputs, one scalar per task, each the mean over the
    micro-batch; or ``compute_losses`` is overridden. Tasks may be missing from a batch: see ``count_items``.

    **Micro-batches count by their items.** A task's loss in an optimizer step is the mean over its items in all
    micro-batches of all processes, as in the Trainer, and not the mean of their means: with ``EqualWeighting()`` and
    one task, this is the Trainer's training. Items are the labels that are not -100 (nor NaN), or what ``count_items``
    says. A task whose items cannot be counted has equal micro-batches; a warning says so where that matters.

    **Evaluation** records nothing. ``eval_loss/topic`` is the mean over all items of the evaluation set, exact on any
    number of processes; choose checkpoints by it, with ``metric_for_best_model="eval_loss/topic"``. ``eval_loss`` is
    the total at the weights of that moment, which is no yardstick.

    Losses, weights and gradient norms of the latest optimizer step go to the logs, and so to ``trainer_state.json``
    and every tracker. Checkpoints hold the weighter's state, from which training resumes.

    Args:
        *args: For the Trainer.
        weighting: A weighting method, such as ``GradNorm(alpha=1.5)``.
        tasks: Task names; None: those of ``heads``.
        heads: ``{task: dotted name in the model, or module}``. None where the model's forward calls
            ``trainer.weighter.branch(z)`` itself, or where the method needs losses only. With ``model_init`` they must
            be names.
        weighter_options: More arguments of :class:`~accel_weighting.Weighter`, such as ``{"update_every": 4}``.
        **kwargs: For the Trainer.

    Attributes:
        weighter: The :class:`~accel_weighting.Weighter` of the model and the accelerator in use: where the Trainer
            makes either anew (``model_init``, a hyperparameter search), training begins with a new one.

    Raises:
        ValueError, TypeError, NotImplementedError: The Trainer was asked for what cannot go with weighting, or a
            subclass overrides what it should not; the message says what.
    """

    # The losses are means over a micro-batch: the Trainer is to divide by the micro-batches of the window.
    loss_is_scaled_for_ga = False

    _items: ItemsOfWindow | None = None
    _evaluation: TaskMeans | None = None
    _combined = False

    def __init__(
        self,
        *args: Any,
        weighting: Method,
        tasks: Sequence[str] | None = None,
        heads: Mapping[str, nn.Module | str] | None = None,
        weighter_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_overrides(type(self))
        super().__init__(
            *args, weighting=weighting, tasks=tasks, heads=heads, weighter_options=weighter_options, **kwargs
        )
        _check_trainer(self, "process_group" in (weighter_options or {}))
        # The model gives means; it is not to divide by the items of the window, of which it knows one count for all.
        self.model_accepts_loss_kwargs = False
        if "loss/" in (self.args.metric_for_best_model or ""):
            self.args.greater_is_better = False  # which the Trainer knows of names that end in "loss"

    # ---- what users may override ---------------------------------------------------------------------------------

    def compute_losses(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False
    ) -> Mapping[str, Tensor] | tuple[Mapping[str, Tensor], Any]:
        """One loss per task, ``{task: scalar}``, each a mean over this micro-batch; by default the outputs' ``losses``.

        Args:
            model: The model, as wrapped for training.
            inputs: The batch.
            return_outputs: Whether to return the model's outputs as well, for predictions.
        """
        outputs = model(**inputs)
        losses = outputs.get("losses") if isinstance(outputs, Mapping) else getattr(outputs, "losses", None)
        if losses is None:
            raise _model_without_losses(outputs)
        return (losses, outputs) if return_outputs else losses

    def count_items(self, inputs: dict[str, Any]) -> int | Mapping[str, int] | None:
        """How many items each loss is the mean of in this micro-batch, asked for before its forward.

        By default ``inputs["num_items"]`` if the collator has put it there, which costs nothing on a GPU. Else the
        labels that are neither -100 nor NaN: those of a task are in ``labels_topic``, ``topic_labels``, ``topic`` or
        ``labels["topic"]``; ``labels`` are those of every task that has none of its own. Where the model shifts them,
        as causal language models do, the first of every row does not count.

        Returns:
            A count for all tasks, or ``{task: count}``; 0 says that the task is not in this micro-batch. None, or a
            task left out: its items cannot be counted. ``return 1`` gives equal micro-batches.
        """
        return count_labels(inputs, self.weighter.tasks, bool(getattr(self, "_loss_shifts_labels", False)))

    # ---- a step --------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of the next optimizer step, whose items are counted: one gather, as the Trainer's own."""
        samples, num_items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        counted = [self.count_items(inputs) for inputs in samples]
        gather = self._summed if self.args.average_tokens_across_devices else None
        self._items = ItemsOfWindow(self.weighter.tasks, counted, gather, self._copies)
        uncounted = self._items.uncounted
        if uncounted and self._items.micro_batches > 1 and type(self).count_items is WeightingMixin.count_items:
            warn(_not_counted(uncounted, samples[0]), stacklevel=2)
        return samples, num_items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; closes the window when the Trainer synchronises gradients."""
        self._combined = False
        if self._items is not None and not self._items.next():
            self._items = None  # called by hand
        return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """The weighted total, with its graph in training.

        The Trainer's own ``compute_loss`` runs as ever, with its metrics: what it finds as the loss among the outputs
        of the model is the weighted total.
        """
        weighed = _Weighed(self, model)
        found: tuple[Tensor, Any] = super().compute_loss(weighed, inputs, True, *args, **kwargs)  # type: ignore[misc]
        if not weighed.called:
            raise _model_not_called(type(self))
        return found if return_outputs else found[0]

    def _weigh(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The weighted total of a batch, and the outputs of the model."""
        self._combined = True
        losses: Any
        losses, outputs = self.compute_losses(model, inputs, return_outputs=True)
        said = outputs.get("num_items") if isinstance(outputs, Mapping) else getattr(outputs, "num_items", None)
        items = self._items
        if items is None or not torch.is_grad_enabled():
            items = ItemsOfWindow(self.weighter.tasks, [self.count_items(inputs)])
            items.next()
        elif self._copies > 1:
            items.recount(self.count_items(inputs))
        num_items = items.shares(losses, said)
        if self._evaluation is not None:
            self._evaluation.see(losses, items.here, find_batch_size(inputs) or 1)
        return self.weighter.combine(losses, num_items=num_items), outputs

    def close_window(self) -> None:
        """The end of a micro-batch, in which ``compute_loss`` must have run."""
        if not self._combined:
            raise _compute_loss_overridden(type(self))
        super().close_window()

    @property
    def _copies(self) -> int:
        """How many processes have the same rows, of which each has a piece: those of context parallelism."""
        return int(getattr(getattr(self.accelerator, "parallelism_config", None), "cp_size", 1))

    def _summed(self, numbers: Sequence[float]) -> list[float]:
        """Over all processes."""
        if self.accelerator.num_processes == 1:
            return list(numbers)
        device = "cpu" if self.args.device.type == "mps" else self.args.device
        row = torch.tensor(numbers, dtype=torch.float64, device=device)
        sums: list[float] = self.accelerator.gather(row).view(-1, len(row)).sum(0).tolist()
        return sums

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's, with ``eval_loss/topic``: every task's mean loss over all items."""
        before, self._evaluation = self._evaluation, TaskMeans(self.weighter.tasks)
        try:
            output = super().evaluation_loop(  # type: ignore[misc]
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            means = self._evaluation.means(self._summed)
        finally:
            self._evaluation = before
        if not means and not self.label_names and metric_key_prefix.startswith("eval"):  # type: ignore[attr-defined]
            warn(_evaluated_without_labels(), stacklevel=2)
        output.metrics.update({f"{metric_key_prefix}_loss/{task}": mean for task, mean in means.items()})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The Trainer's; losses are no predictions."""
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = list(getattr(config, "keys_to_ignore_at_inference", ["past_key_values"]) if config else [])
        ignored = [*ignore_keys, *OURS]
        result = super().prediction_step(model, inputs, prediction_loss_only, ignored, **kwargs)  # type: ignore[misc]
        if self._evaluation is not None:
            if self._evaluation.has_last:
                self._leave_out_repeated_rows(model, inputs)
            self._evaluation.settle()
        return result

    def _leave_out_repeated_rows(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """The last batch of several processes is filled up with rows from the start, which are no items."""
        progress, rows = self.accelerator.gradient_state, find_batch_size(inputs)
        processes = self.accelerator.num_processes
        if rows is None or not progress.end_of_dataloader or not 0 < progress.remainder < rows * processes:
            return
        real = min(max(progress.remainder - rows * self.accelerator.process_index, 0), rows)
        inputs = self._prepare_inputs(first_rows(inputs, max(real, 1), rows))  # type: ignore[attr-defined]
        with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
            losses: Any = self.compute_losses(model, inputs)
        items = ItemsOfWindow(self.weighter.tasks, [self.count_items(inputs) if real else 0])
        items.next()
        assert self._evaluation is not None
        self._evaluation.see(losses, items.here, real)


class WeightedTrainer(WeightingMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` with the losses of several tasks weighted; see :class:`WeightingMixin`.

    Example::

        trainer = WeightedTrainer(
            model=model,  # returns {"losses": {"topic": …, "rating": …}, …}
            args=TrainingArguments("out", gradient_accumulation_steps=4),
            train_dataset=train_set,
            weighting=GradNorm(alpha=1.5),
            heads={"topic": "heads.topic", "rating": "heads.rating"},
        )
        trainer.train()
    """


class _Weighed:
    """A model whose outputs have the weighted total as their loss; in everything else it is that model."""

    def __init__(self, trainer: WeightingMixin, model: nn.Module) -> None:
        self.called = False
        self._trainer, self._model = trainer, model

    def __call__(self, **inputs: Any) -> Any:
        if self.called:
            raise _model_called_twice(type(self._trainer))
        self.called = True
        total, outputs = self._trainer._weigh(self._model, inputs)
        if isinstance(outputs, dict) and type(outputs) is not dict:  # transformers' ModelOutput
            outputs["loss"] = total
            return outputs
        if isinstance(outputs, Mapping):
            return {**outputs, "loss": total}
        return (total, *outputs[1:]) if isinstance(outputs, (tuple, list)) else (total, outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # so that it is unwrapped as the model is
        return type(self._model)


# ---- messages ----------------------------------------------------------------------------------------------------


def _model_without_losses(outputs: Any) -> ValueError:
    """A model in a Trainer that gives no losses."""
    found = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
    return ValueError(
        "The model must return a dictionary `losses`, {task: scalar}, among its outputs, or `compute_losses(model, "
        f"inputs, return_outputs=False)` must be overridden. Found outputs {found}."
    )


def _not_counted(tasks: Sequence[str], inputs: Mapping[str, Any]) -> str:
    """Tasks whose micro-batches count alike."""
    return (
        f"The items of the tasks {list(tasks)} could not be counted: every micro-batch counts the same for them, "
        "however many items it has, which differs from one large batch where rows are ragged. Name their labels "
        "`labels_TASK`, `TASK_labels` or `TASK`, let the collator put `num_items` ({task: count}) into the batch, or "
        "override `count_items(inputs)` (`return 1` if this is what you want). Found in the batch: "
        f"{list(inputs)}."
    )


def _evaluated_without_labels() -> str:
    """The Trainer knows of no labels, and so asks for no loss."""
    return (
        "The evaluation gave no `eval_loss`: the Trainer evaluates losses of batches with labels, and knows of none. "
        "Labels are those arguments of the model's forward whose names contain `label`. Name others in "
        '`TrainingArguments(label_names=["topic", …])`.'
    )


def _compute_loss_overridden(cls: type) -> TypeError:
    """A subclass that makes one loss itself."""
    return TypeError(
        f"`{cls.__name__}.compute_loss` makes one loss, which weighting never sees: override `compute_losses(self, "
        "model, inputs, return_outputs=False)` instead, which returns one loss per task, {task: scalar}. (An override "
        "that calls `super().compute_loss(...)`, to compute metrics of its outputs, is fine.)"
    )


def _model_not_called(cls: type) -> TypeError:
    """The Trainer below makes its loss without calling the model that it was given."""
    return TypeError(
        f"The `compute_loss` that `{cls.__name__}` inherits from its Trainer makes its loss without calling the model "
        "that it is given, so it cannot be wrapped: use the integration that is made for that Trainer."
    )


def _model_called_twice(cls: type) -> TypeError:
    """Which of the calls would be the losses'?"""
    return TypeError(
        f"The `compute_loss` that `{cls.__name__}` inherits from its Trainer calls the model more than once, so that "
        "its losses cannot be told from other outputs: use the integration that is made for that Trainer."
    )


def _check_overrides(cls: type[WeightingMixin]) -> None:
    """A subclass overrides what is to be overridden, with the arguments that it is called with."""
    for below in cls.__mro__[: cls.__mro__.index(WeightingMixin)]:
        if "compute_loss" in vars(below) and not _names(vars(below)["compute_loss"], "compute_loss"):
            raise _compute_loss_overridden(below)
    arguments = list(inspect.signature(cls.count_items).parameters)
    if "outputs" in arguments or len(arguments) > 2:
        raise TypeError(
            f"`{cls.__name__}.count_items({', '.join(arguments)})` asks for the model's outputs, and items are counted "
            "before the forward, when all micro-batches of the step are at hand: write `count_items(self, inputs)`."
        )


def _names(function: Any, name: str) -> bool:
    """Whether a function's code has a name in it, as that of a call of ``super().name`` has."""
    codes = [getattr(inspect.unwrap(function), "__code__", None)]
    for code in codes:
        if code is None or name in code.co_names:
            return True
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    return False


def _check_trainer(trainer: Any, has_group: bool) -> None:
    """What a transformers Trainer was asked for that cannot go with weighting."""
    args, parallelism = trainer.args, getattr(trainer.accelerator, "parallelism_config", None)
    if args.label_smoothing_factor:
        raise ValueError(
            "Trainer's label smoothing makes one loss of `labels`, and weighting needs one loss per task: leave "
            "`label_smoothing_factor` at 0 and smooth where the loss is made, e.g. F.cross_entropy(label_smoothing=…). "
            f"Found `label_smoothing_factor = {args.label_smoothing_factor}`."
        )
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "`compute_loss_func` gives one loss, and weighting needs one per task: leave it out and override "
            "`compute_losses(model, inputs, return_outputs=False)`."
        )
    if args.n_gpu > 1:
        raise NotImplementedError(
            f"torch's DataParallel would divide every batch over {args.n_gpu} GPUs of this one process, where the "
            "gradients of a task cannot be told apart: start one process per GPU, with `accelerate launch` or torchrun."
        )
    if parallelism is not None and getattr(parallelism, "sp_enabled", False):
        raise NotImplementedError(
            "Sequence parallelism computes one loss inside the Trainer; weighting needs one per task."
        )
    if getattr(trainer, "is_distributed_loading_by_transformers", False) and not has_group:
        raise NotImplementedError(
            "The model was sharded by transformers itself, so that Accelerate does not know its data-parallel group: "
            "name it in `weighter_options={'process_group': …}`."
        )
