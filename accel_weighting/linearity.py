"""Whether a total is linear in the coefficients that it was made of.

Only then is its slope in a coefficient the loss. A total's value and slopes at one place cannot tell, since it may hold
parts without coefficients. The graph can, where it multiplies each loss once and adds up; where it does something else
(a power, a logarithm, coefficients divided by their sum) the second derivatives are asked for, once. The way from a
total to its coefficients holds no part of a model but the last sums, so that this takes next to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .join import VIEWS
from .walk import OPAQUE, PASSES_PARAMETERS, Node, is_foreign

SUMS = re.compile(r"(Add|Sub|Rsub|Neg|Sum|Mean|Stack|Cat|Index|Where|Copy|_DDPSink)Backward\d?|CopySlices")
"""Nodes that are linear in all of their inputs together."""

PRODUCTS = re.compile(r"(Mul|Div|Dot|Mv|Mm|Bmm)Backward\d?")
"""Nodes that are linear in each input alone; of a division in the first."""

CURVED = 0.01
"""What the slope of a coefficient's contribution changes with a coefficient, in parts of it, that rounding cannot."""

NOISE = 1e-6
"""The same in parts of the largest contribution."""


def curved_in(total: Tensor, weights: Mapping[str, Tensor], forbids: Callable[[], str | None]) -> list[str]:
    """The tasks in whose coefficients a total is not linear, as far as that can be seen.

    Args:
        total: The total, ``[]``, with its graph.
        weights: ``{task: coefficient}``.
        forbids: Why no gradient can be asked for beside the one backward, or None.
    """
    leaves = {torch.autograd.graph.get_gradient_edge(weight).node for weight in weights.values()}
    way = [] if total.grad_fn is None else _way(total.grad_fn, leaves)
    names = [node.name() for node, _ in way]
    if all(_is_linear(name, places) for name, (_, places) in zip(names, way, strict=True)):
        return []
    if any(OPAQUE.fullmatch(name) or is_foreign(node) for name, (node, _) in zip(names, way, strict=True)):
        return []
    return [] if forbids() is not None else _asked(total, weights)


def _way(root: Node, leaves: set[Node]) -> list[tuple[Node, list[int]]]:
    """The nodes from which a leaf is reached, each with the places of the inputs that lead there."""
    reaches, found = dict.fromkeys(leaves, True), []
    todo = [(root, False)]
    while todo:
        node, is_through = todo.pop()
        inputs = [child for child, _ in node.next_functions]
        if is_through:
            if places := [i for i, child in enumerate(inputs) if child is not None and reaches[child]]:
                reaches[node] = True
                found.append((node, places))
        elif node not in reaches:
            reaches[node] = False
            todo.append((node, True))
            todo += [(child, False) for child in inputs if child is not None]
    return found


def _is_linear(name: str, places: list[int]) -> bool:
    """Whether a node is linear in those of its inputs."""
    if PRODUCTS.fullmatch(name):
        return places == [0] or (len(places) == 1 and not name.startswith("Div"))
    return any(kind.fullmatch(name) for kind in (SUMS, VIEWS, PASSES_PARAMETERS))


def _asked(total: Tensor, weights: Mapping[str, Tensor]) -> list[str]:
    """The same by second and third derivatives; what cannot be differentiated so often is not known.

    The third are for where the second are 0 by chance: a softmax of two equal coefficients.
    """
    leaves = list(weights.values())
    w = torch.stack([weight.detach() for weight in leaves])
    uneven = w / torch.arange(1, len(w) + 1, dtype=w.dtype, device=w.device)
    changes = []
    try:
        with torch.enable_grad(), torch.autocast(total.device.type, enabled=False):
            slopes = _derivatives(total, leaves)
            for slope in slopes:
                second = _derivatives(slope, leaves)
                third = _derivatives(second @ uneven, leaves)
                both = torch.stack([second.detach() * w, third.detach() * w])
                changes.append(torch.cat([both, both.sum(1, keepdim=True)], 1))
    except RuntimeError:
        return []
    contributions = (w * slopes.detach()).abs()
    allowed = CURVED * contributions + NOISE * contributions.max()
    largest = (w * torch.stack(changes).abs().amax((1, 2))).abs()
    return [task for task, is_curved in zip(weights, (largest > allowed).tolist(), strict=True) if is_curved]


def _derivatives(x: Tensor, leaves: list[Tensor]) -> Tensor:
    """Of a number in the coefficients, ``[K]``, to be differentiated further; zeros where it does not depend on one."""
    if not x.requires_grad:
        return torch.zeros(len(leaves), dtype=leaves[0].dtype, device=leaves[0].device)
    options: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.stack(torch.autograd.grad(x, leaves, **options))
