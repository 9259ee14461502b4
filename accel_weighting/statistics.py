"""The contract between the weighter and the methods: what a window saw, what a method keeps, what a method is.

Everything here is pure data. A method never meets a process, a device, a loss scale or a micro-batch: it is
given the :class:`Statistics` of a whole window over the whole global batch, and answers with weights.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import math
import numbers
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, get_args, get_origin

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

State = dict[str, NDArray[Any]]
"""What a method keeps between two updates: a flat dictionary of NumPy arrays, in float64 unless they count.

Task k's share of an entry is its row k; what has nothing to do with single tasks is an array without dimensions, or
``[1, ...]``. ``"fixed"`` is what follows from the hyperparameters alone, weights included, and ``"settings"`` what
does so and leaves weights to move: no checkpoint of others changes them. ``"pairs"`` is ``[K, K]``, and begins anew
where a checkpoint of other tasks is loaded. The one entry that is a torch tensor, on the device, is the ``"rotations"``
of a rotating method.
"""

InitialWeights = Mapping[str, float] | Sequence[float] | NDArray[Any] | Tensor | None
"""What ``init`` takes: ``{task: weight}`` for some of the tasks, one number for each of them, or None."""

_FLOAT, _BOOL = np.dtype(np.float64), np.dtype(np.bool_)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What one window saw: all micro-batches of all processes between two optimizer steps.

    Identical on every process. K is the number of tasks; rows follow the weighter's task order. Lists, and tensors on
    the CPU, are taken for all fields but ``moments``, and kept as NumPy arrays: float64, ``present`` bool.

    Attributes:
        losses: Mean loss of every task over the blocks where it was present, shape ``[K]``; 0 where it was absent.
        present: Whether the task was in the window at all, bool, shape ``[K]``.
        norms: Norm of every task's unweighted gradient over the global batch, at the shared representation or the
            weight of ``shared_layer``, shape ``[K]``; None where there is no branch.
        gram: Inner products of those gradients, shape ``[K, K]``; rows of absent tasks are zero. None where there is
            no branch, or where the heads were fed different tensors, so that only norms are known.
        moments: None, or for a rotating method ``[K(K−1)/2, m(m−1)/2]``, a torch tensor on the device: the strict upper
            triangles of ``G_kᵀ G_j − G_jᵀ G_k`` for all k < j, with the tasks' gradients ``G`` (rows are samples,
            columns the m rotated features); where it is cooperative, K more rows with those of ``G_kᵀ Z − Zᵀ G_k``.
        micro_batches: Number of micro-batches in the window, over all processes.
        step: Optimizer steps that came before this window.
    """

    losses: NDArray[np.float64]
    present: NDArray[np.bool_]
    norms: NDArray[np.float64] | None = None
    gram: NDArray[np.float64] | None = None
    moments: Tensor | None = None
    micro_batches: int = 1
    step: int = 0

    def __post_init__(self) -> None:
        for name, dtype in (("losses", _FLOAT), ("present", _BOOL), ("norms", _FLOAT), ("gram", _FLOAT)):
            value = getattr(self, name)
            if value is not None and (type(value) is not np.ndarray or value.dtype is not dtype):
                object.__setattr__(self, name, np.asarray(value, dtype))


