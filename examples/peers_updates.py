"""LibMTL's classes and these methods on the same losses: are the updates the same, and of the same length?

    pip install --no-deps LibMTL
    python examples/peers_updates.py

The losses are `L_k = g_k · θ + c_k`, so every gradient is known. LibMTL's `backward` writes its update to `θ.grad`, and
so does a `Weighter` with `lag=0`; neither sees anything of the other. For every class that the installed version of
LibMTL has, a line says how far the directions are apart (1 − cosine) and how long LibMTL's update is, × ours. Ends with
an error where a direction is farther apart than LibMTL's own solver allows, or a length is not the documented one.
Takes some seconds.
"""

import argparse
import importlib
import importlib.util
import random
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from common import table
from torch import Tensor

from accel_weighting import (
    DBMTL,
    FAMO,
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    EqualWeighting,
    FairGrad,
    GeometricLoss,
    GradVac,
    Method,
    NashMTL,
    PCGrad,
    SmoothTchebycheff,
    UPGrad,
    Weighter,
)


class Pair(NamedTuple):
    """A class of LibMTL and a method.

    Attributes:
        libmtl: Its name.
        arguments: Of its `backward`.
        method: Ours.
        length: What theirs is long, × ours, for K tasks; None: not comparable.
        two: Whether only two tasks can be compared, since there the random order makes no difference.
        tolerance: Of 1 − cosine, where their solver is not exact.
        at_z: With LibMTL's `--rep_grad`, which for MGDA's normalisation makes a difference: there its weights are for
            the gradients as they are, as in the authors' code and here, else for those of length 1.
        windows: After how many ours is compared.
    """

    libmtl: str
    arguments: dict[str, Any]
    method: Method
    length: Callable[[int], float] | None = lambda K: 1.0
    two: bool = False
    tolerance: float = 1e-9
    at_z: bool = False
    windows: int = 1


PAIRS = [
    Pair("EW", {}, EqualWeighting()),
    Pair("GLS", {}, GeometricLoss()),
    Pair("IMTL", {}, IMTLG()),  # whose learned scales are 1 in the first step
    Pair("MGDA", {"mgda_gn": "none"}, MGDA(), tolerance=1e-3),
    Pair("MGDA", {"mgda_gn": "l2"}, MGDA("norm"), tolerance=1e-3, at_z=True),
    Pair("PCGrad", {}, PCGrad(), two=True),
    Pair("GradVac", {"beta": 0.5, "GradVac_beta": 0.5, "GradVac_group_type": 0}, GradVac(), two=True),
    Pair("CAGrad", {"calpha": 0.5, "rescale": 0}, CAGrad(0.5), tolerance=1e-4),
    Pair("CAGrad", {"calpha": 0.5, "rescale": 1}, CAGrad(0.5), lambda K: 1 / (1 + 0.5**2), tolerance=1e-4),
    Pair("Aligned_MTL", {}, AlignedMTL(), lambda K: K),
    Pair("Nash_MTL", {"update_weights_every": 1, "optim_niter": 100, "max_norm": 0}, NashMTL(), None, tolerance=1e-4),
    Pair("FairGrad", {"FairGrad_alpha": 2.0}, FairGrad(2.0), None, tolerance=1e-6),
    Pair("UPGrad", {"UPGrad_norm_eps": 0.0, "UPGrad_reg_eps": 1e-10}, UPGrad(), tolerance=1e-6),
    Pair("DB_MTL", {"DB_beta": 0.0, "DB_beta_sigma": 0.0}, DBMTL(), windows=2),  # 1/L is of the last one
    Pair("STCH", {"STCH_mu": 1.0, "STCH_warmup_epoch": 4}, SmoothTchebycheff(), None),  # its sum of log losses
    Pair("FAMO", {"FAMO_w_lr": 0.025, "FAMO_w_gamma": 0.01}, FAMO()),
]


