"""Coefficients that carry: losses that other code sums inside are known from the one backward of their sum.

A trainer's ``loss_weights``, a model's ``aux_coef``: such code takes coefficients and gives a total,

    total = Σ_k w_k L_k + what holds no coefficient,   so that   ∂total/∂w_k = L_k.

If the coefficients are tensors that require a gradient, the backward that trains the model delivers every loss, each
times the factor that arrives at the total (loss scale / accumulation), which a hook there records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .branch import Branch
from .linearity import curved_in
from .loop import Loop
from .losses import Given, NumItems
from .statistics import Method
from .window import MicroBatch


class Carrying(Loop):
    """The part of a weighter for code that sums its losses inside."""

    def coefficients(self) -> dict[str, Tensor]:
        """``{task: weight}``, the current weights as tensors ``[]`` that require a gradient, for code that sums inside.

        Hand them to that code in place of its numbers, and what it gives to ``attach``. The order of a step:
        ``coefficients()``, the other code, ``attach(total)``, ``accelerator.backward(total)``, ``step()``.

        They are float64 (float32 where the device has no other), which changes the dtype of no tensor that has a
        dimension. Until ``attach`` every call gives the same tensors; then they are used up. A loss that is multiplied
        several times, in several forwards, counts as the sum. The total must be linear in them, or ``attach`` raises:
        code that normalises its coefficients carries something else. That cannot be seen under FSDP and DeepSpeed,
        where no gradient can be asked for beside the one backward, nor inside of compiled code and of somebody's own
        ``autograd.Function``: a total that is not linear there gives wrong losses. With gradients disabled they are
        plain numbers in tensors.

        Raises:
            ValueError: The method needs more than the losses, or they before the backward (``lag=0``,
                ``max_losses``).
            RuntimeError: A backward has passed those of the last call, and its total was not attached.
        """
        _check_that_losses_are_enough(self.method, self.lag, self._bounds.largest)
        state, window = self._steps.settled, self._window
        if not torch.is_grad_enabled():
            return self._leaves(self._multipliers(state), gradients=False)
        if self._optimizers.begins():
            return self._leaves(state.applied)
        if window.coefficients is None:
            window.coefficients = self._leaves(self._multipliers(state))
        elif any(weight.grad is not None for weight in window.coefficients.values()):
            self.reset()
            raise _backward_before_attach()
        return dict(window.coefficients)

    def attach(self, total: Tensor, num_items: NumItems = None, *, last: bool | None = None) -> Tensor:
        """Takes in the total that other code made of ``coefficients()``: its backward then delivers the losses.

        Args:
            total: What that code gave, before anything is divided or scaled, a floating-point tensor ``[]`` with a
                graph.
            num_items: As in ``backward``: ``{task: 0}`` says that the task is not in this micro-batch, so that its
                coefficient need not be in the total. A loss of it that is there all the same is an error of ``step``.
            last: As in ``backward``.

        Returns:
            ``total`` itself. With gradients disabled nothing happens to it.

        Raises:
            ValueError, TypeError: An argument breaks its rule; nothing has happened yet.
            RuntimeError: There are no coefficients that it could be made of, it is not linear in them, or what
                ``combine`` raises. A total that lacks a coefficient is an error of ``step``, on all processes.
        """
        if not torch.is_grad_enabled():
            return total
        _check_total(total)
        self._check_order(paused := self._optimizers.repeats)
        if paused:
            return total
        weights = self._window.coefficients
        if weights is None:
            raise _attached_without_coefficients()
        given = Given.counted(weights, num_items, self.tasks)
        if self._measuring:
            self._check_linear(total, weights, given)
        self._window.coefficients = None
        self._take_in_forward()
        self._branch.forget()
        self._progress.applied = self._multipliers(self._progress)
        nodes = [node for node, _ in total.grad_fn.next_functions] if total.grad_fn is not None else []
        self._enter(lambda: nodes, total, last)
        if self._measuring:
            self._verdict.warn_of_half_precision([total])
            micro_batch = MicroBatch(given.present, self._window, given.scale(total))
            self._window.carried.append(_Carried(total, weights, given, micro_batch, self._branch))
        return total

    def _check_linear(self, total: Tensor, weights: Mapping[str, Tensor], given: Given) -> None:
        """At the first total, and at the first with a task that was not in one before."""
        here = {self.tasks[k] for k in given.present}
        if here <= self._progress.linear:
            return
        if curved := curved_in(total, weights, self._why_no_probe):
            raise _not_linear(curved)
        self._progress.linear |= here

    def _why_no_probe(self) -> str | None:
        """Why no gradient can be asked for beside the one backward (an engine's name), or None."""
        raise NotImplementedError

    def _leaves(self, weights: Any, gradients: bool = True) -> dict[str, Tensor]:
        device = torch.device(getattr(self.accelerator, "device", "cpu"))
        like = torch.empty((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        copies = self._bounds.on_device("coefficients", weights, like).clone()
        return {task: copies[k].detach().requires_grad_(gradients) for k, task in enumerate(self.tasks)}


class _Carried:
    """The losses of one micro-batch, as the backward of its total delivers them.

    Args:
        total: The total.
        weights: ``{task: coefficient}``, in task order.
        given: Who is there, and with how many items.
        micro_batch: What its backward measures at the branch point, if there is one.
        branch: Knows when that backward runs.
    """

    def __init__(
        self, total: Tensor, weights: Mapping[str, Tensor], given: Given, micro_batch: MicroBatch, branch: Branch
    ) -> None:
        self._micro_batch, self._branch = micro_batch, branch
        self._factor: Tensor | None = None
        self._came: dict[int, Tensor] = {}
        copies = torch.stack([weight.detach() for weight in weights.values()]).to(total.device)
        self._zero = copies.new_zeros(())
        self.given = given._replace(named=dict.fromkeys(weights, self._zero))  # their hooks hold this, and it not them
        branch.watch_total(total, micro_batch, copies)
        total.register_hook(self._begins)  # type: ignore[no-untyped-call]
        for k, weight in enumerate(weights.values()):
            weight.register_hook(partial(self._arrives, k))  # type: ignore[no-untyped-call]

    def _begins(self, factor: Tensor) -> None:
        self._factor = factor.detach()
        self._came.clear()

    def _arrives(self, k: int, gradient: Tensor) -> None:
        if self._branch.runs(self._micro_batch):  # several times, where the backward recomputes parts of the forward
            came = self._came.get(k)  # a copy: autograd may take the gradient itself for `.grad` and add to it there
            self._came[k] = gradient.detach().clone() if came is None else came + gradient.detach()

    def losses(self) -> tuple[Tensor, dict[int, float]]:
        """The losses, ``[K]``, zeros where a task is absent or its loss did not come.

        And the numbers of items where something is wrong: NaN where a loss did not come, infinity where one that is not
        0 came of an absent task, for which alone a host waits here.

        Raises:
            RuntimeError: The backward did not run.
        """
        if self._factor is None:
            raise _attached_without_backward()
        present = self.given.present
        came = {k: loss.to(self._zero.device) for k, loss in self._came.items() if k in present}
        rows = [came.get(k, self._zero) for k in range(len(self.given.named))]
        wrong = dict.fromkeys(present - came.keys(), math.nan)
        wrong |= {k: math.inf for k, loss in self._came.items() if k not in present and bool(loss != 0)}
        return torch.stack(rows) / self._factor.to(self._zero.device), wrong


# ---- checks and messages -------------------------------------------------------------------------------------------


def _check_that_losses_are_enough(method: Method, lag: int, largest: Mapping[str, float]) -> None:
    """Losses come with the backward, and nothing else does."""
    if method.acts_on != "losses" or method.needs & {"norms", "gram", "moments"}:
        raise ValueError(
            f"{method} needs the tasks' gradients apart, or weighs them where they meet, and "
            "`weighter.coefficients()` gives losses alone. Use a method that needs losses only, such as CoVWeighting, "
            "IMTLL or UncertaintyWeighting, or hand the losses to `weighter.backward(losses)`."
        )
    if lag == 0:
        raise ValueError(
            "With `lag = 0` the weights of a step come from its own losses, and those of `weighter.coefficients()` are "
            "known after the backward. Use `lag = 1`."
        )
    if largest:
        raise ValueError(
            f"`max_losses = {largest!r}` scales a loss down before the backward, and those of "
            "`weighter.coefficients()` are known after it. Leave `max_losses` out, or bound the loss where it is made."
        )


def _check_total(total: Any) -> None:
    """A floating-point tensor of shape [] that leads somewhere."""
    if not isinstance(total, Tensor):
        raise TypeError(f"`weighter.attach(total)` takes the total as a tensor. Found {type(total).__name__}.")
    if total.ndim or not total.is_floating_point():
        cure = ": reduce it first, e.g. `total.mean()`" if total.ndim else ""
        raise ValueError(
            "`weighter.attach(total)` takes a floating-point tensor of shape []. Found dtype "
            f"{str(total.dtype).removeprefix('torch.')}, shape {list(total.shape)}{cure}."
        )
    if not total.requires_grad:
        raise ValueError(
            "The total that was given to `weighter.attach` does not require grad: it was detached, or computed with "
            "gradients disabled, and no loss can be known from its backward."
        )


def _not_linear(tasks: Sequence[str]) -> RuntimeError:
    """A total that carries something else than losses."""
    names = ", ".join(f"`{task}`" for task in tasks)
    return RuntimeError(
        f"The total that was given to `weighter.attach` is not linear in the coefficients of {names}: the code takes a "
        "power or a logarithm of what it multiplies by them, divides them by their sum, or multiplies one by another, "
        "so that ∂total/∂coefficient is not the loss. Let it multiply each loss once by its coefficient, as it is, or "
        "hand the losses to `weighter.backward(losses)`."
    )


def _attached_without_coefficients() -> RuntimeError:
    """A total, and no coefficients that it could be made of."""
    return RuntimeError(
        "`weighter.attach(total)` was called and there are no coefficients that the total could hold: call "
        "`weighter.coefficients()` anew before every total, after the step before it (and after `reset()`, `freeze()` "
        "or `load_state_dict`), and let the code use those."
    )


def _backward_before_attach() -> RuntimeError:
    """A backward has passed the coefficients, and nothing was recorded."""
    return RuntimeError(
        "A backward has passed the last `weighter.coefficients()`, and its total was not attached, so that its losses "
        "are not known: call `total = weighter.attach(total)` before `accelerator.backward(total)`."
    )


def _attached_without_backward() -> RuntimeError:
    """A total whose backward did not run."""
    return RuntimeError(
        "A total was attached, and its backward did not run before `weighter.step()`: call "
        "`accelerator.backward(total)` with the total that was attached (or what was computed from it), or "
        "`weighter.reset()` where it is given up."
    )
