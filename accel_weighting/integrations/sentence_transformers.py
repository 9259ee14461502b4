"""Loss weighting in sentence-transformers' trainers: a mixin for any of them, and the ``SentenceTransformerTrainer``.

The library collects features, wraps the model, calls the losses, logs their parts, evaluates and saves as ever. What is
new: the losses of a training batch are weighed before they are summed, and the sentence embedding is the branch point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from accel_weighting.methods.carry import CarryForward
from accel_weighting.methods.loss_scale import ScaleInvariant
from accel_weighting.methods.static import EqualWeighting, StaticWeighting
from accel_weighting.methods.uncertainty import IMTLL, UncertaintyWeighting
from accel_weighting.statistics import Method
from accel_weighting.weighter import Weighter

from .base import WeighterMixin

try:
    from sentence_transformers import SentenceTransformerTrainer
except ImportError as error:
    raise ImportError(
        "WeightedSentenceTransformerTrainer needs sentence-transformers: "
        "pip install 'accel-weighting[sentence-transformers]'."
    ) from error

EMBEDDING = "sentence_embedding"
"""What the shared representation is called among a model's outputs."""

ALONE = (EqualWeighting, StaticWeighting, UncertaintyWeighting, IMTLL, ScaleInvariant)
"""Methods whose weight of a task depends on that task alone."""


class SentenceTransformerWeightingMixin(WeighterMixin):
    """Weighs losses in any of the library's trainers: ``class Mine(SentenceTransformerWeightingMixin, SomeTrainer)``.

    - **Several data sets**, ``loss={"sts": …, "nli": …}`` with a data set for each: one task per batch, and the data
      sets are the tasks. A method that compares tasks is put into :class:`~accel_weighting.CarryForward`.
    - **Several losses of one batch**, ``loss={"rank": …, "spread": …}`` with one data set: every loss is taken of every
      batch, and the model embeds it once for all of them. Their names are the tasks.
    - **A loss that returns a dictionary**: its keys are the tasks, named in ``tasks``. Where the method needs
      gradients, the loss is called once per task on the same embeddings.

    Methods that need gradients measure them at the sentence embedding. Evaluation is the library's own: unweighted
    losses, and its evaluators. Weights, losses and gradient norms join the logs, and checkpoints hold the weighter.

    Args:
        model, args, train_dataset, eval_dataset, loss, *more, **kwargs: For the trainer.
        weighting: A weighting method, such as ``GradNorm(alpha=1.5)``.
        tasks: Task names, where they cannot be known: those of a loss that returns a dictionary.
        carry: For how many optimizer steps a data set's last loss and gradient norm stand for it where a step lacks it;
            None: the method is taken as it is.
        weighter_options: More arguments of :class:`~accel_weighting.Weighter`, such as ``{"update_every": 4}``.

    Raises:
        ValueError: The tasks are not known, or the method cannot be used with these losses; the message says why.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        loss: Any = None,
        *more: Any,
        weighting: Method,
        tasks: Sequence[str] | None = None,
        carry: int | None = 50,
        weighter_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        data = train_dataset if train_dataset is not None else eval_dataset
        self._by_data_set = isinstance(loss, Mapping) and isinstance(data, Mapping)
        self._embeddings = _Embeddings()
        options = dict(weighter_options or {})
        if "moments" in weighting.needs:
            raise _rotated(weighting)
        if self._by_data_set:
            tasks = tasks or [name for name in loss if name in data]
            if "gram" in weighting.needs and not {"shared_layer", "shared_parameters"} & options.keys():
                raise _never_meet(weighting)
            if carry is not None and _compares(weighting):
                weighting = CarryForward(weighting, steps=carry)
        else:
            tasks = tasks or (list(loss) if isinstance(loss, Mapping) else None)
            if tasks is None:
                raise _without_tasks(loss)
            loss = _of_one_batch(loss, tasks, weighting, self._embeddings)
        given = (model, args, train_dataset, eval_dataset, loss, *more)
        super().__init__(*given, weighting=weighting, tasks=tasks, weighter_options=options, **kwargs)
        if self.args.n_gpu > 1:
            raise _data_parallel(self.args.n_gpu)

    def _build_weighter(self) -> None:
        super()._build_weighter()
        self._embeddings.hook(self.model, self.weighter)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted total of a training batch; in evaluation what the library's trainer computes."""
        theirs = super().compute_loss  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return theirs(model, inputs, return_outputs, num_items_in_batch)
        if self._by_data_set:
            self._embeddings.task = task = inputs["dataset_name"]
            losses = {task: theirs(model, inputs)}
        else:
            theirs(model, inputs)
            losses = self.loss.take()  # type: ignore[attr-defined]
        total = self.weighter.combine(losses)
        return (total, {}) if return_outputs else total

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch. A gradient cache embeds again in the backward, and that is of the same task."""
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._embeddings.task = None


class WeightedSentenceTransformerTrainer(SentenceTransformerWeightingMixin, SentenceTransformerTrainer):  # type: ignore[misc]
    """``SentenceTransformerTrainer`` with weighted losses; see :class:`SentenceTransformerWeightingMixin`.

    Example::

        trainer = WeightedSentenceTransformerTrainer(
            model=model,
            train_dataset={"sts": sts, "nli": nli},
            loss={"sts": CoSENTLoss(model), "nli": MultipleNegativesRankingLoss(model)},
            weighting=GradNorm(alpha=1.5),
        )
        trainer.train()
    """


class SeveralLosses(nn.Module):
    """Several losses of one batch: a loss that returns a dictionary, each value from an alias of the embeddings.

    Args:
        losses: ``{task: loss}``, or one loss that returns a dictionary.
        tasks: Task names.
        embeddings: The branch point.
        divided: Whether every task gets its own alias.
    """

    def __init__(
        self, losses: Mapping[str, nn.Module] | nn.Module, tasks: Sequence[str], embeddings: _Embeddings, divided: bool
    ) -> None:
        super().__init__()
        parts = list(losses.values()) if isinstance(losses, Mapping) else [losses]
        model = next((part.model for part in parts if hasattr(part, "model")), None)
        if model is not None:
            self.model = model  # the trainer puts its wrapped model here, and in all losses
        self.losses = nn.ModuleList(parts)
        self.tasks = tuple(tasks)
        self.names = tuple(losses) if isinstance(losses, Mapping) else None
        self._embeddings, self._divided = embeddings, divided
        self._shares = not any(_embeds_on_its_own(part) for part in parts)
        self._last: dict[str, Tensor] = {}

    def forward(self, features: Any, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The losses by task."""
        divided = self._divided and torch.is_grad_enabled()
        if self.names is None and not divided:
            losses = _checked(self.losses[0](features, labels))
        else:
            with self._shared(), self._embeddings.of(self.tasks[0] if divided else None):
                losses = dict(self._each(features, labels, divided))
        self._last = losses
        return losses

    def _each(self, features: Any, labels: Tensor | None, divided: bool) -> Iterator[tuple[str, Tensor]]:
        """One task after the other."""
        for k, task in enumerate(self.tasks if self.names is None else self.names):
            self._embeddings.task = task if divided else None
            loss = self.losses[0 if self.names is None else k](features, labels)
            if self.names is not None:
                yield task, torch.stack(list(loss.values())).sum() if isinstance(loss, Mapping) else loss
            elif task in _checked(loss):
                yield task, loss[task]

    def _shared(self) -> Any:
        """Whoever embeds the same features again gets the same embeddings."""
        model = getattr(self, "model", None)
        return self._embeddings.embedded_once(model if self._shares else None)

    def take(self) -> dict[str, Tensor]:
        """The losses of the last batch, once."""
        last, self._last = self._last, {}
        return last


