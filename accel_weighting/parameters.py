"""Parameters at which gradients are taken: which they are, who holds them, and where their gradients lie in a row.

Where no tensor is shared (a forward for each task, losses on derivatives), parameters are. They are known by their
names in a model, since engines put other parameters in their place.
"""

from __future__ import annotations

import difflib
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .aliases import Aliases, Receive
from .modules import Link, holds, inner_name, links_on_the_way, locate, parameter_names, unwrapped

MANY = 10_000_000
"""Numbers in the all-reduce above which something is said."""

SMALLEST = 1e-6
"""What a loss is multiplied by at least, in absolute value, so that its gradient can be divided by it."""


@dataclass(eq=False)
class _Shared:
    """One shared parameter.

    Attributes:
        label: Its name in the model, as far as that is known.
        shape: Of the whole parameter, however an engine divides it.
        numbers: How many real numbers it has.
        start: Its first place in a task's row.
        named: Whether the label is a name to look it up by.
        given: The parameter itself where it was given, and no name of it is known.
        model: The model in which the label is its name, another network of the same class is not; or None.
        owners: The modules that hold it, and under which attribute.
        links: The modules on the way to the first of them.
    """

    label: str
    shape: tuple[int, ...]
    numbers: int
    start: int
    named: bool
    given: Callable[[], Tensor | None]
    model: weakref.ref[nn.Module] | None = None
    owners: list[tuple[weakref.ref[nn.Module], str]] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)


