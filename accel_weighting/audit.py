"""The audit: a walk over the graph of the losses in the first window, for what breaks the branch point.

Everything that a task sends to the trunk must pass its own alias, and nothing else may. The walk finds losses that
reach another task's alias, miss their own, or reach the trunk around the branch. It compares nodes of the graph, not
parameters. What it finds is a suspicion: losses that were stacked into one tensor reach each other in the graph with a
gradient of exactly 0. So cross-talk is confirmed by value before anything is raised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import errors
from .join import VIEWS

OPAQUE = re.compile(r"(CompiledFunction|CheckpointFunction|.*DifferentiableGraph|.*ScriptFunction|.*GraphModule).*")
"""Nodes in which a part of the graph, and perhaps the branch itself, is hidden."""

PASSES_PARAMETERS = re.compile(
    r"(Split\w*|Unbind|Chunk|Reshape\w*|Clone|ToCopy|Expand|Narrow|Contiguous|_?ToTorchTensor|_?FromTorchTensor"
    r"|_?Redistribute)Backward\d?"
)
"""Besides views: what stands between a parameter and the operators that use it."""

Node = Any
Place = tuple[Node, int]
"""A node of the graph and, where it passes every gradient on by itself, which; else 0."""


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
    """

    visited: int = 0
    crossed: list[tuple[str, str]] = field(default_factory=list)
    suspected: list[tuple[str, str]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    passed_by: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    apart: list[tuple[str, str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """In words, one line each; none where all is well and all was seen."""
        return [
            *(f"loss `{a}` reaches the alias of `{b}`" for a, b in self.crossed),
            *(f"loss `{a}` may reach the alias of `{b}` (the graph says so)" for a, b in self.suspected),
            *(f"loss `{task}` does not reach an alias of its own" for task in self.missed),
            *(f"loss `{task}` reaches the trunk around the branch, at {node}" for task, node in self.passed_by.items()),
            *(f"nothing was seen of loss `{task}` inside of {node}" for task, node in self.hidden.items()),
            *(f"`{a}` and `{b}` share tensors of different depths or shapes" for a, b in self.apart),
        ]


class Audit:
    """Looks once at the graph of every task's loss, and again where its head has changed.

    Args:
        tasks: Task names.
        method: The method, as it is printed.
        shared: Whether its weights act on the shared path.
        warn_once: Says something the first time.
        forbids: Why no gradient can be asked for beside the one backward (an engine's name), or None.

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
    ) -> None:
        self.findings: Findings | None = None
        self._tasks, self._method, self._shared = tuple(tasks), method, shared
        self._warn_once, self._forbids = warn_once, forbids
        self._seen: set[int] = set()
        self._attached: int | None = None

    def look(self, losses: Mapping[str, Tensor], present: frozenset[int], branch: Walked) -> None:
        """Looks at the losses of a micro-batch, unless all of them were looked at since heads last changed.

        Raises:
            RuntimeError: A loss sends a gradient to another task's alias.
            ValueError: One loss was given under two names.
        """
        if present <= self._seen and self._attached == branch.attached:
            return
        if self._attached != branch.attached:
            self._seen.clear()
        self._seen |= present
        self._attached = branch.attached
        named = {k: losses[self._tasks[k]] for k in sorted(present)}
        if twins := _twins(named):
            raise errors.one_loss_under_two_names([self._tasks[k] for k in twins])
        walk = _Walk(branch.key, len(self._tasks), branch.parametrized)
        self.findings = found = self._judged(walk, named)
        self._say(found)

    def _judged(self, walk: _Walk, losses: Mapping[int, Tensor]) -> Findings:
        walk.down(losses.values())
        name, found = self._tasks.__getitem__, Findings(visited=walk.visited)
        for k, loss in losses.items():
            above, reach = walk.above(loss), walk.reach(loss)
            if above.hidden is not None:
                found.hidden[name(k)] = above.hidden
            if above.derivatives:
                continue  # which the backward refuses, in words of its own
            if walk.joins and not reach >> k & 1 and above.hidden is None:
                found.missed.append(name(k))
            if above.trunk is not None:
                found.passed_by[name(k)] = above.trunk
            if foreign := [j for j in range(len(self._tasks)) if j != k and reach >> j & 1]:
                self._ask(walk, k, loss, foreign, found)
        found.apart.extend((name(a), name(b)) for a, b in walk.apart(list(losses)))
        return found

    def _ask(self, walk: _Walk, k: int, loss: Tensor, foreign: Sequence[int], found: Findings) -> None:
        """Whether the gradient of loss ``k`` at foreign aliases is more than 0."""
        name = self._tasks.__getitem__
        if (engine := walk.forbids or self._forbids()) is not None:
            pairs = [(name(k), name(j)) for j in foreign]
            found.suspected.extend(pairs)
            self._warn_once("cross-talk", errors.suspected_cross_talk(self._method, pairs, engine))
            return
        for j in _touched(loss, {j: walk.edges(j) for j in foreign}):
            found.crossed.append((name(k), name(j)))

    def _say(self, found: Findings) -> None:
        if found.crossed:
            raise errors.cross_talk(self._method, found.crossed)
        if found.passed_by:
            self._warn_once("by-pass", errors.by_pass(self._method, found.passed_by, self._shared))
        if found.apart:
            self._warn_once("depths", errors.different_depths(self._method, found.apart))


class Walked(Protocol):
    """What the audit reads of a branch.

    Attributes:
        key: By which its joins are known.
        attached: How often it hooked the heads.
        parametrized: Nodes of parameters that were computed once for several uses.
    """

    key: int
    attached: int
    parametrized: set[Node]


@dataclass
class Above:
    """What a loss reaches without passing the branch.

    Attributes:
        hidden: What hides a part of the graph, or None.
        trunk: A node of the trunk, or None.
        derivatives: Whether it contains a gradient that passed the branch.
    """

    hidden: str | None = None
    trunk: str | None = None
    derivatives: bool = False


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


class _Walk:
    """The graph of some losses, every node visited once, without recursion.

    Args:
        key: Of the branch whose joins are looked for.
        tasks: K.
        parametrized: Nodes of parameters that were computed once for several uses.
    """

    def __init__(self, key: int, tasks: int, parametrized: set[Node]) -> None:
        self.joins: dict[Node, None] = {}  # in the order of the walk
        self.forbids: str | None = None
        self._key, self._tasks = key, tasks
        self._parametrized = parametrized
        self._children: dict[Place, list[Place]] = {}
        self._order: list[Place] = []  # children come before their parents
        self._hidden: dict[Place, str] = {}
        self._reach: dict[Place, int] = {}
        self._below: set[Place] = set()

    @property
    def visited(self) -> int:
        """How many nodes were come to."""
        return len(self._children)

    # ---- walking -----------------------------------------------------------------------------------------------

    def down(self, losses: Iterable[Tensor]) -> None:
        """Walks from the losses to the leaves, and sums up what can be reached from where."""
        roots = [_place(loss.grad_fn, loss.output_nr) for loss in losses if loss.grad_fn is not None]
        for root in roots:
            self._visit(root)
        self._mark_below()
        for place in self._order:
            self._sum_up(place)

    def _visit(self, root: Place) -> None:
        """Adds what is below ``root`` and was not visited yet."""
        if root in self._children:
            return
        stack: list[tuple[Place, int]] = [(root, 0)]
        self._open(root)
        while stack:
            place, i = stack.pop()
            children = self._children[place]
            while i < len(children) and children[i] in self._children:
                i += 1
            if i == len(children):
                self._order.append(place)
                continue
            stack.append((place, i + 1))
            stack.append((children[i], 0))
            self._open(children[i])

    def _open(self, place: Place) -> None:
        node = place[0]
        name = node.name()
        if name.endswith("JoinBackward") and node.key == self._key:
            self.joins[node] = None
        elif OPAQUE.fullmatch(name):
            self._hidden[place] = name.removesuffix("Backward")
        elif name == "_DDPSinkBackward" and getattr(node.ddp_weakref(), "static_graph", False):
            self.forbids = "DDP with static_graph"
        self._children[place] = _children(place, name)

    def _mark_below(self) -> None:
        """What the joins' inputs were computed from."""
        todo = [child for place in self._children if place[0] in self.joins for child in self._children[place]]
        while todo:
            place = todo.pop()
            if place not in self._below:
                self._below.add(place)
                todo += self._children[place]

    def _sum_up(self, place: Place) -> None:
        """Which aliases can be reached from here: bit k for task k."""
        reach = 0
        for child in self._children[place]:
            reach |= self._reach[child]
        if place[0] in self.joins:
            reach |= 1 << place[1] % self._tasks
        self._reach[place] = reach

    # ---- reading -----------------------------------------------------------------------------------------------

    def reach(self, loss: Tensor) -> int:
        """The tasks whose aliases a loss reaches."""
        return self._reach[_place(loss.grad_fn, loss.output_nr)]

    def edges(self, task: int) -> list[Any]:
        """Where gradients of this task's aliases arrive."""
        edge = torch.autograd.graph.GradientEdge
        return [edge(join, t * self._tasks + task) for join in self.joins for t in range(join.tensors)]

    def above(self, loss: Tensor) -> Above:
        """What a loss reaches without passing the branch, to where the trunk begins."""
        found, todo, seen = Above(), [_place(loss.grad_fn, loss.output_nr)], set[Place]()
        while todo:
            place = todo.pop()
            if place in seen or place[0] in self.joins:
                continue
            seen.add(place)
            if place in self._hidden:
                found.hidden = self._hidden[place]
            elif place in self._below:
                if not self._is_of_parameters(place):
                    found.trunk = re.sub(r"Backward\d?$", "", place[0].name())
            else:
                found.derivatives |= place[0].name() == "_InnerSumBackward"
                todo += self._children[place]
        return found

    def _is_of_parameters(self, place: Place) -> bool:
        """Whether a node is a parameter, as it is or cut, cast or computed once for many uses; or trains nothing."""
        if place[0] in self._parametrized:
            return True
        leaves, plain, todo, seen = 0, True, [place], {place}
        while todo:
            here = todo.pop()
            name = here[0].name()
            if name.endswith("AccumulateGrad"):
                leaves += isinstance(here[0].variable, nn.Parameter)
            elif not (VIEWS.fullmatch(name) or PASSES_PARAMETERS.fullmatch(name)):
                plain = False
            new = [child for child in self._children[here] if child not in seen]
            seen.update(new)
            todo += new
        return leaves == 0 or (plain and leaves == 1)

    # ---- depths ------------------------------------------------------------------------------------------------

    def apart(self, tasks: Sequence[int]) -> list[tuple[int, int]]:
        """Pairs of tasks that meet in no join, whose tensors lie one upstream of the other or differ in shape."""
        if len(self.joins) < 2:
            return []
        own = {k: [join for join in self.joins if self._came(join, k)] for k in tasks}
        found = []
        for a, b in combinations(tasks, 2):
            met = any(join in own[b] for join in own[a])
            if not met and any(self._differ(x, y) for x in own[a] for y in own[b]):
                found.append((a, b))
        return found

    def _came(self, join: Node, task: int) -> bool:
        return any((join, t * self._tasks + task) in self._children for t in range(join.tensors))

    def _differ(self, x: Node, y: Node) -> bool:
        bases_x, bases_y = self._bases(x), self._bases(y)
        if bases_x == bases_y:  # views of one tensor: their gradients are of one length
            return False
        return (
            self._shapes(x) != self._shapes(y)
            or self._is_upstream(bases_x, bases_y)
            or self._is_upstream(bases_y, bases_x)
        )

    def _shapes(self, join: Node) -> list[Any]:
        """Of the tensors that a join divides; torch before 2.5 does not tell."""
        known = getattr(join, "_input_metadata", ())
        return [alias.shape for alias in known[:: self._tasks]]

    def _inputs(self, join: Node) -> list[Place]:
        place = next(place for place in self._children if place[0] is join)
        return self._children[place]

    def _bases(self, join: Node) -> set[Place]:
        """What a join's tensors are, or are views of."""
        bases = set()
        for place in self._inputs(join):
            while VIEWS.fullmatch(place[0].name()) and self._children[place]:
                place = self._children[place][0]
            bases.add(place)
        return bases

    def _is_upstream(self, bases: set[Place], of: set[Place]) -> bool:
        todo, seen = list(of), set(of)
        while todo:
            for child in self._children[todo.pop()]:
                if child in bases:
                    return True
                if child not in seen:
                    seen.add(child)
                    todo.append(child)
        return False


def _place(node: Node, output: int) -> Place:
    return node, output if node.name().endswith(_BY_OUTPUT) else 0


_BY_OUTPUT = ("JoinBackward", "_DDPSinkBackward", "UnbindBackward0")
"""Nodes whose outputs are told apart."""


def _children(place: Place, name: str) -> list[Place]:
    """Where a node sends gradients to."""
    node, output = place
    edges = node.next_functions
    if name.endswith("JoinBackward"):
        edges = edges[-node.tensors :]
    elif name == "_DDPSinkBackward":
        edges = edges[output : output + 1]
    elif name in ("UnbindBackward0", "SelectBackward0"):
        edges = _of_a_stack(node, output, name) or edges
    return [_place(*edge) for edge in edges if edge[0] is not None]


def _of_a_stack(node: Node, output: int, name: str) -> Any:
    """What was stacked, where an entry of a stack is taken out again along the same dimension."""
    stack = node.next_functions[0][0]
    if stack is None or stack.name() != "StackBackward0" or stack._saved_dim != node._saved_dim:
        return None
    index = output if name == "UnbindBackward0" else node._saved_index
    stacked = stack.next_functions
    return (stacked[index if index < len(stacked) else index - (1 << 64)],)  # -1 is kept without its sign
