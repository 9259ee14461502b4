"""Every engine and every precision: a part of the matrix, what the engines cannot do, their groups, and fp16."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  asks which processes a group has
from accelerate.utils import DistributedType
from torch import Tensor, nn

from accel_weighting import CoVWeighting, EqualWeighting, GradNorm, RotoGrad, Weighter
from accel_weighting.processes import SUPPORTED
from accel_weighting.statistics import State, Statistics
from tests.distributed import engines
from tests.distributed.engines import (
    ROWS,
    EngineConfig,
    controls,
    distance,
    policy,
    reference,
    references,
    run_cells,
    tolerance,
    without_weighter,
)
from tests.ranks import accelerator_for, forget_accelerators, run_ranks
from tests.scenarios import Cell, Run, assert_ranks_agree, difference, net
from tests.small import Net, batch, task_losses, tensor

GRADNORM = GradNorm(alpha=1.0, lr=0.01)

# ---- the matrix --------------------------------------------------------------------------------------------------

PAIRWISE = engines.pairwise(ROWS)
FAMILIES = ("ddp", "fsdp1", "fsdp2", "hsdp", "zero")
ONE_CELL = {"method": "GradNorm", "precision": "float64", "micro": 3, "checkpoint": "", "compile": False}


@pytest.fixture(scope="module")
def ones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One process on the whole batch."""
    folder = str(tmp_path_factory.mktemp("one"))
    return references((reference(choice) for found in PAIRWISE.values() for choice in found), folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_pairs_of_choices_follow_one_process(family: str, ones: dict[str, Run], tmp_path) -> None:
    part = [(row, choice) for row in ROWS if row.engine.startswith(family) for choice in PAIRWISE[row.name]]
    results = list(engines.run(part, ones, str(tmp_path)))
    wrong = [f"{result.row}, {result.choice}: {result.wrong}" for result in results if result.wrong]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("world", sorted({row.world for row in ROWS}))
def test_one_choice_of_every_row_follows_one_process(world: int, tmp_path) -> None:
    """The methods and precisions take turns; all pairs of choices are in the full run."""
    part = [(row, first_choice(row, i)) for i, row in enumerate(ROWS) if row.world == world]
    wholes = references((reference(choice) for _, choice in part), str(tmp_path))
    results = list(engines.run(part, wholes, str(tmp_path)))
    assert [result.row for result in results] == [row.name for row, _ in part]
    assert not [f"{result.row}, {result.choice}: {result.wrong}" for result in results if result.wrong]


def test_the_choices_of_all_rows_have_every_method_and_every_precision() -> None:
    taken = [first_choice(row, i) for i, row in enumerate(ROWS)]
    assert {choice["method"] for choice in taken} == set(engines.METHODS)
    assert {choice["precision"] for choice in taken} == set(engines.PRECISIONS)


def first_choice(row: EngineConfig, turn: int) -> engines.Choice:
    """What the row can do, beginning with another method and precision at each turn."""
    for method, precision in itertools.product(rotated(engines.METHODS, turn), rotated(engines.PRECISIONS, turn)):
        for micro in (3, 1):
            choice = {**ONE_CELL, "method": method, "precision": precision, "micro": micro}
            if engines.impossible(row, choice) is None:
                return choice
    raise AssertionError(f"{row.name} can do nothing")


def rotated(names: Iterable[str], by: int) -> list[str]:
    names = list(names)
    return names[by % len(names) :] + names[: by % len(names)]


def test_every_row_is_in_a_family_and_every_choice_in_the_part() -> None:
    assert all(row.engine.startswith(FAMILIES) for row in ROWS)
    for name, values in engines.CHOICES.items():
        assert {choice[name] for found in PAIRWISE.values() for choice in found} == set(values)


def test_what_is_not_in_the_matrix_fails_without_a_weighter_too(tmp_path) -> None:
    """And the same row works where it is asked for less."""
    wanted, cells = [], []
    for why, row, choice in controls():
        for asked in ({**choice, "micro": 1, "checkpoint": "", "precision": "float32"}, choice):
            wanted.append((why, row, asked))
            cells.append(without_weighter(row, asked))
    one = [without_weighter(EngineConfig("", "plain"), reference(choice)) for _, _, choice in wanted]
    ones = run_ranks(run_cells, 1, tmp_path, one)[0]
    for runs in run_ranks(run_cells, 2, tmp_path, cells, timeout=240):
        right = [
            isinstance(run, Run) and distance(run.parameters, whole.parameters) < tolerance(row, choice)
            for (_, row, choice), run, whole in zip(wanted, runs, ones, strict=True)
        ]
        for (why, row, _), works, fails, run in zip(wanted[::2], right[::2], right[1::2], runs[::2], strict=True):
            assert works, f"{row.name}, {why}: {run}"
            assert not fails, f"{row.name}: not any more: {why}"


# ---- the matrix sees what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("sabotage", engines.SABOTAGES)
def test_the_command_turns_red_when_one_thing_is_broken(sabotage: str, capsys) -> None:
    options = [f"--{name}={value}" for name, value in ONE_CELL.items()]
    code = engines.main(["--row=static_graph", "--row=find_unused", *options, "--sabotage", sabotage])
    wrong = int(sabotage != "none")
    assert code == wrong and f"\n1 cells, {wrong} wrong" in capsys.readouterr().out


@dataclass(frozen=True)
class Dies(CoVWeighting):
    """Takes one process down."""

    def update(self, state: State, statistics: Statistics) -> tuple[Tensor, State]:
        if dist.get_rank() == 1:
            os._exit(3)
        return super().update(state, statistics)


def test_a_cell_that_takes_its_launch_down_hides_no_other(ones: dict[str, Run], tmp_path) -> None:
    good = engines.cell(ROWS[0], ONE_CELL)
    cells = [("ddp", good), ("ddp", replace(good, method=Dies())), ("ddp", good)]
    before, dead, after = engines.launches(cells, 2, str(tmp_path), "none")
    assert isinstance(dead, str) and dead.startswith("process 1 of 2 ended with exit code 3 without a result")
    for runs in (before, after):
        assert engines.verdict(ROWS[0], ONE_CELL, runs, ones[str(reference(ONE_CELL))])[1] is None
    assert engines.verdict(ROWS[0], ONE_CELL, dead, ones[str(reference(ONE_CELL))])[1] == dead


def test_results_that_were_kept_are_not_run_again(tmp_path, capsys) -> None:
    kept = tmp_path / "results"
    kept.write_text(json.dumps(asdict(engines.Result(ROWS[1].name, ONE_CELL, 0.25, "seen before"))) + "\n")
    options = [f"--{name}={value}" for name, value in ONE_CELL.items()]
    assert engines.main(["--row=find_unused", *options, "--results", str(kept)]) == 1
    printed = capsys.readouterr().out
    assert "| DDP, find_unused_parameters | 0/1 2e-01 | – | – | – |" in printed and ": seen before" in printed
    assert len(kept.read_text().splitlines()) == 1


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind.value for kind in DistributedType if kind.value not in SUPPORTED])
def test_engines_without_one_plain_backward_are_refused_by_name(kind: str) -> None:
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), num_processes=1)
    with pytest.raises(NotImplementedError, match=f"Found {kind}, whose backward does not pass through"):
        Weighter(EqualWeighting(), ["a"], accelerator=accelerator)


