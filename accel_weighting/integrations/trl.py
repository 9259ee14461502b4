"""Loss weighting in TRL's trainers, whose losses are summed where no one else reaches them.

What they do take is coefficients: DPO's ``loss_weights``, a mixture of experts' ``router_aux_loss_coef``. The
weighter's coefficients stand in for those numbers, and the backward of the sum tells what each loss was. A trainer's
own ``compute_loss`` runs as ever, with its metrics and logs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import WeighterMixin

try:
    from trl import DPOTrainer, SFTTrainer
except ImportError as error:
    raise ImportError("Weighting TRL's losses needs TRL: pip install 'accel-weighting[trl]'.") from error

BALANCE = "aux_loss"
"""The task of a mixture of experts' balance loss, by the name that it has in TRL's logs."""


class CoefficientsMixin(WeighterMixin):
    """Weighs losses that a trainer sums inside: ``class Mine(CoefficientsMixin, SomeTrainer)``.

    A class that builds on it overrides ``hand_in``, which puts the coefficients where the trainer reads its own. All
    methods that read losses only can be used, with ``lag=1``. A loss that the trainer does not multiply by its
    coefficient is an error at the first step, on all processes.

    Evaluation records nothing, and its ``eval_loss`` is the total at the weights of that moment. Weights and losses
    join the trainer's own logs; checkpoints hold the weighter.

    Args:
        *args: For the trainer.
        weighting: A weighting method, such as ``CoVWeighting()``.
        tasks: The losses to weigh; None: all that the trainer sums. The others keep the trainer's own numbers.
        weighter_options: More arguments of :class:`~accel_weighting.Weighter`, such as ``{"update_every": 4}``.
        **kwargs: For the trainer.

    Raises:
        ValueError: There is one loss alone, the method needs more than losses, or the trainer was given numbers for
            what is weighed.
    """

    bare: str | None = None
    """The task whose loss the trainer adds without a coefficient; the others are handed in relative to its weight."""

    needs_outputs = False
    """Whether ``total`` reads the model's outputs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self.weighter.tasks) < 2:
            raise _one_loss(type(self), self.weighter.tasks)
        with torch.no_grad():  # refuses what the weighter cannot do before anything is loaded
            self.weighter.coefficients()

    # ---- what a class overrides ----------------------------------------------------------------------------------

    def hand_in(self, coefficients: Mapping[str, Tensor]) -> None:
        """Puts the coefficients where the trainer reads its own numbers; called before each of its ``compute_loss``.

        Args:
            coefficients: ``{task: tensor []}``, without the task that is ``bare``.
        """
        raise NotImplementedError(f"`{type(self).__name__}.hand_in(coefficients)` must be written.")

    def total(
        self, loss: Tensor, weights: Mapping[str, Tensor], inputs: Mapping[str, Any], outputs: Any, num_items: Any
    ) -> tuple[Tensor, Iterable[str]]:
        """The weighted total, and the tasks that are absent from this micro-batch.

        Args:
            loss: What the trainer's ``compute_loss`` gave.
            weights: ``{task: tensor []}``.
            inputs: The micro-batch.
            outputs: The model's outputs, where ``needs_outputs``.
            num_items: By what the trainer divides its sums of items; None: by those of the micro-batch.
        """
        return (loss if self.bare is None else loss * weights[self.bare]), ()

    # ---- a step --------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's own, with the weighter's coefficients in place of its numbers."""
        weights = self.weighter.coefficients()
        rest = {task: weight for task, weight in weights.items() if task != self.bare}
        if self.bare in weights:  # the total is multiplied by its weight
            rest = {task: weight / weights[self.bare] for task, weight in rest.items()}
        self.hand_in(rest)
        outputs_too = return_outputs or self.needs_outputs
        found = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=outputs_too, num_items_in_batch=num_items_in_batch
        )
        loss, outputs = found if outputs_too else (found, None)
        loss, absent = self.total(loss, weights, inputs, outputs, num_items_in_batch)
        if torch.is_grad_enabled():
            parts = self._parts(num_items_in_batch)
            loss = self.weighter.attach(loss * parts, num_items=dict.fromkeys(absent, 0) or None) / parts
        return (loss, outputs) if return_outputs else loss

    def _parts(self, num_items: Any) -> int:
        """Of how many micro-batches a loss is a share, by the Trainer's own rule for who divides by their number.

        Statistics are of means, so that a window of more micro-batches does not look like one of smaller losses.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            accepted = self.model_accepts_loss_kwargs and num_items is not None  # type: ignore[attr-defined]
            scaled = accepted or self.compute_loss_func is not None  # type: ignore[attr-defined]
        steps: int = self.current_gradient_accumulation_steps if scaled else 1  # type: ignore[attr-defined]
        return steps


# ---- DPO -------------------------------------------------------------------------------------------------------------


class DPOWeightingMixin(CoefficientsMixin):
    """For trainers like DPO: the losses of ``loss_type`` are weighed in place of ``loss_weights``.

    With a mixture of experts whose ``router_aux_loss_coef`` is not 0, the balance loss is one more task,
    ``"aux_loss"``, unless ``tasks`` leaves it out.
    """

    loss_types: Sequence[str]
    loss_weights: list[Any]
    router_aux_loss_coef: Any
    aux_loss_enabled: bool

    def find_tasks(self) -> Sequence[str]:
        """All losses that the trainer sums."""
        return [*self.loss_types, *([BALANCE] if self.aux_loss_enabled else [])]

    def _build_weighter(self) -> None:
        super()._build_weighter()
        if self.args.loss_weights is not None and set(self.loss_types) <= set(self.weighter.tasks):
            raise _numbers_given(self.args.loss_weights)

    def hand_in(self, coefficients: Mapping[str, Tensor]) -> None:
        """Into ``loss_weights`` and ``router_aux_loss_coef``."""
        pairs = zip(self.loss_types, self.loss_weights, strict=True)
        self.loss_weights = [coefficients.get(name, number) for name, number in pairs]
        self.router_aux_loss_coef = coefficients.get(BALANCE, self.router_aux_loss_coef)


class WeightedDPOTrainer(DPOWeightingMixin, DPOTrainer):  # type: ignore[misc]
    """``trl.DPOTrainer`` with the losses of ``loss_type`` weighted; see :class:`CoefficientsMixin`.

    Example::

        trainer = WeightedDPOTrainer(
            model=model,
            args=DPOConfig("out", loss_type=["sigmoid", "sft"]),
            train_dataset=pairs,
            weighting=CoVWeighting(),
        )
        trainer.train()
    """


# ---- SFT -------------------------------------------------------------------------------------------------------------


class SFTWeightingMixin(CoefficientsMixin):
    """For trainers like SFT on a mixture of experts: the token loss, ``"nll"`` or ``"dft"``, and ``"aux_loss"``.

    The model must have a balance loss that is switched on: a ``router_aux_loss_coef`` that is not 0, whose value the
    weights take the place of. Methods that make losses alike give a balance loss far more than its usual 0.001 to 0.02:
    ``initial_weights``, ``Clamp`` or ``StaticWeighting`` keep it small.
    """

    router_aux_loss_coef: Any
    aux_loss_enabled: bool

    @property
    def bare(self) -> str:  # type: ignore[override]
        """The token loss."""
        name: str = self.args.loss_type
        return name

    def find_tasks(self) -> Sequence[str]:
        """The token loss, and the balance loss if there is one."""
        return [self.bare, *([BALANCE] if self.aux_loss_enabled else [])]

    def hand_in(self, coefficients: Mapping[str, Tensor]) -> None:
        """Into ``router_aux_loss_coef``."""
        self.router_aux_loss_coef = coefficients[BALANCE]


class WeightedSFTTrainer(SFTWeightingMixin, SFTTrainer):  # type: ignore[misc]
    """``trl.SFTTrainer`` on a mixture of experts, its balance loss weighted; see :class:`SFTWeightingMixin`.

    Example::

        trainer = WeightedSFTTrainer(
            model=mixture_of_experts,
            args=SFTConfig("out", router_aux_loss_coef=0.01),
            train_dataset=texts,
            weighting=StaticWeighting({"nll": 1.0, "aux_loss": 0.01}),
        )
        trainer.train()
    """


# ---- GKD -------------------------------------------------------------------------------------------------------------


class GKDWeightingMixin(CoefficientsMixin):
    """For GKD: its divergence from the teacher, ``"gkd"``, and the token loss on the data, ``"nll"``, as two tasks.

    GKD itself has the first alone. The second is taken of the same forward, over the same tokens, divided by the same
    number. Where the student wrote the tokens itself (``lmbda``), it is absent from the micro-batch.

    Example::

        from trl.experimental.gkd import GKDTrainer


        class WeightedGKDTrainer(GKDWeightingMixin, GKDTrainer):
            pass
    """

    bare = "gkd"
    needs_outputs = True
    _written_by_student = False

    def find_tasks(self) -> Sequence[str]:
        """Divergence and token loss."""
        return ["gkd", "nll"]

    def hand_in(self, coefficients: Mapping[str, Tensor]) -> None:
        """Nothing: the trainer has one loss of its own."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, whose tokens are the data's unless the student writes new ones."""
        self._written_by_student = False
        return super().training_step(*args, **kwargs)

    def generate_on_policy_outputs(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Notices who writes."""
        self._written_by_student = model is self.accelerator.unwrap_model(self.model)
        return super().generate_on_policy_outputs(model, *args, **kwargs)  # type: ignore[misc]

    def total(
        self, loss: Tensor, weights: Mapping[str, Tensor], inputs: Mapping[str, Any], outputs: Any, num_items: Any
    ) -> tuple[Tensor, Iterable[str]]:
        """The weighted sum of both."""
        total = loss * weights["gkd"]
        if self._written_by_student:
            return total, ["nll"]
        logits, labels = outputs.logits[:, :-1], inputs["labels"][:, 1:]
        number = (labels != -100).sum().clamp(min=1) if num_items is None else num_items
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / number
        return total + nll * weights["nll"], ()

    def _parts(self, num_items: Any) -> int:
        """As elsewhere; this trainer divides by the items of all processes, and the engine by their number as well."""
        everywhere = num_items is not None and self.args.average_tokens_across_devices
        return super()._parts(num_items) * (self.accelerator.num_processes if everywhere else 1)


# ---- messages ----------------------------------------------------------------------------------------------------


def _one_loss(cls: type, tasks: Sequence[str]) -> ValueError:
    """Nothing to weigh."""
    return ValueError(
        f"`{cls.__name__}` weighs the losses that its trainer sums, and found {list(tasks)} alone. DPO: name several "
        "in `loss_type`. SFT: train a mixture of experts whose `router_aux_loss_coef` is not 0."
    )


def _numbers_given(numbers: Sequence[float]) -> ValueError:
    """Coefficients of the user's own, and a method."""
    return ValueError(
        f"`loss_weights = {list(numbers)!r}` was given, and `weighting` takes its place: leave it out. Fixed weights "
        "are `weighting=StaticWeighting({loss_type: weight})`; where a method starts is "
        "`weighter_options={'initial_weights': {loss_type: weight}}`."
    )