class Method:
    """Base of every weighting method: a frozen dataclass of hyperparameters with two pure functions.

    A hyperparameter has its rule beside its default, ``lr: float = positive(0.1)``; what breaks a rule is refused at
    construction. Processes and checkpoints compare methods by their ``repr``: a dictionary among the hyperparameters is
    sorted. ``init`` and ``update`` compute with NumPy arrays of K numbers in float64, and modify none that they are
    given.

    A method that rotates the shared representation has ``"moments"`` among its needs and, besides, a function
    ``widen(state, width) -> State``. It is called at the first forward, with the number of features of z along ``dim``,
    and again after a checkpoint was loaded; it adds the entry ``"rotations"``, a torch tensor ``[K, m, m]`` in
    float64, with m at most the width, unless the state has it. From then on that entry is on the device of z, and
    ``update`` finds ``statistics.moments`` beside it. A method that acts on the shared path and divides the losses by
    something keeps those factors, ``[K]``, as ``"loss_weights"`` (``loss_weights_grow``: they follow the losses).

    Attributes:
        needs: Which statistics ``update`` reads, out of ``"losses"``, ``"norms"``, ``"gram"``, ``"moments"``.
        positive_losses: Whether the method divides by losses and needs them positive.
        acts_on: ``"losses"``: weights multiply the losses, heads feel them. ``"shared"``: weights act on the gradient
            that reaches the shared representation; heads keep their raw gradients.
        keeps_sum: Whether the weights always have the sum that they began with.
        grows: Whether a weight is a ratio of norms, or comes from the Gram matrix, without an upper bound of its own:
            then the weighter bounds how far it may rise, see ``max_growth``.
        dim, size, cooperative: Of a rotating method: the dimension of z that holds the features; m, how many of them
            it rotates, the first ones (None: all); whether ``moments`` has the K rows with z.

    Example:
        >>> @dataclass(frozen=True)
        ... class InverseNorm(Method):
        ...     power: float = positive(1.0)
        ...     needs = frozenset({"norms"})
        ...
        ...     def init(self, tasks, initial_weights=None):
        ...         weights = initial_vector(tasks, initial_weights)
        ...         return weights, {"weights": weights}
        ...
        ...     def update(self, state, statistics):
        ...         seen = statistics.present & (statistics.norms > 0)
        ...         inverse = np.where(seen, statistics.norms, 1.0) ** -self.power
        ...         weights = np.where(seen, inverse, state["weights"])
        ...         return weights, {"weights": weights}
        >>> method = InverseNorm()
        >>> weights, state = method.init(["a", "b"])
        >>> method.update(state, Statistics([0.7, 0.7], [True, True], norms=[2.0, 0.5]))[0]
        array([0.5, 2. ])
        >>> InverseNorm(power="2")
        Traceback (most recent call last):
        ...
        ValueError: Parameter `power` must be positive and finite. Found `power = '2'`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    positive_losses: ClassVar[bool] = False
    acts_on: ClassVar[Literal["losses", "shared"]] = "losses"
    keeps_sum: ClassVar[bool] = False
    grows: ClassVar[bool] = False
    loss_weights_grow: ClassVar[bool] = False

    dim: int = -1
    size: int | None = None
    cooperative: bool = False

    def __post_init__(self, *args: Any, **kwargs: Any) -> None:  # of any signature: init-only fields come in here
        _check(self)

    def __str__(self) -> str:
        """Short, as it stands in messages: what differs from the defaults."""
        method: Any = self  # a dataclass
        values = [(f, getattr(self, f.name)) for f in dataclasses.fields(method) if f.init]
        chosen = [f"{f.name}={x if isinstance(x, Method) else repr(x)}" for f, x in values if x != f.default]
        return f"{type(self).__name__}({', '.join(chosen)})"

    def init(self, tasks: Sequence[str], initial_weights: InitialWeights = None) -> tuple[NDArray[np.float64], State]:
        """Weights before the first update, float64 ``[K]``, and the state to begin with."""
        raise NotImplementedError

    def update(self, state: State, statistics: Statistics) -> tuple[NDArray[np.float64], State]:
        """Weights after a window, float64 ``[K]``, and the next state. Neither argument is modified.

        An absent task keeps its weight and its state; of a sum that is kept, the present ones share what that leaves.
        """
        raise NotImplementedError

    def measures(self, tasks: Sequence[str]) -> Sequence[str]:
        """Those of the ``tasks`` whose gradients the method needs, where it needs any; the others need no branch."""
        return tasks

    def settled(self, state: State) -> bool:
        """Whether the weights are the method's own by now, and not initial ones that it holds for some updates."""
        return True

    def weigh(self, state: State, statistics: Statistics) -> NDArray[np.float64]:
        """Weights for these very statistics, with the state left as it is: what ``lag=0`` applies."""
        return self.update(state, statistics)[0]


def initial_vector(tasks: Sequence[str], values: InitialWeights, default: float = 1.0) -> NDArray[np.float64]:
    """``values`` as a float64 vector of its own, in task order; tasks that are not named get ``default``."""
    if values is None:
        return np.full(len(tasks), default, np.float64)
    if isinstance(values, Mapping):
        return np.array([values.get(task, default) for task in tasks], np.float64)
    return np.array(values.detach().cpu().numpy() if isinstance(values, Tensor) else values, np.float64)


# ---- hyperparameters and their rules -------------------------------------------------------------------------------


class _BreaksRule(Exception):
    """Carries what was found, where that is a part of the value."""