def test_megatron_and_xla_are_among_the_refused() -> None:
    assert not SUPPORTED & {"MEGATRON_LM", "XLA"}


# ---- groups ------------------------------------------------------------------------------------------------------

MESHES: dict[str, tuple[dict[str, int], list[list[int]]]] = {
    "sharded": ({"dp_shard_size": 4}, [[0, 1, 2, 3]] * 4),
    "HSDP": ({"dp_replicate_size": 2, "dp_shard_size": 2}, [[0, 1, 2, 3]] * 4),
    "tensor and data": ({"tp_size": 2, "dp_shard_size": 2}, [[0, 2], [1, 3], [0, 2], [1, 3]]),
    "context and data": ({"cp_size": 2, "dp_shard_size": 2}, [[0, 1, 2, 3]] * 4),
    "tensor only": ({"tp_size": 4}, [[0], [1], [2], [3]]),
}


def statistics_on_meshes() -> list[tuple[list[int], int, Tensor, Tensor]]:
    """Per mesh: the ranks of the group, its size, and the Gram matrix and weights of two steps."""
    found = []
    for sizes, _ in MESHES.values():
        accelerator = accelerator_for("fsdp2" if "dp_shard_size" in sizes else "ddp", mesh=sizes)
        model = net(Cell(GRADNORM))
        weighter = Weighter(GRADNORM, list(model.heads), accelerator=accelerator, heads=dict(model.heads))
        processes, rank = weighter._steps._processes, dist.get_rank()
        ranks = [rank] if processes.world == 1 else dist.get_process_group_ranks(processes.group)
        # Processes of one tensor-parallel group have the same rows, all others have different ones; the model is
        # whole everywhere, since what tensor parallelism does inside of the trunk cannot be seen at z.
        x, y = batch(0, 3, torch.float64)
        mine = torch.arange(len(x)).chunk(processes.world)[processes.rank]
        for _ in range(2):
            weighter.backward(task_losses(model(x[mine]), y[mine]))
        statistics = weighter.statistics
        assert statistics is not None and statistics.gram is not None
        assert statistics.micro_batches == processes.world
        found.append((ranks, processes.world, tensor(statistics.gram), torch.tensor(list(weighter.weights.values()))))
    return found


