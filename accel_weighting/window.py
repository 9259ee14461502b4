"""The window: everything between two optimizer steps, and the one vector of sums that all processes add up.

Blocks are micro-batches. Their gradients occupy different rows of the shared representation, so the Gram matrix of the
mean loss over M equal blocks is the plain sum of the blocks' Gram matrices over M² (with counts, each weighed by its
items). Every number in the vector is therefore a sum, over blocks and then over processes.

A number that is not finite makes the sum that it goes into not finite, on every process: nothing else says so.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .statistics import Statistics
from .transfer import to_device


class Sums(NamedTuple):
    """What all processes saw together; the verdict is taken from these numbers alone.

    Attributes:
        blocks: Number of micro-batches.
        counted: How many of them came with counts.
        empty: How many of them held no task at all; they go with counted and with uncounted ones.
        split: How many processes could not relate the gradients of different tasks.
        tapped: How many processes measured gradients.
        derivatives: How many processes saw a loss on derivatives, whose gradient passes the branch point in part alone.
        arrived: On how many processes each task's gradient came to the branch point, ``[K]``.
        present: In how many blocks each task was, ``[K]``.
        items: How many items (blocks, where nothing was counted) each task had, ``[K]``.
        losses: Sum of each task's losses, times its items where counted, ``[K]``.
        extras: ``{name: mean}`` of the losses that were added as they are.
        gram: Inner products of the gradients, summed over blocks, ``[K, K]``.
        moments: For a rotating method, the sums over blocks of the skew moments, on the device.
        moments_total: The sum of all moments: not finite if one of them is not; 0 without moments.
        finite: Whether all of these numbers are finite.
        step: Optimizer steps that came before this window.
    """

    blocks: int
    counted: int
    empty: int
    split: int
    tapped: int
    derivatives: int
    arrived: NDArray[np.float64]
    present: NDArray[np.float64]
    items: NDArray[np.float64]
    losses: NDArray[np.float64]
    extras: Mapping[str, float]
    gram: NDArray[np.float64]
    moments: Tensor | None
    moments_total: float
    finite: bool
    step: int

    @property
    def mixed_counts(self) -> bool:
        """Whether some blocks came with counts and some without."""
        return 0 < self.counted < self.blocks - self.empty

    @property
    def bad_extras(self) -> list[str]:
        """Losses that were added as they are and are not finite."""
        return [name for name, mean in self.extras.items() if not math.isfinite(mean)]

    def not_finite(self) -> dict[str, NDArray[np.bool_]]:
        """``{"items" | "loss" | "gradient" | "moment": bool [K]}``: which sums are not finite."""
        return {
            "items": ~np.isfinite(self.items),
            "loss": ~np.isfinite(self.losses),
            "gradient": ~np.isfinite(self.gram.diagonal()),
            "moment": np.full(len(self.losses), not np.isfinite(self.moments_total)),
        }

    def statistics(self) -> Statistics:
        """The means over the whole window, of sums that are finite."""
        present = self.present > 0
        items = np.where(present, self.items, 1)  # 0 where absent, and so are losses and gradients
        weights = present / (items if self.counted else self.blocks)
        gram = self.gram * (weights[:, None] * (weights / 2))
        gram = gram + gram.T
        known = (self.tapped or self.empty == self.blocks) and not self.derivatives  # nobody there: rows of zeros
        return Statistics(
            losses=self.losses / items,
            present=present,
            norms=np.sqrt(gram.diagonal()) if known else None,
            gram=gram if known and not self.split else None,
            moments=None if self.moments is None else self._scaled_moments(self.moments, weights),
            micro_batches=self.blocks,
            step=self.step,
        )

    @staticmethod
    def _scaled_moments(moments: Tensor, weights: NDArray[np.float64]) -> Tensor:
        i, j = np.triu_indices(len(weights), 1)
        scale = np.concatenate([weights[i] * weights[j], weights])[: len(moments)]
        return moments * to_device(torch.from_numpy(scale), moments.device)[:, None]


HOST = 6
"""Numbers of the vector besides those of tasks and extras: blocks, counted, empty, split, tapped, derivatives."""


EXTRAS = 8
"""How many losses can be added as they are: room for them is in every vector, so that its length never changes."""


@dataclass
class Layout:
    """The wire format: where everything lies in the vector that the processes add up.

    Attributes:
        tasks: Number of tasks, K.
        matrices: Shape ``[out, in·…]`` of the shared layer's weight where gradients are taken there, ``[1, |W|]`` where
            they are taken at parameters, else None.
        moments: How many moments of which width a rotating method has, ``(number, m)``, once z is known.
        extras: Names of the losses that are added as they are, in the order in which they first came.
    """

    tasks: int
    matrices: tuple[int, int] | None = None
    moments: tuple[int, int] | None = None
    extras: list[str] = field(default_factory=list)

    @property
    def gradients(self) -> tuple[int, ...]:
        """Shape of what the gradients of a window come to."""
        return (self.tasks, *(self.matrices or (self.tasks,)))

    @property
    def triangles(self) -> tuple[int, int]:
        """Shape of the moments' strict upper triangles."""
        number, m = self.moments or (0, 0)
        return number, m * (m - 1) // 2

    @property
    def _head(self) -> int:
        return HOST + 4 * self.tasks + 2 * EXTRAS

    def condense(self, vector: Tensor, first: int, end: int) -> tuple[Tensor, Tensor | None]:
        """After the sum over processes, still on the device: what the host reads, and what stays on the device.

        Gradients at weights become their Gram matrix. Moments stay; the host learns their sum. This layout begins at
        ``first`` and ends before ``end``; what is around it in the vector is for the host.
        """
        K, head = self.tasks, first + self._head
        if self.matrices is not None:
            matrices = vector[head:end].view(K, -1)
            return torch.cat([vector[:head], (matrices @ matrices.T).flatten(), vector[end:]]), None
        if self.moments is None:
            return vector, None
        rest = vector[head + K * K : end]
        return torch.cat([vector[: head + K * K], rest.sum().view(1), vector[end:]]), rest

    def unpack(self, host: NDArray[np.float64], rest: Tensor | None, step: int) -> Sums:
        """The two parts of ``condense``, the first on the host, by name."""
        K, head = self.tasks, self._head
        blocks, counted, empty, split, tapped, derivatives = map(round, host[:HOST].tolist())
        arrived, present, items = host[HOST : HOST + 3 * K].reshape(3, K)
        first = HOST + 3 * K
        counts, losses = host[first : first + EXTRAS], host[first + EXTRAS : head - EXTRAS]
        extras = host[head - EXTRAS : head]
        return Sums(
            blocks,
            counted,
            empty,
            split,
            tapped,
            derivatives,
            arrived,
            present,
            items,
            losses,
            {name: extras[i] / counts[i] for i, name in enumerate(self.extras) if counts[i]},
            host[head : head + K * K].reshape(K, K),
            None if rest is None else rest.view(self.triangles),
            0.0 if rest is None else float(host[-1]),
            math.isfinite(host.sum()),
            step,
        )