@dataclass(frozen=True)
class Rule:
    """What a hyperparameter must be.

    Attributes:
        words: What follows "must be" in the message.
        read: Returns the value as the method keeps it, or raises ``_BreaksRule``.
        of_tasks: Whether the value names tasks.
        of_all: Whether it names all of them.
        optional: Whether None is allowed.
    """

    words: str
    read: Callable[[Any], Any]
    of_tasks: bool = False
    of_all: bool = False
    optional: bool = False


def _float(value: Any) -> float:
    """Ints and floats as they are, for the sake of their repr; NumPy's numbers as floats; no bool, no text."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise _BreaksRule
    try:
        number = float(value)
    except OverflowError:
        raise _BreaksRule from None
    plain: float = value if type(value) in (int, float) else number  # type: ignore[comparison-overlap, assignment]
    return plain


def _int(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise _BreaksRule
    try:
        return operator.index(value)
    except TypeError:
        raise _BreaksRule from None


def _number(words: str, valid: Callable[[Any], bool], read: Callable[[Any], Any] = _float) -> Rule:
    def checked(value: Any) -> Any:
        value = read(value)
        if not valid(value):
            raise _BreaksRule
        return value

    return Rule(words, checked)


_POSITIVE = _number("positive and finite", lambda x: 0 < x < math.inf)
_NON_NEGATIVE = _number("finite and at least 0", lambda x: 0 <= x < math.inf)
_FINITE = _number("finite", lambda x: math.isfinite(x))


def _follows(rule: Rule, value: Any) -> bool:
    try:
        rule.read(value)
    except _BreaksRule:
        return False
    return True


def _by_task(rule: Rule) -> Rule:
    def read(value: Any) -> dict[str, float]:
        if not isinstance(value, Mapping) or not all(isinstance(task, str) for task in value):
            raise _BreaksRule
        wrong = {task: number for task, number in value.items() if not _follows(rule, number)}
        if wrong:
            raise _BreaksRule(wrong)
        return {task: float(number) for task, number in sorted(value.items())}

    return Rule(f"a mapping of task names to numbers that are {rule.words}", read, of_tasks=True)


def _number_or_by_task(rule: Rule) -> Rule:
    by_task = _by_task(rule)

    def read(value: Any) -> Any:
        return by_task.read(value) if isinstance(value, Mapping) else rule.read(value)

    return Rule(f"{rule.words}, or {by_task.words}", read, of_tasks=True)


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise _BreaksRule
    return value


def _names(value: Any) -> tuple[str, ...]:
    unordered = isinstance(value, (set, frozenset, Mapping))  # would not have the same text everywhere
    if isinstance(value, str) or unordered or not isinstance(value, Iterable):
        raise _BreaksRule
    names = tuple(value)
    if not all(isinstance(name, str) for name in names):
        raise _BreaksRule
    return names


def _method(value: Any) -> Method:
    if not isinstance(value, Method):
        raise _BreaksRule
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _BreaksRule
    return bool(value)


def _choice(choices: tuple[Any, ...]) -> Rule:
    def read(value: Any) -> Any:
        if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
            raise _BreaksRule
        return value

    *rest, last = sorted(map(repr, choices), key=lambda text: text != "None")
    return Rule(f"{', '.join(rest)} or {last}" if rest else last, read)


def _ruled(rule: Rule, default: Any, of_all: bool = False, **options: Any) -> Any:
    """A dataclass field with a rule; None is allowed where it is the default."""
    rule = dataclasses.replace(rule, of_all=of_all, optional=default is None)
    return field(default=default, metadata={"rule": rule}, **options)


def positive(default: Any = MISSING) -> Any:
    """A hyperparameter: a positive finite number."""
    return _ruled(_POSITIVE, default)


def non_negative(default: Any = MISSING) -> Any:
    """A hyperparameter: a finite number from 0 on."""
    return _ruled(_NON_NEGATIVE, default)


def finite(default: Any = MISSING) -> Any:
    """A hyperparameter: a finite number."""
    return _ruled(_FINITE, default)


def within(interval: str, default: Any = MISSING) -> Any:
    """A hyperparameter: a number in an interval as mathematics writes it, such as ``"[0, 1)"``."""
    low, high = map(float, interval[1:-1].split(","))
    above = operator.le if interval[0] == "[" else operator.lt
    below = operator.le if interval[-1] == "]" else operator.lt
    return _ruled(_number(f"in {interval}", lambda x: above(low, x) and below(x, high)), default)


def count(default: Any = MISSING, least: int = 1) -> Any:
    """A hyperparameter: an integer from ``least`` on."""
    return _ruled(_number(f"an integer of at least {least}", lambda n: n >= least, _int), default)


def integer(default: Any = MISSING) -> Any:
    """A hyperparameter: any integer, such as a seed."""
    return _ruled(Rule("an integer", _int), default)


def positive_by_task(default: Any = MISSING, every: bool = False) -> Any:
    """A hyperparameter: ``{task: positive finite number}``, kept sorted; for ``every`` task, or for some."""
    # Dictionaries do not hash; equality still compares them.
    return _ruled(_by_task(_POSITIVE), default, of_all=every, hash=False)


def non_negative_by_task(default: Any = MISSING) -> Any:
    """A hyperparameter: ``{task: finite number from 0 on}``, kept sorted."""
    return _ruled(_by_task(_NON_NEGATIVE), default, hash=False)


def positive_or_by_task(default: Any = MISSING) -> Any:
    """A hyperparameter: a positive finite number, or ``{task: positive finite number}``, kept sorted."""
    return _ruled(_number_or_by_task(_POSITIVE), default, hash=False)


def name(default: Any = MISSING) -> Any:
    """A hyperparameter: the name of one task."""
    return _ruled(Rule("the name of a task", _name, of_tasks=True), default)


def names(default: Any = MISSING) -> Any:
    """A hyperparameter: a sequence of task names, kept as a tuple."""
    return _ruled(Rule("a sequence of task names", _names, of_tasks=True), default)


def _declared(cls: type, annotation: Any) -> Any:
    """An annotation, which may be text; None where it is about names that no module of the class knows."""
    if not isinstance(annotation, str):
        return annotation
    known: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        known |= vars(sys.modules.get(base.__module__, builtins))
    try:
        return eval(annotation, known)
    except NameError:
        return None


@functools.cache
def _rules(cls: Any) -> dict[str, Rule]:
    """Rules of a method's hyperparameters: those given, and those that ``Literal``, ``bool`` or ``Method`` imply."""
    rules = {}
    for entry in dataclasses.fields(cls):
        if "rule" in entry.metadata:
            rules[entry.name] = entry.metadata["rule"]
            continue
        declared = _declared(cls, entry.type)
        choices = [part for part in (declared, *get_args(declared)) if get_origin(part) is Literal]
        if declared is bool:
            rules[entry.name] = Rule("True or False", _bool)
        elif declared is Method:
            rules[entry.name] = Rule("a method such as `GradNorm()`", _method)
        elif choices:
            rules[entry.name] = _choice((*get_args(choices[0]), *[None] * (type(None) in get_args(declared))))
    return rules