def theirs(kind: type[Any], pair: Pair, J: Tensor, values: Tensor) -> Tensor:
    """LibMTL's update."""
    theta = torch.zeros(J.shape[1], requires_grad=True)
    theta.grad = torch.zeros_like(theta)

    class Model(kind):  # type: ignore[misc]
        def get_share_params(self) -> list[Tensor]:
            return [theta]

        def zero_grad_share_params(self) -> None:
            theta.grad.zero_()

    model = Model()
    model.task_num, model.task_name = len(J), [str(k) for k in range(len(J))]
    model.device, model.rep_grad, model.epoch = torch.device("cpu"), pair.at_z, 0
    model.init_param()
    model.rep = theta[None] * 1
    model.rep_tasks = {task: model.rep.detach().clone().requires_grad_() for task in model.task_name}
    inputs = [z[0] if pair.at_z else theta for z in model.rep_tasks.values()]
    losses = [z @ g + value for z, g, value in zip(inputs, J, values, strict=True)]
    model.backward(losses if pair.at_z else torch.stack(losses), **pair.arguments)
    return theta.grad


def ours(pair: Pair, J: Tensor, values: Tensor) -> Tensor:
    """The update of a weighter."""
    theta = torch.zeros(J.shape[1], requires_grad=True)
    weighter = Weighter(pair.method, [str(k) for k in range(len(J))], lag=0)
    for _ in range(pair.windows):
        theta.grad = None
        aliases = weighter.branch(theta * 1)
        tasks = zip(weighter.tasks, J, values, strict=True)
        weighter.backward({task: aliases[task] @ g + value for task, g, value in tasks})
    assert theta.grad is not None
    return theta.grad


def compare(pair: Pair, kind: type[Any]) -> tuple[list[str], bool]:
    """A line of the table, and whether all is as it should be."""
    apart, lengths, sizes = 0.0, [], (2,) if pair.two else (2, 3, 5)
    for K in sizes:
        if K != 3 and pair.libmtl == "CAGrad":
            continue  # written for three tasks in several versions
        for seed in range(5):
            rng = np.random.default_rng([K, seed])
            J = torch.tensor(rng.normal(size=(K, 8)) * rng.uniform(0.5, 2, size=(K, 1)))
            values = torch.tensor(rng.uniform(0.5, 3, size=K))
            random.seed(seed)
            a, b = theirs(kind, pair, J, values), ours(pair, J, values)
            apart = max(apart, 1 - float(a @ b / a.norm() / b.norm()))
            lengths.append(float(a.norm() / b.norm()) / (pair.length(K) if pair.length else 1.0))
    right = apart <= pair.tolerance and (pair.length is None or max(abs(x - 1) for x in lengths) < 1e-2)
    setting = ", ".join([f"{name}={value}" for name, value in pair.arguments.items()] + ["--rep_grad"] * pair.at_z)
    length = f"{min(lengths):.6g} to {max(lengths):.6g}"
    if pair.length is None:
        length += " (differs)"
    elif pair.length(2) != 1:
        length += f" of {pair.length(2):g} (K = 2), {pair.length(5):g} (K = 5)"
    return [f"{pair.libmtl}({setting})", repr(pair.method), f"{apart:.0e}", length, "" if right else "NO"], right


def weightings() -> Any:
    """LibMTL's weighting classes without the rest of it, whose vision models need a torchvision of their time."""
    found = importlib.util.find_spec("LibMTL")
    if found is None:
        raise SystemExit("LibMTL is not installed: pip install --no-deps LibMTL")
    package = types.ModuleType("LibMTL")
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules["LibMTL"] = package
    return importlib.import_module("LibMTL.weighting")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    libmtl = weightings()
    torch.set_default_dtype(torch.float64)
    lines, wrong = [["LibMTL", "here", "1 − cosine, at most", "its length, × ours", ""]], 0
    for pair in PAIRS:
        kind = getattr(libmtl, pair.libmtl, None)
        if kind is None:
            lines.append([pair.libmtl, repr(pair.method), "not in this version", "", ""])
            continue
        line, right = compare(pair, kind)
        lines.append(line)
        wrong += not right
    print(table(lines))
    if wrong:
        sys.exit(f"{wrong} of these are not as documented")


if __name__ == "__main__":
    main()
