"""What a user can get wrong: the message names the argument, the rule, what was found and what to do.

After every error nothing has moved and the next window works.
"""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from accel_weighting import MGDA, CoVWeighting, EqualWeighting, GradNorm, Smooth, StaticWeighting, Weighter
from tests.ranks import accelerator_for, forget_accelerators
from tests.small import (
    GRADNORM,
    TASKS,
    Net,
    assert_close,
    batch,
    fake_accelerator,
    losses_of,
    net,
    task_losses,
    tensor,
    weighter_and_model,
)


def assert_the_next_window_works(weighter, model, step=0):
    """Nothing moved: state and statistics are those of a weighter that never saw the mistake."""
    assert weighter.state_dict()["step"] == step
    model.zero_grad()
    weighter.backward(losses_of(model))
    fresh, twin = weighter_and_model(weighter.method)
    fresh.backward(losses_of(twin))
    assert weighter.weights == fresh.weights
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=0)
    if fresh.statistics.gram is not None:
        assert np.array_equal(weighter.statistics.gram, fresh.statistics.gram)


def raises(error, text):
    """The text as a user reads it, not as a pattern."""

    def holds(exception):
        assert text in str(exception), f"{text!r} is not in:\n{exception}"
        return True

    return pytest.raises(error, check=holds)


# ---- construction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "error", "text"),
    [
        ("depth", TypeError, "Parameter `tasks` must be a sequence of task names. Found `tasks = 'depth'`."),
        (3, TypeError, "Parameter `tasks` must be a sequence of task names. Found `tasks = 3`."),
        ([], ValueError, "Parameter `tasks` must be one or more non-empty strings. Found `tasks = []`."),
        (["a", ""], ValueError, "Parameter `tasks` must be one or more non-empty strings. Found `tasks = ['a', '']`."),
        (["a", 1], ValueError, "Parameter `tasks` must be one or more non-empty strings. Found `tasks = ['a', 1]`."),
        (["a", "b", "a"], ValueError, "`tasks` must not repeat a name. Found `tasks = ['a', 'b', 'a']`."),
    ],
    ids=["a string", "a number", "none", "an empty name", "not a name", "twice"],
)
def test_task_names_that_are_empty_repeated_or_no_strings_are_refused(tasks, error, text):
    with raises(error, text):
        Weighter(EqualWeighting(), tasks)


@pytest.mark.parametrize("tasks", [1, 20])
def test_one_task_keeps_weight_one_and_twenty_keep_their_sum(tasks):
    names = [f"t{k}" for k in range(tasks)]
    torch.manual_seed(0)
    model = Net(names).double()
    weighter = Weighter(GRADNORM, names, heads=dict(model.heads))
    for step in range(3):
        x, y = batch(step, tasks, torch.float64)
        weighter.backward(task_losses(model(x), y))
    assert sum(weighter.weights.values()) == pytest.approx(tasks)
    if tasks == 1:
        assert weighter.weights == {"t0": 1.0}
    else:
        assert len(set(weighter.weights.values())) > 1


@pytest.mark.parametrize("argument", ["initial_weights", "max_losses"])
@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ([1.0, 2.0], TypeError, "must be a dictionary {task: number}. Found [1.0, 2.0]."),
        ({"depth": 0.0}, ValueError, "must hold positive finite numbers. Found {'depth': 0.0}."),
        ({"depth": -1, "seg": 1}, ValueError, "must hold positive finite numbers. Found {'depth': -1}."),
        ({"depth": float("inf")}, ValueError, "must hold positive finite numbers. Found {'depth': inf}."),
        ({"depth": float("nan")}, ValueError, "must hold positive finite numbers. Found {'depth': nan}."),
        ({"depth": "1"}, ValueError, "must hold positive finite numbers. Found {'depth': '1'}."),
        ({"depth": True}, ValueError, "must hold positive finite numbers. Found {'depth': True}."),
        ({"dpeth": 1.0}, ValueError, "Unknown task 'dpeth'."),
    ],
    ids=["a list", "zero", "negative", "infinite", "nan", "a string", "a bool", "unknown"],
)
def test_numbers_by_task(argument, values, error, text):
    with raises(error, text) as caught:
        Weighter(EqualWeighting(), TASKS, **{argument: values})
    assert f"`{argument}`" in str(caught.value) or "Did you mean 'depth'?" in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "value", "low"),
    [
        ("update_every", 0, 1),
        ("update_every", 1.5, 1),
        ("update_every", True, 1),
        ("update_after", -1, 0),
        ("max_skipped_steps", -1, 0),
        ("max_skipped_steps", None, 0),
    ],
)
def test_integers(argument, value, low):
    with raises(
        ValueError, f"Parameter `{argument}` must be an integer of at least {low}. Found `{argument} = {value!r}`."
    ):
        Weighter(EqualWeighting(), TASKS, **{argument: value})


