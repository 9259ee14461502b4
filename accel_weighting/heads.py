"""The heads: which modules they are, the hooks on them, and that they stay the modules that are called.

A head is hooked where it is called. Adapters are wrapped round heads, heads are replaced, engines replace modules: so
names are looked up again and the modules found are compared with those hooked, before forwards and at every step.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import checks, errors
from .modules import Link, heads_by_task, holder, holds, links_on_the_way, name_of
from .tracing import followed

HeadSpec = nn.Module | str | tuple[nn.Module | str, str]
"""A head: a module, its dotted name, or one of them with the name of the argument that is the shared representation."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Hooked(Protocol):
    """The branch, as the hooks on heads see it."""

    owner: Callable[[], Any]
    rotations: Any

    def before_head(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Returns the arguments that head ``k`` is called with instead of these."""

    def after_head(self, k: int, output: Any) -> None:
        """Notes the output of head ``k``."""

    def copied_head(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Like ``before_head`` for the head of a copied model, which is rotated and not measured."""


class _Hook:
    """A hook that explains why its model cannot be scripted or pickled."""

    @property
    def __name__(self) -> str:
        """Asked for by ``torch.jit.script``."""
        raise errors.hooks_are_not_scripted()

    def __reduce__(self) -> Any:
        raise errors.hooks_are_not_pickled()


class _Before(_Hook):
    """The forward pre-hook of head ``k``. On a copied model (a teacher, an average) it only rotates."""

    def __init__(self, hooked: Hooked, k: int, copied: bool = False) -> None:
        self.hooked, self._k, self.copied = hooked, k, copied
        self._call = hooked.copied_head if copied else hooked.before_head
        self.keeps = None if copied else hooked.owner()  # the weighter lives as long as a model that it is hooked to

    @followed
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if _STATE in module.__dict__ and not torch.compiler.is_compiling():
            module.__dict__[_STATE] = _CALLED
        call = self._call(self._k, module, args, kwargs or {})
        return call[0] if kwargs is None else call  # torch gives no kwargs to a hook that was removed in this very call

    def __deepcopy__(self, memo: Any) -> _Before:
        return _Before(self.hooked, self._k, copied=True)


_STATE = "_accel_weighting_forward"
"""Where a rotated head notes whether it is idle, called as a module, or running."""

_IDLE, _CALLED, _RUNNING = range(3)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The ``forward`` of a rotated head: ``head.forward(z)`` by hand is ``head(z)``, which rotates."""
    if torch.compiler.is_compiling():
        return type(self).forward(self, *args, **kwargs)
    entered = self.__dict__[_STATE]
    if entered == _IDLE:
        self.__dict__[_STATE] = _CALLED  # whatever became of the hooks, once is enough
        return self(*args, **kwargs)
    self.__dict__[_STATE] = _RUNNING  # and may call itself
    try:
        return type(self).forward(self, *args, **kwargs)
    finally:
        if entered == _CALLED:
            self.__dict__[_STATE] = _IDLE


def _route_forward(head: nn.Module) -> None:
    """As a bound method, which a copy of the module rebinds to itself."""
    if "forward" not in head.__dict__:  # somebody else's stays
        head.__dict__.update({_STATE: _IDLE, "forward": types.MethodType(_forward, head)})


def _leave_forward(head: nn.Module | None) -> None:
    if head is not None and head.__dict__.pop(_STATE, None) is not None:
        del head.__dict__["forward"]


class _Follow(_Hook):
    """The forward pre-hook of the model. On a copied model it does nothing."""

    def __init__(self, follow: Callable[[], Any] | None) -> None:
        self._follow = follow

    @followed
    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._follow is not None and not torch.compiler.is_compiling():
            self._follow()

    def __deepcopy__(self, memo: Any) -> _Follow:
        return _Follow(None)


class _After(_Hook):
    """The forward hook of head ``k``. On a copied model it does nothing."""

    def __init__(self, hooked: Hooked, k: int, copied: bool = False) -> None:
        self._hooked, self._k, self._copied = hooked, k, copied

    @followed
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._copied:
            self._hooked.after_head(self._k, output)

    def __deepcopy__(self, memo: Any) -> _After:
        return _After(self._hooked, self._k, copied=True)


class Heads:
    """The heads of one weighter. Neither modules nor model are kept alive.

    Args:
        tasks: Task names.
        given: ``{task: module, dotted name, or either with an argument's name}``.
        model: Where names are looked up, and modules' names found; or None.

    Raises:
        ValueError: A name leads nowhere, or two tasks have one head.
    """

    def __init__(self, tasks: Sequence[str], given: Mapping[str, HeadSpec], model: nn.Module | None) -> None:
        self.tasks = tuple(tasks)
        self.arguments = [head[1] if isinstance(head := given[task], tuple) else None for task in tasks]
        plain = {task: head[0] if isinstance(head := given[task], tuple) else head for task in tasks}
        self._model = None if model is None else weakref.ref(model)
        modules = heads_by_task(tasks, plain, model)
        checks.heads_are_distinct(modules, tasks)
        self._modules = [weakref.ref(module) for module in modules]
        names = (plain[task] for task in tasks)
        self._names = [
            name if isinstance(name, str) else None if model is None else name_of(name, model) for name in names
        ]
        named = [] if model is None else [holder(name, model) for name in self._names if name is not None]
        self._holders = list({id(module): weakref.ref(module) for module in named}.values())
        self._hooked: list[weakref.ref[nn.Module]] = []
        self._links: list[list[Link]] = [[] for _ in tasks]
        self._handles: list[RemovableHandle] = []

    def find(self) -> list[nn.Module]:
        """The modules in task order: those that the names lead to now, else those that were given."""
        model = self._looked_up_in()
        found: dict[str, nn.Module | str] = {}
        for task, name, module in zip(self.tasks, self._names, self._modules, strict=True):
            given = module()
            if name is not None and model is not None:
                found[task] = name
            elif given is not None:
                found[task] = given
            else:
                raise errors.model_is_gone()
        return heads_by_task(self.tasks, found, model)

    def branches(self) -> list[Any]:
        """What is hooked to these heads already."""
        hooks = (hook for head in self.find() for hook in head._forward_pre_hooks.values())
        return list({id(h.hooked): h.hooked for h in hooks if isinstance(h, _Before) and not h.copied}.values())

    @property
    def labels(self) -> list[str]:
        """What to call each head: its name in the model, or its class."""
        modules = (ref() for ref in self._modules)
        pairs = zip(self._names, modules, strict=True)
        return [name or ("gone" if module is None else type(module).__name__) for name, module in pairs]

    def check_apart(self) -> None:
        """No head is a part of another.

        Raises:
            ValueError: One is.
        """
        tasks = {id(module): task for task, module in zip(self.tasks, self.find(), strict=True)}
        for task, module in zip(self.tasks, self.find(), strict=True):
            for part in module.modules():
                if part is not module and id(part) in tasks:
                    raise errors.head_inside_a_head(task, tasks[id(part)])

    def are_in(self, models: Iterable[nn.Module]) -> bool:
        """Whether all heads are parts of these models."""
        parts = {id(module) for model in models for module in model.modules()}
        return all(id(head) in parts for head in self.find())

    # ---- hooks -------------------------------------------------------------------------------------------------

    def attach(self, hooked: Hooked) -> None:
        """Hooks the heads, in front of whatever an engine hooked there.

        Engines hand every head an alias of z of its own (FSDP2 and ZeRO-3 in forward pre-hooks); only a hook that runs
        before theirs sees that the heads share one z.
        """
        self.detach()
        modules = self.find()
        for k, head in enumerate(modules):
            self._handles += (
                head.register_forward_pre_hook(_Before(hooked, k), prepend=True, with_kwargs=True),
                head.register_forward_hook(_After(hooked, k)),
            )
            if hooked.rotations is not None:
                _route_forward(head)
        self._hooked = [weakref.ref(module) for module in modules]
        model = self._looked_up_in()
        self._links = [links_on_the_way(name, model) for name in self._names]

    def detach(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for ref in self._hooked:
            _leave_forward(ref())
        self._hooked, self._links = [], [[] for _ in self.tasks]

    def moved(self) -> list[str]:
        """Tasks whose head is no longer the module that was hooked."""
        return [self.tasks[k] for k, links in enumerate(self._links) if links and not all(map(holds, links))]

    def attach_again_at_first_forward(self, hooked: Hooked, ready: Callable[[], bool]) -> None:
        """Hooks the heads once more at the first forward of a module with a head in it, once it is ``ready``.

        An engine's own hooks are there by then, and so are adapters that were wrapped round the heads.
        """
        alive, target = weakref.ref(self), weakref.ref(hooked)

        def first_forward(module: nn.Module, args: tuple[Any, ...]) -> Any:
            heads, found = alive(), target()
            if torch.compiler.is_compiling() or heads is None or found is None or not ready():
                return None
            if not heads._is_part_of(module):
                return None
            handle.remove()
            return heads._attach_in(module, args, found) if handle in heads._handles else None

        handle = nn.modules.module.register_module_forward_pre_hook(first_forward)
        self._handles.append(handle)
        weakref.finalize(self, handle.remove)

    def _attach_in(self, module: nn.Module, args: tuple[Any, ...], hooked: Hooked) -> Any:
        """Hooks the heads in a forward of ``module`` that has begun; its arguments, if it is a head itself."""
        before = [ref() for ref in self._hooked]
        self.attach(hooked)
        for k, ref in enumerate(self._hooked):
            if ref() is module and module not in before and args:
                return hooked.before_head(k, module, args, {})[0]  # its own new hook comes too late for this call
        return None

    def before_every_forward(self, follow: Callable[[], Any]) -> None:
        """Calls ``follow`` before every forward of the model in which names are looked up."""
        models = [] if self._model is None else [ref() for ref in (self._model, *self._holders)]
        for model in {id(model): model for model in models if model is not None}.values():
            self._handles.append(model.register_forward_pre_hook(_Follow(follow)))

    def _looked_up_in(self) -> nn.Module | None:
        """The model in which names are looked up; what it wrapped, where it was a wrapper that is gone."""
        model = None if self._model is None else self._model()
        return self._holders[0]() if model is None and len(self._holders) == 1 else model

    def _is_part_of(self, module: nn.Module) -> bool:
        """Whether a head, hooked or found now, is in the module."""
        try:
            heads = {id(head) for head in (*(ref() for ref in self._hooked), *self.find())}
        except RuntimeError:  # the model is gone
            return False
        return any(id(part) in heads for part in module.modules())
