"""Two processes whose processors round differently, as on machines of two generations, train on alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

STEPS = 300
OTHER_PROCESSOR = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",  # those that are there
}


def test_processes_that_round_differently_go_on_alike(tmp_path: Path) -> None:
    """Every kind of method: what the last update rounded differently, which the next step heals, is all there is."""
    environ = {name: value for name, value in os.environ.items() if name not in OTHER_PROCESSOR}
    environ |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.rounding", str(rank), str(tmp_path), str(STEPS)],
            cwd=Path(__file__).parents[2],
            env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (OTHER_PROCESSOR if rank else {}),
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
    assert len(found[0]) == len(found[1]) > 15
    for name, (apart, step, _) in found[0].items():
        assert apart < 1e-12 and step == STEPS, name
