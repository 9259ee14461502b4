"""Windows on real processes: how they end, what is in them, and what happens when something goes wrong in one.

Functions without `test` in their names run inside the processes, many in one launch;
the table in tests/README.md says which failure each test shows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist  # noqa: TID251  how many processes there are

from accel_weighting import MGDA, CoVWeighting, GradNorm, Weighter
from tests.distributed.setups import F64, GRADNORM, NAMES, build, error_of, rank, table
from tests.ranks import run_ranks
from tests.scenarios import CountCollectives
from tests.small import assert_close, batch, gradients_by_hand, net, task_losses, tensor

# ---- windows that a DataLoader ends --------------------------------------------------------------------------------

PLUGINS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "short last window": ({}, [2, 2, 1, 2, 2, 1]),
    "windows across epochs": ({"sync_with_dataloader": False}, [2, 2, 2, 2, 2]),
    "gradients synchronised at every batch": ({"sync_each_batch": True}, [2, 2, 1, 2, 2, 1]),
}


def epochs(engine: str, plugin: str, evaluate: bool = False, nest: bool = False) -> dict[str, Any]:
    """Two epochs of five global batches of four rows, accumulation 2; `nest`: another prepared loader runs to its end
    inside of every micro-batch."""
    from accelerate.utils import GradientAccumulationPlugin

    accumulation = GradientAccumulationPlugin(num_steps=2, **PLUGINS[plugin][0])
    setup = build(engine, gradient_accumulation_plugin=accumulation)
    accelerator, weighter = setup.accelerator, setup.weighter
    x, y = batch(0, 3, F64)
    data = torch.utils.data.TensorDataset(x[:20], y[:20])
    loader = torch.utils.data.DataLoader(data, batch_size=4 // accelerator.num_processes)
    loader, inner_loader = accelerator.prepare(loader, loader)
    seen: dict[str, Any] = {"losses": [], "gram": [], "weights": [], "micro_batches": [], "per_step": []}
    count, quiet = CountCollectives(), CountCollectives()
    for _ in range(2):
        for u, v in loader:
            with accelerator.accumulate(setup.model):
                if nest:
                    assert len(list(inner_loader)) == 5
                with count:
                    weighter.backward(task_losses(setup.model(u), v))
                if accelerator.sync_gradients:
                    seen["losses"].append(tensor(weighter.statistics.losses))
                    seen["gram"].append(tensor(weighter.statistics.gram))
                    seen["weights"].append(torch.tensor(list(weighter.weights.values()), dtype=F64))
                    seen["micro_batches"].append(weighter.statistics.micro_batches)
                    seen["per_step"].append(count.calls)
                    count.calls = 0
                setup.optimizer.step()
                setup.optimizer.zero_grad()
            if evaluate:
                with quiet, torch.no_grad():
                    setup.model.eval()
                    weighter.combine(task_losses(setup.model(u * 3), v))
                    setup.inner.heads["t2"](torch.ones(2, 5, dtype=F64))
                    setup.model.train()
    weighter.detach()
    return seen | {"world": accelerator.num_processes, "left": count.calls, "evaluation": quiet.calls}


def all_epochs(engine: str) -> dict[str, dict[str, Any]]:
    runs = {plugin: epochs(engine, plugin) for plugin in PLUGINS}
    one = "short last window"
    return runs | {"evaluated": epochs(engine, one, evaluate=True), "nested": epochs(engine, one, nest=True)}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_ranks(all_epochs, 1, tmp_path_factory.mktemp("one"), "plain")[0]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two_processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(all_epochs, 2, tmp_path_factory.mktemp("two"), request.param)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_accumulation_windows_of_a_loader_equal_those_of_one_process(plugin: str, one_process, two_processes) -> None:
    one, lengths = one_process[plugin], PLUGINS[plugin][1]
    assert one["micro_batches"] == lengths
    for run in (ranks[plugin] for ranks in two_processes):
        assert run["world"] == 2 and run["micro_batches"] == [2 * n for n in lengths]
        assert run["per_step"] == [1] * len(lengths) and run["left"] == 0
        for name in ("losses", "gram", "weights"):
            for mine, whole in zip(run[name], one[name], strict=True):
                torch.testing.assert_close(mine, whole, rtol=1e-12, atol=0)
    for name in ("losses", "gram", "weights"):
        assert all(map(torch.equal, two_processes[0][plugin][name], two_processes[1][plugin][name]))


def test_a_nested_loader_closes_no_accumulation_window(two_processes) -> None:
    for ranks in two_processes:
        plain, nested = ranks["short last window"], ranks["nested"]
        assert nested["micro_batches"] == plain["micro_batches"]
        for name in ("losses", "gram", "weights"):
            assert all(map(torch.equal, nested[name], plain[name])), name


def test_evaluation_between_micro_batches_changes_nothing(two_processes) -> None:
    for ranks in two_processes:
        plain, evaluated = ranks["short last window"], ranks["evaluated"]
        assert evaluated["evaluation"] == 0
        assert evaluated["micro_batches"] == plain["micro_batches"]
        assert evaluated["per_step"] == plain["per_step"]
        for name in ("losses", "gram", "weights"):
            assert all(map(torch.equal, evaluated[name], plain[name])), name


# ---- faults ----------------------------------------------------------------------------------------------------------


def nonfinite_loss_on_one_process() -> Any:
    setup, messages = build(), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("accel_weighting").addHandler(handler)
    weights, steps = [], []
    for step in range(5):
        losses = setup.losses(step)
        if step in (1, 3) and rank() == 1:
            losses["t1"] = losses["t1"] * torch.nan
        setup.weighter.backward(losses)
        setup.model.zero_grad()
        weights.append(list(setup.weighter.weights.values()))
        steps.append(setup.weighter.statistics.step)
    logging.getLogger("accel_weighting").removeHandler(handler)
    return weights, steps, messages, setup.weighter.log_values()["weighting/skipped_steps"]


def without_the_nonfinite_steps() -> Any:
    setup = build()
    for step in (0, 2, 4):
        setup.step(step)
    return list(setup.weighter.weights.values())


def too_many_nonfinite_losses() -> Any:
    setup = build(options={"max_skipped_steps": 3})
    start = setup.step(0)

    def bad() -> None:
        losses = setup.losses(1)
        if rank() == 1:
            losses["t1"] = losses["t1"] * torch.inf
        setup.weighter.backward(losses)

    for _ in range(3):
        bad()
    message = error_of(bad)
    setup.model.zero_grad()
    held = setup.weighter.weights
    return message, start == held, setup.step(2) != held


def nonfinite_gradient_on_one_process() -> Any:
    setup = build(options={"max_skipped_steps": 0})
    start = setup.step(0)
    x, y = batch(1, 3, F64)
    rows = setup.rows(1)

    def overflow() -> None:
        outputs = setup.model(x[rows])
        if rank() == 0:
            outputs["t2"].register_hook(lambda g: g * torch.inf)
        setup.weighter.backward(task_losses(outputs, y[rows]))

    message = error_of(overflow)
    setup.model.zero_grad()
    held = setup.weighter.weights
    return message, start == held, setup.step(2) != held


def missing_on_one_process() -> Any:
    setup = build()
    setup.step(0, num_items={"t1": 0} if rank() == 1 else None)
    return setup.weighter.statistics


def missing_on_all_processes() -> Any:
    setup = build()
    for step in range(4):
        setup.step(step, num_items={"t1": 0})
    state = setup.weighter.state_dict()["state"]
    fresh = setup.weighter.method.init(NAMES)[1]
    kept = [name for name in state if state[name].ndim and not torch.equal(state[name][1], tensor(fresh[name])[1])]
    two = build(wrap=False)
    two.weighter.detach()
    weighter = Weighter(
        GRADNORM, ["t0", "t2"], accelerator=two.accelerator, heads={t: two.inner.heads[t] for t in ("t0", "t2")}
    )
    for step in range(4):
        losses = two.losses(step)
        weighter.backward({"t0": losses["t0"], "t2": losses["t2"]})
    return setup.weighter.weights, weighter.weights, kept


def tasks_in_another_order() -> Any:
    setup = build(names=NAMES if rank() != 1 else NAMES[::-1], wrap=False)
    return error_of(setup.step), error_of(setup.step)


def a_task_more_on_one_process() -> Any:
    setup = build(names=NAMES if rank() != 1 else [*NAMES, "t3"], wrap=False)
    return error_of(setup.step), error_of(setup.step)


def many_tasks_more_on_one_process() -> Any:
    """So many that the vectors are longer than the part of fixed length, on the last process only."""
    last = rank() == dist.get_world_size() - 1
    setup = build(names=[f"t{k}" for k in range(40 if last else 3)], wrap=False)
    return error_of(setup.step), error_of(setup.step)


def many_tasks_more_at_lag_0() -> Any:
    """Weights are asked for inside the backward there, so that is where the processes meet first."""
    last = rank() == dist.get_world_size() - 1
    names = [f"t{k}" for k in range(40 if last else 3)]
    setup = build(names=names, method=MGDA(), wrap=False, options={"lag": 0})
    return error_of(setup.step), error_of(setup.step)


def a_shared_layer_on_one_process() -> Any:
    setup = build(wrap=False)
    setup.weighter.detach()
    options = {"shared_layer": setup.inner.shared} if rank() == 0 else {}
    setup.weighter = Weighter(GRADNORM, NAMES, accelerator=setup.accelerator, heads=dict(setup.inner.heads), **options)
    return (error_of(setup.step),)


def another_order_of_the_dictionary() -> Any:
    runs = []
    for turn in (False, True):
        setup = build()
        for step in range(3):
            losses = setup.losses(step)
            if turn and rank() == 1:
                losses = dict(reversed(losses.items()))
            setup.weighter.backward(losses)
            setup.model.zero_grad()
        runs.append((setup.weighter.weights, tensor(setup.weighter.statistics.gram)))
    return runs


def uneven_batches_with_counts() -> Any:
    setup = build()
    sizes = {2: (23, 13), 3: (5, 11, 20)}[dist.get_world_size()]
    setup.weighter.backward(setup.losses(0, sizes=sizes), num_items=sizes[rank()])
    return setup.weighter.statistics


def an_exception_between_micro_batches() -> Any:
    setup = build(gradient_accumulation_steps=2)
    count = CountCollectives()
    seen = []
    for step in range(3):
        try:
            for part in range(2):
                with setup.accelerator.accumulate(setup.model):
                    losses = setup.losses(step, part=part, parts=2)
                    with count:
                        setup.weighter.backward(losses)
                if step == 1 and part == 0:
                    raise KeyError("the user's own")
        except KeyError:
            with count:
                setup.weighter.reset()
            with setup.accelerator.accumulate(setup.model):
                pass  # the user's loop goes on with the next window
        setup.model.zero_grad()
        seen.append((count.calls, setup.weighter.statistics))
        count.calls = 0
    return seen


def weights_changed_on_one_process() -> Any:
    """By 1e-5 of the largest, which no rounding explains."""
    setup = build()
    setup.step(0)
    setup.step(1)
    if rank() == 1:
        setup.weighter._progress.weights = setup.weighter._progress.weights + np.array([2e-5, 0, 0])
    first = error_of(lambda: setup.step(2))
    setup.model.zero_grad()
    return first, error_of(lambda: setup.step(3))


def weights_changed_by_rounding_on_one_process() -> Any:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("accel_weighting").addHandler(handler)
    runs, counts = [], CountCollectives()
    for by in (1e-9, 0.0):
        setup, seen = build(), []
        for step in range(5):
            if rank() == 1 and step in (2, 3):
                setup.weighter._progress.weights = setup.weighter._progress.weights + np.array([by, 0, 0])
            with counts:
                seen.append(setup.step(step))
        runs.append((seen, setup.weighter.log_values().get("weighting/healed_steps"), counts.calls))
        counts.calls = 0
    logging.getLogger("accel_weighting").removeHandler(handler)
    return runs, messages


def state_changed_on_one_process() -> Any:
    setup = build(method=CoVWeighting())
    setup.step(0)
    if rank() == 1:
        setup.weighter._progress.method_state["loss_mean"] *= 1 + 1e-5
    return (error_of(lambda: setup.step(1)),)


def methods_differ() -> Any:
    setup = build(method=GradNorm(alpha=1.0 if rank() else 1.5), wrap=False)
    return (error_of(setup.step),)


def one_process_is_a_step_ahead() -> Any:
    setup = build(wrap=False, method=CoVWeighting())
    setup.step(0)
    if rank() == 0:
        setup.weighter._progress.step += 1  # as after a window that only this process had
    return (error_of(lambda: setup.step(1)),)


def uneven_inputs() -> Any:
    """Five batches of four rows for two processes, or of two for three: refused at the first, unless the last is
    dropped."""
    from accelerate.utils import DataLoaderConfiguration

    def epoch(drop_last: bool) -> int:
        batches = 0
        for x, y in loaders[drop_last]:
            setup.weighter.backward(task_losses(setup.model(x), y))
            setup.model.zero_grad()
            batches += 1
        return batches

    setup = build(dataloader_config=DataLoaderConfiguration(even_batches=False))
    data = torch.utils.data.TensorDataset(*(x[:20] for x in batch(0, 3, F64)))
    size = {2: 4, 3: 2}[dist.get_world_size()]
    loaders = [
        setup.accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=size, drop_last=drop))
        for drop in (False, True)
    ]
    message, start = error_of(lambda: epoch(False)), setup.weighter.weights
    setup.accelerator.gradient_state._remove_dataloader(loaders[0])  # the loop was left in its middle
    return message, epoch(True), setup.weighter.weights != start


def counts_on_one_process_only() -> Any:
    setup = build()
    start = setup.step(0)
    message = error_of(lambda: setup.step(1, num_items=12 if rank() == 1 else None))
    setup.model.zero_grad()
    held = setup.weighter.weights
    return message, start == held, setup.step(2) != held


def negative_loss_on_one_process() -> Any:
    """The mean over all processes is what counts."""
    setup = build()
    start = setup.step(0)

    def shifted(by: float) -> None:
        losses = setup.losses(1)
        if rank() == 1:
            losses["t0"] = losses["t0"] - by
        setup.weighter.backward(losses)
        setup.model.zero_grad()

    message = error_of(lambda: shifted(1000.0))
    held = setup.weighter.weights
    setup.model.zero_grad()
    shifted(1.0)
    return message, start == held, setup.weighter.weights != held


def collectives_of_every_step() -> Any:
    setup = build(options={"update_after": 2, "update_every": 2})
    plain, wide = build(), build(names=[f"t{k}" for k in range(40)])
    calls: dict[str, list[int]] = {}

    def counted(name: str, act: Callable[[], Any]) -> None:
        count = CountCollectives()
        with count:
            act()
        calls.setdefault(name, []).append(count.calls)

    for step in range(6):
        counted("steps", lambda: plain.step(step))  # noqa: B023
        counted("update_after=2, update_every=2", lambda: setup.step(step))  # noqa: B023
    for step in range(3):
        counted("forty tasks", lambda: wide.step(step))  # noqa: B023
    counted("step with a frozen micro-batch", lambda: plain.step(0, freeze=True))
    with plain.weighter.freeze():
        counted("frozen", lambda: plain.step(0))
    with torch.no_grad():
        counted("evaluation", lambda: plain.weighter.combine(plain.losses()))
    counted("reading", lambda: (plain.weighter.weights, plain.weighter.statistics, plain.weighter.log_values()))
    counted("saving", lambda: plain.weighter.state_dict())
    counted("unknown task", lambda: error_of(lambda: plain.weighter.backward({"nope": torch.ones(())})))
    counted("empty window", lambda: error_of(plain.weighter.step))
    counted("afterwards", lambda: plain.step(1))
    return calls


FAULTS = [
    nonfinite_loss_on_one_process,
    without_the_nonfinite_steps,
    too_many_nonfinite_losses,
    nonfinite_gradient_on_one_process,
    missing_on_one_process,
    missing_on_all_processes,
    tasks_in_another_order,
    a_task_more_on_one_process,
    many_tasks_more_on_one_process,
    many_tasks_more_at_lag_0,
    a_shared_layer_on_one_process,
    another_order_of_the_dictionary,
    uneven_batches_with_counts,
    an_exception_between_micro_batches,
    weights_changed_on_one_process,
    weights_changed_by_rounding_on_one_process,
    state_changed_on_one_process,
    methods_differ,
    one_process_is_a_step_ahead,
    uneven_inputs,
    counts_on_one_process_only,
    negative_loss_on_one_process,
    collectives_of_every_step,
]


def all_faults() -> dict[str, Any]:
    return {fault.__name__: fault() for fault in FAULTS}


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def faults(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every process went through."""
    return run_ranks(all_faults, request.param, tmp_path_factory.mktemp("faults"), timeout=60)


