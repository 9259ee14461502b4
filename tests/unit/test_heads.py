"""How heads are called, what they are fed, and which tasks and weighters share a trunk."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn

from accel_weighting import EqualWeighting, RotoGrad, Weighter
from accel_weighting.methods.mgda import MGDA
from tests.small import (
    EXACT,
    GRADNORM,
    TASKS,
    Net,
    assert_close,
    assert_gradients_by_hand,
    assert_statistics_by_hand,
    batch,
    gradients_by_hand,
    losses_of,
    net,
    representation,
    task_losses,
    weighter_and_model,
)

# ---- how heads are called ------------------------------------------------------------------------------------------


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
    assert_close(weighter.statistics.norms, torch.stack(n), **EXACT)


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


# ---- heads that share no tensor ------------------------------------------------------------------------------------


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
    assert weighter.statistics.gram is None and "cosine/depth/seg" not in weighter.log_values()
    x, y = batch(0, 2, torch.float64)
    weighter.detach()
    z = representation(model.inner, x).detach().requires_grad_()
    losses = task_losses(call(model.heads, z), y)
    n = torch.stack([torch.autograd.grad(loss, z)[0].norm() for loss in losses.values()])
    assert_close(weighter.statistics.norms, n, **EXACT)

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
    assert_close(weighter.statistics.gram, G @ G.T, **EXACT)
    assert weighter.statistics.gram[0, 1] != 0


def test_tasks_that_share_no_sample_are_told_of_the_shared_layer_once(caplog: pytest.LogCaptureFixture) -> None:
    trunk, heads = torch.nn.Linear(3, 4), {task: torch.nn.Linear(4, 1) for task in "ab"}
    for layer, warnings in ((None, 1), (trunk, 0)):
        caplog.clear()
        weighter = Weighter(MGDA(), ["a", "b"], shared_layer=layer)
        for _ in range(3):
            z = weighter.branch(trunk(torch.randn(6, 3)))
            halves = {"a": z["a"][:3], "b": z["b"][3:]}
            weighter.backward({task: heads[task](half).square().mean() for task, half in halves.items()})
        assert (weighter.statistics.gram[0, 1] == 0) == (layer is None)
        assert sum("shared_layer" in record.message for record in caplog.records) == warnings


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
        assert_close(weighters[i].statistics.gram, mine @ mine.T, **EXACT)


def test_a_weighter_of_the_same_tasks_on_the_same_heads_takes_the_place_of_the_older_one():
    model = net()
    older = Weighter(GRADNORM, TASKS, heads=dict(model.heads))
    with pytest.warns(UserWarning, match="carry a weighter of the tasks .* already: the new one replaces it"):
        weighter = Weighter(GRADNORM, TASKS, heads=dict(model.heads))
    weighter.backward(losses_of(model))
    assert older.statistics is None
    assert_close(weighter.statistics.norms, gradients_by_hand(net()).norm(dim=1), **EXACT)
    assert_gradients_by_hand(model, {"depth": 1, "seg": 1})
    assert len(model.heads["seg"]._forward_pre_hooks) == 1


class Recursive(nn.Linear):
    """A head whose ``forward`` calls itself."""

    def forward(self, z, again=True):
        return 0.5 * self.forward(z, again=False) if again else super().forward(z)


@pytest.mark.parametrize("kind", [nn.Linear, Recursive])
def test_forward_by_hand_of_a_rotated_head_is_a_call_of_the_head(kind):
    """In training and in evaluation, of the head and of its copy; and no longer once the weighter is detached."""
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 6), nn.ModuleDict({t: kind(6, 1) for t in "ab"})
    weighter = Weighter(RotoGrad(burn_in=0, lr=0.3), ["a", "b"], heads=dict(heads))

    def train(call):
        for step in range(5):
            z = trunk(torch.randn(8, 4, generator=torch.Generator().manual_seed(step)))
            weighter.backward({t: (call(heads[t], z) - 1).square().mean() for t in "ab"})
            yield weighter.statistics.norms

    wanted = list(train(lambda head, z: head(z)))
    weighter.detach()
    weighter = Weighter(RotoGrad(burn_in=0, lr=0.3), ["a", "b"], heads=dict(heads))
    found = list(train(lambda head, z: head.forward(z)))
    assert all((a == b).all() for a, b in zip(found, wanted, strict=True))
    z = trunk(torch.randn(8, 4))
    copied = copy.deepcopy(heads)
    with torch.no_grad():
        for t in "ab":
            rotated = heads[t](z)
            assert torch.equal(heads[t].forward(z), rotated)
            assert torch.equal(copied[t].forward(z), rotated) and torch.equal(copied[t](z), rotated)
    weighter.detach()
    with torch.no_grad():
        assert not torch.allclose(heads["a"].forward(z), rotated)
        assert all("forward" not in vars(head) for head in heads.values())
