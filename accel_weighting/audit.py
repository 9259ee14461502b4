"""The audit: a walk over the graph of the losses in the first window, for what breaks the branch point.

Everything that a task sends to the trunk must pass its own alias, and nothing else may. The walk finds losses that
reach another task's alias, miss their own, or reach the trunk around the branch. It compares nodes of the graph, not
parameters. What it finds is a suspicion: losses that were stacked into one tensor reach each other in the graph with a
gradient of exactly 0. So cross-talk is confirmed by value before anything is raised. Where tasks own rows of one tensor
no walk can tell them apart, and every loss is asked once which rows its gradient comes to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import errors
from .measure import rows_touched
from .walk import Above, Node, Walk


@dataclass(frozen=True)
class Findings:
    """What the walk saw.

    Attributes:
        visited: How many nodes it came to, each once.
        crossed: ``(task, other)``: the loss of the first sends a gradient to the alias of the second.
        suspected: The same where the graph says so and the value could not be asked for.
        missed: Tasks whose loss does not reach an alias of its own.
        passed_by: Tasks whose loss reaches the trunk around the branch, with the node where that begins.
        hidden: Tasks of whose graph a part is hidden, with what hides it.
        apart: Pairs of tasks whose shared tensors lie at different depths, or have different shapes.
        unowned: Tasks whose loss sends a gradient to rows of no task.
        unasked: Tasks of which it is not known to whose rows their gradients come, with what forbids to ask.
    """

    visited: int = 0
    crossed: list[tuple[str, str]] = field(default_factory=list)
    suspected: list[tuple[str, str]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    passed_by: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    apart: list[tuple[str, str]] = field(default_factory=list)
    unowned: list[str] = field(default_factory=list)
    unasked: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """In words, one line each; none where all is well and all was seen."""
        return [
            *(f"loss `{a}` reaches the alias, or the rows, of `{b}`" for a, b in self.crossed),
            *(f"loss `{a}` may reach the alias of `{b}` (the graph says so)" for a, b in self.suspected),
            *(f"loss `{task}` does not reach an alias of its own" for task in self.missed),
            *(f"loss `{task}` reaches the trunk around the branch, at {node}" for task, node in self.passed_by.items()),
            *(f"nothing was seen of loss `{task}` inside of {node}" for task, node in self.hidden.items()),
            *(f"`{a}` and `{b}` share tensors of different depths or shapes" for a, b in self.apart),
            *(f"loss `{task}` reaches rows of no task" for task in self.unowned),
            *(
                f"it is not known whose rows loss `{task}` reads, because of {what}"
                for task, what in self.unasked.items()
            ),
        ]


class Audit:
    """Looks once at the graph of every task's loss, and again where its head has changed.

    Args:
        tasks: Task names.
        method: The method, as it is printed.
        shared: Whether its weights act on the shared path.
        warn_once: Says something the first time.
        forbids: Why no gradient can be asked for beside the one backward (an engine's name), or None.
        measured: The tasks whose gradients are compared.
        at_parameters: Whether that is at parameters.

    Attributes:
        findings: Of the last look; None before the first.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        method: str,
        shared: bool,
        warn_once: Callable[[str, str], None],
        forbids: Callable[[], str | None],
        measured: Sequence[str],
        at_parameters: bool = False,
    ) -> None:
        self.findings: Findings | None = None
        self._tasks, self._method, self._shared = tuple(tasks), method, shared
        self._warn_once, self._forbids = warn_once, forbids
        self._measured = frozenset(k for k, task in enumerate(tasks) if task in measured)
        self._at_parameters = at_parameters
        self._seen: set[int] = set()
        self._met: set[tuple[int, int]] = set()
        self._attached: int | None = None

    def look(self, losses: Mapping[str, Tensor], present: frozenset[int], branch: Walked) -> None:
        """Looks at the losses of a micro-batch, unless all of them were looked at since heads last changed.

        Raises:
            RuntimeError: A loss sends a gradient to another task's alias.
            ValueError: One loss was given under two names.
        """
        if not self._is_new(present, branch):
            return
        present &= self._measured
        named = {k: losses[self._tasks[k]] for k in sorted(present)}
        named = {k: loss for k, loss in named.items() if loss.grad_fn is not None}  # a leaf has no graph to walk
        if twins := _twins(named):
            raise errors.one_loss_under_two_names([self._tasks[k] for k in twins])
        walk = Walk(branch.key, len(self._tasks), branch.parametrized, self._at_parameters, bool(branch.by_rows))
        with _unretained([*named.values(), *(z for ref, _ in branch.by_rows if (z := ref()) is not None)]):
            self.findings = found = self._judged(walk, named)
        self._say(found, walk)

    def _is_new(self, present: frozenset[int], branch: Walked) -> bool:
        """Whether there is a task, or a loss beside rows of a task, that was not looked at since heads last changed."""
        if self._attached != branch.attached:
            self._attached = branch.attached
            self._seen.clear()
            self._met.clear()
        met = {(k, j) for _, owned in branch.by_rows for k in present for j in (present if owned is None else owned)}
        if present <= self._seen and met <= self._met:
            return False
        self._seen |= present
        self._met |= met
        return True

    def _judged(self, walk: Walk, losses: Mapping[int, Tensor]) -> Findings:
        walk.down(losses.values())
        name, found = self._tasks.__getitem__, Findings(visited=walk.visited)
        for k, loss in losses.items():
            above, reach = walk.above(loss), walk.reach(loss)
            if above.hidden is not None:
                found.hidden[name(k)] = above.hidden
            if above.derivatives:
                continue  # which the backward refuses, in words of its own
            by_rows = reach >> len(self._tasks) & 1
            if walk.joins and not (by_rows or reach >> k & 1) and above.hidden is None:
                found.missed.append(name(k))
            if above.trunk is not None:
                found.passed_by[name(k)] = above.trunk
            if foreign := [j for j in sorted(self._measured) if j != k and reach >> j & 1]:
                self._ask(walk, k, loss, foreign, found)
            if by_rows:
                self._ask_whose_rows(walk, k, loss, above, found)
        found.apart.extend((name(a), name(b)) for a, b in walk.apart(list(losses)))
        return found

    def _ask(self, walk: Walk, k: int, loss: Tensor, foreign: Sequence[int], found: Findings) -> None:
        """Whether the gradient of loss ``k`` at foreign aliases is more than 0."""
        name = self._tasks.__getitem__
        if (engine := walk.forbids or self._forbids()) is not None:
            pairs = [(name(k), name(j)) for j in foreign]
            found.suspected.extend(pairs)
            self._warn_once("cross-talk", errors.suspected_cross_talk(self._method, pairs, engine))
            return
        for j in _touched(loss, {j: walk.edges(j) for j in foreign}):
            found.crossed.append((name(k), name(j)))

    def _ask_whose_rows(self, walk: Walk, k: int, loss: Tensor, above: Above, found: Findings) -> None:
        """To whose rows the gradient of loss ``k`` comes."""
        name = self._tasks.__getitem__
        if (what := above.hidden or walk.forbids or self._forbids()) is not None:
            found.unasked[name(k)] = what
            return
        for j in _owners(loss, walk, len(self._tasks)):
            if j == len(self._tasks):
                found.unowned.append(name(k))
            elif j != k:
                found.crossed.append((name(k), name(j)))

    def _say(self, found: Findings, walk: Walk) -> None:
        if found.crossed:
            say = _cross_talk_at_parameters if self._at_parameters else errors.cross_talk
            raise (_rows_of_another if walk.rows() else say)(self._method, found.crossed)
        if found.unowned:
            self._warn_once("unowned", _rows_of_none(found.unowned))
        if found.passed_by:
            self._warn_once("by-pass", self._passed_by(found.passed_by, by_rows=bool(walk.rows())))
        if found.apart:
            self._warn_once("depths", errors.different_depths(self._method, found.apart))

    def _passed_by(self, tasks: Mapping[str, str], by_rows: bool) -> str:
        if self._at_parameters:
            return _past_the_aliases(tasks)
        return _around_the_rows(tasks) if by_rows else errors.by_pass(self._method, tasks, self._shared)