@dataclass
class MicroBatch:
    """One micro-batch, from ``combine`` to the end of its backward.

    Attributes:
        present: Indices of the tasks that are in it.
        window: The window that it belongs to.
        scale: What every task's gradient is divided by besides its factor, ``[K]`` (the reciprocal of its number of
            items), or None.
        shared_weights: Weights on the shared path, ``[K]`` on the device, or None where weights act on the losses.
        decide: Gives ``shared_weights`` from the Gram matrix of this very backward and the tasks that it is of
            (``lag=0``), or None.
        record: Whether the statistics take it in.
        factors: ``c``, ``[K]``, once the backward has begun.
        collected: For every join that this backward passed: the shapes of its tensors, and whose gradients came.
        squares: Squared norms of the gradients that were measured one by one as they passed, by task.
        came: Tasks whose gradient came to a shared parameter.
    """

    present: frozenset[int]
    window: Window
    scale: Tensor | None = None
    shared_weights: Tensor | None = None
    decide: Callable[[Tensor, frozenset[int]], Tensor] | None = None
    record: bool = True
    factors: Tensor | None = None
    collected: list[tuple[tuple[torch.Size, ...], frozenset[int]]] = field(default_factory=list)
    squares: dict[int, Tensor] = field(default_factory=dict)
    came: set[int] = field(default_factory=set)

    @property
    def divisors(self) -> Tensor:
        """By how much every task's gradient was multiplied, ``[K]``."""
        assert self.factors is not None
        return self.factors if self.scale is None else self.factors * self.scale

    def add_squares(self) -> None:
        """Adds the squared norms, free of their factors, to the window: the diagonal of a Gram matrix."""
        if not self.squares:
            return
        squares, c = self.squares, self.divisors.detach()
        zero = next(iter(squares.values())).new_zeros(())
        diagonal = torch.stack([squares.get(k, zero).to(c.device) for k in range(len(c))])
        self.squares = {}
        self.window.add("gradients", torch.diag(diagonal / c.to(diagonal.dtype).square()))

    @property
    def split(self) -> bool:
        """Whether two tasks' gradients did not meet, so that their inner product is not known.

        They meet in one join. Where each of them also came alone to a join of its own, and the tensors there are of the
        same shape, those may be one tensor that was handed to the heads as two.
        """
        if len(self.collected) < 2:
            return False
        tasks = sorted(frozenset().union(*(arrived for _, arrived in self.collected)))
        return any(self._apart(a, b) for a, b in itertools.combinations(tasks, 2))

    def _apart(self, a: int, b: int) -> bool:
        if not any({a, b} <= arrived for _, arrived in self.collected):
            return True
        alone_a = {shapes for shapes, arrived in self.collected if a in arrived and b not in arrived}
        return any(shapes in alone_a for shapes, arrived in self.collected if b in arrived and a not in arrived)


