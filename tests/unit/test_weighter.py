"""The weighter in one process: what it measures, when it moves, what it leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import math

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from accel_weighting import (
    FAMO,
    CoVWeighting,
    DynamicWeightAverage,
    EqualWeighting,
    GradNorm,
    RotoGrad,
    RotoGradNorm,
    Smooth,
    SoftAdapt,
    StaticWeighting,
    Statistics,
    Weighter,
)
from accel_weighting.methods.mgda import MGDA
from accel_weighting.processes import fingerprint
from accel_weighting.record import CAPACITY, Record
from tests.small import (
    TASKS,
    Net,
    batch,
    fake_accelerator,
    gradients_by_hand,
    losses_of,
    net,
    representation,
    task_losses,
)

GRADNORM = GradNorm(alpha=1.0)
EXACT = {"rtol": 1e-13, "atol": 1e-16}


def weighter_and_model(method=GRADNORM, **options):
    model = net()
    return Weighter(method, TASKS, heads=dict(model.heads), **options), model


def assert_statistics_by_hand(weighter, model, step=0):
    """Against K backwards of their own; the model must still be as it was in the window."""
    G = gradients_by_hand(model, step)
    torch.testing.assert_close(weighter.statistics.gram, G @ G.T, **EXACT)
    torch.testing.assert_close(weighter.statistics.norms, G.norm(dim=1), **EXACT)
    torch.testing.assert_close(
        weighter.statistics.losses, torch.stack(list(losses_of(model, step).values())).detach(), **EXACT
    )


def assert_gradients_by_hand(model, weights, step=0):
    twin = net()
    twin.load_state_dict(model.state_dict())
    sum(weights[task] * loss for task, loss in losses_of(twin, step).items()).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **EXACT)


# ---- when weights move -------------------------------------------------------------------------------------------


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


# ---- what is kept for people -------------------------------------------------------------------------------------


def test_log_values_are_named_and_right():
    weighter, model = weighter_and_model()
    assert weighter.log_values() == {"weight/depth": 1.0, "weight/seg": 1.0, "weighting/skipped_steps": 0.0}
    for step in range(3):
        weighter.backward(losses_of(model, step))
    values = weighter.log_values()
    groups = ("weight", "loss", "loss_cov", "grad_norm")
    assert set(values) == {f"{group}/{task}" for group in groups for task in TASKS} | {
        "cosine/depth·seg",
        "weighting/skipped_steps",
    }
    G = gradients_by_hand(model, 2)
    assert all(type(value) is float for value in values.values())
    assert values["weight/seg"] == weighter.weights["seg"]
    assert values["grad_norm/seg"] == pytest.approx(G[1].norm().item(), rel=1e-6)
    assert values["cosine/depth·seg"] == pytest.approx(torch.cosine_similarity(G[0], G[1], dim=0).item(), rel=1e-6)
    seg = torch.stack([losses_of(model, step)["seg"] for step in range(3)])
    assert values["loss_cov/seg"] == pytest.approx((seg.std(correction=0) / seg.mean()).item(), rel=1e-6)
    assert weighter.history[-1][0] == 2 and weighter.history[-1][1].keys() == values.keys()


def test_absent_tasks_and_held_steps_are_left_out_of_the_logs():
    weighter, model = weighter_and_model()
    weighter.backward({"depth": losses_of(model)["depth"]})
    values = weighter.log_values()
    assert "loss/depth" in values and "loss/seg" not in values and "grad_norm/seg" not in values
    assert "cosine/depth·seg" not in values
    weighter.backward({task: loss * torch.nan for task, loss in losses_of(model).items()})
    assert weighter.log_values() == {f"weight/{task}": weighter.weights[task] for task in TASKS} | {
        "weighting/skipped_steps": 1.0
    }


@pytest.mark.parametrize("steps", [CAPACITY, CAPACITY + 1, 5 * CAPACITY])
def test_the_history_is_thinned_evenly_and_bounded(steps):
    record = Record(["a"])
    most = 0
    for step in range(steps):
        record.see(step, torch.tensor([float(step)]), None, 0)
        most = max(most, len(record._rows))
    kept = [step for step, _ in record.history]
    assert most <= CAPACITY + 1 and len(kept) <= CAPACITY
    if steps > CAPACITY:
        assert len(kept) > CAPACITY / 2
    assert kept == list(range(0, steps, record.stride))
    assert all(values["weight/a"] == step for step, values in record.history)
    again = Record(["a"])
    again.load_state_dict(record.state_dict(), ["a"])
    assert again.history == record.history and again.stride == record.stride


# ---- caps --------------------------------------------------------------------------------------------------------


def test_a_loss_above_its_cap_is_scaled_down_and_measured_as_it_was():
    w = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    weighter = Weighter(EqualWeighting(), ["a", "b"], max_losses={"a": 1.0})
    z = weighter.branch(w * 1)
    total = weighter.backward({"a": z["a"].square().sum(), "b": z["b"].sum()})  # 25, and 7
    torch.testing.assert_close(w.grad, torch.tensor([6.0, 8.0]).double() / 25 + 1, **EXACT)
    assert total.item() == pytest.approx(1 + 7)
    assert weighter.statistics.losses.tolist() == [25, 7]
    torch.testing.assert_close(weighter.statistics.norms, torch.tensor([100.0, 2.0]).double().sqrt(), **EXACT)
    with torch.no_grad():
        assert weighter.combine({"a": w.square().sum(), "b": w.sum()}).item() == pytest.approx(8)


def test_a_loss_below_its_cap_is_left_alone():
    w = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)
    weighter = Weighter(EqualWeighting(), ["a"], max_losses={"a": 1.0})
    weighter.backward([w.square().sum()])
    torch.testing.assert_close(w.grad, 2 * w.detach(), **EXACT)


def test_the_total_keeps_its_precision_under_autocast():
    weighter = Weighter(EqualWeighting(), ["a", "b"], initial_weights={"a": 1.001, "b": 1.003})
    w = torch.tensor(1.2345, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        total = weighter.backward([w * 1, w * 2])
    assert total.dtype == torch.float32
    torch.testing.assert_close(w.grad, torch.tensor(1.001 + 2 * 1.003), rtol=1e-6, atol=0)


# ---- what is left behind -----------------------------------------------------------------------------------------


def hooks(model):
    """All that hangs on a model's modules, and on all modules there are."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    kinds += ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    local = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return local, len(torch_module._global_forward_pre_hooks), len(torch_module._global_forward_hooks)


