"""A training that process 1 leaves after two steps while process 0 goes on; each in an interpreter of its own.

python -m tests.launch.leaving RENDEZVOUS SECONDS
"""

import os
import sys
from datetime import timedelta

import torch.distributed as dist  # noqa: TID251  a process group with little patience

from tests.distributed.setups import build, rank


def main() -> None:
    rendezvous, seconds = sys.argv[1:]
    place = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group("gloo", f"file://{rendezvous}", timedelta(seconds=float(seconds)), **place)
    setup = build()
    for step in range(4):
        if rank() == 1 and step == 2:
            print("left after 2 steps", flush=True)
            break
        setup.step(step)


if __name__ == "__main__":
    main()
