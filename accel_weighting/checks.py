"""Every message a user can meet: what was given or happened, the rule, what was found, and what to do."""

from __future__ import annotations

import difflib
import logging
import math
import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .statistics import Method

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


def known(names: Iterable[Any], tasks: Sequence[str]) -> None:
    """Every name is a task of this weighter."""
    unknown = [name for name in names if name not in tasks]
    if not unknown:
        return
    name = unknown[0]
    close = difflib.get_close_matches(str(name), tasks, 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    which = f"Unknown task {name!r}" if len(unknown) == 1 else f"Unknown tasks {unknown!r}"
    raise ValueError(f"{which}. This weighter was built with `tasks = {list(tasks)!r}`.{hint}")


def method(value: Any) -> Any:
    """An instance of a method."""
    if not isinstance(value, Method):
        found = f"the class {value.__name__}: call it" if isinstance(value, type) else repr(value)
        raise TypeError(f"Parameter `method` must be a method such as `GradNorm()`. Found {found}.")
    return value


def positive_by_task(argument: str, values: Any, tasks: Sequence[str]) -> dict[str, float]:
    """``{task: positive finite number}``, tasks known; None is empty."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"Parameter `{argument}` must be a dictionary {{task: number}}. Found {values!r}.")
    known(values, tasks)
    wrong = {
        task: value
        for task, value in values.items()
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < float("inf")
    }
    if wrong:
        raise ValueError(f"Parameter `{argument}` must hold positive finite numbers. Found {wrong!r}.")
    return {task: float(values[task]) for task in tasks if task in values}  # in an order that all processes share


def at_least(argument: str, value: Any, low: int) -> int:
    """An integer not below ``low``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
        raise ValueError(
            f"Parameter `{argument}` must be an integer of at least {low}. Found `{argument} = {value!r}`."
        )
    return int(value)


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
    wrong = {task: type(head).__name__ for task, head in given.items() if not isinstance(head, (nn.Module, str))}
    if wrong:
        raise TypeError(f"Parameter `heads` must hold modules or dotted names. Found {wrong!r}.")
    if model is None and (names := [head for head in given.values() if isinstance(head, str)]):
        raise ValueError(f"Dotted names in `heads` are looked up in `model`, which was not given. Found {names!r}.")


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


def modules_not_found(names: Sequence[str]) -> ValueError:
    """Dotted names that lead nowhere."""
    return ValueError(f"`model` has no submodule called {', '.join(map(repr, names))}. See `model.named_modules()`.")


def layer_without_model(name: str) -> ValueError:
    """A name and nothing to look it up in."""
    return ValueError(f"The name `shared_layer = {name!r}` is looked up in `model`, which was not given.")


def shared_layer(layer: Any) -> nn.Linear:
    """The shared layer is a Linear."""
    if not isinstance(layer, nn.Linear):
        raise TypeError(
            "Parameter `shared_layer` must be an nn.Linear whose output is the branch point (or its dotted name in "
            f"`model`). Found {type(layer).__name__}. Leave it out to take gradients at the shared representation."
        )
    return layer


def unsupported_engine(kind: str, supported: Sequence[str]) -> NotImplementedError:
    """An engine that does not run one plain backward."""
    return NotImplementedError(
        f"accel_weighting supports the distributed types {', '.join(supported)}. Found {kind}, whose backward does "
        "not pass through `accelerator.backward` as one autograd pass."
    )


def uneven_inputs(accelerator: Any) -> None:
    """Processes that may take different numbers of steps; `join_uneven_inputs` says so to the dataloader alone."""
    if accelerator.num_processes == 1:
        return
    sampler = getattr(accelerator.gradient_state.active_dataloader, "batch_sampler", None)
    if not accelerator.even_batches or not getattr(sampler, "even_batches", True):
        raise ValueError(
            "Uneven inputs are not supported: `even_batches=False` (of the accelerator, or in `join_uneven_inputs`) "
            "lets processes take different numbers of steps. Use `even_batches=True` or drop the last batch."
        )


def several_processes_without_accelerator() -> ValueError:
    """``accelerator=None`` under a launcher."""
    return ValueError(
        "Several processes run and neither `accelerator` nor `process_group` was given: each process would follow "
        "its own weights. Pass the accelerator, or the process group to sum over."
    )


def warn_without_the_accelerator() -> None:
    """There is an Accelerator in this process, and the weighter was not given it."""
    logger.warning(
        "`Weighter` was built without `accelerator=`, and this process has an Accelerator. Without it every `backward` "
        "is an optimizer step: gradients are not divided by `gradient_accumulation_steps` and losses are not scaled."
    )


def warn_started_alone(launched: int | None) -> None:
    """The environment speaks of several processes, and the accelerator sees one; None: one was started."""
    if launched is None:
        message = (
            "The environment says that a launcher was told of several processes and started one (MASTER_ADDR is set, "
            "RANK is not): this training has one process. `accelerate launch --cpu --num_processes N` does that. On "
            "CPU, launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N."
        )
    else:
        message = (
            f"The environment says that {launched} processes were launched (WORLD_SIZE), but this accelerator sees "
            "one: they train apart, each on all of the data. On CPU, launch with ACCELERATE_USE_CPU=true or build "
            "Accelerator(cpu=True)."
        )
    warnings.warn(message, stacklevel=4)


# ---- what comes with a backward --------------------------------------------------------------------------------


def losses_by_task(losses: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
    """The losses by name, whatever they came in, every one checked; all offenders are named at once."""
    if isinstance(losses, Mapping):
        named = dict(losses)
    elif hasattr(losses, "_asdict"):
        named = losses._asdict()
    else:
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
        named = dict(zip(tasks, losses, strict=True))
    known(named, tasks)
    if not named:
        raise ValueError("Parameter `losses` is empty: give the loss of at least one task.")
    complaints = []
    for task, loss in named.items():
        if not isinstance(loss, Tensor):
            complaints.append(
                f"Loss `{task}` must be a floating-point tensor of shape []. Found {type(loss).__name__}."
            )
        elif not loss.is_floating_point() or loss.ndim:
            cure = ": reduce it first, e.g. `loss.mean()`" if loss.ndim else ""
            complaints.append(
                f"Loss `{task}` must be a floating-point tensor of shape []. "
                f"Found dtype {str(loss.dtype).removeprefix('torch.')}, shape {list(loss.shape)}{cure}."
            )
    if complaints:
        kind = ValueError if all("shape [" in c and "dtype" in c for c in complaints) else TypeError
        raise kind("\n".join(complaints))
    return named


def losses_have_graphs(losses: Mapping[str, Tensor]) -> None:
    """Gradients are enabled, so every loss must lead somewhere."""
    detached = [task for task, loss in losses.items() if not loss.requires_grad]
    if detached:
        raise ValueError(
            "\n".join(f"Loss `{task}` does not require grad: it was detached before it came here." for task in detached)
        )


def item_counts(num_items: Any, losses: Mapping[str, Any], tasks: Sequence[str]) -> tuple[list[float] | None, set[int]]:
    """Counts per task (None where the block was not counted) and the tasks said to have no items in it."""
    if num_items is None:
        return None, set()
    given = num_items if isinstance(num_items, Mapping) else dict.fromkeys(losses, num_items)
    known(given, tasks)
    counts: dict[str, float] = {}
    wrong = {}
    for task, count in given.items():
        if isinstance(count, Tensor) and count.ndim == 0 and count.device.type == "cpu":
            count = count.item()
        number = float(count) if isinstance(count, numbers.Real) and not isinstance(count, bool) else -1.0
        if number >= 0 and number.is_integer():
            counts[task] = number
        else:
            wrong[task] = count
    if wrong:
        raise ValueError(
            "Parameter `num_items` must be a number of items, an integer of at least 0, or {task: such a number}. "
            f"Found {wrong!r}."
        )
    empty = {tasks.index(task) for task, count in counts.items() if count == 0}
    positive = {task: count for task, count in counts.items() if count > 0}
    if not positive:
        return None, empty
    if uncounted := [task for task in losses if task not in counts]:
        raise ValueError(
            "Positive counts in `num_items` must come for every task of the block or for none. "
            f"Missing: {uncounted!r}. A count of 0 alone is allowed: it says that the task is not in this block."
        )
    return [positive.get(task, 0.0) for task in tasks], empty


def gradients_disabled() -> RuntimeError:
    """``backward`` under no_grad."""
    return RuntimeError(
        "`weighter.backward` was called with gradients disabled. For evaluation use `weighter.combine(losses)`, which "
        "returns the weighted total and records nothing."
    )


def graph_already_freed() -> RuntimeError:
    """A second backward through one forward."""
    return RuntimeError(
        "The graph was already freed. Call `weighter.backward(losses)` once per forward, instead of "
        "`accelerator.backward`."
    )


def window_not_closed() -> RuntimeError:
    """The last window was due, and another begins."""
    return RuntimeError(
        "The last window was due and was not closed: call `weighter.step()` after `accelerator.backward` "
        "(`weighter.backward` does both), or `weighter.reset()` after an exception that every process caught."
    )


def empty_window() -> RuntimeError:
    """``step`` with nothing in the window."""
    return RuntimeError(
        "`weighter.step()` was called on an empty window: no losses came through `weighter.combine` since the last "
        "step. `weighter.backward` closes the window by itself."
    )


def losses_that_missed_the_branch(tasks: Sequence[str], frozen_trunk: bool, no_branch: bool) -> RuntimeError:
    """Losses of which no gradient arrived at the join."""
    names = ", ".join(f"`{task}`" for task in tasks)
    which = f"Loss {names} does" if len(tasks) == 1 else f"Losses {names} do"
    if frozen_trunk:
        return RuntimeError(
            "The shared representation does not require grad (all parameters before it are frozen): gradient-based "
            "methods have nothing to balance. Use a method that needs losses only, such as CoVWeighting."
        )
    if no_branch:
        return RuntimeError(
            f"{which} not depend on the branch: this weighter has no `heads`, and `weighter.branch(z)` was not called "
            "in the forward. A method that needs gradients needs one of them."
        )
    return RuntimeError(
        f"{which} not depend on the branch: no gradient of it arrived there. Branch inside the model's forward or name "
        "its head; what a prepared model returns is a copy under mixed precision."
    )


def hooks_are_not_pickled() -> TypeError:
    """A whole model with our hooks on its heads is to be written to a file."""
    return TypeError(
        "The model's heads carry hooks of a `Weighter`, which cannot be pickled. Save `model.state_dict()`, or remove "
        "the hooks first: `weighter.detach()`, or `weighter.fold_rotations()` where the method rotates."
    )


def head_without_input(task: str) -> TypeError:
    """A head that is called without a floating-point tensor."""
    return TypeError(
        f"The head of task `{task}` was called without a floating-point tensor, so there is no shared representation "
        "to branch. Call `weighter.branch(z)` in the model's forward instead of naming `heads`."
    )


def heads_and_branch() -> RuntimeError:
    """Both ways of branching at once."""
    return RuntimeError(
        "This weighter was built with `heads`, which divide the shared representation by themselves: do not call "
        "`weighter.branch(z)` too."
    )


def second_join_of_a_step() -> RuntimeError:
    """lag=0 and more than one join in a backward."""
    return RuntimeError(
        "With `lag = 0` the weights of a backward are decided when the tasks' gradients meet, so they must meet once. "
        "Here they met in several places: the model was run several times, or its heads were fed different tensors. "
        "Call `weighter.branch(z)` once in one forward, or use `lag = 1`."
    )


def shared_layer_cannot_rotate(method: str) -> ValueError:
    """Rotations at a shared layer's weight."""
    return ValueError(f"{method} acts on the shared representation itself: leave `shared_layer` out.")


def shared_layer_at_lag_0() -> ValueError:
    """The shared layer's matrices are summed once a window."""
    return ValueError(
        "With `lag = 0` gradients are compared in the backward itself, at the shared representation: leave "
        "`shared_layer` out, or use `lag = 1`."
    )


def no_rotations(method: str, rotates: bool) -> RuntimeError:
    """Rotations were asked for where there are none."""
    if not rotates:
        return RuntimeError(f"{method} has no rotations.")
    return RuntimeError(
        "The rotations are as large as the shared representation, which is known after the first forward: run one "
        "forward before asking for them."
    )


def head_cannot_be_folded(task: str, why: str) -> RuntimeError:
    """A head that does not begin with a Linear."""
    return RuntimeError(
        f"The rotation of task `{task}` cannot be folded into its head: {why}. Nothing was changed in any head. Let "
        "the head begin with an nn.Linear that alone reads its input (or name that Linear in "
        "`fold_rotations(heads=...)`), or keep the weighter for inference."
    )


def fold_needs_heads() -> ValueError:
    """Rotations to fold, and no heads to fold them into."""
    return ValueError(
        "This weighter was built without `heads`, so it does not know what reads the rotated representation: call "
        "`fold_rotations(heads={task: module or dotted name})` with the module that each alias of the branch goes into."
    )


def rotations_were_folded() -> RuntimeError:
    """The weighter is used after its end."""
    return RuntimeError(
        "The rotations were folded into the heads, and this weighter is done. To train on, build a new one: its "
        "rotations begin at the identity, which leaves the folded model as it is."
    )


def shared_layer_is_not_the_branch() -> ValueError:
    """Something lies between the layer and the branch."""
    return ValueError(
        "The output of `shared_layer` is not the tensor that is branched: something lies between (an activation, a "
        "norm, a pooling). Move what lies between into the heads, or leave `shared_layer` out."
    )


def losses_in_half_precision(dtype: str) -> str:
    """Losses that were computed, or cast by FSDP2 on their way out of the model, in half precision."""
    digits = "0.4" if dtype.endswith("bfloat16") else "0.05"
    return (
        f"Losses come in {dtype}, so that their statistics are rounded by up to {digits} %. Compute them in float32: "
        "`.float()` the logits before the loss. FSDP2 also casts the losses that a forward returns: give its plugin a "
        "`mixed_precision_policy` with `output_dtype=None`, which casts nothing, or with `output_dtype=torch.float32` "
        "where every layer outside of the FSDP units takes float32 inputs."
    )


# ---- verdicts, taken from reduced numbers ------------------------------------------------------------------------


def left_waiting(step: int) -> RuntimeError:
    """A collective that another process did not come to."""
    return RuntimeError(
        f"Another process did not come to optimizer step {step}: it ended, met an error of its own, or took another "
        "step than this one. All processes must take the same steps: no `break`, no `weighter.step()` and no "
        "`weighter.freeze()` on some of them alone, and no fewer batches there (`even_batches=False`, "
        "`join_uneven_inputs`). To stop early, let all of them ask `accelerator.check_trigger()`."
    )


def disagreement(descriptions: Sequence[Mapping[str, Any]], step: int) -> RuntimeError:
    """The processes do not agree; says about what, and who differs from most."""
    first = descriptions[0]
    differing = [key for key in first if any(other[key] != first[key] for other in descriptions)]
    tables = []
    for key in differing or ["state"]:
        owners: dict[str, list[int]] = {}
        for rank, description in enumerate(descriptions):
            owners.setdefault(str(description[key]), []).append(rank)
        by_number = sorted(owners.items(), key=lambda item: -len(item[1]))
        rows = [f"  process{'es' * (len(r) > 1)} {', '.join(map(str, r))}: {value}" for value, r in by_number]
        tables.append("\n".join([f"{key}:", *rows]))
    if "tasks" in differing:
        what = "The processes were built with different tasks"
    elif differing and "state" not in differing:
        what = f"The processes no longer agree at step {step}: different {', '.join(differing)}"
    else:
        what = f"The processes no longer agree at step {step}: weights, method state or settings differ"
    return RuntimeError(
        f"{what}.\n" + "\n".join(tables) + "\nWeights must only change through the weighter, and every process must "
        "build it alike and take the same steps."
    )


def mixed_counts(counted: int, blocks: int, step: int) -> ValueError:
    """Some blocks counted, some not."""
    return ValueError(
        f"Counts must come for all blocks of a window or for none. At optimizer step {step}, {counted} of {blocks} "
        "micro-batches over all processes came with positive `num_items`."
    )


def negative_losses(method: str, tasks: Sequence[str], losses: Sequence[float], step: int) -> ValueError:
    """A method that divides by losses met a negative one."""
    found = ", ".join(f"Task `{t}` averaged {x:.4g}" for t, x in zip(tasks, losses, strict=True))
    return ValueError(
        f"{method} divides by losses and needs them positive. {found} over optimizer step {step}. Shift it or use a "
        "method without loss ratios."
    )


def unrelated_gradients(method: str, step: int) -> RuntimeError:
    """The Gram matrix is needed and only norms are known."""
    return RuntimeError(
        f"{method} needs the inner products of the tasks' gradients, but at optimizer step {step} the heads were fed "
        "different tensors, so that only norms are known. Call `weighter.branch(z)` once in the model's forward and "
        "derive every head's input from its own alias."
    )


def no_sample_is_shared(method: str, rotates: bool) -> str:
    """Gradients of different tasks sit in different rows of z."""
    cure = (
        "The rotations stay where they are."
        if rotates
        else "Give `shared_layer`, an nn.Linear whose output is the branch point: gradients of different samples meet "
        "at its weight."
    )
    return (
        f"{method} compares the gradients of different tasks, but no sample of this window had two of them, so that at "
        f"the shared representation their inner products are exactly 0 and no conflict can be seen. {cure}"
    )


def not_finite(what: str, tasks: Sequence[str], counts: Sequence[int], world: int, step: int) -> str:
    """Which losses or gradients were not finite, and where; weights are held."""
    parts = [
        (f"Loss `{t}`" if what == "loss" else f"Gradient of loss `{t}` at the shared representation")
        + f" was not finite on {n} of {world} processes"
        for t, n in zip(tasks, counts, strict=True)
        if n
    ]
    return f"{'; '.join(parts)} at optimizer step {step}; weights are held."


def too_many_held(message: str, held: int, limit: int) -> RuntimeError:
    """Held steps in a row beyond the limit."""
    return RuntimeError(
        f"{message} {held} steps in a row exceed `max_skipped_steps = {limit}`: look for the cause in the data or the "
        "learning rate."
    )


# ---- state -------------------------------------------------------------------------------------------------------


def not_our_state(state: Any) -> ValueError:
    """Something else was loaded."""
    keys = sorted(map(str, state))[:8] if isinstance(state, Mapping) else type(state).__name__
    return ValueError(
        f"This does not hold a weighter's state (keys: {keys}). Objects must be registered for checkpointing in the "
        "same order as when it was saved."
    )


def other_checkpoint(differences: Mapping[str, tuple[Any, Any]]) -> ValueError:
    """Another weighter's checkpoint; all differences at once."""
    rows = "\n".join(f"  {name}: {old} in the checkpoint, {new} here" for name, (old, new) in differences.items())
    return ValueError(
        f"The checkpoint was written by another weighter. Differences: {', '.join(differences)}.\n{rows}\n"
        "Load with `strict=False` to keep what fits."
    )


def warn_saved_inside_window(blocks: int) -> None:
    """State was asked for with micro-batches in the window."""
    warnings.warn(
        f"Saved inside an accumulation window: {blocks} of its micro-steps is lost; save on "
        "`accelerator.sync_gradients`."
        if blocks == 1
        else f"Saved inside an accumulation window: {blocks} of its micro-steps are lost; save on "
        "`accelerator.sync_gradients`.",
        stacklevel=4,
    )


def warn_rotations_left_behind() -> None:
    """A checkpoint with rotations, loaded loosely by a weighter that has no use for them."""
    warnings.warn(
        "The checkpoint holds rotations that this weighter's method does not take up, and the heads were trained "
        "behind them. To go on from the model as it was, load the checkpoint with its own method first and call "
        "`fold_rotations()`.",
        stacklevel=5,
    )


def finite_weights(weights: Tensor, method: Any) -> None:
    """An assertion about ourselves: a method gave finite weights."""
    assert math.isfinite(weights.sum()), f"{method!r} gave weights that are not finite: {weights.tolist()}"


# ---- integrations ------------------------------------------------------------------------------------------------


def trainer_without_tasks() -> ValueError:
    """A Trainer that knows no task."""
    return ValueError("Give `tasks` (their names), or `heads` ({task: dotted name in the model}), or both.")


def model_without_losses(outputs: Any) -> ValueError:
    """A model in a Trainer that gives no losses."""
    found = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
    return ValueError(
        "The model must return a dictionary `losses`, {task: scalar}, among its outputs, or `compute_losses(model, "
        f"inputs, return_outputs=False)` must be overridden. Found outputs {found}."
    )


def trainer(trainer: Any, has_group: bool) -> None:
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
