"""Every message a user can meet: what was given or happened, the rule, what was found, and what to do."""

from __future__ import annotations

import difflib
import logging
import math
import numbers
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .statistics import Method
from .window import EXTRAS

logger = logging.getLogger("accel_weighting")


# ---- construction ----------------------------------------------------------------------------------------------


def task_names(tasks: Any) -> tuple[str, ...]:
    """Task names: at least one, strings, none twice."""
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise TypeError(f"Parameter `tasks` must be a sequence of task names. Found `tasks = {tasks!r}`.")
    names = tuple(tasks)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"Parameter `tasks` must be one or more non-empty strings. Found `tasks = {list(names)!r}`.")
    if len(set(names)) < len(names):
        raise ValueError(f"Parameter `tasks` must not repeat a name. Found `tasks = {list(names)!r}`.")
    return names


def known(names: Iterable[Any], tasks: Sequence[str], otherwise: str = "") -> None:
    """Every name is a task of this weighter; a message says ``otherwise`` where none is like it."""
    unknown = [name for name in names if name not in tasks]
    if not unknown:
        return
    name = unknown[0]
    close = difflib.get_close_matches(str(name), tasks, 1)
    hint = f" Did you mean {close[0]!r}?" if close else otherwise
    which = f"Unknown task {name!r}" if len(unknown) == 1 else f"Unknown tasks {unknown!r}"
    raise ValueError(f"{which}. This weighter was built with `tasks = {list(tasks)!r}`.{hint}")


def method(value: Any) -> Any:
    """An instance of a method."""
    if not isinstance(value, Method):
        found = f"the class {value.__name__}: call it" if isinstance(value, type) else repr(value)
        raise TypeError(f"Parameter `method` must be a method such as `GradNorm()`. Found {found}.")
    return value


def rotating(method: Method) -> Any:
    """A method that rotates says how: see ``rotations.RotatingMethod``."""
    if not callable(getattr(method, "widen", None)):
        raise TypeError(
            f'{method} names "moments" among its needs, and so must have `widen(state, width) -> state`, which adds '
            'the rotations, a tensor [K, m, m], to the state as "rotations". See the docstring of `Method`.'
        )
    return method


def positive_by_task(argument: str, values: Any, tasks: Sequence[str]) -> dict[str, float]:
    """``{task: positive finite number}``, tasks known; None is empty."""
    return _by_task(argument, values, tasks, "positive finite numbers", lambda x: 0 < x < math.inf)


def finite_by_task(argument: str, values: Any, tasks: Sequence[str]) -> dict[str, float]:
    """``{task: finite number}``, tasks known; None is empty."""
    return _by_task(argument, values, tasks, "finite numbers", math.isfinite)


def _by_task(
    argument: str, values: Any, tasks: Sequence[str], kind: str, allowed: Callable[[float], bool]
) -> dict[str, float]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"Parameter `{argument}` must be a dictionary {{task: number}}. Found {values!r}.")
    known(values, tasks)
    wrong = {
        task: value
        for task, value in values.items()
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not allowed(float(value))
    }
    if wrong:
        raise ValueError(f"Parameter `{argument}` must hold {kind}. Found {wrong!r}.")
    return {task: float(values[task]) for task in tasks if task in values}  # in an order that all processes share


def extra_losses(extra: Any, tasks: Sequence[str], names: list[str]) -> Mapping[str, Tensor]:
    """``{name: scalar loss}``, none of them a task's; new names join those that are known, ``EXTRAS`` in all."""
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):
        raise TypeError(f"Parameter `extra` must be a dictionary {{name: loss}}. Found {type(extra).__name__}.")
    for name, loss in extra.items():
        if name in tasks or not isinstance(name, str):
            raise ValueError(f"Parameter `extra` must name losses that are no tasks. Found {name!r}.")
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"Extra loss `{name}` must be a floating-point tensor of shape []. Found {found}.")
    new = [name for name in extra if name not in names]
    if len(names) + len(new) > EXTRAS:
        raise ValueError(f"Parameter `extra` can name {EXTRAS} losses in all. Found {[*names, *new]!r}.")
    names += new
    return extra


def warn_replaced(tasks: Sequence[str]) -> None:
    """A second weighter with the same tasks on the same heads."""
    warnings.warn(
        f"These heads carry a weighter of the tasks {list(tasks)!r} already: the new one replaces it, and the older "
        "one is done. Build one weighter, before the loop; where a new one is meant, call `detach()` on the older one.",
        stacklevel=4,
    )


def at_least(argument: str, value: Any, low: int) -> int:
    """An integer not below ``low``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
        raise ValueError(
            f"Parameter `{argument}` must be an integer of at least {low}. Found `{argument} = {value!r}`."
        )
    return int(value)


def more_than(argument: str, value: Any, low: int) -> float | None:
    """A finite number above ``low``, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low < float(value) < math.inf:
        raise ValueError(
            f"Parameter `{argument}` must be None or a finite number above {low}. Found `{argument} = {value!r}`."
        )
    return float(value)