class SharedParameters:
    """The shared parameters of one weighter. Neither they nor their modules are kept alive.

    Args:
        given: Names or parameters.
        model: Where names are looked up, and the names of parameters found; or None.
        prepared: The models that an accelerator has prepared by now, in which they are looked for too.
        tasks: Task names.

    Attributes:
        used: The shared parameters that the forwards since the last ``combine`` used, by task.

    Raises:
        TypeError, ValueError: ``given`` breaks a rule.
    """

    def __init__(
        self,
        given: Any,
        model: nn.Module | None,
        prepared: Callable[[], Sequence[nn.Module]],
        tasks: Sequence[str],
    ) -> None:
        if isinstance(given, (str, Tensor, nn.Module)) or not isinstance(given, Iterable):
            raise _no_list(given)
        self.used: dict[int, set[int]] = {}
        self._tasks = tuple(tasks)
        self._model = None if model is None else weakref.ref(model)
        self._prepared = prepared
        self._seen: tuple[int, ...] | None = None
        self._task: int | None = None
        self._shared: list[_Shared] = []
        for one in given:
            self._add(one, model)
        if not self._shared:
            raise _no_list([])
        if (size := len(tasks) * self.numbers) > MANY:
            warnings.warn(_many(size, len(tasks), self.numbers), stacklevel=4)

    def _add(self, one: Any, model: nn.Module | None) -> None:
        if not isinstance(one, (str, nn.Parameter)):
            raise _no_parameter(one)
        where = model
        if isinstance(one, str):
            if model is None:
                raise _name_without_model(one)
            label, parameter = _find(one, model)
        else:
            (label, where), parameter = self._name(one), one
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise _lazy(label)
        if not parameter.requires_grad:
            raise _frozen(label)
        if any(other.given() is parameter for other in self._shared):
            raise _twice(label)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # DeepSpeed leaves an empty tensor in its place
        numbers = math.prod(shape) * (2 if parameter.is_complex() else 1)
        ref = None if where is None else weakref.ref(unwrapped(where))
        given = weakref.ref(parameter)
        self._shared.append(_Shared(label, shape, numbers, self.numbers, where is not None, given, ref))

    def _name(self, parameter: nn.Parameter) -> tuple[str, nn.Module | None]:
        """The name of a parameter in the first model that has it, and that model."""
        for model in self._models():
            for name, other in parameter_names(model):
                if other is parameter:
                    return name, model
        return _nameless(len(self._shared)), None

    @property
    def numbers(self) -> int:
        """How many numbers all of them have, |W|."""
        return sum(shared.numbers for shared in self._shared)

    @property
    def shapes(self) -> list[list[int]]:
        """Of all of them, in the order in which they were given."""
        return [list(shared.shape) for shared in self._shared]

    @property
    def labels(self) -> list[str]:
        """Their names."""
        return [shared.label for shared in self._shared]

    def place(self, i: int) -> slice:
        """Where the gradient at parameter ``i`` lies in a task's row."""
        start = self._shared[i].start
        return slice(start, start + self._shared[i].numbers)

    def add_used(self, used: dict[int, set[int]]) -> None:
        """Adds those that the forwards since the last ``combine`` used to those that a window knows of."""
        for k, here in self.used.items():
            used[k] = used.get(k, set()) | here

    def complete(self, came: Iterable[int], used: Mapping[int, set[int]]) -> set[int]:
        """Of the tasks whose gradient ``came``, those whose forwards used all of the parameters."""
        return {k for k in came if len(used.get(k, ())) == len(self._shared)}

    def unused(self, k: int, used: Mapping[int, set[int]]) -> list[str]:
        """The parameters that no forward of task ``k`` used."""
        return [shared.label for i, shared in enumerate(self._shared) if i not in used.get(k, ())]

    @staticmethod
    def multipliers(weights: NDArray[np.float64], loss_weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """What multiplies the losses, ``[K]``: the weights, none of them so small that a gradient would be lost."""
        w = weights if loss_weights is None else weights * loss_weights
        small = np.abs(w) < SMALLEST
        return np.where(small, np.where(w < 0, -SMALLEST, SMALLEST), w) if small.any() else w

    # ---- the forwards of a task ----------------------------------------------------------------------------------

    @contextmanager
    def of(self, k: int, measured: bool, receive: Receive, key: int) -> Iterator[None]:
        """Forwards in it use task ``k``'s aliases.

        Args:
            k: The task.
            measured: Whether its gradients are measured; nothing is done where not.
            receive: Is given every gradient in the backward.
            key: Under which the aliases' nodes of the graph say whose they are.

        Raises:
            RuntimeError: Another task's is open.
            NotImplementedError: The engine does not keep parameters apart.
        """
        if self._task is not None:
            raise _nested(self._tasks[self._task], self._tasks[k])
        self._task = k
        aliases = Aliases(k, self.labels, self.used, receive, key)
        try:
            if measured:
                self._look()
                for i, shared in enumerate(self._shared):
                    for ref, name in shared.owners:
                        if (owner := ref()) is not None:
                            aliases.hook(owner, name, i)
                if any(not shared.named for shared in self._shared):
                    aliases.look_for_owners(self._discover)
            yield
        finally:
            self._task = None
            aliases.end()

    def _models(self) -> list[nn.Module]:
        model = None if self._model is None else self._model()
        return [*([] if model is None else [model]), *self._prepared()]

    def _look(self) -> None:
        """Finds the owners, and again where there are other models or a module was replaced on the way to one."""
        models = self._models()
        seen = tuple(map(id, models))
        if seen == self._seen and all(holds(link) for shared in self._shared for link in shared.links):
            return
        for model in models:
            if any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules()):
                raise _flat_parameters()
        for shared in self._shared:
            if shared.named:
                self._look_for(shared, models)
        self._seen = seen

    @staticmethod
    def _look_for(shared: _Shared, models: Sequence[nn.Module]) -> None:
        its = None if shared.model is None else shared.model()
        for model in models if its is None else (its, *models):
            path, _, name = shared.label.rpartition(".")
            owner = locate(path, model) if path else unwrapped(model)
            parameter = None if owner is None else owner._parameters.get(name)
            if parameter is None:
                continue
            shared.links = links_on_the_way(path, model)
            shared.owners = [
                (weakref.ref(part), attribute)
                for part in unwrapped(model).modules()
                for attribute, other in part._parameters.items()
                if other is parameter
            ]
            return
        raise _gone(shared.label)

    def _discover(self, module: nn.Module) -> Iterator[tuple[str, int]]:
        """A module is called that may hold a parameter whose name is not known: its attributes, as they are found."""
        for name, parameter in module._parameters.items():
            for i, shared in enumerate(self._shared):
                if parameter is None or shared.named or shared.given() is not parameter:
                    continue
                if all(owner() is not module or its != name for owner, its in shared.owners):
                    shared.owners.append((weakref.ref(module), name))
                    yield name, i


def _find(name: str, model: nn.Module) -> tuple[str, nn.Parameter]:
    """A parameter by its name, and that name without the wrappers in it."""
    known = dict(parameter_names(model))
    for plain in (inner_name(name), inner_name(name).removeprefix("module.")):
        if plain in known:
            return plain, known[plain]
    raise _unknown_name(name, list(known))


# ---- messages ----------------------------------------------------------------------------------------------------


def _nameless(place: int) -> str:
    return f"shared_parameters[{place}]"


def _no_list(given: Any) -> TypeError:
    found = "an empty list" if given == [] else type(given).__name__
    return TypeError(
        "Parameter `shared_parameters` must be a list of parameters or of their names in `model`, such as "
        f'`["trunk.2.weight"]`. Found {found}.'
    )


def _no_parameter(one: Any) -> TypeError:
    found = f"{type(one).__name__}: name its weight" if isinstance(one, nn.Module) else type(one).__name__
    return TypeError(
        f"Parameter `shared_parameters` must hold parameters (`nn.Parameter`) or their names in `model`. Found {found}."
    )


def _name_without_model(name: str) -> ValueError:
    return ValueError(f"The name {name!r} in `shared_parameters` is looked up in `model`, which was not given.")


def _unknown_name(name: str, known: Sequence[str]) -> ValueError:
    close = difflib.get_close_matches(name, known, 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"`model` has no parameter called {name!r}.{hint} See `model.named_parameters()`.")


