"""Ends of trainings, one after another: `python -m tests.launch.ends ENDS [--nodes 2 --node 0 --address 10.77.0.1]`.

Each is a training of two processes a node under FSDP2 with three weighters, which saves, loads, prints, and then ends
as a script does: a barrier, `end_training()`, and the end of the interpreter with all that is still alive. The
processes are forked from this one, which has done the imports. Prints how many ended well; the first that hangs or
fails is an error with the stacks of its processes.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist  # noqa: TID251  joins the others as the launcher says

PER_NODE = 2
PATIENCE = 120.0  # seconds for a training of a second, on a machine that does other things too


def train(folder: Path) -> Any:
    """Three trainings in one process; what is returned lives until the interpreter is gone."""
    from accel_weighting import CoVWeighting, GradNorm, RotoGrad
    from tests.distributed.setups import build

    dist.init_process_group("gloo")
    setups = [build("fsdp2", method=method) for method in (GradNorm(), CoVWeighting(), RotoGrad())]
    for number, setup in enumerate(setups):
        for step in range(2):
            setup.step(step)
        setup.accelerator.save_state(str(folder / f"{number}"))
        setup.accelerator.wait_for_everyone()
        setup.accelerator.load_state(str(folder / f"{number}"))
        setup.step(2)
        print(setup.weighter.weights, flush=True)
    setups[-1].accelerator.wait_for_everyone()
    setups[-1].accelerator.end_training()
    return setups


@contextmanager
def stage(number: int) -> Iterator[Path]:
    """A folder, and so many processes that do nothing but take a core each; only who made them takes them away."""
    pids, me, folder = [], os.getpid(), Path(tempfile.mkdtemp())
    for _ in range(number):
        pid = os.fork()
        if pid == 0:
            while True:
                pass
        pids.append(pid)
    try:
        yield folder
    finally:
        if os.getpid() == me:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            shutil.rmtree(folder)


def fork(args: argparse.Namespace, end: int, local: int, log: Path) -> int:
    """A process of one training; returns in the parent alone, its number."""
    if pid := os.fork():
        return pid
    file = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(
        RANK=str(args.node * PER_NODE + local),
        WORLD_SIZE=str(args.nodes * PER_NODE),
        LOCAL_RANK=str(local),
        LOCAL_WORLD_SIZE=str(PER_NODE),
        MASTER_ADDR=args.address,
        MASTER_PORT=str(args.port + end),
    )
    globals()["alive"] = train((args.checkpoints or args.folder) / str(end))
    sys.exit(0)  # the interpreter ends by itself


def wait(pids: list[int]) -> list[int | None]:
    """Exit codes; None for a process that had to be killed."""
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + PATIENCE
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGUSR1)
                time.sleep(1)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.launch.ends", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ends", type=int, metavar="ENDS", help="how many trainings")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="how many nodes (default: %(default)s)")
    parser.add_argument(
        "--node", type=int, default=0, metavar="I", help="which of them this is, from 0 (default: %(default)s)"
    )
    parser.add_argument(
        "--address", default="127.0.0.1", help="of the first node, as the others reach it (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=29700, help="the first of ENDS free ports on the first node (default: %(default)s)"
    )
    parser.add_argument(
        "--checkpoints", type=Path, metavar="FOLDER", help="an empty folder that all nodes see; one node needs none"
    )
    parser.add_argument(
        "--busy",
        type=int,
        default=0,
        metavar="N",
        help="idle loops that take a core each meanwhile (default: %(default)s)",
    )
    args = parser.parse_args()
    import tests.distributed.setups  # noqa: F401  what every fork needs

    with stage(args.busy) as args.folder:
        for end in range(args.ends):
            logs = [args.folder / f"{end}.{local}.log" for local in range(PER_NODE)]
            codes = wait([fork(args, end, local, log) for local, log in enumerate(logs)])
            if any(codes):
                output = "\n".join(log.read_text() for log in logs)
                raise SystemExit(f"end {end}: exit codes {codes} (None: it hung)\n{output}")
    print(f"{args.ends} of {args.ends} ended well")


if __name__ == "__main__":
    main()
