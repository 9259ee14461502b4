"""Passes beside the weighter's own: other losses, the user's own gradients, late backwards, evaluations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accel_weighting import CoVWeighting, RotoGrad, Weighter
from accel_weighting.methods.mgda import MGDA
from tests.small import (
    EXACT,
    GRADNORM,
    TASKS,
    apply_heads,
    assert_close,
    assert_gradients_by_hand,
    assert_statistics_by_hand,
    batch,
    fake_accelerator,
    gradients_by_hand,
    losses_of,
    net,
    representation,
    task_losses,
    weighter_and_model,
)

# ---- other gradients through the branch ----------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "between micro-batches", "after"])
def test_a_generators_step_through_the_discriminator_is_not_recorded(when):
    torch.manual_seed(0)
    generator = nn.Linear(6, 6).double()
    accelerator = fake_accelerator(sync=False)
    weighter, model = weighter_and_model(accelerator=accelerator, initial_weights={"depth": 0.5})

    def fool(model):
        x, y = batch(0, 2, torch.float64)
        return sum(task_losses(model(generator(x)), y).values())

    for moment in ("before", "first", "between micro-batches", "last", "after"):
        accelerator.sync_gradients = moment == "last"
        if moment in ("first", "last"):
            weighter.backward(losses_of(model))
        elif moment == when:
            fool(model).backward()
    G = gradients_by_hand(model)
    assert_close(weighter.statistics.gram, G @ G.T / 2, **EXACT)  # the same rows twice, each at 1/2
    expected = torch.autograd.grad(fool(net()), generator.weight)[0]
    torch.testing.assert_close(generator.weight.grad, expected, **EXACT)


@pytest.mark.parametrize("method", [GRADNORM, MGDA()], ids=["losses", "shared"])
@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_second_backward_by_the_user_adds_its_gradients_and_is_not_measured(first, method):
    """It cannot be told from a loss of the trunk's own; the gradients of both are in the parameters."""
    weighter, model = weighter_and_model(method, initial_weights={"depth": 0.5, "seg": 0.25})
    losses = losses_of(model)
    if first == "theirs":
        sum(losses.values()).backward(retain_graph=True)
        weighter.backward(losses)
    else:
        weighter.backward(losses, retain_graph=True)
        sum(losses.values()).backward()
    assert_statistics_by_hand(weighter, model)
    twin = net()
    fresh = Weighter(method, TASKS, heads=dict(twin.heads), initial_weights={"depth": 0.5, "seg": 0.25})
    fresh.backward(losses_of(twin))
    fresh.detach()
    sum(losses_of(twin).values()).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **EXACT)
    assert weighter.weights == fresh.weights


def test_a_users_own_gradient_between_forward_and_backward():
    weighter, model = weighter_and_model()
    losses = losses_of(model)
    mine = torch.autograd.grad(losses["seg"], model.shared.weight, retain_graph=True)[0]
    penalty = torch.autograd.grad(sum(losses.values()), model.embed.weight, retain_graph=True)[0]
    weighter.backward(losses)
    assert_statistics_by_hand(weighter, model)
    assert_gradients_by_hand(model, {"depth": 1, "seg": 1})
    twin = net()
    losses = losses_of(twin)
    torch.testing.assert_close(
        mine, torch.autograd.grad(losses["seg"], twin.shared.weight, retain_graph=True)[0], **EXACT
    )
    torch.testing.assert_close(penalty, torch.autograd.grad(sum(losses.values()), twin.embed.weight)[0], **EXACT)


def test_shared_weights_do_not_touch_a_foreign_gradient():
    weighter, model = weighter_and_model(MGDA())
    weighter.backward(losses_of(model))
    assert weighter.weights["depth"] != weighter.weights["seg"]
    model.zero_grad()
    sum(losses_of(model).values()).backward()
    assert_gradients_by_hand(model, {"depth": 1, "seg": 1})


def test_weights_on_the_shared_path_leave_the_heads_raw():
    weighter, model = weighter_and_model(MGDA())
    for step in range(2):
        weights = weighter.weights
        model.zero_grad()
        total = weighter.backward(losses_of(model, step))
        assert_statistics_by_hand(weighter, model, step)
        assert total.item() == pytest.approx(sum(losses_of(model, step).values()).item(), rel=1e-14)
        twin = net()
        losses = losses_of(twin, step)
        trunk = [p for name, p in twin.named_parameters() if not name.startswith("heads")]
        shared = torch.autograd.grad(sum(weights[task] * losses[task] for task in TASKS), trunk, retain_graph=True)
        raw = torch.autograd.grad(sum(losses.values()), list(twin.heads.parameters()))
        for p, expected in zip(model.parameters(), [*shared, *raw], strict=True):
            torch.testing.assert_close(p.grad, expected, **EXACT)
    assert weights["depth"] != weights["seg"]


def test_a_loss_of_the_trunks_own_joins_the_total():
    weighter, model = weighter_and_model()
    x, y = batch(0, 2, torch.float64)
    z = representation(model, x)
    losses = task_losses(apply_heads(model.heads, z), y)
    (weighter.combine(losses) + 0.1 * z.square().mean()).backward()
    weighter.step()
    assert_statistics_by_hand(weighter, model)


@pytest.mark.parametrize("closes", ["step", "reset"])
def test_a_backward_after_its_window_is_not_recorded(closes):
    weighter, model = weighter_and_model(method=CoVWeighting())
    late = weighter.combine(losses_of(model, 0))
    getattr(weighter, closes)()
    late.backward()
    weighter.backward(losses_of(model, 1))
    G = gradients_by_hand(model, 1)
    assert_close(weighter.statistics.gram, G @ G.T, **EXACT)


# ---- evaluations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [GRADNORM, CoVWeighting(), RotoGrad(), MGDA()], ids=lambda method: type(method).__name__
)
@pytest.mark.parametrize("before", [0, 1])
def test_an_evaluation_in_inference_mode_is_of_no_consequence(method, before):
    (weighter, model), (plain, twin) = weighter_and_model(method), weighter_and_model(method)
    for step in range(3):
        if step >= before:
            with torch.inference_mode():
                weighter.combine(losses_of(model, step))
        weighter.backward(losses_of(model, step))
        plain.backward(losses_of(twin, step))
    assert weighter.weights == plain.weights


def test_an_evaluation_of_one_head_between_two_micro_batches_leaves_no_trace():
    accelerator = fake_accelerator(sync=False)
    weighter, model = weighter_and_model(accelerator=accelerator)
    weighter.backward(losses_of(model))
    with torch.no_grad():
        x, _ = batch(7, 2, torch.float64)
        model.heads["seg"](representation(model, x))
    accelerator.sync_gradients = True
    weighter.backward(losses_of(model))
    assert weighter.statistics.micro_batches == 2
    G = gradients_by_hand(model)
    assert_close(weighter.statistics.gram, G @ G.T / 2, **EXACT)  # the same rows twice, each at 1/2


def test_an_evaluation_between_a_forward_and_its_backward_changes_nothing():
    """A count of 0 is said at the head's output, which the evaluation must not take away."""
    weighter, model = weighter_and_model()
    losses = losses_of(model)
    with torch.no_grad():
        weighter.combine(losses_of(model, 1))
    weighter.backward({**losses, "seg": losses["seg"] * torch.nan}, num_items={"seg": 0})
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
