"""The small training of test_two_nodes.py: `two_nodes.py ENGINE FOLDER`.

Every process writes its weights, to the last bit, to FOLDER/rank{N}.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251  joins the others as the launcher says

from accel_weighting import GradNorm
from tests.ranks import accelerator_for
from tests.scenarios import Cell, cut, net, weighter_for
from tests.small import batch, task_losses


def train(engine: str, folder: Path) -> dict[str, Any]:
    cell = Cell(GradNorm(alpha=1.0))
    fsdp = {"transformer_cls_names_to_wrap": ["Block"]} if engine == "fsdp2" else None
    accelerator: Any = accelerator_for(engine, fsdp=fsdp)
    model: Any = net(cell)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    weighter = weighter_for(cell, model, accelerator.unwrap_model(model), accelerator)
    weights = []
    for step in range(8):
        x, y = batch(step, cell.tasks, cell.dtype)
        rows = cut(cell, accelerator.num_processes)[accelerator.process_index]
        weighter.backward(task_losses(model(x[rows]), y[rows]))
        optimizer.step()
        optimizer.zero_grad()
        weights.append(list(weighter.weights.values()))
    result = {"world": accelerator.num_processes, "type": accelerator.distributed_type.value, "weights": weights}
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(result))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(sys.argv[1], Path(sys.argv[2]))