def test_lag_is_zero_or_one():
    with raises(ValueError, "Parameter `lag` must be 0 or 1. Found `lag = 2`."):
        Weighter(EqualWeighting(), TASKS, lag=2)


def test_lag_zero_is_refused_where_the_heads_backward_is_over_by_then():
    model = net()
    with raises(ValueError, "`lag = 0` is not possible. Use `lag = 1`"):
        Weighter(GRADNORM, TASKS, heads=dict(model.heads), lag=0)
    assert not any(head._forward_pre_hooks for head in model.heads.values())


def _heads(**changes):
    def arguments(model):
        given = {task: head for task, head in ({**model.heads, **changes}).items() if head is not None}
        return {"heads": given}

    return arguments


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (lambda model: {"heads": list(model.heads.values())}, TypeError, "`heads` must be a dictionary {task:"),
        (_heads(seg=None), ValueError, "`heads` must name a head for every task. Missing: ['seg']."),
        (_heads(seq=nn.Linear(1, 1)), ValueError, "Unknown task 'seq'. This weighter was built with `tasks = ['depth"),
        (_heads(seg=3), TypeError, "`heads` must hold modules or dotted names, or one of them with the name"),
        (_heads(seg="heads.seg"), ValueError, "which was not given. Found ['heads.seg']. Pass `model=model` too"),
        (
            lambda model: {"heads": {"depth": "heads.depht", "seg": "head.seg"}, "model": model},
            ValueError,
            "`model` has no submodule called 'heads.depht', 'head.seg'. Did you mean 'heads.depth', 'heads.seg'?",
        ),
        (
            lambda model: {"heads": {"depth": "heads.depth", "seg": "embed.weight"}, "model": model},
            ValueError,
            "`model` has no submodule called 'embed.weight'.",
        ),
        (
            lambda model: {"heads": dict.fromkeys(TASKS, model.heads["seg"])},
            ValueError,
            "Tasks ['depth', 'seg'] were given one and the same head",
        ),
        (
            lambda model: {"shared_layer": model.blocks[0]},
            TypeError,
            "must be an nn.Linear, an nn.Conv1d, nn.Conv2d or nn.Conv3d",
        ),
        (lambda model: {"shared_layer": "shared"}, ValueError, "`shared_layer = 'shared'` is looked up in `model`"),
        (
            lambda model: {"shared_layer": "shard", "model": model},
            ValueError,
            "`model` has no submodule called 'shard'",
        ),
    ],
    ids=[
        "a list",
        "missing",
        "unknown",
        "not a module",
        "a name without a model",
        "wrong names",
        "a parameter's name",
        "one head of two tasks",
        "a layer that is no Linear",
        "a layer's name without a model",
        "a layer's wrong name",
    ],
)
def test_heads_and_shared_layer(arguments, error, text):
    model = net()
    with raises(error, text):
        Weighter(GRADNORM, TASKS, **arguments(model))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_an_unknown_name_that_is_like_a_task_is_met_with_a_suggestion():
    with raises(ValueError, "Did you mean 'seg'?"):
        Weighter(GRADNORM, TASKS, heads={"depth": nn.Linear(1, 1), "sge": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="Unknown tasks \\['x', 'y'\\]") as caught:
        Weighter(EqualWeighting(), TASKS, initial_weights={"x": 1.0, "y": 1.0})
    assert "Did you mean" not in str(caught.value)


def test_something_between_the_shared_layer_and_the_branch():
    model = net()
    weighter = Weighter(GRADNORM, TASKS, heads=dict(model.heads), shared_layer="embed", model=model)
    for _ in range(2):  # a forward that failed leaves nothing behind
        with raises(ValueError, "The output of `shared_layer` is not the tensor that is branched"):
            losses_of(model)
    weighter.detach()
    losses_of(model)


def test_branch_and_heads_at_once():
    weighter, model = weighter_and_model()
    model.branch = weighter.branch
    with raises(RuntimeError, "built with `heads`, which divide the shared representation by themselves"):
        losses_of(model)
    model.branch = None
    assert_the_next_window_works(weighter, model)


def test_a_head_that_is_fed_no_floating_point_tensor():
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 1)

        def forward(self, index):
            return self.table(index)

    head = Lookup()
    Weighter(GRADNORM, ["a"], heads={"a": head})
    with raises(TypeError, "The head of task `a` was called without a floating-point tensor"):
        head(torch.tensor([0, 1]))