class Walked(Protocol):
    """What the audit reads of a branch.

    Attributes:
        key: By which its joins are known.
        attached: How often it hooked the heads.
        parametrized: Nodes of parameters that were computed once for several uses.
        by_rows: Tensors whose rows belong to tasks, each with the tasks that own some (None: not known).
    """

    key: int
    attached: int
    parametrized: set[Node]
    by_rows: list[tuple[Any, frozenset[int] | None]]


def _twins(losses: Mapping[int, Tensor]) -> tuple[int, int] | None:
    """Two tasks that were given one and the same loss."""
    for a, b in combinations(losses, 2):
        x, y = losses[a], losses[b]
        if x is y or (x.grad_fn is not None and x.grad_fn is y.grad_fn and x.output_nr == y.output_nr):
            return a, b
    return None


def _touched(loss: Tensor, edges: Mapping[int, Sequence[Any]]) -> list[int]:
    """The tasks at whose aliases the gradient of ``loss`` is not 0."""
    flat = [edge for of_task in edges.values() for edge in of_task]
    with torch.autocast(loss.device.type, enabled=False):
        gradients = iter(torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True))
    found = []
    for j, of_task in edges.items():
        here = [g for g in (next(gradients) for _ in of_task) if g is not None]
        # 0 times an infinite slope of a loss beside it is NaN, and no cross-talk
        if any(bool(((g != 0) & g.isfinite()).any()) for g in here):
            found.append(j)
    return found


