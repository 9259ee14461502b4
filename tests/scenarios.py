"""One training run, cut in every way: the same global batches for any engine, number of processes and micro-batches.

A `Cell` says what is trained and how each global batch is divided into blocks (micro-batches of processes); `train`
runs it on the processes that are there and gives back what every step saw. Cells with the same blocks, or with any
equal blocks, must give the same statistics and weights wherever they run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251  counts the collectives
from torch import Tensor, nn

from accel_weighting import Method, Weighter
from tests import small
from tests.ranks import accelerator_for
from tests.small import ROWS, Net, batch, names, task_losses, tensor


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        method: None: no weighter at all, and the plain sum of the losses: the control.
        route: How the shared representation is found: "heads" (modules), "names" (dotted), "branch" (called in the
            forward), "shared_layer" (heads, and gradients at the shared Linear's weight).
        sizes: Rows of every block of a step, over all processes; None: equal blocks.
        counts: Whether the blocks come with their numbers of rows.
        absent: Which tasks are not in which block: `(step, block, task)`, or `(None, block, task)` for every step.
        absence: "zero": said by a count of 0. "leave": left out of the losses.
        early: Whether the weighter is built before `prepare`.
        fsdp_heads: Whether the heads are FSDP units of their own.
        options: Of the weighter.
        setup: Options of `accelerator_for`, for example `mixed_precision`.
        checkpoint: Activation checkpointing: "trunk" (the blocks), "join" (also all from `shared` to the heads), either
            followed by " reentrant" for torch's older kind, or "".
        size: A factor on all losses.
        overflow: Scripted infinities: `(step, block, where)`, where "loss" (the last task's), "tap" (the last task's
            gradient at the shared representation) or "parameters" (gradients of the embedding alone).
        interleaved: Whether neighbouring blocks go to different processes in the same micro-batch, so that a
            micro-batch of all processes together is one of a single process.
        short: How many micro-batches a step has whose window a DataLoader ends early, by step.
    """

    method: Method | None
    tasks: int = 3
    micro: int = 1
    route: str = "heads"
    steps: int = 6
    dtype: torch.dtype = torch.float64
    lr: float = 1e-3  # small enough for the model itself not to be chaotic
    sizes: tuple[int, ...] | None = None
    counts: bool = False
    absent: tuple[tuple[int | None, int, str], ...] = ()
    absence: str = "zero"
    early: bool = False
    fsdp_heads: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    setup: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    size: float = 1.0
    overflow: tuple[tuple[int, int, str], ...] = ()
    interleaved: bool = False
    short: dict[int, int] = field(default_factory=dict)


@dataclass
class Run:
    """What a run saw: one entry per optimizer step, the same on every process, and the parameters at the end."""

    world: int
    distributed_type: str
    losses: list[Tensor]
    present: list[Tensor]
    norms: list[Tensor | None]
    gram: list[Tensor | None]
    weights: list[Tensor]
    micro_batches: list[int]
    statistics_steps: set[int]
    collectives: int
    parameters: dict[str, Tensor]
    state: dict[str, Tensor]
    skipped: list[bool] = field(default_factory=list)


def net(cell: Cell) -> Net:
    return small.net(names(cell.tasks), cell.checkpoint).to(cell.dtype)  # drawn in one precision: all runs start alike


def weighter_for(cell: Cell, model: nn.Module, inner: Net, accelerator: Any) -> Weighter:
    assert cell.method is not None
    routes: dict[str, dict[str, Any]] = {
        "heads": {"heads": dict(inner.heads)},
        "names": {"heads": {task: f"heads.{task}" for task in inner.heads}, "model": model},
        "branch": {},
        "shared_layer": {"heads": dict(inner.heads), "shared_layer": "shared", "model": model},
    }
    weighter = Weighter(cell.method, names(cell.tasks), accelerator=accelerator, **routes[cell.route], **cell.options)
    if cell.route == "branch":
        inner.branch = weighter.branch
    return weighter


