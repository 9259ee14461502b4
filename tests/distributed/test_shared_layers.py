"""Gradients at a shared layer's weight, and norms that do not wait, on real processes: any cut of the global batch.

Every statistic is held against one process on the whole batch, by autograd alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accel_weighting import IMTLG, GradNorm, Weighter
from tests.ranks import accelerator_for, run_ranks

ROWS, STEPS = 12, 2
TASKS = ["a", "b", "c"]
KINDS = ["conv1d", "conv2d", "conv2d, grouped, reflect", "Conv1D", "two towers"]


class Shared(nn.Module):
    """The shared layer, in a unit of its own under FSDP."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "conv1d":
            self.layer: nn.Module = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        elif kind == "conv2d":
            self.layer = nn.Conv2d(4, 6, 3, padding="same")
        elif kind == "conv2d, grouped, reflect":
            self.layer = nn.Conv2d(4, 6, 3, dilation=2, padding=2, padding_mode="reflect", groups=2)
        elif kind == "Conv1D":
            from transformers.pytorch_utils import Conv1D

            self.layer = Conv1D(6, 4)
            nn.init.normal_(self.layer.weight)
        else:
            self.layer = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.kind == "two towers":
            return self.layer(x), self.layer(input=2 * x.flip(-2))
        return (self.layer(x),)


class Model(nn.Module):
    """What the heads read: the shared layer's outputs, features last or first."""

    _no_split_modules = ("Embed", "Shared")

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.shared = Embed(), Shared(kind)
        self.heads = nn.ModuleDict({task: Head(kind) for task in TASKS})
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        zs = self.shared(self.embed(x))
        return {task: head(*zs) for task, head in self.heads.items()}


class Embed(nn.Module):
    """A trunk that mixes no samples."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = torch.tanh(self.scale(x.flatten(1).mean(1, keepdim=True)))
        return x + means.reshape(-1, *[1] * (x.ndim - 1))


class Head(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = kind.startswith("conv")  # features are in dimension 1
        self.inner = nn.Linear(6, 2)

    def forward(self, *zs: Tensor) -> Tensor:
        product = torch.stack(list(zs)).prod(0)
        return self.inner(torch.sin(product.movedim(1, -1) if self.first else product)).flatten(1).mean(1)


def batch(kind: str, step: int) -> Tensor:
    shape = {"conv1d": (4, 9), "Conv1D": (5, 4), "two towers": (3, 4)}.get(kind, (4, 6, 5))
    return torch.randn(ROWS, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def losses_of(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: 10**k * (output - k - 1).square().mean() for k, (task, output) in enumerate(outputs.items())}


def by_hand(kind: str) -> list[Tensor]:
    """The Gram matrix at the shared layer's weight at every step, of the whole batch, by autograd."""
    model, grams = Model(kind), []
    for step in range(STEPS):
        losses = losses_of(model(batch(kind, step))).values()
        weight = model.shared.layer.weight
        G = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten() for loss in losses])
        grams.append(G @ G.T)
    return grams


def measured(engine: Any, kind: str, micro: int, **options: Any) -> list[Any]:
    """What the weighter saw at every step; the parameters stay."""
    accelerator = accelerator_for(
        engine,
        gradient_accumulation_steps=micro,
        **({"fsdp": {"transformer_cls_names_to_wrap": ["Shared"]}} if engine == "fsdp2" else {}),
    )
    model = Model(kind)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    inner = accelerator.unwrap_model(model)
    weighter = Weighter(accelerator=accelerator, tasks=TASKS, heads=dict(inner.heads), model=model, **options)
    world, rank = accelerator.num_processes, accelerator.process_index
    seen = []
    for step in range(STEPS):
        blocks = batch(kind, step).chunk(world * micro)
        for x in blocks[rank * micro : (rank + 1) * micro]:
            with accelerator.accumulate(model):
                weighter.backward(losses_of(model(x)))
                optimizer.step()
                optimizer.zero_grad()
        seen.append((torch.from_numpy(weighter.statistics.norms), weighter.statistics.gram))
    weighter.detach()
    return seen


def layers(engine: Any, micro: int) -> dict[str, list[Tensor]]:
    return {
        kind: [
            torch.from_numpy(gram)
            for _, gram in measured(engine, kind, micro, method=IMTLG(), shared_layer="shared.layer")
        ]
        for kind in KINDS
    }


def taps(engine: Any, micro: int) -> list[list[tuple[Tensor, Any]]]:
    """Norms at z with and without waiting."""
    method = GradNorm()
    return [measured(engine, "conv2d", micro, method=method, cosines=cosines) for cosines in (False, True)]


CUTS = [("plain", 1, 1), ("plain", 1, 3), ("ddp", 1, 1), ("ddp", 2, 1), ("ddp", 2, 3), ("fsdp2", 1, 1), ("fsdp2", 2, 3)]


@pytest.mark.parametrize(("engine", "world", "micro"), CUTS)
def test_gradients_at_a_shared_layers_weight(engine: str, world: int, micro: int, tmp_path: Path) -> None:
    for found in run_ranks(layers, world, tmp_path, engine, micro, timeout=120):
        for kind in KINDS:
            for gram, expected in zip(found[kind], by_hand(kind), strict=True):
                torch.testing.assert_close(
                    gram, expected.detach(), rtol=1e-12, atol=1e-14, msg=lambda m, k=kind: f"{k}: {m}"
                )


@pytest.mark.parametrize(("engine", "world", "micro"), CUTS)
def test_norms_that_do_not_wait(engine: str, world: int, micro: int, tmp_path: Path) -> None:
    for tapped, joined in run_ranks(taps, world, tmp_path, engine, micro, timeout=120):
        for (norms, nothing), (expected, gram) in zip(tapped, joined, strict=True):
            torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0)
            assert nothing is None and gram is not None
