"""The self-check of a library that is broken in one place."""

import os
import sys
from typing import Any

from torch import Tensor

from accel_weighting.processes import Processes
from accel_weighting.selfcheck.__main__ import main

ALL_REDUCE = Processes._all_reduce


def failing_on_one(processes: Processes, vector: Tensor) -> None:
    if processes.rank == 1:
        raise MemoryError("no memory left on purpose")
    ALL_REDUCE(processes, vector)


BREAK: dict[str, Any] = {
    "dropped": lambda processes, vector: None,
    "own numbers only": lambda processes, vector: vector.mul_(processes.world),
    "failing on one": failing_on_one,
}

if __name__ == "__main__":
    Processes._all_reduce = BREAK[os.environ["SABOTAGE"]]  # type: ignore[method-assign]
    sys.exit(main())
