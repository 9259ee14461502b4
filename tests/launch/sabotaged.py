"""The self-check of a library that is broken in one place."""

import os
import sys
from typing import Any

from accel_weighting import selfcheck
from accel_weighting.processes import Processes

BREAK: dict[str, Any] = {
    "dropped": lambda processes, vector: None,
    "own numbers only": lambda processes, vector: vector.mul_(processes.world),
}

if __name__ == "__main__":
    Processes._all_reduce = BREAK[os.environ["SABOTAGE"]]  # type: ignore[method-assign]
    sys.exit(selfcheck.main())
