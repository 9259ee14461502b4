"""One of two processes that round differently: `python -m tests.distributed.rounding RANK FOLDER STEPS`.

Prints, for every method, whether its weights are the same on both at the end, and how many steps were healed.
"""

from __future__ import annotations

import os
import sys

RANK = int(sys.argv[1]) if len(sys.argv) > 1 else 0
os.environ |= {"RANK": str(RANK), "WORLD_SIZE": "2", "LOCAL_RANK": str(RANK), "MASTER_ADDR": "127.0.0.1"}
if RANK:  # before torch looks
    os.environ |= {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    os.environ["NPY_DISABLE_CPU_FEATURES"] = "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"  # those that are there


def main(folder: str, steps: int) -> None:
    import json
    from datetime import timedelta

    import torch
    import torch.distributed as dist  # noqa: TID251  it is a process itself

    from accel_weighting import EqualWeighting, Weighter
    from tests.methods.catalogue import CATALOGUE
    from tests.small import batch, names, net, task_losses

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=60), rank=RANK, world_size=2)
    tasks, found = names(5), {}
    built = {type(row.method).__name__: row for row in CATALOGUE}
    for name, row in built.items():
        model = net(tasks).float()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        weighter = Weighter(row.build(tasks), tasks, heads=dict(model.heads), process_group=dist.group.WORLD)
        for step in range(steps):
            x, y = batch(step % 50, 5, torch.float32)
            rows = slice(18 * RANK, 18 * RANK + 18)
            weighter.backward(task_losses(ddp(x[rows]), y[rows]))
            optimizer.step()
            optimizer.zero_grad()
        state = weighter._progress
        ours = [state.digest().hex()]
        everyone: list[list[str]] = [[], []]
        dist.all_gather_object(everyone, ours)
        found[name] = everyone[0] == everyone[1], state.healed, state.step
        weighter.detach()
    assert EqualWeighting.__name__ in found
    print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[3]))
