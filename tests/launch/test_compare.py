"""The comparison with a tiny budget: what it writes, and that a kill costs no finished run."""

import json
import sys
from pathlib import Path

from tests.launch.launching import Launched

TINY = ["--methods", "equal,static,rotograd,config", "--seeds", "0,1", "--lrs", "1e-3,1e-2", "--steps", "3"]
RUNS = (1 + 4 + 2 + 1) * 2 * 2


def start(folder: Path, *options: str) -> Launched:
    command = [sys.executable, "examples/compare_methods.py", "--output_dir", str(folder), *TINY, *options]
    return Launched(command, {"MPLCONFIGDIR": str(folder)})


def finish(folder: Path) -> str:
    with start(folder, "--workers", "1") as sweep:
        code, output = sweep.wait()
    assert code == 0, output
    return output


def lines(folder: Path) -> list[str]:
    path = folder / "runs.jsonl"
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def test_a_killed_comparison_goes_on_where_it_was(tmp_path):
    with start(tmp_path, "--workers", "2") as sweep:
        sweep.wait_until(lambda: len(lines(tmp_path)) > 3, "three runs are in")
        sweep.kill()
        output = sweep.output
    before = [line for line in lines(tmp_path) if line.endswith("\n")]
    assert len(before) < RUNS, output
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write(before[0][:40])  # killed in the middle of a line

    output = finish(tmp_path)
    assert f"{len(before)} of {RUNS} runs are in" in output
    after = lines(tmp_path)
    assert after[: len(before)] == before, "a finished run was made again"
    runs = [json.loads(line) for line in after]
    settings = {(run["method"], run["candidate"], run["lr"], run["seed"]) for run in runs}
    assert len(runs) == len(settings) == RUNS

    table = (tmp_path / "table.txt").read_text().splitlines()
    assert table == output.splitlines()[-len(table) - 1 : -1]
    names = {line.split("|")[1].strip() for line in table[2:]}
    assert names == {"equal", "static (best of 4)", "rotograd (best of 2)", "config"}
    assert next(line for line in table if line.startswith("| equal")).split("|")[7].strip().startswith("+0.0 ± ")
    assert (tmp_path / "compare_methods.png").read_bytes().startswith(b"\x89PNG")

    assert finish(tmp_path).splitlines()[-len(table) - 1 : -1] == table
    assert lines(tmp_path) == after, "nothing was left to do"


def test_an_unknown_method_is_named(tmp_path):
    with start(tmp_path, "--methods", "equal,gradnrom") as sweep:
        code, output = sweep.wait()
    assert code == 2 and "unknown ['gradnrom']" in output
