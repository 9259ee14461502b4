"""Gradients at a shared layer's weight: every kind of layer, however it is called, against autograd at the weight."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel_weighting import MGDA, GradNorm, Weighter
from accel_weighting import layers as layers_module
from accel_weighting.layers import Layer, weight_gradient
from accel_weighting.tracing import IS_FOLLOWED
from tests.small import assert_close

TASKS = ["a", "b"]
EXACT = {"rtol": 1e-12, "atol": 1e-15}


class Own(nn.Linear):
    """A subclass that changes nothing."""


class Normalising(nn.Linear):
    """A subclass that does more than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.layer_norm(x, x.shape[-1:]))


class SamePadded(nn.Conv2d):
    """A subclass with a forward of its own, which pads as it likes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Rewritten(nn.Linear):
    """A subclass with a forward of its own that gives the same."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


def gpt2() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(8, 4)
    nn.init.normal_(layer.weight)  # or all of its outputs would be alike
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 8), (6, 4)),
    "linear on tokens": (lambda: nn.Linear(4, 8, bias=False), (3, 5, 4)),
    "linear on one row": (lambda: nn.Linear(4, 8), (4,)),
    "linear's subclass": (lambda: Own(4, 8), (6, 4)),
    "linear's subclass with a forward": (lambda: Rewritten(4, 8), (6, 4)),
    "transformers' Conv1D": (gpt2, (3, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (3, 4, 7, 6)),
    "conv2d, strided, dilated, in groups": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(2, 1), groups=2),
        (3, 4, 10, 11),
    ),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (3, 4, 6, 6)),
    "conv2d, same, of even size": (lambda: nn.Conv2d(4, 6, 4, padding="same", dilation=1), (3, 4, 6, 6)),
    "conv2d, valid": (lambda: nn.Conv2d(4, 6, 2, padding="valid"), (3, 4, 6, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect", stride=2), (3, 4, 7, 6)),
    "conv2d, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 6, 5)),
    "conv2d, replicate, same": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate"), (3, 4, 6, 5)),
    "conv2d on one image": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=1, groups=2), (2, 2, 4, 5, 4)),
}


def made(kind: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    return make().double(), torch.randn(shape, dtype=torch.float64)


def losses_of(z: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"a": z["a"].sin().square().mean(), "b": 20 + 10 * (z["b"] * torch.arange(z["b"].shape[-1])).tanh().mean()}


def at_the_weight(layer: Any, z: Tensor) -> Tensor:
    """Every task's gradient there by autograd, `[K, |W|]`."""
    losses = losses_of(dict.fromkeys(TASKS, z)).values()
    return torch.stack([torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].flatten() for loss in losses])


