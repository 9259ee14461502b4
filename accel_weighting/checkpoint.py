"""What a saved state must look like before any of it is taken up: half a load is impossible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .statistics import Method, State


def problems(saved: Mapping[str, Any], method: Method, fresh: State | None) -> list[str]:
    """All that is wrong with a saved state.

    Args:
        saved: What came from a file.
        method: The method that is to go on from it.
        fresh: The method's state before its first update if the saved one is of the same method and tasks; else None.
    """
    tasks = saved.get("tasks")
    if not isinstance(tasks, Sequence) or not all(isinstance(task, str) for task in tasks):
        return [f"`tasks` must be a list of names, found {tasks!r}"]
    found = list(_numbers(saved))
    K, positive = len(tasks), method.acts_on == "losses"
    for name in ("weights", "weight_sum"):
        found += _vector(name, saved.get(name), (K,), positive and name == "weights")
    state = saved.get("state")
    if isinstance(state, Mapping):
        found += _method_state(state, K, fresh, positive)
    else:
        found.append(f"`state` must be a dictionary of tensors, found {type(state).__name__}")
    return found + list(_growth(saved.get("growth"))) + list(_record(saved.get("record"), K))


def _numbers(saved: Mapping[str, Any]) -> Iterator[str]:
    for name in ("step", "weight_steps", "held", "skipped"):
        value = saved.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            yield f"`{name}` must be an integer of at least 0, found {value!r}"
    if not isinstance(saved.get("frozen"), bool):
        yield f"`frozen` must be True or False, found {saved.get('frozen')!r}"


def _vector(name: str, value: Any, shape: tuple[int, ...], positive: bool) -> Iterator[str]:
    if not isinstance(value, Tensor):
        yield f"`{name}` must be a tensor, found {type(value).__name__}"
    elif tuple(value.shape) != shape:
        yield f"`{name}` must have the shape {list(shape)}, found {list(value.shape)}"
    elif not value.isfinite().all():
        yield f"`{name}` must be finite, found {value.tolist()}"
    elif positive and not (value > 0).all():
        yield f"`{name}` must be positive, found {value.tolist()}"


def _method_state(state: Mapping[str, Any], K: int, fresh: State | None, positive: bool) -> Iterator[str]:
    for name, value in state.items():
        last = name.rpartition(".")[2]
        if not isinstance(value, Tensor):
            yield f"`state[{name!r}]` must be a tensor, found {type(value).__name__}"
            continue
        expected = tuple(value.shape)
        if last == "rotations":
            expected = (K, expected[-1], expected[-1]) if expected else (K,)
        elif fresh is not None and name in fresh:
            expected = fresh[name].shape
            if value.dtype != torch.as_tensor(fresh[name]).dtype:
                yield f"`state[{name!r}]` must be {fresh[name].dtype}, found {value.dtype}"
        yield from _vector(f"state[{name!r}]", value, expected, positive and last == "weights")
    if missing := [name for name in fresh or {} if name not in state]:
        yield f"`state` lacks {missing}"


def _growth(growth: Any) -> Iterator[str]:
    if growth is None:
        return
    if not isinstance(growth, Mapping):
        yield f"`growth` must be a dictionary, found {type(growth).__name__}"
        return
    length = len(growth["count"]) if isinstance(growth.get("count"), Tensor) and growth["count"].ndim else 0
    for name in ("log_mean", "count", "limited"):
        yield from _vector(f"growth[{name!r}]", growth.get(name), (length,), positive=False)
    if not isinstance(growth.get("limited_steps"), int):
        yield f"`growth['limited_steps']` must be an integer, found {growth.get('limited_steps')!r}"


def _record(record: Any, K: int) -> Iterator[str]:
    columns = 4 * K + K * (K - 1) // 2 + 1
    if not isinstance(record, Mapping):
        yield f"`record` must be a dictionary, found {type(record).__name__}"
        return
    steps, rows = record.get("steps"), record.get("rows")
    if not isinstance(record.get("stride"), int) or record["stride"] < 1:
        yield f"`record['stride']` must be a positive integer, found {record.get('stride')!r}"
    if not isinstance(steps, list) or not all(isinstance(step, int) for step in steps):
        yield "`record['steps']` must be a list of integers"
    elif not isinstance(rows, Tensor) or rows.shape != (len(steps), columns):
        yield f"`record['rows']` must be a tensor of shape [{len(steps)}, {columns}]"
    for name, shape in (("latest", (columns,)), ("loss_moments", (3, K))):
        value = record.get(name)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            yield f"`record[{name!r}]` must be a tensor of shape {list(shape)}"
