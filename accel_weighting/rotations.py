"""Rotations of the shared representation: what a rotating method is, its matrices on the device, and folding.

Head k of a rotating method reads ``R_k z``. After training ``W (R z) = (W R) z``: a rotation disappears in the
nn.Linear that reads it, and the model runs and ships without this library. Which Linear that is, and that it alone
reads it, is seen by running the head on random numbers; until that is clear for all heads, none is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import measure
from .state import WeighterState
from .statistics import State
from .window import Layout


class RotatingMethod(Protocol):
    """What the weighter asks of a method that names ``"moments"`` among its needs.

    It keeps the rotations ``[K, m, m]``, tensors on the device, in its state as ``"rotations"``; the first m features
    of z are rotated.

    Attributes:
        dim: The dimension of z that holds the features.
        size: m; None: all features.
        cooperative: Whether it reads the products of gradients and features too, the last K of the moments.
    """

    @property
    def dim(self) -> int: ...  # noqa: D102

    @property
    def size(self) -> int | None: ...  # noqa: D102

    @property
    def cooperative(self) -> bool: ...  # noqa: D102

    def widen(self, state: State, width: int) -> State:
        """The state with rotations for a z of ``width`` features; called when that is known."""


class HasState(Protocol):
    """Returns the state of a weighter."""

    @property
    def settled(self) -> WeighterState: ...  # noqa: D102


class Rotations:
    """The rotations of one weighter where z is, in its precision, as wide as it is.

    Args:
        method: The rotating method.
        steps: Where the weighter's state is, with the last window taken in.
        layout: The wire format, which learns how many moments there are.
        repeats: Whether a pass leaves no trace, as a closure's second, which has the rotations of the one before.

    Attributes:
        shape: Of z in the last forward; None before the first.
        folded: Whether the rotations are in the heads now.
    """

    def __init__(self, method: RotatingMethod, steps: HasState, layout: Layout, repeats: Callable[[], bool]) -> None:
        self.dim, self.size, self.cooperative = method.dim, method.size, method.cooperative
        self.shape: tuple[int, ...] | None = None
        self.folded = False
        self._method, self._steps, self._layout, self._repeats = method, steps, layout, repeats

    @torch.inference_mode(False)  # what is kept from here must be of use in training
    def matrices(self, z: Tensor) -> Tensor:
        """``[K, m, m]`` where ``z`` is: float64 for a float64 model, else float32."""
        state = self._steps.settled
        if state.applied_rotations is not None and self._repeats():
            return state.applied_rotations
        R, width = state.rotations, z.shape[self.dim]
        if R is None or self.shape is None or self.shape[self.dim] != width:
            state.method_state = self._method.widen(state.method_state, width)
            R = state.rotations
            assert R is not None
            K = self._layout.tasks
            self._layout.moments = K * (K - 1) // 2 + (K if self.cooperative else 0), R.shape[-1]
        self.shape = tuple(z.shape)
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        if R.device != z.device or R.dtype != dtype:
            R = R.to(z.device, dtype)
            state.replace_rotations(R)
        return R

    def forget_width(self) -> None:
        """The state was loaded, and may hold rotations of another width."""
        self.shape = None

    def rotated(self, z: Tensor, R: Tensor) -> Tensor:
        """``R z`` along the features."""
        return rotated(z, R, self.dim)

    def cross_products(self, rows: measure.Rows, c: Tensor, z: Tensor | None) -> Tensor:
        """The moments of one join, ``[number, m, m]``; see ``measure.cross_products``."""
        assert self._layout.moments is not None
        return measure.cross_products(rows, c, self._layout.moments[1], self.dim, z)


def rotated(z: Tensor, R: Tensor, dim: int = -1) -> Tensor:
    """``R z``: the first m features, along ``dim``, turned by ``R``, ``[m, m]``."""
    m, x = len(R), z.movedim(dim, -1)
    turned = x[..., :m] @ R.to(z.dtype).T
    if m < x.shape[-1]:
        turned = torch.cat([turned, x[..., m:]], -1)
    return turned.movedim(-1, dim)


# ---- folding -----------------------------------------------------------------------------------------------------


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
    for task, linears in _all_readers(heads, rotations, dim, shape, models).items():
        for linear in linears:
            _multiply(linear, rotations[task])


@contextmanager
def folded(
    heads: Mapping[str, nn.Module],
    rotations: Mapping[str, Tensor],
    dim: int,
    shape: Sequence[int] | None,
    models: Sequence[nn.Module],
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """As ``fold``, until the end of the ``with``; then every weight is what it was, to the last bit.

    Yields:
        The weights, and what each of them is without its rotation (of a DTensor, this process's piece).
    """
    readers = _all_readers(heads, rotations, dim, shape, models)
    before = [(linear.weight, _local(linear.weight).detach().clone()) for of in readers.values() for linear in of]
    try:
        for task, linears in readers.items():
            for linear in linears:
                _multiply(linear, rotations[task])
        yield before
    finally:
        with torch.no_grad():
            for weight, value in before:
                _local(weight).copy_(value)


def _all_readers(
    heads: Mapping[str, nn.Module],
    rotations: Mapping[str, Tensor],
    dim: int,
    shape: Sequence[int] | None,
    models: Sequence[nn.Module],
) -> dict[str, list[nn.Linear]]:
    """The Linears that take the rotations, once it is sure that all of them can."""
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
                raise _cannot_be_folded(task, why)
            if (other := taken.setdefault(id(linear), task)) != task:
                raise _cannot_be_folded(task, f"its first Linear is that of task `{other}` too")
    return readers


def _readers(task: str, head: nn.Module, m: int, dim: int, shape: Sequence[int] | None) -> list[nn.Linear]:
    """The Linears that read the head's input, once it is sure that nothing else does.

    Rotating the head's input must be the same as rotating theirs, for a random input and a random rotation.
    """
    first = next((module for module in head.modules() if isinstance(module, nn.Linear)), None)
    if first is None:
        raise _cannot_be_folded(task, "there is no nn.Linear in it")
    width = first.in_features if shape is None else shape[dim]
    if isinstance(head, nn.Linear):
        if head.in_features != width:
            raise _cannot_be_folded(task, f"it reads {head.in_features} features, z has {width}")
        return [head]

    z, R = _random_input(width, m, dim, shape, first.weight)
    expected, obtained, calls = _run_twice(task, head, z, R, dim, width)
    found = {id(linear): linear for linear, x in calls if _is(x, calls[0][1]) and linear.in_features == width}
    if not found:
        raise _cannot_be_folded(task, f"no nn.Linear in it reads the {width} features of its input")
    if any(id(linear) in found and not _is(x, calls[0][1]) for linear, x in calls):
        raise _cannot_be_folded(task, "its first nn.Linear reads something else too")
    precision = max(torch.finfo(x.dtype).eps for x in [*(x for _, x in calls), *expected]) ** 0.5
    if not all(_close(a, b, precision) for a, b in zip(expected, obtained, strict=True)):
        raise _cannot_be_folded(task, "something else reads its input, or comes before its first nn.Linear")
    return list(found.values())


def _random_input(width: int, m: int, dim: int, shape: Sequence[int] | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A shared representation and a rotation, the same at every call, where ``weight`` is."""
    numbers = torch.Generator().manual_seed(0)
    random = torch.randn(m, m, generator=numbers, dtype=torch.float64)
    R = torch.linalg.qr(random)[0].to(weight.device)
    size = [2, width] if shape is None else list(shape)
    if len(size) > 1 and dim % len(size) != 0:
        size[0] = min(size[0], 2)
    return torch.randn(size, generator=numbers).to(weight.device, weight.dtype), R


def _run_twice(
    task: str, head: nn.Module, z: Tensor, R: Tensor, dim: int, width: int
) -> tuple[list[Tensor], list[Tensor], list[tuple[nn.Linear, Tensor]]]:
    """What a head makes of ``R z``, and of ``z`` where its first Linears turn their input; their calls in the second.

    Those of ``width`` features turn what they are given, if it is what the very first was given.
    """
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
        why = f"it could not be run on a tensor of shape {list(z.shape)} alone ({type(error).__name__}: {error})"
        raise _cannot_be_folded(task, why) from error
    return expected, obtained, calls


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
    W = _local(linear.weight)
    wide = torch.float32 if W.is_mps else torch.float64
    m = len(R)
    W[:, :m] = W[:, :m].to(wide) @ R.to(W.device, wide)


def _local(W: Any) -> Tensor:
    """This process's rows of a DTensor; any other tensor as it is."""
    local: Tensor = W.to_local() if hasattr(W, "to_local") else W
    return local


def _cannot_be_folded(task: str, why: str) -> RuntimeError:
    """A head that does not begin with a Linear."""
    return RuntimeError(
        f"The rotation of task `{task}` cannot be folded into its head: {why}. Nothing was changed in any head. Let "
        "the head begin with an nn.Linear that alone reads its input (or name that Linear in "
        "`fold_rotations(heads=...)`), or keep the weighter for inference."
    )


def no_rotations(method: str, rotations: Rotations | None) -> RuntimeError:
    """Rotations were asked for where there are none."""
    if rotations is None:
        return RuntimeError(f"{method} has no rotations.")
    if rotations.folded:
        return were_folded()
    return RuntimeError(
        "The rotations are as large as the shared representation, which is known after the first forward: run one "
        "forward before asking for them."
    )


def were_folded() -> RuntimeError:
    """The error for a weighter that is used after its rotations were folded."""
    return RuntimeError(
        "The rotations were folded into the heads, and this weighter is done. To train on, build a new one: its "
        "rotations begin at the identity, which leaves the folded model as it is."
    )
