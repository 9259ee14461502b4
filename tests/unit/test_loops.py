"""Loops of every shape, on one process: what an optimizer step is, against the same data in one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accel_weighting import CoVWeighting, EqualWeighting, GradientBalancer, GradNorm, Weighter
from tests.ranks import accelerator_for, forget_accelerators
from tests.small import EXACT, TASKS, assert_close, batch, losses_of, net, task_losses

STEPS = 8
WAITING = "The last window was closed, and its gradients are still in `.grad`: no optimizer has stepped since"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    forget_accelerators()


class Loop:
    """A model, an optimizer, a weighter and a loop's batches, cut into `parts`."""

    def __init__(self, method: Any = None, accelerator: Any = None, **options: Any) -> None:
        self.model = net()
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=0.01)
        if accelerator is not None:
            self.model, self.optimizer = accelerator.prepare(self.model, self.optimizer)
        method = method or GradNorm(alpha=1.0, lr=0.05)
        self.weighter = Weighter(method, TASKS, accelerator=accelerator, heads=dict(self.model.heads), **options)
        self.weights: list[dict[str, float]] = []

    def losses(self, step: int, part: int = 0, parts: int = 1) -> dict[str, Tensor]:
        x, y = batch(step, 2, torch.float64)
        size = len(x) // parts
        rows = slice(part * size, (part + 1) * size)
        return task_losses(self.model(x[rows]), y[rows])

    def stepped(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.weights.append(self.weighter.weights)


def whole(method: Any = None) -> Loop:
    """The whole batch in one."""
    loop = Loop(method)
    for step in range(STEPS):
        loop.weighter.backward(loop.losses(step))
        loop.stepped()
    return loop


def assert_same(loop: Loop, other: Loop, rtol: float = 1e-12) -> None:
    assert loop.weighter._progress.step == other.weighter._progress.step
    for mine, theirs in zip(loop.weights, other.weights, strict=True):
        assert mine == pytest.approx(theirs, rel=rtol)
    for p, q in zip(loop.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-14)


# ---- accumulation by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain PyTorch", "Accelerate"])
@pytest.mark.parametrize("zero", [True, False], ids=["None", "zeros"])
def test_accumulation_by_hand_is_the_whole_batch(accelerated: bool, zero: bool) -> None:
    accelerator = accelerator_for("plain") if accelerated else None
    loop, n = Loop(accelerator=accelerator), 3
    for i in range(STEPS * n):
        total = loop.weighter.combine(loop.losses(i // n, i % n, n), last=(i + 1) % n == 0) / n
        accelerator.backward(total) if accelerator else total.backward()
        loop.weighter.step()
        if (i + 1) % n == 0:
            loop.optimizer.step()
            loop.optimizer.zero_grad(set_to_none=zero)
            loop.weights.append(loop.weighter.weights)
    assert_same(loop, whole())
    assert loop.weighter.statistics.micro_batches == n


def test_losses_that_are_divided_instead_of_the_total_differ_by_adams_eps_alone() -> None:
    """Their norms are divided too, and GradNorm's Adam adds 1e-8 to what it divides by; nothing else differs."""

    def weight(scale: float, divided: bool) -> float:
        loop = Loop(GradNorm(alpha=1.5))
        loop.optimizer.param_groups[0]["lr"] = 0.01 / scale
        for step in range(STEPS):
            for part in range(2):
                losses = {
                    name: loss * (scale / 2 if divided else scale) for name, loss in loop.losses(step, part, 2).items()
                }
                (loop.weighter.combine(losses, last=part == 1) / (1 if divided else 2)).backward()
                loop.weighter.step()
            loop.stepped()
        return loop.weights[-1]["seg"]

    differences = {scale: abs(weight(scale, True) - weight(scale, False)) for scale in (1e-4, 1e-2, 1e6)}
    assert differences[1e-4] == pytest.approx(100 * differences[1e-2], rel=0.05) and differences[1e-4] > 1e-7
    assert differences[1e6] < 1e-13


def test_accelerates_recipe_for_token_losses_is_the_whole_batch() -> None:
    """An inner loop over the batches of a step, each loss divided by the number of items of the whole step."""
    accelerator = accelerator_for("plain")
    loop, sizes = Loop(accelerator=accelerator), (6, 20, 10)
    for step in range(STEPS):
        x, y = batch(step, 2, torch.float64)
        for i, (u, v) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
            losses = task_losses(loop.model(u), v)
            total = loop.weighter.combine(losses, num_items=sizes[i], last=i == len(sizes) - 1)
            accelerator.backward(total * (sizes[i] / sum(sizes)))
            loop.weighter.step()
        loop.stepped()
    assert_same(loop, whole())


def test_fabrics_backward_is_the_whole_batch() -> None:
    fabric_module = pytest.importorskip("lightning_fabric", reason="Lightning Fabric is not installed")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    loop, n = Loop(), 3
    loop.model, loop.optimizer = fabric.setup(loop.model, loop.optimizer)
    for i in range(STEPS * n):
        with fabric.no_backward_sync(loop.model, enabled=(i + 1) % n != 0):
            fabric.backward(loop.weighter.combine(loop.losses(i // n, i % n, n), last=(i + 1) % n == 0) / n)
        loop.weighter.step()
        if (i + 1) % n == 0:
            loop.stepped()
    assert_same(loop, whole())


@pytest.mark.parametrize("how", ["backward", "combine"])
def test_accumulation_by_hand_without_a_word_is_an_error_that_names_last(how: str) -> None:
    loop = Loop()
    loop.weighter.backward(loop.losses(0))
    loop.stepped()

    def micro(part: int) -> None:
        losses = loop.losses(1, part, 2)
        if how == "backward":
            loop.weighter.backward(losses)
        else:
            (loop.weighter.combine(losses) / 2).backward()
            loop.weighter.step()

    micro(0)
    with pytest.raises(RuntimeError, match=WAITING) as caught:
        micro(1)
    assert "`weighter.backward(losses, last=(i + 1) % n == 0)`" in str(caught.value)


# ---- several backwards, one micro-batch ------------------------------------------------------------------------------


def test_a_backward_for_each_task_is_one_backward_of_the_sum() -> None:
    loop, seen = Loop(), []
    for step in range(STEPS):
        with loop.weighter.micro_batch():
            for task in TASKS:
                loop.weighter.backward({task: loop.losses(step)[task]})
        seen.append(loop.weighter.statistics)
        loop.stepped()
    one = whole()
    assert_same(loop, one)
    assert_close(seen[-1].losses, one.weighter.statistics.losses, **EXACT)
    assert_close(seen[-1].norms, one.weighter.statistics.norms, rtol=1e-12, atol=0)


def test_a_backward_for_each_task_under_accumulation() -> None:
    accelerator = accelerator_for("plain", gradient_accumulation_steps=2)
    loop = Loop(accelerator=accelerator)
    for step in range(STEPS):
        for part in range(2):
            with accelerator.accumulate(loop.model):
                with loop.weighter.micro_batch():
                    for task in TASKS:
                        loop.weighter.backward({task: loop.losses(step, part, 2)[task]})
                loop.optimizer.step()
                loop.optimizer.zero_grad()
        loop.weights.append(loop.weighter.weights)
    assert_same(loop, whole())
    assert loop.weighter.statistics.micro_batches == 2


# ---- no false alarm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", ["none", "zeros", "between combine and backward"])
def test_steps_that_the_user_skips_are_quiet(zero: str, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    for step in range(2 * STEPS):
        total = loop.weighter.combine(loop.losses(step))
        if zero.startswith("between"):
            loop.optimizer.zero_grad()
        total.backward()
        loop.weighter.step()
        if step % 3:
            loop.optimizer.step()
        if not zero.startswith("between"):
            loop.optimizer.zero_grad(set_to_none=zero == "none")
    assert loop.weighter._progress.step == 2 * STEPS and not caplog.records


def test_a_loss_scaler_of_ones_own_that_starts_too_high_is_quiet() -> None:
    loop = Loop()
    loop.model.float()
    loop.optimizer.param_groups[0]["lr"] = 1e-12
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=0.25)
    for step in range(40):
        x, y = batch(step, 2, torch.float32)
        losses = {task: 1e6 * loss for task, loss in task_losses(loop.model(x), y).items()}
        scaler.scale(loop.weighter.combine(losses)).backward()
        loop.weighter.step()
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
    assert scaler.get_scale() < 2.0**110 and all(math.isfinite(w) for w in loop.weighter.weights.values())


def each_step_of(loop: Loop, optimizers: list[Any], after: Callable[[int], Any] = lambda step: None) -> None:
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loop.weighter.backward(loop.losses(step))
        for optimizer in optimizers:
            optimizer.step()
        after(step)


def test_loops_that_are_quiet(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()  # two optimizers
    trunk = [p for name, p in loop.model.named_parameters() if "heads" not in name]
    each_step_of(loop, [torch.optim.SGD(trunk, 0.01), torch.optim.AdamW(loop.model.heads.parameters(), 0.01)])

    loop = Loop()  # a learning-rate finder: the rate rises, then all is loaded again
    before = loop.model.state_dict(), loop.optimizer.state_dict(), loop.weighter.state_dict()
    finder = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 2.0)
    each_step_of(loop, [loop.optimizer], lambda step: finder.step())
    for thing, state in zip((loop.model, loop.optimizer, loop.weighter), before, strict=True):
        thing.load_state_dict(state)
    each_step_of(loop, [loop.optimizer])

    loop = Loop()  # an optimizer inside the backward
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in loop.model.parameters()}

    def step_now(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in loop.model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    each_step_of(loop, [])

    accelerator = accelerator_for("plain")  # a scheduler alone is prepared
    loop, model = object.__new__(Loop), net()
    loop.model, loop.weighter = model, Weighter(GradNorm(), TASKS, accelerator=accelerator, heads=dict(model.heads))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1))
    each_step_of(loop, [optimizer], lambda step: scheduler.step())

    forget_accelerators()
    model = net()  # no optimizer at all
    weighter = Weighter(GradNorm(), TASKS, heads=dict(model.heads))
    for step in range(STEPS):
        weighter.backward(losses_of(model, step))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
                p.grad = None
    assert not caplog.records


def test_an_exception_in_an_optimizers_step_leaves_later_micro_batches_recorded() -> None:
    loop = Loop()

    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise MemoryError

    with pytest.raises(MemoryError):
        Broken(nn.Linear(1, 1).parameters(), lr=0.1).step()
    for i in range(STEPS * 2):
        (loop.weighter.combine(loop.losses(i // 2, i % 2, 2), last=i % 2 == 1) / 2).backward()
        loop.weighter.step()
        if i % 2:
            loop.stepped()
    assert_same(loop, whole())


# ---- losses that are added, and losses that can be negative ----------------------------------------------------------


def test_extra_losses_are_added_logged_and_held() -> None:
    loop = Loop(max_skipped_steps=1)
    weights = dict.fromkeys(TASKS, 1.0)
    for step in range(3):
        balance = 0.1 * loop.model.embed.weight.square().mean()
        weighed = sum(weights[task] * loss.item() for task, loss in loop.losses(step).items())
        total = loop.weighter.backward(loop.losses(step), extra={"balance": balance})
        assert float(total) == pytest.approx(weighed + balance.item(), rel=1e-12)
        assert loop.weighter.log_values()["loss/balance"] == pytest.approx(balance.item(), rel=1e-12)
        loop.stepped()
        weights = loop.weighter.weights
    with torch.no_grad():  # evaluation included
        losses, balance = loop.losses(0), loop.model.embed.weight.square().mean()
        more = loop.weighter.combine(losses, extra={"balance": balance}) - loop.weighter.combine(losses)
        assert more.item() == pytest.approx(balance.item(), rel=1e-9)
    held = loop.weighter.weights
    loop.weighter.backward(loop.losses(4), extra={"balance": loop.model.embed.weight.sum() * torch.nan})
    loop.optimizer.zero_grad()
    assert loop.weighter.weights == held and loop.weighter.log_values()["weighting/skipped_steps"] == 1
    with pytest.raises(
        RuntimeError, match=r"Loss `balance` was not finite at optimizer step 4; weights are held. 2 steps in a"
    ):
        loop.weighter.backward(loop.losses(5), extra={"balance": loop.model.embed.weight.sum() * torch.nan})


def test_losses_above_a_bound_below_zero_are_compared_by_their_distance_from_it() -> None:
    def shifted(loop: Loop, step: int, by: float) -> dict[str, Tensor]:
        losses = loop.losses(step)
        return losses | {"seg": losses["seg"] - by}

    loop, plain = Loop(CoVWeighting(), min_losses={"seg": -50.0}), Loop(CoVWeighting())
    for step in range(STEPS):
        loop.weighter.backward(shifted(loop, step, 50.0))
        plain.weighter.backward(plain.losses(step))
        loop.stepped()
        plain.stepped()
    assert_same(loop, plain, rtol=1e-9)
    held = loop.weighter.weights
    for _ in range(10):
        loop.weighter.backward(shifted(loop, STEPS, 1e4))
        loop.optimizer.zero_grad()
        assert loop.weighter.weights == held
    with pytest.raises(RuntimeError, match=r"below `min_losses\['seg'\] = -50`; weights are held.* 11 steps in a row"):
        loop.weighter.backward(shifted(loop, STEPS, 1e4))


def test_a_negative_loss_names_the_bound() -> None:
    loop = Loop(CoVWeighting())
    with pytest.raises(ValueError, match=r"Give its lower bound, `min_losses=\{task: bound\}`"):
        loop.weighter.backward({task: loss - 1e4 for task, loss in loop.losses(0).items()})


# ---- one task per batch ----------------------------------------------------------------------------------------------


def test_one_task_per_window_is_said_once_where_weights_do_not_move(caplog: pytest.LogCaptureFixture) -> None:
    for method, said in ((GradNorm(), 1), (GradientBalancer(), 1), (EqualWeighting(), 0)):
        caplog.clear()
        loop = Loop(method)
        for step in range(50):
            task = TASKS[step % 2]
            loop.weighter.backward({task: loop.losses(step)[task]})
            loop.stepped()
        found = [r.getMessage() for r in caplog.records]
        moved = loop.weights[-1] != loop.weights[0]
        assert len(found) == said * (not moved), (method, found)
        assert all("`CarryForward(method)`" in message for message in found)
