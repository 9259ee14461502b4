"""Checkpoints through `accelerator.save_state` and `load_state`: resumed on as many processes, on others, refused.

Functions without `test` in their names run inside the processes;
the table in tests/README.md says which failure each test shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accel_weighting import CoVWeighting, GradNorm, Method, RotoGrad, Smooth, Weighter
from tests.distributed.setups import GRADNORM, NAMES, Setup, build, error_of, rank
from tests.ranks import run_ranks
from tests.scenarios import full_parameters

OURS = "custom_checkpoint_0.pkl"
METHODS: dict[str, Method] = {
    "GradNorm": GRADNORM,
    "CoV": CoVWeighting(decay=0.9),
    "RotoGrad": Smooth(RotoGrad(lr=0.5), 0.5),
}
ENGINES = ["ddp", "fsdp2", "zero2"]
CELLS = [(engine, method) for engine in ENGINES for method in METHODS]
STEPS, SAVE = 6, 3


def read(folder: Path) -> dict[str, Any]:
    """The weighter's part of a checkpoint, as anybody may open it."""
    return torch.load(folder / OURS, weights_only=True)


def outcome(setup: Setup, weights: list[list[float]]) -> dict[str, Any]:
    saved = setup.weighter.state_dict()
    return {
        "weights": weights,
        "state": saved["state"],
        "average": setup.weighter.average_weights,
        "history": [step for step, _ in setup.weighter.history],
        "parameters": full_parameters(setup.inner, setup.model),
    }


def setup_of(engine: str, method: str, seed: int = 0) -> Setup:
    return build(engine, method=METHODS[method], seed=seed, gradient_accumulation_steps=2)


def through_and_resumed(folder: Path) -> dict[Any, Any]:
    """Uninterrupted; saved half way; and gone on with by a model of another seed."""
    found = {}
    for engine, method in CELLS:
        checkpoint = folder / f"{engine} {method}"
        whole = setup_of(engine, method)
        weights = whole.steps(0, STEPS)
        first = setup_of(engine, method)
        first.steps(0, SAVE)
        first.accelerator.save_state(str(checkpoint))
        halfway = full_parameters(first.inner, first.model)
        again = setup_of(engine, method, seed=5)
        again.accelerator.load_state(str(checkpoint))
        resumed = outcome(again, again.steps(SAVE, STEPS))
        found[engine, method] = outcome(whole, weights), resumed, halfway
    return found


def resumed_elsewhere(folder: Path, halfway: dict[Any, dict[str, Tensor]]) -> dict[Any, Any]:
    """The same checkpoints on another number of processes.

    DeepSpeed does not load its own on another number of processes; there the model's parameters are taken up by hand,
    and the weighter's state from its file.
    """
    found: dict[Any, Any] = {}
    for engine, method in CELLS:
        checkpoint = folder / f"{engine} {method}"
        setup = setup_of(engine, method, seed=5)
        if engine == "zero2":
            found["control", method] = zero_without_weighter(checkpoint)
            torch.manual_seed(5)
            setup = restart(engine, method, halfway[engine, method])
            setup.weighter.load_state_dict(read(checkpoint))
        else:
            setup.accelerator.load_state(str(checkpoint))
        found[engine, method] = outcome(setup, setup.steps(SAVE, STEPS))
    return found


def restart(engine: str, method: str, parameters: dict[str, Tensor]) -> Setup:
    """A prepared model that begins with these parameters."""
    from tests.ranks import accelerator_for
    from tests.small import Net

    accelerator = accelerator_for(engine, gradient_accumulation_steps=2)  # type: ignore[arg-type]
    inner = Net(NAMES).double()
    inner.load_state_dict(parameters)
    model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=1e-3))
    inner = accelerator.unwrap_model(model)
    weighter = Weighter(METHODS[method], NAMES, accelerator=accelerator, heads=dict(inner.heads))
    return Setup(accelerator, model, inner, weighter, optimizer)


