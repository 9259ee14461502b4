"""PEFT: LoRA around heads, saved modules, several adapters, merging: the same life by hand, or refused in words."""

from __future__ import annotations

import logging

import pytest
import torch

from accel_weighting import MGDA, CoVWeighting, GradNorm, RotoGrad, Weighter
from tests.adapters import LIVES, TASKS, assert_same, data, lived, lived_by_hand, lora, losses_of, make_net, wrapped

peft = pytest.importorskip("peft", "0.21", reason="PEFT 0.21 is not installed")

METHODS = {"GradNorm": GradNorm(lr=0.1), "MGDA": MGDA()}
BUILT = [(life, at) for life, events in LIVES.items() for at in range(len(events) + 1)]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("life", "built_at"), BUILT)
def test_a_life_with_adapters_is_the_one_by_hand(life, built_at, method):
    assert_same(lived(life, method, built_at), lived_by_hand(life, method, built_at))


@pytest.mark.parametrize("life", LIVES)
def test_heads_may_be_given_by_the_names_of_the_wrapper(life):
    heads = {task: f"base_model.model.heads.{task}" for task in TASKS}
    if "unloaded" not in life:  # which takes the wrapper off, and its names with it
        assert_same(lived(life, MGDA(), 1, heads=heads), lived_by_hand(life, MGDA(), 1))


def test_names_of_a_wrapper_that_was_taken_off_are_refused():
    heads = {task: f"base_model.model.heads.{task}" for task in TASKS}
    with pytest.raises(RuntimeError, match="model"):
        lived("merged and unloaded", MGDA(), 1, heads=heads)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_heads_given_as_modules_of_a_wrapped_model(prefix):
    """Their names are looked up in the model, so what is wrapped round them later is seen."""
    model = wrapped(make_net())
    heads = {task: model.get_submodule(f"base_model.model.heads.{task}") for task in TASKS}
    weighter = Weighter(MGDA(), TASKS, heads=heads, model=model)
    weighter.backward(losses_of(model(data(0))))
    want = lived_by_hand("LoRA", MGDA(), 1)["seen"][0]
    torch.testing.assert_close(weighter.statistics.gram, want[2], rtol=1e-12, atol=0)


def test_adapters_round_modules_that_were_given_without_a_model_are_noticed(caplog):
    """The layer inside is still called, so the gradient through the adapter goes round the branch."""
    model = make_net()
    weighter = Weighter(GradNorm(lr=0.1), TASKS, heads=dict(model.heads))
    model = wrapped(model, target_modules=["trunk", "a"])
    with caplog.at_level(logging.WARNING):
        weighter.backward(losses_of(model(data(0))))
    assert "`a`" in caplog.text and "round the branch" in caplog.text


def test_adapters_on_heads_alone_leave_nothing_shared():
    """The trunk is frozen: there is no gradient at z, and methods that read losses are the ones that work."""
    model = wrapped(make_net(), target_modules=["a", "b.0", "b.2"])
    weighter = Weighter(GradNorm(), TASKS, heads={task: f"heads.{task}" for task in TASKS}, model=model)
    with pytest.raises(RuntimeError, match="parameters before it are frozen"):
        weighter.backward(losses_of(model(data(0))))
    weighter = Weighter(CoVWeighting(), TASKS)
    weighter.backward(losses_of(model(data(0))))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_merged_adapters_have_nothing_to_train():
    model = wrapped(make_net())
    weighter = Weighter(CoVWeighting(), TASKS)
    outputs = model(data(0))
    model.merge_adapter()
    merged = model(data(0))
    for task in TASKS:
        torch.testing.assert_close(merged[task], outputs[task])
    with pytest.raises(ValueError, match="was detached before"):
        weighter.backward(losses_of(merged))


@pytest.mark.parametrize("saved", [False, True], ids=["LoRA", "modules_to_save"])
def test_rotations_are_folded_into_heads_that_were_merged(saved):
    options = {"target_modules": ["trunk"], "modules_to_save": ["a", "b"]} if saved else {}
    model = wrapped(make_net(), **options)
    weighter = Weighter(RotoGrad(), TASKS, heads={task: f"heads.{task}" for task in TASKS}, model=model)
    for step in range(4):
        weighter.backward(losses_of(model(data(step))))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0 if p.grad is None else 0.05 * p.grad
                p.grad = None
    with torch.no_grad():
        before = model(data(9))
        plain = model.merge_and_unload()
        weighter.fold_rotations(heads=dict(plain.heads))
        after = plain(data(9))
    for task in TASKS:
        torch.testing.assert_close(before[task], after[task], rtol=1e-12, atol=1e-12)


def test_a_second_adapter_of_other_heads_is_measured():
    """`set_adapter` changes what a head computes, and the hook stays where it is."""
    model = wrapped(make_net())
    weighter = Weighter(MGDA(), TASKS, heads={task: f"heads.{task}" for task in TASKS}, model=model)
    model.add_adapter("other", lora(target_modules=["trunk", "b.0"], r=3))
    model.double()
    grams = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        weighter.backward(losses_of(model(data(0))))
        grams.append(torch.as_tensor(weighter.statistics.gram))
    assert torch.equal(grams[0], grams[2]) and not torch.allclose(grams[0], grams[1])
