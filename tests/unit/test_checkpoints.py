"""`state_dict` and `load_state_dict`: a resumed run, what is refused, and what `strict=False` keeps."""

from __future__ import annotations

import io
import math

import pytest
import torch

from accel_weighting import (
    FAMO,
    CoVWeighting,
    DynamicWeightAverage,
    GradNorm,
    RotoGrad,
    RotoGradNorm,
    Smooth,
    SoftAdapt,
    StaticWeighting,
    Weighter,
)
from accel_weighting.methods.mgda import MGDA
from tests.small import GRADNORM, TASKS, fake_accelerator, losses_of, net, weighter_and_model

# ---- resumed -------------------------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "method",
    [GRADNORM, GradNorm(alpha=0.5, initial_loss_decay=0.9), CoVWeighting(), CoVWeighting(decay=0.9), MGDA()],
    ids=repr,
)
def test_resumed_from_a_checkpoint_a_run_is_bitwise_the_uninterrupted_one(method):
    weighter, model = weighter_and_model(method)
    for step in range(3):
        weighter.backward(losses_of(model, step))
    state = through_a_file(weighter.state_dict())
    again, twin = weighter_and_model(method, initial_weights={"depth": 3.0})
    again.load_state_dict(state)
    assert again.weights == weighter.weights and again.history == weighter.history
    for step in range(3, 6):
        weighter.backward(losses_of(model, step))
        again.backward(losses_of(twin, step))
    assert again.weights == weighter.weights
    assert again.average_weights == weighter.average_weights
    assert again.history == weighter.history and again.log_values() == weighter.log_values()
    assert again.statistics.step == 5
    one, other = weighter.state_dict(), again.state_dict()
    assert one["state"].keys() == other["state"].keys()
    assert all(torch.equal(one["state"][key], other["state"][key]) for key in one["state"])


def test_a_saved_state_does_not_move_with_the_weighter():
    weighter, model = weighter_and_model()
    weighter.backward(losses_of(model))
    state = weighter.state_dict()
    before = through_a_file(state)
    for step in range(3):
        weighter.backward(losses_of(model, step))
    assert torch.equal(state["weights"], before["weights"])
    assert all(torch.equal(state["state"][key], before["state"][key]) for key in state["state"])
    assert torch.equal(state["record"]["loss_moments"], before["record"]["loss_moments"])
    again, twin = weighter_and_model()
    again.load_state_dict(state)
    again.backward(losses_of(twin))
    assert torch.equal(state["record"]["loss_moments"], before["record"]["loss_moments"])


def test_frozen_and_skipped_steps_are_saved():
    weighter, model = weighter_and_model()
    weighter.backward({task: loss * torch.nan for task, loss in losses_of(model).items()})
    weighter.freeze()
    again, _ = weighter_and_model()
    again.load_state_dict(through_a_file(weighter.state_dict()))
    assert again.frozen and again.log_values()["weighting/skipped_steps"] == 1


# ---- refused -------------------------------------------------------------------------------------------------------


def test_checkpoint_of_another_weighter_is_refused_with_all_differences():
    weighter, _ = weighter_and_model()
    model = net(["depth", "normals"])
    other = Weighter(CoVWeighting(), ["depth", "normals"], heads=dict(model.heads))
    before = other.weights
    with pytest.raises(ValueError, match="Differences: tasks, method") as caught:
        other.load_state_dict(weighter.state_dict())
    message = str(caught.value)
    assert "['depth', 'seg'] in the checkpoint, ['depth', 'normals'] here" in message
    assert f"{GRADNORM!r} in the checkpoint, {CoVWeighting()!r} here" in message
    assert "`strict=False`" in message and other.weights == before
    with pytest.raises(ValueError, match="Differences: version"):
        other.load_state_dict({**other.state_dict(), "version": 99}, strict=False)


@pytest.mark.parametrize(
    ("method", "setting", "text"),
    [
        (MGDA(), {"lag": 0}, "lag: 1 in the checkpoint, 0 here"),
        (GRADNORM, {"update_every": 3}, "update_every: 1 in the checkpoint, 3 here"),
        (GRADNORM, {"shared_layer": "shared"}, r"shared_layer: None in the checkpoint, \(\d, \d\) here"),
    ],
    ids=["lag", "update_every", "shared_layer"],
)
def test_checkpoint_of_other_settings_that_move_the_weights_is_refused(method, setting, text):
    weighter, model = weighter_and_model(method)
    for step in range(3):
        weighter.backward(losses_of(model, step))
    model = net()
    again = Weighter(method, TASKS, heads=dict(model.heads), model=model, **setting)
    with pytest.raises(ValueError, match=f"Differences: {next(iter(setting))}\\.\n  {text}\n"):
        again.load_state_dict(weighter.state_dict())
    again.load_state_dict(weighter.state_dict(), strict=False)
    assert again.weights == weighter.weights and again.average_weights == weighter.average_weights
    assert all(torch.equal(v, again.state_dict()["state"][n]) for n, v in weighter.state_dict()["state"].items())
    weighter.update_every = 5  # as it is when it is saved
    assert weighter.state_dict()["update_every"] == 5
    weighter.update_every = 1
    free, _ = weighter_and_model(method, update_after=7, max_losses={"seg": 3.0}, max_skipped_steps=1)
    free.load_state_dict(weighter.state_dict())