def zero_without_weighter(checkpoint: Path) -> str:
    """The control: what DeepSpeed says to its own checkpoint here, with nothing of ours around."""
    from tests.ranks import accelerator_for
    from tests.small import Net

    accelerator = accelerator_for("zero2")
    inner = Net(NAMES).double()
    accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=1e-3))
    try:
        accelerator._models[0].load_checkpoint(str(checkpoint), "pytorch_model")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[Any, Any]]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(through_and_resumed, 2, folder, folder, timeout=240)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_checkpoint_resumed_on_as_many_processes_is_bitwise_the_uninterrupted_run(engine, method, saved) -> None:
    _, ranks = saved
    for found in ranks:
        whole, resumed, _ = found[engine, method]
        assert whole["weights"][SAVE:] == resumed["weights"]
        assert resumed["average"] == whole["average"] and resumed["history"] == whole["history"] == list(range(STEPS))
        for what in ("state", "parameters"):
            assert resumed[what].keys() == whole[what].keys()
            assert all(torch.equal(resumed[what][name], value) for name, value in whole[what].items()), what
        assert whole["weights"] == ranks[0][engine, method][0]["weights"]
        assert method == "CoV" or whole["weights"][SAVE - 1] != whole["weights"][-1]


TOLERANCES = {
    "ddp": 1e-12,  # the same float64 numbers, added in another order
    "fsdp2": 1e-12,
    "zero2": 2e-6,  # ZeRO's own copy of the parameters is float32, and rounds to other values here and there
}


@pytest.mark.parametrize("world", [1, 3])
def test_checkpoint_resumed_on_another_number_of_processes_follows_the_uninterrupted_run(
    world, saved, tmp_path
) -> None:
    folder, ranks = saved
    halfway = {cell: ranks[0][cell][2] for cell in CELLS}
    every = run_ranks(resumed_elsewhere, world, tmp_path, folder, halfway, timeout=240)
    for found in every:
        for engine, method in CELLS:
            whole, resumed = ranks[0][engine, method][0], found[engine, method]
            close = {"rtol": TOLERANCES[engine], "atol": TOLERANCES[engine]}
            for mine, theirs in zip(resumed["weights"], whole["weights"][SAVE:], strict=True):
                assert mine == pytest.approx(theirs, rel=close["rtol"]), (engine, method)
            for what in ("state", "parameters"):
                torch.testing.assert_close(resumed[what], whole[what], **close, msg=f"{engine} {method} {what}")
            assert resumed["average"] == pytest.approx(whole["average"], rel=close["rtol"])
            assert resumed["history"] == whole["history"]
            assert resumed["weights"] == every[0][engine, method]["weights"]
        for method in METHODS:
            assert "world size" in found["control", method], "DeepSpeed loads it now: so should the test"


# ---- what is refused -------------------------------------------------------------------------------------------------


class Counter:
    """Something else that a user saves with the accelerator's state."""

    def __init__(self) -> None:
        self.loaded: Any = None

    def state_dict(self) -> dict[str, int]:
        return {"epoch": 3}

    def load_state_dict(self, state: Any) -> None:
        self.loaded = state


OTHERS: dict[str, tuple[dict[str, Any], dict[str, tuple[str, str]]]] = {
    "hyperparameter": ({"method": GradNorm(alpha=0.5, lr=0.05)}, {"method": ("alpha=1.0", "alpha=0.5")}),
    "method": ({"method": CoVWeighting()}, {"method": ("GradNorm(", "CoVWeighting(")}),
    "tasks": ({"names": ["t0", "t2"]}, {"tasks": (str(NAMES), "['t0', 't2']")}),
    "order of tasks": ({"names": NAMES[::-1]}, {"tasks": (str(NAMES), str(NAMES[::-1]))}),
    "method and tasks": (
        {"method": CoVWeighting(), "names": [*NAMES, "t3"]},
        {"tasks": (str(NAMES), "'t3'"), "method": ("GradNorm(", "CoVWeighting(")},
    ),
}


