"""What every method promises, by hypothesis. A new method costs one row in METHODS."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torchjd.aggregation as tj
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import accel_weighting
from accel_weighting import (
    FAMO,
    IMTLG,
    IMTLL,
    MGDA,
    AlignedMTL,
    CAGrad,
    Clamp,
    ConFIG,
    CoVWeighting,
    DynamicWeightAverage,
    EqualWeighting,
    Every,
    GeometricLoss,
    GradientBalancer,
    GradNorm,
    Method,
    NashMTL,
    PCGrad,
    RandomLossWeighting,
    ReLoBRaLo,
    RotoGrad,
    RotoGradNorm,
    ScaleInvariant,
    Smooth,
    SmoothTchebycheff,
    SoftAdapt,
    StaticWeighting,
    Statistics,
    TorchJDWeighting,
    UncertaintyWeighting,
    Warmup,
)
from accel_weighting.progress import Progress


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
    # Of the losses alone.
    Row("uw", UncertaintyWeighting(), gradient_units=True),
    Row("uw sgd", UncertaintyWeighting(optimizer="sgd", lr=0.01), gradient_units=True),
    Row("imtl-l", IMTLL(), gradient_units=True),
    Row("dwa", DynamicWeightAverage(), total="tasks", loss_units=True, gradient_units=True),
    Row("dwa epochs", DynamicWeightAverage(steps_per_epoch=2), total="tasks", loss_units=True, gradient_units=True),
    Row("rlw", RandomLossWeighting(), "one", equivariant=False, symmetric=False, loss_units=True, gradient_units=True),
    Row(
        "rlw dirichlet",
        RandomLossWeighting("dirichlet"),
        total="one",
        equivariant=False,
        symmetric=False,
        loss_units=True,
        gradient_units=True,
    ),
    Row("gls", GeometricLoss(), gradient_units=True),
    Row("si", ScaleInvariant(), gradient_units=True),
    Row("softadapt", SoftAdapt(), total="one", gradient_units=True),
    Row("softadapt normalized", SoftAdapt(history=2, variant="normalized"), total="one", gradient_units=True),
    Row("softadapt loss-weighted", SoftAdapt(variant="loss_weighted"), total="one", gradient_units=True),
    Row("relobralo", ReLoBRaLo(alpha=0.9, tau=1.0, rho=0.5), total="tasks", loss_units=True, gradient_units=True),
    Row("stch", SmoothTchebycheff(warmup=1), total="tasks", gradient_units=True),
    Row("famo", FAMO(), total="one", gradient_units=True),
    # Of the Gram matrix, or its diagonal, alone.
    Row("mgda", MGDA(), total="one", positive=False, loss_units=True, gradient_units=True),
    Row("mgda norm", MGDA(normalize="norm"), total="one", positive=False, loss_units=True, gradient_units=True),
    Row("pcgrad", PCGrad(), equivariant=False, symmetric=False, loss_units=True, gradient_units=True),
    Row("cagrad", CAGrad(), loss_units=True, gradient_units=True),
    Row("imtl-g", IMTLG(), total="one", positive=False, loss_units=True, gradient_units=True),
    # Singular vectors are as exact as the ratio of the longest gradient to the shortest allows, and with "rmse" the
    # weight of the shortest grows with it.
    Row("aligned-mtl", AlignedMTL(), positive=False, loss_units=True, gradient_units=True, rtol=1e-6),
    Row(
        "aligned-mtl rmse",
        AlignedMTL(scale="rmse"),
        positive=False,
        equivariant=False,
        symmetric=False,
        loss_units=True,
        gradient_units=False,
    ),
    Row("nash-mtl", NashMTL(), loss_units=True, gradient_units=True),
    Row("config", ConFIG(), positive=False, loss_units=True, gradient_units=True),
    Row("balancer", GradientBalancer(), loss_units=True, gradient_units=True),
    Row("balancer total norm", GradientBalancer(decay=0.5, total_norm=1.0), loss_units=True),
    Row("rotograd magnitudes", RotoGrad(rotate=False, burn_in=2), loss_units=True, gradient_units=True),
    Row("rotogradnorm", RotoGradNorm(alpha=1.0), total="tasks", loss_units=True),
    Row("torchjd upgrad", TorchJDWeighting(tj.UPGradWeighting()), loss_units=True, gradient_units=True),
    Row(
        "torchjd pcgrad",
        TorchJDWeighting(tj.PCGradWeighting()),
        equivariant=False,
        symmetric=False,
        loss_units=True,
        gradient_units=True,
    ),
    # Around any of them.
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


rows = pytest.mark.parametrize("row", METHODS, ids=lambda row: row.id)
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
        seen = {k: v for k, v in vars(statistics).items() if isinstance(v, torch.Tensor)}
        seen_before, state_before = ({k: v.clone() for k, v in d.items()} for d in (seen, state))
        after, next_state = method.update(state, statistics)
        check_weights(row, after, K)
        assert torch.equal(w[~statistics.present], after[~statistics.present])
        for now, then in ((seen, seen_before), (state, state_before)):
            assert all(torch.equal(now[key], then[key]) for key in then) and now.keys() == then.keys()
        form, next_form = ({k: (v.shape, v.dtype) for k, v in s.items()} for s in (state, next_state))
        assert next_form == form
        w, before, state = after, state, next_state

    file = io.BytesIO()
    torch.save(before, file)
    file.seek(0)
    again, _ = method.update(torch.load(file, weights_only=True), statistics)
    assert torch.equal(w, again), "the same state, saved and loaded, and the same statistics gave other weights"


def check_weights(row, w, K):
    assert w.dtype == torch.float64 and w.shape == (K,) and w.device.type == "cpu"
    assert w.isfinite().all()
    assert not row.positive or (w > 0).all()
    assert row.total is None or abs(w.sum() - {"one": 1, "tasks": K}[row.total]) < 1e-12 * K * max(1, w.abs().max())


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
        factors = 10 ** (8 * torch.rand(K, generator=random).double() - 4)
        close(row, follow(row, Run(run.losses * factors, run.gradients, run.present)), plain)
    if row.gradient_units:
        close(row, follow(row, Run(run.losses, run.gradients * 10**exponent, run.present)), plain)
    if row.symmetric:
        for w in follow(row, run.at([0, 0, *range(1, K)])):
            torch.testing.assert_close(w[0], w[1], rtol=row.rtol, atol=row.rtol)


@rows
@examples
@given(run=runs(), seed=st.integers(0, 1000))
def test_row_27_a_checkpoint_goes_on_under_another_order_of_the_tasks(row, run, seed):
    """Loaded with ``strict=False``: every part of the state follows its task."""
    K, half = len(run.tasks), len(run.losses) // 2
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed)).tolist()
    before = Progress(row.build(run.tasks), run.tasks, None)
    for statistics in run.windows()[:half]:
        before.update(statistics)
    after = Progress(row.build(run.tasks), [run.tasks[k] for k in order], None)
    after.load_state_dict(before.state_dict(), strict=False)
    close(row, [after.weights], [before.weights[order]])
    for name, value in after.state.items():
        assert value.shape == before.state[name].shape
    if row.equivariant:
        for statistics, permuted in zip(run.windows()[half:], run.at(order).windows()[half:], strict=True):
            before.update(statistics)
            after.update(permuted)
            close(row, [after.weights], [before.weights[order]])


@rows
@examples
@given(run=runs(), seed=st.integers(0, 1000))
def test_row_27_a_checkpoint_of_more_or_fewer_tasks_keeps_what_the_method_promises(row, run, seed):
    K, half = len(run.tasks), len(run.losses) // 2
    for old in (run.at(list(range(1 + seed % K))), run.at([*range(K), *[0] * (1 + seed % 3)])):
        before = Progress(row.build(old.tasks), old.tasks, None)
        for statistics in old.windows()[:half]:
            before.update(statistics)
        after = Progress(row.build(run.tasks), run.tasks, None)
        after.load_state_dict(before.state_dict(), strict=False)
        check_weights(row, after.weights, K)
        for statistics in run.windows()[half:]:
            after.update(statistics)
            check_weights(row, after.weights, K)


@rows
def test_every_entry_of_a_state_has_a_row_per_task_or_none_of_its_own(row):
    """What ``strict=False`` goes by."""
    for K in (3, 5):
        tasks = [f"task {i}" for i in range(K)]
        for name, value in row.build(tasks).init(tasks)[1].items():
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
    assert {type(row.build(["a", "b"])) for row in METHODS} == methods
