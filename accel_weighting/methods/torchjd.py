"""Every weighting of TorchJD that takes a Gramian, as a method."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from accel_weighting.methods.algebra import Array, mixed_seed, solve_present, with_gradients
from accel_weighting.statistics import InitialWeights, Method, State, Statistics, initial_vector, integer

Memory = dict[str, Tensor]
"""Tensors of a TorchJD weighting, by dotted name."""

_NOT_GRAMIAN = {"ExcessMTLWeighting", "MoDoWeighting", "SDMGradWeighting", "_NashMTLWeighting"}


@dataclass(frozen=True, eq=False, repr=False)
class TorchJDWeighting(Method):
    """A ``torchjd.aggregation.*Weighting`` on the Gram matrix of the global batch, solved alike on every process.

    The Gram matrix comes in float64, without absent tasks, divided by its mean diagonal entry (TorchJD's
    ``norm_eps`` is compared with its trace, and would make small gradients zero); a zero gradient
    counts as absent. A task that is alone has weight 1.
    An answer that is not finite leaves the weights as they were. Random weightings draw from a seed of ``seed`` and
    a counter, and leave the global generators alone.

    The weighting is copied, reset and never called itself: what its calls change (``GradVacWeighting``,
    ``PCDWeighting``, ``CRMOGMWeighting``) is kept in the state, where every dimension of K entries belongs to the
    tasks. It begins with the first window in which no task is absent; later an absent task keeps its part.

    UPGrad and DualProj lose their guarantee for a gradient of 1 % of the others' length at TorchJD's default
    regularisation: give them ``QuadprogProjector(norm_eps=0, reg_eps=1e-9)``. For PCD, the first *present* task is
    the primary.

    Args:
        weighting: For example ``UPGradWeighting()``.
        seed: Seed of random weightings, the same on every process.

    Raises:
        ImportError: TorchJD is not installed.
        TypeError: ``weighting`` is not one of TorchJD's weightings.
        ValueError: It needs the Jacobian, or two batches.

    Source: https://torchjd.org, tested with 0.18.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    acts_on: ClassVar[Literal["losses", "shared"]] = "shared"
    grows: ClassVar[bool] = True

    weighting: Any
    seed: int = integer(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            from torchjd.aggregation import Weighting
        except ImportError as error:
            raise ImportError("TorchJDWeighting needs TorchJD: `pip install accel_weighting[torchjd]`.") from error
        name = type(self.weighting).__name__
        if not isinstance(self.weighting, Weighting):
            raise TypeError(
                "Parameter `weighting` must be an instance of a `torchjd.aggregation.*Weighting`, such as "
                f"`UPGradWeighting()`. Found `weighting = {self.weighting!r}`."
            )
        if name in _NOT_GRAMIAN:
            raise ValueError(f"{name} needs the Jacobian, or two batches; only the Gram matrix of one is known.")
        weighting = copy.deepcopy(self.weighting)
        if hasattr(weighting, "reset"):
            weighting.reset()
        floats = {key: value.double() for key, value in _tensors(weighting).items() if value.is_floating_point()}
        _restore(weighting, floats)
        object.__setattr__(self, "weighting", weighting)

    def __repr__(self) -> str:
        return f"TorchJDWeighting({_describe(self.weighting)}, seed={self.seed})"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchJDWeighting) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[Array, State]:
        """The answer for orthonormal gradients unless ``initial_weights`` are given; the memory is still empty."""
        K = len(tasks)
        M, rows = np.eye(K), np.arange(K)
        weights, _ = self._call(M, rows, K, {}, 0)
        _, after = self._call(M * (1 + rows / K) - 0.5 / K, rows, K, {}, 0)  # tasks with nothing in common but conflict
        if initial_weights is not None or not np.isfinite(weights).all():
            weights = initial_vector(tasks, initial_weights)
        fresh = _tensors(self.weighting)
        changed = {key: v for key, v in after.items() if key not in fresh or not torch.equal(v, fresh[key])}
        empty = {
            f"memory.{key}": np.zeros_like(value.numpy())[None] for key, value in changed.items()
        }  # no row per task
        return weights, {"weights": weights, "counter": np.asarray(1), "started": np.asarray(False), **empty}

    def update(self, state: State, statistics: Statistics) -> tuple[Array, State]:
        """Calls a copy of the weighting that remembers what the state says."""
        pulling = with_gradients(statistics)
        K, rows, started = len(pulling), pulling.nonzero()[0], bool(state["started"])
        old = {
            key.removeprefix("memory."): torch.tensor(value[0])
            for key, value in state.items()
            if key.startswith("memory.")
        }
        new: Memory = {}

        def solve(M: Array) -> Array:
            weights, after = self._call(M, rows, K, old if started else {}, int(state["counter"]))
            new.update(after)
            return weights

        weights = solve_present(solve, state["weights"], statistics)
        next_state = {**state, "counter": np.asarray(state["counter"] + 1)}
        if not np.isfinite(weights).all():
            return state["weights"].copy(), next_state
        if new and (started or pulling.all()):
            for key, value in old.items():
                kept = value.clone()
                kept[_index(kept, K, rows)] = new[key]
                next_state[f"memory.{key}"] = kept.numpy()[None]
            next_state["started"] = np.asarray(True)
        return weights, {**next_state, "weights": weights}

    def _call(self, M: Array, rows: NDArray[np.intp], K: int, memory: Memory, counter: int) -> tuple[Array, Memory]:
        """Weights for ``M`` of the tasks ``rows`` out of K by a weighting with ``memory``, and its tensors then."""
        if len(M) == 1:
            return np.ones(1), {}
        weighting = copy.deepcopy(self.weighting)
        _restore(weighting, _part(_tensors(weighting), K, rows))  # preferences, for example
        gramian = torch.from_numpy(M)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if memory:
                weighting(
                    gramian
                )  # for what is not a tensor: TorchJD notes the number of tasks, to start anew on another
                _restore(weighting, _part(memory, K, rows))
            torch.default_generator.manual_seed(mixed_seed(self.seed, counter))
            weights: Array = weighting(gramian).to(torch.float64).numpy()
        return weights, _tensors(weighting)


