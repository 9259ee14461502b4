"""Any order of calls: the weighter against a small model of itself, which knows each step's statistics by hand.

Only the errors of `checks.py` come out, at the calls that the model says; nothing that fails leaves a trace.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray
from torch import Tensor

from accel_weighting import MGDA, ConFIG, CoVWeighting, GradNorm, Method, RotoGrad, Statistics, Weighter
from tests.ranks import accelerator_for
from tests.small import WIDTH, Net, batch, gradients_by_hand, net, task_losses, tensor

TASKS = ["a", "b", "c"]
K = len(TASKS)
LIMIT = 2
BATCHES = 3

Error = tuple[type[Exception], str]
NOT_CLOSED = RuntimeError, r"^The last window was due and was not closed"
EMPTY = RuntimeError, r"^`weighter\.step\(\)` was called on an empty window"
MISSED = RuntimeError, r"^Loss(es)? (`[abc]`(, )?)+ do(es)? not depend on the branch"
UNRELATED = RuntimeError, r"needs the inner products of the tasks' gradients, but at optimizer step"
MIXED = ValueError, r"^Counts must come for all blocks of a window or for none"
HELD = RuntimeError, r"weights are held\. \d+ steps in a row exceed `max_skipped_steps = 2`"
NEGATIVE = ValueError, r"divides by losses and needs them positive"
FREED = RuntimeError, r"^The graph was already freed"
ONCE = RuntimeError, r"^With `lag = 0` the weights of a backward are decided when the tasks' gradients meet"


FACTORS = {"negative": -1.0, "faint": 1e-6, "silent": 0.0}  # of a loss


class Interruption(Exception):
    """An error in the user's own code."""


@functools.cache
def model() -> Net:
    """Never trained, so that all its gradients are known beforehand; every use of it ends without a hook."""
    return net(TASKS)


@functools.cache
def gram(step: int) -> Tensor:
    G = gradients_by_hand(model(), step)
    return G @ G.T


@dataclass(frozen=True)
class Request:
    """One micro-batch: which batch, which tasks are in it, how it is counted, and what is wrong with it."""

    batch: int
    left_out: frozenset[str] = frozenset()
    zero: frozenset[str] = frozenset()
    items: int | None = None
    fault: tuple[str, str] | None = None  # "loss", "gradient", or one of FACTORS, and of which task
    freeze: bool = False

    @property
    def losses(self) -> list[str]:
        return [task for task in TASKS if task not in self.left_out]

    @property
    def present(self) -> list[str]:
        return [task for task in self.losses if task not in self.zero]

    @property
    def num_items(self) -> dict[str, int] | int | None:
        if not self.zero:
            return self.items
        counted = dict.fromkeys(self.losses, self.items) if self.items is not None else {}
        return counted | dict.fromkeys(self.zero, 0)

    @property
    def counted(self) -> bool:
        return self.items is not None and bool(self.present)


@st.composite
def requests(draw: Callable[..., Any]) -> Request:
    some = st.sets(st.sampled_from(TASKS))
    rarely = st.sampled_from([True, False, False, False])
    left_out = draw(st.sets(st.sampled_from(TASKS), max_size=K - 1)) if draw(rarely) else set()
    faulty = draw(st.sampled_from([None, None, None, "loss", "gradient", *FACTORS]))
    return Request(
        draw(st.integers(0, BATCHES - 1)),
        frozenset(left_out),
        frozenset(draw(some)) if draw(rarely) else frozenset(),
        draw(st.integers(1, 5)) if draw(rarely) else None,
        (faulty, draw(st.sampled_from(TASKS))) if faulty else None,
        draw(rarely),
    )


@dataclass
class MicroBatch:
    """A micro-batch: the losses of its tasks and the inner products of their gradients.

    Attributes:
        bad: Whether one of them is not finite.
        recorded: Whether the statistics take it in.
        branched: Whether hooks were there in its forward.
        window: That it belongs to.
        apart: Whether its gradients came through joins of different forwards.
        arrived: Whether its gradients have come.
    """

    losses: dict[str, float]
    items: int | None
    gram: Tensor
    bad: bool
    recorded: bool
    branched: bool
    window: int
    apart: bool = False
    arrived: bool = False


