"""Rotations folded into the heads: the same model, without the library."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from accel_weighting import GradNorm, RotoGrad, Smooth, Weighter

WIDTH = 5
EVERYTHING = RotoGrad(init="haar")
PART = RotoGrad(init="haar", size=3)


class Gated(nn.Module):
    """Two Linears read the input, and nothing else does."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.out = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, 1)

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(self.value(z) * torch.sigmoid(self.gate(input=z)))}


class Pooled(nn.Module):
    """A mean over tokens, which rotations pass through."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.inner = nn.Dropout(), nn.Linear(WIDTH, 2)

    def forward(self, z: Tensor) -> Tensor:
        return self.inner(self.dropout(z).mean(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.inner(z)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 2)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        return self.inner(z) * mask[..., None]


class Twice(nn.Module):
    """Its first Linear also reads what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, z: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(z)))


def total(output: Tensor | dict[str, Tensor]) -> Tensor:
    return (output["logits"] if isinstance(output, dict) else output).square().mean()


class Training:
    """A trunk and heads under a weighter, some steps old."""

    def __init__(self, method, heads, dtype=torch.float64, tokens=3, route="heads", **options):
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, WIDTH).to(dtype)
        self.heads = {task: head.to(dtype) for task, head in heads.items()}
        self.x = torch.randn(6, tokens, 4, dtype=dtype) if tokens else torch.randn(6, 4, dtype=dtype)
        given = {"heads": self.heads} if route == "heads" else {}
        self.weighter = Weighter(method, list(heads), **given, **options)
        self.branch = self.weighter.branch if route == "branch" else lambda z: dict.fromkeys(heads, z)
        for _ in range(3):
            self.weighter.backward({task: total(output) for task, output in self.outputs().items()})
        for head in self.heads.values():
            head.eval()

    def outputs(self):
        aliases = self.branch(self.trunk(self.x))
        return {task: head(aliases[task]) for task, head in self.heads.items()}

    def parameters(self):
        return {task: copy.deepcopy(head.state_dict()) for task, head in self.heads.items()}


def good(dtype=torch.float64):
    return {
        "linear": nn.Linear(WIDTH, 2),
        "mlp": nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, WIDTH)),
        "gated": Gated(),
        "pooled": Pooled(),
    }


def assert_same(a, b, tolerance):
    for task, x in a.items():
        for u, v in zip(*(y.values() if isinstance(y, dict) else [y] for y in (x, b[task])), strict=True):
            torch.testing.assert_close(v, u, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("route", ["heads", "branch"])
@pytest.mark.parametrize("method", [EVERYTHING, PART, Smooth(PART, 0.5)], ids=repr)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_folded_model_gives_the_same_outputs_without_the_library(method, dtype, tolerance, route):
    training = Training(method, good(), dtype, route=route)
    with torch.no_grad():
        before = training.outputs()
        plain = {task: copy.deepcopy(head) for task, head in training.heads.items()}
        for head in plain.values():
            head._forward_pre_hooks.clear()
            head._forward_hooks.clear()
        unrotated = {task: head(training.trunk(training.x)) for task, head in plain.items()}
    rng = torch.get_rng_state()
    training.weighter.fold_rotations(heads=training.heads if route == "branch" else None)
    assert torch.equal(torch.get_rng_state(), rng)
    with torch.no_grad():
        after = {task: head(training.trunk(training.x)) for task, head in training.heads.items()}
    assert_same(before, after, tolerance)
    assert (unrotated["linear"] - after["linear"]).abs().max() > 0.1
    for head in training.heads.values():
        for module in head.modules():
            assert not module._forward_pre_hooks and not module._forward_hooks
            assert not module.training
    assert_same(after, training.outputs(), 0.0)  # what still calls `branch` gets z


def test_channels_are_folded_behind_a_global_mean():
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, 2)

        def forward(self, z: Tensor) -> Tensor:
            return self.inner(z.mean((2, 3)))

    torch.manual_seed(0)
    trunk, x = nn.Conv2d(2, WIDTH, 3).double(), torch.randn(4, 2, 6, 6).double()
    heads = {"a": Mean().double(), "b": Mean().double()}
    weighter = Weighter(RotoGrad(dim=1, size=4, init="haar"), ["a", "b"], heads=heads)
    z = trunk(x)
    weighter.backward({task: total(head(z)) for task, head in heads.items()})
    with torch.no_grad():
        before = {task: head(trunk(x)) for task, head in heads.items()}
        weighter.fold_rotations()
        assert_same(before, {task: head(trunk(x)) for task, head in heads.items()}, 1e-12)