def _tensors(weighting: nn.Module) -> Memory:
    """Buffers and plain tensor attributes of a module and its children, by dotted name."""
    return {
        f"{path}.{key}" if path else key: value
        for path, module in weighting.named_modules()
        for key, value in {**vars(module), **module._buffers}.items()
        if isinstance(value, Tensor)
    }


def _restore(weighting: nn.Module, tensors: Memory) -> None:
    for name, value in tensors.items():
        path, _, key = name.rpartition(".")
        module = weighting.get_submodule(path)
        (module._buffers if key in module._buffers else vars(module))[key] = value


def _part(tensors: Memory, K: int, rows: NDArray[np.intp]) -> Memory:
    return {key: value[_index(value, K, rows)].clone() for key, value in tensors.items()}


def _index(value: Tensor, K: int, rows: NDArray[np.intp]) -> tuple[Tensor, ...]:
    """Index of the part of ``value`` that belongs to the tasks ``rows``: in every dimension with K entries."""
    axes = [torch.from_numpy(rows) if size == K else torch.arange(size) for size in value.shape]
    return tuple(torch.meshgrid(*axes, indexing="ij")) if axes else ()


def _describe(value: Any) -> str:
    """A repr with the settings that TorchJD's own leaves out, and without addresses in memory."""
    if isinstance(value, Tensor):
        return str(value.tolist())
    if isinstance(value, (bool, int, float, str)):
        return repr(value)
    settings = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        settings = {key: v for key, v in settings.items() if key not in vars(nn.Module())} | value._modules
    parts = [f"{key.lstrip('_')}={_describe(v)}" for key, v in settings.items() if v is not None]
    return f"{getattr(value, '__qualname__', type(value).__name__)}({', '.join(parts)})"
