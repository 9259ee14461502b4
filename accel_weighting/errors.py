"""The errors and warnings of a step, in words: what happened, why it matters, what to do.

Every function makes one of them, for the place that found it to raise.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def modules_not_found(names: Sequence[str], known: Iterable[str] = ()) -> ValueError:
    """Dotted names that lead nowhere."""
    close = [match for name in names for match in difflib.get_close_matches(name, list(known), 1)]
    hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
    return ValueError(
        f"`model` has no submodule called {', '.join(map(repr, names))}.{hint} See `model.named_modules()`."
    )


def layer_without_model(name: str) -> ValueError:
    """A name and nothing to look it up in."""
    return ValueError(f"The name `shared_layer = {name!r}` is looked up in `model`, which was not given.")


def unsupported_engine(kind: str, supported: Sequence[str]) -> NotImplementedError:
    """An engine that does not run one plain backward."""
    return NotImplementedError(
        f"accel_weighting supports the distributed types {', '.join(supported)}. Found {kind}, whose backward does "
        "not pass through `accelerator.backward` as one autograd pass."
    )


def several_processes_without_accelerator() -> ValueError:
    """``accelerator=None`` under a launcher."""
    return ValueError(
        "Several processes run and neither `accelerator` nor `process_group` was given: each process would follow "
        "its own weights. Pass the accelerator, or the process group to sum over."
    )


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
        "(`weighter.backward` does both), or `weighter.reset()` after an exception that every process caught. If this "
        "call of `weighter.combine` or the one before it belongs to an evaluation, disable gradients there, `with "
        "torch.no_grad()`: `model.eval()` alone does not."
    )


def empty_window() -> RuntimeError:
    """``step`` with nothing in the window."""
    return RuntimeError(
        "`weighter.step()` was called on an empty window: no losses came through `weighter.combine` since the last "
        "step. `weighter.backward` closes the window by itself."
    )


def losses_that_missed_the_branch(
    missed: Sequence[str], uncalled: Sequence[str], unfed: Sequence[str], any_fed: bool, has_heads: bool
) -> RuntimeError:
    """Losses of which no gradient arrived at the join.

    Args:
        missed: Their tasks.
        uncalled: Those of them whose head was not called.
        unfed: Those whose head, or alias, had no history to send a gradient back to.
        any_fed: Whether some task's had one.
        has_heads: Whether the weighter was built with ``heads``.
    """
    names = ", ".join(f"`{task}`" for task in missed)
    which = f"Loss {names} does" if len(missed) == 1 else f"Losses {names} do"
    words = [f"{which} not depend on the branch: no gradient arrived there."]
    if uncalled:
        words.append(
            f"The head of {', '.join(f'`{task}`' for task in uncalled)} was not called as a module in this forward. "
            "Call `head(z)`: `head.forward(z)` and `F.linear(z, head.weight)` pass by its hooks, and so does a module "
            "that took its place (give dotted names and `model=`, which are looked up again). Or call "
            "`weighter.branch(z)`."
        )
    elif not any_fed and (has_heads or unfed) and len(unfed) == len(missed) and has_heads:
        words = [
            "The shared representation does not require grad (all parameters before it are frozen, or it was "
            "detached), so gradient-based methods have nothing to balance. Use one that needs losses only, such as "
            "CoVWeighting."
        ]
    elif not any_fed:
        words.append(
            "This weighter has no `heads`, and `weighter.branch(z)` was not called in the forward, or with a z that "
            "does not require grad. A method that needs gradients needs one of them: name `heads`, or call `branch`."
        )
    elif unfed:
        words.append(
            f"The head of {', '.join(f'`{task}`' for task in unfed)} was called with a tensor that has no gradient, "
            "such as `z.detach()`. A probe that must not train the trunk is not a task: add its loss to what `combine` "
            "returns, `weighter.combine(losses) + probe`."
        )
    else:
        words.append(
            "Branch inside the model's forward or name its head; what a prepared model returns is a copy under mixed "
            "precision. A loss that is computed beside the shared representation (a balance, commitment or other "
            "regularising loss) is not a task: add it as it is, `weighter.combine(losses) + extra`."
        )
    return RuntimeError(" ".join(words))


def heads_moved(tasks: Sequence[str]) -> str:
    """Heads that are other modules than before."""
    names = ", ".join(f"`{task}`" for task in tasks)
    return (
        f"The head of {names} is another module than the one that was hooked (it was replaced, or an adapter was "
        "wrapped round it): the new one is measured from its next forward on."
    )


def head_moved_in_a_forward(tasks: Sequence[str]) -> RuntimeError:
    """A head was replaced, and a forward ran before the weighter could see it."""
    names = ", ".join(f"`{task}`" for task in tasks)
    return RuntimeError(
        f"The head of {names} is another module than the one that was hooked, and this forward ran without its hook. "
        "It is hooked now: run the forward again. (Where the whole model is called, and not its parts, a head that was "
        "replaced is seen before the forward.)"
    )


def model_is_gone() -> RuntimeError:
    """The heads' modules are not alive any more."""
    return RuntimeError(
        "The model of this weighter is gone: a weighter does not keep it alive. Build a new weighter for a new model."
    )


