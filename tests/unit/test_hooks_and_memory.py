"""What is left behind: no hook after `detach` or a refusal, and no tensor of a step that is over."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.nn.modules import module as torch_module

from accel_weighting import CoVWeighting, RotoGrad, Weighter
from accel_weighting.methods.mgda import MGDA
from tests.small import (
    GRADNORM,
    TASKS,
    assert_gradients_by_hand,
    fake_accelerator,
    losses_of,
    net,
    weighter_and_model,
)


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
        return len(alive()) - len(before)

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