BAD = {
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)), "something else reads its input"),
    "activation": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, 2)), "something else reads its input"),
    "residual": (Residual, "something else reads its input"),
    "twice": (Twice, "its first nn.Linear reads something else too"),
    "convolution": (
        lambda: nn.Sequential(nn.Unflatten(1, (WIDTH, 1)), nn.Conv1d(WIDTH, 2, 1), nn.Flatten(1)),
        "there is no nn.Linear in it",
    ),
    "other width": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, WIDTH)), nn.ZeroPad1d((0, 1)), nn.Flatten(1), nn.Linear(WIDTH + 1, 2)
        ),
        "no nn.Linear in it reads the 5 features",
    ),
    "parametrised": (lambda: weight_norm(nn.Linear(WIDTH, 2)), "is computed from others"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("last", [False, True])
def test_a_head_that_cannot_take_its_rotation_leaves_all_as_it_was(name, last):
    make, why = BAD[name]
    heads = {"good": nn.Linear(WIDTH, 2), "bad": make()} if last else {"bad": make(), "good": nn.Linear(WIDTH, 2)}
    training = Training(EVERYTHING, heads, tokens=0)
    training.heads["bad"].train()
    parameters, state = training.parameters(), copy.deepcopy(training.weighter.state_dict())
    before = training.outputs()
    with pytest.raises(RuntimeError, match=f"task `bad` cannot be folded into its head: .*{why}.*Let the head begin"):
        training.weighter.fold_rotations()
    for task, old in parameters.items():
        assert all(torch.equal(old[key], value) for key, value in training.heads[task].state_dict().items())
    assert training.heads["bad"].training and not training.heads["good"].training
    assert_same(before, training.outputs(), 0.0)  # rotated as before: the hooks are back
    assert all(
        torch.equal(state["state"][key], value) for key, value in training.weighter.state_dict()["state"].items()
    )
    weights = training.weighter.weights
    training.weighter.backward({task: total(output) for task, output in training.outputs().items()})
    assert training.weighter.weights != weights


def test_a_head_with_more_arguments_is_folded_by_naming_its_linear():
    torch.manual_seed(0)
    trunk, mask = nn.Linear(4, WIDTH).double(), torch.tensor([1.0, 0.0, 1.0]).double()
    model = nn.ModuleDict({"a": Masked(), "b": Masked()}).double()
    x = torch.randn(3, 4).double()
    weighter = Weighter(EVERYTHING, ["a", "b"], heads=dict(model))
    z = trunk(x)
    weighter.backward({task: total(head(z, mask)) for task, head in model.items()})
    with torch.no_grad():
        before = {task: head(trunk(x), mask) for task, head in model.items()}
    with pytest.raises(RuntimeError, match=r"could not be run on a tensor of shape \[2, 5\] alone \(TypeError.*mask"):
        weighter.fold_rotations()
    weighter.fold_rotations(heads={"a": "a.inner", "b": "b.inner"}, model=model)
    with torch.no_grad():
        assert_same(before, {task: head(trunk(x), mask) for task, head in model.items()}, 1e-12)


def test_a_weight_with_two_users_is_not_folded():
    heads = {"a": nn.Linear(WIDTH, 2), "b": nn.Linear(WIDTH, 2)}
    heads["b"].weight = heads["a"].weight
    training = Training(EVERYTHING, heads, tokens=0)
    old = heads["a"].weight.clone()
    with pytest.raises(RuntimeError, match="used by another module too"):
        training.weighter.fold_rotations()
    assert torch.equal(heads["a"].weight, old)


def test_a_linear_of_two_heads_is_not_folded():
    first = nn.Linear(WIDTH, 4)
    training = Training(EVERYTHING, {task: nn.Sequential(first, nn.Linear(4, 2)) for task in "ab"}, tokens=0)
    old = first.weight.clone()
    with pytest.raises(RuntimeError, match="its first Linear is that of task `a` too"):
        training.weighter.fold_rotations()
    assert torch.equal(first.weight, old)


def test_a_weight_tied_to_the_trunk_is_seen_in_the_model():
    head, other = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 2)
    training = Training(EVERYTHING, {"a": head, "b": other}, tokens=0)
    model = nn.ModuleDict({"embedding": nn.Embedding(4, WIDTH), "a": head, "b": other})
    model["embedding"].weight = head.weight
    with pytest.raises(RuntimeError, match=r"task `a` cannot .* used by another module too"):
        training.weighter.fold_rotations(model=model)