@pytest.mark.parametrize("forwards", [0, 1])
@pytest.mark.parametrize("prepared", [True, False], ids=["after prepare", "before prepare"])
def test_detach_leaves_no_hook(prepared, forwards):
    model = net()
    before = hooks(model)
    accelerator = fake_accelerator(_models=[model] if prepared else [])
    weighter = Weighter(
        GRADNORM, TASKS, accelerator=accelerator, heads=dict(model.heads), shared_layer="shared", model=model
    )
    assert hooks(model) != before
    for step in range(forwards):
        weighter.backward(losses_of(model, step))
    weighter.detach()
    assert hooks(model) == before
    model.zero_grad()
    sum(losses_of(model).values()).backward()
    assert_gradients_by_hand(model, {"depth": 1, "seg": 1})


def test_a_refused_construction_leaves_no_hook():
    model = net()
    before = hooks(model)
    with pytest.raises(ValueError, match="lag = 0"):
        Weighter(GRADNORM, TASKS, heads=dict(model.heads), lag=0)
    with pytest.raises(TypeError, match="shared_layer"):
        Weighter(GRADNORM, TASKS, heads=dict(model.heads), shared_layer=model.blocks)
    assert hooks(model) == before


@pytest.mark.parametrize(
    ("method", "lag"),
    [(GRADNORM, 1), (CoVWeighting(), 0), (MGDA(), 0), (RotoGrad(), 0), (RotoGrad(), 1)],
    ids=["GradNorm", "CoV, lag 0", "MGDA, lag 0", "RotoGrad, lag 0", "RotoGrad"],
)
def test_three_hundred_steps_leave_no_growing_graph(method, lag):
    weighter, model = weighter_and_model(method, lag=lag)

    def alive():
        gc.collect()
        return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]

    before = alive()  # held, so that what other tests left is not freed in between

    def tensors():
        return len(alive()) - len(before) - len(weighter._progress.record._rows)

    counts = []
    for step in range(300):
        model.zero_grad()
        weighter.backward(losses_of(model, step % 5))
        if step in (20, 160, 299):
            counts.append(tensors())
    assert counts[0] == counts[1] == counts[2]


