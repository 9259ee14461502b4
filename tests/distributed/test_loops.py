"""Loops of every shape on two real processes, against one process on the whole batch: windows, weights, gradients.

Functions without `test` in their names run inside the processes, many in one launch.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  a group of the user's own, and which process this is
from torch import Tensor

from accel_weighting import (
    FAMO,
    CarryForward,
    CoVWeighting,
    DynamicWeightAverage,
    GradientBalancer,
    GradNorm,
    Method,
    ReLoBRaLo,
    SoftAdapt,
    UncertaintyWeighting,
    Weighter,
)
from tests.distributed.setups import F64, GRADNORM, NAMES, Setup, build, error_of, rank
from tests.ranks import run_ranks, warnings_said
from tests.small import batch, net, task_losses

STEPS = 6


def parameters(setup: Setup) -> list[Tensor]:
    if any(hasattr(p, "ds_id") for p in setup.inner.parameters()):  # divided by ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(setup.inner.parameters())):
            return [p.detach().clone() for p in setup.inner.parameters()]
    full = [getattr(p, "full_tensor", lambda p=p: p)() for p in setup.inner.parameters()]
    return [p.detach().clone() for p in full]


def seen(setup: Setup) -> dict[str, Any]:
    weighter = setup.weighter
    return {
        "step": weighter._progress.step,
        "weights": torch.tensor(list(weighter.weights.values()), dtype=F64),
        "losses": torch.as_tensor(weighter.statistics.losses),
        "norms": torch.as_tensor(weighter.statistics.norms),
        "parameters": parameters(setup),
    }


def stepped(setup: Setup) -> None:
    setup.optimizer.step()
    setup.optimizer.zero_grad()


# ---- loops that are the whole batch ----------------------------------------------------------------------------------


def by_hand(engine: str, sync: bool = False) -> dict[str, Any]:
    """Two micro-batches of each process, `total / 2`; with `no_sync` on the first of them."""
    setup = build(engine)
    for step in range(STEPS):
        for part in range(2):
            quiet = sync and part == 0
            with setup.accelerator.no_sync(setup.model) if quiet else contextlib.nullcontext():
                total = setup.weighter.combine(setup.losses(step, part=part, parts=2), last=part == 1) / 2
                setup.accelerator.backward(total)
                setup.weighter.step()
        stepped(setup)
    return seen(setup)


def token_recipe(engine: str) -> dict[str, Any]:
    """Accelerate's recipe for causal language models: counts are gathered, `no_sync` is by hand."""
    setup = build(engine)
    world = setup.accelerator.num_processes
    sizes = {1: (36,), 2: (11, 5, 9, 11)}[world]
    parts = len(sizes) // world
    for step in range(STEPS):
        for part in range(parts):
            mine = sizes[setup.accelerator.process_index * parts + part]
            losses = setup.losses(step, part=part, parts=parts, sizes=sizes)
            last = part == parts - 1
            with contextlib.nullcontext() if last else setup.accelerator.no_sync(setup.model):
                total = setup.weighter.combine(losses, num_items=mine, last=last)
                setup.accelerator.backward(total * (mine * world / 36))
                setup.weighter.step()
        stepped(setup)
    return seen(setup)


def backward_per_task(engine: str) -> dict[str, Any]:
    """Every task by itself, under `accumulate`; with DDP and FSDP2 each backward reduces what it made."""
    setup = build(engine, gradient_accumulation_steps=2)
    for step in range(STEPS):
        for part in range(2):
            with setup.accelerator.accumulate(setup.model):
                with setup.weighter.micro_batch():
                    for task in NAMES:
                        losses = setup.losses(step, part=part, parts=2)
                        unused = sum(0 * loss for name, loss in losses.items() if name != task)
                        setup.weighter.backward({task: losses[task]}, extra={"unused": unused})
                stepped(setup)
    return seen(setup)


def plain_ddp() -> dict[str, Any]:
    """torch's own DDP with `process_group=`, without Accelerate."""
    torch.manual_seed(0)
    inner = net(NAMES)
    model = torch.nn.parallel.DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=1e-3)
    weighter = Weighter(GRADNORM, NAMES, heads=dict(inner.heads), process_group=dist.group.WORLD)
    for step in range(STEPS):
        x, y = batch(step, 3, F64)
        for part in range(2):
            rows = slice(18 * rank() + 9 * part, 18 * rank() + 9 * part + 9)
            with contextlib.nullcontext() if part else model.no_sync():
                (weighter.combine(task_losses(model(x[rows]), y[rows]), last=part == 1) / 2).backward()
                weighter.step()
        optimizer.step()
        optimizer.zero_grad()
    return seen(Setup(None, model, inner, weighter, optimizer))