@pytest.mark.parametrize("state", [{}, {"kind": "other", "params": 1}, None, [1]], ids=str)
def test_checkpoint_of_something_else_is_refused(state):
    weighter, _ = weighter_and_model()
    with pytest.raises(ValueError, match=r"does not hold a weighter's state \(keys: .*in the same order"):
        weighter.load_state_dict(state)


# ---- `strict=False`: what fits is kept -----------------------------------------------------------------------------


KEEP = [GRADNORM, CoVWeighting(), CoVWeighting(total="tasks"), DynamicWeightAverage(), FAMO(), Smooth(SoftAdapt(), 0.5)]


@pytest.mark.parametrize("method", KEEP, ids=repr)
@pytest.mark.parametrize(("before", "after"), [("ab", "acb"), ("abc", "ab")], ids=["a task added", "a task removed"])
def test_checkpoint_of_other_tasks_keeps_the_sum_of_the_weights(method, before, after):
    def weighter_after(tasks, steps, saved=None):
        model = net(list(tasks))
        weighter = Weighter(method, list(tasks), heads=dict(model.heads))
        total = sum(weighter.weights.values())
        if saved is not None:
            weighter.load_state_dict(saved, strict=False)
            for values in (weighter.weights, weighter.average_weights):
                assert sum(values.values()) == pytest.approx(total, rel=1e-12)
        for step in range(steps):
            weighter.backward(losses_of(model, step, len(tasks)))
        return weighter, total

    old, _ = weighter_after(before, 5)
    assert len(set(old.weights.values())) > 1
    again, total = weighter_after(after, 3, old.state_dict())
    assert sum(again.weights.values()) == pytest.approx(total, rel=1e-12)


def test_checkpoint_with_a_task_added_keeps_what_fits():
    weighter, model = weighter_and_model()
    for step in range(3):
        weighter.backward(losses_of(model, step))
    saved = weighter.state_dict()
    tasks = ["seg", "normals", "depth"]
    larger = net(tasks)
    again = Weighter(GRADNORM, tasks, heads=dict(larger.heads))
    again.load_state_dict(through_a_file(saved), strict=False)
    assert again.weights == {**weighter.weights, "normals": 1}
    for name in ("initial_losses", "adam_mean"):
        new, old = again.state_dict()["state"][name], saved["state"][name]
        assert torch.equal(new[[2, 0]], old) and new[1] == 0
    assert again.state_dict()["step"] == 3
    then, now = weighter.history, again.history
    assert [step for step, _ in now] == [0, 1, 2]
    for (_, old), (_, new) in zip(then, now, strict=True):
        assert new == {"cosine/seg/depth" if name == "cosine/depth/seg" else name: x for name, x in old.items()}
    assert again.average_weights == again.weights  # over other steps than the others' it would be no average
    again.backward(losses_of(larger, 3, tasks=3))
    assert again.log_values()["loss_cov/normals"] == 0 < again.log_values()["loss_cov/seg"]  # one loss, and four
    assert all(math.isfinite(weight) for weight in again.weights.values())
    assert [step for step, _ in again.history][-1] == 3


def test_checkpoint_with_a_task_removed_keeps_what_fits():
    weighter, model = weighter_and_model()
    weighter.backward(losses_of(model))
    one = net(["seg"])
    again = Weighter(GRADNORM, ["seg"], heads=dict(one.heads))
    again.load_state_dict(weighter.state_dict(), strict=False)
    assert again.weights == {"seg": 1} and again.average_weights == {"seg": 1}  # the sum of one task's
    mine = {name for name in weighter.history[0][1] if "depth" not in name}
    assert again.history == [(0, {name: x for name, x in weighter.history[0][1].items() if name in mine})]
    again.backward(losses_of(one, tasks=1))


def test_checkpoint_of_another_method_keeps_weights_averages_and_history():
    weighter, model = weighter_and_model()
    weighter.backward(losses_of(model))
    again, twin = weighter_and_model(GradNorm(alpha=0.5))
    again.load_state_dict(weighter.state_dict(), strict=False)
    assert again.weights == weighter.weights
    assert torch.equal(again.state_dict()["state"]["adam_mean"], weighter.state_dict()["state"]["adam_mean"])
    assert again.history == weighter.history and again.average_weights == weighter.average_weights
    other, twin = weighter_and_model(CoVWeighting(total="tasks"))
    other.load_state_dict(weighter.state_dict(), strict=False)
    assert other.state_dict()["state"]["count"].eq(0).all()
    assert other.weights == weighter.weights
    assert other.history == weighter.history and other.average_weights == weighter.average_weights
    other.backward(losses_of(twin))


