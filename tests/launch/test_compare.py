"""The comparison with a tiny budget: what it writes, and that a kill costs no finished run."""

import json
import math
import sys
from pathlib import Path

from tests.launch.launching import Launched

TINY = ["--methods", "equal,static,rotograd,config", "--seeds", "0,1", "--lrs", "1e-3,1e-2", "--steps", "3"]
CHOOSING = (1 + 4 + 2 + 1) * 2  # candidates and learning rates, with the first seed
RUNS = CHOOSING + 4  # every method with the other one


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
    assert len(before) < CHOOSING, output
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write(before[0][:40])  # killed in the middle of a line

    output = finish(tmp_path)
    assert f"{len(before)} of {CHOOSING} runs are in" in output
    after = lines(tmp_path)
    assert after[: len(before)] == before, "a finished run was made again"
    runs = [json.loads(line) for line in after]
    settings = {(run["method"], run["candidate"], run["lr"], run["seed"]) for run in runs}
    assert len(runs) == len(settings) == RUNS

    others = [run for run in runs if run["seed"] == 1]
    assert sorted(run["method"] for run in others) == ["config", "equal", "rotograd", "static"]
    for run in others:  # those that are best on the validation set of the first seed
        rivals = [r for r in runs if r["seed"] == 0 and r["method"] == run["method"]]
        best = min(rivals, key=lambda r: sum(map(math.log, r["valid"].values())))
        assert (best["candidate"], best["lr"]) == (run["candidate"], run["lr"])

    table = (tmp_path / "table.txt").read_text().splitlines()
    assert table == output.splitlines()[-len(table) - 1 : -1]
    rows = {row[1]: row for row in ([cell.strip() for cell in line.split("|")] for line in table[2:])}
    assert rows.keys() == {"equal", "static", "rotograd", "config"}
    assert rows["equal"][9:12:2] == ["0", rows["equal"][11]] and rows["static"][2].endswith("(of 4)")
    test = {(run["method"], run["seed"]): run["test"] for run in others} | {
        (run["method"], 0): run["test"]
        for run in runs
        if run["seed"] == 0 and any((run["candidate"], run["lr"]) == (o["candidate"], o["lr"]) for o in others)
    }
    by_hand = [
        100 * sum(test["config", seed][t] / e - 1 for t, e in test["equal", seed].items()) / 5 for seed in (0, 1)
    ]
    assert rows["config"][9].startswith(f"{sum(by_hand) / 2:+.1f} ± ")
    assert (tmp_path / "compare_digits.png").read_bytes().startswith(b"\x89PNG")

    again = finish(tmp_path).splitlines()[-len(table) - 1 : -1]
    assert [line.split("|")[:-2] for line in again] == [line.split("|")[:-2] for line in table]  # but for the costs
    assert lines(tmp_path) == after, "nothing was left to do"


def test_the_other_problem(tmp_path):
    with start(tmp_path, "--problem", "text", "--methods", "equal,mgda", "--seeds", "0", "--workers", "1") as sweep:
        code, output = sweep.wait()
    assert code == 0, output
    assert "topic, % wrong" in output and (tmp_path / "compare_text.png").exists()
    with start(tmp_path, "--problem", "text", "--summary") as sweep:
        code, output = sweep.wait()
    assert code == 0 and "weights at which all gradients would have the same length: topic" in output


def test_an_unknown_method_is_named(tmp_path):
    with start(tmp_path, "--methods", "equal,gradnrom") as sweep:
        code, output = sweep.wait()
    assert code == 2 and "unknown ['gradnrom']" in output
