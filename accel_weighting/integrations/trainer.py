"""Loss weighting in ``transformers.Trainer``: a mixin for any Trainer, and the plain Trainer with it.

The Trainer accumulates, synchronises, logs, evaluates and saves as ever. What is new: a model gives one loss per task,
``compute_loss`` combines them, and the window closes after the backward of an optimizer step's last micro-batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accel_weighting.statistics import Method
from accel_weighting.weighter import Weighter

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError("WeightedTrainer needs transformers: pip install 'accel-weighting[trainer]'.") from error

FILE = "weighter.pt"
"""The weighter's state in a checkpoint folder."""

OURS = ("losses", "num_items")
"""Outputs of a model that are for training, and no predictions."""


class WeightingMixin:
    """Weighs the losses of several tasks in any Trainer: ``class MyTrainer(WeightingMixin, SomeTrainer)``.

    The model returns a dictionary ``losses`` among its outputs, one scalar per task, each the mean over the
    micro-batch; or ``compute_losses`` is overridden. Tasks may be missing from a batch: see ``count_items``.

    Evaluation records nothing and talks to no other process; its ``eval_loss`` is the total at the weights of that
    moment, which is no yardstick for choosing among checkpoints: name a metric of yours in ``metric_for_best_model``.
    Per-task losses, weights and gradient norms of the latest optimizer step go to the logs, and so to
    ``trainer_state.json`` and every tracker. Checkpoints hold the weighter's state, from which training resumes.

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
        weighter: The :class:`~accel_weighting.Weighter`. Where the Trainer makes its model anew (``model_init``), there
            is a new weighter too.

    Raises:
        ValueError, NotImplementedError: The Trainer was asked for what cannot go with weighting; the message says what.
    """

    # The losses are means over a micro-batch: the Trainer is to divide by the micro-batches of the window.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args: Any,
        weighting: Method,
        tasks: Sequence[str] | None = None,
        heads: Mapping[str, nn.Module | str] | None = None,
        weighter_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if tasks is None and heads is None:
            raise _without_tasks()
        options = dict(weighter_options or {})
        self._weighter_arguments = {"method": weighting, "tasks": tasks or list(heads or {}), "heads": heads, **options}
        super().__init__(*args, **kwargs)
        _check_trainer(self, "process_group" in options)
        # A loss that the model divides by the items of the whole window is a share, not a mean: statistics could not
        # tell a short window from a small loss. So the Trainer neither counts items nor hands the count to the model.
        self.model_accepts_loss_kwargs = False
        self.weighter = self._make_weighter(self.model)  # type: ignore[attr-defined]

    def _make_weighter(self, model: nn.Module) -> Weighter:
        return Weighter(**self._weighter_arguments, model=model, accelerator=self.accelerator)  # type: ignore[attr-defined]

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

    def count_items(self, inputs: dict[str, Any], outputs: Any) -> int | Mapping[str, int] | None:
        """``num_items`` of ``weighter.combine``; by default what the model returns under that name, else None.

        ``{"tags": 0}`` says that the task is not in this micro-batch. Positive counts weigh micro-batches by their
        items in the statistics.
        """
        return outputs.get("num_items") if isinstance(outputs, Mapping) else getattr(outputs, "num_items", None)

    # ---- a step --------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """The weighted total, with its graph in training."""
        losses: Mapping[str, Tensor]
        outputs: Any
        losses, outputs = self.compute_losses(model, inputs, return_outputs=True)  # type: ignore[assignment]
        total = self.weighter.combine(losses, num_items=self.count_items(inputs, outputs))
        if not return_outputs:
            return total
        if isinstance(outputs, Mapping):
            outputs = {name: value for name, value in outputs.items() if name not in OURS}
        return total, outputs

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; closes the window when the Trainer synchronises gradients."""
        try:
            loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self.weighter.reset()  # the Trainer may go on, with a smaller batch
            raise
        self.weighter.step()
        return loss

    # ---- logs and checkpoints ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the weighter's values to the logs of training."""
        if "loss" in logs:
            logs.update(self.weighter.log_values())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:  # type: ignore[attr-defined]
            torch.save(self.weighter.state_dict(), Path(output_dir) / FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        path = Path(checkpoint) / FILE
        if not path.exists():
            warnings.warn(f"{checkpoint} holds no {FILE}: the weights start anew.", stacklevel=2)
            return
        self.weighter.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """A new model gets a new weighter."""
        model: nn.Module = super().call_model_init(*args, **kwargs)  # type: ignore[misc]
        if hasattr(self, "weighter"):
            self.weighter.detach()
            self.weighter = self._make_weighter(model)
        return model


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


# ---- messages ----------------------------------------------------------------------------------------------------


def _without_tasks() -> ValueError:
    """A Trainer that knows no task."""
    return ValueError("Give `tasks` (their names), or `heads` ({task: dotted name in the model}), or both.")


def _model_without_losses(outputs: Any) -> ValueError:
    """A model in a Trainer that gives no losses."""
    found = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
    return ValueError(
        "The model must return a dictionary `losses`, {task: scalar}, among its outputs, or `compute_losses(model, "
        f"inputs, return_outputs=False)` must be overridden. Found outputs {found}."
    )


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
