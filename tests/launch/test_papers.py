"""The papers' small experiments, as their scripts run them: exit code 0 says that every figure lies in its range."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# script → options of a budget that keeps all of them under a minute together
SCRIPTS = {
    "cov_closed_forms": ["--seeds", "2"],
    "gradnorm_toy": ["--quick"],
    "rotograd_toys": ["--quick", "--seeds", "4", "--steps", "500"],
    "multi_digits_synthetic": ["--quick", "--seeds", "1", "--steps", "800"],
}


def run(name, *options, timeout=600):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, f"examples/papers/{name}.py", *map(str, options)]
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environ, text=True, capture_output=True, timeout=timeout)


@pytest.mark.parametrize("name", SCRIPTS)
def test_figures_lie_in_their_ranges(name, tmp_path):
    done = run(name, *SCRIPTS[name], "--output_dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All figures are inside." in done.stdout
    assert "**outside**" not in done.stdout
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_outside_of_its_range_is_an_error(tmp_path):
    done = run("gradnorm_toy", "--quick", "--steps", 5, "--output_dir", tmp_path)  # far from any equilibrium
    assert done.returncode == 1
    assert "**outside**" in done.stdout