@pytest.mark.parametrize("shape", [(0,), (4,), (1, WIDTH)], ids=["ZeRO-3", "FSDP1", "rows"])
def test_a_weight_in_pieces_is_not_folded(shape):
    training = Training(EVERYTHING, {"a": nn.Linear(WIDTH, 2), "b": nn.Linear(WIDTH, 2)}, tokens=0)
    training.heads["b"].weight.data = torch.zeros(shape, dtype=torch.float64)
    old = training.heads["a"].weight.clone()
    with pytest.raises(RuntimeError, match=r"has the shape .* a piece of \[2, 5\] \(FSDP1 and ZeRO-3"):
        training.weighter.fold_rotations()
    assert torch.equal(training.heads["a"].weight, old)


def test_after_folding_the_weighter_is_done():
    training = Training(EVERYTHING, good())
    weights = training.weighter.weights
    training.weighter.fold_rotations()
    done = "were folded into the heads, and this weighter is done"
    with pytest.raises(RuntimeError, match=done):
        training.weighter.rotations  # noqa: B018
    with pytest.raises(RuntimeError, match=done):
        training.weighter.fold_rotations()
    losses = {task: total(output) for task, output in training.outputs().items()}
    with pytest.raises(RuntimeError, match=done):
        training.weighter.backward(losses)
    with torch.no_grad():
        assert training.weighter.combine(losses) == sum(losses.values())
    assert training.weighter.weights == weights
    assert not any("rotations" in key for key in training.weighter.state_dict()["state"])


def test_a_new_weighter_trains_the_folded_model_on():
    training = Training(EVERYTHING, {"a": nn.Linear(WIDTH, 2), "b": nn.Linear(WIDTH, 2)}, tokens=0)
    before = training.outputs()
    training.weighter.fold_rotations()
    weighter = Weighter(RotoGrad(), ["a", "b"], heads=training.heads)
    again = training.outputs()
    assert_same(before, again, 1e-12)
    weighter.backward({task: total(output) for task, output in again.items()})
    assert not torch.equal(weighter.rotations["a"], torch.eye(WIDTH))


@pytest.mark.parametrize("method", [EVERYTHING, PART], ids=repr)
def test_saved_rotations_are_folded_without_any_forward(method):
    """As one does with full weights gathered from an engine that holds them in pieces."""
    training = Training(method, {task: head for task, head in good().items() if task != "pooled"}, tokens=0)
    file = io.BytesIO()
    torch.save(training.weighter.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        before = training.outputs()
    weights = training.parameters()
    training.weighter.detach()
    heads = {task: head.double() for task, head in good().items() if task != "pooled"}
    for task, head in heads.items():
        head.load_state_dict(weights[task])
    weighter = Weighter(method, list(heads), heads=heads)
    weighter.load_state_dict(torch.load(file, weights_only=True))
    weighter.fold_rotations()
    with torch.no_grad():
        assert_same(before, {task: head(training.trunk(training.x)) for task, head in heads.items()}, 1e-12)


def test_it_needs_rotations_and_heads():
    with pytest.raises(RuntimeError, match="has no rotations"):
        Weighter(GradNorm(), ["a"], heads={"a": nn.Linear(2, 2)}).fold_rotations()
    with pytest.raises(RuntimeError, match="known after the first forward"):
        Weighter(RotoGrad(), ["a"], heads={"a": nn.Linear(2, 2)}).fold_rotations()
    training = Training(EVERYTHING, {"a": nn.Linear(WIDTH, 2), "b": nn.Linear(WIDTH, 2)}, tokens=0, route="branch")
    with pytest.raises(ValueError, match="built without `heads`"):
        training.weighter.fold_rotations()
    with pytest.raises(ValueError, match=r"Missing: \['b'\]"):
        training.weighter.fold_rotations(heads={"a": training.heads["a"]})
    with pytest.raises(ValueError, match="looked up in `model`"):
        training.weighter.fold_rotations(heads={"a": "a", "b": "b"})