def test_nothing_of_a_step_outlives_it():
    import weakref

    weighter, model = weighter_and_model()
    kept = []
    for head in model.heads.values():
        head.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    weighter.backward(losses_of(model))
    gc.collect()
    assert len(kept) == 2 and all(ref() is None for ref in kept)


# ---- how heads are called ----------------------------------------------------------------------------------------


class Caller(nn.Module):
    """Two heads on one trunk, called in the way that a test wants."""

    def __init__(self, call):
        super().__init__()
        self.inner = net()
        self.heads = self.inner.heads
        self.call = call

    def forward(self, x):
        return self.call(self.heads, representation(self.inner, x))


class Scaled(nn.Module):
    """A head with more arguments than one."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, lengths, z=None, scale=1.0):
        return self.head(z) * scale + 0 * lengths


def each(heads, z):
    return {task: head(z) for task, head in heads.items()}


@pytest.mark.parametrize("order", [TASKS, TASKS[::-1]], ids=["in order", "in the other order"])
def test_heads_called_in_any_order(order):
    model = Caller(lambda heads, z: dict(sorted((t, heads[t](z)) for t in order)))
    weighter = Weighter(GRADNORM, TASKS, heads=dict(model.heads))
    weighter.backward(losses_of(model))
    assert_statistics_by_hand(weighter, model.inner)


def test_heads_called_by_keyword_and_with_more_arguments():
    model = Caller(lambda heads, z: {task: heads[task](lengths, z=z, scale=1.0) for task in TASKS})
    lengths = torch.tensor(3)  # not a floating-point tensor, so not the representation
    model.heads = nn.ModuleDict({task: Scaled(head) for task, head in model.inner.heads.items()})
    weighter = Weighter(GRADNORM, TASKS, heads=dict(model.heads))
    weighter.backward(losses_of(model))
    assert_statistics_by_hand(weighter, model.inner)


def test_several_forwards_before_one_backward_add_up_like_rows_of_one_batch():
    """A discriminator on real and on fake samples."""
    x, y = batch(0, 2, torch.float64)
    weighter, model = weighter_and_model()
    first, second = model(x[:12]), model(x[12:])
    weighter.backward(task_losses({task: torch.cat([first[task], second[task]]) for task in TASKS}, y))
    assert weighter.statistics.micro_batches == 1
    assert_statistics_by_hand(weighter, model)
    assert_gradients_by_hand(model, {"depth": 1, "seg": 1})


def test_a_head_called_twice_in_one_forward():
    model = Caller(lambda heads, z: {"depth": heads["depth"](z) + heads["depth"](z), "seg": 2 * heads["seg"](z)})
    weighter = Weighter(GRADNORM, TASKS, heads=dict(model.heads))
    weighter.backward(losses_of(model))
    x, y = batch(0, 2, torch.float64)
    z = representation(model.inner, x).detach().requires_grad_()
    losses = task_losses({task: 2 * head(z) for task, head in model.heads.items()}, y)
    n = [torch.autograd.grad(loss, z)[0].norm() for loss in losses.values()]
    torch.testing.assert_close(weighter.statistics.norms, torch.stack(n), **EXACT)


class Reversal(torch.autograd.Function):
    """Nothing forward, the opposite gradient backward: domain-adversarial training."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