def several_tensors_rotated(where: str) -> ValueError:
    """Rotations act on one tensor."""
    subject = "`weighter.branch` was given" if where == "branch" else f"The head of task `{where}` is called with"
    return ValueError(
        f"{subject} several tensors that were computed, and rotations act on one. Name the argument that holds the "
        'shared representation, `heads={"task": ("decoder", "memory")}`, or branch that tensor alone.'
    )


def no_such_argument(task: str, name: str, parameters: Sequence[str]) -> ValueError:
    """An argument's name that the head does not have."""
    close = difflib.get_close_matches(name, parameters, 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(
        f"Parameter `heads` names the argument {name!r} of the head of task `{task}`, whose forward has the arguments "
        f"{list(parameters)!r}.{hint}"
    )


def branch_without_tensor(z: Any) -> TypeError:
    """Nothing in what is to be branched is a floating-point tensor."""
    return TypeError(
        "`weighter.branch(z)` divides a tensor, or a list, tuple, dictionary or dataclass of tensors. Found no "
        f"floating-point tensor in {type(z).__name__}."
    )


def loss_on_derivatives() -> RuntimeError:
    """A second-order pass came to the join under a method that needs gradients."""
    return RuntimeError(
        "A loss contains derivatives that were taken through the branch (`torch.autograd.grad(…, create_graph=True)`: "
        "a gradient penalty, forces, a PDE residual). A part of its gradient reaches the trunk without passing the "
        "branch, so that what arrives there is not its gradient, and a method that compares gradients there would "
        "compare something else. Use a method that needs losses only, such as CoVWeighting, SoftAdapt or ReLoBRaLo, or "
        "add the loss as it is to what `combine` returns."
    )


def cross_talk(method: str, pairs: Sequence[tuple[str, str]]) -> RuntimeError:
    """Losses whose gradient arrives at another task's alias."""
    found = ", ".join(f"the gradient of loss `{a}` arrives at the alias of `{b}`" for a, b in pairs)
    return RuntimeError(
        f"{method} compares the gradients of the tasks' losses at their own aliases, but {found}: a loss reads what "
        "another task's head, or alias, gave. Then no alias has the gradient of one loss. Detach what the loss reads "
        "of the other task, compute it from its own alias, add the term as it is to what `combine` returns, or use a "
        "method that needs losses only, such as CoVWeighting."
    )


def suspected_cross_talk(method: str, pairs: Sequence[tuple[str, str]], engine: str) -> str:
    """The same, where it cannot be confirmed."""
    found = ", ".join(f"loss `{a}` reaches the alias of `{b}`" for a, b in pairs)
    return (
        f"In autograd's graph {found}. If a gradient flows that way, {method} compares gradients that mix several "
        f"losses; {engine} does not allow this library to check whether one does. It is harmless where losses or "
        "logits were only stacked in one tensor."
    )


def one_loss_under_two_names(names: Sequence[str]) -> ValueError:
    """Two tasks with one loss."""
    found = " and ".join(f"`{name}`" for name in names)
    return ValueError(
        f"Losses {found} are one and the same tensor, so their gradients cannot be told apart. Give every task a loss "
        "of its own, or name it once."
    )


def by_pass(method: str, places: Mapping[str, str], shared: bool) -> str:
    """Losses that reach the trunk around the branch."""
    found = ", ".join(f"loss `{task}` at the trunk's {node}" for task, node in places.items())
    what = "keeps weight 1 there" if shared else "is not in the gradients that are compared"
    return (
        f"A part of the gradient goes to the trunk around the branch ({found}), and {what}: {method} sees and weighs "
        "what passes the branch alone. If that is not meant, hand the heads all that they share: `weighter.branch` "
        "takes lists, tuples and dictionaries of tensors, and heads are followed through every argument they are "
        "called with."
    )


def different_depths(method: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Heads that share different tensors."""
    found = ", ".join(f"`{a}` and `{b}`" for a, b in pairs)
    return (
        f"{method} compares the gradients of {found} at tensors of different depths or shapes, where their norms "
        "are not comparable. Call `weighter.branch(z)` in the model's forward at the last tensor that all tasks share, "
        "and derive every head's input from its own alias."
    )


def head_inside_a_head(outer: str, inner: str) -> ValueError:
    """One task's head is a part of another's."""
    return ValueError(
        f"The head of task `{inner}` is a part of the head of task `{outer}`, so the gradient of loss `{outer}` would "
        f"arrive at the alias of `{inner}`. Call `weighter.branch(z)` in the model's forward instead, give heads that "
        "are apart, or use a method that needs losses only, such as CoVWeighting."
    )


def never_combined(forwards: int) -> str:
    """Forwards with gradients, and no losses handed to the weighter."""
    return (
        f"The heads (or `weighter.branch`) ran {forwards} times with gradients enabled, and no losses came to the "
        "weighter: nothing is weighed. Replace `accelerator.backward(sum of losses)` by `weighter.backward(losses)`, "
        "or hand it what `weighter.combine(losses)` returns; run evaluations `with torch.no_grad()`."
    )


def traced() -> RuntimeError:
    """``torch.jit.trace`` of a model that is divided."""
    return RuntimeError(
        "`torch.jit.trace` is running on a model with hooks of a `Weighter`, which divide the shared representation "
        "for a training. Remove them first, `weighter.detach()`, or trace `with torch.no_grad()`."
    )


def exported_rotations() -> RuntimeError:
    """A model that rotates is exported or traced."""
    return RuntimeError(
        "This model rotates what its heads read, and the rotations are the weighter's, not the model's: an exported or "
        "traced program would not hold them. Call `weighter.fold_rotations()` first, which multiplies them into the "
        "heads."
    )


def hooks_are_not_scripted() -> AttributeError:
    """``torch.jit.script`` asks our hooks for their name."""
    return AttributeError(
        "The model's heads carry hooks of a `Weighter`, which `torch.jit.script` cannot compile. Remove them first: "
        "`weighter.detach()`, or `weighter.fold_rotations()` where the method rotates."
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


def did_not_come_with_the_others(tasks: Sequence[str]) -> RuntimeError:
    """lag=0 and losses whose gradients were not there when the others met."""
    names = ", ".join(f"`{task}`" for task in tasks)
    what = f"gradient of loss {names}" if len(tasks) == 1 else f"gradients of losses {names}"
    return RuntimeError(
        "With `lag = 0` the weights of a backward are decided when the tasks' gradients meet, so they must meet once. "
        f"Here the {what} did not come with the others: nothing of it comes to the branch, the model was run several "
        "times, or its heads were fed different tensors. Call `weighter.branch(z)` once in one forward, or use "
        "`lag = 1`."
    )


def fold_needs_heads() -> ValueError:
    """Rotations to fold, and no heads to fold them into."""
    return ValueError(
        "This weighter was built without `heads`, so it does not know what reads the rotated representation: call "
        "`fold_rotations(heads={task: module or dotted name})` with the module that each alias of the branch goes into."
    )


def no_shared_layer(found: Any, transposed: bool) -> TypeError:
    """A module at whose weight no gradient can be had."""
    more = (
        " A transposed convolution is not one of them: let a Linear or a convolution come last, or leave it out."
        if transposed
        else " Leave it out to take gradients at the shared representation."
    )
    return TypeError(
        "Parameter `shared_layer` must be an nn.Linear, an nn.Conv1d, nn.Conv2d or nn.Conv3d, or a Conv1D of "
        "transformers, whose output is the branch point (or its dotted name in `model`). Found "
        f"{type(found).__name__}.{more}"
    )


def lazy_shared_layer(kind: str) -> ValueError:
    """A layer that learns its sizes in the first forward."""
    return ValueError(
        f"The sizes of `shared_layer`, a {kind}, are not known yet. Run the model once before the weighter is built."
    )


def complex_shared_layer(kind: str) -> ValueError:
    """A layer with a complex weight."""
    return ValueError(
        f"The weight of `shared_layer`, a {kind}, is complex: the gradient there is not measured. Leave it out to take "
        "gradients at the shared representation, where complex numbers are measured as pairs of real ones."
    )


def shared_layer_computes_otherwise(kind: str) -> TypeError:
    """A subclass with a forward of its own."""
    return TypeError(
        f"`shared_layer` is a {kind}, whose forward does not give what its input, weight and bias give, so that the "
        "gradient at its weight would be wrong. Name the plain layer inside of it, or leave `shared_layer` out."
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


def left_waiting(step: int) -> RuntimeError:
    """A collective that another process did not take part in."""
    return RuntimeError(
        f"Another process did not reach optimizer step {step}: it exited, raised an error, or is at a different step. "
        "All processes must take the same steps: no `break`, no `weighter.step()` and no "
        "`weighter.freeze()` on some of them alone, and no fewer batches there (`even_batches=False`, "
        "`join_uneven_inputs`). To stop early, let all of them ask `accelerator.check_trigger()`."
    )


def accelerator_is_gone() -> RuntimeError:
    """The accelerator is not alive any more."""
    return RuntimeError(
        "The accelerator of this weighter is gone: a weighter does not keep it alive. Keep the `Accelerator` in a "
        "variable of your own for as long as you train."
    )


def heads_rotate_already(tasks: Sequence[str]) -> ValueError:
    """Two rotating weighters on one head."""
    return ValueError(
        f"A weighter of the tasks {list(tasks)!r} rotates these heads' inputs already, and two rotations on one head "
        "do not make sense. Call `detach()` (or `fold_rotations()`) on it first."
    )


def gradients_still_wait() -> RuntimeError:
    """A window opens, and the gradients of the last one are still in ``.grad``."""
    return RuntimeError(
        "The last window was closed, and its gradients are still in `.grad`: no optimizer has stepped since. So "
        "gradients are accumulated by hand, and the weights would move within one optimizer step. Say which "
        "micro-batch is the last before the step, `weighter.backward(losses, last=(i + 1) % n == 0)`, or let "
        "Accelerate say it, `with accelerator.accumulate(model):`. Several backwards for one micro-batch (one for "
        "each task) go into `with weighter.micro_batch():`. If the gradients are not wanted, call "
        "`optimizer.zero_grad()`."
    )


def windows_without_steps() -> str:
    """Many windows, and no optimizer stepped in between."""
    return (
        "The last 20 windows were closed without an optimizer step in between, though an optimizer has stepped "
        "before: weights move at every window. Passes that are not for an optimizer step of their own (SAM's second "
        "pass, a line search) go into `with weighter.paused():`."
    )


def two_windows_per_step() -> str:
    """Every optimizer step had more than one window."""
    return (
        "Each of the last 20 optimizer steps had two windows or more, and the gradients of all but the last were taken "
        "away: weights move at every window, and so within an optimizer step. A pass that is not for a step of its own "
        "(SAM's second pass, a line search) goes into `with weighter.paused():`."
    )
