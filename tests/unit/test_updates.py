"""When weights move and when they do not: freezing, resetting, the rhythm of updates, and their average."""

from __future__ import annotations

import pytest
import torch

from accel_weighting import EqualWeighting, Weighter
from accel_weighting.methods.mgda import MGDA
from tests.small import (
    GRADNORM,
    assert_gradients_by_hand,
    assert_statistics_by_hand,
    fake_accelerator,
    gradients_by_hand,
    losses_of,
    weighter_and_model,
)

# ---- frozen, dropped and failed windows ----------------------------------------------------------------------------


def test_frozen_weights_hold_and_the_backward_is_the_plain_weighted_one():
    weighter, model = weighter_and_model(initial_weights={"seg": 0.3})
    weighter.backward(losses_of(model))
    moved, seen = weighter.weights, weighter.statistics
    weighter.freeze()
    assert weighter.frozen and "frozen" in repr(weighter)
    for step in range(1, 3):
        model.zero_grad()
        weighter.backward(losses_of(model, step))
        assert_gradients_by_hand(model, moved, step)
    assert weighter.weights == moved and weighter.statistics is seen
    weighter.unfreeze()
    assert not weighter.frozen
    weighter.backward(losses_of(model))
    assert weighter.weights != moved and weighter.statistics.step == 3


def test_with_freeze_unfreezes_at_its_end():
    weighter, model = weighter_and_model()
    with pytest.raises(KeyError), weighter.freeze() as inner:
        assert inner is weighter and weighter.frozen
        weighter.backward(losses_of(model))
        raise KeyError
    assert not weighter.frozen and weighter.weights == {"depth": 1, "seg": 1}
    weighter.backward(losses_of(model))
    assert weighter.weights != {"depth": 1, "seg": 1}


def test_a_freeze_inside_a_freeze_leaves_the_outer_one() -> None:
    weighter = Weighter(EqualWeighting(), ["a"])
    weighter.freeze()
    with weighter.freeze():
        assert weighter.frozen
    assert weighter.frozen


def test_a_micro_batch_can_be_frozen_alone():
    accelerator = fake_accelerator(sync=False)
    weighter, model = weighter_and_model(accelerator=accelerator)
    weighter.backward(losses_of(model, 1), freeze=True)
    accelerator.sync_gradients = True
    weighter.backward(losses_of(model, 0))
    assert weighter.statistics.micro_batches == 1
    assert_statistics_by_hand(weighter, model)
    weights = weighter.weights
    weighter.backward(losses_of(model, 2), freeze=True)
    assert weighter.weights == weights and weighter.statistics.step == 0


def test_freeze_drops_the_open_window():
    accelerator = fake_accelerator(sync=False)
    weighter, model = weighter_and_model(accelerator=accelerator)
    weighter.backward(losses_of(model, 1))
    with weighter.freeze():
        pass
    accelerator.sync_gradients = True
    weighter.backward(losses_of(model))
    assert weighter.statistics.micro_batches == 1


def test_reset_drops_the_open_window():
    accelerator = fake_accelerator(sync=False)
    weighter, model = weighter_and_model(accelerator=accelerator)
    weighter.backward(losses_of(model, 1))
    weighter.reset()
    accelerator.sync_gradients = True
    weighter.backward(losses_of(model))
    assert weighter.statistics.micro_batches == 1
    assert_statistics_by_hand(weighter, model)


def test_an_exception_in_a_backward_leaves_nothing_of_its_window():
    weighter, model = weighter_and_model()

    def fail(gradient):
        raise KeyError("the user's own hook")

    losses = losses_of(model)
    losses["seg"].register_hook(fail)
    with pytest.raises(KeyError):
        weighter.backward(losses)
    gradients_by_hand(model)
    torch.autograd.grad(losses_of(model, 1)["depth"], model.embed.weight)  # not a part of any window
    model.zero_grad()
    weighter.backward(losses_of(model))
    assert weighter.statistics.micro_batches == 1
    assert_statistics_by_hand(weighter, model)


@pytest.mark.parametrize("why", ["detached", "no backward"])
def test_a_later_window_without_gradients_is_refused(why):
    weighter, model = weighter_and_model()
    weighter.backward(losses_of(model))
    before = weighter.weights
    with pytest.raises(RuntimeError, match="Losses `depth`, `seg` do not depend on the branch"):
        if why == "detached":
            weighter.detach()
            weighter.backward(losses_of(model))
        else:
            weighter.combine(losses_of(model))
            weighter.step()
    assert weighter.weights == before


# ---- the rhythm of updates, and the average ------------------------------------------------------------------------


def test_update_every_and_update_after():
    weighter, model = weighter_and_model(update_every=3, update_after=2)
    seen = []
    for step in range(9):
        before = weighter.weights
        weighter.backward(losses_of(model, step))
        seen.append((weighter.weights != before, weighter.statistics and weighter.statistics.step))
    assert [moved for moved, _ in seen] == [step in (2, 5, 8) for step in range(9)]
    assert [step for _, step in seen] == [None, None, 2, 2, 2, 5, 5, 5, 8]


def test_average_weights_are_those_that_were_applied_in_the_unfrozen_steps():
    weighter, model = weighter_and_model(update_after=1)
    assert weighter.average_weights == weighter.weights
    applied = []
    for step in range(6):
        if step == 3:
            weighter.freeze()
        if step == 4:
            weighter.unfreeze()
        if step not in (0, 3):
            applied.append(weighter.weights["depth"])
        weighter.backward(losses_of(model, step))
    assert weighter.average_weights["depth"] == pytest.approx(sum(applied) / 4, rel=1e-14)
    assert len(set(applied)) == 4


@pytest.mark.parametrize(("method", "options"), [(GRADNORM, {"update_every": 2}), (MGDA(), {"lag": 0})])
def test_a_step_whose_every_micro_batch_was_frozen_does_not_count_in_the_average(method, options):
    weighter, model = weighter_and_model(method, **options)
    applied = []
    for step in range(6):
        before = weighter.weights["depth"]
        frozen = step in (1, 4)
        weighter.backward(losses_of(model, step), freeze=frozen)
        if not frozen:
            applied.append(before if weighter.lag else weighter.weights["depth"])
    assert len(set(applied)) > 1
    assert weighter.average_weights["depth"] == pytest.approx(sum(applied) / 4, rel=1e-14)


def test_average_weights_with_lag_0_are_those_of_the_steps_themselves():
    weighter, model = weighter_and_model(MGDA(), lag=0)
    applied = []
    for step in range(3):
        weighter.backward(losses_of(model, step))
        applied.append(weighter.weights["depth"])  # of the window that has just been, its only micro-batch
    assert len(set(applied)) > 1
    assert weighter.average_weights["depth"] == pytest.approx(sum(applied) / 3, rel=1e-14)
