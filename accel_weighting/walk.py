"""The graph of some losses, as autograd keeps it: what is reached from where, and what stands between.

Nodes are compared, not parameters; every node is visited once, without recursion.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from .aliases import KEY
from .join import VIEWS
from .rows import KEY as ROWS
from .rows import Rows

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


class Walk:
    """The graph of some losses, every node visited once, without recursion.

    Args:
        key: Of the branch whose joins are looked for.
        tasks: K.
        parametrized: Nodes of parameters that were computed once for several uses.
        at_parameters: Whether tasks part at aliases of parameters; what is below those is a parameter itself.
        by_rows: Whether there are tensors whose rows belong to tasks; bit K of what is reached stands for them.
    """

    def __init__(
        self, key: int, tasks: int, parametrized: set[Node], at_parameters: bool = False, by_rows: bool = False
    ) -> None:
        self.joins: dict[Node, None] = {}  # in the order of the walk
        self.forbids: str | None = None
        self._key, self._tasks, self._at_parameters = key, tasks, at_parameters
        self._parametrized, self._by_rows = parametrized, by_rows
        self._rows: dict[Node, dict[int, Rows]] = {}
        self._children: dict[Place, list[Place]] = {}
        self._order: list[Place] = []  # children come before their parents
        self._hidden: dict[Place, str] = {}
        self._reach: dict[Place, int] = {}
        self._below: set[Place] = set()

    @property
    def visited(self) -> int:
        """The number of nodes that were reached."""
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
        if self._by_rows and (rows := node.metadata.get((ROWS, self._key))) is not None:
            self.joins[node], self._rows[node] = None, rows
        elif self._parts(node, name):
            self.joins[node] = None
        elif OPAQUE.fullmatch(name) or (self._by_rows and is_foreign(node)):
            self._hidden[place] = name.removesuffix("Backward")
        elif name == "_DDPSinkBackward" and getattr(node.ddp_weakref(), "static_graph", False):
            self.forbids = "DDP with static_graph"
        elif name == "RegisterPostBackwardFunctionBackward":
            self.forbids = "FSDP2"
        self._children[place] = _children(place, name)

    def _parts(self, node: Node, name: str) -> bool:
        """Whether tasks part at a node."""
        if self._at_parameters:
            return VIEWS.fullmatch(name) is not None and (KEY, self._key) in node.metadata
        return name.endswith(_POINTS) and bool(node.key == self._key)

    def _mark_below(self) -> None:
        """What the joins' inputs were computed from."""
        todo = [child for place in self._children if place[0] in self.joins for child in self._children[place]]
        while todo:
            place = todo.pop()
            if place not in self._below:
                self._below.add(place)
                todo += self._children[place]

    def _task(self, place: Place) -> int:
        """Whose alias an output of a join, or a tap, is."""
        node, output = place
        return output % self._tasks if _is_join(node) else self._of_one(node)

    def _of_one(self, node: Node) -> int:
        """The task of a tap, or of an alias of a parameter."""
        return int(node.metadata[KEY, self._key] if self._at_parameters else node.k)

    def _sum_up(self, place: Place) -> None:
        """Which aliases can be reached from here: bit k for task k."""
        reach = 0
        for child in self._children[place]:
            reach |= self._reach[child]
        if place[0] in self._rows:
            reach |= 1 << self._tasks
        elif place[0] in self.joins:
            reach |= 1 << self._task(place)
        self._reach[place] = reach

    # ---- reading -----------------------------------------------------------------------------------------------

    def reach(self, loss: Tensor) -> int:
        """The tasks whose aliases a loss reaches, bit k for task k, and bit K for tensors by rows."""
        return self._reach[_place(loss.grad_fn, loss.output_nr)]

    def rows(self) -> list[tuple[Any, Rows]]:
        """Where gradients of tensors arrive whose rows belong to tasks, and whose they are."""
        edge = torch.autograd.graph.GradientEdge
        return [(edge(node, i), rows) for node, by_output in self._rows.items() for i, rows in by_output.items()]

    def edges(self, task: int) -> list[Any]:
        """Where gradients of this task's aliases arrive."""
        edge, found = torch.autograd.graph.GradientEdge, []
        for node in self._aliased():
            if _is_join(node):
                found += [edge(node, t * self._tasks + task) for t in range(node.tensors)]
            elif self._of_one(node) == task:
                found.append(edge(node, 0))
        return found

    def _aliased(self) -> list[Node]:
        """Where tasks part by aliases."""
        return [node for node in self.joins if node not in self._rows]

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
                if self._at_parameters or not self._is_of_parameters(place):
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
        """Pairs of tasks that share no tensor, and whose tensors lie one upstream of the other or differ in shape.

        Views of one tensor are that tensor: gradients are of one length there.
        """
        joins = self._aliased()
        if len(joins) < 2:
            return []
        own = {k: [join for join in joins if self._came(join, k)] for k in tasks}
        found = []
        for a, b in combinations(tasks, 2):
            met = any(x is y or self._bases(x) == self._bases(y) for x in own[a] for y in own[b])
            if not met and any(self._differ(x, y) for x in own[a] for y in own[b]):
                found.append((a, b))
        return found

    def _came(self, join: Node, task: int) -> bool:
        if not _is_join(join):
            return self._of_one(join) == task
        return any((join, t * self._tasks + task) in self._children for t in range(join.tensors))

    def _differ(self, x: Node, y: Node) -> bool:
        bases_x, bases_y = self._bases(x), self._bases(y)
        return (
            self._shapes(x) != self._shapes(y)
            or self._is_upstream(bases_x, bases_y)
            or self._is_upstream(bases_y, bases_x)
        )

    def _shapes(self, join: Node) -> list[Any]:
        """Of the tensors that a join divides; torch before 2.5 does not tell."""
        known = getattr(join, "_input_metadata", ())
        return [alias.shape for alias in known[:: self._tasks]]  # a tap has one

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


_POINTS = ("JoinBackward", "_TapBackward")
"""Where tasks part: at one join of all, or at a tap for each."""


def is_foreign(node: Node) -> bool:
    """Whether a backward is somebody's own Python, which may not bear to run twice (some change what they saved)."""
    function = getattr(node, "_forward_cls", None)
    return function is not None and function.__module__.split(".")[0] not in ("torch", __package__)


def _is_join(node: Node) -> bool:
    return str(node.name()).endswith("JoinBackward")


_BY_OUTPUT = ("JoinBackward", "_DDPSinkBackward", "UnbindBackward0")
"""Nodes whose outputs are treated as different tensors."""


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
