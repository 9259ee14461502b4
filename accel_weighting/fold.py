"""Folds the rotations of a trained model into its heads, which then run and ship without this library.

``W (R z) = (W R) z``: a rotation disappears in the nn.Linear that reads it. Which one that is, and that it alone reads
it, is seen by running the head on random numbers; until that is clear for all heads, none is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import checks
from .branch import rotated


def fold(
    heads: Mapping[str, nn.Module],
    rotations: Mapping[str, Tensor],
    dim: int,
    shape: Sequence[int] | None,
    models: Sequence[nn.Module],
) -> None:
    """Multiplies every rotation into the weight of the Linear that reads its head's input.

    Args:
        heads: ``{task: head}``, or the Linears themselves; without any hook of the weighter.
        rotations: ``{task: R}``, ``[m, m]`` each.
        dim: The dimension of the shared representation that is rotated.
        shape: Of the shared representation in the last forward; None: not known, taken for ``[batch, features]``.
        models: What the heads are part of: wrappers that hold parameters in pieces, and other users of a weight.

    Raises:
        RuntimeError: A head does not begin with a Linear that can take its rotation. Nothing was changed.
    """
    heads = {task: getattr(head, "_orig_mod", head) for task, head in heads.items()}
    units = _fsdp2_units([*models, *heads.values()], heads.values())
    readers = {}
    with _gathered(units):
        for task, head in heads.items():
            readers[task] = _readers(task, head, len(rotations[task]), dim, shape)
    owners = _owners([*models, *heads.values()])
    taken: dict[int, str] = {}
    for task, linears in readers.items():
        for linear in linears:
            if (why := _why_not(linear, owners)) is not None:
                raise checks.head_cannot_be_folded(task, why)
            if (other := taken.setdefault(id(linear), task)) != task:
                raise checks.head_cannot_be_folded(task, f"its first Linear is that of task `{other}` too")
    for task, linears in readers.items():
        for linear in linears:
            _multiply(linear, rotations[task])


def _readers(task: str, head: nn.Module, m: int, dim: int, shape: Sequence[int] | None) -> list[nn.Linear]:
    """The Linears that read the head's input, once it is sure that nothing else does.

    Rotating the head's input must be the same as rotating theirs, for a random input and a random rotation.
    """
    first = next((module for module in head.modules() if isinstance(module, nn.Linear)), None)
    if first is None:
        raise checks.head_cannot_be_folded(task, "there is no nn.Linear in it")
    width = first.in_features if shape is None else shape[dim]
    if isinstance(head, nn.Linear):
        if head.in_features != width:
            raise checks.head_cannot_be_folded(task, f"it reads {head.in_features} features, z has {width}")
        return [head]

    weight = first.weight
    numbers = torch.Generator().manual_seed(0)
    random = torch.randn(m, m, generator=numbers, dtype=torch.float64)
    R = torch.linalg.qr(random)[0].to(weight.device)
    size = [2, width] if shape is None else list(shape)
    if len(size) > 1 and dim % len(size) != 0:
        size[0] = min(size[0], 2)
    z = torch.randn(size, generator=numbers).to(weight.device, weight.dtype)
    calls: list[tuple[nn.Linear, Tensor]] = []

    def rotate_input(linear: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["input"]
        calls.append((linear, x))
        if not _is(x, calls[0][1]) or linear.in_features != width:
            return None
        turned = rotated(x, R)
        return ((turned, *args[1:]), kwargs) if args else (args, {**kwargs, "input": turned})

    try:
        expected = _run(head, rotated(z, R, dim))
        with ExitStack() as hooks:
            for module in head.modules():
                if isinstance(module, nn.Linear):
                    hooks.callback(
                        module.register_forward_pre_hook(rotate_input, prepend=True, with_kwargs=True).remove
                    )
            obtained = _run(head, z)
    except Exception as error:
        why = f"it could not be run on a tensor of shape {size} alone ({type(error).__name__}: {error})"
        raise checks.head_cannot_be_folded(task, why) from error
    found = {id(linear): linear for linear, x in calls if _is(x, calls[0][1]) and linear.in_features == width}
    if not found:
        raise checks.head_cannot_be_folded(task, f"no nn.Linear in it reads the {width} features of its input")
    if any(id(linear) in found and not _is(x, calls[0][1]) for linear, x in calls):
        raise checks.head_cannot_be_folded(task, "its first nn.Linear reads something else too")
    precision = max(torch.finfo(x.dtype).eps for x in [*(x for _, x in calls), *expected]) ** 0.5
    if not all(_close(a, b, precision) for a, b in zip(expected, obtained, strict=True)):
        raise checks.head_cannot_be_folded(task, "something else reads its input, or comes before its first nn.Linear")
    return list(found.values())


def _is(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr())


def _close(a: Tensor, b: Tensor, precision: float) -> bool:
    return bool((a - b).abs().max() <= precision * a.abs().max()) if a.numel() else True


@torch.no_grad()
def _run(head: nn.Module, z: Tensor) -> list[Tensor]:
    """The floating-point tensors that the head makes of ``z`` in evaluation mode."""
    modes = {module: module.training for module in head.modules()}
    head.eval()
    try:
        with torch.autocast(z.device.type, enabled=False):
            output = head(z)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _fsdp2_units(models: Iterable[nn.Module], heads: Iterable[nn.Module]) -> list[Any]:
    """What FSDP2 gathers as one and holds parameters of the heads, outermost first."""
    inside = {id(module) for head in heads for module in head.modules()}
    units = {
        id(module): module
        for model in models
        for module in model.modules()
        if hasattr(module, "unshard") and hasattr(module, "reshard")
        if any(id(part) in inside for part in module.modules())
    }
    return list(units.values())


@contextmanager
def _gathered(units: Sequence[Any]) -> Iterator[None]:
    """Parameters whole inside, in pieces after: also those that the last forward left whole."""
    try:
        for unit in units:
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.reshard()


def _owners(models: Iterable[nn.Module]) -> dict[int, set[int]]:
    """Which modules hold a parameter."""
    owners: dict[int, set[int]] = {}
    for model in models:
        for module in model.modules():
            for parameter in module._parameters.values():
                owners.setdefault(id(parameter), set()).add(id(module))
    return owners


def _why_not(linear: nn.Linear, owners: Mapping[int, set[int]]) -> str | None:
    """Why the weight cannot be multiplied from the right, or None."""
    weight = linear._parameters.get("weight")
    if weight is None:
        return "the weight of its first Linear is computed from others (a parametrisation: remove it first)"
    if len(owners[id(weight)]) > 1:
        return "the weight of its first Linear is used by another module too"
    if not weight.is_floating_point():
        return f"the weight of its first Linear is quantised ({weight.dtype})"
    if weight.shape != (linear.out_features, linear.in_features):
        return (
            f"the weight of its first Linear has the shape {list(weight.shape)} here, a piece of "
            f"[{linear.out_features}, {linear.in_features}] (FSDP1 and ZeRO-3 cut weights anywhere). Load the saved "
            "full weights into a model in one process, and the weighter's state beside it, and fold there"
        )
    if any(placement.is_shard(1) for placement in getattr(weight, "placements", ())):
        return "the columns of its first Linear's weight are divided over processes (tensor parallelism)"
    return None


@torch.no_grad()
def _multiply(linear: nn.Linear, R: Tensor) -> None:
    """``W[:, :m] ← W[:, :m] R``; a DTensor's rows are divided, and every process multiplies its own."""
    W: Any = linear.weight
    W = W.to_local() if hasattr(W, "to_local") else W
    wide = torch.float32 if W.device.type == "mps" else torch.float64
    m = len(R)
    W[:, :m] = W[:, :m].to(wide) @ R.to(W.device, wide)
