"""Mistakes of models and loops: each is met by words that name its cause and its cure."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from accel_weighting import MGDA, CoVWeighting, GradNorm, RotoGrad, Smooth, Weighter

GRADNORM = GradNorm(alpha=0.0)


def parts(tasks: str = "ab"):
    torch.manual_seed(0)
    return nn.Linear(4, 6), nn.ModuleDict({t: nn.Linear(6, 2) for t in tasks}), torch.randn(7, 4)


def mean(x):
    return x.square().mean()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.heads, _ = parts()

    def forward(self, x):
        z = torch.tanh(self.trunk(x))
        return tuple(self.heads[t](z) for t in "ab")


@pytest.mark.parametrize("route", ["heads", "branch"])
@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), nn.Hardswish(inplace=True)])
def test_a_head_that_begins_in_place(route, first):
    trunk, heads, x = parts()
    heads = {t: nn.Sequential(first, heads[t]) for t in "ab"} if route == "branch" else heads
    named = {t: nn.Sequential(type(first)(inplace=True), nn.Linear(6, 2)) for t in "ab"}
    weighter = Weighter(GRADNORM, ["a", "b"], heads=named if route == "heads" else None)
    z = trunk(x)
    zs = weighter.branch(z) if route == "branch" else {"a": z, "b": z}
    with pytest.raises(RuntimeError, match=r"one of `a`, `b`, begins with an in-place module: give it `inplace=False`"):
        [(named if route == "heads" else heads)[t](zs[t]) for t in "ab"]


def test_a_sum_in_place_of_losses():
    trunk, heads, x = parts()
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
    z = trunk(x)
    with pytest.raises(ValueError, match=r"must come unsummed.*`extra=\{name: loss\}`"):
        weighter.backward(mean(heads["a"](z)) + mean(heads["b"](z)))


def test_an_evaluation_without_no_grad():
    model, x = Model(), torch.randn(7, 4)
    weighter = Weighter(CoVWeighting(), ["a", "b"], heads=dict(model.heads))
    model.eval()
    weighter.combine([mean(y) for y in model(x)])
    with pytest.raises(RuntimeError, match=r"belongs to an evaluation, disable gradients there"):
        weighter.backward([mean(y) for y in model(x)])


def test_losses_that_never_come_to_the_weighter_are_said_once(caplog):
    model, x = Model(), torch.randn(7, 4)
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(model.heads))
    for _ in range(450):
        a, b = model(x)
        (mean(a) + mean(b)).backward()
    said = [r.getMessage() for r in caplog.records if "no losses came to the weighter" in r.getMessage()]
    assert len(said) == 1 and "accelerator.backward(sum of losses)" in said[0]
    caplog.clear()
    weighter.detach()
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(model.heads))
    for _ in range(250):
        weighter.backward([mean(y) for y in model(x)])
        with torch.no_grad():
            model(x)
    assert not [r for r in caplog.records if "no losses came to the weighter" in r.getMessage()]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_tracing_a_model_with_hooks_names_detach():
    model, x = Model(), torch.randn(7, 4)
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(model.heads))
    with pytest.raises(RuntimeError, match=r"`weighter.detach\(\)`"):
        torch.jit.trace(model, (x,))
    weighter.detach()
    torch.jit.trace(model, (x,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_scripting_a_model_with_hooks_names_detach():
    model = nn.Sequential(nn.Linear(4, 6))
    Weighter(GRADNORM, ["a"], heads={"a": model[0]})
    with pytest.raises(AttributeError, match=r"torch.jit.script.*weighter.detach\(\)"):
        torch.jit.script(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
@pytest.mark.parametrize("how", ["export", "trace"])
def test_an_exported_model_that_rotates_is_refused_until_it_is_folded(how):
    model, x = Model(), torch.randn(7, 4)
    weighter = Weighter(RotoGrad(burn_in=0, lr=0.3), ["a", "b"], heads=dict(model.heads))
    for _ in range(3):
        weighter.backward([mean(y - 1) for y in model(x)])
    model.eval()

    def export():
        with torch.no_grad():
            return torch.export.export(model, (x,)).module() if how == "export" else torch.jit.trace(model, (x,))

    with pytest.raises(RuntimeError, match=r"fold_rotations\(\)"):
        export()
    with torch.no_grad():
        want = model(x)
    weighter.fold_rotations()
    torch.testing.assert_close(export()(x), want)


def test_a_model_that_does_not_rotate_is_exported_as_it_is():
    model, x = Model(), torch.randn(7, 4)
    Weighter(GRADNORM, ["a", "b"], heads=dict(model.heads))
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.filterwarnings("ignore:While compiling, we found", "ignore:.*should not be instantiated")  # the trace's
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_has_no_operator_of_ours(strict):
    """Exported in a training too, which needs no library where it is loaded."""
    model, x = Model(), torch.randn(7, 4)
    Weighter(GRADNORM, ["a", "b"], heads=dict(model.heads))
    program = torch.export.export(model, (x,), strict=strict)
    graphs = [module.graph for module in program.graph_module.modules() if hasattr(module, "graph")]
    names = [str(node.target) for graph in graphs for node in graph.nodes]
    assert any("linear" in name for name in names) and not any("accel_weighting" in name for name in names)


@pytest.mark.parametrize("method", [GRADNORM, MGDA()], ids=["GradNorm", "MGDA"])
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda h, z: h.forward(z), r"`head.forward\(z\)`"),
        (lambda h, z: torch.nn.functional.linear(z, h.weight), "was not called as a module"),
        (lambda h, z: h(z.detach()), r"weighter.combine\(losses\) \+ probe"),
    ],
    ids=["forward", "weight", "probe"],
)
def test_a_head_that_is_passed_by_is_named(method, call, words):
    trunk, heads, x = parts()
    weighter = Weighter(method, ["a", "b"], heads=dict(heads))
    z = trunk(x)
    with pytest.raises(RuntimeError, match=rf"(?s)`b`.*{words}"):
        weighter.backward({"a": mean(heads["a"](z)), "b": mean(call(heads["b"], z))})


def test_misspelt_heads_and_tasks_are_guessed():
    model = Model()
    with pytest.raises(ValueError, match=r"Did you mean 'heads.a'"):
        Weighter(GRADNORM, ["a", "b"], heads={"a": "head.a", "b": "heads.b"}, model=model)
    weighter = Weighter(GRADNORM, ["depth", "normals"])
    with pytest.raises(ValueError, match=r"Did you mean 'normals'"):
        weighter.combine({"depth": torch.ones(()), "normal": torch.ones(())})


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (GradNorm(), "GradNorm()"),
        (GradNorm(alpha=1, optimizer="sgd"), "GradNorm(alpha=1, optimizer='sgd')"),
        (Smooth(GradNorm(alpha=0), 0.5), "Smooth(method=GradNorm(alpha=0), decay=0.5)"),
        (RotoGrad(init="haar", size=4), "RotoGrad(size=4, init='haar')"),
    ],
)
def test_messages_name_a_method_by_what_differs_from_its_defaults(method, words):
    assert str(method) == words
    assert Weighter(method, ["a", "b"]).describe().startswith(f"losses weighted by {words}; to begin with: a ")


# ---- summary --------------------------------------------------------------------------------------------------------


def test_the_summary_is_a_table_of_the_first_window_and_the_last():
    model, x = Model(), torch.randn(7, 4)
    weighter = Weighter(GRADNORM, ["a", "b"], heads={"a": "heads.a", "b": "heads.b"}, model=model)
    before = weighter.summary()
    assert "heads.a" in before and "audit: follows with the first losses" in before
    for scale in (1.0, 2.0):
        weighter.backward([scale * mean(y) for y in model(x)])
    first, last = weighter.history[0][1], weighter.history[1][1]
    table = weighter.summary()
    row = next(line for line in table.splitlines() if line.startswith("b "))
    for name in ("loss/b", "grad_norm/b", "weight/b"):
        assert f"{first[name]:.3g} → {last[name]:.3g}" in row
    assert f"{last['cosine/a/b']:.3g}" in row and "[7, 6]" in row and "heads.b" in row
    n = weighter.statistics.norms
    w = 2 / n / (1 / n).sum()
    assert f"weights at which all gradients would have the same length: a {w[0]:.3g}, b {w[1]:.3g}" in table
    assert "audit: every loss reaches the shared part through its own alias alone" in table


def test_the_summary_says_what_the_audit_found():
    trunk, heads, x = parts()
    weighter = Weighter(MGDA(), ["a", "b"])
    h = torch.tanh(trunk(x))
    zs = weighter.branch(h * 2)
    weighter.backward({"a": mean(heads["a"](zs["a"])), "b": mean(heads["b"](zs["b"] + h))})
    assert "audit: loss `b` reaches the trunk around the branch, at Tanh" in weighter.summary()
    weighter = Weighter(CoVWeighting(), ["a", "b"])
    assert "audit: none" in weighter.summary()
    assert logging.getLogger("accel_weighting").handlers == []


def test_the_cosine_to_the_rest_is_that_of_the_gradients():
    trunk, heads, x = parts("abc")
    weighter = Weighter(MGDA(), list("abc"), heads=dict(heads))
    z = trunk(x)
    g = [torch.autograd.grad(mean(heads[t](z.detach().requires_grad_())), heads[t].weight)[0] for t in "abc"]
    del g
    leaf = z.detach().requires_grad_()
    weighter._branch.forget()
    losses = [mean(nn.functional.linear(leaf, heads[t].weight, heads[t].bias)) for t in "abc"]
    g = [torch.autograd.grad(loss, leaf)[0].flatten() for loss in losses]
    weighter.backward([mean(heads[t](z)) for t in "abc"])
    rest = torch.cosine_similarity(g[0], g[1] + g[2], dim=0).item()
    assert f"{rest:.3g}" in next(line for line in weighter.summary().splitlines() if line.startswith("a "))