def refused(folder: Path) -> dict[str, Any]:
    setup = build(wrap=False)
    for step in range(3):
        setup.step(step)
    setup.accelerator.save_state(str(folder))
    setup.accelerator.wait_for_everyone()
    found: dict[str, Any] = {"saved": (setup.weighter.weights, setup.weighter.average_weights)}
    for name, (given, _) in OTHERS.items():
        other = build(wrap=False, **given)
        before = whole(other)
        message = error_of(lambda other=other: other.accelerator.load_state(str(folder)))  # type: ignore[misc]
        untouched = all(torch.equal(x, before[key]) for key, x in whole(other).items())
        other.weighter.load_state_dict(read(folder), strict=False)
        kept = other.weighter.weights, other.weighter.average_weights, other.weighter.history
        found[name] = message, untouched, kept, other.step(3)

    states = {
        "version": {**read(folder), "version": 99},
        "version, and nothing known": {"kind": read(folder)["kind"], "version": 0},
        "foreign": {"epoch": 3, "lr": 0.1},
    }
    for name, state in states.items():
        copy = folder.with_name(f"{name} {rank()}")  # of every process's own
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        torch.save(state, copy / OURS)
        other = build(wrap=False)
        before = whole(other)
        message = error_of(lambda other=other, copy=copy: other.accelerator.load_state(str(copy)))  # type: ignore[misc]
        loosely = error_of(lambda other=other, state=state: other.weighter.load_state_dict(state, strict=False))  # type: ignore[misc]
        untouched = all(torch.equal(x, before[key]) for key, x in whole(other).items())
        found[name] = message, loosely, untouched

    turned = build(wrap=False)
    counter = Counter()
    turned.accelerator._custom_objects.insert(0, counter)  # as if it had been registered before the weighter
    turned.accelerator.save_state(str(folder.with_name("counter first")))
    turned.accelerator.wait_for_everyone()  # custom objects are written by the main process alone
    straight = build(wrap=False)
    straight.accelerator.register_for_checkpointing(Counter())
    found["order of registration"] = error_of(
        lambda: straight.accelerator.load_state(str(folder.with_name("counter first")))
    )
    return found


def whole(setup: Setup) -> dict[str, Tensor]:
    saved = setup.weighter.state_dict()
    return {"weights": saved["weights"], "sum": saved["weight_sum"], **saved["state"]}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("refused")
    return run_ranks(refused, 2, folder, folder / "checkpoint", timeout=90)


@pytest.mark.parametrize("other", OTHERS)
def test_checkpoint_of_another_weighter_is_refused_before_training_on_all_processes(other, refusals) -> None:
    for found in refusals:
        message, untouched, _, _ = found[other]
        expected = OTHERS[other][1]
        assert message.startswith(
            f"ValueError: The checkpoint was written by another weighter. Differences: {', '.join(expected)}.\n"
        )
        rows = dict(line.strip().split(": ", 1) for line in message.splitlines()[1:-1])
        assert rows.keys() == expected.keys() and untouched
        for name, (old, new) in expected.items():
            there, here = rows[name].split(" in the checkpoint, ")
            assert old in there and new in here


@pytest.mark.parametrize("other", OTHERS)
def test_checkpoint_loaded_without_strict_keeps_what_fits_alike_on_all_processes(other, refusals) -> None:
    weights, average = refusals[0]["saved"]
    for found in refusals:
        _, _, (kept, kept_average, history), moved = found[other]
        names = OTHERS[other][0].get("names", NAMES)
        total = 1 if "method" in other else len(names)  # the sum that the method keeps

        def to_total(values: dict[str, float], names=names, total=total) -> Any:
            return pytest.approx({t: values[t] * total / sum(values[t] for t in names) for t in names}, rel=1e-14)

        assert kept == to_total({"t3": 1 / 4, **weights})
        if set(names) <= set(NAMES):
            assert kept_average == to_total(average)
        else:
            assert kept_average == kept  # an average over other steps than the others' would be no average
        assert [step for step, _ in history] == [0, 1, 2]
        assert {f"loss/{task}" for task in names if task in NAMES} <= history[0][1].keys()
        assert "cosine/t0/t2" in history[0][1] or "cosine/t2/t0" in history[0][1]
        assert moved == refusals[0][other][3] and all(torch.tensor(list(moved.values())).isfinite())


@pytest.mark.parametrize("name", ["version", "version, and nothing known"])
def test_checkpoint_of_another_version_is_refused_however_it_is_loaded(name, refusals) -> None:
    for found in refusals:
        message, loosely, untouched = found[name]
        assert "Differences: version" in message and "Differences: version" in loosely and untouched


def test_checkpoint_that_is_not_a_weighters_is_refused_however_it_is_loaded(refusals) -> None:
    for found in refusals:
        message, loosely, untouched = found["foreign"]
        assert untouched and message == loosely
        assert message.startswith("ValueError: This does not hold a weighter's state (keys: ['epoch', 'lr']).")


def test_checkpoint_of_objects_registered_in_another_order_is_refused(refusals) -> None:
    for found in refusals:
        message = found["order of registration"]
        assert message.startswith("ValueError: This does not hold a weighter's state (keys: ['epoch']).")
        assert "registered for checkpointing in the same order as when it was saved" in message
