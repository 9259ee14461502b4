"""The harness comes first: one that passes a dead process proves nothing."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  what the harness sets up
from torch import nn

from tests.ranks import RanksFailed, accelerator_for, run_ranks


def rank_and_sum(offset):
    rank = dist.get_rank() if dist.is_initialized() else 0
    total = torch.tensor(float(rank + offset))
    if dist.is_initialized():
        dist.all_reduce(total)
    return rank, total, os.getpid()


def alone():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    return dist.is_initialized(), accelerator.num_processes, accelerator.distributed_type.value, "RANK" in os.environ


def together():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    return accelerator.num_processes, accelerator.process_index, accelerator.distributed_type.value


def raise_on(rank):
    if dist.get_rank() == rank:
        raise ValueError('task "depth" is unknown')


def raise_on_while_others_reduce(rank):
    raise_on(rank)
    dist.all_reduce(torch.ones(1))


def wait_forever():
    time.sleep(1000)  # the line that the verdict must show


def reduce_on_one_process_only():
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1))
    else:
        time.sleep(1000)


def killed(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)


def leave_without_a_word(rank):
    if dist.get_rank() == rank:
        os._exit(0)


def die_while_leaving(rank):
    import multiprocessing.util

    if dist.get_rank() == rank:
        multiprocessing.util.Finalize(None, os._exit, (3,), exitpriority=0)


def return_a_lambda():
    return lambda: None


def environment(name):
    return os.environ.get(name)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_values_come_back_in_rank_order_from_that_many_processes(tmp_path, world):
    ranks, totals, pids = zip(*run_ranks(rank_and_sum, world, tmp_path, 10), strict=True)
    assert ranks == tuple(range(world))
    assert len({*pids, os.getpid()}) == world + 1
    assert all(total == sum(rank + 10 for rank in range(world)) for total in totals)


def test_one_folder_serves_many_runs(tmp_path):
    assert run_ranks(rank_and_sum, 2, tmp_path, 0)[0][1] == run_ranks(rank_and_sum, 2, tmp_path, 0)[1][1] == 1


def test_accelerate_sees_the_processes(tmp_path):
    assert run_ranks(together, 2, tmp_path) == [(2, 0, "MULTI_CPU"), (2, 1, "MULTI_CPU")]


def test_one_process_is_a_plain_process(tmp_path):
    assert run_ranks(alone, 1, tmp_path) == [(False, 1, "NO", False)]


def test_the_environment_is_the_parents_of_now(tmp_path, monkeypatch):
    for value in ("first", "second"):
        monkeypatch.setenv("SEEN_BY_CHILDREN", value)
        assert run_ranks(environment, 2, tmp_path, "SEEN_BY_CHILDREN") == [value, value]


def test_an_exception_is_the_verdict(tmp_path):
    with pytest.raises(RanksFailed, match=r'^process 1 of 2 failed: ValueError: task "depth" is unknown') as failure:
        run_ranks(raise_on, 2, tmp_path, 1)
    assert "in raise_on\n" in str(failure.value)


def test_an_exception_comes_before_what_it_did_to_the_others(tmp_path):
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"^process 2 of 3 failed: ValueError: task .* process [01] of 3 failed"):
        run_ranks(raise_on_while_others_reduce, 3, tmp_path, 2)
    assert time.monotonic() - start < 20


def test_a_hang_shows_the_line_that_waits(tmp_path):
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"^processes \[0, 1\] of 2 still waiting") as failure:
        run_ranks(wait_forever, 2, tmp_path, timeout=6)
    assert time.monotonic() - start < 12
    assert str(failure.value).count("in wait_forever") == 2


def test_a_collective_on_one_process_only_times_out(tmp_path):
    with pytest.raises(RanksFailed, match=r"^process 0 of 2 failed: .*; processes \[1\] of 2 still waiting") as failure:
        run_ranks(reduce_on_one_process_only, 2, tmp_path, timeout=10)
    assert str(failure.value).count("in reduce_on_one_process_only") == 2


def test_a_killed_process_is_named(tmp_path):
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"^process 1 of 2 was killed by signal 9 \(SIGKILL\)"):
        run_ranks(killed, 2, tmp_path, 1)
    assert time.monotonic() - start < 20


def test_exit_code_zero_without_a_result_is_no_success(tmp_path):
    with pytest.raises(RanksFailed, match=r"^process 0 of 2 ended without a result"):
        run_ranks(leave_without_a_word, 2, tmp_path, 0)


def test_a_process_that_dies_after_its_result_is_no_success(tmp_path):
    with pytest.raises(RanksFailed, match=r"^process 1 of 2 returned, then ended with exit code 3"):
        run_ranks(die_while_leaving, 2, tmp_path, 1)


def test_a_result_that_cannot_travel_is_said_so(tmp_path):
    with pytest.raises(RanksFailed, match=r"^process 0 of 1 failed: .*pickle"):
        run_ranks(return_a_lambda, 1, tmp_path)


def test_no_process_is_left_behind(tmp_path):
    pids = tmp_path / "pids"
    pids.mkdir()
    with pytest.raises(RanksFailed, match="still waiting"):
        run_ranks(note_pid_and_wait, 2, tmp_path, pids, timeout=6)
    left = [int(path.name) for path in pids.iterdir()]
    assert len(left) == 2
    for pid in left:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def note_pid_and_wait(folder):
    (folder / str(os.getpid())).touch()
    time.sleep(1000)


def engine_facts(engines):
    facts = []
    for engine in engines:
        accelerator = accelerator_for(engine, gradient_accumulation_steps=3)
        is_fsdp2 = getattr(accelerator, "is_fsdp2", False)
        facts.append((accelerator.num_processes, accelerator.distributed_type.value, is_fsdp2))
        assert accelerator.gradient_accumulation_steps == 3
        assert accelerator.device.type == "cpu"
    return facts


TYPES = {"plain": ("NO", False), "ddp": ("MULTI_CPU", False), "fsdp1": ("FSDP", False), "fsdp2": ("FSDP", True)}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_engine_has_its_type_and_number_of_processes(tmp_path, world):
    engines = ["fsdp2", "ddp", "fsdp1", "ddp", "fsdp2"]
    if world == 1:
        engines = ["plain", *engines, "plain"]
    for facts in run_ranks(engine_facts, world, tmp_path, engines):
        assert facts == [(world, *TYPES[engine]) for engine in engines]


def test_plain_pytorch_is_one_process(tmp_path):
    with pytest.raises(RanksFailed, match="plain PyTorch is one process, and here are 2"):
        run_ranks(engine_facts, 2, tmp_path, ["plain"])


def train(engines, accumulation):
    """Losses of ten optimizer steps on the same global batch, one list per engine."""
    runs = []
    for engine in engines:
        accelerator = accelerator_for(engine, gradient_accumulation_steps=accumulation)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs = torch.randn(12, 6, dtype=torch.float64)
        targets = inputs.prod(1, keepdim=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        blocks = list(torch.arange(12).chunk(accelerator.num_processes * accumulation))
        mine = blocks[accelerator.process_index :: accelerator.num_processes]
        losses = []
        for _ in range(10):
            seen = 0.0
            for block in mine:
                with accelerator.accumulate(model):
                    loss = (model(inputs[block]) - targets[block]).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    seen += loss.detach() / accumulation
            losses.append(accelerator.reduce(seen, "mean").item())
        runs.append(losses)
    return runs


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_engine_trains_alike(tmp_path, accumulation):
    expected = run_ranks(train, 1, tmp_path, ["plain"], 1)[0][0]
    assert expected[-1] < expected[0]
    for world, engines in {
        1: ["fsdp1", "ddp", "fsdp2"],
        2: ["ddp", "fsdp2", "fsdp1"],
        3: ["fsdp1", "ddp", "fsdp2"],
    }.items():
        runs = run_ranks(train, world, tmp_path, engines, accumulation)
        for losses in (losses for run in runs for losses in run):
            assert losses == pytest.approx(expected, rel=1e-9)
