"""One of two processes of `test_healing`: `python -m tests.distributed.rounding RANK FOLDER STEPS`.

Prints, for every method, how far the weights of both are apart after the last update, relative to the largest; the
step; and how many steps were healed.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta

import torch
import torch.distributed as dist  # noqa: TID251  it is a process itself

from accel_weighting import EqualWeighting, Weighter
from tests.methods.catalogue import CATALOGUE
from tests.small import batch, names, net, task_losses


def main(rank: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=60), rank=rank, world_size=2)
    tasks, found = names(5), {}
    built = {type(row.method).__name__: row for row in CATALOGUE}
    for name, row in built.items():
        model = net(tasks).float()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        weighter = Weighter(row.build(tasks), tasks, heads=dict(model.heads), process_group=dist.group.WORLD)
        for step in range(steps):
            x, y = batch(step % 50, 5, torch.float32)
            rows = slice(18 * rank, 18 * rank + 18)
            weighter.backward(task_losses(ddp(x[rows]), y[rows]))
            optimizer.step()
            optimizer.zero_grad()
        weights = torch.tensor(list(weighter.weights.values()), dtype=torch.float64)
        everyone = [torch.empty_like(weights) for _ in range(2)]
        dist.all_gather(everyone, weights)
        apart = (everyone[0] - everyone[1]).abs().max() / weights.abs().max()
        found[name] = apart.item(), weighter._progress.step, weighter._progress.healed
        weighter.detach()
    assert EqualWeighting.__name__ in found
    print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