def hooked(z):
    alias = z.view_as(z)
    alias.register_hook(torch.neg)
    return alias


@pytest.mark.parametrize("reverse", [Reversal.apply, hooked], ids=["a function", "a hook"])
@pytest.mark.parametrize("first", TASKS)
def test_what_only_a_backward_sees_between_the_branch_and_a_head_is_kept(reverse, first):
    def call(heads, z):
        inputs = {"depth": z, "seg": reverse(z)}
        outputs = {task: heads[task](inputs[task]) for task in sorted(TASKS, key=first.__ne__)}
        return {task: outputs[task] for task in TASKS}

    model, plain = Caller(call), Caller(call)
    weighter = Weighter(EqualWeighting(), TASKS, heads=dict(model.heads))
    weighter.backward(losses_of(model))
    sum(losses_of(plain).values()).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **EXACT)
    assert weighter.statistics.gram is None and (weighter.statistics.norms > 0).all()


@pytest.mark.parametrize("view", [lambda z: z[:], lambda z: z.view(-1, *z.shape[1:]), lambda z: z.T.T])
def test_heads_fed_views_of_the_same_entries_meet_in_one_join(view):
    model = Caller(lambda heads, z: {task: head(view(z)) for task, head in heads.items()})
    weighter = Weighter(GRADNORM, TASKS, heads=dict(model.heads))
    weighter.backward(losses_of(model))
    assert_statistics_by_hand(weighter, model.inner)


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


def test_a_copy_of_the_model_has_no_weighter_of_its_own_and_turns_with_the_original():
    weighter, model = weighter_and_model(RotoGrad(lr=0.5))
    losses_of(model)  # the join is open
    average = copy.deepcopy(model)
    for step in range(3):
        weighter.backward(losses_of(model, step))
    x = batch(0, 2, torch.float64)[0]
    with torch.no_grad():
        outputs, copied = model(x), average(x)
    assert all(torch.equal(outputs[task], copied[task]) for task in TASKS)
    assert (weighter.rotations["depth"] - torch.eye(5, dtype=torch.float64)).abs().max() > 0.01
    with pytest.raises(TypeError, match=r"cannot be pickled. Save `model.state_dict\(\)`"):
        torch.save(model, io.BytesIO())
    weighter.detach()
    torch.save(model, io.BytesIO())


@dataclasses.dataclass
class Answer:
    score: torch.Tensor


def test_a_head_that_answers_with_a_dataclass_gets_zeros_for_an_empty_batch():
    head = net().heads["seg"]
    model = Caller(lambda heads, z: {"depth": heads["depth"](z), "seg": heads["seg"](z).score})
    model.heads["seg"] = Scored(head)
    weighter = Weighter(GRADNORM, TASKS, heads=dict(model.heads))
    losses = losses_of(model)
    weighter.backward({**losses, "seg": losses["seg"] * torch.nan}, num_items={"seg": 0})
    assert all((p.grad == 0).all() for p in head.parameters())


class Scored(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, z):
        return Answer(self.head(z))


def slices(heads, z):
    return {"depth": heads["depth"](z[:, :3]), "seg": heads["seg"](z[:, 2:])}


def copies(heads, z):
    return {task: head(z * 1) for task, head in heads.items()}