def lag(value: Any, needs: frozenset[str], acts_on: str, method: str) -> int:
    """0 or 1, and what a lag of 0 cannot do."""
    if value not in (0, 1):
        raise ValueError(f"Parameter `lag` must be 0 or 1. Found `lag = {value!r}`.")
    if value == 0 and acts_on == "losses" and needs & {"norms", "gram", "moments"}:
        raise ValueError(
            f"{method} weighs losses by their gradients, which are known only after the heads' backward: "
            "`lag = 0` is not possible. Use `lag = 1`: the weights of a step come from the steps before it."
        )
    return int(value)


def heads(given: Any, tasks: Sequence[str], model: nn.Module | None) -> None:
    """One head per task, each its own module or the dotted name of one."""
    if not isinstance(given, Mapping):
        raise TypeError(f"Parameter `heads` must be a dictionary {{task: module or dotted name}}. Found {given!r}.")
    known(given, tasks)
    if missing := [task for task in tasks if task not in given]:
        raise ValueError(
            f"Parameter `heads` must name a head for every task. Missing: {missing!r}. "
            "Where a task has no head of its own, call `weighter.branch(z)` in the model's forward instead."
        )
    plain = {task: head[0] if _names_an_argument(head) else head for task, head in given.items()}
    wrong = {task: type(head).__name__ for task, head in plain.items() if not isinstance(head, (nn.Module, str))}
    if wrong:
        raise TypeError(
            "Parameter `heads` must hold modules or dotted names, or one of them with the name of an argument: "
            f'("decoder", "memory"). Found {wrong!r}.'
        )
    if model is None and (names := [head for head in plain.values() if isinstance(head, str)]):
        raise ValueError(
            f"Dotted names in `heads` are looked up in `model`, which was not given. Found {names!r}. Pass "
            "`model=model` too, or the modules instead of their names."
        )


def _names_an_argument(head: Any) -> bool:
    return isinstance(head, tuple) and len(head) == 2 and isinstance(head[1], str)


def heads_are_distinct(found: Sequence[nn.Module], tasks: Sequence[str]) -> None:
    """No two tasks share a head."""
    owners: dict[int, list[str]] = {}
    for task, head in zip(tasks, found, strict=True):
        owners.setdefault(id(head), []).append(task)
    if shared := [names for names in owners.values() if len(names) > 1]:
        raise ValueError(
            f"Tasks {shared[0]!r} were given one and the same head, so their gradients cannot be told apart there. "
            "Call `weighter.branch(z)` in the model's forward and give each task's loss its own alias."
        )