def _gone(name: str) -> RuntimeError:
    return RuntimeError(
        f"The shared parameter `{name}` is no longer where it was in the model: its module was replaced or wrapped, or "
        "the model is gone. Build a new weighter with the names of now."
    )


def _lazy(label: str) -> ValueError:
    return ValueError(
        f"The size of the shared parameter `{label}` is not known yet. Run the model once before the weighter is built."
    )


def _frozen(label: str) -> ValueError:
    return ValueError(
        f"The shared parameter `{label}` does not require grad: no gradient comes to a frozen parameter. Name one that "
        "is trained."
    )


def _twice(label: str) -> ValueError:
    return ValueError(f"Parameter `shared_parameters` holds `{label}` twice (tied parameters are one).")


def _many(size: int, tasks: int, numbers: int) -> str:
    return (
        f"`shared_parameters` puts {size:,} numbers ({tasks} tasks × {numbers:,}), {8 * size / 1e6:,.0f} MB, into the "
        "all-reduce of every measured step, and that much into memory. The weight of one layer is usually enough; "
        "`update_every=10` measures at every tenth step only."
    )


def _flat_parameters() -> NotImplementedError:
    return NotImplementedError(
        "`shared_parameters` cannot be used with FSDP1, which keeps parameters in one flat tensor and knows no second "
        "derivatives. Use FSDP2 (`fsdp_version: 2`), DDP, or a method that needs losses only without "
        "`shared_parameters`."
    )


def _nested(open_task: str, task: str) -> RuntimeError:
    return RuntimeError(
        f"`with weighter.task({task!r}):` inside of `with weighter.task({open_task!r}):`: a forward belongs to one "
        "task. Where tasks share a forward, give `heads` or call `weighter.branch(z)` instead of `shared_parameters`."
    )


def no_shared_parameters() -> RuntimeError:
    """``task`` of a weighter that measures no parameter."""
    return RuntimeError(
        "`weighter.task(name)` is for a weighter that was built with `shared_parameters=[…]`, the parameters at which "
        "the tasks' gradients are compared. This one was not."
    )


def no_branch() -> RuntimeError:
    """``branch`` of a weighter that measures at parameters."""
    return RuntimeError(
        "This weighter was built with `shared_parameters`, where gradients are compared: do not call "
        "`weighter.branch(z)` too. Run each task's forward in `with weighter.task(name):`."
    )


def check_goes_with(method: str, rotates: bool, lag: int, others: Mapping[str, Any]) -> None:
    """What shared parameters exclude.

    Raises:
        ValueError: The method rotates, ``lag`` is 0, or another place for gradients was named.
    """
    if also := [name for name, value in others.items() if value is not None]:
        raise ValueError(
            f"`shared_parameters` and `{also[0]}` are two places at which gradients would be compared: give one of "
            "them. Where all losses leave from one tensor, `heads` or `branch` (with or without `shared_layer`) cost "
            "less; where every task has a forward of its own, `shared_parameters` it is."
        )
    if rotates:
        raise ValueError(
            f"{method} rotates a shared representation, and gradients at `shared_parameters` know of none. Use `heads` "
            "or `branch`, or a method that does not rotate."
        )
    if lag == 0:
        raise ValueError(
            "With `shared_parameters` the weights multiply the losses, and gradients are known only after the "
            "backward: `lag = 0` is not possible. Use `lag = 1`: the weights of a step come from the steps before it."
        )


def missed(tasks: Sequence[str], unused: Mapping[str, Sequence[str]], parameters: Sequence[str]) -> RuntimeError:
    """The error for losses of which no gradient came to a shared parameter.

    Args:
        tasks: Their tasks.
        unused: Of each, the parameters that none of its forwards used.
        parameters: All shared parameters.
    """
    words = []
    for task in tasks:
        if len(unused[task]) == len(parameters):
            words.append(
                f"No forward used {_listed(parameters)} for loss `{task}`: run it in `with weighter.task({task!r}):`, "
                "with gradients enabled, so that the module which owns the parameter is called there."
            )
        elif unused[task]:
            words.append(
                f"Parameter {_listed(unused[task])} was not used in the forwards of task `{task}`: the module that "
                f"owns it was not called in `with weighter.task({task!r}):`. Leave it out of `shared_parameters` if "
                "the task does not need it."
            )
        else:
            words.append(
                f"No gradient of loss `{task}` came to {_listed(parameters)}: the loss was computed from another "
                f"forward than that in `with weighter.task({task!r}):`, or was detached from it."
            )
    if any(name == _nameless(i) for i, name in enumerate(parameters)):
        words.append("Where an engine puts other parameters in their place, give names and `model=`.")
    words.append(
        "What was compiled as one graph, re-entrant activation checkpointing (use `use_reentrant=False`) and a "
        "parameter that is read past its module (`F.linear(x, module.weight)`) do not see a task's own alias."
    )
    return RuntimeError(" ".join(words))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
