"""What the tests of windows and faults share: a weighter on a small model, and this process's part of every batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251  which process this is
from torch import Tensor

from accel_weighting import GradNorm, Method, Weighter
from tests.ranks import accelerator_for
from tests.small import Net, batch, net, task_losses

GRADNORM = GradNorm(alpha=1.0, lr=0.05)
NAMES = ["t0", "t1", "t2"]
F64 = torch.float64


@dataclass
class Setup:
    """A weighter on a model, and this process's part of every global batch."""

    accelerator: Any
    model: Any
    inner: Net
    weighter: Weighter
    optimizer: Any

    def rows(self, step: int, part: int = 0, parts: int = 1, sizes: tuple[int, ...] | None = None) -> slice:
        """Rows of block `part` of this process, of `parts` that it has."""
        blocks = self.accelerator.num_processes * parts
        sizes = sizes or (36 // blocks,) * blocks
        block = self.accelerator.process_index * parts + part
        return slice(sum(sizes[:block]), sum(sizes[: block + 1]))

    def losses(self, step: int = 0, **which: Any) -> dict[str, Tensor]:
        x, y = batch(step, len(self.inner.heads), self.inner.embed.weight.dtype)
        rows = self.rows(step, **which)
        return task_losses(self.model(x[rows]), y[rows])

    def steps(self, start: int, stop: int) -> list[list[float]]:
        """Windows of two micro-batches of every process; the weights after each."""
        weights = []
        for step in range(start, stop):
            for part in range(2):
                with self.accelerator.accumulate(self.model):
                    self.weighter.backward(self.losses(step, part=part, parts=2))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            weights.append(list(self.weighter.weights.values()))
        return weights

    def step(self, step: int = 0, **arguments: Any) -> dict[str, float]:
        """One window of one micro-batch; the model stays as it is. The weights after it."""
        self.weighter.backward(self.losses(step), **arguments)
        self.model.zero_grad()
        return self.weighter.weights


def build(
    engine: Any = "ddp",
    names: list[str] = NAMES,
    method: Method = GRADNORM,
    wrap: bool = True,
    seed: int = 0,
    lr: float = 1e-3,
    dtype: torch.dtype = F64,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Setup:
    """`wrap=False`: the engine does not touch the model, so that processes may do different things with it."""
    fsdp = {"transformer_cls_names_to_wrap": ["Block"]} if engine.startswith("fsdp") else None
    accelerator = accelerator_for(engine, fsdp=fsdp, **kwargs)
    inner = net(names, seed=seed).to(dtype)
    model: Any = inner
    optimizer: Any = torch.optim.SGD(inner.parameters(), lr=lr)
    if wrap:
        model, optimizer = accelerator.prepare(inner, optimizer)
        inner = accelerator.unwrap_model(model)
    weighter = Weighter(method, names, accelerator=accelerator, heads=dict(inner.heads), **(options or {}))
    return Setup(accelerator, model, inner, weighter, optimizer)


def error_of(act: Callable[[], Any]) -> str:
    """The message of the error that `act` must end in."""
    try:
        act()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error was raised")


def table(message: str, of: str) -> dict[int, str]:
    """What an error says of each process, in its table `of`."""
    rows, lines = {}, message[message.index(f"{of}:\n") :].splitlines()[1:]
    for line in lines:
        if (found := re.fullmatch(r"  process(?:es)? ([\d, ]+): (.*)", line)) is None:
            break
        rows |= dict.fromkeys(map(int, found[1].split(", ")), found[2])
    return rows


def rank() -> int:
    return dist.get_rank()