def cut(cell: Cell, blocks: int) -> list[slice]:
    """Rows of every block of a global batch."""
    sizes = cell.sizes or (ROWS // blocks,) * blocks
    assert len(sizes) == blocks and sum(sizes) == ROWS
    starts = [sum(sizes[:i]) for i in range(blocks)]
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def setup(engine: str, cell: Cell) -> Any:
    """The accelerator of a cell."""
    options = {"gradient_accumulation_steps": cell.micro, **cell.setup}
    if engine in ("fsdp1", "fsdp2", "hsdp"):
        units = ["Block", "Head"] if cell.fsdp_heads else ["Block"]
        options["fsdp"] = {"transformer_cls_names_to_wrap": units, **options.get("fsdp", {})}
    return accelerator_for(engine, **options)  # type: ignore[arg-type]


def train(engine: str, cell: Cell) -> Run:
    """Runs a cell on the processes that are there; this process takes its share of every step's blocks."""
    from accelerate.data_loader import DataLoaderShard

    accelerator = setup(engine, cell)
    world, rank = accelerator.num_processes, accelerator.process_index
    inner = net(cell)
    optimizer = torch.optim.SGD(inner.parameters(), lr=cell.lr)
    model: Any = inner
    weighter = None
    if cell.early:
        weighter = weighter_for(cell, inner, inner, accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)
    inner = accelerator.unwrap_model(model, keep_torch_compile=False)
    if cell.method is not None and not cell.early:
        weighter = weighter_for(cell, model, inner, accelerator)
    run = Run(world, accelerator.distributed_type.value, [], [], [], [], [], [], set(), 0, {}, {})
    count = CountCollectives()
    for step in range(cell.steps):
        micro = cell.short.get(step, cell.micro)
        slices = cut(cell, world * micro)
        mine: Any = range(rank, len(slices), world) if cell.interleaved else range(rank * micro, (rank + 1) * micro)
        if step in cell.short:
            mine = DataLoaderShard(mine, batch_size=None)  # which tells Accelerate of its end
        x, y = batch(step, cell.tasks, cell.dtype)
        if engine.startswith("zero"):  # the one engine that leaves the inputs as they are
            x = x.to(inner.embed.weight.dtype)
        for b in mine:
            gone = {task for s, block, task in cell.absent if s in (None, step) and block == b}
            places = {where for s, block, where in cell.overflow if (s, block) == (step, b)}
            inner.overflows = "parameters" in places
            inner.heads[names(cell.tasks)[-1]].overflows = "tap" in places
            rows = slices[b]
            with accelerator.accumulate(model):
                losses = task_losses(model(x[rows]), y[rows])
                losses = {task: cell.size * loss for task, loss in losses.items()} if cell.size != 1 else losses
                if "loss" in places:
                    losses[names(cell.tasks)[-1]] = losses[names(cell.tasks)[-1]] * torch.inf
                items: dict[str, int] | int | None = (rows.stop - rows.start) if cell.counts else None
                if gone and cell.absence == "zero":
                    items = {**(dict.fromkeys(losses, items) if cell.counts else {}), **dict.fromkeys(gone, 0)}
                elif gone:
                    losses = {task: loss for task, loss in losses.items() if task not in gone}
                # Of a short window too Accelerate divides the gradient by the full accumulation. The user's remedy is
                # a factor on the total, which the statistics must not feel.
                remedy = cell.micro / micro
                if weighter is None:
                    accelerator.backward(torch.stack(list(losses.values())).sum() * remedy)
                elif step in cell.short:
                    with count:
                        accelerator.backward(weighter.combine(losses, num_items=items) * remedy)
                        weighter.step()
                else:
                    with count:
                        weighter.backward(losses, num_items=items)
                optimizer.step()
                optimizer.zero_grad()
        run.skipped.append(accelerator.optimizer_step_was_skipped)
        if weighter is None:
            continue
        statistics = weighter.statistics
        run.weights.append(torch.tensor(list(weighter.weights.values()), dtype=torch.float64))
        if statistics is None:
            continue
        run.statistics_steps.add(statistics.step)
        for name in ("losses", "present", "norms", "gram"):
            getattr(run, name).append(tensor(getattr(statistics, name)))
        run.micro_batches.append(statistics.micro_batches)
    run.collectives = count.calls
    run.parameters = full_parameters(accelerator.unwrap_model(model, keep_torch_compile=False), model)
    if weighter is not None:
        run.state = weighter.state_dict()["state"]
        weighter.detach()
    return run


def full_parameters(inner: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """All parameters whole, whatever an engine made of them, under the names that the model gave them."""
    from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: TID251  gathers its own shards

    whole: Any = contextlib.nullcontext()
    model = getattr(model, "_orig_mod", model)  # compiled
    if isinstance(model, FullyShardedDataParallel):
        whole = FullyShardedDataParallel.summon_full_params(model, writeback=False)
    elif any(hasattr(p, "ds_id") for p in inner.parameters()):
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(list(inner.parameters()))
    with whole:
        full = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in inner.named_parameters()}
        return {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in full.items()}


def train_all(engine: str, cells: Sequence[Cell]) -> list[Run]:
    """Many cells in one launch."""
    return [train(engine, cell) for cell in cells]


class CountCollectives:
    """Counts every all-reduce that Python asks for (engines reduce gradients from C++) while it is entered."""

    def __init__(self) -> None:
        self.calls = 0
        self._original = dist.all_reduce

    def __enter__(self) -> None:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self._original(*args, **kwargs)

        dist.all_reduce = counted

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._original


def difference(a: Run, b: Run, fields: Sequence[str] = ("losses", "norms", "gram", "weights")) -> float:
    """Largest relative difference of two runs over all steps; relative to the largest entry of a step's tensor."""
    worst = 0.0
    for name in fields:
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert (x is None) == (y is None), f"{name} is known in one run only"
            if x is not None:
                worst = max(worst, ((x - y).abs().max() / y.abs().max().clamp(min=1e-300)).item())
    return worst


def assert_ranks_agree(runs: Sequence[Run]) -> None:
    """Bitwise, not nearly."""
    first = runs[0]
    for run in runs[1:]:
        for name in ("losses", "present", "norms", "gram", "weights"):
            for x, y in zip(getattr(first, name), getattr(run, name), strict=True):
                assert x is y is None or torch.equal(x, y), f"{name} differ between processes"
        assert all(torch.equal(first.state[key], run.state[key]) for key in first.state)
