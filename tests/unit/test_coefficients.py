"""Coefficients that carry, on one process: code that sums inside, against a loop that passes the losses itself."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from accel_weighting import MGDA, CoVWeighting, EqualWeighting, GradNorm, StaticWeighting, Weighter
from accel_weighting.branch import Branch
from accel_weighting.coefficients import _Carried
from tests.methods.catalogue import CATALOGUE
from tests.ranks import accelerator_for, forget_accelerators
from tests.small import EXACT, TASKS, assert_close, batch, fake_accelerator, losses_of, net
from tests.unit.test_closures import Sam
from tests.unit.test_loops import STEPS, Loop, assert_same, whole

COV = CoVWeighting()
LOSSES_ONLY = [
    row
    for row in CATALOGUE
    if not row.build(TASKS).needs & {"norms", "gram", "moments"} and row.build(TASKS).acts_on == "losses"
]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    forget_accelerators()


def foreign(losses: Mapping[str, Tensor], weights: Mapping[str, Any], rest: float = 0.0) -> Tensor:
    """What such code does: a sum of losses of which only the total comes out."""
    total = 0.0
    for task, loss in losses.items():
        total += loss * weights[task]
    return total + rest * sum(losses.values())


def carried(weighter: Weighter, losses: Mapping[str, Tensor], **options: Any) -> Tensor:
    return weighter.attach(foreign(losses, weighter.coefficients()), **options)


def stepped(loop: Loop, step: int, **options: Any) -> None:
    carried(loop.weighter, loop.losses(step), **options).backward()
    loop.weighter.step()
    loop.stepped()


# ---- the same as passing the losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", LOSSES_ONLY, ids=[row.id for row in LOSSES_ONLY])
def test_every_method_on_losses_is_the_loop_that_passes_them(row: Any) -> None:
    method = row.build(TASKS)
    loop, one = Loop(method), whole(method)
    for step in range(STEPS):
        stepped(loop, step)
    assert_same(loop, one)
    mine, theirs = loop.weighter.statistics, one.weighter.statistics
    assert_close(mine.losses, theirs.losses, rtol=1e-12, atol=0)
    assert_close(mine.norms, theirs.norms, rtol=1e-12, atol=0)  # of the heads, which it has
    assert mine.present.all() and mine.micro_batches == 1 and mine.step == STEPS - 1
    assert loop.weighter.average_weights == pytest.approx(one.weighter.average_weights, rel=1e-12)
    for (_, a), (_, b) in zip(loop.weighter.history, one.weighter.history, strict=True):
        assert a == pytest.approx(b, rel=1e-12)


def test_there_are_methods_on_losses() -> None:
    assert len(LOSSES_ONLY) > 15


@pytest.mark.parametrize("branched", [True, False], ids=["heads", "none"])
def test_losses_are_those_that_the_code_computed(branched: bool) -> None:
    model = net()
    weighter = Weighter(COV, TASKS, heads=dict(model.heads) if branched else None)
    for step in range(3):
        losses = losses_of(model, step)
        weights = weighter.coefficients()
        assert {task: float(w.detach()) for task, w in weights.items()} == weighter.weights
        assert all(w.requires_grad and w.ndim == 0 for w in weights.values())
        total = foreign(losses, weights, rest=3.0)  # what holds no coefficient changes nothing
        assert weighter.attach(total) is total
        total.backward()
        weighter.step()
        assert_close(weighter.statistics.losses, np.array([float(losses[task].detach()) for task in TASKS]), **EXACT)
        assert (weighter.statistics.norms is not None) == branched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_coefficients_change_no_dtype_of_what_has_a_dimension(dtype: torch.dtype) -> None:
    weighter = Weighter(COV, TASKS)
    weights, rows = weighter.coefficients(), torch.ones(4, dtype=dtype, requires_grad=True)
    assert all((rows * w).dtype == dtype for w in weights.values())
    total = sum((rows.float() * 3 * w).mean() for w in weights.values())
    weighter.attach(total).backward()
    weighter.step()
    assert rows.grad is not None and rows.grad.dtype == dtype
    assert_close(weighter.statistics.losses, np.array([3.0, 3.0]), rtol=1e-7, atol=0)


def test_a_total_in_half_precision_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    weighter, x = Weighter(COV, TASKS), torch.ones(4, requires_grad=True)
    for _ in range(2):
        weights = weighter.coefficients()
        weighter.attach(sum((x * w).mean() for w in weights.values()).bfloat16()).backward()
        weighter.step()
    assert [record.message.startswith("Losses come in torch.bfloat16") for record in caplog.records] == [True]


# ---- accumulation ----------------------------------------------------------------------------------------------------


def test_accumulate_is_the_whole_batch() -> None:
    accelerator = accelerator_for("plain", gradient_accumulation_steps=3)
    loop = Loop(COV, accelerator)
    for step in range(STEPS):
        for part in range(3):
            with accelerator.accumulate(loop.model):
                accelerator.backward(carried(loop.weighter, loop.losses(step, part, 3)))
                loop.weighter.step()
                loop.optimizer.step()
                loop.optimizer.zero_grad()
        loop.weights.append(loop.weighter.weights)
    assert_same(loop, whole(COV))
    assert loop.weighter.statistics.micro_batches == 3


@pytest.mark.parametrize("closing", ["every micro-batch", "the last"])
@pytest.mark.parametrize("how", ["last=", "sync flag"])
def test_accumulation_by_hand_is_the_whole_batch(how: str, closing: str) -> None:
    accelerator = fake_accelerator() if how == "sync flag" else None
    loop, n = Loop(COV), 3
    loop.weighter.detach()
    loop.weighter = Weighter(COV, TASKS, accelerator=accelerator)
    for i in range(STEPS * n):
        last = (i + 1) % n == 0
        if accelerator is not None:
            accelerator.sync_gradients = last
        given = {} if accelerator is not None else {"last": last}
        (carried(loop.weighter, loop.losses(i // n, i % n, n), **given) / n).backward()
        if last or closing == "every micro-batch":
            loop.weighter.step()
        if last:
            loop.stepped()
    assert_same(loop, whole(COV))
    assert loop.weighter.statistics.micro_batches == n


def test_accumulation_by_hand_without_a_word_is_an_error() -> None:
    loop = Loop(COV)
    stepped(loop, 0)
    (carried(loop.weighter, loop.losses(1, 0, 2)) / 2).backward()
    loop.weighter.step()
    with pytest.raises(RuntimeError, match="its gradients are still in"):
        (carried(loop.weighter, loop.losses(1, 1, 2)) / 2).backward()


def test_counts_weigh_the_blocks_in_the_statistics() -> None:
    loop, sizes = Loop(COV), (6, 20, 10)
    for step in range(STEPS):
        x, y = batch(step, 2, torch.float64)
        for i, (u, v) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
            losses = {task: 10.0**k * (loop.model(u)[task] - v[:, k]).square().mean() for k, task in enumerate(TASKS)}
            total = carried(loop.weighter, losses, num_items=sizes[i], last=i == 2)
            (total * (sizes[i] / 36)).backward()
            loop.weighter.step()
        loop.stepped()
    assert_same(loop, whole(COV))


def test_several_totals_of_one_micro_batch_add_up() -> None:
    loop = Loop(COV)
    for step in range(STEPS):
        losses = loop.losses(step)
        with loop.weighter.micro_batch():
            for share in (0.25, 0.75):
                weights = loop.weighter.coefficients()
                loop.weighter.attach(share * foreign(losses, weights)).backward(retain_graph=True)
        loop.stepped()
    assert_same(loop, whole(COV))


def test_a_micro_batch_may_hold_losses_of_both_kinds() -> None:
    loop = Loop(COV)
    for step in range(STEPS):
        with loop.weighter.micro_batch():
            weight = loop.weighter.coefficients()["depth"]
            loop.weighter.attach(weight * loop.losses(step)["depth"], num_items={"seg": 0}).backward()
            loop.weighter.backward({"seg": loop.losses(step)["seg"]})
        loop.stepped()
    assert_same(loop, whole(COV))


def test_a_window_may_hold_losses_of_both_kinds() -> None:
    loop = Loop(COV)
    for step in range(STEPS):
        (carried(loop.weighter, loop.losses(step, 0, 2), last=False) / 2).backward()
        (loop.weighter.combine(loop.losses(step, 1, 2)) / 2).backward()
        loop.weighter.step()
        loop.stepped()
    assert_same(loop, whole(COV))


def test_coefficients_in_two_forwards_of_a_micro_batch_carry_the_sum() -> None:
    """And what is recomputed in a nested backward arrives in pieces."""
    loop = Loop(COV)
    for step in range(STEPS):
        weights, halves = loop.weighter.coefficients(), []
        for part in range(2):

            def half(anchor: Tensor, step: int = step, part: int = part, weights: Any = weights) -> Tensor:
                return foreign(loop.losses(step, part, 2), weights) / 2 + 0 * anchor

            halves.append(checkpoint(half, torch.zeros((), requires_grad=True), use_reentrant=True))
        loop.weighter.attach(sum(halves)).backward()
        loop.weighter.step()
        loop.stepped()
    assert_same(loop, whole(COV))


# ---- precision -------------------------------------------------------------------------------------------------------


class Precise(nn.Module):
    """A model under autocast whose losses are float32."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(6, 8), nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = torch.tanh(self.trunk(x))
        outputs = {task: head(z).squeeze(-1).float() for task, head in self.heads.items()}
        return {task: 10.0**k * (o - y[:, k]).square().mean() for k, (task, o) in enumerate(outputs.items())}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_losses_are_exact_under_a_loss_scale_and_in_half_precision(precision: str) -> None:
    scale = {"loss_scale": 2.0**12} if precision == "fp16" else {}
    accelerator = accelerator_for("plain", mixed_precision=precision, gradient_accumulation_steps=3, **scale)
    torch.manual_seed(0)
    model = Precise()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.01))
    weighter = Weighter(COV, TASKS, accelerator=accelerator)
    for step in range(STEPS):
        x, y = batch(step, 2, torch.float32)
        seen = []
        for u, v in zip(x.split(12), y.split(12), strict=True):
            with accelerator.accumulate(model):
                losses = model(u, v)
                seen.append([float(losses[task].detach()) for task in TASKS])
                accelerator.backward(carried(weighter, losses))
                weighter.step()
                optimizer.step()
                optimizer.zero_grad()
        assert_close(weighter.statistics.losses, np.array(seen).mean(0), rtol=1e-12, atol=0)
    assert weighter.log_values()["weighting/skipped_steps"] == 0 and weighter.weights["seg"] != 0.5