@pytest.mark.parametrize("call", [slices, copies])
def test_heads_fed_different_tensors_give_norms_and_no_gram_matrix(call):
    torch.manual_seed(0)
    model = Caller(call)
    if call is slices:
        for head in model.heads.values():
            head.inner = nn.Linear(3, 4, dtype=torch.float64)
    weighter = Weighter(GRADNORM, TASKS, heads=dict(model.heads))
    weighter.backward(losses_of(model))
    assert weighter.statistics.gram is None and "cosine/depth·seg" not in weighter.log_values()
    x, y = batch(0, 2, torch.float64)
    weighter.detach()
    z = representation(model.inner, x).detach().requires_grad_()
    losses = task_losses(call(model.heads, z), y)
    n = torch.stack([torch.autograd.grad(loss, z)[0].norm() for loss in losses.values()])
    torch.testing.assert_close(weighter.statistics.norms, n, **EXACT)

    needy = Weighter(MGDA(), TASKS, heads=dict(model.heads))
    weights = needy.weights
    with pytest.raises(RuntimeError, match=r"MGDA.* needs the inner products .* Call `weighter.branch\(z\)` once"):
        needy.backward(losses_of(model))
    assert needy.weights == weights
    with pytest.raises(RuntimeError, match="heads were fed different tensors"):
        needy.backward(losses_of(model))


def apart(model):
    """One loader per task: every head sees samples of its own."""
    (x, y), (u, v) = batch(0, 2, torch.float64), batch(1, 2, torch.float64)
    return {
        "depth": (model.heads["depth"](representation(model, x)) - y[:, 0]).square().mean(),
        "seg": (model.heads["seg"](representation(model, u)) - v[:, 1]).square().mean(),
    }


def test_tasks_that_share_no_sample_meet_at_the_shared_layer():
    model = net()
    weighter = Weighter(MGDA(), TASKS, heads=dict(model.heads), shared_layer="shared", model=model)

    weighter.backward(apart(model))
    weighter.detach()
    G = torch.stack([torch.autograd.grad(loss, model.shared.weight)[0].flatten() for loss in apart(model).values()])
    torch.testing.assert_close(weighter.statistics.gram, G @ G.T, **EXACT)
    assert weighter.statistics.gram[0, 1] != 0


# ---- other gradients through the branch --------------------------------------------------------------------------


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
    torch.testing.assert_close(weighter.statistics.gram, G @ G.T / 2, **EXACT)  # the same rows twice, each at 1/2
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
    losses = task_losses(each(model.heads, z), y)
    (weighter.combine(losses) + 0.1 * z.square().mean()).backward()
    weighter.step()
    assert_statistics_by_hand(weighter, model)


# ---- absent tasks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [GRADNORM, MGDA(), CoVWeighting()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_count_of_zero_makes_a_loss_that_is_not_finite_harmless(method, bad):
    weighter, model = weighter_and_model(method)
    losses = losses_of(model)
    weighter.backward({**losses, "seg": losses["seg"] * bad}, num_items={"seg": 0})
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert bool(p.grad.eq(0).all()) == name.startswith("heads.seg"), name
    assert weighter.statistics.present.tolist() == [True, False]
    assert weighter.statistics.losses.isfinite().all() and weighter.statistics.norms.isfinite().all()
    assert all(math.isfinite(value) for value in weighter.log_values().values())
    G = gradients_by_hand(net())
    torch.testing.assert_close(weighter.statistics.norms, torch.stack([G[0].norm(), torch.tensor(0.0)]).double())


def test_a_task_left_out_gets_no_gradient_at_all():
    weighter, model = weighter_and_model()
    weighter.backward({"depth": losses_of(model)["depth"]})
    assert all(p.grad is None for p in model.heads["seg"].parameters())


# ---- two weighters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["the first first", "the second first"])
def test_two_weighters_with_heads_of_their_own_on_one_trunk(order):
    torch.manual_seed(0)
    model = Net(["a", "b", "c", "d"]).double()
    pairs = [["a", "b"], ["c", "d"]]
    weighters = [Weighter(GRADNORM, pair, heads={task: model.heads[task] for task in pair}) for pair in pairs]
    G = gradients_by_hand(model)
    for i in order:
        losses = losses_of(model, tasks=4)
        weighters[i].backward({task: losses[task] for task in pairs[i]})
    for i in (0, 1):
        mine = G[2 * i : 2 * i + 2]
        torch.testing.assert_close(weighters[i].statistics.gram, mine @ mine.T, **EXACT)


