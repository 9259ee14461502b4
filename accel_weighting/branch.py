"""The branch point: one alias of the shared representation per task, whose gradients arrive apart in the one backward.

In a forward the shared representation ``z`` (one tensor, or several) is divided into one alias per task, a view without
a copy. In the one backward every task's gradient arrives at its own alias; where they come together, at the join, they
are measured, and their sum goes on to the trunk. What arrives at the vector of losses in the same backward,
``c = weight · loss scale / accumulation``, tells by how much the gradients were multiplied on the way.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from . import errors
from .gathering import Gathering
from .heads import Call, Heads
from .join import Aliases, Forward, Taps, has_history, join_of, register, same
from .parameters import SharedParameters
from .rotations import Rotations
from .rows import Rows, rows_of_features, rows_twice
from .shared_layer import SharedLayer
from .statistics import Method
from .structures import argument, can_be_shared, mapped, tensors_in
from .tracing import exporting, followed, graph_of, place

MANY = 200
"""The number of forwards without a call of `combine` after which a warning says that the losses go another way."""


def _in_transform() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad, jacrev, jvp, …) is running."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


WAITING = 1 << 20
"""With this many elements of gradients at z, each gradient is measured alone where the method needs only norms."""


def tap_above(method: Method, lag: int, at_layer: bool, cosines: bool | None) -> float:
    """Elements of all gradients together from which on each is measured alone, where norms are enough."""
    alone = method.acts_on == "losses" and not method.needs & {"gram", "moments"} and lag == 1
    if cosines or not alone or at_layer:
        return math.inf
    return 0 if cosines is False else WAITING


class Branch(Gathering):
    """The branch point: divides z, and gives what the gradients came to to the window that they belong to.

    Args:
        tasks: Task names.
        heads: The heads; None where the model calls ``branch`` itself.
        shared_layer: The layer whose output is the branch point, or None.
        rotations: The heads' rotations, or None.
        parameters: Those at which gradients are taken instead, or None.
        passes: Whether z passes as it is, undivided, since nothing is measured or weighed there.
        tap_above: Elements over all tasks from which on every gradient is measured alone, as it passes: none waits for
            the others then, and inner products are not known.
        needs_gradients: Whether the method needs what is measured here.
        warn_once: Says something the first time.
        owner: Gives the weighter, as long as it lives.

    Attributes:
        called: Tasks whose head was called in this forward.
        fed: Tasks whose head, or alias, had a history to send gradients back to.
        by_rows: Tensors of this forward whose rows belong to tasks, each with the tasks that own some (None: unknown).
        reads: The shapes of what each task shares, as its gradients came first.
        key: By which its joins are known in autograd's graph.
        attached: How often heads were hooked.
        parametrized: Nodes of parameters that were computed once in this forward, for several uses.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        heads: Heads | None = None,
        shared_layer: SharedLayer | None = None,
        rotations: Rotations | None = None,
        parameters: SharedParameters | None = None,
        passes: Callable[[], bool] = lambda: False,
        tap_above: float = math.inf,
        needs_gradients: bool = True,
        warn_once: Callable[[str, str], None] = lambda about, message: None,
        owner: Callable[[], Any] = lambda: None,
    ) -> None:
        self.tasks = tuple(tasks)
        self.heads = heads
        self.rotations = rotations
        self.owner = owner
        self.called: set[int] = set()
        self.fed: set[int] = set()
        self.by_rows: list[tuple[weakref.ref[Tensor], frozenset[int] | None]] = []
        self.shared_layer, self.parameters = shared_layer, parameters
        self._tap_above = tap_above
        self._passes, self._needs_gradients, self._warn_once = passes, needs_gradients, warn_once
        self._forward: Forward | None = None
        self._outputs: dict[int, Any] = {}
        self._handles: list[RemovableHandle] = []
        self.reads: dict[int, tuple[torch.Size, ...]] = {}
        self.parametrized: set[Any] = set()
        self.attached = self._joins = 0
        self.key = register(self)
        self._join_of_tasks = join_of(self.tasks, self.key)

    def __deepcopy__(self, memo: Any) -> Branch:
        """Returns self: a copied model (an average, a teacher) keeps using this branch and its current rotations."""
        return self

    # ---- hooks -------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hooks the heads and the shared layer."""
        self.detach()
        self.attached += 1
        if self.shared_layer is not None:
            self._handles.append(self.shared_layer.attach())
        if self.heads is not None:
            self.heads.attach(self)
            self.heads.before_every_forward(self.follow)

    def follow(self) -> list[str]:
        """Hooks the heads anew where one is no longer the module that was hooked; the tasks of which that is true."""
        moved = [] if self.heads is None else self.heads.moved()
        if moved and self.heads is not None:
            self.attach()
            self._warn_once("moved", errors.heads_moved(moved))
        return moved

    def detach(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.heads is not None:
            self.heads.detach()
        self.forget()

    def forget(self) -> None:
        """Drops what the last forward left: the open join and the heads' outputs."""
        self._forward = None
        if self.shared_layer is not None:
            self.shared_layer.forget()
        self._outputs.clear()
        self.parametrized = set()
        self._joins = 0
        self.called, self.fed = set(), set()
        self.by_rows = []
        if self.parameters is not None:
            self.parameters.used.clear()

    def before_head(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Head ``k`` is called: with its own aliases in place of what it shares with the others."""
        if not torch.compiler.is_compiling():
            self.called.add(k)
            if (alias := self._known_alias(k, args, kwargs)) is not None:
                return (alias,), kwargs
        assert self.heads is not None
        if len(args) == 1 and not kwargs and self.heads.arguments[k] is None and isinstance(args[0], Tensor):
            if not can_be_shared(args[0]):
                raise errors.head_without_input(self.tasks[k])
            return (self._alias([args[0]], k)[0],), kwargs
        shared = self._shared(k, module, args, kwargs)
        if not shared:
            if not any(can_be_shared(x) for x in tensors_in((args, kwargs))):
                raise errors.head_without_input(self.tasks[k])
            return args, kwargs
        aliases = dict(zip(map(id, shared), self._alias(shared, k), strict=True))
        call: Call = mapped((args, kwargs), lambda x: aliases.get(id(x), x))
        return call

    def _known_alias(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Head ``k``'s alias of the one tensor that it is called with, if a head of this forward had it before."""
        forward = self._forward
        if forward is None or len(args) != 1 or kwargs:
            return None
        known, _, aliases = forward.joined[0]
        if args[0] is not known or not known.requires_grad or forward.graph_task != torch._C._current_graph_task_id():
            return None
        if not torch.is_grad_enabled():
            return None
        forward.taken.add(k)
        self.fed.add(k)
        return aliases[k] if self.rotations is None else self._rotated(aliases[k], k)

    def copied_head(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The head of a copied model: rotated as the original, and no more."""
        if self.rotations is None:
            return args, kwargs
        shared = self._shared(k, module, args, kwargs)
        return mapped((args, kwargs), lambda x: self._rotated(x, k) if any(x is z for z in shared) else x)  # type: ignore[no-any-return]

    def after_head(self, k: int, output: Any) -> None:
        """What head ``k`` gave, for the path of zeros of a task without samples."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._outputs[k] = output

    def _shared(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors that head ``k`` shares with others: those with a history that it is called with, each once.

        Where its argument was named, those in it. Without gradients, where no history tells, the first that is
        floating-point.
        """
        assert self.heads is not None
        name = self.heads.arguments[k]
        given = (args, kwargs) if name is None else argument(name, self.tasks[k], module, args, kwargs)
        found = [x for x in tensors_in(given) if can_be_shared(x)]
        if self.rotations is not None and name is None and not torch.is_grad_enabled():
            return found[:1]
        if torch.is_grad_enabled():
            found = [x for x in found if has_history(x)] or [x for x in found if x.requires_grad][:1]
        return list({id(x): x for x in found}.values())

    # ---- forward -----------------------------------------------------------------------------------------------

    @followed
    def __call__(self, z: Any, mask: Tensor | None = None) -> dict[str, Any]:
        """One alias of ``z`` per task, rotated where the method rotates; rows outside of ``mask`` are not measured.

        ``z`` is a tensor, or a list, tuple, dictionary or dataclass of tensors; so is what every task gets.
        """
        if isinstance(z, Tensor):
            aliases = self._join([z], self._over_features(mask, [z]))[0]
            return {task: self._rotated(aliases[k], k) for k, task in enumerate(self.tasks)}
        zs = [x for x in tensors_in(z) if can_be_shared(x)]
        if not zs:
            raise errors.branch_without_tensor(z)
        if self.rotations is not None and len(zs) > 1:
            raise errors.several_tensors_rotated("branch")
        joined = dict(zip(map(id, zs), self._join(zs, self._over_features(mask, zs)), strict=True))

        def own(k: int) -> Any:
            return mapped(z, lambda x: self._rotated(joined[id(x)][k], k) if id(x) in joined else x)

        return {task: own(k) for k, task in enumerate(self.tasks)}

    def _over_features(self, mask: Tensor | None, zs: Sequence[Tensor]) -> Tensor | None:
        """``mask`` with a dimension of 1 where ``zs`` hold their features."""
        if mask is None:
            return None
        known = None
        if self.rotations is not None:
            known = self.rotations.dim
        elif self.shared_layer is not None:
            known = self.shared_layer.layer.features
        return [_over_features(mask, z.shape, known) for z in zs][-1]

    def rows(self, z: Tensor, owner: Tensor) -> None:
        """From here the gradient at ``z`` is measured by the owners of its rows."""
        if not torch.is_grad_enabled() or _in_transform() or self._passes() or not z.requires_grad:
            return
        if any(known() is z for known, _ in self.by_rows):
            raise rows_twice()
        rows = Rows.of(z, owner, len(self.tasks))
        inputs = None if self.shared_layer is None else self.shared_layer.input_for(z)
        if self.shared_layer is not None and self.shared_layer.layer.convolution is not None and owner.ndim > 1:
            raise rows_of_features(owner.shape)
        z.register_hook(lambda g: self.at_rows(g, rows, inputs))  # type: ignore[no-untyped-call]
        rows.mark(z, self.key)
        self.by_rows.append((weakref.ref(z), rows.owned))

    def _rotated(self, z: Tensor, k: int) -> Tensor:
        if self.rotations is None:
            return z
        if exporting() or torch._C._get_tracing_state() is not None:
            raise errors.exported_rotations()
        if torch.compiler.is_compiling():
            R = torch.ops.accel_weighting.rotation(z.detach(), self.key, k)
        else:
            R = self.rotations.matrices(z)[k]
        return self.rotations.rotated(z, R)

    def head_outputs(self, k: int) -> list[Tensor]:
        """What head ``k`` gave in the last forward, tensors with a graph only."""
        return [o for o in tensors_in(self._outputs.get(k)) if o.requires_grad]

    def _join(self, zs: Sequence[Tensor], mask: Tensor | None = None) -> list[Aliases]:
        """For every tensor one alias per task."""
        K = len(self.tasks)
        if not torch.is_grad_enabled() or _in_transform():
            return [(z,) * K for z in zs]
        return self._divided(zs, mask)

    def _divided(self, zs: Sequence[Tensor], mask: Tensor | None = None) -> list[Aliases]:
        """The same in a forward of a training."""
        K = len(self.tasks)
        with_graph = [z for z in zs if z.requires_grad]
        compiling = torch.compiler.is_compiling()
        if not with_graph or (not compiling and self._passes()):
            return [(z,) * K for z in zs]
        inputs = None
        if self.shared_layer is not None:
            if len(zs) > 1:  # each with an input of its own
                return [self._divided([z], mask)[0] for z in zs]
            inputs = self.shared_layer.input_for(zs[0])
        elif self.rotations is not None and self.rotations.cooperative:
            inputs = zs[0].detach()
        if self.heads is None and not compiling:
            self.fed.update(range(K))
            self._before_join()
        flat: tuple[Tensor, ...]
        flat = self._join_of_tasks.apply(inputs, mask, *with_graph)  # type: ignore[no-untyped-call]
        if len(zs) == 1:
            return [flat]
        divided = iter([flat[t * K : (t + 1) * K] for t in range(len(with_graph))])
        return [next(divided) if z.requires_grad else (z,) * K for z in zs]

    def _before_join(self) -> None:
        """What is to be known, or said, of a join that is not compiled."""
        if torch._C._get_tracing_state() is not None and not self._passes():
            raise errors.traced()
        if parametrize._cache_enabled:
            self.parametrized.update(w.grad_fn for w in parametrize._cache.values() if isinstance(w, Tensor))
        self._joins += 1
        if self._joins == MANY:
            self._warn_once("never combined", errors.never_combined(MANY))

    def _alias(self, zs: Sequence[Tensor], k: int) -> list[Tensor]:
        """Head ``k``'s own alias of each tensor, from one join for all that are not divided yet."""
        if self.rotations is not None and len(zs) > 1:
            raise errors.several_tensors_rotated(self.tasks[k])
        if not torch.is_grad_enabled() or _in_transform():
            return [self._rotated(z, k) for z in zs]
        if torch.compiler.is_compiling():
            return self._alias_compiled(zs, k)
        for z in zs:
            if z.requires_grad:
                self.fed.add(k)
        graph_task, forward = torch._C._current_graph_task_id(), self._forward
        missing = zs
        if forward is None or forward.graph_task != graph_task:
            forward = Forward(graph_task)
        elif (missing := [z for z in zs if forward.aliases(z) is None]) and k in forward.taken:
            forward, missing = Forward(graph_task), zs  # its head again, on something new: the next forward
        if missing:
            self._before_join()
            missing = _distinct(missing)
            divided = self._tapped(missing) or self._divided(missing)
            forward.joined += [(z, 0, aliases) for z, aliases in zip(missing, divided, strict=True)]
        forward.taken.add(k)
        self._forward = forward
        return [self._rotated(forward.alias(z, k), k) for z in zs]

    def _alias_compiled(self, zs: Sequence[Tensor], k: int) -> list[Tensor]:
        """The same in code that is compiled, where a tensor is known by its place in the trace.

        What is left here at the end of a trace is an output of the graph, so the record is dropped when every head was
        called in the graph where it began. For a head that is called again the aliases stay with the tensors that the
        trace computed, which end with it.
        """
        kept, forward = f"_aliases_{self.key}", self._forward
        places = [place(z) for z in zs]
        graph = graph_of(places)
        if forward is None or forward.graph_task != -1:
            forward = Forward(-1, graph)
        found: list[Aliases | None] = []
        for z, at in zip(zs, places, strict=True):
            aliases = forward.aliases(z, at)
            found.append(getattr(z, kept, None) if aliases is None else aliases)
        missing = [i for i, aliases in enumerate(found) if aliases is None]
        if missing and k in forward.taken:
            forward, missing = Forward(-1, graph), list(range(len(zs)))
        if missing:
            for i, aliases in zip(missing, self._join([zs[i] for i in missing]), strict=True):
                found[i] = aliases
                forward.joined.append((zs[i], places[i], aliases))
                if places[i] > 0:
                    setattr(zs[i], kept, aliases)
        forward.taken.add(k)
        dropped = forward.graph == graph and (len(forward.taken) == len(self.tasks) or not forward.joined)
        self._forward = None if dropped else forward
        return [self._rotated(aliases[k], k) for aliases in found if aliases is not None]

    def _tapped(self, zs: Sequence[Tensor]) -> Sequence[Aliases]:
        """For every tensor the aliases that are made and measured one by one; nothing where they are to be joined."""
        if self._tap_above == math.inf or torch._C._is_tracing():
            return ()
        if len(self.tasks) * sum([z.numel() for z in zs]) < self._tap_above:
            return ()
        if self._passes() or not all(z.requires_grad for z in zs):
            return ()
        return [Taps(z, self.key) for z in zs]


def _distinct(zs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each tensor once."""
    if len(zs) == 1:
        return zs
    found: list[Tensor] = []
    for z in zs:
        if not any(same(z, other) for other in found):
            found.append(z)
    return found


def _over_features(mask: Tensor, shape: torch.Size, known: int | None) -> Tensor:
    """``mask`` with a dimension of 1 at the features of a z of that ``shape``.

    Those are ``known``, or last, or, in maps of four dimensions or more, second where only that fits.

    Raises:
        ValueError: It is not of that shape, or fits in two ways.
    """
    last = len(shape) - 1
    places = [known % len(shape)] if known is not None else [last, 1] if last > 2 else [last]
    fitting = []
    for place_of in places:
        wanted = [*shape[:place_of], 1, *shape[place_of + 1 :]]
        given = mask.unsqueeze(place_of) if mask.ndim == last else mask
        if list(given.shape) == wanted:
            fitting.append(given)
    if len(fitting) == 1:
        return fitting[0]
    raise _mask_of_another_shape(mask.shape, shape, known, bool(fitting))


# ---- messages ----------------------------------------------------------------------------------------------------


def _mask_of_another_shape(mask: torch.Size, z: torch.Size, known: int | None, twice: bool) -> ValueError:
    """A mask that does not fit the shared representation, or in two ways."""
    words = f"Parameter `mask` has shape {list(mask)}, and z has shape {list(z)}. "
    if twice:
        return ValueError(
            f"{words}Whether the features are the second dimension of z or the last cannot be told. Give the mask a "
            "dimension of 1 there: `mask.unsqueeze(1)` for maps of channels, `mask.unsqueeze(-1)` for features last."
        )
    return ValueError(
        f"{words}It must say of every sample whether it counts, in the shape of z without the dimension of its "
        f"features{'' if known is None else f' ({known})'}: for z of shape [batch, tokens, features], [batch, tokens]."
    )
