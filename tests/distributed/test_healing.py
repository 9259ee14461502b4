"""Two processes whose processors round differently, as on machines of two generations, train on alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

STEPS = 300


def test_processes_that_round_differently_go_on_alike(tmp_path: Path) -> None:
    """Every kind of method, 300 steps; where no other instruction set is there, nothing is to be healed."""
    environ = {name: value for name, value in os.environ.items() if name not in ("ATEN_CPU_CAPABILITY", "MKL_CBWR")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.rounding", str(rank), str(tmp_path), str(STEPS)],
            cwd=Path(__file__).parents[2],
            env=environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error[-2000:] for _, error in outputs)
    found = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert found[0] == found[1] and len(found[0]) > 15
    assert all(alike and step == STEPS for alike, _, step in found[0].values()), found[0]
    print({name: healed for name, (_, healed, _) in found[0].items()})