HEALED = (
    "At optimizer step 2 weights or method state differed between processes by rounding alone, as on machines of "
    "different kinds: all processes go on with those of the first. `weighting/healed_steps` counts such steps."
)


def each(faults: list[dict[str, Any]], name: Callable[..., Any]) -> list[Any]:
    return [rank[name.__name__] for rank in faults]


def test_nonfinite_loss_on_one_process_skips_the_update_on_all(faults) -> None:
    world = len(faults)
    results = each(faults, nonfinite_loss_on_one_process)
    for weights, steps, _, skipped in results:
        assert weights[1] == weights[0] and weights[3] == weights[2]
        assert weights[2] != weights[1] and weights[4] != weights[3]
        assert steps == [0, 0, 2, 2, 4] and skipped == 2
        assert weights == results[0][0]
    assert [messages for _, _, messages, _ in results] == [  # once, on the first and where it was
        ["Loss `t1` was not finite on another process at optimizer step 1; weights are held."],
        [f"Loss `t1` was not finite on process 1 of {world} at optimizer step 1; weights are held."],
        *[[]] * (world - 2),
    ]
    for weights in each(faults, without_the_nonfinite_steps):
        assert weights == results[0][0][4]


def test_nonfinite_losses_beyond_max_skipped_steps_raise_on_all_processes(faults) -> None:
    for number, (message, held, moved) in enumerate(each(faults, too_many_nonfinite_losses)):
        where = f"process 1 of {len(faults)}" if number == 1 else "another process"
        assert message == (
            f"RuntimeError: Loss `t1` was not finite on {where} at optimizer step 4; weights are held. 4 "
            "steps in a row exceed `max_skipped_steps = 3`: look for the cause in the data or the learning rate."
        )
        assert held and moved


