"""Launches as a user launches, in processes of their own that cannot outlive the test, and reads what they printed."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
ON_TWO_PROCESSES = [*ACCELERATE, "--config_file", "launch_configs/cpu_2.yaml"]
History = list[tuple[int, dict[str, float]]]
MINUTES = 240.0  # a launch takes ten seconds on a machine of its own


def environment(**more: str) -> dict[str, str]:
    """This one, without what another launcher may have left."""
    left = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in left and not name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "SLURM_"))
    }
    paths = f"{ROOT}{os.pathsep}{Path(sys.executable).parent}"
    return kept | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{paths}{os.pathsep}{kept['PATH']}",
        **more,
    }


class Launched:
    """A command that runs; killed with all that it started when the `with` block is left."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the block
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**(env or {})),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._log.close()

    @property
    def output(self) -> str:
        """All that it printed so far."""
        return os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")

    def kill(self) -> None:
        """SIGKILL for it and all that it started."""
        for pid in family(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, seconds: float = MINUTES) -> tuple[int, str]:
        """Exit code and output, within so many seconds."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:.0f} s:\n{self.output[-4000:]}") from None
        return code, self.output

    def wait_until(self, is_so: Callable[[], bool], what: str, seconds: float = MINUTES) -> None:
        """Until something is so, while the command runs."""
        deadline = time.monotonic() + seconds
        while not is_so():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"not after {seconds:.0f} s: {what}:\n{self.output[-4000:]}"
            time.sleep(0.05)


def run_to_end(*command: object, **env: str) -> tuple[int, str]:
    """Exit code and output of a command that ends by itself."""
    with Launched([str(word) for word in command], env) as one:
        return one.wait()


def family(pid: int) -> list[int]:
    """A process and all that it started, which may have made sessions of their own (torchrun's workers do)."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found = [pid]
    for one in found:
        found += [child for child, parent in parents if parent == one]
    return found


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def selfcheck(
    flags: Sequence[str], folder: Path, arguments: Sequence[str] = ("--cpu",), **env: str
) -> tuple[int, str, dict[str, Any]]:
    """One launch of the self-check: exit code, output, and what it wrote."""
    with Launched([*ACCELERATE, *flags, "-m", "accel_weighting.selfcheck", *arguments, *report(folder)], env) as one:
        code, output = one.wait()
    return code, output, read(folder, output)


def report(folder: Path) -> list[str]:
    return ["--json", str(folder / "report.json")]


def read(folder: Path, output: str) -> dict[str, Any]:
    file = folder / "report.json"
    assert file.exists(), f"no report was written:\n{output[-4000:]}"
    return json.loads(file.read_text())


def assert_same_history(found: History, one: History) -> None:
    """The main job's record of every step, to what float32 explains.

    CoV divides by the spread of losses that hardly differ in the first steps, hence the absolute part for weights.
    """
    assert len(found) == len(one) > 5 and found[-1][1] != found[0][1]
    for (step, values), (expected_step, expected) in zip(found, one, strict=True):
        assert step == expected_step and set(values) == set(expected)
        for name, value in expected.items():
            absolute = 1e-5 if name.startswith("weight/") else 0.0
            assert math.isclose(values[name], value, rel_tol=1e-5, abs_tol=absolute), (step, name, values[name], value)