@pytest.mark.parametrize("which", [0, 1], ids=["the first", "the second"])
def test_two_weighters_on_the_same_heads(which):
    model = net()
    weighters = [Weighter(GRADNORM, TASKS, heads=dict(model.heads)) for _ in range(2)]
    weighters[which].backward(losses_of(model))
    assert weighters[1 - which].statistics is None
    torch.testing.assert_close(weighters[which].statistics.norms, gradients_by_hand(net()).norm(dim=1), **EXACT)
    assert_gradients_by_hand(model, {"depth": 1, "seg": 1})


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
    torch.testing.assert_close(weighter.statistics.gram, G @ G.T / 2, **EXACT)  # the same rows twice, each at 1/2


def test_an_evaluation_between_a_forward_and_its_backward_changes_nothing():
    """A count of 0 is said at the head's output, which the evaluation must not take away."""
    weighter, model = weighter_and_model()
    losses = losses_of(model)
    with torch.no_grad():
        weighter.combine(losses_of(model, 1))
    weighter.backward({**losses, "seg": losses["seg"] * torch.nan}, num_items={"seg": 0})
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("closes", ["step", "reset"])
def test_a_backward_after_its_window_is_not_recorded(closes):
    weighter, model = weighter_and_model(method=CoVWeighting())
    late = weighter.combine(losses_of(model, 0))
    getattr(weighter, closes)()
    late.backward()
    weighter.backward(losses_of(model, 1))
    G = gradients_by_hand(model, 1)
    torch.testing.assert_close(weighter.statistics.gram, G @ G.T, **EXACT)


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


# ---- checkpointing and compilation ---------------------------------------------------------------------------------


def checkpointed(model, x, where, reentrant):
    if where == "the model":
        stacked = checkpoint(lambda x: torch.stack(list(model(x).values())), x, use_reentrant=reentrant)
        return dict(zip(TASKS, stacked, strict=True))
    if where == "the trunk":
        return each(model.heads, checkpoint(lambda x: representation(model, x), x, use_reentrant=reentrant))
    z = representation(model, x)
    return {task: checkpoint(head, z, use_reentrant=reentrant) for task, head in model.heads.items()}


@pytest.mark.parametrize(
    ("where", "reentrant"),
    [
        ("the model", True),
        ("the model", False),
        ("the trunk", True),
        ("the trunk", False),
        ("every head apart", False),
    ],
)
@pytest.mark.parametrize("method", [GRADNORM, MGDA()], ids=["losses", "shared"])
def test_activation_checkpointing_gives_the_same_statistics_and_gradients(where, reentrant, method):
    weighter, model = weighter_and_model(method)
    for step in range(2):
        x, y = batch(step, 2, torch.float64)
        weights = weighter.weights
        model.zero_grad()
        weighter.backward(task_losses(checkpointed(model, x.requires_grad_(), where, reentrant), y))
        assert weighter.statistics.step == step
        assert_statistics_by_hand(weighter, model, step)
        if method.acts_on == "losses":
            assert_gradients_by_hand(model, weights, step)
    assert len(set(weights.values())) == 2


def test_reentrant_activation_checkpointing_of_each_head_gives_norms_only():
    weighter, model = weighter_and_model()
    x, y = batch(0, 2, torch.float64)
    weighter.backward(task_losses(checkpointed(model, x, "every head apart", True), y))
    torch.testing.assert_close(weighter.statistics.norms, gradients_by_hand(net()).norm(dim=1), **EXACT)
    assert weighter.statistics.gram is None
    assert_gradients_by_hand(model, {"depth": 1, "seg": 1})
    needy, model = weighter_and_model(MGDA())
    with pytest.raises(RuntimeError, match="heads were fed different tensors"):
        needy.backward(task_losses(checkpointed(model, x, "every head apart", True), y))


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@pytest.mark.parametrize("route", ["heads", "branch"])
def test_torch_compile_without_a_graph_break_gives_the_same_statistics(route, fresh_compiler):
    model = net()
    weighter = Weighter(GRADNORM, TASKS, **({"heads": dict(model.heads)} if route == "heads" else {}))
    if route == "branch":
        model.branch = weighter.branch
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(3):
        weights = weighter.weights
        model.zero_grad()
        weighter.backward(losses_of(compiled, step))
        model.branch, branch = None, model.branch
        G = gradients_by_hand(net(), step)
        torch.testing.assert_close(weighter.statistics.gram, G @ G.T, **EXACT)
        assert_gradients_by_hand(model, weights, step)
        model.branch = branch
    assert weighter.weights["depth"] != weighter.weights["seg"]


