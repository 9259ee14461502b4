"""Shapes of model: what heads share, and how they are called with it.

A shape is a trunk that gives named tensors, heads, and how each head is called. `largest_error` trains it with a
weighter and compares statistics and every gradient with backwards by hand from the shared tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from accel_weighting import Method, Weighter
from tests.ranks import accelerator_for


class Trunk(nn.Module):
    """Two tensors of different sizes, the second deeper than the first."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6, dtype=dtype), nn.Linear(6, 8, dtype=dtype)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        skip = torch.tanh(self.first(x))
        return {"z": torch.tanh(self.second(skip)), "skip": skip}


class One(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.out = nn.Linear(8, 2, dtype=dtype)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(z)


class Two(nn.Module):
    """Reads both tensors, as a decoder with a skip does."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.skip = nn.Linear(8, 3), nn.Linear(6, 3)

    def forward(self, z: Tensor, skip: Tensor) -> Tensor:
        return torch.tanh(self.z(z)) * self.skip(skip)


class Pyramid(Two):
    def forward(self, levels: Any) -> Tensor:  # type: ignore[override]
        z, skip = levels.values() if isinstance(levels, dict) else levels
        return super().forward(z, skip)


@dataclass
class Levels:
    z: Tensor
    skip: Tensor
    name: str = "levels"


class OfDataclass(Two):
    def forward(self, levels: Levels) -> Tensor:  # type: ignore[override]
        return super().forward(levels.z, levels.skip)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attend(query, key, value)[0]


class Decoder(nn.Module):
    """Reads looked-up queries, which are not shared, and the encoder's states."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        return self.attend(tokens, memory, memory)[0]


@dataclass
class Shape:
    heads: Callable[[], dict[str, nn.Module]]
    call: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    reads: tuple[str, ...] = ("z", "skip")
    argument: str | None = None
    own: bool = False  # whether the heads read queries of their own too
    dtype: torch.dtype = torch.float64
    routes: tuple[str, ...] = ("heads", "branch")


QUERIES = torch.linspace(-1, 1, 2 * 5 * 8, dtype=torch.float64).view(2, 5, 8)

SHAPES = {
    "a skip connection": Shape(lambda: {"a": Two(), "b": Two()}, lambda head, s: head(s["z"], s["skip"])),
    "by keywords": Shape(lambda: {"a": Two(), "b": Two()}, lambda head, s: head(skip=s["skip"], z=s["z"])),
    "one head reads the skip": Shape(
        lambda: {"a": One(), "b": Two()},
        lambda head, s: head(s["z"], s["skip"]) if isinstance(head, Two) else head(s["z"]),
        routes=("branch",),
    ),
    "a list": Shape(lambda: {"a": Pyramid(), "b": Pyramid()}, lambda head, s: head([s["z"], s["skip"]])),
    "a dictionary": Shape(lambda: {"a": Pyramid(), "b": Pyramid()}, lambda head, s: head(dict(s))),
    "a dataclass": Shape(lambda: {"a": OfDataclass(), "b": OfDataclass()}, lambda head, s: head(Levels(**s))),
    "attention to itself": Shape(
        lambda: {"a": Attention(), "b": One()},
        lambda head, s: head(s["z"], s["z"], s["z"]) if isinstance(head, Attention) else head(s["z"]),
        reads=("z",),
    ),
    "an encoder and decoders": Shape(
        lambda: {"a": Decoder(), "b": Decoder()},
        lambda head, s: head(s["tokens"], memory=s["z"]),
        reads=("z",),
        argument="memory",
        own=True,
        routes=("heads",),
    ),
    "complex": Shape(
        lambda: {"a": One(torch.complex128), "b": One(torch.complex128)},
        lambda head, s: head(s["z"]),
        reads=("z",),
        dtype=torch.complex128,
    ),
}


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.trunk = shape, Trunk(shape.dtype)
        self.heads = nn.ModuleDict(shape.heads())
        self.tokens = nn.Embedding(5, 8) if shape.own else None
        self.branch: Callable[[Any], dict[str, Any]] | None = None
        if shape.dtype == torch.float64:
            self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.top(self.trunk(x))

    def top(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = {name: shared[name] for name in self.shape.reads}
        own = dict.fromkeys(self.heads, whole) if self.branch is None else self.branch(whole)
        rest = {}
        if self.tokens is not None:
            rest["tokens"] = self.tokens(torch.arange(5)).expand(2, 5, 8)
        return {task: self.shape.call(head, {**own[task], **rest}) for task, head in self.heads.items()}


def losses_of(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: (y.abs().square() if y.is_complex() else (y - 0.3).square()).mean() for task, y in outputs.items()}


@dataclass
class ByHand:
    """What backwards by hand from the shared tensors give."""

    gram: Tensor
    gradients: list[list[Tensor]]
    losses: dict[str, Tensor]
    shared: dict[str, Tensor]
    heads: dict[str, list[Tensor]] = field(default_factory=dict)


def by_hand(model: Model, x: Tensor) -> ByHand:
    shared = {name: t for name, t in model.trunk(x).items() if name in model.shape.reads}
    leaves = {name: t.detach().requires_grad_() for name, t in shared.items()}
    losses = losses_of(model.top(leaves))
    gradients = []
    for loss in losses.values():
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        gradients.append([torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves.values(), strict=True)])
    flat = [
        torch.cat([torch.view_as_real(g).flatten() if g.is_complex() else g.flatten() for g in gs]) for gs in gradients
    ]
    V = torch.stack(flat)
    return ByHand(V @ V.T, gradients, losses, shared)


def largest_error(name: str, route: str, method: Method, lag: int = 1, engine: str | None = None) -> float:
    """The largest relative difference of Gram matrix and parameters' gradients in three steps."""
    shape, worst = SHAPES[name], 0.0
    torch.manual_seed(0)
    net = Model(shape)
    twin = copy.deepcopy(net)
    accelerator = None if engine is None else accelerator_for(engine)  # type: ignore[arg-type]
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    model = net if accelerator is None else accelerator.prepare(net, optimizer)[0]
    heads: Any = None
    if route == "heads":
        heads = {t: (f"heads.{t}", shape.argument) if shape.argument else f"heads.{t}" for t in "ab"}
    weighter = Weighter(
        method, ["a", "b"], heads=heads, model=model if heads else None, lag=lag, accelerator=accelerator
    )
    net.branch = weighter.branch if route == "branch" else None
    for step in range(3):
        torch.manual_seed(step)
        xs = torch.randn(world, 2, 5, 4).to(shape.dtype)
        for p in [*model.parameters(), *twin.parameters()]:
            p.grad = None
        before = weighter.weights
        weighter.backward(losses_of(model(xs[rank])))
        seen = weighter.statistics
        assert seen is not None and seen.gram is not None
        weights = before if lag else weighter.weights
        w = [weights[t] for t in "ab"]
        on_shared = method.acts_on == "shared"
        blocks = [by_hand(twin, x) for x in xs]
        for block in blocks:
            losses = enumerate(block.losses.values())
            sum(loss * (1.0 if on_shared else w[k]) / world for k, loss in losses).backward()  # type: ignore[union-attr]
            for i, tensor in enumerate(block.shared.values()):
                tensor.backward(sum(w[k] * block.gradients[k][i] / world for k in range(2)), retain_graph=True)
        gram = sum(block.gram for block in blocks) / world**2
        worst = max(worst, _error(torch.from_numpy(seen.gram), gram))  # type: ignore[arg-type]
        for (at, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            mine: Any = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            assert (mine is None) == (q.grad is None), at
            if q.grad is not None:
                worst = max(worst, _error(mine, q.grad))
    return worst


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
