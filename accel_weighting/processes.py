"""The one all-reduce of an optimizer step, its group, and the agreement that rides in it.

The only place that talks to other processes.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist  # noqa: TID251  this is the one place
from numpy.typing import NDArray
from torch import Tensor

from . import checks, errors
from .transfer import to_device

SUPPORTED = {
    "NO",
    "MULTI_CPU",
    "MULTI_GPU",
    "MULTI_NPU",
    "MULTI_MLU",
    "MULTI_SDAA",
    "MULTI_MUSA",
    "MULTI_XPU",
    "MULTI_HPU",
    "FSDP",
    "DEEPSPEED",
}
"""Accelerate's distributed types in which one backward passes the join exactly once."""

FIRST = 1024
"""The length of the very first reduction, the same for every weighter, so that processes that were built differently
can still notice it."""

BITS = 20
"""Bits of a signature piece: sums of squares over 4,096 processes stay exact in float64."""


def signature_pieces(digest: bytes, pieces: int) -> list[int]:
    """The first ``pieces * BITS`` bits of a digest as small integers."""
    number = int.from_bytes(digest, "big")
    return [(number >> (BITS * i)) & ((1 << BITS) - 1) for i in range(pieces)]


LEFT = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer", "Application timeout")
"""Parts of gloo's errors when a peer is gone. NCCL raises nothing; its watchdog aborts the process."""


def left_waiting(error: BaseException) -> bool:
    """Whether a collective, ours or an engine's, failed because another process did not take part in it."""
    return any(words in str(error) for words in LEFT)


def fingerprint(x: Tensor) -> Tensor:
    """Two small integers, int64 ``[2]``, that any single flipped bit of ``x`` changes; computed where x is."""
    bits = x.contiguous().view(torch.int32).sum(dtype=torch.int64)  # 32 bits each: two pieces hold 40
    mask = (1 << BITS) - 1
    return torch.stack([bits & mask, (bits >> BITS) & mask])


def launched_processes() -> int | None:
    """How many processes the environment says there are; None: several were asked for, and one was started."""
    if "RANK" not in os.environ and "MASTER_ADDR" in os.environ:
        return None
    return int(os.environ.get("WORLD_SIZE", "1"))


def _alike(world: int, sums: Sequence[float]) -> bool:
    """Whether all processes sent the same integers, decided on their sums alone: W·Σs² == (Σs)² for each of them.

    Args:
        world: Number of processes.
        sums: The sums of all integers, then the sums of their squares.
    """
    half = len(sums) // 2
    return all(world * int(b) == int(a) ** 2 for a, b in zip(sums[:half], sums[half:], strict=True))


@dataclass
class Reduction:
    """A vector on its way through the sum over processes.

    Attributes:
        host: What the host reads of the sum, on its way to the CPU: signature, payload, fingerprint.
        device: What stays on the device, if anything does.
        world: Number of processes.
        signature: Length of the signature at the beginning of ``host``.
        fingerprint: Length of the fingerprint at its end.
        ready: Recorded when the copy to the host was queued; None on a CPU.
    """

    host: Tensor
    device: Tensor | None
    world: int
    signature: int
    fingerprint: int
    ready: torch.cuda.Event | None = None

    def wait(self) -> tuple[bool, NDArray[np.float64], Tensor | None]:
        """Whether the processes agree, the host's part of the payload, and the device's.

        The host waits only if the device is not there yet.
        """
        if self.ready is not None:
            self.ready.synchronize()
        host: NDArray[np.float64] = self.host.cpu().numpy()
        first, last = self.signature, len(host) - self.fingerprint
        agreed = _agreed(self.world, host[:first].tolist()) and _alike(self.world, host[last:].tolist())
        return agreed, host[first:last], self.device


def _agreed(world: int, signature: Sequence[float]) -> bool:
    return signature[0] == world and _alike(world, signature[1:])


