"""Every hyperparameter of every method has a rule, and what breaks it is refused at construction by name."""

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch

import accel_weighting
from accel_weighting import CAGrad, CoVWeighting, GradNorm, Method, PCGrad, RotoGrad, Smooth, UncertaintyWeighting
from accel_weighting.statistics import _rules, check_tasks, count, names, positive, within
from tests.methods.catalogue import CATALOGUE

TASKS = ["depth", "seg"]
EXAMPLES = {type(method): method for method in (row.build(TASKS) for row in CATALOGUE)}
FIELDS = [
    (kind, f.metadata.get("called", f.name), _rules(kind).get(f.name))
    for kind in EXAMPLES
    for f in dataclasses.fields(kind)
    if f.name != "weighting"  # TorchJD's own
]


def built(kind, **changes):
    example = EXAMPLES[kind]
    given = {f.name: getattr(example, f.name) for f in dataclasses.fields(kind) if f.init}
    return kind(**given | changes)


@pytest.mark.parametrize(("kind", "name", "rule"), FIELDS, ids=[f"{kind.__name__}-{name}" for kind, name, _ in FIELDS])
@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, "0.5", True, 2.5j, GradNorm, [1.0], {"depth": "1"}, {1: 2.0}, object(), "depth"],
    ids=["nan", "inf", "text", "bool", "complex", "class", "list", "names", "numbers", "object", "task"],
)
def test_what_no_rule_allows_is_refused_by_name(kind, name, rule, value):
    assert rule is not None, "a hyperparameter without a rule"
    allowed = {"True or False": bool, "the name of a task": str}.get(rule.words)
    if allowed is not None and isinstance(value, allowed):
        return
    with pytest.raises(ValueError, match=rf"^Parameter `{name}` must be .*\. Found `{name} = "):
        built(kind, **{name: value})


@pytest.mark.parametrize(("kind", "name", "rule"), FIELDS, ids=[f"{kind.__name__}-{name}" for kind, name, _ in FIELDS])
def test_none_is_allowed_where_it_is_declared(kind, name, rule):
    if rule.optional or "None" in rule.words:
        assert getattr(built(kind, **{name: None}), name) is None
    else:
        with pytest.raises(ValueError, match=f"`{name}`"):
            built(kind, **{name: None})


def test_numbers_are_kept_so_that_their_text_is_the_same_everywhere():
    assert repr(GradNorm(alpha=1)) == repr(GradNorm(alpha=1)) and "alpha=1," in repr(GradNorm(alpha=1))
    for value in (np.float64(0.5), np.float32(0.5), Fraction(1, 2)):
        assert repr(CAGrad(c=value)) == "CAGrad(c=0.5)"
    for seed in (3, np.int32(3), torch.tensor(3)):
        assert repr(PCGrad(seed=seed)) == "PCGrad(seed=3)"
    assert repr(RotoGrad(rotate=np.bool_(False))) == "RotoGrad(rotate=False)"
    for given in (["b", "a"], ("b", "a"), (x for x in "ba"), {"b": 0, "a": 0}.keys()):
        assert GradNorm(tasks=given).tasks == ("b", "a")
    assert UncertaintyWeighting(classification=["seg"]).classification == ("seg",)


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["large", "small"])
def test_an_integer_beyond_all_floats_is_no_float(value):
    with pytest.raises(ValueError, match="`lr` must be positive and finite"):
        GradNorm(lr=value)


def test_a_set_has_no_order_to_compare():
    with pytest.raises(ValueError, match="`tasks` must be None or a sequence of task names"):
        GradNorm(tasks={"depth", "seg"})


def test_a_method_is_asked_for_where_a_class_was_given():
    with pytest.raises(ValueError, match=r"`method` must be a method such as `GradNorm\(\)`. Found `method = <class"):
        Smooth(CoVWeighting, 0.5)


@dataclass(frozen=True)
class Mine(Method):
    """A user's own, with rules of its own, and one field without."""

    rate: float = positive()
    speed: float = within("(0, 2]", 1)
    length: int = count(3, least=2)
    some: tuple = names(())
    free: object = None


def test_a_users_method_declares_its_rules_the_same_way():
    assert repr(Mine(rate=2, length=np.int64(4), free="x")) == "Mine(rate=2, speed=1, length=4, some=(), free='x')"
    for wrong, words in (
        ({"speed": 0}, r"`speed` must be in \(0, 2\]. Found `speed = 0`"),
        ({"length": 1}, "`length` must be an integer of at least 2. Found `length = 1`"),
        ({"rate": 0.0}, "`rate` must be positive and finite"),
    ):
        with pytest.raises(ValueError, match=words):
            Mine(**{"rate": 1.0} | wrong)
    with pytest.raises(TypeError, match="rate"):
        Mine()
    with pytest.raises(
        ValueError, match=r"`some` must name tasks out of \['depth', 'seg'\]. Found .*'dept'.* `\['depth'\]`"
    ):
        check_tasks(Mine(rate=1.0, some=["dept"]), TASKS)


def test_what_a_rotating_method_is_asked_for_has_defaults_and_passes_wrappers():
    assert (Mine(rate=1.0).dim, Mine(rate=1.0).size, Mine(rate=1.0).cooperative) == (-1, None, False)
    inner = RotoGrad(size=3, dim=1, cooperative_after=5)
    for method in (inner, Smooth(inner, 0.5), Smooth(Smooth(inner, 0.5), 0.5)):
        assert (method.dim, method.size, method.cooperative) == (1, 3, True)
    assert not Smooth(RotoGrad(), 0.5).cooperative


def test_every_exported_method_is_in_the_catalogue():
    exported = [getattr(accel_weighting, name) for name in accel_weighting.__all__]
    assert {x for x in exported if isinstance(x, type) and issubclass(x, Method)} - {Method} == set(EXAMPLES)
