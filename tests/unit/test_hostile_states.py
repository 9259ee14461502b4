"""A spoiled or half-written state changes nothing, by hypothesis."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_weighting import CarryForward, CoVWeighting, GradNorm
from tests.small import losses_of, weighter_and_model

METHODS = [GradNorm(), CoVWeighting(), CarryForward(GradNorm())]


def trained(method: Any) -> Any:
    weighter, model = weighter_and_model(method)
    for step in range(3):
        weighter.backward(losses_of(model, step))
        model.zero_grad()
    return weighter


def places(state: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every entry, of dictionaries inside too."""
    found = []
    for name, value in state.items():
        found.append((*path, name))
        if isinstance(value, dict):
            found += places(value, (*path, name))
    return found


SPOILED = [None, "text", -1, math.nan, True, [], {}, torch.zeros(0), torch.full((2,), math.nan), torch.ones(7)]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(method=st.sampled_from(METHODS), where=st.integers(0, 10**6), what=st.integers(-1, len(SPOILED) - 1))
def test_a_spoiled_state_is_taken_up_whole_or_not_at_all(method: Any, where: int, what: int) -> None:
    state = trained(method).state_dict()
    path = places(state)[where % len(places(state))]
    inner = state
    for name in path[:-1]:
        inner = inner[name]
    if what < 0:
        del inner[path[-1]]
    else:
        inner[path[-1]] = copy.deepcopy(SPOILED[what])
    weighter, model = weighter_and_model(method)
    weighter.backward(losses_of(model, 0))
    model.zero_grad()
    before = str(weighter.state_dict())
    try:
        weighter.load_state_dict(state)
    except (ValueError, TypeError, KeyError) as error:
        assert isinstance(error, ValueError), f"{path}: {error!r}"
        assert str(weighter.state_dict()) == before, path
    weighter.backward(losses_of(model, 1))
    assert all(math.isfinite(weight) for weight in weighter.weights.values())


def test_nothing_of_a_state_that_is_no_dictionary_is_taken() -> None:
    weighter = trained(GradNorm())
    for state in (None, [], "x", {}, {"kind": "other"}):
        with pytest.raises(ValueError, match="This does not hold a weighter's state"):
            weighter.load_state_dict(state)