def assert_gram(weighter: Weighter, G: Tensor) -> None:
    assert_close(weighter.statistics.gram, (G @ G.T).detach(), **EXACT)
    assert_close(weighter.statistics.norms, G.norm(dim=1).detach(), **EXACT)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own, on its speed
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_at_the_weight_are_those_of_autograd(kind: str) -> None:
    layer, x = made(kind)
    weighter = Weighter(MGDA(), TASKS, shared_layer=layer)
    weighter.backward(losses_of(weighter.branch(layer(x))))
    assert_gram(weighter, at_the_weight(layer, layer(x)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", [kind for kind, (_, shape) in LAYERS.items() if " one " not in kind])
def test_any_cut_of_the_batch_gives_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between micro-batches, whose sum it is, and in pieces, of one sample each here."""
    layer, x = made(kind)
    facts, z = Layer.of(layer), layer(x)
    assert facts.output_shape(x.shape) == z.shape
    g = torch.randn(z.shape, dtype=z.dtype)
    whole = weight_gradient(facts, x, g)
    expected = torch.autograd.grad(z, layer.weight, g)[0]
    expected = expected.T if "Conv1D" in kind else expected
    torch.testing.assert_close(whole, expected.reshape(facts.matrix), **EXACT)
    monkeypatch.setattr(layers_module, "piece_size", lambda g: 1)
    torch.testing.assert_close(weight_gradient(facts, x, g), whole, **EXACT)
    cut = weight_gradient(facts, x[:1], g[:1]) + weight_gradient(facts, x[1:], g[1:])
    torch.testing.assert_close(cut, whole, **EXACT)


def test_called_by_keyword() -> None:
    for kind, name in (("linear", "input"), ("conv2d", "input"), ("transformers' Conv1D", "x")):
        layer, x = made(kind)
        weighter = Weighter(GradNorm(), TASKS, shared_layer=layer)
        weighter.backward(losses_of(weighter.branch(layer(**{name: x}))))
        assert_gram(weighter, at_the_weight(layer, layer(x)))


def test_a_scalar_representation() -> None:
    layer, x = nn.Linear(4, 1).double(), torch.randn(4, dtype=torch.float64)
    weighter = Weighter(GradNorm(), TASKS, shared_layer=layer)
    z = weighter.branch(layer(x).squeeze())
    weighter.backward({"a": 2 + z["a"].sin(), "b": z["b"].square()})
    z = layer(x).squeeze()
    G = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].flatten() for loss in (z.sin(), z.square())]
    assert_gram(weighter, torch.stack(G))


@pytest.mark.parametrize("kind", ["linear on tokens", "conv2d"])
def test_a_view_of_its_output_with_the_same_entries(kind: str) -> None:
    layer, x = made(kind)
    weighter = Weighter(GradNorm(), TASKS, shared_layer=layer)
    weighter.backward(losses_of(weighter.branch(layer(x).flatten(1))))
    assert_gram(weighter, at_the_weight(layer, layer(x).flatten(1)))


@pytest.mark.parametrize("change", [torch.relu, lambda z: z[:2], lambda z: z.mT, lambda z: z.relu_()])
def test_what_lies_between_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    layer, x = made("linear on tokens")
    weighter = Weighter(GradNorm(), TASKS, shared_layer=layer)
    with pytest.raises(ValueError, match="is not the tensor that is branched"):
        weighter.branch(change(layer(x)))


def test_two_towers_and_two_passes_through_one_layer() -> None:
    """Every output is matched with its own input, whatever came in between."""
    layer, x = made("conv2d")
    y = torch.randn_like(x)
    weighter = Weighter(GradNorm(), TASKS, shared_layer=layer)
    first, second = layer(x), layer(y)
    z, u = weighter.branch(first), weighter.branch(second)
    weighter.backward({task: losses_of(z)[task] + losses_of(u)[task].square() for task in TASKS})
    losses = [losses_of(dict.fromkeys(TASKS, layer(x))), losses_of(dict.fromkeys(TASKS, layer(y)))]
    totals = [losses[0][task] + losses[1][task].square() for task in TASKS]
    G = [torch.autograd.grad(total, layer.weight, retain_graph=True)[0].flatten() for total in totals]
    assert_gram(weighter, torch.stack(G))


def test_two_outputs_in_one_structure() -> None:
    layer, x = made("linear")
    weighter = Weighter(GradNorm(), TASKS, shared_layer=layer)
    z = weighter.branch({"left": layer(x), "right": layer(2 * x)})
    weighter.backward({"a": (z["a"]["left"] * z["a"]["right"]).square().mean(), "b": z["b"]["right"].exp().mean()})
    left, right = layer(x), layer(2 * x)
    losses = [(left * right).square().mean(), right.exp().mean()]
    G = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].flatten() for loss in losses]
    assert_gram(weighter, torch.stack(G))


def test_heads_on_two_towers() -> None:
    layer, x = made("linear")
    heads = {task: nn.Bilinear(8, 8, 1).double() for task in TASKS}
    weighter = Weighter(GradNorm(), TASKS, heads=heads, shared_layer=layer)
    left, right = layer(x), layer(x.flip(0))
    weighter.backward({task: head(left, right).square().mean() for task, head in heads.items()})
    left, right = layer(x), layer(x.flip(0))
    losses = [head(left, right).square().mean() for head in heads.values()]
    G = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].flatten() for loss in losses]
    assert_gram(weighter, torch.stack(G))


def test_masked_places_of_a_map_do_not_count() -> None:
    layer, x = made("conv2d")
    weighter = Weighter(GradNorm(), TASKS, shared_layer=layer)
    output = layer(x)
    mask = torch.rand(output[:, 0].shape) < 0.5
    weighter.backward(losses_of(weighter.branch(output, mask)))
    z = layer(x)
    gradients = [
        torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses_of(dict.fromkeys(TASKS, z)).values()
    ]
    G = [torch.autograd.grad(z, layer.weight, g * mask[:, None], retain_graph=True)[0].flatten() for g in gradients]
    assert_gram(weighter, torch.stack(G))


def test_half_precision_is_measured_in_float32() -> None:
    facts = Layer.of(nn.Linear(64, 16))
    a, g = torch.randn(5000, 64).bfloat16(), torch.randn(5000, 16).bfloat16()
    torch.testing.assert_close(weight_gradient(facts, a, g), g.double().T @ a.double(), rtol=1e-5, atol=1e-4)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nn.ConvTranspose2d(4, 8, 3), TypeError, "A transposed convolution is not one of them"),
        (lambda: nn.LSTM(4, 8), TypeError, "Found LSTM. Leave it out"),
        (lambda: nn.Sequential(nn.Linear(4, 8)), TypeError, "Found Sequential"),
        (lambda: nn.LazyLinear(8), ValueError, "Run the model once"),
        (lambda: nn.Linear(4, 8, dtype=torch.complex64), ValueError, "is complex"),
    ],
)
def test_other_layers_are_refused_in_words(make: Callable[[], nn.Module], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Weighter(GradNorm(), TASKS, shared_layer=make())


def test_subclasses_that_compute_something_else_are_refused() -> None:
    for layer, x in ((Normalising(4, 8), torch.randn(6, 4)), (SamePadded(3, 4, 2), torch.randn(2, 3, 5, 5))):
        weighter = Weighter(GradNorm(), TASKS, shared_layer=layer)
        with pytest.raises(TypeError, match="forward does not give what its input, weight and bias give"):
            layer(x)
        weighter.detach()
        layer(x)


# ---- life --------------------------------------------------------------------------------------------------------


def test_neither_layer_nor_inputs_are_kept_alive() -> None:
    layer, x = made("conv2d")
    weighter = Weighter(GradNorm(), TASKS, shared_layer=layer)
    x = x.clone()
    seen = weakref.ref(x.untyped_storage())
    losses = losses_of(weighter.branch(layer(x)))
    weighter.backward(losses)
    del x
    gc.collect()
    assert seen() is None, "the losses are still there, and their graph's inputs must not be"
    gone = weakref.ref(layer)
    del layer, losses
    gc.collect()
    assert gone() is None


def test_outputs_that_are_never_branched_go_with_their_inputs() -> None:
    layer, x = made("linear")
    weighter = Weighter(GradNorm(), TASKS, shared_layer=layer)
    refs = []
    for _ in range(3):
        y = x.clone()
        refs.append(weakref.ref(y.untyped_storage()))
        layer(y).sum().backward()
        del y
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3
    assert weighter.statistics is None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
@pytest.mark.skipif(not IS_FOLLOWED, reason="torch before 2.8 breaks the graph at every head")
def test_compiled_and_recomputed_convolutions() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = made("conv2d")
    heads = {task: nn.Conv2d(6, 1, 1).double() for task in TASKS}
    modules = nn.ModuleDict({"shared": layer, **heads})
    weighter = Weighter(GradNorm(), TASKS, heads=heads, shared_layer="shared", model=modules)

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        z = layer(x)
        return tuple(head(z).square().mean() for head in heads.values())

    found = []
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for run in (
        forward,
        compiled,
        lambda x: checkpoint(forward, x, use_reentrant=False),
        lambda x: checkpoint(forward, x.clone().requires_grad_(), use_reentrant=True),
    ):
        weighter.backward(dict(zip(TASKS, run(x), strict=True)))
        found.append(weighter.statistics.gram)
    for other in found[1:]:
        assert_close(other, torch.from_numpy(found[0]), **EXACT)