def test_nonfinite_gradient_on_one_process_skips_the_update_on_all(faults) -> None:
    for number, (message, held, moved) in enumerate(each(faults, nonfinite_gradient_on_one_process)):
        where = "another process" if number else f"process 0 of {len(faults)}"
        assert message.startswith(
            f"RuntimeError: Gradient of loss `t2` at the shared representation was not finite on {where} at optimizer "
            "step 1; weights are held."
        )
        assert held and moved


def test_a_task_missing_on_one_process_counts_as_zero_gradient_there(faults) -> None:
    world = len(faults)
    G = [gradients_by_hand(net(NAMES), 0, slice(r * 36 // world, (r + 1) * 36 // world)) for r in range(world)]
    G[1][1] = 0
    for s in each(faults, missing_on_one_process):
        assert_close(s.gram, sum(g @ g.T for g in G) / world**2, rtol=1e-12, atol=0)
        assert s.present.all()


def test_a_task_missing_on_all_processes_keeps_its_weight_and_state(faults) -> None:
    for with_it, without, kept in each(faults, missing_on_all_processes):
        assert with_it["t1"] == 1 and kept == []
        for task in ("t0", "t2"):
            assert with_it[task] != 1
            assert with_it[task] == pytest.approx(without[task], rel=1e-12)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (tasks_in_another_order, (1, "['t2', 't1', 't0']")),
        (a_task_more_on_one_process, (1, "['t0', 't1', 't2', 't3']")),
        (many_tasks_more_on_one_process, (-1, str([f"t{k}" for k in range(40)]))),
        (many_tasks_more_at_lag_0, (-1, str([f"t{k}" for k in range(40)]))),
    ],
)
def test_processes_built_with_different_tasks_raise_with_a_table(fault, what, faults) -> None:
    messages, (odd, tasks) = each(faults, fault), what
    for first, again in messages:
        assert first.startswith("RuntimeError: The processes were built with different tasks.\ntasks:\n")
        expected = dict.fromkeys(range(len(faults)), str(NAMES)) | {odd % len(faults): tasks}
        assert table(first, "tasks") == expected
        assert again.startswith("RuntimeError: The processes were built with different tasks.")
    assert len(set(messages)) == 1


def test_processes_with_vectors_of_different_length_raise_with_the_setting(faults) -> None:
    for (message,) in each(faults, a_shared_layer_on_one_process):
        assert message.startswith("RuntimeError: The processes no longer agree at step 0: different shared_layer.")
        others = dict.fromkeys(range(1, len(faults)), "None")
        assert table(message, "shared_layer") == {0: "(5, 8)", **others}


def test_the_order_of_the_dictionary_of_losses_may_differ_between_processes(faults) -> None:
    for (weights, gram), (turned, turned_gram) in each(faults, another_order_of_the_dictionary):
        assert weights == turned and torch.equal(gram, turned_gram)
        assert weights == each(faults, another_order_of_the_dictionary)[0][0][0]


def test_num_items_make_uneven_batches_exact(faults) -> None:
    G = gradients_by_hand(net(NAMES), 0, slice(0, 36))
    for s in each(faults, uneven_batches_with_counts):
        assert_close(s.gram, G @ G.T, rtol=1e-12, atol=0)


def test_after_an_exception_caught_on_all_processes_the_next_window_is_right(faults) -> None:
    world = len(faults)
    for seen in each(faults, an_exception_between_micro_batches):
        assert [calls for calls, _ in seen] == [1, 0, 1]
        assert [s.step for _, s in seen] == [0, 0, 1]
        size = 36 // (2 * world)
        for step, s in ((0, seen[0][1]), (2, seen[2][1])):
            assert s.micro_batches == 2 * world
            G = [gradients_by_hand(net(NAMES), step, slice(b * size, (b + 1) * size)) for b in range(2 * world)]
            assert_close(s.gram, sum(g @ g.T for g in G) / (2 * world) ** 2, rtol=1e-12, atol=0)


def test_a_weight_changed_by_more_than_rounding_on_one_process_raises_in_that_very_step(faults) -> None:
    messages = each(faults, weights_changed_on_one_process)
    for first, again in messages:
        assert first.startswith("RuntimeError: The processes no longer agree at step 2: weights, method state")
        rows = table(first, "weights")
        assert sorted(rows) == list(range(len(faults))) and rows[1] != rows[0]
        if len(faults) == 3:  # most agree, and come first
            assert rows[2] == rows[0] and "weights:\n  processes 0, 2: [" in first
        assert again.startswith("RuntimeError: The processes no longer agree at step 3")
        assert first.endswith(
            "Weights must only change through the weighter, and every process must build it alike "
            "and take the same steps."
        )
    assert len(set(messages)) == 1


def test_a_weight_changed_by_1e_9_on_one_process_is_taken_back_in_that_very_step(faults) -> None:
    for number, (((healed, steps, calls), (whole, none, whole_calls)), messages) in enumerate(
        each(faults, weights_changed_by_rounding_on_one_process)
    ):
        assert healed == whole and (steps, none) == (2, None)  # bit by bit
        assert calls == whole_calls == 5  # besides what is gathered in the two steps
        assert messages == ([] if number else [HEALED])


def test_the_method_state_changed_by_more_than_rounding_on_one_process_raises(faults) -> None:
    for (message,) in each(faults, state_changed_on_one_process):
        assert message.startswith("RuntimeError: The processes no longer agree at step 1")
        rows = table(message, "state")
        assert len(rows) == len(faults) and rows[1] not in {rows[rank] for rank in rows if rank != 1}


def test_methods_that_differ_between_processes_raise_with_both(faults) -> None:
    for (message,) in each(faults, methods_differ):
        assert "at step 0: different method." in message
        rows = table(message, "method")
        assert len(rows) == len(faults)
        assert all(rows[rank].startswith(f"GradNorm(alpha={1.0 if rank else 1.5}, ") for rank in rows)


def test_processes_out_of_step_raise_with_their_steps(faults) -> None:
    for (message,) in each(faults, one_process_is_a_step_ahead):
        assert message.startswith("RuntimeError: The processes no longer agree at step ")
        assert table(message, "step") == {0: "2", **dict.fromkeys(range(1, len(faults)), "1")}


def test_a_loader_of_uneven_batches_is_refused_on_all_processes_unless_it_drops_the_last(faults) -> None:
    world = len(faults)
    for message, batches, moved in each(faults, uneven_inputs):
        assert message.startswith("ValueError: Uneven inputs are not supported: the DataLoaderShard that is being")
        assert batches == {2: 2, 3: 3}[world] and moved


def test_counts_on_one_process_only_are_an_error_everywhere(faults) -> None:
    world = len(faults)
    for message, held, moved in each(faults, counts_on_one_process_only):
        assert f"At optimizer step 1, 1 of {world} micro-batches over all processes" in message
        assert held and moved


def test_a_negative_loss_is_judged_by_its_mean_over_all_processes(faults) -> None:
    for message, held, moved in each(faults, negative_loss_on_one_process):
        assert "Task `t0` averaged -" in message and "over optimizer step 1" in message
        assert held and moved


def test_one_collective_per_step_and_none_elsewhere(faults) -> None:
    for calls in each(faults, collectives_of_every_step):
        assert calls.pop("steps") == [1] * 6
        assert calls.pop("update_after=2, update_every=2") == [0, 0, 1, 0, 1, 0]
        assert calls.pop("forty tasks") == [2, 1, 1]  # a long vector's first part goes ahead, once
        assert calls.pop("afterwards") == [1]
        assert calls == {name: [0] for name in calls} and len(calls) == 7


# ---- resume ----------------------------------------------------------------------------------------------------------


def train_on(engine: str, start: int, stop: int, save: Path | None = None, load: Path | None = None) -> Any:
    setup = build(engine, gradient_accumulation_steps=2, seed=0 if load is None else 5)
    if load is not None:
        setup.accelerator.load_state(str(load))
    weights = setup.steps(start, stop)
    if save is not None:
        setup.accelerator.save_state(str(save))
    return weights, setup.weighter.average_weights, [step for step, _ in setup.weighter.history]


def uninterrupted_and_resumed(folder: Path) -> Any:
    whole = train_on("ddp", 0, 6)
    first = train_on("ddp", 0, 3, save=folder)
    setup_of_another_seed = train_on("ddp", 3, 6, load=folder)
    return whole, first, setup_of_another_seed


def test_checkpoint_resumes_on_two_processes_and_on_one(tmp_path) -> None:
    folder = tmp_path / "checkpoint"
    for whole, first, resumed in run_ranks(uninterrupted_and_resumed, 2, tmp_path, folder):
        assert first[0] + resumed[0] == whole[0]  # bit by bit
        assert resumed[1:] == whole[1:] and whole[2] == list(range(6))
    weights, average, steps = run_ranks(train_on, 1, tmp_path, "plain", 3, 6, None, folder)[0]
    for mine, theirs in zip(weights, whole[0][3:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)
    assert average == pytest.approx(whole[1], rel=1e-12) and steps == whole[2]
