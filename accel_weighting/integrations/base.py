"""What every Trainer needs alike: the weighter of the accelerator in use, its windows, its logs and its checkpoints."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
        self._start: dict[str, Any] | None = None
        self._build_weighter()

    def find_tasks(self) -> Sequence[str]:
        """Task names, where neither ``tasks`` nor ``heads`` gave them; called once the Trainer is built."""
        raise _without_tasks()

    # ---- the weighter of the model and the accelerator in use ----------------------------------------------------

    def _build_weighter(self) -> None:
        self.weighter = Weighter(**self._weighter_arguments, model=self.model, accelerator=self.accelerator)
        self._built_for = weakref.ref(self.model), weakref.ref(self.accelerator)

    def _renew_weighter(self) -> None:
        """Builds the weighter anew if model or accelerator are others than those that it was built for."""
        model, accelerator = (ref() for ref in self._built_for)
        same_model = any(part is model for part in self.model.modules())
        if same_model and accelerator is self.accelerator:
            return
        state = self.weighter.state_dict() if same_model else None
        self.weighter.detach()
        self._build_weighter()
        if state is not None:
            self.weighter.load_state_dict(state)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; a second training goes on with the weights that there are, unless the model is made anew."""
        self._start = None
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """One attempt at training, of which ``auto_find_batch_size`` makes several."""
        self._renew_weighter()
        self.weighter.reset()
        state = self.weighter.state_dict()
        if self._start is None:
            self._start = state
        else:  # the parameters are what the attempt before left, and rotations belong to them
            rotations = {name: value for name, value in state["state"].items() if _is_rotations(name)}
            self.weighter.load_state_dict({**self._start, "state": {**self._start["state"], **rotations}})
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
        """Saves the model, and the weighter's state beside it.

        Rotations are folded into the heads that are saved: what ``from_pretrained`` loads is the model that was
        evaluated, and needs no library.
        """
        folder = self.args.output_dir if output_dir is None else output_dir
        with self._folded(folder) as changed:
            super().save_model(folder, _internal_call=True)  # type: ignore[misc]
            if self.args.should_save:
                Path(folder).mkdir(parents=True, exist_ok=True)
                torch.save(self._state(changed), Path(folder) / FILE)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)  # type: ignore[attr-defined]

    @contextmanager
    def _folded(self, folder: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The heads with their rotations in them, if they can take them; the weights that this changed."""
        with ExitStack() as stack:
            try:
                changed = stack.enter_context(self.weighter.folded(self.model))
            except RuntimeError as error:
                warn(_saved_unfolded(folder, error), stacklevel=4)
                changed = []
            yield changed

    def _state(self, changed: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """The weighter's state for the model that is saved: where its heads are rotated, rotations are none.

        What a resume needs is kept beside it: the rotations, and the heads' weights before. Sharding engines save
        those themselves.
        """
        state = self.weighter.state_dict()
        if not changed:
            return state
        rotations = {name: value for name, value in state["state"].items() if _is_rotations(name)}
        none = {name: torch.eye(len(R[0]), dtype=R.dtype).expand_as(R).clone() for name, R in rotations.items()}
        weights = {}
        if not self._shards:
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            weights = {names[id(weight)]: value.cpu() for weight, value in changed}
        state["state"] = {**state["state"], **none}
        return {**state, "unfolded": {"rotations": rotations, "weights": weights}}

    @property
    def _shards(self) -> bool:
        """Whether an engine saves what training resumes from in files of its own."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)  # type: ignore[attr-defined]

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        self._load_weighter(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._load_weighter(checkpoint)

    @torch.no_grad()
    def _load_weighter(self, folder: str) -> None:
        """The weighter's state beside a model that has just been loaded, and its heads as they were in training."""
        path = Path(folder) / FILE
        if not path.exists():
            warn(f"{folder} holds no {FILE}: the weights start anew.", stacklevel=2)
            self.weighter.detach()
            self._build_weighter()
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        if (unfolded := state.pop("unfolded", None)) is not None:
            state["state"] = {**state["state"], **unfolded["rotations"]}
            parameters = dict(self.model.named_parameters())
            for name, value in unfolded["weights"].items():
                parameters[name].copy_(value)
        self.weighter.load_state_dict(state)


def _is_rotations(name: str) -> bool:
    """Whether an entry of a method's state holds its rotations; wrappers write a prefix and a dot before it."""
    return name.rpartition(".")[2] == "rotations"


# ---- messages ----------------------------------------------------------------------------------------------------


def _without_tasks() -> ValueError:
    """A Trainer that knows no task."""
    return ValueError("Give `tasks` (their names), or `heads` ({task: dotted name in the model}), or both.")


def _saved_unfolded(folder: str, error: RuntimeError) -> str:
    """A model is saved whose heads do not hold their rotations."""
    return (
        f"The model in {folder} is saved without its rotations, and is not the model that was evaluated unless "
        f"{FILE}, which lies beside it, is loaded too (`train(resume_from_checkpoint=...)` does so). {error}"
    )