def test_statistics_are_summed_over_data_and_context_never_over_tensor_parallel_processes(tmp_path) -> None:
    found = run_ranks(statistics_on_meshes, 4, tmp_path)
    whole = found[0][list(MESHES).index("tensor only")]  # every process has all the rows
    for i, (name, (_, groups)) in enumerate(MESHES.items()):
        for rank in range(4):
            ranks, world, gram, weights = found[rank][i]
            assert ranks == groups[rank], name
            assert world == len(groups[rank])
            torch.testing.assert_close(gram, whole[2], rtol=1e-12, atol=0, msg=name)
            torch.testing.assert_close(weights, whole[3], rtol=1e-6, atol=0, msg=name)


# ---- fp16: the loss scale ----------------------------------------------------------------------------------------

SMALL = 1e-4  # losses so small that nothing overflows at a scale of 2^16


def fp16(scale: float, **changes: Any) -> Cell:
    return Cell(
        GRADNORM,
        dtype=torch.float32,
        steps=5,
        size=SMALL,
        setup={"mixed_precision": "fp16", "loss_scale": scale},
        **changes,
    )


FP16_ENGINES = ["ddp", "fsdp1", "fsdp2"]
AT_STEP_2 = {where: ((2, 3, where),) for where in ("loss", "tap", "parameters")}  # block 3 is the last process's


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Run]]:
    """Runs by engine and name, one per process."""
    cells = {
        "2^16": fp16(2.0**16, micro=2),
        "2^10": fp16(2.0**10, micro=2),
        **{where: fp16(2.0**10, micro=2, overflow=overflow) for where, overflow in AT_STEP_2.items()},
        "CoV loss": replace(fp16(2.0**10, micro=2, overflow=AT_STEP_2["loss"]), method=CoVWeighting()),
        "RotoGrad tap": replace(fp16(2.0**10, micro=2, overflow=AT_STEP_2["tap"]), method=RotoGrad(lr=0.5)),
    }
    every = [(engine, cell) for engine in FP16_ENGINES for cell in cells.values()]
    ranks = run_ranks(run_cells, 2, tmp_path_factory.mktemp("fp16"), every, timeout=240)
    keys = [(engine, name) for engine in FP16_ENGINES for name in cells]
    for rank in ranks:
        for key, run in zip(keys, rank, strict=True):
            assert isinstance(run, Run), f"{key}: {run}"
    return {key: [rank[i] for rank in ranks] for i, key in enumerate(keys)}


@pytest.mark.parametrize("engine", FP16_ENGINES)
def test_fp16_loss_scale_changes_nothing_but_rounding(engine: str, scaled: Any) -> None:
    high, low = scaled[engine, "2^16"], scaled[engine, "2^10"]
    assert not any(high[0].skipped + low[0].skipped)
    # fp16 keeps its digits under powers of 2; only the smallest numbers, below 2^-24 once scaled, lose some.
    assert difference(high[0], low[0]) < 1e-3
    assert_ranks_agree(high)


def moves(run: Run) -> list[bool]:
    """Whether the weights moved at each step."""
    return [not torch.equal(a, b) for a, b in zip([torch.ones(3).double(), *run.weights], run.weights, strict=False)]


@pytest.mark.parametrize("engine", FP16_ENGINES)
@pytest.mark.parametrize("where", ["loss", "tap"])
def test_fp16_overflow_on_one_process_skips_the_update_on_all(engine: str, where: str, scaled: Any) -> None:
    runs = scaled[engine, where]
    assert_ranks_agree(runs)
    for run in runs:
        assert moves(run) == [True, True, False, True, True]
        assert run.skipped == [False, False, True, False, False]  # and the scaler skips it
        assert run.statistics_steps == {0, 1, 3, 4}