def lbfgs(engine: str) -> dict[str, Any]:
    setup = build(engine)
    optimizer = torch.optim.LBFGS(setup.model.parameters(), lr=1e-3, max_iter=3)
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            total = setup.weighter.backward(setup.losses(step))
            return setup.accelerator.reduce(total, "mean")

        optimizer.step(closure)
    return seen(setup)


def whole() -> dict[str, Any]:
    setup = build("plain")
    for step in range(STEPS):
        setup.weighter.backward(setup.losses(step))
        stepped(setup)
    return {"sgd": seen(setup), "token recipe": token_recipe("plain"), "lbfgs": lbfgs("plain")}


def all_loops() -> dict[str, Any]:
    found = {"plain DDP": plain_ddp()}
    for engine in ("ddp", "fsdp2"):
        found[f"by hand, {engine}"] = by_hand(engine)
        found[f"no_sync, {engine}"] = by_hand(engine, sync=True)
        found[f"backward per task, {engine}"] = backward_per_task(engine)
    found["token recipe, ddp"] = token_recipe("ddp")
    found["lbfgs, ddp"] = lbfgs("ddp")
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(whole, 1, tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(all_loops, 2, tmp_path_factory.mktemp("two"), timeout=120)


LOOPS = [f"{loop}, {engine}" for engine in ("ddp", "fsdp2") for loop in ("by hand", "no_sync", "backward per task")]


@pytest.mark.parametrize("loop", [*LOOPS, "plain DDP", "token recipe, ddp", "lbfgs, ddp"])
def test_the_loop_is_one_process_on_the_whole_batch(loop: str, one, two) -> None:
    expected = one.get(loop.split(",")[0], one["sgd"])
    for found in (ranks[loop] for ranks in two):
        assert found["step"] == expected["step"] == STEPS
        for name in ("weights", "losses", "norms"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=0, msg=name)
        for mine, theirs in zip(found["parameters"], expected["parameters"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)
    assert torch.equal(two[0][loop]["weights"], two[1][loop]["weights"])


# ---- loops that are refused, and false alarms ------------------------------------------------------------------------


def accumulated_without_a_word(engine: str) -> str:
    setup = build(engine)
    setup.weighter.backward(setup.losses(0))
    stepped(setup)
    setup.weighter.backward(setup.losses(1, part=0, parts=2))
    return error_of(lambda: setup.weighter.backward(setup.losses(1, part=1, parts=2)))


def extra_names_differ() -> str:
    setup = build(wrap=False)
    name = "one" if rank() else "other"
    return error_of(
        lambda: setup.weighter.backward(setup.losses(0), extra={name: setup.inner.embed.weight.square().mean()})
    )


def extra_of_the_global_batch() -> tuple[float, bool, float]:
    """Logged as the mean over the processes; not finite on one of them holds all."""
    setup = build()
    size = setup.inner.embed.weight.square().mean()
    setup.weighter.backward(setup.losses(0), extra={"balance": (1 + rank()) * size})
    mean = setup.weighter.log_values()["loss/balance"] / size.item()
    stepped(setup)
    before = setup.weighter.weights
    bad = (torch.nan if rank() else 1.0) * setup.inner.embed.weight.sum()
    setup.weighter.backward(setup.losses(1), extra={"balance": bad})
    return mean, setup.weighter.weights == before, setup.weighter.log_values()["weighting/skipped_steps"]


def quiet_loops() -> list[str]:
    """Steps that fp16's scaler skips, LocalSGD, buckets that gradients are views of."""
    with warnings_said() as messages:
        run_quiet_loops()
    return [message for message in messages if "not finite" not in message and "half" not in message]


def run_quiet_loops() -> None:
    from accelerate.local_sgd import LocalSGD

    scaled = build(dtype=torch.float32, mixed_precision="fp16", loss_scale=2.0**40)
    for step in range(30):
        scaled.weighter.backward({task: loss * 1e-3 for task, loss in scaled.losses(step).items()})
        stepped(scaled)
    local = build()
    averaged = LocalSGD(local.accelerator, local.model, 4)
    with averaged:
        for step in range(8):
            local.weighter.backward(local.losses(step))
            stepped(local)
            averaged.step()
    views = build(ddp={"gradient_as_bucket_view": True})
    for step in range(8):
        views.weighter.backward(views.losses(step))
        if step % 2:
            views.optimizer.step()
        views.optimizer.zero_grad(set_to_none=False)


# ---- DeepSpeed, which steps inside of its backward -------------------------------------------------------------------


def skipping(engine: str, how: str) -> dict[str, Any]:
    """Windows of two micro-batches; every third step is one that the user skips.

    `how`: "no step": nobody calls `optimizer.step`; "no backward": the losses are combined, looked at and dropped.
    """
    with warnings_said() as messages:
        setup = build(engine, dtype=torch.float32, gradient_accumulation_steps=2)
        weighter, trail = setup.weighter, [parameters(setup)]
        for step in range(WINDOWS):
            for part in range(2):
                with setup.accelerator.accumulate(setup.model):
                    total = weighter.combine(setup.losses(step, part=part, parts=2))
                    if how == "no step" or step % 3:
                        setup.accelerator.backward(total)
                        weighter.step()
                        if step % 3:
                            setup.optimizer.step()
                    else:
                        weighter.reset()
                    setup.optimizer.zero_grad()
            trail.append(parameters(setup))
    moved = [not all(map(torch.equal, before, after)) for before, after in itertools.pairwise(trail)]
    return {"messages": messages, "moved": sum(moved), **seen(setup)}


WINDOWS = 30
SKIPPING = [(engine, how) for engine in ("zero2", "zero3") for how in ("no step", "no backward")]


def all_skipping() -> dict[tuple[str, str], dict[str, Any]]:
    return {which: skipping(*which) for which in [*SKIPPING, ("ddp", "no backward")]}


@pytest.fixture(scope="module")
def skipped(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Any]]]:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    return run_ranks(all_skipping, 2, tmp_path_factory.mktemp("skipped"), timeout=240)