def test_checkpoint_state_that_fits_only_in_part_is_not_loaded():
    """A window of another length, an inner method of another kind: half of a state would be a wrong one."""
    for before, after in (
        (SoftAdapt(history=1), SoftAdapt(history=3)),
        (Smooth(DynamicWeightAverage(), 0.5), Smooth(CoVWeighting(total="tasks"), 0.5)),
    ):
        weighter, model = weighter_and_model(before)
        for step in range(3):
            weighter.backward(losses_of(model, step))
        again, _ = weighter_and_model(after)
        fresh = again.state_dict()["state"]
        again.load_state_dict(weighter.state_dict(), strict=False)
        assert again.weights == weighter.weights
        assert all(torch.equal(value, fresh[name]) for name, value in again.state_dict()["state"].items())


def test_checkpoint_does_not_replace_weights_that_the_user_gives():
    weighter, model = weighter_and_model(StaticWeighting({"depth": 1.0, "seg": 2.0}))
    weighter.backward(losses_of(model))
    for method in (
        StaticWeighting({"depth": 5.0, "seg": 0.5}),
        Smooth(StaticWeighting({"depth": 5.0, "seg": 0.5}), 0.0),
    ):
        again, model = weighter_and_model(method)
        again.load_state_dict(weighter.state_dict(), strict=False)
        again.backward(losses_of(model))
        again.backward(losses_of(model))
        assert again.weights == {"depth": 5.0, "seg": 0.5}


def test_checkpoint_whose_remaining_weights_are_all_zero_begins_anew():
    """MGDA's, where the one task of all weight is gone."""
    weighter, _ = weighter_and_model(MGDA())
    saved = weighter.state_dict()
    saved["weights"] = saved["state"]["weights"] = torch.tensor([1.0, 0.0]).double()
    tasks = ["seg", "normals", "edges"]
    again = Weighter(MGDA(), tasks, heads=dict(net(tasks).heads))
    again.load_state_dict(saved, strict=False)
    assert again.weights == pytest.approx({"seg": 0, "normals": 1 / 2, "edges": 1 / 2}, rel=1e-15)
    again = Weighter(MGDA(), ["seg"], heads=dict(net(["seg"]).heads))
    again.load_state_dict(saved, strict=False)
    assert again.weights == {"seg": 1}


# ---- rotations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [RotoGrad(lr=0.01), RotoGradNorm(alpha=1.0), Smooth(RotoGrad(), 0.5)], ids=repr)
def test_checkpoint_rotations_stay_with_their_heads(method):
    """Heads were trained behind them: they outlive a change of hyperparameters, of the tasks, and of the method."""
    weighter, model = weighter_and_model(RotoGrad(lr=0.05))
    for step in range(3):
        weighter.backward(losses_of(model, step))
    saved = through_a_file(weighter.state_dict())
    tasks = ["seg", "normals", "depth"]
    larger = net(tasks)
    again = Weighter(method, tasks, heads=dict(larger.heads))
    again.load_state_dict(saved, strict=False)
    R, width = again.rotations, len(weighter.rotations["seg"])
    assert not torch.equal(R["seg"], torch.eye(width).to(R["seg"]))
    assert all(torch.equal(R[task].float(), weighter.rotations[task].float()) for task in TASKS)
    assert torch.equal(R["normals"], torch.eye(width).to(R["seg"]))
    again.backward(losses_of(larger, 3, tasks=3))


@pytest.mark.parametrize("method", [GRADNORM, RotoGrad(rotate=False), RotoGrad(size=2)], ids=repr)
def test_checkpoint_rotations_that_are_left_behind_are_warned_of(method):
    weighter, model = weighter_and_model(RotoGrad())
    weighter.backward(losses_of(model))
    again, twin = weighter_and_model(method)
    with pytest.warns(UserWarning, match=r"holds rotations that this weighter's method does not take up.*fold_rotat"):
        again.load_state_dict(weighter.state_dict(), strict=False)
    again.backward(losses_of(twin))


# ---- inside a window -----------------------------------------------------------------------------------------------


def test_checkpoint_inside_an_accumulation_window_warns():
    accelerator = fake_accelerator(sync=False)
    weighter, model = weighter_and_model(accelerator=accelerator)
    weighter.state_dict()
    weighter.backward(losses_of(model))
    with pytest.warns(UserWarning, match="Saved inside an accumulation window: 1 of its micro-steps is lost"):
        weighter.state_dict()
    weighter.backward(losses_of(model))
    with pytest.warns(UserWarning, match="2 of its micro-steps are lost; save on `accelerator.sync_gradients`"):
        weighter.state_dict()
    accelerator.sync_gradients = True
    weighter.backward(losses_of(model))
    weighter.state_dict()