class Processes:
    """The processes over which statistics are summed: data-parallel × context-parallel, never tensor-parallel.

    Args:
        accelerator: Where the group is found when ``group`` is None.
        group: A process group, or None. What is given or found is copied once, for all weighters, so that no collective
            of an engine can be mistaken for ours: when a process misses a step, the others time out instead of summing
            mismatched data.

    Attributes:
        number: Which weighter in its group this is; processes that take theirs in different orders can tell by it.

    Raises:
        RuntimeError: Several processes were launched, and this accelerator believes that it is alone.
    """

    def __init__(self, accelerator: Any, group: dist.ProcessGroup | None) -> None:
        launched = launched_processes()
        initialized = dist.is_available() and dist.is_initialized()
        if accelerator is None:
            several = launched not in (None, 1) or (initialized and dist.get_world_size() > 1)
            if group is None and several:
                raise errors.several_processes_without_accelerator()
            state = sys.modules.get("accelerate.state")
            if state is not None and state.AcceleratorState._shared_state:
                checks.warn_without_the_accelerator()
        else:
            kind = accelerator.distributed_type.value
            if kind not in SUPPORTED:
                raise errors.unsupported_engine(kind, sorted(SUPPORTED))
            if launched != 1 and accelerator.num_processes == 1:
                checks.started_alone(launched)
        alone = not initialized
        self._own = _Own(None)
        if group is None and initialized and accelerator is not None:
            group, alone = _find_group(accelerator)
            if not alone:
                self._own = _own_group(group, use_local_synchronization=group is not None)
        elif group is not None:
            self._own = _own_group(group, use_local_synchronization=True)
        self.number = self._own.weighters
        self.world = 1 if alone else dist.get_world_size(group)
        self.rank = 0 if alone else dist.get_rank(group)
        self._first = True

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of all weighters over these processes; None for one process.

        Raises:
            RuntimeError: It was destroyed.
        """
        if self._own.group is None:
            return None
        group = self._own.group()
        if group is None:
            raise _groups_are_destroyed()
        return group

    def sum(
        self,
        numbers: Sequence[float],
        parts: Sequence[Tensor],
        signature: Sequence[int],
        condense: Callable[[Tensor, int, int], tuple[Tensor, Tensor | None]],
        step: int,
        large: Tensor | None = None,
    ) -> Reduction:
        """Starts the one all-reduce, of one vector: signature, numbers of the host, parts on the device, fingerprint.

        The very first sum of a weighter begins with a part of fixed length, so that processes that were built with
        different tasks or layers, and so with vectors of different lengths, meet in it and say so instead of mixing
        their numbers.

        Args:
            numbers: What the host knows.
            parts: float64 vectors on the device, at least one.
            signature: Small integers that must be alike on all processes.
            condense: Divides the summed vector, still on the device, in what the host reads and what stays there. It is
                given where numbers and parts begin and end; what is around them is for the host.
            step: Of the optimizer, for the error.
            large: State on the device that must be alike on all processes, or None.

        Raises:
            RuntimeError: Another process did not come.
        """
        device = parts[0].device
        known = [1, *signature, *(piece * piece for piece in signature)]
        first, last = len(known), 0
        host = torch.from_numpy(np.array([*known, *numbers], dtype=np.float64))
        pieces = [to_device(host, device), *parts]
        if large is not None:
            bits = fingerprint(large).to(device)
            pieces.append(torch.cat([bits, bits * bits]).double())
            last = len(pieces[-1])
        vector = torch.cat(pieces)
        try:
            vector = self._sum(vector, first)
        except RuntimeError as error:
            if left_waiting(error):
                raise errors.left_waiting(step) from error
            raise
        host, rest = condense(vector, first, len(vector) - last)
        if not host.is_cuda:
            return Reduction(host, rest, self.world, first, last)
        pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
        pinned.copy_(host, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return Reduction(pinned, rest, self.world, first, last, ready)

    def gather(self, item: Any) -> list[Any]:
        """Every process's ``item``: for an error that all raise together and for the self-check; never in a step."""
        if self.world == 1:
            return [item]
        self._first = True  # those who disagree may send vectors of different lengths again
        self._own.length = FIRST
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item, group=self.group)
        return items

    def _sum(self, vector: Tensor, signature: int) -> Tensor:
        length = len(vector)
        if not self._first:
            if length < self._own.length:
                vector = torch.cat([vector, vector.new_zeros(self._own.length - length)])
            self._all_reduce(vector)
            return vector if length == len(vector) else vector[:length]
        self._first = False
        self._own.length = max(self._own.length, min(length, FIRST))
        padded = torch.cat([vector, vector.new_zeros(max(FIRST - length, 0))])
        self._all_reduce(padded[:FIRST])
        if length > FIRST and _agreed(self.world, padded[:signature].tolist()):
            self._all_reduce(padded[FIRST:])
        return padded[:length]

    def _all_reduce(self, vector: Tensor) -> None:
        if self.world > 1:
            dist.all_reduce(vector, group=self.group)


