"""Activation checkpointing and `torch.compile`: the statistics are those of a plain forward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from accel_weighting import RotoGrad, Weighter
from accel_weighting.methods.mgda import MGDA
from accel_weighting.tracing import IS_FOLLOWED
from tests.small import (
    EXACT,
    GRADNORM,
    TASKS,
    Net,
    apply_heads,
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

# ---- activation checkpointing --------------------------------------------------------------------------------------


def checkpointed(model, x, where, reentrant):
    if where == "the model":
        stacked = checkpoint(lambda x: torch.stack(list(model(x).values())), x, use_reentrant=reentrant)
        return dict(zip(TASKS, stacked, strict=True))
    if where == "the trunk":
        return apply_heads(model.heads, checkpoint(lambda x: representation(model, x), x, use_reentrant=reentrant))
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
    assert_close(weighter.statistics.norms, gradients_by_hand(net()).norm(dim=1), **EXACT)
    assert weighter.statistics.gram is None
    assert_gradients_by_hand(model, {"depth": 1, "seg": 1})
    needy, model = weighter_and_model(MGDA())
    with pytest.raises(RuntimeError, match="heads were fed different tensors"):
        needy.backward(task_losses(checkpointed(model, x, "every head apart", True), y))


# ---- compilation ---------------------------------------------------------------------------------------------------


IN_ONE_GRAPH = pytest.mark.skipif(not IS_FOLLOWED, reason="torch before 2.8 breaks the graph at every head")


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@IN_ONE_GRAPH
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
        assert_close(weighter.statistics.gram, G @ G.T, **EXACT)
        assert_gradients_by_hand(model, weights, step)
        model.branch = branch
    assert weighter.weights["depth"] != weighter.weights["seg"]


def rotated_run(checkpoint, size, compiled):
    torch.manual_seed(0)
    model = Net(TASKS, checkpoint).double()
    weighter = Weighter(RotoGrad(lr=0.5, size=size), TASKS)
    model.branch = weighter.branch
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for step in range(3):
        weighter.backward(losses_of(forward, step))
    return weighter.rotations, weighter.weights, [p.grad for p in model.parameters()]


@IN_ONE_GRAPH
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
