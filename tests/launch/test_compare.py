"""The comparison with a tiny budget: what it writes, and that a kill costs no finished run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ["--methods", "equal,static,rotograd,config", "--seeds", "0,1", "--lrs", "1e-3,1e-2", "--steps", "3"]
RUNS = (1 + 4 + 1 + 1) * 2 * 2


def start(folder: Path, *options: str) -> subprocess.Popen:
    """The example in a session of its own, so that its workers can be killed with it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(folder)}
    command = [sys.executable, "examples/compare_methods.py", "--output_dir", str(folder), *TINY, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=environ, text=True, start_new_session=True, **pipes)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


def lines(folder: Path) -> list[str]:
    path = folder / "runs.jsonl"
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def test_a_killed_comparison_goes_on_where_it_was(tmp_path):
    process = start(tmp_path, "--workers", "2")
    deadline = time.monotonic() + 200
    while len(lines(tmp_path)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    before = [line for line in lines(tmp_path) if line.endswith("\n")]
    assert 3 <= len(before) < RUNS, output
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write(before[0][:40])  # killed in the middle of a line

    output = finish(start(tmp_path, "--workers", "1"))
    assert f"{len(before)} of {RUNS} runs are in" in output
    after = lines(tmp_path)
    assert after[: len(before)] == before, "a finished run was made again"
    runs = [json.loads(line) for line in after]
    settings = {(run["method"], run["candidate"], run["lr"], run["seed"]) for run in runs}
    assert len(runs) == len(settings) == RUNS

    table = (tmp_path / "table.txt").read_text().splitlines()
    assert table == output.splitlines()[-len(table) - 1 : -1]
    assert {line.split("|")[1].strip() for line in table[2:]} == {"equal", "static (best of 4)", "rotograd", "config"}
    assert next(line for line in table if line.startswith("| equal")).split("|")[7].strip().startswith("+0.0 ± ")
    assert (tmp_path / "compare_methods.png").read_bytes().startswith(b"\x89PNG")

    assert finish(start(tmp_path, "--workers", "1")).splitlines()[-len(table) - 1 : -1] == table
    assert lines(tmp_path) == after, "nothing was left to do"


def test_an_unknown_method_is_named(tmp_path):
    process = start(tmp_path, "--methods", "equal,gradnrom")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2 and "unknown ['gradnrom']" in output