def _find_group(accelerator: Any) -> tuple[dist.ProcessGroup | None, bool]:
    """The data-parallel × context-parallel group (None: the world), and whether this process is alone in it."""
    if accelerator.distributed_type.value == "DEEPSPEED":
        from deepspeed.utils import groups

        return groups._get_sequence_data_parallel_group(), False
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is None:
        return None, False
    if not accelerator.parallelism_config.dp_cp_dim_names:
        return None, True
    return mesh["dp_cp"].get_group(), False


def is_zero3(accelerator: Any) -> bool:
    """Whether DeepSpeed divides the parameters, which it gathers in the order in which all processes use them."""
    if accelerator is None or accelerator.distributed_type.value != "DEEPSPEED":
        return False
    return accelerator.num_processes > 1 and accelerator.state.deepspeed_plugin.zero_stage == 3  # type: ignore[no-any-return]


@dataclass
class _Own:
    """What all weighters over the same processes share.

    Attributes:
        group: Their process group; None for one process. It is not kept alive: torch has it until its process groups
            are destroyed. Threads of a group that outlived them could abort the exit of the interpreter, or wait there.
        weighters: How many there were.
        length: To which their vectors are filled up, so that two weighters that step in opposite orders on two
            processes meet, and say so: the longest of them, at most ``FIRST``. Every process sees the same collectives
            in the same order, and so the same length.
    """

    group: weakref.ref[dist.ProcessGroup] | None
    weighters: int = 0
    length: int = 0


_OWN: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Any, ...], _Own]] = weakref.WeakKeyDictionary()
"""By the world that the group was made in, which is not kept alive; then by its processes and its timeout."""


def _own_group(group: dist.ProcessGroup | None, use_local_synchronization: bool) -> _Own:
    """The group of the same processes (None: all) with the same timeout, which has one weighter more now."""
    world = dist.group.WORLD
    assert world is not None
    found = world if group is None else group
    device = torch.device("cuda" if "nccl" in dist.get_backend(found) else "cpu")
    timeout = found._get_backend(device).options._timeout
    ranks = dist.get_process_group_ranks(found)
    groups = _OWN.setdefault(world, {})
    key = tuple(ranks), timeout
    if key not in groups:
        made = None
        if len(ranks) > 1:
            made = dist.new_group(ranks, timeout, use_local_synchronization=use_local_synchronization)
        groups[key] = _Own(None if made is None else weakref.ref(made))
    own = groups[key]
    own.weighters += 1
    return own


def _groups_are_destroyed() -> RuntimeError:
    """A step after the end."""
    return RuntimeError(
        "torch's process groups were destroyed (`accelerator.end_training()` does so), so the weighter can no longer "
        "sum over processes. End the training after its last step."
    )