def test_an_unsupported_engine_is_refused_with_the_supported_ones():
    accelerator = fake_accelerator(distributed_type=SimpleNamespace(value="MEGATRON_LM"))
    with raises(NotImplementedError, "Found MEGATRON_LM") as caught:
        Weighter(EqualWeighting(), TASKS, accelerator=accelerator)
    assert "MULTI_GPU" in str(caught.value) and "FSDP" in str(caught.value) and "DEEPSPEED" in str(caught.value)


@pytest.mark.parametrize(
    ("even", "drops", "refused"), [(False, False, True), (False, True, False), (True, False, False)]
)
def test_only_a_loader_that_can_give_processes_other_numbers_of_batches_is_refused(even, drops, refused):
    """The loader that is being iterated, in training: what other loaders do is nobody's business."""
    loader = SimpleNamespace(batch_sampler=SimpleNamespace(even_batches=even, drop_last=drops))
    state = SimpleNamespace(active_dataloader=loader)
    weighter = Weighter(EqualWeighting(), TASKS)
    weighter._accelerator = lambda: fake_accelerator(num_processes=2, even_batches=False, gradient_state=state)
    model = net()
    with torch.no_grad():
        weighter.combine(losses_of(model))
    if refused:
        with raises(ValueError, "the SimpleNamespace that is being iterated has `even_batches=False`"):
            weighter.combine(losses_of(model))
    else:
        weighter.combine(losses_of(model))


def test_several_processes_without_an_accelerator(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with raises(ValueError, "neither `accelerator` nor `process_group` was given"):
        Weighter(EqualWeighting(), TASKS)


def test_a_process_group_of_one_needs_no_accelerator():
    import torch.distributed as dist  # noqa: TID251  stands in for a launcher

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weighter, model = weighter_and_model()
        assert_the_next_window_works(weighter, model)
    finally:
        dist.destroy_process_group()


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with raises(RuntimeError, "2 processes were launched (WORLD_SIZE), but this accelerator sees one"):
        Weighter(EqualWeighting(), TASKS, accelerator=fake_accelerator())


def test_a_launcher_that_started_one_of_several_is_warned_of(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # all that `accelerate launch --cpu --num_processes 2` leaves
    with pytest.warns(UserWarning, match="started one.*launch_configs cpu_2` write") as caught:
        for _ in range(2):
            Weighter(EqualWeighting(), TASKS, accelerator=fake_accelerator())
    assert {warning.filename for warning in caught} == {__file__}


# ---- losses ----------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", TASKS)


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda losses: dict(reversed(losses.items())),
        lambda losses: list(losses.values()),
        lambda losses: tuple(losses.values()),
        lambda losses: Pair(**losses),
        lambda losses: torch.stack(list(losses.values())),
    ],
    ids=["dict", "dict in another order", "list", "tuple", "namedtuple", "1-D tensor"],
)
def test_losses_come_in_any_of_these(wrap):
    weighter, model = weighter_and_model(initial_weights={"depth": 0.25, "seg": 2.0})
    losses = losses_of(model)
    total = weighter.backward(wrap(losses))
    assert total.item() == pytest.approx(0.25 * losses["depth"].item() + 2 * losses["seg"].item(), rel=1e-14)
    assert not total.requires_grad and total.dtype == torch.float64
    assert torch.equal(tensor(weighter.statistics.losses), torch.stack(list(losses.values())).detach())


def _loss(**changes):
    return lambda losses: {**losses, **{task: change(losses[task]) for task, change in changes.items()}}


