"""Measures the one all-reduce of a step on 2, 4 and 8 processes of this machine, and models it up to 4,096.

    python examples/scaling.py

The model is the usual one of a ring, `2 (N − 1) latency + 2 (N − 1) / N · bytes / bandwidth`, or of a tree,
`2 log2(N) latency + 2 bytes / bandwidth`, whichever is faster. As a check on its form, gloo's ring is fitted to the
measurements; processes that share a core wait for each other, so both terms are multiplied by processes per core. For
a cluster, latency and bandwidth are assumptions, which are printed with the table. The times are compared with the
all-reduce of the gradients, which every data-parallel job does anyway.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist  # noqa: TID251  this script is its own launcher
import torch.multiprocessing
from torch import nn
from tqdm.auto import tqdm

from accel_weighting import GradNorm, RotoGrad, Weighter

RANKS = (8, 64, 512, 4096)


def numbers(tasks: int, width: int = 0, weight: int = 0) -> int:
    """How many float64 numbers a step sends: header, five values per task, Gram matrix (or K · |W|), cross products."""
    header = 11 + 4 * bool(width)
    moments = tasks * (tasks - 1) // 2 * (width * (width - 1) // 2)
    return header + 6 + 5 * tasks + (tasks * weight or tasks**2) + moments


CASES = {
    "4 tasks": numbers(4),
    "32 tasks": numbers(32),
    "3 tasks, rotations of 512": numbers(3, width=512),
    "4 tasks, shared layer of 768²": numbers(4, weight=768**2),
}


def sent(method: Any, tasks: int, width: int) -> int:
    """Counts the numbers that a weighter sends in its third step."""
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, width), [nn.Linear(width, 1) for _ in range(tasks)]
    names = [f"task {k}" for k in range(tasks)]
    weighter = Weighter(method, names, heads=dict(zip(names, heads, strict=True)), process_group=dist.group.WORLD)
    counts: list[int] = []
    original = dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (
        counts.append(tensor.numel()),
        original(tensor, *args, **kwargs),
    )[1]
    for _ in range(3):
        counts.clear()
        z = trunk(torch.randn(8, 4))
        weighter.backward([head(z).square().mean() for head in heads])
    dist.all_reduce = original
    assert len(counts) == 1
    return counts[0]


def worker(rank: int, world: int, folder: str, sizes: list[int], repeats: int) -> None:
    """Times the all-reduces of vectors of `sizes` bytes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/{world}", rank=rank, world_size=world)
    times = {}
    for size in sizes:
        vector, taken = torch.zeros(size // 8, dtype=torch.float64), []
        for _ in range(3 + (repeats if size < 1e6 else max(5, repeats // 10))):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(vector)
            taken.append(time.perf_counter() - start)
        times[size] = statistics.quantiles(taken[3:], n=4)
    found: dict[str, Any] = {"times": times}
    if world == 2:
        found["sent"] = [sent(GradNorm(), 4, 8), sent(GradNorm(), 32, 8), sent(RotoGrad(), 3, 64)]
    if rank == 0:
        torch.save(found, f"{folder}/{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


def ring(ranks: int, size: float, latency: float, per_byte: float) -> float:
    return 2 * (ranks - 1) * latency + 2 * (ranks - 1) / ranks * size * per_byte


def cluster(ranks: int, size: float, latency: float, per_byte: float) -> float:
    """The faster of ring and tree."""
    tree = 2 * math.log2(ranks) * latency + 2 * size * per_byte
    return min(tree, ring(ranks, size, latency, per_byte))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="2,4,8", help="numbers of processes to measure (default: 2,4,8)")
    parser.add_argument("--repeats", type=int, default=200, help="all-reduces of each size (default: 200)")
    parser.add_argument(
        "--parameters", type=float, default=110e6, help="parameters of the model on the cluster (default: 110e6, BERT)"
    )
    parser.add_argument(
        "--gradient_bytes",
        type=int,
        default=4,
        help="bytes of the gradient per parameter (default: 4)",
    )
    parser.add_argument("--latency", type=float, default=20, help="microseconds of a hop on the cluster (default: 20)")
    parser.add_argument("--bandwidth", type=float, default=25, help="GB/s of a process on the cluster (default: 25)")
    parser.add_argument("--json", type=Path, help="file to which the figures are also written")
    args = parser.parse_args()

    worlds, cores = [int(n) for n in args.processes.split(",")], len(os.sched_getaffinity(0))
    names = {8 * n: name for name, n in CASES.items() if 8 * n < 1e7} | {12_000_000: "gradients of 3e6 parameters"}
    measured, counted = {}, None
    with tempfile.TemporaryDirectory() as folder:
        for world in tqdm(worlds, desc="launches", leave=False):
            torch.multiprocessing.spawn(worker, (world, folder, list(names), args.repeats), nprocs=world)
            found = torch.load(f"{folder}/{world}.pt")
            measured[world], counted = found["times"], counted or found.get("sent")
    if counted:
        expected = [numbers(4), numbers(32), numbers(3, width=64)]
        print(f"Numbers sent by a step: formula {expected}, counted {counted}")
        assert counted == expected

    points = [(n, size, times[1]) for n, sizes in measured.items() for size, times in sizes.items()]
    share = [max(1, n / cores) for n, _, _ in points]
    # Least squares of the relative error, so that every point has the same weight.
    terms = [
        [s * 2 * (n - 1) / t, s * 2 * (n - 1) / n * size / t] for (n, size, t), s in zip(points, share, strict=True)
    ]
    latency, per_byte = (
        float(x) for x in np.abs(np.linalg.lstsq(np.array(terms), np.ones(len(points)), rcond=None)[0])
    )
    print(
        f"\nMeasured, gloo, {cores} core(s): median [quartiles], ms; "
        f"fitted: {1e6 * latency:.0f} µs a hop, {1e-9 / per_byte:.2f} GB/s"
    )
    print("| processes | bytes | what | measured | model | measured / model |\n| - | - | - | - | - | - |")
    rows = []
    for (n, size, median), s in zip(points, share, strict=True):
        low, _, high = (1e3 * t for t in measured[n][size])
        model = s * ring(n, size, latency, per_byte)
        rows.append({"processes": n, "bytes": size, "ms": 1e3 * median, "quartiles": [low, high], "model": 1e3 * model})
        print(
            f"| {n} | {size:,} | {names[size]} | {1e3 * median:.2f} [{low:.2f}, {high:.2f}] | {1e3 * model:.2f} "
            f"| {median / model:.2f} |"
        )

    gradients = args.parameters * args.gradient_bytes
    print(
        f"\nModelled for a cluster: {args.latency:g} µs a hop, {args.bandwidth:g} GB/s a process, against the "
        f"all-reduce of {gradients / 1e6:,.0f} MB of gradients. Whatever could overlap is counted in full."
    )
    print(
        "| processes | gradients, ms | "
        + " | ".join(
            f"{name} ({8e-3 * n:.1f} kB)" if n < 1e5 else f"{name} ({8e-6 * n:.1f} MB)" for name, n in CASES.items()
        )
        + " |"
    )
    print("| - " * (2 + len(CASES)) + "|")
    modelled = []
    for ranks in RANKS:
        base = cluster(ranks, gradients, 1e-6 * args.latency, 1e-9 / args.bandwidth)
        ours = {name: cluster(ranks, 8 * n, 1e-6 * args.latency, 1e-9 / args.bandwidth) for name, n in CASES.items()}
        modelled.append({"processes": ranks, "gradients": base, **ours})
        cells = " | ".join(f"{1e3 * t:.2f} ms ({t / base:.1%})" for t in ours.values())
        print(f"| {ranks:,} | {1e3 * base:.1f} | {cells} |")
    if args.json:
        fit = {"latency": latency, "per_byte": per_byte, "cores": cores}
        args.json.write_text(json.dumps({"measured": rows, "fit": fit, "modelled": modelled}))


if __name__ == "__main__":
    main()