@pytest.mark.parametrize(("engine", "how"), SKIPPING)
def test_deepspeed_with_accumulation_raises_no_alarm(engine: str, how: str, skipped) -> None:
    """It steps where the backward of a window ends, whether or not the user calls `optimizer.step`."""
    for ranks in skipped:
        found, expected = ranks[engine, how], ranks["ddp", "no backward"]
        assert found["messages"] == []
        assert found["step"] == found["moved"] == (WINDOWS if how == "no step" else WINDOWS * 2 // 3)
        if how == "no backward":
            torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=0)
            for mine, theirs in zip(found["parameters"], expected["parameters"], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def refusals() -> dict[str, Any]:
    return {
        "ddp": accumulated_without_a_word("ddp"),
        "fsdp2": accumulated_without_a_word("fsdp2"),
        "mean": extra_of_the_global_batch(),
        "quiet": quiet_loops(),
        "names": extra_names_differ(),
    }


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(refusals, 2, tmp_path_factory.mktemp("refused"), timeout=90)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_accumulation_by_hand_without_a_word_is_an_error(engine: str, refused) -> None:
    for found in refused:
        assert found[engine].startswith("RuntimeError: The last window was closed, and its gradients are still in")


def test_extra_losses_are_means_over_the_processes_and_hold_all_of_them(refused) -> None:
    for found in refused:
        mean, held, skipped = found["mean"]
        assert mean == pytest.approx(1.5, rel=1e-12) and held and skipped == 1


def test_extra_losses_of_other_names_on_other_processes_raise(refused) -> None:
    for found in refused:
        assert "The processes no longer agree at step 0: different extra." in found["names"]


def test_skipped_steps_local_sgd_and_bucket_views_raise_no_alarm(refused) -> None:
    for found in refused:
        assert found["quiet"] == []


# ---- one task per batch ----------------------------------------------------------------------------------------------

METHODS: list[Method] = [
    GradNorm(lr=0.1),
    CoVWeighting(),
    DynamicWeightAverage(),
    SoftAdapt(),
    ReLoBRaLo(alpha=0.9),
    FAMO(),
    GradientBalancer(decay=0.9),
    UncertaintyWeighting(lr=0.1),
]
ROUNDS = 60


DIFFERENT: dict[int, list[tuple[int | None, ...]]] = {2: [(0, 1)], 3: [(0, 1), (2, 0)]}
"""Of every round the windows, and in each the task of every process; None: a process without samples."""


def windows_of(how: str, tasks: int, processes: int) -> list[Any]:
    """`how`: "together"; "same": round robin, one task on all processes; "different": a task on each of the two."""
    if how == "together":
        return [None]
    return [(k,) * processes for k in range(tasks)] if how == "same" else DIFFERENT[tasks]


def rounds(method: Method, tasks: int, how: str) -> list[float]:
    """The model is held still."""
    setup = build(names=NAMES[:tasks], method=method if how == "together" else CarryForward(method))
    for turn in range(ROUNDS):
        for here in windows_of(how, tasks, setup.accelerator.num_processes):
            x, y = batch(turn % 4, tasks, F64)
            rows = setup.rows(turn) if how != "different" else slice(0, 36)  # then each task has its own data
            losses = task_losses(setup.model(x[rows]), y[rows])
            counts = here and {name: int(i == here[setup.accelerator.process_index]) for i, name in enumerate(losses)}
            setup.weighter.backward(losses, num_items=counts)
            setup.optimizer.zero_grad()
    return list(setup.weighter.weights.values())


def hows() -> list[str]:
    return ["together", "same"] + ["different"] * (dist.is_initialized() and dist.get_world_size() > 1)


def all_rounds() -> dict[tuple[int, int], dict[str, list[float]]]:
    return {(m, tasks): {how: rounds(METHODS[m], tasks, how) for how in hows()} for m in range(8) for tasks in (2, 3)}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def carried(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(all_rounds, request.param, tmp_path_factory.mktemp("carried"), timeout=300)[0]


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("m", range(8), ids=lambda m: type(METHODS[m]).__name__)
def test_round_robin_with_carry_forward_reaches_the_weights_of_all_tasks_in_each_batch(m, tasks, carried) -> None:
    """With the model held still, the same data: within 10 %."""
    found = carried[m, tasks]
    together = found.pop("together")
    for how, weights in found.items():
        assert weights == pytest.approx(together, rel=0.1), how


# ---- and while the model trains --------------------------------------------------------------------------------------

CLEAR: list[Method] = [
    *(GradNorm(lr=0.1), CoVWeighting(), DynamicWeightAverage(temperature=0.2), SoftAdapt(beta=20.0)),
    *(ReLoBRaLo(alpha=0.9), FAMO(), GradientBalancer(decay=0.9), UncertaintyWeighting(lr=0.1)),
]
"""As above, but for two that would hardly move here."""

TRAINED_ROUNDS = 12
SIZES = (1, 4, 16)
"""Of the losses: three tasks that are learned at three speeds."""


def learned(tasks: int) -> tuple[Tensor, Tensor]:
    """Inputs, and targets of heads that are off by a little: losses that fall from the first step on."""
    teacher, generator = net(NAMES[:tasks]), torch.Generator().manual_seed(5)
    x, _ = batch(0, tasks, F64)
    with torch.no_grad():
        for head in teacher.heads.values():
            head.outer.weight += torch.randn(head.outer.weight.shape, generator=generator, dtype=F64)
            head.outer.bias += 1.0
        return x, torch.stack(list(teacher(x).values()), 1)


def training(method: Method, tasks: int, how: str) -> list[float]:
    """How far every weight moved from its start, relative to it."""
    apart = how == "different"  # there every task is on one of two processes, whose gradients are averaged
    carried = method if how == "together" else CarryForward(method)
    setup = build(names=NAMES[:tasks], method=carried, lr=4e-3 if apart else 2e-3)
    start, (x, y) = setup.weighter.weights, learned(tasks)
    windows = windows_of(how, tasks, setup.accelerator.num_processes)
    if apart and tasks == 3:
        windows = [(0, 1), (2, None)]  # every task once in a round, as in the others
    for turn in range(TRAINED_ROUNDS):
        for here in windows:
            rows = slice(0, 36) if apart else setup.rows(turn)
            errors = {name: o - y[rows, k] for k, (name, o) in enumerate(setup.model(x[rows]).items())}
            losses = {name: SIZES[k] * error.square().mean() for k, (name, error) in enumerate(errors.items())}
            counts = here and {name: int(i == here[setup.accelerator.process_index]) for i, name in enumerate(losses)}
            setup.weighter.backward(losses, num_items=counts)
            stepped(setup)
    return [weight / start[name] - 1 for name, weight in setup.weighter.weights.items()]


def all_training() -> dict[tuple[int, int], dict[str, list[float]]]:
    return {(m, tasks): {how: training(CLEAR[m], tasks, how) for how in hows()} for m in range(8) for tasks in (2, 3)}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(all_training, request.param, tmp_path_factory.mktemp("trained"), timeout=300)[0]


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("m", range(8), ids=lambda m: type(METHODS[m]).__name__)
def test_while_the_model_trains_round_robin_moves_the_weights_the_same_way(m, tasks, trained) -> None:
    """Every weight, and here by nearly as much. Two tasks on two processes are the very training of both together."""
    found = trained[m, tasks]
    together = found.pop("together")
    assert min(map(abs, together)) > 0.05
    for how, moves in found.items():
        assert [move > 0 for move in moves] == [move > 0 for move in together], how
        assert moves == pytest.approx(together, rel=1e-9 if (how, tasks) == ("different", 2) else 0.2), how