BAD_LOSSES = {
    "an unknown name": (
        lambda losses: {"dpeth": losses["depth"], "seg": losses["seg"]},
        ValueError,
        "Unknown task 'dpeth'. This weighter was built with `tasks = ['depth', 'seg']`. Did you mean 'depth'?",
    ),
    "one that is no task": (
        lambda losses: {**losses, "penalty": losses["depth"]},
        ValueError,
        "Unknown task 'penalty'. This weighter was built with `tasks = ['depth', 'seg']`. A term that is added as it "
        "is comes beside the losses, `extra={name: loss}`",
    ),
    "a number for a name": (lambda losses: {0: losses["depth"]}, ValueError, "Unknown task 0. This weighter was built"),
    "a vector": (
        _loss(seg=lambda loss: loss.expand(32)),
        ValueError,
        "Loss `seg` must be a floating-point tensor of shape []. Found dtype float64, shape [32]: reduce it first, "
        "e.g. `loss.mean()`.",
    ),
    "an integer": (
        _loss(seg=lambda loss: loss.detach().long()),
        ValueError,
        "Loss `seg` must be a floating-point tensor of shape []. Found dtype int64, shape [].",
    ),
    "a float": (
        _loss(seg=lambda loss: loss.item()),
        TypeError,
        "Loss `seg` must be a floating-point tensor of shape []. Found float. Pass the loss itself, without `.item()`.",
    ),
    "None": (_loss(seg=lambda loss: None), TypeError, "Loss `seg` must be a floating-point tensor of shape []."),
    "all offenders of shape": (
        _loss(depth=lambda loss: loss.item(), seg=lambda loss: loss[None]),
        TypeError,
        "without `.item()`.\nLoss `seg` must be a floating-point tensor of shape []. Found dtype float64, shape [1]",
    ),
    "detached": (
        _loss(seg=torch.Tensor.detach),
        ValueError,
        "Loss `seg` does not require grad: it was detached before it came here.\nPass losses as the model computed",
    ),
    "all detached": (
        _loss(seg=torch.Tensor.detach, depth=torch.Tensor.detach),
        ValueError,
        "Loss `depth` does not require grad: it was detached before it came here.\nLoss `seg` does not",
    ),
    "their sum": (
        lambda losses: sum(losses.values()),
        ValueError,
        "Losses must come unsummed, one per task of ['depth', 'seg']: they are weighed one by one. Found one",
    ),
    "a matrix": (
        lambda losses: torch.stack(list(losses.values()))[None],
        ValueError,
        "must have shape [2], one entry per task. Found shape [1, 2].",
    ),
    "a generator": (
        lambda losses: (loss for loss in losses.values()),
        TypeError,
        "`losses` must be a dictionary {task: loss}, a list, a tuple, a namedtuple or a 1-D tensor. Found generator.",
    ),
    "too few": (
        lambda losses: [losses["seg"]],
        ValueError,
        "one per task, in the order of `tasks = ['depth', 'seg']`",
    ),
    "too many": (lambda losses: [*losses.values(), losses["seg"]], ValueError, "Found 3 of them."),
    "none": (lambda losses: {}, ValueError, "Parameter `losses` is empty: give the loss of at least one task."),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_losses_of_a_wrong_name_shape_or_dtype_or_detached_are_refused(case):
    change, error, text = BAD_LOSSES[case]
    weighter, model = weighter_and_model()
    with raises(error, text):
        weighter.backward(change(losses_of(model)))
    assert all(p.grad is None for p in model.parameters())
    assert_the_next_window_works(weighter, model)


# ---- num_items -------------------------------------------------------------------------------------------------

POSITIVE = "Positive counts in `num_items` must come for every task of the block or for none. Missing: ['seg']."
WRONG = "Parameter `num_items` must be a number of items, an integer of at least 0, or {task: such a number}. Found "


@pytest.mark.parametrize(
    ("num_items", "text"),
    [
        (-1, WRONG + "{'depth': -1, 'seg': -1}."),
        (2.5, WRONG + "{'depth': 2.5, 'seg': 2.5}."),
        ({"depth": 3, "seg": float("nan")}, WRONG + "{'seg': nan}."),
        ({"depth": 3, "seg": float("inf")}, WRONG + "{'seg': inf}."),
        ({"depth": 3, "seg": None}, WRONG + "{'seg': None}."),
        (True, WRONG + "{'depth': True, 'seg': True}."),
        ("3", WRONG + "{'depth': '3', 'seg': '3'}."),
        (torch.tensor([3, 4]), WRONG),
        ({"depth": 3}, POSITIVE + " A count of 0 alone is allowed: it says that the task is not in this block."),
        ({"depth": 3, "sge": 4}, "Unknown task 'sge'. This weighter was built with `tasks = ['depth', 'seg']`."),
    ],
    ids=str,
)
def test_bad_counts(num_items, text):
    weighter, model = weighter_and_model()
    with raises(ValueError, text):
        weighter.backward(losses_of(model), num_items=num_items)
    assert_the_next_window_works(weighter, model)


@pytest.mark.parametrize("num_items", [36, 36.0, torch.tensor(36), {"depth": 36, "seg": 36}], ids=str)
def test_good_counts(num_items):
    weighter, model = weighter_and_model()
    weighter.backward(losses_of(model), num_items=num_items)
    fresh, twin = weighter_and_model()
    fresh.backward(losses_of(twin))
    assert_close(weighter.statistics.gram, fresh.statistics.gram, rtol=1e-14, atol=0)


def test_a_count_of_zero_alone_says_that_the_task_is_not_there():
    weighter, model = weighter_and_model()
    weighter.backward(losses_of(model), num_items={"seg": 0})
    assert weighter.statistics.present.tolist() == [True, False]
    assert weighter.statistics.norms[1] == 0 < weighter.statistics.norms[0]
    assert weighter.weights["seg"] == 1
    assert all(p.grad.eq(0).all() for p in model.heads["seg"].parameters())


def test_all_counts_zero_is_a_window_without_tasks():
    weighter, model = weighter_and_model()
    weighter.backward(losses_of(model), num_items=0)
    assert weighter.statistics.present.tolist() == [False, False]
    assert weighter.weights == {"depth": 1, "seg": 1}
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())
    assert_the_next_window_works(weighter, model, step=1)