@dataclass
class Bound:
    """``max_growth`` as it is described, one weight at a time: at most twice the geometric mean of those applied.

    Attributes:
        means: None before a weight that is not 0.
        windows: That the means have taken in.
        at_it: Which weights were bounded by the last update.
        limited: Updates in which it acted.
    """

    means: list[float | None] = field(default_factory=lambda: [None] * K)
    windows: list[int] = field(default_factory=lambda: [0] * K)
    at_it: list[bool] = field(default_factory=lambda: [False] * K)
    limited: int = 0

    def applied(self, answer: Any, before: Any, present: Any, norms: Any) -> list[float]:
        """What stands of a method's ``answer``, where ``before`` was applied in the window."""
        found, bounded = [], []
        for k, (new, old) in enumerate(zip(answer.tolist(), before.tolist(), strict=True)):
            highest = math.inf if self.means[k] is None else 2.0 * self.means[k]
            heard = present[k] and (norms is None or norms[k] > 0)
            if self.at_it[k] and not heard and abs(new) > abs(old):
                found.append(old)  # at the bound, and nothing was heard of the task since
            elif present[k] and abs(new) > highest:
                found.append(math.copysign(highest, new))
            else:
                found.append(new)
            bounded.append(found[-1] != new)
        self.at_it, self.limited = bounded, self.limited + any(bounded)
        for k, w in enumerate(map(abs, found)):
            if w:
                mean, rate = self.means[k], 1 / min(self.windows[k] + 5, 20)
                self.means[k] = w if mean is None else mean ** (1 - rate) * max(w, mean / 16) ** rate
                self.windows[k] += 1
        return found