def _check(method: Any) -> None:
    """Holds every hyperparameter against its rule and stores it as it is kept.

    Raises:
        ValueError: Names the first that breaks its rule, the rule, and what was found.
    """
    if not dataclasses.is_dataclass(method):
        return
    called = {f.name: f.metadata.get("called", f.name) for f in dataclasses.fields(method)}
    for name, rule in _rules(method.__class__).items():
        value = getattr(method, name)
        if value is None and rule.optional:
            continue
        try:
            kept = rule.read(value)
        except _BreaksRule as error:
            found, rest = (error.args or (value,))[0], "None or " * rule.optional
            raise ValueError(
                f"Parameter `{called[name]}` must be {rest}{rule.words}. Found `{called[name]} = {found!r}`."
            ) from None
        if kept is not value:
            object.__setattr__(method, name, kept)


def check_tasks(method: Any, tasks: Sequence[str]) -> None:
    """Whether the names among a method's hyperparameters are those of tasks; to be called by ``init``.

    Raises:
        ValueError: Lists the names that are not, and the tasks that are missing where all are to be named.
    """
    for parameter, rule in _rules(method.__class__).items():
        value = getattr(method, parameter) if rule.of_tasks else ()
        found = [value] if isinstance(value, str) else value if isinstance(value, (Mapping, tuple)) else ()
        unknown = [name for name in found if name not in tasks]
        missing = [name for name in tasks if name not in found] if rule.of_all else []
        if unknown or missing:
            close = [match for name in unknown for match in get_close_matches(name, tasks, n=1)]
            hint = f" Did you mean `{close}`?" if close else ""
            every, lacks = (" every task and no other", f"missing names `{missing}`, ") if rule.of_all else ("", "")
            raise ValueError(
                f"Parameter `{parameter}` must name{every or ' tasks'} out of {list(tasks)}. "
                f"Found {lacks}unknown names `{unknown}`.{hint}"
            )
