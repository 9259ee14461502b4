"""Measures the update of every method, in microseconds of one core, at 4 and 32 tasks; prints a Markdown table.

    python examples/method_costs.py

The remaining cost of a step is the same for all methods; `benchmark.py` measures it.
"""

import inspect
import statistics
import time

import torch

import accel_weighting
from accel_weighting import GradientBalancer, Method, RotoGradNorm, StaticWeighting, Statistics

REPEATS = 60
ARGUMENTS = {
    StaticWeighting: lambda tasks: StaticWeighting(dict.fromkeys(tasks, 1.0)),
    RotoGradNorm: lambda tasks: RotoGradNorm(alpha=0.0),
    GradientBalancer: lambda tasks: GradientBalancer(),
}


def microseconds(kind: type[Method], K: int) -> float:
    """The median time of an update, on statistics of noisy gradients with a small common part; without rotations."""
    tasks = [f"task {k}" for k in range(K)]
    method = ARGUMENTS.get(kind, lambda _: kind())(tasks)
    _, state = method.init(tasks)
    generator = torch.Generator().manual_seed(0)
    times = []
    for step in range(REPEATS):
        J = torch.randn(K, 256, dtype=torch.float64, generator=generator) + 0.1
        gram = J @ J.T
        losses = torch.rand(K, dtype=torch.float64, generator=generator) + 0.5
        seen = Statistics(losses, torch.ones(K, dtype=torch.bool), gram.diagonal().sqrt(), gram, step=step)
        start = time.perf_counter()
        _, state = method.update(state, seen)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    """Measures all native methods except the wrappers."""
    torch.set_num_threads(1)
    public = [getattr(accel_weighting, name) for name in accel_weighting.__all__]
    kinds = [x for x in public if inspect.isclass(x) and issubclass(x, Method) and x is not Method]
    print("| method | µs at 4 tasks | at 32 |\n|---|---|---|")
    for kind in kinds:
        if "method" in inspect.signature(kind).parameters or kind.__name__ == "TorchJDWeighting":
            continue
        print(f"| `{kind.__name__}` | {microseconds(kind, 4):.0f} | {microseconds(kind, 32):.0f} |", flush=True)


if __name__ == "__main__":
    main()
