"""What every Trainer needs alike: the weighter of the accelerator in use, its windows, its logs and its checkpoints."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from accel_weighting.statistics import Method
from accel_weighting.weighter import Weighter

FILE = "weighter.pt"
"""The weighter's state, beside every model that is saved."""


class WeighterMixin:
    """A weighter in any transformers Trainer, whatever makes the losses: ``class Mine(WeighterMixin, SomeTrainer)``.

    A class that builds on it overrides ``compute_loss`` so that the losses pass ``self.weighter``. It may override
    ``find_tasks`` where the Trainer's own arguments say what the tasks are.

    Args:
        *args: For the Trainer.
        weighting: A weighting method.
        tasks: Task names; None: those of ``heads``, else what ``find_tasks`` finds.
        heads: ``{task: dotted name in the model, or module}``, or None. With ``model_init`` they must be names.
        weighter_options: More arguments of :class:`~accel_weighting.Weighter`.
        **kwargs: For the Trainer.

    Attributes:
        weighter: The :class:`~accel_weighting.Weighter` of the model and the accelerator in use: where the Trainer
            makes either anew (``model_init``, a hyperparameter search), training begins with a new one.

    Raises:
        ValueError: No tasks are known.
    """

    weighter: Weighter
    # Of the Trainer:
    args: Any
    model: Any
    accelerator: Any
    state: Any

    def __init__(
        self,
        *args: Any,
        weighting: Method,
        tasks: Sequence[str] | None = None,
        heads: Mapping[str, nn.Module | str] | None = None,
        weighter_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        tasks = list(tasks or heads or self.find_tasks())
        self._weighter_arguments = {"method": weighting, "tasks": tasks, "heads": heads, **(weighter_options or {})}
        self._build_weighter()

    def find_tasks(self) -> Sequence[str]:
        """Task names, where neither ``tasks`` nor ``heads`` gave them; called once the Trainer is built."""
        raise _without_tasks()

    def _build_weighter(self) -> None:
        self.weighter = Weighter(**self._weighter_arguments, model=self.model, accelerator=self.accelerator)
        self._built_for = weakref.ref(self.model), weakref.ref(self.accelerator)

    def _renew_weighter(self) -> None:
        """Builds the weighter anew if model or accelerator are others than those that it was built for."""
        model, accelerator = (ref() for ref in self._built_for)
        if any(part is model for part in self.model.modules()) and accelerator is self.accelerator:
            return
        self.weighter.detach()
        self._build_weighter()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """One attempt at training, of which ``auto_find_batch_size`` makes several."""
        self._renew_weighter()
        self.weighter.reset()
        return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; closes the window when the Trainer synchronises gradients."""
        try:
            loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self.weighter.reset()  # the Trainer may go on, with a smaller batch
            raise
        self.close_window()
        return loss

    def close_window(self) -> None:
        """The end of a micro-batch."""
        self.weighter.step()

    # ---- logs and checkpoints ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the weighter's values to the logs of training."""
        if "loss" in logs:
            logs.update(self.weighter.log_values())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and the weighter's state beside it."""
        super().save_model(output_dir, _internal_call=_internal_call)  # type: ignore[misc]
        if self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.weighter.state_dict(), folder / FILE)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        self._load_weighter(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._load_weighter(checkpoint)

    def _load_weighter(self, folder: str) -> None:
        """The weighter's state beside a model that has just been loaded."""
        path = Path(folder) / FILE
        if path.exists():
            self.weighter.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            warn(f"{folder} holds no {FILE}: the weights start anew.", stacklevel=2)


# ---- messages ----------------------------------------------------------------------------------------------------


def _without_tasks() -> ValueError:
    """A Trainer that knows no task."""
    return ValueError("Give `tasks` (their names), or `heads` ({task: dotted name in the model}), or both.")
