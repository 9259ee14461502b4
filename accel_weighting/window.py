"""The window: everything between two optimizer steps, added up on the device, packed into one vector of sums.

Blocks are micro-batches. Their gradients occupy different rows of the shared representation, so the Gram matrix of the
mean loss over M equal blocks is the plain sum of the blocks' Gram matrices over M² (with counts, each weighed by its
items). Every number in the vector is therefore a sum, over blocks and then over processes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import Statistics


@dataclass(frozen=True)
class Sums:
    """What all processes saw together, on the CPU; the verdicts are taken from these numbers alone.

    Attributes:
        blocks: Number of micro-batches.
        counted: How many of them came with counts.
        vacant: How many of them held no task at all; they go with counts and without.
        split: How many processes could not relate the gradients of different tasks.
        tapped: How many processes saw gradients meet.
        bad_losses: Per task, the number of processes where a loss was not finite, ``[K]``.
        bad_gradients: Per task, the number of processes where a gradient was not finite, ``[K]``.
        bad_moments: The number of processes where a rotation's moments were not finite.
    """

    statistics: Statistics
    blocks: int
    counted: int
    vacant: int
    split: int
    tapped: int
    bad_losses: list[int]
    bad_gradients: list[int]
    bad_moments: int


class Window:
    """Adds up what the micro-batches of this process saw.

    Args:
        tasks: Number of tasks, K.
        matrices: Shape ``[out, in]`` of the shared layer's weight where gradients are taken there, else None.

    Attributes:
        moments: How many moments of which width a rotating method has, ``(number, m)``, once z is known.
    """

    def __init__(self, tasks: int, matrices: tuple[int, int] | None = None) -> None:
        self.tasks = tasks
        self.matrices = matrices
        self.moments: tuple[int, int] | None = None
        self.clear()

    def clear(self) -> None:
        """Opens a new window."""
        self.blocks = 0
        self.counted = 0
        self.vacant = 0
        self._present = [0] * self.tasks
        self._items = [0.0] * self.tasks
        self._sums: dict[str, Tensor] = {}

    def add_block(self, losses: Tensor, present: frozenset[int], counts: Sequence[float] | None) -> None:
        """A micro-batch: its detached losses ``[K]`` (zeros where absent), who was there, and with how many items."""
        self.blocks += 1
        self.counted += counts is not None
        self.vacant += not present
        for k in present:
            self._present[k] += 1
            self._items[k] += 1 if counts is None else counts[k]
        if counts is not None:
            losses = losses.double() * to_device(torch.tensor(counts, dtype=torch.float64), losses.device)
        self.add("losses", losses)

    def add(self, name: str, value: Tensor) -> None:
        """Adds to one of the sums on the device, in float64 (on the CPU where the device has none).

        Moments are large, and stay in the precision they were computed in until the window closes.
        """
        if value.device.type == "mps":
            value = value.to("cpu")
        if name != "moments":
            value = value.double()
        if name in self._sums:
            value = self._sums[name] + value.to(self._sums[name].device)
        self._sums[name] = value

    def pack(self, split: bool) -> Tensor:
        """All sums of this process as one float64 vector on the device; its length depends on K and the layer alone."""
        losses = self._sums["losses"]
        device, K = losses.device, self.tasks
        gradients = self._sums.get("gram" if self.matrices is None else "matrices")
        tapped = gradients is not None
        if gradients is None:
            gradients = torch.zeros(K, *(self.matrices or (K,)), dtype=torch.float64, device=device)
        own = gradients.diagonal() if self.matrices is None else gradients.flatten(1).sum(1)
        triangles = self._triangles(device)
        finite = torch.cat([losses, own.to(device), triangles.sum().view(1)]).isfinite()
        counts = [self.blocks, self.counted, self.vacant, split, tapped, *self._present, *self._items]
        return torch.cat(
            [
                ~finite,
                to_device(torch.tensor(counts, dtype=torch.float64), device),
                losses,
                gradients.flatten().to(device),
                triangles.flatten(),
            ]
        )

    def _triangles(self, device: torch.device) -> Tensor:
        """Strict upper triangles of the moments' skew parts: all that a rotation's gradient needs of them."""
        if self.moments is None:
            return torch.zeros(0, 0, dtype=torch.float64, device=device)
        number, m = self.moments
        if "moments" not in self._sums or not number:
            return torch.zeros(number, m * (m - 1) // 2, dtype=torch.float64, device=device)
        S = self._sums["moments"].flatten(1)
        upper, lower = _triangles(m, S.device)
        return (S.index_select(1, upper) - S.index_select(1, lower)).double().to(device)

    def condense(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """After the sum over processes, still on the device: what the host reads, and what stays on the device.

        A shared layer's matrices become their Gram matrix; moments stay.
        """
        head, K = self._head, self.tasks
        if self.matrices is not None:
            matrices = vector[head:].view(K, -1)
            return torch.cat([vector[:head], (matrices @ matrices.T).flatten()]), vector[:0]
        return vector[: head + K * K], vector[head + K * K :]

    @property
    def _head(self) -> int:
        return 5 * self.tasks + 6

    def unpack(self, vector: Tensor, triangles: Tensor, step: int) -> Sums:
        """The two parts of ``condense``, the first on the CPU, as statistics of the whole window."""
        K = self.tasks
        numbers = [round(x) for x in vector[: 2 * K + 6].tolist()]
        bad_moments, blocks, counted, vacant, split, tapped = numbers[2 * K :]
        present, items, losses = vector[2 * K + 6 : self._head].view(3, K)
        items = items.clamp(min=1)  # 0 where absent, and so are losses and gradients
        weights = present.sign() / (items if counted else blocks)
        gram = vector[self._head :].view(K, K) * torch.outer(weights, weights / 2)
        gram = gram + gram.T
        known = tapped or vacant == blocks  # nobody there: rows of zeros
        moments = None
        if self.moments is not None:
            number, m = self.moments
            i, j = torch.triu_indices(K, K, 1)
            scale = torch.cat([weights[i] * weights[j], weights])[:number]
            moments = triangles.view(number, m * (m - 1) // 2) * to_device(scale, triangles.device)[:, None]
        return Sums(
            statistics=Statistics(
                losses=losses / items,
                present=present > 0,
                norms=gram.diagonal().sqrt() if known else None,
                gram=gram if known and not split else None,
                moments=moments,
                micro_batches=blocks,
                step=step,
            ),
            blocks=blocks,
            counted=counted,
            vacant=vacant,
            split=split,
            tapped=tapped,
            bad_losses=numbers[:K],
            bad_gradients=numbers[K : 2 * K],
            bad_moments=bad_moments,
        )


@functools.lru_cache(maxsize=8)
def _triangles(m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the strict upper triangle of a flattened matrix lies, and where its mirror image."""
    i, j = torch.triu_indices(m, m, 1, device=device)
    return i * m + j, j * m + i


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on ``device`` without the host waiting for it."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