@dataclass
class Model:
    """What the weighter should be."""

    method: Any
    lag: int
    update_every: int
    update_after: int
    weights: NDArray[np.float64]
    state: dict[str, Any]
    step: int = 0
    frozen: bool = False
    held: int = 0
    skipped: int = 0
    sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(K))
    unfrozen_steps: int = 0
    history: list[int] = field(default_factory=list)
    window: int = 0  # which one is open
    blocks: list[MicroBatch] = field(default_factory=list)
    open: int = 0
    due: bool = False
    counts: bool = False  # whether some micro-batch of this window was not frozen
    attached: bool = True
    bound: Bound | None = None

    @property
    def unfrozen(self) -> bool:
        return not self.frozen and self.step >= self.update_after

    @property
    def measuring(self) -> bool:
        return self.unfrozen and (self.step - self.update_after) % self.update_every == 0

    @property
    def of_gradients(self) -> bool:
        return bool(self.method.needs & {"norms", "gram", "moments"})

    def reset(self) -> None:
        self.window, self.blocks, self.open = self.window + 1, [], 0
        self.due = self.counts = False

    def freeze(self) -> None:
        self.reset()
        self.frozen = True

    def forward(self) -> None:
        """Shows the width of z."""
        if "moments" in self.method.needs and self.attached:
            self.state = self.method.widen(self.state, WIDTH)

    def arrives(self, block: MicroBatch) -> None:
        """A block's backward; it may come too late."""
        if block.window == self.window and block.branched:
            block.arrived = True

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Losses, presence and the Gram matrix of the open window."""
        counted = any(block.items is not None for block in self.blocks)
        n = torch.tensor([[(b.items or 1) * (t in b.losses) for t in TASKS] for b in self.blocks], dtype=torch.float64)
        L = torch.tensor([[b.losses.get(t, 0.0) for t in TASKS] for b in self.blocks], dtype=torch.float64)
        N = n.sum(0)
        share = n / N.clamp(min=1) if counted else (n > 0).double() / len(self.blocks)
        mean, present = (n * L).sum(0) / N.clamp(min=1), N > 0
        M = torch.zeros(K, K, dtype=torch.float64)
        for s, block in zip(share, self.blocks, strict=True):
            if block.arrived:
                M += torch.outer(s, s) * block.gram
        return mean, present, M if not present.any() or any(b.arrived and b.losses for b in self.blocks) else None

    def close(self, weighter: Weighter) -> Error | None:
        """`step()` at synchronised gradients."""
        if not self.open:
            return EMPTY
        try:
            return self._verdict(weighter)
        finally:
            self.reset()

    def _verdict(self, weighter: Weighter) -> Error | None:
        if self.counts and (self.lag == 1 or not self.blocks):
            self._average()
        if not self.blocks:
            self.history.append(self.step)
        self.step += 1
        blocks, step = self.blocks, self.step - 1
        if not blocks:
            return None
        if 0 < sum(b.items is not None for b in blocks) < sum(bool(b.losses) for b in blocks):
            return MIXED
        if any(b.bad for b in blocks if b.arrived or not all(map(math.isfinite, b.losses.values()))):
            self.skipped, self.held = self.skipped + 1, self.held + 1
            self._see(step)
            return HELD if self.held > LIMIT else None
        losses, present, M = self.statistics()
        if self.method.positive_losses and (losses < 0).any():
            return NEGATIVE
        came = {task for block in blocks if block.arrived for task in block.losses}
        if self.of_gradients and {task for block in blocks for task in block.losses} - came:
            return MISSED
        apart = any(block.apart for block in blocks if block.arrived)
        if self.of_gradients and apart and self.method.needs & {"gram", "moments"}:
            return UNRELATED
        self.held = 0
        found = weighter.statistics
        assert found is not None
        self._compare(found, losses, present, M, apart)
        answer, self.state = self.method.update(self.state, found)
        self.weights = answer if self.bound is None else self._limited(answer, found, weighter)
        self._see(step)
        return None

    def _limited(self, answer: Any, found: Statistics, weighter: Weighter) -> NDArray[np.float64]:
        """The weighter's own weights, once they are the bound's up to rounding, and where it does not act exactly."""
        assert self.bound is not None
        expected = self.bound.applied(answer, self.weights, found.present, found.norms)
        weights = np.array(list(weighter.weights.values()))
        for k in range(K):
            if self.bound.at_it[k]:
                assert weights[k] == pytest.approx(expected[k], rel=1e-12, abs=0)
            else:
                assert weights[k] == expected[k]
        return weights

    def _compare(self, found: Statistics, losses: Tensor, present: Tensor, M: Tensor | None, apart: bool) -> None:
        """What the weighter saw of the window that was just closed."""
        assert (found.step, found.micro_batches) == (self.step - 1, len(self.blocks))
        assert torch.equal(tensor(found.present), present)
        assert torch.allclose(tensor(found.losses), losses, rtol=1e-12, atol=0)
        if M is None:
            assert found.gram is found.norms is None
        elif apart:
            assert found.gram is None and torch.allclose(tensor(found.norms), M.diagonal().sqrt(), rtol=1e-12, atol=0)
        elif "moments" not in self.method.needs:  # elsewhere the gradients depend on the rotations
            assert found.gram is not None and (tensor(found.gram) - M).abs().max() <= 1e-12 * M.abs().max()

    def _see(self, step: int) -> None:
        if self.lag == 0:
            self._average()
        self.history.append(step)

    def _average(self) -> None:
        self.sum, self.unfrozen_steps = self.sum + self.weights, self.unfrozen_steps + 1


class Calls(RuleBasedStateMachine):
    """Public calls in any order."""

    method: ClassVar[Method]
    lag: ClassVar[int] = 1

    @initialize(accelerated=st.booleans(), every=st.sampled_from([1, 1, 2]), after=st.sampled_from([0, 0, 2]))
    def build(self, accelerated: bool, every: int, after: int) -> None:
        self.accelerator = accelerator_for("plain", gradient_accumulation_steps=2) if accelerated else None
        self.options = {"lag": self.lag, "update_every": every, "update_after": after, "max_skipped_steps": LIMIT}
        self.weighter = self.new()
        bound = Bound() if self.method.grows and self.lag == 1 else None
        self.model = Model(self.method, self.lag, every, after, *self.method.init(TASKS), bound=bound)
        self.pending: tuple[Tensor, MicroBatch] | None = None

    def new(self) -> Weighter:
        heads = dict(model().heads)
        return Weighter(self.method, TASKS, accelerator=self.accelerator, heads=heads, **self.options)

    # ---- what the rules are made of --------------------------------------------------------------------------------

    def set_sync(self, sync: bool) -> None:
        if self.accelerator is not None:
            self.accelerator.sync_gradients = sync

    @property
    def sync(self) -> bool:
        return self.accelerator is None or self.accelerator.sync_gradients

    def attempt(self, call: Callable[[], Any]) -> tuple[Any, Exception | None]:
        try:
            return call(), None
        except (ValueError, TypeError, RuntimeError, Interruption) as error:
            return None, error

    def meets(self, error: Exception | None, expected: Error | None) -> None:
        if expected is None:
            if error is not None:
                raise error
            return
        kind, pattern = expected
        assert error is not None, f"should have ended in {expected}"
        if type(error) is not kind or not re.search(pattern, str(error)):
            raise error

    def forward(self, request: Request) -> dict[str, Tensor]:
        for task, head in model().heads.items():
            head.overflows = request.fault == ("gradient", task)
        x, y = batch(request.batch, K, torch.float64)
        losses = task_losses(model()(x), y)
        self.model.forward()
        if request.fault is not None and request.fault[0] != "gradient":
            kind, task = request.fault
            losses[task] = losses[task] * FACTORS.get(kind, torch.nan)
        losses |= {task: losses[task] * torch.nan for task in request.zero}
        return {task: losses[task] for task in request.losses}

    def recorded(self, request: Request, losses: dict[str, Tensor], parts: Tensor | None = None) -> MicroBatch:
        """What `combine` leaves in the model."""
        self.model.open += 1
        self.model.due = self.sync
        self.model.counts |= self.model.unfrozen and not request.freeze
        there = torch.tensor([task in request.present for task in TASKS])
        kind, at = request.fault or ("", "")
        factor = torch.tensor([FACTORS.get(kind, 1.0) if task == at else 1.0 for task in TASKS]).double()
        block = MicroBatch(
            {task: losses[task].item() for task in request.present},
            request.items if request.counted else None,
            (gram(request.batch) if parts is None else parts) * torch.outer(factor, factor) * torch.outer(there, there),
            bool(kind) and kind not in FACTORS and at in request.present,
            not request.freeze and self.model.measuring,
            self.model.attached,
            self.model.window,
            parts is not None,
        )
        if block.recorded:
            self.model.blocks.append(block)
        return block

    def backward(
        self, request: Request, losses: dict[str, Tensor], parts: Tensor | None = None, ends: Error | None = None
    ) -> None:
        """`weighter.backward` on both sides; `ends`: the error that its backward must end in."""
        _, error = self.attempt(
            lambda: self.weighter.backward(losses, num_items=request.num_items, freeze=request.freeze)
        )
        if self.model.due:
            return self.meets(error, NOT_CLOSED)
        block = self.recorded(request, losses, parts)
        if ends is not None and (ends is not ONCE or block.recorded):
            self.model.reset()
            return self.meets(error, ends)
        self.model.arrives(block)
        return self.meets(error, self.model.close(self.weighter) if self.sync else None)

    # ---- the calls -------------------------------------------------------------------------------------------------

    @rule(request=requests(), sync=st.booleans(), evaluated=st.booleans())
    def backward_of_a_micro_batch(self, request: Request, sync: bool, evaluated: bool) -> None:
        self.set_sync(sync)
        model().zero_grad()
        losses = self.forward(request)
        if evaluated:
            self.evaluate(0)
        self.backward(request, losses)
        if self.model.attached and (request.fault is None or request.fault[0] in FACTORS):
            assert all(p.grad is None or p.grad.isfinite().all() for p in model().parameters())

    @rule(request=requests(), sync=st.booleans())
    def combine(self, request: Request, sync: bool) -> None:
        self.set_sync(sync)
        losses = self.forward(request)
        total, error = self.attempt(
            lambda: self.weighter.combine(losses, num_items=request.num_items, freeze=request.freeze)
        )
        if self.model.due:
            return self.meets(error, NOT_CLOSED)
        self.meets(error, None)
        self.pending = total, self.recorded(request, losses)
        return None

    @precondition(lambda self: self.pending is not None)
    @rule()
    def backward_of_the_last_total(self) -> None:
        """In time, or after its window was closed or dropped."""
        assert self.pending is not None
        (total, block), self.pending = self.pending, None
        total.backward() if self.accelerator is None else self.accelerator.backward(total)
        self.model.arrives(block)

    @rule()
    def step(self) -> None:
        _, error = self.attempt(self.weighter.step)
        self.meets(error, self.model.close(self.weighter) if self.sync else None)

    @rule()
    def reset(self) -> None:
        self.weighter.reset()
        self.model.reset()

    @rule()
    def freeze(self) -> None:
        self.weighter.freeze()
        self.model.freeze()

    @rule()
    def unfreeze(self) -> None:
        self.weighter.unfreeze()
        self.model.reset()
        self.model.frozen = False

    @rule(request=requests(), raises=st.booleans())
    def frozen_for_one_micro_batch(self, request: Request, raises: bool) -> None:
        self.set_sync(True)
        before = self.model.frozen
        with contextlib.suppress(Interruption), self.weighter.freeze():
            self.model.freeze()
            self.backward(request, self.forward(request))
            if raises:
                raise Interruption
        if not before:
            self.model.reset()
        self.model.frozen = before

    @rule(strict=st.booleans(), twice=st.booleans())
    def save_and_load(self, strict: bool, twice: bool) -> None:
        """Into a new weighter; or twice into the same one."""
        state = self.saved()
        if not twice:
            self.weighter.detach()
            self.weighter = self.new()
            self.model.attached = True
        self.weighter.load_state_dict(state, strict=strict)
        self.model.reset()
        assert self.weighter.statistics is None

    def saved(self) -> dict[str, Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = self.weighter.state_dict()
        told = any("Saved inside an accumulation window" in str(warning.message) for warning in caught)
        assert told == bool(self.model.blocks)
        return state

    @rule(step=st.integers(0, BATCHES - 1))
    def evaluate(self, step: int) -> None:
        with torch.no_grad():
            losses = self.forward(Request(step))
            total = self.weighter.combine(losses)
        weights = tensor(self.model.weights) if self.method.acts_on == "losses" else torch.ones(K).double()
        assert torch.allclose(total, (torch.stack(list(losses.values())) * weights).sum(), rtol=1e-12)

    @rule()
    def detach(self) -> None:
        self.weighter.detach()
        self.model.attached = False

    @rule(request=requests())
    def a_forward_that_leads_nowhere(self, request: Request) -> None:
        self.forward(request)

    @rule(
        case=st.sampled_from(
            [
                (lambda losses: {**losses, "d": losses["a"]}, None, ValueError, r"^Unknown task 'd'"),
                (lambda losses: {}, None, ValueError, r"^Parameter `losses` is empty"),
                (lambda losses: {"a": losses["a"][None]}, None, ValueError, r"^Loss `a` must be a floating-point"),
                (lambda losses: {"a": 1.0}, None, TypeError, r"^Loss `a` must be a floating-point"),
                (lambda losses: [losses["a"]], None, ValueError, r"^Losses without names must be one per task"),
                (lambda losses: losses, {"a": 1}, ValueError, r"^Positive counts in `num_items`"),
                (lambda losses: losses, -1, ValueError, r"^Parameter `num_items` must be a number"),
                (lambda losses: losses | {"b": losses["b"].detach()}, None, ValueError, r"^Loss `b` does not require"),
            ]
        ),
        disabled=st.sampled_from([True, False, False]),
    )
    def a_bad_call(self, case: tuple[Any, ...], disabled: bool) -> None:
        wrong, num_items, kind, pattern = case
        losses = self.forward(Request(0))
        with torch.set_grad_enabled(not disabled):
            _, error = self.attempt(lambda: self.weighter.backward(wrong(losses), num_items=num_items))
        self.meets(error, (RuntimeError, "gradients disabled") if disabled else (kind, pattern))

    @rule(request=requests(), task=st.sampled_from(TASKS), sync=st.booleans())
    def an_error_in_the_backward(self, request: Request, task: str, sync: bool) -> None:
        self.set_sync(sync)

        def interrupt(_: Tensor) -> None:
            raise Interruption("the user's own")

        handle = model().embed.weight.register_hook(interrupt)
        try:
            losses = self.forward(request)
            self.backward(request, losses, ends=(Interruption, "the user's own"))
        finally:
            handle.remove()

    @rule(sync=st.booleans())
    def a_second_backward_of_one_forward(self, sync: bool) -> None:
        self.set_sync(sync)
        losses = self.forward(Request(0))
        self.backward(Request(0), losses)
        self.backward(Request(0), losses, ends=FREED)

    @rule(steps=st.tuples(*[st.integers(0, BATCHES - 1)] * 2), sync=st.booleans())
    def losses_of_two_forwards(self, steps: tuple[int, int], sync: bool) -> None:
        """Gradients of different forwards come together nowhere: their norms alone are known."""
        self.set_sync(sync)
        first, second = (self.forward(Request(step)) for step in steps)
        apart = torch.zeros(K, K, dtype=torch.float64)
        apart[0, 0] = gram(steps[0])[0, 0]
        apart[1:, 1:] = gram(steps[1])[1:, 1:]
        losses = {**second, "a": first["a"]}
        once = self.lag == 0 and self.model.attached
        self.backward(Request(steps[0]), losses, apart, ends=ONCE if once else None)

    @rule(step=st.integers(0, BATCHES - 1))
    def a_good_step(self, step: int) -> None:
        """Works after whatever was before it."""
        self.reset()
        if not self.model.attached:
            self.save_and_load(strict=True, twice=False)
        self.unfreeze()
        self.set_sync(True)
        self.backward(Request(step), self.forward(Request(step)))

    # ---- what holds after every call -------------------------------------------------------------------------------

    @invariant()
    def is_as_the_model_says(self) -> None:
        weighter, expected = self.weighter, self.model
        weights = torch.tensor(list(weighter.weights.values()), dtype=torch.float64)
        assert torch.equal(weights, tensor(expected.weights))
        state = self.saved()
        assert (state["step"], state["skipped"], state["held"]) == (expected.step, expected.skipped, expected.held)
        assert weighter.frozen == expected.frozen
        assert state["state"].keys() == expected.state.keys()
        assert all(torch.equal(value, tensor(expected.state[name])) for name, value in state["state"].items())
        mean = expected.sum / expected.unfrozen_steps if expected.unfrozen_steps else weights
        assert list(weighter.average_weights.values()) == mean.tolist()
        assert [step for step, _ in weighter.history] == expected.history
        logged = weighter.log_values()
        assert logged["weighting/skipped_steps"] == expected.skipped
        limited = None if expected.bound is None else expected.bound.limited
        assert logged.get("weighting/limited_steps") == limited
        assert type(self.method).__name__ in weighter.describe()

    @invariant()
    def nothing_is_out_of_bounds(self) -> None:
        weights = torch.tensor(list(self.weighter.weights.values()), dtype=torch.float64)
        assert weights.isfinite().all()
        assert (weights > 0).all() or self.method.acts_on == "shared"
        if self.method.keeps_sum:
            assert weights.sum().item() == pytest.approx(self.method.init(TASKS)[0].sum().item(), rel=1e-12)
        assert all(value.double().isfinite().all() for value in self.saved()["state"].values())

    def teardown(self) -> None:
        if not hasattr(self, "weighter"):
            return
        try:
            for step in range(3):
                self.a_good_step(step)
                self.is_as_the_model_says()
        finally:
            self.weighter.detach()
            for task in TASKS:
                model().heads[task].overflows = False
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model().modules())


def machine(method: Method, lag: int = 1) -> Any:
    """The test case of a method."""
    calls = type(f"Calls{type(method).__name__}", (Calls,), {"method": method, "lag": lag})
    case = calls.TestCase
    case.settings = settings(
        max_examples=80,
        stateful_step_count=30,
        derandomize=True,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],  # a matter of the machine
    )
    return case


TestGradNorm = machine(GradNorm())
TestCoV = machine(CoVWeighting())
TestRotoGrad = machine(RotoGrad())
TestConFIG = machine(ConFIG())
TestMGDAAtLagZero = machine(MGDA(), lag=0)


def test_the_bound_acts_in_these_calls() -> None:
    """Else the machines would not see it: a task is faint, silent, absent and back, and so is the saved state."""
    calls = type("Scripted", (Calls,), {"method": ConFIG()})()
    calls.build(accelerated=False, every=1, after=0)
    faint, silent = Request(1, fault=("faint", "b")), Request(2, fault=("silent", "b"))
    for request in (*map(Request, (0, 1, 2)), faint, faint, silent, Request(0, zero=frozenset("b")), Request(1), faint):
        calls.backward_of_a_micro_batch(request, sync=True, evaluated=False)
        calls.is_as_the_model_says()
        calls.save_and_load(strict=True, twice=False)
        calls.is_as_the_model_says()
    assert calls.model.bound.at_it == [False, True, False] and calls.model.bound.limited == 5
    calls.teardown()