def test_an_overflow_under_a_scaler_is_held_as_where_losses_are_passed() -> None:
    """The factor at the total is infinite itself."""
    ends = []
    for coefficients in (True, False):
        torch.manual_seed(0)
        model = Precise()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        weighter = Weighter(COV, TASKS)
        for step in range(20):
            x, y = batch(step, 2, torch.float32)
            losses = model(x, y)
            total = carried(weighter, losses) if coefficients else weighter.combine(losses)
            scaler.scale(total).backward()
            weighter.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(weighter)
    assert all(np.isfinite(list(weighter.weights.values())).all() for weighter in ends)
    assert ends[0].weights == pytest.approx(ends[1].weights, rel=1e-5)


# ---- held, frozen, between updates, evaluation, paused, resumed ------------------------------------------------------


def same_with(change: Callable[[Loop, int], Any], method: Any = COV, **options: Any) -> None:
    """Two loops, by coefficients and by losses, with something happening in each step."""
    loops = [Loop(method, **options), Loop(method, **options)]
    for step in range(STEPS):
        for i, loop in enumerate(loops):
            losses = change(loop, step) or loop.losses(step)
            if i:
                loop.weighter.backward(losses)
            else:
                carried(loop.weighter, losses).backward()
                loop.weighter.step()
            if step == 2:  # what is not finite must not reach the model
                loop.optimizer.zero_grad()
            loop.stepped()
    assert_same(*loops)
    mine, theirs = (loop.weighter.log_values() for loop in loops)
    assert mine == pytest.approx(theirs, rel=1e-12)
    assert loops[0].weighter.average_weights == pytest.approx(loops[1].weighter.average_weights, rel=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_held_and_named(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    def spoil(loop: Loop, step: int) -> Any:
        losses = loop.losses(step)
        return losses | {"seg": losses["seg"] * bad} if step == 2 else losses

    same_with(spoil)
    assert {record.message for record in caplog.records} == {
        "Loss `seg` was not finite at optimizer step 2; weights are held."
    }


def test_losses_that_are_never_finite_are_an_error() -> None:
    loop = Loop(COV, max_skipped_steps=1)
    for step in range(2):
        carried(loop.weighter, {task: loss * torch.nan for task, loss in loop.losses(step).items()}).backward()
        if step:
            with pytest.raises(RuntimeError, match="2 steps in a row exceed `max_skipped_steps = 1`"):
                loop.weighter.step()
        else:
            loop.weighter.step()
        loop.optimizer.zero_grad()


def test_frozen_weights_stay() -> None:
    def change(loop: Loop, step: int) -> None:
        if step == 3:
            loop.weighter.freeze()
        if step == 5:
            loop.weighter.unfreeze()

    same_with(change)


@pytest.mark.parametrize("options", [{"update_every": 3}, {"update_after": 2}, {"min_losses": {"seg": -1.0}}], ids=str)
def test_settings_hold(options: Any) -> None:
    same_with(lambda loop, step: None, **options)


def test_between_updates_no_hook_is_left_on_the_total() -> None:
    loop = Loop(COV)
    loop.weighter.freeze()
    weights = loop.weighter.coefficients()
    total = loop.weighter.attach(foreign(loop.losses(0), {task: float(w.detach()) for task, w in weights.items()}))
    total.backward()
    loop.weighter.step()  # a coefficient that was not used is nothing then
    assert loop.weighter.statistics is None and loop.weighter._progress.step == 1


def test_evaluation_leaves_no_trace() -> None:
    loop = Loop(COV)
    for step in range(STEPS):
        losses = loop.losses(step)
        weights = loop.weighter.coefficients()
        with torch.no_grad():
            plain = loop.weighter.coefficients()
            total = foreign(loop.losses(step + 7), plain)
            assert loop.weighter.attach(total) is total and not any(w.requires_grad for w in plain.values())
            assert {task: float(w) for task, w in plain.items()} == loop.weighter.weights
        with torch.inference_mode():
            assert float(loop.weighter.coefficients()["seg"]) == loop.weighter.weights["seg"]
        loop.weighter.attach(foreign(losses, weights)).backward()
        loop.weighter.step()
        loop.stepped()
    assert_same(loop, whole(COV))


@pytest.mark.parametrize("how", ["paused", "closure"])
def test_the_second_pass_of_sam_leaves_no_trace(how: str) -> None:
    ends = []
    for coefficients in (True, False):
        loop = Loop(COV)
        loop.optimizer = Sam(loop.model.parameters(), 0.01)

        def backward(step: int, loop: Loop = loop, coefficients: bool = coefficients) -> None:
            if coefficients:
                carried(loop.weighter, loop.losses(step)).backward()
                loop.weighter.step()
            else:
                loop.weighter.backward(loop.losses(step))

        for step in range(STEPS):
            backward(step)
            if how == "closure":
                loop.optimizer.step(lambda step=step, backward=backward: backward(step))
            else:
                shift = loop.optimizer.up()
                with loop.weighter.paused():
                    backward(step)
                loop.optimizer.move(shift, -1)
                loop.optimizer.step()
            loop.optimizer.zero_grad()
            loop.weights.append(loop.weighter.weights)
        ends.append(loop)
    assert_same(*ends)
    assert ends[0].weighter._progress.step == STEPS


def test_a_resumed_run_is_bitwise_the_uninterrupted_one() -> None:
    loop, again = Loop(COV), Loop(COV)
    for step in range(4):
        stepped(loop, step)
    again.model.load_state_dict(loop.model.state_dict())
    again.weighter.load_state_dict(loop.weighter.state_dict())
    for step in range(4, STEPS):
        stepped(loop, step)
        stepped(again, step)
        assert loop.weights[-1] == again.weights[-1]


def test_a_state_saved_inside_a_window_says_so() -> None:
    weighter = Weighter(COV, TASKS, accelerator=(accelerator := fake_accelerator(sync=False)))
    carried(weighter, losses_of(net())).backward()
    with pytest.warns(UserWarning, match="1 of its micro-steps is lost"):
        weighter.state_dict()
    assert accelerator.sync_gradients is False


# ---- tasks that are absent or not known ------------------------------------------------------------------------------


def test_an_absent_task_is_left_out_as_where_losses_are_passed() -> None:
    def absent(step: int) -> list[str]:
        return ["seg"] if step % 3 == 1 else []

    loop, other = Loop(COV), Loop(COV)
    for step in range(STEPS):
        losses = {task: loss for task, loss in loop.losses(step).items() if task not in absent(step)}
        carried(loop.weighter, losses, num_items=dict.fromkeys(absent(step), 0)).backward()
        loop.weighter.step()
        present = {task: loss for task, loss in other.losses(step).items() if task not in absent(step)}
        other.weighter.backward(present)
        assert list(loop.weighter.statistics.present) == [task not in absent(step) for task in TASKS]
        for one in (loop, other):
            one.stepped()
    for mine, theirs in zip(loop.weights, other.weights, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("several", [False, True], ids=["one total", "micro_batch()"])
def test_a_loss_of_a_task_that_was_said_to_be_absent_is_an_error(several: bool) -> None:
    loop = Loop(COV)
    with pytest.raises(RuntimeError, match=r"step 0 holds the loss of task `seg`, which .*Leave the task out of"):
        with loop.weighter.micro_batch() if several else contextlib.nullcontext():
            carried(loop.weighter, loop.losses(0), num_items={"seg": 0}).backward()
        loop.weighter.step()
    loop.optimizer.zero_grad()
    stepped(loop, 0)  # and it goes on
    assert loop.weighter.statistics.present.all()


def test_a_loss_that_is_not_finite_of_an_absent_task_is_an_error_too() -> None:
    loop = Loop(COV)
    losses = loop.losses(0)
    carried(loop.weighter, losses | {"seg": losses["seg"] * torch.nan}, num_items={"seg": 0}).backward()
    with pytest.raises(RuntimeError, match="holds the loss of task `seg`"):
        loop.weighter.step()


def test_zeros_in_place_of_an_absent_task_are_no_loss_of_it() -> None:
    loop = Loop(COV)
    losses = loop.losses(0)
    carried(loop.weighter, losses | {"seg": losses["seg"] * 0}, num_items={"seg": 0}).backward()
    loop.weighter.step()
    assert list(loop.weighter.statistics.present) == [True, False] and loop.weighter.statistics.losses[1] == 0


# ---- totals that are not linear --------------------------------------------------------------------------------------

CURVED: dict[str, tuple[Any, list[str]]] = {
    "a power": (lambda w, a, b: w["depth"] ** 2 * a + w["seg"] * b, ["depth"]),
    "a square by itself": (lambda w, a, b: w["depth"] * w["depth"] * a + w["seg"] * b, ["depth"]),
    "a logarithm": (lambda w, a, b: torch.log(w["depth"] * a + 1) + w["seg"] * b, ["depth"]),
    "inside of a loss": (lambda w, a, b: (w["depth"] * a - 3.0).square() + w["seg"] * b, ["depth"]),
    "coefficients that are normalised": (lambda w, a, b: (w["depth"] * a + w["seg"] * b) / sum(w.values()), TASKS),
    "their softmax": (lambda w, a, b: torch.stack(list(w.values())).softmax(0) @ torch.stack([a, b]), TASKS),
    "a product of two": (lambda w, a, b: w["depth"] * (a + w["seg"] * b), TASKS),
    "a geometric mean": (lambda w, a, b: torch.sqrt(w["depth"] * a * w["seg"] * b), TASKS),
    "a task that is small": (lambda w, a, b: w["depth"] * a + 1e-4 * w["seg"] ** 2 * b, ["seg"]),
}

LINEAR: dict[str, Any] = {
    "a sum": lambda w, a, b: w["depth"] * a + w["seg"] * b,
    "a mean of a stack": lambda w, a, b: torch.stack([w["depth"] * a, b * w["seg"]]).mean(),
    "a dot product": lambda w, a, b: torch.stack([*w.values()]).dot(torch.stack([a, b])),
    "a matrix": lambda w, a, b: (torch.stack([a, b]).view(1, 2) @ torch.stack([*w.values()]).view(2, 1)).squeeze(),
    "rows": lambda w, a, b: (torch.ones(4) * a * w["depth"]).mean() / 4 + (w["seg"] * b - 1) + a * b,
    "in place": lambda w, a, b: torch.zeros((), dtype=torch.float64).add_(w["depth"] * a).sub_(-w["seg"] * b),
    "cast": lambda w, a, b: w["depth"].float() * a.float() + (w["seg"].bfloat16() * b.bfloat16()).float(),
    "coefficients relative to one": lambda w, a, b: (a + w["seg"] / w["depth"] * b) * w["depth"],
    "of which a part is chosen": lambda w, a, b: torch.maximum(w["depth"] * a, a * 0) + torch.relu(w["seg"] * b),
}


@pytest.mark.parametrize("how", CURVED)
def test_a_total_that_is_not_linear_is_an_error_that_names_whose(how: str) -> None:
    loop, (total, tasks) = Loop(COV), CURVED[how]
    losses = loop.losses(0)
    weights = loop.weighter.coefficients()
    bent = total(weights, *losses.values()) + 5 * losses["depth"]
    names = ", ".join(f"`{task}`" for task in tasks)
    with pytest.raises(RuntimeError, match=f"is not linear in the coefficients of {names}: .*multiply each loss once"):
        loop.weighter.attach(bent)
    assert all(p.grad is None for p in loop.model.parameters()) and all(w.grad is None for w in weights.values())
    loop.weighter.attach(foreign(losses, weights)).backward()  # nothing has happened
    loop.weighter.step()


def test_many_coefficients_that_are_normalised_are_an_error() -> None:
    weighter = Weighter(COV, [f"t{k}" for k in range(300)])
    weights, x = torch.stack([*weighter.coefficients().values()]), torch.rand(300, requires_grad=True)
    with pytest.raises(RuntimeError, match="is not linear in the coefficients of `t0`, `t1`"):
        weighter.attach((weights * (x + 1)).sum() / weights.sum())


@pytest.mark.parametrize("how", LINEAR)
def test_a_linear_total_raises_no_alarm(how: str) -> None:
    loop = Loop(COV)
    for step in range(2):
        losses = loop.losses(step)
        loop.weighter.attach(LINEAR[how](loop.weighter.coefficients(), *losses.values())).backward()
        loop.weighter.step()
        loop.stepped()


def test_a_graph_that_multiplies_and_adds_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is asked is asked once for every task."""
    asked = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: (asked.append(1), grad(*args, **options))[1])
    for total, number in ((LINEAR["a sum"], 0), (LINEAR["coefficients relative to one"], 5)):
        loop = Loop(COV)
        asked.clear()
        for step in range(3):
            losses = loop.losses(step)
            loop.weighter.attach(total(loop.weighter.coefficients(), *losses.values())).backward()
            loop.weighter.step()
            loop.stepped()
        assert len(asked) == number


class Square(torch.autograd.Function):
    """Somebody's own, which may not bear to run twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g  # type: ignore[no-any-return]


def test_what_is_hidden_is_not_asked() -> None:
    """As the documentation says."""
    loop = Loop(COV)
    losses, weights = loop.losses(0), loop.weighter.coefficients()
    total = Square.apply(weights["depth"]) * losses["depth"] + weights["seg"] * losses["seg"]  # type: ignore[no-untyped-call]
    loop.weighter.attach(total).backward()
    loop.weighter.step()


@pytest.mark.parametrize(
    "cut", [lambda w: float(w.detach()), Tensor.detach, lambda w: w.clone().detach().requires_grad_()]
)
def test_a_coefficient_turned_into_a_number_is_an_error_that_names_task_and_cure(cut: Any) -> None:
    loop = Loop(COV)
    weights = loop.weighter.coefficients()
    loop.weighter.attach(foreign(loop.losses(0), weights | {"seg": cut(weights["seg"])})).backward()
    with pytest.raises(RuntimeError, match="holds not all coefficients: no gradient came to that of task `seg`, ") as e:
        loop.weighter.step()
    assert "`float(w)`" in str(e.value) and "`weighter.attach(total, num_items={'seg': 0})`" in str(e.value)
    loop.optimizer.zero_grad()
    stepped(loop, 0)  # and it goes on
    assert loop.weighter.statistics is not None


def test_a_total_without_any_coefficient_is_an_error() -> None:
    loop = Loop(COV)
    loop.weighter.coefficients()
    loop.weighter.attach(sum(loop.losses(0).values())).backward()
    with pytest.raises(RuntimeError, match=r"at optimizer step 0 holds no coefficient at all: .* `depth`, `seg`"):
        loop.weighter.step()


def test_in_several_totals_a_missing_coefficient_is_an_error() -> None:
    loop = Loop(COV)
    with pytest.raises(RuntimeError, match="no gradient came to that of task `seg`"), loop.weighter.micro_batch():
        weight = loop.weighter.coefficients()["depth"]
        loop.weighter.attach(weight * loop.losses(0)["depth"]).backward()


def test_another_backward_through_the_coefficients_does_not_count() -> None:
    loop = Loop(COV)
    losses = loop.losses(0)
    weights = loop.weighter.coefficients()
    loop.weighter.attach(foreign(losses, weights)).backward(retain_graph=True)
    (5 * foreign(losses, weights)).backward()
    loop.weighter.step()
    assert_close(loop.weighter.statistics.losses, np.array([float(losses[task].detach()) for task in TASKS]), **EXACT)


# ---- order -----------------------------------------------------------------------------------------------------------


def test_coefficients_taken_twice_are_the_same() -> None:
    loop = Loop(COV)
    first, second = loop.weighter.coefficients(), loop.weighter.coefficients()
    assert all(first[task] is second[task] for task in TASKS)
    mixed = {"depth": first["depth"], "seg": second["seg"]}
    losses = loop.losses(0)
    loop.weighter.attach(foreign(losses, mixed)).backward()
    loop.weighter.step()
    assert_close(loop.weighter.statistics.losses, np.array([float(losses[task].detach()) for task in TASKS]), **EXACT)
    assert loop.weighter.coefficients()["seg"] is not first["seg"]


def test_coefficients_of_an_earlier_total_are_no_use() -> None:
    loop = Loop(COV)
    old = loop.weighter.coefficients()
    loop.weighter.attach(foreign(loop.losses(0), old)).backward()
    loop.weighter.step()
    loop.stepped()
    loop.weighter.coefficients()
    loop.weighter.attach(foreign(loop.losses(1), old)).backward()
    with pytest.raises(RuntimeError, match=r"holds no coefficient at all: .* coefficients of an earlier call"):
        loop.weighter.step()


@pytest.mark.parametrize("before", ["nothing", "a step", "reset", "freeze", "load"])
def test_a_total_without_coefficients_before_it(before: str) -> None:
    loop = Loop(COV)
    total = sum(loop.losses(0).values())
    if before == "a step":
        stepped(loop, 0)
    elif before != "nothing":
        loop.weighter.coefficients()
        {
            "reset": loop.weighter.reset,
            "freeze": loop.weighter.freeze,
            "load": lambda: loop.weighter.load_state_dict(loop.weighter.state_dict()),
        }[before]()
    with pytest.raises(RuntimeError, match="there are no coefficients that the total could hold"):
        loop.weighter.attach(total)


def test_a_step_without_attach() -> None:
    loop = Loop(COV)
    foreign(loop.losses(0), loop.weighter.coefficients()).backward()
    with pytest.raises(RuntimeError, match=r"the total that was made of `weighter.coefficients\(\)` never came"):
        loop.weighter.step()


def test_a_backward_without_attach_and_without_step() -> None:
    loop = Loop(COV)
    foreign(loop.losses(0), loop.weighter.coefficients()).backward()
    loop.stepped()
    with pytest.raises(RuntimeError, match="and its total was not attached"):
        loop.weighter.coefficients()
    stepped(loop, 1)


def test_a_step_without_backward() -> None:
    loop = Loop(COV)
    carried(loop.weighter, loop.losses(0))
    with pytest.raises(RuntimeError, match=r"its backward did not run before `weighter.step"):
        loop.weighter.step()


def test_a_backward_without_step() -> None:
    loop = Loop(COV)
    carried(loop.weighter, loop.losses(0)).backward()
    loop.stepped()
    with pytest.raises(RuntimeError, match="The last window was due and was not closed"):
        carried(loop.weighter, loop.losses(1))


def test_a_backward_of_what_was_computed_from_the_total() -> None:
    loop = Loop(COV)
    losses = loop.losses(0)
    (7 * carried(loop.weighter, losses) + 1).backward()
    loop.weighter.step()
    assert_close(loop.weighter.statistics.losses, np.array([float(losses[task].detach()) for task in TASKS]), **EXACT)


@pytest.mark.parametrize(
    ("total", "error", "match"),
    [
        (1.0, TypeError, "takes the total as a tensor. Found float"),
        (torch.ones(2, requires_grad=True), ValueError, r"shape \[\]. Found dtype float32, shape \[2\]: reduce it"),
        (torch.ones((), dtype=torch.int64), ValueError, "Found dtype int64"),
        (torch.ones(()), ValueError, "does not require grad"),
    ],
)
def test_what_is_no_total_is_refused_and_nothing_has_happened(total: Any, error: Any, match: str) -> None:
    loop = Loop(COV)
    weights = loop.weighter.coefficients()
    with pytest.raises(error, match=match):
        loop.weighter.attach(total)
    with pytest.raises(ValueError, match="Unknown task 'sge'"):
        loop.weighter.attach(foreign(loop.losses(0), weights), num_items={"sge": 0})
    with pytest.raises(ValueError, match=r"Missing: .'depth'."):
        loop.weighter.attach(foreign(loop.losses(0), weights), num_items={"seg": 3})
    loop.weighter.attach(foreign(loop.losses(0), weights)).backward()
    loop.weighter.step()


@pytest.mark.parametrize("method", [GradNorm(), MGDA()], ids=repr)
def test_methods_that_need_gradients_are_refused(method: Any) -> None:
    with pytest.raises(ValueError, match=r"gives losses alone. Use a method that needs losses only, such as CoV"):
        Loop(method).weighter.coefficients()


def test_what_is_needed_before_the_backward_is_refused() -> None:
    with pytest.raises(ValueError, match="Use `lag = 1`"):
        Weighter(COV, TASKS, lag=0).coefficients()
    with pytest.raises(ValueError, match=r"`max_losses = \{'seg': 1\.0\}` scales a loss down before the backward"):
        Weighter(COV, TASKS, max_losses={"seg": 1.0}).coefficients()


# ---- negative controls: what these comparisons would notice ----------------------------------------------------------


@pytest.mark.parametrize("broken", ["the factor is not read", "the weight is not in the norms' factors"])
def test_a_wrong_factor_would_be_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken.startswith("the factor"):
        begins = _Carried._begins
        monkeypatch.setattr(_Carried, "_begins", lambda self, factor: begins(self, torch.ones_like(factor)))
    else:
        watch, name = Branch.watch_total, "watch_total"
        ones = {"weights": torch.ones(2, dtype=torch.float64)}
        monkeypatch.setattr(Branch, name, lambda self, total, block, weights: watch(self, total, block, **ones))
    loop = Loop(COV)
    for part in range(2):
        losses = loop.losses(0, part, 2)
        (carried(loop.weighter, losses, last=part == 1) / 2).backward()
    loop.weighter.step()
    monkeypatch.undo()
    one = Loop(COV)
    one.weighter.backward(one.losses(0))
    mine, theirs = loop.weighter.statistics, one.weighter.statistics
    wrong = [mine.losses] if broken.startswith("the factor") else [mine.norms]
    right = [theirs.losses] if broken.startswith("the factor") else [theirs.norms]
    np.testing.assert_allclose(wrong[0], right[0] / 2, rtol=1e-12)  # CoV begins with weights of 1/2


# ---- what is left behind ---------------------------------------------------------------------------------------------


def test_a_graph_is_freed_with_its_total_without_the_garbage_collector() -> None:
    loop = Loop(EqualWeighting())
    for step in range(2):
        weights = loop.weighter.coefficients()
        total = foreign(loop.losses(step), weights)
        gone = [weakref.ref(total), *map(weakref.ref, weights.values())]
        loop.weighter.attach(total).backward()
        loop.weighter.step()
        loop.stepped()
        gc.collect()
        gc.disable()
        try:
            del weights, total
            assert not any(ref() is not None for ref in gone)
        finally:
            gc.enable()


def test_fixed_coefficients_are_the_codes_own_numbers() -> None:
    fixed = {"depth": 0.3, "seg": 1.7}
    loop, model = Loop(StaticWeighting(fixed)), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(STEPS):
        stepped(loop, step)
        optimizer.zero_grad()
        foreign(losses_of(model, step), fixed).backward()
        optimizer.step()
    for p, q in zip(loop.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, **EXACT)
