"""What every method promises, by hypothesis: the rows of the catalogue."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import accel_weighting
from accel_weighting import FAMO, GradientBalancer, GradNorm, Method, StaticWeighting, Statistics
from tests.methods.catalogue import CATALOGUE


@dataclass(frozen=True)
class Run:
    """What a few windows saw: losses ``[T, K]``, task gradients ``[T, K, d]``, presence ``[T, K]``."""

    losses: np.ndarray
    gradients: np.ndarray
    present: np.ndarray

    @property
    def tasks(self) -> list[str]:
        return [f"task {i}" for i in range(self.losses.shape[1])]

    def windows(self) -> list[Statistics]:
        return [
            Statistics(L, here, np.linalg.norm(g, axis=1), g @ g.T, step=step)
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
    return J.numpy()


@st.composite
def runs(draw: st.DrawFn, scaled: bool = True) -> Run:
    K, T = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    exponents = 16 * torch.rand(K, generator=g) - 8
    losses = 10 ** exponents.double() * (0.05 + torch.rand(T, K, generator=g).double())
    kinds = ["random", "zero row", "equal", "opposite", "rank one", *["scaled"] * scaled, "zero"]
    kind = st.sampled_from(kinds)
    kinds = draw(st.tuples(kind, kind))
    gradients = np.stack([jacobian(kinds[t % 2], g, K) for t in range(T)])
    present = torch.rand(T, K, generator=g) >= draw(st.sampled_from([0.0, 0.3]))
    present[torch.arange(T), torch.randint(K, (T,), generator=g)] = True
    return Run(losses.numpy(), gradients, present.numpy())


def follow(row, run: Run) -> list[np.ndarray]:
    """The initial weights, then those after every window."""
    method = row.build(run.tasks)
    w, state = method.init(run.tasks)
    trajectory = [w]
    for statistics in run.windows():
        w, state = method.update(state, statistics)
        trajectory.append(w)
    return trajectory


def close(row, obtained: list[np.ndarray], expected: list[np.ndarray]) -> None:
    np.testing.assert_allclose(obtained, expected, rtol=row.rtol, atol=row.rtol)


def saved(state):
    """Through a checkpoint: a file of plain tensors."""
    file = io.BytesIO()
    torch.save({key: torch.from_numpy(value) for key, value in state.items()}, file)
    file.seek(0)
    return {key: value.numpy() for key, value in torch.load(file, weights_only=True).items()}


rows = pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: row.id)
examples = settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@rows
@examples
@given(run=runs())
def test_row_12_an_update_keeps_what_it_promises(row, run):
    """Weights finite, positive and of their sum; absent tasks untouched; arguments too; the state's form and file."""
    K, method = len(run.tasks), row.build(run.tasks)
    w, state = method.init(run.tasks)
    check_weights(row, w, K)
    for statistics in run.windows():
        seen = {k: v for k, v in vars(statistics).items() if isinstance(v, np.ndarray)}
        seen_before, state_before = ({k: v.copy() for k, v in d.items()} for d in (seen, state))
        after, next_state = method.update(state, statistics)
        check_weights(row, after, K)
        assert row.carries or np.array_equal(w[~statistics.present], after[~statistics.present])
        for now, then in ((seen, seen_before), (state, state_before)):
            assert all(np.array_equal(now[key], then[key]) for key in then) and now.keys() == then.keys()
        form, next_form = ({k: (v.shape, v.dtype) for k, v in s.items()} for s in (state, next_state))
        assert next_form == form
        w, before, state = after, state, next_state

    again, _ = method.update(saved(before), statistics)
    assert np.array_equal(w, again), "the same state, saved and loaded, and the same statistics gave other weights"


def check_weights(row, w, K):
    assert type(w) is np.ndarray and w.dtype == np.float64 and w.shape == (K,)
    assert np.isfinite(w).all()
    assert not row.positive or (w > 0).all()
    assert row.total is None or abs(w.sum() - {"one": 1, "tasks": K}[row.total]) < 1e-12 * K * max(1, abs(w).max())


@rows
@examples
@given(run=runs(), seed=st.integers(0, 1000), exponent=st.floats(-4, 4))
def test_what_should_not_matter_does_not(row, run, seed, exponent):
    """The order of the tasks; the units of the losses; the unit of the gradients; equal tasks get equal weights."""
    K, random = len(run.tasks), torch.Generator().manual_seed(seed)
    plain = follow(row, run)
    if row.equivariant:
        order = torch.randperm(K, generator=random).tolist()
        close(row, follow(row, run.at(order)), [w[order] for w in plain])
    if row.loss_units:
        factors = 10 ** (8 * torch.rand(K, generator=random).double().numpy() - 4)
        close(row, follow(row, Run(run.losses * factors, run.gradients, run.present)), plain)
    if row.gradient_units:
        close(row, follow(row, Run(run.losses, run.gradients * 10**exponent, run.present)), plain)
    if row.symmetric:
        for w in follow(row, run.at([0, 0, *range(1, K)])):
            np.testing.assert_allclose(w[0], w[1], rtol=row.rtol, atol=row.rtol)


@rows
@examples
@given(run=runs(scaled=False), seed=st.integers(0, 1000))  # a capped CAGrad is not exact where lengths are 1e6 apart
def test_a_state_with_its_rows_in_another_order_is_that_of_the_tasks_in_that_order(row, run, seed):
    """What a checkpoint under another order of the tasks goes by: every part of the state follows its task."""
    if not row.equivariant:
        return
    K, half = len(run.tasks), len(run.losses) // 2
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed)).tolist()
    method = row.build(run.tasks)
    w, state = method.init(run.tasks)
    for statistics in run.windows()[:half]:
        w, state = method.update(state, statistics)
    moved = {key: v[order] if v.ndim and len(v) == K else v for key, v in saved(state).items()}
    for statistics, again in zip(run.windows()[half:], run.at(order).windows()[half:], strict=True):
        w, state = method.update(state, statistics)
        w_moved, moved = method.update(moved, again)
        close(row, [w_moved], [w[order]])


@rows
def test_every_entry_of_a_state_has_a_row_per_task_or_none_of_its_own(row):
    """What ``strict=False`` goes by."""
    for K in (3, 5):
        tasks = [f"task {i}" for i in range(K)]
        for name, value in row.build(tasks).init(tasks)[1].items():
            assert isinstance(value, np.ndarray), name
            assert value.ndim == 0 or len(value) in (1, K), name


@rows
def test_a_sum_that_is_kept_is_declared(row):
    """Wrappers read it, to know whether the present tasks share what the absent ones leave."""
    assert row.total is None or row.build(["a"]).keeps_sum


@pytest.mark.parametrize(
    ("method", "argument"),
    [(StaticWeighting, "weights"), (GradNorm, "initial_losses"), (GradientBalancer, "shares"), (FAMO, "min_losses")],
)
def test_the_order_of_a_dictionary_is_of_no_consequence(method, argument):
    """Processes and checkpoints compare methods by their text."""
    one, other = (method(**{argument: values}) for values in ({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}))
    assert one == other and repr(one) == repr(other)


def test_every_exported_method_has_a_row():
    exported = [getattr(accel_weighting, name) for name in accel_weighting.__all__]
    methods = {x for x in exported if isinstance(x, type) and issubclass(x, Method)} - {Method}
    assert {type(row.build(["a", "b"])) for row in CATALOGUE} == methods
