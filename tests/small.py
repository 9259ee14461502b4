"""The small model of the tests: its data, its statistics by hand, a weighter on it, and a stand-in for an accelerator.

`net()` is a shared trunk with one head per task, the same at every call. `gradients_by_hand` and the assertions compare
a weighter on it with backwards of their own. Whole runs of it under engines and on several processes: `scenarios.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from accel_weighting import GradNorm, Method, Weighter

ROWS = 36  # of a global batch: divides into 1, 2, 3, 4, 6, 9 equal blocks
WIDTH = 5  # of the shared representation
TASKS = ["depth", "seg"]
GRADNORM = GradNorm(alpha=1.0)
EXACT = {"rtol": 1e-13, "atol": 1e-16}

# ---- arrays and tensors ---------------------------------------------------------------------------------------------


def tensor(x: Any) -> Any:
    """Arrays as tensors; anything else as it is."""
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def assert_close(actual: Any, expected: Any, **tolerances: Any) -> None:
    """`torch.testing.assert_close` for arrays too: statistics and weights are arrays, gradients by hand are tensors."""
    torch.testing.assert_close(tensor(actual), tensor(expected), **tolerances)


# ---- the model and its data ------------------------------------------------------------------------------------------


class Overflow(torch.autograd.Function):
    """Nothing forward, an infinite gradient backward: an overflow of the half-precision gradient at this place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.full_like(g, torch.inf)


class Block(nn.Module):
    """A residual block; a unit of its own under FSDP."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 4), nn.Linear(4, 1)
        self.overflows = False

    def forward(self, z: Tensor) -> Tensor:
        if self.overflows:
            z = Overflow.apply(z)
        return self.outer(torch.tanh(self.inner(z))).squeeze(-1)


class Net(nn.Module):
    """A shared trunk, whose last layer is `shared`, and one head per task; `checkpoint` as in `Cell`."""

    def __init__(self, tasks: Sequence[str], checkpoint: str = "") -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.shared = nn.Linear(8, WIDTH)
        self.heads = nn.ModuleDict({task: Head() for task in tasks})
        self.branch: Callable[[Tensor], dict[str, Tensor]] | None = None
        self.checkpoint = checkpoint
        self.overflows = False

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.embed(x)
        if self.overflows:
            x = Overflow.apply(x)
        for block in self.blocks:
            x = self.run(block, x) if self.checkpoint else block(x)
        outputs = self.run(self.top, x) if self.checkpoint.startswith("join") else self.top(x)
        return dict(zip(self.heads, outputs, strict=True))

    def top(self, x: Tensor) -> tuple[Tensor, ...]:
        """From the trunk's last layer to the heads' outputs: the join is in here."""
        z = self.shared(x)
        zs = dict.fromkeys(self.heads, z) if self.branch is None else self.branch(z)
        return tuple(head(zs[task]) for task, head in self.heads.items())

    def run(self, part: Callable[[Tensor], Any], x: Tensor) -> Any:
        """Recomputed in the backward."""
        return checkpoint(part, x, use_reentrant=self.checkpoint.endswith("reentrant"))


def net(tasks: Sequence[str] = TASKS, checkpoint: str = "", seed: int = 0) -> Net:
    """In float64, the same at every call."""
    torch.manual_seed(seed)
    return Net(tasks, checkpoint).double()


def names(tasks: int) -> list[str]:
    return [f"t{k}" for k in range(tasks)]


def batch(step: int, tasks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The global batch of a step: inputs and every task's targets."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(ROWS, tasks, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def task_losses(outputs: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    """Positive losses of very different sizes."""
    return {
        task: (10.0 ** (k % 3)) * (output - y[:, k]).square().mean() for k, (task, output) in enumerate(outputs.items())
    }


def losses_of(model: Callable[[Tensor], dict[str, Tensor]], step: int = 0, tasks: int = 2) -> dict[str, Tensor]:
    x, y = batch(step, tasks, torch.float64)
    return task_losses(model(x), y)


# ---- statistics by hand ----------------------------------------------------------------------------------------------


def representation(model: Net, x: Tensor) -> Tensor:
    x = model.embed(x)
    for block in model.blocks:
        x = block(x)
    return model.shared(x)


def apply_heads(heads: nn.ModuleDict, z: Tensor) -> dict[str, Tensor]:
    return {task: head(z) for task, head in heads.items()}


def gradients_by_hand(model: Net, step: int = 0, rows: slice = slice(None)) -> Tensor:
    """Every task's gradient at the shared representation of those rows of the global batch, `[K, rows * width]`."""
    x, y = batch(step, len(model.heads), torch.float64)
    z = representation(model, x[rows]).detach().requires_grad_()
    losses = task_losses(apply_heads(model.heads, z), y[rows])
    return torch.stack([torch.autograd.grad(loss, z)[0].flatten() for loss in losses.values()])


def assert_statistics_by_hand(weighter: Weighter, model: Net, step: int = 0) -> None:
    """Against K backwards of their own; the model must still be as it was in the window."""
    G = gradients_by_hand(model, step)
    assert_close(weighter.statistics.gram, G @ G.T, **EXACT)
    assert_close(weighter.statistics.norms, G.norm(dim=1), **EXACT)
    assert_close(weighter.statistics.losses, torch.stack(list(losses_of(model, step).values())).detach(), **EXACT)


def assert_gradients_by_hand(model: Net, weights: Mapping[str, float], step: int = 0) -> None:
    """The parameters' gradients are those of the weighted sum of the losses."""
    twin = net()
    twin.load_state_dict(model.state_dict())
    sum(weights[task] * loss for task, loss in losses_of(twin, step).items()).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **EXACT)


# ---- a weighter in one process ---------------------------------------------------------------------------------------


def weighter_and_model(method: Method = GRADNORM, **options: Any) -> tuple[Weighter, Net]:
    model = net()
    return Weighter(method, TASKS, heads=dict(model.heads), **options), model


def fake_accelerator(sync: bool = True, **changes: Any) -> Any:
    """What the weighter asks of an accelerator in one process; the test says when gradients are synchronised."""
    given = {
        "distributed_type": SimpleNamespace(value="NO"),
        "num_processes": 1,
        "even_batches": True,
        "gradient_state": SimpleNamespace(active_dataloader=None),
        "sync_gradients": sync,
        "scaler": None,
        "mixed_precision": "no",
        "_models": [],
        "register_for_checkpointing": lambda weighter: None,
        "backward": lambda total, **kwargs: total.backward(**kwargs),
    }
    return SimpleNamespace(**given | changes)


def most_bytes(profiler: Any) -> int:
    """The most bytes that were held at once during a profile of memory."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))
