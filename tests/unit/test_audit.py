"""The audit of the first window: what it finds, what it must not find, and what it costs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from accel_weighting import MGDA, CoVWeighting, GradNorm, RotoGrad, Weighter

GRADNORM = GradNorm(alpha=0.0)
SILENT: dict[str, Any] = {"crossed": [], "suspected": [], "missed": [], "passed_by": {}, "apart": []}


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def parts(width: int = 6, tasks: str = "ab") -> tuple[nn.Module, nn.ModuleDict, Tensor]:
    trunk = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width))
    return trunk, nn.ModuleDict({t: nn.Linear(width, 2) for t in tasks}), torch.randn(7, 4)


def mean(x: Tensor) -> Tensor:
    return x.square().mean()


def seen(weighter: Weighter) -> dict[str, Any]:
    found = weighter._audit.findings
    return {name: getattr(found, name) for name in SILENT}


# ---- cross-talk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["heads", "branch"])
@pytest.mark.parametrize("method", [GRADNORM, MGDA(), RotoGrad()], ids=["GradNorm", "MGDA", "RotoGrad"])
def test_a_loss_that_reads_another_head_is_refused_by_names(route, method):
    trunk, heads, x = parts()
    weighter = Weighter(method, ["a", "b"], heads=dict(heads) if route == "heads" else None)
    z = trunk(x)
    zs = weighter.branch(z) if route == "branch" else {"a": z, "b": z}
    a, b = (heads[t](zs[t]) for t in "ab")
    with pytest.raises(RuntimeError, match=r"gradient of loss `b` arrives at the alias of `a`.*Detach") as caught:
        weighter.backward({"a": mean(a), "b": mean(b) + mean(a - b)})
    assert "loss `a` arrives" not in str(caught.value) and str(method) in str(caught.value)
    trunk.zero_grad()
    weighter.reset()


def test_distillation_from_a_detached_head_is_no_cross_talk():
    trunk, heads, x = parts()
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
    a, b = (heads[t](trunk(x)) for t in "ab")
    z = trunk(x)
    a, b = heads["a"](z), heads["b"](z)
    weighter.backward({"a": mean(a), "b": mean(b - a.detach())})
    assert seen(weighter) == SILENT


def test_a_method_of_losses_does_not_care_and_does_not_look():
    trunk, heads, x = parts()
    weighter = Weighter(CoVWeighting(), ["a", "b"], heads=dict(heads))
    z = trunk(x)
    a, b = heads["a"](z), heads["b"](z)
    weighter.backward({"a": mean(a), "b": mean(b - a)})
    assert weighter._audit is None


def test_cross_talk_through_a_join_deeper_down():
    """A hierarchy: the second head reads what the first one gave."""
    trunk, heads, x = parts(width=2)
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
    first = heads["a"](trunk(x))
    with pytest.raises(RuntimeError, match="loss `b` arrives at the alias of `a`"):
        weighter.backward({"a": mean(first), "b": mean(heads["b"](torch.tanh(first)))})


def test_losses_that_are_swapped_are_cross_talk():
    trunk, heads, x = parts()
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
    z = trunk(x)
    a, b = heads["a"](z), heads["b"](z)
    with pytest.raises(RuntimeError, match=r"loss `a` arrives at the alias of `b`.*loss `b` arrives at the alias of"):
        weighter.backward({"a": mean(b), "b": mean(a)})


STACKED = {
    "a stack, as it is": lambda outputs: torch.stack([mean(y) for y in outputs]),
    "entries of a stack": lambda outputs: (s := torch.stack([mean(y) for y in outputs]), [s[0], s[1], s[-1]])[1],
    "stacked logits": lambda outputs: torch.stack(outputs).square().mean((1, 2)),
    "sliced out of logits": lambda outputs: [mean(y) for y in torch.cat(outputs, 1).split(2, 1)],
    "a mask on logits": lambda outputs: [mean(y) for y in (torch.stack(outputs) * torch.ones(3, 1, 1)).unbind()],
}


@pytest.mark.parametrize("how", STACKED)
def test_stacked_losses_and_logits_are_no_cross_talk(how):
    trunk, heads, x = parts(tasks="abc")
    weighter = Weighter(GRADNORM, list("abc"), heads=dict(heads))
    z = trunk(x)
    weighter.backward(STACKED[how]([heads[t](z) for t in "abc"]))
    assert seen(weighter) == SILENT


def test_a_stacked_loss_that_is_infinite_makes_no_cross_talk():
    trunk, heads, x = parts()
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
    z = trunk(x)
    logits = torch.stack([heads["a"](z), heads["b"](z) * 0])
    weighter.backward([mean(logits[0]), logits[1].sqrt().sum()])
    assert seen(weighter)["crossed"] == []


def test_one_loss_under_two_names_is_refused():
    trunk, heads, x = parts()
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
    z = trunk(x)
    loss = mean(heads["a"](z)) + mean(heads["b"](z))
    with pytest.raises(ValueError, match="Losses `a` and `b` are one and the same tensor"):
        weighter.backward({"a": loss, "b": loss})


def test_a_head_inside_a_head_is_refused_at_construction():
    _, heads, _ = parts()
    outer = nn.Sequential(heads["a"], nn.Linear(2, 2))
    with pytest.raises(ValueError, match="The head of task `b` is a part of the head of task `a`"):
        Weighter(GRADNORM, ["a", "b"], heads={"a": outer, "b": heads["a"]})
    Weighter(CoVWeighting(), ["a", "b"], heads={"a": outer, "b": heads["a"]})


# ---- around the branch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [GRADNORM, MGDA()], ids=["GradNorm", "MGDA"])
@pytest.mark.parametrize("route", ["heads", "branch"])
def test_a_by_pass_is_warned_of_once(method, route, caplog):
    trunk, heads, x = parts()
    heads["b"] = nn.Linear(12, 2)
    named = {"a": heads["a"], "b": heads["b"]}
    weighter = Weighter(method, ["a", "b"], heads={"a": named["a"], "b": (named["b"], "input")} if 0 else None)
    del route
    for _ in range(2):
        early = trunk[1](trunk[0](x))
        zs = weighter.branch(trunk[2](early))
        losses = {"a": mean(heads["a"](zs["a"])), "b": mean(heads["b"](torch.cat([zs["b"], early], 1)))}
        weighter.backward(losses)
    warnings = [r.getMessage() for r in caplog.records if "around the branch" in r.getMessage()]
    assert len(warnings) == 1 and "loss `b` at the trunk's Tanh" in warnings[0]
    assert ("keeps weight 1 there" in warnings[0]) == (method.acts_on == "shared")
    assert seen(weighter) == SILENT | {"passed_by": {"b": "Tanh"}}


class Named(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 2)

    def forward(self, memory: Tensor, other: Tensor) -> Tensor:
        return self.out(memory + other)


def test_a_by_pass_of_a_head_whose_argument_is_named(caplog):
    trunk, heads, x = parts()
    named = Named(6)
    weighter = Weighter(GRADNORM, ["a", "b"], heads={"a": heads["a"], "b": (named, "memory")})
    early = trunk[1](trunk[0](x))
    z = trunk[2](early)
    weighter.backward({"a": mean(heads["a"](z)), "b": mean(named(z, other=early))})
    assert seen(weighter) == SILENT | {"passed_by": {"b": "Tanh"}}


def test_weight_decay_and_tied_weights_are_no_by_pass():
    trunk, heads, x = parts()
    heads["a"] = nn.Linear(6, 6)
    heads["a"].weight = trunk[2].weight
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
    with torch.autocast("cpu", torch.bfloat16):  # which keeps one cast of a weight for all its uses
        z = trunk(x.float().double())
        a, b = heads["a"](z), heads["b"](z)
    norm = sum(p.square().sum() for p in trunk.parameters())
    tied = torch.nn.functional.linear(z.detach(), trunk[0].weight.reshape(-1)[:6].view(1, 6))
    weighter.backward({"a": mean(a.double()) + 0.1 * norm, "b": mean(b.double()) + mean(tied)})
    assert seen(weighter) == SILENT


def test_pieces_of_one_flat_parameter_are_no_by_pass():
    """As FSDP1 keeps them."""
    flat, x = nn.Parameter(torch.randn(24 + 12)), torch.randn(7, 4)
    w, h = flat.split([24, 12])
    w, h = w.view(6, 4), h.view(2, 6)
    weighter = Weighter(GRADNORM, ["a", "b"])
    z = weighter.branch(torch.tanh(x @ w.T))
    weighter.backward({"a": mean(z["a"] @ h.T), "b": mean(z["b"] @ w)})
    assert seen(weighter) == SILENT


def test_cached_parametrizations_are_no_by_pass():
    trunk, heads, x = parts()
    layer = parametrizations.orthogonal(nn.Linear(6, 6))
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
    with parametrize.cached():
        z = layer(trunk(x))
        a, b = heads["a"](z) @ layer.weight[:2], heads["b"](z)
        weighter.backward({"a": mean(a), "b": mean(b)})
    assert seen(weighter) == SILENT
    with parametrize.cached():
        z = layer(trunk(x))
        outputs = heads["a"](z) @ layer.weight[:2], heads["b"](z)
    weighter._audit._seen.clear()
    weighter.backward([mean(y) for y in outputs])
    assert seen(weighter) == SILENT


def test_learned_queries_and_inputs_that_need_gradients_are_no_by_pass():
    trunk, heads, x = parts()
    query = nn.Parameter(torch.randn(1, 6))
    x.requires_grad_()
    features = torch.sin(x)
    weighter = Weighter(GRADNORM, ["a", "b"])
    z = weighter.branch(trunk(features) + query.expand(7, 6))
    a = heads["a"](z["a"] + query.expand(7, 6))
    weighter.backward({"a": mean(a), "b": mean(heads["b"](z["b"])) + mean(features)})
    assert seen(weighter) == SILENT


# ---- what is hidden, or made anew -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("where", ["trunk", "heads", "all"])
def test_checkpoints_raise_no_alarm(reentrant, where):
    trunk, heads, x = parts()
    x.requires_grad_(reentrant)
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))

    def run(part, x, here):
        return checkpoint(part, x, use_reentrant=reentrant) if here else part(x)

    def both(z):
        return heads["a"](z), heads["b"](z)

    if where == "all":
        a, b = run(lambda x: both(trunk(x)), x, True)
    else:
        z = run(trunk, x, where == "trunk")
        a, b = (run(heads[t], z, where == "heads") for t in "ab")
    weighter.backward({"a": mean(a), "b": mean(b)})
    assert seen(weighter) == SILENT
    hidden = weighter._audit.findings.hidden
    assert hidden == ({"a": "CheckpointFunction", "b": "CheckpointFunction"} if reentrant and where != "trunk" else {})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated")  # torch's
@pytest.mark.parametrize("what", ["trunk", "heads", "all"])
def test_compiled_parts_raise_no_alarm_and_are_said_to_hide(what):
    torch.compiler.reset()
    trunk, heads, x = parts()
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))

    def both(z):
        return heads["a"](z), heads["b"](z)

    def compiled(f, here):
        return torch.compile(f, backend="aot_eager") if here else f

    def whole(x):
        return compiled(both, what == "heads")(compiled(trunk, what == "trunk")(x))

    a, b = compiled(whole, what == "all")(x)
    weighter.backward({"a": mean(a), "b": mean(b)})
    assert seen(weighter) == SILENT
    assert set(weighter._audit.findings.hidden) == (set() if what == "trunk" else {"a", "b"})


# ---- depths ---------------------------------------------------------------------------------------------------------


def depths(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "different depths or shapes" in r.getMessage()]


def test_heads_at_different_depths_are_said_once(caplog):
    trunk, heads, x = parts()
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
    for _ in range(2):
        early = trunk[1](trunk[0](x))
        weighter.backward({"a": mean(heads["a"](early)), "b": mean(heads["b"](trunk[2](early)))})
    assert len(depths(caplog)) == 1 and "`a` and `b`" in depths(caplog)[0] and "weighter.branch" in depths(caplog)[0]


TELLS_SHAPES = hasattr(torch.ones((), requires_grad=True).exp().grad_fn, "_input_metadata")


@pytest.mark.skipif(not TELLS_SHAPES, reason="nodes of torch before 2.5 do not tell their shapes")
def test_towers_of_different_shapes_are_said_and_of_one_shape_are_not(caplog):
    trunk, heads, x = parts()
    heads["b"] = nn.Linear(3, 2)
    other = nn.Linear(4, 3)
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
    weighter.backward({"a": mean(heads["a"](trunk(x))), "b": mean(heads["b"](other(x)))})
    assert len(depths(caplog)) == 1
    caplog.clear()
    trunk, heads, x = parts()
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
    weighter.backward({"a": mean(heads["a"](trunk(x))), "b": mean(heads["b"](trunk(x + 1)))})
    assert depths(caplog) == []


def test_views_of_one_tensor_are_of_one_depth(caplog):
    """Their gradients have the same norms as at the whole tensor."""
    trunk, heads, _ = parts()
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
    h = trunk(torch.randn(7, 5, 4))
    weighter.backward({"a": mean(heads["a"](h)), "b": mean(heads["b"](h[:, 0]))})
    assert depths(caplog) == []


# ---- when, and at what price ----------------------------------------------------------------------------------------


def test_it_looks_once_and_again_when_a_task_comes_or_a_head_changes():
    trunk, heads, x = parts()
    model = nn.ModuleDict({"trunk": trunk, "heads": heads})
    weighter = Weighter(GRADNORM, ["a", "b"], heads={"a": "heads.a", "b": "heads.b"}, model=model)
    looks = []
    judged = weighter._audit._judged
    weighter._audit._judged = lambda walk, losses: (looks.append(sorted(losses)), judged(walk, losses))[1]

    def step(tasks):
        weighter._branch.follow()  # as a forward of the model does
        z = trunk(x)
        weighter.backward({t: mean(heads[t](z)) for t in tasks})

    step("a")
    step("a")
    step("ab")
    step("ab")
    assert looks == [[0], [0, 1]]
    heads["b"] = nn.Linear(6, 2)
    step("ab")
    step("ab")
    assert looks == [[0], [0, 1], [0, 1]]


def test_every_node_is_visited_once_and_depth_is_no_matter():
    trunk, heads, x = parts()
    weighter = Weighter(GRADNORM, ["a", "b"], heads=dict(heads))
    h = trunk(x)
    for _ in range(3000):
        h = torch.tanh(h)
    weighter.backward({t: mean(heads[t](h)) for t in "ab"})
    assert 3000 < weighter._audit.findings.visited < 3100


def test_a_bert_of_twelve_layers_takes_a_thousand_nodes():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 50}
    bert = transformers.BertModel(transformers.BertConfig(num_hidden_layers=12, **sizes))
    heads = nn.ModuleDict({t: nn.Linear(16, 3) for t in "abcd"})
    weighter = Weighter(GRADNORM, list("abcd"), heads=dict(heads))
    h = bert(torch.randint(0, 50, (2, 6))).last_hidden_state
    weighter.backward({t: mean(heads[t](h)) for t in "abcd"})
    assert seen(weighter) == SILENT and weighter._audit.findings.visited < 1200  # 5 ms
    assert logging.getLogger("accel_weighting").level == logging.NOTSET


# ---- large tensors, whose gradients are measured one by one ----------------------------------------------------------


def tapped(method, heads):
    weighter = Weighter(method, list(heads), heads=heads)
    weighter._branch._tap_above = 0  # whatever the size
    return weighter


def test_taps_are_walked_to_as_joins_are():
    trunk, heads, x = parts()
    weighter = tapped(GRADNORM, dict(heads))
    z = trunk(x)
    a, b = heads["a"](z), heads["b"](z)
    with pytest.raises(RuntimeError, match="loss `b` arrives at the alias of `a`"):
        weighter.backward({"a": mean(a), "b": mean(b - a)})
    trunk, heads, x = parts()
    weighter = tapped(GRADNORM, dict(heads))
    z = trunk(x)
    weighter.backward(torch.stack([heads[t](z) for t in "ab"]).square().mean((1, 2)))
    assert seen(weighter) == SILENT
    named = Named(6)
    weighter.detach()
    weighter = tapped(GRADNORM, {"a": heads["a"], "b": (named, "memory")})
    early = trunk[1](trunk[0](x))
    z = trunk[2](early)
    weighter.backward({"a": mean(heads["a"](z)), "b": mean(named(z, other=early))})
    assert seen(weighter) == SILENT | {"passed_by": {"b": "Tanh"}}


def test_taps_at_different_depths_are_said(caplog):
    trunk, heads, x = parts()
    weighter = tapped(GRADNORM, dict(heads))
    early = trunk[1](trunk[0](x))
    weighter.backward({"a": mean(heads["a"](early)), "b": mean(heads["b"](trunk[2](early)))})
    assert len(depths(caplog)) == 1


def test_tasks_that_are_not_measured_are_not_looked_at(caplog):
    trunk, heads, x = parts()
    weighter = Weighter(GradNorm(alpha=0.0, tasks=["a", "b"]), ["a", "b", "own"])
    h = trunk(x)
    z = weighter.branch(torch.tanh(h))
    weighter.backward({"a": mean(heads["a"](z["a"])), "b": mean(heads["b"](z["b"])), "own": mean(h)})
    assert seen(weighter) == SILENT and not caplog.records