# ---- calls in the wrong place ------------------------------------------------------------------------------------


def test_step_on_an_empty_window():
    weighter, model = weighter_and_model()
    with raises(RuntimeError, "`weighter.step()` was called on an empty window: no losses came through"):
        weighter.step()
    assert_the_next_window_works(weighter, model)
    with raises(RuntimeError, "`weighter.backward` closes the window by itself."):
        weighter.step()


def test_combine_twice_without_step():
    weighter, model = weighter_and_model()
    weighter.combine(losses_of(model)).backward()
    with raises(RuntimeError, "The last window was due and was not closed: call `weighter.step()`"):
        weighter.combine(losses_of(model))
    weighter.step()
    assert weighter.statistics.micro_batches == 1
    weighter.combine(losses_of(model))
    weighter.reset()
    weighter.combine(losses_of(model)).backward()
    weighter.step()
    assert weighter.statistics.micro_batches == 1 and weighter.statistics.step == 1


def test_backward_with_gradients_disabled():
    weighter, model = weighter_and_model()
    with torch.no_grad(), raises(RuntimeError, "For evaluation use `weighter.combine(losses)`"):
        weighter.backward(losses_of(model))
    assert_the_next_window_works(weighter, model)


@pytest.mark.parametrize("disabled", [torch.no_grad, torch.inference_mode])
def test_combine_with_gradients_disabled_gives_the_total_and_records_nothing(disabled):
    weighter, model = weighter_and_model(initial_weights={"depth": 0.25, "seg": 2.0})
    before = weighter.state_dict()["record"]["steps"]
    with disabled():
        losses = losses_of(model)
        total = weighter.combine(losses)
        weighter.combine(losses)
    assert total.item() == pytest.approx(0.25 * losses["depth"].item() + 2 * losses["seg"].item(), rel=1e-14)
    assert weighter.statistics is None and weighter.state_dict()["record"]["steps"] == before
    with raises(RuntimeError, "empty window"):
        weighter.step()


def test_backward_twice_for_one_forward_is_refused():
    weighter, model = weighter_and_model()
    losses = losses_of(model)
    weighter.backward(losses)
    weights = weighter.weights
    with raises(RuntimeError, "The graph was already freed. Call `weighter.backward(losses)` once per") as caught:
        weighter.backward(losses)
    assert "second time" in str(caught.value.__cause__)
    assert weighter.weights == weights
    weighter.backward(losses_of(model))
    assert weighter.statistics.step == 1


