"""What a method's update takes, in microseconds of one core, at 4 and at 32 tasks; Markdown.

    python examples/method_costs.py

The table has every method but the wrappers and the adapter to TorchJD, and takes half a minute. The rest of a step's
price is the same for all methods: `benchmark.py` measures it.
"""

import argparse
import inspect
import statistics
import time

import numpy as np

import accel_weighting
from accel_weighting import CosineGate, Method, ReferenceNorm, RotoGradNorm, StaticWeighting, Statistics

REPEATS = 60
ARGUMENTS = {  # of the methods that have some without a default
    StaticWeighting: lambda tasks: StaticWeighting(dict.fromkeys(tasks, 1.0)),
    RotoGradNorm: lambda tasks: RotoGradNorm(alpha=0.0),
    CosineGate: lambda tasks: CosineGate(tasks[0]),
    ReferenceNorm: lambda tasks: ReferenceNorm(tasks[0]),
}


def microseconds(kind: type[Method], K: int) -> float:
    """The median processor time of an update, without rotations, for noisy gradients that agree a little."""
    tasks = [f"task {k}" for k in range(K)]
    method = ARGUMENTS.get(kind, lambda _: kind())(tasks)
    _, state = method.init(tasks)
    random = np.random.default_rng(0)
    times = []
    for step in range(REPEATS):
        J = random.normal(size=(K, 256)) + 0.1
        gram = J @ J.T
        losses = random.random(K) + 0.5
        seen = Statistics(losses, np.ones(K, np.bool_), np.sqrt(gram.diagonal()), gram, step=step)
        start = time.process_time()
        _, state = method.update(state, seen)
        times.append(time.process_time() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    public = [getattr(accel_weighting, name) for name in accel_weighting.__all__]
    kinds = [x for x in public if inspect.isclass(x) and issubclass(x, Method) and x is not Method]
    print("| method | µs at 4 tasks | µs at 32 tasks |\n|---|---|---|")
    for kind in kinds:
        if "method" in inspect.signature(kind).parameters or kind.__name__ == "TorchJDWeighting":
            continue
        print(f"| `{kind.__name__}` | {microseconds(kind, 4):.0f} | {microseconds(kind, 32):.0f} |", flush=True)


if __name__ == "__main__":
    main()
