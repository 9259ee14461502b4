"""Engines that the Trainer's own arguments ask for: which one runs, whether it is exact, and whether it resumes."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from accel_weighting import Weighter
from tests.launch.launching import run_to_end
from tests.launch.test_trainer_items import METHODS, TASKS, Two, collate, make, rows, statistics
from tests.launch.trainer_engines import ACCUMULATION, BATCH, ROWS, STEPS

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m"]
ENGINES = {
    "ddp": {"type": "MULTI_CPU", "class": "DistributedDataParallel", "parameter": "Parameter", "stage": None},
    "fsdp2": {"type": "FSDP", "class": "FSDPTwo", "parameter": "DTensor", "stage": None},
    "zero2": {"type": "DEEPSPEED", "class": "DeepSpeedEngine", "parameter": "Parameter", "stage": 2},
    "zero3": {"type": "DEEPSPEED", "class": "DeepSpeedEngine", "parameter": "Parameter of ZeRO-3", "stage": 3},
}


def by_hand(method):
    """One process, all rows of a step at once: statistics and weights of every step, and what evaluation must give."""
    model, data = make(Two).float(), rows(two=True)[:ROWS]
    weighter = Weighter(METHODS[method], TASKS, heads={task: model.heads[task] for task in TASKS})
    optimizer, seen, size = (
        torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0),
        [],
        2 * BATCH * ACCUMULATION,
    )
    for step in range(STEPS):
        first = step * size % ROWS
        weighter.backward(model(**collate(data[first : first + size]))["losses"])
        optimizer.step()
        optimizer.zero_grad()
        seen.append(statistics(weighter))
    with torch.no_grad():
        losses = model(**collate(data))["losses"]
    return torch.stack(seen), {f"eval_loss/{task}": float(loss) for task, loss in losses.items()}


@pytest.mark.parametrize(
    "engine, method", [("ddp", "rotograd"), ("fsdp2", "rotograd"), ("zero2", "rotograd"), ("zero3", "gradnorm")]
)
def test_the_engine_that_was_asked_for_runs_is_exact_and_resumes(engine, method, tmp_path):
    code, output = run_to_end(*TORCHRUN, "tests.launch.trainer_engines", engine, method, tmp_path)
    assert code == 0, output[-4000:]
    whole, again = torch.load(tmp_path / "seen.pt", weights_only=False)
    seen, evaluated = by_hand(method)
    for run in (whole, again):
        assert run["world"] == 2
        assert {name: run[name] for name in ENGINES[engine]} == ENGINES[engine]
        assert run["evaluated"] == pytest.approx(evaluated, rel=1e-4)  # float32, and Adam
    torch.testing.assert_close(whole["seen"], seen, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.equal(whole["seen"][3:], again["seen"])
    assert whole["evaluated"] == again["evaluated"]

    model = make(Two).float()  # without the library
    if method == "rotograd":
        turned = [(R - torch.eye(len(R))).norm() for R in whole["state"]["state"]["rotations"]]
        assert min(turned) > 1e-3
    if engine != "zero3":  # whose weights DeepSpeed's own script puts together
        model.load_state_dict(load_file(tmp_path / "handed_out" / "model.safetensors"))
        with torch.no_grad():
            losses = model(**collate(rows(two=True)[:ROWS]))["losses"]
        assert {f"eval_loss/{task}": float(loss) for task, loss in losses.items()} == pytest.approx(
            whole["evaluated"], rel=1e-4
        )
