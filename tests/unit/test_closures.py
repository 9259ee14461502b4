"""Several passes in one optimizer step, on one process: closures of L-BFGS, SAM, a line search."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from accel_weighting import EqualWeighting, RotoGrad
from tests.small import TASKS
from tests.unit.test_loops import STEPS, Loop, assert_same, whole


def test_closures_of_lbfgs_are_one_step_with_the_same_weights_in_all_passes() -> None:
    loop = Loop()
    loop.optimizer = torch.optim.LBFGS(loop.model.parameters(), lr=0.1, max_iter=5, line_search_fn="strong_wolfe")
    passes: list[list[dict[str, float]]] = []
    for step in range(4):
        passes.append([])
        losses: list[float] = []

        def closure(step: int = step, losses: list[float] = losses) -> Tensor:
            loop.optimizer.zero_grad()
            passes[-1].append(loop.weighter.weights)  # those that this pass will use
            by_hand = sum(passes[-1][-1][task] * loss.item() for task, loss in loop.losses(step).items())
            with torch.no_grad():
                assert loop.weighter.combine(loop.losses(step)).item() == pytest.approx(by_hand, rel=1e-12)
            total = loop.weighter.backward(loop.losses(step))
            losses.append(float(total))
            assert losses[-1] == pytest.approx(by_hand, rel=1e-12)
            assert loop.weighter.weights == passes[-1][0]
            return total

        loop.optimizer.step(closure)
        assert losses[-1] < losses[0]
        loop.weights.append(loop.weighter.weights)
        assert loop.weights[-1] != passes[-1][0]
    assert all(len(weights) > 2 and all(w == weights[0] for w in weights) for weights in passes)
    assert loop.weighter._progress.step == 4 and len({str(weights[0]) for weights in passes}) == 4


class Sam(torch.optim.SGD):
    """Sharpness-aware minimization: the second pass is a closure, or comes between `up` and `down`."""

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            shift = self.up()
            with torch.enable_grad():
                closure()
            self.move(shift, -1)
        super().step()

    def up(self) -> list[Tensor]:
        shift = [p.grad * 0.05 for p in self.all]
        self.move(shift, 1)
        self.zero_grad()
        return shift

    @property
    def all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def move(self, shift: list[Tensor], sign: int) -> None:
        for p, d in zip(self.all, shift, strict=True):
            p.add_(d, alpha=sign)


def sam(loop: Loop, first: Callable[[int], Any], second: Callable[[int], Any], inside: bool) -> None:
    optimizer = Sam(loop.model.parameters(), lr=0.01)
    for step in range(STEPS):
        first(step)
        if inside:
            optimizer.step(lambda step=step: second(step))  # type: ignore[misc]
        else:
            shift = optimizer.up()
            second(step)
            optimizer.move(shift, -1)
            optimizer.step()
        optimizer.zero_grad()
        loop.weights.append(loop.weighter.weights)


def test_weights_are_those_of_the_last_recorded_pass_while_paused() -> None:
    loop = Loop()
    first = loop.weighter.weights
    loop.weighter.backward(loop.losses(0))
    after = loop.weighter.weights
    by_hand = sum(first[task] * loss.item() for task, loss in loop.losses(1).items())
    with loop.weighter.paused(), torch.no_grad():
        assert loop.weighter.weights == first
        assert loop.weighter.combine(loop.losses(1)).item() == pytest.approx(by_hand, rel=1e-12)
    assert loop.weighter.weights == after != first


@pytest.mark.parametrize("inside", [False, True], ids=["two passes in the loop", "a closure in the optimizer"])
def test_the_second_pass_of_sam_leaves_no_trace(inside: bool) -> None:
    """Against SAM by hand with the weights that the first passes saw; a closure's pass is known by itself."""
    loop, hand = Loop(), Loop(EqualWeighting())

    def second(step: int) -> None:
        with nullcontext() if inside else loop.weighter.paused():
            loop.weighter.backward(loop.losses(step))

    sam(loop, lambda step: loop.weighter.backward(loop.losses(step)), second, inside)
    weights = [dict.fromkeys(TASKS, 1.0), *loop.weights]

    def by_hand(step: int) -> None:
        sum(weights[step][task] * loss for task, loss in hand.losses(step).items()).backward()  # type: ignore[union-attr]

    sam(hand, by_hand, by_hand, inside)
    assert loop.weighter._progress.step == STEPS and len({str(w) for w in weights}) == STEPS + 1
    for p, q in zip(loop.model.parameters(), hand.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-14)


def test_a_line_search_keeps_the_open_window() -> None:
    loop = Loop()
    for step in range(STEPS):
        for part in range(2):
            (loop.weighter.combine(loop.losses(step, part, 2), last=part == 1) / 2).backward()
            kept = [p.grad.clone() for p in loop.model.parameters()]
            with loop.weighter.paused():
                loop.weighter.backward(loop.losses(step + 1))
                with torch.no_grad():
                    loop.weighter.combine(loop.losses(step + 2))
            for p, g in zip(loop.model.parameters(), kept, strict=True):
                p.grad = g
            loop.weighter.step()
        loop.stepped()
    assert_same(loop, whole())


def test_two_windows_in_each_optimizer_step_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """SAM without `paused`: gradients are taken away between the two."""
    loop = Loop()
    for step in range(25):
        for _ in range(2):
            loop.optimizer.zero_grad()
            loop.weighter.backward(loop.losses(step))
        loop.optimizer.step()
    assert [r.getMessage()[:52] for r in caplog.records if "windows" in r.getMessage()] == [
        "Each of the last 20 optimizer steps had two windows "
    ]


def test_a_pass_after_a_closures_step_finds_the_gradients_used() -> None:
    """L-BFGS leaves its gradients in `.grad`; the pass that follows may be of another optimizer."""
    loop = Loop()
    optimizer = torch.optim.LBFGS(loop.model.parameters(), lr=0.1, max_iter=2)
    optimizer.step(lambda: optimizer.zero_grad() or loop.weighter.backward(loop.losses(0)))
    loop.weighter.backward(loop.losses(1))
    assert loop.weighter._progress.step == 2


@pytest.mark.parametrize("how", ["paused", "a closure"])
def test_a_pass_that_repeats_another_has_its_rotations(how: str) -> None:
    """The same parameters and data give the same gradients, though the step has turned the rotations."""
    loop = Loop(RotoGrad(lr=0.3))
    for step in range(3):
        loop.weighter.backward(loop.losses(step))
        loop.model.zero_grad()
    loop.weighter.backward(loop.losses(3))
    used = [p.grad.clone() for p in loop.model.parameters()]
    outputs = [loss.item() for loss in loop.losses(3).values()]  # a forward between: with the new rotations

    seen: list[tuple[list[Tensor], list[float], dict[str, Tensor]]] = []

    def again() -> None:
        loop.model.zero_grad()
        losses = loop.losses(3)
        loop.weighter.backward(losses)
        with torch.no_grad():
            loop.losses(3)  # an evaluation inside has the same
        kept = [p.grad.clone() for p in loop.model.parameters()]
        seen.append((kept, [loss.item() for loss in losses.values()], loop.weighter.rotations))

    if how == "paused":
        for _ in range(2):
            with loop.weighter.paused():
                again()
    else:
        torch.optim.SGD(loop.model.parameters(), lr=0.0).step(again)
    for gradients, values, _ in seen:
        for g, expected in zip(gradients, used, strict=True):
            assert torch.equal(g, expected)
        assert values != outputs
    turned = loop.weighter.rotations
    assert all((turned[task] - R).norm() > 1e-3 for task, R in seen[-1][2].items())