# ---- verdicts ----------------------------------------------------------------------------------------------------


def bypass(model, weighter):
    """The loss of `seg` comes from something that was not the head."""
    x, y = batch(0, 2, torch.float64)
    outputs = model(x)
    return task_losses(outputs, y) | {"seg": model.embed(x).square().mean()}


def test_a_loss_that_does_not_reach_the_branch_is_refused():
    weighter, model = weighter_and_model()
    with raises(RuntimeError, "Loss `seg` does not depend on the branch: no gradient arrived there.") as caught:
        weighter.backward(bypass(model, weighter))
    assert "Branch inside the model's forward or name its head" in str(caught.value)
    assert_the_next_window_works(weighter, model, step=1)


def test_two_losses_that_do_not_reach_the_branch_are_both_named():
    weighter, model = weighter_and_model()
    x, _ = batch(0, 2, torch.float64)
    with raises(RuntimeError, "Losses `depth`, `seg` do not depend on the branch"):
        weighter.backward([model.embed(x).sum(), model.embed(x).square().sum()])


def test_a_weighter_without_any_branch_is_refused():
    model = net()
    weighter = Weighter(GRADNORM, TASKS)
    with raises(RuntimeError, "This weighter has no `heads`, and `weighter.branch(z)` was not called"):
        weighter.backward(losses_of(model))


def test_a_method_of_losses_needs_no_branch():
    model = net()
    weighter = Weighter(CoVWeighting(), TASKS)
    weighter.backward(losses_of(model))
    assert weighter.statistics.norms is None and weighter.statistics.gram is None


@pytest.mark.parametrize("method", [GRADNORM, CoVWeighting()], ids=["GradNorm", "CoVWeighting"])
def test_a_negative_loss_is_refused_where_losses_are_divided(method):
    weighter, model = weighter_and_model(method)
    losses = losses_of(model)
    with raises(ValueError, "divides by losses and needs them positive. Task `seg` averaged -") as caught:
        weighter.backward(losses | {"seg": losses["seg"] - 100})
    assert str(method) in str(caught.value)
    assert "over optimizer step 0. Give its lower bound, `min_losses={task: bound}`" in str(caught.value)
    assert_the_next_window_works(weighter, model, step=1)


@pytest.mark.parametrize("method", [GradNorm(alpha=0.0), EqualWeighting()], ids=["GradNorm(alpha=0)", "Equal"])
def test_a_negative_loss_is_accepted_by_other_methods(method):
    weighter, model = weighter_and_model(method)
    losses = losses_of(model)
    weighter.backward(losses | {"seg": losses["seg"] - 100})
    assert weighter.statistics.losses[1] < 0


@pytest.mark.parametrize("method", [GRADNORM, CoVWeighting()], ids=["GradNorm", "CoVWeighting"])
def test_a_task_with_zero_loss_waits_for_its_first_positive_one(method):
    weighter, model = weighter_and_model(method)
    start = weighter.weights["seg"]
    for step in range(4):
        losses = losses_of(model, step)
        weighter.backward(losses | {"seg": losses["seg"] * 0})
        assert weighter.weights["seg"] == start
    for step in range(4, 8):
        weighter.backward(losses_of(model, step))
    assert weighter.weights["seg"] != start


def test_a_frozen_trunk_is_refused():
    weighter, model = weighter_and_model()
    model.embed.requires_grad_(False), model.blocks.requires_grad_(False), model.shared.requires_grad_(False)
    with raises(
        RuntimeError,
        "The shared representation does not require grad (all parameters before it are frozen",
    ):
        weighter.backward(losses_of(model))
    model.requires_grad_(True)
    assert_the_next_window_works(weighter, model, step=1)


def test_adapters_in_a_frozen_trunk_are_enough():
    weighter, model = weighter_and_model()
    model.embed.requires_grad_(False), model.shared.requires_grad_(False), model.blocks[0].requires_grad_(False)
    weighter.backward(losses_of(model))
    fresh, twin = weighter_and_model()
    fresh.backward(losses_of(twin))
    assert_close(weighter.statistics.gram, fresh.statistics.gram, rtol=1e-14, atol=0)


def test_a_trunk_in_eval_mode_still_counts():
    weighter, model = weighter_and_model()
    model.eval()
    assert_the_next_window_works(weighter, model)