# ---- agreement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_fingerprint_changes_with_any_bit(dtype):
    x = torch.randn(3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for bit in range(8 * x.element_size()):
        y = x.clone()
        y.view(-1).view(torch.uint8).view(-1, x.element_size())[17, bit // 8] ^= 1 << bit % 8
        assert not torch.equal(fingerprint(x), fingerprint(y)), bit
    assert torch.equal(fingerprint(x), fingerprint(x.transpose(1, 2).contiguous().transpose(1, 2)))


def rotated_run(checkpoint, size, compiled):
    torch.manual_seed(0)
    model = Net(TASKS, checkpoint).double()
    weighter = Weighter(RotoGrad(lr=0.5, size=size), TASKS)
    model.branch = weighter.branch
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for step in range(3):
        weighter.backward(losses_of(forward, step))
    return weighter.rotations, weighter.weights, [p.grad for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@pytest.mark.parametrize("checkpoint", ["", "join", "join reentrant"])
@pytest.mark.parametrize("size", [None, 3])
def test_torch_compile_makes_one_graph_of_rotations_for_all_steps(checkpoint, size, fresh_compiler):
    torch._dynamo.utils.counters.clear()
    compiled = rotated_run(checkpoint, size, compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    eager = rotated_run(checkpoint, size, compiled=False)
    torch.testing.assert_close(compiled, eager, **EXACT)
    assert all((R - torch.eye(len(R), dtype=R.dtype)).abs().max() > 0.01 for R in eager[0].values())


# ---- checkpoints ---------------------------------------------------------------------------------------------------


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
        assert new == {"cosine/seg·depth" if name == "cosine/depth·seg" else name: x for name, x in old.items()}
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


def test_statistics_are_the_contract():
    weighter, model = weighter_and_model()
    weighter.backward(losses_of(model))
    s = weighter.statistics
    assert isinstance(s, Statistics) and s.micro_batches == 1 and s.step == 0 and s.present.dtype == torch.bool
    assert all(t.dtype == torch.float64 and t.device.type == "cpu" for t in (s.losses, s.norms, s.gram))
    assert s.gram.shape == (2, 2) and torch.equal(s.gram, s.gram.T)


def test_tasks_that_share_no_sample_are_told_of_the_shared_layer_once(caplog: pytest.LogCaptureFixture) -> None:
    trunk, heads = torch.nn.Linear(3, 4), {task: torch.nn.Linear(4, 1) for task in "ab"}
    for layer, warnings in ((None, 1), (trunk, 0)):
        caplog.clear()
        weighter = Weighter(MGDA(), ["a", "b"], shared_layer=layer)
        for _ in range(3):
            z = weighter.branch(trunk(torch.randn(6, 3)))
            halves = {"a": z["a"][:3], "b": z["b"][3:]}
            weighter.backward({task: heads[task](half).square().mean() for task, half in halves.items()})
        assert weighter.statistics.gram[0, 1].eq(0) == (layer is None)
        assert sum("shared_layer" in record.message for record in caplog.records) == warnings


def test_a_freeze_inside_a_freeze_leaves_the_outer_one() -> None:
    weighter = Weighter(EqualWeighting(), ["a"])
    weighter.freeze()
    with weighter.freeze():
        assert weighter.frozen
    assert weighter.frozen