@pytest.mark.parametrize("engine", FP16_ENGINES)
def test_fp16_overflow_in_parameters_alone_does_not_skip_the_update(engine: str, scaled: Any) -> None:
    runs = scaled[engine, "parameters"]
    assert_ranks_agree(runs)
    for run in runs:
        assert moves(run) == [True] * 5
        assert run.skipped == [False, False, True, False, False]
        assert run.statistics_steps == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("engine", FP16_ENGINES)
def test_fp16_overflow_skips_the_update_of_other_methods_too(engine: str, scaled: Any) -> None:
    assert_ranks_agree(scaled[engine, "CoV loss"])
    assert scaled[engine, "CoV loss"][0].statistics_steps == {0, 1, 3, 4}
    runs = scaled[engine, "RotoGrad tap"]
    assert_ranks_agree(runs)
    assert runs[0].statistics_steps == {0, 1, 3, 4}
    assert runs[0].state["rotations"].isfinite().all()


# ---- losses in half precision ------------------------------------------------------------------------------------


class WithLosses(nn.Module):
    """A model that computes its losses itself, in float32."""

    def __init__(self, inner: Net) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        outputs = self.inner(x)
        return task_losses({task: output.float() for task, output in outputs.items()}, y.float())


def half_precision_messages() -> list[tuple[str, list[str]]]:
    """What is logged when losses come out of an engine's forward: dtype and messages, per engine and policy."""
    found = []
    for engine, options in [
        ("fsdp2", {}),
        ("fsdp2", {"mixed_precision_policy": policy("bf16")}),
        ("fsdp1", {}),
        ("ddp", None),
    ]:
        fsdp = {} if options is None else {"fsdp": {"transformer_cls_names_to_wrap": ["Block"], **options}}
        accelerator = accelerator_for(engine, mixed_precision="bf16", **fsdp)  # type: ignore[arg-type]
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, to=messages: to.append(record.getMessage())  # type: ignore[method-assign,misc]
        logging.getLogger("accel_weighting").addHandler(handler)
        inner = WithLosses(net(Cell(GRADNORM, dtype=torch.float32)))
        model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=1e-3))
        heads = dict(accelerator.unwrap_model(model).inner.heads)
        weighter = Weighter(GRADNORM, list(heads), accelerator=accelerator, heads=heads)
        for step in range(3):
            losses = model(*batch(step, 3, torch.float32))
            weighter.backward(losses)
            optimizer.step()
            optimizer.zero_grad()
        logging.getLogger("accel_weighting").removeHandler(handler)
        found.append((str(losses["t0"].dtype), messages))
    return found


def test_losses_that_fsdp2_casts_to_half_precision_are_told_once_on_the_main_process(tmp_path) -> None:
    main, other = run_ranks(half_precision_messages, 2, tmp_path)
    (dtype, messages), *cured = main
    assert dtype == "torch.bfloat16" and len(messages) == 1
    assert "Losses come in torch.bfloat16" in messages[0] and "rounded by up to 0.4 %" in messages[0]
    assert "`.float()` the logits before the loss" in messages[0]
    assert "`output_dtype=None`" in messages[0] and "`output_dtype=torch.float32`" in messages[0]
    assert cured == [("torch.float32", [])] * 3
    assert [messages for _, messages in other] == [[]] * 4


def half_precision_of(weighter: Weighter, dtype: torch.dtype) -> None:
    x = torch.ones(3, requires_grad=True)
    weighter.backward({"a": x.sum().to(dtype), "b": x.square().sum()})


@pytest.fixture
def logged() -> Iterator[list[str]]:
    forget_accelerators()  # of other tests: a weighter without one would speak of it
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("accel_weighting").addHandler(handler)
    yield messages
    logging.getLogger("accel_weighting").removeHandler(handler)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float16, "0.05 %"), (torch.bfloat16, "0.4 %")])
def test_one_loss_in_half_precision_is_enough(dtype: torch.dtype, digits: str, logged: list[str]) -> None:
    weighter = Weighter(CoVWeighting(), ["a", "b"])
    half_precision_of(weighter, torch.float32)
    assert logged == []
    half_precision_of(weighter, dtype)
    half_precision_of(weighter, dtype)
    assert len(logged) == 1 and str(dtype) in logged[0] and digits in logged[0]