class _Embeddings:
    """The branch point: a hook on the module that gives the sentence embedding.

    A copy of the model, and one in another process, has a copy that divides nothing.

    Attributes:
        task: Whose alias the losses are to get; None: the embedding as it is.
    """

    def __init__(self) -> None:
        self.task: str | None = None
        self._weighter: Weighter | None = None
        self._handle: Any = None
        self._aliases: Mapping[str, Tensor] | None = None

    def __reduce__(self) -> Any:
        return _Embeddings, ()

    def hook(self, model: nn.Module, weighter: Weighter) -> None:
        """From now on at this model."""
        if self._handle is not None:
            self._handle.remove()
        self._weighter = weighter
        self._handle = list(model.children())[-1].register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward of the model ends."""
        if self.task is None or self._weighter is None or not torch.is_grad_enabled():
            return
        if EMBEDDING in output:
            self._aliases = self._weighter.branch(output[EMBEDDING])
            output[EMBEDDING] = self._aliases[self.task]
        elif self._weighter.method.needs - {"losses"}:
            raise _without_embedding(module, output)

    @contextmanager
    def of(self, task: str | None) -> Iterator[None]:
        """``with``: embeddings are divided, from here on, and not after it."""
        self.task = task
        try:
            yield
        finally:
            self.task = None

    @contextmanager
    def embedded_once(self, model: nn.Module | None) -> Iterator[None]:
        """``with``: the model's forward runs once for the same features; later callers get their task's alias."""
        if model is None:
            yield
            return
        its_own, forward = vars(model).get("forward"), model.forward
        seen: dict[Any, tuple[Any, dict[str, Any], Any]] = {}

        def once(features: Any, *args: Any, **kwargs: Any) -> Any:
            key = id(features), args, tuple(sorted(kwargs.items()))
            if key not in seen:
                self._aliases = None
                output = forward(features, *args, **kwargs)
                seen[key] = features, dict(output), self._aliases
                return output
            _, output, aliases = seen[key]
            if aliases is None or self.task is None:
                return dict(output)
            return {**output, EMBEDDING: aliases[self.task].to(output[EMBEDDING].dtype)}

        model.forward = once
        try:
            with _columns_apart():
                yield
        finally:
            del model.forward
            if its_own is not None:
                model.forward = its_own


def _columns_apart() -> Any:
    """Losses hand on the features they were given, instead of new ones that join several columns."""
    from sentence_transformers.base.losses import column_merging_disabled

    return column_merging_disabled()


def _of_one_batch(loss: Any, tasks: Sequence[str], method: Method, embeddings: _Embeddings) -> Any:
    """What the library is given as its loss: a loss, or what makes one of a model where the user gave that."""
    needs_gradients = bool(method.needs - {"losses"})

    def built(losses: Any) -> SeveralLosses:
        parts = list(losses.values()) if isinstance(losses, Mapping) else [losses]
        alone = [type(part).__name__ for part in parts if _embeds_on_its_own(part)]
        if alone and needs_gradients:
            raise _embed_on_their_own(alone, method)
        divided = not alone and (needs_gradients or isinstance(losses, Mapping))
        return SeveralLosses(losses, tasks, embeddings, divided)

    makers = [part for part in (loss.values() if isinstance(loss, Mapping) else [loss]) if not _is_loss(part)]
    if not makers:
        return built(loss)

    def make(part: Any, model: nn.Module) -> Any:
        return part if _is_loss(part) else part(model)

    def made(model: nn.Module) -> SeveralLosses:
        if isinstance(loss, Mapping):
            return built({name: make(part, model) for name, part in loss.items()})
        return built(make(loss, model))

    return made


def _is_loss(loss: nn.Module | Callable[[nn.Module], nn.Module]) -> bool:
    return isinstance(loss, nn.Module)


def _embeds_on_its_own(loss: nn.Module) -> bool:
    """Whether it embeds the batch in its own way: again in the backward (gradient caching), or layer by layer."""
    return any(
        getattr(part, "uses_gradient_cache", False) or type(part).__name__ == "AdaptiveLayerLoss"
        for part in loss.modules()
    )


def _compares(method: Any) -> bool:
    """Whether its weights come from several tasks, so that it has to know all of them."""
    inner = method
    while True:
        if getattr(inner, "carries", False) or isinstance(inner, ALONE):
            return False
        if not isinstance(getattr(inner, "method", None), Method):
            return True
        inner = inner.method


def _checked(losses: Any) -> dict[str, Tensor]:
    """What a loss gave that was said to give several.

    Raises:
        TypeError: It gave one.
    """
    if not isinstance(losses, Mapping):
        raise _one_loss(losses)
    return dict(losses)


# ---- messages ----------------------------------------------------------------------------------------------------


def _data_parallel(gpus: int) -> NotImplementedError:
    """One process with several GPUs."""
    return NotImplementedError(
        f"torch's DataParallel would divide every batch over {gpus} GPUs of this one process, where the gradients of a "
        "task cannot be told apart: start one process per GPU, with `accelerate launch` or torchrun."
    )


def _without_tasks(loss: Any) -> ValueError:
    """One loss, whose parts have no names yet."""
    return ValueError(
        "There is nothing to weigh yet. Give `loss` as a dictionary (a loss for each data set, or several losses for "
        "one data set), or `tasks`, the keys of a loss that returns a dictionary. "
        f"Found `loss` of type {type(loss).__name__} and `tasks = None`."
    )


def _one_loss(loss: Any) -> TypeError:
    """A loss that was said to have several tasks."""
    return TypeError(
        "The loss must return a dictionary, {task: scalar}, whose keys are `tasks`. Found a "
        f"{type(loss).__name__}. For several losses give `loss` as a dictionary."
    )


def _rotated(method: Method) -> ValueError:
    """Rotations would not be in the saved model."""
    return ValueError(
        "Parameter `weighting` must not rotate: a sentence embedding is what the model is saved for, and no head "
        f"follows it that could undo a rotation. Found `weighting = {method}`."
    )


def _never_meet(method: Method) -> ValueError:
    """Inner products of gradients of different samples."""
    return ValueError(
        f"{method} compares the directions of the tasks' gradients, and data sets have samples of their own, so that "
        "at the sentence embedding their inner products are exactly 0. Use a method that compares losses or norms, "
        "such as GradNorm, or `weighter_options={'shared_layer': …}` with a layer whose output is the embedding."
    )


def _embed_on_their_own(names: Sequence[str], method: Method) -> ValueError:
    """Losses of one batch that have no embedding in common."""
    return ValueError(
        f"{method} compares gradients at the embeddings that several losses of a batch share, and "
        f"{', '.join(names)} embeds the batch in its own way (again in the backward, or layer by layer). Use the loss "
        "without gradient caching or layers, a method that reads losses only, such as CoVWeighting, or a data set for "
        "each loss."
    )


def _without_embedding(module: nn.Module, output: Any) -> TypeError:
    """A model that gives no sentence embedding, and a method that measures there."""
    return TypeError(
        f"Gradients are measured at the `{EMBEDDING}`, and the model's last module, {type(module).__name__}, gave "
        f"{sorted(map(str, output))}. Use a method that reads losses only, such as CoVWeighting."
    )
