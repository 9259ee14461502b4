"""Every method once: an example and what it promises. Adding a method costs one row here.

The properties (`test_properties.py`), the degenerate gradients (`test_degenerate.py`), two processes against one
(`tests/distributed/test_all_methods.py`) and `lag=0` (`tests/distributed/test_lag_zero.py`) read this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torchjd.aggregation as tj

from accel_weighting import (
    DBMTL,
    FAMO,
    IMTLG,
    IMTLL,
    MGDA,
    SLAW,
    UWSO,
    AlignedMTL,
    CAGrad,
    CarryForward,
    Clamp,
    CoBa,
    ConFIG,
    CosineGate,
    CoVWeighting,
    DualProj,
    DynamicWeightAverage,
    EqualWeighting,
    Every,
    FairGrad,
    GeometricLoss,
    GradientBalancer,
    GradNorm,
    GradVac,
    Method,
    NashMTL,
    NTKWeighting,
    PCGrad,
    RandomLossWeighting,
    ReferenceNorm,
    ReLoBRaLo,
    RotoGrad,
    RotoGradNorm,
    ScaleInvariant,
    Smooth,
    SmoothTchebycheff,
    SoftAdapt,
    StaticWeighting,
    TorchJDWeighting,
    UncertaintyWeighting,
    UPGrad,
    Warmup,
)


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
    moves: bool = True  # whether the weights change within a run of a few steps
    lag_0: bool = False  # whether it is tried at lag=0
    carries: bool = False  # whether the weight of an absent task may change

    def build(self, tasks: list[str]) -> Method:
        return self.method if isinstance(self.method, Method) else self.method(tasks)


def static(tasks: list[str]) -> Method:
    return StaticWeighting(dict.fromkeys(tasks, 2.5))


def static_unequal(tasks: list[str]) -> Method:
    return StaticWeighting({task: (2.0, 0.5, 1.0)[k % 3] for k, task in enumerate(tasks)})


def first_two(tasks: list[str]) -> Method:
    return GradNorm(tasks=tasks[:2])


def balancer_shares(tasks: list[str]) -> Method:
    return GradientBalancer({tasks[0]: 2.0}, decay=0.9)


def adaptive(tasks: list[str]) -> Method:
    return ReferenceNorm(tasks[-1])


def adaptive_guide(tasks: list[str]) -> Method:
    return ReferenceNorm(tasks[0], {tasks[-1]: 2.0}, decay=0.9, max_ratio=100.0)


def gate(tasks: list[str]) -> Method:
    return CosineGate(tasks[0])


def soft_gate(tasks: list[str]) -> Method:
    return CosineGate(tasks[-1], "soft")


UNITS = {"loss_units": True, "gradient_units": True}
ORDERED = {"equivariant": False, "symmetric": False}

CATALOGUE = [
    Row("equal", EqualWeighting(), total="tasks", moves=False, **UNITS),
    Row("static", static, moves=False, **UNITS),
    Row("static unequal", static_unequal, moves=False, **ORDERED, **UNITS),
    Row("gradnorm", GradNorm(), total="tasks", loss_units=True),
    Row("gradnorm alpha=1", GradNorm(alpha=1.0, lr=0.05), total="tasks", loss_units=True),
    Row("gradnorm alpha=0", GradNorm(alpha=0.0), total="tasks", loss_units=True),
    Row("gradnorm sgd", GradNorm(optimizer="sgd", lr=1e-3), total="tasks", loss_units=True),
    Row("gradnorm decay", GradNorm(initial_loss_decay=0.9), total="tasks", loss_units=True),
    Row("gradnorm balanced", GradNorm(start="balanced"), total="tasks", loss_units=True),
    Row("gradnorm balanced sgd", GradNorm(0.0, 1e-3, "sgd", start="balanced"), total="tasks", loss_units=True),
    Row("gradnorm subset", first_two, total="tasks", equivariant=False, loss_units=True),
    Row("cov", CoVWeighting(), total="one", **UNITS),
    Row("cov decay", CoVWeighting(decay=0.9, total="tasks"), total="tasks", **UNITS),
    # Of the losses alone.
    Row("uw", UncertaintyWeighting(), gradient_units=True),
    Row("uw sgd", UncertaintyWeighting(optimizer="sgd", lr=0.01), gradient_units=True),
    Row("uw balanced", UncertaintyWeighting(start="balanced"), gradient_units=True),
    Row("uw log1p", UncertaintyWeighting(form="log1p"), gradient_units=True),
    Row("imtl-l", IMTLL(), gradient_units=True),
    Row("imtl-l balanced", IMTLL(start="balanced"), gradient_units=True),
    Row("dwa", DynamicWeightAverage(), total="tasks", **UNITS),
    Row("dwa epochs", DynamicWeightAverage(steps_per_epoch=2), total="tasks", **UNITS),
    Row("rlw", RandomLossWeighting(), total="one", lag_0=True, **ORDERED, **UNITS),
    Row("rlw dirichlet", RandomLossWeighting("dirichlet"), total="one", **ORDERED, **UNITS),
    Row("gls", GeometricLoss(), gradient_units=True, lag_0=True),
    Row("si", ScaleInvariant(), gradient_units=True, lag_0=True),
    Row("softadapt", SoftAdapt(), total="one", gradient_units=True),
    Row("softadapt normalized", SoftAdapt(history=2, variant="normalized"), total="one", gradient_units=True),
    Row("softadapt loss-weighted", SoftAdapt(variant="loss_weighted"), total="one", gradient_units=True),
    Row("softadapt loss-weighted 2", SoftAdapt(history=2, variant="loss_weighted"), total="one", gradient_units=True),
    Row("relobralo", ReLoBRaLo(alpha=0.9, tau=1.0, rho=0.5), total="tasks", lag_0=True, **UNITS),
    Row("stch", SmoothTchebycheff(0.5, warmup=1, settle=1), total="tasks", gradient_units=True),
    Row("stch warmup", SmoothTchebycheff(warmup=2), total="tasks", gradient_units=True, lag_0=True),
    Row("famo", FAMO(), total="one", gradient_units=True, lag_0=True),
    Row("slaw", SLAW(), total="tasks", gradient_units=True),
    Row("slaw fast", SLAW(decay=0.5), total="tasks", gradient_units=True),
    Row("uwso", UWSO(), total="one", gradient_units=True, lag_0=True),
    Row("coba", CoBa(window=4, warmup=2), total="one", rtol=1e-5, **UNITS),
    # Of norms and losses.
    Row("ntk", NTKWeighting()),
    Row("db-mtl", DBMTL(), gradient_units=True, lag_0=True),
    Row("reference norm", adaptive, loss_units=True, **ORDERED),
    Row("reference norm guide", adaptive_guide, loss_units=True, **ORDERED),
    # Of the Gram matrix, or its diagonal, alone.
    Row("mgda", MGDA(), total="one", positive=False, lag_0=True, **UNITS),
    Row("mgda norm", MGDA(normalize="norm"), total="one", positive=False, lag_0=True, **UNITS),
    Row("pcgrad", PCGrad(), lag_0=True, **ORDERED, **UNITS),
    Row("cagrad", CAGrad(), lag_0=True, **UNITS),
    Row("imtl-g", IMTLG(), total="one", positive=False, lag_0=True, **UNITS),
    # Singular vectors are as exact as the ratio of the longest gradient to the shortest allows, and with "rmse" the
    # weight of the shortest grows with it.
    Row("aligned-mtl", AlignedMTL(), positive=False, rtol=1e-6, lag_0=True, **UNITS),
    Row("aligned-mtl rmse", AlignedMTL(scale="rmse"), positive=False, loss_units=True, **ORDERED),
    Row("nash-mtl", NashMTL(), lag_0=True, **UNITS),
    Row("fairgrad", FairGrad(), lag_0=True, **UNITS),
    Row("fairgrad 2", FairGrad(2.0), rtol=1e-6, **UNITS),
    Row("upgrad", UPGrad(), rtol=1e-6, lag_0=True, **UNITS),
    Row("dualproj", DualProj(), rtol=1e-6, lag_0=True, **UNITS),
    Row("cosine gate", gate, positive=False, lag_0=True, **ORDERED, **UNITS),
    Row("cosine gate soft", soft_gate, positive=False, lag_0=True, **ORDERED, **UNITS),
    Row("gradvac", GradVac(), lag_0=True, positive=False, rtol=1e-5, **ORDERED, **UNITS),
    Row("gradvac raw", GradVac(0.1, "raw"), positive=False, rtol=1e-5, **ORDERED, **UNITS),
    Row("config", ConFIG(), positive=False, lag_0=True, **UNITS),
    Row("balancer", GradientBalancer(), **UNITS),
    Row("balancer shares", balancer_shares, lag_0=True, **ORDERED, **UNITS),
    Row("balancer total norm", GradientBalancer(decay=0.5, total_norm=1.0), loss_units=True),
    # Without rotations where there is no representation: then they are their magnitudes alone.
    Row("rotograd", RotoGrad(burn_in=2, lr=0.1), lag_0=True, **UNITS),
    Row("rotograd cayley", RotoGrad(lr=0.5, size=3), **UNITS),
    Row("rotograd magnitudes", RotoGrad(rotate=False, burn_in=2), lag_0=True, **UNITS),
    Row("rotograd directions", RotoGrad(scale=False, lr=0.1), moves=False, lag_0=True, **UNITS),
    Row("rotograd directions cayley", RotoGrad(scale=False, lr=0.5), moves=False, **UNITS),
    Row("rotograd cooperative", RotoGrad(cooperative_after=1, normalize_losses=True, init="haar"), gradient_units=True),
    Row("rotogradnorm", RotoGradNorm(alpha=1.0), total="tasks", loss_units=True),
    Row("rotogradnorm mean norm", RotoGradNorm(0.0, target="mean_norm"), total="tasks", loss_units=True),
    Row("rotogradnorm fast", RotoGradNorm(alpha=1.0, lr=0.1), total="tasks", loss_units=True, lag_0=True),
    Row("torchjd upgrad", TorchJDWeighting(tj.UPGradWeighting()), lag_0=True, **UNITS),
    Row("torchjd pcgrad", TorchJDWeighting(tj.PCGradWeighting()), **ORDERED, **UNITS),
    # Around any of them.
    Row("smooth", Smooth(GradNorm(), 0.9), total="tasks", loss_units=True),
    Row("smooth mgda", Smooth(MGDA(), 0.5), total="one", positive=False, **UNITS),
    Row("smooth nash", Smooth(NashMTL(), 0.5), lag_0=True, **UNITS),
    Row("clamp", Clamp(CoVWeighting(total="tasks"), 0.5, 2.0), total="tasks", **UNITS),
    Row("clamp gradnorm", Clamp(GradNorm(alpha=0.0, lr=0.5), 0.5, 1.5), total="tasks", loss_units=True),
    Row("warmup", Warmup(CoVWeighting(warmup=1), 2), total="one", **UNITS),
    Row("every", Every(GradNorm(), 2), total="tasks", loss_units=True),
    Row("every config", Every(ConFIG(), 2), positive=False, lag_0=True, **UNITS),
    Row("every smooth rotograd", Every(Smooth(RotoGrad(lr=0.1), 0.5), 2), **UNITS),
    Row("carry", CarryForward(GradNorm(lr=0.1)), total="tasks", loss_units=True, carries=True),
    Row("carry cov", CarryForward(CoVWeighting(), 2), total="one", carries=True, **UNITS),
    Row("nested", Smooth(Clamp(Every(GradNorm(), 2), 0.9, 1.1), 0.5), total="tasks", loss_units=True),
]