@contextmanager
def _unretained(tensors: Sequence[Tensor]) -> Iterator[None]:
    """What ``retain_grad`` keeps of these tensors is that of the one backward alone."""
    kept = [(x, x.grad) for x in tensors if x.retains_grad]
    try:
        yield
    finally:
        for x, grad in kept:
            x.grad = grad


def _owners(loss: Tensor, walk: Walk, tasks: int) -> list[int]:
    """The tasks to whose rows the gradient of ``loss`` comes; K: to rows of none."""
    edges, owners = zip(*walk.rows(), strict=True)
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        came = [rows_touched(g, rows.index, tasks) for g, rows in zip(gradients, owners, strict=True) if g is not None]
        return torch.stack(came).any(0).nonzero().flatten().tolist() if came else []


def probing_is_forbidden(models: Iterable[nn.Module], deepspeed: bool) -> str | None:
    """The engine under which a gradient cannot be asked for beside the one backward, or None."""
    if deepspeed:
        return "DeepSpeed"
    for model in models:
        for module in model.modules():
            kind = type(module).__name__
            if kind == "FullyShardedDataParallel":
                return "FSDP1"
            if hasattr(module, "unshard") and hasattr(module, "reshard"):
                return "FSDP2"
            if kind == "DistributedDataParallel" and getattr(module, "static_graph", False):
                return "DDP with static_graph"
    return None


# ---- messages where gradients are taken at parameters ------------------------------------------------------------


def _cross_talk_at_parameters(method: str, pairs: Sequence[tuple[str, str]]) -> RuntimeError:
    """Losses that read a forward of another task."""
    found = ", ".join(f"loss `{a}` reads a forward that ran in `with weighter.task({b!r}):`" for a, b in pairs)
    return RuntimeError(
        f"{method} compares the gradients of the tasks' losses, each from forwards of its own, but {found}. Compute "
        "the loss from a forward in its own `with weighter.task(…):`, or detach what it reads of the other's."
    )


def _past_the_aliases(tasks: Iterable[str]) -> str:
    """Losses that use a shared parameter outside of their task's forwards."""
    names = ", ".join(f"`{task}`" for task in tasks)
    return (
        f"Loss {names} also uses a shared parameter outside of `with weighter.task(…):` (another forward, a weight "
        "penalty, `F.linear(x, module.weight)`): training is right, but that part of its gradient is not in the "
        "statistics. Run all of its forwards in the `with`, or add the term as it is: `backward(losses, extra={name: "
        "term})`."
    )


# ---- messages where tasks own rows --------------------------------------------------------------------------------


def _rows_of_another(method: str, pairs: Sequence[tuple[str, str]]) -> RuntimeError:
    """Losses that read rows of another task."""
    found = ", ".join(f"the gradient of loss `{a}` comes to rows of `{b}`" for a, b in pairs)
    return RuntimeError(
        f"{method} compares the gradients of the tasks' losses, and `weighter.rows(z, owner)` counts what comes to a "
        f"row as its owner's, but {found}. Compute each loss from the rows of its own task alone (its mask, "
        "`ignore_index`, `output[owner == k]`), detach what it reads of the others', or correct `owner`. What mixes "
        "rows after `z` (attention, a batch norm) belongs before it."
    )


def _around_the_rows(places: Mapping[str, str]) -> str:
    """Losses that reach the trunk around the tensor whose rows belong to tasks."""
    found = ", ".join(f"loss `{task}` at the trunk's {node}" for task, node in places.items())
    return (
        f"A part of the gradient goes to the trunk around `z` in `weighter.rows(z, owner)` ({found}): it is neither in "
        "the statistics nor weighed on the shared path. Call `rows` at the last tensor that all of it passes, or add "
        "the term as it is: `backward(losses, extra={name: term})`."
    )


def _rows_of_none(tasks: Iterable[str]) -> str:
    """Losses that read rows which belong to nobody."""
    names = ", ".join(f"`{task}`" for task in tasks)
    return (
        f"The gradient of loss {names} also comes to rows that `owner` in `weighter.rows(z, owner)` gives to no task "
        "(-1): training is right, but that part of it is not in the statistics. Leave these rows out of the loss (its "
        "mask, `ignore_index`), or name their owner."
    )