class Carried(Protocol):
    """A micro-batch whose losses come with its backward.

    Attributes:
        given: Who was there, and with how many items.
    """

    given: Any

    def losses(self) -> tuple[Tensor, Mapping[int, float]]:
        """Its losses, ``[K]``, and the numbers of items of tasks with which something is wrong."""


class Window:
    """One optimizer step, as this process sees it: made anew for each, and the owner of all that is true of it.

    A backward that comes after the step (or after a reset) writes into the window that it belongs to, which nobody
    reads any more.

    Args:
        layout: The wire format.

    Attributes:
        opened: Micro-batches so far, recorded or not.
        due: Whether the last of them was the step's last.
        moves_weights: Whether some micro-batch was not frozen.
        blocks: Recorded micro-batches.
        items: How many items (blocks, where nothing was counted) each task had.
        arrived: Tasks whose gradient has come there.
        called: Tasks whose head was called.
        fed: Tasks whose head, or alias, had a history to send gradients back to.
        used: Of every task, the shared parameters that its forwards used.
        by_rows: Whether a tensor came whose rows belong to tasks.
        factors: ``c`` of the last backward, ``[K]`` on the device.
        split: Whether the inner products of different tasks' gradients are not known.
        derivatives: Whether a loss was on derivatives that passed the branch point.
        coefficients: ``{task: weight}`` that were handed out and whose total was not attached yet; None: none.
        carried: Micro-batches whose losses come with their backward, and were not recorded yet.
    """

    def __init__(self, layout: Layout) -> None:
        self.opened = 0
        self.due = False
        self.moves_weights = False
        self.blocks = 0
        self.arrived: set[int] = set()
        self.called: set[int] = set()
        self.fed: set[int] = set()
        self.used: dict[int, set[int]] = {}
        self.factors: Tensor | None = None
        self.split = self.derivatives = self.by_rows = False
        self.coefficients: dict[str, Tensor] | None = None
        self.carried: list[Carried] = []
        self._layout = layout
        self._counted = self._empty = 0
        self._present = [0] * layout.tasks
        self.items = [0.0] * layout.tasks
        self._extras = [0] * EXTRAS
        self._sums: dict[str, Tensor] = {}

    def record(
        self,
        losses: Tensor,
        present: frozenset[int],
        counts: Sequence[float] | None,
        shares: bool = False,
        *,
        wrong: Mapping[int, float] | None = None,
    ) -> None:
        """A micro-batch: its detached losses ``[K]`` (zeros where absent), who was there, and with how many items.

        Counts that are shares add up to the number of micro-batches, which divides the gradients then. Of a task with
        which something is ``wrong`` the number of items is not finite: NaN, it was there and its loss is not known;
        infinite, its loss came though it was not there.
        """
        self.blocks += 1
        self._counted += counts is not None and not shares
        self._empty += not present
        for k in present:
            self._present[k] += 1
            self.items[k] += 1 if counts is None else counts[k]
        for k, number in (wrong or {}).items():
            self.items[k] += number
        if counts is not None:
            losses = losses.double() * to_device(torch.tensor(counts, dtype=torch.float64), losses.device)
        self.add("losses", losses)

    def record_extras(self, losses: Mapping[str, Tensor]) -> None:
        """Losses of a micro-batch that were added as they are, detached."""
        if not losses:
            return
        device = self._sums["losses"].device
        row = [torch.zeros((), dtype=torch.float64, device=device)] * EXTRAS
        for name, loss in losses.items():
            place = self._layout.extras.index(name)
            self._extras[place] += 1
            row[place] = loss.to(device, torch.float64)
        self.add("extras", torch.stack(row))

    def add(self, name: str, value: Tensor) -> None:
        """Adds to one of the sums on the device, in float64 (on the CPU where the device has none).

        Moments are large, and stay in the precision they were computed in until the window closes.
        """
        if value.is_mps:
            value = value.to("cpu")
        if (before := self._sums.get(name)) is not None:
            value = before + (value if value.get_device() == before.get_device() else value.to(before.device))
        elif name != "moments" and value.dtype != torch.float64:
            value = value.double()
        self._sums[name] = value

    def add_at(self, k: int, place: slice, gradient: Tensor, divisor: Tensor) -> None:
        """Adds a gradient at a parameter, free of its factor, to a part of task ``k``'s row.

        In float32, or in float64 once one of them comes in it.
        """
        g = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
        wide = torch.promote_types(g.dtype, torch.float32)
        total = self._sums.get("gradients")
        if total is None:
            total = torch.zeros(self._layout.gradients, dtype=wide, device=g.device)
        total = self._sums["gradients"] = total.to(torch.promote_types(total.dtype, wide))
        total[k, 0, place].addcdiv_(g.flatten().to(total), divisor.to(total))

    @property
    def scaled(self) -> bool:
        """Whether a backward's gradients were multiplied far beyond any weight, as a loss scale does."""
        return self.factors is not None and bool(self.factors.abs().max() > 64)

    def not_finite(self, what: str) -> NDArray[np.bool_]:
        """Which of this process's own sums are not finite, bool ``[K]``; waits for the device.

        Args:
            what: ``"loss"``, ``"gradient"`` or ``"moment"``, of which the last is not looked for.
        """
        own = self._sums.get({"loss": "losses", "gradient": "gradients"}.get(what, ""))
        if own is None:
            return np.zeros(self._layout.tasks, dtype=bool)
        rows = own if what == "loss" else own.diagonal() if self._layout.matrices is None else own.flatten(1).sum(1)
        bad: NDArray[np.bool_] = ~np.isfinite(rows.cpu().numpy())
        return bad

    def pack(self) -> tuple[list[float], list[Tensor]]:
        """All sums of this process: numbers of the host, and the parts of the vector that are on the device.

        Their length depends on the layout alone.
        """
        losses, gradients = self._sums["losses"], self._sums.get("gradients")
        tapped = gradients is not None
        if gradients is None:
            gradients = torch.zeros(self._layout.gradients, dtype=torch.float64, device=losses.device)
        arrived = [k in self.arrived for k in range(self._layout.tasks)]
        facts = [self.blocks, self._counted, self._empty, self.split, tapped, self.derivatives]
        numbers = [*facts, *arrived, *self._present, *self.items, *self._extras]
        extras = self._sums.get("extras")
        parts = [losses, _zeros(EXTRAS, losses.device) if extras is None else extras]
        parts.append(gradients.flatten().to(losses.device).double())
        if self._layout.moments is not None:
            parts.append(self._triangles(losses.device).flatten())
            self._sums.pop("moments", None)  # large; the rest may be asked for once more, see `not_finite`
        return numbers, parts

    def _triangles(self, device: torch.device) -> Tensor:
        """Strict upper triangles of the moments' skew parts: all that a rotation's gradient needs of them."""
        assert self._layout.moments is not None
        number, m = self._layout.moments
        if "moments" not in self._sums or not number:
            return torch.zeros(self._layout.triangles, dtype=torch.float64, device=device)
        S = self._sums["moments"].flatten(1)
        upper, lower = _triangle_indices(m, S.device)
        return (S.index_select(1, upper) - S.index_select(1, lower)).double().to(device)


@functools.lru_cache(maxsize=8)
def _zeros(number: int, device: torch.device) -> Tensor:
    return torch.zeros(number, dtype=torch.float64, device=device)


@functools.lru_cache(maxsize=8)
def _triangle_indices(m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the strict upper triangle of a flattened matrix lies, and where its mirror image."""
    i, j = torch.triu_indices(m, m, 1, device=device)
    return i * m + j, j * m + i