def test_counts_for_some_blocks_only():
    """In one window: the verdict comes from the reduced numbers."""
    accelerator = fake_accelerator(sync=False)
    weighter, model = weighter_and_model(accelerator=accelerator)
    weighter.backward(losses_of(model), num_items=36)
    accelerator.sync_gradients = True
    with raises(ValueError, "Counts must come for all blocks of a window or for none. At optimizer step 0, 1 of 2"):
        weighter.backward(losses_of(model))
    assert_the_next_window_works(weighter, model, step=1)
    accelerator.sync_gradients = False
    weighter.backward(losses_of(model), num_items=36)
    accelerator.sync_gradients = True
    weighter.backward(losses_of(model), num_items=0)  # nothing in it: neither counted nor not
    assert_close(weighter.statistics.losses, torch.stack(list(losses_of(model).values())))


@pytest.mark.parametrize("method", [GradNorm, "gradnorm", None])
def test_a_method_is_an_instance(method):
    found = "the class GradNorm: call it" if method is GradNorm else repr(method)
    with pytest.raises(TypeError, match=rf"Parameter `method` must be a method such as `GradNorm\(\)`. Found {found}"):
        Weighter(method, TASKS)
    with pytest.raises(ValueError, match=r"Parameter `method` must be a method such as `GradNorm\(\)`"):
        Smooth(method, 0.5)


class Faulty(EqualWeighting):
    """Answers with a weight that is not a number, or is written with tensors."""

    tensors = False

    def init(self, tasks, initial_weights=None):
        return (torch.ones(2), {}) if self.tensors else super().init(tasks, initial_weights)

    def update(self, state, statistics):
        return np.array([1.0, np.nan]), {"gone": np.ones(2)}


def test_a_method_whose_weights_are_not_finite_is_refused_before_they_are_taken():
    weighter, model = weighter_and_model(Faulty())
    with raises(RuntimeError, "answered with weights that are not finite at optimizer step 0: [1.0, nan]"):
        weighter.backward(losses_of(model))
    assert weighter.weights == {"depth": 1, "seg": 1} and "gone" not in weighter.state_dict()["state"]


def test_a_method_that_gives_tensors_is_shown_how_to_convert_it():
    method = Faulty()
    object.__setattr__(method, "tensors", True)
    with raises(TypeError, "`Faulty.init` must give NumPy arrays") as caught:
        weighter_and_model(method)
    assert "`np.ones(len(tasks))` for `torch.ones(len(tasks), dtype=torch.float64)`" in str(caught.value)


def test_what_was_not_finite_on_the_only_process_is_told_without_processes(caplog):
    weighter, model = weighter_and_model()
    losses = losses_of(model)
    weighter.backward(losses | {"seg": losses["seg"] * torch.nan})
    assert caplog.messages[-1] == "Loss `seg` was not finite at optimizer step 0; weights are held."


def test_a_limit_of_skipped_steps_that_is_changed_later_takes_effect():
    weighter, model = weighter_and_model()
    weighter.max_skipped_steps = 0
    losses = losses_of(model)
    with raises(RuntimeError, "1 steps in a row exceed `max_skipped_steps = 0`"):
        weighter.backward(losses | {"seg": losses["seg"] * torch.nan})


def test_at_lag_0_a_gradient_that_is_not_there_with_the_others_is_told_as_such():
    weighter, model = weighter_and_model(MGDA(), lag=0)
    with raises(RuntimeError, "Here the gradient of loss `seg` did not come with the others: nothing of it comes to"):
        weighter.backward(bypass(model, weighter))


def test_numbers_of_numpy_are_numbers():
    assert Weighter(GRADNORM, TASKS, initial_weights={"seg": np.float32(0.5)}).weights["seg"] == 0.5


def test_static_weights_take_no_others():
    with pytest.raises(ValueError, match="`StaticWeighting` has its own weights: give it none in `initial_weights`"):
        Weighter(StaticWeighting({"depth": 1, "seg": 2}), TASKS, initial_weights={"seg": 3.0})


def test_a_forgotten_accelerator_is_told(caplog):
    forget_accelerators()
    Weighter(GRADNORM, TASKS)
    assert not caplog.records
    accelerator_for("plain")
    Weighter(GRADNORM, TASKS)
    assert "built without `accelerator=`" in caplog.text
    forget_accelerators()
