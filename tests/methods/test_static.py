import numpy as np
import pytest

from accel_weighting.methods.static import EqualWeighting, StaticWeighting
from accel_weighting.statistics import Statistics

WINDOW = Statistics([1.0, 5.0], [True, False])


def test_equal_weights_are_the_plain_sum():
    w, state = EqualWeighting().init(["a", "b"])
    assert w.dtype == np.float64 and w.tolist() == [1.0, 1.0]
    assert EqualWeighting().update(state, WINDOW)[0].tolist() == [1.0, 1.0]


def test_equal_weights_stay_at_the_initial_weights():
    w, state = EqualWeighting().init(["a", "b"], {"b": 3.0})
    assert w.tolist() == EqualWeighting().update(state, WINDOW)[0].tolist() == [1.0, 3.0]


def test_static_weights_follow_the_order_of_the_tasks():
    method = StaticWeighting({"b": 2, "a": 0.5})
    w, state = method.init(["a", "b"])
    assert w.dtype == np.float64
    assert w.tolist() == method.update(state, WINDOW)[0].tolist() == [0.5, 2.0]


def test_static_weighting_is_a_value():
    given = {"a": 1, "b": 2}
    method = StaticWeighting(given)
    given["a"] = 100
    assert repr(method) == "StaticWeighting(weights={'a': 1.0, 'b': 2.0})"
    assert method == StaticWeighting({"b": 2.0, "a": 1.0}) and hash(method) == hash(StaticWeighting({"b": 2, "a": 1}))
    assert method != StaticWeighting({"a": 1, "b": 3})
    assert not EqualWeighting().needs and not method.needs and method.acts_on == "losses"


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_must_be_positive_and_finite(weight):
    with pytest.raises(
        ValueError, match=r"`weights` must be a mapping of .* positive and finite. Found `weights = \{'bad'"
    ):
        StaticWeighting({"good": 1.0, "bad": weight})


def test_every_task_must_be_named_and_no_other():
    with pytest.raises(ValueError, match=r"missing names `\['b'\]`, unknown names `\['c', 'd'\]`"):
        StaticWeighting({"a": 1, "c": 1, "d": 2}).init(["a", "b"])
