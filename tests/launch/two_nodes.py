"""The training of test_two_nodes.py: `two_nodes.py ENGINE STEPS FOLDER [--save_at N] [--resume] [--slow]`.

Every process prints a line per step and writes its weights, to the last bit, to FOLDER/rank{N}.json.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251  joins the others as the launcher says

from accel_weighting import GradNorm
from tests.ranks import accelerator_for
from tests.scenarios import Cell, batch, cut, net, task_losses, weighter_for

PATIENCE = 20  # seconds in a collective; a node that lost its network is noticed after this


def train(engine: str, steps: int, folder: Path, save_at: int = -1, resume: bool = False, slow: bool = False) -> Any:
    cell = Cell(GradNorm(alpha=1.0))
    fsdp = {"transformer_cls_names_to_wrap": ["Block"]} if engine.startswith("fsdp") else None
    accelerator: Any = accelerator_for(engine, fsdp=fsdp)
    model: Any = net(cell)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    weighter = weighter_for(cell, model, accelerator.unwrap_model(model), accelerator)
    if resume:
        accelerator.load_state(str(folder / "checkpoint"))
    trajectory = {}
    for step in range(weighter.state_dict()["step"], steps):
        x, y = batch(step, cell.tasks, cell.dtype)
        rows = cut(cell, accelerator.num_processes)[accelerator.process_index]
        weighter.backward(task_losses(model(x[rows]), y[rows]))
        optimizer.step()
        optimizer.zero_grad()
        trajectory[step] = list(weighter.weights.values())
        print(f"process {accelerator.process_index} did step {step}", flush=True)
        if step + 1 == save_at:
            accelerator.wait_for_everyone()
            accelerator.save_state(str(folder / "checkpoint"))
            accelerator.wait_for_everyone()
        time.sleep(0.1 * slow)
    result = {
        "world": accelerator.num_processes,
        "type": accelerator.distributed_type.value,
        "weights": trajectory,
        "step": weighter.state_dict()["step"],
    }
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(result))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("steps", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--save_at", type=int, default=-1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--slow", action="store_true")
    arguments = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    train(**vars(arguments))