def yes_no_or_none(argument: str, value: Any) -> bool | None:
    """True, False or None."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"Parameter `{argument}` must be True, False or None. Found `{argument} = {value!r}`.")
    return value


def uneven_inputs(accelerator: Any) -> None:
    """The loader that is being iterated may give processes different numbers of steps."""
    if accelerator.num_processes == 1:
        return
    loader = accelerator.gradient_state.active_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    if not getattr(sampler, "even_batches", True) and not getattr(sampler, "drop_last", False):
        raise ValueError(
            f"Uneven inputs are not supported: the {type(loader).__name__} that is being iterated has "
            "`even_batches=False` (of the accelerator, or of `join_uneven_inputs`) and does not drop its last "
            "batch, so that processes can take different numbers of steps. Use `even_batches=True`, or "
            "`drop_last=True` in the loader."
        )


def warn_without_the_accelerator() -> None:
    """There is an Accelerator in this process, and the weighter was not given it."""
    logger.warning(
        "`Weighter` was built without `accelerator=`, and this process has an Accelerator. Without it every `backward` "
        "is an optimizer step: gradients are not divided by `gradient_accumulation_steps` and losses are not scaled. "
        "Pass `accelerator=accelerator`."
    )


def started_alone(launched: int | None) -> None:
    """The environment speaks of several processes, and the accelerator sees one; None: one was started.

    Raises:
        RuntimeError: Several trainings would run side by side.
    """
    if launched is not None:
        raise RuntimeError(
            f"{launched} processes were launched (WORLD_SIZE), but this accelerator sees one: they would train "
            "apart, each on all of the data. On CPU, launch with ACCELERATE_USE_CPU=true or build "
            "Accelerator(cpu=True)."
        )
    warnings.warn(
        "The environment says that a launcher was told of several processes and started one (MASTER_ADDR is set, "
        "RANK is not), as `accelerate launch --cpu --num_processes N` does: this training has one process. For several "
        "on a CPU, let `python -m accel_weighting.launch_configs cpu_2` write a configuration, and launch with it: "
        "`accelerate launch --config_file launch_configs/cpu_2.yaml --num_processes N …`.",
        stacklevel=4,
    )


# ---- what comes with a backward --------------------------------------------------------------------------------


_NOT_WEIGHED = (
    " A term that is added as it is comes beside the losses, `extra={name: loss}`; a sum of the losses is left out."
)


def losses_by_task(losses: Any, tasks: Sequence[str]) -> Mapping[str, Tensor]:
    """The losses by name, whatever they came in, every one checked; all offenders are named at once."""
    named = _named(losses, tasks)
    if len(named) != len(tasks) or not all(map(named.__contains__, tasks)):
        known(named, tasks, _NOT_WEIGHED)
    if not named:
        raise ValueError("Parameter `losses` is empty: give the loss of at least one task.")
    for loss in named.values():
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            raise _not_scalars(named)
    return named


def _named(losses: Any, tasks: Sequence[str]) -> Mapping[str, Any]:
    if type(losses) is dict or isinstance(losses, Mapping):
        return losses
    if hasattr(losses, "_asdict"):
        by_name: dict[str, Any] = losses._asdict()
        return by_name
    if isinstance(losses, Tensor) and losses.ndim == 0 and len(tasks) > 1:
        raise ValueError(
            f"Losses must come unsummed, one per task of {list(tasks)!r}: they are weighed one by one. Found one "
            "number (shape []). What is added as it is comes beside them: `extra={name: loss}`."
        )
    if isinstance(losses, Tensor) and losses.ndim != 1:
        raise ValueError(
            f"Losses given as one tensor must have shape [{len(tasks)}], one entry per task. "
            f"Found shape {list(losses.shape)}."
        )
    if not isinstance(losses, (list, tuple, Tensor)):
        raise TypeError(
            "Parameter `losses` must be a dictionary {task: loss}, a list, a tuple, a namedtuple or a 1-D tensor. "
            f"Found {type(losses).__name__}."
        )
    if len(losses) != len(tasks):
        raise ValueError(
            f"Losses without names must be one per task, in the order of `tasks = {list(tasks)!r}`. "
            f"Found {len(losses)} of them."
        )
    return dict(zip(tasks, losses, strict=True))


def _not_scalars(named: Mapping[str, Any]) -> Exception:
    """Losses that are not floating-point tensors of shape []."""
    complaints = []
    for task, loss in named.items():
        if not isinstance(loss, Tensor):
            complaints.append(
                f"Loss `{task}` must be a floating-point tensor of shape []. Found {type(loss).__name__}."
                f"{' Pass the loss itself, without `.item()`.' if isinstance(loss, float) else ''}"
            )
        elif not loss.is_floating_point() or loss.ndim:
            cure = ": reduce it first, e.g. `loss.mean()`" if loss.ndim else ""
            complaints.append(
                f"Loss `{task}` must be a floating-point tensor of shape []. "
                f"Found dtype {str(loss.dtype).removeprefix('torch.')}, shape {list(loss.shape)}{cure}."
            )
    kind = ValueError if all("shape [" in c and "dtype" in c for c in complaints) else TypeError
    return kind("\n".join(complaints))


_REQUIRES_GRAD = operator.attrgetter("requires_grad")


def losses_have_graphs(losses: Mapping[str, Tensor], tasks: Sequence[str], present: Iterable[int]) -> None:
    """Gradients are enabled, so every loss that counts must lead somewhere."""
    if all(map(_REQUIRES_GRAD, losses.values())):
        return
    if detached := [tasks[k] for k in sorted(present) if not losses[tasks[k]].requires_grad]:
        raise ValueError(
            "\n".join(f"Loss `{task}` does not require grad: it was detached before it came here." for task in detached)
            + "\nPass losses as the model computed them, without `.detach()`, and computed with gradients enabled."
        )


def counts_are_integers(wrong: Mapping[str, Any]) -> None:
    """No count is anything else than an integer of at least 0."""
    if wrong:
        raise ValueError(
            "Parameter `num_items` must be a number of items, an integer of at least 0, or {task: such a number}. "
            f"Found {wrong!r}."
        )


def every_loss_is_counted(losses: Iterable[str], counts: Mapping[str, float]) -> None:
    """Positive counts come for all losses of a block."""
    if uncounted := [task for task in losses if task not in counts]:
        raise ValueError(
            "Positive counts in `num_items` must come for every task of the block or for none. "
            f"Missing: {uncounted!r}. A count of 0 alone is allowed: it says that the task is not in this block."
        )


def shared_layer_goes_with(method: str, rotates: bool, lag: int) -> None:
    """Gradients at a layer's weight are neither rotated, nor compared in the backward itself."""
    if rotates:
        raise ValueError(f"{method} acts on the shared representation itself: leave `shared_layer` out.")
    if lag == 0:
        raise ValueError(
            "With `lag = 0` gradients are compared in the backward itself, at the shared representation: leave "
            "`shared_layer` out, or use `lag = 1`."
        )


def warn_saved_inside_window(blocks: int) -> None:
    """State was asked for with micro-batches in the window."""
    verb = "is" if blocks == 1 else "are"
    warnings.warn(
        f"Saved inside an accumulation window: {blocks} of its micro-steps {verb} lost; save on "
        "`accelerator.sync_gradients`.",
        stacklevel=4,
    )
