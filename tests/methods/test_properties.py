"""What every method promises, by hypothesis. A new method costs one row in METHODS."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel_weighting.methods.cov import CoVWeighting
from accel_weighting.methods.gradnorm import GradNorm
from accel_weighting.methods.static import EqualWeighting, StaticWeighting
from accel_weighting.methods.wrappers import Clamp, Every, Smooth, Warmup
from accel_weighting.statistics import Method, Statistics


@dataclass(frozen=True)
class Row:
    """A method and which properties it has."""

    id: str
    method: Method | Callable[[list[str]], Method]  # or a function of the task names
    total: str | None = None  # the sum that the weights keep: "one", "tasks" (K), or None
    positive: bool = True
    equivariant: bool = True  # to a permutation of the tasks
    symmetric: bool = True  # equal tasks get equal weights
    loss_units: bool = False  # invariant to positive factors on the losses alone, one per task
    gradient_units: bool = False  # invariant to one positive factor on all gradients
    rtol: float = 1e-8  # of the invariances

    def build(self, tasks: list[str]) -> Method:
        return self.method if isinstance(self.method, Method) else self.method(tasks)


METHODS = [
    Row("equal", EqualWeighting(), total="tasks", loss_units=True, gradient_units=True),
    Row("static", lambda tasks: StaticWeighting(dict.fromkeys(tasks, 2.5)), loss_units=True, gradient_units=True),
    Row("gradnorm", GradNorm(), total="tasks", loss_units=True),
    Row("gradnorm alpha=0", GradNorm(alpha=0.0), total="tasks", loss_units=True),
    Row("gradnorm sgd", GradNorm(optimizer="sgd", lr=1e-3), total="tasks", loss_units=True),
    Row("gradnorm decay", GradNorm(initial_loss_decay=0.9), total="tasks", loss_units=True),
    Row("gradnorm subset", lambda tasks: GradNorm(tasks=tasks[:2]), total="tasks", equivariant=False, loss_units=True),
    Row("cov", CoVWeighting(), total="one", loss_units=True, gradient_units=True),
    Row("cov decay", CoVWeighting(decay=0.9, total="tasks"), total="tasks", loss_units=True, gradient_units=True),
    Row("smooth", Smooth(GradNorm(), 0.9), total="tasks", loss_units=True),
    Row("clamp", Clamp(CoVWeighting(total="tasks"), 0.5, 2.0), total="tasks", loss_units=True, gradient_units=True),
    Row("warmup", Warmup(CoVWeighting(warmup=1), 2), total="one", loss_units=True, gradient_units=True),
    Row("every", Every(GradNorm(), 2), total="tasks", loss_units=True),
    Row("nested", Smooth(Clamp(Every(GradNorm(), 2), 0.9, 1.1), 0.5), total="tasks", loss_units=True),
]


@dataclass(frozen=True)
class Run:
    """What a few windows saw: losses ``[T, K]``, task gradients ``[T, K, d]``, presence ``[T, K]``."""

    losses: torch.Tensor
    gradients: torch.Tensor
    present: torch.Tensor

    @property
    def tasks(self) -> list[str]:
        return [f"task {i}" for i in range(self.losses.shape[1])]

    def windows(self) -> list[Statistics]:
        return [
            Statistics(L, here, torch.linalg.vector_norm(g, dim=1), g @ g.T, step=step)
            for step, (L, g, here) in enumerate(
                zip(self.losses * self.present, self.gradients * self.present[..., None], self.present, strict=True)
            )
        ]

    def at(self, order: list[int]) -> "Run":
        """The same run with the tasks in another order."""
        return Run(self.losses[:, order], self.gradients[:, order], self.present[:, order])


def jacobian(kind: str, g: torch.Generator, K: int, d: int = 3) -> torch.Tensor:
    J = torch.randn(K, d, generator=g, dtype=torch.float64)
    if kind == "zero row":
        J[0] = 0
    elif kind == "equal":
        J[:] = J[0].clone()
    elif kind == "opposite":
        J[-1] = -J[0]
    elif kind == "rank one":
        J = torch.randn(K, 1, generator=g, dtype=torch.float64) * J[0]
    elif kind == "scaled":
        J *= 10 ** torch.randint(-10, 11, (K, 1), generator=g)
    elif kind == "zero":
        J[:] = 0
    return J


@st.composite
def runs(draw: st.DrawFn) -> Run:
    K, T = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    exponents = 16 * torch.rand(K, generator=g) - 8
    losses = 10 ** exponents.double() * (0.05 + torch.rand(T, K, generator=g).double())
    kind = st.sampled_from(["random", "zero row", "equal", "opposite", "rank one", "scaled", "zero"])
    kinds = draw(st.tuples(kind, kind))
    gradients = torch.stack([jacobian(kinds[t % 2], g, K) for t in range(T)])
    present = torch.rand(T, K, generator=g) >= draw(st.sampled_from([0.0, 0.3]))
    present[torch.arange(T), torch.randint(K, (T,), generator=g)] = True
    return Run(losses, gradients, present)


def follow(row: Row, run: Run) -> list[torch.Tensor]:
    """The initial weights, then those after every window."""
    method = row.build(run.tasks)
    w, state = method.init(run.tasks)
    trajectory = [w]
    for statistics in run.windows():
        w, state = method.update(state, statistics)
        trajectory.append(w)
    return trajectory


def close(row: Row, obtained: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(obtained, expected, rtol=row.rtol, atol=row.rtol)


def rows(having: str = "id"):
    """The test, once for each row with that property."""
    table = [row for row in METHODS if getattr(row, having)]
    assert table
    return pytest.mark.parametrize("row", table, ids=lambda row: row.id)


examples = settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@rows()
@examples
@given(run=runs())
def test_weights_are_finite_positive_and_keep_their_sum(row, run):
    K = len(run.tasks)
    for w in follow(row, run):
        assert w.dtype == torch.float64 and w.shape == (K,) and w.device.type == "cpu"
        assert w.isfinite().all()
        assert not row.positive or (w > 0).all()
        assert row.total is None or abs(w.sum() - {"one": 1, "tasks": K}[row.total]) < 1e-12 * K


@rows()
@examples
@given(run=runs())
def test_absent_tasks_keep_their_weights(row, run):
    trajectory = follow(row, run)
    for before, after, present in zip(trajectory[:-1], trajectory[1:], run.present, strict=True):
        assert torch.equal(before[~present], after[~present])


@rows()
@examples
@given(run=runs())
def test_update_is_pure(row, run):
    """Neither argument changes; the state keeps its keys, shapes and dtypes; the same again gives the same."""
    method = row.build(run.tasks)
    state = method.init(run.tasks)[1]
    for statistics in run.windows():
        seen = {k: v for k, v in vars(statistics).items() if isinstance(v, torch.Tensor)}
        seen_before, state_before = ({k: v.clone() for k, v in d.items()} for d in (seen, state))
        w, after = method.update(state, statistics)
        again, _ = method.update(state, statistics)
        assert torch.equal(w, again)
        for now, then in ((seen, seen_before), (state, state_before)):
            assert all(torch.equal(now[key], then[key]) for key in then) and now.keys() == then.keys()
        assert {k: (v.shape, v.dtype) for k, v in after.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
        state = after


@rows()
@examples
@given(run=runs())
def test_state_survives_saving(row, run):
    method = row.build(run.tasks)
    *windows, last = run.windows()
    state = method.init(run.tasks)[1]
    for statistics in windows:
        state = method.update(state, statistics)[1]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(method.update(state, last)[0], method.update(loaded, last)[0])


@rows("equivariant")
@examples
@given(run=runs(), random=st.randoms(use_true_random=False))
def test_the_order_of_the_tasks_does_not_matter(row, run, random):
    order = list(range(len(run.tasks)))
    random.shuffle(order)
    close(row, follow(row, run.at(order)), [w[order] for w in follow(row, run)])


@rows("symmetric")
@examples
@given(run=runs())
def test_equal_tasks_get_equal_weights(row, run):
    twins = run.at([0, 0, *range(1, len(run.tasks))])
    for w in follow(row, twins):
        torch.testing.assert_close(w[0], w[1], rtol=row.rtol, atol=row.rtol)


@rows("loss_units")
@examples
@given(run=runs(), seed=st.integers(0, 1000))
def test_units_of_the_losses_do_not_matter(row, run, seed):
    factors = 10 ** (8 * torch.rand(len(run.tasks), generator=torch.Generator().manual_seed(seed)).double() - 4)
    close(row, follow(row, Run(run.losses * factors, run.gradients, run.present)), follow(row, run))


@rows("gradient_units")
@examples
@given(run=runs(), exponent=st.floats(-4, 4))
def test_units_of_the_gradients_do_not_matter(row, run, exponent):
    close(row, follow(row, Run(run.losses, run.gradients * 10**exponent, run.present)), follow(row, run))


@rows("total")
def test_a_sum_that_is_kept_is_declared(row):
    """Wrappers read it, to know whether the present tasks share what the absent ones leave."""
    assert row.build(["a"]).keeps_sum
